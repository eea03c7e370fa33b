"""The figures of an evaluation: what the records say, and nothing else."""

import numpy as np
import pytest
from lab_report_helpers import (
    CONTEXTS,
    HEADER,
    LOSSES,
    NASTY,
    TRAINED,
    bars,
    everything,
    failure,
    legend,
    lines,
    loss,
    method,
    passkey,
)
from lab_report_helpers import drawn as drawn
from matplotlib.collections import PolyCollection
from matplotlib.text import Text

from jrope.lab.drawing import look
from jrope.lab.figures import figures, save_figures, to_svg
from jrope.lab.results import Results
from jrope.rope import Rope

NAMES = ["default", *(f"linear:factor={i},original=2048" for i in range(2, 13))]


def many():
    """Records of 12 methods whose names are long."""
    records = [{**loss(name, 512, 3.2), "buckets": []} for name in NAMES]
    return [HEADER, *records, *(passkey(name, 512, 0.5, 3) for name in NAMES)]


def test_perplexity_curve_is_the_records(drawn):
    drawn = drawn["perplexity_first"]
    for rope, nlls in LOSSES.items():
        line = lines(drawn)[rope]
        np.testing.assert_array_equal(line.get_xdata(), CONTEXTS)
        np.testing.assert_allclose(line.get_ydata(), np.exp(nlls), rtol=1e-12)
        ends = np.exp(np.add.outer(nlls, [-0.05, 0.05]))
        np.testing.assert_allclose(bars(drawn, rope), ends, rtol=1e-12)
    (axes,) = drawn.axes
    band = next(c for c in axes.collections if isinstance(c, PolyCollection))
    y = band.get_paths()[0].vertices[:, 1]
    want = np.exp([min(LOSSES["default"]) - 0.05, max(LOSSES["default"]) + 0.05])
    np.testing.assert_allclose([y.min(), y.max()], want, rtol=1e-12)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    low, high = axes.get_xlim()
    assert low < min(CONTEXTS) and high > max(CONTEXTS)
    assert [*axes.get_xticks()] == [*CONTEXTS]
    assert [*lines(drawn)[f"trained: {TRAINED}"].get_xdata()] == [TRAINED] * 2
    assert {*legend(drawn)} == {"default", "yarn:2", "trained: 256"}


def test_positions_are_the_longest_contexts_buckets(drawn):
    drawn = drawn["positions_first"]
    (axes,) = drawn.axes
    for rope, nlls in LOSSES.items():
        want = np.array([nlls[2] + i / 8 for i in range(4)])
        np.testing.assert_allclose(lines(drawn)[rope].get_ydata(), want)
        ends = np.add.outer(want, [-0.05, 0.05])
        np.testing.assert_allclose(bars(drawn, rope), ends)
    assert "1,024" in axes.get_title("left")
    edges = [label.get_text() for label in axes.get_xticklabels()]
    assert edges == ["0", "64", "128", "256", "1k"]
    assert [*lines(drawn)["trained: 256"].get_xdata()] == [edges.index("256")] * 2


def test_passkey_cells_are_the_records(drawn):
    drawn = drawn["passkey"]
    assert [axes.get_title("left") for axes in drawn.axes] == ["default", "yarn:2"]
    for axes, count in zip(drawn.axes, "07", strict=True):
        assert [text.get_text() for text in axes.texts] == [count] * 6
        places = {text.get_position() for text in axes.texts}
        assert len(places) == 6
        (mesh,) = axes.collections
        np.testing.assert_array_equal(
            mesh.get_array(), np.full((2, 3), int(count) / 10)
        )
        (trained,) = axes.get_lines()
        assert [*trained.get_xdata()] == [2, 2]  # after 128 and 256
        light, dark = mesh.cmap([0.0, 1.0])
        assert dark[:3].sum() < light[:3].sum() - 1
    assert drawn.get_supxlabel().endswith("passkeys found, of 10")


def test_passkey_grid_tells_what_was_not_measured_and_trials_apart():
    records = [r for r in everything() if r["kind"] != "passkey"]
    records += [passkey("default", 128, 0.5, 3), passkey("default", 256, 0.25, 4)]
    records[-1] = {**records[-1], "trials": 20}
    (axes,) = figures(records)["passkey"].axes
    assert sorted(text.get_text() for text in axes.texts) == ["3/10", "4/20"]
    (mesh,) = axes.collections  # what it leaves open shows the hatched ground
    want = [[0.0, 4 / 20], [3 / 10, 0.0]]
    np.testing.assert_array_equal(mesh.get_array().filled(0), want)
    assert mesh.get_array().mask.sum() == 2 and axes.patch.get_hatch()


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


