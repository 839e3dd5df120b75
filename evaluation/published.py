"""Published numbers of the protocols of this package, for comparison with results.

A number is shown only beside results of the same evaluation, data set, protocol and metric. A data set is recognised by
its name in the config; case, spaces and hyphens do not matter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.results import Result


@dataclass(frozen=True)
class Column:
    """Which results a published number is comparable with."""

    evaluation: str
    datasets: tuple[str, ...]
    """Names, of lower-case letters and digits only."""
    protocol: str
    """Regular expression that must match the whole protocol of a result."""
    metric: str
    percent: bool = True
    """Whether the source gives percent. Results are shares."""
    remark: str | None = None
    """A difference, or a detail that the source does not state."""
    chosen_on_test: bool = False
    """Whether the source selects its head on the test images. Cited: DINOv2, eval/linear.py."""


@dataclass(frozen=True)
class Published:
    """A published number that is comparable with a result."""

    model: str
    value: float
    """In the unit of the results."""
    source: str
    remark: str | None


_CHOSEN_REMARK = (
    "the source selects its head on the validation images that it reports, and these results on held-out training "
    'images (choose_on = "test" selects as the source)'
)
_IMAGENET = ("imagenet", "imagenet1k", "in1k", "ilsvrc2012")
_KNN = Column("knn", _IMAGENET, r"k=20", "top-1", remark="the source does not state k")
_LINEAR = Column(
    "linear",
    _IMAGENET,
    r"52 heads, grid of the (paper|code), 12,500 steps(, chosen on the test images)?",
    "top-1",
    chosen_on_test=True,
)
_V2 = Column("robustness", ("imagenetv2", "v2"), r".*", "top-1", chosen_on_test=True)
_REAL = Column("robustness", ("imagenetreal", "real"), r".*", "top-1", chosen_on_test=True)
_A = Column("robustness", ("imageneta",), r".*", "top-1", chosen_on_test=True)
_R = Column("robustness", ("imagenetr",), r".*", "top-1", chosen_on_test=True)
_C = Column("robustness", ("imagenetc",), r".*", "mCE", chosen_on_test=True)
_SKETCH = Column("robustness", ("imagenetsketch",), r".*", "top-1", chosen_on_test=True)
_ANY_LENGTH = r"52 heads, grid of the (paper|code), .*"
_LENGTH_REMARK = "the source does not state the number of steps"
_INAT18, _INAT21 = (
    Column("linear", names, _ANY_LENGTH, "top-1", remark=_LENGTH_REMARK, chosen_on_test=True)
    for names in (("inaturalist2018", "inat2018", "inat18"), ("inaturalist2021", "inat2021", "inat21"))
)
_OXFORD = ("roxford", "roxford5k", "oxford", "oxford5k", "revisitedoxford")
_PARIS = ("rparis", "rparis6k", "paris", "paris6k", "revisitedparis")
_OXFORD_M = Column("retrieval", _OXFORD, r"medium\b.*", "mAP")
_OXFORD_H = Column("retrieval", _OXFORD, r"hard\b.*", "mAP")
_PARIS_M = Column("retrieval", _PARIS, r"medium\b.*", "mAP")
_PARIS_H = Column("retrieval", _PARIS, r"hard\b.*", "mAP")
_ADE, _CITY, _VOC = ("ade20k", "ade"), ("cityscapes",), ("voc", "voc2012", "pascalvoc", "pascalvoc2012")
_SEGMENTATION = tuple(
    Column("segmentation", names, protocol, "mIoU")
    for names in (_ADE, _CITY, _VOC)
    for protocol in ("linear", "multiscale")
)
_SCHEDULE = r", 38,400 steps of 16"
_DEPTH_REMARK = "the loss of the source has a further gradient term, and its learning rate is not published"
_DEPTH = tuple(
    Column("depth", (name,), head + _SCHEDULE, "rmse", percent=False, remark=_DEPTH_REMARK)
    for name in ("nyu", "kitti")
    for head in ("linear 1", "linear 4", "dpt")
)
_SUN = Column(
    "depth", ("sunrgbd",), "linear 4" + _SCHEDULE + ", trained on nyu", "rmse", percent=False, remark=_DEPTH_REMARK
)
_NYU_LAST_NORM = Column("depth", ("nyu",), "linear 1" + _SCHEDULE + ", last norm", "rmse", percent=False)

_DINOV2_COLUMNS = (
    *(_KNN, _LINEAR, _V2, _REAL, _A, _R, _C, _SKETCH, _INAT18, _INAT21, _OXFORD_M, _OXFORD_H, _PARIS_M, _PARIS_H),
    *_SEGMENTATION,
    *_DEPTH,
    _SUN,
)
_REGISTER_COLUMNS = (_KNN, _LINEAR, _V2, _INAT18, _OXFORD_H)
_DINOV3_COLUMNS = (_REAL, _R, _OXFORD_H, _NYU_LAST_NORM)

_DINOV2 = "Oquab et al., DINOv2 (arXiv 2304.07193), tables 4 to 11, and MODEL_CARD.md of facebookresearch/dinov2"
_REGISTERS = "MODEL_CARD.md of facebookresearch/dinov2"
_README = "README.md of facebookresearch/dinov2"
_DINOV3 = "MODEL_CARD.md of facebookresearch/dinov3"

# Model, source, columns, and the numbers as the source gives them.
_ROWS: tuple[tuple[str, str, tuple[Column, ...], str], ...] = (
    (
        *("DINOv2 ViT-S/14", _DINOV2, _DINOV2_COLUMNS),
        "79.0 81.1 70.9 86.6 33.5 53.7 54.4 41.2 69.0 74.2 68.8 43.2 84.6 68.5 44.3 47.2 66.6 77.1 81.1 82.6 "
        ".449 .417 .356 3.10 2.86 2.34 .431",
    ),
    (
        *("DINOv2 ViT-B/14", _DINOV2, _DINOV2_COLUMNS),
        "82.1 84.5 75.1 88.3 55.1 63.3 42.7 50.6 76.4 81.1 72.9 49.5 90.3 78.6 47.3 51.3 69.4 80.0 82.5 84.9 "
        ".399 .362 .317 2.90 2.59 2.23 .400",
    ),
    (
        *("DINOv2 ViT-L/14", _DINOV2, _DINOV2_COLUMNS),
        "83.5 86.3 78.0 89.5 71.3 74.4 31.5 59.3 80.4 85.1 75.1 54.0 92.7 83.5 47.7 53.1 70.3 80.9 82.1 86.0 "
        ".384 .333 .293 2.78 2.50 2.14 .396",
    ),
    (
        *("DINOv2 ViT-g/14", _DINOV2, _DINOV2_COLUMNS),
        "83.5 86.5 78.4 89.6 75.9 78.8 28.2 62.5 81.6 85.7 73.6 52.3 92.1 82.6 49.0 53.0 71.3 81.0 83.0 86.2 "
        ".344 .298 .279 2.62 2.35 2.11 .362",
    ),
    ("DINOv2 ViT-S/14, registers", _REGISTERS, _REGISTER_COLUMNS, "79.1 80.9 71.0 67.6 39.5"),
    ("DINOv2 ViT-B/14, registers", _REGISTERS, _REGISTER_COLUMNS, "82.0 84.6 75.6 73.8 51.0"),
    ("DINOv2 ViT-L/14, registers", _REGISTERS, _REGISTER_COLUMNS, "83.8 86.7 78.5 80.9 55.7"),
    ("DINOv2 ViT-g/14, registers", _REGISTERS, _REGISTER_COLUMNS, "83.7 87.1 78.8 81.5 58.2"),
    ("DINOv2 ViT-L/16, ImageNet-1k from scratch", _README, (_KNN, _LINEAR), "81.6 82.9"),
    ("DINOv2 ViT-L/14, ImageNet-22k from scratch", _README, (_KNN, _LINEAR), "82.0 84.5"),
    ("DINOv3 ViT-S/16", _DINOV3, _DINOV3_COLUMNS, "87.0 60.4 49.5 .403"),
    ("DINOv3 ViT-S+/16", _DINOV3, _DINOV3_COLUMNS, "88.0 68.8 50.0 .399"),
    ("DINOv3 ViT-B/16", _DINOV3, _DINOV3_COLUMNS, "89.3 76.7 58.5 .373"),
    ("DINOv3 ViT-L/16", _DINOV3, _DINOV3_COLUMNS, "90.2 88.1 63.1 .352"),
    ("DINOv3 ViT-H+/16", _DINOV3, _DINOV3_COLUMNS, "90.3 90.0 64.5 .352"),
    # Without its Oxford number: its sources disagree on it.
    ("DINOv3 ViT-7B/16", _DINOV3, (_REAL, _R, _NYU_LAST_NORM), "90.4 91.1 .309"),
)


def comparable_numbers(result: Result) -> list[Published]:
    """The published numbers of the same evaluation, data set, protocol and metric; none for most results."""
    name = re.sub(r"[^a-z0-9]", "", result.dataset.lower())
    matches = []
    for model, source, columns, numbers in _ROWS:
        for column, number in zip(columns, _numbers(numbers), strict=True):
            if (
                (result.evaluation, result.metric) == (column.evaluation, column.metric)
                and name in column.datasets
                and re.fullmatch(column.protocol, result.protocol)
            ):
                differs = column.chosen_on_test and not _chose_on_test(result)
                remark = "; and ".join(filter(None, [column.remark, _CHOSEN_REMARK if differs else None])) or None
                matches.append(Published(model, number / 100 if column.percent else number, source, remark))
    return matches


def _chose_on_test(result: Result) -> bool:
    """Whether the head of a result, or the linear head that it scores, was selected on the test images."""
    settings = result.settings.get("linear", result.settings)
    return bool(settings.get("choose_on") == "test")


def _numbers(text: str) -> Sequence[float]:
    return [float(word) for word in text.split()]
