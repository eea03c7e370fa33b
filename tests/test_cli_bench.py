"""`jrope bench`: its report, its arguments, and how it refuses."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
from bench_helpers import quick as quick
from bench_helpers import run, tiny

from jrope.bench.model import random_params
from jrope.bench.report import Row
from jrope.cli import bench, common, main
from jrope.hf.checkpoint import save


def test_report_is_complete(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert run("--batch", "1,2", "--json", str(file)) == 0
    report = json.loads(file.read_text("utf-8"))
    assert {*report} == {
        "command", "versions", "device", "compile_cache", "model", "config",
        "host_load_before", "load_seconds", "ceilings", "rows",
    }  # fmt: skip
    assert {"jrope", "jax", "jaxlib"} <= {*report["versions"]}
    assert report["device"]["platform"] == "cpu"
    assert {"kind", "driver", "memory_bytes", "cores"} <= {*report["device"]}
    assert report["model"]["name"] == "smollm2-135m"
    assert report["model"]["dtype"] == "bfloat16"
    assert report["model"]["layers"] == report["config"]["num_hidden_layers"] == 1
    assert report["command"][0] == "jrope"
    assert {*report["ceilings"]} == {"read", "matmul", "transfer"}
    places = [(r["work"], r["batch"], r["order"]) for r in report["rows"]]
    assert places == [
        ("decode", 1, "out_in"),
        ("prefill", 1, "in_out"),
        ("prefill", 2, "in_out"),
        ("decode", 2, "in_out"),
    ]
    for row in report["rows"]:
        assert {*row} == {field.name for field in dataclasses.fields(Row)}
        assert row["problem"] is None
        assert row["seconds"] > 0
        assert row["tokens_per_second"] > 0
        assert row["of_ceiling"] > 0
        assert row["memory_bytes"] > row["temp_bytes"] >= 0
        assert row["compile_seconds"] > 0
    assert report["rows"][3]["context"] == 48  # the mean of 32 and 64
    out = capsys.readouterr().out
    assert all(word in out for word in ("weights", "limit", "decode", "prefill"))


def test_json_on_standard_output_is_alone_there(capsys):
    assert run("--only", "prefill", "--json", "-") == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["rows"]) == 1
    assert "prefill jrope" in captured.err


def test_folder_is_loaded_in_its_own_dtype(tmp_path, capsys):
    config = tiny()
    save(tmp_path / "m", random_params(config, jnp.float16), config)
    words = ["--context", "8", "--new", "2", "--repeat", "1", "--json", "-"]
    assert main(["bench", str(tmp_path / "m"), "--layers", "1", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["dtype"] == "float16"
    assert report["model"]["layers"] == 1
    assert report["load_seconds"] > 0


def test_rope_may_be_another(capsys):
    assert run("--only", "decode", "--rope", "linear:4", "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert "Linear" in report["config"]["rope"]["scaling"]
    assert report["model"]["rope"] == "linear:factor=4"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "either a FOLDER or --shape"),
        (["x", "--shape", "llama3-8b"], "either a FOLDER or --shape"),
        (["--shape", "llama9"], "invalid choice: 'llama9'"),
        (["--shape", "llama3-8b", "--batch", "0"], "--batch: '0' is not a whole"),
        (["--shape", "llama3-8b", "--batch", "1,"], "--batch: '' is not a whole"),
        (["--shape", "llama3-8b", "--context", "2m"], "--context: '2m' is not"),
        (["--shape", "llama3-8b", "--top-p", "1.5"], "top_p: got 1.5"),
        (["--shape", "llama3-8b", "--capacity-factor", "0.5"], "want at least 1"),
        (["--shape", "llama3-8b", "--capacity-factor", "nan"], "want at least 1"),
        (["--shape", "smollm2-135m", "--layers", "31"], "want 1 to 30"),
        (["--shape", "smollm2-135m", "--versus", "vllm"], "invalid choice: 'vllm'"),
        (["/no/such/folder"], "no folder /no/such/folder"),
    ],
)
def test_wrong_arguments_are_one_line(words, message, capsys):
    assert main(["bench", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jrope: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_sizes_may_be_in_k():
    assert common.count("2k") == 2048
    assert common.listed(common.count)("2k, 16,16") == (2048, 16)


def test_weights_too_large_are_refused_before_they_are_made(monkeypatch, capsys):
    monkeypatch.setattr(bench, "memory_limit", lambda: 80 * 10**9)
    assert main(["bench", "--shape", "llama3-70b"]) == 2
    assert "141.1 GB of bfloat16 weights" in capsys.readouterr().err
