"""HTML that is safe against injection: every text is escaped, except elements that `tag` made.

Reports show untrusted file names, labels and uris. Pages are built with `tag` alone, so no caller can forget to escape.
A page has no script and loads nothing, and its content security policy tells the browser to refuse both.
"""

import html
import re
from collections.abc import Iterable, Sequence
from typing import final

# Longer texts are cut in the middle, because a uri may have any length. Assumed: long enough to tell names apart.
MAX_TEXT_LENGTH = 240
# Control characters, and the surrogates that stand for bytes that are not UTF-8.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_VOID = frozenset({"hr", "img", "meta"})
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@final
class Markup(str):
    """Escaped HTML, made by `tag` and `join`. Pages also make it from constant text, such as a style."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An HTML element. Children that are not Markup are escaped; attributes that are None are left out.

    In the name of an attribute, a final underscore is dropped (`class_`); an underscore inside becomes a hyphen.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """The children one after another. Children that are not Markup are escaped."""
    return Markup("".join(child if isinstance(child, Markup) else _escape(child) for child in children))


def clip(text: str, limit: int = MAX_TEXT_LENGTH) -> str:
    """`text`; if it is longer than `limit` characters, its middle is replaced by three dots."""
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def quoted(text: str) -> Markup:
    """An untrusted file name, uri or label in a `code` element. A long one may wrap at any character."""
    return tag("code", clip(text), dir="auto", class_="long" if len(text) > 40 else None)


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: frozenset[int] = frozenset()
) -> Markup:
    """A table that scrolls horizontally on a narrow screen. numbers: indices of right-aligned columns."""

    def cells(kind: str, values: Sequence[object], **attributes: object) -> Markup:
        return join(
            *(
                tag(kind, value, class_="number" if index in numbers else None, **attributes)
                for index, value in enumerate(values)
            )
        )

    head = tag("thead", tag("tr", cells("th", header, scope="col")))
    body = tag("tbody", *(tag("tr", cells("td", row)) for row in rows))
    return tag("div", tag("table", head, body), class_="scroll", tabindex="0")


def bar(*parts: tuple[float, str], label: str, mark: float | None = None) -> Markup:
    """A horizontal bar on a track of full width.

    parts: fractions of the width in [0, 1], each with its CSS class. mark: the fraction of the width at which a line is
    drawn. label: the text for screen readers.
    """
    spans = [tag("span", class_=kind, style=f"width:{100 * share:.3f}%") for share, kind in parts if share]
    if mark is not None:
        spans.append(tag("span", class_="mark", style=f"left:{100 * mark:.3f}%"))
    return tag("span", *spans, class_="bar", role="img", aria_label=label)


def legend(*entries: tuple[str, str]) -> Markup:
    """A legend of colours. entries: CSS class and meaning of each colour."""
    return tag("p", *(tag("span", tag("i", class_=kind), text) for kind, text in entries), class_="legend")


def columns(values: Sequence[tuple[str, int, str]]) -> Markup:
    """A column chart. values: for each column the text below it, its count, and its CSS class."""
    highest = max((count for _, count, _ in values), default=0)
    items = [
        tag(
            "li",
            tag("span", f"{count:,}"),
            tag("span", class_="column", style=f"height:{100 * count / max(highest, 1):.2f}%"),
            tag("span", below),
            class_=kind or None,
        )
        for below, count, kind in values
    ]
    return tag("div", tag("ol", *items, class_="chart"), class_="scroll", tabindex="0")


def section(identifier: str, title: str, *body: object) -> Markup:
    """A section of the page. Links refer to its identifier."""
    return tag(
        "section",
        tag("h2", title, id=f"{identifier}-title"),
        *body,
        id=identifier,
        aria_labelledby=f"{identifier}-title",
    )


def page(title: str, fingerprint: str | None, *body: object, style: str | None = None) -> str:
    """A complete document.

    fingerprint: a hash of the inputs of the page, which `read_fingerprint` returns; None to write none. style: CSS that
    replaces the style of the curation report.
    """
    mark = [] if fingerprint is None else [tag("meta", name_="fingerprint", content=fingerprint)]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        *mark,
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style or _STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def read_fingerprint(start: str) -> str | None:
    """The fingerprint of a page, given the start of its text; None if it has none."""
    _, mark, rest = start.partition('<meta name="fingerprint" content="')
    return rest.partition('"')[0] if mark else None


def _escape(value: object) -> str:
    """`value` as text for an element or a quoted attribute. Characters that HTML forbids become U+FFFD."""
    return html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


_STYLE = """
:root {
  --ink: #20262b; --quiet: #626c75; --line: #dde2e6; --paper: #fff; --ground: #f6f7f5;
  --blue: #2f6690; --sky: #9fbfd6; --sand: #e2c391; --stone: #c9cfd4; --green: #2e8b62; --red: #b5382e;
  color-scheme: light dark;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e3e7ea; --quiet: #9ba6af; --line: #343c43; --paper: #1c2126; --ground: #12161a;
    --blue: #5f9ccb; --sky: #3d6484; --sand: #a9854a; --stone: #56606a; --green: #4bb587; --red: #e5706a;
  }
}
* { box-sizing: border-box }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, section { max-width: 1120px; margin: 0 auto; padding: 0 24px }
header { padding-top: 40px }
section { margin-bottom: 24px; padding: 8px 24px 24px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px }
h1, h2, h3 { font-family: Charter, "Bitstream Charter", Georgia, serif; line-height: 1.2; font-weight: 600 }
h1 { font-size: 34px; margin: 0 0 16px }
h2 { font-size: 24px; margin: 20px 0 12px }
h3 { font-size: 18px; margin: 28px 0 8px }
p { max-width: 72ch; margin: 8px 0 }
a { color: var(--blue) }
code { font: 0.86em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
code.long { overflow-wrap: anywhere }
h3 code { font-size: 17px }
td strong { white-space: nowrap }
pre { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow: auto; padding: 12px;
  background: var(--ground); border: 1px solid var(--line); border-radius: 4px }
summary { cursor: pointer; margin-top: 16px }
nav ol { columns: 3 220px; margin: 16px 0 32px; padding-left: 1.3em }
.numbers { display: flex; flex-wrap: wrap; gap: 12px 40px; margin: 0 0 16px }
.numbers div { display: flex; flex-direction: column-reverse }
.numbers dt { color: var(--quiet); font-size: 14px }
.numbers dd { margin: 0; font-size: 28px; font-variant-numeric: tabular-nums; line-height: 1.2 }
.note, .caption, .legend, figcaption { color: var(--quiet); font-size: 14px }
.caption { margin: 16px 0 6px; color: var(--ink) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.35 }
th { text-align: left; font-weight: 600; color: var(--quiet); border-bottom: 1px solid var(--quiet) }
th, td { padding: 6px 12px 6px 0; vertical-align: middle }
td { border-bottom: 1px solid var(--line) }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.bar { position: relative; display: flex; min-width: 220px; height: 16px; background: var(--ground) }
.stack .bar { height: 7px; margin: 1px 0 }
.stays { background: var(--blue) } .lost { background: var(--sand) } .aside { background: var(--stone) }
.before { background: var(--stone) } .between { background: var(--sky) }
.mark { position: absolute; top: -3px; bottom: -3px; border-left: 2px solid var(--ink) }
.legend span { display: inline-flex; align-items: center; margin-right: 20px }
.legend i { flex: none; width: 16px; height: 12px; margin-right: 7px }
.legend .first, .legend .first-holdout { border-left: 2px solid var(--red); width: 0; height: 16px }
.legend .first-holdout { border-left-style: dashed }
.chart { display: flex; gap: 3px; height: 190px; margin: 12px 0; padding: 0; list-style: none; max-width: 900px }
.chart li { flex: 1 1 0; min-width: 34px; display: flex; flex-direction: column; justify-content: flex-end;
  text-align: center; font-size: 12px; font-variant-numeric: tabular-nums }
.chart li.first { border-left: 2px solid var(--red) }
.chart li.first-holdout { border-left: 2px dashed var(--red) }
.chart span { color: var(--quiet); white-space: nowrap }
.column, i.copies { background: var(--blue); flex-shrink: 1; min-height: 1px }
.no-copies .column, i.no-copies { background: var(--stone) }
.strip, .pairs { display: flex; flex-wrap: wrap; gap: 8px }
.gallery { display: flex; flex-wrap: wrap; gap: 14px 36px }
.retrieval { display: flex; gap: 4px 14px; align-items: flex-start }
.retrieval .strip:first-child { flex: 0 0 auto; max-width: 192px }
.whole { flex: 1 0 100% }
figure { margin: 0; width: 92px; text-align: center }
figure img { display: block; width: 92px; height: 92px; object-fit: contain; background: var(--paper) }
.large { margin: 12px 0 }
.large figure { width: 152px; overflow-wrap: anywhere } .large img { width: 152px; height: 152px }
.frame img, i.frame { border: 1px solid var(--line) }
.frame.seed img, i.frame.seed { border: 2px solid var(--ink) }
.frame.same img, i.frame.same { border: 3px solid var(--green) }
.frame.other img, i.frame.other { border: 1px solid var(--stone) }
.frame.unknown img, i.frame.unknown { border: 2px dashed var(--stone) }
.frame.kept img, i.frame.kept { border: 3px solid var(--blue) }
.pair { display: grid; grid-template-columns: auto auto; gap: 0 2px; padding: 6px; border: 1px solid var(--line);
  border-radius: 4px }
.pair p { grid-column: 1 / 3; margin: 2px 0 0; text-align: center; font-size: 14px; font-variant-numeric: tabular-nums }
.divider { max-width: none; border-top: 2px solid var(--red); color: var(--red); font-size: 14px; margin: 20px 0 0 }
.divider.holdout { border-top-style: dashed }
@media (max-width: 640px) {
  header, section { padding-left: 14px; padding-right: 14px }
  .retrieval { flex-wrap: wrap }
  .retrieval .strip:first-child { max-width: none }
  figure, figure img { width: 64px } figure img { height: 64px }
  .large figure { width: 132px } .large img { width: 132px; height: 132px }
  figcaption { font-size: 12px }
  .bar { min-width: 64px }
  .numbers { gap: 12px 20px } .numbers div { flex: 1 0 40% }
  table { width: max-content; min-width: 100% }
  td { max-width: 280px }
  .chart li { min-width: 46px }
}
@media print { body, section { background: #fff } section { border: 0 } }
"""
