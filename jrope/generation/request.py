"""What a request for generation is: checked on the host, its shapes rounded up.

Only the rounded shapes are compiled for; lengths, sampler, seeds, stop ids and the
number of new tokens are traced.
"""

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, TypedDict, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jrope.errors import JropeError, check_count
from jrope.generation.checks import (
    check_bias,
    check_ids,
    check_type,
    integers,
    refuse_traced,
    shown,
)
from jrope.generation.guesser import Guesser, check_guesser
from jrope.generation.past import Bias, biases
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig
from jrope.model.inputs import PAD_RIGHT, refuse_unknown
from jrope.model.int8_cache import CacheDtype, check_cache_dtype
from jrope.model.placed import check_divides, check_rows, row_specs
from jrope.sharding.axes import Sums
from jrope.sharding.meshes import Layout

STOP_IDS = 8  # stop ids are padded to a multiple of this
SMALLEST_BUCKET = 16
LONGEST = 2**30  # tokens of a row: positions, and the buckets above them, are int32
_SAMPLING = "give sampler=Sampler(...), whose temperature 0 is greedy"
_REMEDIES = {  # arguments of transformers' generate -> what to give here
    **dict.fromkeys(("do_sample", *(f.name for f in fields(Sampler))), _SAMPLING),
    "attention_mask": PAD_RIGHT,
    "input_ids": "give them as prompt",
    "eos_token_id": "give stop_ids",
    "pad_token_id": "give pad_id",
    "max_length": "give max_new_tokens",
    "streamer": "take `stream`, an iterator",
    "sequence_bias": "give logit_bias, of single tokens",
}
LogitBias: TypeAlias = Mapping[int, float] | Sequence[Mapping[int, float]]


class Options(TypedDict, total=False):
    """What `generate` and `stream` take besides the prompt, all optional.

    Args:
      sampler: how tokens are drawn; None: greedy.
      key: a `jax.random` key; may be None when every row is greedy.
      seeds: integers [B]; None: 0, 1, 2, ...  Row b draws its token t with
        fold_in(fold_in(key, seeds[b]), t): of its own prompt and seed and the key, not
        of its neighbours.  What rounding adds to that: see `generate`.
      max_new_tokens: at most this many, 64; 0 is allowed.
      min_new_tokens: before these no stop id can be drawn, 0.
      stop_ids: ids that end a row; None: the config's eos_token_id.
      logit_bias: {token id: number from -100 to 100}, at most 300 that are added to
        logits before everything else; for all rows, or a list with one for each.
      pad_id: fills rows after their stop; None: the config's pad_token_id, else 0.
      prefill_chunk: tokens of the prompt at a time; None: all at once.
      cache_dtype: "int8" for keys and values in half the memory of 16 bits, each to
        within 0.4 % of the largest in its head; None: what the model computes in.
      sums: on a mesh, how devices add up their products: see `sharding.axes.Sums`.
      speculate: a `PromptLookup` or a `Draft`, which guesses tokens that one pass of
        the model then checks: the same tokens in fewer passes.  In 16 bits rounding may
        choose another where two are nearly as good.  None: one token a pass.
    """

    sampler: Sampler | None
    key: jax.Array | None
    seeds: Any
    max_new_tokens: int
    min_new_tokens: int
    stop_ids: Collection[int] | None
    logit_bias: LogitBias | None
    pad_id: int | None
    prefill_chunk: int | None
    cache_dtype: CacheDtype | None
    sums: Sums
    speculate: Guesser | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingParams:
    """The traced part of a request."""

    sampler: Sampler
    keys: jax.Array  # typed keys [B], one per row
    stop_ids: jax.Array  # int32 [n], -1 where unused
    least: jax.Array  # int32 [], new tokens before one of these
    pad_id: jax.Array  # int32 []
    bias: Bias | None


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
    layout: Layout | None = None  # the mesh, and what it splits
    speculate: Guesser | None = None  # what guesses `tokens` at a time
    cache_dtype: CacheDtype | None = None

    @property
    def capacity(self) -> int:
        """Cache slots: of the padded prompt and everything that may follow."""
        guesses = 0 if self.speculate is None else self.speculate.tokens
        return self.prompt.shape[1] + self.output_slots + guesses

    @property
    def fresh_cache(self) -> dict[str, Any]:
        """What `prefill` is told of the cache that it makes."""
        own = {} if self.cache_dtype is None else {"cache_dtype": self.cache_dtype}
        return {"capacity": self.capacity, **own}

    def place(self, tree: Any) -> Any:
        """Arrays whose first axis, if any, is the batch, as the layout splits rows."""
        if self.layout is None:
            return tree
        return self.layout.place(tree, row_specs(self.layout, tree))


