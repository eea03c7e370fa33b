"""A decode step's rotation, cache write and attention on NVIDIA GPUs, in one kernel.

A program of it has one key/value head of a row, with the query heads that read it, and
walks a share of the row's filled slots: products by tensor cores, an online softmax in
base 2.  The first share begins with the new token, and writes it where it belongs.
Nothing past a row's length is read.  A second, small kernel joins the shares.
"""

import math
import warnings
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jrope.model.cache import Slots
from jrope.rope.embedding import Precision
from jrope.rope.rotation import turned

HEADS = 16  # query heads of a tensor core's tile, to which a group is padded
PROGRAMS = 256  # about so many keep a GPU busy: rows times heads times shares
SHARE = 128  # slots of a share, at least
TRITON = "jax.experimental.pallas.triton"  # which JAX will drop, it says since 0.11
DTYPES = (jnp.bfloat16, jnp.float16)
MANY = {"block": 64, "stages": 3}  # programs: blocks are loaded while others are used
FEW = {"block": 128, "stages": 1}  # all of a share's loads are on their way at once
LOWEST = np.float32(
    -1e30
)  # of scores: far below any, and its difference to itself is 0

Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def kernel_takes(q: jax.Array, k: jax.Array) -> bool:
    """Whether q [B, T, N, H] and k [B, T, K, H] are a step for it, and it is here."""
    head_dim, group = q.shape[3], q.shape[2] // k.shape[2]
    fits = q.shape[1] == 1 and head_dim in (64, 128) and group <= HEADS
    here = q.dtype in DTYPES and jax.default_backend() == "gpu"
    return fits and here and find_spec(TRITON) is not None


def rotate_append_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: Slots,
    starts: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    precision: Precision,
    scale: float | None,
    interpret: bool = False,
) -> tuple[jax.Array, Slots]:
    """A new token of each row beside those before it.

    Args:
      q, k, v: [B, 1, N or K, H], not rotated.
      slots: keys and values [B, S, K, H], donated.
      starts: int32 [B], filled slots; a token past the last slot is not written.
      cos, sin: float32 [B, 1, H / 2], of pairs in halves.
      precision: of the rotation.
      scale: of the scores; None: 1 / sqrt(H).
      interpret: compute it without a GPU.

    Returns:
      [B, 1, N, H] in q's dtype, and the slots with the new token in them.
    """
    batch, _, heads, head_dim = q.shape
    capacity, kv_heads = slots[0].shape[1:3]
    shares = _shares(batch * kv_heads, capacity)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    # Of neighbours in the one product that `fuse` made, this is that and no copy.
    new = jnp.concatenate([x.reshape(batch, 1, -1) for x in (q, k, v)], axis=2)
    y = jax.typeof(q).update(shape=(batch, heads, head_dim))
    like = partial(y.update, dtype=jnp.dtype(jnp.float32))
    sums = [like(shape=(batch, heads, shares, *last)) for last in ((head_dim,), (), ())]
    block, stages = (MANY if shares == 1 else FEW).values()
    body = partial(
        _step,
        group=heads // kv_heads,
        precision=precision,
        block=block,
        scale=np.float32(scale * math.log2(math.e)),
    )
    keys, values, *out = _call(
        body,
        (starts, new.reshape(batch, -1, head_dim), cos[:, 0], sin[:, 0], *slots),
        grid=(kv_heads, shares, batch),
        out_shape=[*map(jax.typeof, slots), *([y] if shares == 1 else sums)],
        input_output_aliases={4: 0, 5: 1},
        stages=stages,
        interpret=interpret,
        name="rotate_append_attend",
    )
    if shares > 1:
        grid, name = (heads, batch), "join_shares"
        out = _call(
            _join, out, grid=grid, out_shape=[y], interpret=interpret, name=name
        )
    return out[0][:, None], (keys, values)


