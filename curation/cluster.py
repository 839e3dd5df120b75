"""Cluster: spherical k-means over the kept pool, in one level or in a hierarchy.

    cluster/
      centroids-0.npy  ...               (clusters, D) float32, unit length; level 0 is the finest
      parents-0.npy  ...                 (clusters,) int64: which cluster of level 1 each of level 0 is in
      assignments-00000.parquet  ...     schemas.ASSIGNMENTS: the kept pool images, one file per shard of ingest; a file
                                         holds all rows of level 0, then all of level 1, ...
      manifest.json                      its facts hold the objectives and the sizes of the clusters

Level 0 clusters the vectors; each further level clusters the centroids of the level below (Vo et al., "Automatic data
curation for self-supervised learning: a clustering-based approach", 2024). On level 0 an image belongs to the cluster
with the nearest centroid. On each further level it belongs to the parent of its cluster.

Most images lie in a few dense regions, and plain k-means puts most centroids there. Resampling (the same paper) spreads
the centroids more evenly: it draws the same number of points from each cluster and runs k-means on these points.

Memory, for K clusters of a level: a worker holds the centroids, float64 sums of the same shape, a block of points, and
4 bytes per point of a part. The driver holds four matrices (K, D), twice the points drawn from the clusters at 16 bytes
each, and at the start kmeans.START_POINTS_PER_CLUSTER x K points. Nothing grows with the pool. Disk, until the stage is
done: a copy of the training points, and a matrix (K, D) float64 per part.

    .progress/
      count/  points/                    the number of points; the training points, one file per shard
      level-0/round-0/                   the k-means of level 0; each resampling is one more round
        state.npy                        the current centroids, and the objectives so far
        start/                           the sample for the first centroids
        iteration-00000/                 the sums of each part; deleted when the iteration is done
        guesses/                         the cluster of each point in the previous iteration, for speed
      level-0/round-1/candidates/  drawn/  ...

    python -m curation.cluster --config CONFIG.toml --images ingest/ --dedup dedup/ --vectors embed/ --output cluster/
"""

import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from curation.config import Settings
from curation.engine import command, progress
from curation.engine.manifest import PROGRESS_NAME, Manifest, ShardRecord, require_manifest, step_folder
from curation.engine.run_log import Log
from curation.engine.runner import InlineRunner, Runner, Shard
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import ConfigError, InputError
from curation.files import npy, parquet, paths, schemas
from curation.files.paths import FileRecord
from curation.run_folder import RunFolder, kept_inputs, kept_shards, read_centroids, read_kept, read_parents
from curation.search import exact, kmeans
from curation.search.kmeans import Reduction
from curation.stage_command import stage_command

# Points read at a time. Measured (D 384, 4,096 clusters): half as many take an eighth more time and save 70 MB.
BLOCK_ROWS = 32_768
# Between two saves of a k-means that runs in the driver alone. Assumed: little work to lose, little time for saving.
SECONDS_BETWEEN_SAVES = 30.0
STATE_NAME = "state.npy"


class ResamplingConfig(Settings):
    """Resampling, which spreads the centroids of a level more evenly."""

    num_rounds: int = Field(ge=1)
    """Rounds of drawing points and clustering them (10 in the paper)."""
    sample_size: int = Field(ge=1)
    """Maximum points drawn from each cluster (about half of the mean cluster size in the paper)."""
    draw: Literal["closest", "random"] = "closest"
    """Points drawn from a cluster: the closest to its centroid, or random ones."""


class LevelConfig(Settings):
    """The k-means of one level."""

    num_clusters: int | None = Field(default=None, ge=1)
    """Clusters (100,000 over 744 million images in DINOv2; 10 million to 10,000 in four levels in Vo et al.). Left out,
    which a single level allows, the rounded square root of the number of kept pool images."""
    num_iterations: int = Field(default=25, ge=1)
    """Maximum iterations of k-means (25 is faiss's default; DINOv2 states none; 50 in Vo). It stops when nothing
    changes."""
    start: Literal["random", "k_means++"] = "k_means++"
    """First centroids: random points, or points far apart (k-means++)."""
    resampling: ResamplingConfig | None = None
    """Resampling of the level; none when left out."""

    @property
    def size(self) -> int:
        """The number of clusters, where the config gives it or `ClusterConfig.resolved` has filled it in."""
        assert self.num_clusters is not None
        return self.num_clusters


