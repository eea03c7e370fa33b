"""What people see on a terminal besides results: notes, sizes, a bar."""

import shutil
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


def duration_text(seconds: float) -> str:
    """A duration as people read it.

    >>> [duration_text(seconds) for seconds in (9.4, 75, 7500)]
    ['9 s', '1 min 15 s', '2 h 5 min']
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


class TimeLeft:
    """A bar over work of any unit, with the time left; on terminals only."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self.label = max(total, 1e-9), 0.0, ""
        self.shown = sys.stderr.isatty()
        self.begin, self.drawn = time.monotonic(), 0.0

    def step(self, amount: float) -> None:
        """Count `amount` more as done, and draw."""
        self.done = min(self.done + amount, self.total)
        self._draw()

    def name(self, label: str) -> None:
        """Say what is being done."""
        self.label = label
        self._draw()

    def line(self, text: str) -> None:
        """Print a line on standard error, above the bar."""
        self._clear()
        print(text, file=sys.stderr, flush=True)
        self._draw()

    def left(self) -> float | None:
        """Seconds until all is done at the rate so far; None: nothing is done yet."""
        spent = time.monotonic() - self.begin
        return spent * (self.total / self.done - 1) if self.done else None

    def _draw(self) -> None:
        if self.shown:
            part, left = self.done / self.total, self.left()
            bar = "#" * int(20 * part) + "." * (20 - int(20 * part))
            rest = "" if left is None else f", {duration_text(left)} left"
            text = f"[{bar}] {part:4.0%}{rest}  {self.label}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
            self.drawn = time.monotonic()

    def _clear(self) -> None:
        if self.drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "TimeLeft":
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()
