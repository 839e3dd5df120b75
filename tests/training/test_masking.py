"""Masks: their number, size and shape, and the same masks however a step is divided."""

import itertools

import numpy as np
import pytest
import torch

from curation.config import parse
from curation.errors import ConfigError
from tests.training.test_recipes import read as read_recipe
from training.masking import MASKS_PURPOSE, MaskConfig, mask_token_weights, step_masks

GRIDS = [(16, 16), (14, 14), (9, 20), (37, 37)]


def of_step(config: MaskConfig, grid: tuple[int, int], num_crops: int, *, seed: int = 0, step: int = 0) -> np.ndarray:
    # A step has two global crops of each image.
    even = num_crops + num_crops % 2
    masks = step_masks(config, grid, seed=seed, step=step, num_crops=even, crops=range(num_crops))
    assert masks.dtype == torch.bool and masks.shape == (num_crops, grid[0] * grid[1])
    return masks.numpy()


@pytest.mark.parametrize(
    ("grid", "counts"),
    [
        # 8 of 16 crops. Upper ends of the bins are .15, .2, ... .5, of 256 and of 196 patches, rounded down by hand.
        ((16, 16), [38, 51, 64, 76, 89, 102, 115, 128]),
        ((14, 14), [29, 39, 49, 58, 68, 78, 88, 98]),
    ],
)
@pytest.mark.parametrize("step", range(5))
def test_exact_masks_have_the_upper_end_of_each_bin(grid: tuple[int, int], counts: list[int], step: int) -> None:
    masks = of_step(MaskConfig(sampler="exact"), grid, 16, step=step)
    assert sorted(masks.sum(1)) == [0] * 8 + counts


@pytest.mark.parametrize("grid", GRIDS)
def test_published_targets_lie_in_the_bins_and_are_never_exceeded(grid: tuple[int, int]) -> None:
    all_shares = []
    for step in range(20):
        counts = np.sort(of_step(MaskConfig(sampler="published"), grid, 16, step=step).sum(1))
        assert (counts[:8] == 0).all() and (counts[8:] > 0).all()
        shares = counts[8:] / (grid[0] * grid[1])
        all_shares.append(shares)
        assert (shares <= np.arange(3, 11) / 20).all()
    # On average the blocks mask slightly less than the middles of the bins, .125 to .475.
    assert np.mean(all_shares) == pytest.approx(0.3, abs=0.03)
    assert np.mean(all_shares) < 0.3


def test_ratios_spread_evenly_within_a_bin() -> None:
    config = MaskConfig(sampler="published", crop_share=1.0, ratio=(0.1, 0.5))
    counts = np.concatenate([of_step(config, (16, 16), 1, step=step).sum(1) for step in range(400)])
    quarters = np.histogram(counts / 256, bins=[0, 0.2, 0.3, 0.4, 0.5])[0]
    assert quarters.sum() == 400
    assert (np.abs(quarters - 100) < 45).all()  # five standard deviations, and some blocks that could not be placed


def test_masked_crops_are_drawn_anew_each_step() -> None:
    masked = np.array([of_step(MaskConfig(), (16, 16), 8, step=step).any(1) for step in range(200)])
    assert (masked.sum(1) == 4).all()
    assert (np.abs(masked.mean(0) - 0.5) < 0.18).all()  # five standard deviations
    masked_crops_of_image = (masked[:, :4].astype(int) + masked[:, 4:]).ravel()
    assert set(masked_crops_of_image) == {0, 1, 2}


