"""`jrope evaluate`: what RoPE methods do to a model on your own texts.

Exit status: 0 all measured, 1 something failed or did not fit, 2 bad input.
"""

import argparse
import datetime
import importlib.util
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jrope.bench.device import describe_device
from jrope.cli.common import (
    DTYPES,
    ROPE_HELP,
    add_adapter_argument,
    add_quantize_argument,
    array_bytes,
    count,
    listed,
    number,
    trained_length,
    whole,
)
from jrope.cli.evaluate_plan import (
    OWN,
    Text,
    check_settings,
    hash_model,
    make_methods,
    plan_of,
    read_texts,
    split_ropes,
    tokenize,
    tokenizer_for,
)
from jrope.cli.evaluate_runs import Laboratory
from jrope.cli.evaluate_table import tables
from jrope.cli.terminal import Progress, duration_text
from jrope.cli.together import add_mesh_arguments, mesh_of, shared
from jrope.errors import JropeError
from jrope.hf.checkpoint import (
    READERS,
    arriving_shapes,
    load,
    load_shapes,
    open_tensors,
    read_llama_config,
)
from jrope.hf.folders import find_folder
from jrope.lab.journal import Journal, current
from jrope.lab.memory import check_weights
from jrope.lab.passkey import NEW
from jrope.model.config import LlamaConfig
from jrope.model.placed import layout_on
from jrope.model.with_rope import with_rope

_EPILOG = f"""\
exit status: 0 all measured, 1 something failed or did not fit, 2 bad input

  jrope evaluate FOLDER --text book.txt --context 2k,4k,8k --stride 256 \\
      --rope default,linear:2,dynamic:2,yarn:factor=2,original=2048 --out run.jsonl

--rope takes a list, and may be repeated: a part of the form FIELD=VALUE belongs to the
method before it, any other begins a new one.  {OWN!r} is what the folder has.
Methods that depend on the length get that of the window, as a full pass does in
transformers.  Intervals are the 2.5th and 97.5th percentile of 2,000 means, each over
resampled blocks of 64 tokens (less where there are few), with one seed for all methods.
Distances: the mean score of all queries against all keys of the text, read within the
trained length, as if they stood so far apart.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `jrope evaluate` takes."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a Hugging Face folder or hub id")
    text = "UTF-8 files, or folders of .txt files"
    add("--text", metavar="FILE", nargs="+", type=Path, default=[], help=text)
    text = "tokens, such as 2k,4k,8k; k is 1024"
    kind = listed(count)
    add("--context", metavar="N,...", type=kind, required=True, help=text)
    text = f"methods, see below ({OWN})"
    add("--rope", metavar="SPEC,...", action="append", help=text)
    text = "cos and sin as PyTorch computes them, or true at any position"
    add("--precision", choices=("parity", "accurate"), help=text)
    text = "also slide windows by this, not only take each text's first tokens"
    add("--stride", metavar="N", type=count, help=text)
    add("--tokens", metavar="N", type=count, help="at most this many of each text")
    text = "join the lines of each paragraph, for texts with hard line breaks"
    add("--reflow", action="store_true", help=text)
    add("--skip-short", action="store_true", help="leave out texts that are too short")
    add("--no-perplexity", action="store_true", help="only what else is asked for")
    text = "can it find a number in a long text?"
    add("--passkey", action="store_true", help=text)
    text = "where the number stands, 0 to 1 (0,0.25,0.5,0.75,1)"
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    kinds = listed(lambda word: float(number(word)))
    add("--depths", metavar="X,...", type=kinds, default=depths, help=text)
    add("--trials", metavar="N", type=whole(1), default=10, help="numbers each (10)")
    text = "what the number hides in: the papers' sentences, or the --text (papers)"
    add("--filler", choices=("papers", "text"), default="papers", help=text)
    add("--seed", metavar="N", type=whole(0), default=0, help="of the numbers (0)")
    add("--distance", action="store_true", help="mean attention score by distance")
    text = "cast the weights (default: as the file has them)"
    add("--dtype", choices=DTYPES, help=text)
    add_quantize_argument(parser)
    add_adapter_argument(parser)
    add_mesh_arguments(parser)
    add("--buckets", action="store_true", help="also print perplexity by position")
    text = (
        "keep records as JSON lines; a run that was killed goes on with the same file"
    )
    add("--out", metavar="FILE.jsonl", type=Path, help=text)
    add("--report", metavar="FILE.html", type=Path, help="write a page with figures")
    add("--figures", metavar="DIR", type=Path, help="write the figures as PNG files")
    parser.epilog = f"{_EPILOG}{ROPE_HELP}"


def run(args: argparse.Namespace) -> int:
    """Check everything that is cheap, then measure, record by record."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # JAX starts below
    args.context = tuple(sorted(args.context))
    check_settings(args)
    group = shared(args)
    first = group is None or group.index == 0  # which alone writes
    if not first:
        args.out = args.report = args.figures = None
    check_outputs(args.report, args.figures)
    folder = find_folder(args.folder, None)
    config = with_rope(read_llama_config(folder), precision=args.precision)
    methods, refused = make_methods(config, split_ropes(args.rope or [OWN]))
    tokenizer, texts = None, list[Text]()
    if args.text or args.passkey:
        contents = read_texts(args.text, reflowed=args.reflow)
        tokenizer = tokenizer_for(folder, config)
        texts = tokenize(tokenizer, contents, max(args.context), args)
    mesh = mesh_of(args)
    if group is not None:
        group.agree({f"--text {text.name}": text.sha256[:12] for text in texts})
    with Journal(args.out, _header(args, folder, config, texts)) as journal:
        if group is not None:
            journal.know(group.share(journal.known()))
        if journal.resumed:
            print(f"{args.out}: {journal.resumed} records kept", file=sys.stderr)
        laboratory = Laboratory(args, config, texts, tokenizer, journal)
        laboratory.check()
        laboratory.measure(_weights(folder, args, mesh), methods, refused)
        records = current(journal.records)
    if first:
        _finish(args, records)
    return 1 if any(r["kind"] == "failure" for r in records) else 0


