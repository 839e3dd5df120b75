"""Measures the gain of more workers, the rate of writing tars, and the cost of a shard.

`workers`   ingest and pack of drawn photographs in tars, by 1, 2, 4, ... Ray workers. The ideal is the rate of one
            worker times the number of workers or, if smaller, of processors. No time includes starting Ray and its
            processes. Where other work uses the processors, elapsed time says little. Then the processor time of an
            image (workers, decoders and Ray itself) shows whether more workers cost more.
`packing`   the samples of one tar, from memory to disk, against webdataset's TarWriter: the same images and sidecars.
            Our writer also hashes every byte and syncs the file. So the peer is measured twice: as it is, and writing
            through our file, which does both.
`shards`    stages of tiny shards with records like those of real shards: the cost of a shard in this process and on
            Ray, whether it grows with their number, the driver's memory, and the time of a resume until new work.
"""

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import webdataset
from rich.table import Table

from curation import ingest, pack
from curation.config import Settings
from curation.engine import command
from curation.engine.manifest import Manifest, Plan, ShardRecord, require_manifest, sum_counts, write_manifest
from curation.engine.runner import InlineRunner, OnProgress, Runner, Shard, Worker
from curation.engine.stage import Stage, run_stage
from curation.files import parquet, paths, schemas
from curation.images.corpus_tar import CorpusSample, write_tar
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig
from curation.pack import PackConfig
from curation.retrieve import DatasetConfig, RetrieveConfig
from curation.run_folder import RunFolder
from pipelines.bench import embedding
from pipelines.bench.processes import Measurements, in_process, memory, run_work
from pipelines.bench.tables import make_table

# Bytes of an image: a thumbnail, the mean of the demo's, photographs of 500 x 400 and larger.
SIZES = (10_000, 25_000, 55_000, 100_000)
NUM_SAMPLES = 2_000
PACKING_TARGET = 2.0
PHOTOGRAPHS, PER_TAR = 4_000, 250
NUM_SHARDS = 100_000
RESUME_TARGET = 10.0  # seconds

# Workers


@dataclass(frozen=True)
class WorkerRates:
    """Images per second of a stage with a number of workers."""

    stage: str
    num_workers: int
    rate: float
    ideal: float
    processor_seconds: float
    """Per image, of all processes."""


