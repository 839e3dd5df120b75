"""Join: which vectors of a collection lie near which others, for collections that no memory holds.

    <output>/
      edges-00000.parquet  ...         EDGES, one row group for each bucket of ids
      manifest.json                    its facts hold the measured recall
      .progress/exchange/              with `ivf`, until it is done
        cells.npy  groups.npy          (cells, D) float32, sorted by group; where each group begins
        sample.parquet                 the vectors that recall is measured on
        spread-00000.parquet  ...      the vectors of a file, one row group for each group of cells that they visit

An edge leads from an image to one of its `k` nearest that are at least `floor` similar; only these are ever written.
Images with equal bytes have equal vectors; they count once, or they would fill each other's lists, and an image is no
neighbour of itself: both by id.

`exact` compares every block of images with all images, streamed from disk.

`ivf` sorts the vectors into cells, those nearest to a centroid. An image is compared with all that visit its cell, and
it visits the `num_probes` cells nearest to it; so a pair is found when one of the two visits the other's cell. With
cells of a fixed size the work grows with the number of images, not with its square. Cells near one another form a
group, the work of one worker, which holds all vectors that visit it. Recall is measured against the exact search on a
sample of images in every run.

Legend: N vectors, D dimensions, P probes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.manifest import Manifest, ShardRecord, require_manifest, step_folder
from curation.engine.runner import Runner, Shard
from curation.engine.stage import PREPARED, run_shards
from curation.errors import InputError
from curation.files import npy, parquet, paths, vectors
from curation.files.image_ids import bucket_of, id_bytes, id_column, pack_ids
from curation.files.prefetch import prefetch
from curation.models.device import require_device
from curation.search import exact, ivf
from curation.search.config import SearchConfig
from curation.search.ivf import CellLists
from curation.search.parts import train_cells
from curation.search.top_k import sort_into_groups, starts_group, top_k_of_groups

# `other_image_id` is among the nearest of `image_id`. A place is a row number counted through all files; of an image
# that occurs several times, the first.
EDGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("other_image_id", pa.string()),
        ("place", pa.int64()),
        ("other_place", pa.int64()),
        ("cosine", pa.float32()),
    ]
)
# Each pair once, `image_id` the smaller; `mutual` says whether each is among the other's nearest.
PAIRED = EDGES.append(pa.field("mutual", pa.bool_()))
# Images that are compared with all others at a time, held as float32: 134 MB at D 512. Assumed: fewer would read the
# others more often.
ROWS_PER_BLOCK = 65_536
# Images that the sample of the recall is compared with at a time. Assumed.
ROWS_PER_RECALL_BLOCK = 16_384
# What guards a search without shaping what it finds: a run that it stopped goes on once it is lowered.
NOT_IN_PLAN = frozenset({"min_recall"})
# How many times more rows than a sample needs are read for it. Assumed enough to see every kind of image.
FILES_READ = 16


@dataclass(frozen=True)
class Neighborhood:
    """What a join is asked for."""

    search: SearchConfig
    k: int  # the most neighbours of an image
    floor: float  # their least similarity
    num_buckets: int  # of ids, see `bucket_of`


@dataclass(frozen=True)
class Images:
    """Some distinct images."""

    ids: np.ndarray  # (N,) bytes
    places: np.ndarray  # (N,) int64
    vectors: np.ndarray  # (N, D) float16

    def take(self, rows: np.ndarray) -> "Images":
        return Images(self.ids[rows], self.places[rows], self.vectors[rows])


def run(
    asked: Neighborhood, files: Sequence[str], source_hash: str, output: str, runner: Runner, *, num_rows: int
) -> Manifest:
    """Join the vectors in `files` (Parquet) with themselves; returns the manifest.

    `source_hash` stands for the files' content, `num_rows` is the number of vectors in them. Raises ConfigError when
    the measured recall is below `search.min_recall`.
    """
    search = asked.search
    spread = step_folder(output, "exchange")
    rows = [vectors.num_rows(file) for file in files]
    parts = list(zip(files, (int(first) for first in np.cumsum([0, *rows])), strict=False))

    def exchange() -> ShardRecord:
        run_shards(
            "exchange",
            config=search,
            inputs={"vectors": source_hash},
            output=spread,
            runner=runner,
            shards=[
                Shard(f"{number:05d}", part, count)
                for number, (part, count) in enumerate(zip(parts, rows, strict=True))
            ],
            make_worker=functools.partial(_make_exchange_worker, search, spread),
            not_in_plan=NOT_IN_PLAN,
            prepare=functools.partial(_train_cells, search, files, rows, spread),
        )
        return ShardRecord(name=PREPARED)

    def recall(done: Sequence[ShardRecord]) -> tuple[dict[str, Any], None]:
        edges = [paths.join(output, file.name) for record in done for file in record.files]
        blocks = _blocks(parts, rows, ROWS_PER_RECALL_BLOCK)
        return _measure_recall(asked, blocks, source_hash, spread, output, runner, edges), None

    make_worker: Callable[[], Callable[[Shard], ShardRecord]]
    if search.backend == "exact" or num_rows == 0:
        shards = _blocks(parts, rows, ROWS_PER_BLOCK)
        make_worker = functools.partial(_make_exact_worker, asked, shards, output)
        prepare, finish = None, None
    else:
        num_groups = _num_groups(search, num_rows)
        shards = [Shard(f"{group:05d}", group, num_rows // num_groups) for group in range(num_groups)]
        make_worker = functools.partial(_make_cells_worker, asked, spread, output)
        prepare, finish = exchange, recall
    manifest = run_shards(
        "join",
        config=search,
        inputs={"vectors": source_hash, "k": str(asked.k), "floor": str(asked.floor), "files": str(len(files))},
        output=output,
        runner=runner,
        shards=shards,
        make_worker=make_worker,
        prepare=prepare,
        finish=finish,
        not_in_plan=NOT_IN_PLAN,
    )
    search.require_recall(manifest.facts)  # it may have been raised since
    return manifest


def read_bucket(folder: str, bucket: int) -> pa.Table:
    """PAIRED of the pairs whose smaller id lies in a bucket, of a finished join, sorted by their ids."""
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


# Exact


def _blocks(parts: Sequence[tuple[str, int]], rows: Sequence[int], rows_per_block: int) -> list[Shard]:
    """The files, each with the place of its first row, in runs of about `rows_per_block` of their `rows`."""
    blocks: list[Shard] = []
    held: list[tuple[str, int]] = []
    num_rows = 0
    for number, (part, count) in enumerate(zip(parts, rows, strict=True)):
        held.append(part)
        num_rows += count
        if num_rows >= rows_per_block or number == len(parts) - 1:
            blocks.append(Shard(f"{len(blocks):05d}", tuple(held), num_rows))
            held, num_rows = [], 0
    return blocks


def _make_exact_worker(asked: Neighborhood, blocks: Sequence[Shard], output: str) -> Callable[[Shard], ShardRecord]:
    require_device(asked.search.device)
    places = _first_places([part for block in blocks for part in block.work])

    def process(shard: Shard) -> ShardRecord:
        own = _read(shard.work, places)
        others: list[Images] = []

        def stream() -> Iterator[np.ndarray]:
            parts = [part for block in blocks for part in block.work]
            for part, images in zip(parts, prefetch(lambda part: _read([part], places), parts), strict=True):
                _same_width(own.vectors, images.vectors, part[0])
                others.append(Images(images.ids, images.places, images.vectors[:0]))
                yield images.vectors

        # One more, for the image itself.
        found = exact.search(own.vectors, stream(), asked.k + 1, floor=asked.floor, device=asked.search.device)
        ids, all_places = (np.concatenate([getattr(other, name) for other in others]) for name in ("ids", "places"))
        table = _edges(asked.k, own, Images(ids, all_places, own.vectors[:0]), *found)
        return _write_edges(asked, output, shard.name, table)

    return process


def _first_places(parts: Sequence[tuple[str, int]]) -> np.ndarray:
    """The places (N,) int64, ascending, of the first row of each id. Holds all ids, about 100 bytes each."""
    ids = np.concatenate([id_bytes(parquet.read_table_columns(file, ["image_id"]).column(0)) for file, _ in parts])
    places: np.ndarray = np.sort(np.unique(ids, return_index=True)[1])
    return places


def _read(parts: Sequence[tuple[str, int]], places: np.ndarray | None = None) -> Images:
    """The images of some files, each with the place of its first row: those at `places`, or each id's first."""
    read: list[tuple[list[str], np.ndarray, int]] = []
    for file, first in parts:
        image_ids, matrix = vectors.read_file(file)
        if image_ids:
            _same_width(read[0][1] if read else matrix, matrix, file)
            read.append((image_ids, matrix, first))
    if not read:
        return Images(np.empty(0, "S1"), np.empty(0, np.int64), np.empty((0, 1), np.float16))
    ids = np.concatenate([id_bytes(own) for own, _, _ in read])
    own_places = np.concatenate([first + np.arange(len(own)) for own, _, first in read])
    matrix = read[0][1] if len(read) == 1 else np.concatenate([matrix for _, matrix, _ in read])
    images = Images(ids, own_places, matrix)
    del read
    if places is None:
        return images.take(np.unique(ids, return_index=True)[1])  # by id, so that ties go by id
    begin, end = np.searchsorted(places, (own_places[0], own_places[-1] + 1))
    return images.take(places[begin:end] - own_places[0])  # the files of `parts` follow one another


