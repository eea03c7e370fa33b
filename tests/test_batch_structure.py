"""Answers of a given form from a model: what is drawn, beside whom, and how it ends."""

import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_file_helpers import HashEngine, lines_of, records_of, run, write_rows
from batch_helpers import by_key, engine, engine_of, ragged, work
from cli_helpers import succeed
from generate_helpers import VOCABULARY, model
from structure_helpers import (
    EOS,
    PERSON,
    SCHEMAS,
    TOKENS,
    structure,
    table_of,
    text_of,
    valid,
)

import jrope
import jrope.forms.rules
from jrope.batch.engine import Engine
from jrope.batch.work import Finished, Work
from jrope.cli import batch_live
from jrope.errors import JropeError
from jrope.forms.rules import Held, after, allowed
from jrope.forms.structure import MAY_STOP, Structure
from jrope.generation.sample import Sampler
from jrope.model.llama import forward

TINY = Path(__file__).parents[1] / "examples" / "models" / "jrope-tiny"
NAMES = [*SCHEMAS, "object"]
WORD = "[a-zé]{3,9}!"
ENDS = EOS, TOKENS.index(b"+")
HOT = [
    Sampler(temperature=1.0),
    Sampler(temperature=1.0, top_k=3),
    Sampler(temperature=2.0, top_p=0.8, repetition_penalty=1.2),
    Sampler(temperature=0.7, min_p=0.1),
]


def formed(count: int = 4) -> list[Work]:
    """Rows of every form, each with several seeds and samplers."""
    return [
        work(
            f"{name} {i}",
            5 + 3 * i,
            60,
            seed=i,
            sampler=HOT[i % len(HOT)],
            stop_ids=ENDS[: 1 + i % 2],
            structure=structure(name, ENDS[: 1 + i % 2]),
        )
        for name in NAMES
        for i in range(count)
    ]


def states_of(made: Structure, tokens: Sequence[int]) -> list[int]:
    """The states that an answer goes through; every token but a stop id leads on."""
    flat, states = made.table.ravel(), [0]
    for token in tokens:
        states.append(int(flat[states[-1] + int(made.classes[token])]))
        assert states[-1] >= 0
    return states


def same(one: Finished, other: Finished) -> None:
    for f in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, f.name), getattr(other, f.name))


@cache
def own() -> Engine:
    """The small engine, which then compiles more programs."""
    made = engine_of(*model()[1:])
    made._programs = dataclasses.replace(engine().compile(), ruled={})
    return made


@pytest.fixture(scope="module")
def answers() -> dict[str, Finished]:
    """Of the rows of `formed`, beside others that are free."""
    free = ragged(12)
    rows = [*formed(), *free]
    order = np.random.default_rng(0).permutation(len(rows))
    got = by_key(own().run([rows[i] for i in order]))
    alone = by_key(own().run(free))
    for row in free:
        same(got[row.key], alone[row.key])  # they know nothing of the others
    return got


def test_answers_have_their_form(answers: dict[str, Finished]) -> None:
    stopped, texts = dict.fromkeys(NAMES, 0), set[str]()
    for row in formed():
        answer, made, name = answers[row.key], row.structure, row.key.split()[0]
        assert made is not None and answer.finite
        tokens = answer.tokens.tolist()
        if answer.finish_reason == "length":
            assert len(tokens) == 60
            states_of(made, tokens)
            continue
        if ended := tokens[-1] in row.stop_ids:
            tokens = tokens[:-1]
        assert made.table.ravel()[states_of(made, tokens)[-1]] >= MAY_STOP
        assert made.is_over(tokens) or ended
        assert not {*tokens} & {*row.stop_ids}
        valid(name, text_of(tokens))
        stopped[name] += 1
        texts.add(text_of(tokens))
    assert min(stopped.values()) and len(texts) > len(NAMES), stopped


