"""Retrieve: the pool images that resemble the seeds (DINOv2, section 3 and appendix A.4).

    retrieve/
      retrieved-00000.parquet  ...     records.RETRIEVED
      balanced.npy                     with `clustering`: how many images are drawn from each cluster, (K_0,) int64
      manifest.json                    its facts hold the recall of the search

By `sample`: the `k` pool images nearest to each seed image. By `cluster`: from every cluster with more than
`more_than_seeds` seed images of a dataset, up to `images_per_cluster` pool images, and at most `cap` per dataset,
taken as evenly from its clusters as their sizes allow. A small dataset is better served by clusters: its few seed
images stand for more of the pool than their nearest neighbours.

The search by sample goes over parts of the pool, one a worker (parts.py), and its results are merged, ties by
image_id. With `search.backend = "ivf"` its recall is measured on a sample of seeds in every run.

With `clustering`, images are also drawn from the whole pool, whatever the seeds: by hierarchical balanced sampling over
the levels of the cluster stage (see balance.balanced_counts), so that what is rare in the pool is not drowned by what
is common ("Automatic Data Curation", arXiv 2405.15613; a part of DINOv3's corpus).

Memory: drawing from clusters streams the assignments and holds at most twice as many rows as are drawn, 220 bytes for
each that is drawn (measured 2026-11-21), besides one file of assignments and 8 bytes a cluster. A draw by `clustering`
is cut into shards of clusters, each of which reads all assignments.

In a pipeline this is a stage. Alone it works on anyone's vectors:

    python -m curation.retrieve --seeds A --pool B --k 4 --output retrieved.parquet

where A and B are folders or files of Parquet (`image_id`, `vector`), or `.npy` matrices (ids are then row numbers).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from pydantic import Field, field_validator

from curation.config import Settings, load
from curation.engine import command
from curation.engine.manifest import Manifest, ShardRecord, require_manifest, step_folder
from curation.engine.run_log import RunLog
from curation.engine.runner import Runner, Shard
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import ConfigError, InputError
from curation.files import npy, parquet, paths, schemas, vectors
from curation.files.hashes import split_mix
from curation.files.image_ids import id_bytes, id_column
from curation.files.paths import FileRecord
from curation.files.prefetch import prefetch
from curation.quotas import balanced_counts, cluster_counts
from curation.retrieval_modes import Mode, Retrieval, mode_of
from curation.run_folder import (
    KeptShard,
    RunFolder,
    cluster_sizes,
    kept_shards,
    read_assignments,
    read_centroids,
    read_kept,
    read_parents,
    read_vectors,
)
from curation.search import exact
from curation.search.config import RECALL_QUERIES, SearchConfig
from curation.search.parts import NEIGHBORS, PartSearch, count_hits, merge_parts, neighbor_table
from curation.search.top_k import rank_in_groups, top_k_of_groups

BALANCED_NAME = "balanced.npy"
# Seed images that ask at a time: 84 MB as float16 at 1,280 dimensions, and twice that as float32. Assumed.
QUERY_ROWS = 32_768
# Rows that are gathered, at the least, before those that cannot be drawn any more are dropped. Assumed: 12 MB.
GATHERED_ROWS = 250_000


class DatasetConfig(Settings):
    """What one seed dataset brings into the corpus."""

    name: str
    """A source with role `seed`."""
    as_is: bool = False
    """Whether the seed images themselves are packed."""
    retrieval: Retrieval = "by_size"
    """How the pool is searched; `by_size` is `sample` above `sample_above` seed images, else `cluster`."""
    k: int = Field(default=4, ge=1)
    """By sample: pool images per seed image (4 and 32 in DINOv2)."""
    cap: int = Field(default=1_000_000, ge=1)
    """By cluster: the most images that the dataset brings (1 million in DINOv2)."""


class ClusteringConfig(Settings):
    """What is drawn from the whole pool, whatever the seeds, evenly over its clusters."""

    num_images: int = Field(ge=1)
    """Images to draw; all of the kept pool when it holds fewer (1.7 billion of some 17 billion in DINOv3)."""
    draw: Literal["random", "nearest"] = "random"
    """Which images of a cluster come first: any, or those nearest to its centroid."""
    images_per_shard: int = Field(default=4_000_000, ge=1)
    """Images after which another shard begins, at the next cluster. A shard holds 220 bytes for each, and reads all
    assignments once."""


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
    search: SearchConfig = SearchConfig()
    """How the nearest of the pool are searched."""
    clustering: ClusteringConfig | None = None
    """What is drawn besides, by hierarchical balanced sampling; nothing when the section is left out."""
    seed: int = 0
    """Of the random draws."""

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
    inputs: RunFolder,
    output: str,
    runner: Runner,
    *,
    replace: bool = False,
    log: RunLog | None = None,
) -> Manifest:
    """Retrieve for every seed dataset; returns the manifest. Its facts are `search` and `datasets`."""
    everything = kept_shards(inputs)
    clustered = inputs.cluster
    sources = [_source_of(shard) for shard in everything]
    shards: list[Shard] = []
    asking: list[_Asking] = []
    for dataset in config.datasets:
        own = [shard for shard, source in zip(everything, sources, strict=True) if source == dataset.name]
        if not own:
            raise ConfigError(f"dataset '{dataset.name}' of retrieve has no images: no source of that name has any.")
        match _mode(config, dataset, own):
            case "sample":
                for shard in own:
                    shards.append(Shard(f"{len(shards):05d}", (dataset, "sample", len(asking))))
                    asking.append(_Asking(shard, dataset.name, dataset.k))
            case "cluster":
                shards.append(Shard(f"{len(shards):05d}", (dataset, "cluster", tuple(own))))
            case "none":
                pass
    if config.clustering is not None:
        num_parts = -(-config.clustering.num_images // config.clustering.images_per_shard)
        shards += [Shard(f"{len(shards) + n:05d}", (None, "balanced", n)) for n in range(num_parts)]
    hashes = {
        name: require_manifest(folder).content_hash
        for name, folder in (
            ("images", inputs.ingest),
            ("dedup", inputs.dedup),
            ("vectors", inputs.embed),
            ("clusters", inputs.cluster),
        )
    }
    found = step_folder(output, "search")

    def prepare() -> ShardRecord:
        if asking:
            search = Stage(
                name="search",
                config=config,
                inputs=hashes,
                output=found,
                shards=_pool_parts(everything, config.search.rows_per_part),
                make_worker=functools.partial(_make_search_worker, config.search, asking, found),
                finish=functools.partial(_measure_recall, config.search, asking, found),
            )
            run_stage(search, runner, log=log)
        counts = () if config.clustering is None else (_balance(config.clustering, clustered, output),)
        return ShardRecord(name=PREPARED, files=counts)

    def finish(done: Sequence[ShardRecord]) -> tuple[dict[str, Any], None]:
        return ({"search": require_manifest(found).facts} if asking else {}), None

    stage = Stage(
        name="retrieve",
        config=config,
        inputs=hashes,
        output=output,
        shards=shards,
        make_worker=functools.partial(make_worker, config, asking, found, clustered, output),
        prepare=prepare,
        finish=finish,
        facts=config.model_dump(mode="json", include={"datasets"}),
        unit="rows",
    )
    manifest = run_stage(stage, runner, replace=replace, log=log)
    config.search.require_recall(manifest.facts.get("search", {}))  # min_recall may have been raised since
    return manifest


@dataclass(frozen=True)
class _Asking:
    """The seeds of one shard of ingest that search by sample."""

    shard: KeptShard
    source: str
    k: int

    def read(self) -> tuple[list[str], np.ndarray]:
        return read_kept(self.shard, role="seed", source=self.source)


def make_worker(
    config: RetrieveConfig, asking: Sequence[_Asking], found: str, clustered: str, output: str
) -> Callable[[Shard], ShardRecord]:
    """A worker that retrieves for some seeds of one dataset after another."""

    def process(shard: Shard) -> ShardRecord:
        dataset, mode, what = shard.work
        match mode:
            case "balanced":
                table = _by_balance(config, clustered, output, part=what)
                totals = {"balanced_rows": table.num_rows}
            case "sample":
                seed_ids = asking[what].read()[0]
                names = require_manifest(found).files("found")
                table = _by_sample(dataset, seed_ids, _merged(found, names, what, dataset.k))
                totals = {f"seeds:{dataset.name}": len(seed_ids), f"rows:{dataset.name}": table.num_rows}
            case _:
                seeds = np.concatenate([read_kept(part, role="seed", source=dataset.name)[1] for part in what])
                table = _by_cluster(config, dataset, seeds, clustered)
                totals = {f"seeds:{dataset.name}": len(seeds), f"rows:{dataset.name}": table.num_rows}
        file = parquet.write_table(paths.join(output, f"retrieved-{shard.name}.parquet"), table)
        return ShardRecord(name=shard.name, files=(file,), totals=totals)

    return process


def nearest(seed_ids: list[str], seeds: np.ndarray, pool: Iterable[tuple[list[str], np.ndarray]], k: int) -> pa.Table:
    """The `k` pool images nearest to each seed: columns seed_image_id, image_id, rank, similarity, in that order.

    `seeds` is (N, D); `pool` gives ids and vectors block by block and is read once.
    """
    pool_ids: list[str] = []

    def blocks() -> Iterator[np.ndarray]:
        for ids, matrix in pool:
            _check_width(seeds, matrix.shape[1])
            pool_ids.extend(ids)
            yield matrix

    similarity, row = exact.search(seeds, blocks(), k)
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
    column = parquet.read_table(shard.images, schemas.IMAGES, ["source"]).column("source")
    return str(column[0]) if len(column) else None


def _mode(config: RetrieveConfig, dataset: DatasetConfig, own: list[KeptShard]) -> Mode:
    if dataset.retrieval != "by_size":
        return dataset.retrieval
    count = sum(len(read_kept(shard, role="seed", source=dataset.name)[0]) for shard in own)
    return mode_of(dataset.retrieval, count, config.sample_above)


def _pool_parts(everything: Sequence[KeptShard], rows_per_part: int) -> list[Shard]:
    """The shards of ingest in runs of at most `rows_per_part` vectors, or of one shard."""
    parts: list[tuple[list[KeptShard], int]] = []
    for shard in everything:
        num_rows = vectors.num_rows(shard.vectors)
        if not parts or parts[-1][1] + num_rows > rows_per_part:
            parts.append(([], 0))
        parts[-1] = ([*parts[-1][0], shard], parts[-1][1] + num_rows)
    return [Shard(f"{number:05d}", tuple(shards), rows) for number, (shards, rows) in enumerate(parts)]


def _make_search_worker(config: SearchConfig, asking: Sequence[_Asking], output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that searches one part of the pool after another for all that ask.

    Writes NEIGHBORS, one row group for each of `asking`, and with `ivf` the same for a sample of the seeds, searched
    with the index and exactly.
    """

    def process(shard: Shard) -> ShardRecord:
        read = [own for own in prefetch(functools.partial(read_kept, role="pool"), shard.work) if own[0]]
        ids = id_bytes([image_id for own, _ in read for image_id in own])
        part = PartSearch(config, [read.pop(0)[1] for _ in range(len(read))])

        def found() -> Iterator[tuple[int, pa.Table]]:
            for block in _query_blocks(asking):
                queries = np.concatenate([seeds for _, seeds in block])
                k = max(asking[number].k for number, _ in block)
                if part.num_vectors:
                    _check_width(queries, part.width)
                similarity, row = part.search(queries, k)
                starts = np.cumsum([0, *(len(seeds) for _, seeds in block)])
                for (number, _), (start, stop) in zip(block, pairwise(starts.tolist()), strict=True):
                    yield number, neighbor_table(ids, similarity[start:stop], row[start:stop])

        def exact() -> Iterator[tuple[int, pa.Table]]:
            for number, (first, every) in enumerate(_sampled(asking)):
                seeds = asking[number].read()[1]
                rows = np.arange(first, len(seeds), every)
                table = neighbor_table(ids, *part.search_exactly(seeds[rows], asking[number].k))
                yield number, table.set_column(0, "query", pa.array(rows[table["query"].to_numpy()].astype(np.int32)))

        empty = NEIGHBORS.empty_table()
        path = functools.partial(paths.join, output)
        files = [parquet.write_row_groups(path(f"found-{shard.name}.parquet"), "asking", found(), empty)]
        if config.backend == "ivf":
            files.append(parquet.write_row_groups(path(f"exact-{shard.name}.parquet"), "asking", exact(), empty))
        return ShardRecord(name=shard.name, files=tuple(files))

    return process


