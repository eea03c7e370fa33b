"""A folder takes another one's place whole; killed processes leave nothing behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jrope.errors import JropeError
from jrope.hf import replacing as module
from jrope.hf.folders import check_target, find_folder
from jrope.hf.replacing import recover, replacing

# A process that prints where it is, and waits there or kills itself.
CHILD = """
import os, signal, sys
from pathlib import Path
from jrope.hf import replacing

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def stop(*_):
    print("here", flush=True)
    sys.stdin.read()

target, renames, where = Path(sys.argv[1]), sys.argv[2] == "renames", sys.argv[3]
if renames:
    replacing._exchange = lambda *_: False
if where == "between":
    replace = os.replace
    os.replace = lambda *a: (replace(*a), die()) if a[0] == target else replace(*a)
if where == "after":
    replacing.shutil.rmtree = die
with replacing.replacing(target) as fresh:
    (fresh / "config.json").write_text("new")
    if where == "filling":
        stop()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []

    def run(target: Path, how: str, where: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", CHILD, str(target), how, where]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        children.append(subprocess.Popen(words, text=True, **pipes))
        return children[-1]

    yield run
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    return tmp_path / "model"


def write(target: Path, text: str = "next") -> None:
    with replacing(target) as fresh:
        (fresh / "config.json").write_text(text)


def content(target: Path) -> str:
    return (target / "config.json").read_text()


def names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def kinds(target: Path) -> list[str]:
    """What lies beside the target."""
    return [name.rsplit(".")[-1] for name in names(target) if name != target.name]


def assert_killed(child: subprocess.Popen[str]) -> None:
    assert child.wait(60) == -signal.SIGKILL


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_exchange", lambda *_: False)


# Kills


def test_only_what_a_dead_process_left_is_removed(
    target: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    child = start(target, "exchange", "filling")
    assert child.stdout is not None and child.stdout.readline() == "here\n"
    write(target)
    assert content(target) == "next" and kinds(target) == ["tmp"]
    child.kill()
    assert_killed(child)
    assert kinds(target) == ["tmp"]
    write(target, "last")
    assert content(target) == "last" and names(target) == ["model"]


@pytest.mark.parametrize("how", ["load", "save"])
def test_a_kill_between_two_renames_is_repaired(
    target: Path, start: Callable[..., subprocess.Popen[str]], how: str
) -> None:
    assert_killed(start(target, "renames", "between"))
    assert not target.exists() and sorted(kinds(target)) == ["old", "tmp"]
    if how == "load":
        assert find_folder(target) == target
        assert content(target) == "old" and kinds(target) == ["tmp"]
    (target.parent / "extra").write_text("")
    check_target(target, set())
    assert content(target) == "old"
    write(target)
    assert content(target) == "next" and names(target) == ["extra", "model"]


@pytest.mark.skipif(sys.platform != "linux", reason="no exchange")
@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_a_kill_after_the_new_one_is_there(
    target: Path, start: Callable[..., subprocess.Popen[str]], how: str
) -> None:
    assert_killed(start(target, how, "after"))
    assert content(target) == "new" and len(kinds(target)) == 1
    assert find_folder(target) == target and content(target) == "new"
    write(target)
    assert content(target) == "next" and names(target) == ["model"]


# The exchange


@pytest.mark.skipif(sys.platform != "linux", reason="no exchange")
def test_the_exchange_leaves_no_moment_without_a_folder(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", pytest.fail)
    write(target)
    assert content(target) == "next" and names(target) == ["model"]


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_system_without_the_exchange_renames_twice(
    target: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    class OldLibrary:
        def renameat2(self, *_: Any) -> int:
            return -1  # EINVAL, ENOSYS, EOPNOTSUPP

    monkeypatch.setattr(module.ctypes, "CDLL", lambda _: OldLibrary())
    monkeypatch.setattr(sys, "platform", platform)
    write(target)
    assert content(target) == "next" and names(target) == ["model"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_one(
    target: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    no_exchange(monkeypatch)
    replace, calls = os.replace, list[Any]()

    def flaky(*args: Any) -> None:
        calls.append(args)
        if len(calls) == failing:
            raise OSError("disk on fire")
        replace(*args)

    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(OSError, match="disk on fire"):
        write(target)
    assert content(target) == "old" and names(target) == ["model"]


# What is not ours


@pytest.mark.parametrize(
    "name",
    [
        ".model.backup.tmp",
        ".model2.01234567.tmp",
        "model.01234567.tmp",
        ".x.01234567.old",
    ],
)
def test_folders_that_only_look_alike_stay(target: Path, name: str) -> None:
    (target.parent / name).mkdir()
    write(target)
    assert names(target) == sorted([name, "model"])


def test_without_locks_nothing_is_known_to_be_dead(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (target.parent / ".model.01234567.tmp").mkdir()
    write(target)
    assert content(target) == "next" and kinds(target) == ["tmp"]


def test_the_newest_one_is_put_back_in_place_of_nothing_only(target: Path) -> None:
    for mark, text in (("0" * 8, "older"), ("1" * 8, "newer")):
        old = target.parent / f".model.{mark}.old"
        old.mkdir()
        (old / "config.json").write_text(text)
    recover(target)
    assert content(target) == "old"
    shutil.rmtree(target)
    target.mkdir()
    recover(target)
    assert content(target) == "newer"
    recover(target.parent / "absent" / "model")


# A full disk


def test_too_little_space_is_found_first(target: Path) -> None:
    with pytest.raises(JropeError) as error, replacing(target, 10**18):
        pytest.fail("it began")
    said = str(error.value)
    assert f"cannot write {target}" in said and f"needs {10**18:,} bytes, " in said
    assert f"{shutil.disk_usage(target).free:,}"[:4] in said and "are free" in said
    assert content(target) == "old" and names(target) == ["model"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_on_the_way(target: Path, code: int) -> None:
    words = f"cannot write {target}: {os.strerror(code)} after 1,500 bytes; it needs "
    with pytest.raises(JropeError, match=words), replacing(target, 2000) as fresh:
        (fresh / "scratch").write_bytes(bytes(1500))
        raise OSError(code, os.strerror(code))
    assert content(target) == "old" and names(target) == ["model"]
    with pytest.raises(OSError, match="Input/output error"), replacing(target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
