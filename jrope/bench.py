"""How fast, and how near the device's own limits: ceilings first, then the model.

Decode is bound by bytes: every weight but the embedding table and every filled cache
slot is read once per step.  Prefill is bound by FLOPs: 2 per weight and token, plus
causal attention.  A figure here is a median of several runs, beside the ceiling that
the same process measured before; machines of one kind differ by several per cent.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.cache import KVCache
from jrope.config import LlamaConfig, nest, parameter_shapes
from jrope.errors import JropeError
from jrope.generate import decode, first_token, prefill
from jrope.request import Request, prepare
from jrope.rope import Rope
from jrope.sample import Sampler

# name: V, D, F, L, N, K, H, theta, tied
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, float, bool]] = {
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32, 128, 1e4, False),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, 128, 5e5, False),
    "llama3-70b": (128256, 8192, 28672, 80, 64, 8, 128, 5e5, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 64, 1e5, True),
}


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: bytes/s read, FLOP/s, bytes/s from the host."""

    read: float
    matmul: float
    transfer: float


@dataclass(frozen=True)
class Timing:
    """One line of the table; times in seconds."""

    work: str
    batch: int
    context: int
    seconds: float  # median: per step for decode, per call for prefill
    spread: float  # (slowest - fastest) / median
    tokens_per_second: float
    cost: float  # bytes read per step, or FLOPs per call
    of_ceiling: float
    temp_bytes: int
    compile_seconds: float


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


