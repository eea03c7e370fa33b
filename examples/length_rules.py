"""The three rules for the length that dynamic methods go by: perplexity under each.

The text is fed token by token, as decoding does, to 4 times the trained context.
Run `python examples/length_rules.py [FOLDER]`.
"""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import jrope

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"
DYNAMIC, YARN = {"method": "dynamic", "factor": 2}, {"method": "dynamic-yarn"}
RULES = {
    "as trained": {},
    "dynamic:2, planned": {**DYNAMIC, "lengths": "planned"},
    "dynamic:2, growing": {**DYNAMIC, "lengths": "growing"},
    "dynamic:2, hf": {**DYNAMIC, "lengths": "hf"},
    "dynamic-yarn, planned": {**YARN, "lengths": "planned"},
    "dynamic-yarn, growing": {**YARN, "lengths": "growing"},
}


@partial(jax.jit, static_argnames="config")
def token_nats(params, rows, *, config):
    def step(cache, tokens):
        now, then = tokens
        logits, cache = jrope.forward(params, now[:, None], cache=cache, config=config)
        known = jnp.take_along_axis(logits[:, 0], then[:, None], axis=-1)[:, 0]
        return cache, jax.nn.logsumexp(logits[:, 0], axis=-1) - known

    cache = jrope.KVCache.empty(config, *rows.shape, dtype=jnp.float32)
    _, nats = jax.lax.scan(step, cache, (rows.T[:-1], rows.T[1:]))
    return nats.T


folder = Path(sys.argv[1] if sys.argv[1:] else EMBEDDED)
params, config = jrope.load(folder, dtype="float32")
text = (EMBEDDED / "held_out.txt").read_text("utf-8")
edges = [config.max_position_embeddings * times for times in (0, 1, 2, 4)]
spans, window = [*pairwise(edges)], edges[-1]
ids = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids
windows = min(len(ids) // window, 8)
rows = jnp.asarray(ids[: windows * window], jnp.int32).reshape(windows, window)
print(f"perplexity of {folder.name}, {windows} windows of {window} tokens")
print(f"{'at positions':24}" + "".join(f"{f'{a}-{b}':>12}" for a, b in spans))
table = {}
for name, rule in RULES.items():
    stretched = jrope.with_rope(config, **rule)
    nats = np.asarray(token_nats(params, rows, config=stretched))
    table[name] = [float(np.exp(nats[:, a:b].mean())) for a, b in spans]
    print(f"{name:24}" + "".join(f"{v:12.1f}" for v in table[name]), flush=True)
