"""The scripts of convert/: every foreign format is made here, converted, compared."""

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

import jrope
from jrope.checkpoint import open_tensors, read_config
from jrope.config import flatten, nest
from jrope.rope import half_to_interleaved
from jrope.scaling import Linear, Llama3, Yarn

CONVERT = Path(__file__).parent.parent / "convert"
SCRIPTS = sorted(path.stem for path in CONVERT.glob("[!_]*.py"))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HIDDEN = 192  # what Meta's formula gives for dim 64 and multiple_of 32


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


# --- what all of them share ----------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_itself(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("SRC", "DST", "--overwrite", "--dtype"):
        assert word in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_absent_source_is_one_line(script, tmp_path, refuse):
    assert "absent" in refuse(script, tmp_path / "absent", tmp_path / "out")


def test_runs_as_a_script(tmp_path):
    command = [sys.executable, CONVERT / "pytorch_bin_to_hf.py", tmp_path / "a", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pytorch_bin_to_hf.py: error: no config.json in ")
    assert len(done.stderr.splitlines()) == 1


def test_targets_that_hold_something_are_kept(tiny_hf, tmp_path, run, refuse):
    src, dst = bin_folder(tmp_path / "src", tiny_hf()), tmp_path / "dst"
    dst.mkdir()
    run("pytorch_bin_to_hf", src, dst)
    before = (dst / "model.safetensors").stat().st_mtime_ns
    assert "give --overwrite" in refuse("pytorch_bin_to_hf", src, dst)
    assert (dst / "model.safetensors").stat().st_mtime_ns == before
    run("pytorch_bin_to_hf", src, dst, "--overwrite", "--dtype", "bfloat16")
    assert open_tensors(dst).dtypes["model.norm.weight"] == "BF16"
    (dst / "diary.txt").write_text("mine")
    assert "diary.txt" in refuse("pytorch_bin_to_hf", src, dst, "--overwrite")
    assert "holds SRC" in refuse("pytorch_bin_to_hf", src, src, "--overwrite")
    assert "holds SRC" in refuse("pytorch_bin_to_hf", src, tmp_path, "--overwrite")


def test_interruption_leaves_nothing(tiny_hf, tmp_path, capsys, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    src = bin_folder(tmp_path / "src", tiny_hf())
    script = importlib.import_module("pytorch_bin_to_hf")
    monkeypatch.setattr("_common._stream", stop)
    assert script.main([str(src), str(tmp_path / "dst")]) == 130
    assert "nothing written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


# --- pytorch_bin_to_hf ---------------------------------------------------------------


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


@pytest.mark.parametrize("shards", [False, True])
def test_pytorch_bin(shards, tiny_hf, tmp_path, run):
    tiny = tiny_hf(bias=True)
    src = bin_folder(tmp_path / "src", tiny, shards=shards)
    out = run("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)
    assert f"{len(tiny.weights)} tensors" in out
    assert out.rstrip().endswith("float32")
    assert (tmp_path / "dst" / "tokenizer.json").read_text() == "{}"


def test_pytorch_bin_keeps_bfloat16_and_drops_frequencies(tiny_hf, tmp_path, run):
    tiny = tiny_hf()
    weights = bfloat16(tiny.weights)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    tensors = torch_tensors(weights) | frequencies
    src = bin_folder(tmp_path / "src", tiny, tensors)
    run("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", weights)
    assert read_config(tmp_path / "dst")["dtype"] == "bfloat16"


def test_pytorch_bin_with_tied_and_transposed_tensors(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf(tied=True)
    tensors = torch_tensors(tiny.weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    up = "model.layers.0.mlp.up_proj.weight"
    tensors[up] = tensors[up].T.contiguous().T  # same values, other strides
    src = bin_folder(tmp_path / "src", tiny, tensors)
    run("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    src = bin_folder(tmp_path / "other", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "no")
    assert "lm_head.weight differs from" in line


def test_pytorch_bin_of_the_old_kind(tiny_hf, tmp_path, run):
    tiny = tiny_hf()
    src = bin_folder(tmp_path / "src", tiny)
    torch.save(
        {n: torch.nn.Parameter(t) for n, t in torch_tensors(tiny.weights).items()},
        src / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    run("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["zip", "pickle", "old"])
def test_pickles_with_code_are_refused(how, tiny_hf, tmp_path, refuse):
    tiny, victim = tiny_hf(), tmp_path / "victim"
    src = bin_folder(tmp_path / "src", tiny)
    state = torch_tensors(tiny.weights) | {"evil": Evil(victim)}
    file = src / "pytorch_model.bin"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"evil": Evil(victim)}, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=how == "zip")
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert not victim.exists()
    assert "pytorch_model.bin: refused" in line
    assert f"{os.mkdir.__module__}.mkdir" in line


def test_pytorch_bin_lists_all_that_is_wrong(tiny_hf, tmp_path, refuse):
    tiny = tiny_hf()
    tensors = torch_tensors(tiny.weights)
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["extra"] = torch.zeros(2)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 3)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    src = bin_folder(tmp_path / "src", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst", "--dtype", "float32")
    for text in (
        *("2 missing: ", "model.norm.weight", "lm_head.weight", "extra"),
        *("found (2, 3), want (96, 64)", f"{name} (int8)"),
    ):
        assert text in line


def damage(src: Path, kind: str) -> None:
    """Spoil a sharded folder of pickles."""
    index = src / "pytorch_model.bin.index.json"
    first, second = sorted(src.glob("*.bin"))
    places = json.loads(index.read_text())["weight_map"]
    some = next(iter(places))
    if kind == "truncated":
        first.write_bytes(first.read_bytes()[:5000])
    elif kind == "empty":
        first.write_bytes(b"")
    elif kind == "pointer":
        first.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif kind == "missing":
        second.unlink()
    elif kind == "outside":
        second.rename(src.parent / second.name)
        moved = {n: f"../{f}" if f == second.name else f for n, f in places.items()}
        write_json(index, {"weight_map": moved})
    elif kind == "misplaced":
        write_json(index, {"weight_map": places | {some: second.name}})
    elif kind == "both":
        first.rename(src / "pytorch_model.bin")
    elif kind == "index":
        write_json(index, {"weight_map": [1]})
    elif kind == "nested":
        torch.save({"state_dict": torch.load(first)}, first)
    elif kind == "list":
        torch.save([torch.zeros(1)], first)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"-00001-of-00002.bin cannot be read as PyTorch weights: dam"),
        ("empty", r"-00001-of-00002.bin is empty"),
        ("pointer", r"git lfs pull"),
        ("missing", r"'pytorch_model-00002-of-00002.bin' is missing"),
        ("outside", r"'../pytorch_model-00002-of-00002.bin' leads out of the folder"),
        ("misplaced", r"listed in \S+-00002-of-00002.bin, found in \S+-00001-of-00002"),
        ("both", r"remove the stale one"),
        ("index", r"weight_map must map tensor names to file names"),
        ("nested", r"state_dict \(dict\); save the model's state_dict"),
        ("list", r"holds a list, want a dictionary of tensors"),
    ],
)
def test_damaged_pytorch_bin(kind, message, tiny_hf, tmp_path, refuse):
    src = bin_folder(tmp_path / "src", tiny_hf(), shards=True)
    damage(src, kind)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert re.search(message, line), line


def test_casts_round_once_and_never_overflow(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf()
    tensors = {n: t.double() for n, t in torch_tensors(tiny.weights).items()}
    src = bin_folder(tmp_path / "src", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert "model.embed_tokens.weight (float64)" in line
    run("pytorch_bin_to_hf", src, tmp_path / "dst", "--dtype", "bfloat16")
    assert_holds(tmp_path / "dst", bfloat16(tiny.weights))
    tensors["model.norm.weight"][3] = 1e6
    src = bin_folder(tmp_path / "large", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "no", "--dtype", "float16")
    assert "model.norm.weight: 1000000.0 is too large for float16" in line


def test_torch_is_named_when_absent(tiny_hf, tmp_path, refuse, monkeypatch):
    src = bin_folder(tmp_path / "src", tiny_hf())
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert "needs the package torch: pip install torch" in line


# --- hf_to_flax, flax_to_hf ----------------------------------------------------------


def saved(folder: Path, tiny: Any, weights: Mapping[str, np.ndarray]) -> Path:
    """A Hugging Face folder with a tokenizer."""
    config = jrope.hf.config_from_hf(tiny.config)
    extra = folder.parent / "tokenizer.json"
    extra.write_text("{}")
    return jrope.save(folder, nest(weights), config, extra_files=[extra])


def restore(folder: Path) -> dict[str, Any]:
    with ocp.StandardCheckpointer() as checkpointer:
        return flatten(checkpointer.restore(folder))


@pytest.mark.parametrize("tied", [False, True])
def test_flax_round_trip_is_bit_equal(tied, tiny_hf, tmp_path, run):
    tiny = tiny_hf(tied=tied, rope_parameters=LLAMA3, max_position_embeddings=131072)
    weights = bfloat16(tiny.weights) | {"model.norm.weight": np.ones(64, np.float32)}
    src = saved(tmp_path / "src", tiny, weights)
    out = run("hf_to_flax", src, tmp_path / "flax")
    assert out.rstrip().endswith("bfloat16 and float32")
    assert {path.name for path in (tmp_path / "flax").iterdir()} == {
        *("params", "config.json", "tokenizer.json")
    }
    restored = restore(tmp_path / "flax" / "params")
    for name, wanted in weights.items():
        assert type(restored[name]) is np.ndarray  # bound to no device
        np.testing.assert_array_equal(as_bits(restored[name]), as_bits(wanted))
    run("flax_to_hf", tmp_path / "flax", tmp_path / "dst")
    assert_holds(tmp_path / "dst", weights)
    assert read_config(tmp_path / "dst") == read_config(src)
    assert (tmp_path / "dst" / "tokenizer.json").is_file()


def test_flax_checkpoint_is_what_the_module_takes(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf()
    src = saved(tmp_path / "src", tiny, tiny.weights)
    dst = tmp_path / "flax"
    run("hf_to_flax", src, dst, "--dtype", "float32")
    config = jrope.hf.config_from_hf(read_config(dst))
    params = jax.tree.map(jnp.asarray, nest(restore(dst / "params")))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    logits, _ = jrope.Llama(config).apply({"params": params}, tokens)
    wanted = tiny.model(torch.arange(6)[None]).logits.numpy()
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max())
    assert "give --overwrite" in refuse("hf_to_flax", src, dst)
    run("hf_to_flax", src, dst, "--overwrite")
    assert "holds SRC" in refuse("flax_to_hf", dst, dst, "--overwrite")


def test_flax_checkpoint_of_other_devices(tiny_hf, tmp_path, run):
    tiny = tiny_hf()
    write_json(tmp_path / "config.json", tiny.config)
    np.savez(tmp_path / "weights.npz", **tiny.weights)
    program = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from pathlib import Path
from jrope.config import nest
folder = Path(sys.argv[1])
mesh = jax.make_mesh((4,), ("x",))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
arrays = np.load(folder / "weights.npz")
put = {n: jax.device_put(a, split if a.ndim == 2 else whole) for n, a in arrays.items()}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "params", {"params": nest(put)})
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, env=os.environ | flags, check=True, capture_output=True)
    (tmp_path / "src").mkdir()
    for name in ("params", "config.json"):
        (tmp_path / name).rename(tmp_path / "src" / name)
    run("flax_to_hf", tmp_path / "src", tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)


def test_flax_to_hf_refuses_what_config_does_not_describe(tiny_hf, tmp_path, refuse):
    tiny = tiny_hf()
    weights = {n: a for n, a in tiny.weights.items() if "layers.1.mlp" not in n}
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 2), np.float32)
    weights["opt.mu"] = np.zeros(2, np.float32)
    src = tmp_path / "src"
    src.mkdir()
    write_json(src / "config.json", tiny.config)
    line = refuse("flax_to_hf", src, tmp_path / "dst")
    assert "want the Orbax checkpoint there" in line
    (src / "params").mkdir()
    assert "holds no Orbax checkpoint" in refuse("flax_to_hf", src, tmp_path / "dst")
    (src / "params").rmdir()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(src / "params", args=ocp.args.StandardSave(nest(weights)))
    line = refuse("flax_to_hf", src, tmp_path / "dst")
    for text in ("3 missing", "opt.mu", "found (3, 2), want (96, 64)"):
        assert text in line


# --- meta_to_hf ----------------------------------------------------------------------


def meta_name(name: str) -> str:
    """Hugging Face's name of a tensor to Meta's, written out independently."""
    table = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for theirs, metas in table.items():
        name = name.replace(theirs, metas)
    return name


def meta_tensors(weights: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Any:
    """The whole state dict, wq and wk in interleaved order."""
    heads = {
        "wq": config["num_attention_heads"],
        "wk": config["num_key_value_heads"],
    }
    renamed = {meta_name(name): array for name, array in weights.items()}
    for name, array in renamed.items():
        kind = name.split(".")[-2]
        if kind in heads:
            renamed[name] = half_to_interleaved(array, heads[kind])
    return torch_tensors(renamed)


def meta_folder(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    ranks: int = 1,
    rows_of_embedding: bool = False,
    **params: Any,
) -> Path:
    """A folder as Meta publishes them, `ranks` model-parallel files."""
    folder.mkdir()
    whole = meta_tensors(weights, config)
    whole.setdefault("output.weight", whole["tok_embeddings.weight"].clone())
    kv_heads = config["num_key_value_heads"]
    for rank in range(ranks):
        part = {"rope.freqs": torch.ones(8)}
        for name, tensor in whole.items():
            kind = name.split(".")[-2]
            axis = 1 if kind in ("wo", "w2", "tok_embeddings") else 0
            if kind == "tok_embeddings" and rows_of_embedding:
                axis = 0
            if tensor.ndim == 1:
                part[name] = tensor
            elif kind in ("wk", "wv") and ranks > kv_heads:
                part[name] = tensor.chunk(kv_heads)[rank * kv_heads // ranks].clone()
            else:
                part[name] = tensor.chunk(ranks, axis)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    known = {
        "dim": 64,
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": kv_heads,
        "vocab_size": -1,
        "multiple_of": 32,
        "norm_eps": config["rms_norm_eps"],
    }
    params = {key: value for key, value in (known | params).items() if value != "drop"}
    write_json(folder / "params.json", params)
    return folder


@pytest.mark.parametrize(
    ("ranks", "rows", "kv_heads"),
    [(1, False, 2), (2, False, 2), (2, True, 4), (2, False, 1), (4, True, 2)],
)
def test_meta(ranks, rows, kv_heads, tiny_hf, tmp_path, run):
    tiny = tiny_hf(kv_heads=kv_heads, intermediate_size=HIDDEN, vocab_size=64)
    weights = bfloat16(tiny.weights)
    src = meta_folder(
        tmp_path / "src", weights, tiny.config, ranks=ranks, rows_of_embedding=rows
    )
    (src / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    out = run("meta_to_hf", src, tmp_path / "dst", "--max-position", 2048)
    assert_holds(tmp_path / "dst", weights)
    assert (tmp_path / "dst" / "tokenizer.model").is_file()
    assert "rope_theta 10000: params.json has none" in out
    assert "bos_token_id 1 and eos_token_id [2]" in out
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    assert config.max_position_embeddings == 2048
    if ranks == 4:
        for name, tensor in tiny.model.named_parameters():
            tensor.copy_(torch_tensors(weights)[name].float())
        assert_logits(tmp_path / "dst", tiny.model)


def test_meta_llama3(tiny_hf, tmp_path, run):
    rope = LLAMA3 | {"factor": 32.0}
    tiny = tiny_hf(
        tied=True,
        intermediate_size=HIDDEN,
        vocab_size=64,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    src = meta_folder(
        tmp_path / "src",
        tiny.weights,
        tiny.config,
        ranks=2,
        rows_of_embedding=True,
        rope_theta=500000.0,
        use_scaled_rope=True,
        vocab_size=64,
    )
    (src / "tokenizer.model").write_bytes(b"IQ== 0\n")
    out = run("meta_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)
    for text in ("written as tied", "rope factor 32", "131072", "copy tokenizer.json"):
        assert text in out
    out = run("meta_to_hf", src, tmp_path / "b", "--rope-factor=8", "--eos", 5, 6)
    config = jrope.hf.config_from_hf(read_config(tmp_path / "b"))
    assert config.eos_token_id == (5, 6)
    assert config.rope.scaling == Llama3(
        factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    assert "rope factor" not in out


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"window": 3, "moe": {}}, "unknown window, moe"),
        ({"dim": "drop", "n_heads": "drop"}, "missing dim, n_heads"),
        ({"n_heads": 5}, "dim is not a multiple of n_heads"),
        ({"n_layers": True}, "n_layers is true, want a positive integer"),
        ({"norm_eps": "1e-5"}, "norm_eps is"),
        ({"vocab_size": 65}, "vocab_size 65, the embedding 64 rows"),
        ({"multiple_of": 256}, "give 256 hidden units, but w1 has 192"),
        ({"ffn_dim_multiplier": 1.3}, "give 224 hidden units, but w1 has 192"),
        ({}, "give --max-position (LLaMA 1: 2048, Llama 2: 4096)"),
        ({"dim": 96, "n_heads": 4}, "tok_embeddings.weight has 64 columns"),
        ({"n_layers": 3, "rope_theta": 5e5}, "9 missing: model.layers.2.self_attn"),
        ({"n_kv_heads": 4, "rope_theta": 5e5}, "found (32, 64), want (64, 64)"),
        ({"rope_theta": 5e5, "--rope-factor": 8}, "use_scaled_rope is not true"),
    ],
)
def test_meta_refuses(params, message, tiny_hf, tmp_path, refuse):
    tiny = tiny_hf(intermediate_size=HIDDEN, vocab_size=64)
    params = dict(params)
    options = [f"{k}={params.pop(k)}" for k in [*params] if k.startswith("--")]
    src = meta_folder(tmp_path / "src", tiny.weights, tiny.config, **params)
    assert message in refuse("meta_to_hf", src, tmp_path / "dst", *options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gap", "has consolidated.00.pth, consolidated.02.pth; want consolidated.00"),
        ("names", "differ in extra; they are not ranks of one checkpoint"),
        ("unknown", "1 unexpected: extra"),
        ("shape", "layers.0.feed_forward.w1.weight differs between the ranks"),
        ("copies", "ranks that share a head do not hold the same rows"),
        ("none", "no consolidated.*.pth"),
        ("output", "missing output.weight"),
    ],
)
def test_meta_ranks_must_agree(kind, message, tiny_hf, tmp_path, refuse):
    tiny = tiny_hf(kv_heads=1, intermediate_size=HIDDEN, vocab_size=64)
    src = meta_folder(tmp_path / "src", tiny.weights, tiny.config, ranks=2)
    files = [src / f"consolidated.{rank:02}.pth" for rank in range(2)]
    parts = [torch.load(file) for file in files]
    if kind in ("names", "unknown"):
        for part in parts[: 1 if kind == "names" else 2]:
            part["extra"] = torch.zeros(3)
    elif kind == "shape":
        parts[1]["layers.0.feed_forward.w1.weight"] = torch.zeros(95, 64)
    elif kind == "copies":
        parts[1]["layers.0.attention.wv.weight"] += 1
    elif kind == "output":
        for part in parts:
            del part["output.weight"]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, file)
    if kind == "gap":
        files[1].rename(src / "consolidated.02.pth")
    elif kind == "none":
        for file in files:
            file.unlink()
    line = refuse("meta_to_hf", src, tmp_path / "dst", "--max-position=2048")
    assert message in line


# --- gguf_to_hf ----------------------------------------------------------------------


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


def test_gguf_float32(tiny_hf, tmp_path, run):
    tiny = tiny_hf(bias=True, rms_norm_eps=1e-5)
    src = write_gguf(tmp_path / "m.gguf", tiny, keys={"expert_count": 0})
    out = run("gguf_to_hf", src, tmp_path / "dst", "--dtype", "float32")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)
    assert "m.gguf holds no tokenizer" in out
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    wanted = jrope.hf.config_from_hf(tiny.config)
    assert config.rms_norm_eps == 1e-5  # not 9.99999974e-06
    assert config == wanted


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_dequantizes_and_rounds_once(name, tiny_hf, tmp_path, run):
    tiny, kind = tiny_hf(tied=True), gguf.GGMLQuantizationType[name]
    src = write_gguf(tmp_path / "m.gguf", tiny, kind=kind)

    def there_and_back(name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim == 1:
            return array
        packed = gguf.quants.quantize(array, kind)
        return gguf.quants.dequantize(packed, kind)  # row by row, so order is free

    weights = {n: there_and_back(n, a) for n, a in tiny.weights.items()}
    run("gguf_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", bfloat16(weights))
    run("gguf_to_hf", src, tmp_path / "exact", "--dtype", "float32")
    assert_holds(tmp_path / "exact", weights)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """llama.cpp's rope_freqs: what frequencies are divided by, pair by pair."""
    turn = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    ratio = rope["original_max_position_embeddings"] / turn
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((ratio - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3(factor, tiny_hf, tmp_path, run):
    rope = LLAMA3 | {"factor": factor}
    tiny = tiny_hf(rope_parameters=rope, max_position_embeddings=131072)
    extra = {"rope_freqs.weight": llama3_factors(rope, tiny.config["head_dim"])}
    src = write_gguf(tmp_path / "m.gguf", tiny, extra=extra)
    run("gguf_to_hf", src, tmp_path / "dst", "--dtype=float32", "--no-tokenizer")
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    assert config.rope == jrope.hf.config_from_hf(tiny.config).rope
    assert_logits(tmp_path / "dst", tiny.model)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"scaling.type": "none"}, None),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 2.5}, Linear(factor=2.5)),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 16,
                "scaling.yarn_beta_fast": 24.0,
            },
            Yarn(factor=4.0, original_length=16, beta_fast=24.0),
        ),
    ],
)
def test_gguf_scaling(keys, scaling, tiny_hf, tmp_path, run):
    keys = {f"rope.{key}": value for key, value in keys.items()}
    src = write_gguf(tmp_path / "m.gguf", tiny_hf(), keys=keys)
    run("gguf_to_hf", src, tmp_path / "dst")
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    assert config.rope.scaling == scaling


