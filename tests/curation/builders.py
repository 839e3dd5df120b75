"""Small stages, images and ids for the tests."""

import hashlib
import io
import signal
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation.engine import command
from curation.engine.manifest import Manifest, Plan, ShardRecord, require_manifest, sum_counts, write_manifest
from curation.engine.runner import InlineRunner, OnProgress, Runner, Shard, Worker
from curation.files import parquet, paths, schemas, vectors
from curation.images.decode import ImageLimits, Picture
from curation.run_folder import RunFolder


def id_of(number: int) -> str:
    """An image_id that sorts as its number."""
    return f"{number:032x}"


def hashed_id(number: int) -> str:
    """An image_id anywhere in the range of ids, as those of real images."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def encoded_image(seed: int, format: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    """A small encoded image of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def picture_of(image: Image.Image) -> Picture:
    """An upright RGB image in the form that the decoder gives."""
    return Picture(np.array(image), *image.size, orientation=1)


def unit_vectors(seed: int, count: int, width: int = 8) -> np.ndarray:
    """Random directions, (count, width) float32."""
    matrix = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    unit: np.ndarray = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return unit


def image_row(image_id: str, source: str, role: str, **columns: Any) -> dict[str, Any]:
    """A row of schemas.IMAGES."""
    return {
        "image_id": image_id,
        "source": source,
        "role": role,
        "uri": f"/images/{image_id}.png",
        "offset": 0,
        "length": 100,
        "width": 10,
        "height": 10,
        "format": "PNG",
        "phash": 0,
        "content_pixels": columns.get("width", 10) * columns.get("height", 10),
        "detail_pixels": columns.get("width", 10) * columns.get("height", 10),
        "label": None,
        "layout": "folder",
    } | columns


def write_stage(
    folder: str | Path,
    shards: Sequence[Mapping[str, pa.Table]],
    *,
    totals: Sequence[dict[str, int]] | None = None,
    facts: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
) -> str:
    """Write a finished stage into `folder`. Each shard holds tables by kind, for example {"vectors": table}."""
    path = str(folder)
    done = []
    for number, tables in enumerate(shards):
        files = [parquet.write_table(f"{path}/{kind}-{number:05d}.parquet", table) for kind, table in tables.items()]
        counts = totals[number] if totals else {}
        done.append(ShardRecord(name=f"{number:05d}", files=tuple(files), totals=counts))
    plan = Plan(stage=Path(path).name, config={}, inputs=inputs or {}, num_shards=len(shards))
    total = sum_counts(record.totals for record in done)
    write_manifest(path, Manifest(plan=plan, shards=tuple(done), totals=total, rejects={}, facts=facts or {}))
    return path


