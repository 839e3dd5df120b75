"""Writes a small commented config for images of your own.

    seedbed init seedbed.toml

The config holds the sources and, commented out, the settings that a user is likely to change. The profile fills in all
others; the file `run.toml` of a run shows every value.
"""

from typing import Annotated

import typer

from curation.engine import command
from curation.errors import InputError, OutputMismatchError
from curation.files import paths

DEFAULT_NAME = "seedbed.toml"
# Comments begin with a capital letter, and settings that are commented out do not.
CONFIG = """\
profile = "photos"         # fills in every setting that this file leaves out

# Paths: folders of images, searched with their subfolders. Relative ones begin
# at the folder of this file; URLs such as s3://bucket/images work too. Set:

[[ingest.sources]]
name = "seeds"
role = "seed"              # images you trust: the corpus will resemble them
path = "images/seeds"

[[ingest.sources]]
name = "pool"
role = "pool"              # the many images from which Seedbed selects
path = "images/pool"
# layout = "webdataset"    # tars; or "parquet", or "folder" (the default)

# Images of an evaluation. They and their copies stay out of the corpus:
# [[ingest.sources]]
# name = "test"
# role = "holdout"
# path = "images/test"

# Everything below may stay as it is. Remove the # to change a setting.

# The images to retrieve. One table for each source with role "seed":
# [[retrieve.datasets]]
# name = "seeds"
# as_is = true             # the seed images themselves are packed too
# retrieval = "sample"     # for each seed; "cluster": from clusters with seeds
# k = 4                    # pool images for each seed image

# The model of the content:
# [embed.embedder]
# device = "cuda"          # needs an NVIDIA GPU; the default is "cpu"
# precision = "bfloat16"   # `seedbed doctor` says whether it is faster here
# batch_size = 64          # images; for a GPU. A CPU is fastest with 4
# name = "vit_small_patch14"
# weights = "dinov2_vits14_pretrain.pth"

# The model of the copies:
# [describe.embedder]
# device = "cuda"

# Which images are copies. Similarities are between 0 and 1:
# [dedup]
# threshold = 0.5          # lower finds more copies, and merges more by mistake
# holdout_threshold = 0.45 # lower removes more images that resemble the holdout
# label_guard = false      # drops copies across subfolders, which are labels
# lookalikes = "exact"     # for images that all look alike, such as solar cells

# Left out, the number of clusters follows from the size of the pool:
# [[cluster.levels]]
# num_clusters = 1000      # about the square root of the number of pool images

# Which files are accepted:
# [ingest]
# max_reject_fraction = 0.05  # share of files that may be broken or too large
# [ingest.limits]
# min_side = 16            # pixels of the shorter side
# max_pixels = 50_000_000  # width x height

# The corpus:
# [pack]
# images_per_shard = 1000  # images in a tar
"""


def command_line(
    file: Annotated[
        str, typer.Argument(metavar="FILE", show_default=False, help=f"The file to write. Default: {DEFAULT_NAME}.")
    ] = DEFAULT_NAME,
) -> None:
    """Write a small commented config for images of your own.

    It holds two sources and, commented out, the settings that you are likely to change, with their units. An existing
    file is not overwritten.

    \b
    Examples:
      seedbed init
      seedbed init configs/birds.toml
    """
    if paths.exists(file):
        raise OutputMismatchError(f"'{file}' exists. Nothing is overwritten: give another name, or remove it first.")
    try:
        paths.write_bytes(file, CONFIG.encode())
    except OSError as error:
        raise InputError(
            f"'{file}' cannot be written: {error.strerror or error}. Give a file in a folder that you may write to."
        ) from None
    print(
        f"Wrote {file}. Set its paths to your folders of images; then:\n"
        f"  seedbed curate --config {file} --output runs/mine --plan   # the price\n"
        f"  seedbed curate --config {file} --output runs/mine"
    )


if __name__ == "__main__":
    from pipelines import init  # by its real name, or its classes would exist twice

    command.main(init.command_line)
