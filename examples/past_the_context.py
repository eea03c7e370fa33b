"""Past the trained context without any tuning: the RoPE methods side by side.

The model reads a passage 8 times as long as any that it was trained on.  A method
changes the rotary angles, no weight: another one is another line of METHODS.
Run `python examples/past_the_context.py [FOLDER]`.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import jrope

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"
TIMES = 8
METHODS = {
    "as trained": {"method": "default"},
    "condense": {"condense": TIMES},
    "linear": {"method": "linear", "factor": TIMES},
    "ntk": {"method": "ntk", "factor": TIMES},
    "dynamic": {"method": "dynamic", "factor": TIMES},
    "yarn": {"method": "yarn", "factor": TIMES},
}

folder = Path(sys.argv[1] if sys.argv[1:] else EMBEDDED)
params, config = jrope.load(folder, dtype="float32")
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
text = (EMBEDDED / "held_out.txt").read_text("utf-8")
context = config.max_position_embeddings
ids = tokenizer.encode(text).ids[: TIMES * context]
tokens, half = jnp.asarray([ids], jnp.int32), len(ids) // 2

print(f"perplexity of {folder.name}, trained on {context} tokens, at positions")
print(f"{'method':12}{f'0 to {context}':>14}{f'{half} to {len(ids)}':>14}")
table = {}
for name, method in METHODS.items():
    stretched = jrope.with_rope(config, **method)
    nats = -np.asarray(jrope.score(params, tokens, config=stretched))
    table[name] = [float(np.exp(n.mean())) for n in (nats[0, :context], nats[0, half:])]
    print(f"{name:12}" + "".join(f"{value:14.1f}" for value in table[name]), flush=True)

best = min(table, key=lambda name: table[name][1])
print(f"best past the context without tuning: {best}; tuning does better: demo.py")
