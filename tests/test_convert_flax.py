"""hf_to_flax and flax_to_hf: there and back, bit for bit."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from convert_helpers import LLAMA3, as_bits, assert_holds, bfloat16, write_json
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import refuse as refuse
from convert_helpers import run as run

import jrope
from jrope.hf.checkpoint import read_config
from jrope.tree import flatten, nest


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
    assert "give --force" in refuse("hf_to_flax", src, dst)
    run("hf_to_flax", src, dst, "--force")
    assert "holds SRC" in refuse("flax_to_hf", dst, dst, "--force")


def test_flax_checkpoint_of_other_devices(tiny_hf, tmp_path, run):
    tiny = tiny_hf()
    write_json(tmp_path / "config.json", tiny.config)
    np.savez(tmp_path / "weights.npz", **tiny.weights)
    program = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from pathlib import Path
from jrope.tree import nest
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
