"""`--mesh` on the command line: what one device prints, measures and compares."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import byte_tokenizer, fail, succeed, write_tokenizer_config
from sharding_helpers import CONFIG, TOKENS, make_params, with_rope

import jrope
from jrope.hf import config_to_hf
from jrope.hf.checkpoint import write_folder
from jrope.lab import passkey
from jrope.lab.distance import mean_queries_and_keys
from jrope.lab.perplexity import perplexity
from jrope.model.config import parameter_shapes
from jrope.parity import jrope_stages
from jrope.sharding.meshes import layout_of

MESH = "data=2,model=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizer knows bytes."""
    config = {**config_to_hf(CONFIG), "vocab_size": 264, "max_position_embeddings": 128}
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("cli") / "model"
    wide = jrope.hf.config_from_hf(config)
    tensors = {
        name: 0.3 * random.standard_normal(shape, np.float32)
        for name, shape in parameter_shapes(wide).items()
    }
    write_folder(folder, config, tensors.items())
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(map(chr, np.random.default_rng(2).integers(33, 126, 150))))
    return file


def test_generate_prints_what_one_device_does(folder: Path, capsys: Any) -> None:
    words = ["generate", folder, "ab", "a longer one", "--max-new-tokens", 5, "--json"]
    one = json.loads(succeed(capsys, *words)[0])
    many = json.loads(succeed(capsys, *words, "--mesh", MESH)[0])
    assert many["answers"] == one["answers"]
    assert many["device"].endswith(f", mesh {MESH}")


def test_batch_answers_what_generate_does_on_one_device(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    prompts = ["ab", "a longer one"]
    words = ["generate", folder, *prompts, "--max-new-tokens", 5, "--json"]
    wanted = [x["text"] for x in json.loads(succeed(capsys, *words)[0])["answers"]]
    rows = [{"prompt": text, "max_tokens": 5} for text in prompts]
    given, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    given.write_text("\n".join(map(json.dumps, rows)))
    words = ["batch", folder, "--input", given, "--max-length", 24, "--mesh", MESH]
    told, _ = succeed(capsys, *words, "--slots", 4, "--dry-run")
    assert "slots           4 of 24 tokens\n" in told
    first = "first pieces up to 16, 2 x 16", "first pieces up to 32, 2 x 32"
    both = ", ".join([*first, *(f"{one}, entering" for one in first)])
    assert f"{both}, further pieces 2 x 32" in told
    words += ["--output", output, "--in-order"]
    _, err = succeed(capsys, *words, "--slots", 4, "--metrics", tmp_path / "m.json")
    assert "2 of 2 rows answered" in err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["generated_text"] for answer in answers] == wanted
    engine = json.loads((tmp_path / "m.json").read_text())["engine"]
    assert engine["slots"] == 4 and engine["padded_tokens"] == 32  # both at once
    output.unlink()
    line = fail(capsys, *words, "--slots", 3)
    assert "slots: got 3, which the mesh splits 2 ways; the nearest that fits" in line
    assert not output.exists()


def test_evaluate_measures_what_one_device_does(
    folder: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ["evaluate", folder, "--text", text, "--context", "16,24", "--stride", 8]
    words += ["--rope", "model,dynamic:2", "--distance", "--out"]
    succeed(capsys, *words, tmp_path / "one")
    succeed(capsys, *words, tmp_path / "many", "--mesh", MESH)
    one, many = (
        list(map(json.loads, (tmp_path / name).read_text().splitlines()))
        for name in ("one", "many")
    )
    assert many[0]["mesh"] == MESH and "mesh" not in one[0]
    assert len(one) == len(many) > 10
    for a, b in zip(one, many, strict=True):
        for name in ("nll", "low", "high", "scores"):
            np.testing.assert_allclose(a.get(name, 0), b.get(name, 0), rtol=2e-5)
        keys = ("kind", "rope", "context", "windows", "tokens", "distances")
        assert [a.get(n) for n in keys] == [b.get(n) for n in keys]


def test_measures_are_one_devices_for_rows_that_do_not_divide() -> None:
    config, params = with_rope("dynamic"), make_params()
    placed = jrope.shard(params, jrope.mesh("fsdp=2,model=4"), config)
    tokens = [TOKENS.reshape(-1)[:45]]
    how: dict[str, Any] = {"stride": 8, "tokens_at_once": 24}
    got, want = (perplexity(p, config, tokens, 12, **how).nll for p in (placed, params))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    got, want = (mean_queries_and_keys(p, config, tokens, 12) for p in (placed, params))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_passkeys_fill_the_rows_that_a_mesh_divides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def generated(params: Any, batch: Any, **_: Any) -> Any:
        seen.append(batch)
        return jrope.Generation(batch, np.full(len(batch), 2), *[None] * 3)

    monkeypatch.setattr(passkey, "generate", generated)
    placed = jrope.shard(make_params(), jrope.mesh("data=2,model=4"), CONFIG)
    keys = passkey.Passkeys(prompts=TOKENS[:3], keys=("1", "2", "3"))
    found = passkey.answer_passkeys(placed, CONFIG, keys, lambda _: "")
    assert [len(batch) for batch in seen] == [2, 2] and len(found) == 3


def test_every_stage_of_parity_is_one_devices() -> None:
    config, params = with_rope("longrope"), make_params()
    placed = jrope.shard(params, jrope.mesh("fsdp=2,model=4"), config)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), (3, 12))
    got, want = (jrope_stages(p, config, TOKENS[:3], places) for p in (placed, params))
    assert {*got} == {*want} == {"embeddings", "layer 0", "final norm", "logits"}
    for name, x in want.items():
        assert got[name].shape == x.shape
        assert np.abs(got[name] - x).max() <= 2e-5 * np.abs(x).max(), name


def test_parity_loads_onto_the_mesh(
    folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    from jrope.parity import comparison

    seen: list[Any] = []
    stages = comparison.jrope_stages

    def watched(params: Any, *rest: Any) -> Any:
        seen.append(layout_of(params))
        return stages(params, *rest)

    monkeypatch.setattr(comparison, "jrope_stages", watched)
    words = ["parity", folder, "--dtype", "float32", "--tokens", 8, "--mesh", MESH]
    assert "\nok: " in succeed(capsys, *words)[0]
    assert [layout.mesh.devices.size for layout in seen] == [8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "ab", "--mesh", MESH], "1 rows over data=2; give 2, or a mesh"),
        (["generate", "ab", "--mesh", "model=16"], "nearest that fits is model=8"),
        (
            ["batch", "--input", "x", "--output", "y", "--mesh", "context=2"],
            "mesh: got context=2, which splits the sequence",
        ),
        (["generate", "ab", "--mesh", "modle=2"], r"did you mean 'model'"),
        (["parity", "--mesh", "fsdp=3"], r"hidden_size 32 over fsdp=3; .* fsdp=1"),
        (
            ["bench", "--distributed"],
            "bench runs in one process; generate and evaluate",
        ),
        (
            ["parity", "--coordinator", "a:1"],
            "--coordinator: parity runs in one",
        ),
        (["generate", "ab", "--processes", "2"], "needs --coordinator, --process, too"),
        (["generate", "ab", "--distributed", "--process", "1"], "leave --process out"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, capsys: Any, words: list[str], message: str
) -> None:
    line = fail(capsys, words[0], folder, *words[1:])
    assert re.search(message, line), line
