"""What each RoPE method does to the frequencies, as a picture: images/methods.svg.

A model's rotary pairs stand side by side, ordered by the tokens that a turn takes; each
line says how many times longer a method makes that turn.
Run `python examples/method_picture.py [FOLDER] [FILE]`; FILE is an .svg or a .png.
Needs `pip install "jrope[lab]"`.
"""

import sys
from pathlib import Path

import numpy as np

from jrope.hf.checkpoint import read_llama_config
from jrope.lab.figures import figures, to_svg
from jrope.model.with_rope import with_rope

HERE = Path(__file__).parent
folder = Path(sys.argv[1] if sys.argv[1:] else HERE / "models" / "jrope-tiny")
target = Path(sys.argv[2] if sys.argv[2:] else HERE / "images" / "methods.svg")
config = read_llama_config(folder)
trained, plain = config.max_position_embeddings, with_rope(config, "default").rope
METHODS = {  # name in the picture: method, fields, length of the sequence
    "default": ("default", {}, 8),
    "linear:8, condense:8": ("linear", {"factor": 8}, 8),
    "ntk:8": ("ntk", {"factor": 8}, 8),
    f"dynamic:1 at {2 * trained:,}": ("dynamic", {"factor": 1}, 2),
    f"dynamic:1 at {8 * trained:,}": ("dynamic", {"factor": 1}, 8),
    "yarn:8": ("yarn", {"factor": 8}, 8),
    "llama3:8": ("llama3", {"factor": 8, "low": 1, "high": 4}, 8),
}

records = [{"kind": "header", "model": folder.name, "trained_length": trained}]
print(f"tokens a turn in {folder.name}, trained on {trained}")
print(f"{'':22}{'fastest':>10}{'middle':>10}{'slowest':>10}{'cos, sin':>10}")
for name, (method, fields, times) in METHODS.items():
    rope = with_rope(config, method, **fields).rope
    inv_freq, scaling = rope.frequencies(times * trained, np.float64)
    base, _ = plain.frequencies(None, np.float64)
    record = {"kind": "method", "rope": name, "length": times * trained, "condense": 1}
    record |= {"inv_freq": inv_freq.tolist(), "base_inv_freq": base.tolist()}
    records.append(record | {"attention_scaling": scaling})
    turns = (2 * np.pi / inv_freq)[[0, len(inv_freq) // 2, -1]]
    print(f"{name:22}" + "".join(f"{t:10,.1f}" for t in turns) + f"{scaling:10.3f}")

picture = figures(records, width=8.0)["frequencies"]
target.parent.mkdir(parents=True, exist_ok=True)
if target.suffix == ".svg":
    target.write_text(to_svg(picture), "utf-8")
else:
    picture.savefig(target, dpi=160)
print(f"drawn: {target.name}")
