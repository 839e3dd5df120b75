"""The pairs of images with the holdout, without a cap on their number.

    <output>/
      holdout-00000.parquet  ...     the vectors of the holdout by id, with their places in `describe`
      scored-00000.parquet  ...      SCORED, one row group for each bucket of ids
      manifest.json

A full list of neighbours may hide a holdout image: 70 equal pool images fill one another's lists of 64. The approximate
search may miss one, too. So this step compares seeds and pool images with all holdout images, exactly: with `ivf` every
image, with the `exact` search the images whose lists are full, because the other lists are complete. Their pairs join
the other candidates.

The holdout images of an image come in falling order of the cosine, ties by id. Without verification, the first decides,
since the similarity is the cosine; an image is left out when its list certainly holds that one. With verification, they
are compared until one has a similarity of SURE_MATCH. The search gives the nearest `k`, and four times as many in each
further round for the images that need more. So memory does not grow with the number of near holdout images.

Cost with the `exact` search, in CPU seconds of `pairs`: nothing without full lists, and 4% where every list is full.
Measured 2026-11-28 on 2 cores, 50,000 x 512 in 500 groups, with 1,000 holdout images.

Legend: Q images, H holdout images, K neighbours, P pairs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.config import Settings
from curation.engine.device import require_device
from curation.engine.manifest import Manifest, ShardRecord, require_manifest
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import InputError
from curation.files import parquet, paths, schemas, vectors
from curation.files.image_ids import id_bytes, id_column
from curation.files.prefetch import prefetch
from curation.search import exact, self_join
from curation.search.config import SearchConfig
from curation.search.self_join import PAIRED, Images

# Candidates with their scores; the similarity is NaN where the pair was not compared.
SCORED = PAIRED.append(pa.field("similarity", pa.float32())).append(pa.field("differs_locally", pa.bool_()))
# With verification: the similarity at which an image is compared with no further holdout images. It bounds the time
# for large groups of near-equal images. Assumed: copies with common edits reach 0.5 to 0.7, and dedup refuses a
# holdout_threshold above this value.
SURE_MATCH = 0.9
# Holdout images in a file and in memory at a time, as float16: 67 MB at D 512. Assumed.
ROWS_PER_FILE = 65_536
# Neighbours that are held at a time: 50 MB. Assumed.
NEIGHBORS_HELD = 1 << 22
# Pairs whose thumbnails are held at a time. Assumed.
PAIRS_PER_BATCH = 16_384
# Compares the pairs (2, P) of some places: gives similarities (P,) and whether they differ locally (P,).
Compare = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# Loads the thumbnails of the pairs (2, P) of some places, and gives their comparison.
Loader = Callable[[np.ndarray], Compare]
# Similarities and rows (Q, K) of the holdout images nearest to some images, as `exact.search` gives them.
Nearest = Callable[[Images, int], tuple[np.ndarray, np.ndarray]]


class ScoredPairs(NamedTuple):
    """Compared pairs, as columns (P,)."""

    image: np.ndarray  # int64: the row among the images of the shard
    row: np.ndarray  # int64: that of the holdout image
    cosine: np.ndarray  # float32
    similarity: np.ndarray  # float32
    differs_locally: np.ndarray  # bool


@dataclass(frozen=True)
class HoldoutSearch:
    """Which pairs with the holdout are searched, and how they are scored."""

    search: SearchConfig
    k: int  # maximum neighbours of an image in the self-join, and in the first round here
    floor: float  # minimum cosine
    num_buckets: int  # of the smaller id, see `image_ids.bucket_of`
    make_loader: Callable[[], Loader] | None  # picklable; None when the cosine is the similarity


def holdout_ids(images: str) -> np.ndarray:
    """The ids (H,) of the holdout images of a finished ingest, as bytes, ascending."""
    ids = [np.empty(0, "S1")]
    for file in require_manifest(images).paths(images, "images"):
        table = parquet.read_table(file, schemas.IMAGES, ["image_id", "role"])
        ids.append(id_bytes(table.column("image_id").filter(pc.equal(table.column("role"), "holdout"))))
    return np.unique(np.concatenate(ids))


def run(
    holdout: HoldoutSearch,
    config: Settings,
    ids: np.ndarray,
    files: Sequence[str],
    joined: str,
    output: str,
    runner: Runner,
    *,
    images_per_shard: int,
    inputs: Mapping[str, str],
    log: Log = None,
) -> Manifest:
    """Search the images in `files` (Parquet) for the holdout images, whose `ids` (H,) are ascending; H is at least 1.

    `joined` is the folder of the finished self-join of the same files. `inputs` are hashes that stand for the content
    of the files, and for the ids.
    """
    rows = [vectors.num_rows(file) for file in files]
    parts = self_join.parts_of(files, rows)
    edges_of_part = self_join.exact_edges(parts, rows) if holdout.search.backend == "exact" else {}
    shards = [
        Shard(block.name, (block.work, sorted({edges_of_part[part] for part in block.work} if edges_of_part else ())))
        for block in self_join.blocks(parts, rows, min(images_per_shard, self_join.ROWS_PER_BLOCK))
    ]
    num_files = -(-len(ids) // ROWS_PER_FILE)
    holdout_files = [paths.join(output, f"holdout-{number:05d}.parquet") for number in range(num_files)]
    stage = Stage(
        name="holdout",
        config=config,
        inputs=inputs,
        output=output,
        shards=shards,
        make_worker=functools.partial(make_worker, holdout, holdout_files, joined, output),
        unit="pairs",
        prepare=functools.partial(_write_holdout, parts, ids, holdout_files),
    )
    return run_stage(stage, runner, log=log)


def read_bucket(folder: str, bucket: int) -> pa.Table:
    """The pairs (SCORED) of a finished step whose smaller id lies in a bucket, in any order."""
    names = require_manifest(folder).files("scored")
    tables = [parquet.read_row_groups(paths.join(folder, name), "bucket", bucket, SCORED) for name in names]
    return pa.concat_tables([SCORED.empty_table(), *tables])


def _write_holdout(parts: Sequence[tuple[str, int]], ids: np.ndarray, targets: Sequence[str]) -> ShardRecord:
    """Write the holdout's vectors by id, so that ties go by id. The driver holds all of them."""
    pieces: list[Images] = []
    for file, first in parts:
        column = parquet.read_table_columns(file, ["image_id"]).column(0)
        if pc.any(pc.is_in(column, id_column(ids))).as_py():
            images = self_join.read_distinct([(file, first)])
            pieces.append(images.take(np.flatnonzero(np.isin(images.ids, ids))))
    described = np.unique(np.concatenate([ids[:0], *(piece.ids for piece in pieces)]))
    if len(missing := np.setdiff1d(ids, described)):
        raise InputError(
            f"The holdout image {missing[0].decode()} has no descriptor. Run describe again with --replace."
        )
    held = Images(
        *(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("ids", "places", "vectors"))
    )
    by_id = np.unique(held.ids, return_index=True)[1]  # the first place of each id
    records = []
    for number, path in enumerate(targets):
        block = held.take(by_id[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE])
        table = vectors.make_table(id_column(block.ids).to_pylist(), block.vectors)
        records.append(parquet.write_table(path, table.append_column("place", pa.array(block.places))))
    return ShardRecord(name=PREPARED, files=tuple(records))


