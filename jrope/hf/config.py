"""Hugging Face's words for our things: config.json and LlamaConfig, both ways.

Pure: no files, no torch.  Both schemas are read (`rope_theta` and `rope_scaling` of
transformers 4, `rope_parameters` of 5, LongChat's `rope_condense_ratio`) and both are
written, so that transformers 4.57 and 5 build the same model (4.44 too, except for yarn
and longrope, of which it ignores fields).

A key is read, or listed in IGNORED with the reason, or in HARMLESS with the only values
that leave the model as it is.  Every other key raises, all named at once.

Tensor names need no table: the parameter tree is the tensor's name split at the dots.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from jrope.errors import JropeError, check, did_you_mean
from jrope.hf.rope import (
    ORIGINAL,
    PARTIAL,
    SCHEMAS,
    positive_integer,
    rope_from_hf,
    rope_to_hf,
)
from jrope.model.config import LlamaConfig

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# What an absent key means to transformers' LlamaConfig.
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
}

HANDLED = {
    *REQUIRED,
    *DEFAULTS,
    *SCHEMAS,
    *("model_type", "architectures", "num_key_value_heads", "head_dim"),
    *("rope_theta", "rope_condense_ratio", ORIGINAL, PARTIAL),
    *("eos_token_id", "pad_token_id"),
}

_WHY: dict[str, str] = {
    "_name_or_path name_or_path _commit_hash transformers_version is_llama_config "
    "unsloth_version unsloth_fixed": "provenance",
    "torch_dtype dtype": "each tensor of the file carries its own",
    "use_cache gradient_checkpointing use_reentrant _attn_implementation "
    "_attn_implementation_autoset attn_implementation _flash_attn_2_enabled "
    "torchscript return_dict output_attentions output_hidden_states is_decoder "
    "use_bfloat16": "how transformers runs the model, not what it computes",
    "id2label label2id num_labels problem_type finetuning_task": "classifiers only",
    "do_sample temperature top_k top_p typical_p min_length max_length max_new_tokens "
    "num_beams num_beam_groups num_return_sequences early_stopping length_penalty "
    "diversity_penalty repetition_penalty no_repeat_ngram_size bad_words_ids prefix "
    "encoder_no_repeat_ngram_size forced_bos_token_id forced_eos_token_id sep_token_id "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "remove_invalid_values return_dict_in_generate output_scores "
    "decoder_start_token_id task_specific_params": "settings of generation; "
    "`generate` takes a Sampler",
    "auto_map": "remote code, never run: model_type says that LLaMA is meant",
    "max_sequence_length": "an old double of max_position_embeddings",
    "attention_dropout": "training only, and `score` does without",
    "pretraining_tp": "products in slices, summed again: the weights are the same",
    "chunk_size_feed_forward": "rows in slices: the weights are the same",
    "tokenizer_class": "the tokenizer has files of its own",
    "transformers.js_config": "settings of a JavaScript runtime",
}
IGNORED = {key: why for keys, why in _WHY.items() for key in keys.split()}

# Keys that change the model unless they hold the first value (null where listed too).
HARMLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((None,), "dequantize the weights first"),
    "compression_config": ((None,), "dequantize the weights first"),
    "sliding_window": ((None,), "windowed attention is another architecture"),
    "use_sliding_window": ((False,), "windowed attention is another architecture"),
    "layer_types": ((None,), "layers of several kinds are another architecture"),
    "per_layer_config": ((None, {}), "layers of several kinds are not supported"),
    "pruned_heads": (({}, None), "layers of several kinds are not supported"),
    "rope_interleaved": ((False, None), "permute q and k to the half layout first"),
    "is_encoder_decoder": ((False,), "only decoders are supported"),
    "tie_encoder_decoder": ((False,), "only decoders are supported"),
    "add_cross_attention": ((False,), "only decoders are supported"),
    "cross_attention_hidden_size": ((None,), "only decoders are supported"),
}


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
    """Read a config.json of either schema.

    Args:
      config: the JSON object.  Sizes must be given; other absent keys mean what they
        mean to transformers.  A token id of -1 (old conversions) means none, and a null
        rope_theta the one in rope_scaling or rope_parameters.

    Raises:
      JropeError: keys that are unknown, unsupported or missing, all at once; or a value
        out of range; or a rotary embedding that readers would disagree about.
    """
    if problems := [*_architecture(config), *_unread(config)]:
        raise JropeError("; ".join(problems))
    heads = positive_integer(config, "num_attention_heads")
    if (head_dim := config.get("head_dim")) is None:
        hidden = positive_integer(config, "hidden_size")
        wanted = f"a multiple of num_attention_heads {heads}, as no head_dim is given"
        check(hidden % heads == 0, "hidden_size", hidden, wanted)
        head_dim = hidden // heads
    kv_heads, given = config.get("num_key_value_heads"), {**DEFAULTS, **config}
    fields: dict[str, Any]
    fields = {key: given.get(key) for key in (*REQUIRED, *DEFAULTS, "pad_token_id")}
    for key in ("bos_token_id", "pad_token_id"):
        fields[key] = None if fields[key] == -1 else fields[key]
    return LlamaConfig(
        **fields,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        rope=rope_from_hf(given, head_dim),
        eos_token_id=token_ids(config.get("eos_token_id", 2)),
    )


def config_to_hf(config: LlamaConfig, *, dtype: str | None = None) -> dict[str, Any]:
    """Write a config.json that transformers 4.57 and 5 and jrope read alike.

    Condensed positions and static NTK are written as what Hugging Face knows (see
    `hf.rope_to_hf`); `rope.precision` is a choice of the run and is not written.

    Args:
      config: any configuration that Hugging Face's words can describe.
      dtype: name of the weights' dtype, such as "bfloat16".

    Raises:
      JropeError: partial rotary, interleaved layout, condense with a scaling method.
    """
    wanted = f"head_dim ({config.head_dim}): LLaMA rotates whole heads there"
    rotary = config.rope.rotary_dim
    check(rotary == config.head_dim, "rope.rotary_dim", rotary, wanted)
    copied = (*REQUIRED, *DEFAULTS, "num_key_value_heads", "head_dim", "pad_token_id")
    eos = config.eos_token_id
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, key) for key in copied},
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        **rope_to_hf(config.rope),
        # transformers 4's word, and 5's
        **({} if dtype is None else {"torch_dtype": dtype, "dtype": dtype}),
    }


def token_ids(value: Any) -> tuple[int, ...]:
    """The ids of an `eos_token_id`: an integer, a list of them, or null; -1 is none."""
    if value is None:
        return ()
    ids = cast(list[Any], value) if isinstance(value, list) else [value]
    return tuple(token for token in ids if token != -1)


def _architecture(config: Mapping[str, Any]) -> Iterator[str]:
    if (kind := config.get("model_type", "llama")) != "llama":
        yield f"model_type is {kind!r}, want 'llama': other models are not supported"
    names = config.get("architectures")
    if names not in (None, ["LlamaForCausalLM"], ["LLaMAForCausalLM"]):  # older: LLaMA
        yield f"architectures is {names!r}, want ['LlamaForCausalLM']"
    if missing := [key for key in REQUIRED if key not in config]:
        yield f"missing {', '.join(missing)}"


def _unread(config: Mapping[str, Any]) -> Iterator[str]:
    for key, (values, advice) in HARMLESS.items():
        got = config.get(key, values[0])
        boolean = isinstance(got, bool)
        if not any(got == v and isinstance(v, bool) is boolean for v in values):
            yield f"{key} is {repr(got)[:80]}, want {values[0]!r}: {advice}"
    known = {*HANDLED, *IGNORED, *HARMLESS}
    if unknown := [key for key in config if key not in known]:
        names = ", ".join(f"{key!r}{did_you_mean(key, known)}" for key in unknown)
        yield (
            f"unknown {names}: correct or remove what does not change the model; a key "
            "that does belongs to another architecture"
        )
