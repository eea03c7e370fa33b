"""Locks of files, which end with the process that has them."""

from pathlib import Path
from typing import BinaryIO

from jrope.errors import JropeError


def lock(file: BinaryIO, path: Path) -> None:
    """Lock an open file, where the system and its file system have locks.

    Raises:
      JropeError: another process has it; `path` is named.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix: nobody keeps two runs apart
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JropeError(f"{path}: another run writes to it") from None
    except OSError:  # a file system without locks
        return