def make_worker(
    holdout: HoldoutSearch, holdout_files: Sequence[str], joined: str, output: str
) -> Callable[[Shard], ShardRecord]:
    """A worker that compares the images of one run of files after another with the holdout."""
    require_device(holdout.search.device)
    load = holdout.make_loader() if holdout.make_loader else None
    tables = [parquet.read_table_columns(file, ["image_id", "place"]) for file in holdout_files]
    holdout_of = Images(
        np.concatenate([id_bytes(table.column("image_id")) for table in tables]),
        np.concatenate([table.column("place").to_numpy() for table in tables]),
        np.empty((0, 1), np.float16),
    )

    def nearest(images: Images, k: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = (matrix for _, matrix in prefetch(vectors.read_file, holdout_files))
        return exact.search(images.vectors, blocks, k, floor=holdout.floor, device=holdout.search.device)

    def images_to_search(parts: Sequence[tuple[str, int]], edge_files: Sequence[str]) -> Images:
        places = None
        if holdout.search.backend == "exact":
            wanted = holdout_of.places if load is None else None
            places = self_join.places_to_search(joined, edge_files, holdout.k, wanted)
            if not len(places):
                return Images(holdout_of.ids[:0], places, holdout_of.vectors)
        images = self_join.read_distinct(parts)
        is_searched = ~np.isin(images.ids, holdout_of.ids)
        if places is not None:
            is_searched &= np.isin(images.places, places)
        return images.take(np.flatnonzero(is_searched))

    def process(shard: Shard) -> ShardRecord:
        images = images_to_search(*shard.work)
        if load is None:
            pairs = _nearest_pairs(images, nearest)
        else:
            pairs = _compare_in_order(images, holdout_of, nearest, load, holdout.k)
        table = _scored(images, holdout_of, pairs)
        file = self_join.write_by_bucket(paths.join(output, f"scored-{shard.name}.parquet"), table, holdout.num_buckets)
        return ShardRecord(name=shard.name, files=(file,), totals={"images": len(images.ids), "pairs": file.rows})

    return process


def _nearest_pairs(images: Images, nearest: Nearest) -> ScoredPairs:
    """The pair of each image with its nearest holdout image; its cosine is the similarity."""
    if not len(images.ids):
        return _pairs_of([])
    cosine, row = nearest(images, 1)
    image = np.flatnonzero(row[:, 0] >= 0)
    return ScoredPairs(image, row[image, 0], cosine[image, 0], cosine[image, 0], np.zeros(len(image), bool))


def _pairs_of(rows: Sequence[tuple[int, int, float, float, bool]]) -> ScoredPairs:
    columns = zip(*rows, strict=True) if rows else [()] * 5
    types = (np.int64, np.int64, np.float32, np.float32, bool)
    return ScoredPairs(*(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)))


