"""The same model with another rotary embedding."""

import dataclasses
from typing import Any

from jrope.errors import JropeError
from jrope.model.config import LlamaConfig
from jrope.rope import Lengths, Method, Precision, build


def with_rope(
    config: LlamaConfig,
    method: str | Method | None = None,
    *,
    condense: float | None = None,
    precision: Precision | None = None,
    lengths: Lengths | None = None,
    **fields: Any,
) -> LlamaConfig:
    """The same model with another rotary embedding; weights stay as they are.

    A method replaces the whole embedding that the configuration has: positions are
    divided by nothing unless `condense` says so, and lengths are "planned" unless
    `lengths` says otherwise.  Without a method, only what is given changes.  Layers
    with an embedding of their own (`local_rope`) keep it.

    Args:
      config: any configuration.
      method: a name in `rope.ROPE_TYPES`, "default" for none, "condense" (with factor)
        for plain RoPE of divided positions, or a method object; None keeps what the
        configuration has.
      condense: divide positions by this.
      precision: "parity" or "accurate"; None keeps.
      lengths: "planned", "growing" or "hf", see `rope`.
      fields: the named method's fields.  `original_length` (or `original`) defaults to
        the trained length that the configuration states, longrope's `factor` to
        max_position_embeddings / original_length.

    Raises:
      JropeError: unknown name, or fields that the method lacks or does not have.

    >>> with_rope(config, "yarn", factor=4)  # doctest: +SKIP
    """
    changes: dict[str, Any] = {}
    if method is not None:
        changes = {"scaling": None, "condense": 1.0, "lengths": "planned"}
    if method == "condense":
        if set(fields) != {"factor"} or condense is not None:
            raise JropeError(
                f"rope 'condense' takes factor alone, got {sorted(fields)}"
            )
        condense = fields["factor"]
    elif isinstance(method, str):
        longest = config.max_position_embeddings
        trained = config.rope.trained_length or longest
        changes["scaling"] = build(method, fields, trained=trained, longest=longest)
    elif fields:
        raise JropeError(f"fields {sorted(fields)} given without a method's name")
    elif method is not None:
        changes["scaling"] = method
    given = {"condense": condense, "precision": precision, "lengths": lengths}
    changes |= {name: value for name, value in given.items() if value is not None}
    rope, local = dataclasses.replace(config.rope, **changes), config.local_rope
    if local is not None and precision is not None:
        local = dataclasses.replace(local, precision=precision)
    return dataclasses.replace(config, rope=rope, local_rope=local)
