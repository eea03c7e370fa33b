"""The model as a function: every architecture, cache, transformation and misuse."""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jrope.layers
from jrope.activations import ACTIVATIONS
from jrope.cache import KVCache
from jrope.config import LlamaConfig, flatten, nest, parameter_shapes, with_rope
from jrope.errors import JropeError
from jrope.generate import generate
from jrope.hf import config_from_hf
from jrope.model import Llama, count_parameters, forward, init_params
from jrope.parity import torch_stages
from jrope.parity_report import Error, stage
from jrope.rope import (
    ROPE_TYPES,
    DynamicNTK,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    NTKAware,
    Proportional,
    Rope,
    Yarn,
)


class Model(NamedTuple):
    """A tiny random model three times over."""

    torch: Any
    weights: dict[str, np.ndarray]
    params: Any
    config: LlamaConfig


@pytest.fixture(scope="module")
def make(tiny_hf: Any) -> Callable[..., Model]:
    """A tiny model of the shape asked for; `rope` replaces the rotary embedding."""

    import torch

    def build(rope: Rope | None = None, **shape: Any) -> Model:
        tiny = tiny_hf(**shape)
        torch.set_num_threads(1)  # two only wait for each other at this size
        config = config_from_hf(tiny.config)
        if rope is not None:
            config = dataclasses.replace(config, rope=rope)
        params = nest({name: jnp.asarray(w) for name, w in tiny.weights.items()})
        return Model(tiny.model, tiny.weights, params, config)

    return build


def tokens_of(config: LlamaConfig, *shape: int, seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, config.vocab_size, shape, np.int32))


def logits_of(model: Model, tokens: jax.Array, **given: Any) -> np.ndarray:
    given = {"config": model.config, **given}
    return np.asarray(forward(model.params, tokens, **given)[0])


def close(got: Any, want: Any, tolerance: float = 5e-6) -> None:
    """The largest difference is a small part of the largest number."""
    assert Error.of(np.asarray(got), np.asarray(want)).of_max <= tolerance


PLAIN = partial(Rope, theta=10000.0, rotary_dim=16)
METHODS = {
    "default": None,
    "linear": Linear(factor=2),
    "ntk": NTKAware(factor=2),
    "dynamic": DynamicNTK(factor=2, original_length=16),
    "yarn": Yarn(factor=4, original_length=16),
    "dynamic-yarn": DynamicYarn(original_length=16),
    "llama3": Llama3(
        factor=4, original_length=16, low_freq_factor=1, high_freq_factor=4
    ),
    "longrope": LongRope(
        short_factor=(1.0,) * 8, long_factor=(3.0,) * 8, original_length=16, factor=4
    ),
    "proportional": Proportional(partial_rotary_factor=0.5),
}
ROPES = {name: PLAIN(scaling=method) for name, method in METHODS.items()}
ROPES["condense"] = PLAIN(condense=2.5)
ROPES["partial"] = PLAIN(rotary_dim=8)
ROPES["interleaved"] = PLAIN(layout="interleaved")
ROPES["accurate"] = PLAIN(precision="accurate")
each_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def some_ropes(*names: str) -> Any:
    return pytest.mark.parametrize("rope", [ROPES[n] for n in names], ids=names)


