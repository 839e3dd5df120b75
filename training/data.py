"""The batches of every step, on any number of ranks: images are read, decoded and cropped ahead of the model.

An image that cannot be decoded, or whose bytes have changed, is counted and listed. The sample at the same position of
the next epoch replaces it, and so on until one can be used. A batch therefore depends on the data, the config and its
step alone.

Crops travel as bytes; `Batch.to` normalises them on the device.

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
from typing import Any, Protocol, cast, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from curation.errors import ConfigError, InputError, RejectBudgetError, UserError
from curation.files import paths
from curation.files.prefetch import prefetch
from curation.images.decode import ImageRejected, RejectReason
from curation.images.hashing import image_id
from curation.images.sources import ReferenceReader
from curation.models.embedders import IMAGENET_NORMALIZATION
from training.augment import AugmentConfig, Pixels, make_crops, use_one_thread
from training.masking import mask_token_weights
from training.order import SampleOrder
from training.samples import SAMPLES_FOLDER, DataConfig, SampleList, SampleReference

# Files that a worker holds open. Assumed: below the 256 files that macOS allows a process by default.
MAX_OPEN_FILES = 128
# Images that are tried for one position before training stops. Assumed: if half of all images are bad, one position in
# 65,536 needs more.
MAX_TRIES = 16
# Passes that each worker prepares ahead. Assumed: two make up for a slow shard, and each costs memory.
PASSES_AHEAD = 2
# Purpose of a generator, a part of its seed: the crops of an image. order.py has the other purposes.
CROPS_PURPOSE = 0x6372


class DrawMasks(Protocol):
    """Draws the masks of some global crops of a step. Worker processes call it, so it must pickle."""

    def __call__(self, *, step: int, crops: range) -> Tensor:
        """(len(crops), N) bool. Crop c of image i of the step has the index c * batch_size + i."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one pass on one rank. Crops and masks are ordered by crop, then by image."""

    crops: tuple[Tensor, ...]
    """One per group of crops: (V * n, 3, S, S). uint8 as loaded; normalised float32 after `to`."""
    masks: Tensor
    """(2 * n, N) bool, of the global crops; True is hidden from the student."""
    masked_indices: Tensor
    """(M,) int64: indices of the masked patches among the 2 * n * N patches of the global crops."""
    masked_weights: Tensor
    """(M,) float32: the weight of each masked patch in the loss."""
    image_ids: list[str]
    """n."""
    positions: Tensor
    """(n,) int64: positions in the order of the samples, see order.py."""
    rejected: dict[str, str]
    """Images that could not be used and were replaced: image_id to reason."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device; its crops are float32, normalised with ImageNet's mean and standard deviation."""
        assert all(crop.dtype == torch.uint8 for crop in self.crops), "normalised already"
        mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in IMAGENET_NORMALIZATION)
        moved = self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, crops=tuple(crop.float().sub_(mean).div_(deviation) for crop in moved.crops))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, which a GPU copies from while it computes. torch's DataLoader calls this."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            crops=tuple(map(function, self.crops)),
            masks=function(self.masks),
            masked_indices=function(self.masked_indices),
            masked_weights=function(self.masked_weights),
        )


