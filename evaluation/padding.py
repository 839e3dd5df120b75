"""Pads pictures to whole patches, with a colour that the model sees as 0."""

import torch
from torch import Tensor

# ImageNet's mean colour, which is 0 once normalised. Cited: DINOv2 pads with 0.
PADDING_COLOR = (124, 116, 104)


def pad(pixels: Tensor, left: int, right: int, above: int, below: int) -> Tensor:
    """(..., 3, H, W) uint8 with so many pixels of PADDING_COLOR on each side."""
    if not any((left, right, above, below)):
        return pixels
    height, width = pixels.shape[-2:]
    color = torch.tensor(PADDING_COLOR, dtype=torch.uint8, device=pixels.device)[:, None, None]
    padded = color.expand(*pixels.shape[:-2], height + above + below, width + left + right).clone()
    padded[..., above : above + height, left : left + width] = pixels
    return padded


def pad_to_patches(pixels: Tensor, patch_size: int) -> tuple[Tensor, int, int]:
    """`pixels` (..., 3, H, W) in the middle of a picture whose sides are multiples of `patch_size`.

    Also the number of rows above and of columns left of them.
    """
    down, across = (-side % patch_size for side in pixels.shape[-2:])
    padded = pad(pixels, across // 2, across - across // 2, down // 2, down - down // 2)
    return padded, down // 2, across // 2
