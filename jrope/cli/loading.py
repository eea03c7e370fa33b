"""Weights that arrive while the command does other things."""

import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax

from jrope.checkpoint import load, load_shapes
from jrope.cli.report import Timing
from jrope.cli.terminal import Progress
from jrope.config import flatten
from jrope.int8 import Quantize


class _Unwanted(Exception):
    """Ends a load that nobody waits for any more."""


class Loading:
    """`checkpoint.load` in a thread; a context, which ends it when it is left early.

    Attributes:
      shapes: the parameters as ShapeDtypeStructs, there at once.
    """

    def __init__(
        self, folder: Path, dtype: str | None, quantize: Quantize | None = None
    ) -> None:
        # finds what headers can tell
        self.shapes, _ = load_shapes(folder, dtype, quantize=quantize)
        arriving, _ = load_shapes(folder, dtype)
        jax.devices()  # starts the backend here, not in two threads at once
        self._total = sum(
            leaf.size * leaf.dtype.itemsize for leaf in flatten(arriving).values()
        )
        self._arrived, self._unwanted = 0, False
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(self._load, folder, dtype, quantize)

    def wait(self) -> tuple[Any, Timing]:
        """The parameters, and how long loading took; a bar meanwhile."""
        with Progress("loading", self._total) as progress:
            while not self._future.done():
                progress("", self._arrived - progress.done)
                wait([self._future], timeout=0.1)
        return self._future.result()

    def _load(
        self, folder: Path, dtype: str | None, quantize: Quantize | None
    ) -> tuple[Any, Timing]:
        start = time.perf_counter()
        params, _ = load(folder, dtype, quantize=quantize, progress=self._count)
        return params, Timing(load=time.perf_counter() - start)

    def _count(self, _: str, nbytes: int) -> None:
        if self._unwanted:
            raise _Unwanted
        self._arrived += nbytes

    def __enter__(self) -> "Loading":
        return self

    def __exit__(self, *_: object) -> None:
        self._unwanted = True
        self._pool.shutdown()
