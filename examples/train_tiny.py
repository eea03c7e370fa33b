"""Train a tiny LLaMA on plain text, then stretch its context by condensing positions.

    python examples/train_tiny.py OUT --text BOOK... --held-out BOOK

writes two Hugging Face folders: OUT, trained on windows of 256 tokens, and
OUT-condensed-8, the same model tuned a little on windows of 2048 tokens whose positions
are divided by 8, so that no angle leaves the trained range (Chen et al. 2023,
arXiv:2306.15595).  Each holds a model card and what was measured on the held-out text:
its first half chooses the checkpoint, its second half gives the reported figures.
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jrope.hf import config_from_hf
from jrope.hf.checkpoint import load, save
from jrope.lab.perplexity import reflow
from jrope.model.config import LlamaConfig
from jrope.model.llama import count_parameters, init_params
from jrope.model.scores import score
from jrope.model.with_rope import with_rope
from jrope.tree import Tree

BOS, EOS, HEAD_DIM = 0, 1, 32
Rows = dict[str, dict[int, float]]

CARD = """\
---
license: apache-2.0
language: en
---
# {name}

A LLaMA of {count:,} parameters for trying jrope out: {config.num_hidden_layers} layers,
hidden {config.hidden_size}, {config.num_attention_heads} query and
{config.num_key_value_heads} key/value heads, byte-level BPE of {config.vocab_size},
tied, bfloat16.  {stage}

It continues prose in the manner of its books and knows nothing.  Every training window
began with `<s>`; `</s>` ended a book, so the model hardly ever says it.

- Text: {args.about} Trained on {train}; held out: {held_out}.
- Licence of the weights: Apache-2.0.
- Made by `python examples/train_tiny.py {command}`.

Perplexity per token (nats per token) of {tokens:,} held-out tokens, on which no
choice was made, cut into windows of each length (`jrope.score`, float32):

{table}

In the training text and in this one every paragraph is one line.  With the hard line
breaks of its file, the same part of the held-out text reads {wrapped:.1f} in windows of
{window}: reflow what you measure (`jrope evaluate --reflow`).

Positions from {args.context} on are new to the base model: plain, its perplexity
breaks there.  Dividing positions by {args.condense} keeps every angle in range but
squeezes the distances the model knows; the tuned model has learnt the squeezed ones.
"""


def clean(text: str) -> str:
    """One paragraph a line: no hard breaks, no emphasis, no Gutenberg frame."""
    text = re.split(r"\*\*\* ?START OF.*?\*\*\*", text)[-1]
    text = re.split(r"\*\*\* ?END OF", text)[0].replace("_", "")
    paragraphs = reflow(text).split("\n")
    return "\n".join(p for p in paragraphs if re.search(r"\w", p) and p[0] != "[")


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE that puts `<s>` before every prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream of ids, `</s>` after each."""
    ids = [[*tokenizer.encode(t, add_special_tokens=False).ids, EOS] for t in texts]
    return np.concatenate([np.asarray(i, np.int32) for i in ids])


def window(config: LlamaConfig) -> int:
    """Tokens of a training window: the declared context, as far as it is condensed."""
    return int(config.max_position_embeddings * config.rope.condense)


def tiny_config(args: argparse.Namespace, vocab: int) -> LlamaConfig:
    """Heads of 32, three queries to a key where that divides, MLP of 8/3 hidden."""
    heads = args.hidden // HEAD_DIM
    sizes = {
        "vocab_size": vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 8 // 3,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": args.context,
    }
    ids = {"bos_token_id": BOS, "eos_token_id": EOS}
    rest = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0}
    return config_from_hf({**sizes, **ids, **rest})


