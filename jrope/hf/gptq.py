"""gptq and awq: 4-bit integers, transposed, with zeros; awq's words in an order."""

from functools import partial

import numpy as np

from jrope.errors import JropeError
from jrope.hf.stored import (
    CENTRE,
    FLOATS,
    HINT,
    Fields,
    Parts,
    Read,
    Scheme,
    Shape,
    group_size,
    groups,
    nibbles,
    want,
)

_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of an AWQ word that holds each column
_in_order = partial(nibbles, order=_COLUMNS)


def gptq(fields: Fields) -> Scheme:
    """The scheme of gptq's fields, of either version: the first stores zero - 1."""
    want(fields, bits=(4,), pack_dtype=("int32", None), dynamic=(None, {}))
    want(fields, lm_head=(False, None), desc_act=(True, False, None))
    versions = ("gptq", "gptq_v2", None)
    want(fields, checkpoint_format=versions, format=versions)
    version = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    group = group_size(fields)

    def index(read: Read, shape: Shape) -> np.ndarray:
        found, last = read("g_idx"), groups(shape[1], group) - 1
        if (np.diff(found, prepend=0, append=last) < 0).any():
            raise JropeError(f"g_idx (desc_act) is not ascending over groups; {HINT}")
        return found

    def zeros(read: Read, shape: Shape) -> np.ndarray:
        zero = nibbles(read("qzeros"))[:, : shape[0]].T
        if version == "gptq" and (zero == 15 - CENTRE).any():
            raise JropeError(
                f"a zero is stored as 15: readers take it for 0 or 16; {HINT}"
            )
        return zero + np.int8(version == "gptq")

    def parts(out: int, width: int) -> Parts:
        n = groups(width, group)
        return {
            "qweight": (("I32",), [(-(-width // 8), out)]),
            "qzeros": (("I32",), [(n, -(-out // 8))]),
            "scales": (FLOATS, [(n, out)]),
            "g_idx": (("I32",), [(width,)]),
        }

    return Scheme(
        main="qweight",
        scale="scales",
        parts=parts,
        integers=lambda read, shape: nibbles(read("qweight").T)[:, : shape[1]],
        scales=_scales,
        zeros=zeros,
        group=group,
        index=index,
        bits=4,
        symmetric=fields.get("sym") is True,
    )


def awq(fields: Fields) -> Scheme:
    """The scheme of awq's fields."""
    want(fields, bits=(4,), zero_point=(True,), version=("gemm", "GEMM", None))
    group = group_size(fields)

    def parts(out: int, width: int) -> Parts:
        n = groups(width, group)
        return {
            "qweight": (("I32",), [(width, -(-out // 8))]),
            "qzeros": (("I32",), [(n, -(-out // 8))]),
            "scales": (FLOATS, [(n, out)]),
        }

    return Scheme(
        main="qweight",
        scale="scales",
        parts=parts,
        integers=lambda read, shape: _in_order(read("qweight"))[:, : shape[0]].T,
        scales=_scales,
        zeros=lambda read, shape: _in_order(read("qzeros"))[:, : shape[0]].T,
        group=group,
        bits=4,
    )


def _scales(read: Read, _: Shape) -> np.ndarray:
    return read("scales").T
