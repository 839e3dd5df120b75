"""The view of an image that a model gets: a square of its middle, or the whole image at a chosen shape."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from curation.config import NotInPlan, Settings
from curation.images.decode import Picture, to_shape
from evaluation.data import splits
from evaluation.data.splits import Split


class PicturesConfig(Settings):
    """How the model sees labelled images: the middle square, scaled, and of that the middle again."""

    resize_size: int = Field(default=256, ge=8, le=4096)
    """Side in pixels to which the middle square is scaled, bicubic with antialiasing. Cited: DINOv2's k-NN and linear
    evaluation. It scales the whole image so that the shorter side has this length, which is the same within a pixel."""
    image_size: int = Field(default=224, ge=8, le=4096)
    """Side in pixels of the square in the middle of that, which the model sees. Cited: as above."""
    batch_size: Annotated[int, NotInPlan] = Field(default=32, ge=1)
    """Images a forward pass. Changes only the speed, apart from rounding."""
    decode_threads: Annotated[int, NotInPlan] = Field(default=2, ge=1)
    """Threads that decode images ahead of the model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size > self.resize_size:
            raise ValueError(f"image_size {self.image_size} is greater than resize_size {self.resize_size}")
        return self


class ViewConfig(Settings):
    """How the model sees photographs of the published retrieval data sets."""

    resize: Literal["keep_aspect", "squash", "center_crop"] = "keep_aspect"
    """"keep_aspect": the whole image at its own aspect ratio, both sides multiples of the patch size. "squash": the
    whole image as a square. "center_crop": the square in its middle."""
    image_size: int = Field(default=448, ge=8, le=4096)
    """Side in pixels of the square; with "keep_aspect", of a square with as many pixels. Assumed: DINOv2's is not
    published."""


def preprocess(picture: Picture, config: PicturesConfig) -> Tensor:
    """One image as the model sees it, (3, image_size, image_size) uint8."""
    square = to_shape(picture, (config.resize_size, config.resize_size), crop=True)
    start = (config.resize_size - config.image_size) // 2
    middle = slice(start, start + config.image_size)
    return torch.from_numpy(np.ascontiguousarray(square[:, middle, middle]))


def read_squares(split: Split, rows: Sequence[int], config: PicturesConfig, *, ahead: int = 64) -> Iterator[Tensor]:
    """`preprocess` of the images of some rows, in their order. Threads decode up to `ahead` images in advance."""
    pictures = splits.pictures(
        split,
        rows,
        lambda picture: preprocess(picture, config),
        target_side=config.resize_size,
        threads=config.decode_threads,
        ahead=ahead,
    )
    return (pixels for _, pixels in pictures)
