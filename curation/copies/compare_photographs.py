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

    FEATURES    what the alignment needs of one picture. It is computed once for all comparisons (features.py)

Legend: h, w the sides of a prepared thumbnail in pixels; windows (h/4 - 1, w/4 - 1); K keypoints; M matches;
P pictures; B boxes; transforms (2, 3) map pixel centres (x, y, 1).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np

from curation.copies.compare_thumbnails import Likeness
from curation.copies.opencv import load_opencv
from curation.images.decode import ImageLimits, decode_rgb

# Constants without another source were measured 2026-11 on the development draw of copy_pictures.py: 540 photographs,
# textures and nebulae, 1,373 copies of 19 kinds, 11,471 candidates.
GRID = 24  # cells per side of the small grids
GRID_UNIT = 400  # the length of a grid as whole numbers; few cells are cut at 127
MAX_BOXES = 4
BORDER_STEPS = (24, 10)  # of 255: content differs from a plain border by more; the second finds borders of like colour
BORDER_SHARE = 0.02  # of a row or column, which content has at least
MIN_AGREEMENT, MIN_DETAIL_AGREEMENT = 0.7, 0.22  # of two grids, and of their detail, for trying to align their boxes
MAX_ASPECT_CHANGE = 0.14  # change of the logarithm of the sides' ratio, from box to box
MAX_BOX_TRIALS, MAX_KEYPOINT_TRIALS, MAX_REFINED = 2, 2, 2
KEYPOINTS = 200
CONTRAST, LOW_CONTRAST = 0.02, 0.006  # SIFT's thresholds; the second one for pictures with few keypoints
FEW_KEYPOINTS = 40
DESCRIPTOR_UNIT = 255  # the length of a square-rooted descriptor as whole numbers
MIN_MATCH = 0.8  # inner product of two descriptors of unit length
MIN_MATCHES = 4
MAX_HYPOTHESES = 48  # the best matches, each of which proposes a transform
MIN_VOTES, MIN_INLIERS = 3, 4  # matches that agree with a proposal, and with the transform fitted to them
SHARE_OF_QUICK = 0.06  # of the windows with texture, which agree before a transform is judged in full
EDGE = 2  # pixels at a picture's edge that are not compared
MIN_SIDE = 16  # pixels, up to which a narrower picture is stretched: one row of windows then lies between its edges
FEW_FOR_SMOOTH = 80  # keypoints, up to which a picture counts as smooth
SMOOTH_SIDE = 48  # pixels of the longest side of the picture in which a smooth one is searched
SMOOTH_SCALES = (1.0, 0.9, 0.8, 0.7, 0.62)  # of the largest size at which one picture lies in the other
MIN_SMOOTH_CORRELATION = 0.9
MIN_SMOOTH_SIMILARITY = 0.8  # of a part of a smooth picture; many have an edge or a slope in common
MAX_STRETCH = 1.2  # of one direction over another
MIN_OVERLAP, MIN_OTHER_OVERLAP = 0.72, 0.12  # share of one picture, and share of the other
BANDS = ((0.5, 2.0, 6.0), (1.2, 4.0, 12.0))  # of detail: two standard deviations in pixels, and the least variance
MIN_CORRELATION = 0.6  # of the detail of two windows that agree
LEVEL_STEPS, STRICT_LEVEL_STEPS = 10.0, 8.0  # of 255, between windows of equal brightness
PRIOR_WINDOWS = 15  # windows that do not agree, added to each picture's: few windows prove little
SHARPER = 2.2  # ratio of fine to coarse detail, from which the sharper picture is blurred
BLURS = (0.6, 0.9, 1.3, 1.8, 2.5, 3.5)  # standard deviations in pixels
MAX_RESIDUAL, MIN_NOISE = 6.0, 1.0  # of a local difference, in medians of all differences; steps of 255. Assumed
PLAIN = 0.06  # share of windows with texture, below which the course of brightness decides
MIN_PLAIN_OVERLAP = 0.4
GREY = 4.0  # mean colour, in steps, of a picture without colour
SMOOTH_STEPS, SMOOTH_WEIGHT = 8.0, 0.5  # steps from the ground at which a smooth window weighs so much
MIN_PLAIN = 0.6  # similarity of smooth pictures that are copies
ENOUGH = 0.75  # similarity from which no further transform is tried
AGREES_EVERYWHERE = 0.9  # texture of copies without an overlay
REFINED = 0.1, 0.6  # least texture, and similarity from which a transform needs no refinement

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


