"""Hugging Face folders in and out: weights, config.json, and what lies beside them.

Loading checks every name, shape and dtype before it reads a byte of data; then it reads
one tensor at a time, straight to the device (before an accelerator eight at once): host
memory beyond the parameters stays at one tensor (at eight).  Saving is a stream as
well, and the folder appears whole or not at all.  No torch.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jrope.errors import JropeError
from jrope.hf import config_from_hf, config_to_hf
from jrope.hf.adapters import open_adapter
from jrope.hf.checks import check_tensors, open_checked, totals
from jrope.hf.folders import (
    CONFIG,
    GENERATION,
    PathLike,
    check_extras,
    check_target,
    find_folder,
    read_json,
    some,
)
from jrope.hf.held import Held, held
from jrope.hf.joined import join, split_shapes
from jrope.hf.placing import to_mesh
from jrope.hf.quantized import without_quantization
from jrope.hf.replacing import replacing
from jrope.hf.shards import CODES, ShardWriter, most_bytes, write_json
from jrope.hf.tensors import DTYPES, Tensors, open_tensors
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.model.placed import layout_on, shard
from jrope.sharding.axes import Axes
from jrope.tree import Params, Tree, flatten, nest
from jrope.weights.int8 import Quantization, is_quantized, keeper

__all__ = [
    "Tensors",
    "load",
    "open_tensors",
    "read_config",
    "read_llama_config",
    "save",
    "write_folder",
]

Progress: TypeAlias = Callable[[str, int], None]
Keep: TypeAlias = Callable[[str, jax.Array], dict[str, jax.Array]]

SHARD_SIZE = 5 * 2**30
READERS = 8  # one alone reads and copies at a fraction of what a GPU's link carries


def load(
    path_or_repo: PathLike,
    dtype: DTypeLike | None = None,
    *,
    revision: str | None = None,
    adapter: PathLike | None = None,
    quantize: Quantization | None = None,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    check_finite: bool = False,
    progress: Progress | None = None,
) -> tuple[Tree, LlamaConfig]:
    """Load a LLaMA from a Hugging Face folder or hub repository.

    Host memory beyond the parameters: 32 MiB, and one tensor where JAX must copy it;
    before an accelerator eight tensors, each of which a thread reads and copies.

    Args:
      path_or_repo: a folder with config.json and safetensors, or a hub id.
      dtype: float32, bfloat16 or float16 (a name or a dtype) to cast to; None keeps
        each tensor's own.
      revision: branch, tag or commit of a hub repository.
      adapter: a LoRA adapter of PEFT, a folder or a hub id, to merge as the weights
        arrive (after `dtype`), see `adapters.open_adapter`; `save` writes the sum.
      quantize: "int8" or "int4" for `jrope.quantize` of each tensor, on the device, as
        it arrives (after `dtype`); memory is that of the quantised tree and one tensor
        (or eight).  Of a folder with 4-bit matrices "int4" keeps those, see `Held`, and
        what it holds as floats stays that.
      mesh: of `jrope.mesh`, or any other: every part is read once and goes straight to
        the devices that hold it, see `jrope.shard`; what is said above of tensors holds
        of parts.
      axes: as in `jrope.shard`.
      check_finite: look on the device at every tensor as it arrives, and refuse NaN and
        infinity; each is read once more, from the device's own memory.
      progress: called with the name and bytes of each tensor that has arrived.

    Returns:
      The parameter tree, of jax arrays, and the configuration.  Where
      generation_config.json names eos ids, they are the configuration's.

    Raises:
      JropeError: anything missing, left over, damaged, or not understood; with
        `check_finite`, all tensors with a NaN or an infinity, by name; an adapter for
        4-bit matrices that are kept.

    >>> params, config = load("path/to/hf-folder", dtype="bfloat16")  # doctest: +SKIP
    """
    wanted = _dtype(dtype)
    folder = find_folder(path_or_repo, revision)
    config = read_llama_config(folder)
    there = None if mesh is None else layout_on(mesh, config, axes)
    tensors, names, keep = _opened(folder, config, quantize)
    if adapter is not None and isinstance(tensors, Held):
        hint = "leave quantize out, or take 'int8'"
        raise JropeError(f"{folder}: an adapter cannot change 4-bit weights; {hint}")
    lora = None if adapter is None else open_adapter(adapter, config)
    finite: dict[str, jax.Array] = {}

    def arrived(name: str, array: jax.Array) -> dict[str, jax.Array]:
        array = array if lora is None else lora.merged(name, array)
        if check_finite:
            finite[name] = _is_finite(array)
        kept = keep(name, array)
        return kept if there is None else there.place(kept, there.specs(kept))

    # Of several processes each runs the same programs in the same order.
    computes = check_finite or quantize is not None or lora is not None
    ordered = jax.process_count() > 1 and computes
    put = partial(_to_device if there is None else partial(to_mesh, there), tensors)
    params: dict[str, jax.Array] = {}
    for name, (kept, size) in zip(
        names, _arrivals(put, names, wanted, arrived, ordered), strict=True
    ):
        params |= kept
        if progress is not None:
            progress(name, size)
    good = jax.device_get(finite)
    if bad := [name for name in names if not good.get(name, True)]:
        raise JropeError(
            f"{folder}: NaN or infinity in {len(bad)} of {len(names)} tensors: "
            f"{some(bad)}; the training diverged or a conversion overflowed, take "
            "another checkpoint"
        )
    return nest(params), config


def load_shapes(
    path_or_repo: PathLike,
    dtype: DTypeLike | None = None,
    *,
    revision: str | None = None,
    quantize: Quantization | None = None,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
) -> tuple[Tree, LlamaConfig]:
    """What `load` gives for the same arguments, with a ShapeDtypeStruct for each array.

    Reads and checks headers only: to compile, or to plan memory, before the weights.
    """
    folder = find_folder(path_or_repo, revision)
    config = read_llama_config(folder)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    tensors, names, keep = _opened(folder, config, quantize, data=False)
    for name, plain in _arriving(tensors, names, dtype).items():
        shapes |= jax.eval_shape(partial(keep, name), plain)
    tree = nest(shapes)
    return (tree if mesh is None else shard(tree, mesh, config, axes)), config


def arriving_shapes(
    folder: Path,
    dtype: DTypeLike | None = None,
    quantize: Quantization | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `load` reads of a folder, by name, before it quantises anything."""
    config = read_llama_config(folder)
    tensors, names, _ = _opened(folder, config, quantize, data=False)
    return _arriving(tensors, names, dtype)


