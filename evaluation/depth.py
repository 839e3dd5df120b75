"""Monocular depth from frozen patch tokens, which measures geometry in the features.

A small head on the tokens of a frozen backbone is trained to predict the depth of every pixel, and scored by ten
metrics. The heads, the loss and the crops are those of DINOv2. Three things differ from its published numbers. The
learning rate and its schedule are DINOv3's. The loss has no gradient term. The prediction for the padding is cut off;
DINOv2 stretches the prediction over the image.

The layouts of the data. Every depth map has the size of its image:

    nyu          NYU Depth v2 as published by BTS: a list of "/<scene>/rgb_00045.jpg /<scene>/sync_depth_00045.png
                 518.8579", 480 x 640, PNG of 16 bits in millimetres
    nyu_arrays   the test set as published by DenseDepth: eigen_test_rgb.npy (n, 480, 640, 3) uint8 and
                 eigen_test_depth.npy (n, 480, 640) in metres
    kitti        KITTI's Eigen split: a list of "<date>/<drive>/image_02/data/<frame>.png
                 <drive>/proj_depth/groundtruth/image_02/<frame>.png focal", images below input/, depths below
                 gt_depth/, PNG of 16 bits in metres / 256; lines whose depth is None are left out
    sun_rgbd     SUN RGB-D: a list of "SUNRGBD/<sensor>/.../image/<name>.jpg SUNRGBD/<sensor>/.../depth/<name>.png",
                 PNG of 16 bits, millimetres rotated left by 3 bits, clipped at 8 m
    folder       <folder>/rgb/<name>.<any> and <folder>/depth/<name>.png of 16 bits, or .npy in metres

In every layout, depth 0 means unknown.

Shapes:
    B  images    H, W  pixels    h, w  patches    D  width of a token    L  blocks of a head's input    K  depth bins

Sources: Oquab et al., DINOv2 (arXiv 2304.07193), 7.4, and its released heads; Li et al., BinsFormer (arXiv 2204.00987),
whose toolbox has the lists and crops; Eigen et al. (arXiv 1406.2283) for the loss and the metrics; Ranftl et al., DPT
(arXiv 2103.13413).
"""

# Calling a torch module is typed Any.
# mypy: disable-error-code="no-any-return"

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from curation.config import Settings
from curation.engine.ranks import ALONE, World, gather_rows, sum_over_ranks
from curation.errors import InputError, TrainingError
from curation.files.hashes import sha256_of_bytes
from curation.files.prefetch import prefetch
from evaluation import order, results
from evaluation.data.depth_data import (
    LAYOUTS,
    NYU_INSIDE,
    Crop,
    DepthDataConfig,
    DepthSample,
    find_samples,
    hash_samples,
    read_sample,
)
from evaluation.features import FrozenModel
from evaluation.padding import pad_to_patches
from evaluation.results import Result, Score

HeadName = Literal["linear_1", "linear_4", "dpt"]
Tokens = Sequence[tuple[Tensor, Tensor]]  # of each block: patch tokens (B, D, h, w) and CLS (B, D)

METRICS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "d1", "d2", "d3", "mae")
READERS = 2  # threads that read and crop in advance. Assumed.
NUM_BINS = 256  # cited: DINOv2, hub/depthers.py
MIN_DEPTH = 1e-3  # metres; cited: the same
BIN_FLOOR = 0.1  # added to every bin before normalisation; cited: AdaBins and DINOv2's decode_head.py
UPSAMPLING = 4  # factor on the patch grid before the head; cited: DINOv2, hub/depthers.py
LOSS_EPSILON = 1e-3  # metres; cited: DINOv2's sigloss.py
LOSS_MEAN_WEIGHT = 0.15  # of the squared mean; cited: the same. Eigen et al. have 0.5
DPT_CHANNELS = 256  # cited: DINOv2, hub/depthers.py
LOSS_WARMUP_STEPS = 100  # first steps, whose loss is the mean error alone; cited: the same
WEIGHT_DECAY = 0.01  # of AdamW; cited: DINOv3's NYU config
GRADIENT_CLIP = 35.0  # maximum norm of the gradient; cited: the same
MAX_ROTATION = 2.5  # degrees; cited: BinsFormer's toolbox, as the other numbers of `augment`


