"""`jrope evaluate` on the embedded model: records, resuming, failures, bad input."""

import argparse
import hashlib
import json
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import write_adapter
from jax.errors import JaxRuntimeError

from jrope.cli import evaluate, main
from jrope.cli.evaluate_plan import plan_of, split_ropes
from jrope.cli.terminal import TimeLeft, duration_text
from jrope.errors import JropeError
from jrope.hf.checkpoint import load
from jrope.lab import journal, memory, passkey, perplexity
from jrope.lab.results import Results
from jrope.model.scores import score
from jrope.model.with_rope import with_rope
from jrope.rope import describe

EMBEDDED = Path(__file__).parents[1] / "examples" / "models" / "jrope-tiny"
TEXT = EMBEDDED / "held_out.txt"
ROPES = ("--rope", "default,linear:2", "--rope", "yarn:factor=2,original=64")
WORDS = ("--text", TEXT, "--dtype", "float32", "--context", "192,128", *ROPES)
WORDS += ("--stride", 64, "--tokens", 400, "--trials", 1, "--depths", "0.5")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JROPE_CACHE_DIR", "")
    monkeypatch.delenv("JROPE_DEBUG", raising=False)


def run(*words: object, status: int = 0) -> None:
    command = ["evaluate", EMBEDDED, *words]
    assert main([str(word) for word in command]) == status


