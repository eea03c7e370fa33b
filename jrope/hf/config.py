"""Hugging Face's words for our things: config.json and LlamaConfig, both ways.

Pure: no files, no torch.  Both schemas are read (`rope_theta` and `rope_scaling` of
transformers 4, `rope_parameters` of 5, LongChat's `rope_condense_ratio`) and both are
written, so that transformers 4.57 and 5 build the same model (4.44 too, except for yarn
and longrope, of which it ignores fields).

A key is read, or listed in IGNORED with the reason, or in HARMLESS with the only values
that leave the model as it is.  Every other key raises, all named at once.

Tensor names need no table: the parameter tree is the tensor's name split at the dots.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

from jrope.errors import JropeError, check, did_you_mean
from jrope.hf.families import FAMILIES, Family
from jrope.hf.others import refusal
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

_FIELDS = {  # name -> default, where LLaMA has one
    field.name: field.default
    for field in dataclasses.fields(LlamaConfig)
    if field.name not in ("rope", "local_rope")
}

HANDLED = {
    *REQUIRED,
    *SCHEMAS,
    *("model_type", "architectures"),
    *("rope_theta", "rope_condense_ratio", ORIGINAL, PARTIAL),
}
"""What is read of every family, beside the keys of its `defaults`."""

_WHY: dict[str, str] = {
    "_name_or_path name_or_path _commit_hash transformers_version is_llama_config "
    "unsloth_version unsloth_fixed": "provenance",
    "torch_dtype dtype": "each tensor of the file carries its own",
    "use_cache gradient_checkpointing use_reentrant _attn_implementation "
    "_attn_implementation_autoset attn_implementation _flash_attn_2_enabled "
    "torchscript return_dict output_attentions output_hidden_states is_decoder "
    "use_bfloat16 cache_implementation": "how transformers runs the model, not what it "
    "computes",
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
    "attention_dropout residual_dropout resid_pdrop embd_pdrop": "training only, and "
    "`score` does without",
    "pretraining_tp": "products in slices, summed again: the weights are the same",
    "chunk_size_feed_forward": "rows in slices: the weights are the same",
    "tokenizer_class": "the tokenizer has files of its own",
    "transformers.js_config": "settings of a JavaScript runtime",
}
IGNORED = {key: why for keys, why in _WHY.items() for key in keys.split()}

# Keys that change the model unless they hold the first value (null where listed too).
# They do not stand here for the families that read them.
HARMLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((None,), "dequantize the weights first"),
    "compression_config": ((None,), "dequantize the weights first"),
    "attention_bias": ((False,), "this architecture does not read it"),
    "mlp_bias": ((False,), "this architecture does not read it"),
    "sliding_window": ((None,), "windowed attention is another architecture"),
    "use_sliding_window": ((False,), "windowed attention is another architecture"),
    "layer_types": ((None,), "layers of several kinds are another architecture"),
    "per_layer_config": ((None, {}), "layers of several kinds are not supported"),
    "lm_head_bias": ((False,), "a bias of the head is not supported"),
    "use_mrope": ((False,), "positions in three axes are not supported"),
    "full_attn_mod": ((1,), "no Phi-3 that transformers knows reads it"),
    "interpolate_factor": ((1,), "no Phi-3 that transformers knows reads it"),
    "use_bidirectional_attention": ((False, None), "only decoders are supported"),
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
    if problems := [*_architecture(config)]:
        raise JropeError("; ".join(problems))
    family = FAMILIES[config.get("model_type", "llama")]
    given = {**family.defaults, **config}
    fields = _fields(given, family)
    how: dict[str, Any] = {"partial": family.partial, "theta": family.theta}
    rope = rope_from_hf(family.rope(given), fields["head_dim"], **how)
    if family.local is not None and fields["windows"] is not None:
        local = rope_from_hf(family.local(given), fields["head_dim"], **how)
        fields["local_rope"] = None if local == rope else local
    return LlamaConfig(**fields, rope=rope)


def _fields(given: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """All fields but the rotary embedding, of a file with its family's defaults."""
    heads = positive_integer(given, "num_attention_heads")
    fields = {key: given.get(key) for key in (*REQUIRED, *family.defaults)}
    fields = {key: value for key, value in fields.items() if key in _FIELDS}
    if given["head_dim"] is None:
        hidden = positive_integer(given, "hidden_size")
        wanted = f"a multiple of num_attention_heads {heads}, as no head_dim is given"
        check(hidden % heads == 0, "hidden_size", hidden, wanted)
        fields["head_dim"] = hidden // heads
    if given["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    for key in ("bos_token_id", "pad_token_id"):
        fields[key] = None if fields[key] == -1 else fields[key]
    fields["eos_token_id"] = token_ids(given["eos_token_id"])
    kind = given.get("model_type", "llama")
    return {**fields, "model_type": kind, **family.read(given)}


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
    if config.model_type not in FAMILIES:
        raise JropeError(refusal(config.model_type))
    family = FAMILIES[config.model_type]
    rotary = config.rope.rotary_dim
    wanted = f"head_dim ({config.head_dim}): {family.architecture} rotates whole heads"
    good = family.partial or rotary == config.head_dim
    check(good, "rope.rotary_dim", rotary, wanted)
    eos = config.eos_token_id
    written: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{
            key: getattr(config, key)
            for key in (*REQUIRED, *family.defaults)
            if key in _FIELDS
        },
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
    }
    own = family.write(config)
    _check_told(config, {**written, **own}, family)
    return {
        **written,
        **rope_to_hf(config.rope),
        **own,
        # transformers 4's word, and 5's
        **({} if dtype is None else {"torch_dtype": dtype, "dtype": dtype}),
    }