def _edges(k: int, images: Images, others: Images, similarity: np.ndarray, row: np.ndarray) -> pa.Table:
    """EDGES from each of `images` (Q) to the `k` best that a search found among `others`: (Q, K), (Q, K)."""
    query, column = np.nonzero(row >= 0)
    target = row[query, column]
    ids, places = (images.ids[query], others.ids[target]), (images.places[query], others.places[target])
    return _best_edges(k, *ids, *places, similarity[query, column])


def _best_edges(
    k: int, one: np.ndarray, other: np.ndarray, place: np.ndarray, other_place: np.ndarray, similarity: np.ndarray
) -> pa.Table:
    """EDGES to the `k` most similar other ones of each, ties by id."""
    pairs = np.flatnonzero(one != other)
    order = pairs[top_k_of_groups(one[pairs], k, -similarity[pairs], other[pairs])]
    columns = [id_column(one[order]), id_column(other[order]), place[order], other_place[order], similarity[order]]
    return pa.table(columns, schema=EDGES)


# Cells


def _train_cells(search: SearchConfig, files: Sequence[str], rows: Sequence[int], folder: str) -> ShardRecord:
    """Centroids of the cells, sorted into groups; where each group begins; the sample that recall is measured on."""
    num_rows = sum(rows)
    num_cells = search.num_cells(num_rows)
    wanted = max(ivf.TRAINING_ROWS_PER_CELL * num_cells, search.recall_queries)
    ids, matrix = _sample(files, rows, wanted)
    cells = train_cells(matrix, num_cells, search.seed)
    num_groups = min(_num_groups(search, num_rows), len(cells))
    group = exact.assign(cells, train_cells(cells, num_groups, search.seed))[0]
    order, bounds = sort_into_groups(group, num_groups)
    arrays = {"cells.npy": cells[order], "groups.npy": bounds}
    saved = []
    for name, array in arrays.items():
        saved.append(npy.write_arrays(paths.join(folder, name), array))
    chosen = slice(None, None, max(1, len(ids) // search.recall_queries))
    table = vectors.make_table(ids[chosen].astype(str).tolist(), matrix[chosen])
    saved.append(parquet.write_table(paths.join(folder, "sample.parquet"), table))
    return ShardRecord(name=PREPARED, files=tuple(saved))


def _num_groups(search: SearchConfig, num_rows: int) -> int:
    return max(1, -(-num_rows // search.rows_per_part))


def _sample(files: Sequence[str], rows: Sequence[int], wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and vectors of about `wanted` rows, evenly spaced; of many more rows, only every so many files are read."""
    step = max(1, sum(rows) // (FILES_READ * wanted))
    step = step if step * FILES_READ <= len(files) else 1
    every = max(1, sum(rows[::step]) // wanted)
    ids: list[np.ndarray] = []
    blocks: list[np.ndarray] = []
    first = 0
    for file in files[::step]:
        own, matrix = vectors.read_file(file)
        taken = np.arange(-first % every, len(own), every)
        first += len(own)
        if len(taken):
            if blocks:
                _same_width(blocks[0], matrix, file)
            ids.append(id_bytes(own)[taken])
            blocks.append(matrix[taken])
    return np.concatenate(ids), np.concatenate(blocks)


def _read_cells(folder: str) -> tuple[np.ndarray, np.ndarray]:
    return npy.read_array(paths.join(folder, "cells.npy")), npy.read_array(paths.join(folder, "groups.npy"))


def _make_exchange_worker(search: SearchConfig, folder: str) -> Callable[[Shard], ShardRecord]:
    require_device(search.device)
    cells, groups = _read_cells(folder)
    group_of = np.repeat(np.arange(len(groups) - 1), np.diff(groups))
    num_probes = min(search.num_probes, len(cells))
    empty = _spread_schema(cells.shape[1], num_probes).empty_table()

    def process(shard: Shard) -> ShardRecord:
        own = _read([shard.work])
        _same_width(cells, own.vectors, shard.work[0])
        visits = ivf.cells_of(own.vectors, cells, num_probes, device=search.device).astype(np.int32)

        def tables() -> Iterator[tuple[int, pa.Table]]:
            for group in range(len(groups) - 1):
                rows = np.flatnonzero((group_of[visits] == group).any(axis=1))
                here = own.take(rows)
                columns = [id_column(here.ids), here.places, _as_bytes(here.vectors), _as_bytes(visits[rows])]
                yield group, pa.table(columns, schema=empty.schema)

        path = paths.join(folder, f"spread-{shard.name}.parquet")
        file = parquet.write_row_groups(path, "part", tables() if len(own.ids) else (), empty)
        return ShardRecord(name=shard.name, files=(file,), totals={"vectors": len(own.ids), "copies": file.rows})

    return process


def _spread_schema(width: int, num_probes: int) -> pa.Schema:
    """Vectors (float16) and the cells that they visit (int32), the nearest first, as bytes: read without decoding."""
    return pa.schema(
        [
            ("image_id", pa.string()),
            ("place", pa.int64()),
            ("vector", pa.binary(2 * width)),
            ("visits", pa.binary(4 * num_probes)),
        ]
    )


def _as_bytes(matrix: np.ndarray) -> pa.Array:
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


def _make_cells_worker(asked: Neighborhood, folder: str, output: str) -> Callable[[Shard], ShardRecord]:
    require_device(asked.search.device)
    cells, groups = _read_cells(folder)
    schema = _spread_schema(cells.shape[1], min(asked.search.num_probes, len(cells)))
    without_vectors, only_vectors = schema.remove(schema.get_field_index("vector")), pa.schema([schema.field("vector")])
    names = require_manifest(folder).files("spread")

    def read_vectors(files: Sequence[str], group: int, num_rows: int, chosen: np.ndarray) -> np.ndarray:
        """The chosen ones of the `num_rows` vectors of a group; those of one file at a time are held twice."""
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
        # All copies of an image visit the same cells, so it is enough to look among those that are here.
        ids, rows = np.unique(id_bytes(keys.column("image_id")), return_index=True)
        visits = _of_bytes(keys.column("visits"), np.int32)[rows]
        own = Images(ids, keys.column("place").to_numpy()[rows], read_vectors(files, shard.work, len(keys), rows))
        del keys
        inside = (visits >= begin) & (visits < end)
        home = np.flatnonzero(inside[:, 0])
        visitor, column = np.nonzero(inside)
        at_home = CellLists.of(home, visits[home, 0] - begin, end - begin)
        visiting = CellLists.of(visitor, visits[visitor, column] - begin, end - begin)
        # One more, for the image itself.
        found = ivf.search_cells(
            own.vectors, [at_home], own.vectors, visiting, asked.k + 1, floor=asked.floor, device=asked.search.device
        )
        return _write_edges(asked, output, shard.name, _edges(asked.k, own, own, *found))

    return process


def _measure_recall(
    asked: Neighborhood,
    blocks: Sequence[Shard],
    source_hash: str,
    spread: str,
    output: str,
    runner: Runner,
    edges: Sequence[str],
) -> dict[str, Any]:
    """The share of the neighbours of a sample of images, exactly searched, that are pairs in the `edges` files."""
    folder = step_folder(output, "recall")

    manifest = run_shards(
        "recall",
        config=asked.search,
        inputs={"vectors": source_hash},
        output=folder,
        runner=runner,
        shards=blocks,
        make_worker=functools.partial(_make_recall_worker, asked, spread, folder),
        not_in_plan=NOT_IN_PLAN,
    )
    tables = [parquet.read_table(paths.join(folder, name), EDGES) for name in manifest.files("exact")]
    exact = pa.concat_tables(tables).group_by(["image_id", "other_image_id"], use_threads=False)
    exact = exact.aggregate([("place", "min"), ("other_place", "min"), ("cosine", "max")])
    one, other = (id_bytes(exact.column(name)) for name in EDGES.names[:2])
    place, other_place = (exact.column(name).to_numpy() for name in ("place_min", "other_place_min"))
    exact = _best_edges(asked.k, one, other, place, other_place, exact.column("cosine_max").to_numpy())
    sampled = pc.unique(exact.column("image_id"))
    found: set[tuple[str, str]] = set()
    for path in edges:
        table = parquet.read_table(path, EDGES)
        for near, far in (("image_id", "other_image_id"), ("other_image_id", "image_id")):
            hits = table.filter(pc.is_in(table.column(near), sampled))
            found.update(zip(hits.column(near).to_pylist(), hits.column(far).to_pylist(), strict=True))
    wanted = list(zip(*(exact.column(name).to_pylist() for name in ("image_id", "other_image_id")), strict=True))
    recall = sum(pair in found for pair in wanted) / len(wanted) if wanted else None
    facts = {"backend": "ivf", "recall": recall, "recall_neighbors": len(wanted)}
    asked.search.require_recall(facts)
    return facts


def _make_recall_worker(asked: Neighborhood, spread: str, folder: str) -> Callable[[Shard], ShardRecord]:
    require_device(asked.search.device)
    sample = _read([(paths.join(spread, "sample.parquet"), 0)])

    def process(shard: Shard) -> ShardRecord:
        own = _read(shard.work)
        found = exact.search(sample.vectors, [own.vectors], asked.k + 1, floor=asked.floor, device=asked.search.device)
        table = _edges(asked.k, sample, own, *found)
        file = parquet.write_table(paths.join(folder, f"exact-{shard.name}.parquet"), table)
        return ShardRecord(name=shard.name, files=(file,))

    return process


# Tables


def _write_edges(asked: Neighborhood, output: str, name: str, edges: pa.Table) -> ShardRecord:
    smaller = pc.min_element_wise(edges.column("image_id"), edges.column("other_image_id"))
    bucket = bucket_of(pack_ids(smaller), asked.num_buckets)
    order, bounds = sort_into_groups(bucket, asked.num_buckets)
    ordered = edges.take(pa.array(order))
    spans = enumerate(pairwise(bounds.tolist()))
    groups = ((number, ordered.slice(start, stop - start)) for number, (start, stop) in spans)
    path = paths.join(output, f"edges-{name}.parquet")
    file = parquet.write_row_groups(path, "bucket", groups, EDGES.empty_table())
    return ShardRecord(name=name, files=(file,), totals={"edges": edges.num_rows})


def _same_width(expected: np.ndarray, found: np.ndarray, file: str) -> None:
    if len(expected) and len(found) and found.shape[1] != expected.shape[1]:
        raise InputError(f"{file}: vectors of width {found.shape[1]}; others of this run have {expected.shape[1]}.")
