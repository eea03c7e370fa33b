"""Methods in transformers' words, and a tiny model in a folder."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

TRAINED = 32  # every model; rows reach three times as far
PAIRS = 8


class Method(NamedTuple):
    """A rotary embedding in transformers' words, and what is left to say in ours."""

    parameters: dict[str, Any]
    ours: dict[str, Any] = {}  # noqa: RUF012
    condense: float = 1.0


def hf(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


ORIGINAL = {"original_max_position_embeddings": TRAINED}
METHODS = {
    "default": Method(hf("default")),
    "condense": Method(hf("default"), {"condense": 2.5}, 2.5),
    "linear": Method(hf("linear", factor=3.0)),
    "ntk": Method(  # transformers has no such type; its users change theta
        {"rope_type": "default", "rope_theta": 10000.0 * 4 ** (16 / 14)},
        {"method": "ntk", "factor": 4.0},
    ),
    "dynamic": Method(hf("dynamic", factor=2.0)),
    "yarn": Method(hf("yarn", factor=4.0, beta_fast=8.0, **ORIGINAL)),
    "llama3": Method(
        hf("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)
    ),
    "longrope": Method(
        hf(
            "longrope",
            short_factor=[1 + 0.1 * i for i in range(PAIRS)],
            long_factor=[1 + 0.5 * i for i in range(PAIRS)],
            factor=4.0,
            **ORIGINAL,
        )
    ),
    "proportional": Method(hf("proportional", partial_rotary_factor=0.5, factor=2.0)),
}


@pytest.fixture(scope="module")
def folder(tiny_hf: Any, tmp_path_factory: Any) -> Path:
    """A tiny model as transformers saves it."""
    import torch

    path = tmp_path_factory.mktemp("tiny")
    tiny = tiny_hf(max_position_embeddings=TRAINED, layers=1)
    tiny.model.save_pretrained(path)
    torch.set_num_threads(1)
    return path
