"""The Arrow schemas: every column name and type that crosses a file, written once.

`image_id` is text: the first 128 bits of the SHA-256 of the file's bytes as 32 hex digits. It never is a row number.
"""

import pyarrow as pa

ROLES = ("seed", "pool", "holdout")

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),  # name of the dataset
        ("role", pa.string()),  # one of ROLES
        ("uri", pa.string()),  # the file that holds the bytes; for Parquet, with '#<column>' behind it
        ("offset", pa.int64()),  # bytes into the file; for Parquet, the row
        ("length", pa.int64()),  # bytes
        ("width", pa.int32()),  # pixels, as seen (after EXIF orientation)
        ("height", pa.int32()),
        ("format", pa.string()),
        ("phash", pa.uint64()),
        ("label", pa.string()),  # may be null
    ]
)

REJECTS = pa.schema([("uri", pa.string()), ("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

THUMBNAILS = pa.schema([("image_id", pa.string()), ("thumbnail", pa.binary())])

PAIRS = pa.schema(
    [
        ("image_id", pa.string()),  # the smaller of the two ids
        ("other_image_id", pa.string()),
        ("similarity", pa.float32()),
        ("differs_locally", pa.bool_()),  # whether they agree but for one place; false where nobody looked
        ("cosine", pa.float32()),  # of the two copy descriptors
        ("mutual", pa.bool_()),  # whether each descriptor is among the other's `num_neighbors` nearest
    ]
)

DUPLICATES = pa.schema(
    [
        ("image_id", pa.string()),
        ("component_id", pa.string()),  # the smallest image_id of the component
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # null when kept, else 'exact', 'near' or 'holdout'
        ("matched_image_id", pa.string()),  # the image for which this one was dropped; null when kept
        ("similarity", pa.float32()),
    ]
)

ASSIGNMENTS = pa.schema(
    [
        ("image_id", pa.string()),
        ("level", pa.int32()),  # 0 is the finest
        ("cluster_id", pa.int32()),
        ("similarity", pa.float32()),  # cosine to the centroid
    ]
)

RETRIEVED = pa.schema(
    [
        ("image_id", pa.string()),
        ("seed_source", pa.string()),  # the dataset that asked; null where none did (mode 'balanced')
        ("seed_image_id", pa.string()),  # null unless mode is 'sample'
        ("mode", pa.string()),  # 'sample', 'cluster', or 'balanced': drawn over all clusters, whatever the seeds
        ("rank", pa.int32()),  # 0 is the nearest to the seed, or the first drawn from the cluster
        ("similarity", pa.float32()),  # cosine to the seed image, or to the centroid
        ("cluster_id", pa.int32()),  # of level 0; null for samples
    ]
)

CORPUS = pa.schema(
    [
        ("key", pa.string()),  # name of the sample in its tar
        ("shard", pa.string()),  # name of the tar
        ("offset", pa.int64()),  # where the image lies in it, in bytes
        ("length", pa.int64()),
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("role", pa.string()),
        # Why it is here: 'as_is:<dataset>', 'sample:<dataset>:<seed image_id>:<rank>',
        # 'cluster:<dataset>:<cluster_id>', 'balanced:<cluster_id>'.
        ("reasons", pa.list_(pa.string())),
        ("weight", pa.float64()),
    ]
)

# What pack writes for its own workers: where each sample comes from, and why. `position` is its place in the corpus.
PLANNED_SAMPLES = pa.schema(
    [
        ("position", pa.int64()),
        ("key", pa.string()),
        ("weight", pa.float64()),
        *(IMAGES.field(name) for name in IMAGES.names if name not in ("phash", "role")),
        IMAGES.field("role"),
    ]
)
PLANNED_REASONS = pa.schema([("position", pa.int64()), ("reason", pa.string())])


def vectors(dimensions: int) -> pa.Schema:
    """The schema of a vectors file: `image_id` and a unit vector of `dimensions` float16 values."""
    return pa.schema([("image_id", pa.string()), ("vector", pa.list_(pa.float16(), dimensions))])
