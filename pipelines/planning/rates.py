"""The rates that `--plan` prices a run by, each with the source of its number.

`RatesConfig` holds the rates that a user measures or chooses: of the user's images, models and machines. `FIXED` holds
the others.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from curation.config import Settings


class RatesConfig(Settings):
    """Rates of the user's images, models and machines. Each description gives the source of the default."""

    bytes_per_image: float = Field(default=100_000, gt=0, description="assumed")
    """Bytes of an encoded image, where the files are not on this machine."""
    decoded_per_core: float = Field(
        default=100, gt=0, description="measured on 2000 x 1500 pixels; 500 of 500 x 400 (docs/scaling.md)"
    )
    """Images that a core decodes in a second."""
    gpu_tflops_half: float = Field(default=300, gt=0, description="assumed, sustained, of the H100's class")
    """Of a GPU: matrix products of vectors, in 16 bits."""
    gpu_tflops_vit: float = Field(default=150, gt=0, description="assumed, the same, in 16 bits")
    """Of a GPU: Vision Transformers."""
    gpu_tflops_convolutions: float = Field(default=50, gt=0, description="assumed, the same")
    """Of a GPU: convolutional networks."""
    core_tflops_vit: float = Field(default=0.088, gt=0, description="measured, ViT-S/14, 14.5/s on 2 cores")
    """Of a core: Vision Transformers."""
    core_tflops_convolutions: float = Field(
        default=0.028, gt=0, description="measured, EfficientNet-Lite0, 70.7/s on 2 cores"
    )
    """Of a core: convolutional networks."""
    machine_gpus: int = Field(default=8, ge=0, description="assumed")
    """GPUs of one machine; counts as 0 where the config asks for no GPU."""
    machine_cores: int = Field(default=128, ge=1, description="assumed")
    """Cores of one machine."""
    machine_bytes_per_second: float = Field(default=2e9, gt=0, description="assumed")
    """Network and storage of one machine, reads and writes together."""
    hours_wanted: float = Field(default=48, gt=0, description="cited: 'less than two days' (arXiv 2304.07193, 3)")
    """The number of machines is the smallest that finishes within these hours."""


def _rate(value: float, source: str) -> Any:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class FixedRates:
    """Rates that no config sets, with their sources."""

    images_per_tar: int = _rate(10_000, "assumed; img2dataset's default")
    """Images of a shard, where a source holds tars or Parquet files: each file is a shard."""
    kept_share: float = _rate(0.57, "cited: 744 of 1,300 million (arXiv 2304.07193, A.3)")
    """Share of the pool that is left after deduplication."""
    hashed_per_core: float = _rate(240e6, "measured, a core of 2019 without SHA instructions")
    """Bytes of SHA-256 a second. Packing hashes each byte twice: as part of its image, and of its tar."""
    gpu_tflops_single: float = _rate(40.0, "assumed, of the H100's class")
    """Of a GPU: choosing cells, in float32."""
    core_tops_int8: float = _rate(0.49, "measured (search/low_precision.py), a core of 2019")
    """Of a core: exact search and choosing cells, in 10^12 int8 operations a second."""
    core_tflops_kmeans: float = _rate(0.096, "measured, 2.5e8 points x clusters / s of 384 values on 2 cores")
    """Of a core: k-means."""
    verified_per_core: float = _rate(25.0, "measured, the demo: 3,801 images in 77 s on 2 cores")
    """Images a second whose candidate copies are verified; only with [pairs.verification]."""
    edges_per_second: float = _rate(3.5e6, "measured, one core (docs/benchmarks.md)")
    """Edges a second of connected components."""
    edges_per_image: float = _rate(4.0, "assumed")
    """Edges (pairs of possible copies) per image."""
    copies_in_exchange: float = _rate(4.0, "assumed; at most num_probes")
    """Groups of cells that a vector is copied to in the exchange of `pairs`."""


FIXED = FixedRates()
