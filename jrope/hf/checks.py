"""Whether a folder's tensors are those that its configuration asks for."""

from collections.abc import Mapping
from pathlib import Path

from jrope.errors import JropeError
from jrope.hf.folders import differences
from jrope.hf.tensors import DTYPES, Tensors
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig, parameter_shapes


def checked_names(
    folder: Path, tensors: Tensors, config: LlamaConfig, *, data: bool = True
) -> list[str]:
    """The tensors to load from a folder, once its headers agree with `config`.

    Left out are tables of rotary frequencies, and the head of a tied checkpoint, which
    must equal the embedding: that alone is data, and is not looked at unless `data`.

    Raises:
      JropeError: tensors missing, left over, of wrong shape or dtype, all at once.
    """
    shapes, codes = tensors.shapes, tensors.dtypes
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= {*shapes}:
        if data and not tensors.same(EMBEDDING, HEAD):
            raise JropeError(
                f"{folder}: tie_word_embeddings is true but {HEAD} differs from "
                f"{EMBEDDING}; set it to false, or delete the tensor"
            )
        del shapes[HEAD]
    # Old checkpoints carry tables of frequencies, often rounded: never used.
    for name in [name for name in shapes if name.endswith(".rotary_emb.inv_freq")]:
        del shapes[name]
    check_tensors(str(folder), config, shapes, codes)
    return [*shapes]


def check_tensors(
    where: str,
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    codes: Mapping[str, str] | None = None,
) -> None:
    """Compare tensors with what a configuration asks for.

    Args:
      where: begins the message.
      config: names and shapes derive from it.
      shapes: name -> shape of what there is.
      codes: name -> dtype code, where dtypes are to be checked too.

    Raises:
      JropeError: one, that lists all that differs.
    """
    wanted = parameter_shapes(config)
    odd = {n: c for n, c in (codes or {}).items() if n in shapes and c not in DTYPES}
    if found := differences(wanted, shapes, odd):
        counts = f"{len(shapes)} tensors, config.json asks for {len(wanted)}"
        raise JropeError("; ".join([f"{where}: {counts}", *found]))