def check_outputs(report: Path | None, figures: Path | None) -> None:
    """Find out now, not after hours, that results could not be written.

    Raises:
      JropeError: a package that they need is missing.
      OSError: a path that cannot be written.
    """
    if report is None and figures is None:
        return
    needed = ["matplotlib"] if report is None else ["jinja2", "matplotlib"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise JropeError(
            f"--report and --figures need {' and '.join(missing)}, not installed; "
            "pip install 'jrope[lab]'"
        )
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    probes = [report, None if figures is None else figures / ".probe"]
    for path in (path for path in probes if path is not None):
        new = not path.exists()
        with path.open("ab"):
            pass
        if new:
            path.unlink()


def _header(
    args: argparse.Namespace, folder: Path, config: LlamaConfig, texts: list[Text]
) -> dict[str, Any]:
    device = describe_device()
    on_cpu = device["platform"] == "cpu"
    packages = ("jax", "flax", "numpy", "transformers")
    weights = f", {args.quantize} weights" if args.quantize else ""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "jrope": version("jrope"),
        "model": folder.resolve().name,
        "model_sha256": hash_model(folder),
        "command": shlex.join(["jrope", *sys.argv[1:]]),
        "device": device["processor"] if on_cpu else device["kind"],
        "dtype": (args.dtype or _dtype(folder)) + weights,
        "versions": {name: version(name) for name in packages},
        "trained_length": trained_length(config),
        "theta": config.rope.theta,
        "rotary_dim": config.rope.rotary_dim,
        "texts": [
            {"name": t.name, "sha256": t.sha256, "tokens": len(t.tokens)} for t in texts
        ],
        "started": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "plan": plan_of(args, NEW),
        **({} if args.mesh is None else {"mesh": args.mesh}),
    }


def _dtype(folder: Path) -> str:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    codes = sorted({*open_tensors(folder).dtypes.values()})
    return ", ".join(names.get(code, code) for code in codes)


def _weights(folder: Path, args: argparse.Namespace, mesh: Mesh | None) -> Any:
    shapes, config = load_shapes(folder, args.dtype, quantize=args.quantize)
    arriving = array_bytes(arriving_shapes(folder, args.dtype, args.quantize))
    held = sum(array_bytes(shapes))
    if args.quantize:  # each wide tensor goes when its integers are there
        at_once = 1 if jax.default_backend() == "cpu" else READERS
        held += sum(sorted(arriving)[-at_once:])
    if mesh is not None:  # on a CPU the devices of a process share its memory
        layout_on(mesh, config)
        own = mesh.local_devices if jax.default_backend() == "cpu" else [None]
        held = held * len(own) // mesh.size
    check_weights(held)
    with Progress("loading", sum(arriving)) as progress:
        how: dict[str, Any] = {"quantize": args.quantize, "mesh": mesh}
        how |= {"progress": progress, "adapter": args.adapter}
        params, _ = load(folder, args.dtype, **how)
    return params


def _finish(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Print the tables, write the page and the figures."""
    seconds = sum(r.get("seconds", 0) for r in records)
    head = records[0]
    about = f"{head['model']} ({head['dtype']}, {head['device']})"
    about += f", trained on {head['trained_length']:,} tokens, theta {head['theta']:g}"
    print(f"{about}{', texts reflowed' * args.reflow}")
    print(*tables(records, by_position=args.buckets), sep="\n")
    print(f"\nmeasured in {duration_text(seconds)}")
    if args.report is not None:
        from jrope.lab.report import write_report

        write_report(records, args.report)
    if args.figures is not None:
        from jrope.lab.figures import save_figures

        save_figures(records, args.figures)
