"""Retrieve: the pool images that resemble the seeds (DINOv2, section 3 and appendix A.4).

    retrieve/
      retrieved-00000.parquet  ...     records.RETRIEVED
      manifest.json

By `sample`: the `k` pool images nearest to each seed image. By `cluster`: from every cluster with more than
`more_than_seeds` seed images of a dataset, up to `images_per_cluster` pool images, and at most `cap` per dataset,
taken as evenly from its clusters as their sizes allow. A small dataset is better served by clusters: its few seed
images stand for more of the pool than their nearest neighbours.

In a pipeline this is a stage. Alone it works on anyone's vectors:

    python -m curation.retrieve --seeds A --pool B --k 4 --output retrieved.parquet

where A and B are folders or files of Parquet (`image_id`, `vector`), or `.npy` matrices (ids are then row numbers).
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from pydantic import Field, field_validator

from curation import command, index, records, storage, vectors
from curation.balance import cap_evenly
from curation.cluster import assign, read_centroids
from curation.config import Settings, load, resolved_toml
from curation.dedup import KeptShard, kept_shards, read_kept
from curation.errors import ConfigError, InputError
from curation.runner import Runner, Shard
from curation.stage import run_shards
from curation.storage import Manifest, ShardRecord


class DatasetConfig(Settings):
    """What one seed dataset brings into the corpus."""

    name: str
    """A source with role `seed`."""
    as_is: bool = False
    """Whether the seed images themselves are packed."""
    retrieval: Literal["sample", "cluster", "by_size", "none"] = "by_size"
    """How the pool is searched; `by_size` is `sample` above `sample_above` seed images, else `cluster`."""
    k: int = Field(default=4, ge=1)
    """By sample: pool images per seed image (4 and 32 in DINOv2)."""
    cap: int = Field(default=1_000_000, ge=1)
    """By cluster: the most images that the dataset brings (1 million in DINOv2)."""


class RetrieveConfig(Settings):
    """How each seed dataset searches the pool."""

    datasets: tuple[DatasetConfig, ...] = ()
    """The seed datasets."""
    sample_above: int = Field(default=1_000_000, ge=0)
    """Seed images above which `by_size` means `sample` (1 million in DINOv2)."""
    more_than_seeds: int = Field(default=3, ge=0)
    """A cluster counts for a dataset when it holds more than so many of its seed images (3 in DINOv2)."""
    images_per_cluster: int = Field(default=10_000, ge=1)
    """Pool images taken from each such cluster at most (10,000 in DINOv2)."""
    draw: Literal["nearest", "random"] = "nearest"
    """Which images of a cluster come first: those nearest to its centroid, or any. DINOv2 does not state its choice."""
    seed: int = 0
    """Of the random draw."""

    @field_validator("datasets")
    @classmethod
    def _names_are_unique(cls, value: tuple[DatasetConfig, ...]) -> tuple[DatasetConfig, ...]:
        names = [dataset.name for dataset in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two datasets have the name {', '.join(map(repr, twice))}; a source may be named once")
        return value


def run(
    config: RetrieveConfig,
    images: str,
    deduplicated: str,
    embedded: str,
    clustered: str,
    output: str,
    runner: Runner,
    *,
    replace: bool = False,
) -> Manifest:
    """Retrieve for every seed dataset; returns the manifest. A dataset may be a source's name only once."""
    everything = kept_shards(images, deduplicated, embedded)
    shards: list[Shard] = []
    for dataset in config.datasets:
        own = [shard for shard in everything if _source_of(shard) == dataset.name]
        if not own:
            raise ConfigError(f"dataset '{dataset.name}' of retrieve has no images: no source of that name has any.")
        match _mode(config, dataset, own):
            case "sample":
                shards += [Shard(f"{len(shards) + n:05d}", (dataset, "sample", (s,))) for n, s in enumerate(own)]
            case "cluster":
                shards.append(Shard(f"{len(shards):05d}", (dataset, "cluster", tuple(own))))
            case "none":
                pass
    return run_shards(
        "retrieve",
        config=config,
        inputs={
            name: storage.require_manifest(folder).content_hash
            for name, folder in (
                ("images", images),
                ("dedup", deduplicated),
                ("vectors", embedded),
                ("clusters", clustered),
            )
        },
        output=output,
        runner=runner,
        shards=shards,
        make_worker=functools.partial(make_worker, config, everything, clustered, output),
        replace=replace,
        unit="rows",
    )