SHAPES: dict[str, dict[str, Any]] = {
    "MHA": {"kv_heads": 4},
    "GQA": {"kv_heads": 2},
    "MQA": {"kv_heads": 1},
    "tied": {"tied": True},
    "both biases": {"bias": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "wide heads": {"head_dim": 24},
    "narrow heads": {"head_dim": 8, "kv_heads": 1},
    "one layer": {"layers": 1},
    "large eps": {"rms_norm_eps": 0.5},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def test_every_method_is_here() -> None:
    assert {*METHODS} == {"default", *ROPE_TYPES}


# What it computes


@each_shape
def test_equals_transformers(make: Any, shape: dict[str, Any]) -> None:
    model = make(**shape)
    tokens = tokens_of(model.config, 2, 12)
    steps = np.tile(np.arange(12), (2, 1))
    want = torch_stages(model.torch, np.asarray(tokens), steps)["logits"]
    close(logits_of(model, tokens), want)


@each_shape
def test_equals_the_papers(make: Any, shape: dict[str, Any]) -> None:
    model = make(**shape)
    tokens = tokens_of(model.config, 2, 12)
    close(logits_of(model, tokens), truth(model, tokens), 1e-5)


@each_rope
def test_every_method_equals_the_papers(make: Any, rope: Rope) -> None:
    model = make(rope=rope)
    tokens = tokens_of(model.config, 2, 40)
    close(logits_of(model, tokens), truth(model, tokens), 1e-5)


def truth(model: Model, tokens: jax.Array) -> np.ndarray:
    """Logits in float64, frequencies from jrope: their own tests hold them."""
    config, rope = model.config, model.config.rope
    frequencies, scaling = rope.frequencies(tokens.shape[1], np.float64)
    return reference.forward(
        model.weights,
        np.asarray(tokens),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        frequencies=np.asarray(frequencies) / rope.condense,
        scaling=scaling,
        eps=config.rms_norm_eps,
        activation=config.hidden_act,
        layout=rope.layout,
    ).logits


@pytest.mark.parametrize("shape", [{"bias": True}, {"head_dim": 24, "tied": True}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_is_as_good_as_torch(
    make: Any, shape: dict[str, Any], dtype: str
) -> None:
    import torch

    model = make(**shape)
    tokens = tokens_of(model.config, 4, 40)
    steps = np.tile(np.arange(40), (4, 1))
    params = jax.tree.map(lambda w: w.astype(dtype), model.params)
    got, cache = jax.jit(forward, static_argnames="config")(
        params, tokens, config=model.config
    )
    assert got.dtype == jnp.float32 and cache.keys[0].dtype == dtype
    kind = type(model.torch)
    narrow = kind(model.torch.config).eval().to(getattr(torch, dtype))
    narrow.load_state_dict(model.torch.state_dict())
    wide = kind(model.torch.config).eval()
    wide.load_state_dict(narrow.state_dict())
    theirs, want = (
        torch_stages(twin, np.asarray(tokens), steps)["logits"]
        for twin in (narrow, wide)
    )
    ratio = stage("logits", np.asarray(got), want, theirs).ratio
    assert ratio is not None and ratio <= 1.10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers(name: str, dtype: str) -> None:
    import torch
    from transformers.activations import ACT2FN

    x = np.concatenate([np.linspace(-12, 12, 1201), [-100, -0.0, 1e-6, 60000]])
    theirs = ACT2FN[name](torch.tensor(x, dtype=getattr(torch, dtype)))
    ours = ACTIVATIONS[name](jnp.asarray(x, dtype))
    assert ours.dtype == dtype
    got, want = np.asarray(ours, np.float64), theirs.double().numpy()
    np.testing.assert_allclose(got, want, **ACTIVATION_TOLERANCES[dtype])


# float32: cancellation in erf and tanh near their ends.  16 bits: one rounding here;
# torch rounds each step of those activations that transformers composes.
ACTIVATION_TOLERANCES = {
    "float32": {"rtol": 1e-6, "atol": 1e-6},
    "bfloat16": {"rtol": 2**-6, "atol": 2**-6},
    "float16": {"rtol": 2**-9, "atol": 2**-9},
}


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "quick_gelu"])
def test_model_uses_its_activation(make: Any, name: str) -> None:
    model = make(layers=1)
    config = dataclasses.replace(model.config, hidden_act=name)
    tokens = tokens_of(config, 1, 5)
    got = logits_of(model, tokens, config=config)
    close(got, truth(model._replace(config=config), tokens), 1e-5)


# No field that nobody reads


def changed(config: LlamaConfig, **fields: Any) -> LlamaConfig:
    return dataclasses.replace(config, **fields)


def is_read_by_forward(model: Model, other: LlamaConfig) -> None:
    tokens = tokens_of(model.config, 1, 40)
    plain = logits_of(model, tokens)
    try:
        got = logits_of(model, tokens, config=other)
    except (TypeError, ValueError, KeyError):
        return  # the weights do not fit
    assert got.shape != plain.shape or np.abs(got - plain).max() > 1e-4


def is_read_by_shapes(model: Model, other: LlamaConfig) -> None:
    assert parameter_shapes(other) != parameter_shapes(model.config)
    fresh = init_params(jax.random.key(0), other)
    shapes = {name: leaf.shape for name, leaf in flatten(fresh).items()}
    assert shapes == parameter_shapes(other)
    forward(fresh, jnp.zeros((1, 2), jnp.int32), config=other)


def is_read_by_init(model: Model, other: LlamaConfig) -> None:
    for config in (model.config, other):
        fresh = init_params(jax.random.key(0), config)
        spread = float(jnp.std(fresh["model"]["embed_tokens"]["weight"]))
        assert abs(spread / config.initializer_range - 1) < 0.1


def is_read_by_with_rope(model: Model, other: LlamaConfig) -> None:
    for config in (model.config, other):
        scaling: Any = with_rope(config, "yarn", factor=2.0).rope.scaling
        assert scaling.original_length == config.max_position_embeddings


def greedy(model: Model, config: LlamaConfig) -> Any:
    return generate(
        model.params, np.array([[1, 2, 3]]), config=config, max_new_tokens=4
    )


def is_read_by_generate_as_end(model: Model, other: LlamaConfig) -> None:
    plain = greedy(model, changed(model.config, eos_token_id=()))
    assert plain.lengths.tolist() == [4]
    second = int(plain.tokens[0, 1])
    ended = greedy(model, changed(other, eos_token_id=(60, second)))
    assert ended.lengths.tolist() == [2]
    assert ended.tokens[0].tolist() == [*plain.tokens[0, :2].tolist(), 0, 0]


def is_read_by_generate_as_padding(model: Model, other: LlamaConfig) -> None:
    first = int(greedy(model, model.config).tokens[0, 0])
    ended = greedy(model, changed(other, eos_token_id=(first,)))
    assert ended.tokens[0, 1:].tolist() == [other.pad_token_id] * 3


def is_read_by_request(model: Model, other: LlamaConfig) -> None:
    with pytest.raises(JropeError, match=f"bos_token_id .{other.bos_token_id}."):
        generate(model.params, np.array([[1]]), [0], config=other)


# field: another value, and who reads it
READERS: dict[str, tuple[Any, Callable[[Model, LlamaConfig], None]]] = {
    "vocab_size": (60, is_read_by_shapes),
    "hidden_size": (32, is_read_by_shapes),
    "intermediate_size": (80, is_read_by_shapes),
    "num_hidden_layers": (1, is_read_by_forward),
    "num_attention_heads": (2, is_read_by_shapes),
    "num_key_value_heads": (1, is_read_by_shapes),
    "head_dim": (20, is_read_by_forward),
    "max_position_embeddings": (128, is_read_by_with_rope),
    "rms_norm_eps": (0.1, is_read_by_forward),
    "hidden_act": ("gelu", is_read_by_forward),
    "attention_bias": (True, is_read_by_shapes),
    "mlp_bias": (True, is_read_by_shapes),
    "tie_word_embeddings": (True, is_read_by_forward),
    "initializer_range": (0.5, is_read_by_init),
    "rope": (PLAIN(theta=100.0), is_read_by_forward),
    "bos_token_id": (7, is_read_by_request),
    "eos_token_id": ((7,), is_read_by_generate_as_end),
    "pad_token_id": (7, is_read_by_generate_as_padding),
}


def test_every_field_has_a_reader() -> None:
    assert {*READERS} == {f.name for f in dataclasses.fields(LlamaConfig)}


@pytest.mark.parametrize("field", READERS)
def test_fields_are_read(make: Any, field: str) -> None:
    model = make()
    value, check = READERS[field]
    assert value != getattr(model.config, field)
    check(model, changed(model.config, **{field: value}))


ROPE_FIELDS: dict[str, Any] = {
    "theta": 500.0,
    "rotary_dim": 12,
    "scaling": Linear(factor=2),
    "condense": 2.0,
    "layout": "interleaved",
    "precision": "accurate",
}


def test_every_rope_field_has_another_value() -> None:
    """But `lengths`, which plain RoPE has no use for: tests/test_growing.py."""
    assert {*ROPE_FIELDS, "lengths"} == {f.name for f in dataclasses.fields(Rope)}


@pytest.mark.parametrize("field", ROPE_FIELDS)
def test_rope_fields_are_read(make: Any, field: str) -> None:
    model = make()
    rope = dataclasses.replace(model.config.rope, **{field: ROPE_FIELDS[field]})
    tokens = tokens_of(model.config, 1, 8)
    positions = jnp.arange(8, dtype=jnp.int32)[None] * 149_796 + 3  # up to 2**20
    plain = logits_of(model, tokens, positions=positions)
    config = changed(model.config, rope=rope)
    other = logits_of(model, tokens, positions=positions, config=config)
    assert np.abs(other - plain).max() > 1e-3


# Rows, chunks, cache


@some_ropes("default", "condense", "dynamic", "longrope")
def test_ragged_rows_equal_single_runs(make: Any, rope: Rope) -> None:
    model = make(rope=rope, layers=1)
    tokens, lengths = tokens_of(model.config, 3, 40), [40, 23, 1]
    rows = logits_of(model, tokens, lengths=jnp.array(lengths))
    for row, ids, length in zip(rows, tokens, lengths, strict=True):
        close(row[:length], logits_of(model, ids[None, :length])[0], 2e-6)


def test_last_logits(make: Any) -> None:
    model = make()
    tokens, lengths = tokens_of(model.config, 3, 9), jnp.array([9, 4, 1])
    every = logits_of(model, tokens, lengths=lengths)
    last = logits_of(model, tokens, lengths=lengths, logits="last")
    close(last, np.stack([every[0, 8], every[1, 3], every[2, 0]]), 2e-6)
    assert last.dtype == np.float32 and last.shape == (3, model.config.vocab_size)
    whole = logits_of(model, tokens)[:, -1]
    close(logits_of(model, tokens, logits="last"), whole, 2e-6)


@each_rope
def test_steps_equal_the_full_pass(make: Any, rope: Rope) -> None:
    """Prefill of ragged prompts, then token by token past the trained length."""
    model = make(rope=rope, layers=1)
    planned, starts = np.array([30, 24, 14]), np.array([20, 14, 4])
    tokens = tokens_of(model.config, 3, 30)
    want = logits_of(model, tokens, lengths=planned, rope_lengths=planned)
    prompt = jnp.where(jnp.arange(20)[None] < starts[:, None], tokens[:, :20], 0)
    run = partial(forward, model.params, config=model.config)
    got, cache = run(prompt, lengths=starts, rope_lengths=planned, capacity=30)
    for row, right, start in zip(got, want, starts, strict=True):
        close(row[:start], right[:start], 2e-6)
    for step in range(10):
        at = starts + step
        new = jnp.take_along_axis(tokens, jnp.asarray(at)[:, None], axis=1)
        got, cache = run(new, cache=cache)
        close(got[:, 0], want[np.arange(3), at], 3e-6)
    assert cache.lengths.tolist() == planned.tolist()
    assert cache.rope_lengths.tolist() == planned.tolist()


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("name", ["default", "dynamic"])
def test_chunks_equal_the_whole(make: Any, name: str, size: int) -> None:
    model = make(rope=ROPES[name], layers=1)
    lengths = np.array([32, 21, 3])
    tokens = tokens_of(model.config, 3, 32)
    want = logits_of(model, tokens, lengths=lengths, rope_lengths=lengths)
    cache = KVCache.empty(model.config, 3, 32, "float32", lengths)
    parts = []
    for at in range(0, 32, size):
        part = tokens[:, at : at + size]
        valid = np.clip(lengths - at, 0, part.shape[1])
        logits, cache = forward(
            model.params, part, cache=cache, config=model.config, lengths=valid
        )
        parts.append(np.asarray(logits))
    for row, right, length in zip(
        np.concatenate(parts, axis=1), want, lengths, strict=True
    ):
        close(row[:length], right[:length], 2e-6)


def test_long_chunks_equal_the_whole(make: Any) -> None:
    """Blockwise prefill, and its continuation with a past in blocks."""
    model = make(layers=1, heads=2, kv_heads=1, hidden_size=16, intermediate_size=16)
    tokens = tokens_of(model.config, 2, 1300)
    run = jax.jit(forward, static_argnames=("config", "capacity"))
    want, _ = run(model.params, tokens, config=model.config)
    first, cache = run(
        model.params, tokens[:, :640], config=model.config, capacity=1300
    )
    second, _ = run(model.params, tokens[:, 640:], cache=cache, config=model.config)
    close(jnp.concatenate([first, second], axis=1), want, 2e-6)


def test_positions_turn_and_do_not_order(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 2, 8)
    steps = jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1))
    plain = logits_of(model, tokens)
    close(logits_of(model, tokens, positions=steps), plain, 0)
    close(logits_of(model, tokens, positions=steps + 100), plain, 1e-5)  # relative
    assert np.abs(logits_of(model, tokens, positions=steps * 2) - plain).max() > 0.01
    back = logits_of(model, tokens, positions=steps[:, ::-1])
    close(back[:, 0], plain[:, 0], 2e-6)  # the first token sees itself alone


