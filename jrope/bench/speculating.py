"""Guessing: what a pass over several tokens costs, what it saves where texts repeat.

A pass over the newest token and n guesses is timed beside a step of one, in turns.
Then rows are decoded with guesses and without, in turns: greedily after a prompt that
is one piece again and again, and at temperature 1 after one of which no token comes
twice; or greedily after prompts of one's own.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from jrope.bench.runs import in_turns
from jrope.errors import JropeError
from jrope.generation.guesser import Guesser
from jrope.generation.loop import DecodeState, prefill_and_first_token
from jrope.generation.request import Request, SamplingParams, prepare
from jrope.generation.run import Decoding
from jrope.generation.sample import Sampler
from jrope.generation.speculate import one_pass
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.tree import Params

PIECE = 64  # tokens that are repeated
REPEATS, NEVER = "text that repeats", "text that does not repeat"
TEXTS = {REPEATS: Sampler(), NEVER: Sampler(temperature=1.0)}


@final
@dataclass(frozen=True, kw_only=True)
class Guessed:
    """One text, with guesses and without.

    Args:
      text: which.
      seconds: of the new tokens after the first, with guesses.
      plain_seconds: without.
      passes: of the model, with guesses.
      steps: without.
    """

    text: str
    seconds: float
    plain_seconds: float
    passes: int
    steps: int

    @property
    def speed(self) -> float:
        """In terms of the speed without guesses."""
        return self.plain_seconds / self.seconds

    @property
    def tokens_a_pass(self) -> float:
        """New tokens, in terms of the passes that took them."""
        return self.steps / self.passes

    def line(self) -> str:
        """For people."""
        if not self.steps:
            return f"{self.text}: ended with its first token, which is not timed"
        return (
            f"{self.text}: {self.speed:.2f}x as fast as without guesses, "
            f"{self.tokens_a_pass:.2f} tokens a pass"
        )


def middle(found: Sequence[Guessed]) -> str:
    """Several texts in a line, without those that ended with their first token."""
    if not (found := [one for one in found if one.steps]):
        return "no answer went on behind its first token"
    speeds = [one.speed for one in found]
    tokens = statistics.median(one.tokens_a_pass for one in found)
    return (
        f"median of {len(found)}: {statistics.median(speeds):.2f}x as fast "
        f"({min(speeds):.2f} to {max(speeds):.2f}), {tokens:.2f} tokens a pass"
    )


@final
@dataclass(frozen=True, kw_only=True)
class Speculated:
    """What guessing costs and saves in one shape.

    Args:
      batch, context: rows, and tokens of their prompts.
      tokens: guessed at a time.
      step_seconds: of a pass over one token.
      pass_seconds: of a pass over one more than the guesses.
      texts: with guesses and without.
    """

    batch: int
    context: int
    tokens: int
    step_seconds: float
    pass_seconds: float
    texts: tuple[Guessed, ...]

    def lines(self) -> list[str]:
        """For people."""
        ratio = self.pass_seconds / self.step_seconds
        head = f"{self.batch} x {self.context}: a pass over {self.tokens + 1} tokens "
        head += f"takes {ratio:.2f}x a step of one, {self.step_seconds * 1e3:.3f} ms"
        return [head, *[f"    {text.line()}" for text in self.texts]]


def measure(
    params: Params,
    config: LlamaConfig,
    guesser: Guesser,
    *,
    batch: int,
    context: int,
    new: int,
    repeats: int,
    patience: float,
) -> Speculated:
    """Everything in one shape; `new` tokens after the first, medians of `repeats`."""
    how = repeats, patience
    make = partial(_request, config, batch, context, new)
    request = make(REPEATS, guesser)
    runs = {
        "step": partial(_passes, params, config, request, 0, new),
        "pass": partial(_passes, params, config, request, guesser.tokens, new),
    }
    times, texts = _medians(runs, *how), list[Guessed]()
    for text in TEXTS:
        asked = {who: make(text, one) for who, one in _ways(guesser).items()}
        texts.append(_beside(params, config, text, asked, *how))
    return Speculated(
        batch=batch,
        context=context,
        tokens=guesser.tokens,
        step_seconds=times["step"],
        pass_seconds=times["pass"],
        texts=tuple(texts),
    )


def measure_own(
    params: Params,
    config: LlamaConfig,
    guesser: Guesser,
    prompts: Mapping[str, Sequence[int]],
    *,
    new: int,
    repeats: int,
    patience: float,
) -> Iterator[Guessed]:
    """Each of these prompts' answers, greedy, of at most `new` tokens after the first.

    All prompts are padded to one width, so that nothing is compiled anew.
    """
    width = max(map(len, prompts.values()))
    for name, ids in prompts.items():
        prompt = np.zeros((1, width), np.int32)
        prompt[0, : len(ids)] = ids
        given = prompt, np.array([len(ids)], np.int32), config
        asked = {
            who: prepare(*given, max_new_tokens=new + 1, speculate=one)
            for who, one in _ways(guesser).items()
        }
        yield _beside(params, config, name, asked, repeats, patience)


def _ways(guesser: Guesser) -> dict[str, Guesser | None]:
    return {"guessed": guesser, "plain": None}


def _beside(
    params: Params,
    config: LlamaConfig,
    text: str,
    asked: Mapping[str, Request],
    repeats: int,
    patience: float,
) -> Guessed:
    """The same rows with guesses and without, in turns."""
    counts = dict[str, int]()
    runs = {
        who: partial(_decoded, params, config, request, counts, who)
        for who, request in asked.items()
    }
    found = _medians(runs, repeats, patience)
    return Guessed(
        text=text,
        seconds=found["guessed"],
        plain_seconds=found["plain"],
        passes=counts["guessed"],
        steps=counts["plain"],
    )


def _medians(
    runs: dict[str, Callable[[], float]], repeats: int, patience: float
) -> dict[str, float]:
    times, problems = in_turns(runs, repeats, patience)
    if problems:
        raise JropeError("; ".join(f"{who}: {why}" for who, why in problems.items()))
    return {name: statistics.median(found) for name, found in times.items()}


def _request(
    config: LlamaConfig,
    batch: int,
    context: int,
    new: int,
    text: str,
    guesser: Guesser | None,
) -> Request:
    random = np.random.default_rng(2)
    size = config.vocab_size
    if text == REPEATS:
        piece = random.integers(0, size, (batch, min(PIECE, -(-context // 2))))
        prompt = np.tile(piece, (1, -(-context // piece.shape[1])))[:, :context]
    else:
        rows = [np.resize(random.permutation(size), context) for _ in range(batch)]
        prompt = np.stack(rows)
    return prepare(
        prompt.astype(np.int32),
        None,
        config,
        sampler=TEXTS[text],
        key=jax.random.key(3),
        max_new_tokens=new + 1,
        stop_ids=(),
        speculate=guesser,
    )


@partial(jax.jit, static_argnames=("count", "config"), donate_argnames=("cache",))
def _many(
    params: Params,
    cache: KVCache,
    rows: DecodeState,
    guesses: jax.Array,
    sampling: SamplingParams,
    *,
    count: int,
    config: LlamaConfig,
) -> Any:
    most = jnp.asarray(count + 1, jnp.int32)

    def step(_: Any, carry: tuple[KVCache, DecodeState]) -> Any:
        cache, rows = carry
        given = params, cache, rows, guesses, sampling, most
        return one_pass(*given, config=config)[:2]

    return jax.lax.fori_loop(0, count, step, (cache, rows))


def _passes(
    params: Params, config: LlamaConfig, request: Request, guesses: int, new: int
) -> float:
    """Seconds of a pass over so many guesses, none of them right."""
    cache, rows, _ = prefill_and_first_token(params, request, config, False)
    wrong = jnp.full((len(request.prompt), guesses), -1, jnp.int32)
    jax.block_until_ready((cache, rows))
    begin = time.perf_counter()
    given = params, cache, rows, wrong, request.sampling
    jax.block_until_ready(_many(*given, count=new, config=config))
    return (time.perf_counter() - begin) / new


def _decoded(
    params: Params,
    config: LlamaConfig,
    request: Request,
    counts: dict[str, int],
    name: str,
) -> float:
    """Seconds of all new tokens after the first; passes into `counts`."""
    cache, rows, _ = prefill_and_first_token(params, request, config, False)
    decoding = Decoding(params, request, config, cache, rows)
    jax.block_until_ready((decoding.cache, decoding.rows, decoding.guessing))
    begin = time.perf_counter()
    decoding.go_on(request.max_new_tokens)
    jax.block_until_ready(decoding.rows)
    seconds = time.perf_counter() - begin
    state = decoding.guessing
    steps = int(jnp.max(decoding.rows.lengths)) - 1
    counts[name] = steps if state is None else int(state.passes)
    return seconds
