"""What every stage does around its shards: claim the output, skip what is done, map, write the manifest.

A stage is `run(config, inputs, output, runner) -> Manifest`. Its file holds, in this order, its frozen config, `run`,
and its command. `run` lists the shards and hands them to `run_shards` with a function that makes a worker.
"""

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

from curation.config import Settings
from curation.engine import progress, run_log
from curation.engine.manifest import (
    MARKERS_PER_FILE,
    Effort,
    Manifest,
    Plan,
    ShardRecord,
    ShardRecords,
    claim,
    gather_markers,
    line_of,
    mark_shard_done,
    read_counts,
    read_done,
    sum_counts,
    write_manifest,
)
from curation.engine.runner import Runner, Shard, Worker
from curation.files.folder_lock import sole_writer

# The name of the record that `prepare` returns.
PREPARED = "prepared"
# The fact in a manifest that names the shards which killed their worker every time and are missing.
SET_ASIDE = "set_aside"
Arguments = ParamSpec("Arguments")
# Called by the driver when all shards are done: facts for the manifest, and a record of the files it wrote itself.
Finish = Callable[[Sequence[ShardRecord]], tuple[dict[str, Any], ShardRecord | None]]


@dataclass
class Tally:
    """What the shards that are done count together."""

    num_shards: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)

    def add(self, num_shards: int, totals: Mapping[str, int], rejects: Mapping[str, int]) -> None:
        """Count more shards."""
        self.num_shards += num_shards
        self.totals.update(totals)
        self.rejects.update(rejects)


def _sole_writer(function: Callable[Arguments, Manifest]) -> Callable[Arguments, Manifest]:
    @functools.wraps(function)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Manifest:
        with sole_writer(str(kwargs["output"])):
            return function(*args, **kwargs)

    return alone


@_sole_writer
def run_shards(
    stage: str,
    *,
    config: Settings,
    inputs: dict[str, str],
    output: str,
    runner: Runner,
    shards: Sequence[Shard],
    make_worker: Callable[[], Worker],
    replace: bool = False,
    prepare: Callable[[], ShardRecord] | None = None,
    check: Callable[[Tally], None] | None = None,
    finish: Finish | None = None,
    unit: str = "images",
    note: Callable[[Mapping[str, float]], str] | None = None,
    not_in_plan: frozenset[str] = frozenset(),
    max_poison_shards: int = 0,
) -> Manifest:
    """Do the shards that are not done yet and mark the stage done; return its manifest.

    `inputs` names what the stage reads, each with a content hash. `prepare` runs once before the shards and writes what
    they all read; it is marked done like a shard. `check` sees what the finished shards count after each new one and
    raises to stop early; `note` makes of the sums of what they measured the text that progress shows behind their
    count. `not_in_plan` names the config fields that guard the work without shaping its bytes (`search.min_recall`: the
    field of a section). Up to `max_poison_shards` shards that kill their worker every time are set aside, and tried
    again by a run that allows fewer; a stage that allows any has neither `prepare` nor `finish`. Raises
    OutputMismatchError for the work of another config or other inputs, and while another run writes here.
    """
    plan = Plan(
        stage=stage,
        config=config.model_dump(mode="json", exclude=_nested(not_in_plan)),
        inputs=inputs,
        num_shards=len(shards),
    )
    finished = claim(output, plan, replace=replace)
    set_aside: list[str] = []
    before: Sequence[ShardRecord] = ()
    if finished is not None:
        missing = finished.facts.get(SET_ASIDE, [])
        if len(missing) <= max_poison_shards:
            named = f"; set aside: {', '.join(missing)}" if missing else ""
            progress.say(f"{stage}: already done, nothing to do{named}")
            return finished
        before = finished.shards
    # The records of finished shards stay on disk until the manifest takes them all: a driver holds their names.
    done: set[str] = set()
    tally = Tally()
    for record in before:
        done.add(record.name)
        tally.add(1, record.totals, record.rejects)
    for counts in read_counts(output):
        if done.isdisjoint(counts.names):  # a kill may leave a shard marked twice
            done.update(counts.names)
            tally.add(sum(name != PREPARED for name in counts.names), counts.totals, counts.rejects)
    started, log = time.monotonic(), run_log.of_stage(output)
    if log is not None:
        log.begin(plan, num_done=len(done), num_workers=runner.num_workers)
    if prepare is not None and PREPARED not in done:
        record = prepare()
        assert record.name == PREPARED, record.name
        mark_shard_done(output, record)
    todo = [shard for shard in shards if shard.name not in done]
    if len(todo) < len(shards):
        progress.say(f"{stage}: {len(shards) - len(todo)} of {len(shards)} shards were done before, going on")
    if check is not None and tally.num_shards:
        check(tally)  # a stage that stopped at its last shard is not done because nothing is left to do
    measured: Counter[str] = Counter()
    place = None if log is None else (log.notes, log.name)
    work = functools.partial(make_marking_worker, make_worker, output, place)
    ungathered: list[ShardRecord] = []
    with progress.bar(stage, total=sum(shard.num_items for shard in todo), unit=unit) as advance:
        results = runner.map(stage, work, todo, max_poison_shards=max_poison_shards)
        try:
            for shard, result in zip(todo, results, strict=True):
                if result is None:
                    set_aside.append(shard.name)
                    progress.say(f"{stage}: shard {shard.name} killed its worker every time and is set aside")
                    continue
                record = result
                measured.update(record.measured)
                tally.add(1, record.totals, record.rejects)
                num_items = shard.num_items or sum(file.rows for file in record.files)
                if log is not None:
                    log.shard(record, num_items)
                ungathered.append(record)
                if len(ungathered) == MARKERS_PER_FILE:
                    gather_markers(output, ungathered)
                    ungathered.clear()
                advance(num_items, note(measured) if note else "")
                if check is not None:
                    check(tally)
        finally:
            results.close()
    by_name = {record.name: line_of(record) for record in itertools.chain(before, read_done(output))}
    names = ([PREPARED] if prepare else []) + [shard.name for shard in shards]
    lines = [by_name[name] for name in names if name not in set_aside]
    facts, own_record = finish(ShardRecords(lines)) if finish else ({}, None)
    if set_aside:
        facts[SET_ASIDE] = set_aside
    if own_record is not None:
        lines.append(line_of(own_record))
    records = ShardRecords(lines)
    manifest = Manifest(
        plan=plan,
        shards=records,
        totals=sum_counts(record.totals for record in records),
        rejects=sum_counts(record.rejects for record in records),
        facts=facts,
    )
    write_manifest(output, manifest)
    if log is not None:
        log.end(time.monotonic() - started)
    return manifest


def _nested(names: Iterable[str]) -> dict[str, Any]:
    """Dotted names as the mapping of mappings that pydantic excludes by."""
    nested: dict[str, Any] = {}
    for name in names:
        *sections, field = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = True
    return nested


def make_marking_worker(
    make_worker: Callable[[], Worker], output: str, notes: tuple[str, str] | None = None
) -> Callable[[Shard], ShardRecord]:
    """A worker that marks its shards done in `output`, and keeps `notes` (folder, stage) of what it is at."""
    worker = make_worker()

    def process(shard: Shard) -> ShardRecord:
        if notes is not None:
            run_log.note_start(*notes, shard.name)
        now, started = time.time(), time.perf_counter()
        record = worker(shard)
        mark_shard_done(output, record)  # by the worker: a driver that dies now costs nothing
        effort = Effort(worker=run_log.worker_name(), started=now, seconds=time.perf_counter() - started)
        return record.model_copy(update={"effort": effort})

    return process
