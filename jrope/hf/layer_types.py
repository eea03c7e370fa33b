"""Which layers have a window, in Hugging Face's words: layer_types, and older rules."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jrope.errors import check, is_integer

MOST_LAYERS = 10000  # that a list is made of
FULL, SLIDING = "full_attention", "sliding_attention"

Windows: TypeAlias = tuple[int | None, ...] | None
Rule: TypeAlias = Callable[[int], bool]
"""Whether layer i has the window, where a file has no layer_types."""


def windows(given: Mapping[str, Any], rule: Rule, *, used: bool = True) -> Windows:
    """Each layer's window, or None where no layer has one.

    Args:
      given: the config.json with its family's defaults; layer_types goes before `rule`.
      rule: the family's own.
      used: whether sliding_window counts at all.
    """
    window = given["sliding_window"] if used else None
    good = window is None or is_integer(window, at_least=1)
    check(good, "sliding_window", window, "null or a positive integer")
    count, types = given["num_hidden_layers"], given.get("layer_types")
    if window is None and types is None:
        return None
    check_layers(count)
    if types is None:
        slides = [rule(i) for i in range(count)]
    else:
        good = isinstance(types, list) and len(types) == count
        good = good and {*types} <= {FULL, SLIDING}
        wanted = f"{count} of {FULL!r} and {SLIDING!r}, one a layer"
        check(good, "layer_types", types, wanted)
        slides = [kind == SLIDING for kind in types]
    wanted = "a window, as layer_types names 'sliding_attention'"
    check(window is not None or not any(slides), "sliding_window", window, wanted)
    found = tuple(window if slide else None for slide in slides)
    return found if any(slides) else None


def check_layers(count: Any) -> None:
    """Raise a JropeError unless lists with so many entries can be made."""
    good = is_integer(count, at_least=1) and count <= MOST_LAYERS
    wanted = f"a positive integer, up to {MOST_LAYERS}"
    check(good, "num_hidden_layers", count, wanted)


def written(windows: Windows, layers: int) -> dict[str, Any]:
    """`layer_types` and `sliding_window`; the largest where windows differ."""
    each = windows or (None,) * layers
    return {
        "sliding_window": max((w for w in each if w is not None), default=None),
        "layer_types": [FULL if window is None else SLIDING for window in each],
    }
