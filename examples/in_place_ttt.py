"""In-place test-time training: an MLP's down projection learns while it reads.

    python examples/in_place_ttt.py [FOLDER] --text BOOK... --held-out BOOK

tunes a model on windows of a stretched context twice, with the same steps on the same
windows: as it is, and with fast weights (Feng et al. 2026, arXiv:2604.06169).  Then it
prints held-out perplexity by position: the base tuned alike, with fast weights, and the
same with their update switched off, which tells what the memory is worth.  All of it is
float32.  A text is scored whole: no cache carries fast weights.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _tuning import (
    Text,
    command,
    compile_step,
    held_out_nats,
    learning_rates,
    make_step,
    new_state,
)
from extend_context import EMBEDDED, read, stretch
from extension_table import draw, markdown, tune

import jrope
from jrope.cli.common import trained_length, whole
from jrope.cli.terminal import bytes_text
from jrope.model.layers import gated, norm_of, rms_norm
from jrope.model.products import linear
from jrope.model.scores import token_logprobs
from jrope.numerics import with_rank
from jrope.sharding.axes import ONE, Axes
from jrope.tree import LayerParams, Params, Tree, flatten, nest

Spans = dict[str, np.ndarray]  # positions, and the nats of each window [W] there
KERNEL = 5  # tokens that a target sees: two before its own, two after
product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # no TF32


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastMLP:
    """The `mlp` of `jrope.hidden_states` where layers have `ttt_conv` and `ttt_proj`.

    Tokens of piece i, C = `chunk` of them, meet W_i; W_0 is down_proj.  With Z [C, F],
    what the piece gives down_proj, and H [C, D], the MLP's normed input,

        V = conv(H) P,   W_{i+1} = W_i + eta V^T Z:

    one gradient step on -<Z W^T, V>.  W_i - W_0 is a sum of its own in float32, so
    that zero leaves every bit of the plain MLP.  Each row of a batch begins with W_0.
    On a mesh that splits rows alone.
    """

    chunk: int
    eta: float

    def __call__(
        self,
        weights: LayerParams,
        x: jax.Array,
        *,
        config: jrope.LlamaConfig,
        axes: Axes = ONE,
    ) -> jax.Array:
        """down(z) + what the pieces before taught, [B, T, D]; see `layers.mlp`."""
        block = weights["mlp"]
        z = gated(weights, x, config)
        y = linear(block["down_proj"], z, axes=axes)
        if "ttt_conv" not in block:
            return y
        h = rms_norm(x, *norm_of(weights["post_attention_layernorm"], config))
        h, z = (pieces(a.astype(jnp.float32), self.chunk) for a in (h, z))
        v = targets(h[:, :-1], block["ttt_conv"]["weight"], block["ttt_proj"]["weight"])
        deltas = product("bncd,bncf->bndf", v, z[:, :-1])
        fast = jnp.cumsum(deltas, axis=1) * np.float32(self.eta)
        learnt = product("bncf,bndf->bncd", z[:, 1:], fast)
        learnt = jnp.pad(learnt, ((0, 0), (1, 0), (0, 0), (0, 0)))
        learnt = learnt.reshape(len(x), -1, x.shape[2])[:, : x.shape[1]]
        return (y.astype(jnp.float32) + learnt).astype(y.dtype)


def pieces(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [B, N, C, ...], zeros behind the last token.

    The last piece, whole or not, teaches nothing: no piece comes after it.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0)))
    return x.reshape(len(x), -1, chunk, x.shape[2])


def targets(h: jax.Array, conv: jax.Array, proj: jax.Array) -> jax.Array:
    """conv(H) P of pieces [B, N, C, D], each seeing zeros where its neighbours are."""
    reach = KERNEL // 2
    wide = jnp.pad(h, ((0, 0), (0, 0), (reach, reach), (0, 0)))
    taps = (with_rank(conv[:, k], h.ndim) for k in range(KERNEL))
    seen = (wide[:, :, k : k + h.shape[2]] * tap for k, tap in enumerate(taps))
    return product("bncd,de->bnce", sum(seen), proj)


@partial(jax.jit, static_argnames=("config", "mlp", "remat"))
def score(
    params: Params,
    tokens: jax.Array,
    *,
    config: jrope.LlamaConfig,
    mlp: FastMLP,
    remat: bool = False,
) -> jax.Array:
    """`jrope.score` with another MLP: log p of all tokens but the first, [B, T - 1]."""
    x, _ = jrope.hidden_states(params, tokens, config=config, mlp=mlp, remat=remat)
    return token_logprobs(params, x[:, :-1], tokens[:, 1:], config=config)


def add_fast(
    params: Params, config: jrope.LlamaConfig, every: int, proj: float
) -> Tree:
    """The tree with `ttt_conv` and `ttt_proj` in layers 0, every, 2 * every, ...

    The kernel is zero, so that the model computes what it did; P is proj * identity.
    """
    flat, size = flatten(params), config.hidden_size
    for layer in range(0, config.num_hidden_layers, every):
        name = f"model.layers.{layer}.mlp"
        flat[f"{name}.ttt_conv.weight"] = jnp.zeros((size, KERNEL), jnp.float32)
        flat[f"{name}.ttt_proj.weight"] = proj * jnp.eye(size, dtype=jnp.float32)
    return nest(flat)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="in_place_ttt", description=about)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=EMBEDDED, help="Hugging Face folder")
    add("--rope", default="yarn:8", metavar="SPEC", help="the extension (yarn:8)")
    about = "tokens of a window (default: the trained length times the factor)"
    add("--window", type=whole(2), metavar="N", help=about)
    about = "to train on (default: a few pages that lie beside the embedded model)"
    add("--text", type=Path, nargs="+", metavar="FILE", help=about)
    about = "to measure on (default: the last third of the text)"
    add("--held-out", type=Path, nargs="+", metavar="FILE", help=about)
    about = "make each paragraph of the files one line, as train_tiny.py does"
    add("--unwrap", action="store_true", help=about)
    sizes = {"chunk": 64, "every": 1, "steps": 400, "batch": 16, "seed": 0}
    texts = {"chunk": "tokens between updates", "every": "a fast layer in so many"}
    texts |= {"batch": "windows of a step", "rate": "peak learning rate"}
    texts |= {"eta": "of an update", "proj": "what P is to the identity at first"}
    for name, size in {**sizes, "eta": 0.005, "proj": 1.0, "rate": 3e-4}.items():
        least = {"seed": 0, "steps": 2}.get(name, 1)
        kind = whole(least) if name in sizes else float
        about = f"{texts.get(name, name)} (default {size})"
        add(f"--{name}", type=kind, default=size, help=about)
    add("--out", type=Path, metavar="FILE", help="figures as JSON")
    return parser.parse_args(argv)


def tuned(
    args: argparse.Namespace, params: Any, config: Any, text: Text, score: Any
) -> tuple[Any, list[float]]:
    """The weights after all steps on the loss that a score gives, and the losses."""
    shape = (1, args.batch, args.window)
    step = make_step(config, "float32", remat=True, score=score)
    step, need = compile_step(step, new_state(params), shape)
    rates = learning_rates(args.steps, args.rate, max(1, args.steps // 20))
    params, losses, each = tune(step, params, rates, draw(args, text, shape, args.seed))
    last = f"{losses[0]:.3f} to {np.mean(losses[-10:]):.3f}"
    print(f"  loss {last}, {each:.2f} s and {bytes_text(need)} a step", flush=True)
    return params, losses


def by_position(nats: np.ndarray, trained: int) -> Spans:
    """Nats [W, window - 1] by the positions of their tokens: each window's mean."""
    window, edges = nats.shape[1] + 1, [0]
    while edges[-1] < window:
        edges.append(min(window, max(trained, 2 * edges[-1])))
    spans = itertools.pairwise(edges)
    # Column t has the token at position t + 1.
    return {f"{a}-{b}": nats[:, max(a, 1) - 1 : b - 1].mean(axis=1) for a, b in spans}


