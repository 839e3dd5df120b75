"""The duplicate graph on the driver's disk: the images of an ingest as numbered nodes, and their pairs as edges.

Nodes are numbered in the order of the image_ids. For this, the rows of ingest and the ends of pairs are sorted into
buckets by the first bits of their image_id. So only a small part of all ids is in memory at a time.

Legend: N nodes, E edges, R rows of ingest.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import DTypeLike

from curation.copies.components import node_type
from curation.engine.manifest import require_manifest
from curation.errors import InputError
from curation.files import parquet, schemas
from curation.files.disk_arrays import Buckets, blocks, count_true, on_disk
from curation.files.image_ids import bucket_of, pack_ids, unpack_ids
from curation.search.top_k import starts_group

# Rows, or ends of pairs, in a bucket: about 300 MB of memory while it is sorted. Ids are hashes, so buckets have about
# equal sizes. Assumed.
ROWS_PER_BUCKET = 1 << 20
# Of the rows with the same bytes, the first in this order of roles represents the image.
_ROLES = ("seed", "holdout", "pool")
# The columns of a row that its image takes over from the row that represents it.
_TAKEN = ("content", "detail", "pixels", "length", "source")
_ROW = np.dtype(
    [("image_id", "S16"), ("row", np.int64), ("role", np.int8), ("label", np.int64)]
    + [(name, np.int32 if name == "source" else np.int64) for name in _TAKEN]
)
# Images with conflicting labels that are named. Assumed.
NAMED_CONFLICTS = 20
_ORIGIN = np.dtype([("image", np.int64), ("role", np.int8), ("source", np.int32), ("label", np.int64)])
_END = np.dtype([("image_id", "S16"), ("position", np.int64)])


@dataclass(frozen=True)
class Nodes:
    """The unique images, sorted by image_id."""

    image_ids: np.ndarray  # (N,) S16, see image_ids.pack_ids
    is_seed: np.ndarray  # (N,) bool: a seed in at least one source
    is_holdout: np.ndarray  # (N,) bool: a holdout image in at least one source
    content: np.ndarray  # (N,) int64, pixels inside the plain borders
    detail: np.ndarray  # (N,) int64, pixels that the detail needs
    pixels: np.ndarray  # (N,) int64, width x height
    length: np.ndarray  # (N,) int64, bytes
    source: np.ndarray  # (N,) int32, index into DuplicateGraph.sources: of the row that represents the image
    label: np.ndarray  # (N,) int64, a hash of the label of the first row that has one; 0 for none


@dataclass(frozen=True)
class Edges:
    """The pairs, in the order of their files."""

    first: np.ndarray  # (E,) nodes
    second: np.ndarray  # (E,) nodes
    similarity: np.ndarray  # (E,) float32
    differs_locally: np.ndarray  # (E,) bool
    cosine: np.ndarray  # (E,) float32
    mutual: np.ndarray  # (E,) bool


@dataclass(frozen=True)
class DuplicateGraph:
    """The images and pairs of one run; all arrays lie on disk."""

    nodes: Nodes
    edges: Edges
    node_of_row: np.ndarray  # (R,): the node of each row of ingest, counted through its shards
    row_of_node: np.ndarray  # (N,) int64: the row that represents the image
    sources: tuple[str, ...]  # the names of the sources, in the order in which ingest lists them
    label_conflicts: tuple[int, list[str]]  # images whose rows have several labels: their number, and the first few


def read_graph(images: str, pairs: str) -> DuplicateGraph:
    """The graph of a finished ingest and a finished pairs stage.

    Raises InputError when a pair names an image that the ingest does not hold.
    """
    num_rows, num_edges = _num_rows(images, "images"), _num_rows(pairs, "pairs")
    num_buckets = min(max(num_rows, 2 * num_edges) // ROWS_PER_BUCKET + 1, 1 << 16)
    rows, ends = Buckets(num_buckets, _ROW), Buckets(num_buckets, _END)
    names: list[str] = []
    columns_read = ["image_id", "source", "role", "width", "height", "length", "label", "content_pixels"]
    for start, table in _tables(images, "images", schemas.IMAGES, [*columns_read, "detail_pixels"]):
        block = np.empty(table.num_rows, _ROW)
        block["image_id"] = pack_ids(table["image_id"])
        block["row"] = np.arange(start, start + table.num_rows)
        block["role"], block["source"] = _role_numbers(table["role"]), _source_numbers(table["source"], names)
        block["pixels"] = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
        block["length"] = table["length"].to_numpy()
        block["content"], block["detail"] = (table[f"{name}_pixels"].to_numpy() for name in ("content", "detail"))
        block["label"] = _label_hashes(table["label"])
        rows.add(bucket_of(block["image_id"], num_buckets), block)

    dtype = node_type(num_rows)
    end_nodes = on_disk(2 * num_edges, dtype)  # the nodes at the first ends of all edges, then at their second ends
    edges = Edges(
        first=end_nodes[:num_edges],
        second=end_nodes[num_edges:],
        similarity=on_disk(num_edges, np.float32),
        differs_locally=on_disk(num_edges, bool),
        cosine=on_disk(num_edges, np.float32),
        mutual=on_disk(num_edges, bool),
    )
    for start, table in _tables(pairs, "pairs", schemas.PAIRS):
        for name in ("similarity", "differs_locally", "cosine", "mutual"):
            getattr(edges, name)[start : start + table.num_rows] = table[name].to_numpy()
        for name, offset in (("image_id", 0), ("other_image_id", num_edges)):
            block = np.empty(table.num_rows, _END)
            block["image_id"] = pack_ids(table[name])
            block["position"] = np.arange(start, start + table.num_rows) + offset
            ends.add(bucket_of(block["image_id"], num_buckets), block)

    columns: dict[str, DTypeLike] = {
        "image_ids": "S16",
        "is_seed": bool,
        "is_holdout": bool,
        "label": np.int64,
        **{name: _ROW[name] for name in _TAKEN},
    }
    node_columns = {name: on_disk(num_rows, column_dtype) for name, column_dtype in columns.items()}
    node_of_row, row_of_node = on_disk(num_rows, dtype), on_disk(num_rows, np.int64)
    num_nodes = num_conflicts = 0
    conflicts: list[str] = []
    for bucket in range(num_buckets):
        block = rows.read(bucket)
        block = block[np.lexsort((block["row"], block["role"], block["image_id"]))]
        is_first = starts_group(block["image_id"])
        starts = np.flatnonzero(is_first)
        node_of_row[block["row"]] = num_nodes - 1 + np.cumsum(is_first)
        nodes = slice(num_nodes, num_nodes + len(starts))
        first = block[starts]
        row_of_node[nodes] = first["row"]
        node_columns["image_ids"][nodes] = first["image_id"]
        for name in _TAKEN:
            node_columns[name][nodes] = first[name]
        node_columns["label"][nodes], has_conflict = _labels(block["label"], starts)
        num_conflicts += count_true(has_conflict)
        conflicts += unpack_ids(first["image_id"][has_conflict][: NAMED_CONFLICTS - len(conflicts)]).to_pylist()
        for name, role in (("is_seed", 0), ("is_holdout", 1)):
            has_role = np.logical_or.reduceat(block["role"] == role, starts) if len(starts) else False
            node_columns[name][nodes] = has_role
        _write_end_nodes(end_nodes, ends.read(bucket), first["image_id"], num_nodes)
        num_nodes += len(starts)
    cut = {name: column[:num_nodes] for name, column in node_columns.items()}
    return DuplicateGraph(
        Nodes(**cut), edges, node_of_row, row_of_node[:num_nodes], tuple(names), (num_conflicts, conflicts)
    )


@dataclass(frozen=True)
class Origins:
    """Where some images come from, as Nodes states it."""

    source: np.ndarray  # (N,) int32, index into `sources`
    label: np.ndarray  # (N,) int64; 0 for none
    sources: tuple[str, ...]


def read_origins(images: str, image_ids: np.ndarray) -> Origins:
    """The origins of some images of a finished ingest. `image_ids` (N,) S16 are packed, unique and ascending."""
    names: list[str] = []
    blocks_read = [np.empty(0, _ORIGIN)]
    for _, table in _tables(images, "images", schemas.IMAGES, ["image_id", "source", "role", "label"]):
        ids = pack_ids(table["image_id"])
        block = np.empty(len(ids), _ORIGIN)
        block["image"] = np.searchsorted(image_ids, ids)
        block["role"], block["source"] = _role_numbers(table["role"]), _source_numbers(table["source"], names)
        block["label"] = _label_hashes(table["label"])
        is_wanted = block["image"] < len(image_ids)
        is_wanted[is_wanted] = image_ids[block["image"][is_wanted]] == ids[is_wanted]
        blocks_read.append(block[is_wanted])
    rows = np.concatenate(blocks_read)
    rows = rows[np.lexsort((rows["role"], rows["image"]))]  # stable: rows of one role stay in the order of ingest
    starts = np.flatnonzero(starts_group(rows["image"]))
    assert len(starts) == len(image_ids), "images that the ingest does not hold"
    return Origins(rows["source"][starts], _labels(rows["label"], starts)[0], tuple(names))


def labels_differ(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether each label in `one` and its counterpart in `other` are two different labels; 0 is none."""
    result: np.ndarray = (one != other) & (one != 0) & (other != 0)
    return result


