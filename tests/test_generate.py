"""Generation against transformers, and each promise about rows, seeds and shapes."""

import dataclasses
import importlib
import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TinyHF, make_tiny_hf
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from jrope.cache import KVCache
from jrope.config import LlamaConfig, nest
from jrope.errors import JropeError
from jrope.evaluate import score
from jrope.generate import Generation, decode, first_token, generate, prefill, stream
from jrope.hf import config_from_hf
from jrope.request import bucket, prepare
from jrope.sample import Sampler

MODULE = importlib.import_module("jrope.generate")  # `jrope.generate` is the function
VOCABULARY = 61
# One bucket for nearly all tests: compiling is what takes the time.
NEW, WIDTH = 16, 18
LENGTHS = np.array([WIDTH, 1, 7])
PROMPT = np.random.default_rng(0).integers(0, VOCABULARY, (3, WIDTH))
PROMPT[np.arange(WIDTH) >= LENGTHS[:, None]] = -7  # anything may stand past the end
HOT = Sampler(temperature=1.3, top_p=0.97)
KEY = jax.random.key(5)

LONG = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * r for r in range(8)],
        "long_factor": [2.0 + 0.7 * r for r in range(8)],
    },
}

Model = tuple[TinyHF, dict[str, Any], LlamaConfig]


@cache
def model(rope: str | None = None, **fields: Any) -> Model:
    """The transformers model, our parameters, our configuration."""
    fields = {"vocab_size": VOCABULARY, **fields}
    tiny = make_tiny_hf(rope_parameters=LONG.get(rope or ""), **fields)
    tiny.model.generation_config = GenerationConfig(pad_token_id=0)
    params = nest({name: jnp.asarray(x) for name, x in tiny.weights.items()})
    return tiny, params, config_from_hf(tiny.config)


def run(prompt: Any = PROMPT, lengths: Any = LENGTHS, **options: Any) -> Generation:
    _, params, config = model()
    options = {"max_new_tokens": NEW, "stop_ids": [], **options}
    return generate(params, prompt, lengths, config=config, **options)


def blocks(**options: Any) -> list[np.ndarray]:
    _, params, config = model()
    options = {"max_new_tokens": NEW, "stop_ids": [], **options}
    return list(stream(params, PROMPT, LENGTHS, config=config, **options))


def prompts() -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(PROMPT, LENGTHS, strict=True)]


def transformers_greedy(ids: list[int], **options: Any) -> list[int]:
    given_ = torch.tensor([ids])
    out = model()[0].model.generate(
        given_,
        attention_mask=torch.ones_like(given_),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options
        ),
    )
    return out[0, len(ids) :].tolist()


def torch_logprobs(tiny: TinyHF, ids: list[int]) -> np.ndarray:
    """log p(. | tokens up to t) [T, V] from one full pass, and nothing kept from it."""
    inner = tiny.model.model
    inner.rotary_emb = type(inner.rotary_emb)(tiny.model.config)  # no memory of lengths
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.log_softmax(-1).numpy()


@cache
def greedy() -> np.ndarray:
    """Tokens without any stop: int32 [3, NEW]."""
    return np.asarray(run(logprobs=True).tokens)


# --- tokens


def test_greedy_is_transformers() -> None:
    got = greedy()
    assert got.dtype == np.int32
    for row, ids in zip(got, prompts(), strict=True):
        assert row.tolist() == transformers_greedy(ids)
    assert len({*got.ravel().tolist()}) > 10, "too dull to tell much"


def test_lengths_default_to_the_width() -> None:
    prompt = np.tile(PROMPT[:1], (3, 1))
    got = run(prompt, None).tokens
    np.testing.assert_array_equal(got, np.tile(greedy()[:1], (3, 1)))


@pytest.mark.parametrize("penalty", [1.6, 0.8])
def test_repetition_penalty_sees_prompt_and_new_tokens(penalty: float) -> None:
    got = run(sampler=Sampler(repetition_penalty=penalty), logprobs=True).tokens
    want = [transformers_greedy(ids, repetition_penalty=penalty) for ids in prompts()]
    assert got.tolist() == want
    assert (np.asarray(got) != greedy()).any(axis=1).sum() >= 2


