"""Whether a folder's tensors are those that its configuration asks for."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from jrope.errors import JropeError
from jrope.hf.folders import TABLES, differences
from jrope.hf.joined import split
from jrope.hf.quantized import open_dequantized
from jrope.hf.tensors import DTYPES, Tensors
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig, parameter_shapes

_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.")
_FEW = 1000  # layers beyond the tensors there are, whose shapes are still listed
_QUERY, _KEY = "self_attn.q_proj.weight", "self_attn.k_proj.weight"
_BIASES = {  # field -> what has a bias then, in every layer
    "attention_bias": [f"self_attn.{name}_proj" for name in "qkv"],
    "o_bias": ["self_attn.o_proj"],
    "mlp_bias": [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
}
_SIZES = {  # field -> the matrix and its axis that have this size
    "vocab_size": (EMBEDDING, 0),
    "hidden_size": (EMBEDDING, 1),
    "intermediate_size": ("mlp.gate_proj.weight", 0),
}


def open_checked(
    folder: Path, config: LlamaConfig, *, data: bool = True
) -> tuple[Tensors, list[str]]:
    """A folder's tensors, and which of them to load, once they agree with `config`.

    They have the names of `parameter_shapes`, of which a file may hold some as one
    or quantised.
    Left out are tables of rotary frequencies, and the head of a tied checkpoint, which
    must equal the embedding: that alone is data, and is not looked at unless `data`.

    Raises:
      JropeError: tensors missing, left over, of wrong shape or dtype, all at once.
    """
    tensors = split(open_dequantized(folder, config), config)
    shapes, codes = tensors.shapes, tensors.dtypes
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= {*shapes}:
        if data and not tensors.same(EMBEDDING, HEAD):
            raise not_tied(
                folder, *((codes[name], shapes[name]) for name in (EMBEDDING, HEAD))
            )
        del shapes[HEAD]
    shapes = {n: shape for n, shape in shapes.items() if not TABLES.fullmatch(n)}
    check_tensors(str(folder), config, shapes, codes)
    return tensors, [*shapes]


def not_tied(
    where: Path,
    embedding: tuple[str, tuple[int, ...]],
    head: tuple[str, tuple[int, ...]],
) -> JropeError:
    """The error for a tied checkpoint whose head is not its embedding.

    Args:
      where: begins the message.
      embedding, head: dtype and shape of each, which may be what differs.
    """
    how = f"differs from {EMBEDDING}"
    if head != embedding:
        kinds = [f"{dtype} {list(shape)}" for dtype, shape in (head, embedding)]
        how = f"is {kinds[0]} and {EMBEDDING} {kinds[1]}"
    return JropeError(
        f"{where}: tie_word_embeddings is true but {HEAD} {how}; set it to false in "
        "config.json, or delete the tensor"
    )


def check_tensors(
    where: str,
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    codes: Mapping[str, str] | None = None,
) -> None:
    """Compare tensors with what a configuration asks for.

    Args:
      where: begins the message.
      config: names and shapes derive from it.
      shapes: name -> shape of what there is.
      codes: name -> dtype code, where dtypes are to be checked too.

    Raises:
      JropeError: one, that lists all that differs.
    """
    wanted, _ = totals(config)
    found: list[str] = []
    if config.num_hidden_layers <= len(shapes) + _FEW:
        odd = {n: c for n, c in (codes or {}).items() if n in shapes}
        odd = {n: c for n, c in odd.items() if c not in DTYPES}
        found = differences(parameter_shapes(config), shapes, odd)
        if not found:
            return
    told = [
        f"{field} is {json.dumps(getattr(config, field))}, the tensors fit "
        f"{json.dumps(value)}"
        for field, value in fitting(config, shapes).items()
        if value != getattr(config, field)
    ]
    if not (found or told):
        told = [f"num_hidden_layers is {config.num_hidden_layers}"]
    counts = f"{len(shapes)} tensors, config.json asks for {wanted}"
    raise JropeError("; ".join([f"{where}: {counts}", *found, *told]))


def totals(config: LlamaConfig) -> tuple[int, int]:
    """How many tensors a configuration asks for, and how many elements they have."""
    one = parameter_shapes(config, layers=1)
    layer = {name: shape for name, shape in one.items() if _LAYER.match(name)}
    more = config.num_hidden_layers - 1
    elements = sum(map(math.prod, one.values()))
    each = sum(map(math.prod, layer.values()))
    return len(one) + more * len(layer), elements + more * each


def fitting(
    config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int | bool]:
    """The fields of a configuration as the tensors tell them, where they all agree.

    Args:
      config: decides what shapes alone cannot: the width of a head, or their number.
      shapes: name -> shape of what there is.
    """
    found = _alike(shapes)
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    fits: dict[str, int | bool] = {}
    if layers and layers == {*range(len(layers))}:
        fits["num_hidden_layers"] = len(layers)
    if EMBEDDING in shapes:
        fits["tie_word_embeddings"] = HEAD not in shapes
    biases = dict(_BIASES)
    if config.o_bias is None:  # then attention_bias speaks for o, too
        biases["attention_bias"] = biases["attention_bias"] + biases.pop("o_bias")
    for field, names in biases.items():
        given = [f"{name}.bias" in found for name in names]
        if layers and (all(given) or not any(given)):
            fits[field] = all(given)
    for field, (name, axis) in _SIZES.items():
        if len(shape := found.get(name, ())) == 2:
            fits[field] = shape[axis]
    heads = _heads(config, found)
    width = heads.get("head_dim", config.head_dim)
    n = config.num_attention_heads
    sizes = (config.hidden_size, fits.get("hidden_size"))
    if (config.head_dim * n, width * n) == sizes:  # the quotient of another hidden_size
        heads.pop("head_dim", None)
    return fits | heads


def _alike(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names without their layer -> shape, of those that are alike in all layers."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found.setdefault(_LAYER.sub("", name), set()).add(shape)
    return {name: shape for name, (shape, *more) in found.items() if not more}


def _heads(
    config: LlamaConfig, found: Mapping[str, tuple[int, ...]]
) -> dict[str, int | bool]:
    """Numbers of heads for config's head_dim; head_dim where both numbers then fit."""
    rows = [(found.get(name) or (0,))[0] for name in (_QUERY, _KEY)]
    fields = ("num_attention_heads", "num_key_value_heads")
    counts = [getattr(config, field) for field in fields]
    widths = {divmod(n, count) for n, count in zip(rows, counts, strict=True)}
    if len(widths) == 1 and (width := widths.pop())[1] == 0 and width[0]:
        return {"head_dim": width[0]}
    return {
        field: n // config.head_dim
        for field, n in zip(fields, rows, strict=True)
        if n and n % config.head_dim == 0
    }
