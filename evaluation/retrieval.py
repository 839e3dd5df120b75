"""Whether the nearest images show the same thing: rankings by cosine, and the scores of the published benchmarks.

    revisited    Revisited Oxford and Paris: mAP and mP@k, easy, medium and hard, with the junk rule.
                 <path>/gnd_*.pkl  <path>/jpg/*.jpg
    met          The Met dataset: GAP, GAP- (without distractors), accuracy. Its classifier's two numbers are chosen on
                 its validation set; features are not whitened.
                 <path>/ground_truth/{MET_database,testset,valset}.json  <path>/images/
    amstertime   AmsterTime: mAP, from archive to street view, back, and both together.
                 <path>/old/0000.jpg ...  <path>/new/0000.png ...
    labelled     any labelled set, each image a query among the others: mAP, recall@k

Legend: Q queries, N images of the database, D dimensions, K neighbours.

Two average precisions are in use. The benchmarks of Oxford and Paris take the area of trapezoids under the curve of
precision over recall; all others the mean of the precision at each relevant image, as scikit-learn does.

Sources: Radenovic et al., Revisiting Oxford and Paris (arXiv 1803.11285) and its published evaluation; Ypsilantis et
al., The Met Dataset (arXiv 2202.01747) and its published evaluation; Yildiz et al., AmsterTime (arXiv 2203.16291).
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from curation.config import Settings
from curation.engine.device import require_device
from curation.engine.ranks import all_ranks, gather_rows
from curation.engine.runner import InlineRunner, Runner
from curation.errors import InputError
from curation.files import npy, paths
from curation.files.hashes import hash_json, sha256_of_bytes
from curation.files.prefetch import prefetch
from curation.images.decode import ImageLimits, Picture, decode_picture, decode_rgb, to_shape
from curation.models import efficientnet
from curation.models.embedders import MAX_ASPECT
from evaluation import features, knn, results
from evaluation.data import splits
from evaluation.data.image_files import read_bytes, rejects_named
from evaluation.data.retrieval_data import (
    AmsterTimeData,
    LabelledData,
    MetData,
    Photo,
    RevisitedData,
    read_amstertime,
    read_met,
    read_revisited,
)
from evaluation.data.views import ViewConfig
from evaluation.features import FrozenModel, unit_rows
from evaluation.results import Result, Score

CUTOFFS = (1, 5, 10)  # the k of mP@k and recall@k. Cited: the evaluation of Revisited Oxford and Paris
DIFFICULTIES = ("easy", "medium", "hard")
# Photos a forward pass; changes the speed alone, but for rounding. Assumed.
PHOTOS_PER_PASS = 8
READERS = 2  # threads that read and decode ahead of the model. Assumed.
# Queries that are ranked at a time: with a million images 0.5 GB of products. Assumed.
QUERY_ROWS = 64


class RetrievalConfig(Settings):
    """One dataset."""

    name: str
    """What results call it."""
    data: Annotated[RevisitedData | MetData | AmsterTimeData | LabelledData, Field(discriminator="layout")]
    """Where it is."""


# ------------------------------------------------------------------------------------------------------------ scores


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
    columns = unit_rows(database.to(device), "database", dtype=torch.float64).T
    for start in range(0, len(queries), QUERY_ROWS):
        place = slice(start, min(start + QUERY_ROWS, len(queries)))
        units = unit_rows(queries[place].to(device), "query", dtype=torch.float64, first_row=start)
        cosines = (units @ columns).float()
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
    ranking: Tensor, positives: Tensor, junk: Tensor, cutoffs: Sequence[int] = CUTOFFS
) -> RevisitedScore | None:
    """One query by the rules of Revisited Oxford and Paris; None where it has no positives: it then does not count.

    ranking: (N,) rows of the database, the nearest first. positives, junk: rows. Junk is as if it were not in the
    ranking; what is both is a positive. The precision at k is that at the last positive where all come before k.
    """
    if not len(positives):
        return None
    is_positive = torch.isin(ranking, positives)
    places = torch.nonzero(is_positive)[:, 0]
    junk_before = (torch.isin(ranking, junk) & ~is_positive).cumsum(0)
    places = (places - junk_before[places]).double()
    found = torch.arange(len(places), dtype=torch.float64)
    before = torch.where(places > 0, found / places.clamp(min=1), 1.0)
    after = (found + 1) / (places + 1)
    precisions = []
    for cutoff in cutoffs:
        last = min(float(places.max()) + 1, cutoff)
        precisions.append(float((places < last).sum() / last))
    return RevisitedScore(float(((before + after) / 2).sum() / len(positives)), tuple(precisions))


@dataclass(frozen=True)
class InstancePredictions:
    """What the k nearest images say of each query, by the Met dataset's classifier."""

    predicted: Tensor
    """(Q,) the label."""
    confidence: Tensor
    """(Q,) float64."""


