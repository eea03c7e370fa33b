"""Load a Hugging Face folder and continue a prompt.

Run `python examples/generate.py [FOLDER]`.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

import jrope

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"

folder = sys.argv[1] if sys.argv[1:] else EMBEDDED
params, config = jrope.load(folder, dtype="float32")
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
prompt = "When the letter came, she"
ids = np.array([tokenizer.encode(prompt).ids])
sampler = jrope.Sampler(temperature=0.8, top_p=0.9)
out = jrope.generate(params, ids, config=config, sampler=sampler, key=jax.random.key(2))
new = out.tokens[0, : out.lengths[0]]
print(prompt + tokenizer.decode(new))
