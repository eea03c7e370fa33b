"""Forms as tables: each made once, in a process of its own, for the bytes of tokens."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from batch_file_helpers import settings
from cli_helpers import SIZE, fast
from structure_helpers import EOS, TOKENS, drawn, table_of, text_of
from tokenizers import Tokenizer, decoders, models

import jrope.forms.automaton
import jrope.forms.cache
import jrope.forms.structure
from jrope.batch.rows import BatchSettings
from jrope.batch.text import decode
from jrope.errors import RowError
from jrope.forms.automaton import Automata
from jrope.forms.cache import Forms
from jrope.forms.spelling import token_bytes
from jrope.forms.structure import Structure


def formed(own: Forms, regex: str, stop_ids: Any = ()) -> Structure:
    """Of a row that asks for an expression."""
    found = own.of({"structured_outputs": {"regex": regex}}, stop_ids, lambda: TOKENS)
    assert found is not None
    return found


def test_equal_forms_share_a_table(monkeypatch: Any) -> None:
    own = Forms()
    assert own.of({"prompt": "a"}, (), lambda: [][0]) is None
    one = formed(own, "a+", (EOS,))
    assert formed(own, "a+") is one  # EOS is no text
    letter = TOKENS.index(b"a")
    other = formed(own, "a|b", (letter, EOS, letter))  # an id that ends answers
    assert other is not formed(own, "a|b")
    assert other.table[0, other.classes[letter]] == -1
    tables = [
        own.of({"structured_outputs": {"json": {"enum": [order]}}}, (), lambda: TOKENS)
        for order in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    ]
    assert tables[0] is not tables[1], "the order of properties counts"
    for _ in range(2):  # of which the second is not made again
        with pytest.raises(RowError, match="regex: no text of the vocabulary's tok"):
            formed(own, "ab", (letter,))
        monkeypatch.setattr(own, "_automata", None)
    assert formed(own, "a+") is one
    monkeypatch.undo()
    monkeypatch.setattr(jrope.forms.cache, "_KEPT", 1)
    assert formed(own, "a{9}") is formed(own, "a{9}")
    assert len(own._made) == 1 and formed(own, "a+") is not one


def test_tables_without_end_are_refused() -> None:
    tokens = b"", b"a", b"ab", b"b\xc3"
    with pytest.raises(RowError, match="it: no text of the vocabulary's tokens, wi"):
        table_of("a+é", (), tokens)
    made = table_of("a*ab|abé", (), tokens)  # where é cannot come, nor its first byte
    texts = {text_of(drawn(made, i) or [], tokens) for i in range(30)}
    assert texts > {"ab", "aab"}
    with pytest.raises(RowError, match="it: the empty text alone has this form"):
        table_of("(?:)")
    with pytest.raises(RowError, match="it: outlines_core cannot compile it: it match"):
        table_of(r"a[^\s\S]")


def test_large_tables_are_refused_with_their_numbers(monkeypatch: Any) -> None:
    monkeypatch.setattr(jrope.forms.automaton, "STATES", 5)
    with pytest.raises(RowError, match="it: it takes 10 states, want 5 at") as told:
        Automata().of("it", "a{9}")
    assert told.value.code == "too_long"
    monkeypatch.undo()
    monkeypatch.setattr(jrope.forms.structure, "ENTRIES", 25)
    with pytest.raises(RowError, match="it takes 10 states and more than 3 classes of"):
        table_of("[a]{9}")


# --- the process


def test_one_process_makes_all_and_knows_no_jax() -> None:
    own = Automata()
    made = own.of("it", "ab|[0-9]+")
    assert made.states == 4 and made.accepting.sum() == 2
    process = own._process
    assert process is not None
    own.of("it", "b")
    with pytest.raises(RowError, match="outlines_core cannot compile it: "):
        own.of("it", "(?=a)")
    assert own._process is process and process.poll() is None
    if sys.platform == "linux":
        maps = Path(f"/proc/{process.pid}/maps").read_text("utf-8")
        assert "outlines_core" in maps and "jaxlib" not in maps and "numpy" not in maps
        assert os.getsid(process.pid) != os.getsid(0), "Ctrl-C reaches it"
    del own
    assert process.returncode is not None, "left behind"


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")
def test_an_expression_may_not_take_all_memory() -> None:
    own = Automata(memory=2**20)  # which is less than any takes
    told = "it: outlines_core ended, as it does where it needs more than 1,048,576 by"
    for _ in range(2):
        with pytest.raises(RowError, match=told) as error:
            own.of("it", "[a-z]{1,2000}")
        assert error.value.code == "too_long" and own._process.poll() is not None
    own._memory = 2**30
    assert own.of("it", "a").states == 2, "not begun anew"


def test_an_expression_may_not_take_all_day() -> None:
    own = Automata(seconds=0.0)
    with pytest.raises(RowError, match="it: outlines_core took more than 0 s: give"):
        own.of("it", "a")
    own._seconds = 60.0
    assert own.of("it", "a").states == 2


def test_an_answer_that_nobody_waited_for_is_nobodys(monkeypatch: Any) -> None:
    own = Automata()

    def interrupted(process: Any, regex: str) -> Any:
        process.stdin.write(json.dumps(regex).encode() + b"\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jrope.forms.automaton, "_asked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            own.of("it", "a")
    assert own.of("it", "aa").states == 3


def test_a_process_that_was_ended_is_begun_anew() -> None:
    own = Automata()
    own.of("it", "a")
    own._process.kill()
    own._process.wait()
    assert own.of("it", "a").states == 2


def test_without_outlines_core_a_row_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(RowError, match=r'package outlines_core; pip install "jrope\['):
        Automata().of("it", "a")


# --- tokens


def test_tokens_of_bytes() -> None:
    given = settings()
    found = token_bytes(given.tokenizer, given.config)
    letters = given.tokenizer.backend_tokenizer
    for text in ("é😀日 \n~", "\x00\x7f\xad"):
        ids = letters.encode(text).ids
        assert b"".join(found[id] for id in ids).decode() == text
    assert found[256:] == [b""] * (SIZE - 256)  # special ones, and those of no token
    config = dataclasses.replace(given.config, eos_token_id=(65,), vocab_size=300)
    assert found[65] and not token_bytes(given.tokenizer, config)[65]
    given.tokenizer.add_tokens(["Ġa", "  b", "Ġ日", "<b>"])
    as_decoded(given, token_bytes(given.tokenizer, config), [*range(261, 265)])


def as_decoded(given: BatchSettings, found: list[bytes], ids: list[int]) -> None:
    """Compare with what the tokenizer makes of these behind another one."""
    first = found.index(b"a") if b"a" in found else found.index(b" a")
    for id in ids:
        assert found[id] == decode(given.tokenizer, [first], [id]).encode() != b"", id


def sentencepiece() -> BatchSettings:
    words = {"<s>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "▁a": 4, "é▁": 5}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return settings(tokenizer=fast(tokenizer))


def test_tokens_of_sentencepiece() -> None:
    given = sentencepiece()
    found = token_bytes(given.tokenizer, given.config)
    assert found[:6] == [b"", b"", b"\xc3", b"\xa9", b" a", "é ".encode()]
    as_decoded(given, found, [4, 5])
    made = table_of("é* a", (), tuple(found))
    assert {text_of(drawn(made, i) or [], found) for i in range(9)} >= {" a", "é a"}
    given.tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    as_decoded(given, token_bytes(given.tokenizer, given.config), [2, 4, 5])


def test_other_tokens_are_refused() -> None:
    given = sentencepiece()
    given.tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(RowError, match="got a tokenizer that decodes by WordPiece"):
        token_bytes(given.tokenizer, given.config)
