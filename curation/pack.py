"""Pack: the corpus as WebDataset shards, and the account of what it is made of.

    corpus/
      corpus-000000.tar  ...        the images (see corpus.py)
      corpus-00000.parquet  ...     records.CORPUS: one row per sample of the tar of that number
      composition.json              the funnel, what each seed dataset brought, the weight of each part
      manifest.json

An image is here because a dataset is taken as it is, because a seed image or a cluster brought it, or because it was
drawn by clustering; `reasons` lists all of these. By default it is packed once, and `weight` says how often a trainer
should see it relative to others: each dataset that brought it adds its share (see balance.dataset_weights), and `mix`
scales these so that the parts of the corpus weigh what they should. With `repeats` (the paper's way, whose 142 million
count them) it is packed once for each reason, under keys `<image_id>`, `<image_id>_1`, ..., with weight 1.

Samples are shuffled by seed, so that every tar is a sample of the whole.

Memory: the driver reads ingest and retrieve one file at a time and writes for each tar, or for each few tars, what its
worker is to pack. What grows are arrays of numbers: 30 to 60 bytes for each row that was brought, and 170 while equal
images are found among them (measured 2026-11-21 over 800,000 rows). A worker holds the plan of the tars that share a
file.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from curation.config import Settings
from curation.engine import command
from curation.engine.manifest import Manifest, ShardRecord, require_manifest, step_folder
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import ConfigError, InputError
from curation.files import parquet, paths, schemas
from curation.files.hashes import hash_json
from curation.files.image_ids import id_bytes, id_column
from curation.images.corpus_tar import CorpusSample, write_tar
from curation.images.sources import ReferenceReader
from curation.quotas import dataset_weights, row_weights
from curation.retrieval_modes import MODES
from curation.retrieve import DatasetConfig
from curation.run_folder import RunFolder, kept_images, retrieved_tables
from curation.search.top_k import rank_in_groups, sort_into_groups
from curation.stage_command import stage_command

PARTS = ("seeds", "retrieval", "clustering")
PLAN_STEP = "tars"
# Files that hold the plan. All are open at once while it is written; more tars than this share files. Assumed: below
# the 256 open files that macOS allows a process by default.
MAX_PLAN_FILES = 200
# Rows, and tables of them, that are gathered before they are dealt out to these files. Assumed: about 100 MB.
DEALT_ROWS = 250_000
DEALT_TABLES = 1000
ID_BYTES = 32  # an image_id's


class MixConfig(Settings):
    """The share of all weight that each part of the corpus has. Only their ratios matter."""

    seeds: float = Field(default=0.0, ge=0)
    """Of the datasets that are taken as they are."""
    retrieval: float = Field(default=0.0, ge=0)
    """Of what the seeds found in the pool, by sample and by cluster."""
    clustering: float = Field(default=0.0, ge=0)
    """Of what was drawn from the pool's clusters, whatever the seeds."""


