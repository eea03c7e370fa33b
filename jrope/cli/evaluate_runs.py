"""The work of `jrope evaluate`: every method at every context, record by record.

What is recorded already is skipped; what fails becomes a record, and the rest goes on.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax.errors import JaxRuntimeError

from jrope.cli.common import trained_length
from jrope.cli.evaluate_plan import OWN, Text, cost
from jrope.cli.evaluate_table import failure_line
from jrope.cli.terminal import TimeLeft
from jrope.cli.together import shared
from jrope.errors import JropeError
from jrope.lab import distance, passkey, perplexity
from jrope.lab.journal import Journal
from jrope.model.config import LlamaConfig
from jrope.rope import base_frequencies, describe

_DISTANCE_TOKENS = 16384  # read for the mean queries and keys
Measure = Callable[[Callable[[int], None]], Mapping[str, Any]]


class Work(NamedTuple):
    """One measurement: what its record begins with, its price, how it is made."""

    record: Mapping[str, Any]
    cost: float  # of one of the tokens that progress counts
    tokens: int
    measure: Measure


class Laboratory:
    """A model, its texts and a journal; `measure` fills the journal."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: LlamaConfig,
        texts: Sequence[Text],
        tokenizer: Any,
        journal: Journal,
    ) -> None:
        self.args, self.config, self.journal = args, config, journal
        self.tokenizer, self.texts = tokenizer, [text.tokens for text in texts]
        self.contexts: tuple[int, ...] = args.context
        self.at_once = max(self.contexts)
        self.params: Any = None
        self.means: distance.Means | None = None

    def check(self) -> None:
        """Raise a JropeError for what would fail at the first measurement."""
        if self.args.passkey:
            self._prompts(min(self.contexts), 0.0)

    def measure(
        self,
        params: Any,
        methods: Mapping[str, LlamaConfig],
        refused: Mapping[str, str],
    ) -> None:
        """Do all that the journal does not have.

        Args:
          params: the weights.
          methods: configurations by label.
          refused: labels of methods that the model cannot take, and why.
        """
        self.params = params
        for label, config in methods.items():
            self._describe(label, config)
        work = [w for w in self._works(methods) if not self.journal.has(w.record)]
        with TimeLeft(sum(w.cost * w.tokens for w in work)) as bar:
            for label, why in refused.items():
                self._fail(bar, {"kind": "method", "rope": label}, why)
            for one in work:
                self._do(bar, one)

    def _do(self, bar: TimeLeft, work: Work) -> None:
        where = work.record.get("context", work.record.get("length", ""))
        bar.name(f"{work.record['kind']} {work.record['rope']} {where}")
        done = 0

        def progress(tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.step(tokens * work.cost)

        try:
            result = work.measure(progress)
        except JropeError as error:
            if shared(self.args) is not None:  # whose others may not have failed
                raise
            self._fail(bar, work.record, str(error))
        except (JaxRuntimeError, MemoryError) as error:
            if shared(self.args) is not None:
                raise
            self._fail(bar, work.record, _reason(error))
        else:
            self.journal.add({**work.record, **result})
        bar.step((work.tokens - done) * work.cost)

    def _fail(self, bar: TimeLeft, record: Mapping[str, Any], why: str) -> None:
        failure = {
            "kind": "failure",
            "task": record["kind"],
            "rope": record["rope"],
            "context": record.get("context", record.get("length")),
            **{name: record[name] for name in ("windows", "depth") if name in record},
            "error": " ".join(why.split()),
        }
        self.journal.add(failure)
        bar.line(f"jrope: {failure_line(failure)}")

    def _describe(self, label: str, config: LlamaConfig) -> None:
        """Record the method's frequencies, for each context if they depend on it."""
        rope = config.rope
        records = [r for r in self.journal.records if r["kind"] == "method"]
        known = {r["length"] for r in records if r["rope"] == label}
        lengths = {*self.contexts} - known
        if not rope.needs_length:
            lengths = set[int]() if known else {max(self.contexts)}
        base = base_frequencies(rope.rotary_dim, rope.theta, np.float64)
        for length in sorted(lengths):
            inv_freq, scaling = rope.frequencies(length, np.float64)
            self.journal.add(
                {
                    "kind": "method",
                    "rope": label,
                    "label": f"{OWN}: " * (label == OWN) + describe(rope),
                    "inv_freq": np.asarray(inv_freq).tolist(),
                    "base_inv_freq": base.tolist(),
                    "attention_scaling": float(scaling),
                    "condense": float(rope.condense),
                    "length": length,
                }
            )

    def _works(self, methods: Mapping[str, LlamaConfig]) -> Iterator[Work]:
        """Cheap contexts first; all methods at one before the next."""
        if self.args.distance:
            for label, config in methods.items():
                yield self._distance(label, config)
        for context in self.contexts:
            for label, config in methods.items():
                if self.texts and not self.args.no_perplexity:
                    strides = dict.fromkeys([None, self.args.stride])
                    for stride in strides:
                        yield self._perplexity(label, config, context, stride)
        for context in self.contexts:
            for label, config in methods.items():
                if self.args.passkey:
                    for depth in self.args.depths:
                        yield self._passkey(label, config, context, depth)

    def _perplexity(
        self, label: str, config: LlamaConfig, context: int, stride: int | None
    ) -> Work:
        def measure(progress: Callable[[int], None]) -> Mapping[str, Any]:
            scores = perplexity.perplexity(
                self.params,
                config,
                self.texts,
                context,
                stride=stride,
                tokens_at_once=self.at_once,
                progress=progress,
            )
            return perplexity.describe(scores, context)

        record = {"kind": "perplexity", "rope": label, "context": context}
        record |= {"windows": "first" if stride is None else "sliding"}
        record |= {"stride": stride}
        count = sum(
            len(perplexity.windows(len(t), context, stride)) for t in self.texts
        )
        return Work(record, cost(config, context), count * context, measure)

    def _passkey(
        self, label: str, config: LlamaConfig, length: int, depth: float
    ) -> Work:
        def measure(progress: Callable[[int], None]) -> Mapping[str, Any]:
            begin = time.perf_counter()
            found = passkey.answer_passkeys(
                self.params,
                config,
                self._prompts(length, depth),
                partial(self.tokenizer.decode, skip_special_tokens=True),
                tokens_at_once=self.at_once,
                progress=progress,
            )
            seconds = round(time.perf_counter() - begin, 3)
            return {"trials": len(found), "correct": sum(found), "seconds": seconds}

        record = {"kind": "passkey", "rope": label, "length": length, "depth": depth}
        return Work(record, cost(config, length), self.args.trials * length, measure)

    def _prompts(self, length: int, depth: float) -> passkey.Passkeys:
        filler = None
        if self.args.filler == "text":
            filler = np.concatenate(self.texts)
        special = self.tokenizer("")["input_ids"]
        bos = self.config.bos_token_id
        return passkey.make_passkeys(
            lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
            length,
            depth,
            self.args.trials,
            filler=filler,
            first=[bos] if bos is not None and bos in special else [],
            seed=self.args.seed,
        )

    def _distance(self, label: str, config: LlamaConfig) -> Work:
        far = max(self.contexts)
        context = min(trained_length(self.config), far)

        def measure(progress: Callable[[int], None]) -> Mapping[str, Any]:
            if self.means is None:
                self.means = distance.mean_queries_and_keys(
                    self.params,
                    self.config,
                    self.texts,
                    context,
                    most=max(1, _DISTANCE_TOKENS // context),
                )
            return distance.describe(self.means, config, far - 1, length=far)

        record = {"kind": "distance", "rope": label, "length": far}
        return Work(record, cost(config, context), context, measure)


def _reason(error: Exception) -> str:
    """The first line of an XLA error, or that memory ran out."""
    text = str(error).strip() or "out of memory"
    first = text.splitlines()[0][:300]
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return f"out of memory ({first}); take a shorter context"
    return first
