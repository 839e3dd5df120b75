"""Retrieval: every mode agrees with a plain implementation of its rule, as a stage and alone."""

import io
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import cluster, retrieve
from curation.cluster import ClusterConfig, LevelConfig
from curation.engine.manifest import Manifest, Plan, ShardRecord, require_manifest, write_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner
from curation.errors import ConfigError, InputError, OutputMismatchError
from curation.files import parquet, paths, schemas, vectors
from curation.quotas import balanced_counts, cap_evenly
from curation.retrieve import ClusteringConfig, DatasetConfig, RetrieveConfig
from curation.run_folder import cluster_sizes, read_centroids, read_parents, read_retrieved
from tests.curation.builders import (
    bytes_in,
    id_of,
    image_row,
    stages_of,
    unit_vectors,
    write_dedup,
    write_ingest,
    write_vectors,
)


class Run:
    """Finished ingest, dedup, embed and cluster over random vectors: seeds `large` and `small`, a pool; some drops."""

    def __init__(self, folder: Path, seed: int = 0, num_clusters: int = 6) -> None:
        rng = np.random.default_rng(seed)
        self.matrix = unit_vectors(seed, 160).astype(np.float16)
        dropped = set(rng.permutation(160)[:20].tolist())
        shards = [("large", "seed", range(0, 12)), ("large", "seed", range(12, 30)), ("small", "seed", range(30, 36))]
        shards += [("web", "pool", range(36, 90)), ("web", "pool", range(90, 90)), ("more web", "pool", range(90, 150))]
        shards += [("test", "holdout", range(150, 160))]
        rows = [[image_row(id_of(n), source, role) for n in numbers] for source, role, numbers in shards]
        self.images = write_ingest(folder / "ingest", rows)
        self.kept = write_dedup(folder / "dedup", self.images, lambda row: int(row["image_id"], 16) not in dropped)
        by_shard = [{id_of(n): self.matrix[n] for n in numbers} for _, _, numbers in shards]
        self.vectors = write_vectors(folder / "embed", self.images, by_shard)
        self.clusters = str(folder / "cluster")
        stages = (self.images, self.kept, self.vectors)
        cluster.run(
            ClusterConfig(levels=(LevelConfig(num_clusters=num_clusters),)),
            stages_of(*stages),
            self.clusters,
            InlineRunner(),
        )
        self.output = str(folder / "retrieve")
        self.seeds = {
            source: [n for s, role, numbers in shards for n in numbers if s == source and n not in dropped]
            for source in ("large", "small")
        }
        self.pool = [n for n in range(36, 150) if n not in dropped]

    def retrieve(self, config: RetrieveConfig, output: str = "", **more: Any) -> list[dict[str, Any]]:
        stages = (self.images, self.kept, self.vectors, self.clusters)
        retrieve.run(config, stages_of(*stages), output or self.output, InlineRunner(), **more)
        rows: list[dict[str, Any]] = read_retrieved(output or self.output).to_pylist()
        return rows

    def nearest_to(self, seed: int, k: int) -> list[int]:
        cosine = self.matrix[self.pool].astype(np.float64) @ self.matrix[seed].astype(np.float64)
        return [self.pool[i] for i in np.argsort(-cosine, kind="stable")[:k]]

    def members(self) -> dict[int, list[tuple[float, int]]]:
        """The kept pool images of each cluster, nearest first."""
        centroids = read_centroids(self.clusters)
        cosines = self.matrix[self.pool].astype(np.float32) @ centroids.T
        cluster_of = cosines.argmax(axis=1)
        return {
            c: sorted((-cosines[i, c], self.pool[i]) for i in np.flatnonzero(cluster_of == c))
            for c in range(len(centroids))
        }

    def seeds_in(self, source: str) -> Counter[int]:
        centroids = read_centroids(self.clusters)
        return Counter((self.matrix[self.seeds[source]].astype(np.float32) @ centroids.T).argmax(axis=1).tolist())


