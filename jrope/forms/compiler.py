"""A process of its own, in which outlines_core makes expressions into automata.

It is run as a script and imports neither jrope nor jax: an expression can take any
memory and time, and then ends this process alone.  Each line that it reads is an
expression, as JSON; its answer is a line of JSON and, where there is an automaton, as
many bytes as that says.
"""

import json
import sys
from array import array
from contextlib import suppress
from importlib import import_module
from typing import Any

NOTHING = "it matches nothing"


def main(memory: int, states: int) -> None:
    """Answer until the input ends.

    Args:
      memory: bytes of the process, at most, where the platform can limit them.
      states: of an automaton, at most.
    """
    core = import_module("outlines_core")
    letters = core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    limit(memory)
    out = sys.stdout.buffer
    for line in sys.stdin.buffer:
        body = b""
        try:
            index = core.Index(json.loads(line), letters)
            head, body = tables(index, states)
        except ValueError as error:
            why = str(error).partition("\n")[0]
            head = {"error": NOTHING if "incompatible with the regex" in why else why}
        out.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n" + body)
        out.flush()


def limit(memory: int) -> None:
    """Bound the address space, and leave no core dump where it ends the process."""
    with suppress(ImportError, OSError, ValueError):
        resource: Any = import_module("resource")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def tables(index: Any, most: int) -> tuple[dict[str, Any], bytes]:
    """S, the number of states, and the bytes of both arrays of `Automaton`."""
    ways: dict[int, dict[int, int]] = index.get_transitions()
    final = index.get_final_states()
    start = ways[index.get_initial_state()].get(0)
    order = {} if start is None else {start: 0}
    waiting = [*order]
    while waiting:
        for byte, to in ways[waiting.pop()].items():
            if 0 < byte < 256 and to not in order:
                order[to] = len(order)
                waiting.append(to)
    count = len(order)
    if count > most or not count:
        return {"states": count}, b""
    after = array("i", [count]) * (256 * (count + 1))
    accepting = bytearray(count + 1)
    for state, i in order.items():
        accepting[i] = ways[state].get(0) in final
        for byte, to in ways[state].items():
            if 0 < byte < 256:
                after[byte * (count + 1) + i] = order[to]
    return {"states": count}, after.tobytes() + accepting


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
