"""Which copy detector finds the planted copies, and what else does it merge? On the files of a run of the demo.

A planted copy counts as found when its pair with the original passes, or, for the run's own decision, when both are in
one component. What else passes are pairs of images outside the planted set; the pool has true copies among them.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.engine.manifest import require_manifest
from curation.files import parquet, paths, schemas
from curation.images.hashing import hamming_distance
from curation.run_folder import read_images, read_vectors

TRANSFORMS = ("jpeg", "resize", "colour", "mirror", "crop", "border", "overlay", "rotation")


def comparison(run: str, data: str) -> dict[str, dict[str, float]]:
    """For each detector: the share found of each transform's copies, and `other pairs`, how many others it joins."""
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
    for most in (0, 4, 10):
        ends = [
            np.array([phash[row[end]] for row in planted], np.uint64) for end in ("copy_image_id", "original_image_id")
        ]
        found = (hamming_distance(ends[0], ends[1]) <= most).tolist()
        distances = (hamming_distance(value, hashes[index + 1 :]) for index, value in enumerate(hashes))
        others_joined = sum(int((distance <= most).sum()) for distance in distances)
        result[f"pHash within {most} bits"] = _shares(planted, found) | {"other pairs": others_joined}
    upper = np.triu(matrix @ matrix.T, 1)
    for least in (0.66, 0.8, 0.9, 0.95):
        found = [
            float(descriptor[row["copy_image_id"]] @ descriptor[row["original_image_id"]]) >= least for row in planted
        ]
        result[f"EfficientNet GeM, cosine from {least:g}"] = _shares(planted, found) | {
            "other pairs": int((upper >= least).sum())
        }
    found = [component[row["copy_image_id"]] == component[row["original_image_id"]] for row in planted]
    sizes = np.unique([component[image_id] for image_id in others], return_counts=True)[1]
    joined = int((sizes - 1).sum())  # the fewest pairs that join what this run joined
    result["verified on thumbnails (the run)"] = _shares(planted, found) | {"other pairs": joined}
    return result


def _components(run: str) -> dict[str, str]:
    folder = paths.join(run, "dedup")
    names = require_manifest(folder).files("duplicates")
    columns = ["image_id", "component_id"]
    table = pa.concat_tables(
        parquet.read_table(paths.join(folder, name), schemas.DUPLICATES, columns) for name in names
    )
    return dict(zip(*(table[column].to_pylist() for column in columns), strict=True))


def _shares(planted: list[dict[str, str]], found: list[bool]) -> dict[str, float]:
    shares = {}
    for transform in TRANSFORMS:
        own = [hit for row, hit in zip(planted, found, strict=True) if row["transform"] == transform]
        shares[transform] = sum(own) / len(own)
    return shares