def test_pairs_that_stand_still_are_counted():
    record = method("x", Rope(theta=10000.0, rotary_dim=32))
    record["inv_freq"] = [*record["inv_freq"][:-2], 0.0, 0.0]
    drawn = figures([HEADER, record])["frequencies"]
    name, trained = legend(drawn)
    assert name == "x\n2 pairs stand still" and trained == "trained: 256"
    want = [1.0] * 14 + [np.nan] * 2
    np.testing.assert_allclose(lines(drawn)[name].get_ydata(), want)


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
    bands = {r["rope"]: (r["low"], r["high"]) for r in records if "scores" in r}
    for axes, (low, high) in zip(drawn.axes, bands.values(), strict=True):
        y = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (y.min(), y.max()) == (min(low), max(high))
        assert [*axes.get_lines()[-1].get_xdata()] == [TRAINED] * 2
    behind = [x.get_ydata() for x in drawn.axes[1].get_lines()]
    assert any(np.array_equal(y, scores["default"]) for y in behind)


@pytest.mark.parametrize("width", [9.2, 3.7])
def test_names_have_room(width):
    """Of 12 methods, measured as they are drawn: nothing overlaps or is cut off."""
    for name, figure in figures(many(), width=width).items():
        figure.draw_without_rendering()
        words = [
            t for t in figure.findobj(Text) if t.get_text().replace("\n", "") in NAMES
        ]
        assert len(words) == 12, name
        boxes = [text.get_window_extent() for text in words]
        over = [(a, b) for a in boxes for b in boxes if a is not b and a.overlaps(b)]
        assert not over, name
        assert min(min(box.x0, box.y0) for box in boxes) >= 0, name
        assert max(box.x1 for box in boxes) <= figure.bbox.x1, name
        assert max(box.y1 for box in boxes) <= figure.bbox.y1, name
        for names in figure.legends:
            beside = figure.axes[0].get_tightbbox()
            assert not names.get_window_extent().overlaps(beside), name


@pytest.mark.parametrize("ends", [(20, 22), (10, 39), (10, 5e4), (2, 1e30)])
def test_perplexities_have_a_few_labels(ends):
    records = [loss("a", c, np.log(v), None) for c, v in zip((1, 2), ends, strict=True)]
    (axes,) = figures([HEADER, *records], width=3.7)["perplexity_first"].axes
    axes.figure.draw_without_rendering()
    labels = [*axes.get_yticklabels(), *axes.get_yticklabels(minor=True)]
    low, high = axes.get_ylim()
    shown = [x for x in labels if x.get_text() and low <= x.get_position()[1] <= high]
    assert 2 <= len(shown) <= 12
    assert all(float(x.get_text()) == pytest.approx(x.get_position()[1]) for x in shown)


def test_looks_differ_without_colour():
    results = Results.of([HEADER, *(failure(str(i)) for i in range(84))])
    looks = [look(results, rope) for rope in results.labels]
    assert len({shown["marker"] for shown in looks[:12]}) == 12
    assert len({shown["linestyle"] for shown in looks[:4]}) == 4
    assert len({tuple(shown.values()) for shown in looks}) == 84


def test_long_and_hostile_names_are_drawn_as_text():
    records = [{**loss("a", 512, 3.2), "label": "word " * 25}]
    records.append({**loss("b", 512, 3.2), "label": NASTY})
    drawn = figures([HEADER, *records])["perplexity_first"]
    _, long, nasty = legend(drawn)
    assert long == "\n".join(["word word word word word word"] * 3) + "…"
    assert nasty.replace("\n", " ").endswith("$\\frac{1}{2}$ \ufffd\ufffd")
    assert not drawn.legends[0].get_texts()[2].get_parse_math()


def test_figures_are_saved_as_png(tmp_path):
    records = [HEADER, loss("a", 512, 3.2), passkey("a", 512, 0.5, 3)]
    paths = save_figures(records, tmp_path / "new" / "folder")
    names = ["perplexity_first", "positions_first", "passkey"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_svg_is_the_same_for_the_same_records():
    first, again = (to_svg(figures(everything())["perplexity_first"]) for _ in range(2))
    assert first == again and "<metadata" not in first


def test_nothing_is_left_behind_in_matplotlib(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 7.25, "svg.fonttype": "path"}):
        save_figures([HEADER, passkey("a", 512, 0.5, 3)], tmp_path)
        assert matplotlib.rcParams["font.size"] == 7.25
        assert matplotlib.rcParams["svg.fonttype"] == "path"
