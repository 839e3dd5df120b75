"""The numbered graph agrees with the files, for any sizes of blocks and buckets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.copies import duplicate_graph
from curation.copies.duplicate_graph import read_graph
from curation.errors import InputError
from curation.files import disk_arrays, parquet, schemas
from curation.files.image_ids import unpack_ids
from tests.curation.builders import content_hash, id_of, image_row, write_ingest, write_stage

Name = Callable[[int], str]


def spread_id(number: int) -> str:
    """An image_id anywhere in the range of ids, whose last bytes are zeros, as in `id_of(0)`, for number 0."""
    return f"{(number + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}"


def write_run(
    folder: Path, seed: int, name: Name = spread_id
) -> tuple[str, str, list[dict[str, Any]], list[tuple[Any, ...]]]:
    """An ingest with many copies and a pair of every two neighbouring ids: both folders, and the rows of both."""
    rng = np.random.default_rng(seed)
    shards, numbers = [], set()
    for count in [*rng.integers(0, 15, 5).tolist(), 2]:
        drawn = rng.integers(0, 30, count).tolist()
        numbers |= set(drawn)
        roles = rng.choice(["seed", "pool", "holdout"], count).tolist()
        shards.append(
            [
                image_row(name(n), role, role, width=n + 1, height=3, length=7 * n)
                for n, role in zip(drawn, roles, strict=True)
            ]
        )
    images = write_ingest(folder / "ingest", shards)
    ordered = sorted(name(n) for n in numbers)
    pairs = [
        (*ordered[row : row + 2], float(rng.random()), bool(rng.random() < 0.5), float(rng.random()), row % 2 > 0)
        for row in rng.permutation(len(ordered) - 1).tolist()
    ]
    tables = [
        {
            "pairs": pa.Table.from_pylist(
                [dict(zip(schemas.PAIRS.names, row, strict=True)) for row in part], schemas.PAIRS
            )
        }
        for part in (pairs[:3], [], pairs[3:])
    ]
    copies = write_stage(folder / "pairs", tables, inputs={"images": content_hash(images)})
    return images, copies, [row for rows in shards for row in rows], pairs


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("block", "bucket"), [(disk_arrays.BLOCK, 1 << 20), (1, 1), (4, 9)])
@pytest.mark.parametrize("name", [spread_id, id_of])
def test_graph_agrees_with_the_rows(
    tmp_path: Path, seed: int, block: int, bucket: int, name: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_arrays, "BLOCK", block)  # a million by default, as ROWS_PER_BUCKET: more than a test needs
    monkeypatch.setattr(duplicate_graph, "ROWS_PER_BUCKET", bucket)
    images, copies, rows, pairs = write_run(tmp_path, seed, name)
    graph = read_graph(images, copies)
    ids = unpack_ids(graph.nodes.image_ids).to_pylist()
    assert ids == sorted({row["image_id"] for row in rows})
    assert [ids[node] for node in graph.node_of_row] == [row["image_id"] for row in rows]
    for node, image_id in enumerate(ids):
        copies_of_image = [number for number, row in enumerate(rows) if row["image_id"] == image_id]
        roles = {rows[number]["role"] for number in copies_of_image}
        assert graph.nodes.is_seed[node] == ("seed" in roles)
        assert graph.nodes.is_holdout[node] == ("holdout" in roles)
        preference = [("seed", "holdout", "pool").index(row["role"]) for row in rows]
        first = min(copies_of_image, key=preference.__getitem__)
        assert graph.row_of_node[node] == first
        assert graph.nodes.pixels[node] == rows[first]["width"] * rows[first]["height"]
        assert graph.nodes.length[node] == rows[first]["length"]
    edges = graph.edges
    assert [ids[node] for node in edges.first] == [row[0] for row in pairs]
    assert [ids[node] for node in edges.second] == [row[1] for row in pairs]
    for index, column in enumerate((edges.similarity, edges.differs_locally, edges.cosine, edges.mutual), start=2):
        assert column.tolist() == np.array([row[index] for row in pairs], column.dtype).tolist()


def test_file_of_another_length_than_written_is_noticed(tmp_path: Path) -> None:
    images, copies, *_ = write_run(tmp_path, 0)
    path = f"{copies}/pairs-00000.parquet"
    parquet.write_table(path, parquet.read_table(path, schemas.PAIRS).slice(1))
    with pytest.raises(InputError, match=r"pairs-00000\.parquet: damaged after it was written"):
        read_graph(images, copies)
