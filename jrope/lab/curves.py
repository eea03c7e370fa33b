"""Figures of one axes with a named line for each method."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jrope.lab import drawing
from jrope.lab.drawing import finite, note
from jrope.lab.results import (
    WINDOWS,
    Loss,
    Results,
    listed,
    perplexity,
    tokens_text,
)
from jrope.lab.style import MUTED, SIZE, Axes, Figure, Look, chosen, new_figure, shorten


def perplexity_figure(results: Results, windows: str, width: float) -> Figure:
    """Perplexity against context, with bands."""
    methods, contexts = results.methods(windows), results.contexts(windows)
    figure, axes = _one_axes(width, len(methods))
    marks = [*contexts, *([results.trained] if results.trained else [])]
    drawing.length_axis(axes, contexts, "context, tokens")
    axes.set_xlim(min(marks) / 1.15, max(marks) * 1.15)
    seen: list[float] = []
    for rope, look in chosen([*results.labels], methods).items():
        losses = [results.loss(windows, rope, context) for context in contexts]
        seen += _curve(axes, contexts, losses, look, rope)
    drawing.perplexity_axis(axes, *_range(seen))
    drawing.mark_trained(axes, results.trained)
    axes.set_ylabel("perplexity")
    drawing.title(axes, f"Perplexity {WINDOWS.get(windows, windows)}, 95 % intervals")
    _note_missing(figure, results, windows)
    _label(figure, axes, results, methods, width)
    return figure


def _curve(
    axes: Axes, x: Sequence[float], losses: Sequence[Loss | None], look: Look, name: str
) -> list[float]:
    """A line of perplexities with its band, broken where nothing finite is known."""
    middle = [perplexity(loss.nll) if loss else math.nan for loss in losses]
    ends = [(e.low, e.high) if e else (None, None) for e in losses]
    low, high = (
        [math.nan if end is None else perplexity(end) for end in side]
        for side in zip(*ends, strict=True)
    )
    axes.plot(x, finite(middle), label=name, **look.line())
    band: Any = {"color": look.color, "alpha": 0.12, "linewidth": 0}
    axes.fill_between(x, finite(low), finite(high), **band)
    bars = [(a, b, c) for a, b, c in zip(x, low, high, strict=True) if b < c < math.inf]
    for at, bottom, top in bars:  # a lone point has no band that one could see
        axes.vlines(at, bottom, top, look.color, linewidth=1, alpha=0.7)
    return [v for v in (*middle, *low, *high) if math.isfinite(v)]


def positions_figure(results: Results, windows: str, width: float) -> Figure:
    """Loss by bucket of positions, in the longest context that has several."""
    context = bucket_context(results, windows)
    found = {
        rope: record["buckets"]
        for rope in results.methods(windows)
        if (record := results.losses.get((windows, rope, context)))
    }
    spans = sorted({(b["first"], b["last"]) for bs in found.values() for b in bs})
    figure, axes = _one_axes(width, len(found))
    shown = chosen([*results.labels], [*found])
    for i, (rope, buckets) in enumerate(found.items()):
        shift = ((i + 0.5) / len(found) - 0.5) * 0.6
        of = {(b["first"], b["last"]): Loss.of(b) for b in buckets}
        x = [j + 0.5 + shift for j in range(len(spans))]
        nll = finite([of[s].nll if s in of else math.nan for s in spans])
        axes.plot(x, nll, label=rope, **shown[rope].line())
        for at, span in zip(x, spans, strict=True):
            loss = of.get(span)
            if loss and loss.low is not None and loss.high is not None:
                axes.vlines(at, loss.low, loss.high, shown[rope].color, linewidth=1)
    _bucket_axis(axes, spans, results.trained, width)
    axes.set_ylabel("nats per token")
    text = f"Loss by position in windows of {context:,} tokens ({windows})"
    drawing.title(axes, f"{text}, 95 % intervals")
    _label(figure, axes, results, [*found], width)
    return figure


def bucket_context(results: Results, windows: str) -> int:
    """The longest context with more than one bucket, or 0."""
    return max(
        (
            context
            for (kind, _, context), record in results.losses.items()
            if kind == windows and len(record["buckets"]) > 1
        ),
        default=0,
    )


def _bucket_axis(
    axes: Axes, spans: Sequence[tuple[int, int]], trained: int | None, width: float
) -> None:
    """Buckets side by side, equally wide; the ticks are where they begin and end."""
    edges = [spans[0][0], *(last for _, last in spans)]
    step = math.ceil(len(edges) / (width * 1.7))
    ticks = [*range(len(edges) - 1, -1, -step)][::-1]
    axes.set_xticks(ticks, [tokens_text(edges[i]) for i in ticks])
    axes.set_xlim(0, len(spans))
    axes.set_xlabel("position in the window, tokens")
    if trained is not None and edges[0] < trained <= edges[-1]:
        at = float(np.interp(trained, edges, np.arange(len(edges))))
        style: Any = {"color": MUTED, "linestyle": (0, (1, 1.5))}
        axes.axvline(at, linewidth=1.1, zorder=1, **style)
        drawing.name_line(axes, at, f"trained: {tokens_text(trained)}")


def frequencies_figure(results: Results, width: float) -> Figure:
    """How many times longer each pair's wavelength is than the default's."""
    found = results.longest()
    figure, axes = _one_axes(width, len(found))
    shown = chosen([*results.labels], [*found])
    still, reach = 0, []
    for i, (rope, record) in enumerate(found.items()):
        base = np.asarray(record["base_inv_freq"], np.float64)
        speed = np.asarray(record["inv_freq"], np.float64) / record["condense"]
        still += int((speed == 0).sum())
        with np.errstate(divide="ignore"):
            slower = np.where(speed > 0, base / speed, np.nan)
        every = max(1, len(base) // 12)
        marks: Any = {"markevery": (i * every // max(len(found), 1), every)}
        axes.plot(2 * np.pi / base, slower, label=rope, **shown[rope].line(), **marks)
        reach += [*slower[np.isfinite(slower)]]
    drawing.length_axis(
        axes, _powers(axes), "wavelength without extension, tokens a turn"
    )
    axes.set_yscale("log", base=2)
    low, high = min([*reach, 1.0]), max([*reach, 1.0])
    axes.set_ylim(low / 1.15, max(high * 1.15, 1.6))
    ticks = 2.0 ** np.arange(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    axes.set_yticks(ticks)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    drawing.mark_trained(axes, results.trained)
    axes.set_ylabel("wavelength, times the default's")
    drawing.title(axes, "How much slower each rotary pair turns")
    if still:
        note(figure, f"Not drawn: {still} pairs that stand still.")
    _label(figure, axes, results, [*found], width)
    return figure


def _powers(axes: Axes) -> list[int]:
    """Powers of four that the data reach, for a tick each."""
    low, high = axes.dataLim.intervalx
    first, last = math.floor(math.log(low, 4)), math.ceil(math.log(high, 4))
    return [4**i for i in range(max(first, 0), last + 1)]


def _one_axes(width: float, lines: int) -> tuple[Figure, Axes]:
    """A figure with one axes, high enough for the names of all lines."""
    height = max(3.0 if width < 5 else 4.0, lines * SIZE * 1.4 / 72 + 1.3)
    figure = new_figure(width, height)
    return figure, figure.subplots()


def _label(
    figure: Figure, axes: Axes, results: Results, methods: Sequence[str], width: float
) -> None:
    """Name the lines at the right of the axes, where each one's last point is."""
    shown = chosen([*results.labels], methods)
    texts = shorten([results.labels[rope] for rope in methods], int(width * 3.8))
    ends: dict[str, tuple[float, float]] = {}
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    for rope in methods:
        points = np.asarray(lines[rope].get_xydata(), np.float64)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points):
            ends[rope] = (points[-1][0], points[-1][1])
    named = [text for rope, text in zip(methods, texts, strict=True) if rope in ends]
    looks = [shown[rope] for rope in ends]
    place = drawing.label_lines(axes, [*ends.values()], named, looks)
    figure.draw_without_rendering()
    place()


def _note_missing(figure: Figure, results: Results, windows: str) -> None:
    lost = [
        rope
        for (kind, rope, _), record in results.losses.items()
        if kind == windows and not math.isfinite(perplexity(Loss.of(record).nll))
    ]
    if lost:
        points = "1 point" if len(lost) == 1 else f"{len(lost)} points"
        names = listed(shorten([results.labels[r] for r in dict.fromkeys(lost)], 24))
        note(figure, f"Not drawn, for it is not finite: {points} of {names}.")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest, a little apart; 1 to 10 where there are none."""
    if not values:
        return 1.0, 10.0
    low, high = min(values), max(values)
    return (low, high) if high / low > 1.02 else (low / 1.05, high * 1.05)
