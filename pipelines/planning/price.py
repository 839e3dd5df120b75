"""Prices a run before it starts: images, bytes, GPU-hours, memory and time, stage by stage.

Arithmetic alone: the formulas of docs/scaling.md over the config, the counts of images and the rates of rates.py.
Products, decoding and traffic overlap within a stage, so the slowest of the three is the stage's time. The driver's own
work does not overlap with them and is added. `measured.py` prices a run by the rates of a finished one instead.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from curation.copies.compare_thumbnails import VerificationConfig
from curation.copies.corpus_check import FOLLOWED, IMAGES_PER_SHARD, LOOKS
from curation.copies.described import CACHED_THUMBNAILS
from curation.copies.edits import KINDS
from curation.copies.photographs import FEATURES
from curation.embed import EmbedConfig, one_pass_serves
from curation.errors import InputError
from curation.files import paths
from curation.images import counting, sources
from curation.images.counting import SourceCount
from curation.images.sources import SourceConfig
from curation.models.embedders import MODELS
from curation.report import images_table
from curation.report.self_check import COPIES_PER_SHARD, num_copies_per_kind
from curation.retrieval_modes import MODES, mode_of
from curation.search.config import SearchConfig
from curation.search.ivf import TRAINING_ITERATIONS, TRAINING_ROWS_PER_CELL
from pipelines.main_path import CurateConfig
from pipelines.planning.machine import Machine
from pipelines.planning.rates import FIXED, RatesConfig

TERA = 1e12
# A config that needs more machines than this is priced for this number.
MAX_MACHINES = 10_000
# Pixels of the images that `decoded_per_core` is stated for.
PIXELS_OF_RATE = 3e6


@dataclass(frozen=True)
class StagePrice:
    """The price of one stage. Memory is that of one worker and of the driver."""

    stage: str
    images: float
    reads: float
    """Bytes."""
    writes: float
    """Bytes, `temporary_bytes` included."""
    shards: int
    gpu_seconds: float = 0.0
    core_seconds: float = 0.0
    driver_core_seconds: float = 0.0
    """On the driver's machine, spread over all its cores."""
    driver_seconds: float = 0.0
    """On one core of the driver's machine, whatever their number."""
    worker_bytes: float = 0.0
    driver_bytes: float = 0.0
    temporary_bytes: float = 0.0
    """Files in the progress folder, which is deleted when the stage has finished."""
    num_pieces: int = 0
    """Shards of the work on cores, which no more cores than that can share; 0 where it is cut as fine as needed."""

    def total_seconds(self, machine: Machine, machines: int = 1) -> float:
        """The duration of the stage on that number of machines."""
        return max(self._seconds(machine, machines).values()) + self._driver_seconds(machine)

    def limit(self, machine: Machine, machines: int = 1) -> str:
        """The resource that takes longest: GPUs, cores, traffic or driver."""
        seconds = self._seconds(machine, machines)
        slowest = max(seconds, key=seconds.__getitem__)
        return "driver" if self._driver_seconds(machine) > seconds[slowest] else slowest

    def _seconds(self, machine: Machine, machines: int) -> dict[str, float]:
        cores = machines * machine.cores
        return {
            "GPUs": self.gpu_seconds / max(machines * machine.gpus, 1),
            "cores": self.core_seconds / (min(cores, self.num_pieces) if self.num_pieces else cores),
            "traffic": (self.reads + self.writes) / (machines * machine.bytes_per_second),
        }

    def _driver_seconds(self, machine: Machine) -> float:
        return self.driver_core_seconds / machine.cores + self.driver_seconds


@dataclass(frozen=True)
class Counts:
    """The images of the sources of a config, stated or counted."""

    of_source: Mapping[str, int]
    counted: Mapping[str, SourceCount]
    """Of the sources that were counted here."""
    unknown: tuple[str, ...]
    """Sources that are neither stated nor on this machine, and those that the run fetches; not in the price."""
    image_bytes: float
    """Bytes of an image on average."""
    pixels: float
    """Width times height of an image on average."""

    def of_role(self, config: CurateConfig, role: str) -> int:
        """The images of all sources with a role."""
        return sum(self.of_source.get(source.name, 0) for source in config.ingest.sources if source.role == role)


