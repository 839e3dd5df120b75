"""What a run would do, and what it would take, on one page, before any image is read: `--plan`."""

import shutil
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from curation.config import resolved_toml
from curation.models.embedders import EmbedderConfig
from curation.quotas import DatasetRows, most_clusters, retrieval_mode, selection_rows
from curation.retrieve import DatasetConfig
from curation.search.config import SearchConfig
from pipelines.curate_config import CurateConfig
from pipelines.planning.price import Price, count_images, price
from pipelines.planning.rates import RatesConfig
from pipelines.status import duration

# Columns of the widest table.
PAGE_WIDTH = 144


def print_plan(config: CurateConfig) -> None:
    """Print the sources, what each seed dataset brings, the stages with their numbers and their price, and the config.

    Images that are at hand and not stated are counted.
    """
    # A narrower page would cut the numbers of the price.
    console = Console(highlight=False, width=max(PAGE_WIDTH, shutil.get_terminal_size().columns))
    counts, _ = count_images(config)
    rows = _total_rows(stated := config.model_copy(update={"stated_counts": counts}))
    print_price(console, price(config, rows))
    console.print(f"Profile: {config.profile}")
    console.print(_sources(stated))
    console.print(_datasets(stated))
    for doubt in doubts(config):
        console.print(doubt)
    console.print(_stages(config))
    console.print(_rates(config.rates))
    console.print("The resolved config:\n")
    console.print(resolved_toml(config), markup=False, soft_wrap=True)


