"""What a run would cost before it is run: images, bytes, GPU-hours, memory and the machines it wants, stage by stage.

Arithmetic alone: the formulas of docs/scaling.md over the config, the counts of images and the rates of `[rates]`, of
which every one says where it is from. Products, decoding and traffic overlap within a stage, so the slowest of the
three is its time; what the driver does alone comes on top.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from curation.files import paths
from curation.images import sources
from curation.models.embedders import MODELS
from curation.search.config import SearchConfig
from curation.search.ivf import TRAINING_ITERATIONS, TRAINING_ROWS_PER_CELL
from pipelines.curate_config import CurateConfig
from pipelines.planning.rates import RatesConfig

TERA = 1e12


@dataclass(frozen=True)
class StagePrice:
    """What one stage takes. Bytes of memory are of one worker and of the driver."""

    stage: str
    images: float
    reads: float
    writes: float
    shards: int
    gpu_seconds: float = 0.0
    core_seconds: float = 0.0
    driver_core_seconds: float = 0.0
    """Of the driver's machine, on all its cores."""
    driver_seconds: float = 0.0
    """On one core, however many there are."""
    worker_bytes: float = 0.0
    driver_bytes: float = 0.0

    def seconds(self, rates: RatesConfig, machines: int) -> dict[str, float]:
        """What each resource of so many machines takes; the driver's own counts apart."""
        return {
            "GPUs": self.gpu_seconds / max(machines * rates.machine_gpus, 1),
            "cores": self.core_seconds / (machines * rates.machine_cores),
            "traffic": (self.reads + self.writes) / (machines * rates.machine_bytes_per_second),
        }

    def total_seconds(self, rates: RatesConfig, machines: int) -> float:
        """On so many machines."""
        driver = self.driver_core_seconds / rates.machine_cores + self.driver_seconds
        return max(self.seconds(rates, machines).values()) + driver

    def limit(self, rates: RatesConfig, machines: int) -> str:
        """What takes longest."""
        seconds = self.seconds(rates, machines)
        driver = self.driver_core_seconds / rates.machine_cores + self.driver_seconds
        slowest = max(seconds, key=seconds.__getitem__)
        return "driver" if driver > seconds[slowest] else slowest


@dataclass(frozen=True)
class Price:
    """What a run takes, and on what."""

    stages: tuple[StagePrice, ...]
    rates: RatesConfig
    machines: int
    counted: Mapping[str, int]
    """Images of each source."""
    without: tuple[str, ...]
    """Sources whose images are not known."""

    @property
    def hours(self) -> float:
        """On the machines."""
        return sum(stage.total_seconds(self.rates, self.machines) for stage in self.stages) / 3600


def count_images(config: CurateConfig) -> tuple[dict[str, int], float]:
    """Images of each source, stated or counted in files at hand, and the bytes of one on average.

    Of tars and Parquet files at hand the size tells the number; a source that lies elsewhere, and is not stated, is
    left out.
    """
    counts, size, files = dict(config.stated_counts), 0, 0
    for source in config.ingest.sources:
        if source.name in counts or not paths.is_local(source.path) or not paths.exists(source.path):
            continue
        found = sources.list_files(source)
        own = sum(file.size for file in found)
        if source.layout == "folder":
            counts[source.name] = len(found)
            size, files = size + own, files + len(found)
        else:
            counts[source.name] = round(own / config.rates.bytes_per_image)
    return counts, size / files if files else config.rates.bytes_per_image


def price(config: CurateConfig, rows: int | None) -> Price:
    """What every stage takes, given the images of each source and the `rows` that are packed, None where unknown."""
    counts, image_bytes = count_images(config)
    rates = config.rates
    if not _asks_for_gpus(config):
        rates = rates.model_copy(update={"machine_gpus": 0})
    by_role = {
        role: sum(counts.get(source.name, 0) for source in config.ingest.sources if source.role == role)
        for role in ("pool", "seed", "holdout")
    }
    stages = _stages(config, rates, counts, by_role, image_bytes, rows)
    machines = 1
    while machines < 10_000:
        done = Price(stages, rates, machines, counts, ())
        if done.hours <= rates.hours_wanted:
            break
        machines += 1
    without = tuple(source.name for source in config.ingest.sources if source.name not in counts)
    return Price(stages, rates, machines, counts, without)


