"""The copy-detection network SSCD: a ResNet-50 with descriptors of 512 numbers, close for copies of one image.

The modules carry the key names of the released `sscd_disc_mixup.torchvision.pt` (a plain state_dict), so it loads
strictly. The other two released forms do not load: `.torchscript.pt` holds code, which `weights_only=True` refuses, and
`.classy.pt` names its layers differently.

Shapes:
    B  images    H, W  pixels

Source: Pizzi et al., A Self-Supervised Descriptor for Image Copy Detection (arXiv 2202.10261); He et al. (1512.03385),
with the stride on the 3x3 convolution, as torchvision has it.
"""

# Calling a torch module is typed Any.
# mypy: disable-error-code="no-any-return"

from torch import Tensor, nn
from torch.nn import functional

from curation import weights
from curation.models.pooling import generalized_mean

DIMENSIONS = 512
STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))  # blocks, width, stride of the first
EXPANSION = 4  # a block's outputs over its width


class Sscd(nn.Module):
    """SSCD without its last L2 normalisation: normalised images (B, 3, H, W) to descriptors (B, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNet50(DIMENSIONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class ResNet50(nn.Module):
    """A ResNet-50 with GeM pooling, (B, 3, H, W) to (B, dimensions)."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, (blocks, width, stride) in enumerate(STAGES, start=1):
            stage = nn.Sequential()
            for index in range(blocks):
                stage.append(Bottleneck(inputs, width, 1 if index else stride))
                inputs = width * EXPANSION
            self.add_module(f"layer{number}", stage)
        self.fc = nn.Linear(inputs, dimensions)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for number in range(1, len(STAGES) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(generalized_mean(x))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, added to the input; a 1x1 convolution adapts the input where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * EXPANSION
        self.conv1 = nn.Conv2d(inputs, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


def load(path: str, *, sha256: str | None) -> Sscd:
    """SSCD with the weights at `path`, on the CPU. Raises WeightsError."""
    return weights.load_module(Sscd, path, sha256=sha256)
