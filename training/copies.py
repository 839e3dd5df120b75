"""Trains a copy head: a short descriptor that finds edited copies of a picture among all others.

    python -m training.copies --images FOLDER --output DIR

FOLDER holds images, or is a finished ingest. Each picture is edited in NUM_VIEWS ways (curation/copies/edits.py), alone
and mixed with another picture. EfficientNet-Lite0 is frozen: its pooled features of all views are computed once and
kept in memory, 40 kB a picture. A linear map of them is then trained as SSCD is: views of one picture are near, and the
nearest other picture is far. The result is a file of a megabyte, for the pooling `copies`
(curation/models/copy_head.py).

    DIR/
      ingest/                  only where FOLDER holds images
      copy_head.safetensors    mean (F,) float32, weight (D, F) float16
      measured.json            counts, and the share of copies that are found, before and after

One of TEST_EVERY pictures is not trained on. An edited view of it counts as found when its own picture is the nearest
of all these pictures. The same images, options and number of threads of torch give the same bytes.

Shapes:
    N  pictures    V  views: the picture itself, then NUM_VIEWS edited ones    F  features    D  dimensions
    B  pictures of a step

Source: Pizzi et al., A Self-Supervised Descriptor for Image Copy Detection (arXiv 2202.10261), section 3.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
import typer
from PIL import Image
from torch import Tensor
from torch.nn import functional

from curation import ingest
from curation.copies.edits import KINDS, MIN_SIDE, edit
from curation.engine import command, progress
from curation.engine.manifest import read_manifest, require_fact, require_manifest
from curation.engine.runner import InlineRunner
from curation.errors import InputError
from curation.files import paths
from curation.files.hashes import sha256_of_bytes
from curation.files.prefetch import prefetch
from curation.images.decode import ImageLimits, Picture, decode_rgb, to_shape
from curation.images.hashing import perceptual_hash
from curation.images.sources import ReferenceReader, SourceConfig
from curation.ingest import IngestConfig
from curation.models import copy_head, efficientnet
from curation.models.copy_head import CopyHead
from curation.models.efficientnet import EfficientNetLite0
from curation.models.embedders import normalization_tensors
from curation.run_folder import read_images

HEAD_FILE, MEASURED_FILE = "copy_head.safetensors", "measured.json"
NUM_VIEWS = 11  # edited views of a picture. Assumed: the features of 2,500 pictures take minutes on two cores.
VIEW_SIDE = 320  # longer side of the picture before it is edited, in pixels. Assumed: the network reads 224.
# Probabilities of one, two and three edits in a view. Assumed.
NUM_EDITS = (0.55, 0.3, 0.15)
# Share of views in which the picture is mixed with another one. Assumed; SSCD mixes 1 in 50 at the end of training.
MIXED = 0.12
IMAGES_PER_PASS = 4  # of the network. Measured: embedders.EmbedderConfig.batch_size.

BATCH_SIZE = 256  # pictures of a step, with two views each. Assumed.
TEMPERATURE = 0.05  # cited: SSCD
# Cited: SSCD's code, for small batches. Measured on the development draw: 30 finds as many copies, 3 finds 0.4% fewer.
ENTROPY_WEIGHT = 10.0
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 1e-3, 1e-2, 50  # assumed
# Pictures whose perceptual hashes differ in at most this many of 64 bits may be copies of one another: they are not
# taken for different. Assumed.
MAX_COPY_BITS = 10
WHITENING_FLOOR = 0.3  # added to the deviations of principal axes, which start the map. Assumed: rare axes are noise.
START_SCALE = 0.1
MIN_SQUARE = 1e-6  # of a distance, so that its root has a gradient
TEST_EVERY = 10
MIN_IMAGES = 40  # fewer leave too few to test on


@dataclass(frozen=True)
class Options:
    """The choices of a training."""

    num_views: int = NUM_VIEWS
    num_steps: int = 1500
    seed: int = 0
    """Of the edits, the batches and the start."""
    threads: int = 2
    """Pictures that are edited and described at a time. The bytes do not depend on it."""
    image_size: int = 224
    """Side in pixels of the network's input."""


