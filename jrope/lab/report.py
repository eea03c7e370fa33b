"""One self-contained HTML page of an evaluation's records."""

import contextlib
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jrope.lab import figures, tables
from jrope.lab.findings import headline, sentences
from jrope.lab.page import Html, element, inline_svg, joined, page
from jrope.lab.results import Record, Results
from jrope.lab.style import to_svg

_HEADINGS = {
    "perplexity": "Perplexity against context",
    "positions": "Loss by position in the window",
    "passkey": "Passkeys found",
    "frequencies": "What each method does to the frequencies",
    "distance": "Attention scores against distance",
}
_ABOUT = {
    "perplexity": "Perplexity upwards, context to the right, both logarithmic; a band "
    "is the 95 % interval; a dotted line marks the trained length.",
    "positions": "Negative log-likelihood in nats per token, by the position of the "
    "token in the longest windows; upright bars are 95 % intervals. The spans of "
    "positions are drawn equally wide.",
    "passkey": "For each method a grid: length of the text to the right, depth of the "
    "passkey downwards, in each cell how many were found; darker is more. Hatched: not "
    "measured. A dotted line marks the trained length.",
    "frequencies": "For each rotary pair, by its wavelength without any extension: how "
    "many times longer the method makes that wavelength, condense included. Pairs at "
    "the right of the dotted line never made a whole turn in training. A method whose "
    "frequencies depend on the length is drawn at its longest one.",
    "distance": "The mean score of a query and a key before the softmax, over heads, "
    "layers and positions, by the tokens between them; the band spans the 10th to the "
    "90th percentile of heads; dashes repeat the default.",
}


def write_report(records: Iterable[Record], path: str | Path) -> Path:
    """Write the page, whole or not at all.

    Args:
      records: as `jrope evaluate` writes them, the header among them.
      path: of the HTML file; one that exists is replaced.

    Returns:
      The path.

    Raises:
      JropeError: matplotlib is not installed, or a record is not what it should be.
      OSError: the path cannot be written.
    """
    text, path = render([*records]), Path(path)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.write_text(text, "utf-8")
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            scratch.unlink()
    return path


def render(records: Sequence[Record]) -> str:
    """The page as text."""
    results = Results.of(records)
    shown = _pictures(records, results)
    heading = f"{results.header['model']}: RoPE methods compared"
    lead = [element("li", text) for text in sentences(results)]
    over, words = element("p", heading, class_="over"), headline(results)
    return page(
        heading,
        element("header", over, element("h1", words)),
        element("ul", *lead) if lead else "",
        *_perplexity_parts(results, shown),
        *_other_parts(results, shown),
        *_circumstances(results),
    )


def _pictures(records: Sequence[Record], results: Results) -> dict[str, Html]:
    """Each figure twice, for a wide page and for a phone; the style shows one."""
    sizes = {"wide": figures.WIDE, "narrow": figures.NARROW}
    found: dict[str, list[Html]] = {}
    names = ", ".join(results.labels.values())
    for size, width in sizes.items():
        for name, drawn in figures.figures(records, width=width).items():
            kind, _, windows = name.partition("_")
            heading = f"{_HEADINGS[kind]}{f' ({windows})' if windows else ''}"
            told = f"{_ABOUT[kind]} Methods: {names}. The numbers are in the tables."
            svg = inline_svg(to_svg(drawn), f"{name}-{size}", heading, told)
            found.setdefault(name, []).append(element("div", svg, class_=size))
    return {name: element("figure", *both) for name, both in found.items()}


def _section(kind: str, shown: Mapping[str, Html], *rest: str) -> list[str]:
    """A heading, what is to be seen, the pictures, and what belongs to them."""
    pictures = [html for name, html in shown.items() if name.split("_")[0] == kind]
    heading, about = element("h2", _HEADINGS[kind]), element("p", _ABOUT[kind])
    return [heading, about if pictures else "", *pictures, *rest]


def _perplexity_parts(results: Results, shown: Mapping[str, Html]) -> list[str]:
    if not results.windows:
        return []
    grids = [tables.perplexity_table(results, windows) for windows in results.windows]
    every = _folded("All that was measured of perplexity", tables.loss_table(results))
    parts = _section("perplexity", shown, *grids, every)
    if places := tables.bucket_tables(results):
        parts += _section("positions", shown, _folded("Every context", *places))
    return parts


def _other_parts(results: Results, shown: Mapping[str, Html]) -> list[str]:
    parts: list[str] = []
    if results.passkeys:
        grid = _folded("The numbers", tables.passkey_table(results))
        parts += _section("passkey", shown, grid)
    if results.frequencies:
        parts += _section("frequencies", shown, tables.frequency_table(results))
    if results.distances:
        grid = _folded("The numbers", tables.distance_table(results))
        parts += _section("distance", shown, grid)
    if results.failures:
        parts += [element("h2", "Failures"), tables.failure_table(results)]
    return parts


def _circumstances(results: Results) -> list[str]:
    """Model, device, versions, command and texts: what one needs to do it again."""
    header = results.header
    versions = (header.get("versions") or {}).items()
    trained = results.trained
    facts = {
        "Model": header["model"],
        "Trained length": "unknown" if trained is None else f"{trained:,} tokens",
        "theta": header.get("theta"),
        "Rotated channels": header.get("rotary_dim"),
        "Device": header.get("device"),
        "dtype": header.get("dtype"),
        "jrope": header.get("jrope"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions),
        "Started": header.get("started"),
        "Weights, sha256": header.get("model_sha256"),
        "Settings": _settings(header.get("plan")),
        "Command": header.get("command"),
    }
    told = {key: str(value) for key, value in facts.items() if value not in (None, "")}
    if "Command" in told:
        told["Command"] = element("code", told["Command"])
    pairs = [
        joined([element("dt", key), element("dd", value)])
        for key, value in told.items()
    ]
    texts = tables.text_table(results) if header.get("texts") else ""
    return [element("h2", "How it was measured"), element("dl", *pairs), texts]


def _settings(plan: Any) -> str:
    """The numbers that decide what is measured, "seed 0, stride 256"."""
    if not isinstance(plan, Mapping):
        return str(plan or "")
    given = cast(Mapping[str, Any], plan)
    return ", ".join(f"{k} {v}" for k, v in given.items() if v is not None)


def _folded(summary: str, *children: str) -> Html:
    """What only some readers want, closed until they ask for it."""
    return element("details", element("summary", summary), *children)
