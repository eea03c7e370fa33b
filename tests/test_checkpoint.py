"""Loading: bit-equal, cast once, and bounded in memory."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import (
    BF16,
    INDEX,
    KEY,
    assert_same_tensors,
    change,
    set_config,
)
from checkpoint_helpers import folder as folder
from checkpoint_helpers import made as made
from checkpoint_helpers import sharded as sharded
from checkpoint_helpers import tiny as tiny

from jrope.errors import JropeError
from jrope.hf import config_from_hf
from jrope.hf.checkpoint import (
    READERS,
    Tensors,
    _is_finite,
    load,
    open_tensors,
    read_config,
    save,
    write_folder,
)
from jrope.model.config import parameter_shapes
from jrope.tree import flatten

# Loading


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads_what_transformers_wrote(
    made: dict[str, Path], tiny: Any, kind: str
) -> None:
    params, config = load(made[kind])
    assert_same_tensors(flatten(params), tiny.weights)
    assert {n: a.shape for n, a in tiny.weights.items()} == parameter_shapes(config)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert len(list(made["sharded"].glob("*.safetensors"))) > 3


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, BF16], ids=repr)
def test_casts_to_any_spelling_of_a_dtype(folder: Path, tiny: Any, dtype: Any) -> None:
    params = flatten(load(folder, dtype)[0])
    want = {name: array.astype(BF16) for name, array in tiny.weights.items()}
    assert_same_tensors(params, want)


@pytest.mark.parametrize(
    "dtype", ["float64", "int8", "nonsense", jnp.int32, 7], ids=str
)
def test_other_dtypes_are_refused(folder: Path, dtype: Any) -> None:
    with pytest.raises(JropeError, match="want None or one of float32, float16, bf"):
        load(folder, dtype)


def test_a_cast_that_overflows_is_refused(folder: Path) -> None:
    change(folder, lambda t: t.update({KEY: t[KEY] * np.float32(1e8)}))
    load(folder, "bfloat16")
    with pytest.raises(JropeError, match=f"{KEY}: .* too large for float16"):
        load(folder, "float16")


def test_nan_and_infinity_pass(folder: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[KEY] = tensors[KEY].copy()
        tensors[KEY][0, :2] = np.nan, np.inf

    change(folder, edit)
    for dtype in (None, "float16", "bfloat16"):
        row = np.asarray(flatten(load(folder, dtype)[0])[KEY][0, :2], np.float32)
        assert np.isnan(row[0]) and np.isposinf(row[1])


def spoil(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    """Of one tensor, an element in the middle."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        flat = tensors[name].reshape(-1).copy()
        flat[flat.size // 2] = value
        tensors[name] = flat.reshape(tensors[name].shape)

    return edit


@pytest.mark.parametrize(
    ("backend", "quantize", "dtype"),
    [
        ("cpu", None, None),
        ("cpu", "int8", "bfloat16"),
        ("gpu", "int8", None),
        ("gpu", None, "float16"),
    ],
)
def test_check_finite_names_every_bad_tensor(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    quantize: Any,
    dtype: str | None,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    given: dict[str, Any] = {"dtype": dtype, "quantize": quantize}
    change(folder, spoil(KEY, 3e4))  # the largest floats are no infinity, nor their sum
    plain, checked = load(folder, **given)[0], load(folder, **given, check_finite=True)
    jax.tree.map(np.testing.assert_array_equal, checked[0], plain)
    bad = {"model.norm.weight": np.inf, "lm_head.weight": -np.inf, KEY: np.nan}
    for name, value in bad.items():
        change(folder, spoil(name, value))
    load(folder, **given)
    with pytest.raises(
        JropeError, match="NaN or infinity in 3 of 21 tensors: "
    ) as error:
        load(folder, **given, check_finite=True)
    assert str(folder) in str(error.value)
    assert all(name in str(error.value) for name in bad)
    assert "q_proj" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_finite_keeps_nothing(dtype: str) -> None:
    shape = jax.ShapeDtypeStruct((512, 512), dtype)
    memory = _is_finite.lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1024
    largest = jnp.full((512, 512), jnp.finfo(dtype).max, dtype)
    assert _is_finite(largest) and _is_finite(-largest)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):  # XLA's maximum loses the first
        assert not _is_finite(largest.at[5, 7].set(bad))


TABLES = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")


@pytest.mark.parametrize("place", ["model.layers.0.self_attn.", "model.", ""])
def test_tables_of_rotary_embeddings_are_ignored(folder: Path, place: str) -> None:
    found = {f"{place}rotary_emb.{name}": np.zeros(8, np.float16) for name in TABLES}
    change(folder, lambda t: t.update(found))
    assert not {*found} & {*flatten(load(folder)[0])}


def test_other_buffers_are_not(folder: Path) -> None:
    for name in ("model.rotary_emb.scale", "model.xrotary_emb.inv_freq"):
        change(folder, lambda t, name=name: t.update({name: np.zeros(8, np.float16)}))
    message = "2 unexpected: model.rotary_emb.scale, model.xrotary_emb.inv_freq"
    with pytest.raises(JropeError, match=message):
        load(folder)


def list_too(folder: Path, *names: str) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(names, index["weight_map"][KEY])
    path.write_text(json.dumps(index))


def test_an_index_may_list_what_nobody_reads(
    sharded: Path, tiny_hf: Callable[..., Any], tmp_path: Path
) -> None:
    list_too(sharded, *(f"model.layers.0.self_attn.rotary_emb.{n}" for n in TABLES))
    load(sharded)
    tied = tiny_hf(tied=True)
    tied.model.save_pretrained(tmp_path / "tied", max_shard_size="40KB")
    list_too(tmp_path / "tied", "lm_head.weight")
    assert "lm_head" not in load(tmp_path / "tied")[0]
    set_config(tmp_path / "tied", tie_word_embeddings=False)
    with pytest.raises(JropeError, match=r"1 missing: lm_head.weight; tie_word_emb"):
        load(tmp_path / "tied")


def test_a_head_that_repeats_a_tied_embedding_is_accepted(
    tiny_hf: Callable[..., Any], tmp_path: Path
) -> None:
    tied = tiny_hf(tied=True)
    tied.model.save_pretrained(tmp_path)
    table = tied.weights["model.embed_tokens.weight"]
    assert "lm_head" not in load(tmp_path)[0]
    change(tmp_path, lambda t: t.update({"lm_head.weight": table}))
    assert "lm_head" not in load(tmp_path)[0]
    change(tmp_path, lambda t: t.update({"lm_head.weight": np.nextafter(table, 9)}))
    said = r"tie_word_embeddings is true but lm_head.weight differs from model.embed"
    with pytest.raises(JropeError, match=said):
        load(tmp_path)
    change(tmp_path, lambda t: t.update({"lm_head.weight": table.astype(np.float16)}))
    said = (
        r"lm_head.weight is F16 \[61, 64\] and model.embed_tokens.weight F32 \[61, 64\]"
    )
    with pytest.raises(JropeError, match=said):
        load(tmp_path)


def test_generation_config_decides_the_stop_ids(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 7]}')
    assert load(folder)[1].eos_token_id == (5, 7)
    path.write_text('{"eos_token_id": null}')
    assert load(folder)[1].eos_token_id == (2,)
    path.write_text("[1]")
    with pytest.raises(JropeError, match=r"generation_config.json holds a JSON list"):
        load(folder)


