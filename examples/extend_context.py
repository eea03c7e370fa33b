"""Stretch a model's context: choose a rotary method, fine-tune on long windows, save.

    python examples/extend_context.py [FOLDER] --out OUT --rope yarn:8

writes OUT, a Hugging Face folder whose config.json carries the extension.  The weights
are float32 while they train, the forward pass is bfloat16; each layer is computed anew
in the backward pass; a batch may be taken in parts.  The windows of a step follow from
--seed and the step alone, and OUT-checkpoints keeps weights, moments and losses: the
same command after a kill goes on where it stood, on a CPU to the same bits, on a GPU as
far as the order of its sums repeats.

Recipe: Chen et al. 2023 (arXiv:2306.15595), Peng et al. 2023 (arXiv:2309.00071).
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _tuning import (
    Checkpoints,
    Display,
    Text,
    compile_step,
    held_out_nats,
    learning_rates,
    make_step,
    new_state,
    read_text,
    train,
)
from train_tiny import cast

import jrope
from jrope.cli.common import (
    ROPE_HELP,
    apply_rope,
    enable_compile_cache,
    parse_rope,
    trained_length,
    whole,
)
from jrope.cli.terminal import bytes_text
from jrope.cli.text import load_tokenizer
from jrope.errors import JropeError
from jrope.hf import config_to_hf
from jrope.hf.folders import companions
from jrope.rope import DynamicNTK, Linear

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"
TOKENIZER, FACTS = "tokenizer_config.json", "extension.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="extend_context",
        description=(__doc__ or "").split("\n")[0],
        epilog=ROPE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=EMBEDDED, help="Hugging Face folder")
    add("--out", type=Path, required=True, help="folder to write")
    add("--rope", required=True, metavar="SPEC", help="the extension, see below")
    about = "tokens of a training window (default: the trained length times the factor)"
    add("--window", type=whole(2), metavar="N", help=about)
    about = "to train on (default: a few pages that lie beside the embedded model)"
    add("--text", type=Path, nargs="+", metavar="FILE", help=about)
    about = "to measure on (default: the last third of the text)"
    add("--held-out", type=Path, nargs="+", metavar="FILE", help=about)
    about = (
        "make each paragraph of the files one line, as train_tiny.py does with books"
    )
    add("--unwrap", action="store_true", help=about)
    sizes = {"steps": 400, "warmup": 20, "batch": 16, "parts": 1, "seed": 0}
    texts = {"batch": "windows of a step", "parts": "gradients are added up in so many"}
    for name, size in {**sizes, "checkpoint-every": 50}.items():
        about = f"{texts.get(name, name.replace('-', ' '))} (default {size})"
        add(f"--{name}", type=whole(int(name != "seed")), default=size, help=about)
    about = (
        "peak learning rate (default 3e-4, for 2 M weights; the papers: 2e-5 for 7 B)"
    )
    add("--rate", type=float, default=3e-4, help=about)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    about = "keep what the layers compute for the backward pass: faster, more memory"
    add("--no-remat", dest="remat", action="store_false", help=about)
    args = parser.parse_args(argv)
    if args.batch % args.parts:
        parser.error(f"--batch {args.batch} is not a multiple of --parts {args.parts}")
    if args.steps <= args.warmup or not 0 < args.rate < 1:
        parser.error("want --steps of more than --warmup and a --rate between 0 and 1")
    return args


def stretch(
    config: jrope.LlamaConfig, rope: str, window: int | None
) -> tuple[jrope.LlamaConfig, int]:
    """The configuration to train with, and the length of its windows."""
    trained, factor = trained_length(config), parse_rope(rope)[1].get("factor", 1)
    if isinstance(factor, int | float) and factor < 1:
        raise JropeError(f"--rope {rope}: a factor below 1 shortens the context")
    stretched = apply_rope(config, argparse.Namespace(rope=rope, condense=None))
    window = int(trained * factor) if window is None else window
    if window <= trained:
        got = f"windows of {window} tokens, and the model was trained on {trained}"
        raise JropeError(f"{got}: give a larger factor, or --window N")
    config_to_hf(declare(stretched, window))  # what it cannot say is found out now
    return stretched, window


def declare(config: jrope.LlamaConfig, window: int) -> jrope.LlamaConfig:
    """The configuration to save: its max_position_embeddings is the new length.

    Linear scaling and condensing keep the old one, for vLLM and jrope multiply it by
    the factor; dynamic NTK keeps it, for its formula begins there.
    """
    rope = config.rope
    keep = rope.condense != 1 or isinstance(rope.scaling, Linear | DynamicNTK)
    length = config.max_position_embeddings if keep else window
    return dataclasses.replace(config, max_position_embeddings=length)


def read(args: argparse.Namespace, config: jrope.LlamaConfig) -> tuple[Text, Text]:
    """The text to train on, and the text held out."""
    tokenizer = load_tokenizer(args.folder)
    files = [EMBEDDED / "held_out.txt"] if args.text is None else args.text
    text = read_text(files, tokenizer, config, args.unwrap)
    if args.held_out is None:
        text, unseen = text.split(3)
    else:
        unseen = read_text(args.held_out, tokenizer, config, args.unwrap)
    sizes, want = (text.stream.size, unseen.stream.size), args.window
    if min(sizes) < want:
        got = f"{sizes[0]} tokens to train on and {sizes[1]} held out"
        raise JropeError(f"{got}: want at least {want} of each, give more text")
    return text, unseen


def settings_of(args: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Everything that decides the result, for the note beside the checkpoints."""
    names = ("rope", "window", "steps", "warmup", "batch", "parts", "seed", "rate")
    names += ("dtype", "remat")
    digest = hashlib.sha256(text.stream.tobytes()).hexdigest()
    model = {"model": args.folder.resolve().name, "text": digest}
    return model | {name: getattr(args, name) for name in names}


