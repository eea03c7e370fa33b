"""A folder as other tools want it: weights, configuration and tokenizer at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from jrope.cli.common import parse_rope
from jrope.cli.loading import Loading
from jrope.cli.text import load_tokenizer
from jrope.hf.checkpoint import read_llama_config
from jrope.hf.folders import PathLike, find_folder
from jrope.model.config import LlamaConfig
from jrope.model.with_rope import with_rope
from jrope.tree import Params
from jrope.weights.int8 import Quantization


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """What `open_model` gives."""

    folder: Path
    params: Params
    config: LlamaConfig
    tokenizer: Any


def open_model(
    path_or_repo: PathLike,
    *,
    dtype: str | None = None,
    rope: str | None = None,
    quantize: Quantization | None = None,
    adapter: PathLike | None = None,
    **tokenizer: Any,
) -> Loaded:
    """Load a Hugging Face folder or hub id, arranged to decode several rows at once.

    Args:
      path_or_repo, quantize, adapter: as in `jrope.load`.
      dtype: to cast to; None or "auto": as the file has them.
      rope: another rotary embedding, as `jrope --rope` takes it; None: the folder's.
      tokenizer: options of the tokenizer.
    """
    folder = find_folder(path_or_repo, None)
    config = read_llama_config(folder)
    if rope is not None:
        name, fields = parse_rope(rope)
        config = with_rope(config, name, **fields)
    words = load_tokenizer(folder, **tokenizer)
    dtype = None if dtype == "auto" else dtype
    with Loading(folder, dtype, quantize, adapter=adapter, rows=2) as loading:
        loading.show()
        params, _ = loading.wait()
    return Loaded(folder=folder, params=params, config=config, tokenizer=words)