def test_length_that_the_frequencies_are_for(make: Any) -> None:
    """What is given, else the cache's, else capacity, else the row's own length."""
    model = make(rope=ROPES["dynamic"], layers=1)
    tokens = tokens_of(model.config, 2, 20)
    run = partial(forward, model.params, tokens, config=model.config)
    steps = jnp.tile(jnp.arange(20, dtype=jnp.int32), (2, 1))
    lengths = jnp.array([20, 18])
    told = {
        40: {"rope_lengths": 40, "capacity": 24},
        24: {"capacity": 24},
        20: {},
        520: {"positions": steps + 500},
    }
    outputs = []
    for length, given in told.items():
        logits, cache = run(**given)
        assert cache.rope_lengths.tolist() == [length, length]
        outputs.append(np.asarray(logits))
    assert all(np.abs(outputs[2] - y).max() > 1e-3 for y in outputs[:2])
    _, cache = run(lengths=lengths)
    assert cache.rope_lengths.tolist() == [20, 18] == cache.lengths.tolist()


# Misuse


def test_unknown_ids_spoil_their_row_alone(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 4, 6)
    plain = logits_of(model, tokens)
    size = model.config.vocab_size
    bad = tokens.at[0, 2].set(size).at[1, 3].set(-1).at[2, 0].set(2**31 - 1)
    got = logits_of(model, bad)
    assert np.isnan(got[0, 2:]).all() and np.isnan(got[1, 3:]).all()
    assert np.isnan(got[2]).all()
    np.testing.assert_array_equal(got[3], plain[3])


