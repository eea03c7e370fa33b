"""The command line: what it prints, where, and how it fails.

The model is made so that its greedy text is known: token t is followed by NEXT[t].
"""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

import jrope
import jrope.cli
from jrope.checkpoint import open_tensors, write_folder
from jrope.cli import common, generate, main, report, terminal
from jrope.cli.text import Answer, encode
from jrope.config import parameter_shapes, with_rope
from jrope.errors import JropeError
from jrope.hf import config_from_hf

ANSWER = " é😀日!"  # no byte twice, so that one follows from the other
SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {letter: i for i, letter in enumerate([*LETTERS, *SPECIAL])}
SIZE = 264
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "bos_token_id": VOCAB["<s>"],
    "eos_token_id": VOCAB["</s>"],
}


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(VOCAB, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def piece_tokenizer() -> Tokenizer:
    """Like Llama 2's: spaces are letters, the first is lost, bytes where it must be."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", *"abcdefgh", "▁a", "▁ab", "ab", "▁▁"]
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *bytes_, *words])}
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )


def ids_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def chain() -> np.ndarray:
    """NEXT: x, <s> and <|assistant|> begin ANSWER, other letters the alphabet."""
    following = (np.arange(SIZE) + 1) % 256
    answer = ids_of(ANSWER)
    following[answer] = [*answer[1:], VOCAB["</s>"]]
    for first in ("x", "<s>", "<|assistant|>"):
        following[VOCAB[first]] = answer[0]
    return following


def make_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(shape, np.float32)
        for name, shape in parameter_shapes(config_from_hf(CONFIG)).items()
    }
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name][:] = 0
        if "norm" in name:
            weights[name][:] = 1
    weights["model.embed_tokens.weight"] = np.eye(SIZE, dtype=np.float32)
    weights["lm_head.weight"] = np.zeros((SIZE, SIZE), np.float32)
    weights["lm_head.weight"][chain(), np.arange(SIZE)] = 1
    return weights


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without chat template; read only."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    write_folder(folder, CONFIG, make_weights().items())
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)
    return folder


def write_tokenizer_config(folder: Path, **more: Any) -> None:
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to spoil."""
    return shutil.copytree(model, tmp_path / "copy")


@pytest.fixture
def chat(copy: Path) -> Path:
    """A folder with a chat template."""
    write_tokenizer_config(copy, chat_template=TEMPLATE)
    return copy


@pytest.fixture(autouse=True)
def _no_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JROPE_CACHE_DIR", "")
    monkeypatch.delenv("JROPE_DEBUG", raising=False)


def succeed(capsys: Any, *words: object, status: int = 0) -> tuple[str, str]:
    assert main([str(word) for word in words]) == status
    return capsys.readouterr()


def fail(capsys: Any, *words: object, status: int = 2) -> str:
    """The one line that an error gives."""
    assert main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jrope: error: ") and err.endswith("\n")
    assert err.count("\n") == 1 and "Traceback" not in err
    return err.strip()


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- jrope


def test_help_names_every_command(capsys: Any):
    out, err = succeed(capsys, "--help")
    assert all(name in out for name in jrope.cli.COMMANDS) and not err
    out, err = succeed(capsys, status=2)
    assert all(name in err for name in jrope.cli.COMMANDS) and not out


def test_version(capsys: Any):
    assert succeed(capsys, "--version")[0] == f"jrope {jrope.__version__}\n"


@pytest.mark.parametrize("name", jrope.cli.COMMANDS)
def test_every_command_has_help(capsys: Any, name: str):
    out, _ = succeed(capsys, name, "--help")
    assert out.startswith(f"usage: jrope {name} ") and "folder" in out.lower()


def test_help_keeps_names(capsys: Any):
    assert "Compare a model with PyTorch" in succeed(capsys, "parity", "--help")[0]


def test_runs_as_a_module_and_imports_little():
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "try: import runpy; runpy.run_module('jrope.cli', run_name='__main__')\n"
        "finally: print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: jrope ") and done.stdout.endswith("set()\n")