def datasets(*configs: dict[str, Any], **more: Any) -> RetrieveConfig:
    return RetrieveConfig(datasets=tuple(DatasetConfig(**config) for config in configs), **more)


@pytest.mark.parametrize("seed", range(3))
def test_sample_takes_the_nearest_of_the_kept_pool(tmp_path: Path, seed: int) -> None:
    run = Run(tmp_path, seed)
    for k in (1, 4, 1000):
        rows = run.retrieve(datasets({"name": "large", "retrieval": "sample", "k": k}), replace=True)
        expected = [(n, other, rank) for n in run.seeds["large"] for rank, other in enumerate(run.nearest_to(n, k))]
        assert [(int(r["seed_image_id"], 16), int(r["image_id"], 16), r["rank"]) for r in rows] == expected
        for row in rows:
            a, b = (run.matrix[int(row[name], 16)].astype(np.float32) for name in ("seed_image_id", "image_id"))
            assert row["similarity"] == pytest.approx(float(a @ b), abs=1e-5)
            assert (row["seed_source"], row["mode"], row["cluster_id"]) == ("large", "sample", None)


@pytest.mark.parametrize("seed", range(3))
def test_cluster_takes_from_clusters_with_enough_seeds(tmp_path: Path, seed: int) -> None:
    run = Run(tmp_path, seed)
    members, seeds_in = run.members(), run.seeds_in("large")
    cosines = {n: -cosine for pairs in members.values() for cosine, n in pairs}
    limits = [(10_000, 1_000_000), (4, 1_000_000), (10_000, 7), (5, 1), (3, 11)]
    for more_than, (per_cluster, cap) in itertools.product((0, 2, 3, 100), limits):
        dataset = {"name": "large", "retrieval": "cluster", "cap": cap}
        config = datasets(dataset, more_than_seeds=more_than, images_per_cluster=per_cluster)
        rows = run.retrieve(config, replace=True)
        chosen = sorted(c for c, count in seeds_in.items() if count > more_than)
        assert chosen or more_than == 100
        takes = cap_evenly([min(len(members[c]), per_cluster) for c in chosen], cap)
        expected = [
            (c, n, rank) for c, take in zip(chosen, takes, strict=True) for rank, (_, n) in enumerate(members[c][:take])
        ]
        assert [(r["cluster_id"], int(r["image_id"], 16), r["rank"]) for r in rows] == expected
        assert {(r["seed_source"], r["seed_image_id"], r["mode"]) for r in rows} <= {("large", None, "cluster")}
        assert len(rows) <= cap
        for row in rows:
            assert row["similarity"] == pytest.approx(cosines[int(row["image_id"], 16)], abs=1e-5)


def test_dataset_of_few_seeds_that_brings_nothing_by_cluster_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    both = [{"name": name, "retrieval": "cluster"} for name in ("large", "small")]
    most = max(run.seeds_in("small").values())
    assert most < max(run.seeds_in("large").values())
    rows = run.retrieve(datasets(*both, more_than_seeds=most))
    assert {row["seed_source"] for row in rows} == {"large"}
    (note,) = require_manifest(run.output).facts["notes"]
    assert note.startswith("Dataset 'small' retrieved nothing by cluster: ")
    assert f"holds more than {most} of its {len(run.seeds['small'])} seeds. Lower retrieve.more_than_seeds" in note
    assert note in capsys.readouterr().err
    run.retrieve(datasets(*both, more_than_seeds=0), replace=True)
    assert require_manifest(run.output).facts["notes"] == [] and "nothing by cluster" not in capsys.readouterr().err


