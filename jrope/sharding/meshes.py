"""Meshes by name, and where parameters stand on one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jrope.errors import JropeError, did_you_mean
from jrope.sharding.axes import (
    Axes,
    Names,
    entry,
    spec_of,
    specs_of,
    unnamed_heads,
)
from jrope.sharding.topologies import described, is_described
from jrope.tree import Params, Tree, flatten, nest

NAMES = ("data", "fsdp", "context", "model", "replica")


def mesh(text: str, on: str | None = None) -> Mesh:
    """A mesh of this machine's or these processes' devices, such as "data=2,model=4".

    Args:
      text: axes and their sizes, the one whose devices are nearest to each other last.
        "data" splits rows; "model" heads, MLP and vocabulary; "fsdp" rows, and the
        weights as they are stored; "context" a prompt and the cache along their
        tokens; "replica" what "model" does, save for key/value
        heads, which each of its devices holds.
      on: TPUs that are not here, such as "v5e:2x2", see `topologies.described`: what
        `shard` and `load_shapes` place there are shapes, for `compile_ahead` alone.

    Raises:
      JropeError: an axis that is unknown or given twice, a size that is no whole
        number, more devices than there are, or other than all of `on` or of several
        processes.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in NAMES:
            hint = did_you_mean(name, NAMES)
            known = ", ".join(NAMES)
            raise JropeError(f"mesh: got axis {name!r}, want one of {known}{hint}")
        if name in sizes:
            raise JropeError(f"mesh: got {name} twice in {text!r}")
        if not size.isdecimal() or int(size) < 1:
            raise JropeError(f"mesh: got {part.strip()!r}, want {name}=2 or the like")
        sizes[name] = int(size)
    devices = jax.devices() if on is None else described(on)
    needed, there = math.prod(sizes.values()), len(devices)
    if on is not None and needed != there:
        got = f"{text} has {needed} devices, {on} has {there}"
        raise JropeError(f"mesh: {got}; name all of them, such as data={there}")
    if needed > there:
        nearest = _fitting(sizes, there)
        raise JropeError(
            f"mesh: {text} has {needed} devices, there are {there}; the nearest that "
            f"fits is {nearest}"
        )
    if needed < there and on is None and jax.process_count() > 1:
        raise JropeError(
            f"mesh: {text} has {needed} devices, {jax.process_count()} processes have "
            f"{there}; give a mesh of all of them, or fewer processes"
        )
    # Not jax.make_mesh, which lets two axes share one of a torus on v5e alone (0.10).
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices[:needed], allow_split_physical_axes=True
    )
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _fitting(sizes: Mapping[str, int], there: int) -> str:
    """The mesh with its largest axes halved until it has no more devices than these."""
    smaller = dict(sizes)
    while math.prod(smaller.values()) > there:
        name = max(smaller, key=lambda n: smaller[n])
        smaller[name] = max(1, smaller[name] // 2)
    return mesh_text(smaller)


def mesh_text(sizes: Mapping[Any, int]) -> str:
    """{"data": 2, "model": 4} as "data=2,model=4"."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


@final
@dataclass(frozen=True)
class Layout:
    """A mesh and what its axes split: hashable, hence a static argument of jit."""

    mesh: Mesh
    axes: Axes

    def size(self, names: Names) -> int:
        """The product of these axes' sizes."""
        return math.prod(self.mesh.shape[name] for name in names)

    def rows(self) -> PartitionSpec:
        """Of an array whose first axis is the batch."""
        return PartitionSpec(entry(self.axes.batch))

    def params(self, params: Params) -> Tree:
        """The specs of a tree of parameters."""
        return nest(self.specs(flatten(params)))

    def specs(self, flat: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """The specs of parameters by name.

        Raises:
          JropeError: the mesh cuts through groups of int4 weights.
        """
        specs = specs_of(flat, self.axes)
        for name, spec in specs.items():
            if not name.endswith(".scale") or len(spec) < 2 or spec[-1] is None:
                continue
            groups, cut = flat[name].shape[-1], spec[-1]
            parts = self.size((cut,) if isinstance(cut, str) else cut)
            if groups % parts:
                raise JropeError(
                    f"{name}: got {groups} groups of int4 inputs over {parts} devices, "
                    f"want at most {math.gcd(groups, parts)}; or take int8"
                )
        return specs

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """The spec on this mesh, written as jit writes it, which compares them so."""
        axes = [*spec]
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def map(self, function: Callable[..., Any], given: Any, returned: Any) -> Any:
        """The function on every device, for its share of arguments and results.

        `given` and `returned` hold the PartitionSpecs.  What a spec does not split
        evenly is refused by JAX, and what is returned stands as its spec says.
        """
        # The program sums where it has to, which JAX's own analysis of what differs
        # between devices would have every loop's first values annotated for.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=given,
            out_specs=returned,
            check_vma=False,
        )

    def place(self, tree: Any, specs: Any) -> Any:
        """Arrays or shapes as specs say; traced ones, too, where axes are explicit.

        Of several processes each gives the same values and keeps its devices' part.
        """

        def put(spec: PartitionSpec, part: Any) -> Any:
            return jax.tree.map(lambda x: _put(x, self.sharding(spec)), part)

        return jax.tree.map(
            put, specs, tree, is_leaf=lambda s: isinstance(s, PartitionSpec)
        )


def _put(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, Tracer):
        return jax.sharding.reshard(x, sharding)
    if isinstance(x, jax.ShapeDtypeStruct) or is_described(sharding.mesh):
        x = jax.typeof(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    there = not isinstance(sharding.mesh, AbstractMesh)  # else of a program's inside
    if there and not sharding.is_fully_addressable and not _is_global(x):
        return _from_host(x, sharding)
    return jax.device_put(x, sharding)


def _is_global(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _from_host(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that no process holds alone; `device_put` would first compare them."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _from_host(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    values = np.asarray(x)
    return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])


def readable(tree: Any) -> Any:
    """Arrays such that this process can read all of them.

    What stands on one process's devices is returned as it is; of several, all call it,
    and each of their devices has the whole of it then.
    """
    return jax.tree.map(lambda x: _replicated(x) if _is_global(x) else x, tree)


def _replicated(x: jax.Array) -> jax.Array:
    found = x.sharding
    if x.is_fully_replicated or not isinstance(found, NamedSharding):
        return x
    return jax.device_put(x, NamedSharding(found.mesh, PartitionSpec()))


def layout(mesh: Mesh, axes: Axes | None = None) -> Layout:
    """The mesh with the axes that it has; every one must split something.

    Raises:
      JropeError: an axis of the mesh that `axes` does not name.
    """
    axes = Axes() if axes is None else axes
    known = {*axes.batch, *axes.tensor, *axes.kv_heads, *axes.fsdp, *axes.context}
    if lost := [name for name in mesh.axis_names if name not in known]:
        wanted = f"axes of {', '.join(NAMES)}; or name them in jrope.Axes(batch=...)"
        raise JropeError(f"mesh: got axes {lost} that split nothing, want {wanted}")
    return Layout(mesh, axes.on(mesh.shape))


def layout_of(params: Params) -> Layout | None:
    """The mesh on which parameters stand, and its axes as they split these; or None.

    The parameters are asked, so that nobody can say otherwise than they stand: the
    axes that do not split a weight split the batch, but for the one named "context".
    Of joined matrices none tells what splits key/value heads: all but "replica".

    Raises:
      JropeError: some are placed in another way than `shard` and `load` do.
    """
    flat = flatten(params)
    embedding = flat.get("model.embed_tokens.weight")
    found = _sharding(embedding)
    if embedding is None and any(_sharding(x) is not None for x in flat.values()):
        raise JropeError("params: got a part of a tree on a mesh, want the whole tree")
    if embedding is None or found is None:
        return None
    vocabulary, width = (_split(embedding, axis) for axis in (0, 1))
    keys = [n for n in flat if n.endswith("0.self_attn.k_proj.weight")]
    kv = _split(flat[keys[0]], 0) if keys else unnamed_heads(vocabulary)
    split = {*vocabulary, *Axes().context}
    rest = tuple(n for n in found.mesh.axis_names if n not in split)
    axes = Axes(batch=rest, tensor=vocabulary, kv_heads=kv, fsdp=width)
    axes = axes.on(found.mesh.shape)
    mesh = cast(Mesh, found.mesh)  # or an abstract one, of a traced function
    there = Layout(mesh, axes)
    wanted = {name: spec_of(name, x.ndim, axes) for name, x in flat.items()}
    wrong = [
        f"{name} is {getattr(_sharding(x), 'spec', 'elsewhere')}, want {wanted[name]}"
        for name, x in flat.items()
        if not stands(x, there.sharding(wanted[name]))
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" * (len(wrong) > 1)
        raise JropeError(
            f"params: {wrong[0]}{more}; place them with jrope.shard or load(mesh=)"
        )
    return there


def stand(params: Tree, layout: Layout | None) -> Tree:
    """Parameters that were computed from some on a mesh, placed as these were."""
    return params if layout is None else layout.place(params, layout.params(params))


def stand_in_rows(tree: Any, layout: Layout | None) -> Any:
    """Arrays or shapes whose first axis is the batch, where the mesh has its rows."""
    return tree if layout is None else _all(tree, layout, layout.rows())


def stand_whole(tree: Any, layout: Layout | None) -> Any:
    """Arrays or shapes, on every device of the mesh."""
    return tree if layout is None else _all(tree, layout, PartitionSpec())


def _all(tree: Any, layout: Layout, spec: PartitionSpec) -> Any:
    return jax.tree.map(lambda x: _put(x, layout.sharding(spec)), tree)


def _sharding(x: Any) -> NamedSharding | None:
    """Where an array, or its ShapeDtypeStruct, stands; None: on no mesh, or unknown."""
    traced = isinstance(x, Tracer)
    found = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    if not isinstance(found, NamedSharding) or found.mesh.empty:
        return None
    explicit = all(kind == AxisType.Explicit for kind in found.mesh.axis_types)
    return found if explicit or not traced else None


def _split(x: Any, axis: int) -> Names:
    """The axes of the mesh, those of size 1 aside, that split an axis of an array."""
    found = _sharding(x)
    if found is None or axis >= len(found.spec):
        return ()
    names = found.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return tuple(name for name in names if found.mesh.shape[name] > 1)


def stands(x: Any, wanted: NamedSharding) -> bool:
    """Whether an array stands on that mesh and is split in that way."""
    found = _sharding(x)
    same = found is not None and found.mesh == wanted.mesh
    axes = range(x.ndim)
    want = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=wanted)
    return same and all(_split(x, axis) == _split(want, axis) for axis in axes)
