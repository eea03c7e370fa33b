"""`jrope plan`: memory and speed of a model on devices, by formulas."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from jrope.bench.model import SHAPES, named_shape, weight_count
from jrope.cli.common import (
    DTYPES,
    add_cache_dtype_argument,
    add_quantize_argument,
    add_rope_arguments,
    apply_rope,
    count,
    reach,
)
from jrope.cli.terminal import bytes_text, warn
from jrope.errors import JropeError
from jrope.hf.config import config_from_hf
from jrope.hf.folders import CONFIG, read_json
from jrope.hf.quantized import without_quantization
from jrope.model.config import LlamaConfig
from jrope.plan.compiled import compiled_temporaries, compiler
from jrope.plan.devices import DEVICES, Cluster, parse_cluster
from jrope.plan.memory import Work
from jrope.plan.proposals import Proposal, propose, with_compiler
from jrope.weights.int8 import weight_bytes

_WIDTH = "{:<27}{:>9}{:>9}{:>9}{:>9}{:>10}{:>11}{:>10}{:>9}{:>13}"
_HEADER = (
    *("mesh", "weights", "cache", "temp", "total", "step", "tokens/s", "prompts"),
    *("batch <=", "context <="),
)
_EPILOG = f"""\
devices (--on): {", ".join(DEVICES)}
  alone, or as many as h100:4, or a topology such as v5e:4x4

Bytes are those of one device, steps those at the full context.  Nothing is run:
bandwidths and peaks are the data sheets', efficiencies those of jrope on one H100.
Of a GPU 95 % is counted on: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, since JAX takes
75 % by itself.  Prompts in chunks, and all on TPUs, are told at best: no efficiency of
attention there has been measured.  Where libtpu is installed (pip install "jax[tpu]"),
the fastest mesh of TPUs is compiled for, which takes a minute or so, and its
temporaries are the compiler's; --formula leaves that out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `jrope plan` takes."""
    add = parser.add_argument
    text = "a Hugging Face folder or its config.json, or a hub id whose copy is here"
    add("folder", metavar="FOLDER", nargs="?", help=text)
    add("--shape", choices=[*SHAPES], help="a well-known model instead of a folder")
    add("--on", metavar="DEVICES", required=True, help="such as h100:2, see below")
    text = "tokens of a row, those generated included; k is 1024 (8k)"
    add("--context", metavar="N", type=count, default=8192, help=text)
    add("--batch", metavar="N", type=count, default=1, help="rows (1)")
    text = "how many of the tokens are generated (64)"
    add("--new", metavar="N", type=count, default=64, help=text)
    text = "prompt tokens of each row at a time (8k of all rows of a device, or 256)"
    add("--prefill-chunk", metavar="N", type=count, help=text)
    text = "of the weights and the cache (bfloat16)"
    add("--dtype", choices=DTYPES, default="bfloat16", help=text)
    add_quantize_argument(parser)
    add_cache_dtype_argument(parser)
    text = "temporaries by formula, though libtpu is here, which is asked by compiling"
    add("--formula", action="store_true", help=text)
    add("--json", action="store_true", help="one JSON object instead of text")
    add_rope_arguments(parser, precision=False)
    parser.epilog = f"{_EPILOG}\n{parser.epilog}"


def run(args: argparse.Namespace) -> int:
    """Print every mesh of the devices, the fastest that fits first."""
    if (args.folder is None) == (args.shape is None):
        raise JropeError("plan: give either a FOLDER or --shape NAME")
    cluster = parse_cluster(args.on)
    config = named_shape(args.shape) if args.shape else _read_config(args.folder)
    config = apply_rope(config, args)
    work = Work(
        config=config,
        batch=args.batch,
        context=args.context,
        new=args.new,
        dtype=args.dtype,
        quantize=args.quantize,
        cache_dtype=args.cache_dtype,
        prefill_chunk=args.prefill_chunk,
    )
    _warn_of_length(work)
    found = propose(work, cluster)
    if not args.formula and compiler(cluster):
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU to run on
        found = with_compiler(work, cluster, found, compiled_temporaries)
    name = args.shape or args.folder
    if args.json:
        print(json.dumps(_facts(name, work, cluster, found), indent=2))
    else:
        print(*_head(name, work, cluster, found[0]), "", *_table(found), sep="\n")
    return 0


def _read_config(name: str) -> LlamaConfig:
    """Of a folder, of the file itself, or of a hub id's copy on disk."""
    path = Path(name).expanduser()
    file = path / CONFIG if path.is_dir() else path
    if not path.exists():
        file = _cached(name)
    fields = read_json(file)
    try:
        return config_from_hf(without_quantization(fields))
    except JropeError as error:
        raise JropeError(f"{file}: {error}") from None


