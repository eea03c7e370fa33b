"""What the device is and what it does at best: measured before any model runs on it.

A ceiling is the best of several runs of several programs; machines of one kind differ
by several per cent, so a figure says something only beside the ceilings of its run.
"""

import glob
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.numerics import matmul_precision

READ = {"gpu": 4 * 2**30, "cpu": 512 * 2**20}  # bytes, several times any cache
# M, K, N; the ragged ones often beat the square
PRODUCTS = {
    "gpu": ((8192, 8192, 8192), (8192, 4096, 14336), (8192, 14336, 4096)),
    "cpu": ((2048, 2048, 2048), (2048, 1024, 4096), (1024, 4096, 1024)),
}
HOST_BLOCK = 2**30
IN_A_ROW = 4  # calls on an accelerator between two looks at the clock
WARM_UP = 1.0  # seconds until an accelerator's clocks are up
RUNS = {"gpu": 20, "cpu": 5}


@final
@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device does at best.

    Args:
      read: bytes/s of reductions over a block larger than every cache.
      matmul: FLOP/s of matrix products in the run's dtype.
      transfer: bytes/s from the host's memory; None where that is the device's.
    """

    read: float
    matmul: float
    transfer: float | None

    def better_of(self, other: "Ceilings") -> "Ceilings":
        """The higher of each."""
        transfers = [t for t in (self.transfer, other.transfer) if t is not None]
        return Ceilings(
            read=max(self.read, other.read),
            matmul=max(self.matmul, other.matmul),
            transfer=max(transfers, default=None),
        )


@final
@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a profile: microseconds and launches in each step."""

    name: str
    microseconds: float
    launches: float


def measure_ceilings(
    dtype: Any,
    *,
    size: int | None = None,
    products: tuple[tuple[int, int, int], ...] | None = None,
    repeats: int | None = None,
) -> Ceilings:
    """Read a block, multiply matrices, copy from the host: the best of each.

    Args:
      dtype: of the matrices.
      size: bytes of the block; None: 4 GiB on an accelerator, 512 MiB on a CPU.
      products: M, K, N of the products; None: three large ones.
      repeats: runs of each program after it is warm; None: 20, on a CPU 5.
    """
    kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
    size = READ[kind] if size is None else size
    products = PRODUCTS[kind] if products is None else products
    repeats = RUNS[kind] if repeats is None else repeats
    transfer = None
    if kind != "cpu":
        host = np.ones(min(size, HOST_BLOCK), np.uint8)
        copy = partial(jax.device_put, host)
        transfer = host.nbytes / _fastest(copy, min(repeats, 5), in_a_row=1)
    return Ceilings(
        read=_read_rate(size, repeats),
        matmul=max(_matmul_rate(product, dtype, repeats) for product in products),
        transfer=transfer,
    )


def _read_rate(size: int, repeats: int) -> float:
    rows = max(size // (4 * 4096), 1)
    # All random would take longer to make than to read; equal rows read the same.
    row = jax.random.normal(jax.random.key(0), (1, 4096), jnp.float32)
    block = jnp.tile(row, (rows, 1))
    reads: list[Callable[[jax.Array], jax.Array]] = [
        jnp.max,
        jnp.sum,
        lambda x: jnp.sum(x, axis=1),
    ]
    fastest = min(_fastest(partial(jax.jit(f), block), repeats) for f in reads)
    return block.nbytes / fastest


def _matmul_rate(product: tuple[int, int, int], dtype: Any, repeats: int) -> float:
    m, k, n = product
    # Random: products of zeros or ones draw less power and run faster.
    a, b = (
        jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype)
        for i, shape in enumerate([(m, k), (k, n)])
    )
    wide = jax.default_backend() == "cpu"  # as `products.linear` asks for it
    multiply = jax.jit(
        partial(
            jax.lax.dot,
            precision=matmul_precision(a.dtype),
            preferred_element_type=jnp.float32 if wide else a.dtype,
        )
    )
    return 2 * m * k * n / _fastest(lambda: multiply(a, b), repeats)


def _fastest(run: Callable[[], Any], repeats: int, in_a_row: int = IN_A_ROW) -> float:
    """Seconds of the fastest call, once the device is warm."""
    cpu = jax.default_backend() == "cpu"
    calls, warm_up = (1, 0.0) if cpu else (in_a_row, WARM_UP)
    jax.block_until_ready(run())
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm_up:
        jax.block_until_ready(run())
    times: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        times.append((time.perf_counter() - begin) / calls)
    return min(times)


def memory_limit() -> int | None:
    """Bytes that programs may use; None where nobody tells."""
    stats = _memory_stats()
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def peak_memory() -> int | None:
    """The most bytes that were in use since the process began, if the device tells."""
    return _memory_stats().get("peak_bytes_in_use")


def _memory_stats() -> dict[str, int]:
    return jax.local_devices()[0].memory_stats() or {}


def host_load() -> float | None:
    """Processes that want a core, a minute's average, for each core there is."""
    if not hasattr(os, "getloadavg"):
        return None
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def describe_device() -> dict[str, Any]:
    """Kind, count, driver, memory and processor: what a figure depends on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "driver": _driver() if device.platform == "gpu" else None,
        "memory_bytes": memory_limit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def top_kernels(folder: str, steps: int) -> list[Kernel]:
    """The device's kernels in the newest trace under `folder`, the longest first.

    Raises:
      JropeError: the trace holds no device, as on a CPU.
    """
    files = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    if not files:
        raise JropeError(f"no trace was written in {folder}")
    data: Any = jax.profiler.ProfileData.from_file(max(files, key=os.path.getmtime))
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for plane in data.planes:
        if not plane.name.startswith("/device:"):
            continue
        lines = list(plane.lines)
        # The other lines tell the same again, by module and by operation.
        streams = [line for line in lines if line.name.startswith("Stream")] or lines
        for event in (event for line in streams for event in line.events):
            times[event.name] += event.duration_ns / 1e3 / steps
            counts[event.name] += 1
    if not times:
        platform = jax.default_backend()
        raise JropeError(f"the trace holds no kernels of a device (on {platform})")
    ordered = sorted(times, key=lambda name: -times[name])
    return [
        Kernel(name=n, microseconds=times[n], launches=counts[n] / steps)
        for n in ordered
    ]
