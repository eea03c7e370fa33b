"""Rows one behind another in a line: each as if it were alone."""

import inspect
import math
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from test_config import make

import jrope.model.flat
from jrope.batch.reading import put_flat
from jrope.model import kernels
from jrope.model.attention import attend
from jrope.model.flat import Flat, _packed, _padded, attend_flat
from jrope.model.llama import hidden_states, init_params
from jrope.rope import DynamicNTK, LongRope, Rope

LENGTHS = [17, 1, 40, 2, 16, 0, 0]  # of rows in a line of 90
COUNT, LONGEST = 90, 64
CONFIG = make(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope=Rope(theta=10000.0, rotary_dim=8),
    initializer_range=0.3,
)


def flat_of(lengths: list[int], planned: Any = 0) -> Flat:
    size = np.array(lengths, np.int32)
    planned = np.broadcast_to(np.asarray(planned, np.int32), size.shape)
    return Flat(lengths=jnp.asarray(size), planned=planned, longest=LONGEST)


def line(heads: int, seed: int) -> jax.Array:
    shape = (1, COUNT, heads, 8)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def softmax_attention(
    q: Any, k: Any, v: Any, window: int, scale: float, cap: float | None
) -> np.ndarray:
    """Of one row [T, heads, H], float64, query by query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, group = np.zeros_like(q), q.shape[1] // k.shape[1]
    for t, n in np.ndindex(q.shape[:2]):
        seen = slice(max(t + 1 - window, 0), t + 1)
        scores = scale * k[seen, n // group] @ q[t, n]
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[t, n] = weights / weights.sum() @ v[seen, n // group]
    return out


def each(lengths: list[int]) -> list[slice]:
    ends = np.cumsum(lengths).tolist()
    return [slice(e - n, e) for e, n in zip(ends, lengths, strict=True) if n]


@cache
def program(window: int | None, cap: float | None, scale: float | None) -> Any:
    config = replace(CONFIG, score_cap=cap, attention_scale=scale)
    see = partial(attend, window=window, scale=scale, cap=cap)
    return jax.jit(partial(attend_flat, see, config=config, window=window))


@pytest.mark.parametrize(
    "window, cap, scale", [(None, None, None), (5, None, 0.5), (20, 2.0, None)]
)
def test_attention_is_each_rows_own(window: Any, cap: Any, scale: Any) -> None:
    q, k, v = line(4, 0), line(2, 1), line(2, 2)
    for lengths in (LENGTHS, [64, 26, 0, 0, 0, 0, 0], [0] * 7):
        got = program(window, cap, scale)(q, k, v, flat=flat_of(lengths))
        assert got.shape == q.shape and np.isfinite(got).all()
        for own in each(lengths):
            how = window or COUNT, scale or 1 / math.sqrt(8), cap
            want = softmax_attention(*(x[0, own] for x in (q, k, v)), *how)
            np.testing.assert_allclose(got[0, own], want, atol=2e-6)


def test_who_else_is_there_changes_no_bit() -> None:
    q, k, v = line(4, 0), line(2, 1), line(2, 2)
    run = program(None, None, None)
    first = run(q, k, v, flat=flat_of([25, 0, 0, 0, 0, 0, 0]))[0, :25]
    for before, after in (([3], []), ([], [40]), ([17, 20], [20])):
        rows = [*before, 25, *after]
        flat = flat_of(rows + [0] * (7 - len(rows)))
        own = slice(sum(before), sum(before) + 25)

        def moved(x: jax.Array, own: slice = own) -> jax.Array:  # the others are NaN
            return jnp.full(x.shape, jnp.nan).at[0, own].set(x[0, :25])

        got = run(moved(q), moved(k), moved(v), flat=flat)[0, own]
        np.testing.assert_array_equal(got, first)


# --- the whole model

METHODS = {
    "plain": CONFIG.rope,
    "dynamic": Rope(
        theta=1e4, rotary_dim=8, scaling=DynamicNTK(factor=2.0, original_length=16)
    ),
    "growing": Rope(
        theta=1e4,
        rotary_dim=8,
        scaling=DynamicNTK(factor=2.0, original_length=16),
        lengths="growing",
    ),
    "longrope": Rope(
        theta=1e4,
        rotary_dim=8,
        scaling=LongRope(
            short_factor=(1.0, 1.1, 1.2, 1.3),
            long_factor=(1.5, 2.0, 3.0, 4.0),
            original_length=30,
            factor=4.0,
        ),
    ),
}
TOKENS = np.random.default_rng(3).integers(0, 61, (1, COUNT)).astype(np.int32)


@cache
def parameters() -> Any:
    return init_params(jax.random.key(1), CONFIG)


@pytest.mark.parametrize("method", METHODS)
def test_every_row_has_its_own_frequencies(method: str) -> None:
    """Short and long rows in one line, below and past the trained length."""
    windows = None if method == "growing" else (None, 12)
    config = replace(CONFIG, rope=METHODS[method], windows=windows)
    lengths, planned = [20, 31, 9, 30, 0, 0, 0], [25, 60, 12, 31, 0, 0, 0]
    run = jax.jit(partial(hidden_states, config=config))
    flat = flat_of(lengths, planned)
    got, cache = run(parameters(), TOKENS, flat=flat)
    assert cache.lengths.tolist() == lengths
    assert all(keys.shape[1] == COUNT for keys in cache.keys)  # with a window, too
    tokens = np.zeros((4, 31), np.int32)
    for row, own in zip(tokens, each(lengths), strict=True):
        row[: own.stop - own.start] = TOKENS[0, own]
    how = {"rope_lengths": np.array(planned[:4]), "lengths": np.array(lengths[:4])}
    want, alone = run(parameters(), tokens, **how)
    for i, own in enumerate(each(lengths)):
        count = own.stop - own.start
        np.testing.assert_allclose(got[0, own], want[i, :count], atol=1e-5)
        np.testing.assert_allclose(  # the layer without a window
            cache.keys[0][0, own], alone.keys[0][i, :count], atol=1e-5
        )


# --- into the slots


@pytest.mark.parametrize("way", ["cpu", "default"])
@pytest.mark.parametrize("size", [80, 12])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_what_is_put_stays_in_its_slot(
    way: str, size: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a window, too, whose slots go round and keep the last tokens."""
    put: Any = put_flat.__wrapped__
    chosen = lambda *given, **ways: ways[way](*given)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    new = (10 * line(2, 5)).astype(dtype)
    old = jnp.full((9, size, 2, 8), 99, dtype)
    rows = jnp.asarray([7, 0, 3, 8, 1, 2**31 - 1, 2**31 - 1], jnp.int32)
    anew = jax.jit(lambda *given: put(*given))  # or it were not traced again
    got = np.asarray(anew(old, rows, flat_of(LENGTHS), new).astype(np.float32))
    for slot, own in zip(rows, each(LENGTHS), strict=False):
        count = own.stop - own.start
        for i in range(max(count - size, 0), count):
            want = np.asarray(new[0, own.start + i].astype(np.float32))
            np.testing.assert_array_equal(got[slot, i % size], want)
    untouched = sorted({*range(9)} - {*rows.tolist()})
    assert untouched == [2, 4, 5, 6] and (got[untouched] == 99).all()


