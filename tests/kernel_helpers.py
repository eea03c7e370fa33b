"""What tests of GPU kernels share."""

from typing import Any

import jax
import pytest


def text_for_cuda(call: Any, *given: Any, **named: Any) -> str:
    """What a function is lowered to for an NVIDIA GPU, Triton's kernels included."""
    try:
        traced = jax.jit(call).trace(*given, **named)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "No supported GPU" not in str(error):
            raise
        pytest.skip(
            f"from 0.11 on JAX lowers these kernels beside a GPU alone: {error}"
        )