class ClusterConfig(Settings):
    """The levels of clusters, and their training points."""

    levels: tuple[LevelConfig, ...] = Field(default=(LevelConfig(),), min_length=1)
    """The finest level first. Each clusters the centroids of the level before, so it has fewer clusters."""
    max_points_per_centroid: int | None = Field(default=None, ge=1)
    """Approximate images per cluster in the sample that trains level 0; all images when left out."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sample, the first centroids and the random draws."""
    rows_per_part: int = Field(default=262_144, ge=1)
    """Points that one worker processes at a time. The driver itself clusters points that fit into one part."""

    @field_validator("levels")
    @classmethod
    def _levels_decrease(cls, value: tuple[LevelConfig, ...]) -> tuple[LevelConfig, ...]:
        sizes = [level.num_clusters for level in value if level.num_clusters is not None]
        if 1 < len(value) != len(sizes):
            raise ValueError("of several levels, each needs num_clusters")
        if any(above >= below for below, above in itertools.pairwise(sizes)):
            raise ValueError(f"each level must have fewer clusters than the one before; num_clusters are {sizes}")
        return value

    def resolved(self, num_kept: int) -> "ClusterConfig":
        """The config with the number of clusters for `num_kept` pool images, where it is left out."""
        if self.levels[0].num_clusters is not None:
            return self
        num_clusters = max(1, round(num_kept**0.5))
        return self.model_copy(update={"levels": (self.levels[0].model_copy(update={"num_clusters": num_clusters}),)})


@dataclass(frozen=True)
class PointFile:
    """Points on disk: a `.npy` file of (rows, D) float16 or float32."""

    path: str
    rows: int


@dataclass(frozen=True)
class Part:
    """Consecutive points, which may lie in several files."""

    name: str
    first: int  # number of the first point among all points
    pieces: tuple[tuple[str, int, int], ...]  # path, first row and end row in each file

    @property
    def rows(self) -> int:
        return sum(end - begin for _, begin, end in self.pieces)


@dataclass(frozen=True)
class State:
    """The progress of a k-means."""

    centroids: np.ndarray  # (K, D) float32
    objectives: list[float]  # mean cosine of the points to their centroids in each iteration so far
    done: bool


def run(
    config: ClusterConfig, inputs: RunFolder, output: str, runner: Runner, *, replace: bool = False, log: Log = None
) -> Manifest:
    """Cluster the kept pool images; returns the manifest. Raises ConfigError for more clusters than images."""
    counts = [record.totals["accepted"] for record in require_manifest(inputs.ingest).shards]
    shards = [
        Shard(f"{number:05d}", shard, count)
        for number, (shard, count) in enumerate(zip(kept_shards(inputs), counts, strict=True))
    ]
    # Clustering the points of a single part takes less time than starting workers.
    is_small = sum(counts) <= config.rows_per_part
    steps = _Steps(config, InlineRunner() if is_small else runner, log)
    stage = Stage(
        name="cluster",
        config=config,
        inputs={**kept_inputs(inputs), "vectors": require_manifest(inputs.embed).content_hash},
        output=output,
        shards=shards,
        make_worker=functools.partial(make_worker, output, len(config.levels)),
        prepare=functools.partial(_train, steps, shards, output),
        finish=functools.partial(_finish, config, output),
    )
    return run_stage(stage, runner, replace=replace, log=log)


@dataclass(frozen=True)
class _Steps:
    """Runs the steps of this stage. Each is a stage of its own in the progress folder."""

    config: ClusterConfig
    runner: Runner
    log: Log

    def over_shards(
        self,
        folder: str,
        make_worker: Callable[[], Callable[[Shard], ShardRecord]],
        shards: list[Shard],
        unit: str = "images",
    ) -> Sequence[ShardRecord]:
        """Run a step in `folder`, named by its path below the progress folder; returns its records."""
        stage = Stage(
            name="cluster " + folder.rpartition(f"/{PROGRESS_NAME}/")[2],
            config=self.config,
            inputs={},
            output=folder,
            shards=shards,
            make_worker=make_worker,
            unit=unit,
        )
        return run_stage(stage, self.runner, log=self.log).shards

    def over_parts(
        self,
        points: tuple[PointFile, ...],
        folder: str,
        make_worker: Callable[[], Callable[[Shard], ShardRecord]],
    ) -> Sequence[ShardRecord]:
        """Run a step over the parts of `points`; returns its records. A single part runs here, without a stage."""
        shards = [Shard(part.name, part, part.rows) for part in cut(points, self.config.rows_per_part)]
        if len(shards) == 1:
            return [make_worker()(shards[0])]
        return self.over_shards(folder, make_worker, shards, unit="points")


