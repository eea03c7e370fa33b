"""What each device holds: weights, cache and temporaries, counted from shapes alone.

Matrices are cut by output where heads, the MLP's width or the vocabulary come out (q,
k, v, gate, up, embedding, head), by input where they go in (o, down); norms lie whole
on every device, and so do the biases and int8 scales of o and down; int4 scales are cut
as what they scale.  Rows of a batch are cut over `data`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, final

import jax.numpy as jnp

from jrope.bench.model import cache_bytes
from jrope.errors import JropeError, check_count
from jrope.generation.request import LONGEST, bucket
from jrope.model.blockwise import BLOCK
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig, parameter_shapes
from jrope.model.int8_cache import CacheDtype
from jrope.model.packed import group_of
from jrope.plan.devices import HOST, Cluster
from jrope.weights.int8 import Quantization, held_bytes, matrices

AT_ONCE = 8192  # tokens of a prefill chunk on a device, of all rows together
SHORTEST = 256  # tokens of a row in a chunk
DRAWING = 4  # float32 arrays [B, V] that live while a token is drawn
_BY_OUTPUT = ("q_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_BY_KV_HEAD = ("k_proj", "v_proj")
_BY_INPUT = ("o_proj", "down_proj")


@final
@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How devices share the work.

    Args:
      data: parts of the batch.
      model: parts of the key/value heads, hence of the cache.
      replica: devices that share one part of the key/value heads and its cache, and
        divide its query heads, the MLP and the vocabulary; 1 but where there are more
        devices than key/value heads.
    """

    data: int
    model: int
    replica: int = 1

    def __str__(self) -> str:
        more = f",replica={self.replica}" if self.replica > 1 else ""
        return f"data={self.data},model={self.model}{more}"

    @property
    def ways(self) -> int:
        """Parts of all weights but those of the key/value heads."""
        return self.model * self.replica


@final
@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked for.

    Args:
      config: the model.
      batch: rows.
      context: tokens of a row, prompt and generated ones.
      new: how many of these are generated.
      dtype: of activations, cache, and weights that are not quantised.
      quantize: "int8", "int4" or None.
      cache_dtype: "int8" or None.
      prefill_chunk: tokens of each row's prompt at a time; None: 8,192 of all rows of a
        device together, but at least 256 of each.

    Raises:
      JropeError: a number is out of range.
    """

    config: LlamaConfig
    batch: int
    context: int
    new: int = 64
    dtype: str = "bfloat16"
    quantize: Quantization | None = None
    cache_dtype: CacheDtype | None = None
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        check_count("batch", self.batch, 1)
        check_count("context", self.context, 2)
        check_count("new", self.new, 1)
        if self.context > LONGEST or self.new >= self.context:
            got = f"{self.new} new tokens of a context of {self.context}"
            wanted = f"fewer than the context, which is at most {LONGEST}"
            raise JropeError(f"new: got {got}, want {wanted}")

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def prompt(self) -> int:
        """Tokens before the first that is generated."""
        return self.context - self.new

    @property
    def slots(self) -> int:
        """Cache slots of a row, as `generate` makes them."""
        return bucket(self.prompt) + bucket(self.new)

    def chunk(self, mesh: Mesh) -> int:
        """Tokens of each row that are prefilled at once."""
        if self.prefill_chunk is not None:
            return min(self.prefill_chunk, self.prompt)
        rows = self.batch // mesh.data
        return min(self.prompt, max(AT_ONCE // rows, SHORTEST))


Temporaries: TypeAlias = Callable[[Work, Mesh, Cluster], int]


@final
@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    weights: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.temporaries


def weight_shards(work: Work, mesh: Mesh) -> dict[str, int]:
    """Bytes of every weight on one device, with its scales if it is quantised."""
    kind, shapes = work.quantize, parameter_shapes(work.config)
    chosen = set[str]() if kind is None else matrices(shapes)
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        outputs, inputs = _cuts(name, mesh)
        inputs = inputs if len(shape) == 2 else 1
        if kind is None or name not in chosen:
            sizes[name] = math.prod(shape) * work.itemsize // outputs // inputs
            continue
        whole, scales = held_bytes(name, shape, kind)
        scales = scales // inputs if kind == "int4" else scales
        sizes[name] = whole // outputs // inputs + scales // outputs
    return sizes


def _cuts(name: str, mesh: Mesh) -> tuple[int, int]:
    """Into how many parts outputs and inputs are cut."""
    block = name.split(".")[-2]
    if block in _BY_OUTPUT:
        return mesh.ways, 1
    if block in _BY_KV_HEAD:
        return mesh.model, 1
    return 1, mesh.ways if block in _BY_INPUT else 1


def read_shards(work: Work, mesh: Mesh) -> int:
    """Bytes of weights that a decode step reads on one device.

    All but an embedding that is not the head.
    """
    sizes = weight_shards(work, mesh)
    return sum(sizes.values()) - (sizes[EMBEDDING] if HEAD in sizes else 0)


def cache_shard(work: Work, mesh: Mesh, slots: int) -> int:
    """Bytes of `slots` slots of a device's rows and key/value heads."""
    rows = work.batch // mesh.data
    held = work.itemsize, rows, work.cache_dtype
    return cache_bytes(work.config, slots, *held) // mesh.model


