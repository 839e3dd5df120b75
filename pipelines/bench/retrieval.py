"""Measures whether retrieval finds images of the same concept, on the demo's vectors before deduplication.

Protocol: every stamp of the four concepts, held out or not, is a query. The pool is the 3,000 drawings of
data/demo/pool, without drawings over 4 megapixels. A query's score is the share of its 4 nearest drawings, by cosine,
with its concept.
"""

import numpy as np
from rich.table import Table

from curation.files import paths
from curation.run_folder import read_images, read_vectors
from pipelines.bench.tables import make_table
from pipelines.demo.concepts import chance, concept_of_drawing, concept_of_stamp, nearest_pairs, share_same_concept

NAME = "concepts"
MAX_POOL_PIXELS = 4_000_000
# Measured 2026-11 by this protocol, before this code was written: the better of average pooling and GeM of
# EfficientNet-Lite0.
TARGETS = {"animals": 0.59, "food": 0.50, "plants": 0.45, "vehicles": 0.34}


def shares(run: str) -> dict[str, tuple[float, float, float]]:
    """For each concept: the share of the 4 nearest with it, the target, and chance. `run` is the demo's."""
    # Ids with their concept. Files with equal bytes count as often as they occur.
    seeds: list[tuple[str, str | None]] = []
    pool: list[tuple[str, str | None]] = []
    columns = ["image_id", "source", "role", "label", "width", "height"]
    for row in read_images(paths.join(run, "ingest"), columns).to_pylist():
        if row["role"] in ("seed", "holdout") and (concept := concept_of_stamp(row["label"])) is not None:
            seeds.append((row["image_id"], concept))
        elif row["source"] == "drawings" and row["width"] * row["height"] <= MAX_POOL_PIXELS:
            pool.append((row["image_id"], concept_of_drawing(row["label"])))
    vector_of: dict[str, np.ndarray] = {}
    for image_ids, matrix in read_vectors(paths.join(run, "embed")):
        vector_of.update(zip(image_ids, matrix, strict=True))
    seed_concepts, pool_concepts = ([concept for _, concept in rows] for rows in (seeds, pool))
    pairs = nearest_pairs(
        np.stack([vector_of[image_id] for image_id, _ in seeds]),
        seed_concepts,
        np.stack([vector_of[image_id] for image_id, _ in pool]),
        pool_concepts,
    )
    by_chance = chance(pool_concepts)
    return {
        concept: (share, TARGETS[concept], by_chance[concept]) for concept, share in share_same_concept(pairs).items()
    }


def table(shares_of_concept: dict[str, tuple[float, float, float]]) -> Table:
    """The result of `shares` as a table."""
    columns = ("concept", "share", "target", "ratio", "by chance")
    result = make_table("Share of the 4 nearest drawings with the stamp's concept", columns, left=("concept",))
    for concept, (share, target, by_chance) in shares_of_concept.items():
        result.add_row(concept, f"{share:.3f}", f"{target:.2f}", f"{share / target:.2f}", f"{by_chance:.3f}")
    return result