@final
class PhotographComparer:
    """Compares thumbnails of photographs. Raises DeviceError where OpenCV is not installed."""

    def __init__(self, side: int, *, forbid_differences: bool = False) -> None:
        self._cv2 = load_opencv()
        self._side, self._forbid_differences = side, forbid_differences
        self._sift, self._sensitive_sift = (
            self._cv2.SIFT.create(nfeatures=KEYPOINTS, contrastThreshold=contrast)
            for contrast in (CONTRAST, LOW_CONTRAST)
        )

    def prepare(self, thumbnail: bytes, features: np.void | None = None) -> "Photograph":
        """See compare_thumbnails.Comparer."""
        photograph = Photograph(self._cv2, thumbnail, self._side)
        if features is None:
            features = self.features(photograph)
        photograph.features = features
        return photograph

    def features(self, photograph: "Photograph") -> np.void:
        """The record of FEATURES of a photograph."""
        result = np.zeros((), FEATURES)
        result["size"] = photograph.brightness.shape[::-1]
        boxes = _content_boxes(photograph.picture)
        result["num_boxes"], result["boxes"][: len(boxes)] = len(boxes), boxes
        for number, (left, top, right, bottom) in enumerate(boxes):
            cells = self._cv2.resize(
                photograph.brightness[top:bottom, left:right], (GRID, GRID), interpolation=self._cv2.INTER_AREA
            )
            detail = cells - self._cv2.GaussianBlur(cells, (0, 0), 2.5)
            # Clipped, so that an overlay of strong contrast weighs no more than its area.
            detail = np.clip(detail / (2 * np.median(np.abs(detail)) + 0.6), -1, 1)
            for channel, values in enumerate((cells - cells.mean(), detail)):
                units = np.rint(GRID_UNIT * values / (np.linalg.norm(values) + 1e-3))
                result["grids"][number, channel] = np.clip(units, -127, 127)
        grey = photograph.brightness.astype(np.uint8)
        keypoints, descriptors = self._sift.detectAndCompute(grey, None)
        if len(keypoints) < FEW_KEYPOINTS:
            keypoints, descriptors = self._sensitive_sift.detectAndCompute(grey, None)
        if len(keypoints):
            order = np.argsort([-keypoint.response for keypoint in keypoints], kind="stable")[:KEYPOINTS]
            count = len(order)
            result["num_points"] = count
            result["points"][:count] = [
                (*keypoints[i].pt, math.log2(keypoints[i].size), math.radians(keypoints[i].angle)) for i in order
            ]
            roots = np.sqrt(descriptors[order] / np.maximum(descriptors[order].sum(1, keepdims=True), 1e-6))
            result["descriptors"][:count] = np.rint(DESCRIPTOR_UNIT * roots)
        record: np.void = result[()]  # type: ignore[assignment]  # a record, which numpy types as an array
        return record

    def compare(self, one: "Photograph", others: Sequence["Photograph"]) -> list[Likeness]:
        """See compare_thumbnails.Comparer."""
        is_first = [one.sort_key <= other.sort_key for other in others]
        by_keypoints = _keypoint_transforms(one, others, is_first)
        by_boxes = _box_transforms(one, others, is_first)
        return [
            self._compare(*((one, other) if in_order else (other, one)), [*boxes, *keypoints])
            for other, in_order, boxes, keypoints in zip(others, is_first, by_boxes, by_keypoints, strict=True)
        ]

    def _compare(self, one: "Photograph", other: "Photograph", transforms: Sequence[np.ndarray]) -> Likeness:
        """The best of the `transforms` from `one` to `other`."""
        if one.thumbnail == other.thumbnail:  # also pictures that are too small or too plain to be aligned
            return Likeness(1.0, False)
        if one.is_plain and other.is_plain:
            return Likeness(_equality_of_plain(one, other), False)
        judged: list[tuple[Evidence, np.ndarray]] = []
        for number, transform in enumerate(self._trials(one, other, transforms)):
            evidence = self._judge(one, other, transform)
            if evidence is not None and number >= len(transforms) and evidence.similarity < MIN_SMOOTH_SIMILARITY:
                evidence = None  # one edge or slope lies on many others
            if evidence is not None:
                judged.append((evidence, transform))
                if evidence.similarity >= ENOUGH:
                    break
        judged.sort(key=lambda pair: -pair[0].similarity)
        best = judged[0][0] if judged else None
        if best is not None and best.similarity < REFINED[1]:
            for evidence, transform in judged[:MAX_REFINED]:
                if evidence.texture < REFINED[0]:
                    continue
                refined = self._refine(one, other, transform)
                closer = None if refined is None else self._judge(one, other, refined)
                if closer is not None and closer.similarity > best.similarity:
                    best = closer
        if best is None:
            return Likeness(0.0, False)
        return Likeness(best.similarity, best.similarity > 0 and best.texture < AGREES_EVERYWHERE)

    def _trials(self, one: "Photograph", other: "Photograph", transforms: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The `transforms`; then, for smooth pictures, those of a part of one in the other."""
        yield from transforms
        if max(one.features["num_points"], other.features["num_points"]) <= FEW_FOR_SMOOTH:
            for start, end in ((one, other), (other, one)):
                transform = _smooth_transform(self._cv2, start.brightness, end.brightness)
                if transform is not None:
                    transform = transform if start is one else _inverse(transform)
                    refined = self._refine(one, other, transform)
                    yield transform if refined is None else refined

    def _judge(self, one: "Photograph", other: "Photograph", transform: np.ndarray) -> "Evidence | None":
        """The evidence where `one`, moved by `transform`, overlaps `other`; None without enough of an overlap."""
        cv2 = self._cv2
        longest, shortest = np.linalg.svd(transform[:, :2], compute_uv=False).tolist()
        area = longest * shortest
        if not 0.04 < area < 25 or longest > MAX_STRETCH * shortest:
            return None
        if area > 1:  # move the larger one, since enlarging cannot add detail
            one, other, transform, area = other, one, _inverse(transform), 1 / area
        height, width = other.brightness.shape
        inner = np.zeros(one.brightness.shape, np.float32)
        inner[EDGE:-EDGE, EDGE:-EDGE] = 1
        usable = cv2.warpAffine(inner, transform, (width, height))
        usable[:EDGE], usable[-EDGE:], usable[:, :EDGE], usable[:, -EDGE:] = 0, 0, 0, 0
        covered = float((usable > 0.98).mean())
        overlaps = covered, covered * height * width / area / inner.size
        if max(overlaps) < MIN_OVERLAP or min(overlaps) < MIN_OTHER_OVERLAP:
            return None
        mask = _windows(cv2, usable) > 0.98
        if mask.sum() < 9:
            return None
        source = one.brightness
        if area < 0.9:  # no detail that is finer than the pixels of the smaller one
            source = cv2.GaussianBlur(source, (0, 0), max(0.3, 0.5 * math.sqrt(1 / area - 1)))
        moved = cv2.warpAffine(
            source, transform, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        target, bands, other_bands = other.brightness, _bands(cv2, moved), other.bands
        coarse = _compare_band(cv2, bands[1], other_bands[1], mask, BANDS[1][2])
        num_windows = int(mask.sum())
        if coarse.present.sum() >= PLAIN * num_windows and coarse.share() < SHARE_OF_QUICK:
            return None
        textures = [_compare_band(cv2, bands[0], other_bands[0], mask, BANDS[0][2]), coarse]
        sharpness = [texture.energy for texture in textures]
        ratio = sharpness[0][0] * sharpness[1][1] / max(sharpness[1][0] * sharpness[0][1], 1e-6)
        if not 1 / SHARPER < ratio < SHARPER:
            fine_to_coarse = [fine / (coarse + 1e-3) for fine, coarse in zip(*sharpness, strict=True)]
            if ratio > 1:
                moved = _blurred(cv2, moved, mask, fine_to_coarse[1])
                bands = _bands(cv2, moved)
            else:
                target = _blurred(cv2, target, mask, fine_to_coarse[0])
                other_bands = _bands(cv2, target)
            textures = [
                _compare_band(cv2, band, other_band, mask, floor)
                for band, other_band, (*_, floor) in zip(bands, other_bands, BANDS, strict=True)
            ]
        brightness, other_brightness = _windows(cv2, moved)[mask], _windows(cv2, target)[mask]
        present = textures[0].present | textures[1].present
        steps = _level_steps(brightness, other_brightness, np.logical_or(*(texture.agrees for texture in textures)))
        if self._forbid_differences and _differs_locally(steps, mask):
            return None
        colour = cv2.warpAffine(one.colour, transform, (width, height), borderMode=cv2.BORDER_REPLICATE)
        colours = _windows(cv2, colour)[mask], _windows(cv2, other.colour)[mask]
        is_equal = _are_equal(brightness, other_brightness, colours)
        relief = _relief(brightness, other_brightness)
        if present.sum() < PLAIN * num_windows:
            if min(overlaps) < MIN_PLAIN_OVERLAP:
                return None
            equal = float(is_equal @ relief) / (float(relief.sum()) + PRIOR_WINDOWS)
            return Evidence(0.0, equal if equal > MIN_PLAIN else 0.0)
        agrees = present & (steps < LEVEL_STEPS)
        for texture in textures:
            agrees &= texture.agrees | ~texture.present
        weight = np.where(present, 1.0, SMOOTH_WEIGHT * relief)
        texture_share = float((agrees | (is_equal & ~present)) @ weight / (weight.sum() + PRIOR_WINDOWS))
        return Evidence(texture_share, math.sqrt(texture_share * float((steps < STRICT_LEVEL_STEPS).mean())))

    def _refine(self, one: "Photograph", other: "Photograph", transform: np.ndarray) -> np.ndarray | None:
        """The affine transform near `transform` that maximises the correlation of brightness; None when ECC fails."""
        cv2 = self._cv2
        size = other.brightness.shape[::-1]
        start = _inverse(transform).astype(np.float32)
        mask = cv2.warpAffine(np.full(one.brightness.shape, 255, np.uint8), transform, size, flags=cv2.INTER_NEAREST)
        criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 15, 1e-4)
        try:
            _, inverse = cv2.findTransformECC(other.smooth, one.smooth, start, cv2.MOTION_AFFINE, criteria, mask, 3)
        except cv2.error:  # the correlation cannot be raised from here; the first transform stays
            return None
        return _inverse(inverse.astype(np.float64))


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
        longest = max(picture.shape[:2])
        scale = max(min(1.0, self._side / longest), 32 / longest)
        height, width = (max(MIN_SIDE, 4 * round(length * scale / 4)) for length in picture.shape[:2])
        filter_ = self._cv2.INTER_AREA if scale < 1 else self._cv2.INTER_CUBIC
        resized: np.ndarray = self._cv2.resize(picture, (width, height), interpolation=filter_)
        return resized

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
        return _bands(self._cv2, self.brightness)

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


# Alignment


def _box_transforms(
    one: Photograph, others: Sequence[Photograph], is_first: Sequence[bool]
) -> Iterator[list[np.ndarray]]:
    """For each of the others: transforms from a box to a box, those with the best agreement of grids first.

    They lead from `one`, or to it where `is_first` is false.
    """
    targets = np.concatenate([other.grids for other in others], axis=1)
    agreement = one.turned_grids @ targets.transpose(0, 2, 1) / GRID_UNIT**2
    score = np.maximum(agreement[0] - MIN_AGREEMENT, 0) + 1.5 * np.maximum(agreement[1] - MIN_DETAIL_AGREEMENT, 0)
    count, start = int(one.features["num_boxes"]), 0
    for other, in_order in zip(others, is_first, strict=True):
        number = int(other.features["num_boxes"])
        of_other = score[:, start : start + number]
        start += number
        trials = []
        for row, target in np.argwhere(of_other > 0).tolist():
            turn, box = divmod(row, count)
            value = -float(of_other[row, target])
            if in_order:
                trials.append((value, turn, box, target))
            else:  # the inverse orientation; a mirrored one is its own inverse
                trials.append((value, turn if turn & 4 else -turn & 3, target, box))
        first, second = (one.features, other.features) if in_order else (other.features, one.features)
        transforms: list[np.ndarray] = []
        for _, turn, box, target in sorted(trials):
            if len(transforms) == MAX_BOX_TRIALS:
                break
            transform = _box_transform(first, second, turn, box, target)
            if transform is not None:
                transforms.append(transform)
        yield transforms


def _box_transform(first: np.void, second: np.void, turn: int, box: int, target: int) -> np.ndarray | None:
    """The transform from a box of the first, in an orientation, to a box of the second; None for other proportions."""
    (left, top, right, bottom), goal = (
        features["boxes"][number].astype(np.float64) for features, number in ((first, box), (second, target))
    )
    oriented = _orientation(turn, *(int(side) for side in first["size"]))
    corners = oriented @ np.array([[left - 0.5, top - 0.5, 1], [right - 0.5, bottom - 0.5, 1]]).T
    start, end = corners[:2].min(1), corners[:2].max(1)
    across, down = (goal[2:] - goal[:2]) / (end - start)
    if abs(math.log(across / down)) >= MAX_ASPECT_CHANGE:
        return None
    fitted = np.array([[across, 0, goal[0] - 0.5 - start[0] * across], [0, down, goal[1] - 0.5 - start[1] * down]])
    transform: np.ndarray = fitted @ oriented
    return transform


def _orientation(turn: int, width: int, height: int) -> np.ndarray:
    """The transform (3, 3) of a picture of that size to its orientation, as numpy.rot90 turns it."""
    result = np.eye(3)
    if turn & 4:
        result = np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])
    for _ in range(turn & 3):
        result = np.array([[0.0, 1, 0], [-1, 0, width - 1], [0, 0, 1]]) @ result
        width, height = height, width
    return result


def _keypoint_transforms(
    one: Photograph, others: Sequence[Photograph], is_first: Sequence[bool]
) -> Iterator[list[np.ndarray]]:
    """For each of the others: transforms that keypoints agree on, most of them first; directed as those of boxes."""
    count = int(one.features["num_points"])
    if count < MIN_MATCHES:
        yield from ([] for _ in others)
        return
    descriptors = one.descriptors[:count]
    both = np.concatenate([descriptors, descriptors[:, _MIRROR]])
    targets = np.stack([other.descriptors for other in others])  # (P, K, 128)
    agreement = (both @ targets.reshape(-1, 128).T).reshape(2, count, len(others), KEYPOINTS)
    match = agreement.argmax(3)  # (2, count, P)
    best = np.take_along_axis(agreement, match[..., None], 3)[..., 0]
    best_of_target = agreement.max(1)  # (2, P, K)
    is_mutual = best == np.take_along_axis(best_of_target, match.transpose(0, 2, 1), 2).transpose(0, 2, 1)
    is_mutual &= best > MIN_MATCH * DESCRIPTOR_UNIT**2
    enough = is_mutual.sum(1) >= MIN_MATCHES  # (2, P)
    for number, (other, in_order) in enumerate(zip(others, is_first, strict=True)):
        counted = []
        for mirrored in (0, 1):
            if not enough[mirrored, number]:
                continue
            rows = np.flatnonzero(is_mutual[mirrored, :, number])
            target_rows, values = match[mirrored, rows, number], best[mirrored, rows, number]
            if not in_order:
                rows, target_rows = target_rows, rows
            first, second = (one.features, other.features) if in_order else (other.features, one.features)
            order = np.lexsort((rows, -values))
            points = first["points"][rows[order]].astype(np.float64)
            width = int(first["size"][0])
            if mirrored:
                points[:, 0] = width - 1 - points[:, 0]
                points[:, 3] = math.pi - points[:, 3]
            agreed = _agreed_transform(points, second["points"][target_rows[order]].astype(np.float64))
            if agreed is not None:
                inliers, transform = agreed
                if mirrored:
                    transform = transform @ np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])
                counted.append((-inliers, mirrored, transform))
        counted.sort(key=lambda trial: trial[:2])
        yield [transform for _, _, transform in counted[:MAX_KEYPOINT_TRIALS]]


def _agreed_transform(points: np.ndarray, targets: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The transform that most of the matches (M, 4) agree on, with their number; None for fewer than MIN_INLIERS.

    Each match alone proposes a transform, by the places, sizes and angles of its two keypoints.
    """
    size = (targets[:, 2] - points[:, 2])[:MAX_HYPOTHESES, None]
    turn = (targets[:, 3] - points[:, 3])[:MAX_HYPOTHESES, None]
    scale = 2.0**size
    across, down = scale * np.cos(turn), scale * np.sin(turn)
    x, y = (points[None, :, axis] - points[:MAX_HYPOTHESES, None, axis] for axis in (0, 1))
    difference = (targets[:, 3] - points[:, 3])[None] - turn
    agrees = np.abs((difference + math.pi) % (2 * math.pi) - math.pi) < 0.5
    agrees &= np.abs((targets[:, 2] - points[:, 2])[None] - size) < 0.8
    if agrees.sum(1).max() < MIN_VOTES:
        return None
    error = np.hypot(
        targets[:MAX_HYPOTHESES, None, 0] + across * x - down * y - targets[None, :, 0],
        targets[:MAX_HYPOTHESES, None, 1] + down * x + across * y - targets[None, :, 1],
    )
    # Angles and sizes of keypoints are rough, so a proposal is less sure far from its own keypoint.
    agrees &= error < 3 + 0.2 * np.hypot(x, y) * scale
    votes = agrees.sum(1)
    homogeneous = np.column_stack([points[:, :2], np.ones(len(points))])
    best: tuple[int, np.ndarray, np.ndarray] | None = None
    is_tried = np.zeros(len(votes), bool)
    for _ in range(2):
        number = int(np.where(is_tried, -1, votes).argmax())
        if is_tried[number] or votes[number] < MIN_VOTES:
            break
        inliers = agrees[number]
        is_tried |= inliers[: len(votes)]
        is_tried[number] = True
        transform = None
        for tolerance in (6.0, 3.0, 2.0):  # pixels
            if inliers.sum() < 3:
                break
            transform = _fit_similarity(points[inliers, :2], targets[inliers, :2])
            inliers = np.hypot(*(homogeneous @ transform.T - targets[:, :2]).T) < tolerance
        count = int(inliers.sum())
        if transform is not None and count >= MIN_INLIERS and (best is None or count > best[0]):
            best = count, inliers, transform
    if best is None:
        return None
    count, inliers, transform = best
    if count >= 6:
        # An affine transform for stretched copies, drawn to the similarity transform where keypoints are few.
        centre = np.append(points[inliers, :2].mean(0), 0)
        centred = homogeneous[inliers] - centre
        change = np.linalg.solve(
            centred.T @ centred + np.diag([300.0, 300.0, 0.01]),
            centred.T @ (targets[inliers, :2] - homogeneous[inliers] @ transform.T),
        ).T
        affine = transform + change
        affine[:, 2] -= change[:, :2] @ centre[:2]
        num_closer = int((np.hypot(*(homogeneous @ affine.T - targets[:, :2]).T) < 2).sum())
        if num_closer >= count:
            return num_closer, affine
    return count, transform


def _fit_similarity(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The similarity transform (2, 3) with the least squared error from points to targets, (M, 2) each."""
    centre, target_centre = points.mean(0), targets.mean(0)
    (x, y), (u, v) = (points - centre).T, (targets - target_centre).T
    length = float(x @ x + y @ y) + 1e-6
    along, across = float(x @ u + y @ v) / length, float(x @ v - y @ u) / length
    rotation = np.array([[along, -across], [across, along]])
    return np.column_stack([rotation, target_centre - rotation @ centre])


def _smooth_transform(cv2: Any, brightness: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """The transform from a whole picture to the part of the other one that it resembles most; None for no such part."""
    shrink = SMOOTH_SIDE / max(other.shape)
    small = cv2.resize(other, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    most = min(small.shape[0] / brightness.shape[0], small.shape[1] / brightness.shape[1])
    best, transform = MIN_SMOOTH_CORRELATION, None
    for scale in SMOOTH_SCALES:
        height, width = (int(scale * most * length) for length in brightness.shape)
        if min(height, width) < 8:
            continue
        part = cv2.resize(brightness, (width, height), interpolation=cv2.INTER_AREA)
        _, correlation, _, (left, top) = cv2.minMaxLoc(cv2.matchTemplate(small, part, cv2.TM_CCOEFF_NORMED))
        if correlation > best:
            across = width / brightness.shape[1] * other.shape[1] / small.shape[1]
            down = height / brightness.shape[0] * other.shape[0] / small.shape[0]
            x, y = (
                place * length / of
                for place, length, of in zip((left, top), other.shape[::-1], small.shape[::-1], strict=True)
            )
            best = correlation
            transform = np.array([[across, 0, x + across / 2 - 0.5], [0, down, y + down / 2 - 0.5]])
    return transform


def _inverse(transform: np.ndarray) -> np.ndarray:
    inverse: np.ndarray = np.linalg.inv(np.vstack([transform, [0, 0, 1]]))[:2]
    return inverse


# Evidence


def _windows(cv2: Any, image: np.ndarray) -> np.ndarray:
    """Means over windows of 8 x 8 pixels, every 4 pixels."""
    height, width = image.shape[:2]
    cells = cv2.resize(image, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    means: np.ndarray = cv2.blur(cells, (2, 2), anchor=(0, 0))[:-1, :-1]
    return means


def _bands(cv2: Any, brightness: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(
        cv2.GaussianBlur(brightness, (0, 0), fine) - cv2.GaussianBlur(brightness, (0, 0), coarse)
        for fine, coarse, _ in BANDS
    )


def _compare_band(cv2: Any, band: np.ndarray, other: np.ndarray, mask: np.ndarray, floor: float) -> Texture:
    """Compare one band of two aligned pictures in the windows of `mask`."""
    products = _windows(cv2, np.dstack([band, other, band * band, other * other, band * other]))[mask]
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
        fine, coarse = (float(_windows(cv2, band * band)[mask].sum()) for band in _bands(cv2, blurred))
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


# Features


Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


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


def _mirrored_descriptor() -> np.ndarray:
    """The index of each of SIFT's 4 x 4 x 8 numbers in the mirrored picture: columns and orientations are reversed."""
    row, column, orientation = np.meshgrid(np.arange(4), np.arange(4), np.arange(8), indexing="ij")
    return (((3 - row) * 4 + column) * 8 + (8 - orientation) % 8).ravel()


_MIRROR = _mirrored_descriptor()
