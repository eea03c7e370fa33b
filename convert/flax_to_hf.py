"""An Orbax checkpoint of Flax parameters to a Hugging Face folder.

The inverse of hf_to_flax.py, bit for bit: SRC/params is the checkpoint, SRC/config.json
says which arrays there must be.  The tree may lie under one more key, "params".  One
array is read at a time, into host memory, on whatever devices it was saved from.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    Lazy,
    make_parser,
    require,
    run,
    unreadable,
    write_hf,
)

from jrope.errors import JropeError
from jrope.hf.checkpoint import read_llama_config
from jrope.hf.folders import companions, some
from jrope.tree import flatten, nest

PARAMS = "params"


def open_orbax(folder: Path) -> dict[str, Lazy]:
    """Dotted name -> array of an Orbax checkpoint; only its metadata is read."""
    ocp = require("orbax.checkpoint", "orbax-checkpoint")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not folder.is_dir():
        raise JropeError(f"no folder {folder}: want the Orbax checkpoint there")
    checkpointer = ocp.PyTreeCheckpointer()
    try:
        metadata = checkpointer.metadata(folder.resolve()).item_metadata
        found = flatten(metadata.tree) if metadata is not None else {}
    except Exception as error:  # Orbax has no one type for what it cannot read
        unreadable(folder, "an Orbax checkpoint", error)
    if not found:
        raise JropeError(f"{folder} holds no Orbax checkpoint")
    wrong = [
        f"{name} ({type(leaf).__name__})"
        for name, leaf in found.items()
        if getattr(leaf, "shape", None) is None or getattr(leaf, "dtype", None) is None
    ]
    if wrong:
        raise JropeError(
            f"{folder}: want nested dictionaries of arrays, got {some(wrong)}"
        )
    return {
        name: Lazy(
            tuple(leaf.shape),
            np.dtype(leaf.dtype).name,
            partial(_restore, ocp, checkpointer, folder.resolve(), name),
        )
        for name, leaf in found.items()
    }


def _restore(ocp: Any, checkpointer: Any, folder: Path, name: str) -> np.ndarray:
    """One array, as NumPy's, so that neither devices nor shardings matter."""
    wanted = ocp.args.PyTreeRestore(
        item=nest({name: 0}),
        restore_args=nest({name: ocp.RestoreArgs(restore_type=np.ndarray)}),
        partial_restore=True,
    )
    try:
        return flatten(checkpointer.restore(folder, args=wanted))[name]
    except Exception as error:
        unreadable(folder, f"an Orbax checkpoint with {name}", error)


def convert(args: Namespace) -> None:
    """Run the conversion that the arguments ask for."""
    config = read_llama_config(args.src)
    tensors = open_orbax(args.src / PARAMS)
    if tensors and all(name.startswith("params.") for name in tensors):
        tensors = {name.removeprefix("params."): t for name, t in tensors.items()}
    write_hf(
        args.dst,
        config,
        tensors,
        where=args.src,
        dtype=args.dtype,
        extra_files=companions(args.src),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    src = "folder with config.json and the Orbax checkpoint params/"
    return run(make_parser(__doc__, src), convert, argv)


if __name__ == "__main__":
    sys.exit(main())