def test_a_reader_that_goes_away_is_no_error(model: Path):
    words = [sys.executable, "-m", "jrope.cli", "inspect", str(model)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frob"], "invalid choice: 'frob'"),
        (["--frob"], "unrecognized arguments: --frob (see 'jrope --help')"),
        (["inspect"], "required: FOLDER (see 'jrope inspect --help')"),
        (["inspect", "a", "--frob"], "unrecognized arguments: --frob"),
        (["inspect", "a", "--length", "0"], "'0' is not a whole number from 1"),
        (["generate", "a", "--top-k", "x"], "'x' is not a whole number from 0"),
        (["generate", "a", "--condense", "x"], "'x' is not a number"),
        (["convert", "a", "b", "--max-shard-size", "5XB"], "'5XB' is not a size"),
        (["convert", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_usage(capsys: Any, words: list[str], message: str):
    assert message in fail(capsys, *words)


def _raise(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (JropeError("a\nb\x1b[1m"), r"a b\x1b[1m", 2),
        (OSError(28, "No space left on device"), "No space left on device", 2),
        (FileNotFoundError(2, "No such file", "/x"), "/x: No such file", 2),
        (KeyError("x"), "unexpected KeyError: 'x' (JROPE_DEBUG=1 shows where)", 2),
    ],
)
def test_errors_are_one_line(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    message: str,
    status: int,
):
    monkeypatch.setattr(jrope.cli, "_dispatch", _raise(error))
    assert fail(capsys, status=status) == f"jrope: error: {message}"
    monkeypatch.setenv("JROPE_DEBUG", "1")
    with pytest.raises(type(error)):
        main([])


# --- common


@pytest.mark.parametrize(
    ("text", "name", "fields"),
    [
        ("default", "default", {}),
        ("linear:2", "linear", {"factor": 2}),
        ("condense:2.5", "condense", {"factor": 2.5}),
        ("yarn:4,original=8192", "yarn", {"factor": 4, "original_length": 8192}),
        ("yarn:factor=4.0,truncate=false", "yarn", {"factor": 4.0, "truncate": False}),
        (
            "longrope:short=1:1.5,long=2",
            "longrope",
            {"short_factor": (1, 1.5), "long_factor": (2,)},
        ),
    ],
)
def test_parse_rope(text: str, name: str, fields: dict[str, Any]):
    got = common.parse_rope(text)
    assert got == (name, fields)
    assert [type(x) for x in got[1].values()] == [type(x) for x in fields.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "want NAME or NAME:FIELD=VALUE"),
        ("yarn:", "want NAME or NAME:FIELD=VALUE"),
        ("yarn:factor=", "factor is '', want a number"),
        ("yarn:factor=4x", "factor is '4x', want a number"),
        ("yarn:4,factor=4", "factor is given twice"),
        ("yarn:4,original=1,original_length=2", "original_length is given twice"),
        ("yarn:4,condense=2", "condense is not a field; see --condense"),
        ("nkt:2", "unknown rope type 'nkt'"),
        ("nkt:2", "did you mean 'ntk'?"),
        ("yarn", "needs factor"),
        ("yarn:4,fac=1", r"has no field ['fac']"),
        ("linear:0", "--rope 'linear:0': factor: got 0, want a finite number > 0"),
        ("linear:nan", "factor: got nan"),
        ("linear:true", "factor: got True"),
        ("linear:1:2", "factor: got (1, 2)"),
        ("yarn:4,original=512.5", "original_length: got 512.5"),
        ("longrope:short=1:1,long=1:1:1:1,factor=2", "'2 numbers', want 4 numbers"),
    ],
)
def test_rope_errors(capsys: Any, model: Path, text: str, message: str):
    assert message in fail(capsys, "inspect", model, f"--rope={text}")