@pytest.mark.parametrize("count", [1, 4])
def test_rows_that_overflow_are_nan_alone(make: Any, count: int) -> None:
    model = make()
    tokens = tokens_of(model.config, 2, 8 + count)
    run = partial(forward, model.params, config=model.config)
    lengths = jnp.array([8, 3])
    _, cache = run(tokens[:, :8], lengths=lengths, capacity=8)
    got, cache = run(tokens[:, 8:], cache=cache)
    assert np.isnan(np.asarray(got[0])).all()
    assert cache.lengths.tolist() == [8 + count, 3 + count]
    row = jnp.concatenate([tokens[1:, :3], tokens[1:, 8:]], axis=1)
    close(got[1], run(row, rope_lengths=8)[0][0, 3:], 2e-6)
    again, _ = run(tokens[:, :1], cache=cache)
    assert np.isnan(np.asarray(again[0])).all()
    assert np.isfinite(np.asarray(again[1])).all()


def test_one_row_that_overflows_is_nan(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 1, 4)
    run = partial(forward, model.params, config=model.config)
    _, cache = run(tokens)
    for _ in range(2):
        got, cache = run(tokens[:, :1], cache=cache)
        assert np.isnan(np.asarray(got)).all()


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one axis": (np.zeros(3, np.int32), {}, r"got int32 \[3\], want integers"),
    "floats": (np.zeros((1, 3), np.float32), {}, r"got float32 \[1, 3\]"),
    "capacity": (np.zeros((1, 3), np.int32), {"capacity": 2}, "at least T = 3"),
}


