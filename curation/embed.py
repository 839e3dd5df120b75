"""Embed and describe: from images to one unit vector each. The same stage with two kinds of model.

    embed/                          for comparing content: vectors of a self-supervised ViT
      vectors-00000.parquet  ...    schemas.vectors: float16, unit length
      manifest.json
    describe/                       for finding copies: copy-detection descriptors
      vectors-00000.parquet  ...
      thumbnails-00000.parquet ...  schemas.THUMBNAILS, unless `thumbnail_side` is 0
      manifest.json

One shard of images gives one shard of vectors, in the same order. An image that occurs twice in a shard is embedded
once. Reading, decoding and the model overlap: threads read and decode a bounded number of pictures ahead of the model,
and on a GPU the next batch is copied while the current one is computed. Memory holds these pictures and one shard of
vectors; it does not grow with the number of images.

Where both stages use the same network on the same pixels, and differ in the pooling or the thumbnails alone, `embed`
reads, decodes and computes once: its workers write the files of `describe` too. `describe` then takes these shards as
done (`manifest.ready_folder`). The bytes are those of two passes, and each stage also works alone.

    python -m curation.embed --config CONFIG.toml --images ingest/ --output embed/
    python -m curation.embed --config CONFIG.toml --images ingest/ --output describe/ --stage describe
    python -m curation.embed --images FOLDER --model vit_small_patch14 --weights dinov2_vits14.pth --output OUT/

The last command needs no config. FOLDER holds image files, tars or Parquet files. The command writes the images' rows
to OUT/ingest/ and their vectors to OUT/embed/.
"""

import contextlib
import functools
import io
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import typer
from PIL import Image
from pydantic import Field

from curation import ingest
from curation.config import NotInPlan, Settings, load, parse_section
from curation.engine import command, manifest, progress
from curation.engine.manifest import Manifest, ShardRecord, read_manifest, require_fact, require_manifest
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
from curation.engine.stage import Stage, run_stage
from curation.errors import ConfigError
from curation.files import parquet, paths, schemas
from curation.files.folder_lock import sole_writer
from curation.files.prefetch import Meter, prefetch
from curation.files.vectors import make_table
from curation.images.decode import ImageLimits, decode_picture, upright
from curation.images.sources import Layout, ReferenceReader, SourceConfig, require_sources
from curation.ingest import IngestConfig
from curation.models.embedders import (
    MAX_ASPECT,
    MODELS,
    Embedder,
    EmbedderConfig,
    differ_in_pooling_alone,
    hash_of_head,
    hash_of_weights,
    keep_aspect,
    load_embedder,
    require_weights,
)
from curation.run_folder import RunFolder, require_stage

# WebP stores a recognisable drawing of 96 pixels in 1-3 kB. Assumed enough for verification and for the report.
THUMBNAIL_QUALITY = 90
StageName = Literal["embed", "describe"]
# Threads that read images stored in separate files; images in one tar are read one after the other. Assumed: an object
# store answers in 50 to 200 ms.
READERS = 8


class EmbedConfig(Settings):
    """The model, and the resources of its workers."""

    embedder: EmbedderConfig
    """The model, and how pictures are prepared for it."""
    threads_per_worker: int = Field(default=1, ge=1)
    """Threads of the model in each worker, on a CPU. Several workers with one thread each are faster than one worker
    with several threads: decoding delays one thread, and the others wait for it (measured: docs/benchmarks.md). Part of
    the plan, because the number of threads changes the order of sums and so their rounding."""
    decode_threads: Annotated[int, NotInPlan] = Field(default=2, ge=1)
    """Threads of each worker that decode pictures ahead of the model. Raise it until a GPU no longer waits: a core
    decodes some hundred photographs a second."""
    thumbnail_side: int = Field(default=0, ge=0, le=1024)
    """Longest side in pixels of the thumbnails written beside the vectors; 0 writes none."""


def run(
    config: EmbedConfig,
    inputs: RunFolder,
    output: str,
    runner: Runner,
    *,
    name: StageName = "embed",
    describe: EmbedConfig | None = None,
    replace: bool = False,
    log: Log = None,
) -> Manifest:
    """Embed every accepted image of the finished ingest; returns the manifest of the stage `name`.

    describe: the config of the stage `describe`, which runs next into `inputs.describe`. Where one pass serves both
    stages, the workers also make its unfinished shards.
    Raises InputError when a source has changed since ingest, and DeviceError or WeightsError for the model.
    """
    weights_hash = hash_of_weights(config.embedder)
    stage = _stage(config, weights_hash, inputs, output, name)
    with contextlib.ExitStack() as stack:
        if describe is not None and one_pass_serves(config, describe) and _begins(stage, replace=replace):
            stack.enter_context(sole_writer(inputs.describe))
            next_stage = _stage(describe, weights_hash, inputs, inputs.describe, "describe")
            second = _unfinished(next_stage, describe, replace=replace)
            if second is not None:
                progress.say(f"{name}: describe uses the same network, so this pass makes its shards too")
                stage = _stage(config, weights_hash, inputs, output, name, second=second)
        return run_stage(stage, runner, replace=replace, log=log)


