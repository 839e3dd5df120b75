"""Block masks for the patch-level objective: the patches that are hidden from the student.

A crop's mask depends on (seed, step, index of the crop in the step) alone. Each rank and each pass draws its own slice,
and the whole step has the same masks on any number of ranks.

Legend:
    C     global crops of a whole step        N = h * w  patches of a crop, row by row; (h, w) is the grid
    M     masked patches of some crops        n          masked crops of a step, int(C * crop_share)

The ratios are stratified: the range is divided into n equal bins, one for each masked crop. DINOv2 does so on each
rank. Here the whole step is divided, so that its masks do not depend on the ranks; and every part of it is balanced,
so that ranks have nearly equal numbers of masked patches and do not wait for each other:

    the step's slots, in order      |  bin 0 | bin 1 | ... | bin n-1 | not masked | ... | not masked |
    split into p parts              of each p neighbours, every part gets one at random
    split again, and again          down to groups of few images
    within a group                  at random: none, one or both of an image's global crops are masked

A mask is a union of rectangles.

Source: Bao et al., BEiT (arXiv 2106.08254), algorithm 1; Zhou et al., iBOT (arXiv 2111.07832); DINOv2's and DINOv3's
published code for the stratification and for the exact count.
"""

import functools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from curation.config import Settings

ATTEMPTS = 10  # to place a block; cited: BEiT and DINOv2
CROPS_PER_IMAGE = 2
# Images of the smallest group whose crops get balanced ratios. Assumed: it divides the images of a rank in all recipes.
GROUP_IMAGES = 4
MASKS_PURPOSE = int.from_bytes(b"masks")  # purpose of a generator, a part of its seed; order.py has others


class MaskConfig(Settings):
    """Masks of the global crops. The defaults are those of all DINOv2 recipes."""

    crop_share: float = Field(default=0.5, ge=0, le=1)
    """Share of a step's global crops with a mask; 0 masks none (distillation)."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Minimum and maximum share of a masked crop's patches; the masked crops are spread evenly between them."""
    sampler: Literal["exact", "published"] = "published"
    """`published`, as in DINOv2: blocks alone, up to a target drawn within the crop's bin; fewer patches may be masked.
    `exact`, as in DINOv3: blocks, then single patches at random, up to exactly the upper end of the bin. Every step
    then has the same number of masked patches."""
    min_block_patches: int = Field(default=4, ge=1)
    """Minimum area of a block that is tried, in patches; smaller only if fewer are left to mask."""
    max_block_share: float = Field(default=0.5, gt=0, le=1)
    """Maximum area of a block, as a share of the grid's rows, rounded down: 128 patches of 16x16, 98 of 14x14."""
    min_block_aspect: float = Field(default=0.3, gt=0, le=1)
    """Minimum height over width of a block; the maximum is its inverse. Log-uniform between them."""

    @model_validator(mode="after")
    def _ratio_ascends(self) -> "MaskConfig":
        low, high = self.ratio
        if not 0 <= low <= high <= 1:
            raise ValueError(f"ratio is [{low:g}, {high:g}]; expected 0 <= minimum <= maximum <= 1")
        return self