def make_worker(output: str, num_levels: int) -> Callable[[Shard], ShardRecord]:
    """Make a worker that assigns the kept pool images of each shard to their clusters on every level."""
    centroids = [read_centroids(output, level) for level in range(num_levels)]
    parents = [read_parents(output, level) for level in range(num_levels - 1)]

    def process(shard: Shard) -> ShardRecord:
        image_ids, matrix = read_kept(shard.work, role="pool")
        cluster, similarity = exact.assign(matrix, centroids[0])
        tables = []
        for level in range(num_levels):
            if level > 0:
                cluster = parents[level - 1][cluster]
                similarity = exact.pair_similarity(matrix, np.arange(len(matrix)), centroids[level], cluster)
            columns = {
                "image_id": image_ids,
                "level": np.full(len(image_ids), level, np.int32),
                "cluster_id": cluster.astype(np.int32),
                "similarity": np.clip(similarity, -1, 1),  # lengths are rounded
            }
            tables.append(pa.table(columns, schema=schemas.ASSIGNMENTS))
        file = parquet.write_table(paths.join(output, f"assignments-{shard.name}.parquet"), pa.concat_tables(tables))
        return ShardRecord(name=shard.name, files=(file,), totals={"assigned": len(image_ids)})

    return process


def _train(steps: _Steps, shards: list[Shard], output: str) -> ShardRecord:
    """Train the centroids of every level; writes them and the parents."""
    num_kept, points = _training_points(steps, shards, output)
    steps = dataclasses.replace(steps, config=steps.config.resolved(num_kept))
    config = steps.config
    num_points = sum(file.rows for file in points)
    if (num_clusters := config.levels[0].size) > num_points:
        for step in ("count", "points"):  # so that a corrected config needs no --replace
            paths.delete(step_folder(output, step))
        which = "were kept" if config.max_points_per_centroid is None else "are in the training sample"
        if not num_points:
            raise InputError(
                f"cluster: there is nothing to cluster, because no pool images {which}. Dedup dropped them all, as "
                "copies of seeds or for the holdout (dedup/duplicates-*.parquet has the match of each). Give a pool of "
                "other images."
            )
        raise ConfigError(
            f"cluster.levels.0.num_clusters is {num_clusters:,}, but only {num_points:,} pool images {which}. "
            f"Leave it out, or set it to {num_points:,} or less; finished stages are kept."
        )
    files: list[FileRecord] = []
    below: np.ndarray | None = None
    for number, level in enumerate(config.levels):
        centroids = _train_level(steps, number, points, step_folder(output, f"level-{number}"))
        path = paths.join(output, f"centroids-{number}.npy")
        files.append(npy.write_arrays(path, centroids))
        if below is not None:
            parents = exact.assign(below, centroids)[0]
            files.append(npy.write_arrays(paths.join(output, f"parents-{number - 1}.npy"), parents))
        points, below = (PointFile(path, level.size),), centroids
    return ShardRecord(name=PREPARED, files=tuple(files))


def _training_points(steps: _Steps, shards: list[Shard], output: str) -> tuple[int, tuple[PointFile, ...]]:
    """The number of kept pool images, and the vectors of them, or of a sample, in files that are fast to read."""
    config, share, num_kept = steps.config, 1.0, None
    if config.max_points_per_centroid is not None:
        counts = steps.over_shards(step_folder(output, "count"), _make_counter, shards)
        num_kept = sum(record.totals["points"] for record in counts)
        share = config.max_points_per_centroid * config.resolved(num_kept).levels[0].size / max(num_kept, 1)
    folder = step_folder(output, "points")
    make = functools.partial(_make_extractor, folder, config.seed, share)
    points = _point_files(folder, steps.over_shards(folder, make, shards))
    return sum(file.rows for file in points) if num_kept is None else num_kept, points


def _make_counter() -> Callable[[Shard], ShardRecord]:
    def process(shard: Shard) -> ShardRecord:
        return ShardRecord(name=shard.name, totals={"points": len(read_kept(shard.work, role="pool")[0])})

    return process


