"""Axes of lengths and of perplexities, and labels beside lines that never overlap."""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jrope.lab.results import tokens_text
from jrope.lab.style import MUTED, SIZE, Axes, Figure, Look


def title(axes: Axes, text: str) -> None:
    """What an axes shows, at its upper left, broken to the figure's width."""
    figure: Any = axes.figure
    spec: Any = axes.get_subplotspec()
    columns = spec.get_gridspec().ncols
    characters = int(figure.get_figwidth() / columns * 11.5)
    axes.set_title(textwrap.fill(text, max(characters, 12)))


def length_axis(axes: Axes, lengths: Sequence[int], words: str) -> None:
    """A logarithmic axis from left to right with a tick at each length."""
    axes.set_xscale("log", base=2)
    first, last = min(lengths), max(lengths)
    margin = 1.12 if last > first else 1.6
    axes.set_xlim(first / margin, last * margin)
    axes.set_xticks(_thinned(axes, sorted(lengths)), minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: tokens_text(round(value)))
    axes.set_xlabel(words)


def _thinned(axes: Axes, lengths: Sequence[int]) -> list[int]:
    """The lengths whose labels do not touch; the last one stays."""
    figure: Any = axes.figure
    spec: Any = axes.get_subplotspec()
    inches = figure.get_figwidth() / spec.get_gridspec().ncols * 0.62
    span = math.log(lengths[-1] / lengths[0]) or 1.0
    kept: list[int] = []
    for length in reversed(lengths):
        apart = math.log(kept[-1] / length) / span * inches if kept else inches
        if apart >= 0.36:
            kept.append(length)
    return kept[::-1]


def mark_trained(axes: Axes, trained: int | None, *, words: bool = True) -> None:
    """A dotted upright line where the training ended, named above the axes."""
    low, high = axes.get_xlim()
    if trained is None or not low <= trained <= high:
        return
    axes.axvline(trained, color=MUTED, linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=1)
    if words:
        name_line(axes, trained, f"trained: {tokens_text(trained)}")


def name_line(axes: Axes, x: float, text: str) -> None:
    """Small words above an upright line, kept inside the axes' width."""
    part = float(
        axes.transAxes.inverted().transform(
            axes.transData.transform((x, axes.get_ylim()[0]))
        )[0]
    )
    side = "left" if part < 0.15 else "right" if part > 0.85 else "center"
    place: Any = axes.get_xaxis_transform()
    small: Any = {"fontsize": SIZE - 1.5, "color": MUTED, "ha": side, "va": "bottom"}
    axes.annotate(
        text,
        (x, 1.0),
        xycoords=place,
        xytext=(0, 2),
        textcoords="offset points",
        **small,
    )


def perplexity_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis upwards, ticks at round numbers: equal steps, equal nats."""
    axes.set_yscale("log")
    room = max((high / low) ** 0.06, 1.01)
    axes.set_ylim(low / room, high * room)
    axes.set_yticks(round_numbers(low / room, high * room))
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def round_numbers(low: float, high: float) -> list[float]:
    """Between four and nine round numbers from low to high, for a logarithmic axis."""
    if high / low < 4:
        from matplotlib.ticker import MaxNLocator

        near: Any = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10])
        return [float(t) for t in near.tick_values(low, high) if low <= t <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in steps]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) <= 9:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / 9))]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """The places nearest to those wanted that lie `gap` apart between low and high.

    Least squares: with the order fixed and i gaps taken from the i-th, the places are
    what isotonic regression finds.

    >>> spread([0.5, 0.5, 0.9], 0.1, 0.0, 1.0).round(2).tolist()
    [0.45, 0.55, 0.9]
    """
    order = np.argsort(wanted, kind="stable")
    blocks: list[tuple[float, int]] = []  # mean, count
    for i, at in enumerate(order):
        mean, count = float(wanted[at]) - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (mean * count + before * many) / (count + many), count + many
        blocks.append((mean, count))
    flat = np.array([mean for mean, count in blocks for _ in range(count)])
    top = max(low, high - gap * (len(order) - 1))
    placed = np.empty(len(order))
    placed[order] = np.clip(flat, low, top) + gap * np.arange(len(order))
    return placed


def label_lines(
    axes: Axes,
    ends: Sequence[tuple[float, float]],
    texts: Sequence[str],
    shown: Sequence[Look],
) -> Callable[[], None]:
    """Names at the right of the axes, each led to the end of its line.

    Returns:
      What moves the names apart; call it once the layout of the figure is known.
    """
    beside: Any = {"transform": axes.transAxes, "va": "center", "fontsize": SIZE}
    names = [
        axes.text(1.065, 0.5, text, color=look.color, **beside)
        for text, look in zip(texts, shown, strict=True)
    ]

    def place() -> None:
        points = axes.get_window_extent().height / axes.figure.dpi * 72
        to_part = axes.transData + axes.transAxes.inverted()
        wanted = [float(to_part.transform(end)[1]) for end in ends]
        places = spread(wanted, SIZE * 1.35 / points, 0.02, 0.98)
        for name, look, end, at in zip(names, shown, ends, places, strict=True):
            name.set_position((1.065, float(at)))
            _lead(axes, end, (1.035, float(at)), look)

    return place


def note(figure: Figure, text: str) -> None:
    """Words below everything else."""
    text = textwrap.fill(text, int(figure.get_figwidth() * 12))
    figure.supxlabel(text, fontsize=SIZE - 0.5, color=MUTED)


def finite(values: Sequence[float | None]) -> list[float]:
    """The numbers, NaN for those that cannot be drawn."""
    return [
        value if value is not None and math.isfinite(value) else math.nan
        for value in values
    ]


def _lead(
    axes: Axes, end: tuple[float, float], at: tuple[float, float], look: Look
) -> None:
    """A thin line from the end of a method's line to its marker beside the axes."""
    line: Any = {"arrowstyle": "-", "color": look.color, "linewidth": 0.7}
    line |= {"alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
    place: Any = {"textcoords": "axes fraction", "arrowprops": line}
    axes.annotate("", end, xytext=at, **place)
    beside: Any = {"transform": axes.transAxes, "clip_on": False}
    axes.plot([at[0]], [at[1]], **beside, **look.line())
