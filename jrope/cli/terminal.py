"""What people see on a terminal besides results: notes, sizes, a bar."""

import sys
import time


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"jrope: warning: {text}", file=sys.stderr)


def bytes_text(count: float) -> str:
    """A number of bytes as people read it.

    >>> bytes_text(1040000)
    '1.04 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}" if unit != "bytes" else f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


class Progress:
    """A bar on standard error, on terminals only, which leaves nothing behind.

    Call it with the name and bytes of each tensor; it is a context.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, max(total, 1), 0
        self.shown = sys.stderr.isatty()
        self.drawn = 0.0

    def __call__(self, name: str, nbytes: int) -> None:
        """Count `nbytes` more, and draw when it is time."""
        self.done += nbytes
        now = time.monotonic()
        if self.shown and now - self.drawn > 0.1:
            self.drawn = now
            part = min(self.done / self.total, 1.0)
            bar = "#" * int(30 * part) + "." * (30 - int(30 * part))
            text = f"{self.label} [{bar}] {part:4.0%} of {bytes_text(self.total)}"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
