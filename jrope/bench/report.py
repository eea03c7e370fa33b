"""What a benchmark found, as lines for people and as JSON for tables."""

import json
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Literal, final

import jax

from jrope.bench.device import Ceilings, Kernel, describe_device
from jrope.bench.model import cache_bytes, weight_count
from jrope.model.config import LlamaConfig
from jrope.rope import describe
from jrope.weights.int8 import Quantization

Work = Literal["prefill", "decode"]
WIDTH = "{:<8}{:<23}{:<9}{:<8}{:>5}{:>8}{:>12}{:>11}{:>7}{:>11}{:>7}{:>9}{:>9}{:>8}"
HEADER = (
    "work", "by", "sampler", "weights", "batch", "context", "time", "tokens/s",
    "spread", "counted", "limit", "memory", "temp", "compile",
)  # fmt: skip
KERNELS = 15  # lines of a profile
BUSY = 0.5  # of the cores, before anything is measured


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was timed; what is not known is None.

    Args:
      work: "prefill", one prompt, or "decode", one step of the loop.
      by: "jrope" or whoever else.
      sampler: how decode draws.
      order: of the layers' matrices, see `fuse`.
      batch: rows.
      context: tokens of the prompt, or filled slots at the first step; mean of rows.
      capacity: slots of the cache.
      new: tokens that decode adds in a run.
      problem: why there are no figures.
      seconds: median, of a prompt or of a step.
      spread: (slowest - fastest) / median.
      repeats: runs behind the median.
      tokens_per_second: all rows together.
      counted: FLOPs of the prompt, or bytes that a step must read; of a device's part.
      of_ceiling: counted / seconds as a part of the device's best.
      memory_bytes: arguments, results and temporaries of the program, on a device.
      temp_bytes: its temporaries alone.
      alias_bytes: results that lie in the arguments' memory: the donated cache.
      compile_seconds: tracing and compiling.
      device_peak_bytes: the most the device had in use since the process began.
      host_load: processes that wanted a core, for each core, the runs' own included.
      ratio: this one's seconds in terms of jrope's.
      kernels: of a profile, per step.
      note: why there is no profile.
    """

    work: Work
    by: str
    sampler: str | None
    order: str | None
    batch: int
    context: int
    capacity: int
    new: int
    problem: str | None = None
    seconds: float | None = None
    spread: float | None = None
    repeats: int = 0
    tokens_per_second: float | None = None
    counted: int | None = None
    of_ceiling: float | None = None
    memory_bytes: int | None = None
    temp_bytes: int | None = None
    alias_bytes: int | None = None
    compile_seconds: float | None = None
    device_peak_bytes: int | None = None
    host_load: float | None = None
    ratio: float | None = None
    kernels: tuple[Kernel, ...] | None = None
    note: str | None = None

    def lines(self) -> list[str]:
        """The row of the table, and the kernels below it."""
        place = (self.work, self.by, self.sampler or "", self.order or "")
        place = (*place, str(self.batch), str(self.context))
        if self.seconds is None:
            empty = WIDTH.format(*place, *[""] * (len(HEADER) - len(place)))
            return [f"{empty.rstrip()}  {self.problem}"]
        unit = "FLOP" if self.work == "prefill" else "B"
        known = [
            f"{self.seconds * 1e3:.3f} ms",
            f"{self.tokens_per_second or 0:.1f}",
            f"{self.spread or 0:.1%}",
            _si(self.counted, unit),
            f"{self.of_ceiling or 0:.1%}",
            _si(self.memory_bytes, "B"),
            _si(self.temp_bytes, "B"),
            "" if self.compile_seconds is None else f"{self.compile_seconds:.1f} s",
        ]
        line = WIDTH.format(*place, *known).rstrip()
        if self.ratio is not None:
            faster = "the mesh" if self.by.startswith("jrope") else "jrope"
            line += f"  {faster} is {self.ratio:.2f}x as fast"
        return [line, *self._profile()]

    def _profile(self) -> list[str]:
        if self.kernels is None:
            return [] if self.note is None else [f"    no kernel table: {self.note}"]
        total = sum(kernel.microseconds for kernel in self.kernels)
        launches = sum(kernel.launches for kernel in self.kernels)
        head = f"    kernels: {total:.1f} us, {launches:.1f} launches a step"
        return [head] + [
            f"    {k.microseconds:10.1f} us {k.microseconds / total:6.1%} "
            f"{k.launches:8.1f} x  {k.name[:100]}"
            for k in self.kernels[:KERNELS]
        ]


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run: what it ran on, what it ran, the ceilings, the rows."""

    model: str
    dtype: str  # of the activations, and of the weights that are not quantised
    config: LlamaConfig
    command: tuple[str, ...]
    ceilings: Ceilings
    weight_bytes: int
    read_bytes: int  # of the weights, by a step
    rows: tuple[Row, ...] = ()
    busy: float | None = None  # the host's load before anything was measured
    load_seconds: float | None = None
    quantize: Quantization | None = None
    mesh: str | None = None

    def head(self) -> list[str]:
        """Device, versions, model and ceilings, above the table."""
        device, versions = describe_device(), package_versions()
        on = device["kind"] if device["kind"] != "cpu" else device["processor"]
        driver = f", driver {device['driver']}" if device["driver"] else ""
        size = self.weight_bytes
        kind = f", {self.quantize} weights" if self.quantize else ""
        best = self.ceilings
        limits = [
            f"reads {_si(best.read, 'B/s')}",
            f"multiplies {_si(best.matmul, 'FLOP/s')} in {self.dtype}",
        ]
        if best.transfer is not None:
            limits.append(f"copies {_si(best.transfer, 'B/s')} from the host")
        lines = [
            f"{on}{driver}, {device['cores']} processor cores",
            ", ".join(f"{name} {number}" for name, number in versions.items()),
            f"{self.model}, {self.config.num_hidden_layers} layers, {self.dtype}"
            f"{kind}: {_si(size, 'B')} of weights"
            f", rope {describe(self.config.rope)}",
            f"at best the device {', '.join(limits)}",
        ]
        if self.mesh is not None:
            lines.append(
                f"mesh {self.mesh}: batch and tokens/s are of all devices; counted, "
                "limit, memory and temp of each"
            )
        if self.load_seconds is not None:
            rate = size / self.load_seconds
            text = f"weights loaded in {self.load_seconds:.2f} s, {_si(rate, 'B/s')}"
            if best.transfer is not None:
                text += f", {rate / best.transfer:.0%} of what copying takes"
            lines.append(text)
        if self.busy is not None and self.busy > BUSY:
            lines.append(
                f"BUSY: the host had {self.busy:.1f} processes for each core before "
                "this began; on a CPU the figures, ratios above all, mean nothing"
            )
        return [*lines, "", WIDTH.format(*HEADER).rstrip()]

    def with_row(self, row: Row) -> "Report":
        """The report with one more row."""
        return replace(self, rows=(*self.rows, row))

    def with_ceilings(self, again: Ceilings) -> "Report":
        """The report with the better of two measurements, every row beside it."""
        best, rows = self.ceilings.better_of(again), list(self.rows)
        for i, row in enumerate(rows):
            if row.counted is not None and row.seconds is not None:
                limit = best.matmul if row.work == "prefill" else best.read
                part = row.counted / row.seconds / limit
                rows[i] = replace(row, of_ceiling=part)
        return replace(self, ceilings=best, rows=tuple(rows))

    def table(self) -> list[str]:
        """Every row of the table, once all is known."""
        return [line for row in self.rows for line in row.lines()]

    def to_json(self) -> str:
        """Everything; kernels of a profile in full."""
        config, itemsize = self.config, _itemsize(self.dtype)
        sizes = {
            "layers": config.num_hidden_layers,
            "parameters": weight_count(config),
            "quantize": self.quantize,
            "rope": describe(self.config.rope),
            "mesh": self.mesh,
            "weight_bytes": self.weight_bytes,
            "read_bytes": self.read_bytes,
            "slot_bytes": cache_bytes(config, 1, itemsize),
        }
        shape = asdict(config)
        shape["rope"]["scaling"] = repr(config.rope.scaling)
        report = {
            "command": list(self.command),
            "versions": package_versions(),
            "device": describe_device(),
            "compile_cache": _compile_cache(),
            "model": {"name": self.model, "dtype": self.dtype, **sizes},
            "config": shape,
            "load_seconds": self.load_seconds,
            "host_load_before": self.busy,
            "ceilings": asdict(self.ceilings),
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(report, indent=2, allow_nan=False)


def package_versions() -> dict[str, str]:
    """Of jrope and jax, and of their peers where they take part."""
    names = ["jrope", "jax", "jaxlib", "numpy"]
    names += [name for name in ("torch", "transformers") if name in sys.modules]
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[name] = str(getattr(sys.modules.get(name), "__version__", "unknown"))
    return found


def _compile_cache() -> str | None:
    return jax.config.jax_compilation_cache_dir  # pyright: ignore


def _itemsize(dtype: str) -> int:
    return jax.numpy.dtype(dtype).itemsize


def _si(number: float | None, unit: str) -> str:
    """Four figures with a decimal prefix.

    >>> _si(2.936e12, "B/s")
    '2.94 TB/s'
    """
    if number is None:
        return ""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} P{unit}"