@dataclass(frozen=True)
class Price:
    """The price of a run, on any number of machines."""

    stages: tuple[StagePrice, ...]
    needs_gpus: bool

    def seconds(self, machine: Machine, machines: int = 1) -> float:
        """The duration of the run on that number of machines."""
        return FIXED.start_seconds + sum(stage.total_seconds(machine, machines) for stage in self.stages)

    def num_machines(self, machine: Machine, hours_wanted: float) -> int:
        """The fewest machines of this size that finish within the hours; at most MAX_MACHINES."""
        for machines in range(1, MAX_MACHINES):
            if self.seconds(machine, machines) <= 3600 * hours_wanted:
                return machines
        return MAX_MACHINES

    @property
    def disk_bytes(self) -> float:
        """Maximum of the bytes on the disk during the run: files of finished stages, and temporary ones of a stage."""
        most = finished = 0.0
        for stage in self.stages:
            most = max(most, finished + stage.writes)
            finished += stage.writes - stage.temporary_bytes
        return most

    def memory_bytes(self, machine: Machine) -> float:
        """Memory of the driver and of a worker on every core, or on every GPU, in the stage that needs most."""
        num_workers = machine.gpus if self.needs_gpus and machine.gpus else machine.cores
        processes = (num_workers + 1) * FIXED.process_bytes
        return processes + max(num_workers * stage.worker_bytes + stage.driver_bytes for stage in self.stages)


@dataclass(frozen=True)
class _Workload:
    """The quantities that several stages are priced by."""

    config: CurateConfig
    rates: RatesConfig
    image_counts: Mapping[str, int]
    images: int
    """Of all sources."""
    pool: int
    """Images of the pool."""
    kept: float
    """Images of the pool after deduplication."""
    image_bytes: float
    """Bytes of an image on average."""
    decode_seconds: float
    """Of a core, for an image."""
    packed: int
    """Rows of the corpus."""
    num_shards: int


def count_sources(config: CurateConfig) -> Counts:
    """The images of each source: stated, or counted on this machine.

    Raises InputError with all local sources that are missing or cannot be counted.
    """
    stated = config.stated_counts
    local = [
        source
        for source in config.ingest.sources
        if source.name not in stated and paths.is_local(source.path) and not _is_fetched_later(config, source)
    ]
    problems: list[str] = []
    counted: dict[str, SourceCount] = {}
    for source in local:
        try:
            sources.require_sources([source])
            counted[source.name] = counting.count_images(source)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    of_source = {**stated, **{name: count.images for name, count in counted.items()}}
    unknown = tuple(source.name for source in config.ingest.sources if source.name not in of_source)
    return Counts(
        of_source,
        counted,
        unknown,
        image_bytes=_mean([(count.images, count.image_bytes) for count in counted.values()])
        or config.rates.bytes_per_image,
        pixels=_mean([(count.images, count.pixels) for count in counted.values() if count.pixels]) or PIXELS_OF_RATE,
    )


def _is_fetched_later(config: CurateConfig, source: SourceConfig) -> bool:
    """Whether the run itself fetches the files of a source, which are not here yet."""
    folder = config.demo_data
    return folder is not None and source.path.startswith(folder.rstrip("/") + "/") and not paths.exists(folder)


def _mean(weighted: list[tuple[int, float]]) -> float | None:
    """The mean of values with their weights; None without a weight."""
    total = sum(weight for weight, _ in weighted)
    return sum(weight * value for weight, value in weighted) / total if total else None


def price_run(config: CurateConfig, counts: Counts, rows: int | None) -> Price:
    """The price of a run that packs `rows` rows, None where unknown. Of a sample, the pool counts by its share."""
    share = config.ingest.sample_pool
    of_source = {
        source.name: round(counts.of_source.get(source.name, 0) * (share if source.role == "pool" else 1))
        for source in config.ingest.sources
    }
    pool = sum(of_source[source.name] for source in config.ingest.sources if source.role == "pool")
    work = _Workload(
        config=config,
        rates=config.rates,
        image_counts=of_source,
        images=sum(of_source.values()),
        pool=pool,
        kept=pool * FIXED.kept_share,
        image_bytes=counts.image_bytes,
        decode_seconds=decode_seconds(config.rates, counts.pixels),
        packed=rows or 0,
        num_shards=_num_shards(config, counts, of_source),
    )
    return Price(_price_stages(work), needs_gpus=_uses_gpus(config))


def decode_seconds(rates: RatesConfig, pixels: float) -> float:
    """Seconds of a core to decode an image of that many pixels."""
    return (FIXED.decode_start + (1 - FIXED.decode_start) * pixels / PIXELS_OF_RATE) / rates.decoded_per_core


