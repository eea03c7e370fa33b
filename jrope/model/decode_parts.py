"""What the kernels of a decode step on NVIDIA GPUs have in common.

A program has one key/value head of a row, with the queries that read it, of one token
or of a few, and walks a share of the row's filled slots: products by tensor cores, an
online softmax in powers of two.  Nothing past a row's length is read.  A second, small
kernel joins the shares.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

TILE = 16  # rows of a tensor core's tile, to which queries are padded
QUERIES = 64  # rows that a program has at most: tokens times a group's heads
PROGRAMS = 256  # about so many keep a GPU busy: rows times heads times shares
SHARE = 128  # slots of a share, at least
TRITON = "jax.experimental.pallas.triton"  # which JAX will drop, it says since 0.11
DTYPES = (jnp.bfloat16, jnp.float16)
BLOCK = 64  # slots at a time, of which the next are loaded while these are used
LOWEST = np.float32(-1e30)  # of hidden scores; unlike infinity it has differences

Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Of R queries: the largest score [R], in powers of two, the sum of exponentials
relative to it [R], and the values weighted by these [R, H]; float32."""


def kernel_takes(q: jax.Array, kv_heads: int, tokens: int = TILE) -> bool:
    """Whether queries [B, T, N, H] are a decode step for these kernels, and here.

    Of up to so many new tokens at once, which guesses are checked by.
    """
    count, head_dim, group = q.shape[1], q.shape[3], q.shape[2] // kv_heads
    fits = count <= tokens and count * group <= QUERIES and head_dim in (64, 128)
    return fits and triton_takes(q)


def triton_takes(x: jax.Array) -> bool:
    """Whether there is a GPU, whose kernels take x's dtype."""
    here = x.dtype in DTYPES and jax.default_backend() == "gpu"
    return here and find_spec(TRITON) is not None


def rows_of(queries: int) -> int:
    """Rows of tiles for so many queries: a power of two."""
    return max(TILE, 1 << (queries - 1).bit_length())


