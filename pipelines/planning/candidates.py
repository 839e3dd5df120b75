"""Estimates how many candidate copies a whole pool would have, from the descriptors of a finished run on a part of it.

An image has more near images in a larger pool, until its list of neighbours is full. So the candidates grow with the
square of the images at first, and with the images at last. The descriptors of the part show where each image stands:
every image of the part stands for `weight` images of the whole, and an image's list takes its nearest ones until their
weights fill it.

Legend: N images of the part, D dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from curation.engine.manifest import require_manifest
from curation.files import parquet, schemas, vectors
from curation.pairs import PairsConfig
from curation.run_folder import RunFolder

# Images of the part that are compared with one another. Assumed: 9 million pairs show the density of near ones.
MAX_IMAGES = 3000


@dataclass(frozen=True)
class Described:
    """Distinct images of a finished run."""

    vectors: np.ndarray  # (N, D) float32, unit length
    weight: np.ndarray  # (N,): images of the whole that each one stands for
    is_holdout: np.ndarray  # (N,) bool


def read_described(run: str, weight_of_source: Mapping[str, float]) -> Described:
    """At most MAX_IMAGES images of a run; their weights make up for the others.

    An image of several sources has the smallest weight of them.
    """
    folder = RunFolder.of(run)
    lightest: dict[str, tuple[float, bool]] = {}
    for file in require_manifest(folder.ingest).paths(folder.ingest, "images"):
        for row in parquet.read_table(file, schemas.IMAGES, ["image_id", "source", "role"]).to_pylist():
            entry = weight_of_source.get(row["source"], 1.0), row["role"] == "holdout"
            previous = lightest.get(row["image_id"])
            lightest[row["image_id"]] = entry if previous is None else (min(entry[0], previous[0]), entry[1])
    chosen = set(sorted(lightest)[:MAX_IMAGES])  # ids are hashes, so the first are a random part
    thinned = len(lightest) / max(1, len(chosen))
    matrices: dict[str, np.ndarray] = {}
    for file in require_manifest(folder.describe).paths(folder.describe, "vectors"):
        ids, matrix = vectors.read_file(file)
        matrices.update((each, matrix[row]) for row, each in enumerate(ids) if each in chosen)
    ids = sorted(matrices)
    return Described(
        np.stack([matrices[each] for each in ids]).astype(np.float32) if ids else np.empty((0, 1), np.float32),
        np.array([lightest[each][0] * thinned for each in ids]),
        np.array([lightest[each][1] for each in ids], bool),
    )


def estimate_candidates(images: Described, config: PairsConfig) -> float:
    """The pairs that `pairs` would score if every image stood for `weight` images.

    A pair is scored where one of the two is in the other's list. An image with a full list is compared with all holdout
    images above the floor as well; with an approximate search, every image is.
    """
    similarity = images.vectors @ images.vectors.T
    np.fill_diagonal(similarity, -2)
    is_near = similarity >= config.min_descriptor_similarity
    in_list = np.zeros(similarity.shape, np.float32)
    for image in range(len(similarity)):
        near = np.flatnonzero(is_near[image])
        near = near[np.argsort(-similarity[image, near], kind="stable")]
        weight = images.weight[near]
        before = np.cumsum(weight) - weight
        in_list[image, near] = np.clip((config.num_neighbors - before) / weight, 0, 1)
        is_full = before[-1] + weight[-1] >= config.num_neighbors if len(near) else False
        if (is_full or config.search.backend == "ivf") and not images.is_holdout[image]:
            in_list[image, near[images.is_holdout[near]]] = 1
    is_scored = 1 - (1 - in_list) * (1 - in_list.T)
    return float(images.weight @ is_scored @ images.weight) / 2