def temporaries(work: Work, mesh: Mesh, cluster: Cluster) -> int:
    """Bytes beside weights and cache on one device, the greater of two moments.

    Prefill, C tokens of R rows at once: the residual stream, its norm and the MLP's
    output, and gate, up and their product,

        R C (3 D + 3 F / ways) itemsize

    Decode: four float32 arrays of logits, 16 R V / ways.

    cuDNN's attention, on GPUs and for prompts in one chunk, adds nothing.  Elsewhere
    prefill turns a layer's keys and values once more, 2 R S K H itemsize / model, and
    holds scores of blocks twice in float32, 8 R N / ways min(C, 512) 512.

    A compiler's figure may stand here instead: `propose` takes any such function.
    """
    config, rows, chunk = work.config, work.batch // mesh.data, work.chunk(mesh)
    heads = config.num_attention_heads // mesh.ways
    wide = 3 * config.hidden_size + 3 * config.intermediate_size // mesh.ways
    prefill = rows * chunk * wide * work.itemsize
    decode = rows * DRAWING * 4 * config.vocab_size // mesh.ways
    if not has_cudnn(work, cluster) or chunk < work.prompt:
        layer = cache_shard(work, mesh, work.slots) // config.num_hidden_layers
        prefill += layer + 8 * rows * heads * min(chunk, BLOCK) * BLOCK
    return max(prefill, decode)


def has_cudnn(work: Work, cluster: Cluster) -> bool:
    """Whether attention is cuDNN's, for prompts in one chunk and in decode.

    A decode step over an 8-bit cache is not.
    """
    head_dim, short = work.config.head_dim, work.dtype != "float32"
    fits = head_dim % 8 == 0 and head_dim <= 128 and work.config.score_cap is None
    fits = fits and work.config.windows is None
    return cluster.device.kind == "gpu" and short and fits


def factorisations(work: Work, cluster: Cluster) -> Iterator[tuple[Mesh, str | None]]:
    """Every mesh of these devices, and why one cannot be."""
    for ways in range(1, cluster.count + 1):
        if cluster.count % ways == 0:
            yield _mesh(work, cluster, ways)


def _mesh(work: Work, cluster: Cluster, ways: int) -> tuple[Mesh, str | None]:
    heads = work.config.num_key_value_heads
    model = ways if heads % ways == 0 else heads if ways % heads == 0 else ways
    mesh = Mesh(data=cluster.count // ways, model=model, replica=ways // model)
    problems = [
        f"{count:,} {what} on {parts}"
        for what, count, parts in (
            ("rows", work.batch, mesh.data),
            ("key/value heads", heads, mesh.model),
            ("query heads", work.config.num_attention_heads, ways),
            ("columns of the MLP", work.config.intermediate_size, ways),
            ("entries of the vocabulary", work.config.vocab_size, ways),
            *_groups(work, ways),
        )
        if count % parts
    ]
    if problems:
        return mesh, f"does not divide: {', '.join(problems)}"
    if cluster.device.kind == "gpu" and ways > HOST:
        return mesh, f"NVLink joins {HOST} GPUs, not {ways}"
    return mesh, None


def _groups(work: Work, ways: int) -> Iterator[tuple[str, int, int]]:
    """Groups of int4 inputs that share a scale, of which none may be cut."""
    if work.quantize != "int4":
        return
    shapes = parameter_shapes(work.config)  # a block's are alike in all layers
    names = {name.split(".")[-2]: name for name in sorted(matrices(shapes))}
    for block in _BY_INPUT:
        width = shapes[names[block]][1]
        groups = width // group_of(names[block], width)
        yield f"groups of int4 in {block}", groups, ways
