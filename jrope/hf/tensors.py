"""Folders of safetensors files: their headers checked, then one tensor at a time.

The format: 8 bytes, the header's length (little-endian); the header, a JSON object
`{name: {"dtype", "shape", "data_offsets"}}`; the tensors' bytes, one after another.  A
sharded folder has an index, `{"weight_map": {name: file}}`.

Everything that a header can get wrong is found before a byte of data is read.  Tensors
are read by plain reads, not mapped, so that memory is what is asked for and no more.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from jrope.errors import JropeError
from jrope.hf.folders import (
    INDEX,
    PICKLE,
    SINGLE,
    TABLES,
    other_weights,
    parse_json,
    read_json,
    some,
)

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
PACKED: dict[str, np.dtype[Any]] = {  # of quantised checkpoints, read by `raw` alone
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
}
# Bytes per element, those included that we name in errors but do not read.
_SIZES = {
    **{code: dtype.itemsize for code, dtype in DTYPES.items()},
    **{"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
_CHUNK = 16 * 2**20
_LONGEST_HEADER = 100 * 10**6  # the reference implementation's limit

# Listed in an index, perhaps, and in no shard: a tied head is, and nobody reads tables.
# A head that is not tied is then missing among the tensors.
_UNUSED = re.compile(rf"lm_head\.weight|{TABLES.pattern}")

_FOREIGN = {  # how a file begins that is no safetensors -> what it is
    rb"version https://git-lfs": "a git-lfs pointer; run 'git lfs pull'",
    rb"PK\x03\x04": f"a zip or PyTorch pickle, not safetensors; {PICKLE}",
    rb"\x80[\x02-\x05]": f"a pickle, not safetensors; {PICKLE}",
    rb"GGUF": "GGUF, not safetensors; convert it with convert/gguf_to_hf.py",
    rb"lmgg|fmgg|tjgg": "GGML, which came before GGUF; nothing here reads it",
    rb"\x89HDF": "HDF5, such as Keras writes, not safetensors; nothing here reads it",
    rb"([\x81-\x8f]|\xde..)[\xa1-\xbf\xd9]": "msgpack, such as Flax writes, not "
    "safetensors; convert it with convert/flax_msgpack_to_hf.py",
    rb"\x92[\x91-\x9f]": "a msgpack stream, such as EasyLM writes, not safetensors; "
    "the scripts in convert/ tell what they read",
    rb"\s*<": "a page of HTML or XML, not weights; download it again",
    rb"\s*\{": "JSON, not weights; download it again",
    rb"\x1f\x8b|\x28\xb5\x2f\xfd|\xfd7zXZ": "compressed, not safetensors; unpack it",
}


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: dtype code, shape, file, and its bytes in that file."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


class Tensors:
    """The tensors of a folder: names, shapes, dtypes; data only when asked.

    Attributes:
      slots: name -> where it lies.
    """

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        self.slots = dict(slots)

    @property
    def names(self) -> list[str]:
        """All names, in the files' order."""
        return list(self.slots)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: slot.shape for name, slot in self.slots.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Name -> dtype code, such as "BF16"; those in DTYPES can be read."""
        return {name: slot.dtype for name, slot in self.slots.items()}

    def dtype(self, name: str, wanted: np.dtype[Any] | None = None) -> np.dtype[Any]:
        """That of what `read` gives."""
        return wanted or DTYPES[self.slots[name].dtype]

    def read(
        self,
        name: str,
        dtype: np.dtype[Any] | None = None,
        part: tuple[slice, ...] | None = None,
    ) -> np.ndarray:
        """Read one tensor into memory of its own, cast piece by piece.

        Args:
          name: one of `names`.
          dtype: float32, float16 or bfloat16; None keeps the file's.
          part: a range for each of its one or two axes: no other bytes are read;
            None: all of it.

        Raises:
          JropeError: a dtype that is not read, a value too large for `dtype`, or a
            file that changed since its header was read.
        """
        slot = self.slots[name]
        if slot.dtype not in DTYPES:
            wanted = ", ".join(DTYPES)
            raise JropeError(f"{name}: dtype {slot.dtype}, want one of {wanted}")
        stored = DTYPES[slot.dtype]
        shape, runs = _runs(slot, stored.itemsize, part)
        out = _aligned(shape, dtype or stored)
        flat, done = out.reshape(-1), 0
        if out.dtype == stored:
            raw = flat.view(np.uint8)
            with slot.path.open("rb", buffering=0) as file:
                for start, stop in runs:
                    _fill(file, start, raw[done : done + stop - start])
                    done += stop - start
            return out
        for piece in _pieces(slot.path, runs):
            values = piece.view(stored)
            with np.errstate(all="ignore"):  # too large is found below
                flat[done : done + values.size] = values
                check_range(name, values, flat[done : done + values.size])
            done += values.size
        return out

    def raw(self, name: str) -> np.ndarray:
        """Read one tensor as it is stored, of a dtype in DTYPES or PACKED."""
        slot = self.slots[name]
        out = _aligned(slot.shape, {**DTYPES, **PACKED}[slot.dtype])
        with slot.path.open("rb", buffering=0) as file:
            _fill(file, slot.start, out.reshape(-1).view(np.uint8))
        return out

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal bit for bit; reads both piece by piece."""
        a, b = self.slots[first], self.slots[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pieces = (_pieces(x.path, [(x.start, x.stop)]) for x in (a, b))
        pairs = zip(*pieces, strict=True)
        return all(np.array_equal(x, y) for x, y in pairs)


def open_tensors(folder: str | os.PathLike[str]) -> Tensors:
    """Read and check the headers of a folder's safetensors files.

    Args:
      folder: holds model.safetensors, or shards and model.safetensors.index.json.

    Raises:
      JropeError: no such files, or damaged, contradictory or foreign ones.
    """
    folder = Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise JropeError(
            f"{folder} has both {SINGLE} and {INDEX}; remove the stale one"
        )
    if index.exists():
        return Tensors(_sharded(index))
    if not single.exists() and not single.is_symlink():
        raise JropeError(f"no {SINGLE} in {folder}{other_weights(folder)}")
    return Tensors(_header(inside(folder, SINGLE, folder)))


def open_file(folder: Path, name: str) -> Tensors:
    """`open_tensors` of one file of a folder, whatever its name."""
    if not (folder / name).exists():
        raise JropeError(f"no {name} in {folder}; pickles (.bin) are not read")
    return Tensors(_header(inside(folder, name, folder)))


def inside(folder: Path, name: str, where: Path) -> Path:
    """Return folder / name, a file that must not lead out of the folder.

    Symbolic links may lead to the blobs beside the snapshots of the hub's own cache.
    """
    path, root = folder / name, folder.resolve()
    roots = [root]
    roots += [p.parent / "blobs" for p in root.parents if p.name == "snapshots"]
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise JropeError(
            f"{where}: {name!r} leads out of the folder, to {target}; put the file "
            "itself there (a copy or a hard link), or give the folder that holds it"
        )
    if not target.is_file():
        link = f": it is a link to {target}, which is not there"
        raise JropeError(f"{where}: {name!r} is missing{link * path.is_symlink()}")
    return path


def _sharded(index: Path) -> dict[str, Slot]:
    places: dict[str, Any] = read_json(index).get("weight_map") or {}
    listed = [*places.values()] if isinstance(cast(Any, places), dict) else []
    if not listed or not all(isinstance(file, str) for file in listed):
        raise JropeError(f"{index}: weight_map must map tensor names to file names")
    slots: dict[str, Slot] = {}
    problems: list[str] = []
    for file in dict.fromkeys(places.values()):
        try:
            header = _header(inside(index.parent, file, index))
        except JropeError as error:
            problems.append(str(error))
            continue
        for name, slot in header.items():
            if places.get(name) == file:
                slots[name] = slot
            else:
                listed = f"in {places[name]}" if name in places else "nowhere"
                problems.append(f"{file} holds {name}, which {INDEX} lists {listed}")
        lacking = [n for n, f in places.items() if f == file and n not in header]
        if lacking := [n for n in lacking if not _UNUSED.fullmatch(n)]:
            problems.append(f"{file} lacks {some(lacking)}, which {INDEX} lists there")
    if problems:
        raise JropeError(f"{index.parent}: {some(problems, '; ')}")
    return slots


def _header(path: Path) -> dict[str, Slot]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        if size == 0:
            raise JropeError(f"{path} is empty; download it again")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > _LONGEST_HEADER or start[8:9] not in (b"{", b""):
            raise JropeError(f"{path} is {_what_it_is(start)}")
        if 8 + length > size:
            raise JropeError(
                f"{path} is truncated: its header has {length} bytes, the file {size}; "
                "download it again"
            )
        file.seek(8)
        entries = parse_json(file.read(length), f"the header of {path}")
    entries.pop("__metadata__", None)
    slots = {n: _slot(path, n, entry, 8 + length) for n, entry in entries.items()}
    _check_layout(path, slots, 8 + length, size)
    return slots


def _what_it_is(start: bytes) -> str:
    for magic, what in _FOREIGN.items():
        if re.match(magic, start, re.DOTALL):
            return what
    return "not a safetensors file, which begins with the length of its header"


def _slot(path: Path, name: str, entry: Any, base: int) -> Slot:
    try:
        dtype, shape, (start, stop) = (
            entry[key] for key in ("dtype", "shape", "data_offsets")
        )
        numbers = [*shape, start, stop]
    except (KeyError, TypeError, ValueError):
        raise JropeError(f"{path}: the header's entry for {name} is garbage") from None
    whole = all(type(n) is int and n >= 0 for n in numbers) and isinstance(dtype, str)
    if not whole or start > stop:
        raise JropeError(f"{path}: the header's entry for {name} is garbage: {entry}")
    wanted = math.prod(shape) * _SIZES.get(dtype, 0)
    if dtype in _SIZES and stop - start != wanted:
        raise JropeError(
            f"{path}: {name} has {stop - start} bytes, want {wanted} for {dtype} "
            f"{shape}"
        )
    return Slot(dtype, tuple(shape), path, base + start, base + stop)


def _check_layout(path: Path, slots: Mapping[str, Slot], base: int, size: int) -> None:
    end, last = base, "the header"
    for name, slot in sorted(
        slots.items(), key=lambda item: (item[1].start, item[1].stop)
    ):
        if slot.start != end:
            fault = "overlaps" if slot.start < end else "leaves a gap after"
            raise JropeError(f"{path}: {name} {fault} {last}; the file is damaged")
        end, last = slot.stop, name
    if end > size:
        raise JropeError(
            f"{path} is truncated: its header promises {end} bytes, the file has "
            f"{size}; download it again"
        )
    if end < size:
        raise JropeError(f"{path}: {size - end} bytes follow the last tensor, {last}")


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Memory that JAX on a CPU takes over as it is: at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _runs(
    slot: Slot, itemsize: int, part: tuple[slice, ...] | None
) -> tuple[tuple[int, ...], Sequence[tuple[int, int]]]:
    """The shape of a part of a tensor, and the ranges of bytes that hold it."""
    whole = tuple(map(slice, slot.shape))
    ends = [x.indices(n) for x, n in zip(part or whole, slot.shape, strict=True)]
    shape = tuple(stop - start for start, stop, _ in ends)
    if shape == slot.shape:
        return shape, [(slot.start, slot.stop)]
    width = math.prod(slot.shape[1:])  # of a row, which stands in one piece
    rows = range(*ends[0])
    if shape[1:] == slot.shape[1:]:
        first, last = (slot.start + n * width * itemsize for n in (ends[0][:2]))
        return shape, [(first, last)]
    left, right, _ = ends[1]
    starts = (slot.start + row * width * itemsize for row in rows)
    return shape, [(n + left * itemsize, n + right * itemsize) for n in starts]


def _pieces(path: Path, runs: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Ranges of bytes, uint8, in pieces of a whole number of elements."""
    longest = max((stop - start for start, stop in runs), default=0)
    buffer = np.empty(min(_CHUNK, longest), np.uint8)
    with path.open("rb", buffering=0) as file:
        for start, stop in runs:
            for at in range(start, stop, _CHUNK):
                piece = buffer[: min(_CHUNK, stop - at)]
                _fill(file, at, piece)
                yield piece


def _fill(file: FileIO, start: int, out: np.ndarray) -> None:
    """The file's bytes from `start` on, as many as `out` (uint8) holds."""
    file.seek(start)
    filled = 0
    while filled < out.size:
        count = file.readinto(out.data[filled:])
        if not count:
            raise JropeError(f"{file.name} became shorter while it was read")
        filled += count


def check_range(name: str, values: np.ndarray, narrow: np.ndarray) -> None:
    """Raise a JropeError for finite values that became infinite in `narrow`."""
    if values.dtype == narrow.dtype or not np.isinf(narrow).any():
        return
    lost = values[np.isinf(narrow) & np.isfinite(values)]
    if lost.size:
        raise JropeError(
            f"{name}: {lost[0]} is too large for {narrow.dtype}; ask for float32, or "
            "None to keep the file's dtype"
        )
