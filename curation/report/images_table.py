"""The table of images: one row for each unique image of a run, with the results of all stages.

    images/
      images-00000.parquet  ...     schemas.IMAGES_TABLE: one file for each shard of ingest
      manifest.json

`image_id` occurs once in all files together. Other tables have a row for each file that a source holds, so an image
with exact copies has several rows there. Here it has one:

    place           in the file of the ingest shard that lists the image first, in the order of ingest
    source, role,   of the row that ingest lists first
    uri, label
    sources         the sources of all its rows, each once, in the order of ingest
    num_rows        the number of its rows in ingest
    kept            whether dedup keeps one of its rows
    reason          of a dropped image the reason that is not `exact`: dedup gives it to one of the rows, and `exact` to
                    the others. Of a kept image null, or `corpus_copy`: retrieve passed it over as a copy
    matched_...     the image for which this one was dropped or passed over; null for others. For an image that the
                    holdout itself holds, it is the image itself
    cluster_id      on level 0; null unless the kept row has role pool
    corpus_key      `image_id`; null for an image that is not in the corpus
    reasons         all reasons of its samples, in the order of their keys; empty for an image not in the corpus
    weight          the sum over its samples; null for an image that is not in the corpus
    x, y            its place on the two axes of greatest variance of the content vectors, with the mean at 0; both are
                    0 where all vectors are equal (principal_axes.py). The axes are fitted to all images, or to a
                    sample by image_id of about MAX_FITTED. An image of several shards counts once for each.
    thumbnail_...   a file of the describe stage, relative to the folder of the run, and the row in it; null where that
                    stage wrote no thumbnails

The driver finds the first row of each image. Its arrays lie on disk (files/disk_arrays.py): 32 bytes for each row of
ingest and of the corpus. Memory holds one bucket of them. The driver reads the ids of ingest and the corpus tables
twice, and then writes a plan for the workers: the copies, and the samples of the corpus by image. Measured 2026-11-29
on one core with 300,000 rows: 2 microseconds a row. A worker holds one shard of ingest and one file of the plan. For
the axes, the driver reads the vectors of about MAX_FITTED images; memory holds the covariance (D, D) and one shard.
"""

import functools
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.config import Settings
from curation.engine.manifest import Manifest, ShardRecord, require_manifest, step_folder
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import InputError
from curation.files import npy, parquet, paths, schemas, vectors
from curation.files.disk_arrays import Buckets, blocks, on_disk
from curation.files.image_ids import bucket_of, id_bytes, pack_ids, unpack_ids
from curation.files.paths import RecordedPath
from curation.pack import MAX_PLAN_FILES, split_by_position
from curation.report import principal_axes
from curation.report.principal_axes import Axes
from curation.run_folder import RunFolder, corpus_tables, kept_shards, require_same_ingest
from curation.search.top_k import starts_group, top_k_of_groups

PLAN_STEP, SAMPLE_STEP = "plan", "sample"
AXES_NAME = "axes.npy"
# Images that the axes are fitted to, about: a larger run is sampled. Assumed: enough for two axes, and a minute of work
# for the driver at 1,280 dimensions.
MAX_FITTED = 200_000
# Rows in a bucket: about 100 MB of memory while it is sorted. Ids are hashes, so buckets have about equal sizes.
# Assumed.
ROWS_PER_BUCKET = 1 << 20
_ROW = np.dtype([("image_id", "S16"), ("row", np.int64)])
_DECISION = ["image_id", "component_id", "kept", "reason", "matched_image_id"]
_OF_FIRST_ROW = ["image_id", "source", "role", "uri", "label", "width", "height", "format"]


@dataclass(frozen=True)
class Part:
    """The files of one shard of ingest in all stages, and its rows."""

    images: RecordedPath
    duplicates: RecordedPath
    vectors: RecordedPath
    assignments: RecordedPath
    thumbnails: RecordedPath | None
    start: int  # its first row among all rows of ingest
    stop: int  # the row behind its last one
    file_number: int  # of the files of the plan


