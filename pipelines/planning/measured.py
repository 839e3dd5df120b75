"""Prices a run by the times of a finished one: of a sample of the same pool, or of another pool like it.

The log of the finished run gives the seconds of each shard. Three parts of a stage grow differently:

    start-up                from the beginning of the stage to its first shard: processes start, models load. Constant
    work of shards          grows with the images of the shards, or with another amount of work, below
    work of the driver      for k-means and the search: grows with its amount of work

    stage                           amount of work
    ingest, embed, describe, dedup  images
    pairs                           candidate copies and the cost of one (candidates.py)
    pairs/features                  images
    pairs/join, exact               pairs of images
    cluster, its k-means            points x clusters x iterations
    retrieve, its search            kept pool images
    corpus                          rows

A part of some milliseconds is mostly constant. So work that grows faster than the images is priced twice, in proportion
and by the fixed rate of rates.py for the additional work, and the smaller price counts.
"""

import heapq
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from curation.config import load
from curation.embed import one_pass_serves
from curation.engine import run_log
from curation.engine.manifest import Manifest, require_manifest
from curation.engine.run_log import BeginLine, EndLine, ShardLine
from curation.errors import InputError
from curation.files import parquet, paths, schemas
from curation.images.sources import NOT_SAMPLED
from curation.report.self_check import COPIES_PER_SHARD
from curation.run_folder import STAGES, RunFolder, require_run
from pipelines.main_path import CurateConfig
from pipelines.planning import candidates
from pipelines.planning.candidates import VerificationCost
from pipelines.planning.price import TERA, Counts, prepared_images, price_run, self_check_copies
from pipelines.planning.rates import FIXED

CONFIG_NAME = "run.toml"
# Settings that change no time of an image, so that they may differ from those of the measured run.
WITHOUT_EFFECT = (
    "demo_data",
    "report",
    "stated_counts",
    "stated_clusters",
    "rates",
    "ingest.sample_pool",
    "ingest.sources",
    "ingest.max_reject_fraction",
    "ingest.max_poison_shards",
    "pack.dataset_weights",
    "pack.mix",
    "pack.seed",
    "pack.temperature",
    "dedup",
)
# Shards that are scheduled one by one; with more, the last ones no longer matter.
MAX_SCHEDULED = 20_000


@dataclass
class StepTimes:
    """The times of a stage or of a step of one, in seconds since 1970."""

    begun: float
    workers: int
    ended: float = 0.0
    shards: list[ShardLine] = field(default_factory=list)

    @property
    def busy(self) -> float:
        """Worker seconds of all shards."""
        return sum(shard.seconds for shard in self.shards)

    @property
    def items(self) -> int:
        """Images of all shards."""
        return sum(shard.items for shard in self.shards)

    @property
    def first_shard(self) -> float:
        """The time at which the first shard began; the end of the stage where there is none."""
        return min(map(_started, self.shards), default=self.ended)

    @property
    def seconds(self) -> float:
        """From the beginning to the end."""
        return self.ended - self.begun

    def seconds_of_image(self) -> tuple[float, float]:
        """The worker seconds of an image, and the additional seconds of the first shard of a worker.

        In its first shard a worker starts its processes and allocates its memory. Where most images lie in first
        shards, the two parts cannot be told apart, and the second is 0.
        """
        first: dict[str, ShardLine] = {}
        for shard in sorted(self.shards, key=_started):
            first.setdefault(shard.worker, shard)
        items, busy = sum(each.items for each in first.values()), sum(each.seconds for each in first.values())
        if self.items - items < self.items / 2:
            return self.busy / max(1, self.items), 0.0
        rate = (self.busy - busy) / (self.items - items)
        return rate, max(0.0, busy - rate * items) / len(first)


def _started(shard: ShardLine) -> float:
    return shard.time - shard.seconds if shard.started is None else shard.started


@dataclass(frozen=True)
class Measurements:
    """A finished run: its times, its counts and its config."""

    run: str
    config: CurateConfig
    steps: Mapping[str, StepTimes]
    """The times of each stage and step, by name, such as `pairs/join`."""
    manifests: Mapping[str, Manifest]
    read: Mapping[str, int]
    """Images of each source that ingest read, with the rejected ones."""
    accepted: Mapping[str, int]
    """Accepted images of each source."""

    @property
    def date(self) -> str:
        """The day on which the run began, in UTC."""
        return time.strftime("%Y-%m-%d", time.gmtime(min(step.begun for step in self.steps.values())))

    @property
    def seconds(self) -> float:
        """The time of all stages."""
        return sum(self.steps[stage].seconds for stage in STAGES)