def _make_extractor(folder: str, seed: int, share: float) -> Callable[[Shard], ShardRecord]:
    def process(shard: Shard) -> ShardRecord:
        image_ids, matrix = read_kept(shard.work, role="pool")
        if share < 1:
            matrix = matrix[[_fraction(seed, image_id) < share for image_id in image_ids]]
        return _write_points(folder, shard.name, matrix)

    return process


def _fraction(seed: int, image_id: str) -> float:
    """A number in [0, 1) that depends only on the seed and the image."""
    return int.from_bytes(hashlib.sha256(f"cluster:{seed}:{image_id}".encode()).digest()[:7], "big") / 2**56


def _train_level(steps: _Steps, number: int, points: tuple[PointFile, ...], folder: str) -> np.ndarray:
    """Train the centroids of a level on `points`: one k-means, and one more on the points of each resampling."""
    config = steps.config
    level = config.levels[number]
    state: State | None = None
    for round_number in range(1 + (level.resampling.num_rounds if level.resampling else 0)):
        round_folder = paths.join(folder, f"round-{round_number}")
        following = _read_state(round_folder)
        if following is None or not following.done:
            seed = int(np.random.SeedSequence([config.seed, number, round_number]).generate_state(1)[0])
            drawn = points
            if round_number > 0:
                previous_folder = paths.join(folder, f"round-{round_number - 1}")
                drawn = _resample(steps, number, points, previous_folder, seed, round_folder)
            following = _run_kmeans(steps, level, drawn, following, seed, round_folder)
            progress.say(
                f"cluster: level {number}, round {round_number}: {level.size:,} clusters of "
                f"{sum(file.rows for file in drawn):,} points, {len(following.objectives)} iterations, "
                f"mean cosine {following.objectives[-1]:.4f}"
            )
            for step in ("candidates", "drawn", "start", "guesses"):
                paths.delete(paths.join(round_folder, step))
        state = following
    assert state is not None
    return state.centroids


def _run_kmeans(
    steps: _Steps,
    level: LevelConfig,
    points: tuple[PointFile, ...],
    state: State | None,
    seed: int,
    folder: str,
) -> State:
    """Run k-means over `points`, from `state` if there is one; saves its state in `folder`."""
    rows_per_part = steps.config.rows_per_part
    parts = cut(points, rows_per_part)
    num_points = sum(part.rows for part in parts)
    if state is None:
        rows = kmeans.start_rows(num_points, level.size, level.start, seed)
        sample_files = _take(steps, points, rows, paths.join(folder, "start"))
        sample = np.concatenate([block for part in cut(sample_files, rows_per_part) for block in read_blocks(part)])
        with progress.step("cluster", f"choosing {level.size:,} first centroids"):
            state = State(kmeans.initial_centroids(sample, level.size, level.start, seed), [], False)
        del sample
        _write_state(folder, state)
    guess: np.ndarray | None = None
    objectives = list(state.objectives)

    def reduce_all(centroids: np.ndarray) -> Reduction:
        nonlocal guess
        if len(parts) == 1:
            text = (
                f"k-means, {level.num_clusters:,} clusters, iteration {len(objectives) + 1} of {level.num_iterations}"
            )
            with progress.step("cluster", text):
                reduction, guess = kmeans.reduce_points(read_blocks(parts[0]), centroids, guess=guess)
            return reduction
        step = paths.join(folder, f"iteration-{len(objectives):05d}")
        records = steps.over_parts(points, step, functools.partial(_make_reducer, folder, step))
        return kmeans.merge(_read_reduction(paths.join(step, record.files[0].name)) for record in records)

    saved_at = time.monotonic()
    num_left = level.num_iterations - len(objectives)
    for centroids, objective, settled in kmeans.lloyd(state.centroids, num_left, reduce_all):
        objectives.append(objective / num_points)
        state = State(centroids, list(objectives), settled or len(objectives) == level.num_iterations)
        if len(parts) > 1 or state.done or time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES:
            _write_state(folder, state)
            saved_at = time.monotonic()
        paths.delete(paths.join(folder, f"iteration-{len(objectives) - 1:05d}"))
    return state


