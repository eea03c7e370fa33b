"""Every token's log-likelihood against PyTorch's: same weights, text and method.

Contexts reach past the trained length.  For dynamic NTK the length is the window's,
which is what transformers takes for a full pass (its largest position + 1).
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers import LlamaConfig as HFConfig

from jrope.hf import config_to_hf
from jrope.hf.checkpoint import load
from jrope.lab.perplexity import perplexity
from jrope.model.with_rope import with_rope

EMBEDDED = Path(__file__).parents[1] / "examples" / "models" / "jrope-tiny"
TEXT = EMBEDDED / "held_out.txt"
SMOLLM2 = os.environ.get("JROPE_SMOLLM2", "")
METHODS = {
    "default": {},
    "linear": {"factor": 4},
    "dynamic": {"factor": 2},
    "yarn": {"factor": 4},
}
EACH, MEAN = 1e-3, 1e-5  # nats


@cache
def tokens(folder: Path) -> np.ndarray:
    text = TEXT.read_text("utf-8")
    return np.array(
        AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"]
    )


@cache
def weights(folder: Path) -> Any:
    return load(folder, "float32")


def jrope_nll(folder: Path, method: str, ids: np.ndarray) -> np.ndarray:
    params, config = weights(folder)
    config = with_rope(config, method, **METHODS[method])
    scores = perplexity(params, config, [ids], len(ids))
    np.testing.assert_array_equal(scores.position, np.arange(1, len(ids)))
    return scores.nll


@torch.inference_mode()
def torch_nll(folder: Path, method: str, ids: np.ndarray) -> np.ndarray:
    """From transformers' float32 logits, in pieces: 16k of SmolLM2's would be 3 GB.

    The logarithm of the sum is taken in float64: in float32 PyTorch's own is 8e-6 nats
    too small on the mean over 49,152 logits (jrope's 2e-7, measured on SmolLM2).
    """
    torch.set_num_threads(1)
    config = with_rope(weights(folder)[1], method, **METHODS[method])
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, config=HFConfig(**config_to_hf(config)), dtype=torch.float32
    ).eval()
    rows = torch.as_tensor(ids)[None]
    states = model.model(rows, use_cache=False).last_hidden_state[0, :-1]
    found: list[np.ndarray] = []
    for at in range(0, len(states), 512):
        logits = model.lm_head(states[at : at + 512]).double()
        wanted = rows[0, 1 + at : 1 + at + len(logits)]
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        found.append(loss.numpy())
    return np.concatenate(found)


def difference(
    folder: Path, method: str, ids: np.ndarray
) -> tuple[float, float, float]:
    """Largest difference of a token, difference of the means, and the mean, in nats."""
    got, want = jrope_nll(folder, method, ids), torch_nll(folder, method, ids)
    apart = got.astype(np.float64) - want
    return float(np.abs(apart).max()), float(abs(apart.mean())), float(want.mean())


@pytest.mark.parametrize("context", [256, 1300])
@pytest.mark.parametrize("method", METHODS)
def test_embedded_model_within_and_past_its_context(method: str, context: int) -> None:
    ids = tokens(EMBEDDED)
    each, mean, _ = difference(EMBEDDED, method, ids[:context])
    assert each < EACH
    assert mean < MEAN


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_smollm2_at_2k(method: str) -> None:
    ids = tokens(Path(SMOLLM2))
    each, mean, _ = difference(Path(SMOLLM2), method, ids[:2048])
    assert each < EACH
    assert mean < MEAN
