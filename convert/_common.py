"""What the conversion scripts share: command line, errors, checks, progress, end line.

A script opens a foreign checkpoint as a dictionary from Hugging Face's tensor names to
`Lazy` tensors, whose shapes and dtypes are known before any data is read, and hands it
to `write_hf`, which checks all of them, then reads, casts and writes one at a time.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jrope.cli.terminal import Progress, bytes_text
from jrope.errors import JropeError
from jrope.hf import config_to_hf
from jrope.hf.checkpoint import write_folder
from jrope.hf.checks import check_tensors, not_tied
from jrope.hf.folders import TABLES, parse_json, some
from jrope.hf.tensors import DTYPES, inside
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig

CODES = {dtype.name: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Lazy:
    """A tensor not read yet: its shape, the name of its dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def rows(self) -> int:
        """Length of the first axis; 0 for a scalar."""
        return self.shape[0] if self.shape else 0


def transposed(lazy: Lazy) -> Lazy:
    """The tensor with its axes in the other order: Flax's kernels are [in, out]."""

    def read() -> np.ndarray:
        return np.ascontiguousarray(lazy.read().T)

    return Lazy(lazy.shape[::-1], lazy.dtype, read)


def make_parser(
    doc: str | None, src: str, *, dtype: str | None = None
) -> argparse.ArgumentParser:
    """A parser with SRC, DST, --dtype and --force; `doc` is the script's."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", metavar="SRC", type=Path, help=src)
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to write")
    text = f"cast every tensor (default: {dtype or 'keep what it has'})"
    parser.add_argument("--dtype", choices=CODES, default=dtype, help=text)
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint that DST holds"
    )
    return parser


def run(
    parser: argparse.ArgumentParser,
    convert: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Parse, check DST, convert; bad input is one line and the exit status 2."""
    args = parser.parse_args(argv)
    try:
        _check_places(args.src, args.dst, args.force)
        convert(args)
    except (JropeError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"{parser.prog}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


def _check_places(src: Path, dst: Path, force: bool) -> None:
    source, target = src.resolve(), dst.resolve()
    if source == target or target in source.parents:
        raise JropeError(f"DST {dst} holds SRC {src}; write elsewhere")
    if dst.is_dir() and not force and (names := sorted(dst.iterdir())):
        held = some([path.name for path in names])
        raise JropeError(f"{dst} is not empty ({held}); give --force to replace it")


def require(module: str, install: str) -> Any:
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise JropeError(
            f"this needs the package {module}: pip install {install}"
        ) from None


def note(text: str) -> None:
    """Tell something that the user should know, on stderr."""
    print(f"note: {text}", file=sys.stderr)


def unreadable(path: Path, kind: str, error: Exception) -> NoReturn:
    """Raise one line about a file that its own reader does not understand."""
    first = next(iter(str(error).splitlines()), "")
    raise JropeError(
        f"{path} cannot be read as {kind}: damaged, or another format "
        f"({type(error).__name__}: {first[:200]})"
    ) from None


def check_file(path: Path) -> None:
    """Raise unless a file of weights is there, has content, and is not a pointer."""
    if not path.is_file():
        raise JropeError(f"no file {path}")
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise JropeError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise JropeError(f"{path} is a git-lfs pointer; run 'git lfs pull'")


def open_weights(
    folder: Path, single: str, open_file: Callable[[Path], dict[str, Lazy]]
) -> dict[str, Lazy]:
    """The tensors of a folder that holds one file, or shards and an index.

    Args:
      folder: holds `single`, or `single`.index.json and the files that it names.
      single: such as "pytorch_model.bin".
      open_file: the names, shapes and dtypes of one file, and how to read them.

    Raises:
      JropeError: files missing or outside the folder; an index that does not tell what
        the files hold.
    """
    index = folder / f"{single}.index.json"
    if not index.exists():
        return open_file(inside(folder, single, folder))
    if (folder / single).exists():
        raise JropeError(
            f"{folder} has both {single} and {index.name}; remove the stale one"
        )
    places: Any = parse_json(index.read_bytes(), str(index)).get("weight_map")
    files = [*places.values()] if isinstance(places, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise JropeError(f"{index}: weight_map must map tensor names to file names")
    paths = {file: inside(folder, file, index) for file in dict.fromkeys(files)}
    tensors: dict[str, Lazy] = {}
    found: dict[str, Any] = {}
    for file, path in paths.items():
        opened = open_file(path)
        tensors |= opened
        found |= dict.fromkeys(opened, file)
    wrong = [
        f"{name} (listed in {places.get(name)}, found in {found.get(name)})"
        for name in dict.fromkeys([*places, *found])
        if places.get(name) != found.get(name)
    ]
    if wrong:
        raise JropeError(f"{index} does not tell what the files hold: {some(wrong)}")
    return tensors


def same_bits(first: Lazy, second: Lazy) -> bool:
    """Whether two tensors are equal, bit for bit."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    pair = (np.ascontiguousarray(lazy.read()) for lazy in (first, second))
    a, b = (array.reshape(-1).view(np.uint8) for array in pair)
    return np.array_equal(a, b)


def write_hf(
    dst: Path,
    config: LlamaConfig,
    tensors: Mapping[str, Lazy],
    *,
    where: Path,
    dtype: str | None = None,
    extra_files: Iterable[Path] = (),
) -> None:
    """Check every tensor, then write a Hugging Face folder and the end line.

    Tables of rotary frequencies are left out, and so is the head of a tied checkpoint,
    which must equal the embedding.

    Args:
      dst: folder to write.
      config: what it holds.
      tensors: by Hugging Face's names, read in this order.
      where: the source, for errors.
      dtype: what to cast to; None keeps.
      extra_files: copied beside the weights.
    """
    kept = {n: t for n, t in tensors.items() if not TABLES.fullmatch(n)}
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= {*kept}:
        if not same_bits(kept[EMBEDDING], kept[HEAD]):
            found = (kept[name] for name in (EMBEDDING, HEAD))
            raise not_tied(where, *((lazy.dtype, lazy.shape) for lazy in found))
        del kept[HEAD]
    shapes = {name: lazy.shape for name, lazy in kept.items()}
    codes = {name: _code(lazy.dtype, dtype) for name, lazy in kept.items()}
    check_tensors(str(where), config, shapes, codes)
    kinds = {dtype or lazy.dtype for lazy in kept.values()}
    sizes = {name: dtype.itemsize for name, dtype in _numpy_dtypes().items()}
    total = sum(
        int(np.prod(lazy.shape)) * sizes[dtype or lazy.dtype] for lazy in kept.values()
    )
    with Progress("writing", total) as progress:
        write_folder(
            dst,
            config_to_hf(config, dtype=kinds.pop() if len(kinds) == 1 else "float32"),
            _stream(kept, dtype),
            nbytes=total,
            extra_files=extra_files,
            progress=progress,
        )
    end_line(dst, [dtype or lazy.dtype for lazy in kept.values()], total)


def _numpy_dtypes() -> dict[str, np.dtype[Any]]:
    return {dtype.name: dtype for dtype in DTYPES.values()}


def _code(stored: str, wanted: str | None) -> str:
    """The safetensors code of what will be written, or what cannot be."""
    castable = stored in CODES or stored == "float64"
    return CODES.get(wanted if wanted and castable else stored, stored)


def _stream(
    tensors: Mapping[str, Lazy], dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    for name, lazy in tensors.items():
        yield name, cast(name, lazy.read(), dtype)


def cast(name: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """Round to another dtype, once; raise where a finite number would become infinite.

    Args:
      name: of the tensor, for errors.
      array: any float array.
      dtype: float32, float16 or bfloat16; None keeps.
    """
    if dtype is None or array.dtype.name == dtype:
        return array
    with np.errstate(all="ignore"):
        narrow = array.astype(_numpy_dtypes()[dtype])
    if np.isinf(narrow).any() and (lost := np.isinf(narrow) & np.isfinite(array)).any():
        worst = array[lost][0]
        raise JropeError(f"{name}: {worst} is too large for {dtype}; use float32")
    return narrow


def end_line(dst: Path, dtypes: Sequence[str], size: int) -> None:
    """Say what has been written."""
    kinds = " and ".join(sorted({*dtypes}))
    print(f"wrote {dst}: {len(dtypes)} tensors, {bytes_text(size)}, {kinds}")
