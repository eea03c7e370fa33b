"""What compiles, what memory it takes, and requests that are refused."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate_helpers import (
    HOT,
    KEY,
    LENGTHS,
    PROMPT,
    VOCABULARY,
    blocks,
    model,
    run,
)
from hypothesis import given
from hypothesis import strategies as st

from jrope.errors import JropeError
from jrope.generation.loop import decode, first_token, generate, prefill, stream
from jrope.generation.request import bucket, prepare
from jrope.generation.sample import Sampler
from jrope.model.cache import KVCache

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
    caches = KVCache.empty(config, batch, 16 + request.output_slots, "float32")
    start = partial(
        first_token, config=config, output_slots=request.output_slots, scored=False
    )
    last = jnp.zeros((batch, config.hidden_size), jnp.float32)
    rows = jax.eval_shape(
        start, params, last, request.prompt, request.lengths, request.sampling
    )
    limit = jnp.asarray(2000, jnp.int32)
    lowered = decode.lower(params, caches, rows, request.sampling, limit, config=config)
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
