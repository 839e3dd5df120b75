"""What to read, in which order: from a corpus (or any images) to the batches of every step, on any number of ranks.

    <output>/
      ingest/                 only where the data are raw images: a stage of its own, see curation/ingest.py
      samples/
        samples.arrow         one row per sample: which bytes it is. Memory-mapped by every rank and worker
        cumulative.npy        the running sum of the samples' weights, where these differ and count. Memory-mapped too

The order. Position p = step * batch_size + i counts all samples that training ever draws. Epoch e = p // R has as many
positions as there are samples, R, in an order drawn from (seed, e); nothing is stored, so any step can be the first.
With weights, an epoch has each sample either floor(x) or ceil(x) times, where x is R times its share of all weight: the
shuffled place k of a position means the sample in whose stretch of the cumulative weight k + u falls (systematic
sampling), and u, one number of an epoch, moves on by the golden ratio from epoch to epoch, so that over e epochs a
sample comes e * x times, give or take one or two. Equal weights have each sample exactly once.

An image that cannot be decoded, or that is no longer where it was, is counted and listed, and the sample
that the next epoch has at the same place takes its place, as often as needed. So a batch depends on the data, the
config and its step alone.

Crops travel as bytes; `Batch.to` makes normalised numbers of them where they are used.

Legend: B images of a step (`batch_size`), n images of a pass, V crops of a group, N patches of a global crop.
"""

import contextlib
import multiprocessing
import os
import signal
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from typing import Any, Literal, NamedTuple, cast, final

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curation import ingest
from curation.config import Settings
from curation.engine.manifest import read_manifest, require_manifest
from curation.engine.runner import Runner
from curation.errors import ConfigError, InputError, OutputMismatchError, RejectBudgetError, UserError
from curation.files import parquet, paths, schemas
from curation.files.prefetch import prefetch
from curation.images.decode import ImageLimits, ImageRejected, RejectReason
from curation.images.hashing import image_id
from curation.images.sources import PARQUET_URI, ReferenceReader, SourceConfig
from curation.ingest import IngestConfig
from curation.models.embedders import IMAGENET_NORMALIZATION
from training.augment import AugmentConfig, Pixels, make_crops
from training.masking import mask_token_weights

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
# Shards that a worker holds open. Assumed: below the 256 files that macOS allows a process by default.
OPEN_FILES = 128
# Images that are tried for one position before training stops. Assumed: among images of which half are bad, one
# position in 65,536 has as many.
MAX_TRIES = 16
# Passes that each worker has ready. Assumed: a slow shard is made up for, and two are memory.
PASSES_AHEAD = 2
# What a generator is for; any three numbers that differ.
ORDER, SHIFT, CROPS = 0x6F72, 0x7368, 0x6372
# Rounds of the Feistel network that shuffles. Cited: Luby and Rackoff (1988) prove four enough for good round
# functions; eight make up for cheap ones on small sets (assumed).
ROUNDS = 8
GOLDEN_RATIO = 0.6180339887498949


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


