"""pytorch_model.bin, single or sharded, to a Hugging Face folder of safetensors.

Weights are only read, never unpickled: a file that holds more than tensors is refused.
Every tensor is written bit for bit unless --dtype is given; tables of rotary
frequencies are dropped.  config.json and the tokenizer's files come along.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from _common import (
    make_parser,
    open_weights,
    run,
    write_hf,
)
from _torch import open_pickle

from jrope.hf.checkpoint import read_llama_config
from jrope.hf.folders import companions


def convert(args: Namespace) -> None:
    """Run the conversion that the arguments ask for."""
    config = read_llama_config(args.src)
    tensors = open_weights(args.src, "pytorch_model.bin", open_pickle)
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
    src = "folder with config.json and pytorch_model.bin or its shards and index"
    return run(make_parser(__doc__, src), convert, argv)


if __name__ == "__main__":
    sys.exit(main())
