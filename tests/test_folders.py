"""Which folder is read, from the hub too, and which may be written over."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import KEY, SINGLE
from checkpoint_helpers import folder as folder
from checkpoint_helpers import made as made
from checkpoint_helpers import tiny as tiny

from jrope.errors import JropeError
from jrope.hf.checkpoint import load, save
from jrope.tree import flatten

# The hub


def test_hub_ids_are_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        asked.update(repo=repo, **kwargs)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    params, _ = load("owner/name", revision="v1")
    assert KEY in flatten(params)
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_that_does_not_answer_is_one_clear_error() -> None:
    with pytest.raises(JropeError, match=r"no folder 'owner/name'.*hub.*v9"):
        load("owner/name", revision="v9")  # the tests run with HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "../x"])
def test_paths_that_do_not_exist(name: str) -> None:
    with pytest.raises(JropeError, match=r"no folder .* is not a hub id"):
        load(name)


def test_a_file_or_a_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(JropeError, match=r"model.safetensors is a file; give the fol"):
        load(folder / SINGLE)
    (folder / "model.gguf").touch()
    with pytest.raises(JropeError, match=r"is a file; convert it with convert/gguf"):
        load(folder / "model.gguf")
    with pytest.raises(JropeError, match="revision is for hub ids"):
        load(folder, revision="main")


def test_the_hub_cache_links_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert KEY in flatten(load(snapshot)[0])
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(folder / SINGLE)
    with pytest.raises(JropeError, match="leads out of the folder"):
        load(snapshot)


def test_a_model_in_a_folder_of_a_cached_repository(
    folder: Path, tmp_path: Path
) -> None:
    inner = tmp_path / "models--a--b" / "snapshots" / "0123" / "small" / "hf"
    blobs = tmp_path / "models--a--b" / "blobs"
    inner.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (inner / path.name).symlink_to(f"../../../../blobs/blob-{path.name}")
    (tmp_path / "link").symlink_to(inner)
    for place in (inner, tmp_path / "link"):
        assert KEY in flatten(load(place)[0])
    (inner / SINGLE).unlink()
    (inner / SINGLE).symlink_to(f"../../../../refs/{SINGLE}")
    with pytest.raises(JropeError, match="leads out of the folder"):
        load(inner)


# Folders that hold something else


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", ".git", "x.bin"])
def test_foreign_files_are_not_lost(folder: Path, name: str) -> None:
    (folder / name).write_text("precious")
    with pytest.raises(JropeError, match=f"holds .*{name}.*would be lost"):
        save(folder, *load(folder))
    assert (folder / name).read_text() == "precious"


def test_a_folder_of_weights_without_config_is_not_ours(folder: Path) -> None:
    params, config = load(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").unlink()
    with pytest.raises(JropeError, match=r"holds model.safetensors, which would be"):
        save(folder, params, config)


def test_a_file_is_not_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JropeError, match="file is a file; give a folder's name"):
        save(tmp_path / "file", *load(folder))


def test_extra_files_even_of_the_folder_itself(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("words")
    extras = [p for p in folder.iterdir() if p.name not in ("config.json", SINGLE)]
    save(folder, *load(folder), extra_files=extras)
    assert (folder / "tokenizer.json").read_text() == "words"
    load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.json", "absent.json is not a file"),
        ("config.json", "would be written twice"),
        (SINGLE, "would be written twice"),
    ],
)
def test_bad_extra_files(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    params, config = load(folder)
    with pytest.raises(JropeError, match=message):
        save(tmp_path / "out", params, config, extra_files=[folder / name])