def test_apply_rope_is_with_rope():
    config = config_from_hf(CONFIG)
    args = Namespace(rope="yarn:4", condense=2, precision="accurate")
    expected = with_rope(config, "yarn", condense=2, precision="accurate", factor=4)
    assert common.apply_rope(config, args) == expected
    nothing = Namespace(rope=None, condense=None)
    assert common.apply_rope(config, nothing) == config
    condensed = common.apply_rope(config, Namespace(rope="condense:3", condense=None))
    assert condensed == with_rope(config, condense=3)


def test_rope_lengths(capsys: Any, model: Path):
    config = config_from_hf(CONFIG)
    args = Namespace(rope="dynamic:2", condense=None, rope_lengths="growing")
    expected = with_rope(config, "dynamic", factor=2, lengths="growing")
    assert common.apply_rope(config, args) == expected
    words = ("--rope", "dynamic:2", "--rope-lengths")
    assert describe(capsys, model, *words, "hf")["rope"]["lengths"] == "hf"
    assert describe(capsys, model)["rope"]["lengths"] is None
    out, _ = succeed(capsys, "inspect", model, *words, "growing")
    assert "parity, growing lengths)" in out
    error = fail(capsys, "inspect", model, "--rope-lengths", "growing")
    assert "--rope-lengths growing: lengths: got 'growing', want 'planned'" in error
    error = fail(capsys, "inspect", model, "--rope", "dynamic:2,lengths=1")
    assert "lengths is not a field; see --rope-lengths" in error


def test_condense_errors(capsys: Any, model: Path):
    assert "condense: got 0" in fail(capsys, "inspect", model, "--condense", "0")
    words = ("inspect", model, "--rope", "condense:2", "--condense", "2")
    assert "give one" in fail(capsys, *words)


@pytest.mark.parametrize(
    ("spec", "longest"),
    [
        ("default", 64),
        ("linear:2", 128),
        ("ntk:2", 128),
        ("yarn:4", 256),
        ("yarn:4,original=32", 128),
        ("yarn:4,original=8", 64),
        ("condense:2.5", 160),
        ("dynamic:2", None),
        ("dynamic-yarn", None),
    ],
)
def test_reach(spec: str, longest: int | None):
    args = Namespace(rope=spec, condense=None)
    assert common.reach(common.apply_rope(config_from_hf(CONFIG), args)) == longest


@pytest.mark.parametrize(
    ("word", "count"),
    [("5GB", 5 * 10**9), ("1.5kb", 1500), ("2MiB", 2**21), ("70", 70), ("7B", 7)],
)
def test_size(word: str, count: int):
    assert common.size(word) == count


@pytest.mark.parametrize("word", ["", "GB", "0", "-1", "5XB", "nan", "inf", "1e400"])
def test_size_errors(word: str):
    with pytest.raises(ArgumentTypeError, match="is not a size such as"):
        common.size(word)


def test_compile_cache(tmp_path: Path):
    code = (
        "import sys, shutil, jax\n"
        "from jrope.cli.common import enable_compile_cache\n"
        "enable_compile_cache()\n"
        "jax.jit(lambda x: x + 1)(1.0)\n"
        "print(jax.config.jax_compilation_cache_dir)\n"
        "if sys.argv[1:]: shutil.rmtree(sys.argv[1])\n"
        "jax.jit(lambda x: x + 2)(1.0)\n"
    )

    def run(folder: str, *words: str, **more: str) -> str:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg"), **more}
        for name in ("JROPE_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
            environment.pop(name, None)
        if folder != "unset":
            environment["JROPE_CACHE_DIR"] = folder
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        assert done.stderr == ""
        return done.stdout.strip()

    assert run("unset") == str(tmp_path / "xdg" / "jrope")
    assert [*(tmp_path / "xdg" / "jrope").iterdir()]
    assert run("") == "None"
    assert run("/dev/null/x") == "None"  # cannot be made
    assert run(str(tmp_path / "own"), str(tmp_path / "own")) == str(tmp_path / "own")


def test_compile_cache_is_on_unless_told(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    calls: list[int] = []
    monkeypatch.setattr(common, "enable_compile_cache", lambda: calls.append(1))
    words = ("generate", tmp_path / "none", "x")
    fail(capsys, *words)
    assert len(calls) == 1
    fail(capsys, *words, "--no-compile-cache")
    fail(capsys, "inspect", tmp_path / "none")
    assert len(calls) == 1


def test_progress_draws_on_terminals_only(capsys: Any, monkeypatch: pytest.MonkeyPatch):
    with terminal.Progress("loading", 10) as progress:
        progress("a", 5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with terminal.Progress("loading", 10) as progress:
        progress("a", 5)
    err = capsys.readouterr().err
    assert "loading [" in err and " 50% of 10 bytes" in err
    assert err.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1e3, "1 kB"), (2.5e9, "2.5 GB")],
)
def test_bytes_text(count: float, text: str):
    assert terminal.bytes_text(count) == text


