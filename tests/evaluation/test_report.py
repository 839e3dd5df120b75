"""Tests of the report: numbers in their cells, published numbers only for the same protocol, no injection."""

import base64
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from curation.errors import InputError
from evaluation import published, report, results, visualize
from evaluation.results import Result
from tests.curation.builders import encoded_image

EVIL = "<script>alert('x')</script>\"&\x07"


def result(**fields: object) -> Result:
    values = {
        "evaluation": "knn",
        "dataset": "stamps",
        "model": "teacher",
        "model_hash": "a" * 64,
        "data_hash": "b" * 64,
        "protocol": "k=20",
        "settings": {},
        "metric": "top-1",
        "value": 0.5,
        "seconds": 1.0,
    }
    return Result.model_validate(values | fields)


class Reader(HTMLParser):
    """Collects all start tags and the texts of table cells; fails on unbalanced elements."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_a_table_has_models_as_rows_and_protocols_in_order() -> None:
    shown = [
        result(model=model, model_hash=digit * 64, protocol=f"k={k}", metric=metric, value=value)
        for model, digit, value in (("teacher", "1", 0.8125), ("untrained", "2", 0.25))
        for k in (100, 20)
        for metric in ("top-1", "top-5")
    ]
    shown.append(result(model="pixels", model_hash="3" * 64, value=0.125, spread=0.03))
    read = Reader(report.page(shown, []))
    assert read.rows[:5] == [
        ["Model", "k=20", "k=100"],
        ["top-1", "top-5", "top-1", "top-5"],
        ["teacher", "81.2", "81.2", "81.2", "81.2"],
        ["untrained", "25.0", "25.0", "25.0", "25.0"],
        ["pixels", "12.5 ± 3.0", "—", "—", "—"],
    ]
    bold = [tag for tag, _ in read.tags].count("strong")
    assert bold == 3 + 4  # the models at the top, and the best of each column


def test_errors_are_not_percent_and_the_lowest_is_best() -> None:
    shown = [
        result(evaluation="depth", model=name, model_hash=digit * 64, protocol="linear 1", metric="rmse", value=value)
        for name, digit, value in (("a", "1", 1.25), ("b", "2", 0.5))
    ]
    text = report.page(shown, [])
    assert "<strong>0.500</strong>" in text and "<strong>1.250</strong>" not in text and "rmse (m)" in text


def test_wide_tables_are_divided_by_protocol() -> None:
    shown = [
        result(evaluation="depth", protocol=protocol, metric=metric)
        for protocol in ("linear 1", "linear 4")
        for metric in ("abs_rel", "rmse", "d1", "d2", "d3", "mae")
    ]
    rows = Reader(report.page(shown, [])).rows
    assert [row for row in rows if row[0] == "Model"] == [["Model", "linear 1"], ["Model", "linear 4"]]


def test_few_shot_results_have_a_separate_table() -> None:
    shown = [
        result(protocol=f"k={k}{suffix}", metric=metric)
        for suffix in ("", ", 5 per class")
        for k in (20, 10, 200)
        for metric in ("top-1", "top-5")
    ]
    rows = Reader(report.page(shown, [])).rows
    assert [row for row in rows if row[0] == "Model"] == [
        ["Model", "k=10", "k=20", "k=200"],
        ["Model", "k=10, 5 per class", "k=20, 5 per class", "k=200, 5 per class"],
    ]


def test_one_name_with_two_weights_is_two_rows() -> None:
    rows = Reader(report.page([result(), result(model_hash="c" * 64, value=0.75)], [])).rows
    assert ["teacher (aaaaaaaa on bbbbbbbb)", "50.0"] in rows and ["teacher (cccccccc on bbbbbbbb)", "75.0"] in rows


def test_published_numbers_are_shown_only_for_the_same_protocol() -> None:
    same = result(dataset="ImageNet-1k")
    (small,) = [one for one in published.comparable_numbers(same) if one.model == "DINOv2 ViT-S/14"]
    assert small.value == pytest.approx(0.79) and "2304.07193" in small.source
    assert published.comparable_numbers(result()) == []  # another data set
    for other in ({"protocol": "k=10"}, {"metric": "top-5"}, {"evaluation": "logistic"}):
        assert published.comparable_numbers(result(dataset="ImageNet-1k", **other)) == []
    depth = {"evaluation": "depth", "metric": "rmse", "dataset": "NYU"}
    rmse_by_model = {
        one.model: one.value
        for one in published.comparable_numbers(result(protocol="dpt, 38,400 steps of 16", **depth))
    }
    assert rmse_by_model == {
        "DINOv2 ViT-S/14": 0.356,
        "DINOv2 ViT-B/14": 0.317,
        "DINOv2 ViT-L/14": 0.293,
        "DINOv2 ViT-g/14": 0.279,
    }
    assert published.comparable_numbers(result(protocol="dpt, 100 steps of 16", **depth)) == []
    heads = {"evaluation": "linear", "dataset": "imagenet", "protocol": "52 heads, grid of the paper, 12,500 steps"}
    assert len(published.comparable_numbers(result(**heads))) == 10
    assert all("held-out training images" in str(one.remark) for one in published.comparable_numbers(result(**heads)))
    on_test = heads | {"protocol": f"{heads['protocol']}, chosen on the test images", "settings": {"choose_on": "test"}}
    assert [one.remark for one in published.comparable_numbers(result(**on_test))] == [None] * 10
    robust = {"evaluation": "robustness", "dataset": "imagenet-v2", "protocol": "linear head of imagenet"}
    for choose_on, remarked in (("held_out", True), ("test", False)):
        numbers = published.comparable_numbers(result(settings={"linear": {"choose_on": choose_on}}, **robust))
        assert len(numbers) == 8 and all(("held-out" in str(one.remark)) == remarked for one in numbers)
    page = report.page([result(**heads)], [])
    assert "But the source selects its head on the validation images that it reports" in page
    assert published.comparable_numbers(result(**heads | {"protocol": "52 heads, grid of the paper, 100 steps"})) == []
    single = published.comparable_numbers(result(protocol="linear 1, 38,400 steps of 16", **depth))
    assert [one.value for one in single] == [0.449, 0.399, 0.384, 0.344]
    hard = published.comparable_numbers(
        result(evaluation="retrieval", dataset="rparis6k", protocol="hard, 224 px", metric="mAP")
    )
    assert [one.value for one in hard] == pytest.approx([0.685, 0.786, 0.835, 0.826])
    last = published.comparable_numbers(
        result(
            evaluation="depth",
            metric="rmse",
            dataset="sun_rgbd",
            protocol="linear 4, 38,400 steps of 16, trained on nyu",
        )
    )
    assert [one.value for one in last] == [0.431, 0.4, 0.396, 0.362]  # the last of the long rows


def test_published_rows_are_marked_and_have_a_source() -> None:
    text = report.page([result(dataset="imagenet")], [])
    read = Reader(text)
    assert ["DINOv2 ViT-B/14", "82.1"] in read.rows
    assert [fields for tag, fields in read.tags if tag == "tr" and fields.get("class") == "published"]
    assert "Published: " in text and "does not state k" in text
    assert "<strong>83.8</strong>" not in text  # only evaluated models can be bold


def test_nothing_is_injected(tmp_path: Path) -> None:
    picture = visualize.PictureRecord(file="pca-a.png", kind="pca", model=EVIL, caption=EVIL)
    fields = dict.fromkeys(("evaluation", "dataset", "model", "protocol", "metric"), EVIL)
    shown = [result(settings={EVIL: EVIL}, **fields), result(model_hash="c" * 64, settings={}, **fields)]
    text = report.page(shown, [(picture, b"\x89PNG")])
    read = Reader(text)
    names = {tag for tag, _ in read.tags}
    assert "script" not in names and "\x07" not in text
    assert not [name for _, fields in read.tags for name in fields if name.startswith("on")]
    assert html.escape("<script>alert('x')</script>") in text
    loads = [value for _, fields in read.tags for name, value in fields.items() if name in ("src", "href")]
    assert all(re.match(r"data:image/png;base64,|#[a-z0-9-]*$", value or "") for value in loads)
    assert any("default-src 'none'" in (fields.get("content") or "") for tag, fields in read.tags if tag == "meta")


def test_plots_stay_within_their_frame() -> None:
    series = [("one", [0.5, 0.75, None]), ("two", [0.25, 0.25, 0.5])]
    text = report.line_plot(["k=10", "k=20", "k=100"], series, "top-1")
    points = [line.split() for line in re.findall(r'points="([^"]*)"', text)]
    assert [len(line) for line in points] == [2, 3]
    positions = [tuple(map(float, point.split(","))) for line in points for point in line]
    assert all(0 <= x <= 640 and 0 <= y <= 260 for x, y in positions)
    assert positions[1][1] < positions[0][1] < positions[2][1]  # greater values are higher
    bars = report.bar_plot([("a", 0.4, False), ("b", 0.8, True)], "top-1", "top-1")
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height', bars)]
    assert widths[1] == pytest.approx(2 * widths[0]) and 'class="pale"' in bars
    report.line_plot(["k=1"], [("flat", [0.0])], "top-1")  # no division by a range of 0


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    output = str(tmp_path)
    with pytest.raises(InputError, match="neither results nor pictures"):
        report.write(output)
    results.append(output, result(value=0.1))
    results.append(output, result(value=0.9))  # a second run: the later record counts
    png = encoded_image(0)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/pca-a.png").write_bytes(png)
    record = visualize.PictureRecord(file="pca-a.png", kind="pca", model="teacher", caption="Colours.")
    (tmp_path / "pictures/pictures.jsonl").write_text(record.model_dump_json() + "\n")
    path = Path(report.write(output))
    first = path.read_bytes()
    text = first.decode()
    assert "90.0" in text and "10.0" not in text
    assert base64.b64encode(png).decode() in text and "Colours." in text
    report.write(output)
    assert path.read_bytes() == first
    (tmp_path / "pictures/pca-a.png").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match="is not a PNG"):
        report.write(output)
    (tmp_path / "pictures/pca-a.png").unlink()
    with pytest.raises(InputError, match="No picture at"):
        report.write(output)
