"""Layers with a window: full passes by masks, decode and chunks by slots that go round.

A full pass builds the mask (test_attention_masks.py, and transformers' own in
test_families.py); every other way to the same tokens has to give its logits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import small_blocks
from model_helpers import changed, close, tokens_of
from test_config import make

from jrope.errors import JropeError
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.llama import forward, hidden_states, init_params
from jrope.rope import DynamicNTK, Rope, Yarn
from jrope.tree import Tree

WINDOWS = (5, None, 3)
YARN = Rope(theta=1e4, rotary_dim=16, scaling=Yarn(factor=4, original_length=8))
MIXED = make(
    num_hidden_layers=3, windows=WINDOWS, rope=YARN, initializer_range=0.3, head_dim=16
)
ALL = changed(MIXED, windows=(5, 5, 3))
LENGTH, ROWS = 24, 3
STARTS = np.array([1, 4, 9], np.int32)  # before, at and past the windows' ends
TOKENS = np.asarray(tokens_of(MIXED, ROWS, LENGTH))
run = jax.jit(forward, static_argnames=("config", "capacity"))


@pytest.fixture(scope="module")
def params() -> Tree:
    return init_params(jax.random.key(0), MIXED)


@pytest.fixture(scope="module")
def full(params: Tree) -> np.ndarray:
    return np.asarray(run(params, TOKENS, config=MIXED)[0])


def prefilled(params: Tree, config: LlamaConfig, capacity: int = LENGTH) -> KVCache:
    first = TOKENS[:, : STARTS.max()]
    given: dict[str, Any] = {"lengths": STARTS, "capacity": capacity}
    return run(params, first, config=config, **given)[1]


def next_tokens(at: np.ndarray, count: int) -> np.ndarray:
    """Each row's tokens from its own place on; past the text, its last one."""
    where = np.minimum(at[:, None] + np.arange(count), LENGTH - 1)
    return np.take_along_axis(TOKENS, where, axis=1)


def test_decode_is_a_full_pass_at_every_length(params: Tree, full: np.ndarray) -> None:
    """Ragged rows, one after 1 token, all far past every window."""
    cache, at = prefilled(params, MIXED), STARTS.copy()
    assert [k.shape[1] for k in cache.keys] == [5, LENGTH, 3]
    assert [v.shape[1] for v in cache.values] == [5, LENGTH, 3]
    assert cache.capacity == LENGTH
    while at.max() < LENGTH:
        logits, cache = run(params, next_tokens(at, 1), cache=cache, config=MIXED)
        close(logits[:, 0], full[np.arange(ROWS), at], 1e-5)
        at += 1
    assert [k.shape[1] for k in cache.keys] == [5, LENGTH, 3]


@pytest.mark.parametrize("size", [1, 4, 11])
def test_chunks_are_a_full_pass(params: Tree, full: np.ndarray, size: int) -> None:
    """Below, at and above the windows; rows end within chunks, and then stay."""
    ends = np.array([LENGTH, LENGTH - 7, LENGTH - 1])
    cache, at = prefilled(params, MIXED), STARTS.copy()
    while (at < ends).any():
        counts = np.clip(ends - at, 0, size).astype(np.int32)
        tokens = next_tokens(at, size)
        given: dict[str, Any] = {"cache": cache, "lengths": counts}
        logits, cache = run(params, tokens, config=MIXED, **given)
        for row, (start, count) in enumerate(zip(at, counts, strict=True)):
            if count:
                close(logits[row, :count], full[row, start : start + count])
        at += counts
        assert cache.lengths.tolist() == at.tolist()
    assert at.tolist() == ends.tolist()


def test_padding_between_chunks_changes_nothing(params: Tree) -> None:
    """A row without a token keeps its slots to the bit, whatever the others do."""
    before = prefilled(params, MIXED)
    counts = np.array([0, 3, 1], np.int32)
    _, after = run(
        params, next_tokens(STARTS, 3), cache=before, lengths=counts, config=MIXED
    )
    for old, new, window in zip(before.keys, after.keys, WINDOWS, strict=True):
        if window is not None:
            assert np.array_equal(old[0], new[0])
            assert not np.array_equal(old[1], new[1])


def test_memory_is_bounded_by_the_windows(params: Tree) -> None:
    """Nothing overflows where every layer has one; one full layer still does."""
    for config, want in ((ALL, [5, 5, 3]), (MIXED, [5, 10, 3])):
        cache = prefilled(params, config, capacity=10)
        empty = KVCache.empty(config, ROWS, 10, jnp.float32)
        for given in (cache, empty):
            assert [k.shape[1] for k in given.keys] == want
        for _ in range(4):
            logits, cache = run(params, TOKENS[:, :1], cache=cache, config=config)
        overflows = np.isnan(np.asarray(logits)).any(axis=(1, 2))
        assert overflows.tolist() == [False, False, config is MIXED]


def test_a_window_as_long_as_the_text_is_none(params: Tree, full: np.ndarray) -> None:
    """The same programs and the same cache as without it."""
    wide = changed(MIXED, windows=(LENGTH, None, LENGTH + 1))
    plain = changed(MIXED, windows=None)
    shapes = partial(jax.eval_shape, partial(forward, config=wide, capacity=LENGTH))
    cache = shapes(params, TOKENS)[1]
    assert {k.shape[1] for k in cache.keys} == {LENGTH}
    got = run(params, TOKENS, config=wide)[0]
    want = run(params, TOKENS, config=plain)[0]
    assert np.array_equal(got, want) and np.abs(got - full).max() > 0.01
    short = run(params, TOKENS[:, :3], config=MIXED)[0]
    close(short, full[:, :3])


def test_packed_sequences_see_their_own_window(params: Tree, full: np.ndarray) -> None:
    packed = np.concatenate([TOKENS[0], TOKENS[1, :9]])[None]
    segments = np.repeat([0, 1], [LENGTH, 9]).astype(np.int32)[None]
    got = np.asarray(run(params, packed, config=MIXED, segment_ids=segments)[0])[0]
    close(got[:LENGTH], full[0])
    close(got[LENGTH:], full[1, :9])


def test_a_long_chunk_goes_block_by_block(
    params: Tree, full: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 4)
    config = changed(MIXED, bos_token_id=7)  # traced anew, with these blocks
    cache = prefilled(params, config)
    logits, _ = run(params, next_tokens(STARTS, 13), cache=cache, config=config)
    for row, start in enumerate(STARTS):
        close(logits[row], full[row, start : start + 13])


def test_gradients_are_traced_with_remat(params: Tree) -> None:
    """A layer's window stays static under jax.checkpoint."""

    def loss(params: Tree) -> jax.Array:
        return jnp.sum(hidden_states(params, TOKENS, config=MIXED, remat=True)[0])

    shapes = jax.eval_shape(jax.grad(loss), params)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)


BAD: dict[str, Any] = {
    "short": ((5,), "windows is .5,., want 3 of null"),
    "zero": ((0, 1, None), "windows is .0, 1, None., want"),
    "none": ((None, None, None), "not all null; or null"),
    "list": ([5, 5, 5], "windows is .5, 5, 5., want"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_windows(name: str) -> None:
    windows, message = BAD[name]
    with pytest.raises(JropeError, match=message):
        changed(MIXED, windows=windows)


def test_growing_lengths_have_no_window() -> None:
    method = DynamicNTK(factor=2, original_length=8)
    rope = Rope(theta=1e4, rotary_dim=16, scaling=method, lengths="growing")
    with pytest.raises(JropeError, match="lengths is 'growing', want 'planned' or"):
        changed(MIXED, rope=rope)
