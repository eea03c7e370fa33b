"""`jrope batch`: a file of prompts in, a file of answers out."""

import argparse
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from jrope.batch.checking import Inspection, inspect_rows
from jrope.batch.engine import Engine
from jrope.batch.files import run_batch
from jrope.batch.rows import BatchSettings
from jrope.batch.source import Source
from jrope.cli.batch_live import Live
from jrope.cli.common import (
    add_adapter_argument,
    add_cache_dtype_argument,
    add_dtype_argument,
    add_quantize_argument,
    add_rope_arguments,
    apply_rope,
    reach,
    whole,
)
from jrope.cli.evaluate_plan import hash_adapter, hash_model
from jrope.cli.loading import Loading
from jrope.cli.sampling import add_sampling_arguments, make_sampler
from jrope.cli.speculating import (
    DraftFolder,
    Guessing,
    add_speculate_argument,
    described,
)
from jrope.cli.text import load_tokenizer
from jrope.cli.together import add_mesh_arguments, mesh_of
from jrope.errors import JropeError
from jrope.generation.guesser import Guesser, PromptLookup
from jrope.generation.sample import Sampler
from jrope.hf.checkpoint import load_shapes, read_llama_config
from jrope.hf.folders import find_folder
from jrope.model.config import LlamaConfig