def test_progress_counts_every_tensor(folder: Path, tmp_path: Path, tiny: Any) -> None:
    sizes = {name: array.nbytes for name, array in tiny.weights.items()}
    for act in (
        lambda call: load(folder, progress=call),
        lambda call: save(tmp_path / "out", *load(folder), progress=call),
    ):
        seen: list[tuple[str, int]] = []
        act(lambda name, size, seen=seen: seen.append((name, size)))
        assert sorted(seen) == sorted(sizes.items())


def test_tensors_are_read_one_by_one(sharded: Path, tiny: Any) -> None:
    tensors = open_tensors(sharded)
    assert set(tensors.names) == set(tiny.weights)
    assert tensors.shapes[KEY] == (32, 64) and tensors.dtypes[KEY] == "F32"
    for path in sharded.glob("*.safetensors"):  # only one file's data is touched
        if path != tensors.slots[KEY].path:
            path.unlink()
    assert np.array_equal(tensors.read(KEY), tiny.weights[KEY])
    tensors.slots[KEY].path.write_bytes(b"")
    with pytest.raises(JropeError, match="became shorter while it was read"):
        tensors.read(KEY)


def test_reading_ahead_of_an_accelerator_changes_nothing(
    sharded: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    told: list[str] = []
    params, _ = load(sharded, progress=lambda name, _: told.append(name))
    assert_same_tensors(flatten(params), tiny.weights)
    assert sorted(told) == sorted(flatten(params))


def test_reading_ahead_tells_of_a_file_that_shrinks(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    read, reads = Tensors.read, itertools.count()

    def shrink(self: Tensors, *args: Any) -> np.ndarray:
        if next(reads) == 2:
            for path in sharded.glob("*.safetensors"):
                path.write_bytes(b"")
        return read(self, *args)

    monkeypatch.setattr(Tensors, "read", shrink)
    with pytest.raises(JropeError, match="became shorter while it was read"):
        load(sharded)


# Memory

MEMORY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jrope.hf.checkpoint import load, save

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key)) * 1024

