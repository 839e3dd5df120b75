"""How a linear head that was trained on ImageNet does on images that differ from ImageNet's.

The head is that of `evaluation.linear`, chosen on ImageNet's training images alone. The sets are read as published:

    imagenet-a, imagenet-r, sketch    <path>/<wnid>/<image>
    imagenet-v2                       <path>/<place of the class>/<image>
    imagenet-c                        <path>/<corruption>/<severity>/<wnid>/<image>
    imagenet-real                     <path>/<wnid>/ILSVRC2012_val_<number>.JPEG, and real.json beside it

Sets of fewer classes (A and R have 200) are scored among their own, as their authors do.

Legend: m images, C classes.

Source: Hendrycks et al. (arXiv 1907.07174: A; 2006.16241: R; 1903.12261: C and mCE), Recht et al. (1902.10811: V2),
Wang et al. (1905.13549: Sketch), Beyer et al. (2006.07159: ReaL).
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from curation.config import Settings
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
# AlexNet's error on each corruption of ImageNet-C, the mean over the severities; mCE divides by them. Cited: arXiv
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
    """What results call the set."""
    path: str
    """Its folder, local or any fsspec URL."""
    kind: SetKind = "folders"
    """"folders": a folder a class (A, R, Sketch). "places": folders are numbers, the places of the classes among the
    sorted ones (V2). "corruptions": a folder a corruption, of five severities (C). "real": ReaL."""
    linear: LinearConfig
    """The probe whose head is used; `train` is ImageNet. Read from the cache where it was trained before."""
    real_labels: str | None = None
    """For "real": path of real.json, a list of lists of places of classes, one for each validation image by number."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "real") != (self.real_labels is not None):
            raise ValueError("kind 'real', and no other, needs real_labels, the path of real.json")
        return self


def mean_corruption_error(errors: Mapping[str, Sequence[float]], alexnet: Mapping[str, float]) -> float:
    """mCE: over the corruptions, the mean of our mean error over the severities divided by AlexNet's; 1 is AlexNet."""
    ratios = [sum(own) / len(own) / alexnet[corruption] for corruption, own in errors.items()]
    return sum(ratios) / len(ratios)


def real_accuracy(predicted: Tensor, allowed: Sequence[Sequence[int]]) -> float:
    """The share of images whose predicted class (m,) is among the allowed ones; images that allow none do not count."""
    counted = [int(one) in own for one, own in zip(predicted.tolist(), allowed, strict=True) if own]
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
    """Classify one set; the head and the lists of images are kept in `cache`, <output>/cache when None.

    alexnet_errors: for "corruptions", by the folders that are read. Raises UserError kin.
    """
    started, cache = time.perf_counter(), cache or paths.join(output, "cache")
    runner = runner or InlineRunner()
    train = splits.load(config.linear.train, cache, runner)
    head = linear.fitted(config.linear, model, train, cache)
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
        split = _load(config.path, train, cache, runner, places=config.kind == "places")
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
        data_hash=hash_json([train.data_hash, *hashes]),
        settings=config.model_dump(mode="json") | {"chosen_rate": head.rate},
        seconds=time.perf_counter() - started,
    )


def _load(path: str, train: Split, cache: str, runner: Runner, *, places: bool = False) -> Split:
    split = splits.load(SplitConfig(path=path), cache, runner)
    if not places:
        return splits.with_classes(split, train, subset=True)
    wrong = [name for name in split.classes if not name.isdecimal() or int(name) >= len(train.classes)]
    if wrong:
        raise InputError(f"{path}: the folder '{wrong[0]}' is not a place among {len(train.classes)} classes.")
    numbers = torch.tensor([int(name) for name in split.classes])
    return Split(split.path, split.table, train.classes, numbers[split.labels], split.limits)


def _predicted(config: RobustnessConfig, head: ChosenHead, model: FrozenModel, split: Split) -> Tensor:
    """The class (m,) of each image, among those that occur in `split`."""
    settings = config.linear
    return linear.predict(head, model, split, settings.pictures, settings.images_per_pass, torch.unique(split.labels))


def _allowed(split: Split, labels: list[list[int]], path: str) -> list[list[int]]:
    """The ReaL labels of each image, found by the number in its name."""
    found = []
    for uri in split.table["uri"].to_pylist():
        number = _VALIDATION_NUMBER.search(uri)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise InputError(
                f"{uri}: its name gives no place in {path}, which has {len(labels):,} lists. Expected "
                "ILSVRC2012_val_<8 digits>.JPEG, as ImageNet's validation images are called."
            )
        found.append(labels[int(number[1]) - 1])
    return found
