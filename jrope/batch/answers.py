"""What came of a row as a record: in OpenAI's shapes, or with a plain row's fields."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np

from jrope.batch.rows import ANSWER_FIELDS, BatchSettings, Row, is_api, passed_through
from jrope.batch.source import Line
from jrope.batch.text import (
    decode,
    early_text,
    first_stop,
    token_text,
    tokens_to_stop,
)
from jrope.batch.work import Finished
from jrope.errors import RowError

Record: TypeAlias = dict[str, Any]
PREFIX = "batch_req_"
_LEAST = -9999.0  # what the API says for a probability of 0


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer to one prompt: its text, its tokens, and their log-probabilities."""

    text: str
    tokens: list[int]
    finish_reason: str
    scores: list[Record] | None


def failure(line: Line, error: RowError) -> Record:
    """The record of a row that cannot be answered."""
    name, told = PREFIX + line.id, {"code": error.code, "message": str(error)}
    rest = {"line": line.number, "error": told}
    if is_api(line):
        return {"id": name, "custom_id": line.custom_id, "response": None, **rest}
    try:
        own = passed_through(line)
    except RowError:
        own = {}
    own = {name: value for name, value in own.items() if name not in ANSWER_FIELDS}
    return {**own, "custom_id": line.custom_id, "request_id": name, **rest}


def answer(row: Row, finished: Sequence[Finished], settings: BatchSettings) -> Record:
    """The record of an answered row.

    Args:
      finished: n for the first prompt, n for the second, ...

    Raises:
      RowError: a logit was not finite.
    """
    if not all(one.finite for one in finished):
        why = "weights hold a NaN, or float16 overflowed, which bfloat16 does not"
        raise RowError(f"a logit was not a finite number: {why}", "not_finite")
    prompts = [prompt for prompt in row.prompts for _ in range(row.request.n)]
    pairs = zip(prompts, finished, strict=True)
    choices = [_choice(row, prompt, one, settings) for prompt, one in pairs]
    if row.form == "plain":
        return _plain(row, choices)
    made, wanted = sum(len(c.tokens) for c in choices), sum(map(len, row.prompts))
    shape, shown, kind = {
        "chat": ("chatcmpl-", _chat_choice, "chat.completion"),
        "completions": ("cmpl-", _text_choice, "text_completion"),
    }[row.form]
    body = {
        "id": shape + row.line.id,
        "object": kind,
        "created": settings.created,
        "model": settings.model,
        "choices": [shown(index, choice) for index, choice in enumerate(choices)],
        "usage": usage(wanted, made),
    }
    return enveloped(row, body)


def enveloped(row: Row, body: Record) -> Record:
    """The body of a response as a line of the batch's output."""
    name = PREFIX + row.line.id
    response = {"status_code": 200, "request_id": name, "body": body}
    custom_id = row.line.custom_id
    return {"id": name, "custom_id": custom_id, "response": response, "error": None}


def usage(prompt: int, new: int) -> Record:
    """The tokens of a row."""
    total = {"total_tokens": prompt + new}
    return {"prompt_tokens": prompt, "completion_tokens": new, **total}


def _choice(
    row: Row, prompt: list[int], one: Finished, settings: BatchSettings
) -> Choice:
    tokenizer, request = settings.tokenizer, row.request
    tokens, reason = one.tokens.tolist(), one.finish_reason
    least = request.min_tokens
    count = tokens_to_stop(tokenizer, prompt, tokens, request.stop, least)
    if count is not None:
        tokens, reason = tokens[:count], "stop"
    ended = reason == "stop" and tokens and tokens[-1] in request.stop_ids
    text = decode(tokenizer, prompt, tokens[:-1] if ended else tokens)
    early = early_text(tokenizer, prompt, tokens, least) if request.stop else 0
    text = text[: first_stop(text, request.stop, early)]
    scores = None
    if request.logprobs is not None:
        scores = _scores(tokenizer, tokens, one)
    return Choice(text=text, tokens=tokens, finish_reason=reason, scores=scores)


def _scores(tokenizer: Any, tokens: list[int], one: Finished) -> list[Record]:
    def entry(token: int, value: np.floating[Any]) -> Record:
        text = token_text(tokenizer, token)
        data = None if "\ufffd" in text else [*text.encode("utf-8", "surrogatepass")]
        # The shortest decimal that is this float32.
        return {"token": text, "logprob": max(float(str(value)), _LEAST), "bytes": data}

    none: Any = [()] * len(tokens)
    ids = none if one.top_ids is None else one.top_ids.tolist()
    tops = none if one.top_logprobs is None else one.top_logprobs
    own: Any = one.logprobs
    entries = list[Record]()
    for at, token in enumerate(tokens):
        top = [entry(i, x) for i, x in zip(ids[at], tops[at], strict=True)]
        entries.append(entry(token, own[at]) | {"top_logprobs": top})
    return entries


def _chat_choice(index: int, choice: Choice) -> Record:
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text},
        "logprobs": None if choice.scores is None else {"content": choice.scores},
        "finish_reason": choice.finish_reason,
    }


def _text_choice(index: int, choice: Choice) -> Record:
    scores, logprobs = choice.scores, None
    if scores is not None:
        tokens = [entry["token"] for entry in scores]
        starts = np.cumsum([0, *map(len, tokens)])[:-1]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [entry["logprob"] for entry in scores],
            "top_logprobs": [
                # Of tokens with the same text, the best.
                {e["token"]: e["logprob"] for e in reversed(entry["top_logprobs"])}
                for entry in scores
            ],
            "text_offset": starts.tolist(),
        }
    told = {"logprobs": logprobs, "finish_reason": choice.finish_reason}
    return {"index": index, "text": choice.text, **told}


def _plain(row: Row, choices: list[Choice]) -> Record:
    """With n above 1 the fields of the choices are lists."""
    columns = {
        "generated_text": [c.text for c in choices],
        "generated_tokens": [c.tokens for c in choices],
        "num_generated_tokens": [len(c.tokens) for c in choices],
        "finish_reason": [c.finish_reason for c in choices],
        "logprobs": [c.scores for c in choices],
    }
    if row.request.logprobs is None:
        del columns["logprobs"]
    single = row.request.n == 1
    own = {name: x[0] if single else x for name, x in columns.items()}
    count = {"num_input_tokens": len(row.prompts[0])}
    name = {"request_id": PREFIX + row.line.id, "error": None}
    return {**row.extra, **own, **count, **name}
