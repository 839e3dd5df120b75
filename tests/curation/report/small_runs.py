"""Small finished runs for the tests of reports: real images and stages, except embed and pairs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tomli_w
from PIL import Image

from curation import cluster, dedup, ingest, pack, retrieve
from curation.cluster import ClusterConfig, LevelConfig
from curation.dedup import DedupConfig
from curation.embed import EmbedConfig
from curation.engine.manifest import Manifest, Plan, ShardRecord, sum_counts, write_manifest
from curation.engine.runner import InlineRunner
from curation.files import parquet, paths, schemas, vectors
from curation.images.hashing import image_id
from curation.images.sources import Role, SourceConfig
from curation.ingest import IngestConfig
from curation.models.embedders import EmbedderConfig
from curation.pack import PackConfig
from curation.pairs import PairsConfig
from curation.report import images_table, self_check
from curation.report.page import ReportConfig
from curation.report.self_check import SelfCheckConfig
from curation.retrieve import DatasetConfig, RetrieveConfig
from curation.run_folder import STAGES, RunFolder
from tests.curation.builders import packed_stages, stages_of

RED, BLUE = (200, 40, 40), (40, 40, 200)
Pairs = Sequence[tuple[Path, Path, float]]


def write_image(path: Path, colour: tuple[int, int, int], size: int = 40) -> Path:
    """An image of one colour with noise that depends on the path, so that files differ in their bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list("/".join(path.parts[-3:]).encode())).integers(-25, 25, (size, size, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path, "PNG")
    return path


def build_run(
    output: str,
    sources: Sequence[tuple[str, Path, Role]],
    datasets: Sequence[DatasetConfig],
    pairs: Pairs = (),
    *,
    thumbnails: bool = True,
    config: ReportConfig | None = None,
    copies: DedupConfig | None = None,
    packing: PackConfig | None = None,
    num_clusters: int = 2,
    check_copies: bool = False,
) -> str:
    """A finished run of the real stages, except embed and pairs: the vector of an image is its mean colour."""
    runner = InlineRunner()
    path = {stage: paths.join(output, stage) for stage in STAGES}
    settings = IngestConfig(
        sources=tuple(SourceConfig(name=name, path=str(folder), role=role) for name, folder, role in sources),
        max_reject_fraction=1,
        images_per_shard=7,
    )
    ingested = ingest.run(settings, path["ingest"], runner)
    shards: dict[str, list[ShardRecord]] = {"embed": [], "describe": []}
    for record, name in zip(ingested.shards, ingested.files("images"), strict=True):
        rows = parquet.read_table(paths.join(path["ingest"], name), schemas.IMAGES).to_pylist()
        images = {row["image_id"]: Image.open(row["uri"]).convert("RGB") for row in rows}
        means = np.array([np.asarray(image).mean((0, 1)) - 128 for image in images.values()]).reshape(-1, 3)
        table = vectors.make_table(list(images), means / np.linalg.norm(means, axis=1, keepdims=True))
        small = pa.table([list(images), [_webp(image) for image in images.values()]], schema=schemas.THUMBNAILS)
        for stage in shards:
            files = [parquet.write_table(paths.join(path[stage], f"vectors-{record.name}.parquet"), table)]
            if thumbnails and stage == "describe":
                files.append(parquet.write_table(paths.join(path[stage], f"thumbnails-{record.name}.parquet"), small))
            shards[stage].append(ShardRecord(name=record.name, files=tuple(files), totals={"embedded": len(images)}))
    for stage, done in shards.items():
        _finish(stage, path[stage], ingested.content_hash, done, {})
    rows = [
        (*sorted(image_id(path.read_bytes()) for path in pair[:2]), pair[2], False, pair[2], True) for pair in pairs
    ]
    columns = list(zip(*rows, strict=True)) or [[]] * len(schemas.PAIRS)
    file = parquet.write_table(
        paths.join(path["pairs"], "pairs-00000.parquet"), pa.table(columns, schema=schemas.PAIRS)
    )
    written = [ShardRecord(name="00000", files=(file,))]
    found = {"min_similarity": 0.4, "max_holdout_threshold": 1.0, "full_lists": 3}
    found |= {"min_descriptor_similarity": 0.4, "verification": None}
    _finish("pairs", path["pairs"], ingested.content_hash, written, found)
    self_check.run(
        SelfCheckConfig(),  # off: the descriptors of this run are mean colours
        RunFolder.of(output),
        path["self_check"],
        runner,
        describe=EmbedConfig(embedder=EmbedderConfig(name="efficientnet_lite0")),
        pairs=PairsConfig(),
    )
    dedup.run(copies or DedupConfig(), RunFolder(ingest=path["ingest"], pairs=path["pairs"]), path["dedup"])
    stages = (path["ingest"], path["dedup"], path["embed"])
    cluster.run(
        ClusterConfig(levels=(LevelConfig(num_clusters=num_clusters),)), stages_of(*stages), path["cluster"], runner
    )
    search = RetrieveConfig(datasets=tuple(datasets), more_than_seeds=1, check_copies=check_copies)
    retrieve.run(search, RunFolder.of(output), path["retrieve"], runner)
    packed = packed_stages(path["ingest"], path["dedup"], path["retrieve"])
    pack.run(packing or PackConfig(), packed, path["corpus"], runner)
    images_table.run(RunFolder.of(output), path["images"], runner)
    section = (config or ReportConfig()).model_dump(exclude_none=True)
    paths.write_bytes(paths.join(output, "run.toml"), tomli_w.dumps({"report": section}).encode())
    return output


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.resize((24, 24)).save(buffer, "WEBP")
    return buffer.getvalue()


def _finish(stage: str, folder: str, images: str, shards: list[ShardRecord], facts: dict[str, Any]) -> None:
    plan = Plan(stage=stage, config={}, inputs={"images": images}, num_shards=len(shards))
    totals = sum_counts(shard.totals for shard in shards)
    write_manifest(folder, Manifest(plan=plan, shards=tuple(shards), totals=totals, rejects={}, facts=facts))
