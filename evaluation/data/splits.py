"""Labelled images, wherever they lie: what a split holds, its classes, and its pictures.

A folder of class folders, WebDataset tars and Parquet files are first read by ingest, into the cache; a finished ingest
is read as it is. So every image is checked once and known by the hash of its bytes, and an image that cannot be decoded
stops the evaluation instead of leaving it.

    <cache>/ingest/<hash of what is read>/      a finished ingest
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field, model_validator
from torch import Tensor

from curation import ingest
from curation.config import Settings
from curation.engine.manifest import require_manifest
from curation.engine.ranks import first_rank_first
from curation.engine.runner import Runner
from curation.errors import InputError
from curation.files import paths
from curation.files.hashes import hash_json
from curation.files.prefetch import prefetch
from curation.images import sources
from curation.images.decode import ImageLimits, Picture, decode_picture
from curation.images.sources import Layout, ReferenceReader, Role, SourceConfig
from curation.ingest import IngestConfig
from curation.run_folder import read_images

Prepared = TypeVar("Prepared")

MAX_LISTED = 5  # assumed: as many names as a person reads

COLUMNS = ["image_id", "source", "role", "uri", "offset", "length", "width", "height", "label"]


class SplitConfig(Settings):
    """Where the images of one split are, and what their labels mean."""

    path: str
    """Folder (or single tar or Parquet file), local or any fsspec URL; with layout "ingest", that of a finished one."""
    layout: Layout | Literal["ingest"] = "folder"
    """How the images are stored. "folder": a folder a class. "webdataset": the label is the `.cls` of a sample, or the
    `label`, `cls` or `class` of its `.json`."""
    image_column: str = "image.bytes"
    """For Parquet: the column with the encoded image, dots leading into structs."""
    label_column: str | None = None
    """For Parquet: the column with the label."""
    roles: tuple[Role, ...] = ()
    """For "ingest": take the images of these roles alone; all when empty."""
    sources: tuple[str, ...] = ()
    """For "ingest": take the images of these datasets alone; all when empty."""
    classes: tuple[str, ...] = ()
    """Take the images of these classes alone; all when empty."""
    label_folders: int = Field(default=1, ge=0)
    """For "folder" and "ingest": how many folders of a path of folders make the class; 0 takes all of them."""
    max_reject_fraction: float = Field(default=0, ge=0, le=1)
    """The share of images that may fail to decode before the evaluation stops; those that do are left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layout == "parquet" and self.label_column is None:
            raise ValueError("layout 'parquet' needs label_column, the column with the label")
        if self.layout != "ingest" and (self.roles or self.sources):
            raise ValueError(f"roles and sources choose from a finished ingest, and the layout is '{self.layout}'")
        return self


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, in a fixed order."""

    path: str
    """As in the config, for messages."""
    table: pa.Table
    """COLUMNS, one row an image."""
    classes: tuple[str, ...]
    """Sorted; where all are whole numbers, by number."""
    labels: Tensor
    """(n,) int64, places in `classes`."""
    limits: ImageLimits
    """What the images were accepted by."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def images_hash(self) -> str:
        """64 hex digits: of the bytes of the images and their order."""
        return hash_json(self.table["image_id"].to_pylist())

    @property
    def data_hash(self) -> str:
        """64 hex digits: of the bytes of the images, their order, and their labels."""
        return hash_json([self.table["image_id"].to_pylist(), self.table["label"].to_pylist()])

    def take(self, rows: Tensor) -> "Split":
        """The images of some rows, (m,) int64; the classes stay."""
        return Split(self.path, self.table.take(pa.array(rows.numpy())), self.classes, self.labels[rows], self.limits)


def load(config: SplitConfig, cache: str, runner: Runner) -> Split:
    """The split of `config`; what is no finished ingest is ingested into `cache`.

    Raises InputError for a split that is missing or empty, or images without a label, and RejectBudgetError.
    """
    folder = config.path if config.layout == "ingest" else _ingested(config, cache, runner)
    limits = require_manifest(folder).facts["limits"]
    table = read_images(folder, COLUMNS)
    for column, wanted in (("role", config.roles), ("source", config.sources)):
        if wanted:
            table = table.filter(pc.is_in(table[column], pa.array(wanted)))
    unlabelled = table.filter(pc.is_null(table["label"]))
    if unlabelled.num_rows:
        raise InputError(
            f"{config.path}: {unlabelled.num_rows:,} of {table.num_rows:,} images have no label, such as "
            f"{unlabelled['uri'][0].as_py()}. Put each into the folder of its class, or choose roles and sources."
        )
    labels = [_class_of(label, config) for label in table["label"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels, pa.string()))
    if config.classes:
        absent = sorted(set(config.classes) - set(labels))
        if absent:
            raise InputError(f"{config.path}: no images of the classes {listed(absent)}, which the config names.")
        table = table.filter(pc.is_in(table["label"], pa.array(config.classes)))
    if table.num_rows == 0:
        raise InputError(f"{config.path}: no images of roles {config.roles} and sources {config.sources}.")
    labels = table["label"].to_pylist()
    classes = _ordered(set(labels))
    place = {name: index for index, name in enumerate(classes)}
    numbers = torch.tensor([place[label] for label in labels])
    return Split(config.path, table, classes, numbers, ImageLimits.model_validate(limits, strict=False))