def test_random_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    dataset = {"name": "large", "retrieval": "cluster"}

    def drawn(seed: int, per_cluster: int) -> dict[int, list[str]]:
        config = datasets(dataset, more_than_seeds=0, images_per_cluster=per_cluster, draw="random", seed=seed)
        ids: dict[int, list[str]] = {}
        for row in run.retrieve(config, run.output, replace=True):
            ids.setdefault(row["cluster_id"], []).append(row["image_id"])
        return ids

    small, whole, other = drawn(0, 4), drawn(0, 1000), drawn(1, 4)
    assert small != other
    assert {c: ids[:4] for c, ids in whole.items()} == small, "a larger draw does not begin with the smaller one"
    members = run.members()
    for c, ids in whole.items():
        assert sorted(int(i, 16) for i in ids) == sorted(n for _, n in members[c])
        assert [int(i, 16) for i in ids] != [n for _, n in members[c]] or len(ids) < 3


def test_by_size_chooses_the_mode_by_the_number_of_seeds(tmp_path: Path) -> None:
    run = Run(tmp_path)
    count = len(run.seeds["large"])
    for above, mode in ((count - 1, "sample"), (count, "cluster")):
        rows = run.retrieve(datasets({"name": "large"}, sample_above=above, more_than_seeds=0), replace=True)
        assert {row["mode"] for row in rows} == {mode}


def test_datasets_come_in_order_and_mode_none_gives_no_rows(tmp_path: Path) -> None:
    run = Run(tmp_path)
    config = datasets(
        {"name": "small", "retrieval": "cluster"},
        {"name": "large", "retrieval": "sample", "k": 2},
        more_than_seeds=0,
    )
    rows = run.retrieve(config)
    assert [source for source, _ in Counter(row["seed_source"] for row in rows).items()] == ["small", "large"]
    totals = require_manifest(run.output).totals
    assert totals["seeds:small"] == len(run.seeds["small"]) and totals["seeds:large"] == len(run.seeds["large"])
    assert (
        totals["rows:large"] == 2 * len(run.seeds["large"]) and totals["rows:small"] == len(rows) - totals["rows:large"]
    )
    pool_ids = {id_of(n) for n in run.pool}
    assert {row["image_id"] for row in rows} <= pool_ids
    assert run.retrieve(datasets({"name": "small", "retrieval": "none"}), replace=True) == []
    assert run.retrieve(datasets(), replace=True) == []


def test_same_bytes_twice_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    config = datasets(
        {"name": "large", "retrieval": "sample"}, {"name": "small", "retrieval": "cluster"}, more_than_seeds=0
    )
    run.retrieve(config)
    before = bytes_in(run.output)
    run.retrieve(config)
    run.retrieve(config, str(tmp_path / "other"))
    assert bytes_in(run.output) == before == bytes_in(str(tmp_path / "other"))


def test_dataset_without_images_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ConfigError, match=r"dataset 'lrage' of retrieve has no images"):
        run.retrieve(datasets({"name": "lrage"}))
    assert not Path(run.output).exists()


def test_dataset_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'a'"):
        datasets({"name": "a"}, {"name": "b"}, {"name": "a", "retrieval": "sample"})


# Draws from clusters


def write_clusters(folder: Path, cluster_of: np.ndarray, parents: list[np.ndarray], files: int) -> str:
    """A finished cluster stage of several levels over images 0, 1, ...; some of the similarities are equal."""
    similarity = (np.random.default_rng(len(cluster_of)).integers(0, 4, len(cluster_of)) / 8).astype(np.float32)
    num_clusters = int(max(cluster_of.max(initial=0) + 1, len(parents[0]) if parents else 1))
    shard_records: list[ShardRecord] = []
    order = np.random.default_rng(files).permutation(len(cluster_of))
    for number, rows in enumerate(np.array_split(order, files)):
        levels, level = [cluster_of[rows]], 0
        for level, parent in enumerate(parents):
            levels.append(parent[levels[level]])
        table = pa.table(
            {
                "image_id": [id_of(n) for _ in levels for n in rows.tolist()],
                "level": np.repeat(np.arange(len(levels)), len(rows)).astype(np.int32),
                "cluster_id": np.concatenate(levels).astype(np.int32),
                "similarity": np.tile(similarity[rows], len(levels)),
            },
            schema=schemas.ASSIGNMENTS,
        )
        file = parquet.write_table(f"{folder}/assignments-{number:05d}.parquet", table)
        shard_records.append(ShardRecord(name=f"{number:05d}", files=(file,)))
    arrays = {"centroids-0.npy": unit_vectors(0, num_clusters)}
    arrays |= {f"parents-{level}.npy": parent.astype(np.int64) for level, parent in enumerate(parents)}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        shard_records.append(ShardRecord(name=name, files=(paths.write_bytes(f"{folder}/{name}", buffer.getvalue()),)))
    plan = Plan(stage="cluster", config={}, inputs={}, num_shards=files)
    write_manifest(str(folder), Manifest(plan=plan, shards=tuple(shard_records), totals={}, rejects={}))
    return str(folder)


