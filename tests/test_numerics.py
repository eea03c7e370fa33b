"""Tables that a CPU computes once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate_helpers import model

from jrope.model.llama import forward
from jrope.numerics import computed_once


def test_tables_stay_as_they_are() -> None:
    random = np.random.default_rng(0).standard_normal
    tables = [random((*shape, 24)).astype(np.float32) for shape in ((2, 9), (1,))]
    tables[0][0, 0, :3] = 1e-30, 3e38, -0.0
    got = jax.jit(computed_once)((tables[0], (tables[1], None)))
    np.testing.assert_array_equal(got[0], tables[0])
    np.testing.assert_array_equal(got[1][0], tables[1])
    assert got[1][1] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_read_one_table(dtype: str) -> None:
    _, params, config = model()
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tokens = jnp.zeros((2, 8), jnp.int32)
    run = jax.jit(forward, static_argnames="config")
    text = run.lower(params, tokens, config=config).compile().as_text()
    assert config.num_hidden_layers > 1
    assert text.count(" cosine(") == text.count(" sine(") == 1
