"""HTML by construction: text is escaped wherever it comes from, markup is a type.

A page holds all that it needs: its style and its pictures; nothing is fetched, nothing
is run.  Its colours follow the reader's light or dark setting.
"""

import html
import re
from collections.abc import Iterable, Sequence

from jrope.lab.style import GRID, INK, MUTED, PAPER

_DARK = {  # of the page: the light colour that figures are drawn in -> the dark one
    PAPER: "#17171b",
    INK: "#ececf0",
    MUTED: "#a0a0ab",
    GRID: "#38383f",
    "#0a5fb4": "#6cb4ff",
    "#c44e00": "#ff9a5c",
    "#00795a": "#41cfa3",
    "#a8407f": "#f19ccb",
    "#8a6a00": "#dfc04d",
    "#147f93": "#6fd5e6",
}
_WORDS = ("paper", "ink", "muted", "grid", "s1", "s2", "s3", "s4", "s5", "s6")
_NAMES = dict(zip(_DARK, _WORDS, strict=True))
_VOID = {"meta", "br", "hr"}
_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
header { border-bottom: 1px solid var(--grid); margin-bottom: 1.5rem; }
.over { color: var(--muted); margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .2rem 0 1rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
figure { margin: .5rem 0 1rem; }
svg { display: block; width: 100%; height: auto; }
.narrow { display: none; }
.box { overflow-x: auto; margin: .5rem 0 1rem; border: 1px solid var(--grid); }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem;
  min-width: min(100%, 30rem); font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .7rem; color: var(--muted);
  position: sticky; left: 0; max-width: 90vw; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top;
  border-top: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; }
th[scope=row], td.text, th.text { text-align: left; }
th[scope=row] { position: sticky; left: 0; background: var(--paper); }
th[scope=col] { white-space: normal; vertical-align: bottom; }
th[scope=row] > span { display: inline-block; white-space: normal;
  max-width: min(22rem, 34vw); overflow-wrap: break-word; }
td.text { white-space: normal; min-width: 12rem; max-width: 34rem;
  overflow-wrap: break-word; }
td.text code { overflow-wrap: anywhere; }
td small { display: block; color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
summary { cursor: pointer; margin: 1rem 0 .5rem; }
@media (max-width: 46rem) {
  .wide { display: none; } .narrow { display: block; }
  h1 { font-size: 1.35rem; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
}
@media print {
  .wide { display: block; } .narrow { display: none; }
  .box { overflow: visible; }
}
"""


class Html(str):
    """Text that is markup already."""


def element(name: str, /, *children: str, **attributes: str) -> Html:
    """<name attributes>children</name>; children that are not markup are escaped.

    Attributes have a dash for each underscore, none at their end.

    >>> element("td", "a < b", class_="text")
    '<td class="text">a &lt; b</td>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{given}/>")
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Html:
    """Children one after another, escaped where they are not markup."""
    return Html("".join(c if isinstance(c, Html) else _escaped(c) for c in children))


def _escaped(text: object) -> str:
    """Text for HTML; control characters, which no page may hold, are replaced."""
    kept = re.sub(
        r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(text)
    )
    return html.escape(re.sub("[\x7f-\x9f]", "\ufffd", kept))


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: Sequence[str] = (),
) -> Html:
    """A table in a box of its own that scrolls, the first cell of each row its head.

    Args:
      caption: what the table shows.
      heads: of the columns.
      rows: cells, text or markup.
      texts: the heads of columns that hold words.
    """
    words = {heads[0], *texts}
    kinds = [{"class_": "text"} if head in words else {} for head in heads]
    top = [
        element("th", head, scope="col", **kind)
        for head, kind in zip(heads, kinds, strict=True)
    ]
    body: list[Html] = []
    for first, *cells in rows:
        line = [element("th", element("span", first), scope="row")]
        line += [element("td", c, **k) for c, k in zip(cells, kinds[1:], strict=True)]
        body.append(element("tr", *line))
    inside = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *top)),
        element("tbody", *body),
    )
    return element(
        "div", inside, class_="box", role="region", tabindex="0", aria_label=caption
    )


def inline_svg(svg: str, name: str, heading: str, description: str) -> Html:
    """A picture of matplotlib's as a part of the page.

    Its colours become the page's, its ids its own, and it gets a title and a
    description for those who do not see it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=").replace("\n", " ")
    svg = re.sub(r'(?<= (?:d|x|y)=")[^"]*', _rounded, re.sub(r"  +", " ", svg))
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _NAMES.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 role="img" aria-labelledby="{name}-title {name}-desc">',
        svg,
    )
    told = element("title", heading, id=f"{name}-title")
    told = joined([told, element("desc", description, id=f"{name}-desc")])
    cut = svg.index(">") + 1
    return Html(svg[:cut] + told + svg[cut:].strip())


def _rounded(numbers: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", numbers[0])


def page(heading: str, *children: str) -> str:
    """The whole document."""
    light, dark = (
        "".join(f"--{_NAMES[key]}:{color};" for key, color in colors.items())
        for colors in ({key: key for key in _DARK}, _DARK)
    )
    style = f":root{{color-scheme:light dark;{light}}}\n@media screen and "
    style += f"(prefers-color-scheme:dark){{:root{{{dark}}}}}{_STYLE}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", heading),
        element("style", Html(style)),
    )
    body = element("body", element("main", *children))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
