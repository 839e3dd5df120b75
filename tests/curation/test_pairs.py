"""Pairs: candidates by descriptor and by hash, each pair once with its cosine, for any size of the shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation import pairs
from curation.engine.manifest import require_manifest
from curation.engine.runner import InlineRunner
from curation.errors import ConfigError, InputError
from curation.files import parquet, paths, schemas
from curation.pairs import PairsConfig
from curation.run_folder import RunFolder
from curation.search.config import SearchConfig
from tests.curation.builders import id_of, image_row, unit_vectors, write_ingest, write_vectors

WIDTH = 16


def scattered(number: int) -> str:
    """An image_id; the ids of consecutive numbers are spread over the range of ids."""
    return f"{number * 0x9E3779B9 % 2**32:08x}{number:024x}"


class Run:
    """An ingest and its descriptors. Image n has row n of `matrix`; hashes are random, except for those in `phash`."""

    def __init__(self, folder: Path, matrix: np.ndarray, phash: dict[int, int] | None = None) -> None:
        self.folder = folder
        self.matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
        random_hashes = np.random.default_rng(0).integers(0, 2**63, len(matrix)).tolist()
        hashes = [(phash or {}).get(number, random_hashes[number]) for number in range(len(matrix))]
        rows = [image_row(scattered(n), "web", "pool", phash=hashes[n]) for n in range(len(matrix))]
        half = len(rows) // 2
        self.images = write_ingest(folder / "ingest", [rows[:half], rows[half:], rows[:1]])  # one image occurs twice
        vector_of = {row["image_id"]: self.matrix[n] for n, row in enumerate(rows)}
        ids = list(vector_of)
        ids_of_shards = (ids[:half], ids[half:], ids[:1])
        shards = [{image_id: vector_of[image_id] for image_id in shard_ids} for shard_ids in ids_of_shards]
        self.descriptors = write_vectors(folder / "describe", self.images, shards)
        self.number = {image_id: n for n, image_id in enumerate(ids)}

    def pairs(self, name: str = "pairs", **config: Any) -> list[dict[str, Any]]:
        output = str(self.folder / name)
        pairs.run(
            PairsConfig(**config), RunFolder(ingest=self.images, describe=self.descriptors), output, InlineRunner()
        )
        names = require_manifest(output).files("pairs")
        table = pa.concat_tables([parquet.read_table(paths.join(output, name), schemas.PAIRS) for name in names])
        assert table.schema == schemas.PAIRS
        rows: list[dict[str, Any]] = table.to_pylist()
        keys = [(row["image_id"], row["other_image_id"]) for row in rows]
        assert keys == sorted(set(keys)) and all(low < high for low, high in keys), "each pair once, by ids"
        assert all(row["similarity"] == row["cosine"] and not row["differs_locally"] for row in rows)
        for row in rows:
            one, other = (self.matrix[self.number[row[key]]].astype(np.float64) for key in schemas.PAIRS.names[:2])
            assert row["cosine"] == pytest.approx(one @ other, abs=1e-6)
        return rows

    def numbers(self, rows: list[dict[str, Any]]) -> set[tuple[int, int]]:
        return {
            (min(pair), max(pair))
            for pair in ((self.number[row["image_id"]], self.number[row["other_image_id"]]) for row in rows)
        }


def copy_groups(seed: int, num_groups: int, size: int) -> np.ndarray:
    """Unit vectors of groups of near-copies, `size` vectors a group."""
    rng = np.random.default_rng(seed)
    matrix = np.repeat(unit_vectors(seed, num_groups, WIDTH), size, axis=0)
    matrix = matrix + rng.normal(0, 0.05, matrix.shape)
    unit: np.ndarray = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return unit


@pytest.mark.parametrize("seed", range(3))
def test_pairs_have_the_minimum_similarity(tmp_path: Path, seed: int) -> None:
    run = Run(tmp_path, copy_groups(seed, 20, 3))
    rows = run.pairs(min_descriptor_similarity=0.6)
    cosine = run.matrix.astype(np.float64) @ run.matrix.astype(np.float64).T
    expected = {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(cosine >= 0.6, 1)), strict=True)}
    assert run.numbers(rows) == expected and len(expected) >= 60
    assert all(row["mutual"] for row in rows), "no image has more than 64 neighbours"


@pytest.mark.parametrize("images_per_shard", [1, 7, 10**6])
def test_size_of_shards_changes_no_row(tmp_path: Path, images_per_shard: int) -> None:
    run = Run(tmp_path, copy_groups(1, 15, 3), phash={0: 1, 44: 0, 20: 3})
    reference = run.pairs("reference", images_per_shard=20)
    assert run.pairs(images_per_shard=images_per_shard) == reference
    manifest = require_manifest(str(tmp_path / "pairs"))
    assert len(manifest.files("pairs")) == max(1, -(-46 // images_per_shard))
    assert manifest.totals["pairs"] == len(reference) <= manifest.totals["candidates"]


def test_pair_by_hash_alone_has_the_cosine_of_its_descriptors(tmp_path: Path) -> None:
    """Nearly orthogonal vectors with near hashes: the search by descriptors proposes none of the pairs."""
    run = Run(
        tmp_path, np.eye(6, WIDTH) + 0.3 * np.eye(6, WIDTH, 1), phash={0: 0b1011, 1: 0b1000, 4: 0b1111, 5: 1 << 60}
    )
    rows = run.pairs(max_phash_distance=2, min_similarity=-1.0)
    assert run.numbers(rows) == {(0, 1), (0, 4), (1, 5)}
    assert not any(row["mutual"] for row in rows)
    assert run.pairs("none", max_phash_distance=-1, min_similarity=-1.0) == []
    above = run.pairs("above", max_phash_distance=2, min_similarity=0.1)
    assert above == [row for row in rows if row["cosine"] >= 0.1] and 0 < len(above) < len(rows)


def test_pair_by_descriptor_and_hash_is_one_pair_with_the_columns_of_the_search(tmp_path: Path) -> None:
    run = Run(tmp_path, copy_groups(2, 5, 2), phash={0: 5, 1: 5})
    by_search = run.pairs("search", max_phash_distance=-1)
    assert (0, 1) in run.numbers(by_search)
    assert run.pairs() == by_search


def test_mutual_pairs_are_nearest_neighbours_of_both_images(tmp_path: Path) -> None:
    """An image between two others is the nearest neighbour of both, and has one nearest neighbour itself."""
    angles = np.array([0.0, 0.3, -0.31, 0.65, -0.66])
    matrix = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    run = Run(tmp_path, matrix)
    rows = run.pairs(num_neighbors=1, max_phash_distance=-1, min_descriptor_similarity=0.5)
    mutual = {pair for row in rows for pair in run.numbers([row]) if row["mutual"]}
    assert run.numbers(rows) == {(0, 1), (0, 2), (1, 3), (2, 4)} and mutual == {(0, 1)}


def test_zero_neighbours_search_no_descriptors(tmp_path: Path) -> None:
    """Not even those of the holdout: the profile `exact` relies on it."""
    run = Run(tmp_path, copy_groups(2, 5, 2), phash={0: 5, 1: 5})
    search = SearchConfig(backend="ivf")
    assert run.pairs("none", num_neighbors=0, max_phash_distance=-1, search=search) == []
    assert run.numbers(run.pairs("hashes", num_neighbors=0, search=search)) == {(0, 1)}
    assert require_manifest(str(tmp_path / "none")).facts["full_lists"] == 0


@pytest.mark.parametrize("count", [1, 2, 9])
def test_equal_images_are_one_image_and_no_image_pairs_with_itself(tmp_path: Path, count: int) -> None:
    """The first image has a second row in another file. The vectors of different images are orthogonal."""
    run = Run(tmp_path, np.eye(count, WIDTH))
    assert run.pairs() == []
    assert require_manifest(str(tmp_path / "pairs")).totals == {"candidates": 0, "pairs": 0}


def test_recall_of_the_search_is_a_fact(tmp_path: Path) -> None:
    run = Run(tmp_path, copy_groups(3, 20, 3))
    exact = run.pairs("exact")
    search = SearchConfig(backend="ivf", rows_per_cell=5, num_probes=1000)
    assert run.pairs("ivf", search=search) == exact
    facts = require_manifest(str(tmp_path / "ivf")).facts
    assert facts["search"]["recall"] == 1 and require_manifest(str(tmp_path / "exact")).facts["search"] == {}


# Refused inputs


def test_descriptors_of_another_ingest_are_refused(tmp_path: Path) -> None:
    one, other = Run(tmp_path / "one", unit_vectors(0, 4, WIDTH)), Run(tmp_path / "other", unit_vectors(0, 5, WIDTH))
    with pytest.raises(InputError, match="descriptors of other images than those of"):
        pairs.run(
            PairsConfig(),
            RunFolder(ingest=one.images, describe=other.descriptors),
            str(tmp_path / "pairs"),
            InlineRunner(),
        )
    assert not (tmp_path / "pairs").exists()


def test_image_without_a_descriptor_is_named(tmp_path: Path) -> None:
    images = write_ingest(tmp_path / "ingest", [[image_row(id_of(n), "web", "pool") for n in range(3)]])
    matrix = unit_vectors(0, 2, WIDTH)
    described = write_vectors(tmp_path / "describe", images, [{id_of(n): matrix[n] for n in range(2)}])
    with pytest.raises(InputError, match=f"no descriptor of image {id_of(2)}"):
        pairs.run(PairsConfig(), RunFolder(ingest=images, describe=described), str(tmp_path / "pairs"), InlineRunner())


def test_verification_needs_thumbnails(tmp_path: Path) -> None:
    run = Run(tmp_path, unit_vectors(0, 4, WIDTH))
    with pytest.raises(ConfigError, match=r"no thumbnails.*Set describe\.thumbnail_side"):
        run.pairs(verification={})
