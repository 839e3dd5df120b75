"""The pairs of near vectors of a collection that need not fit in memory: the join of the collection with itself.

    <output>/
      edges-00000.parquet  ...         EDGES, one row group for each bucket of ids
      manifest.json                    its facts hold the measured recall, its totals count the edges and the full lists
      .progress/exchange/              with `ivf`, until the join is done
        cells.npy  groups.npy          (cells, D) float32, sorted by group; where each group begins
        sample.parquet                 the vectors that recall is measured on
        spread-00000.parquet  ...      the vectors of a file, one row group for each group of cells that they visit

An edge leads from an image to one of its `k` nearest images with a similarity of at least `floor`; no other pair is
written. The list of an image with `k` edges is full: more images may be as near. Images are told apart by id. Images
with equal bytes have equal vectors and count once, or they would fill one another's lists; an image is not its own
neighbour.

`exact` compares every block of images with all images, streamed from disk.

`ivf` assigns each vector to a cell, that of the nearest centroid. An image visits the `num_probes` cells nearest to it,
and is compared with all images that visit its own cell. So a pair is found when one of the two visits the other's cell.
With cells of a fixed size the work grows with the number of images, not with its square. Neighbouring cells form a
group; a worker handles one group and holds all vectors that visit it. Every run measures the recall against the exact
search on a sample of images.

Legend: N vectors, D dimensions, P probes, Q queries, K neighbours.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.device import require_device
from curation.engine.manifest import Manifest, ShardRecord, require_manifest, step_folder
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import InputError
from curation.files import npy, parquet, paths, vectors
from curation.files.image_ids import bucket_of, id_bytes, id_column, pack_ids
from curation.files.paths import FileRecord
from curation.files.prefetch import prefetch
from curation.search import exact, ivf
from curation.search.config import RECALL_QUERIES, SearchConfig
from curation.search.ivf import CellLists
from curation.search.top_k import sort_into_groups, starts_group, top_k_of_groups

# `other_image_id` is among the nearest of `image_id`. A place is a row number counted through all files; for an image
# with several rows, that of the first.
EDGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("other_image_id", pa.string()),
        ("place", pa.int64()),
        ("other_place", pa.int64()),
        ("cosine", pa.float32()),
    ]
)
# Each pair once, with `image_id` the smaller id; `mutual` says whether each image is among the other's nearest.
PAIRED = EDGES.append(pa.field("mutual", pa.bool_()))
# Images compared with all others at a time, held as float32: 134 MB at D 512. Assumed: fewer images would mean reading
# the others more often.
ROWS_PER_BLOCK = 65_536
# Images that the recall's sample is compared with at a time. Assumed.
ROWS_PER_RECALL_BLOCK = 16_384
# Rows read for a sample, in multiples of its size. Assumed enough to see every kind of image.
FILES_READ = 16


@dataclass(frozen=True)
class Neighborhood:
    """Which neighbours of an image become edges, and into how many buckets edges are sorted."""

    search: SearchConfig
    k: int  # maximum neighbours of an image
    floor: float  # minimum similarity of a neighbour
    num_buckets: int  # of the edge's smaller id, see `image_ids.bucket_of`


@dataclass(frozen=True)
class Images:
    """Some distinct images."""

    ids: np.ndarray  # (N,) bytes
    places: np.ndarray  # (N,) int64
    vectors: np.ndarray  # (N, D) float16

    def take(self, rows: np.ndarray) -> "Images":
        """The images at the given rows."""
        return Images(self.ids[rows], self.places[rows], self.vectors[rows])


def run(
    neighborhood: Neighborhood, files: Sequence[str], output: str, runner: Runner, *, content_hash: str, log: Log = None
) -> Manifest:
    """Find the pairs of near vectors in `files` (Parquet) and return the manifest of `output`.

    `content_hash` stands for the files' content. Raises ConfigError when the measured recall is below
    `search.min_recall`.
    """
    search = neighborhood.search
    exchange_folder = step_folder(output, "exchange")
    rows = [vectors.num_rows(file) for file in files]
    num_rows = sum(rows)
    parts = parts_of(files, rows)

    def exchange() -> ShardRecord:
        stage = Stage(
            name="exchange",
            config=search,
            inputs={"vectors": content_hash},
            output=exchange_folder,
            shards=[
                Shard(f"{number:05d}", part, count)
                for number, (part, count) in enumerate(zip(parts, rows, strict=True))
            ],
            make_worker=functools.partial(_make_exchange_worker, search, exchange_folder),
            prepare=functools.partial(_train_cells, search, files, rows, exchange_folder),
            unit="vectors",
        )
        run_stage(stage, runner, log=log)
        return ShardRecord(name=PREPARED)

    def recall(done: Sequence[ShardRecord]) -> tuple[dict[str, Any], None]:
        edges = [paths.join(output, file.name) for record in done for file in record.files]
        shards = blocks(parts, rows, ROWS_PER_RECALL_BLOCK)
        return _measure_recall(neighborhood, shards, content_hash, exchange_folder, output, runner, edges, log), None

    make_worker: Callable[[], Callable[[Shard], ShardRecord]]
    if search.backend == "exact" or num_rows == 0:
        shards = blocks(parts, rows, ROWS_PER_BLOCK)
        make_worker = functools.partial(_make_exact_worker, neighborhood, shards, output)
        prepare, finish = None, None
    else:
        num_groups = _num_groups(search, num_rows)
        shards = [Shard(f"{group:05d}", group, num_rows // num_groups) for group in range(num_groups)]
        make_worker = functools.partial(_make_cells_worker, neighborhood, exchange_folder, output)
        prepare, finish = exchange, recall
    stage = Stage(
        name="join",
        config=search,
        inputs={
            "vectors": content_hash,
            "k": str(neighborhood.k),
            "floor": str(neighborhood.floor),
            "files": str(len(files)),
        },
        output=output,
        shards=shards,
        make_worker=make_worker,
        prepare=prepare,
        finish=finish,
        unit="vectors",
    )
    manifest = run_stage(stage, runner, log=log)
    search.require_recall(manifest.facts)  # min_recall may have been raised since
    return manifest


def read_bucket(folder: str, bucket: int) -> pa.Table:
    """The pairs (PAIRED) of a finished join whose smaller id lies in a bucket, sorted by their ids."""
    names = require_manifest(folder).files("edges")
    tables = [parquet.read_row_groups(paths.join(folder, name), "bucket", bucket, EDGES) for name in names]
    edges = pa.concat_tables([EDGES.empty_table(), *tables])
    one, other = (id_bytes(edges.column(name)) for name in EDGES.names[:2])
    place, other_place = (edges.column(name).to_numpy() for name in EDGES.names[2:4])
    swapped = one > other
    low, high = np.where(swapped, other, one), np.where(swapped, one, other)
    order = np.lexsort((high, low))
    low, high, swapped = low[order], high[order], swapped[order]
    starts = np.flatnonzero(starts_group(low, high))
    columns = [
        id_column(low[starts]),
        id_column(high[starts]),
        np.where(swapped, other_place[order], place[order])[starts],
        np.where(swapped, place[order], other_place[order])[starts],
        edges.column("cosine").to_numpy()[order[starts]],
        np.diff(starts, append=len(order)) == 2,
    ]
    return pa.table(columns, schema=PAIRED)


def places_to_search(folder: str, names: Sequence[str], k: int, wanted: np.ndarray | None) -> np.ndarray:
    """The places (N,), ascending, of the images in edges files of a finished exact join whose list is full.

    `wanted` (W,) are places of images. Where it is given, images are left out whose nearest image of `wanted`
    certainly is in their list: it is more similar than the last image there.
    """
    columns = ["place", "other_place", "cosine"]
    tables = [parquet.read_table(paths.join(folder, name), EDGES, columns) for name in names]
    edges = pa.concat_tables([pa.schema([EDGES.field(name) for name in columns]).empty_table(), *tables])
    if not edges.num_rows:
        return np.empty(0, np.int64)
    place, other, cosine = (edges.column(name).to_numpy() for name in columns)
    first = place.min()
    image = place - first  # a block holds consecutive places
    is_left = np.bincount(image) == k
    if wanted is not None:
        last, best = np.full(len(is_left), np.inf, np.float32), np.full(len(is_left), -np.inf, np.float32)
        np.minimum.at(last, image, cosine)
        is_wanted = np.isin(other, wanted)
        np.maximum.at(best, image[is_wanted], cosine[is_wanted])
        is_left &= best <= last
    result: np.ndarray = first + np.flatnonzero(is_left)
    return result


# Exact


def parts_of(files: Sequence[str], rows: Sequence[int]) -> list[tuple[str, int]]:
    """The files, each with the place of its first row, given the number of rows of each."""
    return list(zip(files, (int(first) for first in np.cumsum([0, *rows])), strict=False))


def blocks(parts: Sequence[tuple[str, int]], rows: Sequence[int], rows_per_block: int) -> list[Shard]:
    """The files, each with the place of its first row, in runs of about `rows_per_block` of their `rows`."""
    shards: list[Shard] = []
    held: list[tuple[str, int]] = []
    num_rows = 0
    for number, (part, count) in enumerate(zip(parts, rows, strict=True)):
        held.append(part)
        num_rows += count
        if num_rows >= rows_per_block or number == len(parts) - 1:
            shards.append(Shard(f"{len(shards):05d}", tuple(held), num_rows))
            held, num_rows = [], 0
    return shards


def exact_edges(parts: Sequence[tuple[str, int]], rows: Sequence[int]) -> dict[tuple[str, int], str]:
    """The edges file of an exact join that holds the lists of the images of each part."""
    return {part: f"edges-{block.name}.parquet" for block in blocks(parts, rows, ROWS_PER_BLOCK) for part in block.work}


def _make_exact_worker(
    neighborhood: Neighborhood, shards: Sequence[Shard], output: str
) -> Callable[[Shard], ShardRecord]:
    """A worker that compares one block of images after another with all images."""
    require_device(neighborhood.search.device)
    parts = [part for shard in shards for part in shard.work]
    places = _first_places(parts)

    def process(shard: Shard) -> ShardRecord:
        images = read_distinct(shard.work, places)
        others: list[Images] = []

        def stream() -> Iterator[np.ndarray]:
            for part, block in zip(parts, prefetch(lambda part: read_distinct([part], places), parts), strict=True):
                _check_width(images.vectors, block.vectors, part[0])
                others.append(Images(block.ids, block.places, block.vectors[:0]))
                yield block.vectors
                report(1, total=len(parts))

        nearest = _search_exactly(neighborhood, images, stream())
        ids, all_places = (np.concatenate([getattr(other, name) for other in others]) for name in ("ids", "places"))
        table = _edges(neighborhood.k, images, Images(ids, all_places, images.vectors[:0]), *nearest)
        return _write_edges(neighborhood, output, shard.name, table)

    return process


def _search_exactly(
    neighborhood: Neighborhood, images: Images, blocks: Iterator[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of `images` among the vectors of all blocks, one more than `k`: an image may find itself."""
    device = neighborhood.search.device
    return exact.search(images.vectors, blocks, neighborhood.k + 1, floor=neighborhood.floor, device=device)