def perplexities(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        (r["rope"], r["context"], r["windows"]): r
        for r in journal.read_journal(path)
        if r["kind"] == "perplexity"
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of everything; read only."""
    path = tmp_path_factory.mktemp("evaluate") / "run.jsonl"
    run(*WORDS, "--out", path, "--distance")
    only = ("--rope", "default", "--context", 128, "--no-perplexity", "--passkey")
    run(*[w for w in WORDS if w not in ROPES], *only, "--out", path)
    return path


def test_records_are_what_the_library_says(finished: Path) -> None:
    params, config = load(EMBEDDED, "float32")
    found = perplexities(finished)
    assert len(found) == 3 * 2 * 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    ids = tokenizer(TEXT.read_text("utf-8"), verbose=False)["input_ids"]
    stretched = with_rope(config, "yarn", factor=2, original=64)
    want = -score(params, np.array([ids[:192]]), config=stretched)
    record = found["yarn:factor=2,original=64", 192, "first"]
    assert record["nll"] == pytest.approx(float(want.mean()), abs=1e-5)
    assert record["tokens"] == 191 and record["stride"] is None
    sliding = found["default", 128, "sliding"]
    assert sliding["tokens"] == 399 and sliding["stride"] == 64
    assert sliding["low"] < sliding["nll"] < sliding["high"]


def test_every_kind_of_record_is_there(finished: Path) -> None:
    records = journal.read_journal(finished)
    kinds = [r["kind"] for r in records]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {
        "header": 1,
        "method": 3,
        "distance": 3,
        "perplexity": 12,
        "passkey": 1,
    }
    head = records[0]
    assert head["model"] == "jrope-tiny" and head["trained_length"] == 256
    assert head["texts"][0]["name"] == "held_out.txt"
    assert head["texts"][0]["tokens"] == 400
    assert head["dtype"] == "float32" and head["plan"]["stride"] == 64
    (yarn,) = (r for r in records if r["kind"] == "method" and r["rope"][:4] == "yarn")
    rope = with_rope(load(EMBEDDED)[1], "yarn", factor=2, original=64).rope
    np.testing.assert_array_equal(
        yarn["inv_freq"], rope.frequencies(None, np.float64)[0]
    )
    assert yarn["base_inv_freq"][0] == 1.0 and yarn["attention_scaling"] > 1
    (default,) = (
        r for r in records if r["kind"] == "distance" and r["rope"] == "default"
    )
    assert default["distances"][-1] == 191


def test_tables(finished: Path, tmp_path: Path, capsys: Any) -> None:
    """What is recorded is printed again without measuring again."""
    path = shutil.copy(finished, tmp_path)
    before = Path(path).read_bytes()
    run(*WORDS, "--out", path, "--distance")
    assert Path(path).read_bytes() == before
    out, err = capsys.readouterr()
    assert "16 records kept" in err
    for line in (
        "jrope-tiny (float32, ",
        "Perplexity of the first tokens of each text, by context (95 % block boot",
        "Perplexity in sliding windows, stride 64, by context",
        "Passkeys found, length 128",
        "Mean attention score by distance",
    ):
        assert line in out
    cell = perplexities(finished)["linear:2", 192, "first"]
    assert f"{np.exp(cell['nll']):.4g} ({np.exp(cell['low']):.4g}-" in out


def test_a_killed_run_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Killed within a line: only what is missing is measured, and comes out equal."""
    path = tmp_path / "run.jsonl"
    lines = finished.read_bytes().splitlines(keepends=True)
    kept = [i for i, line in enumerate(lines) if b'"perplexity"' in line][3]
    path.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    measured: list[tuple[int, int | None]] = []
    real = perplexity.perplexity

    def counting(*args: Any, **kwargs: Any) -> Any:
        measured.append((args[3], kwargs["stride"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(perplexity, "perplexity", counting)
    run(*WORDS, "--out", path)
    assert len(measured) == 12 - 3
    found, want = perplexities(path), perplexities(finished)
    assert found.keys() == want.keys()
    for key, record in found.items():
        assert record["nll"] == pytest.approx(want[key]["nll"], abs=1e-6)
    assert "6 records kept" in capsys.readouterr().err


def test_other_settings_are_refused_by_name(
    finished: Path, tmp_path: Path, capsys: Any
) -> None:
    path = shutil.copy(finished, tmp_path)
    words = ["--context", 128, "--stride", 32, "--tokens", 400, "--out", path]
    run("--text", TEXT, *words, status=2)
    err = capsys.readouterr().err
    assert "dtype float32 (now bfloat16)" in err and "stride 64 (now 32)" in err
    assert err.count("\n") == 1


def _no_memory(*_: Any, **__: Any) -> Any:
    raise JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n at x"
    )


def test_what_fails_is_one_line_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = perplexity.perplexity

    def failing(params: Any, config: Any, texts: Any, context: int, **more: Any) -> Any:
        broken = context == 96 and config.rope.scaling is not None
        return (_no_memory if broken else real)(params, config, texts, context, **more)

    monkeypatch.setattr(perplexity, "perplexity", failing)
    path, ropes = (
        tmp_path / "run.jsonl",
        "longrope,linear:2,default,longrope:short=1,long=2",
    )
    words = ["--context", "64,96", "--rope", ropes, "--out", path]
    run("--text", TEXT, *words, status=1)
    out, err = capsys.readouterr()
    failed = [line for line in err.splitlines() if "%" not in line[:11]]
    assert [line.split(":")[1] for line in failed] == [
        " method longrope",
        " method longrope",
        " perplexity linear",
    ]
    assert (
        "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)" in err
    )
    assert "needs short_factor, long_factor" in err and "want 16 numbers" in err
    assert len(perplexities(path)) == 3
    assert "\nFailed\n" in out
    monkeypatch.setattr(perplexity, "perplexity", real)
    run("--text", TEXT, *words[:3], "linear:2,default", "--out", path, status=1)
    failed = [r for r in journal.read_journal(path) if r["kind"] == "failure"]
    assert [r["task"] for r in failed] == ["method", "method"]  # memory is there now


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BAD: list[tuple[Callable[[Path], list[Any]], str]] = [
    (
        lambda t: ["--text", _write(t / "e.txt", b" \n")],
        "e.txt is empty: it has 0 tokens",
    ),
    (
        lambda t: ["--text", _write(t / "s.txt", b"Emma"), "--context", "1k"],
        "s.txt has 3 tokens, the longest context wants at least 1024",
    ),
    (
        lambda t: ["--text", TEXT, "--context", 96, "--tokens", 80],
        "held_out.txt has 80 tokens (--tokens 80), the longest context wants at lea",
    ),
    (
        lambda t: ["--text", TEXT, _write(t / "s.txt", b"Emma")],
        "s.txt has 3 tokens, the longest context wants at least 64; --skip-short",
    ),
    (
        lambda t: ["--text", _write(t / "b.txt", b"caf\xe9")],
        "is not UTF-8 text: byte 3",
    ),
    (lambda t: ["--text", t / "none.txt"], "none.txt: No such file or directory"),
    (lambda t: ["--text", t], "no .txt files in this folder"),
    (
        lambda t: ["--text", TEXT, "--rope", "linear:0.5"],
        "factor is 0.5, want at least 1",
    ),
    (
        lambda t: ["--text", TEXT, "--rope", "condense:factor=0.25"],
        "factor is 0.25, want at least 1",
    ),
    (
        lambda t: ["--text", TEXT, "--rope", "default,yran:2"],
        "unknown method 'yran', known: model, default, condense, linear, ntk, dynamic, "
        "yarn, dynamic-yarn, llama3, longrope, proportional; did you mean 'yarn'?",
    ),
    (lambda t: ["--text", TEXT, "--rope", "yarn:2,beta=3"], "has no field ['beta']"),
    (lambda t: ["--text", TEXT, "--rope", "linear:two"], "want a number"),
    (lambda t: ["--text", TEXT, "--rope", "model:2"], "model has no fields"),
    (lambda t: ["--text", TEXT, "--stride", 65], "--stride: got 65, want at most"),
    (lambda t: ["--text", TEXT, "--context", 1], "--context: got 1, want at least 2"),
    (lambda t: ["--text", TEXT, "--context", "2kk"], "'2k' is not a whole number"),
    (lambda t: [], "nothing to do: give --text, --passkey or --distance"),
    (lambda t: ["--distance"], "--distance needs a --text"),
    (lambda t: ["--passkey", "--reflow"], "--reflow needs a --text"),
    (lambda t: ["--passkey", "--filler", "text"], "--filler text needs a --text"),
    (lambda t: ["--passkey"], "a context of 64 tokens has no room for the question"),
    (
        lambda t: ["--passkey", "--context", 200, "--depths", "0,2"],
        "--depths: got [2.0], want numbers from 0 to 1",
    ),
    (
        lambda t: ["--text", TEXT, "--report", t / "no" / "r.html"],
        "r.html: No such file or directory",
    ),
    (lambda t: ["--text", TEXT, "--report", t], "Is a directory"),
    (
        lambda t: ["--text", TEXT, "--figures", _write(t / "f", b"") / "x"],
        "Not a directory",
    ),
    (
        lambda t: ["--text", TEXT, "--out", t / "no" / "o.jsonl"],
        "o.jsonl: No such file or directory",
    ),
    (
        lambda t: ["--text", TEXT, "--out", _write(t / "o", b"diary\n")],
        "is not a journal of jrope evaluate",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_line_before_the_work(
    words: Callable[[Path], list[Any]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        pytest.fail("the weights were loaded first")

    monkeypatch.setattr(evaluate, "load", loaded)
    given = words(tmp_path)
    context = [] if "--context" in given else ["--context", 64]
    run(*given, *context, status=2)
    out, err = capsys.readouterr()
    assert err.startswith("jrope: error: ") and message in err
    assert err.count("\n") == 1 and not out


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2000}))
    words = ["evaluate", str(folder), "--text", str(TEXT), "--context", "64"]
    assert main(words) == 2
    message = "the tokenizer has 2048 ids, the model's vocabulary 2000"
    assert message in capsys.readouterr().err


def test_weights_past_the_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 3_000_000)
    run("--text", TEXT, "--context", 64, status=2)
    message = "the weights need 0.00394 GB, but only 0.003 GB are free"
    assert message in capsys.readouterr().err


def test_short_texts_are_left_out_when_asked(tmp_path: Path, capsys: Any) -> None:
    shutil.copy(TEXT, tmp_path)
    _write(tmp_path / "s.txt", b"Emma")
    path = tmp_path / "run.jsonl"
    run("--text", tmp_path, "--skip-short", "--context", 64, "--out", path)
    texts = journal.read_journal(path)[0]["texts"]
    assert [text["name"] for text in texts] == ["held_out.txt"]


def test_probing_the_report_leaves_no_file(tmp_path: Path) -> None:
    report, figures = tmp_path / "r.html", tmp_path / "figures"
    evaluate.check_outputs(report, figures)
    assert not report.exists() and [*figures.iterdir()] == []
    report.write_text("before")
    evaluate.check_outputs(report, None)
    assert report.read_text() == "before"


def test_packages_for_the_report_are_asked_for_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    evaluate.check_outputs(None, tmp_path)  # figures do without
    with pytest.raises(JropeError, match=r"need jinja2, not installed; pip install"):
        evaluate.check_outputs(tmp_path / "r.html", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(JropeError, match="need jinja2 and matplotlib"):
        evaluate.check_outputs(tmp_path / "r.html", tmp_path)
    with pytest.raises(JropeError, match="need matplotlib, not"):
        evaluate.check_outputs(None, tmp_path)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["yarn:2,original=256"], ["yarn:2,original=256"]),
        (
            ["longrope:short=1:1,long=2:4, default"],
            ["longrope:short=1:1,long=2:4", "default"],
        ),
        (["linear:2,linear:2", "linear:2"], ["linear:2"]),
        (["original=3,default"], ["original=3", "default"]),
    ],
)
def test_lists_of_methods(given: list[str], want: list[str]) -> None:
    assert split_ropes(given) == want


def test_a_bar_shows_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with TimeLeft(100) as bar:
        assert bar.left() is None
        bar.begin -= 30
        bar.name("perplexity yarn:2 4096")
        bar.step(25)
        assert bar.left() == pytest.approx(90, abs=1)
        bar.line("something failed")
    err = capsys.readouterr().err
    assert "[#####...............]  25%, 1 min 30 s left  perplexity yarn:2 4096" in err
    assert "\r\x1b[Ksomething failed\n" in err and err.endswith("\r\x1b[K")
    assert duration_text(59.6) == "1 min 0 s"


def test_a_log_says_what_runs(capsys: Any) -> None:
    """On standard error, where the output is captured; results stay clean."""
    run("--text", TEXT, "--context", "64,96", "--rope", "default,linear:2")
    out, err = capsys.readouterr()
    told = [line.split(": ") for line in err.splitlines()]
    assert all(line[0] == "jrope" for line in told)
    assert [line[2] for line in told[:-1]] == [
        f"perplexity {rope} {n}" for n in (64, 96) for rope in ("default", "linear:2")
    ]
    assert told[-1][1] == "100%" and "jrope: " not in out


CONDENSED = EMBEDDED.with_name("jrope-tiny-condensed-8")
LLAMA3 = "llama3:factor=8,low=1,high=4"


def test_methods_have_their_full_names(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is really run, in every table and in the page: the folder's part, too."""
    monkeypatch.setattr(passkey, "answer_passkeys", _no_memory)
    llama3 = with_rope(load(CONDENSED)[1], "llama3", factor=8, low=1, high=4).rope
    wanted = {
        "model": "model: default of positions / 8",
        "condense:2": "default of positions / 2",
        LLAMA3: describe(llama3),
    }
    path, ropes = tmp_path / "run.jsonl", ",".join(wanted)
    words = ["evaluate", CONDENSED, "--text", TEXT, "--context", 192, "--rope", ropes]
    words += ["--distance", "--passkey", "--depths", 0, "--trials", 1, "--out", path]
    assert main([str(word) for word in words]) == 1
    records = journal.read_journal(path)
    labels = {r["rope"]: r["label"] for r in records if r["kind"] == "method"}
    assert labels == wanted
    assert Results.of(records).labels == wanted
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("trained on 256 tokens, theta 10000")
    rows = [line.strip() for line in lines]
    for name in wanted.values():
        assert sum(row.startswith(f"{name}  ") for row in rows) == 2
        assert any(row.startswith(f"passkey {name} at 192, depth 0: ") for row in rows)


def test_reflow_joins_the_lines_of_a_paragraph(tmp_path: Path, capsys: Any) -> None:
    """Hard-wrapped, the model reads the text as if it were not."""
    flowing = TEXT.read_text("utf-8")
    wrapped = "\n\n".join(textwrap.fill(p, 70) for p in flowing.splitlines())
    path, short = _write(tmp_path / "w.txt", wrapped.encode()), ["--context", 192]
    out = {name: tmp_path / name for name in ("plain", "wrapped", "reflowed")}
    run("--text", TEXT, *short, "--out", out["plain"])
    run("--text", path, *short, "--out", out["wrapped"])
    assert "reflow" not in capsys.readouterr().out
    run("--text", path, *short, "--out", out["reflowed"], "--reflow")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(", texts reflowed")
    nll = {n: perplexities(p)["model", 192, "first"]["nll"] for n, p in out.items()}
    assert nll["reflowed"] == pytest.approx(nll["plain"], abs=1e-6)
    assert nll["wrapped"] > nll["plain"] + 0.5
    heads = {name: journal.read_journal(p)[0] for name, p in out.items()}
    assert heads["reflowed"]["plan"]["reflow"] is True
    same = [heads[name]["texts"][0]["sha256"] for name in ("wrapped", "reflowed")]
    assert same[0] == same[1] == hashlib.sha256(path.read_bytes()).hexdigest()
    run("--text", path, *short, "--out", out["reflowed"], status=2)
    assert "holds a run with reflow True (now None)" in capsys.readouterr().err


def test_a_journal_is_of_one_adapter(tmp_path: Path) -> None:
    one, other = (write_adapter(tmp_path / str(x), x) for x in (1, 2))
    names = ("precision", "tokens", "stride", "trials", "seed", "filler", "reflow")
    args = argparse.Namespace(**dict.fromkeys(names))
    found = [
        plan_of(argparse.Namespace(**vars(args), adapter=x), 1)["adapter"]
        for x in (None, str(one), str(other))
    ]
    assert found[0] is None and len({*found}) == 3


def test_hash_of_another_model_differs(tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    before = evaluate.hash_model(folder)
    assert before == evaluate.hash_model(EMBEDDED)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert evaluate.hash_model(folder) != before
