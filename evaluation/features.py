"""Loads frozen models and computes their features, the input of every evaluation.

A model is a backbone that `curation.weights` reads, given by its path alone, or an embedder of the curation, given by
its name. Two baselines show what a score is worth: the same backbone with fresh weights, and plain pixels.

Features are computed once, by a stage over shards of images. Its folder is named by the hashes of the model, the images
and the view, and its manifest holds them. So features of another model are never taken for those of this one.

    <cache>/features/<hash>/
      features-00000.npy  ...     (n, F) float32, in the order of the split, read memory-mapped
      manifest.json

Shapes:
    B  images    H, W  pixels, multiples of the patch size    h, w  patches    D  embed_dim    F  num_features
"""

# Calling a torch module is typed Any, and torch's stubs leave `memory_format` out of `Module.to`.
# mypy: disable-error-code="no-any-return, call-overload"

import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from curation import backbone, weights
from curation.backbone import VisionTransformer
from curation.config import Settings
from curation.engine.manifest import Manifest, ShardRecord, require_manifest
from curation.engine.rank_runner import RankRunner, follow
from curation.engine.ranks import ALONE, World
from curation.engine.runner import InlineRunner, Runner, Shard, Worker
from curation.engine.stage import run_shards
from curation.errors import InputError, WeightsError
from curation.files import paths
from curation.files.hashes import hash_json
from curation.models import embedders
from curation.models.device import require_device
from curation.models.embedders import EmbedderConfig, ModelName, Normalization
from evaluation.data.splits import Split
from evaluation.data.views import PicturesConfig, read_squares

Pooling = Literal["cls", "patch_mean", "cls_patch_mean"]

# Side in pixels of the images that "pixels" reads. Assumed: CIFAR's size, at which people still recognise photographs.
PIXELS_SIDE = 32
# Images of one file of features, computed by one worker or rank: 4 MB at F 1,024. Assumed.
SHARD_IMAGES = 1024
# Fields that set how features are computed without changing them, apart from rounding.
NOT_IN_PLAN = frozenset({"batch_size", "decode_threads"})


class FrozenModelConfig(Settings):
    """Which frozen model. Every field but `label` and `device` changes its features."""

    name: ModelName | Literal["pixels"] | None = None
    """An embedder of the curation, or "pixels": the image itself, scaled to 32 x 32. Left out, the checkpoint says
    which Vision Transformer it is. A given name must agree with the checkpoint."""
    weights: str | None = None
    """Local path of a checkpoint in a layout of `curation.weights`: a file, or a folder of transformers. Left out,
    efficientnet_lite0 takes the weights of its Python package."""
    label: str | None = None
    """Name of the model in results. Left out, its name and the name of the checkpoint."""
    untrained_seed: int | None = None
    """Vision Transformers: take only the checkpoint's architecture, with fresh weights drawn from this seed."""
    untrained_layer_scale: float = Field(default=1e-5, gt=0)
    """With untrained_seed: initial value of LayerScale, where the checkpoint has it. Cited: DINOv2."""
    pooling: Pooling | None = None
    """Vision Transformers: which tokens represent the whole image. Left out, the CLS token, or the mean of the patch
    tokens where there is none."""
    position_interpolation: backbone.PositionInterpolation | None = None
    """Vision Transformers: how the positional embedding is resized. Left out, as its authors resize it: "antialias"
    with registers, "plain" for MAE and I-JEPA, else "offset"."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs. "cuda" on a machine without a GPU is an error."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the model's weights and activations. Features are always float32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        is_vit = self.name is None or embedders.split_name(self.name) is not None
        if self.name == "pixels" and self.weights is not None:
            problems.append("pixels have no weights")
        if self.weights is None and self.name not in ("pixels", "efficientnet_lite0"):
            problems.append(f"{self.name or 'a Vision Transformer'} needs weights: give the path of a checkpoint")
        if not is_vit:
            for key in ("untrained_seed", "pooling", "position_interpolation"):
                if (value := getattr(self, key)) is not None:
                    problems.append(f"{key} {value!r} is for Vision Transformers, and {self.name} is none")
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model on its device, made by `load_model`."""

    name: str
    """Name of the model in results."""
    hash: str
    """64 hex digits of the weights and of everything else that shapes the features. The device is not in it."""
    embed_dim: int
    """Width D of a token; for a model without tokens, num_features."""
    num_features: int
    """Length F of the features of an image."""
    patch_size: int | None
    """Pixels; None for a model without patch tokens."""
    num_blocks: int | None
    """None for a model without patch tokens."""
    device: torch.device
    dtype: torch.dtype = field(repr=False)
    mean: Tensor = field(repr=False)
    """(1, 3, 1, 1), of red, green and blue in units of 0..255."""
    deviation: Tensor = field(repr=False)
    """(1, 3, 1, 1), likewise."""
    read: Callable[[Tensor], Tensor] = field(repr=False)
    """Normalised images (B, 3, H, W) to features (B, F)."""
    backbone: VisionTransformer | None = field(repr=False)
    """The network that gives patch tokens; None for a model without them."""
    config: FrozenModelConfig = field(repr=False)
    """The config that it was loaded by."""
    world: World = field(repr=False)
    """The ranks that hold a copy of it. They share its input."""

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Features of any norm: (B, 3, H, W) uint8 to (B, F) float32 on the CPU.

        Raises InputError for features that are not finite.
        """
        return _finite(self.read(self._normalized(pixels)).float().cpu(), self.name)

    @torch.no_grad()
    def intermediate(self, pixels: Tensor, blocks: Sequence[int]) -> tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens (B, D, h, w) and CLS tokens (B, D) of each of `blocks`, counted from 0 and ascending.

        They have passed the last norm and are float32 on the model's device. Raises InputError for a model without a
        CLS token or without patch tokens.
        """
        if self.backbone is None:
            raise InputError(f"{self.name} has no patch tokens. This evaluation needs a Vision Transformer.")
        tokens = self.backbone.get_intermediate_layers(
            self._normalized(pixels), list(blocks), reshape=True, return_class_token=True
        )
        return tuple((_finite(patches.float(), self.name), cls.float()) for patches, cls in tokens)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 as the network reads them, on the model's device."""
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3, (pixels.dtype, pixels.shape)
        return ((pixels.to(self.device).float() - self.mean) / self.deviation).to(self.dtype)

    def _normalized(self, pixels: Tensor) -> Tensor:
        return self.normalized(pixels).to(memory_format=torch.channels_last)