class DepthConfig(Settings):
    """A head on frozen tokens that predicts the depth of every pixel."""

    train: DepthDataConfig
    """The training data."""
    tests: tuple[DepthDataConfig, ...] = Field(min_length=1)
    """The test data."""
    heads: tuple[HeadName, ...] = ("linear_1", "linear_4")
    """Heads to train: a linear head on the last block or on four blocks, or DPT on the same four blocks."""
    final_norm: bool = False
    """Whether tokens pass the backbone's last norm: false for DINOv2's released heads, true for DINOv3."""
    max_depth: float | None = Field(default=None, gt=MIN_DEPTH)
    """Metres: the last bin. Greater depths are neither trained on nor scored. Left out, 80 for training data of layout
    "kitti", 10 for others."""
    crop_size: tuple[int, int] | None = None
    """Height and width in pixels of a training crop. Left out, 352 x 704 for KITTI, 416 x 544 for other data."""
    steps: int = Field(default=38_400, ge=1)
    """Optimizer steps. Cited: DINOv2 and DINOv3."""
    warmup_steps: int = Field(default=12_800, ge=2)
    """First steps, in which the learning rate rises. Cited: the same."""
    batch_size: int = Field(default=16, ge=1)
    """Crops of a step. Cited: the same, 2 on each of 8 GPUs."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Maximum of the schedule. Cited: DINOv3's NYU config."""
    seed: int = Field(default=0, ge=0)
    """Draws the fresh head, the order of the images and the crops."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected less than steps, {self.steps}")
        if self.train.layout in ("nyu_arrays", "sun_rgbd"):
            raise ValueError(f"train: layout {self.train.layout} has a test split only")
        return self

    @property
    def cap(self) -> float:
        """The greatest depth in metres that is trained on and scored."""
        return self.max_depth or LAYOUTS[self.train.layout].max_depth


# ---- scoring


def valid_mask(truth: Tensor, *, max_depth: float, crop: Crop = "none") -> Tensor:
    """The pixels of `truth` (H, W) that count: between a millimetre and `max_depth`, inside the crop."""
    inside = torch.zeros_like(truth, dtype=torch.bool)
    rows, columns = truth.shape
    match crop:
        case "none":
            inside[:] = True
        case "eigen":
            inside[45:471, 41:601] = True
        case "garg":
            top, bottom = int(0.40810811 * rows), int(0.99189189 * rows)
            left, right = int(0.03594771 * columns), int(0.96405229 * columns)
            inside[top:bottom, left:right] = True
    return inside & (truth > MIN_DEPTH) & (truth < max_depth)


def measure(prediction: Tensor, truth: Tensor, mask: Tensor) -> dict[str, float]:
    """The ten metrics over the pixels of `mask`, all (H, W), depths in metres. NaN where no pixel counts.

    abs_rel, sq_rel: mean error and mean squared error, each divided by the true depth. rmse, mae: metres. rmse_log: of
    natural logarithms. log10: mean error of decimal logarithms. silog: 100 times the standard deviation of the errors
    of natural logarithms. d1, d2, d3: the share of pixels with a ratio to the truth below 1.25, 1.25^2, 1.25^3.
    """
    predicted, true = prediction[mask].double(), truth[mask].double()
    error, log_error = predicted - true, predicted.log() - true.log()
    ratio = torch.maximum(predicted / true, true / predicted)
    values = {
        "abs_rel": (error.abs() / true).mean(),
        "sq_rel": (error.square() / true).mean(),
        "rmse": error.square().mean().sqrt(),
        "rmse_log": log_error.square().mean().sqrt(),
        "log10": log_error.abs().mean() / math.log(10),
        "silog": 100 * (log_error - log_error.mean()).square().mean().sqrt(),
        "d1": (ratio < 1.25).double().mean(),
        "d2": (ratio < 1.25**2).double().mean(),
        "d3": (ratio < 1.25**3).double().mean(),
        "mae": error.abs().mean(),
    }
    return {name: float(values[name]) for name in METRICS}


def mean_over_images(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the images in which a pixel counts. Raises InputError where there are none."""
    counted = [one for one in measured if not math.isnan(one["mae"])]
    if not counted:
        raise InputError("No pixel of any test image has a depth that counts. Check the units and max_depth.")
    return {name: math.fsum(one[name] for one in counted) / len(counted) for name in METRICS}


