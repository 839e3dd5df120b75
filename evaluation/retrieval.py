"""Whether the nearest images show the same thing: rankings by cosine, and the scores of the published benchmarks.

    revisited    Revisited Oxford and Paris: mAP and mP@k, easy, medium and hard, with the junk rule
    met          The Met dataset: GAP, GAP- (without distractors), accuracy
    amstertime   AmsterTime: mAP, from archive to street view and back
    labelled     any labelled set, each image a query among the others: mAP, recall@k

Legend: Q queries, N images of the database, D dimensions, K neighbours.

Two average precisions are in use. The benchmarks of Oxford and Paris take the area of trapezoids under the curve of
precision over recall; all others the mean of the precision at each relevant image, as scikit-learn does.

Sources: Radenovic et al., Revisiting Oxford and Paris (arXiv 1803.11285) and its published evaluation; Ypsilantis et
al., The Met Dataset (arXiv 2202.01747) and its published evaluation; Yildiz et al., AmsterTime (arXiv 2203.16291).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from curation.devices import require_device
from curation.errors import InputError

# Queries that are ranked at a time: with a million images 0.5 GB of products. Assumed.
QUERY_ROWS = 64


def rank(queries: Tensor, database: Tensor, *, device: str = "cpu") -> Iterator[tuple[slice, Tensor]]:
    """All images of the database, the nearest in cosine first: queries (Q, D) and (N, D) to blocks of rankings (q, N).

    Each block comes with the place of its queries, on the CPU, int64. Equally near images come by row: products are
    rounded from float64 to float32, so that equal images are equally near, however many queries come together.
    Raises InputError.
    """
    require_device(device)
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise InputError(
            f"Expected features (Q, D) and (N, D). Found: {list(queries.shape)} and {list(database.shape)}."
        )
    columns = _unit(database, "database", device).T
    for start in range(0, len(queries), QUERY_ROWS):
        place = slice(start, min(start + QUERY_ROWS, len(queries)))
        cosines = (_unit(queries[place], "queries", device) @ columns).float()
        yield place, cosines.argsort(dim=1, descending=True, stable=True).cpu()


def average_precision(relevant: Tensor, num_relevant: int | None = None) -> float:
    """The mean of the precision at each relevant image of a ranking. relevant: (N,) bool, the nearest first.

    num_relevant: those there are in all, where the ranking does not hold them all. NaN where there are none.
    """
    places = torch.nonzero(relevant)[:, 0].double()
    found = torch.arange(1, len(places) + 1, dtype=torch.float64)
    count = len(places) if num_relevant is None else num_relevant
    return float((found / (places + 1)).sum() / count) if count else float("nan")


class RevisitedScore(NamedTuple):
    """Of one query."""

    average_precision: float
    precisions: tuple[float, ...]
    """One for each of the asked numbers of images."""


def revisited_score(
    ranking: Tensor, positives: Tensor, junk: Tensor, cutoffs: Sequence[int] = (1, 5, 10)
) -> RevisitedScore | None:
    """One query by the rules of Revisited Oxford and Paris; None where it has no positives: it then does not count.

    ranking: (N,) rows of the database, the nearest first. positives, junk: rows. Junk is as if it were not in the
    ranking. The precision at k is that at the last positive where all come before k.
    """
    if not len(positives):
        return None
    is_junk = torch.isin(ranking, junk)
    places = torch.nonzero(torch.isin(ranking, positives))[:, 0]
    places = (places - (is_junk.cumsum(0) - is_junk.long())[places]).double()
    found = torch.arange(len(places), dtype=torch.float64)
    before = torch.where(places > 0, found / places.clamp(min=1), 1.0)
    after = (found + 1) / (places + 1)
    precisions = []
    for cutoff in cutoffs:
        last = min(float(places.max()) + 1, cutoff)
        precisions.append(float((places < last).sum() / last))
    return RevisitedScore(float(((before + after) / 2).sum() / len(positives)), tuple(precisions))


@dataclass(frozen=True)
class Instances:
    """What the k nearest images say of each query, by the Met dataset's classifier."""

    predicted: Tensor
    """(Q,) the label."""
    confidence: Tensor
    """(Q,) float64."""


