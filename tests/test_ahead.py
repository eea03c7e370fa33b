"""Compiling ahead: what was compiled before the weights came is what runs."""

import gc
import logging
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrope.errors import JropeError
from jrope.generation.ahead import compile_ahead, side_by_side
from jrope.generation.run import generate, stream
from jrope.hf import config_from_hf
from jrope.model.config import LlamaConfig
from jrope.model.llama import init_params
from jrope.weights.fuse import fuse

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
}


@pytest.fixture
def compiled(caplog: pytest.LogCaptureFixture) -> Any:
    """Names of the programs compiled since it was last asked."""
    caplog.set_level(logging.WARNING, "jax")

    def names() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        starts = [line.split()[1] for line in lines if line.startswith("Compiling ")]
        words = [start.removeprefix("jit(").removesuffix(")") for start in starts]
        return sorted({*words} & {"prefill", "first_token", "decode"})

    with jax.log_compiles():
        yield names


def config_of(intermediate: int) -> LlamaConfig:
    """A model of shapes that no other test compiles for."""
    return config_from_hf({**CONFIG, "intermediate_size": intermediate})


def shapes_of(params: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scores": {"logprobs": True},
    "pieces": {"prefill_chunk": 5},
    "pieces and scores": {"prefill_chunk": 5, "logprobs": True},
}


@pytest.mark.parametrize("case", CASES)
def test_generate_finds_what_was_compiled(compiled: Any, case: str) -> None:
    config = config_of(41 + [*CASES].index(case))
    params = init_params(jax.random.key(0), config)
    prompt, options = np.ones((2, 9), np.int32), CASES[case]
    compile_ahead(shapes_of(params), prompt, config=config, max_new_tokens=7, **options)
    assert compiled() == ["decode", "first_token", "prefill"]
    generate(params, prompt, config=config, max_new_tokens=7, **options)
    assert compiled() == []
    if "logprobs" not in options:
        streamed = stream(params, prompt, config=config, max_new_tokens=7, **options)
        assert sum(block.shape[1] for block in streamed) == 7
        assert compiled() == []
    if case == "plain":  # else nothing is tested
        generate(params, prompt[:1], config=config, max_new_tokens=7)
        assert compiled() == ["decode", "first_token", "prefill"]


def test_fused_and_16_bit(compiled: Any) -> None:
    config = config_of(51)
    params = fuse(init_params(jax.random.key(0), config, jnp.bfloat16), "in_out")
    prompt = np.ones((1, 3), np.int32)
    compile_ahead(shapes_of(params), prompt, config=config)
    compiled()
    generate(params, prompt, config=config)
    assert compiled() == []


def test_a_request_that_generate_refuses() -> None:
    config = config_of(40)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    with pytest.raises(JropeError, match="outside the vocabulary"):
        compile_ahead(shapes, [[61]], config=config)


def test_a_program_compiles_while_the_next_is_traced() -> None:
    begun = threading.Event()

    def lowered() -> Iterator[tuple[str, Any]]:
        yield "first", begun.set
        assert begun.wait(60), "the first one waits for the second one's trace"
        yield "second", lambda: "compiled"

    assert side_by_side(lowered()) == {"first": None, "second": "compiled"}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_collector_waits_for_traces_alone(enabled: bool, fails: bool) -> None:
    had, seen = gc.isenabled(), list[bool]()

    def lowered() -> Iterator[tuple[str, Any]]:
        seen.append(gc.isenabled())
        if fails:
            raise JropeError("cannot be traced")
        yield "one", lambda: None

    try:
        (gc.enable if enabled else gc.disable)()
        if fails:
            with pytest.raises(JropeError, match="cannot be traced"):
                side_by_side(lowered())
        else:
            side_by_side(lowered())
        seen.append(gc.isenabled())
    finally:
        (gc.enable if had else gc.disable)()
    assert seen == [False, enabled]
