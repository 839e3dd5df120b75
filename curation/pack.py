"""Pack: the corpus as WebDataset shards, with an account of its composition.

    corpus/
      corpus-000000.tar  ...        the images (see images/corpus_tar.py)
      corpus-00000.parquet  ...     schemas.CORPUS: one row per sample of the tar of that number
      composition.json              the funnel, the rows of each seed dataset, the weight of each part
      manifest.json

An image is selected because its dataset is packed as it is, because a dataset retrieved it from the pool, or because it
was drawn by clustering; `reasons` lists every selection. By default an image is packed once, and a trainer should see
it in proportion to its `weight`. Each dataset that selected it adds a share (see quotas.dataset_weights), and `mix`
scales the shares of the parts of the corpus. With `repeats`, an image is packed once per reason, under the keys
`<image_id>`, `<image_id>_1`, ..., with weight 1. (DINOv2 packs repeats: its 142 million images include them.)

The samples are shuffled by seed, so that every tar is a random sample of the corpus.

Memory: the driver reads ingest and retrieve one file at a time. It writes a plan of the samples of each tar for the
workers; a few tars may share a file of the plan. Only arrays of numbers grow: 30 to 60 bytes per selected row, and 170
while equal images are identified (measured 2026-11-21 over 800,000 rows). A worker holds one file of the plan.
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
from curation.engine import command, progress
from curation.engine.manifest import Manifest, ShardRecord, require_fact, require_manifest, step_folder
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
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
from curation.run_folder import RunFolder, kept_images, kept_inputs, retrieved_tables
from curation.search.top_k import rank_in_groups, sort_into_groups
from curation.stage_command import stage_command

PARTS = ("seeds", "retrieval", "clustering")
PLAN_STEP = "tars"
# Maximum files of the plan; more tars share files. All files are open at once while the plan is written. Assumed: below
# the 256 open files that macOS allows a process by default.
MAX_PLAN_FILES = 200
# Maximum rows, and tables of rows, that wait in memory before they are written to these files. Assumed: about 100 MB.
WAITING_ROWS = 250_000
WAITING_TABLES = 1000
ID_BYTES = 32  # of an image_id


class MixConfig(Settings):
    """The share of each part in the weight of the corpus. Only the ratios matter."""

    seeds: float = Field(default=0.0, ge=0)
    """Share of the datasets that are packed as they are."""
    retrieval: float = Field(default=0.0, ge=0)
    """Share of the pool images that the datasets retrieved, by sample and by cluster."""
    clustering: float = Field(default=0.0, ge=0)
    """Share of the pool images that were drawn by clustering, independent of the seeds."""


class PackConfig(Settings):
    """The tars of the corpus, and the weights of its samples."""

    images_per_shard: int = Field(default=1000, ge=1)
    """Samples per tar."""
    repeats: bool = False
    """Whether an image is packed once per reason; otherwise once in all."""
    temperature: float = Field(default=1.0, ge=0, le=1)
    """Without repeats: a dataset's share of the weight of all datasets is proportional to its rows to this power; with
    0 all shares are equal."""
    dataset_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Instead of `temperature`: each dataset's share of the weight of all datasets. Only the ratios matter. Every
    dataset with rows in the corpus must be named."""
    mix: MixConfig | None = None
    """The share of each part in the weight of the corpus; when left out, the weights of its rows decide."""
    seed: int = 0
    """Seed of the order of the samples."""

    @model_validator(mode="after")
    def _check_weights(self) -> "PackConfig":
        if self.dataset_weights and self.temperature != 1:
            raise ValueError("dataset_weights and temperature both set the weight of a dataset; leave one out")
        if self.mix is not None and not any(getattr(self.mix, part) for part in PARTS):
            raise ValueError(f"mix gives no part a weight; the parts are {', '.join(PARTS)}")
        return self


@dataclass(frozen=True)
class Selection:
    """The content of the corpus: N images, B selectors, and R rows (an image and a selector), which make S samples."""

    selectors: tuple[tuple[str, str], ...]  # (B,) part and dataset: as is, then retrieval, then clustering
    modes: dict[str, str]  # retrieval mode of each dataset with retrieved rows
    num_seeds: dict[str, int]  # kept seed images of each dataset
    num_kept: int  # images that deduplication kept
    image_ids: np.ndarray  # (N,) bytes, sorted
    image: np.ndarray  # (R,) int64, into image_ids; rows of datasets as they are come first, then those of retrieve
    selector: np.ndarray  # (R,) int16, into selectors


