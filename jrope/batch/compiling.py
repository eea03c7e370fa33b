"""How an engine's programs are compiled, and for which devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled, Lowered

from jrope.generation.guesser import Guesser
from jrope.sharding.meshes import Layout
from jrope.tree import Params

MANY = 64  # tokens of a program from which cuBLAS is the faster (8B, H200)


def platform_of(params: Params) -> str | None:
    """For whose devices the parameters are; None: they do not say."""
    devices = _devices_of(params)
    return devices[0].platform if devices else None


def on_device_of(params: Params, shapes: Any) -> Any:
    """Shapes on the one device for which the parameters are; they may not say which."""
    devices = _devices_of(params)
    there = SingleDeviceSharding(devices[0]) if len(devices) == 1 else None
    shape = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=there), shapes)


def compiling(
    lowered: Lowered,
    params: Params,
    tokens: int,
    layout: Layout | None,
    speculate: Guesser | None,
) -> Callable[[], Compiled]:
    """What compiles a program over so many tokens, as is best where `params` are.

    On CUDA, of many tokens: cuBLAS adds the residual while it writes a product, for
    which XLA has a kernel of its own behind Triton's.  A step of 128 rows takes 2 %
    less time, and so do 2,048 tokens of prompts; one of 32 rows would take 2 % more
    (8B, bfloat16, H200, jax 0.11.2).  Integers are widened in Triton's products alone,
    on a mesh sums go between product and residual, and guesses were not measured.

    Args:
      lowered: the program.
      params: of the model.
      tokens: that go through its products; 0: it has none.
      layout, speculate: as in `compile_programs`.
    """
    devices, gpu = _devices_of(params), platform_of(params) == "gpu"
    cuda = gpu and "cuda" in devices[0].client.platform_version
    floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(params))
    plain = layout is None and speculate is None and floats
    chosen: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
    wanted = cuda and plain and tokens >= MANY
    return partial(lowered.compile, chosen if wanted else None)


def _devices_of(params: Params) -> list[Any]:
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return [] if sharding is None else [*sharding.device_set]