@dataclass(frozen=True)
class StageEstimate:
    """The predicted time of a stage."""

    stage: str
    images: float
    start_seconds: float
    """Part of `seconds` that does not depend on the images."""
    seconds: float
    measured_images: int
    measured_seconds: float
    note: str = ""


def read_measurements(run: str) -> Measurements:
    """The times and counts of a finished run. Raises InputError for a run that is not finished, or has no log."""
    require_run(run)
    manifests = {stage: require_manifest(paths.join(run, stage)) for stage in STAGES}
    steps = _read_steps(run)
    if missing := [stage for stage in STAGES if stage not in steps or not steps[stage].ended]:
        raise InputError(
            f"--rates-from '{run}': its log has no times of {', '.join(missing)}. Give a run that went from the first "
            "stage to the last without a stop."
        )
    read: dict[str, int] = {}
    accepted: dict[str, int] = {}
    folder = RunFolder.of(run)
    ingested = manifests["ingest"]
    for kind, schema, counts in (("images", schemas.IMAGES, accepted), ("rejects", schemas.REJECTS, read)):
        for file in ingested.paths(folder.ingest, kind):
            for name in parquet.read_table(file, schema, ["source"]).column("source").to_pylist():
                counts[name] = counts.get(name, 0) + 1
    for name, count in accepted.items():
        read[name] = read.get(name, 0) + count
    config = load(CurateConfig, paths.join(run, CONFIG_NAME))
    return Measurements(run, config, steps, manifests, read, accepted)


def _read_steps(run: str) -> dict[str, StepTimes]:
    """The times of each step in its last straight run. A stage that several drivers worked on is left out."""
    steps: dict[str, StepTimes] = {}
    for line in run_log.read_lines(run):
        match line:
            case BeginLine():
                steps.pop(line.stage, None)
                if not line.done_before:
                    steps[line.stage] = StepTimes(line.time, max(1, line.workers))
            case ShardLine() if line.stage in steps:
                steps[line.stage].shards.append(line)
            case EndLine() if line.stage in steps:
                steps[line.stage].ended = line.time
    return steps


def differing_settings(config: CurateConfig, measured: CurateConfig) -> list[str]:
    """One text for each setting that changes the time of an image and differs: its name, here and there."""
    here, there = (dict(_flat(each.model_dump(mode="json"))) for each in (config, measured))
    return [
        f"{name} = {here.get(name)} here, {there.get(name)} there"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name) and not any((name + ".").startswith(each + ".") for each in WITHOUT_EFFECT)
    ]


def _flat(values: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), values


def estimate_stages(
    config: CurateConfig, counts: Counts, rows: int | None, measured: Measurements, *, workers: int
) -> list[StageEstimate]:
    """The predicted times of all stages on `workers` workers of the machine that was measured."""
    whole = _Whole(config, counts, measured, workers)
    by_stage = {
        "ingest": _estimate_ingest(whole),
        "embed": _estimate_by_images(whole, "embed"),
        "describe": _estimate_describe(whole),
        "pairs": _estimate_pairs(whole),
        "self_check": _estimate_self_check(whole),
        "dedup": _estimate_by_images(whole, "dedup"),
        "cluster": _estimate_cluster(whole),
        "retrieve": _estimate_retrieve(whole),
        "corpus": _estimate_corpus(whole, rows),
        "images": _estimate_by_images(whole, "images"),
    }
    others = [name for name in measured.steps if "/" not in name and name not in by_stage]
    return [*by_stage.values(), *(_estimate_by_images(whole, name) for name in others)]


