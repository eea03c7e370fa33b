"""generation_config.json: how transformers' `generate` would draw tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jrope.errors import JropeError, is_integer, is_number
from jrope.hf.folders import GENERATION, PathLike, read_json

# What only sampling heeds, with transformers' value where the file has none.
_WARPERS: dict[str, float | None] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": None,
    "min_p": None,
}
_PENALTY = "repetition_penalty"
_COUNTS = ("max_new_tokens", "max_length")
# Fields without a counterpart here, with the value (beside 0, none and nothing) that
# changes no token.
_ELSEWHERE: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale"), 1),
    "encoder_repetition_penalty": 1,
    **dict.fromkeys(("min_new_tokens", "min_length", "max_time", "stop_strings")),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias")),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size")),
    **dict.fromkeys(("exponential_decay_length_penalty", "force_words_ids")),
    **dict.fromkeys(("constraints", "penalty_alpha", "dola_layers")),
    "watermarking_config": None,
}
_ELSEWHERE_SAMPLING = {"typical_p": 1, "top_h": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}


def read_generation_config(folder: PathLike) -> dict[str, Any]:
    """Read a folder's generation_config.json, without its nulls; {} where none is.

    Raises:
      JropeError: it is not a JSON object, do_sample is not true or false, a count of
        tokens is none, or a field of `Sampler` is not a number, whose ranges are left
        to `Sampler`.
    """
    path = Path(folder) / GENERATION
    if not path.is_file():
        return {}
    found = {k: value for k, value in read_json(path).items() if value is not None}
    numbers = {n: found[n] for n in (*_WARPERS, _PENALTY) if n in found}
    wrong = [
        f"{name}: got {value!r}, want a number"
        for name, value in numbers.items()
        if not is_number(value)
    ]
    wrong += [
        f"{name}: got {found[name]!r}, want a positive integer"
        for name in _COUNTS
        if name in found and not is_integer(found[name], at_least=1)
    ]
    if not isinstance(sample := found.get("do_sample", False), bool):
        wrong.append(f"do_sample: got {sample!r}, want true or false")
    if wrong:
        raise JropeError(f"{path}: {'; '.join(wrong)}")
    return found


def sampler_fields(
    found: Mapping[str, Any], *, sample: bool | None = None
) -> dict[str, Any]:
    """The fields of `Sampler` that transformers' `generate` takes from such a file.

    Greedy decoding heeds the repetition penalty alone.  A file that says do_sample has
    a temperature of 1 and a top_k of 50 where it names none, as in transformers.

    Args:
      found: what `read_generation_config` gives.
      sample: whether tokens are sampled; None: as do_sample says.
    """
    own = found.get("do_sample", False)
    names = [_PENALTY, *_WARPERS] if (own if sample is None else sample) else [_PENALTY]
    usual = {n: x for n, x in _WARPERS.items() if own and n in names and x is not None}
    return usual | {name: found[name] for name in names if name in found}


def new_tokens(found: Mapping[str, Any], prompt: int) -> int | None:
    """New tokens that such a file allows after a prompt of so many; None: any number.

    Its max_new_tokens, or else what its max_length leaves, 1 at least.
    """
    new, whole = (found.get(name) for name in _COUNTS)
    if new is None and whole is not None:
        return max(whole - prompt, 1)
    return new


def unsupported(found: Mapping[str, Any], *, sample: bool | None = None) -> list[str]:
    """The fields of such a file that change what transformers gives, but nothing here.

    Args:
      found, sample: as in `sampler_fields`.
    """
    sample = found.get("do_sample", False) if sample is None else sample
    neutral = {**_ELSEWHERE, **(_ELSEWHERE_SAMPLING if sample else {})}
    return [n for n, idle in neutral.items() if found.get(n) and found[n] != idle]
