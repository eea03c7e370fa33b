"""`jrope generate`: the library's text, printed as it is made."""

import io
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from cli_helpers import (
    ANSWER,
    CONFIG,
    TEMPLATE,
    VOCAB,
    byte_tokenizer,
    fail,
    fast,
    ids_of,
    pipe,
    succeed,
    write_tokenizer_config,
)
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import copy as copy
from cli_helpers import model as model

import jrope
import jrope.cli
from jrope.cli import generate, main, report
from jrope.hf import config_from_hf
from jrope.model.with_rope import with_rope


@pytest.fixture
def chat(copy: Path) -> Path:
    """A folder with a chat template."""
    write_tokenizer_config(copy, chat_template=TEMPLATE)
    return copy


# The text


def library_text(folder: Path, prompts: list[str], **options: Any) -> list[str]:
    """What jrope.generate and tokenizer.decode make of the prompts."""
    params, config = jrope.load(folder)
    rows = [ids_of(prompt) for prompt in prompts]
    lengths = np.array([len(row) for row in rows])
    padded = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])
    out = jrope.generate(params, padded, lengths, config=config, **options)
    tokenizer, texts = fast(byte_tokenizer()), []
    for row, tokens, n in zip(rows, out.tokens, out.lengths, strict=True):
        before = tokenizer.decode(row, skip_special_tokens=True)
        after = tokenizer.decode([*row, *tokens[:n].tolist()], skip_special_tokens=True)
        texts.append(after[len(before) :])
    return texts


def test_text_is_the_library_s(capsys: Any, model: Path):
    out, err = succeed(capsys, "generate", model, "v")
    assert out == "w" + "x" + ANSWER + "\n"
    assert [out.removesuffix("\n")] == library_text(model, ["v"])
    assert err.startswith("[1 prompt tokens, 14 new tokens, first after ")
    assert (
        "tokens/s, " in err
        and " s, rope default, cpu (" in err
        and err.count("\n") == 1
    )


def test_sampling_is_the_library_s(capsys: Any, model: Path):
    prompts = ["abc", "no", "x"]
    words = ("--temperature", "6", "--top-p", "0.9", "--seed", "7", "--top-k", "20")
    out, _ = succeed(
        capsys, "generate", model, *prompts, *words, "--max-new-tokens", "12"
    )
    sampler = jrope.Sampler(temperature=6, top_p=0.9, top_k=20)
    key = jax.random.key(7)
    texts = library_text(model, prompts, sampler=sampler, key=key, max_new_tokens=12)
    assert out == "".join(
        f"[{i}/3] {prompt}\n{text}\n"
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1)
    )
    assert len({*texts}) == 3 and texts[2] != ANSWER


def test_several_prompts(capsys: Any, model: Path):
    prompts = ["x", "uvw", "q  r\ns"]
    out, err = succeed(capsys, "generate", model, *prompts, "--max-new-tokens", "5")
    texts = library_text(model, prompts, max_new_tokens=5)
    assert texts == [" é\ufffd", "x é\ufffd", "tuvwx"]  # parts of 😀
    assert out == f"[1/3] x\n{texts[0]}\n[2/3] uvw\n{texts[1]}\n[3/3] q r s\ntuvwx\n"
    assert "10 prompt tokens, 15 new tokens" in err


def test_headings_are_one_line(capsys: Any):
    report.print_texts(["a\n" + "b" * 99], [SimpleNamespace(text="c\nd")])
    assert capsys.readouterr().out == f"[1/1] a {'b' * 55}...\nc\nd\n"


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_prompt_from_standard_input(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path, ending: bytes
):
    pipe(monkeypatch, b"w" + ending)
    assert succeed(capsys, "generate", model)[0] == f"x{ANSWER}\n"


def test_prompt_from_a_file(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
):
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfa\n\nx\n")
    words = ("generate", model, "--json", "--file")
    out, _ = succeed(capsys, *words, tmp_path / "prompt")
    assert json.loads(out)["answers"][0]["prompt"] == "a\n\nx"
    pipe(monkeypatch, b"abc")
    assert json.loads(succeed(capsys, *words, "-")[0])["answers"][0]["prompt"] == "abc"


def test_options_may_stand_between_folder_and_prompt(capsys: Any, model: Path):
    out, _ = succeed(capsys, "generate", model, "--raw", "x", "--seed", "1")
    assert out == f"{ANSWER}\n"


