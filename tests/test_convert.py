"""What all scripts of convert/ share: help, one-line errors, whole targets."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from convert_helpers import CONVERT, bin_folder
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import refuse as refuse
from convert_helpers import run as run

from jrope.hf.checkpoint import open_tensors

SCRIPTS = sorted(path.stem for path in CONVERT.glob("[!_]*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_itself(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("SRC", "DST", "--force", "--dtype"):
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
    assert "give --force" in refuse("pytorch_bin_to_hf", src, dst)
    assert (dst / "model.safetensors").stat().st_mtime_ns == before
    run("pytorch_bin_to_hf", src, dst, "--force", "--dtype", "bfloat16")
    assert open_tensors(dst).dtypes["model.norm.weight"] == "BF16"
    (dst / "diary.txt").write_text("mine")
    assert "diary.txt" in refuse("pytorch_bin_to_hf", src, dst, "--force")
    assert "holds SRC" in refuse("pytorch_bin_to_hf", src, src, "--force")
    assert "holds SRC" in refuse("pytorch_bin_to_hf", src, tmp_path, "--force")


def test_a_full_disk_is_told_before_anything_is_written(
    tiny_hf, tmp_path, refuse, monkeypatch
):
    """As bfloat16 it would fit, as the float32 that will be written it does not."""
    src = bin_folder(tmp_path / "src", tiny_hf())
    free = sum(array.nbytes for array in tiny_hf().weights.values()) * 3 // 2
    monkeypatch.setattr(
        "jrope.hf.replacing.shutil.disk_usage", lambda _: SimpleNamespace(free=free)
    )
    said = refuse("pytorch_bin_to_hf", src, tmp_path / "out")
    assert f"{free:,} bytes are free; make room" in said


def test_interruption_leaves_nothing(tiny_hf, tmp_path, capsys, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    src = bin_folder(tmp_path / "src", tiny_hf())
    script = importlib.import_module("pytorch_bin_to_hf")
    monkeypatch.setattr("_common._stream", stop)
    assert script.main([str(src), str(tmp_path / "dst")]) == 130
    assert "nothing written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
