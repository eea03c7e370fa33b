"""The benchmark: its counts, its report, and the structure that speed rests on.

Nothing here is timed against a limit: machines are busy.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrope import bench_runs, bench_versus
from jrope.bench import Plan
from jrope.bench_device import Ceilings, Kernel, measure_ceilings, top_kernels
from jrope.bench_model import (
    SHAPES,
    Weights,
    cache_bytes,
    first_layers,
    named_shape,
    prefill_flops,
    random_params,
    read_weights,
    step_bytes,
    weight_count,
    with_layers,
)
from jrope.bench_report import Report, Row
from jrope.bench_runs import Decode, Prefill, in_turns
from jrope.bench_versus import Peer
from jrope.checkpoint import save
from jrope.cli import bench, common, main
from jrope.config import flatten
from jrope.errors import JropeError
from jrope.generate import decode, generate, prefill
from jrope.model import forward
from jrope.sample import Sampler

CEILINGS = Ceilings(read=1e9, matmul=1e12, transfer=None)


def tiny(layers=2, **fields):
    """V 50, D 8, F 12, N 2, K 1, H 4, two layers, not tied."""
    small = dict(
        vocab_size=50, hidden_size=8, intermediate_size=12, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=layers,
    )  # fmt: skip
    config = named_shape("llama3-8b")
    rope = dataclasses.replace(config.rope, rotary_dim=4)
    return dataclasses.replace(config, **{**small, "rope": rope, **fields})


def middling(dtype, layers=4):
    """Weights of 7 MB or more a layer beside activations of kilobytes; and params."""
    config = dataclasses.replace(
        with_layers(named_shape("smollm2-135m"), layers), vocab_size=8192
    )
    return config, random_params(config, jnp.dtype(dtype))


# counts


def test_counts_of_a_tiny_model_are_those_by_hand():
    config = tiny()
    attention = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8  # q, k, v, o
    layer = attention + 3 * 8 * 12
    norms = 2 * 2 * 8 + 8
    assert weight_count(config) == 2 * layer + norms + 2 * 50 * 8
    assert read_weights(config) == 2 * layer + norms + 50 * 8
    slots = 2 * 2 * 1 * 4 * 10  # keys and values, layers, K, H, slots
    assert cache_bytes(config, 10, 2) == slots * 2
    assert step_bytes(config, 10, 2) == (read_weights(config) + slots) * 2
    # per row: matrices, scores and weighted sums of half the square, one token's head
    row = 2 * (2 * layer) * 6 + 2 * (2 * 2 * 8 * 6 * 6) // 2 + 2 * 50 * 8
    assert prefill_flops(config, 3, 6) == 3 * row


def test_tied_head_is_read():
    config = tiny(tie_word_embeddings=True)
    assert read_weights(config) == weight_count(config) == read_weights(tiny())


def test_counts_of_llama3_8b_are_the_known_ones():
    config = named_shape("llama3-8b")
    assert weight_count(config) == 8_030_261_248
    assert round(weight_count(config) * 2 / 1e9, 2) == 16.06
    assert round(read_weights(config) * 2 / 1e9, 2) == 15.01
    assert cache_bytes(config, 1, 2) == 131072


def test_counts_of_llama2_7b_are_the_known_ones():
    assert weight_count(named_shape("llama2-7b")) == 6_738_415_616


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_arrays(name):
    config = with_layers(named_shape(name), 1)
    config = dataclasses.replace(
        config, vocab_size=16, hidden_size=32, intermediate_size=24
    )
    leaves = jax.tree.leaves(random_params(config, jnp.bfloat16))
    assert weight_count(config) == sum(leaf.size for leaf in leaves)


def test_unknown_shapes_and_layers_are_refused():
    with pytest.raises(JropeError, match="want one of llama2-7b"):
        named_shape("llama9")
    with pytest.raises(JropeError, match="got 3, want 1 to 2"):
        with_layers(tiny(), 3)


def test_random_weights_are_neither_zero_nor_equal():
    params = flatten(random_params(tiny(), jnp.bfloat16))
    for name, array in params.items():
        values = np.asarray(array, np.float32)
        if values.ndim == 1:
            assert (values == 1).all(), name
        else:
            assert len(np.unique(values)) > 8, name
            assert 0 < np.abs(values).max() <= 0.0201, name


# arrangements


@pytest.mark.parametrize("keep", [False, True])
def test_weights_are_the_same_in_every_arrangement(keep):
    config, tokens = tiny(), jnp.arange(6, dtype=jnp.int32)[None]
    want = forward(random_params(config, jnp.float32), tokens, config=config)[0]
    weights = Weights(random_params(config, jnp.float32), config, keep=keep)
    for order in ("none", "out_in", "in_out", "none", "in_out", "out_in"):
        tree = weights.arranged(order)
        layer = tree["model"]["layers"]["0"]
        assert ("qkv_proj" in layer["self_attn"]) == (order != "none")
        assert ("kernel" in layer["mlp"]["down_proj"]) == (order == "in_out")
        got = forward(tree, tokens, config=config)[0]
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_only_one_arrangement_is_kept():
    params = random_params(tiny(), jnp.float32)
    weights = Weights(params, tiny())
    weights.arranged("out_in")
    assert params["model"]["layers"] == {}
    kept = random_params(tiny(), jnp.float32)
    Weights(kept, tiny(), keep=True).arranged("out_in")
    assert len(kept["model"]["layers"]) == 2


def test_plan_keeps_arrangements_together():
    plan = Plan(samplers={}, batches=(8, 1, 32), contexts=(16, 8))
    tasks = plan.tasks()
    orders = [task.order for task in tasks]
    assert orders == ["out_in"] * 2 + ["in_out"] * 10
    assert all(t.batch == 1 and t.work == "decode" for t in tasks[:2])
    plan = dataclasses.replace(plan, order="none")
    assert {task.order for task in plan.tasks()} == {"none"}


# measuring


def test_ceilings_are_rates():
    got = measure_ceilings(
        jnp.dtype("float32"), size=2**20, products=((64, 32, 16),), repeats=2
    )
    assert got.read > 0
    assert got.matmul > 0
    assert got.transfer is None  # the host's memory is the device's


def test_better_ceilings_are_the_higher_of_each():
    other = Ceilings(read=2e9, matmul=1e11, transfer=5.0)
    best = CEILINGS.better_of(other)
    assert best == Ceilings(read=2e9, matmul=1e12, transfer=5.0)
    assert CEILINGS.better_of(CEILINGS) == CEILINGS


def test_higher_ceilings_lower_the_parts():
    row = blank(seconds=0.5, counted=10**9, of_ceiling=2.0)
    report = make_report(rows=(row, blank(problem="no")))
    again = report.with_ceilings(Ceilings(read=4e9, matmul=1e12, transfer=None))
    assert again.ceilings.read == 4e9
    assert again.rows[0].of_ceiling == 0.5
    assert again.rows[1] == report.rows[1]


def test_turns_are_taken_and_the_first_is_not_counted():
    order, clock = [], iter(range(100))

    def runner(name):
        def run():
            order.append(name)
            return float(next(clock))

        return run

    times, problems = in_turns({"a": runner("a"), "b": runner("b")}, 2, 60)
    assert order == ["a", "b"] * 3
    assert times == {"a": [2.0, 4.0], "b": [3.0, 5.0]}
    assert problems == {}


def test_compiled_peers_warm_up_longer():
    calls = []
    runners = {bench_versus.COMPILED: lambda: calls.append(1) or 1.0}
    times, _ = in_turns(runners, 2, 60)
    assert len(calls) == 5
    assert len(times[bench_versus.COMPILED]) == 2


def test_who_fails_is_out_and_the_rest_goes_on():
    calls = []

    def failing():
        calls.append(1)
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 GB")

    times, problems = in_turns({"a": failing, "b": lambda: 1.0}, 3, 60)
    assert times == {"b": [1.0] * 3}
    assert len(calls) == 1
    assert problems["a"].startswith("out of memory: ")
    assert "\n" not in problems["a"]


def test_patience_ends_after_one_round():
    times, _ = in_turns({"a": lambda: 1.0}, 50, 0.0)
    assert len(times["a"]) == 1


def test_what_does_not_fit_says_the_numbers(monkeypatch):
    monkeypatch.setattr(bench_runs, "memory_limit", lambda: 10**9)
    bench_runs.check_fits(10**9, "x")
    with pytest.raises(JropeError, match=r"takes 2\.50 GB, the device has 1\.00"):
        bench_runs.check_fits(2_500_000_000, "the program takes")
    monkeypatch.setattr(bench_runs, "memory_limit", lambda: None)
    bench_runs.check_fits(10**18, "x")


# the structure that speed rests on


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order, batch", [("out_in", 1), ("out_in", 2), ("in_out", 2)])
def test_decode_copies_no_weights(dtype, order, batch):
    config, params = middling(dtype)
    tree = Weights(params, config).arranged(order)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(tree)]
    program = Decode(tree, config, np.full(batch, 32), 4, 64).program
    assert program.temp < max(sizes) / 2, "not even one matrix twice"
    assert sum(sizes) > 10 * program.temp


def test_decode_writes_into_the_cache_it_is_given():
    """No second cache: temporaries are one layer's at most, however many there are.

    In float32: XLA's CPU backend, not its others, holds a 16-bit cache widened.
    """
    temps = []
    for layers in (2, 6):
        config, params = middling("float32", layers=layers)
        loop = Decode(params, config, np.full(2, 32), 4, 512)
        assert loop.program.alias >= cache_bytes(config, 2 * 512, 4)
        temps.append(loop.program.temp)
    layer = cache_bytes(config, 2 * 512, 4) / 6
    assert temps[1] - temps[0] < layer
    old = loop.cache.keys[0]
    loop.run(Sampler())
    assert old.is_deleted()


def test_sizes_of_a_decode_do_not_grow_with_the_tokens():
    config, params = middling("float32", layers=1)
    temps = [Decode(params, config, np.full(1, 32), n, 64).program.temp for n in (2, 9)]
    assert abs(temps[1] - temps[0]) < 4096


def test_prefill_has_no_square_of_the_prompt():
    config, params = middling("float32", layers=1)
    count = 4096
    program = Prefill(params, config, 1, count, count).program
    square = 4 * count * count
    all_heads = config.num_attention_heads * square
    assert program.temp < all_heads / 4
    half = Prefill(params, config, 1, count // 2, count // 2).program
    assert program.temp < 2.5 * half.temp, "linear in the prompt, not quadratic"


def test_requests_of_one_bucket_compile_once():
    config = tiny()
    params = random_params(config, jnp.float32)
    key, before = jax.random.key(0), (prefill._cache_size(), decode._cache_size())
    for count, new, sampler in [
        (5, 3, Sampler()),
        (16, 9, Sampler(temperature=0.5)),
        (9, 16, Sampler(temperature=2.0, top_p=0.3, top_k=4)),
    ]:
        prompt = np.ones((1, count), np.int32)
        options = {"sampler": sampler, "key": key, "max_new_tokens": new}
        generate(params, prompt, config=config, **options)
    after = (prefill._cache_size(), decode._cache_size())
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


def test_bench_compiles_a_shape_once_for_all_samplers(monkeypatch, capsys):
    made = []
    program = bench_runs.Program

    class Counted(program):
        def __init__(self, function, *args, **static):
            made.append(function.__name__)
            super().__init__(function, *args, **static)

    monkeypatch.setattr(bench_runs, "Program", Counted)
    assert run("--only", "decode", "--batch", "1,2", "--top-p", "0.9") == 0
    assert made == ["decode", "decode"]
    assert capsys.readouterr().out.count("p=0.9") >= 2


def test_decode_runs_are_alike():
    config, params = middling("float32", layers=1)
    loop = Decode(params, config, np.array([4, 9]), 3, 16)
    for _ in range(3):
        assert loop.run(Sampler()) > 0
        assert np.asarray(loop.cache.lengths).tolist() == [7, 12]


# the command


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings of a moment, environment as it was."""

    def ceilings(dtype):
        products = ((32, 32, 32),)
        return measure_ceilings(dtype, size=2**18, products=products, repeats=1)

    monkeypatch.setattr(bench, "measure_ceilings", ceilings)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")


