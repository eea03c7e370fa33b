"""What a parity run found: errors per stage and per segment, judged and printed."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from jrope.parity.frequencies import Frequencies

YARDSTICK = 1.10


@final
@dataclass(frozen=True, kw_only=True)
class Error:
    """How far an array is from the right one.

    Args:
      max_abs: largest difference.
      of_max: the same as a part of the largest right number.
      rms: root mean square of the difference as a part of the right one's.
      typical: the same for every token by itself, geometric mean over tokens.
    """

    max_abs: float
    of_max: float
    rms: float
    typical: float

    @classmethod
    def of(cls, got: np.ndarray, want: np.ndarray) -> "Error":
        """Compare [..., T, V] in float64, some tokens at a time."""
        flat = [x.reshape(-1, x.shape[-1]) for x in (got, want)]
        blocks = range(0, len(flat[0]), 64)
        parts = [_per_token(*(x[at : at + 64] for x in flat)) for at in blocks]
        powers, of_powers, top, of_top = np.concatenate(parts, axis=1)
        least = np.finfo(np.float64).tiny  # a token without an error
        logs = np.log(np.maximum(powers, least) / np.maximum(of_powers, least))
        return cls(
            max_abs=float(top.max()),
            of_max=_ratio(float(top.max()), float(of_top.max())),
            rms=math.sqrt(_ratio(float(powers.mean()), float(of_powers.mean()))),
            typical=0.0 if top.max() == 0 else math.exp(float(logs.mean()) / 2),
        )


@final
@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the model, all segments together, or the logits of one segment.

    Args:
      name: "embeddings", "layer 0", ..., "final norm", "logits"; or where a segment
        lies: "inside", "at" or "past" the trained length, or "spread" over all.
      jrope: jrope's error.
      torch: PyTorch's error; None when PyTorch is what is right.
    """

    name: str
    jrope: Error
    torch: Error | None

    @property
    def ratio(self) -> float | None:
        """jrope's typical error as a multiple of PyTorch's."""
        torch = self.torch
        return None if torch is None else _ratio(self.jrope.typical, torch.typical)


@final
@dataclass(frozen=True, kw_only=True)
class Segment:
    """The logits at some positions.

    Args:
      first, last: the positions.
      logits: the errors there.
      top1: part of the tokens after which both hold the same token for likeliest.
      kl: Kullback-Leibler divergence of jrope from what is right, nats a token.
    """

    first: int
    last: int
    logits: Stage
    top1: float
    kl: float


