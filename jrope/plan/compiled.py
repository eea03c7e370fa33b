"""Temporaries as libtpu's compiler tells them, of a TPU that need not be here."""

from importlib import metadata

import jax
import numpy as np

from jrope.bench.model import random_params
from jrope.generation.ahead import compile_ahead
from jrope.model.placed import shard
from jrope.plan.devices import Cluster
from jrope.plan.memory import Mesh, Work
from jrope.sharding import meshes
from jrope.sharding.topologies import can_describe

EFFORT = "jax_exec_time_optimization_effort"


def compiler(cluster: Cluster) -> str | None:
    """Who can compile for these devices here, such as "libtpu 0.0.42.1"; or None."""
    if cluster.device.kind != "tpu" or not can_describe():
        return None
    return f"libtpu {metadata.version('libtpu')}"


def compiled_temporaries(work: Work, mesh: Mesh, cluster: Cluster) -> int:
    """Bytes beside arguments and results of the greediest program of `generate`.

    All layers are compiled, at the least effort: seconds to minutes, where a program
    for running takes several times as long and needs about as much memory.

    Raises:
      JropeError: libtpu is not here, or knows no such topology.
    """
    config, before = work.config, getattr(jax.config, EFFORT)
    there = meshes.mesh(str(mesh), on=str(cluster))
    shapes = jax.eval_shape(lambda: random_params(config, work.dtype, work.quantize))
    prompt = np.zeros((work.batch, work.prompt), np.int32)
    jax.config.update(EFFORT, -1.0)
    try:
        programs = compile_ahead(
            shard(shapes, there, config),
            prompt,
            config=config,
            max_new_tokens=work.new,
            cache_dtype=work.cache_dtype,
            prefill_chunk=work.chunk(mesh),
        )
    finally:
        jax.config.update(EFFORT, before)
    sizes = [program.memory_analysis() for program in programs.values()]
    return max(size.temp_size_in_bytes for size in sizes if size is not None)
