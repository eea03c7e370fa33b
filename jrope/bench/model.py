"""What `bench` runs: shapes, random weights, arrangements, and counts of the work.

Decode is bound by bytes: every weight but the embedding table and every filled cache
slot is read once per step.  Prefill is bound by FLOPs: 2 per weight and token, plus
causal attention, which is counted at half of the square.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jrope.errors import JropeError
from jrope.model.cache import layer_slots
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig, parameter_shapes
from jrope.model.int8_cache import CacheDtype, head_bytes
from jrope.model.packed import group_of
from jrope.rope import Rope
from jrope.sharding.meshes import Layout
from jrope.tree import Params, Tree, flatten, nest
from jrope.weights.fuse import each_layer, fuse, unfuse
from jrope.weights.int8 import Quantization, matrices, scale_name, weight_bytes

Order = Literal["none", "out_in", "in_out"]

# name: V, D, F, L, N, K, H, theta, tied
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, float, bool]] = {
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32, 128, 1e4, False),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, 128, 5e5, False),
    "llama3-70b": (128256, 8192, 28672, 80, 64, 8, 128, 5e5, False),
    "llama3-405b": (128256, 16384, 53248, 126, 128, 8, 128, 5e5, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64, 1e5, True),
}


def named_shape(name: str) -> LlamaConfig:
    """The shape of a well-known model, for benchmarks without its weights."""
    if name not in SHAPES:
        raise JropeError(f"shape: got {name!r}, want one of {', '.join(SHAPES)}")
    v, d, f, layers, n, k, h, theta, tied = SHAPES[name]
    return LlamaConfig(
        vocab_size=v, hidden_size=d, intermediate_size=f, num_hidden_layers=layers,
        num_attention_heads=n, num_key_value_heads=k, head_dim=h,
        max_position_embeddings=8192, rms_norm_eps=1e-5, hidden_act="silu",
        attention_bias=False, mlp_bias=False, tie_word_embeddings=tied,
        initializer_range=0.02, rope=Rope(theta=theta, rotary_dim=h),
        bos_token_id=1, eos_token_id=(), pad_token_id=None,
    )  # fmt: skip


def with_layers(config: LlamaConfig, count: int | None) -> LlamaConfig:
    """The same model with its first `count` layers only; None: with all."""
    had = config.num_hidden_layers
    if count is not None and not 1 <= count <= had:
        raise JropeError(f"layers: got {count}, want 1 to {had}, which the model has")
    return dataclasses.replace(config, num_hidden_layers=count or had)


def first_layers(params: Params, count: int) -> Tree:
    """The tree without the layers from `count` on."""
    model = params["model"]
    layers = {str(i): model["layers"][str(i)] for i in range(count)}
    return {**params, "model": {**model, "layers": layers}}


def random_params(
    config: LlamaConfig,
    dtype: Any,
    quantize: Quantization | None = None,
    layout: Layout | None = None,
) -> Tree:
    """Weights that never leave the device: uniform noise in `dtype`, norms one.

    With "int8" or "int4" the matrices that `jrope.quantize` takes are made as integers.
    With a layout each device makes its share, and the numbers are the same.
    """

    shapes, flat = parameter_shapes(config), dict[str, jax.Array]()
    chosen = set[str]() if quantize is None else matrices(shapes)
    spread = config.initializer_range
    for i, (name, shape) in enumerate(shapes.items()):
        how: dict[str, Any] = {"shape": shape, "spread": spread}
        if name not in chosen:
            flat |= _made(i, (name,), _noise, {**how, "dtype": dtype}, layout)
            continue
        make = _words if quantize == "int4" else _integers
        if quantize == "int4":
            how["group"] = group_of(name, shape[1])
        flat |= _made(i, (name, scale_name(name)), make, how, layout)
    return nest(flat)


def _made(
    seed: int,
    names: tuple[str, ...],
    make: Callable[..., Any],
    how: Mapping[str, Any],
    layout: Layout | None,
) -> dict[str, jax.Array]:
    """A parameter, and its scales, where the layout has them."""
    if layout is None:
        return dict(zip(names, jax.tree.leaves(make(seed, **how)), strict=True))
    shapes = jax.tree.leaves(jax.eval_shape(partial(make, **how), seed))
    specs = layout.specs(dict(zip(names, shapes, strict=True)))
    places = tuple(layout.sharding(specs[name]) for name in names)
    made = _made_there(seed, make, tuple(how.items()), places)
    return dict(zip(names, made, strict=True))


@partial(jax.jit, static_argnames=("make", "how", "places"))
def _made_there(
    seed: Any,
    make: Callable[..., Any],
    how: tuple[tuple[str, Any], ...],
    places: tuple[NamedSharding, ...],
) -> list[jax.Array]:
    arrays = jax.tree.leaves(make(seed, **dict(how)))
    return [
        jax.lax.with_sharding_constraint(x, place)
        for x, place in zip(arrays, places, strict=True)
    ]


@partial(jax.jit, static_argnames=("shape", "spread", "dtype"))
def _noise(seed: Any, shape: tuple[int, ...], spread: float, dtype: Any) -> jax.Array:
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    bits = jax.random.bits(jax.random.key(seed), shape, jnp.uint16)
    centred = bits.astype(jnp.float32) / np.float32(2**15) - np.float32(1)
    return (centred * np.float32(spread)).astype(dtype)


@partial(jax.jit, static_argnames=("shape", "spread"))
def _integers(seed: Any, shape: tuple[int, ...], spread: float) -> Any:
    bits = jax.random.bits(jax.random.key(seed), shape, jnp.uint8)
    whole = jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.int8), -127)
    return whole, jnp.full(shape[:1], np.float32(spread / 127), jnp.float32)


@partial(jax.jit, static_argnames=("shape", "group", "spread"))
def _words(seed: Any, shape: tuple[int, ...], group: int, spread: float) -> Any:
    out, width = shape
    bits = jax.random.bits(jax.random.key(seed), (out, width // 8), jnp.uint32)
    return bits, jnp.full((out, width // group), spread / 8, jnp.bfloat16)


class Weights:
    """One model's parameters, arranged as a run wants them; one copy at a time.

    Args:
      params: the plain tree, which belongs to this object from now on.
      config: the model.
      keep: hold on to the plain tree, since somebody else reads it: two copies then.
    """

    def __init__(
        self, params: Params, config: LlamaConfig, *, keep: bool = False
    ) -> None:
        self.config = config
        self.plain = dict(params) if keep else None
        self.order: Order = "none"
        self._tree: Tree | None = dict(params)

    def arranged(self, order: Order) -> Tree:
        """The tree with its projections joined, see `fuse`; "none" leaves it plain."""
        if self._tree is not None and self.order == order:
            return self._tree
        if self.plain is not None:
            self._tree, self.order = self.plain, "none"
        old, self._tree = self._tree, None
        if old is None:
            raise JropeError("the weights were lost when an arrangement failed before")
        self._tree, self.order = self._rearranged(old, order), order
        return self._tree

    def _rearranged(self, tree: Tree, order: Order) -> Tree:
        change = partial(unfuse, config=self.config)
        if order != "none":
            change = partial(fuse, order=order)
        elif self.order == "none":
            return tree
        return each_layer(tree, change, keep=self.plain is not None)


def weight_count(config: LlamaConfig) -> int:
    """Parameters; a tied head is counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def cache_bytes(
    config: LlamaConfig,
    slots: int,
    itemsize: int,
    rows: int = 1,
    cache_dtype: CacheDtype | None = None,
) -> int:
    """Bytes of keys and values in `slots` slots of each row, windows cut off."""
    head = head_bytes(config.head_dim, itemsize, cache_dtype)
    width = config.num_key_value_heads * head
    return 2 * sum(layer_slots(config, slots)) * width * rows


