"""What a run would do, on one page, before any image is read: `--plan`."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from curation.config import resolved_toml
from curation.embedders import EmbedderConfig
from curation.retrieve import DatasetConfig

if TYPE_CHECKING:
    from pipelines.curate import CurateConfig


def print_plan(config: "CurateConfig") -> None:
    """Print the sources, what each seed dataset will bring, the stages with their numbers, and the whole config."""
    console = Console(highlight=False)
    console.print(_sources(config))
    console.print(_datasets(config))
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


def _datasets(config: "CurateConfig") -> Table:
    table = Table(title="What each seed dataset brings", title_justify="left")
    table.add_column("dataset")
    for column in ("seeds stated", "as is", "retrieval", "rows at most"):
        table.add_column(column, justify="right")
    total: int | None = 0
    for dataset in config.retrieve.datasets:
        seeds = config.stated_counts.get(dataset.name)
        rows = _rows_at_most(config, dataset, seeds)
        total = None if total is None or rows is None else total + rows
        way = _way(config, dataset, seeds)
        setting = f" k={dataset.k}" if way == "sample" else ""
        table.add_row(dataset.name, _count(seeds), _count(seeds) if dataset.as_is else "", way + setting, _count(rows))
    table.add_section()
    table.add_row("total", "", "", "", _count(total))
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
        "pairs": f"{pairs.num_neighbors} nearest descriptors above {pairs.min_descriptor_similarity:g}, "
        f"perceptual hashes within {pairs.max_phash_distance} bits (-1: none), {check}",
        "dedup": f"copies from {config.dedup.threshold:g}; holdout from {config.dedup.holdout_threshold:g}, "
        f"decontamination '{config.dedup.decontamination}'",
        "cluster": "; then ".join(
            f"{level.num_clusters:,} clusters, {level.num_iterations} iterations"
            + (f", resampled {level.resampling.num_rounds} times" if level.resampling else "")
            for level in config.cluster.levels
        ),
        "retrieve": f"clusters with more than {retrieve.more_than_seeds} seeds of a dataset, "
        f"{retrieve.images_per_cluster:,} images of each; by_size means sample above {retrieve.sample_above:,} seeds",
        "corpus": f"{config.pack.images_per_shard:,} images per tar, "
        f"{'with' if config.pack.repeats else 'without'} repeats",
    }
    for stage, text in rows.items():
        table.add_row(stage, text)
    return table


def _model(embedder: EmbedderConfig) -> str:
    return f"{embedder.name} at {embedder.image_size} pixels on {embedder.device} in {embedder.precision}"


def _way(config: "CurateConfig", dataset: DatasetConfig, seeds: int | None) -> str:
    if dataset.retrieval != "by_size" or seeds is None:
        return dataset.retrieval
    return "sample" if seeds > config.retrieve.sample_above else "cluster"


def _rows_at_most(config: "CurateConfig", dataset: DatasetConfig, seeds: int | None) -> int | None:
    """Rows that a dataset brings at most; None where that needs a count that was not stated."""
    own = seeds if dataset.as_is else 0
    match _way(config, dataset, seeds):
        case "sample":
            brought = None if seeds is None else seeds * dataset.k
        case "cluster":
            brought = dataset.cap
        case "none":
            brought = 0
        case _:
            brought = None
    return None if own is None or brought is None else own + brought


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
