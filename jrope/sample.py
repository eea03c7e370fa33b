"""Choosing the next token from logits, every row on its own.

No sorting: top-k and top-p bisect the 32 bits of the float for their exact cut-off.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jrope.errors import JropeError

# field: (value that switches it off, smallest, largest, the same in words)
_RANGES: dict[str, tuple[float, float, float, str]] = {
    "temperature": (0.0, 1e-6, 1e30, "0 (greedy) or from 1e-6 to 1e30"),
    "top_k": (0, 1, 2**31 - 1, "a whole number from 0 (off) to 2**31 - 1"),
    "top_p": (1.0, 0.0, 1.0, "from 0 to 1 (off)"),
    "min_p": (0.0, 0.0, 1.0, "from 0 (off) to 1"),
    "repetition_penalty": (1.0, 1e-6, 1e30, "from 1e-6 to 1e30 (1 is off)"),
}
_CHECKED = int | float | np.generic | np.ndarray | Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to draw tokens: a pytree of numbers, or of arrays [B] with one for each row.

    The stages run in the order of transformers and cost nothing while off in all rows.
    Changing numbers never recompiles. Concrete values are checked (JropeError names all
    that are out of range), traced ones cannot be.

    Args:
      temperature: logits are divided by it; 0 takes the best token (greedy).
      top_k: keeps the k largest logits and all that equal the k-th; 0 is off.
      top_p: keeps the fewest best tokens whose probabilities sum to at least top_p and
        all that equal the last, always the best; 1 is off. arXiv:1904.09751
      min_p: keeps tokens >= min_p times as likely as the best; 0: off. arXiv:2407.01082
      repetition_penalty: divides positive logits of seen tokens and multiplies negative
        ones, in greedy rows too; 1 is off. arXiv:1909.05858
    """

    temperature: ArrayLike = 0.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0
    min_p: ArrayLike = 0.0
    repetition_penalty: ArrayLike = 1.0

    def __post_init__(self) -> None:
        wrong: list[str] = []
        for f in fields(self):
            value, (off, low, high, words) = getattr(self, f.name), _RANGES[f.name]
            if isinstance(value, Tracer) or not isinstance(value, _CHECKED):
                continue  # tree transformations put all sorts of things into leaves
            x, kind = np.asarray(value), int if f.name == "top_k" else float
            whole = kind is float or np.issubdtype(x.dtype, np.integer)
            if not (whole and np.all((x == off) | ((x >= low) & (x <= high)))):
                wrong.append(f"{f.name} is {value}, wanted {words}")
            elif not isinstance(value, np.ndarray | Array):  # 1 is 1.0 is np.int8(1)
                object.__setattr__(self, f.name, kind(value))
        if wrong:
            raise JropeError("Sampler: " + "; ".join(wrong))

    @jax.jit
    def warp(self, logits: Array, seen: Array | None = None) -> Array:
        """Logits [B, V] whose softmax is drawn from, float32, -inf for removed tokens.

        `seen` bool [B, V] marks tokens that the row already holds (None: none of them).
        Greedy rows undergo the repetition penalty only. Misfits raise JropeError.
        """
        if logits.ndim != 2 or (seen is not None and seen.shape != logits.shape):
            got = f"{logits.shape} and {None if seen is None else seen.shape}"
            raise JropeError(f"Sampler: logits and seen are {got}, wanted [B, V] each")
        x = logits.astype(jnp.float32)
        t, k, p, m, r = (_column(self, f.name, len(x)) for f in fields(self))
        hot = t > 0  # greedy rows skip the filters: the best token passes them all
        if seen is not None:
            x = lax.cond(jnp.any(r != 1), _penalize, lambda x, *_: x, x, seen, r)

        def filters(x: Array) -> Array:
            x = x / jnp.where(hot, t, 1)
            x = _filter(hot & (k > 0), lambda x: _best(x, jnp.ones_like(x), k), x)
            x = _filter(hot & (p < 1), lambda x: _best(x, jax.nn.softmax(x), p), x)
            return _filter(hot & (m > 0), lambda x: _min_p(x, m), x)

        return lax.cond(jnp.any(hot), filters, lambda x: x, x)

    @jax.jit
    def __call__(self, logits: Array, keys: Array, seen: Array | None = None) -> Array:
        """Tokens int32 [B], each from its own row of `logits` and its own key alone.

        `keys` [B] are typed (`jax.random.key`); `logits` and `seen` are as for `warp`.
        Shapes that do not fit raise JropeError.
        """
        if keys.shape != logits.shape[:1]:
            got = f"{keys.shape} for logits {logits.shape}"
            raise JropeError(f"Sampler: keys are {got}, wanted [B]: jax.random.split")
        x = self.warp(logits, seen)
        draw, best = jax.vmap(jax.random.categorical), jnp.argmax(x, axis=-1)
        hot = _column(self, "temperature", len(x))[:, 0] > 0
        drawn = lax.cond(jnp.any(hot), lambda: draw(keys, x), lambda: best)
        return jnp.where(hot, drawn, best).astype(jnp.int32)


def log_probs(logits: Array, tokens: Array) -> Array:
    """log p(token) = x[token] - log sum exp x: [..., V], int [...] -> float32 [...]."""
    every = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0]


def _column(sampler: Sampler, name: str, batch: int) -> Array:
    value = jnp.asarray(getattr(sampler, name), jnp.float32)
    if value.shape not in ((), (batch,)):
        raise JropeError(f"Sampler: {name} is {value.shape}, wanted () or ({batch},)")
    return jnp.broadcast_to(value, (batch,))[:, None]


def _filter(on: Array, keep: Callable[[Array], Array], x: Array) -> Array:
    return lax.cond(
        jnp.any(on), lambda: jnp.where(on & ~keep(x), -jnp.inf, x), lambda: x
    )


def _penalize(x: Array, seen: Array, r: Array) -> Array:
    return jnp.where(seen, jnp.where(x < 0, x * r, x / r), x)


def _min_p(x: Array, m: Array) -> Array:
    return jnp.exp(x - jnp.max(x, axis=-1, keepdims=True)) >= m


def _best(x: Array, weight: Array, wanted: Array) -> Array:
    """x >= t, for the largest float t that keeps weights of sum >= `wanted`, or all."""
    target = jnp.minimum(wanted, jnp.sum(weight, axis=-1, keepdims=True))
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # no -0.0
    image = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # keeps order

    def decide_bit(i: Array, t: Array) -> Array:
        trial = t | (jnp.uint32(1) << (31 - i))
        total = jnp.sum(jnp.where(image >= trial, weight, 0), -1, keepdims=True)
        return jnp.where(total >= target, trial, t)

    t = lax.fori_loop(jnp.uint32(0), jnp.uint32(32), decide_bit, 0 * image[:, :1])
    return image >= jnp.minimum(t, jnp.max(image, axis=-1, keepdims=True))
