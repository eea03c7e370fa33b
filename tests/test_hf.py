"""config.json to LlamaConfig and back: what is read, refused and written."""

import dataclasses
import json
import math
from typing import Any

import pytest

from jrope.errors import JropeError
from jrope.hf import config_from_hf, config_to_hf
from jrope.hf.config import HANDLED, HARMLESS, IGNORED
from jrope.hf.families import FAMILIES
from jrope.model.config import LlamaConfig
from jrope.model.with_rope import with_rope
from jrope.rope import (
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

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ORIGINAL_16 = {"original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 16,
}
LISTS: dict[str, Any] = {"short_factor": (1.0,) * 8, "long_factor": (2.0,) * 8}

# name -> every method that Hugging Face can express, with M = 64 and 16 channels a head
METHODS: dict[str, list[Any]] = {
    "default": [None],
    "linear": [Linear(factor=3.0)],
    "dynamic": [DynamicNTK(factor=2.0, original_length=64)],
    "yarn": [
        Yarn(factor=4.0, original_length=16),
        Yarn(factor=5.0, original_length=16, attention_factor=1.25, truncate=False),
        Yarn(
            factor=4.0,
            original_length=16,
            mscale=1.0,
            mscale_all_dim=0.7,
            beta_fast=16.0,
            beta_slow=2.0,
        ),
    ],
    "dynamic-yarn": [
        DynamicYarn(original_length=64),
        DynamicYarn(original_length=16, factor=4.0, beta_fast=16.0, beta_slow=2.0),
    ],
    "llama3": [
        Llama3(
            factor=8.0, original_length=16, low_freq_factor=1.0, high_freq_factor=4.0
        )
    ],
    "longrope": [
        LongRope(**LISTS, original_length=16, factor=4.0),
        LongRope(**LISTS, original_length=16, factor=3.0),  # not M / O
        LongRope(**LISTS, original_length=16, attention_factor=1.5),
        LongRope(**LISTS, original_length=16, factor=3.0, attention_factor=1.5),
    ],
    "proportional": [Proportional(partial_rotary_factor=0.5, factor=2.0)],
}
CASES = [(name, method) for name, methods in METHODS.items() for method in methods]


def read(rope: dict[str, Any] | None = None, **changes: Any) -> LlamaConfig:
    extra = {} if rope is None else {"rope_scaling": rope}
    return config_from_hf({**BASE, **extra, **changes})


def rope_of(rope: dict[str, Any] | None = None, **changes: Any) -> Rope:
    return read(rope, **changes).rope


def with_scaling(scaling: Any, **fields: Any) -> LlamaConfig:
    config = read()
    rope = dataclasses.replace(config.rope, scaling=scaling, **fields)
    return dataclasses.replace(config, rope=rope)


def test_every_method_is_covered() -> None:
    assert {*METHODS} == {"default", *ROPE_TYPES} - {"ntk"}  # ntk: as another theta


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_key_tables_do_not_overlap(family: Any) -> None:
    handled = {*HANDLED, *family.defaults, *family.ignored}
    assert not handled & {*IGNORED} and not HANDLED & {*HARMLESS}
    assert not {*family.ignored} & {*family.defaults}
    assert not {*IGNORED} & {*HARMLESS}


# Both schemas, both ways


@pytest.mark.parametrize(("name", "scaling"), CASES)
def test_round_trip(name: str, scaling: Any) -> None:
    config = with_scaling(scaling, theta=500000.0)
    text = json.dumps(config_to_hf(config, dtype="bfloat16"), allow_nan=False)
    assert config_from_hf(json.loads(text)) == config


@pytest.mark.parametrize(("name", "scaling"), CASES)
@pytest.mark.parametrize("schema", ["rope_scaling", "rope_parameters"])
def test_either_schema_alone_reads_the_same(
    name: str, scaling: Any, schema: str
) -> None:
    config = with_scaling(scaling, theta=500000.0)
    written = config_to_hf(config)
    del written["rope_parameters" if schema == "rope_scaling" else "rope_scaling"]
    if schema == "rope_parameters":
        del written["rope_theta"]
    assert config_from_hf(written) == config


@pytest.mark.parametrize(
    ("name", "scaling"), [case for case in CASES if case[0] != "dynamic-yarn"]
)
def test_transformers_reads_what_we_write(name: str, scaling: Any) -> None:
    import torch
    from transformers import LlamaConfig as HFConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = with_scaling(scaling, theta=500000.0)
    hf = HFConfig(**config_to_hf(config))
    assert hf.rope_parameters["rope_type"] == name
    assert hf.rope_parameters["rope_theta"] == 500000.0
    tables = LlamaRotaryEmbedding(hf)
    inv_freq, attention_scaling = config.rope.frequencies(None)
    assert torch.allclose(tables.inv_freq, torch.tensor(inv_freq), rtol=1e-6)
    assert tables.attention_scaling == attention_scaling
    assert hf.num_key_value_heads == 2 and hf.rms_norm_eps == 1e-5
    again = config_from_hf(json.loads(hf.to_json_string()))  # v5's file of our config
    assert again == config


def test_every_field_survives_the_round_trip() -> None:
    changes = {
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 99,
        "rms_norm_eps": 1e-3,
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": [3, 4],
        "pad_token_id": 5,
        "rope_theta": 77.0,
    }
    config, plain = read(**changes), read()
    for field in dataclasses.fields(config):
        if field.name in changes:
            assert getattr(config, field.name) != getattr(plain, field.name)
    assert config_from_hf(config_to_hf(config)) == config
    assert config_to_hf(config)["eos_token_id"] == [3, 4]


def test_condense_is_written_as_linear_and_read_back() -> None:
    config = with_rope(read(), condense=3.0)
    written = config_to_hf(config)
    assert written["rope_scaling"]["rope_type"] == "linear"
    assert written["rope_scaling"]["factor"] == written["rope_condense_ratio"] == 3.0
    assert config_from_hf(written) == config


def test_static_ntk_is_written_as_its_theta() -> None:
    written = config_to_hf(with_scaling(NTKAware(factor=4.0)))
    assert written["rope_scaling"] is None
    theta = 10000.0 * 4.0 ** (16 / 14)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == theta


def test_dynamic_writes_its_trained_length() -> None:
    written = config_to_hf(with_scaling(DynamicNTK(factor=2.0, original_length=32)))
    assert written["max_position_embeddings"] == 32
    assert "original_max_position_embeddings" not in written["rope_parameters"]


def test_longrope_writes_what_transformers_4_reads() -> None:
    written = config_to_hf(with_scaling(METHODS["longrope"][1]))
    assert written["original_max_position_embeddings"] == 16
    scale = math.sqrt(1 + math.log(3) / math.log(16))
    assert written["rope_scaling"]["attention_factor"] == pytest.approx(scale)


def test_theta_stands_wherever_it_is_looked_for() -> None:
    written = config_to_hf(with_scaling(Linear(factor=2.0), theta=5e5))
    places = (written, written["rope_scaling"], written["rope_parameters"])
    assert [place["rope_theta"] for place in places] == [5e5] * 3


def test_dtype_is_written_under_both_names() -> None:
    written = config_to_hf(read(), dtype="bfloat16")
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert "dtype" not in config_to_hf(read())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "interleaved"}, "layout: got 'interleaved'.*permute"),
        ({"rotary_dim": 8}, r"rope.rotary_dim: got 8, want head_dim \(16\)"),
        ({"scaling": Yarn(factor=2.0, original_length=32), "condense": 2.0}, "Yarn"),
        ({"scaling": NTKAware(factor=2.0), "condense": 2.0}, "condense: got 2.0"),
        (
            {"scaling": DynamicYarn(original_length=10, factor=1.25)},
            r"factor: got 1.25, want a whole number over original_length \(10\)",
        ),
    ],
)
def test_what_hugging_face_cannot_say_raises(
    fields: dict[str, Any], message: str
) -> None:
    config = read()
    rope = dataclasses.replace(config.rope, **fields)
    with pytest.raises(JropeError, match=message):
        config_to_hf(dataclasses.replace(config, rope=rope))