def step_masks(
    config: MaskConfig, grid: tuple[int, int], *, seed: int, step: int, num_crops: int, crops: range
) -> Tensor:
    """The masks (len(crops), N) bool of some of the step's `num_crops` global crops; True is masked.

    grid: rows and columns of patches.
    crops: indices among the global crops of the whole step, on all ranks: crop * batch_size + image.
    """
    assert 0 <= crops.start <= crops.stop <= num_crops, f"{crops} of {num_crops} crops"
    assert num_crops % CROPS_PER_IMAGE == 0, num_crops
    num_masked = _floor(num_crops * config.crop_share)
    edges = np.linspace(*config.ratio, num_masked + 1)
    bins = _slots(num_crops // CROPS_PER_IMAGE, seed, step)  # the first `num_masked` are bins
    masks = np.zeros((len(crops), math.prod(grid)), np.bool_)
    for mask, crop in zip(masks, crops, strict=True):
        if bins[crop] < num_masked:
            low, high = edges[bins[crop]], edges[bins[crop] + 1]
            _draw(config, grid, low, high, np.random.default_rng([seed, MASKS_PURPOSE, step, 1 + crop]), mask)
    return torch.from_numpy(masks)


def mask_token_weights(masks: Tensor) -> Tensor:
    """The weight of each masked patch, (M,) float32 in row order: 1 / the number of masked patches in its crop.

    masks: (crops, N) bool, on the CPU: the size of the result depends on values, so a GPU would have to be waited for.
    """
    counts = masks.sum(dim=1)
    return (1 / counts.float()).repeat_interleave(counts)  # a crop without masked patches repeats its 1 / 0 zero times


@functools.lru_cache(maxsize=4)  # the passes of a step ask for it in turn
def _slots(num_images: int, seed: int, step: int) -> NDArray[np.int64]:
    """The slot of each global crop (C,) of a step, a permutation of 0 to C - 1; see the top of this module."""
    random = np.random.default_rng([seed, MASKS_PURPOSE, step])
    slots = np.arange(num_images * CROPS_PER_IMAGE)[None]  # (groups, slots of a group), ascending in each
    group_images = num_images
    for part in _prime_factors(num_images):
        if group_images % part == 0 and group_images // part >= GROUP_IMAGES:
            neighbours = random.permuted(slots.reshape(len(slots), -1, part), axis=2)
            slots = neighbours.transpose(0, 2, 1).reshape(len(slots) * part, -1)
            group_images //= part
    by_image = random.permuted(slots, axis=1).reshape(num_images, CROPS_PER_IMAGE)
    return by_image.T.ravel()


def _prime_factors(number: int) -> list[int]:
    """The prime factors of `number`, the greatest first."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors[::-1]


def _draw(
    config: MaskConfig, grid: tuple[int, int], low: float, high: float, random: np.random.Generator, mask: np.ndarray
) -> None:
    """Fill `mask` (N,), which is all False, for a crop whose bin of ratios is [low, high]."""
    ratio = high if config.sampler == "exact" else random.uniform(low, high)
    target = _floor(len(mask) * ratio)
    bits = _blocks(config, grid, target, random)
    packed = np.frombuffer(bits.to_bytes((len(mask) + 7) // 8, "little"), np.uint8)
    mask[:] = np.unpackbits(packed, count=len(mask), bitorder="little")
    if config.sampler == "exact":
        missing = target - bits.bit_count()
        mask[random.choice(np.flatnonzero(~mask), missing, replace=False)] = True


def _blocks(config: MaskConfig, grid: tuple[int, int], target: int, random: np.random.Generator) -> int:
    """A union of blocks with at most `target` patches: an integer whose bit p says whether patch p is masked.

    Each block is lower and narrower than the grid and adds no more patches than are left to mask. The first block that
    cannot be placed in ATTEMPTS ends the mask. An integer, because no block then needs a call into an array library.
    """
    rows, columns = grid
    max_block = int(config.max_block_share * rows) * columns
    max_log_aspect = -math.log(config.min_block_aspect)
    repeat = [0]  # repeat[h] * (the bits of one row) = the same bits in h rows
    while len(repeat) < rows:
        repeat.append(repeat[-1] << columns | 1)
    uniform = _uniform(random)
    mask = count = 0
    while count < target:
        limit = min(target - count, max_block)
        for _ in range(ATTEMPTS):
            area = config.min_block_patches + next(uniform) * (limit - config.min_block_patches)
            aspect = math.exp(max_log_aspect * (2 * next(uniform) - 1))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            top, left = next(uniform), next(uniform)
            if not (height < rows and width < columns):
                continue
            corner = int(top * (rows - height + 1)) * columns + int(left * (columns - width + 1))
            block = (repeat[height] * ((1 << width) - 1)) << corner
            added = (block & ~mask).bit_count()
            if 0 < added <= limit:
                mask |= block
                count += added
                break
        else:
            break
    return mask


def _uniform(random: np.random.Generator) -> Iterator[float]:
    """Draws from [0, 1), taken from `random` many at a time: single draws would be most of a mask's cost."""
    while True:
        yield from random.random(4 * ATTEMPTS).tolist()


def _floor(value: float) -> int:
    """`value` rounded down; a value just below a whole number, by rounding errors alone, gives that number."""
    return math.floor(value + 1e-6)
