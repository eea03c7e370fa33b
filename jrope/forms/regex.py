"""Regular expressions of rows: without the anchors at their ends, and checked.

The syntax is that of Rust's `regex`, which outlines_core compiles; see `automaton`.
"""

import re

from jrope.errors import RowError

LONGEST = 2**22  # characters of an expression
_PIECE = re.compile(
    r"\\[xuUpP]\{[^}]*\}|\{[0-9]+(?:,[0-9]*)?\}"  # \x{20}, and counts
    r"|\\.|\[\^?\]?(?:\\.|\[:\^?[a-z]+:\]|[^\]\\])*\]|.",
    re.DOTALL,
)
_COUNT = re.compile(r"\{([0-9]{1,19})(?:,([0-9]{0,19}))?\}")
_ANCHORS = ("^", "$", *(rf"\{letter}" for letter in "AzZbB"))
_ESCAPED = r'"\\\x00-\x1f'  # what a JSON string holds by an escape alone
_LARGE = (r"\w", r"\W", r"\p", r"\P")  # of hundreds of ranges
_WIDE = (r"\S", r"\D", r"\W")  # which would match such


def literal(text: str) -> str:
    """An expression for this text alone."""
    return "".join(c if c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def one_of(expressions: list[str]) -> str:
    """An expression for what any of these match."""
    return f"(?:{'|'.join(expressions)})"


def whole(name: str, regex: str) -> str:
    """An expression that is to match whole answers, without ^ and $ at its ends.

    Raises:
      RowError: it has anchors elsewhere, or parentheses that do not match.
    """
    return "".join(_pieces(name, regex))


def inside_string(name: str, regex: str) -> str:
    """The same for the inside of a JSON string.

    What would match any character matches those that need no escape.
    """
    return "".join(map(_without_escapes, _pieces(name, regex)))


def check_length(name: str, length: int) -> None:
    """Raise a RowError for an expression that is too long to be looked at."""
    if length > LONGEST:
        what = f"got an expression of {length:,} characters"
        raise RowError(f"{name}: {what}, want {LONGEST:,} at most", "too_long")


def _pieces(name: str, regex: str) -> list[str]:
    check_length(name, len(regex))
    pieces = _PIECE.findall(regex)
    pieces = pieces[1:] if pieces[:1] == ["^"] else pieces
    pieces = pieces[:-1] if pieces[-1:] == ["$"] else pieces
    if found := [anchor for anchor in _ANCHORS if anchor in pieces]:
        why = "not served, save ^ at the beginning and $ at the end"
        raise RowError(f"{name}: {' '.join(found)}: {why}", "unsupported")
    depth = 0
    for piece in pieces:
        depth += {"(": 1, ")": -1}.get(piece, 0)
        if depth < 0:
            break
    if depth:
        raise RowError(f"{name}: {regex!r}: its parentheses do not match")
    return pieces


def size(regex: str) -> int:
    """Characters and classes, each as often as counts repeat it; large classes x 30."""
    groups, last = [0], 0
    for piece in _PIECE.findall(regex):
        if piece == "(":
            groups.append(0)
        elif piece == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif (count := _COUNT.fullmatch(piece)) is not None:
            times = max(int(count[2] or 0), int(count[1]), 1)
            groups[-1] += last * (times - 1)
            last *= times
        else:
            last = 30 if piece[:2] in _LARGE else 1
            groups[-1] += last
    return sum(groups)


def _without_escapes(piece: str) -> str:
    if piece == ".":
        return f"[^{_ESCAPED}]"
    if piece in _WIDE:
        return f"[{piece}&&[^{_ESCAPED}]]"
    is_class = len(piece) > 2 and piece.startswith("[^")
    return f"{piece[:-1]}{_ESCAPED}]" if is_class else piece
