"""Prices a run before it starts: images, bytes, GPU-hours, memory and machines, stage by stage.

Arithmetic alone: the formulas of docs/scaling.md over the config, the counts of images and the rates of rates.py.
Products, decoding and traffic overlap within a stage, so the slowest of the three is the stage's time. The driver's own
work does not overlap with them and is added.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from curation.files import paths
from curation.images import sources
from curation.models.embedders import MODELS
from curation.retrieval_modes import MODES, mode_of
from curation.search.config import SearchConfig
from curation.search.ivf import TRAINING_ITERATIONS, TRAINING_ROWS_PER_CELL
from pipelines.main_path import CurateConfig
from pipelines.planning.rates import FIXED, RatesConfig

TERA = 1e12
# A config that needs more machines than this is priced for this number.
MAX_MACHINES = 10_000


@dataclass(frozen=True)
class StagePrice:
    """The price of one stage. Memory is that of one worker and of the driver."""

    stage: str
    images: float
    reads: float
    """Bytes."""
    writes: float
    """Bytes."""
    shards: int
    gpu_seconds: float = 0.0
    core_seconds: float = 0.0
    driver_core_seconds: float = 0.0
    """On the driver's machine, spread over all its cores."""
    driver_seconds: float = 0.0
    """On one core of the driver's machine, whatever their number."""
    worker_bytes: float = 0.0
    driver_bytes: float = 0.0

    def total_seconds(self, rates: RatesConfig, machines: int) -> float:
        """The duration of the stage on that number of machines."""
        return max(self._seconds(rates, machines).values()) + self._driver_seconds(rates)

    def limit(self, rates: RatesConfig, machines: int) -> str:
        """The resource that takes longest: GPUs, cores, traffic or driver."""
        seconds = self._seconds(rates, machines)
        slowest = max(seconds, key=seconds.__getitem__)
        return "driver" if self._driver_seconds(rates) > seconds[slowest] else slowest

    def _seconds(self, rates: RatesConfig, machines: int) -> dict[str, float]:
        return {
            "GPUs": self.gpu_seconds / max(machines * rates.machine_gpus, 1),
            "cores": self.core_seconds / (machines * rates.machine_cores),
            "traffic": (self.reads + self.writes) / (machines * rates.machine_bytes_per_second),
        }

    def _driver_seconds(self, rates: RatesConfig) -> float:
        return self.driver_core_seconds / rates.machine_cores + self.driver_seconds


@dataclass(frozen=True)
class Price:
    """The price of a run on the smallest number of machines that finishes in time."""

    stages: tuple[StagePrice, ...]
    rates: RatesConfig
    machines: int
    image_counts: Mapping[str, int]
    """Images of each source."""
    uncounted: tuple[str, ...]
    """Sources with an unknown number of images; they are not in the price."""

    @property
    def hours(self) -> float:
        """The duration of the run on the machines."""
        return sum(stage.total_seconds(self.rates, self.machines) for stage in self.stages) / 3600


@dataclass(frozen=True)
class _Workload:
    """The quantities that several stages are priced by."""

    config: CurateConfig
    rates: RatesConfig
    image_counts: Mapping[str, int]
    images: int
    """Of all sources."""
    kept: float
    """Images of the pool after deduplication."""
    image_bytes: float
    """Bytes of an image on average."""
    packed: int
    """Rows of the corpus."""
    num_shards: int


def count_images(config: CurateConfig) -> tuple[dict[str, int], float]:
    """The images of each source, stated or counted in local files, and the mean bytes of an image.

    The count of local tars and Parquet files follows from their size. A source that is neither stated nor local is left
    out.
    """
    counts, total_bytes, num_files = dict(config.stated_counts), 0, 0
    for source in config.ingest.sources:
        if source.name in counts or not paths.is_local(source.path) or not paths.exists(source.path):
            continue
        files = sources.list_source(source).files
        source_bytes = sum(file.size for file in files)
        if source.layout == "folder":
            counts[source.name] = len(files)
            total_bytes, num_files = total_bytes + source_bytes, num_files + len(files)
        else:
            counts[source.name] = round(source_bytes / config.rates.bytes_per_image)
    return counts, total_bytes / num_files if num_files else config.rates.bytes_per_image


def price_run(config: CurateConfig, rows: int | None) -> Price:
    """The price of a run that packs `rows` rows, None where unknown."""
    counts, image_bytes = count_images(config)
    rates = config.rates if _uses_gpus(config) else config.rates.model_copy(update={"machine_gpus": 0})
    pool = sum(counts.get(source.name, 0) for source in config.ingest.sources if source.role == "pool")
    work = _Workload(
        config=config,
        rates=rates,
        image_counts=counts,
        images=sum(counts.get(source.name, 0) for source in config.ingest.sources),
        kept=pool * FIXED.kept_share,
        image_bytes=image_bytes,
        packed=rows or 0,
        num_shards=_num_shards(config, counts),
    )
    stages = _price_stages(work)
    uncounted = tuple(source.name for source in config.ingest.sources if source.name not in counts)
    for machines in range(1, MAX_MACHINES + 1):
        price = Price(stages, rates, machines, counts, uncounted)
        if price.hours <= rates.hours_wanted:
            break
    return price