def sig_loss(prediction: Tensor, truth: Tensor, *, max_depth: float, mean_alone: bool = False) -> Tensor:
    """The scale-invariant loss of Eigen et al. over all pixels with 0 < truth <= max_depth: a scalar.

    It is the root of the variance (n - 1) of the logarithmic errors plus 0.15 times their squared mean. With
    `mean_alone` the variance is left out. It is 0 where fewer than two pixels count.
    """
    mask = (truth > 0) & (truth <= max_depth)
    error = (prediction[mask] + LOSS_EPSILON).log() - (truth[mask] + LOSS_EPSILON).log()
    if len(error) < 2:
        return prediction.sum() * 0
    square = LOSS_MEAN_WEIGHT * error.mean().square()
    if not mean_alone:
        square = square + error.var()
    return square.clamp(min=1e-12).sqrt()  # the root has no gradient at 0


# ---- heads


def depth_of_bins(logits: Tensor, max_depth: float) -> Tensor:
    """Logits (B, K, h, w) to metres (B, h, w): the weighted mean of K depths, evenly spaced up to `max_depth`."""
    weights = functional.relu(logits) + BIN_FLOOR
    bins = torch.linspace(MIN_DEPTH, max_depth, logits.shape[1], device=logits.device, dtype=logits.dtype)
    return torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), bins)


class LinearDepthHead(nn.Module):
    """One linear layer on the patch and CLS tokens of L blocks, to K depth bins, at four times the patch resolution."""

    def __init__(self, embed_dim: int, num_blocks: int, max_depth: float) -> None:
        super().__init__()
        self.max_depth = max_depth
        self.depth_bins = nn.Conv2d(2 * embed_dim * num_blocks, NUM_BINS, kernel_size=1)

    def forward(self, tokens: Tokens) -> Tensor:
        """Metres (B, 4h, 4w)."""
        joined = [part for patches, cls in tokens for part in (patches, cls[:, :, None, None].expand_as(patches))]
        # The linear layer and bilinear interpolation commute. Before upsampling the layer costs a sixteenth.
        logits = self.depth_bins(torch.cat(joined, dim=1))
        fine = functional.interpolate(logits, scale_factor=UPSAMPLING, mode="bilinear")
        return depth_of_bins(fine, self.max_depth)