def load_pair(
    train: SplitConfig, test: SplitConfig, cache: str, runner: Runner, *, subset: bool = False
) -> tuple[Split, Split]:
    """Two splits with the same classes; with `subset` the second may lack some. Raises as `load`, `with_classes`."""
    first = load(train, cache, runner)
    if len(first.classes) < 2:
        raise InputError(f"{train.path} has one class, {first.classes[0]}; there is nothing to tell apart.")
    return first, with_classes(load(test, cache, runner), first, subset=subset)


def with_classes(split: Split, train: Split, *, subset: bool = False) -> Split:
    """`split` with its labels as places in the classes of `train`. With `subset` it may lack some of them.

    Raises InputError that lists the classes that differ.
    """
    unknown, absent = set(split.classes) - set(train.classes), set(train.classes) - set(split.classes)
    if unknown or (absent and not subset):
        parts = [f"{len(unknown)} classes that {train.path} has not ({listed(sorted(unknown))})"] if unknown else []
        parts += (
            [f"no images of {len(absent)} of its classes ({listed(sorted(absent))})"] if absent and not subset else []
        )
        raise InputError(
            f"{split.path} has {' and '.join(parts)}. Check the paths of the splits, name the `classes` to take, or "
            "set allow_missing_classes for a test set of fewer classes."
        )
    places = torch.tensor([train.classes.index(name) for name in split.classes])
    return Split(split.path, split.table, train.classes, places[split.labels], split.limits)


def pictures(
    split: Split,
    rows: Sequence[int],
    prepare: Callable[[Picture], Prepared],
    *,
    target_side: int,
    threads: int = 2,
    ahead: int = 64,
) -> Iterator[tuple[dict[str, Any], Prepared]]:
    """What `prepare` makes of the pictures of some rows, in their order, each with its row of COLUMNS.

    target_side: side in pixels to which `prepare` scales the shorter side down. Threads work ahead.
    """
    reader = ReferenceReader()

    def read() -> Iterator[tuple[dict[str, Any], bytes]]:
        for row in split.table.take(pa.array(rows, pa.int64())).to_pylist():
            yield row, reader.read(row["uri"], row["offset"], row["length"], row["image_id"])

    def decode(item: tuple[dict[str, Any], bytes]) -> tuple[dict[str, Any], Prepared]:
        return item[0], prepare(decode_picture(item[1], split.limits, target_side=target_side))

    try:
        yield from prefetch(decode, read(), threads=threads, ahead=ahead)
    finally:
        reader.close()


def few_shot(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """The rows of `per_class` images of each class, or all of fewer, drawn by `seed`: ascending, int64."""
    random = np.random.default_rng([seed, per_class])
    own = labels.numpy()
    chosen = [
        random.permutation(np.flatnonzero(own == label))[:per_class] for label in range(int(own.max(initial=-1)) + 1)
    ]
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rows to train on and those held out to choose by: a `share` of each class, rounded, drawn by `seed`.

    A class keeps at least one image to train on. Both ascending, int64.
    """
    random = np.random.default_rng([seed])
    own = labels.numpy()
    held = np.zeros(len(own), bool)
    for label in range(int(own.max(initial=-1)) + 1):
        rows = random.permutation(np.flatnonzero(own == label))
        held[rows[: min(round(share * len(rows)), max(len(rows) - 1, 0))]] = True
    if not held.any() or held.all():
        raise InputError(
            f"A share of {share:g} of {len(own)} training images leaves none to choose by. Raise the share, or give "
            "more images."
        )
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def _ingested(config: SplitConfig, cache: str, runner: Runner) -> str:
    assert config.layout != "ingest"
    source = SourceConfig(
        name="split",
        path=config.path,
        role="holdout",
        layout=config.layout,
        image_column=config.image_column,
        label_column=config.label_column,
    )
    # However small a labelled image is, it counts.
    limits = ImageLimits(min_side=1)
    settings = IngestConfig(sources=(source,), limits=limits, max_reject_fraction=config.max_reject_fraction)
    listing = sources.listing_hash(sources.list_files(source))
    name = hash_json([settings.model_dump(mode="json"), listing])[:32]
    folder = paths.join(cache, "ingest", name)
    with first_rank_first():
        ingest.run(settings, folder, runner)
    return folder


def _class_of(label: str, config: SplitConfig) -> str:
    if config.label_folders == 0 or config.layout not in ("folder", "ingest"):
        return label
    return "/".join(label.split("/")[: config.label_folders])


def _ordered(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name)))


def listed(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