def _compare_in_order(images: Images, holdout: Images, nearest: Nearest, load: Loader, k: int) -> ScoredPairs:
    """The compared pairs of each image: with its holdout images by falling cosine, until one is a sure match."""
    pairs: list[tuple[int, int, float, float, bool]] = []
    unmatched, num_compared = np.arange(len(images.ids)), 0
    while len(unmatched) and num_compared < len(holdout.ids):
        remaining = [np.empty(0, np.int64)]
        step = max(1, NEIGHBORS_HELD // k)
        for start in range(0, len(unmatched), step):
            part = unmatched[start : start + step]
            cosine, row = nearest(images.take(part), k)
            image, rank = np.nonzero(row >= 0)
            image, rank = image[rank >= num_compared], rank[rank >= num_compared]
            is_matched = np.zeros(len(part), bool)
            for first in range(0, len(image), PAIRS_PER_BATCH):
                batch = np.arange(first, min(first + PAIRS_PER_BATCH, len(image)))
                batch = batch[~is_matched[image[batch]]]
                rows = row[image[batch], rank[batch]]
                places = np.stack([images.places[part[image[batch]]], holdout.places[rows]])
                compare = load(places)
                for number, (at, neighbor) in enumerate(zip(image[batch].tolist(), rows.tolist(), strict=True)):
                    if not is_matched[at]:
                        similarity, differs_locally = compare(places[:, number : number + 1])
                        is_matched[at] = similarity[0] >= SURE_MATCH
                        scores = cosine[at, rank[batch[number]]], similarity[0], bool(differs_locally[0])
                        pairs.append((int(part[at]), neighbor, *scores))
            remaining.append(part[(row[:, -1] >= 0) & ~is_matched])
        unmatched, num_compared = np.concatenate(remaining), k
        k = min(4 * k, len(holdout.ids))
    return _pairs_of(pairs)


def _scored(images: Images, holdout: Images, pairs: ScoredPairs) -> pa.Table:
    """SCORED of some pairs, in their order. They are not mutual: the self-join knows the mutual ones."""
    ids, other_ids = images.ids[pairs.image], holdout.ids[pairs.row]
    places, other_places = images.places[pairs.image], holdout.places[pairs.row]
    swapped = ids > other_ids
    columns = [
        id_column(np.where(swapped, other_ids, ids)),
        id_column(np.where(swapped, ids, other_ids)),
        np.where(swapped, other_places, places),
        np.where(swapped, places, other_places),
        pairs.cosine,
        np.zeros(len(swapped), bool),
        pairs.similarity,
        pairs.differs_locally,
    ]
    return pa.table(columns, schema=SCORED)