def _first_places(parts: Sequence[tuple[str, int]]) -> np.ndarray:
    """The places (N,) int64, ascending, of the first row of each id. Holds all ids, about 100 bytes each."""
    ids = np.concatenate([id_bytes(parquet.read_table_columns(file, ["image_id"]).column(0)) for file, _ in parts])
    places: np.ndarray = np.sort(np.unique(ids, return_index=True)[1])
    return places


def read_distinct(parts: Sequence[tuple[str, int]], places: np.ndarray | None = None) -> Images:
    """The distinct images of consecutive files, each given with the place of its first row.

    With `places` (N,), ascending, only the rows at these places; without, the first row of each id, sorted by id.
    """
    files: list[tuple[list[str], np.ndarray, int]] = []
    for file, first in parts:
        image_ids, matrix = vectors.read_file(file)
        if image_ids:
            _check_width(files[0][1] if files else matrix, matrix, file)
            files.append((image_ids, matrix, first))
    if not files:
        return Images(np.empty(0, "S1"), np.empty(0, np.int64), np.empty((0, 1), np.float16))
    ids = np.concatenate([id_bytes(image_ids) for image_ids, _, _ in files])
    row_places = np.concatenate([first + np.arange(len(image_ids)) for image_ids, _, first in files])
    matrix = files[0][1] if len(files) == 1 else np.concatenate([matrix for _, matrix, _ in files])
    images = Images(ids, row_places, matrix)
    del files
    if places is None:
        return images.take(np.unique(ids, return_index=True)[1])  # by id, so that ties go by id
    begin, end = np.searchsorted(places, (row_places[0], row_places[-1] + 1))
    return images.take(places[begin:end] - row_places[0])


