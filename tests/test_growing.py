"""Lengths that grow, and transformers' memory of them: against oracles, row by row."""

import dataclasses
import inspect
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from conftest import TinyHF, make_tiny_hf
from transformers import DynamicCache, LlamaForCausalLM

from jrope.errors import JropeError
from jrope.generation.run import generate, stream
from jrope.hf import config_from_hf
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.llama import forward
from jrope.model.scores import score
from jrope.model.with_rope import with_rope
from jrope.parity.report import Error
from jrope.rope import LongRope, Rope
from jrope.tree import nest

TRAINED, PAIRS, TIME = 12, 8, 40
SHORT = tuple(1 + 0.1 * r for r in range(PAIRS))
LONG = tuple(2 + 0.7 * r for r in range(PAIRS))
FACTORS = {"short_factor": list(SHORT), "long_factor": list(LONG), "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": TRAINED}
# In transformers' words, for it and for the oracle
WORDS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic-yarn": {"rope_type": "dynamic-yarn", **ORIGINAL},
    "longrope": {"rope_type": "longrope", **FACTORS, **ORIGINAL},
}
each_method = pytest.mark.parametrize("name", WORDS)
each_hf_method = pytest.mark.parametrize("name", ["dynamic", "longrope"])
run = jax.jit(forward, static_argnames=("config", "capacity", "logits"))

Model = tuple[TinyHF, dict[str, Any], LlamaConfig]


@cache
def model(name: str, rule: Any = "growing", layers: int = 1, **rope: Any) -> Model:
    """The transformers model, our parameters, our configuration."""
    known = {} if name == "dynamic-yarn" else WORDS[name]
    tiny = make_tiny_hf(
        rope_parameters=known, layers=layers, max_position_embeddings=TRAINED
    )
    torch.set_num_threads(1)
    config = config_from_hf(tiny.config)
    config = with_rope(config, name if name == "dynamic-yarn" else None, lengths=rule)
    config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, **rope))
    params = nest({name: jnp.asarray(x) for name, x in tiny.weights.items()})
    return tiny, params, config


def tokens_of(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, shape, np.int32))


def close(got: Any, want: Any, tolerance: float = 5e-6) -> None:
    """The largest difference is a small part of the largest number."""
    assert Error.of(np.asarray(got), np.asarray(want)).of_max <= tolerance


def steps(params: Any, config: LlamaConfig, tokens: jax.Array, first: int) -> Any:
    """A prompt, then token by token: all logits [B, T, V]."""
    logits, cache = run(params, tokens[:, :first], config=config, capacity=TIME)
    parts = [logits]
    for at in range(first, tokens.shape[1]):
        logits, cache = run(params, tokens[:, at : at + 1], cache=cache, config=config)
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)


# Growing: what it computes

VARIANTS: dict[str, dict[str, Any]] = {
    "accurate": {"precision": "accurate"},
    "interleaved": {"layout": "interleaved"},
    "condensed": {"condense": 2.5},
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, "parity") for name in WORDS), *(("dynamic-yarn", v) for v in VARIANTS)],
)
def test_equals_the_definition(name: str, variant: str) -> None:
    """Every query with its own frequencies, in float64 from the papers."""
    tiny, params, config = model(name, layers=2, **VARIANTS.get(variant, {}))

    def growing(length: int) -> reference.Frequencies:
        words = {"rope_theta": 10000.0, **WORDS[name]}
        f, scaling = reference.from_hf(words, TRAINED, 2 * PAIRS, length)
        return f / np.longdouble(config.rope.condense), scaling

    tokens = tokens_of(2, TIME)
    want = reference.forward(
        tiny.weights,
        np.asarray(tokens),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        frequencies=growing,
        eps=config.rms_norm_eps,
        layout=config.rope.layout,
    ).logits
    close(run(params, tokens, config=config)[0], want, 1e-5)


@each_hf_method
def test_one_layer_equals_transformers_at_every_length(name: str) -> None:
    """Keys of the first layer do not depend on the length, so a fresh pass over n
    tokens ends in the same logits; in a deeper layer they do, and it does not.
    """
    tokens = tokens_of(1, TIME)
    for layers, same in ((1, True), (2, False)):
        tiny, params, config = model(name, layers=layers)
        got = run(params, tokens, config=config)[0]
        want = np.stack([fresh_pass(tiny, tokens[:, :n]) for n in range(1, TIME + 1)])
        error = np.abs(np.asarray(got[0]) - want).max(axis=1) / np.abs(want).max()
        assert error[:TRAINED].max() <= 5e-6
        assert (error[TRAINED:].max() <= 5e-6) == same
        assert same or error[TRAINED:].max() > 1e-3


