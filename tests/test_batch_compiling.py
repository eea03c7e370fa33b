"""What XLA is told beside an engine's programs, for which devices."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jrope
from jrope.batch.compiling import MANY, compiling, platform_of

CUBLAS = {"xla_gpu_enable_triton_gemm": False}
CUDA, ROCM = "PJRT C API\ncuda 13000", "PJRT C API\nrocm 70000"


def leaf(dtype: Any, platform: str, version: str) -> Any:
    """What stands for a parameter on such a device."""
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(platform=platform, client=client)
    sharding = SimpleNamespace(device_set={None: device}.values())
    return SimpleNamespace(dtype=jnp.dtype(dtype), sharding=sharding)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, CUBLAS),
        ({"tokens": MANY - 1}, None),
        ({"dtype": "int8"}, None),
        ({"version": ROCM}, None),
        ({"platform": "cpu", "version": "cpu"}, None),
        ({"platform": "tpu", "version": "libtpu"}, None),
        ({"layout": "a mesh"}, None),
        ({"speculate": jrope.PromptLookup()}, None),
    ],
)
def test_cublas_has_large_products_of_floats_on_cuda(
    changes: dict[str, Any], wanted: Any
) -> None:
    given: dict[str, Any] = {"platform": "gpu", "version": CUDA, "dtype": "bfloat16"}
    given |= {"tokens": MANY, "layout": None, "speculate": None} | changes
    kind = given.pop("dtype"), given.pop("platform"), given.pop("version")
    params = {"norm": leaf("float32", *kind[1:]), "weight": leaf(*kind)}
    told = list[Any]()
    lowered: Any = SimpleNamespace(compile=told.append)
    compiling(lowered, params, **given)()
    assert told == [wanted] and platform_of(params) == kind[1]


def test_shapes_need_no_device() -> None:
    shapes = {"weight": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)}
    lowered: Any = SimpleNamespace(compile=lambda options: options)
    assert compiling(lowered, shapes, MANY, None, None)() is None
    assert platform_of(shapes) is None


def test_xla_knows_what_it_is_told() -> None:
    program = jax.jit(lambda x: x + 1).lower(1.0)
    assert program.compile(CUBLAS)(1.0) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="such compile option"):
        program.compile({name + "s": value for name, value in CUBLAS.items()})
