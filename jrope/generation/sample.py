"""Choosing the next token from logits, every row on its own.

No sorting: top-k and top-p find their exact cut-off digit by digit of the float's bits,
in 8 passes over the vocabulary (32 on a CPU), and only where they are on.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jrope.errors import JropeError
from jrope.generation.past import Past
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.vocabulary import argmax, categorical, logsumexp, pick, softmax

# field: (value that switches it off, smallest, largest, the same in words)
_RANGES: dict[str, tuple[float, float, float, str]] = {
    "temperature": (0.0, 1e-6, 1e30, "0 (greedy) or from 1e-6 to 1e30"),
    "top_k": (0, 1, 2**31 - 1, "a whole number from 0 (off) to 2**31 - 1"),
    "top_p": (1.0, 0.0, 1.0, "from 0 to 1 (off)"),
    "min_p": (0.0, 0.0, 1.0, "from 0 (off) to 1"),
    "repetition_penalty": (1.0, 1e-6, 1e30, "from 1e-6 to 1e30 (1 is off)"),
    "frequency_penalty": (0.0, -2.0, 2.0, "from -2 to 2 (0 is off)"),
    "presence_penalty": (0.0, -2.0, 2.0, "from -2 to 2 (0 is off)"),
}
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
_CHECKED = int | float | np.generic | np.ndarray | Array

Stage = Callable[[Array], Array]


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to draw tokens: a pytree of numbers, or of arrays [B] with one for each row.

    The penalties come first, in vLLM's order, and then stages in that of transformers.
    They cost nothing while off in all rows. Changing numbers never recompiles. Concrete
    values are checked (JropeError names all that are out of range), traced ones cannot
    be, nor those that a program gives back.

    Args:
      temperature: logits are divided by it; 0 takes the best token (greedy).
      top_k: keeps the k largest logits and all that equal the k-th; 0 is off.
      top_p: keeps the fewest best tokens whose probabilities sum to at least top_p and
        all that equal the last, always the best; 1 is off. arXiv:1904.09751
      min_p: keeps tokens >= min_p times as likely as the best; 0: off. arXiv:2407.01082
      repetition_penalty: divides positive logits of seen tokens and multiplies negative
        ones, in greedy rows too; 1 is off. arXiv:1909.05858
      frequency_penalty: taken from a logit for each time that the row drew its token,
        in greedy rows too; tokens of the prompt do not count. 0 is off.
      presence_penalty: taken once from the logits of all tokens that the row drew.
    """

    temperature: ArrayLike = 0.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0
    min_p: ArrayLike = 0.0
    repetition_penalty: ArrayLike = 1.0
    frequency_penalty: ArrayLike = 0.0
    presence_penalty: ArrayLike = 0.0

    def __post_init__(self) -> None:
        wrong: list[str] = []
        for f in fields(self):
            value, (off, low, high, words) = getattr(self, f.name), _RANGES[f.name]
            if isinstance(value, Tracer) or not isinstance(value, _CHECKED):
                continue  # tree transformations put all sorts of things into leaves
            if isinstance(value, Array) and not value.is_fully_addressable:
                continue  # of several processes, checked before it was placed
            x, kind = np.asarray(value), int if f.name == "top_k" else float
            whole = kind is float or np.issubdtype(x.dtype, np.integer)
            good = whole & ((x == off) | ((x >= low) & (x <= high)))
            if not np.all(good):
                got = x[()] if x.ndim == 0 else [*x[~good].ravel()[:8].tolist()]
                wrong.append(f"{f.name}: got {got}, want {words}")
            elif not isinstance(value, np.ndarray | Array):  # 1 is 1.0 is np.int8(1)
                object.__setattr__(self, f.name, kind(value))
        if wrong:
            raise JropeError("Sampler: " + "; ".join(wrong))

    @jax.jit
    def warp(self, logits: Array, seen: Array | None = None) -> Array:
        """Logits [B, V] whose softmax is drawn from, float32, -inf for removed tokens.

        `seen` bool [B, V] marks tokens of the row's prompt (None: none of them), and
        int32 [B, V] counts those that it drew as well: see `Past`. Greedy rows undergo
        penalties only. Misfits raise JropeError.
        """
        x = self._given(logits, seen)
        if seen is not None:
            x = self._penalized(x, seen.astype(jnp.int32))
        some, search_k, search_p, _ = self._needs(len(x))
        stage = self._stage(len(x), search_k > 0, search_p > 0)
        return lax.cond(some > 0, stage, lambda x: x, x)

    @partial(jax.jit, static_argnames=("axes",))
    def __call__(
        self,
        logits: Array,
        keys: Array,
        seen: Array | Past | None = None,
        *,
        axes: Axes = ONE,
    ) -> Array:
        """Tokens int32 [B], each from its own row of `logits` and its own key alone.

        `keys` [B] are typed (`jax.random.key`); `logits` and `seen` are as for `warp`,
        or, with `axes`, a device's share of these. A `Past` may also hold what else is
        added to logits, before the penalties. Misfits raise JropeError.
        """
        if keys.shape != logits.shape[:1]:
            got = f"shape {list(keys.shape)} for logits {list(logits.shape)}"
            hint = f"jax.random.split(key, {len(logits)})"
            raise JropeError(f"Sampler: keys: got {got}, want one a row; give {hint}")
        x = self._given(logits, seen)
        past = Past(seen=seen) if isinstance(seen, Array) else seen
        hot = _column(self, "temperature", len(x))[:, 0] > 0

        def greedy(x: Array) -> Array:
            return argmax(x, axes)

        def drawing(with_k: Array | bool, with_p: Array | bool) -> Stage:
            stage = self._stage(len(x), with_k, with_p, axes)

            def draw(x: Array) -> Array:
                drawn = categorical(keys, stage(x), axes)
                return jnp.where(hot, drawn, greedy(x))

            return draw

        some, search_k, search_p, changed = self._needs(len(x), past, axes)
        ways = [greedy, *(drawing(k, p) for p in (False, True) for k in (False, True))]
        way = jnp.where(some > 0, 1 + search_k + 2 * search_p, 0)
        if past is not None:

            def anew(x: Array) -> Array:
                x = self._penalized(past.changed(x, axes), past.counts())
                # One way for all, where the other five would have to stand again.
                draw = drawing(search_k > 0, search_p > 0)
                return lax.cond(some > 0, draw, greedy, x)

            ways, way = [*ways, anew], jnp.where(changed > 0, len(ways), way)
        # One switch, not a condition for each stage: a GPU asks the host about each.
        return lax.switch(way, ways, x)

    def tree_flatten(self) -> tuple[tuple[ArrayLike, ...], None]:
        """The numbers, for JAX."""
        return tuple(getattr(self, f.name) for f in fields(self)), None

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, ArrayLike]], None]:
        """The numbers with their names, for JAX."""
        keys = [jax.tree_util.GetAttrKey(f.name) for f in fields(self)]
        return list(zip(keys, self.tree_flatten()[0], strict=True)), None

    @classmethod
    def tree_unflatten(cls, _: None, numbers: Iterable[Any]) -> "Sampler":
        """A sampler of these, unchecked: a look at them would wait for the device."""
        sampler = object.__new__(cls)
        for f, number in zip(fields(cls), numbers, strict=True):
            object.__setattr__(sampler, f.name, number)
        return sampler

    def _given(self, logits: Array, seen: Array | Past | None) -> Array:
        if logits.ndim != 2 or (seen is not None and seen.shape != logits.shape):
            shapes = [None if x is None else list(x.shape) for x in (logits, seen)]
            got = " and ".join(map(str, shapes))
            raise JropeError(f"Sampler: logits and seen: got {got}, want [B, V] each")
        return logits.astype(jnp.float32)

    def _penalized(self, x: Array, counts: Array) -> Array:
        """Logits x less their penalties; `counts` int32 [B, V] are those of `Past`."""
        repeated, often, once = (_column(self, name, len(x)) for name in _PENALTIES)
        less = jnp.where(x < 0, x * repeated, x / repeated)
        drawn = counts >> 1  # without the prompt's mark
        x = jnp.where(counts > 0, less, x) - often * drawn.astype(jnp.float32)
        return x - jnp.where(drawn > 0, once, 0)

    def _needs(self, batch: int, past: Past | None = None, axes: Axes = ONE) -> Array:
        """Whether any row draws, by top-k, by top-p, has its logits changed: 0 or 1."""
        hot, k, p = (_column(self, n, batch) for n in ("temperature", "top_k", "top_p"))
        hot = hot > 0
        penal = [_column(self, name, batch) != _RANGES[name][0] for name in _PENALTIES]
        flags = [hot, hot & (k > 0), hot & (p < 1), jnp.concatenate(penal, axis=1)]
        wanted = [jnp.any(flag) for flag in flags]
        if past is not None:
            wanted[-1] |= past.changes()
        return axes.largest_of_rows(jnp.stack(wanted).astype(jnp.int32))

    def _stage(
        self, batch: int, with_k: Array | bool, with_p: Array | bool, axes: Axes = ONE
    ) -> Stage:
        """Temperature and min-p, and of the searches those that are wanted."""
        names = "temperature", "top_k", "top_p", "min_p"
        t, k, p, m = (_column(self, name, batch) for name in names)
        hot = t > 0  # greedy rows skip the filters: the best token passes them all
        best = partial(_best, axes=axes)

        def top_k(x: Array) -> Array:
            return _drop(hot & (k > 0) & ~best(x, jnp.ones_like(x), k), x)

        def top_p(x: Array) -> Array:
            return _drop(hot & (p < 1) & ~best(x, softmax(x, axes), p), x)

        def warp(x: Array) -> Array:
            x = x / jnp.where(hot, t, 1)
            x = _where(with_p, top_p, _where(with_k, top_k, x))
            most = axes.largest(jnp.max(x, axis=-1, keepdims=True))
            likely = jnp.exp(x - most) >= m
            return _drop(hot & (m > 0) & ~likely, x)

        return warp


