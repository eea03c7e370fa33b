"""`jrope bench batch`: rows of all lengths in slots, and in batches that wait."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jrope.bench.batching import capacity_of, compare, workload
from jrope.bench.beside import Beside, beside
from jrope.bench.model import Weights
from jrope.bench.report import Report
from jrope.cli.common import whole
from jrope.cli.terminal import note
from jrope.model.config import LlamaConfig
from jrope.tree import Params
from jrope.weights.fuse import order_for

EPILOG = """\
jrope bench batch: rows of all lengths (prompts of 32 to 2,048 tokens, 16 to 1,024 new
ones), decoded in slots which the next row enters as soon as one has finished, and in
batches of --static rows which run until their longest is done.  The limit counts what
every step has to read and the prompts' FLOPs.  --structured decodes the same rows once
more with answers of a form, JSON for tokens that are made up.  --versus transformers
runs the same rows first, in a process of its own with random weights: by continuous
batching, and on a CPU by static batches of several sizes, too; the fastest is compared.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what it takes besides the model."""
    add = parser.add_argument_group("jrope bench batch").add_argument
    add("--rows", metavar="N", type=whole(1), default=1024, help="in all (1024)")
    text = "rows that are decoded at once (as many as there is memory for)"
    add("--slots", metavar="N", type=whole(1), help=text)
    text = "rows of a batch beside it (64); 0 leaves these out"
    add("--static", metavar="N", type=whole(0), default=64, help=text)
    text = "once more in slots, with a form for every row's answer"
    add("--structured", action="store_true", help=text)
    text = "divides all lengths, for a CPU (1)"
    add("--shrink", metavar="N", type=whole(1), default=1, help=text)


def others(args: argparse.Namespace, config: LlamaConfig, dtype: str) -> list[Beside]:
    """What --versus takes, before JAX holds the device's memory; else nothing."""
    if args.versus is None:
        return []
    note(f"{args.versus} takes its turn first, in a process of its own")
    return beside(config, dtype, workload(config, args.rows, args.shrink))


def run(
    args: argparse.Namespace,
    params: Params,
    report: Report,
    others: Sequence[Beside] = (),
) -> int:
    """Measure both, and print what they took."""
    config: LlamaConfig = report.config
    works = workload(config, args.rows, args.shrink)
    table = sys.stderr if args.json == "-" else sys.stdout
    new = sum(work.max_new_tokens for work in works)
    prompts = sum(len(work.prompt) for work in works)
    print(*report.head()[:-2], sep="\n", file=table)
    print(
        f"{args.rows} rows, {prompts} tokens of prompts, {new} new ones, the longest "
        f"row {capacity_of(works)}\n",
        file=table,
        flush=True,
    )
    for one in others:
        print(one.line(), file=table)
    order = order_for(params, 2) if args.fuse == "auto" else args.fuse
    weights = Weights(params, config)
    del params
    tree, best, found = weights.arranged(order), report.ceilings, []
    how = {"slots": args.slots, "size": args.static, "forms": args.structured}
    for measured in compare(tree, config, works, best, **how):
        print(*measured.lines(), sep="\n", file=table, flush=True)
        found.append(measured)
    for other in found[1:]:
        ratio = other.seconds / found[0].seconds
        print(f"slots are {ratio:.2f}x as fast as {other.by}", file=table)
    if others:
        best = max(others, key=lambda one: one.speed)
        ratio = found[0].tokens / found[0].seconds / best.speed
        print(f"slots are {ratio:.2f}x as fast as {best.by}", file=table)
    measured = {"batching": found, "beside": others}
    write_json(args.json, report, measured)
    return 0


def write_json(file: str | None, report: Report, found: dict[str, Any]) -> None:
    """The report with what was found instead of its rows; - is standard output."""
    if file is None:
        return
    whole = json.loads(report.to_json())
    del whole["rows"]
    for name, each in found.items():
        whole[name] = [asdict(one) for one in each]
    text = json.dumps(whole, indent=2, allow_nan=False)
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")
