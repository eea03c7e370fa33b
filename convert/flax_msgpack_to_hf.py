"""Flax parameters in msgpack to a Hugging Face folder: FlaxLlama's, and EasyLM's.

SRC is a folder with config.json and flax_model.msgpack, or its shards and index, as
transformers 4 wrote them; or one file with config.json beside it, such as a stream of
EasyLM's (OpenLLaMA, LWM), whatever its name.  A stream is read one tensor at a time, a
tree and each shard as a whole.  Kernels are [in, out] there and are transposed; every
number stays unless --dtype is given.  Of EasyLM's train states the parameters are read.

FlaxLlama always rotated with theta 10000 and no scaling, whatever its config.json said.
Where that file says something else, --rope tells which of the two the weights are for.
EasyLM's files say nothing of theta: config.json's is taken (OpenLLaMA: 10000).
"""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from _common import (
    Lazy,
    make_parser,
    note,
    open_weights,
    run,
    transposed,
    write_hf,
)
from _easylm import hf_tensors, is_easylm, sizes
from _msgpack import Restored, open_msgpack

from jrope.errors import JropeError
from jrope.hf.checkpoint import read_llama_config
from jrope.hf.folders import CONFIG, companions
from jrope.model.config import LlamaConfig
from jrope.rope import Rope

FLAX_THETA = 10000.0
SINGLE = "flax_model.msgpack"
TRAIN_STATE = "params/params/"


def open_source(src: Path) -> tuple[Path, dict[str, Lazy]]:
    """The folder of config.json, and the parameters by their names in the file."""
    open_file = partial(open_msgpack, Restored())
    if src.is_file():
        return src.parent, parameters(open_file(src))
    if not any((src / name).exists() for name in (SINGLE, f"{SINGLE}.index.json")):
        raise JropeError(
            f"no {SINGLE} or its index in {src}; of another name give the file itself"
        )
    return src, parameters(open_weights(src, SINGLE, open_file))


def parameters(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Without what a train state has besides, and without the top level's "params"."""
    if any(name.startswith(TRAIN_STATE) for name in tensors):
        return {
            name.removeprefix(TRAIN_STATE): lazy
            for name, lazy in tensors.items()
            if name.startswith(TRAIN_STATE)
        }
    return {name.removeprefix("params/"): lazy for name, lazy in tensors.items()}


def flax_tensors(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """FlaxLlama's model/layers/0/self_attn/q_proj/kernel and so on, in HF's words."""
    renamed: dict[str, Lazy] = {}
    for name, lazy in tensors.items():
        *parts, last = name.split("/")
        own = transposed(lazy) if last == "kernel" else lazy
        last = "weight" if last in ("kernel", "embedding") else last
        renamed[".".join([*parts, last])] = own
    return renamed


def settled(config: LlamaConfig, choice: str | None) -> LlamaConfig:
    """The configuration with the rotary embedding that --rope names."""
    flax = Rope(theta=FLAX_THETA, rotary_dim=config.head_dim)
    if choice is None and config.rope != flax:
        raise JropeError(
            f"config.json asks for {config.rope}, but transformers' FlaxLlama always "
            "rotated with theta 10000 and no scaling; give --rope config if the "
            "weights came from PyTorch, --rope flax if they were trained in Flax"
        )
    return replace(config, rope=flax) if choice == "flax" else config


def check_config(folder: Path, src: Path, tensors: Mapping[str, Lazy]) -> None:
    """Raise unless config.json is there, and say what has to be in it."""
    if not (folder / CONFIG).is_file():
        raise JropeError(
            f"no {CONFIG} beside {src}, whose arrays do not tell heads and rope: write "
            f"one in Hugging Face's words with {sizes(tensors)}, num_attention_heads, "
            "num_key_value_heads, rms_norm_eps, max_position_embeddings, rope_theta, "
            "bos_token_id and eos_token_id"
        )


def convert(args: Namespace) -> None:
    """Run the conversion that the arguments ask for."""
    folder, tensors = open_source(args.src)
    check_config(folder, args.src, tensors)
    config = read_llama_config(folder)
    if is_easylm(tensors):
        config = settled(config, args.rope or "config")
        note(f"rope_theta {config.rope.theta:g} of config.json: the arrays hold none")
        tensors = hf_tensors(tensors, config, args.src)
    else:
        config = settled(config, args.rope)
        tensors = flax_tensors(tensors)
    write_hf(
        args.dst,
        config,
        tensors,
        where=args.src,
        dtype=args.dtype,
        extra_files=companions(folder),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    src = f"folder with config.json and {SINGLE}, or a file with config.json beside it"
    parser = make_parser(__doc__, src)
    parser.add_argument(
        "--rope",
        choices=("config", "flax"),
        help="rotary embedding: config.json's, or FlaxLlama's theta 10000",
    )
    return run(parser, convert, argv)


if __name__ == "__main__":
    sys.exit(main())
