"""The records of `jrope evaluate` as tables for a terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Cells = Mapping[tuple[str, str], str]  # of method and column
Grid = tuple[str, Cells]
_HEADS = {
    "first": "Perplexity of the first tokens of each text, by context",
    "sliding": "Perplexity in sliding windows, stride {stride}, by context",
}


def tables(records: Sequence[Record], *, by_position: bool) -> Iterator[str]:
    """Lines: perplexities with 95 % intervals, passkeys found, what failed.

    Args:
      records: of a journal, without outdated failures.
      by_position: also a table of position buckets for every context.
    """
    names = {r["rope"]: str(r["label"]) for r in records if r.get("label")}
    for title, cells in _grids(records, by_position=by_position):
        yield from _grid(title, cells, names)
    failed = [r for r in records if r["kind"] == "failure"]
    failed = [{**r, "rope": names.get(r["rope"], r["rope"])} for r in failed]
    if failed:
        yield from ("", "Failed")
        yield from (f"  {failure_line(record)}" for record in failed)


def failure_line(record: Record) -> str:
    """What failed and why, in one line."""
    where = "" if record["context"] is None else f" at {record['context']}"
    where += f", {record['windows']}" if "windows" in record else ""
    where += f", depth {record['depth']:g}" if "depth" in record else ""
    return f"{record['task']} {record['rope']}{where}: {record['error']}"


def _grids(records: Sequence[Record], *, by_position: bool) -> Iterator[Grid]:
    for kind, title in _HEADS.items():
        found = [
            r for r in records if r["kind"] == "perplexity" and r["windows"] == kind
        ]
        if found:
            yield _perplexity(title.format(stride=found[0]["stride"]), found)
            if by_position:
                yield from _positions(found)
    yield from _passkeys([r for r in records if r["kind"] == "passkey"])
    yield from _distances([r for r in records if r["kind"] == "distance"])


def _perplexity(title: str, records: Sequence[Record]) -> Grid:
    cells = {(r["rope"], f"{r['context']:,}"): _cell(r) for r in records}
    return f"{title} (95 % block bootstrap)", cells


def _positions(records: Sequence[Record]) -> Iterator[Grid]:
    for context in sorted({r["context"] for r in records}):
        cells = {
            (r["rope"], f"{b['first']:,}-{b['last']:,}"): _cell(b)
            for r in records
            if r["context"] == context
            for b in r["buckets"]
            if len(r["buckets"]) > 1
        }
        if cells:
            yield f"By position in the window, context {context:,}", cells


def _passkeys(records: Sequence[Record]) -> Iterator[Grid]:
    for length in sorted({r["length"] for r in records}):
        rows = [r for r in records if r["length"] == length]
        cells = {
            (r["rope"], f"depth {r['depth']:g}"): f"{r['correct']}/{r['trials']}"
            for r in sorted(rows, key=lambda r: r["depth"])
        }
        yield f"Passkeys found, length {length:,}", cells


def _distances(records: Sequence[Record]) -> Iterator[Grid]:
    cells: dict[tuple[str, str], str] = {}
    for r in records:
        count = len(r["distances"])
        for i in sorted({round(j * (count - 1) / 6) for j in range(7)}):
            cells[r["rope"], f"{r['distances'][i]:,}"] = f"{r['scores'][i]:.3f}"
    if cells:
        yield "Mean attention score by distance", cells


def _cell(record: Record) -> str:
    middle, low, high = (_perp(record[name]) for name in ("nll", "low", "high"))
    return f"{middle} ({low}-{high})"


def _perp(nll: float) -> str:
    value = math.exp(min(nll, 700.0))
    return f"{value:.4g}" if value < 1e4 else f"{value:.2g}"


def _grid(title: str, cells: Cells, names: Mapping[str, str]) -> Iterator[str]:
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    widths = [
        max(len(column), *(len(cells.get((row, column), "-")) for row in rows))
        for column in columns
    ]
    margin = max(len(names.get(row, row)) for row in rows)
    yield from ("", title)
    parts = [f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)]
    yield "  ".join([" " * (margin + 2), *parts]).rstrip()
    for row in rows:
        parts = [
            f"{cells.get((row, c), '-'):>{w}}"
            for c, w in zip(columns, widths, strict=True)
        ]
        yield "  ".join([f"  {names.get(row, row):<{margin}}", *parts])
