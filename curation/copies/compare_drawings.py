"""Whether two thumbnails show one drawing, after a crop, a border, a turn, a mirror, other colours or an overlay.

The comparison looks for transforms that align one drawing with the other, then compares the two where they overlap.

1.  Transforms that align A with B: (a) from the whole of A, or A without its plain borders, to the same of B, straight
    or mirrored, where small grids of both agree; (b) a similarity transform through matching SIFT keypoints, straight
    or mirrored, refined to an affine one by ECC.
2.  A transform is judged in windows of 8 x 8 pixels: a window of A should explain the contrast of B in the same window,
    with similar brightness and colour. One gain and offset of brightness and one gain of colour are fitted for all.
3.  Unexplained contrast may lie in one rectangle, as an overlay does; then the rectangle's area lowers the similarity.
    Fine detail must agree outside of it. It does not for icons that share a frame, or stars of other proportions.

The similarity is a product of shares in [0, 1]. It depends only on the two pictures, not on earlier comparisons.

Legend: h, w the sides of a prepared thumbnail in pixels; windows (h/4 - 1, w/4 - 1); K keypoints; channels:
brightness, red-blue, green-magenta, and fine detail (a band-pass of brightness).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np

from curation.copies.alignment import MIRRORED_DESCRIPTOR, Box, inverse, refine, resized, window_means
from curation.copies.compare_thumbnails import Likeness
from curation.copies.opencv import load_opencv
from curation.images.decode import ImageLimits, decode_rgb

# All constants below were measured 2026-11 on drawings and stamps with planted copies.
GRID = 24  # cells per side of the small grids
MIN_GRID_AGREEMENT = 0.5  # minimum correlation of two grids for trying to align their boxes
MAX_ASPECT_CHANGE = 0.12  # change of the logarithm of the sides' ratio, from box to box
MAX_BOX_TRIALS = 3
SYMMETRIC = 0.999  # correlation of a grid with its mirror image
BORDER_CONTRAST = 24  # steps of 255; content differs from a plain border by more
KEYPOINTS = 200
MIN_KEYPOINT_AGREEMENT = 0.85  # inner product of two square-rooted SIFT descriptors
MIN_KEYPOINTS = 4
RANSAC_PIXELS = 2.0
MAX_TURN_DEGREES = 30.0
MIN_OVERLAP, MIN_OTHER_OVERLAP = 0.75, 0.25  # share of one picture, and share of the other
MIN_OVERLAP_BY_KEYPOINTS = 0.5  # share of the other picture: keypoints on a small shared part (a logo) prove nothing
SAME_FRAME = 0.96  # overlap of both pictures above which nothing was cropped
EDGE = 2  # pixels at a picture's edge that are not compared
VARIANCE_FLOOR, DETAIL_FLOOR = 30.0, 20.0  # squared steps of 255: noise of JPEG in flat parts
LEVEL_TOLERANCE = 32.0  # steps of 255 between window means that still agree
UNEXPLAINED_TRIM = 0.02  # share of all contrast that may lie unexplained outside the rectangle
MIN_CORRELATION = 0.1  # of windows, below which a transform is given up
LOCAL = 0.01  # minimum area of the rectangle, as a share of the content, for a local difference
DETAIL_POWER = 4
OVERLAY_DENSITY = 1.5  # contrast of an overlay relative to its share of the area

# Brightness, red-blue and green-magenta of RGB.
_OPPONENT = np.array([[0.299, 0.587, 0.114], [0.5, 0, -0.5], [-0.25, 0.5, -0.25]], np.float32).T
_THUMBNAIL_LIMITS = ImageLimits(min_side=1)


@final
class DrawingComparer:
    """Compares thumbnails of drawings. Raises DeviceError where OpenCV is not installed."""

    def __init__(self, side: int) -> None:
        self._cv2 = load_opencv()
        self._side = side
        self._sift = self._cv2.SIFT.create(nfeatures=KEYPOINTS, contrastThreshold=0.02)

    def prepare(self, thumbnail: bytes, features: np.void | None = None) -> "PreparedThumbnail":
        """See compare_thumbnails.Comparer."""
        picture = np.asarray(decode_rgb(thumbnail, _THUMBNAIL_LIMITS))
        return PreparedThumbnail(self._cv2, self._sift, picture, self._side)

    def compare(self, one: "PreparedThumbnail", others: Sequence["PreparedThumbnail"]) -> list[Likeness]:
        """See compare_thumbnails.Comparer."""
        return [self._compare(one, other) for other in others]

    def _compare(self, one: "PreparedThumbnail", other: "PreparedThumbnail") -> Likeness:
        keys = one.sort_key, other.sort_key
        if keys[0] == keys[1]:  # also pictures that are too flat or too thin to be aligned
            return Likeness(1.0, False)
        if keys[1] < keys[0]:
            one, other = other, one
        best: Comparison | None = None
        for transform in self._box_transforms(one, other):
            best = _better(best, self._align(one, other, transform))
            if best is not None and best.is_convincing:
                break
        if best is None or not best.is_convincing:
            best = _better(best, self._align_by_keypoints(one, other))
        if best is None or best.similarity <= 0:
            return Likeness(0.0, False)
        return Likeness(min(best.similarity, 1.0), best.rectangle > LOCAL)

    def _box_transforms(self, one: "PreparedThumbnail", other: "PreparedThumbnail") -> Iterator[np.ndarray]:
        """Transforms (2, 3) from a box of `one` to a box of `other`, those with the best agreement of grids first."""
        candidates = []
        for mirrored, grids in ((False, one.grids), (True, one.mirrored_grids)):
            if mirrored and one.is_symmetric:
                continue
            agreement = grids @ other.grids.T
            for i, box in enumerate(one.boxes):
                for j, target in enumerate(other.boxes):
                    change = abs(
                        math.log(
                            (box[2] - box[0]) / (box[3] - box[1]) * (target[3] - target[1]) / (target[2] - target[0])
                        )
                    )
                    if agreement[i, j] > MIN_GRID_AGREEMENT and change < MAX_ASPECT_CHANGE:
                        candidates.append((-float(agreement[i, j]), mirrored, i, j))
        corners = np.array([[0, 0, 1], [one.width, one.height, 1]]).T
        tried: list[np.ndarray] = []
        for _, mirrored, i, j in sorted(candidates):
            transform = _box_transform(one.boxes[i], other.boxes[j], mirrored)
            if all(np.abs((transform - earlier) @ corners).max() > 1 for earlier in tried):
                tried.append(transform)
                yield transform
            if len(tried) == MAX_BOX_TRIALS:
                return

    def _align_by_keypoints(self, one: "PreparedThumbnail", other: "PreparedThumbnail") -> "Comparison | None":
        """The comparison by the transform that most keypoints agree on; None without such a transform."""
        cv2 = self._cv2
        (points, descriptors), (targets, target_descriptors) = one.keypoints, other.keypoints
        if min(len(points), len(targets)) < MIN_KEYPOINTS:
            return None
        best: tuple[int, np.ndarray] | None = None
        for mirrored in (False, True):
            sources = points * [-1, 1] + [one.width - 1, 0] if mirrored else points
            source_descriptors = descriptors[:, MIRRORED_DESCRIPTOR] if mirrored else descriptors
            agreement = source_descriptors @ target_descriptors.T
            match = agreement.argmax(1)
            mutual = np.flatnonzero(agreement.argmax(0)[match] == np.arange(len(match)))
            mutual = mutual[agreement[mutual, match[mutual]] > MIN_KEYPOINT_AGREEMENT]
            if len(mutual) < MIN_KEYPOINTS:
                continue
            cv2.setRNGSeed(0)  # a pair's result must not depend on earlier pairs
            transform, inliers = cv2.estimateAffinePartial2D(
                sources[mutual].astype(np.float32),
                targets[match[mutual]],
                method=cv2.RANSAC,
                ransacReprojThreshold=RANSAC_PIXELS,
                maxIters=300,
                confidence=0.99,
                refineIters=5,
            )
            if transform is None or abs(math.degrees(math.atan2(transform[1, 0], transform[0, 0]))) > MAX_TURN_DEGREES:
                continue
            count = int(inliers.sum())
            if mirrored:
                transform = transform @ np.array([[-1, 0, one.width - 1], [0, 1, 0], [0, 0, 1.0]])
            if best is None or count > best[0]:
                best = count, transform
        if best is None or best[0] < MIN_KEYPOINTS:
            return None
        result = self._align(one, other, best[1], by_keypoints=True)
        if result is not None and result.explained * (1 - result.rectangle) > 0.4 and result.detail < 0.97:
            source, target = (np.ascontiguousarray(each.bands[..., 0]) for each in (one, other))
            refined = refine(cv2, source, target, best[1])
            if refined is not None:
                return _better(result, self._align(one, other, refined, by_keypoints=True))
        return result

    def _align(
        self, one: "PreparedThumbnail", other: "PreparedThumbnail", transform: np.ndarray, *, by_keypoints: bool = False
    ) -> "Comparison | None":
        """Align `one` with `other` by `transform` and compare them where they overlap; None for too little overlap."""
        cv2 = self._cv2
        determinant = abs(float(np.linalg.det(transform[:, :2])))
        if not 0.05 < determinant < 20:
            return None
        if determinant > 1.2:  # align the larger with the smaller, since enlarging cannot add detail
            one, other, transform, determinant = other, one, inverse(transform), 1 / determinant
        size = (other.width, other.height)
        covered = float(cv2.warpAffine(np.ones((one.height, one.width), np.float32), transform, size).mean())
        overlaps = covered, covered * other.width * other.height / determinant / (one.width * one.height)
        if max(overlaps) < MIN_OVERLAP or min(overlaps) < (
            MIN_OVERLAP_BY_KEYPOINTS if by_keypoints else MIN_OTHER_OVERLAP
        ):
            return None
        inner = np.zeros((one.height, one.width), np.float32)
        inner[EDGE:-EDGE, EDGE:-EDGE] = 1
        usable = cv2.warpAffine(inner, transform, size)
        usable[:EDGE], usable[-EDGE:], usable[:, :EDGE], usable[:, -EDGE:] = 0, 0, 0, 0
        mask = window_means(cv2, usable) > 0.98
        if mask.sum() < 9:
            return None
        source = one.bands
        if determinant < 0.4:  # from half the size, so that shrinking does not alias
            source = one.half_bands
            scale = np.array([[one.width / source.shape[1], 0, 0], [0, one.height / source.shape[0], 0], [0, 0, 1]])
            scale[:2, 2] = (scale[0, 0] - 1) / 2, (scale[1, 1] - 1) / 2
            transform = transform @ scale
        aligned = cv2.warpAffine(source, transform, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        windows = _window_statistics(cv2, aligned)
        covariance = window_means(cv2, aligned * other.bands) - windows.mean * other.windows.mean
        return _judge(windows, other.windows, covariance, mask, same_frame=min(overlaps) > SAME_FRAME)


class Windows(NamedTuple):
    """Means and variances of four channels in windows of 8 x 8 pixels, every 4 pixels: (rows, columns, 4) each."""

    mean: np.ndarray
    variance: np.ndarray


@final
class PreparedThumbnail:
    """One thumbnail, prepared for comparisons. Expensive features are computed at their first use."""

    features = None  # nothing that is stored

    def __init__(self, cv2: Any, sift: Any, picture: np.ndarray, side: int) -> None:
        self._cv2, self._sift = cv2, sift
        self._rgb = resized(cv2, picture, side, min_side=8)
        self.height, self.width = self._rgb.shape[:2]
        self.boxes = _content_boxes(self._rgb)
        grids = []
        for left, top, right, bottom in self.boxes:
            cells = cv2.resize(self._rgb[top:bottom, left:right], (GRID, GRID), interpolation=cv2.INTER_AREA)
            cells = cells.astype(np.float32)
            cells -= cells.mean((0, 1))
            grids.append(cells / (np.linalg.norm(cells) + 1e-3))
        self.grids = np.stack([grid.ravel() for grid in grids])
        self.mirrored_grids = np.stack([grid[:, ::-1].ravel() for grid in grids])

    @cached_property
    def sort_key(self) -> tuple[int, bytes]:
        """Sorts two thumbnails, so that comparing them gives one result."""
        return self.width * self.height, self._rgb.tobytes()

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether the mirror image looks the same, so that mirrored transforms need no trial."""
        return bool((self.grids * self.mirrored_grids).sum(1).min() > SYMMETRIC)

    @cached_property
    def _opponent(self) -> np.ndarray:
        opponent: np.ndarray = self._rgb.astype(np.float32) @ _OPPONENT
        return opponent

    @cached_property
    def bands(self) -> np.ndarray:
        """The four channels, (h, w, 4) float32."""
        return _bands(self._cv2, self._opponent)

    @cached_property
    def half_bands(self) -> np.ndarray:
        """The four channels at half the size."""
        size = (self.width // 2, self.height // 2)
        return _bands(self._cv2, self._cv2.resize(self._opponent, size, interpolation=self._cv2.INTER_AREA))

    @cached_property
    def windows(self) -> Windows:
        """The statistics of `bands`."""
        return _window_statistics(self._cv2, self.bands)

    @cached_property
    def keypoints(self) -> tuple[np.ndarray, np.ndarray]:
        """Points (K, 2) in pixels and square-rooted SIFT descriptors (K, 128) of unit length."""
        grey = self._cv2.cvtColor(self._rgb, self._cv2.COLOR_RGB2GRAY)
        keypoints, descriptors = self._sift.detectAndCompute(grey, None)
        if descriptors is None:
            return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32)
        points = np.array([keypoint.pt for keypoint in keypoints], np.float32).reshape(-1, 2)
        return points, np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-6))


