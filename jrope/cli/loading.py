"""Weights that arrive while the command does other things."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jrope.cli.common import array_bytes
from jrope.cli.report import Timing
from jrope.cli.terminal import Progress
from jrope.hf.checkpoint import arriving_shapes, load, load_shapes
from jrope.hf.folders import PathLike
from jrope.weights.fuse import each_layer, fuse, order_for
from jrope.weights.int8 import Quantization


class _Unwanted(Exception):
    """Ends a load that nobody waits for any more."""


class Loading:
    """`checkpoint.load` in a thread; a context, which ends it when it is left early.

    Args:
      folder, dtype, quantize, mesh, adapter: as in `load`.
      rows: that will be decoded at once, for which the parameters are arranged by
        `fuse`, but on a mesh; None: they come as they are.

    Attributes:
      shapes: the parameters as ShapeDtypeStructs, there at once.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str | None,
        quantize: Quantization | None = None,
        mesh: Mesh | None = None,
        adapter: PathLike | None = None,
        rows: int | None = None,
    ) -> None:
        self._how: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "mesh": mesh}
        # finds what headers can tell
        self.shapes, _ = load_shapes(folder, **self._how)
        self._arrange = None
        if rows is not None and mesh is None:
            self._arrange = partial(fuse, order=order_for(self.shapes, rows))
            self.shapes = jax.eval_shape(self._arrange, self.shapes)
        arriving = sum(array_bytes(arriving_shapes(folder, dtype, quantize)))
        self._how["adapter"] = adapter
        jax.devices()  # starts the backend here, not in two threads at once
        self._bar, self._shown = Progress("loading", arriving), False
        self._unwanted = False
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(self._load, folder)

    def show(self) -> None:
        """Draw a bar from now on: nothing else may be printed until `wait` is over.

        Raises:
          JropeError: the load has failed already.
        """
        if self._future.done():
            self._future.result()
        self._shown = True

    def wait(self) -> tuple[Any, Timing]:
        """The parameters, and how long loading took."""
        try:
            return self._future.result()
        finally:
            self._hide()

    def _load(self, folder: Path) -> tuple[Any, Timing]:
        start = time.perf_counter()
        params, _ = load(folder, **self._how, check_finite=True, progress=self._count)
        if self._arrange is not None:
            params = each_layer(params, self._arrange)
        return params, Timing(load=time.perf_counter() - start)

    def _count(self, name: str, nbytes: int) -> None:
        if self._unwanted:
            raise _Unwanted
        if self._shown:
            self._bar(name, nbytes)
        else:
            self._bar.done += nbytes

    def _hide(self) -> None:
        self._shown = False
        self._bar.__exit__()

    def __enter__(self) -> "Loading":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._unwanted = True
        self._pool.shutdown(wait=kind is not KeyboardInterrupt)
        self._hide()