@pytest.mark.parametrize("new", [0, 1])
def test_none_or_one_new_token(new: int) -> None:
    out = run(max_new_tokens=new, logprobs=True)
    np.testing.assert_array_equal(out.tokens, greedy()[:, :new])
    assert out.lengths.tolist() == [new] * 3
    assert out.logprobs is not None and out.logprobs.shape == (3, new)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs.shape == (3, WIDTH - 1)


def test_logprobs_are_not_made_unasked() -> None:
    out = run()
    assert out.logprobs is None and out.prompt_logprobs is None
    np.testing.assert_array_equal(out.tokens, greedy())


# --- stops


def stops() -> list[int]:
    """The token that ends row 0 after a few steps, and one that ends row 2 later."""
    early = int(greedy()[0, 4])
    late = next(t for t in greedy()[2, 8:].tolist() if t != early)
    return [early, late]


def stopped(ids: list[int], pad: int) -> tuple[np.ndarray, list[int]]:
    """What should come of `greedy()`: rows cut behind the first stop, and lengths."""
    tokens, lengths = greedy().copy(), []
    for row in tokens:
        ends = np.flatnonzero(np.isin(row, ids))
        lengths.append(int(ends[0]) + 1 if ends.size else NEW)
        row[lengths[-1] :] = pad
    return tokens, lengths


@pytest.mark.parametrize("pad", [None, 3, -1])
def test_rows_stop_each_on_its_own(pad: int | None) -> None:
    out = run(stop_ids=stops(), pad_id=pad, logprobs=True)
    tokens, lengths = stopped(stops(), pad or 0)
    assert len({*lengths}) > 1 and min(lengths) < NEW
    np.testing.assert_array_equal(out.tokens, tokens)
    assert out.lengths.tolist() == lengths
    unstopped = np.asarray(run(logprobs=True).logprobs)
    want = np.where(np.arange(NEW) < np.array(lengths)[:, None], unstopped, 0)
    np.testing.assert_array_equal(out.logprobs, want)
    for row, n, ids in zip(tokens, lengths, prompts(), strict=True):
        assert row[:n].tolist() == transformers_greedy(ids, eos_token_id=stops())


def test_stops_and_pad_default_to_the_configuration() -> None:
    config = dataclasses.replace(model()[2], eos_token_id=(4, 9), pad_token_id=5)
    rules = prepare(PROMPT, LENGTHS, config).rules
    assert rules.stop_ids.tolist() == [4, 9, *[-1] * 6] and int(rules.pad_id) == 5
    rules = prepare(PROMPT, LENGTHS, config, stop_ids=[], pad_id=0).rules
    assert rules.stop_ids.tolist() == [-1] * 8 and int(rules.pad_id) == 0
    config = dataclasses.replace(config, pad_token_id=None)
    assert int(prepare(PROMPT, LENGTHS, config).rules.pad_id) == 0


