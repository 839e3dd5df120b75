"""Ingest: from sources to one row per image, or one row per reject with its reason.

    ingest/
      images-00000.parquet  ...     schemas.IMAGES: the accepted images, by reference
      rejects-00000.parquet  ...    schemas.REJECTS
      manifest.json                 its facts: `sources`, `limits`, `passed_over`, `rejected_holdout`, and of a sample
                                    `sample_pool` and `not_sampled`

Every image is decoded once here, in a separate process that may crash or hang. Later stages decode the same bytes with
the same code, but for a step that decode.py names. A link inside a source is an image of its own (an exact copy); a
link that leads out of the source is rejected. A tar or Parquet file that cannot be read to its end is one reject. The
images before the damage are kept.

Other files and members of tars are counted by kind, in the fact `passed_over` by source (absent where there are none)
and in the totals of the shard that opened them. A kind is the ending of a name, or one of the constants of listing.py.

With `sample_pool` below 1, only this share of each source with the role `pool` is read (images/sampling.py). The other
images are counted in the fact `not_sampled` by source. They are neither rejects nor part of the reject budget.

The inputs of the stage are names and sizes of files. A later stage refuses an image whose bytes have changed, and
--replace then reads again the shards with a file that is newer than their images-*.parquet. A file that changed while
its shard was read is older than that; `touch` makes it newer.

    python -m curation.ingest --config CONFIG.toml --output ingest/
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field, field_validator

from curation.config import NotInPlan, Settings
from curation.engine import command, progress
from curation.engine.manifest import Manifest, ShardRecord, sum_counts
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
from curation.engine.stage import Stage, Tally, run_stage
from curation.errors import InputError, RejectBudgetError
from curation.files import parquet, paths, schemas
from curation.images import changes, listing, sources
from curation.images.decode import ImageLimits, ImageRejected, RejectReason
from curation.images.hashing import image_id
from curation.images.sandbox import ImageSandbox
from curation.images.sources import MAX_KINDS, NOT_SAMPLED, Listing, SourceConfig, SourceFile, SourceItem
from curation.run_folder import RunFolder
from curation.stage_command import stage_command

# Begins the names of the totals of a shard that count the files and members without an image, by kind.
PASSED_OVER = "passed over: "
# Kinds that a shard counts; the others are summed. Assumed: a run may have 100,000 shards, and any ending is possible.
MAX_KINDS_IN_SHARD = 8
# Rejected images that any budget above 0 allows. Assumed: some files of every folder are broken, and of twenty images
# one is 5%.
MIN_BUDGET = 5


class IngestConfig(Settings):
    """The sources, and the limits on their images."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """The datasets: seeds, pool and holdout."""
    sample_pool: float = Field(default=1.0, gt=0, le=1)
    """Share of the images of the pool that are read, for a trial run on a part of a large pool (`--sample` sets it).
    Seeds and holdout are read whole. The images of a smaller share are among those of a larger one."""
    limits: ImageLimits = ImageLimits()
    """Limits on the size of one image and on the cost of decoding it."""
    max_reject_fraction: Annotated[float, NotInPlan] = Field(default=0.05, ge=0, le=1)
    """Maximum share of rejected images, and of damaged tars and Parquet files. Beyond it the stage stops. Any share
    above 0 allows MIN_BUDGET rejected images."""
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

    Raises InputError for a missing or empty source, for an output below a source, for a seed or holdout source without
    an accepted image, and for sources with the role `pool` that have none all together. Raises RejectBudgetError past
    the budget. Finished shards stay; the next run continues after them.
    """
    paths.require_apart(output, (source.path for source in config.sources), or_below=True, or_above=True)
    listings, problems = {}, []
    for source in config.sources:
        try:
            with progress.step("ingest", f"listing the files of source '{source.name}'"):
                listings[source.name] = sources.list_source(source)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    shards: list[Shard] = []
    not_listed = Counter[str]()
    for source in config.sources:
        is_folder, share = source.layout == "folder", _share(config, source)
        files = sources.sampled_files(source, listings[source.name].files, share)
        not_listed[source.name] = len(listings[source.name].files) - len(files)
        for file_paths in _cut(files, config.images_per_shard if is_folder else 1):
            num_named = sum(map(listing.has_image_name, file_paths)) or len(file_paths)
            shards.append(Shard(f"{len(shards):05d}", (source, file_paths, share), num_named if is_folder else 0))
    num_archives = sum(len(listings[source.name].files) for source in config.sources if source.layout != "folder")
    num_files = sum(len(shard.work[1]) for shard in shards)
    num_images = num_files if all(shard.num_items for shard in shards) else None
    stage = Stage(
        name="ingest",
        config=config,
        inputs={name: sources.listing_hash(listed.files) for name, listed in listings.items()},
        output=output,
        shards=shards,
        make_worker=functools.partial(make_worker, config.limits, output),
        check=functools.partial(
            _check_budget, config.max_reject_fraction, num_images, len(shards), num_archives, output
        ),
        finish=functools.partial(_finish, config, listings, shards, not_listed),
        facts=config.model_dump(mode="json", include={"sources", "limits"}),
        max_poison_shards=config.max_poison_shards,
        outdated=functools.partial(_shards_with_changed_files, shards, output),
    )
    return run_stage(stage, runner, replace=replace, log=log)