# --- cuDNN's packed layout


def packed(q: Any, k: Any, v: Any, **how: Any) -> Any:
    """What its documentation says, in NumPy."""
    real = inspect.signature(fused_attention_stablehlo.dot_product_attention)
    real.bind(q, k, v, **how)
    assert how["mask_type"] == fused_attention_stablehlo.MaskType.PADDING_CAUSAL
    out, window = np.full(q.shape, np.nan), how["sliding_window_length"] or COUNT
    sizes, offsets = (np.asarray(how[f"q_{name}"]) for name in ("seqlen", "offsets"))
    for name in ("seqlen", "offsets"):
        np.testing.assert_array_equal(how[f"q_{name}"], how[f"kv_{name}"])
        assert how[f"q_{name}"].dtype == jnp.int32
    assert sizes.shape[0] == 1 and offsets.shape[1] == sizes.shape[1] + 1 > 2
    for begin, size, end in zip(offsets[0], sizes[0], offsets[0, 1:], strict=False):
        assert (size < 0) == (end < 0)
        if size > 0:
            assert end - begin == size
            own = slice(int(begin), int(end))
            rows = (x[0, own] for x in (q, k, v))
            out[0, own] = softmax_attention(*rows, window, how["scale"], None)
    return jnp.asarray(out, q.dtype)


