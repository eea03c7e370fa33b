"""The page of an evaluation: what the records say, and nothing else."""

import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from lab_report_helpers import (
    CONTEXTS,
    HEADER,
    LOSSES,
    NASTY,
    TO,
    bare,
    everything,
    failure,
    legend,
    lines,
    loss,
    parsed,
    passkey,
    rows,
)
from lab_report_helpers import page as page

from jrope.errors import JropeError
from jrope.lab.figures import figures, to_svg
from jrope.lab.findings import headline, sentences
from jrope.lab.report import render, write_report
from jrope.lab.results import Loss, Results, perplexity


def test_page_is_self_contained_and_strict(page):
    tree = parsed(page)
    for node in tree.iter():
        for name, value in node.attrib.items():
            assert "://" not in value, (node.tag, name)
            assert not name.startswith("on")
            if name.endswith(("src", "href")):
                assert value.startswith("#")
    assert not {"script", "link", "iframe", "img"} & {node.tag for node in tree.iter()}
    assert "@import" not in page and "url(http" not in page
    ids = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(ids) == len({*ids})
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert used and {*used} <= {*ids}


def test_pictures_are_told_and_follow_the_reader(page):
    boxes = [node for node in parsed(page).iter("div") if node.get("role") == "img"]
    assert [node.get("class") for node in boxes] == ["wide", "narrow"] * 5
    for box in boxes:
        assert box.get("aria-label").endswith(". The numbers are in the tables.")
        (svg,) = box
        words = {"".join(text.itertext()) for text in svg.iter("text")}
        assert {"default", "yarn:2"} <= words
    assert "prefers-color-scheme: dark" in page and "max-width: 46rem" in page


def test_tables_hold_every_number(page):
    head, *body = rows(page, "Perplexity of the first tokens")
    assert head == ["method", "128", "256", "1,024"]
    assert [row[0] for row in body] == ["default", "yarn:2"]
    assert body[0][1] == f"★ 25.79\n24.53{TO}27.11"
    assert body[1][3] == f"★ 27.39\n26.05{TO}28.79"
    assert body[0][3].startswith(f"{math.exp(5.0):.1f}")
    _, *body = rows(page, "Mean negative log-likelihood")
    want = ["default", "first", "128", "", "777", "3.250", "3.200", "3.300", "25.79"]
    assert body[0] == [*want, "1.2", ""] and len(body) == 6
    head, *body = rows(page, "by position in windows")
    assert head == ["method", "0 to 63", "64 to 127", "128 to 255", "512 to 1,023"]
    assert body[1][4] == f"3.685\n3.635{TO}3.735"
    head, *body = rows(page, "Passkeys found")
    assert head == ["method", "depth", "128", "256", "1,024"]
    assert body[2] == ["yarn:2", "25%", *["7 of 10"] * 3]
    _, *body = rows(page, "Wavelengths in tokens")
    ends = (f"{2 * math.pi * 3:.2f}", f"{2 * math.pi * 6 * 10000 ** (30 / 32):,.0f}")
    scaling = f"{0.1 * math.log(2) + 1:.4f}"
    assert body[1] == ["yarn:2", "1,024", "3", scaling, *ends, "16", "12"]
    _, *body = rows(page, "Mean attention score")
    assert body[0][:3] == ["default", "3.000", "2.700"]
    _, *body = rows(page, "that failed")
    assert body == [["linear:2", failure("x")["error"], "perplexity", "4,096"]]
    assert rows(page, "Texts")[1] == ["emma.txt", "220,000", "ab" * 32]
    facts = ("Some Device", "bfloat16", "jax 0.10.2", HEADER["started"])
    for fact in (*facts, "256 tokens", "tokens 400, seed 0"):
        assert f"<dd>{fact}</dd>" in page


def test_tables_scroll_and_have_heads(page):
    for table in parsed(page).iter("table"):
        scopes = [cell.get("scope") for cell in table.iter("th")]
        columns = len(table.findall("thead/tr/th"))
        assert scopes[:columns] == ["col"] * columns
        assert {*scopes[columns:]} == {"row"}
        assert len({len([*row]) for row in table.iter("tr")}) == 1