@final
@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """Where NaN or infinity first was, on each side: a stage's name, or None."""

    jrope: str | None
    torch: str | None

    def line(self, dtype: str) -> str:
        """What it was and what to do about it."""
        sides = (("jrope", self.jrope), ("PyTorch", self.torch))
        where = " and ".join(f"{who} from {at} on" for who, at in sides if at)
        finite = "".join(f" ({who} is finite)" for who, at in sides if not at)
        hint = (
            "jrope.load(..., check_finite=True) names weights that are NaN or infinite"
        )
        if dtype == "float16":
            hint = f"float16 ends at 65504, take bfloat16 or float32; {hint}"
        return f"NaN or infinity: {where}{finite}, nothing to compare; {hint}"


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """What `compare` found.

    Args:
      model: the folder.
      dtype: of weights and activations.
      rope: the rotary embedding in words.
      trained_length: where "past" begins.
      frequencies: those that are not this PyTorch's to the bit.
      not_finite: where the first NaN or infinity was; None: all numbers are finite.
      stages: the stages, logits last; none where a number is not finite.
      segments: the logits again, by position; likewise.
      threshold: for float32.
    """

    model: str
    dtype: str
    rope: str
    trained_length: int
    frequencies: Frequencies
    not_finite: NotFinite | None = None
    stages: tuple[Stage, ...]
    segments: tuple[Segment, ...]
    threshold: float

    @property
    def figure(self) -> float:
        """The number that is judged: see the package `parity`."""
        if self.not_finite is not None:
            return math.nan
        if (ratio := self.stages[-1].ratio) is not None:
            return ratio
        return float(np.max([s.logits.jrope.of_max for s in self.segments]))

    @property
    def limit(self) -> float:
        """What `figure` may be at most."""
        return self.threshold if self.dtype == "float32" else YARDSTICK

    @property
    def ok(self) -> bool:
        """Whether jrope passes; NaN does not."""
        return self.frequencies.ok and self.figure <= self.limit

    def to_json(self) -> str:
        """Everything as a JSON object; numbers that are not finite are null."""
        judged = {"figure": self.figure, "limit": self.limit, "ok": self.ok}
        return json.dumps(_finite({**dataclasses.asdict(self), **judged}))

    def table(self) -> str:
        """Everything, for reading."""
        title = f"{self.model} in {self.dtype}, {self.rope}"
        notes = [note] if (note := self.frequencies.line()) else []
        if self.not_finite is not None:
            why = self.not_finite.line(self.dtype)
            return "\n".join([title, *notes, f"FAILED: {why}"])
        unit = "of the largest" if self.stages[-1].torch is None else "times PyTorch's"
        verdict = (
            f"{'ok' if self.ok else 'FAILED'}: error of a logit {self.figure:.3g} "
            f"{unit}, allowed {self.limit:g}"
        )
        return "\n".join([title, *self._lines(), "", *notes, verdict])

    def _lines(self) -> list[str]:
        """The stages and the segments, a line each, under their heads."""
        alone = self.stages[-1].torch is None
        heads = ["max abs", "of max", "rel RMS"]
        heads += [] if alone else ["typical", "PyTorch's", "ratio"]
        rows = [["stage", *heads]]
        rows += [[stage.name, *_figures(stage)] for stage in self.stages]
        rows += [[], ["logits at", *heads, "top-1", "KL"]]
        for part in self.segments:
            place = f"{part.first}..{part.last} {part.logits.name}"
            ends = f"{part.top1:.2%}", f"{part.kl:.1e}"
            rows.append([place, *_figures(part.logits), *ends])
        widest = max(len(row[0]) for row in rows if row)
        lines = [
            " ".join([row[0].ljust(widest), *(cell.rjust(9) for cell in row[1:])])
            for row in ([*row] or [""] for row in rows)
        ]
        return [line.rstrip() for line in lines]


def stage(
    name: str, ours: np.ndarray, want: np.ndarray, theirs: np.ndarray | None
) -> Stage:
    """Compare arrays of one shape: jrope's, the right one, PyTorch's if another."""
    torch = None if theirs is None else Error.of(theirs, want)
    return Stage(name=name, jrope=Error.of(ours, want), torch=torch)


def segment(
    trained: int,
    positions: np.ndarray,
    ours: np.ndarray,
    want: np.ndarray,
    theirs: np.ndarray | None,
) -> Segment:
    """Compare logits [..., T, V] at `positions` [T]; arrays as in `stage`."""
    first, last = int(positions[0]), int(positions[-1])
    name = "inside" if last < trained else "past" if first >= trained else "at"
    if last - first >= positions.size:
        name = "spread"
    p, q = _log_softmax(want), _log_softmax(ours)
    return Segment(
        first=first,
        last=last,
        logits=stage(name, ours, want, theirs),
        top1=float(np.mean(ours.argmax(-1) == want.argmax(-1))),
        kl=float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))),
    )


def _per_token(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Mean square and largest magnitude of error and reference: [4, tokens]."""
    gap, want = got.astype(np.float64) - want, want.astype(np.float64)
    powers = [np.square(x).mean(axis=-1) for x in (gap, want)]
    return np.stack([*powers, *(np.abs(x).max(axis=-1) for x in (gap, want))])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return part / whole


def _figures(stage: Stage) -> list[str]:
    ours, torch = stage.jrope, stage.torch
    cells = [f"{x:.2e}" for x in (ours.max_abs, ours.of_max, ours.rms)]
    if torch is not None:
        cells += [f"{ours.typical:.2e}", f"{torch.typical:.2e}", f"{stage.ratio:.3f}"]
    return cells


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}  # pyright: ignore
    if isinstance(value, tuple):
        return [_finite(x) for x in value]  # pyright: ignore
    bad = isinstance(value, float) and not math.isfinite(value)
    return None if bad else value