def classify_instances(similarities: Tensor, labels: Tensor, num_classes: int, *, scale: float) -> InstancePredictions:
    """The label of each query, and how sure it is, from its neighbours' cosines (Q, K) and labels (Q, K) integers.

    Each class among the neighbours scores its greatest cosine, or 0 where that is negative; each other of the
    `num_classes` scores 0. The confidence is the softmax of the scores times `scale`. Of equal classes the one with the
    lower label.
    """
    by_label = labels.argsort(dim=1, stable=True)
    ordered, cosines = labels.gather(1, by_label), similarities.double().gather(1, by_label)
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
    return InstancePredictions(predicted, (best.values * scale - total).exp())


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
    features: Tensor, labels: Tensor, *, cutoffs: Sequence[int] = CUTOFFS, device: str = "cpu"
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


# ---------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the model saw of some photos."""

    features: Tensor
    """(n, F) float32."""
    hash: str
    """Of the bytes of the images, their boxes, and their order."""


def _look(model: FrozenModel, photos: Sequence[Photo], view: ViewConfig, cache: str) -> _Seen:
    """The features of `photos`, from `<cache>/retrieval/` where the same model has seen the same bytes the same way."""
    hashes = prefetch(lambda photo: sha256_of_bytes(read_bytes(photo.path)), photos, threads=READERS)
    content = hash_json([[own, photo.box] for own, photo in zip(hashes, photos, strict=True)])
    key = hash_json([model.hash, content, view.resize, view.image_size])
    place = paths.join(cache, "retrieval", f"{key[:32]}.npy")
    if all_ranks(paths.exists(place)):
        found = torch.from_numpy(npy.read_array(place))
    else:
        share = model.world.share(len(photos))
        own = _compute(model, photos[share.start : share.stop], view, PHOTOS_PER_PASS)
        found = gather_rows(model.world, own, len(photos))
        if model.world.is_first:
            npy.write_arrays(place, found.numpy())
    return _Seen(found, content)


def _compute(model: FrozenModel, photos: Sequence[Photo], view: ViewConfig, batch_size: int) -> Tensor:
    result = torch.empty(len(photos), model.num_features)
    multiple = model.patch_size or efficientnet.STRIDE
    pictures = prefetch(
        lambda item: (item[0], see(item[1], view, multiple)),
        enumerate(photos),
        threads=READERS,
        ahead=2 * batch_size,
    )
    while batch := list(islice(pictures, batch_size)):
        by_shape: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for row, pixels in batch:
            by_shape.setdefault(pixels.shape, []).append((row, pixels))
        for alike in by_shape.values():
            rows, stacked = zip(*alike, strict=True)
            result[list(rows)] = model.image_features(torch.stack(stacked))
    return result