@dataclass(frozen=True)
class Views:
    """The features of pictures and of their edited views."""

    features: np.ndarray
    """(N, V, F) float16."""
    hashes: np.ndarray
    """(N,) uint64: perceptual hashes of the pictures."""


@dataclass(frozen=True)
class Measured:
    """Counts and results of a training."""

    images: int
    tested_images: int
    found_before: float
    """Share of the edited views of tested pictures whose own picture is nearest by the GeM features alone."""
    found: float
    """The same by the trained head."""
    sha256: str
    """Of the head's file."""


def run(images: str, output: str, options: Options) -> Measured:
    """Train on `images`, a folder of images or a finished ingest, and write the head to `output`.

    Raises InputError where there are fewer than MIN_IMAGES images.
    """
    folder = images
    if read_manifest(images) is None:
        folder = paths.join(output, "ingest")
        source = SourceConfig(name="images", path=images, role="pool")
        ingest.run(IngestConfig(sources=(source,)), folder, InlineRunner())
    views = features_of_views(folder, options)
    is_test = np.arange(len(views.hashes)) % TEST_EVERY == 0
    head = train(views.features[~is_test], views.hashes[~is_test], options)
    data = encode(head)
    head = copy_head.decoded(data)  # as rounded
    test = views.features[is_test]
    measured = Measured(
        images=len(views.hashes),
        tested_images=len(test),
        found_before=share_found(torch.from_numpy(test[..., : efficientnet.HEAD_CHANNELS]).float()),
        found=share_found(head(torch.from_numpy(test).float())),
        sha256=sha256_of_bytes(data),
    )
    paths.write_bytes(paths.join(output, HEAD_FILE), data)
    paths.write_bytes(paths.join(output, MEASURED_FILE), (json.dumps(asdict(measured), indent=1) + "\n").encode())
    return measured


def features_of_views(folder: str, options: Options) -> Views:
    """The features of all images of a finished ingest, in the order of their ids, with their edited views."""
    limits = ImageLimits.model_validate(require_fact(folder, require_manifest(folder), "limits"), strict=False)
    columns = ["image_id", "uri", "offset", "length", "layout"]
    by_id = {row["image_id"]: row for row in read_images(folder, columns).to_pylist()}
    rows = [row for _, row in sorted(by_id.items())]
    if len(rows) < MIN_IMAGES:
        raise InputError(f"'{folder}' lists {len(rows)} different images; a copy head needs at least {MIN_IMAGES}.")
    # Every thread computes on its own pictures, so each layer takes one thread.
    torch.set_num_threads(1)
    network = efficientnet.load_network(efficientnet.packaged_weights())

    def described(item: tuple[int, bytes, bytes]) -> tuple[np.ndarray, int]:
        index, data, other_data = item
        picture, other = (small_picture(content, limits) for content in (data, other_data))
        generator = np.random.default_rng([options.seed, index])
        views = [picture, *(edited_view(picture, other, generator) for _ in range(options.num_views))]
        return features_of(network, views, options.image_size), perceptual_hash(picture)

    features = np.empty((len(rows), 1 + options.num_views, copy_head.NUM_INPUTS), np.float16)
    hashes = np.empty(len(rows), np.uint64)
    results = prefetch(described, _read_in_pairs(rows), threads=options.threads, ahead=2 * options.threads)
    with progress.bar("copies", total=len(rows), unit="images") as advance:
        for index, (of_views, phash) in enumerate(results):
            features[index], hashes[index] = of_views, phash
            advance(1, "")
    return Views(features, hashes)


def _read_in_pairs(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[int, bytes, bytes]]:
    """The index and the bytes of each image, and the bytes of the image before it; ids order images at random."""
    reader = ReferenceReader()

    def read(row: dict[str, Any]) -> bytes:
        return reader.read(row["uri"], row["offset"], row["length"], row["image_id"], row["layout"])

    try:
        before = read(rows[-1])
        for index, row in enumerate(rows):
            data = read(row)
            yield index, data, before
            before = data
    finally:
        reader.close()


