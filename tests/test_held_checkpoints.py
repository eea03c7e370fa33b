"""4-bit folders in int4: the file's own integers, scales and zeros, nothing rounded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from int8_helpers import TOKENS, largest_gap, run, unpacked, wide
from model_helpers import assert_equal
from quantized_helpers import (
    AWQ,
    FORMATS,
    GPTQ,
    awq,
    compressed,
    gptq,
    weights,
    write_folder,
)

from jrope.bench.model import tree_bytes
from jrope.cli.loading import Loading
from jrope.errors import JropeError
from jrope.hf.checkpoint import arriving_shapes, load, load_shapes
from jrope.hf.tensors import open_tensors
from jrope.tree import flatten
from jrope.weights.fuse import fuse, unfuse
from jrope.weights.int8 import dequantize, quantization_of, quantize

torch = pytest.importorskip("torch")

NAME = "model.layers.0.self_attn.q_proj"
SCALE = {"gptq": "scales", "awq": "scales", "int4": "weight_scale"}
PLAIN = ("int4-group", "int4-channel", "gptq-sym")  # without zeros
KEPT = [n for n in FORMATS if n.startswith(("int4", "gptq", "awq"))]
WIDE: dict[str, Any] = {  # with float32 scales, whose products nobody rounds again
    "int4": compressed(weights(4, "int", "group"), "pack-quantized", torch.float32),
    "int4 zero": compressed(
        weights(4, "int", "group", False), "pack-quantized", torch.float32
    ),
    "gptq": (GPTQ, partial(gptq, dtype=np.float32)),
    "awq": (AWQ, partial(awq, dtype=np.float32)),
}


@pytest.fixture(scope="module")
def tiny(tiny_hf: Any) -> Any:
    return tiny_hf(layers=1)


@pytest.fixture
def write(tiny: Any, tmp_path: Path) -> Callable[..., Any]:
    """Write a folder of a format; returns it, and the weights there should be."""
    return partial(write_folder, tiny, tmp_path)


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", KEPT)
def test_integers_scales_and_zeros_are_the_files(write: Any, name: str) -> None:
    """Word by word in float64: the format's sum, rounded once to its scale's dtype."""
    folder, want = write(*FORMATS[name])
    params, _ = load(folder, "float32", quantize="int4")
    stored, flat = open_tensors(folder), flatten(params)
    assert quantization_of(params) == "int4"
    for whole in want:
        module = whole.removesuffix(".weight")
        leaves = {n.rpartition(".")[2] for n in flat if n.startswith(f"{module}.")}
        if "_proj" not in whole:
            assert leaves == {"weight"} and flat[whole].dtype == jnp.float32
            np.testing.assert_array_equal(flat[whole], want[whole].float().numpy())
            continue
        assert leaves == {"weight", "scale", *["zero"] * (name not in PLAIN)}
        scale, zero = np.asarray(flat[f"{module}.scale"]), flat.get(f"{module}.zero")
        theirs = stored.raw(f"{module}.{SCALE[name.split('-')[0].split('_')[0]]}")
        theirs = theirs if theirs.shape == scale.shape else theirs.T
        assert scale.dtype == theirs.dtype and np.array_equal(scale, theirs)
        assert flat[whole].dtype == jnp.uint32
        assert zero is None or (zero.dtype == jnp.int8 and zero.shape == scale.shape)
        levels = unpacked(flat[whole], scale.shape[1]).reshape(*scale.shape, -1)
        exact = levels - (0 if zero is None else wide(zero)[..., None])
        exact = (exact * wide(scale)[..., None]).reshape(want[whole].shape)
        own = want[whole].float().numpy()
        np.testing.assert_array_equal(wide(exact.astype(scale.dtype)), wide(own))
    shapes, _ = load_shapes(folder, "float32", quantize="int4")
    assert shapes_of(shapes) == shapes_of(params)
    again = flatten(dequantize(params, scale.dtype))
    for whole in want:
        if "_proj" in whole:
            np.testing.assert_array_equal(
                wide(again[whole]), wide(want[whole].float().numpy())
            )


@pytest.mark.parametrize("name", WIDE)
def test_logits_are_those_of_the_dequantised_weights(write: Any, name: str) -> None:
    folder, _ = write(*WIDE[name])
    plain, config = load(folder, "float32")
    params, _ = load(folder, "float32", quantize="int4")
    assert_equal(dequantize(params), plain)
    joined = fuse(params)
    assert_equal(unfuse(joined, config), params)
    assert_equal(dequantize(joined), fuse(plain))
    want, _ = run(plain, TOKENS, config=config)
    got, _ = run(joined, TOKENS, config=config)
    assert largest_gap(got, want) <= 4e-6
    one, _ = run(joined, TOKENS[:1, :1], config=config)
    assert largest_gap(one, want[:1, :1]) <= 4e-6
    again, _ = run(quantize(plain, "int4"), TOKENS, config=config)
    assert largest_gap(again, want) > 1e-2  # what quantising anew loses


def test_an_embedding_that_a_folder_holds_in_4_bits(write: Any) -> None:
    parts, _ = compressed(weights(4, "int", "group", False), "pack-quantized")[1](
        torch.from_numpy(np.random.default_rng(0).normal(size=(61, 64)).astype("f4"))
    )
    name = "model.embed_tokens"
    tensors = {f"{name}.{leaf}": x for leaf, x in parts.items()}
    how = {"without": [f"{name}.weight"], "tensors": tensors}
    folder, _ = write(*WIDE["int4 zero"], **how)
    params, config = load(folder, "float32", quantize="int4")
    assert flatten(params)[f"{name}.zero"].shape == (61, 2)
    want, _ = run(dequantize(params), TOKENS, config=config)
    assert largest_gap(run(params, TOKENS, config=config)[0], want) <= 4e-6
    outside, _ = run(params, jnp.asarray([[61]]), config=config)
    assert np.isnan(outside).all()


def test_what_arrives_is_counted(write: Any) -> None:
    folder, _ = write(*FORMATS["awq"])
    counted: dict[str, int] = {}
    with Loading(folder, "bfloat16", "int4") as loading:
        params, _ = loading.wait()
        assert loading._bar.done == loading._bar.total
        assert shapes_of(loading.shapes) == shapes_of(params)
    load(folder, "bfloat16", quantize="int4", progress=counted.__setitem__)
    arriving = arriving_shapes(folder, "bfloat16", "int4")
    assert counted == {n: x.size * x.dtype.itemsize for n, x in arriving.items()}
    assert counted == {n: x.nbytes for n, x in flatten(params).items()}
    whole, read = tree_bytes(params)
    assert whole == sum(counted.values())
    assert read == whole - counted["model.embed_tokens.weight"]
    anew, _ = load(folder, "bfloat16", quantize="int8")
    assert quantization_of(anew) == "int8"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "uneven groups": (
        "gptq",
        {
            "tensors": {
                f"{NAME}.g_idx": torch.cat([torch.zeros(8), torch.ones(56)]).int()
            }
        },
        f"{NAME}.weight: g_idx has groups other than of 32 columns; load it without",
    ),
    "zeros of symmetric weights": (
        "gptq-sym",
        {"tensors": {f"{NAME}.qzeros": torch.zeros((2, 8), dtype=torch.int32)}},
        f"{NAME}.weight: sym is true, but zeros are not all 8; load it without",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(write: Any, case: str) -> None:
    form, changes, match = REFUSED[case]
    folder, _ = write(*FORMATS[form], **changes)
    load(folder)
    with pytest.raises(JropeError, match=match):
        load(folder, quantize="int4")


@pytest.mark.parametrize(("group", "where"), [(4, "self_attn.q_"), (64, "mlp.down_")])
def test_groups_that_words_cannot_hold(write: Any, group: int, where: str) -> None:
    """Of less than a word, and some that do not fill a row of 96."""

    def make(weight: Any) -> tuple[dict[str, Any], Any]:
        out, width = weight.shape
        words = torch.zeros((out, width // 8), dtype=torch.int32)
        scale = torch.ones(out, -(-width // group))
        return {"weight_packed": words, "weight_scale": scale}, weight

    fields, _ = compressed(
        {**weights(4, "int", "group"), "group_size": group}, "pack-quantized"
    )
    folder, _ = write(fields, make)
    match = f"got groups of {group} columns in model.layers.0.{where}proj.* want groups"
    for what in (load, load_shapes):
        with pytest.raises(JropeError, match=match):
            what(folder, quantize="int4")


def test_an_adapter_is_refused(write: Any, tmp_path: Path) -> None:
    folder, _ = write(*FORMATS["awq"])
    adapter = tmp_path / "lora"
    with pytest.raises(JropeError, match="adapter cannot change 4-bit weights; leave"):
        load(folder, quantize="int4", adapter=adapter)
