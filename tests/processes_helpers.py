"""A tiny folder, and sets of processes on this host that work on it together.

Run as a script this file is one of the processes: WORK, INDEX, COUNT, PORT, OUT, words.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HOST = socket.gethostname()
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 9)).astype(np.int32)
LENGTHS = np.array([9, 1, 5, 9], np.int32)
TEXT = np.random.default_rng(1).integers(0, 256, 70).astype(np.int32)
NEW = 6


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def start(work: str, count: int, out: Path, *words: Any, **more: Any) -> list[Any]:
    """Begin `count` processes; `more`: devices of each; lists `cwd` and `own`."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    devices = f"--xla_force_host_platform_device_count={more.get('devices', 1)}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
    keep = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    root = str(Path(__file__).parents[1])
    environment = {**keep, "XLA_FLAGS": flags, "PYTHONPATH": root}
    environment |= {"JAX_PLATFORMS": "cpu", "JROPE_CACHE_DIR": "", "JROPE_DEBUG": ""}
    return [
        subprocess.Popen(
            [
                *(sys.executable, __file__, work, str(i), str(count), str(port), out),
                *map(str, (*words, *more.get("own", [()] * count)[i])),
            ],
            env=environment,
            cwd=more.get("cwd", [None] * count)[i],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def ends(running: list[Any], patience: float = 200) -> list[Ended]:
    """What became of them; none outlives the test."""
    try:
        end = time.monotonic() + patience
        told = [p.communicate(timeout=max(end - time.monotonic(), 1)) for p in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(p.returncode, *t) for p, t in zip(running, told, strict=True)]


def error_line(ended: Ended) -> str:
    """The one line that a process ends with."""
    assert ended.status == 2, ended
    assert ended.err.startswith("jrope: error: ") and ended.err.count("\n") == 1, ended
    assert ended.out == ""
    return ended.err.strip()


def tokens(params: Any, config: Any) -> dict[str, Any]:
    """What `generate` and `stream` give, half of it drawn."""
    import jax

    import jrope

    hot = jrope.Sampler(temperature=np.array([0, 1.2] * 2, np.float32), top_k=9)
    how: dict[str, Any] = {"config": config, "max_new_tokens": NEW, "sampler": hot}
    how["key"] = jax.random.key(2)
    out = jrope.generate(params, TOKENS, LENGTHS, **how)
    blocks = jrope.stream(params, TOKENS, LENGTHS, **how)
    return {
        "tokens": np.asarray(out.tokens).tolist(),
        "lengths": np.asarray(out.lengths).tolist(),
        "stream": np.concatenate([*blocks], axis=1).tolist(),
        "finite": (blocks.finite & out.finite).tolist(),
    }


def measures(params: Any, config: Any) -> dict[str, Any]:
    """What `jrope evaluate` measures."""
    from jrope.lab.distance import mean_queries_and_keys
    from jrope.lab.perplexity import perplexity

    scores = perplexity(params, config, [TEXT], 16, stride=8, tokens_at_once=32)
    queries = mean_queries_and_keys(params, config, [TEXT], 16).queries
    return {"nll": scores.nll.tolist(), "queries": queries.tolist()}


def _count_bytes() -> list[int]:
    from jrope.hf import tensors as files

    read, fill = [0], files._fill

    def counted(file: Any, at: int, out: Any) -> None:
        read[0] += out.size
        fill(file, at, out)

    files._fill = counted
    return read


def _loaded(index: int, count: int, port: str, folder: str) -> Any:
    import jax

    import jrope

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    read = _count_bytes()
    group = jrope.processes(f"127.0.0.1:{port}", count, index)
    group.agree({"what": "the same"})
    mesh = jrope.mesh("data=2,model=2")
    params, config = jrope.load(folder, mesh=mesh)
    return group, params, config, read[0]


def _refused(act: Any) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return "done"


def _four(index: int, count: int, port: str, out: Path, words: list[str]) -> None:
    """Tokens of all, and a common end."""
    import jrope

    group, params, config, read = _loaded(index, count, port, *words)
    with group:
        found = {
            "read": read,
            "hosts": group.hosts,
            **tokens(params, config),
        }
        assert group.share(f"of {index}") == "of 0"
        found["small mesh"] = _refused(lambda: jrope.mesh("model=2"))
        found["saving"] = _refused(lambda: jrope.save(out / "copy", params, config))
        (out / f"{index}.json").write_text(json.dumps(found))


def _two(index: int, count: int, port: str, out: Path, words: list[str]) -> None:
    """What is measured; then process 0 dies while the other one computes."""
    import jax

    group, params, config, read = _loaded(index, count, port, *words)
    with group:
        found = {"read": read, "hosts": group.hosts, **measures(params, config)}
        part = out / f"{index}.part"
        part.write_text(json.dumps(found))
        part.rename(out / f"{index}.json")
        while index == 0 and not (out / "1.json").exists():
            time.sleep(0.01)  # or it would die before the other one has written
        weight = params["lm_head"]["weight"]
        for step in itertools.count():
            jax.block_until_ready(jax.numpy.sum(weight))
            if index == 0 and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)


def _idle(index: int, count: int, port: str, out: Path, words: list[str]) -> None:
    """Process 1 dies, and nothing is computed that would tell."""
    import jrope

    with jrope.processes(f"127.0.0.1:{port}", count, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)


def _alone(index: int, count: int, port: str, out: Path, words: list[str]) -> None:
    """Process 1 of two, and no process 0."""
    import jrope

    jrope.processes(f"127.0.0.1:{port}", 2, 1, patience=2)


def _command(index: int, count: int, port: str, out: Path, words: list[str]) -> None:
    """The command line, as the installed script calls it."""
    from jrope import cli

    read = _count_bytes()
    where = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
    sys.argv = ["jrope", *words, *where, "--process", str(index)]
    status = cli.main()
    (out / f"{index}.read").write_text(str(read[0]))
    sys.exit(status)


if __name__ == "__main__":
    _work, _index, _count, _port, _out, *_words = sys.argv[1:]
    _works = {"four": _four, "two": _two, "idle": _idle, "alone": _alone}
    _works["command"] = _command
    _works[_work](int(_index), int(_count), _port, Path(_out), _words)
