"""Self-check: a run measures on edited copies of its own pool images how many copies it recognises.

    self_check/
      drawn-00000.parquet            schemas.PLANNED_COPIES: the copies to make, with a row group for each shard
      scores-00000.parquet  ...      schemas.SELF_CHECK_SCORES: the candidates of each copy, and their similarity
      known-00000.parquet            schemas.SELF_CHECK_KNOWN: the pairs of the run with the edited images
      manifest.json

Thresholds that suit one domain do not suit another one, and no benchmark holds the images of a user. So some pool
images are edited in all kinds of copies/edits.py. Each copy is described as an image of the pool would be, and compared
as `pairs` would compare it:

    candidates    its nearest descriptors above the floor, searched exactly, and its near perceptual hashes. The
                  original is a candidate, too, where the copy would be among the nearest of the original
    similarity    that of the thumbnails, or the cosine, as in `pairs`

The copies stay in this stage: no other stage reads it, and none of them enters the corpus. The report computes the
results from the scores, at the thresholds of dedup (copies/recall.py).

The images are those with the smallest image_ids; an id is a hash of the image's bytes. Every kind edits equally many
images, as many as the run's size pays for. `num_copies_per_kind` gives the rule. An image is edited at EDITED_SIDE
pixels. An edit depends on the image and on the kind alone.

A worker holds one shard of copies with their thumbnails, and one file of descriptors. It reads all descriptors and all
perceptual hashes once, and the descriptors a second time for the candidates.

Legend: C copies of a shard, N rows of describe, D dimensions, P pairs. A place is a row of describe, counted through
all of its files; copy number c, counted through all shards, has the place N + c.
"""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from pydantic import Field

from curation.config import Settings, plan_values
from curation.copies.described import DescribedRows, Verifier
from curation.copies.edits import KINDS, edit
from curation.embed import EmbedConfig, embed_encoded, with_weights_hash
from curation.engine.device import require_device
from curation.engine.manifest import Manifest, ShardRecord, require_fact, require_manifest
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.files import parquet, paths, schemas, vectors
from curation.files.hashes import hash_json
from curation.files.image_ids import pack_ids, unpack_ids
from curation.files.prefetch import prefetch
from curation.images.decode import ImageLimits, decode_rgb
from curation.images.hashing import hamming_distance, perceptual_hash
from curation.images.sources import ReferenceReader
from curation.models.embedders import hash_of_weights, load_embedder
from curation.pairs import PairsConfig
from curation.run_folder import RunFolder
from curation.search import exact

DRAWN_NAME, KNOWN_NAME = "drawn-00000.parquet", "known-00000.parquet"
SEED = 0  # of the edits
# Longest side of an image when it is edited. Assumed: a common width of pictures on web pages.
EDITED_SIDE = 640
# Shortest side down to which a picture is reduced for it, so that a long narrow one keeps its content. Assumed.
MIN_EDITED_SIDE = 32
# Images of the run for each copy. Measured 2026-11-29 on two cores: the stage then takes 9% of a run of 2,300
# photographs (16 neighbours) and of one of 3,801 drawings (32), because a copy has a list of neighbours to itself.
IMAGES_PER_COPY = 16
# Copies of a kind in the smallest run. Assumed: one copy of a kind tells next to nothing.
MIN_COPIES_PER_KIND = 2
# Copies of a shard. Assumed: some seconds of work, so that two workers have equal shares in a small run.
COPIES_PER_SHARD = len(KINDS)
# Copies are not bound by the limits of the pool: they are pictures that this process made.
_COPY_LIMITS = ImageLimits(min_side=1)


class SelfCheckConfig(Settings):
    """The measurement of copy detection on the run's own images."""

    max_images: int = Field(default=0, ge=0, le=10_000)
    """Maximum number of pool images that are edited, and of the copies of each kind; 0 switches the measurement off.
    Set 0 where the time counts (docs/own-images.md has the cost)."""


