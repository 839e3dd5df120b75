"""The images of a run: a corpus, or any images, as one list of samples.

<output>/
  ingest/                 only for raw images: a finished ingest stage, see curation/ingest.py
  samples/
    samples.arrow         one row per sample: where its bytes lie. Memory-mapped by every rank and worker
    cumulative.npy        the running sum of the samples' weights, if these differ and count. Memory-mapped too
"""

import os
import posixpath
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from curation import ingest
from curation.config import IsPath, NotInPlan, Settings
from curation.engine.manifest import checked, read_manifest, require_manifest
from curation.engine.runner import Runner
from curation.errors import InputError, OutputMismatchError
from curation.files import npy, parquet, paths, schemas
from curation.images.decode import ImageLimits
from curation.images.sources import Layout, SourceConfig
from curation.ingest import IngestConfig
from curation.run_folder import corpus_tables

SAMPLE_SCHEMA = pa.schema(
    [
        schemas.CORPUS.field("image_id"),
        schemas.IMAGES.field("uri"),
        schemas.IMAGES.field("offset"),
        schemas.IMAGES.field("length"),
        schemas.CORPUS.field("weight"),
        schemas.IMAGES.field("layout"),
    ]
)
SAMPLES_FOLDER = "samples"
# Rows of each record batch of samples.arrow but the last. Assumed: some 10 MB.
ROWS_PER_BATCH = 65_536


class DataConfig(Settings):
    """The images to train on."""

    path: Annotated[str, IsPath]
    """Folder with the data, local or any fsspec URL; its content is described by `layout`."""
    layout: Literal["corpus", "images", "folder", "webdataset", "parquet"] = "corpus"
    """`corpus`: the output of `make curate`. `images`: a finished ingest, without its holdout. Other layouts hold raw
    images, which are ingested first: files in folders, tars, or Parquet. Each sample of a Parquet file reads a whole
    row group, so pack large data."""
    image_column: str = "image.bytes"
    """For Parquet: the column with the encoded image; dots lead into structs."""
    limits: ImageLimits = ImageLimits()
    """Limits on an image's size and cost. If they are stricter than ingest's, images that ingest accepted are rejected.
    """
    use_weights: bool = True
    """Draw samples as often as the corpus's weights say. Otherwise each comes once an epoch."""
    verify_hashes: bool = True
    """Check the hash of every image's bytes against its id at every read. Without it, an image that replaced another
    one of equal length is decoded unseen; turn it off for files that nothing else can write. It costs 1% of the time
    that the crops of a photograph take, or 4% on a processor without SHA instructions (measured: data.py)."""
    max_reject_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of all samples that may turn out unusable on one rank before training stops."""
    workers: Annotated[int, NotInPlan] = Field(default=0, ge=0)
    """Processes of each rank that read, decode and crop; 0 takes a thread of the training process. A core makes the
    crops of some hundred photographs a second."""


def prepare(config: DataConfig, output: str, runner: Runner) -> int:
    """List the samples of `config` in OUTPUT/samples, once. Gives their number. One process calls it for all ranks.

    Raises InputError if there is no data or if a tar or table is lost or cut off, and OutputMismatchError if the output
    lists other data.
    """
    if not paths.is_local(output):
        raise InputError(
            f"The output '{output}' is not local: its list of samples is mapped into memory. Give a folder."
        )
    if config.layout == "corpus":
        folder, tables = config.path, _corpus_tables(config.path)
    else:
        folder = config.path if config.layout == "images" else paths.join(output, "ingest")
        if config.layout != "images":
            source = SourceConfig(
                name="train", path=config.path, role="pool", layout=config.layout, image_column=config.image_column
            )
            # Ingest judges each image once, by its own budget. Images that are damaged later spend this run's budget.
            ingest_config = IngestConfig(
                sources=(source,), limits=config.limits, max_reject_fraction=config.max_reject_fraction
            )
            if not _is_ingested(ingest_config, folder):
                ingest.run(ingest_config, folder, runner)
        tables = _ingested_tables(folder)
    _require_whole(folder)
    samples_folder = paths.join(output, SAMPLES_FOLDER)
    _list_samples(config, folder, tables, samples_folder)
    return SampleList(samples_folder).num_samples


def _require_whole(folder: str) -> None:
    """Raise InputError where a file of the stage in `folder` is missing or has another size, from one listing."""
    for _, problems in checked(folder, require_manifest(folder).shards, hashes=False):
        if problems:
            raise InputError(
                f"{problems[0]}. Restore it, or run the command that wrote '{folder}' again with --replace, which does "
                "its damaged shards again; then resume."
            )


def _is_ingested(config: IngestConfig, folder: str) -> bool:
    """Whether `folder` holds this ingest. Its list then stands, even if files have changed: a run keeps its order."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    return manifest.facts == config.model_dump(mode="json", include={"sources", "limits"})


def _corpus_tables(folder: str) -> Iterator[pa.Table]:
    """A table of SAMPLE_SCHEMA for each tar of a finished corpus."""
    files = corpus_tables(folder)
    if not files:
        raise InputError(f"'{folder}' holds no corpus: no corpus-*.parquet. Give the folder that pack wrote.")
    with paths.open_read(files[0]) as first:
        columns_there = pq.ParquetFile(first).schema_arrow.names
    if missing := [name for name in ("offset", "length") if name not in columns_there]:
        raise InputError(
            f"'{folder}' was packed by an older version, which did not write the place of an image in its tar (no "
            f"column {' and '.join(missing)} in {posixpath.basename(files[0])}). Delete the folder and run pack again."
        )
    for file in files:
        table = parquet.read_table(file, schemas.CORPUS)
        tars = table["shard"].combine_chunks().dictionary_encode()
        uris = pa.array([paths.join(folder, tar) for tar in tars.dictionary.to_pylist()], pa.string())
        columns = {column: table[column] for column in SAMPLE_SCHEMA.names if column not in ("uri", "layout")}
        layout = pa.repeat(pa.scalar("webdataset"), table.num_rows)
        samples = pa.table({**columns, "uri": uris.take(tars.indices), "layout": layout})
        yield samples.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)


