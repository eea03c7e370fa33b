"""Strict arrays, few threads, no network; and tiny random models to compare with."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("JROPE_CACHE_DIR", "")  # no compilation cache in tests

import gc
import json
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import jaxlib
import numpy as np
import pytest

# Tests compile more than they compute: without LLVM's optimisations and MLIR's passes
# (XLA's own stay) in a third of the time.  `.ci/run` runs a part with these as well.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)


def quick_flags() -> str:
    """Those of QUICK that this XLA has: one that it does not know ends the process."""
    known = list[str]()
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with library.open("rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            names = {f: f[2:].split("=")[0].encode() for f in QUICK}
            known += [f for f, name in names.items() if text.find(b"\0%b\0" % name) > 0]
    return " ".join(known)


if "XLA_FLAGS" not in os.environ:  # XLA_FLAGS= compiles as users do
    os.environ["XLA_FLAGS"] = quick_flags()

pytest.register_assert_rewrite(
    "checkpoint_helpers",
    "cli_helpers",
    "convert_helpers",
    "int8_helpers",
    "model_helpers",
)
if folder := os.environ.get("JROPE_TEST_CACHE"):  # equal programs compile once a run
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "jrope", deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile("jrope")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of tests that need a real model."""
    text = "slow: needs a real model; runs when JROPE_SMOLLM2 names its folder"
    config.addinivalue_line("markers", text)


# What takes longest begins first, lest one worker end alone with it.
FIRST = ("test_devices.py", "test_processes.py", "test_batch_kills.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort; skip the slow tests, with the reason, where there is no real model."""
    items.sort(key=lambda item: item.path.name not in FIRST)
    if os.environ.get("JROPE_SMOLLM2"):
        return
    skip = pytest.mark.skip(
        reason="set JROPE_SMOLLM2 to a SmolLM2-135M-Instruct folder"
    )
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


# XLA holds six memory maps and more for a program on a CPU, and Linux gives a process
# 65,530: a worker that keeps every program it compiled would end before the tests do.
MAPS = 16_384


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go() -> Iterator[None]:
    """After a file of tests that left too many programs behind: drop them."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()


class TinyHF(NamedTuple):
    """A tiny random LLaMA: the transformers model, its tensors, its config.json."""

    model: Any
    weights: dict[str, np.ndarray]
    config: dict[str, Any]


def make_tiny_hf(
    *,
    seed: int = 0,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    vocab_size: int = 61,
    max_position_embeddings: int = 64,
    rope_parameters: dict[str, Any] | None = None,
    tied: bool = False,
    bias: bool = False,
    hidden_act: str = "silu",
    **config: Any,
) -> TinyHF:
    """Build a float32 LlamaForCausalLM, the same one for the same arguments.

    Every tensor is random, norms and biases too, so that none can be forgotten; the
    scale keeps activations near 1 and the logits a few units apart.

    Args:
        seed: of the weights.
        layers, heads, kv_heads, head_dim, hidden_size, ...: as in LlamaConfig.
        rope_parameters: plain rope with theta 10000 if None; theta may be left out.
        tied: whether the embedding is the head.
        bias: both attention_bias and mlp_bias; name them in `config` for one only.
        config: further fields of LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    rope = {"rope_type": "default", "rope_theta": 10000.0, **(rope_parameters or {})}
    fields: dict[str, Any] = {"attention_bias": bias, "mlp_bias": bias, **config}
    fields["attn_implementation"] = "eager"
    hf_config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden_size // heads,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        hidden_act=hidden_act,
        **fields,
    )
    model = LlamaForCausalLM(hf_config).eval().requires_grad_(False)
    random = np.random.default_rng(seed)
    for name, tensor in sorted(model.named_parameters()):  # a tied head comes once
        values = random.standard_normal(tensor.shape, np.float32)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif name.endswith("bias"):
            values = 0.2 * values
        elif "embed_tokens" not in name:
            values *= (2.0 if "lm_head" in name else 1.0) / tensor.shape[-1] ** 0.5
        elif tied:
            values *= 2.0 / hidden_size**0.5
        tensor.copy_(torch.from_numpy(values))
    weights = {name: tensor.numpy().copy() for name, tensor in model.named_parameters()}
    saved = json.loads(hf_config.to_json_string())
    return TinyHF(model, weights, {"architectures": ["LlamaForCausalLM"], **saved})


@pytest.fixture(scope="session")
def tiny_hf() -> Callable[..., TinyHF]:
    """The factory of tiny random models: `tiny_hf(kv_heads=1, tied=True, ...)`."""
    return make_tiny_hf
