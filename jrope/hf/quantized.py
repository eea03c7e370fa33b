"""Quantised checkpoints read as float ones: fp8, compressed-tensors, gptq and awq.

The quantization_config of config.json says how the weights of linear layers are stored;
which of them are is told by the tensors.  Each becomes a float tensor when it is read:

    weight = (q - zero) scale        computed in float32

then rounded to the dtype of its scale and, where another is asked for, cast.  fp8 has
no zero, and is rounded once, to the dtype asked for (None: that of config.json).  This
is what transformers (fp8) and compressed-tensors compute, bit for bit; gptq and awq
follow their formats' descriptions.  Activations, which some schemes round too, are not.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jrope.errors import JropeError
from jrope.hf.families import FAMILIES
from jrope.hf.folders import CONFIG, read_json, some
from jrope.hf.schemes import scheme_of
from jrope.hf.stored import HINT, KEY, Part, Parts, Scheme
from jrope.hf.tensors import DTYPES, Slot, Tensors, check_range, open_tensors
from jrope.model.config import LlamaConfig, parameter_shapes


class Dequantized(Tensors):
    """A folder's tensors, the quantised matrices as float ones that `read` makes.

    Attributes:
      matrices: name -> the names of the tensors that hold it, by their last words.
      scheme: how they do.
    """

    def __init__(
        self,
        stored: Tensors,
        slots: Mapping[str, Slot],
        matrices: Mapping[str, Mapping[str, str]],
        scheme: Scheme,
    ) -> None:
        super().__init__(slots)
        self.matrices, self._stored, self.scheme = dict(matrices), stored, scheme

    def read(
        self,
        name: str,
        dtype: np.dtype[Any] | None = None,
        part: tuple[slice, ...] | None = None,
    ) -> np.ndarray:
        """As `Tensors.read`; of a quantised matrix all is read, whatever the part."""
        if name not in self.matrices:
            return super().read(name, dtype, part)
        values = self.of_stored(name, self.scheme.widened)
        stored = DTYPES[self.slots[name].dtype]
        steps = [stored] if self.scheme.rounds or dtype is None else []
        for step in [*steps, dtype or stored]:
            wide = values
            with np.errstate(all="ignore"):  # too large is found below
                values = wide.astype(step, copy=False)
            check_range(name, wide, values)
        return values if part is None else np.ascontiguousarray(values[part])

    def of_stored(self, name: str, take: Part) -> np.ndarray:
        """What `take` makes of the tensors that hold a quantised matrix."""
        names, (out, width) = self.matrices[name], self.slots[name].shape
        try:
            return take(lambda leaf: self._stored.raw(names[leaf]), (out, width))
        except JropeError as error:
            raise JropeError(f"{name}: {error}") from None

    def same(self, first: str, second: str) -> bool:
        """As `Tensors.same`, of the float matrices."""
        if not {first, second} & {*self.matrices}:
            return super().same(first, second)
        return np.array_equal(self.read(first), self.read(second))


def is_quantized_folder(folder: Path) -> bool:
    """Whether config.json says that weights are stored quantised."""
    path = folder / CONFIG
    return path.is_file() and read_json(path).get(KEY) is not None


def without_quantization(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as that of the float model.

    Raises:
      JropeError: its quantization_config is none that is read.
    """
    if config_json.get(KEY) is not None:
        scheme_of(config_json[KEY])
    return {key: value for key, value in config_json.items() if key != KEY}


def open_dequantized(folder: Path, config: LlamaConfig) -> Tensors:
    """`open_tensors`, where matrices that are stored quantised appear as float ones.

    Raises:
      JropeError: as `open_tensors`; or a quantised matrix with parts missing, or of
        another shape or dtype than its scheme says.
    """
    stored, config_json = open_tensors(folder), read_json(folder / CONFIG)
    if config_json.get(KEY) is None:
        return stored
    scheme = scheme_of(config_json[KEY])
    if FAMILIES[config.model_type].joined:
        raise JropeError(
            f"{folder}: quantised weights of model_type {config.model_type!r}, which "
            f"joins q, k and v, are not read; {HINT}"
        )
    own = config_json.get("dtype", config_json.get("torch_dtype"))
    own = next((code for code, dtype in DTYPES.items() if dtype.name == own), None)
    slots, matrices = dict(stored.slots), dict[str, dict[str, str]]()
    problems: list[str] = []
    for name, shape in _candidates(stored, config, scheme).items():
        module = name.removesuffix(".weight")
        names, found = _parts_of(stored, module, scheme.parts(*shape))
        problems += found
        if found:
            continue
        path, code = slots[names[scheme.main]].path, slots[names[scheme.scale]].dtype
        for whole in [*names.values(), *(f"{module}.{word}" for word in scheme.unread)]:
            slots.pop(whole, None)
        code = code if scheme.rounds else own or code
        size = math.prod(shape) * DTYPES[code].itemsize
        slots[name], matrices[name] = Slot(code, shape, path, 0, size), names
    if problems:
        raise JropeError(f"{folder}: {some(problems, '; ')}; download it again")
    return Dequantized(stored, slots, matrices, scheme)


def _candidates(
    stored: Tensors, config: LlamaConfig, scheme: Scheme
) -> dict[str, tuple[int, int]]:
    """Matrices of the model of which the folder holds the integers or the scale."""
    layers = min(config.num_hidden_layers, len(stored.slots))
    found: dict[str, tuple[int, int]] = {}
    for name, shape in parameter_shapes(config, layers=layers).items():
        module, _, leaf = name.rpartition(".")
        main = stored.slots.get(f"{module}.{scheme.main}")
        packed = main is not None and main.dtype not in DTYPES
        stands = packed or f"{module}.{scheme.scale}" in stored.slots
        if leaf == "weight" and len(shape) == 2 and stands:
            found[name] = (shape[0], shape[1])
    return found


def _parts_of(
    stored: Tensors,
    module: str,
    wanted: Parts,
) -> tuple[dict[str, str], list[str]]:
    """The names of a matrix's tensors, and what is wrong with them."""
    names = {leaf: f"{module}.{leaf}" for leaf in wanted}
    problems: list[str] = []
    if "weight" not in wanted and f"{module}.weight" in stored.slots:
        problems.append(f"{module}.weight is there beside {', '.join(wanted)}")
    for leaf, (codes, shapes) in wanted.items():
        slot = stored.slots.get(names[leaf])
        if slot is None:
            problems.append(f"{names[leaf]} is missing")
        elif slot.dtype not in codes or slot.shape not in shapes:
            got = f"{slot.dtype} {list(slot.shape)}"
            want = f"{' or '.join(codes)} {' or '.join(str(list(s)) for s in shapes)}"
            problems.append(f"{names[leaf]} is {got}, want {want}")
    return names, problems
