"""Keys and values of 16 bits as the integers with their bits.

XLA's CPU backend moves integers as they are.  To take or to put some floats of 16 bits
it converts all of the array's to float32, and back (jax 0.10).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import jax
import jax.numpy as jnp


@final
@partial(
    jax.tree_util.register_dataclass,
    data_fields=("integers",),
    meta_fields=("dtype",),
)
@dataclass(frozen=True)
class Bits:
    """Slots of floats.

    Args:
      integers: uint16 [B, S, K, H].
      dtype: of the floats.
    """

    integers: jax.Array
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the floats."""
        return self.integers.shape

    @property
    def size(self) -> int:
        """How many floats there are."""
        return self.integers.size

    @property
    def floats(self) -> jax.Array:
        """All of them, which is a copy."""
        return jax.lax.bitcast_convert_type(self.integers, self.dtype)


def to_bits(x: jax.Array) -> Bits:
    """Floats of 16 bits as they are."""
    return Bits(jax.lax.bitcast_convert_type(x, jnp.uint16), x.dtype)
