"""`jrope bench --speculate`: what guesses cost, and what they save."""

import argparse
import sys
from typing import cast

from jrope.bench.model import Weights
from jrope.bench.report import Report
from jrope.bench.speculating import measure
from jrope.cli.bench_batch import write_json
from jrope.cli.speculating import Guessing
from jrope.generation.guesser import Guesser
from jrope.model.config import LlamaConfig
from jrope.tree import Params

EPILOG = """\
--speculate times a pass over the newest token and N guesses beside a step of one, then
--new tokens with guesses and without, in turns: greedily after a prompt that is one
piece again and again, and at temperature 1 after one of which no token comes twice.
"""


def run(args: argparse.Namespace, params: Params, report: Report) -> int:
    """Measure every batch and context, and print what came of it."""
    config: LlamaConfig = report.config
    table = sys.stderr if args.json == "-" else sys.stdout
    print(*report.head()[:-2], sep="\n", end="\n\n", file=table, flush=True)
    with Guessing(args.speculate, params) as guessing:
        guesser = cast(Guesser, guessing.wait())
    order = "out_in" if args.quantize or args.batch == (1,) else "in_out"
    order = order if args.fuse == "auto" else args.fuse
    weights, found = Weights(params, config), []
    del params
    how = {"new": args.new, "repeats": args.repeat, "patience": args.patience}
    tree = weights.arranged(order)
    for batch in args.batch:
        for context in args.context:
            shape = {"batch": batch, "context": context}
            found.append(measure(tree, config, guesser, **shape, **how))
            print(*found[-1].lines(), sep="\n", file=table, flush=True)
    write_json(args.json, report, {"speculation": found})
    return 0
