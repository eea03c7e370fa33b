"""`jrope bench --speculate`: what guesses cost, and what they save."""

import argparse
import sys
from pathlib import Path
from typing import cast

from jrope.batch.rows import BatchSettings, read_row
from jrope.batch.source import Source
from jrope.bench.model import Weights
from jrope.bench.report import Report
from jrope.bench.speculating import measure, measure_own, middle
from jrope.cli.bench_batch import write_json
from jrope.cli.speculating import Guessing
from jrope.cli.text import load_tokenizer
from jrope.errors import JropeError, RowError, want
from jrope.generation.guesser import Guesser
from jrope.hf.folders import find_folder
from jrope.model.config import LlamaConfig
from jrope.tree import Params

EPILOG = """\
--speculate times a pass over the newest token and N guesses beside a step of one, then
--new tokens with guesses and without, in turns: greedily after a prompt that is one
piece again and again, and at temperature 1 after one of which no token comes twice.
With --input FILE, instead, the answers to the prompts of these rows, greedily.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what goes with --speculate alone."""
    text = "with --speculate: rows with prompts, as jrope batch takes them"
    parser.add_argument("--input", metavar="FILE", type=Path, help=text)


def own_prompts(
    args: argparse.Namespace, config: LlamaConfig
) -> dict[str, list[int]] | None:
    """The prompts of --input, by the rows' custom_id or line; None: it is not given.

    Raises:
      JropeError: it cannot be read here, or a row cannot.
    """
    if args.input is None:
        return None
    if args.speculate is None:
        raise JropeError("--input: want --speculate beside it")
    if args.folder is None:
        raise JropeError("--input: texts want a FOLDER, which has a tokenizer")
    if args.batch != (1,) or args.context != (2048,):
        hint = "leave --batch and --context out"
        raise JropeError(f"--input: its prompts run one by one, as they are; {hint}")
    tokenizer, source = load_tokenizer(find_folder(args.folder)), Source(args.input)
    settings, found = BatchSettings(tokenizer=tokenizer, config=config), {}
    source.index()
    for line in source:
        name = line.custom_id or f"line {line.number}"
        try:
            row = read_row(line, settings)
            want(row.form != "embeddings", "url", row.form, "what writes an answer")
        except RowError as error:
            raise JropeError(f"{args.input}, {name}: {error}") from None
        for at, ids in enumerate(row.prompts, 1):
            found[name if len(row.prompts) == 1 else f"{name}, prompt {at}"] = ids
    if not found:
        raise JropeError(f"{args.input}: got no rows, want some with prompts")
    return found


def run(
    args: argparse.Namespace,
    params: Params,
    report: Report,
    prompts: dict[str, list[int]] | None,
) -> int:
    """Measure these prompts, or every batch and context; print what came of it."""
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
    if prompts is not None:
        for one in measure_own(tree, config, guesser, prompts, **how):
            found.append(one)
            print(one.line(), file=table, flush=True)
        print(middle(found), file=table)
        write_json(args.json, report, {"speculation": found})
        return 0
    for batch in args.batch:
        for context in args.context:
            shape = {"batch": batch, "context": context}
            found.append(measure(tree, config, guesser, **shape, **how))
            print(*found[-1].lines(), sep="\n", file=table, flush=True)
    write_json(args.json, report, {"speculation": found})
    return 0
