"""Figures of many small axes, one for each method: passkeys and distances."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jrope.lab import drawing
from jrope.lab.drawing import finite, note
from jrope.lab.results import Record, Results, tokens_text
from jrope.lab.style import (
    INK,
    MUTED,
    PAPER,
    SIZE,
    Axes,
    Figure,
    chosen,
    new_figure,
    shorten,
)


def passkey_figure(results: Results, width: float) -> Figure:
    """A heat map for each method, depths down, lengths across."""
    methods = [r for r in results.labels if any(k[0] == r for k in results.passkeys)]
    lengths = sorted({length for _, length, _ in results.passkeys})
    depths = sorted({depth for _, _, depth in results.passkeys})
    columns = max(1, int(width / max(2.2, 0.36 * len(lengths) + 0.8)))
    rows = math.ceil(len(methods) / columns)
    height = rows * (0.24 * len(depths) + 0.75) + 0.5
    figure = new_figure(width, height)
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    trials = {record["trials"] for record in results.passkeys.values()}
    texts = shorten([results.labels[r] for r in methods], int(width / columns * 9))
    for axes, rope, text in zip(grid.flat, methods, texts, strict=False):
        _heat_map(axes, results, rope, lengths, depths, len(trials) > 1)
        axes.set_title(text, pad=5)
    for axes in [*grid.flat][len(methods) :]:
        axes.remove()
    for i, axes in enumerate(grid.flat):
        if i < len(methods) <= i + columns:  # the last of its column
            axes.tick_params(labelbottom=True)
    counted = f"of {trials.pop()}" if len(trials) == 1 else "of those tried"
    figure.supxlabel(
        f"length, tokens; in the cells: passkeys found, {counted}",
        fontsize=SIZE,
    )
    figure.supylabel("depth of the passkey", fontsize=SIZE)
    return figure


def _heat_map(
    axes: Axes,
    results: Results,
    rope: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    fractions: bool,
) -> None:
    axes.grid(False)
    axes.set_facecolor("none")
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            record = results.passkeys.get((rope, length, depth))
            _cell(axes, column, row, record, fractions)
    axes.set_xlim(0, len(lengths))
    axes.set_ylim(len(depths), 0)
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [*map(tokens_text, lengths)])
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{d:.0%}" for d in depths])
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    inside = sum(length <= (results.trained or 0) for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside, color=INK, linewidth=1.6, linestyle=(0, (1, 1)))


def _cell(axes: Axes, x: int, y: int, record: Record | None, fractions: bool) -> None:
    from matplotlib.patches import Rectangle

    frame: Any = {"linewidth": 1, "edgecolor": PAPER}
    if record is None:
        hatch: Any = {"linewidth": 0, "hatch": "///"}
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor="none", **hatch))
        return
    rate = record["correct"] / max(record["trials"], 1)
    dark, light = np.array([8, 48, 107]), np.array([235, 243, 251])
    color = tuple(float(c) for c in (light + (dark - light) * rate) / 255)
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color, **frame))
    text = f"{record['correct']}/{record['trials']}" if fractions else record["correct"]
    ink = "#fefefe" if rate > 0.62 else "#111111"
    size: Any = {"fontsize": SIZE - (2 if fractions else 0.5)}
    axes.text(x + 0.5, y + 0.52, str(text), color=ink, ha="center", va="center", **size)


def distance_figure(results: Results, width: float) -> Figure:
    """Mean score against distance for each method, the default behind it."""
    found = [rope for rope in results.labels if rope in results.distances]
    columns = max(1, min(len(found), round(width / 3.1)))
    rows = math.ceil(len(found) / columns)
    figure = new_figure(width, rows * max(2.0, 0.22 * width / columns) + 0.6)
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    shown, plain = chosen([*results.labels], found), results.distances.get("default")
    texts = shorten([results.labels[r] for r in found], int(width / columns * 9))
    for axes, rope, text in zip(grid.flat, found, texts, strict=False):
        record = results.distances[rope]
        x = record["distances"]
        if plain is not None and rope != "default":
            axes.plot(
                plain["distances"],
                finite(plain["scores"]),
                lw=1.1,
                color=MUTED,
                linestyle=(0, (4, 2)),
            )
        if "low" in record and "high" in record:
            band: Any = {"color": shown[rope].color, "alpha": 0.12, "linewidth": 0}
            axes.fill_between(x, finite(record["low"]), finite(record["high"]), **band)
        every = max(1, len(x) // 10)
        axes.plot(
            x,
            finite(record["scores"]),
            label=rope,
            markevery=every,
            **shown[rope].line(),
        )
        axes.set_title(text, pad=12)
    farthest = max(max(results.distances[rope]["distances"]) for rope in found)
    for i, axes in enumerate([*grid.flat]):
        if i >= len(found):
            axes.remove()
            continue
        ticks = [4**i for i in range(math.floor(math.log(max(farthest, 1), 4)) + 1)]
        drawing.length_axis(axes, ticks, "")
        axes.set_xlim(0.9, max(farthest, 2) * 1.15)
        drawing.mark_trained(axes, results.trained)
        axes.tick_params(labelbottom=i + columns >= len(found))
    text = "distance, tokens; band: 10th to 90th percentile of heads"
    text += "; dashes: default" if plain and len(found) > 1 else ""
    note(figure, text)
    figure.supylabel("mean attention score before softmax", fontsize=SIZE)
    return figure
