#!/usr/bin/env bash
# outlines_core 0.2.14: where a text may end and may also go on with another part of the
# expression, its Index knows the end alone.
#
# Seen: the Guide of an Index of (ab)+ is finished after "ab", and offers nothing but the
# end token: "abab", which the expression matches, cannot be written.  The same for the
# JSON numbers of build_regex_from_schema('{"type": "number"}'): after "1" there is no
# ".", so 1.5 and 1e+5 are out of reach; more digits may follow.  With something that has
# to come after it, (ab)+! or a number within an object, the texts are all there.
#
# It matters where an answer as a whole is a number, or any expression that ends in an
# optional or repeated group: what a model writes is cut to the shorter text, in silence.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check outlines_core==0.2.14

cat > "$folder/see.py" <<'PY'
from outlines_core import Guide, Index, Vocabulary
from outlines_core.json_schema import build_regex_from_schema

letters = Vocabulary(255, {bytes([byte]): [byte] for byte in range(255)})


def reached(regex, text):
    """How much of the text can be written."""
    guide = Guide(Index(regex, letters))
    for at, byte in enumerate(text.encode()):
        if byte not in guide.get_tokens():
            return text[:at]
        guide.advance(byte)
    return text if guide.is_finished() or 255 in guide.get_tokens() else text + "?"


number = build_regex_from_schema('{"type": "number"}')
one = build_regex_from_schema(
    '{"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}'
)
seen = [
    reached("(ab)+", "abab"),
    reached("(ab)+!", "abab!"),
    reached(number, "1.5"),
    reached(number, "12"),
    reached(one, '{"x":1.5}'),
]
print("outlines_core 0.2.14:", seen)
want = ["ab", "abab!", "1", "12", '{"x":1.5}']
raise SystemExit(0 if seen == want else "the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/see.py"
