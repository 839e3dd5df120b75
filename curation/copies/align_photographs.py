"""Transforms that align two photographs: by their boxes, by their keypoints, or by their brightness at low resolution.

Most transforms are wrong; compare_photographs.py judges them. Those of several others are computed at once, and lead
from `one`, or to it where `is_first` is false. So the direction does not depend on the order of the two.

Legend: K keypoints; M matches; P pictures; B boxes; transforms (2, 3) map pixel centres (x, y, 1).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from curation.copies.alignment import MIRRORED_DESCRIPTOR
from curation.copies.photographs import DESCRIPTOR_UNIT, GRID_UNIT, KEYPOINTS, Photograph

# Constants without another source were measured as those of photographs.py.
MIN_AGREEMENT, MIN_DETAIL_AGREEMENT = 0.7, 0.22  # of two grids, and of their detail, for trying to align their boxes
MAX_ASPECT_CHANGE = 0.14  # change of the logarithm of the sides' ratio, from box to box
MAX_BOX_TRIALS, MAX_KEYPOINT_TRIALS = 2, 2
MIN_MATCH = 0.8  # inner product of two descriptors of unit length
MIN_MATCHES = 4
MAX_HYPOTHESES = 48  # the best matches, each of which proposes a transform
MIN_VOTES, MIN_INLIERS = 3, 4  # matches that agree with a proposal, and with the transform fitted to them
SMOOTH_SIDE = 48  # pixels of the longest side of the picture in which a smooth one is searched
SMOOTH_SCALES = (1.0, 0.9, 0.8, 0.7, 0.62)  # of the largest size at which one picture lies in the other
MIN_SMOOTH_CORRELATION = 0.9


def box_transforms(
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


def keypoint_transforms(
    one: Photograph, others: Sequence[Photograph], is_first: Sequence[bool]
) -> Iterator[list[np.ndarray]]:
    """For each of the others: transforms that keypoints agree on, most of them first; directed as those of boxes."""
    count = int(one.features["num_points"])
    if count < MIN_MATCHES:
        yield from ([] for _ in others)
        return
    descriptors = one.descriptors[:count]
    both = np.concatenate([descriptors, descriptors[:, MIRRORED_DESCRIPTOR]])
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


def smooth_transform(cv2: Any, brightness: np.ndarray, other: np.ndarray) -> np.ndarray | None:
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
