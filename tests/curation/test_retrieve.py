"""Retrieval: both ways equal a plain reading of the rules, as a stage and alone."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import cluster, records, retrieve, storage, vectors
from curation.balance import cap_evenly
from curation.cluster import ClusterConfig, LevelConfig
from curation.errors import ConfigError, InputError
from curation.retrieve import DatasetConfig, RetrieveConfig
from curation.runner import InlineRunner
from tests.curation.builders import bytes_in, id_of, image_row, unit_vectors, write_dedup, write_ingest, write_vectors


class Run:
    """Five finished stages over random vectors: seeds of `large` and `small`, a pool; some images are dropped."""

    def __init__(self, folder: Path, seed: int = 0, num_clusters: int = 6) -> None:
        rng = np.random.default_rng(seed)
        self.matrix = unit_vectors(seed, 160).astype(np.float16)
        dropped = set(rng.permutation(160)[:20].tolist())
        places = [("large", "seed", range(0, 12)), ("large", "seed", range(12, 30)), ("small", "seed", range(30, 36))]
        places += [("web", "pool", range(36, 90)), ("web", "pool", range(90, 90)), ("more web", "pool", range(90, 150))]
        places += [("test", "holdout", range(150, 160))]
        rows = [[image_row(id_of(n), source, role) for n in numbers] for source, role, numbers in places]
        self.images = write_ingest(folder / "ingest", rows)
        self.kept = write_dedup(folder / "dedup", self.images, lambda row: int(row["image_id"], 16) not in dropped)
        by_shard = [{id_of(n): self.matrix[n] for n in numbers} for _, _, numbers in places]
        self.vectors = write_vectors(folder / "embed", self.images, by_shard)
        self.clusters = str(folder / "cluster")
        stages = (self.images, self.kept, self.vectors)
        cluster.run(
            ClusterConfig(levels=(LevelConfig(num_clusters=num_clusters),)), *stages, self.clusters, InlineRunner()
        )
        self.output = str(folder / "retrieve")
        self.seeds = {
            source: [n for s, role, numbers in places for n in numbers if s == source and n not in dropped]
            for source in ("large", "small")
        }
        self.pool = [n for n in range(36, 150) if n not in dropped]

    def retrieve(self, config: RetrieveConfig, output: str = "", **more: Any) -> list[dict[str, Any]]:
        stages = (self.images, self.kept, self.vectors, self.clusters)
        retrieve.run(config, *stages, output or self.output, InlineRunner(), **more)
        rows: list[dict[str, Any]] = retrieve.read_retrieved(output or self.output).to_pylist()
        return rows

    def nearest_to(self, seed: int, k: int) -> list[int]:
        cosine = self.matrix[self.pool].astype(np.float64) @ self.matrix[seed].astype(np.float64)
        return [self.pool[i] for i in np.argsort(-cosine, kind="stable")[:k]]

    def members(self) -> dict[int, list[tuple[float, int]]]:
        """The kept pool images of each cluster, nearest first."""
        centroids = cluster.read_centroids(self.clusters)
        cosines = self.matrix[self.pool].astype(np.float32) @ centroids.T
        own = cosines.argmax(axis=1)
        return {
            c: sorted((-cosines[i, c], self.pool[i]) for i in np.flatnonzero(own == c)) for c in range(len(centroids))
        }

    def seeds_in(self, source: str) -> Counter[int]:
        centroids = cluster.read_centroids(self.clusters)
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


def test_random_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    dataset = {"name": "large", "retrieval": "cluster"}

    def drawn(seed: int, per_cluster: int) -> dict[int, list[str]]:
        config = datasets(dataset, more_than_seeds=0, images_per_cluster=per_cluster, draw="random", seed=seed)
        found: dict[int, list[str]] = {}
        for row in run.retrieve(config, run.output, replace=True):
            found.setdefault(row["cluster_id"], []).append(row["image_id"])
        return found

    few, all_of_them, other = drawn(0, 4), drawn(0, 1000), drawn(1, 4)
    assert few != other
    assert {c: ids[:4] for c, ids in all_of_them.items()} == few, "a larger draw begins with the smaller one"
    members = run.members()
    for c, ids in all_of_them.items():
        assert sorted(int(i, 16) for i in ids) == sorted(n for _, n in members[c])
        assert [int(i, 16) for i in ids] != [n for _, n in members[c]] or len(ids) < 3


def test_size_of_a_dataset_decides_the_mode_where_it_may(tmp_path: Path) -> None:
    run = Run(tmp_path)
    count = len(run.seeds["large"])
    for above, mode in ((count - 1, "sample"), (count, "cluster")):
        rows = run.retrieve(datasets({"name": "large"}, sample_above=above, more_than_seeds=0), replace=True)
        assert {row["mode"] for row in rows} == {mode}


def test_datasets_follow_one_another_and_none_means_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    config = datasets(
        {"name": "small", "retrieval": "cluster"},
        {"name": "large", "retrieval": "sample", "k": 2},
        more_than_seeds=0,
    )
    rows = run.retrieve(config)
    assert [source for source, _ in Counter(row["seed_source"] for row in rows).items()] == ["small", "large"]
    totals = storage.require_manifest(run.output).totals
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


# nearest, on arrays


def test_nearest_of_nothing() -> None:
    seeds = unit_vectors(0, 2)
    assert retrieve.nearest(["a", "b"], seeds, [], 3).num_rows == 0
    assert retrieve.nearest(["a", "b"], seeds, [([], seeds[:0])], 3).num_rows == 0
    assert retrieve.nearest([], seeds[:0], [(["x"], seeds[:1])], 3).num_rows == 0


def test_widths_that_differ_are_refused() -> None:
    with pytest.raises(InputError, match="seeds have width 8, the pool 9"):
        retrieve.nearest(["a"], unit_vectors(0, 1), [(["x"], unit_vectors(0, 1, 9))], 1)


# Alone, on anyone's vectors


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "curation.retrieve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def check_alone(
    path: Path, seed_ids: list[str], seeds: np.ndarray, pool_ids: list[str], pool: np.ndarray, k: int
) -> None:
    cosine = seeds.astype(np.float16).astype(np.float64) @ pool.astype(np.float16).astype(np.float64).T
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
    storage.write_table(f"{tmp_path}/A.parquet", vectors.make_table(seed_ids, seeds))
    for name, part in (("1", slice(0, 20)), ("2", slice(20, 20)), ("3", slice(20, 50))):
        storage.write_table(f"{tmp_path}/B/{name}.parquet", vectors.make_table(pool_ids[part], pool[part]))
    path = tmp_path / "out.parquet"
    retrieve.command_line(str(path), seeds=f"{tmp_path}/A.parquet", pool=f"{tmp_path}/B", k=60)
    check_alone(path, seed_ids, seeds, pool_ids, pool, 50)
    columns = [name for name in records.RETRIEVED.names if name in pq.read_schema(path).names]
    assert set(columns) == {"seed_image_id", "image_id", "rank", "similarity"}
    assert all(pq.read_schema(path).field(name) == records.RETRIEVED.field(name) for name in columns)


def test_alone_says_what_is_wrong_once_and_leaves_no_file(tmp_path: Path) -> None:
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
    Path("empty").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((ConfigError, InputError), match=message):
        retrieve.command_line(**{"output": "out.parquet"} | arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