def num_candidates(config: CurateConfig, images: float) -> float:
    """The pairs of images that are verified. An assumption: it depends on the images, and --rates-from measures it."""
    of_full_lists = FIXED.candidates_of_full_list * config.pairs.num_neighbors
    return images * min(_candidates_of_image(config, images), of_full_lists, images / 2)


def _candidates_of_image(config: CurateConfig, images: float) -> float:
    """Candidates an image, where its list of neighbours has no maximum length."""
    verification = config.pairs.verification
    is_drawing = verification is not None and verification.domain == "drawings"
    has_head = config.describe.embedder.pooling == "copies"
    rate = FIXED.candidates_of_root_of_drawings if is_drawing and has_head else FIXED.candidates_of_root
    return math.sqrt(images) * rate


def num_checked_pairs(config: CurateConfig, images: float, looked_at: float) -> float:
    """The pairs that the check of the corpus verifies among `looked_at` of the images.

    Lists are followed past FOLLOWED only where they hold copies.
    """
    share = min(1.0, FIXED.checked_are_nearer * looked_at / max(images, 1))
    return looked_at * min(_candidates_of_image(config, images) * share, looked_at / 2, FOLLOWED)


def verification_seconds(config: VerificationConfig, pairs: float, new_features: float) -> float:
    """Seconds of a core to verify pairs, of which `new_features` images have no features of photographs yet."""
    if config.domain == "drawings":
        return pairs / FIXED.drawings_verified_per_core
    return pairs / FIXED.photographs_verified_per_core + new_features / FIXED.features_per_core


def _uses_gpus(config: CurateConfig) -> bool:
    models, searches = (config.embed, config.describe), (config.pairs.search, config.retrieve.search)
    return any(model.embedder.num_gpus for model in models) or any(search.num_gpus for search in searches)


