"""What a program needs and what is free: known before it runs."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import jax

from jrope.errors import JropeError

_CGROUP = Path("/sys/fs/cgroup")


@final
@dataclass(frozen=True)
class Program:
    """A compiled function and its memory.

    Args:
      call: the compiled function; static arguments are no longer given.
      total: bytes of arguments (the weights among them), results and temporaries.
    """

    call: Callable[..., Any]
    total: int


def compile_fitting(function: Any, what: str, *args: Any, **static: Any) -> Program:
    """Compile a jitted function for these arguments, if it will fit in memory.

    Args:
      function: what `jax.jit` returned.
      what: names the work in the error.
      args: arrays, or ShapeDtypeStructs in their place.
      static: static arguments.

    Raises:
      JropeError: results and temporaries need more than is free, with the numbers.
    """
    compiled = function.lower(*args, **static).compile()
    sizes = compiled.memory_analysis()
    held = sizes.argument_size_in_bytes
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    new += sizes.temp_size_in_bytes
    check_fits(what, held, new)
    return Program(compiled, held + new)


def check_fits(what: str, held: int, new: int) -> None:
    """Raise a JropeError when `new` bytes beside the `held` ones exceed what is free.

    Args:
      what: names the work in the error.
      held: bytes that are in memory already.
      new: bytes that would be allocated.
    """
    free = free_bytes()
    if free is not None and new > free:
        raise JropeError(
            f"{what} needs {_gigabytes(held + new)} ({_gigabytes(held)} of weights and "
            f"inputs, {_gigabytes(new)} of temporaries), but only {_gigabytes(free)} "
            "are free beside the weights; take a shorter context"
        )


def check_weights(size: int) -> None:
    """Raise a JropeError when weights of so many bytes do not fit."""
    free = free_bytes()
    if free is not None and size > free:
        raise JropeError(
            f"the weights need {_gigabytes(size)}, but only {_gigabytes(free)} are "
            "free; a 16-bit --dtype takes half of float32"
        )


def free_bytes() -> int | None:
    """Bytes that programs may still allocate; None where nobody tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if jax.default_backend() != "cpu":
        return None
    known = [size for size in (_free_memory(), _free_in_group()) if size is not None]
    return min(known, default=None)


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        names = getattr(os, "sysconf_names", {})
        if "SC_AVPHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return int(sizes["MemAvailable"].split()[0]) * 1024


def _free_in_group() -> int | None:
    """What a container may still take, its file cache counted as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text("ascii").strip()
        used = int((_CGROUP / "memory.current").read_text("ascii"))
        rows = (_CGROUP / "memory.stat").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cached = {name: int(n) for name, _, n in (row.partition(" ") for row in rows)}
    return max(int(limit) - used + cached.get("inactive_file", 0), 0)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
