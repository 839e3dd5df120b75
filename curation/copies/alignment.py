"""Geometry that the comparers of photographs and of drawings share. Transforms (2, 3) map pixel centres (x, y, 1).

Legend: h, w the sides of a picture in pixels; windows (h/4 - 1, w/4 - 1).
"""

from typing import Any

import numpy as np

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def resized(cv2: Any, picture: np.ndarray, side: int, min_side: int) -> np.ndarray:
    """`picture` (H, W, 3) with its longest side from 32 to `side`; its sides are multiples of 4, from `min_side` on."""
    longest = max(picture.shape[:2])
    scale = max(min(1.0, side / longest), 32 / longest)
    height, width = (max(min_side, 4 * round(length * scale / 4)) for length in picture.shape[:2])
    filter_ = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    result: np.ndarray = cv2.resize(picture, (width, height), interpolation=filter_)
    return result


def window_means(cv2: Any, image: np.ndarray) -> np.ndarray:
    """Means over windows of 8 x 8 pixels, every 4 pixels."""
    height, width = image.shape[:2]
    cells = cv2.resize(image, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    means: np.ndarray = cv2.blur(cells, (2, 2), anchor=(0, 0))[:-1, :-1]
    return means


def inverse(transform: np.ndarray) -> np.ndarray:
    """The transform that leads back."""
    result: np.ndarray = np.linalg.inv(np.vstack([transform, [0, 0, 1]]))[:2]
    return result


def refine(cv2: Any, source: np.ndarray, target: np.ndarray, transform: np.ndarray) -> np.ndarray | None:
    """The affine transform near `transform` that maximises the correlation of `source` with `target`, (h, w) float32.

    None where it cannot be raised from here (ECC fails).
    """
    start = inverse(transform).astype(np.float32)
    size = target.shape[::-1]
    mask = cv2.warpAffine(np.full(source.shape, 255, np.uint8), transform, size, flags=cv2.INTER_NEAREST)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 15, 1e-4)
    try:
        _, back = cv2.findTransformECC(target, source, start, cv2.MOTION_AFFINE, criteria, mask, 3)
    except cv2.error:
        return None
    return inverse(back.astype(np.float64))


def _mirrored_descriptor() -> np.ndarray:
    row, column, orientation = np.meshgrid(np.arange(4), np.arange(4), np.arange(8), indexing="ij")
    return (((3 - row) * 4 + column) * 8 + (8 - orientation) % 8).ravel()


MIRRORED_DESCRIPTOR = _mirrored_descriptor()
"""The index of each of SIFT's 4 x 4 x 8 numbers in the mirrored picture: columns and orientations are reversed."""
