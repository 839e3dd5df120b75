"""The picture of a report: the shown sections, the dark colours, its size, and the messages of wrong use."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.errors import InputError
from curation.report import markup
from curation.report.markup import Markup
from curation.report.page import REPORT_NAME
from pipelines.demo import screenshot

needs_browser = pytest.mark.skipif(
    not any(shutil.which(name) for name in screenshot.BROWSERS), reason="draws a page: needs Chromium"
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A page with a coloured block in each of three sections, and a scheme of its own for dark screens."""
    colours = {"funnel": "#ff0000", "copies": "#0000ff", "gallery": "#00ff00"}
    blocks = [
        markup.section(name, name, markup.tag("div", style=f"height:50px;background:{colour}"))
        for name, colour in colours.items()
    ]
    style = Markup("body { background: #fff } @media (prefers-color-scheme: dark) { body { background: #111 } }")
    (tmp_path / REPORT_NAME).write_text(markup.page("Report", None, *blocks, style=style))
    return tmp_path


def colours_of(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (400, 300))
        return {colour for _, colour in picture.convert("RGB").getcolors(400 * 300)}  # type: ignore[misc]


@needs_browser
def test_the_picture_shows_the_funnel_and_the_gallery_alone(run_folder: Path) -> None:
    output = run_folder / "new" / "report.png"
    screenshot.run(str(run_folder), output, size=(400, 300))
    light = colours_of(output)
    assert {(255, 0, 0), (0, 255, 0), (255, 255, 255)} <= light
    assert (0, 0, 255) not in light
    screenshot.run(str(run_folder), output, size=(400, 300), dark=True)
    dark = colours_of(output)
    assert {(255, 0, 0), (0, 255, 0), (17, 17, 17)} <= dark
    assert (255, 255, 255) not in dark


def test_fewer_colours_are_taken_where_the_picture_is_too_large() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8))

    def num_colours(max_bytes: int) -> int:
        encoded = screenshot.shrink(picture, max_bytes)
        assert len(encoded) <= max_bytes
        with Image.open(io.BytesIO(encoded)) as reduced:
            return len(reduced.getcolors())  # type: ignore[arg-type]

    most = len(screenshot.shrink(picture))
    assert num_colours(most) > 128 >= num_colours(most - 1)
    with pytest.raises(InputError, match=r"bytes with 64 colours; the limit is 100\."):
        screenshot.shrink(picture, 100)


@pytest.mark.parametrize(
    ("has_report", "message"),
    [
        (True, "none of chromium-headless-shell, chromium, chromium-browser, google-chrome is on the PATH"),
        (False, f"There is no {REPORT_NAME} in '"),
    ],
)
def test_wrong_use_is_one_message(run_folder: Path, has_report: bool, message: str) -> None:
    if not has_report:
        (run_folder / REPORT_NAME).unlink()
    command = [sys.executable, "-m", "pipelines.demo.screenshot", str(run_folder), "--output", run_folder / "out.png"]
    completed = subprocess.run(command, env={**os.environ, "PATH": str(run_folder)}, capture_output=True, text=True)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr
    assert not (run_folder / "out.png").exists()
