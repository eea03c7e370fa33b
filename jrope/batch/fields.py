"""What a row asks for besides its prompt: read and checked, or refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, final

from jrope.errors import (
    JropeError,
    RowError,
    did_you_mean,
    is_integer,
    is_number,
    refuse,
    want,
)
from jrope.generation.checks import check_bias
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig

_SAMPLER = tuple(f.name for f in fields(Sampler))
_LIMITS = ("max_completion_tokens", "max_tokens")
_INTEGERS = (
    *(*_LIMITS, "seed", "n", "top_k"),
    *("logprobs", "top_logprobs", "stop_token_ids", "min_tokens"),
)
SERVED = {
    *_SAMPLER,
    *_LIMITS,
    *("min_tokens", "logit_bias", "seed", "n", "logprobs", "top_logprobs"),
    *("stop", "stop_token_ids", "ignore_eos"),
    *("response_format", "structured_outputs"),  # read in `jrope.forms`
}
_GUIDED = (  # vLLM's words before structured_outputs
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("guided_decoding_backend", "guided_whitespace_pattern"),
)
# Fields of the API that change the answer and are not served, with the values that
# change nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_GUIDED, ()),
    "tools": ([],),
    "tool_choice": ("none",),
    "stream": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "dimensions"), ()),
    **dict.fromkeys(("chat_template", "chat_template_kwargs"), ()),
    "add_generation_prompt": (True,),
}
# Fields of the API that change no token; the answer names the model that gave it.
UNREAD = {"model", "user", "metadata", "store", "service_tier", "stream_options"}
_MOST_CHOICES, _MOST_ALTERNATIVES = 128, 20


@final
@dataclass(frozen=True, kw_only=True)
class Request:
    """How a row is to be answered.

    Args:
      sampler: of numbers.
      seed: of its first choice; the others have the seeds that follow.
      limit: new tokens at most; None: the row does not say.
      n: choices.
      stop: texts to end before.
      stop_ids: ids that end it.
      min_tokens: new tokens before which neither stops it.
      logit_bias: what is added to logits, by token ids.
      logprobs: alternatives to report for each token; None: no log-probabilities.
    """

    sampler: Sampler
    seed: int
    limit: int | None
    n: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    min_tokens: int
    logit_bias: dict[int, float]
    logprobs: int | None


def refuse_unserved(given: Mapping[str, Any]) -> None:
    """Raise a RowError that names the fields of the API that would go unheeded."""
    names = [n for n, idle in UNSERVED.items() if n in given and given[n] not in idle]
    guided = {*names} & {*_GUIDED}
    refuse(names, "; structured_outputs is" if guided else "")


def refuse_unknown(given: Mapping[str, Any], known: set[str]) -> None:
    """Raise a RowError that names the fields that nobody knows."""
    known = known | SERVED | UNREAD | {*UNSERVED}
    if names := [name for name in given if name not in known]:
        hint = did_you_mean(names[0], known)
        raise RowError(f"{', '.join(map(repr, names[:8]))}: no such field{hint}")


def read_request(
    given: Mapping[str, Any], default: Sampler, seed: int, config: LlamaConfig
) -> Request:
    """Read the fields of SERVED.

    Args:
      given: a row's fields, without nulls.
      default: what it does not say of the sampler.
      seed: where it names none.
      config: of the model.

    Raises:
      RowError: a value that is not allowed, or a field of UNSERVED.
    """
    refuse_unserved(given)
    given = _with_integers(given)
    seed = given.get("seed", seed)
    want(is_integer(seed, at_least=-(2**63)), "seed", seed, "a whole number")
    n = given.get("n", 1)
    good = is_integer(n, at_least=1) and n <= _MOST_CHOICES
    want(good, "n", n, f"a whole number from 1 to {_MOST_CHOICES}")
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    good = isinstance(stop, list) and all(isinstance(text, str) for text in stop)
    want(good, "stop", stop, "a text or a list of texts")
    least = given.get("min_tokens", 0)
    want(is_integer(least, at_least=0), "min_tokens", least, "a whole number from 0")
    return Request(
        sampler=_sampler(given, default),
        seed=seed % 2**32,
        limit=_limit(given),
        n=n,
        stop=tuple(text for text in stop if text),
        stop_ids=_stop_ids(given, config),
        min_tokens=least,
        logit_bias=_logit_bias(given, config),
        logprobs=_alternatives(given),
    )


def _with_integers(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with 16 for 16.0 where integers are wanted.

    JSON knows numbers alone, vLLM's models take both, and tables with missing values
    turn the one into the other.
    """
    own = {name: integers(given[name]) for name in _INTEGERS if name in given}
    return {**given, **own}