def _nothing_to_pack(datasets: Sequence[DatasetConfig], dedup: Manifest) -> str:
    if not any(dataset.as_is for dataset in datasets):
        return "Nothing to pack: no dataset is packed as it is, and nothing was retrieved."
    return (
        "Nothing to pack: nothing was retrieved, and of the datasets that are packed as they are, dedup kept no seed. "
        f"Rows that dedup dropped: {dedup.totals.get('holdout', 0):,} for the holdout, {dedup.totals.get('near', 0):,} "
        "as copies. Compare the seeds with the holdout: images of the holdout never enter the corpus."
    )


@dataclass(frozen=True)
class TarPlan:
    """The location of the plan of one tar."""

    file_number: int  # of the two files that hold its samples and reasons
    start: int  # first position in the corpus
    stop: int  # position behind the last one


def run(
    config: PackConfig, inputs: RunFolder, output: str, runner: Runner, *, replace: bool = False, log: Log = None
) -> Manifest:
    """Pack the seeds of datasets that are packed as they are, and the retrieved images; returns the manifest."""
    stages = {
        name: require_manifest(folder)
        for name, folder in (("images", inputs.ingest), ("dedup", inputs.dedup), ("retrieved", inputs.retrieve))
    }
    dataset_rows = require_fact(inputs.retrieve, stages["retrieved"], "datasets")
    datasets = [DatasetConfig.model_validate(row, strict=False) for row in dataset_rows]
    with progress.step("corpus", "selecting and weighing the images"):
        selection = select(datasets, inputs)
        if not len(selection.image):
            raise InputError(_nothing_to_pack(datasets, stages["dedup"]))
        weight, selector_weight = weigh(config, selection)
        tars = plan_tars(config, selection)
    stage = Stage(
        name="pack",
        title="corpus",
        config=config,
        inputs={
            "datasets": hash_json([dataset.model_dump(mode="json") for dataset in datasets]),
            **kept_inputs(inputs),
            "retrieved": stages["retrieved"].content_hash,
        },
        output=output,
        shards=[Shard(f"{number:06d}", tar, tar.stop - tar.start) for number, tar in enumerate(tars)],
        make_worker=functools.partial(make_worker, output),
        prepare=functools.partial(_prepare, config, selection, weight, tars, inputs, output),
        finish=functools.partial(_finish, config, datasets, stages, selection, selector_weight, output),
    )
    return run_stage(stage, runner, replace=replace, log=log)


def make_worker(output: str) -> Callable[[Shard], ShardRecord]:
    """Make a worker that writes the tar and the table of each shard."""
    reader = ReferenceReader()

    def samples(rows: pa.Table) -> Iterator[CorpusSample]:
        for row in rows.to_pylist():
            data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"], row["layout"])
            sidecar = {name: row[name] for name in ("source", "uri", "width", "height", "label", "reasons")}
            yield CorpusSample(row["key"], data, row["format"], sidecar)
            report(1)

    def process(shard: Shard) -> ShardRecord:
        rows = read_plan(_plan_folder(output), shard.work)
        tar, byte_ranges = write_tar(paths.join(output, f"corpus-{shard.name}.tar"), samples(rows))
        reader.close()
        rows = rows.drop_columns(["offset", "length"])  # of the bytes in the source
        for name, column in (
            ("shard", pa.repeat(pa.scalar(tar.name), rows.num_rows)),
            ("offset", pa.array([byte_range.offset for byte_range in byte_ranges], pa.int64())),
            ("length", pa.array([byte_range.length for byte_range in byte_ranges], pa.int64())),
        ):
            rows = rows.append_column(name, column)
        table = rows.select(schemas.CORPUS.names).cast(schemas.CORPUS).combine_chunks()
        index = parquet.write_table(paths.join(output, f"corpus-{int(shard.name):05d}.parquet"), table)
        return ShardRecord(name=shard.name, files=(tar, index), totals={"rows": tar.rows, "bytes": tar.bytes})

    return process


# The selection and its weights


