"""`jrope batch`: what it prints, how it ends, and a real model's answers."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from batch_file_helpers import HashEngine, lines_of, mixed_rows, records_of, write_rows
from cli_helpers import (
    ANSWER,
    CONFIG,
    SIZE,
    byte_tokenizer,
    fail,
    make_weights,
    succeed,
    write_adapter,
    write_folder,
    write_tokenizer_config,
)
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import copy as copy
from cli_helpers import model as model

from jrope.cli import batch_live, main
from jrope.errors import JropeError
from jrope.generation.guesser import PromptLookup

pytestmark = pytest.mark.usefixtures("handled")
TINY = Path(__file__).parents[1] / "examples" / "models" / "jrope-tiny"


@pytest.fixture(autouse=True)
def _same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Engines are hashes; what they were made with."""
    made: list[dict[str, Any]] = []

    class Engine(HashEngine):
        def __init__(self, params: Any, config: Any, **options: Any) -> None:
            super().__init__()
            made.append(options)
            self.stats = jrope_stats(options["slots"] or 4)

        def compile(self) -> None:
            pass

    monkeypatch.setattr(batch_live, "Engine", Engine)
    return made


@pytest.fixture
def handled() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is where these tests run behind a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def jrope_stats(slots: int) -> Any:
    fields = [("slots", int, slots), ("occupancy", float, 0.5)]
    return make_dataclass("Stats", fields, namespace={"tokens_a_pass": 2.0})()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", mixed_rows(70))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    texts = [{"prompt": f"row {i}", "number": i} for i in range(20)]
    return write_rows(tmp_path / "good.jsonl", texts)


def words(model: Path, source: Path, *more: object) -> list[object]:
    output = source.with_name("out.jsonl")
    return ["batch", model, "--input", source, "--output", output, *more]


def test_exit_status_tells_of_failed_rows(
    capsys: Any, model: Path, rows: Path, good: Path, made: list[Any]
) -> None:
    _, err = succeed(capsys, *words(model, rows), status=1)
    assert "30 of 70 rows answered, 0 of them before; 40 failed" in err
    good.with_name("out.jsonl").unlink()
    good.with_name("out.jsonl.run.json").unlink()
    own = ("--slots", 2, "--seed", 3, "--cache-dtype", "int8")
    out, err = succeed(capsys, *words(model, good, *own))
    assert out == "" and "20 of 20 rows answered" in err
    assert made[1]["slots"] == 2 and made[1]["capacity"] == 64
    assert [one["cache_dtype"] for one in made] == [None, "int8"]
    names = {r["number"]: r for r in records_of(good.with_name("out.jsonl"))}
    assert len(names) == 20


def test_what_is_done_is_not_loaded_for(
    capsys: Any, model: Path, good: Path, made: list[Any]
) -> None:
    succeed(capsys, *words(model, good))
    _, err = succeed(capsys, *words(model, good, "--in-order"))
    assert len(made) == 1 and "20 of 20 rows answered, 20 of them before" in err
    order = [r["number"] for r in records_of(good.with_name("out.jsonl"))]
    assert order == sorted(order)


def test_other_flags_do_not_mix(
    capsys: Any, model: Path, good: Path, made: list[Any]
) -> None:
    succeed(capsys, *words(model, good))
    line = fail(
        capsys, *words(model, good, "--temperature", 0.5, "--dtype", "bfloat16")
    )
    assert (
        "run with dtype null (now bfloat16), default temperature 0.0 (now 0.5)" in line
    )
    assert "API's temperature 1.0 (now 0.5)" in line
    line = fail(capsys, *words(model, good, "--rope", "linear:2"))
    assert "rope Rope(theta=10000.0" in line
    line = fail(capsys, *words(model, good, "--shard", "0/2"))
    assert "shard 0/1 (now 0/2)" in line
    assert len(made) == 1


def test_adapters_do_not_mix(
    capsys: Any, model: Path, good: Path, tmp_path: Path, made: list[Any]
) -> None:
    one, other = (write_adapter(tmp_path / str(x), x) for x in (1, 2))
    succeed(capsys, *words(model, good, "--adapter", one))
    succeed(capsys, *words(model, good, "--adapter", one))
    line = fail(capsys, *words(model, good, "--adapter", other))
    assert re.search(r"run with adapter (\w{8}) \(now (?!\1)\w{8}\):", line)
    line = fail(capsys, *words(model, good))
    assert re.search(r"run with adapter \w{8} \(now null\):", line)


