"""Embed and describe: from images to one unit vector each. The same stage with two kinds of model.

    embed/                          what resembles what: a self-supervised ViT
      vectors-00000.parquet  ...    records.vectors: float16, unit length
      manifest.json
    describe/                       what is a copy of what: a copy-detection descriptor
      vectors-00000.parquet  ...
      thumbnails-00000.parquet ...  records.THUMBNAILS, where `thumbnail_side` asks for them
      manifest.json

One shard of images gives one shard of vectors, in the same order; an image that occurs twice in a shard is embedded
once. Memory holds one batch of pictures and one shard of vectors.

    python -m curation.embed --config CONFIG.toml --images ingest/ --output embed/
    python -m curation.embed --config CONFIG.toml --images ingest/ --output describe/ --stage describe
"""

import functools
import io
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
import typer
from PIL import Image
from pydantic import Field

from curation import command, records, storage
from curation.config import Settings, load, resolved_toml
from curation.embedders import EmbedderConfig, load_embedder
from curation.images import ImageLimits, decode_rgb
from curation.runner import Runner, Shard
from curation.sources import ReferenceReader
from curation.stage import run_shards
from curation.storage import Manifest, ShardRecord
from curation.vectors import make_table

# WebP keeps a 96-pixel drawing recognisable in 1-3 kB. Assumed enough for verification and for the report.
THUMBNAIL_QUALITY = 90


class EmbedConfig(Settings):
    """Which model, and what it costs."""

    embedder: EmbedderConfig
    """The model and how it reads a picture."""
    threads_per_worker: int = Field(default=1, ge=1)
    """Threads of the model in each worker. Part of the plan: sums of another order round differently."""
    thumbnail_side: int = Field(default=0, ge=0, le=1024)
    """Longest side in pixels of the thumbnails to write beside the vectors; 0 writes none."""


def run(
    config: EmbedConfig, images: str, output: str, runner: Runner, *, stage: str = "embed", replace: bool = False
) -> Manifest:
    """Embed every accepted image of the finished ingest in `images`; returns the manifest of the stage.

    Raises InputError when a source has changed since it was ingested, DeviceError or WeightsError for the model.
    """
    ingest = storage.require_manifest(images)
    limits = ImageLimits.model_validate(ingest.plan.config["limits"], strict=False)
    shards = [
        Shard(
            name.removeprefix("images-").removesuffix(".parquet"), storage.join(images, name), record.totals["accepted"]
        )
        for record, name in zip(ingest.shards, ingest.files("images"), strict=True)
    ]
    return run_shards(
        stage,
        config=config,
        inputs={"images": ingest.content_hash},
        output=output,
        runner=runner,
        shards=shards,
        make_worker=functools.partial(make_worker, config, limits, output),
        replace=replace,
    )


def make_worker(config: EmbedConfig, limits: ImageLimits, output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that loads the model once and embeds one shard after another."""
    torch.set_num_threads(config.threads_per_worker)
    embedder = load_embedder(config.embedder)
    reader = ReferenceReader()

    def process(shard: Shard) -> ShardRecord:
        table = storage.read_table(shard.work, records.IMAGES, ["image_id", "uri", "offset", "length"])
        rows = list({row["image_id"]: row for row in reversed(table.to_pylist())}.values())[::-1]
        vectors: list[np.ndarray] = [np.empty((0, embedder.dimensions), np.float16)]
        thumbnails: list[bytes] = []
        for batch in _batches(rows, config.embedder.batch_size):
            pixels = []
            for row in batch:
                data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"])
                side = max(config.embedder.image_size, config.thumbnail_side)
                picture = decode_rgb(data, limits, target_side=side)
                pixels.append(embedder.preprocess(picture))
                if config.thumbnail_side:
                    thumbnails.append(encode_thumbnail(picture, config.thumbnail_side))
            vectors.append(embedder.embed(np.stack(pixels)).astype(np.float16))
        reader.close()
        image_ids = [row["image_id"] for row in rows]
        path = storage.join(output, f"vectors-{shard.name}.parquet")
        files = [storage.write_table(path, make_table(image_ids, np.concatenate(vectors)))]
        if config.thumbnail_side:
            table = pa.table({"image_id": image_ids, "thumbnail": thumbnails}, schema=records.THUMBNAILS)
            files.append(storage.write_table(storage.join(output, f"thumbnails-{shard.name}.parquet"), table))
        return ShardRecord(name=shard.name, files=tuple(files), totals={"embedded": len(rows)})

    return process


def encode_thumbnail(picture: Image.Image, side: int) -> bytes:
    """`picture` (RGB) as an encoded image whose longest side is at most `side` pixels; never enlarged."""
    small = picture.copy() if max(picture.size) <= side else picture
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()


def _batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def command_line(
    config: command.ConfigOption,
    images: Annotated[str, typer.Option("--images", help="Folder of the finished ingest.")],
    output: command.OutputOption,
    stage: Annotated[Literal["embed", "describe"], typer.Option("--stage", help="The section to use.")] = "embed",
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Embed the images of a finished ingest."""
    settings = load(EmbedConfig, config, overrides or (), section=stage)
    if plan:
        print(resolved_toml(settings), end="")
        return
    with command.open_runner(runner, workers, gpus_per_worker=settings.embedder.num_gpus) as chosen:
        run(settings, images, output, chosen, stage=stage, replace=replace)


if __name__ == "__main__":
    from curation import embed  # by its real name, or its classes would exist twice

    command.main(embed.command_line)