def test_empty_prompt_begins_with_bos(capsys: Any, model: Path, copy: Path):
    assert succeed(capsys, "generate", model, "")[0] == f"{ANSWER}\n"
    (copy / "config.json").write_text(json.dumps({**CONFIG, "bos_token_id": None}))
    assert "it is empty, and the model has no bos" in fail(capsys, "generate", copy, "")


def test_json(capsys: Any, model: Path):
    out, err = succeed(capsys, "generate", model, "w", "--json")
    found = json.loads(out)
    assert err == "" and found["model"] == str(model)
    assert found["answers"] == [
        {
            "prompt": "w",
            "text": f"x{ANSWER}",
            "prompt_tokens": 1,
            "new_tokens": 13,
            "finish": "stop",
            "finite": True,
        }
    ]
    assert found["first_token_seconds"] > 0 and found["tokens_per_second"] > 0
    out, _ = succeed(capsys, "generate", model, "w", "--json", "--max-new-tokens", "0")
    found = json.loads(out)
    assert found["answers"][0]["text"] == "" and found["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("words", "turns"),
    [
        (["x"], "<|user|>x<|assistant|>"),
        (["x", "--system", "s"], "<|system|>s<|user|>x<|assistant|>"),
        (["x", "--raw"], "x"),
    ],
)
def test_chat_template(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    chat: Path,
    words: list[str],
    turns: str,
):
    seen = record(monkeypatch)
    out, _ = succeed(capsys, "generate", chat, *words)
    assert out == f"{ANSWER}\n"
    assert seen["prompt"].tolist() == [ids_of(turns)]


def record(
    monkeypatch: pytest.MonkeyPatch, tokens: list[int] | None = None
) -> dict[str, Any]:
    """What `generate.stream` is called with; `tokens` are its answer instead."""
    seen: dict[str, Any] = {}

    def stream(params: Any, prompt: Any, lengths: Any, **options: Any) -> Any:
        seen.update(params=params, prompt=prompt, lengths=lengths, **options)
        if tokens is not None:
            return Blocks([np.array([tokens])])
        return jrope.stream(params, prompt, lengths, **options)

    monkeypatch.setattr(generate, "stream", stream)
    if tokens is not None:  # nothing will run
        monkeypatch.setattr(generate, "compile_ahead", lambda *_, **__: None)
    return seen


def test_options_reach_the_library(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    seen = record(monkeypatch, [])
    words = (
        "--rope yarn:factor=4,original=32 --condense 2 --precision accurate "
        "--dtype float16 --prefill-chunk 16 --temperature 0.5 --min-p 0.25 "
        "--repetition-penalty 1.5 --frequency-penalty 0.25 --presence-penalty -2 "
        "--seed 3 --max-new-tokens 2 --speculate prompt:3 --cache-dtype int8"
    )
    succeed(capsys, "generate", model, "x", *words.split())
    assert seen["speculate"] == jrope.PromptLookup(3)
    assert seen["cache_dtype"] == "int8"
    sampler = {"temperature": 0.5, "min_p": 0.25, "repetition_penalty": 1.5}
    sampler |= {"frequency_penalty": 0.25, "presence_penalty": -2.0}
    assert seen["sampler"] == jrope.Sampler(**sampler)
    assert seen["key"] == jax.random.key(3)
    assert (seen["prefill_chunk"], seen["max_new_tokens"]) == (16, 2)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(seen["params"])} == {"float16"}
    yarn = jrope.rope.Yarn(factor=4, original_length=32)
    expected = with_rope(config_from_hf(CONFIG), yarn, condense=2, precision="accurate")
    assert seen["config"] == expected


