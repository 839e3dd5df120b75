"""How a stage runs: claim the output, skip finished shards, map the worker over the others, write the manifest.

A stage is a function `run(config, inputs, output, runner) -> Manifest`. Its file holds, in this order, its frozen
config, `run`, and its command. `run` builds a `Stage` and passes it to `run_stage`. A step of a stage is built the same
way; its output is in the progress folder of the stage (`step_folder`).

A stage may make shards of a later stage in the same pass: their files in the output of that stage, their markers in its
`ready_folder`. The later stage takes them as done when it runs, and maps its worker over the others only.
"""

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from curation.config import Settings, plan_values
from curation.engine import manifest, progress, run_log
from curation.engine.manifest import Execution, Manifest, Plan, ShardRecord, ShardRecords
from curation.engine.run_log import Log, StageLog
from curation.engine.runner import Reported, Runner, Shard, Worker, num_items_of
from curation.engine.shard_counts import ShardCounts
from curation.errors import InputError
from curation.files.folder_lock import sole_writer

# The name of the record that `prepare` returns.
PREPARED = "prepared"
# The fact of a manifest that names the poison shards: shards without output, because every attempt killed the worker.
SET_ASIDE = "set_aside"
# The driver calls it when all shards are done. It returns facts for the manifest and a record of the files it wrote.
Finish = Callable[[Sequence[ShardRecord]], tuple[dict[str, Any], ShardRecord | None]]


@dataclass
class Tally:
    """The number of finished shards and the sums of their counts."""

    num_shards: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)

    def add(self, num_shards: int, totals: Mapping[str, int], rejects: Mapping[str, int]) -> None:
        """Add the counts of more shards."""
        self.num_shards += num_shards
        self.totals.update(totals)
        self.rejects.update(rejects)


@dataclass(frozen=True)
class Stage:
    """The definition of a stage or of a step. Equal definitions give equal bytes, on every runner."""

    name: str
    config: Settings
    """Fields marked NotInPlan may change between runs into the same output."""
    inputs: Mapping[str, str]
    """The content hash of each input, by name."""
    output: str
    """Folder of the results, local or any fsspec URL."""
    shards: Sequence[Shard]
    make_worker: Callable[[], Worker]
    """Picklable; see the contract in runner.py."""
    prepare: Callable[[], ShardRecord] | None = None
    """Runs once in the driver before the shards, and writes files for all of them. It gets a marker like a shard."""
    outdated: Callable[[], Set[str]] | None = None
    """Called with `replace` only, where inputs are equal: the finished shards that are done again all the same. For
    inputs whose content no hash covers; shards whose inputs are as before give the same bytes again."""
    check: Callable[[Tally], None] | None = None
    """Called with the counts so far after each shard. It raises to stop the stage early."""
    finish: Finish | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts for later stages that are known before the work. The manifest holds them with the facts of `finish`."""
    max_poison_shards: int = 0
    """Maximum number of poison shards, which are set aside. A later run with a lower maximum tries them again. A stage
    with a maximum above 0 has no `prepare`, and its `finish` writes no file."""
    title: str = ""
    """The name on the terminal outside a run, if it is not `name`. In a run the terminal shows the folder's name."""
    unit: str = "images"
    """The unit that progress counts: that of `Shard.num_items`."""
    note: Callable[[Mapping[str, float]], str] | None = None
    """Makes a text for the progress display from the sums of the workers' measurements."""

    def plan(self) -> Plan:
        """The plan for which the output is claimed."""
        return Plan(
            stage=self.name,
            config=plan_values(self.config),
            inputs=dict(self.inputs),
            num_shards=len(self.shards),
        )


def run_stage(stage: Stage, runner: Runner, *, replace: bool = False, log: Log = None) -> Manifest:
    """Process the unfinished shards of `stage`, mark it done and return its manifest.

    The sizes of all files of finished shards are checked; with `replace` the hashes too, and the damaged shards of a
    finished stage are done again.

    log: the log of the whole run. Raises OutputMismatchError when the output holds the work of another config or of
    other inputs, or when another run is writing there. Raises InputError when the files of a finished stage are damaged
    and `replace` is false.
    """
    with sole_writer(stage.output):
        plan = stage.plan()
        stage_log = None if log is None else log.of_stage(stage.output)
        # In a run, the name of the folder, as in the log and in `status`: "pairs/join", "corpus".
        name = stage.title or stage.name if stage_log is None else stage_log.name
        finished = manifest.claim(stage.output, plan, replace=replace)
        finished_shards: Sequence[ShardRecord] = ()
        if finished is not None:
            with progress.step(name, "checking the files of the finished stage"):
                to_redo = _shards_to_redo(name, stage, finished, replace=replace)
            if not to_redo and (done := _already_done(name, stage, finished)):
                return done
            finished_shards = _left_of(finished, to_redo)
        started = time.monotonic()
        outdated = stage.outdated() if replace and finished is None and stage.outdated is not None else set()
        names, tally = _count_done(name, stage, finished_shards, outdated)
        if stage_log is not None:
            stage_log.begin(plan, num_done=len(names), num_workers=runner.num_workers)
        set_aside = _process_shards(name, stage, runner, names, tally, stage_log)
        with progress.step(name, "writing the manifest"):
            result = _collect(stage, plan, finished_shards, set_aside)
            manifest.write_manifest(stage.output, result)
        if stage_log is not None:
            stage_log.end(time.monotonic() - started)
        return result


