"""Activations against transformers, alone and in the model."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import close, logits_of, tokens_of, truth
from model_helpers import make as make

from jrope.model.activations import ACTIVATIONS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers(name: str, dtype: str) -> None:
    import torch
    from transformers.activations import ACT2FN

    x = np.concatenate([np.linspace(-12, 12, 1201), [-100, -0.0, 1e-6, 60000]])
    theirs = ACT2FN[name](torch.tensor(x, dtype=getattr(torch, dtype)))
    ours = ACTIVATIONS[name](jnp.asarray(x, dtype))
    assert ours.dtype == dtype
    got, want = np.asarray(ours, np.float64), theirs.double().numpy()
    np.testing.assert_allclose(got, want, **ACTIVATION_TOLERANCES[dtype])


# float32: cancellation in erf and tanh near their ends.  16 bits: one rounding here;
# torch rounds each step of those activations that transformers composes.
ACTIVATION_TOLERANCES = {
    "float32": {"rtol": 1e-6, "atol": 1e-6},
    "bfloat16": {"rtol": 2**-6, "atol": 2**-6},
    "float16": {"rtol": 2**-9, "atol": 2**-9},
}


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "quick_gelu"])
def test_model_uses_its_activation(make: Any, name: str) -> None:
    model = make(layers=1)
    config = dataclasses.replace(model.config, hidden_act=name)
    tokens = tokens_of(config, 1, 5)
    got = logits_of(model, tokens, config=config)
    close(got, truth(model._replace(config=config), tokens), 1e-5)
