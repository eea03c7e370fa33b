"""The configuration: what it refuses, its weights, and `with_rope`."""

import dataclasses
from typing import Any

import pytest
from conftest import make_tiny_hf
from hypothesis import given
from hypothesis import strategies as st

from jrope.errors import JropeError
from jrope.hf import config_from_hf
from jrope.model.activations import ACTIVATIONS
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.model.with_rope import with_rope
from jrope.rope import (
    ALIASES,
    ROPE_TYPES,
    DynamicNTK,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    NTKAware,
    Proportional,
    Rope,
    Yarn,
)
from jrope.tree import flatten, nest

PAIRS = 8
FACTORS = tuple(1.0 + r for r in range(PAIRS))


def make(**fields: Any) -> LlamaConfig:
    usual: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "rope": Rope(theta=10000.0, rotary_dim=2 * PAIRS),
        "bos_token_id": 1,
        "eos_token_id": (2,),
        "pad_token_id": None,
    }
    return LlamaConfig(**{**usual, **fields})


# --- fields

COUNTS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]
FLAGS = ["attention_bias", "mlp_bias", "tie_word_embeddings"]
NUMBERS = ["rms_norm_eps", "initializer_range"]
SINGLE_IDS = ["bos_token_id", "pad_token_id"]

SWITCHES: dict[str, tuple[Any, str]] = {  # a value that is refused, and the words
    "model_type": (3, "model_type is 3, want a name"),
    "o_bias": (1, "o_bias is 1, want null, true or false"),
    "windows": ((1,), "windows is .1,., want 2 of null or an integer"),
    "rotary": ((True,), "rotary is .True,., want 2 of true or false"),
    "attention_scale": (0, "attention_scale is 0, want null or a number > 0"),
    "embedding_multiplier": (0, "embedding_multiplier is 0, want a number > 0"),
    "residual_multiplier": (None, "residual_multiplier is None, want a number > 0"),
    "logits_divisor": (-1.0, "logits_divisor is -1.0, want a number > 0"),
    "score_cap": (0.0, "score_cap is 0.0, want null or a number > 0"),
    "logit_cap": ("30", "logit_cap is '30', want null or a number > 0"),
    "qk_norm": ("heads", "qk_norm is 'heads', want one of None, head, whole"),
    "norm": (None, "norm is None, want one of llama, wide, gemma"),
    "norm_at": ("peri", "norm_at is 'peri', want one of pre, post, sandwich"),
    "wide_rotation": (1, "wide_rotation is 1, want true or false"),
    "local_rope": (Rope(theta=1e3, rotary_dim=16), "local_rope is given, want windows"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_bad_switches(name: str) -> None:
    value, message = SWITCHES[name]
    with pytest.raises(JropeError, match=message):
        make(**{name: value})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (Rope(theta=1e3, rotary_dim=8), "local_rope and rope differ in rotary_dim"),
        (
            Rope(
                theta=1e3,
                rotary_dim=16,
                scaling=DynamicNTK(factor=2, original_length=8),
            ),
            "local_rope is .*, want a Rope that needs no length",
        ),
        ("plain", "local_rope is 'plain', want a Rope"),
    ],
)
def test_bad_local_rope(rope: Any, message: str) -> None:
    with pytest.raises(JropeError, match=message):
        make(windows=(5, None), local_rope=rope)


def test_precision_is_that_of_both_ropes() -> None:
    local = Rope(theta=1e3, rotary_dim=16)
    config = make(windows=(5, None), local_rope=local)
    changed = with_rope(config, "linear", factor=2, precision="accurate")
    assert changed.local_rope == dataclasses.replace(local, precision="accurate")
    assert with_rope(config, "linear", factor=2).local_rope == local


def test_every_field_is_in_a_table() -> None:
    others = {"hidden_act", "rope", "eos_token_id", *SWITCHES}
    named = {*COUNTS, *FLAGS, *NUMBERS, *SINGLE_IDS, *others}
    assert {f.name for f in dataclasses.fields(LlamaConfig)} == named


def test_nothing_of_a_llama_has_a_default() -> None:
    for field in dataclasses.fields(LlamaConfig):
        switch = field.name in SWITCHES
        assert (field.default is not dataclasses.MISSING) is switch
        assert field.default_factory is dataclasses.MISSING
    with pytest.raises(TypeError, match="'vocab_size', 'hidden_size', 'intermediate"):
        LlamaConfig()  # pyright: ignore