def write_ingest(folder: str | Path, shards: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Write a finished ingest whose shards hold the given rows of schemas.IMAGES."""
    tables = [{"images": pa.Table.from_pylist(list(rows), schema=schemas.IMAGES)} for rows in shards]
    totals = [{"images": len(rows), "accepted": len(rows), "rejected": 0} for rows in shards]
    facts = {"sources": [], "limits": ImageLimits().model_dump(mode="json")}
    return write_stage(folder, tables, totals=totals, facts=facts)


def write_vectors(folder: str | Path, images: str, shards: Sequence[Mapping[str, np.ndarray]]) -> str:
    """Write a finished embed whose shards hold the given vectors, all of one width, by image_id."""
    width = max(len(vector) for shard in shards for vector in shard.values())
    tables = [
        {"vectors": vectors.make_table(list(shard), np.array(list(shard.values())).reshape(len(shard), width))}
        for shard in shards
    ]
    return write_stage(folder, tables, inputs={"images": content_hash(images)})


def write_pairs(
    folder: str | Path,
    images: str,
    shards: Sequence[Sequence[tuple[str, str, float]]],
    *,
    min_similarity: float = 0.0,
) -> str:
    """Write a finished pairs whose shards hold the given pairs: two ids and a similarity."""
    tables = [
        {
            "pairs": pa.Table.from_pylist(
                [dict(zip(schemas.PAIRS.names, (*row, False, row[2], True), strict=True)) for row in rows],
                schemas.PAIRS,
            )
        }
        for rows in shards
    ]
    facts = {"min_similarity": min_similarity, "max_holdout_threshold": 1.0, "full_lists": 0}
    return write_stage(folder, tables, facts=facts, inputs={"images": content_hash(images)})


def write_dedup(folder: str | Path, images: str, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> str:
    """Write a finished dedup that keeps the rows of ingest for which `keep` is true, except holdout rows."""
    tables, totals = [], []
    for name in require_manifest(images).files("images"):
        rows = parquet.read_table(paths.join(images, name), schemas.IMAGES).to_pylist()
        decided = [
            {"image_id": row["image_id"], "component_id": row["image_id"]}
            | ({"kept": True} if keep(row) and row["role"] != "holdout" else {"kept": False, "reason": "near"})
            for row in rows
        ]
        tables.append({"duplicates": pa.Table.from_pylist(decided, schema=schemas.DUPLICATES)})
        candidates = [d for d, row in zip(decided, rows, strict=True) if row["role"] != "holdout"]
        num_kept = sum(bool(d["kept"]) for d in candidates)
        totals.append(
            {
                "rows": len(rows),
                "kept": num_kept,
                "near": len(candidates) - num_kept,
                "holdout_rows": len(rows) - len(candidates),
            }
        )
    return write_stage(folder, tables, totals=totals, inputs={"images": content_hash(images)})


def stages_of(ingest: str, dedup: str, embed: str = "", cluster: str = "") -> RunFolder:
    """The folders of hand-made stages that cluster and retrieve read."""
    return RunFolder(ingest=ingest, dedup=dedup, embed=embed, cluster=cluster)


def packed_stages(ingest: str, dedup: str, retrieve: str) -> RunFolder:
    """The folders of hand-made stages that pack reads."""
    return RunFolder(ingest=ingest, dedup=dedup, retrieve=retrieve)


def run_in_process(command_line: Callable[..., None], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in this process, for its exit status and what it prints. A process of its own takes seconds."""
    return run_main(lambda: command.main(command_line), *arguments)


def run_main(main: Callable[[], None], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Call `main` in this process, which reads the command line from `sys.argv`; otherwise as `run_in_process`."""
    output, errors, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr("sys.argv", ["command", *arguments])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())


def content_hash(folder: str) -> str:
    """The hash of a finished stage's files."""
    return require_manifest(folder).content_hash


def bytes_in(folder: str) -> dict[str, bytes]:
    """The bytes of every file below a folder of any filesystem, by the path within the folder."""
    fs, inner = paths.filesystem(folder)
    return {path.removeprefix(inner): fs.cat_file(path) for path in fs.find(inner)}


class Killed(BaseException):
    """Simulates a kill of the driver: no code catches it."""


class KilledRunner(Runner):
    """Runs shards in this process for `num_calls` calls of workers, over all steps. The next call raises Killed.

    That call raises before the worker's work, or after it with `after_work`. `calls_left` counts down.
    """

    def __init__(self, num_calls: int, *, after_work: bool = False) -> None:
        self.calls_left, self._after_work = num_calls, after_work

    def map(
        self,
        stage: str,
        make_worker: Callable[[], Worker],
        shards: Sequence[Shard],
        *,
        max_poison_shards: int = 0,
        on_progress: OnProgress = lambda reported: None,
    ) -> Generator[ShardRecord | None, None, None]:
        def make_killed_worker() -> Worker:
            worker = make_worker()

            def process(shard: Shard) -> ShardRecord:
                self.calls_left -= 1
                if self.calls_left < 0:
                    if self._after_work:
                        worker(shard)
                    raise Killed
                return worker(shard)

            return process

        yield from InlineRunner().map(stage, make_killed_worker, shards, on_progress=on_progress)