def small_picture(data: bytes, limits: ImageLimits) -> Image.Image:
    """The picture (RGB) with a longer side of at most VIEW_SIDE, and sides of at least the edits' MIN_SIDE."""
    picture = decode_rgb(data, limits, target_side=VIEW_SIDE)
    picture.thumbnail((VIEW_SIDE, VIEW_SIDE))
    if min(picture.size) < MIN_SIDE:
        picture = picture.resize((max(MIN_SIDE, picture.width), max(MIN_SIDE, picture.height)))
    return picture


def edited_view(picture: Image.Image, other: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A view of `picture`: one to three different edits, or mixed with `other` and up to two edits."""
    count = 1 + int(generator.choice(len(NUM_EDITS), p=NUM_EDITS))
    if generator.random() < MIXED:
        picture, count = mixed(picture, other, generator), count - 1
    kinds = list(KINDS)
    for position in generator.permutation(len(kinds))[:count]:
        if min(picture.size) < MIN_SIDE:
            break
        picture = edit(picture, kinds[position], generator)
    return picture


def mixed(picture: Image.Image, other: Image.Image, generator: np.random.Generator) -> Image.Image:
    """`picture` blended with `other`, or at 30% to 70% of the area somewhere in `other`."""
    if generator.random() < 0.5:
        return Image.blend(picture, other.resize(picture.size), generator.uniform(0.25, 0.5))
    share = math.sqrt(generator.uniform(0.3, 0.7))
    size = tuple(max(MIN_SIDE, round(length * share)) for length in other.size)
    ground = other.resize((max(other.width, size[0]), max(other.height, size[1])))
    place = [
        int(generator.integers(0, length - inner, endpoint=True))
        for length, inner in zip(ground.size, size, strict=True)
    ]
    ground.paste(picture.resize((size[0], size[1])), (place[0], place[1]))
    return ground


def features_of(network: EfficientNetLite0, views: Sequence[Image.Image], side: int) -> np.ndarray:
    """(V, F) float16: the features that a copy head reads of inputs of side x side pixels."""
    pictures = [Picture(np.array(view), *view.size, orientation=1) for view in views]
    pixels = torch.from_numpy(np.stack([to_shape(picture, (side, side)) for picture in pictures])).float()
    mean, deviation = normalization_tensors(efficientnet.NORMALIZATION, pixels.device)
    with torch.inference_mode():
        batches = torch.split((pixels - mean) / deviation, IMAGES_PER_PASS)
        parts = [network(batch.contiguous(memory_format=torch.channels_last)) for batch in batches]
        return torch.cat([efficientnet.copy_features(layers) for layers in parts]).numpy().astype(np.float16)


def train(features: np.ndarray, hashes: np.ndarray, options: Options) -> CopyHead:
    """A head trained on the features (N, V, F) of views of pictures with perceptual hashes (N,)."""
    num_images, num_views, _ = features.shape
    generator = np.random.default_rng([options.seed, num_images])
    views = torch.from_numpy(features)
    mean, deviation = _moments(views)
    weight = _whitening((views[:, 0].float() - mean) / deviation).requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    order = np.empty(0, np.int64)
    size = min(BATCH_SIZE, num_images)
    with progress.bar("copies: training", total=options.num_steps, unit="steps") as advance:
        for step in range(options.num_steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * _schedule(step, options.num_steps)
            if len(order) < size:
                order = generator.permutation(num_images)
            batch, order = order[:size], order[size:]
            chosen = np.stack([generator.permutation(num_views)[:2] for _ in batch])  # (B, 2) views
            both = torch.cat([views[batch, chosen[:, side]] for side in (0, 1)]).float()  # (2B, F)
            descriptors = functional.linear((both - mean) / deviation, weight)
            loss = copy_loss(descriptors, may_be_copies(hashes[batch]))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            advance(1, f"loss {loss.item():.3f}")
    head = CopyHead()
    head.mean, head.weight = mean, weight.detach() / deviation
    return head


def copy_loss(descriptors: Tensor, is_excluded: Tensor) -> Tensor:
    """InfoNCE and the entropy term of SSCD, equations 2 to 5, for two views of each picture.

    descriptors: (2B, D), first one view of each picture, then another one. is_excluded: (B, B), true for pairs of
    pictures that are not taken for different.
    """
    unit = functional.normalize(descriptors, dim=1)
    cosine = unit @ unit.T  # (2B, 2B)
    count = len(is_excluded)
    is_same = torch.eye(count, dtype=torch.bool)
    is_other = ~(is_same | is_excluded).repeat(2, 2)
    positive = (unit[:count] * unit[count:]).sum(1).repeat(2) / TEMPERATURE  # (2B,)
    negatives = (cosine / TEMPERATURE).masked_fill(~is_other, -1e9).logsumexp(1)
    # -log(exp(p) / (exp(p) + the sum of exp(n))) = softplus(log of the sum - p)
    contrastive = functional.softplus(negatives - positive).mean()
    # As losses.koleo_loss, but the nearest neighbour is of another picture. Pictures without one count as far apart.
    squares = (2 - 2 * cosine).masked_fill(~is_other, 4).min(1).values
    return contrastive - ENTROPY_WEIGHT * squares.clamp_min(MIN_SQUARE).log().mean() / 2


def may_be_copies(hashes: np.ndarray) -> Tensor:
    """(B, B): whether two perceptual hashes are within MAX_COPY_BITS."""
    return torch.from_numpy(np.bitwise_count(hashes[:, None] ^ hashes[None]) <= MAX_COPY_BITS)


def share_found(descriptors: Tensor) -> float:
    """Share of the edited views whose own picture is the nearest of all pictures. descriptors: (N, V, D)."""
    unit = functional.normalize(descriptors, dim=2)
    nearest = (unit[:, 1:] @ unit[:, 0].T).argmax(2)  # (N, V - 1)
    return float((nearest == torch.arange(len(unit))[:, None]).float().mean())


def encode(head: CopyHead) -> bytes:
    """The file of a head: weights in float16, which halves it; the mean in float32."""
    return safetensors.torch.save({"mean": head.mean, "weight": head.weight.half()})


def _moments(views: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (F,) over all views (N, V, F), in float64 and by blocks, then float32."""
    total, squares = torch.zeros(2, views.shape[2], dtype=torch.float64)
    for block in torch.split(views, 256):
        values = block.flatten(0, 1).double()
        total, squares = total + values.sum(0), squares + values.square().sum(0)
    count = views.shape[0] * views.shape[1]
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    return mean.float(), variance.sqrt().float() + 1e-4


def _whitening(normalised: Tensor) -> Tensor:
    """(D, F): the first D principal axes of (N, F), longer for the axes with less variance. The start of the map."""
    covariance = normalised.double().T @ normalised.double() / len(normalised)
    values, axes = torch.linalg.eigh(covariance)  # ascending
    deviations = values.clamp_min(0).sqrt().flip(0)[: copy_head.NUM_OUTPUTS]
    axes = axes.flip(1)[:, : copy_head.NUM_OUTPUTS] / (deviations + WHITENING_FLOOR)
    scale = START_SCALE / torch.linalg.vector_norm(axes, dim=0).mean()
    start: Tensor = (scale * axes).T.float().contiguous()
    return start


def _schedule(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / num_steps)) / 2


def command_line(
    images: Annotated[str, typer.Option("--images", help="Folder of images, or of a finished ingest.")],
    output: command.OutputOption,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the training.")] = Options.num_steps,
    views: Annotated[int, typer.Option("--views", min=1, help="Edited views of each image.")] = Options.num_views,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the edits and the training.")] = Options.seed,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Images described at a time; default: one for each core.")
    ] = None,
) -> None:
    """Train a copy head for EfficientNet-Lite0 on images."""
    paths.require_apart(output, [images])
    threads = threads or len(os.sched_getaffinity(0))
    measured = run(images, output, Options(views, steps, seed, threads))
    progress.say(
        f"copies: of the edited views of {measured.tested_images:,} images that were not trained on, "
        f"{measured.found:.1%} are nearest to their original ({measured.found_before:.1%} without the head)"
    )
    progress.say(f"copies: wrote {paths.join(output, HEAD_FILE)}, SHA-256 {measured.sha256}")


if __name__ == "__main__":
    from training import copies  # by its real name, or its classes would exist twice

    command.main(copies.command_line)
