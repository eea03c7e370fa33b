"""Prompts to token ids, and new ids to text as they come."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jrope.errors import JropeError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_TAIL = 16  # tokens of the prompt that new ones are decoded with
_UNFINISHED = "\ufffd"  # what part of a character decodes to


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """Prompts from arguments, or one from a file or standard input.

    The newline that ends a file is not part of the prompt.

    Args:
      given: the arguments.
      file: a path, "-" for standard input; None: that too, unless it is a terminal.

    Raises:
      JropeError: both or neither are given, or the file is not UTF-8.
    """
    if given and file is not None:
        raise JropeError("give prompts as arguments or --file, not both")
    if given:
        return given
    if file is None and sys.stdin.isatty():
        raise JropeError(
            "no prompt: give it as an argument (an empty one begins with the model's "
            "first token), with --file, or on standard input"
        )
    if file is None or file == "-":
        where, data = "standard input", sys.stdin.buffer.read()
    else:
        where, data = file, Path(file).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JropeError(f"{where} is not UTF-8 text: byte {error.start}") from None
    return [re.sub(r"\r?\n\Z", "", text)]


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The folder's tokenizer, through transformers; code in the folder is never run.

    Args:
      folder: of the model.
      options: for the tokenizer itself.

    Raises:
      JropeError: there is none, it cannot be read, or transformers is not installed.
    """
    if not any((folder / name).is_file() for name in _FILES):
        raise JropeError(
            f"no tokenizer in {folder}: want one of {', '.join(_FILES)}; copy it from "
            "the model's source"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise JropeError(
            f"text needs the package transformers ({error}); pip install transformers"
        ) from None
    kind = cast(Any, AutoTokenizer)
    try:
        return kind.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # tokenizers raises bare Exception for damaged files
        what = f"{type(error).__name__}: {error}"
        raise JropeError(f"{folder}: the tokenizer cannot be read: {what}") from error


def vocabulary(tokenizer: Any) -> int:
    """The largest id that the tokenizer can give, + 1."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode(
    tokenizer: Any, text: str, bos: int | None, *, chat: bool, system: str | None
) -> list[int]:
    """Token ids of a prompt: as the user's turn of a chat, or raw.

    Args:
      bos: begins a prompt that would have no tokens.
      chat: whether to use the tokenizer's chat template.
      system: the system's turn before it, if any.

    Raises:
      JropeError: text that is not Unicode, a template that fails, or no tokens at all.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JropeError("prompt: it is not valid UTF-8") from None
    if chat:
        text = _as_chat(tokenizer, text, system)
    ids: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids and bos is None:
        raise JropeError("prompt: it is empty, and the model has no bos_token_id")
    return ids or [cast(int, bos)]


def _as_chat(tokenizer: Any, text: str, system: str | None) -> str:
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": text})
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a program from the folder: whatever it raises
        raise JropeError(
            f"the chat template failed: {type(error).__name__}: {error}; --raw goes "
            "without it"
        ) from error


class Answer:
    """One prompt's continuation while it grows: ids in, finished text out.

    A token may hold a part of a character, and its leading space may show only behind
    others.  So new ids are decoded together with some before them, and the difference
    is given out when it does not end inside a character.

    Attributes:
      text: all that was given out.
      count: new tokens, the stop id included.
      finish: "stop" after a stop id or stop text, else "length".
      finite: whether the logits that its tokens were drawn from were finite numbers.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop_ids: Sequence[int] = (),
        stop_texts: Sequence[str] = (),
    ) -> None:
        self.text, self.count, self.finish, self.finite = "", 0, "length", True
        self._tokenizer = tokenizer
        self._stop_ids, self._stop_texts = {*stop_ids}, stop_texts
        self._ids = [*prompt[-_TAIL:]]
        if not (tail := self._decode(0)) or _UNFINISHED in tail:
            self._ids = [*prompt]
        self._start, self._end = 0, len(self._ids)  # decoded before, and with what
        self._held = ""  # decoded, but perhaps the beginning of a stop text
        self._cut = False  # whether a stop text was found

    def push(self, ids: Sequence[int]) -> str:
        """Take new ids; return the text that is now certain."""
        shown = ""
        for token in ids:
            if self.finish == "stop":
                break
            self.count += 1
            if token in self._stop_ids:
                self.finish = "stop"
                break
            self._ids.append(token)
            shown += self._release(self._decoded(finished=False))
        return self._given(shown)

    def end(self) -> str:
        """Return what was held back; nothing comes after."""
        rest = self._release(self._decoded(finished=True))
        return self._given(rest + self._held)

    def _decoded(self, *, finished: bool) -> str:
        """What the ids since the last time add, or nothing inside a character."""
        before = self._decode(self._start, self._end)
        now = self._decode(self._start)
        inside = now.endswith(_UNFINISHED) and not finished
        if len(now) <= len(before) or inside:
            return ""
        self._start, self._end = self._end, len(self._ids)
        return now[len(before) :]

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(
            self._ids[start:end],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def _release(self, new: str) -> str:
        """All of the text up to a stop text, or to what may become one."""
        if self._cut:
            return ""
        text, stops = self._held + new, self._stop_texts
        cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
        if cuts:
            self.finish, self._cut, self._held = "stop", True, ""
            return text[: min(cuts)]
        begun = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
        safe = len(text) - max(begun, default=0)
        self._held = text[safe:]
        return text[:safe]

    def _given(self, text: str) -> str:
        self.text += text
        return text