def _check_width(seeds: np.ndarray, width: int) -> None:
    if width != seeds.shape[1]:
        raise InputError(f"seeds have width {seeds.shape[1]}, the pool {width}: not of one model.")


def _query_blocks(asking: Sequence[_Asking]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """The numbers of those that ask with their seeds (n, D), about QUERY_ROWS seeds at a time."""
    block: list[tuple[int, np.ndarray]] = []
    for number, own in enumerate(asking):
        block.append((number, own.read()[1]))
        if sum(len(seeds) for _, seeds in block) >= QUERY_ROWS or number == len(asking) - 1:
            yield block
            block = []


def _sampled(asking: Sequence[_Asking]) -> list[tuple[int, int]]:
    """For each of those that ask, the first of its seeds that recall is measured on, and the step to the next."""
    counts = [vectors.num_rows(own.shard.vectors) for own in asking]
    every = max(1, sum(counts) // RECALL_QUERIES)
    starts = np.cumsum([0, *counts[:-1]])
    return [(int(-start % every), every) for start in starts]


def _merged(found: str, names: Sequence[str], number: int, k: int) -> pa.Table:
    """NEIGHBORS of one of those that ask, from the files of all parts."""
    files = (paths.join(found, name) for name in names)
    return merge_parts((parquet.read_row_groups(path, "asking", number, NEIGHBORS) for path in files), k)


def _measure_recall(
    config: SearchConfig, asking: Sequence[_Asking], found: str, done: Sequence[ShardRecord]
) -> tuple[dict[str, Any], None]:
    """The share of the true neighbours of the sampled seeds that the search found. Raises ConfigError when too low."""
    if config.backend == "exact":
        return {"backend": "exact", "recall": 1.0}, None
    names = [file.name for record in done for file in record.files]
    by_index, exactly = ([name for name in names if name.startswith(kind)] for kind in ("found-", "exact-"))
    hits = total = 0
    for number, own in enumerate(asking):
        exact = _merged(found, exactly, number, own.k)
        own_hits, own_total = count_hits(_merged(found, by_index, number, own.k), exact)
        hits, total = hits + own_hits, total + own_total
    recall = hits / total if total else None
    facts = {"backend": "ivf", "recall": recall, "recall_neighbors": total}
    config.require_recall(facts)
    return facts, None


def _by_sample(dataset: DatasetConfig, seed_ids: list[str], found: pa.Table) -> pa.Table:
    """Rows of records.RETRIEVED, given the merged neighbours of these seeds."""
    query = found["query"].to_numpy()
    count = found.num_rows
    return pa.table(
        {
            "image_id": found["image_id"],
            "seed_source": pa.repeat(pa.scalar(dataset.name, pa.string()), count),
            "seed_image_id": pa.array(seed_ids, pa.string()).take(pa.array(query)),
            "mode": pa.repeat(pa.scalar("sample", pa.string()), count),
            "rank": rank_in_groups(query).astype(np.int32),
            "similarity": found["similarity"],
            "cluster_id": pa.nulls(count, pa.int32()),
        },
        schema=schemas.RETRIEVED,
    )


def _by_cluster(config: RetrieveConfig, dataset: DatasetConfig, seeds: np.ndarray, clustered: str) -> pa.Table:
    centroids = read_centroids(clustered)
    seeds_in = np.bincount(exact.assign(seeds, centroids)[0], minlength=len(centroids))
    chosen = np.flatnonzero(seeds_in > config.more_than_seeds)
    sizes = cluster_sizes(clustered, len(centroids))
    counts = np.zeros(len(centroids), np.int64)
    counts[chosen] = cluster_counts(sizes[chosen].tolist(), config.images_per_cluster, dataset.cap)
    return _as_retrieved(draw_images(clustered, counts, config.draw, config.seed), "cluster", dataset.name)


def _by_balance(config: RetrieveConfig, clustered: str, output: str, part: int) -> pa.Table:
    """The part of the draw whose clusters begin within its `images_per_shard` images of all that are drawn."""
    assert config.clustering is not None
    counts = npy.read_array(paths.join(output, BALANCED_NAME))
    counts[(np.cumsum(counts) - counts) // config.clustering.images_per_shard != part] = 0
    return _as_retrieved(draw_images(clustered, counts, config.clustering.draw, config.seed), "balanced", None)


def _balance(config: ClusteringConfig, clustered: str, output: str) -> FileRecord:
    """Decide how many images are drawn from each cluster."""
    names = {name for record in require_manifest(clustered).shards for name in (f.name for f in record.files)}
    parents: list[np.ndarray] = []
    while f"parents-{len(parents)}.npy" in names:
        parents.append(read_parents(clustered, len(parents)))
    counts = balanced_counts(parents, cluster_sizes(clustered, len(read_centroids(clustered))), config.num_images)
    return npy.write_arrays(paths.join(output, BALANCED_NAME), counts)


def draw_images(clustered: str, counts: np.ndarray, draw: Literal["random", "nearest"], seed: int) -> pa.Table:
    """`counts[c]` images of each of the finest clusters c: columns image_id, cluster_id, rank, similarity.

    `counts` (K_0,) must not exceed the clusters' sizes. Sorted by cluster, then by rank: nearest to the centroid first,
    or in an order of the seed and the image_ids alone; ties by image_id. Assignments are read one file at a time, and
    rows that can no longer be drawn are dropped whenever as many have gathered as are drawn.
    """
    wanted = pa.array(np.flatnonzero(counts), pa.int32())
    most = max(2 * int(counts.sum()), GATHERED_ROWS)
    gathered, num_rows = [_DRAWN[:0]], 0
    columns = ["image_id", "cluster_id", "similarity"]
    for table in read_assignments(clustered, columns) if len(wanted) else ():
        table = table.filter(pc.is_in(table["cluster_id"], wanted))
        rows = np.empty(table.num_rows, _DRAWN.dtype)
        rows["image_id"] = table["image_id"].to_numpy(zero_copy_only=False)
        rows["cluster_id"], rows["similarity"] = table["cluster_id"].to_numpy(), table["similarity"].to_numpy()
        rows["order"] = -rows["similarity"] if draw == "nearest" else shuffled(rows["image_id"], seed)
        gathered.append(rows)
        num_rows += len(rows)
        if num_rows > most:
            gathered = [_first_of_each(gathered, counts)]
            num_rows = len(gathered[0])
    drawn = _first_of_each(gathered, counts)
    assert len(drawn) == counts.sum(), "counts exceed the clusters' sizes"
    return pa.table(
        {
            "image_id": id_column(drawn["image_id"]),
            "cluster_id": drawn["cluster_id"],
            "rank": rank_in_groups(drawn["cluster_id"]).astype(np.int32),
            "similarity": drawn["similarity"],
        }
    )


# A row that may be drawn. Its order is a float64, which holds the similarities and 53 bits of the shuffle exactly.
_DRAWN = np.empty(
    0, np.dtype([("image_id", "S32"), ("order", np.float64), ("cluster_id", np.int32), ("similarity", np.float32)])
)


def _first_of_each(parts: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Of each cluster c the first `counts[c]` rows, sorted by cluster, order and image_id. Empties `parts`."""
    rows = np.concatenate(parts)
    parts.clear()
    first: np.ndarray = rows[top_k_of_groups(rows["cluster_id"], counts, rows["order"], rows["image_id"])]
    return first


def shuffled(image_ids: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each image_id (N,) of 32 bytes, which depends on it and the seed alone: (N,) float64.

    SplitMix64 over the seed and the four words of the image_id.
    """
    words = np.ascontiguousarray(image_ids).view(">u8").reshape(len(image_ids), 4).astype(np.uint64)
    state = np.full(len(image_ids), seed % 2**64, np.uint64)
    for word in words.T:
        state = split_mix(state ^ word)
    return (state >> np.uint64(11)) * 2.0**-53


def _as_retrieved(drawn: pa.Table, mode: str, seed_source: str | None) -> pa.Table:
    columns = {name: drawn[name] for name in drawn.column_names}
    constant = {"seed_source": seed_source, "seed_image_id": None, "mode": mode}
    columns |= {name: pa.repeat(pa.scalar(value, pa.string()), drawn.num_rows) for name, value in constant.items()}
    return pa.table({name: columns[name] for name in schemas.RETRIEVED.names}, schema=schemas.RETRIEVED)


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
    inputs = RunFolder(ingest=images, dedup=deduplicated, embed=embedded, cluster=clustered)
    command.plan_or_run(
        settings,
        lambda chosen: run(settings, inputs, output, chosen, replace=replace),
        plan=plan,
        runner=runner,
        workers=workers,
        gpus_per_worker=settings.search.num_gpus,
    )


def _retrieve_alone(seeds: str, pool: str, k: int, output: str) -> None:
    parts = list(read_vectors(seeds))
    seed_ids = [image_id for ids, _ in parts for image_id in ids]
    table = nearest(seed_ids, np.concatenate([matrix for _, matrix in parts]), read_vectors(pool), k)
    parquet.write_table(output, table)
    print(f"{table.num_rows:,} rows: the {k} nearest of the pool for each of {len(seed_ids):,} seeds, in {output}")


if __name__ == "__main__":
    from curation import retrieve  # by its real name, or its classes would exist twice

    command.main(retrieve.command_line)