jnp.zeros(8).block_until_ready()
load(sys.argv[3])  # libraries and code, once
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
params, config = load(sys.argv[1], sys.argv[2] or None)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(status("VmHWM") - before - size)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
save(sys.argv[1] + "-out", params, config)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def big(
    made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A checkpoint of 300 MB in bfloat16, most of it one tensor."""
    sizes = {"vocab_size": 120_000, "hidden_size": 768, "intermediate_size": 12_000}
    config = {**read_config(made["single"]), **sizes, "tie_word_embeddings": True}
    shapes = parameter_shapes(config_from_hf(config))
    stream = ((name, np.full(shape, 0.5, BF16)) for name, shape in shapes.items())
    folder = tmp_path_factory.mktemp("big") / "model"
    yield write_folder(folder, config, stream)
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("dtype", ["", "float32"], ids=["kept", "cast"])
def test_host_memory_stays_bounded(
    big: Path, made: dict[str, Path], dtype: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(big), dtype, str(made["single"])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    loading, saving = map(int, result.stdout.split())
    print(f"beyond the arrays: load {loading >> 20} MiB, save {saving >> 20} MiB")
    assert loading < 64 * 2**20  # JAX on a CPU takes the array as it was read
    assert saving < 64 * 2**20


@pytest.mark.parametrize(("backend", "readers"), [("cpu", 1), ("gpu", READERS)])
def test_a_copied_host_buffer_is_dropped_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str, readers: int
) -> None:
    """Whoever reads one finds none of their own, and one of each other reader's."""
    import weakref

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    buffers: list[weakref.ref[np.ndarray]] = []
    read = Tensors.read

    def misaligned(self: Tensors, *args: Any) -> np.ndarray:
        assert sum(buffer() is not None for buffer in buffers) < readers
        array = read(self, *args)
        memory = np.empty(array.nbytes + 65, np.uint8)
        start = -memory.ctypes.data % 64 + 1  # no backend can take this over
        copy = memory[start : start + array.nbytes].view(array.dtype)
        copy[:] = array.reshape(-1)
        buffers.append(weakref.ref(memory))
        return copy.reshape(array.shape)

    monkeypatch.setattr(Tensors, "read", misaligned)
    load(folder)
    assert len(buffers) == 21


def test_after_an_error_nothing_more_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers that have begun finish, those that wait in the queue do not begin."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    read, names, told = Tensors.read, list[str](), threading.Event()

    def first_fails(self: Tensors, name: str, *args: Any) -> np.ndarray:
        names.append(name)
        if len(names) == 1:
            raise JropeError("the first")
        told.wait(60)
        return read(self, name, *args)

    shutdown = ThreadPoolExecutor.shutdown

    def telling(self: ThreadPoolExecutor, **how: Any) -> None:
        shutdown(self, wait=False, cancel_futures=how.get("cancel_futures", False))
        told.set()
        shutdown(self)

    monkeypatch.setattr(Tensors, "read", first_fails)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", telling)
    with pytest.raises(JropeError, match="the first"):
        load(folder)
    assert len(names) <= READERS + 1  # whoever failed may have begun another
