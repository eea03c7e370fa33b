"""What people see on standard error besides results: notes, sizes, a bar."""

import shutil
import sys
import time

LINES_EVERY = 30.0  # seconds, where standard error is no terminal


def note(text: str) -> None:
    """One line on standard error, at once."""
    print(f"jrope: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A warning, one line on standard error."""
    note(f"warning: {text}")


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
    """A bar on standard error, which leaves nothing behind; a context.

    Where no terminal is, a plain line every 30 s, hence none for what takes less.
    Call it with the name and bytes of each tensor.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, max(total, 1), 0
        self.shown = sys.stderr.isatty()
        self.drawn = 0.0 if self.shown else time.monotonic()

    def __call__(self, name: str, nbytes: int) -> None:
        """Count `nbytes` more, and draw when it is time."""
        self.done += nbytes
        now = time.monotonic()
        if now - self.drawn <= (0.1 if self.shown else LINES_EVERY):
            return
        self.drawn = now
        part, whole = min(self.done / self.total, 1.0), bytes_text(self.total)
        if self.shown:
            bar = "#" * int(30 * part) + "." * (30 - int(30 * part))
            text = f"\r{self.label} [{bar}] {part:4.0%} of {whole}"
            print(text, end="", file=sys.stderr, flush=True)
        else:
            note(f"{self.label}: {part:.0%} of {whole}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown and self.drawn:
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
    """A bar over work of any unit, with the time left; a context.

    Where no terminal is, plain lines: when something else begins, every 30 s in
    between, and when all is done.
    """

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
        changed, self.label = label != self.label, label
        self._draw(changed=changed)

    def line(self, text: str) -> None:
        """Print a line on standard error, above the bar."""
        self._clear()
        print(text, file=sys.stderr, flush=True)
        if self.shown:
            self._draw()

    def left(self) -> float | None:
        """Seconds until all is done at the rate so far; None: nothing is done yet."""
        spent = time.monotonic() - self.begin
        return spent * (self.total / self.done - 1) if self.done else None

    def _draw(self, *, changed: bool = False) -> None:
        part, left, now = self.done / self.total, self.left(), time.monotonic()
        rest = "" if left is None else f", {duration_text(left)} left"
        if self.shown:
            bar = "#" * int(20 * part) + "." * (20 - int(20 * part))
            text = f"[{bar}] {part:4.0%}{rest}  {self.label}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
        elif changed or now - self.drawn >= LINES_EVERY:
            note(f"{part:.0%}{rest}: {self.label}")
        else:
            return
        self.drawn = now

    def _clear(self) -> None:
        if self.shown and self.drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "TimeLeft":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._clear()
        if not self.shown and self.label and kind is None:
            note(f"100%: done in {duration_text(time.monotonic() - self.begin)}")
