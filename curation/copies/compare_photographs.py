"""Whether two thumbnails show one photograph, after a crop, border, turn, mirror, other colours or an overlay.

1.  Transforms that align A with B: (a) from the whole of A, or A without its plain borders, to the same of B, in each
    of the eight orientations, where small grids of both agree; (b) a similarity transform that many SIFT keypoints
    agree on, straight or mirrored; (c) from smooth pictures, with few keypoints, to the place in the other one where
    their brightness at low resolution correlates most, and back.
2.  A transform is judged in windows of 8 x 8 pixels. A window has texture where either picture has detail in it. It
    agrees where the detail of both correlates and their brightness is equal, after one gain and offset for all windows.
    The sharper picture is blurred first, until both are as sharp; so a blurred copy agrees too.
3.  The similarity is sqrt(T L): T the share of the windows with texture that agree, L the share of all windows with
    equal brightness. An overlay lowers it by about its area. Two pictures that show different things agree by chance in
    few windows. Smooth windows count for less, and those of a plain ground for nothing. Where hardly any window has
    texture, brightness and colour must be equal as they are.

The similarity depends only on the two thumbnails. Grids and keypoints are compared by sums of whole numbers, which are
exact in any order; all else is computed from the picture that comes first by size and bytes to the other one.

Legend: h, w the sides of a prepared thumbnail in pixels; W windows of (h/4 - 1, w/4 - 1); transforms (2, 3) map pixel
centres (x, y, 1).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np

from curation.copies.align_photographs import box_transforms, keypoint_transforms, smooth_transform
from curation.copies.alignment import inverse, refine, window_means
from curation.copies.compare_thumbnails import Likeness
from curation.copies.opencv import load_opencv
from curation.copies.photographs import BANDS, Photograph, compute_features, detail_bands, make_detectors

# Constants without another source were measured as those of photographs.py.
SHARE_OF_QUICK = 0.06  # of the windows with texture, which agree before a transform is judged in full
EDGE = 2  # pixels at a picture's edge that are not compared
FEW_FOR_SMOOTH = 80  # keypoints, up to which a picture counts as smooth
# Of a part of a smooth picture; many have an edge or a slope in common. Measured on tiles of photographs.
MIN_SMOOTH_SIMILARITY = 0.8
MAX_STRETCH = 1.2  # of one direction over another
MIN_OVERLAP, MIN_OTHER_OVERLAP = 0.72, 0.12  # share of one picture, and share of the other
MIN_CORRELATION = 0.6  # of the detail of two windows that agree
LEVEL_STEPS, STRICT_LEVEL_STEPS = 10.0, 8.0  # of 255, between windows of equal brightness
PRIOR_WINDOWS = 15  # windows that do not agree, added to each picture's: few windows prove little
SHARPER = 2.2  # ratio of fine to coarse detail, from which the sharper picture is blurred
BLURS = (0.6, 0.9, 1.3, 1.8, 2.5, 3.5)  # standard deviations in pixels
MAX_RESIDUAL, MIN_NOISE = 6.0, 1.0  # of a local difference, in medians of all differences; steps of 255. Assumed
PLAIN = 0.06  # share of windows with texture, below which brightness and colour must be equal as they are
MIN_PLAIN_OVERLAP = 0.4
GREY = 4.0  # mean colour, in steps, of a picture without colour
SMOOTH_STEPS, SMOOTH_WEIGHT = 8.0, 0.5  # steps from the ground at which a smooth window weighs so much
MIN_PLAIN = 0.6  # similarity of smooth pictures that are copies
MAX_REFINED = 2
ENOUGH = 0.75  # similarity from which no further transform is tried
AGREES_EVERYWHERE = 0.9  # texture of copies without an overlay
REFINED = 0.1, 0.6  # least texture, and similarity from which a transform needs no refinement


@final
class PhotographComparer:
    """Compares thumbnails of photographs. Raises DeviceError where OpenCV is not installed."""

    def __init__(self, side: int, *, forbid_differences: bool = False) -> None:
        self._cv2 = load_opencv()
        self._side, self._forbid_differences = side, forbid_differences
        self._detectors = make_detectors(self._cv2)

    def prepare(self, thumbnail: bytes, features: np.void | None = None) -> Photograph:
        """See compare_thumbnails.Comparer."""
        photograph = Photograph(self._cv2, thumbnail, self._side)
        if features is None:
            features = self.features(photograph)
        photograph.features = features
        return photograph

    def features(self, photograph: Photograph) -> np.void:
        """The record of FEATURES of a photograph."""
        return compute_features(self._cv2, self._detectors, photograph)

    def compare(self, one: Photograph, others: Sequence[Photograph]) -> list[Likeness]:
        """See compare_thumbnails.Comparer."""
        is_first = [one.sort_key <= other.sort_key for other in others]
        by_keypoints = keypoint_transforms(one, others, is_first)
        by_boxes = box_transforms(one, others, is_first)
        return [
            self._compare(*((one, other) if in_order else (other, one)), [*boxes, *keypoints])
            for other, in_order, boxes, keypoints in zip(others, is_first, by_boxes, by_keypoints, strict=True)
        ]

    def _compare(self, one: Photograph, other: Photograph, transforms: Sequence[np.ndarray]) -> Likeness:
        """The best of the `transforms` from `one` to `other`."""
        if one.thumbnail == other.thumbnail:  # also pictures that are too small or too plain to be aligned
            return Likeness(1.0, False)
        if one.is_plain and other.is_plain:
            return Likeness(_equality_of_plain(one, other), False)
        judged: list[tuple[Evidence, np.ndarray]] = []
        for transform, least in self._trials(one, other, transforms):
            evidence = self._judge(one, other, transform)
            if evidence is not None and evidence.similarity >= least:
                judged.append((evidence, transform))
                if evidence.similarity >= ENOUGH:
                    break
        judged.sort(key=lambda pair: -pair[0].similarity)
        best = judged[0][0] if judged else None
        if best is not None and best.similarity < REFINED[1]:
            for evidence, transform in judged[:MAX_REFINED]:
                if evidence.texture < REFINED[0]:
                    continue
                refined = refine(self._cv2, one.smooth, other.smooth, transform)
                closer = None if refined is None else self._judge(one, other, refined)
                if closer is not None and closer.similarity > best.similarity:
                    best = closer
        if best is None:
            return Likeness(0.0, False)
        return Likeness(best.similarity, best.similarity > 0 and best.texture < AGREES_EVERYWHERE)

    def _trials(
        self, one: Photograph, other: Photograph, transforms: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, float]]:
        """The `transforms`, then those of a part of a smooth picture, each with the least similarity that counts."""
        yield from ((transform, 0.0) for transform in transforms)
        if max(one.features["num_points"], other.features["num_points"]) <= FEW_FOR_SMOOTH:
            for start, end in ((one, other), (other, one)):
                transform = smooth_transform(self._cv2, start.brightness, end.brightness)
                if transform is not None:
                    transform = transform if start is one else inverse(transform)
                    refined = refine(self._cv2, one.smooth, other.smooth, transform)
                    yield transform if refined is None else refined, MIN_SMOOTH_SIMILARITY

    def _judge(self, one: Photograph, other: Photograph, transform: np.ndarray) -> "Evidence | None":
        """The evidence where `one`, moved by `transform`, overlaps `other`; None without enough of an overlap."""
        cv2 = self._cv2
        longest, shortest = np.linalg.svd(transform[:, :2], compute_uv=False).tolist()
        area = longest * shortest
        if not 0.04 < area < 25 or longest > MAX_STRETCH * shortest:
            return None
        if area > 1:  # move the larger one, since enlarging cannot add detail
            one, other, transform, area = other, one, inverse(transform), 1 / area
        height, width = other.brightness.shape
        inner = np.zeros(one.brightness.shape, np.float32)
        inner[EDGE:-EDGE, EDGE:-EDGE] = 1
        usable = cv2.warpAffine(inner, transform, (width, height))
        usable[:EDGE], usable[-EDGE:], usable[:, :EDGE], usable[:, -EDGE:] = 0, 0, 0, 0
        covered = float((usable > 0.98).mean())
        overlaps = covered, covered * height * width / area / inner.size
        if max(overlaps) < MIN_OVERLAP or min(overlaps) < MIN_OTHER_OVERLAP:
            return None
        mask = window_means(cv2, usable) > 0.98
        if mask.sum() < 9:
            return None
        source = one.brightness
        if area < 0.9:  # no detail that is finer than the pixels of the smaller one
            source = cv2.GaussianBlur(source, (0, 0), max(0.3, 0.5 * math.sqrt(1 / area - 1)))
        moved = cv2.warpAffine(
            source, transform, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        target, bands, other_bands = other.brightness, detail_bands(cv2, moved), other.bands
        fine, coarse = 0, 1
        textures = {coarse: _compare_band(cv2, coarse, bands, other_bands, mask)}
        num_windows = int(mask.sum())
        if textures[coarse].present.sum() >= PLAIN * num_windows and textures[coarse].share() < SHARE_OF_QUICK:
            return None
        textures[fine] = _compare_band(cv2, fine, bands, other_bands, mask)
        sharpness = [textures[band].energy for band in (fine, coarse)]
        ratio = sharpness[0][0] * sharpness[1][1] / max(sharpness[1][0] * sharpness[0][1], 1e-6)
        if not 1 / SHARPER < ratio < SHARPER:
            fine_to_coarse = [high / (low + 1e-3) for high, low in zip(*sharpness, strict=True)]
            if ratio > 1:
                moved = _blurred(cv2, moved, mask, fine_to_coarse[1])
                bands = detail_bands(cv2, moved)
            else:
                target = _blurred(cv2, target, mask, fine_to_coarse[0])
                other_bands = detail_bands(cv2, target)
            textures = {band: _compare_band(cv2, band, bands, other_bands, mask) for band in (fine, coarse)}
        brightness, other_brightness = window_means(cv2, moved)[mask], window_means(cv2, target)[mask]
        present = textures[fine].present | textures[coarse].present
        steps = _level_steps(brightness, other_brightness, textures[fine].agrees | textures[coarse].agrees)
        if self._forbid_differences and _differs_locally(steps, mask):
            return None
        colour = cv2.warpAffine(one.colour, transform, (width, height), borderMode=cv2.BORDER_REPLICATE)
        colours = window_means(cv2, colour)[mask], window_means(cv2, other.colour)[mask]
        is_equal = _are_equal(brightness, other_brightness, colours)
        relief = _relief(brightness, other_brightness)
        if present.sum() < PLAIN * num_windows:
            if min(overlaps) < MIN_PLAIN_OVERLAP:
                return None
            equal = float(is_equal @ relief) / (float(relief.sum()) + PRIOR_WINDOWS)
            return Evidence(0.0, equal if equal > MIN_PLAIN else 0.0)
        agrees = present & (steps < LEVEL_STEPS)
        for texture in textures.values():
            agrees &= texture.agrees | ~texture.present
        weight = np.where(present, 1.0, SMOOTH_WEIGHT * relief)
        texture_share = float((agrees | (is_equal & ~present)) @ weight / (weight.sum() + PRIOR_WINDOWS))
        return Evidence(texture_share, math.sqrt(texture_share * float((steps < STRICT_LEVEL_STEPS).mean())))


class Evidence(NamedTuple):
    """How well two photographs agree under one transform."""

    texture: float
    """Share of the windows with texture that agree; 0 where too few have texture."""
    similarity: float
    """In [0, 1]."""


@dataclass(frozen=True)
class Texture:
    """One band of detail of two pictures, in the W windows of the overlap."""

    present: np.ndarray  # (W,) bool: either has texture
    agrees: np.ndarray  # (W,) bool: both have the same texture
    energy: tuple[float, float]  # sum of the variances of each picture

    def share(self) -> float:
        """Share of the windows with texture that agree."""
        return float(self.agrees.sum() / (self.present.sum() + PRIOR_WINDOWS))


def _compare_band(
    cv2: Any, number: int, bands: Sequence[np.ndarray], other_bands: Sequence[np.ndarray], mask: np.ndarray
) -> Texture:
    """Compare one of BANDS of two aligned pictures in the windows of `mask`."""
    band, other, floor = bands[number], other_bands[number], BANDS[number][2]
    products = window_means(cv2, np.dstack([band, other, band * band, other * other, band * other]))[mask]
    mean, other_mean, square, other_square, product = products.T
    variance = np.maximum(square - mean * mean, 0)
    other_variance = np.maximum(other_square - other_mean * other_mean, 0)
    # The contrast of the whole may differ; that of a window may not.
    gain = float(np.clip(np.median((other_variance + 1) / (variance + 1)), 0.2, 5))
    covariance = (product - mean * other_mean) * math.sqrt(gain)
    scaled = variance * gain
    correlation = covariance / np.sqrt((scaled + floor / 4) * (other_variance + floor / 4))
    present = np.maximum(scaled, other_variance) > floor
    return Texture(
        present, present & (correlation > MIN_CORRELATION), (float(variance.sum()), float(other_variance.sum()))
    )


def _blurred(cv2: Any, brightness: np.ndarray, mask: np.ndarray, fine_to_coarse: float) -> np.ndarray:
    """`brightness` with the least blur that lowers its ratio of fine to coarse detail to the given one."""
    blurred = brightness
    for deviation in BLURS:
        blurred = cv2.GaussianBlur(brightness, (0, 0), deviation)
        fine, coarse = (float(window_means(cv2, band * band)[mask].sum()) for band in detail_bands(cv2, blurred))
        if fine <= fine_to_coarse * (coarse + 1e-3):
            break
    return blurred


def _level_steps(brightness: np.ndarray, other: np.ndarray, agrees: np.ndarray) -> np.ndarray:
    """The difference (W,) of brightness of each window, after one gain and offset of the windows of equal texture."""
    if agrees.sum() < 12:
        agrees = np.ones_like(agrees)
    x, y = brightness[agrees].astype(np.float64), other[agrees].astype(np.float64)
    gain, offset = 1.0, float(np.median(y - x))
    for _ in range(5):  # least squares, in which windows that disagree weigh little
        error = y - gain * x - offset
        weight = 1 / (1 + (error / max(2.0, 1.5 * float(np.median(np.abs(error))))) ** 2)
        weight /= weight.sum()
        mean, other_mean = float(weight @ x), float(weight @ y)
        variance = float(weight @ (x - mean) ** 2)
        covariance = float(weight @ ((x - mean) * (y - other_mean)))
        gain = min(max((covariance + 4) / (variance + 4), 0.4), 2.5)
        offset = other_mean - gain * mean
    steps: np.ndarray = np.abs(other - gain * brightness - offset)
    return steps


def _differs_locally(steps: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the brightness of two by two windows differs by far more than that of most windows."""
    of_window = np.zeros(mask.shape)
    of_window[mask] = steps
    blocks = (of_window[:-1, :-1] + of_window[:-1, 1:] + of_window[1:, :-1] + of_window[1:, 1:]) / 4
    return bool(blocks.max(initial=0.0) > MAX_RESIDUAL * max(MIN_NOISE, float(np.median(steps))))