def read_members(cluster_folder: str) -> dict[int, list[tuple[float, str]]]:
    """The images of each finest cluster, nearest first."""
    members: dict[int, list[tuple[float, str]]] = {}
    for name in require_manifest(cluster_folder).files("assignments"):
        for row in parquet.read_table(f"{cluster_folder}/{name}", schemas.ASSIGNMENTS).to_pylist():
            if row["level"] == 0:
                members.setdefault(row["cluster_id"], []).append((-row["similarity"], row["image_id"]))
    return {number: sorted(images) for number, images in members.items()}


@pytest.mark.parametrize("draw", ["nearest", "random"])
@pytest.mark.parametrize("seed", range(6))
def test_drawn_images_are_the_first_of_each_cluster(tmp_path: Path, seed: int, draw: Any) -> None:
    rng = np.random.default_rng(seed)
    cluster_folder = write_clusters(tmp_path / "few", rng.integers(0, 9, 200), [], files=3)
    members = read_members(cluster_folder)
    sizes = cluster_sizes(cluster_folder, 10)
    assert sizes.tolist() == [len(members.get(c, [])) for c in range(10)]
    counts = rng.integers(0, sizes + 1)
    drawn = retrieve.draw_images(cluster_folder, counts, draw, seed)
    rows = drawn.to_pylist()
    assert [(row["cluster_id"], row["rank"]) for row in rows] == [(c, r) for c in range(10) for r in range(counts[c])]
    for row in rows:
        assert (-row["similarity"], row["image_id"]) in members[row["cluster_id"]]
    assert len({row["image_id"] for row in rows}) == len(rows)
    if draw == "nearest":
        expected = [name for c in range(10) for _, name in members.get(c, [])[: counts[c]]]
        assert [row["image_id"] for row in rows] == expected
    # The first images depend neither on the cut into files nor on the number of images drawn.
    other = write_clusters(tmp_path / "many", np.random.default_rng(seed).integers(0, 9, 200), [], files=17)
    assert retrieve.draw_images(other, counts, draw, seed).equals(drawn)
    whole = retrieve.draw_images(cluster_folder, sizes, draw, seed).to_pylist()
    assert [row for row in whole if row["rank"] < counts[row["cluster_id"]]] == rows


def test_dropping_rows_that_cannot_be_drawn_changes_nothing(tmp_path: Path) -> None:
    num_images = retrieve.GATHERED_ROWS + 50_000  # enough for rows to be dropped
    cluster_of = np.random.default_rng(0).integers(0, 3, num_images)
    cluster_folder = write_clusters(tmp_path, cluster_of, [], files=4)
    rows = retrieve.draw_images(cluster_folder, np.array([5, 0, 7]), "nearest", 0).to_pylist()
    members = read_members(cluster_folder)
    assert [row["image_id"] for row in rows] == [name for c, n in ((0, 5), (2, 7)) for _, name in members[c][:n]]


