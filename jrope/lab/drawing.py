"""The pictures of a report, each made from the results alone; imports matplotlib.

A method has one colour, marker and dash in every picture, so that a print without
colour and an eye that confuses colours can tell the lines apart.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatter, LogLocator, NullLocator

from jrope.lab.results import WINDOWS, Loss, Results, number, perplexity, tokens_text

MUTED = "#62626b"
COLORS = ("#1b1b1f", "#0a5fb4", "#c44e00", "#00795a", "#a8407f", "#8a6a00", "#147f93")
MARKERS = "osD^vPX<>*hd"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
DOTTED: Mapping[str, Any] = {"color": "black", "linestyle": (0, (1, 1.5)), "lw": 1.2}


def perplexity_figure(results: Results, windows: str, width: float) -> Figure:
    """Perplexity against context, both logarithmic, with intervals."""
    figure, axes = _one_axes(width, f"Perplexity {WINDOWS.get(windows, windows)}")
    axes.set(xscale="log", yscale="log", ylabel="perplexity, 95 % interval")
    contexts = results.contexts(windows)
    for rope in results.methods(windows):
        losses = [results.loss(windows, rope, context) for context in contexts]
        _intervals(axes, results, rope, contexts, losses, perplexity)
    _length_axis(
        axes, FixedLocator(contexts, nbins=int(width * 1.5)), "context, tokens"
    )
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    _mark_trained(axes, results.trained)
    return _with_legend(figure)


def positions_figure(results: Results, windows: str, width: float) -> Figure:
    """Loss by bucket of positions in the longest context; buckets are equally wide."""
    context = bucket_context(results, windows)
    found = {
        rope: {(b["first"], b["last"]): Loss.of(b) for b in record["buckets"]}
        for (kind, rope, c), record in results.losses.items()
        if (kind, c) == (windows, context)
    }
    spans = sorted({span for of in found.values() for span in of})
    text = f"Loss by position in windows of {context:,} tokens ({windows})"
    figure, axes = _one_axes(width, text)
    for i, (rope, of) in enumerate(found.items()):
        shift = ((i + 0.5) / len(found) - 0.5) * 0.6
        x, losses = np.arange(len(spans)) + 0.5 + shift, [*map(of.get, spans)]
        _intervals(axes, results, rope, x, losses, float)
    edges = [spans[0][0], *(last for _, last in spans)]
    ticks = range(len(edges))
    axes.set(xlim=(0, len(spans)), xlabel="position in the window, tokens")
    axes.xaxis.set_major_locator(FixedLocator(ticks, nbins=int(width * 1.7)))
    axes.xaxis.set_major_formatter(lambda i, _: tokens_text(edges[round(i)]))
    axes.set_ylabel("nats per token, 95 % interval")
    if edges[0] < (results.trained or 0) <= edges[-1]:
        place = float(np.interp(results.trained or 0, edges, ticks))
        _mark_trained(axes, results.trained, place)
    return _with_legend(figure)


def bucket_context(results: Results, windows: str) -> int:
    """The longest context with more than one bucket, or 0."""
    contexts = (
        context
        for (kind, _, context), record in results.losses.items()
        if kind == windows and len(record["buckets"]) > 1
    )
    return max(contexts, default=0)


def frequencies_figure(results: Results, width: float) -> Figure:
    """How many times longer each pair's wavelength is than the default's."""
    figure, axes = _one_axes(width, "How much slower each rotary pair turns")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    longest = results.longest()
    for i, (rope, record) in enumerate(longest.items()):
        base = np.asarray(record["base_inv_freq"], np.float64)
        speed = np.asarray(record["inv_freq"], np.float64) / record["condense"]
        slower = np.divide(base, speed, out=np.full_like(base, np.nan), where=speed > 0)
        still = int((speed == 0).sum())
        label = _label(results, rope) + f"\n{still} pairs stand still" * (still > 0)
        style: Any = look(results, rope) | {
            "markevery": (i * 0.06 / len(longest), 0.06)
        }
        axes.plot(2 * np.pi / base, slower, label=label, **style)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1 / 1.15), max(high, 1.6))
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.set_ylabel("wavelength, times the default's")
    _length_axis(axes, None, "wavelength without extension, tokens a turn")
    _mark_trained(axes, results.trained)
    return _with_legend(figure)


def passkey_figure(results: Results, width: float) -> Figure:
    """A heat map for each method, depths down, lengths across."""
    lengths = sorted({length for _, length, _ in results.passkeys})
    depths = sorted({depth for _, _, depth in results.passkeys})
    columns = max(1, int(width / max(2.2, 0.36 * len(lengths) + 0.8)))
    found = {rope for rope, _, _ in results.passkeys}
    height = 0.24 * len(depths) + 0.7
    figure, panels = _panels(results, found, width, columns, height)
    trials = {record["trials"] for record in results.passkeys.values()}
    for rope, axes in panels.items():
        _heat_map(axes, results, rope, lengths, depths, len(trials) > 1)
    counted = f"of {trials.pop()}" if len(trials) == 1 else "of those tried"
    text = f"length, tokens; in the cells: passkeys found, {counted}"
    figure.supxlabel(text, fontsize=9)
    figure.supylabel("depth of the passkey", fontsize=9)
    return figure


def _heat_map(
    axes: Axes,
    results: Results,
    rope: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    fractions: bool,
) -> None:
    rates = np.full((len(depths), len(lengths)), np.nan)
    style: Any = {"ha": "center", "va": "center", "fontsize": 7 if fractions else 8.5}
    for row, column in np.ndindex(rates.shape):
        if r := results.passkeys.get((rope, lengths[column], depths[row])):
            rates[row, column] = r["correct"] / max(r["trials"], 1)
            text = f"{r['correct']}/{r['trials']}" if fractions else str(r["correct"])
            color = "white" if rates[row, column] > 0.6 else "black"
            axes.text(column + 0.5, row + 0.5, text, color=color, **style)
    axes.pcolormesh(rates, cmap="Blues", vmin=0, vmax=1, edgecolors="white")
    axes.patch.set(hatch="///", edgecolor=MUTED, linewidth=0)  # where nothing covers it
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [*map(tokens_text, lengths)])
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{d:.0%}" for d in depths])
    axes.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
    axes.grid(False)
    inside = sum(length <= (results.trained or 0) for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside, **DOTTED)


def distance_figure(results: Results, width: float) -> Figure:
    """Mean score against distance for each method, the default behind it."""
    columns, plain = max(1, round(width / 3.1)), results.distances.get("default")
    figure, panels = _panels(results, results.distances, width, columns, 2.0)
    for rope, axes in panels.items():
        record, style = results.distances[rope], look(results, rope)
        x = record["distances"]
        axes.set_xscale("log", base=2)
        if plain and rope != "default":
            behind: Any = {"color": MUTED, "linestyle": "--", "lw": 1.1}
            axes.plot(plain["distances"], [*map(number, plain["scores"])], **behind)
        if "low" in record and "high" in record:
            low, high = ([*map(number, record[end])] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)
        scores = [*map(number, record["scores"])]
        axes.plot(x, scores, label=rope, markevery=0.1, **style)
        _length_axis(axes, None, "")
        _mark_trained(axes, results.trained)
    text = "distance, tokens; band: 10th to 90th percentile of heads"
    figure.supxlabel(textwrap.fill(text, int(width * 12)), fontsize=9)
    figure.supylabel("mean attention score before softmax", fontsize=9)
    return figure


def look(results: Results, rope: str) -> dict[str, Any]:
    """How a method is drawn in every figure alike; no two alike below 84 methods."""
    i = [*results.labels].index(rope)
    color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
    return {"color": color, "marker": marker, "linestyle": DASHES[i % len(DASHES)]}


def _label(results: Results, rope: str, width: int = 30) -> str:
    """What a method is called, at most three lines of it."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in results.labels[rope])
    return textwrap.fill(
        text, width, max_lines=3, placeholder="\N{HORIZONTAL ELLIPSIS}"
    )


