"""`jrope bench --mesh`: a mesh beside one of its devices."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import CEILINGS
from cli_helpers import fail
from sharding_helpers import CONFIG

import jrope
from jrope.bench import model
from jrope.bench.model import SHAPES, Weights, prefill_flops, random_params
from jrope.bench.share import Side, check_sizes, one_device
from jrope.cli import bench, main
from jrope.errors import JropeError
from jrope.model.placed import layout_on
from jrope.sharding.meshes import layout_of
from jrope.tree import Tree, flatten

SHAPE = (64, 32, 48, 1, 4, 2, 8, 1e4, False)  # V, D, F, L, N, K, H, theta, tied
WORDS = ["bench", "--shape", "smollm2-135m", "--context", "8", "--new", "4"]
WORDS += ["--repeat", "1", "--batch", "4"]


@pytest.fixture(scope="module", autouse=True)
def small() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "smollm2-135m", SHAPE)
        patch.setattr(bench, "measure_ceilings", lambda _: CEILINGS)
        patch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "report.json"
    words = ["--mesh", "data=2,model=2", "--dtype", "float32", "--only", "decode"]
    assert main([*WORDS, *words, "--json", str(file)]) == 0
    return json.loads(file.read_text("utf-8"))


def row(report: dict[str, Any], work: str, *more: str) -> dict[str, Any]:
    by = ", ".join(("jrope", *more))
    (found,) = (r for r in report["rows"] if (r["work"], r["by"]) == (work, by))
    return found


def test_a_mesh_takes_turns_with_one_of_its_devices(report: dict[str, Any]) -> None:
    assert report["model"]["mesh"] == "data=2,model=2"
    assert len(report["rows"]) == 2
    own, one = row(report, "decode"), row(report, "decode", "one device")
    assert one["ratio"] == pytest.approx(one["seconds"] / own["seconds"])
    assert own["memory_bytes"] < one["memory_bytes"]
    for each in (own, one):
        assert each["tokens_per_second"] == pytest.approx(4 / each["seconds"])
        assert (each["batch"], each["problem"]) == (4, None)


def test_a_device_counts_its_part(report: dict[str, Any]) -> None:
    # by hand: head, q, o, gate, up, down and k, v are halved, norms are not
    split, norms = 64 * 32 + 2 * 32 * 32 + 3 * 32 * 48 + 2 * 16 * 32, 3 * 32
    slots = 4 * 6 + 4 * 4 // 2  # four rows, six filled of the mean, two new
    cache = 2 * 2 * 8 * slots
    own, one = row(report, "decode"), row(report, "decode", "one device")
    assert one["counted"] == 4 * (split + norms + cache)
    assert own["counted"] == 4 * (split // 2 + norms + cache // 4)


def test_one_device_without_room_is_a_row(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jrope.bench.plan.one_device", lambda _: "too large: 9 GB")
    words = ["--mesh", "context=2,model=2", "--quantize", "int8", "--only", "prefill"]
    assert main([*WORDS, *words, "--json", "-"]) == 1
    out = json.loads(capsys.readouterr().out)
    assert row(out, "prefill")["problem"] is None
    assert row(out, "prefill", "one device")["problem"] == "too large: 9 GB"


@pytest.fixture(scope="module")
def made() -> Tree:
    there = layout_on(jrope.mesh("fsdp=2,model=4"), CONFIG)
    return random_params(CONFIG, jnp.bfloat16, "int8", there)


def test_random_weights_are_those_of_one_device(made: Tree) -> None:
    assert layout_of(made) == layout_on(jrope.mesh("fsdp=2,model=4"), CONFIG)
    want = flatten(random_params(CONFIG, jnp.bfloat16, "int8"))
    for name, x in flatten(made).items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(want[name]), name)
        assert len(x.sharding.device_set) == 8


def test_no_device_makes_them_whole() -> None:
    there = layout_on(jrope.mesh("fsdp=2,model=4"), CONFIG)
    shape, name = (64, 32), "model.embed_tokens.weight"
    how = {"shape": shape, "spread": 0.1, "dtype": jnp.dtype("bfloat16")}
    spec = there.specs({name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)})[name]
    given = 0, model._noise, tuple(how.items()), (there.sharding(spec),)
    text = model._made_there.lower(*given).compile().as_text()
    assert "u32[16,16]" in text and "[64,32]" not in text


def first_device(tree: Tree) -> dict[str, int]:
    """The bytes of each parameter on the first device."""
    first = jax.devices()[0]
    return {
        name: shard.data.nbytes
        for name, x in flatten(tree).items()
        for shard in x.addressable_shards
        if shard.device == first
    }


def test_a_share_is_what_stands_there_and_a_step_reads_gathered_weights(
    made: Tree,
) -> None:
    share = Side(Weights(made, CONFIG), CONFIG).share
    assert share.held == sum(first_device(made).values())
    gathered = first_device(jrope.shard(made, jrope.mesh("model=4"), CONFIG))
    del gathered["model.embed_tokens.weight"]
    assert share.read == sum(gathered.values()) > share.held
    # 8 rows in 2 parts, 2 of 8 key/value heads of 8 elements, bfloat16
    assert share.cache_bytes(8, 100) == 2 * 2 * 8 * 2 * 4 * 100
    assert share.prompt_flops(8, 12) == prefill_flops(CONFIG, 8, 12) // 8


def test_one_device_holds_the_whole_model_beside_its_share(
    made: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = Side(Weights(made, CONFIG), CONFIG)
    alone = one_device(side)
    assert isinstance(alone, Side) and alone.layout is None
    whole = sum(first_device(alone.weights.arranged("none")).values())
    assert alone.share.held == whole
    cache = side.share.cache_bytes(8, 100) + alone.share.cache_bytes(8, 100)
    limit = "jrope.bench.runs.memory_limit"
    monkeypatch.setattr(limit, lambda: whole + side.share.held + cache - 1)
    check_sizes([alone.share], 8, 100)
    with pytest.raises(JropeError, match=r"too large: weights 0.00 \+ cache 0.00 GB"):
        check_sizes([alone.share, side.share], 8, 100)
    monkeypatch.setattr(limit, lambda: whole + side.share.held - 1)
    assert "whole weights beside a share of them are" in str(one_device(side))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "model=4"], "does not divide num_key_value_heads 2 over model=4"),
        (["--mesh", "data=8"], "does not divide 4 rows over data=8"),
        (["--mesh", "model=2", "--speculate", "prompt"], "--speculate runs on one"),
        (["--mesh", "model=2", "--versus", "transformers"], "--versus runs on one"),
    ],
)
def test_what_cannot_be_is_one_line(
    capsys: Any, words: list[str], message: str
) -> None:
    assert message in fail(capsys, *WORDS, *words)
