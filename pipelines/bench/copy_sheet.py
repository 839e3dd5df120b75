"""Pages of merged pairs, for a person to look at.

    SHEET/
      pairs-00.png ...   rows of two pictures: the dropped image, the image it was dropped for, and their score

Pairs of different pictures come first, then a random choice of the others. Planted pairs, a copy with its original, are
left out.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from curation.engine import progress
from curation.errors import InputError
from pipelines.bench.copy_scores import Truth, read_decisions

NUM_PAIRS, PAIRS_PER_PAGE, COLUMNS = 200, 40, 4
SIDE, LINE = 150, 30  # pixels: of a picture, and of the text below


def write(truth: Truth, run: str, folder: Path) -> None:
    """Write the pages to the new folder. Raises InputError where it holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--sheet '{folder}' is not empty. Give a new folder, or delete this one.")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = choose(truth, run)
    for page in range(0, len(pairs), PAIRS_PER_PAGE):
        _page(truth, pairs[page : page + PAIRS_PER_PAGE], page).save(folder / f"pairs-{page // PAIRS_PER_PAGE:02d}.png")
    num_false = sum(is_false(truth, one, other) for one, other, _ in pairs)
    progress.say(f"{folder}: {len(pairs)} merged pairs, {num_false} of them of different pictures (marked !)")


def choose(truth: Truth, run: str) -> list[tuple[int, int, float]]:
    """The rows and the score of at most NUM_PAIRS pairs."""
    pairs = []
    for decision in read_decisions(run):
        if decision.matched_image_id is None or decision.reason == "exact":
            continue
        one, other = truth.row_of[decision.image_id], truth.row_of[decision.matched_image_id]
        if truth.original[one] != other and truth.original[other] != one:
            pairs.append((one, other, math.nan if decision.similarity is None else decision.similarity))
    shuffled = [pairs[index] for index in np.random.default_rng(0).permutation(len(pairs))]
    return sorted(shuffled, key=lambda pair: not is_false(truth, pair[0], pair[1]))[:NUM_PAIRS]


def is_false(truth: Truth, one: int, other: int) -> bool:
    """Whether the files show different pictures that are not near-duplicates."""
    return bool(truth.alike[one] != truth.alike[other])


def _page(truth: Truth, pairs: list[tuple[int, int, float]], first: int) -> Image.Image:
    width, height = 2 * SIDE + 12, SIDE + LINE
    page = Image.new("RGB", (COLUMNS * width, -(-len(pairs) // COLUMNS) * height), (235, 235, 235))
    draw = ImageDraw.Draw(page)
    for index, (one, other, similarity) in enumerate(pairs):
        left, top = index % COLUMNS * width, index // COLUMNS * height
        for column, row in enumerate((one, other)):
            with Image.open(truth.folder / truth.paths[row]) as opened:
                picture = opened.convert("RGB")
            picture.thumbnail((SIDE - 4, SIDE - 4))
            page.paste(picture, (left + column * SIDE + 4, top + 2))
        mark = "! " if is_false(truth, one, other) else ""
        kinds = " / ".join(truth.kinds[row] or "original" for row in (one, other))
        draw.text((left + 4, top + SIDE), f"{mark}{first + index + 1}: {similarity:.2f}  {kinds}", "black")
    return page
