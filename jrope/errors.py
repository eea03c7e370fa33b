"""The exceptions that jrope raises for bad input, and the checks that raise them."""

import difflib
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np


class JropeError(ValueError):
    """Bad input: the message says what was got, what was wanted and what to do."""


class RowError(JropeError):
    """What is wrong with one row; the other rows go on.

    Attributes:
      code: the kind of it, a word for programs.
    """

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


def check(good: bool, name: str, got: object, wanted: str) -> None:
    """Raise a JropeError that names the field, its value and what is allowed."""
    if not good:
        raise JropeError(f"{name}: got {got!r}, want {wanted}")


def want(good: bool, name: str, got: object, wanted: str) -> None:
    """Raise a RowError that names the field, its value (shortened) and its range."""
    if not good:
        text = repr(got)
        text = text if len(text) <= 60 else text[:57] + "..."
        raise RowError(f"{name}: got {text}, want {wanted}")


def refuse(names: Sequence[str], why: str = "", where: str = "") -> None:
    """Raise a RowError that names (shortened) what is not served, if there is any."""
    if names:
        shown = ", ".join(name[:40] for name in names[:8])
        raise RowError(f"{where}{shown}: not served{why}", "unsupported")


def is_positive(value: object) -> bool:
    """Whether value is a number above 0 that float32 can hold; booleans are not."""
    return is_number(value) and cast(float, value) > 0


def is_number(value: object) -> bool:
    """Whether value is an int or float that float32 can hold; NaN and bool are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e30 < value < 1e30


def is_integer(value: object, *, at_least: int) -> bool:
    """Whether value is an int of at least `at_least`; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return value >= at_least


def check_positive(owner: object, *names: str) -> None:
    """Raise a JropeError unless each named field of `owner` is a number above 0."""
    for name in names:
        value = getattr(owner, name)
        check(is_positive(value), name, value, "a number > 0 and < 1e30")


def check_count(name: str, value: object, least: int) -> None:
    """Raise a JropeError unless value is an integer of at least `least`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    good = whole and int(cast(int, value)) >= least
    check(good, name, value, f"an integer, at least {least}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word most like this one, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