def one_pass_serves(first: EmbedConfig, second: EmbedConfig) -> bool:
    """Whether one pass over the images gives the files of both, with the bytes of two passes."""
    embedder = first.embedder
    # The shortest side of an input. A larger thumbnail asks for a larger picture of the decoder, with other pixels.
    side = embedder.image_size
    if embedder.resize == "keep_aspect":
        side = min(keep_aspect(MAX_ASPECT, 1, side, MODELS[embedder.name].size_multiple))
    return (
        differ_in_pooling_alone(embedder, second.embedder)
        and first.threads_per_worker == second.threads_per_worker
        and max(side, first.thumbnail_side) == max(side, second.thumbnail_side)
    )


def _stage(
    config: EmbedConfig,
    weights_hash: str,
    inputs: RunFolder,
    output: str,
    name: StageName,
    *,
    second: "SecondStage | None" = None,
) -> Stage:
    ingested = require_manifest(inputs.ingest)
    limits = ImageLimits.model_validate(require_fact(inputs.ingest, ingested, "limits"), strict=False)
    shards = [
        Shard(
            posixpath.basename(file).removeprefix("images-").removesuffix(".parquet"),
            file,
            record.totals["accepted"],
        )
        for record, file in zip(ingested.shards, ingested.paths(inputs.ingest, "images"), strict=True)
    ]
    stage_inputs = {"images": ingested.content_hash, "weights": weights_hash}
    if (head_hash := hash_of_head(config.embedder)) is not None:
        stage_inputs["head"] = head_hash
    return Stage(
        name=name,
        config=config,
        inputs=stage_inputs,
        output=output,
        shards=shards,
        make_worker=functools.partial(
            make_worker, with_weights_hash(config, weights_hash), limits, output, second=second
        ),
        note=_describe_times,
    )


def with_weights_hash(config: EmbedConfig, sha256: str) -> EmbedConfig:
    """`config` for the workers, which load no weights with another hash than the driver's."""
    return config.model_copy(update={"embedder": config.embedder.model_copy(update={"weights_sha256": sha256})})


class SecondStage(NamedTuple):
    """The stage `describe` in the pass of `embed`."""

    config: EmbedConfig
    output: str
    done: frozenset[str]
    """The names of the shards that the pass does not make."""


def _begins(stage: Stage, *, replace: bool) -> bool:
    """Whether `stage` is neither finished nor refused because its output holds other work."""
    plan_there = manifest.plan_in(stage.output)
    if plan_there is not None and plan_there != stage.plan():
        return replace
    return read_manifest(stage.output) is None


def _unfinished(stage: Stage, config: EmbedConfig, *, replace: bool) -> SecondStage | None:
    """`stage`, after its output is claimed; None where no shard is missing."""
    if manifest.claim(stage.output, stage.plan(), replace=replace) is not None:
        return None
    done = manifest.done_shards(stage.output) | manifest.done_shards(manifest.ready_folder(stage.output))
    return SecondStage(config, stage.output, frozenset(done)) if len(done) < len(stage.shards) else None


def make_worker(
    config: EmbedConfig, limits: ImageLimits, output: str, *, second: SecondStage | None = None
) -> Callable[[Shard], ShardRecord]:
    """A worker that loads the model once and embeds the images of a shard.

    second: a stage for which the pass serves too (`one_pass_serves`). The worker also marks its shards ready.
    """
    torch.set_num_threads(config.threads_per_worker)
    embedder = load_embedder(config.embedder, () if second is None else (second.config.embedder.pooling,))

    def process(shard: Shard) -> ShardRecord:
        started = time.perf_counter()
        is_shared = second is not None and shard.name not in second.done
        configs = (config, second.config) if second is not None and is_shared else (config,)
        rows = rows_of(shard.work)
        batches = _batches([embedder.shape(row["width"], row["height"]) for row in rows], config.embedder.batch_size)
        vectors = [np.empty((len(rows), each.embedder.dimensions), np.float16) for each in configs]
        thumbnails: list[list[bytes | None]] = [[None] * len(rows) for _ in configs]
        meter, decoding = Meter(), 0.0
        rows_in_order = [rows[index] for batch in batches for index in batch]
        pictures = prepared_pictures(configs, embedder, limits, rows_in_order, meter)

        def stacked_batches() -> Iterator[np.ndarray]:
            nonlocal decoding
            for batch in batches:
                batch_pictures = [next(pictures) for _ in batch]
                for index, picture in zip(batch, batch_pictures, strict=True):
                    for of_stage, thumbnail in zip(thumbnails, picture.thumbnails, strict=True):
                        of_stage[index] = thumbnail
                    decoding += picture.seconds
                yield np.stack([picture.pixels for picture in batch_pictures])

        for batch, of_poolings in zip(batches, embedder.embed_in_one_pass(stacked_batches()), strict=True):
            for each, of_stage in zip(configs, vectors, strict=True):
                of_stage[batch] = of_poolings[embedder.poolings.index(each.embedder.pooling)]
            report(len(batch), total=len(rows))
        image_ids = [row["image_id"] for row in rows]
        if second is not None and is_shared:
            record = _write_shard(shard, second.output, second.config, image_ids, vectors[1], thumbnails[1])
            # Before the record of this stage: a kill between the two leaves a shard that a resume makes for this stage
            # alone.
            manifest.mark_shard_done(manifest.ready_folder(second.output), record)
        record = _write_shard(shard, output, config, image_ids, vectors[0], thumbnails[0])
        measured = {
            "copies": shard.num_items - len(rows),
            "seconds": time.perf_counter() - started,
            "waited": meter.seconds_waited,
            "decoding": decoding / config.decode_threads,
            "ready": meter.ready,
            "taken": meter.taken,
        }
        return record.model_copy(update={"measured": measured})

    return process


