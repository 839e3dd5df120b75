"""Estimates how many candidate copies a whole pool would have, from the descriptors of a finished run on a part of it.

An image has more near images in a larger pool, until its list of neighbours is full. So the candidates grow with the
square of the images at first, and with the images at last. The descriptors of the part show where each image stands:
every image of the part stands for `weight` images of the whole, and an image's list takes its nearest ones until their
weights fill it.

In a large pool more thumbnails are prepared again for a comparison. So a few candidates are compared here, which gives
the time of preparing a thumbnail in relation to that of comparing two. The features of photographs are known by then:
a step computes them once for each image.

Legend: N images of the part, D dimensions.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from curation.copies.compare_thumbnails import VerificationConfig
from curation.copies.described import make_comparer
from curation.engine.manifest import require_manifest
from curation.files import parquet, schemas, vectors
from curation.pairs import PairsConfig
from curation.run_folder import RunFolder

# Images of the part that are compared with one another. Assumed: 9 million pairs show the density of near ones.
MAX_IMAGES = 3000
# Candidates that are compared here: some seconds.
MAX_COMPARED = 150


@dataclass(frozen=True)
class Described:
    """Distinct images of a finished run."""

    ids: list[str]
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
        ids,
        np.stack([matrices[each] for each in ids]).astype(np.float32) if ids else np.empty((0, 1), np.float32),
        np.array([lightest[each][0] * thinned for each in ids]),
        np.array([lightest[each][1] for each in ids], bool),
    )


def scored(images: Described, config: PairsConfig) -> np.ndarray:
    """(N, N), symmetric: the probability that `pairs` scores a pair, if every image stands for `weight` images.

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
    result: np.ndarray = 1 - (1 - in_list) * (1 - in_list.T)
    return result


def num_candidates(images: Described, is_scored: np.ndarray) -> float:
    """The pairs that `pairs` would score, by the probabilities of `scored`."""
    return float(images.weight @ is_scored @ images.weight) / 2


def draw_pairs(images: Described, is_scored: np.ndarray) -> list[tuple[int, int]]:
    """At most MAX_COMPARED of the candidates, as rows of `images`, each as often as it stands for candidates."""
    one, other = np.nonzero(np.triu(is_scored))
    if not len(one):
        return []
    share = is_scored[one, other] * images.weight[one] * images.weight[other]
    drawn = np.random.default_rng(0).choice(len(one), MAX_COMPARED, p=share / share.sum())
    return list(zip(one[drawn].tolist(), other[drawn].tolist(), strict=True))


def read_thumbnails(run: str, ids: set[str]) -> dict[str, bytes]:
    """The thumbnails of some images of a run."""
    folder = RunFolder.of(run).describe
    thumbnails: dict[str, bytes] = {}
    for file in require_manifest(folder).paths(folder, "thumbnails"):
        for row in parquet.read_table(file, schemas.THUMBNAILS).to_pylist():
            if row["image_id"] in ids:
                thumbnails[row["image_id"]] = row["thumbnail"]
    return thumbnails


@dataclass(frozen=True)
class VerificationCost:
    """Processor seconds of this machine."""

    prepare: float
    """To prepare a thumbnail; of a photograph, its features are known."""
    compare: float
    """To compare two prepared ones."""


def verification_cost(
    pairs: list[tuple[int, int]], images: Described, thumbnails: Mapping[str, bytes], config: VerificationConfig
) -> VerificationCost:
    """The cost of some pairs. They are compared twice, because the first comparison prepares parts of a thumbnail."""
    comparer = make_comparer(config)
    rows = sorted({row for pair in pairs for row in pair})
    encoded = {row: thumbnails[images.ids[row]] for row in rows}
    features: dict[int, np.void] = {}
    if config.domain == "photographs":
        features = {row: comparer.prepare(encoded[row]).features for row in rows}
    started = time.process_time()
    prepared = {row: comparer.prepare(encoded[row], features.get(row)) for row in rows}
    for one, other in pairs:
        comparer.compare(prepared[one], [prepared[other]])
    both = time.process_time() - started
    started = time.process_time()
    for one, other in pairs:
        comparer.compare(prepared[one], [prepared[other]])
    comparing = time.process_time() - started
    return VerificationCost(max(0.0, both - comparing) / len(rows), comparing / len(pairs))
