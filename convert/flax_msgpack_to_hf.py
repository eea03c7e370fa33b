"""flax_model.msgpack of transformers 4's FlaxLlama to a Hugging Face folder.

Kernels are [in, out] there and are transposed; every number stays unless --dtype is
given.  Single files and shards with flax_model.msgpack.index.json are read; of shards
one is in memory at a time.

FlaxLlama always rotated with theta 10000 and no scaling, whatever its config.json said.
Where that file says something else, --rope tells which of the two the weights are for.
"""

import dataclasses
import mmap
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from _common import (
    Lazy,
    check_file,
    make_parser,
    open_weights,
    run,
    unreadable,
    write_hf,
)
from flax.serialization import msgpack_restore

from jrope.errors import JropeError
from jrope.hf.checkpoint import read_llama_config
from jrope.hf.folders import companions, some
from jrope.model.config import LlamaConfig
from jrope.rope import Rope

FLAX_THETA = 10000.0
CHUNKED = "__msgpack_chunked_array__"
KIND = "Flax parameters in msgpack"


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of an array before its data."""

    shape: tuple[int, ...]
    dtype: str


def open_msgpack(restored: "Restored", path: Path) -> dict[str, Lazy]:
    """Name -> array of one file, kernels transposed; only headers are kept."""
    check_file(path)
    try:
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            tree = msgpack.unpackb(view, ext_hook=_header, strict_map_key=False)
            leaves = {path: _shape(leaf) for path, leaf in _leaves(tree)}
    except Exception as error:  # whatever a damaged file can provoke
        unreadable(path, KIND, error)
    if wrong := ["/".join(key) for key, leaf in leaves.items() if leaf is None]:
        raise JropeError(f"{path}: {some(wrong)} are not arrays")
    return {
        "/".join(key): _lazy(path, key, leaf, restored)
        for key, leaf in leaves.items()
        if leaf is not None
    }


def _header(code: int, data: bytes) -> Header | None:
    if code != 1:  # flax's code of an array
        return None
    shape, dtype, _ = msgpack.unpackb(data, raw=True)
    return Header(tuple(shape), dtype.decode())


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    if not isinstance(tree, dict) or CHUNKED in tree:
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*path, str(key)))


def _shape(leaf: Any) -> Header | None:
    """The header of a leaf; arrays beyond 1 GiB come in chunks."""
    if not isinstance(leaf, dict):
        return leaf if isinstance(leaf, Header) else None
    shape = tuple(leaf["shape"][str(axis)] for axis in range(len(leaf["shape"])))
    return Header(shape, leaf["chunks"]["0"].dtype)


def _lazy(
    path: Path, key: tuple[str, ...], header: Header, restored: "Restored"
) -> Lazy:
    if key[-1] != "kernel":
        return Lazy(header.shape, header.dtype, partial(restored.read, path, key))

    def read() -> np.ndarray:
        return np.ascontiguousarray(restored.read(path, key).T)

    return Lazy(header.shape[::-1], header.dtype, read)


class Restored:
    """The arrays of one file at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._leaves: dict[Any, Any] = {}

    def read(self, path: Path, key: tuple[str, ...]) -> np.ndarray:
        """One array, as it is stored; reads the file unless it is the last one read."""
        if path != self._path:
            self._path, self._leaves = None, {}  # let go before the next is read
            with path.open("rb") as file:
                view: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._leaves = dict(_leaves(msgpack_restore(view)))
            self._path = path
        return np.asarray(self._leaves[key])


def hf_name(name: str) -> str:
    """model/layers/0/self_attn/q_proj/kernel -> model.layers.0....q_proj.weight."""
    *parts, last = name.removeprefix("params/").split("/")
    last = "weight" if last in ("kernel", "embedding") else last
    return ".".join([*parts, last])


def settled(config: LlamaConfig, choice: str | None) -> LlamaConfig:
    """The configuration with the rotary embedding that --rope names."""
    flax = Rope(theta=FLAX_THETA, rotary_dim=config.head_dim)
    if choice is None and config.rope != flax:
        raise JropeError(
            f"config.json asks for {config.rope}, but transformers' FlaxLlama always "
            "rotated with theta 10000 and no scaling; give --rope config if the "
            "weights came from PyTorch, --rope flax if they were trained in Flax"
        )
    return dataclasses.replace(config, rope=flax) if choice == "flax" else config


def convert(args: Namespace) -> None:
    """Run the conversion that the arguments ask for."""
    config = settled(read_llama_config(args.src), args.rope)
    opened = open_weights(
        args.src, "flax_model.msgpack", partial(open_msgpack, Restored())
    )
    write_hf(
        args.dst,
        config,
        {hf_name(name): lazy for name, lazy in opened.items()},
        where=args.src,
        dtype=args.dtype,
        extra_files=companions(args.src),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    src = "folder with config.json and flax_model.msgpack or its shards and index"
    parser = make_parser(__doc__, src)
    parser.add_argument(
        "--rope",
        choices=("config", "flax"),
        help="rotary embedding: config.json's, or FlaxLlama's theta 10000",
    )
    return run(parser, convert, argv)


if __name__ == "__main__":
    sys.exit(main())
