"""Runs of `run_batch` in forked processes, each killed after a while.

`python batch_kills.py ROWS OUTPUT KILLS`: the process imports once, and its children,
which begin at once, do the work.  Prints how many bytes each killed one left, and how
often a line was cut short.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

from batch_file_helpers import HashEngine, run, settings

WRITE = os.write


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait(output: Path, draw: random.Random, kill: int) -> None:
    """Some milliseconds, perhaps too few for a row, or until some more are done."""
    if kill % 2:
        time.sleep(draw.uniform(0, 0.1))
        return
    wanted, end = size(output) + draw.randrange(1, 8000), time.monotonic() + 2
    while size(output) < wanted and time.monotonic() < end:
        time.sleep(1e-4)


def write_in_halves(file: int, data: memoryview) -> int:
    """A kill finds half a line now and then."""
    count = WRITE(file, data[: len(data) // 2])
    time.sleep(1e-4)
    return count + WRITE(file, data[count:])


def main(source: Path, output: Path, kills: int) -> None:
    warnings.simplefilter("ignore")  # JAX warns of forks; no child computes with it
    given, draw, left = settings(max_length=64), random.Random(0), list[int]()
    torn = 0
    run(source, output.with_suffix(".warm"), settings=given)  # imports the last modules
    while True:
        child = os.fork()
        if child == 0:
            os.write = write_in_halves
            run(source, output, settings=given, engine=HashEngine(seconds=1e-3))
            os._exit(0)
        if len(left) < kills:
            wait(output, draw, len(left))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        if not os.WIFSIGNALED(status):
            sys.exit(f"a run failed: {status}")
        left.append(size(output))
        torn += size(output) > 0 and not output.read_bytes().endswith(b"\n")
    print(json.dumps({"left": left, "torn": torn}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