def test_gguf_in_several_files(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf()
    write_gguf(tmp_path / "m.gguf", tiny, split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    run("gguf_to_hf", parts[0], tmp_path / "dst", "--dtype", "float32")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert "not the first of 3" in refuse("gguf_to_hf", parts[1], tmp_path / "no")
    parts[2].unlink()
    assert "no file" in refuse("gguf_to_hf", parts[0], tmp_path / "no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2', want a model of 'llama'"),
        ({"keys": {"logit_scale": 2.0, "foo": 1}}, "llama.logit_scale = 2.0, llama.fo"),
        ({"keys": {"expert_count": 8}}, "unknown llama.expert_count = 8"),
        ({"keys": {"attention.value_length": 8}}, "value_length is 8, but heads have"),
        ({"keys": {"attention.key_length": [1, 2]}}, "key_length = [1, 2] (want a"),
        ({"keys": {"rope.scaling.type": "su"}}, "rope scaling 'su' with no fields"),
        ({"keys": {"rope.scaling.type": "yarn"}}, "original_context_length"),
        ({"keys": {"rope.scaling.attn_factor": 2.0}}, "attn_factor must be 1"),
        ({"keys": {"vocab_size": 62}}, "found (61, 64), want (62, 64)"),
        ({"extra": {"rope_freqs.weight": np.arange(8.0)}}, "is not of Llama 3's kind"),
        ({"extra": {"blk.0.foo.weight": np.ones(8)}}, "1 unexpected: blk.0.foo.weight"),
        ({"extra": {"x": np.ones(8, np.int8)}}, "x (I8)"),
        ({"weights": {}}, "missing token_embd.weight"),
    ],
)
def test_gguf_refuses(change, message, tiny_hf, tmp_path, refuse):
    extra = change.get("extra", {})
    for name, array in extra.items():
        extra[name] = array if array.dtype == np.int8 else array.astype(np.float32)
    src = write_gguf(tmp_path / "m.gguf", tiny_hf(), **change)
    assert message in refuse("gguf_to_hf", src, tmp_path / "dst")


