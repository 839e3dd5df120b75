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
    """Images of 3 megapixels that a core decodes in a second. Where the size of the images is known, the plan scales
    the rate to it."""
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
    machine_gpus: int | None = Field(default=None, ge=0, description="measured, this machine, where left out")
    """GPUs of one machine, for the plan of a cluster; counts as 0 where the config asks for no GPU."""
    machine_cores: int | None = Field(default=None, ge=1, description="measured, this machine, where left out")
    """Cores of one machine, for the plan of a cluster."""
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
    features_per_core: float = _rate(135.0, "measured, thumbnails of 128 pixels: 7.4 ms")
    """Photographs whose features for the comparison a core computes in a second, once for all of their pairs."""
    photographs_verified_per_core: float = _rate(
        400.0, "measured: 2.5 ms where 6 to 23% of the pairs are copies; 1.5 a pair that fails early, 5 a copy"
    )
    """Candidate copies that a core verifies in a second, with known features; [pairs.verification], `photographs`."""
    drawings_verified_per_core: float = _rate(
        250.0, "measured, the demo on a core of 2019; 134 to 560 on other pictures"
    )
    """Candidate copies that a core verifies in a second, with their preparation; [pairs.verification], `drawings`."""
    prepared_bytes: float = _rate(0.35e6, "measured: photographs 0.33 MB, drawings 0.19 MB, at 128 pixels")
    """Memory of a thumbnail that a worker keeps prepared for comparisons."""
    edited_per_core: float = _rate(80.0, "measured, photographs of 200 to 640 pixels, all kinds")
    """Copies a second that a core edits and writes for the self-check."""
    candidates_of_root: float = _rate(
        0.2, "measured: 9.0 an image of 1,913 photographs, many of them copies; 11.8 of 3,346 pictures with `gem`"
    )
    """Candidates an image, divided by the square root of the number of images, as long as lists are not full."""
    candidates_of_root_of_drawings: float = _rate(0.09, "measured: 5.2 an image of 3,596 (copy head, floor 0.32)")
    """The same for drawings with the copy head, whose floor is higher."""
    candidates_of_full_list: float = _rate(
        0.77, "measured: 49 an image with lists of 64, 11.6 with lists of 16, most of them full"
    )
    """Candidates an image, divided by `num_neighbors`, where all lists are full: two images that are in one another's
    lists are one candidate."""
    decode_start: float = _rate(0.18, "measured: 500 images/s of 0.2 megapixels, 117 of 3 megapixels")
    """Part of the time of decoding an image of 3 megapixels that does not depend on the pixels."""
    process_bytes: float = _rate(0.45e9, "measured, the demo: resident memory of a worker with torch")
    """Memory of a process without its work."""
    ray_seconds: float = _rate(6.0, "measured, the demo: 5 s, and 1 s for the report")
    """Of a whole run: Ray starts, and the report is written. The log of a run does not have them."""
    start_seconds: float = _rate(12.0, "measured, the demo: Ray 5 s, models and processes of all stages, the report")
    """Of a whole run, whatever the number of images."""
    header_seconds: float = _rate(6e-5, "measured, a local tar")
    """Of a core: a member of a tar that is passed by without reading it."""
    images_table_per_core: float = _rate(24_000, "measured, 300,000 rows of 384 values, one core")
    """Images a second of the table of images."""
    images_table_driver_seconds: float = _rate(2e-6, "measured, the same")
    """Seconds of the driver for an image of that table."""
    looked_at_per_row: float = _rate(
        1.2, "assumed, with a margin; measured on the demo: 1.02 (403 images compared for 396 rows, holdout apart)"
    )
    """Images that the check of the corpus compares, for each row of it (retrieve.check_copies)."""
    checked_are_nearer: float = _rate(
        3.0, "measured: 753 pairs of 400 images of 3,596 (the demo), 228 of 177 of 1,913 photographs: 3.1 and 1.6"
    )
    """Pairs among the images that the check compares, in relation to as many images of the run at random."""
    edges_per_second: float = _rate(3.5e6, "measured, one core (docs/benchmarks.md)")
    """Edges a second of connected components."""
    edges_per_image: float = _rate(4.0, "assumed")
    """Edges (pairs of possible copies) per image."""
    copies_in_exchange: float = _rate(4.0, "assumed; at most num_probes")
    """Groups of cells that a vector is copied to in the exchange of `pairs`."""


FIXED = FixedRates()
