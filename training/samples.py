"""What to read: a corpus, or any images, as one list of samples.

<output>/
  ingest/                 only where the data are raw images: a stage of its own, see curation/ingest.py
  samples/
    samples.arrow         one row per sample: which bytes it is. Memory-mapped by every rank and worker
    cumulative.npy        the running sum of the samples' weights, where these differ and count. Memory-mapped too
"""

import os
from collections.abc import Iterator
from typing import Literal, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from curation import ingest
from curation.config import Settings
from curation.engine.manifest import read_manifest, require_manifest
from curation.engine.runner import Runner
from curation.errors import InputError, OutputMismatchError
from curation.files import npy, parquet, paths, schemas
from curation.images.decode import ImageLimits
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig

SAMPLES = pa.schema(
    [
        schemas.CORPUS.field("image_id"),
        schemas.IMAGES.field("uri"),
        schemas.IMAGES.field("offset"),
        schemas.IMAGES.field("length"),
        schemas.CORPUS.field("weight"),
    ]
)
SAMPLES_FOLDER = "samples"
# Rows of a record batch of samples.arrow; all but the last have as many. Assumed: some 10 MB.
ROWS_PER_BATCH = 65_536


class DataConfig(Settings):
    """What to train on."""

    path: str
    """Folder with the data, local or any fsspec URL; what it holds is the `layout`."""
    layout: Literal["corpus", "images", "folder", "webdataset", "parquet"] = "corpus"
    """`corpus`: what `make curate` packed. `images`: a finished ingest, without its holdout. The others are raw images,
    which are ingested first: files in folders, tars, or Parquet. Of Parquet a whole row group is read for each sample:
    pack what is large."""
    image_column: str = "image.bytes"
    """For Parquet: the column with the encoded image, dots leading into structs."""
    limits: ImageLimits = ImageLimits()
    """What an image may cost. Not below what ingest allowed, or what it accepted is rejected here."""
    use_weights: bool = True
    """Whether a sample comes as often as the corpus's weights say; else each once an epoch."""
    verify_hashes: bool = False
    """Whether the hash of every image's bytes is held against its id each time; else what betrays a replaced file or
    shard (sizes, and the names in a tar's headers) has to do."""
    max_reject_fraction: float = Field(default=0.01, ge=0, le=1)
    """The share of all samples that may turn out unusable on one rank before training stops."""
    workers: int = Field(default=0, ge=0)
    """Processes of each rank that read, decode and crop; 0 does it in a thread of the training process. A core makes
    the crops of some hundred photographs a second."""


def prepare(config: DataConfig, output: str, runner: Runner) -> int:
    """List the samples of `config` in OUTPUT/samples, once; gives their number. One process does this for all ranks.

    Raises InputError where there is no data, and OutputMismatchError where the output has other data's list.
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
            # Each image is judged once, by ingest's own budget; what decays later spends this run's.
            asked = IngestConfig(
                sources=(source,), limits=config.limits, max_reject_fraction=config.max_reject_fraction
            )
            if not _is_ingested(asked, folder):
                ingest.run(asked, folder, runner)
        tables = _ingested_tables(folder)
    samples = paths.join(output, SAMPLES_FOLDER)
    _list_samples(config, folder, tables, samples)
    return Samples(samples).num_samples


def _is_ingested(asked: IngestConfig, folder: str) -> bool:
    """Whether this was listed before. The list then stands, whatever has become of the files: a run keeps its order."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    return manifest.facts == asked.model_dump(mode="json", include={"sources", "limits"})


def _corpus_tables(folder: str) -> Iterator[pa.Table]:
    """SAMPLES of each tar of a finished corpus."""
    names = [name for name in require_manifest(folder).files("corpus") if name.endswith(".parquet")]
    if not names:
        raise InputError(f"'{folder}' holds no corpus: no corpus-*.parquet. Give the folder that pack wrote.")
    with paths.open_read(paths.join(folder, names[0])) as file:
        found = pq.ParquetFile(file).schema_arrow.names
    if missing := [name for name in ("offset", "length") if name not in found]:
        raise InputError(
            f"'{folder}' was packed by an older version, which did not write down where in its tar an image lies (no "
            f"column {' and '.join(missing)} in {names[0]}). Delete the folder and run pack again."
        )
    for name in names:
        table = parquet.read_table(paths.join(folder, name), schemas.CORPUS)
        tars = table["shard"].combine_chunks().dictionary_encode()
        files = pa.array([paths.join(folder, tar) for tar in tars.dictionary.to_pylist()], pa.string())
        columns = {column: table[column] for column in SAMPLES.names if column != "uri"}
        yield pa.table({**columns, "uri": files.take(tars.indices)}).select(SAMPLES.names).cast(SAMPLES)


