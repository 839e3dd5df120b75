"""Reads query and database photographs of the published retrieval data sets, and any labelled images."""

import json
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curation.config import IsPath, Settings
from curation.errors import InputError
from curation.files import paths
from curation.images.sources import SourceConfig, list_files
from evaluation.data import plain_pickle
from evaluation.data.splits import SplitConfig, abbreviated
from evaluation.data.views import PicturesConfig, ViewConfig


class RevisitedData(Settings):
    """Revisited Oxford or Paris."""

    layout: Literal["revisited"]
    """The kind of data; it decides which other keys the table has."""
    path: Annotated[str, IsPath]
    """Folder with jpg/ and gnd_roxford5k.pkl or gnd_rparis6k.pkl, local or any fsspec URL."""
    query: Literal["box", "whole"] = "box"
    """The part of a query image that is compared: the box around the building, as the benchmark defines it, or all of
    it. The choice changes scores by several points; every result states it."""
    view: ViewConfig = ViewConfig()
    """How the model sees the photographs."""


class MetData(Settings):
    """The Met dataset."""

    layout: Literal["met"]
    """The kind of data; it decides which other keys the table has."""
    path: Annotated[str, IsPath]
    """Folder with ground_truth/ and images/, local or any fsspec URL."""
    database: str = "MET_database.json"
    """The list of the database; mini_MET_database.json is a part of it."""
    neighbors: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 15, 20, 50)
    """Numbers of voting neighbours; the one with the best GAP on the validation set is used. Cited: its published
    grid."""
    scales: tuple[float, ...] = (0.01, 0.1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 50.0, 100.0, 500.0)
    """Factors of the cosines before their softmax, chosen likewise. Cited: its published grid."""
    view: ViewConfig = ViewConfig()
    """How the model sees the photographs."""


class AmsterTimeData(Settings):
    """AmsterTime."""

    layout: Literal["amstertime"]
    """The kind of data; it decides which other keys the table has."""
    path: Annotated[str, IsPath]
    """Folder with old/ and new/, local or any fsspec URL."""
    view: ViewConfig = ViewConfig()
    """How the model sees the photographs."""


class LabelledData(Settings):
    """Any labelled images."""

    layout: Literal["labelled"]
    """The kind of data; it decides which other keys the table has."""
    split: SplitConfig
    """Where they are."""
    pictures: PicturesConfig = PicturesConfig()
    """How the model sees them."""


# ------------------------------------------------------------------------------------------------- published layouts


class Photo(NamedTuple):
    """An image file, and the part of it that counts."""

    path: Annotated[str, IsPath]
    box: tuple[int, int, int, int] | None = None
    """Left, upper, right, lower in pixels; the whole image when None."""


class Revisited(NamedTuple):
    """Revisited Oxford or Paris, as published."""

    queries: list[Photo]
    database: list[Photo]
    rows: list[dict[str, Tensor]]
    """For each query, the "easy", "hard" and "junk" rows of the database."""


def read_revisited(data: RevisitedData) -> Revisited:
    """The lists and the ground truth. Raises InputError for a file that is missing or not as published."""
    names = [name for name in paths.list_names(data.path) if name.startswith("gnd_") and name.endswith(".pkl")]
    if len(names) != 1:
        raise InputError(
            f"{data.path}: expected one ground truth, gnd_roxford5k.pkl or gnd_rparis6k.pkl, beside jpg/. Found: "
            f"{', '.join(names) or 'none'}."
        )
    path = paths.join(data.path, names[0])
    content = plain_pickle.loads(paths.read_bytes(path), path)  # calls nothing that the file names
    try:
        images, queries, truths = ([*content[key]] for key in ("imlist", "qimlist", "gnd"))
        if not queries or len(queries) != len(truths) or not all(isinstance(one, str) for one in (*images, *queries)):
            raise ValueError(f"{len(queries)} queries and {len(truths)} truths")
        rows = [{key: _rows(truth[key], len(images)) for key in ("easy", "hard", "junk")} for truth in truths]
        boxes = [_box(truth["bbx"]) if data.query == "box" else None for truth in truths]
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: not the ground truth of Revisited Oxford or Paris ({type(error).__name__}: {error}). Take the "
            "published file."
        ) from None

    def path_of(name: str) -> str:
        return paths.join(data.path, "jpg", f"{name}.jpg")

    query_photos = [Photo(path_of(name), box) for name, box in zip(queries, boxes, strict=True)]
    return Revisited(query_photos, [Photo(path_of(name)) for name in images], rows)


def _rows(value: Any, num_images: int) -> Tensor:
    numbers = _numbers(value)
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"rows of type {numbers.dtype}")
    rows = torch.from_numpy(numbers.astype(np.int64).reshape(-1))
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < num_images):
        raise ValueError(f"row {int(rows.max())} of {num_images} images")
    return rows


def _box(value: Any) -> tuple[int, int, int, int]:
    left, upper, right, lower = (round(float(side)) for side in _numbers(value).reshape(-1))
    return left, upper, right, lower


def _numbers(value: Any) -> np.ndarray:
    if isinstance(value, plain_pickle.Array):
        return value.values
    if isinstance(value, (list, tuple)) and all(isinstance(one, (int, float, np.number)) for one in value):
        return np.asarray(value)
    raise ValueError(f"expected numbers, found {type(value).__name__}")


class Met(NamedTuple):
    """Images of the Met dataset with their labels, -1 for a distractor."""

    photos: list[Photo]
    labels: Tensor


def read_met(data: MetData, name: str) -> Met:
    """One list of the ground truth, "MET_database.json", "testset.json" or "valset.json". Raises InputError."""
    path = paths.join(data.path, "ground_truth", name)
    try:
        entries = json.loads(paths.read_bytes(path))
        key = "id" if name == data.database else "MET_id"
        labels = [int(entry[key]) if key in entry or name == data.database else -1 for entry in entries]
        photos = [Photo(paths.join(data.path, "images", str(entry["path"]))) for entry in entries]
        if not photos:
            raise ValueError("no images")
    except FileNotFoundError:
        raise InputError(
            f"No ground truth at '{path}'. Give the folder that holds ground_truth/ and images/."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a list of the Met dataset ({type(error).__name__}: {error}).") from None
    return Met(photos, torch.tensor(labels))


def read_amstertime(data: AmsterTimeData) -> tuple[list[Photo], list[Photo]]:
    """The images of the archive, and those of the streets in the same order. Raises InputError for unpaired images."""
    sides = []
    for side in ("old", "new"):
        folder = paths.join(data.path, side)
        if not paths.is_folder(folder):
            raise InputError(f"No folder '{folder}'. Give the folder that holds old/ and new/.")
        files = list_files(SourceConfig(name="amstertime", path=folder, role="holdout"))
        photos = {file.path.rpartition(".")[0]: Photo(paths.join(folder, file.path)) for file in files}
        if len(photos) < len(files):
            raise InputError(f"{folder}: {len(files)} files have only {len(photos)} names without their extensions.")
        sides.append(photos)
    old, new = sides
    unpaired = sorted(old.keys() ^ new.keys())
    if unpaired or not old:
        raise InputError(
            f"{data.path}: old/ and new/ hold {len(old)} and {len(new)} images, and {len(unpaired)} names are in only "
            f"one of them: {abbreviated(unpaired)}."
        )
    return [old[name] for name in sorted(old)], [new[name] for name in sorted(old)]
