"""The model under JAX's transformations: gradients, vmap, shapes without arrays."""

import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import changed, close, logits_of, some_ropes, tokens_of
from model_helpers import make as make

from jrope.model import llama
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.layers import attention, decoder_layer, mlp
from jrope.model.llama import count_parameters, forward, hidden_states, init_params
from jrope.model.placed import shard
from jrope.rope import Llama3, Rope
from jrope.sharding.meshes import mesh
from jrope.tree import flatten, nest


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

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return attention(*args, **kwargs)

    layer = partial(decoder_layer, attention=counted)
    monkeypatch.setattr(llama, "decoder_layer", layer)
    config = changed(model.config, rms_norm_eps=1.25e-5)  # nothing traced so far
    run = jax.jit(partial(forward, config=config))
    tokens = tokens_of(config, 2, 5)
    run(model.params, tokens)
    assert len(calls) == 1
    run(model.params, tokens + 1 - 1)
    assert len(calls) == 1


def doubled(weights: Any, x: jax.Array, *, config: LlamaConfig, axes: Any) -> jax.Array:
    """Another MLP: twice the plain one, where a layer says so."""
    y = mlp(weights, x, config=config, axes=axes)
    return y + y if "twice" in weights["mlp"] else y


@pytest.mark.parametrize("way", ["plain", "remat", "mesh"])
def test_another_mlp_in_chosen_layers(make: Any, way: str) -> None:
    """To the bit that of a layer whose down projection is twice as large."""
    model = make()
    tokens, config = tokens_of(model.config, 2, 5), model.config
    marked, scaled = flatten(model.params), flatten(model.params)
    marked["model.layers.1.mlp.twice.weight"] = jnp.zeros(1)
    scaled["model.layers.1.mlp.down_proj.weight"] *= 2
    trees = nest(marked), nest(scaled), model.params
    if way == "mesh":
        trees = tuple(shard(tree, mesh("data=1"), config) for tree in trees)
    run = partial(hidden_states, tokens=tokens, config=config, remat=way == "remat")
    got, (want, plain) = run(trees[0], mlp=doubled)[0], (run(t)[0] for t in trees[1:])
    np.testing.assert_array_equal(got, want)
    assert bool(jnp.any(got != plain))