class _Whole:
    """The amounts of work of the whole, relative to the measured run."""

    def __init__(self, config: CurateConfig, counts: Counts, measured: Measurements, workers: int) -> None:
        self.config, self.counts, self.measured, self.workers = config, counts, measured, workers
        share = config.ingest.sample_pool
        self.images = {
            source.name: round(counts.of_source.get(source.name, 0) * (share if source.role == "pool" else 1))
            for source in config.ingest.sources
        }
        roles = {source.name: source.role for source in config.ingest.sources}
        by_role = {role: self._growth([name for name in roles if roles[name] == role]) for role in set(roles.values())}
        self.growth_of_source = {
            name: self._growth([name]) if measured.read.get(name) else by_role[role] for name, role in roles.items()
        }
        """Images of each source, divided by those in the measured run; of a new source, that of its role."""
        self.accepted = sum(
            self.images[name] * measured.accepted.get(name, 0) / measured.read[name]
            if measured.read.get(name)
            else self.images[name]
            for name in self.images
        )
        self.measured_accepted = sum(measured.accepted.values())
        pool = [name for name, role in roles.items() if role == "pool"]
        self.pool_growth = self._growth(pool)

    def _growth(self, names: Sequence[str]) -> float:
        measured = sum(self.measured.read.get(name, 0) for name in names)
        return sum(self.images[name] for name in names) / measured if measured else 1.0

    @property
    def growth(self) -> float:
        """Accepted images, divided by those of the measured run."""
        return self.accepted / max(1, self.measured_accepted)

    def shard_sizes(self) -> list[float]:
        """Images of each shard of ingest."""
        sizes: list[float] = []
        for source in self.config.ingest.sources:
            images = self.images[source.name]
            counted = self.counts.counted.get(source.name)
            if source.layout == "folder" or counted is None:
                per_shard = self.config.ingest.images_per_shard if source.layout == "folder" else FIXED.images_per_tar
                full, rest = divmod(images, per_shard)
                sizes += [per_shard] * full + [rest] * bool(rest)
            else:
                sizes += [images / max(1, counted.num_files)] * counted.num_files
        return sizes


def makespan(sizes: Sequence[float], workers: int) -> float:
    """The time of `workers` that take the shards in order, each as soon as it is free. A size is in seconds."""
    if len(sizes) > MAX_SCHEDULED:
        return sum(sizes) / workers
    free = [0.0] * workers
    for size in sizes:
        heapq.heapreplace(free, free[0] + size)
    return max(free, default=0.0)


def grown(seconds: float, work: float, measured_work: float, seconds_per_work: float) -> float:
    """`seconds` for `measured_work`, extended to `work`: in proportion, or by a rate, where that is less.

    The smaller price, because a short time is mostly constant.
    """
    if not measured_work or work <= measured_work:
        return seconds
    return min(seconds * work / measured_work, seconds + (work - measured_work) * seconds_per_work)


def _start(step: StepTimes) -> float:
    return max(0.0, step.first_shard - step.begun)


def _tail(step: StepTimes) -> float:
    return max(0.0, step.ended - max((shard.time for shard in step.shards), default=step.ended))


def _estimate_by_images(whole: _Whole, stage: str, seconds_less: float = 0.0) -> StageEstimate:
    """seconds_less: of the work of each image, that the whole does not have."""
    step = whole.measured.steps[stage]
    workers = whole.workers if step.workers > 1 else 1  # the driver does the work of dedup
    sizes = whole.shard_sizes()
    share = whole.accepted / max(1.0, sum(sizes))
    rate, warm_up = step.seconds_of_image()
    seconds = makespan([size * share for size in sizes], workers) * max(rate / 2, rate - seconds_less)
    start = _start(step) + _tail(step) + warm_up
    return StageEstimate(stage, whole.accepted, start, start + seconds, step.items, step.seconds)


def _estimate_ingest(whole: _Whole) -> StageEstimate:
    """Images that the sample leaves out of tars cost their headers, which the whole does not pay a second time."""
    skipped = whole.measured.manifests["ingest"].totals.get(NOT_SAMPLED, 0)
    images = max(1, whole.measured.steps["ingest"].items)
    return _estimate_by_images(whole, "ingest", skipped * FIXED.header_seconds / images)


