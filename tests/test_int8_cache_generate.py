"""Generation and batches over a cache of 8-bit integers, beside passes by hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from int8_cache_helpers import CONFIG, ROWS, TOKENS, run

from jrope.batch.engine import Engine
from jrope.batch.room import slots_for
from jrope.batch.work import Work
from jrope.errors import JropeError
from jrope.generation.ahead import compile_ahead
from jrope.generation.guesser import Draft, PromptLookup
from jrope.generation.run import Generation, generate
from jrope.generation.sample import Sampler
from jrope.model.llama import init_params
from jrope.tree import Params

PROMPT, NEW = TOKENS[:, :16], 6
FLIPPED = 5e-3  # what another rounding of a key's number may do to a log-probability
OPTIONS: Any = {"max_new_tokens": NEW, "cache_dtype": "int8"}


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(jax.random.key(0), CONFIG)


def by_hand(params: Params, chunks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens and their log-probabilities, pass by pass: [B, NEW] each."""
    own = {"config": CONFIG, "rope_lengths": PROMPT.shape[1] + NEW}
    logits, cache = run(params, chunks[0], capacity=40, cache_dtype="int8", **own)
    for chunk in chunks[1:]:
        logits, cache = run(params, chunk, cache=cache, config=CONFIG)
    tokens, chances = [], []
    for _ in range(NEW):
        last = jax.nn.log_softmax(logits[:, -1])
        tokens.append(jnp.argmax(last, axis=-1))
        chances.append(jnp.max(last, axis=-1))
        logits, cache = run(params, tokens[-1][:, None], cache=cache, config=CONFIG)
    return np.stack(tokens, 1), np.stack(chances, 1)


def assert_alike(out: Generation, want: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(out.tokens, want[0])
    np.testing.assert_allclose(np.asarray(out.logprobs), want[1], atol=FLIPPED)


@pytest.fixture(scope="module")
def hand(params: Params) -> tuple[np.ndarray, np.ndarray]:
    return by_hand(params, [PROMPT])  # 0.05 from those over floats


def test_guesses_leave_what_single_tokens_do(
    params: Params, hand: tuple[np.ndarray, np.ndarray]
) -> None:
    own: Any = {**OPTIONS, "config": CONFIG, "speculate": PromptLookup(3)}
    assert_alike(generate(params, PROMPT, logprobs=True, **own), hand)


def test_chunks_see_the_integers_of_those_before(params: Params) -> None:
    own: Any = {**OPTIONS, "config": CONFIG, "prefill_chunk": 8}
    out = generate(params, PROMPT, logprobs=True, **own)
    assert_alike(out, by_hand(params, [PROMPT[:, :8], PROMPT[:, 8:]]))


def test_what_compiles_ahead_is_over_integers(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: self.as_text())
    own: Any = {**OPTIONS, "config": CONFIG, "prefill_chunk": 8}
    for guesser in (None, Draft(params, CONFIG, 3)):
        programs: Any = compile_ahead(params, PROMPT, speculate=guesser, **own)
        slots = 32 if guesser is None else 35
        for name in {*programs} - {"first_token"}:
            shape, text = f"tensor<{ROWS}x{slots}x2x16x", programs[name]
            assert f"{shape}i8>" in text, name
            products = [s for s in text.splitlines() if "stablehlo.multiply" in s]
            assert not any(f"{shape}f32>" in s for s in products), "never dequantised"


def test_another_dtype_is_refused(params: Params) -> None:
    wrong: Any = {"cache_dtype": "int4"}
    with pytest.raises(JropeError, match="cache_dtype: got 'int4', want 'int8' or"):
        generate(params, PROMPT, config=CONFIG, **wrong)


def test_a_batch_is_the_passes_by_hand(
    params: Params, hand: tuple[np.ndarray, np.ndarray]
) -> None:
    """Three rows in two slots, one of which is cleaned and filled again."""
    make = partial(Engine, params, CONFIG, capacity=32, slots=2, piece=16)
    engine = make(cache_dtype="int8", logprobs=False)
    plain: Any = {"stop_ids": (), "seed": 0, "sampler": Sampler()}
    rows = [
        Work(key=i, prompt=PROMPT[i % ROWS], max_new_tokens=NEW, **plain)
        for i in range(3)
    ]
    for row in engine.run(rows):
        assert list(row.tokens) == hand[0][row.key % ROWS].tolist()
    with pytest.raises(JropeError, match="cache_dtype: got 'int2'"):
        make(cache_dtype="int2")


def test_twice_the_slots_fit(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long rows, whose slots are next to all that a row keeps."""
    half: Any = jax.eval_shape(
        lambda: init_params(jax.random.key(0), CONFIG, "bfloat16")
    )
    found = partial(slots_for, half, CONFIG, 2**16, 2**27)
    assert (found(), found(cache_dtype="int8")) == (5, 10)
    monkeypatch.setattr("jrope.batch.engine.free_memory", lambda layout: 2**27)
    engine = Engine(half, CONFIG, capacity=2**16, cache_dtype="int8")
    assert engine.stats.slots == 10


def test_rows_share_a_prefix_of_integers(params: Params) -> None:
    """In programs of such slots; the first rows of a prefix see it as it was."""
    engine = Engine(params, CONFIG, capacity=48, slots=2, piece=16, cache_dtype="int8")
    behind, rows = engine.shapes.behind[0], range(4)
    prompt = np.resize(PROMPT[0], 2 * behind + 2)
    plain: Any = {"stop_ids": (), "seed": 0, "sampler": Sampler()}
    asked = {"prompt": prompt, "shared": 2 * behind, "max_new_tokens": NEW}
    found = [*engine.run([Work(key=i, **asked, **plain) for i in rows])]
    assert all(row.finite and len(row.tokens) == NEW for row in found)
    assert len({tuple(row.tokens) for row in found}) == 1
    assert engine.stats.shared_tokens == len(rows) * 2 * behind
