"""Ways of attention over several queries, of which the shape and the device choose."""

from functools import partial

import pytest

from jrope.model import attention, blockwise, context

WAYS = ("once", "blocks", "whole elsewhere", "blocks elsewhere")


def small_blocks(monkeypatch: pytest.MonkeyPatch, size: int = 8) -> None:
    """Blocks of that many queries and keys: short prompts go the long prompts' way."""
    monkeypatch.setattr(attention, "WHOLE", 0)
    monkeypatch.setattr(blockwise, "SCORES", 0)
    monkeypatch.setattr(blockwise, "SIZES", (size, size))
    for module in (blockwise, context):
        monkeypatch.setattr(module, "BLOCK", size)


def choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A way, of a CPU or of what other devices do; blocks are of 8."""
    if way.startswith("blocks"):
        small_blocks(monkeypatch)
    if way.endswith("elsewhere"):
        other = attention._whole if way.startswith("whole") else blockwise.blockwise
        # A function of its own: JAX keeps what it traced, with other blocks.
        monkeypatch.setattr(attention, "on_cpu", lambda *_: partial(other))