def _uses_gpus(config: CurateConfig) -> bool:
    models, searches = (config.embed, config.describe), (config.pairs.search, config.retrieve.search)
    return any(model.embedder.num_gpus for model in models) or any(search.num_gpus for search in searches)


def _num_shards(config: CurateConfig, image_counts: Mapping[str, int]) -> int:
    """The shards of ingest, and so of every stage that follows it shard by shard."""
    num_shards = 0
    for source in config.ingest.sources:
        images_per_shard = config.ingest.images_per_shard if source.layout == "folder" else FIXED.images_per_tar
        num_shards += -(-image_counts.get(source.name, 0) // images_per_shard)
    return num_shards


def _price_stages(work: _Workload) -> tuple[StagePrice, ...]:
    return (
        _price_ingest(work),
        _price_embed(work, "embed"),
        _price_embed(work, "describe"),
        _price_pairs(work),
        _price_dedup(work),
        _price_cluster(work),
        _price_retrieve(work),
        _price_pack(work),
    )


def _price_ingest(work: _Workload) -> StagePrice:
    return StagePrice(
        "ingest",
        work.images,
        work.images * work.image_bytes,
        150 * work.images,  # a row of schemas.IMAGES, compressed; measured on the demo: 130 to 170
        work.num_shards,
        core_seconds=work.images / work.rates.decoded_per_core,
        worker_bytes=work.config.ingest.limits.max_decode_memory_bytes,
    )


def _price_embed(work: _Workload, stage: str) -> StagePrice:
    model = work.config.embed if stage == "embed" else work.config.describe
    embedder, rates = model.embedder, work.rates
    facts = MODELS[embedder.name]
    tera_operations = work.images * facts.flops(embedder.image_size) / TERA
    seconds_on_gpu, seconds_on_cores = (
        tera_operations / (convolutions if facts.vit is None else vit)
        for vit, convolutions in (
            (rates.gpu_tflops_vit, rates.gpu_tflops_convolutions),
            (rates.core_tflops_vit, rates.core_tflops_convolutions),
        )
    )
    on_gpu = embedder.num_gpus > 0
    thumbnail_bytes = (model.thumbnail_side or 0) ** 2 / 4  # WebP, 2 bits a pixel
    return StagePrice(
        stage,
        work.images,
        work.images * work.image_bytes,
        work.images * (2 * embedder.dimensions + thumbnail_bytes),
        work.num_shards,
        gpu_seconds=seconds_on_gpu if on_gpu else 0.0,
        core_seconds=work.images / rates.decoded_per_core + (0.0 if on_gpu else seconds_on_cores),
        # Weights; the activations of a batch, as a few copies of its pixels at the first layer; pictures decoded ahead.
        worker_bytes=4 * facts.num_parameters + 3 * embedder.batch_size * 600 * embedder.image_size**2 / 10,
    )


def _price_pairs(work: _Workload) -> StagePrice:
    config, images = work.config.pairs, work.images
    search, width = config.search, work.config.describe.embedder.dimensions
    verifying = images / FIXED.verified_per_core if config.verification else 0.0
    judging_shards = max(1, -(-images // config.images_per_shard))
    edge_bytes = 100 * FIXED.edges_per_image * images
    if search.backend == "exact":
        gpu_seconds, core_seconds = _search_seconds(search, work.rates, images**2 * 2 * width)
        return StagePrice(
            "pairs",
            images,
            2 * width * images * max(1.0, images / search.rows_per_part),
            edge_bytes,
            judging_shards + work.num_shards,
            gpu_seconds=gpu_seconds,
            core_seconds=core_seconds + verifying,
            worker_bytes=100 * images + 2 * width * min(images, search.rows_per_part),
            driver_bytes=100 * images,
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
        2 * width * images + exchanged_bytes,
        exchanged_bytes + edge_bytes,
        work.num_shards + -(-images // search.rows_per_part) + judging_shards,
        gpu_seconds=(
            choosing / TERA / FIXED.gpu_tflops_single + joining / TERA / work.rates.gpu_tflops_half if on_gpu else 0.0
        ),
        core_seconds=verifying + (0.0 if on_gpu else (choosing + joining) / TERA / FIXED.core_tops_int8),
        driver_core_seconds=training / TERA / FIXED.core_tops_int8,
        worker_bytes=min(images, search.rows_per_part) * copies * (3 * width + 300),
        driver_bytes=100 * images + TRAINING_ROWS_PER_CELL * cells * 2 * width,
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
    row_bytes = sum(num_seeds[dataset.name] * dataset.k * 80 for dataset in config.datasets)
    return StagePrice(
        "retrieve",
        queries,
        2 * width * (kept + parts * queries),
        parts * queries * 64 + row_bytes,
        parts + len(config.datasets),
        gpu_seconds=gpu_seconds,
        core_seconds=core_seconds,
        worker_bytes=2 * width * part + 6 * width * min(queries, 32_768),
    )


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


def _search_seconds(search: SearchConfig, rates: RatesConfig, operations: float) -> tuple[float, float]:
    """Seconds of a GPU and of a core, one of them 0."""
    if search.num_gpus:
        return operations / TERA / rates.gpu_tflops_half, 0.0
    return 0.0, operations / TERA / FIXED.core_tops_int8
