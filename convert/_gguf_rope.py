"""A GGUF file's rotary scaling, read as llama.cpp reads it, as one of jrope's methods.

An absent type means linear, an absent factor is looked for under its old key,
rope.scale_linear, and no factor, or 0, means 1.  `rope_freqs.weight` holds what each
pair's frequency is divided by, which is all that such a file says of llama3 scaling.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _common import Lazy

from jrope.errors import JropeError
from jrope.hf.folders import some
from jrope.rope import Method, Rope, base_frequencies
from jrope.rope.methods import Linear, Llama3, Yarn

FACTORS = "rope_freqs.weight"
OLD_FACTOR = "rope.scale_linear"
PREFIX = "rope.scaling."
# Keys with which llama.cpp computes something else unless they hold this value; the
# ramp's weight, yarn_ext_factor, is another (below).
NEUTRAL = {
    "attn_factor": 1,
    "yarn_attn_factor": 1,
    "yarn_log_multiplier": 0,
    "alpha": 0,
}
BETAS = ("beta_fast", "beta_slow")
ROPE_KEYS = (
    OLD_FACTOR,
    *(f"{PREFIX}{name}" for name in ("type", "factor", "original_context_length")),
    *(f"{PREFIX}{name}" for name in ("finetuned", "yarn_ext_factor", *NEUTRAL)),
    *(f"{PREFIX}yarn_{name}" for name in BETAS),
)
LENGTHS = (8192, *(2**n for n in range(1, 25)))  # original lengths, Llama 3's first
PRECISION = 1e-5  # float32's rounding in the factors, where a factor is some tens


def read_scaling(
    values: Mapping[str, Any], rope: Rope, factors: Lazy | None, path: Path
) -> Method | None:
    """The method that the keys and the tensor of factors describe; None is plain.

    Args:
      values: the metadata, without its `llama.`.
      rope: the plain embedding.
      factors: the tensor `rope_freqs.weight`, if the file has it.
      path: of the file, for errors.
    """
    kind = values.get(f"{PREFIX}type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise JropeError(
            f"{path}: llama.rope.scaling.type is {kind!r}, want 'none', 'linear' or "
            "'yarn'; convert from the original checkpoint"
        )
    _check_neutral(values, kind, path)
    try:
        method = _method(values, kind)
    except JropeError as error:
        raise JropeError(f"{path}: llama.rope.scaling, {kind}: {error}") from None
    if factors is None:
        return method
    if method is not None:
        raise JropeError(
            f"{path} has {FACTORS} and {method}; want one of the two: config.json "
            "has a field for one scaling only"
        )
    if factors.dtype != "float32":
        raise JropeError(f"{path}: {FACTORS} is {factors.dtype}, want F32")
    return llama3(factors.read(), rope, path)


def _check_neutral(values: Mapping[str, Any], kind: str, path: Path) -> None:
    neutral = NEUTRAL | {"yarn_ext_factor": 1 if kind == "yarn" else 0}
    given = {name: values.get(PREFIX + name, want) for name, want in neutral.items()}
    if given["yarn_ext_factor"] == -1:  # not set
        del given["yarn_ext_factor"]
    wrong = [
        f"llama.{PREFIX}{name} = {value!r} (want {neutral[name]})"
        for name, value in given.items()
        if value != neutral[name]
    ]
    if wrong:
        raise JropeError(
            f"{path}: {some(wrong)} with rope scaling {kind!r}: Hugging Face's config "
            "has no such number; convert from the original checkpoint"
        )


def _method(values: Mapping[str, Any], kind: str) -> Method | None:
    factor = values.get(f"{PREFIX}factor", values.get(OLD_FACTOR)) or 1
    if kind == "none" or factor == 1:
        return None
    if kind == "linear":
        return Linear(factor=factor)
    length = values.get(f"{PREFIX}original_context_length") or values["context_length"]
    betas = {
        name: values[f"{PREFIX}yarn_{name}"]
        for name in BETAS
        if f"{PREFIX}yarn_{name}" in values
    }
    return Yarn(factor=factor, original_length=length, **betas)


def llama3(factors: np.ndarray, rope: Rope, path: Path) -> Method | None:
    """The llama3 method whose frequencies are the plain ones divided by `factors`.

    Scaling low_freq_factor, high_freq_factor and the original length by one number
    changes no frequency, so low_freq_factor is 1, as in every released model.
    """
    if np.all(factors == 1):
        return None
    plain = base_frequencies(rope.rotary_dim, rope.theta)
    if factors.shape == plain.shape and np.all((factors >= 1) & (factors < np.inf)):
        for length, high in _candidates(factors, plain / (2 * np.pi)):
            scaling = Llama3(
                factor=float(str(factors.max())),
                original_length=length,
                low_freq_factor=1.0,
                high_freq_factor=high,
            )
            stretched, _ = scaling(rope.rotary_dim, rope.theta, None)
            if np.allclose(factors, plain / stretched, rtol=PRECISION, atol=0):
                return scaling
    raise JropeError(
        f"{path}: {FACTORS} is not of Llama 3's kind: got {factors.size} numbers from "
        f"{factors.min(initial=np.inf):g} to {factors.max(initial=-np.inf):g}, want "
        f"{plain.size} that rise from 1 to one factor as llama3 scaling's do; "
        "config.json has no field for others"
    )


def _candidates(factors: np.ndarray, turns: np.ndarray) -> Iterator[tuple[int, float]]:
    """Original lengths and high_freq_factors to try, the most common first.

    Llama3's share of the plain frequency, (length * turns - 1) / (high - 1) clipped to
    0 and 1, follows from the factors; on the ramp it gives the length.
    """
    yield from ((length, 4.0) for length in LENGTHS)
    inverse = 1 / factors.astype(np.float64)
    share = (inverse - inverse.min()) / (1 - inverse.min())
    ramp, kept = (share > 0) & (share < 1), share == 1
    if not ramp.any():
        if kept.any():
            yield int(np.ceil(4 / turns[kept].min())), 4.0
        return
    highs = [4.0]
    if ramp.sum() > 1:
        _, offset = np.polyfit(turns[ramp], share[ramp], 1)
        highs += [round(1 - 1 / offset, 2)] if offset < 0 else []
    for high in highs:
        lengths = (1 + share[ramp] * (high - 1)) / turns[ramp]
        yield max(round(float(np.median(lengths))), 1), high
