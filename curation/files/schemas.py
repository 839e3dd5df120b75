"""The Arrow schemas of the stages' tables: every column name and type that crosses a file.

`image_id` is text: the first 128 bits of the SHA-256 of the file's bytes as 32 hex digits. It is never a row number.
"""

import pyarrow as pa

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),  # name of the dataset
        ("role", pa.string()),  # 'seed', 'pool' or 'holdout'
        ("uri", pa.string()),  # the file that holds the bytes; in layout 'parquet', followed by '#<column>'
        ("offset", pa.int64()),  # of the bytes in the file; in layout 'parquet', the row
        ("length", pa.int64()),  # bytes
        ("width", pa.int32()),  # pixels, after EXIF orientation
        ("height", pa.int32()),  # pixels, after EXIF orientation
        ("format", pa.string()),
        ("phash", pa.uint64()),
        ("content_pixels", pa.int64()),  # inside the plain borders; see images/detail.py
        ("detail_pixels", pa.int64()),  # of these, the number that the detail needs
        ("label", pa.string()),  # may be null
        ("layout", pa.string()),  # 'folder', 'webdataset' or 'parquet': how `uri` and `offset` are to be read
    ]
)

REJECTS = pa.schema([("uri", pa.string()), ("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

THUMBNAILS = pa.schema([("image_id", pa.string()), ("thumbnail", pa.binary())])

PAIRS = pa.schema(
    [
        ("image_id", pa.string()),  # the smaller of the two ids
        ("other_image_id", pa.string()),
        ("similarity", pa.float32()),
        ("differs_locally", pa.bool_()),  # whether they agree except in one rectangle; false without verification
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
        ("seed_source", pa.string()),  # the dataset whose seeds retrieved the image; null in mode 'balanced'
        ("seed_image_id", pa.string()),  # null unless one seed image retrieved this image
        ("mode", pa.string()),  # 'sample', 'cluster', or 'balanced': drawn from all clusters, independent of the seeds
        ("rank", pa.int32()),  # 0 is the nearest to the seed, or the first drawn from the cluster
        ("similarity", pa.float32()),  # cosine to the seed image, or to the centroid
        ("cluster_id", pa.int32()),  # of level 0; null for samples
    ]
)

# The images that the check of retrieve passed over: copies of an image that the corpus holds, or of a holdout image.
CORPUS_COPIES = pa.schema(
    [
        ("image_id", pa.string()),
        ("matched_image_id", pa.string()),
        ("similarity", pa.float32()),
    ]
)

CORPUS = pa.schema(
    [
        ("key", pa.string()),  # name of the sample in its tar
        ("shard", pa.string()),  # name of the tar
        ("offset", pa.int64()),  # of the image's bytes in the tar
        ("length", pa.int64()),  # bytes
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("role", pa.string()),
        # Why the image is in the corpus: 'as_is:<dataset>', 'sample:<dataset>:<seed image_id>:<rank>',
        # 'cluster:<dataset>:<cluster_id>', 'balanced:<cluster_id>'.
        ("reasons", pa.list_(pa.string())),
        ("weight", pa.float64()),
    ]
)

# The plan that pack writes for its workers: the origin of each sample, and its reasons. `position` is the sample's row
# in the corpus.
PLANNED_SAMPLES = pa.schema(
    [
        ("position", pa.int64()),
        ("key", pa.string()),
        ("weight", pa.float64()),
        *(
            IMAGES.field(name)
            for name in IMAGES.names
            if name not in ("phash", "content_pixels", "detail_pixels", "role")
        ),
        IMAGES.field("role"),
    ]
)
PLANNED_REASONS = pa.schema([("position", pa.int64()), ("reason", pa.string())])

# The candidates of edited copies of pool images (report/self_check.py). A copy also has a row with its original.
SELF_CHECK_SCORES = pa.schema(
    [
        ("image_id", pa.string()),  # the pool image that was edited; with `kind` it names the copy
        ("other_image_id", pa.string()),  # the image that the copy was compared with
        ("kind", pa.string()),  # a key of copies.edits.KINDS
        ("proposed", pa.bool_()),  # whether `pairs` would compare the two; else the row is of the original
        ("similarity", pa.float32()),
    ]
)
# The pairs of `pairs` with an edited image.
SELF_CHECK_KNOWN = pa.schema(
    [
        ("image_id", pa.string()),  # the edited image
        ("other_image_id", pa.string()),
        ("similarity", pa.float32()),
    ]
)
# The copies that it plans for its workers, in order: the columns of the edited image, and the kind.
PLANNED_COPIES = pa.schema(
    [*(IMAGES.field(name) for name in ("image_id", "uri", "offset", "length", "layout")), ("kind", pa.string())]
)

# One row for each unique image of a run; report/images_table.py gives the meaning of each column.
IMAGES_TABLE = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),  # these four are of the row that ingest lists first
        ("role", pa.string()),
        ("uri", pa.string()),
        ("label", pa.string()),
        ("sources", pa.list_(pa.string())),  # of all rows, each once
        ("num_rows", pa.int32()),  # of ingest
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # 'near' or 'holdout' when dropped; when kept null, or 'corpus_copy'
        ("matched_image_id", pa.string()),
        ("component_id", pa.string()),
        ("cluster_id", pa.int32()),  # of level 0; null unless it is a kept pool image
        ("corpus_key", pa.string()),  # null unless it is in the corpus
        ("reasons", pa.list_(pa.string())),  # those of CORPUS; empty unless it is in the corpus
        ("weight", pa.float64()),  # null unless it is in the corpus
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("thumbnail_file", pa.string()),  # relative to the folder of the run; null without thumbnails
        ("thumbnail_row", pa.int32()),
    ]
)

# The plan of that table. `position` is a row among all rows of ingest: the first row of the image.
REPEATED_ROWS = pa.schema([("position", pa.int64())])  # a row of an image that has an earlier row
COPY_ROWS = pa.schema(  # such a row, at the position of the first row of its image
    [
        ("position", pa.int64()),
        ("row", pa.int64()),
        IMAGES.field("source"),
        IMAGES.field("role"),
        DUPLICATES.field("kept"),
        DUPLICATES.field("reason"),
        DUPLICATES.field("matched_image_id"),
    ]
)
PACKED_ROWS = pa.schema([("position", pa.int64()), *(CORPUS.field(name) for name in ("key", "weight", "reasons"))])


def vectors(dimensions: int) -> pa.Schema:
    """The schema of a vectors file: `image_id` and a unit vector of `dimensions` float16 values."""
    return pa.schema([("image_id", pa.string()), ("vector", pa.list_(pa.float16(), dimensions))])