def _ingested_tables(folder: str) -> Iterator[pa.Table]:
    """SAMPLES of each images file of a finished ingest, without its holdout, all of the same weight."""
    names = require_manifest(folder).files("images")
    if not names:
        raise InputError(f"'{folder}' holds no finished ingest: no images-*.parquet. Correct data.path or data.layout.")
    columns = ["image_id", "uri", "offset", "length", "role"]
    for name in names:
        table = parquet.read_table(paths.join(folder, name), schemas.IMAGES, columns)
        table = table.filter(pc.not_equal(table["role"], "holdout")).drop_columns(["role"])
        yield table.append_column("weight", pa.repeat(pa.scalar(1.0), table.num_rows)).cast(SAMPLES)


def _list_samples(config: DataConfig, folder: str, tables: Iterator[pa.Table], output: str) -> None:
    """Write samples.arrow and cumulative.npy into `output`, or keep those that are there and of the same data."""
    content = require_manifest(folder).content_hash
    asked = {"content": content, "layout": config.layout, "use_weights": str(config.use_weights)}
    path = paths.join(output, "samples.arrow")
    found = _facts(path) if paths.exists(path) else {}
    if found and (changed := [name for name in asked if found[name] != asked[name]]):
        raise OutputMismatchError(
            f"'{output}' lists the samples of other data than '{config.path}' ({', '.join(changed)} differ). The same "
            "order needs the same data: give another --output, or restore the data that this run began with."
        )
    if found.get("path") == folder:
        return
    weights = [np.empty(0)]

    def noted() -> Iterator[pa.Table]:
        for table in tables:
            weights.append(table["weight"].to_numpy())
            yield table

    with paths.atomic_write(path + ".new") as file:
        schema = SAMPLES.with_metadata(asked | {"path": folder})
        with pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema) as writer:
            for table in _in_batches(noted()):
                writer.write_table(table.replace_schema_metadata(schema.metadata), ROWS_PER_BATCH)
    _write_cumulative(config, np.concatenate(weights), output)
    os.replace(paths.filesystem(path + ".new")[1], paths.filesystem(path)[1])  # last: it vouches for the other


def _in_batches(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of `tables`, ROWS_PER_BATCH at a time."""
    held, num_rows = [SAMPLES.empty_table()], 0
    for table in tables:
        held.append(table)
        num_rows += table.num_rows
        while num_rows >= ROWS_PER_BATCH:
            whole = pa.concat_tables(held)
            yield whole[:ROWS_PER_BATCH].combine_chunks()
            held, num_rows = [whole[ROWS_PER_BATCH:]], num_rows - ROWS_PER_BATCH
    if num_rows:
        yield pa.concat_tables(held).combine_chunks()


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


def _facts(path: str) -> dict[str, str]:
    with pa.memory_map(paths.filesystem(path)[1]) as file:
        metadata = pa.ipc.open_file(file).schema.metadata or {}
    return {name.decode(): value.decode() for name, value in metadata.items()}


class Sample(NamedTuple):
    """Where the bytes of an image lie."""

    image_id: str
    uri: str
    offset: int
    length: int


@final
class Samples:
    """The list that `prepare` wrote, mapped into memory."""

    def __init__(self, folder: str) -> None:
        place = paths.filesystem(folder)[1]
        self._reader = pa.ipc.open_file(pa.memory_map(os.path.join(place, "samples.arrow")))
        self._batches: dict[int, pa.RecordBatch] = {}
        last = self._reader.num_record_batches - 1
        self.num_samples: int = last * ROWS_PER_BATCH + int(self._reader.get_batch(last).num_rows)
        cumulative = os.path.join(place, "cumulative.npy")
        self.cumulative: NDArray[np.float64] | None = None
        """(R,) running sum of the weights; None where all samples come equally often."""
        if os.path.exists(cumulative):
            self.cumulative = np.load(cumulative, mmap_mode="r", allow_pickle=False)

    def __getitem__(self, row: int) -> Sample:
        number, place = divmod(row, ROWS_PER_BATCH)
        if number not in self._batches:
            self._batches[number] = self._reader.get_batch(number)
        batch = self._batches[number]
        return Sample(*(batch.column(name)[place].as_py() for name in Sample._fields))
