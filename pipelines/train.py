"""Train on a corpus, and measure the k-NN accuracy of labelled images during training.

    seedbed train --config pipelines/configs/train/demo.toml --images runs/demo/ingest --output runs/train

The images are those of a finished ingest: labelled seeds, and the holdout, whose copies were kept out of the corpus.
Accuracy is measured before the first step, every `evaluate_every` steps and at the end.
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
from curation.run_folder import require_stage
from evaluation import knn
from training.loop import TrainConfig, train
from training.train import print_plan

NUM_NEIGHBORS = 10  # assumed: the smallest of DINOv2's 10, 20, 100 and 200, for a few hundred reference images
BATCH_SIZE = 64


def knn_of_holdout(images: str, side: int) -> Callable[[VisionTransformer, int], dict[str, float]]:
    """An evaluation that classifies the holdout of a finished ingest, with all images as squares of `side` pixels.

    An image's class is the first folder of its label. The evaluation gives

        knn               accuracy of holdout images, classified by the seeds and the other holdout images
        knn_of_classes    the same, as the mean over classes
        knn_by_seeds      accuracy of holdout images, classified by the seeds alone

    A holdout image counts for the first two if its class has another image, for the last if its class has a seed.
    """
    pixels, labels, is_test = _labelled(images, side)
    names = sorted(set(labels))
    classes = torch.tensor([names.index(label) for label in labels])
    counts = classes.bincount(minlength=len(names))
    seed_counts = classes[~is_test].bincount(minlength=len(names))
    tested = (is_test & (counts[classes] > 1)).nonzero()[:, 0]
    tested_by_seeds = (is_test & (seed_counts[classes] > 0)).nonzero()[:, 0]
    if len(torch.unique(classes[tested])) < 2 or len(tested_by_seeds) == 0:
        raise InputError(
            f"'{images}': of {len(names)} classes of labels, the holdout needs two with several images, and one with "
            "seeds, to be classified by k-NN."
        )

    def evaluate(backbone: VisionTransformer, step: int) -> dict[str, float]:
        features = _features(backbone, pixels)
        similarities, rows = knn.neighbors([features], features[tested], k=min(NUM_NEIGHBORS + 1, len(features)))
        is_other = rows != tested[:, None]
        # With many equal images, an image may be missing among its own neighbours; the last neighbour then goes.
        is_other[is_other.all(1), -1] = False
        similarities, rows = (matrix[is_other].reshape(len(tested), -1) for matrix in (similarities, rows))
        correct = knn.vote(similarities, classes[rows], len(names)).argmax(1) == classes[tested]
        accuracies = [
            correct[classes[tested] == label].float().mean().item() for label in torch.unique(classes[tested])
        ]
        probabilities = knn.classify(features[~is_test], classes[~is_test], features[tested_by_seeds], k=NUM_NEIGHBORS)
        return {
            "knn": correct.float().mean().item(),
            "knn_of_classes": sum(accuracies) / len(accuracies),
            "knn_by_seeds": knn.accuracy(probabilities, classes[tested_by_seeds]),
        }

    return evaluate


def _labelled(images: str, side: int) -> tuple[Tensor, list[str], Tensor]:
    """The labelled images of seeds and holdout.

    Gives pixels (n, 3, side, side) uint8, the first folder of each label (n), and whether each is of the holdout (n,).
    """
    columns = ["image_id", "uri", "offset", "length", "role", "label", "layout"]
    tables = [
        parquet.read_table(file, schemas.IMAGES, columns) for file in require_manifest(images).paths(images, "images")
    ]
    table = pa.concat_tables(tables)
    table = table.filter(pc.and_(pc.not_equal(table["role"], "pool"), pc.is_valid(table["label"])))
    if not table.num_rows:
        raise InputError(f"'{images}' has no labelled image of role 'seed' or 'holdout'.")
    reader, pixels = ReferenceReader(), []
    for row in table.to_pylist():
        data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"], row["layout"])
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
    batches = (batch.to(device).float().sub_(mean).div_(deviation) for batch in torch.split(pixels, BATCH_SIZE))
    return torch.cat([backbone(batch).float().cpu() for batch in batches])


def command_line(
    config: command.ConfigOption = "train/demo",
    output: command.OutputOption = "runs/train",
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="DIR", help="Ingest of a run: also measure the k-NN of its holdout."),
    ] = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
) -> None:
    """Train a Vision Transformer on a corpus, and print its losses over time.

    `data.path` of the config is the corpus: a run's folder corpus/, or other images (`data.layout`). With --images, the
    10-NN accuracy of labelled holdout images is measured during the training too. Lengths are in steps of `batch_size`
    images; pipelines/configs/train/ has configs to start from. The same command resumes a stopped training. On several
    GPUs: torchrun --nproc-per-node 8 -m training.train, without --images (docs/launch.md).

    \b
    Examples:
      seedbed train --config mine.toml --output runs/vit \\
          --set data.path=runs/birds/corpus
      seedbed train --config mine.toml --plan
      seedbed train --config mine.toml --output runs/vit --set device=cuda \\
          --set data.path=runs/birds/corpus --images runs/birds/ingest
    """
    settings = load(TrainConfig, config, overrides or ())
    if plan:
        print_plan(settings)
        return
    command.require_apart(output, settings, config, *filter(None, [images]))
    if images is not None:
        require_stage(images, "ingest", "--images")
    paths.require_writable(output)
    evaluate = None if images is None else knn_of_holdout(images, settings.model.backbone.image_size)
    with command.saying_how_to_go_on(f"The checkpoints in '{output}' are kept"):
        train(settings, output, evaluate)
    print_curve(output)


def print_curve(output: str, num_rows: int = 20) -> None:
    """Print the losses of a run over time, in at most `num_rows` rows, and the scores of its evaluations, if any."""
    lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    console = Console(highlight=False)
    losses = [line for line in lines if "loss" in line]
    columns = ("step", "loss", "dino_global", "dino_local", "ibot", "koleo", "teacher_entropy", "rank_me")
    table = Table(title="Training", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    lines_per_row = -(-len(losses) // num_rows)
    for line in losses[lines_per_row - 1 :: lines_per_row]:
        table.add_row(f"{line['step']:,}", *(f"{line[column]:.3f}" for column in columns[1:] if column in line))
    console.print(table)
    if not any("knn" in line for line in lines):
        return
    scores = Table(title=f"{NUM_NEIGHBORS}-NN of the holdout", title_justify="left")
    names = {"knn": "accuracy", "knn_of_classes": "mean of classes", "knn_by_seeds": "by the seeds alone"}
    for column in ("steps", *names.values()):
        scores.add_column(column, justify="right")
    for line in lines:
        if "knn" in line:
            scores.add_row(f"{line['step']:,}", *(f"{line[name]:.3f}" for name in names))
    console.print(scores)


if __name__ == "__main__":
    from pipelines import train as this  # by its real name

    command.main(this.command_line)