@pytest.mark.parametrize("value", [0, -1, 1.0, "8", None, True])
@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str, value: Any) -> None:
    message = f"^configuration: {name} is {value!r}, want a positive integer$"
    with pytest.raises(JropeError, match=message):
        make(**{name: value})


@pytest.mark.parametrize("value", [0, 1, None, "true"])
@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str, value: Any) -> None:
    message = f"^configuration: {name} is {value!r}, want true or false$"
    with pytest.raises(JropeError, match=message):
        make(**{name: value})


BAD_NUMBERS = [-1e-9, float("nan"), float("inf"), 10**400, "1e-5", None, True]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda v: str(v)[:9])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str, value: Any) -> None:
    message = f"^configuration: {name} is {value!r}, want a number >= 0 and < 1e30$"
    with pytest.raises(JropeError, match=message):
        make(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_be_zero_or_whole(name: str) -> None:
    assert getattr(make(**{name: 0}), name) == 0
    assert getattr(make(**{name: 1}), name) == 1


@pytest.mark.parametrize("value", ["silux", "", None, 3, ["silu"]])
def test_hidden_act(value: Any) -> None:
    with pytest.raises(JropeError, match=r"hidden_act is .+, want one of gelu, ") as e:
        make(hidden_act=value)
    assert repr(value) in str(e.value)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_allowed(name: str) -> None:
    assert make(hidden_act=name).hidden_act == name


@pytest.mark.parametrize("heads, kv_heads", [(8, 3), (2, 4), (1, 2)])
def test_heads(heads: int, kv_heads: int) -> None:
    message = (
        f"^configuration: num_attention_heads {heads} is not a multiple of "
        f"num_key_value_heads {kv_heads}$"
    )
    with pytest.raises(JropeError, match=message):
        make(num_attention_heads=heads, num_key_value_heads=kv_heads)


def test_rotary_dim() -> None:
    message = "^configuration: rope.rotary_dim 16 exceeds head_dim 14$"
    with pytest.raises(JropeError, match=message):
        make(head_dim=14)
    assert make(head_dim=24).rope.rotary_dim == 16  # partial


@pytest.mark.parametrize("value", [None, 10000.0, {"rope_type": "default"}])
def test_rope_is_a_rope(value: Any) -> None:
    with pytest.raises(JropeError, match=r"^configuration: rope is .+, want a Rope$"):
        make(rope=value)


@pytest.mark.parametrize("value", [-1, 1.0, "<s>", True, (1,)])
@pytest.mark.parametrize("name", SINGLE_IDS)
def test_single_ids(name: str, value: Any) -> None:
    message = f"{name} is .*, want null or an integer >= 0"
    with pytest.raises(JropeError, match=message):
        make(**{name: value})
    assert getattr(make(**{name: None}), name) is None
    assert getattr(make(**{name: 0}), name) == 0


@pytest.mark.parametrize("value", [None, 2, [2], (2, None), (-1,), (2.0,), (True,)])
def test_eos(value: Any) -> None:
    message = "eos_token_id is .*, want a tuple of integers >= 0"
    with pytest.raises(JropeError, match=message):
        make(eos_token_id=value)
    assert make(eos_token_id=()).eos_token_id == ()


def test_all_problems_at_once() -> None:
    bad: dict[str, Any] = {
        "vocab_size": 0,
        "num_attention_heads": 0,
        "head_dim": None,
        "rms_norm_eps": -1,
        "hidden_act": "x",
        "mlp_bias": 1,
        "rope": None,
        "bos_token_id": -1,
        "eos_token_id": None,
    }
    with pytest.raises(JropeError) as error:
        make(**bad)
    problems = str(error.value).removeprefix("configuration: ").split("; ")
    assert {p.split()[0] for p in problems} == {*bad}
    assert len(problems) == len(bad)


def test_equal_hashed_and_frozen() -> None:
    config = make()
    assert config == make() and hash(config) == hash(make())
    assert len({config, make(), make(vocab_size=62)}) == 2
    assert with_rope(config, "linear", factor=2) != config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # pyright: ignore


def test_replace_checks_again() -> None:
    config = dataclasses.replace(make(), num_hidden_layers=7)
    assert config == make(num_hidden_layers=7)
    with pytest.raises(JropeError, match="num_hidden_layers is 0"):
        dataclasses.replace(config, num_hidden_layers=0)


# --- weights

SHAPES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "biases": {"bias": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_dim": {"head_dim": 24, "kv_heads": 1},
    "MHA, 3 layers": {"kv_heads": 4, "layers": 3},
}


@pytest.mark.parametrize("case", SHAPES)
def test_parameter_shapes_are_those_of_transformers(case: str) -> None:
    tiny = make_tiny_hf(**SHAPES[case])
    want = {name: tuple(x.shape) for name, x in tiny.model.state_dict().items()}
    if case == "tied":
        assert want.pop("lm_head.weight") == (61, 64)
    assert parameter_shapes(config_from_hf(tiny.config)) == want


NAMES = st.text("abc_0", min_size=1, max_size=3)
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.integers(), lambda t: st.dictionaries(NAMES, t, min_size=1, max_size=3)
    ),
    max_size=4,
)