def log_probs(logits: Array, tokens: Array, axes: Axes = ONE) -> Array:
    """log p(token) = x[token] - log sum exp x: [..., V], int [...] -> float32 [...]."""
    if axes.tensor:
        return pick(logits, tokens, axes) - logsumexp(logits, axes)
    every = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0]


def _column(sampler: Sampler, name: str, batch: int) -> Array:
    value = jnp.asarray(getattr(sampler, name), jnp.float32)
    if value.shape not in ((), (batch,)):
        wanted = f"a number, or one for each of {batch} rows"
        raise JropeError(f"Sampler: {name}: got {list(value.shape)}, want {wanted}")
    return jnp.broadcast_to(value, (batch,))[:, None]


def _where(wanted: Array | bool, stage: Stage, x: Array) -> Array:
    """stage(x) where that is wanted, which a program need not ask if it is a bool."""
    if isinstance(wanted, bool):
        return stage(x) if wanted else x
    return lax.cond(wanted, stage, lambda x: x, x)


def _drop(out: Array, x: Array) -> Array:
    return jnp.where(out, -jnp.inf, x)


def _best(x: Array, weight: Array, wanted: Array, *, axes: Axes) -> Array:
    """x >= t, with the largest float t that keeps weights of sum `wanted`, or all."""
    every = axes.total(jnp.sum(weight, axis=-1, keepdims=True))
    target = jnp.minimum(wanted, every)
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # no -0.0
    image = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # keeps order
    # More bits at a time are fewer passes with more sums in each: not for a CPU.
    cutoff = partial(_cutoff, axes=axes)
    t = lax.platform_dependent(
        image, weight, target, cpu=partial(cutoff, bits=1), default=cutoff
    )
    return image >= jnp.minimum(t, axes.largest(jnp.max(image, axis=-1, keepdims=True)))


def _cutoff(
    image: Array, weight: Array, target: Array, *, axes: Axes, bits: int = 4
) -> Array:
    """The largest t for which the weights of image >= t reach the target, [B, 1].

    Found from its highest digit, of so many bits, to its lowest.
    """
    digits = jnp.arange(1 << bits, dtype=jnp.uint32)[None, :]

    def decide_digit(i: Array, t: Array) -> Array:
        trials = t | (digits << (jnp.uint32(32 - bits) - i * jnp.uint32(bits)))
        above = image[:, None, :] >= trials[:, :, None]
        totals = jnp.sum(jnp.where(above, weight[:, None, :], 0), axis=-1)
        totals = axes.total(totals)
        enough = jnp.sum(totals >= target, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.take_along_axis(trials, jnp.maximum(enough - 1, 0), axis=1)

    none, passes = jnp.zeros_like(image[:, :1]), jnp.uint32(32 // bits)
    return lax.fori_loop(jnp.uint32(0), passes, decide_digit, none)