@pytest.mark.parametrize("keep", [2, 500, -2000])
def test_truncated_gguf(keep, tiny_hf, tmp_path, refuse):
    src = write_gguf(tmp_path / "m.gguf", tiny_hf())
    src.write_bytes(src.read_bytes()[:keep])
    line = refuse("gguf_to_hf", src, tmp_path / "dst")
    assert "m.gguf cannot be read as GGUF: damaged, or another format" in line


def byte_level_vocabulary(pre: str) -> Callable[[gguf.GGUFWriter], None]:
    """A byte-level BPE tokenizer that can merge digits."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    def add(writer: gguf.GGUFWriter) -> None:
        letters = sorted({*bytes_to_unicode().values()})
        tokens = ["<s>", "</s>", *letters, "12", "34", "1234", "Ġ1"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
        writer.add_token_merges(["1 2", "3 4", "12 34", "Ġ 1"])

    return add


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["Ġ", "12", "3", "4"]),
        ("gpt-2", ["Ġ", "1234"]),
        ("viking", None),
    ],
)
def test_gguf_tokenizer_splits_as_the_file_says(pre, pieces, tiny_hf, tmp_path, run):
    tiny = tiny_hf(vocab_size=262)
    src = write_gguf(tmp_path / "m.gguf", tiny, tokenizer=byte_level_vocabulary(pre))
    out = run("gguf_to_hf", src, tmp_path / "dst")
    if pieces is None:
        assert "tokenizer not written" in out
        assert "'viking' is unknown" in out
        assert not (tmp_path / "dst" / "tokenizer.json").exists()
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert tokenizer.tokenize(" 1234") == pieces


# --- flax_msgpack_to_hf --------------------------------------------------------------


def flax_tree(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """FlaxLlama's parameters, path by path: kernels are [in, out]."""
    flat = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight").replace(".", "/")
        if "embed_tokens" in name:
            flat[f"{path}/embedding"] = array
        elif name.endswith(".bias"):
            flat[name.replace(".", "/")] = array
        elif array.ndim == 2:
            flat[f"{path}/kernel"] = np.ascontiguousarray(array.T)
        else:
            flat[f"{path}/weight"] = array
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    return nest({name.replace("/", "."): leaf for name, leaf in flat.items()})


