"""Retrieve: the pool images that resemble the seeds (DINOv2, section 3 and appendix A.4).

    retrieve/
      retrieved-00000.parquet  ...     schemas.RETRIEVED
      balanced.npy                     with `clustering`: the images to draw from each cluster, (K_0,) int64
      copies-00000.parquet             with `check_copies`: schemas.CORPUS_COPIES, the images that were passed over
      manifest.json                    its facts hold the recall of the search, and the counts of the check

Mode `sample` takes the `k` pool images nearest to each seed. Mode `cluster` takes pool images from every cluster with
more than `more_than_seeds` seeds of a dataset. It takes up to `images_per_cluster` images from a cluster and at most
`cap` images per dataset, as evenly as the sizes of the clusters allow. Mode `cluster` suits a small dataset: the
clusters of its few seeds hold more of the pool than their nearest neighbours.

The search by sample goes over parts of the pool, one part per worker (search/parts.py). The results of all parts are
merged, ties by image_id. With `search.backend = "ivf"`, every run measures the recall on a sample of the seeds.

With `clustering`, images are also drawn from the whole pool, independent of the seeds. The draw is hierarchical
balanced sampling over the levels of the cluster stage (see quotas.balanced_counts). It gives rare images of the pool a
larger share ("Automatic Data Curation", arXiv 2405.15613; a part of DINOv3's corpus).

With `check_copies`, the corpus is checked against itself (copies/corpus_check.py). Each seed and each cluster proposes
LOOKS times as many images as it may bring. A proposed image is passed over when it is a copy of an image taken before,
of a packed seed or of a holdout image; then the next in rank takes its place. So the ranks of a seed may have gaps, and
a seed may bring fewer than `k` images. Images that are passed over stay kept. The search by sample looks for LOOKS * k
neighbours, and its recall is that of all of them. Proposed rows count as drawn in the next paragraph.

Memory: drawing from clusters streams the assignments and holds at most twice as many rows as are drawn. This takes 220
bytes per drawn row (measured 2026-11-21), one file of assignments, and 8 bytes per cluster. A draw by `clustering` is
cut into shards of clusters, each of which reads all assignments.

Alone, outside a pipeline, the command works on any vectors:

    python -m curation.retrieve --seeds A --pool B --k 4 --output retrieved.parquet

A and B are folders or files of Parquet (`image_id`, `vector`), or `.npy` matrices (ids are then row numbers, among
several files `file:row`). The search is exact in the precision of the vectors, up to float32. Copies are not passed
over, since that check needs the images: all copies of a picture may be among the `k`. The same command again does
nothing; another search is written to the same file with --replace only.
"""

import functools
import json
import posixpath
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
from curation.copies import corpus_check, holdout_pairs
from curation.copies.corpus_check import LOOKS, Proposals
from curation.engine import command, progress
from curation.engine.manifest import Manifest, ShardRecord, require_manifest, step_folder, sum_counts
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import ConfigError, InputError, OutputMismatchError
from curation.files import npy, parquet, paths, schemas, vectors
from curation.files.hashes import hash_json, sha256_of_file, split_mix
from curation.files.image_ids import id_bytes, id_column, pack_ids
from curation.files.paths import FileRecord
from curation.files.prefetch import prefetch
from curation.quotas import balanced_counts, cluster_counts
from curation.retrieval_modes import Mode, Retrieval, mode_of
from curation.run_folder import (
    KeptShard,
    RunFolder,
    cluster_sizes,
    kept_images,
    kept_inputs,
    kept_shards,
    read_assignments,
    read_centroids,
    read_kept,
    read_parents,
    read_vectors,
    vector_files,
)
from curation.search import exact
from curation.search.config import RECALL_QUERIES, SearchConfig
from curation.search.parts import NEIGHBORS, PartSearch, count_hits, merge_parts, neighbor_table
from curation.search.top_k import rank_in_groups, top_k_of_groups
from curation.stage_command import require_folders

BALANCED_NAME, COPIES_NAME = "balanced.npy", "copies-00000.parquet"
# Proposed rows of the check, each with the number of rows that its seed or cluster may bring.
PROPOSED = schemas.RETRIEVED.append(pa.field("quota", pa.int64()))
# Totals of the check, which become the fact `check`.
CHECK_TOTALS = (
    "check_images",  # compared with others: retrieved, passed over, or a packed seed
    "check_pairs",  # compared here; other pairs have a score of the stage `pairs`
    "corpus_copies",  # images that were passed over
    "missing_rows",  # rows fewer than without the check
    "retrieved_copies",  # retrieved images that are copies of another image of the corpus
    "seed_copies",  # packed seeds that are copies of another packed seed: seeds are trusted, and none is left out
    "holdout_copies",  # images of the corpus that are copies of a holdout image
)
# Settings of the comparison that the fact `check` holds too, beside the sources of `lookalikes`.
CHECK_SETTINGS = ("min_cosine", "threshold", "holdout_threshold", "label_guard")
# Column of the search's files that holds the number of a query shard.
QUERY_SHARD_COLUMN = "asking"
# Key of the Parquet metadata of the file that the command writes alone: k, and hashes of the seeds and the pool.
ORIGIN_KEY = "seedbed.retrieve"
# Seeds that are searched at a time: 84 MB as float16 at 1,280 dimensions, and twice that as float32. Assumed.
QUERY_ROWS = 32_768
# Minimum rows to gather before dropping rows that can no longer be drawn. Assumed: 12 MB.
GATHERED_ROWS = 250_000


