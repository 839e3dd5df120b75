"""The device on which torch computes."""

import torch

from curation.errors import DeviceError


def require_device(name: str, setting: str = "device") -> torch.device:
    """The torch device with this name. Raises DeviceError for "cuda" without a GPU; there is no fallback to the CPU.

    setting: the name of the setting, for the message.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"{setting} is 'cuda', but torch {torch.__version__} sees no GPU here. Set it to 'cpu', or install a CUDA "
            "build of torch on a machine with a GPU."
        )
    return torch.device(name)