def on_cuda(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    """A function that is `kernel` on CUDA, and `plain` elsewhere and in derivatives."""

    @jax.custom_jvp
    def either(*given: Any) -> Any:
        return jax.lax.platform_dependent(*given, cuda=kernel, default=plain)

    either.defjvp(partial(jax.jvp, plain))
    return either


def run_shares(
    body: Any,
    q: jax.Array,
    given: tuple[jax.Array, ...],
    keys: jax.Array,
    scale: float | None,
    *,
    aliases: dict[int, int] | None = None,
    interpret: bool,
    name: str,
) -> tuple[jax.Array, list[jax.Array]]:
    """Call `body(order, *refs, *changed, *out)` for all shares, and join them.

    Args:
      body: a kernel that ends with `put`; it is told `group` and `scale`.
      q: [B, T, N, H].
      given: what it reads; int32 [B] first, how long each row is.
      keys: [B, S, K, H].
      scale: of scores; None: 1 / sqrt(H).
      aliases: which of `given` it changes, and as which result.
      interpret: compute it without a GPU.
      name: of the kernel.

    Returns:
      [B, T, N, H] in q's dtype, and what was changed.
    """
    batch, tokens, heads, head_dim = q.shape
    capacity, kv_heads = keys.shape[1:3]
    shares, aliases = shares_of(batch * kv_heads, capacity), aliases or {}
    y = jax.typeof(q).update(shape=(batch, tokens * heads, head_dim))
    like = partial(y.update, dtype=jnp.dtype(jnp.float32))
    shape = batch, tokens * heads, shares
    sums = [like(shape=(*shape, *last)) for last in ((head_dim,), (), ())]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    how = {"group": heads // kv_heads, "tokens": tokens}
    changed = [jax.typeof(given[i]) for i in aliases]
    order = longest_first(given[0], batch * kv_heads * shares)
    out = call_triton(
        partial(body, **how, scale=np.float32(scale * math.log2(math.e))),
        (order, *given),
        grid=(kv_heads, shares, batch),
        out_shape=[*changed, *([y] if shares == 1 else sums)],
        input_output_aliases={1 + i: at for i, at in aliases.items()},
        interpret=interpret,
        name=name,
    )
    changed, out = out[: len(aliases)], out[len(aliases) :]
    if shares > 1:
        own: Any = {"grid": shape[1::-1], "interpret": interpret}
        out = call_triton(_join, out, out_shape=[y], **own, name="join_shares")
    return out[0].reshape(q.shape), changed


def longest_first(lengths: jax.Array, programs: int) -> jax.Array:
    """int32 [B], the rows in the order that a kernel of so many programs takes them.

    A GPU starts programs one after another, and a long row that came last would be
    alone at the end.  All layers of a step order the same rows, which XLA does once.
    """
    if programs <= PROGRAMS:  # all start at once
        return jnp.arange(len(lengths), dtype=jnp.int32)
    return jnp.argsort(-lengths).astype(jnp.int32)


def shares_of(rows: int, capacity: int) -> int:
    """Into how many shares a row's slots are cut, a power of two."""
    most = max(min(PROGRAMS // rows, capacity // SHARE), 1)
    return 2 ** (most.bit_length() - 1)


def call_triton(
    body: Any,
    given: Any,
    *,
    out_shape: list[Any],
    warps: int = 4,
    stages: int = 3,
    **how: Any,
) -> list[Any]:
    """A Triton kernel that loads its blocks itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton", DeprecationWarning)
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        where = pl.BlockSpec(memory_space=pl.ANY)
        call = pl.pallas_call(
            body,
            in_specs=[where] * len(given),
            out_specs=[where] * len(out_shape),
            out_shape=out_shape,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
            **how,
        )
        return call(*given)


@dataclass(frozen=True)
class Share:
    """What a program has, inside of a kernel: indices, and slots `begin` to `end`."""

    row: Any
    kv_head: Any
    number: Any
    begin: Any
    end: Any
    tokens: Any  # int32 [R], of queries
    heads: Any  # int32 [R]
    places: Any  # int32 [R], among all T x N
    own: Any  # bool [R], whether it is one
    lanes: Any  # int32 [H]

    @classmethod
    def of(
        cls, order: Any, lengths: Any, keys: Any, group: int, tokens: int
    ) -> "Share":
        """The running program's, of rows in order, filled slots and [B, S, K, H]."""
        from jax.experimental import pallas as pl

        kv_head, number, turn = (pl.program_id(i) for i in range(3))
        row = order[turn]
        length = jnp.minimum(lengths[row], keys.shape[1])
        size = pl.cdiv(pl.cdiv(length, pl.num_programs(1)), BLOCK) * BLOCK
        begin = jnp.minimum(number * size, length)
        end = jnp.minimum(begin + size, length)
        count = group * tokens
        lanes = jnp.arange(keys.shape[3], dtype=jnp.int32)
        member = jnp.arange(rows_of(count), dtype=jnp.int32)
        token, head, own = member // group, member % group, member < count
        head = kv_head * group + head
        place = token * group * pl.num_programs(0) + head
        return cls(row, kv_head, number, begin, end, token, head, place, own, lanes)

    def queries(self, rows: Any, lanes: Any) -> jax.Array:
        """The queries, zeros where there is none, of rows [B, T, N or more, H]."""
        from jax.experimental.pallas import triton

        place = self.row, self.tokens[:, None], self.heads[:, None], lanes[None, :]
        return triton.load(rows.at[place], mask=self.own[:, None], other=0)

    def walk(
        self,
        query: jax.Array,
        slots: Any,
        scales: Any,
        scale: Any,
        sums: Sums,
    ) -> Sums:
        """The sums with this share's slots among them; 8-bit slots have scales."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        def see(i: Any, sums: Sums) -> Sums:
            top, total, acc = sums
            at = self.begin + i * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
            seen = at < self.end
            place = self.row, at[:, None], self.kv_head, self.lanes[None, :]
            load = partial(triton.load, mask=seen[:, None], other=0)
            k, v = (load(x.at[place]).astype(query.dtype) for x in slots)
            load = partial(triton.load, mask=seen, other=0)
            factors = [load(x.at[self.row, at, self.kv_head, 0]) for x in scales]
            factors = [x.astype(jnp.float32)[None, :] for x in factors]
            scores = triton.dot(query, k, trans_b=True) * scale
            scores = scores * factors[0] if factors else scores
            scores = jnp.where(seen[None, :], scores, LOWEST)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - new_top[:, None])
            total = total * shrink + jnp.sum(weights, axis=1)
            weights = weights * factors[1] if factors else weights
            acc = acc * shrink[:, None] + triton.dot(weights.astype(v.dtype), v)
            return new_top, total, acc

        return jax.lax.fori_loop(0, pl.cdiv(self.end - self.begin, BLOCK), see, sums)

    def put(self, out: Any, sums: Sums) -> None:
        """Write what was found: of the only share the result, else the sums."""
        from jax.experimental.pallas import triton

        top, total, acc = sums
        places, lanes = self.places[:, None], self.lanes[None, :]
        store = partial(triton.store, mask=self.own[:, None])
        if len(out) == 1:
            y = (acc / total[:, None]).astype(out[0].dtype)
            store(out[0].at[self.row, places, lanes], y)
            return
        store(out[0].at[self.row, places, self.number, lanes], acc)
        for array, x in zip(out[1:], (top, total), strict=True):
            place = array.at[self.row, self.places, self.number]
            triton.store(place, x, mask=self.own)


def _join(acc: Any, top: Any, total: Any, out: Any) -> None:
    """The shares' sums [B, TN, P, H] and [B, TN, P] of one query of a row, as one."""
    from jax.experimental import pallas as pl

    head, row = pl.program_id(0), pl.program_id(1)
    top = top[row, head, :]
    weights = jnp.exp2(top - jnp.max(top))
    y = jnp.sum(acc[row, head, :, :] * weights[:, None], axis=0)
    y = y / jnp.sum(total[row, head, :] * weights)
    out[row, head, :] = y.astype(out.dtype)