@dataclass(frozen=True, eq=False)
class Batch:
    """What one pass of one rank sees. Crops and masks go by crop, then by image: all n images' first crop, ..."""

    crops: tuple[Tensor, ...]
    """One per group of crops: (V * n, 3, S, S), uint8 as loaded, and normalised float32 once `to` a device."""
    masks: Tensor
    """(2 * n, N) bool, of the global crops: what the student does not see."""
    places: Tensor
    """(M,) int64: where the masked patches are among those of all global crops, 2 * n * N."""
    patch_weights: Tensor
    """(M,) float32: what each counts."""
    image_ids: list[str]
    """n."""
    positions: Tensor
    """(n,) int64."""
    rejected: dict[str, str]
    """Why the images could not be used in whose place others came, by id."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device, its crops float32, normalised with ImageNet's mean and standard deviation."""
        assert all(crop.dtype == torch.uint8 for crop in self.crops), "normalised already"
        mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in IMAGENET_NORMALIZATION)
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, crops=tuple(crop.float().sub_(mean).div_(deviation) for crop in moved.crops))

    def pin_memory(self) -> "Batch":
        """The batch in memory that a GPU copies from while it computes; torch's DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            crops=tuple(map(change, self.crops)),
            masks=change(self.masks),
            places=change(self.places),
            patch_weights=change(self.patch_weights),
        )


# What to read


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
    found = IngestConfig.model_validate(manifest.plan.config, strict=False)
    return (found.sources, found.limits) == (asked.sources, asked.limits)


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
    with paths.atomic_write(path) as file:
        np.save(file, np.cumsum(weights), allow_pickle=False)


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


# In which order


@final
class Order:
    """Which sample a position has; see the top of this module."""

    def __init__(self, seed: int, num_samples: int, cumulative: NDArray[np.float64] | None = None) -> None:
        self._seed, self.num_samples, self._cumulative = seed, num_samples, cumulative
        self._first_shift = float(np.random.default_rng([seed, SHIFT]).random())

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows (P,) of the samples of some positions."""
        epochs, places = np.divmod(positions, self.num_samples)
        rows = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            keys = np.random.default_rng([self._seed, ORDER, epoch]).integers(2**64 - 1, size=ROUNDS, dtype=np.uint64)
            rows[own] = self._weighted(shuffled(places[own], self.num_samples, keys), epoch)
        return rows

    def _weighted(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        if self._cumulative is None:
            return places
        total = float(self._cumulative[-1])
        shift = (self._first_shift + epoch * GOLDEN_RATIO) % 1
        # Rounding could reach the total itself, which belongs to no sample.
        target = np.minimum((places + shift) * (total / self.num_samples), np.nextafter(total, 0))
        rows: NDArray[np.int64] = np.searchsorted(self._cumulative, target, side="right")
        return rows


def shuffled(places: NDArray[np.int64], num_places: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a permutation of range(num_places) takes `places` (P,), without holding it.

    A Feistel network over the next power of four, walked along until it is back in range (Black and Rogaway 2002); the
    round function is the mixer of SplitMix64 (Steele, Lea and Flood 2014). `keys` (ROUNDS,) choose the permutation.
    """
    half = np.uint64(max(1, ((num_places - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = places.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> half, values[walking] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= np.uint64(num_places)]
    return values.astype(np.int64)


# Reading


@final
class Reader:
    """Reads images by reference, in any order: local files through `pread`, with the last ones kept open.

    Cheap signs tell bytes that have changed: the size of a file, and in a tar the header of the member, whose size must
    be the image's and, with `named` (in a corpus), whose name begins with its id. With `hashed` the bytes' hash is held
    against the id: 140 microseconds for 50 kB (measured 2026-11, a processor without instructions for SHA), where
    reading takes 10.
    """

    def __init__(self, *, named: bool, hashed: bool) -> None:
        self._named, self._hashed = named, hashed
        self._files: OrderedDict[str, int] = OrderedDict()
        self._parquet = ReferenceReader()

    def read(self, sample: Sample) -> bytes:
        """The bytes of a sample. Raises ImageRejected when they have changed, InputError for a shard that is gone."""
        uri, offset, length = sample.uri, sample.offset, sample.length
        if PARQUET_URI.fullmatch(uri):
            return self._parquet.read(uri, offset, length, sample.image_id)
        try:
            if offset == 0:  # a file of its own; one byte more would show that it has grown
                header, data = b"", self._slice(uri, 0, length + 1)
            else:
                block = self._slice(uri, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + length)
                header, data = block[: tarfile.BLOCKSIZE], block[tarfile.BLOCKSIZE :]
        except OSError as error:
            raise self._lost(sample, f"cannot be read any more ({error})") from None
        if len(data) < length:
            raise self._lost(sample, f"is cut off: it ends before byte {offset + length:,}, where an image of it does")
        if len(data) > length or (header and not self._is_of(header, sample)):
            raise ImageRejected(RejectReason.CORRUPT, f"{uri} has changed: image {sample.image_id} is not at {offset}")
        if self._hashed and image_id(data) != sample.image_id:
            raise ImageRejected(RejectReason.CORRUPT, f"{uri} has changed: the bytes at {offset} have another hash")
        return data

    def _is_of(self, header: bytes, sample: Sample) -> bool:
        """Whether this is the header of the sample's member in its tar."""
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        return member.size == sample.length and (member.name.startswith(sample.image_id) or not self._named)

    def _slice(self, uri: str, offset: int, length: int) -> bytes:
        if uri in self._files:
            self._files.move_to_end(uri)
        else:
            fs, inner = paths.filesystem(uri)
            if not paths.is_local(uri):
                return bytes(fs.cat_file(inner, start=offset, end=offset + length))
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[uri] = os.open(inner, os.O_RDONLY)
        return os.pread(self._files[uri], length, offset)

    @staticmethod
    def _lost(sample: Sample, what: str) -> UserError | ImageRejected:
        if sample.offset == 0:  # a file of its own; in a tar a header comes first
            return ImageRejected(RejectReason.UNREADABLE, f"{sample.uri} {what}")
        return InputError(
            f"The shard {sample.uri} {what}. Restore it and go on from the last checkpoint; if it is lost, pack or "
            "ingest again and train into another output."
        )

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])
        self._parquet.close()


