"""The page and the figures of an evaluation: what the records say, and nothing else."""

import math
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from jrope.errors import JropeError
from jrope.lab.drawing import round_numbers, spread
from jrope.lab.figures import figures, save_figures
from jrope.lab.findings import headline, sentences
from jrope.lab.report import render, write_report
from jrope.lab.results import Loss, Results, perplexity
from jrope.lab.style import looks, shorten
from jrope.rope import Rope, Yarn

TO = "\N{EN DASH}"
TRAINED, CONTEXTS = 256, (128, 256, 1024)
NASTY = "yarn:2 <script>alert('x')</script> & \"y\" $\\frac{1}{2}$ \x00\x1b"
HEADER = {
    "kind": "header",
    "schema": 1,
    "jrope": "0.1.0",
    "model": "tiny & <small>",
    "command": "jrope evaluate x --rope 'default,yarn:2' > y",
    "device": "Some Device",
    "dtype": "bfloat16",
    "versions": {"jax": "0.10.2"},
    "trained_length": TRAINED,
    "theta": 10000.0,
    "rotary_dim": 32,
    "texts": [{"name": "emma.txt", "sha256": "ab" * 32, "tokens": 220000}],
    "started": "2026-11-22T07:00:00Z",
}
# nats per token at the contexts
LOSSES = {"default": (3.25, 3.2, 5.0), "yarn:2": (3.3, 3.22, 3.31)}