def test_neither_order_nor_company_changes_them(answers: dict[str, Finished]) -> None:
    rows = formed()
    again = by_key(own().run(rows[::-1]))
    for row in rows:
        same(again[row.key], answers[row.key])
    same(next(own().run(rows[3:4])), answers[rows[3].key])


def test_one_program_serves_every_form(answers: dict[str, Finished]) -> None:
    before, made = own().stats.compiled, list[str]()

    def heard(event: str, *_: Any, **__: Any) -> None:
        made.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        got = by_key(own().run([*formed(2), *ragged(3)]))
        new = table_of("(a|b){3}")
        assert len(next(own().run([work("it", 3, 60, structure=new)])).tokens)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert got and not made
    assert own().stats.compiled == before >= 1
    assert "decode, structures of 1,048,576" in own().programs


def test_free_rows_alone_need_no_tables() -> None:
    free = engine_of(*model()[1:])
    free._programs = dataclasses.replace(engine().compile(), ruled={})
    assert len(by_key(free.run(ragged(4)))) == 4
    assert free.stats.compiled == 0 and len(free.programs) == 7
    free._programs = None
    free.expect(structures=True)
    wanted = tuple(free.programs[n] for n in (2, 3))
    assert len(free.programs) == 9 and wanted == (
        "decode, structures of 1,048,576",
        "decode with log-probabilities, structures of 1,048,576",
    )
    free.expect(structures=False)
    assert free.structures