def run(*words):
    base = ["--shape", "smollm2-135m", "--layers", "1", "--context", "64"]
    return main(["bench", *base, "--new", "4", "--repeat", "1", *words])


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


def test_counted_is_what_the_functions_count(capsys):
    assert run("--batch", "2", "--json", "-", "--capacity-factor", "4") == 0
    prompt, step = json.loads(capsys.readouterr().out)["rows"]
    config = with_layers(named_shape("smollm2-135m"), 1)
    assert prompt["counted"] == prefill_flops(config, 2, 64)
    assert step["counted"] == step_bytes(config, 2 * 48 + 2 * 2, 2)
    assert step["capacity"] == 4 * (64 + 16)


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
    rope = json.loads(capsys.readouterr().out)["config"]["rope"]
    assert "Linear" in rope["scaling"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "either a FOLDER or --shape"),
        (["x", "--shape", "llama3-8b"], "either a FOLDER or --shape"),
        (["--shape", "llama9"], "invalid choice: 'llama9'"),
        (["--shape", "llama3-8b", "--batch", "0"], "--batch: '0' is not a whole"),
        (["--shape", "llama3-8b", "--batch", "1,"], "--batch: '' is not a whole"),
        (["--shape", "llama3-8b", "--context", "2m"], "--context: '2m' is not"),
        (["--shape", "llama3-8b", "--top-p", "1.5"], "top_p is 1.5"),
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


