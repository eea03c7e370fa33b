"""`run_batch`: every row has one answer, whatever happens on the way."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from batch_file_helpers import (
    HashEngine,
    lines_of,
    mixed_rows,
    records_of,
    run,
    settings,
    write_rows,
)

from jrope.batch.journal import id_of
from jrope.batch.manifest import Manifest
from jrope.errors import JropeError
from jrope.rope import Rope


@pytest.fixture(autouse=True)
def _same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", mixed_rows(70))


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> list[bytes]:
    """The sorted lines of an undisturbed run."""
    run(source, tmp_path / "whole.jsonl")
    return lines_of(tmp_path / "whole.jsonl")


class Stop(Exception):
    """What ends a run early."""


class Stopping(HashEngine):
    """Raises after so many sequences."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def run(self, *given: Any) -> Any:
        for count, one in enumerate(super().run(*given)):
            if count == self.after:
                raise Stop
            yield one


def stop_after(count: int, source: Path, output: Path) -> None:
    with pytest.raises(Stop):
        run(source, output, engine=Stopping(count))


def test_every_row_has_one_answer(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    summary = run(source, output)
    records = records_of(output)
    assert len(records) == len({id_of(r) for r in records}) == 70
    assert summary.answered == sum(r["error"] is None for r in records) == 40
    assert summary.failed == 30 and summary.before == summary.running == 0
    assert {r["line"] for r in records if r.get("custom_id", "") is None} == {
        *range(5, 71, 7),
        *range(6, 71, 7),
        *range(7, 71, 7),
    }


def test_order_and_batch_do_not_matter(
    source: Path, tmp_path: Path, whole: list[bytes]
) -> None:
    output = tmp_path / "out.jsonl"
    run(source, output, engine=HashEngine(slots=1, chunk=64))
    assert lines_of(output) == whole
    assert output.read_bytes() != (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("count", [0, 1, 17, 40])
def test_an_error_of_the_engine_keeps_what_is_done(
    source: Path, tmp_path: Path, whole: list[bytes], count: int
) -> None:
    output = tmp_path / "out.jsonl"
    stop_after(count, source, output)
    before = [r for r in records_of(output) if r["error"] is None]
    engine = HashEngine()
    summary = run(source, output, engine=engine)
    assert summary.before == len(before)
    assert summary.answered == 40 - len(before)
    assert lines_of(output) == whole


def test_a_finished_run_generates_nothing_again(source: Path, tmp_path: Path) -> None:
    output = write_rows(tmp_path / "rows2.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    source, output = output, tmp_path / "out.jsonl"
    run(source, output)
    before = output.read_bytes()
    engine = HashEngine()
    assert run(source, output, engine=engine).before == 2
    assert engine.taken == 0 and output.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 2, 30, 200])
def test_a_torn_last_line_is_done_again(
    source: Path, tmp_path: Path, whole: list[bytes], cut: int
) -> None:
    output = tmp_path / "out.jsonl"
    stop_after(30, source, output)
    os.truncate(output, output.stat().st_size - cut)
    run(source, output)
    assert lines_of(output) == whole


def test_a_damaged_line_is_done_again(
    source: Path, tmp_path: Path, whole: list[bytes]
) -> None:
    output = tmp_path / "out.jsonl"
    run(source, output)
    data = bytearray(output.read_bytes())
    data[500:900] = bytes(400)  # what a power cut may leave
    output.write_bytes(data)
    run(source, output)
    assert lines_of(output) == whole


def test_a_corrected_row_replaces_its_failure(tmp_path: Path) -> None:
    rows: list[Any] = [{"custom_id": "a", "prompt": "x"}, {"custom_id": "b"}]
    source, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    assert run(source, output).failed == 1
    rows[1]["prompt"] = "y"
    write_rows(source, rows)
    summary = run(source, output)
    assert (summary.before, summary.answered, summary.failed) == (1, 1, 0)
    assert [r["custom_id"] for r in records_of(output)] == ["a", "b"]


def test_more_rows_may_follow(tmp_path: Path) -> None:
    rows = [{"prompt": str(i)} for i in range(9)]
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    run(write_rows(source, rows[:4]), output)
    assert run(write_rows(source, rows), output).before == 4
    assert len(records_of(output)) == 9


def test_answers_to_other_rows_are_not_mixed_in(tmp_path: Path) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    run(write_rows(source, [{"custom_id": "a", "prompt": "x"}]), output)
    before = output.read_bytes()
    write_rows(source, [{"custom_id": "a", "prompt": "z"}])
    with pytest.raises(JropeError, match="1 answers to rows that the input no longer"):
        run(source, output)
    assert output.read_bytes() == before


def test_in_order_sorts_as_the_input_is(
    source: Path, tmp_path: Path, whole: list[bytes]
) -> None:
    output = tmp_path / "out.jsonl"
    stop_after(30, source, output)
    run(source, output, in_order=True)
    assert lines_of(output) == whole
    numbers = [r["number"] for r in records_of(output) if "number" in r]
    assert numbers == sorted(numbers) and len(numbers) == 20


def test_shards_share_the_rows(source: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, output in enumerate(outputs):
        run(source, output, shard=(i, 3))
    every = [r for output in outputs for r in records_of(output)]
    assert len(every) == len({id_of(r) for r in every}) == 70
    with pytest.raises(JropeError, match=r"shard 0/3 \(now 1/3\)"):
        run(source, outputs[0], shard=(1, 3))


# What is refused before work starts


def test_duplicates_are_named(tmp_path: Path) -> None:
    rows = [{"custom_id": f"r{i % 9}", "prompt": str(i)} for i in range(20)]
    engine = HashEngine()
    with pytest.raises(JropeError, match=r"'r0' \(line 10\), .* and 6 more") as error:
        run(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "out", engine=engine)
    assert str(error.value).count("line") == 5
    assert engine.taken == 0 and not (tmp_path / "out").exists()


def test_duplicates_in_other_shards_are_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", [{"custom_id": "a", "prompt": "x"}] * 2)
    with pytest.raises(JropeError, match="custom_id given twice: 'a'"):
        run(source, tmp_path / "out", shard=(0, 2))


def test_equal_rows_without_custom_id_are_two_rows(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", [{"prompt": "x"}] * 3)
    assert run(source, tmp_path / "out").answered == 3


def test_other_settings_are_named(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(source, output, fingerprint={"weights": "a" * 64})
    with pytest.raises(JropeError, match=r"weights a{8} \(now b{8}\), max_length"):
        run(
            source,
            output,
            fingerprint={"weights": "b" * 64},
            settings=settings(max_length=63),
        )


def test_a_second_rope_is_a_setting_too(tmp_path: Path) -> None:
    ropes = [Rope(theta=theta, rotary_dim=8) for theta in (1e4, 5e5)]
    for rope in (ropes[0], ropes[0]):
        with Manifest(tmp_path / "out", {"local_rope": rope}):
            pass
    with pytest.raises(JropeError, match=r"local_rope Rope\(theta=10000.*now Rope"):
        Manifest(tmp_path / "out", {"local_rope": ropes[1]})


def test_a_file_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    output.write_text("mine")
    with pytest.raises(JropeError, match=r"is there, but not notes\.txt\.run\.json"):
        run(source, output)
    assert output.read_text() == "mine"
    assert not (tmp_path / "notes.txt.run.json").exists()


def test_a_manifest_cut_short_begins_anew(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.run.json").write_text('{"schema": 1, "cre')
    assert run(source, tmp_path / "out.jsonl").answered == 40


def test_two_runs_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    class Second(HashEngine):
        def run(self, *given: Any) -> Any:
            with pytest.raises(JropeError, match="another run writes to it"):
                run(source, output)
            return super().run(*given)

    run(source, output, engine=Second())
    assert len(records_of(output)) == 70


# The disk and the input


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("good", [0, 3, 20])
def test_a_full_disk_spoils_nothing(
    source: Path,
    tmp_path: Path,
    whole: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    good: int,
) -> None:
    output, count, own = tmp_path / "out.jsonl", 0, getattr(os, call)

    def full(file: int, *data: Any) -> Any:
        nonlocal count
        count += 1
        if count <= good:
            return own(file, *data)
        if data:
            own(file, data[0][: len(data[0]) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        if call == "write" or good < 20:
            with pytest.raises(JropeError, match="No space left on device; what it"):
                run(source, output)
    if output.exists():
        assert len(records_of(output)) >= min(good, 3) * (call == "write")
    run(source, output)
    assert lines_of(output) == whole


def test_an_input_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", [{"prompt": str(i)} for i in range(9)])

    class Changing(HashEngine):
        def __init__(self, rows: list[Any]) -> None:
            super().__init__()
            self.rows = rows

        def run(self, *given: Any) -> Any:
            write_rows(source, self.rows)
            return super().run(*given)

    with pytest.raises(JropeError, match="line 1 changed while it was read"):
        run(source, tmp_path / "a", engine=Changing([{"prompt": "another"}]))
    write_rows(source, [{"prompt": str(i)} for i in range(9)])
    with pytest.raises(JropeError, match="7 rows went while it was read"):
        run(
            source,
            tmp_path / "b",
            engine=Changing([{"prompt": str(i)} for i in range(2)]),
        )


def test_an_interrupted_run_leaves_rows_for_the_next(
    source: Path, tmp_path: Path, whole: list[bytes]
) -> None:
    output, looks = tmp_path / "out.jsonl", 0

    def interrupted() -> bool:
        nonlocal looks
        looks += 1
        return looks > 60

    engine = HashEngine()
    summary = run(source, output, engine=engine, interrupted=interrupted)
    assert summary.interrupted and 0 < summary.answered < 40
    assert {*lines_of(output)} < {*whole}
    assert not run(source, output).interrupted
    assert lines_of(output) == whole


def test_rows_are_read_as_the_engine_takes_them(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "x.jsonl", [{"prompt": "x"}] * 200)
    most = 0

    def progress(summary: Any) -> None:
        nonlocal most
        most = max(most, summary.running)

    run(source, tmp_path / "out", progress=progress)
    assert most <= 4


def test_lines_are_json_whatever_the_text(tmp_path: Path) -> None:
    texts = ["\u2028", "\ud800", "\x00\x85", "日本"]
    source = write_rows(
        tmp_path / "x.jsonl", [{"prompt": "x", "text": text} for text in texts]
    )
    run(source, tmp_path / "out", in_order=True)
    data = (tmp_path / "out").read_bytes()
    assert [json.loads(line)["text"] for line in data.decode().splitlines()] == texts
    assert "日本".encode() in data


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    run(source, tmp_path / "out", in_order=True)
    assert [r["error"] for r in records_of(tmp_path / "out")] == [None, None]


def test_a_line_too_long_is_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jrope.batch.source.LONGEST_LINE", 20)
    rows = [{"prompt": "a"}, {"prompt": "a" * 50}, {"prompt": "b"}]
    run(write_rows(tmp_path / "x", rows), tmp_path / "out", in_order=True)
    errors = [r["error"] for r in records_of(tmp_path / "out")]
    assert errors[0] is errors[2] is None
    assert errors[1]["message"] == "it is longer than 20 bytes"


def test_choices_draw_with_the_seeds_that_follow(tmp_path: Path) -> None:
    given: list[tuple[Any, list[int], int]] = []

    class Noting(HashEngine):
        def check(self, work: Any) -> None:
            given.append((work.key[1], work.prompt.tolist(), work.seed))

    body = {"prompt": [[1], [2, 3]], "n": 2, "seed": 2**32 - 1}
    row = {"custom_id": "a", "url": "/v1/completions", "body": body}
    run(write_rows(tmp_path / "x", [row]), tmp_path / "out", engine=Noting())
    last = 2**32 - 1
    assert given == [(0, [1], last), (1, [1], 0), (2, [2, 3], last), (3, [2, 3], 0)]


def test_pipes_are_refused(source: Path, tmp_path: Path) -> None:
    """Both would be waited for, since both are opened again."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(JropeError, match="pipe: it is no regular file, and it is read"):
        run(pipe, tmp_path / "out.jsonl")
    with pytest.raises(JropeError, match="pipe: it is no regular file, which answers"):
        run(source, pipe)
    assert not (tmp_path / "pipe.run.json").exists()
