"""The tables of a report: every number that was measured, under its head."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jrope.lab.findings import ranking, winners
from jrope.lab.results import (
    WINDOWS,
    Loss,
    Record,
    Results,
    figure,
    nats,
    number,
    perplexity,
)

NONE = "\N{EN DASH}"


class Table(NamedTuple):
    """A caption, a head for each column, and cells; the first of a row is its head."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def perplexity_table(results: Results, windows: str) -> Table:
    """Methods down, contexts across: the perplexity and, below it, its interval."""
    cells: dict[tuple[tuple[str, ...], int], str] = {}
    for context in results.contexts(windows):
        best = winners(ranking(results, windows, context))
        for rope in results.methods(windows):
            if loss := results.loss(windows, rope, context):
                text = _interval(loss, lambda nll: figure(perplexity(nll)))
                star = "\N{BLACK STAR} " if rope in best else ""
                cells[(rope,), context] = star + text
    caption = f"Perplexity {WINDOWS.get(windows, windows)}, by context in tokens; below"
    caption += " it the 95 % interval; the lowest of a column has a star"
    return _grid(results, caption, cells)


def bucket_tables(results: Results) -> list[Table]:
    """Losses by position, one table for each context, the longest first."""
    found = {(w, c) for (w, _, c), r in results.losses.items() if r["buckets"]}
    order = sorted(found, key=lambda key: (results.windows.index(key[0]), -key[1]))
    return [_bucket_table(results, *key) for key in order]


def _bucket_table(results: Results, windows: str, context: int) -> Table:
    cells = {
        ((rope,), (b["first"], b["last"])): _interval(Loss.of(b), nats)
        for (kind, rope, c), record in results.losses.items()
        if (kind, c) == (windows, context)
        for b in record["buckets"]
    }
    caption = f"Nats per token by position in windows of {context:,} tokens ({windows})"
    return _grid(results, caption, cells, lambda s: f"{s[0]:,} to {s[1] - 1:,}")


def _interval(loss: Loss, write: Callable[[float], str]) -> str:
    """A mean and, on a line of its own, its interval where that is known."""
    if loss.low is None or loss.high is None:
        return write(loss.nll)
    return f"{write(loss.nll)}\n{write(loss.low)}{NONE}{write(loss.high)}"


def _grid(
    results: Results,
    caption: str,
    cells: Mapping[tuple[tuple[str, ...], Any], str],
    head: Callable[[Any], str] = "{:,}".format,
    second: Sequence[str] = (),
) -> Table:
    """A table from (row, column) -> text; a row is a method and what `second` names."""
    columns = sorted({column for _, column in cells})
    rows = [
        [
            results.labels[rope],
            *more,
            *(cells.get(((rope, *more), c), NONE) for c in columns),
        ]
        for rope, *more in dict.fromkeys(row for row, _ in cells)
    ]
    return Table(caption, ["method", *second, *map(head, columns)], rows)


def loss_table(results: Results) -> Table:
    """Every measurement of perplexity, one a row."""
    heads = "method,windows,context,stride,tokens,nats per token,low,high,perplexity"
    rows: list[list[str]] = []
    for (windows, rope, context), record in results.losses.items():
        loss, peak = Loss.of(record), record.get("peak_bytes")
        row = [results.labels[rope], windows, f"{context:,}"]
        row += [_told(record.get("stride")), _told(record["tokens"])]
        row += [nats(loss.nll), nats(loss.low), nats(loss.high)]
        row += [figure(perplexity(loss.nll)), _told(record.get("seconds"), "{:,.1f}")]
        rows.append([*row, _told(peak and peak / 1e6, "{:,.0f} MB")])
    caption = "Mean negative log-likelihood; low and high: 95 % interval by bootstrap"
    return Table(caption, [*heads.split(","), "seconds", "peak memory"], rows)


def passkey_table(results: Results) -> Table:
    """Methods and depths down, lengths across: how many were found."""
    cells = {
        ((rope, f"{depth:.0%}"), length): f"{r['correct']} of {r['trials']}"
        for (rope, length, depth), r in results.passkeys.items()
    }
    caption = "Passkeys found, by the length of the text in tokens"
    return _grid(results, caption, cells, second=["depth"])


def frequency_table(results: Results) -> Table:
    """What each method does, in numbers."""
    heads = "method,length,condense,cos and sin times,shortest wavelength,"
    heads += "longest wavelength,pairs,pairs longer than trained"
    rows = [
        [results.labels[rope], *_frequency_cells(record, results.trained)]
        for (rope, _), record in results.frequencies.items()
    ]
    caption = "Wavelengths in tokens a turn; the last column counts the pairs whose "
    caption += "wavelength is longer than the trained length"
    return Table(caption, heads.split(","), rows)


def _frequency_cells(record: Record, trained: int | None) -> list[str]:
    speeds = [number(f) / record["condense"] for f in record["inv_freq"]]
    waves = sorted(2 * math.pi / f if f else math.inf for f in speeds)
    longer = None if trained is None else sum(wave > trained for wave in waves)
    numbers = f"{record['condense']:g}", f"{record['attention_scaling']:.4f}"
    ends = figure(waves[0]), figure(waves[-1])
    return [_told(record["length"]), *numbers, *ends, str(len(waves)), _told(longer)]


def distance_table(results: Results) -> Table:
    """Methods down, distances across: the mean score."""
    cells = {
        ((rope,), distance): nats(number(score))
        for rope, r in results.distances.items()
        for distance, score in zip(r["distances"], r["scores"], strict=True)
    }
    return _grid(results, "Mean attention score by distance in tokens", cells)


def failure_table(results: Results) -> Table:
    """What did not work."""
    rows = [
        [results.labels[r["rope"]], r["error"], r["task"], _told(r["context"])]
        for r in results.failures
    ]
    caption = "Measurements that failed; the others went on"
    return Table(caption, ["method", "what happened", "task", "context"], rows)


def text_table(results: Results) -> Table:
    """What was read."""
    rows = [
        [str(text.get("name")), _told(text.get("tokens")), text["sha256"]]
        for text in results.header.get("texts") or []
    ]
    return Table("Texts", ["text", "tokens", "sha256"], rows)


def _told(value: float | None, shape: str = "{:,}") -> str:
    """A number, with commas unless told otherwise; nothing for None."""
    return "" if value is None else shape.format(value)
