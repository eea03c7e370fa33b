"""The journal: what it keeps, what it drops, and which files it refuses."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from jrope.errors import JropeError
from jrope.lab.journal import Journal, current, read_journal

TEXT = {"name": "a.txt", "sha256": "a" * 64, "tokens": 9}
HEADER = {"model": "m", "dtype": "float32", "texts": [TEXT], "plan": {"stride": 256}}
ONE: dict[str, Any] = {
    "kind": "perplexity",
    "rope": "yarn:2",
    "context": 512,
    "windows": "first",
    "nll": 3.25,
}
TWO = {**ONE, "context": 1024}


def failure(record: dict[str, Any]) -> dict[str, Any]:
    kept = {name: record[name] for name in ("rope", "context", "windows")}
    return {"kind": "failure", "task": record["kind"], **kept, "error": "no memory"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.jsonl"
    with Journal(file, HEADER) as journal:
        journal.add(ONE)
        journal.add(TWO)
    return file


def test_records_are_on_the_disk_when_add_returns(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    with Journal(file, HEADER) as journal:
        journal.add(ONE)
        lines = file.read_text().splitlines()
        assert [json.loads(line) for line in lines] == [journal.records[0], ONE]
        assert not journal.has(TWO)
    assert read_journal(file)[1:] == [ONE]


def test_a_record_is_synchronised_after_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def fsync(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    file = tmp_path / "run.jsonl"
    with Journal(file, HEADER) as journal:
        sizes = [file.stat().st_size]
        journal.add(ONE)
        sizes.append(file.stat().st_size)
    assert seen == sizes


def test_a_run_goes_on(path: Path) -> None:
    with Journal(path, HEADER) as journal:
        assert journal.resumed == 2
        assert journal.has({**TWO, "nll": None})
        assert not journal.has({**TWO, "windows": "sliding"})
        assert journal.records[1:] == [ONE, TWO]
        journal.add({**ONE, "windows": "sliding"})
    assert len(read_journal(path)) == 4


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_line_is_dropped(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path, HEADER) as journal:
        assert journal.has(ONE) and not journal.has(TWO)
        journal.add(TWO)
    assert path.read_bytes() == whole


def test_a_torn_header_begins_anew(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])
    with Journal(path, HEADER) as journal:
        assert journal.resumed == 0
    assert len(read_journal(path)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, r"model m \(now other\)"),
        ({"dtype": "bfloat16"}, r"dtype float32 \(now bfloat16\)"),
        ({"plan": {"stride": 64}}, r"stride 256 \(now 64\)"),
        ({"plan": {"stride": 256, "seed": 1}}, r"seed None \(now 1\)"),
        (
            {"texts": [{**TEXT, "sha256": "b" * 64}]},
            r"texts \[aaaaaaaa\] \(now \[bbbbbbbb\]\)",
        ),
    ],
)
def test_another_run_is_refused_by_name(
    path: Path, change: dict[str, Any], message: str
) -> None:
    before = path.read_bytes()
    with pytest.raises(JropeError, match=f"holds a run with {message}"):
        Journal(path, HEADER | change)
    assert path.read_bytes() == before


def test_renamed_texts_are_the_same_texts(path: Path) -> None:
    with Journal(path, HEADER | {"texts": [{**TEXT, "name": "b.txt"}]}) as journal:
        assert journal.resumed == 2


@pytest.mark.parametrize(
    "data", [b"notes without an end", b"a\nb\n", b'{"kind": "perplexity"}\n', b"[1]\n"]
)
def test_other_files_are_left_alone(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(data)
    with pytest.raises(JropeError, match="not a journal of jrope evaluate"):
        Journal(file, HEADER)
    assert file.read_bytes() == data


def test_damage_before_the_end_is_an_error(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(JropeError, match="line 2 is damaged"):
        Journal(path, HEADER)


def test_two_runs_do_not_share_a_file(path: Path) -> None:
    with Journal(path, HEADER), pytest.raises(JropeError, match="another run writes"):
        Journal(path, HEADER)


def test_without_a_file_records_are_held() -> None:
    with Journal(None, HEADER) as journal:
        journal.add(ONE)
        assert journal.has(ONE)
    assert journal.records[0]["schema"] == 1


def test_failures_that_were_made_good_are_forgotten() -> None:
    header = {"kind": "header"}
    records = [header, failure(ONE), failure(TWO), ONE, failure(TWO)]
    assert current(records) == [header, ONE, failure(TWO)]


def test_a_failure_is_of_its_windows_alone() -> None:
    records = [{"kind": "header"}, failure(ONE), {**ONE, "windows": "sliding"}]
    assert current(records) == records


def test_a_failure_is_tried_again(path: Path) -> None:
    with Journal(path, HEADER) as journal:
        journal.add(failure({**ONE, "context": 4096}))
    with Journal(path, HEADER) as journal:
        assert not journal.has({**ONE, "context": 4096})


def test_a_journal_without_results_begins_anew(tmp_path: Path) -> None:
    """A first try that failed does not bind the next one to its settings."""
    file = tmp_path / "run.jsonl"
    with Journal(file, HEADER) as journal:
        journal.add(failure(ONE))
    with Journal(file, HEADER | {"dtype": "bfloat16"}) as journal:
        assert journal.resumed == 0
    assert [r["dtype"] for r in read_journal(file)] == ["bfloat16"]


def test_distances_over_longer_contexts_replace_those_before() -> None:
    near, far, other = (
        {"kind": "distance", "rope": rope, "length": length}
        for rope, length in (("yarn:2", 512), ("yarn:2", 1024), ("default", 512))
    )
    assert current([{"kind": "header"}, near, other, far])[1:] == [other, far]
