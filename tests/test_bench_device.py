"""The device's ceilings, and the kernels of a trace."""

import jax
import jax.numpy as jnp
import pytest
from bench_helpers import CEILINGS

from jrope.bench.device import Ceilings, Kernel, measure_ceilings, top_kernels
from jrope.errors import JropeError


def test_ceilings_are_rates():
    got = measure_ceilings(
        jnp.dtype("float32"), size=2**20, products=((64, 32, 16),), repeats=2
    )
    assert got.read > 0
    assert got.matmul > 0
    assert got.transfer is None  # the host's memory is the device's


def test_better_ceilings_are_the_higher_of_each():
    other = Ceilings(read=2e9, matmul=1e11, transfer=5.0)
    best = CEILINGS.better_of(other)
    assert best == Ceilings(read=2e9, matmul=1e12, transfer=5.0)
    assert CEILINGS.better_of(CEILINGS) == CEILINGS


def test_profile_without_a_trace_says_so(tmp_path):
    with pytest.raises(JropeError, match="no trace was written"):
        top_kernels(str(tmp_path), 1)


class Fake(dict):
    """Attributes from a dictionary, as ProfileData has them."""

    __getattr__ = dict.__getitem__


def test_kernels_are_summed_over_streams_only(tmp_path, monkeypatch):
    def event(name, us):
        return Fake(name=name, duration_ns=us * 1e3)

    stream = Fake(name="Stream #7", events=[event("a", 4), event("b", 1)])
    again = Fake(name="Stream #8(Memcpy)", events=[event("a", 6)])
    modules = Fake(name="XLA Modules", events=[event("all", 99)])
    planes = [
        Fake(name="/host:CPU", lines=[modules]),
        Fake(name="/device:GPU:0", lines=[stream, modules, again]),
    ]
    (tmp_path / "x.xplane.pb").write_bytes(b"")
    reader = Fake(from_file=lambda _: Fake(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", reader)
    assert top_kernels(str(tmp_path), 2) == [
        Kernel(name="a", microseconds=5.0, launches=1.0),
        Kernel(name="b", microseconds=0.5, launches=0.5),
    ]