def _relief(brightness: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much each window (W,) stands out from the ground of its picture, in [0, 1].

    A window on a plain ground, such as a white page or a night sky, proves nothing; one on the slope of a sky does.
    """
    relief = np.maximum(np.abs(brightness - np.median(brightness)), np.abs(other - np.median(other)))
    result: np.ndarray = np.minimum(relief / SMOOTH_STEPS, 1.0)
    return result


def _are_equal(brightness: np.ndarray, other: np.ndarray, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Whether each window (W,) has the same brightness in both, and the same colour unless a picture is grey."""
    is_equal: np.ndarray = np.abs(other - brightness) < STRICT_LEVEL_STEPS
    if all(float(np.abs(colour).mean()) >= GREY for colour in colours):
        is_equal &= np.abs(colours[1] - colours[0]).max(1) < STRICT_LEVEL_STEPS
    return is_equal


def _equality_of_plain(one: Photograph, other: Photograph) -> float:
    """1 for two plain pictures of one colour and one amount of noise, else 0."""
    same_level = abs(float(one.brightness.mean() - other.brightness.mean())) < 4
    same_colour = bool((np.abs(one.colour.mean((0, 1)) - other.colour.mean((0, 1))) < 4).all())
    same_noise = abs(float(one.brightness.std() - other.brightness.std())) < 1
    return float(same_level and same_colour and same_noise)