def loss(rope, context, nll, half=0.05, **more):
    ends = {"low": None, "high": None} if half is None else {}
    ends = ends or {"low": nll - half, "high": nll + half}
    spans = [(0, 64), (64, 128), *((c // 2, c) for c in CONTEXTS[1:] if c <= context)]
    buckets = [
        {"first": a, "last": b, "tokens": b - a, "nll": nll + i / 8}
        | {key: end and end + i / 8 for key, end in ends.items()}
        for i, (a, b) in enumerate(spans)
    ]
    record = {"kind": "perplexity", "rope": rope, "context": context, "tokens": 777}
    record |= {"windows": "first", "stride": None, "nll": nll, **ends}
    return {**record, "buckets": buckets, "seconds": 1.25, "peak_bytes": None, **more}


def method(name, rope, length=1024):
    base = Rope(theta=rope.theta, rotary_dim=rope.rotary_dim)
    inv_freq, scaling = rope.frequencies(length, np.float64)
    record = {"kind": "method", "rope": name, "label": name, "length": length}
    record |= {"inv_freq": inv_freq.tolist(), "attention_scaling": scaling}
    record["base_inv_freq"] = base.frequencies(None, np.float64)[0].tolist()
    return {**record, "condense": rope.condense}


def passkey(rope, length, depth, correct):
    record = {"kind": "passkey", "rope": rope, "length": length, "depth": depth}
    return {**record, "trials": 10, "correct": correct, "seconds": 3.0}


def distance(rope, shift=0.0):
    at = [2**i for i in range(10)]
    scores = [2 - 0.3 * i + shift for i in range(10)]
    ends = {"low": [s - 1 for s in scores], "high": [s + 1.5 for s in scores]}
    record = {"kind": "distance", "rope": rope, "distances": at, "scores": scores}
    return {**record, **ends}


def failure(rope, context=4096):
    error = "out of memory: wanted <12> GB & more"
    record = {"kind": "failure", "task": "perplexity", "rope": rope}
    return {**record, "context": context, "error": error}


def everything():
    plain = Rope(theta=10000.0, rotary_dim=32)
    yarn = Rope(
        theta=10000.0,
        rotary_dim=32,
        scaling=Yarn(factor=2.0, original_length=TRAINED),
        condense=3.0,
    )
    records = [HEADER, method("default", plain), method("yarn:2", yarn)]
    for rope, nlls in LOSSES.items():
        pairs = zip(CONTEXTS, nlls, strict=True)
        records += [loss(rope, context, nll) for context, nll in pairs]
        found = {"default": 0, "yarn:2": 7}[rope]
        records += [passkey(rope, c, d, found) for c in CONTEXTS for d in (0.25, 0.5)]
        records.append(distance(rope, len(rope) / 7))
    return [*records, failure("linear:2")]


@pytest.fixture(scope="module")
def page():
    """The page of everything; drawing it takes a while."""
    return render(everything())


@pytest.fixture(scope="module")
def drawn():
    """The figures of everything."""
    return figures(everything())


def lines(figure, axes=0):
    """The lines of an axes that show a method, by name."""
    found = figure.axes[axes].get_lines()
    return {x.get_label(): x for x in found if not x.get_label().startswith("_")}


def parsed(text):
    """The page as a tree; it is as strict as XML."""
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def rows(page, words):
    """The cells of the table whose caption has the words, heads and rows."""
    for table in parsed(page).iter("table"):
        if words in "".join(table.find("caption").itertext()):
            return [
                ["".join(cell.itertext()) for cell in row] for row in table.iter("tr")
            ]
    raise AssertionError(f"no table about {words}")


def test_perplexity_curve_is_the_records(drawn):
    drawn = drawn["perplexity_first"]
    for rope, nlls in LOSSES.items():
        line = lines(drawn)[rope]
        np.testing.assert_array_equal(line.get_xdata(), CONTEXTS)
        np.testing.assert_allclose(line.get_ydata(), np.exp(nlls), rtol=1e-12)
    (axes,) = drawn.axes
    band = axes.collections[0].get_paths()[0].vertices  # of the first method
    want = np.exp(np.array(LOSSES["default"]))
    assert band[:, 1].min() == pytest.approx(want.min() * math.exp(-0.05))
    assert band[:, 1].max() == pytest.approx(want.max() * math.exp(0.05))
    assert axes.get_xscale() == axes.get_yscale() == "log"
    low, high = axes.get_xlim()
    assert low < min(CONTEXTS) and high > max(CONTEXTS)
    assert "trained: 256" in {text.get_text() for text in axes.texts}
    assert {"default", "yarn:2"} <= {text.get_text() for text in axes.texts}


def test_positions_are_the_longest_contexts_buckets(drawn):
    drawn = drawn["positions_first"]
    (axes,) = drawn.axes
    for rope, nlls in LOSSES.items():
        got = lines(drawn)[rope].get_ydata()
        np.testing.assert_allclose(got, [nlls[2] + i / 8 for i in range(4)])
    assert "1,024" in axes.get_title("left")
    edges = [label.get_text() for label in axes.get_xticklabels()]
    assert edges == ["0", "64", "128", "256", "1k"]


def test_passkey_cells_are_the_records(drawn):
    drawn = drawn["passkey"]
    assert [axes.get_title("left") for axes in drawn.axes] == ["default", "yarn:2"]
    for axes, count in zip(drawn.axes, "07", strict=True):
        assert [text.get_text() for text in axes.texts] == [count] * 6
        places = {text.get_position() for text in axes.texts}
        assert len(places) == 6
    light, dark = (axes.patches[0].get_facecolor() for axes in drawn.axes)
    assert sum(dark[:3]) < sum(light[:3]) - 0.5


def test_passkey_grid_tells_what_was_not_measured_and_trials_apart():
    records = [r for r in everything() if r["kind"] != "passkey"]
    records += [passkey("default", 128, 0.5, 3), passkey("default", 256, 0.25, 4)]
    records[-1] = {**records[-1], "trials": 20}
    (axes,) = figures(records)["passkey"].axes
    assert sorted(text.get_text() for text in axes.texts) == ["3/10", "4/20"]
    assert sum(bool(patch.get_hatch()) for patch in axes.patches) == 2


def test_frequencies_are_times_the_default_condense_included(drawn):
    records = everything()
    drawn = drawn["frequencies"]
    (plain, yarn) = (r for r in records if r["kind"] == "method")
    base = np.array(plain["inv_freq"])
    np.testing.assert_allclose(lines(drawn)["default"].get_ydata(), 1.0)
    line = lines(drawn)["yarn:2"]
    np.testing.assert_allclose(line.get_xdata(), 2 * np.pi / base)
    want = base / (np.array(yarn["inv_freq"]) / 3.0)
    np.testing.assert_allclose(line.get_ydata(), want)
    assert line.get_ydata()[0] == pytest.approx(3.0)
    assert line.get_ydata()[-1] == pytest.approx(6.0)


def test_of_a_growing_method_the_longest_length_is_drawn():
    short, long = (
        method("x", Rope(theta=10000.0, rotary_dim=32, condense=c), n)
        for c, n in ((2.0, 512), (4.0, 2048))
    )
    for records in ([HEADER, short, long], [HEADER, long, short]):
        line = lines(figures(records)["frequencies"])["x"]
        np.testing.assert_allclose(line.get_ydata(), 4.0)


def test_distance_is_the_records_with_the_default_behind(drawn):
    records = everything()
    drawn = drawn["distance"]
    scores = {r["rope"]: r["scores"] for r in records if r["kind"] == "distance"}
    for i, rope in enumerate(LOSSES):
        np.testing.assert_allclose(lines(drawn, i)[rope].get_ydata(), scores[rope])
    behind = [x.get_ydata() for x in drawn.axes[1].get_lines()]
    assert any(np.array_equal(y, scores["default"]) for y in behind)


def test_labels_never_overlap():
    """On every figure of 12 methods, at both widths, measured as they are drawn."""
    names = ["default", *(f"linear:{i}" for i in range(2, 13))]
    plain = Rope(theta=10000.0, rotary_dim=32)
    records = [HEADER]
    for i, name in enumerate(names):
        records.append({**method(name, plain), "condense": 1 + i / 100})
        records += [loss(name, c, 3.2 + i / 500) for c in CONTEXTS]
    for width in (9.2, 3.7):
        for name, figure in figures(records, width=width).items():
            figure.draw_without_rendering()
            texts = [text for text in figure.axes[0].texts if text.get_text() in names]
            boxes = [plain_box(text) for text in texts]
            assert len(boxes) == len(names), name
            over = [
                (a, b) for a in boxes for b in boxes if a is not b and a.overlaps(b)
            ]
            assert not over, (name, width)
            edge = figure.bbox.width
            assert all(box.x1 <= edge for box in boxes), (name, width)


def plain_box(text):
    """Where a label's words are, without the line that leads to it."""
    from matplotlib.text import Text

    return Text.get_window_extent(text)


def test_looks_differ_without_colour():
    shown = looks([str(i) for i in range(12)])
    assert len({look.marker for look in shown.values()}) == 12
    whole = {
        (look.color, look.marker, look.dashes) for look in looks(range(84)).values()
    }
    assert len(whole) == 84


def test_spread_is_least_squares_and_keeps_the_gap():
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.uniform(0.2, 0.8, 6)
        placed = spread(wanted, 0.1, 0.0, 1.0)
        order = np.argsort(wanted)
        assert (np.diff(placed[order]) >= 0.1 - 1e-12).all()
        best = ((placed - wanted) ** 2).sum()
        for _ in range(100):  # no legal change of a little is better
            other = placed + rng.normal(0, 0.01, 6)
            if (np.diff(other[order]) >= 0.1).all():
                assert ((other - wanted) ** 2).sum() >= best - 1e-12
    crowded = spread([0.9] * 30, 0.1, 0.0, 1.0)
    assert np.allclose(np.diff(np.sort(crowded)), 0.1)


@pytest.mark.parametrize(
    ("low", "high"), [(20, 22), (10, 39), (10, 70), (10, 5e4), (2, 1e30)]
)
def test_ticks_are_round_and_few(low, high):
    ticks = round_numbers(low, high)
    assert 3 <= len(ticks) <= 9
    assert all(low <= tick <= high for tick in ticks)


def test_labels_are_cut_in_the_middle_and_stay_apart():
    assert shorten(["short", "x" * 30], 9) == ["short", "xxxxxx…xx"]
    cut = shorten([f"{'x' * 20}{i}{'y' * 8}" for i in range(3)], 12)
    assert len({*cut}) == 3 and all(len(text) <= 12 for text in cut)
    same = shorten(["x" * 20 + str(i) + "x" * 20 for i in range(3)], 12)
    assert same == ["1: xxxxxxxx", "2: xxxxxxxx", "3: xxxxxxxx"]


def test_page_is_self_contained_and_strict(page):
    tree = parsed(page)
    for node in tree.iter():
        for name, value in node.attrib.items():
            assert "://" not in value, (node.tag, name)
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("#")
    assert not {"script", "link", "iframe", "img"} & {node.tag for node in tree.iter()}
    assert "@import" not in page and "url(http" not in page
    ids = [node.get("id") for node in tree.iter() if node.get("id")]
    assert len(ids) == len({*ids})
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert used and {*used} <= {*ids}


def test_pictures_are_told_and_follow_the_reader(page):
    pictures = [*parsed(page).iter("svg")]
    assert len(pictures) == 10  # five, for a desktop and for a phone
    for svg in pictures:
        title, about = svg.find("title"), svg.find("desc")
        assert svg.get("aria-labelledby") == f"{title.get('id')} {about.get('id')}"
        assert len(about.text) > 40 and "yarn:2" in about.text
        words = {"".join(text.itertext()) for text in svg.iter("text")}
        assert {"default", "yarn:2"} <= words
    inside = "".join(ElementTree.tostring(svg, "unicode") for svg in pictures)
    assert "var(--ink)" in inside and "#1b1b1f" not in inside
    assert "prefers-color-scheme:dark" in page and "max-width: 46rem" in page


def test_tables_hold_every_number(page):
    head, *body = rows(page, "Perplexity of the first tokens")
    assert head == ["method", "128", "256", "1,024"]
    assert [row[0] for row in body] == ["default", "yarn:2"]
    assert body[0][1] == f"★ 25.7924.53{TO}27.11"
    assert body[1][3] == f"★ 27.3926.05{TO}28.79"
    assert body[0][3].startswith(f"{math.exp(5.0):.1f}")
    _, *body = rows(page, "Mean negative log-likelihood")
    want = ["default", "first", "128", "", "777", "3.250", "3.200", "3.300", "25.79"]
    assert body[0] == [*want, "1.2", ""] and len(body) == 6
    head, *body = rows(page, "by position in windows")
    assert head == ["method", "0 to 63", "64 to 127", "128 to 255", "512 to 1,023"]
    assert body[1][4] == f"3.6853.635{TO}3.735"
    head, *body = rows(page, "Passkeys found")
    assert head == ["method", "depth", "128", "256", "1,024"]
    assert body[2] == ["yarn:2", "25%", *["7 of 10"] * 3]
    _, *body = rows(page, "Wavelengths in tokens")
    assert body[1][:4] == ["yarn:2", "1,024", "3", f"{0.1 * math.log(2) + 1:.4f}"]
    _, *body = rows(page, "Mean attention score")
    assert body[0][:3] == ["default", "3.000", "2.700"]
    _, *body = rows(page, "that failed")
    assert body == [["linear:2", failure("x")["error"], "perplexity", "4,096"]]
    assert rows(page, "Texts")[1] == ["emma.txt", "220,000", "ab" * 32]
    for fact in ("Some Device", "bfloat16", "jax 0.10.2", HEADER["started"]):
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
    page = render(records)
    assert "<script" not in page
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
    page = render(records)
    word = "NaN" if nll is None or math.isnan(nll) else "inf"
    assert rows(page, "Perplexity of the first tokens")[2] == ["yarn:2", word]
    drawn = figures(records)["perplexity_first"]
    assert np.isnan(lines(drawn)["yarn:2"].get_ydata()).all()
    assert drawn.get_supxlabel().replace("\n", " ") == (
        "Not drawn, for it is not finite: 1 point of yarn:2."
    )
    assert perplexity(1e6) == math.inf


@pytest.mark.parametrize("width", [9.2, 3.7])
def test_pages_of_little_and_of_nothing(width):
    alone = [HEADER, loss("a", 512, 3.2, None)]
    assert {*figures(alone, width=width)} == {"perplexity_first", "positions_first"}
    flat = [HEADER, {**loss("a", 512, 3.2), "buckets": []}]
    assert {*figures(flat, width=width)} == {"perplexity_first"}
    assert "Loss by position" not in render(flat)
    assert figures([HEADER], width=width) == {}
    lost = [HEADER, loss("a", 512, math.nan)]
    assert lines(figures(lost, width=width)["perplexity_first"])["a"] is not None
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
    page = render([header, loss("a", 512, 3.2), passkey("a", 512, 0.5, 1)])
    assert "<dd>unknown</dd>" in page and "trained: " not in page


def test_two_kinds_of_windows_have_their_own_figures_and_tables():
    more = [
        loss(rope, c, 3.0, windows="sliding", stride=c // 2)
        for rope in LOSSES
        for c in CONTEXTS
    ]
    first = [r for r in everything() if r["kind"] == "perplexity"]
    records = [HEADER, *first, *more]
    assert {"perplexity_first", "perplexity_sliding"} < {*figures(records)}
    page = render(records)
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


def test_missing_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(JropeError, match=re.escape('pip install "jrope[lab]"')):
        write_report(everything(), tmp_path / "out.html")
    assert [*tmp_path.iterdir()] == []


def test_report_is_written_whole_or_not_at_all(monkeypatch, tmp_path, page):
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
    assert write_report(everything(), path).read_text("utf-8") == page


def test_figures_are_saved_as_png(tmp_path):
    paths = save_figures(everything(), tmp_path / "new" / "folder")
    names = [
        "perplexity_first",
        "positions_first",
        "passkey",
        "frequencies",
        "distance",
    ]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_left_behind_in_matplotlib(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 7.25, "svg.fonttype": "path"}):
        save_figures([HEADER, loss("a", 512, 3.2)], tmp_path)
        assert matplotlib.rcParams["font.size"] == 7.25
        assert matplotlib.rcParams["svg.fonttype"] == "path"