@dataclass(frozen=True)
class Comparison:
    """How well two pictures agree under one transform."""

    explained: float
    """Share of the contrast outside the rectangle that the other picture explains."""
    rectangle: float
    """Area of the rectangle of unexplained contrast, as a share of the content's area."""
    rectangle_contrast: float
    """Share of all contrast that lies in the rectangle."""
    detail: float
    """Agreement of fine detail outside the rectangle, in [-1, 1]."""
    same_frame: bool
    """Whether each picture covers the other."""

    @property
    def is_convincing(self) -> bool:
        """Whether the search for a better transform may stop."""
        return self.explained * (1 - self.rectangle) * float(np.clip((self.detail - 0.5) / 0.3, 0, 1)) > 0.9

    @property
    def similarity(self) -> float:
        """In [0, 1]."""
        detail = max(0.0, self.detail)
        if self.rectangle <= 0:
            return self.explained * detail
        # An overlay leaves the frame as it is; a crop with a local difference is probably another picture.
        area = (1 - self.rectangle) ** (1 if self.same_frame else 3)
        density = min(1.0, self.rectangle_contrast / max(self.rectangle, LOCAL) / OVERLAY_DENSITY)
        return self.explained * area * detail**DETAIL_POWER * density


def _judge(
    aligned: Windows, other: Windows, covariance: np.ndarray, mask: np.ndarray, *, same_frame: bool
) -> Comparison | None:
    """Compare an aligned picture with the other one in the windows of `mask`; None when hardly anything agrees."""
    variance, other_variance = aligned.variance[..., :3].sum(2), other.variance[..., :3].sum(2)
    correlation = covariance[..., :3].sum(2) / (np.sqrt(variance * other_variance) + VARIANCE_FLOOR)
    if _share(correlation, np.sqrt(np.maximum(variance, other_variance)) * mask) < MIN_CORRELATION:
        return None
    match, weight = _explain(aligned, other, covariance, mask, 1.0, 1.0, 0.0)
    if _share(match, weight) < 0.985 and (fit := _fit_colours(aligned, other, covariance, mask)) is not None:
        fitted_match, fitted_weight = _explain(aligned, other, covariance, mask, *fit)
        if _share(fitted_match, fitted_weight) > _share(match, weight):
            match, weight = fitted_match, fitted_weight

    wrong = weight * (1 - match) * (match < 0.5)
    rectangle = np.zeros_like(mask)
    grown = np.zeros_like(mask)
    trim = UNEXPLAINED_TRIM * (weight.sum() + 1e-3) / (wrong.sum() + 1e-6) / 4  # at each of the four sides
    if trim < 0.5:
        top, bottom = _span(wrong.sum(1), trim)
        left, right = _span(wrong.sum(0), trim)
        rectangle[top : bottom + 1, left : right + 1] = True
        grown[max(0, top - 1) : bottom + 2, max(0, left - 1) : right + 2] = True
    outside = weight * ~rectangle
    rows, columns = np.flatnonzero((weight > 0).any(1)), np.flatnonzero((weight > 0).any(0))
    content = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) if len(rows) else 1
    rest = mask & ~grown
    region = rest if rest.any() else mask
    detail = (2 * covariance[..., 3][region].sum() + DETAIL_FLOOR) / (
        aligned.variance[..., 3][region].sum() + other.variance[..., 3][region].sum() + DETAIL_FLOOR
    )
    return Comparison(
        explained=float(1 - (outside * (1 - match)).sum() / (outside.sum() + 1e-3)),
        rectangle=float(min(rectangle.sum() / content, 1.0)),
        rectangle_contrast=float((weight * rectangle).sum() / (weight.sum() + 1e-3)),
        detail=float(detail),
        same_frame=same_frame,
    )