def test_weights_that_cannot_be_loaded_fail_no_row(
    capsys: Any, model: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise JropeError("NaN in 1 of 9 tensors")

    monkeypatch.setattr("jrope.cli.loading.load", load)
    assert fail(capsys, *words(model, good)) == "jrope: error: NaN in 1 of 9 tensors"
    assert records_of(good.with_name("out.jsonl")) == []


def test_defaults_of_rows(
    capsys: Any, copy: Path, tmp_path: Path, made: list[Any]
) -> None:
    text = {"do_sample": True, "temperature": 0.5, "top_k": 3}
    (copy / "generation_config.json").write_text(json.dumps(text))
    chat = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}, chat])
    succeed(capsys, *words(copy, source, "--min-p", 0.1, "--max-new-tokens", 5))
    told = json.loads((tmp_path / "out.jsonl.run.json").read_text())["settings"]
    assert told["default temperature"] == 0.5 and told["default top_k"] == 3
    assert told["API's temperature"] == 1 and told["API's top_k"] == 0
    assert told["default min_p"] == told["API's min_p"] == 0.1
    plain, api = sorted(records_of(tmp_path / "out.jsonl"), key=len)[::-1]
    assert plain["num_generated_tokens"] <= 5
    assert api["response"]["body"]["usage"]["completion_tokens"] <= 5
    assert api["response"]["body"]["model"] == "copy"


def test_dry_run_counts_and_writes_nothing(
    capsys: Any, model: Path, rows: Path, good: Path
) -> None:
    command = ["batch", model, "--dry-run", "--input"]
    out, _ = succeed(capsys, *command, good)
    assert "rows            20 (20 plain)\nbad             0\n" in out
    assert "prompt tokens   110\n" in out and "longest row     64 tokens" in out
    assert "passed through  number (20)" in out
    assert "of 64 tokens, fewer where" in out and ": decode, decode with log" in out
    out, _ = succeed(capsys, *command, rows, status=1)
    assert "bad             30\n  line 3 (r2): messages: this model's tokenizer" in out
    assert {p.name for p in rows.parent.iterdir()} == {"rows.jsonl", "good.jsonl"}


def test_strict_stops_before_work(
    capsys: Any, model: Path, rows: Path, good: Path, made: list[Any]
) -> None:
    line = fail(capsys, *words(model, rows, "--strict"))
    assert "--strict: 30 bad rows, the first of them: line 3 (r2): messages" in line
    assert made == [] and not rows.with_name("out.jsonl").exists()
    succeed(capsys, *words(model, good, "--strict"))


def test_metrics(capsys: Any, model: Path, good: Path, made: list[Any]) -> None:
    path = good.with_name("metrics.json")
    succeed(capsys, *words(model, good, "--metrics", path))
    told = json.loads(path.read_text())
    assert told["rows"] == told["answered"] == 20 and told["load_seconds"] > 0
    assert told["engine"] == {"slots": 4, "occupancy": 0.5, "tokens_a_pass": 2.0}
    lost = good.with_name("nowhere") / "metrics.json"
    again = good.with_name("again.jsonl")  # not that of rows that are answered
    command = *words(model, good, "--metrics", lost), "--output", again
    assert "there is no folder" in fail(capsys, *command)
    assert len(made) == 1 and not again.exists()


def test_guesses_are_no_other_run(
    capsys: Any, model: Path, good: Path, made: list[Any]
) -> None:
    """They change how fast answers come, as slots do."""
    succeed(capsys, *words(model, good, "--speculate", "prompt:3"))
    assert made[0]["speculate"] == PromptLookup(3)
    _, err = succeed(capsys, *words(model, good))
    assert "20 of 20 rows answered, 20 of them before" in err
    command = ["batch", model, "--dry-run", "--input", good, "--speculate", "prompt:3"]
    out, _ = succeed(capsys, *command)
    assert "of 64 tokens" in out and ": decode with guesses, decode with g" in out
    line = fail(capsys, *words(model, good, "--speculate", "draft"))
    assert "'draft' is not prompt, draft:FOLDER, or such as prompt:7" in line


@pytest.fixture
def deeper(tmp_path: Path) -> Path:
    """The model with two layers more, which add nothing either."""
    folder, weights = tmp_path / "deeper", make_weights()
    first = {n: w for n, w in weights.items() if ".layers.0." in n}
    for i in (1, 2):
        weights |= {n.replace(".0.", f".{i}."): w for n, w in first.items()}
    write_folder(folder, {**CONFIG, "num_hidden_layers": 3}, weights.items())
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)
    return folder