def _share(config: IngestConfig, source: SourceConfig) -> float:
    """The share of the images of a source that are read."""
    return config.sample_pool if source.role == "pool" else 1.0


def _cut(files: Sequence[SourceFile], size: int) -> Iterator[tuple[str, ...]]:
    """The paths of `files` in order, in pieces of at most `size` files with an image's name, and `size` others.

    So a few other files move no image into another shard.
    """
    piece: list[str] = []
    counts = Counter[bool]()
    for file in files:
        is_named = listing.has_image_name(file.path)
        if counts[is_named] == size:
            yield tuple(piece)
            piece, counts = [], Counter()
        piece.append(file.path)
        counts[is_named] += 1
    if piece:
        yield tuple(piece)


def make_worker(limits: ImageLimits, output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that reads and probes the images of a shard."""
    sandbox = ImageSandbox(limits)

    def process(shard: Shard) -> ShardRecord:
        source, file_paths, share = shard.work
        accepted: list[dict[str, object]] = []
        rejects: list[dict[str, object]] = []
        passed_over: Counter[str] = Counter()

        def reject(item: SourceItem, reason: RejectReason, detail: str) -> None:
            detail = f"{item.part}: {detail}" if item.part else detail
            rejects.append({"uri": item.uri, "source": source.name, "reason": str(reason), "detail": detail})

        for item in sources.read_source(
            source, file_paths, max_bytes=limits.max_bytes, passed_over=passed_over, share=share
        ):
            report(1)
            if item.problem is not None or item.data is None:
                reject(item, *(item.problem or (RejectReason.UNREADABLE, "")))
                continue
            try:
                facts = sandbox.probe(item.data)
            except ImageRejected as rejected_image:
                reject(item, rejected_image.reason, rejected_image.detail)
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
                    "content_pixels": facts.content_pixels,
                    "detail_pixels": facts.detail_pixels,
                    "label": item.label,
                    "layout": source.layout,
                }
            )
        images = pa.Table.from_pylist(accepted, schema=schemas.IMAGES)
        rejected = pa.Table.from_pylist(rejects, schema=schemas.REJECTS)
        counts = sum_counts({str(row["reason"]): 1} for row in rejects)
        not_sampled = passed_over.pop(NOT_SAMPLED, 0)
        return ShardRecord(
            name=shard.name,
            files=(
                parquet.write_table(paths.join(output, f"images-{shard.name}.parquet"), images),
                parquet.write_table(paths.join(output, f"rejects-{shard.name}.parquet"), rejected),
            ),
            totals={"images": len(accepted) + len(rejects), "accepted": len(accepted), "rejected": len(rejects)}
            | ({NOT_SAMPLED: not_sampled} if share < 1 and source.layout != "folder" else {})
            | {PASSED_OVER + kind: count for kind, count in listing.bounded(passed_over, MAX_KINDS_IN_SHARD).items()},
            rejects=counts,
        )

    return process


def _shards_with_changed_files(shards: Sequence[Shard], output: str) -> set[str]:
    """The names of the shards with a file that changed after the images of the shard were written."""
    names = {shard.name: f"images-{shard.name}.parquet" for shard in shards}
    written = changes.times_of(output, names.values())
    files_of_source: dict[str, list[str]] = {}
    for shard in shards:
        source, files, _ = shard.work
        files_of_source.setdefault(source.path, []).extend(files)
    changed = {path: changes.times_of(path, files) for path, files in files_of_source.items()}
    return {
        shard.name
        for shard in shards
        if max(changed[shard.work[0].path][file].latest for file in shard.work[1]) > written[names[shard.name]].earliest
    }


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
    estimate. Otherwise it includes files that may be no images; those that were opened and passed over do not count.
    """
    damaged = done.rejects[RejectReason.DAMAGED_ARCHIVE]
    if damaged > max_fraction * num_archives:
        raise RejectBudgetError(
            f"ingest: {damaged:,} of {num_archives:,} tars and Parquet files cannot be read to their end, more than "
            f"max_reject_fraction = {max_fraction:g} allows. The first: {_first_damage(output)} The list is in "
            f"{output}/rejects-*.parquet. Repair the sources, or raise ingest.max_reject_fraction; finished "
            "shards are kept."
        )
    if num_images is None:
        total = done.totals["images"] * num_shards // done.num_shards
    else:
        total = num_images - sum(_passed_over(done.totals).values())
    rejected = done.totals["rejected"]
    if rejected > max(max_fraction * total, MIN_BUDGET if max_fraction else 0):
        about = "about " if num_images is None else ""
        listed = ", ".join(f"{reason} {count:,}" for reason, count in done.rejects.most_common())
        raise RejectBudgetError(
            f"ingest: {rejected:,} of {about}{total:,} images were rejected, more than max_reject_fraction = "
            f"{max_fraction:g} allows: {listed}. The list is in {output}/rejects-*.parquet. Repair the sources, or "
            "raise ingest.max_reject_fraction; finished shards are kept."
        )


def _passed_over(totals: Mapping[str, int]) -> dict[str, int]:
    """The counts by kind among the totals of a shard."""
    return {name.removeprefix(PASSED_OVER): count for name, count in totals.items() if name.startswith(PASSED_OVER)}


def _finish(
    config: IngestConfig,
    listings: Mapping[str, Listing],
    shards: Sequence[Shard],
    not_listed: Mapping[str, int],
    records: Sequence[ShardRecord],
) -> tuple[dict[str, Any], None]:
    """The facts `passed_over`, `rejected_holdout` and those of a sample, where there are any; they are printed too.

    `not_listed` counts the files by source that the sample leaves out. Raises InputError for a source without an
    accepted image.
    """
    source_of_shard = {shard.name: shard.work[0].name for shard in shards}
    totals = {name: Counter[str]() for name in listings}
    passed_over = {name: Counter(listed.passed_over) for name, listed in listings.items()}
    for record in records:
        name = source_of_shard[record.name]
        totals[name].update(record.totals)
        passed_over[name].update(_passed_over(record.totals))
    counts = {name: listing.bounded(by_kind, MAX_KINDS) for name, by_kind in passed_over.items() if by_kind}
    not_sampled = {
        source.name: not_listed[source.name] + totals[source.name][NOT_SAMPLED]
        for source in config.sources
        if _share(config, source) < 1
    }
    _require_images(config.sources, totals, counts, not_sampled)
    facts: dict[str, Any] = {}
    if config.sample_pool < 1:
        num_read = sum(totals[name]["images"] for name in not_sampled)
        progress.say(
            f"ingest: a sample of the pool: {num_read:,} images; not sampled: {sum(not_sampled.values()):,} "
            f"(sample_pool = {config.sample_pool:g})"
        )
        facts |= {"sample_pool": config.sample_pool, "not_sampled": not_sampled}
    if counts:
        everything = listing.bounded(sum_counts(counts.values()), MAX_KINDS)
        progress.say(f"ingest: passed over, no images: {listing.in_words(everything)}")
        facts["passed_over"] = counts
    if num_rejected := sum(totals[source.name]["rejected"] for source in config.sources if source.role == "holdout"):
        progress.say(
            f"ingest: {num_rejected:,} files of the holdout were rejected (rejects-*.parquet). Copies of their images "
            "in the pool are not recognised: repair or convert the files."
        )
        facts["rejected_holdout"] = num_rejected
    return facts, None


def _require_images(
    configs: Sequence[SourceConfig],
    totals: Mapping[str, Counter[str]],
    passed_over: Mapping[str, dict[str, int]],
    not_sampled: Mapping[str, int],
) -> None:
    """Raise InputError for a seed or holdout source without an accepted image, and for pool sources without any.

    One empty source of several with the role `pool` is only printed: the pool is what they hold together.
    """
    empty = [source for source in configs if not totals[source.name]["accepted"]]
    pool = [source for source in configs if source.role == "pool"]
    for source in empty:
        others = listing.in_words(passed_over.get(source.name, {})) or "nothing"
        text = (
            f"ingest: source '{source.name}' ({source.role}) has no accepted image: "
            f"{totals[source.name]['rejected']:,} rejected, {others} passed over in '{source.path}'."
        )
        if num_left_out := not_sampled.get(source.name):
            text += f" The sample leaves out {num_left_out:,} images of it."
        if source.role == "pool" and any(other not in empty for other in pool):
            progress.say(text)
            continue
        if num_left_out:
            raise InputError(f"{text} Raise ingest.sample_pool (--sample).")
        raise InputError(
            f"{text} Correct its path or layout, repair its files (rejects-*.parquet lists the rejected ones), or "
            "remove the source."
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
