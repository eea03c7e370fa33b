"""Devices, what they come as, and all-reduces by hand."""

import math

import pytest

from jrope.errors import JropeError
from jrope.plan.devices import DEVICES, parse_cluster


@pytest.mark.parametrize(
    ("text", "topology", "count"),
    [
        ("h100", (1,), 1),
        ("H100:2", (2,), 2),
        ("b200:16", (16,), 16),
        ("v5e", (1, 1), 1),
        ("v5e:4x4", (4, 4), 16),
        ("v6e:4x2", (2, 4), 8),
        ("v5p:4x2x2", (2, 2, 4), 16),
        ("v5e:16x16", (16, 16), 256),
    ],
)
def test_topologies_are_read(text, topology, count):
    cluster = parse_cluster(text)
    assert (cluster.topology, cluster.count) == (topology, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10", r"unknown device \(did you mean 'h100'\?\); want one of a100-80g, h1"),
        ("", "unknown device; want one of"),
        ("v5e:3x5", "v5e comes as 1x1, 2x2, 2x4"),
        ("v5e:16", "v5e comes as 1x1"),
        ("v5e:4x4x1", "v5e comes as 1x1"),
        ("v4:4x4", "v4 comes as 1x1x1, 2x2x1"),
        ("h100:0", "h100 comes as 1, 2, 3"),
        ("h100:9", "h100 comes as 1, 2, 3"),
        ("h100:", "h100 comes as 1, 2, 3"),
        ("h100:-2", "h100 comes as 1, 2, 3"),
        ("h100:2x2", "h100 comes as 1, 2, 3"),
    ],
)
def test_others_are_refused(text, message):
    with pytest.raises(JropeError, match=message):
        parse_cluster(text)


@pytest.mark.parametrize("name", DEVICES)
def test_figures_of_devices_are_of_one_kind(name):
    device = DEVICES[name]
    assert 15e9 < device.usable < device.memory < 200e9
    assert 0.8e12 <= device.bandwidth <= 8e12
    assert device.peak("bfloat16") == device.peak("float16") > device.peak("float32")
    # bytes a FLOP: products of one row are bound by memory everywhere
    assert 50 < device.products / device.bandwidth < 600
    counts = [parse_cluster(f"{name}:{t}").count for t in device.topologies]
    assert counts == sorted(counts) and counts[0] == 1


@pytest.mark.parametrize(
    ("text", "ways", "size", "microseconds"),
    [
        ("h100:8", 1, 1e6, 0),
        # small: 17.1 + 2 steps of 0.6, all data once over 11.3 % of 370.8 GB/s
        ("h100:2", 2, 8192, 17.1 + 1.2 + 8192 / 41.9004e3),
        # large: 30 + 14 steps of 3.4, 2 x 7/8 of the data at 56 %
        ("h100:8", 8, 1e8, 30 + 14 * 3.4 + 1.75e8 / 207.648e3),
        # lines of 4 on both axes: 3 hops there and back on each, 2 x 45 GB/s
        ("v5e:4x4", 16, 1e6, 12 + 1.875e6 / 90e3),
        # one line of 2
        ("v5e:2x4", 2, 1e6, 2 + 1e6 / 45e3),
        # a ring of 16: 8 hops there and back, both directions
        ("v5e:16x16", 16, 1e6, 16 + 1.875e6 / 90e3),
        # three rings of 4
        ("v4:4x4x4", 64, 1e6, 12 + 2 * 63 / 64 * 1e6 / 270e3),
        # v5p's axes of 2 are lines
        ("v5p:2x2x1", 4, 1e6, 4 + 1.5e6 / 180e3),
    ],
)
def test_all_reduces_take_what_they_do_by_hand(text, ways, size, microseconds):
    got = parse_cluster(text).all_reduce(size, ways) * 1e6
    assert math.isclose(got, microseconds, rel_tol=1e-9)


def test_larger_clusters_come_in_order():
    more = [str(cluster) for cluster in parse_cluster("v5e:8x8").larger()]
    assert more == ["v5e:8x16", "v5e:16x16"]