def msgpack_folder(
    folder: Path, tiny: Any, weights: Mapping[str, np.ndarray], shards: bool = False
) -> Path:
    """A folder as transformers 4's FlaxLlamaForCausalLM wrote them."""
    folder.mkdir()
    write_json(folder / "config.json", tiny.config)
    flat = flax_tree(weights)
    pack = flax.serialization.to_bytes
    if not shards:
        (folder / "flax_model.msgpack").write_bytes(pack(nested(flat)))
        return folder
    places = {}
    for number, part in enumerate(halves(flat), 1):
        file = f"flax_model-{number:05}-of-00002.msgpack"
        (folder / file).write_bytes(pack(nested(part)))
        places |= dict.fromkeys(part, file)
    write_json(folder / "flax_model.msgpack.index.json", {"weight_map": places})
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_flax_msgpack(shards, tiny_hf, tmp_path, run):
    tiny = tiny_hf()
    src = msgpack_folder(tmp_path / "src", tiny, tiny.weights, shards)
    run("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)


def test_flax_msgpack_in_bfloat16_and_chunks(tiny_hf, tmp_path, run, monkeypatch):
    tiny = tiny_hf(tied=True)
    weights = bfloat16(tiny.weights)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 5000)
    src = msgpack_folder(tmp_path / "src", tiny, weights)
    assert b"__msgpack_chunked_array__" in (src / "flax_model.msgpack").read_bytes()
    run("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", weights)


