"""LoRA adapters, beside PEFT's own sums."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import fail, write_adapter
from cli_helpers import model as model
from conftest import make_tiny_hf

import jrope
from jrope.cli import main
from jrope.cli.loading import Loading
from jrope.errors import JropeError
from jrope.hf.adapters import open_adapter

peft = pytest.importorskip("peft")
# PEFT asks transformers by a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = np.random.default_rng(0).integers(0, 61, (2, 90))  # past the trained 64

CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "every matrix": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "rank-stabilised": {
        **{"r": 9, "lora_alpha": 2, "use_rslora": True},
        "target_modules": ["down_proj", "o_proj"],
    },
    "patterns": {
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "k_proj"]},
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "up_proj": 2},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 32, "k_proj": 1},
    },
    "one layer": {
        **{"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj"]},
        "layers_to_transform": [1],
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "m"
    make_tiny_hf().model.save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, **words: Any) -> np.ndarray:
    """Save an adapter of random numbers; PEFT's logits with it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **words))
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def logits(params: Any, config: Any) -> np.ndarray:
    found, _ = jrope.forward(params, jnp.asarray(IDS, jnp.int32), config=config)
    return np.asarray(found)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_pefts(base: Path, tmp_path: Path, case: str) -> None:
    want = adapter(base, tmp_path / "lora", **CASES[case])
    params, config = jrope.load(base, adapter=tmp_path / "lora")
    got = logits(params, config)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    plain = logits(*jrope.load(base))
    assert np.abs(plain - want).max() > 0.05 * np.abs(want).max()


def test_what_is_saved_is_the_sum(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "lora", **CASES["plain"])
    params, config = jrope.load(base, "bfloat16", adapter=tmp_path / "lora")
    again, _ = jrope.load(jrope.save(tmp_path / "sum", params, config))
    weight = again["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"]
    tensors = open_adapter(tmp_path / "lora", config).tensors
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    a, b = (tensors.read(f"{stem}{x}.weight").astype(np.float64) for x in "AB")
    own = jrope.load(base, "bfloat16")[0]["model"]["layers"]["0"]["self_attn"]
    exact = np.asarray(own["q_proj"]["weight"], np.float64) + 2 * b @ a
    # half a bfloat16 step, and float32's sum before it
    np.testing.assert_allclose(np.asarray(weight, np.float64), exact, rtol=2**-8)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "not read: use_dora; merge it with PEFT"),
    "others": (
        {"modules_to_save": ["lm_head"], "bias": "all", "fan_in_fan_out": True},
        "not read: .*modules_to_save",
    ),
    "method": ({"peft_type": "IA3"}, "peft_type is 'IA3', want LORA"),
    "begun": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which"),
    "rank": ({"r": 0}, "r is 0, want a positive integer"),
    "pattern": ({"rank_pattern": {"q": "x"}}, "rank_pattern is .*want numbers"),
    "shape": ({"r": 5}, r"q_proj.lora_A.weight: got \[4, 64\], want \[5, 64\]"),
}


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "plain"
    adapter(base, folder, **CASES["plain"])
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_read_is_named(base: Path, plain: Path, case: str) -> None:
    fields, message = WRONG[case]
    path = plain / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **fields}))
    try:
        with pytest.raises(JropeError, match=message):
            jrope.load(base, adapter=plain)
    finally:
        path.write_text(before)


def test_of_another_model(plain: Path, tmp_path: Path) -> None:
    make_tiny_hf(layers=1).model.save_pretrained(tmp_path)
    with pytest.raises(JropeError, match=r"layers\.1\..*the model has no such matrix"):
        jrope.load(tmp_path, adapter=plain)


def test_no_safetensors(plain: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(
        (plain / "adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(JropeError, match=r"no adapter_model\.safetensors in .*pickles"):
        jrope.load(base, adapter=tmp_path)


def test_loading_in_a_thread_merges_it(base: Path, plain: Path) -> None:
    with Loading(base, None, adapter=plain) as loading:
        got, _ = loading.wait()
    want, _ = jrope.load(base, adapter=plain)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_parity_is_with_pefts_sum(base: Path, plain: Path, capsys: Any) -> None:
    words = ["--adapter", plain, "--tokens", 8, "--positions", "0"]
    assert main(["parity", *map(str, [base, *words])]) == 0
    assert capsys.readouterr().out.count("\nok: ") == 2


@pytest.mark.parametrize("command", ["generate", "batch", "evaluate"])
def test_commands_load_it(
    model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, command: str
) -> None:
    def load(*_: Any, adapter: Any = None, **__: Any) -> Any:
        raise JropeError(f"the adapter is {adapter}")

    for module in ("loading", "evaluate"):
        monkeypatch.setattr(f"jrope.cli.{module}.load", load)
    text, lora = tmp_path / "text.jsonl", write_adapter(tmp_path / "lora", 2)
    text.write_text('{"prompt": "x"}')
    words = {
        "generate": ["x", "--max-new-tokens", 1],
        "batch": ["--input", text, "--output", tmp_path / "out.jsonl"],
        "evaluate": ["--text", text, "--context", 4],
    }[command]
    line = fail(capsys, command, model, *words, "--adapter", lora)
    assert f"the adapter is {lora}" in line
