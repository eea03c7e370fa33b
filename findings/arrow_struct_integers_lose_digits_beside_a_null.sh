#!/usr/bin/env bash
# pyarrow 26.0.1, pandas 3.1.1: one null among the integers inside of structs or lists makes
# floats of all the others in to_pandas(), also where the columns' own integers are kept.
#
# Seen: a struct column with the seeds 2^53 + 1 and null gives {'seed': 9007199254740992.0}
# and {'seed': None}: the number is another one, its null is None and not NaN.  In a list it
# is [9007199254740992.0] and [nan].  With types_mapper={int64: Int64Dtype()}.get the plain
# column is exact and the two nested ones are not.  integer_object_nulls=True, which is told
# of columns, and ArrowDtype keep all three.
#
# It matters where sampling parameters of a row stand in a struct: max_tokens comes as 16.0
# in every row once one row leaves it out, and a seed of 64 bits is changed in silence.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  pyarrow==26.0.1 pandas==3.1.1

cat > "$folder/see.py" <<'PY'
import math

import pandas as pd
import pyarrow as pa

seed = 2**53 + 1
table = pa.table(
    {
        "column": pa.array([seed, None], pa.int64()),
        "struct": pa.array([{"seed": seed}, {"seed": None}]),
        "list": pa.array([[seed], [None]]),
    }
)
ways = {
    "as it is": {},
    "Int64Dtype": {"types_mapper": {pa.int64(): pd.Int64Dtype()}.get},
    "ArrowDtype": {"types_mapper": pd.ArrowDtype},
    "integer_object_nulls": {"integer_object_nulls": True},
}
seen = {}
for name, how in ways.items():
    frame = table.to_pandas(**how)
    first = frame["column"][0], frame["struct"][0]["seed"], frame["list"][0][0]
    seen[name] = [int(number) == seed for number in first]
    print(name, *first, "null:", frame["struct"][1]["seed"], frame["list"][1][0])
plain = table.to_pandas()
nulls = plain["struct"][1]["seed"], plain["list"][1][0]
want = {
    "as it is": [False, False, False],
    "Int64Dtype": [True, False, False],
    "ArrowDtype": [True, True, True],
    "integer_object_nulls": [True, True, True],
}
same = seen == want and nulls[0] is None and math.isnan(nulls[1])
raise SystemExit(0 if same else "the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/see.py"