def _check_told(
    config: LlamaConfig, written: Mapping[str, Any], family: Family
) -> None:
    """Raise a JropeError for fields that the family's file has no words for."""
    read = _fields({**family.defaults, **written}, family)
    lost = [
        f"{name} ({getattr(config, name)!r})"
        for name, default in _FIELDS.items()
        if getattr(config, name) != read.get(name, default)
    ]
    lost += ["local_rope"] * (config.local_rope is not None and family.local is None)
    if lost:
        raise JropeError(
            f"config.json of model_type {config.model_type!r} has no words for "
            f"{', '.join(lost)}; another model_type may have"
        )


def token_ids(value: Any) -> tuple[int, ...]:
    """The ids of an `eos_token_id`: an integer, a list of them, or null; -1 is none."""
    if value is None:
        return ()
    ids = cast(list[Any], value) if isinstance(value, list) else [value]
    return tuple(token for token in ids if token != -1)


def _architecture(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in FAMILIES:
        yield refusal(kind)
        return
    family, names = FAMILIES[kind], config.get("architectures")
    good = (None, [family.architecture], *([alias] for alias in family.aliases))
    if names not in good:
        yield f"architectures is {names!r}, want [{family.architecture!r}]"
    if missing := [key for key in REQUIRED if key not in config]:
        yield f"missing {', '.join(missing)}"
    yield from _unread(config, {*HANDLED, *family.defaults, *family.ignored})


def _unread(config: Mapping[str, Any], handled: set[str]) -> Iterator[str]:
    for key, (values, advice) in HARMLESS.items():
        if key in handled:
            continue
        got = config.get(key, values[0])
        boolean = isinstance(got, bool)
        if not any(got == v and isinstance(v, bool) is boolean for v in values):
            yield f"{key} is {repr(got)[:80]}, want {values[0]!r}: {advice}"
    known = {*handled, *IGNORED, *HARMLESS}
    if unknown := [key for key in config if key not in known]:
        names = ", ".join(f"{key!r}{did_you_mean(key, known)}" for key in unknown)
        yield (
            f"unknown {names}: correct or remove what does not change the model; a key "
            "that does belongs to another architecture"
        )