def _estimate_describe(whole: _Whole) -> StageEstimate:
    """Made in the pass of embed it costs next to nothing; alone, about as much as embed (assumed)."""
    step = whole.measured.steps["describe"]
    is_shared = one_pass_serves(whole.config.embed, whole.config.describe)
    was_shared = any(shard.ready for shard in step.shards)
    if is_shared and not was_shared:
        return StageEstimate("describe", whole.accepted, 0.0, 0.0, step.items, step.seconds)
    if was_shared and not is_shared:
        alone = _estimate_by_images(whole, "embed")
        return replace(alone, stage="describe", measured_images=step.items, measured_seconds=step.seconds)
    return _estimate_by_images(whole, "describe")


def _estimate_pairs(whole: _Whole) -> StageEstimate:
    measured, config = whole.measured, whole.config.pairs
    stage, manifest = measured.steps["pairs"], measured.manifests["pairs"]
    steps = [step for name, step in measured.steps.items() if name.count("/") == 1 and name.startswith("pairs/")]
    holdout, join = measured.steps.get("pairs/holdout"), measured.steps.get("pairs/join")
    described = whole.measured.manifests["describe"].totals["embedded"]
    images = described * whole.growth
    driver = max(0.0, _start(stage) - sum(step.seconds for step in steps)) * whole.growth
    joining = 0.0
    if join is not None:
        width = whole.config.describe.embedder.dimensions
        if config.search.backend == "exact":
            operations = 2 * width / TERA / FIXED.core_tops_int8
            work = makespan([1.0] * max(1, -(-round(images) // 65_536)), whole.workers)
            blocks = max(1, -(-round(images) // 65_536))
            joining = grown(join.busy, images**2, described**2, operations) * work / blocks
        else:
            joining = (join.seconds - _start(join)) * whole.growth * join.workers / whole.workers
        joining += _start(join) + _tail(join)
    busy = stage.busy + (holdout.busy if holdout is not None else 0.0)
    now = manifest.totals["candidates"]
    number, factor = now * whole.growth, whole.growth
    if config.verification is not None and now:
        growth_of_candidates, cost = _verification(whole)
        number = now * growth_of_candidates
        factor = verification_seconds(number, images, whole.workers, cost) / verification_seconds(
            now, described, stage.workers, cost
        )
    describing = _seconds_of_features(whole, images)
    num_shards = max(1, -(-round(images) // config.images_per_shard))
    judging = makespan([1.0] * num_shards, whole.workers) * busy * factor / num_shards
    start = _tail(stage) + (_start(holdout) if holdout is not None else 0.0)
    return StageEstimate(
        "pairs",
        images,
        start,
        start + driver + joining + describing + judging,
        described,
        stage.seconds,
        note=f"{now / max(1, described):,.1f} candidates an image there, {number / max(1.0, images):,.1f} here",
    )


def _estimate_self_check(whole: _Whole) -> StageEstimate:
    step, measured = whole.measured.steps["self_check"], whole.measured.manifests["self_check"].totals
    pool = sum(whole.images[source.name] for source in whole.config.ingest.sources if source.role == "pool")
    copies, copies_then = self_check_copies(whole.config, whole.accepted, pool), measured.get("copies", 0)
    if not copies:
        return StageEstimate("self_check", 0, step.seconds, step.seconds, copies_then, step.seconds)
    if not copies_then:
        (priced,) = (each for each in price_run(whole.config, whole.counts, None).stages if each.stage == "self_check")
        seconds = (priced.core_seconds + priced.gpu_seconds) / whole.workers
        return StageEstimate("self_check", copies, 0.0, seconds, 0, 0.0, note="off there: priced by the fixed rates")
    start = _start(step) + _tail(step)
    busy = step.busy * copies / copies_then
    num_shards = -(-copies // COPIES_PER_SHARD)
    working = makespan([busy / num_shards] * num_shards, whole.workers)
    return StageEstimate("self_check", copies, start, start + working, copies_then, step.seconds)


def _verification(whole: _Whole) -> tuple[float, VerificationCost]:
    """The growth of the number of candidates, and the cost of the candidates of the whole."""
    config, run = whole.config.pairs, whole.measured.run
    assert config.verification is not None
    part = candidates.read_described(run, {})
    then = candidates.num_candidates(part, candidates.scored(part, config))
    part = candidates.read_described(run, whole.growth_of_source)
    is_scored = candidates.scored(part, config)
    pairs = candidates.draw_pairs(part, is_scored)
    if not pairs or not then:  # no candidates among the images that are compared here
        return whole.growth, VerificationCost(1, 1)
    thumbnails = candidates.read_thumbnails(run, {part.ids[row] for pair in pairs for row in pair})
    cost = candidates.verification_cost(pairs, part, thumbnails, config.verification)
    return candidates.num_candidates(part, is_scored) / then, cost


def verification_seconds(num_candidates: float, images: float, workers: int, cost: VerificationCost) -> float:
    """Worker seconds to verify the candidates of some images."""
    return num_candidates * cost.compare + prepared_images(num_candidates, images, workers) * cost.prepare


def _seconds_of_features(whole: _Whole, images: float) -> float:
    """Seconds of the step `pairs/features` for the images of the whole; 0 for drawings, which have no such step."""
    verification = whole.config.pairs.verification
    if verification is None or verification.domain != "photographs":
        return 0.0
    step = whole.measured.steps.get("pairs/features")
    if step is None:  # drawings were measured
        return images / FIXED.features_per_core / whole.workers
    sizes = whole.shard_sizes()
    rate, warm_up = step.seconds_of_image()
    share = images / max(1.0, sum(sizes))
    return _start(step) + _tail(step) + warm_up + makespan([size * share * rate for size in sizes], whole.workers)


def _estimate_cluster(whole: _Whole) -> StageEstimate:
    stage = whole.measured.steps["cluster"]
    kept_then = whole.measured.manifests["cluster"].totals["assigned"]
    kept = kept_then * whole.pool_growth
    steps = [step for name, step in whole.measured.steps.items() if name.count("/") == 1 and "cluster/" in name]
    clusters_then = whole.measured.config.cluster.resolved(round(kept_then)).levels[0].size
    clusters = whole.config.cluster.resolved(round(kept)).levels[0].size
    levels = whole.measured.manifests["cluster"].facts["levels"]
    iterations_then = sum(len(objectives) for level in levels for objectives in level["objectives"])
    iterations = max(iterations_then, sum(level.num_iterations for level in whole.config.cluster.levels))
    width = whole.config.embed.embedder.dimensions
    training = max(0.0, _start(stage) - sum(step.seconds for step in steps))
    is_of_driver = kept <= whole.config.cluster.rows_per_part
    rate = 2 * width / TERA / FIXED.core_tflops_kmeans / (1 if is_of_driver else whole.workers)
    work, work_then = kept * clusters * iterations, kept_then * clusters_then * iterations_then
    training = grown(training, work, work_then, rate)
    reading = sum(step.seconds for step in steps) * whole.pool_growth
    assigning = max(0.0, stage.ended - stage.first_shard) * whole.pool_growth * stage.workers / whole.workers
    return StageEstimate("cluster", kept, 0.0, training + reading + assigning, kept_then, stage.seconds)


def _estimate_retrieve(whole: _Whole) -> StageEstimate:
    stage, search = whole.measured.steps["retrieve"], whole.measured.steps.get("retrieve/search")
    kept_then = whole.measured.manifests["cluster"].totals["assigned"]
    seconds = stage.seconds
    if search is not None:
        width = whole.config.embed.embedder.dimensions
        rate = whole.accepted * 2 * width / TERA / FIXED.core_tops_int8 / whole.workers  # at most, for each kept image
        kept = kept_then * whole.pool_growth
        seconds += grown(search.busy, kept, kept_then, rate) - search.busy
    if (gathered := whole.measured.steps.get("retrieve/gathered")) is not None:
        seconds += gathered.seconds * max(0.0, whole.growth - 1)  # the check reads all descriptors, and keeps a few
    return StageEstimate("retrieve", stage.items, stage.seconds, seconds, stage.items, stage.seconds)


def _estimate_corpus(whole: _Whole, rows: int | None) -> StageEstimate:
    step = whole.measured.steps["corpus"]
    rows_then = whole.measured.manifests["corpus"].totals["rows"]
    growth = whole.pool_growth if rows is None else min(whole.pool_growth, max(rows, rows_then) / max(1, rows_then))
    start = _start(step) + _tail(step)
    packing = max(0.0, step.seconds - start) * growth * step.workers / whole.workers
    return StageEstimate("corpus", rows_then * growth, start, start + packing, rows_then, step.seconds)
