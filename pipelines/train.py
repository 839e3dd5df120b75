"""Train on a corpus and see it get better: the trainer with a k-NN of labelled images handed in.

    python -m pipelines.train --config pipelines/configs/train/demo.toml --images runs/demo/ingest --output runs/train

The images are those that ingest listed: the seeds, with their labels, classify the holdout, of which nothing like it
was allowed into the corpus. Accuracy is measured before the first step, every `evaluate_every` steps and at the end.
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

from curation import command, records, storage
from curation.backbone import VisionTransformer
from curation.config import load
from curation.embedders import IMAGENET_NORMALIZATION
from curation.errors import InputError
from curation.images import ImageLimits, decode_picture, to_shape
from curation.sources import ReferenceReader
from evaluation import knn
from training.loop import TrainConfig, train

NEIGHBORS = 10  # assumed: the least of DINOv2's 10, 20, 100 and 200, for a reference set of a few hundred images
BATCH_SIZE = 64


def knn_of_holdout(images: str, side: int) -> Callable[[VisionTransformer, int], dict[str, float]]:
    """What classifies the holdout of a finished ingest by its seeds, both as squares of `side` pixels.

    An image's class is the first folder of its label; those of the holdout that no seed has are left out. Gives
    `knn`, the share of holdout images that are classified rightly, and `knn_balanced`, its mean over the classes.
    """
    references, reference_labels = _labelled(images, "seed", side)
    tested, tested_labels = _labelled(images, "holdout", side)
    names = sorted(set(reference_labels) & set(tested_labels))
    if len(names) < 2:
        raise InputError(f"'{images}': seeds and holdout share {len(names)} classes of labels; k-NN needs two or more.")
    kept = [place for place, label in enumerate(tested_labels) if label in names]
    kept_references = [place for place, label in enumerate(reference_labels) if label in names]
    classes = torch.tensor([names.index(reference_labels[place]) for place in kept_references])
    truth = torch.tensor([names.index(tested_labels[place]) for place in kept])

    def evaluate(backbone: VisionTransformer, step: int) -> dict[str, float]:
        features = [_features(backbone, pixels) for pixels in (references[kept_references], tested[kept])]
        probabilities = knn.classify(features[0], classes, features[1], k=NEIGHBORS)
        right = probabilities.argmax(1) == truth
        of_each = [right[truth == label].float().mean().item() for label in range(len(names))]
        return {"knn": right.float().mean().item(), "knn_balanced": sum(of_each) / len(of_each)}

    return evaluate


def _labelled(images: str, role: str, side: int) -> tuple[Tensor, list[str]]:
    """The images (n, 3, side, side) uint8 of a role that have a label, and the first folder of each label."""
    columns = ["image_id", "uri", "offset", "length", "role", "label"]
    tables = [
        storage.read_table(storage.join(images, name), records.IMAGES, columns)
        for name in storage.require_manifest(images).files("images")
    ]
    table = pa.concat_tables(tables)
    table = table.filter(pc.and_(pc.equal(table["role"], role), pc.is_valid(table["label"])))
    if not table.num_rows:
        raise InputError(f"'{images}' has no labelled image of role '{role}'.")
    reader, pixels = ReferenceReader(), []
    for row in table.to_pylist():
        data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"])
        picture = decode_picture(data, ImageLimits(), target_side=side)
        pixels.append(torch.from_numpy(to_shape(picture, (side, side), crop=True)))
    reader.close()
    return torch.stack(pixels), [label.partition("/")[0] for label in table["label"].to_pylist()]


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
    found = Table(title=f"{NEIGHBORS}-NN of the holdout, by the seeds", title_justify="left")
    for column in ("steps", "accuracy", "mean over classes"):
        found.add_column(column, justify="right")
    for line in lines:
        if "knn" in line:
            found.add_row(f"{line['step']:,}", f"{line['knn']:.3f}", f"{line['knn_balanced']:.3f}")
    console.print(found)


if __name__ == "__main__":
    from pipelines import train as this  # by its real name

    command.main(this.command_line)
