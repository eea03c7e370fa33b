"""A line of the input as a row: prompts as ids, and how they are to be answered."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

from jrope.batch.fields import (
    SERVED,
    UNSERVED,
    Request,
    read_request,
    refuse_unknown,
    refuse_unserved,
)
from jrope.batch.source import Line
from jrope.batch.text import chat_ids, prompt_ids
from jrope.errors import RowError, refuse, want
from jrope.forms.cache import Forms
from jrope.forms.request import NAMES
from jrope.forms.spelling import token_bytes
from jrope.forms.structure import Structure
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig

Form: TypeAlias = Literal["chat", "completions", "embeddings", "plain"]
URLS: dict[str, Form] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
# New tokens of rows that name no limit, where the model's length has room for them.
_USUAL = {"chat": 2**30, "completions": 16, "embeddings": 0, "plain": 256}
_ENVELOPE = {"custom_id", "method", "url", "body"}
_PROMPTS = ("prompt", "messages", "token_ids")
ANSWER_FIELDS = (  # of plain rows
    *("request_id", "generated_text", "generated_tokens", "num_input_tokens"),
    *("num_generated_tokens", "finish_reason", "logprobs", "error", "line"),
)


@final
@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What all rows share.

    Args:
      tokenizer: of transformers.
      config: of the model.
      model: its name in the answers.
      max_length: tokens of a row, prompt and new ones together; None:
        max_position_embeddings.
      sampler: what plain rows do not say.
      api_sampler: what rows in OpenAI's format do not say.
      max_new_tokens: of rows that name no limit; None: what their format has.
      created: seconds since 1970, in the answers.
      forms: the tables of rows whose answers have a form, made as rows ask for them.
    """

    tokenizer: Any
    config: LlamaConfig
    model: str = "jrope"
    max_length: int | None = None
    sampler: Sampler = field(default_factory=Sampler)
    api_sampler: Sampler = field(default_factory=lambda: Sampler(temperature=1.0))
    max_new_tokens: int | None = None
    created: int = 0
    forms: Forms = field(default_factory=Forms, repr=False, compare=False)


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """A row to answer.

    Args:
      line: where it comes from.
      form: the shape of its answer.
      prompts: ids, most often of one prompt.
      request: how to answer.
      limits: new tokens at most, for each prompt.
      extra: fields of a plain row that its answer repeats; `encoding_format`.
      structure: the form of its answers.
    """

    line: Line
    form: Form
    prompts: list[list[int]]
    request: Request
    limits: list[int]
    extra: dict[str, Any]
    structure: Structure | None = None


def read_row(line: Line, settings: BatchSettings) -> Row:
    """Read a row.

    Raises:
      RowError: whatever is wrong with it, and nothing else.
    """
    try:
        if line.problem is not None:
            raise RowError(line.problem, "invalid_json")
        return (_read_api if is_api(line) else _read_plain)(line, settings)
    except RowError:
        raise
    except Exception as error:  # of the tokenizer's, say: one row must not end the rest
        what = f"unexpected {type(error).__name__}: {error}"
        raise RowError(what, "internal_error") from error


def is_api(line: Line) -> bool:
    """Whether a line is in OpenAI's format; one that cannot be read counts as such."""
    names = {*line.fields}
    inside = names & _ENVELOPE - {"custom_id"} and names.isdisjoint(_PROMPTS)
    return line.problem is not None or bool(inside)


def _read_api(line: Line, settings: BatchSettings) -> Row:
    given = line.fields
    if names := [name for name in given if name not in _ENVELOPE]:
        raise RowError(f"{', '.join(map(repr, names[:8]))}: no such field beside body")
    url: Any = given.get("url")
    body: Any = given.get("body")
    name, method = given.get("custom_id"), given.get("method", "POST")
    want(isinstance(name, str), "custom_id", name, "a text")
    want(method == "POST", "method", method, "POST")
    want(isinstance(url, str) and url in URLS, "url", url, " or ".join(URLS))
    want(isinstance(body, dict), "body", body, "an object")
    form, body = URLS[url], _without_nulls(body)
    prompts, own = _api_prompts(form, body, settings)
    refuse_unserved(body)
    refuse_unknown(body, own)
    extra = dict[str, Any]()
    if form == "embeddings":
        extra["encoding_format"] = kind = body.get("encoding_format", "float")
        want(kind in ("float", "base64"), "encoding_format", kind, "float or base64")
    return _row(line, form, prompts, body, extra, settings)


