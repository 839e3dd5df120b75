"""Prints the plan of a run before any image is read (`--plan`): its price, its sources, its stages and its config."""

import dataclasses
import shutil
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from curation.config import resolved_toml
from curation.models.embedders import EmbedderConfig
from curation.quotas import max_chosen_clusters
from curation.retrieval_modes import MODES, DatasetRows, Request, Retrieval, expected_rows, mode_of
from curation.retrieve import DatasetConfig
from curation.search.config import SearchConfig
from pipelines.main_path import CurateConfig
from pipelines.planning.price import Price, count_images, price_run
from pipelines.planning.rates import FIXED, FixedRates, RatesConfig
from pipelines.status import duration

# Columns of the widest table.
PAGE_WIDTH = 144


def print_plan(config: CurateConfig) -> None:
    """Print the price, the sources, the rows of each seed dataset, the stages, the rates and the resolved config.

    Images of local sources are counted unless the config states their number.
    """
    # A narrower page would cut the numbers of the price.
    console = Console(highlight=False, width=max(PAGE_WIDTH, shutil.get_terminal_size().columns))
    counts, _ = count_images(config)
    counted = config.model_copy(update={"stated_counts": counts})
    print_price(console, price_run(config, total_rows(counted)))
    console.print(f"Profile: {config.profile}")
    console.print(_sources_table(counted))
    console.print(_datasets_table(counted))
    for contradiction in contradictions(config):
        console.print(contradiction)
    console.print(_stages_table(config))
    for table in _rates_tables(config.rates):
        console.print(table)
    console.print("The resolved config:\n")
    console.print(resolved_toml(config), markup=False, soft_wrap=True)


def print_price(console: Console, price: Price) -> None:
    """Print the price of every stage, and the machines that the run needs."""
    console.print(_price_table(price))
    rates, machines = price.rates, price.machines
    workers_per_machine = rates.machine_gpus or rates.machine_cores
    memory = max(
        stage.worker_bytes * (rates.machine_gpus if stage.gpu_seconds else rates.machine_cores)
        for stage in price.stages
    )
    driver_memory = max(stage.driver_bytes for stage in price.stages)
    gpus = f"{rates.machine_gpus} GPUs, " if rates.machine_gpus else ""
    console.print(
        f"To finish within {rates.hours_wanted:g} hours, the run needs {machines:,} machine{'s' * (machines > 1)} of "
        f"{gpus}{rates.machine_cores} cores and {rates.machine_bytes_per_second / 1e9:g} GB/s, with {_bytes(memory)} "
        f"of memory for a worker on every {'GPU' if rates.machine_gpus else 'core'} (--workers "
        f"{machines * workers_per_machine}). The driver's machine: {_bytes(driver_memory)}."
        + (f" In all: {machines * price.hours:,.0f} machine-hours." if price.hours else "")
    )
    if price.uncounted:
        console.print(
            f"Not in the price: {', '.join(price.uncounted)}. Their files are not on this machine, and stated_counts "
            "does not name them."
        )
    console.print()


def total_rows(config: CurateConfig) -> int | None:
    """The most rows that the corpus can have; None where a count is missing."""
    clustering = config.retrieve.clustering
    total = 0 if clustering is None else clustering.num_images
    for dataset in config.retrieve.datasets:
        rows = dataset_rows(config, dataset)
        if rows is None:
            return None
        total += rows.rows
    return total