def _one_axes(width: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.0 if width < 5 else 4.0))
    axes = figure.subplots()
    axes.set_title(textwrap.fill(title, int(width * 10)))
    return figure, axes


def _panels(
    results: Results, found: Iterable[str], width: float, columns: int, height: float
) -> tuple[Figure, dict[str, Axes]]:
    """Small axes of one height, one for each method that was found."""
    ropes = sorted(found, key=[*results.labels].index)
    columns = min(columns, len(ropes))
    rows = math.ceil(len(ropes) / columns)
    figure = Figure(figsize=(width, rows * height + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(ropes) :]:
        axes.remove()
    panels = dict(zip(ropes, grid.flat, strict=False))
    for rope, axes in panels.items():
        axes.set_title(_label(results, rope, int(width / columns * 9)))
    return figure, panels


def _intervals(
    axes: Axes,
    results: Results,
    rope: str,
    x: Any,
    losses: Sequence[Loss | None],
    scale: Callable[[float], float],
) -> None:
    """A method's line and its intervals, broken where nothing finite is known."""
    rows = [(e.nll, e.low, e.high) if e else (None,) * 3 for e in losses]
    values = np.array([[scale(number(v)) for v in row] for row in rows]).T
    middle, low, high = np.where(np.isfinite(values), values, np.nan)
    lost = sum(loss is not None for loss in losses) - int(np.isfinite(middle).sum())
    label = _label(results, rope) + f"\n{lost} not finite, not drawn" * (lost > 0)
    style, ends = look(results, rope), [middle - low, high - middle]
    axes.errorbar(x, middle, yerr=ends, elinewidth=1, label=label, **style)
    if np.isfinite(low).sum() > 1:  # a lone point has no band that one could see
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


def _length_axis(axes: Axes, locator: Any, words: str) -> None:
    """Name a logarithmic axis of lengths; its ticks: powers of four, if not given."""
    axes.xaxis.set_major_locator(locator or LogLocator(4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: tokens_text(round(value)))
    axes.set_xlabel(words)


def _mark_trained(axes: Axes, trained: int | None, place: float | None = None) -> None:
    """A dotted upright line where the training ended."""
    if trained is not None:
        label = f"trained: {tokens_text(trained)}"
        axes.axvline(trained if place is None else place, label=label, **DOTTED)


def _with_legend(figure: Figure) -> Figure:
    """Name the lines beside the axes, or below them where the figure is narrow."""
    wide, high = figure.get_figwidth() > 5, figure.get_figheight()
    legend = figure.legend(loc="outside right upper" if wide else "outside lower left")
    lines = 0.19 * sum(t.get_text().count("\n") + 1 for t in legend.get_texts())
    figure.set_figheight(max(high, lines + 0.5) if wide else high + lines)
    return figure
