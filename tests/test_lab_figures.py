"""The figures of an evaluation: what the records say, and nothing else."""

import math

import numpy as np
import pytest
from lab_report_helpers import (
    CONTEXTS,
    HEADER,
    LOSSES,
    everything,
    lines,
    loss,
    method,
    passkey,
)
from lab_report_helpers import drawn as drawn

from jrope.lab.drawing import round_numbers, spread
from jrope.lab.figures import figures, save_figures
from jrope.lab.style import looks, shorten
from jrope.rope import Rope


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