def select(datasets: Sequence[DatasetConfig], inputs: RunFolder) -> Selection:
    """Select the seeds of datasets as they are, and all retrieved images. Raises InputError for unknown datasets."""
    names = [dataset.name for dataset in datasets]
    name_set, is_as_is = pa.array(names, pa.string()), np.array([dataset.as_is for dataset in datasets], bool)
    ids, selectors = [np.empty(0, f"S{ID_BYTES}")], [np.empty(0, np.int16)]
    modes: dict[str, str] = {}
    num_seeds, num_kept = np.zeros(len(names), np.int64), 0
    for table in kept_images(inputs, ["image_id", "source", "role"]):
        num_kept += table.num_rows
        table = table.filter(pc.equal(table["role"], "seed"))
        dataset = pc.fill_null(pc.index_in(table["source"], name_set), -1).to_numpy()
        num_seeds += np.bincount(dataset[dataset >= 0], minlength=len(names))
        as_is_rows = np.flatnonzero(np.isin(dataset, np.flatnonzero(is_as_is)))
        ids.append(_checked_ids(table["image_id"].take(pa.array(as_is_rows))))
        selectors.append(dataset[as_is_rows].astype(np.int16))
    for table in retrieved_tables(inputs.retrieve):
        dataset = pc.fill_null(pc.index_in(table["seed_source"], name_set), -1).to_numpy()
        by_clustering = pc.is_null(table["seed_source"]).to_numpy()
        unknown = np.flatnonzero((dataset < 0) & ~by_clustering)
        if len(unknown):
            name = table["seed_source"][int(unknown[0])]
            raise InputError(f"'{inputs.retrieve}' holds rows of dataset '{name}', which its config does not name.")
        ids.append(_checked_ids(table["image_id"]))
        selectors.append(np.where(by_clustering, 2 * len(names), len(names) + dataset).astype(np.int16))
        pairs = table.filter(pc.is_valid(table["seed_source"])).group_by(["seed_source", "mode"]).aggregate([])
        modes |= {pair["seed_source"]: pair["mode"] for pair in pairs.to_pylist()}
    image_ids, image = np.unique(np.concatenate(ids), return_inverse=True)
    return Selection(
        selectors=(*(("seeds", name) for name in names), *(("retrieval", name) for name in names), ("clustering", "")),
        modes=modes,
        num_seeds=dict(zip(names, num_seeds.tolist(), strict=True)),
        num_kept=num_kept,
        image_ids=image_ids,
        image=image.astype(np.int64),
        selector=np.concatenate(selectors),
    )


def num_samples(config: PackConfig, selection: Selection) -> int:
    """The number of samples: one per image, or with repeats one per row."""
    return len(selection.image) if config.repeats else len(selection.image_ids)