def fresh_pass(tiny: TinyHF, tokens: jax.Array) -> np.ndarray:
    """Last logits [V] of a module without memory."""
    forget(tiny)
    return tiny.model(torch.from_numpy(np.array(tokens))).logits[0, -1].numpy()


def forget(tiny: TinyHF) -> None:
    """Back to what the module was when it was made."""
    rotary = tiny.model.model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq.clone()
    rotary.max_seq_len_cached = TRAINED


@each_method
def test_differs_from_the_plan(name: str) -> None:
    """Up to the trained length only by what is planned to come; past it at once."""
    _, params, config = model(name, layers=2)
    tokens = tokens_of(1, TIME)
    planned = with_rope(config, lengths="planned")
    grown = run(params, tokens, config=config)[0]
    far = run(params, tokens, config=planned)[0]
    assert np.abs(np.asarray(grown - far))[0, 1:].max(axis=-1).min() > 1e-3
    short = run(params, tokens[:, :TRAINED], config=planned)[0]
    close(grown[:, :TRAINED], short, 2e-6)


# Growing: however the text is cut


@each_method
@pytest.mark.parametrize("first", [7, 20])
def test_steps_equal_a_fresh_pass(name: str, first: int) -> None:
    _, params, config = model(name, layers=2)
    tokens = tokens_of(1, TIME)
    got = steps(params, config, tokens, first)
    close(got, run(params, tokens, config=config)[0], 2e-6)


@each_method
@pytest.mark.parametrize("length", [TRAINED, TRAINED + 1])
def test_a_pass_does_not_see_what_comes(name: str, length: int) -> None:
    _, params, config = model(name)
    tokens = tokens_of(1, TIME)
    whole = run(params, tokens, config=config)[0]
    part = run(params, tokens[:, :length], config=config)[0]
    close(part, whole[:, :length], 2e-6)


@pytest.mark.parametrize("name", ["dynamic-yarn", "longrope"])
def test_ragged_rows_equal_single_runs(name: str) -> None:
    """Prompts below, at and past the trained length, side by side, then 14 steps."""
    _, params, config = model(name)
    lengths, new = np.array([26, TRAINED, 3]), 14
    tokens = tokens_of(3, TIME)
    prompt = jnp.where(jnp.arange(26)[None] < lengths[:, None], tokens[:, :26], 7)
    logits, cache = run(params, prompt, config=config, lengths=lengths, capacity=TIME)
    rows = [[*row[:n]] for row, n in zip(logits, lengths, strict=True)]
    for step in range(new):
        ids = jnp.take_along_axis(tokens, jnp.asarray(lengths + step)[:, None], axis=1)
        logits, cache = run(params, ids, cache=cache, config=config)
        for row, more in zip(rows, logits, strict=True):
            row.append(more[0])
    for i, row in enumerate(rows):
        alone = run(params, tokens[i : i + 1], config=config)[0][0]
        close(jnp.stack(row), alone[: len(row)], 2e-6)


@pytest.mark.parametrize(
    ("name", "size"), [("dynamic", 1), ("dynamic-yarn", 7), ("longrope", 7)]
)
def test_chunks_equal_the_whole(name: str, size: int) -> None:
    """Pieces that straddle the trained length, ragged rows, rows that have ended."""
    _, params, config = model(name)
    lengths, tokens = np.array([42, 21, 3]), tokens_of(3, 42)
    want = run(params, tokens, config=config, lengths=lengths)[0]
    cache, parts = KVCache.empty(config, 3, 42, "float32"), []
    for at in range(0, 42, size):
        part = tokens[:, at : at + size]
        valid = np.clip(lengths - at, 0, part.shape[1])
        logits, cache = run(params, part, cache=cache, config=config, lengths=valid)
        parts.append(logits)
    got = jnp.concatenate(parts, axis=1)
    for row, right, length in zip(got, want, lengths, strict=True):
        close(row[:length], right[:length], 2e-6)


def test_blocks_equal_the_whole() -> None:
    """longrope past 512 queries: attention in blocks, on either side of a cut."""
    _, params, config = model("longrope")
    rope = dataclasses.replace(config.rope.scaling, original_length=560)
    config = with_rope(config, rope)
    tokens = tokens_of(1, 1100)
    want = run(params, tokens, config=config)[0]
    first, cache = run(params, tokens[:, :540], config=config, capacity=1100)
    second, _ = run(params, tokens[:, 540:], cache=cache, config=config)
    close(jnp.concatenate([first, second], axis=1), want, 2e-6)


