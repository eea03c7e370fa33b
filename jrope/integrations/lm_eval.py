"""lm-evaluation-harness on jrope: its three kinds of requests, its own command line.

    python -m jrope.integrations.lm_eval --model jrope \\
        --model_args pretrained=FOLDER,dtype=bfloat16 --tasks arc_easy --batch_size auto

What is computed is what lm_eval's own backend "hf" computes: the same ids, windows,
cuts and texts.
"""

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from jrope.cli.common import enable_compile_cache, reach
from jrope.cli.terminal import TimeLeft
from jrope.errors import JropeError, check, check_count, did_you_mean
from jrope.generation.sample import Sampler
from jrope.hf.generation import read_generation_config, sampler_fields
from jrope.integrations.continuations import TOKENS, Continuation, likelihoods
from jrope.integrations.loaded import open_model
from jrope.integrations.until import Until, Writer

NAME = "jrope"
_NEW = 256  # tokens where a task does not say
_SAMPLER = tuple(f.name for f in fields(Sampler))
_IDLE = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
Item = TypeVar("Item")


def register() -> Any:
    """Make the model "jrope" known to lm_eval, and return its class.

    Raises:
      JropeError: lm_eval is not installed.
    """
    registry, base = _lm_eval("api.registry"), _lm_eval("api.model").TemplateLM
    if NAME in registry.MODEL_REGISTRY:
        return registry.get_model(NAME)
    return registry.register_model(NAME)(type("JropeLM", (Requests, base), {}))


def _lm_eval(module: str) -> Any:
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise JropeError(
            f"this needs the package lm_eval ({error}); pip install lm_eval"
        ) from None


class Requests:
    """What lm_eval asks of a model; `register` joins it with lm_eval's `TemplateLM`.

    Args:
      pretrained: a Hugging Face folder or hub id.
      dtype, rope, quantize, adapter: as in `loaded.open_model`.
      max_length: tokens that the model sees at most; None: max_position_embeddings, or
        with `rope` what that stretches it to.
      batch_size: rows at once; "auto": as fits their length, and of texts to continue
        as many as the memory holds.
      max_batch_size: at most so many where that is "auto".
      add_bos_token: whether texts begin with the first token; None: as the tokenizer.
      device: not read, for lm_eval names cuda:0 where nobody else does; JAX_PLATFORMS
        in the environment chooses.
    """

    tokenizer: Any
    cache_hook: Any

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        rope: str | None = None,
        quantize: Any = None,
        adapter: str | None = None,
        add_bos_token: bool | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            name, known = next(iter(unknown)), [*Requests.__init__.__annotations__]
            hint = did_you_mean(name, known)
            raise JropeError(f"{name}: no such argument of this model{hint}")
        self.batch_size, self._most = batch_size, max_batch_size
        self._fixed = _fixed(batch_size)
        if max_length is not None:
            check_count("max_length", max_length, 1)
        how: dict[str, Any] = {"dtype": dtype, "rope": rope, "quantize": quantize}
        if add_bos_token is not None:
            how["add_bos_token"] = add_bos_token
        model = open_model(pretrained, **how, adapter=adapter)
        config, self.tokenizer, self._bos = model.config, model.tokenizer, add_bos_token
        longest = None if rope is None else reach(config)
        longest = longest or config.max_position_embeddings
        self.max_length = max_length or longest
        self._model = model.params, config
        self._generation = read_generation_config(model.folder)
        slots = max_batch_size if self._fixed is None else self._fixed
        self._write = Writer(*self._model, self.tokenizer, slots)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without context comes after."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return _NEW

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for lm_eval's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; the first token is not put before itself."""
        special = self._bos if add_special_tokens is None else add_special_tokens
        first = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and string.startswith(first):
            special = False
        given = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer.encode(string, **given)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text, by the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **how: Any
    ) -> list[tuple[float, bool]]:
        asked = [Continuation(context, ids) for _, context, ids in requests]
        answers: list[Any] = [None] * len(asked)
        longest = self.max_length
        found = likelihoods(*self._model, asked, max_length=longest, rows=self._rows)
        for number, total, greedy in _shown("loglikelihood", found, len(asked), **how):
            answers[number] = total, greedy
            if (texts := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return answers

    def _rows(self, width: int) -> int:
        return self._fixed or min(TOKENS // width, self._most or TOKENS)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows that give each token once."""
        utils = _lm_eval("utils")
        windows = list[tuple[None, list[int], list[int]]]()
        ends = list[int]()
        for request in requests:
            given = self.tok_encode(request.args[0]), self.prefix_token_id
            pairs = utils.get_rolling_token_windows(*given, self.max_length, 1)
            windows += [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        totals = list[float]()
        for request, begin, end in zip(requests, [0, *ends], ends, strict=False):
            totals.append(sum((total for total, _ in found[begin:end]), 0.0))
            self.cache_hook.add_partial(
                "loglikelihood_rolling", request.args, totals[-1]
            )
        return totals

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Continue texts, each up to the first of its stop texts."""
        texts = [""] * len(requests)
        found = self._write([self._until(*request.args) for request in requests])
        how = {"disable_tqdm": disable_tqdm}
        for number, text in _shown("generate_until", found, len(texts), **how):
            texts[number] = text
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _until(self, context: str, given: Mapping[str, Any]) -> Until:
        tools, eos = _lm_eval("models.utils"), self.tokenizer.eos_token
        asked: dict[str, Any] = {**tools.normalize_gen_kwargs(given, _NEW)}
        stops = tools.handle_stop_sequences(asked.pop("until"), eos=eos)
        new, sample = asked.pop("max_gen_toks"), asked.pop("do_sample")
        own = {name: asked.pop(name) for name in _SAMPLER if name in asked}
        own |= {} if sample else {"temperature": 0.0}
        if left := [n for n, x in asked.items() if x and _IDLE.get(n) != x]:
            known = ", ".join(("until", "max_gen_toks", "do_sample", *_SAMPLER))
            raise JropeError(f"generation_kwargs: got {', '.join(left)}, want {known}")
        room = self.max_length - new
        wanted = f"from 1 to {self.max_length - 1}, less than max_length"
        check(new > 0 and room > 0, "max_gen_toks", new, wanted)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return Until(
            prompt=ids[-room:],
            stops=[stop for stop in stops if stop],
            new=new,
            sampler=Sampler(**sampler_fields(self._generation, sample=sample) | own),
        )


def _fixed(batch_size: int | str) -> int | None:
    """Rows at once; None: as many as fit."""
    word = str(batch_size)
    if word.partition(":")[0] == "auto":
        return None
    good = word.isdecimal() and int(word) > 0
    check(good, "batch_size", batch_size, 'a whole number from 1, or "auto"')
    return int(word)


def _shown(
    label: str, items: Iterable[Item], total: int, *, disable_tqdm: bool = False
) -> Iterator[Item]:
    """The items, with a bar unless lm_eval wants none."""
    if disable_tqdm:
        yield from items
        return
    with TimeLeft(total) as bar:
        for item in items:
            yield item
            bar.label = label
            bar.step(1)


def main() -> int:
    """lm_eval's command line, which knows `--model jrope`."""
    try:
        register()
        enable_compile_cache()
        _lm_eval("__main__").cli_evaluate()
    except JropeError as error:
        print(f"jrope: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # installed without what its tasks need
        print(f"jrope: error: {error}; pip install lm_eval", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
