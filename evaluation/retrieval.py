"""Instance retrieval: ranks images by cosine and scores the rankings as the published benchmarks do.

    revisited    Revisited Oxford and Paris: mAP and mP@k, easy, medium and hard, with the junk rule.
                 <path>/gnd_*.pkl  <path>/jpg/*.jpg
    met          The Met dataset: GAP, GAP- (without distractors), accuracy. The two parameters of its classifier are
                 selected on its validation set; features are not whitened.
                 <path>/ground_truth/{MET_database,testset,valset}.json  <path>/images/
    amstertime   AmsterTime: mAP, from archive to street view, from street view to archive, and both together.
                 <path>/old/0000.jpg ...  <path>/new/0000.png ...
    labelled     any labelled set; each image is a query among the others: mAP, recall@k

Legend: Q queries, N images of the database, D dimensions, K neighbours.

There are two definitions of average precision. Oxford and Paris use the area of trapezoids under the curve of
precision over recall. All others use the mean of the precision at each relevant image, as scikit-learn does.

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
from curation.files.hashes import hash_json, sha256_of_bytes, sha256_of_file
from curation.files.paths import FileRecord
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
# Photos a forward pass; changes only the speed, apart from rounding. Assumed.
PHOTOS_PER_PASS = 8
READERS = 2  # threads that read and decode in advance. Assumed.
# Queries ranked at a time: 0.5 GB of products for a million images. Assumed.
QUERY_ROWS = 64


class RetrievalConfig(Settings):
    """Retrieval in one dataset."""

    name: str
    """Name of the dataset in results."""
    data: Annotated[RevisitedData | MetData | AmsterTimeData | LabelledData, Field(discriminator="layout")]
    """Its layout and location."""


# ------------------------------------------------------------------------------------------------------------ scores


def rank(queries: Tensor, database: Tensor, *, device: str = "cpu") -> Iterator[tuple[slice, Tensor]]:
    """Rankings of a database (N, D) by cosine, nearest first, for queries (Q, D), in blocks (q, N) int64 on the CPU.

    Each block comes with the slice of its queries. Equally near images are ordered by row: products are rounded from
    float64 to float32, so equal images are equally near, however many queries are ranked together. Raises InputError.
    """
    require_device(device)
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise InputError(
            f"Expected features (Q, D) and (N, D). Found: {list(queries.shape)} and {list(database.shape)}."
        )
    columns = unit_rows(database.to(device), "database", dtype=torch.float64).T
    for start in range(0, len(queries), QUERY_ROWS):
        block = slice(start, min(start + QUERY_ROWS, len(queries)))
        units = unit_rows(queries[block].to(device), "query", dtype=torch.float64, first_row=start)
        cosines = (units @ columns).float()
        yield block, cosines.argsort(dim=1, descending=True, stable=True).cpu()


def average_precision(relevant: Tensor, num_relevant: int | None = None) -> float:
    """The mean of the precision at each relevant image of a ranking. relevant: (N,) bool, nearest first.

    num_relevant: the number of all relevant images, where the ranking does not hold all. NaN where there are none.
    """
    ranks = torch.nonzero(relevant)[:, 0].double()  # from 0
    num_relevant_so_far = torch.arange(1, len(ranks) + 1, dtype=torch.float64)
    count = len(ranks) if num_relevant is None else num_relevant
    return float((num_relevant_so_far / (ranks + 1)).sum() / count) if count else float("nan")


class RevisitedScore(NamedTuple):
    """Scores of one query."""

    average_precision: float
    precisions: tuple[float, ...]
    """The precision at each cutoff."""


def revisited_score(
    ranking: Tensor, positives: Tensor, junk: Tensor, cutoffs: Sequence[int] = CUTOFFS
) -> RevisitedScore | None:
    """Scores of one query by the rules of Revisited Oxford and Paris; None for a query without positives.

    ranking: (N,) rows of the database, nearest first. positives, junk: rows. Junk is removed from the ranking; a row in
    both is a positive. Where all positives rank before k, the precision at k is that at the last positive.
    """
    if not len(positives):
        return None
    is_positive = torch.isin(ranking, positives)
    ranks = torch.nonzero(is_positive)[:, 0]
    junk_before = (torch.isin(ranking, junk) & ~is_positive).cumsum(0)
    ranks = (ranks - junk_before[ranks]).double()  # from 0, without junk
    positives_before = torch.arange(len(ranks), dtype=torch.float64)
    before = torch.where(ranks > 0, positives_before / ranks.clamp(min=1), 1.0)
    after = (positives_before + 1) / (ranks + 1)
    precisions = []
    for cutoff in cutoffs:
        last = min(float(ranks.max()) + 1, cutoff)
        precisions.append(float((ranks < last).sum() / last))
    return RevisitedScore(float(((before + after) / 2).sum() / len(positives)), tuple(precisions))


@dataclass(frozen=True)
class InstancePredictions:
    """Predictions of the Met dataset's classifier from the k nearest images of each query."""

    predicted: Tensor
    """(Q,) labels."""
    confidence: Tensor
    """(Q,) float64."""


