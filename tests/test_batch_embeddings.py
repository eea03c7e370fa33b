"""Vectors of texts are those of one text at a time."""

from base64 import b64decode
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from batch_file_helpers import HashEngine, records_of, run, settings, write_rows
from cli_helpers import ids_of
from conftest import make_tiny_hf

from jrope.batch.embeddings import Embedder
from jrope.hf import config_from_hf
from jrope.tree import nest

HF = make_tiny_hf(vocab_size=264, layers=1)
CONFIG = config_from_hf(HF.config)
PARAMS = nest({name: jnp.asarray(x) for name, x in HF.weights.items()})
TEXTS = ["a", "one text", "another, longer than others", "b"]


def row(number: int, given: Any, **more: Any) -> dict[str, Any]:
    body = {"model": "m", "input": given, **more}
    return {"custom_id": f"r{number}", "url": "/v1/embeddings", "body": body}


def vector(text: str, pooling: str) -> np.ndarray:
    x = HF.model.model(torch.tensor([ids_of(text)])).last_hidden_state[0]
    x = np.asarray(x, np.float64)
    x = x.mean(axis=0) if pooling == "mean" else x[-1]
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_one_text_at_a_time(tmp_path: Path, pooling: Any) -> None:
    rows = [row(0, TEXTS), row(1, TEXTS[1]), row(2, ids_of("b")), row(3, [])]
    rows.append(row(4, "b", encoding_format="base64"))
    source, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    engine = HashEngine()
    own = settings(config=CONFIG, max_length=64, model="tiny")
    embed = Embedder(PARAMS, CONFIG, pooling)
    summary = run(source, output, settings=own, embed=embed, engine=engine)
    assert (summary.answered, summary.failed, engine.taken) == (4, 1, 0)
    found = {record["custom_id"]: record for record in records_of(output)}
    body = found["r0"]["response"]["body"]
    assert body["object"] == "list" and body["model"] == "tiny"
    assert body["usage"] == {"prompt_tokens": 37, "total_tokens": 37}
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2, 3]
    for text, entry in zip(TEXTS, body["data"], strict=True):
        np.testing.assert_allclose(entry["embedding"], vector(text, pooling), atol=2e-6)
    (entry,) = found["r4"]["response"]["body"]["data"]
    bytes_of = np.frombuffer(b64decode(entry["embedding"]), "<f4")
    np.testing.assert_allclose(bytes_of, vector("b", pooling), atol=2e-6)
    assert found["r3"]["error"]["message"] == "input: it is empty"


def test_without_an_embedder_rows_fail(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [row(0, "a"), {"prompt": "x"}])
    run(source, tmp_path / "out.jsonl", in_order=True)
    bad, good = records_of(tmp_path / "out.jsonl")
    assert bad["error"]["code"] == "unsupported" and good["error"] is None


def test_a_vector_that_is_not_finite_is_its_rows_error(tmp_path: Path) -> None:
    def embed(prompts: list[list[int]]) -> np.ndarray:
        return np.array([[np.nan if len(p) == 1 else 1.0] for p in prompts], np.float32)

    source = write_rows(tmp_path / "rows.jsonl", [row(0, "a"), row(1, "bc")])
    run(source, tmp_path / "out.jsonl", embed=embed, in_order=True)
    bad, good = records_of(tmp_path / "out.jsonl")
    assert bad["error"]["code"] == "not_finite" and good["error"] is None