def _api_prompts(
    form: Form, body: dict[str, Any], settings: BatchSettings
) -> tuple[list[list[int]], set[str]]:
    """The prompts, and the names of the fields that are this form's own."""
    tokenizer, config = settings.tokenizer, settings.config
    if form == "chat":
        ids = chat_ids(body.get("messages"), tokenizer, config)
        asked = body.get("logprobs", False)
        want(isinstance(asked, bool), "logprobs", asked, "true or false")
        return [ids], {"messages"}
    name = "prompt" if form == "completions" else "input"
    given: Any = body.get(name)
    several = isinstance(given, list) and given and isinstance(given[0], str | list)
    prompts: list[Any] = given if several else [given]
    ids = [prompt_ids(name, p, tokenizer, config) for p in prompts]
    return ids, {name} if form == "completions" else {name, "encoding_format"}


def _read_plain(line: Line, settings: BatchSettings) -> Row:
    given = _without_nulls(line.fields)
    names = [name for name in _PROMPTS if name in given]
    want(len(names) == 1, "a row", names or [*given], f"one of {', '.join(_PROMPTS)}")
    if taken := [
        name for name in ANSWER_FIELDS if name in given and name != "logprobs"
    ]:
        raise RowError(f"{', '.join(taken)}: its answer has fields of this name")
    name = given.get("custom_id", "")
    want(isinstance(name, str), "custom_id", name, "a text")
    prompt, tokenizer, config = given[names[0]], settings.tokenizer, settings.config
    if names[0] == "messages":
        ids = chat_ids(prompt, tokenizer, config)
    else:
        kind = str if names[0] == "prompt" else list
        wanted = "a text" if kind is str else "a list of token ids"
        want(isinstance(prompt, kind), names[0], prompt, wanted)
        ids = prompt_ids(names[0], prompt, tokenizer, config)
    return _row(line, "plain", [ids], given, passed_through(line), settings)


def passed_through(line: Line) -> dict[str, Any]:
    """The fields of a plain row that its answer repeats.

    Raises:
      RowError: JSON cannot hold them.
    """
    known = {*_PROMPTS, *SERVED, *UNSERVED}
    extra = {name: value for name, value in line.fields.items() if name not in known}
    try:
        json.dumps(extra, allow_nan=False)
    except (ValueError, RecursionError):
        raise RowError("NaN, Infinity and the like are not JSON") from None
    return extra


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _row(
    line: Line,
    form: Form,
    prompts: list[list[int]],
    given: dict[str, Any],
    extra: dict[str, Any],
    settings: BatchSettings,
) -> Row:
    default = settings.sampler if form == "plain" else settings.api_sampler
    seed = int(line.id[:8], 16)
    request = read_request(given, default, seed, settings.config)
    tokenizer, config = settings.tokenizer, settings.config
    structure = settings.forms.of(
        given, request.stop_ids, lambda: token_bytes(tokenizer, config)
    )
    if structure is not None and form == "embeddings":
        refuse([name for name in NAMES if name in given], " where no text is answered")
    usual = settings.max_new_tokens or _USUAL[form]
    longest = settings.max_length or settings.config.max_position_embeddings
    limits = list[int]()
    for prompt in prompts:
        room, least = longest - len(prompt), 0 if form == "embeddings" else 1
        asked = least if request.limit is None else request.limit
        if room < asked:
            got = f"a prompt of {len(prompt)} and max_tokens {asked}"
            raise RowError(f"{got} exceed the {longest} tokens of a row", "too_long")
        limit = min(usual, room) if request.limit is None else asked
        if request.min_tokens > limit:
            got = f"min_tokens: got {request.min_tokens}"
            raise RowError(f"{got}, want at most the {limit} new tokens of the row")
        limits.append(limit)
    return Row(
        line=line,
        form=form,
        prompts=prompts,
        request=request,
        limits=limits,
        extra=extra,
        structure=structure,
    )
