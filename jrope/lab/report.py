"""One self-contained HTML page of an evaluation's records.

The page is `report.html.j2`: its words, style and order.  Jinja escapes whatever comes
from records; only the pictures go in as they are.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jrope.errors import JropeError
from jrope.lab import tables
from jrope.lab.figures import NARROW, WIDE, figures, to_svg
from jrope.lab.findings import headline, sentences
from jrope.lab.results import Record, Results

_UNPRINTABLE = r"[^\t\n\r -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


def write_report(records: Iterable[Record], path: str | Path) -> Path:
    """Write the page, whole or not at all.

    Args:
      records: as `jrope evaluate` writes them, the header among them.
      path: of the HTML file; one that exists is replaced.

    Returns:
      The path.

    Raises:
      JropeError: matplotlib or jinja2 is not installed, or a record is not what it
        should be.
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
    """The page as text, its figures drawn."""
    return fill(Results.of(records), _pictures(records))


def fill(results: Results, pictures: Mapping[str, Mapping[str, str]]) -> str:
    """The page as text.

    Args:
      results: what was measured.
      pictures: name, as `figures` has it -> wide, narrow -> SVG.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise JropeError(
            'a report needs jinja2, which is missing: pip install "jrope[lab]"'
        ) from None
    environment = Environment(
        loader=PackageLoader("jrope.lab", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        results=results,
        headline=headline(results),
        sentences=sentences(results),
        pictures=pictures,
        tables=tables,
    )
    return re.sub(_UNPRINTABLE, "\ufffd", page)


def _pictures(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """Name -> each figure twice, for a wide page and for a phone; the style shows one.

    Ids begin with the name of the figure: those of matplotlib repeat.
    """
    found: dict[str, dict[str, str]] = {}
    for size, width in {"wide": WIDE, "narrow": NARROW}.items():
        for name, drawn in figures(records, width=width).items():
            ids = rf"\g<1>{name}-{size}-"
            svg = re.sub(r'(\bid="|href="#|url\(#)', ids, to_svg(drawn))
            found.setdefault(name, {})[size] = svg
    return found
