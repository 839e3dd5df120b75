"""The page of a run that stopped because the images of a source look alike: their pairs side by side, with scores."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation.copies.lookalikes import CROWDED, Lookalikes
from curation.engine.manifest import require_manifest
from curation.files import parquet, paths, schemas
from curation.report.markup import Markup, clip, join, page, quoted, section, tag
from curation.run_folder import RunFolder

NAME = "lookalikes.html"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
.pairs { display: flex; flex-wrap: wrap; gap: 1rem; }
.pair { border: 1px solid #ccc; border-radius: 4px; padding: .5rem; width: 20rem; }
.pair p { margin: .25rem 0 0; font-size: .8rem; overflow-wrap: anywhere; }
.pair img { width: 9.5rem; height: 9.5rem; object-fit: contain; background: #f2f2f2; }
.pictures { display: flex; gap: .5rem; }
code { background: #f2f2f2; padding: 0 .2rem; }
"""


Pairs = Sequence[tuple[str, str, float]]


def write(run: RunFolder, output: str, lookalikes: Sequence[Lookalikes], pairs: Mapping[str, Pairs]) -> str:
    """Write the page into the folder `output` of a run; returns its path.

    pairs: by source, two image_ids and their similarity.
    """
    ids = sorted({image_id for of_source in pairs.values() for pair in of_source for image_id in pair[:2]})
    ingested, described = require_manifest(run.ingest), require_manifest(run.describe)
    uris = _values(ids, ingested.paths(run.ingest, "images"), schemas.IMAGES, "uri")
    thumbnails = _values(ids, described.paths(run.describe, "thumbnails"), schemas.THUMBNAILS, "thumbnail")
    path = paths.join(output, NAME)
    paths.write_bytes(path, render(lookalikes, pairs, uris, thumbnails))
    return path


def remove(output: str) -> None:
    """Remove the page of a run that has gone on."""
    paths.delete(paths.join(output, NAME))


def render(
    lookalikes: Sequence[Lookalikes],
    pairs: Mapping[str, Pairs],
    uris: Mapping[str, str],
    thumbnails: Mapping[str, bytes],
) -> bytes:
    """The page. uris and thumbnails, which are encoded as WebP: by image_id; a thumbnail may be missing."""
    intro = tag(
        "p",
        "Dedup stopped before it dropped anything: no score tells copies of these sources from other images. Where the "
        "pairs are copies, set ",
        tag("code", 'dedup.lookalikes = "drop"'),
        ". Where they are different images, set ",
        tag("code", 'dedup.lookalikes = "exact"'),
        ": then only equal files of these sources, and their matches with the holdout, are dropped.",
    )

    def shown(pair: tuple[str, str, float]) -> Markup:
        one, other, similarity = pair
        pictures = [
            tag("img", src=f"data:image/webp;base64,{base64.b64encode(thumbnails[image_id]).decode()}", alt="")
            for image_id in (one, other)
            if image_id in thumbnails
        ]
        names = join(quoted(uris[one]), " ", quoted(uris[other]))
        score = tag("p", tag("strong", f"{similarity:.3f}"))
        return tag("div", tag("div", *pictures, class_="pictures"), score, tag("p", names), class_="pair")

    sections = [
        section(
            f"source-{number}",
            clip(alike.source),
            tag("p", _counts(alike)),
            tag("div", *map(shown, pairs[alike.source]), class_="pairs"),
        )
        for number, alike in enumerate(lookalikes)
    ]
    title = "Images that look alike"
    return page(title, None, tag("main", tag("h1", title), intro, *sections), style=_STYLE).encode()


def _counts(alike: Lookalikes) -> str:
    return (
        f"{alike.crowded / alike.images:.0%} of its {alike.images:,} images have {CROWDED} or more neighbours at the "
        f"threshold; the largest component holds {alike.largest_group:,} of them. Of their pairs, "
        f"{alike.near_threshold:,} lie near the threshold and {alike.above:,} above. Some pairs, with their similarity:"
    )


def _values(image_ids: Sequence[str], files: Sequence[str], schema: pa.Schema, column: str) -> dict[str, Any]:
    """The values of a column by image_id, for some images in these files."""
    wanted = pa.array(image_ids, pa.string())
    result: dict[str, Any] = {}
    for file in files:
        table = parquet.read_table(file, schema, ["image_id", column])
        table = table.filter(pc.is_in(table["image_id"], wanted))
        result = dict(zip(*(table[name].to_pylist() for name in ("image_id", column)), strict=True)) | result
    return result