def _cached(name: str) -> Path:
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, CONFIG)
    except (ImportError, ValueError):  # no hub, or no hub id
        found = None
    if not isinstance(found, str):
        raise JropeError(
            f"no folder or file {name}, nor a copy of such a model from the hub; "
            f"give a folder, or its {CONFIG}"
        )
    return Path(found)


def _warn_of_length(work: Work) -> None:
    longest, rope = reach(work.config), work.config.rope
    if longest is not None and work.context > longest:
        factor, plain = -(-work.context // longest), rope.scaling is None
        hint = f"; --rope yarn:{factor} or dynamic:{factor} stretch it" if plain else ""
        warn(
            f"{work.context:,} tokens are more than the {longest:,} that model and "
            f"rotary embedding are meant for{hint}"
        )


def _weights(work: Work) -> int:
    return sum(weight_bytes(work.config, work.itemsize, work.quantize).values())


def _head(name: str, work: Work, cluster: Cluster, best: Proposal) -> list[str]:
    device, config = cluster.device, work.config
    kind = work.quantize or work.dtype
    rows = {
        "model": f"{name}: {weight_count(config):,} parameters, "
        f"{bytes_text(_weights(work))} in {kind}",
        "devices": f"{cluster.count} {cluster.name}, of each "
        f"{bytes_text(device.usable)} usable ({bytes_text(device.memory)}), "
        f"{device.bandwidth / 1e12:.3g} TB/s, {device.peak(work.dtype) / 1e12:.4g} "
        f"TFLOP/s in {work.dtype}",
        "work": f"batch {work.batch:,}, context {work.context:,}, {work.new:,} of it "
        f"generated; {work.slots:,} cache slots a row"
        + (f" in {work.cache_dtype}" if work.cache_dtype else ""),
        **_best_rows(work, cluster, best),
        "memory": _source(cluster, best),
        "times": _caution(cluster),
    }
    return [f"{name:<9}{value}" for name, value in rows.items()]


def _best_rows(work: Work, cluster: Cluster, best: Proposal) -> dict[str, str]:
    if best.step is None or best.chunk is None:
        return {}
    step, per_token = best.step, cluster.count / work.batch
    return {
        "best": f"{best.mesh}: a step is {_time(step.read)} of reading, "
        f"{_time(step.layers)} of layers, {_time(step.collectives)} of all-reduces",
        "token": f"{bytes_text(step.bytes * per_token)} read, "
        f"{step.flops * per_token / 1e9:,.4g} GFLOP, all devices together",
        "prompts": f"{best.chunk:,} tokens of each row at a time",
    }


def _source(cluster: Cluster, best: Proposal) -> str:
    if best.measured:
        who = compiler(cluster)
        return f"by formulas; temporaries of the first mesh are what {who} compiled to"
    return "by formulas, temporaries too"


def _caution(cluster: Cluster) -> str:
    if cluster.name == "h100" and cluster.count == 1:
        return "by rooflines, efficiencies measured on one H100"
    return "by rooflines, efficiencies measured on one H100 and assumed here"


def _table(found: list[Proposal]) -> list[str]:
    return [_WIDTH.format(*_HEADER), *map(_line, found)]


def _line(one: Proposal) -> str:
    if one.step is None or one.memory is None:
        return f"{one.mesh!s:<27}  {one.problem}"
    sizes = (one.memory.weights, one.memory.cache, one.memory.temporaries)
    return _WIDTH.format(
        str(one.mesh),
        *map(bytes_text, (*sizes, one.memory.total)),
        _time(one.step.seconds),
        f"{one.tokens_per_second:,.0f}",
        _time(one.prefill or 0),
        f"{one.largest_batch:,}",
        f"{one.largest_context:,}",
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:,.3g} s"


def _facts(
    name: str, work: Work, cluster: Cluster, found: list[Proposal]
) -> dict[str, Any]:
    asked = {f.name: getattr(work, f.name) for f in dataclasses.fields(work)}
    del asked["config"]
    return {
        "model": name,
        "parameters": weight_count(work.config),
        "weight_bytes": _weights(work),
        "meant_for": reach(work.config),
        "work": {**asked, "slots": work.slots},
        "on": {
            "name": cluster.name,
            "topology": cluster.topology,
            "count": cluster.count,
            **dataclasses.asdict(cluster.device),
        },
        "compiler": compiler(cluster) if found[0].measured else None,
        "meshes": [_proposal(one) for one in found],
    }


def _proposal(one: Proposal) -> dict[str, Any]:
    facts = dataclasses.asdict(one)
    if one.step is not None and one.memory is not None:
        facts["step"]["seconds"] = one.step.seconds
        facts["memory"]["total"] = one.memory.total
    return facts