@given(tree=TREES)
def test_nest_undoes_flatten(tree: dict[str, Any]) -> None:
    flat = flatten(tree)
    assert nest(flat) == tree
    assert not any(isinstance(leaf, dict) for leaf in flat.values())
    assert flatten(nest(flat)) == flat


def test_the_tree_is_the_names_split_at_the_dots() -> None:
    flat = parameter_shapes(make(attention_bias=True))
    tree = nest(flat)
    assert tree["model"]["layers"]["1"]["self_attn"]["k_proj"] == {
        "weight": (32, 64),
        "bias": (32,),
    }
    assert list(flatten(tree)) == list(flat)


# --- with_rope

# What is given, and what should come of it at a maximum of 128 positions.
METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({"factor": 2}, Linear(factor=2)),
    "ntk": ({"factor": 4.0}, NTKAware(factor=4.0)),
    "dynamic": ({"factor": 2}, DynamicNTK(factor=2, original_length=128)),
    "yarn": ({"factor": 4}, Yarn(factor=4, original_length=128)),
    "dynamic-yarn": ({}, DynamicYarn(original_length=128)),
    "llama3": (
        {"factor": 8, "low": 1, "high": 4},
        Llama3(factor=8, original_length=128, low_freq_factor=1, high_freq_factor=4),
    ),
    "longrope": (
        {"short": FACTORS, "long": FACTORS, "original": 32},
        LongRope(
            short_factor=FACTORS, long_factor=FACTORS, original_length=32, factor=4
        ),
    ),
    "proportional": ({}, Proportional()),
}


def test_every_method_is_in_the_table() -> None:
    assert {*METHODS} == {*ROPE_TYPES}


@pytest.mark.parametrize("name", METHODS)
def test_with_rope_by_name(name: str) -> None:
    config, (fields, want) = make(), METHODS[name]
    got = with_rope(config, name, **fields)
    assert got == dataclasses.replace(
        config, rope=dataclasses.replace(config.rope, scaling=want)
    )
    assert with_rope(config, want) == got
    assert with_rope(got, "default") == config
    assert config == make()


def test_with_rope_of_nothing_is_the_same() -> None:
    config = with_rope(make(), "yarn", factor=4)
    assert with_rope(config) == config


