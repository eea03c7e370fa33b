"""`jrope plan`: its table, its JSON, and how it refuses."""

import json

import pytest
from cli_helpers import CONFIG, fail, succeed

from jrope.bench.model import named_shape
from jrope.hf.config import config_to_hf


@pytest.fixture
def folder(tmp_path):
    """Llama-3-8B's configuration, and nothing else."""
    text = json.dumps(config_to_hf(named_shape("llama3-8b"), dtype="bfloat16"))
    (tmp_path / "config.json").write_text(text)
    return tmp_path


def test_table_tells_memory_and_speed(capsys, folder):
    out, err = succeed(capsys, "plan", folder, "--on", "h100")
    assert err == ""
    line = out.splitlines()[-1].split()
    assert line == [
        "data=1,model=1", "16.06", "GB", "1.082", "GB", "898.9", "MB", "18.04", "GB",
        "5.95", "ms", "168", "213", "ms", "55", "393,280",
    ]  # fmt: skip
    assert "8,030,261,248 parameters, 16.06 GB in bfloat16" in out
    assert "token    16.08 GB read, 19.3 GFLOP, all devices together" in out
    assert "measured on one H100\n" in out
    out, _ = succeed(capsys, "plan", folder, "--on", "v6e:2x2", "--quantize", "int8")
    assert "and assumed here" in out and "in int8" in out
    out, _ = succeed(capsys, "plan", folder, "--on", "h100", "--cache-dtype", "int8")
    assert "8,256 cache slots a row in int8" in out
    size = 2 * 32 * 8 * (128 + 2) * (8192 + 64)
    assert f"{size / 1e6:.4} MB" in out


def test_a_folder_its_file_and_a_shape_are_the_same(capsys, folder):
    words = ("--on", "h100:2", "--json", "--batch", "2", "--context", "2k")
    found = [
        json.loads(succeed(capsys, "plan", *model, *words)[0])
        for model in ([folder], [folder / "config.json"], ["--shape", "llama3-8b"])
    ]
    assert found[0]["meshes"] == found[1]["meshes"] == found[2]["meshes"]


def test_json_tells_everything(capsys):
    words = ("--on", "v5e:4x4", "--batch", "32", "--context", "2k", "--json")
    facts = json.loads(succeed(capsys, "plan", "--shape", "llama3-8b", *words)[0])
    assert facts["work"] == {
        "batch": 32, "context": 2048, "new": 64, "dtype": "bfloat16", "quantize": None,
        "cache_dtype": None, "prefill_chunk": None, "slots": 2048 + 64,
    }  # fmt: skip
    assert facts["on"]["count"] == 16 and facts["on"]["bandwidth"] == 819e9
    best, worst = facts["meshes"][0], facts["meshes"][-1]
    assert best["mesh"] == {"data": 1, "model": 8, "replica": 2}
    parts = ("weights", "cache", "temporaries")
    assert best["memory"]["total"] == sum(best["memory"][part] for part in parts)
    assert best["step"]["seconds"] * best["tokens_per_second"] == pytest.approx(32)
    assert worst["problem"].startswith("does not fit") and worst["step"] is None


def test_lengths_past_the_model_are_warned_of(capsys):
    words = ("--shape", "llama3-8b", "--on", "h100", "--context")
    _, err = succeed(capsys, "plan", *words, "32k")
    assert "32,768 tokens are more than the 8,192" in err and "--rope yarn:4" in err
    assert succeed(capsys, "plan", *words, "32k", "--rope", "yarn:4")[1] == ""
    _, err = succeed(capsys, "plan", *words, "64k", "--rope", "yarn:4")
    assert "more than the 32,768" in err and "stretch" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--on h100", "plan: give either a FOLDER or --shape NAME"),
        ("x --shape llama3-8b --on h100", "plan: give either a FOLDER or --shape NAME"),
        ("--shape llama3-8b", "required: --on"),
        ("--shape llama3-8b --on h1000", "did you mean 'h100'?"),
        ("--shape llama3-8b --on v5e:5x5", "v5e comes as 1x1, 2x2"),
        ("--shape llama3-8b --on h100 --batch 0", "'0' is not a whole number from 1"),
        ("--shape llama3-8b --on h100 --context 0k", "'0' is not a whole number from"),
        (
            "--shape llama3-8b --on h100 --context 10",
            "64 new tokens of a context of 10",
        ),
        ("--shape llama3-70b --on h100", "h100:2, 2 devices, holds it"),
        ("no/where --on h100", "no folder or file no/where, nor a copy"),
        ("no/such/path --on h100", "no folder or file no/such/path, nor a copy"),
    ],
)
def test_bad_input_is_one_line(capsys, words, message):
    assert message in fail(capsys, "plan", *words.split())


def test_configurations_of_others_are_refused(capsys, tmp_path):
    file = tmp_path / "config.json"
    assert "no config.json in" in fail(capsys, "plan", tmp_path, "--on", "h100")
    file.write_text(json.dumps({**CONFIG, "model_type": "mixtral"}))
    error = fail(capsys, "plan", tmp_path, "--on", "h100")
    assert f"{file}: model_type is 'mixtral' (a" in error and "llama, qwen2" in error
    file.write_text("{")
    assert error.count(str(file)) == 1
    assert "is not valid JSON" in fail(capsys, "plan", file, "--on", "h100")


def test_a_copy_from_the_hub_is_enough(capsys, monkeypatch, folder):
    import huggingface_hub

    def cached(repo, name):
        return str(folder / name) if repo == "some/model" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    out, _ = succeed(capsys, "plan", "some/model", "--on", "h100")
    assert "some/model: 8,030,261,248 parameters" in out