def _ingested_tables(folder: str) -> Iterator[pa.Table]:
    """A table of SAMPLE_SCHEMA for each images file of a finished ingest, without its holdout. All weights are 1."""
    files = require_manifest(folder).paths(folder, "images")
    if not files:
        raise InputError(f"'{folder}' holds no finished ingest: no images-*.parquet. Correct data.path or data.layout.")
    columns = ["image_id", "uri", "offset", "length", "role", "layout"]
    for file in files:
        table = parquet.read_table(file, schemas.IMAGES, columns)
        table = table.filter(pc.not_equal(table["role"], "holdout")).drop_columns(["role"])
        table = table.append_column("weight", pa.repeat(pa.scalar(1.0), table.num_rows))
        yield table.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)


def _list_samples(config: DataConfig, folder: str, tables: Iterator[pa.Table], output: str) -> None:
    """Write samples.arrow and cumulative.npy into `output`, or keep files that already list the same data."""
    content = require_manifest(folder).content_hash
    facts = {"content": content, "layout": config.layout, "use_weights": str(config.use_weights)}
    path = paths.join(output, "samples.arrow")
    listed = _read_facts(path) if paths.exists(path) else {}
    if listed and (changed := [name for name in facts if listed[name] != facts[name]]):
        raise OutputMismatchError(
            f"'{output}' lists the samples of other data than '{config.path}' ({', '.join(changed)} differ). The same "
            "order needs the same data: give another --output, or restore the data that this run began with."
        )
    if listed.get("path") == folder:
        return
    weights = [np.empty(0)]

    def collecting_weights() -> Iterator[pa.Table]:
        for table in tables:
            weights.append(table["weight"].to_numpy())
            yield table

    with paths.atomic_write(path + ".new") as file:
        schema = SAMPLE_SCHEMA.with_metadata(facts | {"path": folder})
        with pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema) as writer:
            for table in _in_batches(collecting_weights()):
                writer.write_table(table.replace_schema_metadata(schema.metadata), ROWS_PER_BATCH)
    _write_cumulative(config, np.concatenate(weights), output)
    # Last: samples.arrow says that cumulative.npy is complete.
    os.replace(paths.filesystem(path + ".new")[1], paths.filesystem(path)[1])


def _in_batches(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of `tables`, ROWS_PER_BATCH at a time."""
    pending, num_rows = [SAMPLE_SCHEMA.empty_table()], 0
    for table in tables:
        pending.append(table)
        num_rows += table.num_rows
        while num_rows >= ROWS_PER_BATCH:
            joined = pa.concat_tables(pending)
            yield joined[:ROWS_PER_BATCH].combine_chunks()
            pending, num_rows = [joined[ROWS_PER_BATCH:]], num_rows - ROWS_PER_BATCH
    if num_rows:
        yield pa.concat_tables(pending).combine_chunks()


def _write_cumulative(config: DataConfig, weights: NDArray[np.float64], output: str) -> None:
    path = paths.join(output, "cumulative.npy")
    if not len(weights):
        raise InputError(f"'{config.path}' holds no image to train on.")
    if not config.use_weights or ((weights == weights[0]).all() and weights[0] > 0):
        paths.delete(path)
        return
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() > 0):
        worst = int(np.argmax(~np.isfinite(weights) | (weights < 0)))
        raise InputError(
            f"'{config.path}': row {worst} has the weight {weights[worst]}. Weights are finite, not negative, and not "
            "all 0; set data.use_weights = false to go without."
        )
    npy.write_arrays(path, np.cumsum(weights))


def _read_facts(path: str) -> dict[str, str]:
    """The metadata of samples.arrow: which data it lists."""
    with pa.memory_map(paths.filesystem(path)[1]) as file:
        metadata = pa.ipc.open_file(file).schema.metadata or {}
    return {name.decode(): value.decode() for name, value in metadata.items()}


class SampleReference(NamedTuple):
    """The id of an image, and where its bytes lie."""

    image_id: str
    uri: str
    offset: int
    length: int
    layout: Layout


@final
class SampleList:
    """The list that `prepare` wrote, mapped into memory."""

    def __init__(self, folder: str) -> None:
        local_folder = paths.filesystem(folder)[1]
        self._reader = pa.ipc.open_file(pa.memory_map(os.path.join(local_folder, "samples.arrow")))
        self._batches: dict[int, pa.RecordBatch] = {}
        last = self._reader.num_record_batches - 1
        self.num_samples: int = last * ROWS_PER_BATCH + int(self._reader.get_batch(last).num_rows)
        cumulative_path = os.path.join(local_folder, "cumulative.npy")
        self.cumulative_weights: NDArray[np.float64] | None = None
        """(R,) running sum of the weights; None if all samples come equally often."""
        if os.path.exists(cumulative_path):
            self.cumulative_weights = np.load(cumulative_path, mmap_mode="r", allow_pickle=False)

    def __getitem__(self, row: int) -> SampleReference:
        number, row_in_batch = divmod(row, ROWS_PER_BATCH)
        if number not in self._batches:
            self._batches[number] = self._reader.get_batch(number)
        batch = self._batches[number]
        return SampleReference(*(batch.column(name)[row_in_batch].as_py() for name in SampleReference._fields))
