"""A llama.cpp GGUF file, quantized or not, to a Hugging Face folder.

Every tensor is dequantized to float32 and rounded once to --dtype; the rows of q and
k, which llama.cpp keeps in Meta's order, go back to Hugging Face's.  Of a model in
several files give the first, NAME-00001-of-0000N.gguf.  Keys outside `llama.` do not
change what llama.cpp computes; of them only the tokenizer's are read.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from _common import (
    Lazy,
    check_file,
    make_parser,
    note,
    require,
    run,
    unreadable,
    write_hf,
)
from _gguf_config import make_config, metadata
from _gguf_rope import FACTORS
from _gguf_tokenizer import save_tokenizer

from jrope.errors import JropeError
from jrope.rope import interleaved_to_half

LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def open_files(path: Path) -> list[Any]:
    """The readers of a GGUF file, or of all files of a split one."""
    gguf = require("gguf", "gguf")
    paths = [path]
    if match := SPLIT.fullmatch(path.name):
        stem, number, count = match.groups()
        if int(number) != 1:
            raise JropeError(f"{path} is not the first of {int(count)}; give that one")
        names = [f"{stem}-{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1)]
        paths = [path.parent / name for name in names]
    for part in paths:
        check_file(part)
    return [open_file(gguf, part) for part in paths]


def open_file(gguf: Any, path: Path) -> Any:
    """The reader of one file, mapped into memory."""
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the reader has no one type for what it cannot read
        unreadable(path, "GGUF", error)
    if reader.byte_order != "I":
        raise JropeError(f"{path} has the other byte order; convert it with gguf first")
    return reader


def read_tensors(readers: Sequence[Any]) -> dict[str, Lazy]:
    """llama.cpp's names -> tensors, dequantized to float32 when they are read."""
    quants = require("gguf.quants", "gguf")
    tensors: dict[str, Lazy] = {}
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        if tensor.name in tensors:
            raise JropeError(f"tensor {tensor.name} is in two of the files")
        shape = tuple(reversed(tensor.shape.tolist()))
        read = partial(_dequantized, quants, tensor, shape)
        tensors[tensor.name] = Lazy(shape, _dtype(quants, tensor), read)
    return tensors


def _dtype(quants: Any, tensor: Any) -> str:
    """float32 for what can be dequantized, else the type's own name, to be refused."""
    try:
        quants.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        return tensor.tensor_type.name
    return "float32"


def _dequantized(quants: Any, tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    values = quants.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(values, np.float32).reshape(shape)


def hf_tensors(tensors: Mapping[str, Lazy], heads: int, kv_heads: int) -> Any:
    """Hugging Face's names -> the same tensors, rows of q and k reordered."""
    renamed: dict[str, Lazy] = {}
    count = {"attn_q": heads, "attn_k": kv_heads}
    for name, lazy in tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if name == FACTORS:
            continue
        if match and match[2] in LAYER:
            new = f"model.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"
            if match[2] in count:
                read = partial(_halves, lazy, count[match[2]])
                lazy = Lazy(lazy.shape, lazy.dtype, read)
            renamed[new] = lazy
        else:
            renamed[TOP.get(name, name)] = lazy
    return renamed


def _halves(lazy: Lazy, heads: int) -> np.ndarray:
    return interleaved_to_half(lazy.read(), heads)


def convert(args: Namespace) -> None:
    """Run the conversion that the arguments ask for."""
    readers = open_files(args.src)
    values = metadata(readers[0], args.src)
    tensors = read_tensors(readers)
    config = make_config(values, tensors, args.src)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    with TemporaryDirectory() as scratch:
        extra: list[Path] = []
        if args.tokenizer:
            extra = save_tokenizer(args.src, values, Path(scratch))
        else:
            note("no tokenizer written, as asked")
        write_hf(
            args.dst,
            config,
            hf_tensors(tensors, heads, kv_heads),
            where=args.src,
            dtype=args.dtype,
            extra_files=extra,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = make_parser(__doc__, "GGUF file", dtype="bfloat16")
    parser.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_false",
        help="leave the tokenizer out (it is rebuilt through transformers)",
    )
    return run(parser, convert, argv)


if __name__ == "__main__":
    sys.exit(main())