def test_whatever_comes_from_records_is_escaped():
    records = [
        {**r, "label": NASTY} if r.get("rope") == "yarn:2" else r for r in everything()
    ]
    page = bare(records)
    drawn = figures(records)
    for name in ("perplexity_first", "passkey"):
        svg = to_svg(drawn[name])
        assert "<script" not in svg and "&lt;script&gt;" in svg
    assert "<script" not in page and "\x00" not in page
    tree = parsed(page)
    clean = NASTY.translate({0: "\ufffd", 0x1B: "\ufffd"})
    found = ["".join(node.itertext()) for node in tree.iter("th")]
    assert clean in found
    assert tree.find("head/title").text == "tiny & <small>: RoPE methods compared"
    assert HEADER["command"] in ["".join(n.itertext()) for n in tree.iter("code")]
    HTMLParser().feed(page)


def test_headline_counts_and_says_overlaps():
    def told(gap, half=0.05, contexts=(512, 1024), **more):
        pairs = {"a": 3.2, "b": 3.2 + gap}
        many = [loss(r, c, n, half, **more) for r, n in pairs.items() for c in contexts]
        return headline(Results.of([HEADER, *many]))

    best = "a has the lowest perplexity at both contexts past the trained length."
    assert told(0.2) == told(0.09, None) == best
    assert told(0.09) == (
        f"{best} At both contexts the intervals of the best two overlap."
    )
    assert "at the one context past the trained" in told(0.2, contexts=(64, 512))
    assert (
        told(0.2, contexts=(64,)) == "a has the lowest perplexity at the one context."
    )
    assert told(0.0, None).startswith("a and b share the lowest perplexity at both")


def test_headline_of_a_draw_and_of_two_kinds_of_windows():
    records = [HEADER]
    for i, rope in enumerate("ab"):
        records += [loss(rope, c, 3.2 + abs(i - j)) for j, c in enumerate((512, 1024))]
    said = headline(Results.of(records))
    assert said.startswith("a and b each have the lowest perplexity at 1 of 2 contexts")
    records += [loss(r, 512, n, windows="sliding") for r, n in (("a", 9.0), ("b", 3.0))]
    said = headline(Results.of(records))
    assert said == (
        "b has the lowest perplexity at the one context past the trained length "
        "(in sliding windows)."
    )


def test_sentences_name_the_best_at_each_context():
    said = sentences(Results.of(everything()))
    assert said[0] == (
        "At 128 tokens: default, perplexity 25.79 (24.53 to 27.11); "
        "its interval overlaps with that of yarn:2."
    )
    assert said[2] == (
        "At 1,024 tokens: yarn:2, perplexity 27.39 (26.05 to 28.79); "
        "no other interval reaches it."
    )
    assert said[3] == "Passkeys at lengths past 256: yarn:2 found most, 14 of 20."
    assert said[4] == "1 measurement failed; they are listed below."


def test_without_intervals_the_gap_is_said():
    records = [HEADER, loss("a", 512, 3.2, None), loss("b", 512, 3.25, None)]
    (said,) = sentences(Results.of(records))
    assert said == (
        "At 512 tokens: a, perplexity 24.53 (no interval known); b follows 0.050 nats "
        "behind."
    )


def test_intervals_overlap_or_nobody_knows():
    a, b = (Loss(nll=n, low=n - 0.1, high=n + 0.1) for n in (3.0, 3.15))
    far, bare = Loss(nll=4.0, low=3.9, high=4.1), Loss(nll=3.0, low=None, high=None)
    assert a.overlaps(b) and b.overlaps(a)
    assert a.overlaps(far) is False
    assert a.overlaps(bare) is bare.overlaps(a) is None


@pytest.mark.parametrize(
    "nll", [math.nan, math.inf, None, 1000.0], ids=["nan", "inf", "null", "huge"]
)
def test_losses_that_are_not_finite_are_shown_as_such(nll):
    odd = {**loss("yarn:2", 1024, 3.0), "nll": nll, "low": None, "high": None}
    records = [HEADER, loss("default", 1024, 3.0), odd]
    page = bare(records)
    word = "NaN" if nll is None or math.isnan(nll) else "inf"
    assert rows(page, "Perplexity of the first tokens")[2] == ["yarn:2", word]
    drawn = figures(records)["perplexity_first"]
    (line,) = (x for name, x in lines(drawn).items() if name.startswith("yarn:2"))
    assert np.isnan(line.get_ydata()).all()
    assert "yarn:2\n1 not finite, not drawn" in legend(drawn)
    assert perplexity(1e6) == math.inf


