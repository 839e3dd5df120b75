"""Writes report.html: the results of the evaluations on one page for people.

Each evaluation has a section, with a table and a plot for each data set. The rows of a table are models; published
numbers of the same protocol follow. The pictures come last. The page is one file that loads nothing and has no script.
Every text from outside is escaped, because names of data sets and models are untrusted input.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from curation.errors import InputError
from curation.files import paths
from curation.report import markup
from curation.report.markup import Markup, tag
from evaluation import results, visualize
from evaluation.published import Published, comparable_numbers
from evaluation.results import Result
from evaluation.visualize import PICTURES_FOLDER, PictureKind, PictureRecord

REPORT_FILE = "report.html"

# In the order of the page. Other evaluations follow, sorted by name.
TITLES = {
    "knn": "Nearest neighbours",
    "logistic": "Logistic regression",
    "linear": "Linear probe",
    "robustness": "Robustness",
    "retrieval": "Retrieval",
    "segmentation": "Segmentation",
    "depth": "Depth",
}
PICTURE_TITLES: dict[PictureKind, str] = {
    "pca": "Principal components of patch tokens",
    "matches": "Patches matched between pictures",
    "attention": "Attention",
    "neighbours": "Nearest neighbours",
}
# Errors: lower is better, and they are no shares.
ERRORS = frozenset({"abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "mae"})
LESS_IS_BETTER = ERRORS | {"mCE"}
UNITS = {"rmse": "m", "mae": "m"}
# Wider tables are hard to read. Assumed.
MAX_COLUMNS = 10
COLORS = ("#2f6690", "#b5382e", "#2e8b62", "#b07d2b", "#6a4c93", "#4a5a63", "#c2578a", "#3aa0a8")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write(output: str) -> str:
    """Write the report on the results and pictures below `output`, and return its path. Raises InputError.

    The same results and pictures give the same bytes.
    """
    path = paths.join(output, REPORT_FILE)
    latest = results.latest(results.read(output))
    pictures = [
        (picture, _read_png(paths.join(output, PICTURES_FOLDER, picture.file)))
        for picture in visualize.read_pictures(output)
    ]
    if not latest and not pictures:
        raise InputError(f"'{output}' has neither results nor pictures to report. Run an evaluation first.")
    paths.write_bytes(path, page(latest, pictures).encode())
    return path


def page(latest: Sequence[Result], pictures: Sequence[tuple[PictureRecord, bytes]]) -> str:
    """The whole document. pictures: each with the bytes of its PNG."""
    evaluations = sorted({result.evaluation for result in latest}, key=_sort_key)
    sections = [_evaluation(name, [result for result in latest if result.evaluation == name]) for name in evaluations]
    sections += [
        _pictures(kind, title, [pair for pair in pictures if pair[0].kind == kind])
        for kind, title in PICTURE_TITLES.items()
        if any(picture.kind == kind for picture, _ in pictures)
    ]
    models = list(dict.fromkeys([result.model for result in latest] + [picture.model for picture, _ in pictures]))
    links = [(name, TITLES.get(name, name)) for name in evaluations] + [
        (f"pictures-{kind}", title)
        for kind, title in PICTURE_TITLES.items()
        if any(picture.kind == kind for picture, _ in pictures)
    ]
    header = tag(
        "header",
        tag("h1", "Evaluation"),
        tag("p", "Models: ", *_separated(tag("strong", name) for name in models)),
        tag(
            "p",
            "Shares are in percent; errors of depth are in their own units. The best of the evaluated models is bold. "
            "Rows in italics are published numbers of the same protocol.",
            class_="note",
        ),
        tag("nav", tag("ol", *(tag("li", tag("a", title, href=f"#{_slug(name)}")) for name, title in links))),
    )
    return markup.page("Evaluation", None, header, *sections, style=_STYLE)


# ---- tables


@dataclass(frozen=True)
class ModelRow:
    """The row of one model in a table."""

    model: str
    cells: tuple[Result | Published | None, ...]
    published: bool


def _evaluation(name: str, evaluation_results: Sequence[Result]) -> Markup:
    datasets = list(dict.fromkeys(result.dataset for result in evaluation_results))
    parts = [
        part
        for dataset in datasets
        for part in _dataset([result for result in evaluation_results if result.dataset == dataset])
    ]
    return _section(name, TITLES.get(name, name), *parts, _details(evaluation_results))


def _dataset(dataset_results: Sequence[Result]) -> list[Markup]:
    """The heading and one table. A table that is too wide is divided by families of protocols, then by protocol."""
    columns = list(dict.fromkeys((result.protocol, result.metric) for result in dataset_results))
    if all(_number(protocol) is not None for protocol, _ in columns):
        columns.sort(key=lambda column: (_family(column[0]), _number(column[0])))  # metrics keep their order
    groups = [columns]
    for key in (_family, str):
        if any(len(group) > MAX_COLUMNS for group in groups):
            keys = dict.fromkeys(key(protocol) for protocol, _ in columns)
            groups = [[column for column in columns if key(column[0]) == group_key] for group_key in keys]
    parts = [tag("h3", dataset_results[0].dataset)]
    for group in groups:
        rows = table_rows([result for result in dataset_results if (result.protocol, result.metric) in group], group)
        parts += [_table(group, rows), *_sources(rows), *_plots(group, rows)]
    return parts


def table_rows(table_results: Sequence[Result], columns: Sequence[tuple[str, str]]) -> list[ModelRow]:
    """The evaluated models in the order of the results, then the published ones. columns: protocols and metrics.

    Each combination of a name, weights and data has its own row.
    """
    cells_of_model: dict[tuple[str, str, str], dict[tuple[str, str], Result]] = {}
    for result in table_results:
        cells = cells_of_model.setdefault((result.model, result.model_hash, result.data_hash), {})
        cells[result.protocol, result.metric] = result
    names = [model for model, _, _ in cells_of_model]
    rows = [
        ModelRow(
            model if names.count(model) == 1 else f"{model} ({model_hash[:8]} on {data_hash[:8]})",
            tuple(cells.get(column) for column in columns),
            published=False,
        )
        for (model, model_hash, data_hash), cells in cells_of_model.items()
    ]
    published_of_model: dict[str, dict[tuple[str, str], Published]] = {}
    for result in table_results:
        for published in comparable_numbers(result):
            published_of_model.setdefault(published.model, {})[result.protocol, result.metric] = published
    return rows + [
        ModelRow(model, tuple(map(published_cells.get, columns)), published=True)
        for model, published_cells in published_of_model.items()
    ]


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[ModelRow]) -> Markup:
    best = [
        (min if metric in LESS_IS_BETTER else max)(
            (cell.value for row in rows if not row.published and (cell := row.cells[index]) is not None), default=None
        )
        for index, (_, metric) in enumerate(columns)
    ]
    protocols = list(dict.fromkeys(protocol for protocol, _ in columns))
    top = [
        tag("th", protocol, colspan=sum(of == protocol for of, _ in columns), scope="colgroup")
        for protocol in protocols
    ]
    names = [tag("th", _metric_title(metric), class_="number", scope="col") for _, metric in columns]
    lines = []
    for row in rows:
        cells = [
            tag(
                "td",
                _value(
                    cell,
                    columns[index][1],
                    best=not row.published and cell is not None and cell.value == best[index] and len(rows) > 1,
                ),
                class_="number",
            )
            for index, cell in enumerate(row.cells)
        ]
        lines.append(
            tag("tr", tag("th", row.model, scope="row"), *cells, class_="published" if row.published else None)
        )
    head = tag("thead", tag("tr", tag("th", "Model", rowspan=2, scope="col"), *top), tag("tr", *names))
    return tag("div", tag("table", head, tag("tbody", *lines)), class_="scroll", tabindex="0")


def _value(cell: Result | Published | None, metric: str, *, best: bool) -> object:
    if cell is None:
        return "—"
    text = format_value(cell.value, metric)
    if isinstance(cell, Result) and cell.spread is not None:
        text += f" ± {format_value(cell.spread, metric)}"
    return tag("strong", text) if best else text


def format_value(value: float, metric: str) -> str:
    """A value as text: errors with three decimals, shares in percent with one."""
    return f"{value:.3f}" if metric in ERRORS else f"{100 * value:.1f}"


def _metric_title(metric: str) -> str:
    return f"{metric} ({UNITS[metric]})" if metric in UNITS else metric


def _sources(rows: Sequence[ModelRow]) -> list[Markup]:
    cells = [cell for row in rows for cell in row.cells if isinstance(cell, Published)]
    lines = list(dict.fromkeys(cell.source for cell in cells))
    remarks = list(dict.fromkeys(cell.remark for cell in cells if cell.remark))
    if not lines:
        return []
    text = f"Published: {'; '.join(lines)}." + "".join(f" But {remark}." for remark in remarks)
    return [tag("p", text, class_="note")]


def _details(evaluation_results: Sequence[Result]) -> Markup:
    """A table of settings, hashes and times, one row for each run."""
    first_of_run: dict[tuple[str, ...], Result] = {}
    for result in evaluation_results:
        run = (result.dataset, result.model, result.model_hash, result.data_hash, result.protocol)
        first_of_run.setdefault(run, result)
    lines = [
        tag(
            "tr",
            *(tag("td", text) for text in (result.dataset, result.protocol, result.model)),
            *(tag("td", tag("code", text[:12], title=text)) for text in (result.model_hash, result.data_hash)),
            tag("td", f"{result.seconds:,.1f} s", class_="number"),
            tag("td", tag("code", json.dumps(result.settings, sort_keys=True, ensure_ascii=False), class_="settings")),
        )
        for result in first_of_run.values()
    ]
    names = ("Data", "Protocol", "Model", "Model hash", "Data hash", "Time", "Settings")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    table = tag("div", tag("table", head, tag("tbody", *lines)), class_="scroll", tabindex="0")
    return tag("details", tag("summary", "Settings, hashes and times"), table)


# ---- plots


def _plots(columns: Sequence[tuple[str, str]], rows: Sequence[ModelRow]) -> list[Markup]:
    """A line plot of the first metric over the number in the protocols, such as k, where they have one. Otherwise bars
    of one column: the first with published numbers, or the first of all."""
    metric = columns[0][1]
    family = _family(columns[0][0])
    chosen = [index for index, (protocol, of) in enumerate(columns) if of == metric and _family(protocol) == family]
    numbers = [_number(columns[index][0]) for index in chosen]
    labelled = [number for number in numbers if number is not None]
    evaluated = [row for row in rows if not row.published]
    if len(set(labelled)) == len(chosen) > 2:
        series = [
            (row.model, [cell.value if (cell := row.cells[index]) else None for index in chosen]) for row in evaluated
        ]
        return [line_plot([columns[index][0] for index in chosen], series, metric)]
    compared = (index for row in rows if row.published for index, cell in enumerate(row.cells) if cell is not None)
    column = min(compared, default=0)
    protocol, metric = columns[column]
    bars = [(row.model, cell.value, row.published) for row in rows if (cell := row.cells[column]) is not None]
    return [bar_plot(bars, f"{_metric_title(metric)}, {protocol}", metric)] if len(bars) > 1 else []


def line_plot(ticks: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]], metric: str) -> Markup:
    """Values over evenly spaced ticks as SVG, one line for each model. None is skipped."""
    width, height, left, top = 640, 260, 56, 14
    values = [value for _, line in series for value in line if value is not None]
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def position(index: int, value: float) -> tuple[float, float]:
        x = left + (width - left - 16) * index / max(len(ticks) - 1, 1)
        return round(x, 1), round(top + (height - top) * (high - value) / (high - low), 1)

    drawn: list[object] = []
    for step in range(5):
        value = low + (high - low) * step / 4
        y = position(0, value)[1]
        drawn += [
            tag("line", x1=left, x2=width, y1=y, y2=y, class_="grid"),
            tag("text", format_value(value, metric), x=left - 8, y=y + 4, text_anchor="end"),
        ]
    for index, tick in enumerate(ticks):
        anchor = "end" if index == len(ticks) - 1 and len(ticks) > 1 else "middle"
        drawn.append(tag("text", tick, x=position(index, low)[0], y=height + 20, text_anchor=anchor))
    for number, (model, line) in enumerate(series):
        color = COLORS[number % len(COLORS)]
        points = [position(index, value) for index, value in enumerate(line) if value is not None]
        drawn.append(
            tag("polyline", points=" ".join(f"{x},{y}" for x, y in points), fill="none", stroke=color, stroke_width=2)
        )
        drawn += [tag("circle", tag("title", model), cx=x, cy=y, r=3.5, fill=color) for x, y in points]
    legend = tag(
        "p",
        *(
            tag("span", tag("i", style=f"background:{COLORS[number % len(COLORS)]}"), model)
            for number, (model, _) in enumerate(series)
        ),
        class_="legend",
    )
    caption = tag("figcaption", f"{_metric_title(metric)} over {_family(ticks[0])}")
    plot = tag("svg", *drawn, viewBox=f"0 0 {width} {height + 30}", role="img", aria_label=f"{metric} of every model")
    return tag("figure", plot, legend, caption, class_="plot")


def bar_plot(bars: Sequence[tuple[str, float, bool]], title: str, metric: str) -> Markup:
    """Bars from 0 as SVG, one for each model; those of published numbers are pale."""
    width, left, step = 640, 250, 24
    highest = max(max(value for _, value, _ in bars), 1e-9)
    drawn: list[object] = []
    for number, (model, value, published) in enumerate(bars):
        y, length = number * step, (width - left - 60) * max(value, 0) / highest
        drawn += [
            tag("text", _clip(model, 36), tag("title", model), x=left - 8, y=y + 16, text_anchor="end"),
            tag("rect", x=left, y=y + 4, width=round(length, 1), height=16, class_="pale" if published else "own"),
            tag("text", format_value(value, metric), x=round(left + length + 6, 1), y=y + 16),
        ]
    plot = tag("svg", *drawn, viewBox=f"0 0 {width} {len(bars) * step + 4}", role="img", aria_label=title)
    return tag("figure", plot, tag("figcaption", title), class_="plot")


def _number(protocol: str) -> float | None:
    """The number after the only equals sign of a protocol: 20 for "k=20"."""
    numbers = re.findall(r"=\s*([0-9]+(?:\.[0-9]+)?)", protocol)
    return float(numbers[0]) if len(numbers) == 1 else None


def _family(protocol: str) -> str:
    """The common part of protocols that differ only in their number: "k" for "k=20"."""
    return re.sub(r"=\s*[0-9.]+", "", protocol)


# ---- pictures


def _pictures(kind: PictureKind, title: str, pictures: Sequence[tuple[PictureRecord, bytes]]) -> Markup:
    figures = [
        tag(
            "figure",
            tag("img", src=f"data:image/png;base64,{base64.b64encode(data).decode()}", alt=f"{title}: {picture.model}"),
            tag("figcaption", tag("strong", picture.model), ". ", picture.caption),
            class_="picture",
        )
        for picture, data in pictures
    ]
    return _section(f"pictures-{kind}", title, *figures)


def _read_png(path: str) -> bytes:
    if not paths.exists(path):
        raise InputError(f"No picture at '{path}', which pictures.jsonl names. Draw it again, or remove its line.")
    data = paths.read_bytes(path)
    if not data.startswith(PNG_SIGNATURE):
        raise InputError(f"{path} is not a PNG. Draw it again.")
    return data


# ---- parts of the page


def _section(identifier: str, title: str, *body: object) -> Markup:
    return tag("section", tag("h2", title), *body, id=_slug(identifier))


def _separated(parts: Iterable[Markup]) -> list[object]:
    pieces: list[object] = []
    for part in parts:
        pieces += [", ", part] if pieces else [part]
    return pieces


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())


def _clip(text: str, limit: int) -> str:
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def _sort_key(evaluation: str) -> tuple[int, str]:
    known = list(TITLES)
    return (known.index(evaluation) if evaluation in known else len(known), evaluation)


_STYLE = """
:root { --ink: #20262b; --quiet: #626c75; --line: #dde2e6; --ground: #f6f7f5; --blue: #2f6690; color-scheme: light }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
header, section { max-width: 1120px; margin: 0 auto; padding: 0 24px }
header { padding-top: 40px }
section { margin-bottom: 24px; padding: 8px 24px 24px; background: #fff; border: 1px solid var(--line);
  border-radius: 6px }
h1, h2, h3 { font-family: Charter, "Bitstream Charter", Georgia, serif; line-height: 1.2; font-weight: 600 }
h1 { font-size: 34px; margin: 0 0 16px }
h2 { font-size: 24px; margin: 20px 0 12px }
h3 { font-size: 18px; margin: 28px 0 8px; overflow-wrap: anywhere }
p { max-width: 76ch; margin: 8px 0; overflow-wrap: anywhere }
a { color: var(--blue) }
nav ol { columns: 3 220px; margin: 16px 0 32px; padding-left: 1.3em }
.note, figcaption { color: var(--quiet); font-size: 14px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; line-height: 1.35 }
th, td { padding: 6px 18px 6px 0; text-align: left; vertical-align: middle; border-bottom: 1px solid var(--line) }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom }
thead tr:first-child th { border-bottom: 0 }
thead tr:last-child th { border-bottom: 1px solid var(--quiet) }
tbody th { font-weight: 400; max-width: 340px; overflow-wrap: anywhere }
.published { color: var(--quiet); font-style: italic }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.settings { display: block; max-width: 480px; max-height: 120px; overflow: auto; font-size: 12px;
  overflow-wrap: anywhere }
summary { cursor: pointer; margin-top: 20px; color: var(--quiet); font-size: 14px }
figure { margin: 16px 0 0 }
figure + .scroll { margin-top: 32px }
.plot { max-width: 640px }
svg { display: block; width: 100%; height: auto; font-size: 12px; fill: var(--quiet) }
.grid { stroke: var(--line) }
.own { fill: var(--blue) } .pale { fill: #c9cfd4 }
.legend { font-size: 14px; margin: 0 }
.legend span { display: inline-flex; align-items: center; margin-right: 20px }
.legend i { width: 16px; height: 4px; margin-right: 7px }
.picture { margin: 20px 0 }
.picture img { display: block; max-width: 100%; height: auto; image-rendering: auto }
@media (max-width: 640px) { header, section { padding-left: 14px; padding-right: 14px } }
@media print { body, section { background: #fff } section { border: 0 } }
"""