# Batches


@dataclass(frozen=True)
class _Feed:
    """All that decides what the batches of one rank hold."""

    data: DataConfig
    augment: AugmentConfig
    samples: str
    """The folder of samples.arrow."""
    seed: int
    batch_size: int
    """Images of a step, over all ranks and passes."""
    images_per_pass: int
    masks: Callable[[int, range], Tensor]
    rank: int
    num_ranks: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.num_ranks * self.images_per_pass):
            raise ConfigError(
                f"batch_size = {self.batch_size} is not a multiple of {self.num_ranks} ranks x images_per_pass = "
                f"{self.images_per_pass}. Change one of them."
            )

    @property
    def num_passes(self) -> int:
        """Passes of a step on one rank."""
        return self.batch_size // (self.num_ranks * self.images_per_pass)


@final
class _Passes(Dataset[Batch | UserError]):
    """The passes of a feed by (step, number of the pass), made in whatever process asks for them."""

    def __init__(self, feed: _Feed) -> None:
        self._feed = feed
        self._open: tuple[Samples, Order, Reader] | None = None

    def __getitem__(self, item: tuple[int, int]) -> Batch | UserError:
        """One pass. An error of the user's is handed over, not raised: a worker's would come with its traceback."""
        try:
            return self._load(*item)
        except UserError as error:
            return error

    def close(self) -> None:
        """Close the files that were opened in this process."""
        if self._open is not None:
            self._open[2].close()

    def _load(self, step: int, number: int) -> Batch:
        feed = self._feed
        if self._open is None:
            cv2.setNumThreads(1)
            samples = Samples(feed.samples)
            reader = Reader(named=feed.data.layout == "corpus", hashed=feed.data.verify_hashes)
            self._open = samples, Order(feed.seed, samples.num_samples, samples.cumulative), reader
        first = feed.rank * feed.batch_size // feed.num_ranks + number * feed.images_per_pass
        positions = step * feed.batch_size + np.arange(first, first + feed.images_per_pass)
        rejected: dict[str, str] = {}
        rows = self._open[1].rows(positions)  # together: one by one they would take a thirtieth of the time
        images = [self._image(*place, rejected) for place in zip(positions.tolist(), rows.tolist(), strict=True)]
        ids, crops = zip(*images, strict=True)
        # The images of a crop beside each other: (V, n, 3, S, S), then (V * n, 3, S, S).
        groups = [torch.from_numpy(np.stack(group, axis=1)).flatten(0, 1) for group in zip(*crops, strict=True)]
        of_crops = [
            feed.masks(step, range(start, start + feed.images_per_pass)) for start in (first, feed.batch_size + first)
        ]
        masks = torch.cat(of_crops)
        return Batch(
            crops=tuple(groups),
            masks=masks,
            places=masks.flatten().nonzero()[:, 0],
            patch_weights=mask_token_weights(masks),
            image_ids=list(ids),
            positions=torch.from_numpy(positions),
            rejected=rejected,
        )

    def _image(self, position: int, row: int, rejected: dict[str, str]) -> tuple[str, tuple[Pixels, ...]]:
        """Id and crops of the sample at `row`, or of the first usable one in its place; bad ones go to `rejected`."""
        feed = self._feed
        assert self._open is not None
        samples, order, reader = self._open
        for attempt in range(MAX_TRIES):
            if attempt:
                (row,) = order.rows(np.array([position + attempt * samples.num_samples])).tolist()
            sample = samples[row]
            generator = np.random.default_rng([feed.seed, CROPS, position])
            try:
                data = reader.read(sample)
                return sample.image_id, make_crops(data, feed.data.limits, feed.augment, generator)
            except ImageRejected as refusal:
                rejected[sample.image_id] = str(refusal)
        last, reason = next(reversed(rejected.items()))
        raise RejectBudgetError(
            f"{MAX_TRIES} images in a row could not be used; the last was {last}: {reason}. Mend the data and go on "
            "from the last checkpoint."
        )


