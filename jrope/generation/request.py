"""What a request for generation is: checked on the host, its shapes rounded up.

Only the rounded shapes are compiled for; lengths, sampler, seeds, stop ids and the
number of new tokens are traced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError, check_count
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig

STOP_IDS = 8  # stop ids are padded to a multiple of this
SMALLEST_BUCKET = 16
LONGEST = 2**30  # tokens of a row: positions, and the buckets above them, are int32


class Options(TypedDict, total=False):
    """What `generate` and `stream` take besides the prompt, all optional.

    Args:
      sampler: how tokens are drawn; None: greedy.
      key: a `jax.random` key; may be None when every row is greedy.
      seeds: integers [B]; None: 0, 1, 2, ...  Row b draws its token t with
        fold_in(fold_in(key, seeds[b]), t), so its tokens depend on its own prompt and
        seed and the key alone, not on its neighbours.
      max_new_tokens: at most this many, 64; 0 is allowed.
      stop_ids: ids that end a row; None: the config's eos_token_id.
      pad_id: fills rows after their stop; None: the config's pad_token_id, else 0.
      prefill_chunk: tokens of the prompt at a time; None: all at once.
    """

    sampler: Sampler | None
    key: jax.Array | None
    seeds: Any
    max_new_tokens: int
    stop_ids: Sequence[int] | None
    pad_id: int | None
    prefill_chunk: int | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingParams:
    """The traced part of a request."""

    sampler: Sampler
    keys: jax.Array  # typed keys [B], one per row
    stop_ids: jax.Array  # int32 [n], -1 where unused
    pad_id: jax.Array  # int32 []


@dataclass(frozen=True)
class Request:
    """A checked request; `prefill_chunk` divides the width of `prompt`."""

    prompt: np.ndarray  # int32 [B, T], padded to the bucket
    lengths: np.ndarray  # int32 [B]
    sampling: SamplingParams
    output_slots: int  # columns of the output buffer
    max_new_tokens: int
    prefill_chunk: int
    width: int  # T as given

    @property
    def capacity(self) -> int:
        """Cache slots: of the padded prompt and everything that may follow."""
        return self.prompt.shape[1] + self.output_slots


def bucket(length: int) -> int:
    """The padded length: powers of two from 16 and the points half way between them.

    >>> [bucket(n) for n in (1, 17, 25, 100, 1000, 1025)]
    [16, 24, 32, 128, 1024, 1536]
    """
    size = SMALLEST_BUCKET
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def prepare(
    prompt: Any,
    lengths: Any,
    config: LlamaConfig,
    *,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    seeds: Any = None,
    max_new_tokens: int = 64,
    stop_ids: Sequence[int] | None = None,
    pad_id: int | None = None,
    prefill_chunk: int | None = None,
) -> Request:
    """Check a request and round its shapes up; arguments as `Options` and `generate`.

    Raises:
      JropeError: whatever is wrong, before anything is computed.
    """
    try:
        prompt = np.asarray(prompt)
    except ValueError:  # NumPy's word for rows of unequal length
        hint = "pad every row on the right and pass lengths"
        raise JropeError(f"prompt: got rows of unequal length; {hint}") from None
    if prompt.ndim != 2 or not np.issubdtype(prompt.dtype, np.integer):
        got = f"{prompt.dtype} {list(prompt.shape)}"
        raise JropeError(f"prompt: got {got}, want integers [B, T]")
    batch, width = prompt.shape
    lengths = np.full(batch, width) if lengths is None else np.asarray(lengths)
    _check_lengths(lengths, batch, width, config)
    valid = np.arange(width)[None, :] < lengths[:, None]
    _check_ids("prompt", prompt[valid], config)
    check_count("max_new_tokens", max_new_tokens, 0)
    if width + max_new_tokens > LONGEST:
        got = f"{max_new_tokens} after a prompt of {width}"
        raise JropeError(f"max_new_tokens: got {got}, want at most {LONGEST} in all")
    if prefill_chunk is not None:
        check_count("prefill_chunk", prefill_chunk, 1)
    padded = bucket(width)
    chunk = padded if prefill_chunk is None else min(prefill_chunk, padded)
    padded = -(-padded // chunk) * chunk
    tokens = np.zeros((batch, padded), np.int32)
    tokens[:, :width] = np.where(valid, prompt, 0)
    return Request(
        prompt=tokens,
        lengths=lengths.astype(np.int32),
        sampling=_sampling_params(batch, config, sampler, key, seeds, stop_ids, pad_id),
        output_slots=bucket(max(max_new_tokens, 1)),
        max_new_tokens=int(max_new_tokens),
        prefill_chunk=chunk,
        width=width,
    )


def _check_lengths(
    lengths: np.ndarray, batch: int, width: int, config: LlamaConfig
) -> None:
    if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
        got = f"{lengths.dtype} {list(lengths.shape)}"
        raise JropeError(f"lengths: got {got}, want integers [{batch}]")
    if batch == 0:
        raise JropeError("prompt: got no rows, want at least one")
    if bad := np.flatnonzero((lengths < 1) | (lengths > width)).tolist():
        hint = f"begin an empty prompt with bos_token_id ({config.bos_token_id})"
        got = f"rows {bad} have {lengths[bad].tolist()} tokens"
        raise JropeError(f"lengths: {got}, want 1 to {width}; {hint}")


def _check_ids(name: str, ids: Any, config: LlamaConfig) -> None:
    ids = np.asarray(ids)
    if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
        got = f"{ids.dtype} {list(ids.shape)}"
        raise JropeError(f"{name}: got {got}, want a list of integers")
    bad = np.unique(ids[(ids < 0) | (ids >= config.vocab_size)])
    if bad.size:
        raise JropeError(
            f"{name}: ids {bad[:8].tolist()} lie outside the vocabulary of "
            f"{config.vocab_size}; does the tokenizer belong to this model?"
        )


def _sampling_params(
    batch: int,
    config: LlamaConfig,
    sampler: Sampler | None,
    key: jax.Array | None,
    seeds: Any,
    stop_ids: Sequence[int] | None,
    pad_id: int | None,
) -> SamplingParams:
    sampler = Sampler() if sampler is None else sampler
    key = _one_key(key, sampler)
    seeds = np.arange(batch) if seeds is None else np.asarray(seeds)
    if seeds.shape != (batch,) or not np.issubdtype(seeds.dtype, np.integer):
        got = f"{seeds.dtype} {list(seeds.shape)}"
        raise JropeError(f"seeds: got {got}, want integers [{batch}]")
    stop_ids = config.eos_token_id if stop_ids is None else stop_ids
    _check_ids("stop_ids", stop_ids, config)
    stops = list(stop_ids)
    stops += [-1] * (-len(stops) % STOP_IDS or (STOP_IDS if not stops else 0))
    pad = config.pad_token_id if pad_id is None else pad_id
    if pad is not None:
        check_count("pad_id", pad, -(2**31))
    folds = jnp.asarray(seeds.astype(np.uint32))
    return SamplingParams(
        sampler=sampler,
        keys=jax.vmap(jax.random.fold_in, (None, 0))(key, folds),
        stop_ids=jnp.asarray(stops, jnp.int32),
        pad_id=jnp.asarray(0 if pad is None else pad, jnp.int32),
    )


def _one_key(key: jax.Array | None, sampler: Sampler) -> jax.Array:
    """A typed scalar key; greedy rows need none."""
    if key is None:
        if np.any(np.asarray(sampler.temperature) > 0):
            raise JropeError("key: got None, want a jax.random.key(...) to sample with")
        return jax.random.key(0)
    if not isinstance(key, jax.Array | np.ndarray):
        raise JropeError(f"key: got {key!r}, want a jax.random.key(...)")
    legacy = not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    typed: Any = jax.random.wrap_key_data(key) if legacy else key
    if typed.shape != ():
        raise JropeError(f"key: got shape {typed.shape}, want one key; rows have seeds")
    return typed
