"""What do more workers gain, what does a shard cost, and how fast is a tar written?

`workers`   ingest and pack of drawn photographs in tars, by 1, 2, 4, ... Ray workers, against the ideal: as many times
            the rate of one as there are workers or, if fewer, processors. Starting Ray and its processes counts
            nowhere. Where other work has the processors, the clock says little: processor time an image (workers,
            decoders and Ray itself) then says whether more workers cost more.
`packing`   the samples of one tar, from memory to disk, against webdataset's TarWriter: the same images and sidecars.
            Ours also hashes every byte and waits until the disk has them, so the peer is measured twice: as it is, and
            writing through our file, which does both.
`shards`    stages of tiny shards, each the record of a real one: what a shard costs on this process and on Ray, whether
            that grows with their number, the driver's memory, and how long a resume takes until it does new work.

    python -m pipelines.bench.scaling shards '{"folder": "/tmp/x", "num_shards": 1000, "runner": "inline"}'

prints as JSON what it measured, in a process of its own.
"""

import contextlib
import functools
import json
import os
import sys
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
from curation.engine.runner import InlineRunner, Runner, Shard, Worker
from curation.engine.stage import Stage, run_stage
from curation.files import parquet, paths, schemas
from curation.files.hashes import hash_json
from curation.files.paths import FileRecord
from curation.images.corpus_tar import CorpusSample, write_tar
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig
from curation.pack import PackConfig
from curation.retrieve import DatasetConfig, RetrieveConfig
from curation.run_folder import RunFolder
from pipelines.bench import contests, embedding
from pipelines.bench.processes import in_process

NAMES = ("workers", "packing", "shards")
# Bytes of an image: a thumbnail, the mean of the demo's, photographs of 500 x 400 and larger.
SIZES = (10_000, 25_000, 55_000, 100_000)
NUM_SAMPLES = 2_000
PACKING_TO_REACH = 2.0
PHOTOGRAPHS, PER_TAR = 4_000, 250
NUM_SHARDS = 100_000
RESUME_TO_REACH = 10.0  # seconds


@dataclass(frozen=True)
class Packing:
    """Samples per second by the clock and of processor time, by contestant."""

    image_bytes: int
    clock: dict[str, float]
    processor: dict[str, float]


def bench_packing(*, scale: int = 1, repeats: int | None = None) -> list[Packing]:
    """A row a size; by turns, and of `repeats` (default 5) the fastest, which other work disturbed least."""
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
            best = {name: [float("inf")] * 2 for name in CONTESTANTS}
            samples = _samples(size, max(1, NUM_SAMPLES // scale))
            for _ in range(repeats or 5):
                for name, work in CONTESTANTS.items():
                    clock, cpu = time.perf_counter(), time.process_time()
                    work(f"{folder}/{name}.tar", samples)
                    took = time.perf_counter() - clock, time.process_time() - cpu
                    best[name] = [min(pair) for pair in zip(best[name], took, strict=True)]
            rates = [{name: len(samples) / pair[place] for name, pair in best.items()} for place in (0, 1)]
            rows.append(Packing(size, *rates))
    return rows


def _samples(size: int, number: int) -> list[CorpusSample]:
    data = [os.urandom(size) for _ in range(64)]
    return [
        CorpusSample(
            f"{place:032x}",
            data[place % 64],
            "JPEG",
            {
                "source": "web",
                "uri": f"s3://bucket/web/{place:06d}.tar",
                "width": 500,
                "height": 400,
                "label": None,
                "reasons": [f"sample:seeds:{place:032x}:1"],
            },
        )
        for place in range(number)
    ]


def _ours(path: str, samples: Sequence[CorpusSample]) -> None:
    write_tar(path, iter(samples))


def _peer(target: Any, samples: Sequence[CorpusSample]) -> None:
    with webdataset.TarWriter(target) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, "jpg": sample.data, "json": sample.sidecar})


def _peer_hashed(path: str, samples: Sequence[CorpusSample]) -> None:
    with paths.atomic_write(path) as file:
        _peer(file, samples)


CONTESTANTS: dict[str, Callable[[str, Sequence[CorpusSample]], None]] = {
    "ours": _ours,
    "TarWriter": _peer,
    "hashed": _peer_hashed,
}


@dataclass(frozen=True)
class Workers:
    """Images per second of a stage by so many workers."""

    stage: str
    workers: int
    rate: float
    ideal: float
    processor: float
    """Seconds an image, of all processes."""