def _explain(
    aligned: Windows,
    other: Windows,
    covariance: np.ndarray,
    mask: np.ndarray,
    gain: float,
    colour_gain: float,
    offset: float,
) -> tuple[np.ndarray, np.ndarray]:
    """How well each window of the aligned picture explains that of the other, in [0, 1], and the window's weight."""
    gains = np.array([gain, colour_gain, colour_gain], np.float32)
    mean = aligned.mean[..., :3] * gains
    mean[..., 0] += offset
    variance = (aligned.variance[..., :3] * gains * gains).sum(2)
    other_variance = other.variance[..., :3].sum(2)
    structure = 2 * (covariance[..., :3] * gains).sum(2) + VARIANCE_FLOOR
    structure = structure / (variance + other_variance + VARIANCE_FLOOR)
    steps = np.abs(mean - other.mean[..., :3])
    level = np.maximum(steps[..., 0], 0.5 * (steps[..., 1] + steps[..., 2]))
    match = np.clip((structure - 0.3) / 0.4, 0, 1) * np.clip(2 - level / LEVEL_TOLERANCE, 0, 1)
    contrast = np.maximum(np.sqrt(np.maximum(variance, other_variance)) - 4, 0)
    return match, (contrast + np.maximum(level - LEVEL_TOLERANCE, 0)) * mask


