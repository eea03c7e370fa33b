"""The papers' table on a small model: methods x steps of fine-tuning x contexts.

    python examples/extension_table.py [FOLDER] --out OUT --text BOOK... --held-out BOOK

Every method is tuned on the same windows of FACTOR times the trained length, once for
each number of steps, with a learning rate schedule of that length, and once per seed.
The books are read as train_tiny.py reads them; perplexity is that of the second half of
the held-out text, on which no choice was made.  OUT gets extension.json and
extension.md, both written anew after each method.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _tuning import (
    Text,
    command,
    compile_step,
    held_out_nats,
    learning_rates,
    make_step,
    new_state,
    read_text,
    train,
)

import jrope
from jrope.cli.common import apply_rope, trained_length, whole
from jrope.cli.terminal import bytes_text
from jrope.cli.text import load_tokenizer
from jrope.errors import JropeError

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"
# Dynamic NTK grows with the length by itself; its factor only exaggerates.
METHODS = ("default", "linear:{0}", "ntk:{0}", "dynamic:1", "yarn:{0}")
PRICED = 20  # steps, for memory and speed
Row = dict[str, Any]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="extension_table", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=EMBEDDED, help="Hugging Face folder")
    add("--out", type=Path, required=True, help="folder for the tables")
    add("--text", type=Path, nargs="+", required=True, help="books to train on")
    add("--held-out", type=Path, nargs="+", required=True, help="never trained on")
    add("--factor", type=whole(2), default=8, help="of the context (default 8)")
    about = "SPECs, {0} being the factor (default: %(default)s)"
    add("--rope", nargs="+", default=METHODS, metavar="SPEC", help=about)
    about = "lengths to measure at (default: 1, 2, 4, ... FACTOR times the trained one)"
    add("--contexts", type=whole(2), nargs="+", metavar="N", help=about)
    add("--steps", type=whole(2), nargs="+", default=[100, 400], help="(100 400)")
    add("--seeds", type=whole(0), nargs="+", default=[0], help="of the windows (0)")
    add("--batch", type=whole(1), default=16, help="windows of a step (default 16)")
    add("--rate", type=float, default=3e-4, help="peak learning rate (default 3e-4)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args(argv)
    words = map(Path, sys.argv[1:] if argv is None else argv)
    args.command = shlex.join(p.name if p.exists() else str(p) for p in words)
    return args


def lengths_of(args: argparse.Namespace, trained: int) -> tuple[list[int], int]:
    """The contexts to measure at, and the window to train on."""
    doubled = [2**i for i in range(int(math.log2(args.factor)) + 1)]
    times = sorted({*doubled, args.factor})
    return args.contexts or [trained * n for n in times], trained * args.factor


def measure(
    params: Any, config: jrope.LlamaConfig, text: Text, contexts: list[int]
) -> dict[str, list[float]]:
    """Nats per token by context: of whole windows, and of their second halves."""
    found: dict[str, list[float]] = {}
    for length in contexts:
        nats = held_out_nats(params, text, length, config)
        late = nats[:, length // 2 - 1 :]
        found[str(length)] = [float(nats.mean()), float(late.mean())]
    return found


def tune(
    run: Callable[..., Any], params: Any, rates: np.ndarray, rows: Callable[[int], Any]
) -> tuple[Any, list[float], float]:
    """The tuned weights, the losses, and seconds per step."""
    losses: list[Any] = []
    state, started = new_state(params), time.perf_counter()
    for _, new in train(run, state, losses, rates, rows):
        state = new
    jax.block_until_ready(state)
    each = (time.perf_counter() - started) / len(rates)
    return state["params"], [float(loss) for loss in losses], each


def prices(
    args: argparse.Namespace, params: Any, config: jrope.LlamaConfig, text: Text
) -> Iterator[Row]:
    """Memory and speed of a step: with and without remat, and in parts."""
    window = trained_length(config) * args.factor
    plans = [(True, 1), (False, 1)]
    plans += [(True, 4)] if args.batch % 4 == 0 else []
    for remat, parts in plans:
        shape = (parts, args.batch // parts, window)
        step = make_step(config, args.dtype, remat)
        run, need = compile_step(step, new_state(params), shape)
        _, _, each = tune(
            run, params, np.zeros(PRICED, np.float32), draw(args, text, shape)
        )
        speed = args.batch * window / each
        yield {
            "remat": remat,
            "parts": parts,
            "bytes": need,
            "tokens_per_second": speed,
        }


def draw(
    args: argparse.Namespace, text: Text, shape: tuple[int, ...], seed: int = 0
) -> Callable[[int], np.ndarray]:
    """The windows of each step, in parts."""
    return lambda step: text.draw(shape[-1], args.batch, seed, step).reshape(shape)


def zero_shot(
    ropes: list[str], model: tuple[Any, jrope.LlamaConfig], text: Text, at: list[int]
) -> list[Row]:
    """Every method without tuning; in threads, because most of it is compiling."""
    params, config = model

    def row(rope: str) -> Row:
        how = apply_rope(config, argparse.Namespace(rope=rope, condense=None))
        nats = measure(params, how, text, at)
        return {"rope": rope, "steps": 0, "seed": None, "nats": nats}

    with ThreadPoolExecutor() as pool:
        return list(pool.map(row, ropes))


def rows_of(
    args: argparse.Namespace,
    rope: str,
    model: tuple[Any, jrope.LlamaConfig],
    texts: tuple[Text, Text],
) -> Iterator[Row]:
    """A method after each number of steps, for each seed."""
    (params, config), (text, unseen) = model, texts
    contexts, window = lengths_of(args, trained_length(config))
    config = apply_rope(config, argparse.Namespace(rope=rope, condense=None))
    shape = (1, args.batch, window)
    run, need = compile_step(
        make_step(config, args.dtype, True), new_state(params), shape
    )
    for steps in args.steps:
        rates = learning_rates(steps, args.rate, max(1, steps // 20))
        for seed in args.seeds:
            rows = draw(args, text, shape, seed)
            tuned, losses, each = tune(run, params, rates, rows)
            facts = {"bytes": need, "tokens_per_second": args.batch * window / each}
            nats = measure(tuned, config, unseen, contexts)
            facts |= {
                "first_loss": losses[0],
                "last_loss": float(np.mean(losses[-10:])),
            }
            yield {"rope": rope, "steps": steps, "seed": seed, "nats": nats, **facts}


def table(rows: list[Row], window: int) -> str:
    """Perplexities, the mean over the seeds with half their range; Markdown."""
    lengths = list(rows[0]["nats"])
    late = [n for n in lengths if int(n) == window]
    names = [*lengths, *(f"{n}, second half" for n in late)]
    lines = [["method", "steps", *names], ["---", "---:", *["---:"] * len(names)]]
    ropes = list(dict.fromkeys(row["rope"] for row in rows))
    kinds = {(ropes.index(row["rope"]), row["steps"]) for row in rows}
    for rope, steps in ((ropes[i], steps) for i, steps in sorted(kinds)):
        same = [r["nats"] for r in rows if (r["rope"], r["steps"]) == (rope, steps)]
        cells = [[nats[n][0] for nats in same] for n in lengths]
        cells += [[nats[n][1] for nats in same] for n in late]
        lines.append([rope, str(steps), *map(cell, cells)])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """Lines of cells, the first two the head."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(nats: list[float]) -> str:
    """Perplexity of some runs: their mean, and half the range of several."""
    found = np.exp(nats)
    spread = f" ± {np.ptp(found) / 2:.1f}" if len(nats) > 1 else ""
    return f"{found.mean():.1f}{spread}"


