"""Bytes of a device, by hand for known models, and beside what an H100 held."""

import pytest
from bench_helpers import tiny

from jrope.bench.model import named_shape
from jrope.errors import JropeError
from jrope.plan.devices import parse_cluster
from jrope.plan.memory import (
    Mesh,
    Work,
    cache_shard,
    factorisations,
    has_cudnn,
    read_shards,
    temporaries,
    weight_shards,
)
from jrope.plan.times import decode_step
from jrope.weights.int8 import weight_bytes

H100, V5E = parse_cluster("h100"), parse_cluster("v5e")
ONE = Mesh(data=1, model=1)


def work(name="llama3-8b", **fields):
    return Work(**{"config": named_shape(name), "batch": 1, "context": 8192, **fields})


@pytest.mark.parametrize(
    ("name", "mesh", "total"),
    [
        ("llama3-8b", ONE, 2 * 8_030_261_248),
        # 65 norms of 4,096 lie whole, the rest in halves
        ("llama3-8b", Mesh(data=1, model=2), (16_060_522_496 + 532_480) // 2),
        ("llama3-8b", Mesh(data=2, model=2), (16_060_522_496 + 532_480) // 2),
        # 161 norms of 8,192
        ("llama3-70b", Mesh(data=1, model=4), (141_107_412_992 + 3 * 2_637_824) // 4),
        # 128 ways, but 8 of k and v: 126 x 2 x 1024 x 16384 numbers; 253 norms
        (
            "llama3-405b",
            Mesh(data=2, model=8, replica=16),
            (811_706_777_600 - 8_455_716_864 - 8_290_304) // 128
            + 8_455_716_864 // 8
            + 8_290_304,
        ),
    ],
)
def test_weights_are_cut_as_by_hand(name, mesh, total):
    assert sum(weight_shards(work(name), mesh).values()) == total


def test_int8_weights_are_cut_with_their_scales():
    mesh = Mesh(data=1, model=1, replica=2)
    sizes = weight_shards(work(config=tiny(), quantize="int8"), mesh)
    layer = {
        "self_attn.q_proj": 32 + 16, "self_attn.k_proj": 32 + 16,
        "self_attn.v_proj": 32 + 16, "self_attn.o_proj": 32 + 32,
        "mlp.gate_proj": 48 + 24, "mlp.up_proj": 48 + 24, "mlp.down_proj": 48 + 32,
        "input_layernorm": 16, "post_attention_layernorm": 16,
    }  # fmt: skip
    got = {n: sizes[f"model.layers.1.{n}.weight"] for n in layer}
    assert got == layer
    assert sizes["model.embed_tokens.weight"] == 50 * 8 * 2 // 2
    assert sizes["lm_head.weight"] == 50 * 8 // 2 + 4 * 50 // 2
    assert sum(sizes.values()) == 2 * sum(layer.values()) + 400 + 300 + 16


def test_biases_are_cut_where_outputs_are():
    config = tiny(attention_bias=True, mlp_bias=True)
    sizes = weight_shards(work(config=config), Mesh(data=1, model=1, replica=2))
    layer = "model.layers.0"
    assert sizes[f"{layer}.self_attn.q_proj.bias"] == 8 * 2 // 2
    assert sizes[f"{layer}.self_attn.k_proj.bias"] == 4 * 2
    assert sizes[f"{layer}.mlp.up_proj.bias"] == 12 * 2 // 2
    assert sizes[f"{layer}.mlp.down_proj.bias"] == 8 * 2


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("config", [tiny(), tiny(tie_word_embeddings=True)])
def test_one_device_holds_the_arrays_that_jrope_loads(config, dtype, quantize):
    asked = work(config=config, quantize=quantize, dtype=dtype)
    assert weight_shards(asked, ONE) == weight_bytes(config, asked.itemsize, quantize)


def test_a_step_reads_all_but_an_embedding_that_is_no_head():
    assert read_shards(work(), ONE) == 2 * (8_030_261_248 - 128256 * 4096)
    tied = work(config=tiny(tie_word_embeddings=True))
    assert read_shards(tied, ONE) == sum(weight_shards(tied, ONE).values())


def test_cache_is_cut_over_rows_and_key_value_heads():
    asked = work(batch=32)
    assert asked.slots == 8192 + 64  # buckets of 8,128 and 64
    whole = 32 * 8256 * 131072  # 2 x 32 layers x 8 heads x 128 x 2 bytes a slot
    cut = {
        Mesh(data=1, model=1): 1,
        Mesh(data=2, model=4): 8,
        Mesh(data=1, model=8, replica=2): 8,  # held twice
    }
    for mesh, parts in cut.items():
        assert cache_shard(asked, mesh, asked.slots) == whole // parts


def test_integers_take_a_half_and_their_scales():
    half = work(cache_dtype="int8")
    for mesh in (ONE, Mesh(data=1, model=8)):
        plain, held = (cache_shard(x, mesh, 8192) for x in (work(), half))
        assert held == plain * (128 + 2) // 256
    # and a decode step reads all slots, not the filled ones alone
    steps = [decode_step(x, ONE, H100, 0).bytes for x in (work(), half)]
    assert steps == [cache_shard(work(), ONE, 8192), cache_shard(half, ONE, half.slots)]


@pytest.mark.parametrize(
    ("prompt", "measured"), [(2048, 0.2e9), (8192, 0.9e9), (32768, 3.6e9)]
)
def test_prefill_takes_what_an_h100_took(prompt, measured):
    asked = work(context=prompt + 64, prefill_chunk=prompt)
    got = temporaries(asked, ONE, H100)
    assert got == prompt * 3 * (4096 + 14336) * 2
    assert abs(got - measured) < 0.05e9  # the README has one digit


@pytest.mark.parametrize(
    ("batch", "measured"), [(1, 2e6), (8, 17e6), (32, 67e6), (128, 0.3e9)]
)
def test_decode_takes_what_an_h100_took(batch, measured):
    got = temporaries(work(batch=batch, context=66), ONE, H100)
    assert got == 16 * batch * 128256
    assert got == pytest.approx(measured, rel=0.13)


def test_attention_outside_cudnn_needs_room():
    asked = work(context=4096 + 64, batch=2, prefill_chunk=4096)
    plain = 2 * 4096 * 3 * (4096 + 14336) * 2
    layer = 2 * (4096 + 64) * 131072 // 32
    scores = 8 * 2 * 32 * 512 * 512
    assert temporaries(asked, ONE, H100) == plain
    assert temporaries(asked, ONE, V5E) == plain + layer + scores
    chunked = work(context=4096 + 64, batch=2, prefill_chunk=128)
    few = 2 * 128 * 3 * (4096 + 14336) * 2 + layer + 8 * 2 * 32 * 128 * 512
    assert temporaries(chunked, ONE, H100) == few


@pytest.mark.parametrize(
    ("config", "dtype", "on", "cudnn"),
    [
        (named_shape("llama3-8b"), "bfloat16", "h100", True),
        (named_shape("llama3-8b"), "float16", "a100-80g", True),
        (named_shape("llama3-8b"), "float32", "h100", False),
        (named_shape("llama3-8b"), "bfloat16", "v6e", False),
        (tiny(head_dim=256), "bfloat16", "h100", False),
        (tiny(head_dim=4), "bfloat16", "h100", False),
    ],
)
def test_cudnn_takes_what_attention_gives_it(config, dtype, on, cudnn):
    asked = work(config=config, dtype=dtype)
    assert has_cudnn(asked, parse_cluster(on)) is cudnn


def test_chunks_hold_8192_tokens_of_a_device():
    assert work().chunk(ONE) == 8128
    assert work(context=32768).chunk(ONE) == 8192
    assert work(batch=4).chunk(ONE) == 2048
    assert work(batch=4).chunk(Mesh(data=4, model=1)) == 8128
    assert work(batch=1000).chunk(ONE) == 256


def test_meshes_of_sixteen_devices():
    meshes = dict(factorisations(work(batch=16), parse_cluster("v5e:4x4")))
    assert [str(mesh) for mesh in meshes] == [
        "data=16,model=1", "data=8,model=2", "data=4,model=4", "data=2,model=8",
        "data=1,model=8,replica=2",
    ]  # fmt: skip
    assert not any(meshes.values())


@pytest.mark.parametrize(
    ("fields", "on", "reason"),
    [
        ({"batch": 2}, "v5e:2x2", "does not divide: 2 rows on 4"),
        (
            {"config": named_shape("smollm2-135m"), "batch": 2},
            "h100:2",
            "does not divide: 3 key/value heads on 2, 9 query heads on 2",
        ),
        ({"batch": 3}, "h100:3", "8 key/value heads on 3, 32 query heads on 3"),
        ({"batch": 64}, "v5e:8x8", "does not divide: 32 query heads on 64"),
        ({"batch": 16}, "h100:16", "NVLink joins 8 GPUs, not 16"),
        (
            {"config": tiny(vocab_size=51), "batch": 2},
            "h100:2",
            "does not divide: 51 entries of the vocabulary on 2",
        ),
        (  # as `load` refuses it: 11,008 inputs in groups of 128
            {"config": named_shape("llama2-7b"), "batch": 4, "quantize": "int4"},
            "h100:4",
            "does not divide: 86 groups of int4 in down_proj on 4",
        ),
    ],
)
def test_what_does_not_divide_is_told(fields, on, reason):
    problems = [p for _, p in factorisations(work(**fields), parse_cluster(on)) if p]
    assert any(reason in problem for problem in problems)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch: got 0, want an integer, at least 1"),
        ({"context": 1}, "context: got 1, want an integer, at least 2"),
        ({"new": 0}, "new: got 0"),
        ({"context": 64}, "new: got 64 new tokens of a context of 64, want fewer"),
        ({"context": 2**30 + 1}, "at most 1073741824"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(JropeError, match=message):
        work(**fields)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("cluster", [H100, V5E])
@pytest.mark.parametrize("name", ["llama3-8b", "llama3-70b", "llama3-405b"])
def test_more_devices_never_hold_more_each(name, cluster, quantize):
    meshes = [Mesh(data=1, model=n) for n in (1, 2, 4, 8)]
    meshes += [Mesh(data=1, model=8, replica=n) for n in (2, 4)]
    asked = work(name, batch=8, quantize=quantize)
    sizes = [
        sum(weight_shards(asked, mesh).values())
        + cache_shard(asked, mesh, asked.slots)
        + temporaries(asked, mesh, cluster)
        for mesh in meshes
    ]
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == len(sizes)


@pytest.mark.parametrize("cluster", [H100, V5E])
def test_more_tokens_never_take_less(cluster):
    for change in ("batch", "context"):
        sizes = [
            cache_shard(w, ONE, w.slots) + temporaries(w, ONE, cluster)
            for w in (work(**{change: 100 + 37 * n}) for n in range(60))
        ]
        assert sizes == sorted(sizes)
