"""A file of rows looked through before anything is generated."""

from collections import Counter
from dataclasses import dataclass, field
from typing import final

from jrope.batch.rows import BatchSettings, Row, read_row
from jrope.batch.source import Line, Source
from jrope.errors import RowError

_FEW = 5


@final
@dataclass
class Inspection:
    """What the rows of a file ask for.

    Args:
      forms: good rows of each form.
      bad: rows with errors.
      problems: the first few of them.
      passed: fields of plain rows that their answers repeat, in how many rows.
      prompt_tokens: of all rows.
      new_tokens: at most.
      longest: tokens of the longest row, prompt and new ones.
      structured: good rows whose answers have a form.
    """

    forms: Counter[str] = field(default_factory=Counter[str])
    bad: int = 0
    problems: list[str] = field(default_factory=list[str])
    passed: Counter[str] = field(default_factory=Counter[str])
    prompt_tokens: int = 0
    new_tokens: int = 0
    longest: int = 0
    structured: int = 0


def inspect_rows(source: Source, settings: BatchSettings) -> Inspection:
    """Read every row as a run would, and count.

    Raises:
      JropeError: a custom_id is given twice.
    """
    found = Inspection()
    source.index()
    for line in source.mine():
        try:
            _count(found, read_row(line, settings))
        except RowError as error:
            found.bad += 1
            if len(found.problems) < _FEW:
                found.problems.append(f"{_name(line)}: {error}")
    return found


def _count(found: Inspection, row: Row) -> None:
    n = row.request.n
    found.forms[row.form] += 1
    found.structured += row.structure is not None
    found.passed.update({*row.extra} - {"custom_id"})
    found.prompt_tokens += sum(map(len, row.prompts))
    found.new_tokens += n * sum(row.limits)
    pairs = zip(row.prompts, row.limits, strict=True)
    found.longest = max(found.longest, *(len(p) + limit for p, limit in pairs))


def _name(line: Line) -> str:
    name = "" if line.custom_id is None else f" ({line.custom_id})"
    return f"line {line.number}{name}"