@contextlib.contextmanager
def open_batches(
    config: DataConfig,
    augment: AugmentConfig,
    output: str,
    *,
    seed: int,
    first_step: int,
    num_steps: int,
    batch_size: int,
    images_per_pass: int,
    rank: int,
    num_ranks: int,
    masks: Callable[[int, range], Tensor],
    rejects: dict[str, str],
    pin_memory: bool = False,
) -> Iterator[Iterator[list[Batch]]]:
    """The passes of this rank, a list for each step from `first_step` to `num_steps` - 1. The same whatever `workers`.

    output: where `prepare` has listed the samples.
    batch_size: images of a step, over all ranks and passes.
    masks: makes (len(crops), N) bool for a step and a range of its global crops, of which c * batch_size + i is crop c
        of image i; it goes to worker processes.
    rejects: images that could not be used, and why, by id; what is found is added when its batch is taken.

    Raises InputError for a shard that is gone, and RejectBudgetError when `rejects` has more than
    `max_reject_fraction` of all samples.
    """
    samples = paths.join(output, SAMPLES_FOLDER)
    feed = _Feed(config, augment, samples, seed, batch_size, images_per_pass, masks, rank, num_ranks)
    asked = ((step, number) for step in range(first_step, num_steps) for number in range(feed.num_passes))
    passes = _Passes(feed)
    if config.workers:
        made = _from_processes(passes, asked, config.workers, pin_memory)
    else:
        made = prefetch(passes.__getitem__, asked, threads=1, ahead=PASSES_AHEAD)
    with contextlib.closing(passes), contextlib.closing(cast(Generator[Batch | UserError], made)):
        yield _steps(made, feed, Samples(samples).num_samples, rejects, pin_memory)


def _steps(
    made: Iterator[Batch | UserError], feed: _Feed, num_samples: int, rejects: dict[str, str], pin_memory: bool
) -> Iterator[list[Batch]]:
    passes = []
    for batch in made:
        if isinstance(batch, UserError):
            raise batch
        rejects |= batch.rejected
        if len(rejects) > feed.data.max_reject_fraction * num_samples:
            last, reason = next(reversed(rejects.items()))
            raise RejectBudgetError(
                f"{len(rejects):,} images could not be used, more than data.max_reject_fraction = "
                f"{feed.data.max_reject_fraction:g} of {num_samples:,} allows; the last was {last}: {reason}. Mend "
                "the data, or raise the budget, and go on from the last checkpoint."
            )
        passes.append(batch.pin_memory() if pin_memory and not feed.data.workers else batch)
        if len(passes) == feed.num_passes:
            yield passes
            passes = []


def _from_processes(
    passes: _Passes, asked: Iterator[tuple[int, int]], workers: int, pin_memory: bool
) -> Iterator[Batch | UserError]:
    # Not by fork, which copies the locks of threads that do not live on in the copy. The server imports once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_server()
    loader = DataLoader(
        passes,
        batch_size=None,
        sampler=cast(Iterable[Any], asked),
        num_workers=workers,
        prefetch_factor=PASSES_AHEAD,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        generator=torch.Generator(),  # else it takes a number from torch's global one
        worker_init_fn=_ignore_signals,
    )
    yield from loader


def _start_server() -> None:
    """Start the process that workers are forked from, deaf to SIGTERM: were it to die, its workers would count as dead.

    What is ignored when a process starts is ignored by it; SIGINT it ignores by itself.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python sets no signals
        forkserver.ensure_running()
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignore_signals(worker: int) -> None:
    """torchrun and terminals signal whole groups of processes; the trainer still wants batches until it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