def price_table(prices: list[Row], rows: list[Row]) -> str:
    """Memory and speed, Markdown."""
    lines = [["training step", "memory", "tokens/s"], ["---", "---:", "---:"]]
    for price in prices:
        name = "each layer computed anew" if price["remat"] else "all layers kept"
        name += f", batch in {price['parts']} parts" if price["parts"] > 1 else ""
        lines.append([name, *price_cells([price])])
    for rope in dict.fromkeys(row["rope"] for row in rows):
        some = [row for row in rows if row["rope"] == rope and row["steps"]]
        lines.append([f"{rope}, each layer computed anew", *price_cells(some)])
    return markdown(lines)


def price_cells(rows: list[Row]) -> list[str]:
    """Memory, and the median speed."""
    speed = float(np.median([row["tokens_per_second"] for row in rows]))
    return [bytes_text(rows[0]["bytes"]), f"{speed:,.0f}"]


def write(folder: Path, found: dict[str, Any], window: int) -> str:
    """Both files, with whatever is known so far; returns the second."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (folder / "extension.json").write_text(text, encoding="utf-8")
    command = f"`python examples/extension_table.py {found['command']}`"
    parts = [command, found["device"], table(found["rows"], window)]
    parts += [price_table(found["prices"], found["rows"])] if found["prices"] else []
    text = "\n\n".join(parts) + "\n"
    (folder / "extension.md").write_text(text, encoding="utf-8")
    return text


def read(args: argparse.Namespace, config: jrope.LlamaConfig) -> tuple[Text, Text]:
    """The books to train on, and the half of the held-out text to measure on."""
    tokenizer = load_tokenizer(args.folder)
    text = read_text(args.text, tokenizer, config, unwrap=True)
    unseen = read_text(args.held_out, tokenizer, config, unwrap=True).split(2)[1]
    contexts, window = lengths_of(args, trained_length(config))
    sizes, longest = (text.stream.size, unseen.stream.size), max(window, *contexts)
    if min(sizes) < longest:
        got = f"{sizes[0]} tokens to train on and {sizes[1]} to measure"
        raise JropeError(f"{got}: want at least {longest} of each, give more text")
    return text, unseen


def run(args: argparse.Namespace) -> None:
    """All methods, one after the other."""
    params, config = jrope.load(args.folder, dtype="float32")
    text, unseen = read(args, config)
    contexts, window = lengths_of(args, trained_length(config))
    device, ropes = jax.devices()[0], [name.format(args.factor) for name in args.rope]
    found: dict[str, Any] = {"command": args.command, "prices": []}
    found["device"] = f"{device.device_kind}, jax {jax.__version__}, {args.dtype}"
    found["tokens"] = {"trained on": text.stream.size, "measured": unseen.stream.size}
    found["rows"] = zero_shot(ropes, (params, config), unseen, contexts)
    for rope in ropes:
        for row in rows_of(args, rope, (params, config), (text, unseen)):
            found["rows"].append(row)
            some = (f"{n}: {math.exp(nats[0]):.1f}" for n, nats in row["nats"].items())
            print(rope, row["steps"], f"(seed {row['seed']})", *some, flush=True)
        write(args.out, found, window)
    found["prices"] = list(prices(args, params, config, text))
    found["peak_bytes_in_use"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    print(write(args.out, found, window))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command("extension_table", run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
