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
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from curation import backbone, weights
from curation.backbone import VisionTransformer
from curation.config import IsPath, Settings, plan_values
from curation.engine.device import require_device
from curation.engine.manifest import Manifest, ShardRecord, require_manifest
from curation.engine.rank_runner import RankRunner, follow
from curation.engine.ranks import ALONE, World
from curation.engine.runner import InlineRunner, Runner, Shard, Worker
from curation.engine.stage import Stage, run_stage
from curation.errors import InputError, WeightsError
from curation.files import npy, paths
from curation.files.hashes import hash_json, sha256_of_file
from curation.models import embedders, vit
from curation.models.embedders import EmbedderConfig, ModelName
from evaluation.data.splits import Split
from evaluation.data.views import PicturesConfig, read_squares

# Side in pixels of the images that "pixels" reads. Assumed: CIFAR's size, at which people still recognise photographs.
PIXELS_SIDE = 32
# Images of one file of features, computed by one worker or rank: 4 MB at F 1,024. Assumed.
SHARD_IMAGES = 1024


class FrozenModelConfig(Settings):
    """Which frozen model. Every field but `label` and `device` changes its features."""

    name: ModelName | Literal["pixels"] | None = None
    """An embedder of the curation, or "pixels": the image itself, scaled to 32 x 32. Left out, the checkpoint says
    which Vision Transformer it is. A given name must agree with the checkpoint."""
    weights: Annotated[str | None, IsPath] = None
    """Local path of a checkpoint in a layout of `curation.weights`: a file, or a folder of transformers. Left out,
    efficientnet_lite0 takes the weights of its Python package."""
    label: str | None = None
    """Name of the model in results. Left out, its name and the name of the checkpoint."""
    untrained_seed: int | None = None
    """Vision Transformers: take only the checkpoint's architecture, with fresh weights drawn from this seed."""
    untrained_layer_scale: float = Field(default=1e-5, gt=0)
    """With untrained_seed: initial value of LayerScale, where the checkpoint has it. Cited: DINOv2."""
    pooling: vit.Pooling | None = None
    """Vision Transformers: which tokens represent the whole image. Left out, the CLS token, or the mean of the patch
    tokens where there is none."""
    position_interpolation: backbone.PositionInterpolation | None = None
    """Vision Transformers: how the positional embedding is resized. Left out, as the checkpoint states; exports do.
    A checkpoint that does not is resized as its authors do: "antialias" with registers, "plain" for MAE and I-JEPA,
    else "offset"."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs. "cuda" on a machine without a GPU is an error."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the model's weights and activations. Features are always float32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        embedder = embedders.MODELS.get(self.name or "")
        is_vit = self.name is None or (embedder is not None and embedder.vit is not None)
        if self.name == "pixels" and self.weights is not None:
            problems.append("pixels have no weights")
        packaged = embedder is not None and embedder.packaged_weights is not None
        if self.weights is None and self.name != "pixels" and not packaged:
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
    embedder_model = embedders.MODELS.get(config.name or "")
    if config.name is None or (embedder_model is not None and embedder_model.vit is not None):
        return _load_vit(config, device, dtype, world)
    if embedder_model is None:
        name, path, facts = "pixels", None, [f"pixels {PIXELS_SIDE}"]
        read: Callable[[Tensor], Tensor] = _pixels
        num_features = 3 * PIXELS_SIDE**2
        mean, deviation = embedders.normalization_tensors(embedders.IMAGENET_NORMALIZATION, device)
    else:
        name, path = config.name, embedder_model.weights_path(config.weights)
        embedder = embedders.load_embedder(
            EmbedderConfig(
                name=config.name,
                weights=path,
                pooling=next(iter(embedder_model.dimensions)),
                device=config.device,
                precision=config.precision,
            )
        )
        read, num_features, mean, deviation = embedder.network, embedder.dimensions, embedder.mean, embedder.deviation
        facts = [name, sha256_of_file(path), config.precision]
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
    variant = None if config.name is None else embedders.MODELS[config.name].vit
    if variant is not None and (variant.size, variant.patch_size) != (size, architecture.patch_size):
        raise WeightsError(f"{config.weights} holds a {name}; the config says {config.name}. Leave the name out.")
    pooling = config.pooling or ("cls" if architecture.has_cls_token else "patch_mean")
    if pooling != "patch_mean" and not architecture.has_cls_token:
        raise WeightsError(f"{config.weights} has no CLS token. Set model.pooling = 'patch_mean'.")
    interpolation = (
        config.position_interpolation
        or checkpoint.position_interpolation
        or vit.interpolation(_family(variant, checkpoint.layout, architecture), architecture.num_register_tokens)
    )
    fresh = config.untrained_seed is not None
    network = weights.build_like(
        architecture,
        size,
        layer_scale=config.untrained_layer_scale,
        position_interpolation=interpolation,
        seed=config.untrained_seed,
    )
    if not fresh:
        weights.fill(network, checkpoint)
    network.eval().requires_grad_(False)
    model_hash = _hash(network.state_dict(), [name, interpolation, pooling, config.precision])
    network.to(device, dtype, memory_format=torch.channels_last)
    mean, deviation = embedders.normalization_tensors(embedders.IMAGENET_NORMALIZATION, device)
    path = Path(config.weights)
    label = f"{name} untrained" if fresh else f"{name} {path.parent.name}/{path.name}"
    return FrozenModel(
        name=config.label or label,
        hash=model_hash,
        embed_dim=architecture.embed_dim,
        num_features=vit.num_features(architecture.embed_dim, pooling),
        patch_size=architecture.patch_size,
        num_blocks=architecture.depth,
        device=device,
        dtype=dtype,
        mean=mean,
        deviation=deviation,
        read=vit.PooledTransformer(network, pooling),
        backbone=network,
        config=config,
        world=world,
    )


def _family(variant: vit.Variant | None, layout: weights.Layout, architecture: weights.Architecture) -> vit.Family:
    """The family by the model's name, where it has one, and by the checkpoint."""
    if layout == "ijepa" or not architecture.has_cls_token:
        return "ijepa"
    return "mae" if layout == "mae" or (variant is not None and variant.family == "mae") else "vit"


def _pixels(images: Tensor) -> Tensor:
    return functional.interpolate(images.float(), size=(PIXELS_SIDE, PIXELS_SIDE), mode="area").flatten(1)


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
    share the images instead. The hash of every cached file is checked (a core with SHA instructions hashes 1.8 GB a
    second, measured 2026-11); damaged ones are said and computed again. Raises InputError for features that are not
    finite.
    """
    inputs = {"model": model.hash, "images": split.images_hash}
    plan = plan_values(config)
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
        stage = Stage(
            name="features", config=config, inputs=inputs, output=folder, shards=shards, make_worker=make_worker
        )
        # A cache has no command with --replace: every hash is checked, and damaged features are computed again.
        return run_stage(stage, chosen, replace=True)

    if model.world.num_ranks == 1:
        manifest = lead(runner)
    elif model.world.is_first:
        leading = RankRunner(model.world)
        manifest = lead(leading)
        leading.close()
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
        record = npy.write_arrays(paths.join(output, f"features-{shard.name}.npy"), features.numpy())
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
