"""Meta's params.json, and what it leaves out, to a LlamaConfig.

Assumptions are printed, each with the option that overrides it.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from _common import Lazy, note, same_bits

from jrope.errors import JropeError
from jrope.hf.folders import read_json, some
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig
from jrope.rope import Rope
from jrope.rope.methods import Llama3

REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
OPTIONAL = ("n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier")
ROPE = ("rope_theta", "use_scaled_rope")
RUN_TIME = ("max_batch_size", "max_seq_len")  # sizes of a cache, not of the model
TRAINED = {500000.0: 8192, 1000000.0: 16384}  # rope_theta -> Llama 3, Code Llama
LLAMA3_VOCABULARY = 128256
GATE = "model.layers.0.mlp.gate_proj.weight"
TELLING = {  # Meta's names of the tensors whose shapes and values are needed
    "tok_embeddings.weight": EMBEDDING,
    "output.weight": HEAD,
    "layers.0.feed_forward.w1.weight": GATE,
}


def read_params(path: Path) -> dict[str, Any]:
    """params.json, checked; a few releases nest it under "model"."""
    params = read_json(path)
    if isinstance(params.get("model"), dict):
        params = params["model"]
    known = (*REQUIRED, *OPTIONAL, *ROPE, *RUN_TIME)
    if unknown := [key for key in params if key not in known]:
        raise JropeError(f"{path}: unknown {some(unknown)}: another architecture?")
    if missing := [key for key in REQUIRED if key not in params]:
        raise JropeError(f"{path}: missing {some(missing)}")
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads"):
        value = params.get(key)
        optional = key == "n_kv_heads" and value is None
        if not optional and (type(value) is not int or value < 1):
            got = json.dumps(value)
            raise JropeError(f"{path}: {key} is {got}, want a positive integer")
    for key in ("norm_eps", "rope_theta", "multiple_of", "ffn_dim_multiplier"):
        value: Any = params.get(key)
        number = type(value) in (int, float) and 0 < value < float("inf")
        if key in params and value is not None and not number:
            got = json.dumps(value)
            raise JropeError(f"{path}: {key} is {got}, want a positive number")
    if type(params.get("use_scaled_rope", False)) is not bool:
        raise JropeError(f"{path}: use_scaled_rope must be true or false")
    if params["dim"] % params["n_heads"]:
        raise JropeError(f"{path}: dim is not a multiple of n_heads")
    return params


def kv_heads(params: dict[str, Any]) -> int:
    """K; absent or null means as many as query heads."""
    return params.get("n_kv_heads") or params["n_heads"]


def make_config(
    args: Namespace, params: dict[str, Any], tensors: dict[str, Lazy]
) -> LlamaConfig:
    """The configuration, from params.json, the shapes, the options, and assumptions."""
    if missing := [meta for meta, name in TELLING.items() if name not in tensors]:
        raise JropeError(f"{args.src}: missing {some(missing)}")
    vocab_size, intermediate = tensors[EMBEDDING].rows, tensors[GATE].rows
    declared = params.get("vocab_size", -1)
    if declared not in (-1, vocab_size):
        raise JropeError(
            f"{args.src}: params.json has vocab_size {declared}, the embedding "
            f"{vocab_size} rows"
        )
    check_intermediate(args.src, params, intermediate)
    tied = same_bits(tensors[EMBEDDING], tensors[HEAD])
    if tied:
        note("output.weight equals tok_embeddings.weight: written as tied")
    large = vocab_size >= LLAMA3_VOCABULARY
    bos, eos = (128000, [128001, 128008, 128009]) if large else (1, [2])
    bos, eos = args.bos if args.bos is not None else bos, args.eos or eos
    note(f"bos_token_id {bos} and eos_token_id {eos} (--bos, --eos)")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=params["dim"],
        intermediate_size=intermediate,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=kv_heads(params),
        head_dim=params["dim"] // params["n_heads"],
        max_position_embeddings=max_position(args, params),
        rms_norm_eps=params["norm_eps"],
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=tied,
        initializer_range=0.02,
        rope=make_rope(args, params, tied),
        bos_token_id=bos,
        eos_token_id=tuple(eos),
        pad_token_id=None,
    )


def check_intermediate(where: Path, params: dict[str, Any], found: int) -> None:
    """Meta computes F from three fields; the weights must agree if they are given."""
    multiple = params.get("multiple_of")
    if multiple is None:
        return
    wanted = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        wanted = int(params["ffn_dim_multiplier"] * wanted)
    wanted = multiple * -(-wanted // multiple)
    if wanted != found:
        raise JropeError(
            f"{where}: params.json's dim, multiple_of and ffn_dim_multiplier give "
            f"{wanted} hidden units, but w1 has {found}"
        )


def max_position(args: Namespace, params: dict[str, Any]) -> int:
    """The trained length: an option, or what the released models tell apart."""
    theta = params.get("rope_theta", 10000.0)
    if args.max_position is not None:
        return args.max_position
    length = 131072 if params.get("use_scaled_rope") else TRAINED.get(theta)
    if length is None:
        raise JropeError(
            f"params.json with rope_theta {theta:g} does not tell the trained length; "
            "give --max-position (LLaMA 1: 2048, Llama 2: 4096)"
        )
    note(f"max_position_embeddings {length} (--max-position)")
    return length


def make_rope(args: Namespace, params: dict[str, Any], tied: bool) -> Rope:
    """Theta, and Llama 3.1's scaling, whose constants params.json leaves out."""
    head_dim = params["dim"] // params["n_heads"]
    theta = params.get("rope_theta")
    if theta is None:
        theta = 10000.0
        note("rope_theta 10000: params.json has none")
    if not params.get("use_scaled_rope"):
        if args.rope_factor is not None:
            raise JropeError("--rope-factor given, but use_scaled_rope is not true")
        return Rope(theta=theta, rotary_dim=head_dim)
    factor = args.rope_factor
    if factor is None:
        factor = 32.0 if tied else 8.0
        kind = "tied, as Llama 3.2 1B and 3B" if tied else "as Llama 3.1 and 3.3"
        note(f"rope factor {factor:g}, {kind} (--rope-factor)")
    scaling = Llama3(
        factor=factor, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    return Rope(theta=theta, rotary_dim=head_dim, scaling=scaling)
