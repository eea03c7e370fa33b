"""What fine-tuning on long windows consists of: the windows, one step, held-out text.

extend_context.py and extension_table.py are made of this.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from train_tiny import cast, clean

import jrope
from jrope.cli.terminal import bytes_text
from jrope.cli.text import vocabulary
from jrope.errors import JropeError

State = dict[str, Any]  # params and moments, float32


# --- The windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Ids to cut windows from, and the ids that every window begins with."""

    stream: np.ndarray
    start: tuple[int, ...]

    def draw(self, window: int, batch: int, seed: int, step: int) -> np.ndarray:
        """The windows of one step, [batch, window]: nothing but arguments decides."""
        fresh = window - len(self.start)
        random = np.random.default_rng((seed, step))
        first = random.integers(0, self.stream.size - fresh + 1, (batch, 1))
        rows = self.stream[first + np.arange(fresh)[None, :]]
        return np.insert(rows, [0] * len(self.start), self.start, axis=1)

    def windows(self, window: int) -> np.ndarray:
        """The stream cut into windows side by side; what is left over is dropped."""
        fresh = window - len(self.start)
        count = self.stream.size // fresh
        rows = self.stream[: count * fresh].reshape(count, fresh)
        return np.insert(rows, [0] * len(self.start), self.start, axis=1)

    def split(self, parts: int) -> tuple["Text", "Text"]:
        """All but the last of so many parts, and that one."""
        cut = self.stream.size - self.stream.size // parts
        halves = self.stream[:cut], self.stream[cut:]
        first, last = (dataclasses.replace(self, stream=half) for half in halves)
        return first, last


def read_text(
    paths: Sequence[Path], tokenizer: Any, config: jrope.LlamaConfig, unwrap: bool
) -> Text:
    """The files as one stream, the model's end token (where it has one) after each.

    Args:
      paths: UTF-8 text.
      tokenizer, config: the model's.
      unwrap: make each paragraph one line, as train_tiny.py does with books.
    """
    end, ids = config.eos_token_id[:1], []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise JropeError(f"{path} is not UTF-8: byte {error.start}") from None
        text = clean(text) if unwrap else text
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(np.asarray([*found, *end], np.int32))
    start = tuple(tokenizer("")["input_ids"])
    text = Text(stream=np.concatenate(ids), start=start)
    if text.stream.max(initial=0) >= config.vocab_size:
        got = f"{vocabulary(tokenizer)} ids, the model {config.vocab_size}"
        raise JropeError(f"the tokenizer has {got}: they do not belong together")
    return text


# --- One step


def make_step(config: jrope.LlamaConfig, dtype: str, remat: bool) -> Any:
    """step(state, rows [parts, batch / parts, window], rate) -> state, loss; jitted.

    The gradients of the parts are added up in float32, so that parts change memory and
    rounding only.  Then a clip at norm 1, and Adam without decay, as in YaRN's paper.
    """

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        scores = jrope.score(cast(params, dtype), rows, config=config, remat=remat)
        return -jnp.mean(scores)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, rows: jax.Array, rate: jax.Array) -> tuple[State, jax.Array]:
        params = state["params"]

        def add(total: Any, part: jax.Array) -> tuple[Any, None]:
            new = jax.value_and_grad(loss)(params, part)
            return jax.tree.map(jnp.add, total, new), None

        nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, nothing, rows)
        value, grads = jax.tree.map(lambda x: x / np.float32(len(rows)), total)
        updates, moments = make_optimizer().update(grads, state["moments"], params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return {"params": params, "moments": moments}, value

    return step


def make_optimizer() -> optax.GradientTransformation:
    """All but the learning rate, which is an argument of the step."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95))


def new_state(params: Any) -> State:
    """A copy of the weights (the step overwrites its state) and empty moments."""
    params = jax.tree.map(jnp.copy, params)
    return {"params": params, "moments": make_optimizer().init(params)}


def learning_rates(steps: int, peak: float, warmup: int) -> np.ndarray:
    """Up in a line, down to a tenth in half a cosine: float32 [steps]."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak / 10)
    return np.asarray(schedule(jnp.arange(1, steps + 1)), np.float32)


def compile_step(step: Any, state: State, shape: Sequence[int]) -> tuple[Any, int]:
    """The compiled step and the bytes that it needs on the device, state included.

    Raises:
      JropeError: the device has less.
    """
    like = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rows = jax.ShapeDtypeStruct(tuple(shape), jnp.int32)
    order = None
    if jax.default_backend() == "cpu":
        # Its usual order of operations computes all layers anew at once: nothing saved.
        order = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    compiled = step.lower(state, rows, like(())).compile(compiler_options=order)
    sizes = compiled.memory_analysis()
    need = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes
    have = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if need > have:
        raise JropeError(
            f"a step needs {bytes_text(need)}, the device has {bytes_text(have)}: "
            "more --parts, or a shorter --window"
        )
    return compiled, need


def held_out_nats(
    params: Any, text: Text, window: int, config: jrope.LlamaConfig
) -> np.ndarray:
    """-log p of every token of the text cut into windows, [windows, window - 1]."""
    rows = text.windows(window)
    size = max(1, min(len(rows), 2**15 // window))
    rows = rows[: len(rows) // size * size].reshape(-1, size, window)
    score = partial(jrope.score, params, config=config)
    return -np.concatenate([np.asarray(score(jnp.asarray(r))) for r in rows])


# --- Many steps


def train(
    step: Callable[..., tuple[State, jax.Array]],
    state: State,
    losses: list[Any],
    rates: np.ndarray,
    rows: Callable[[int], np.ndarray],
) -> Iterator[tuple[int, State]]:
    """Steps from len(losses) on; after each, how many are done and the state.

    Reading a loss waits for its step, so it is done while the next one runs: the last
    of `losses` is an array of the device still, the others are numbers.
    """
    for i in range(len(losses), len(rates)):
        state, loss = step(state, rows(i), rates[i])
        losses.append(loss)
        losses[-2:-1] = [float(value) for value in losses[-2:-1]]
        if losses[-2:-1] and not math.isfinite(losses[-2]):
            raise JropeError(
                f"the loss of step {i} is {losses[-2]}: try a lower --rate"
            )
        yield i + 1, state
