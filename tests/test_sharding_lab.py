"""What measures models, with parameters on a mesh: one device's figures."""

import jax
import numpy as np
import pytest
from sharding_helpers import (
    CONFIG,
    TOKENS,
    assert_close,
    explicit,
    make_params,
    with_rope,
)

import jrope
from jrope.lab.distance import mean_queries_and_keys
from jrope.lab.passkey import NEW, Passkeys, answer_passkeys
from jrope.lab.perplexity import perplexity
from jrope.parity.comparison import jrope_stages
from jrope.weights.fuse import fuse

MESHES = ["data=2,model=4", "fsdp=2,context=2,model=2"]
TEXTS = [TOKENS.reshape(-1)[:40], TOKENS.reshape(-1)[40:93]]


def on_mesh(text, config):
    params = make_params(config)
    placed = jrope.shard(params, explicit(text), config)
    return params, fuse(placed) if "data" in text else placed


@pytest.mark.parametrize("text", MESHES)
def test_perplexity(text):
    config = with_rope("yarn")
    how = {"stride": 6, "tokens_at_once": 39}  # three rows, which no mesh divides
    scores = [perplexity(p, config, TEXTS, 13, **how) for p in on_mesh(text, config)]
    want, got = scores
    assert_close(got.nll, want.nll)
    np.testing.assert_array_equal(got.index, want.index)
    assert got.interval().count == want.interval().count


def test_passkeys():
    text = "fsdp=2,context=2,model=2"
    given = Passkeys(prompts=TOKENS[:5], keys=("12345",) * 5)
    seen = [[], []]
    for tree, kept in zip(on_mesh(text, CONFIG), seen, strict=True):
        answer_passkeys(
            tree, CONFIG, given, lambda ids, kept=kept: kept.append(ids) or ""
        )
    assert seen[0] == seen[1] and len(seen[0][0]) == NEW


@pytest.mark.parametrize("text", MESHES)
def test_mean_queries_and_keys(text):
    one, placed = on_mesh(text, CONFIG)
    want = mean_queries_and_keys(one, CONFIG, TEXTS, 20)
    got = mean_queries_and_keys(placed, CONFIG, TEXTS, 20)
    jax.tree.map(assert_close, got, want)


@pytest.mark.parametrize("text", MESHES)
def test_stages_of_a_comparison(text):
    config = with_rope("dynamic")
    one, placed = on_mesh(text, config)
    places = np.arange(12, dtype=np.int32)[None, :] + np.array([[0], [7], [30]])
    given = config, TOKENS[:3], places.astype(np.int32)
    want, got = jrope_stages(one, *given), jrope_stages(placed, *given)
    assert got.keys() == want.keys()
    for stage in want:
        assert_close(got[stage], want[stage])
