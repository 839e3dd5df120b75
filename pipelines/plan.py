"""What a run would do, on one page, before any image is read: `--plan`."""

from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from curation.balance import DatasetRows, most_clusters, retrieval_mode, selection_rows
from curation.config import resolved_toml
from curation.embedders import EmbedderConfig
from curation.index import SearchConfig
from curation.retrieve import DatasetConfig

if TYPE_CHECKING:
    from pipelines.curate import CurateConfig


def print_plan(config: "CurateConfig") -> None:
    """Print the sources, what each seed dataset will bring, the stages with their numbers, and the whole config."""
    console = Console(highlight=False)
    console.print(f"Profile: {config.profile}")
    console.print(_sources(config))
    console.print(_datasets(config))
    for doubt in doubts(config):
        console.print(doubt)
    console.print(_stages(config))
    console.print("The resolved config:\n")
    console.print(resolved_toml(config), markup=False, soft_wrap=True)


def _sources(config: "CurateConfig") -> Table:
    table = Table(title="Sources", title_justify="left")
    for column in ("source", "role", "layout", "path"):
        table.add_column(column)
    table.add_column("images stated", justify="right")
    for source in config.ingest.sources:
        stated = _count(config.stated_counts.get(source.name))
        table.add_row(source.name, source.role, source.layout, source.path, stated)
    return table


def dataset_rows(config: "CurateConfig", dataset: DatasetConfig) -> DatasetRows | None:
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


def doubts(config: "CurateConfig") -> list[str]:
    """Where the stated numbers contradict the rules, a sentence each."""
    more_than, counts = config.retrieve.more_than_seeds, config.stated_counts
    return [
        f"{name}: {clusters:,} clusters with more than {more_than} seeds each need {clusters * (more_than + 1):,} "
        f"seeds, but {counts[name]:,} are stated."
        for name, clusters in config.stated_clusters.items()
        if name in counts and clusters > most_clusters(counts[name], more_than)
    ]


def _datasets(config: "CurateConfig") -> Table:
    table = Table(title="What each seed dataset brings", title_justify="left")
    table.add_column("dataset")
    for column in ("seeds stated", "as is", "retrieval", "clusters stated", "retrieved at most", "rows at most"):
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


def _stages(config: "CurateConfig") -> Table:
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


def _mode(config: "CurateConfig", dataset: DatasetConfig) -> Literal["sample", "cluster", "by_size", "none"]:
    """How a dataset searches the pool; `by_size` where its size is not stated."""
    if dataset.name not in config.stated_counts:
        return dataset.retrieval
    return retrieval_mode(dataset.retrieval, config.stated_counts[dataset.name], config.retrieve.sample_above)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
