"""The speed of the device that a row of gpu.py runs on: its rate of matrix products, and its peak by the data sheet."""

# torch's modules have untyped methods.
# mypy: disable-error-code="no-untyped-call"

import statistics
import time

import torch

from curation.engine.device import require_device

# TFLOP/s of dense products in bfloat16, by a part of the device's name. Cited: NVIDIA's data sheets (SXM).
PEAK_TERAFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def open_device(name: str) -> torch.device:
    """The device, checked. Raises DeviceError for "cuda" without a GPU."""
    return require_device(name)


def synchronize(device: str) -> None:
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_flops() -> float | None:
    """The peak of this GPU in operations a second, or None where PEAK_TERAFLOPS does not name it."""
    name = torch.cuda.get_device_name()
    return next((1e12 * peak for part, peak in PEAK_TERAFLOPS.items() if part in name), None)


def matmul_rate(device: str, dtype: torch.dtype, *, side: int, num_products: int = 10) -> float:
    """Operations a second of products of two square matrices of normal numbers.

    Zeros would draw less power and run faster. The first products are a warm-up.
    """
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(3 + num_products):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * side**3 / statistics.median(seconds[3:])


def measured_matmul_rate(device: str) -> float:
    """`matmul_rate` in the type that models have on the device: bfloat16 on a GPU, float32 on a CPU."""
    return (
        matmul_rate("cuda", torch.bfloat16, side=8192)
        if device == "cuda"
        else matmul_rate("cpu", torch.float32, side=256)
    )