@pytest.mark.parametrize("alias, field", ALIASES.items())
def test_aliases(alias: str, field: str) -> None:
    values = {
        "original_length": 64,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "short_factor": FACTORS,
        "long_factor": FACTORS,
    }
    fields: dict[str, Any] = {"short_factor": FACTORS, "long_factor": FACTORS}
    name = "longrope"
    if field not in fields:
        fields = {"factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        name = "llama3"
    fields.pop(field, None)
    method = with_rope(make(), name, **fields, **{alias: values[field]}).rope.scaling
    assert getattr(method, field) == values[field]


@pytest.mark.parametrize("value", [64, 4096])
def test_a_field_given_twice(value: int) -> None:
    """In either order, with equal values too."""
    message = "^rope type 'yarn': 'original_length' is given twice$"
    names = ["original", "original_length"]
    for first, second in (names, names[::-1]):
        with pytest.raises(JropeError, match=message):
            with_rope(make(), "yarn", factor=4, **{first: 4096, second: value})


def test_original_length_is_the_trained_one() -> None:
    stretched = with_rope(make(), "yarn", factor=4, original=32)
    assert stretched.rope.trained_length == 32
    again = with_rope(stretched, "dynamic", factor=2)
    assert again.rope.scaling == DynamicNTK(factor=2, original_length=32)
    plain = with_rope(with_rope(stretched, "default"), "dynamic", factor=2)
    assert plain.rope.scaling == DynamicNTK(factor=2, original_length=128)


def test_longrope_s_factor() -> None:
    def longrope(**fields: Any) -> Any:
        factors = {"short": FACTORS, "long": list(FACTORS)}
        return with_rope(make(), "longrope", **factors, **fields).rope.scaling

    assert longrope(original=48).factor == 128 / 48
    assert longrope().factor == 1.0
    assert longrope(original=32, factor=3.0).factor == 3.0
    assert longrope(original=32, attention_factor=1.2).factor is None


def test_condense() -> None:
    config = make()
    got = with_rope(config, condense=8)
    assert got.rope == dataclasses.replace(config.rope, condense=8)
    assert with_rope(config, "condense", factor=8) == got
    assert with_rope(got, condense=1) == config
    kept = with_rope(got, "linear", factor=2).rope
    assert (kept.condense, kept.scaling) == (1, Linear(factor=2))
    both = with_rope(config, "yarn", factor=4, condense=2.5)
    assert (both.rope.condense, both.rope.scaling) == (2.5, METHODS["yarn"][1])
    changed = with_rope(both, "condense", factor=3).rope
    assert (changed.condense, changed.scaling) == (3, None)


def test_precision() -> None:
    got = with_rope(make(), "yarn", factor=4, precision="accurate")
    assert got.rope.precision == "accurate"
    assert with_rope(got, "default").rope.precision == "accurate"
    assert with_rope(got, "default", precision="parity") == make()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "near a name": (
        {"method": "yarm", "factor": 4},
        r"unknown rope type 'yarm'; known: default, condense, linear, .*"
        r"\(did you mean 'yarn'\?\)$",
    ),
    "another name": (
        {"method": "nkt"},
        r"unknown rope type 'nkt'; known: .*proportional \(did you mean 'ntk'\?\)$",
    ),
    "near nothing": ({"method": "xyz"}, "unknown rope type 'xyz'; known: .*tional$"),
    "no such field": (
        {"method": "linear", "factor": 2, "beta": 3, "alpha": 1},
        r"rope type 'linear' has no field \['alpha', 'beta'\]; fields: factor$",
    ),
    "fields of none": (
        {"method": "default", "factor": 2},
        r"rope type 'default' has no field \['factor'\]; fields: none$",
    ),
    "missing": ({"method": "linear"}, "rope type 'linear' needs factor$"),
    "all missing": (
        {"method": "llama3"},
        "rope type 'llama3' needs factor, low_freq_factor, high_freq_factor$",
    ),
    "no method": (
        {"factor": 2, "original": 3},
        r"fields \['factor', 'original'\] given without a method's name$",
    ),
    "fields and an object": (
        {"method": Linear(factor=2), "factor": 2},
        r"fields \['factor'\] given without a method's name$",
    ),
    "value": (
        {"method": "linear", "factor": 0},
        "factor: got 0, want a number, at least 1",
    ),
    "original of 0": (
        {"method": "longrope", "short": FACTORS, "long": FACTORS, "original": 0},
        "original_length: got 0, want a positive integer",
    ),
    "wrong count": (
        {"method": "longrope", "short": (1.0,), "long": FACTORS},
        r"short_factor: got '1 numbers', want 8 numbers \(rotary_dim / 2\)",
    ),
    "no method at all": ({"method": 5}, "scaling: got 5, want None or one of Linear"),
    "condense": ({"condense": 0}, "condense: got 0, want a number > 0"),
    "precision": ({"precision": "exact"}, "precision: got 'exact', want one of"),
    "condense without factor": (
        {"method": "condense"},
        r"rope 'condense' takes factor alone, got \[\]$",
    ),
    "condense and more": (
        {"method": "condense", "factor": 2, "original": 3},
        r"rope 'condense' takes factor alone, got \['factor', 'original'\]$",
    ),
    "condense twice": (
        {"method": "condense", "factor": 2, "condense": 2},
        r"rope 'condense' takes factor alone",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_with_rope_says_what_is_wrong(case: str) -> None:
    fields, message = WRONG[case]
    with pytest.raises(JropeError, match=message):
        with_rope(make(), **fields)