def _opened(
    folder: Path,
    config: LlamaConfig,
    quantize: Quantization | None,
    *,
    data: bool = True,
) -> tuple[Tensors, list[str], Keep]:
    """The tensors to load, their names, and what to keep of each that arrives."""
    tensors, names = open_checked(folder, config, data=data)
    if quantize == "int4" and (kept := held(tensors, names)) is not None:
        return kept, kept.names, keeper(config, None)
    return tensors, names, keeper(config, quantize)


def _arriving(
    tensors: Tensors, names: Sequence[str], dtype: DTypeLike | None
) -> dict[str, jax.ShapeDtypeStruct]:
    wanted, shapes = _dtype(dtype), tensors.shapes
    return {
        name: jax.ShapeDtypeStruct(shapes[name], tensors.dtype(name, wanted))
        for name in names
    }


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    """One pass that keeps nothing: x - x is 0, or NaN where x is not finite.

    XLA's maximum may lose a NaN, and on a CPU it writes out what isfinite gives.
    """
    return jnp.sum(array - array) == 0


def _to_device(tensors: Tensors, name: str, dtype: np.dtype[Any] | None) -> jax.Array:
    return jax.device_put(tensors.read(name, dtype))


def _arrivals(
    put: Callable[[str, np.dtype[Any] | None], jax.Array],
    names: Sequence[str],
    dtype: np.dtype[Any] | None,
    keep: Keep,
    ordered: bool,
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """What is kept of every tensor, on the device, in order; and the bytes it had.

    Before an accelerator several are read, copied and reduced at once, unless ordered.
    """

    def fetch(name: str) -> tuple[dict[str, jax.Array], int]:
        array = put(name, dtype).block_until_ready()
        jax.device_put(np.zeros(0, np.int8))  # now JAX drops the last host buffer
        return keep(name, array), array.nbytes

    if ordered or jax.default_backend() == "cpu":  # where the arrays stay
        yield from map(fetch, names)
        return
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for arriving in [pool.submit(fetch, name) for name in names]:
                yield arriving.result()
        finally:  # after an error, and when nobody takes the next one
            pool.shutdown(wait=False, cancel_futures=True)


def save(
    folder: PathLike,
    params: Params,
    config: LlamaConfig,
    *,
    max_shard_size: int = SHARD_SIZE,
    extra_files: Iterable[PathLike] = (),
    progress: Progress | None = None,
) -> Path:
    """Write a Hugging Face folder that transformers 4.57 and 5 and `load` read.

    Args:
      folder: must not exist, be empty, or hold a checkpoint, which is then replaced.
      params: the parameter tree; every array keeps its dtype.
      config: says which arrays, of which shapes, there must be.
      max_shard_size: bytes of one file, unless a single tensor has more.
      extra_files: copied beside the weights: tokenizer, generation_config.json.
      progress: called with the name and bytes of each tensor that was written.

    Returns:
      The folder.

    Raises:
      JropeError: arrays missing, left over, of wrong shape or dtype, all at once;
        quantised ones; a configuration without words in Hugging Face; a folder with
        other files in it.
    """
    if is_quantized(params):
        hint = "`jrope.dequantize` them first; what rounding lost stays lost"
        raise JropeError(f"cannot save {folder}: quantised parameters; {hint}")
    flat = flatten(params)
    if not all(getattr(x, "is_fully_addressable", True) for x in flat.values()):
        hint = "load them in one process to save them"
        raise JropeError(f"cannot save {folder}: several processes hold them; {hint}")
    shapes = {name: tuple(np.shape(array)) for name, array in flat.items()}
    dtypes = {name: np.dtype(array.dtype) for name, array in flat.items()}
    codes = {name: CODES.get(d, str(d)) for name, d in dtypes.items()}
    check_tensors(f"cannot save {folder}", config, shapes, codes)
    kinds = {dtype.name for dtype in dtypes.values()}
    return write_folder(
        folder,
        config_to_hf(config, dtype=kinds.pop() if len(kinds) == 1 else "float32"),
        ((name, _on_host(flat[name])) for name in parameter_shapes(config)),
        nbytes=sum(math.prod(shapes[n]) * dtypes[n].itemsize for n in shapes),
        max_shard_size=max_shard_size,
        extra_files=extra_files,
        progress=progress,
    )


def write_folder(
    folder: PathLike,
    config_json: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    nbytes: int | None = None,
    max_shard_size: int = SHARD_SIZE,
    extra_files: Iterable[PathLike] = (),
    progress: Progress | None = None,
) -> Path:
    """Write a Hugging Face folder from a stream of tensors, holding one at a time.

    Args:
      folder, max_shard_size, extra_files, progress: as in `save`.
      config_json: the config.json, which must describe a LLaMA that we can read.
      tensors: names of `parameter_shapes` and float32, float16 or bfloat16 arrays, in
        any order.
      nbytes: of all tensors together, to know before the first whether the disk has
        room; None: at least two bytes for each of their elements.

    Returns:
      The folder.

    Raises:
      JropeError: as `save`; tensors missing or left over are found at the end, and then
        nothing is written.
    """
    config = config_from_hf(config_json)
    target = Path(folder).expanduser().resolve()
    extras = [Path(path).expanduser() for path in extra_files]
    if max_shard_size < 1:
        raise JropeError(f"max_shard_size is {max_shard_size}, want bytes, at least 1")
    check_extras(extras)
    check_target(target, {path.name for path in extras})
    least = 2 * totals(config)[1] if nbytes is None else nbytes
    needed = most_bytes(least, max_shard_size)
    needed += sum(path.stat().st_size for path in extras)
    with (
        replacing(target, needed) as fresh,
        ShardWriter(fresh, max_shard_size) as writer,
    ):
        for name, array in join(tensors, config):
            writer.add(name, array)
            if progress is not None:
                progress(name, array.nbytes)
            del array  # before the next one is made
        shapes = split_shapes(writer.shapes, config)
        check_tensors(f"cannot write {target}", config, shapes)
        writer.finish()
        write_json(fresh / CONFIG, config_json)
        for path in extras:
            shutil.copyfile(path, fresh / path.name)
    return target


def read_config(folder: PathLike) -> dict[str, Any]:
    """Read a folder's config.json as it stands.

    Raises:
      JropeError: there is none, or it is not a JSON object.
    """
    return read_json(Path(folder) / CONFIG)


def read_llama_config(folder: PathLike) -> LlamaConfig:
    """Read config.json, and the stop ids of generation_config.json where it has them.

    Raises:
      JropeError: as `read_config` and `hf.config_from_hf`, naming the file.
    """
    folder = Path(folder)
    config, extra = read_config(folder), folder / GENERATION
    if extra.is_file() and (eos := read_json(extra).get("eos_token_id")) is not None:
        config["eos_token_id"] = eos
    try:
        return config_from_hf(without_quantization(config))
    except JropeError as error:
        raise JropeError(f"{folder / CONFIG}: {error}") from None


def _dtype(dtype: Any) -> np.dtype[Any] | None:
    if dtype is None:
        return None
    known = {dtype.name: dtype for dtype in DTYPES.values()}
    try:
        return known[jnp.dtype(dtype).name]
    except (TypeError, KeyError):
        wanted = ", ".join(known)
        raise JropeError(f"dtype is {dtype!r}, want None or one of {wanted}") from None


def _on_host(array: Any) -> np.ndarray:
    """One array's values; a copy on an accelerator, for the original keeps a cache."""
    if isinstance(array, jax.Array) and jax.default_backend() != "cpu":
        array = jnp.copy(array)
    return np.asarray(array)
