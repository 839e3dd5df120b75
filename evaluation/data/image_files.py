"""Reads files of the data sets. Every error names the file."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from curation.errors import InputError
from curation.files import paths
from curation.images.decode import ImageLimits, ImageRejected, decode_rgb


def read_bytes(path: str) -> bytes:
    """The bytes of a file. Raises InputError where it is missing or cannot be read."""
    try:
        return paths.read_bytes(path)
    except FileNotFoundError:
        raise InputError(f"No file at '{path}'. The data set is incomplete, or not in its published layout.") from None
    except OSError as error:
        raise InputError(f"Cannot read '{path}': {error}.") from None


@contextmanager
def rejects_named(path: str) -> Iterator[None]:
    """Turns an ImageRejected into an InputError that names the file at `path`."""
    try:
        yield
    except ImageRejected as error:
        raise InputError(f"{path}: the image cannot be used: {error}.") from None


def read_rgb(path: str, limits: ImageLimits) -> Tensor:
    """A picture as (3, H, W) uint8. Raises InputError that names the file."""
    with rejects_named(path):
        picture = decode_rgb(read_bytes(path), limits)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
