"""Train on a corpus and see it get better: the trainer with a k-NN of labelled images handed in.

    python -m pipelines.train --config pipelines/configs/train/demo.toml --images runs/demo/ingest --output runs/train

The images are those that ingest listed: labelled seeds, and a holdout of which nothing like it was allowed into the
corpus. Accuracy is measured before the first step, every `evaluate_every` steps and at the end.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from curation.backbone import VisionTransformer
from curation.config import load
from curation.engine import command
from curation.engine.manifest import require_manifest
from curation.errors import InputError
from curation.files import parquet, paths, schemas
from curation.images.decode import ImageLimits, decode_picture, to_shape
from curation.images.sources import ReferenceReader
from curation.models.embedders import IMAGENET_NORMALIZATION
from evaluation import knn
from training.loop import TrainConfig, train

NEIGHBORS = 10  # assumed: the least of DINOv2's 10, 20, 100 and 200, for a reference set of a few hundred images
BATCH_SIZE = 64


def knn_of_holdout(images: str, side: int) -> Callable[[VisionTransformer, int], dict[str, float]]:
    """What classifies the holdout of a finished ingest by its labelled images, all as squares of `side` pixels.

    An image's class is the first folder of its label. Each holdout image is classified by the seeds and the other
    images of the holdout, where its class has another image at all. Gives `knn`, the share that is classified rightly,
    `knn_of_classes`, its mean over the classes, and `knn_by_seeds`, the share among the classes that the seeds have,
    classified by the seeds alone.
    """
    pixels, labels, is_test = _labelled(images, side)
    names = sorted(set(labels))
    classes = torch.tensor([names.index(label) for label in labels])
    counts = classes.bincount(minlength=len(names))
    of_seeds = classes[~is_test].bincount(minlength=len(names))
    tested = (is_test & (counts[classes] > 1)).nonzero()[:, 0]
    by_seeds = (is_test & (of_seeds[classes] > 0)).nonzero()[:, 0]
    if len(torch.unique(classes[tested])) < 2 or len(by_seeds) == 0:
        raise InputError(
            f"'{images}': of {len(names)} classes of labels, the holdout needs two with several images, and one that "
            "the seeds have, to be classified by k-NN."
        )

    def evaluate(backbone: VisionTransformer, step: int) -> dict[str, float]:
        features = _features(backbone, pixels)
        near, rows = knn.neighbors([features], features[tested], k=min(NEIGHBORS + 1, len(features)))
        other = rows != tested[:, None]
        other[other.all(1), -1] = False  # an image that is not among its own neighbours, being one of many equal ones
        near, rows = (of[other].reshape(len(tested), -1) for of in (near, rows))
        right = knn.vote(near, classes[rows], len(names)).argmax(1) == classes[tested]
        of_each = [right[classes[tested] == label].float().mean().item() for label in torch.unique(classes[tested])]
        probabilities = knn.classify(features[~is_test], classes[~is_test], features[by_seeds], k=NEIGHBORS)
        return {
            "knn": right.float().mean().item(),
            "knn_of_classes": sum(of_each) / len(of_each),
            "knn_by_seeds": knn.accuracy(probabilities, classes[by_seeds]),
        }

    return evaluate


def _labelled(images: str, side: int) -> tuple[Tensor, list[str], Tensor]:
    """The images (n, 3, side, side) uint8 of seeds and holdout that have a label, the first folder of each label, and
    which are of the holdout (n,)."""
    columns = ["image_id", "uri", "offset", "length", "role", "label"]
    tables = [
        parquet.read_table(paths.join(images, name), schemas.IMAGES, columns)
        for name in require_manifest(images).files("images")
    ]
    table = pa.concat_tables(tables)
    table = table.filter(pc.and_(pc.not_equal(table["role"], "pool"), pc.is_valid(table["label"])))
    if not table.num_rows:
        raise InputError(f"'{images}' has no labelled image of role 'seed' or 'holdout'.")
    reader, pixels = ReferenceReader(), []
    for row in table.to_pylist():
        data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"])
        picture = decode_picture(data, ImageLimits(), target_side=side)
        pixels.append(torch.from_numpy(to_shape(picture, (side, side), crop=True)))
    reader.close()
    labels = [label.partition("/")[0] for label in table["label"].to_pylist()]
    return torch.stack(pixels), labels, torch.tensor([role == "holdout" for role in table["role"].to_pylist()])


@torch.inference_mode()
def _features(backbone: VisionTransformer, pixels: Tensor) -> Tensor:
    """The CLS tokens (n, D) of (n, 3, H, W) uint8, on the CPU."""
    device = backbone.pos_embed.device
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in IMAGENET_NORMALIZATION)
    batches = (part.to(device).float().sub_(mean).div_(deviation) for part in torch.split(pixels, BATCH_SIZE))
    return torch.cat([backbone(batch).float().cpu() for batch in batches])


def command_line(
    images: Annotated[str, typer.Option("--images", help="Folder of a finished ingest with labelled images.")],
    config: command.ConfigOption = "pipelines/configs/train/demo.toml",
    output: command.OutputOption = "runs/train",
    overrides: command.SetOption = None,
) -> None:
    """Train, and print how the loss and the k-NN of the holdout went."""
    settings = load(TrainConfig, config, overrides or ())
    train(settings, output, knn_of_holdout(images, settings.model.backbone.image_size))
    print_curve(output)


def print_curve(output: str, num_rows: int = 20) -> None:
    """Print the losses of a run over time, and what the evaluations found."""
    lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    console = Console(highlight=False)
    losses = [line for line in lines if "loss" in line]
    columns = ("step", "loss", "dino_global", "dino_local", "ibot", "koleo", "teacher_entropy", "rank_me")
    table = Table(title="Training", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    every = -(-len(losses) // num_rows)
    for line in losses[every - 1 :: every]:
        table.add_row(f"{line['step']:,}", *(f"{line[column]:.3f}" for column in columns[1:] if column in line))
    console.print(table)
    found = Table(title=f"{NEIGHBORS}-NN of the holdout", title_justify="left")
    names = {"knn": "accuracy", "knn_of_classes": "mean of classes", "knn_by_seeds": "by the seeds alone"}
    for column in ("steps", *names.values()):
        found.add_column(column, justify="right")
    for line in lines:
        if "knn" in line:
            found.add_row(f"{line['step']:,}", *(f"{line[name]:.3f}" for name in names))
    console.print(found)


if __name__ == "__main__":
    from pipelines import train as this  # by its real name

    command.main(this.command_line)
