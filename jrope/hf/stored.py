"""What one quantised matrix is, in every format: (q - zero) scale, part by part.

There is one zero and scale for a row, a block, or a group of columns; formats differ
in names, in how integers lie in words, and in which tensors are transposed.  4-bit
integers lie in words of 32 bits, low bits first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from jrope.errors import JropeError
from jrope.hf.tensors import DTYPES

Fields: TypeAlias = Mapping[str, Any]
Shape: TypeAlias = tuple[int, int]
Parts: TypeAlias = Mapping[str, tuple[tuple[str, ...], list[tuple[int, ...]]]]
"""Last word of a tensor's name -> dtype codes and shapes, any of which will do."""
Read: TypeAlias = Callable[[str], np.ndarray]
"""Last word of a tensor's name -> its array, as it is stored."""
Part: TypeAlias = Callable[[Read, Shape], np.ndarray]

KEY = "quantization_config"
HINT = "dequantize the weights with the library that made them and save those"
FLOATS = tuple(DTYPES)
CENTRE = 8  # what is taken off 4-bit integers, and off their zeros


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one matrix [out, in] is stored.

    Attributes:
      main: last word of the name of the tensor that holds the integers.
      scale: of that which holds the scales.
      parts: of (out, in), the tensors there must be.
      integers: of them and (out, in), q [out, in]; of 4 bits, from -8 to 7.
      scales: [out, groups].
      zeros: as `scales`, for integers as `integers` gives them; None: they are 0.
      group: columns that share a scale; 0: all of them.
      index: [in], the group of each column, where the file tells.
      bits: of an integer, or of an 8-bit float.
      symmetric: whether the file says that the zeros it has are 0.
      rounds: whether to the scale's dtype, before the cast to the one asked for.
      unread: last words of tensors that are for activations, or repeat a shape.
    """

    main: str
    scale: str
    parts: Callable[[int, int], Parts]
    integers: Part
    scales: Part
    zeros: Part | None = None
    group: int
    index: Part | None = None
    bits: int = 8
    symmetric: bool = False
    rounds: bool = True
    unread: tuple[str, ...] = ()

    def columns(self, read: Read, shape: Shape) -> np.ndarray:
        """The group of each column: [in]."""
        if self.index is not None:
            return self.index(read, shape)
        return np.arange(shape[1]) // (self.group or shape[1])

    def widened(self, read: Read, shape: Shape) -> np.ndarray:
        """(q - zero) scale in float32: [out, in]."""
        index = self.columns(read, shape)
        values = np.array(self.integers(read, shape), np.float32, order="C")
        if self.zeros is not None:
            values -= as_float(self.zeros(read, shape))[:, index]
        values *= as_float(self.scales(read, shape))[:, index]
        return values


def want(fields: Fields, **values: tuple[Any, ...]) -> None:
    """Raise for fields that have none of some values; null is as good as absent."""
    bad = [
        f"{key} is {fields.get(key)!r}, want {' or '.join(map(repr, good))}"
        for key, good in values.items()
        if not any(
            type(fields.get(key)) is type(v) and fields.get(key) == v for v in good
        )
    ]
    if bad:
        raise JropeError("; ".join(bad))


def objects(name: str, values: list[Any]) -> list[Fields]:
    """Some values, all of which must be JSON objects."""
    if not values or not all(isinstance(value, dict) for value in values):
        raise JropeError(f"{name} is {repr(values)[:80]}, want JSON objects")
    return cast(list[Fields], values)


def positive(name: str, value: Any) -> int:
    """A value, which must be a whole number."""
    if type(value) is not int or value < 1:
        raise JropeError(f"{name} is {value!r}, want whole numbers, at least 1")
    return value


def group_size(fields: Fields) -> int:
    """Columns of a group; 0 where a row is one."""
    size = fields.get("group_size")
    return 0 if size == -1 else positive("group_size", size)


def groups(width: int, group: int) -> int:
    """How many groups a row has; a group of 0 is the whole row."""
    return -(-width // group) if group else 1


def nibbles(words: np.ndarray, order: tuple[int, ...] = ()) -> np.ndarray:
    """Integers -8..7 [n, 8 m] of words [n, m], low bits first, or eight in an order."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    values = np.stack([octets & 15, octets >> 4], axis=-1).view(np.int8)
    values = values.reshape(*words.shape, 8) - np.int8(CENTRE)
    return (values[..., list(order)] if order else values).reshape(len(words), -1)


def as_float(array: np.ndarray) -> np.ndarray:
    """The values in float32."""
    return array.astype(np.float32, copy=False)
