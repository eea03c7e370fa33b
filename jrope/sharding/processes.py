"""Several processes that compute together: how they meet, in bounded time."""

import socket
import sys
import threading

import jax

from jrope.errors import JropeError
from jrope.sharding.aborts import on_abort
from jrope.sharding.group import HEARTBEAT, Processes, end

PATIENCE = 120.0  # seconds that processes wait for each other when they start


def processes(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    patience: float = PATIENCE,
) -> Processes:
    """Join the other processes of a program; before anything else is asked of JAX.

    Every process then runs the same calls with the same arguments, on a mesh of all
    devices: `mesh`, `load(mesh=)`, `generate` and so on.

    Args:
      coordinator: "HOST:PORT" of process 0, where the port is free; None: what SLURM,
        Open MPI, Kubernetes or a TPU pod says, and `count` and `index` are None, too.
      count: how many there are.
      index: which one this is, from 0.
      patience: seconds to wait for the others.

    Returns:
      A context: at its end processes wait for each other; an error in one ends all.

    Raises:
      JropeError: arguments that do not fit, no such environment, a port that is taken.

    >>> with jrope.processes("10.0.0.1:1234", 2, 0) as group:  # doctest: +SKIP
    ...     params, config = jrope.load(folder, mesh=jrope.mesh("model=16"))
    """
    given = {"coordinator": coordinator, "count": count, "index": index}
    lacking = [name for name, value in given.items() if value is None]
    who = f"a process on {socket.gethostname()}"
    if coordinator is not None and count is not None and index is not None:
        _check(coordinator, count, index)
        who = f"process {index} ({socket.gethostname()})"
    elif len(lacking) < len(given):
        raise JropeError(f"processes: {', '.join(lacking)} missing; give all three")
    jax.config.update("jax_enable_recoverability", True)  # or XLA aborts with the dead
    jax.config.update("jax_enable_preemption_service", False)  # which ignores SIGTERM
    twice = "could not join; is each process started once, with an index of its own?"
    undo = on_abort(lambda: end(f"{who}: {twice}", sys.stderr))
    late = threading.Timer(patience, _nobody, (who, coordinator, index, patience))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=int(patience) + 30,  # `late` comes first
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise JropeError(_why(error)) from error
    finally:
        late.cancel()
        undo()
    return Processes(patience)


def _check(coordinator: str, count: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise JropeError(f"coordinator: got {coordinator!r}, want HOST:PORT")
    if not 0 <= index < count:
        raise JropeError(f"process: got {index} of {count}, want 0 to {count - 1}")
    if index == 0:  # XLA dies of a port that is taken
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise JropeError(
                    f"coordinator: port {port} of this host, where process 0 listens: "
                    f"{error.strerror}; take another one"
                ) from None


def _why(error: Exception) -> str:
    if "should be defined" in str(error) or "must be defined" in str(error):
        return (
            "processes: found neither SLURM, Open MPI, Kubernetes nor a TPU pod; give "
            "the coordinator's HOST:PORT, how many processes there are, and which one "
            "this is"
        )
    return f"processes: {error}"


def _nobody(
    who: str, coordinator: str | None, index: int | None, waited: float
) -> None:
    """End a process whose others did not come."""
    line = f"not all processes were there within {waited:g} s; start each once"
    if coordinator is not None and index != 0:
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), 2).close()
        except OSError as error:
            why = error.strerror or error
            line = f"no coordinator at {coordinator} within {waited:g} s ({why}); is "
            line += "process 0 running there, and may this host connect to it?"
    end(f"{who}: {line}", sys.stderr)
