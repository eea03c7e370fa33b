"""Several processes on this host: one model, one answer, one end.

They cost seconds each to start, so that each set of them shows several things.
"""

import json
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import byte_tokenizer, write_tokenizer_config
from jax._src import xla_bridge
from processes_helpers import HOST, ends, error_line, measures, start, tokens

import jrope
from jrope.cli import main
from jrope.errors import JropeError
from jrope.hf import config_from_hf
from jrope.hf.checkpoint import write_folder
from jrope.hf.tensors import open_tensors
from jrope.model.config import parameter_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in two files, with a tokenizer."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("p") / "model"
    shapes = parameter_shapes(config_from_hf(CONFIG))
    arrays = {
        name: (0.3 * random.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    write_folder(folder, CONFIG, arrays.items(), max_shard_size=50_000)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)
    return folder


def stored(folder: Path) -> int:
    slots = open_tensors(folder).slots.values()
    return sum(slot.stop - slot.start for slot in slots)


def check_results(out: Path, count: int, folder: Path, want: dict[str, Any]) -> None:
    for index in range(count):
        got = json.loads((out / f"{index}.json").read_text())
        assert got.pop("hosts") == [HOST] * count
        if count == 4:
            few, saving = got.pop("small mesh"), got.pop("saving")
            assert "model=2 has 2 devices, 4 processes have 4" in few
            assert "cannot save" in saving and "several processes hold them" in saving
        # Each process reads for its own devices; where these are all shares, all.
        part = got.pop("read") / stored(folder)
        assert 0.5 <= part < 0.51 if count == 4 else part == 1
        assert {*got} == {*want}
        for name, value in want.items():
            allowed = 2e-5 if name in ("nll", "queries") else 0
            near = {"rtol": allowed, "atol": allowed, "err_msg": name}
            np.testing.assert_allclose(got[name], value, **near)


def test_four_processes_generate_what_one_does_each_from_its_share(
    folder: Path, tmp_path: Path
) -> None:
    running = start("four", 4, tmp_path, folder)
    want = tokens(*jrope.load(folder))
    for ended in ends(running):
        assert ended.status == 0, ended
    check_results(tmp_path, 4, folder, want)


def test_two_processes_measure_what_one_does_and_the_second_misses_the_first(
    folder: Path, tmp_path: Path
) -> None:
    running = start("two", 2, tmp_path, folder, devices=2)
    want = measures(*jrope.load(folder))
    first, second = ends(running)
    assert first.status == -signal.SIGKILL, first.err
    assert second.status == 2, second
    assert f"jrope: error: process 0 ({HOST}) is gone" in second.err, second.err
    check_results(tmp_path, 2, folder, want)


def test_the_command_prints_in_one_process_what_one_process_prints(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ["generate", folder, "ab", "a longer one", "--max-new-tokens", 5]
    running = start("command", 2, tmp_path, *words, "--mesh", "model=2")
    assert main(list(map(str, words))) == 0
    first, second = ends(running)
    assert (first.status, first.out) == (0, capsys.readouterr().out)
    assert (second.status, second.out, second.err) == (0, "", "")
    for index in range(2):
        read = int((tmp_path / f"{index}.read").read_text())
        assert 0.5 <= read / stored(folder) < 0.51


def test_what_processes_are_given_is_the_same_or_told(
    folder: Path, tmp_path: Path
) -> None:
    words, own = ["generate", folder, "--mesh", "model=2"], [["ab"], ["cd"]]
    ended = ends(start("command", 2, tmp_path, *words, own=own))
    lines = [error_line(one) for one in ended]
    assert lines[0] == lines[1]
    told = f"processes differ from process 0 ({HOST}): process 1 ({HOST}) has arguments"
    assert told in lines[0] and "--mesh model=2 cd --processes 2', not '" in lines[0]


def test_a_file_that_one_host_lacks_is_told_on_all(
    folder: Path, tmp_path: Path
) -> None:
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        host.mkdir()
        copy = host / "model"
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    lacking = sorted((hosts[1] / "model").glob("*.safetensors"))[-1]
    lacking.unlink()
    words = ["generate", "model", "ab", "--mesh", "model=2"]
    for ended in ends(start("command", 2, tmp_path, *words, cwd=hosts)):
        line = error_line(ended)
        assert f"process 1 ({HOST}): " in line and lacking.name in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host", 2, 0), "coordinator: got 'host', want HOST:PORT"),
        (("host:0", 2, 0), "coordinator: got 'host:0', want HOST:PORT"),
        (("host:1", 2, 2), "process: got 2 of 2, want 0 to 1"),
        (("host:1", 2, None), "processes: index missing; give all three"),
        ((), "found neither SLURM, Open MPI, Kubernetes nor a TPU pod; give the coord"),
    ],
)
def test_processes_that_cannot_join_are_refused(
    given: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    with pytest.raises(JropeError, match=message):
        jrope.processes(*given)


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(JropeError, match=f"port {port} of this host, .* in use"):
            jrope.processes(f"127.0.0.1:{port}", 2, 0)


def test_a_dead_process_is_named_though_nothing_waits_for_it(tmp_path: Path) -> None:
    first, second = ends(start("idle", 2, tmp_path))
    assert second.status == -signal.SIGKILL
    assert first.status == 2
    assert f"jrope: error: process 1 ({HOST}) is gone" in first.err


def test_a_coordinator_that_is_not_there_is_named_in_time(tmp_path: Path) -> None:
    (ended,) = ends(start("alone", 1, tmp_path))
    line = error_line(ended._replace(err=ended.err))
    assert f"process 1 ({HOST}): no coordinator at 127.0.0.1:" in line
    assert "within 2 s (Connection refused)" in line
