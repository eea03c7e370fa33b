"""The passkey test: can a model find five digits anywhere in a long text?

A sentence with a number is put at some depth of a text of no interest, and the model is
asked for it (Mohtashami and Jaggi 2023, arXiv:2305.16300; Chen et al. 2023).  Decoding
is greedy; an answer counts when its first digits are the number's, all of them and no
more.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.generation.loop import prefill
from jrope.generation.request import bucket
from jrope.generation.run import generate
from jrope.lab.memory import compile_fitting
from jrope.model.config import LlamaConfig
from jrope.sharding.meshes import layout_of, stand_in_rows
from jrope.tree import Params

NEW = 16  # tokens that an answer may take
HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and "
    "memorize it. I will quiz you about the important information there.\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again. "
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@final
@dataclass(frozen=True, kw_only=True)
class Passkeys:
    """Prompts of one length and depth, and what they hide.

    Args:
      prompts: token ids [trials, length - NEW].
      keys: the digits of each.
    """

    prompts: np.ndarray
    keys: tuple[str, ...]


def make_passkeys(
    encode: Callable[[str], Sequence[int]],
    length: int,
    depth: float,
    trials: int,
    *,
    filler: np.ndarray | None = None,
    first: Sequence[int] = (),
    seed: int = 0,
) -> Passkeys:
    """Prompts whose tokens and answer together have the length.

    Equal seeds give trial t the same key, and the same filler, at every depth and for
    every method.

    Args:
      encode: text to ids, without special tokens.
      length: tokens of prompt and answer.
      depth: where the key stands, 0 (first) to 1 (last).
      trials: prompts.
      filler: token ids to fill with, each trial from another place on; None: the
        papers' sentences, repeated.
      first: ids that begin a prompt, such as the model's first token.
      seed: of keys and places.

    Raises:
      JropeError: a depth outside 0 to 1, or no room for the question.
    """
    if not 0 <= depth <= 1:
        raise JropeError(f"depth: got {depth}, want a number from 0 to 1")
    head, tail = [*first, *encode(HEAD)], [*encode(QUESTION)]
    sentences = None if filler is not None else np.asarray(encode(FILLER), np.int32)
    prompts: list[np.ndarray] = []
    keys: list[str] = []
    for trial in range(trials):
        random = np.random.default_rng([seed, trial])
        key = f"{random.integers(10_000, 100_000)}"
        needle = [*encode(NEEDLE.format(key=key))]
        room = length - NEW - len(head) - len(needle) - len(tail)
        if room < 0:
            raise JropeError(
                f"passkey: a context of {length} tokens has no room for the question, "
                f"want at least {length - room}"
            )
        fill = _fill(sentences, filler, room, random)
        cut = round(depth * room)
        if sentences is not None and cut < room:
            cut -= cut % sentences.size  # between two rounds of the sentences
        parts = [head, fill[:cut], needle, fill[cut:], tail]
        prompts.append(np.concatenate([np.asarray(p, np.int32) for p in parts]))
        keys.append(key)
    return Passkeys(prompts=np.stack(prompts), keys=tuple(keys))


def _fill(
    sentences: np.ndarray | None,
    filler: np.ndarray | None,
    room: int,
    random: np.random.Generator,
) -> np.ndarray:
    if sentences is not None:
        return np.resize(sentences, room)
    text = np.asarray(filler, np.int32)
    if text.size < room:
        raise JropeError(f"filler: got {text.size} tokens, want at least {room}")
    start = int(random.integers(text.size - room + 1))
    return text[start : start + room]


def answer_passkeys(
    params: Params,
    config: LlamaConfig,
    passkeys: Passkeys,
    decode: Callable[[Sequence[int]], str],
    *,
    tokens_at_once: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[bool]:
    """Whether the model finds each key, greedily.

    Args:
      params, config: the model.
      passkeys: of `make_passkeys`.
      decode: ids to text.
      tokens_at_once: prompts are batched up to this many tokens; None: one by one.
      progress: called with the tokens of every batch that is done.

    Raises:
      JropeError: a batch does not fit in memory.
    """
    prompts = passkeys.prompts
    total, width = prompts.shape
    most = max(1, (tokens_at_once or 0) // (width + NEW))
    layout = layout_of(params)
    shares = 1 if layout is None else layout.size(layout.axes.batch)
    rows = -(-total // -(-total // (most * shares)))
    rows = -(-rows // shares) * shares
    check_memory(params, config, rows, width)
    found: list[bool] = []
    for at in range(0, total, rows):
        batch = np.resize(prompts[at : at + rows], (rows, width))
        out = generate(params, batch, config=config, max_new_tokens=NEW)
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        for i, key in enumerate(passkeys.keys[at : at + rows]):
            found.append(is_answer(decode(tokens[i, : lengths[i]].tolist()), key))
        if progress is not None:
            progress(len(found[at:]) * (width + NEW))
    return found


def is_answer(text: str, key: str) -> bool:
    """Whether the first digits of the text are the key.

    >>> [is_answer(text, "12345") for text in (" 12345.", " 123456", " 1 2345", "")]
    [True, False, False, False]
    """
    digits = re.search(r"[0-9]+", text)
    return digits is not None and digits.group() == key


def check_memory(params: Params, config: LlamaConfig, rows: int, width: int) -> None:
    """Raise a JropeError when the prompts and their cache do not fit.

    The compiled prefill is the one that `generate` will run.
    """
    padded, layout = bucket(width), layout_of(params)
    ints = stand_in_rows(jnp.zeros(rows, jnp.int32), layout)
    compile_fitting(
        prefill,
        f"passkey at {width + NEW} with {rows} prompts at once",
        params,
        stand_in_rows(jax.ShapeDtypeStruct((rows, padded + 1), jnp.int32), layout),
        *(ints, ints, None, None),
        config=config,
        capacity=padded + bucket(NEW),
        scored=False,
        layout=layout,
    )