def integers(value: Any) -> Any:
    """The integer that a whole float is, alone or in a list; others as they are.

    Floats from 2^53 on are no integer in particular: tables make some of long seeds.
    """
    return [*map(_integer, value)] if isinstance(value, list) else _integer(value)


def _integer(value: Any) -> Any:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value


def _sampler(given: Mapping[str, Any], default: Sampler) -> Sampler:
    own = {name: given[name] for name in _SAMPLER if name in given}
    for name, value in own.items():
        want(is_number(value), name, value, "a number")
    if own.get("top_k") == -1:  # how others spell off
        own["top_k"] = 0
    try:
        return replace(default, **own)
    except JropeError as error:
        raise RowError(str(error).removeprefix("Sampler: ")) from None


def _limit(given: Mapping[str, Any]) -> int | None:
    limits = [given[name] for name in _LIMITS if name in given]
    for limit in limits:
        good = is_integer(limit, at_least=1) and limit < 2**30
        want(good, "max_tokens", limit, "a whole number from 1")
    if len({*limits}) > 1:
        raise RowError(f"{' and '.join(_LIMITS)}: got {limits}, want one of them")
    return limits[0] if limits else None


def _stop_ids(given: Mapping[str, Any], config: LlamaConfig) -> tuple[int, ...]:
    ids, ignore = given.get("stop_token_ids", []), given.get("ignore_eos", False)
    want(isinstance(ignore, bool), "ignore_eos", ignore, "true or false")
    check_ids("stop_token_ids", ids, config)
    return tuple(dict.fromkeys([*ids, *([] if ignore else config.eos_token_id)]))


def _logit_bias(given: Mapping[str, Any], config: LlamaConfig) -> dict[int, float]:
    """By integers, which JSON's names are not."""
    name, bias = "logit_bias", given.get("logit_bias", {})
    want(isinstance(bias, dict), name, bias, "an object of token ids and numbers")
    try:
        own = {int(id): value for id, value in bias.items()}
    except ValueError:
        own = {}
    plain = [*map(str, own)] == [*map(str, bias)]  # neither "05" nor "1_0"
    want(plain, name, bias, 'token ids as names, such as {"50256": -100}')
    try:
        check_bias(own, config)
    except JropeError as error:
        raise RowError(str(error)) from None
    return {id: float(value) for id, value in own.items()}


def check_ids(name: str, ids: Any, config: LlamaConfig) -> None:
    """Raise a RowError unless this is a list of ids of the vocabulary."""
    good = isinstance(ids, list) and all(is_integer(id, at_least=0) for id in ids)
    want(good, name, ids, "a list of token ids")
    size = config.vocab_size
    if bad := [id for id in ids if id >= size][:8]:
        raise RowError(f"{name}: ids {bad} lie outside the vocabulary of {size}")


def _alternatives(given: Mapping[str, Any]) -> int | None:
    """`logprobs` is true or false beside `top_logprobs`, or the number itself."""
    asked, top = given.get("logprobs", False), given.get("top_logprobs", 0)
    number = is_integer(asked, at_least=0) and asked <= _MOST_ALTERNATIVES
    most = f"a whole number from 0 to {_MOST_ALTERNATIVES}"
    want(isinstance(asked, bool) or number, "logprobs", asked, f"true, false or {most}")
    good = is_integer(top, at_least=0) and top <= _MOST_ALTERNATIVES
    want(good, "top_logprobs", top, most)
    if asked is False:
        want(top == 0, "top_logprobs", top, "logprobs true beside it")
        return None
    return top if asked is True else asked