def test_a_smaller_folder_guesses(
    capsys: Any, model: Path, deeper: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    fewer = partial(batch_live.Engine, logprobs=False)  # programs to compile
    monkeypatch.setattr(batch_live, "Engine", fewer)
    texts = [{"prompt": text, "name": text} for text in ("v", "abc", "x")]
    source = write_rows(tmp_path / "rows.jsonl", texts)
    metrics = tmp_path / "metrics.json"
    more = ("--slots", 1, "--max-length", 28, "--speculate", f"draft:{model}")
    command = [*words(deeper, source), *more]
    out, _ = succeed(capsys, *command, "--dry-run")
    assert ": decode with guesses, decode with guesses and log" in out
    assert not source.with_name("out.jsonl").exists()
    succeed(capsys, *command, "--max-new-tokens", 20, "--metrics", metrics)
    got = {r["name"]: r for r in records_of(source.with_name("out.jsonl"))}
    assert got["v"]["generated_text"] == f"wx{ANSWER}"
    assert got["x"]["generated_text"] == ANSWER
    assert got["abc"]["num_generated_tokens"] == 20
    told = json.loads(metrics.read_text())["engine"]
    assert told["guessing_steps"] >= 4 and told["tokens_a_pass"] > 2


def test_a_folder_that_cannot_guess_is_one_line(
    capsys: Any, model: Path, good: Path, tmp_path: Path
) -> None:
    folder, config = tmp_path / "draft", {**CONFIG, "vocab_size": SIZE + 8}
    more = {
        name: np.resize(w, (SIZE + 8, SIZE))
        for name, w in make_weights().items()
        if w.shape == (SIZE, SIZE)
    }
    write_folder(folder, config, {**make_weights(), **more}.items())
    command = words(model, good, "--speculate", f"draft:{folder}")
    line = fail(capsys, *command)
    assert f"a vocabulary of {SIZE + 8}, the model one of {SIZE}" in line
    line = fail(capsys, *words(model, good, "--speculate", "draft:/no/such:2"))
    assert "no folder /no/such" in line


def test_rows_longer_than_a_window(capsys: Any, copy: Path, good: Path) -> None:
    """They are taken, unless tokens are guessed; then a window ends all rows."""
    path = copy / "config.json"
    told = json.loads(path.read_text())
    told |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    path.write_text(json.dumps({**told, "sliding_window": 20}))
    command = ["batch", copy, "--dry-run", "--input", good]
    assert "of 64 tokens" in succeed(capsys, *command)[0]
    out, _ = succeed(capsys, *command, "--speculate", "prompt:3")
    assert "of 20 tokens" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "2/2"], "'2/2' is not a shard such as 0/4"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["--output", "nowhere/x"], "No such file or directory"),
    ],
)
def test_errors_are_lines(
    capsys: Any, model: Path, good: Path, made: list[Any], more: Any, message: str
) -> None:
    assert message in fail(capsys, *words(model, good, *more))


def test_output_is_wanted(capsys: Any, model: Path, good: Path) -> None:
    assert "--output is missing" in fail(capsys, "batch", model, "--input", good)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_signals_leave_the_rest_for_the_next_run(
    capsys: Any,
    model: Path,
    good: Path,
    made: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
) -> None:
    own, count = HashEngine.step, 0

    def step(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 12:
            signal.raise_signal(number)
        return own(*given)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(HashEngine, "step", step)
        _, err = succeed(capsys, *words(model, good), status=status)
    assert "interrupted; the same command goes on from here" in err
    assert signal.getsignal(number) is before
    done = len(records_of(good.with_name("out.jsonl")))
    assert 0 < done < 20
    _, err = succeed(capsys, *words(model, good))
    assert f"20 of 20 rows answered, {done} of them before" in err


def test_a_second_ctrl_c_stops_at_once(
    capsys: Any, model: Path, good: Path, made: list[Any], monkeypatch: Any
) -> None:
    def step(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(HashEngine, "step", step)
        assert "error: interrupted" in fail(capsys, *words(model, good), status=130)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "20 of 20 rows answered" in succeed(capsys, *words(model, good))[1]


# A real model, killed


def test_what_is_ignored_stays_so(
    capsys: Any, model: Path, good: Path, made: list[Any], monkeypatch: Any
) -> None:
    own = HashEngine.step

    def step(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return own(*given)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with monkeypatch.context() as patch:
        patch.setattr(HashEngine, "step", step)
        assert "20 of 20 rows answered" in succeed(capsys, *words(model, good))[1]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What this process compiles, the next one need not."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JROPE_CACHE_DIR", before or str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_killed_run_of_a_real_model_goes_on(tmp_path: Path, compiled: None) -> None:
    if not TINY.is_dir():
        pytest.skip("examples/ is not beside the tests")
    lines = (TINY / "held_out.txt").read_text("utf-8").split("\n")
    texts = [line[:9] for line in lines if len(line) > 60][:12]
    own = [
        {"prompt": text, "max_tokens": 4 + i % 4, "temperature": i % 2}
        for i, text in enumerate(texts)
    ]
    source = write_rows(tmp_path / "rows.jsonl", own)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"

    def command(output: Path) -> list[str]:
        given = ["batch", TINY, "--input", source, "--output", output, "--slots", 2]
        return [str(word) for word in [*given, "--max-length", 16]]

    assert main(command(whole)) == 0
    process = subprocess.Popen([sys.executable, "-m", "jrope.cli", *command(killed)])
    while process.poll() is None and not (killed.exists() and killed.stat().st_size):
        time.sleep(1e-3)
    process.kill()
    process.wait()
    assert main(command(killed)) == 0
    assert lines_of(killed) == lines_of(whole)
    assert len(records_of(killed)) == 12
