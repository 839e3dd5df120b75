"""A linear probe with augmentation: trains many heads at once on one frozen backbone and selects the best.

The accuracy of a linear classifier depends on its learning rate and on its input tokens. So a head is trained for every
pair of both. All heads share the features of the same crops, which costs little beside the backbone. The result is the
head with the best accuracy on a held-out part of the training images. The test images select nothing, unless
`choose_on = "test"` repeats the published selection.

    <cache>/linear/<hash>/head.safetensors      weight (C, F), bias (C,) of the selected head
                          head.json             its input and learning rate, and the accuracy that selected it

Crops, order and fresh heads are pure functions of the seed and the position, so a run is repeated exactly.

Legend: B images of a step, L learning rates, C classes, D width of a token, F width of the input of a head.

Source: DINOv2's published evaluation (eval/linear.py): 13 learning rates, 1 and 4 blocks, with and without the mean of
the patch tokens, SGD with momentum 0.9 and no weight decay, cosine to 0 over 12,500 steps of 1,024 images.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from curation.config import Settings
from curation.engine.progress import bar
from curation.engine.ranks import World, all_ranks, gather_rows, sum_over_ranks
from curation.engine.runner import InlineRunner, Runner
from curation.errors import InputError
from curation.files import paths
from curation.files.hashes import hash_json, sha256_of_bytes
from curation.files.prefetch import prefetch
from curation.images.decode import Picture, decode_picture, upright
from curation.images.sources import ReferenceReader
from evaluation import order, results
from evaluation.data import splits
from evaluation.data.splits import Split, SplitConfig
from evaluation.data.views import PicturesConfig, read_squares
from evaluation.features import FrozenModel
from evaluation.results import Result, Score
from evaluation.scores import classifier_scores

Grid = Literal["paper", "code"]

# For a batch of 256 images. Cited: the paper's appendix (arXiv 2304.07193), and the defaults of eval/linear.py.
LEARNING_RATES: dict[Grid, tuple[float, ...]] = {
    "paper": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
    "code": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
}
REFERENCE_BATCH = 256
# Whether a head also reads the mean of the last block's patch tokens; heads of both kinds are trained. Cited: as above.
AVERAGES = (False, True)
MOMENTUM = 0.9  # cited: as above
INITIAL_DEVIATION = 0.01  # cited: as above
CROP_AREA, CROP_ASPECT, CROP_ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # cited: the usual crop of ImageNet training


class LinearConfig(Settings):
    """A linear probe on one dataset. The defaults are those of DINOv2's published evaluation."""

    name: str
    """Name of the dataset in results."""
    train: SplitConfig
    """The images to train on; a part of them is held out for the selection."""
    test: SplitConfig
    """The test images, which are classified."""
    pictures: PicturesConfig = PicturesConfig()
    """How the model sees held-out and test images, and the size of training crops."""
    grid: Grid = "code"
    """Learning rates for a batch of 256: the list of the paper, or that of the published code."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Learning rates for a batch of 256, in place of the grid's."""
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4), min_length=1)
    """Numbers of last blocks whose CLS tokens a head reads; heads of each kind are trained."""
    batch_size: int = Field(default=1024, ge=1)
    """Images of a step. Learning rates are multiplied by batch_size / 256."""
    images_per_pass: int = Field(default=128, ge=1)
    """Images a forward pass. Changes only the speed."""
    steps: int = Field(default=12_500, ge=1)
    """Training steps."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training images of each class that is held out to select the head."""
    choose_on: Literal["held_out", "test"] = "held_out"
    """The images that select the head. `test`: the test images, and none are held out, as for DINOv2's published
    numbers. Such a score is the best of all heads on the test images, so set it only to compare with those."""
    seed: int = 0
    """Draws the held-out share, the order of the images, the crops and the fresh heads."""
    allow_missing_classes: bool = False
    """Whether the test images may lack classes of the training images."""

    @model_validator(mode="after")
    def _check(self) -> "LinearConfig":
        for name in ("learning_rates", "blocks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {list(values)}. Remove one.")
        return self

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates for a batch of 256."""
        return self.learning_rates or LEARNING_RATES[self.grid]


@dataclass(frozen=True)
class Reading:
    """The input of a head."""

    blocks: int
    """Number of last blocks whose CLS tokens are read; 0: the features of a model without blocks."""
    average: bool
    """Whether the mean of the last block's patch tokens is read too."""

    def of(self, tokens: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(B, F) from the patch tokens (B, D, h, w) and CLS tokens (B, D) of the last blocks."""
        parts = [cls for _, cls in tokens[-self.blocks :]]
        if self.average:
            parts.append(tokens[-1][0].mean((2, 3)))
        return torch.cat(parts, dim=1)


class Heads:
    """Linear heads with the same input and different learning rates, computed as one matrix product."""

    def __init__(self, rates: Sequence[float], num_classes: int, width: int, *, seed: Sequence[int]) -> None:
        """Fresh heads on the CPU. All start from the same weights, which do not depend on the number of heads."""
        random = torch.Generator().manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
        first = torch.empty(num_classes, width).normal_(0, INITIAL_DEVIATION, generator=random)
        self.rates = torch.tensor(rates)
        self.weight = first.expand(len(rates), -1, -1).clone().requires_grad_()  # (L, C, F)
        self.bias = torch.zeros(len(rates), num_classes, requires_grad=True)  # (L, C)
        self._momentum = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def to(self, device: torch.device) -> "Heads":
        """Moves the heads to `device`, in place."""
        self.weight = self.weight.detach().to(device).requires_grad_()
        self.bias = self.bias.detach().to(device).requires_grad_()
        self._momentum = [value.to(device) for value in self._momentum]
        self.rates = self.rates.to(device)
        return self

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, F) to (L, B, C)."""
        num_rates, num_classes, _ = self.weight.shape
        product = inputs @ self.weight.flatten(0, 1).T + self.bias.flatten()
        return product.view(len(inputs), num_rates, num_classes).transpose(0, 1)

    def sgd_step(self, inputs: Tensor, labels: Tensor, factor: float) -> Tensor:
        """Takes one SGD step at `factor` times each head's rate; returns the losses (L,) before it.

        inputs: (B, F). labels: (B,).
        """
        logits = self.logits(inputs)
        repeated = labels.expand(len(logits), -1)
        losses = functional.cross_entropy(logits.transpose(1, 2), repeated, reduction="none").mean(1)
        gradients = torch.autograd.grad(losses.sum(), [self.weight, self.bias])
        with torch.no_grad():
            for value, momentum, gradient in zip((self.weight, self.bias), self._momentum, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient)
                value.sub_(momentum * (factor * self.rates).view(-1, *[1] * (value.ndim - 1)))
        return losses.detach()


@dataclass(frozen=True, eq=False)
class ChosenHead:
    """The selected head, made by `fit_or_load`."""

    reading: Reading
    rate: float
    selection_top_1: float
    """Its accuracy on the images that selected it."""
    classes: tuple[str, ...]
    weight: Tensor
    """(C, F)."""
    bias: Tensor
    """(C,)."""

    def logits(self, model: FrozenModel, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 to logits (B, C) on the CPU."""
        inputs = read(model, pixels, [self.reading])[0]
        return (inputs @ self.weight.to(inputs.device).T + self.bias.to(inputs.device)).cpu()


def read(model: FrozenModel, pixels: Tensor, readings: Sequence[Reading]) -> list[Tensor]:
    """The input (B, F) of each of `readings`, on the model's device, from one forward pass of (B, 3, H, W) uint8."""
    if model.num_blocks is None:
        return [model.image_features(pixels).to(model.device)] * len(readings)
    max_blocks = max(reading.blocks for reading in readings)
    if max_blocks > model.num_blocks:
        raise InputError(f"{model.name} has {model.num_blocks} blocks, and a head reads {max_blocks}. Change `blocks`.")
    tokens = model.intermediate(pixels, range(model.num_blocks - max_blocks, model.num_blocks))
    return [reading.of(tokens) for reading in readings]


def readings_of(config: LinearConfig, model: FrozenModel) -> list[Reading]:
    """The inputs of the heads of `model`. A model without blocks has one input only."""
    if model.num_blocks is None:
        return [Reading(0, False)]
    return [Reading(blocks, average) for blocks in config.blocks for average in AVERAGES]


def random_crop(picture: Picture, side: int, random: np.random.Generator) -> Tensor:
    """A random part of the image, (3, side, side) uint8, mirrored with probability 1/2."""
    whole = torch.from_numpy(np.array(upright(picture))).permute(2, 0, 1)
    height, width = whole.shape[1:]
    top, left, rows, columns = _crop_box(height, width, random)
    part = whole[:, top : top + rows, left : left + columns]
    scaled = functional.interpolate(part[None], size=(side, side), mode="bicubic", antialias=True)[0]
    return scaled.flip(2) if random.random() < 0.5 else scaled


def _crop_box(height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, rows and columns of 8% to 100% of the image; of its middle where none of ten draws fits."""
    for _ in range(CROP_ATTEMPTS):
        area = height * width * random.uniform(*CROP_AREA)
        aspect = math.exp(random.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            return int(random.integers(height - rows + 1)), int(random.integers(width - columns + 1)), rows, columns
    aspect = min(max(width / height, CROP_ASPECT[0]), CROP_ASPECT[1])
    rows, columns = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def fit_or_load(config: LinearConfig, model: FrozenModel, train: Split, test: Split | None, cache: str) -> ChosenHead:
    """The best head for `train`, read from the cache where it has one. All ranks call this and get the same head.

    test: with the classes of `train`; read only with `choose_on = "test"`.
    """
    inputs = [model.hash, train.data_hash]
    if config.choose_on == "test":
        assert test is not None
        inputs.append(test.data_hash)
    plan = config.model_dump(mode="json", exclude={"name", "train", "test", "images_per_pass", "allow_missing_classes"})
    folder = paths.join(cache, "linear", hash_json([inputs, plan])[:32])
    facts_path, tensors_path = paths.join(folder, "head.json"), paths.join(folder, "head.safetensors")
    if all_ranks(paths.exists(facts_path)):  # written last
        facts = json.loads(paths.read_bytes(facts_path))
        if sha256_of_bytes(data := paths.read_bytes(tensors_path)) != facts.get("sha256"):
            raise InputError(f"{tensors_path}: not the bytes that were written. Delete '{folder}', and run again.")
        tensors = safetensors.torch.load(data)
        return ChosenHead(
            Reading(facts["blocks"], facts["average"]),
            facts["rate"],
            facts["selection_top_1"],
            tuple(facts["classes"]),
            tensors["weight"],
            tensors["bias"],
        )
    head = _train(config, model, train, test)
    if not model.world.is_first:
        return head
    tensors = {"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}
    file = paths.write_bytes(tensors_path, safetensors.torch.save(tensors))
    facts = {
        "sha256": file.sha256,
        "blocks": head.reading.blocks,
        "average": head.reading.average,
        "rate": head.rate,
        "selection_top_1": head.selection_top_1,
        "classes": head.classes,
    }
    paths.write_bytes(facts_path, json.dumps(facts, indent=1).encode())
    return head


def _train(config: LinearConfig, model: FrozenModel, train: Split, test: Split | None) -> ChosenHead:
    if config.choose_on == "test":
        assert test is not None
        trained, selecting = train, test
    else:
        parts = splits.hold_out(train.labels, config.held_out, config.seed)
        trained, selecting = (train.take(rows) for rows in parts)
    readings, num_classes, world = readings_of(config, model), len(train.classes), model.world
    scaled = [rate * config.batch_size / REFERENCE_BATCH for rate in config.rates]
    heads: list[Heads] = []
    with bar("linear", total=config.steps, unit="steps") as advance:
        for step, (pixels, labels) in enumerate(_crops(config, trained, world)):
            passes = [read(model, part, readings) for part in torch.split(pixels, config.images_per_pass)]
            inputs = [gather_rows(world, torch.cat(parts), len(labels)) for parts in zip(*passes, strict=True)]
            if not heads:
                heads = [
                    Heads(scaled, num_classes, rows.shape[1], seed=[config.seed, number]).to(model.device)
                    for number, rows in enumerate(inputs)
                ]
            factor = 0.5 * (1 + math.cos(math.pi * step / config.steps))
            losses = [
                group.sgd_step(rows, labels.to(model.device), factor) for group, rows in zip(heads, inputs, strict=True)
            ]
            advance(1, f"lowest loss {min(float(group.min()) for group in losses):.3f}")
    right = torch.zeros(len(heads), len(scaled), dtype=torch.int64)
    for pixels, labels in middle_squares(selecting, world, config.pictures, config.images_per_pass):
        for number, (group, rows) in enumerate(zip(heads, read(model, pixels, readings), strict=True)):
            right[number] += (group.logits(rows).argmax(2).cpu() == labels).sum(1)
    right = sum_over_ranks(right.to(world.device)).cpu()
    best = int(right.argmax())
    best_reading, best_rate = divmod(best, len(scaled))
    chosen = heads[best_reading]
    if not (chosen.weight.isfinite().all() and chosen.bias.isfinite().all()):
        raise InputError("The best linear head is not finite: every learning rate is too great. Set smaller ones.")
    return ChosenHead(
        readings[best_reading],
        config.rates[best_rate],
        int(right.flatten()[best]) / len(selecting),
        train.classes,
        chosen.weight[best_rate].detach().cpu(),
        chosen.bias[best_rate].detach().cpu(),
    )


def _crops(config: LinearConfig, split: Split, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the random crops (., 3, side, side) of each step, and the labels (B,) of all ranks.

    Threads make them in advance; each makes the crops of a whole step.
    """
    side = config.pictures.image_size
    # Images may be decoded at this size: their smallest crop still has `side` pixels.
    target_side = math.ceil(side / math.sqrt(CROP_AREA[0]))

    share = order.share_of_batch(config.batch_size, world)

    def make(item: tuple[int, list[int]]) -> tuple[Tensor, Tensor]:
        first, batch = item
        reader, crops = ReferenceReader(), []
        rows_of_rank = split.table.take(pa.array([batch[number] for number in share])).to_pylist()
        for number, row in zip(share, rows_of_rank, strict=True):
            data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"], row["layout"])
            picture = decode_picture(data, split.limits, target_side=target_side)
            crops.append(random_crop(picture, side, np.random.default_rng([config.seed, 1, first + number])))
        reader.close()
        return torch.stack(crops), split.labels[torch.tensor(batch)]

    rows = order.shuffled_rows(len(split), config.seed)
    starts = range(0, config.steps * config.batch_size, config.batch_size)
    items = ((start, list(islice(rows, config.batch_size))) for start in starts)
    threads = config.pictures.decode_threads
    return prefetch(make, items, threads=threads, ahead=threads)


def middle_squares(split: Split, world: World, config: PicturesConfig, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Middle squares of this rank's share of the images (B, 3, side, side) and their labels (B,), `size` at a time."""
    share = world.share(len(split))
    squares = read_squares(split, share, config)
    start = share.start
    while batch := list(islice(squares, size)):
        yield torch.stack(batch), split.labels[start : start + len(batch)]
        start += len(batch)


def predict(
    head: ChosenHead, model: FrozenModel, split: Split, pictures: PicturesConfig, size: int, among: Tensor
) -> Tensor:
    """The most probable of the classes `among` (c,) for each image: (m,) int64, on every rank.

    size: images a forward pass.
    """
    predicted = [torch.empty(0, dtype=torch.int64)]
    for pixels, _ in middle_squares(split, model.world, pictures, size):
        predicted.append(among[head.logits(model, pixels)[:, among].argmax(1)])
    return gather_rows(model.world, torch.cat(predicted), len(split))


def run(
    config: LinearConfig, model: FrozenModel, output: str, *, cache: str | None = None, runner: Runner | None = None
) -> list[Result]:
    """Train and select a head, and classify one dataset. The head is cached in `cache`, <output>/cache when None.

    The images are read in this process, and shared among the ranks of the model's world. `runner` only ingests. Raises
    UserError.
    """
    started, cache = time.perf_counter(), cache or paths.join(output, "cache")
    train, test = splits.load_pair(
        config.train, config.test, cache, runner or InlineRunner(), subset=config.allow_missing_classes
    )
    head = fit_or_load(config, model, train, test, cache)
    every_class = torch.arange(len(train.classes))
    predicted = predict(head, model, test, config.pictures, config.images_per_pass, every_class)
    grid = "own grid" if config.learning_rates else f"grid of the {config.grid}"
    protocol = f"{len(readings_of(config, model)) * len(config.rates)} heads, {grid}, {config.steps:,} steps"
    if config.choose_on == "test":
        protocol += ", chosen on the test images"
    chosen = {
        "chosen_rate": head.rate,
        "chosen_blocks": head.reading.blocks,
        "chosen_average": head.reading.average,
        f"{config.choose_on}_top_1": head.selection_top_1,
    }
    return results.make(
        "linear",
        config.name,
        model,
        [Score(protocol, metric, value) for metric, value in classifier_scores(predicted, test.labels).items()],
        data_hash=hash_json([train.data_hash, test.data_hash]),
        settings=config.model_dump(mode="json") | chosen,
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("linear"))