def dataset_rows(config: CurateConfig, dataset: DatasetConfig) -> DatasetRows | None:
    """The most rows that a dataset can bring; None where that needs a count that is not stated.

    Every chosen cluster is assumed to hold as many images as may be taken of it. Where `stated_clusters` leaves a
    dataset out, the seeds and the number of clusters bound its chosen clusters.
    """
    num_seeds = config.stated_counts.get(dataset.name)
    mode = _mode(config, dataset)
    if mode == "by_size" or (num_seeds is None and (dataset.as_is or MODES[mode].compares_seeds)):
        return None
    pool = (source.name for source in config.ingest.sources if source.role == "pool")
    num_clusters = config.cluster.resolved(sum(config.stated_counts.get(name, 0) for name in pool)).levels[0].size
    if num_seeds is not None:
        num_clusters = min(num_clusters, max_chosen_clusters(num_seeds, config.retrieve.more_than_seeds))
    num_clusters = config.stated_clusters.get(dataset.name, num_clusters)
    request = Request(
        num_seeds=num_seeds or 0,
        k=dataset.k,
        cluster_sizes=[config.retrieve.images_per_cluster] * num_clusters,
        images_per_cluster=config.retrieve.images_per_cluster,
        cap=dataset.cap,
    )
    return expected_rows(mode, request, as_is=dataset.as_is)


def contradictions(config: CurateConfig) -> list[str]:
    """One sentence for each dataset whose stated clusters need more seeds than are stated."""
    more_than, counts = config.retrieve.more_than_seeds, config.stated_counts
    return [
        f"{name}: {clusters:,} clusters with more than {more_than} seeds each need {clusters * (more_than + 1):,} "
        f"seeds, but {counts[name]:,} are stated."
        for name, clusters in config.stated_clusters.items()
        if name in counts and clusters > max_chosen_clusters(counts[name], more_than)
    ]


def _mode(config: CurateConfig, dataset: DatasetConfig) -> Retrieval:
    """The retrieval mode of a dataset; `by_size` where the mode depends on a size that is not stated."""
    if dataset.name not in config.stated_counts:
        return dataset.retrieval
    return mode_of(dataset.retrieval, config.stated_counts[dataset.name], config.retrieve.sample_above)


# The tables


def _price_table(price: Price) -> Table:
    rates, machines = price.rates, price.machines
    columns = ("images", "reads", "writes", "shards", "GPU-hours", "core-hours", "per worker", "driver")
    table = _table("Price", ("stage", *columns, f"time on {machines}", "limited by"), left=("stage",))
    for stage in price.stages:
        if not stage.images:
            table.add_row(stage.stage, "unknown")
            continue
        table.add_row(
            stage.stage,
            f"{round(stage.images):,}",
            *map(_bytes, (stage.reads, stage.writes)),
            f"{stage.shards:,}",
            _hours(stage.gpu_seconds),
            _hours(stage.core_seconds + stage.driver_core_seconds + stage.driver_seconds),
            *map(_bytes, (stage.worker_bytes, stage.driver_bytes)),
            duration(stage.total_seconds(rates, machines)),
            stage.limit(rates, machines),
        )
    table.add_section()
    reads, writes, gpu_seconds, core_seconds = (
        sum(getattr(stage, name) for stage in price.stages)
        for name in ("reads", "writes", "gpu_seconds", "core_seconds")
    )
    totals = (_bytes(reads), _bytes(writes), "", _hours(gpu_seconds), _hours(core_seconds))
    table.add_row("all", "", *totals, "", "", duration(price.hours * 3600))
    return table


def _sources_table(config: CurateConfig) -> Table:
    table = Table(title="Sources", title_justify="left")
    for column in ("source", "role", "layout", "path"):
        table.add_column(column)
    table.add_column("images", justify="right")
    for source in config.ingest.sources:
        num_images = _count(config.stated_counts.get(source.name))
        table.add_row(source.name, source.role, source.layout, source.path, num_images)
    return table