class PackConfig(Settings):
    """What the corpus holds and how it is cut."""

    images_per_shard: int = Field(default=1000, ge=1)
    """Samples per tar."""
    repeats: bool = False
    """Whether an image that several datasets or seeds brought is packed as often."""
    temperature: float = Field(default=1.0, ge=0, le=1)
    """Without repeats: a dataset's share of the datasets' weight goes as its rows to this power; 0 gives all the same
    share."""
    dataset_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Instead of `temperature`: each dataset's share of the datasets' weight. Only their ratios matter; every dataset
    that brings images is named."""
    mix: MixConfig | None = None
    """Instead of letting every part weigh what its rows weigh: its share of all weight."""
    seed: int = 0
    """Of the order of samples."""

    @model_validator(mode="after")
    def _one_way_to_weigh(self) -> "PackConfig":
        if self.dataset_weights and self.temperature != 1:
            raise ValueError("dataset_weights and temperature both say what a dataset weighs; leave one out")
        if self.mix is not None and not any(getattr(self.mix, part) for part in PARTS):
            raise ValueError(f"mix gives no part a weight; the parts are {', '.join(PARTS)}")
        return self


@dataclass(frozen=True)
class Selection:
    """What is packed and what brought it: N images, R rows (an image and what brought it), B things that bring."""

    bringers: tuple[tuple[str, str], ...]  # (B,) part and dataset: datasets as they are, what each found, clustering
    modes: dict[str, str]  # how each dataset that found something searched
    num_seeds: dict[str, int]  # kept seed images of each dataset
    num_kept: int  # images that deduplication kept
    image_ids: np.ndarray  # (N,) bytes, sorted
    image: np.ndarray  # (R,) int64, into image_ids; rows of datasets as they are come first, then those of retrieve
    bringer: np.ndarray  # (R,) int16, into bringers


@dataclass(frozen=True)
class TarPlan:
    """Where the plan of one tar lies: a pair of files, and the positions in the corpus that are its own."""

    number: int
    start: int
    stop: int


def run(
    config: PackConfig, inputs: RunFolder, output: str, runner: Runner, *, replace: bool = False, log: Log = None
) -> Manifest:
    """Pack what the datasets of the finished retrieve bring as they are and what it found; returns the manifest."""
    stages = {
        name: require_manifest(folder)
        for name, folder in (("images", inputs.ingest), ("dedup", inputs.dedup), ("retrieved", inputs.retrieve))
    }
    datasets = [DatasetConfig.model_validate(row, strict=False) for row in stages["retrieved"].facts["datasets"]]
    selection = select(datasets, inputs)
    if not len(selection.image):
        raise InputError("Nothing to pack: no dataset is taken as it is, and nothing was retrieved.")
    weight, mass = weigh(config, selection)
    tars = plan_tars(config, selection)
    stage = Stage(
        name="pack",
        config=config,
        inputs={
            "datasets": hash_json([dataset.model_dump(mode="json") for dataset in datasets]),
            **{name: manifest.content_hash for name, manifest in stages.items()},
        },
        output=output,
        shards=[Shard(f"{number:06d}", tar, tar.stop - tar.start) for number, tar in enumerate(tars)],
        make_worker=functools.partial(make_worker, output),
        prepare=functools.partial(_prepare, config, selection, weight, tars, inputs, output),
        finish=functools.partial(_finish, config, datasets, stages, selection, mass, output),
    )
    return run_stage(stage, runner, replace=replace, log=log)


def make_worker(output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that writes one tar after another."""
    reader = ReferenceReader()

    def samples(rows: pa.Table) -> Iterator[CorpusSample]:
        for row in rows.to_pylist():
            data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"])
            sidecar = {name: row[name] for name in ("source", "uri", "width", "height", "label", "reasons")}
            yield CorpusSample(row["key"], data, row["format"], sidecar)

    def process(shard: Shard) -> ShardRecord:
        rows = read_plan(_plan_folder(output), shard.work)
        tar, places = write_tar(paths.join(output, f"corpus-{shard.name}.tar"), samples(rows))
        reader.close()
        rows = rows.drop_columns(["offset", "length"])  # those in the source
        for name, column in (
            ("shard", pa.repeat(pa.scalar(tar.name), rows.num_rows)),
            ("offset", pa.array([place.offset for place in places], pa.int64())),
            ("length", pa.array([place.length for place in places], pa.int64())),
        ):
            rows = rows.append_column(name, column)
        table = rows.select(schemas.CORPUS.names).cast(schemas.CORPUS).combine_chunks()
        index = parquet.write_table(paths.join(output, f"corpus-{int(shard.name):05d}.parquet"), table)
        return ShardRecord(name=shard.name, files=(tar, index), totals={"rows": tar.rows, "bytes": tar.bytes})

    return process


# What is packed


