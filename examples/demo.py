"""A Hugging Face folder in, text out: within the trained context and far past it.

Run `python examples/demo.py [FOLDER]`.  Beside it lies FOLDER-condensed-8: the model
after a short fine-tune with positions divided by 8 (arXiv:2306.15595; train_tiny.py).
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

import jrope

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"


def tell(params: dict, config: jrope.LlamaConfig, prompt: np.ndarray) -> None:
    """Continue the prompt [1, T]: print the text as it comes, and how fast it came."""
    draw = {"sampler": jrope.Sampler(temperature=0.8, top_p=0.9), "config": config}
    draw |= {"key": jax.random.key(2), "stop_ids": ()}
    list(jrope.stream(params, prompt, **draw))  # the first run compiles
    clock, tokens = [time.perf_counter()], 0
    for block in jrope.stream(params, prompt, **draw):
        clock.append(time.perf_counter())
        tokens += block.size
        print(tokenizer.decode(block[0]), end="", flush=True)
    first, speed = clock[1] - clock[0], (tokens - 1) / (clock[-1] - clock[1])
    print(f"\n  [first token after {first:.2f} s, then {speed:.0f} tokens/s]\n")


folder = Path(sys.argv[1] if sys.argv[1:] else EMBEDDED)
base, config = jrope.load(folder, dtype="float32")
tuned, condensed = jrope.load(f"{folder}-condensed-8", dtype="float32")
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
size, count = config.max_position_embeddings, sum(x.size for x in jax.tree.leaves(base))
print(f"{folder.name}: {count:,} parameters, trained on windows of {size} tokens\n")
print("== Within the trained context: When the letter came, she ...")
tell(base, config, np.array([tokenizer.encode("When the letter came, she").ids]))
text = (folder / "held_out.txt").read_text("utf-8")
passage = np.array([tokenizer.encode(text).ids[: 8 * size]])
spans = [(size * a, size * b) for a, b in ((0, 1), (1, 2), (2, 4), (4, 8))]
print("== Perplexity at     ", *(f"{f'{a}-{b}':>11}" for a, b in spans))
rows = {"as trained": (base, config), "condensed, fine-tuned": (tuned, condensed)}
for name, (params, how) in rows.items():
    nats = -np.asarray(jrope.score(params, passage, config=how))[0]
    rows[name] = [float(np.exp(nats[a:b].mean())) for a, b in spans]
    print(f"{name:21}", *(f"{x:11.1f}" for x in rows[name]), flush=True)

long = passage[:, : 6 * size]
tail = tokenizer.decode(long[0, -16:])
print(f"\n== After {long.size} tokens, condensed and fine-tuned: ...{tail} ...")
tell(tuned, condensed, long)
print("== The same, as trained: ...")
tell(base, config, long)
plain, held = (row[-1] for row in rows.values())
print(f"Past token {4 * size}: perplexity {plain:.0f} as trained, {held:.0f} condensed")
