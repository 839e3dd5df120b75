"""Ingest: from sources to one row per image, or one row per reject with its reason.

    ingest/
      images-00000.parquet  ...     schemas.IMAGES: the accepted images, by reference
      rejects-00000.parquet  ...    schemas.REJECTS
      manifest.json                 its facts are `sources` and `limits`

Every image is decoded once here, in a separate process that may crash or hang. Later stages decode the same bytes with
the same code. A link inside a source is an image of its own (an exact copy); a link that leads out of the source is
rejected. A tar or Parquet file that cannot be read to its end is one reject. The images before the damage are kept.

    python -m curation.ingest --config CONFIG.toml --output ingest/
"""

import functools
from collections.abc import Callable
from typing import Annotated

import pyarrow as pa
from pydantic import Field, field_validator

from curation.config import NotInPlan, Settings
from curation.engine import command
from curation.engine.manifest import Manifest, ShardRecord, sum_counts
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard
from curation.engine.stage import Stage, Tally, run_stage
from curation.errors import InputError, RejectBudgetError
from curation.files import parquet, paths, schemas
from curation.images import sources
from curation.images.decode import ImageLimits, ImageRejected, RejectReason
from curation.images.hashing import image_id
from curation.images.sandbox import ImageSandbox
from curation.images.sources import SourceConfig
from curation.run_folder import RunFolder
from curation.stage_command import stage_command


class IngestConfig(Settings):
    """The sources, and the limits on their images."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """The datasets: seeds, pool and holdout."""
    limits: ImageLimits = ImageLimits()
    """Limits on the size of one image and on the cost of decoding it."""
    max_reject_fraction: Annotated[float, NotInPlan] = Field(default=0.05, ge=0, le=1)
    """Maximum share of rejected images, and of damaged tars and Parquet files. Beyond it the stage stops."""
    max_poison_shards: Annotated[int, NotInPlan] = Field(default=0, ge=0)
    """Maximum number of shards that are left out because their worker dies at every attempt. The manifest names these
    shards (`set_aside`); a run with a lower maximum tries them again."""
    images_per_shard: int = Field(default=1000, ge=1)
    """Images per shard of a source of single files. A tar or a Parquet file is always one shard."""

    @field_validator("sources")
    @classmethod
    def _names_are_unique(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two sources have the name {', '.join(map(repr, repeated))}; names must be unique")
        return value


def run(config: IngestConfig, output: str, runner: Runner, *, replace: bool = False, log: Log = None) -> Manifest:
    """Read every source; returns the manifest. Its facts are `sources` and `limits`, for later stages.

    Raises InputError for a missing or empty source, and RejectBudgetError past the budget. Finished shards stay; the
    next run continues after them.
    """
    listings, problems = {}, []
    for source in config.sources:
        try:
            listings[source.name] = sources.list_files(source)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    shards: list[Shard] = []
    for source in config.sources:
        files = listings[source.name]
        step = config.images_per_shard if source.layout == "folder" else 1
        for start in range(0, len(files), step):
            file_paths = tuple(file.path for file in files[start : start + step])
            num_items = len(file_paths) if source.layout == "folder" else 0
            shards.append(Shard(f"{len(shards):05d}", (source, file_paths), num_items))
    num_archives = sum(len(listings[source.name]) for source in config.sources if source.layout != "folder")
    num_images = sum(shard.num_items for shard in shards) if all(shard.num_items for shard in shards) else None
    stage = Stage(
        name="ingest",
        config=config,
        inputs={name: sources.listing_hash(files) for name, files in listings.items()},
        output=output,
        shards=shards,
        make_worker=functools.partial(make_worker, config.limits, output),
        check=functools.partial(
            _check_budget, config.max_reject_fraction, num_images, len(shards), num_archives, output
        ),
        facts=config.model_dump(mode="json", include={"sources", "limits"}),
        max_poison_shards=config.max_poison_shards,
    )
    return run_stage(stage, runner, replace=replace, log=log)


def make_worker(limits: ImageLimits, output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that reads and probes the images of a shard."""
    sandbox = ImageSandbox(limits)

    def process(shard: Shard) -> ShardRecord:
        source, file_paths = shard.work
        accepted: list[dict[str, object]] = []
        rejects: list[dict[str, object]] = []
        for item in sources.read_source(source, file_paths, max_bytes=limits.max_bytes):
            if item.problem is not None or item.data is None:
                reason, detail = item.problem or (RejectReason.UNREADABLE, "")
                rejects.append({"uri": item.uri, "source": source.name, "reason": str(reason), "detail": detail})
                continue
            try:
                facts = sandbox.probe(item.data)
            except ImageRejected as rejected_image:
                reason, detail = rejected_image.reason, rejected_image.detail
                rejects.append({"uri": item.uri, "source": source.name, "reason": str(reason), "detail": detail})
                continue
            accepted.append(
                {
                    "image_id": image_id(item.data),
                    "source": source.name,
                    "role": source.role,
                    "uri": item.uri,
                    "offset": item.offset,
                    "length": item.length,
                    "width": facts.width,
                    "height": facts.height,
                    "format": facts.format,
                    "phash": facts.phash,
                    "label": item.label,
                }
            )
        images = pa.Table.from_pylist(accepted, schema=schemas.IMAGES)
        rejected = pa.Table.from_pylist(rejects, schema=schemas.REJECTS)
        counts = sum_counts({str(row["reason"]): 1} for row in rejects)
        return ShardRecord(
            name=shard.name,
            files=(
                parquet.write_table(paths.join(output, f"images-{shard.name}.parquet"), images),
                parquet.write_table(paths.join(output, f"rejects-{shard.name}.parquet"), rejected),
            ),
            totals={"images": len(accepted) + len(rejects), "accepted": len(accepted), "rejected": len(rejects)},
            rejects=counts,
        )

    return process


