"""Scores a linear head that was trained on ImageNet on images that differ from ImageNet's.

The head is that of `evaluation.linear`, selected as its `choose_on` says. The sets are read as published:

    imagenet-a, imagenet-r, sketch    <path>/<wnid>/<image>
    imagenet-v2                       <path>/<index of the class>/<image>
    imagenet-c                        <path>/<corruption>/<severity>/<wnid>/<image>
    imagenet-real                     <path>/<wnid>/ILSVRC2012_val_<number>.JPEG, and real.json beside it

Sets of fewer classes (A and R have 200) are scored among these classes, as their authors do.

Legend: m images, C classes.

Source: Hendrycks et al. (arXiv 1907.07174: A; 2006.16241: R; 1903.12261: C and mCE), Recht et al. (1902.10811: V2),
Wang et al. (1905.13549: Sketch), Beyer et al. (2006.07159: ReaL).
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from curation.config import IsPath, Settings
from curation.engine.runner import InlineRunner, Runner
from curation.errors import InputError
from curation.files import paths
from curation.files.hashes import hash_json
from evaluation import linear, results
from evaluation.data import splits
from evaluation.data.splits import Split, SplitConfig
from evaluation.features import FrozenModel
from evaluation.linear import ChosenHead, LinearConfig
from evaluation.results import Result, Score
from evaluation.scores import accuracy

SetKind = Literal["folders", "places", "corruptions", "real"]
SEVERITIES = ("1", "2", "3", "4", "5")  # cited: arXiv 1903.12261
# AlexNet's mean error over the severities, for each corruption of ImageNet-C; mCE divides by it. Cited: arXiv
# 1903.12261 and github.com/hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.[^./]+$")


class RobustnessConfig(Settings):
    """One set of images, and the head that classifies them."""

    name: str
    """Name of the set in results."""
    path: Annotated[str, IsPath]
    """Its folder, local or any fsspec URL."""
    kind: SetKind = "folders"
    """"folders": one folder for each class (A, R, Sketch). "places": folders are numbers, the indices of the sorted
    classes (V2). "corruptions": one folder for each corruption, with five severities (C). "real": ReaL."""
    linear: LinearConfig
    """The probe that trains the head; `train` is ImageNet. The head is read from the cache where it has it."""
    real_labels: Annotated[str | None, IsPath] = None
    """For "real": path of real.json, which lists the indices of the allowed classes of each validation image."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "real") != (self.real_labels is not None):
            raise ValueError("kind 'real' needs real_labels, the path of real.json; other kinds have none")
        return self


def mean_corruption_error(errors: Mapping[str, Sequence[float]], alexnet: Mapping[str, float]) -> float:
    """mCE: the mean over corruptions of the model's mean error over severities divided by AlexNet's. AlexNet has 1."""
    ratios = [sum(values) / len(values) / alexnet[corruption] for corruption, values in errors.items()]
    return sum(ratios) / len(ratios)


def real_accuracy(predicted: Tensor, allowed: Sequence[Sequence[int]]) -> float:
    """The share of images whose predicted class (m,) is allowed. Images without an allowed class do not count."""
    counted = [int(label) in labels for label, labels in zip(predicted.tolist(), allowed, strict=True) if labels]
    if not counted:
        raise InputError("No image has a ReaL label.")
    return sum(counted) / len(counted)


def run(
    config: RobustnessConfig,
    model: FrozenModel,
    output: str,
    *,
    cache: str | None = None,
    runner: Runner | None = None,
    alexnet_errors: Mapping[str, float] = ALEXNET_ERRORS,
) -> list[Result]:
    """Classify one set. The head and the lists of images are cached in `cache`, <output>/cache when None.

    alexnet_errors: for "corruptions", by the names of the folders to read. Raises UserError.
    """
    started, cache = time.perf_counter(), cache or paths.join(output, "cache")
    runner = runner or InlineRunner()
    train = splits.load(config.linear.train, cache, runner)
    test = None
    if config.linear.choose_on == "test":
        subset = config.linear.allow_missing_classes
        test = splits.with_classes(splits.load(config.linear.test, cache, runner), train, subset=subset)
    head = linear.fit_or_load(config.linear, model, train, test, cache)
    if config.kind == "corruptions":
        errors: dict[str, list[float]] = {}
        hashes = []
        for corruption in sorted(alexnet_errors):
            for severity in SEVERITIES:
                split = _load(paths.join(config.path, corruption, severity), train, cache, runner)
                predicted = _predicted(config, head, model, split)
                errors.setdefault(corruption, []).append(1 - accuracy(predicted, split.labels))
                hashes.append(split.data_hash)
        metric, value = "mCE", mean_corruption_error(errors, alexnet_errors)
    else:
        split = _load(config.path, train, cache, runner, folders_are_indices=config.kind == "places")
        predicted, hashes = _predicted(config, head, model, split), [split.data_hash]
        if config.kind == "real":
            assert config.real_labels is not None
            content = paths.read_bytes(config.real_labels) if paths.exists(config.real_labels) else None
            if content is None:
                raise InputError(f"There is no file at '{config.real_labels}', which real_labels names.")
            metric, value = "ReaL", real_accuracy(predicted, _allowed(split, json.loads(content), config.real_labels))
            hashes.append(hash_json(json.loads(content)))
        else:
            metric, value = "top-1", accuracy(predicted, split.labels)
    return results.make(
        "robustness",
        config.name,
        model,
        [Score(f"linear head of {config.linear.name}", metric, value)],
        data_hash=hash_json([train.data_hash, *([] if test is None else [test.data_hash]), *hashes]),
        settings=config.model_dump(mode="json") | {"chosen_rate": head.rate},
        seconds=time.perf_counter() - started,
    )


def _load(path: str, train: Split, cache: str, runner: Runner, *, folders_are_indices: bool = False) -> Split:
    split = splits.load(SplitConfig(path=path), cache, runner)
    if not folders_are_indices:
        return splits.with_classes(split, train, subset=True)
    wrong = [name for name in split.classes if not name.isdecimal() or int(name) >= len(train.classes)]
    if wrong:
        raise InputError(f"{path}: the folder '{wrong[0]}' is not the index of one of {len(train.classes)} classes.")
    indices = torch.tensor([int(name) for name in split.classes])
    return Split(split.path, split.table, train.classes, indices[split.labels], split.limits)


def _predicted(config: RobustnessConfig, head: ChosenHead, model: FrozenModel, split: Split) -> Tensor:
    """The class (m,) of each image, among the classes in `split`."""
    settings = config.linear
    return linear.predict(head, model, split, settings.pictures, settings.images_per_pass, torch.unique(split.labels))


def _allowed(split: Split, labels: list[list[int]], path: str) -> list[list[int]]:
    """The ReaL labels of each image, by the number in its name."""
    allowed = []
    for uri in split.table["uri"].to_pylist():
        number = _VALIDATION_NUMBER.search(uri)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise InputError(
                f"{uri}: its name holds no index into {path}, which has {len(labels):,} lists. Expected "
                "ILSVRC2012_val_<8 digits>.JPEG, the name of an ImageNet validation image."
            )
        allowed.append(labels[int(number[1]) - 1])
    return allowed


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("robustness"))