def _shares(rows: int, capacity: int) -> int:
    """Into how many shares a row's slots are cut, a power of two."""
    most = max(min(PROGRAMS // rows, capacity // SHARE), 1)
    return 2 ** (most.bit_length() - 1)


def _call(
    body: Any, given: Any, *, out_shape: list[Any], stages: int = 1, **how: Any
) -> Any:
    """A Triton kernel that loads its blocks itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton", DeprecationWarning)
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        where = pl.BlockSpec(memory_space=pl.ANY)
        how |= {
            "compiler_params": triton.CompilerParams(num_warps=4, num_stages=stages)
        }
        specs = {
            "in_specs": [where] * len(given),
            "out_specs": [where] * len(out_shape),
        }
        return pl.pallas_call(body, out_shape=out_shape, **specs, **how)(*given)


def _step(
    starts: Any,
    new: Any,
    cos: Any,
    sin: Any,
    _keys: Any,
    _values: Any,
    keys: Any,
    values: Any,
    *out: Any,
    group: int,
    precision: Precision,
    block: int,
    scale: np.float32,
) -> None:
    """One share of one key/value head of a row, for the query heads that read it."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    kv_head, share, row = (pl.program_id(i) for i in range(3))
    kv_heads, shares = pl.num_programs(0), pl.num_programs(1)
    capacity, width = keys.shape[1], keys.shape[3]
    start = starts[row]
    length = jnp.minimum(start, capacity)
    size = pl.cdiv(pl.cdiv(length, shares), block) * block
    begin = jnp.minimum(share * size, length)
    end = jnp.minimum(begin + size, length)

    lanes, member = (jnp.arange(n, dtype=jnp.int32) for n in (width, HEADS))
    heads, own = kv_head * group + member, member < group
    lane, half = lanes[None, :], width // 2
    lower, pair = lanes < half, lanes % half
    c, s = cos[row, pair], jnp.where(lower, sin[row, pair], -sin[row, pair])
    other = jnp.where(lower, lanes + half, lanes - half)
    load = partial(triton.load, mask=own[:, None], other=0)
    a, b = (load(new.at[row, heads[:, None], x[None, :]]) for x in (lanes, other))
    query = _turn(a, b, c[None, :], s[None, :], precision)
    at = group * kv_heads + kv_head
    key = _turn(new[row, at, lanes], new[row, at, other], c, s, precision)
    value = new[row, at + kv_heads, lanes]

    score = jnp.sum(
        query.astype(jnp.float32) * key.astype(jnp.float32)[None, :], axis=1
    )
    first = jnp.broadcast_to(share == 0, (HEADS,))
    top = jnp.where(first, score * scale, LOWEST)
    total = jnp.where(first, np.float32(1), np.float32(0))
    acc = total[:, None] * value.astype(jnp.float32)[None, :]

    def see(i: Any, sums: Sums) -> Sums:
        top, total, acc = sums
        at = begin + i * block + jnp.arange(block, dtype=jnp.int32)
        seen = at < end
        load = partial(triton.load, mask=seen[:, None], other=0)
        k, v = (load(x.at[row, at[:, None], kv_head, lane]) for x in (keys, values))
        scores = triton.dot(query, k, trans_b=True) * scale
        scores = jnp.where(seen[None, :], scores, LOWEST)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - new_top[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * shrink[:, None] + triton.dot(weights.astype(v.dtype), v)
        return new_top, total, acc

    blocks = pl.cdiv(end - begin, block)
    top, total, acc = jax.lax.fori_loop(0, blocks, see, (top, total, acc))
    put = partial(triton.store, mask=own[:, None])
    if len(out) == 1:
        y = (acc / total[:, None]).astype(out[0].dtype)
        put(out[0].at[row, heads[:, None], lane], y)
    else:
        put(out[0].at[row, heads[:, None], share, lane], acc)
        for place, x in zip(out[1:], (top, total), strict=True):
            triton.store(place.at[row, heads, share], x, mask=own)

    @pl.when((share == 0) & (start < capacity))
    def _() -> None:
        keys[row, start, kv_head, lanes] = key
        values[row, start, kv_head, lanes] = value


def _join(acc: Any, top: Any, total: Any, out: Any) -> None:
    """The shares' sums [B, N, P, H] and [B, N, P] of one head of a row, as one."""
    from jax.experimental import pallas as pl

    head, row = pl.program_id(0), pl.program_id(1)
    top = top[row, head, :]
    weights = jnp.exp2(top - jnp.max(top))
    y = jnp.sum(acc[row, head, :, :] * weights[:, None], axis=0)
    y = y / jnp.sum(total[row, head, :] * weights)
    out[row, head, :] = y.astype(out.dtype)


def _turn(
    x: jax.Array, other: jax.Array, cos: jax.Array, sin: jax.Array, precision: Precision
) -> jax.Array:
    """Channels rotated, beside the other ones of their pairs; sin has its sign."""

    def short(y: jax.Array) -> jax.Array:  # Triton keeps the casts
        return y.astype(x.dtype).astype(jnp.float32)

    wide = x.astype(jnp.float32), other.astype(jnp.float32)
    y, _ = turned(*wide, cos, sin, short if precision == "parity" else None)
    return y.astype(x.dtype)
