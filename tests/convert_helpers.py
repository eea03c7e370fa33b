"""Running the scripts of convert/, and comparing what they wrote."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import jrope
from jrope.hf.checkpoint import open_tensors
from jrope.rope import half_to_interleaved

CONVERT = Path(__file__).parent.parent / "convert"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module", autouse=True)
def _as_a_script():
    """A script's own folder is the first of sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CONVERT))
        yield


@pytest.fixture
def run(capsys) -> Callable[..., str]:
    """run(script, *arguments) -> what it printed; it must succeed."""

    def call(script: str, *argv: object) -> str:
        status = importlib.import_module(script).main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert status == 0, err
        assert out.startswith("wrote "), out
        return out + err

    return call


@pytest.fixture
def refuse(capsys) -> Callable[..., str]:
    """refuse(script, src, dst, ...) -> the one line with which it fails."""

    def call(script: str, src: Path, dst: Path, *more: object) -> str:
        before = sorted(dst.parent.iterdir())
        argv = [str(word) for word in (src, dst, *more)]
        assert importlib.import_module(script).main(argv) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert not out
        assert len(lines) == 1, err
        assert sorted(dst.parent.iterdir()) == before  # nothing half-written either
        return lines[0]

    return call


def as_bits(array: Any) -> np.ndarray:
    """An array's bytes, so that equal means equal bit for bit."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_holds(folder: Path, weights: Mapping[str, Any]) -> None:
    """The folder's tensors are these, bit for bit."""
    tensors = open_tensors(folder)
    assert {*tensors.names} == {*weights}
    for name, wanted in weights.items():
        got = tensors.read(name)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
        np.testing.assert_array_equal(as_bits(got), as_bits(wanted), name)


def assert_logits(folder: Path, model: Any, tolerance: float = 2e-5) -> None:
    """jrope on the folder and transformers on the original compute the same."""
    params, config = jrope.load(folder, "float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17))
    logits, _ = jrope.forward(params, jnp.asarray(tokens, jnp.int32), config=config)
    wanted = model(torch.from_numpy(tokens)).logits.numpy()
    error = np.abs(np.asarray(logits) - wanted).max() / np.abs(wanted).max()
    assert error < tolerance


def bfloat16(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights, rounded."""
    return {name: a.astype(ml_dtypes.bfloat16) for name, a in weights.items()}


def torch_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """NumPy's arrays as torch's, bfloat16 too."""
    return {
        name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        if a.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(a)
        for name, a in weights.items()
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def halves(items: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A dictionary as two."""
    names = [*items]
    middle = len(names) // 2
    return [
        {name: items[name] for name in part}
        for part in (names[:middle], names[middle:])
    ]


def bin_folder(
    folder: Path,
    tiny: Any,
    tensors: Mapping[str, Any] | None = None,
    shards: bool = False,
    **config: Any,
) -> Path:
    """A folder as transformers 4 wrote them: pickles, and a tokenizer."""
    folder.mkdir()
    write_json(folder / "config.json", tiny.config | config)
    (folder / "tokenizer.json").write_text("{}")
    tensors = torch_tensors(tiny.weights) if tensors is None else tensors
    if not shards:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    places = {}
    for number, part in enumerate(halves(tensors), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": places})
    return folder


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor to llama.cpp's."""
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 9)
    found = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None
    return found


def write_gguf(
    path: Path,
    tiny: Any,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    weights: Mapping[str, np.ndarray] | None = None,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    arch: str = "llama",
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    **split: int,
) -> Path:
    """A GGUF file as llama.cpp's converter writes them."""
    config = tiny.config
    writer = gguf.GGUFWriter(path, arch, **split)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add = writer.add_string if isinstance(value, str) else add
        add = writer.add_array if isinstance(value, list) else add
        add(f"llama.{key}", value)
    if tokenizer is not None:
        tokenizer(writer)
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    for name, array in (tiny.weights if weights is None else weights).items():
        part = name.split(".")[-2]
        if part in heads:
            array = half_to_interleaved(array, heads[part])
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
