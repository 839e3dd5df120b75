"""The cluster stage: kept pool images go to their nearest centroids on every level, in the same bytes for any cut."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import ValidationError

from curation import cluster
from curation.cluster import ClusterConfig, LevelConfig, ResamplingConfig
from curation.engine.manifest import read_manifest, require_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner
from curation.errors import ConfigError, InputError
from curation.files import parquet, schemas
from curation.run_folder import read_centroids, read_parents
from curation.search import kmeans
from tests.curation.builders import (
    Killed,
    KilledRunner,
    bytes_in,
    id_of,
    image_row,
    stages_of,
    unit_vectors,
    write_dedup,
    write_ingest,
    write_vectors,
)

WIDTH = 8


def small_run(
    folder: Path, roles: list[list[str]], dropped: tuple[int, ...] = (), matrix: np.ndarray | None = None
) -> tuple[tuple[str, str, str], np.ndarray]:
    """Finished ingest, dedup and embed of images 0, 1, 2, ... with the roles of each shard; and the vectors."""
    count = sum(len(shard) for shard in roles)
    matrix = (unit_vectors(count, count, WIDTH) if matrix is None else matrix).astype(np.float16)
    numbers = iter(range(count))
    shards = [[(next(numbers), role) for role in shard] for shard in roles]
    images = write_ingest(
        folder / "ingest", [[image_row(id_of(n), role, role) for n, role in shard] for shard in shards]
    )
    keep = write_dedup(folder / "dedup", images, lambda row: int(row["image_id"], 16) not in dropped)
    embedded = write_vectors(folder / "embed", images, [{id_of(n): matrix[n] for n, _ in shard} for shard in shards])
    return (images, keep, embedded), matrix


def one_level(num_clusters: int, **settings: Any) -> ClusterConfig:
    return ClusterConfig(levels=(LevelConfig(num_clusters=num_clusters),), **settings)


def hierarchy(**settings: Any) -> ClusterConfig:
    """Three levels, each with another kind of resampling or none."""
    return ClusterConfig(
        levels=(
            LevelConfig(num_clusters=12, num_iterations=4, resampling=ResamplingConfig(num_rounds=2, sample_size=3)),
            LevelConfig(
                num_clusters=5,
                num_iterations=6,
                start="random",
                resampling=ResamplingConfig(num_rounds=1, sample_size=2, draw="random"),
            ),
            LevelConfig(num_clusters=2, num_iterations=3),
        ),
        **settings,
    )


def assignments(folder: str, level: int | None = None) -> list[dict[str, Any]]:
    names = require_manifest(folder).files("assignments")
    rows = [row for name in names for row in parquet.read_table(f"{folder}/{name}", schemas.ASSIGNMENTS).to_pylist()]
    return [row for row in rows if level in (None, row["level"])]


def test_kept_pool_images_go_to_their_nearest_centroid(tmp_path: Path) -> None:
    roles = [["seed"] * 3, ["pool"] * 20, [], ["holdout", "holdout"], ["pool"] * 15]
    stages, matrix = small_run(tmp_path, roles, dropped=(4, 30))
    output = str(tmp_path / "cluster")
    manifest = cluster.run(one_level(5), stages_of(*stages), output, InlineRunner())
    pool = [n for n in [*range(3, 23), *range(25, 40)] if n not in (4, 30)]
    rows = assignments(output)
    assert [int(row["image_id"], 16) for row in rows] == pool
    assert manifest.totals == {"assigned": len(pool)}
    centroids = read_centroids(output)
    assert centroids.shape == (5, WIDTH) and centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    cosines = matrix[pool].astype(np.float32) @ centroids.T
    assert [row["cluster_id"] for row in rows] == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose([row["similarity"] for row in rows], cosines.max(axis=1), atol=1e-5)
    assert {row["level"] for row in rows} == {0}
    assert {row["cluster_id"] for row in rows} == set(range(5))
    sums = np.stack([matrix[pool][cosines.argmax(axis=1) == k].astype(np.float64).sum(axis=0) for k in range(5)])
    means = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    np.testing.assert_allclose(centroids, means, atol=1e-6, err_msg="seeds or dropped images moved a centroid")
    (level,) = manifest.facts["levels"]
    assert level["mean_cosine"] == pytest.approx(np.mean([row["similarity"] for row in rows]))
    assert level["objectives"][0][-1] == pytest.approx(level["mean_cosine"]), "the last iteration moved centroids"
    sizes = sorted(np.bincount([row["cluster_id"] for row in rows], minlength=5).tolist())
    size_facts = [level[f"{name}_cluster"] for name in ("smallest", "median", "largest")]
    assert size_facts == [sizes[0], sizes[2], sizes[4]] and level["empty_clusters"] == 0


def test_agrees_with_the_fit_of_one_process(tmp_path: Path) -> None:
    stages, matrix = small_run(tmp_path, [["pool"] * 40, ["pool"] * 50])
    for start in ("random", "k_means++"):
        level = LevelConfig(num_clusters=9, num_iterations=7, start=start)
        output = str(tmp_path / start)
        cluster.run(ClusterConfig(levels=(level,), rows_per_part=25), stages_of(*stages), output, InlineRunner())
        seed = int(np.random.SeedSequence([0, 0, 0]).generate_state(1)[0])
        expected = kmeans.fit(lambda: [matrix], 9, num_iterations=7, start=start, seed=seed)
        assert read_centroids(output).tobytes() == expected.centroids.tobytes()


def test_same_bytes_twice_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    stages, _ = small_run(tmp_path, [["pool"] * 12, ["pool"] * 9])
    config = one_level(4, seed=3, max_points_per_centroid=3)
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    manifest = cluster.run(config, stages_of(*stages), one, InlineRunner())
    cluster.run(config, stages_of(*stages), other, InlineRunner())
    assert bytes_in(one) == bytes_in(other)
    assert cluster.run(config, stages_of(*stages), one, InlineRunner()) == manifest
    assert set(bytes_in(one)) == {
        "/assignments-00000.parquet",
        "/assignments-00001.parquet",
        "/centroids-0.npy",
        "/manifest.json",
    }
    assert {"centroids-0.npy"} < {file.name for shard in manifest.shards for file in shard.files}


@pytest.mark.parametrize("config", [one_level(3), one_level(3, max_points_per_centroid=4), hierarchy()])
def test_cuts_of_the_same_images_give_the_same_clusters(tmp_path: Path, config: ClusterConfig) -> None:
    results = []
    for cuts in ([["pool"] * 24], [["pool"] * 5, [], ["pool"] * 19], [["pool"]] * 24):
        folder = tmp_path / str(len(cuts))
        stages, _ = small_run(folder, cuts)
        cluster.run(config, stages_of(*stages), str(folder / "cluster"), InlineRunner())
        results.append(sorted(assignments(str(folder / "cluster")), key=lambda row: (row["level"], row["image_id"])))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("sample", [None, 5])
@pytest.mark.parametrize("draw", ["closest", "random"])
def test_parts_of_any_size_give_the_same_bytes(
    tmp_path: Path, sample: int | None, draw: Literal["closest", "random"]
) -> None:
    """Holds for level 0, whose vectors are float16; sums of float32 centroids depend on the cut."""
    stages, _ = small_run(tmp_path, [["pool"] * 30, ["seed"] * 2, ["pool"] * 47, []])
    resampling = ResamplingConfig(num_rounds=1, sample_size=3, draw=draw)
    levels = (LevelConfig(num_clusters=12, num_iterations=4, resampling=resampling), LevelConfig(num_clusters=3))
    results = []
    for rows_per_part in (1000, 77, 30, 13):  # one part, one full part, about one part per shard, many parts
        output = str(tmp_path / str(rows_per_part))
        config = ClusterConfig(levels=levels, rows_per_part=rows_per_part, max_points_per_centroid=sample)
        cluster.run(config, stages_of(*stages), output, InlineRunner())
        results.append({name: data for name, data in bytes_in(output).items() if name != "/manifest.json"})
    assert results[0] == results[1] == results[2] == results[3] and len(results[0]) == 7


def test_levels_are_consistent(tmp_path: Path) -> None:
    stages, matrix = small_run(tmp_path, [["pool"] * 40, ["seed"] * 3, ["pool"] * 50])
    pool = matrix[[*range(40), *range(43, 93)]].astype(np.float32)
    output = str(tmp_path / "cluster")
    manifest = cluster.run(hierarchy(), stages_of(*stages), output, InlineRunner())
    sizes = (12, 5, 2)
    centroids = [read_centroids(output, level) for level in range(3)]
    expected = (pool @ centroids[0].T).argmax(axis=1)
    for level in range(3):
        assert centroids[level].shape == (sizes[level], WIDTH)
        np.testing.assert_allclose(np.linalg.norm(centroids[level], axis=1), 1, atol=1e-6)
        if level > 0:
            parents = read_parents(output, level - 1)
            assert parents.dtype == np.int64
            assert parents.tolist() == (centroids[level - 1] @ centroids[level].T).argmax(axis=1).tolist()
            expected = parents[expected]
        rows = assignments(output, level)
        assert [row["image_id"] for row in rows] == [id_of(n) for n in [*range(40), *range(43, 93)]]
        assert [row["cluster_id"] for row in rows] == expected.tolist()
        cosines = np.einsum("nd,nd->n", pool, centroids[level][expected]).clip(-1, 1)
        np.testing.assert_allclose([row["similarity"] for row in rows], cosines, atol=1e-6)
        facts, counts = manifest.facts["levels"][level], np.bincount(expected, minlength=sizes[level])
        assert facts["largest_cluster"] == counts.max() and facts["empty_clusters"] == (counts == 0).sum()
        assert facts["mean_cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
        assert len(facts["objectives"]) == (3, 2, 1)[level]
    for name in require_manifest(output).files("assignments"):
        levels = parquet.read_table(f"{output}/{name}", schemas.ASSIGNMENTS).column("level").to_pylist()
        assert levels == sorted(levels)


@pytest.mark.parametrize("draw", ["closest", "random"])
def test_resampling_spreads_centroids_more_evenly_than_the_points_are(
    tmp_path: Path, draw: Literal["closest", "random"]
) -> None:
    """Three quarters of the points lie in a cap that covers a twentieth of the sphere.

    Without resampling a third of the centroids lie in the cap; with resampling, a tenth or less.
    """
    random = np.random.default_rng(0)
    matrix = np.zeros((3000, WIDTH))
    matrix[:, :3] = random.normal(size=(3000, 3)) * np.where(random.random(3000) < 0.9, 0.2, 1)[:, None]
    matrix[:, 0] += (np.abs(matrix[:, 1:3]).max(axis=1) < 0.6) * random.binomial(1, 0.9, 3000)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    stages, _ = small_run(tmp_path, [["pool"] * 3000], matrix=matrix)
    shares = []
    for resampling in (None, ResamplingConfig(num_rounds=6, sample_size=10, draw=draw)):
        output = str(tmp_path / str(resampling is None))
        level = LevelConfig(num_clusters=60, resampling=resampling)
        cluster.run(ClusterConfig(levels=(level,)), stages_of(*stages), output, InlineRunner())
        shares.append((read_centroids(output)[:, 0] > 0.9).mean())
    assert (matrix[:, 0] > 0.9).mean() > 0.7 and 0.25 < shares[0] < 0.4 and shares[1] < 0.15


def test_same_bytes_on_ray(tmp_path: Path, ray_runner: RayRunner) -> None:
    """One iteration over many parts."""
    stages, _ = small_run(tmp_path, [["pool"] * 30, ["pool"] * 25])
    level = LevelConfig(num_clusters=6, num_iterations=1)
    config = ClusterConfig(levels=(level, LevelConfig(num_clusters=2)), rows_per_part=20)
    cluster.run(config, stages_of(*stages), str(tmp_path / "inline"), InlineRunner())
    cluster.run(config, stages_of(*stages), str(tmp_path / "ray"), ray_runner)
    assert bytes_in(str(tmp_path / "ray")) == bytes_in(str(tmp_path / "inline"))


def test_every_kill_resumes_at_the_unfinished_part(tmp_path: Path) -> None:
    stages, _ = small_run(tmp_path, [["pool"] * 30, ["pool"] * 25])
    config = hierarchy(rows_per_part=19, max_points_per_centroid=4)
    straight, counter = str(tmp_path / "straight"), KilledRunner(10**6)
    cluster.run(config, stages_of(*stages), straight, counter)
    num_shards = 10**6 - counter.calls_left
    assert num_shards > 30
    for lives_for in (1, 2, 5):
        output, deaths = str(tmp_path / str(lives_for)), 0
        while read_manifest(output) is None:
            try:
                cluster.run(config, stages_of(*stages), output, KilledRunner(lives_for))
            except Killed:
                deaths += 1
        assert deaths == (num_shards - 1) // lives_for, "a finished shard was done again"
        assert bytes_in(output) == bytes_in(straight)


@pytest.mark.parametrize("seconds_between_saves", [0.0, 30.0])
def test_kills_of_a_driver_that_clusters_alone_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_between_saves: float
) -> None:
    """One part holds all points. The driver dies when it reads them, once in each of its first iterations."""
    stages, _ = small_run(tmp_path, [["pool"] * 60, ["pool"] * 50])
    straight, output = str(tmp_path / "straight"), str(tmp_path / "output")
    cluster.run(hierarchy(), stages_of(*stages), straight, InlineRunner())
    read_blocks, num_reads = cluster.read_blocks, 0

    def mortal_read_blocks(part: cluster.Part) -> Iterator[np.ndarray]:
        nonlocal num_reads
        num_reads += 1
        if num_reads > lives_for:
            raise Killed
        return read_blocks(part)

    # No worker runs that could be killed, so the driver dies where it reads. A save by the clock comes at every
    # iteration, or at none.
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_SAVES", seconds_between_saves)
    monkeypatch.setattr(cluster, "read_blocks", mortal_read_blocks)
    lives_for = deaths = 0
    while read_manifest(output) is None:
        num_reads, lives_for = 0, lives_for + 1
        try:
            cluster.run(hierarchy(), stages_of(*stages), output, InlineRunner())
        except Killed:
            deaths += 1
    assert deaths > 3 and bytes_in(output) == bytes_in(straight)


@pytest.mark.parametrize("rows_per_part", [1, 1000])
def test_one_image_is_one_cluster(tmp_path: Path, rows_per_part: int) -> None:
    stages, _ = small_run(tmp_path, [["pool"], ["seed"]])
    cluster.run(
        one_level(1, rows_per_part=rows_per_part), stages_of(*stages), str(tmp_path / "cluster"), InlineRunner()
    )
    (row,) = assignments(str(tmp_path / "cluster"))
    assert (row["image_id"], row["cluster_id"]) == (id_of(0), 0)
    assert row["similarity"] == pytest.approx(1, abs=2e-3)


def test_equal_images_share_a_cluster(tmp_path: Path) -> None:
    stages, _ = small_run(tmp_path, [["pool"] * 9], matrix=np.repeat(unit_vectors(0, 1, WIDTH), 9, axis=0))
    manifest = cluster.run(one_level(3), stages_of(*stages), str(tmp_path / "cluster"), InlineRunner())
    rows = assignments(str(tmp_path / "cluster"))
    assert len({row["cluster_id"] for row in rows}) == 1 and min(row["similarity"] for row in rows) > 0.998
    assert manifest.facts["levels"][0]["empty_clusters"] == 2


@pytest.mark.parametrize("sample", [None, 100])
@pytest.mark.parametrize(("num_clusters", "dropped"), [(4, ()), (3, (1,))])
def test_more_clusters_than_images_are_refused(
    tmp_path: Path, num_clusters: int, dropped: tuple[int, ...], sample: int | None
) -> None:
    stages, _ = small_run(tmp_path, [["pool"] * 3, ["seed"] * 5], dropped)
    output = tmp_path / "cluster"
    config = one_level(num_clusters, max_points_per_centroid=sample)
    with pytest.raises(ConfigError, match=rf"num_clusters is {num_clusters}, but only {3 - len(dropped)} pool images"):
        cluster.run(config, stages_of(*stages), str(output), InlineRunner())
    assert [path.name for path in output.iterdir()] == [".progress"]
    cluster.run(one_level(1), stages_of(*stages), str(output), InlineRunner())  # corrected; needs no --replace


@pytest.mark.parametrize("sample", [None, 100])
@pytest.mark.parametrize("num_clusters", [None, 1])
def test_an_empty_pool_is_refused(tmp_path: Path, num_clusters: int | None, sample: int | None) -> None:
    stages, _ = small_run(tmp_path, [["pool"] * 3, ["seed"] * 5], (0, 1, 2))
    config = ClusterConfig(levels=(LevelConfig(num_clusters=num_clusters),), max_points_per_centroid=sample)
    with pytest.raises(InputError, match="there is nothing to cluster, because no pool images"):
        cluster.run(config, stages_of(*stages), str(tmp_path / "cluster"), InlineRunner())


@pytest.mark.parametrize("sample", [None, 100])
@pytest.mark.parametrize(("num_pool", "num_clusters"), [(1, 1), (2, 1), (3, 2), (30, 5), (31, 6)])
def test_the_number_of_clusters_follows_from_the_kept_pool(
    tmp_path: Path, num_pool: int, num_clusters: int, sample: int | None
) -> None:
    stages, _ = small_run(tmp_path, [["pool"] * (num_pool + 1), ["seed"] * 5], (0,))
    output = str(tmp_path / "cluster")
    cluster.run(ClusterConfig(max_points_per_centroid=sample), stages_of(*stages), output, InlineRunner())
    assert len(read_centroids(output)) == num_clusters
    given = str(tmp_path / "given")
    config = one_level(num_clusters, max_points_per_centroid=sample)
    cluster.run(config, stages_of(*stages), given, InlineRunner())
    assert assignments(given) == assignments(output)


def test_several_levels_need_their_numbers_of_clusters() -> None:
    with pytest.raises(ValueError, match="of several levels, each needs num_clusters"):
        ClusterConfig(levels=(LevelConfig(), LevelConfig(num_clusters=2)))


def test_fewer_drawn_points_than_clusters_are_refused(tmp_path: Path) -> None:
    matrix = np.repeat(unit_vectors(0, 2, WIDTH), 10, axis=0)  # two of the four clusters are empty
    stages, _ = small_run(tmp_path, [["pool"] * 20], matrix=matrix)
    level = LevelConfig(num_clusters=4, resampling=ResamplingConfig(num_rounds=1, sample_size=1))
    with pytest.raises(ConfigError, match=r"levels\.0\.resampling\.sample_size is 1, which draws \d points"):
        cluster.run(ClusterConfig(levels=(level,)), stages_of(*stages), str(tmp_path / "cluster"), InlineRunner())


@pytest.mark.parametrize("sizes", [(3, 3), (3, 4), (5, 2, 2), ()])
def test_levels_that_do_not_decrease_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="levels"):
        ClusterConfig(levels=tuple(LevelConfig(num_clusters=size) for size in sizes))


def test_points_are_read_in_blocks_across_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "BLOCK_ROWS", 4)  # otherwise one block would hold all 23 points
    matrix = unit_vectors(0, 23, 3).astype(np.float16)
    files = []
    for number, rows in enumerate(np.split(matrix, [5, 5, 6, 17])):
        np.save(tmp_path / f"{number}.npy", rows)
        files.append(cluster.PointFile(str(tmp_path / f"{number}.npy"), len(rows)))
    for rows_per_part in (1, 6, 23, 50):
        parts = cluster.cut(files, rows_per_part)
        assert [part.rows for part in parts[:-1]] == [rows_per_part] * (len(parts) - 1)
        assert [part.first for part in parts] == list(range(0, 23, rows_per_part))
        for part in parts:
            blocks = list(cluster.read_blocks(part))
            assert np.concatenate(blocks).tobytes() == matrix[part.first : part.first + part.rows].tobytes()
            assert [len(block) for block in blocks[:-1]] == [4] * (len(blocks) - 1)


def test_unfinished_stages_are_refused(tmp_path: Path) -> None:
    (images, keep, embedded), _ = small_run(tmp_path, [["pool"] * 3])
    for stages in (
        (str(tmp_path / "x"), keep, embedded),
        (images, str(tmp_path / "x"), embedded),
        (images, keep, "/x"),
    ):
        with pytest.raises(InputError, match="holds no finished stage"):
            cluster.run(one_level(1), stages_of(*stages), str(tmp_path / "cluster"), InlineRunner())
    assert not (tmp_path / "cluster").exists()
