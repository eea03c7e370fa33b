"""What arguments of generation are checked for on the host, before anything runs."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.core import Tracer

from jrope.errors import JropeError, is_integer, is_number
from jrope.model.config import LlamaConfig

MOST_BIASES = 300  # of a row, as in OpenAI's API


def refuse_traced(**values: Any) -> None:
    """Raise a JropeError that names what jit, vmap or grad trace: the host reads it."""
    traced = [
        name
        for name, value in values.items()
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))
    ]
    if traced:
        raise JropeError(
            f"{', '.join(traced)}: traced by jit, vmap or grad, but generation reads "
            "it on the host; call it outside, or `forward` with a cache inside"
        )


def check_type(name: str, value: object, wanted: type, hint: str) -> None:
    """Raise a JropeError unless this is one of those."""
    if not isinstance(value, wanted):
        got = f"a {type(value).__name__}"
        raise JropeError(f"{name}: got {got}, want a {wanted.__name__}; {hint}")


def integers(name: str, value: Any, wanted: str) -> np.ndarray:
    """What NumPy makes of a list, an array or a tensor, if that is integers."""
    if isinstance(value, Mapping):
        hint = 'give its "input_ids", and lengths'
        kind = type(cast(object, value)).__name__
        raise JropeError(f"{name}: got a {kind}, want {wanted}; {hint}")
    try:
        array = np.asarray(value)
    except ValueError:  # NumPy's word for rows of unequal length
        hint = "pad every row on the right and pass lengths"
        raise JropeError(f"{name}: got rows of unequal length; {hint}") from None
    except (TypeError, RuntimeError, NotImplementedError) as error:  # torch, on a GPU
        kind, hint = type(value).__name__, f"give {name}.cpu().numpy()"
        raise JropeError(f"{name}: got a {kind} ({error}); {hint}") from None
    if array.size and not np.issubdtype(array.dtype, np.integer):
        strings = array.dtype.kind == "U"
        hint = "; a tokenizer turns text into ids" if strings else ""
        raise JropeError(f"{name}: got {shown(array)}, want {wanted}{hint}")
    return array


def shown(array: np.ndarray) -> str:
    """Dtype and shape, as messages say them."""
    return f"{array.dtype} {list(array.shape)}"


def check_ids(name: str, ids: np.ndarray, config: LlamaConfig) -> None:
    """Raise a JropeError unless the vocabulary has all of these."""
    bad = np.unique(ids[(ids < 0) | (ids >= config.vocab_size)])
    if bad.size:
        raise JropeError(
            f"{name}: ids {bad[:8].tolist()} lie outside the vocabulary of "
            f"{config.vocab_size}; does the tokenizer belong to this model?"
        )


def check_bias(bias: Any, config: LlamaConfig) -> None:
    """Raise a JropeError unless this is {token id: what is added to its logit}."""
    wanted = f"at most {MOST_BIASES} {{token id: number from -100 to 100}}"
    if not isinstance(bias, Mapping):
        raise JropeError(f"logit_bias: got {bias!r}, want {wanted}")
    every = cast("Mapping[Any, Any]", bias)
    if len(every) > MOST_BIASES:
        raise JropeError(f"logit_bias: got {len(every)} of them, want {wanted}")
    wrong = {
        id: value
        for id, value in every.items()
        if not (is_integer(id, at_least=-(2**31)) and id < 2**31)
        or not (is_number(value) and -100 <= value <= 100)
    }
    if wrong:
        got = dict([*wrong.items()][:8])
        raise JropeError(f"logit_bias: got {got!r}, want {wanted}")
    check_ids("logit_bias", np.array([*every], np.int64), config)