def _make_reducer(folder: str, step: str) -> Callable[[Shard], ShardRecord]:
    """Make a worker that reduces each part by the saved centroids of the k-means in `folder`."""
    centroids = npy.read_array(paths.join(folder, STATE_NAME))

    def process(shard: Shard) -> ShardRecord:
        guess_path = paths.join(folder, "guesses", f"{shard.name}.npy")
        guess = npy.read_array(guess_path) if paths.exists(guess_path) else None
        reduction, clusters = kmeans.reduce_points(read_blocks(shard.work), centroids, guess=guess)
        arrays = (reduction.sums, reduction.counts, np.array(reduction.objective))
        file = npy.write_arrays(paths.join(step, f"reduction-{shard.name}.npy"), *arrays)
        npy.write_arrays(guess_path, clusters)  # only speeds up the next iteration, so any iteration's will do
        return ShardRecord(name=shard.name, files=(file,))

    return process


def _resample(
    steps: _Steps,
    number: int,
    points: tuple[PointFile, ...],
    previous_folder: str,
    seed: int,
    folder: str,
) -> tuple[PointFile, ...]:
    """Draw points from each cluster of the k-means in `previous_folder`. Raises ConfigError for too few points."""
    level = steps.config.levels[number]
    resampling, num_clusters = level.resampling, level.size
    assert resampling is not None
    step = paths.join(folder, "candidates")
    make = functools.partial(_make_drawer, resampling, previous_folder, seed, step)
    best = kmeans.Drawn.none()
    for record in steps.over_parts(points, step, make):
        more = kmeans.Drawn(*npy.read_arrays(paths.join(step, record.files[0].name), 3))
        best = kmeans.draw(best, more, resampling.sample_size)
    if len(best.row) < num_clusters:
        raise ConfigError(
            f"cluster.levels.{number}.resampling.sample_size is {resampling.sample_size:,}, which draws "
            f"{len(best.row):,} points from the {len(np.unique(best.cluster)):,} clusters that are not empty; these "
            f"are too few points for {num_clusters:,} clusters. Raise it, or leave resampling out."
        )
    return _take(steps, points, np.sort(best.row), paths.join(folder, "drawn"))


def _make_drawer(
    resampling: ResamplingConfig, previous_folder: str, seed: int, step: str
) -> Callable[[Shard], ShardRecord]:
    """Make a worker that draws points of each part from their clusters."""
    centroids = npy.read_array(paths.join(previous_folder, STATE_NAME))

    def process(shard: Shard) -> ShardRecord:
        row, best = shard.work.first, kmeans.Drawn.none()
        for block in read_blocks(shard.work):
            cluster, key = exact.assign(block, centroids)
            if resampling.draw == "random":
                # The n-th point gets the n-th number of the generator, so the cut into parts changes nothing.
                bits = np.random.PCG64(np.random.SeedSequence([seed, 2])).advance(row)
                key = np.random.Generator(bits).random(len(block)).astype(np.float32)
            more = kmeans.Drawn(cluster, key, np.arange(row, row + len(block)))
            best = kmeans.draw(best, more, resampling.sample_size)
            row += len(block)
        path = paths.join(step, f"candidates-{shard.name}.npy")
        return ShardRecord(name=shard.name, files=(npy.write_arrays(path, best.cluster, best.key, best.row),))

    return process


def _take(steps: _Steps, points: tuple[PointFile, ...], rows: np.ndarray, folder: str) -> tuple[PointFile, ...]:
    """Copy the points with the given ascending `rows` into files in `folder`."""
    rows_path = folder + "-rows.npy"
    npy.write_arrays(rows_path, rows)
    records = steps.over_parts(points, folder, functools.partial(_make_taker, rows_path, folder))
    paths.delete(rows_path)
    return _point_files(folder, records)


def _make_taker(rows_path: str, folder: str) -> Callable[[Shard], ShardRecord]:
    rows = npy.read_array(rows_path)

    def process(shard: Shard) -> ShardRecord:
        part = shard.work
        rows_in_part = rows[slice(*np.searchsorted(rows, (part.first, part.first + part.rows)))] - part.first
        return _write_points(folder, shard.name, kmeans.take(read_blocks(part), rows_in_part))

    return process


def cut(points: Sequence[PointFile], rows_per_part: int) -> list[Part]:
    """Cut all points into parts of `rows_per_part`; the last part may be smaller."""
    parts: list[Part] = []
    pieces: list[tuple[str, int, int]] = []
    first = num_rows = 0  # of the part under way
    for file in points:
        begin = 0
        while begin < file.rows:
            end = min(file.rows, begin + rows_per_part - num_rows)
            pieces.append((file.path, begin, end))
            num_rows, begin = num_rows + end - begin, end
            if num_rows == rows_per_part:
                parts.append(Part(f"{len(parts):05d}", first, tuple(pieces)))
                first, num_rows, pieces = first + num_rows, 0, []
    if pieces:
        parts.append(Part(f"{len(parts):05d}", first, tuple(pieces)))
    return parts