def test_shuffled_is_even_and_depends_on_seed_and_image() -> None:
    ids = np.array([id_of(n) for n in range(20_000)], "S32")
    values = retrieve.shuffled(ids, 3)
    assert ((values >= 0) & (values < 1)).all() and len(np.unique(values)) == len(ids)
    shares = np.histogram(values, 20, (0, 1))[0] / len(ids)
    np.testing.assert_allclose(shares, 0.05, atol=0.008)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(values, retrieve.shuffled(ids, 4))[0, 1]) < 0.03
    assert retrieve.shuffled(ids[5:6], 3) == values[5], "the value depends on other images"
    assert retrieve.shuffled(ids[:0], 3).shape == (0,)
    np.testing.assert_array_equal(retrieve.shuffled(ids, -1), retrieve.shuffled(ids, 2**64 - 1))
    fixed = np.array([f"{number:032x}" for number in (0, 1, 2**127)], "S32")
    assert retrieve.shuffled(fixed, 3).tolist() == [0.05865357986800668, 0.8755547017368056, 0.29866282784651077]


class Hierarchy:
    """Ingest, dedup and embed of one seed and 90 pool images, and a hand-made cluster stage of three levels."""

    def __init__(self, folder: Path) -> None:
        # Clusters 0 to 4 (top cluster 0) hold common images, cluster 5 (top cluster 1) rare ones; cluster 6 is empty.
        self.cluster_of = np.repeat(np.arange(6), [40, 25, 10, 5, 2, 8])
        self.parents = [np.array([0, 0, 1, 1, 1, 2, 2]), np.array([0, 0, 1])]
        rows = [[image_row(id_of(n), "web", "pool") for n in range(90)], [image_row(id_of(90), "small", "seed")]]
        images = write_ingest(folder / "ingest", rows)
        matrix = unit_vectors(0, 91)
        vectors_of = [{row["image_id"]: matrix[int(row["image_id"], 16)] for row in part} for part in rows]
        embedded = write_vectors(folder / "embed", images, vectors_of)
        clusters = write_clusters(folder / "cluster", self.cluster_of, self.parents, files=4)
        self.stages = (images, write_dedup(folder / "dedup", images), embedded, clusters)
        self.output = str(folder / "retrieve")

    def draw(self, output: str = "", **clustering: Any) -> list[dict[str, Any]]:
        config = RetrieveConfig(clustering=ClusteringConfig(**clustering))
        retrieve.run(config, stages_of(*self.stages), output or self.output, InlineRunner(), replace=True)
        rows: list[dict[str, Any]] = read_retrieved(output or self.output).to_pylist()
        return rows


@pytest.mark.parametrize("num_images", [1, 10, 24, 60, 90, 1000])
def test_draw_by_clustering_is_balanced_over_the_hierarchy(tmp_path: Path, num_images: int) -> None:
    run = Hierarchy(tmp_path)
    rows = run.draw(num_images=num_images, draw="nearest")
    expected = balanced_counts(run.parents, np.array([40, 25, 10, 5, 2, 8, 0]), num_images)
    assert Counter(row["cluster_id"] for row in rows) == {c: n for c, n in enumerate(expected.tolist()) if n}
    assert len(rows) == len({row["image_id"] for row in rows}) == min(num_images, 90)
    assert {(r["mode"], r["seed_source"], r["seed_image_id"]) for r in rows} == {("balanced", None, None)}
    members = read_members(run.stages[3])
    assert [row["image_id"] for row in rows] == [m for c, n in enumerate(expected) for _, m in members.get(c, [])[:n]]
    np.testing.assert_array_equal(np.load(f"{run.output}/balanced.npy", allow_pickle=False), expected)
    assert require_manifest(run.output).totals == {"balanced_rows": len(rows)}


def test_rare_images_are_half_of_the_draw(tmp_path: Path) -> None:
    counts = Counter(row["cluster_id"] for row in Hierarchy(tmp_path).draw(num_images=16))
    assert counts[5] == 8 and sum(counts[c] for c in (0, 1)) == 4