def print_price(console: Console, found: Price) -> None:
    """Print what every stage takes, the machines it wants and what they are to have."""
    rates, machines = found.rates, found.machines
    table = Table(title="What it takes", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    for column in (
        "images",
        "reads",
        "writes",
        "shards",
        "GPU-hours",
        "core-hours",
        "a worker",
        "the driver",
        f"on {machines}",
        "limited by",
    ):
        table.add_column(column, justify="right")
    for stage in found.stages:
        if not stage.images:
            table.add_row(stage.stage, "unknown")
            continue
        table.add_row(
            stage.stage,
            _rounded(stage.images),
            *map(_bytes, (stage.reads, stage.writes)),
            f"{stage.shards:,}",
            _hours(stage.gpu_seconds),
            _hours(stage.core_seconds + stage.driver_core_seconds + stage.driver_seconds),
            *map(_bytes, (stage.worker_bytes, stage.driver_bytes)),
            duration(stage.total_seconds(rates, machines)),
            stage.limit(rates, machines),
        )
    table.add_section()
    gpu, cores, reads, writes = (
        sum(values)
        for values in zip(
            *((one.gpu_seconds, one.core_seconds, one.reads, one.writes) for one in found.stages), strict=True
        )
    )
    table.add_row(
        "all", "", _bytes(reads), _bytes(writes), "", _hours(gpu), _hours(cores), "", "", duration(found.hours * 3600)
    )
    console.print(table)
    workers = rates.machine_gpus or rates.machine_cores
    memory = max(
        stage.worker_bytes * (rates.machine_gpus if stage.gpu_seconds else rates.machine_cores)
        for stage in found.stages
    )
    has_gpus = f"{rates.machine_gpus} GPUs, " if rates.machine_gpus else ""
    console.print(
        f"To be done within {rates.hours_wanted:g} hours it wants {machines:,} machine{'s' * (machines > 1)} of "
        f"{has_gpus}{rates.machine_cores} cores and {rates.machine_bytes_per_second / 1e9:g} GB/s, with "
        f"{_bytes(memory)} of memory where every {'GPU' if rates.machine_gpus else 'core'} has a worker; --workers "
        f"{machines * workers}. The driver's machine: {_bytes(max(stage.driver_bytes for stage in found.stages))}."
        + (f" They are held for {machines * found.hours:,.0f} machine-hours." if found.hours else "")
    )
    if found.without:
        console.print(
            f"Without {', '.join(found.without)}: no count is stated (stated_counts) and no files are at hand."
        )
    console.print()


def _rates(rates: RatesConfig) -> Table:
    table = Table(title="Rates ([rates])", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("rate", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("from")
    for name, field in RatesConfig.model_fields.items():
        value = getattr(rates, name)
        table.add_row(name, f"{value:,g}", str(field.description) if value == field.default else "your config")
    return table


def _total_rows(config: CurateConfig) -> int | None:
    """The rows of all datasets at most, and what is drawn by clustering; None where a count is missing."""
    total = 0 if config.retrieve.clustering is None else config.retrieve.clustering.num_images
    for dataset in config.retrieve.datasets:
        rows = dataset_rows(config, dataset)
        if rows is None:
            return None
        total += rows.rows
    return total


def _rounded(number: float) -> str:
    return f"{round(number):,}"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return "" if not number else "< 1 MB"


def _hours(seconds: float) -> str:
    if not seconds:
        return ""
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.1 else "< 0.1"


def _sources(config: CurateConfig) -> Table:
    table = Table(title="Sources", title_justify="left")
    for column in ("source", "role", "layout", "path"):
        table.add_column(column)
    table.add_column("images", justify="right")
    for source in config.ingest.sources:
        stated = _count(config.stated_counts.get(source.name))
        table.add_row(source.name, source.role, source.layout, source.path, stated)
    return table


def dataset_rows(config: CurateConfig, dataset: DatasetConfig) -> DatasetRows | None:
    """The rows that a dataset brings at most; None where that needs a count that was not stated.

    Every chosen cluster is taken to hold all that may be taken of it. Where the chosen clusters are not stated, they
    are as many as the seeds, or all clusters, allow.
    """
    num_seeds = config.stated_counts.get(dataset.name)
    mode = _mode(config, dataset)
    if mode == "by_size" or (num_seeds is None and (dataset.as_is or mode == "sample")):
        return None
    num_clusters = config.cluster.levels[0].num_clusters
    if num_seeds is not None:
        num_clusters = min(num_clusters, most_clusters(num_seeds, config.retrieve.more_than_seeds))
    num_clusters = config.stated_clusters.get(dataset.name, num_clusters)
    return selection_rows(
        mode,
        num_seeds=num_seeds or 0,
        as_is=dataset.as_is,
        k=dataset.k,
        cluster_sizes=[config.retrieve.images_per_cluster] * num_clusters,
        images_per_cluster=config.retrieve.images_per_cluster,
        cap=dataset.cap,
    )


def doubts(config: CurateConfig) -> list[str]:
    """Where the stated numbers contradict the rules, a sentence each."""
    more_than, counts = config.retrieve.more_than_seeds, config.stated_counts
    return [
        f"{name}: {clusters:,} clusters with more than {more_than} seeds each need {clusters * (more_than + 1):,} "
        f"seeds, but {counts[name]:,} are stated."
        for name, clusters in config.stated_clusters.items()
        if name in counts and clusters > most_clusters(counts[name], more_than)
    ]


def _datasets(config: CurateConfig) -> Table:
    table = Table(title="What each seed dataset brings", title_justify="left")
    table.add_column("dataset")
    for column in ("seeds", "as is", "retrieval", "clusters stated", "retrieved at most", "rows at most"):
        table.add_column(column, justify="right")
    total: int | None = 0
    for dataset in config.retrieve.datasets:
        rows, mode = dataset_rows(config, dataset), _mode(config, dataset)
        total = None if total is None or rows is None else total + rows.rows
        table.add_row(
            dataset.name,
            _count(config.stated_counts.get(dataset.name)),
            _count(rows.as_is) if rows and dataset.as_is else "",
            mode + (f" k={dataset.k}" if mode == "sample" else ""),
            _count(config.stated_clusters.get(dataset.name)),
            _count(rows.found) if rows and (mode == "sample" or dataset.name in config.stated_clusters) else "",
            _count(rows.rows if rows else None),
        )
    if (clustering := config.retrieve.clustering) is not None:
        total = None if total is None else total + clustering.num_images
        number = _count(clustering.num_images)
        table.add_row("", "", "", f"clustering, {clustering.draw}", "", number, number)
    table.add_section()
    table.add_row("total", "", "", "", "", "", _count(total))
    return table


def _stages(config: CurateConfig) -> Table:
    table = Table(title="Stages", title_justify="left", show_lines=True)
    table.add_column("stage")
    table.add_column("does")
    ingest, pairs, retrieve = config.ingest, config.pairs, config.retrieve
    check = "verified on thumbnails" if pairs.verification else "judged by the cosine of their descriptors"
    rows = {
        "ingest": f"reads {len(ingest.sources)} sources; rejects at most {ingest.max_reject_fraction:.0%}, "
        f"among them what has more than {ingest.limits.max_pixels:,} pixels",
        "embed": _model(config.embed.embedder),
        "describe": _model(config.describe.embedder),
        "pairs": f"{pairs.num_neighbors} nearest descriptors from {pairs.min_descriptor_similarity:g}, "
        f"{_search(pairs.search)}, "
        f"perceptual hashes within {pairs.max_phash_distance} bits (-1: none), {check}",
        "dedup": f"copies from {config.dedup.threshold:g}; holdout from {config.dedup.holdout_threshold:g}, "
        f"decontamination '{config.dedup.decontamination}'",
        "cluster": "; then ".join(
            f"{level.num_clusters:,} clusters, {level.num_iterations} iterations"
            + (f", resampled {level.resampling.num_rounds} times" if level.resampling else "")
            for level in config.cluster.levels
        ),
        "retrieve": f"clusters with more than {retrieve.more_than_seeds} seeds of a dataset, "
        f"{retrieve.images_per_cluster:,} images of each; by_size means sample above {retrieve.sample_above:,} seeds; "
        f"{_search(retrieve.search)}",
        "corpus": f"{config.pack.images_per_shard:,} images per tar, "
        f"{'with' if config.pack.repeats else 'without'} repeats",
    }
    for stage, text in rows.items():
        table.add_row(stage, text)
    return table


def _search(search: SearchConfig) -> str:
    if search.backend == "exact":
        return f"searched exactly on {search.device}"
    return (
        f"searched in {search.num_probes} cells of {search.rows_per_cell:,} on {search.device}, "
        f"recall at least {search.min_recall:g}"
    )


def _model(embedder: EmbedderConfig) -> str:
    return f"{embedder.name} at {embedder.image_size} pixels on {embedder.device} in {embedder.precision}"


def _mode(config: CurateConfig, dataset: DatasetConfig) -> Literal["sample", "cluster", "by_size", "none"]:
    """How a dataset searches the pool; `by_size` where its size is not stated."""
    if dataset.name not in config.stated_counts:
        return dataset.retrieval
    return retrieval_mode(dataset.retrieval, config.stated_counts[dataset.name], config.retrieve.sample_above)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