def _write_shard(
    shard: Shard,
    output: str,
    config: EmbedConfig,
    image_ids: list[str],
    vectors: np.ndarray,
    thumbnails: Sequence[bytes | None],
) -> ShardRecord:
    """Write the files of one shard of one stage."""
    path = paths.join(output, f"vectors-{shard.name}.parquet")
    files = [parquet.write_table(path, make_table(image_ids, vectors))]
    if config.thumbnail_side:
        table = pa.table({"image_id": image_ids, "thumbnail": thumbnails}, schema=schemas.THUMBNAILS)
        files.append(parquet.write_table(paths.join(output, f"thumbnails-{shard.name}.parquet"), table))
    return ShardRecord(name=shard.name, files=tuple(files), totals={"embedded": len(image_ids)})


def rows_of(images: str) -> list[dict[str, Any]]:
    """The rows of one images file, one per image_id, with the columns that embedding needs."""
    table = parquet.read_table(
        images, schemas.IMAGES, ["image_id", "uri", "offset", "length", "width", "height", "layout"]
    )
    return list({row["image_id"]: row for row in reversed(table.to_pylist())}.values())[::-1]


class PreparedPicture(NamedTuple):
    """A picture at the size of the model's input."""

    pixels: np.ndarray  # (3, H, W) uint8
    thumbnails: tuple[bytes | None, ...]  # encoded, for each stage of the pass; None without `thumbnail_side`
    seconds: float  # processor time of the preparation


def prepared_pictures(
    configs: Sequence[EmbedConfig],
    embedder: Embedder,
    limits: ImageLimits,
    rows: Sequence[dict[str, Any]],
    meter: Meter,
) -> Iterator[PreparedPicture]:
    """The pictures of `rows`, in order. Threads read and decode two batches ahead of the consumer.

    configs: of the stages of the pass; the first sets the threads and the batches.
    """

    def prepare(row_and_bytes: tuple[dict[str, Any], bytes]) -> PreparedPicture:
        row, data = row_and_bytes
        return _prepare(configs, embedder, limits, data, row["width"], row["height"])

    threads = configs[0].decode_threads
    ahead = 2 * configs[0].embedder.batch_size + threads
    return prefetch(prepare, _read(rows), threads=threads, ahead=ahead, meter=meter)


def _prepare(
    configs: Sequence[EmbedConfig], embedder: Embedder, limits: ImageLimits, data: bytes, width: int, height: int
) -> PreparedPicture:
    started = time.thread_time()
    sides = [config.thumbnail_side for config in configs]
    shape = embedder.shape(width, height)
    picture = decode_picture(data, limits, target_side=max(min(shape), *sides))
    pixels = embedder.preprocess(picture, shape)
    thumbnails = tuple(encode_thumbnail(upright(picture), side) if side else None for side in sides)
    return PreparedPicture(pixels, thumbnails, time.thread_time() - started)


def embed_encoded(
    config: EmbedConfig, embedder: Embedder, limits: ImageLimits, pictures: Iterable[tuple[bytes, int, int]]
) -> tuple[np.ndarray, list[bytes | None]]:
    """The vectors (N, D) float16 and the thumbnails of pictures outside a run's sources, as a stage makes them.

    Each is given by its encoded bytes, width and height, and is prepared before the next one is taken.
    """
    prepared = [_prepare((config,), embedder, limits, *picture) for picture in pictures]
    batches = _batches([(each.pixels.shape[1], each.pixels.shape[2]) for each in prepared], config.embedder.batch_size)
    vectors = np.empty((len(prepared), config.embedder.dimensions), np.float16)
    stacked = (np.stack([prepared[index].pixels for index in batch]) for batch in batches)
    for batch, of_batch in zip(batches, embedder.embed_batches(stacked), strict=True):
        vectors[batch] = of_batch
    return vectors, [each.thumbnails[0] for each in prepared]


