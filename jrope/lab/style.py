"""Colours, markers and settings of every figure; where matplotlib comes in.

A line is told from its neighbours by colour, marker and dashes together, so that a
print without colour and an eye that confuses colours can read it.  The colours are
those of a light page; an HTML page replaces them by its own (see `page.inline_svg`).
"""

import io
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

from jrope.errors import JropeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:  # matplotlib is asked for when something is drawn
    Axes: TypeAlias = Any
    Figure: TypeAlias = Any

PAPER, INK, MUTED, GRID = "#fdfdfc", "#1b1b1f", "#62626b", "#d9d9de"
SERIES = (INK, "#0a5fb4", "#c44e00", "#00795a", "#a8407f", "#8a6a00", "#147f93")
MARKERS = "osD^vPX<>*hd"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
SIZE = 9.0  # points
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": SIZE,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.titlesize": SIZE,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "font.family": ["DejaVu Sans"],
    "font.size": SIZE,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "jrope",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": SIZE - 1,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": SIZE - 1,
}


@final
@dataclass(frozen=True, kw_only=True)
class Look:
    """How one method is drawn, in every figure alike."""

    color: str
    marker: str
    dashes: Any

    def line(self) -> dict[str, Any]:
        """The arguments of `Axes.plot`."""
        thin = self.marker in "PX*v^<>"  # these look smaller than they are
        return {
            "color": self.color,
            "linestyle": self.dashes,
            "marker": self.marker,
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.5,
            "markersize": 6.5 if thin else 5.0,
        }


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name; no two alike below 84 names."""
    return {
        name: Look(
            color=SERIES[i % len(SERIES)],
            marker=MARKERS[i % len(MARKERS)],
            dashes=DASHES[i % len(DASHES)],
        )
        for i, name in enumerate(names)
    }


@contextmanager
def styled() -> Generator[None]:
    """The settings under which figures are made and saved.

    Raises:
      JropeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise JropeError(
            'figures need matplotlib, which is missing: pip install "jrope[lab]"'
        ) from None
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    with styled():
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def shorten(labels: Sequence[str], most: int) -> list[str]:
    """Labels of at most `most` characters, the middle left out, still all different."""
    clean = ["".join(c if c.isprintable() else "\ufffd" for c in x) for x in labels]
    for head in range(most * 2 // 3, -1, -1):
        tail = most - 1 - head
        cut = [
            f"{x[:head]}\N{HORIZONTAL ELLIPSIS}{x[len(x) - tail :]}"
            if len(x) > most
            else x
            for x in clean
        ]
        if len({*cut}) == len(cut):
            return cut
    return [f"{i}: {x[: most - 4]}" for i, x in enumerate(clean, 1)]


def chosen(known: Sequence[str], methods: Sequence[str]) -> dict[str, Look]:
    """The looks of some methods, the same in every figure."""
    shown = looks(known)
    return {rope: shown[rope] for rope in methods}