def classify_instances(similarities: Tensor, labels: Tensor, num_classes: int, *, scale: float) -> Instances:
    """The label of each query, and how sure it is, from its neighbours' cosines (Q, K) and labels (Q, K) integers.

    Each class among the neighbours scores its greatest cosine, or 0 where that is negative; each other of the
    `num_classes` scores 0. The confidence is the softmax of the scores times `scale`. Of equal classes the one with the
    lower label.
    """
    by_label = labels.argsort(dim=1, stable=True)
    ordered, cosines = labels.gather(1, by_label), similarities.double().gather(1, by_label).clamp(min=0)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = is_first.cumsum(1) - 1
    scores = torch.zeros_like(cosines).scatter_reduce_(1, group, cosines, "amax")
    present = torch.arange(scores.shape[1]) <= group[:, -1:]
    best = torch.where(present, scores, -1.0).max(dim=1)
    logits = torch.where(present, scores * scale, -torch.inf)
    absent = (num_classes - present.sum(1)).double().log()  # of that many classes, each e^0
    total = torch.logsumexp(torch.cat([logits, absent[:, None]], dim=1), dim=1)
    which = (group == best.indices[:, None]).long().argmax(dim=1)
    predicted = ordered.gather(1, which[:, None])[:, 0]
    return Instances(predicted, (best.values * scale - total).exp())


def global_average_precision(correct: Tensor, confidence: Tensor, num_objects: int) -> float:
    """GAP: the precision at each correct prediction, the surest first, summed over `num_objects`.

    correct: (Q,) bool, False for a distractor; num_objects: queries that are none. Of equally sure ones the earlier
    query first.
    """
    if num_objects < 1:
        raise InputError("GAP needs a query that shows an object of the database.")
    order = confidence.argsort(descending=True, stable=True)
    return average_precision(correct[order], num_objects)


class LabelledScore(NamedTuple):
    """Of each image of a labelled set as a query among the others."""

    mean_average_precision: float
    recalls: dict[int, float]
    """By k: the share of queries with an image of their label among the k nearest."""
    num_queries: int
    """Images whose label another image has; the others are only found, not asked."""


def labelled_score(
    features: Tensor, labels: Tensor, *, cutoffs: Sequence[int] = (1, 5, 10), device: str = "cpu"
) -> LabelledScore:
    """mAP and recall@k of (N, D) features with integer labels (N,). Raises InputError where no label occurs twice."""
    if labels.shape != features.shape[:1]:
        raise InputError(f"Expected a label for each image. Found: {list(labels.shape)} for {list(features.shape)}.")
    precisions, hits = [], dict.fromkeys(cutoffs, 0)
    for place, rankings in rank(features, features, device=device):
        for row, ranking in zip(range(place.start, place.stop), rankings, strict=True):
            relevant = labels[ranking[ranking != row]] == labels[row]
            if relevant.any():
                precisions.append(average_precision(relevant))
                for cutoff in cutoffs:
                    hits[cutoff] += bool(relevant[:cutoff].any())
    if not precisions:
        raise InputError(f"Retrieval needs a label that two images have. Found {len(labels)} images, all different.")
    count = len(precisions)
    return LabelledScore(sum(precisions) / count, {k: found / count for k, found in hits.items()}, count)


def paired_precisions(queries: Tensor, database: Tensor, *, device: str = "cpu") -> list[float]:
    """For each of (Q, D) queries the average precision of the one image of the same row among (Q, D): 1 / its rank."""
    found = []
    for place, rankings in rank(queries, database, device=device):
        own = torch.arange(place.start, place.stop)[:, None]
        found.extend((1 / ((rankings == own).long().argmax(dim=1) + 1).double()).tolist())
    return found


def _unit(features: Tensor, what: str, device: str) -> Tensor:
    units = functional.normalize(features.to(device, torch.float64), dim=1)
    wrong = torch.nonzero(~units.isfinite().all(1))
    if len(wrong):
        raise InputError(f"The features of the {what} hold a value that is not finite, in row {int(wrong[0])}.")
    return units
