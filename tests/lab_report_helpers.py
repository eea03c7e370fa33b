"""Records of an evaluation that never was, for the tests of its report."""

from xml.etree import ElementTree

import numpy as np
import pytest

from jrope.lab.figures import figures
from jrope.lab.report import fill, render
from jrope.lab.results import Results
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
    "plan": {"tokens": 400, "stride": None, "seed": 0},
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
    """The lines of an axes that show a method, by what the legend calls them."""
    axes = figure.axes[axes]
    bars = {bar.get_label(): bar.lines[0] for bar in axes.containers}
    found = {x.get_label(): x for x in axes.get_lines()}
    return {name: x for name, x in (bars | found).items() if name[0] != "_"}


def bars(figure, name):
    """The upright bars of a line: low and high of each point."""
    (found,) = (x for x in figure.axes[0].containers if x.get_label() == name)
    return np.array([segment[:, 1] for segment in found.lines[2][0].get_segments()])


def legend(figure):
    """The words of the legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bare(records):
    """The page without its pictures, which take a while to draw."""
    return fill(Results.of(records), {})


def parsed(text):
    """The page as a tree; it is as strict as XML."""
    text = text.replace(' xmlns="http://www.w3.org/2000/svg"', "")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def rows(page, words):
    """The cells of the table whose caption has the words, heads and rows."""
    for table in parsed(page).iter("table"):
        if words in "".join(table.find("caption").itertext()):
            return [
                ["".join(cell.itertext()) for cell in row] for row in table.iter("tr")
            ]
    raise AssertionError(f"no table about {words}")
