"""Turns that are taken, and the structure that speed rests on.

Nothing here is timed against a limit: machines are busy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import prefill_temp, tiny, zeros

from jrope.bench import runs as bench_runs
from jrope.bench import versus as bench_versus
from jrope.bench.model import (
    Weights,
    cache_bytes,
    named_shape,
    random_params,
    with_layers,
)
from jrope.bench.runs import Decode, in_turns
from jrope.errors import JropeError
from jrope.generation.loop import decode, prefill
from jrope.generation.run import generate
from jrope.generation.sample import Sampler


def middling(dtype, layers=4):
    """Weights of 7 MB or more a layer beside activations of kilobytes; and params."""
    config = dataclasses.replace(
        with_layers(named_shape("smollm2-135m"), layers), vocab_size=8192
    )
    return config, zeros(lambda: random_params(config, dtype))


# taking turns


def test_turns_are_taken_and_the_first_is_not_counted():
    order, clock = [], iter(range(100))

    def runner(name):
        def run():
            order.append(name)
            return float(next(clock))

        return run

    times, problems = in_turns({"a": runner("a"), "b": runner("b")}, 2, 60)
    assert order == ["a", "b"] * 3
    assert times == {"a": [2.0, 4.0], "b": [3.0, 5.0]}
    assert problems == {}


def test_compiled_peers_warm_up_longer():
    calls = []
    runners = {bench_versus.COMPILED: lambda: calls.append(1) or 1.0}
    times, _ = in_turns(runners, 2, 60)
    assert len(calls) == 5
    assert len(times[bench_versus.COMPILED]) == 2


def test_who_fails_is_out_and_the_rest_goes_on():
    calls = []

    def failing():
        calls.append(1)
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 GB")

    times, problems = in_turns({"a": failing, "b": lambda: 1.0}, 3, 60)
    assert times == {"b": [1.0] * 3}
    assert len(calls) == 1
    assert problems["a"].startswith("out of memory: ")
    assert "\n" not in problems["a"]


def test_patience_ends_after_one_round():
    times, _ = in_turns({"a": lambda: 1.0}, 50, 0.0)
    assert len(times["a"]) == 1


def test_what_does_not_fit_says_the_numbers(monkeypatch):
    monkeypatch.setattr(bench_runs, "memory_limit", lambda: 10**9)
    bench_runs.check_fits(10**9, "x")
    with pytest.raises(JropeError, match=r"takes 2\.50 GB, the device has 1\.00"):
        bench_runs.check_fits(2_500_000_000, "the program takes")
    monkeypatch.setattr(bench_runs, "memory_limit", lambda: None)
    bench_runs.check_fits(10**18, "x")


# the structure that speed rests on


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order, batch", [("out_in", 1), ("out_in", 2), ("in_out", 2)])
def test_decode_copies_no_weights(dtype, order, batch):
    config, params = middling(dtype)
    tree = Weights(params, config).arranged(order)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(tree)]
    program = Decode(tree, config, np.full(batch, 32), 4, 64).program
    assert program.temp < max(sizes) / 2, "not even one matrix twice"
    assert sum(sizes) > 10 * program.temp


def test_decode_writes_into_the_cache_it_is_given():
    """No second cache: temporaries are one layer's at most, however many there are.

    In float32: XLA's CPU backend, not its others, holds a 16-bit cache widened.
    """
    temps = []
    for layers in (2, 6):
        config, params = middling("float32", layers=layers)
        loop = Decode(params, config, np.full(2, 32), 4, 512)
        assert loop.program.alias >= cache_bytes(config, 2 * 512, 4)
        temps.append(loop.program.temp)
    layer = cache_bytes(config, 2 * 512, 4) / 6
    assert temps[1] - temps[0] < layer
    old = loop.cache.keys[0]
    loop.run(Sampler())
    assert old.is_deleted()


def test_sizes_of_a_decode_do_not_grow_with_the_tokens():
    config, params = middling("float32", layers=1)
    temps = [Decode(params, config, np.full(1, 32), n, 64).program.temp for n in (2, 9)]
    assert abs(temps[1] - temps[0]) < 4096


def test_prefill_has_no_square_of_the_prompt():
    config, params = middling("float32", layers=1)
    count = 4096
    temp = prefill_temp(params, config, count)
    square = 4 * count * count
    all_heads = config.num_attention_heads * square
    assert temp < all_heads / 4
    half = prefill_temp(params, config, count // 2)
    assert temp < 2.5 * half, "linear in the prompt, not quadratic"


def test_requests_of_one_bucket_compile_once():
    config = tiny()
    params = random_params(config, jnp.float32)
    key, before = jax.random.key(0), (prefill._cache_size(), decode._cache_size())
    for count, new, sampler in [
        (5, 3, Sampler()),
        (16, 9, Sampler(temperature=0.5)),
        (9, 16, Sampler(temperature=2.0, top_p=0.3, top_k=4)),
    ]:
        prompt = np.ones((1, count), np.int32)
        options = {"sampler": sampler, "key": key, "max_new_tokens": new}
        generate(params, prompt, config=config, **options)
    after = (prefill._cache_size(), decode._cache_size())
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


def test_decode_runs_are_alike():
    config, params = middling("float32", layers=1)
    loop = Decode(params, config, np.array([4, 9]), 3, 16)
    for _ in range(3):
        assert loop.run(Sampler()) > 0
        assert np.asarray(loop.cache.lengths).tolist() == [7, 12]