def sampling_specs(layout: Layout, sampling: SamplingParams) -> Any:
    """How a request's sampling parameters are split."""
    whole: Any = PartitionSpec()
    return SamplingParams(
        sampler=row_specs(layout, sampling.sampler),
        keys=row_specs(layout, sampling.keys),
        stop_ids=whole,
        least=whole,
        pad_id=whole,
        bias=row_specs(layout, sampling.bias),
    )


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
    layout: Layout | None = None,
    *,
    sampler: Sampler | None = None,
    key: jax.Array | None = None,
    seeds: Any = None,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    stop_ids: Collection[int] | None = None,
    logit_bias: LogitBias | None = None,
    pad_id: int | None = None,
    prefill_chunk: int | None = None,
    cache_dtype: CacheDtype | None = None,
    sums: Sums = "auto",
    speculate: Guesser | None = None,
    **unknown: Any,
) -> Request:
    """Check a request and round its shapes up; arguments as `Options` and `generate`.

    Raises:
      JropeError: whatever is wrong, before anything is computed.
    """
    refuse_unknown("generate", unknown, _REMEDIES)
    refuse_traced(
        prompt=prompt,
        lengths=lengths,
        seeds=seeds,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
    )
    check_type("config", config, LlamaConfig, "give what `load` returns second")
    prompt = integers("prompt", prompt, "integers [B, T]")
    if prompt.ndim != 2:
        hint = "; a single prompt is [prompt]" if prompt.ndim == 1 else ""
        raise JropeError(f"prompt: got {shown(prompt)}, want integers [B, T]{hint}")
    batch, width = prompt.shape
    lengths = np.full(batch, width) if lengths is None else lengths
    lengths = integers("lengths", lengths, f"integers [{batch}]")
    _check_lengths(lengths, batch, width, config)
    valid = np.arange(width)[None, :] < lengths[:, None]
    check_ids("prompt", prompt[valid], config)
    check_count("max_new_tokens", max_new_tokens, 0)
    check_count("min_new_tokens", min_new_tokens, 0)
    if min_new_tokens > max_new_tokens:
        wanted = f"at most max_new_tokens, {max_new_tokens}"
        raise JropeError(f"min_new_tokens: got {min_new_tokens}, want {wanted}")
    if width + max_new_tokens > LONGEST:
        got = f"{max_new_tokens} after a prompt of {width}"
        raise JropeError(f"max_new_tokens: got {got}, want at most {LONGEST} in all")
    if prefill_chunk is not None:
        check_count("prefill_chunk", prefill_chunk, 1)
    check_cache_dtype(cache_dtype)
    if sums not in (kinds := get_args(Sums)):
        raise JropeError(f"sums: got {sums!r}, want one of {', '.join(kinds)}")
    padded = bucket(width)
    chunk = padded if prefill_chunk is None else min(prefill_chunk, padded)
    padded = -(-padded // chunk) * chunk
    tokens = np.zeros((batch, padded), np.int32)
    tokens[:, :width] = np.where(valid, prompt, 0)
    sampling = _sampling_params(batch, config, sampler, key, seeds, stop_ids, pad_id)
    least = jnp.asarray(min_new_tokens, jnp.int32)
    bias = _bias(logit_bias, batch, config)
    sampling = replace(sampling, least=least, bias=bias)
    if layout is not None:
        check_divides(config, layout)
        check_rows(batch, layout)
        layout = replace(layout, axes=replace(layout.axes, sums=sums))
        sampling = layout.place(sampling, sampling_specs(layout, sampling))
    request = Request(
        prompt=tokens,
        lengths=lengths.astype(np.int32),
        sampling=sampling,
        output_slots=bucket(max(max_new_tokens, 1)),
        max_new_tokens=int(max_new_tokens),
        prefill_chunk=chunk,
        width=width,
        layout=layout,
        cache_dtype=cache_dtype,
    )
    if speculate is None:
        return request
    room = request.capacity + getattr(speculate, "tokens", 0)
    check_guesser(speculate, config, room, layout)
    return replace(request, speculate=speculate)


def _check_lengths(
    lengths: np.ndarray, batch: int, width: int, config: LlamaConfig
) -> None:
    if lengths.shape != (batch,):
        hint = "; of a mask they are mask.sum(axis=1)" if lengths.ndim == 2 else ""
        raise JropeError(
            f"lengths: got {shown(lengths)}, want integers [{batch}]{hint}"
        )
    if batch == 0:
        raise JropeError("prompt: got no rows, want at least one")
    if bad := np.flatnonzero((lengths < 1) | (lengths > width)).tolist():
        hint = f"begin an empty prompt with bos_token_id ({config.bos_token_id})"
        got = f"rows {bad} have {lengths[bad].tolist()} tokens"
        raise JropeError(f"lengths: {got}, want 1 to {width}; {hint}")


def _sampling_params(
    batch: int,
    config: LlamaConfig,
    sampler: Sampler | None,
    key: jax.Array | None,
    seeds: Any,
    stop_ids: Collection[int] | None,
    pad_id: int | None,
) -> SamplingParams:
    sampler = Sampler() if sampler is None else sampler
    if not (callable(sampler) and hasattr(sampler, "temperature")):  # one's own will do
        check_type("sampler", sampler, Sampler, "such as Sampler(temperature=0.7)")
    own = not isinstance(sampler, Sampler)
    # Sampler itself cannot tell: tree transformations fill it, too.
    for f in () if own else fields(Sampler):
        value = getattr(sampler, f.name)
        if not isinstance(value, Tracer) and np.asarray(value).dtype.kind in "OSU":
            raise JropeError(f"Sampler: {f.name}: got {value!r}, want a number, or [B]")
    sampler = sampler if own else replace(sampler)  # which checks the numbers
    key = _one_key(key, sampler)
    seeds = np.arange(batch) if seeds is None else seeds
    seeds = integers("seeds", seeds, f"integers [{batch}]")
    if seeds.shape != (batch,):
        raise JropeError(f"seeds: got {shown(seeds)}, want integers [{batch}]")
    stops = _stop_ids(config.eos_token_id if stop_ids is None else stop_ids, config)
    stops += [-1] * (-len(stops) % STOP_IDS or (STOP_IDS if not stops else 0))
    pad = config.pad_token_id if pad_id is None else pad_id
    if pad is not None:
        check_count("pad_id", pad, -(2**31))
    folds = jnp.asarray(seeds.astype(np.uint32))
    return SamplingParams(
        sampler=sampler,
        keys=jax.vmap(jax.random.fold_in, (None, 0))(key, folds),
        stop_ids=jnp.asarray(stops, jnp.int32),
        least=jnp.zeros((), jnp.int32),
        pad_id=jnp.asarray(0 if pad is None else pad, jnp.int32),
        bias=None,
    )


def _bias(given: LogitBias | None, batch: int, config: LlamaConfig) -> Bias | None:
    if given is None:
        return None
    several = isinstance(given, Sequence) and not isinstance(given, str)
    every: list[Any] = [*given] if several else [given] * batch
    if len(every) != batch:
        raise JropeError(f"logit_bias: got {len(every)} of them for {batch} rows")
    for one in every:
        check_bias(one, config)
    return biases(every) if any(every) else None


def _stop_ids(given: Collection[int], config: LlamaConfig) -> list[int]:
    """Any collection of ids as a list."""
    ids = list(given) if isinstance(given, Set) else given
    array = integers("stop_ids", ids, "a list of integers")
    if array.ndim != 1:
        raise JropeError(f"stop_ids: got {shown(array)}, want a list of integers")
    check_ids("stop_ids", array, config)
    return array.tolist()


def _one_key(key: jax.Array | None, sampler: Sampler) -> jax.Array:
    """A typed scalar key; greedy rows need none."""
    wanted = "want a jax.random.key(...)"
    if key is None:
        t = sampler.temperature
        if isinstance(t, Tracer) or np.any(np.asarray(t) > 0):
            raise JropeError(f"key: got None, {wanted} to sample with")
        return jax.random.key(0)
    if not isinstance(key, jax.Array | np.ndarray):
        raise JropeError(f"key: got {key!r}, {wanted}")
    typed: Any = key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            typed = jax.random.wrap_key_data(key)
        except (TypeError, ValueError):
            got = f"{key.dtype} {list(key.shape)}"
            raise JropeError(f"key: got {got}, {wanted}") from None
    if typed.shape != ():
        raise JropeError(f"key: got shape {typed.shape}, want one key; rows have seeds")
    return typed


def chunk_inputs(request: Request, at: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, lengths and planned totals of the chunk of the prompts from `at` on."""
    size = request.prefill_chunk
    tokens = np.pad(request.prompt[:, at : at + size + 1], ((0, 0), (0, 1)))
    valid = np.clip(request.lengths - at, 0, size)
    planned = request.lengths + request.max_new_tokens
    chunk = tokens[:, : size + 1], valid.astype(np.int32), planned.astype(np.int32)
    return request.place(tuple(map(jnp.asarray, chunk)))


def first_token_inputs(
    request: Request,
) -> tuple[jax.Array, jax.Array, SamplingParams]:
    """Prompts, lengths and sampling parameters, as `first_token` takes them."""
    prompt = request.place((jnp.asarray(request.prompt), jnp.asarray(request.lengths)))
    return *prompt, request.sampling


def joined_scores(scores: list[Any], request: Request) -> jax.Array:
    """The scores of all chunks [B, T - 1], 0 past a prompt's end."""
    whole = jnp.concatenate(scores, axis=1)[:, : request.width - 1]
    known = np.arange(1, request.width)[None, :] < request.lengths[:, None]
    return jnp.where(known, whole, 0)
