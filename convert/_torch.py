"""Tensors of PyTorch's pickles, without ever running what a pickle asks for.

`torch.load(weights_only=True)` knows how to build tensors and refuses everything else.
Files are mapped into memory, so opening costs nothing and reading one tensor its size.
"""

import re
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from _common import Lazy, check_file, require, unreadable

from jrope.errors import JropeError
from jrope.hf.folders import some

_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")


def open_pickle(path: Path) -> dict[str, Lazy]:
    """Name -> tensor of a state dict, none of them read yet.

    Raises:
      JropeError: no torch; not a state dict of plain tensors; a pickle that would run
        code.
    """
    torch = require("torch", "torch --index-url https://download.pytorch.org/whl/cpu")
    check_file(path)
    state = _load(torch, path)
    if not isinstance(state, dict):
        raise JropeError(
            f"{path} holds a {type(state).__name__}, want a dictionary of tensors"
        )
    wrong = [
        f"{name} ({type(value).__name__})"
        for name, value in state.items()
        if not (isinstance(name, str) and _is_plain(torch, value))
    ]
    if wrong:
        raise JropeError(
            f"{path} must hold names and dense tensors only, but has {some(wrong)}; "
            "save the model's state_dict()"
        )
    return {name: _lazy(torch, tensor) for name, tensor in state.items()}


def _load(torch: Any, path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles older or newer than its own
            return torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),  # files older than torch 1.6 are not
            )
    except Exception as error:  # whatever a damaged or hostile file can provoke
        if found := _FORBIDDEN.search(str(error)):
            raise JropeError(
                f"{path}: refused, it is not only tensors: unpickling would call "
                f"{found[1]}; ask its author for safetensors"
            ) from None
        unreadable(path, "PyTorch weights", error)


def _is_plain(torch: Any, value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.is_quantized:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def _lazy(torch: Any, tensor: Any) -> Lazy:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Lazy(tuple(tensor.shape), dtype, partial(_read, torch, tensor))


def _read(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