def _fit_colours(
    aligned: Windows, other: Windows, covariance: np.ndarray, mask: np.ndarray
) -> tuple[float, float, float] | None:
    """Gain of brightness, gain of colour and offset of brightness that fit the aligned picture best, by medians."""
    brightness, other_brightness = aligned.variance[..., 0], other.variance[..., 0]
    similar = covariance[..., 0] > 0.5 * np.sqrt(brightness * other_brightness)
    chosen = mask & (brightness > 50) & (other_brightness > 20) & similar
    if chosen.sum() < 4:
        return None
    gain = _median(np.sqrt(other_brightness[chosen] / brightness[chosen]), brightness[chosen])
    gain = float(np.clip(gain, 0.5, 2))
    offset = _median((other.mean[..., 0] - gain * aligned.mean[..., 0])[mask], np.ones(int(mask.sum())))
    colour, other_colour = aligned.variance[..., 1:3].sum(2), other.variance[..., 1:3].sum(2)
    similar = covariance[..., 1:3].sum(2) > 0.5 * np.sqrt(colour * other_colour)
    chosen = mask & (colour > 50) & similar
    colour_gain = 1.0
    if chosen.sum() >= 4:
        colour_gain = _median(np.sqrt(other_colour[chosen] / colour[chosen]), colour[chosen])
    return gain, float(np.clip(colour_gain, 0.4, 2.5)), offset


