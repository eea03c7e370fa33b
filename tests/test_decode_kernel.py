"""The GPU's kernel of a decode step, interpreted: against float64, and in the model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_helpers import text_for_cuda
from model_helpers import changed, close, tokens_of
from model_helpers import make as make

from jrope.model import attention, decode_kernel, decode_parts, layers
from jrope.model.cache import write
from jrope.model.decode_kernel import attend_int8, rotate_append_attend
from jrope.model.decode_parts import kernel_takes
from jrope.model.llama import forward
from jrope.rope import Rope, rotate

S = 300
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def inputs(
    dtype: Any,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    width: int,
    tokens: int = 1,
) -> dict[str, Any]:
    """Random ones; what lies past a row's length is infinite."""
    random, batch = np.random.default_rng(0), len(lengths)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), dtype)

    past = np.arange(S)[None, :] >= np.asarray(lengths)[:, None]
    slots = (normal(batch, S, kv_heads, width) for _ in range(2))
    phase = 9 * random.standard_normal((batch, tokens, width // 2))
    return {
        "q": normal(batch, tokens, heads, width),
        "k": normal(batch, tokens, kv_heads, width),
        "v": normal(batch, tokens, kv_heads, width),
        "slots": tuple(jnp.where(past[..., None, None], jnp.inf, x) for x in slots),
        "starts": jnp.asarray(lengths, jnp.int32),
        "cos": jnp.cos(phase).astype(jnp.float32),
        "sin": jnp.sin(phase).astype(jnp.float32),
    }


def expected(q: Any, k: Any, v: Any, slots: Any, starts: Any, row: int) -> np.ndarray:
    """Of a row's rotated queries and keys, in float64: [T, N, H]."""
    end, count = int(starts[row]), q.shape[1]
    keys, values = (
        np.concatenate([np.asarray(x[row, :end]), np.asarray(new[row])])
        for x, new in zip(slots, (k, v), strict=True)
    )
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    groups = np.asarray(q[row], np.float64)
    groups = groups.reshape(count, keys.shape[1], -1, q.shape[3])
    scores = np.einsum("tkgh,skh->kgts", groups, keys) / np.sqrt(q.shape[3])
    hidden = np.arange(end + count)[None, :] > end + np.arange(count)[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("kgts,skh->tkgh", weights, values).reshape(q.shape[1:])


@pytest.mark.parametrize("programs", [1, 24])
@pytest.mark.parametrize(
    ("dtype", "heads", "tokens", "precision"),
    [
        ("float32", (6, 2), 1, "accurate"),
        ("float32", (6, 2), 8, "parity"),
        ("bfloat16", (9, 3), 1, "parity"),
        ("bfloat16", (2, 2), 5, "accurate"),
        ("float16", (2, 2), 1, "parity"),
    ],
)
def test_a_step(
    dtype: Any,
    heads: tuple[int, int],
    tokens: int,
    precision: Any,
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole shares and empty ones, a first token and the last slot."""
    monkeypatch.setattr(decode_parts, "PROGRAMS", programs)
    given = inputs(dtype, [0, 1, 130, S - tokens], *heads, 64, tokens)
    call = partial(rotate_append_attend, precision=precision, scale=None)
    y, slots = call(**given, interpret=True)
    turn = partial(rotate, cos=given["cos"], sin=given["sin"], precision=precision)
    q, k, v = turn(given["q"]), turn(given["k"]), given["v"]
    for row in range(4):
        want = expected(q, k, v, given["slots"], given["starts"], row)
        got = np.asarray(y[row], np.float64)
        # Values of at most 5; weights and the result are rounded to the dtype.
        np.testing.assert_allclose(got, want, atol=8 * EPS[dtype], rtol=0)
    for got, old, new in zip(slots, given["slots"], (k, v), strict=True):
        want = np.asarray(write(old, new, given["starts"]), np.float32)
        got = np.asarray(got, np.float32)
        # Interpreted, XLA skips the roundings of products to float16, not to bfloat16.
        close = {"float32": 1e-6, "bfloat16": 0, "float16": 4 * EPS["float16"]}
        np.testing.assert_allclose(got, want, rtol=0, atol=close[dtype])


def test_long_rows_begin_first_where_programs_wait() -> None:
    lengths = jnp.array([3, 90, 0, 7], jnp.int32)
    few = decode_parts.longest_first(lengths, decode_parts.PROGRAMS)
    many = decode_parts.longest_first(lengths, decode_parts.PROGRAMS + 1)
    assert few.tolist() == [0, 1, 2, 3] and many.tolist() == [1, 3, 0, 2]
    assert few.dtype == many.dtype == jnp.int32


@pytest.mark.parametrize("tokens", [1, 3])
def test_past_the_last_slot_nothing_is_written(tokens: int) -> None:
    given = inputs("float32", [S, S + 7, S - 1], 4, 2, 64, tokens)
    call = partial(rotate_append_attend, precision="parity", scale=None)
    _, slots = call(**given, interpret=True)
    for got, old in zip(slots, given["slots"], strict=True):
        np.testing.assert_array_equal(got[:2], old[:2])
        np.testing.assert_array_equal(got[2, : S - 1], old[2, : S - 1])
        assert np.isinf(old[2, S - 1]).all() and np.isfinite(got[2, S - 1]).all()


@pytest.mark.parametrize(("width", "tokens"), [(64, 1), (128, 1), (128, 8)])
@pytest.mark.parametrize("batch", [1, 200])
def test_triton_takes_it(width: int, tokens: int, batch: int) -> None:
    given = inputs("bfloat16", [7] * batch, 8, 2, width, tokens)
    call = partial(rotate_append_attend, precision="parity", scale=0.1)
    text = text_for_cuda(call, **given)
    assert "rotate_append_attend" in text
    assert ("join_shares" in text) == (batch == 1)


@pytest.mark.parametrize("programs", [1, 24])
def test_integers(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit slots with scales: what they stand for, in float64."""
    monkeypatch.setattr(decode_parts, "PROGRAMS", programs)
    random, lengths = np.random.default_rng(1), np.array([1, 64, 129, S], np.int32)
    numbers = random.integers(-127, 128, (2, 4, S, 2, 64)).astype(np.int8)
    scales = random.uniform(0.01, 0.03, (2, 4, S, 2, 1)).astype(jnp.bfloat16)
    q = jnp.asarray(random.standard_normal((4, 1, 6, 64)), jnp.float32)
    got = attend_int8(
        q,
        (jnp.asarray(numbers[0]), jnp.asarray(numbers[1])),
        (jnp.asarray(scales[0]), jnp.asarray(scales[1])),
        jnp.asarray(lengths),
        scale=0.2,
        interpret=True,
    )
    keys, values = numbers.astype(np.float64) * scales.astype(np.float64)
    for row, end in enumerate(lengths):
        groups = np.asarray(q[row, 0], np.float64).reshape(2, 3, 64)
        scores = 0.2 * np.einsum("kgh,skh->kgs", groups, keys[row, :end])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        want = np.einsum("kgs,skh->kgh", weights, values[row, :end]).reshape(6, 64)
        # Scores of at most 40, whose rounding is a relative error of a weight.
        np.testing.assert_allclose(got[row, 0], want, atol=1e-4, rtol=0)


def test_triton_takes_integers() -> None:
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.int8)
    numbers, scales = shape((2, S, 2, 128)), shape((2, S, 2, 1), dtype=jnp.bfloat16)
    q, lengths = shape((2, 1, 8, 128), dtype=jnp.bfloat16), shape((2,), dtype=jnp.int32)
    given = q, (numbers, numbers), (scales, scales), lengths
    assert "attend_int8" in text_for_cuda(partial(attend_int8, scale=None), *given)


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    q: Any = jax.ShapeDtypeStruct((1, 1, 4, 64), jnp.bfloat16)
    assert not kernel_takes(q, 2)  # no GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernel_takes(q, 2)
    assert kernel_takes(q.update(shape=(1, 16, 8, 64)), 2)
    assert not kernel_takes(q.update(shape=(1, 2, 4, 64)), 2, 1)
    assert not kernel_takes(q.update(shape=(1, 17, 4, 64)), 2)
    assert not kernel_takes(q.update(shape=(1, 16, 10, 64)), 2)
    assert not kernel_takes(q.update(shape=(1, 1, 4, 80)), 2)
    assert not kernel_takes(q.update(shape=(1, 1, 130, 64)), 2)
    assert not kernel_takes(q.update(dtype=jnp.dtype("float32")), 2)
    monkeypatch.setattr(decode_parts, "find_spec", lambda name: None)
    assert not kernel_takes(q, 2)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The model takes the kernel, interpreted; how often it was traced."""
    count, chosen = list[int](), jax.lax.platform_dependent

    def fused(*given: Any, **how: Any) -> Any:
        count.append(1)
        return rotate_append_attend(*given, **how, interpret=True)

    def choose(*given: Any, **ways: Callable[..., Any]) -> Any:
        own: Any = ways.get("cuda")
        if isinstance(own, partial) and own.func is fused:
            return own(*given)
        return chosen(*given, **ways)

    monkeypatch.setattr(layers, "rotate_append_attend", fused)
    monkeypatch.setattr(layers, "kernel_takes", lambda q, heads: q.shape[1] <= 2)
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    jax.clear_caches()
    return count


def test_the_model_takes_it(make: Any, kernel: list[int]) -> None:
    """Tokens by one and by two beside all at once: two layers, groups of two heads."""
    model = make()
    tokens = tokens_of(model.config, 2, 9)
    run = partial(forward, model.params, config=model.config)
    want, _ = run(tokens)
    _, cache = run(tokens[:, :6], lengths=[6, 4], capacity=9)
    for at, end in ((0, 1), (1, 3)):
        where = [slice(6 + at, 6 + end), slice(4 + at, 4 + end)]
        rows = jnp.stack([x[part] for x, part in zip(tokens, where, strict=True)])
        got, cache = run(rows, cache=cache)
        both = jnp.stack([x[part] for x, part in zip(want, where, strict=True)])
        close(got, both)
    assert len(kernel) == 2  # the layers share their program


@pytest.mark.parametrize(
    "fields",
    [
        {"rope": Rope(theta=1e4, rotary_dim=8, layout="interleaved")},
        {"rope": Rope(theta=1e4, rotary_dim=4)},
        {"score_cap": 20.0},
    ],
)
def test_what_it_does_not_compute(
    make: Any, kernel: list[int], fields: dict[str, Any]
) -> None:
    model = make()
    config = changed(model.config, **fields)
    tokens = tokens_of(config, 1, 4)
    _, cache = forward(model.params, tokens[:, :3], config=config, capacity=4)
    forward(model.params, tokens[:, 3:], cache=cache, config=config)
    assert not kernel


def test_derivatives_and_maps(
    make: Any, kernel: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are those of rotating, writing and attending one after the other."""
    model = make()
    tokens = tokens_of(model.config, 3, 1, 6)
    run = partial(forward, config=model.config)
    _, caches = jax.vmap(lambda x: run(model.params, x[:, :5], capacity=6))(tokens)

    def logits(params: Any) -> jax.Array:
        step = jax.vmap(lambda x, cache: run(params, x[:, 5:], cache=cache)[0])
        return step(tokens, caches)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(logits(params) ** 2)

    got = logits(model.params), jax.grad(loss)(model.params)
    assert kernel
    monkeypatch.setattr(layers, "kernel_takes", lambda q, heads: False)
    jax.clear_caches()
    want = logits(model.params), jax.grad(loss)(model.params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), got, want)


def test_the_model_takes_it_for_integers(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    tokens = tokens_of(model.config, 2, 8)
    run = partial(forward, model.params, config=model.config)
    _, cache = run(tokens[:, :5], lengths=[5, 3], capacity=6, cache_dtype="int8")
    want, _ = run(tokens[:, 5:6], cache=cache)
    taken = list[int]()

    def interpreted(*given: Any, **how: Any) -> Any:
        taken.append(1)
        return attend_int8(*given, **how, interpret=True)

    monkeypatch.setattr(decode_kernel, "attend_int8", interpreted)
    monkeypatch.setattr(
        attention, "kernel_takes", lambda q, heads, tokens: q.shape[1] == tokens
    )
    monkeypatch.setattr(attention, "on_cuda", lambda kernel, plain: kernel)
    jax.clear_caches()
    got, _ = run(tokens[:, 5:6], cache=cache)
    assert taken
    close(got, want)
