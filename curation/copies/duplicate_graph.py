"""The duplicate graph on the driver's disk: the images of an ingest and the pairs among them, numbered.

An image is a node, numbered in the order of the image_ids; a pair is an edge. To number them, rows and ends of pairs
are set apart by the front of their image_id, so that a small part of all ids is in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import DTypeLike

from curation.copies.components import node_type
from curation.engine.manifest import require_manifest
from curation.errors import InputError
from curation.files import parquet, paths, schemas
from curation.files.disk_arrays import Buckets, blocks, on_disk
from curation.files.image_ids import bucket_of, pack_ids, unpack_ids
from curation.search.top_k import starts_group

# Rows, or ends of pairs, in a bucket: about 300 MB of memory while it is sorted. Ids are hashes, so buckets are alike.
ROWS_PER_BUCKET = 1 << 20
# Which of the rows with the same bytes stands for the image: a seed's before the holdout's before the pool's.
_ROLES = ("seed", "holdout", "pool")
_ROW = np.dtype([("image_id", "S16"), ("row", np.int64), ("role", np.int8), ("pixels", np.int64), ("length", np.int64)])
_END = np.dtype([("image_id", "S16"), ("place", np.int64)])


@dataclass(frozen=True)
class Nodes:
    """The unique images, sorted by image_id."""

    image_ids: np.ndarray  # (N,) S16, see pack_ids; as elements of it alone, they would lose zeros at their end
    is_seed: np.ndarray  # (N,) bool: a seed in at least one source
    is_holdout: np.ndarray
    pixels: np.ndarray  # (N,) int64
    length: np.ndarray  # (N,) int64, bytes


@dataclass(frozen=True)
class Edges:
    """The pairs, in the order of their files."""

    first: np.ndarray  # (E,) nodes
    second: np.ndarray
    similarity: np.ndarray  # (E,) float32
    differs_locally: np.ndarray  # (E,) bool
    cosine: np.ndarray  # (E,) float32
    mutual: np.ndarray  # (E,) bool


@dataclass(frozen=True)
class DuplicateGraph:
    """The images and pairs of one run, all of it on disk."""

    nodes: Nodes
    edges: Edges
    node_of_row: np.ndarray  # (R,): the node of each row of ingest, its shards one after another
    row_of_node: np.ndarray  # (N,) int64: the row that stands for the image


def read_graph(images: str, pairs: str) -> DuplicateGraph:
    """Number the images of a finished ingest and the pairs of a finished pairs.

    Raises InputError for a pair of images that the ingest does not hold.
    """
    num_rows, num_edges = _num_rows(images, "images"), _num_rows(pairs, "pairs")
    num_buckets = min(max(num_rows, 2 * num_edges) // ROWS_PER_BUCKET + 1, 1 << 16)
    rows, ends = Buckets(num_buckets, _ROW), Buckets(num_buckets, _END)
    for start, table in _tables(images, "images", schemas.IMAGES, ["image_id", "role", "width", "height", "length"]):
        found = np.empty(table.num_rows, _ROW)
        found["image_id"] = pack_ids(table["image_id"])
        found["row"] = np.arange(start, start + table.num_rows)
        found["role"] = pc.index_in(table["role"], pa.array(_ROLES)).to_numpy()
        found["pixels"] = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
        found["length"] = table["length"].to_numpy()
        rows.add(bucket_of(found["image_id"], num_buckets), found)

    kind = node_type(num_rows)
    places = on_disk(2 * num_edges, kind)  # the nodes at the first ends of all edges, then at the second ends
    edges = Edges(
        first=places[:num_edges],
        second=places[num_edges:],
        similarity=on_disk(num_edges, np.float32),
        differs_locally=on_disk(num_edges, bool),
        cosine=on_disk(num_edges, np.float32),
        mutual=on_disk(num_edges, bool),
    )
    for start, table in _tables(pairs, "pairs", schemas.PAIRS):
        for name in ("similarity", "differs_locally", "cosine", "mutual"):
            getattr(edges, name)[start : start + table.num_rows] = table[name].to_numpy()
        for name, offset in (("image_id", 0), ("other_image_id", num_edges)):
            end = np.empty(table.num_rows, _END)
            end["image_id"] = pack_ids(table[name])
            end["place"] = np.arange(start, start + table.num_rows) + offset
            ends.add(bucket_of(end["image_id"], num_buckets), end)

    columns: dict[str, DTypeLike] = {
        "image_ids": "S16",
        "is_seed": bool,
        "is_holdout": bool,
        "pixels": np.int64,
        "length": np.int64,
    }
    nodes = {name: on_disk(num_rows, dtype) for name, dtype in columns.items()}
    node_of_row, row_of_node = on_disk(num_rows, kind), on_disk(num_rows, np.int64)
    num_nodes = 0
    for bucket in range(num_buckets):
        known = rows.read(bucket)
        known = known[np.lexsort((known["row"], known["role"], known["image_id"]))]
        is_first = starts_group(known["image_id"])
        starts = np.flatnonzero(is_first)
        node_of_row[known["row"]] = num_nodes - 1 + np.cumsum(is_first)
        own = slice(num_nodes, num_nodes + len(starts))
        standing = known[starts]
        row_of_node[own] = standing["row"]
        nodes["image_ids"][own] = standing["image_id"]
        nodes["pixels"][own], nodes["length"][own] = standing["pixels"], standing["length"]
        for name, role in (("is_seed", 0), ("is_holdout", 1)):
            nodes[name][own] = np.logical_or.reduceat(known["role"] == role, starts) if len(starts) else False
        _find_ends(places, ends.read(bucket), standing["image_id"], num_nodes)
        num_nodes += len(starts)
    cut = {name: column[:num_nodes] for name, column in nodes.items()}
    return DuplicateGraph(Nodes(**cut), edges, node_of_row, row_of_node[:num_nodes])


def _find_ends(places: np.ndarray, ends: np.ndarray, image_ids: np.ndarray, first_node: int) -> None:
    """Write where the `ends` of one bucket are among its `image_ids`, the first of which is `first_node`."""
    for part in blocks(len(ends)):
        wanted = ends["image_id"][part]
        place = np.searchsorted(image_ids, wanted)
        known = place < len(image_ids)
        known[known] = image_ids[place[known]] == wanted[known]
        if not known.all():
            unknown = unpack_ids(wanted[~known][:1])[0]
            raise InputError(f"The pairs name image {unknown}, which the ingest does not hold: not of one run.")
        places[ends["place"][part]] = first_node + place


def _num_rows(folder: str, kind: str) -> int:
    shards = require_manifest(folder).shards
    return sum(file.rows for shard in shards for file in shard.files if file.name.startswith(kind + "-"))


def _tables(
    folder: str, kind: str, schema: pa.Schema, columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """The tables `<kind>-*` of a stage, each with the number of rows before it."""
    start = 0
    for record in require_manifest(folder).shards:
        for file in record.files:
            if file.name.startswith(kind + "-"):
                path = paths.join(folder, file.name)
                table = parquet.read_table(path, schema, columns)
                if table.num_rows != file.rows:
                    raise InputError(f"{path}: {table.num_rows} rows, but {file.rows} were written. Redo that stage.")
                yield start, table
                start += table.num_rows