def tune(
    args: argparse.Namespace, params: Any, config: jrope.LlamaConfig, text: Text
) -> tuple[Any, list[float], int]:
    """The tuned weights, the losses, and the bytes that a step needed."""
    folder = args.out.with_name(f"{args.out.name}-checkpoints")
    checkpoints = Checkpoints(folder, settings_of(args, text))
    state, losses = checkpoints.restore(new_state(params))
    shape = (args.parts, args.batch // args.parts, args.window)
    step = make_step(config, args.dtype, args.remat)
    step, need = compile_step(step, state, shape)
    where = f", going on after step {len(losses)}" if losses else ""
    print(
        f"{args.steps} steps of {shape}: {bytes_text(need)} a step{where}", flush=True
    )
    rates = learning_rates(args.steps, args.rate, args.warmup)
    show = Display(args.steps, args.batch * args.window, len(losses))

    def rows(i: int) -> np.ndarray:
        return text.draw(args.window, args.batch, args.seed, i).reshape(shape)

    for done, new in train(step, state, losses, rates, rows):
        state = new
        if done % args.checkpoint_every == 0 or done == args.steps:
            checkpoints.save(done, state, losses)
        show(done, losses)
    return state["params"], [float(loss) for loss in losses], need


def measure(
    params: Any, unseen: Text, lengths: tuple[int, ...], config: jrope.LlamaConfig
) -> dict[str, float]:
    """Nats per held-out token in windows of each length."""
    found = {n: held_out_nats(params, unseen, n, config) for n in lengths}
    return {str(n): float(np.mean(nats)) for n, nats in found.items()}


def write(
    args: argparse.Namespace, params: Any, config: jrope.LlamaConfig, facts: Any
) -> None:
    """The folder: weights in the dtype they came in, tokenizer, what was done."""
    with tempfile.TemporaryDirectory() as name:
        files = {path.name: path for path in companions(args.folder)}
        files[FACTS] = Path(name) / FACTS
        files[FACTS].write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if TOKENIZER in files:
            words = json.loads(files[TOKENIZER].read_text("utf-8"))
            words["model_max_length"] = args.window
            files[TOKENIZER] = Path(name) / TOKENIZER
            files[TOKENIZER].write_text(json.dumps(words, indent=2), encoding="utf-8")
        jrope.save(args.out, params, config, extra_files=files.values())


def extend(args: argparse.Namespace) -> None:
    """Read, measure, train, measure, write."""
    params, config = jrope.load(args.folder)
    stretched, args.window = stretch(config, args.rope, args.window)
    if args.out.exists():
        raise JropeError(f"{args.out} exists: remove it, or name another")
    text, unseen = read(args, config)
    kinds = jax.tree.map(lambda leaf: leaf.dtype, params)
    params = cast(params, jnp.float32)
    lengths = (trained_length(config), args.window)
    nats = {"as it was": measure(params, unseen, lengths, config)}
    nats[f"{args.rope}, not tuned"] = measure(params, unseen, lengths, stretched)
    params, losses, need = tune(args, params, stretched, text)
    nats[f"{args.rope}, tuned"] = measure(params, unseen, lengths, stretched)
    facts = {"settings": settings_of(args, text), "losses": losses, "nats": nats}
    params = jax.tree.map(lambda leaf, kind: leaf.astype(kind), params, kinds)
    write(args, params, declare(stretched, args.window), {**facts, "step_bytes": need})
    print(f"perplexity of {unseen.stream.size} held-out tokens in windows of {lengths}")
    for name, row in nats.items():
        print(f"{name:24}", *(f"{np.exp(value):9.2f}" for value in row.values()))
    print(f"{args.out} written; its checkpoints may go")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    enable_compile_cache()
    try:
        extend(args)
    except (JropeError, OSError) as error:
        return fail(str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fail("the device is out of memory: more --parts, or a shorter --window")
    return 0


def fail(what: str) -> int:
    """One line on standard error."""
    print(f"extend_context: error: {' '.join(what.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
