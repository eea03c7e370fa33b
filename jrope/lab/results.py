"""The records of an evaluation, read once and sorted by what they say.

A record is a JSON object with a `kind`; the first one is the header.  Numbers that are
missing (null) or not finite stay visible as NaN and inf, they are never dropped here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from jrope.errors import JropeError

Record: TypeAlias = Mapping[str, Any]

WINDOWS = {"sliding": "in sliding windows", "first": "of the first tokens of the text"}
REQUIRED = {  # kind: the keys that are read without asking
    "header": "model trained_length",
    "method": "rope inv_freq base_inv_freq attention_scaling condense length",
    "perplexity": "rope context windows tokens nll low high buckets",
    "passkey": "rope length depth trials correct",
    "distance": "rope distances scores",
    "failure": "task rope context error",
}


@final
@dataclass(frozen=True, kw_only=True)
class Loss:
    """A mean negative log-likelihood in nats per token, and its 95 % interval."""

    nll: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, record: Record) -> "Loss":
        """Read nll, low and high; where one is not finite there is no interval."""
        nll, low, high = (number(record[name]) for name in ("nll", "low", "high"))
        if all(map(math.isfinite, (nll, low, high))):
            return cls(nll=nll, low=low, high=high)
        return cls(nll=nll, low=None, high=None)

    def overlaps(self, other: "Loss") -> bool | None:
        """Whether the two intervals meet; None where one of them is not known."""
        if None in (self.low, self.high, other.low, other.high):
            return None
        low, high = max(self.low or 0, other.low or 0), self.high or 0
        return low <= min(high, other.high or 0)


@final
@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that was measured.

    Args:
      header: the first record.
      labels: method -> what to call it, in the order in which methods appear.
      losses: (windows, method, context) -> the perplexity record.
      passkeys: (method, length, depth) -> the passkey record.
      distances: method -> the distance record.
      frequencies: (method, length) -> the method record.
      failures: what did not work, in order.
    """

    header: Record
    labels: Mapping[str, str]
    losses: Mapping[tuple[str, str, int], Record]
    passkeys: Mapping[tuple[str, int, float], Record]
    distances: Mapping[str, Record]
    frequencies: Mapping[tuple[str, int | None], Record]
    failures: Sequence[Record]

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Results":
        """Sort the records; of two that measured the same thing the later one counts.

        Raises:
          JropeError: there is no header, or a record lacks something.
        """
        rows = [_checked(i, record) for i, record in enumerate(records, 1)]
        headers = [row for row in rows if row["kind"] == "header"]
        if not headers:
            raise JropeError(
                f"got {len(rows)} records and no header among them; want the file that "
                "jrope evaluate writes, its first line included"
            )
        named = {row["rope"]: str(row["rope"]) for row in rows if "rope" in row}
        named |= {row["rope"]: str(row["label"]) for row in rows if row.get("label")}
        of = {kind: [r for r in rows if r["kind"] == kind] for kind in REQUIRED}
        return cls(
            header=headers[-1],
            labels=named,
            losses={
                (r["windows"], r["rope"], r["context"]): r for r in of["perplexity"]
            },
            passkeys={
                (r["rope"], r["length"], number(r["depth"])): r for r in of["passkey"]
            },
            distances={r["rope"]: r for r in of["distance"]},
            frequencies={(r["rope"], r["length"]): r for r in of["method"]},
            failures=of["failure"],
        )

    @property
    def trained(self) -> int | None:
        """The trained length, where the header knows it."""
        return self.header["trained_length"]

    @property
    def windows(self) -> list[str]:
        """The kinds of windows that perplexity was measured with.

        Sliding ones first: they see the whole text, so their intervals are narrower.
        """
        found = dict.fromkeys(windows for windows, _, _ in self.losses)
        return sorted(found, key=lambda windows: windows != "sliding")

    def methods(self, windows: str) -> list[str]:
        """The methods that have a perplexity, in order."""
        found = {rope for kind, rope, _ in self.losses if kind == windows}
        return [rope for rope in self.labels if rope in found]

    def contexts(self, windows: str) -> list[int]:
        """The contexts that some method has a perplexity at, ascending."""
        return sorted({c for kind, _, c in self.losses if kind == windows})

    def loss(self, windows: str, rope: str, context: int) -> Loss | None:
        """What was measured there, or None."""
        record = self.losses.get((windows, rope, context))
        return None if record is None else Loss.of(record)

    def longest(self) -> dict[str, Record]:
        """Each method's frequencies, at its greatest length where they depend on it."""
        found: dict[str, Record] = {}
        for (rope, length), record in self.frequencies.items():
            before = found.get(rope)
            if before is None or (before["length"] or 0) <= (length or 0):
                found[rope] = record
        return {rope: found[rope] for rope in self.labels if rope in found}


def number(value: Any) -> float:
    """A float; null is NaN."""
    return math.nan if value is None else float(value)


def perplexity(nll: float) -> float:
    """exp(nll), inf where a float cannot hold it."""
    return math.exp(nll) if not nll > 700 else math.inf


def figure(value: float) -> str:
    """A perplexity as people read it.

    >>> [figure(x) for x in (25.812, 154.06, 12345.6, 3e9, math.inf, math.nan)]
    ['25.81', '154.1', '12,346', '3.0e+09', 'inf', 'NaN']
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    if abs(value) < 1000:
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.1e}"


def nats(value: float | None) -> str:
    """A loss with three decimals.

    >>> nats(3.21456), nats(math.nan), nats(None)
    ('3.215', 'NaN', '')
    """
    if value is None:
        return ""
    return f"{value:.3f}" if math.isfinite(value) else figure(value)


def tokens_text(count: int) -> str:
    """A length as an axis shows it.

    >>> tokens_text(256), tokens_text(2048), tokens_text(131072), tokens_text(3000)
    ('256', '2k', '128k', '3000')
    """
    return f"{count // 1024}k" if count and count % 1024 == 0 else str(count)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, some of those past the third counted.

    >>> listed(["a", "b"]), listed([*"abcdef"])
    ('a and b', 'a, b, c and 3 more')
    """
    names = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _checked(line: int, record: Record) -> Record:
    kind = record.get("kind")
    if kind not in REQUIRED:
        known = ", ".join(REQUIRED)
        raise JropeError(f"record {line}: kind is {kind!r}, want one of {known}")
    missing = [name for name in REQUIRED[kind].split() if name not in record]
    if missing:
        raise JropeError(f"record {line} ({kind}) lacks {', '.join(missing)}")
    return record
