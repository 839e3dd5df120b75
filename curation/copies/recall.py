"""How many edited copies of a run's own images are recognised, and which other images they match.

The copies are made and scored by report/self_check.py. A copy is found when its original is a candidate of it, and the
similarity of the two reaches the threshold of dedup. A pair of a copy with another image is unexpected when its
similarity reaches the threshold, too, and the run does not call that image a copy of the original. An unexpected pair
is a false match, or a copy in the pool that the run missed: only a person can tell.

Intervals are those of Wilson (1927) at 95%. They take the copies for independent, although several may be of one image.

Legend: R scored pairs. A share is in [0, 1].
"""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.copies.edits import KINDS

Z = 1.96  # of the normal distribution, for intervals of 95%
# Distance of the thresholds that are compared. Assumed: fine enough for a setting with two digits.
THRESHOLD_STEP = 0.01


@dataclass(frozen=True)
class Share:
    """A count and its whole."""

    count: int
    whole: int

    @property
    def value(self) -> float:
        """The share; 0 of nothing."""
        return self.count / self.whole if self.whole else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the interval of Wilson; 0 and 1 of nothing."""
        if not self.whole:
            return 0.0, 1.0
        whole, square = self.whole, Z * Z
        middle = (self.count + square / 2) / (whole + square)
        half = Z * math.sqrt(self.count * (whole - self.count) / whole + square / 4) / (whole + square)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class KindRecall:
    """The copies of one kind of edit: their originals that are candidates, and those that are found."""

    kind: str
    proposed: Share
    found: Share
    found_for_holdout: Share
    """Found at the threshold for matches of the holdout."""


@dataclass(frozen=True)
class UnexpectedPair:
    """A copy of `image_id` that is as similar to another image as copies are."""

    image_id: str
    kind: str
    other_image_id: str
    similarity: float


@dataclass(frozen=True)
class BetterThreshold:
    """A threshold that finds more copies with no more unexpected pairs, or as many with fewer."""

    threshold: float
    found: Share
    unexpected: Share


@dataclass(frozen=True)
class SelfCheck:
    """The results of the edited copies of a run."""

    num_images: int
    """Images that were edited."""
    threshold: float
    holdout_threshold: float
    kinds: list[KindRecall]
    """In the order of KINDS."""
    found: Share
    """Of all copies."""
    unexpected: Share
    """Of the candidates that are neither the original nor, by the run, a copy of it."""
    unexpected_pairs: list[UnexpectedPair]
    """The most similar of each edited image, in falling order, so that one group of alike images does not fill it."""
    better: BetterThreshold | None


def summarize(
    scores: pa.Table, known: pa.Table, *, threshold: float, holdout_threshold: float, min_similarity: float
) -> SelfCheck:
    """The results of `scores` (schemas.SELF_CHECK_SCORES).

    known: the pairs of the run among the edited images and all others (schemas.SELF_CHECK_KNOWN). min_similarity: the
    lowest that `pairs` writes; with `holdout_threshold` it bounds the thresholds that dedup takes.
    """
    names = ("image_id", "other_image_id", "kind")
    ids, others, kinds = (scores[name].to_numpy(zero_copy_only=False) for name in names)
    proposed = scores["proposed"].to_numpy(zero_copy_only=False).astype(bool)
    similarity = scores["similarity"].to_numpy()
    is_original = ids == others
    are_copies = known.filter(pc.greater_equal(known["similarity"], pa.scalar(threshold, pa.float32())))
    expected = set(zip(are_copies["image_id"].to_pylist(), are_copies["other_image_id"].to_pylist(), strict=True))
    is_other = proposed & ~is_original
    is_other &= ~np.array([pair in expected for pair in zip(ids.tolist(), others.tolist(), strict=True)], bool)

    def found(chosen: np.ndarray, at: float) -> Share:
        reached = chosen & proposed & (similarity >= np.float32(at))
        return Share(int(reached.sum()), int(chosen.sum()))

    def unexpected(at: float) -> Share:
        return Share(int((is_other & (similarity >= np.float32(at))).sum()), int(is_other.sum()))

    by_kind = []
    for kind in KINDS:
        of_kind = is_original & (kinds == kind)
        by_kind.append(
            KindRecall(
                kind,
                Share(int((of_kind & proposed).sum()), int(of_kind.sum())),
                found(of_kind, threshold),
                found(of_kind, holdout_threshold),
            )
        )
    lowest = max(min_similarity, holdout_threshold)
    steps = range(math.ceil(round(lowest / THRESHOLD_STEP, 6)), round(1 / THRESHOLD_STEP))
    return SelfCheck(
        num_images=len(set(ids.tolist())),
        threshold=threshold,
        holdout_threshold=holdout_threshold,
        kinds=by_kind,
        found=found(is_original, threshold),
        unexpected=unexpected(threshold),
        unexpected_pairs=_unexpected_pairs(scores, is_other & (similarity >= np.float32(threshold))),
        better=_better_threshold(
            BetterThreshold(threshold, found(is_original, threshold), unexpected(threshold)),
            [
                BetterThreshold(at, found(is_original, at), unexpected(at))
                for at in (round(step * THRESHOLD_STEP, 6) for step in steps)
            ],
        ),
    )


def _unexpected_pairs(scores: pa.Table, chosen: np.ndarray) -> list[UnexpectedPair]:
    rows = scores.filter(pa.array(chosen)).select(["image_id", "kind", "other_image_id", "similarity"]).to_pylist()
    first: dict[str, UnexpectedPair] = {}
    for pair in sorted((UnexpectedPair(**row) for row in rows), key=_by_similarity):
        first.setdefault(pair.image_id, pair)
    return list(first.values())


def _by_similarity(pair: UnexpectedPair) -> tuple[float, str, str, str]:
    return -pair.similarity, pair.image_id, pair.other_image_id, pair.kind


def _better_threshold(now: BetterThreshold, others: list[BetterThreshold]) -> BetterThreshold | None:
    """The best of `others` that loses nothing; None where its gain is within the intervals of the two thresholds."""
    no_worse = [
        other
        for other in others
        if other.found.count >= now.found.count and other.unexpected.count <= now.unexpected.count
    ]
    best = max(
        no_worse,
        key=lambda other: (other.found.count, -other.unexpected.count, -abs(other.threshold - now.threshold)),
        default=now,
    )
    gains = _is_surely_less(now.found, best.found) or _is_surely_less(best.unexpected, now.unexpected)
    return best if gains else None


def _is_surely_less(one: Share, other: Share) -> bool:
    return one.value < other.interval[0] and one.interval[1] < other.value
