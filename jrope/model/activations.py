"""The activations that `hidden_act` may name, computed as PyTorch computes them."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

Activation = Callable[[jax.Array], jax.Array]


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _clipped_gelu(x: jax.Array) -> jax.Array:
    return jnp.clip(_exact_gelu(x), -10, 10)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _laplace(x: jax.Array) -> jax.Array:
    """0.5 (1 + erf((x - mu) / (sigma sqrt 2))), Ma et al. 2022 (arXiv:2209.10655)."""
    return 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


def _sqrt_softplus(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jax.nn.softplus(x))


def _in_float32(function: Activation, x: jax.Array) -> jax.Array:
    """Transcendental functions in float32, rounded once, as PyTorch's kernels do."""
    return function(x.astype(jnp.float32)).astype(x.dtype)


_FUNCTIONS: dict[str, Activation] = {
    "gelu": _exact_gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": _exact_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": jax.nn.hard_swish,
    "laplace": _laplace,
    "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=np.float32(0.01)),
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _squared_relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

ACTIVATIONS: dict[str, Activation] = {
    name: partial(_in_float32, function) for name, function in _FUNCTIONS.items()
}
