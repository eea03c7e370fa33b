"""A Hugging Face folder to an Orbax checkpoint of the Flax parameters.

DST/params is the Orbax checkpoint: nested dictionaries with Hugging Face's names split
at the dots, [out, in] matrices, the tree that `jrope.forward` takes and
`jrope.Llama(config).apply({"params": tree}, ...)` too.  DST/config.json and the
tokenizer's files lie beside it.

    tree = orbax.checkpoint.StandardCheckpointer().restore("/absolute/DST/params")

gives NumPy arrays on any machine; pass a tree of jax.ShapeDtypeStruct with shardings to
restore straight onto devices.  Orbax takes the tree as a whole: the conversion needs
host memory for about three times the weights.
"""

import logging
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _common import end_line, make_parser, require, run

from jrope.cli.terminal import Progress
from jrope.hf import config_to_hf
from jrope.hf.checkpoint import load
from jrope.hf.folders import CONFIG, check_target, companions, find_folder
from jrope.hf.replacing import replacing
from jrope.hf.shards import write_json
from jrope.model.config import LlamaConfig
from jrope.tree import flatten

PARAMS = "params"


def write_flax(
    dst: Path, params: Any, config: LlamaConfig, extra_files: Sequence[Path] = ()
) -> None:
    """Write DST/params, DST/config.json and the extra files, all or nothing."""
    ocp = require("orbax.checkpoint", "orbax-checkpoint")
    logging.getLogger("absl").setLevel(logging.ERROR)
    kinds = {array.dtype.name for array in jax.tree.leaves(params)}
    target = dst.resolve()
    check_target(target, {PARAMS, *(path.name for path in extra_files)})
    with replacing(target) as fresh:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            # NumPy arrays, because jax's would bind the files to these devices
            tree = jax.tree.map(np.asarray, params)
            checkpointer.save(fresh / PARAMS, args=ocp.args.StandardSave(tree))
        dtype = kinds.pop() if len(kinds) == 1 else "float32"
        write_json(fresh / CONFIG, config_to_hf(config, dtype=dtype))
        for path in extra_files:
            shutil.copyfile(path, fresh / path.name)


def convert(args: Namespace) -> None:
    """Run the conversion that the arguments ask for."""
    folder = find_folder(args.src, None)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with Progress("reading", size) as progress:
        params, config = load(folder, args.dtype, progress=progress)
    write_flax(args.dst, params, config, companions(folder))
    arrays = flatten(params).values()
    total = sum(array.nbytes for array in arrays)
    end_line(args.dst, [array.dtype.name for array in arrays], total)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    src = "Hugging Face folder, or a hub id"
    return run(make_parser(__doc__, src), convert, argv)


if __name__ == "__main__":
    sys.exit(main())