@pytest.mark.parametrize("width", [9.2, 3.7])
def test_pages_of_little_and_of_nothing(width):
    alone = [HEADER, loss("a", 512, 3.2, None)]
    assert {*figures(alone, width=width)} == {"perplexity_first", "positions_first"}
    flat = [HEADER, {**loss("a", 512, 3.2), "buckets": []}]
    assert {*figures(flat, width=width)} == {"perplexity_first"}
    assert "Loss by position" not in bare(flat)
    assert figures([HEADER], width=width) == {}
    lost = [HEADER, loss("a", 512, math.nan)]
    assert legend(figures(lost, width=width)["perplexity_first"]) == [
        "trained: 256",
        "a\n1 not finite, not drawn",
    ]
    assert figures([HEADER, failure("a")], width=width) == {}


def test_headlines_without_a_winner():
    def told(*records):
        return headline(Results.of([HEADER, *records]))

    assert told(loss("a", 512, 3.2)).startswith("a was measured alone")
    lost = loss("a", 512, math.nan), loss("b", 512, math.inf)
    assert told(*lost) == "No perplexity that was measured is a finite number."
    assert told(failure("a")) == "Nothing was measured: every attempt failed."
    assert told(passkey("a", 512, 0.5, 1)).startswith("No perplexity was measured;")
    assert told() == "Nothing was measured yet."


def test_page_without_the_trained_length_or_texts():
    header = {**HEADER, "trained_length": None, "texts": []}
    records = [header, loss("a", 512, 3.2), passkey("a", 512, 0.5, 1)]
    page, drawn = bare(records), figures(records)
    assert "<dd>unknown</dd>" in page and "Texts" not in page
    assert [*lines(drawn["perplexity_first"])] == legend(drawn["perplexity_first"])
    assert legend(drawn["perplexity_first"]) == ["a"]
    assert not drawn["passkey"].axes[0].get_lines()


def test_two_kinds_of_windows_have_their_own_figures_and_tables():
    more = [
        loss(rope, c, 3.0, windows="sliding", stride=c // 2)
        for rope in LOSSES
        for c in CONTEXTS
    ]
    first = [r for r in everything() if r["kind"] == "perplexity"]
    records = [HEADER, *first, *more]
    drawn = figures(records)
    assert {"perplexity_first", "perplexity_sliding"} < {*drawn}
    line = lines(drawn["perplexity_sliding"])["yarn:2"]
    np.testing.assert_allclose(line.get_ydata(), math.exp(3.0))
    page = bare(records)
    assert rows(page, "Perplexity in sliding windows")[1][1].startswith("★ 20.09")
    assert rows(page, "Mean negative")[7][:4] == ["default", "sliding", "128", "64"]


def test_a_later_record_of_the_same_thing_counts():
    results = Results.of([HEADER, loss("a", 512, 9.0), loss("a", 512, 3.0)])
    assert results.loss("first", "a", 512).nll == 3.0


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "got 0 records and no header"),
        ([loss("a", 512, 3.0)], "got 1 records and no header"),
        ([HEADER, {"kind": "perplexty"}], "record 2: kind is 'perplexty', want one of"),
        ([HEADER, {"kind": "distance", "rope": "a"}], "lacks distances, scores"),
    ],
)
def test_bad_records_are_named(records, words):
    with pytest.raises(JropeError, match=re.escape(words)):
        figures(records)
    with pytest.raises(JropeError, match=re.escape(words)):
        render(records)


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    words = rf'need.* {name}, which is missing: pip install "jrope\[lab\]"'
    with pytest.raises(JropeError, match=words):
        write_report([HEADER], tmp_path / "out.html")
    assert [*tmp_path.iterdir()] == []


def test_report_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "out.html"
    assert write_report([HEADER], path) == path
    before = path.read_text("utf-8")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report([HEADER, failure("a")], path)
    monkeypatch.undo()
    assert path.read_text("utf-8") == before
    assert [*tmp_path.iterdir()] == [path]
    records = [HEADER, failure("a")]
    assert write_report(records, path).read_text("utf-8") == render(records)
