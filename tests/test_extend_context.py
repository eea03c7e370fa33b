"""Fine-tuning on long windows: what is computed, what is kept, what is written."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrope
from jrope.cli import common

pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "models" / "jrope-tiny"
if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not beside the tests", allow_module_level=True)
LONG = ["--window", "128"]
RUN = ["--steps", "12", "--warmup", "2", "--batch", "4", "--parts", "2"]
RUN += ["--rate", "3e-3", "--dtype", "float32", "--checkpoint-every", "4"]


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Examples import each other by name, as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int and float
        yield


@pytest.fixture
def extend() -> ModuleType:
    return importlib.import_module("extend_context")


@pytest.fixture
def tuning() -> ModuleType:
    return importlib.import_module("_tuning")


def make_model(layers: int = 2, vocab: int = 2048) -> tuple[Any, jrope.LlamaConfig]:
    """A toy for the embedded model's tokenizer, "trained" on 64 tokens."""
    config = dataclasses.replace(jrope.load(MODEL)[1], vocab_size=vocab)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = dataclasses.replace(config, num_hidden_layers=layers, **sizes, **heads)
    params = jrope.init_params(jax.random.key(0), config)
    # steep enough for attention, and with it positions, to matter
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params), config


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "toy"
    extra = sorted(MODEL.glob("tokenizer*"))
    return jrope.save(folder, *make_model(1), extra_files=extra)