def _check_budget(
    max_fraction: float,
    num_images: int | None,
    num_shards: int,
    num_archives: int,
    output: str,
    done: Tally,
) -> None:
    """Raise RejectBudgetError once the rejects exceed the budget, even if every remaining image were accepted.

    `num_images` is None when the number is unknown beforehand (tars, Parquet). The finished shards then give an
    estimate.
    """
    damaged = done.rejects[RejectReason.DAMAGED_ARCHIVE]
    if damaged > max_fraction * num_archives:
        raise RejectBudgetError(
            f"ingest: {damaged:,} of {num_archives:,} tars and Parquet files cannot be read to their end, more than "
            f"max_reject_fraction = {max_fraction:g} allows. The first: {_first_damage(output)} The list is in "
            f"{output}/rejects-*.parquet. Repair the sources, or raise ingest.max_reject_fraction; finished "
            "shards are kept."
        )
    total = num_images if num_images is not None else done.totals["images"] * num_shards // done.num_shards
    rejected = done.totals["rejected"]
    if rejected > max_fraction * total:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in done.rejects.most_common())
        raise RejectBudgetError(
            f"ingest: {rejected:,} of {total:,} images were rejected, more than max_reject_fraction = {max_fraction:g} "
            f"allows: {listed}. The list is in {output}/rejects-*.parquet. Repair the sources, or raise "
            "ingest.max_reject_fraction; finished shards are kept."
        )


def _first_damage(output: str) -> str:
    """The detail of the first damaged archive among the rejects."""
    for name in paths.list_names(output):
        if name.startswith("rejects-"):
            for row in parquet.read_table(paths.join(output, name), schemas.REJECTS).to_pylist():
                if row["reason"] == RejectReason.DAMAGED_ARCHIVE:
                    return str(row["detail"])
    raise AssertionError(f"no damaged archive in {output}")


def _run_alone(config: IngestConfig, inputs: RunFolder, output: str, runner: Runner, *, replace: bool) -> Manifest:
    return run(config, output, runner, replace=replace)


command_line = stage_command(
    "ingest",
    IngestConfig,
    _run_alone,
    "Read every source into one row per image.",
    check=lambda config: sources.require_sources(config.sources),
)


if __name__ == "__main__":
    from curation import ingest  # by its real name: otherwise each class would exist twice

    command.main(ingest.command_line)