@pytest.mark.parametrize(("tokens", "given", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments(
    make: Any, tokens: np.ndarray, given: dict[str, Any], message: str
) -> None:
    model = make()
    with pytest.raises(JropeError, match=message):
        forward(model.params, jnp.asarray(tokens), config=model.config, **given)


def test_one_capacity_only(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 1, 2)
    _, cache = forward(model.params, tokens, config=model.config, capacity=4)
    with pytest.raises(JropeError, match="capacity: the given cache already has one"):
        forward(model.params, tokens, cache=cache, config=model.config, capacity=4)


def test_positions_have_the_tokens_shape(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 2, 3)
    with pytest.raises((AssertionError, JropeError)):
        forward(model.params, tokens, jnp.arange(3)[None], config=model.config)


# Transformations


def loss_of(params: Any, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
    """Mean cross-entropy of the next token."""
    logits, _ = forward(params, tokens[:, :-1], config=config)
    scores = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))


@pytest.mark.parametrize("shape", [{"bias": True}, {"tied": True, "kv_heads": 1}])
def test_gradients_equal_torch(make: Any, shape: dict[str, Any]) -> None:
    import torch

    model = make(**shape)
    tokens = tokens_of(model.config, 2, 10)
    twin = copy.deepcopy(model.torch).requires_grad_(True)
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    logits = twin(ids[:, :-1], use_cache=False).logits
    flat = logits.reshape(-1, logits.shape[-1])
    torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1)).backward()
    grads = flatten(jax.grad(loss_of)(model.params, tokens, model.config))
    for name, tensor in twin.named_parameters():
        close(grads[name], tensor.grad.numpy(), 1e-5)
    assert len(grads) == len(dict(twin.named_parameters()))