def _already_done(name: str, stage: Stage, finished: Manifest) -> Manifest | None:
    """The manifest of a finished stage, or None when it has more poison shards than the stage allows."""
    set_aside = finished.facts.get(SET_ASIDE, [])
    if len(set_aside) > stage.max_poison_shards:
        return None
    names = f"; set aside: {', '.join(set_aside)}" if set_aside else ""
    progress.say(f"{name}: already done, nothing to do{names}")
    return finished


def _shards_to_redo(name: str, stage: Stage, finished: Manifest, *, replace: bool) -> set[str]:
    """The names of the records of a finished stage whose files are damaged; with `replace`, their hashes count too.

    With `replace`, those of outdated shards as well. Raises InputError for damage without `replace`. A step is part of
    an unfinished stage, so it is repaired unasked.
    """
    is_step = f"/{manifest.PROGRESS_NAME}/" in stage.output
    checked = manifest.checked(stage.output, finished.shards, hashes=replace)
    damaged = {record.name: problems[0] for record, problems in checked if problems}
    recorded = {record.name for record in finished.shards} | set(finished.facts.get(SET_ASIDE, []))
    for shard in stage.shards:
        if shard.name not in recorded:
            damaged[shard.name] = f"shard {shard.name} is not in {stage.output}/{manifest.MANIFEST_NAME}"
    if damaged and not replace and not is_step:
        raise InputError(
            f"{name}: damaged after it was written: {_first_of(damaged)}. Run again with --replace, which does "
            "the damaged shards again."
        )
    if damaged:
        progress.say(f"{name}: damaged after it was written, and done again: {_first_of(damaged)}")
    outdated = stage.outdated() - damaged.keys() if replace and stage.outdated is not None else set()
    if outdated:
        progress.say(f"{name}: {len(outdated):,} of {len(stage.shards):,} shards are read again")
    return damaged.keys() | outdated


def _first_of(damaged: Mapping[str, str]) -> str:
    """The first problem, and the number of the others. `damaged`: a problem for each shard."""
    more = f" (and {len(damaged) - 1:,} more shards)" if len(damaged) > 1 else ""
    return next(iter(damaged.values())) + more


def _left_of(finished: Manifest, to_redo: Set[str]) -> ShardRecords:
    """The records that stay of a finished stage when those of `to_redo` are made again.

    The files that `prepare` leaves in the progress folder are gone, so `prepare` then runs again. Its bytes are equal.
    """
    dropped = to_redo | {PREPARED} if to_redo else to_redo
    return ShardRecords([manifest.json_line(record) for record in finished.shards if record.name not in dropped])


def _count_done(
    name: str, stage: Stage, finished_shards: Iterable[ShardRecord], outdated: Set[str]
) -> tuple[set[str], Tally]:
    """The names and counts of the finished shards. Their records stay on disk, so that a driver keeps only names.

    A marked shard is not finished where its files are missing or of another size, or where it is `outdated`.
    """
    names: set[str] = set()
    tally = Tally()

    def add(record: ShardRecord) -> None:
        if record.name not in names:  # a kill may leave two markers of a shard
            names.add(record.name)
            tally.add(int(record.name != PREPARED), record.totals, record.rejects)

    for record in finished_shards:
        add(record)
    damaged: dict[str, str] = {}
    for record, problems in manifest.checked(stage.output, manifest.read_done(stage.output), hashes=False):
        if problems:
            damaged[record.name] = problems[0]
        elif record.name not in outdated:
            add(record)
    if damaged:
        progress.say(f"{name}: damaged after it was written, and done again: {_first_of(damaged)}")
    return names, tally