def cast(params: Tree, dtype: Any) -> Tree:
    """The same tree in another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def nats(params: Tree, stream: np.ndarray, length: int, config: LlamaConfig) -> float:
    """Mean of -log p over the stream, cut into windows of `<s>` and length - 1 ids."""
    windows = len(stream) // (length - 1)
    batches = -(-windows * length // 2**15)
    shape = (batches, windows // batches, length - 1)
    rows = stream[: math.prod(shape)].reshape(shape)
    rows = np.insert(rows, 0, BOS, axis=2)
    means = [jnp.mean(score(params, jnp.asarray(r), config=config)) for r in rows]
    return -sum(map(float, means)) / batches


def make_optimizer(steps: int, rate: float) -> optax.GradientTransformation:
    """AdamW after a gradient clip; warm-up, then cosine; norms do not decay."""
    warmup = max(1, steps // 20)
    rates = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, rate / 20)
    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    adamw = optax.adamw(rates, b2=0.95, weight_decay=0.1, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def make_run(
    config: LlamaConfig, optimizer: optax.GradientTransformation, batch: int, dtype: str
) -> Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]:
    """Many steps in one dispatch: run(state, stream, keys) -> state, losses.

    Windows are drawn on the device; the float32 weights are cast for the forward pass.
    """
    fresh = window(config) - 1  # ids of a window beside its <s>

    def loss(params: Tree, stream: jax.Array, key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (batch, 1), 0, stream.size - fresh + 1)
        rows = stream[starts + jnp.arange(fresh, dtype=jnp.int32)[None, :]]
        rows = jnp.pad(rows, ((0, 0), (1, 0)), constant_values=BOS)
        return -jnp.mean(score(cast(params, dtype), rows, config=config))

    @jax.jit
    def run(state: Any, stream: jax.Array, keys: jax.Array) -> tuple[Any, jax.Array]:
        def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, moments = state
            value, grads = jax.value_and_grad(loss)(params, stream, key)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        return jax.lax.scan(step, state, keys)

    return run


def fit(
    params: Tree,
    config: LlamaConfig,
    data: tuple[np.ndarray, np.ndarray],
    args: argparse.Namespace,
    plan: tuple[int, int, float],
) -> tuple[Tree, list[dict[str, float]]]:
    """Train by the plan (steps, batch, rate); keep what the chooser text likes best."""
    (stream, chooser), (steps, batch, rate) = data, plan
    length, optimizer = window(config), make_optimizer(steps, rate)
    run = make_run(config, optimizer, batch, args.dtype)
    state, on_device = (params, optimizer.init(params)), jnp.asarray(stream)
    keys = jax.random.split(jax.random.key(args.seed), steps)
    best, lowest, history = params, math.inf, []
    for done in range(0, steps, args.every):
        started, some = time.perf_counter(), keys[done : done + args.every]
        state, losses = run(state, on_device, some)
        loss, at = float(jnp.mean(losses)), done + len(some)
        speed = len(some) * batch * length / (time.perf_counter() - started)
        held_out = nats(cast(state[0], args.dtype), chooser, length, config)
        if held_out < lowest:
            best, lowest = state[0], held_out
        history.append({"step": at, "loss": loss, "held_out": held_out})
        line = f"context {length}  step {at}/{steps}  loss {loss:.3f}  held out "
        line += f"{held_out:.3f} (best {lowest:.3f})  {speed:,.0f} tokens/s"
        print(line, flush=True)
    return best, history


def write(folder: Path, params: Tree, config: LlamaConfig, tokenizer: str) -> None:
    """A Hugging Face folder in bfloat16, the tokenizer (its JSON) included."""
    how = {"bos_token": "<s>", "eos_token": "</s>"}
    how |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    length = {"model_max_length": window(config)}
    stops = {"bos_token_id": BOS, "eos_token_id": EOS}
    parts = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps({**how, **length}, indent=2),
        "generation_config.json": json.dumps(stops, indent=2),
    }
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / part for part in parts]
        for file in files:
            file.write_text(parts[file.name], encoding="utf-8")
        save(folder, cast(params, jnp.bfloat16), config, extra_files=files)


def measure(base: Path, tuned: Path, text: np.ndarray, condense: int) -> Rows:
    """Nats per token of the saved models at 1x, 2x, ... condense times the context."""
    weights, config = load(base, dtype="float32")
    tuned_weights, stretched = load(tuned, dtype="float32")
    times = {2**i for i in range(int(math.log2(condense)) + 1)} | {condense}
    lengths = [config.max_position_embeddings * n for n in sorted(times)]
    condensed = with_rope(config, condense=condense)
    runs = {
        "base": (weights, config),
        f"base, condense {condense}": (weights, condensed),
        f"tuned, condense {condense}": (tuned_weights, stretched),
    }
    return {
        name: {n: nats(params, text, n, how) for n in lengths}
        for name, (params, how) in runs.items()
    }


def measure_wrapped(folder: Path, text: np.ndarray) -> dict[int, float]:
    """Nats per token of a saved model in its own windows, by their length."""
    params, config = load(folder, dtype="float32")
    return {window(config): nats(params, text, window(config), config)}


def markdown(rows: Rows) -> str:
    """Perplexity (nats) by context, one line a model."""
    lengths = list(next(iter(rows.values())))
    lines = [["context", *map(str, lengths)], ["---", *["---:"] * len(lengths)]]
    for name, row in rows.items():
        lines.append([name, *(f"{math.exp(v):.1f} ({v:.3f})" for v in row.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; what the model card says of it included."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("out", type=Path, help="folder to write; OUT-condensed-N goes beside it")
    add("--text", type=Path, nargs="+", required=True, help="files to train on")
    add("--held-out", type=Path, nargs="+", required=True, help="never trained on")
    add("--about", default="", help="a sentence on the text for the model card")
    sizes = {"steps": 3000, "finetune-steps": 600, "batch": 128, "condense": 8}
    sizes |= {"vocab": 2048, "hidden": 192, "layers": 4, "context": 256}
    for name, size in {**sizes, "every": 100, "seed": 0}.items():
        add(f"--{name}", type=int, default=size, help=f"default {size}")
    add("--rate", type=float, default=3e-3, help="peak learning rate")
    add("--finetune-rate", type=float, default=1e-3, help="peak learning rate")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args(argv)
    # The card names files, not the folders they happened to lie in.
    words = (Path(word).name if os.path.exists(word) else word for word in argv)
    args.tuned = args.out.with_name(f"{args.out.name}-condensed-{args.condense}")
    if there := [str(path) for path in (args.out, args.tuned) if path.exists()]:
        parser.error(f"{' and '.join(there)} exists: remove it, or name another")
    args.command = shlex.join(words).replace(str(args.out), args.out.name)
    return args


def publish(
    folder: Path, stage: str, facts: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """Write the model card and metrics.json."""
    ((length, value),) = metrics["hard_wrapped"].items()
    facts |= {"window": length, "wrapped": math.exp(value)}
    card = CARD.format(name=folder.name, stage=stage, **facts)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def read(args: argparse.Namespace) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """The tokenizer, the ids to train on, the ids held out."""
    texts, unseen = (
        [clean(path.read_text(encoding="utf-8")) for path in paths]
        for paths in (args.text, args.held_out)
    )
    tokenizer = train_tokenizer(texts, args.vocab)
    stream, held_out = encode(tokenizer, texts), encode(tokenizer, unseen)
    longest = args.context * args.condense
    if stream.size < longest or held_out.size < 2 * longest:
        got = f"{stream.size} tokens to train on and {held_out.size} held out"
        sys.exit(f"{got}: want at least {longest} and {2 * longest}, give more text")
    return tokenizer, stream, held_out


def main(argv: list[str] | None = None) -> None:
    """Train, tune, write both folders, measure, write the cards."""
    args = parse(sys.argv[1:] if argv is None else argv)
    tokenizer, stream, held_out = read(args)
    chooser, report = np.array_split(held_out, 2)
    config = tiny_config(args, tokenizer.get_vocab_size())
    params = init_params(jax.random.key(args.seed), config)
    count = count_parameters(params)
    print(f"{count:,} parameters, {stream.size:,} tokens to train on")

    plan = (args.steps, args.batch, args.rate)
    base, learnt = fit(params, config, (stream, chooser), args, plan)
    ratio, longest = args.condense, args.context * args.condense
    stretched = with_rope(config, condense=ratio)
    plan = (args.finetune_steps, max(1, args.batch // ratio), args.finetune_rate)
    tuned, tuning = fit(base, stretched, (stream, chooser), args, plan)

    write(args.out, base, config, tokenizer.to_str())
    write(args.tuned, tuned, stretched, tokenizer.to_str())
    rows = measure(args.out, args.tuned, report, ratio)
    print(table := markdown(rows))
    facts = {"count": count, "config": config, "args": args, "tokens": report.size}
    facts |= {"table": table, "command": args.command}
    facts["train"], facts["held_out"] = (
        ", ".join(path.name for path in paths) for paths in (args.text, args.held_out)
    )
    stage = f"Trained on windows of {args.context} tokens"
    then = f"{stage}, then tuned on\nwindows of {longest} with every position divided "
    then += f"by {ratio} (position interpolation)."
    raw = [path.read_text(encoding="utf-8") for path in args.held_out]
    raw = np.array_split(encode(tokenizer, raw), 2)[1]
    for folder, words, history in (
        (args.out, f"{stage}.", learnt),
        (args.tuned, then, tuning),
    ):
        wrapped = measure_wrapped(folder, raw)
        metrics = {"nats": rows, "hard_wrapped": wrapped, "history": history}
        publish(folder, words, facts, metrics)
    excerpt = tokenizer.decode(report[: 4 * longest].tolist()).split("\n", 1)[-1]
    (args.out / "held_out.txt").write_text(excerpt, encoding="utf-8")


if __name__ == "__main__":
    main()
