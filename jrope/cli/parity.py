"""`jrope parity`: does a folder compute here what it computes in PyTorch?

Exit status 0: it does, in every dtype; 1: it does not; 2: bad input.
"""

import argparse
from pathlib import Path

from jrope.cli.common import (
    add_adapter_argument,
    add_rope_arguments,
    parse_rope,
    whole,
)
from jrope.cli.text import load_tokenizer
from jrope.cli.together import add_mesh_arguments, mesh_of
from jrope.errors import JropeError
from jrope.parity import DTYPES, compare
from jrope.parity.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    add = parser.add_argument
    add("folder", help="Hugging Face folder")
    add(
        "--dtype",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=DTYPES,
        help="one comparison for each (float32 bfloat16)",
    )
    add_mesh_arguments(parser, together=False)
    add_adapter_argument(parser)
    add_rope_arguments(parser, precision=False)
    parser.epilog = f"exit status: 0 equal, 1 not, 2 bad input\n\n{parser.epilog}"
    add(
        "--positions",
        metavar="P,...",
        help="where segments begin: numbers, trained, trained+32, trained-32, or "
        "spread, with gaps over all (default: 0, at and past the trained length, and "
        "up to 131071)",
    )
    text = "tokens of a segment (64)"
    add("--tokens", type=whole(1), default=64, metavar="N", help=text)
    add("--text", type=Path, metavar="FILE", help="feed this text, not random tokens")
    add("--json", action="store_true", help="print a JSON list of reports")
    add(
        "--threshold",
        type=float,
        default=2e-5,
        metavar="X",
        help="allowed difference of float32 logits, as a part of the largest (2e-5)",
    )


def run(args: argparse.Namespace) -> int:
    """Compare in every dtype and print; 0: all pass, 1: one is past its threshold."""
    rope = None if args.rope is None else parse_rope(args.rope)
    positions = None if args.positions is None else args.positions.split(",")
    tokens = None if args.text is None else _tokenize(args.folder, args.text)
    reports: list[Report] = []
    for dtype in args.dtype:
        report = compare(
            args.folder,
            tokens=tokens,
            count=args.tokens,
            dtype=dtype,
            rope=rope,
            condense=args.condense,
            positions=positions,
            threshold=args.threshold,
            mesh=mesh_of(args),
            adapter=args.adapter,
        )
        if not args.json:
            print(report.table(), end="\n\n", flush=True)
        reports.append(report)
    if args.json:
        print("[" + ",\n".join(report.to_json() for report in reports) + "]")
    return 0 if all(report.ok for report in reports) else 1


def _tokenize(folder: str, text: Path) -> list[int]:
    try:
        words = text.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise JropeError(f"{text} is not UTF-8 text: byte {error.start}") from None
    return load_tokenizer(Path(folder))(words)["input_ids"]
