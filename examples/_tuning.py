"""What fine-tuning on long windows consists of: windows, steps, their checkpoints.

extend_context.py and extension_table.py are made of this.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import time
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
from jrope.cli.common import enable_compile_cache
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


def command(name: str, run: Callable[[Any], None], args: Any) -> int:
    """Run an example; what is wrong is one line.  Returns the exit status."""
    enable_compile_cache()
    try:
        run(args)
    except (JropeError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0


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


def make_step(
    config: jrope.LlamaConfig,
    dtype: str,
    remat: bool,
    score: Callable[..., jax.Array] = jrope.score,
) -> Any:
    """step(state, rows [parts, batch / parts, window], rate) -> state, loss; jitted.

    The gradients of the parts are added up in float32, so that parts change memory and
    rounding only.  Then a clip at norm 1, and Adam without decay, as in YaRN's paper.
    """

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        scores = score(cast(params, dtype), rows, config=config, remat=remat)
        return -jnp.mean(scores)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, rows: jax.Array, rate: jax.Array) -> tuple[State, jax.Array]:
        params = state["params"]

        def add(i: jax.Array, total: Any) -> Any:
            new = jax.value_and_grad(loss)(params, rows[i])
            return jax.tree.map(jnp.add, total, new)

        # A loop of a length that XLA does not know: it would write a single turn out,
        # mix it with the optimizer, and keep all layers for the norm of the gradients.
        parts = jax.lax.optimization_barrier(np.int32(rows.shape[0]))
        nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        total = jax.lax.fori_loop(0, parts, add, nothing)
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
    compiled = step.lower(state, rows, like(())).compile()
    sizes = compiled.memory_analysis()
    need = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes
    if need > (have := device_memory()):
        raise JropeError(
            f"a step needs {bytes_text(need)}, the device has {bytes_text(have)}: "
            "more --parts, or a shorter --window"
        )
    return compiled, need


def device_memory() -> int:
    """Bytes that JAX may use on its first device; a CPU's are those of the machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats["bytes_limit"]


def held_out_nats(
    params: Any,
    text: Text,
    window: int,
    config: jrope.LlamaConfig,
    score: Callable[..., jax.Array] = jrope.score,
) -> np.ndarray:
    """-log p of every token of the text cut into windows, [windows, window - 1]."""
    rows = text.windows(window)
    size = min(len(rows), max(1, 2**15 // window))
    score = partial(score, params, config=config)
    batches = [
        np.resize(rows[i : i + size], (size, window)) for i in range(0, len(rows), size)
    ]
    scores = [np.asarray(score(jnp.asarray(batch))) for batch in batches]
    return -np.concatenate(scores)[: len(rows)]


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


class Display:
    """A bar on terminals, and a line of the log now and then."""

    def __init__(self, steps: int, tokens: int, first: int) -> None:
        self.steps, self.tokens, self.first = steps, tokens, first
        self.every, self.started = max(1, steps // 20), time.perf_counter()

    def __call__(self, done: int, losses: list[Any]) -> None:
        """Tell of `done` steps, of which all but the last have ended."""
        if (ended := done - self.first - 1) < 1:
            return
        each = (time.perf_counter() - self.started) / ended
        loss, speed = np.mean(losses[-self.every - 1 : -1]), self.tokens / each
        line = f"step {done}/{self.steps}  loss {loss:.3f}  {speed:,.0f} tokens/s"
        if sys.stderr.isatty():
            bar = "#" * (30 * done // self.steps)
            left = f"{each * (self.steps - done):,.0f} s left"
            end = "\r" if done < self.steps else "\r\x1b[K"
            print(f"[{bar:.<30}] {line}  {left} ", end=end, file=sys.stderr, flush=True)
        if done % self.every == 0 or done == self.steps:
            print(line, flush=True)


class Checkpoints:
    """Weights, moments and losses in a folder, for runs of one setting."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import orbax.checkpoint as ocp
        except ImportError:
            raise JropeError('want orbax: pip install "jrope[train]"') from None
        logging.getLogger("absl").setLevel(logging.ERROR)
        how = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self.args = ocp.args
        self.manager = ocp.CheckpointManager(folder.resolve() / "steps", options=how)
        note = folder / "settings.json"
        old = json.loads(note.read_text("utf-8")) if note.exists() else settings
        if self.manager.latest_step() is not None and old != settings:
            names = [name for name in settings if old.get(name) != settings[name]]
            what = f"{folder} is of a run with another {', '.join(names)}"
            raise JropeError(f"{what}: remove it, or give the same")
        note.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def save(self, done: int, state: State, losses: list[Any]) -> None:
        """Write a checkpoint, whole or not at all."""
        tree = {**state, "losses": np.asarray([float(x) for x in losses], np.float32)}
        self.manager.save(done, args=self.args.StandardSave(tree))

    def restore(self, state: State) -> tuple[State, list[float]]:
        """The newest state and the losses up to it; `state` and none of a new run."""
        if (done := self.manager.latest_step()) is None:
            return state, []
        tree = {**state, "losses": np.zeros(done, np.float32)}
        tree = self.manager.restore(done, args=self.args.StandardRestore(tree))
        return tree, [float(loss) for loss in tree.pop("losses")]
