"""How long a step and a prompt take, by rooflines.

The efficiencies are those of jrope on one H100 (README, "Measured"), and are assumed of
every other device; of several GPUs the all-reduces are fitted, too (see `devices`).
Beside its table's rows:

    8B, batch 1, context 2,048 and 16,384    5.70 and 6.30 ms    here 5.70 and 6.30
    8B, batch 8, 32 and 128, 1,536 (mean)    6.51, 8.38, 15.8    here 6.59, 8.32, 15.2
    7B, batch 1, context 2,048 and 16,384    5.43 and 7.83       here 5.38 and 7.82
    8B int8, batch 1 and 32                  3.47 and 6.62       here 3.26 and 5.68
    8B, prompt of 2k, 8k, 32k                48.6, 216, 1,208    here 48.4, 215, 1,205

and beside other devices: 8B, batch 1 at 2,048 and 32 at 1,024, and a prompt of 8k

    one H200                    4.35, 5.67, 209                  here 4.20, 5.47, 215
    two H100s                   4.46, 6.24, 146                  here 4.45, 6.16, 139
    two H200s                   3.69, 5.05, 136                  here 3.70, 5.13, 139
"""

from dataclasses import dataclass
from typing import final

from jrope.bench.model import prefill_flops
from jrope.model.cache import layer_slots
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.plan.devices import Cluster
from jrope.plan.memory import Mesh, Work, cache_shard, has_cudnn

# Parts of the data sheet's bandwidth (3.35 TB/s) that reading weights and cache reaches
READ_ONE = 0.92  # one row: 3.06 to 3.10 TB/s
READ_ROWS = 0.85  # several: small products and attention read more slowly
LAYER = 23e-6  # seconds of a layer's step beside reading: norms, launches
# Reading 4-bit words takes as long as so many bytes for each of theirs: of one row they
# take what int8 takes on a GPU, else they are widened first (README, "Weights"; H100)
INT4_ONE, INT4_ROWS = 2.0, 8.5
PRODUCTS = 0.62  # of the data sheet's 989 TFLOP/s, while a prompt is read


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """A decode step at the full context.

    Args:
      bytes: that each device reads.
      flops: that each device computes.
      read: seconds of reading, or of computing where that takes longer.
      layers: seconds that a layer takes however little it reads, of all layers.
      collectives: seconds of all-reduces.
    """

    bytes: int
    flops: int
    read: float
    layers: float
    collectives: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.read + self.layers + self.collectives


def decode_step(work: Work, mesh: Mesh, cluster: Cluster, weights: int) -> Step:
    """One token for each row.

    max(bytes / bandwidth, FLOPs / peak) + 23 us a layer + 2 L + 2 all-reduces of [B, D]
    (after attention and MLP, of the embedding's rows, and of the head's choice).

    Args:
      work, mesh, cluster: what is asked for.
      weights: bytes of them that a device reads, as `read_shards` counts.
    """
    device, rows = cluster.device, work.batch // mesh.data
    # cuDNN reads filled slots only, plain XLA all that there are
    filled = has_cudnn(work, cluster) and work.cache_dtype is None
    slots = work.context if filled else work.slots
    size = weights + cache_shard(work, mesh, slots)
    flops = rows * token_flops(work.config, work.context) // mesh.ways
    rate = (READ_ONE if rows == 1 else READ_ROWS) * device.bandwidth
    slower = 1.0
    if work.quantize == "int4":
        slower = INT4_ONE if rows == 1 and device.kind == "gpu" else INT4_ROWS
    lasting = size + (slower - 1) * weights
    layers = work.config.num_hidden_layers
    # partial sums of one token are float32; between TPUs the compiler narrows them
    itemsize = 4 if device.kind == "gpu" else work.itemsize
    payload = rows * work.config.hidden_size * itemsize
    return Step(
        bytes=size,
        flops=flops,
        read=max(lasting / rate, flops / (PRODUCTS * device.peak(work.dtype))),
        layers=layers * LAYER,
        collectives=(2 * layers + 2) * cluster.all_reduce(payload, mesh.ways),
    )


def token_flops(config: LlamaConfig, context: int) -> int:
    """2 for each weight of layers and head, 4 for each head's channel and slot seen."""
    shapes = parameter_shapes(config)
    inner = sum(s[0] * s[1] for n, s in shapes.items() if ".layers." in n and s[1:])
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim
    return 2 * (inner + head) + 4 * width * sum(layer_slots(config, context))


def prefill_seconds(work: Work, mesh: Mesh, cluster: Cluster) -> float:
    """The prompts of all rows: FLOPs / peak + 2 L + 1 all-reduces [B, C, D] a chunk."""
    device, rows, chunk = cluster.device, work.batch // mesh.data, work.chunk(mesh)
    flops = prefill_flops(work.config, rows, work.prompt) / mesh.ways
    # reduced in float32 and gathered as they are rounded; TPUs narrow the first, too
    sums = 4 if device.kind == "gpu" else work.itemsize
    payload = rows * chunk * work.config.hidden_size * (sums + work.itemsize) / 2
    chunks = work.prompt / chunk
    reduces = chunks * (2 * work.config.num_hidden_layers + 1)
    computing = flops / (PRODUCTS * device.peak(work.dtype))
    return computing + reduces * cluster.all_reduce(payload, mesh.ways)
