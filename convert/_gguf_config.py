"""A GGUF file's metadata to a LlamaConfig; keys that nobody reads raise."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import Lazy
from _gguf_rope import FACTORS, ROPE_KEYS, read_scaling

from jrope.errors import JropeError
from jrope.hf.folders import some
from jrope.model.config import LlamaConfig
from jrope.rope import Rope

INTEGERS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "rope.dimension_count", "vocab_size"),
)
SIZES = INTEGERS[:5]  # these must be given
NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
# Keys that change nothing while they hold this value.
HARMLESS = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
TOKENIZER = ("model", "pre", "bos_token_id", "eos_token_id", "padding_token_id")
TOKENIZER = (*TOKENIZER, "eot_token_id")


def metadata(reader: Any, path: Path) -> dict[str, Any]:
    """The `llama.` keys without that prefix, and the tokenizer's small ones with.

    Raises:
      JropeError: another architecture, or keys that we do not know, all at once.
    """
    kind = _value(reader, "general.type") or "model"
    architecture = _value(reader, "general.architecture")
    if (kind, architecture) != ("model", "llama"):
        raise JropeError(
            f"{path} is a {kind} of architecture {architecture!r}, want a model of "
            "'llama'"
        )
    values = {
        name.removeprefix("llama."): _value(reader, name)
        for name in reader.fields
        if name.startswith("llama.")
    }
    values.pop("tensor_data_layout", None)  # what it tells is so in every such file
    for name, harmless in HARMLESS.items():
        if name in values and values[name] == harmless:
            del values[name]
    known = {*INTEGERS, *NUMBERS, *ROPE_KEYS}
    if unknown := [f"llama.{n} = {values[n]!r}" for n in values if n not in known]:
        raise JropeError(f"{path}: unknown {some(unknown)}: not the plain architecture")
    _check(values, path)
    keys = (f"tokenizer.ggml.{name}" for name in TOKENIZER)
    return values | {key: _value(reader, key) for key in keys}


def _value(reader: Any, name: str) -> Any:
    """A field's value; float32 as the shortest decimal that it rounds from."""
    field = reader.get_field(name)
    if field is None:
        return None
    value = field.contents()
    if isinstance(value, float) and field.types[0].name == "FLOAT32":
        return float(str(np.float32(value)))
    return value


def _check(values: Mapping[str, Any], path: Path) -> None:
    wanted = (*SIZES, NUMBERS[0])
    if missing := [f"llama.{name}" for name in wanted if name not in values]:
        raise JropeError(f"{path}: missing {some(missing)}")
    wrong = [
        f"llama.{name} = {str(values[name])[:40]} (want a positive integer)"
        for name in INTEGERS
        if name in values and (type(values[name]) is not int or values[name] < 1)
    ]
    if wrong:
        raise JropeError(f"{path}: {some(wrong)}")


def make_config(
    values: Mapping[str, Any], tensors: Mapping[str, Lazy], path: Path
) -> LlamaConfig:
    """The configuration: metadata, and what the tensors' names and shapes tell."""
    hidden, heads = values["embedding_length"], values["attention.head_count"]
    head_dim = values.get("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if values.get(name, head_dim) != head_dim:
            raise JropeError(
                f"{path}: llama.{name} is {values[name]}, but heads have {head_dim} "
                "channels: config.json has one head_dim for all of them, hence no "
                "Hugging Face LLaMA is this model"
            )
    if "token_embd.weight" not in tensors:
        raise JropeError(f"{path}: missing token_embd.weight")
    theta = values.get("rope.freq_base", 10000.0)
    rope = Rope(theta=theta, rotary_dim=head_dim)
    scaling = read_scaling(values, rope, tensors.get(FACTORS), path)
    return LlamaConfig(
        vocab_size=values.get("vocab_size", tensors["token_embd.weight"].rows),
        hidden_size=hidden,
        intermediate_size=values["feed_forward_length"],
        num_hidden_layers=values["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values[NUMBERS[0]],
        hidden_act="silu",
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        initializer_range=0.02,
        rope=replace(rope, scaling=scaling),
        bos_token_id=values["tokenizer.ggml.bos_token_id"],
        eos_token_id=_ends(values),
        pad_token_id=values["tokenizer.ggml.padding_token_id"],
    )


def _ends(values: Mapping[str, Any]) -> tuple[int, ...]:
    ids = (values[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot"))
    return tuple(dict.fromkeys(i for i in ids if i is not None))