@some_ropes("default", "partial", "interleaved", "accurate", "dynamic")
def test_gradients_are_finite(make: Any, rope: Rope) -> None:
    model = make(rope=rope, layers=1)
    tokens = tokens_of(model.config, 2, 40)
    grads = jax.grad(loss_of)(model.params, tokens, model.config)
    for name, leaf in flatten(grads).items():
        assert bool(jnp.isfinite(leaf).all()) and bool(jnp.any(leaf != 0)), name


def test_checkpointed_gradients_are_the_same(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 2, 10)
    plain = partial(loss_of, config=model.config)
    want = flatten(jax.grad(plain)(model.params, tokens))
    got = flatten(jax.grad(jax.checkpoint(plain))(model.params, tokens))
    for name, leaf in got.items():
        close(leaf, want[name], 2e-6)


def test_vmap_over_rows_and_over_models(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 3, 8)

    def one(params: Any, row: jax.Array) -> jax.Array:
        return forward(params, row[None], config=model.config)[0][0]

    want = logits_of(model, tokens)
    close(jax.vmap(one, (None, 0))(model.params, tokens), want, 2e-6)
    pair = jax.tree.map(lambda w: jnp.stack([w, w * 1.5]), model.params)
    both = jax.vmap(one, (0, None))(pair, tokens[0])
    close(both[0], want[0], 2e-6)
    scaled = model._replace(params=jax.tree.map(lambda w: w * 1.5, model.params))
    close(both[1], logits_of(scaled, tokens[:1])[0], 2e-6)