@pytest.mark.parametrize("window, scale", [(None, None), (5, 0.5)])
def test_cudnn_is_told_where_rows_begin(
    window: Any, scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(
        dot_product_attention=packed, MaskType=fused_attention_stablehlo.MaskType
    )
    monkeypatch.setattr(kernels, "import_module", lambda _: module)
    q, k, v = line(4, 0), line(2, 1), line(2, 2)
    for lengths in (LENGTHS, [64], [0, 0]):
        got = kernels.cudnn_flat(q, k, v, flat_of(lengths).lengths, scale, window)
        want = program(window, None, scale)(q, k, v, flat=flat_of(lengths))
        for own in each(lengths):
            np.testing.assert_allclose(got[0, own], want[0, own], atol=2e-6)


def test_a_rows_nan_stays_its_own_beside_cudnn(monkeypatch: Any) -> None:
    """Also where a NaN among the keys of one row reaches all others."""

    def reaching(q: Any, k: Any, v: Any, *_: Any) -> Any:
        worst = sum(jnp.sum(x - x) for x in (k, v))
        fine = program(None, None, None)(q, k, v, flat=flat_of(LENGTHS)) + worst
        return fine.at[0, sum(LENGTHS) :].set(jnp.nan)  # which cuDNN does not write

    monkeypatch.setattr(jrope.model.flat, "cudnn_flat", reaching)
    q, k, v = line(4, 0), line(2, 1), line(2, 2)
    want = np.array(program(None, None, None)(q, k, v, flat=flat_of(LENGTHS)))
    k, v = k.at[0, 30, 1, 3].set(jnp.nan), v.at[0, 58, 0, 0].set(jnp.inf)
    got = np.asarray(_packed(q, k, v, flat_of(LENGTHS), None, None))
    want[0, sum(LENGTHS) :], want[0, 30:58], want[0, 58:60] = 0, np.nan, np.nan
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("window, scale", [(None, None), (5, 0.5)])
def test_rows_padded_for_cudnn(
    window: Any, scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As XLA computes what cuDNN is asked for; the line ends in NaN."""
    asked, plain = list[str](), jax.nn.dot_product_attention

    def by_xla(*given: Any, implementation: str, **how: Any) -> jax.Array:
        asked.append(implementation)
        return plain(*given, **how, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    q, k, v = line(4, 0), line(2, 1), line(2, 2)
    for lengths in (LENGTHS, [0, 0]):
        own = (x.at[0, sum(lengths) :].set(jnp.nan) for x in (q, k, v))
        got = _padded(*own, flat_of(lengths), scale, window)
        assert got.shape == q.shape and np.isfinite(got).all()
        want = program(window, None, scale)(q, k, v, flat=flat_of(lengths))
        for row in each(lengths):
            np.testing.assert_allclose(got[0, row], want[0, row], atol=2e-6)
    assert asked == ["cudnn"] * 2


@pytest.mark.parametrize("packed", [True, False])
def test_who_computes_a_line(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[str]()

    def note(name: str, q: Any, *_: Any, **how: Any) -> Any:
        taken.append(name)
        assert how == {"scale": None, "window": None}
        return q

    def cuda(*given: Any, **ways: Any) -> Any:
        return ways["cuda"](*given)

    for name in ("_packed", "_padded"):
        monkeypatch.setattr(jrope.model.flat, name, partial(note, name))
    monkeypatch.setattr(jrope.model.flat, "cudnn_takes", lambda q: True)
    monkeypatch.setattr(jrope.model.flat, "cudnn_flat_takes", lambda q: packed)
    monkeypatch.setattr(jax.lax, "platform_dependent", cuda)
    q, k = line(4, 0), line(2, 1)
    attend_flat(attend, q, k, k, flat=flat_of(LENGTHS), config=CONFIG, window=None)
    assert taken == ["_packed" if packed else "_padded"]


def test_cudnn_takes_rows_of_a_line_where_it_can(monkeypatch: Any) -> None:
    q = jnp.zeros((1, 8, 4, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    takes, devices = kernels.cudnn_flat_takes, SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [devices])
    assert takes(q) and not takes(q.astype(jnp.float32))
    devices.compute_capability = "8.9"
    assert not takes(q)
    devices.compute_capability = "gfx90a"  # of AMD's
    assert not takes(q)
    devices.compute_capability = "10.0"
    assert takes(q)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    assert not takes(q)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert takes(q)
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert not takes(q)
    monkeypatch.undo()
    assert not takes(q)