def make_worker(
    config: RetrieveConfig, pool: list[KeptShard], clustered: str, output: str
) -> Callable[[Shard], ShardRecord]:
    """A worker that retrieves for some seeds of one dataset after another."""

    def process(shard: Shard) -> ShardRecord:
        dataset, mode, seed_shards = shard.work
        seeds = [read_kept(part, role="seed", source=dataset.name) for part in seed_shards]
        seed_ids = [image_id for ids, _ in seeds for image_id in ids]
        matrix = np.concatenate([matrix for _, matrix in seeds])
        if mode == "sample":
            table = _by_sample(dataset, seed_ids, matrix, pool)
        else:
            table = _by_cluster(config, dataset, matrix, clustered)
        file = storage.write_table(storage.join(output, f"retrieved-{shard.name}.parquet"), table)
        totals = {f"seeds:{dataset.name}": len(seed_ids), f"rows:{dataset.name}": table.num_rows}
        return ShardRecord(name=shard.name, files=(file,), totals=totals)

    return process


def read_retrieved(folder: str) -> pa.Table:
    """All rows of a finished retrieve, dataset by dataset."""
    manifest = storage.require_manifest(folder)
    names = manifest.files("retrieved")
    tables = [storage.read_table(storage.join(folder, name), records.RETRIEVED) for name in names]
    return pa.concat_tables([records.RETRIEVED.empty_table(), *tables])


def nearest(seed_ids: list[str], seeds: np.ndarray, pool: Iterable[tuple[list[str], np.ndarray]], k: int) -> pa.Table:
    """The `k` pool images nearest to each seed: columns seed_image_id, image_id, rank, similarity, in that order.

    `seeds` is (N, D); `pool` gives ids and vectors block by block and is read once.
    """
    pool_ids: list[str] = []

    def blocks() -> Iterator[np.ndarray]:
        for ids, matrix in pool:
            if matrix.shape[1] != seeds.shape[1]:
                raise InputError(f"seeds have width {seeds.shape[1]}, the pool {matrix.shape[1]}: not of one model.")
            pool_ids.extend(ids)
            yield matrix

    similarity, row = index.search(seeds, blocks(), k)
    found = row >= 0
    seed, rank = np.nonzero(found)
    return pa.table(
        {
            "seed_image_id": pa.array([seed_ids[index] for index in seed], pa.string()),
            "image_id": pa.array([pool_ids[index] for index in row[found]], pa.string()),
            "rank": pa.array(rank, pa.int32()),
            "similarity": pa.array(similarity[found], pa.float32()),
        }
    )


def _source_of(shard: KeptShard) -> str | None:
    """The source of a shard's images; a shard has one. None when all of its images were rejected."""
    column = storage.read_table(shard.images, records.IMAGES, ["source"]).column("source")
    return str(column[0]) if len(column) else None


def _mode(config: RetrieveConfig, dataset: DatasetConfig, own: list[KeptShard]) -> str:
    if dataset.retrieval != "by_size":
        return dataset.retrieval
    count = sum(len(read_kept(shard, role="seed", source=dataset.name)[0]) for shard in own)
    return "sample" if count > config.sample_above else "cluster"


def _by_sample(dataset: DatasetConfig, seed_ids: list[str], matrix: np.ndarray, pool: list[KeptShard]) -> pa.Table:
    found = nearest(seed_ids, matrix, (read_kept(shard, role="pool") for shard in pool), dataset.k)
    count = found.num_rows
    return pa.table(
        {
            "image_id": found["image_id"],
            "seed_source": [dataset.name] * count,
            "seed_image_id": found["seed_image_id"],
            "mode": ["sample"] * count,
            "rank": found["rank"],
            "similarity": found["similarity"],
            "cluster_id": pa.nulls(count, pa.int32()),
        },
        schema=records.RETRIEVED,
    )