def bench_workers(*, scale: int = 1, repeats: int | None = None) -> list[Workers]:
    """A row for each stage and number of workers; of `repeats` (default 3), by turns, the fastest."""
    processors = os.cpu_count() or 1
    counts = [number for number in (1, 2, 4, 8, 16) if number <= max(4, processors)]
    num_images = max(counts[-1] * 2, PHOTOGRAPHS // scale)
    rates: dict[tuple[str, int], float] = {}
    spent: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        _in_process("make", folder=folder, num_images=num_images)
        for _ in range(repeats or 3):
            for number in counts:
                found = _in_process("stages", folder=folder, num_workers=number)
                for stage in ("ingest", "pack"):
                    key = stage, number
                    rates[key] = max(rates.get(key, 0.0), num_images / found[stage])
                    spent[key] = min(spent.get(key, float("inf")), found[f"{stage} processor"] / num_images)
    return [
        Workers(stage, number, rate, min(number, processors) * rates[stage, 1], spent[stage, number])
        for (stage, number), rate in sorted(rates.items())
    ]


def make(folder: str, num_images: int) -> dict[str, float]:
    """Photographs in tars."""
    embedding.draw_tars(folder, num_images, embedding.PHOTOGRAPH, max(1, min(PER_TAR, num_images // 16)))
    return {"images": float(num_images)}


def stages(folder: str, num_workers: int) -> dict[str, float]:
    """Seconds, and seconds of all processors, that ingest and pack of the photographs in `folder` take on so many Ray
    workers that are warm."""
    from curation.engine.ray_runner import RayRunner

    source = SourceConfig(name="drawn", path=folder, role="seed", layout="webdataset")
    config = IngestConfig(sources=(source,))
    tars = sorted(Path(folder).glob("*.tar"))
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> None:
        began, spent = time.perf_counter(), _processor_seconds()
        work()
        seconds[stage], seconds[f"{stage} processor"] = time.perf_counter() - began, _processor_seconds() - spent

    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as output:
        runner = RayRunner(num_workers=num_workers)
        try:
            met = Path(output, "met")
            met.mkdir()
            meeting = [Shard(f"{n}", (str(tars[n % len(tars)]), num_workers)) for n in range(num_workers)]
            list(runner.map("warm", functools.partial(_meet, str(met)), meeting))
            timed("ingest", lambda: ingest.run(config, f"{output}/ingest", runner))
            _pretend(output)
            folder_of = RunFolder.of(output)
            packing = PackConfig(images_per_shard=PER_TAR)
            timed("pack", lambda: pack.run(packing, folder_of, folder_of.corpus, runner))
        finally:
            runner.close()
    return seconds


def _meet(folder: str) -> Worker:
    """A worker that has taken its first photographs through ingest, and waits until all others have."""

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
    """What this process and all that it started, directly or not, have taken. From /proc, so on Linux only."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        number = int(path.parent.name)
        parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))  # its own and its dead children's
    family = {os.getpid()}
    while more := {number for number, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks[number] for number in family) / os.sysconf("SC_CLK_TCK")


def _pretend(output: str) -> None:
    """A dedup that keeps everything and a retrieve that finds nothing, so that every seed is packed as it is."""
    images = require_manifest(f"{output}/ingest")
    done = []
    for name in images.files("images"):
        ids = parquet.read_table(f"{output}/ingest/{name}", schemas.IMAGES, ["image_id"])["image_id"].to_pylist()
        rows = [{"image_id": image_id, "component_id": image_id, "kept": True} for image_id in ids]
        table = pa.Table.from_pylist(rows, schema=schemas.DUPLICATES)
        file = parquet.write_table(f"{output}/dedup/{name.replace('images', 'duplicates')}", table)
        counts = {"rows": len(rows), "kept": len(rows), "near": 0, "holdout_rows": 0}
        done.append(ShardRecord(name=name, files=(file,), totals=counts))
    retrieve = RetrieveConfig(datasets=(DatasetConfig(name="drawn", as_is=True, retrieval="none"),))
    datasets = retrieve.model_dump(mode="json", include={"datasets"})
    for stage, shards, facts in (("dedup", done, {}), ("retrieve", [], datasets)):
        plan = Plan(stage=stage, config={}, inputs={"images": images.content_hash}, num_shards=len(shards))
        totals = sum_counts(record.totals for record in shards)
        manifest = Manifest(plan=plan, shards=tuple(shards), totals=totals, rejects={}, facts=facts)
        write_manifest(f"{output}/{stage}", manifest)


@dataclass(frozen=True)
class Shards:
    """What so many tiny shards took. Seconds, and bytes of the driver's memory beyond what it began with."""

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
    """Until a resume over all but one of them begins with that one."""
    resume_cpu: float
    """Of processor time: what it takes where nothing else runs."""


def bench_shards(*, scale: int = 1) -> list[Shards]:
    """A row a runner and number of shards: a quarter, half and all of NUM_SHARDS."""
    rows = []
    for runner in ("inline", "ray"):
        for part in (4, 2, 1):
            number = max(4, NUM_SHARDS // part // scale)
            with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
                first = _in_process("shards", folder=folder, num_shards=number, runner=runner)
                second = _in_process("shards", folder=folder, num_shards=number, runner=runner)
                rows.append(
                    Shards(
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


def shards(folder: str, num_shards: int, runner: command.RunnerName) -> dict[str, float]:
    """Do all tiny shards but the last and stop there; called again, that one."""
    with command.open_runner(runner) as chosen:
        # Workers start before the time does.
        list(chosen.map("warm", _tiny, [Shard(f"{number}", None) for number in range(chosen.num_workers)]))
        watch = _Watch(chosen, num_shards - 1)
        before, began, began_cpu = contests.memory("VmRSS"), time.perf_counter(), time.process_time()
        with contextlib.suppress(_Stopped):
            stage = Stage(
                name="tiny",
                config=Settings(),
                inputs={},
                output=folder + "/tiny",
                shards=[Shard(f"{number:06d}", None, 10) for number in range(num_shards)],
                make_worker=_tiny,
                check=lambda done: None,
            )
            run_stage(stage, watch)
        return {
            "first": watch.first - began,
            "first_cpu": watch.first_cpu - began_cpu,
            "seconds": watch.last - watch.first,
            "finishing": time.perf_counter() - watch.last,
            "memory": watch.memory - before,
            "peak": contests.memory("VmHWM") - before,
        }


class _Watch(Runner):
    """Another runner, with the time of its first and last shard; stops before the shard of that place."""

    def __init__(self, runner: Runner, stop_at: int) -> None:
        self._runner = runner
        self._stop_at = stop_at
        self.num_workers = runner.num_workers
        self.first = self.first_cpu = self.last = self.memory = 0.0

    def map(
        self, stage: str, make_worker: Callable[[], Worker], shards: Sequence[Shard], *, max_poison_shards: int = 0
    ) -> Generator[ShardRecord | None, None, None]:
        self.first, self.first_cpu = time.perf_counter(), time.process_time()
        todo = [shard for shard in shards if int(shard.name) < self._stop_at] or shards
        yield from self._runner.map(stage, make_worker, todo)
        self.last, self.memory = time.perf_counter(), contests.memory("VmRSS")
        if len(todo) < len(shards):
            raise _Stopped


def _tiny() -> Worker:
    def process(shard: Shard) -> ShardRecord:
        files = [
            FileRecord(name=f"{kind}-{shard.name}.parquet", sha256=hash_json(shard.name), bytes=1, rows=10)
            for kind in ("images", "rejects")
        ]
        totals = {"images": 10, "accepted": 9, "rejected": 1}
        return ShardRecord(name=shard.name, files=tuple(files), totals=totals, rejects={"truncated": 1})

    return process


def tables(names: Sequence[str], *, scale: int = 1, repeats: int | None = None) -> list[Table]:
    """What was measured of each name, as tables."""
    found = []
    if "workers" in names:
        found.append(workers_table(bench_workers(scale=scale, repeats=repeats)))
    if "packing" in names:
        found.append(packing_table(bench_packing(scale=scale, repeats=repeats)))
    if "shards" in names:
        found.append(shards_table(bench_shards(scale=scale)))
    return found


def workers_table(rows: Sequence[Workers]) -> Table:
    columns = ("stage", "workers", "images/s", "ideal", "of it", "processor, ms an image", "of that of 1")
    table = _table("Photographs of 500 x 400 by Ray workers", columns)
    alone = {row.stage: row.processor for row in rows if row.workers == 1}
    for row in rows:
        share, cost = f"{row.rate / row.ideal:.2f}", f"{row.processor / alone[row.stage]:.2f}"
        rates = (f"{row.rate:,.0f}", f"{row.ideal:,.0f}", share, f"{row.processor * 1000:.2f}", cost)
        table.add_row(row.stage, str(row.workers), *rates)
    return table


def packing_table(rows: Sequence[Packing]) -> Table:
    columns = ("kB an image", "", "ours", "TarWriter", "ratio", "to reach", "TarWriter, hashed and synced", "ratio")
    table = _table("Writing a tar, samples/s", columns)
    for row in rows:
        for name, rates in (("by the clock", row.clock), ("of processor time", row.processor)):
            ours, peer, hashed = (rates[contestant] for contestant in CONTESTANTS)
            table.add_row(
                *(f"{row.image_bytes / 1000:g}", name, f"{ours:,.0f}", f"{peer:,.0f}", f"{ours / peer:.2f}"),
                *(f"{PACKING_TO_REACH:g}", f"{hashed:,.0f}", f"{ours / hashed:.2f}"),
            )
    return table


def shards_table(rows: Sequence[Shards]) -> Table:
    columns = (
        "runner",
        "shards",
        "ms a shard",
        "driver, MB",
        "manifest, s",
        "peak, MB",
        "resume, s",
        "of processor",
        "to reach",
    )
    table = _table("Tiny shards: what each costs, and a resume over all but one", columns)
    for row in rows:
        table.add_row(
            row.runner,
            f"{row.num_shards:,}",
            f"{row.seconds / row.num_shards * 1000:.2f}",
            f"{row.memory / 1e6:,.0f}",
            f"{row.finishing:.1f}",
            f"{row.peak / 1e6:,.0f}",
            f"{row.resume:.2f}",
            f"{row.resume_cpu:.2f}",
            f"{RESUME_TO_REACH:g}",
        )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


WORKS: dict[str, Callable[..., dict[str, float]]] = {work.__name__: work for work in (make, stages, shards)}


def _in_process(work: str, **arguments: Any) -> dict[str, float]:
    return in_process("scaling", work, arguments)


if __name__ == "__main__":
    from pipelines.bench import scaling  # by its real name: Ray sends its functions to workers

    print(json.dumps(scaling.WORKS[sys.argv[1]](**json.loads(sys.argv[2]))))
