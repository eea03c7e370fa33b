"""`jrope convert`: a Hugging Face folder into another one, tensor by tensor."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jrope.cli.common import (
    add_dtype_argument,
    add_rope_arguments,
    apply_rope,
    size,
)
from jrope.cli.terminal import Progress, bytes_text
from jrope.errors import JropeError
from jrope.hf import config_from_hf, config_to_hf
from jrope.hf.checkpoint import (
    SHARD_SIZE,
    Tensors,
    read_config,
    write_folder,
)
from jrope.hf.checks import open_checked
from jrope.hf.folders import companions, find_folder
from jrope.hf.quantized import without_quantization
from jrope.hf.tensors import DTYPES
from jrope.rope import describe

_SCRIPTS = ("flax_msgpack", "flax", "gguf", "meta", "pytorch_bin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `jrope convert` takes."""
    add = parser.add_argument
    add("source", metavar="SRC", help="a Hugging Face folder or hub id")
    add("target", metavar="DST", help="the folder to write")
    add(
        "--max-shard-size",
        metavar="SIZE",
        type=size,
        default=SHARD_SIZE,
        help="split the weights into files of at most this, such as 500MB (5GiB)",
    )
    add("--force", action="store_true", help="replace a checkpoint in DST")
    add_dtype_argument(parser)
    add_rope_arguments(parser, precision=False)
    scripts = "\n".join(f"  convert/{name}_to_hf.py" for name in _SCRIPTS)
    parser.description = (
        "Rewrite a Hugging Face folder: cast, reshard, set the rotary embedding.\n"
        "config.json is written in both of its schemas, tokenizer files are copied.\n"
        f"Scripts turn other formats into a folder:\n{scripts}"
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then stream the tensors from one folder to the other."""
    source, target = find_folder(args.source, None), Path(args.target).expanduser()
    _check_target(source, target, force=args.force)
    config_json = read_config(source)
    try:
        config = config_from_hf(without_quantization(config_json))
    except JropeError as error:
        raise JropeError(f"{source / 'config.json'}: {error}") from None
    config = apply_rope(config, args)
    tensors, names = open_checked(source, config)
    kinds = {args.dtype or DTYPES[tensors.dtypes[name]].name for name in names}
    dtype = kinds.pop() if len(kinds) == 1 else None
    written = config_to_hf(config, dtype=dtype or "float32")
    extras = companions(source)
    cast = None if args.dtype is None else _dtype(args.dtype)
    total = sum(_bytes(tensors, name, cast) for name in names)
    with Progress("writing", total) as progress:
        write_folder(
            target,
            written,
            _stream(tensors, names, cast),
            nbytes=total,
            max_shard_size=args.max_shard_size,
            extra_files=extras,
            progress=progress,
        )
    shards = len([*target.glob("model*.safetensors")])
    copied = ", ".join(path.name for path in extras) or "nothing"
    print(
        f"wrote {target}: {len(names)} tensors, {bytes_text(total)}, "
        f"{dtype or 'mixed dtypes'}, {shards} file{'s' * (shards > 1)}, "
        f"rope {describe(config.rope)}; copied {copied}"
    )
    return 0


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    if target.resolve() == source.resolve():
        raise JropeError(f"SRC and DST are the same folder, {target}; write elsewhere")
    if not force and target.is_dir() and any(target.iterdir()):
        raise JropeError(f"{target} is not empty; --force replaces a checkpoint there")


def _dtype(name: str) -> np.dtype[Any]:
    return next(dtype for dtype in DTYPES.values() if dtype.name == name)


def _bytes(tensors: Tensors, name: str, dtype: np.dtype[Any] | None) -> int:
    slot = tensors.slots[name]
    if dtype is None:
        return slot.stop - slot.start
    return int(np.prod(slot.shape)) * dtype.itemsize


def _stream(
    tensors: Tensors, names: list[str], dtype: np.dtype[Any] | None
) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        yield name, tensors.read(name, dtype)
