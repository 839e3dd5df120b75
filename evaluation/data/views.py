"""The view of an image that a model gets: a square of its middle, or the whole image at a chosen shape."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from curation.config import NotInPlan, Settings
from curation.images.decode import Picture, to_shape, upright
from evaluation.data import splits
from evaluation.data.splits import Split

MAX_SCALED_ASPECT = 16  # longer side over shorter of an image that is scaled as a whole. Assumed: 3 MB at 256 pixels


class PicturesConfig(Settings):
    """How the model sees labelled images: scaled as a whole, and of that the square in the middle."""

    resize_size: int = Field(default=256, ge=8, le=4096)
    """Pixels to which the shorter side is scaled, bicubic with antialiasing. Cited: DINOv2's k-NN and linear probe."""
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
    """One image as the model sees it, (3, image_size, image_size) uint8.

    The lengths and the crop are those of torchvision's Resize and CenterCrop. Pixels are within 1 of Pillow's,
    unless the image is stored turned (measured 2026-11, photographs of 500 x 375 and 640 x 480).
    """
    width, height = picture.width, picture.height
    if picture.orientation >= 5:  # EXIF: stored with rows and columns exchanged
        width, height = height, width
    shorter, longer, side = min(width, height), max(width, height), config.image_size
    scaled = [int(config.resize_size * length / shorter) for length in (height, width)]
    top, left = (round((length - side) / 2) for length in scaled)  # halves to the even number, as Python's `round`
    if longer > MAX_SCALED_ASPECT * shorter:  # too large to scale as a whole: Pillow computes the crop alone
        down, across = height / scaled[0], width / scaled[1]
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        crop = upright(picture).resize((side, side), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
    whole = to_shape(picture, (scaled[0], scaled[1]))
    return torch.from_numpy(np.ascontiguousarray(whole[:, top : top + side, left : left + side]))


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