def classify_instances(similarities: Tensor, labels: Tensor, num_classes: int, *, scale: float) -> InstancePredictions:
    """The label and the confidence of each query, from its neighbours' cosines (Q, K) and labels (Q, K) integers.

    A class among the neighbours scores its greatest cosine, or 0 where that is negative. Each other of the
    `num_classes` scores 0. The confidence is the softmax of the scores times `scale`. Ties go to the lower label.
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
    absent = (num_classes - present.sum(1)).double().log()  # the sum over these classes, each e^0
    total = torch.logsumexp(torch.cat([logits, absent[:, None]], dim=1), dim=1)
    first_of_best = (group == best.indices[:, None]).long().argmax(dim=1)
    predicted = ordered.gather(1, first_of_best[:, None])[:, 0]
    return InstancePredictions(predicted, (best.values * scale - total).exp())


def global_average_precision(correct: Tensor, confidence: Tensor, num_objects: int) -> float:
    """GAP: the sum of the precision at each correct prediction, most confident first, divided by `num_objects`.

    correct: (Q,) bool, False for a distractor. num_objects: number of queries that are no distractors. Equally
    confident predictions are ordered by query.
    """
    if num_objects < 1:
        raise InputError("GAP needs a query that shows an object of the database.")
    order = confidence.argsort(descending=True, stable=True)
    return average_precision(correct[order], num_objects)


class LabelledScore(NamedTuple):
    """Scores of a labelled set, with each image as a query among the others."""

    mean_average_precision: float
    recalls: dict[int, float]
    """By k, the share of queries with an image of their label among the k nearest."""
    num_queries: int
    """Images whose label another image has. The others are in the database, but are no queries."""


def labelled_score(
    features: Tensor, labels: Tensor, *, cutoffs: Sequence[int] = CUTOFFS, device: str = "cpu"
) -> LabelledScore:
    """mAP and recall@k of (N, D) features with integer labels (N,). Raises InputError where no label occurs twice."""
    if labels.shape != features.shape[:1]:
        raise InputError(f"Expected a label for each image. Found: {list(labels.shape)} for {list(features.shape)}.")
    precisions, hits = [], dict.fromkeys(cutoffs, 0)
    for block, rankings in rank(features, features, device=device):
        for row, ranking in zip(range(block.start, block.stop), rankings, strict=True):
            relevant = labels[ranking[ranking != row]] == labels[row]
            if relevant.any():
                precisions.append(average_precision(relevant))
                for cutoff in cutoffs:
                    hits[cutoff] += bool(relevant[:cutoff].any())
    if not precisions:
        raise InputError(f"Retrieval needs a label that two images have. Found {len(labels)} images, all different.")
    count = len(precisions)
    return LabelledScore(sum(precisions) / count, {k: num_hits / count for k, num_hits in hits.items()}, count)


def paired_precisions(queries: Tensor, database: Tensor, *, device: str = "cpu") -> list[float]:
    """The average precision of each query (Q, D) whose only relevant image has the same row in (Q, D): 1 / its rank."""
    precisions = []
    for block, rankings in rank(queries, database, device=device):
        relevant_rows = torch.arange(block.start, block.stop)[:, None]
        precisions.extend((1 / ((rankings == relevant_rows).long().argmax(dim=1) + 1).double()).tolist())
    return precisions


# ---------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True, eq=False)
class _PhotoFeatures:
    """The features of some photos."""

    features: Tensor
    """(n, F) float32."""
    hash: str
    """64 hex digits of the bytes of the images, their boxes and their order."""


def _cached_features(model: FrozenModel, photos: Sequence[Photo], view: ViewConfig, cache: str) -> _PhotoFeatures:
    """The features of `photos`, from `<cache>/retrieval/` where it has those of the same model, bytes and view."""
    hashes = prefetch(lambda photo: sha256_of_bytes(read_bytes(photo.path)), photos, threads=READERS)
    content_hash = hash_json([[file_hash, photo.box] for file_hash, photo in zip(hashes, photos, strict=True)])
    key = hash_json([model.hash, content_hash, view.resize, view.image_size])
    path = paths.join(cache, "retrieval", f"{key[:32]}.npy")
    record_path = path + ".json"  # written last
    if all_ranks(paths.exists(record_path)):
        record = FileRecord.model_validate_json(paths.read_bytes(record_path))
        if sha256_of_file(path) != record.sha256:
            raise InputError(f"{path}: not the bytes that were written. Delete '{record_path}', and run again.")
        photo_features = torch.from_numpy(npy.read_array(path))
    else:
        share = model.world.share(len(photos))
        part = _compute_features(model, photos[share.start : share.stop], view, PHOTOS_PER_PASS)
        photo_features = gather_rows(model.world, part, len(photos))
        if model.world.is_first:
            record = npy.write_arrays(path, photo_features.numpy())
            paths.write_bytes(record_path, record.model_dump_json().encode())
    return _PhotoFeatures(photo_features, content_hash)


def _compute_features(model: FrozenModel, photos: Sequence[Photo], view: ViewConfig, batch_size: int) -> Tensor:
    result = torch.empty(len(photos), model.num_features)
    multiple = model.patch_size or efficientnet.STRIDE
    pictures = prefetch(
        lambda item: (item[0], load_view(item[1], view, multiple)),
        enumerate(photos),
        threads=READERS,
        ahead=2 * batch_size,
    )
    while batch := list(islice(pictures, batch_size)):
        by_shape: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for row, pixels in batch:
            by_shape.setdefault(pixels.shape, []).append((row, pixels))
        for same_shape in by_shape.values():
            rows, stacked = zip(*same_shape, strict=True)
            result[list(rows)] = model.image_features(torch.stack(stacked))
    return result


def load_view(photo: Photo, view: ViewConfig, multiple: int) -> Tensor:
    """The photo as the model sees it, (3, H, W) uint8; H and W are multiples of `multiple` with "keep_aspect".

    Raises InputError that names the file.
    """
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
                    f"{photo.path}: the box {photo.box} lies outside the {whole.width} x {whole.height} pixels."
                )
            part = whole.crop(box)
            picture = Picture(np.array(part), *part.size, orientation=1)
    side = view.image_size
    shape = (side, side)
    if view.resize == "keep_aspect":
        width, height = picture.width, picture.height
        if picture.orientation >= 5:  # EXIF: stored with rows and columns exchanged
            width, height = height, width
        aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
        rows, columns = (max(1, round(side / multiple * root)) for root in (aspect**-0.5, aspect**0.5))
        shape = (rows * multiple, columns * multiple)
    return torch.from_numpy(to_shape(picture, shape, crop=view.resize == "center_crop"))


# --------------------------------------------------------------------------------------------------------------- run


class DatasetScores(NamedTuple):
    """The scores of one dataset."""

    values: dict[tuple[str, str], float]
    """Scores by protocol and metric."""
    data_hash: str
    facts: dict[str, Any]
    """Further entries of the settings in the results, beside the config."""


def run(
    config: RetrievalConfig, model: FrozenModel, output: str, *, cache: str | None = None, runner: Runner | None = None
) -> list[Result]:
    """Retrieve in one dataset. Features are cached in `cache`, <output>/cache when None.

    `runner` ingests and embeds "labelled" sets. Raises InputError for data that is missing or not as published.
    """
    started = time.perf_counter()
    cache = cache or paths.join(output, "cache")
    match config.data:
        case RevisitedData():
            scores = _run_revisited(config.data, model, cache)
        case MetData():
            scores = _run_met(config.data, model, cache)
        case AmsterTimeData():
            scores = _run_amstertime(config.data, model, cache)
        case LabelledData():
            scores = _run_labelled(config.data, model, cache, runner)
    return results.make(
        "retrieval",
        config.name,
        model,
        [Score(protocol, metric, value) for (protocol, metric), value in scores.values.items()],
        data_hash=scores.data_hash,
        settings=config.model_dump(mode="json") | scores.facts,
        seconds=time.perf_counter() - started,
    )


def _run_revisited(data: RevisitedData, model: FrozenModel, cache: str) -> DatasetScores:
    published = read_revisited(data)
    queries = _cached_features(model, published.queries, data.view, cache)
    database = _cached_features(model, published.database, data.view, cache)
    scores: dict[str, list[RevisitedScore]] = {difficulty: [] for difficulty in DIFFICULTIES}
    for block, rankings in rank(queries.features, database.features, device=str(model.device)):
        for rows, ranking in zip(published.rows[block], rankings, strict=True):
            for difficulty in DIFFICULTIES:
                positives, junk = revisited_rows(rows, difficulty)
                score = revisited_score(ranking, positives, junk)
                if score is not None:
                    scores[difficulty].append(score)
    query_name = "queries cropped" if data.query == "box" else "whole queries"
    values = {}
    for difficulty, query_scores in scores.items():
        if query_scores:
            protocol = f"{difficulty}, {query_name}, {_view_name(data.view)}"
            values[protocol, "mAP"] = _mean([score.average_precision for score in query_scores])
            for number, cutoff in enumerate(CUTOFFS):
                values[protocol, f"mP@{cutoff}"] = _mean([score.precisions[number] for score in query_scores])
    truth = [[rows[key].tolist() for key in sorted(rows)] for rows in published.rows]
    return DatasetScores(
        values,
        hash_json([queries.hash, database.hash, truth]),
        {"queries": {difficulty: len(query_scores) for difficulty, query_scores in scores.items()}},
    )


def revisited_rows(rows: dict[str, Tensor], difficulty: str) -> tuple[Tensor, Tensor]:
    """The positives and the junk of a query. Easy: hard rows are junk. Hard: easy rows are. Medium: none is."""
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
    database_features = _cached_features(model, database.photos, data.view, cache)
    max_neighbors = max(data.neighbors)

    def search(queries: _PhotoFeatures) -> tuple[Tensor, Tensor]:
        cosines, rows = knn.neighbors(
            [database_features.features], queries.features, k=max_neighbors, device=str(model.device)
        )
        return cosines, database.labels[rows]

    def score(neighbors: tuple[Tensor, Tensor], labels: Tensor, k: int, scale: float) -> dict[str, float]:
        cosines, neighbor_labels = (part[:, :k] for part in neighbors)
        predictions = classify_instances(cosines, neighbor_labels, num_classes, scale=scale)
        correct, is_object = predictions.predicted == labels, labels >= 0
        count = int(is_object.sum())
        return {
            "GAP": global_average_precision(correct & is_object, predictions.confidence, count),
            "GAP-": global_average_precision(correct[is_object], predictions.confidence[is_object], count),
            "accuracy": float(correct[is_object].double().mean()),
        }

    test_features = _cached_features(model, test.photos, data.view, cache)
    hashes = [database_features.hash, database.labels.tolist(), test_features.hash, test.labels.tolist()]
    choices = [(k, scale) for k in data.neighbors for scale in data.scales]
    chosen = choices[0]
    if len(choices) > 1:
        validation = read_met(data, "valset.json")
        validation_features = _cached_features(model, validation.photos, data.view, cache)
        hashes += [validation_features.hash, validation.labels.tolist()]
        neighbors = search(validation_features)
        # Ties go to the first choice.
        chosen = max(choices, key=lambda choice: score(neighbors, validation.labels, *choice)["GAP"])
    values = score(search(test_features), test.labels, *chosen)
    protocol = f"{data.database.removesuffix('.json')}, {_view_name(data.view)}"
    return DatasetScores(
        {(protocol, metric): value for metric, value in values.items()},
        hash_json(hashes),
        {"chosen": {"neighbors": chosen[0], "scale": chosen[1]}},
    )


def _run_amstertime(data: AmsterTimeData, model: FrozenModel, cache: str) -> DatasetScores:
    old, new = (_cached_features(model, photos, data.view, cache) for photos in read_amstertime(data))
    device = str(model.device)
    to_street = paired_precisions(old.features, new.features, device=device)
    to_archive = paired_precisions(new.features, old.features, device=device)
    protocols = {"both ways": to_street + to_archive, "archive to street": to_street, "street to archive": to_archive}
    values = {(f"{name}, {_view_name(data.view)}", "mAP"): _mean(precisions) for name, precisions in protocols.items()}
    return DatasetScores(values, hash_json([old.hash, new.hash]), {"pairs": len(to_street)})


def _run_labelled(data: LabelledData, model: FrozenModel, cache: str, runner: Runner | None) -> DatasetScores:
    split = splits.load(data.split, cache, runner or InlineRunner())
    image_features = features.extract(model, split, data.pictures, cache, runner).matrix()
    # Ties are ordered by row, and rows by class where folders are classes. A model with equal features for all images
    # would then rank each query's class first. Ids are hashes, so ordering rows by id favours no class.
    order = torch.tensor(np.argsort(np.array(split.table["image_id"].to_pylist())))
    score = labelled_score(image_features[order], split.labels[order], device=str(model.device))
    protocol = f"each among the others, {data.pictures.image_size} px"
    values = {(protocol, "mAP"): score.mean_average_precision}
    values |= {(protocol, f"recall@{k}"): value for k, value in score.recalls.items()}
    return DatasetScores(values, split.data_hash, {"images": len(split), "queries": score.num_queries})


def _view_name(view: ViewConfig) -> str:
    return f"{view.resize} {view.image_size} px"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("retrieval"))