@pytest.mark.parametrize("count, room", [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16)])
def test_stop_ids_come_in_blocks(count: int, room: int) -> None:
    ids = np.arange(count)
    got = prepare(PROMPT, LENGTHS, model()[2], stop_ids=ids).rules.stop_ids
    assert got.tolist() == [*range(count), *[-1] * (room - count)]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns that are filled after each call of `decode`."""
    seen: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        cache, rows = decode(*args, **options)
        seen.append(int(rows.step))
        return cache, rows

    monkeypatch.setattr(MODULE, "decode", watched)
    return seen


def test_the_loop_ends_with_the_last_row(steps: list[int]) -> None:
    ends = [int(t) for t in greedy()[:, 3]]
    longest = max(stopped(ends, 0)[1])
    assert longest < NEW / 2
    steps.clear()  # of the greedy run, if it was not made before
    out = run(stop_ids=ends, logprobs=True)
    assert steps == [longest] and max(out.lengths.tolist()) == longest


# --- log-probabilities


@pytest.mark.parametrize("sampler", [Sampler(), HOT], ids=["greedy", "sampled"])
def test_logprobs_are_those_of_the_raw_logits(sampler: Sampler) -> None:
    out = run(sampler=sampler, key=KEY, logprobs=True)
    assert out.logprobs is not None and out.prompt_logprobs is not None
    assert out.logprobs.dtype == out.prompt_logprobs.dtype == np.float32
    for b, ids in enumerate(prompts()):
        n, whole = len(ids), [*ids, *out.tokens[b].tolist()]
        every = torch_logprobs(model()[0], whole)[:-1]
        want = np.take_along_axis(every, np.array(whole[1:])[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(out.logprobs[b], want[n - 1 :], atol=1e-5)
        np.testing.assert_allclose(
            out.prompt_logprobs[b, : n - 1], want[: n - 1], atol=1e-5
        )
        assert not np.any(out.prompt_logprobs[b, n - 1 :])


def test_prompt_logprobs_are_the_score() -> None:
    _, params, config = model()
    prompt = jnp.asarray(np.maximum(PROMPT, 0), jnp.int32)
    want = score(params, prompt, jnp.asarray(LENGTHS), config=config)
    got = run(logprobs=True).prompt_logprobs
    np.testing.assert_allclose(got, want, atol=2e-6)


# --- long prompts


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_prefill_in_pieces(chunk: int) -> None:
    whole, pieces = run(logprobs=True), run(logprobs=True, prefill_chunk=chunk)
    assert whole.logprobs is not None and whole.prompt_logprobs is not None
    np.testing.assert_array_equal(pieces.tokens, whole.tokens)
    np.testing.assert_allclose(pieces.logprobs, whole.logprobs, atol=1e-5)
    np.testing.assert_allclose(pieces.prompt_logprobs, whole.prompt_logprobs, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("kind", LONG)
def test_past_the_trained_length(kind: str, chunk: int | None) -> None:
    """Every row is rotated for its own planned total: two of them past 16 tokens."""
    longest = 16 if kind == "dynamic" else 64
    tiny, params, config = model(kind, max_position_embeddings=longest)
    new = 10
    out = generate(
        params,
        PROMPT,
        LENGTHS,
        config=config,
        max_new_tokens=new,
        stop_ids=[],
        logprobs=True,
        prefill_chunk=chunk,
    )
    assert (LENGTHS + new).tolist() == [28, 11, 17]
    for b, ids in enumerate(prompts()):
        want = list(ids)
        while len(want) < len(ids) + new:
            planned = [*want, *[0] * (len(ids) + new - len(want))]
            want.append(int(torch_logprobs(tiny, planned)[len(want) - 1].argmax()))
        assert out.tokens[b].tolist() == want[len(ids) :]
        every = torch_logprobs(tiny, want)
        given_ = np.take_along_axis(every[:-1], np.array(want[1:])[:, None], axis=1)
        assert out.logprobs is not None
        np.testing.assert_allclose(
            out.logprobs[b], given_[len(ids) - 1 :, 0], atol=2e-5
        )


# --- seeds and keys


def sampled(rows: list[int], seeds: Any, **options: Any) -> list[list[int]]:
    """Tokens of some rows of PROMPT, in some order, each with its seed."""
    hot = Sampler(temperature=np.full(len(rows), 1.3), top_p=np.full(len(rows), 0.97))
    options = {"sampler": hot, "key": KEY, "seeds": seeds, **options}
    return run(PROMPT[rows], LENGTHS[rows], **options).tokens.tolist()


def test_a_row_keeps_its_samples_in_any_company() -> None:
    a, b, c = sampled([0, 1, 2], [7, 8, 9])
    assert sampled([2, 0, 1], [9, 7, 8]) == [c, a, b]
    assert sampled([1, 1, 0], [8, 3, 7])[::2] == [b, a]
    assert [sampled([r], [s])[0] for r, s in ((0, 7), (1, 8), (2, 9))] == [a, b, c]
    own = Sampler(temperature=np.array([1.3, 0, 1.3]), top_p=np.array([0.97, 1, 0.5]))
    mixed = sampled([0, 1, 2], [7, 8, 9], sampler=own)
    assert mixed[0] == a and mixed[1] == greedy()[1].tolist() and mixed[2] != c


def test_seeds_and_key_decide() -> None:
    one, same, other = sampled([0, 0, 0], [4, 4, 5])
    assert one == same != other
    assert sampled([0, 0, 0], [4, 4, 5], key=jax.random.key(6))[0] != one
    assert sampled([0, 1, 2], None) == sampled([0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32", "int64", "uint64"])
def test_seeds_of_any_integer_type(dtype: str) -> None:
    seeds = np.array([7, 8, 127], dtype)
    assert sampled([0, 1, 2], seeds) == sampled([0, 1, 2], [7, 8, 127])


def test_seeds_of_any_size() -> None:
    many = sampled([0, 0, 0], [-1, -(2**31), 2**32 - 5])
    assert len({tuple(row) for row in many}) == 3
    assert sampled([0, 0, 0], jnp.array([-1, 1, 2], jnp.int32))[0] == many[0]


def test_tokens_are_drawn_as_documented() -> None:
    """Token t of a row with fold_in(fold_in(key, seed), t)."""
    seeds, tokens = [7, 8, 9], sampled([0, 1, 2], [7, 8, 9])
    for b, ids in enumerate(prompts()):
        for t in (0, 1, NEW - 1):
            drawn_key = jax.random.fold_in(jax.random.fold_in(KEY, seeds[b]), t)
            before = [*ids, *tokens[b][:t]]
            logits = torch_logprobs(model()[0], before)[-1:]
            assert HOT(jnp.asarray(logits), drawn_key[None])[0] == tokens[b][t]


def test_legacy_keys_are_taken() -> None:
    typed = sampled([0, 1, 2], [7, 8, 9], key=jax.random.key(3))
    for legacy in (jax.random.PRNGKey(3), np.array([0, 3], np.uint32)):
        assert sampled([0, 1, 2], [7, 8, 9], key=legacy) == typed


def test_samples_follow_the_distribution() -> None:
    """Pairs of tokens: p(first) p(second | first) at a temperature of 1.5."""
    size, draws, t = 5, 8192, 1.5
    tiny, params, config = model(
        layers=1, heads=2, kv_heads=1, hidden_size=16, vocab_size=size
    )
    out = generate(
        params,
        np.full((draws, 1), 3),
        config=config,
        sampler=Sampler(temperature=t),
        key=KEY,
        max_new_tokens=2,
        stop_ids=[],
    )
    logits = [torch_logprobs(tiny, [3, a]) / t for a in range(size)]
    odds = np.exp(np.stack(logits))  # [a, position, b]
    odds /= odds.sum(-1, keepdims=True)
    want = draws * (odds[0, 0][:, None] * odds[:, 1]).ravel()
    pairs = np.asarray(out.tokens) @ np.array([size, 1])
    counts = np.bincount(pairs, minlength=size * size)
    likely = want >= 5
    chi2 = ((counts - want)[likely] ** 2 / want[likely]).sum()
    assert likely.sum() > 12 and chi2 < 60  # p < 1e-4 for 24 degrees of freedom


# --- streaming


@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
def test_stream_is_generate_in_blocks(chunk: int) -> None:
    got = blocks(chunk=chunk)
    assert all(type(b) is np.ndarray and b.dtype == np.int32 for b in got)
    rest, last = divmod(NEW - 1, chunk)
    widths = [1, *[chunk] * rest, *([last] if last else [])]
    assert [b.shape for b in got] == [(3, n) for n in widths]
    np.testing.assert_array_equal(np.concatenate(got, axis=1), greedy())


def test_stream_samples_as_generate() -> None:
    got = blocks(chunk=7, sampler=HOT, key=KEY, seeds=[7, 8, 9], prefill_chunk=3)
    assert np.concatenate(got, axis=1).tolist() == sampled([0, 1, 2], [7, 8, 9])


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_stream_ends_with_the_last_row(chunk: int) -> None:
    ends = [int(t) for t in greedy()[:, 3]]
    tokens, lengths = stopped(ends, 11)
    got = np.concatenate(blocks(stop_ids=ends, pad_id=11, chunk=chunk), axis=1)
    np.testing.assert_array_equal(got, tokens[:, : max(lengths)])


def test_stream_that_stops_at_once(steps: list[int]) -> None:
    """One block, and nothing asked of the device but what was already on its way."""
    firsts = greedy()[:, 0].tolist()
    steps.clear()  # of the greedy run, if it was not made before
    (only,) = blocks(stop_ids=firsts, chunk=1)
    assert steps == [1]
    np.testing.assert_array_equal(only, greedy()[:, :1])


@pytest.mark.parametrize("new", [0, 1, 2])
def test_stream_of_few(new: int) -> None:
    got = blocks(max_new_tokens=new)
    assert [b.shape[1] for b in got] == [1] * new
    assert [b.tolist() for b in got] == [greedy()[:, [i]].tolist() for i in range(new)]


# --- shapes and memory


def sizes() -> tuple[int, ...]:
    return tuple(f._cache_size() for f in (prefill, first_token, decode))


def test_twenty_requests_compile_nothing_new() -> None:
    _, params, config = model()
    random = np.random.default_rng(1)
    run(), blocks()
    before = sizes()
    assert min(before) > 0
    for i in range(20):
        width = int(random.integers(17, 25))
        options: dict[str, Any] = {
            "sampler": Sampler(
                temperature=i % 4 * 0.5,
                top_p=1 - 0.04 * (i % 5),
                top_k=i % 3 * 10,
                min_p=0.01 * (i % 2),
                repetition_penalty=1 + 0.1 * (i % 3),
            ),
            "key": jax.random.key(i),
            "seeds": random.integers(0, 1000, 3),
            "stop_ids": range(i % 9),
            "max_new_tokens": int(random.integers(2, 17)),
            "pad_id": i,
        }
        prompt = random.integers(0, VOCABULARY, (3, width))
        lengths = random.integers(1, width + 1, 3)
        out = generate(params, prompt, lengths, config=config, **options)
        if i % 5 == 0:  # streaming runs the same programs
            got = list(stream(params, prompt, lengths, config=config, **options))
            got = np.concatenate(got, axis=1)
            np.testing.assert_array_equal(got, out.tokens[:, : got.shape[1]])
    assert sizes() == before


def test_pieces_compile_nothing_new_in_a_bucket() -> None:
    _, params, config = model()

    def of_width(width: int) -> None:
        prompt = np.zeros((3, width), np.int32)
        options: dict[str, Any] = {"max_new_tokens": 2, "prefill_chunk": 5}
        generate(params, prompt, config=config, logprobs=True, **options)

    of_width(17)
    before = sizes()
    for width in (18, 20, 21, 24):
        of_width(width)
    assert sizes() == before


@given(n=st.integers(1, 200_000))
def test_buckets(n: int) -> None:
    size = bucket(n)
    assert n <= size <= bucket(n + 1)
    assert size == 16 or size < 1.5 * n
    assert bucket(size) == size
    assert bin(size).count("1") <= 2 and size % 8 == 0


def test_buckets_are_few() -> None:
    assert len({bucket(n) for n in range(1, 32769)}) == 23


def lowered_decode(batch: int) -> tuple[jax.stages.Compiled, KVCache]:
    _, params, config = model()
    prompt = np.zeros((batch, 16), np.int32)
    request = prepare(prompt, None, config, max_new_tokens=2000)
    caches = KVCache.empty(config, batch, 16 + request.room, "float32")
    start = partial(first_token, config=config, room=request.room, scored=False)
    last = jnp.zeros((batch, config.hidden_size), jnp.float32)
    rows = jax.eval_shape(
        start, params, last, request.prompt, request.lengths, request.rules
    )
    limit = jnp.asarray(2000, jnp.int32)
    lowered = decode.lower(params, caches, rows, request.rules, limit, config=config)
    return lowered.compile(), caches


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_writes_the_cache_in_place(batch: int) -> None:
    compiled, caches = lowered_decode(batch)
    size = sum(x.nbytes for x in (*caches.keys, *caches.values))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size  # no second cache
    shape = ",".join(map(str, caches.keys[0].shape))
    whole = re.compile(rf" = f32\[{shape}\]\S* ([\w-]+)\(")
    does = {*whole.findall(compiled.as_text())}
    assert does & {"dynamic-update-slice", "scatter"}
    assert not does & {"copy", "copy-start", "transpose", "broadcast", "concatenate"}


# --- bad requests

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": (
        {"lengths": [18, 0, 7]},
        r"rows \[1\] have \[0\] tokens, want 1 to 18; begin an empty prompt with bos_",
    ),
    "no width": (
        {"prompt": np.zeros((2, 0), int), "lengths": None},
        r"rows \[0, 1\] have \[0, 0\] tokens",
    ),
    "no rows": (
        {"prompt": np.zeros((0, 4), int), "lengths": None},
        "prompt: got no rows, want at least one",
    ),
    "too long": ({"lengths": [19, 1, 7]}, r"rows \[0\] have \[19\] tokens, want 1 to"),
    "negative length": ({"lengths": [-1, 1, 7]}, r"rows \[0\] have \[-1\] tokens"),
    "too few lengths": ({"lengths": [18]}, r"lengths: got int64 \[1\], want integers"),
    "float lengths": ({"lengths": [1.0, 1, 1]}, r"lengths: got float64 \[3\], want"),
    "one length": ({"lengths": 12}, r"lengths: got int64 \[\], want integers \[3\]"),
    "float prompt": ({"prompt": PROMPT * 1.0}, r"prompt: got float64 \[3, 18\], want"),
    "flat prompt": ({"prompt": PROMPT[0]}, r"got int64 \[18\], want integers \[B, T\]"),
    "text": ({"prompt": ["Hello"]}, r"prompt: got <U5 \[1\], want integers"),
    "ragged lists": (
        {"prompt": [[1, 2], [3]]},
        "prompt: got rows of unequal length; pad every row on the right and pass",
    ),
    "outside": (
        {"prompt": np.array([[0, 61, -3]]), "lengths": None},
        r"prompt: ids \[-3, 61\] lie outside the vocabulary of 61; does the tokenizer",
    ),
    "no key": ({"sampler": HOT}, "key: got None, want a jax.random.key"),
    "no key, one hot row": (
        {"sampler": Sampler(temperature=np.array([0.0, 0.0, 1.0]))},
        "key: got None",
    ),
    "number as key": ({"key": 42}, r"key: got 42, want a jax.random.key"),
    "keys": (
        {"key": jax.random.split(KEY, 3)},
        r"key: got shape \(3,\), want one key; rows have seeds",
    ),
    "too few seeds": ({"seeds": [1]}, r"seeds: got int64 \[1\], want integers \[3\]"),
    "one seed": ({"seeds": 1}, r"seeds: got int64 \[\], want integers \[3\]"),
    "float seeds": ({"seeds": [1.0, 2.0, 3.0]}, r"seeds: got float64 \[3\], want"),
    "huge seeds": ({"seeds": [2**70, 1, 2]}, r"seeds: got object \[3\], want"),
    "chunk 0": ({"prefill_chunk": 0}, "prefill_chunk: got 0, want an integer, at leas"),
    "half a chunk": ({"prefill_chunk": 0.5}, "prefill_chunk: got 0.5, want an integer"),
    "fewer than none": (
        {"max_new_tokens": -1},
        "max_new_tokens: got -1, want an integer, at least 0",
    ),
    "more than can be counted": (
        {"max_new_tokens": 2**31},
        "max_new_tokens: got 2147483648 after a prompt of 18, want at most",
    ),
    "half a token": ({"max_new_tokens": 2.5}, "max_new_tokens: got 2.5, want an integ"),
    "true": ({"max_new_tokens": True}, "max_new_tokens: got True, want an integer"),
    "stop outside": (
        {"stop_ids": [3, 61]},
        r"stop_ids: ids \[61\] lie outside the vocabulary of 61",
    ),
    "negative stop": ({"stop_ids": [-1]}, r"stop_ids: ids \[-1\] lie outside"),
    "half a stop": ({"stop_ids": [2.5]}, r"stop_ids: got float64 \[1\], want a list"),
    "one stop": ({"stop_ids": 2}, r"stop_ids: got int64 \[\], want a list of integers"),
    "half a pad": ({"pad_id": 0.5}, "pad_id: got 0.5, want an integer"),
    "sampler of two": (
        {"sampler": Sampler(temperature=np.array([1.0, 1.0])), "key": KEY},
        r"Sampler: temperature is \(2,\), wanted \(\) or \(3,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_says_what_is_wrong(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(JropeError, match=message):
        run(**options)


def test_stream_says_it_at_the_call() -> None:
    _, params, config = model()
    with pytest.raises(JropeError, match="chunk: got 0, want an integer, at least 1"):
        stream(params, PROMPT, LENGTHS, config=config, chunk=0)
    with pytest.raises(JropeError, match="key: got None"):
        stream(params, PROMPT, LENGTHS, config=config, sampler=HOT)
