"""Rooflines beside what the README measured on one H100, and by hand elsewhere."""

from dataclasses import replace

import pytest

from jrope.bench.model import named_shape, prefill_flops, read_bytes
from jrope.plan.devices import parse_cluster
from jrope.plan.memory import Mesh, Work, read_shards
from jrope.plan.times import decode_step, prefill_seconds, token_flops

H100 = parse_cluster("h100")
ONE = Mesh(data=1, model=1)


def work(name, batch, context, **fields):
    return Work(config=named_shape(name), batch=batch, context=context, **fields)


def step(asked, mesh=ONE, cluster=H100):
    return decode_step(asked, mesh, cluster, read_shards(asked, mesh))


@pytest.mark.parametrize(
    ("name", "batch", "context", "quantize", "measured", "within"),
    [
        ("llama3-8b", 1, 2048, None, 5.70, 0.01),
        ("llama3-8b", 1, 16384, None, 6.30, 0.01),
        ("llama3-8b", 8, 1536, None, 6.51, 0.02),
        ("llama3-8b", 32, 1536, None, 8.38, 0.01),
        ("llama3-8b", 128, 1536, None, 15.8, 0.04),
        ("llama2-7b", 1, 2048, None, 5.43, 0.02),
        ("llama2-7b", 1, 16384, None, 7.83, 0.01),
        ("llama3-8b", 1, 2048, "int8", 3.47, 0.07),
        ("llama3-8b", 32, 1536, "int8", 6.62, 0.15),
    ],
)
def test_steps_take_what_an_h100_took(name, batch, context, quantize, measured, within):
    """Of 64 steps that follow `context` tokens, the mean one is the 32nd."""
    asked = work(name, batch, context + 32, quantize=quantize)
    assert step(asked).seconds * 1e3 == pytest.approx(measured, rel=within)


@pytest.mark.parametrize(
    ("prompt", "measured"), [(2048, 48.6), (8192, 216), (32768, 1208)]
)
def test_prompts_take_what_an_h100_took(prompt, measured):
    asked = work("llama3-8b", 1, prompt + 64, prefill_chunk=prompt)
    got = prefill_seconds(asked, ONE, H100) * 1e3
    assert got == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("text", "batch", "context", "measured"),
    [
        ("h200", 1, 2048, 4.345),
        ("h200", 32, 1024, 5.671),
        ("h100:2", 1, 2048, 4.455),
        ("h100:2", 32, 1024, 6.236),
        ("h200:2", 1, 2048, 3.690),
        ("h200:2", 32, 1024, 5.046),
    ],
)
def test_steps_take_what_other_gpus_took(text, batch, context, measured):
    cluster = parse_cluster(text)
    mesh = Mesh(data=1, model=cluster.count)
    got = step(work("llama3-8b", batch, context + 16), mesh, cluster)
    assert got.seconds * 1e3 == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(
    ("text", "measured"), [("h200", 208.9), ("h100:2", 146.2), ("h200:2", 136.1)]
)
def test_prompts_take_what_other_gpus_took(text, measured):
    cluster = parse_cluster(text)
    asked = work("llama3-8b", 1, 8192 + 64, prefill_chunk=8192)
    mesh = Mesh(data=1, model=cluster.count)
    got = prefill_seconds(asked, mesh, cluster) * 1e3
    assert got == pytest.approx(measured, rel=0.06)


def test_a_step_of_70b_on_four_h100s_by_hand():
    asked, cluster = work("llama3-70b", 32, 8192), parse_cluster("h100:4")
    got = step(asked, Mesh(data=1, model=4), cluster)
    norms = 161 * 8192 * 2
    weights = (2 * (70_553_706_496 - 128256 * 8192) + 3 * norms) // 4
    slots = 32 * 8192 * (2 * 80 * 8 * 128 * 2) // 4
    assert got.bytes == weights + slots
    assert got.read == pytest.approx(got.bytes / (0.85 * 3.35e12))
    assert got.layers == pytest.approx(80 * 23e-6)
    payload = 1.5 * 32 * 8192 * 4  # 2 (n - 1) / n of [32, 8192] in four bytes each
    one = min(
        17.1e-6 + 6 * 0.6e-6 + payload / (0.113 * 370.8e9),
        30e-6 + 6 * 3.4e-6 + payload / (0.56 * 370.8e9),
    )
    assert got.collectives == pytest.approx(162 * one)
    assert got.seconds == pytest.approx(got.read + got.layers + got.collectives)


def test_tpus_read_every_slot():
    asked, mesh = work("llama3-8b", 8, 5000), Mesh(data=1, model=8)
    assert asked.slots == 6144 + 64
    weights = read_shards(asked, mesh)
    got = step(asked, mesh, parse_cluster("v5e:2x4"))
    assert got.bytes == weights + 8 * 6208 * 131072 // 8
    assert step(asked).bytes == read_shards(asked, ONE) + 8 * 5000 * 131072


def test_4_bit_words_take_as_long_as_int8_and_longer_in_batches():
    """[28672, 4096]: 44 us for one row, int8's 47; 195 for 32 rows, 90 as bfloat16."""
    one, many = (
        {
            q: step(work("llama3-8b", rows, 1024, quantize=q))
            for q in ("int4", "int8", None)
        }
        for rows in (1, 32)
    )
    assert one["int4"].read == pytest.approx(one["int8"].read, rel=0.05)
    assert one["int4"].bytes < 0.55 * one["int8"].bytes
    assert many["int4"].read > 1.7 * many[None].read
    asked, tpu = work("llama3-8b", 1, 1024, quantize="int4"), parse_cluster("v6e:1x1")
    widened = step(asked, ONE, tpu)  # for one row, too
    assert widened.read > 7 * widened.bytes / (0.92 * tpu.device.bandwidth)


def test_a_large_batch_is_bound_by_products():
    asked = work("llama3-8b", 4096, 128, quantize="int8")
    got = step(asked)
    assert got.flops == 4096 * token_flops(asked.config, 128)
    assert got.read == pytest.approx(got.flops / (0.62 * 989e12))
    assert got.read > got.bytes / (0.85 * 3.35e12)


def test_flops_of_a_token_by_hand():
    config = named_shape("llama3-8b")
    matrices = read_bytes(config, 1) - 65 * 4096  # norms multiply no matrix
    assert token_flops(config, 1000) == 2 * matrices + 4 * 32 * 4096 * 1000


def test_a_token_sees_no_more_than_its_window():
    config = named_shape("llama3-8b")
    narrow = replace(config, windows=(100, *[None] * 31))
    less = token_flops(config, 1000) - token_flops(narrow, 1000)
    assert less == 4 * 4096 * 900


def test_a_prompt_on_eight_tpus_by_hand():
    asked, mesh = work("llama3-8b", 4, 4096 + 64), Mesh(data=1, model=8)
    cluster = parse_cluster("v6e:2x4")
    flops = prefill_flops(asked.config, 4, 4096)
    chunk = cluster.all_reduce(4 * 2048 * 4096 * 2, 8)
    want = flops / 8 / (0.62 * 918e12) + 2 * 65 * chunk
    assert prefill_seconds(asked, mesh, cluster) == pytest.approx(want)


def test_float32_products_are_slower():
    plain, wide = (work("llama3-8b", 1, 4096, dtype=d) for d in ("float16", "float32"))
    ratio = prefill_seconds(wide, ONE, H100) / prefill_seconds(plain, ONE, H100)
    assert ratio == pytest.approx(989 / 67)