def read_blocks(part: Part) -> Iterator[np.ndarray]:
    """The points of a part in blocks (n, D) of BLOCK_ROWS; the last block may be smaller."""
    pending: list[np.ndarray] = []
    num_pending = 0
    for path, begin, end in part.pieces:
        with paths.open_read(path) as file:
            (_, width), _, dtype = npy.read_header(file)
            file.seek(begin * width * dtype.itemsize, 1)
            while begin < end:
                count = min(end - begin, BLOCK_ROWS - num_pending)
                pending.append(np.frombuffer(file.read(count * width * dtype.itemsize), dtype).reshape(count, width))
                num_pending, begin = num_pending + count, begin + count
                if num_pending == BLOCK_ROWS:
                    yield np.concatenate(pending)
                    pending, num_pending = [], 0
    if pending:
        yield np.concatenate(pending)


def _finish(config: ClusterConfig, output: str, records: Sequence[ShardRecord]) -> tuple[dict[str, Any], None]:
    """The facts of each level: the objectives of each k-means, and the sizes of its clusters."""
    num_levels = len(config.levels)
    config = config.resolved(sum(record.totals.get("assigned", 0) for record in records))
    counts = np.zeros(config.levels[0].size, np.int64)
    similarity, num_images = np.zeros(num_levels), 0
    for record in records:
        for file in record.files:
            if not file.name.startswith("assignments-"):
                continue
            columns = ["level", "cluster_id", "similarity"]
            table = parquet.read_table(paths.join(output, file.name), schemas.ASSIGNMENTS, columns)
            level, cluster, value = (table.column(name).to_numpy() for name in columns)
            counts += np.bincount(cluster[level == 0], minlength=len(counts))
            num_images += int((level == 0).sum())
            similarity += [value[level == number].sum(dtype=np.float64) for number in range(num_levels)]
    levels = []
    for number, settings in enumerate(config.levels):
        if number > 0:
            parents = read_parents(output, number - 1)
            counts = np.bincount(parents, counts, settings.size).astype(np.int64)
        sizes = np.sort(counts)
        rounds = settings.resampling.num_rounds if settings.resampling else 0
        folder = step_folder(output, f"level-{number}")
        states = [_read_state(paths.join(folder, f"round-{round_number}")) for round_number in range(1 + rounds)]
        levels.append(
            {
                "mean_cosine": float(similarity[number] / num_images),
                "smallest_cluster": int(sizes[0]),
                "median_cluster": int(sizes[len(sizes) // 2]),
                "largest_cluster": int(sizes[-1]),
                "empty_clusters": int((sizes == 0).sum()),
                "objectives": [state.objectives for state in states if state is not None],
            }
        )
    return {"levels": levels}, None


def _read_state(folder: str) -> State | None:
    path = paths.join(folder, STATE_NAME)
    if not paths.exists(path):
        return None
    centroids, objectives, done = npy.read_arrays(path, 3)
    return State(centroids, objectives.tolist(), bool(done))


def _write_state(folder: str, state: State) -> None:
    path = paths.join(folder, STATE_NAME)
    npy.write_arrays(path, state.centroids, np.array(state.objectives, np.float64), np.array(state.done))


def _read_reduction(path: str) -> Reduction:
    sums, counts, objective = npy.read_arrays(path, 3)
    return Reduction(sums, counts, float(objective))


def _write_points(folder: str, name: str, matrix: np.ndarray) -> ShardRecord:
    file = npy.write_arrays(paths.join(folder, f"points-{name}.npy"), matrix)
    return ShardRecord(name=name, files=(file,), totals={"points": len(matrix)})


def _point_files(folder: str, records: Sequence[ShardRecord]) -> tuple[PointFile, ...]:
    return tuple(PointFile(paths.join(folder, record.files[0].name), record.totals["points"]) for record in records)


command_line = stage_command(
    "cluster", ClusterConfig, run, "Cluster the kept pool images.", reads=("ingest", "dedup", "embed")
)


if __name__ == "__main__":
    from curation import cluster  # by its real name, or its classes would exist twice

    command.main(cluster.command_line)