def weigh(config: PackConfig, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each sample, (S,), and the sum of the weights of each selector's rows, (B,); both float64.

    Raises ConfigError for a mix or for dataset weights that do not fit the selection.
    """
    count = len(selection.selectors)
    if config.repeats:
        sample, selector = np.arange(len(selection.image)), selection.selector
    else:
        sample, selector = np.divmod(np.unique(selection.image * count + selection.selector), count)
    num_rows = np.bincount(selector, minlength=count)
    row_weight = _weight_per_row(config, selection.selectors, num_rows.tolist())
    weight = np.zeros(num_samples(config, selection))
    np.add.at(weight, sample, row_weight[selector])
    return weight, num_rows * row_weight


def _weight_per_row(config: PackConfig, selectors: Sequence[tuple[str, str]], num_rows: Sequence[int]) -> np.ndarray:
    """The weight of one row of each selector, (B,) float64, given the number of rows of each."""
    dataset_rows: dict[str, int] = {}
    for (part, name), count in zip(selectors, num_rows, strict=True):
        if part != "clustering":
            dataset_rows[name] = dataset_rows.get(name, 0) + count
    if config.dataset_weights:
        missing = [name for name, count in dataset_rows.items() if count and name not in config.dataset_weights]
        unknown = sorted(config.dataset_weights.keys() - dataset_rows.keys())
        if missing or unknown:
            problem = f"does not name '{missing[0]}', which has images" if missing else f"names '{unknown[0]}'"
            raise ConfigError(f"pack.dataset_weights {problem}; the datasets are {', '.join(dataset_rows)}.")
        of_dataset = row_weights(dataset_rows, config.dataset_weights)
    elif config.repeats:
        of_dataset = dict.fromkeys(dataset_rows, 1.0)
    else:
        of_dataset = dataset_weights(dataset_rows, config.temperature)
    row_weight = np.array([1.0 if part == "clustering" else of_dataset.get(name, 0.0) for part, name in selectors])
    if config.mix is None:
        return row_weight
    share: dict[str, float] = config.mix.model_dump()
    part_rows, part_weight = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    for (part, _), count, weight in zip(selectors, num_rows, row_weight.tolist(), strict=True):
        part_rows[part] += count
        part_weight[part] += count * weight
    for part in PARTS:
        if share[part] and not part_rows[part]:
            raise ConfigError(f"pack.mix gives '{part}' a weight of {share[part]:g}, but this part has no images.")
        if part_rows[part] and not share[part]:
            raise ConfigError(
                f"pack.mix gives '{part}' no weight, but this part has {part_rows[part]:,} rows. Give it a weight, or "
                "do not select them."
            )
    total_weight, total_share = sum(part_weight.values()), sum(share.values())
    scale = {part: share[part] / total_share * total_weight / part_weight[part] for part in PARTS if part_weight[part]}
    mixed: np.ndarray = row_weight * np.array([scale.get(part, 0.0) for part, _ in selectors])
    return mixed


# The plan: the samples of each tar


def plan_tars(config: PackConfig, selection: Selection, max_files: int = MAX_PLAN_FILES) -> list[TarPlan]:
    """The plan of each tar in a file of its own; above `max_files` tars, neighbouring tars share a file."""
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
    """Write the origin, the reasons and the `weight` (S,) of each sample of `tars`, for `read_plan`.

    Raises InputError for an image that was retrieved and not kept.
    """
    samples = _order_samples(config, selection)
    starts = [tar.start for n, tar in enumerate(tars) if n == 0 or tar.file_number > tars[n - 1].file_number]
    _write_samples(selection, samples, weight, starts, inputs, paths.join(folder, "samples"))
    row_position = samples.position if config.repeats else samples.position[selection.image]
    _write_reasons(selection, row_position, starts, inputs, paths.join(folder, "reasons"))


@dataclass(frozen=True)
class _Samples:
    """The S samples: one per image, or with repeats one per row."""

    image: np.ndarray  # (S,) int64, into Selection.image_ids
    repeat: np.ndarray  # (S,) int32: 0 for the first sample of an image, n for its n-th repeat
    position: np.ndarray  # (S,) int64, in the corpus
    by_image: np.ndarray  # (S,) int64: the samples in the order of their images
    first: np.ndarray  # (N + 1,) int64: where the samples of each image begin in `by_image`


def _order_samples(config: PackConfig, selection: Selection) -> _Samples:
    """Number the repeats of each image, and shuffle all samples."""
    num_images = len(selection.image_ids)
    image = selection.image if config.repeats else np.arange(num_images)
    by_image, first = sort_into_groups(image, num_images)
    repeat = np.empty(len(image), np.int32)
    repeat[by_image] = rank_in_groups(image[by_image])
    position = _shuffle(selection.image_ids, image, repeat, config.seed)
    return _Samples(image=image, repeat=repeat, position=position, by_image=by_image, first=first)


def _write_samples(
    selection: Selection,
    samples: _Samples,
    weight: np.ndarray,
    starts: Sequence[int],
    inputs: RunFolder,
    prefix: str,
) -> None:
    """Write PLANNED_SAMPLES to the files of `prefix` that begin at the positions `starts`."""
    num_images, first = len(selection.image_ids), samples.first
    is_kept = np.zeros(num_images, bool)
    with split_by_position(prefix, schemas.PLANNED_SAMPLES, starts) as write:
        for table in kept_images(inputs, schemas.IMAGES.names):
            ids = _checked_ids(table["image_id"])
            image_of_row = np.minimum(np.searchsorted(selection.image_ids, ids), num_images - 1)
            selected_rows = np.flatnonzero(selection.image_ids[image_of_row] == ids)
            image = image_of_row[selected_rows]
            if is_kept[image].any() or len(np.unique(image)) < len(image):
                raise InputError(f"'{inputs.dedup}' keeps an image twice: it was not made from this ingest.")
            is_kept[image] = True
            count = first[image + 1] - first[image]
            repeated = np.repeat(image, count)
            sample = samples.by_image[first[repeated] + rank_in_groups(repeated)]
            table = table.take(pa.array(np.repeat(selected_rows, count)))
            key = id_column(_keys(selection.image_ids[samples.image[sample]], samples.repeat[sample]))
            columns = {name: table[name] for name in table.column_names}
            columns |= {"position": samples.position[sample], "key": key, "weight": weight[sample]}
            write(pa.table({n: columns[n] for n in schemas.PLANNED_SAMPLES.names}, schema=schemas.PLANNED_SAMPLES))
    if not is_kept.all():
        missing = selection.image_ids[np.flatnonzero(~is_kept)[0]].decode()
        raise InputError(f"Image {missing} was retrieved, but not kept: these are not stages of one run.")


def _write_reasons(
    selection: Selection, row_position: np.ndarray, starts: Sequence[int], inputs: RunFolder, prefix: str
) -> None:
    """Write PLANNED_REASONS, given the position in the corpus of each row's sample, (R,) int64."""
    with split_by_position(prefix, schemas.PLANNED_REASONS, starts) as write:
        num_as_is = int((selection.selector < len(selection.num_seeds)).sum())
        as_is = pa.array([f"as_is:{name}" for name in selection.num_seeds], pa.string())
        for start in range(0, num_as_is, WAITING_ROWS):
            rows = slice(start, min(start + WAITING_ROWS, num_as_is))
            write(_reason_table(row_position[rows], as_is.take(pa.array(selection.selector[rows]))))
        start = num_as_is
        for table in retrieved_tables(inputs.retrieve):
            write(_reason_table(row_position[start : start + table.num_rows], _reasons_of_retrieved(table)))
            start += table.num_rows
        assert start == len(selection.image), (start, len(selection.image))


def read_plan(folder: str, plan: TarPlan) -> pa.Table:
    """The samples of one tar in order: the columns of schemas.PLANNED_SAMPLES, and `reasons`."""

    def read_rows(kind: str, schema: pa.Schema) -> pa.Table:
        table = parquet.read_table(paths.join(folder, f"{kind}-{plan.file_number:05d}.parquet"), schema)
        position = table["position"]
        table = table.filter(pc.and_(pc.greater_equal(position, plan.start), pc.less(position, plan.stop)))
        return table.take(pa.array(np.argsort(table["position"].to_numpy(), kind="stable")))

    samples, reasons = read_rows("samples", schemas.PLANNED_SAMPLES), read_rows("reasons", schemas.PLANNED_REASONS)
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
    with progress.step("corpus", "planning the tars"):
        write_plan(config, selection, weight, tars, inputs, _plan_folder(output))
    return ShardRecord(name=PREPARED)  # lists no files: the plan is deleted when the corpus is done


def _shuffle(image_ids: np.ndarray, image: np.ndarray, repeat: np.ndarray, seed: int) -> np.ndarray:
    """The position of each sample in the corpus, (S,) int64: samples are sorted by the SHA-256 of seed and key."""
    prefix = hashlib.sha256(f"{seed}:".encode())
    digests = np.empty((len(image), 2), np.uint64)  # the first 128 of the 256 bits decide
    for start in range(0, len(image), WAITING_ROWS):
        rows = slice(start, start + WAITING_ROWS)
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
    """The names of samples in their tars, bytes: `<image_id>`, or `<image_id>_n` for the n-th repeat."""
    if not repeat.any():
        return image_ids
    return np.where(repeat > 0, np.char.add(np.char.add(image_ids, b"_"), repeat.astype("S")), image_ids)


def _reasons_of_retrieved(table: pa.Table) -> pa.ChunkedArray:
    """The reason of each row of RETRIEVED: the mode, dataset, seed, rank and cluster, without those that are null.

    The rank is left out where there is no seed.
    """
    seed, rank = table["seed_image_id"], table["rank"].cast(pa.string())
    rank_of_seed = pc.if_else(pc.is_valid(seed), rank, pa.scalar(None, pa.string()))
    parts = (table["mode"], table["seed_source"], seed, rank_of_seed, table["cluster_id"].cast(pa.string()))
    return pc.binary_join_element_wise(*parts, ":", null_handling="skip")


def _reason_table(position: np.ndarray, reason: pa.Array) -> pa.Table:
    return pa.table({"position": position, "reason": reason}, schema=schemas.PLANNED_REASONS)


@contextlib.contextmanager
def split_by_position(prefix: str, schema: pa.Schema, starts: Sequence[int]) -> Iterator[Callable[[pa.Table], None]]:
    """A function that writes the rows of tables to files `<prefix>-<number>.parquet` by their `position`.

    `starts` are the first positions of the files, ascending. Within a file, rows stay in the order of writing.
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

        def write(table: pa.Table) -> None:
            waiting.append(table)
            if len(waiting) >= WAITING_TABLES or sum(part.num_rows for part in waiting) >= WAITING_ROWS:
                flush()

        yield write
        flush()


def _checked_ids(column: pa.ChunkedArray) -> np.ndarray:
    """image_ids as bytes, (N,). Raises InputError for one that is too long."""
    ids = id_bytes(column)
    if ids.itemsize > ID_BYTES:
        raise InputError(f"'{max(ids, key=len).decode()}' is not an image_id: it has more than {ID_BYTES} characters.")
    return ids.astype(f"S{ID_BYTES}")


# The composition


def _finish(
    config: PackConfig,
    datasets: Sequence[DatasetConfig],
    stages: dict[str, Manifest],
    selection: Selection,
    selector_weight: np.ndarray,
    output: str,
    records: Sequence[ShardRecord],
) -> tuple[dict[str, Any], ShardRecord]:
    composition = compose(config, datasets, stages, selection, selector_weight)
    text = json.dumps(composition, indent=1, ensure_ascii=False) + "\n"
    file = paths.write_bytes(paths.join(output, "composition.json"), text.encode())
    return {}, ShardRecord(name="composition", files=(file,))


def compose(
    config: PackConfig,
    datasets: Sequence[DatasetConfig],
    stages: dict[str, Manifest],
    selection: Selection,
    selector_weight: np.ndarray,
) -> dict[str, Any]:
    """The content of composition.json: the funnel, a row for each seed dataset, a row for each part, and totals.

    `selector_weight` (B,) is the sum of the weights of each selector's rows. The counts of the funnel after `rejected`
    are of seed and pool images; `holdout` is a count of its own.
    """
    ingest_totals, dedup_totals = stages["images"].totals, stages["dedup"].totals
    holdout = dedup_totals.get("holdout_rows", 0)
    candidates = ingest_totals["accepted"] - holdout
    after_exact = candidates - dedup_totals.get("exact", 0)
    after_near = after_exact - dedup_totals.get("near", 0)
    from_pool = selection.image[selection.selector >= len(datasets)]
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
        "parts": _part_rows(selection, selector_weight),
        "total_rows": num_samples(config, selection),
        "total_unique": len(selection.image_ids),
    }


def _dataset_rows(datasets: Sequence[DatasetConfig], selection: Selection) -> list[dict[str, Any]]:
    rows = np.bincount(selection.selector, minlength=len(selection.selectors)).tolist()
    dataset = np.append(np.tile(np.arange(len(datasets)), 2), len(datasets))  # of each selector; clustering has none
    unique = _count_unique(selection.image, dataset[selection.selector], len(datasets) + 1)
    result = []
    for number, dataset_config in enumerate(datasets):
        name, num_retrieved = dataset_config.name, rows[len(datasets) + number]
        mode = selection.modes.get(name, dataset_config.retrieval)
        result.append(
            {
                "dataset": name,
                "mode": mode,
                "as_is": dataset_config.as_is,
                "seeds": selection.num_seeds[name],
                "retrieved": num_retrieved,
                "cap": dataset_config.cap if mode in MODES and MODES[mode].is_capped else None,
                "rows": rows[number] + num_retrieved,
                "unique": unique[number],
            }
        )
    return result


def _part_rows(selection: Selection, selector_weight: np.ndarray) -> list[dict[str, Any]]:
    part = np.array([PARTS.index(name) for name, _ in selection.selectors])
    rows = np.bincount(part[selection.selector], minlength=len(PARTS)).tolist()
    unique = _count_unique(selection.image, part[selection.selector], len(PARTS))
    weight = np.bincount(part, weights=selector_weight, minlength=len(PARTS))
    return [
        {"part": name, "rows": rows[n], "unique": unique[n], "share_of_weight": float(weight[n] / weight.sum())}
        for n, name in enumerate(PARTS)
        if rows[n]
    ]


def _count_unique(image: np.ndarray, group: np.ndarray, num_groups: int) -> list[int]:
    """The number of different images in each group."""
    counts: list[int] = np.bincount(np.unique(image * num_groups + group) % num_groups, minlength=num_groups).tolist()
    return counts


command_line = stage_command("pack", PackConfig, run, "Write the corpus.", reads=("ingest", "dedup", "retrieve"))


if __name__ == "__main__":
    from curation import pack  # by its real name, or its classes would exist twice

    command.main(pack.command_line)