def run(inputs: RunFolder, output: str, runner: Runner, *, replace: bool = False, log: Log = None) -> Manifest:
    """Write the table of a run whose other stages are done; returns the manifest. There is nothing to configure.

    Raises InputError for a stage that is not done, and for stages of several runs.
    """
    retrieved = require_manifest(inputs.retrieve)
    copies = next(iter(retrieved.paths(inputs.retrieve, "copies")), None)
    folders = {
        "images": inputs.ingest,
        "vectors": inputs.embed,
        "descriptors": inputs.describe,
        "dedup": inputs.dedup,
        "clusters": inputs.cluster,
        "corpus": inputs.corpus,
    }
    manifests = {name: require_manifest(folder) for name, folder in folders.items()}
    for name in ("descriptors", "clusters", "corpus"):  # kept_shards checks the others
        require_same_ingest(folders[name], manifests[name], inputs.ingest, manifests["images"])
    parts = _parts(inputs, manifests)
    shards = [Shard(_shard_name(part.images), part, part.stop - part.start) for part in parts]
    stage = Stage(
        name="images",
        config=Settings(),
        inputs={name: manifest.content_hash for name, manifest in manifests.items()}
        | {"retrieved": retrieved.content_hash},
        output=output,
        shards=shards,
        make_worker=functools.partial(make_worker, output, copies),
        prepare=functools.partial(_prepare, parts, inputs, output, runner, log),
    )
    return run_stage(stage, runner, replace=replace, log=log)