def _num_shards(config: CurateConfig, counts: Counts, image_counts: Mapping[str, int]) -> int:
    """The shards of ingest, and so of every stage that follows it shard by shard."""
    num_shards = 0
    for source in config.ingest.sources:
        if source.layout == "folder" or source.name not in counts.counted:
            images_per_shard = config.ingest.images_per_shard if source.layout == "folder" else FIXED.images_per_tar
            num_shards += -(-image_counts.get(source.name, 0) // images_per_shard)
        else:
            num_shards += counts.counted[source.name].num_files
    return num_shards


def _price_stages(work: _Workload) -> tuple[StagePrice, ...]:
    return (
        _price_ingest(work),
        _price_embed(work, "embed"),
        _price_embed(work, "describe"),
        _price_pairs(work),
        *([_price_self_check(work)] if work.config.self_check.max_images else []),
        _price_dedup(work),
        _price_cluster(work),
        _price_retrieve(work),
        _price_pack(work),
        _price_images(work),
    )


def _price_ingest(work: _Workload) -> StagePrice:
    return StagePrice(
        "ingest",
        work.images,
        work.images * work.image_bytes,
        150 * work.images,  # a row of schemas.IMAGES, compressed; measured on the demo: 130 to 170
        work.num_shards,
        core_seconds=work.images * work.decode_seconds + work.images * work.image_bytes / FIXED.hashed_per_core,
        worker_bytes=min(6 * PIXELS_OF_RATE * 4, work.config.ingest.limits.max_decode_memory_bytes),
    )


def _price_embed(work: _Workload, stage: str) -> StagePrice:
    model = work.config.embed if stage == "embed" else work.config.describe
    embedder = model.embedder
    facts = MODELS[embedder.name]
    seconds_on_gpu, seconds_on_cores = _embedding_seconds(work, model, work.images)
    thumbnail_bytes = (model.thumbnail_side or 0) ** 2 / 4  # WebP, 2 bits a pixel
    written = work.images * (2 * embedder.dimensions + thumbnail_bytes)
    if stage == "describe" and one_pass_serves(work.config.embed, model):  # the pass of embed writes its files
        return StagePrice(stage, work.images, 0, written, work.num_shards)
    return StagePrice(
        stage,
        work.images,
        work.images * work.image_bytes,
        written,
        work.num_shards,
        gpu_seconds=seconds_on_gpu,
        core_seconds=work.images * work.decode_seconds + seconds_on_cores,
        # Weights; the activations of a batch, as a few copies of its pixels at the first layer; pictures decoded ahead.
        worker_bytes=4 * facts.num_parameters + 3 * embedder.batch_size * 600 * embedder.image_size**2 / 10,
    )


def _embedding_seconds(work: _Workload, model: EmbedConfig, images: float) -> tuple[float, float]:
    """Seconds of a GPU and of a core for the network, one of them 0."""
    rates, facts = work.rates, MODELS[model.embedder.name]
    tera_operations = images * facts.flops(model.embedder.image_size) / TERA
    if model.embedder.num_gpus:
        return tera_operations / (rates.gpu_tflops_convolutions if facts.vit is None else rates.gpu_tflops_vit), 0.0
    return 0.0, tera_operations / (rates.core_tflops_convolutions if facts.vit is None else rates.core_tflops_vit)


def _price_pairs(work: _Workload) -> StagePrice:
    config, images = work.config.pairs, work.images
    search, width = config.search, work.config.describe.embedder.dimensions
    judging_shards = max(1, -(-images // config.images_per_shard))
    if not config.num_neighbors:  # no search; at most perceptual hashes are compared
        return StagePrice("pairs", images, 0.0, 0.0, judging_shards, driver_bytes=100 * images)
    verification = _price_verification(work, judging_shards)
    edge_bytes = 100 * FIXED.edges_per_image * images
    if search.backend == "exact":
        gpu_seconds, core_seconds = _search_seconds(search, work.rates, images**2 * 2 * width)
        return StagePrice(
            "pairs",
            images,
            2 * width * images * max(1.0, images / search.rows_per_part) + verification.reads,
            edge_bytes + verification.feature_bytes,
            judging_shards + work.num_shards + verification.feature_shards,
            gpu_seconds=gpu_seconds,
            core_seconds=core_seconds + verification.core_seconds,
            worker_bytes=max(100 * images + 2 * width * min(images, search.rows_per_part), verification.worker_bytes),
            driver_bytes=100 * images,
            temporary_bytes=verification.feature_bytes,
            num_pieces=judging_shards if config.verification else 0,
        )
    cells = search.num_cells(images)
    copies = min(FIXED.copies_in_exchange, search.num_probes)
    choosing = images * cells * 2 * width
    # Every image is also compared with every holdout image.
    holdout = sum(work.image_counts.get(each.name, 0) for each in work.config.ingest.sources if each.role == "holdout")
    joining = images * (search.num_probes * search.rows_per_cell + holdout) * 2 * width
    on_gpu = search.num_gpus > 0
    exchanged_bytes = images * copies * (2 * width + 76)
    training = TRAINING_ITERATIONS * TRAINING_ROWS_PER_CELL * float(cells) ** 2 * 2 * width
    return StagePrice(
        "pairs",
        images,
        2 * width * images + exchanged_bytes + verification.reads,
        exchanged_bytes + edge_bytes + verification.feature_bytes,
        work.num_shards + -(-images // search.rows_per_part) + judging_shards + verification.feature_shards,
        gpu_seconds=(
            choosing / TERA / FIXED.gpu_tflops_single + joining / TERA / work.rates.gpu_tflops_half if on_gpu else 0.0
        ),
        core_seconds=verification.core_seconds
        + (0.0 if on_gpu else (choosing + joining) / TERA / FIXED.core_tops_int8),
        driver_core_seconds=training / TERA / FIXED.core_tops_int8,
        worker_bytes=max(min(images, search.rows_per_part) * copies * (3 * width + 300), verification.worker_bytes),
        driver_bytes=100 * images + TRAINING_ROWS_PER_CELL * cells * 2 * width,
        temporary_bytes=exchanged_bytes + verification.feature_bytes,
        num_pieces=judging_shards if config.verification else 0,
    )


@dataclass(frozen=True)
class _Verification:
    """The part of the price of `pairs` that is verification."""

    core_seconds: float = 0.0
    reads: float = 0.0
    feature_bytes: float = 0.0
    """Written by the step `features`, and deleted when `pairs` has finished."""
    feature_shards: int = 0
    worker_bytes: float = 0.0


def _price_verification(work: _Workload, judging_shards: int) -> _Verification:
    config, images = work.config.pairs, work.images
    if config.verification is None or not images:
        return _Verification()
    pairs = num_candidates(work.config, images)
    bytes_of_thumbnail = (work.config.describe.thumbnail_side or 0) ** 2 / 4  # WebP, 2 bits a pixel
    thumbnail_bytes = images * bytes_of_thumbnail
    # The images of a shard are spread over all files, and a file is read whole.
    images_of_shard = (images + pairs) / judging_shards
    share_of_files = 1 - math.exp(-images_of_shard / max(1, work.num_shards))
    reads = judging_shards * share_of_files * thumbnail_bytes
    has_features = config.verification.domain == "photographs"
    feature_bytes = images * FEATURES.itemsize if has_features else 0.0
    return _Verification(
        core_seconds=verification_seconds(config.verification, pairs, images),
        reads=reads
        + (thumbnail_bytes + prepared_images(pairs, images, 1) * FEATURES.itemsize if has_features else 0.0),
        feature_bytes=feature_bytes,
        feature_shards=work.num_shards if has_features else 0,
        worker_bytes=min(images, CACHED_THUMBNAILS) * FIXED.prepared_bytes + images_of_shard * bytes_of_thumbnail,
    )


def prepared_images(num_pairs: float, images: float, workers: int) -> float:
    """How often a thumbnail is prepared for the pairs of some images.

    A worker keeps CACHED_THUMBNAILS prepared thumbnails. The other image of a pair may be any, so it is prepared again
    unless it is among them.
    """
    missing = max(0.0, 1 - CACHED_THUMBNAILS / max(images, 1.0))
    return min(2 * num_pairs, images * workers + num_pairs * missing)


def self_check_copies(config: CurateConfig, images: float, pool: float) -> int:
    """The edited copies of a run with that many images, of which `pool` are of the pool."""
    per_kind = num_copies_per_kind(config.self_check.max_images, round(images))
    return min(per_kind, round(pool)) * len(KINDS)


def _price_self_check(work: _Workload) -> StagePrice:
    """Each copy is edited, described and compared with as many candidates as an image can have."""
    config, images = work.config, work.images
    copies = self_check_copies(config, images, work.pool)
    if not copies:  # the images are not counted
        return StagePrice("self_check", 0, 0.0, 0.0, 0)
    num_shards, width = -(-copies // COPIES_PER_SHARD), config.describe.embedder.dimensions
    decoded = min(copies, config.self_check.max_images)
    seconds_on_gpu, seconds_on_cores = _embedding_seconds(work, config.describe, copies)
    search_on_gpu = search_on_cores = verifying = 0.0
    if config.pairs.num_neighbors:
        # Copies and their originals are queries.
        operations = 2 * copies * images * 2 * width
        search_on_gpu, search_on_cores = _search_seconds(config.pairs.search, work.rates, operations)
    if config.pairs.verification:
        # Of lists that are not full, each candidate is in the lists of both images.
        candidates = min(2 * _candidates_of_image(config, images), config.pairs.num_neighbors)
        # The features of `pairs` are deleted by now. The copies of one image have about the same candidates.
        described = copies + min(decoded * candidates, images)
        verifying = verification_seconds(config.pairs.verification, copies * candidates, described)
    return StagePrice(
        "self_check",
        copies,
        2 * 2 * width * images * num_shards + decoded * work.image_bytes,
        50 * copies * config.pairs.num_neighbors,  # a row of schemas.SELF_CHECK_SCORES, before compression
        num_shards,
        gpu_seconds=seconds_on_gpu + search_on_gpu,
        core_seconds=decoded * work.decode_seconds
        + copies / FIXED.edited_per_core
        + seconds_on_cores
        + search_on_cores
        + verifying,
        num_pieces=num_shards,
    )


def _price_dedup(work: _Workload) -> StagePrice:
    edges = FIXED.edges_per_image * work.images
    return StagePrice(
        "dedup",
        work.images,
        100 * edges,
        60 * work.images,
        work.num_shards,
        driver_seconds=edges / FIXED.edges_per_second,
        driver_bytes=4 * work.images,  # the parents; 90 bytes an image and 70 an edge lie on its disk
    )


def _price_cluster(work: _Workload) -> StagePrice:
    config, kept = work.config.cluster.resolved(round(work.kept)), work.kept
    iterations = sum(level.num_iterations for level in config.levels)
    clusters, width = config.levels[0].size, work.config.embed.embedder.dimensions
    per_cluster = config.max_points_per_centroid
    points = kept if per_cluster is None else min(kept, per_cluster * clusters)
    return StagePrice(
        "cluster",
        kept,
        2 * width * (iterations * points + kept),
        100 * kept,
        work.num_shards,
        core_seconds=(iterations * points + kept) * clusters * 2 * width / TERA / FIXED.core_tflops_kmeans,
        worker_bytes=12 * clusters * width + 1e8,
        driver_bytes=16 * clusters * width,
    )


def _price_retrieve(work: _Workload) -> StagePrice:
    config, kept, width = work.config.retrieve, work.kept, work.config.embed.embedder.dimensions
    search = config.search
    num_seeds = {dataset.name: work.image_counts.get(dataset.name, 0) for dataset in config.datasets}
    queries = sum(
        num_seeds[dataset.name]
        for dataset in config.datasets
        if MODES[mode_of(dataset.retrieval, num_seeds[dataset.name], config.sample_above)].compares_seeds
    )
    parts, part = math.ceil(kept / search.rows_per_part), min(kept, search.rows_per_part)
    compared = kept if search.backend == "exact" else search.num_probes * search.rows_per_cell
    gpu_seconds, core_seconds = _search_seconds(search, work.rates, queries * compared * 2 * width)
    looks = LOOKS if config.check_copies else 1
    row_bytes = sum(num_seeds[dataset.name] * dataset.k * looks * 80 for dataset in config.datasets)
    check_reads = check_bytes = 0.0
    if config.check_copies:
        looked_at = _looked_at(work)
        check_gpu_seconds, check_core_seconds = _check_seconds(work, looked_at)
        gpu_seconds, core_seconds = gpu_seconds + check_gpu_seconds, core_seconds + check_core_seconds
        described = 2 * work.config.describe.embedder.dimensions + (work.config.describe.thumbnail_side or 0) ** 2 / 4
        check_bytes = min(LOOKS * looked_at, work.images) * described  # gathered from all of describe
        check_reads = work.images * described + check_bytes * (1 + looked_at / IMAGES_PER_SHARD)
    return StagePrice(
        "retrieve",
        queries,
        2 * width * (kept + parts * queries) + check_reads,
        parts * queries * 64 * looks + row_bytes + check_bytes,
        parts + len(config.datasets),
        gpu_seconds=gpu_seconds,
        core_seconds=core_seconds,
        worker_bytes=2 * width * part + 6 * width * min(queries, 32_768),
        driver_bytes=60 * row_bytes / 80,
        temporary_bytes=check_bytes,
    )


def _looked_at(work: _Workload) -> float:
    """The images that the check of the corpus compares: its rows, as many of them again as are passed over, holdout."""
    holdout = sum(work.image_counts.get(each.name, 0) for each in work.config.ingest.sources if each.role == "holdout")
    return min(work.packed * FIXED.looked_at_per_row + holdout, work.images)


def _check_seconds(work: _Workload, looked_at: float) -> tuple[float, float]:
    """Seconds of a GPU and of a core: all products of the descriptors, and the comparison of thumbnails."""
    config, width = work.config.pairs, work.config.describe.embedder.dimensions
    search = work.config.retrieve.search
    gpu_seconds, core_seconds = _search_seconds(search, work.rates, looked_at**2 * 2 * width)
    if config.verification:
        pairs = num_checked_pairs(work.config, work.images, looked_at)
        # The features of `pairs` are deleted by now.
        core_seconds += verification_seconds(config.verification, pairs, prepared_images(pairs, looked_at, 1))
    return gpu_seconds, core_seconds


def _price_pack(work: _Workload) -> StagePrice:
    packed, packed_bytes = work.packed, work.packed * work.image_bytes
    return StagePrice(
        "corpus",
        packed,
        packed_bytes,
        packed_bytes * 1.02,
        -(-packed // work.config.pack.images_per_shard),
        core_seconds=2 * packed_bytes / FIXED.hashed_per_core,
        worker_bytes=3e8,
        driver_bytes=170 * packed,
    )


def _price_images(work: _Workload) -> StagePrice:
    width, side = work.config.embed.embedder.dimensions, work.config.describe.thumbnail_side
    passes = 2 if work.images > images_table.MAX_FITTED else 1  # over the vectors
    return StagePrice(
        "images",
        work.images,
        work.images * (2 * width * passes + side**2 / 4 + 200),
        55 * work.images,  # measured, 300,000 rows
        work.num_shards,
        core_seconds=work.images / FIXED.images_table_per_core,
        driver_seconds=work.images * FIXED.images_table_driver_seconds,
        worker_bytes=3e8,
    )


def _search_seconds(search: SearchConfig, rates: RatesConfig, operations: float) -> tuple[float, float]:
    """Seconds of a GPU and of a core, one of them 0."""
    if search.num_gpus:
        return operations / TERA / rates.gpu_tflops_half, 0.0
    return 0.0, operations / TERA / FIXED.core_tops_int8