def select(datasets: Sequence[DatasetConfig], inputs: RunFolder) -> Selection:
    """What the datasets bring as they are, and what was retrieved. Raises InputError for rows of another dataset."""
    names = [dataset.name for dataset in datasets]
    name_set, is_as_is = pa.array(names, pa.string()), np.array([dataset.as_is for dataset in datasets], bool)
    ids, bringers = [np.empty(0, f"S{ID_BYTES}")], [np.empty(0, np.int16)]
    modes: dict[str, str] = {}
    num_seeds, num_kept = np.zeros(len(names), np.int64), 0
    for table in kept_images(inputs, ["image_id", "source", "role"]):
        num_kept += table.num_rows
        table = table.filter(pc.equal(table["role"], "seed"))
        dataset = pc.fill_null(pc.index_in(table["source"], name_set), -1).to_numpy()
        num_seeds += np.bincount(dataset[dataset >= 0], minlength=len(names))
        own = np.flatnonzero(np.isin(dataset, np.flatnonzero(is_as_is)))
        ids.append(_ids(table["image_id"].take(pa.array(own))))
        bringers.append(dataset[own].astype(np.int16))
    for table in retrieved_tables(inputs.retrieve):
        dataset = pc.fill_null(pc.index_in(table["seed_source"], name_set), -1).to_numpy()
        by_clustering = pc.is_null(table["seed_source"]).to_numpy()
        unknown = np.flatnonzero((dataset < 0) & ~by_clustering)
        if len(unknown):
            name = table["seed_source"][int(unknown[0])]
            raise InputError(f"'{inputs.retrieve}' holds rows of dataset '{name}', which its config does not name.")
        ids.append(_ids(table["image_id"]))
        bringers.append(np.where(by_clustering, 2 * len(names), len(names) + dataset).astype(np.int16))
        asked = table.filter(pc.is_valid(table["seed_source"])).group_by(["seed_source", "mode"]).aggregate([])
        modes |= {row["seed_source"]: row["mode"] for row in asked.to_pylist()}
    image_ids, image = np.unique(np.concatenate(ids), return_inverse=True)
    return Selection(
        bringers=(*(("seeds", name) for name in names), *(("retrieval", name) for name in names), ("clustering", "")),
        modes=modes,
        num_seeds=dict(zip(names, num_seeds.tolist(), strict=True)),
        num_kept=num_kept,
        image_ids=image_ids,
        image=image.astype(np.int64),
        bringer=np.concatenate(bringers),
    )


def num_samples(config: PackConfig, selection: Selection) -> int:
    """How many samples are packed: one for each image, or with repeats for each row."""
    return len(selection.image) if config.repeats else len(selection.image_ids)