def test_new_tokens_end_where_the_model_s_length_does(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    seen = record(monkeypatch, [])
    expected = {(1, None): 63, (1, "linear:16"): 256, (64, None): 256}
    for (length, rope), new in expected.items():
        words = () if rope is None else ("--rope", rope)
        succeed(capsys, "generate", model, "x" * length, *words)
        assert seen["max_new_tokens"] == new


def test_eos_of_the_generation_config(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, copy: Path
):
    seen = record(monkeypatch, ids_of(ANSWER))
    stop = {"eos_token_id": [VOCAB["!"], VOCAB["</s>"]]}
    (copy / "generation_config.json").write_text(json.dumps(stop))
    assert succeed(capsys, "generate", copy, "x")[0] == f"{ANSWER[:-1]}\n"
    assert seen["config"].eos_token_id == (VOCAB["!"], VOCAB["</s>"])


def test_stop_text(capsys: Any, model: Path):
    words = ("generate", model, "x", "--json", "--stop")
    answer = json.loads(succeed(capsys, *words, "😀日", "--stop", "zz")[0])["answers"][
        0
    ]
    assert (answer["text"], answer["finish"], answer["new_tokens"]) == (
        " é",
        "stop",
        10,
    )
    answer = json.loads(succeed(capsys, *words, "!!")[0])["answers"][0]
    assert answer["text"] == ANSWER


# generation_config.json


FILE = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("file", "words", "sampler", "told"),
    [
        (FILE, "", {"temperature": 0.6, "top_p": 0.9, "top_k": 50}, "top_k 50, top_p "),
        (FILE, "--temperature 0", {}, ""),
        (
            FILE,
            "--temperature 2 --top-k 0",
            {"temperature": 2, "top_p": 0.9},
            "generation_config.json: top_p 0.9 (--no-generation-config ignores it)",
        ),
        (FILE, "--no-generation-config", {}, ""),
        ({**FILE, "do_sample": False}, "", {}, ""),
        ({"temperature": 0.6}, "", {}, ""),
        (
            {"top_p": 0.9, "repetition_penalty": 1.2},
            "",
            {"repetition_penalty": 1.2},
            "generation_config.json: repetition_penalty 1.2 (--no-gen",
        ),
        ({"top_p": 0.9}, "--temperature 1", {"temperature": 1, "top_p": 0.9}, "top_p "),
        ({"repetition_penalty": 3}, "--repetition-penalty 1", {}, ""),
        (
            {"num_beams": 4, "suppress_tokens": [1], "min_new_tokens": 2},
            "",
            {},
            "warning: generation_config.json: num_beams, min_new_tokens, "
            "suppress_tokens: not supported, has no effect here",
        ),
    ],
)
def test_the_folder_s_sampling_and_flags_that_win(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    copy: Path,
    file: dict[str, Any],
    words: str,
    sampler: dict[str, float],
    told: str,
):
    seen = record(monkeypatch, [])
    (copy / "generation_config.json").write_text(json.dumps(file))
    words_ = ("x", "--max-new-tokens", "2", *words.split())
    _, err = succeed(capsys, "generate", copy, *words_)
    assert seen["sampler"] == jrope.Sampler(**sampler)
    assert told in err and err.count("jrope: ") == bool(told)


@pytest.mark.parametrize(
    ("file", "words", "new"),
    [
        ({"max_new_tokens": 5}, "", 5),
        ({"max_length": 4, "max_new_tokens": 5}, "", 5),
        ({"max_length": 4}, "", 3),
        ({"max_new_tokens": 5}, "--max-new-tokens 2", 2),
        ({"max_new_tokens": 5}, "--no-generation-config", 63),
    ],
)
def test_the_folder_s_number_of_new_tokens(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    copy: Path,
    file: dict[str, Any],
    words: str,
    new: int,
):
    seen = record(monkeypatch, [])
    (copy / "generation_config.json").write_text(json.dumps(file))
    succeed(capsys, "generate", copy, "x", *words.split())
    assert seen["max_new_tokens"] == new


def test_a_folder_s_sampling_that_is_not_allowed(capsys: Any, copy: Path):
    file = copy / "generation_config.json"
    file.write_text(json.dumps({**FILE, "top_p": 1.5}))
    error = fail(capsys, "generate", copy, "x")
    assert f"{file}: Sampler: top_p: got 1.5, want from 0 to 1" in error
    assert error.endswith("correct the file, or give --no-generation-config")
    file.write_text(json.dumps({**FILE, "temperature": "hot"}))
    error = fail(capsys, "generate", copy, "x")
    assert f"{file}: temperature: got 'hot', want a number" in error


# Logits that are not finite


@pytest.fixture(scope="module")
def overflowing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedding of "b" passes float16's largest number in the MLP."""
    params, config = jrope.load(model)
    layer = params["model"]["layers"]["0"]["mlp"]
    at = VOCAB["b"]
    for name in ("gate_proj", "up_proj"):
        weight = 0 * layer[name]["weight"]
        layer[name]["weight"] = weight.at[:, at].set(60)  # the norm makes x 16 of 1
    folder = tmp_path_factory.mktemp("overflow") / "m"
    return jrope.save(folder, params, config, extra_files=sorted(model.glob("tok*")))


def test_rows_whose_logits_are_not_finite_are_told(capsys: Any, overflowing: Path):
    words = ("generate", overflowing, "x", "b", "q", "--max-new-tokens", "3", "--dtype")
    out, err = succeed(capsys, *words, "float16", status=1)
    assert "[1/3] x\n é" in out and "[3/3] q\nrst\n" in out
    (line,) = (line for line in err.splitlines() if "warning" in line)
    assert line == (
        "jrope: warning: answer 2 of 3 means nothing: its logits hold NaN or infinity; "
        "--dtype bfloat16 has the range of float32"
    )
    _, err = succeed(capsys, *words, "bfloat16")
    assert "warning" not in err


