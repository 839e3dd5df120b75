"""Makes the picture of a report that the README shows.

    python -m pipelines.demo.screenshot runs/demo --output docs/report.png

An installed Chromium draws the numbers at the top of the report, the funnel and the first rows of the gallery in a
window of a fixed size. The other sections are hidden in a copy of the page. The picture has few colours, so that it
stays small in the repository.
"""

import io
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from curation.engine import command, progress
from curation.errors import InputError
from curation.files import paths
from curation.report.page import REPORT_NAME

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1168, 1250
MAX_BYTES = 300_000
# Numbers of colours to try, and whether dithered, the best first. Dithering makes a PNG larger.
NUM_PAGE_COLOURS = 16
COLOURS = ((256, True), (256, False), (128, False), (64, False))
# Assumed: a page takes a second or two.
MAX_SECONDS = 60

# Four retrievals of the gallery of each dataset remain, as far as the window reaches.
STYLE = """<style>
section:not(#funnel):not(#gallery), nav, #funnel h3, #funnel h3 ~ *, #gallery > p:not(.legend):not(.caption),
.gallery > :nth-child(n + 5)
  { display: none }
header { padding-top: 20px }
section { margin-bottom: 12px; padding-bottom: 14px }
section h2 { margin: 10px 0 6px }
section h3 { margin: 10px 0 0 }
#gallery .caption { margin: 0 0 6px }
</style>"""


def run(folder: str, output: Path, *, dark: bool = False, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write the picture of the report in the run `folder` as a PNG of at most MAX_BYTES.

    dark: as a browser with a dark colour scheme shows it. Raises InputError without a report or a browser.
    """
    report = paths.join(folder, REPORT_NAME)
    if not paths.exists(report):
        raise InputError(f"There is no {REPORT_NAME} in '{folder}'. Give the folder of a finished run.")
    browser = find_browser()
    head, end, body = paths.read_bytes(report).decode().partition("</head>")
    with tempfile.TemporaryDirectory(prefix="seedbed-screenshot-") as temporary:
        page, drawn = Path(temporary, "page.html"), Path(temporary, "page.png")
        page.write_text(head + STYLE + end + body)
        arguments = [
            browser,
            "--headless",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={size[0]},{size[1]}",
            f"--user-data-dir={temporary}/profile",
            f"--screenshot={drawn}",
        ]
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium's sandbox refuses root; the page has no script
        try:
            completed = subprocess.run(
                [*arguments, page.as_uri()], capture_output=True, text=True, errors="replace", timeout=MAX_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{browser} drew no picture of '{report}' within {MAX_SECONDS} s. Run it again.") from None
        if not drawn.exists():
            lines = "\n".join(f"  {line}" for line in completed.stderr.splitlines()[-6:])
            raise InputError(f"{browser} drew no picture of '{report}' (status {completed.returncode}):\n{lines}")
        with Image.open(drawn) as picture:
            encoded = shrink(picture.convert("RGB"))
    output.parent.mkdir(parents=True, exist_ok=True)
    paths.write_bytes(str(output), encoded)
    progress.say(f"{output}: {size[0]} x {size[1]} pixels, {len(encoded):,} bytes")


def find_browser() -> str:
    """The path of the first of BROWSERS that is installed. Raises InputError where none is."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise InputError(
        f"A picture of a page needs a browser, and none of {', '.join(BROWSERS)} is on the PATH. Install one, for "
        "example with `apt-get install chromium-headless-shell`."
    )


def shrink(picture: Image.Image, max_bytes: int = MAX_BYTES) -> bytes:
    """The picture as a PNG of at most `max_bytes`, with the best of COLOURS that fits.

    Raises InputError where none fits.
    """
    pixels = np.asarray(picture)
    counts = picture.getcolors(picture.width * picture.height)
    assert counts is not None
    page_colours = [colour for _, colour in sorted(counts, reverse=True)[:NUM_PAGE_COLOURS]]
    for num_colours, dithered in COLOURS:
        # The colours of the page itself stay as they are; those of the thumbnails share the others.
        others = picture.quantize(num_colours - len(page_colours), dither=Image.Dither.NONE).getpalette()
        palette = Image.new("P", (1, 1))
        palette.putpalette([*np.array(page_colours).ravel().tolist(), *(others or ())])
        dither = Image.Dither.FLOYDSTEINBERG if dithered else Image.Dither.NONE
        reduced = picture.quantize(num_colours, palette=palette, dither=dither)
        indices = np.array(reduced)
        for index, colour in enumerate(page_colours):  # Pillow chooses a colour near white for some white pixels
            indices[(pixels == colour).all(axis=2)] = index
        reduced.putdata(indices.ravel().tolist())
        buffer = io.BytesIO()
        reduced.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= max_bytes:
            return buffer.getvalue()
    raise InputError(f"The picture has {buffer.tell():,} bytes with {num_colours} colours; the limit is {max_bytes:,}.")


def command_line(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("docs/report.png"),
    dark: Annotated[bool, typer.Option("--dark", help="Draw the page in its dark colours.")] = False,
) -> None:
    """Make a picture of the report of a run with an installed Chromium."""
    run(folder, output, dark=dark)


if __name__ == "__main__":
    from pipelines.demo import screenshot  # by its real name: otherwise each class would exist twice

    command.main(screenshot.command_line)