def weigh(config: PackConfig, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    """What each sample weighs, and what each bringer's rows weigh together: (S,) and (B,) float64.

    Raises ConfigError for a mix of parts, or for weights of datasets, that does not fit what there is.
    """
    count = len(selection.bringers)
    if config.repeats:
        sample, bringer = np.arange(len(selection.image)), selection.bringer
    else:
        sample, bringer = np.divmod(np.unique(selection.image * count + selection.bringer), count)
    rows = np.bincount(bringer, minlength=count)
    each = _weight_of_each(config, selection.bringers, rows.tolist())
    weight = np.zeros(num_samples(config, selection))
    np.add.at(weight, sample, each[bringer])
    return weight, rows * each


def _weight_of_each(config: PackConfig, bringers: Sequence[tuple[str, str]], rows: Sequence[int]) -> np.ndarray:
    """The weight of one row of each bringer, (B,) float64, given their numbers of rows."""
    dataset_rows: dict[str, int] = {}
    for (part, name), count in zip(bringers, rows, strict=True):
        if part != "clustering":
            dataset_rows[name] = dataset_rows.get(name, 0) + count
    if config.dataset_weights:
        missing = [name for name, count in dataset_rows.items() if count and name not in config.dataset_weights]
        strangers = sorted(config.dataset_weights.keys() - dataset_rows.keys())
        if missing or strangers:
            what = f"does not name '{missing[0]}', which brings images" if missing else f"names '{strangers[0]}'"
            raise ConfigError(f"pack.dataset_weights {what}; the datasets are {', '.join(dataset_rows)}.")
        of_dataset = row_weights(dataset_rows, config.dataset_weights)
    elif config.repeats:
        of_dataset = dict.fromkeys(dataset_rows, 1.0)
    else:
        of_dataset = dataset_weights(dataset_rows, config.temperature)
    each = np.array([1.0 if part == "clustering" else of_dataset.get(name, 0.0) for part, name in bringers])
    if config.mix is None:
        return each
    share: dict[str, float] = config.mix.model_dump()
    part_rows, mass = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    for (part, _), count, weight in zip(bringers, rows, each.tolist(), strict=True):
        part_rows[part] += count
        mass[part] += count * weight
    for part in PARTS:
        if share[part] and not part_rows[part]:
            raise ConfigError(f"pack.mix gives '{part}' a weight of {share[part]:g}, but no image came that way.")
        if part_rows[part] and not share[part]:
            raise ConfigError(
                f"pack.mix gives '{part}' no weight, but {part_rows[part]:,} rows came that way. Give it one, or do "
                "not draw them."
            )
    whole, shares = sum(mass.values()), sum(share.values())
    scale = {part: share[part] / shares * whole / mass[part] for part in PARTS if mass[part]}
    mixed: np.ndarray = each * np.array([scale.get(part, 0.0) for part, _ in bringers])
    return mixed


# The plan: what each tar holds


def plan_tars(config: PackConfig, selection: Selection, max_files: int = MAX_PLAN_FILES) -> list[TarPlan]:
    """Where the plan of each tar lies: in a file of its own, or where there are many tars, with its neighbours'."""
    total, step = num_samples(config, selection), config.images_per_shard
    tars_per_file = -(-total // (step * max_files))
    return [
        TarPlan(number // tars_per_file, start, min(start + step, total))
        for number, start in enumerate(range(0, total, step))
    ]


def write_plan(
    config: PackConfig,
    selection: Selection,
    weight: np.ndarray,
    tars: Sequence[TarPlan],
    inputs: RunFolder,
    folder: str,
) -> None:
    """Write where each sample of `tars` comes from, why it is here and its `weight` (S,), for `read_plan`.

    Raises InputError for an image that was retrieved and not kept.
    """
    num_images, num_rows = len(selection.image_ids), len(selection.image)
    total = num_samples(config, selection)
    starts = [tar.start for n, tar in enumerate(tars) if n == 0 or tar.number > tars[n - 1].number]  # of each file
    image_of = selection.image if config.repeats else np.arange(num_images)  # of each sample
    by_image, first = sort_into_groups(image_of, num_images)
    repeat = np.empty(total, np.int32)
    repeat[by_image] = rank_in_groups(image_of[by_image])
    position = _shuffle(selection.image_ids, image_of, repeat, config.seed)

    found = np.zeros(num_images, bool)
    with dealing(paths.join(folder, "samples"), schemas.PLANNED_SAMPLES, starts) as deal:
        for table in kept_images(inputs, schemas.IMAGES.names):
            ids = _ids(table["image_id"])
            place = np.minimum(np.searchsorted(selection.image_ids, ids), num_images - 1)
            here = np.flatnonzero(selection.image_ids[place] == ids)
            image = place[here]
            if found[image].any() or len(np.unique(image)) < len(image):
                raise InputError(f"'{inputs.dedup}' keeps an image twice: it is not of this ingest.")
            found[image] = True
            count = first[image + 1] - first[image]
            repeated = np.repeat(image, count)
            sample = by_image[first[repeated] + rank_in_groups(repeated)]
            table = table.take(pa.array(np.repeat(here, count)))
            key = id_column(_keys(selection.image_ids[image_of[sample]], repeat[sample]))
            columns = {name: table[name] for name in table.column_names}
            columns |= {"position": position[sample], "key": key, "weight": weight[sample]}
            deal(pa.table({n: columns[n] for n in schemas.PLANNED_SAMPLES.names}, schema=schemas.PLANNED_SAMPLES))
    if not found.all():
        lost = selection.image_ids[np.flatnonzero(~found)[0]].decode()
        raise InputError(f"Image {lost} was retrieved, but not kept: these are not stages of one run.")

    position_of_row = position if config.repeats else position[selection.image]
    with dealing(paths.join(folder, "reasons"), schemas.PLANNED_REASONS, starts) as deal:
        num_as_is = int((selection.bringer < len(selection.num_seeds)).sum())
        as_is = pa.array([f"as_is:{name}" for name in selection.num_seeds], pa.string())
        for start in range(0, num_as_is, DEALT_ROWS):
            rows = slice(start, min(start + DEALT_ROWS, num_as_is))
            deal(_reasons(position_of_row[rows], as_is.take(pa.array(selection.bringer[rows]))))
        start = num_as_is
        for table in retrieved_tables(inputs.retrieve):
            deal(_reasons(position_of_row[start : start + table.num_rows], _reason(table)))
            start += table.num_rows
        assert start == num_rows, (start, num_rows)


def read_plan(folder: str, plan: TarPlan) -> pa.Table:
    """The samples of one tar in order: the columns of records.PLANNED_SAMPLES, and `reasons`."""

    def own(kind: str, schema: pa.Schema) -> pa.Table:
        table = parquet.read_table(paths.join(folder, f"{kind}-{plan.number:05d}.parquet"), schema)
        position = table["position"]
        table = table.filter(pc.and_(pc.greater_equal(position, plan.start), pc.less(position, plan.stop)))
        return table.take(pa.array(np.argsort(table["position"].to_numpy(), kind="stable")))

    samples, reasons = own("samples", schemas.PLANNED_SAMPLES), own("reasons", schemas.PLANNED_REASONS)
    positions = np.arange(plan.start, plan.stop)
    assert np.array_equal(samples["position"].to_numpy(), positions), (plan, samples.num_rows)
    offsets = np.searchsorted(reasons["position"].to_numpy(), np.append(positions, plan.stop))
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), reasons["reason"].combine_chunks())
    return samples.append_column("reasons", lists)


def _plan_folder(output: str) -> str:
    return step_folder(output, PLAN_STEP)


def _prepare(
    config: PackConfig,
    selection: Selection,
    weight: np.ndarray,
    tars: Sequence[TarPlan],
    inputs: RunFolder,
    output: str,
) -> ShardRecord:
    write_plan(config, selection, weight, tars, inputs, _plan_folder(output))
    return ShardRecord(name=PREPARED)  # the plan is gone when the corpus is done


def _shuffle(image_ids: np.ndarray, image: np.ndarray, repeat: np.ndarray, seed: int) -> np.ndarray:
    """The place of each sample in the corpus, (S,) int64: they stand in the order of the SHA-256 of seed and key."""
    prefix = hashlib.sha256(f"{seed}:".encode())
    digests = np.empty((len(image), 2), np.uint64)  # of 256 bits the first 128 decide
    for start in range(0, len(image), DEALT_ROWS):
        rows = slice(start, start + DEALT_ROWS)
        parts = []
        for key in _keys(image_ids[image[rows]], repeat[rows]).tolist():
            digest = prefix.copy()
            digest.update(key)
            parts.append(digest.digest()[:16])
        digests[rows] = np.frombuffer(b"".join(parts), ">u8").reshape(-1, 2)
    position = np.empty(len(image), np.int64)
    position[np.lexsort((digests[:, 1], digests[:, 0]))] = np.arange(len(image))
    return position


def _keys(image_ids: np.ndarray, repeat: np.ndarray) -> np.ndarray:
    """The names of samples in their tars, bytes: the image_id, for the n-th repeat with `_n` behind it."""
    if not repeat.any():
        return image_ids
    return np.where(repeat > 0, np.char.add(np.char.add(image_ids, b"_"), repeat.astype("S")), image_ids)


def _reason(table: pa.Table) -> pa.ChunkedArray:
    """The reason of each row of RETRIEVED: its mode, then whatever retrieved it, as far as the row names it."""
    seed, rank = table["seed_image_id"], table["rank"].cast(pa.string())
    rank_of_seed = pc.if_else(pc.is_valid(seed), rank, pa.scalar(None, pa.string()))
    parts = (table["mode"], table["seed_source"], seed, rank_of_seed, table["cluster_id"].cast(pa.string()))
    return pc.binary_join_element_wise(*parts, ":", null_handling="skip")


def _reasons(position: np.ndarray, reason: pa.Array) -> pa.Table:
    return pa.table({"position": position, "reason": reason}, schema=schemas.PLANNED_REASONS)


@contextlib.contextmanager
def dealing(prefix: str, schema: pa.Schema, starts: Sequence[int]) -> Iterator[Callable[[pa.Table], None]]:
    """A function that deals the rows of tables out to files `<prefix>-<number>.parquet` by their position.

    `starts` are the first positions of the files, ascending. A file's rows stay in the order in which they came.
    """
    waiting: list[pa.Table] = []
    with contextlib.ExitStack() as stack:
        writers = []
        for number in range(len(starts)):
            file = stack.enter_context(paths.atomic_write(f"{prefix}-{number:05d}.parquet"))
            sink = pa.PythonFile(file, mode="w")
            writers.append(stack.enter_context(pq.ParquetWriter(sink, schema, compression="zstd")))

        def flush() -> None:
            table = pa.concat_tables([schema.empty_table(), *waiting])
            waiting.clear()
            number = np.searchsorted(starts, table["position"].to_numpy(), side="right") - 1
            order, bounds = sort_into_groups(number, len(starts))
            table = table.take(pa.array(order))
            for writer, start, stop in zip(writers, bounds[:-1], bounds[1:], strict=True):
                if stop > start:
                    writer.write_table(table.slice(start, stop - start))

        def deal(table: pa.Table) -> None:
            waiting.append(table)
            if len(waiting) >= DEALT_TABLES or sum(part.num_rows for part in waiting) >= DEALT_ROWS:
                flush()

        yield deal
        flush()


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    """image_ids as bytes, (N,)."""
    ids = id_bytes(column)
    if ids.itemsize > ID_BYTES:
        raise InputError(f"'{max(ids, key=len).decode()}' is no image_id: it is longer than {ID_BYTES} characters.")
    return ids.astype(f"S{ID_BYTES}")


# The account


def _finish(
    config: PackConfig,
    datasets: Sequence[DatasetConfig],
    stages: dict[str, Manifest],
    selection: Selection,
    mass: np.ndarray,
    output: str,
    done: Sequence[ShardRecord],
) -> tuple[dict[str, Any], ShardRecord]:
    composition = compose(config, datasets, stages, selection, mass)
    text = json.dumps(composition, indent=1, ensure_ascii=False) + "\n"
    file = paths.write_bytes(paths.join(output, "composition.json"), text.encode())
    return {}, ShardRecord(name="composition", files=(file,))


def compose(
    config: PackConfig,
    datasets: Sequence[DatasetConfig],
    stages: dict[str, Manifest],
    selection: Selection,
    mass: np.ndarray,
) -> dict[str, Any]:
    """The content of composition.json: the funnel, a row for each seed dataset, one for each part, totals.

    `mass` (B,) is what each bringer's rows weigh together. Every count of the funnel after `rejected` is of seed and
    pool images; the holdout is counted apart.
    """
    ingest_totals, dedup_totals = stages["images"].totals, stages["dedup"].totals
    holdout = dedup_totals.get("holdout_rows", 0)
    candidates = ingest_totals["accepted"] - holdout
    after_exact = candidates - dedup_totals.get("exact", 0)
    after_near = after_exact - dedup_totals.get("near", 0)
    from_pool = selection.image[selection.bringer >= len(datasets)]
    return {
        "funnel": {
            "ingested": ingest_totals["images"],
            "rejected": dict(stages["images"].rejects),
            "holdout": holdout,
            "candidates": candidates,
            "after_exact": after_exact,
            "after_near_duplicates": after_near,
            "after_decontamination": selection.num_kept,
            "retrieved": len(np.unique(from_pool)),
            "packed": num_samples(config, selection),
        },
        "datasets": _dataset_rows(datasets, selection),
        "parts": _part_rows(selection, mass),
        "total_rows": num_samples(config, selection),
        "total_unique": len(selection.image_ids),
    }


def _dataset_rows(datasets: Sequence[DatasetConfig], selection: Selection) -> list[dict[str, Any]]:
    rows = np.bincount(selection.bringer, minlength=len(selection.bringers)).tolist()
    dataset = np.append(np.tile(np.arange(len(datasets)), 2), len(datasets))  # of each bringer; the last is none
    unique = _unique_by(selection.image, dataset[selection.bringer], len(datasets) + 1)
    result = []
    for number, dataset_config in enumerate(datasets):
        name, found = dataset_config.name, rows[len(datasets) + number]
        mode = selection.modes.get(name, dataset_config.retrieval)
        result.append(
            {
                "dataset": name,
                "mode": mode,
                "as_is": dataset_config.as_is,
                "seeds": selection.num_seeds[name],
                "retrieved": found,
                "cap": dataset_config.cap if mode in MODES and MODES[mode].is_capped else None,
                "rows": rows[number] + found,
                "unique": unique[number],
            }
        )
    return result


def _part_rows(selection: Selection, mass: np.ndarray) -> list[dict[str, Any]]:
    part = np.array([PARTS.index(name) for name, _ in selection.bringers])
    rows = np.bincount(part[selection.bringer], minlength=len(PARTS)).tolist()
    unique = _unique_by(selection.image, part[selection.bringer], len(PARTS))
    weight = np.bincount(part, weights=mass, minlength=len(PARTS))
    return [
        {"part": name, "rows": rows[n], "unique": unique[n], "share_of_weight": float(weight[n] / weight.sum())}
        for n, name in enumerate(PARTS)
        if rows[n]
    ]


def _unique_by(image: np.ndarray, group: np.ndarray, num_groups: int) -> list[int]:
    """How many different images each group has."""
    counts: list[int] = np.bincount(np.unique(image * num_groups + group) % num_groups, minlength=num_groups).tolist()
    return counts


command_line = stage_command("pack", PackConfig, run, "Write the corpus.", reads=("ingest", "dedup", "retrieve"))


if __name__ == "__main__":
    from curation import pack  # by its real name, or its classes would exist twice

    command.main(pack.command_line)
