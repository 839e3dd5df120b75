"""Thumbnails of photographs, prepared for comparisons, and the features that align one with another.

FEATURES is a record of what the alignment needs of one picture, computed once for all of the picture's comparisons
(features.py). Grids and descriptors are whole numbers, so sums of their products are exact in any order.

Legend: h, w the sides of a prepared thumbnail in pixels; K keypoints; B boxes.
"""

import math
from functools import cached_property
from typing import Any

import numpy as np

from curation.copies.alignment import Box, resized
from curation.images.decode import ImageLimits, decode_rgb

# Constants without another source were measured 2026-11 on the development draw of copy_pictures.py: 540 photographs,
# textures and nebulae, 1,373 copies of 19 kinds, 11,471 candidates.
GRID = 24  # cells per side of the small grids
GRID_UNIT = 400  # the length of a grid as whole numbers; few cells are cut at 127
MAX_BOXES = 4
BORDER_STEPS = (24, 10)  # of 255: content differs from a plain border by more; the second finds borders of like colour
BORDER_SHARE = 0.02  # of a row or column, which content has at least
KEYPOINTS = 200
CONTRAST, LOW_CONTRAST = 0.02, 0.006  # SIFT's thresholds; the second one for pictures with few keypoints
FEW_KEYPOINTS = 40
DESCRIPTOR_UNIT = 255  # the length of a square-rooted descriptor as whole numbers
MIN_SIDE = 16  # pixels, up to which a narrower picture is stretched: one row of windows then lies between its edges
BANDS = ((0.5, 2.0, 6.0), (1.2, 4.0, 12.0))  # of detail: two standard deviations in pixels, and the least variance

FEATURES = np.dtype(
    [
        ("size", "<u2", (2,)),  # width and height
        ("num_boxes", "<u2"),
        ("num_points", "<u2"),
        ("boxes", "<i2", (MAX_BOXES, 4)),
        ("grids", "i1", (MAX_BOXES, 2, GRID, GRID)),  # brightness and its detail, in units of 1 / GRID_UNIT
        ("points", "<f4", (KEYPOINTS, 4)),  # x, y, logarithm to base 2 of the diameter, angle in radians
        ("descriptors", "u1", (KEYPOINTS, 128)),  # square-rooted, in units of 1 / DESCRIPTOR_UNIT; zeros behind
    ]
)

_THUMBNAIL_LIMITS = ImageLimits(min_side=1)
_COLOURS = np.array([[0.5, 0, -0.5], [-0.25, 0.5, -0.25]], np.float32).T  # red-blue and green-magenta of RGB
_ORIENTATIONS = range(8)  # quarter turns, 4 to 7 after mirroring


