"""`jrope bench`: how fast a model runs here, and how near the device's limits.

Exit status: 0 all measured, 1 something failed or did not fit, 2 bad input.
"""

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import TextIO

import jax.numpy as jnp

from jrope.bench.device import host_load, measure_ceilings, memory_limit
from jrope.bench.model import (
    SHAPES,
    Weights,
    first_layers,
    named_shape,
    random_params,
    tree_bytes,
    with_layers,
)
from jrope.bench.plan import Bench, Plan
from jrope.bench.report import Report
from jrope.bench.versus import Peer, import_peers
from jrope.cli import bench_batch, bench_speculate
from jrope.cli.common import (
    DTYPES,
    add_quantize_argument,
    add_rope_arguments,
    apply_rope,
    count,
    listed,
    number,
    whole,
)
from jrope.cli.speculating import add_speculate_argument
from jrope.cli.together import add_mesh_arguments, mesh_of
from jrope.errors import JropeError
from jrope.generation.sample import Sampler
from jrope.hf.checkpoint import load, open_tensors, read_llama_config
from jrope.hf.folders import find_folder
from jrope.hf.tensors import DTYPES as STORED
from jrope.model.config import LlamaConfig
from jrope.model.placed import check_rows, layout_on
from jrope.sharding.meshes import Layout
from jrope.tree import Tree
from jrope.weights.int8 import weight_bytes

_TEMPERATURE = 0.8  # with --top-p
_EPILOG = """\
exit status: 0 all measured, 1 something failed or did not fit, 2 bad input

The limit of a prompt is the device's best matrix product, that of a decode step its
best read; both are measured first.  Rows of a decode batch hold from half of the
context to all of it, and the table tells the mean; with --versus all have the context.
With --mesh the same work runs on one of its devices, too, in turns, if it fits there;
batch is all devices' rows, and the limit counts what one device reads or multiplies.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `jrope bench` takes."""
    add = parser.add_argument
    text = "a Hugging Face folder or hub id; after the word batch: see below"
    add("folder", metavar="[batch] FOLDER", nargs="*", help=text)
    add("--shape", choices=[*SHAPES], help="random weights instead of a folder")
    add("--layers", metavar="N", type=whole(1), help="only the first N layers")
    text = "of the weights (bfloat16; a folder's own)"
    add("--dtype", choices=DTYPES, help=text)
    add_quantize_argument(parser)
    add("--only", choices=("prefill", "decode"), help="(both)")
    text = "rows, such as 1,8,32 (1)"
    add("--batch", metavar="N,...", type=listed(count), default=(1,), help=text)
    text = "tokens before; k is 1024 (2k)"
    add("--context", metavar="N,...", type=listed(count), default=(2048,), help=text)
    add("--new", metavar="N", type=whole(1), default=64, help="tokens of a run (64)")
    text = "also decode with this top-p, at temperature 0.8"
    add("--top-p", metavar="P", type=number, help=text)
    text = "cache slots, in terms of those that generate makes (1)"
    add("--capacity-factor", metavar="X", type=number, default=1, help=text)
    text = "how the matrices lie: see jrope.fuse (auto: out_in to decode one row, else "
    add(
        "--fuse",
        choices=("auto", "none", "out_in", "in_out"),
        default="auto",
        help=f"{text}in_out)",
    )
    text = "runs behind a median (5)"
    add("--repeat", metavar="N", type=whole(1), default=5, help=text)
    text = "begin no run after so many seconds of a row (60)"
    add("--patience", metavar="S", type=number, default=60, help=text)
    add("--versus", choices=("transformers",), help="time it too")
    add_speculate_argument(parser)
    bench_speculate.add_arguments(parser)
    add("--profile", metavar="DIR", help="write traces there, and list the kernels")
    add("--json", metavar="FILE", help="everything as JSON; - is standard output")
    bench_batch.add_arguments(parser)
    add_mesh_arguments(parser, together=False)
    add_rope_arguments(parser)
    parser.epilog = (
        f"{_EPILOG}\n{bench_batch.EPILOG}\n{bench_speculate.EPILOG}\n{parser.epilog}"
    )


def run(args: argparse.Namespace) -> int:
    """Measure the ceilings, then everything asked for."""
    batching = args.folder[:1] == ["batch"]
    words = args.folder[1:] if batching else args.folder
    if len(words) > 1:
        raise JropeError(f"bench: got {' '.join(words)}, want one FOLDER")
    args.folder = words[0] if words else None
    if (args.folder is None) == (args.shape is None):
        raise JropeError("bench: give either a FOLDER or --shape NAME")
    if args.speculate is not None and (batching or args.versus):
        raise JropeError("bench: --speculate goes with neither batch nor --versus")
    _check_mesh(args, batching)
    plan, busy = _plan(args), host_load()
    shared = args.versus is not None and not batching
    _prepare_memory(shared)
    config, dtype = _model(args)
    prompts = bench_speculate.own_prompts(args, config)
    mesh = mesh_of(args)
    layout = None if mesh is None else layout_on(mesh, config)
    if layout is not None:
        for rows in args.batch:
            check_rows(rows, layout)
    others = bench_batch.others(args, config, dtype) if batching else []
    parts = 1 if layout is None else layout.size(layout.axes.tensor + layout.axes.fsdp)
    _check_weights(config, dtype, args, copies=2 if shared else 1, parts=parts)
    table = sys.stderr if args.json == "-" else sys.stdout
    ceilings = measure_ceilings(jnp.dtype(dtype))
    begin = time.perf_counter()
    params = _weights(args, config, dtype, layout)
    loaded = time.perf_counter() - begin
    peer = Peer(params, config) if shared else None
    held, read = tree_bytes(params)
    report = Report(
        model=args.folder or args.shape,
        dtype=dtype,
        config=config,
        command=("jrope", *sys.argv[1:]),
        ceilings=ceilings,
        weight_bytes=held,
        read_bytes=read,
        busy=busy,
        load_seconds=loaded if args.folder else None,
        quantize=args.quantize,
        mesh=args.mesh,
    )
    if batching:
        return bench_batch.run(args, params, report, others)
    if args.speculate is not None:
        return bench_speculate.run(args, params, report, prompts)
    print(*report.head(), sep="\n", file=table, flush=True)
    weights = Weights(params, config, keep=peer is not None)
    del params
    bench = Bench(weights, config, ceilings, plan, peer)
    for row in bench.rows():
        report = report.with_row(row)
        print(*row.lines(), sep="\n", file=table, flush=True)
        _save(report, args.json)  # a run may be cut short
    del bench, weights, peer
    report = _measured_again(report, table)
    _save(report, args.json)
    if args.json == "-":
        print(report.to_json())
    return 1 if any(row.problem for row in report.rows) else 0