def _asks_for_gpus(config: CurateConfig) -> bool:
    models, searches = (config.embed, config.describe), (config.pairs.search, config.retrieve.search)
    return any(model.embedder.num_gpus for model in models) or any(search.num_gpus for search in searches)


def _stages(
    config: CurateConfig,
    rates: RatesConfig,
    counts: Mapping[str, int],
    by_role: Mapping[str, int],
    image_bytes: float,
    rows: int | None,
) -> tuple[StagePrice, ...]:
    images = sum(by_role.values())
    kept = by_role["pool"] * rates.kept_share
    num_shards = sum(
        -(
            -counts.get(source.name, 0)
            // (config.ingest.images_per_shard if source.layout == "folder" else rates.images_per_tar)
        )
        for source in config.ingest.sources
    )
    decoding, read = images / rates.decoded_per_core, images * image_bytes
    ingest = StagePrice(
        "ingest",
        images,
        read,
        150 * images,  # a row of records.IMAGES, compressed; measured on the demo: 130 to 170
        num_shards,
        core_seconds=decoding,
        worker_bytes=config.ingest.limits.max_decode_memory_bytes,
    )
    embedded = []
    for name, model in (("embed", config.embed), ("describe", config.describe)):
        facts, side = MODELS[model.embedder.name], model.embedder.image_size
        work, is_vit = images * facts.flops(side) / TERA, facts.vit is not None
        on_gpu = model.embedder.num_gpus > 0
        rate = (
            (rates.gpu_tflops_vit if is_vit else rates.gpu_tflops_convolutions)
            if on_gpu
            else (rates.core_tflops_vit if is_vit else rates.core_tflops_convolutions)
        )
        embedded.append(
            StagePrice(
                name,
                images,
                read,
                images * (2 * model.embedder.dimensions + (model.thumbnail_side or 0) ** 2 / 4),  # WebP, 2 bits a pixel
                num_shards,
                gpu_seconds=work / rate if on_gpu else 0.0,
                core_seconds=decoding + (0.0 if on_gpu else work / rate),
                # Weights, activations of a batch as a few copies of its pixels at the first layer, and pictures ahead.
                worker_bytes=4 * facts.num_parameters
                + 3 * model.embedder.batch_size * 600 * model.embedder.image_size**2 / 10,
            )
        )
    dedup_edges = rates.edges_per_image * images
    iterations = sum(level.num_iterations for level in config.cluster.levels)
    clusters, wide = config.cluster.levels[0].num_clusters, config.embed.embedder.dimensions
    per_cluster = config.cluster.max_points_per_centroid
    points = kept if per_cluster is None else min(kept, per_cluster * clusters)
    cluster = StagePrice(
        "cluster",
        kept,
        2 * wide * (iterations * points + kept),
        100 * kept,
        num_shards,
        core_seconds=(iterations * points + kept) * clusters * 2 * wide / TERA / rates.core_tflops_kmeans,
        worker_bytes=12 * clusters * wide + 1e8,
        driver_bytes=16 * clusters * wide,
    )
    packed = rows or 0
    return (
        ingest,
        *embedded,
        _pairs(config, rates, images, num_shards),
        StagePrice(
            "dedup",
            images,
            100 * dedup_edges,
            60 * images,
            num_shards,
            driver_seconds=dedup_edges / rates.edges_per_second,
            driver_bytes=4 * images,  # the parents; 90 bytes an image and 70 an edge lie on its disk
        ),
        cluster,
        _retrieve(config, rates, counts, kept, wide),
        StagePrice(
            "corpus",
            packed,
            packed * image_bytes,
            packed * image_bytes * 1.02,
            -(-packed // config.pack.images_per_shard),
            core_seconds=2 * packed * image_bytes / rates.hashed_per_core,
            worker_bytes=3e8,
            driver_bytes=170 * packed,
        ),
    )


def _pairs(config: CurateConfig, rates: RatesConfig, images: int, num_shards: int) -> StagePrice:
    search, wide = config.pairs.search, config.describe.embedder.dimensions
    verifying = images / rates.verified_per_core if config.pairs.verification else 0.0
    judged = max(1, -(-images // config.pairs.images_per_shard))
    if search.backend == "exact":
        gpu, cores = _products(search, rates, images**2 * 2 * wide)
        return StagePrice(
            "pairs",
            images,
            2 * wide * images * max(1.0, images / search.rows_per_part),
            100 * rates.edges_per_image * images,
            judged + num_shards,
            gpu_seconds=gpu,
            core_seconds=cores + verifying,
            worker_bytes=100 * images + 2 * wide * min(images, search.rows_per_part),
            driver_bytes=100 * images,
        )
    cells = search.num_cells(images)
    copies = min(rates.copies_in_exchange, search.num_probes)
    choosing, joining = images * cells * 2 * wide, images * search.num_probes * search.rows_per_cell * 2 * wide
    on_gpu = search.num_gpus > 0
    gpu = choosing / TERA / rates.gpu_tflops_single + joining / TERA / rates.gpu_tflops_half if on_gpu else 0.0
    exchanged = images * copies * (2 * wide + 76)
    return StagePrice(
        "pairs",
        images,
        2 * wide * images + exchanged,
        exchanged + 100 * rates.edges_per_image * images,
        num_shards + -(-images // search.rows_per_part) + judged,
        gpu_seconds=gpu,
        core_seconds=verifying + (0.0 if on_gpu else (choosing + joining) / TERA / rates.core_tops_int8),
        driver_core_seconds=TRAINING_ITERATIONS
        * TRAINING_ROWS_PER_CELL
        * float(cells) ** 2
        * 2
        * wide
        / TERA
        / rates.core_tops_int8,
        worker_bytes=min(images, search.rows_per_part) * copies * (3 * wide + 300),
        driver_bytes=100 * images + TRAINING_ROWS_PER_CELL * cells * 2 * wide,
    )


def _retrieve(
    config: CurateConfig, rates: RatesConfig, counts: Mapping[str, int], kept: float, wide: int
) -> StagePrice:
    search = config.retrieve.search
    asking = [
        counts.get(dataset.name, 0)
        for dataset in config.retrieve.datasets
        if dataset.retrieval == "sample"
        or (dataset.retrieval == "by_size" and counts.get(dataset.name, 0) > config.retrieve.sample_above)
    ]
    queries, parts = sum(asking), math.ceil(kept / search.rows_per_part)
    compared = kept if search.backend == "exact" else search.num_probes * search.rows_per_cell
    gpu, cores = _products(search, rates, queries * compared * 2 * wide)
    part = min(kept, search.rows_per_part)
    found = sum(counts.get(dataset.name, 0) * dataset.k * 80 for dataset in config.retrieve.datasets)
    return StagePrice(
        "retrieve",
        queries,
        2 * wide * (kept + parts * queries),
        parts * queries * 64 + found,
        parts + len(config.retrieve.datasets),
        gpu_seconds=gpu,
        core_seconds=cores,
        worker_bytes=2 * wide * part + 6 * wide * min(queries, 32_768),
    )


def _products(search: SearchConfig, rates: RatesConfig, operations: float) -> tuple[float, float]:
    """Seconds of a GPU and of a core."""
    if search.num_gpus:
        return operations / TERA / rates.gpu_tflops_half, 0.0
    return 0.0, operations / TERA / rates.core_tops_int8