@final
class SampleReader:
    """Reads images by reference, in any order. Local files are read with `pread`; the last ones used stay open.

    Changed bytes are detected by the size of a file, and in a tar by the member's header. The header must have the
    image's size and, if `names_are_ids` (in a corpus), a name that begins with the image_id. With `verify_hashes`, the
    hash of the bytes must also match the image_id. The whole tar is not hashed instead: samples come in random order,
    so each process would read every tar twice. Measured 2026-11: 9 microseconds to read 130 kB, and 85 to hash them on
    a processor with SHA instructions (370 without), where decoding and cropping take 9,000.
    """

    def __init__(self, *, names_are_ids: bool, verify_hashes: bool) -> None:
        self._names_are_ids, self._verify_hashes = names_are_ids, verify_hashes
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._parquet = ReferenceReader()

    def read(self, sample: SampleReference) -> bytes:
        """The bytes of a sample. Raises ImageRejected when they have changed, InputError when the shard is lost."""
        uri, offset, length = sample.uri, sample.offset, sample.length
        if sample.layout == "parquet":
            return self._parquet.read(uri, offset, length, sample.image_id, sample.layout)
        try:
            if offset == 0:  # a separate file; one byte more would show that it has grown
                header, data = b"", self._slice(uri, 0, length + 1)
            else:
                block = self._slice(uri, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + length)
                header, data = block[: tarfile.BLOCKSIZE], block[tarfile.BLOCKSIZE :]
        except OSError as error:
            raise self._read_error(sample, f"cannot be read any more ({error})") from None
        if len(data) < length:
            raise self._read_error(sample, f"is cut off: it ends before byte {offset + length:,}, the end of an image")
        if len(data) > length or (header and not self._header_matches(header, sample)):
            raise ImageRejected(RejectReason.CORRUPT, f"{uri} has changed: image {sample.image_id} is not at {offset}")
        if self._verify_hashes and image_id(data) != sample.image_id:
            raise ImageRejected(RejectReason.CORRUPT, f"{uri} has changed: the bytes at {offset} have another hash")
        return data

    def _header_matches(self, header: bytes, sample: SampleReference) -> bool:
        """Whether this is the header of the sample's member in its tar."""
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        return member.size == sample.length and (member.name.startswith(sample.image_id) or not self._names_are_ids)

    def _slice(self, uri: str, offset: int, length: int) -> bytes:
        if uri in self._descriptors:
            self._descriptors.move_to_end(uri)
        else:
            fs, path = paths.filesystem(uri)
            if not paths.is_local(uri):
                return bytes(fs.cat_file(path, start=offset, end=offset + length))
            if len(self._descriptors) >= MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[uri] = os.open(path, os.O_RDONLY)
        return os.pread(self._descriptors[uri], length, offset)

    @staticmethod
    def _read_error(sample: SampleReference, problem: str) -> UserError | ImageRejected:
        if sample.offset == 0:  # a separate file; in a tar a header comes first
            return ImageRejected(RejectReason.UNREADABLE, f"{sample.uri} {problem}")
        return InputError(
            f"The shard {sample.uri} {problem}. Restore it and resume from the last checkpoint. If it is lost, pack or "
            "ingest again and train into another output."
        )

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self._parquet.close()


@dataclass(frozen=True)
class _LoaderSettings:
    """Everything that the batches of one rank depend on."""

    data: DataConfig
    augment: AugmentConfig
    samples_folder: str
    """The folder of samples.arrow."""
    seed: int
    batch_size: int
    """Images of a step, over all ranks and passes."""
    images_per_pass: int
    draw_masks: DrawMasks
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


@dataclass(frozen=True)
class _Source:
    """The open samples of one process."""

    samples: SampleList
    order: SampleOrder
    reader: SampleReader


