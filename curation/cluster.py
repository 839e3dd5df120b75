"""Cluster: spherical k-means over the kept pool.

cluster/
  centroids-0.npy                    (clusters, D) float32, unit length
  assignments-00000.parquet  ...     records.ASSIGNMENTS: the kept pool images, shard by shard of ingest
  manifest.json

python -m curation.cluster --config CONFIG.toml --images ingest/ --dedup dedup/ --vectors embed/ --output cluster/
"""

import functools
import io
from collections.abc import Callable
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer
from pydantic import Field

from curation import command, index, records, storage
from curation.config import Settings, load, resolved_toml
from curation.dedup import KeptShard, kept_shards, read_kept
from curation.errors import ConfigError
from curation.runner import Runner, Shard
from curation.stage import PREPARED, run_shards
from curation.storage import Manifest, ShardRecord

CENTROIDS_NAME = "centroids-0.npy"


class ClusterConfig(Settings):
    """How many clusters, and how they are found."""

    num_clusters: int = Field(ge=1)
    """Clusters over the kept pool (100,000 over 744 million images in DINOv2)."""
    num_iterations: int = Field(default=25, ge=1)
    """Rounds of k-means (25 is faiss's default; DINOv2 does not state its number)."""
    max_points_per_centroid: int | None = Field(default=None, ge=1)
    """Train on a seeded sample of so many images per cluster; on all of them when not given."""
    seed: int = 0
    """Of the first centroids and of the sample."""


def run(
    config: ClusterConfig,
    images: str,
    deduplicated: str,
    embedded: str,
    output: str,
    runner: Runner,
    *,
    replace: bool = False,
) -> Manifest:
    """Cluster the kept pool images; returns the manifest. Raises ConfigError for more clusters than images."""
    shards = kept_shards(images, deduplicated, embedded)
    return run_shards(
        "cluster",
        config=config,
        inputs={
            name: storage.require_manifest(folder).content_hash
            for name, folder in (("images", images), ("dedup", deduplicated), ("vectors", embedded))
        },
        output=output,
        runner=runner,
        shards=[Shard(f"{number:05d}", shard) for number, shard in enumerate(shards)],
        make_worker=functools.partial(make_worker, output),
        replace=replace,
        prepare=functools.partial(_train, config, shards, output),
    )


def make_worker(output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that assigns the kept pool images of one shard after another."""
    centroids = read_centroids(output)

    def process(shard: Shard) -> ShardRecord:
        image_ids, matrix = read_kept(shard.work, role="pool")
        cluster, similarity = assign(matrix, centroids)
        table = pa.table(
            {
                "image_id": image_ids,
                "level": np.zeros(len(image_ids), np.int32),
                "cluster_id": cluster.astype(np.int32),
                "similarity": similarity,
            },
            schema=records.ASSIGNMENTS,
        )
        file = storage.write_table(storage.join(output, f"assignments-{shard.name}.parquet"), table)
        return ShardRecord(name=shard.name, files=(file,), totals={"assigned": len(image_ids)})

    return process


def assign(matrix: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each vector and the cosine to it: (N,) int64 and (N,) float32; ties to the first."""
    similarity, cluster = index.search(matrix, [centroids], 1)
    return cluster[:, 0], similarity[:, 0]


def read_centroids(folder: str) -> np.ndarray:
    """The centroids (clusters, D) float32 of a cluster stage."""
    with storage.open_read(storage.join(folder, CENTROIDS_NAME)) as file:
        centroids: np.ndarray = np.load(file, allow_pickle=False)
    return centroids


def _train(config: ClusterConfig, shards: list[KeptShard], output: str) -> ShardRecord:
    matrix = np.concatenate([read_kept(shard, role="pool")[1] for shard in shards])
    if config.num_clusters > len(matrix):
        raise ConfigError(
            f"cluster.num_clusters is {config.num_clusters:,}, but only {len(matrix):,} pool images were kept."
        )
    centroids = index.spherical_kmeans(
        matrix,
        config.num_clusters,
        num_iterations=config.num_iterations,
        seed=config.seed,
        max_points_per_centroid=config.max_points_per_centroid,
    )
    buffer = io.BytesIO()
    np.save(buffer, centroids)
    return ShardRecord(
        name=PREPARED, files=(storage.write_bytes(storage.join(output, CENTROIDS_NAME), buffer.getvalue()),)
    )


def command_line(
    config: command.ConfigOption,
    images: Annotated[str, typer.Option("--images", help="Folder of the finished ingest.")],
    deduplicated: Annotated[str, typer.Option("--dedup", help="Folder of the finished dedup.")],
    embedded: Annotated[str, typer.Option("--vectors", help="Folder of the finished embed.")],
    output: command.OutputOption,
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Cluster the kept pool images."""
    settings = load(ClusterConfig, config, overrides or (), section="cluster")
    if plan:
        print(resolved_toml(settings), end="")
        return
    with command.open_runner(runner, workers) as chosen:
        run(settings, images, deduplicated, embedded, output, chosen, replace=replace)


if __name__ == "__main__":
    from curation import cluster  # by its real name, or its classes would exist twice

    command.main(cluster.command_line)
