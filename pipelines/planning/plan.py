"""Prints the plan of a run before any image is read (`--plan`).

The first screen has the time, memory and disk of this machine, and the time of each stage. With `verbose`, the bytes of
each stage, the sources, the datasets, the rates and the resolved config follow.
"""

import dataclasses
import shutil
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from curation.config import resolved_toml
from curation.embed import one_pass_serves
from curation.engine.progress import printable
from curation.files import paths
from curation.models.embedders import EmbedderConfig
from curation.quotas import max_chosen_clusters
from curation.retrieval_modes import MODES, DatasetRows, Request, Retrieval, expected_rows, mode_of
from curation.retrieve import DatasetConfig
from curation.search.config import SearchConfig
from pipelines.main_path import CurateConfig
from pipelines.planning import measured
from pipelines.planning.machine import Machine, this_machine
from pipelines.planning.measured import Measurements, StageEstimate
from pipelines.planning.price import Counts, Price, count_sources, price_run
from pipelines.planning.rates import FIXED, FixedRates, RatesConfig
from pipelines.status import duration

# Columns of the widest table of the verbose plan.
PAGE_WIDTH = 144
# Images below which a measured run is called small. Assumed: start-up is then most of its time.
SMALL_SAMPLE = 500
# Names and differences that are listed on the first screen; the others are counted.
MAX_LISTED = 3


