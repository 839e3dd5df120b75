"""Reads splits of labelled images: their rows, their classes and their pictures.

Folders of class folders, WebDataset tars and Parquet files are ingested into the cache first. A finished ingest is read
directly. So every image is checked once and known by the hash of its bytes. An image that cannot be decoded stops the
evaluation; it is never left out silently.

    <cache>/ingest/<hash of config and files>/      a finished ingest
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field, model_validator
from torch import Tensor

from curation import ingest
from curation.config import IsPath, Settings
from curation.engine.manifest import require_fact, require_manifest
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

MAX_LISTED = 5  # names in a message. Assumed.

COLUMNS = ["image_id", "source", "role", "uri", "offset", "length", "width", "height", "label", "layout"]


class SplitConfig(Settings):
    """Location of the images of one split, and how their labels are read."""

    path: Annotated[str, IsPath]
    """Folder (or single tar or Parquet file), local or any fsspec URL; with layout "ingest", a finished ingest."""
    layout: Layout | Literal["ingest"] = "folder"
    """How the images are stored. "folder": one folder for each class. "webdataset": the label is the `.cls` of a
    sample, or `label`, `cls` or `class` in its `.json`."""
    image_column: str = "image.bytes"
    """For Parquet: the column of the encoded images. Dots lead into structs."""
    label_column: str | None = None
    """For Parquet: the column of the labels."""
    roles: tuple[Role, ...] = ()
    """For "ingest": take only images of these roles; all when empty."""
    sources: tuple[str, ...] = ()
    """For "ingest": take only images of these datasets; all when empty."""
    classes: tuple[str, ...] = ()
    """Take only images of these classes; all when empty."""
    label_folders: int = Field(default=1, ge=0)
    """For "folder" and "ingest": how many leading folders of an image's path name its class; 0 takes all of them."""
    max_reject_fraction: float = Field(default=0, ge=0, le=1)
    """Maximum share of images that may fail to decode. They are left out; a greater share is an error."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layout == "parquet" and self.label_column is None:
            raise ValueError("layout 'parquet' needs label_column, the column with the label")
        if self.layout != "ingest" and (self.roles or self.sources):
            raise ValueError(f"roles and sources select from a finished ingest, and the layout is '{self.layout}'")
        return self


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, in a fixed order."""

    path: str
    """The path of the config, for messages."""
    table: pa.Table
    """COLUMNS, one row an image."""
    classes: tuple[str, ...]
    """Sorted; numerically where all are whole numbers."""
    labels: Tensor
    """(n,) int64, indices into `classes`."""
    limits: ImageLimits
    """The limits of the ingest that accepted the images."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def images_hash(self) -> str:
        """64 hex digits of the bytes of the images and their order."""
        return hash_json(self.table["image_id"].to_pylist())

    @property
    def data_hash(self) -> str:
        """64 hex digits of the bytes of the images, their order and their labels."""
        return hash_json([self.table["image_id"].to_pylist(), self.table["label"].to_pylist()])

    def take(self, rows: Tensor) -> "Split":
        """The images of some rows, (m,) int64, with the same classes."""
        return Split(self.path, self.table.take(pa.array(rows.numpy())), self.classes, self.labels[rows], self.limits)


def load(config: SplitConfig, cache: str, runner: Runner) -> Split:
    """The split of `config`. Anything but a finished ingest is ingested into `cache`.

    Raises InputError for a split that is missing or empty and for images without a label, and RejectBudgetError.
    """
    folder = config.path if config.layout == "ingest" else _ingested(config, cache, runner)
    limits = require_fact(folder, require_manifest(folder), "limits")
    table = read_images(folder, COLUMNS)
    for column, values in (("role", config.roles), ("source", config.sources)):
        if values:
            table = table.filter(pc.is_in(table[column], pa.array(values)))
    unlabelled = table.filter(pc.is_null(table["label"]))
    if unlabelled.num_rows:
        raise InputError(
            f"{config.path}: {unlabelled.num_rows:,} of {table.num_rows:,} images have no label, such as "
            f"{unlabelled['uri'][0].as_py()}. Put each into the folder of its class, or select by roles and sources."
        )
    labels = [_class_of(label, config) for label in table["label"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels, pa.string()))
    if config.classes:
        absent = sorted(set(config.classes) - set(labels))
        if absent:
            raise InputError(f"{config.path}: no images of the classes {abbreviated(absent)}, which the config names.")
        table = table.filter(pc.is_in(table["label"], pa.array(config.classes)))
    if table.num_rows == 0:
        raise InputError(f"{config.path}: no images of roles {config.roles} and sources {config.sources}.")
    labels = table["label"].to_pylist()
    classes = _ordered(set(labels))
    index_of_class = {name: index for index, name in enumerate(classes)}
    indices = torch.tensor([index_of_class[label] for label in labels])
    return Split(config.path, table, classes, indices, ImageLimits.model_validate(limits, strict=False))


def load_pair(
    train: SplitConfig, test: SplitConfig, cache: str, runner: Runner, *, subset: bool = False
) -> tuple[Split, Split]:
    """Two splits with the same classes. With `subset` the second may lack some. Raises as `load` and `with_classes`."""
    first = load(train, cache, runner)
    if len(first.classes) < 2:
        raise InputError(f"{train.path} has one class, {first.classes[0]}. A classifier needs at least two.")
    return first, with_classes(load(test, cache, runner), first, subset=subset)


def with_classes(split: Split, train: Split, *, subset: bool = False) -> Split:
    """`split` with its labels as indices into the classes of `train`. With `subset` it may lack some of them.

    Raises InputError with a list of the differing classes.
    """
    unknown, absent = set(split.classes) - set(train.classes), set(train.classes) - set(split.classes)
    if unknown or (absent and not subset):
        parts = [f"{len(unknown)} classes that {train.path} lacks ({abbreviated(sorted(unknown))})"] if unknown else []
        parts += (
            [f"no images of {len(absent)} of its classes ({abbreviated(sorted(absent))})"]
            if absent and not subset
            else []
        )
        raise InputError(
            f"{split.path} has {' and '.join(parts)}. Check the paths of the splits, select classes with `classes`, or "
            "set allow_missing_classes for a test set with fewer classes."
        )
    indices = torch.tensor([train.classes.index(name) for name in split.classes])
    return Split(split.path, split.table, train.classes, indices[split.labels], split.limits)


def pictures(
    split: Split,
    rows: Sequence[int],
    prepare: Callable[[Picture], Prepared],
    *,
    target_side: int,
    threads: int = 2,
    ahead: int = 64,
) -> Iterator[tuple[dict[str, Any], Prepared]]:
    """Decoded images of some rows, in their order, passed through `prepare`; each with its row of COLUMNS.

    target_side: side in pixels to which `prepare` scales the shorter side down. Threads decode in advance.
    """
    reader = ReferenceReader()

    def read() -> Iterator[tuple[dict[str, Any], bytes]]:
        for row in split.table.take(pa.array(rows, pa.int64())).to_pylist():
            yield row, reader.read(row["uri"], row["offset"], row["length"], row["image_id"], row["layout"])

    def decode(item: tuple[dict[str, Any], bytes]) -> tuple[dict[str, Any], Prepared]:
        return item[0], prepare(decode_picture(item[1], split.limits, target_side=target_side))

    try:
        yield from prefetch(decode, read(), threads=threads, ahead=ahead)
    finally:
        reader.close()


def few_shot(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Rows of up to `per_class` images of each class, drawn by `seed`: ascending, int64."""
    random = np.random.default_rng([seed, per_class])
    drawn = [random.permutation(rows)[:per_class] for rows in _rows_by_class(labels)]
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rows to train on, and the held-out rows to select by: a `share` of each class, rounded, drawn by `seed`.

    A class keeps at least one image to train on. Both ascending, int64.
    """
    random = np.random.default_rng([seed])
    held = np.zeros(len(labels), bool)
    for class_rows in _rows_by_class(labels):
        rows = random.permutation(class_rows)
        held[rows[: min(round(share * len(rows)), max(len(rows) - 1, 0))]] = True
    if not held.any() or held.all():
        raise InputError(
            f"A share of {share:g} of {len(labels)} training images holds out none to select by. Raise the share, or "
            "give more images."
        )
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def _rows_by_class(labels: Tensor) -> list[np.ndarray]:
    classes = labels.numpy()
    return [np.flatnonzero(classes == label) for label in range(int(classes.max(initial=-1)) + 1)]


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
    # A labelled image of any size counts.
    limits = ImageLimits(min_side=1)
    settings = IngestConfig(sources=(source,), limits=limits, max_reject_fraction=config.max_reject_fraction)
    listing = sources.listing_hash(sources.list_source(source).files)
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


def abbreviated(names: Sequence[str]) -> str:
    """The first MAX_LISTED of `names`, and the number of the others."""
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
