"""Measures which planted copies each copy detector finds, and how many other pairs it joins, on a run of the demo.

A planted copy counts as found when its pair with the original passes the detector's threshold. For the run's decision
it counts when both are in one component. Other pairs are of images outside the planted set; the pool holds true copies
among them.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from curation.engine.manifest import require_manifest
from curation.files import parquet, paths, schemas
from curation.images.hashing import hamming_distance
from curation.run_folder import read_images, read_vectors
from pipelines.bench.tables import make_table

NAME = "copies"
TRANSFORMS = ("jpeg", "resize", "colour", "mirror", "crop", "border", "overlay", "rotation")
OTHER_PAIRS = "other pairs"


def comparison(run: str, data: str) -> dict[str, dict[str, float]]:
    """For each detector: the share of each transform's copies that it finds, and the number of other pairs."""
    planted = pq.read_table(paths.join(data, "planted.parquet")).to_pylist()
    phash = {
        row["image_id"]: row["phash"]
        for row in read_images(paths.join(run, "ingest"), ["image_id", "phash"]).to_pylist()
    }
    descriptor: dict[str, np.ndarray] = {}
    for image_ids, matrix in read_vectors(paths.join(run, "describe")):
        descriptor.update(zip(image_ids, matrix.astype(np.float32), strict=True))
    component = _components(run)
    copies = {row["copy_image_id"] for row in planted}
    others = sorted(set(phash) - copies)
    hashes = np.array([phash[image_id] for image_id in others], np.uint64)
    matrix = np.stack([descriptor[image_id] for image_id in others])

    result: dict[str, dict[str, float]] = {}
    for max_bits in (0, 4, 10):
        ends = [
            np.array([phash[row[end]] for row in planted], np.uint64) for end in ("copy_image_id", "original_image_id")
        ]
        is_found = (hamming_distance(ends[0], ends[1]) <= max_bits).tolist()
        distances = (hamming_distance(value, hashes[index + 1 :]) for index, value in enumerate(hashes))
        num_others = sum(int((distance <= max_bits).sum()) for distance in distances)
        result[f"pHash within {max_bits} bits"] = _shares(planted, is_found) | {OTHER_PAIRS: num_others}
    upper = np.triu(matrix @ matrix.T, 1)
    for min_cosine in (0.66, 0.8, 0.9, 0.95):
        is_found = [
            float(descriptor[row["copy_image_id"]] @ descriptor[row["original_image_id"]]) >= min_cosine
            for row in planted
        ]
        num_others = int((upper >= min_cosine).sum())
        result[f"EfficientNet GeM, cosine from {min_cosine:g}"] = _shares(planted, is_found) | {OTHER_PAIRS: num_others}
    is_found = [component[row["copy_image_id"]] == component[row["original_image_id"]] for row in planted]
    sizes = np.unique([component[image_id] for image_id in others], return_counts=True)[1]
    num_others = int((sizes - 1).sum())  # the fewest pairs that join the components of this run
    result["verified on thumbnails (the run)"] = _shares(planted, is_found) | {OTHER_PAIRS: num_others}
    return result


def table(shares_of_detector: dict[str, dict[str, float]]) -> Table:
    """The result of `comparison` as a table."""
    columns = ("detector", *TRANSFORMS, OTHER_PAIRS)
    result = make_table("Share of the planted copies that each detector finds", columns, left=("detector",))
    result.columns[0].no_wrap = True
    for detector, shares in shares_of_detector.items():
        cells = [f"{shares[transform]:.2f}" for transform in TRANSFORMS]
        result.add_row(detector, *cells, f"{shares[OTHER_PAIRS]:,.0f}")
    return result


def _components(run: str) -> dict[str, str]:
    folder = paths.join(run, "dedup")
    names = require_manifest(folder).files("duplicates")
    columns = ["image_id", "component_id"]
    table = pa.concat_tables(
        parquet.read_table(paths.join(folder, name), schemas.DUPLICATES, columns) for name in names
    )
    return dict(zip(*(table[column].to_pylist() for column in columns), strict=True))


def _shares(planted: list[dict[str, str]], is_found: list[bool]) -> dict[str, float]:
    shares = {}
    for transform in TRANSFORMS:
        hits = [hit for row, hit in zip(planted, is_found, strict=True) if row["transform"] == transform]
        shares[transform] = sum(hits) / len(hits)
    return shares