def _parts(inputs: RunFolder, manifests: dict[str, Manifest]) -> list[Part]:
    kept = kept_shards(inputs)
    assignments = manifests["clusters"].paths(inputs.cluster, "assignments")
    thumbnails: Sequence[RecordedPath | None] = manifests["descriptors"].paths(inputs.describe, "thumbnails")
    parts, start, per_file = [], 0, -(-len(kept) // MAX_PLAN_FILES)
    counts = [record.totals["accepted"] for record in manifests["images"].shards]
    files = zip(kept, assignments, thumbnails or [None] * len(kept), counts, strict=True)
    for number, (shard, assigned, small, count) in enumerate(files):
        of_shard = (shard.images, shard.duplicates, shard.vectors, assigned, small)
        parts.append(Part(*of_shard, start, start + count, number // per_file))
        start += count
    return parts


def _shard_name(images: str) -> str:
    return posixpath.basename(images).removeprefix("images-").removesuffix(".parquet")


# The workers


@dataclass(frozen=True)
class _Plan:
    """The rows of the plan for one part; see schemas."""

    repeated: pa.Table
    copies: pa.Table
    packed: pa.Table


def make_worker(output: str, copies: RecordedPath | None) -> Callable[[Shard], ShardRecord]:
    """A worker that writes the rows of the images that each shard of ingest lists first.

    copies: the file of the images that retrieve passed over, about 100 bytes of memory each; None without its check.
    """
    passed_over = schemas.CORPUS_COPIES.empty_table()
    if copies is not None:
        passed_over = parquet.read_table(copies, schemas.CORPUS_COPIES)
    folder = step_folder(output, PLAN_STEP)
    axes = Axes(*npy.read_arrays(paths.join(folder, AXES_NAME), 2))

    @functools.lru_cache(maxsize=1)  # neighbouring shards share a file
    def read_plan(file_number: int) -> list[pa.Table]:
        return [
            parquet.read_table(paths.join(folder, f"{kind}-{file_number:05d}.parquet"), schema)
            for kind, schema in _PLAN_SCHEMAS.items()
        ]

    def process(shard: Shard) -> ShardRecord:
        part: Part = shard.work
        plan = _Plan(*(_between(table, part.start, part.stop) for table in read_plan(part.file_number)))
        table = _rows_of(part, plan, axes, passed_over)
        file = parquet.write_table(paths.join(output, f"images-{shard.name}.parquet"), table)
        totals = {
            "images": table.num_rows,
            "kept": pc.sum(table["kept"], min_count=0).as_py(),
            "in_corpus": table.num_rows - table["corpus_key"].null_count,
        }
        return ShardRecord(name=shard.name, files=(file,), totals=totals)

    return process


_PLAN_SCHEMAS = {"repeated": schemas.REPEATED_ROWS, "copies": schemas.COPY_ROWS, "packed": schemas.PACKED_ROWS}


def _between(table: pa.Table, start: int, stop: int) -> pa.Table:
    position = table["position"]
    return table.filter(pc.and_(pc.greater_equal(position, start), pc.less(position, stop)))


def _rows_of(part: Part, plan: _Plan, axes: Axes, passed_over: pa.Table) -> pa.Table:
    """The rows of IMAGES_TABLE for one part. passed_over: all rows of CORPUS_COPIES."""
    rows = parquet.read_table(part.images, schemas.IMAGES, _OF_FIRST_ROW)
    decided = parquet.read_table(part.duplicates, schemas.DUPLICATES, _DECISION)
    if not rows["image_id"].equals(decided["image_id"]):
        raise InputError(f"{part.duplicates}: not the images of {part.images}; run dedup again with --replace.")
    is_first = np.ones(rows.num_rows, bool)
    is_first[plan.repeated["position"].to_numpy() - part.start] = False
    first = np.flatnonzero(is_first)
    rows, decided = rows.take(pa.array(first)), decided.take(pa.array(first))
    image_ids = rows["image_id"].combine_chunks()

    position = part.start + first
    columns: dict[str, Any] = {"position": position, "row": position, "source": rows["source"], "role": rows["role"]}
    columns |= {name: decided[name] for name in ("kept", "reason", "matched_image_id")}
    listed = pa.concat_tables([pa.table(columns, schema=schemas.COPY_ROWS), plan.copies])
    listed = listed.sort_by([("position", "ascending"), ("row", "ascending")])
    image = np.searchsorted(position, listed["position"].to_numpy())
    decision = _decisions(listed, image)

    columns = {name: rows[name] for name in _OF_FIRST_ROW}
    columns |= {"kept": decision["kept"], **_reasons(image_ids, decision, passed_over)}
    columns["sources"] = _distinct(listed["source"].combine_chunks(), image, len(first))
    columns["num_rows"] = np.bincount(image, minlength=len(first)).astype(np.int32)
    columns["component_id"] = decided["component_id"]
    columns["cluster_id"] = _clusters(part, image_ids, decision)
    columns |= _corpus_columns(plan.packed, np.searchsorted(position, plan.packed["position"].to_numpy()), len(first))
    columns |= _places(part, image_ids, axes)
    columns |= _thumbnails(part, image_ids)
    ordered = {name: columns[name] for name in schemas.IMAGES_TABLE.names}
    return pa.table(ordered, schema=schemas.IMAGES_TABLE).combine_chunks()


def _decisions(listed: pa.Table, image: np.ndarray) -> pa.Table:
    """The row of `listed` (COPY_ROWS) that holds the decision on each image.

    image: (rows,) int64, the image of each row, rising. The kept row holds the decision, else the first row without the
    reason `exact`.
    """
    is_exact = pc.fill_null(pc.equal(listed["reason"], "exact"), False).to_numpy()
    rank = np.where(listed["kept"].to_numpy(), 0, np.where(is_exact, 2, 1))
    return listed.take(pa.array(top_k_of_groups(image, 1, rank)))


def _reasons(image_ids: pa.Array, decision: pa.Table, passed_over: pa.Table) -> dict[str, pa.Array]:
    """`reason` and `matched_image_id`. Images that retrieve passed over are kept, so dedup gave them none.

    Raises InputError for an image that was passed over and not kept.
    """
    row = pc.index_in(image_ids, passed_over["image_id"].combine_chunks())
    is_passed_over = pc.is_valid(row)
    wrong = pc.and_not(is_passed_over, decision["kept"].combine_chunks())
    if pc.any(wrong).as_py():
        raise InputError(
            f"Image {image_ids.filter(wrong)[0]} was passed over by retrieve, but dedup does not keep it: they are not "
            "stages of one run."
        )
    matched = passed_over["matched_image_id"].combine_chunks().take(row)
    return {
        "reason": pc.if_else(is_passed_over, "corpus_copy", decision["reason"].combine_chunks()),
        "matched_image_id": pc.if_else(is_passed_over, matched, decision["matched_image_id"].combine_chunks()),
    }


def _distinct(values: pa.Array, group: np.ndarray, num_groups: int) -> pa.ListArray:
    """The different values of each group, in the order given. group: (rows,) int64, rising."""
    encoded = values.dictionary_encode()
    key = group * len(encoded.dictionary) + encoded.indices.to_numpy()
    first = np.sort(np.unique(key, return_index=True)[1])
    bounds = np.searchsorted(group[first], np.arange(num_groups + 1))
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values.take(pa.array(first)))


def _clusters(part: Part, image_ids: pa.Array, decision: pa.Table) -> pa.Array:
    """The cluster of each image on level 0; null unless it is a kept pool image."""
    table = parquet.read_table(part.assignments, schemas.ASSIGNMENTS, ["image_id", "level", "cluster_id"])
    table = table.filter(pc.equal(table["level"], 0))
    clusters = table["cluster_id"].combine_chunks().take(pc.index_in(image_ids, table["image_id"].combine_chunks()))
    # A pool image that is kept has rows of role pool only, and dedup keeps the first of them.
    is_expected = pc.and_(decision["kept"], pc.equal(decision["role"], "pool")).combine_chunks()
    wrong = pc.not_equal(is_expected, pc.is_valid(clusters))
    if pc.any(wrong).as_py():
        image_id = image_ids.filter(wrong)[0]
        raise InputError(
            f"{part.assignments}: image {image_id} has a cluster without being a kept pool image, or the other way "
            "round. Run cluster again with --replace."
        )
    return clusters


def _corpus_columns(packed: pa.Table, image: np.ndarray, num_images: int) -> dict[str, pa.Array]:
    """`corpus_key`, `reasons` and `weight` from PACKED_ROWS. image: (rows,) int64, the image of each row."""
    keys = id_bytes(packed["key"])
    order = np.lexsort((keys, np.char.str_len(keys), image))  # <id>, <id>_1, ..., <id>_10
    packed, image = packed.take(pa.array(order)), image[order]
    first = np.flatnonzero(starts_group(image))
    row = np.zeros(num_images, np.int64)
    is_packed = np.zeros(num_images, bool)
    row[image[first]], is_packed[image[first]] = first, True
    reasons = packed["reasons"].combine_chunks()
    num_reasons = np.bincount(image, weights=reasons.value_lengths().to_numpy(), minlength=num_images)
    offsets = np.concatenate([[0], np.cumsum(num_reasons)]).astype(np.int32)
    weight = np.bincount(image, weights=packed["weight"].to_numpy(), minlength=num_images)
    return {
        "corpus_key": packed["key"].combine_chunks().take(pa.array(row, mask=~is_packed)),
        "reasons": pa.ListArray.from_arrays(pa.array(offsets), reasons.flatten()),
        "weight": pa.array(weight, mask=~is_packed),
    }


def _places(part: Part, image_ids: pa.Array, axes: Axes) -> dict[str, np.ndarray]:
    """`x` and `y`. Raises InputError for an image without a vector."""
    ids, matrix = vectors.read_file(part.vectors)
    row = _rows_in(ids, image_ids, part.vectors)
    places = principal_axes.project(matrix[row], axes)
    return {"x": places[:, 0], "y": places[:, 1]}


def _thumbnails(part: Part, image_ids: pa.Array) -> dict[str, pa.Array]:
    """`thumbnail_file` and `thumbnail_row`. Raises InputError for an image without a thumbnail."""
    if part.thumbnails is None:
        return {
            "thumbnail_file": pa.nulls(len(image_ids), pa.string()),
            "thumbnail_row": pa.nulls(len(image_ids), pa.int32()),
        }
    ids = parquet.read_table(part.thumbnails, schemas.THUMBNAILS, ["image_id"])["image_id"].to_pylist()
    row = _rows_in(ids, image_ids, part.thumbnails)
    name = posixpath.join("describe", posixpath.basename(part.thumbnails))
    return {"thumbnail_file": pa.repeat(pa.scalar(name), len(row)), "thumbnail_row": pa.array(row.astype(np.int32))}


def _rows_in(ids: list[str], image_ids: pa.Array, path: str) -> np.ndarray:
    """The row, (N,) int64, of each of `image_ids` (N,) in a file that holds `ids`."""
    row = pc.index_in(image_ids, pa.array(ids, pa.string()))
    if row.null_count:
        raise InputError(f"{path}: no row of image {image_ids.filter(pc.is_null(row))[0]}. Run its stage again.")
    result: np.ndarray = row.to_numpy().astype(np.int64)
    return result


# The plan


def _prepare(parts: Sequence[Part], inputs: RunFolder, output: str, runner: Runner, log: Log) -> ShardRecord:
    """Write the plan and the axes, which are deleted when the table is done."""
    folder = step_folder(output, PLAN_STEP)
    _write_plan(parts, inputs, folder)
    axes = principal_axes.fit(_fitted_vectors(parts, output, runner, log))
    npy.write_arrays(paths.join(folder, AXES_NAME), axes.directions, axes.offset)
    return ShardRecord(name=PREPARED)


def _write_plan(parts: Sequence[Part], inputs: RunFolder, folder: str) -> None:
    """Write the three kinds of rows of _PLAN_SCHEMAS. Parts share files above MAX_PLAN_FILES parts."""
    first_of_row, first_of_sample = _first_rows(parts, inputs)
    starts = [part.start for n, part in enumerate(parts) if n == 0 or part.file_number > parts[n - 1].file_number]

    def split(kind: str) -> Any:
        return split_by_position(paths.join(folder, kind), _PLAN_SCHEMAS[kind], starts)

    with split("repeated") as write:
        for block in blocks(len(first_of_row)):
            row = np.arange(block.start, block.stop)
            write(pa.table({"position": row[first_of_row[block] != row]}, schema=schemas.REPEATED_ROWS))
    with split("copies") as write:
        for part in parts:
            row = np.arange(part.start, part.stop)
            first = first_of_row[part.start : part.stop]
            chosen = np.flatnonzero(first != row)
            if len(chosen):
                images = parquet.read_table(part.images, schemas.IMAGES, ["source", "role"])
                decided = parquet.read_table(part.duplicates, schemas.DUPLICATES, _DECISION)
                columns: dict[str, Any] = {"position": first[chosen], "row": row[chosen]}
                for name in schemas.COPY_ROWS.names[2:]:
                    table = images if name in images.column_names else decided
                    columns[name] = table[name].take(pa.array(chosen))
                write(pa.table(columns, schema=schemas.COPY_ROWS))
    with split("packed") as write:
        start = 0
        for table in _corpus(inputs, schemas.PACKED_ROWS.names[1:]):
            position = pa.array(first_of_sample[start : start + table.num_rows])
            write(table.add_column(0, schemas.PACKED_ROWS.field("position"), position))
            start += table.num_rows


def _corpus(inputs: RunFolder, columns: list[str]) -> Iterator[pa.Table]:
    for file in corpus_tables(inputs.corpus):
        yield parquet.read_table(file, schemas.CORPUS, columns)


def _first_rows(parts: Sequence[Part], inputs: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    """The first row of the image of each row of ingest, and of each row of the corpus; both int64, on disk.

    Raises InputError for an image of the corpus that ingest does not hold.
    """
    num_rows, num_samples = parts[-1].stop, require_manifest(inputs.corpus).totals["rows"]
    num_buckets = min(max(num_rows, num_samples) // ROWS_PER_BUCKET + 1, 1 << 16)
    rows, samples = Buckets(num_buckets, _ROW), Buckets(num_buckets, _ROW)
    for buckets, tables in (
        (rows, (parquet.read_table(part.images, schemas.IMAGES, ["image_id"]) for part in parts)),
        (samples, _corpus(inputs, ["image_id"])),
    ):
        start = 0
        for table in tables:
            block = np.empty(table.num_rows, _ROW)
            block["image_id"] = pack_ids(table["image_id"])
            block["row"] = np.arange(start, start + table.num_rows)
            buckets.add(bucket_of(block["image_id"], num_buckets), block)
            start += table.num_rows
    first_of_row, first_of_sample = on_disk(num_rows, np.int64), on_disk(num_samples, np.int64)
    for bucket in range(num_buckets):
        block = rows.read(bucket)
        block = block[np.lexsort((block["row"], block["image_id"]))]
        is_first = starts_group(block["image_id"])
        first = block[is_first]
        first_of_row[block["row"]] = first["row"][np.cumsum(is_first) - 1]
        block = samples.read(bucket)
        index = np.searchsorted(first["image_id"], block["image_id"])
        is_known = index < len(first)
        is_known[is_known] = first["image_id"][index[is_known]] == block["image_id"][is_known]
        if not is_known.all():
            unknown = unpack_ids(block["image_id"][~is_known][:1])[0]
            raise InputError(f"The corpus holds image {unknown}, which the ingest does not hold: not of one run.")
        first_of_sample[block["row"]] = first["row"][index]
    return first_of_row, first_of_sample


# The map


def _fitted_vectors(parts: Sequence[Part], output: str, runner: Runner, log: Log) -> Iterator[np.ndarray]:
    """The vectors of all images, or of a sample, (N, D) float16, one shard at a time."""
    share = MAX_FITTED / parts[-1].stop
    if share >= 1:
        for part in parts:
            yield vectors.read_file(part.vectors)[1]
        return
    folder = step_folder(output, SAMPLE_STEP)
    stage = Stage(
        name=f"images {SAMPLE_STEP}",
        config=Settings(),
        inputs={},
        output=folder,
        shards=[Shard(_shard_name(part.images), part.vectors, part.stop - part.start) for part in parts],
        make_worker=functools.partial(make_sampler, folder, share),
    )
    for record in run_stage(stage, runner, log=log).shards:
        yield npy.read_array(paths.join(folder, record.files[0].name))


def make_sampler(folder: str, share: float) -> Callable[[Shard], ShardRecord]:
    """A worker that writes the vectors of the images whose id, as a number from 0 to 1, is below `share`."""

    def process(shard: Shard) -> ShardRecord:
        ids, matrix = vectors.read_file(shard.work)
        leading = pack_ids(pa.chunked_array([pa.array(ids, pa.string())])).view(">u8").reshape(-1, 2)[:, 0]
        is_chosen = leading.astype(np.float64) < share * 2.0**64
        file = npy.write_arrays(paths.join(folder, f"sample-{shard.name}.npy"), matrix[is_chosen])
        return ShardRecord(name=shard.name, files=(file,))

    return process
