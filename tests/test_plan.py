"""Proposals: their order, their limits, and what is said where nothing fits."""

import pytest
from bench_helpers import tiny

from jrope.bench.model import named_shape
from jrope.errors import JropeError
from jrope.plan.devices import parse_cluster
from jrope.plan.memory import Work, temporaries
from jrope.plan.proposals import propose, with_compiler


def plan(on, name="llama3-8b", **fields):
    asked = {"config": named_shape(name), "batch": 1, "context": 8192, **fields}
    return propose(Work(**asked), parse_cluster(on))


def test_the_fastest_that_fits_comes_first():
    found = plan("v5e:4x4", batch=32, context=2048)
    speeds = [p.tokens_per_second for p in found if p.problem is None]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) == 4
    assert str(found[-1].mesh) == "data=16,model=1"
    assert found[-1].problem == "does not fit: 17.2 of 16.9 GB"


def test_what_cannot_be_comes_last():
    found = plan("v5e:16x16", "llama3-405b", batch=32)
    assert str(found[0].mesh) == "data=2,model=8,replica=16"
    assert found[0].memory.weights == 7_340_589_056
    assert [p.memory is None for p in found] == sorted(p.memory is None for p in found)
    assert "128 query heads on 256" in " ".join(p.problem for p in found if p.problem)


@pytest.mark.parametrize("on", ["h100:4", "v6e:2x2"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_limits_are_where_memory_ends(on, quantize):
    usable = parse_cluster(on).device.usable
    for one in plan(on, batch=4, context=2048, quantize=quantize):
        found = {"batch": one.largest_batch, "context": one.largest_context}
        for what, most in found.items():
            asked = {"batch": 4, "context": 2048, "quantize": quantize}
            step = one.mesh.data if what == "batch" else 1
            (fits,) = (
                p for p in plan(on, **{**asked, what: most}) if p.mesh == one.mesh
            )
            assert fits.problem is None and fits.memory.total <= usable
            more = {**asked, what: most + step}
            try:
                again = [p for p in plan(on, **more) if p.mesh == one.mesh]
                assert "does not fit" in again[0].problem
            except JropeError as error:
                assert "GB" in str(error)


def test_more_devices_hold_more():
    best = [
        max(p.largest_batch or 0 for p in plan(f"h100:{n}", batch=8))
        for n in (1, 2, 4, 8)
    ]
    assert best == sorted(best) and best[0] == 55
    # 81.24 GB - 16.06 GB of weights - temporaries, over 8,256 slots of 131,072 bytes
    assert pytest.approx(60.2, abs=0.1) == (81.24e9 - 16.06e9) / (8256 * 131072)


def test_a_compiler_may_tell_the_temporaries():
    asked = Work(config=named_shape("llama3-8b"), batch=1, context=8192)
    (one,) = propose(asked, parse_cluster("h100"), lambda work, mesh, cluster: 7)
    assert one.memory.temporaries == 7
    assert one.memory.total == 16_060_522_496 + 8256 * 131072 + 7


def test_the_first_mesh_that_fits_is_asked_about():
    asked = Work(config=named_shape("llama3-8b"), batch=32, context=2048)
    cluster, told, much = parse_cluster("v5e:4x4"), [], 3e10

    def measure(work, mesh, cluster):
        told.append(str(mesh))
        return much if len(told) == 1 else 3 * temporaries(work, mesh, cluster)

    plain = propose(asked, cluster)
    found = with_compiler(asked, cluster, plain, measure)
    assert told == [str(one.mesh) for one in plain[:2]]
    assert found[0].measured and found[0].mesh == plain[1].mesh
    assert found[0].memory.temporaries == 3 * plain[1].memory.temporaries
    assert found[0].largest_context < plain[1].largest_context
    (refused,) = (one for one in found if one.mesh == plain[0].mesh)
    assert "does not fit" in refused.problem
    with pytest.raises(JropeError, match="does not fit"):
        with_compiler(asked, cluster, plain, lambda *_: much)


@pytest.mark.parametrize(
    ("on", "fields", "message"),
    [
        (
            "h100",
            {"name": "llama3-70b"},
            "^batch 1, context 8,192 on h100:1: data=1,model=1 does not fit: 145.6 of "
            "81.2 GB; not one row fits; h100:2, 2 devices, holds it as data=1,model=2$",
        ),
        (
            "h100:2",
            {"batch": 128},
            "batch 123 fits; h100:4, 4 devices, holds it as data=4,model=1",
        ),
        (
            "v5e:16x16",
            {"name": "llama3-405b", "batch": 64, "context": 2**17},
            "batch 2 fits; no v5e up to 16x16 holds it",
        ),
        (
            "h100:3",
            {"config": tiny(num_attention_heads=2)},
            "does not divide: 1 rows on 3",
        ),
    ],
)
def test_where_nothing_fits_one_line_says_what_would(on, fields, message):
    with pytest.raises(JropeError, match=message):
        plan(on, **fields)
