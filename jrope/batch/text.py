"""Prompts to token ids, and new ids back to text, up to the first stop text."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from jrope.batch.fields import check_ids
from jrope.errors import RowError, want
from jrope.model.config import LlamaConfig

_TAIL = 16  # tokens of the prompt that new ones are decoded with
_UNFINISHED = "\ufffd"  # what part of a character decodes to


def prompt_ids(
    name: str, prompt: Any, tokenizer: Any, config: LlamaConfig
) -> list[int]:
    """Ids of a prompt that is text, or ids already.

    Raises:
      RowError: it is neither, is no Unicode, is empty, or lies outside the vocabulary.
    """
    ids = prompt
    if isinstance(prompt, str):
        ids = _encode(name, prompt, tokenizer, special=True)
        bos = config.bos_token_id  # maybe 0
        ids = ids if ids or bos is None else [bos]
    check_ids(name, ids, config)
    if not ids:
        raise RowError(f"{name}: it is empty")
    return ids


def chat_ids(messages: Any, tokenizer: Any, config: LlamaConfig) -> list[int]:
    """Ids of a conversation, by the tokenizer's chat template, as the model answers.

    Raises:
      RowError: it is no list of turns with texts, or the template fails.
    """
    good = isinstance(messages, list) and messages
    want(bool(good), "messages", messages, "a list of {role, content}, not empty")
    turns = [_turn(message) for message in messages]
    if not tokenizer.chat_template:
        raise RowError("messages: this model's tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a program from the folder: whatever it raises
        what = f"{type(error).__name__}: {error}"
        raise RowError(f"messages: the chat template failed: {what}") from None
    ids = _encode("messages", text, tokenizer, special=False)
    check_ids("messages", ids, config)
    if not ids:
        raise RowError("messages: the chat template makes no tokens of them")
    return ids


def _turn(message: Any) -> dict[str, Any]:
    good = isinstance(message, dict) and {*message} <= {"role", "content", "name"}
    want(good, "messages", message, "{role, content} alone")
    given = {name: value for name, value in message.items() if value is not None}
    content: Any = given.get("content")
    if isinstance(content, list):  # in parts
        text: list[Any] = [p.get("text") for p in content if isinstance(p, dict)]
        good = len(text) == len(content) and all(isinstance(t, str) for t in text)
        want(good, "messages", content, "parts of text only")
        content = "".join(text)
    good = isinstance(content, str) and isinstance(given.get("role"), str)
    want(good, "messages", message, "texts as role and content")
    return given | {"content": content}


def _encode(name: str, text: str, tokenizer: Any, *, special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"{name}: it is no Unicode: half of a surrogate pair") from None
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def decode(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that new tokens add to a prompt.

    They are decoded behind the prompt's last ones: a token's leading space may show
    only behind others.
    """
    tail = [*prompt[-_TAIL:]]
    before = _text(tokenizer, tail)
    if not before or _UNFINISHED in before:
        tail = [*prompt]
        before = _text(tokenizer, tail)
    return _text(tokenizer, [*tail, *tokens])[len(before) :]


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token inside a text; U+FFFD for parts of characters."""
    both = _text(tokenizer, [token, token], skip=False)
    return both[len(_text(tokenizer, [token], skip=False)) :]


def _text(tokenizer: Any, ids: Sequence[int], *, skip: bool = True) -> str:
    return tokenizer.decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )


def first_stop(text: str, stops: Sequence[str], least: int = 0) -> int | None:
    """Where the first of the stop texts begins that ends behind `least` characters."""
    found = (text.find(s, max(least + 1 - len(s), 0)) for s in stops)
    return min((at for at in found if at >= 0), default=None)


def early_text(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], least: int
) -> int:
    """How long the text is of the first tokens, in which no stop text counts.

    Without a last character of which only some bytes are there.
    """
    if not least:
        return 0
    return len(decode(tokenizer, prompt, tokens[:least]).rstrip(_UNFINISHED))


def tokens_to_stop(
    tokenizer: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stops: Sequence[str],
    least: int = 0,
) -> int | None:
    """How many tokens it takes to complete a stop text; None: they hold none.

    The same number whenever one looks, hence the same answer for any chunk.  One that
    the first `least` tokens complete does not count.
    """
    if not stops or len(tokens) <= least:
        return None
    early = early_text(tokenizer, prompt, tokens, least)

    def complete(count: int) -> bool:
        text = decode(tokenizer, prompt, tokens[:count])
        return first_stop(text, stops, early) is not None

    if not complete(len(tokens)):
        return None
    every = range(len(tokens))
    return bisect_left(every, True, lo=min(least + 1, len(tokens)), key=complete)
