"""Every example runs as its reader would run it, and what it prints is true."""

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jrope

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "models" / "jrope-tiny"

if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not beside the tests", allow_module_level=True)

Run = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("x", folder) runs examples/x.py: its globals and what it printed."""
    pytest.importorskip("transformers")

    def run(name: str, *arguments: object) -> tuple[dict[str, Any], str]:
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        names = runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err == ""
        return names, printed.out

    return run


def test_no_example_imports_transformers_itself() -> None:
    """Without PyTorch it would say so before everything else."""
    texts = {path.name: path.read_text("utf-8") for path in EXAMPLES.glob("*.py")}
    assert [name for name in texts if "import transformers" in texts[name]] == []
    assert [name for name in texts if "from transformers" in texts[name]] == []


def numbers(line: str) -> list[float]:
    """The numbers with a decimal point in a line."""
    return [float(word) for word in re.findall(r"-?\d+\.\d+", line)]


def line_of(out: str, start: str) -> str:
    """The one line that begins so."""
    (line,) = (line for line in out.splitlines() if line.startswith(start))
    return line


def test_generate_continues_the_prompt(run: Run) -> None:
    names, out = run("generate")
    assert out.startswith("When the letter came, she ")
    words = out.split()
    assert len(words) > 25
    ids, count = names["out"].tokens[0].tolist(), int(names["out"].lengths[0])
    known = names["tokenizer"].decode(ids[:count], skip_special_tokens=True)
    assert out == f"{names['prompt']}{known}\n"


def test_demo_holds_past_the_context_only_when_condensed(run: Run) -> None:
    names, out = run("demo")
    assert line_of(out, "jrope-tiny:").endswith("trained on windows of 256 tokens")
    table = line_of(out, "== Perplexity at")
    assert table.split()[3:] == ["0-256", "256-512", "512-1024", "1024-2048"]
    plain, tuned = (
        numbers(line_of(out, name)) for name in ("as trained ", "condensed, fine-tuned")
    )
    assert len(plain) == len(tuned) == 4
    assert plain[0] < 40 and tuned[0] < 1.2 * plain[0]
    assert plain == sorted(plain) and plain[-1] > 3 * plain[0]
    assert max(tuned) < 1.5 * tuned[0]
    assert 2 * tuned[-1] < plain[-1]
    assert len(re.findall(r"first token after \d+\.\d+ s, then \d+ tokens/s", out)) == 3
    assert names["long"].shape == (1, 1536)
    last = out.splitlines()[-1]
    assert f"perplexity {plain[-1]:.0f} as trained, {tuned[-1]:.0f} condensed" in last
    # What train_tiny.py measured on other pages of the same book, nats per token.
    measured = json.loads((MODEL / "metrics.json").read_text("utf-8"))["nats"]
    nats = names["nats"]  # of the last row, the tuned model's
    assert nats.shape == (2047,)
    assert abs(nats.mean() - measured["tuned, condense 8"]["2048"]) < 0.3
    np.testing.assert_allclose(np.exp(nats[1024:].mean()), tuned[-1], atol=0.06)


def test_methods_past_the_context(run: Run) -> None:
    names, out = run("past_the_context")
    rows = {name: numbers(line_of(out, f"{name} ")) for name in names["METHODS"]}
    assert len(rows) == 6
    (near, far) = rows["as trained"]
    assert far > 3 * near
    assert rows["condense"] == rows["linear"]  # 8 is a power of two
    assert all(row[1] < far for name, row in rows.items() if name != "as trained")
    for name in ("dynamic", "yarn"):
        assert rows[name][1] < far / 2
        assert rows[name][0] < 1.2 * near
    best = min(rows, key=lambda name: rows[name][1])
    assert f": {best};" in out.splitlines()[-1]


def test_length_rules_are_those_of_full_passes(run: Run, tmp_path: Path) -> None:
    """On two layers of the model, said to know 32 tokens: 8 windows of 128."""
    folder = tmp_path / "short"
    params, config = jrope.load(MODEL, dtype="float32")
    smaller = {"max_position_embeddings": 32, "num_hidden_layers": 2}
    config = dataclasses.replace(config, **smaller)
    layers = params["model"]["layers"]
    params["model"]["layers"] = {i: layers[i] for i in ("0", "1")}
    jrope.save(folder, params, config, extra_files=tokenizer_files())
    names, out = run("length_rules", folder)
    assert "8 windows of 128 tokens" in out
    table, rows = names["table"], names["rows"]
    for lengths in ("planned", "growing"):
        name, rule = f"dynamic:2, {lengths}", {"factor": 2, "lengths": lengths}
        stretched = jrope.with_rope(config, "dynamic", **rule)
        nats = -np.asarray(jrope.score(params, rows, config=stretched))
        want = [np.exp(nats[:, a:b].mean()) for a, b in ((0, 32), (32, 64), (64, 128))]
        np.testing.assert_allclose(table[name], want, rtol=1e-4)
        assert numbers(line_of(out, name)) == [round(value, 1) for value in table[name]]
    trained = table["as trained"]
    assert table["dynamic:2, hf"][0] == pytest.approx(trained[0], rel=1e-5)
    assert table["dynamic:2, hf"][1] != pytest.approx(trained[1], rel=1e-3)


def test_training_lowers_the_loss(run: Run) -> None:
    pytest.importorskip("optax")
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int and float
        names, out = run("train_step")
    losses = [numbers(line_of(out, f"step {i:2}"))[0] for i in range(1, 11)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    nats = -jrope.score(jrope.load(MODEL, "float32")[0], **args(names))
    np.testing.assert_allclose(losses[0], nats.mean(), atol=1e-3)
    assert -jrope.score(names["params"], **args(names)).mean() < losses[-1]


def args(names: dict[str, Any]) -> dict[str, Any]:
    """The text and configuration of the training example."""
    return {"tokens": names["tokens"], "config": names["config"]}


def test_ragged_rows_are_single_rows(run: Run) -> None:
    names, out = run("ragged_logprobs")
    assert "same tokens True" in out.splitlines()[-1]
    assert names["worst"] < 1e-4
    assert len({*names["lengths"]}) == 3
    (log_p,) = numbers(line_of(out.replace("\n  ", "\n"), "prompt: log p  -14"))
    row, params, config = names["rows"][0], names["params"], names["config"]
    scores = jrope.score(params, np.asarray([row], np.int32), config=config)
    np.testing.assert_allclose(log_p, scores.sum(), atol=6e-3)


def test_nnx_model_is_the_model(run: Run) -> None:
    names, out = run("nnx_bridge")
    assert names["difference"] < 1e-5
    assert "38 parameters, 1,967,808 numbers" in out
    np.testing.assert_array_equal(
        names["weight"][...],
        names["params"]["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"],
    )
    assert names["logits"].shape == (2, 32, 2048)
    assert float(abs(names["logits"]).max()) > 1


def test_flax_llama_paths_and_numbers(run: Run) -> None:
    names, out = run("from_flax_llama")
    line = "model/layers/0/self_attn/k_proj/{} {}"
    old = line.format("kernel", (192, 64))
    assert line_of(out, old).split("  ")[-1].endswith(line.format("weight", (64, 192)))
    assert line_of(out, "lm_head/kernel (192, 2048)")
    assert names["difference"] == 0
    layer = names["old"]["model"]["layers"]["3"]
    assert {*layer["mlp"]["up_proj"]} == {"kernel"}
    assert {*layer["input_layernorm"]} == {"weight"}


def test_method_picture_is_of_these_methods(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names, out = run("method_picture", MODEL, tmp_path / "methods.svg")
    drawn = (tmp_path / "methods.svg").read_text("utf-8")
    committed = (EXAMPLES / "images" / "methods.svg").read_text("utf-8")
    for name in names["METHODS"]:
        assert f">{name}</text>" in drawn and f">{name}</text>" in committed
    lines = {line.get_label(): line for line in names["picture"].axes[0].get_lines()}
    ends = lines["llama3:8"].get_ydata()[[0, -1]]
    np.testing.assert_allclose(ends, [1, 8], rtol=1e-9)
    words = line_of(out, "linear:8").split()
    assert words[-4:] == ["50.3", "5,026.5", "282,663.6", "1.000"]


@pytest.mark.parametrize("name", ["generate", "nnx_bridge", "from_flax_llama"])
def test_folder_is_an_argument(run: Run, name: str, tmp_path: Path) -> None:
    """A copy with other weights gives other numbers."""
    folder = tmp_path / "mine"
    params, config = jrope.load(MODEL)
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"] * 3
    jrope.save(folder, params, config, extra_files=tokenizer_files())
    names, _ = run(name, folder)
    got = names["params"]["model"]["norm"]["weight"]
    want = params["model"]["norm"]["weight"].astype(got.dtype)
    np.testing.assert_array_equal(got, want)


def tokenizer_files() -> list[Path]:
    return sorted(MODEL.glob("tokenizer*"))


TOOLS = ("train_tiny", "extend_context", "extension_table", "in_place_ttt", "ray_batch")


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_examples_are_short_documented_and_listed(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.startswith('"""')
    if path.stem not in TOOLS:
        assert len(text.splitlines()) < 60
        assert f"python examples/{path.name} [FOLDER]" in text
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    assert f"- [`{path.name}`]({path.name}): " in listed


def test_the_readme_s_lines_run_and_save_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would paste them, from the repository's root."""
    text = (EXAMPLES.parent / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    config = jrope.load("folder")[1]
    assert config.rope == names["config"].rope
    assert config.rope.condense == 1
    assert config.rope.scaling == jrope.rope.Yarn(factor=4, original_length=256)
