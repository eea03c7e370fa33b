"""4-bit matrices of a quantised folder as jrope's own: nothing of them is rounded.

The file's integers are put into the words of `model.packed`, its scales keep their
dtype, and its zeros become int8: three tensors under jrope's names instead of one.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from jrope.errors import JropeError
from jrope.hf.folders import some
from jrope.hf.quantized import Dequantized
from jrope.hf.stored import Part, Read, Scheme, Shape
from jrope.hf.tensors import DTYPES, Slot, Tensors
from jrope.model import packed

_HINT = "load it without quantize, or with 'int8'"
_CODES = {"U32": np.dtype(np.uint32), "I8": np.dtype(np.int8)}


class Held(Tensors):
    """A folder's tensors, each 4-bit matrix as `weight`, `scale` and maybe `zero`.

    Args:
      found: the folder's, with such matrices.
      names: of those to load.

    Raises:
      JropeError: groups of columns that are no whole words, or do not fill a row.
    """

    def __init__(self, found: Dequantized, names: Sequence[str]) -> None:
        super().__init__({})
        self._found, self._leaves = found, dict[str, tuple[str, Part]]()
        if bad := [n for n in names if n in found.matrices and not _group(found, n)]:
            got = f"groups of {found.scheme.group or 'all'} columns in {some(bad)}"
            wanted = f"groups of a multiple of {packed.IN_WORD}, and whole ones"
            raise JropeError(f"quantize is 'int4': got {got}, want {wanted}; {_HINT}")
        for name in names:
            if name in found.matrices:
                self._add(name)
            else:
                self.slots[name] = found.slots[name]

    def _add(self, name: str) -> None:
        scheme, slot = self._found.scheme, self._found.slots[name]
        out, width = slot.shape
        groups = width // _group(self._found, name)
        leaves: dict[str, tuple[str, int, Part]] = {
            "weight": ("U32", width // packed.IN_WORD, partial(_words, scheme)),
            "scale": (slot.dtype, groups, scheme.scales),
        }
        if scheme.zeros is not None and not scheme.symmetric:
            leaves["zero"] = ("I8", groups, scheme.zeros)
        for leaf, (code, columns, take) in leaves.items():
            whole, shape = f"{name.removesuffix('weight')}{leaf}", (out, columns)
            size = math.prod(shape) * {**DTYPES, **_CODES}[code].itemsize
            self.slots[whole] = Slot(code, shape, slot.path, 0, size)
            self._leaves[whole] = name, take

    def dtype(self, name: str, wanted: np.dtype[Any] | None = None) -> np.dtype[Any]:
        """As `Tensors.dtype`; what holds a 4-bit matrix keeps its own."""
        own = {**DTYPES, **_CODES}[self.slots[name].dtype]
        return own if name in self._leaves else wanted or own

    def read(
        self,
        name: str,
        dtype: np.dtype[Any] | None = None,
        part: tuple[slice, ...] | None = None,
    ) -> np.ndarray:
        """As `Tensors.read`; of a 4-bit matrix all is read, whatever the part."""
        if name not in self._leaves:
            return super().read(name, dtype, part)
        values = self._found.of_stored(*self._leaves[name])
        return np.ascontiguousarray(values if part is None else values[part])


def held(found: Tensors, names: Sequence[str]) -> Held | None:
    """Some tensors of a folder, as `Held`; None: no matrix has 4 bits."""
    if isinstance(found, Dequantized) and found.scheme.bits == 4 and found.matrices:
        return Held(found, names)
    return None


def _group(found: Dequantized, name: str) -> int:
    """Columns of a matrix's groups; 0 where they are none that words can hold."""
    width = found.slots[name].shape[1]
    group = found.scheme.group or width
    return 0 if group % packed.IN_WORD or width % group else group


def _words(scheme: Scheme, read: Read, shape: Shape) -> np.ndarray:
    """The integers as words, once it is certain that nothing else tells about them."""
    out, width = shape
    group = scheme.group or width
    if (scheme.columns(read, shape) != np.arange(width) // group).any():
        raise JropeError(f"g_idx has groups other than of {group} columns; {_HINT}")
    if scheme.symmetric and scheme.zeros is not None:
        zeros = scheme.zeros(read, shape)
        if zeros.any():
            raise JropeError(f"sym is true, but zeros are not all 8; {_HINT}")
    return packed.pack(scheme.integers(read, shape).reshape(out, -1, group))
