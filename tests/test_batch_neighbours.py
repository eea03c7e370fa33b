"""What a row of a file may take from another slot: it follows from the file alone."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_file_helpers import HashEngine, run, settings, write_rows
from cli_helpers import ids_of

from jrope.batch.neighbours import LAST
from jrope.batch.work import Finished, Stopped, Work
from jrope.rope import DynamicNTK

SYSTEM, OTHER = "a long text for all rows, ", "quite another one "
OWN = ("one", "two", "and a third", "four", "five", "x", "yes", "no", "zero")


class Watching(HashEngine):
    """Notes what rows share, and stops after so many answers."""

    def __init__(self, after: int = 10**9) -> None:
        super().__init__()
        self.seen: dict[Any, int] = {}
        self.after = after

    def run(self, work: Iterable[Work], stopped: Stopped | None) -> Iterator[Finished]:
        def noted() -> Iterator[Work]:
            for one in work:
                self.seen[one.key] = one.shared
                yield one

        for count, one in enumerate(super().run(noted(), stopped)):
            if count == self.after:
                raise KeyboardInterrupt
            yield one


def shared(tmp_path: Path, rows: list[Any], **options: Any) -> list[int]:
    """Of every sequence, in the order of the file."""
    source, own = write_rows(tmp_path / "rows.jsonl", rows), Watching()
    (tmp_path / "out.jsonl").unlink(missing_ok=True)
    run(source, tmp_path / "out.jsonl", engine=own, embed=embed, **options)
    return [*own.seen.values()]


def embed(prompts: list[list[int]]) -> Any:
    return np.ones((len(prompts), 2), np.float32)


def length(text: str) -> int:
    return len(ids_of(text))


def plain(*prompts: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": text, "max_tokens": 3, **fields} for text in prompts]


def test_what_two_earlier_rows_have_is_shared(tmp_path: Path) -> None:
    rows = plain(*(SYSTEM + own for own in OWN))
    whole = length(SYSTEM)
    assert shared(tmp_path, rows) == [0, 0] + [whole] * (len(rows) - 2)
    mixed = plain(SYSTEM + "f", OTHER + "f", SYSTEM + "o", OTHER + "o", SYSTEM + "i")
    mixed += plain("none of them", OTHER + "i", OTHER)
    other = length(OTHER)
    assert shared(tmp_path, mixed) == [0, 0, 0, 0, whole, 0, other, other - 1]


def test_rows_far_before_do_not_count(tmp_path: Path) -> None:
    between = plain(*(f"{i:02}" for i in range(LAST)))
    begin, end = plain(SYSTEM + "a", SYSTEM + "b"), plain(SYSTEM + "c")
    assert shared(tmp_path, [*begin, *between[2:], *end])[-1] == length(SYSTEM)
    assert shared(tmp_path, [*begin, *between[1:], *end])[-1] == 0
    body = {"prompt": [f"{i:02}" for i in range(LAST - 1)], "max_tokens": 2}
    many = {"custom_id": "r", "url": "/v1/completions", "body": body, "method": "POST"}
    assert shared(tmp_path, [*begin, many, *end])[-1] == 0


def test_texts_to_embed_do_not_count(tmp_path: Path) -> None:
    rows = [
        {"custom_id": own, "url": "/v1/embeddings", "body": {"input": SYSTEM + own}}
        for own in OWN
    ]
    assert shared(tmp_path, [*rows, *plain(SYSTEM)]) == [0]


def test_answers_of_one_prompt_share_it_unless_others_give_more(tmp_path: Path) -> None:
    long = plain(*(SYSTEM + own for own in OWN[:3]), n=2)
    first = [length(SYSTEM + own) - 1 for own in OWN[:2] for _ in range(2)]
    assert shared(tmp_path, long) == [*first, length(SYSTEM), length(SYSTEM)]
    short = plain(*(own + SYSTEM for own in ("x1", "x2", "x3")), n=2)
    assert shared(tmp_path, short) == [length(SYSTEM) + 1] * 6


def test_prompts_of_one_row_share_too(tmp_path: Path) -> None:
    body = {"prompt": [SYSTEM + own for own in OWN[:4]], "max_tokens": 2}
    rows = [
        {"custom_id": "r", "url": "/v1/completions", "body": body, "method": "POST"}
    ]
    assert shared(tmp_path, rows) == [0, 0, length(SYSTEM), length(SYSTEM)]


def test_prompts_of_other_frequencies_are_no_neighbours(tmp_path: Path) -> None:
    given = settings()
    rope = replace(
        given.config.rope, scaling=DynamicNTK(factor=2.0, original_length=16)
    )
    given = replace(given, config=replace(given.config, rope=rope))
    rows = plain(
        *(SYSTEM + own for own in ("one", "two", "four", "six", "ten", "many"))
    )
    assert shared(tmp_path, rows, settings=given)[-2:] == [length(SYSTEM), 0]


@pytest.mark.parametrize("after", [1, 9, 23])
def test_a_run_that_is_taken_up_shares_the_same(tmp_path: Path, after: int) -> None:
    rows: list[Any] = []
    for i in range(40):
        text = (SYSTEM, OTHER, "")[i % 3] + OWN[i % 7]
        rows += plain(text, max_tokens=1 + 7 * i % 20)
        if i % 5 == 0:
            url = {"url": "/v1/embeddings", "method": "POST", "custom_id": f"e{i}"}
            rows += [{**url, "body": {"input": text}}, '{"cut short']
    source = write_rows(tmp_path / "rows.jsonl", rows)
    whole, first, rest = Watching(), Watching(after), Watching()

    run(source, tmp_path / "whole.jsonl", engine=whole, embed=embed)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out.jsonl", engine=first, embed=embed)
    run(source, tmp_path / "out.jsonl", engine=rest, embed=embed)
    assert 0 < len(rest.seen) < len(whole.seen) == 40
    assert rest.seen == {key: whole.seen[key] for key in rest.seen}
    assert any(rest.seen.values())