def test_flax_msgpack_asks_which_rope_was_meant(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf(rope_parameters=LLAMA3, max_position_embeddings=131072)
    src = msgpack_folder(tmp_path / "src", tiny, tiny.weights)
    line = refuse("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert "always rotated with theta 10000" in line
    run("flax_msgpack_to_hf", src, tmp_path / "config", "--rope", "config")
    assert_logits(tmp_path / "config", tiny.model)
    run("flax_msgpack_to_hf", src, tmp_path / "flax", "--rope", "flax")
    rope = jrope.hf.config_from_hf(read_config(tmp_path / "flax")).rope
    assert rope == jrope.Rope(theta=10000.0, rotary_dim=16)


def test_flax_msgpack_refuses(tiny_hf, tmp_path, refuse):
    tiny = tiny_hf()
    weights = dict(tiny.weights)
    del weights["model.norm.weight"]
    weights["model.layers.0.self_attn.rotary.weight"] = np.ones(3, np.int32)
    src = msgpack_folder(tmp_path / "src", tiny, weights)
    line = refuse("flax_msgpack_to_hf", src, tmp_path / "dst")
    for text in ("model.norm.weight", "self_attn.rotary.weight", "(int32)"):
        assert text in line
    file = src / "flax_model.msgpack"
    file.write_bytes(file.read_bytes()[:-100])
    line = refuse("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert "flax_model.msgpack cannot be read as Flax parameters in msgpack" in line
    file.write_bytes(flax.serialization.msgpack_serialize({"a": {"b": 3, "c": "x"}}))
    assert "a/b, a/c are not arrays" in refuse(
        "flax_msgpack_to_hf", src, tmp_path / "dst"
    )
