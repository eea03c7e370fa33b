"""`jrope generate`: continue prompts; text on standard output, figures on the other."""

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
from jrope.cli.loading import Loading
from jrope.cli.report import (
    Timing,
    device_text,
    print_figures,
    print_json,
    print_texts,
    tell_not_finite,
)
from jrope.cli.sampling import add_sampling_arguments, make_sampler
from jrope.cli.speculating import Guessing, add_speculate_argument
from jrope.cli.terminal import warn
from jrope.cli.text import (
    Answer,
    encode,
    load_tokenizer,
    read_prompts,
    vocabulary,
)
from jrope.cli.together import add_mesh_arguments, mesh_of, shared
from jrope.errors import JropeError
from jrope.generation.ahead import compile_ahead
from jrope.generation.guesser import Guesser
from jrope.generation.request import Options, prepare
from jrope.generation.run import Stream, stream
from jrope.generation.sample import Sampler
from jrope.hf.checkpoint import read_llama_config
from jrope.hf.fingerprints import fingerprint
from jrope.hf.folders import find_folder
from jrope.hf.generation import new_tokens, read_generation_config
from jrope.model.config import LlamaConfig
from jrope.model.placed import layout_on

_LIMIT = 256
_LIMIT_HELP = f"at most this many (as the folder says, else {_LIMIT} or what fits)"
_EPILOG = """\
exit status: 0 all answered, 1 where logits were not finite (the text that came of them
is printed, and means nothing), 2 bad input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `jrope generate` takes."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a Hugging Face folder or hub id")
    add("prompt", metavar="PROMPT", nargs="*", help="texts; several make a batch")
    add("--file", metavar="F", help="one prompt, the whole file; - is standard input")
    add("--raw", action="store_true", help="continue the text, without chat template")
    add("--system", metavar="TEXT", help="the system's turn of the chat")
    add("--max-new-tokens", metavar="N", type=whole(0), help=_LIMIT_HELP)
    add_sampling_arguments(parser)
    add("--stop", metavar="TEXT", action="append", default=[], help="end before it")
    add("--prefill-chunk", metavar="N", type=whole(1), help="prompt tokens at a time")
    add_speculate_argument(parser)
    add("--json", action="store_true", help="one JSON object instead of text")
    add_dtype_argument(parser)
    add_quantize_argument(parser)
    add_cache_dtype_argument(parser)
    add_adapter_argument(parser)
    add_mesh_arguments(parser)
    add_rope_arguments(parser)
    parser.epilog = f"{_EPILOG}\n{parser.epilog}"


def run(args: argparse.Namespace) -> int:
    """Check everything and compile while the weights are loaded, then generate."""
    prompts = _prompts(args)
    folder = find_folder(args.folder, None)
    config = apply_rope(read_llama_config(folder), args)
    sampler = make_sampler(args, folder)
    mesh = mesh_of(args)
    layout = None if mesh is None else layout_on(mesh, config)
    how = args.dtype, args.quantize, mesh, args.adapter
    with (
        Loading(folder, *how, rows=len(prompts)) as loading,
        Guessing(args.speculate, loading.shapes) as guessing,
    ):
        tokenizer = load_tokenizer(folder)  # imports transformers: seconds
        ids = _encoded(tokenizer, prompts, config, args)
        prompt, lengths = _pad(ids)
        new = _new(args, folder, prompt, config)
        options = _options(args, sampler, new, guessing.guesser)
        prepare(prompt, lengths, config, layout, **options)  # or says what is wrong
        _warn(tokenizer, prompt.shape[1] + new, config)
        loading.show()
        if new:
            compile_ahead(loading.shapes, prompt, lengths, config=config, **options)
        params, timing = loading.wait()
        options["speculate"] = guessing.wait()
    stops = [text for text in args.stop if text]
    answers = [Answer(tokenizer, row, config.eos_token_id, stops) for row in ids]
    blocks = stream(params, prompt, lengths, config=config, **options)
    live = len(prompts) == 1 and not args.json
    _follow(blocks, answers, timing, live=live)
    device = device_text(mesh)
    if args.json:
        told = prompts, lengths, answers, timing, config.rope, sampler, device
        print_json(args.folder, *told)
    else:
        if not live:
            print_texts(prompts, answers)
        print_figures(lengths, answers, timing, config.rope, device)
    return tell_not_finite(answers, params["model"]["norm"]["weight"].dtype.name)


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts, the same in every process."""
    if (group := shared(args)) is None:
        return read_prompts(args.prompt, args.file)
    if not args.prompt and args.file in (None, "-"):
        raise JropeError(
            "standard input reaches one process: give prompts as arguments or --file"
        )
    prompts = read_prompts(args.prompt, args.file)
    group.agree({"prompts": fingerprint(repr(prompts).encode())})
    return prompts