def load_model(config: FrozenModelConfig, world: World = ALONE) -> FrozenModel:
    """The model of `config`, frozen, on its device; for each rank of `world`. Raises DeviceError and WeightsError."""
    device, dtype = require_device(config.device), getattr(torch, config.precision)
    if config.name is None or embedders.split_name(config.name):
        return _load_vit(config, device, dtype, world)
    if config.name == "pixels":
        name, path, facts = "pixels", None, [f"pixels {PIXELS_SIDE}"]
        read: Callable[[Tensor], Tensor] = _pixels
        num_features = 3 * PIXELS_SIDE**2
        mean, deviation = _normalization(embedders.IMAGENET_NORMALIZATION, device)
    else:
        assert config.name in ("efficientnet_lite0", "sscd_disc_mixup")
        name, path = config.name, config.weights or embedders.packaged_efficientnet_weights()
        embedder = embedders.load_embedder(
            EmbedderConfig(
                name=config.name,
                weights=path,
                pooling="average" if config.name == "efficientnet_lite0" else "gem",
                device=config.device,
                precision=config.precision,
            )
        )
        read, num_features, mean, deviation = embedder.network, embedder.dimensions, embedder.mean, embedder.deviation
        facts = [name, hashlib.sha256(Path(path).read_bytes()).hexdigest(), config.precision]
    return FrozenModel(
        name=config.label or name,
        hash=_hash({}, facts),
        embed_dim=num_features,
        num_features=num_features,
        patch_size=None,
        num_blocks=None,
        device=device,
        dtype=dtype,
        mean=mean,
        deviation=deviation,
        read=read,
        backbone=None,
        config=config,
        world=world,
    )