def see(photo: Photo, view: ViewConfig, multiple: int) -> Tensor:
    """The photo as the model sees it, (3, H, W) uint8. Raises InputError that names the file."""
    data = read_bytes(photo.path)
    limits = ImageLimits(min_side=1)
    with rejects_named(photo.path):
        if photo.box is None:
            picture = decode_picture(data, limits, target_side=view.image_size)
        else:
            whole = decode_rgb(data, limits)
            left, upper, right, lower = photo.box
            box = (max(left, 0), max(upper, 0), min(right, whole.width), min(lower, whole.height))
            if box[0] >= box[2] or box[1] >= box[3]:
                raise InputError(
                    f"{photo.path}: the box {photo.box} has nothing of its {whole.width} x {whole.height}."
                )
            part = whole.crop(box)
            picture = Picture(np.array(part), *part.size, orientation=1)
    side = view.image_size
    shape = (side, side)
    if view.resize == "keep_aspect":
        width, height = picture.width, picture.height
        if picture.orientation >= 5:  # EXIF: stored sideways
            width, height = height, width
        aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
        rows, columns = (max(1, round(side / multiple * root)) for root in (aspect**-0.5, aspect**0.5))
        shape = (rows * multiple, columns * multiple)
    return torch.from_numpy(to_shape(picture, shape, crop=view.resize == "center_crop"))


# --------------------------------------------------------------------------------------------------------------- run


class DatasetScores(NamedTuple):
    """What one dataset gave."""

    values: dict[tuple[str, str], float]
    """By protocol and metric."""
    data_hash: str
    facts: dict[str, Any]
    """What goes into the settings of the results beside the config."""


def run(
    config: RetrievalConfig, model: FrozenModel, output: str, *, cache: str | None = None, runner: Runner | None = None
) -> list[Result]:
    """Retrieve in one dataset; features are kept in `cache`, <output>/cache when None.

    `runner` reads and embeds "labelled" sets. Raises InputError for data that is missing or not as published.
    """
    started = time.perf_counter()
    cache = cache or paths.join(output, "cache")
    match config.data:
        case RevisitedData():
            found = _run_revisited(config.data, model, cache)
        case MetData():
            found = _run_met(config.data, model, cache)
        case AmsterTimeData():
            found = _run_amstertime(config.data, model, cache)
        case LabelledData():
            found = _run_labelled(config.data, model, cache, runner)
    return results.make(
        "retrieval",
        config.name,
        model,
        [Score(protocol, metric, value) for (protocol, metric), value in found.values.items()],
        data_hash=found.data_hash,
        settings=config.model_dump(mode="json") | found.facts,
        seconds=time.perf_counter() - started,
    )


def _run_revisited(data: RevisitedData, model: FrozenModel, cache: str) -> DatasetScores:
    published = read_revisited(data)
    queries = _look(model, published.queries, data.view, cache)
    database = _look(model, published.database, data.view, cache)
    scores: dict[str, list[RevisitedScore]] = {difficulty: [] for difficulty in DIFFICULTIES}
    for place, rankings in rank(queries.features, database.features, device=str(model.device)):
        for rows, ranking in zip(published.rows[place], rankings, strict=True):
            for difficulty in DIFFICULTIES:
                positives, junk = revisited_rows(rows, difficulty)
                score = revisited_score(ranking, positives, junk)
                if score is not None:
                    scores[difficulty].append(score)
    asked = "queries cropped" if data.query == "box" else "whole queries"
    values = {}
    for difficulty, own in scores.items():
        if own:
            protocol = f"{difficulty}, {asked}, {_view_name(data.view)}"
            values[protocol, "mAP"] = _mean([score.average_precision for score in own])
            for number, cutoff in enumerate(CUTOFFS):
                values[protocol, f"mP@{cutoff}"] = _mean([score.precisions[number] for score in own])
    truth = [[rows[key].tolist() for key in sorted(rows)] for rows in published.rows]
    return DatasetScores(
        values,
        hash_json([queries.hash, database.hash, truth]),
        {"queries": {difficulty: len(own) for difficulty, own in scores.items()}},
    )