def test_the_best_allowed_token_is_drawn_and_told_as_the_models() -> None:
    _, params, config = model()
    row = work("best", 9, 12, logprobs=3, stop_ids=(EOS,), structure=structure("text"))
    answer = next(own().run([row]))
    made, tokens = row.structure, answer.tokens.tolist()
    assert made is not None and answer.logprobs is not None
    whole = jnp.asarray([[*row.prompt.tolist(), *tokens]])
    logits, _ = forward(params, whole, config=config)
    every = np.asarray(jax.nn.log_softmax(logits[0, len(row.prompt) - 1 : -1]))
    flat, state, kept = made.table.ravel(), 0, 0
    for at, token in enumerate(tokens):
        ways = flat[state + made.classes.astype(int)]
        free = ways >= 0
        free[EOS] = flat[state] >= MAY_STOP
        assert token == int(np.argmax(np.where(free, every[at], -np.inf)))
        kept += token == int(np.argmax(every[at]))
        state = int(ways[token])
    assert kept < len(tokens), "nothing was out of bounds"
    told = every[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(answer.logprobs, told, atol=2e-5)
    assert answer.top_logprobs is not None
    np.testing.assert_allclose(answer.top_logprobs, -np.sort(-every)[:, :3], atol=2e-5)


def test_a_row_ends_where_nothing_can_follow() -> None:
    choice = table_of("(?:true|12|a)")
    rows = [work(i, 4, 4, seed=i, sampler=HOT[0], structure=choice) for i in range(8)]
    rows += [work("full", 4, 1, structure=table_of("(?:a|b)"))]
    letters = TOKENS.index(b"a"), TOKENS.index(b"b")
    only = table_of("a{1,3}|b", letters[1:])
    rows += [
        work(f"own {i}", 4, 9, seed=i, sampler=HOT[0], stop_ids=letters[1:])
        for i in range(4)
    ]
    rows[-4:] = [dataclasses.replace(row, structure=only) for row in rows[-4:]]
    got = by_key(own().run(rows))
    assert {text_of(got[i].tokens) for i in range(8)} > {"true", "12"}
    assert all(states_of(choice, got[i].tokens.tolist()) for i in range(8))
    assert all(got[row.key].finish_reason == "stop" for row in rows)
    assert len(got["full"].tokens) == 1
    for i in range(4):  # an id that ends a row stands at its end
        *first, last = got[f"own {i}"].tokens.tolist()
        assert {*first, last} <= {*letters} and set(first) == {letters[0]}


def test_a_form_that_may_end_waits_for_the_least_tokens() -> None:
    """One that must end does so before them: nothing is left to draw."""
    letter, ends = TOKENS.index(b"a"), {"logit_bias": {EOS: 100.0}, "stop_ids": (EOS,)}
    wishes: dict[str, Any] = {**ends, "min_new_tokens": 5}
    choice, many = table_of("(?:true|12|a)", (EOS,)), table_of("a{1,9}", (EOS,))
    rows = [
        work("must", 4, 20, structure=choice, **wishes),
        work("may", 4, 20, structure=many, **wishes),
        work("at once", 4, 20, structure=many, **ends),
        work("long", 4, 20, structure=many, **wishes | {"min_new_tokens": 12}),
    ]
    got = by_key(own().run([*rows, *ragged(5)]))
    assert text_of(got["must"].tokens) in ("true", "12", "a")
    assert got["may"].tokens.tolist() == [*[letter] * 5, EOS]
    assert got["at once"].tokens.tolist() == [letter, EOS]
    assert got["long"].tokens.tolist() == [letter] * 9
    for row in rows:
        assert got[row.key].finite and got[row.key].finish_reason == "stop"


def test_tables_are_held_and_replaced(monkeypatch: Any) -> None:
    monkeypatch.setattr(jrope.forms.rules, "ENTRIES", 1024)
    held = Held(VOCABULARY, 30)
    every = [table_of(f"a{{{n}}}b*") for n in range(1, 31)]
    large = table_of(".{1,400}")
    sizes = set[int]()

    def check(rows: list[tuple[Structure | None, int]]) -> None:
        rows += [(None, 0)] * (30 - len(rows))
        rules = held.rules(rows)
        sizes.add(rules.table.size)
        assert rules.classes.shape == (31, VOCABULARY)
        stops = jnp.full((len(rows), 2), -1).at[:, 1].set(EOS)
        mask = np.asarray(jax.jit(allowed)(rules, rules.states, stops))
        for token in (EOS, TOKENS.index(b"a"), TOKENS.index(b"b")):
            drawn = jnp.full(len(rows), token)
            states, over = map(np.asarray, jax.jit(after)(rules, rules.states, drawn))
            for at, (made, state) in enumerate(rows):
                if made is None:
                    assert mask[at].all() and states[at] == 0 and not over[at]
                    continue
                flat = made.table.ravel()
                ways = flat[state + made.classes.astype(int)]
                wanted = ways >= 0
                wanted[EOS] = flat[state] >= MAY_STOP
                np.testing.assert_array_equal(mask[at], wanted)
                if ways[token] >= 0:
                    assert states[at] == ways[token]
                    assert over[at] == (flat[ways[token]] == 2)

    check([(every[0], 0), (None, 0), (every[1], 0)])
    check([(every[0], every[0].table.shape[1]), (None, 0), (every[2], 0)])
    for made in every[3:20]:  # more than there is room for, one after the other
        check([(made, 0), (every[0], 0)])
    assert sizes == {1024}
    check([(made, 0) for made in every])
    check([(large, 0), (every[5], 0)])
    assert sizes == {1024, 4096, 16384}


# --- files


def asked(name: str, **more: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": PERSON}}
    row = {"custom_id": name, "prompt": f"The {name}", "response_format": form}
    return {**row, "max_tokens": 40, "temperature": 1.0, **more}


def test_a_tiny_models_answers(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    params, config = jrope.load(TINY)

    @cache
    def once(structures: bool) -> Engine:
        how = {"capacity": 48, "slots": 2, "logprobs": False}
        return Engine(params, config, structures=structures, **how)

    def made(*_: Any, structures: bool, **__: Any) -> Engine:
        return once(structures)

    monkeypatch.setattr(batch_live, "Engine", made)
    monkeypatch.setenv("JROPE_CACHE_DIR", "")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    words = {"choice": ["yes, ma'am", "no", "peut-être"]}
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [
            asked("captain", n=3, seed=4),
            {"custom_id": "e", "prompt": "x", "structured_outputs": {"grammar": "x"}},
            {**asked("answer"), "response_format": None}
            | {"structured_outputs": words},
            {"custom_id": "free", "prompt": "She", "max_tokens": 8},
            {"url": "/v1/completions", "custom_id": "api"}
            | {
                "body": {
                    "prompt": "He",
                    "structured_outputs": {"regex": WORD},
                }
            },
            asked("stopped", stop=['"name'], stop_token_ids=[1000]),
        ],
    )
    output = tmp_path / "out.jsonl"
    words_ = "batch", TINY, "--input", rows, "--max-length", 48
    out, _ = succeed(capsys, *words_, "--dry-run", status=1)
    assert "of a form       4\n" in out and "decode, structures of 1,048,576, " in out
    assert "bad             1\n  line 2 (e): structured_outputs: grammar: not s" in out
    succeed(capsys, *words_, "--output", output, status=1)
    found = {record["custom_id"]: record for record in records_of(output)}
    whole = zip(*(found["captain"][n] for n in _TOLD), strict=True)
    ended = [text for text, reason in whole if reason == "stop"]
    for text in ended:
        valid("person", text)
    assert ended and found["answer"]["generated_text"] in words["choice"]
    assert found["answer"]["finish_reason"] == "stop"
    assert found["stopped"]["generated_text"].strip() == "{"
    choice = found["api"]["response"]["body"]["choices"][0]
    assert re.fullmatch(WORD, choice["text"])
    assert choice["finish_reason"] == "stop"
    assert found["e"]["error"]["code"] == "unsupported"
    before = lines_of(output)
    kept = output.read_bytes().splitlines(keepends=True)[:3]
    output.write_bytes(b"".join(kept) + b'{"custom_id": "cut')  # as a kill leaves it
    succeed(capsys, *words_, "--output", output, status=1)
    assert lines_of(output) == before
    engine = once(True)
    assert once.cache_info().currsize == 1 and engine.stats.compiled == len(
        engine.programs
    )


_TOLD = "generated_text", "finish_reason"


def test_rows_of_a_file_are_refused_alone(tmp_path: Path) -> None:
    row = {"type": "json_schema", "json_schema": {"schema": {"oneOf": []}}}
    given = [
        asked("good", n=2),
        asked("bad", response_format=row),
        {"custom_id": "v", "url": "/v1/embeddings", "body": {"input": "x"}},
    ]
    given[2]["body"]["response_format"] = {"type": "json_object"}
    found = run(write_rows(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl")
    assert (found.answered, found.failed) == (1, 2)
    told = {r["custom_id"]: r.get("error") for r in records_of(tmp_path / "out.jsonl")}
    assert told["bad"] == {
        "code": "unsupported",
        "message": "response_format: oneOf: not served",
    }
    assert told["v"]["message"] == (
        "response_format: not served where no text is answered"
    )


def test_a_run_knows_its_forms(tmp_path: Path) -> None:
    source, output, own = tmp_path / "in.jsonl", tmp_path / "out.jsonl", HashEngine()
    text = {"response_format": {"type": "text"}, "structured_outputs": None}
    plain = {"custom_id": "b", "prompt": "b"}
    write_rows(source, [asked("a"), plain | text])
    run(source, output, engine=own)
    with pytest.raises(JropeError, match="answers to rows that the input no longer"):
        write_rows(source, [asked("a", response_format={"type": "json_object"}), plain])
        run(source, output, engine=own)
    for shard in (0, 1):
        write_rows(source, [asked("a"), plain | text])
        run(source, tmp_path / f"{shard}.jsonl", engine=own, shard=(shard, 2))
    body = {"prompt": "a", "structured_outputs": {"regex": "a"}}
    write_rows(source, [{"custom_id": "a", "url": "/v1/completions", "body": body}])
    run(source, tmp_path / "api.jsonl", engine=own)
    assert own.structures == [True, True, False, True]
