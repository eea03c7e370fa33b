"""What an engine cannot run, found before anything is computed."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
from jax.sharding import AxisType

from jrope.batch.block import ALTERNATIVES
from jrope.batch.slots import STOP_IDS
from jrope.batch.work import Work
from jrope.errors import JropeError, check, check_count, is_integer
from jrope.generation.checks import check_bias
from jrope.generation.guesser import Draft, Guesser, check_guesser
from jrope.model.config import LlamaConfig
from jrope.model.inputs import check_params
from jrope.sharding.meshes import Layout, layout_of
from jrope.tree import Params


def check_model(params: Params, config: LlamaConfig) -> None:
    """Raise a JropeError for a model whose rows could not stand beside others."""
    check_params(params)
    if (layout := layout_of(params)) is not None:
        check_mesh(layout)
    if config.rope.lengths == "hf":
        raise JropeError(
            'rope: got lengths "hf", by which a row depends on the longest one beside '
            'it; a batch whose rows come and go takes "planned" or "growing"'
        )


def check_mesh(layout: Layout) -> None:
    """Raise a JropeError for a mesh on which rows could not come and go."""
    size = layout.size(layout.axes.context)
    if size > 1:
        raise JropeError(
            f"mesh: got context={size}, which splits the sequence, but a batch's rows "
            "come and go by slots; split these by data, heads by model"
        )
    if AxisType.Explicit in layout.mesh.axis_types:
        raise JropeError("mesh: got explicit axes, want those of jrope.mesh")
    processes = {device.process_index for device in layout.mesh.devices.flat}
    if len(processes) > 1:
        raise JropeError(
            f"mesh: got devices of {len(processes)} processes, want those of one; give "
            "each process a mesh of its own and a shard of the rows"
        )


def check_slots(slots: int, layout: Layout | None) -> None:
    """Raise a JropeError unless the mesh divides so many slots."""
    check_count("slots", slots, 1)
    size = 1 if layout is None else layout.size(layout.axes.batch)
    if slots % size:
        nearest = max(round(slots / size), 1) * size
        raise JropeError(
            f"slots: got {slots}, which the mesh splits {size} ways; the nearest that "
            f"fits is {nearest}"
        )


def without_far_windows(
    config: LlamaConfig, capacity: int, width: int
) -> tuple[LlamaConfig, int]:
    """The model with far windows wider than all slots, and the longest row.

    A window is far where no row of `capacity` tokens is longer, so that this changes no
    answer; slots behind the longest row, for guesses and round numbers, then need not
    go round.
    """
    windows = config.windows or ()
    far = {w for w in windows if w is not None and w >= capacity}
    longer = tuple(max(w, width + 1) if w in far else w for w in windows) or None
    return replace(config, windows=longer), min(far, default=width)


def fit_guesser(
    speculate: Any, params: Params, config: LlamaConfig, capacity: int, width: int
) -> Guesser:
    """What guesses, where it is a draft as `without_far_windows`.

    Args:
      speculate: what was given.
      params, config: the model.
      capacity: tokens of the longest row.
      width: those, and of guesses behind it.

    Raises:
      JropeError: it cannot guess for this model, or for so long rows.
    """
    if isinstance(speculate, Draft):
        own, _ = without_far_windows(speculate.config, capacity, width)
        speculate = replace(speculate, config=own)
    check_guesser(speculate, config, width, layout_of(params))
    return speculate


def check_work(work: Work, config: LlamaConfig, capacity: int, logprobs: bool) -> None:
    """Raise a JropeError that says why a row cannot be run, naming its key."""
    try:
        _check_row(work, config, capacity)
        good = logprobs or work.logprobs is None
        wanted = "None: the engine was made with logprobs=False"
        check(good, "logprobs", work.logprobs, wanted)
    except JropeError as error:
        raise JropeError(f"row {work.key!r}: {error}") from None


def _check_row(work: Work, config: LlamaConfig, capacity: int) -> None:
    prompt, new = work.prompt, work.max_new_tokens
    whole = prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer)
    got = f"{prompt.dtype} {list(prompt.shape)}"
    check(bool(whole and prompt.size), "prompt", got, "integers [T], at least one")
    _check_ids("prompt", prompt, config)
    good = is_integer(work.shared, at_least=0) and work.shared < len(prompt)
    check(good, "shared", work.shared, f"tokens of a prompt of {len(prompt)}, not all")
    _check_ids("stop_ids", np.asarray(work.stop_ids, np.int64), config)
    got = len(work.stop_ids)
    check(got <= STOP_IDS, "stop_ids", got, f"at most {STOP_IDS} of them")
    check(is_integer(new, at_least=1), "max_new_tokens", new, "an integer, at least 1")
    good = is_integer(work.min_new_tokens, at_least=0) and work.min_new_tokens <= new
    check(good, "min_new_tokens", work.min_new_tokens, f"an integer from 0 to {new}")
    check_bias(work.logit_bias, config)
    if len(prompt) + new > capacity:
        got = f"{new} after a prompt of {len(prompt)}"
        raise JropeError(f"max_new_tokens: got {got}, want {capacity} in all at most")
    asked, most = work.logprobs, min(ALTERNATIVES, config.vocab_size)
    good = asked is None or (is_integer(asked, at_least=0) and asked <= most)
    check(good, "logprobs", asked, f"None, or an integer from 0 to {most}")
    for f in fields(work.sampler):
        value = getattr(work.sampler, f.name)
        check(np.ndim(value) == 0, f"sampler: {f.name}", value, "a number")


def _check_ids(name: str, ids: np.ndarray, config: LlamaConfig) -> None:
    wrong = np.unique(ids[(ids < 0) | (ids >= config.vocab_size)])[:8].tolist()
    check(not wrong, name, wrong, f"ids of a vocabulary of {config.vocab_size}")
