"""Meta's consolidated.NN.pth and params.json to a Hugging Face folder.

Meta pairs channels 2r and 2r+1 of a head, Hugging Face r and r+R: the rows of wq and wk
are reordered, nothing else changes, every number stays.  Files of several
model-parallel ranks are joined.  Nothing is unpickled but tensors.

params.json does not say everything: what had to be assumed is printed, and can be
given.  Sentencepiece's tokenizer.model comes along; that of Llama 3 is in another
format, so take tokenizer.json from any Hugging Face copy of the model.
"""

import re
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
    note,
    run,
    same_bits,
    write_hf,
)
from _meta_config import kv_heads, make_config, read_params
from _meta_names import LAYER
from _torch import open_pickle

from jrope.errors import JropeError
from jrope.hf.folders import some
from jrope.model.config import EMBEDDING, HEAD
from jrope.rope import interleaved_to_half

TOP = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}


def open_ranks(folder: Path) -> list[dict[str, Lazy]]:
    """The tensors of consolidated.00.pth and on, one dictionary for each."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    wanted = [f"consolidated.{rank:02}.pth" for rank in range(max(len(paths), 1))]
    if [path.name for path in paths] != wanted:
        found = some([path.name for path in paths]) or "no consolidated.*.pth"
        raise JropeError(f"{folder} has {found}; want {some(wanted)}")
    ranks = [open_pickle(path) for path in paths]
    for path, rank in zip(paths, ranks, strict=True):
        rank.pop("rope.freqs", None)
        if differing := sorted(rank.keys() ^ ranks[0].keys()):
            raise JropeError(
                f"{path} and {paths[0].name} differ in {some(differing)}; they are not "
                "ranks of one checkpoint"
            )
    return ranks


def hf_tensors(
    ranks: Sequence[dict[str, Lazy]], params: dict[str, Any], where: Path
) -> dict[str, Lazy]:
    """Hugging Face's names -> the ranks' parts joined, wq and wk reordered."""
    tensors: dict[str, Lazy] = {}
    heads = {"wq": params["n_heads"], "wk": kv_heads(params)}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        if name in TOP:
            axis = {HEAD: 0, EMBEDDING: embedding_axis(parts, params, where)}
            tensors[TOP[name]] = joined(name, parts, axis.get(TOP[name]))
        elif match and match[2] in LAYER:
            new, axis = LAYER[match[2]]
            kind = match[2].rpartition(".")[2]
            if kind in ("wk", "wv"):
                parts = without_copies(name, parts, params)
            whole = joined(name, parts, axis)
            if kind in heads:
                read = partial(halves, whole, heads[kind])
                whole = Lazy(whole.shape, whole.dtype, read)
            tensors[f"model.layers.{match[1]}.{new}.weight"] = whole
        else:
            tensors[name] = parts[0]  # reported with all others that nobody knows
    return tensors


def halves(lazy: Lazy, heads: int) -> np.ndarray:
    """Read a projection and reorder its rows to the half layout."""
    return interleaved_to_half(lazy.read(), heads)


def joined(name: str, parts: Sequence[Lazy], axis: int | None) -> Lazy:
    """One tensor of the ranks' parts; with no axis every rank has the whole."""
    if len({(lazy.shape, lazy.dtype) for lazy in parts}) > 1:
        shapes = some([f"{lazy.dtype}{list(lazy.shape)}" for lazy in parts])
        raise JropeError(f"{name} differs between the ranks: {shapes}")
    if axis is None or len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    if len(shape) != 2:
        raise JropeError(f"{name} has shape {shape}, want a matrix")
    shape[axis] *= len(parts)

    def read() -> np.ndarray:
        return np.concatenate([part.read() for part in parts], axis)

    return Lazy(tuple(shape), parts[0].dtype, read)


def embedding_axis(parts: Sequence[Lazy], params: dict[str, Any], where: Path) -> int:
    """LLaMA 1 and 2 split the embedding's columns, Llama 3 its rows: shapes tell."""
    width, dim = (parts[0].shape or (0,))[-1], params["dim"]
    if width not in (dim, dim // len(parts)):
        raise JropeError(
            f"{where}: tok_embeddings.weight has {width} columns in each of "
            f"{len(parts)} ranks, which is neither dim {dim} nor a part of it"
        )
    return 0 if width == dim else 1


def without_copies(
    name: str, parts: Sequence[Lazy], params: dict[str, Any]
) -> Sequence[Lazy]:
    """One rank of each group that holds the same heads (more ranks than K)."""
    copies, rest = divmod(len(parts), kv_heads(params))
    head_dim = params["dim"] // params["n_heads"]
    if copies < 2 or rest or parts[0].rows != head_dim:
        return parts
    groups = [parts[i : i + copies] for i in range(0, len(parts), copies)]
    if not all(same_bits(group[0], other) for group in groups for other in group[1:]):
        raise JropeError(f"{name}: ranks that share a head do not hold the same rows")
    return [group[0] for group in groups]


def tokenizer_files(folder: Path) -> list[Path]:
    """Sentencepiece's tokenizer.model, which transformers reads as it is."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        note(f"no tokenizer.model in {folder}: copy the tokenizer's files yourself")
        return []
    with path.open("rb") as file:
        if file.read(1) == b"\n":  # a protocol buffer; Llama 3's is base64 text
            return [path]
    note("tokenizer.model is Llama 3's format: copy tokenizer.json from a HF folder")
    return []


def convert(args: Namespace) -> None:
    """Run the conversion that the arguments ask for."""
    params = read_params(args.src / "params.json")
    tensors = hf_tensors(open_ranks(args.src), params, args.src)
    write_hf(
        args.dst,
        make_config(args, params, tensors),
        tensors,
        where=args.src,
        dtype=args.dtype,
        extra_files=tokenizer_files(args.src),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    src = "folder with params.json and consolidated.NN.pth"
    parser = make_parser(__doc__, src)
    parser.add_argument(
        "--max-position",
        type=int,
        metavar="N",
        help="trained length (default: 131072 for scaled rope, 8192 for theta 500000, "
        "16384 for theta 1000000, else it must be given)",
    )
    parser.add_argument(
        "--rope-factor",
        type=float,
        metavar="S",
        help="factor of llama3 scaling where use_scaled_rope is true (default: 8, and "
        "32 if the head is tied, as in Llama 3.2 1B and 3B)",
    )
    parser.add_argument(
        "--bos",
        type=int,
        metavar="ID",
        help="first token (default: 128000 for Llama 3's vocabulary, else 1)",
    )
    parser.add_argument(
        "--eos",
        type=int,
        metavar="ID",
        nargs="+",
        help="last tokens (default: 128001 128008 128009 for Llama 3's, else 2)",
    )
    return run(parser, convert, argv)


if __name__ == "__main__":
    sys.exit(main())