def _process_shards(
    name: str, stage: Stage, runner: Runner, done: set[str], tally: Tally, stage_log: StageLog | None
) -> list[str]:
    """Prepare, and map the worker over the shards that are not in `done`. Returns the names of the poison shards."""
    if stage.prepare is not None and PREPARED not in done:
        prepared = stage.prepare()
        assert prepared.name == PREPARED, prepared.name
        manifest.mark_shard_done(stage.output, prepared)
    todo = [shard for shard in stage.shards if shard.name not in done]
    if len(todo) < len(stage.shards):
        num_done = len(stage.shards) - len(todo)
        progress.say(f"{name}: {num_done:,} of {len(stage.shards):,} shards are already done, continuing")
    todo = _take_ready(name, stage, todo, tally, stage_log)
    if stage.check is not None and tally.num_shards:
        stage.check(tally)  # here too, because an earlier run may have stopped at the last shard
    if not todo:
        return []
    notes = None if stage_log is None else (stage_log.notes, stage_log.name)
    make_worker = functools.partial(make_marking_worker, stage.make_worker, stage.output, notes)
    measured: Counter[str] = Counter()
    set_aside: list[str] = []
    unmerged: list[ShardRecord] = []
    counts, note = ShardCounts(todo), ""
    with progress.counted(name, stage.unit, total=counts.counts().total) as show:

        def show_reported(reported: Mapping[str, Reported]) -> None:
            counts.report(reported)
            show(counts.counts(), note)

        records = runner.map(
            name, make_worker, todo, max_poison_shards=stage.max_poison_shards, on_progress=show_reported
        )
        try:
            for shard, record in zip(todo, records, strict=True):
                if record is None:
                    set_aside.append(shard.name)
                    counts.set_aside(shard.name)
                    progress.say(f"{name}: shard {shard.name} killed its worker at every attempt and is set aside")
                    continue
                measured.update(record.measured)
                tally.add(1, record.totals, record.rejects)
                num_items = num_items_of(shard, record)
                if stage_log is not None:
                    stage_log.shard(record, num_items)
                unmerged.append(record)
                if len(unmerged) == manifest.MARKERS_PER_FILE:
                    manifest.merge_markers(stage.output, unmerged)
                    unmerged.clear()
                counts.finish(shard.name, num_items)
                note = stage.note(measured) if stage.note else ""
                show(counts.counts(), note)
                if stage.check is not None:
                    stage.check(tally)
        finally:
            records.close()
    return set_aside


def _take_ready(
    name: str, stage: Stage, todo: Sequence[Shard], tally: Tally, stage_log: StageLog | None
) -> list[Shard]:
    """Mark those of `todo` done that an earlier stage made, and return the others. A damaged shard is among these."""
    waiting = {shard.name: shard for shard in todo}
    records = manifest.read_done(manifest.ready_folder(stage.output))
    undamaged = (
        record
        for record, problems in manifest.checked(stage.output, records, hashes=False)
        if record.name in waiting and not problems
    )
    while batch := list(itertools.islice(undamaged, manifest.MARKERS_PER_FILE)):
        manifest.mark_shards_done(stage.output, batch)
        for record in batch:
            tally.add(1, record.totals, record.rejects)
            num_items = num_items_of(waiting.pop(record.name), record)
            if stage_log is not None:
                execution = Execution(worker=run_log.worker_name(), started=time.time(), seconds=0.0)
                stage_log.shard(record.model_copy(update={"execution": execution}), num_items, ready=True)
    if len(waiting) < len(todo):
        num_taken = len(todo) - len(waiting)
        progress.say(f"{name}: {num_taken:,} of {len(stage.shards):,} shards were made in the pass of an earlier stage")
    return list(waiting.values())


def _collect(stage: Stage, plan: Plan, finished_shards: Iterable[ShardRecord], set_aside: Sequence[str]) -> Manifest:
    """The manifest of a stage after every shard is done or set aside."""
    by_name = {
        record.name: manifest.json_line(record)
        for record in itertools.chain(finished_shards, manifest.read_done(stage.output))
    }
    names = ([PREPARED] if stage.prepare else []) + [shard.name for shard in stage.shards]
    lines = [by_name[name] for name in names if name not in set_aside]
    facts, driver_record = stage.finish(ShardRecords(lines)) if stage.finish else ({}, None)
    facts = {**stage.facts, **facts}
    if set_aside:
        facts[SET_ASIDE] = list(set_aside)
    if driver_record is not None:
        lines.append(manifest.json_line(driver_record))
    records = ShardRecords(lines)
    return Manifest(
        plan=plan,
        shards=records,
        totals=manifest.sum_counts(record.totals for record in records),
        rejects=manifest.sum_counts(record.rejects for record in records),
        facts=facts,
    )


def make_marking_worker(
    make_worker: Callable[[], Worker], output: str, notes: tuple[str, str] | None = None
) -> Callable[[Shard], ShardRecord]:
    """A worker that marks its shards done in `output`.

    notes: folder and stage name for the worker's note of its current shard; None for no note.
    """
    worker = make_worker()

    def process(shard: Shard) -> ShardRecord:
        if notes is not None:
            run_log.write_note(*notes, shard.name)
        now, started = time.time(), time.perf_counter()
        record = worker(shard)
        manifest.mark_shard_done(output, record)  # by the worker, so that no shard is lost when the driver dies
        execution = Execution(worker=run_log.worker_name(), started=now, seconds=time.perf_counter() - started)
        return record.model_copy(update={"execution": execution})

    return process
