"""DINOv2's augmentations on the CPU: the crops of one encoded image. The only file of training/ that imports OpenCV.

The operations on a crop, in this order (arXiv 2304.07193 and its published trainer):

    window      of random area and aspect, scaled to the group's size by bicubic interpolation with antialiasing
    mirror
    colours     brightness, contrast, saturation and hue, in random order
    grey
    blur        Gaussian, 9 pixels wide
    solarize    inverts values at or above a threshold

All random numbers are drawn first, from one generator, into `Crop`s. Cutting the crops is then a pure function. It
behaves as torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and RandomSolarize on 8 bits: each operation
rounds and clips. Pixels stay in 8 bits until one operation normalises a whole batch on the device.

Legend: V crops of a group, S their side in pixels; H, W the picture's.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch.nn import functional

from curation.config import Settings
from curation.images.decode import ImageLimits, Picture, decode_picture, read_header, upright

Pixels = NDArray[Any]  # of np.uint8, which OpenCV's annotations do not promise

# Probabilities of blur for the first global crop, the second, and the local ones. DINOv2 states the nominal ones. Its
# code passes one minus them to RandomApply, and the released weights were trained so (facebookresearch/dinov2 #411,
# dinov3 #286).
EFFECTIVE_BLUR = (0.0, 0.9, 0.5)
NOMINAL_BLUR = (1.0, 0.1, 0.5)
# Weights of red, green and blue in grey. Cited: ITU-R BT.601, as in Pillow and OpenCV.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Windows that are drawn before the middle of the picture is taken. Cited: torchvision's RandomResizedCrop.
ATTEMPTS = 10
BLUR_WIDTH = 9
_ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))
# Uniform numbers that one crop draws: the 13 that `_crop` names, and two for each attempt.
_DRAWS = 2 * ATTEMPTS + 13

Fraction = Field(ge=0, le=1)


class CropView(Settings):
    """Crops of a group with the same probabilities."""

    num: int = Field(default=1, ge=1)
    """Number of crops."""
    blur: float = Fraction
    """Probability of blur. The released weights were trained with 0.0, 0.9 and 0.5 (first global, second, local);
    DINOv2's paper and configs state 1.0, 0.1 and 0.5."""
    solarize: float = Field(default=0.0, ge=0, le=1)
    """Probability of solarizing."""


class CropGroup(Settings):
    """Crops of one size, which pass the model together."""

    name: Literal["global", "local"]
    """The teacher sees global crops only. The student sees global crops, with masks, and local ones."""
    size: int = Field(ge=8)
    """Side in pixels; a multiple of the patch size."""
    scale: tuple[float, float]
    """Minimum and maximum area of a crop's window, as a share of the picture's area."""
    views: tuple[CropView, ...] = Field(min_length=1)
    """The crops of the group, in order."""

    @property
    def num(self) -> int:
        """Crops of one image."""
        return sum(view.num for view in self.views)

    @field_validator("scale")
    @classmethod
    def _scale_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("not a range within 0 and 1")
        return value


def released_crops(
    global_size: int = 224,
    local_size: int = 96,
    num_local: int = 8,
    blur: tuple[float, float, float] = EFFECTIVE_BLUR,
) -> tuple[CropGroup, ...]:
    """DINOv2's two global crops and its local ones. Patches of 14 pixels need local crops of 98."""
    views = (CropView(blur=blur[0]), CropView(blur=blur[1], solarize=0.2))
    groups = [CropGroup(name="global", size=global_size, scale=(0.32, 1.0), views=views)]
    if num_local:
        local = (CropView(num=num_local, blur=blur[2]),)
        groups.append(CropGroup(name="local", size=local_size, scale=(0.05, 0.32), views=local))
    return tuple(groups)