def revisited_rows(rows: dict[str, Tensor], difficulty: str) -> tuple[Tensor, Tensor]:
    """The positives and the junk of a query. Easy: hard ones are junk; hard: easy ones; medium: both are positives."""
    easy, hard, junk = rows["easy"], rows["hard"], rows["junk"]
    match difficulty:
        case "easy":
            return easy, torch.cat([junk, hard])
        case "medium":
            return torch.cat([easy, hard]), junk
        case _:
            return hard, torch.cat([junk, easy])


def _run_met(data: MetData, model: FrozenModel, cache: str) -> DatasetScores:
    database, test = read_met(data, data.database), read_met(data, "testset.json")
    num_classes = len(set(database.labels.tolist()))
    seen = _look(model, database.photos, data.view, cache)
    most = max(data.neighbors)

    def search(queries: _Seen) -> tuple[Tensor, Tensor]:
        cosines, rows = knn.neighbors([seen.features], queries.features, k=most, device=str(model.device))
        return cosines, database.labels[rows]

    def score(found: tuple[Tensor, Tensor], labels: Tensor, k: int, scale: float) -> dict[str, float]:
        said = classify_instances(found[0][:, :k], found[1][:, :k], num_classes, scale=scale)
        correct, is_object = said.predicted == labels, labels >= 0
        count = int(is_object.sum())
        return {
            "GAP": global_average_precision(correct & is_object, said.confidence, count),
            "GAP-": global_average_precision(correct[is_object], said.confidence[is_object], count),
            "accuracy": float(correct[is_object].double().mean()),
        }

    asked = _look(model, test.photos, data.view, cache)
    hashes = [seen.hash, database.labels.tolist(), asked.hash, test.labels.tolist()]
    choices = [(k, scale) for k in data.neighbors for scale in data.scales]
    chosen = choices[0]
    if len(choices) > 1:
        tried = read_met(data, "valset.json")
        looked = _look(model, tried.photos, data.view, cache)
        hashes += [looked.hash, tried.labels.tolist()]
        near = search(looked)
        chosen = max(choices, key=lambda choice: score(near, tried.labels, *choice)["GAP"])  # the first of equal ones
    values = score(search(asked), test.labels, *chosen)
    protocol = f"{data.database.removesuffix('.json')}, {_view_name(data.view)}"
    return DatasetScores(
        {(protocol, metric): value for metric, value in values.items()},
        hash_json(hashes),
        {"chosen": {"neighbors": chosen[0], "scale": chosen[1]}},
    )


def _run_amstertime(data: AmsterTimeData, model: FrozenModel, cache: str) -> DatasetScores:
    old, new = (_look(model, photos, data.view, cache) for photos in read_amstertime(data))
    device = str(model.device)
    there = paired_precisions(old.features, new.features, device=device)
    back = paired_precisions(new.features, old.features, device=device)
    protocols = {"both ways": there + back, "archive to street": there, "street to archive": back}
    values = {(f"{name}, {_view_name(data.view)}", "mAP"): _mean(found) for name, found in protocols.items()}
    return DatasetScores(values, hash_json([old.hash, new.hash]), {"pairs": len(there)})


def _run_labelled(data: LabelledData, model: FrozenModel, cache: str, runner: Runner | None) -> DatasetScores:
    split = splits.load(data.split, cache, runner or InlineRunner())
    own = features.extract(model, split, data.pictures, cache, runner).matrix()
    # Equally near images come by row, and rows by class where folders are classes: a model to which all images are one
    # would rank each class first. Ids are hashes, so their order favours none.
    order = torch.tensor(np.argsort(np.array(split.table["image_id"].to_pylist())))
    score = labelled_score(own[order], split.labels[order], device=str(model.device))
    protocol = f"each among the others, {data.pictures.image_size} px"
    values = {(protocol, "mAP"): score.mean_average_precision}
    values |= {(protocol, f"recall@{k}"): value for k, value in score.recalls.items()}
    return DatasetScores(values, split.data_hash, {"images": len(split), "queries": score.num_queries})


def _view_name(view: ViewConfig) -> str:
    return f"{view.resize} {view.image_size} px"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