def table(nats: dict[str, Spans]) -> str:
    """Perplexities, and what fast weights gain in nats; Markdown."""
    base, fast, off = nats.values()
    lines = [["", *base], ["---", *["---:"] * len(base)]]
    for name, row in nats.items():
        lines.append([name, *(f"{np.exp(x.mean()):.2f}" for x in row.values())])
    gains = {"nats gained on the base": base, "nats gained by updating": off}
    for name, less in gains.items():
        lines.append([name, *(gain(less[span] - x) for span, x in fast.items())])
    return markdown(lines)


def gain(x: np.ndarray) -> str:
    """A mean over windows, and its standard error where there are several."""
    error = np.std(x, ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
    return f"{x.mean():+.4f} ± {error:.4f}"


def run(args: argparse.Namespace) -> None:
    """Tune two models, measure three, tell."""
    params, config = jrope.load(args.folder, dtype="float32")
    trained = trained_length(config)
    config, args.window = stretch(config, args.rope, args.window)
    text, unseen = read(args, config)
    device = jax.devices()[0].device_kind
    print(f"{device}, {args.steps} steps of {args.batch} x {args.window} tokens: base")
    base, before = tuned(args, params, config, text, jrope.score)
    print(f"with fast weights, C {args.chunk}, eta {args.eta}", flush=True)
    learning = partial(score, mlp=FastMLP(chunk=args.chunk, eta=args.eta))
    params = add_fast(params, config, args.every, args.proj)
    fast, after = tuned(args, params, config, text, learning)
    runs = {"base, tuned alike": (base, jrope.score), "fast weights": (fast, learning)}
    runs["fast weights, not updated"] = (fast, jrope.score)
    nats: dict[str, Spans] = {}
    for name, (params, how) in runs.items():
        found = held_out_nats(params, unseen, args.window, config, how)
        nats[name] = by_position(found, trained)
    print(f"perplexity by position, {len(found)} held-out windows\n\n{table(nats)}")
    if args.out is not None:
        facts: Tree = {"device": device, "losses": {"base": before, "fast": after}}
        facts["settings"] = {name: str(value) for name, value in vars(args).items()}
        facts["nats"] = jax.tree.map(lambda x: x.tolist(), nats)
        args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return command("in_place_ttt", run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