# --- generate: text


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
    assert "tokens/s" in err and "cpu (" in err and err.count("\n") == 1


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
            return iter([np.array([tokens])])
        return jrope.stream(params, prompt, lengths, **options)

    monkeypatch.setattr(generate, "stream", stream)
    return seen


def test_options_reach_the_library(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    seen = record(monkeypatch, [])
    words = (
        "--rope yarn:factor=4,original=32 --condense 2 --precision accurate "
        "--dtype float16 --prefill-chunk 16 --temperature 0.5 --min-p 0.25 "
        "--repetition-penalty 1.5 --seed 3 --max-new-tokens 2"
    )
    succeed(capsys, "generate", model, "x", *words.split())
    sampler = {"temperature": 0.5, "min_p": 0.25, "repetition_penalty": 1.5}
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


# --- generate: streaming


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
    def stream(*_: Any, **__: Any) -> Iterator[np.ndarray]:
        yield np.array([ids_of("ab")])
        raise AssertionError("asked for more")

    monkeypatch.setattr(generate, "stream", stream)
    out, _ = succeed(capsys, "generate", model, "x", "--stop", "b")
    assert out == "a\n"


def test_rate_counts_what_came_after_the_first_block():
    timing = report.Timing(load=0, first=3.0, total=5.0, early=2)
    assert timing.rate(12) == 5 and timing.rate(2) is None


def test_ctrl_c_keeps_what_was_said(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    def stream(*_: Any, **__: Any) -> Iterator[np.ndarray]:
        yield np.array([ids_of("ab")])
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", stream)
    out, err = succeed(capsys, "generate", model, "x", status=130)
    assert (out, err) == ("ab\n", "jrope: error: interrupted\n")


TOKENIZERS = {"bytes": fast(byte_tokenizer()), "pieces": fast(piece_tokenizer())}
PARTS = st.sampled_from([*"ab  日😀é\n", "\ufffd", "</s>"])
TEXT = st.lists(PARTS, max_size=30).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXT, text=TEXT, size=st.integers(1, 5))
@example(prompt="", text=" a", size=1)
@example(prompt="日" * 9, text="日a", size=1)
def test_answer_is_the_decoded_text(name: str, prompt: str, text: str, size: int):
    tokenizer = TOKENIZERS[name]
    decode = tokenizer.decode
    before, new = (
        tokenizer(x, add_special_tokens=False).input_ids for x in (prompt, text)
    )
    before = before or [1]
    answer = Answer(tokenizer, before)
    parts = [answer.push(new[i : i + size]) for i in range(0, len(new), size)]
    parts.append(answer.end())
    whole = decode([*before, *new], skip_special_tokens=True)
    start = len(decode(before, skip_special_tokens=True))
    assert "".join(parts) == answer.text == whole[start:]
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
    assert answer.count == len(new) and answer.finish == "length"


def test_answer_looks_back_past_special_tokens_and_half_characters():
    tokenizer = TOKENIZERS["pieces"]
    special = [*tokenizer("a").input_ids, *[1] * 16]  # a space is lost behind nothing
    assert Answer(tokenizer, special).push(tokenizer("a").input_ids) == " a"
    sun = [3 + byte for byte in "日".encode()]  # bytes of a broken run are all broken
    assert Answer(tokenizer, sun * 9).push(sun) == "日"


def test_only_raw_prompts_get_the_tokenizer_s_special_tokens():
    inner = byte_tokenizer()
    bos = ("<s>", VOCAB["<s>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    tokenizer = fast(inner)
    tokenizer.chat_template = TEMPLATE
    ids = [encode(tokenizer, "x", None, chat=c, system=None) for c in (False, True)]
    assert ids == [ids_of("<s>x"), ids_of("<|user|>x<|assistant|>")]


@given(text=st.text("abc", max_size=20), stop=st.text("abc", min_size=1, max_size=3))
def test_answer_ends_before_a_stop_text(text: str, stop: str):
    answer = Answer(TOKENIZERS["bytes"], ids_of("x"), stop_texts=[stop])
    told = "".join(answer.push([token]) for token in ids_of(text)) + answer.end()
    assert told == answer.text == text.partition(stop)[0]
    assert answer.finish == ("stop" if stop in text else "length")
    end = text.find(stop) + len(stop) if stop in text else len(text)
    assert answer.count == end


def test_answer_ends_at_a_stop_id():
    answer = Answer(TOKENIZERS["bytes"], ids_of("x"), stop_ids=ids_of("b"))
    assert answer.push(ids_of("abc")) == "a" and answer.push(ids_of("d")) == ""
    assert (answer.count, answer.finish, answer.end()) == (2, "stop", "")


def test_answer_gives_out_broken_characters_at_the_end():
    answer = Answer(TOKENIZERS["bytes"], ids_of("x"))
    assert answer.push(ids_of("a日")[:-1]) == "a"
    assert answer.end() == "\ufffd"


# --- generate: warnings and errors


@pytest.mark.parametrize(
    ("known", "total", "spec", "message"),
    [
        (SIZE, 64, "default", ""),
        (SIZE, 65, "default", "--rope yarn:2 or dynamic:2"),
        (SIZE, 65, "linear:2", ""),
        (SIZE, 129, "linear:2", "meant for 128"),
        (SIZE, 10**6, "dynamic:2", ""),
        (SIZE + 1, 1, "default", f"the tokenizer has {SIZE + 1} ids, the model {SIZE}"),
        (SIZE // 2, 1, "default", "do they belong together?"),
        (SIZE - 8, 1, "default", ""),
    ],
)
def test_warnings(capsys: Any, known: int, total: int, spec: str, message: str):
    args = Namespace(rope=spec, condense=None)
    config = common.apply_rope(config_from_hf(CONFIG), args)
    tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(known)})
    generate._warn(tokenizer, total, config)
    out, err = capsys.readouterr()
    assert out == "" and message in err and bool(message) == bool(err)
    assert not err or (err.startswith("jrope: warning: ") and err.count("\n") == 1)


def test_warns_past_the_trained_length(capsys: Any, model: Path):
    words = ("generate", model, "x", "--max-new-tokens")
    assert "may reach 65, the model is meant for 64" in succeed(capsys, *words, "64")[1]


def test_warns_of_filters_without_temperature(capsys: Any, model: Path):
    words = ("generate", model, "x", "--top-k", "3", "--seed", "1")
    _, err = succeed(capsys, *words)
    assert "warning: --top-k, --seed without --temperature above 0" in err


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cheap to check is checked before weights are loaded."""
    monkeypatch.setattr(generate, "load", _raise(AssertionError("loaded")))


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--file", "f"], "as arguments or --file, not both"),
        (["--file", "/nonexistent"], "/nonexistent: No such file or directory"),
        (["--file", "/"], "/: Is a directory"),
        (["x", "--system", "s"], "needs a chat template, but this tokenizer has none"),
        (["x\udcff"], "prompt: it is not valid UTF-8"),
        (["x", "--temperature", "-1"], "temperature is -1"),
        (["x", "--temperature", "1", "--top-p", "2"], "top_p is 2"),
        (["x", "--max-new-tokens", "-1"], "'-1' is not a whole number from 0"),
        (["x", "--prefill-chunk", "0"], "'0' is not a whole number from 1"),
        (["x", "--rope", "nkt:2"], "unknown rope type 'nkt'"),
        (["x", "--condense", "-2"], "condense: got -2"),
    ],
)
def test_errors_before_loading(
    capsys: Any, model: Path, words: list[str], message: str
):
    assert message in fail(capsys, "generate", model, *words)


@pytest.mark.usefixtures("_no_weights")
def test_prompt_errors(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
):
    pipe(monkeypatch, b"ab\xff")
    assert "standard input is not UTF-8 text: byte 2" in fail(capsys, "generate", model)
    (tmp_path / "p").write_bytes(b"\xff")
    words = ("generate", model, "--file", tmp_path / "p")
    assert f"{tmp_path / 'p'} is not UTF-8 text: byte 0" in fail(capsys, *words)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert "no prompt: give it as an argument" in fail(capsys, "generate", model)


@pytest.mark.usefixtures("_no_weights")
def test_tokenizer_errors(capsys: Any, copy: Path):
    words = ("generate", copy, "x")
    write_tokenizer_config(copy, chat_template="{{ raise_exception('no roles') }}")
    error = fail(capsys, *words)
    assert "the chat template failed" in error and "no roles" in error
    assert "--system needs a chat template, but --raw" in fail(
        capsys, *words, "--raw", "--system", "s"
    )
    (copy / "tokenizer.json").write_text("{}")
    assert f"{copy}: the tokenizer cannot be read" in fail(capsys, *words)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert f"no tokenizer in {copy}: want one of tokenizer.json" in fail(capsys, *words)


@pytest.mark.usefixtures("_no_weights")
def test_a_tokenizer_of_another_model(capsys: Any, copy: Path):
    fewer = {**CONFIG, "vocab_size": 20}
    (copy / "config.json").write_text(json.dumps(fewer))
    assert "outside the vocabulary of 20" in fail(capsys, "generate", copy, "xyz")


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("command", ["generate", "inspect", "convert"])
def test_folder_errors(capsys: Any, copy: Path, tmp_path: Path, command: str):
    def error(folder: Path) -> str:
        last = tmp_path / "out" if command == "convert" else "x"
        words = (last,) if command != "inspect" else ()
        return fail(capsys, command, folder, *words)

    assert "is not a hub id" in error(tmp_path / "none")
    assert "config.json is a file" in error(copy / "config.json")
    (copy / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": -1.0}))
    assert "config.json: rope_theta: got -1.0" in error(copy)
    (copy / "config.json").write_text("{")
    assert "config.json is not valid JSON" in error(copy)
    (copy / "config.json").unlink()
    assert f"no config.json in {copy}" in error(copy)


@pytest.mark.parametrize("command", ["generate", "inspect", "convert"])
def test_truncated_weights(capsys: Any, copy: Path, tmp_path: Path, command: str):
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    last = {"generate": ("x",), "convert": (tmp_path / "out",)}.get(command, ())
    error = fail(capsys, command, copy, *last)
    assert f"{weights} is truncated: its header promises" in error
    assert not (tmp_path / "out").exists()


# --- inspect


def describe(capsys: Any, folder: Path, *words: object) -> dict[str, Any]:
    return json.loads(succeed(capsys, "inspect", folder, "--json", *words)[0])


def test_inspect_tells_what_is_there(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    monkeypatch.setattr("jrope.safetensors_read._pieces", _raise(AssertionError()))
    facts = describe(capsys, model)
    weights = make_weights()
    count = sum(array.size for array in weights.values())
    file = model / "model.safetensors"
    assert facts["folder"] == str(model)
    assert facts["weights"] == {
        "parameters": count,
        "tensors": len(weights),
        "dtypes": ["float32"],
        "bytes": 4 * count,
        "files": {file.name: file.stat().st_size},
    }
    assert facts["kv_cache_bytes_per_token"] == 2 * 1 * 1 * 8 * 4
    shown = {"vocab_size": SIZE, "head_dim": 8, "eos_token_id": [VOCAB["</s>"]]}
    assert shown.items() <= facts["config"].items()
    out, _ = succeed(capsys, "inspect", model)
    assert f"{count:,}" in out and "rope        default (theta 10000, parity)" in out
    assert "pairs       4: 4 kept\n" in out and "64 bytes a token" in out


def test_inspect_describes_plain_rope(capsys: Any, model: Path):
    rope = describe(capsys, model)["rope"]
    assert rope["method"] == "default" and rope["trained_length"] == 64
    assert (rope["pairs"], rope["pairs_kept"], rope["pairs_still"]) == (4, 4, 0)
    assert rope["stretched_by"] is None and rope["attention_scaling"] == 1
    waves = [2 * math.pi, 2 * math.pi * 10000 ** (3 / 4)]
    np.testing.assert_allclose(rope["wavelengths"], waves, rtol=1e-12)


@pytest.mark.parametrize(
    ("words", "kept", "stretch", "still", "attention"),
    [
        ("--rope linear:4", 0, [4, 4], 0, 1),
        ("--condense 3", 0, [3, 3], 0, 1),
        ("--rope linear:2 --condense 3", 0, [6, 6], 0, 1),
        ("--rope ntk:8", 1, [8 ** (1 / 3), 8], 0, 1),
        ("--rope dynamic:2", 1, [3 ** (1 / 3), 3], 0, 1),
        ("--rope dynamic:2 --length 64", 4, None, 0, 1),
        ("--rope yarn:4", 1, None, 0, 0.1 * math.log(4) + 1),
        ("--rope dynamic-yarn", 1, None, 0, 0.1 * math.log(2) + 1),
        ("--rope dynamic-yarn --length 64", 4, None, 0, 1),
        ("--rope dynamic-yarn:4 --length 192", 1, None, 0, 0.1 * math.log(4) + 1),
        ("--rope yarn:4,attention_factor=1.5", 1, None, 0, 1.5),
        ("--rope proportional:partial_rotary_factor=0.5", 2, None, 2, 1),
        (
            "--rope longrope:short=1:1:1:2,long=1:2:3:4,original=32",
            1,
            [2, 4],
            0,
            math.sqrt(1 + math.log(2) / math.log(32)),
        ),
        (
            "--rope longrope:short=1:1:1:2,long=1:2:3:5,original=32,attention_factor=3",
            1,
            [2, 5],
            0,
            3,
        ),
        (
            "--rope longrope:short=1:1:1:2,long=1:2:3:4,original=32,factor=1 "
            "--length 32",
            3,
            [2, 2],
            0,
            1,
        ),
    ],
)
def test_inspect_describes_methods(
    capsys: Any,
    model: Path,
    words: str,
    kept: int,
    stretch: list[float] | None,
    still: int,
    attention: float,
):
    rope = describe(capsys, model, *words.split())["rope"]
    assert (rope["pairs_kept"], rope["pairs_still"]) == (kept, still)
    assert rope["pairs_stretched"] == 4 - kept - still
    if stretch is not None:
        np.testing.assert_allclose(rope["stretched_by"], stretch, rtol=1e-9)
    assert rope["attention_scaling"] == pytest.approx(attention, rel=1e-12)
    out, _ = succeed(capsys, "inspect", model, *words.split())
    assert f"4: {kept} kept" in out


def test_inspect_finds_missing_and_left_over_tensors(
    capsys: Any, model: Path, copy: Path
):
    tied = {**CONFIG, "num_hidden_layers": 2}
    (copy / "config.json").write_text(json.dumps(tied))
    error = fail(capsys, "inspect", copy)
    assert "9 missing: model.layers.1.self_attn.q_proj.weight" in error


# --- convert


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors = open_tensors(folder)
    return {name: tensors.read(name) for name in tensors.names}


def test_convert_casts_and_splits(capsys: Any, model: Path, tmp_path: Path):
    target = tmp_path / "new" / "folder"
    words = ("--dtype", "bfloat16", "--max-shard-size", "200kB")
    out, err = succeed(capsys, "convert", model, target, *words)
    assert out.startswith(f"wrote {target}: 12 tensors, ") and err == ""
    assert "bfloat16, 2 files, rope default; copied tokenizer.json, " in out
    assert len([*target.glob("*.safetensors")]) == 2
    for name, array in tensors_of(target).items():
        expected = make_weights()[name].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array, expected, strict=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (model / name).read_bytes()
    written = json.loads((target / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_convert_keeps_what_it_is_not_told_to_change(
    capsys: Any, model: Path, tmp_path: Path
):
    succeed(capsys, "convert", model, tmp_path / "out")
    old, new = tensors_of(model), tensors_of(tmp_path / "out")
    assert [*old] == [*new] and all((old[name] == new[name]).all() for name in old)
    assert jrope.load(tmp_path / "out")[1] == jrope.load(model)[1]


@pytest.mark.parametrize(
    "words",
    ["--rope yarn:factor=4,original=32", "--condense 2", "--rope dynamic:2"],
)
def test_convert_exports_the_rope(capsys: Any, model: Path, tmp_path: Path, words: str):
    succeed(capsys, "convert", model, tmp_path / "out", *words.split())
    option, value = words.split()
    spec = value if option == "--rope" else f"condense:{value}"
    args = Namespace(rope=spec, condense=None)
    expected = common.apply_rope(config_from_hf(CONFIG), args)
    assert jrope.load(tmp_path / "out")[1].rope == expected.rope
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"] and written["rope_parameters"]


def test_convert_replaces_only_when_told(capsys: Any, model: Path, copy: Path):
    before = (copy / "config.json").read_bytes()
    assert "is not empty; --force" in fail(capsys, "convert", model, copy)
    assert (copy / "config.json").read_bytes() == before
    (copy / "notes.txt").touch()
    assert "notes.txt" in fail(capsys, "convert", model, copy, "--force")
    (copy / "notes.txt").unlink()
    succeed(capsys, "convert", model, copy, "--force", "--dtype", "float16")
    assert {array.dtype.name for array in tensors_of(copy).values()} == {"float16"}


def test_convert_errors(capsys: Any, model: Path, copy: Path, tmp_path: Path):
    same = copy.parent / "." / copy.name
    assert "are the same folder" in fail(capsys, "convert", copy, same, "--force")
    words = ("convert", model, tmp_path / "out", "--rope", "yarn:4", "--condense", "2")
    assert "cannot express it together" in fail(capsys, *words)
    tensors = {**make_weights(), "model.layers.0.extra": np.zeros(1, np.float32)}
    from safetensors.numpy import save_file

    save_file(tensors, copy / "model.safetensors")
    error = fail(capsys, "convert", copy, tmp_path / "out")
    assert "1 unexpected: model.layers.0.extra" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "script"),
    [
        ("model.gguf", "gguf_to_hf.py"),
        ("consolidated.00.pth", "meta_to_hf.py"),
        ("pytorch_model.bin", "pytorch_bin_to_hf.py"),
        ("flax_model.msgpack", "flax_msgpack_to_hf.py"),
    ],
)
@pytest.mark.parametrize("whole", ["file", "folder", "folder with config"])
def test_convert_names_the_script_for_other_formats(
    capsys: Any, tmp_path: Path, file: str, script: str, whole: str
):
    source = tmp_path / "source"
    source.mkdir()
    (source / file).touch()
    if whole == "folder with config":
        (source / "config.json").write_text(json.dumps(CONFIG))
    given = source / file if whole == "file" else source
    error = fail(capsys, "convert", given, tmp_path / "out")
    assert f"convert/{script}" in error and file in error
