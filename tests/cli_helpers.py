"""A model whose greedy text is known, and calls of `jrope` that succeed or fail.

Token t is followed by NEXT[t].
"""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jrope.cli import main
from jrope.hf import config_from_hf
from jrope.hf.checkpoint import write_folder
from jrope.model.config import parameter_shapes

ANSWER = " é😀日!"  # no byte twice, so that one follows from the other
SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {letter: i for i, letter in enumerate([*LETTERS, *SPECIAL])}
SIZE = 264
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "bos_token_id": VOCAB["<s>"],
    "eos_token_id": VOCAB["</s>"],
}


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(VOCAB, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def chain() -> np.ndarray:
    """NEXT: x, <s> and <|assistant|> begin ANSWER, other letters the alphabet."""
    following = (np.arange(SIZE) + 1) % 256
    answer = ids_of(ANSWER)
    following[answer] = [*answer[1:], VOCAB["</s>"]]
    for first in ("x", "<s>", "<|assistant|>"):
        following[VOCAB[first]] = answer[0]
    return following


def make_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(shape, np.float32)
        for name, shape in parameter_shapes(config_from_hf(CONFIG)).items()
    }
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name][:] = 0
        if "norm" in name:
            weights[name][:] = 1
    weights["model.embed_tokens.weight"] = np.eye(SIZE, dtype=np.float32)
    weights["lm_head.weight"] = np.zeros((SIZE, SIZE), np.float32)
    weights["lm_head.weight"][chain(), np.arange(SIZE)] = 1
    return weights


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without chat template; read only."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    write_folder(folder, CONFIG, make_weights().items())
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)
    return folder


def write_adapter(folder: Path, scale: float) -> Path:
    """A LoRA adapter of the model's only q_proj."""
    folder.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    shapes = {f"{stem}A.weight": (1, SIZE), f"{stem}B.weight": (16, 1)}
    ones = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(ones, folder / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "r": 1, "lora_alpha": scale}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    return folder


def write_tokenizer_config(folder: Path, **more: Any) -> None:
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to spoil."""
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture(autouse=True)
def _no_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JROPE_CACHE_DIR", "")
    monkeypatch.delenv("JROPE_DEBUG", raising=False)


def succeed(capsys: Any, *words: object, status: int = 0) -> tuple[str, str]:
    assert main([str(word) for word in words]) == status
    return capsys.readouterr()


def fail(capsys: Any, *words: object, status: int = 2) -> str:
    """The one line that an error gives."""
    assert main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jrope: error: ") and err.endswith("\n")
    assert err.count("\n") == 1 and "Traceback" not in err
    return err.strip()


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def _raise(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def describe(capsys: Any, folder: Path, *words: object) -> dict[str, Any]:
    return json.loads(succeed(capsys, "inspect", folder, "--json", *words)[0])
