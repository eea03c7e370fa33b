"""A folder that takes another one's place, whole or not at all, even after a kill.

The new folder is filled beside its place as `.NAME.MARK.tmp`, synced, and exchanged
with the old one in one step (Linux's renameat2).  A file system that has no exchange
takes two renames, between which the old folder is `.NAME.MARK.old`; `recover` puts it
back after a process that died there.

Whoever fills a folder holds its lock (flock), which the system drops when the process
ends, however it ends: a `.tmp` that nobody holds was left by a dead one, and the next
save of the same target removes it.  The lock of the parent orders those who look at
leftovers and those who make them.  Without locks nothing is known to be dead: nothing
is removed.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Generator
from pathlib import Path

from jrope.errors import JropeError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of <fcntl.h> and <linux/fs.h>
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(target: Path, needed: int = 0) -> Generator[Path]:
    """A fresh folder to fill, which takes target's place at the end, or vanishes.

    Args:
      target: a path without symbolic links; the folder need not exist.
      needed: bytes that will be written, as far as they are known.

    Raises:
      JropeError: less than `needed` is free, or the disk is full before the end.
    """
    fresh, handle = _claim(target, needed)
    try:
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            _sync(path)
        _swap(fresh, target)
        _sync(target.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        files = [path for path in fresh.rglob("*") if path.is_file()]
        written = sum(path.stat().st_size for path in files)
        why = f"{error.strerror} after {written:,} bytes"
        raise _no_room(target, why, needed) from error
    finally:  # unfinished, or what it replaced
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(handle)


def recover(target: Path) -> None:
    """Put back what a process had moved aside when it died before its second rename."""
    if not _is_empty(target) or not _leftovers(target, "old"):
        return
    with _locked(target.parent):
        olds = _leftovers(target, "old")
        if olds and _is_empty(target):
            os.replace(max(olds, key=lambda old: old.stat().st_ctime_ns), target)


def _claim(target: Path, needed: int) -> tuple[Path, int]:
    """A new folder beside target, and the handle that holds its lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(target, "tmp")
    with _locked(target.parent):  # between mkdir and flock it would look dead
        for old in [] if _is_empty(target) else _leftovers(target, "old"):
            shutil.rmtree(old, ignore_errors=True)
        for left in _leftovers(target, "tmp"):
            _remove_if_dead(left)
        if needed > shutil.disk_usage(target.parent).free:
            raise _no_room(target, "the disk is too full", needed)
        fresh.mkdir()
        handle = os.open(fresh, os.O_RDONLY)
        _lock(handle)
    return fresh, handle


def _remove_if_dead(left: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # its owner was about to remove it
        handle = os.open(left, os.O_RDONLY)
        try:
            if _lock(handle):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(handle)


def _swap(fresh: Path, target: Path) -> None:
    """Put fresh into target's place; what was there is at `fresh` then, or gone."""
    if not target.exists():
        os.replace(fresh, target)
        return
    if _exchange(fresh, target):
        return
    old = _beside(target, "old")
    with _locked(target.parent):
        os.replace(target, old)
        try:
            os.replace(fresh, target)
        except BaseException:
            os.replace(old, target)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    a, b = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE) == 0


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.{kind}"


def _is_empty(target: Path) -> bool:
    """Whether there is no such folder, or nothing in it."""
    try:
        return not any(target.iterdir())
    except OSError as error:
        return isinstance(error, FileNotFoundError)


def _leftovers(target: Path, kind: str) -> list[Path]:
    """The folders beside target that `_beside` has named."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{kind}")
    try:
        return [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]
    except OSError:  # there is no such folder, or it may not be looked into
        return []


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Wait for a folder's lock and hold it, where there are locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool = False) -> bool:
    """Whether the lock is held now, until the handle is closed."""
    import fcntl  # what only reads works without it

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another process has it, or this file system has none
        return False
    return True


def _no_room(target: Path, why: str, needed: int) -> JropeError:
    free = shutil.disk_usage(target.parent).free
    wanted = f"it needs {needed:,} bytes, " if needed else ""
    return JropeError(
        f"cannot write {target}: {why}; {wanted}{free:,} bytes are free; make room, "
        "or save elsewhere"
    )


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