@final
class _PassDataset(Dataset[Batch | UserError]):
    """The passes of one rank by (step, index of the pass), loaded in the process that asks for them."""

    def __init__(self, settings: _LoaderSettings) -> None:
        self._settings = settings
        self._source: _Source | None = None

    def __getitem__(self, key: tuple[int, int]) -> Batch | UserError:
        """One pass, or a UserError as a value: DataLoader would wrap a raised one in the worker's traceback."""
        try:
            return self._load(*key)
        except UserError as error:
            return error

    def close(self) -> None:
        """Close the files that were opened in this process."""
        if self._source is not None:
            self._source.reader.close()

    def _open_source(self) -> _Source:
        """The samples, opened at the first call in this process."""
        if self._source is None:
            use_one_thread()
            settings = self._settings
            samples = SampleList(settings.samples_folder)
            self._source = _Source(
                samples,
                SampleOrder(settings.seed, samples.num_samples, samples.cumulative_weights),
                SampleReader(names_are_ids=settings.data.layout == "corpus", verify_hashes=settings.data.verify_hashes),
            )
        return self._source

    def _load(self, step: int, pass_index: int) -> Batch:
        settings, source = self._settings, self._open_source()
        first = settings.rank * settings.batch_size // settings.num_ranks + pass_index * settings.images_per_pass
        positions = step * settings.batch_size + np.arange(first, first + settings.images_per_pass)
        rows = source.order.rows(positions)  # all at once: one by one would cost a thirtieth of the loading time
        rejected: dict[str, str] = {}
        images = [self._image(*key, rejected) for key in zip(positions.tolist(), rows.tolist(), strict=True)]
        image_ids, crops = zip(*images, strict=True)
        # Ordered by crop, then by image: (V, n, 3, S, S), then (V * n, 3, S, S).
        groups = [torch.from_numpy(np.stack(group, axis=1)).flatten(0, 1) for group in zip(*crops, strict=True)]
        masks = torch.cat(
            [
                settings.draw_masks(step=step, crops=range(start, start + settings.images_per_pass))
                for start in (first, settings.batch_size + first)
            ]
        )
        return Batch(
            crops=tuple(groups),
            masks=masks,
            masked_indices=masks.flatten().nonzero()[:, 0],
            masked_weights=mask_token_weights(masks),
            image_ids=list(image_ids),
            positions=torch.from_numpy(positions),
            rejected=rejected,
        )

    def _image(self, position: int, row: int, rejected: dict[str, str]) -> tuple[str, tuple[Pixels, ...]]:
        """Id and crops of the sample at `row`, or of the first usable replacement. Adds bad images to `rejected`."""
        settings, source = self._settings, self._open_source()
        for attempt in range(MAX_TRIES):
            if attempt:  # the same position of a later epoch
                (row,) = source.order.rows(np.array([position + attempt * source.samples.num_samples])).tolist()
            sample = source.samples[row]
            generator = np.random.default_rng([settings.seed, CROPS_PURPOSE, position])
            try:
                data = source.reader.read(sample)
                return sample.image_id, make_crops(data, settings.data.limits, settings.augment, generator)
            except ImageRejected as refusal:
                rejected[sample.image_id] = str(refusal)
        last, reason = next(reversed(rejected.items()))
        raise RejectBudgetError(
            f"{MAX_TRIES} images in a row could not be used; the last was {last}: {reason}. Repair the data and resume "
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
    draw_masks: DrawMasks,
    rejects: dict[str, str],
    pin_memory: bool = False,
) -> Iterator[Iterator[list[Batch]]]:
    """The passes of this rank: a list for each step from `first_step` to `num_steps` - 1, the same for any `workers`.

    output: the folder in which `prepare` has listed the samples.
    batch_size: images of a step, over all ranks and passes.
    rejects: images that could not be used, image_id to reason. A batch's rejects are added when the batch is taken.

    Raises InputError for a lost shard, and RejectBudgetError when `rejects` holds more than `max_reject_fraction` of
    all samples.
    """
    samples_folder = paths.join(output, SAMPLES_FOLDER)
    settings = _LoaderSettings(
        config, augment, samples_folder, seed, batch_size, images_per_pass, draw_masks, rank, num_ranks
    )
    keys = ((step, pass_index) for step in range(first_step, num_steps) for pass_index in range(settings.num_passes))
    dataset = _PassDataset(settings)
    if config.workers:
        loaded = _load_in_processes(dataset, keys, config.workers, pin_memory)
    else:
        loaded = prefetch(dataset.__getitem__, keys, threads=1, ahead=PASSES_AHEAD)
    with contextlib.closing(dataset), contextlib.closing(cast(Generator[Batch | UserError], loaded)):
        yield _group_by_step(loaded, settings, SampleList(samples_folder).num_samples, rejects, pin_memory)


def _group_by_step(
    loaded: Iterator[Batch | UserError],
    settings: _LoaderSettings,
    num_samples: int,
    rejects: dict[str, str],
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """The passes of each step. Raises the errors among `loaded`, and checks the budget of rejects."""
    passes = []
    for batch in loaded:
        if isinstance(batch, UserError):
            raise batch
        rejects |= batch.rejected
        if len(rejects) > settings.data.max_reject_fraction * num_samples:
            last, reason = next(reversed(rejects.items()))
            raise RejectBudgetError(
                f"{len(rejects):,} images could not be used, more than data.max_reject_fraction = "
                f"{settings.data.max_reject_fraction:g} of {num_samples:,} allows; the last was {last}: {reason}. "
                "Repair the data or raise the budget, and resume from the last checkpoint."
            )
        passes.append(batch.pin_memory() if pin_memory and not settings.data.workers else batch)
        if len(passes) == settings.num_passes:
            yield passes
            passes = []


def _load_in_processes(
    dataset: _PassDataset, keys: Iterator[tuple[int, int]], workers: int, pin_memory: bool
) -> Iterator[Batch | UserError]:
    # Not by fork: it copies locks that other threads hold, and those threads do not exist in the copy. The fork server
    # imports the modules once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_fork_server()
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=cast(Iterable[Any], keys),
        num_workers=workers,
        prefetch_factor=PASSES_AHEAD,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        generator=torch.Generator(),  # otherwise it draws a number from torch's global generator
        worker_init_fn=_ignore_signals,
    )
    yield from loader


def _start_fork_server() -> None:
    """Start the process that workers are forked from; it ignores SIGTERM.

    If it died, DataLoader would treat its workers as dead. A process ignores the signals that were ignored when it
    started. The fork server ignores SIGINT by itself.
    """
    if threading.current_thread() is not threading.main_thread():  # Python cannot set signal handlers here
        forkserver.ensure_running()
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, handler)


def _ignore_signals(worker: int) -> None:
    """Ignore SIGTERM and SIGINT in a worker.

    torchrun and terminals signal whole process groups, and the trainer needs batches until it has saved.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
