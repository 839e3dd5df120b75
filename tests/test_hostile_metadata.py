"""Untrusted names on pages and terminals: they are shown as text and have no other effect.

tests/curation/report/test_page.py tests the report of a curation run with hostile names.
"""

import html.parser
import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from curation.engine import progress
from curation.images.sources import SourceConfig
from curation.report import markup
from evaluation import report, visualize
from tests.evaluation.test_report import result

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</code></td></table></style></title><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "<!--",
    "]]><![CDATA[<b>",
    "&lt;script&gt;&#60;script&#62;",
    "<meta http-equiv=refresh content=0;url=//example>",
    "<link rel=stylesheet href=//example/a.css>",
    "{{7*7}}${7*7}",
    "@import url(//example)",
    "nul\0esc\x1b[2Jbell\x07",
    "\u202egnp.exe",
    "half\udc80",
    "x" * 10_000,
]


class Shape(html.parser.HTMLParser):
    """The structure of a page as a browser reads it: elements in order, the names of their attributes, addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.addresses: list[str] = []
        self.others: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.addresses += [
            value or "" for name, value in attrs if name in ("href", "src", "action", "style", "content")
        ]

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)


def evaluation_page(name: str) -> str:
    names = dict.fromkeys(("evaluation", "dataset", "model", "protocol", "metric"), name)
    results = [
        result(**names, settings={name: name}),
        result(**names | {"model": name + "2"}, model_hash="c" * 64),
        *(result(**names | {"protocol": f"{name}={k}"}) for k in (1, 2, 3)),
    ]
    picture = visualize.PictureRecord(file="pca-a.png", kind="pca", model=name, caption=name)
    return report.page(results, [(picture, b"\x89PNG")])


@pytest.mark.parametrize("name", HOSTILE)
def test_name_does_not_change_the_structure_of_the_evaluation_report(name: str) -> None:
    plain, hostile = Shape(evaluation_page("name")), Shape(evaluation_page(name))
    assert hostile.elements == plain.elements and len(plain.elements) > 60
    assert hostile.others == []
    links = [address for address in hostile.addresses if address.startswith("#")]
    assert links and all(re.fullmatch("#[a-z0-9-]*", link) for link in links)
    others = [[address for address in shape.addresses if not address.startswith("#")] for shape in (plain, hostile)]
    assert others[0] == others[1]


@pytest.mark.parametrize("name", HOSTILE)
def test_name_does_not_change_the_structure_of_the_parts_of_the_curation_report(name: str) -> None:
    def page(name: str) -> str:
        rows = [(markup.quoted(name), name, 1)]
        parts = [
            markup.table((name, "b", "c"), rows),
            markup.bar((0.5, "stays"), label=name),
            markup.legend(("stays", name)),
            markup.columns([(name, 3, "")]),
            markup.tag("img", src="data:image/webp;base64,AA==", alt=name, title=name),
            markup.tag("pre", name),
        ]
        return markup.page(name, "f" * 64, markup.section("part", name, *parts))

    plain, hostile = Shape(page("x" * 41)), Shape(page(name))
    attributes = {names for _, names in plain.elements} | {("dir",)}  # a short name lacks the marks of a long one
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert {names for _, names in hostile.elements} <= attributes and hostile.others == []
    assert hostile.addresses == plain.addresses
    assert markup.read_fingerprint(page(name)) == "f" * 64


def test_terminal_receives_no_control_characters() -> None:
    texts = ["\x1b[2J", "\x1b]0;title\x07", "\r\x00\x08", "\x9b1m", "\u202egnp.exe", "\u2066", "\udc80"]
    for text in texts:
        shown = progress.printable(f"a{text}b\nc ü☃")
        assert shown.replace("\n", "").isprintable() and shown.startswith("a") and shown.endswith("b\nc ü☃")
    code = "from curation import errors\nfrom curation.engine import command, progress\nprogress.say({0!r})\n"
    code += "def run() -> None:\n    raise errors.InputError({0!r})\ncommand.main(run)"
    done = subprocess.run([sys.executable, "-c", code.format("a.png".join(texts))], capture_output=True, timeout=100)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.count(b"a.png") == 12 and done.stderr.decode().replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "\u202egnp"])
def test_source_name_must_be_printable(name: str) -> None:
    with pytest.raises(ValidationError, match="printable characters only"):
        SourceConfig(name=name, path="p", role="pool")
