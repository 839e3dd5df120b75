"""Clusters: the kept pool images, each at its nearest centroid, the same bytes twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import cluster, index, records, storage
from curation.cluster import ClusterConfig
from curation.errors import ConfigError, InputError
from curation.runner import InlineRunner
from tests.curation.builders import bytes_in, id_of, image_row, unit_vectors, write_dedup, write_ingest, write_vectors

WIDTH = 8


def small_run(
    folder: Path, roles: list[list[str]], dropped: tuple[int, ...] = ()
) -> tuple[tuple[str, str, str], np.ndarray]:
    """Ingest, dedup and embed of images 0, 1, 2, ... with the given roles, shard by shard; the vectors."""
    count = sum(len(shard) for shard in roles)
    matrix = unit_vectors(count, count, WIDTH).astype(np.float16)
    numbers = iter(range(count))
    shards = [[(next(numbers), role) for role in shard] for shard in roles]
    images = write_ingest(
        folder / "ingest", [[image_row(id_of(n), role, role) for n, role in shard] for shard in shards]
    )
    keep = write_dedup(folder / "dedup", images, lambda row: int(row["image_id"], 16) not in dropped)
    embedded = write_vectors(folder / "embed", images, [{id_of(n): matrix[n] for n, _ in shard} for shard in shards])
    return (images, keep, embedded), matrix


def assignments(folder: str) -> list[dict[str, Any]]:
    names = storage.require_manifest(folder).files("assignments")
    return [row for name in names for row in storage.read_table(f"{folder}/{name}", records.ASSIGNMENTS).to_pylist()]


def test_kept_pool_images_go_to_their_nearest_centroid(tmp_path: Path) -> None:
    roles = [["seed"] * 3, ["pool"] * 20, [], ["holdout", "holdout"], ["pool"] * 15]
    stages, matrix = small_run(tmp_path, roles, dropped=(4, 30))
    output = str(tmp_path / "cluster")
    manifest = cluster.run(ClusterConfig(num_clusters=5), *stages, output, InlineRunner())
    pool = [n for n in [*range(3, 23), *range(25, 40)] if n not in (4, 30)]
    rows = assignments(output)
    assert [int(row["image_id"], 16) for row in rows] == pool
    assert manifest.totals == {"assigned": len(pool)}
    centroids = cluster.read_centroids(output)
    assert centroids.shape == (5, WIDTH) and centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    cosines = matrix[pool].astype(np.float32) @ centroids.T
    assert [row["cluster_id"] for row in rows] == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose([row["similarity"] for row in rows], cosines.max(axis=1), atol=1e-5)
    assert {row["level"] for row in rows} == {0}
    assert {row["cluster_id"] for row in rows} == set(range(5))
    expected = index.spherical_kmeans(matrix[pool], 5, num_iterations=25, seed=0)
    assert centroids.tobytes() == expected.tobytes(), "neither seeds nor dropped images move a centroid"


def test_same_bytes_twice_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    stages, _ = small_run(tmp_path, [["pool"] * 12, ["pool"] * 9])
    config = ClusterConfig(num_clusters=4, seed=3, max_points_per_centroid=3)
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    manifest = cluster.run(config, *stages, one, InlineRunner())
    cluster.run(config, *stages, other, InlineRunner())
    assert bytes_in(one) == bytes_in(other)
    assert cluster.run(config, *stages, one, InlineRunner()) == manifest
    assert set(bytes_in(one)) == {
        "/assignments-00000.parquet",
        "/assignments-00001.parquet",
        "/centroids-0.npy",
        "/manifest.json",
    }
    assert {"centroids-0.npy"} < {file.name for shard in manifest.shards for file in shard.files}


def test_cuts_of_the_same_images_give_the_same_clusters(tmp_path: Path) -> None:
    found = []
    for cuts in ([["pool"] * 24], [["pool"] * 5, [], ["pool"] * 19], [["pool"]] * 24):
        folder = tmp_path / str(len(cuts))
        stages, _ = small_run(folder, cuts)
        cluster.run(ClusterConfig(num_clusters=3), *stages, str(folder / "cluster"), InlineRunner())
        found.append(assignments(str(folder / "cluster")))
    assert found[0] == found[1] == found[2]


def test_one_image_is_one_cluster(tmp_path: Path) -> None:
    stages, _ = small_run(tmp_path, [["pool"], ["seed"]])
    cluster.run(ClusterConfig(num_clusters=1), *stages, str(tmp_path / "cluster"), InlineRunner())
    (row,) = assignments(str(tmp_path / "cluster"))
    assert (row["image_id"], row["cluster_id"]) == (id_of(0), 0)
    assert row["similarity"] == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("num_clusters", "dropped"), [(4, ()), (3, (1,)), (1, (0, 1, 2))])
def test_more_clusters_than_images_are_refused(tmp_path: Path, num_clusters: int, dropped: tuple[int, ...]) -> None:
    stages, _ = small_run(tmp_path, [["pool"] * 3, ["seed"] * 5], dropped)
    output = tmp_path / "cluster"
    with pytest.raises(ConfigError, match=rf"num_clusters is {num_clusters}, but only {3 - len(dropped)} pool images"):
        cluster.run(ClusterConfig(num_clusters=num_clusters), *stages, str(output), InlineRunner())
    assert [path.name for path in output.iterdir()] == [".progress"]


def test_unfinished_stages_are_refused(tmp_path: Path) -> None:
    (images, keep, embedded), _ = small_run(tmp_path, [["pool"] * 3])
    for stages in (
        (str(tmp_path / "x"), keep, embedded),
        (images, str(tmp_path / "x"), embedded),
        (images, keep, "/x"),
    ):
        with pytest.raises(InputError, match="holds no finished stage"):
            cluster.run(ClusterConfig(num_clusters=1), *stages, str(tmp_path / "cluster"), InlineRunner())
    assert not (tmp_path / "cluster").exists()
