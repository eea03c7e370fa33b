"""The bytes that every token of a vocabulary stands for in an answer."""

import json
import re
from typing import Any

from jrope.errors import RowError
from jrope.model.config import LlamaConfig

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # of sentencepiece


def token_bytes(tokenizer: Any, config: LlamaConfig) -> list[bytes]:
    """The bytes of every id of the model; none for special ones, and those of no token.

    Raises:
      RowError: the tokenizer's tokens stand neither for bytes nor for sentencepiece's
        pieces.
    """
    kinds = _decoders(tokenizer)
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace", "Replace"}:
        got = f"a tokenizer that decodes by {', '.join(sorted(kinds)) or 'nothing'}"
        wanted = "byte-level tokens or sentencepiece's"
        raise RowError(f"structured output: got {got}, want {wanted}", "unsupported")
    found = {id: _spelt(token, kinds) for token, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder.items()
    special = {id for id, token in added if token.special}
    special |= {*tokenizer.all_special_ids, *config.eos_token_id}
    found |= dict.fromkeys(special, b"")
    return [found.get(id, b"") for id in range(config.vocab_size)]


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of the steps by which tokens become text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return set()
    told: Any = json.loads(decoder.__getstate__())
    return {step["type"] for step in told.get("decoders", [told])}


def _spelt(token: str, kinds: set[str]) -> bytes:
    """What a token adds to a text, by decoders of these kinds."""
    if "ByteLevel" in kinds:  # every byte is a letter, or none is
        whole = all(letter in _BYTES for letter in token)
        return bytes(_BYTES[letter] for letter in token) if whole else token.encode()
    if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)) is not None:
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _letters() -> list[str]:
    """The letter of each byte: itself if it prints, else one of those from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


_BYTES = {letter: byte for byte, letter in enumerate(_letters())}