class Photograph:
    """One thumbnail, prepared for comparisons. Its pixels are decoded at their first use."""

    features: np.void

    def __init__(self, cv2: Any, thumbnail: bytes, side: int) -> None:
        self._cv2, self.thumbnail, self._side = cv2, thumbnail, side

    @cached_property
    def sort_key(self) -> tuple[int, bytes]:
        """Sorts two photographs, so that comparing them gives one result."""
        width, height = (int(side) for side in self.features["size"])
        return width * height, self.thumbnail

    @cached_property
    def picture(self) -> np.ndarray:
        """(h, w, 3) uint8."""
        picture = np.asarray(decode_rgb(self.thumbnail, _THUMBNAIL_LIMITS))
        return resized(self._cv2, picture, self._side, MIN_SIDE)

    @cached_property
    def brightness(self) -> np.ndarray:
        """(h, w) float32, in steps of 255."""
        brightness: np.ndarray = self._cv2.cvtColor(self.picture, self._cv2.COLOR_RGB2GRAY).astype(np.float32)
        return brightness

    @cached_property
    def colour(self) -> np.ndarray:
        """Red-blue and green-magenta, (h, w, 2) float32."""
        colour: np.ndarray = self.picture.astype(np.float32) @ _COLOURS
        return colour

    @cached_property
    def smooth(self) -> np.ndarray:
        """The brightness for the refinement, (h, w) float32."""
        smooth: np.ndarray = self._cv2.GaussianBlur(self.brightness, (0, 0), 1.0)
        return smooth

    @cached_property
    def bands(self) -> tuple[np.ndarray, ...]:
        """The detail of each of BANDS, (h, w) float32."""
        return detail_bands(self._cv2, self.brightness)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the picture has one brightness, so that nothing can be aligned."""
        return bool(self.brightness.std() < 2)

    @cached_property
    def descriptors(self) -> np.ndarray:
        """(K, 128) float32, whole numbers; zeros behind the last keypoint."""
        descriptors: np.ndarray = self.features["descriptors"].astype(np.float32)
        return descriptors

    @cached_property
    def grids(self) -> np.ndarray:
        """(2, B, GRID * GRID) float32."""
        grids = self.features["grids"][: self.features["num_boxes"]].astype(np.float32)
        return np.moveaxis(grids.reshape(-1, 2, GRID * GRID), 1, 0)

    @cached_property
    def turned_grids(self) -> np.ndarray:
        """The grids in each orientation, (2, 8 * B, GRID * GRID) float32."""
        grids = self.grids.reshape(2, -1, GRID, GRID)
        turned = [np.rot90(grids[..., ::-1] if turn & 4 else grids, turn & 3, axes=(2, 3)) for turn in _ORIENTATIONS]
        return np.concatenate(turned, axis=1).reshape(2, -1, GRID * GRID)


def detail_bands(cv2: Any, brightness: np.ndarray) -> tuple[np.ndarray, ...]:
    """The detail of each of BANDS, (h, w) float32."""
    return tuple(
        cv2.GaussianBlur(brightness, (0, 0), fine) - cv2.GaussianBlur(brightness, (0, 0), coarse)
        for fine, coarse, _ in BANDS
    )


def make_detectors(cv2: Any) -> tuple[Any, Any]:
    """SIFT, and the detector for pictures in which it finds few keypoints."""
    usual, sensitive = (
        cv2.SIFT.create(nfeatures=KEYPOINTS, contrastThreshold=contrast) for contrast in (CONTRAST, LOW_CONTRAST)
    )
    return usual, sensitive


def compute_features(cv2: Any, detectors: tuple[Any, Any], photograph: Photograph) -> np.void:
    """The record of FEATURES of a photograph."""
    sift, sensitive_sift = detectors
    record: np.void = np.zeros(1, FEATURES)[0]
    record["size"] = photograph.brightness.shape[::-1]
    boxes = _content_boxes(photograph.picture)
    record["num_boxes"], record["boxes"][: len(boxes)] = len(boxes), boxes
    for number, (left, top, right, bottom) in enumerate(boxes):
        cells = cv2.resize(photograph.brightness[top:bottom, left:right], (GRID, GRID), interpolation=cv2.INTER_AREA)
        detail = cells - cv2.GaussianBlur(cells, (0, 0), 2.5)
        # Clipped, so that an overlay of strong contrast weighs no more than its area.
        detail = np.clip(detail / (2 * np.median(np.abs(detail)) + 0.6), -1, 1)
        for channel, values in enumerate((cells - cells.mean(), detail)):
            units = np.rint(GRID_UNIT * values / (np.linalg.norm(values) + 1e-3))
            record["grids"][number, channel] = np.clip(units, -127, 127)
    grey = photograph.brightness.astype(np.uint8)
    keypoints, descriptors = sift.detectAndCompute(grey, None)
    if len(keypoints) < FEW_KEYPOINTS:
        keypoints, descriptors = sensitive_sift.detectAndCompute(grey, None)
    if len(keypoints):
        order = np.argsort([-keypoint.response for keypoint in keypoints], kind="stable")[:KEYPOINTS]
        count = len(order)
        record["num_points"] = count
        record["points"][:count] = [
            (*keypoints[i].pt, math.log2(keypoints[i].size), math.radians(keypoints[i].angle)) for i in order
        ]
        roots = np.sqrt(descriptors[order] / np.maximum(descriptors[order].sum(1, keepdims=True), 1e-6))
        record["descriptors"][:count] = np.rint(DESCRIPTOR_UNIT * roots)
    return record


def _content_boxes(picture: np.ndarray) -> list[Box]:
    """The whole picture, then the picture without its plain border, then without the next border, and so on."""
    boxes: list[Box] = [(0, 0, picture.shape[1], picture.shape[0])]
    for steps in BORDER_STEPS:
        box = boxes[0]
        for _ in range(MAX_BOXES):
            inner = _without_border(picture, box, steps)
            if inner == box:
                break
            box = inner
            near = [
                number
                for number, earlier in enumerate(boxes)
                if max(abs(a - b) for a, b in zip(inner, earlier, strict=True)) <= 2
            ]
            if near:  # the blurred edge of a border
                if near[-1] > 0:
                    boxes[near[-1]] = inner
            elif len(boxes) < MAX_BOXES:
                boxes.append(inner)
    return boxes


def _without_border(picture: np.ndarray, box: Box, steps: int) -> Box:
    """The box inside the plain border of `box`; `box` itself when it has none."""
    left, top, right, bottom = box
    part = picture[top:bottom, left:right].astype(np.int16)
    ring = np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]])
    differs = np.abs(part - np.median(ring, axis=0)).max(2) > steps
    rows = np.flatnonzero(differs.mean(1) > BORDER_SHARE)
    columns = np.flatnonzero(differs.mean(0) > BORDER_SHARE)
    if len(rows) < 8 or len(columns) < 8:
        return box
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1