def random_params(config: LlamaConfig, dtype: Any) -> dict[str, Any]:
    """Weights that never leave the device: uniform noise in `dtype`, norms one."""

    @partial(jax.jit, static_argnames=("shape",))
    def noise(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        bits = jax.random.bits(jax.random.key(seed), shape, jnp.uint16)
        centred = bits.astype(jnp.float32) / np.float32(2**15) - np.float32(1)
        return (centred * np.float32(config.initializer_range)).astype(dtype)

    shapes = parameter_shapes(config)
    return nest(
        {name: noise(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    )


def measure_ceilings(size: int, side: int, dtype: Any, repeats: int = 5) -> Ceilings:
    """Read `size` bytes, multiply square matrices of `side`, copy from the host."""
    count = size // jnp.dtype(dtype).itemsize // 4096 * 4096
    block = jnp.ones((count // 4096, 4096), dtype)
    reads = [
        jax.jit(lambda x: jnp.max(x)),
        jax.jit(lambda x: jnp.sum(x.astype(jnp.float32))),
        jax.jit(lambda x: jnp.sum(x.astype(jnp.float32), axis=1)),
    ]
    read = min(best(partial(f, block), repeats) for f in reads)
    del block
    square = random_square(side, dtype)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    matmul = best(partial(product, square), repeats)
    host = np.ones(min(size, 2**30), np.uint8)
    transfer = best(lambda: jax.device_put(host), repeats)
    return Ceilings(
        read=count * jnp.dtype(dtype).itemsize / read,
        matmul=2 * side**3 / matmul,
        transfer=host.nbytes / transfer,
    )


def random_square(side: int, dtype: Any) -> jax.Array:
    """A random matrix: products of zeros or ones run faster than those of real data."""
    return jax.random.normal(jax.random.key(0), (side, side), jnp.float32).astype(dtype)


def best(run: Callable[[], Any], repeats: int) -> float:
    """The fastest of several runs, in seconds: for ceilings."""
    jax.block_until_ready(run())
    return min(_seconds(run) for _ in range(repeats))


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def step_bytes(params: Mapping[str, Any], config: LlamaConfig, filled: int) -> int:
    """Bytes a step must read: all weights but the table, and the filled slots."""
    leaves = jax.tree.leaves(params)
    weights = sum(leaf.nbytes for leaf in leaves)
    if not config.tie_word_embeddings:
        weights -= params["model"]["embed_tokens"]["weight"].nbytes
    width = config.num_key_value_heads * config.head_dim * leaves[0].dtype.itemsize
    return weights + filled * 2 * config.num_hidden_layers * width


def prefill_flops(config: LlamaConfig, batch: int, count: int) -> float:
    """2 FLOPs per weight and token but one for the head; attention counted causal."""
    shapes = parameter_shapes(config)
    inner = [s for name, s in shapes.items() if ".layers." in name and len(s) == 2]
    matrices = 2 * sum(rows * columns for rows, columns in inner) * count
    width = config.num_attention_heads * config.head_dim
    scores = 2 * config.num_hidden_layers * width * count * count
    return batch * (matrices + scores + 2 * config.vocab_size * config.hidden_size)


def time_decode(
    params: Mapping[str, Any],
    config: LlamaConfig,
    ceilings: Ceilings,
    *,
    batch: int,
    context: int,
    new: int = 64,
    capacity: int | None = None,
    ragged: bool = True,
    sampler: Sampler | None = None,
    repeats: int = 5,
) -> Timing:
    """The whole decode loop, sampling included, from `context` filled slots on.

    `ragged` rows hold between half of the context and all of it; `context` and the
    bytes are then means over the rows.
    """
    lengths = np.full(batch, context)
    if ragged and batch > 1:
        lengths = np.linspace(context // 2, context, batch).astype(np.int64)
    request = _request(config, lengths, new, sampler)
    rows = _first_rows(params, config, request)
    dtype = params["model"]["embed_tokens"]["weight"].dtype
    room = context + new + 1 if capacity is None else capacity
    cache = KVCache.empty(config, batch, room, dtype)
    start = jnp.asarray(lengths, jnp.int32)
    limit = jnp.asarray(new + 1, jnp.int32)
    begin = time.perf_counter()
    lowered = decode.lower(params, cache, rows, request.rules, limit, config=config)
    compiled = lowered.compile()
    built = time.perf_counter() - begin
    seconds: list[float] = []
    for _ in range(repeats + 1):
        cache = replace(cache, lengths=start + 0)
        jax.block_until_ready(cache)
        begin = time.perf_counter()
        cache, out = compiled(params, cache, rows, request.rules, limit)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - begin) / new)
    filled = int(lengths.sum() + batch * new / 2)
    cost = step_bytes(params, config, filled)
    median = statistics.median(seconds[1:])
    return Timing(
        work="decode",
        batch=batch,
        context=int(lengths.mean()),
        seconds=median,
        spread=_spread(seconds[1:]),
        tokens_per_second=batch / median,
        cost=cost,
        of_ceiling=cost / median / ceilings.read,
        temp_bytes=_temp_bytes(compiled),
        compile_seconds=built,
    )


def time_prefill(
    params: Mapping[str, Any],
    config: LlamaConfig,
    ceilings: Ceilings,
    *,
    batch: int,
    context: int,
    repeats: int = 5,
) -> Timing:
    """A prompt of `context` tokens into a fresh cache, logits of its last token."""
    lengths = jnp.full(batch, context, jnp.int32)
    tokens = jax.random.randint(
        jax.random.key(1), (batch, context + 1), 0, config.vocab_size, jnp.int32
    )
    static = dict(config=config, capacity=context, scored=False)
    begin = time.perf_counter()
    args = (params, tokens, lengths, lengths, None, None)
    compiled = prefill.lower(*args, **static).compile()
    built = time.perf_counter() - begin
    jax.block_until_ready(compiled(*args))
    seconds = [_seconds(lambda: compiled(*args)[0]) for _ in range(repeats)]
    cost = prefill_flops(config, batch, context)
    median = statistics.median(seconds)
    return Timing(
        work="prefill",
        batch=batch,
        context=context,
        seconds=median,
        spread=_spread(seconds),
        tokens_per_second=batch * context / median,
        cost=cost,
        of_ceiling=cost / median / ceilings.matmul,
        temp_bytes=_temp_bytes(compiled),
        compile_seconds=built,
    )


def _request(
    config: LlamaConfig, lengths: np.ndarray, new: int, sampler: Sampler | None
) -> Request:
    prompt = np.ones((len(lengths), 1), np.int32)
    return prepare(
        prompt,
        None,
        config,
        sampler=sampler,
        key=jax.random.key(0),
        max_new_tokens=new + 1,
        stop_ids=(),
    )


def _first_rows(
    params: Mapping[str, Any], config: LlamaConfig, request: Request
) -> Any:
    dtype = params["model"]["embed_tokens"]["weight"].dtype
    return first_token(
        params,
        jnp.ones((len(request.lengths), config.hidden_size), dtype),
        jnp.asarray(request.prompt),
        jnp.asarray(request.lengths),
        request.rules,
        config=config,
        room=request.room,
        scored=False,
    )


def _temp_bytes(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


def _spread(seconds: list[float]) -> float:
    return (max(seconds) - min(seconds)) / statistics.median(seconds)
