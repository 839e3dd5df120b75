"""What every stage does around its shards: claim the output, skip what is done, map, write the manifest.

A stage is `run(config, inputs, output, runner) -> Manifest`. Its file holds, in this order, its frozen config, `run`,
and its command. `run` lists the shards and hands them to `run_shards` with a function that makes a worker.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from curation import progress, storage
from curation.config import Settings
from curation.runner import Runner, Shard, Worker
from curation.storage import Manifest, Plan, ShardRecord

# The name of the record that `prepare` returns.
PREPARED = "prepared"
# The fact in a manifest that names the shards which killed their worker every time and are missing.
SET_ASIDE = "set_aside"
# Called by the driver when all shards are done: facts for the manifest, and a record of the files it wrote itself.
Finish = Callable[[Sequence[ShardRecord]], tuple[dict[str, Any], ShardRecord | None]]


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
    check: Callable[[Sequence[ShardRecord]], None] | None = None,
    finish: Finish | None = None,
    unit: str = "images",
    note: Callable[[Mapping[str, float]], str] | None = None,
    not_in_plan: frozenset[str] = frozenset(),
    max_poison_shards: int = 0,
) -> Manifest:
    """Do the shards that are not done yet and mark the stage done; return its manifest.

    `inputs` names what the stage reads, each with a content hash. `prepare` runs once before the shards and writes what
    they all read; it is marked done like a shard. `check` sees the finished shards after each new one and raises to
    stop early; `note` makes of the sums of what they measured the text that progress shows behind their count.
    `not_in_plan` names the config fields that guard the work without shaping its bytes (`search.min_recall`: the field
    of a section). Up to `max_poison_shards` shards that kill their worker every time are set aside, and tried again by
    a run that allows fewer; a stage that allows any has neither `prepare` nor `finish`.
    """
    plan = Plan(
        stage=stage,
        config=config.model_dump(mode="json", exclude=_nested(not_in_plan)),
        inputs=inputs,
        num_shards=len(shards),
    )
    done = storage.start_or_resume(output, plan, replace=replace)
    set_aside: list[str] = []
    if isinstance(done, Manifest):
        missing = done.facts.get(SET_ASIDE, [])
        if len(missing) <= max_poison_shards:
            named = f"; set aside: {', '.join(missing)}" if missing else ""
            progress.say(f"{stage}: already done, nothing to do{named}")
            return done
        done = {record.name: record for record in done.shards}
    prepared = []
    if prepare is not None:
        if PREPARED not in done:
            record = prepare()
            assert record.name == PREPARED, record.name
            storage.mark_shard_done(output, record)
            done[PREPARED] = record
        prepared = [done.pop(PREPARED)]
    todo = [shard for shard in shards if shard.name not in done]
    if len(todo) < len(shards):
        progress.say(f"{stage}: {len(shards) - len(todo)} of {len(shards)} shards were done before, going on")
    if check is not None and done:
        check(list(done.values()))  # a stage that stopped at its last shard is not done because nothing is left to do
    measured: Counter[str] = Counter()
    work = functools.partial(_make_marking_worker, make_worker, output)
    with progress.bar(stage, total=sum(shard.num_items for shard in todo), unit=unit) as advance:
        results = runner.map(stage, work, todo, max_poison_shards=max_poison_shards)
        try:
            for shard, result in zip(todo, results, strict=True):
                if result is None:
                    set_aside.append(shard.name)
                    progress.say(f"{stage}: shard {shard.name} killed its worker every time and is set aside")
                    continue
                done[shard.name] = record = result
                measured.update(record.measured)
                num_items = shard.num_items or sum(file.rows for file in record.files)
                advance(num_items, note(measured) if note else "")
                if check is not None:
                    check(list(done.values()))
        finally:
            results.close()
    records = prepared + [done[shard.name] for shard in shards if shard.name not in set_aside]
    facts, own_record = finish(records) if finish else ({}, None)
    if set_aside:
        facts[SET_ASIDE] = set_aside
    if own_record is not None:
        records.append(own_record)
    manifest = Manifest(
        plan=plan,
        shards=tuple(records),
        totals=storage.sum_counts(record.totals for record in records),
        rejects=storage.sum_counts(record.rejects for record in records),
        facts=facts,
    )
    storage.write_manifest(output, manifest)
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


def _make_marking_worker(make_worker: Callable[[], Worker], output: str) -> Worker:
    worker = make_worker()

    def process(shard: Shard) -> ShardRecord:
        record = worker(shard)
        storage.mark_shard_done(output, record)  # by the worker: a driver that dies now costs nothing
        return record

    return process