def _load_vit(config: FrozenModelConfig, device: torch.device, dtype: torch.dtype, world: World) -> FrozenModel:
    assert config.weights is not None
    checkpoint = weights.read(config.weights)
    architecture = weights.architecture(checkpoint.tensors, checkpoint.path)
    size = next((name for name, size in backbone.SIZES.items() if size.embed_dim == architecture.embed_dim), None)
    if size is None:
        known = ", ".join(f"{one.embed_dim} ({name})" for name, one in backbone.SIZES.items())
        raise WeightsError(f"{config.weights}: its tokens are {architecture.embed_dim} wide. Known widths: {known}.")
    name = f"{size}_patch{architecture.patch_size}"
    if config.name is not None and embedders.split_name(config.name) != (size, architecture.patch_size):
        raise WeightsError(f"{config.weights} holds a {name}; the config says {config.name}. Leave the name out.")
    pooling = config.pooling or ("cls" if architecture.has_cls_token else "patch_mean")
    if pooling != "patch_mean" and not architecture.has_cls_token:
        raise WeightsError(f"{config.weights} has no CLS token. Set model.pooling = 'patch_mean'.")
    interpolation = config.position_interpolation or _interpolation(config.name, checkpoint.layout, architecture)
    fresh = config.untrained_seed is not None
    network = backbone.build(
        size,
        patch_size=architecture.patch_size,
        image_size=architecture.grid_size * architecture.patch_size,
        num_register_tokens=architecture.num_register_tokens,
        cls_token=architecture.has_cls_token,
        in_channels=architecture.in_channels,
        feed_forward=architecture.feed_forward,
        layer_scale=config.untrained_layer_scale if architecture.has_layer_scale else None,
        position_interpolation=interpolation,
        depth=architecture.depth,
        seed=config.untrained_seed,
    )
    if not fresh:
        weights.fill(network, checkpoint)
    network.eval().requires_grad_(False)
    model_hash = _hash(network.state_dict(), [name, interpolation, pooling, config.precision])
    network.to(device, dtype, memory_format=torch.channels_last)
    mean, deviation = _normalization(embedders.IMAGENET_NORMALIZATION, device)
    path = Path(config.weights)
    label = f"{name} untrained" if fresh else f"{name} {path.parent.name}/{path.name}"
    return FrozenModel(
        name=config.label or label,
        hash=model_hash,
        embed_dim=architecture.embed_dim,
        num_features=architecture.embed_dim * (2 if pooling == "cls_patch_mean" else 1),
        patch_size=architecture.patch_size,
        num_blocks=architecture.depth,
        device=device,
        dtype=dtype,
        mean=mean,
        deviation=deviation,
        read=_pooled(network, pooling),
        backbone=network,
        config=config,
        world=world,
    )


def _interpolation(
    name: str | None, layout: weights.Layout, architecture: weights.Architecture
) -> backbone.PositionInterpolation:
    """The way of the weights' authors. The sources are in `curation.models.embedders`."""
    if layout in ("mae", "ijepa") or not architecture.has_cls_token or (name or "").startswith("mae"):
        return "plain"
    return "antialias" if architecture.num_register_tokens else "offset"


def _pooled(network: VisionTransformer, pooling: Pooling) -> Callable[[Tensor], Tensor]:
    def read(images: Tensor) -> Tensor:
        features = network.forward_features(images)
        if pooling == "cls":
            return features["x_norm_clstoken"]
        patch_mean = features["x_norm_patchtokens"].mean(dim=1)
        return patch_mean if pooling == "patch_mean" else torch.cat([features["x_norm_clstoken"], patch_mean], dim=1)

    return read


def _pixels(images: Tensor) -> Tensor:
    return functional.interpolate(images.float(), size=(PIXELS_SIDE, PIXELS_SIDE), mode="area").flatten(1)