@pytest.mark.parametrize("images_per_shard", [1, 7, 30])
def test_parts_of_a_draw_make_up_the_whole(tmp_path: Path, images_per_shard: int) -> None:
    run = Hierarchy(tmp_path)
    whole = run.draw(num_images=50)
    assert run.draw(f"{tmp_path}/parts", num_images=50, images_per_shard=images_per_shard) == whole
    assert len(require_manifest(f"{tmp_path}/parts").files("retrieved")) == -(-50 // images_per_shard)


def test_draw_over_the_levels_of_a_real_cluster_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.clusters = str(tmp_path / "levels")
    levels = (LevelConfig(num_clusters=12), LevelConfig(num_clusters=3))
    cluster.run(
        ClusterConfig(levels=levels), stages_of(run.images, run.kept, run.vectors), run.clusters, InlineRunner()
    )
    rows = run.retrieve(RetrieveConfig(clustering=ClusteringConfig(num_images=40)))
    members = read_members(run.clusters)
    sizes = np.array([len(members.get(c, [])) for c in range(12)])
    expected = balanced_counts([read_parents(run.clusters, 0)], sizes, 40)
    assert np.bincount([row["cluster_id"] for row in rows], minlength=12).tolist() == expected.tolist()
    assert expected.tolist() != balanced_counts([], sizes, 40).tolist(), "the upper level makes no difference"


def test_the_balanced_draw_follows_the_datasets(tmp_path: Path) -> None:
    run = Hierarchy(tmp_path)
    config = datasets(
        {"name": "small", "retrieval": "sample", "k": 3}, clustering=ClusteringConfig(num_images=5, draw="random")
    )
    retrieve.run(config, stages_of(*run.stages), run.output, InlineRunner())
    rows = read_retrieved(run.output).to_pylist()
    assert [(row["mode"], row["seed_source"]) for row in rows] == [("sample", "small")] * 3 + [("balanced", None)] * 5


def test_same_bytes_inline_and_on_ray(tmp_path: Path, ray_runner: RayRunner) -> None:
    run = Run(tmp_path)
    config = datasets(
        {"name": "large", "retrieval": "sample"},
        {"name": "small", "retrieval": "cluster"},
        more_than_seeds=0,
        draw="random",
        clustering=ClusteringConfig(num_images=30),
    )
    rows = run.retrieve(config)
    assert Counter(row["mode"] for row in rows).keys() == {"sample", "cluster", "balanced"}
    stages = stages_of(run.images, run.kept, run.vectors, run.clusters)
    retrieve.run(config, stages, str(tmp_path / "ray"), ray_runner)
    assert bytes_in(str(tmp_path / "ray")) == bytes_in(run.output)


# nearest, on arrays


def test_nearest_without_seeds_or_pool_is_empty() -> None:
    seeds = unit_vectors(0, 2)
    assert retrieve.nearest(["a", "b"], seeds, [], 3).num_rows == 0
    assert retrieve.nearest(["a", "b"], seeds, [([], seeds[:0])], 3).num_rows == 0
    assert retrieve.nearest([], seeds[:0], [(["x"], seeds[:1])], 3).num_rows == 0


def test_widths_that_differ_are_refused() -> None:
    with pytest.raises(InputError, match="seeds have width 8, the pool 9"):
        retrieve.nearest(["a"], unit_vectors(0, 1), [(["x"], unit_vectors(0, 1, 9))], 1)


# Alone, on any vectors


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "curation.retrieve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def check_alone(
    path: Path, seed_ids: list[str], seeds: np.ndarray, pool_ids: list[str], pool: np.ndarray, k: int
) -> None:
    cosine = seeds.astype(np.float64) @ pool.astype(np.float64).T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    table = pq.read_table(path).to_pylist()
    assert [(row["seed_image_id"], row["image_id"], row["rank"]) for row in table] == [
        (seed_ids[s], pool_ids[p], rank) for s in range(len(seeds)) for rank, p in enumerate(order[s])
    ]
    np.testing.assert_allclose(
        [row["similarity"] for row in table], np.take_along_axis(cosine, order, axis=1).reshape(-1), atol=1e-3
    )


