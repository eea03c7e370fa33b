"""Answer prompts on a Ray cluster; the same command goes on with what is missing.

    python examples/ray_batch.py FOLDER prompts.jsonl answers/

Rows have a `custom_id` of their own.  Ray computes a block again where a machine has
died, and a block that was written may come twice: whoever reads keeps one row of each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from jrope.integrations.ray import ERROR, JropePredictor


def answers_in(output: Path) -> dict[str, dict[str, Any]]:
    """One row for each custom_id, answered rather than failed."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(output.glob("*.json")):
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            if row[ERROR] is None or row["custom_id"] not in found:
                found[row["custom_id"]] = row
    return found


def answer(
    source: Path,
    output: Path,
    options: dict[str, Any],
    *,
    stage: type = JropePredictor,
    batch_size: int = 256,  # several times the rows that are computed at once
    actors: int = 2,
    gpus: int = 0,
) -> None:
    done = {name for name, row in answers_in(output).items() if row[ERROR] is None}
    rows = ray.data.read_json(str(source.resolve()))
    answers = rows.filter(lambda row: row["custom_id"] not in done).map_batches(
        stage,
        fn_constructor_kwargs=options,
        batch_size=batch_size,
        compute=ActorPoolStrategy(min_size=1, max_size=actors),
        num_gpus=gpus,
    )
    answers.write_json(str(output.resolve()))


if __name__ == "__main__":
    folder, source, output = map(Path, sys.argv[1:])
    answer(source, output, {"folder": folder.resolve()})
    rows = answers_in(output).values()
    print(f"{sum(row[ERROR] is None for row in rows)} of {len(rows)} rows answered")