def plain_blocks(
    grid: tuple[int, int], largest: int, target: int, random: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """BEiT's algorithm on an array (h, w), one draw at a time. Gives the mask and the patches that each block added."""
    mask, sizes = np.zeros(grid, bool), []
    while mask.sum() < target:
        limit = min(target - int(mask.sum()), largest)
        for _ in range(10):
            area = 4 + random.random() * (limit - 4)
            aspect = np.exp(np.log(0.3) + 2 * random.random() * np.log(1 / 0.3))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            down, right = random.random(), random.random()
            if height >= grid[0] or width >= grid[1]:
                continue
            top, left = int(down * (grid[0] - height + 1)), int(right * (grid[1] - width + 1))
            block = np.s_[top : top + height, left : left + width]
            if 0 < (~mask[block]).sum() <= limit:
                sizes.append(int((~mask[block]).sum()))
                mask[block] = True
                break
        else:
            break
    return mask, sizes


@pytest.mark.parametrize(
    # The largest blocks: 0.5 * 224 // 14 * 224 // 14, the same for patches of 16; half of 9 rows is 4 of 20; 18 of 37.
    ("grid", "largest"),
    [((16, 16), 128), ((14, 14), 98), ((9, 20), 80), ((37, 37), 666)],
)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_blocks_agree_with_the_plain_algorithm(grid: tuple[int, int], largest: int, ratio: float) -> None:
    config = MaskConfig(sampler="published", crop_share=1.0, ratio=(ratio, ratio))
    sizes: list[int] = []
    for step in range(30):
        random = np.random.default_rng([5, MASKS_PURPOSE, step, 1])
        random.random()  # the draw of the ratio
        mask, block_sizes = plain_blocks(grid, largest, int(grid[0] * grid[1] * ratio), random)
        assert (of_step(config, grid, 1, seed=5, step=step)[0] == mask.ravel()).all()
        sizes += block_sizes
    assert max(sizes) > 0.6 * min(largest, ratio * grid[0] * grid[1])  # the bound was nearly reached


def test_exact_completes_the_blocks_with_single_patches() -> None:
    config = MaskConfig(sampler="exact", crop_share=1.0, ratio=(0.95, 0.95))
    added = []
    for step in range(30):
        mask, _ = plain_blocks((16, 16), 128, 243, np.random.default_rng([5, MASKS_PURPOSE, step, 1]))
        drawn = of_step(config, (16, 16), 1, seed=5, step=step)[0]
        assert (drawn | ~mask.ravel()).all()  # contains every block
        assert drawn.sum() == 243
        added.append(243 - mask.sum())
    assert max(added) > 0


@pytest.mark.parametrize(
    # The recipes of ViT-L/16, ViT-L/14 and ViT-g/14; batches with other factors; ranks that share no group of images.
    ("num_images", "num_ranks", "side", "uneven"),
    [(2048, 32, 14, 1.02), (3072, 96, 16, 1.02), (3072, 256, 16, 1.08), (1000, 8, 14, 1.03), (1536, 8, 14, 1.02)],
)
def test_ranks_have_nearly_equal_numbers_of_masked_patches(
    num_images: int, num_ranks: int, side: int, uneven: float
) -> None:
    config = read_recipe("vitl16_short").masks
    patches = of_step(config, (side, side), 2 * num_images, step=3).sum(1).reshape(2, num_ranks, -1)
    of_rank = patches.sum((0, 2))
    assert of_rank.max() / of_rank.mean() < uneven
    # As DINOv2's ranks, each has masks on half of its crops, and their ratios are spread over the whole range.
    shares = np.sort(patches.transpose(1, 0, 2).reshape(num_ranks, -1)) / side**2
    assert (np.abs((shares > 0).sum(1) - num_images // num_ranks) <= 2).all()
    bin_of_rank = 0.4 * num_ranks / num_images
    assert shares[shares > 0].min() < 0.1 + bin_of_rank and shares.max(1).mean() > 0.5 - 2.5 * bin_of_rank


def test_an_image_has_none_one_or_both_of_its_crops_masked() -> None:
    config = MaskConfig(sampler="exact")
    masked = np.stack([of_step(config, (4, 4), 512, step=step).any(1).reshape(2, -1) for step in range(8)])
    both = masked.all(1).mean()
    # Among four images of eight crops: 4/8 * 3/7. Independent crops would have 1/4.
    assert both == pytest.approx(4 / 8 * 3 / 7, abs=0.04)
    assert masked.mean() == 0.5


def test_every_crop_and_bin_meet_equally_often() -> None:
    config = MaskConfig(sampler="exact", crop_share=1.0, ratio=(0.0, 1.0))
    counts = np.stack([of_step(config, (4, 4), 16, step=step).sum(1) for step in range(480)])  # 1 to 16, once a step
    times = np.stack([(counts == number).sum(0) for number in range(1, 17)])
    assert (np.abs(times - 30) < 27).all()  # five standard deviations


@pytest.mark.parametrize("sampler", ["exact", "published"])
def test_masks_do_not_depend_on_how_a_step_is_divided(sampler: str) -> None:
    config = MaskConfig.model_validate({"sampler": sampler})
    whole = of_step(config, (9, 20), 24, seed=3, step=7)
    for size in (1, 5, 8):
        starts = range(0, 24, size)
        parts = [
            step_masks(config, (9, 20), seed=3, step=7, num_crops=24, crops=range(start, min(start + size, 24)))
            for start in starts
        ]
        assert (torch.cat(parts).numpy() == whole).all()


def test_masks_depend_on_seed_and_step() -> None:
    config = MaskConfig()
    keys = list(itertools.product((0, 1, 2**40), (0, 1, 2)))
    masks = [of_step(config, (16, 16), 8, seed=seed, step=step).tobytes() for seed, step in keys]
    assert len(set(masks)) == len(keys)
    assert masks == [of_step(config, (16, 16), 8, seed=seed, step=step).tobytes() for seed, step in keys]


@pytest.mark.parametrize("sampler", ["exact", "published"])
def test_extremes(sampler: str) -> None:
    def made(grid: tuple[int, int], num_crops: int, **settings: object) -> np.ndarray:
        return of_step(MaskConfig.model_validate({"sampler": sampler, **settings}), grid, num_crops)

    assert not made((16, 16), 6, crop_share=0.0).any()
    assert not made((16, 16), 6, ratio=(0.0, 0.0)).any()
    assert made((16, 16), 2, crop_share=0.4).sum() == 0  # 0.8 of a crop is rounded down to none
    assert made((16, 16), 0).shape == (0, 256)
    everything = made((16, 16), 2, crop_share=1.0, ratio=(1.0, 1.0))
    assert everything.all() if sampler == "exact" else everything.mean() > 0.8
    assert made((1, 8), 2, crop_share=1.0, ratio=(0.5, 0.5)).sum() == (8 if sampler == "exact" else 0)  # no block fits


def test_shares_just_below_a_whole_number_are_rounded_up() -> None:
    config = MaskConfig(crop_share=0.29, ratio=(0.29, 0.29))
    assert of_step(config, (10, 10), 100).sum() == 29 * 29  # 0.29 * 100 is 28.999999999999996 in floating point


def test_weights_sum_to_one_in_each_masked_crop() -> None:
    masks = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    assert mask_token_weights(masks).tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert mask_token_weights(torch.zeros(2, 4, dtype=torch.bool)).tolist() == []
    drawn = torch.from_numpy(of_step(MaskConfig(), (14, 14), 32))
    weights = mask_token_weights(drawn)
    assert weights.dtype == torch.float32 and len(weights) == drawn.sum()
    assert weights.sum() == pytest.approx(16, rel=1e-5)
    placed = torch.zeros(drawn.shape).masked_scatter(drawn, weights)
    torch.testing.assert_close(placed.sum(1), drawn.any(1).float())


def test_a_descending_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ratio is \[0.5, 0.1\]"):
        parse(MaskConfig, {"ratio": [0.5, 0.1]}, origin="masks")
    assert parse(MaskConfig, {"ratio": [0.1, 0.1]}, origin="masks").ratio == (0.1, 0.1)
