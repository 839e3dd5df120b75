"""The page of a run that stopped because the images of a source look alike: their pairs side by side, with scores."""

import base64
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation.copies.lookalikes import CROWDED, Lookalikes
from curation.engine.manifest import require_manifest
from curation.files import parquet, paths, schemas
from curation.report.markup import Markup, clip, page, quoted, section, tag
from curation.run_folder import RunFolder

NAME = "lookalikes.html"
# Characters of a file's name below its picture. Assumed: two lines.
MAX_NAME_LENGTH = 40

Pairs = Sequence[tuple[str, str, float]]


def write(
    run: RunFolder, output: str, threshold: float, lookalikes: Sequence[Lookalikes], pairs: Mapping[str, Pairs]
) -> str:
    """Write the page into the folder `output` of a run; returns its path.

    pairs: by source, two image_ids and their similarity.
    """
    ids = sorted({image_id for of_source in pairs.values() for pair in of_source for image_id in pair[:2]})
    ingested, described = require_manifest(run.ingest), require_manifest(run.describe)
    uris = _values(ids, ingested.paths(run.ingest, "images"), schemas.IMAGES, "uri")
    thumbnails = _values(ids, described.paths(run.describe, "thumbnails"), schemas.THUMBNAILS, "thumbnail")
    path = paths.join(output, NAME)
    paths.write_bytes(path, render(threshold, lookalikes, pairs, uris, thumbnails))
    return path


def remove(output: str) -> None:
    """Remove the page of a run that has gone on."""
    paths.delete(paths.join(output, NAME))


def render(
    threshold: float,
    lookalikes: Sequence[Lookalikes],
    pairs: Mapping[str, Pairs],
    uris: Mapping[str, str],
    thumbnails: Mapping[str, bytes],
) -> bytes:
    """The page. uris and thumbnails, which are encoded as WebP: by image_id; a thumbnail may be missing."""

    def figure(image_id: str) -> Markup:
        uri = uris[image_id]
        name = quoted(clip(posixpath.basename(uri) or uri, MAX_NAME_LENGTH))
        if image_id not in thumbnails:
            return tag("figure", tag("figcaption", name), title=clip(uri))
        data = base64.b64encode(thumbnails[image_id]).decode()
        picture = tag("img", src=f"data:image/webp;base64,{data}", alt=clip(uri), title=clip(uri))
        return tag("figure", picture, tag("figcaption", name), class_="frame")

    def shown(some: Pairs) -> Markup:
        items = (
            tag("div", figure(one), figure(other), tag("p", f"{similarity:.3f}"), class_="pair")
            for one, other, similarity in some
        )
        return tag("div", *items, class_="pairs large")

    title = "Images that look alike"
    sections = []
    for number, alike in enumerate(lookalikes):
        falling = sorted(pairs[alike.source], key=lambda pair: -pair[2])
        sections.append(
            section(
                f"source-{number}",
                clip(alike.source),
                tag("p", _counts(alike)),
                shown([pair for pair in falling if pair[2] >= threshold]),
                tag("p", f"{threshold:g}: copies above, not copies below", class_="divider"),
                shown([pair for pair in falling if pair[2] < threshold]),
            )
        )
    return page(title, None, tag("header", tag("h1", title), *_intro()), tag("main", *sections)).encode()


def _intro() -> tuple[Markup, ...]:
    return (
        tag(
            "p",
            "Dedup stopped before it dropped anything: no score tells copies of these sources from other images. Look "
            "at the pairs above the line, and run the same command again with one more option:",
        ),
        tag(
            "ul",
            tag("li", tag("code", "--set dedup.lookalikes=drop"), ": the pairs are copies."),
            tag(
                "li",
                tag("code", "--set dedup.lookalikes=exact"),
                ": the pairs are different images. Then only equal files of these sources are dropped, and their "
                "matches with the holdout.",
            ),
        ),
    )


def _counts(alike: Lookalikes) -> str:
    return (
        f"{alike.crowded / alike.images:.0%} of its {alike.images:,} images have {CROWDED} or more neighbours at the "
        f"threshold. The largest component holds {alike.largest_group:,} of them. Of their pairs, "
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
