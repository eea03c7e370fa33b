"""In-place test-time training: the paper's loop over pieces, and what must not leak."""

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrope
from jrope.model.layers import mlp
from jrope.model.llama import unembed
from jrope.rope import Rope

pytest.importorskip("optax")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "models" / "jrope-tiny"
if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not beside the tests", allow_module_level=True)

CHUNK, COUNT, ETA = 4, 14, 0.5  # three pieces and a tail of two tokens
CONFIG = jrope.LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=16,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    initializer_range=0.3,
    rope=Rope(theta=10000.0, rotary_dim=8),
    bos_token_id=0,
    eos_token_id=(1,),
    pad_token_id=None,
)
TOKENS = np.random.default_rng(0).integers(0, 32, (2, COUNT)).astype(np.int32)


@pytest.fixture(autouse=True, scope="module")
def import_path() -> Iterator[None]:
    """Examples import each other by name, as scripts of one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield


@pytest.fixture(scope="module")
def ttt(import_path: None) -> ModuleType:
    return importlib.import_module("in_place_ttt")


@pytest.fixture(scope="module")
def params(ttt: ModuleType) -> Any:
    """A model whose first layer is fast, with a kernel of zeros."""
    base = jrope.init_params(jax.random.key(0), CONFIG)
    return ttt.add_fast(base, CONFIG, every=2, proj=1)


@pytest.fixture(scope="module")
def taught(params: Any) -> Any:
    """The same with a kernel and a P of random numbers."""
    random, flat = np.random.default_rng(1), jrope.tree.flatten(params)
    for name, leaf in flat.items():
        if "ttt_" in name:
            flat[name] = jnp.asarray(
                0.4 * random.standard_normal(leaf.shape, np.float32)
            )
    return jrope.tree.nest(flat)


@pytest.fixture(scope="module")
def fast(ttt: ModuleType) -> Any:
    return ttt.FastMLP(chunk=CHUNK, eta=ETA)


@pytest.fixture(scope="module")
def layer(taught: Any, fast: Any) -> Any:
    """The fast layer's MLP as a compiled function of x [2, T, D]."""
    weights = taught["model"]["layers"]["0"]
    return jax.jit(partial(fast, weights, config=CONFIG))


@pytest.fixture(scope="module")
def states(fast: Any) -> Any:
    """states(params, tokens): the whole model's, [B, T, D]."""
    run = jax.jit(partial(jrope.hidden_states, config=CONFIG, mlp=fast))
    return lambda params, tokens: np.asarray(run(params, tokens)[0])


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((2, COUNT, 16), np.float32)


