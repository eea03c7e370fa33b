"""Fifty kills leave the same answers as none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from batch_file_helpers import lines_of, mixed_rows, records_of, run, write_rows

from jrope.batch.journal import id_of

SCRIPT = Path(__file__).with_name("batch_kills.py")


def test_fifty_kills_leave_the_answers_of_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source = write_rows(tmp_path / "rows.jsonl", mixed_rows(700))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(source, whole)
    done = subprocess.run(
        [sys.executable, SCRIPT, source, output, "50"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["left"]) > 20  # else runs end before they are killed
    assert len({*told["left"]}) > 10 and told["torn"] > 0  # at many points
    assert lines_of(output) == lines_of(whole)
    assert len({id_of(record) for record in records_of(output)}) == 700