class AugmentConfig(Settings):
    """The crops of an image and their augmentations. The defaults are DINOv2's."""

    crops: tuple[CropGroup, ...] = released_crops()
    """Groups of crops: one with two global crops, and at most one with local crops."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Minimum and maximum width over height of a window; log-uniform between them."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring."""
    jitter: float = Field(default=0.8, ge=0, le=1)
    """Probability of colour changes."""
    brightness: float = Field(default=0.4, ge=0, le=1)
    """Maximum distance of the brightness factor from 1; the factor is uniform."""
    contrast: float = Field(default=0.4, ge=0, le=1)
    """The same for the contrast factor, which scales the distance to the picture's mean grey."""
    saturation: float = Field(default=0.2, ge=0, le=1)
    """The same for the saturation factor, which scales the distance to each pixel's grey."""
    hue: float = Field(default=0.1, ge=0, le=0.5)
    """Maximum rotation of the hue in either direction, in turns."""
    grayscale: float = Field(default=0.2, ge=0, le=1)
    """Probability of grey."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Minimum and maximum standard deviation of the blur, in pixels."""
    solarize_threshold: int = Field(default=128, ge=0, le=256)
    """Solarizing inverts values at or above it, of 255."""

    @field_validator("ratio", "blur_sigma")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("not a range above 0")
        return value

    @model_validator(mode="after")
    def _two_global_crops(self) -> "AugmentConfig":
        names = [group.name for group in self.crops]
        if names not in (["global"], ["global", "local"]) or self.crops[0].num != 2:
            raise ValueError(f"crops need a group 'global' of two crops, and may have one 'local' after it; {names}")
        return self


@dataclass(frozen=True)
class Crop:
    """The random draws of one crop. Lengths in pixels of the upright picture at its full size."""

    left: int
    top: int
    width: int
    height: int
    flip: bool
    order: tuple[str, ...]
    """Order of the colour changes; empty for none."""
    brightness: float
    contrast: float
    saturation: float
    hue: float
    """Rotation, in turns."""
    grayscale: bool
    sigma: float
    """Standard deviation of the blur, in pixels; 0 for none."""
    solarize: bool


def draw_crops(
    config: AugmentConfig, width: int, height: int, generator: np.random.Generator
) -> tuple[tuple[Crop, ...], ...]:
    """The crops of a picture of `width` x `height` pixels, group by group.

    Every crop draws the same number of values, used or not, so one crop's settings do not change the next crop.
    """
    views = [[view for view in group.views for _ in range(view.num)] for group in config.crops]
    numbers = iter(generator.random((sum(map(len, views)), _DRAWS)).tolist())
    return tuple(
        tuple(_crop(config, group, view, width, height, next(numbers)) for view in group_views)
        for group, group_views in zip(config.crops, views, strict=True)
    )


def _crop(
    config: AugmentConfig, group: CropGroup, view: CropView, width: int, height: int, numbers: list[float]
) -> Crop:
    across, down, flip, jitter, order, brightness, contrast, saturation, hue, gray, blur, sigma, solarize = numbers[:13]
    left, top, window_width, window_height = _window(config, group, width, height, across, down, numbers[13:])
    return Crop(
        left=left,
        top=top,
        width=window_width,
        height=window_height,
        flip=flip < config.flip,
        order=_ORDERS[int(order * len(_ORDERS))] if jitter < config.jitter else (),
        brightness=_between((1 - config.brightness, 1 + config.brightness), brightness),
        contrast=_between((1 - config.contrast, 1 + config.contrast), contrast),
        saturation=_between((1 - config.saturation, 1 + config.saturation), saturation),
        hue=_between((-config.hue, config.hue), hue),
        grayscale=gray < config.grayscale,
        sigma=_between(config.blur_sigma, sigma) if blur < view.blur else 0.0,
        solarize=solarize < view.solarize,
    )


def _window(
    config: AugmentConfig, group: CropGroup, width: int, height: int, across: float, down: float, numbers: list[float]
) -> tuple[int, int, int, int]:
    """Left, top, width and height, as torchvision's RandomResizedCrop chooses them."""
    min_ratio, max_ratio = config.ratio
    for share, shape in zip(numbers[::2], numbers[1::2], strict=True):
        area = width * height * _between(group.scale, share)
        ratio = math.exp(_between((math.log(min_ratio), math.log(max_ratio)), shape))
        window_width, window_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < window_width <= width and 0 < window_height <= height:
            left, top = int(across * (width - window_width + 1)), int(down * (height - window_height + 1))
            return left, top, window_width, window_height
    window_width, window_height = width, height
    if width / height < min_ratio:
        window_height = round(width / min_ratio)
    elif width / height > max_ratio:
        window_width = round(height * max_ratio)
    return (width - window_width) // 2, (height - window_height) // 2, window_width, window_height