def _datasets_table(config: CurateConfig) -> Table:
    table = Table(title="Rows of each seed dataset", title_justify="left")
    table.add_column("dataset")
    for column in ("seeds", "as is", "retrieval", "clusters stated", "retrieved at most", "rows at most"):
        table.add_column(column, justify="right")
    for dataset in config.retrieve.datasets:
        rows, mode = dataset_rows(config, dataset), _mode(config, dataset)
        is_exact = (mode != "by_size" and MODES[mode].compares_seeds) or dataset.name in config.stated_clusters
        table.add_row(
            dataset.name,
            _count(config.stated_counts.get(dataset.name)),
            _count(rows.as_is) if rows and dataset.as_is else "",
            mode if mode == "by_size" else MODES[mode].label.format(k=dataset.k),
            _count(config.stated_clusters.get(dataset.name)),
            _count(rows.before_cap) if rows and is_exact else "",
            _count(rows.rows if rows else None),
        )
    if (clustering := config.retrieve.clustering) is not None:
        num_images = _count(clustering.num_images)
        table.add_row("", "", "", f"clustering, {clustering.draw}", "", num_images, num_images)
    table.add_section()
    table.add_row("total", "", "", "", "", "", _count(total_rows(config)))
    return table


def _stages_table(config: CurateConfig) -> Table:
    table = Table(title="Stages", title_justify="left", show_lines=True)
    table.add_column("stage")
    table.add_column("work")
    ingest, pairs, retrieve = config.ingest, config.pairs, config.retrieve
    check = "verified on thumbnails" if pairs.verification else "judged by the cosine of their descriptors"
    rows = {
        "ingest": f"reads {len(ingest.sources)} sources; rejects at most {ingest.max_reject_fraction:.0%} of the "
        f"images, including every image of more than {ingest.limits.max_pixels:,} pixels",
        "embed": _describe_embedder(config.embed.embedder),
        "describe": _describe_embedder(config.describe.embedder),
        "pairs": f"{pairs.num_neighbors} nearest descriptors from {pairs.min_descriptor_similarity:g}, "
        f"{_describe_search(pairs.search)}, "
        f"perceptual hashes within {pairs.max_phash_distance} bits (-1: none), {check}",
        "dedup": f"copies from {config.dedup.threshold:g}; holdout from {config.dedup.holdout_threshold:g}, "
        f"decontamination '{config.dedup.decontamination}'",
        "cluster": "; then ".join(
            ("clusters by the size of the pool" if level.num_clusters is None else f"{level.num_clusters:,} clusters")
            + f", {level.num_iterations} iterations"
            + (f", resampled {level.resampling.num_rounds} times" if level.resampling else "")
            for level in config.cluster.levels
        ),
        "retrieve": f"clusters with more than {retrieve.more_than_seeds} seeds of a dataset, "
        f"{retrieve.images_per_cluster:,} images of each; by_size means sample above {retrieve.sample_above:,} seeds; "
        f"{_describe_search(retrieve.search)}",
        "corpus": f"{config.pack.images_per_shard:,} images per tar, "
        f"{'with' if config.pack.repeats else 'without'} repeats",
    }
    for stage, work in rows.items():
        table.add_row(stage, work)
    return table


def _rates_tables(rates: RatesConfig) -> list[Table]:
    settings = _table(r"Rates of section \[rates]", ("rate", "value", "source"), left=("rate", "source"))
    for name, field in RatesConfig.model_fields.items():
        value = getattr(rates, name)
        settings.add_row(name, f"{value:,g}", str(field.description) if value == field.default else "your config")
    fixed = _table("Fixed rates", ("rate", "value", "source"), left=("rate", "source"))
    for rate in dataclasses.fields(FixedRates):
        fixed.add_row(rate.name, f"{getattr(FIXED, rate.name):,g}", rate.metadata["source"])
    return [settings, fixed]


def _table(title: str, columns: Iterable[str], *, left: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, justify="left" if column in left else "right")
    return table


def _describe_search(search: SearchConfig) -> str:
    if search.backend == "exact":
        return f"searched exactly on {search.device}"
    return (
        f"searched in {search.num_probes} cells of {search.rows_per_cell:,} on {search.device}, "
        f"recall at least {search.min_recall:g}"
    )


def _describe_embedder(embedder: EmbedderConfig) -> str:
    return f"{embedder.name} at {embedder.image_size} pixels on {embedder.device} in {embedder.precision}"


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


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