@pytest.fixture(scope="module")
def tuned(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run of yarn:2 writes."""
    out = tmp_path_factory.mktemp("tuned") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        main = importlib.import_module("extend_context").main
        with jax.numpy_dtype_promotion("standard"):
            assert main([str(toy), "--out", str(out), "--rope", "yarn:2", *RUN]) == 0
    return out


def torch_nats(folder: Path, rows: np.ndarray) -> np.ndarray:
    """-log p of every token, by transformers, from nothing but the folder."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(rows).long()).logits
    log_p = torch.log_softmax(logits, dim=-1).numpy()
    return -np.take_along_axis(log_p[:, :-1], rows[:, 1:, None], axis=2)[..., 0]


def held_out_windows(extend: ModuleType, toy: Path, window: int) -> np.ndarray:
    words = [str(toy), "--out", "unused", "--rope", "yarn:2"]
    args = extend.parse([*words, "--window", str(window)])
    return extend.read(args, jrope.load(toy)[1])[1].windows(window)


def test_loss_falls_and_is_written_down(tuned: Path) -> None:
    facts = json.loads((tuned / "extension.json").read_text())
    losses = facts["losses"]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    nats = facts["nats"]
    assert [*nats] == ["as it was", "yarn:2, not tuned", "yarn:2, tuned"]
    assert nats["yarn:2, tuned"]["128"] < nats["as it was"]["128"] - 0.3
    assert facts["settings"]["rope"] == "yarn:2" and facts["step_bytes"] > 1e6


def test_folder_is_the_model_that_was_measured(
    extend: ModuleType, toy: Path, tuned: Path
) -> None:
    """By transformers, whose perplexity is ours, token by token."""
    params, config = jrope.load(tuned)
    assert config.rope.scaling == jrope.rope.Yarn(factor=2, original_length=64)
    words = json.loads((tuned / "tokenizer_config.json").read_text())
    assert words["model_max_length"] == config.max_position_embeddings == 128
    rows = held_out_windows(extend, toy, 128)
    ours = -np.asarray(jrope.score(params, jnp.asarray(rows), config=config))
    theirs = torch_nats(tuned, rows)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert abs(ours.mean() - theirs.mean()) < 1e-5
    measured = json.loads((tuned / "extension.json").read_text())["nats"]
    assert abs(measured["yarn:2, tuned"]["128"] - theirs.mean()) < 1e-5
    plain = dataclasses.replace(config, rope=jrope.load(toy)[1].rope)
    other = -np.asarray(jrope.score(params, jnp.asarray(rows), config=plain))
    assert np.abs(other - theirs).max() > 1e-2  # the method is not idle


METHODS = {  # what it says of its length, and whether that is the window
    "linear:2": 64,
    "condense:2": 64,
    "dynamic:1": 64,
    "ntk:2": 128,
    "yarn:2": 128,
    "llama3:factor=2,low=1,high=4": 128,
    "default": 128,
}


@pytest.mark.parametrize("rope", METHODS)
def test_config_carries_every_method(
    extend: ModuleType, toy: Path, tmp_path: Path, rope: str
) -> None:
    params, config = jrope.load(toy)
    stretched, window = extend.stretch(config, rope, 128)
    words = ["--out", str(tmp_path / "out"), "--rope", rope, *LONG]
    args = extend.parse([str(toy), *words])
    extend.write(args, params, extend.declare(stretched, window), {})
    again = jrope.load(args.out)[1]
    assert again.max_position_embeddings == METHODS[rope]
    rows = held_out_windows(extend, toy, 128)[:4]
    want = -np.asarray(jrope.score(params, jnp.asarray(rows), config=stretched))
    got = -np.asarray(jrope.score(params, jnp.asarray(rows), config=again))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(torch_nats(args.out, rows), want, atol=1e-4)
    longest = common.reach(again)
    assert longest == 128 or (rope == "dynamic:1" and longest is None)


class Killed(Exception):
    """Stands for a signal between two steps."""


def test_resumed_run_is_the_uninterrupted_one(
    extend: ModuleType, toy: Path, tuned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """To the bit, though what came after the last checkpoint was lost."""
    words = [str(toy), "--out", str(tmp_path / "out"), "--rope", "yarn:2", *RUN]
    draw, drawn = extend.Text.draw, []

    def dying(self: Any, window: int, batch: int, seed: int, step: int) -> np.ndarray:
        drawn.append(step)
        if len(drawn) == 7:
            raise Killed
        return draw(self, window, batch, seed, step)

    monkeypatch.setattr(extend.Text, "draw", dying)
    with pytest.raises(Killed):
        extend.main(words)
    assert not (tmp_path / "out").exists()
    assert extend.main(words) == 0
    assert drawn == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11]
    for path in tuned.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_runs_of_other_settings_are_not_mixed(
    extend: ModuleType, toy: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints of one run are refused to another."""
    out = tuned.with_name("new")
    tuned.with_name("whole-checkpoints").rename(out.with_name("new-checkpoints"))
    words = [str(toy), "--out", str(out), "--rope", "linear:2", *RUN]
    assert extend.main([*words, "--seed", "1"]) == 2
    assert "is of a run with another rope, seed: remove it" in capsys.readouterr().err


def test_windows_depend_on_seed_and_step_alone(tuning: ModuleType) -> None:
    text = tuning.Text(stream=np.arange(5, 505, dtype=np.int32), start=(0, 1))
    rows = text.draw(32, 8, 3, 7)
    assert rows.shape == (8, 32) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, :2], np.tile([0, 1], (8, 1)))
    np.testing.assert_array_equal(np.diff(rows[:, 2:], axis=1), 1)
    np.testing.assert_array_equal(rows, text.draw(32, 8, 3, 7))
    for other in (text.draw(32, 8, 4, 7), text.draw(32, 8, 3, 8)):
        assert (rows != other).any()
    many = text.draw(32, 4000, 0, 0)[:, 2:]
    assert many.min() == 5 and many.max() == 504  # the ends are drawn too
    cut = text.windows(32)
    assert cut.shape == (16, 32)
    np.testing.assert_array_equal(cut[:, 2:].ravel(), text.stream[:480])


@functools.cache
def one_step(
    tuning: ModuleType,
    shape: tuple[int, ...],
    dtype: str = "float32",
    remat: bool = True,
    sizes: tuple[int, ...] = (2, 100, 128),
) -> Any:
    """Weights before, state and loss after a step, bytes needed; and the problem."""
    layers, vocab, window = sizes
    params, config = make_model(layers, vocab)
    params = jax.tree.map(lambda x: x * 2 if x.ndim > 1 else x, params)
    config = jrope.with_rope(config, "yarn", factor=2)
    rows = np.random.default_rng(0).integers(0, vocab, (4, window)).astype(np.int32)
    state = tuning.new_state(params)
    step = tuning.make_step(config, dtype, remat)
    run, need = tuning.compile_step(step, state, (*shape, window))
    new, loss = run(state, rows.reshape(*shape, window), np.float32(1e-6))
    return params, new, loss, need, (config, rows)


def test_step_is_clipped_adam_on_the_mean_of_the_batch(tuning: ModuleType) -> None:
    """In one part or four; against jax.grad of the mean and Adam written out."""
    params, new, value, _, (config, rows) = one_step(tuning, (1, 4))

    def loss(params: Any) -> jax.Array:
        return -jnp.mean(jrope.score(params, jnp.asarray(rows), config=config))

    want, grads = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    assert norm > 1.5  # else nothing is clipped
    _, parts, mean, *_ = one_step(tuning, (4, 1))
    np.testing.assert_allclose(mean, want, rtol=1e-6)
    for state in (new, parts):
        mu = state["moments"][1].mu
        for got, grad in zip(*map(jax.tree.leaves, (mu, grads)), strict=True):
            np.testing.assert_allclose(got, 0.1 * grad / norm, rtol=2e-3, atol=1e-7)
    name = ("model", "norm", "weight")
    for key in name:
        params, new, grads = params[key], new.get("params", new)[key], grads[key]
    change = -1e-6 * grads / (np.abs(grads) + 1e-8 * norm)  # bias-corrected, first step
    np.testing.assert_allclose(new - params, change, rtol=0.1, atol=1e-7)


def test_master_weights_are_float32(tuning: ModuleType) -> None:
    """A step too small for bfloat16 is not lost, though it computes in that."""
    params, new, *_ = one_step(tuning, (2, 2), "bfloat16")
    leaves = zip(*map(jax.tree.leaves, (params, new["params"])), strict=True)
    for old, after in leaves:
        assert after.dtype == jnp.float32
        assert 0 < float(jnp.max(jnp.abs(after - old))) < 2e-6


def test_remat_changes_nothing_that_is_computed(tuning: ModuleType) -> None:
    kept = one_step(tuning, (1, 4), "float32", False)
    anew = one_step(tuning, (1, 4))
    moments = (jax.tree.leaves(x[1]["moments"]) for x in (kept, anew))
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(kept[2], anew[2], rtol=1e-6)


MEASURE = """
import jax, _tuning, test_extend_context as tests
params, config = tests.make_model(5, 64)
for remat in (False, True):
    step = _tuning.make_step(config, "float32", remat)
    print(_tuning.compile_step(step, _tuning.new_state(params), (1, 4, 256))[1])
"""


def test_remat_needs_less_memory() -> None:
    """Where XLA keeps to the order of the program, which a CPU has to be told."""
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    path = map(str, [EXAMPLES, Path(__file__).parent, *sys.path])
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=env, capture_output=True, text=True
    )
    if "Unknown flag" in done.stderr:
        pytest.skip("this XLA has another name for the order of operations")
    kept, anew = map(int, done.stdout.split())
    assert anew < 0.5 * kept, done.stderr


def test_parts_need_less_memory(tuning: ModuleType) -> None:
    assert one_step(tuning, (4, 1))[3] < 0.6 * one_step(tuning, (1, 4))[3]


def test_rates_go_up_then_down(tuning: ModuleType) -> None:
    rates = tuning.learning_rates(100, 2e-3, 10)
    assert rates.dtype == np.float32 and rates.shape == (100,)
    np.testing.assert_allclose(rates[:10], 2e-4 * np.arange(1, 11), rtol=1e-5)
    assert (np.diff(rates[9:]) < 0).all()
    np.testing.assert_allclose(rates[54], 2e-3 * 0.55, rtol=1e-5)
    np.testing.assert_allclose(rates[-1], 2e-4, rtol=1e-5)


WRONG = {
    "--rope yarm:2": "did you mean 'yarn'",
    "--rope linear:0.5": "a factor below 1 shortens the context",
    "--rope default": "give a larger factor, or --window N",
    "--rope yarn:2 --window 64": "windows of 64 tokens, and the model was trained on",
    "--rope yarn:200": "want at least 12800 of each, give more text",
    "--rope yarn:2 --text missing.txt": "missing.txt",
    "--rope yarn:2 --batch 3 --parts 2": "--batch 3 is not a multiple of --parts 2",
    "--rope yarn:2 --steps 5 --warmup 5": "want --steps of more than --warmup",
    "--rope yarn:2 --rate 0": "a --rate between 0 and 1",
}


@pytest.mark.parametrize("words", WRONG)
def test_bad_input_is_one_line(
    extend: ModuleType,
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
) -> None:
    """Before any training, and nothing is written."""
    try:
        status = extend.main([str(toy), "--out", str(tmp_path / "out"), *words.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("extend_context: error: ") and WRONG[words] in line
    assert not [*tmp_path.iterdir()]


def test_existing_folder_and_foreign_tokenizer(
    extend: ModuleType, toy: Path, tuned: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ["--rope", "yarn:2", *RUN]
    assert extend.main([str(toy), "--out", str(tuned), *words]) == 2
    assert "exists: remove it, or name another" in capsys.readouterr().err
    config = dataclasses.replace(make_model()[1], vocab_size=100)
    params = jrope.init_params(jax.random.key(0), config)
    extra = sorted(MODEL.glob("tokenizer*"))
    small = jrope.save(tmp_path / "small", params, config, extra_files=extra)
    assert extend.main([str(small), "--out", str(tmp_path / "out"), *words]) == 2
    assert "2048 ids, the model 100: they do not belong" in capsys.readouterr().err


def test_too_little_memory_and_a_loss_that_is_not_finite(
    extend: ModuleType, tuning: ModuleType, toy: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    words = [str(toy), "--out", str(tmp_path / "out"), "--rope", "yarn:2", *RUN]
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "device_memory", lambda: 1_000_000)
        args = extend.parse(words)
        with pytest.raises(jrope.JropeError, match=r"needs .* MB, the device has 1 MB"):
            extend.extend(args)
    state = tuning.new_state({"w": jnp.zeros(1)})

    def step(state: Any, rows: Any, rate: Any) -> Any:
        return state, jnp.float32(np.nan if rows == 2 else 1)

    done = []
    with pytest.raises(jrope.JropeError, match=r"step 3 is nan: try a lower --rate"):
        for i, _ in tuning.train(step, state, [], np.zeros(9), lambda i: i):
            done.append(i)
    assert done == [1, 2, 3]


def test_table_is_what_the_models_score(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero-shot rows against jrope.score by hand; every combination is there."""
    script = importlib.import_module("extension_table")
    monkeypatch.setattr(script, "PRICED", 2)
    pages = (MODEL / "held_out.txt").read_text("utf-8")
    book, unseen, out = (tmp_path / name for name in ("book.txt", "unseen.txt", "out"))
    book.write_text(pages[:18000], encoding="utf-8")
    unseen.write_text(pages[18000:], encoding="utf-8")
    words = [str(toy), "--out", str(out), "--text", str(book), "--factor", "2"]
    words += ["--held-out", str(unseen), "--batch", "2", "--dtype", "float32"]
    words += ["--steps", "2", "3", "--rope", "yarn:{0}", "--seeds", "0", "1"]
    assert script.main(words) == 0
    found = json.loads((out / "extension.json").read_text())
    rows = {(r["rope"], r["steps"], r["seed"]): r["nats"] for r in found["rows"]}
    runs = [(0, None), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert [*rows] == [("yarn:2", *run) for run in runs]
    params, config = jrope.load(toy)
    text = importlib.import_module("train_tiny").clean(pages[18000:])
    ids = script.load_tokenizer(toy)(text, verbose=False)["input_ids"]
    half = np.array_split(np.asarray([*ids[1:], 1], np.int32), 2)[
        1
    ]  # the end, no start
    assert found["tokens"]["measured"] == half.size
    config = jrope.with_rope(config, "yarn", factor=2)
    for length in (64, 128):
        cut = half[: half.size // (length - 1) * (length - 1)].reshape(-1, length - 1)
        cut = jnp.asarray(np.insert(cut, 0, 0, axis=1))
        nats = -np.asarray(jrope.score(params, cut, config=config))
        want = [nats.mean(), nats[:, length // 2 - 1 :].mean()]
        np.testing.assert_allclose(
            rows["yarn:2", 0, None][str(length)], want, rtol=1e-5
        )
    assert rows["yarn:2", 3, 0] != rows["yarn:2", 3, 1]
    table = (out / "extension.md").read_text()
    assert "| yarn:2 | 3 |" in table and " ± " in table and f"{toy}" not in table
    assert [price["parts"] for price in found["prices"]] == [1, 1]


def test_table_refuses_too_little_text(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("Too short.", encoding="utf-8")
    words = [str(toy), "--out", str(tmp_path / "out"), "--text", str(book)]
    assert importlib.import_module("extension_table").main(
        [*words, "--held-out", str(book)]
    )
    assert "want at least 512 of each, give more text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