def _share(match: np.ndarray, weight: np.ndarray) -> float:
    """The weighted mean, 0 for no weight."""
    return float((match * weight).sum() / (weight.sum() + 1e-3))


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted median."""
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulated, cumulated[-1] / 2)])


def _span(amounts: np.ndarray, trim: float) -> tuple[int, int]:
    """The first and last index between which all but the share `trim` at either end lies."""
    cumulated = np.cumsum(amounts) / (amounts.sum() + 1e-6)
    return int(np.searchsorted(cumulated, trim)), int(np.searchsorted(cumulated, 1 - trim))


def _better(one: Comparison | None, other: Comparison | None) -> Comparison | None:
    """The comparison with the greater similarity; the first when they are equal or the other is None."""
    if one is None or other is None:
        return one or other
    return other if other.similarity > one.similarity else one


def _window_statistics(cv2: Any, bands: np.ndarray) -> Windows:
    mean = window_means(cv2, bands)
    return Windows(mean, np.maximum(window_means(cv2, bands * bands) - mean * mean, 0))


def _bands(cv2: Any, opponent: np.ndarray) -> np.ndarray:
    """Three smoothed opponent channels and the fine detail of brightness, (h, w, 4)."""
    brightness = np.ascontiguousarray(opponent[..., 0])
    detail = cv2.GaussianBlur(brightness, (0, 0), 0.5) - cv2.GaussianBlur(brightness, (0, 0), 2.0)
    return np.dstack([cv2.GaussianBlur(opponent, (0, 0), 1.0), detail])


def _content_boxes(picture: np.ndarray, max_boxes: int = 3) -> list[Box]:
    """The whole picture, then the picture without its plain border, then without the next border, and so on."""
    boxes: list[Box] = [(0, 0, picture.shape[1], picture.shape[0])]
    for _ in range(2 * max_boxes):
        inner = _without_border(picture, boxes[-1])
        if inner == boxes[-1]:
            break
        if len(boxes) > 1 and max(abs(a - b) for a, b in zip(inner, boxes[-1], strict=True)) <= 2:
            boxes[-1] = inner  # the blurred edge of a border
        elif len(boxes) < max_boxes:
            boxes.append(inner)
        else:
            break
    return boxes


def _without_border(picture: np.ndarray, box: Box) -> Box:
    """The box inside the plain border of `box`; `box` itself when it has none."""
    left, top, right, bottom = box
    part = picture[top:bottom, left:right].astype(np.int16)
    ring = np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]])
    differs = np.abs(part - np.median(ring, axis=0)).max(2) > BORDER_CONTRAST
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    if len(rows) < 8 or len(columns) < 8:
        return box
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _box_transform(box: Box, target: Box, mirrored: bool) -> np.ndarray:
    """The transform (2, 3) of pixel centres from `box` to `target`."""
    across = (target[2] - target[0]) / (box[2] - box[0])
    down = (target[3] - target[1]) / (box[3] - box[1])
    y = target[1] - 0.5 - (box[1] - 0.5) * down
    if mirrored:
        return np.array([[-across, 0, target[2] - 0.5 + (box[0] - 0.5) * across], [0, down, y]])
    return np.array([[across, 0, target[0] - 0.5 - (box[0] - 0.5) * across], [0, down, y]])
