"""Figures of an evaluation's records: perplexity, positions, passkeys, frequencies.

Every figure is made from the records alone and belongs to no window.  A kind of record
that is missing leaves its figure out.
"""

from collections.abc import Iterable
from pathlib import Path

from jrope.lab.curves import (
    bucket_context,
    frequencies_figure,
    perplexity_figure,
    positions_figure,
)
from jrope.lab.grids import distance_figure, passkey_figure
from jrope.lab.results import Record, Results
from jrope.lab.style import Figure, styled

WIDE, NARROW = 9.2, 3.7  # inches


def figures(records: Iterable[Record], *, width: float = WIDE) -> dict[str, Figure]:
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
    with styled():
        for windows in results.windows:
            found[f"perplexity_{windows}"] = perplexity_figure(results, windows, width)
            if bucket_context(results, windows):
                found[f"positions_{windows}"] = positions_figure(
                    results, windows, width
                )
        if results.passkeys:
            found["passkey"] = passkey_figure(results, width)
        if results.frequencies:
            found["frequencies"] = frequencies_figure(results, width)
        if results.distances:
            found["distance"] = distance_figure(results, width)
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
    paths: list[Path] = []
    with styled():
        for name, figure in drawn.items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=160, format="png")
    return paths
