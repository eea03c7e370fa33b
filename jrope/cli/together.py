"""Several devices and several processes: --mesh, --distributed and what they do."""

import argparse
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from importlib.metadata import version
from typing import TextIO

import jax
from jax.sharding import Mesh

from jrope.cli.common import whole
from jrope.errors import JropeError
from jrope.hf.fingerprints import fingerprints
from jrope.hf.folders import find_folder
from jrope.sharding.group import Processes
from jrope.sharding.meshes import mesh
from jrope.sharding.processes import processes

_OWN = ("--process", "--coordinator")  # which processes may spell differently


def add_mesh_arguments(
    parser: argparse.ArgumentParser, *, together: bool = True
) -> None:
    """Add --mesh, and where `together` what makes several processes one command."""
    add = parser.add_argument
    text = "split the model over devices, such as data=2,model=4 (one device)"
    add("--mesh", metavar="AXIS=N,...", help=text)
    if not together:
        return
    text = "one of several processes, as SLURM, Open MPI, Kubernetes or a TPU pod says"
    add("--distributed", action="store_true", help=text)
    text = "the same by hand: where process 0 listens, on a free port"
    add("--coordinator", metavar="HOST:PORT", help=text)
    add("--processes", metavar="N", type=whole(1), help="how many there are")
    add("--process", metavar="I", type=whole(0), help="which one this is, from 0")


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh of --mesh; of all devices where there are several processes.

    Raises:
      JropeError: it does not fit, or several processes have none.
    """
    if args.mesh is not None:
        return mesh(args.mesh)
    if (group := shared(args)) is not None and group.count > 1:
        devices = jax.device_count()
        raise JropeError(
            f"--mesh: {group.count} processes have {devices} devices; say how they "
            f"split the model, such as --mesh model={devices}"
        )
    return None


def are_together(args: argparse.Namespace) -> bool:
    """Whether this process is one of several.

    Raises:
      JropeError: a part of what tells so is missing.
    """
    given = {
        name: getattr(args, name, None)
        for name in ("coordinator", "processes", "process")
    }
    some = [name for name, value in given.items() if value is not None]
    if getattr(args, "distributed", False) and some:
        raise JropeError(f"--distributed finds out itself: leave --{some[0]} out")
    if some and len(some) < len(given):
        lacking = ", ".join(f"--{name}" for name in given if name not in some)
        raise JropeError(f"--{some[0]} needs {lacking}, too")
    return bool(some) or getattr(args, "distributed", False)


def run_together(
    args: argparse.Namespace,
    words: Sequence[str],
    run: Callable[[argparse.Namespace], int],
) -> int:
    """Run a command as one of several processes, of which the first alone tells.

    Raises:
      JropeError: of this process, or where processes were given different things.
    """
    with own_streams():
        group = processes(args.coordinator, args.processes, args.process)
        args.group = group
        with group, _silent(group.index > 0):
            group.agree(_facts(args, words))
            return run(args)


def shared(args: argparse.Namespace) -> "Processes | None":
    """The processes of the command, where it is one of several."""
    return getattr(args, "group", None)


def _facts(args: argparse.Namespace, words: Sequence[str]) -> dict[str, str]:
    """What has to be the same everywhere."""
    own = [i for i, word in enumerate(words) if word.split("=")[0] in _OWN]
    left = {i + n for i in own for n in range(1 if "=" in words[i] else 2)}
    facts = {name: version(name) for name in ("jrope", "jax")}
    kept = [word for i, word in enumerate(words) if i not in left]
    return {
        **facts,
        "arguments": shlex.join(kept),
        **fingerprints(find_folder(args.folder, None)),
    }


@contextlib.contextmanager
def _silent(wanted: bool) -> Generator[None]:
    """Print nothing, if wanted."""
    with contextlib.ExitStack() as stack:
        if wanted:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


@contextlib.contextmanager
def own_streams() -> Generator[None]:
    """Keep Python's output apart from that of C++, which is dropped.

    XLA and Gloo tell of every connection, and of a lost one with a stack trace.
    JROPE_DEBUG in the environment lets them.
    """
    if os.environ.get("JROPE_DEBUG"):
        yield
        return
    before = sys.stdout, sys.stderr
    kept = [_copy(stream, number) for number, stream in enumerate(before, 1)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    sys.stdout, sys.stderr = kept
    try:
        yield
    finally:
        for number, stream in enumerate(kept, 1):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            os.dup2(stream.fileno(), number)
        sys.stdout, sys.stderr = before
        for stream in kept:
            with contextlib.suppress(OSError, ValueError):
                stream.close()


def _copy(stream: TextIO, number: int) -> TextIO:
    """A stream of its own to where a file descriptor leads."""
    stream.flush()
    file = os.fdopen(os.dup(number), "wb")
    line = number == 2 or stream.isatty()
    return io.TextIOWrapper(file, stream.encoding, "replace", line_buffering=line)