def _between(bounds: tuple[float, float], number: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * number


def make_crops(
    data: bytes, limits: ImageLimits, config: AugmentConfig, generator: np.random.Generator
) -> tuple[Pixels, ...]:
    """The crops of an encoded image, (V, 3, S, S) uint8 for each group. Raises ImageRejected.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if no crop is enlarged by that. Its windows are then rounded to
    pixels of that size.
    """
    header = read_header(data, limits)
    drawn = draw_crops(config, header.width, header.height, generator)
    reduction = decode_reduction(config, drawn)
    # The decoder takes the largest reduction that leaves this many pixels.
    picture = decode_picture(data, limits, target_side=min(header.width, header.height) // reduction)
    return cut_crops(_upright_pixels(picture), drawn, config, full_width=header.width)


def decode_reduction(config: AugmentConfig, drawn: tuple[tuple[Crop, ...], ...]) -> int:
    """The largest factor, of 1, 2, 4 and 8, by which a picture can be scaled down so that no crop is enlarged."""
    max_reduction = min(
        min(crop.width, crop.height) // group.size
        for group, crops in zip(config.crops, drawn, strict=True)
        for crop in crops
    )
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(max_reduction, 1))


def _upright_pixels(picture: Picture) -> Pixels:
    return picture.pixels if picture.orientation == 1 else np.array(upright(picture))


def cut_crops(
    pixels: Pixels, drawn: tuple[tuple[Crop, ...], ...], config: AugmentConfig, *, full_width: int
) -> tuple[Pixels, ...]:
    """The drawn crops of an upright picture (H, W, 3) that had `full_width` before it was scaled down."""
    reduction = round(full_width / pixels.shape[1])
    groups = []
    for group, crops in zip(config.crops, drawn, strict=True):
        out = np.empty((len(crops), 3, group.size, group.size), np.uint8)
        for crop_out, crop in zip(out, crops, strict=True):
            _finish(_recolored(_scaled(pixels, crop, reduction, group.size), crop), crop, config, crop_out)
        groups.append(out)
    return tuple(groups)


def _scaled(pixels: Pixels, crop: Crop, reduction: int, size: int) -> Pixels:
    """The crop's window, mirrored if drawn so, (S, S, 3)."""
    top, left, bottom, right = (
        round(edge / reduction) for edge in (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)
    )
    window = pixels[top:bottom, left:right]
    # torch's 8-bit filter is fast for a batch of one picture in channels_last, and returns the same memory format.
    batch = torch.from_numpy(window).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    scaled = functional.interpolate(batch, size=(size, size), mode="bicubic", antialias=True)
    result: Pixels = np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())
    return cv2.flip(result, 1) if crop.flip else result


def _recolored(pixels: Pixels, crop: Crop) -> Pixels:
    """(S, S, 3), or (S, S) where the crop is grey."""
    for change in crop.order:
        match change:
            case "brightness":
                pixels = cv2.transform(pixels, _mix(crop.brightness))
            case "contrast":
                grey = round(float(np.dot(cv2.mean(pixels)[:3], LUMA)))
                pixels = cv2.transform(pixels, _mix(crop.contrast, offset=(1 - crop.contrast) * grey))
            case "saturation":
                pixels = cv2.transform(pixels, _mix(crop.saturation, grey=1 - crop.saturation))
            case "hue":
                turned = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)  # the hue in 256 steps a turn
                turned[..., 0] += np.uint8(round(crop.hue * 256) % 256)
                pixels = cv2.cvtColor(turned, cv2.COLOR_HSV2RGB_FULL)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if crop.grayscale else pixels


def _mix(value: float, *, grey: float = 0.0, offset: float = 0.0) -> NDArray[np.float32]:
    """The matrix (3, 4) for `cv2.transform`: value * x + grey * (grey of the pixel) + offset, for each colour x."""
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3], matrix[:, 3] = grey * LUMA, offset
    matrix.flat[::5] += value
    return matrix


def _finish(pixels: Pixels, crop: Crop, config: AugmentConfig, out: Pixels) -> None:
    """Blur and solarize, and write the channels apart into `out` (3, S, S)."""
    if crop.sigma:
        kernel = cv2.getGaussianKernel(BLUR_WIDTH, crop.sigma, cv2.CV_32F)
        pixels = cv2.sepFilter2D(pixels, -1, kernel, kernel)  # mirrors at the edges
    if crop.solarize:
        values = np.arange(256)
        table = np.where(values >= config.solarize_threshold, 255 - values, values).astype(np.uint8)
        pixels = cv2.LUT(pixels, table)
    if crop.grayscale:
        out[:] = pixels
    else:
        cv2.split(pixels, list(out))


def use_one_thread() -> None:
    """Keep OpenCV from starting threads in this process: the loader's workers share the processors already."""
    cv2.setNumThreads(1)
