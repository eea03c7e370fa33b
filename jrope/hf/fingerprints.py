"""What a folder holds in a few hashes, to compare; no weights are read."""

import hashlib
from pathlib import Path

from jrope.hf.folders import CONFIG, companions
from jrope.hf.tensors import open_tensors


def fingerprints(folder: Path) -> dict[str, str]:
    """Hashes of config.json and tokenizer files, and of all tensors' headers.

    Equal ones: the same names, shapes, dtypes and places in files of the same names.

    Raises:
      JropeError: as `open_tensors`; a shard that is missing, by name.
    """
    tensors = hashlib.sha256()
    for name, slot in sorted(open_tensors(folder).slots.items()):
        row = (name, slot.dtype, slot.shape, slot.path.name, slot.start, slot.stop)
        tensors.update(repr(row).encode())
    files = [folder / CONFIG, *companions(folder)]
    kept = [path for path in files if not path.name.startswith(("LICENSE", "NOTICE"))]
    return {
        **{path.name: fingerprint(path.read_bytes()) for path in kept},
        "tensor headers": tensors.hexdigest()[:12],
    }


def fingerprint(data: bytes) -> str:
    """The first 12 hexadecimal digits of a hash."""
    return hashlib.sha256(data).hexdigest()[:12]