_LONGEST = 4096
_TOKENIZER = (
    *("tokenizer*", "chat_template*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)
_EPILOG = """\
rows: {"prompt": ...}, {"messages": ...} or {"token_ids": ...} with sampling fields and
  any others, which the answer repeats; or lines of OpenAI's batch files for
  /v1/chat/completions, /v1/completions and /v1/embeddings.  What a row does not say: of
  plain rows, the flags here, then the folder's generation_config.json; of OpenAI's, the
  flags here, then the API's defaults (temperature 1).
exit status: 0 all answered, 1 some rows failed (their records say why), 2 bad input,
  130 and 143 after Ctrl-C and SIGTERM.  The same command goes on after any of them, and
  tries failed rows again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `jrope batch` takes."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a Hugging Face folder or hub id")
    text = "JSON lines, or .parquet"
    add("--input", metavar="F", type=Path, required=True, help=text)
    add("--output", metavar="F", type=Path, help=f"{text}; begun or gone on with")
    text = "tokens of a row, prompt and new ones, at most"
    text += f" (the model's length, or {_LONGEST})"
    add("--max-length", metavar="N", type=whole(2), help=text)
    text = "of rows that do not say: 256 of plain ones, of completions 16, of chats all"
    add("--max-new-tokens", metavar="N", type=whole(1), help=f"{text} that fit")
    text = "rows that are computed at once (as many as the memory holds)"
    add("--slots", metavar="N", type=whole(1), help=text)
    text = "of texts: the mean of their tokens (default), or the last one"
    add("--embedding", choices=("mean", "last"), default="mean", help=text)
    text = "only lines i, i + n, ... from 0, into an output of their own"
    add("--shard", metavar="i/n", type=_shard, default=(0, 1), help=text)
    add("--in-order", action="store_true", help="at the end, sort as the input is")
    add(
        "--strict", action="store_true", help="check all rows first; stop if one is bad"
    )
    add("--dry-run", action="store_true", help="check and count all rows, no more")
    add("--metrics", metavar="F", type=Path, help="write figures as JSON")
    add_sampling_arguments(parser)
    add_speculate_argument(parser)
    add_dtype_argument(parser)
    add_quantize_argument(parser)
    add_cache_dtype_argument(parser)
    add_adapter_argument(parser)
    add_mesh_arguments(parser, together=False)
    add_rope_arguments(parser)
    parser.epilog = f"{_EPILOG}\n{parser.epilog}"


def _shard(word: str) -> tuple[int, int]:
    i, _, n = word.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        wanted = "such as 0/4, the first of 4 shards"
        raise argparse.ArgumentTypeError(f"{word!r} is not a shard {wanted}")
    return int(i), int(n)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked while the weights are loaded, then answer all rows."""
    folder = find_folder(args.folder, None)
    config = apply_rope(read_llama_config(folder), args)
    if args.dry_run:
        found = inspect_rows(_source(args), _settings(args, folder, config))
        _tell_rows(found)
        _tell_programs(args, folder, config, found.structured > 0)
        return 1 if found.bad else 0
    if args.output is None:
        raise JropeError("--output is missing")
    if args.metrics is not None and not args.metrics.absolute().parent.is_dir():
        why = f"there is no folder {args.metrics.parent}"
        raise JropeError(f"--metrics {args.metrics}: {why}; make it, or choose another")
    given = args.dtype, args.quantize, mesh_of(args), args.adapter
    rows = args.slots or 2
    with (
        Loading(folder, *given, rows=rows) as loading,
        Guessing(args.speculate, loading.shapes, rows) as guessing,
    ):
        # which raises what there is to say
        _engine(args, loading.shapes, config, guessing.guesser)
        settings = _settings(args, folder, config)
        if args.strict:
            _refuse_bad(inspect_rows(_source(args), settings))
        capacity = _capacity(args, config)
        live = Live(args, config, capacity, loading, guessing)
        summary = run_batch(
            live,
            args.input,
            args.output,
            settings,
            shard=args.shard,
            fingerprint=_fingerprint(args, folder),
            embed=live.embed,
            in_order=args.in_order,
            interrupted=live.interrupted,
            progress=live.tell,
        )
    return live.end(summary)


def _source(args: argparse.Namespace) -> Source:
    return Source(args.input, *args.shard)


def _settings(
    args: argparse.Namespace, folder: Path, config: LlamaConfig
) -> BatchSettings:
    given = {f.name: getattr(args, f.name) for f in fields(Sampler)}
    given = {name: value for name, value in given.items() if value is not None}
    return BatchSettings(
        tokenizer=load_tokenizer(folder),
        config=config,
        model=Path(args.folder).name,
        max_length=_capacity(args, config),
        sampler=make_sampler(args, folder),
        api_sampler=Sampler(**{"temperature": 1.0, **given}),
        max_new_tokens=args.max_new_tokens,
    )


def longest_row(
    max_length: int | None,
    config: LlamaConfig,
    guesser: PromptLookup | DraftFolder | None = None,
) -> int:
    """Tokens of a row: every slot has room for so many.

    Where tokens are guessed no window is shorter, unless `max_length` says so.
    """
    longest = reach(config) or config.max_position_embeddings
    windows = () if guesser is None else config.windows or ()
    return max_length or min(longest, _LONGEST, *(w for w in windows if w is not None))


def _capacity(args: argparse.Namespace, config: LlamaConfig) -> int:
    return longest_row(args.max_length, config, args.speculate)


def _fingerprint(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    digest = sha256()
    for path in sorted({p for name in _TOKENIZER for p in folder.glob(name)}):
        digest.update(path.name.encode() + path.read_bytes())
    return {
        "weights": hash_model(folder),
        "tokenizer": digest.hexdigest(),
        "dtype": args.dtype,
        "quantize": args.quantize,
        **({} if args.cache_dtype is None else {"cache_dtype": args.cache_dtype}),
        **({} if args.adapter is None else {"adapter": hash_adapter(args.adapter)}),
        "seed": args.seed or 0,
        "embedding": args.embedding,
    }


def _tell_rows(found: Inspection) -> None:
    forms = ", ".join(f"{count:,} {form}" for form, count in found.forms.items())
    print(
        f"rows            {found.forms.total() + found.bad:,} ({forms or 'none good'})"
    )
    print(f"bad             {found.bad:,}")
    for problem in found.problems:
        print(f"  {problem}")
    print(f"prompt tokens   {found.prompt_tokens:,}")
    print(f"new tokens      {found.new_tokens:,} at most")
    print(f"longest row     {found.longest:,} tokens")
    if found.structured:
        print(f"of a form       {found.structured:,}")
    if found.passed:
        names = ", ".join(f"{name} ({count:,})" for name, count in found.passed.items())
        print(f"passed through  {names}")


def _tell_programs(
    args: argparse.Namespace, folder: Path, config: LlamaConfig, structures: bool
) -> None:
    shapes, _ = load_shapes(folder, args.dtype, mesh=mesh_of(args))
    capacity, guesser = _capacity(args, config), described(args.speculate, shapes)
    engine = _engine(args, shapes, config, guesser, structures)
    most = "" if args.slots else ", fewer where the weights leave less memory"
    print(f"slots           {engine.stats.slots} of {capacity:,} tokens{most}")
    print(f"programs        {len(engine.programs)}: {', '.join(engine.programs)}")


def _engine(
    args: argparse.Namespace,
    shapes: Any,
    config: LlamaConfig,
    guesser: Guesser | None,
    structures: bool = False,
) -> Engine:
    """One for the shapes of a model, which can be asked but not run."""
    how: dict[str, Any] = {"slots": args.slots, "speculate": guesser}
    how |= {"structures": structures, "cache_dtype": args.cache_dtype}
    return Engine(shapes, config, capacity=_capacity(args, config), **how)


def _refuse_bad(found: Inspection) -> None:
    if found.bad:
        first = "; ".join(found.problems)
        raise JropeError(f"--strict: {found.bad} bad rows, the first of them: {first}")
