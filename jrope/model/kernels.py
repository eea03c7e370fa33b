"""Attention by kernels that JAX brings: cuDNN's on NVIDIA GPUs, Pallas's on TPUs."""

import math
from dataclasses import fields
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

SMALLEST_FLASH = 128  # of which a prompt is a multiple for a TPU's kernel
LONGEST_WHOLE = 256  # tokens of a prompt, up to which XLA's scores are small enough
FLASH_BLOCK = 512  # queries, and keys
CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
FLAT_SINCE = (0, 11, 2)  # 0.10.2 looks for grouped heads in the wrong places
HOPPER = 9  # the first GPUs that cuDNN takes such rows on
CUDNN = "jax._src.cudnn.fused_attention_stablehlo"


def cudnn_takes(q: jax.Array) -> bool:
    """Whether cuDNN has such a kernel, and is here: without it, it cannot be traced."""
    head_dim = q.shape[-1]
    fits = head_dim % 8 == 0 and head_dim <= 128 and q.dtype in CUDNN_DTYPES
    return fits and jax.default_backend() == "gpu"


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None,
    scale: float | None,
    window: int | None,
) -> jax.Array:
    """cuDNN's flash attention; in decode it reads only the filled slots.

    A window is for prompts: it counts keys up to the query's own.
    """
    attention = jax.nn.dot_product_attention
    attention = partial(attention, implementation="cudnn", scale=scale)
    if starts is None:
        sides = None if window is None else (window - 1, 0)
        return attention(q, k, v, is_causal=True, local_window_size=sides)
    return attention(q, k, v, key_value_seq_lengths=starts + 1)


def cudnn_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    scale: float | None,
    window: int | None,
) -> jax.Array:
    """`cudnn` of prompts of `lengths`, int32 [B]; it computes nothing past them."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def cudnn_flat_takes(q: jax.Array) -> bool:
    """Whether cuDNN takes rows that lie one behind another, and this JAX tells it."""
    if not cudnn_takes(q) or jax.__version_info__ < FLAT_SINCE or not find_spec(CUDNN):
        return False
    major = jax.local_devices()[0].compute_capability.split(".")[0]
    return major.isdecimal() and int(major) >= HOPPER


def cudnn_flat(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    scale: float | None,
    window: int | None,
) -> jax.Array:
    """cuDNN's flash attention in its packed layout, of R rows in one [1, N, heads, H].

    Args:
      q, k, v: as in `attend`.
      lengths: int32 [R], tokens of each row, the first of which begins at token 0;
        those of 0 come last.
      scale, window: as in `attend`.
    """
    cudnn: Any = import_module(CUDNN)
    lengths = jnp.pad(lengths, (0, 1))[None, :]  # a single row is not taken for packed
    used = lengths > 0
    ends = jnp.where(used, jnp.cumsum(lengths, axis=1), -1)
    offsets = jnp.pad(ends, ((0, 0), (1, 0)))
    sizes = jnp.where(used, lengths, -1)
    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=sizes,
        kv_seqlen=sizes,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )


def flash_takes(q: jax.Array) -> bool:
    """Whether JAX's TPU kernel takes such a prompt, and a TPU is traced for.

    Asked here, not only where the program is lowered: that kernel has no forward-mode
    derivative, and tracing it beside XLA's would leave none on any platform.
    """
    whole = q.shape[1] % SMALLEST_FLASH == 0 and q.shape[-1] % 128 == 0
    if not whole or q.dtype != jnp.bfloat16 or q.shape[1] <= LONGEST_WHOLE:
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:  # on no mesh
        return jax.default_backend() == "tpu"
    return device.device_kind.startswith("TPU")


def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's flash attention for TPUs, which wants a key/value head for each query's."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    block, group = math.gcd(q.shape[1], FLASH_BLOCK), q.shape[2] // k.shape[2]
    sizes = dict.fromkeys((f.name for f in fields(tpu.BlockSizes)), block)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, N, T, H]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    how = tpu.BlockSizes(**sizes | {"block_b": 1})
    scale = 1 / math.sqrt(q.shape[-1])
    y = tpu.flash_attention(q, k, v, causal=True, sm_scale=scale, block_sizes=how)
    return jnp.swapaxes(y, 1, 2)