def test_generate_is_a_fresh_pass_for_each_token() -> None:
    """Greedy, ragged, whole; and streamed after a prompt in pieces."""
    _, params, config = model("dynamic-yarn")
    lengths = np.array([18, 5])
    prompt, new = tokens_of(2, 18), 14
    out = generate(
        params,
        prompt,
        lengths,
        config=config,
        max_new_tokens=new,
        stop_ids=(),
    )
    again = {"prefill_chunk": 8, "max_new_tokens": new, "stop_ids": ()}
    pieces = stream(params, prompt, lengths, config=config, **again)  # type: ignore
    np.testing.assert_array_equal(np.concatenate([*pieces], axis=1), out.tokens)
    for row, length, made in zip(prompt, lengths, out.tokens, strict=True):
        text = jnp.concatenate([row[:length], made, row[length:]])[None]
        logits = run(params, text, config=config)[0][0, length - 1 :][:new]
        np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), made)


# Growing: other arithmetic


def test_in_bfloat16_steps_are_near_the_truth() -> None:
    """Not further than the planned rule from its own."""
    _, params, config = model("dynamic")
    tokens = tokens_of(1, TIME)
    small = jax.tree.map(lambda w: w.astype("bfloat16"), params)

    def off(rule: Any) -> float:
        ruled = with_rope(config, lengths=rule)
        truth = run(params, tokens, config=ruled)[0]
        got = run(small, tokens, config=ruled)[0]
        return float(jnp.sqrt(jnp.mean((got - truth) ** 2)))

    assert off("growing") <= 1.3 * off("planned")
    whole = run(small, tokens, config=config)[0]
    close(steps(small, config, tokens, 20), whole, 0.03)


@pytest.mark.parametrize("name", ["dynamic-yarn"])
def test_gradients_are_those_of_the_differences(name: str) -> None:
    _, params, config = model(name)
    tokens = tokens_of(1, 20)

    @jax.jit
    @jax.value_and_grad
    def loss(weight: jax.Array) -> jax.Array:
        layer = params["model"]["layers"]["0"]
        block = layer["self_attn"] | {"k_proj": {"weight": weight}}
        layers = {"0": layer | {"self_attn": block}}
        changed = params | {"model": params["model"] | {"layers": layers}}
        return -jnp.mean(score(changed, tokens, config=config))

    weight = params["model"]["layers"]["0"]["self_attn"]["k_proj"]["weight"]
    _, slope = loss(weight)
    way = slope / jnp.linalg.norm(slope)
    rise = loss(weight + 1e-2 * way)[0] - loss(weight - 1e-2 * way)[0]
    assert float(rise) / 2e-2 == pytest.approx(float(jnp.vdot(slope, way)), rel=2e-2)


def test_a_step_compiles_once_for_all_lengths() -> None:
    _, params, config = model("dynamic")
    tokens = tokens_of(1, TIME)
    _, cache = run(params, tokens[:, :5], config=config, capacity=TIME)
    one = jax.jit(partial(forward, config=config))
    for at in range(5, 15):
        _, cache = one(params, tokens[:, at : at + 1], cache=cache)
    assert one._cache_size() == 1  # type: ignore


def test_positions_are_refused() -> None:
    _, params, config = model("dynamic")
    places = jnp.arange(4, dtype=jnp.int32)[None]
    with pytest.raises(JropeError, match="positions: growing lengths take none"):
        forward(params, tokens_of(1, 4), places, config=config)


def test_a_row_that_overflows_is_nan_alone() -> None:
    _, params, config = model("dynamic")
    tokens, lengths = tokens_of(2, 16), jnp.array([16, 9])
    _, cache = run(params, tokens, config=config, lengths=lengths, capacity=16)
    logits, _ = run(params, tokens[:, :1], cache=cache, config=config)
    assert np.isnan(np.asarray(logits[0])).all()
    row = jnp.concatenate([tokens[1:, :9], tokens[1:, :1]], axis=1)
    close(logits[1], run(params, row, config=config)[0][0, -1:], 2e-6)


def test_planned_lengths_are_not_read() -> None:
    """A row's plan, which `generate` hands on, must not count."""
    _, params, config = model("dynamic")
    tokens = tokens_of(1, 20)
    got = run(params, tokens, config=config, rope_lengths=500)[0]
    np.testing.assert_array_equal(got, run(params, tokens, config=config)[0])


# transformers' memory

# its name for a cache: "cache" from 5.24 on, where the old one warns
TAKEN = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in TAKEN else "past_key_values"


@each_hf_method
def test_hf_steps_equal_transformers_with_a_cache(name: str) -> None:
    """Past the trained length, where this is not what a fresh pass gives."""
    tiny, params, config = model(name, "hf", layers=2)
    tokens = tokens_of(1, TIME)
    forget(tiny)
    want, past = [], DynamicCache()
    for at in [slice(0, 7), *(slice(i, i + 1) for i in range(7, TIME))]:
        part = torch.from_numpy(np.array(tokens[:, at]))
        want.append(tiny.model(part, **{CACHE: past}).logits.numpy())
    got = steps(params, config, tokens, 7)
    close(got, np.concatenate(want, axis=1), 5e-6)
    whole = run(params, tokens, config=config)[0]
    assert np.abs(np.asarray(got - whole))[:, TRAINED:].max() > 0.1