def print_plan(
    config: CurateConfig,
    *,
    output: str,
    rates_from: str | None = None,
    workers: int | None = None,
    verbose: bool = False,
    machine: Machine | None = None,
) -> None:
    """Print the plan of a run that writes to `output`.

    rates_from: the folder of a finished run whose times price this one. workers: of the machine; None for one a core.
    machine: None for this one.
    Raises InputError for sources that are missing here, and for a run without times.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    measurements = None if rates_from is None else measured.read_measurements(rates_from)
    counts = count_sources(config)
    counted = config.model_copy(update={"stated_counts": dict(counts.of_source)})
    price = price_run(config, counts, total_rows(counted))
    if machine is None:
        bytes_per_second = config.rates.machine_bytes_per_second
        machine = this_machine(output, with_gpus=price.needs_gpus, bytes_per_second=bytes_per_second)
    if workers is not None:
        machine = dataclasses.replace(machine, cores=workers)
    _print_first_screen(console, counted, counts, price, machine, measurements)
    if not verbose:
        console.print("\nRates, sources, datasets and the resolved config: --plan --verbose")
        return
    # A narrower page would cut the numbers of the price.
    wide = Console(highlight=False, width=max(PAGE_WIDTH, shutil.get_terminal_size().columns))
    wide.print()
    wide.print(_price_table(price))
    wide.print(f"Profile: {config.profile}", markup=False)
    wide.print(_sources_table(counted))
    wide.print(_datasets_table(counted))
    for contradiction in contradictions(counted):
        wide.print(contradiction, markup=False)
    wide.print(_stages_table(config, counts))
    for table in _rates_tables(config.rates):
        wide.print(table)
    wide.print("The resolved config:\n")
    wide.print(resolved_toml(config), markup=False, soft_wrap=True)


# The first screen


def _print_first_screen(
    console: Console,
    config: CurateConfig,
    counts: Counts,
    price: Price,
    machine: Machine,
    measurements: Measurements | None,
) -> None:
    lacks_gpus = price.needs_gpus and not machine.gpus
    estimates = None
    if measurements is not None:
        rows = total_rows(config)
        estimates = measured.estimate_stages(config, counts, rows, measurements, workers=machine.cores)
    gpus = f", {_plural(machine.gpus, 'GPU')}" if machine.gpus else ", no GPU" if price.needs_gpus else ""
    console.print(f"On this machine ({_plural(machine.cores, 'core')}{gpus}):")
    at_least = "at least " if counts.unknown else ""
    seconds = price.seconds(machine) if estimates is None else _total_seconds(estimates)
    needed = "a GPU, which is not here" if lacks_gpus else f"{at_least}{duration(seconds)}"
    console.print(f"  time    {needed}")
    problems = ["it needs a GPU"] if lacks_gpus else []
    for name, number, free in (
        ("memory", price.memory_bytes(machine), machine.memory_bytes),
        ("disk", price.disk_bytes, machine.disk_bytes),
    ):
        there = "" if free is None else f" of {size_text(free)} free"
        console.print(f"  {name:<7} {at_least}{size_text(number)}{there}")
        if free is not None and number > free:
            problems.append(f"{name} of {size_text(number)}, and {size_text(free)} are free")
    if problems:
        console.print(f"  It does not fit on this machine: {'; '.join(problems)}.")
    console.print()
    cluster, num_machines = _cluster(config.rates, price, machine)
    if estimates is not None and measurements is not None:
        console.print(_estimates_table(estimates))
    else:
        machines = (cluster, num_machines) if lacks_gpus else (machine, 1)
        console.print(_times_table(price, *machines, at_least=at_least))
    rows = total_rows(config)
    if rows is not None:
        console.print(f"The corpus: up to {rows:,} rows.")
    if cluster != machine or seconds > 3600 * config.rates.hours_wanted:
        console.print(_cluster_line(config.rates, price, cluster, num_machines))
    for line in _notes(config, counts, measurements):
        console.print(printable(line))


def _cluster(rates: RatesConfig, price: Price, machine: Machine) -> tuple[Machine, int]:
    """The machines of a cluster, of the size that the config states or of this machine, and their number."""
    cluster = machine
    if rates.machine_cores is not None or rates.machine_gpus is not None:
        cores = machine.cores if rates.machine_cores is None else rates.machine_cores
        gpus = machine.gpus if rates.machine_gpus is None else rates.machine_gpus
        cluster = Machine(cores, gpus if price.needs_gpus else 0, rates.machine_bytes_per_second)
    return cluster, price.num_machines(cluster, rates.hours_wanted)


def _cluster_line(rates: RatesConfig, price: Price, cluster: Machine, num_machines: int) -> str:
    gpus = f"{_plural(cluster.gpus, 'GPU')} and " if cluster.gpus else ""
    hours = price.seconds(cluster, num_machines) / 3600
    memory = size_text(price.memory_bytes(cluster))
    return (
        f"On machines of {gpus}{_plural(cluster.cores, 'core')}: {hours:,.1f} hours on {num_machines:,} of them "
        f"(rates.hours_wanted = {rates.hours_wanted:g}), {memory} of memory each."
    )


def _notes(config: CurateConfig, counts: Counts, measurements: Measurements | None) -> list[str]:
    """What the numbers rest on: counts of a part, damage, sources without a count, and the source of the rates."""
    lines = [
        f"{name}: counted {count.num_counted:,} of {count.num_files:,} files, the rest by their bytes."
        for name, count in counts.counted.items()
        if not count.is_exact
    ]
    if damaged := [uri for count in counts.counted.values() for uri in count.damaged]:
        lines.append(f"Not readable to their end: {_listed(damaged)}.")
    if counts.unknown:
        if config.demo_data is not None and not paths.exists(config.demo_data):
            lines.append(f"A run first fetches {config.demo_data}; python -m pipelines.demo.dataset does it now.")
        lines.append(
            f"Unknown: {_listed(counts.unknown)}. Not on this machine, and without a number in stated_counts; so times "
            "and sizes are at least these."
        )
    if config.ingest.sample_pool < 1:
        lines.append(f"A sample: about {100 * config.ingest.sample_pool:g}% of the pool (ingest.sample_pool).")
    if one_pass_serves(config.embed, config.describe):
        lines.append("describe is made in the pass of embed: the same network on the same pixels.")
    if measurements is None:
        lines.append(
            "Times are assumed rates, within a factor of three. For better ones: run --sample 0.1 --output SAMPLE, "
            "then --plan --rates-from SAMPLE."
        )
        return lines
    images = sum(measurements.read.values())
    lines.append(
        f"Times as measured on {images:,} images in {measurements.run} on {measurements.date}. Start-up: "
        f"{FIXED.ray_seconds:g} s for Ray and the report (assumed), and that of each stage."
    )
    if images < SMALL_SAMPLE:
        lines.append(f"So few images say little of {SMALL_SAMPLE:,} or more: take a larger --sample.")
    names, names_there = ({source.name for source in each.ingest.sources} for each in (config, measurements.config))
    if names != names_there:
        lines.append(f"Other sources than there: {_listed(sorted(names ^ names_there))}.")
    if differing := measured.differing_settings(config, measurements.config):
        lines.append(f"Other settings than there: {_listed(differing)}.")
    return lines


def _total_seconds(estimates: Sequence[StageEstimate]) -> float:
    return FIXED.ray_seconds + sum(estimate.seconds for estimate in estimates)


def _times_table(price: Price, machine: Machine, machines: int, *, at_least: str) -> Table:
    where = f"time on {machines:,}" if machines > 1 else "time"
    table = _table(None, ("stage", "items", where, "limited by"), left=("stage", "limited by"))
    for stage in price.stages:
        if not stage.images:
            table.add_row(stage.stage, "unknown")
            continue
        seconds = stage.total_seconds(machine, machines)
        table.add_row(stage.stage, f"{round(stage.images):,}", duration(seconds), stage.limit(machine, machines))
    table.add_row("start-up", "", duration(FIXED.start_seconds), "")
    table.add_section()
    table.add_row("all", "", at_least + duration(price.seconds(machine, machines)))
    return table


def _estimates_table(estimates: Sequence[StageEstimate]) -> Table:
    table = _table(None, ("stage", "items", "time", "start-up", "measured", "on items"), left=("stage",))
    for each in estimates:
        table.add_row(
            each.stage,
            f"{round(each.images):,}",
            duration(each.seconds),
            duration(each.start_seconds),
            duration(each.measured_seconds),
            f"{each.measured_images:,}",
        )
    table.add_row("Ray, report", "", duration(FIXED.ray_seconds), duration(FIXED.ray_seconds))
    table.add_section()
    start_seconds = FIXED.ray_seconds + sum(each.start_seconds for each in estimates)
    measured_seconds = sum(each.measured_seconds for each in estimates)
    table.add_row("all", "", duration(_total_seconds(estimates)), duration(start_seconds), duration(measured_seconds))
    return table


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


# The numbers of rows


def total_rows(config: CurateConfig) -> int | None:
    """The most rows that the corpus can have; None where a count is missing."""
    clustering = config.retrieve.clustering
    total = 0 if clustering is None else clustering.num_images
    for dataset in config.retrieve.datasets:
        rows = dataset_rows(config, dataset)
        if rows is None:
            return None
        total += rows.rows
    if config.pack.repeats:
        return total
    # Each image once: at most all seeds and the whole pool.
    counts = config.stated_counts
    seeds, pool = ([s.name for s in config.ingest.sources if s.role == role] for role in ("seed", "pool"))
    if not all(name in counts for name in (*seeds, *pool)):
        return total
    num_pool = sum(counts[name] for name in pool) * config.ingest.sample_pool
    return min(total, sum(counts[name] for name in seeds) + round(num_pool))


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


# The tables of the verbose plan


def _price_table(price: Price) -> Table:
    columns = ("images", "reads", "writes", "shards", "GPU-hours", "core-hours", "per worker", "driver")
    table = _table("Price", ("stage", *columns), left=("stage",))
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
        )
    table.add_section()
    reads, writes, gpu_seconds, core_seconds = (
        sum(getattr(stage, name) for stage in price.stages)
        for name in ("reads", "writes", "gpu_seconds", "core_seconds")
    )
    table.add_row("all", "", _bytes(reads), _bytes(writes), "", _hours(gpu_seconds), _hours(core_seconds))
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


def _stages_table(config: CurateConfig, counts: Counts) -> Table:
    table = Table(title="Stages", title_justify="left", show_lines=True)
    table.add_column("stage")
    table.add_column("work")
    ingest, pairs, retrieve = config.ingest, config.pairs, config.retrieve
    check = "verified on thumbnails" if pairs.verification else "judged by the cosine of their descriptors"
    cluster = config.cluster.resolved(round(FIXED.kept_share * counts.of_role(config, "pool")))
    rows = {
        "ingest": f"reads {len(ingest.sources)} sources; rejects at most {ingest.max_reject_fraction:.0%} of the "
        f"images, including every image of more than {ingest.limits.max_pixels:,} pixels",
        "embed": _describe_embedder(config.embed.embedder),
        "describe": _describe_embedder(config.describe.embedder),
        "pairs": (
            f"{pairs.num_neighbors} nearest descriptors from {pairs.min_descriptor_similarity:g}, "
            f"{_describe_search(pairs.search)}, "
            if pairs.num_neighbors
            else "no search for near descriptors, "
        )
        + f"perceptual hashes within {pairs.max_phash_distance} bits (-1: none), {check}",
        "self_check": (
            f"copies of at most {config.self_check.max_images:,} pool images, edited, described and compared"
            if config.self_check.max_images
            else "off"
        ),
        "dedup": f"copies from {config.dedup.threshold:g}; holdout from {config.dedup.holdout_threshold:g}, "
        f"decontamination '{config.dedup.decontamination}'",
        "cluster": "; then ".join(
            f"{level.size:,} clusters, {level.num_iterations} iterations"
            + (f", resampled {level.resampling.num_rounds} times" if level.resampling else "")
            for level in cluster.levels
        ),
        "retrieve": f"clusters with more than {retrieve.more_than_seeds} seeds of a dataset, "
        f"{retrieve.images_per_cluster:,} images of each; by_size means sample above {retrieve.sample_above:,} seeds; "
        f"{_describe_search(retrieve.search)}"
        + ("; copies in the corpus are passed over" if retrieve.check_copies else ""),
        "corpus": f"{config.pack.images_per_shard:,} images per tar, "
        f"{'with' if config.pack.repeats else 'without'} repeats",
        "images": "one row for each unique image, with its place on a map of the content",
    }
    for stage, work in rows.items():
        table.add_row(stage, work)
    return table


def _rates_tables(rates: RatesConfig) -> list[Table]:
    settings = _table(r"Rates of section \[rates]", ("rate", "value", "source"), left=("rate", "source"))
    for name, field in RatesConfig.model_fields.items():
        value = getattr(rates, name)
        shown = "this machine's" if value is None else f"{value:,g}"
        settings.add_row(name, shown, str(field.description) if value == field.default else "your config")
    fixed = _table("Fixed rates", ("rate", "value", "source"), left=("rate", "source"))
    for rate in dataclasses.fields(FixedRates):
        fixed.add_row(rate.name, f"{getattr(FIXED, rate.name):,g}", rate.metadata["source"])
    return [settings, fixed]


def _table(title: str | None, columns: Iterable[str], *, left: tuple[str, ...]) -> Table:
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


def size_text(number: float) -> str:
    return _bytes(number) or "none"


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