def test_alone_on_matrices(tmp_path: Path) -> None:
    seeds, pool = unit_vectors(0, 5, 16), unit_vectors(1, 50, 16)
    np.save(tmp_path / "A.npy", seeds)
    np.save(tmp_path / "B.npy", (pool * 3).astype(np.float64))
    path = tmp_path / "deep" / "out.parquet"
    done = alone("--seeds", f"{tmp_path}/A.npy", "--pool", f"{tmp_path}/B.npy", "--k", "4", "--output", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"20 rows: the 4 nearest of the pool for each of 5 seeds, in {path}\n"
    check_alone(path, [str(n) for n in range(5)], seeds, [str(n) for n in range(50)], pool, 4)


def test_alone_on_folders_of_parquet(tmp_path: Path) -> None:
    seeds, pool = unit_vectors(0, 5, 16), unit_vectors(1, 50, 16)
    seed_ids, pool_ids = [f"s{n}" for n in range(5)], [id_of(n) for n in range(50)]
    parquet.write_table(f"{tmp_path}/A.parquet", vectors.make_table(seed_ids, seeds))
    for name, part in (("1", slice(0, 20)), ("2", slice(20, 20)), ("3", slice(20, 50))):
        parquet.write_table(f"{tmp_path}/B/{name}.parquet", vectors.make_table(pool_ids[part], pool[part]))
    path = tmp_path / "out.parquet"
    retrieve.command_line(str(path), seeds=f"{tmp_path}/A.parquet", pool=f"{tmp_path}/B", k=60)
    check_alone(path, seed_ids, seeds.astype(np.float16), pool_ids, pool.astype(np.float16), 50)
    columns = [name for name in schemas.RETRIEVED.names if name in pq.read_schema(path).names]
    assert set(columns) == {"seed_image_id", "image_id", "rank", "similarity"}
    assert all(pq.read_schema(path).field(name) == schemas.RETRIEVED.field(name) for name in columns)


def alone_here(folder: Path, of_seeds: np.ndarray, of_pool: np.ndarray, **options: Any) -> pa.Table:
    """The file that the command writes alone for two matrices."""
    for name, matrix in (("A", of_seeds), ("B", of_pool)):
        np.save(folder / f"{name}.npy", matrix)
    arguments = {"seeds": f"{folder}/A.npy", "pool": f"{folder}/B.npy", "output": f"{folder}/out.parquet"}
    retrieve.command_line(**arguments | options)
    return pq.read_table(folder / "out.parquet")


def test_alone_is_exact_in_the_precision_that_was_given(tmp_path: Path) -> None:
    """Vectors so near to each other that float16 cannot order them."""
    rng = np.random.default_rng(0)
    seeds = unit_vectors(0, 10, 32)
    pool = np.repeat(seeds, 20, axis=0) + rng.normal(size=(200, 32)).astype(np.float32) * 1e-2
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    alone_here(tmp_path, seeds, pool)
    numbers = [str(n) for n in range(200)]
    check_alone(tmp_path / "out.parquet", numbers[:10], seeds, numbers, pool, 4)


def test_alone_writes_no_cosine_beyond_1(tmp_path: Path) -> None:
    unit = unit_vectors(0, 200, 64).astype(np.float16)
    lengths = np.linalg.norm(unit.astype(np.float64), axis=1)
    assert lengths.max() > 1.0001
    similarity = alone_here(tmp_path, unit, unit, k=1)["similarity"].to_numpy()
    assert similarity.max() == 1


def test_alone_does_not_overwrite_another_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds, pool = unit_vectors(0, 5, 16), unit_vectors(1, 50, 16)
    assert alone_here(tmp_path, seeds, pool).num_rows == 20
    written = (tmp_path / "out.parquet").stat().st_mtime_ns
    capsys.readouterr()
    alone_here(tmp_path, seeds, pool)
    assert "already done, nothing to do" in capsys.readouterr().out
    for options, message in (({"k": 5}, r"k differ \(k is 4 there, 5 now\)"), ({"pool": f"{tmp_path}/A.npy"}, "pool")):
        with pytest.raises(OutputMismatchError, match=rf"out\.parquet' exists.*{message}.*--replace"):
            alone_here(tmp_path, seeds, pool, **options)
    with pytest.raises(OutputMismatchError, match="pool differ"):
        alone_here(tmp_path, seeds, -pool)
    assert (tmp_path / "out.parquet").stat().st_mtime_ns == written
    assert alone_here(tmp_path, seeds, pool, k=5, replace=True).num_rows == 25
    (tmp_path / "out.parquet").write_bytes(b"notes of a user")
    with pytest.raises(OutputMismatchError, match="another result"):
        alone_here(tmp_path, seeds, pool)


def test_alone_never_overwrites_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = vectors.make_table(["a", "b"], unit_vectors(0, 2, 16))
    parquet.write_table("p.parquet", table)
    parquet.write_table("folder/q.parquet", table)
    Path("link.parquet").symlink_to("p.parquet")
    Path("place").symlink_to(".")
    before = Path("p.parquet").read_bytes()
    for output in (
        "p.parquet",
        "./folder/../p.parquet",
        "link.parquet",
        "place/p.parquet",
        f"file://{tmp_path}/p.parquet",
    ):
        with pytest.raises(InputError, match=r"is the input 'p\.parquet', which would be lost"):
            retrieve.command_line(output, seeds="folder", pool="p.parquet", replace=True)
    with pytest.raises(InputError, match="lies below the input 'folder'"):
        retrieve.command_line("folder/out.parquet", seeds="folder", pool="p.parquet")
    assert Path("p.parquet").read_bytes() == before


def test_alone_reports_an_error_once_and_leaves_no_file(tmp_path: Path) -> None:
    np.save(tmp_path / "A.npy", unit_vectors(0, 5, 16))
    (tmp_path / "B.npy").write_bytes(b"\x93NUMPY")
    output = ("--output", f"{tmp_path}/out.parquet")
    done = alone("--seeds", f"{tmp_path}/A.npy", "--pool", f"{tmp_path}/B.npy", *output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/B.npy: not a readable .npy matrix")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A.npy", "B.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"Give --seeds and --pool"),
        ({"seeds": "A.npy"}, r"Give --seeds and --pool"),
        ({"seeds": "A.npy", "pool": "nothing"}, r"No file or folder at 'nothing'"),
        ({"seeds": "nothing", "pool": "A.npy"}, r"No file or folder at 'nothing'"),
        ({"seeds": "A.npy", "pool": "empty"}, r"'empty' holds no vectors"),
        ({"seeds": "A.npy", "pool": "wide.npy"}, r"seeds have width 16, the pool 17"),
        ({"seeds": "A.npy", "pool": "zero.npy"}, r"zero\.npy: the vector of image '1' is zero"),
        ({"seeds": "nan.npy", "pool": "A.npy"}, r"nan\.npy: the vector of image '2' is zero or not finite"),
        ({"seeds": "A.npy", "pool": "A.npy", "output": "out"}, r"--output out: .*ends in \.parquet"),
        ({"seeds": "A.npy", "pool": "A.npy", "config": "run.toml"}, r"--seeds .*--config"),
        ({"seeds": "A.npy", "pool": "A.npy", "plan": True}, r"--plan"),
        ({"config": "run.toml"}, r"With --config, also give --images, --dedup, --vectors and --clusters"),
    ],
)
def test_wrong_inputs_alone_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("A.npy", unit_vectors(0, 3, 16))
    np.save("wide.npy", unit_vectors(0, 3, 17))
    np.save("zero.npy", np.stack([np.ones(16), np.zeros(16)]))
    np.save("nan.npy", np.stack([np.ones(16), np.ones(16), np.full(16, np.nan)]))
    Path("empty").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((ConfigError, InputError), match=message):
        retrieve.command_line(**{"output": "out.parquet"} | arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
