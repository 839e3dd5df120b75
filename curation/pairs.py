"""Pairs: which two images may be copies of one another, and how similar they are.

    pairs/
      pairs-00000.parquet  ...     schemas.PAIRS: every pair at or above `min_similarity`, by the smaller id
      manifest.json                its facts hold the number of full lists and, with `ivf`, the recall of the search

Two searches propose candidates: the nearest copy descriptors above a cosine (search/self_join.py), and perceptual
hashes within a Hamming distance. The similarity of a candidate is the cosine of its descriptors, or, with
`verification`, the result of comparing the two thumbnails. The comparison of photographs needs features of each image;
a step computes them once (copies/features.py). Images with equal bytes count as one image; otherwise they would fill
every list of neighbours. A third search compares images with the holdout, because a full list of neighbours
may hide a holdout image (copies/holdout_pairs.py).

The ids are divided into equal ranges, one for each shard. A shard scores the candidates whose smaller id lies in its
range. The driver holds the ids and perceptual hashes of all images, about 100 bytes per image; nothing else grows with
the number of images.

    python -m curation.pairs --config CONFIG.toml --images ingest/ --descriptors describe/ --output pairs/
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from curation.config import Settings
from curation.copies import features, holdout_pairs
from curation.copies.compare_thumbnails import VerificationConfig
from curation.copies.described import DescribedRows, FeatureRows, Verifier, make_loader
from curation.copies.holdout_pairs import SURE_MATCH, HoldoutSearch
from curation.engine import command
from curation.engine.manifest import Manifest, ShardRecord, require_manifest, step_folder
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import ConfigError, InputError
from curation.files import parquet, paths, schemas
from curation.files.image_ids import bucket_of, id_bytes, id_column, pack_ids
from curation.images.hashing import pairs_within
from curation.run_folder import RunFolder, read_images
from curation.search import self_join
from curation.search.config import SearchConfig
from curation.search.self_join import Neighborhood
from curation.search.top_k import starts_group
from curation.stage_command import stage_command

# Candidates between two reports of progress. Assumed: verified in less than a second.
PAIRS_PER_REPORT = 128
# Pairs of perceptual hashes that are held in memory at a time. Assumed.
HASH_PAIRS_PER_FILE = 1_000_000


class PairsConfig(Settings):
    """How candidates are searched and scored."""

    search: SearchConfig = SearchConfig()
    """The search for near descriptors."""
    num_neighbors: int = Field(default=64, ge=0)
    """Maximum number of nearest descriptors that are candidates of an image (64 in DINOv2, appendix A.3); 0 searches no
    descriptors, those of the holdout included."""
    min_descriptor_similarity: float = Field(default=0.45, ge=-1, le=1)
    """Minimum cosine of the descriptors of two candidates (0.45 in DINOv2, the lower of its two thresholds)."""
    max_phash_distance: int = Field(default=4, ge=-1, le=16)
    """Maximum number of bits in which the 64-bit perceptual hashes of two candidates differ; -1 uses no hashes."""
    verification: VerificationConfig | None = None
    """How the thumbnails of candidates are compared. Without this section, the cosine of the descriptors is the
    similarity."""
    min_similarity: float = Field(default=0.4, ge=-1, le=1)
    """Minimum similarity of the pairs written, and so the lowest threshold that a later stage may use."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """With verification: minimum cosine of pairs that are written whatever their similarity, for a later stage with a
    threshold on the cosine (dedup.holdout_cosine)."""
    images_per_shard: int = Field(default=1000, ge=1)
    """Images whose candidates one shard scores. An image takes seconds with verification; without, use a million."""

    @field_validator("search")
    @classmethod
    def _cells_hold_vectors(cls, value: SearchConfig) -> SearchConfig:
        if value.codes == "pq":
            raise ValueError("codes 'pq' are for [retrieve.search]; the self-join compares the vectors themselves")
        return value


def run(
    config: PairsConfig, inputs: RunFolder, output: str, runner: Runner, *, replace: bool = False, log: Log = None
) -> Manifest:
    """Find and score the pairs among all images of a finished ingest and describe; returns the manifest.

    Its facts are `search`, `full_lists` (the number of images with `num_neighbors` neighbours), `min_similarity` (the
    minimum of the pairs written), `max_holdout_threshold` (the maximum threshold for matches of the holdout), and the
    settings `min_descriptor_similarity` and `verification`, which later stages need to compare further pairs.

    Raises InputError when the descriptors are of other images. Raises ConfigError when verification lacks thumbnails,
    or when the recall of the search is too low.
    """
    images, descriptors = inputs.ingest, inputs.describe
    ingested, described = require_manifest(images), require_manifest(descriptors)
    if described.plan.inputs.get("images") != ingested.content_hash:
        raise InputError(
            f"'{descriptors}' has descriptors of other images than those of '{images}'; they are not stages of one run."
        )
    if config.verification and len(described.files("thumbnails")) != len(described.shards):
        raise ConfigError(
            f"'{descriptors}' holds no thumbnails; pairs.verification needs them. Set describe.thumbnail_side."
        )
    files = described.paths(descriptors, "vectors")
    thumbnail_files = described.paths(descriptors, "thumbnails")
    described_rows = DescribedRows(files, thumbnail_files)
    num_shards = max(1, -(-described_rows.count // config.images_per_shard))
    joined, hashed, with_holdout, with_features = (
        step_folder(output, name) for name in ("join", "hashes", "holdout", "features")
    )
    feature_rows = None
    if config.verification and config.verification.domain == "photographs":
        feature_rows = FeatureRows(features.names(with_features, thumbnail_files))

    hashes = {"images": ingested.content_hash, "descriptors": described.content_hash}

    def num_full_lists() -> int:
        if not config.num_neighbors:
            return 0
        return require_manifest(joined).totals.get("full_lists", 0)

    def propose_candidates() -> ShardRecord:
        min_cosine = config.min_descriptor_similarity
        if config.num_neighbors:
            neighborhood = Neighborhood(config.search, config.num_neighbors, min_cosine, num_shards)
            self_join.run(neighborhood, files, joined, runner, content_hash=described.content_hash, log=log)
        if config.max_phash_distance >= 0:
            for number, buckets in enumerate(_hash_pairs(config, images, described_rows, num_shards)):
                path = paths.join(hashed, f"pairs-{number:05d}.parquet")
                parquet.write_row_groups(path, "bucket", buckets, self_join.PAIRED.empty_table())
        if config.verification and feature_rows:
            features.run(
                config.verification,
                thumbnail_files,
                with_features,
                runner,
                content_hash=described.content_hash,
                log=log,
            )
        is_complete = config.search.backend == "exact" and not num_full_lists()
        if config.num_neighbors and not is_complete and len(holdout := holdout_pairs.holdout_ids(images)):
            verification = config.verification
            loader = (
                functools.partial(make_loader, verification, described_rows, feature_rows) if verification else None
            )
            holdout_pairs.run(
                HoldoutSearch(config.search, config.num_neighbors, min_cosine, num_shards, loader),
                config,
                holdout,
                files,
                joined,
                with_holdout,
                runner,
                images_per_shard=config.images_per_shard,
                inputs=hashes,
                log=log,
            )
        return ShardRecord(name=PREPARED)

    def facts(done: Sequence[ShardRecord]) -> tuple[dict[str, Any], None]:
        search = require_manifest(joined).facts if config.num_neighbors else {}
        return {"search": search, "full_lists": num_full_lists()}, None

    stage = Stage(
        name="pairs",
        config=config,
        inputs=hashes,
        output=output,
        shards=[Shard(f"{bucket:05d}", bucket, described_rows.count // num_shards) for bucket in range(num_shards)],
        make_worker=functools.partial(
            make_worker, config, described_rows, feature_rows, joined, hashed, with_holdout, output
        ),
        prepare=propose_candidates,
        finish=facts,
        facts={
            "min_similarity": config.min_similarity,
            "max_holdout_threshold": SURE_MATCH if config.verification else 1.0,
            "min_descriptor_similarity": config.min_descriptor_similarity,
            "verification": config.verification and config.verification.model_dump(mode="json"),
        },
        unit="vectors",
    )
    manifest = run_stage(stage, runner, replace=replace, log=log)
    config.search.require_recall(manifest.facts["search"])  # min_recall may be higher than when the stage finished
    return manifest


def make_worker(
    config: PairsConfig,
    described_rows: DescribedRows,
    feature_rows: FeatureRows | None,
    joined: str,
    hashed: str,
    with_holdout: str,
    output: str,
) -> Callable[[Shard], ShardRecord]:
    """A worker that scores the candidates of a range of ids."""
    verifier = Verifier(config.verification, feature_rows) if config.verification else None

    def process(shard: Shard) -> ShardRecord:
        candidates = _candidates(joined, hashed, with_holdout, shard.work)
        rows = np.stack([candidates.column(name).to_numpy() for name in ("place", "other_place")])
        cosine = candidates.column("cosine").to_numpy()
        missing = np.isnan(cosine)
        cosine = np.where(missing, described_rows.cosine(rows, missing), cosine).astype(np.float32)
        cosine = cosine.clip(-1, 1)  # vectors of float16 are slightly longer or shorter than 1
        similarity, differs_locally = cosine, np.zeros(len(cosine), bool)
        if verifier:
            similarity, differs_locally = (
                candidates.column(name).to_numpy().copy() for name in ("similarity", "differs_locally")
            )
            new = np.flatnonzero(np.isnan(similarity))
            thumbnails = described_rows.thumbnails(rows[:, new])
            for start in range(0, len(new), PAIRS_PER_REPORT):
                part = new[start : start + PAIRS_PER_REPORT]
                similarity[part], differs_locally[part] = verifier.compare(rows[:, part], thumbnails)
                report(len(part), total=len(new))
        columns = [candidates["image_id"], candidates["other_image_id"], similarity, differs_locally, cosine]
        table = pa.table([*columns, candidates["mutual"]], schema=schemas.PAIRS)
        is_written = similarity >= config.min_similarity
        if config.min_cosine is not None:
            is_written |= cosine >= config.min_cosine
        table = table.filter(pa.array(is_written))
        file = parquet.write_table(paths.join(output, f"pairs-{shard.name}.parquet"), table)
        totals = {"candidates": candidates.num_rows, "pairs": table.num_rows}
        return ShardRecord(name=shard.name, files=(file,), totals=totals)

    return process


def _candidates(joined: str, hashed: str, with_holdout: str, bucket: int) -> pa.Table:
    """holdout_pairs.SCORED of all candidates of one range of ids. The cosine is NaN for candidates by hash alone."""
    tables = [self_join.read_bucket(joined, bucket) if paths.exists(joined) else self_join.PAIRED.empty_table()]
    for name in paths.list_names(hashed):
        tables.append(parquet.read_row_groups(paths.join(hashed, name), "bucket", bucket, self_join.PAIRED))
    table = pa.concat_tables(tables)
    unknown = np.full(table.num_rows, np.nan, np.float32), np.zeros(table.num_rows, bool)
    table = pa.table([*table.columns, *unknown], schema=holdout_pairs.SCORED)
    if paths.exists(with_holdout):
        table = pa.concat_tables([table, holdout_pairs.read_bucket(with_holdout, bucket)])
    one, other = id_bytes(table["image_id"]), id_bytes(table["other_image_id"])
    # Stable: of equal pairs the one of the self-join comes first, which knows whether they are mutual. The last has the
    # score, if any has.
    order = np.lexsort((other, one))
    starts = np.flatnonzero(starts_group(one[order], other[order]))
    first, last = order[starts], order[np.append(starts[1:], len(order))[: len(starts)] - 1]
    columns = [table.column(name).take(pa.array(first)) for name in self_join.PAIRED.names]
    columns += [table.column(name).take(pa.array(last)) for name in ("similarity", "differs_locally")]
    return pa.table(columns, schema=holdout_pairs.SCORED)


def _hash_pairs(
    config: PairsConfig, images: str, described_rows: DescribedRows, num_buckets: int
) -> Iterator[Iterator[tuple[int, pa.Table]]]:
    """The pairs of near perceptual hashes: for each file, its tables of self_join.PAIRED by bucket of ids."""
    table = read_images(images, ["image_id", "phash"])
    ingested_ids, ingested_row = np.unique(id_bytes(table["image_id"]), return_index=True)
    ids, first_row = described_rows.unique_ids()
    if missing := sorted(set(ingested_ids.tolist()).difference(ids.tolist())):
        raise InputError(f"There is no descriptor of image {missing[0].decode()}, which is in '{images}'.")
    phash = table["phash"].to_numpy()[ingested_row[np.searchsorted(ingested_ids, ids)]]
    del table, ingested_ids

    def by_bucket(pairs: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
        low, high = pairs  # `ids` is sorted, so the smaller index has the smaller id
        columns = [id_column(ids[low]), id_column(ids[high]), first_row[low], first_row[high]]
        cosine, mutual = np.full(len(low), np.nan, np.float32), np.zeros(len(low), bool)
        table = pa.table([*columns, cosine, mutual], schema=self_join.PAIRED)
        bucket = bucket_of(pack_ids(table["image_id"]), num_buckets)
        for number in np.unique(bucket).tolist():
            yield number, table.take(pa.array(np.flatnonzero(bucket == number)))

    held_pairs: list[np.ndarray] = []
    for i, j, _ in pairs_within(phash, config.max_phash_distance):
        held_pairs.append(np.sort(np.stack([i, j]), axis=0))
        if sum(pairs.shape[1] for pairs in held_pairs) >= HASH_PAIRS_PER_FILE:
            yield by_bucket(np.concatenate(held_pairs, axis=1))
            held_pairs = []
    if held_pairs:
        yield by_bucket(np.concatenate(held_pairs, axis=1))


command_line = stage_command(
    "pairs",
    PairsConfig,
    run,
    "Find the pairs of images that may be copies.",
    reads=("ingest", "describe"),
    num_gpus=lambda settings: settings.search.num_gpus,
)


if __name__ == "__main__":
    from curation import pairs  # by its real name: otherwise each class would exist twice

    command.main(pairs.command_line)
