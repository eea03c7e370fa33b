"""The axes of a mesh by what they split, and the sums over them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, final

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jrope.numerics import rounded

Names = tuple[str, ...]
Sums: TypeAlias = Literal["auto", "float32", "rounded", "narrow"]
"""How the partial sums of a product travel; bytes by each device, of n, in 16 bits:

- "float32": added in float32, 8 (n - 1) / n an element, one collective;
- "rounded": each device adds its share of them in float32 and sends the sum rounded,
  which is the same number for 6 (n - 1) / n, in two collectives;
- "narrow": rounded before they are added, 4 (n - 1) / n;
- "auto": "float32" for one token a row, which waits for the collective and not for its
  bytes; else "rounded".
"""


@final
@dataclass(frozen=True, kw_only=True)
class Axes:
    """Which axes of a mesh split what; () splits nothing.

    Inside `jax.shard_map` the functions of the model take one, and sum over its axes.

    Args:
      batch: rows of tokens and of the cache.
      tensor: query heads, the MLP's width, the vocabulary.
      kv_heads: key/value heads, in weights and cache; a part of `tensor`, whose other
        axes hold the same heads.
      fsdp: every matrix's other axis; a layer's weights are gathered when it runs.
      context: the tokens of a prompt and the slots of the cache, see `stripes`.
      sums: how partial sums over `tensor` travel, see `Sums`.
    """

    batch: Names = ("data", "fsdp")
    tensor: Names = ("model", "replica")
    kv_heads: Names = ("model",)
    fsdp: Names = ("fsdp",)
    context: Names = ("context",)
    sums: Sums = "auto"

    def on(self, sizes: Mapping[Any, int]) -> "Axes":
        """Without the axes that a mesh of these sizes lacks, or that split nothing."""

        def there(names: Names) -> Names:
            return tuple(name for name in names if sizes.get(name, 1) > 1)

        return replace(
            self,
            batch=there(self.batch),
            tensor=there(self.tensor),
            kv_heads=there(self.kv_heads),
            fsdp=there(self.fsdp),
            context=there(self.context),
        )

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of every share's x."""
        return jax.lax.psum(x, self.tensor) if self.tensor else x

    def product(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """The sum of every share's x, float32 [B, T, D], which is to become `dtype`."""
        how = self.sums
        if how == "auto":
            how = "rounded" if x.shape[1] > 1 else "float32"
        tokens, wide = x.shape[0] * x.shape[1], jnp.dtype(dtype) == jnp.float32
        if how == "float32" or wide or not self.tensor:
            return self.total(x)
        if how == "narrow":
            return self.total(rounded(x, dtype).astype(dtype)).astype(x.dtype)
        if tokens % self.count():
            return self.total(x)
        own = jax.lax.psum_scatter(
            x.reshape(tokens, -1), self.tensor, scatter_dimension=0, tiled=True
        )
        own = rounded(own, dtype).astype(dtype)
        whole = jax.lax.all_gather(own, self.tensor, axis=0, tiled=True)
        return whole.reshape(x.shape).astype(x.dtype)

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest x of all shares."""
        return jax.lax.pmax(x, self.tensor) if self.tensor else x

    def largest_of_rows(self, x: jax.Array) -> jax.Array:
        """The largest x of all groups of rows."""
        return jax.lax.pmax(x, self.batch) if self.batch else x

    def total_of_rows(self, x: jax.Array) -> jax.Array:
        """The sum of the x of all groups of rows."""
        return jax.lax.psum(x, self.batch) if self.batch else x

    def any_row(self, flag: jax.Array) -> jax.Array:
        """Whether a flag is set for any group of rows."""
        return self.largest_of_rows(flag.astype(jnp.int32)) > 0 if self.batch else flag

    def count(self) -> int:
        """The shares of a vocabulary."""
        return jax.lax.axis_size(self.tensor) if self.tensor else 1

    def local_ids(self, ids: jax.Array, size: int) -> jax.Array:
        """Ids counted from this share's first; `size`, one past its last, elsewhere."""
        if not self.tensor:
            return ids
        first = jax.lax.axis_index(self.tensor) * size
        own = ids.astype(jnp.int32) - first
        return jnp.where((own >= 0) & (own < size), own, size)

    def gathered(self, name: str, weight: jax.Array) -> jax.Array:
        """A parameter as its layer needs it: whole along the `fsdp` axes."""
        if self.fsdp:
            for axis, names in enumerate(spec_of(name, weight.ndim, self)):
                if names == entry(self.fsdp):
                    weight = jax.lax.all_gather(
                        weight, self.fsdp, axis=axis, tiled=True
                    )
        return weight[0] if is_joined(name) and self.tensor else weight


ONE = Axes(batch=(), tensor=(), kv_heads=(), fsdp=(), context=())
"""No mesh: a single device."""

# projection -> whether its outputs are split ("out") or its inputs ("in")
_SPLIT = {
    **dict.fromkeys(("q_proj", "gate_proj", "up_proj", "lm_head"), "out"),
    **dict.fromkeys(("embed_tokens", "qkv_proj", "gate_up_proj"), "out"),
    **dict.fromkeys(("k_proj", "v_proj"), "kv"),
    **dict.fromkeys(("o_proj", "down_proj"), "in"),
}


def unnamed_heads(tensor: Names) -> Names:
    """What splits key/value heads where no parameter tells: all but "replica"."""
    return tuple(
        name for name in tensor if name not in {*Axes.tensor} - {*Axes.kv_heads}
    )


def is_joined(name: str) -> bool:
    """Whether `fuse` made this parameter of several."""
    return name.split(".")[-2] in ("qkv_proj", "gate_up_proj")


def entry(names: Names) -> str | Names | None:
    """Names of axes as a PartitionSpec holds them."""
    return names if len(names) > 1 else names[0] if names else None


def spec_of(name: str, ndim: int, axes: Axes) -> PartitionSpec:
    """How a parameter is split, from its Hugging Face name and rank.

    What `fuse` joins on a mesh has one axis more, in front: the shares of the mesh.
    """
    projection, leaf = name.split(".")[-2:]
    kind = _SPLIT.get(projection)
    joined = is_joined(name) and bool(axes.tensor)
    grouped = leaf in ("scale", "zero") and ndim - joined == 2
    leaf = "weight" if grouped else leaf  # what int4 groups have lies as they do
    if kind is None or (kind == "in" and leaf in ("bias", "scale")):
        return PartitionSpec(*[None] * ndim)
    split = entry(axes.kv_heads if kind == "kv" else axes.tensor)
    other = entry(axes.fsdp)
    if leaf in ("bias", "scale"):
        return PartitionSpec(split, *[None] * (ndim - 1))
    sides = (split, other) if kind != "in" else (other, split)
    sides = sides[::-1] if leaf == "kernel" else sides
    if is_joined(name) and ndim == 3:
        inner = (None, other) if leaf == "weight" else (other, None)
        return PartitionSpec(split, *inner)
    return PartitionSpec(*sides)


def specs_of(shapes: Mapping[str, Any], axes: Axes) -> dict[str, PartitionSpec]:
    """`spec_of` for every parameter of {name: anything with a shape}."""
    return {name: spec_of(name, len(x.shape), axes) for name, x in shapes.items()}