class Residual(nn.Module):
    """Two 3 x 3 convolutions, each after a ReLU, added to the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (_convolution(DPT_CHANNELS, DPT_CHANNELS, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.relu(self.conv1(functional.relu(x))))


class Fusion(nn.Module):
    """Adds the map of a finer block to that of the coarser ones, and doubles the resolution."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.incoming = None if first else Residual()
        self.together = Residual()
        self.project = nn.Conv2d(DPT_CHANNELS, DPT_CHANNELS, kernel_size=1)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            assert self.incoming is not None
            if finer.shape != x.shape:
                finer = functional.interpolate(finer, size=x.shape[-2:], mode="bilinear")
            x = x + self.incoming(finer)
        x = functional.interpolate(self.together(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.project(x)


class DptHead(nn.Module):
    """Dense Prediction Transformer: four blocks as maps of four resolutions, fused from the coarsest to the finest.

    As in DINOv2: CLS tokens joined to the patches by a linear layer, 256 channels, no batch norm, one depth without
    bins.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        widths = [embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim]
        self.readouts = nn.ModuleList(nn.Linear(2 * embed_dim, embed_dim) for _ in widths)
        self.projects = nn.ModuleList(nn.Conv2d(embed_dim, width, kernel_size=1) for width in widths)
        self.resizes = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        self.convs = nn.ModuleList(_convolution(width, DPT_CHANNELS, bias=False) for width in widths)
        self.fusions = nn.ModuleList(Fusion(first=index == 0) for index in range(4))
        self.project = _convolution(DPT_CHANNELS, DPT_CHANNELS)
        self.depth = nn.ModuleList(
            [_convolution(DPT_CHANNELS, DPT_CHANNELS // 2), _convolution(DPT_CHANNELS // 2, 32), nn.Conv2d(32, 1, 1)]
        )

    def forward(self, tokens: Tokens) -> Tensor:
        """Metres (B, 32h', 32w'); h' and w' are half the sides of the patch grid, rounded up."""
        maps = []
        for level, (patches, cls) in enumerate(tokens):
            flat = patches.flatten(2).transpose(1, 2)
            both = torch.cat([flat, cls[:, None].expand_as(flat)], dim=2)
            read = functional.gelu(self.readouts[level](both)).transpose(1, 2).reshape(patches.shape)
            maps.append(self.convs[level](self.resizes[level](self.projects[level](read))))
        fused = self.fusions[0](maps[3])
        for fusion, finer in zip(list(self.fusions)[1:], reversed(maps[:3]), strict=True):
            fused = fusion(fused, finer)
        first, second, last = self.depth
        wide = functional.interpolate(
            first(functional.relu(self.project(fused))), scale_factor=2, mode="bilinear", align_corners=True
        )
        return functional.relu(last(functional.relu(second(wide))))[:, 0] + MIN_DEPTH


def _convolution(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=bias)


def make_head(name: HeadName, embed_dim: int, max_depth: float, seed: int) -> LinearDepthHead | DptHead:
    """The head with fresh weights from PyTorch's default distributions: a pure function of the arguments."""
    head: LinearDepthHead | DptHead
    with torch.device("meta"):  # allocates nothing and draws from no global generator
        match name:
            case "dpt":
                head = DptHead(embed_dim)
            case _:
                head = LinearDepthHead(embed_dim, 1 if name == "linear_1" else 4, max_depth)
    head.to_empty(device="cpu")
    random = torch.Generator().manual_seed(seed)
    for module in head.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=random)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound, generator=random)
    if isinstance(head, DptHead):
        last = head.depth[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        # A head that starts below 0 everywhere gets no gradient through its last ReLU. Assumed: one metre suffices.
        nn.init.ones_(last.bias)
    return head


def blocks_of(head: HeadName, num_blocks: int) -> tuple[int, ...]:
    """The blocks that a head reads, counted from 0. Cited: DINOv2, hub/depthers.py; for 24 blocks it is irregular."""
    if head == "linear_1":
        return (num_blocks - 1,)
    if num_blocks < 4:
        raise InputError(
            f"Head '{head}' reads four blocks, and the backbone has {num_blocks}. Set heads to 'linear_1'."
        )
    return (4, 11, 17, 23) if num_blocks == 24 else tuple(num_blocks * part // 4 - 1 for part in (1, 2, 3, 4))


# ---- training and prediction


def predict(
    model: FrozenModel,
    head: nn.Module,
    pixels: Tensor,
    blocks: Sequence[int],
    *,
    final_norm: bool,
    all_rows: int | None = None,
) -> Tensor:
    """Metres (B, H, W) float32 on the model's device for images (B, 3, H, W) uint8 of any size.

    all_rows: the number of images of all ranks, where `pixels` is this rank's share. The metres are of all images.
    """
    assert model.patch_size is not None
    height, width = pixels.shape[-2:]
    padded, top, left = pad_to_patches(pixels, model.patch_size)
    tokens = _tokens(model, padded, blocks, final_norm=final_norm)
    if all_rows is not None:
        gathered = [[gather_rows(model.world, part, all_rows) for part in block] for block in tokens]
        tokens = tuple((patches, cls) for patches, cls in gathered)
    depths = head(tokens)
    whole = functional.interpolate(depths[:, None], size=padded.shape[-2:], mode="bilinear")[:, 0]
    return whole[:, top : top + height, left : left + width]


@torch.no_grad()
def predict_for_score(
    model: FrozenModel,
    head: nn.Module,
    pixels: Tensor,
    blocks: Sequence[int],
    *,
    final_norm: bool,
    flip: bool,
    cap: float,
) -> Tensor:
    """As `predict`, on the CPU, clipped to scored depths; with `flip`, averaged with the mirror image's prediction."""
    depths = predict(model, head, pixels, blocks, final_norm=final_norm).clamp(MIN_DEPTH, cap)
    if flip:
        mirrored = predict(model, head, pixels.flip(-1), blocks, final_norm=final_norm).clamp(MIN_DEPTH, cap)
        depths = (depths + mirrored.flip(-1)) / 2
    return depths.cpu()


def train_head(
    model: FrozenModel,
    name: HeadName,
    config: DepthConfig,
    samples: Sequence[DepthSample],
    *,
    augmented: bool = True,
    loss_warmup_steps: int = LOSS_WARMUP_STEPS,
) -> LinearDepthHead | DptHead:
    """A head trained on `samples`: always the same on a CPU; on a GPU, up to rounding.

    loss_warmup_steps: first steps, whose loss is the mean error alone. Raises InputError, and TrainingError where the
    loss is not finite.
    """
    assert model.num_blocks is not None
    blocks = blocks_of(name, model.num_blocks)
    head = make_head(name, model.embed_dim, config.cap, config.seed).to(model.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=WEIGHT_DECAY)
    # Cited: OneCycle. Its other defaults are PyTorch's: from 1/25 of the maximum, down to 1/250,000 of it.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.learning_rate,
        total_steps=config.steps,
        pct_start=config.warmup_steps / config.steps,
        cycle_momentum=False,
    )
    for step, (pixels, truth) in enumerate(training_batches(samples, config, model.world, augmented=augmented)):
        depths = predict(model, head, pixels, blocks, final_norm=config.final_norm, all_rows=config.batch_size)
        loss = sig_loss(depths, truth.to(model.device), max_depth=config.cap, mean_alone=step < loss_warmup_steps)
        if not loss.isfinite():
            raise TrainingError(f"The loss of the depth head '{name}' is {loss.item()} at step {step}.")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        nn.utils.clip_grad_norm_(head.parameters(), GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
    return head.eval()


def training_batches(
    samples: Sequence[DepthSample], config: DepthConfig, world: World = ALONE, *, augmented: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the crops (., 3, H, W) uint8 of each step, and the depths (B, H, W) of all ranks.

    A pure function of the seed and the step. Threads read in advance.
    """
    size = config.crop_size or ((352, 704) if config.train.layout == "kitti" else (416, 544))
    num_crops = len(order.share_of_batch(config.batch_size, world))

    def make(item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        position, row = item
        sample = samples[row]
        image, depth = read_sample(sample, config.train)
        if config.train.layout == "nyu":
            image, depth = image[:, *NYU_INSIDE], depth[NYU_INSIDE]
        if depth.shape[0] < size[0] or depth.shape[1] < size[1]:
            raise InputError(
                f"{sample.image} has {depth.shape[0]} x {depth.shape[1]} pixels, less than crop_size "
                f"{size[0]} x {size[1]}. Set a smaller crop_size."
            )
        random = np.random.default_rng([config.seed, 1, position])
        if augmented:
            brightness = 0.1 if config.train.layout == "kitti" else 0.25
            image, depth = augment(image, depth, random, brightness=brightness)
        return _random_crop(image, depth, size, random)

    items = order.share_of_steps(
        len(samples), config.seed, num_steps=config.steps, batch_size=config.batch_size, world=world
    )
    crops = prefetch(make, items, threads=READERS, ahead=2 * num_crops)
    while batch := list(islice(crops, num_crops)):
        depths = torch.stack([depth for _, depth in batch])
        yield torch.stack([image for image, _ in batch]), gather_rows(world, depths, config.batch_size)


def augment(image: Tensor, depth: Tensor, random: np.random.Generator, *, brightness: float) -> tuple[Tensor, Tensor]:
    """An image and its depth: rotated by up to 2.5 degrees, mirrored, and changed in colour, each with probability 1/2.

    Depth comes from the nearest pixel, and is unknown where the rotated image has none. brightness: maximum change of
    the factor. Cited: BinsFormer's toolbox; the changes of colour as in BTS, on values of 0..1.
    """
    rotated, mirrored, recolored = random.random(3) < 0.5
    angle = math.radians(random.uniform(-MAX_ROTATION, MAX_ROTATION))
    gamma, bright = random.uniform(0.9, 1.1), random.uniform(1 - brightness, 1 + brightness)
    colors = random.uniform(0.9, 1.1, 3)
    values = image.float()
    if rotated:
        rows, columns = depth.shape
        cosine, sine = math.cos(angle), math.sin(angle)
        rotation = torch.tensor([[[cosine, -sine * rows / columns, 0], [sine * columns / rows, cosine, 0]]])
        grid = functional.affine_grid(rotation, [1, 1, rows, columns], align_corners=False)
        values = functional.grid_sample(values[None], grid, mode="bilinear", align_corners=False)[0]
        depth = functional.grid_sample(depth[None, None], grid, mode="nearest", align_corners=False)[0, 0]
    if mirrored:
        values, depth = values.flip(-1), depth.flip(-1)
    if recolored:
        factors = torch.from_numpy(bright * colors).float()[:, None, None]
        values = 255 * ((values / 255) ** gamma * factors).clamp(max=1)
    return values.round().to(torch.uint8), depth


def _random_crop(
    image: Tensor, depth: Tensor, size: tuple[int, int], random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    top, left = (int(random.integers(side - part + 1)) for side, part in zip(depth.shape, size, strict=True))
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    return image[:, rows, columns], depth[rows, columns]


@torch.no_grad()
def _tokens(model: FrozenModel, pixels: Tensor, blocks: Sequence[int], *, final_norm: bool) -> Tokens:
    if final_norm:
        return model.intermediate(pixels, blocks)
    assert model.backbone is not None
    tokens = model.backbone.get_intermediate_layers(
        model.normalized(pixels), list(blocks), reshape=True, return_class_token=True, norm=False
    )
    return tuple((patches.float(), cls.float()) for patches, cls in tokens)


# ---- the evaluation


def run(config: DepthConfig, model: FrozenModel, output: str) -> list[Result]:
    """Train every head and score it on every test set; one result for each metric. Writes nothing to `output`."""
    if model.backbone is None or model.num_blocks is None or model.backbone.cls_token is None:
        raise InputError(
            f"{model.name} has no patch tokens with a CLS token. Depth needs a Vision Transformer with both."
        )
    train = find_samples(config.train, "train")
    tests = [find_samples(data, "test") for data in config.tests]
    _require_depths(config.train, train, config.cap, "training", model.world)
    for data, samples in zip(config.tests, tests, strict=True):
        _require_depths(data, samples, config.cap, "test", model.world)
    trained_on = hash_samples(train)
    all_results: list[Result] = []
    for name in config.heads:
        start = time.monotonic()
        head = train_head(model, name, config, train)
        training_seconds = time.monotonic() - start
        for data, samples in zip(config.tests, tests, strict=True):
            start = time.monotonic()
            values = score(model, head, blocks_of(name, model.num_blocks), config, data, samples)
            seconds = training_seconds + time.monotonic() - start
            data_hash = sha256_of_bytes((trained_on + hash_samples(samples)).encode())
            facts = {"head": name, "num_train": len(train), "num_test": len(samples)}
            all_results += results.make(
                "depth",
                data.name,
                model,
                [Score(_protocol(name, config, data), metric, value) for metric, value in values.items()],
                data_hash=data_hash,
                settings=facts | config.model_dump(mode="json"),
                seconds=seconds,
            )
    return all_results


def _require_depths(
    data: DepthDataConfig, samples: Sequence[DepthSample], cap: float, split: str, world: World
) -> None:
    """Raises InputError unless a pixel of the depths counts, and where an image or a depth is damaged.

    Decodes every file once, before hours of training: the training reads each some 26 times. Ranks share the files.
    """
    crop: Crop = LAYOUTS[data.layout].crop if split == "test" else "none"
    counted, least = 0, math.inf
    for _, truth in prefetch(lambda row: read_sample(samples[row], data), world.share(len(samples)), threads=READERS):
        counted += int(valid_mask(truth, max_depth=cap, crop=crop).sum())
        if (truth > 0).any():
            least = min(least, float(truth[truth > 0].min()))
    if not sum_over_ranks(torch.tensor(counted, device=world.device)).item():
        depths = "all are 0, which means unknown" if math.isinf(least) else f"the least is {least:.4g} m"
        raise InputError(
            f"{data.name}: no pixel of the {len(samples):,} {split} depths is between {MIN_DEPTH:g} and {cap:g} m: "
            f"{depths}. Check units_per_metre (.npy are in metres) and max_depth."
        )


def _protocol(head: HeadName, config: DepthConfig, data: DepthDataConfig) -> str:
    parts = [head.replace("_", " "), f"{config.steps:,} steps of {config.batch_size}"]
    if config.final_norm:
        parts.append("last norm")
    if data.name != config.train.name:
        parts.append(f"trained on {config.train.name}")
    return ", ".join(parts)


def score(
    model: FrozenModel,
    head: nn.Module,
    blocks: Sequence[int],
    config: DepthConfig,
    data: DepthDataConfig,
    samples: Sequence[DepthSample],
) -> dict[str, float]:
    """The metrics of `head` on a test set, averaged over its images. Ranks share the images."""
    cap = min(config.cap, LAYOUTS[data.layout].max_depth) if data.layout == "sun_rgbd" else config.cap
    share = model.world.share(len(samples))
    rows = [torch.empty(0, len(METRICS), dtype=torch.float64)]
    for image, truth in prefetch(lambda row: read_sample(samples[row], data), share, threads=READERS):
        (depths,) = predict_for_score(
            model, head, image[None], blocks, final_norm=config.final_norm, flip=True, cap=cap
        )
        measured = measure(depths, truth, valid_mask(truth, max_depth=config.cap, crop=LAYOUTS[data.layout].crop))
        rows.append(torch.tensor([[measured[metric] for metric in METRICS]], dtype=torch.float64))
    all_rows = gather_rows(model.world, torch.cat(rows), len(samples)).tolist()
    return mean_over_images([dict(zip(METRICS, row, strict=True)) for row in all_rows])


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("depth"))
