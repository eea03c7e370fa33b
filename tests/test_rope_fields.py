"""Every field of `Rope` counts, and what is wrong is said."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from rope_cases import BAD_NUMBERS, LISTS, errors, plain, random_array

from jrope.errors import JropeError
from jrope.rope import (
    DynamicNTK,
    DynamicYarn,
    Linear,
    LongRope,
    NTKAware,
    Rope,
    Yarn,
    describe,
    half_to_interleaved,
    interleaved_to_half,
    rotate,
    table,
)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "default"),
        ({"theta": 5e5, "rotary_dim": 8}, "default"),
        ({"condense": 2.5}, "default of positions / 2.5"),
        (
            {"scaling": Yarn(factor=4.0, original_length=131072), "condense": 8},
            "yarn:factor=4,original_length=131072 of positions / 8",
        ),
        (
            {"scaling": Yarn(factor=2, original_length=64, truncate=False)},
            "yarn:factor=2,original_length=64,truncate=false",
        ),
        (
            {
                "scaling": LongRope(
                    short_factor=(1.5,) * 8,
                    long_factor=(2,) * 8,
                    original_length=64,
                    factor=4,
                )
            },
            "longrope:short_factor=(8 numbers),long_factor=(8 numbers),"
            "original_length=64,factor=4",
        ),
        (
            {
                "rotary_dim": 4,
                "scaling": LongRope(
                    short_factor=(1, 1.5),
                    long_factor=(2, 4),
                    original_length=64,
                    attention_factor=1.25,
                ),
                "lengths": "growing",
                "precision": "accurate",
                "layout": "interleaved",
            },
            "longrope:short_factor=1:1.5,long_factor=2:4,original_length=64,"
            "attention_factor=1.25, interleaved, accurate, growing lengths",
        ),
    ],
)
def test_a_name_tells_all_that_is_not_at_its_default(
    fields: dict[str, Any], name: str
) -> None:
    assert describe(plain(**fields)) == name


def test_every_field_of_rope_matters() -> None:
    changes = {"theta": 20000.0, "scaling": Linear(factor=2), "condense": 2.0}
    before = table(plain(), np.arange(64))
    for field, value in changes.items():
        after = table(plain(**{field: value}), np.arange(64))
        assert errors(after, before).max() > 1e-3, field
    assert table(plain(rotary_dim=8), np.arange(64))[0].shape == (64, 4)
    far = np.array([2**20])
    accurate = plain(rotary_dim=128, precision="accurate")
    assert errors(table(plain(rotary_dim=128), far), table(accurate, far)).max() > 1e-3
    q, pair = random_array(64, 2, 16), before
    assert errors(rotate(q, *pair), rotate(q, *pair, layout="interleaved")).max() > 0.1
    known = {*changes, "rotary_dim", "precision", "layout"}
    known |= {"lengths"}  # the model's matter: tests/test_growing.py
    assert known == {field.name for field in dataclasses.fields(Rope)}


@pytest.mark.parametrize(
    "fields, message",
    [
        *(({"theta": x}, r"theta: got .*a number > 1 and < 1e30") for x in BAD_NUMBERS),
        ({"theta": 1.0}, r"theta: got 1.0, want a number > 1 and < 1e30"),
        *(
            ({"rotary_dim": x}, r"rotary_dim: got .*want a positive even integer")
            for x in (0, 7, -2, 16.0, True, None)
        ),
        ({"scaling": "yarn"}, r"scaling: got 'yarn', want None or one of Linear, NTK"),
        ({"scaling": Linear}, r"scaling: got <class"),
        *(({"condense": x}, r"condense: got .*number > 0") for x in BAD_NUMBERS),
        ({"layout": "meta"}, r"layout: got 'meta', want one of .'half', 'interleaved"),
        ({"precision": "fast"}, r"precision: got 'fast', want one of .'parity', 'acc"),
        ({"lengths": "grow"}, r"lengths: got 'grow', want one of .'planned', 'growing"),
        ({"lengths": "growing"}, r"got 'growing', want 'planned': plain RoPE does not"),
        (
            {"lengths": "hf", "scaling": Linear(factor=2)},
            r"lengths: got 'hf', want 'planned': Linear does not depend on the length",
        ),
        (
            {"lengths": "hf", "scaling": DynamicYarn(original_length=8)},
            r"want 'planned' or 'growing': transformers has no DynamicYarn",
        ),
        (
            {"rotary_dim": 2, "scaling": NTKAware(factor=2)},
            r"rotary_dim: got 2, want more than 2",
        ),
        (
            {"rotary_dim": 2, "scaling": DynamicNTK(factor=2, original_length=8)},
            r"rotary_dim: got 2, want more than 2",
        ),
        (
            {"scaling": LongRope(**dict(LISTS, short_factor=(1, 2)), factor=2)},
            r"short_factor: got '2 numbers', want 8 numbers",
        ),
        (
            {"scaling": LongRope(**dict(LISTS, long_factor=(1, 2)), factor=2)},
            r"long_factor: got '2 numbers', want 8 numbers",
        ),
    ],
)
def test_rope_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(JropeError, match=message):
        plain(**fields)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_positions_must_be_integers(dtype: str) -> None:
    with pytest.raises(JropeError, match=rf"positions: got {dtype}, want integers"):
        table(plain(), np.zeros(3, dtype))


@pytest.mark.parametrize(
    "shape, heads, rotary_dim", [((10,), 3, None), ((6,), 2, None), ((8,), 2, 6)]
)
def test_permutation_says_what_is_wrong(
    shape: tuple[int, ...], heads: int, rotary_dim: int | None
) -> None:
    for permute in (interleaved_to_half, half_to_interleaved):
        message = rf"axis 0: got .*channels.*, want heads \({heads}\) times"
        with pytest.raises(JropeError, match=message):
            permute(np.zeros(shape), heads, rotary_dim=rotary_dim)
