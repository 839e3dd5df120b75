"""The batches of every step, on any number of ranks: reading, decoding and cropping ahead of the model.

An image that cannot be decoded, or that is no longer where it was, is counted and listed, and the sample that the next
epoch has at the same place takes its place, as often as needed. So a batch depends on the data, the config and its step
alone.

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
from typing import Any, cast, final

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curation.errors import ConfigError, InputError, RejectBudgetError, UserError
from curation.files import paths
from curation.files.prefetch import prefetch
from curation.images.decode import ImageRejected, RejectReason
from curation.images.hashing import image_id
from curation.images.sources import PARQUET_URI, ReferenceReader
from curation.models.embedders import IMAGENET_NORMALIZATION
from training.augment import AugmentConfig, Pixels, make_crops
from training.masking import mask_token_weights
from training.order import Order
from training.samples import SAMPLES_FOLDER, DataConfig, Sample, Samples

# Shards that a worker holds open. Assumed: below the 256 files that macOS allows a process by default.
OPEN_FILES = 128
# Images that are tried for one position before training stops. Assumed: among images of which half are bad, one
# position in 65,536 has as many.
MAX_TRIES = 16
# Passes that each worker has ready. Assumed: a slow shard is made up for, and two are memory.
PASSES_AHEAD = 2
# What the generator of crops is for; the others are in order.py.
CROPS = 0x6372


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
