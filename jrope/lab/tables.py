"""The tables of a report: every number that was measured, under its head."""

import math

from jrope.lab.findings import ranking, winners
from jrope.lab.page import Html, element, joined, table
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


def perplexity_table(results: Results, windows: str) -> Html:
    """Methods down, contexts across: the perplexity and its interval."""
    contexts = results.contexts(windows)
    best = {c: winners(ranking(results, windows, c)) for c in contexts}
    rows = [
        [results.labels[rope]]
        + [
            _loss_cell(results.loss(windows, rope, c), rope in best[c])
            for c in contexts
        ]
        for rope in results.methods(windows)
    ]
    caption = (
        f"Perplexity {WINDOWS.get(windows, windows)}, by context in tokens; below "
    )
    caption += "it the 95 % interval; the lowest of a column is bold and has a star"
    return table(caption, ["method", *(f"{c:,}" for c in contexts)], rows)


def _loss_cell(loss: Loss | None, best: bool) -> str:
    if loss is None:
        return NONE
    text = figure(perplexity(loss.nll))
    marked = element("strong", f"\N{BLACK STAR} {text}") if best else text
    if loss.low is None or loss.high is None:
        return marked
    ends = figure(perplexity(loss.low)), figure(perplexity(loss.high))
    return joined([marked, element("small", NONE.join(ends))])


def bucket_tables(results: Results) -> list[Html]:
    """Losses by position, one table for each context, the longest first."""
    found = {(w, c) for (w, _, c), r in results.losses.items() if r["buckets"]}
    order = sorted(found, key=lambda key: (results.windows.index(key[0]), -key[1]))
    return [_bucket_table(results, *key) for key in order]


def _bucket_table(results: Results, windows: str, context: int) -> Html:
    found = {
        rope: {(b["first"], b["last"]): b for b in record["buckets"]}
        for rope in results.methods(windows)
        if (record := results.losses.get((windows, rope, context)))
    }
    spans = sorted({span for of in found.values() for span in of})
    rows = [
        [results.labels[rope], *(_nats_cell(of.get(span)) for span in spans)]
        for rope, of in found.items()
    ]
    caption = f"Nats per token by position in windows of {context:,} tokens ({windows})"
    heads = [f"{first:,} to {last - 1:,}" for first, last in spans]
    return table(caption, ["method", *heads], rows)


def _nats_cell(bucket: Record | None) -> str:
    if bucket is None:
        return NONE
    loss = Loss.of(bucket)
    if loss.low is None:
        return nats(loss.nll)
    ends = NONE.join([nats(loss.low), nats(loss.high)])
    return joined([nats(loss.nll), element("small", ends)])


def loss_table(results: Results) -> Html:
    """Every measurement of perplexity, one a row."""
    heads = ["method", "windows", "context", "stride", "tokens", "nats per token"]
    heads += ["low", "high", "perplexity", "seconds", "peak memory"]
    rows: list[list[str]] = []
    for (windows, rope, context), record in results.losses.items():
        loss, peak = Loss.of(record), record.get("peak_bytes")
        row = [results.labels[rope], windows, f"{context:,}"]
        row += [count(record.get("stride")), count(record["tokens"])]
        row += [nats(loss.nll), nats(loss.low), nats(loss.high)]
        row += [figure(perplexity(loss.nll)), _seconds(record.get("seconds"))]
        rows.append([*row, "" if peak is None else f"{peak / 1e6:,.0f} MB"])
    caption = "Mean negative log-likelihood; low and high: 95 % interval by bootstrap"
    return table(caption, heads, rows, texts=("windows",))


def passkey_table(results: Results) -> Html:
    """Methods and depths down, lengths across: how many were found."""
    lengths = sorted({length for _, length, _ in results.passkeys})
    rows: list[list[str]] = []
    for rope, label in results.labels.items():
        for depth in sorted({d for r, _, d in results.passkeys if r == rope}):
            found = [results.passkeys.get((rope, n, depth)) for n in lengths]
            cells = [f"{r['correct']} of {r['trials']}" if r else NONE for r in found]
            rows.append([label, f"{depth:.0%}", *cells])
    caption = "Passkeys found, by the length of the text in tokens"
    return table(caption, ["method", "depth", *(f"{n:,}" for n in lengths)], rows)


def frequency_table(results: Results) -> Html:
    """What each method does, in numbers."""
    heads = ["method", "length", "condense", "cos and sin times", "shortest wavelength"]
    heads += ["longest wavelength", "pairs", "pairs longer than trained"]
    rows = [
        [results.labels[rope], *_frequency_cells(record, results.trained)]
        for (rope, _), record in results.frequencies.items()
    ]
    caption = "Wavelengths in tokens a turn; the last column counts the pairs whose "
    caption += "wavelength is longer than the trained length"
    return table(caption, heads, rows)


def _frequency_cells(record: Record, trained: int | None) -> list[str]:
    speeds = [number(f) / record["condense"] for f in record["inv_freq"]]
    waves = sorted(2 * math.pi / f if f else math.inf for f in speeds)
    return [
        count(record["length"]),
        f"{record['condense']:g}",
        f"{record['attention_scaling']:.4f}",
        figure(waves[0]),
        figure(waves[-1]),
        str(len(waves)),
        "" if trained is None else str(sum(wave > trained for wave in waves)),
    ]


def distance_table(results: Results) -> Html:
    """Methods down, distances across: the mean score."""
    places = sorted({d for r in results.distances.values() for d in r["distances"]})
    rows: list[list[str]] = []
    for rope, label in results.labels.items():
        record = results.distances.get(rope)
        if record is not None:
            of = dict(zip(record["distances"], record["scores"], strict=True))
            cells = [nats(number(of[d])) if d in of else NONE for d in places]
            rows.append([label, *cells])
    caption = "Mean attention score by distance in tokens"
    return table(caption, ["method", *(f"{d:,}" for d in places)], rows)


def failure_table(results: Results) -> Html:
    """What did not work."""
    rows = [
        [
            results.labels[r["rope"]],
            str(r["error"]),
            str(r["task"]),
            count(r["context"]),
        ]
        for r in results.failures
    ]
    heads = ["method", "what happened", "task", "context"]
    caption = "Measurements that failed; the others went on"
    return table(caption, heads, rows, texts=("task", "what happened"))


def text_table(results: Results) -> Html:
    """What was read."""
    rows = [
        [str(t.get("name")), count(t.get("tokens")), element("code", str(t["sha256"]))]
        for t in results.header.get("texts") or []
    ]
    return table("Texts", ["text", "tokens", "sha256"], rows, texts=("sha256",))


def count(value: int | None) -> str:
    """A whole number with commas; nothing for None."""
    return "" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"
