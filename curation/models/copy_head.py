"""The copy head: from pooled features of EfficientNet-Lite0 to a short descriptor that finds edited copies.

A linear map, trained so that edited copies of one picture are near and all other pictures are far apart. The file
`copy_head.safetensors` beside this one holds the weights of the pooling `copies`. These commands made it:

    make curate                                                  # data/demo, for the drawings
    python -m pipelines.bench.copy_head_pictures --demo data/demo --output runs/copy_head_pictures
    python -m training.copies --images runs/copy_head_pictures --output runs/copy_head

The pictures are photographs and textures that belong to the development draw of the benchmark of copies, and drawings
that the demo does not use. docs/training.md says how the head is trained, and docs/benchmarks.md what it finds.

Shapes:
    B  images    F  features: NUM_INPUTS    D  dimensions of the descriptor: NUM_OUTPUTS
"""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from curation import weights

NUM_INPUTS = 1600  # 1,280 of the head and 320 of the bottleneck
NUM_OUTPUTS = 256  # SSCD has 512. Measured on the development draw: docs/benchmarks.md
PATH = str(Path(__file__).with_name("copy_head.safetensors"))
# An input of the stage `describe`: descriptors of another head are refused. `training.copies` prints it.
SHA256 = "1e493a57cd56a945daebabd003308f3f716a3c0f8febaf4ddaff50f097075fea"


class CopyHead(nn.Module):
    """Features (B, F) to descriptors (B, D) of any length, float32."""

    mean: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_INPUTS))
        self.register_buffer("weight", torch.zeros(NUM_OUTPUTS, NUM_INPUTS))

    def forward(self, features: Tensor) -> Tensor:
        # The type of the weights may be a half type. The features are float32 in any case.
        return functional.linear(features - self.mean.float(), self.weight.float())


def load(path: str = PATH, *, sha256: str | None = SHA256) -> CopyHead:
    """The head with the weights at `path`. Raises WeightsError."""
    return weights.load_module(CopyHead, path, sha256=sha256)


def decoded(data: bytes) -> CopyHead:
    """The head of a file's bytes."""
    head = CopyHead()
    head.load_state_dict(safetensors.torch.load(data))
    return head
