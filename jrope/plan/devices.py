"""Accelerators by their data sheets, and how many of them are joined, and how.

Every figure is that of one device as JAX counts them.  Sources:

NVIDIA: the data sheets of A100 (80 GB, SXM), H100 (SXM), H200 (SXM) and DGX B200 (an
  eighth of it), products without sparsity; memory as nvidia-smi reports it.
NVLink: bytes/s that NCCL's cost model counts for a link (src/graph/topo.h: 20.0, 20.6
  and 40.1 GB/s), times the 12 or 18 links of a GPU.  What all-reduces make of it was
  measured (README, "Measured"; jax 0.11.2): steps and prompts on two H100s and on two
  H200s, less what a device's own share takes.
TPU: Cloud TPU's pages on v4, v5e, v5p and v6e (docs.cloud.google.com/tpu/docs) for
  bandwidth and bfloat16; float32 takes six bfloat16 passes.  Usable memory is what
  XLA's compiler names in its messages ("Used 17.14G of 15.75G hbm").
ICI: bytes/s of a link in one direction, when an axis is a ring, and a microsecond for
  each hop, from "How to Scale Your Model" (jax-ml.github.io/scaling-book, parts 2, 3).

Rates of int8 products are left out: activations are never int8 here.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, final

from jrope.errors import JropeError, did_you_mean

Kind = Literal["gpu", "tpu"]
Shape = tuple[int, ...]

# XLA_PYTHON_CLIENT_MEM_FRACTION, as `jrope bench` sets it; JAX by itself takes 0.75
GPU_FRACTION = 0.95
HOST = 8  # GPUs that NVLink joins
HOP = 1e-6  # seconds, from a TPU to its neighbour
# Seconds to begin, and for each step of a ring as NCCL's src/graph/tuning.cc has them
# (LL, Simple), and the part of the links' rate that is data: of small sums, where the
# host starts each by itself, and of large ones
_REDUCES = ((17.1e-6, 0.6e-6, 0.113), (30e-6, 3.4e-6, 0.56))
_GPUS = (*(str(n) for n in range(1, HOST + 1)), "16", "32", "64", "128", "256", "512")
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
_TOPOLOGY = re.compile(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", re.ASCII)


@final
@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator.

    Args:
      kind: "gpu", joined by a switch within a host; "tpu", joined to its neighbours.
      memory: bytes there are.
      usable: bytes that programs may take; the rest is the allocator's reserve.
      bandwidth: bytes/s of the memory.
      products: FLOP/s of matrix products in bfloat16 or float16.
      products32: FLOP/s of those in float32.
      link: bytes/s in one direction, of one TPU link or of all links of a GPU.
      ring: length of which an axis of TPUs is a multiple when its ends are joined.
      topologies: what the device comes as, the smallest first.
    """

    kind: Kind
    memory: float
    usable: float
    bandwidth: float
    products: float
    products32: float
    link: float
    ring: int
    topologies: tuple[str, ...]

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in `dtype`."""
        return self.products32 if dtype == "float32" else self.products


def _gpu(
    mebibytes: int, bandwidth: float, products: float, products32: float, link: float
) -> Device:
    return Device(
        kind="gpu",
        memory=mebibytes * 2**20,
        usable=GPU_FRACTION * mebibytes * 2**20,
        bandwidth=bandwidth,
        products=products,
        products32=products32,
        link=link,
        ring=1,
        topologies=_GPUS,
    )


def _tpu(
    gibibytes: int,
    usable: float,
    bandwidth: float,
    products: float,
    link: float,
    axes: Literal[2, 3],
) -> Device:
    return Device(
        kind="tpu",
        memory=gibibytes * 2**30,
        usable=usable * 2**30,
        bandwidth=bandwidth,
        products=products,
        products32=products / 6,
        link=link,
        ring=16 if axes == 2 else 4,
        topologies=_FLAT if axes == 2 else _CUBES,
    )


DEVICES: dict[str, Device] = {
    "a100-80g": _gpu(81920, 2.039e12, 312e12, 19.5e12, 12 * 20.0e9),
    "h100": _gpu(81559, 3.35e12, 989e12, 67e12, 18 * 20.6e9),
    "h200": _gpu(143771, 4.8e12, 989e12, 67e12, 18 * 20.6e9),
    "b200": _gpu(183359, 8e12, 2250e12, 80e12, 18 * 40.1e9),
    "v4": _tpu(32, 30.75, 1200e9, 275e12, 4.5e10, 3),
    "v5e": _tpu(16, 15.75, 819e9, 197e12, 4.5e10, 2),
    "v5p": _tpu(96, 95.74, 2765e9, 459e12, 9e10, 3),
    "v6e": _tpu(32, 31.25, 1640e9, 918e12, 9e10, 2),
}


@final
@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices of one kind and their topology: (n,) behind a switch, else a torus."""

    name: str
    topology: Shape

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.topology))}"

    @property
    def device(self) -> Device:
        """One of them."""
        return DEVICES[self.name]

    @property
    def count(self) -> int:
        """Devices in all."""
        return math.prod(self.topology)

    def all_reduce(self, size: float, ways: int) -> float:
        """Seconds until `ways` neighbours hold the sum of their `size` bytes each.

        GPUs: a ring, the better of two protocols.
        TPUs: a reduce-scatter and an all-gather along each axis of the sub-torus, all
        axes at once, both directions of a ring or one of a line; a microsecond a hop.
        """
        if ways == 1:
            return 0.0
        moved = 2 * (ways - 1) / ways * size
        if self.device.kind == "gpu":
            steps = 2 * (ways - 1)
            return min(
                base + steps * hop + moved / (part * self.device.link)
                for base, hop, part in _REDUCES
            )
        hops, rate = 0, 0.0
        for length in self._sub_torus(ways):
            ring = length % self.device.ring == 0
            hops += 2 * (length // 2 if ring else length - 1)
            rate += self.device.link * (2 if ring else 1)
        return hops * HOP + moved / rate

    def _sub_torus(self, ways: int) -> list[int]:
        """Lengths along the axes of a block of `ways` neighbours, the whole ones first.

        An axis that is not covered is a line: its length is no multiple of `ring`.
        """
        lengths: list[int] = []
        for axis in reversed(self.topology):
            length = math.gcd(ways, axis)
            ways //= length
            if length > 1:
                lengths.append(length)
        return lengths

    def larger(self) -> list["Cluster"]:
        """Every topology with more devices, the smallest first."""
        shapes = [_shape(text) for text in self.device.topologies]
        return [
            Cluster(name=self.name, topology=shape)
            for shape in shapes
            if math.prod(shape) > self.count
        ]


def parse_cluster(text: str) -> Cluster:
    """Read DEVICE or DEVICE:TOPOLOGY.

    Raises:
      JropeError: no such device, or it does not come like that.

    >>> parse_cluster("v5e:4x4").count
    16
    """
    name, colon, topology = text.strip().lower().partition(":")
    if name not in DEVICES:
        hint = did_you_mean(name, DEVICES)
        known = ", ".join(DEVICES)
        raise JropeError(f"--on {text!r}: unknown device{hint}; want one of {known}")
    known = DEVICES[name].topologies
    topology = topology if colon else known[0]
    # 4x2 is 2x4
    shape = _shape(topology) if _TOPOLOGY.fullmatch(topology) else ()
    wanted = "x".join(map(str, sorted(shape)))
    found = [t for t in known if "x".join(map(str, sorted(_shape(t)))) == wanted]
    if not found:
        raise JropeError(f"--on {text!r}: {name} comes as {', '.join(known)}")
    return Cluster(name=name, topology=_shape(found[0]))


def _shape(topology: str) -> Shape:
    return tuple(int(length) for length in topology.split("x"))