def read_bytes(
    config: LlamaConfig, itemsize: int, quantize: Quantization | None = None
) -> int:
    """Bytes that a step reads of the weights: all but an embedding that is no head."""
    sizes = weight_bytes(config, itemsize, quantize)
    table = 0 if config.tie_word_embeddings else sizes[EMBEDDING]
    return sum(sizes.values()) - table


def tree_bytes(params: Params) -> tuple[int, int]:
    """Bytes of a tree as it is held, and of those what `read_bytes` counts."""
    flat = flatten(params)
    sizes = {name: x.size * x.dtype.itemsize for name, x in flat.items()}
    table = EMBEDDING.removesuffix("weight")
    unread = sum(size for name, size in sizes.items() if name.startswith(table))
    whole = sum(sizes.values())
    return whole, whole - (unread if HEAD in flat else 0)


def step_bytes(
    config: LlamaConfig,
    filled: int,
    itemsize: int,
    quantize: Quantization | None = None,
    rows: int = 1,
) -> int:
    """Bytes a decode step must read: weights, and the filled slots of all rows."""
    slots = filled_bytes(config, filled, itemsize, rows)
    return read_bytes(config, itemsize, quantize) + slots


def filled_bytes(config: LlamaConfig, filled: int, itemsize: int, rows: int) -> int:
    """Bytes of so many filled slots of all rows together."""
    rows = 1 if config.windows is None else rows
    return cache_bytes(config, filled // rows, itemsize, rows)


def prefill_flops(config: LlamaConfig, batch: int, count: int) -> int:
    """2 FLOPs per weight and token but one for the head; attention counted causal.

    A layer with a window of W counts W keys for each query past the first W.
    """
    shapes = parameter_shapes(config)
    inner = [s for name, s in shapes.items() if ".layers." in name and len(s) == 2]
    matrices = 2 * sum(rows * columns for rows, columns in inner) * count
    width = config.num_attention_heads * config.head_dim
    pairs = sum(w * (2 * count - w) for w in layer_slots(config, count))
    scores = 2 * width * pairs
    return batch * (matrices + scores + 2 * config.vocab_size * config.hidden_size)