@each_hf_method
def test_hf_batch_mates_count_as_in_transformers(name: str) -> None:
    """Row 0 stays short; its neighbour decides its frequencies, there and here."""
    tiny, params, config = model(name, "hf")
    lengths, new = np.array([4, 22]), 10
    tokens = tokens_of(2, 22 + new)  # what follows a prompt is padding at first
    forget(tiny)
    pad = (22 - lengths)[:, None]  # transformers pads on the left
    left = np.arange(22)[None] - pad
    ids = np.take_along_axis(np.asarray(tokens), np.maximum(left, 0), axis=1)
    mask, past = torch.from_numpy((left >= 0).astype(np.int64)), DynamicCache()
    places = torch.from_numpy(np.maximum(left, 0))
    room = {"lengths": lengths, "capacity": 22 + new}
    logits, cache = run(params, tokens[:, :30], config=config, **room)
    got = [np.stack([logits[0, 3], logits[1, 21]])]
    feed = partial(tiny.model, **{CACHE: past})
    want = [feed(torch.from_numpy(ids), attention_mask=mask, position_ids=places)]
    for step in range(new):
        at = (lengths + step)[:, None]
        new_ids = np.take_along_axis(np.array(tokens), at, axis=1)
        logits, cache = run(params, jnp.asarray(new_ids), cache=cache, config=config)
        got.append(np.asarray(logits[:, 0]))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        more = feed(
            torch.from_numpy(new_ids),
            attention_mask=mask,
            position_ids=torch.from_numpy(at),
        )
        want.append(more)
    close(np.stack(got), np.stack([x.logits[:, -1].numpy() for x in want]), 5e-6)
    alone = steps(params, config, tokens[:1, : 4 + new], 4)[0, 3:]
    assert np.abs(np.stack(got)[:, 0] - alone).max() > 1e-3


@each_hf_method
@pytest.mark.parametrize("last", [TRAINED - 1, TRAINED, TRAINED + 1, 50])
def test_hf_memory_is_reset_as_in_transformers(name: str, last: int) -> None:
    """One pass at 40 positions, then one up to length `last`, on its cache."""
    tiny, params, config = model(name, "hf")
    tokens = tokens_of(1, TIME + 4)
    places = np.concatenate([np.arange(TIME), last - 4 + np.arange(4)])[None]
    forget(tiny)
    past, cache, want, got = DynamicCache(), None, [], []
    for at in (slice(0, TIME), slice(TIME, None)):
        ids, where = np.array(tokens[:, at]), places[:, at]
        more = tiny.model(
            torch.from_numpy(ids),
            **{CACHE: past},
            position_ids=torch.from_numpy(where),
        )
        want.append(more.logits.numpy())
        room = {} if cache else {"capacity": TIME + 4}
        logits, cache = run(
            params,
            tokens[:, at],
            jnp.asarray(where, jnp.int32),
            cache,
            config=config,
            **room,
        )
        got.append(logits)
    if name == "dynamic" and cache is not None:
        memory = int(tiny.model.model.rotary_emb.max_seq_len_cached)
        assert cache.rope_lengths.tolist() == [memory]
        assert memory == (TRAINED if last < TRAINED else max(TIME, last))
    close(np.concatenate(got, axis=1), np.concatenate(want, axis=1), 5e-6)


def test_hf_memory_of_an_empty_cache_is_the_trained_length() -> None:
    _, params, config = model("dynamic", "hf")
    empty = KVCache.empty(config, 2, TIME, "float32")
    assert empty.rope_lengths.tolist() == [TRAINED] * 2
    tokens = tokens_of(2, 20)
    got = run(params, tokens, cache=empty, config=config)[0]
    close(got, run(params, tokens, config=config, rope_lengths=99)[0], 2e-6)


def test_with_rope_sets_the_rule_with_the_method() -> None:
    plain = Rope(theta=10000.0, rotary_dim=16)
    plain = dataclasses.replace(model("dynamic")[2], rope=plain)
    config = with_rope(plain, "dynamic", factor=2.0, lengths="growing")
    assert config.rope.lengths == "growing" and config.rope.needs_length
    assert with_rope(config, lengths="planned").rope.lengths == "planned"
    method = LongRope(**FACTORS, original_length=TRAINED)
    assert with_rope(config, method).rope.lengths == "planned"
    assert with_rope(config, method, lengths="growing").rope.lengths == "growing"
    assert with_rope(config, "linear", factor=2.0).rope.lengths == "planned"
    with pytest.raises(JropeError, match="lengths: got 'growing', want 'planned'"):
        with_rope(config, "linear", factor=2.0, lengths="growing")