def _batches(shapes: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """Indices into `shapes`, in batches of at most `size` pictures of one shape."""
    batches: list[list[int]] = []
    for _, indices in groupby(sorted(range(len(shapes)), key=shapes.__getitem__), key=shapes.__getitem__):
        same_shape = list(indices)
        batches.extend(same_shape[start : start + size] for start in range(0, len(same_shape), size))
    return batches


def _read(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each row with the bytes of its image, read ahead of the consumer."""
    num_files = len({row["uri"] for row in rows})
    num_readers = READERS if num_files > len(rows) / 2 else 1
    idle_readers = [ReferenceReader() for _ in range(num_readers)]

    def read(row: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        reader = idle_readers.pop()
        try:
            return row, reader.read(row["uri"], row["offset"], row["length"], row["image_id"], row["layout"])
        finally:
            idle_readers.append(reader)

    try:
        yield from prefetch(read, rows, threads=num_readers, ahead=num_readers)
    finally:
        for reader in idle_readers:
            reader.close()


def _describe_times(measured: Mapping[str, float]) -> str:
    """A note for the progress display on the workers' time. If the model waits, raise `decode_threads`."""
    if not measured.get("taken"):
        return ""
    copies = f"; exact copies embedded once: {measured['copies']:,.0f}" if measured["copies"] else ""
    waited, decoding = (measured[key] / measured["seconds"] for key in ("waited", "decoding"))
    return (
        f"model {1 - waited:.0%} of the time, waiting for pictures {waited:.0%}; threads decode {decoding:.0%} of it, "
        f"{measured['ready'] / measured['taken']:.1f} pictures ready{copies}"
    )


def encode_thumbnail(picture: Image.Image, side: int) -> bytes:
    """`picture` (RGB) as an encoded WebP image with sides of at most `side` pixels; never enlarged."""
    small = picture.copy() if max(picture.size) <= side else picture
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()


def command_line(
    images: Annotated[str, typer.Option("--images", help="Folder of the finished ingest, or of images.")],
    output: command.OutputOption,
    config: Annotated[str | None, typer.Option("--config", help="TOML file; the stage reads its own section.")] = None,
    stage: Annotated[StageName, typer.Option("--stage", help="Section of the config to use.")] = "embed",
    model: Annotated[str | None, typer.Option("--model", help="Without --config: name of the model.")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="Without --config: the model's checkpoint.")] = None,
    layout: Annotated[
        Layout | None, typer.Option("--layout", help="Without --config: how the folder stores images.")
    ] = None,
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Embed the images of a finished ingest, or of a folder."""
    if (config is None) == (model is None) or (config is not None and (weights or layout)):
        raise ConfigError("Give either --config alone, or --model with its --weights.")
    if config is not None:
        settings = load(EmbedConfig, config, overrides or (), section=stage)
    else:
        embedder = {"name": model} | ({} if weights is None else {"weights": weights})
        settings = parse_section(
            EmbedConfig, {stage: {"embedder": embedder}}, overrides or (), section=stage, origin="options"
        )

    is_ingested = config is not None or read_manifest(images) is not None
    if not plan:
        for folder in [output] if is_ingested else [paths.join(output, name) for name in ("ingest", stage)]:
            command.require_apart(folder, settings, images, config or "", is_stage=True)
    source = SourceConfig(
        name=posixpath.basename(images.rstrip("/")), path=images, role="pool", layout=layout or "folder"
    )

    def check() -> None:
        require_weights(settings.embedder)
        if is_ingested:
            require_stage(images, "ingest", "--images")
        else:
            require_sources((source,))

    def work(chosen: Runner) -> None:
        if is_ingested:
            run(settings, RunFolder(ingest=images), output, chosen, name=stage, replace=replace)
            return
        folder = RunFolder.of(output)
        ingest.run(IngestConfig(sources=(source,)), folder.ingest, chosen, replace=replace)
        run(settings, folder, paths.join(output, stage), chosen, name=stage, replace=replace)

    command.plan_or_run(
        settings,
        work,
        plan=plan,
        runner=runner,
        workers=workers,
        gpus_per_worker=settings.embedder.num_gpus,
        output=output,
        replace=replace,
        check=check,
    )


if __name__ == "__main__":
    from curation import embed  # by its real name: otherwise each class would exist twice

    command.main(embed.command_line)