def _normalization(values: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, deviation = (torch.tensor(of, device=device).view(1, 3, 1, 1) for of in values)
    return mean, deviation


def _finite(features: Tensor, name: str) -> Tensor:
    if not features.isfinite().all():
        raise InputError(
            f"{name} gave features that are not finite. Set model.precision to 'float32' or 'bfloat16', or check the "
            "weights."
        )
    return features


def require_finite_rows(rows: Tensor, name: str, first_row: int = 0) -> None:
    """Raise InputError where a row of the `name` features (., D) is not finite. Rows are counted from `first_row`."""
    wrong = torch.nonzero(~rows.isfinite().all(1))
    if len(wrong):
        row = first_row + int(wrong[0])
        raise InputError(f"The {name} features hold a value that is not finite, or too large, in row {row}.")


def unit_rows(features: Tensor, name: str, *, dtype: torch.dtype = torch.float32, first_row: int = 0) -> Tensor:
    """`features` (., D) as rows of unit length; zero rows stay zero. Raises as `require_finite_rows`."""
    units = functional.normalize(features.to(dtype), dim=1)
    require_finite_rows(units, name, first_row)
    return units


def _hash(state: Mapping[str, Tensor], facts: Sequence[str]) -> str:
    hashed = hashlib.sha256("\n".join(facts).encode())
    for name, value in sorted(state.items()):
        hashed.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


@dataclass(frozen=True, eq=False)
class FeatureFiles:
    """The features of a split, on disk, in its order. Methods raise InputError for a file that cannot be read."""

    files: tuple[str, ...]
    """Each holds (., F) float32."""

    def blocks(self) -> Iterator[Tensor]:
        """The features file by file, (., F), memory-mapped where they are local. Only the caller holds them."""
        return (torch.from_numpy(_read_part(file)) for file in self.files)

    def matrix(self) -> Tensor:
        """All features (n, F) in memory."""
        return torch.cat(list(self.blocks()))

    def take(self, rows: Tensor) -> Tensor:
        """The features of some rows, (m,) int64: (m, F) in memory."""
        taken, start = torch.empty(len(rows), 0), 0
        for block in self.blocks():
            if start == 0:
                taken = block.new_empty(len(rows), block.shape[1])
            in_block = (rows >= start) & (rows < start + len(block))
            taken[in_block] = block[rows[in_block] - start]
            start += len(block)
        return taken


def extract(
    model: FrozenModel, split: Split, config: PicturesConfig, cache: str, runner: Runner | None = None
) -> FeatureFiles:
    """The features of the images of `split`, read from the cache where it has them.

    `runner` may spread the images over workers, each of which loads the model. Several ranks, which all call this,
    share the images instead. Raises InputError for features that are not finite, and for a damaged cache.
    """
    inputs = {"model": model.hash, "images": split.images_hash}
    plan = config.model_dump(mode="json", exclude=set(NOT_IN_PLAN))
    folder = paths.join(cache, "features", hash_json([inputs, plan])[:32])
    runner = runner or InlineRunner()
    starts = range(0, len(split), SHARD_IMAGES)
    ranges = [range(start, min(start + SHARD_IMAGES, len(split))) for start in starts]
    shards = [Shard(f"{number:05d}", rows, len(rows)) for number, rows in enumerate(ranges)]
    load = functools.partial(_identity, model)
    if not isinstance(runner, InlineRunner):
        load = functools.partial(load_model, model.config)
    make_worker: Callable[[], Worker] = functools.partial(_make_worker, load, model.hash, split, config, folder)

    def lead(chosen: Runner) -> Manifest:
        return run_shards(
            "features",
            config=config,
            inputs=inputs,
            output=folder,
            runner=chosen,
            shards=shards,
            make_worker=make_worker,
            not_in_plan=NOT_IN_PLAN,
        )

    if model.world.num_ranks == 1:
        manifest = lead(runner)
    elif model.world.is_first:
        leading = RankRunner(model.world)
        manifest = lead(leading)
        leading.dismiss()
    else:
        follow(model.world, "features", make_worker, shards, folder)
        manifest = require_manifest(folder)
    features = FeatureFiles(tuple(paths.join(folder, name) for name in manifest.files("features")))
    shapes = [tuple(block.shape) for block in features.blocks()]
    if shapes != [(shard.num_items, model.num_features) for shard in shards]:
        raise InputError(f"{folder} is damaged: its files hold features of the shapes {shapes}. Delete it.")
    return features


def _make_worker(
    load: Callable[[], FrozenModel], model_hash: str, split: Split, config: PicturesConfig, output: str
) -> Callable[[Shard], ShardRecord]:
    model = load()
    if model.hash != model_hash:
        raise InputError(f"{model.config.weights} has changed since the evaluation began. Start the evaluation again.")

    def process(shard: Shard) -> ShardRecord:
        pixels = read_squares(split, shard.work, config, ahead=2 * config.batch_size)
        batches = []
        while batch := list(islice(pixels, config.batch_size)):
            batches.append(model.image_features(torch.stack(batch)))
        features = torch.cat(batches)
        buffer = io.BytesIO()
        np.save(buffer, features.numpy(), allow_pickle=False)
        record = paths.write_bytes(paths.join(output, f"features-{shard.name}.npy"), buffer.getvalue())
        return ShardRecord(name=shard.name, files=(record,), totals={"images": len(features)})

    return process


def _identity(model: FrozenModel) -> FrozenModel:
    return model


def _read_part(path: str) -> np.ndarray:
    try:
        if paths.is_local(path):
            features: np.ndarray = np.load(paths.filesystem(path)[1], mmap_mode="c", allow_pickle=False)
        else:
            features = np.load(io.BytesIO(paths.read_bytes(path)), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}). Delete its folder; the features are then computed again."
        ) from None
    return features