def test_caches_too_large_are_rows_with_the_numbers(monkeypatch, capsys):
    monkeypatch.setattr(bench_runs, "memory_limit", lambda: 2 * 10**8)
    assert run("--only", "decode", "--context", "64,256k", "--json", "-") == 1
    good, bad = json.loads(capsys.readouterr().out)["rows"]
    assert good["problem"] is None
    assert "too large: weights 0.06 + cache 0.20 GB" in bad["problem"]
    assert bad["seconds"] is None


def test_failing_shape_is_a_row_and_the_rest_goes_on(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("INTERNAL: no such kernel")

    monkeypatch.setattr("jrope.bench.Prefill", fail)
    assert run("--json", "-") == 1
    captured = capsys.readouterr()
    step, prompt = json.loads(captured.out)["rows"]
    assert step["problem"] is None
    assert prompt["problem"] == "failed: RuntimeError: INTERNAL: no such kernel"
    assert "no such kernel" in captured.err


def test_busy_hosts_are_told(capsys):
    busy = dataclasses.replace(make_report(), busy=2.0)
    assert any(line.startswith("BUSY: the host had 2.0") for line in busy.head())
    idle = dataclasses.replace(busy, busy=0.1)
    assert not any("BUSY" in line for line in idle.head())


def test_profile_says_why_a_cpu_has_no_kernels(tmp_path, capsys):
    folder = tmp_path / "traces"
    assert run("--only", "decode", "--profile", str(folder)) == 0
    assert "no kernel table: the trace holds no kernels" in capsys.readouterr().out
    assert list(folder.glob("decode-greedy-b1-c64/**/*.xplane.pb"))


def test_profile_without_a_trace_says_so(tmp_path):
    with pytest.raises(JropeError, match="no trace was written"):
        top_kernels(str(tmp_path), 1)


class Fake(dict):
    """Attributes from a dictionary, as ProfileData has them."""

    __getattr__ = dict.__getitem__


def test_kernels_are_summed_over_streams_only(tmp_path, monkeypatch):
    def event(name, us):
        return Fake(name=name, duration_ns=us * 1e3)

    stream = Fake(name="Stream #7", events=[event("a", 4), event("b", 1)])
    again = Fake(name="Stream #8(Memcpy)", events=[event("a", 6)])
    modules = Fake(name="XLA Modules", events=[event("all", 99)])
    planes = [
        Fake(name="/host:CPU", lines=[modules]),
        Fake(name="/device:GPU:0", lines=[stream, modules, again]),
    ]
    (tmp_path / "x.xplane.pb").write_bytes(b"")
    reader = Fake(from_file=lambda _: Fake(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", reader)
    assert top_kernels(str(tmp_path), 2) == [
        Kernel(name="a", microseconds=5.0, launches=1.0),
        Kernel(name="b", microseconds=0.5, launches=0.5),
    ]


def blank(**fields):
    return Row(
        work="decode", by="jrope", sampler="greedy", order="out_in", batch=1,
        context=8, capacity=16, new=4, **fields,
    )  # fmt: skip


def make_report(rows=()):
    return Report(
        model="m", dtype="bfloat16", config=tiny(), command=("jrope",),
        ceilings=CEILINGS, rows=rows,
    )  # fmt: skip


def test_lines_hold_kernels_and_ratios():
    kernel = Kernel(name="gemm", microseconds=3.0, launches=2.0)
    known = dict(
        seconds=0.001, spread=0.01, tokens_per_second=1000.0, counted=10**6,
        of_ceiling=0.5, compile_seconds=1.0, kernels=(kernel,), ratio=2.5,
    )  # fmt: skip
    lines = blank(**known).lines()
    assert "1.000 ms" in lines[0]
    assert "50.0%" in lines[0]
    assert "2.50x" in lines[0]
    assert "3.0 us, 2.0 launches" in lines[1]
    assert "100.0%" in lines[2]
    assert blank(problem="too large").lines()[0].endswith("too large")


# beside transformers


def tiny_peer(dtype, **fields):
    config = tiny(**fields)
    params = random_params(config, dtype)
    return Peer(params, config), params, config


@pytest.mark.parametrize("tied", [False, True])
def test_peer_is_the_same_model_in_the_same_memory(tied):
    import torch

    torch.set_num_threads(1)
    peer, params, config = tiny_peer(jnp.float32, tie_word_embeddings=tied)
    ids = np.random.default_rng(0).integers(0, 50, (2, 9), np.int32)
    with torch.no_grad():
        theirs = peer.model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    ours, _ = forward(params, jnp.asarray(ids), config=config)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    lent = dict(peer.model.named_parameters())
    for name, array in flatten(params).items():
        assert lent[name].data_ptr() == array.unsafe_buffer_pointer(), name


def test_peer_decodes_as_many_tokens_as_it_is_asked(monkeypatch):
    peer, _, _ = tiny_peer(jnp.bfloat16, eos_token_id=tuple(range(50)))
    seen = []
    generate = peer.model.generate

    def watched(ids, **options):
        seen.append(generate(ids, **options))
        return seen[-1]

    monkeypatch.setattr(peer.model, "generate", watched)
    sampler = Sampler(temperature=0.8, top_p=0.9)
    assert peer.decode(2, 5, 3, sampler, bench_versus.EAGER)() > 0
    assert seen[0].shape == (2, 5 + 1 + 3)
    assert peer.prefill(2, 5)() > 0


def test_versus_puts_transformers_beside_every_row(capsys):
    words = ("--versus", "transformers", "--batch", "2", "--json", "-")
    assert run(*words) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    rows = report["rows"]
    assert [r["by"] for r in rows] == ["jrope", "transformers"] * 2
    for own, other in zip(rows[::2], rows[1::2], strict=True):
        assert other["ratio"] == pytest.approx(other["seconds"] / own["seconds"])
        assert own["context"] == other["context"] == 64  # none is ragged
        assert own["counted"] == other["counted"]
    assert {"torch", "transformers"} <= {*report["versions"]}
    assert "jrope is" in captured.err


def test_versus_without_torch_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run("--versus", "transformers") == 2
    assert "needs torch" in capsys.readouterr().err


def test_torch_is_left_alone_without_versus():
    code = (
        "import sys, jrope.cli.bench;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_memory_is_shared_only_beside_torch(monkeypatch):
    for name in ("PREALLOCATE", "MEM_FRACTION"):
        monkeypatch.delenv(f"XLA_PYTHON_CLIENT_{name}")
    bench._prepare_memory(False)
    assert bench.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in bench.os.environ
    bench._prepare_memory(True)
    assert bench.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_first_layers_are_the_first():
    params = random_params(tiny(layers=3), jnp.float32)
    got = first_layers(params, 2)
    assert {*got["model"]["layers"]} == {"0", "1"}
    assert got["lm_head"] is params["lm_head"]
