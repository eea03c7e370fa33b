"""Meshes for a model on devices: what fits, how far, and which is the fastest."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from jrope.errors import JropeError
from jrope.generation.request import LONGEST
from jrope.plan.devices import Cluster
from jrope.plan.memory import (
    Memory,
    Mesh,
    Temporaries,
    Work,
    cache_shard,
    factorisations,
    read_shards,
    temporaries,
    weight_shards,
)
from jrope.plan.times import Step, decode_step, prefill_seconds

MOST_ROWS = 2**20  # where a search for the largest batch ends


@final
@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One mesh; what cannot be told is None.

    Args:
      mesh: how the devices share the work.
      problem: why it cannot be, or does not fit.
      memory: bytes of a device.
      step: a decode step.
      tokens_per_second: of all rows together.
      prefill: seconds of the prompts.
      chunk: tokens of each row that are prefilled at once.
      largest_batch: rows that fit at the asked context.
      largest_context: tokens that fit at the asked batch.
      measured: whether a compiler told the temporaries, see `with_compiler`.
    """

    mesh: Mesh
    problem: str | None = None
    memory: Memory | None = None
    step: Step | None = None
    tokens_per_second: float | None = None
    prefill: float | None = None
    chunk: int | None = None
    largest_batch: int | None = None
    largest_context: int | None = None
    measured: bool = False


def propose(
    work: Work, cluster: Cluster, measure: Temporaries = temporaries
) -> list[Proposal]:
    """Every mesh of the devices: the fastest first, what does not fit after the others.

    Args:
      work: what is asked for.
      cluster: the devices.
      measure: tells the bytes of a device beside weights and cache; by formula unless
        another function, such as one that asks a compiler, is given.

    Raises:
      JropeError: none fits; the message says how many devices would do.
    """
    found = _proposals(work, cluster, measure)
    if found[0].problem:
        raise JropeError(_nowhere(work, cluster, found, measure))
    return found


def with_compiler(
    work: Work, cluster: Cluster, found: list[Proposal], measure: Temporaries
) -> list[Proposal]:
    """The proposals, the first of them with the temporaries that a compiler tells.

    One that does not fit with these comes after those that fit, and the next is asked
    about.  Their limits follow the formula, times what it was wrong by.

    Raises:
      JropeError: none fits.
    """
    while found[0].problem is None and not found[0].measured:
        mesh = found[0].mesh
        ratio = measure(work, mesh, cluster) / temporaries(work, mesh, cluster)
        scaled = partial(_scaled, ratio=ratio)
        again = replace(_proposal(work, mesh, cluster, scaled), measured=True)
        found = sorted([again, *found[1:]], key=_rank)
    if found[0].problem:
        raise JropeError(_nowhere(work, cluster, found, temporaries))
    return found


def _scaled(work: Work, mesh: Mesh, cluster: Cluster, ratio: float) -> int:
    return round(ratio * temporaries(work, mesh, cluster))


def _proposals(work: Work, cluster: Cluster, measure: Temporaries) -> list[Proposal]:
    found = [
        Proposal(mesh=mesh, problem=problem)
        if problem
        else _proposal(work, mesh, cluster, measure)
        for mesh, problem in factorisations(work, cluster)
    ]
    return sorted(found, key=_rank)


def _rank(one: Proposal) -> float:
    """Below 0 what fits, by speed; then what does not, by size; then what cannot be."""
    if one.tokens_per_second is not None:
        return -one.tokens_per_second
    return math.inf if one.memory is None else one.memory.total


def _proposal(
    work: Work, mesh: Mesh, cluster: Cluster, measure: Temporaries
) -> Proposal:
    weights, usable = sum(weight_shards(work, mesh).values()), cluster.device.usable

    def used(work: Work) -> Memory:
        return Memory(
            weights=weights,
            cache=cache_shard(work, mesh, work.slots),
            temporaries=measure(work, mesh, cluster),
        )

    def rows_fit(parts: int) -> bool:
        return used(replace(work, batch=mesh.data * parts)).total <= usable

    def tokens_fit(prompt: int) -> bool:
        return used(replace(work, context=work.new + prompt)).total <= usable

    memory, batch = used(work), mesh.data * _largest(rows_fit, MOST_ROWS)
    if memory.total > usable:
        text = f"does not fit: {memory.total / 1e9:.1f} of {usable / 1e9:.1f} GB"
        return Proposal(mesh=mesh, problem=text, memory=memory, largest_batch=batch)
    step = decode_step(work, mesh, cluster, read_shards(work, mesh))
    return Proposal(
        mesh=mesh,
        memory=memory,
        step=step,
        tokens_per_second=work.batch / step.seconds,
        prefill=prefill_seconds(work, mesh, cluster),
        chunk=work.chunk(mesh),
        largest_batch=batch,
        largest_context=work.new + _largest(tokens_fit, LONGEST - work.new),
    )


def _largest(good: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that is good, as are all below it; or 0."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _nowhere(
    work: Work, cluster: Cluster, found: list[Proposal], measure: Temporaries
) -> str:
    """Why nothing fits, and what would."""
    reasons = "; ".join(f"{one.mesh} {one.problem}" for one in found[:2])
    rows = max(one.largest_batch or 0 for one in found)
    less = f"batch {rows:,} fits" if rows else "not one row fits"
    return (
        f"batch {work.batch:,}, context {work.context:,} on {cluster}: {reasons}; "
        f"{less}; {_enough(work, cluster, measure)}"
    )


def _enough(work: Work, cluster: Cluster, measure: Temporaries) -> str:
    """The smallest number of such devices that holds it."""
    for more in cluster.larger():
        best = _proposals(work, more, measure)[0]
        if best.problem is None:
            return f"{more}, {more.count:,} devices, holds it as {best.mesh}"
    return f"no {cluster.name} up to {cluster.device.topologies[-1]} holds it"