def _by_cluster(config: RetrieveConfig, dataset: DatasetConfig, seeds: np.ndarray, clustered: str) -> pa.Table:
    centroids = read_centroids(clustered)
    seeds_in = np.bincount(assign(seeds, centroids)[0], minlength=len(centroids))
    chosen = np.flatnonzero(seeds_in > config.more_than_seeds)
    members: dict[int, list[tuple[float, str, float]]] = {int(cluster): [] for cluster in chosen}
    for name in storage.require_manifest(clustered).files("assignments"):
        table = storage.read_table(storage.join(clustered, name), records.ASSIGNMENTS)
        table = table.filter(pc.equal(table["level"], 0))
        for row in table.filter(pc.is_in(table["cluster_id"], pa.array(chosen, pa.int32()))).to_pylist():
            order = -row["similarity"] if config.draw == "nearest" else _shuffled(config.seed, row["image_id"])
            members[row["cluster_id"]].append((order, row["image_id"], row["similarity"]))
    sizes = [min(len(members[int(cluster)]), config.images_per_cluster) for cluster in chosen]
    rows = [
        {
            "image_id": image_id,
            "seed_source": dataset.name,
            "seed_image_id": None,
            "mode": "cluster",
            "rank": rank,
            "similarity": similarity,
            "cluster_id": int(cluster),
        }
        for cluster, take in zip(chosen, cap_evenly(sizes, dataset.cap), strict=True)
        for rank, (_, image_id, similarity) in enumerate(sorted(members[int(cluster)])[:take])
    ]
    return pa.Table.from_pylist(rows, schema=records.RETRIEVED)


def _shuffled(seed: int, image_id: str) -> float:
    """A number in [0, 1) that depends on the seed and the image alone, so that no worker's state matters."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:7], "big") / 2**56


def command_line(
    output: command.OutputOption,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Alone: vectors that ask.")] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="Alone: vectors that are searched.")] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Alone: pool images per seed image.")] = 4,
    config: Annotated[str | None, typer.Option("--config", help="TOML file; its section [retrieve] is read.")] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder of the finished ingest.")] = None,
    deduplicated: Annotated[str | None, typer.Option("--dedup", help="Folder of the finished dedup.")] = None,
    embedded: Annotated[str | None, typer.Option("--vectors", help="Folder of the finished embed.")] = None,
    clustered: Annotated[str | None, typer.Option("--clusters", help="Folder of the finished cluster.")] = None,
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Retrieve from a pool what resembles the seeds: as a stage with --config, or alone with --seeds and --pool."""
    if config is None:
        if seeds is None or pool is None:
            raise ConfigError("Give --seeds and --pool (folders or files of vectors), or --config and a run's folders.")
        if plan or replace or overrides:
            raise ConfigError("--plan, --replace and --set go with --config; --seeds and --pool work without.")
        if not output.endswith(".parquet"):
            raise ConfigError(f"--output {output}: alone, retrieve writes one file; give a name that ends in .parquet.")
        _retrieve_alone(seeds, pool, k, output)
        return
    if seeds is not None or pool is not None:
        raise ConfigError("--seeds and --pool are for work without --config. Leave out the one or the other.")
    if images is None or deduplicated is None or embedded is None or clustered is None:
        raise ConfigError("With --config, also give --images, --dedup, --vectors and --clusters.")
    settings = load(RetrieveConfig, config, overrides or (), section="retrieve")
    if plan:
        print(resolved_toml(settings), end="")
        return
    with command.open_runner(runner, workers) as chosen:
        run(settings, images, deduplicated, embedded, clustered, output, chosen, replace=replace)


def _retrieve_alone(seeds: str, pool: str, k: int, output: str) -> None:
    parts = list(vectors.read_all(seeds))
    seed_ids = [image_id for ids, _ in parts for image_id in ids]
    table = nearest(seed_ids, np.concatenate([matrix for _, matrix in parts]), vectors.read_all(pool), k)
    storage.write_table(output, table)
    print(f"{table.num_rows:,} rows: the {k} nearest of the pool for each of {len(seed_ids):,} seeds, in {output}")


if __name__ == "__main__":
    from curation import retrieve  # by its real name, or its classes would exist twice

    command.main(retrieve.command_line)