# Resolution


def test_defaults_are_those_of_transformers() -> None:
    from transformers import LlamaConfig as HFConfig

    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    sizes |= {"num_attention_heads"}
    bare = {key: BASE[key] for key in sizes}
    full = json.loads(HFConfig(**bare).to_json_string(use_diff=False))
    assert config_from_hf(bare) == config_from_hf(full)


@pytest.mark.parametrize(
    ("value", "ids"),
    [(2, (2,)), ([2, 3], (2, 3)), ([], ()), (None, ()), (-1, ()), ([-1, 2], (2,))],
)
def test_eos(value: Any, ids: tuple[int, ...]) -> None:
    config = read(eos_token_id=value)
    assert config.eos_token_id == ids
    assert config_from_hf(config_to_hf(config)) == config


def test_head_dim_null_or_absent_is_the_quotient() -> None:
    assert read(head_dim=None).head_dim == read().head_dim == 16
    assert read(head_dim=24).rope.rotary_dim == 24
    assert read(hidden_size=66, head_dim=8).head_dim == 8


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_minus_one_means_none(key: str) -> None:
    assert getattr(read(**{key: -1}), key) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"pretraining_tp": 2},
        {"attention_dropout": 0.1},
        {"chunk_size_feed_forward": 64},
        {"architectures": ["LLaMAForCausalLM"]},
    ],
)
def test_what_changes_no_logits_is_read(changes: dict[str, Any]) -> None:
    """Transformers gives the same logits, to the bit."""
    import torch
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    assert read(**changes) == read()
    logits: list[Any] = []
    for file in (BASE, {**BASE, **changes}):
        torch.manual_seed(0)
        model = LlamaForCausalLM(HFConfig(**file)).eval()
        with torch.no_grad():
            logits.append(model(torch.arange(9)[None]).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("schema", ["rope_scaling", "rope_parameters"])
def test_a_null_theta_at_the_top_is_the_inner_one(schema: str) -> None:
    from transformers import LlamaConfig as HFConfig

    file = {**BASE, "rope_theta": None, schema: {**YARN, "rope_theta": 5e5}}
    assert config_from_hf(file).rope.theta == 5e5
    assert HFConfig(**file).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("rope", [None, {"type": "linear", "factor": 2.0}])
def test_of_a_null_theta_alone_transformers_builds_no_model(rope: Any) -> None:
    from transformers import LlamaConfig as HFConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with pytest.raises(JropeError, match="rope_theta: got None"):
        rope_of(rope, rope_theta=None)
    with pytest.raises(TypeError):
        LlamaRotaryEmbedding(HFConfig(**BASE, rope_theta=None, rope_scaling=rope))


def test_type_under_its_old_name_and_su() -> None:
    assert rope_of({"type": "linear", "factor": 2}).scaling == Linear(factor=2)
    both = {"type": "linear", "rope_type": "linear", "factor": 2}
    assert rope_of(both).scaling == Linear(factor=2)
    su = {**LONG, "rope_type": "su", "type": "longrope"}
    assert rope_of(su) == rope_of(LONG)
    assert rope_of({"rope_type": "ntk", "factor": 2}).scaling == NTKAware(factor=2)


def test_empty_schemas_are_absent_ones() -> None:
    assert rope_of({}) == rope_of(None) == rope_of(rope_parameters={})
    v5 = {**YARN, "rope_theta": 5e5}
    assert rope_of(None, rope_scaling=None, rope_parameters=v5).theta == 5e5


def test_same_schemas_twice_are_one() -> None:
    inside = {**YARN, "rope_theta": 5e5}
    assert rope_of(inside, rope_parameters=inside, rope_theta=5e5).theta == 5e5


def test_original_length_at_the_top_overrides_the_inner_one() -> None:
    for rope in (YARN, LLAMA3, LONG):
        assert rope_of(rope).trained_length == 16
        outer = rope_of(rope, original_max_position_embeddings=32)
        assert outer.trained_length == 32
        bare = {k: v for k, v in rope.items() if k[:4] != "orig"}
        if rope is LONG:  # transformers warns, and takes 64 for both lengths
            with pytest.raises(JropeError, match=r"longrope.* needs original_max_pos"):
                rope_of(bare)
        else:
            assert rope_of(bare).trained_length == 64


def test_inferred_factors() -> None:
    assert rope_of({**YARN, "factor": None}).scaling.factor == 4.0  # type: ignore
    long = rope_of(LONG, original_max_position_embeddings=16).scaling
    assert isinstance(long, LongRope) and long.factor == 4.0
    explicit = rope_of({**LONG, "factor": 2.0}, original_max_position_embeddings=16)
    assert explicit.scaling.factor == 2.0  # type: ignore


def test_yarn_nulls_and_finetuned() -> None:
    nulls = dict.fromkeys(
        ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    )
    assert rope_of({**YARN, **nulls, "finetuned": True}) == rope_of(YARN)


def test_dynamic_yarn_in_its_authors_words() -> None:
    """Their `factor` is never read; finetuned with M / O is the least scale."""
    file = {"type": "dynamic-yarn", "factor": 3.0, **ORIGINAL_16}
    tuned = rope_of({**file, "finetuned": True}).scaling
    assert tuned == DynamicYarn(original_length=16, factor=4.0)
    plain = rope_of(file, max_position_embeddings=16).scaling
    assert plain == DynamicYarn(original_length=16)
    written = config_to_hf(with_scaling(tuned))
    assert written["rope_scaling"]["finetuned"] is True
    assert written["max_position_embeddings"] == 64


@pytest.mark.parametrize("finetuned", [None, False, "true"])
def test_dynamic_yarn_that_is_not_tuned_has_one_length(finetuned: Any) -> None:
    given = {} if finetuned is None else {"finetuned": finetuned}
    message = "rope_scaling.finetuned: got .*want true, or max_position_embeddings the"
    with pytest.raises(JropeError, match=message):
        rope_of({"type": "dynamic-yarn", **ORIGINAL_16, **given})


def test_partial_rotary_factor() -> None:
    proportional = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    scaling = rope_of(proportional).scaling
    assert scaling == Proportional(partial_rotary_factor=0.25)
    outer = rope_of({"rope_type": "proportional"}, partial_rotary_factor=0.25)
    assert outer.scaling == scaling
    assert rope_of(YARN, partial_rotary_factor=1.0) == rope_of(YARN)
    assert rope_of(partial_rotary_factor=None) == rope_of()


def test_longchat_ratio_is_condense() -> None:
    assert rope_of(rope_condense_ratio=8).condense == 8
    assert rope_of(rope_condense_ratio=None).condense == 1
    linear = {"type": "linear", "factor": 8.0}
    rope = rope_of(linear, rope_condense_ratio=8)
    assert rope.condense == 8 and rope.scaling is None


def test_real_files_of_the_field_are_read() -> None:
    smollm = read(
        **{"transformers.js_config": {"dtype": "q4"}},
        is_llama_config=True,
        rope_interleaved=False,
        rope_theta=100000,
        rope_scaling=None,
        torch_dtype="bfloat16",
        transformers_version="4.42.3",
        use_cache=True,
        pretraining_tp=1,
        attention_dropout=0.0,
    )
    assert smollm.rope.theta == 100000
    yarn = {
        "type": "yarn",
        "factor": 32.0,
        "finetuned": True,
        "original_max_position_embeddings": 4096,
    }
    llama2 = read(yarn, auto_map={"AutoModel": "x.Y"}, max_position_embeddings=131072)
    assert llama2.rope.scaling == Yarn(factor=32.0, original_length=4096)


# Refusals


def test_all_problems_at_once() -> None:
    bad = {**BASE, "rope_thetta": 1.0, "foo": 2, "quantization_config": {"bits": 4}}
    del bad["vocab_size"]
    with pytest.raises(JropeError) as error:
        config_from_hf(bad)
    for word in ("'rope_thetta' (did you mean 'rope_theta'?)", "'foo'", "dequantize"):
        assert word in str(error.value)
    assert "missing vocab_size" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mixtral"},
            r"'mixtral' \(a mixture of experts\), which is not",
        ),
        (
            {"model_type": "mistrall"},
            "did you mean 'mistral'.*want one of llama, qwen2",
        ),
        ({"architectures": ["LlamaModel"]}, "architectures is .*LlamaForCausalLM"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*dequantize"),
        ({"sliding_window": 4096}, "sliding_window is 4096, want None"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"use_sliding_window": 0}, "use_sliding_window is 0, want False"),
        ({"rope_interleaved": True}, "rope_interleaved is True.*permute"),
        ({"num_experts": 8}, "unknown 'num_experts'"),
        ({"hidden_size": 250}, "hidden_size: got 250.*num_attention_heads 4"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "8 is not a multiple"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0, want a positive int"),
        ({"num_attention_heads": True}, "num_attention_heads: got True"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, want a positive"),
        ({"vocab_size": "61"}, "vocab_size is '61', want a positive integer"),
        ({"max_position_embeddings": 0}, "max_position_embeddings.*0.*positive"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"hidden_act": "silux"}, "hidden_act is 'silux'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"pad_token_id": -2}, "pad_token_id is -2"),
        ({"head_dim": 5}, "head_dim: got 5, want a positive even integer"),
        ({"head_dim": "16"}, "head_dim: got '16'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor: got True"),
        ({"rope_theta": -10000.0}, "rope_theta: got -10000.0, want .* > 1"),
        ({"rope_theta": "10000"}, "rope_theta: got '10000'"),
        ({"rope_theta": None}, "rope_theta: got None"),
        ({"rope_theta": True}, "rope_theta: got True"),
        ({"rope_theta": math.nan}, "rope_theta: got nan"),
        ({"rope_condense_ratio": 0}, "rope_condense_ratio: got 0"),
        ({"rope_condense_ratio": "8"}, "rope_condense_ratio: got '8'"),
        ({"original_max_position_embeddings": 16}, "'default' does not read it"),
    ],
)
def test_bad_fields_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JropeError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "nkt", "factor": 2}, "'nkt'.*known: default.*mean 'ntk'"),
        ({"rope_type": None, "factor": 2}, "unknown rope type None"),
        ({"rope_type": ["yarn"], "factor": 2}, "unknown rope type"),
        ({"rope_type": "axial"}, "unknown rope type 'axial'"),
        ({"factor": 4.0}, "'factor' but neither 'rope_type' nor 'type'"),
        (
            {"rope_type": "linear", "type": "dynamic", "factor": 2},
            "'type'='dynamic' contradicts 'rope_type'='linear'",
        ),
        ({"rope_type": "default", "factor": 2}, "'default' does not read 'factor'"),
        ({"rope_type": "linear"}, "'linear' needs factor"),
        ({"rope_type": "linear", "factor": 0}, r"rope_scaling\.factor: got 0, want"),
        ({"rope_type": "linear", "factor": None}, r"rope_scaling\.factor: got None"),
        ({"rope_type": "linear", "factor": math.nan}, "factor: got nan"),
        ({"rope_type": "linear", "factor": math.inf}, "factor: got inf"),
        ({"rope_type": "linear", "factor": True}, "factor: got True"),
        ({"rope_type": "linear", "factor": "2"}, "factor: got '2'"),
        ({"rope_type": "linear", "factor": [2]}, r"factor: got \[2\]"),
        ({"rope_type": "linear", "factor": 2, "alpha": 1}, "does not read 'alpha'"),
        (
            {**YARN, "rope_type": "dynamic"},
            "'dynamic' does not read 'original_max_position_embeddings'",
        ),
        ({"rope_type": "yarn"}, "'yarn' needs factor"),
        ({"rope_type": "yarn", "factor": None}, "factor: got None, want .*original"),
        ({**YARN, "attn_factor": 1.0}, "'attn_factor' .did you mean 'attention_fac"),
        ({**YARN, "beta_fast": 1, "beta_slow": 32}, "beta_fast: got 1, want more than"),
        ({**YARN, "beta_fast": 0}, r"rope_scaling\.beta_fast: got 0"),
        ({**YARN, "attention_factor": 0}, "attention_factor: got 0"),
        ({**YARN, "truncate": "false"}, "truncate: got 'false', want a boolean"),
        ({**YARN, "truncate": None}, "truncate: got None"),
        (
            {**YARN, "original_max_position_embeddings": None},
            "rope_scaling.original_max_position_embeddings: got None",
        ),
        (
            {**YARN, "original_max_position_embeddings": 0, "factor": None},
            "original_max_position_embeddings: got 0, want a positive integer",
        ),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor: got 1.0, want more"),
        ({**LLAMA3, "low_freq_factor": 8.0}, "high_freq_factor: got 4.0, want more"),
        ({"rope_type": "llama3", "factor": 8}, "needs low_freq_factor, high_freq"),
        ({**LONG, "short_factor": [1.0] * 4}, "short_factor: .*4 numbers.*8 numbers"),
        ({**LONG, "long_factor": [1.0] * 7}, "long_factor: .*7 numbers.*8 numbers"),
        ({**LONG, "long_factor": [0.0] * 8}, r"rope_scaling.long_factor\[0\]: got 0.0"),
        ({**LONG, "long_factor": 2.0}, "long_factor: got 2.0, want a list"),
        ({**LONG, "long_factor": None}, "long_factor: got None, want a list"),
        ({**LONG, "long_factor": [None] * 8}, r"long_factor\[0\]: got None"),
        ({"full_attention": dict(YARN)}, "nested objects full_attention"),
        ({"rope_type": "linear", "factor": {"x": 1}}, "nested objects factor"),
        ([], "rope_scaling: got .*, want an object or null"),
        ("linear", "rope_scaling: got 'linear', want an object or null"),
        (False, "rope_scaling: got False, want an object or null"),
    ],
)
def test_bad_rope_raises(rope: Any, message: str) -> None:
    with pytest.raises(JropeError, match=message):
        read(rope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # 5.x reads plain rope here, and theta 10000 in the second
        ({"rope_parameters": {**YARN, "factor": 2.0}}, "disagree"),
        ({"rope_parameters": {**YARN, "rope_theta": 5e5}}, "disagree"),
        (
            {"rope_scaling": {**YARN, "rope_theta": 5e5}, "rope_theta": 1e4},
            "rope_scaling.rope_theta: got 500000.0, want 10000.0",
        ),
        ({"rope_condense_ratio": 8}, "rope_condense_ratio 8 contradicts Yarn"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}, "rope_condense_ratio": 8},
            "rope_condense_ratio 8 contradicts Linear",
        ),
    ],
)
def test_contradictions_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JropeError, match=message):
        read(**{"rope_scaling": YARN, **changes})
