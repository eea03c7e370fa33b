"""Every field of a method counts, factor one is plain, wrong fields are refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from rope_cases import (
    BAD_NUMBERS,
    LISTS,
    ONES,
    ULP,
    _divisors,
    assert_same,
    errors,
    plain,
)

from jrope.errors import JropeError
from jrope.rope import (
    ROPE_TYPES,
    DynamicNTK,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    NTKAware,
    Proportional,
    Yarn,
    table,
)

# Every field counts

SHORT, LONG = _divisors(8, 2.0), _divisors(8, 9.0)
FIELDS: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "linear": [(Linear(factor=2), {"factor": 3})],
    "ntk": [(NTKAware(factor=2), {"factor": 3})],
    "dynamic": [
        (
            DynamicNTK(factor=2, original_length=32),
            {"factor": 3, "original_length": 48},
        )
    ],
    "yarn": [
        (
            Yarn(factor=4, original_length=2048),
            {
                "factor": 5,
                "original_length": 512,
                "attention_factor": 1.3,
                "truncate": False,
                "beta_fast": 8.0,
                "beta_slow": 4.0,
            },
        ),
        (
            Yarn(factor=4, original_length=2048, mscale=0.7, mscale_all_dim=0.9),
            {"mscale": 0.8, "mscale_all_dim": 1.0},
        ),
    ],
    "dynamic-yarn": [
        (
            DynamicYarn(factor=4, original_length=2048),
            {"factor": 5, "original_length": 512, "beta_fast": 8.0, "beta_slow": 4.0},
        )
    ],
    "llama3": [
        (
            Llama3(factor=4, original_length=64, low_freq_factor=1, high_freq_factor=4),
            {
                "factor": 5,
                "original_length": 96,
                "low_freq_factor": 2,
                "high_freq_factor": 5,
            },
        )
    ],
    "longrope": [
        (
            LongRope(
                short_factor=SHORT, long_factor=LONG, original_length=64, factor=4
            ),
            {
                "short_factor": LONG,
                "original_length": 96,
                "factor": 5,
                "attention_factor": 1.3,
            },
        ),
        (
            LongRope(
                short_factor=SHORT, long_factor=LONG, original_length=32, factor=4
            ),
            {"long_factor": SHORT, "original_length": 64},
        ),
    ],
    "proportional": [
        (
            Proportional(partial_rotary_factor=0.5, factor=2),
            {"partial_rotary_factor": 0.75, "factor": 3},
        )
    ],
}


@pytest.mark.parametrize("name", ROPE_TYPES)
def test_every_field_matters(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(ROPE_TYPES[name])}
    assert {field for _, changes in FIELDS[name] for field in changes} == fields
    for method, changes in FIELDS[name]:
        before = table(plain(scaling=method), np.arange(64), length=64)
        for field, value in changes.items():
            other = dataclasses.replace(method, **{field: value})
            after = table(plain(scaling=other), np.arange(64), length=64)
            assert errors(after, before).max() > 1e-3, field
            assert other != method


UNSCALED = {
    "linear": Linear(factor=1),
    "ntk": NTKAware(factor=1),
    "dynamic": DynamicNTK(factor=3, original_length=4096),  # plain up to its length
    "yarn": Yarn(factor=1, original_length=64),
    "dynamic-yarn": DynamicYarn(original_length=4096),  # plain up to its length
    "llama3": Llama3(
        factor=1, original_length=64, low_freq_factor=1, high_freq_factor=4
    ),
    "longrope": LongRope(
        short_factor=ONES, long_factor=ONES, original_length=64, factor=1
    ),
    "proportional": Proportional(),
}


@pytest.mark.parametrize("precision", ["parity", "accurate"])
@pytest.mark.parametrize("name", ROPE_TYPES)
def test_factor_one_is_no_scaling(name: str, precision: Any) -> None:
    """But for the rounding of f (1 - w) + f w, in yarn and llama3: 2 ulp of f."""
    rope = plain(scaling=UNSCALED[name], precision=precision)
    positions = np.arange(4096)
    got = table(rope, positions, length=4096)
    want = table(plain(precision=precision), positions)
    if precision == "accurate":
        assert errors(got, want).max() <= ULP
    elif name in ("yarn", "llama3"):
        angle = positions[:, None] * np.asarray(plain().frequencies(None)[0])
        assert (errors(got, want) <= angle * 3 * ULP + ULP).all()
    else:
        assert_same(got, want)


def test_yarn_mscale_counts_only_with_mscale_all_dim() -> None:
    base = Yarn(factor=40, original_length=4096)
    alone = dataclasses.replace(base, mscale=0.5)
    both = dataclasses.replace(base, mscale=0.7, mscale_all_dim=0.7)
    scalings = [plain(scaling=m).frequencies(None)[1] for m in (base, alone, both)]
    assert scalings[0] == scalings[1] == pytest.approx(1 + 0.1 * np.log(40))
    assert scalings[2] == 1.0


# What is refused

LLAMA3 = {"factor": 8, "original_length": 64}
BAD_METHODS: list[tuple[Any, dict[str, Any], str]] = [
    *(
        (Linear, {"factor": x}, r"factor: got .*a number, at least 1")
        for x in BAD_NUMBERS
    ),
    *(
        (kind, {"factor": x, **more}, r"factor: got .*, want a number, at least 1")
        for kind, more in (
            (Linear, {}),
            (NTKAware, {}),
            (Yarn, {"original_length": 64}),
            (
                Llama3,
                {"original_length": 64, "low_freq_factor": 1, "high_freq_factor": 4},
            ),
        )
        for x in (0, 0.5, 1e-30)
    ),
    (DynamicNTK, {"factor": -2, "original_length": 64}, r"factor: got -2"),
    (
        DynamicNTK,
        {"factor": 0.5, "original_length": 64},
        r"factor: got 0.5.*at least 1",
    ),
    *(
        (
            DynamicNTK,
            {"factor": 2, "original_length": x},
            r"original_length: got .*want a positive integer",
        )
        for x in (0, -4096, 4096.0, True, "4096", None)
    ),
    (Yarn, {"factor": 0, "original_length": 64}, r"factor: got 0"),
    (Yarn, {"factor": 2, "original_length": 0}, r"original_length: got 0"),
    *(
        (Yarn, {"factor": 2, "original_length": 64, **bad}, message)
        for bad, message in (
            ({"attention_factor": 0}, r"attention_factor: got 0"),
            ({"mscale": -1}, r"mscale: got -1"),
            ({"mscale_all_dim": "1"}, r"mscale_all_dim: got '1'"),
            ({"truncate": "false"}, r"truncate: got 'false', want a boolean"),
            ({"beta_slow": 0}, r"beta_slow: got 0"),
            ({"beta_fast": float("nan")}, r"beta_fast: got nan"),
            ({"beta_fast": 1, "beta_slow": 32}, r"beta_fast: got 1.*beta_slow \(32\)"),
            ({"beta_fast": 2, "beta_slow": 2}, r"beta_fast: got 2.*more than"),
        )
    ),
    *(
        (DynamicYarn, {"original_length": 64, **bad}, message)
        for bad, message in (
            ({"factor": 0.5}, r"factor: got 0.5, want a number, at least 1"),
            ({"factor": True}, r"factor: got True"),
            ({"original_length": 0}, r"original_length: got 0"),
            ({"beta_slow": -1}, r"beta_slow: got -1"),
            ({"beta_fast": 1}, r"beta_fast: got 1, want more than beta_slow \(1.0\)"),
        )
    ),
    *(
        (Llama3, {**LLAMA3, "low_freq_factor": low, "high_freq_factor": high}, message)
        for low, high, message in (
            (4, 4, r"high_freq_factor: got 4.*more than low_freq_factor \(4\)"),
            (4, 1, r"high_freq_factor: got 1"),
            (0, 4, r"low_freq_factor: got 0"),
            (1, float("inf"), r"high_freq_factor: got inf"),
        )
    ),
    *(
        (LongRope, {**LISTS, "factor": 2, **bad}, message)
        for bad, message in (
            ({"short_factor": (1, 0)}, r"short_factor\[1\]: got 0, want a number > 0"),
            ({"long_factor": ("a",)}, r"long_factor\[0\]: got 'a'"),
            ({"factor": None}, r"factor: got None, want given when attention_factor"),
            ({"factor": -1}, r"factor: got -1"),
            ({"attention_factor": 0}, r"attention_factor: got 0"),
            ({"original_length": 1.5}, r"original_length: got 1.5"),
        )
    ),
    (
        Proportional,
        {"partial_rotary_factor": 1.5},
        r"partial_.*got 1.5, want at most 1",
    ),
    (Proportional, {"partial_rotary_factor": 0}, r"partial_rotary_factor: got 0"),
    (Proportional, {"factor": 0}, r"factor: got 0"),
]


@pytest.mark.parametrize("method, fields, message", BAD_METHODS)
def test_method_says_what_is_wrong(
    method: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(JropeError, match=message):
        method(**fields)
