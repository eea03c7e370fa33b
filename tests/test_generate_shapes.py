"""What compiles, what memory it takes, and requests that are refused."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
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
from jrope.generation.ahead import compile_ahead
from jrope.generation.loop import decode, first_token, prefill
from jrope.generation.request import bucket, prepare
from jrope.generation.run import generate, stream
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
    "flat prompt": (
        {"prompt": PROMPT[0]},
        r"got int64 \[18\], want integers \[B, T\]; a single prompt is \[prompt\]",
    ),
    "text": (
        {"prompt": ["Hello"]},
        r"prompt: got <U5 \[1\], want integers \[B, T\]; a tokenizer turns text",
    ),
    "what a tokenizer gives": (
        {"prompt": {"input_ids": PROMPT}},
        r'prompt: got a dict, want integers \[B, T\]; give its "input_ids", and l',
    ),
    "a tensor that NumPy cannot read": (
        {"prompt": torch.zeros(3, 18, dtype=torch.long, device="meta")},
        r"prompt: got a Tensor \(.*\); give prompt.cpu\(\).numpy\(\)",
    ),
    "a mask as lengths": (
        {"lengths": np.ones((3, 18), int)},
        r"lengths: got int64 \[3, 18\], want integers \[3\]; .* mask.sum\(axis=1\)",
    ),
    "a mask": (
        {"attention_mask": np.ones((3, 18))},
        r"generate has no argument attention_mask \(pad rows on the right and give len",
    ),
    "transformers' words": (
        {"do_sample": True, "eos_token_id": 2, "beams": 3},
        r"do_sample \(give sampler=Sampler.*\), eos_token_id \(give stop_ids\), beams$",
    ),
    "numbers as sampler": (
        {"sampler": {"temperature": 1}},
        r"sampler: got a dict, want a Sampler; such as Sampler\(temperature=0.7\)",
    ),
    "text as temperature": (
        {"sampler": Sampler(temperature="0.7")},  # pyright: ignore
        "Sampler: temperature: got '0.7', want a number",
    ),
    "no top_p": (
        {"sampler": Sampler(top_p=None)},  # pyright: ignore
        "Sampler: top_p: got None, want a number",
    ),
    "no config": ({"config": None}, "config: got a NoneType, want a LlamaConfig; give"),
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
    "floats as key": (
        {"key": np.zeros(2)},
        r"key: got float64 \[2\], want a jax.random.key",
    ),
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
    "half a stop in a set": ({"stop_ids": {2.5}}, r"stop_ids: got float64 \[1\], want"),
    "stop outside, in a set": ({"stop_ids": {61}}, r"stop_ids: ids \[61\] lie outside"),
    "half a stop": ({"stop_ids": [2.5]}, r"stop_ids: got float64 \[1\], want a list"),
    "one stop": ({"stop_ids": 2}, r"stop_ids: got int64 \[\], want a list of integers"),
    "half a pad": ({"pad_id": 0.5}, "pad_id: got 0.5, want an integer"),
    "sampler of two": (
        {"sampler": Sampler(temperature=np.array([1.0, 1.0])), "key": KEY},
        r"Sampler: temperature: got \[2\], want a number, or one for each of 3 rows",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_says_what_is_wrong(case: str) -> None:
    options, message = BAD[case]
    _, params, config = model()
    options = {"prompt": PROMPT, "lengths": LENGTHS, "config": config, **options}
    with pytest.raises(JropeError, match=message):
        generate(params, **options)


@pytest.mark.parametrize("kind", [set, tuple, np.array, jnp.asarray, torch.tensor])
def test_stop_ids_of_any_kind(kind: Any) -> None:
    _, _, config = model()
    got = prepare(PROMPT, LENGTHS, config, stop_ids=kind([4, 9])).sampling.stop_ids
    assert sorted(got.tolist()) == [*[-1] * 6, 4, 9]


def test_prompts_of_any_kind() -> None:
    _, _, config = model()
    want = prepare(PROMPT, LENGTHS, config)
    for kind in (np.ndarray.tolist, torch.tensor, jnp.asarray, list):
        got = prepare(kind(PROMPT), kind(LENGTHS), config)
        np.testing.assert_array_equal(got.prompt, want.prompt)
        np.testing.assert_array_equal(got.lengths, want.lengths)


def test_parameters_that_are_none() -> None:
    _, params, config = model()
    wrong: dict[str, Any] = {
        r"params: got a tree of \['params'\].*; give tree\[\"params\"\]": {
            "params": params
        },
        r"params: got a tuple, want a tree; give what `load` returns": (params, config),
    }
    for message, given_ in wrong.items():
        for function in (generate, stream, compile_ahead):
            with pytest.raises(JropeError, match=message):
                function(given_, PROMPT, LENGTHS, config=config)


TRACED: dict[str, Any] = {
    "prompt": lambda p, x: generate(p, x, config=model()[2]),
    "lengths": lambda p, x: generate(p, PROMPT, x[0], config=model()[2]),
    "seeds": lambda p, x: generate(p, [[1]], seeds=x[0, :1], config=model()[2]),
    "stop_ids": lambda p, x: generate(p, [[1]], stop_ids=x[0], config=model()[2]),
    "pad_id": lambda p, x: generate(p, [[1]], pad_id=x[0, 0], config=model()[2]),
    "max_new_tokens": lambda p, x: generate(
        p, [[1]], max_new_tokens=x[0, 0], config=model()[2]
    ),
    "params": lambda p, x: [*stream(p, [[1]], config=model()[2])],
}


@pytest.mark.parametrize("name", TRACED)
def test_what_is_read_on_the_host_cannot_be_traced(name: str) -> None:
    _, params, _ = model()
    message = f"^{name}: traced by jit, vmap or grad.*call it outside, or `forward` wi"
    with pytest.raises(JropeError, match=message):
        jax.jit(TRACED[name])(params, jnp.ones((1, 3), jnp.int32))
    if name == "prompt":
        with pytest.raises(JropeError, match=message):
            jax.vmap(TRACED[name], (None, 0))(params, jnp.ones((2, 1, 3), jnp.int32))


def test_a_traced_temperature_needs_a_key() -> None:
    def one(temperature: jax.Array) -> Any:
        return prepare(
            [[1]], None, model()[2], sampler=Sampler(temperature=temperature)
        )

    with pytest.raises(JropeError, match=r"key: got None, want a jax.random.key"):
        jax.jit(lambda t: one(t).sampling.keys)(1.0)


def test_stream_says_it_at_the_call() -> None:
    _, params, config = model()
    with pytest.raises(JropeError, match="chunk: got 0, want an integer, at least 1"):
        stream(params, PROMPT, LENGTHS, config=config, chunk=0)
    with pytest.raises(JropeError, match="key: got None"):
        stream(params, PROMPT, LENGTHS, config=config, sampler=HOT)
