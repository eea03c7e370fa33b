#!/usr/bin/env bash
# msgpack 1.1.2: Unpacker(max_buffer_size=0) stops at 2**31 - 1 bytes; its documentation
# says that 0 means 2**32 - 1, which is what the format's bin 32 holds.
#
# Seen: a valid byte string of 2**31 bytes, read from a file object, raises BufferFull
# with max_buffer_size=0 and is read with max_buffer_size=2**32.
#
# It matters for EasyLM's checkpoint streams, whose loader passes max_buffer_size=0: one
# record of a model with stacked layers (LWM 7B's w1 in bfloat16: 2.9 GB) is beyond it.
# Needs about 7 GiB of memory.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check msgpack==1.1.2

"$folder/venv/bin/python" - <<'PY'
import msgpack

SIZE = 2**31


class Stream:
    """A file that holds one byte string of zeros, in msgpack's bin 32."""

    def __init__(self):
        self.head, self.left = b"\xc6" + SIZE.to_bytes(4, "big"), SIZE

    def read(self, n):
        if self.head:
            head, self.head = self.head, b""
            return head
        n = min(n, self.left)
        self.left -= n
        return bytes(n)


def answer(limit):
    unpacker = msgpack.Unpacker(Stream(), read_size=2**26, max_buffer_size=limit)
    try:
        return f"{len(unpacker.unpack())} bytes"
    except Exception as error:
        return type(error).__name__


documented = "0 means 2**32-1" in msgpack.Unpacker.__doc__
print("msgpack", msgpack.version, msgpack.Unpacker.__module__)
print("documented as 2**32-1:", documented)
seen = {limit: answer(limit) for limit in (0, 2**32)}
for limit, text in seen.items():
    print(f"a byte string of {SIZE}, max_buffer_size={limit}: {text}")
assert documented
assert seen == {0: "BufferFull", 2**32: f"{SIZE} bytes"}
PY
