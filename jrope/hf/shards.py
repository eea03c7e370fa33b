"""Writing safetensors folders in one pass, one tensor in memory, whole or not at all.

A safetensors file begins with a header that lists all its tensors, which are not known
before the last one came.  So a shard's data goes to scratch files first and is then
copied behind its header.  Tensors of four bytes an element lie before those of two:
readers map them in place, so each must begin at a multiple of its element's size.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from jrope.errors import JropeError
from jrope.hf.folders import INDEX, SINGLE
from jrope.hf.tensors import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 16 * 2**20


class ShardWriter:
    """Shards of one folder, a context: call `add` for each tensor, then `finish`.

    Attributes:
      shapes: of the tensors so far, by name.
    """

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._folder, self._limit = folder, max_shard_size
        self._entries: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
        self._scratch: dict[int, BinaryIO] = {}
        self._shards: list[list[str]] = []
        self._size = self._total = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor to the current shard, or to a new one if it would overflow.

        Raises:
          JropeError: a name given twice, or a dtype that a checkpoint does not hold.
        """
        if name in self.shapes:
            raise JropeError(f"tensor {name} is given twice")
        if array.dtype not in CODES:
            wanted = ", ".join(map(str, CODES))
            raise JropeError(f"{name}: dtype {array.dtype}, want one of {wanted}")
        if self._entries and self._size + array.nbytes > self._limit:
            self._close_shard()
        size = array.dtype.itemsize
        if size not in self._scratch:
            self._scratch[size] = (self._folder / f"scratch{size}").open("w+b")
        self._scratch[size].write(_bytes(array))
        self._entries[name] = (array.dtype, array.shape, array.nbytes)
        self.shapes[name] = array.shape
        self._size += array.nbytes
        self._total += array.nbytes

    def finish(self) -> None:
        """Write the last shard, the names that depend on their number, the index."""
        self._close_shard()
        count = len(self._shards)
        if count == 1:
            os.replace(self._part(1), self._folder / SINGLE)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05}-of-{count:05}.safetensors"
            os.replace(self._part(number), self._folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": places}
        write_json(self._folder / INDEX, index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._scratch.values():
            file.close()

    def _part(self, number: int) -> Path:
        return self._folder / f"part{number}"

    def _close_shard(self) -> None:
        sizes = sorted(self._scratch, reverse=True)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for size in sizes:
            for name, (dtype, shape, nbytes) in self._entries.items():
                if dtype.itemsize == size:
                    place = [end, end + nbytes]
                    header[name] = {"dtype": CODES[dtype], "shape": shape}
                    header[name]["data_offsets"] = place
                    end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._shards.append([*self._entries])
        with self._part(len(self._shards)).open("wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            for size in sizes:
                with self._scratch.pop(size) as scratch:
                    scratch.seek(0)
                    shutil.copyfileobj(scratch, shard, _CHUNK)
                os.remove(self._folder / f"scratch{size}")
        self._entries, self._size = {}, 0


def most_bytes(total: int, max_shard_size: int) -> int:
    """Bytes on the disk at the worst moment, when a shard stands beside its scratch."""
    full, rest = divmod(total, max_shard_size)
    return max((full + 1) * max_shard_size if full else 0, total + rest)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_json(path: Path, value: object) -> None:
    """Write JSON as transformers does, two spaces and a final newline."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", "utf-8")