def _edges(k: int, images: Images, others: Images, similarity: np.ndarray, row: np.ndarray) -> pa.Table:
    """EDGES from each of `images` (Q) to its `k` best, given similarities (Q, K) and rows (Q, K) of `others`."""
    query, rank = np.nonzero(row >= 0)
    target = row[query, rank]
    ids, places = (images.ids[query], others.ids[target]), (images.places[query], others.places[target])
    return _best_edges(k, *ids, *places, similarity[query, rank])


def _best_edges(
    k: int, one: np.ndarray, other: np.ndarray, place: np.ndarray, other_place: np.ndarray, similarity: np.ndarray
) -> pa.Table:
    """EDGES from each image to the `k` most similar other images, ties by id."""
    pairs = np.flatnonzero(one != other)
    order = pairs[top_k_of_groups(one[pairs], k, -similarity[pairs], other[pairs])]
    columns = [id_column(one[order]), id_column(other[order]), place[order], other_place[order], similarity[order]]
    return pa.table(columns, schema=EDGES)


# Cells


def _train_cells(search: SearchConfig, files: Sequence[str], rows: Sequence[int], folder: str) -> ShardRecord:
    """Write the cells' centroids sorted into groups, where each group begins, and the sample of the recall."""
    num_rows = sum(rows)
    num_cells = search.num_cells(num_rows)
    ids, matrix = _sample(files, rows, max(ivf.TRAINING_ROWS_PER_CELL * num_cells, RECALL_QUERIES))
    cells = ivf.train_cells(matrix, num_cells)
    num_groups = min(_num_groups(search, num_rows), len(cells))
    group = exact.assign(cells, ivf.train_cells(cells, num_groups))[0]
    order, bounds = sort_into_groups(group, num_groups)
    saved = [
        npy.write_arrays(paths.join(folder, "cells.npy"), cells[order]),
        npy.write_arrays(paths.join(folder, "groups.npy"), bounds),
    ]
    chosen = slice(None, None, max(1, len(ids) // RECALL_QUERIES))
    table = vectors.make_table(id_column(ids[chosen]).to_pylist(), matrix[chosen])
    saved.append(parquet.write_table(paths.join(folder, "sample.parquet"), table))
    return ShardRecord(name=PREPARED, files=tuple(saved))


def _num_groups(search: SearchConfig, num_rows: int) -> int:
    return max(1, -(-num_rows // search.rows_per_part))


def _sample(files: Sequence[str], rows: Sequence[int], sample_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and vectors of about `sample_size` evenly spaced rows. Of very many rows, only every n-th file is read."""
    step = max(1, sum(rows) // (FILES_READ * sample_size))
    step = step if step * FILES_READ <= len(files) else 1
    every = max(1, sum(rows[::step]) // sample_size)
    ids: list[np.ndarray] = []
    blocks: list[np.ndarray] = []
    first = 0
    for file in files[::step]:
        image_ids, matrix = vectors.read_file(file)
        taken = np.arange(-first % every, len(image_ids), every)
        first += len(image_ids)
        if len(taken):
            if blocks:
                _check_width(blocks[0], matrix, file)
            ids.append(id_bytes(image_ids)[taken])
            blocks.append(matrix[taken])
    return np.concatenate(ids), np.concatenate(blocks)


def _read_cells(folder: str) -> tuple[np.ndarray, np.ndarray]:
    return npy.read_array(paths.join(folder, "cells.npy")), npy.read_array(paths.join(folder, "groups.npy"))


def _make_exchange_worker(search: SearchConfig, folder: str) -> Callable[[Shard], ShardRecord]:
    """A worker that sorts the vectors of one file after another by the groups of cells that they visit."""
    require_device(search.device)
    cells, groups = _read_cells(folder)
    group_of = np.repeat(np.arange(len(groups) - 1), np.diff(groups))
    num_probes = min(search.num_probes, len(cells))
    empty = _spread_schema(cells.shape[1], num_probes).empty_table()

    def process(shard: Shard) -> ShardRecord:
        images = read_distinct([shard.work])
        _check_width(cells, images.vectors, shard.work[0])
        visits = ivf.cells_of(images.vectors, cells, num_probes, device=search.device).astype(np.int32)

        def tables() -> Iterator[tuple[int, pa.Table]]:
            for group in range(len(groups) - 1):
                rows = np.flatnonzero((group_of[visits] == group).any(axis=1))
                visitors = images.take(rows)
                columns = [id_column(visitors.ids), visitors.places, *map(_as_bytes, (visitors.vectors, visits[rows]))]
                yield group, pa.table(columns, schema=empty.schema)

        path = paths.join(folder, f"spread-{shard.name}.parquet")
        file = parquet.write_row_groups(path, "part", tables() if len(images.ids) else (), empty)
        return ShardRecord(name=shard.name, files=(file,), totals={"vectors": len(images.ids), "copies": file.rows})

    return process


def _spread_schema(width: int, num_probes: int) -> pa.Schema:
    """Vectors (float16) and the cells that they visit (int32, the nearest first) as bytes, read without decoding."""
    return pa.schema(
        [
            ("image_id", pa.string()),
            ("place", pa.int64()),
            ("vector", pa.binary(2 * width)),
            ("visits", pa.binary(4 * num_probes)),
        ]
    )


def _as_bytes(matrix: np.ndarray) -> pa.Array:
    """A column with the bytes of each row of a matrix."""
    rows, width = matrix.shape
    kind = pa.binary(width * matrix.itemsize)
    return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(np.ascontiguousarray(matrix))])


def _of_bytes(column: pa.ChunkedArray, dtype: type) -> np.ndarray:
    """The matrix whose rows a column holds as bytes; a view."""
    array = column.combine_chunks()
    width = array.type.byte_width
    values = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width :][: len(array) * width]
    matrix: np.ndarray = values.view(dtype).reshape(len(array), width // np.dtype(dtype).itemsize)
    return matrix


def _make_cells_worker(neighborhood: Neighborhood, folder: str, output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that compares the images of one group of cells after another with the visitors of these cells."""
    search = neighborhood.search
    require_device(search.device)
    cells, groups = _read_cells(folder)
    schema = _spread_schema(cells.shape[1], min(search.num_probes, len(cells)))
    without_vectors, only_vectors = schema.remove(schema.get_field_index("vector")), pa.schema([schema.field("vector")])
    names = require_manifest(folder).files("spread")

    def read_vectors(files: Sequence[str], group: int, num_rows: int, chosen: np.ndarray) -> np.ndarray:
        """The vectors at the `chosen` rows of a group's `num_rows`. Those of one file at a time are held twice."""
        result = np.empty((len(chosen), cells.shape[1]), np.float16)
        target = np.full(num_rows, -1)
        target[chosen] = np.arange(len(chosen))
        first = 0
        for table in prefetch(lambda path: parquet.read_row_groups(path, "part", group, only_vectors), files):
            rows = np.flatnonzero(target[first : first + len(table)] >= 0)
            result[target[first + rows]] = _of_bytes(table.column("vector"), np.float16)[rows]
            first += len(table)
        return result

    def process(shard: Shard) -> ShardRecord:
        begin, end = groups[shard.work : shard.work + 2] if shard.work + 1 < len(groups) else (0, 0)
        files = [paths.join(folder, name) for name in names]
        keys = pa.concat_tables(parquet.read_row_groups(path, "part", shard.work, without_vectors) for path in files)
        # All rows of an image visit the same cells, so its first row in this group stands for all.
        ids, rows = np.unique(id_bytes(keys.column("image_id")), return_index=True)
        visits = _of_bytes(keys.column("visits"), np.int32)[rows]
        matrix = read_vectors(files, shard.work, len(keys), rows)
        images = Images(ids, keys.column("place").to_numpy()[rows], matrix)
        del keys
        inside = (visits >= begin) & (visits < end)
        home = np.flatnonzero(inside[:, 0])
        visitor, column = np.nonzero(inside)
        at_home = CellLists.of(home, visits[home, 0] - begin, end - begin)
        visiting = CellLists.of(visitor, visits[visitor, column] - begin, end - begin)
        k, floor = neighborhood.k + 1, neighborhood.floor  # one more, as an image finds itself
        nearest = ivf.search_cells(matrix, [at_home], matrix, visiting, k, floor=floor, device=search.device)
        return _write_edges(neighborhood, output, shard.name, _edges(neighborhood.k, images, images, *nearest))

    return process


def _measure_recall(
    neighborhood: Neighborhood,
    shards: Sequence[Shard],
    content_hash: str,
    exchange_folder: str,
    output: str,
    runner: Runner,
    edges: Sequence[str],
    log: Log,
) -> dict[str, Any]:
    """The share of the exact neighbours of a sample of images that are pairs in the `edges` files."""
    folder = step_folder(output, "recall")
    stage = Stage(
        name="recall",
        config=neighborhood.search,
        inputs={"vectors": content_hash},
        output=folder,
        shards=shards,
        make_worker=functools.partial(_make_recall_worker, neighborhood, exchange_folder, folder),
        unit="vectors",
    )
    manifest = run_stage(stage, runner, log=log)
    tables = [parquet.read_table(paths.join(folder, name), EDGES) for name in manifest.files("exact")]
    merged = pa.concat_tables(tables).group_by(["image_id", "other_image_id"], use_threads=False)
    merged = merged.aggregate([("place", "min"), ("other_place", "min"), ("cosine", "max")])
    one, other = (id_bytes(merged.column(name)) for name in EDGES.names[:2])
    place, other_place = (merged.column(name).to_numpy() for name in ("place_min", "other_place_min"))
    true = _best_edges(neighborhood.k, one, other, place, other_place, merged.column("cosine_max").to_numpy())
    sampled = pc.unique(true.column("image_id"))
    reported: set[tuple[str, str]] = set()
    for path in edges:
        table = parquet.read_table(path, EDGES)
        for near, far in (("image_id", "other_image_id"), ("other_image_id", "image_id")):
            hits = table.filter(pc.is_in(table.column(near), sampled))
            reported.update(zip(hits.column(near).to_pylist(), hits.column(far).to_pylist(), strict=True))
    true_pairs = list(zip(*(true.column(name).to_pylist() for name in EDGES.names[:2]), strict=True))
    recall = sum(pair in reported for pair in true_pairs) / len(true_pairs) if true_pairs else None
    facts = {"backend": "ivf", "recall": recall, "recall_neighbors": len(true_pairs)}
    neighborhood.search.require_recall(facts)
    return facts


def _make_recall_worker(
    neighborhood: Neighborhood, exchange_folder: str, folder: str
) -> Callable[[Shard], ShardRecord]:
    """A worker that compares the sampled images with one block of images after another."""
    require_device(neighborhood.search.device)
    sample = read_distinct([(paths.join(exchange_folder, "sample.parquet"), 0)])

    def process(shard: Shard) -> ShardRecord:
        images = read_distinct(shard.work)
        nearest = _search_exactly(neighborhood, sample, iter([images.vectors]))
        table = _edges(neighborhood.k, sample, images, *nearest)
        file = parquet.write_table(paths.join(folder, f"exact-{shard.name}.parquet"), table)
        return ShardRecord(name=shard.name, files=(file,))

    return process


# Tables


def _write_edges(neighborhood: Neighborhood, output: str, name: str, edges: pa.Table) -> ShardRecord:
    """Write the edges of one shard, which come image by image."""
    file = write_by_bucket(paths.join(output, f"edges-{name}.parquet"), edges, neighborhood.num_buckets)
    starts = np.flatnonzero(starts_group(edges.column("place").to_numpy()))
    num_full = int((np.diff(starts, append=edges.num_rows) == neighborhood.k).sum())
    return ShardRecord(name=name, files=(file,), totals={"edges": edges.num_rows, "full_lists": num_full})


def write_by_bucket(path: str, pairs: pa.Table, num_buckets: int) -> FileRecord:
    """Write pairs with the columns `image_id` and `other_image_id`, one row group for each bucket of the smaller id."""
    smaller = pc.min_element_wise(pairs.column("image_id"), pairs.column("other_image_id"))
    bucket = bucket_of(pack_ids(smaller), num_buckets)
    order, bounds = sort_into_groups(bucket, num_buckets)
    ordered = pairs.take(pa.array(order))
    spans = enumerate(pairwise(bounds.tolist()))
    groups = ((number, ordered.slice(start, stop - start)) for number, (start, stop) in spans)
    return parquet.write_row_groups(path, "bucket", groups, pairs.schema.empty_table())


def _check_width(expected: np.ndarray, matrix: np.ndarray, file: str) -> None:
    """Raise InputError when two matrices that have rows differ in width."""
    if len(expected) and len(matrix) and matrix.shape[1] != expected.shape[1]:
        raise InputError(f"{file}: vectors of width {matrix.shape[1]}; others of this run have {expected.shape[1]}.")
