"""What the records say, in words: which method is best where, and how surely."""

import math
from collections import Counter

from jrope.lab.results import WINDOWS, Loss, Results, figure, listed, perplexity


def headline(results: Results) -> str:
    """The one sentence that a reader in a hurry reads."""
    if not results.windows:
        return _without_perplexity(results)
    windows = results.windows[0]
    contexts = results.contexts(windows)
    past = [c for c in contexts if results.trained is None or c > results.trained]
    ranked = {c: ranking(results, windows, c) for c in past or contexts}
    wins = Counter(rope for order in ranked.values() for rope in winners(order))
    if not wins:
        return "No perplexity that was measured is a finite number."
    if len(results.methods(windows)) == 1:
        (label,) = (results.labels[rope] for rope in wins)
        return f"{label} was measured alone: there is nothing to compare it with."
    most = max(wins.values())
    best = [rope for rope in results.labels if wins.get(rope) == most]
    names = listed([results.labels[rope] for rope in best])
    verb = "has" if len(best) == 1 else "each have" if most < len(ranked) else "share"
    where = _part(most, len(ranked)) + (" past the trained length" if past else "")
    said = f"{names} {verb} the lowest perplexity at {where}"
    said += "" if len(results.windows) == 1 else f" ({WINDOWS.get(windows, windows)})"
    close = sum(_is_close(order) for order in ranked.values())
    if not close:
        return f"{said}."
    times = _part(close, len(ranked))
    return f"{said}. At {times} the intervals of the best two overlap."


def winners(ranked: list[tuple[str, Loss]]) -> list[str]:
    """The method with the lowest loss, and any with the very same."""
    return [rope for rope, loss in ranked if loss.nll == ranked[0][1].nll]


def _is_close(ranked: list[tuple[str, Loss]]) -> bool:
    return len(ranked) > 1 and bool(ranked[0][1].overlaps(ranked[1][1]))


def _part(count: int, whole: int) -> str:
    if count < whole:
        return f"{count} of {whole} contexts"
    words = {1: "the one context", 2: "both contexts"}
    return words.get(whole, f"all {whole} contexts")


def ranking(results: Results, windows: str, context: int) -> list[tuple[str, Loss]]:
    """The methods with a finite loss at a context, best first."""
    found = [
        (rope, loss)
        for rope in results.methods(windows)
        if (loss := results.loss(windows, rope, context)) and math.isfinite(loss.nll)
    ]
    return sorted(found, key=lambda pair: pair[1].nll)


def sentences(results: Results) -> list[str]:
    """One sentence per context, then passkeys and failures."""
    said = [
        _at_context(results, windows, context)
        for windows in results.windows[:1]  # the tables have the others
        for context in results.contexts(windows)
    ]
    said += _of_passkeys(results)
    if count := len(results.failures):
        thing = "measurement" if count == 1 else "measurements"
        said.append(f"{count} {thing} failed; they are listed below.")
    return said


def interval(loss: Loss) -> str:
    """The interval of the perplexity, "24.90 to 26.70", or nothing."""
    if loss.low is None or loss.high is None:
        return ""
    return f"{figure(perplexity(loss.low))} to {figure(perplexity(loss.high))}"


def _at_context(results: Results, windows: str, context: int) -> str:
    place = f"At {context:,} tokens"
    ranked = ranking(results, windows, context)
    measured = [
        r for r in results.methods(windows) if results.loss(windows, r, context)
    ]
    lost = [rope for rope in measured if rope not in dict(ranked)]
    if not ranked:
        return f"{place}: no finite perplexity."
    first, best = winners(ranked), ranked[0][1]
    names = listed([results.labels[rope] for rope in first])
    text = f"{place}: {names}, perplexity {figure(perplexity(best.nll))}"
    text += f" ({interval(best)})" if interval(best) else " (no interval known)"
    text += f"{_beside(results, best, ranked[len(first) :])}."
    if lost:
        text += f" Not finite: {listed([results.labels[rope] for rope in lost])}."
    return text


def _beside(results: Results, best: Loss, others: list[tuple[str, Loss]]) -> str:
    if not others:
        return ", and no other"
    met = [results.labels[rope] for rope, loss in others if best.overlaps(loss)]
    unknown = all(best.overlaps(loss) is None for _, loss in others)
    if met:
        return f"; its interval overlaps with that of {listed(met)}"
    if unknown:
        label, gap = results.labels[others[0][0]], others[0][1].nll - best.nll
        return f"; {label} follows {gap:.3f} nats behind"
    return "; no other interval reaches it"


def _of_passkeys(results: Results) -> list[str]:
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    trained = results.trained or 0
    past = [key for key in results.passkeys if key[1] > trained]
    for key in past or results.passkeys:
        right[key[0]] += results.passkeys[key]["correct"]
        asked[key[0]] += results.passkeys[key]["trials"]
    if not asked:
        return []
    rates = {rope: right[rope] / max(asked[rope], 1) for rope in asked}
    most = max(rates.values())
    where = f" at lengths past {trained:,}" if past and trained else ""
    if most == 0:
        return [f"Passkeys{where}: no method found any."]
    best = [rope for rope in results.labels if rates.get(rope) == most]
    names = listed([results.labels[rope] for rope in best])
    counts = sorted({f"{right[rope]} of {asked[rope]}" for rope in best})
    return [f"Passkeys{where}: {names} found most, {' and '.join(counts)}."]


def _without_perplexity(results: Results) -> str:
    if results.passkeys or results.distances:
        return "No perplexity was measured; what was measured is below."
    if results.failures:
        return "Nothing was measured: every attempt failed."
    return "Nothing was measured yet."
