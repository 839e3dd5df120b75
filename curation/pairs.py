"""Pairs: which two images may be copies of one another, and how sure that is.

    pairs/
      pairs-00000.parquet  ...     records.PAIRS, every pair at or above `min_similarity`, by the smaller id
      manifest.json                with `ivf`, its facts hold the recall of the search

Two searches propose candidates: the nearest copy descriptors above a cosine (join.py), and perceptual hashes within a
Hamming distance. A candidate's similarity is the cosine of the descriptors, or, with `verification`, what a look at
both thumbnails gives. Images with equal bytes are one image here: they would fill every list of neighbours.

A shard judges the pairs whose smaller id lies in one of equal ranges of ids. The driver holds the ids and perceptual
hashes of all images, about 100 bytes each; nothing else grows with their number.

    python -m curation.pairs --config CONFIG.toml --images ingest/ --descriptors describe/ --output pairs/
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from curation.config import Settings
from curation.copies.compare_thumbnails import PreparedThumbnail, ThumbnailComparer, VerificationConfig
from curation.engine import command
from curation.engine.manifest import Manifest, ShardRecord, require_manifest, step_folder
from curation.engine.run_log import RunLog
from curation.engine.runner import Runner, Shard
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import ConfigError, InputError
from curation.files import parquet, paths, schemas, vectors
from curation.files.image_ids import bucket_of, id_bytes, id_column, pack_ids
from curation.images.hashing import pairs_within
from curation.run_folder import RunFolder, read_images
from curation.search import exact, self_join
from curation.search.config import SearchConfig
from curation.search.self_join import Neighborhood
from curation.search.top_k import starts_group
from curation.stage_command import stage_command

# Prepared thumbnails that a worker keeps at hand, each up to 0.8 MB. Assumed: a shard of pairs, sorted by its first
# image, needs few more.
CACHED_VIEWS = 1500
# Pairs of perceptual hashes that are held at a time. Assumed.
HASH_PAIRS_PER_FILE = 1_000_000


class PairsConfig(Settings):
    """How candidates are found and judged."""

    search: SearchConfig = SearchConfig()
    """How near descriptors are searched."""
    num_neighbors: int = Field(default=64, ge=1)
    """Nearest descriptors that each image proposes at most (64 in DINOv2, appendix A.3)."""
    min_descriptor_similarity: float = Field(default=0.6, ge=-1, le=1)
    """Cosine of two descriptors from which they are candidates."""
    max_phash_distance: int = Field(default=4, ge=-1, le=16)
    """Differing bits of two 64-bit perceptual hashes up to which they are candidates; -1 leaves the hashes out."""
    verification: VerificationConfig | None = None
    """How a candidate is verified on its thumbnails; without it, the cosine of the descriptors is the similarity."""
    min_similarity: float = Field(default=0.4, ge=-1, le=1)
    """Pairs below are not written; the lowest threshold that a later stage may use."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """With verification: pairs whose descriptors are at least so near are written in any case, for a later stage that
    goes by the cosine (dedup.holdout_cosine)."""
    images_per_shard: int = Field(default=1000, ge=1)
    """Images whose pairs one shard judges. With verification each takes seconds; without, a million is well."""

    @field_validator("search")
    @classmethod
    def _lists_hold_vectors(cls, value: SearchConfig) -> SearchConfig:
        if value.codes == "pq":
            raise ValueError("codes 'pq' are for [retrieve.search]; the join compares the vectors themselves")
        return value


def run(
    config: PairsConfig,
    inputs: RunFolder,
    output: str,
    runner: Runner,
    *,
    replace: bool = False,
    log: RunLog | None = None,
) -> Manifest:
    """Find and judge the pairs among all images of a finished ingest and describe; returns the manifest.

    Its facts are `search`, and `min_similarity`: no pair below it is written.

    Raises InputError when the descriptors are of other images, and ConfigError when they lack thumbnails that
    verification needs, or when the search's recall is too low.
    """
    images, descriptors = inputs.ingest, inputs.describe
    ingested, described = require_manifest(images), require_manifest(descriptors)
    if described.plan.inputs.get("images") != ingested.content_hash:
        raise InputError(f"'{descriptors}' has descriptors of other images than those of '{images}': not of one run.")
    if config.verification and len(described.files("thumbnails")) != len(described.shards):
        raise ConfigError(
            f"'{descriptors}' holds no thumbnails, which verification needs. Set describe.thumbnail_side."
        )
    files = [paths.join(descriptors, name) for name in described.files("vectors")]
    places = _Places(files, [paths.join(descriptors, name) for name in described.files("thumbnails")])
    num_shards = max(1, -(-places.num_rows // config.images_per_shard))
    joined, hashed = step_folder(output, "join"), step_folder(output, "hashes")

    def propose() -> ShardRecord:
        floor = config.min_descriptor_similarity
        neighborhood = Neighborhood(config.search, config.num_neighbors, floor, num_shards)
        self_join.run(neighborhood, files, joined, runner, content_hash=described.content_hash, log=log)
        if config.max_phash_distance >= 0:
            for number, file in enumerate(_hash_pairs(config, images, places, num_shards)):
                parquet.write_row_groups(
                    paths.join(hashed, f"pairs-{number:05d}.parquet"), "bucket", file, self_join.PAIRED.empty_table()
                )
        return ShardRecord(name=PREPARED)

    def facts(done: Sequence[ShardRecord]) -> tuple[dict[str, Any], None]:
        return {"search": require_manifest(joined).facts}, None

    stage = Stage(
        name="pairs",
        config=config,
        inputs={"images": ingested.content_hash, "descriptors": described.content_hash},
        output=output,
        shards=[Shard(f"{bucket:05d}", bucket, places.num_rows // num_shards) for bucket in range(num_shards)],
        make_worker=functools.partial(make_worker, config, places, joined, hashed, output),
        prepare=propose,
        finish=facts,
        facts={"min_similarity": config.min_similarity},
    )
    manifest = run_stage(stage, runner, replace=replace, log=log)
    config.search.require_recall(manifest.facts["search"])  # min_recall may have been raised since
    return manifest


def make_worker(
    config: PairsConfig, places: "_Places", joined: str, hashed: str, output: str
) -> Callable[[Shard], ShardRecord]:
    """A worker that judges the candidates of one range of ids after another."""
    judge = _Judge(config.verification) if config.verification else None

    def process(shard: Shard) -> ShardRecord:
        candidates = _candidates(joined, hashed, shard.work)
        place = np.stack([candidates.column(name).to_numpy() for name in ("place", "other_place")])
        cosine = candidates.column("cosine").to_numpy()
        cosine = np.where(np.isnan(cosine), places.cosine(place, np.isnan(cosine)), cosine).astype(np.float32)
        if judge:
            similarity, differs_locally = judge.compare(place, places.thumbnails(place))
        else:
            similarity, differs_locally = cosine, np.zeros(len(cosine), bool)
        columns = [candidates["image_id"], candidates["other_image_id"], similarity, differs_locally, cosine]
        table = pa.table([*columns, candidates["mutual"]], schema=schemas.PAIRS)
        written = similarity >= config.min_similarity
        if config.min_cosine is not None:
            written |= cosine >= config.min_cosine
        table = table.filter(pa.array(written))
        file = parquet.write_table(paths.join(output, f"pairs-{shard.name}.parquet"), table)
        totals = {"candidates": candidates.num_rows, "pairs": table.num_rows}
        return ShardRecord(name=shard.name, files=(file,), totals=totals)

    return process


class _Places:
    """Where each row of the descriptors lies: a place is its number, counted through all files."""

    def __init__(self, files: Sequence[str], thumbnails: Sequence[str]) -> None:
        self._files, self._thumbnails = files, thumbnails
        self._starts = np.cumsum([0, *(vectors.num_rows(file) for file in files)])
        self.num_rows = int(self._starts[-1])

    def first_of_each(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids (N,), ascending, as bytes, and the first place of each, (N,)."""
        columns = [parquet.read_table_columns(file, ["image_id"]).column(0) for file in self._files]
        ids, first = np.unique(np.concatenate([id_bytes(column) for column in columns]), return_index=True)
        return ids, first

    def cosine(self, place: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """The cosines (P,) of the descriptors at `place` (2, P) where `wanted` (P,), else 0."""
        result = np.zeros(place.shape[1], np.float32)
        if wanted.any():
            rows, pair = np.unique(place[:, wanted], return_inverse=True)
            matrix = np.concatenate([vectors.read_file(file)[1][own] for file, own in self._by_file(self._files, rows)])
            pair = pair.reshape(2, -1)
            result[wanted] = exact.pair_similarity(matrix, pair[0], matrix, pair[1])
        return result

    def thumbnails(self, place: np.ndarray) -> dict[int, bytes]:
        """The thumbnails of the images at some places."""
        found: dict[int, bytes] = {}
        rows = np.unique(place)
        for file, own in self._by_file(self._thumbnails, rows):
            column = parquet.read_table(file, schemas.THUMBNAILS).column("thumbnail").take(pa.array(own))
            found.update(zip(rows[len(found) : len(found) + len(own)].tolist(), column.to_pylist(), strict=True))
        return found

    def _by_file(self, files: Sequence[str], rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Each file with its own rows among the ascending `rows`, where it has any."""
        bounds = np.searchsorted(rows, self._starts)
        for number in np.flatnonzero(np.diff(bounds)):
            yield files[int(number)], rows[bounds[number] : bounds[number + 1]] - self._starts[number]


class _Judge:
    """Verifies pairs on thumbnails, keeping the views of the images seen last."""

    def __init__(self, config: VerificationConfig) -> None:
        self._comparer = ThumbnailComparer(config)
        self._views: OrderedDict[int, PreparedThumbnail] = OrderedDict()

    def compare(self, place: np.ndarray, thumbnails: dict[int, bytes]) -> tuple[np.ndarray, np.ndarray]:
        """For each pair of places (2, P) its similarity, (P,) float32, and whether it differs locally, (P,) bool."""
        likenesses = [
            self._comparer.compare(self._view_of(one, thumbnails), self._view_of(other, thumbnails))
            for one, other in place.T.tolist()
        ]
        similarity = np.array([likeness.similarity for likeness in likenesses], np.float32)
        return similarity, np.array([likeness.differs_locally for likeness in likenesses], bool)

    def _view_of(self, place: int, thumbnails: dict[int, bytes]) -> PreparedThumbnail:
        if place in self._views:
            self._views.move_to_end(place)
            return self._views[place]
        view = self._views[place] = self._comparer.prepare(thumbnails[place])
        if len(self._views) > CACHED_VIEWS:
            self._views.popitem(last=False)
        return view


def _candidates(joined: str, hashed: str, bucket: int) -> pa.Table:
    """self_join.PAIRED of all candidates of one range of ids; the cosine of those by hash alone is NaN."""
    near = self_join.read_bucket(joined, bucket)
    by_hash = [
        parquet.read_row_groups(paths.join(hashed, name), "bucket", bucket, self_join.PAIRED)
        for name in paths.list_names(hashed)
    ]
    table = pa.concat_tables([near, *by_hash])
    one, other = id_bytes(table["image_id"]), id_bytes(table["other_image_id"])
    order = np.lexsort((other, one))  # stable: of equal pairs that of the join comes first
    return table.take(pa.array(order[starts_group(one[order], other[order])]))


def _hash_pairs(
    config: PairsConfig, images: str, places: _Places, num_buckets: int
) -> Iterator[Iterator[tuple[int, pa.Table]]]:
    """The pairs of near perceptual hashes, some at a time, each time by bucket."""
    rows = read_images(images, ["image_id", "phash"])
    known, row = np.unique(id_bytes(rows["image_id"]), return_index=True)
    ids, first = places.first_of_each()
    if missing := sorted(set(known.tolist()).difference(ids.tolist())):
        raise InputError(f"There is no descriptor of image {missing[0].decode()}, which is in '{images}'.")
    phash = rows["phash"].to_numpy()[row[np.searchsorted(known, ids)]]
    del rows, known

    def by_bucket(pairs: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
        low, high = pairs  # ids are sorted, so the smaller row has the smaller id
        count = len(low)
        columns = [id_column(ids[low]), id_column(ids[high]), first[low], first[high]]
        unknown = [np.full(count, np.nan, np.float32), np.zeros(count, bool)]
        table = pa.table([*columns, *unknown], schema=self_join.PAIRED)
        bucket = bucket_of(pack_ids(table["image_id"]), num_buckets)
        for number in np.unique(bucket).tolist():
            yield number, table.take(pa.array(np.flatnonzero(bucket == number)))

    held: list[np.ndarray] = []
    for i, j, _ in pairs_within(phash, config.max_phash_distance):
        held.append(np.sort(np.stack([i, j]), axis=0))
        if sum(part.shape[1] for part in held) >= HASH_PAIRS_PER_FILE:
            yield by_bucket(np.concatenate(held, axis=1))
            held = []
    if held:
        yield by_bucket(np.concatenate(held, axis=1))


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