def num_copies_per_kind(max_images: int, num_images: int) -> int:
    """The copies of each kind for a run of `num_images` images, if its pool has as many images."""
    return min(max_images, max(MIN_COPIES_PER_KIND, num_images // (IMAGES_PER_COPY * len(KINDS))))


def run(
    config: SelfCheckConfig,
    inputs: RunFolder,
    output: str,
    runner: Runner,
    *,
    describe: EmbedConfig,
    pairs: PairsConfig,
    replace: bool = False,
    log: Log = None,
) -> Manifest:
    """Score edited copies of pool images of the finished ingest, describe and pairs; returns the manifest.

    describe, pairs: the configs of these stages. The manifest has no shard where `max_images` is 0. Raises InputError
    when a source has changed since ingest, and DeviceError or WeightsError for the model.
    """
    ingested, described = require_manifest(inputs.ingest), require_manifest(inputs.describe)
    paired = require_manifest(inputs.pairs)
    if not config.max_images:
        nothing = Stage(
            name="self_check", config=config, inputs={}, output=output, shards=[], make_worker=_make_no_worker
        )
        return run_stage(nothing, runner, replace=replace, log=log)
    limits = ImageLimits.model_validate(require_fact(inputs.ingest, ingested, "limits"), strict=False)
    per_kind = num_copies_per_kind(config.max_images, ingested.totals.get("accepted", 0))
    num_shards = -(-per_kind * len(KINDS) // COPIES_PER_SHARD)
    weights_hash = hash_of_weights(describe.embedder)
    files = Files(
        ingested.paths(inputs.ingest, "images"),
        described.paths(inputs.describe, "vectors"),
        described.paths(inputs.describe, "thumbnails"),
    )
    stage = Stage(
        name="self_check",
        config=config,
        inputs={
            "images": ingested.content_hash,
            "descriptors": described.content_hash,
            "pairs": paired.content_hash,
            "weights": weights_hash,
            "comparison": hash_json([plan_values(describe), plan_values(pairs)]),
        },
        output=output,
        shards=[
            Shard(f"{number:05d}", number, min(COPIES_PER_SHARD, per_kind * len(KINDS) - number * COPIES_PER_SHARD))
            for number in range(num_shards)
        ],
        make_worker=functools.partial(
            make_worker, with_weights_hash(describe, weights_hash), pairs, limits, files, output
        ),
        prepare=functools.partial(_draw, config.max_images, per_kind, files.images, output),
        finish=lambda done: ({}, _write_known(paired.paths(inputs.pairs, "pairs"), output)),
        facts={"min_similarity": pairs.min_similarity},
        unit="copies",
    )
    return run_stage(stage, runner, replace=replace, log=log)


def read_scores(folder: str) -> tuple[pa.Table, pa.Table]:
    """All rows of SELF_CHECK_SCORES and of SELF_CHECK_KNOWN of a finished self-check; none where it was off."""
    manifest = require_manifest(folder)
    scores, known = (
        pa.concat_tables(
            [schema.empty_table(), *(parquet.read_table(path, schema) for path in manifest.paths(folder, kind))]
        )
        for kind, schema in (("scores", schemas.SELF_CHECK_SCORES), ("known", schemas.SELF_CHECK_KNOWN))
    )
    return scores, known


@dataclass(frozen=True)
class Files:
    """The files of ingest and describe, shard by shard."""

    images: Sequence[str]
    vectors: Sequence[str]
    thumbnails: Sequence[str]
    """Empty where describe writes none."""


def _make_no_worker() -> Callable[[Shard], ShardRecord]:
    raise AssertionError("the stage has no shard")


# The draw


def _draw(max_images: int, per_kind: int, image_files: Sequence[str], output: str) -> ShardRecord:
    """Write the copies to make, by shard. Copies of one image follow one another."""
    ids = np.empty(0, "S16")
    for file in image_files:
        table = parquet.read_table(file, schemas.IMAGES, ["image_id", "role"])
        of_pool = pack_ids(table.filter(pc.equal(table["role"], "pool"))["image_id"])
        ids = np.unique(np.concatenate([ids, of_pool]))[:max_images]
    columns = [name for name in schemas.PLANNED_COPIES.names if name != "kind"]
    first_rows: dict[str, dict[str, Any]] = {}
    for file in image_files:
        table = parquet.read_table(file, schemas.IMAGES, columns)
        for row in table.filter(pc.is_in(table["image_id"], value_set=unpack_ids(ids))).to_pylist():
            first_rows.setdefault(row["image_id"], row)
    per_kind = min(per_kind, len(ids))
    # Kind q edits `per_kind` images in a row, counted around all of them; the next kind goes on behind them.
    chosen = sorted((number % len(ids), number // per_kind) for number in range(per_kind * len(KINDS)))
    names, ids_in_order = list(KINDS), unpack_ids(ids).to_pylist()
    copies = pa.Table.from_pylist(
        [first_rows[ids_in_order[image]] | {"kind": names[kind]} for image, kind in chosen], schemas.PLANNED_COPIES
    )
    by_shard = (
        (start // COPIES_PER_SHARD, copies.slice(start, COPIES_PER_SHARD))
        for start in range(0, copies.num_rows, COPIES_PER_SHARD)
    )
    drawn = parquet.write_row_groups(
        paths.join(output, DRAWN_NAME), "shard", by_shard, schemas.PLANNED_COPIES.empty_table()
    )
    return ShardRecord(name=PREPARED, files=(drawn,), totals={"images": len({image for image, _ in chosen})})


def _write_known(pair_files: Sequence[str], output: str) -> ShardRecord:
    """Write the pairs of the run with an edited image, in both directions where both are edited."""
    edited = pc.unique(parquet.read_table(paths.join(output, DRAWN_NAME), schemas.PLANNED_COPIES, ["image_id"])[0])
    tables = [schemas.SELF_CHECK_KNOWN.empty_table()]
    for file in pair_files:
        table = parquet.read_table(file, schemas.PAIRS, ["image_id", "other_image_id", "similarity"])
        for one, other in (("image_id", "other_image_id"), ("other_image_id", "image_id")):
            rows = table.filter(pc.is_in(table[one], value_set=edited))
            tables.append(pa.table([rows[one], rows[other], rows["similarity"]], schema=schemas.SELF_CHECK_KNOWN))
    known = pa.concat_tables(tables).sort_by([("image_id", "ascending"), ("other_image_id", "ascending")])
    written = parquet.write_table(paths.join(output, KNOWN_NAME), known.combine_chunks())
    return ShardRecord(name="known", files=(written,))


# The copies


def make_worker(
    describe: EmbedConfig, pairs: PairsConfig, limits: ImageLimits, files: Files, output: str
) -> Callable[[Shard], ShardRecord]:
    """A worker that makes, describes and compares the copies of a shard."""
    require_device(pairs.search.device)
    torch.set_num_threads(describe.threads_per_worker)
    embedder = load_embedder(describe.embedder)
    verifier = Verifier(pairs.verification) if pairs.verification else None
    rows = DescribedRows(files.vectors, files.thumbnails)

    def process(shard: Shard) -> ShardRecord:
        planned = parquet.read_row_groups(
            paths.join(output, DRAWN_NAME), "shard", shard.work, schemas.PLANNED_COPIES
        ).to_pylist()
        hashes: list[int] = []
        descriptors, thumbnails = embed_encoded(describe, embedder, _COPY_LIMITS, _encoded(planned, limits, hashes))
        ids = [row["image_id"] for row in planned]
        found = candidates_of(pairs, files, ids, descriptors, np.array(hashes, np.uint64))
        copy, place = found.copy, found.place
        similarity = found.cosine
        if verifier is not None:
            first = rows.count + shard.work * COPIES_PER_SHARD  # the verifier knows a thumbnail by its place
            stored = rows.thumbnails(place)
            stored |= {first + number: thumbnail for number, thumbnail in enumerate(thumbnails) if thumbnail}
            similarity = np.empty(len(copy), np.float32)
            for number in range(len(planned)):
                of_copy = np.flatnonzero(copy == number)
                both = np.stack([first + copy[of_copy], place[of_copy]])
                similarity[of_copy] = verifier.compare(both, stored)[0]
                report(1, total=len(planned))
        table = pa.table(
            [
                pa.array([ids[number] for number in copy.tolist()], pa.string()),
                pa.array(found.ids, pa.string()),
                pa.array([planned[number]["kind"] for number in copy.tolist()], pa.string()),
                found.proposed,
                similarity,
            ],
            schema=schemas.SELF_CHECK_SCORES,
        )
        file = parquet.write_table(paths.join(output, f"scores-{shard.name}.parquet"), table)
        totals = {"copies": len(planned), "candidates": int(found.proposed.sum())}
        return ShardRecord(name=shard.name, files=(file,), totals=totals)

    return process


def edited_copy(picture: Image.Image, image_id: str, kind: str) -> Image.Image:
    """The copy of one kind of an image (RGB), given at its full size or reduced while it was decoded."""
    scale = max(EDITED_SIDE / max(picture.size), MIN_EDITED_SIDE / min(picture.size))
    if scale < 1:
        width, height = (max(1, round(scale * length)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return edit(picture, kind, np.random.default_rng([SEED, int(image_id, 16), *kind.encode()]))


def _encoded(
    planned: Sequence[dict[str, Any]], limits: ImageLimits, hashes: list[int]
) -> Iterator[tuple[bytes, int, int]]:
    """The bytes, width and height of each copy. Appends its perceptual hash to `hashes`.

    The bytes are those of a BMP file, which loses nothing and costs little, so that a copy is decoded as any image is.
    """
    reader = ReferenceReader()
    picture, of_image = Image.new("RGB", (1, 1)), ""
    try:
        for row in planned:
            image_id, uri, offset, length, layout, kind = (row[name] for name in schemas.PLANNED_COPIES.names)
            if image_id != of_image:
                data = reader.read(uri, offset, length, image_id, layout)
                picture, of_image = decode_rgb(data, limits, target_side=EDITED_SIDE), image_id
            copy = edited_copy(picture, image_id, kind)
            hashes.append(perceptual_hash(copy))
            buffer = io.BytesIO()
            copy.save(buffer, "BMP")
            yield buffer.getvalue(), copy.width, copy.height
    finally:
        reader.close()


# The candidates


@dataclass(frozen=True)
class Candidates:
    """The original of each copy of a shard, and the other candidates of the copy by id; the copies in order."""

    copy: np.ndarray  # (P,) int64: the number of the copy
    place: np.ndarray  # (P,) int64: of the other image
    ids: list[str]  # (P,): of the other image
    cosine: np.ndarray  # (P,) float32
    proposed: np.ndarray  # (P,) bool: false for an original that is no candidate


@dataclass(frozen=True)
class _Neighbor:
    image_id: str
    place: int
    cosine: float


def candidates_of(
    pairs: PairsConfig, files: Files, originals: Sequence[str], descriptors: np.ndarray, hashes: np.ndarray
) -> Candidates:
    """The candidates of copies, given the ids of their originals, their descriptors (C, D) and hashes (C,)."""
    starts = np.cumsum([0, *(vectors.num_rows(file) for file in files.vectors)])
    place_of, place_by_copy = _near_hashes(pairs.max_phash_distance, files, starts, originals, hashes)
    original_places = np.array([place_of[original] for original in originals], np.int64)
    described = DescribedRows(files.vectors, files.thumbnails)
    of_originals = described.vectors(original_places)
    numbers = np.arange(len(originals))
    cosine = exact.pair_similarity(descriptors, numbers, of_originals, numbers)
    near_of_original = np.zeros(len(originals), bool)
    if pairs.num_neighbors and len(originals):
        for near, neighbors in zip(place_by_copy, _nearest(pairs, descriptors, files, described), strict=True):
            near |= {neighbor.image_id: neighbor.place for neighbor in neighbors}
        lists = _nearest(pairs, of_originals, files, described, without=originals)
        least = [each[-1].cosine if len(each) == pairs.num_neighbors else -np.inf for each in lists]
        near_of_original = cosine >= np.maximum(np.array(least, np.float32), pairs.min_descriptor_similarity)
    rows: list[tuple[int, int, str, bool]] = []
    for number, (original, near) in enumerate(zip(originals, place_by_copy, strict=True)):
        rows.append((number, place_of[original], original, original in near or bool(near_of_original[number])))
        rows += [(number, place, image_id, True) for image_id, place in sorted(near.items()) if image_id != original]
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    copy, place, ids, proposed = (list(column) for column in columns)
    places, position = np.unique(np.array(place, np.int64), return_inverse=True)
    cosine = exact.pair_similarity(descriptors, np.array(copy, np.int64), described.vectors(places), position)
    return Candidates(
        np.array(copy, np.int64), np.array(place, np.int64), ids, cosine.clip(-1, 1), np.array(proposed, bool)
    )


def _near_hashes(
    max_distance: int, files: Files, starts: np.ndarray, originals: Sequence[str], hashes: np.ndarray
) -> tuple[dict[str, int], list[dict[str, int]]]:
    """The place of each original, and for each copy the places of the images with a near perceptual hash, by id."""
    wanted = pa.array(sorted(set(originals)), pa.string())
    place_of: dict[str, int] = {}
    near: list[dict[str, int]] = [{} for _ in originals]
    for images, described, start in zip(files.images, files.vectors, starts.tolist(), strict=False):
        ids = parquet.read_table_columns(described, ["image_id"])["image_id"].combine_chunks()
        rows = pc.index_in(wanted, value_set=ids).to_pylist()
        for image_id, row in zip(wanted.to_pylist(), rows, strict=True):
            if row is not None:
                place_of.setdefault(image_id, start + row)
        if max_distance < 0:
            continue
        table = parquet.read_table(images, schemas.IMAGES, ["image_id", "phash"])
        distance = hamming_distance(hashes[:, None], table["phash"].to_numpy()[None])
        for copy, ingested in zip(*(index.tolist() for index in np.nonzero(distance <= max_distance)), strict=True):
            image_id = table["image_id"][ingested]
            near[copy].setdefault(image_id.as_py(), start + pc.index(ids, image_id).as_py())
    return place_of, near


def _nearest(
    pairs: PairsConfig, queries: np.ndarray, files: Files, described: DescribedRows, without: Sequence[str] = ()
) -> list[list[_Neighbor]]:
    """The images nearest to each of `queries` (Q, D), at most `num_neighbors`, and above the floor of `pairs`.

    without: for each query the id of an image that is no neighbour of it.
    """
    count = pairs.num_neighbors
    wanted = count + 1  # one more, for the image that is left out
    while True:
        blocks = (matrix for _, matrix in prefetch(vectors.read_file, files.vectors))
        floor, device = pairs.min_descriptor_similarity, pairs.search.device
        cosine, place = exact.search(queries, blocks, wanted, floor=floor, device=device)
        name_of = described.ids(place[place >= 0])
        lists, is_short = [], False
        for number, of_query in enumerate(place.tolist()):
            left_out = without[number] if without else None
            nearest: dict[str, _Neighbor] = {}  # an image has a row for each shard of ingest that lists it
            for at, value in zip(of_query, cosine[number].tolist(), strict=True):
                if at >= 0 and name_of[at] != left_out:
                    nearest.setdefault(name_of[at], _Neighbor(name_of[at], at, value))
            lists.append(list(nearest.values())[:count])
            is_short |= len(lists[-1]) < count and of_query[-1] >= 0
        if not is_short:
            return lists
        wanted *= 2
