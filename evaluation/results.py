"""Results of evaluations, one record a number.

<output>/
  results.jsonl     one line a record: the fields of Result
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from curation.files import paths
from evaluation import records
from evaluation.features import FrozenModel
from evaluation.records import JsonRecord

RESULTS_FILE = "results.jsonl"


class Result(JsonRecord):
    """One number of an evaluation, with everything that it depends on."""

    evaluation: str
    """The module of the evaluation: "knn", "linear", "segmentation", ..."""
    dataset: str
    """Name of the data in the config."""
    model: str
    """Name of the model, for people."""
    model_hash: str
    """Of its weights and of everything else that its features depend on."""
    data_hash: str
    """Of the images and labels of every split that was used."""
    protocol: str
    """Name of the procedure. Tables group and compare results by it: "k=20", "paper, 4 blocks, 640 px"."""
    settings: dict[str, Any]
    """The resolved config of the evaluation, and its choices, such as a learning rate."""
    metric: str
    """What `value` measures: "top-1", "mAP", "mIoU"."""
    value: float
    """Shares are between 0 and 1."""
    spread: float | None = None
    """The standard deviation (n - 1) over repeated draws, where there are any."""
    seconds: float
    """Time of the evaluation. Work that was read from the cache is not in it."""


class Score(NamedTuple):
    """The part of a result that differs between the numbers of one evaluation."""

    protocol: str
    metric: str
    value: float
    spread: float | None = None


def make(
    evaluation: str,
    dataset: str,
    model: FrozenModel,
    scores: Iterable[Score],
    *,
    data_hash: str,
    settings: dict[str, Any],
    seconds: float,
) -> list[Result]:
    """One result for each of `scores`; the other fields are equal in all of them."""
    return [
        Result(
            evaluation=evaluation,
            dataset=dataset,
            model=model.name,
            model_hash=model.hash,
            data_hash=data_hash,
            protocol=score.protocol,
            settings=settings,
            metric=score.metric,
            value=score.value,
            spread=score.spread,
            seconds=seconds,
        )
        for score in scores
    ]


def append(folder: str, result: Result) -> None:
    """Add one record to the results in `folder`."""
    records.append(paths.join(folder, RESULTS_FILE), result)


def read(folder: str) -> list[Result]:
    """The records in `folder`, oldest first; none where there is no file. Raises InputError for a damaged line."""
    return records.read(paths.join(folder, RESULTS_FILE), Result, "result")


def latest(results: Sequence[Result]) -> list[Result]:
    """The last of all records with the same evaluation, data, model, protocol and metric."""
    return list({_identity(result): result for result in results}.values())


def _identity(result: Result) -> str:
    return json.dumps(
        [
            result.evaluation,
            result.dataset,
            result.model,
            result.model_hash,
            result.data_hash,
            result.protocol,
            result.metric,
        ]
    )