def test_vmap_over_decode_steps(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 3, 7)
    run = partial(forward, model.params, config=model.config)
    _, cache = run(tokens[:, :6], capacity=8)
    want, _ = run(tokens[:, 6:], cache=cache)

    def one(row: jax.Array, cache: KVCache) -> jax.Array:
        cache = jax.tree.map(lambda x: x[None], cache)
        return run(row[None], cache=cache)[0][0]

    close(jax.vmap(one)(tokens[:, 6:], cache), want, 2e-6)


LLAMA_405B = LlamaConfig(
    vocab_size=128256,
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    initializer_range=0.02,
    rope=Rope(
        theta=500000.0,
        rotary_dim=128,
        scaling=Llama3(
            factor=8, original_length=8192, low_freq_factor=1, high_freq_factor=4
        ),
    ),
    bos_token_id=128000,
    eos_token_id=(128001,),
    pad_token_id=None,
)


def test_405b_is_checked_without_arrays() -> None:
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = partial(init_params, config=LLAMA_405B, dtype=jnp.bfloat16)
    params = jax.eval_shape(init, key)
    assert count_parameters(params) == 405_853_388_800
    tokens = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    run = partial(forward, config=LLAMA_405B, capacity=8192)
    logits, cache = jax.eval_shape(run, params, tokens)
    assert (logits.shape, logits.dtype) == ((2, 4096, 128256), jnp.float32)
    assert cache.keys[125].shape == (2, 8192, 8, 128)
    assert cache.keys[0].dtype == jnp.bfloat16


def test_a_layer_is_traced_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(layers=6)
    calls = []
    original = jrope.layers.attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(jrope.layers, "attention", counted)
    config = changed(model.config, rms_norm_eps=1.25e-5)  # nothing traced so far
    run = jax.jit(partial(forward, config=config))
    tokens = tokens_of(config, 2, 5)
    run(model.params, tokens)
    assert len(calls) == 1
    run(model.params, tokens + 1 - 1)
    assert len(calls) == 1


# The Flax module


@pytest.mark.parametrize("tied", [False, True])
def test_module_owns_the_same_tree(make: Any, tied: bool) -> None:
    model = make(tied=tied)
    tokens = tokens_of(model.config, 2, 5)
    module = Llama(model.config)
    variables = module.init(jax.random.key(0), tokens)
    assert {*variables} == {"params"}
    shapes = {name: w.shape for name, w in flatten(variables["params"]).items()}
    assert shapes == parameter_shapes(model.config)
    assert shapes == {name: w.shape for name, w in model.weights.items()}
    logits, cache = module.apply({"params": model.params}, tokens, capacity=9)
    want, other = forward(model.params, tokens, config=model.config, capacity=9)
    np.testing.assert_array_equal(logits, want)
    for ours, right in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, right)


def test_module_has_a_dtype(make: Any) -> None:
    model = make()
    module = Llama(model.config, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


def test_fresh_weights(make: Any) -> None:
    config = changed(make(bias=True).config, initializer_range=0.3)
    fresh = flatten(init_params(jax.random.key(1), config))
    again = flatten(init_params(jax.random.key(1), config))
    for name, weight in fresh.items():
        np.testing.assert_array_equal(weight, again[name])
        if name.endswith("bias"):
            assert not weight.any()
        elif weight.ndim == 1:
            assert bool((weight == 1).all())
        else:
            assert abs(float(jnp.std(weight)) - 0.3) < 0.03
            assert abs(float(jnp.mean(weight))) < 0.03
    layers = [fresh[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)]
    assert not bool((layers[0] == layers[1]).all())
    narrow = init_params(jax.random.key(1), config, jnp.bfloat16)
    assert narrow["model"]["norm"]["weight"].dtype == jnp.bfloat16
