"""Rows and answers in Parquet."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from batch_file_helpers import mixed_rows, records_of, run, write_rows

from jrope.batch.journal import id_of
from jrope.batch.source import Source, pyarrow
from jrope.errors import JropeError


@pytest.fixture
def arrow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    pytest.importorskip("pyarrow")
    return pytest.importorskip("pyarrow.parquet")


def read(arrow: Any, folder: Path) -> list[dict[str, Any]]:
    rows = [arrow.read_table(part).to_pylist() for part in sorted(folder.iterdir())]
    return [row for part in rows for row in part]


def test_without_pyarrow_one_line_says_what_to_install() -> None:
    with pytest.raises(JropeError, match=r'pip install "jrope\[parquet\]", or give'):
        pyarrow("pyarrow_that_is_not_there")


def test_parquet_rows_are_those_of_json_lines(arrow: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "n": None, "topic": "x", "when": 1.5},
        {"prompt": "b", "n": 2, "topic": None, "when": None},
    ]
    import pyarrow

    arrow.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = [line.fields for line in Source(tmp_path / "rows.parquet")]
    assert lines == [
        {"prompt": "a", "topic": "x", "when": 1.5},
        {"prompt": "b", "n": 2},
    ]
    run(tmp_path / "rows.parquet", tmp_path / "out.jsonl", in_order=True)
    first, second = records_of(tmp_path / "out.jsonl")
    assert first["topic"] == "x" and len(second["generated_text"]) == 2


def test_tables_of_pandas_hold_floats_and_structs(arrow: Any, tmp_path: Path) -> None:
    """Whole ones where an integer is missing, NaN, and fields that other rows have."""
    form = {"type": "text", "json_schema": None}
    rows = [
        {"prompt": "a", "max_tokens": 2.0, "score": float("nan"), "n": None},
        {"prompt": "b", "response_format": form, "seed": float("nan"), "n": 2.0},
    ]
    import pyarrow

    arrow.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    run(tmp_path / "rows.parquet", tmp_path / "out.jsonl", in_order=True)
    first, second = records_of(tmp_path / "out.jsonl")
    assert first["error"] is second["error"] is None and "score" not in first
    assert len(first["generated_tokens"]) <= 2 == len(second["generated_text"])


def test_parquet_answers_hold_the_records(arrow: Any, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", mixed_rows(35))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.parquet"
    run(source, whole)
    summary = run(source, output)
    found = read(arrow, output)
    assert summary.answered + summary.failed == len(found) == 35
    records = {id_of(record): record for record in records_of(whole)}
    for row in found:
        record = json.loads(row["record"])
        assert record == records[id_of(row)]
        assert row["custom_id"] == record.get("custom_id")
        assert (row["error"] is None) == (record["error"] is None)
        assert (row["text"] is None) == (row["error"] is not None)
    chat = next(r for r in found if r["custom_id"] == "r2")
    body = json.loads(chat["record"])["response"]["body"]
    assert chat["text"] == body["choices"][0]["message"]["content"]
    assert chat["finish_reason"] == body["choices"][0]["finish_reason"]


def test_only_whole_files_have_names(
    arrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", mixed_rows(35))
    output, looks = tmp_path / "out.parquet", 0

    def interrupted() -> bool:
        nonlocal looks
        looks += 1
        return looks > 40

    run(source, output, interrupted=interrupted)
    before = read(arrow, output)
    assert 0 < len(before) < 35

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(JropeError, match="No space left on device"):
            run(source, output)
    good = [row for row in before if row["error"] is None]
    run(source, output)
    after = read(arrow, output)
    assert len(after) == len({row["request_id"] for row in after}) == 35
    assert all(row in after for row in good)
    assert run(source, output).before == 20


def test_half_a_surrogate_pair_does_not_end_a_run(arrow: Any, tmp_path: Path) -> None:
    rows = [{"custom_id": "\ud800", "prompt": "x"}, {"prompt": "y"}]
    output = tmp_path / "out.parquet"
    run(write_rows(tmp_path / "rows.jsonl", rows), output)
    found = {json.loads(row["record"]).get("custom_id") for row in read(arrow, output)}
    assert found == {"\ud800", None}


def test_parquet_is_not_sorted(tmp_path: Path) -> None:
    with pytest.raises(JropeError, match="in_order is for JSON lines"):
        run(tmp_path / "rows.jsonl", tmp_path / "out.parquet", in_order=True)


def test_bytes_are_the_texts_they_spell(arrow: Any, tmp_path: Path) -> None:
    """Columns of other writers do not say that they are UTF-8."""
    import pyarrow

    rows = pyarrow.table({"prompt": pyarrow.array([b"ab", b"\xff"], "binary")})
    arrow.write_table(rows, tmp_path / "rows.parquet")
    run(tmp_path / "rows.parquet", tmp_path / "out.jsonl", in_order=True)
    first, second = records_of(tmp_path / "out.jsonl")
    assert first["num_input_tokens"] == 2
    assert "prompt: it is no Unicode" in second["error"]["message"]


def test_a_damaged_table_is_named(arrow: Any, tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    source.write_bytes(b"PAR1")
    with pytest.raises(JropeError, match=r"rows\.parquet: it is no whole Parquet file"):
        run(source, tmp_path / "out.jsonl")
