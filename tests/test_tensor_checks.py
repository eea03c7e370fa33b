"""What is said of a config.json that its tensors contradict."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import KEY, change, set_config
from checkpoint_helpers import folder as folder
from checkpoint_helpers import made as made
from checkpoint_helpers import tiny as tiny

from jrope.errors import JropeError
from jrope.hf import checks as tensor_checks
from jrope.hf.checkpoint import load, read_llama_config
from jrope.model.config import LlamaConfig


def biases(block: str, rows: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Of both layers."""
    names = {f"{block}.{name}_proj.bias": (size,) for name, size in rows.items()}
    layers = ("model.layers.0", "model.layers.1")
    return {f"{layer}.{name}": names[name] for layer in layers for name in names}


ATTENTION = biases("self_attn", {"q": 64, "k": 32, "v": 32, "o": 64})
MLP = biases("mlp", {"gate": 96, "up": 96, "down": 64})
OTHER_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "vocab_size": ({"vocab_size": 60}, "vocab_size is 60, the tensors fit 61"),
    "intermediate_size": (
        {"intermediate_size": 95},
        "intermediate_size is 95, the tensors fit 96",
    ),
    "hidden_size": ({"hidden_size": 128}, "hidden_size is 128, the tensors fit 64"),
    "hidden_size, head_dim by it": (
        {"hidden_size": 128, "head_dim": None},
        "hidden_size is 128, the tensors fit 64",
    ),
    "num_key_value_heads": (
        {"num_key_value_heads": 4},
        "num_key_value_heads is 4, the tensors fit 2",
    ),
    "no num_key_value_heads": (
        {"num_key_value_heads": None},
        "num_key_value_heads is 4, the tensors fit 2",
    ),
    "num_attention_heads": (
        {"num_attention_heads": 6},
        "num_attention_heads is 6, the tensors fit 4",
    ),
    "both numbers": (
        {"num_attention_heads": 6, "num_key_value_heads": 1},
        "num_attention_heads is 6, the tensors fit 4; "
        "num_key_value_heads is 1, the tensors fit 2",
    ),
    "head_dim": ({"head_dim": 32}, "head_dim is 32, the tensors fit 16"),
    "fewer": ({"num_hidden_layers": 1}, "num_hidden_layers is 1, the tensors fit 2"),
    "more": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the tensors fit 2"),
    "attention_bias": (
        {"attention_bias": True},
        "attention_bias is true, the tensors fit false",
    ),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias is true, the tensors fit false"),
}


@pytest.mark.parametrize("case", OTHER_FIELDS)
def test_the_field_that_disagrees(folder: Path, case: str) -> None:
    changes, said = OTHER_FIELDS[case]
    set_config(folder, **changes)
    with pytest.raises(JropeError) as error:
        load(folder)
    told = [part for part in str(error.value).split("; ") if "the tensors fit" in part]
    assert "; ".join(told) == said


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (ATTENTION, ["attention_bias is false, the tensors fit true"]),
        (MLP, ["mlp_bias is false, the tensors fit true"]),
        ({n: s for n, s in ATTENTION.items() if "o_proj" not in n}, []),
    ],
)
def test_biases_that_config_json_does_not_have(
    folder: Path, added: dict[str, tuple[int, ...]], said: list[str]
) -> None:
    change(folder, lambda t: t.update({n: np.zeros(s, "f4") for n, s in added.items()}))
    with pytest.raises(JropeError) as error:
        load(folder)
    told = [part for part in str(error.value).split("; ") if "the tensors fit" in part]
    assert told == said
    if said:
        set_config(folder, **{said[0].split()[0]: True})
        load(folder)
        return
    set_config(folder, attention_bias=True)
    with pytest.raises(JropeError, match=r"2 missing: .*o_proj.bias$"):
        load(folder)


def test_one_odd_layer_is_no_other_configuration(folder: Path) -> None:
    change(folder, lambda t: t.update({KEY: np.zeros((64, 64), np.float32)}))
    with pytest.raises(JropeError, match=r"found \(64, 64\), want \(32") as error:
        load(folder)
    assert "the tensors fit" not in str(error.value)


def test_absurd_numbers_of_layers_are_counted_not_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[int] = []
    table = tensor_checks.parameter_shapes

    def spy(
        config: LlamaConfig, layers: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        listed.append(layers or config.num_hidden_layers)
        return table(config, layers)

    monkeypatch.setattr(tensor_checks, "parameter_shapes", spy)
    set_config(folder, num_hidden_layers=10**7)
    said = "21 tensors, config.json asks for 90000003; num_hidden_layers is 10000000, "
    with pytest.raises(JropeError, match=f"{said}the tensors fit 2"):
        load(folder)
    assert listed == [1]
    change(folder, lambda t: [t.pop(n) for n in [*t] if "layers.0" in n])
    with pytest.raises(JropeError, match=r"90000003; num_hidden_layers is 10000000$"):
        load(folder)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_totals_are_those_of_the_table(folder: Path, bias: bool, tied: bool) -> None:
    set_config(folder, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied)
    config = read_llama_config(folder)
    shapes = tensor_checks.parameter_shapes(config).values()
    elements = sum(int(np.prod(shape)) for shape in shapes)
    assert tensor_checks.totals(config) == (len(shapes), elements)
