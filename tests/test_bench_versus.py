"""transformers beside jrope: the same model, the same memory, the same tokens."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import quick as quick
from bench_helpers import run, tiny

from jrope.bench import versus as bench_versus
from jrope.bench.model import random_params
from jrope.bench.versus import Peer
from jrope.cli import bench
from jrope.generation.sample import Sampler
from jrope.model.llama import forward
from jrope.tree import flatten


def tiny_peer(dtype, **fields):
    config = tiny(**fields)
    params = random_params(config, dtype)
    return Peer(params, config), params, config


@pytest.mark.parametrize("tied", [False, True])
def test_peer_is_the_same_model_in_the_same_memory(tied):
    import torch

    torch.set_num_threads(1)
    peer, params, config = tiny_peer(jnp.float32, tie_word_embeddings=tied)
    ids = np.random.default_rng(0).integers(0, 50, (2, 9), np.int32)
    with torch.no_grad():
        theirs = peer.model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    ours, _ = forward(params, jnp.asarray(ids), config=config)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    lent = dict(peer.model.named_parameters())
    for name, array in flatten(params).items():
        assert lent[name].data_ptr() == array.unsafe_buffer_pointer(), name


def test_peer_decodes_as_many_tokens_as_it_is_asked(monkeypatch):
    peer, _, _ = tiny_peer(jnp.bfloat16, eos_token_id=tuple(range(50)))
    seen = []
    generate = peer.model.generate

    def watched(ids, **options):
        seen.append(generate(ids, **options))
        return seen[-1]

    monkeypatch.setattr(peer.model, "generate", watched)
    sampler = Sampler(temperature=0.8, top_p=0.9)
    assert peer.decode(2, 5, 3, sampler, bench_versus.EAGER)() > 0
    assert seen[0].shape == (2, 5 + 1 + 3)
    assert peer.prefill(2, 5)() > 0


def test_versus_puts_transformers_beside_every_row(capsys):
    words = ("--versus", "transformers", "--batch", "2", "--json", "-")
    assert run(*words) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    rows = report["rows"]
    assert [r["by"] for r in rows] == ["jrope", "transformers"] * 2
    for own, other in zip(rows[::2], rows[1::2], strict=True):
        assert other["ratio"] == pytest.approx(other["seconds"] / own["seconds"])
        assert own["context"] == other["context"] == 64  # none is ragged
        assert own["counted"] == other["counted"]
    assert {"torch", "transformers"} <= {*report["versions"]}
    assert "jrope is" in captured.err


def test_versus_without_torch_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run("--versus", "transformers") == 2
    assert "needs torch" in capsys.readouterr().err


def test_torch_is_left_alone_without_versus():
    code = (
        "import sys, jrope.cli.bench;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_memory_is_shared_only_beside_torch(monkeypatch):
    for name in ("PREALLOCATE", "MEM_FRACTION"):
        monkeypatch.delenv(f"XLA_PYTHON_CLIENT_{name}")
    bench._prepare_memory(False)
    assert bench.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in bench.os.environ
    bench._prepare_memory(True)
    assert bench.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
