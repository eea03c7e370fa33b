"""Flax's msgpack files as arrays by name, read when asked; nothing is unpickled.

A file is one tree of nested dictionaries, or, as EasyLM's StreamingCheckpointer writes
it, a stream of records [names, bytes], the bytes of each being the tree of one array.
"""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from _common import Lazy, check_file, unreadable
from flax.serialization import msgpack_restore

from jrope.errors import JropeError
from jrope.hf.folders import some

CHUNKED = "__msgpack_chunked_array__"
KIND = "Flax parameters in msgpack"
ARRAYS = (1, 3)  # flax's extension types of arrays and of NumPy's scalars
PAIR = 0x92  # msgpack's first byte of an array of two, which starts a stream
LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}  # of msgpack's three kinds of byte strings
NAMES_SIZE = 1 << 16  # more than the names of any array take


@dataclass(frozen=True)
class Part:
    """The bytes of a file that hold one tree, and the names that stand above it."""

    path: Path
    names: tuple[str, ...]
    start: int
    stop: int

    def view(self) -> memoryview:
        """The bytes, mapped into memory."""
        return _mapped(self.path)[self.start : self.stop]


@dataclass(frozen=True)
class Header:
    """What a file says of an array before its data."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Restored:
    """The arrays of one part at a time: a whole tree, or one record of a stream."""

    def __init__(self) -> None:
        self._part: Part | None = None
        self._leaves: dict[Any, Any] = {}

    def read(self, part: Part, names: tuple[str, ...]) -> np.ndarray:
        """One array, as it is stored; reads the part unless it is the last one read."""
        if part != self._part:
            self._part, self._leaves = None, {}  # let go before the next is read
            view: Any = part.view()  # any buffer will do
            tree = msgpack_restore(view)
            self._leaves = dict(_leaves(tree, part.names))
            self._part = part
        return np.asarray(self._leaves[names])


def open_msgpack(restored: Restored, path: Path) -> dict[str, Lazy]:
    """Names joined by "/" -> array of one file; only headers are kept.

    Raises:
      JropeError: a damaged file, or leaves that are no arrays.
    """
    check_file(path)
    try:
        found = {
            names: (part, _header_of(leaf))
            for part in _parts(path)
            for names, leaf in _leaves(_headers(part.view()), part.names)
        }
    except JropeError:
        raise
    except Exception as error:  # whatever a damaged file can provoke
        unreadable(path, KIND, error)
    if wrong := [
        f"{'/'.join(names)} ({header})"
        for names, (_, header) in found.items()
        if not isinstance(header, Header)
    ]:
        raise JropeError(f"{path}: {some(wrong)} are not arrays; want arrays only")
    return {
        "/".join(names): Lazy(
            header.shape, header.dtype.name, partial(restored.read, part, names)
        )
        for names, (part, header) in found.items()
        if isinstance(header, Header)
    }


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _parts(path: Path) -> Iterator[Part]:
    """The records of a stream, or the whole file."""
    view = _mapped(path)
    if view[0] != PAIR:
        yield Part(path, (), 0, len(view))
        return
    part = Part(path, (), 0, 0)
    while part.stop < len(view):
        part = _record(path, view, part.stop)
        yield part


def _record(path: Path, view: memoryview, start: int) -> Part:
    """The record that starts there."""
    unpacker = msgpack.Unpacker(max_buffer_size=NAMES_SIZE)
    unpacker.feed(view[start : start + NAMES_SIZE])
    names: Any = ()
    try:
        size, names = unpacker.read_array_header(), unpacker.unpack()
        content = start + unpacker.tell()
        width = LENGTH_BYTES.get(view[content])
        if size != 2 or width is None or not isinstance(names, list):
            raise ValueError(f"at byte {start} is no record [names, bytes]")
        content += 1 + width
        stop = content + int.from_bytes(view[content - width : content], "big")
    except (msgpack.OutOfData, IndexError):
        stop = content = len(view) + 1
    names = tuple(str(name) for name in names)
    if stop > len(view):
        raise JropeError(
            f"{path} ends at byte {len(view)}, within the record of "
            f"{'/'.join(names) or 'another array'}; download it again"
        )
    return Part(path, names, content, stop)


def _headers(view: memoryview) -> Any:
    """The tree with headers in place of arrays."""
    return msgpack.unpackb(view, ext_hook=_header, strict_map_key=False)


def _header(code: int, data: bytes) -> Header:
    if code not in ARRAYS:
        raise ValueError(f"extension type {code}, want {ARRAYS}, flax's arrays")
    shape, name, content = msgpack.unpackb(data, raw=True)
    header = Header(tuple(shape), np.dtype(name.decode()))
    _check_size(header, len(content))
    return header


def _check_size(header: Header, found: int) -> None:
    wanted = math.prod(header.shape) * header.dtype.itemsize
    if found != wanted:
        raise ValueError(
            f"{header.dtype}{[*header.shape]} has {found} bytes, want {wanted}"
        )


def _leaves(tree: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    if not isinstance(tree, dict) or CHUNKED in tree:
        yield names, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*names, str(key)))


def _header_of(leaf: Any) -> Header | str:
    """The header of a leaf, or its type; arrays beyond 1 GiB come in chunks."""
    if isinstance(leaf, dict):
        shape = tuple(leaf["shape"][str(axis)] for axis in range(len(leaf["shape"])))
        chunks = [*leaf["chunks"].values()]
        whole = Header(shape, chunks[0].dtype)
        sizes = (math.prod(chunk.shape) * chunk.dtype.itemsize for chunk in chunks)
        _check_size(whole, sum(sizes))
        return whole
    return leaf if isinstance(leaf, Header) else type(leaf).__name__