def bench_workers(*, scale: int = 1, repeats: int | None = None) -> list[WorkerRates]:
    """A row for each stage and number of workers; the fastest of `repeats` rounds (default 3) by turns."""
    processors = os.cpu_count() or 1
    counts = [number for number in (1, 2, 4, 8, 16) if number <= max(4, processors)]
    num_images = max(counts[-1] * 2, PHOTOGRAPHS // scale)
    rates: dict[tuple[str, int], float] = {}
    processor_seconds: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        _in_process("make", folder=folder, num_images=num_images)
        for _ in range(repeats or 3):
            for number in counts:
                seconds = _in_process("stages", folder=folder, num_workers=number)
                for stage in ("ingest", "pack"):
                    key = stage, number
                    rates[key] = max(rates.get(key, 0.0), num_images / seconds[stage])
                    per_image = seconds[f"{stage} processor"] / num_images
                    processor_seconds[key] = min(processor_seconds.get(key, float("inf")), per_image)
    return [
        WorkerRates(stage, number, rate, min(number, processors) * rates[stage, 1], processor_seconds[stage, number])
        for (stage, number), rate in sorted(rates.items())
    ]


def make(folder: str, num_images: int) -> Measurements:
    """Make photographs in tars."""
    embedding.draw_tars(folder, num_images, embedding.PHOTOGRAPH, max(1, min(PER_TAR, num_images // 16)))
    return {"images": float(num_images)}


def stages(folder: str, num_workers: int) -> Measurements:
    """Elapsed and processor seconds of ingest and pack of the photographs in `folder`, on warm Ray workers."""
    from curation.engine.ray_runner import RayRunner

    source = SourceConfig(name="drawn", path=folder, role="seed", layout="webdataset")
    config = IngestConfig(sources=(source,))
    tars = sorted(Path(folder).glob("*.tar"))
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> None:
        started, processor_started = time.perf_counter(), _processor_seconds()
        work()
        seconds[stage] = time.perf_counter() - started
        seconds[f"{stage} processor"] = _processor_seconds() - processor_started

    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as output:
        runner = RayRunner(num_workers=num_workers)
        try:
            ready = Path(output, "ready")
            ready.mkdir()
            warm_ups = [Shard(f"{n}", (str(tars[n % len(tars)]), num_workers)) for n in range(num_workers)]
            list(runner.map("warm", functools.partial(_warm_up, str(ready)), warm_ups))
            timed("ingest", lambda: ingest.run(config, f"{output}/ingest", runner))
            _write_dedup_and_retrieve(output)
            run_folder, packing = RunFolder.of(output), PackConfig(images_per_shard=PER_TAR)
            timed("pack", lambda: pack.run(packing, run_folder, run_folder.corpus, runner))
        finally:
            runner.close()
    return seconds


def _warm_up(folder: str) -> Worker:
    """A worker that takes its first photographs through ingest, and waits until all others have done so."""

    def process(shard: Shard) -> ShardRecord:
        tar, num_workers = shard.work
        source = SourceConfig(name="warm", path=tar, role="seed", layout="webdataset")
        ingest.run(IngestConfig(sources=(source,)), f"{folder}-{shard.name}", InlineRunner())
        Path(folder, shard.name).touch()
        while len(list(Path(folder).iterdir())) < num_workers:
            time.sleep(0.1)
        return ShardRecord(name=shard.name)

    return process


def _processor_seconds() -> float:
    """Processor seconds of this process and of all its descendants. From /proc, so on Linux only."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        number = int(path.parent.name)
        # Of the process itself, and of its children that have ended.
        parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))
    descendants = {os.getpid()}
    while more := {number for number, parent in parents.items() if parent in descendants} - descendants:
        descendants |= more
    return sum(ticks[number] for number in descendants) / os.sysconf("SC_CLK_TCK")


def _write_dedup_and_retrieve(output: str) -> None:
    """Write a dedup that keeps every image and an empty retrieve, so that every seed is packed as it is."""
    images = require_manifest(f"{output}/ingest")
    records = []
    for name in images.files("images"):
        ids = parquet.read_table(f"{output}/ingest/{name}", schemas.IMAGES, ["image_id"])["image_id"].to_pylist()
        rows = [{"image_id": image_id, "component_id": image_id, "kept": True} for image_id in ids]
        table = pa.Table.from_pylist(rows, schema=schemas.DUPLICATES)
        file = parquet.write_table(f"{output}/dedup/{name.replace('images', 'duplicates')}", table)
        counts = {"rows": len(rows), "kept": len(rows), "near": 0, "holdout_rows": 0}
        records.append(ShardRecord(name=name, files=(file,), totals=counts))
    retrieve = RetrieveConfig(datasets=(DatasetConfig(name="drawn", as_is=True, retrieval="none"),))
    datasets = retrieve.model_dump(mode="json", include={"datasets"})
    for stage, shards, facts in (("dedup", records, {}), ("retrieve", [], datasets)):
        plan = Plan(stage=stage, config={}, inputs={"images": images.content_hash}, num_shards=len(shards))
        totals = sum_counts(record.totals for record in shards)
        manifest = Manifest(plan=plan, shards=tuple(shards), totals=totals, rejects={}, facts=facts)
        write_manifest(f"{output}/{stage}", manifest)


# Tars


@dataclass(frozen=True)
class PackingRates:
    """Samples per second of elapsed time and of processor time, by writer."""

    image_bytes: int
    elapsed: dict[str, float]
    processor: dict[str, float]


def bench_packing(*, scale: int = 1, repeats: int | None = None) -> list[PackingRates]:
    """A row for each size; the fastest of `repeats` rounds (default 5) by turns, which other work disturbed least."""
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
            elapsed, processor = (dict.fromkeys(WRITERS, float("inf")) for _ in range(2))
            samples = _samples(size, max(1, NUM_SAMPLES // scale))
            for _ in range(repeats or 5):
                for name, write in WRITERS.items():
                    started, processor_started = time.perf_counter(), time.process_time()
                    write(f"{folder}/{name}.tar", samples)
                    elapsed[name] = min(elapsed[name], time.perf_counter() - started)
                    processor[name] = min(processor[name], time.process_time() - processor_started)
            rates = [{name: len(samples) / seconds[name] for name in WRITERS} for seconds in (elapsed, processor)]
            rows.append(PackingRates(size, *rates))
    return rows


def _samples(size: int, number: int) -> list[CorpusSample]:
    data = [os.urandom(size) for _ in range(64)]
    return [
        CorpusSample(
            f"{index:032x}",
            data[index % 64],
            "JPEG",
            {
                "source": "web",
                "uri": f"s3://bucket/web/{index:06d}.tar",
                "width": 500,
                "height": 400,
                "label": None,
                "layout": "webdataset",
                "reasons": [f"sample:seeds:{index:032x}:1"],
            },
        )
        for index in range(number)
    ]


def _write_ours(path: str, samples: Sequence[CorpusSample]) -> None:
    write_tar(path, iter(samples))


def _write_peer(target: Any, samples: Sequence[CorpusSample]) -> None:
    with webdataset.TarWriter(target) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, "jpg": sample.data, "json": sample.sidecar})


def _write_peer_hashed(path: str, samples: Sequence[CorpusSample]) -> None:
    with paths.atomic_write(path) as file:
        _write_peer(file, samples)


WRITERS: dict[str, Callable[[str, Sequence[CorpusSample]], None]] = {
    "ours": _write_ours,
    "TarWriter": _write_peer,
    "hashed": _write_peer_hashed,
}

# Shards


@dataclass(frozen=True)
class ShardCosts:
    """The cost of a number of tiny shards: seconds, and bytes of the driver's memory beyond its memory before them."""

    runner: str
    num_shards: int
    seconds: float
    memory: float
    """When the last shard was done."""
    finishing: float
    """Seconds from there to the manifest."""
    peak: float
    """With the manifest."""
    resume: float
    """Until a resume over all shards but one begins that one."""
    resume_processor: float
    """The same in processor time: the time of a resume on an idle machine."""


def bench_shards(*, scale: int = 1) -> list[ShardCosts]:
    """A row for each runner and number of shards: a quarter, half and all of NUM_SHARDS."""
    rows = []
    for runner in ("inline", "ray"):
        for part in (4, 2, 1):
            number = max(4, NUM_SHARDS // part // scale)
            with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
                first = _in_process("shards", folder=folder, num_shards=number, runner=runner)
                second = _in_process("shards", folder=folder, num_shards=number, runner=runner)
                rows.append(
                    ShardCosts(
                        runner,
                        number,
                        first["seconds"],
                        first["memory"],
                        second["finishing"],
                        second["peak"],
                        second["first"],
                        second["first_cpu"],
                    )
                )
    return rows


class _Stopped(Exception):
    pass


def shards(folder: str, num_shards: int, runner: command.RunnerName) -> Measurements:
    """Do all tiny shards but the last, and stop before it; called again, do the last."""
    with command.open_runner(runner) as chosen:
        make_worker = functools.partial(_tiny, folder + "/tiny")
        # Start the workers before the clock.
        warm_ups = [Shard(f"{number}", None) for number in range(chosen.num_workers)]
        list(chosen.map("warm", functools.partial(_tiny, folder + "/warm"), warm_ups))
        watch = _Watch(chosen, num_shards - 1)
        before, started, processor_started = memory("VmRSS"), time.perf_counter(), time.process_time()
        with contextlib.suppress(_Stopped):
            stage = Stage(
                name="tiny",
                config=Settings(),
                inputs={},
                output=folder + "/tiny",
                shards=[Shard(f"{number:06d}", None, 10) for number in range(num_shards)],
                make_worker=make_worker,
                check=lambda done: None,
            )
            run_stage(stage, watch)
        return {
            "first": watch.first - started,
            "first_cpu": watch.first_cpu - processor_started,
            "seconds": watch.last - watch.first,
            "finishing": time.perf_counter() - watch.last,
            "memory": watch.memory - before,
            "peak": memory("VmHWM") - before,
        }


class _Watch(Runner):
    """Wraps a runner: keeps the time of its first and last shard, and stops before the shard of number `stop_at`."""

    def __init__(self, runner: Runner, stop_at: int) -> None:
        self._runner = runner
        self._stop_at = stop_at
        self.num_workers = runner.num_workers
        self.first = self.first_cpu = self.last = self.memory = 0.0

    def map(
        self,
        stage: str,
        make_worker: Callable[[], Worker],
        shards: Sequence[Shard],
        *,
        max_poison_shards: int = 0,
        on_progress: OnProgress = lambda reported: None,
    ) -> Generator[ShardRecord | None, None, None]:
        self.first, self.first_cpu = time.perf_counter(), time.process_time()
        before_stop = [shard for shard in shards if int(shard.name) < self._stop_at] or shards
        yield from self._runner.map(stage, make_worker, before_stop, on_progress=on_progress)
        self.last, self.memory = time.perf_counter(), memory("VmRSS")
        if len(before_stop) < len(shards):
            raise _Stopped


def _tiny(output: str) -> Worker:
    def process(shard: Shard) -> ShardRecord:
        files = [
            paths.write_bytes(paths.join(output, f"{kind}-{shard.name}.parquet"), b"1", durable=False)
            for kind in ("images", "rejects")
        ]
        totals = {"images": 10, "accepted": 9, "rejected": 1}
        return ShardRecord(name=shard.name, files=tuple(files), totals=totals, rejects={"truncated": 1})

    return process


# Tables


def workers_table(rows: Sequence[WorkerRates]) -> Table:
    columns = (
        "stage",
        "workers",
        "images/s",
        "ideal",
        "share of ideal",
        "processor, ms an image",
        "by that of 1 worker",
    )
    table = make_table("Photographs of 500 x 400 by Ray workers", columns)
    alone = {row.stage: row.processor_seconds for row in rows if row.num_workers == 1}
    for row in rows:
        table.add_row(
            row.stage,
            str(row.num_workers),
            f"{row.rate:,.0f}",
            f"{row.ideal:,.0f}",
            f"{row.rate / row.ideal:.2f}",
            f"{row.processor_seconds * 1000:.2f}",
            f"{row.processor_seconds / alone[row.stage]:.2f}",
        )
    return table


def packing_table(rows: Sequence[PackingRates]) -> Table:
    columns = ("kB an image", "time", "ours", "TarWriter", "ratio", "target", "TarWriter, hashed and synced", "ratio")
    table = make_table("Writing a tar, samples/s", columns)
    for row in rows:
        for clock, rates in (("elapsed", row.elapsed), ("processor", row.processor)):
            ours, peer, hashed = (rates[writer] for writer in WRITERS)
            table.add_row(
                *(f"{row.image_bytes / 1000:g}", clock, f"{ours:,.0f}", f"{peer:,.0f}", f"{ours / peer:.2f}"),
                *(f"{PACKING_TARGET:g}", f"{hashed:,.0f}", f"{ours / hashed:.2f}"),
            )
    return table


def shards_table(rows: Sequence[ShardCosts]) -> Table:
    costs = ("ms a shard", "driver, MB", "manifest, s", "peak, MB", "resume, s", "resume, processor s", "target")
    table = make_table("Tiny shards: the cost of each, and a resume over all but one", ("runner", "shards", *costs))
    for row in rows:
        table.add_row(
            row.runner,
            f"{row.num_shards:,}",
            f"{row.seconds / row.num_shards * 1000:.2f}",
            f"{row.memory / 1e6:,.0f}",
            f"{row.finishing:.1f}",
            f"{row.peak / 1e6:,.0f}",
            f"{row.resume:.2f}",
            f"{row.resume_processor:.2f}",
            f"{RESUME_TARGET:g}",
        )
    return table


WORKS: dict[str, Callable[[int, int | None], Table]] = {
    "workers": lambda scale, repeats: workers_table(bench_workers(scale=scale, repeats=repeats)),
    "packing": lambda scale, repeats: packing_table(bench_packing(scale=scale, repeats=repeats)),
    "shards": lambda scale, repeats: shards_table(bench_shards(scale=scale)),
}

_in_process = functools.partial(in_process, "scaling")

if __name__ == "__main__":
    from pipelines.bench import scaling  # by its real name: Ray sends its functions to workers

    run_work({"make": scaling.make, "stages": scaling.stages, "shards": scaling.shards})