def loop(weights: Any, x: np.ndarray, chunk: int, eta: float) -> np.ndarray:
    """One row [T, D], float64, from arXiv:2604.06169: predict a piece, then update."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    block, norm = wide["mlp"], wide["post_attention_layernorm"]["weight"]
    h = norm * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps)
    gate, up = (h @ block[name]["weight"].T for name in ("gate_proj", "up_proj"))
    z, w = gate / (1 + np.exp(-gate)) * up, block["down_proj"]["weight"].copy()
    kernel, proj = block["ttt_conv"]["weight"], block["ttt_proj"]["weight"]
    y = np.zeros_like(x)
    for a in range(0, len(x), chunk):
        b = min(a + chunk, len(x))
        y[a:b] = z[a:b] @ w.T
        if b - a < chunk:
            continue
        v = np.zeros((chunk, x.shape[1]))
        for t in range(a, b):
            for k in range(5):
                if a <= t + k - 2 < b:
                    v[t - a] += kernel[:, k] * h[t + k - 2]
        w += eta * (v @ proj).T @ z[a:b]
    return y


def test_equals_a_loop_over_pieces(taught: Any, layer: Any, x: np.ndarray) -> None:
    """A matrix for each row, from W_0 on; float32 sums of D, F, D and C terms."""
    weights, got = taught["model"]["layers"]["0"], layer(x)
    want = np.stack([loop(weights, row.astype(np.float64), CHUNK, ETA) for row in x])
    terms = 3 * CONFIG.hidden_size + 2 * CONFIG.intermediate_size + COUNT
    np.testing.assert_allclose(got, want, atol=terms * 2**-24 * np.abs(want).max())
    plain = np.asarray(mlp(weights, jnp.asarray(x), config=CONFIG))
    learnt = np.abs(got - plain).max(axis=(0, 2)) / np.abs(plain).max()
    assert learnt[:CHUNK].max() < 1e-6 and learnt[CHUNK:].min() > 1e-2


def test_an_update_is_of_whole_pieces_and_for_those_after(
    layer: Any, x: np.ndarray
) -> None:
    """Which outputs feel an input: its own, and those of later pieces.

    The first token of a piece lies within the reach of the kernel at the end of the
    piece before, and the tail, shorter than a piece, teaches nothing.
    """
    before = np.asarray(layer(x))
    for at in range(COUNT):
        changed = x.copy()
        changed[:, at] += 1
        felt = (np.asarray(layer(changed)) != before).any(axis=(0, 2))
        after = (at // CHUNK + 1) * CHUNK
        want = [t == at or t >= after for t in range(COUNT)]
        np.testing.assert_array_equal(felt, want, err_msg=str(at))


def test_texts_shorter_than_a_piece_are_plain(
    taught: Any, layer: Any, x: np.ndarray
) -> None:
    weights, short = taught["model"]["layers"]["0"], x[:, : CHUNK - 1]
    want = mlp(weights, jnp.asarray(short), config=CONFIG)
    np.testing.assert_allclose(layer(short), want, atol=3e-6)


def test_an_untrained_model_is_its_base(
    ttt: ModuleType, params: Any, fast: Any, states: Any
) -> None:
    """Bit for bit; and the score is that of the logits."""
    logits, _ = jax.jit(partial(jrope.forward, config=CONFIG))(params, TOKENS)
    got = unembed(params, jnp.asarray(states(params, TOKENS)), config=CONFIG)
    np.testing.assert_array_equal(got, logits)
    got = ttt.score(params, TOKENS, config=CONFIG, mlp=fast)
    log_p = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    want = np.take_along_axis(log_p, TOKENS[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_later_token_leaves_earlier_bits_and_rows(taught: Any, states: Any) -> None:
    before, changed = states(taught, TOKENS), TOKENS.copy()
    changed[1, 9] = (changed[1, 9] + 1) % 32
    after = states(taught, changed)
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1, :9], before[1, :9])
    assert (after[1, 9:] != before[1, 9:]).any(axis=1).all()


def test_a_row_alone_is_the_row_in_a_batch(taught: Any, states: Any) -> None:
    together = states(taught, TOKENS)
    alone = np.concatenate([states(taught, row[None]) for row in TOKENS])
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_gradients_reach_kernel_and_projection(
    params: Any, taught: Any, fast: Any, x: np.ndarray
) -> None:
    """P has one as soon as the kernel is not zero; layers without them are plain."""

    @jax.jit
    def gradient(weights: Any) -> Any:
        run = partial(fast, x=x, config=CONFIG)
        return jax.grad(lambda weights: jnp.sum(run(weights) ** 2))(weights)

    first, later = (
        gradient(p["model"]["layers"]["0"])["mlp"] for p in (params, taught)
    )
    assert jnp.any(first["ttt_conv"]["weight"] != 0, axis=0).all()
    assert not jnp.any(first["ttt_proj"]["weight"])
    assert jnp.any(later["ttt_conv"]["weight"] != 0, axis=0).all()
    assert jnp.any(later["ttt_proj"]["weight"] != 0)
    assert "ttt_conv" not in params["model"]["layers"]["1"]["mlp"]


def test_positions_of_a_window_s_nats(ttt: ModuleType) -> None:
    """Column t is about the token at position t + 1; the last span may be short."""
    nats = np.arange(1, 20, dtype=np.float32)[None]  # of the tokens 1 to 19
    found = ttt.by_position(nats, 4)
    assert [*found] == ["0-4", "4-8", "8-16", "16-20"]
    want = [2.0, 5.5, 11.5, 17.5]
    np.testing.assert_allclose(np.concatenate([*found.values()]), want)


def test_example_prints_the_table(
    ttt: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = jrope.load(MODEL)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = dataclasses.replace(config, num_hidden_layers=1, **sizes)
    params = jrope.init_params(jax.random.key(0), config)
    files = sorted(MODEL.glob("tokenizer*"))
    folder = jrope.save(tmp_path / "toy", params, config, extra_files=files)
    words = [str(folder), "--rope", "yarn:4", "--steps", "2", "--batch", "2"]
    words += ["--chunk", "16", "--rate", "1e-2", "--out", str(tmp_path / "out.json")]
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes int and float
        assert ttt.main(words) == 0
    out = capsys.readouterr().out
    nats = json.loads((tmp_path / "out.json").read_text())["nats"]
    print(out)
    assert [*nats] == ["base, tuned alike", "fast weights", "fast weights, not updated"]
    for name, row in nats.items():
        assert [*row] == ["0-32", "32-64", "64-128"]
        shown = " | ".join(f"{np.exp(np.mean(x)):.2f}" for x in row.values())
        assert f"| {name} | {shown} |" in out
    fast, off = nats["fast weights"], nats["fast weights, not updated"]
    assert all(fast[span] != off[span] for span in fast)
    gains = re.findall(r"nats gained by updating \| (.*) \|", out)[0].split(" | ")
    want = np.mean(np.subtract(off["64-128"], fast["64-128"]))
    assert float(gains[-1].split()[0]) == pytest.approx(want, abs=6e-5)


def test_bad_input_is_one_line(
    ttt: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ttt.main(["--rope", "yarn:64"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("in_place_ttt: error: ") and "give more text" in line