class DatasetConfig(Settings):
    """The contribution of one seed dataset to the corpus."""

    name: str
    """A source with role `seed`."""
    as_is: bool = False
    """Whether the seed images themselves are packed."""
    retrieval: Retrieval = "by_size"
    """Retrieval mode; `by_size` is `sample` above `sample_above` seeds, otherwise `cluster`."""
    k: int = Field(default=4, ge=1)
    """By sample: pool images per seed (4 and 32 in DINOv2)."""
    cap: int = Field(default=1_000_000, ge=1)
    """By cluster: maximum images retrieved for the dataset (1 million in DINOv2)."""


class ClusteringConfig(Settings):
    """A draw from the whole pool, balanced over its clusters and independent of the seeds."""

    num_images: int = Field(ge=1)
    """Images to draw; the whole kept pool when it holds fewer (1.7 billion of about 17 billion in DINOv3)."""
    draw: Literal["random", "nearest"] = "random"
    """Order of the images of a cluster: random, or nearest to the centroid first."""
    images_per_shard: int = Field(default=4_000_000, ge=1)
    """Drawn images per shard; the next shard begins at a new cluster. A shard holds 220 bytes per image, and reads all
    assignments once."""


class RetrieveConfig(Settings):
    """Retrieval from the pool."""

    datasets: tuple[DatasetConfig, ...] = ()
    """The seed datasets."""
    sample_above: int = Field(default=1_000_000, ge=0)
    """Number of seeds above which `by_size` is `sample` (1 million in DINOv2)."""
    more_than_seeds: int = Field(default=3, ge=0)
    """Minimum seeds of a dataset per cluster, exclusive (3 in DINOv2); other clusters give the dataset no images."""
    images_per_cluster: int = Field(default=10_000, ge=1)
    """By cluster: maximum pool images from each cluster (10,000 in DINOv2)."""
    draw: Literal["nearest", "random"] = "nearest"
    """By cluster: order of the images of a cluster, nearest to the centroid first or random. DINOv2 does not state its
    choice."""
    search: SearchConfig = SearchConfig()
    """By sample: the search for the nearest pool images."""
    clustering: ClusteringConfig | None = None
    """An additional draw by hierarchical balanced sampling; none when the section is left out."""
    check_copies: bool = False
    """Whether the corpus is checked against itself: a pool image that is a copy of another image of the corpus, or of
    the holdout, is passed over for the next in rank. Copies are defined as in `pairs` and `dedup`."""
    seed: int = 0
    """Seed of the random draws."""

    @field_validator("datasets")
    @classmethod
    def _names_are_unique(cls, value: tuple[DatasetConfig, ...]) -> tuple[DatasetConfig, ...]:
        names = [dataset.name for dataset in value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two datasets have the name {', '.join(map(repr, repeated))}; name each source once")
        return value


def run(
    config: RetrieveConfig, inputs: RunFolder, output: str, runner: Runner, *, replace: bool = False, log: Log = None
) -> Manifest:
    """Retrieve for every seed dataset; returns the manifest. Its facts are `search`, `datasets`, `notes` and `check`.

    The notes are sentences on the datasets that retrieved nothing by cluster; they are printed too. `check` holds
    CHECK_TOTALS and the comparison of the check; it is null without `check_copies`. Only the check reads the folders
    `describe` and `pairs`.
    """
    with progress.step("retrieve", "counting the seeds"):
        kept = kept_shards(inputs)
        shards, query_shards = _plan_shards(config, kept)
    hashes = {
        **kept_inputs(inputs),
        "vectors": require_manifest(inputs.embed).content_hash,
        "clusters": require_manifest(inputs.cluster).content_hash,
    }
    comparison = None
    if config.check_copies:
        comparison = corpus_check.comparison_of(inputs.pairs, inputs.dedup, config.search.device)
        hashes |= {
            "descriptors": require_manifest(inputs.describe).content_hash,
            "pairs": require_manifest(inputs.pairs).content_hash,
            "comparison": corpus_check.fingerprint(comparison),
        }
    search_folder, proposed_folder = step_folder(output, "search"), step_folder(output, "proposed")

    def prepare() -> ShardRecord:
        if query_shards:
            search = Stage(
                name="search",
                config=config,
                inputs=hashes,
                output=search_folder,
                shards=_pool_parts(kept, config.search.rows_per_part),
                make_worker=functools.partial(_make_search_worker, config.search, query_shards, search_folder),
                finish=functools.partial(_measure_recall, config.search, query_shards, search_folder),
                unit="vectors",
            )
            run_stage(search, runner, log=log)
        files: tuple[FileRecord, ...] = ()
        if config.clustering is not None:
            with progress.step("retrieve", "dividing the draw among the clusters"):
                files = (_write_counts(config.clustering, inputs.cluster, output),)
        if comparison is None:
            return ShardRecord(name=PREPARED, files=files)
        proposed = run_stage(
            Stage(
                name="proposed",
                config=config,
                inputs=hashes,
                output=proposed_folder,
                shards=shards,
                make_worker=make_proposer,
                unit="rows",
            ),
            runner,
            log=log,
        )
        with progress.step("retrieve", "reading the proposed images"):
            proposals = _read_proposals(config, shards, proposed, proposed_folder, inputs)
        described, paired = inputs.describe, inputs.pairs
        choice = corpus_check.run(comparison, proposals, config, inputs.ingest, described, paired, output, runner, log)
        _write_choice(choice.is_taken, proposed, proposed_folder)
        files = (*files, parquet.write_table(paths.join(output, COPIES_NAME), choice.copies))
        return ShardRecord(name=PREPARED, files=files, totals=choice.totals)

    def finish(records: Sequence[ShardRecord]) -> tuple[dict[str, Any], None]:
        search = {"search": require_manifest(search_folder).facts} if query_shards else {}
        facts = search | {"notes": _notes_on_clusters(config, shards, records), "check": None}
        if comparison is not None:
            totals = sum_counts(record.totals for record in records)
            settings = {name: getattr(comparison, name) for name in CHECK_SETTINGS}
            settings["lookalikes"] = list(comparison.lookalikes)
            facts["check"] = settings | {name: totals.get(name, 0) for name in CHECK_TOTALS}
        return facts, None

    def make_proposer_in(folder: str) -> Callable[[], Callable[[Shard], ShardRecord]]:
        return functools.partial(make_worker, config, query_shards, search_folder, inputs.cluster, output, folder)

    make_proposer = make_proposer_in(proposed_folder)
    stage = Stage(
        name="retrieve",
        config=config,
        inputs=hashes,
        output=output,
        shards=shards,
        make_worker=(
            make_proposer_in(output)
            if comparison is None
            else functools.partial(_make_chooser, proposed_folder, output)
        ),
        prepare=prepare,
        finish=finish,
        facts=config.model_dump(mode="json", include={"datasets"}),
        unit="rows",
    )
    manifest = run_stage(stage, runner, replace=replace, log=log)
    config.search.require_recall(manifest.facts.get("search", {}))  # min_recall may have been raised since
    for note in manifest.facts["notes"]:
        progress.say(f"retrieve: {note}")
    return manifest


def _notes_on_clusters(config: RetrieveConfig, shards: Sequence[Shard], records: Sequence[ShardRecord]) -> list[str]:
    """One sentence for each dataset for which the clusters gave no row."""
    totals = sum_counts(record.totals for record in records)
    notes = []
    for dataset in (dataset for dataset, mode, _ in (shard.work for shard in shards) if mode == "cluster"):
        if not totals.get(f"rows:{dataset.name}"):
            notes.append(
                f"Dataset '{dataset.name}' retrieved nothing by cluster: no cluster with pool images holds more than "
                f"{config.more_than_seeds} of its {totals.get(f'seeds:{dataset.name}', 0):,} seeds. Lower "
                'retrieve.more_than_seeds, or set retrieval = "sample" for it.'
            )
    return notes


@dataclass(frozen=True)
class _QueryShard:
    """The seeds of a dataset in one shard of ingest, as queries of the search by sample."""

    shard: KeptShard
    source: str
    k: int
    """Neighbours of each seed."""

    def read(self) -> tuple[list[str], np.ndarray]:
        """Ids and vectors (N, D) of the seeds."""
        return read_kept(self.shard, role="seed", source=self.source)


def _plan_shards(config: RetrieveConfig, kept: Sequence[KeptShard]) -> tuple[list[Shard], list[_QueryShard]]:
    """The shards of the stage, dataset by dataset, and the queries of the search by sample.

    The work of a shard is a dataset, the mode, and the scope: the number of a query shard, the shards of ingest that
    hold the seeds, or the number of a part of the balanced draw.
    """
    sources = [_source_of(shard) for shard in kept]
    shards: list[Shard] = []
    query_shards: list[_QueryShard] = []
    for dataset in config.datasets:
        seed_shards = [shard for shard, source in zip(kept, sources, strict=True) if source == dataset.name]
        if not seed_shards:
            raise ConfigError(f"dataset '{dataset.name}' of retrieve has no images: no source of that name has any.")
        match _mode(config, dataset, seed_shards):
            case "sample":
                for shard in seed_shards:
                    shards.append(Shard(f"{len(shards):05d}", (dataset, "sample", len(query_shards))))
                    query_shards.append(_QueryShard(shard, dataset.name, dataset.k * _looks(config)))
            case "cluster":
                shards.append(Shard(f"{len(shards):05d}", (dataset, "cluster", tuple(seed_shards))))
            case "none":
                pass
    if config.clustering is not None:
        num_parts = -(-config.clustering.num_images // config.clustering.images_per_shard)
        shards += [Shard(f"{len(shards) + part:05d}", (None, "balanced", part)) for part in range(num_parts)]
    return shards, query_shards


def _looks(config: RetrieveConfig) -> int:
    """The rows that are looked at, in multiples of the rows that a seed or a cluster may bring."""
    return LOOKS if config.check_copies else 1


def make_worker(
    config: RetrieveConfig,
    query_shards: Sequence[_QueryShard],
    search_folder: str,
    cluster_folder: str,
    output: str,
    folder: str,
) -> Callable[[Shard], ShardRecord]:
    """Make a worker that retrieves the rows of each shard, or with the check the PROPOSED rows, into `folder`."""

    def process(shard: Shard) -> ShardRecord:
        dataset, mode, scope = shard.work
        match mode:
            case "balanced":
                table = _by_balance(config, cluster_folder, output, part=scope)
                totals, rows_name = {}, "balanced_rows"
            case "sample":
                seed_ids = query_shards[scope].read()[0]
                names = require_manifest(search_folder).files("found")
                table = _by_sample(dataset, seed_ids, _merge_parts(search_folder, names, scope, query_shards[scope].k))
                totals, rows_name = {f"seeds:{dataset.name}": len(seed_ids)}, f"rows:{dataset.name}"
            case _:
                seeds = np.concatenate([read_kept(part, role="seed", source=dataset.name)[1] for part in scope])
                table = _by_cluster(config, dataset, seeds, cluster_folder)
                totals, rows_name = {f"seeds:{dataset.name}": len(seeds)}, f"rows:{dataset.name}"
        if not config.check_copies:
            table = table.select(schemas.RETRIEVED.names)
            totals[rows_name] = table.num_rows
        file = parquet.write_table(paths.join(folder, f"retrieved-{shard.name}.parquet"), table)
        return ShardRecord(name=shard.name, files=(file,), totals=totals)

    return process


# The check of the corpus against itself


def _read_proposals(
    config: RetrieveConfig, shards: Sequence[Shard], proposed: Manifest, folder: str, inputs: RunFolder
) -> Proposals:
    """The proposed rows of all shards, and the images that they are compared with."""
    names = [dataset.name for dataset in config.datasets]
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("image_id", "rank", "group", "quota", "dataset", "seed")
    }
    num_groups = 0
    for shard, path in zip(shards, proposed.paths(folder, "retrieved"), strict=True):
        table = parquet.read_table(path, PROPOSED)
        dataset = shard.work[0]
        seed = pack_ids(pc.fill_null(table["seed_image_id"], "0" * 32))
        by_seed = table["seed_image_id"].null_count == 0
        group = np.unique(seed if by_seed else table["cluster_id"].to_numpy(), return_inverse=True)[1]
        columns["image_id"].append(pack_ids(table["image_id"]))
        columns["rank"].append(table["rank"].to_numpy())
        columns["group"].append(num_groups + group)
        columns["quota"].append(table["quota"].to_numpy())
        # Rows of the balanced draw belong to no dataset, and come last.
        number = len(names) if dataset is None else names.index(dataset.name)
        columns["dataset"].append(np.full(table.num_rows, number))
        columns["seed"].append(seed)
        num_groups += int(group.max(initial=-1)) + 1
    row = {name: np.concatenate(parts) for name, parts in columns.items()}
    quota = np.zeros(num_groups, np.int64)
    quota[row["group"]] = row["quota"]
    packed = pa.array([dataset.name for dataset in config.datasets if dataset.as_is], pa.string())
    seeds = [np.empty(0, "S16")]
    for table in kept_images(inputs, ["image_id", "source", "role"]):
        is_packed = pc.and_(pc.equal(table["role"], "seed"), pc.is_in(table["source"], packed))
        seeds.append(pack_ids(table["image_id"].filter(is_packed)))
    return Proposals(
        image_ids=row["image_id"],
        rank=row["rank"],
        group=row["group"],
        quota=quota,
        order=np.lexsort((row["image_id"], row["seed"], row["dataset"], row["rank"])),
        seed_ids=np.unique(np.concatenate(seeds)),
        holdout_ids=pack_ids(pa.chunked_array([id_column(holdout_pairs.holdout_ids(inputs.ingest))])),
    )


def _write_choice(is_taken: np.ndarray, proposed: Manifest, folder: str) -> None:
    """Write which of the proposed rows (R,) are taken, one file for each shard."""
    start = 0
    for record in proposed.shards:
        stop = start + sum(file.rows for file in record.files)
        npy.write_arrays(paths.join(folder, f"taken-{record.name}.npy"), is_taken[start:stop])
        start = stop


def _make_chooser(proposed_folder: str, output: str) -> Callable[[Shard], ShardRecord]:
    """Make a worker that writes the rows of each shard that the check took."""
    records = {record.name: record for record in require_manifest(proposed_folder).shards}

    def process(shard: Shard) -> ShardRecord:
        dataset, _, _ = shard.work
        proposed = parquet.read_table(paths.join(proposed_folder, f"retrieved-{shard.name}.parquet"), PROPOSED)
        is_taken = npy.read_array(paths.join(proposed_folder, f"taken-{shard.name}.npy"))
        table = proposed.filter(pa.array(is_taken)).select(schemas.RETRIEVED.names).combine_chunks()
        file = parquet.write_table(paths.join(output, f"retrieved-{shard.name}.parquet"), table)
        # Without the check, a seed or a cluster brings its quota, or all of its rows where these are fewer.
        is_in_quota = proposed["rank"].to_numpy() < proposed["quota"].to_numpy()
        rows_name = "balanced_rows" if dataset is None else f"rows:{dataset.name}"
        missing = int(is_in_quota.sum()) - table.num_rows
        totals = records[shard.name].totals | {rows_name: table.num_rows, "missing_rows": missing}
        return ShardRecord(name=shard.name, files=(file,), totals=totals)

    return process


def nearest(seed_ids: list[str], seeds: np.ndarray, pool: Iterable[tuple[list[str], np.ndarray]], k: int) -> pa.Table:
    """The `k` pool images nearest to each seed: columns seed_image_id, image_id, rank, similarity, in that order.

    `seeds` is (N, D); `pool` gives ids and vectors block by block and is iterated once.
    """
    pool_ids: list[str] = []

    def blocks() -> Iterator[np.ndarray]:
        for ids, matrix in pool:
            _check_width(seeds, matrix.shape[1])
            pool_ids.extend(ids)
            yield matrix

    similarity, row = exact.search(seeds, blocks(), k)
    is_neighbor = row >= 0
    seed, rank = np.nonzero(is_neighbor)
    return pa.table(
        {
            "seed_image_id": pa.array([seed_ids[index] for index in seed], pa.string()),
            "image_id": pa.array([pool_ids[index] for index in row[is_neighbor]], pa.string()),
            "rank": pa.array(rank, pa.int32()),
            "similarity": pa.array(np.clip(similarity[is_neighbor], -1, 1), pa.float32()),  # rounding may exceed 1
        }
    )


def _source_of(shard: KeptShard) -> str | None:
    """The one source of a shard's images; None when all of its images were rejected."""
    column = parquet.read_table(shard.images, schemas.IMAGES, ["source"]).column("source")
    return str(column[0]) if len(column) else None


def _mode(config: RetrieveConfig, dataset: DatasetConfig, seed_shards: list[KeptShard]) -> Mode:
    if dataset.retrieval != "by_size":
        return dataset.retrieval
    num_seeds = sum(len(read_kept(shard, role="seed", source=dataset.name)[0]) for shard in seed_shards)
    return mode_of(dataset.retrieval, num_seeds, config.sample_above)


def _pool_parts(kept: Sequence[KeptShard], rows_per_part: int) -> list[Shard]:
    """Parts of the pool: consecutive shards of ingest with at most `rows_per_part` vectors, but at least one shard."""
    parts: list[tuple[list[KeptShard], int]] = []
    for shard in kept:
        num_rows = vectors.num_rows(shard.vectors)
        if not parts or parts[-1][1] + num_rows > rows_per_part:
            parts.append(([], 0))
        parts[-1] = ([*parts[-1][0], shard], parts[-1][1] + num_rows)
    return [Shard(f"{number:05d}", tuple(shards), rows) for number, (shards, rows) in enumerate(parts)]


def _make_search_worker(
    config: SearchConfig, query_shards: Sequence[_QueryShard], output: str
) -> Callable[[Shard], ShardRecord]:
    """Make a worker that searches each part of the pool for the neighbours of all queries.

    Writes NEIGHBORS, one row group per query shard. With `ivf`, it also searches for a sample of the seeds exactly, and
    writes their neighbours to a second file.
    """

    def process(shard: Shard) -> ShardRecord:
        loaded = [pair for pair in prefetch(functools.partial(read_kept, role="pool"), shard.work) if pair[0]]
        ids = id_bytes([image_id for image_ids, _ in loaded for image_id in image_ids])
        part = PartSearch(config, [loaded.pop(0)[1] for _ in range(len(loaded))])

        def neighbors() -> Iterator[tuple[int, pa.Table]]:
            for block in _query_blocks(query_shards):
                queries = np.concatenate([seeds for _, seeds in block])
                k = max(query_shards[number].k for number, _ in block)
                if part.num_vectors:
                    _check_width(queries, part.width)
                similarity, row = part.search(queries, k)
                starts = np.cumsum([0, *(len(seeds) for _, seeds in block)])
                for (number, _), (start, stop) in zip(block, pairwise(starts.tolist()), strict=True):
                    yield number, neighbor_table(ids, similarity[start:stop], row[start:stop])
                    report(1, total=len(query_shards))

        def exact_neighbors() -> Iterator[tuple[int, pa.Table]]:
            for number, (first, step) in enumerate(_recall_samples(query_shards)):
                seeds = query_shards[number].read()[1]
                rows = np.arange(first, len(seeds), step)
                table = neighbor_table(ids, *part.search_exactly(seeds[rows], query_shards[number].k))
                yield number, table.set_column(0, "query", pa.array(rows[table["query"].to_numpy()].astype(np.int32)))

        def write(kind: str, tables: Iterator[tuple[int, pa.Table]]) -> FileRecord:
            path = paths.join(output, f"{kind}-{shard.name}.parquet")
            return parquet.write_row_groups(path, QUERY_SHARD_COLUMN, tables, NEIGHBORS.empty_table())

        files = [write("found", neighbors())]
        if config.backend == "ivf":
            files.append(write("exact", exact_neighbors()))
        return ShardRecord(name=shard.name, files=tuple(files))

    return process


def _check_width(seeds: np.ndarray, width: int) -> None:
    if width != seeds.shape[1]:
        raise InputError(f"seeds have width {seeds.shape[1]}, the pool {width}: the vectors are not of one model.")


def _query_blocks(query_shards: Sequence[_QueryShard]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Blocks of whole query shards, about QUERY_ROWS seeds each: the number and the seeds (n, D) of each shard."""
    block: list[tuple[int, np.ndarray]] = []
    for number, query_shard in enumerate(query_shards):
        block.append((number, query_shard.read()[1]))
        if sum(len(seeds) for _, seeds in block) >= QUERY_ROWS or number == len(query_shards) - 1:
            yield block
            block = []


def _recall_samples(query_shards: Sequence[_QueryShard]) -> list[tuple[int, int]]:
    """For each query shard, the first row of the seeds that recall is measured on, and the step to the next row."""
    counts = [vectors.num_rows(query_shard.shard.vectors) for query_shard in query_shards]
    step = max(1, sum(counts) // RECALL_QUERIES)
    starts = np.cumsum([0, *counts[:-1]])
    return [(int(-start % step), step) for start in starts]


def _merge_parts(search_folder: str, names: Sequence[str], number: int, k: int) -> pa.Table:
    """NEIGHBORS of the query shard `number`, merged from the files of all parts."""
    files = (paths.join(search_folder, name) for name in names)
    return merge_parts((parquet.read_row_groups(path, QUERY_SHARD_COLUMN, number, NEIGHBORS) for path in files), k)


def _measure_recall(
    config: SearchConfig, query_shards: Sequence[_QueryShard], search_folder: str, records: Sequence[ShardRecord]
) -> tuple[dict[str, Any], None]:
    """The recall of the search on the sampled seeds, as facts. Raises ConfigError when it is too low."""
    if config.backend == "exact":
        return {"backend": "exact", "recall": 1.0}, None
    names = [file.name for record in records for file in record.files]
    index_files, exact_files = ([name for name in names if name.startswith(kind)] for kind in ("found-", "exact-"))
    hits = total = 0
    for number, query_shard in enumerate(query_shards):
        approximate, true = (
            _merge_parts(search_folder, files, number, query_shard.k) for files in (index_files, exact_files)
        )
        shard_hits, shard_total = count_hits(approximate, true)
        hits, total = hits + shard_hits, total + shard_total
    recall = hits / total if total else None
    facts = {"backend": "ivf", "recall": recall, "recall_neighbors": total}
    config.require_recall(facts)
    return facts, None


def _by_sample(dataset: DatasetConfig, seed_ids: list[str], neighbors: pa.Table) -> pa.Table:
    """Rows of PROPOSED by sample, from the merged `neighbors` of the seeds."""
    query, num_rows = neighbors["query"].to_numpy(), neighbors.num_rows
    return pa.table(
        {
            "image_id": neighbors["image_id"],
            "seed_source": pa.repeat(pa.scalar(dataset.name, pa.string()), num_rows),
            "seed_image_id": pa.array(seed_ids, pa.string()).take(pa.array(query)),
            "mode": pa.repeat(pa.scalar("sample", pa.string()), num_rows),
            "rank": rank_in_groups(query).astype(np.int32),
            "similarity": np.clip(neighbors["similarity"].to_numpy(), -1, 1),  # lengths are rounded, to 1.0002
            "cluster_id": pa.nulls(num_rows, pa.int32()),
            "quota": np.full(num_rows, dataset.k),
        },
        schema=PROPOSED,
    )


def _by_cluster(config: RetrieveConfig, dataset: DatasetConfig, seeds: np.ndarray, cluster_folder: str) -> pa.Table:
    """Rows of PROPOSED by cluster, given the vectors of all `seeds` (N, D) of the dataset."""
    centroids = read_centroids(cluster_folder)
    num_seeds = np.bincount(exact.assign(seeds, centroids)[0], minlength=len(centroids))
    chosen = np.flatnonzero(num_seeds > config.more_than_seeds)
    sizes = cluster_sizes(cluster_folder, len(centroids))
    counts = np.zeros(len(centroids), np.int64)
    counts[chosen] = cluster_counts(sizes[chosen].tolist(), config.images_per_cluster, dataset.cap)
    drawn = draw_images(cluster_folder, np.minimum(_looks(config) * counts, sizes), config.draw, config.seed)
    return _as_proposed(drawn, "cluster", dataset.name, counts)


def _by_balance(config: RetrieveConfig, cluster_folder: str, output: str, part: int) -> pa.Table:
    """Rows of PROPOSED of one part of the balanced draw.

    With all drawn images in the order of their clusters, a part holds the clusters whose first image lies in its run of
    `images_per_shard` images.
    """
    assert config.clustering is not None
    counts = npy.read_array(paths.join(output, BALANCED_NAME))
    counts[(np.cumsum(counts) - counts) // config.clustering.images_per_shard != part] = 0
    drawn_counts = counts
    if config.check_copies:
        drawn_counts = np.minimum(LOOKS * counts, cluster_sizes(cluster_folder, len(counts)))
    drawn = draw_images(cluster_folder, drawn_counts, config.clustering.draw, config.seed)
    return _as_proposed(drawn, "balanced", None, counts)


def _write_counts(config: ClusteringConfig, cluster_folder: str, output: str) -> FileRecord:
    """Compute the number of images to draw from each cluster, and write it to `balanced.npy`."""
    names = {name for record in require_manifest(cluster_folder).shards for name in (f.name for f in record.files)}
    parents: list[np.ndarray] = []
    while f"parents-{len(parents)}.npy" in names:
        parents.append(read_parents(cluster_folder, len(parents)))
    sizes = cluster_sizes(cluster_folder, len(read_centroids(cluster_folder)))
    return npy.write_arrays(paths.join(output, BALANCED_NAME), balanced_counts(parents, sizes, config.num_images))


def draw_images(cluster_folder: str, counts: np.ndarray, draw: Literal["random", "nearest"], seed: int) -> pa.Table:
    """Draw `counts[c]` images from each finest cluster c: columns image_id, cluster_id, rank, similarity.

    `counts` (K_0,) must not exceed the clusters' sizes. Rows are sorted by cluster, then by rank. Images nearest to the
    centroid rank first, or the order depends only on the seed and the image_ids; ties go by image_id. Assignments are
    read one file at a time. Rows that can no longer be drawn are dropped whenever the gathered rows exceed twice the
    draw.
    """
    chosen = pa.array(np.flatnonzero(counts), pa.int32())
    max_rows = max(2 * int(counts.sum()), GATHERED_ROWS)
    gathered, num_rows = [_DRAWN[:0]], 0
    columns = ["image_id", "cluster_id", "similarity"]
    for table in read_assignments(cluster_folder, columns) if len(chosen) else ():
        table = table.filter(pc.is_in(table["cluster_id"], chosen))
        rows = np.empty(table.num_rows, _DRAWN.dtype)
        rows["image_id"] = table["image_id"].to_numpy(zero_copy_only=False)
        rows["cluster_id"], rows["similarity"] = table["cluster_id"].to_numpy(), table["similarity"].to_numpy()
        rows["order"] = -rows["similarity"] if draw == "nearest" else shuffled(rows["image_id"], seed)
        gathered.append(rows)
        num_rows += len(rows)
        if num_rows > max_rows:
            gathered = [_take_first(gathered, counts)]
            num_rows = len(gathered[0])
    drawn = _take_first(gathered, counts)
    assert len(drawn) == counts.sum(), "counts exceed the clusters' sizes"
    return pa.table(
        {
            "image_id": id_column(drawn["image_id"]),
            "cluster_id": drawn["cluster_id"],
            "rank": rank_in_groups(drawn["cluster_id"]).astype(np.int32),
            "similarity": drawn["similarity"],
        }
    )


# A row that may be drawn. `order` is a float64, which holds the similarities and 53 bits of the shuffle exactly.
_DRAWN = np.empty(
    0, np.dtype([("image_id", "S32"), ("order", np.float64), ("cluster_id", np.int32), ("similarity", np.float32)])
)


def _take_first(parts: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """The first `counts[c]` rows of each cluster c, sorted by cluster, order and image_id. Empties `parts`."""
    rows = np.concatenate(parts)
    parts.clear()
    first: np.ndarray = rows[top_k_of_groups(rows["cluster_id"], counts, rows["order"], rows["image_id"])]
    return first


def shuffled(image_ids: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each image_id (N,) of 32 bytes, from the image_id and the seed alone: (N,) float64.

    SplitMix64 over the seed and the four words of the image_id.
    """
    words = np.ascontiguousarray(image_ids).view(">u8").reshape(len(image_ids), 4).astype(np.uint64)
    state = np.full(len(image_ids), seed % 2**64, np.uint64)
    for word in words.T:
        state = split_mix(state ^ word)
    return (state >> np.uint64(11)) * 2.0**-53


def _as_proposed(drawn: pa.Table, mode: str, seed_source: str | None, quotas: np.ndarray) -> pa.Table:
    """Rows of PROPOSED, given the drawn images and the `quotas` (K_0,) of the clusters."""
    columns = {name: drawn[name] for name in drawn.column_names}
    constant = {"seed_source": seed_source, "seed_image_id": None, "mode": mode}
    columns |= {name: pa.repeat(pa.scalar(value, pa.string()), drawn.num_rows) for name, value in constant.items()}
    columns["quota"] = quotas[drawn["cluster_id"].to_numpy()]
    return pa.table({name: columns[name] for name in PROPOSED.names}, schema=PROPOSED)


def command_line(
    output: command.OutputOption,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Alone: vectors of the seeds.")] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="Alone: vectors of the pool.")] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Alone: pool images per seed image.")] = 4,
    config: Annotated[str | None, typer.Option("--config", help="TOML file; its section [retrieve] is read.")] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder of the finished ingest.")] = None,
    deduplicated: Annotated[str | None, typer.Option("--dedup", help="Folder of the finished dedup.")] = None,
    embedded: Annotated[str | None, typer.Option("--vectors", help="Folder of the finished embed.")] = None,
    clustered: Annotated[str | None, typer.Option("--clusters", help="Folder of the finished cluster.")] = None,
    described: Annotated[
        str | None, typer.Option("--descriptors", help="With check_copies: folder of the finished describe.")
    ] = None,
    paired: Annotated[
        str | None, typer.Option("--pairs", help="With check_copies: folder of the finished pairs.")
    ] = None,
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Retrieve the pool images that resemble the seeds: as a stage with --config, or alone with --seeds and --pool.

    The check for copies needs the images. Alone, the command has no check: it may retrieve all copies of a picture.
    """
    if config is None:
        if seeds is None or pool is None:
            raise ConfigError("Give --seeds and --pool (folders or files of vectors), or --config and a run's folders.")
        if plan or overrides:
            raise ConfigError("--plan and --set need --config; they do not go with --seeds and --pool.")
        if not output.endswith(".parquet"):
            raise ConfigError(f"--output {output}: alone, retrieve writes one file; give a name that ends in .parquet.")
        paths.require_writable(posixpath.dirname(output) or ".")
        _retrieve_alone(seeds, pool, k, output, replace=replace)
        return
    if seeds is not None or pool is not None:
        raise ConfigError("--seeds and --pool do not go with --config. Leave out --config, or both of them.")
    if images is None or deduplicated is None or embedded is None or clustered is None:
        raise ConfigError("With --config, also give --images, --dedup, --vectors and --clusters.")
    settings = load(RetrieveConfig, config, overrides or (), section="retrieve")
    folders = {"ingest": images, "dedup": deduplicated, "embed": embedded, "cluster": clustered}
    if settings.check_copies:
        if described is None or paired is None:
            raise ConfigError(
                "retrieve.check_copies is true, and the check reads two more folders. Give --descriptors and --pairs, "
                "or --set retrieve.check_copies=false."
            )
        folders |= {"describe": described, "pairs": paired}
    if not plan:
        command.require_apart(output, settings, config, *folders.values(), is_stage=True)
    command.plan_or_run(
        settings,
        lambda chosen: run(settings, RunFolder(**folders), output, chosen, replace=replace),
        plan=plan,
        runner=runner,
        workers=workers,
        gpus_per_worker=settings.search.num_gpus,
        output=output,
        replace=replace,
        check=lambda: require_folders(folders),
    )


def _retrieve_alone(seeds: str, pool: str, k: int, output: str, *, replace: bool) -> None:
    paths.require_apart(output, [seeds, pool], or_below=True)
    # Kept in the file, so that another search is not taken for this one. The names of files are part of ids.
    origin = {"k": k, "seeds": _hash_vectors(seeds), "pool": _hash_vectors(pool)}
    if paths.is_folder(output):
        raise ConfigError(f"--output '{output}' is a folder. Give the name of a file.")
    if paths.exists(output) and not replace:
        if (origin_there := _origin_of(output)) == origin:
            print(f"retrieve: {output} is already done, nothing to do")
            return
        changed = [name for name, value in origin.items() if origin_there.get(name) != value]
        k_there = f" (k is {origin_there['k']} there, {k} now)" if "k" in changed and origin_there else ""
        raise OutputMismatchError(
            f"'{output}' exists and holds another result: {', '.join(changed)} differ{k_there}. Nothing was changed. "
            "Give another --output, or --replace to overwrite it."
        )
    blocks = list(read_vectors(seeds, in_float32=True))
    seed_ids = [image_id for ids, _ in blocks for image_id in ids]
    queries = np.concatenate([matrix for _, matrix in blocks])
    table = nearest(seed_ids, queries, read_vectors(pool, in_float32=True), k)
    parquet.write_table(output, table.replace_schema_metadata({ORIGIN_KEY: json.dumps(origin)}))
    print(f"{table.num_rows:,} rows: the {k} nearest of the pool for each of {len(seed_ids):,} seeds, in {output}")


def _hash_vectors(path: str) -> str:
    """A hash of the names and the bytes of the files with vectors at `path`."""
    files, _ = vector_files(path)
    return hash_json([[posixpath.basename(file), sha256_of_file(file)] for file in files])


def _origin_of(path: str) -> dict[str, Any]:
    """What made a file of this command; empty for any other file."""
    try:
        metadata = parquet.read_metadata(path)
    except InputError:
        return {}
    return dict(json.loads(metadata.get(ORIGIN_KEY.encode(), b"{}")))


if __name__ == "__main__":
    from curation import retrieve  # by its real name, or its classes would exist twice

    command.main(retrieve.command_line)
