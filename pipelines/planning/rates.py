"""What machines do in a second: the rates that a plan is priced by, each with where its number is from."""

from pydantic import Field

from curation.config import Settings


class RatesConfig(Settings):
    """For --plan: what machines do in a second. The description of each says where the number is from."""

    bytes_per_image: float = Field(default=100_000, gt=0, description="assumed")
    """Encoded, where the files are not at hand."""
    images_per_tar: int = Field(default=10_000, ge=1, description="assumed; img2dataset's default")
    """Of a source of tars or Parquet: each file is a shard."""
    kept_share: float = Field(
        default=0.57, gt=0, le=1, description="cited: 744 of 1,300 million (arXiv 2304.07193, A.3)"
    )
    """Of the pool, after deduplication."""
    decoded_per_core: float = Field(
        default=100, gt=0, description="measured on 2000 x 1500 pixels; 500 of 500 x 400 (docs/scaling.md)"
    )
    """Images a second."""
    hashed_per_core: float = Field(default=240e6, gt=0, description="measured, a core of 2019 without SHA instructions")
    """Bytes of SHA-256 a second. Packing hashes each byte twice: the image, and the tar."""
    gpu_tflops_half: float = Field(default=300, gt=0, description="assumed, sustained, of the H100's class")
    """Matrix products of vectors in 16 bits."""
    gpu_tflops_single: float = Field(default=40, gt=0, description="assumed, the same")
    """Choosing cells, in float32."""
    gpu_tflops_vit: float = Field(default=150, gt=0, description="assumed, the same, in 16 bits")
    gpu_tflops_convolutions: float = Field(default=50, gt=0, description="assumed, the same")
    core_tflops_vit: float = Field(default=0.088, gt=0, description="measured, ViT-S/14, 14.5/s on 2 cores")
    core_tflops_convolutions: float = Field(
        default=0.028, gt=0, description="measured, EfficientNet-Lite0, 70.7/s on 2 cores"
    )
    core_tops_int8: float = Field(default=0.49, gt=0, description="measured (search/low_precision.py), a core of 2019")
    """Exact search and choosing cells on a CPU."""
    core_tflops_kmeans: float = Field(
        default=0.096, gt=0, description="measured, 2.5e8 points x clusters / s of 384 values on 2 cores"
    )
    verified_per_core: float = Field(
        default=25, gt=0, description="measured, the demo: 3,801 images in 77 s on 2 cores"
    )
    """With [pairs.verification]: images a second whose candidates are compared."""
    edges_per_second: float = Field(default=3.5e6, gt=0, description="measured, one core (docs/benchmarks.md)")
    """Connected components."""
    edges_per_image: float = Field(default=4, ge=0, description="assumed")
    copies_in_exchange: float = Field(default=4, ge=1, description="assumed; at most num_probes")
    """Of a vector, among the groups of cells that it visits."""
    machine_gpus: int = Field(default=8, ge=0, description="assumed")
    """Of one machine; 0 is taken where the config asks for no GPU."""
    machine_cores: int = Field(default=128, ge=1, description="assumed")
    machine_bytes_per_second: float = Field(default=2e9, gt=0, description="assumed")
    """Network and storage, reads and writes together."""
    hours_wanted: float = Field(default=48, gt=0, description="cited: 'less than two days' (arXiv 2304.07193, 3)")
