"""Figures of an evaluation's records: perplexity, positions, passkeys, frequencies.

Every figure is made from the records alone and belongs to no window.  A kind of record
that is missing leaves its figure out.
"""

import io
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrope.errors import JropeError
from jrope.lab.results import Record, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 9.2, 3.7  # inches
_STYLE: Any = {
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.which": "both",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": "#d9d9de",
    "hatch.color": "#62626b",
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "jrope",
    "text.parse_math": False,
}


def figures(records: Iterable[Record], *, width: float = WIDE) -> "dict[str, Figure]":
    """Draw what the records hold.

    Args:
      records: as `jrope evaluate` writes them, the header among them.
      width: of each figure in inches; 3.7 is a phone's.

    Returns:
      name -> figure, of those that there are records for: `perplexity_WINDOWS`,
      `positions_WINDOWS` (WINDOWS: first, sliding), `passkey`, `frequencies`,
      `distance`.

    Raises:
      JropeError: matplotlib is not installed, or a record is not what it should be.
    """
    results = Results.of(records)
    found: dict[str, Figure] = {}
    with _styled():
        from jrope.lab import drawing

        for kind in results.windows:
            drawn = drawing.perplexity_figure(results, kind, width)
            found[f"perplexity_{kind}"] = drawn
            if drawing.bucket_context(results, kind):
                drawn = drawing.positions_figure(results, kind, width)
                found[f"positions_{kind}"] = drawn
        if results.passkeys:
            found["passkey"] = drawing.passkey_figure(results, width)
        if results.frequencies:
            found["frequencies"] = drawing.frequencies_figure(results, width)
        if results.distances:
            found["distance"] = drawing.distance_figure(results, width)
    return found


def save_figures(records: Iterable[Record], folder: str | Path) -> list[Path]:
    """Draw and save as PNG files of 160 dots an inch, NAME.png each.

    Raises:
      JropeError: as `figures`.
      OSError: the folder cannot be written.
    """
    folder = Path(folder)
    drawn = figures(records)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in drawn]
    with _styled():
        for path, figure in zip(paths, drawn.values(), strict=True):
            figure.savefig(path, dpi=160, format="png")
    return paths


def to_svg(figure: "Figure") -> str:
    """The figure as an SVG element, the same for the same figure."""
    file = io.StringIO()
    told = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _styled():
        figure.savefig(file, format="svg", metadata=told)
    text = file.getvalue()
    return text[text.index("<svg") :]


@contextmanager
def _styled() -> Generator[None]:
    """The settings under which figures are made and saved."""
    try:
        import matplotlib
    except ImportError:
        raise JropeError(
            'figures need matplotlib, which is missing: pip install "jrope[lab]"'
        ) from None
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield
