"""A ragged batch with log-probabilities: every row is what it would be alone.

Run `python examples/ragged_logprobs.py [FOLDER]`.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

import jrope

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"
PROMPTS = [
    "She smiled",
    "When the letter came, she",
    "And the king said unto all the people that were gathered before him,",
]

folder = Path(sys.argv[1] if sys.argv[1:] else EMBEDDED)
params, config = jrope.load(folder, dtype="float32")
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
lengths = [len(row) for row in rows]
batch = np.array([row + [0] * (max(lengths) - len(row)) for row in rows])

options = {"config": config, "key": jax.random.key(0), "logprobs": True}
options |= {"sampler": jrope.Sampler(temperature=0.8), "max_new_tokens": 16}
out = jrope.generate(params, batch, lengths, **options)

same, worst = True, 0.0
for b, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
    tokens = out.tokens[b, : out.lengths[b]].tolist()
    print(f"{prompt}|{tokenizer.decode(tokens)}")
    known, new = out.prompt_logprobs[b, : length - 1], out.logprobs[b, : len(tokens)]
    print(f"  prompt: log p {known.sum():7.2f} of {length - 1} tokens")
    print(f"  output: log p {new.sum():7.2f} of {len(tokens)} tokens, first ", end="")
    words = [
        repr(tokenizer.decode([token], skip_special_tokens=False))
        for token in tokens[:3]
    ]
    pairs = zip(words, new.tolist(), strict=False)
    print(", ".join(f"{word} {value:.2f}" for word, value in pairs))

    # Alone, with its own seed: in a batch the rows have the seeds 0, 1, 2, ...
    alone = jrope.generate(params, [rows[b]], seeds=[b], **options)
    same &= alone.tokens[0, : alone.lengths[0]].tolist() == tokens
    for one, many in ((alone.prompt_logprobs[0], known), (alone.logprobs[0], new)):
        worst = max(worst, float(abs(one[: len(many)] - many).max()))
print(f"each row alone: same tokens {same}, log p differs by {worst:.0e} at most")