def _check_mesh(args: argparse.Namespace, batching: bool) -> None:
    """Raise a JropeError for what runs on one device alone."""
    asked = {"batch": batching, "--speculate": args.speculate, "--versus": args.versus}
    wrong = [name for name, given in asked.items() if given]
    if args.mesh is not None and wrong:
        hint = "leave --mesh out, or that"
        raise JropeError(f"bench: {wrong[0]} runs on one device, not a mesh; {hint}")


def _measured_again(report: Report, table: TextIO) -> Report:
    """The ceilings once more, now that the device is warm; the table if they rose."""
    before = report.ceilings
    gc.collect()
    report = report.with_ceilings(measure_ceilings(jnp.dtype(report.dtype)))
    best = report.ceilings
    if max(best.read / before.read, best.matmul / before.matmul) > 1.005:
        text = "\nThe ceilings were higher afterwards; the table beside those:"
        print(text, file=table)
        print(*report.head(), *report.table(), sep="\n", file=table, flush=True)
    return report


def _save(report: Report, file: str | None) -> None:
    if file not in (None, "-"):
        Path(file).write_text(report.to_json() + "\n", encoding="utf-8")


def _plan(args: argparse.Namespace) -> Plan:
    samplers = {"greedy": Sampler()}
    if args.top_p is not None:
        sampler = Sampler(temperature=_TEMPERATURE, top_p=args.top_p)
        samplers[f"p={args.top_p:g}"] = sampler
    if not args.capacity_factor >= 1:
        got = args.capacity_factor
        raise JropeError(f"--capacity-factor: got {got}, want at least 1")
    if args.quantize and args.versus:
        raise JropeError(
            f"--versus: transformers does not have these {args.quantize} weights"
        )
    if args.quantize and args.fuse == "in_out":
        raise JropeError(f"--fuse in_out: {args.quantize} weights lie out_in")
    return Plan(
        works=("prefill", "decode") if args.only is None else (args.only,),
        batches=args.batch,
        contexts=args.context,
        samplers=samplers,
        new=args.new,
        repeats=args.repeat,
        patience=args.patience,
        capacity_factor=args.capacity_factor,
        order="out_in" if args.quantize and args.fuse == "auto" else args.fuse,
        profile=args.profile,
    )


def _prepare_memory(shared: bool) -> None:
    """Before JAX starts: take nearly all memory at once, or leave PyTorch its part."""
    if shared:
        import_peers()
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def _model(args: argparse.Namespace) -> tuple[LlamaConfig, str]:
    """The configuration and the weights' dtype."""
    if args.shape is not None:
        config, dtype = named_shape(args.shape), args.dtype or "bfloat16"
    else:
        folder = find_folder(args.folder, None)
        config, dtype = read_llama_config(folder), args.dtype or _dtype(folder)
    return apply_rope(with_layers(config, args.layers), args), dtype


def _dtype(folder: Path) -> str:
    codes = {*open_tensors(folder).dtypes.values()}
    if len(codes) > 1 or not codes <= {*STORED}:
        got = ", ".join(sorted(codes))
        raise JropeError(f"{folder} holds {got}: choose one with --dtype")
    return STORED[codes.pop()].name


def _weights(
    args: argparse.Namespace, config: LlamaConfig, dtype: str, layout: Layout | None
) -> Tree:
    if args.shape is not None:
        return random_params(config, jnp.dtype(dtype), args.quantize, layout)
    mesh = None if layout is None else layout.mesh
    params, _ = load(args.folder, dtype, quantize=args.quantize, mesh=mesh)
    return first_layers(params, config.num_hidden_layers)


def _check_weights(
    config: LlamaConfig,
    dtype: str,
    args: argparse.Namespace,
    copies: int,
    parts: int,
) -> None:
    limit = memory_limit()
    sizes = weight_bytes(config, jnp.dtype(dtype).itemsize, args.quantize)
    size, kind = sum(sizes.values()) // parts, args.quantize or dtype
    if limit is not None and size * copies > limit:
        raise JropeError(
            f"{copies} x {size / 1e9:.1f} GB of {kind} weights do not fit into the "
            f"device's {limit / 1e9:.1f} GB; --layers N takes a part of them"
        )