def _pad(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal length as int32 [B, T], and their lengths [B]."""
    width = max(map(len, ids))
    rows = [[*row, *[0] * (width - len(row))] for row in ids]
    return np.array(rows, np.int32), np.array([len(row) for row in ids], np.int32)


def _encoded(
    tokenizer: Any, prompts: Sequence[str], config: LlamaConfig, args: Any
) -> list[list[int]]:
    chat = bool(tokenizer.chat_template) and not args.raw
    if args.system is not None and not chat:
        why = "--raw was given" if args.raw else "this tokenizer has none"
        raise JropeError(f"--system needs a chat template, but {why}")
    bos = config.bos_token_id
    return [
        encode(tokenizer, text, bos, chat=chat, system=args.system) for text in prompts
    ]


def _options(
    args: argparse.Namespace, sampler: Sampler, new: int, guesser: Guesser | None
) -> Options:
    return {
        "sampler": sampler,
        "key": jax.random.key(args.seed or 0),
        "max_new_tokens": new,
        "prefill_chunk": args.prefill_chunk,
        "cache_dtype": args.cache_dtype,
        "speculate": guesser,
    }


def _new(
    args: argparse.Namespace, folder: Path, prompt: np.ndarray, config: LlamaConfig
) -> int:
    """New tokens; when nobody says how many, what the model's length has room for."""
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    width, longest = prompt.shape[1], reach(config)
    found = {} if args.no_generation_config else read_generation_config(folder)
    most: int = found.get("max_new_tokens", _LIMIT)
    most = min(most, new_tokens(found, width) or most)
    room = most if longest is None else longest - width
    return min(most, room) if room > 0 else most


def _warn(tokenizer: Any, total: int, config: LlamaConfig) -> None:
    known, size = vocabulary(tokenizer), config.vocab_size
    if known > size or known < size * 0.9:
        warn(
            f"the tokenizer has {known} ids, the model {size}: do they belong together?"
        )
    longest = reach(config)
    if longest is not None and total > longest:
        factor = -(-total // longest)
        plain = config.rope.scaling is None and config.rope.condense == 1
        hint = f"; --rope yarn:{factor} or dynamic:{factor} stretch it" if plain else ""
        warn(
            f"prompt and new tokens may reach {total}, the model is meant for "
            f"{longest}: text past that is likely nonsense{hint}"
        )


def _follow(
    blocks: Stream,
    answers: Sequence[Answer],
    timing: Timing,
    *,
    live: bool,
) -> None:
    """Feed the blocks to the answers; print the only one as it comes if `live`."""

    def tell(texts: Iterable[str]) -> None:
        for text in texts:
            if live and text:
                print(text, end="", flush=True)

    start = time.perf_counter()
    try:
        for block in blocks:
            timing.total = time.perf_counter() - start
            for answer, finite in zip(answers, blocks.finite.tolist(), strict=True):
                answer.finite = finite if answer.finish != "stop" else answer.finite
            tell([a.push(row.tolist()) for a, row in zip(answers, block, strict=True)])
            if timing.first is None:
                timing.first = timing.total
                timing.early = sum(answer.count for answer in answers)
            if all(answer.finish == "stop" for answer in answers):
                break
        tell([answer.end() for answer in answers])
    finally:
        if live:  # after Ctrl-C too
            print(flush=True)