def _role_numbers(roles: pa.ChunkedArray) -> np.ndarray:
    numbers: np.ndarray = pc.index_in(roles, pa.array(_ROLES)).to_numpy()
    return numbers


def _source_numbers(sources: pa.ChunkedArray, names: list[str]) -> np.ndarray:
    """The index of each source in `names`, to which new ones are appended."""
    names.extend(name for name in pc.unique(sources).to_pylist() if name not in names)
    numbers: np.ndarray = pc.index_in(sources, pa.array(names, pa.string())).to_numpy()
    return numbers


def _label_hashes(labels: pa.ChunkedArray) -> np.ndarray:
    """A number for each label, (R,) int64: equal for equal texts, and 0 for none."""
    encoded = labels.combine_chunks().dictionary_encode()
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in encoded.dictionary.to_pylist()]
    numbers = np.append(np.frombuffer(b"".join(digests), np.int64), 0)  # at -1: no label
    result: np.ndarray = numbers[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return result


def _labels(label: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For groups of rows that begin at `starts`: the first label that is not 0, and whether there are several."""
    if not len(starts):
        return label[:0], np.zeros(0, bool)
    position = np.where(label != 0, np.arange(len(label)), len(label))
    first = np.append(label, 0)[np.minimum.reduceat(position, starts)]
    differs = (label != 0) & (label != np.repeat(first, np.diff(starts, append=len(label))))
    return first, np.logical_or.reduceat(differs, starts)


def _write_end_nodes(end_nodes: np.ndarray, ends: np.ndarray, image_ids: np.ndarray, first_node: int) -> None:
    """Write the node of each of the `ends` of one bucket, whose sorted `image_ids` begin with `first_node`."""
    for part in blocks(len(ends)):
        end_ids = ends["image_id"][part]
        row = np.searchsorted(image_ids, end_ids)
        is_known = row < len(image_ids)
        is_known[is_known] = image_ids[row[is_known]] == end_ids[is_known]
        if not is_known.all():
            unknown = unpack_ids(end_ids[~is_known][:1])[0]
            raise InputError(f"The pairs name image {unknown}, which the ingest does not hold: not of one run.")
        end_nodes[ends["position"][part]] = first_node + row


def _num_rows(folder: str, kind: str) -> int:
    shards = require_manifest(folder).shards
    return sum(file.rows for shard in shards for file in shard.files if file.name.startswith(kind + "-"))


def _tables(
    folder: str, kind: str, schema: pa.Schema, columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """The tables `<kind>-*` of a stage, each with the number of rows before it."""
    start = 0
    for file in require_manifest(folder).paths(folder, kind):
        table = parquet.read_table(file, schema, columns)
        yield start, table
        start += table.num_rows