def test_json_says_whether_logits_were_finite(capsys: Any, overflowing: Path):
    words = ("generate", overflowing, "x", "b", "--json", "--max-new-tokens", "3")
    out, err = succeed(capsys, *words, "--dtype", "float16", status=1)
    report = json.loads(out)
    assert [answer["finite"] for answer in report["answers"]] == [True, False]
    assert report["rope"] == "default" and report["sampler"]["temperature"] == 0
    assert "answer 2 of 2 means nothing" in err


def test_an_overflow_that_no_dtype_mends(capsys: Any):
    answers: Any = [SimpleNamespace(finite=x) for x in (False, True, False)]
    assert report.tell_not_finite(answers, "float32") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line[:35] for line in lines] == [
        f"jrope: warning: answer {i} of 3 means" for i in (1, 3)
    ]
    assert "the weights overflow even float32: take another checkpoint" in lines[0]
    assert report.tell_not_finite(answers[1:2], "float16") == 0
    assert capsys.readouterr().err == ""


def test_a_row_is_not_blamed_after_its_stop_text(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    """Its neighbour goes on, and the device with it."""

    def blocks() -> Iterator[np.ndarray]:
        yield np.array([ids_of("b"), ids_of("c")])
        made.finite = np.array([False, True])
        yield np.array([ids_of("d"), ids_of("d")])

    made = Blocks(blocks(), rows=2)
    monkeypatch.setattr(generate, "stream", lambda *_, **__: made)
    words = ("generate", model, "x", "y", "--json", "--stop", "b")
    out, _ = succeed(capsys, *words)
    assert [answer["finite"] for answer in json.loads(out)["answers"]] == [True] * 2


# Streaming


class Blocks(Iterator[np.ndarray]):
    """What `stream` gives, as a test wants it."""

    def __init__(self, blocks: Iterable[np.ndarray], rows: int = 1) -> None:
        self.finite, self._blocks = np.ones(rows, bool), iter(blocks)

    def __next__(self) -> np.ndarray:
        return next(self._blocks)


class Recorder(io.StringIO):
    """Standard output that remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_text_comes_as_it_is_made(monkeypatch: pytest.MonkeyPatch, model: Path):
    screen = Recorder()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["generate", str(model), "u"]) == 0
    # blocks of 1, 8 and 6 tokens, the second of which ends inside a character
    assert "".join(screen.writes) == f"vwx{ANSWER}\n"
    assert [w for w in screen.writes if w] == ["v", "wx é", "😀日!", "\n"]


def test_stops_asking_once_every_answer_is_complete(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    def blocks() -> Iterator[np.ndarray]:
        yield np.array([ids_of("ab")])
        raise AssertionError("asked for more")

    monkeypatch.setattr(generate, "stream", lambda *_, **__: Blocks(blocks()))
    out, _ = succeed(capsys, "generate", model, "x", "--stop", "b")
    assert out == "a\n"


def test_rate_counts_what_came_after_the_first_block():
    timing = report.Timing(load=0, first=3.0, total=5.0, early=2)
    assert timing.rate(12) == 5 and timing.rate(2) is None


def test_ctrl_c_keeps_what_was_said(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    def blocks() -> Iterator[np.ndarray]:
        yield np.array([ids_of("ab")])
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", lambda *_, **__: Blocks(blocks()))
    out, err = succeed(capsys, "generate", model, "x", status=130)
    assert (out, err) == ("ab\n", "jrope: error: interrupted\n")


def test_the_command_leaves_pytorch_unimported(model: Path) -> None:
    """transformers imports it where it can; the answer does not change without it."""
    done = run_without_torch("generate", model, "ab", "--max-new-tokens", "3")
    assert done.stdout == library_text(model, ["ab"], max_new_tokens=3)[0] + "\n"


def test_evaluate_leaves_pytorch_unimported(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc" * 20)
    words = ("--text", tmp_path / "text", "--context", "16")
    done = run_without_torch("evaluate", model, *words)
    assert "Perplexity" in done.stdout


def run_without_torch(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which must not have imported PyTorch."""
    argv = ["jrope", *map(str, words)]
    program = (
        f"import sys; sys.argv = {argv!r}\n"
        "from jrope.cli import main\n"
        "status = main()\n"
        "assert 'transformers' in sys.modules and sys.modules['torch'] is None\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done
