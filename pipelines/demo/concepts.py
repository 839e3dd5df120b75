"""Whether retrieval on the demo data finds pictures of the same thing: the concepts of its labels, and the measure.

A concept is a topic that both sources file pictures under: `animals/birds/owl` among the stamps and
`animals/mammals/dogs` among the drawings are both "animals". The stamps' `vehicles` are the drawings' `transportation`.

The protocol behind the figures of the benchmark page: every stamp of a concept is a query; the pool is the first 3,000
drawings by SHA-1 of their file name, less those over 4 megapixels; a query's score is the share of its 4 nearest
drawings, by cosine, with its concept. Chance is the share of the pool with that concept.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

STAMP_CONCEPTS = {"animals": "animals", "food": "food", "plants": "plants", "vehicles": "vehicles"}
DRAWING_CONCEPTS = {"animals": "animals", "food": "food", "plants": "plants", "transportation": "vehicles"}


def concept_of_stamp(label: str) -> str | None:
    """The concept of a stamp, by its path or folder such as `animals/birds`; None for all other topics."""
    return STAMP_CONCEPTS.get(label.split("/")[0])


def concept_of_drawing(label: str) -> str | None:
    """The concept of a drawing, by its path or folder such as `transportation/vehicles`; None for all other topics."""
    return DRAWING_CONCEPTS.get(label.split("/")[0])


def share_same_concept(pairs: Iterable[tuple[str | None, str | None]]) -> dict[str, float]:
    """Of (concept of the seed, concept of what it found) pairs, the share that agree, by the seed's concept.

    Pairs whose seed has no concept are left out; a find without one is a miss.
    """
    asked: Counter[str] = Counter()
    agreed: Counter[str] = Counter()
    for seed, found in pairs:
        if seed is not None:
            asked[seed] += 1
            agreed[seed] += seed == found
    return {concept: agreed[concept] / count for concept, count in sorted(asked.items())}


def nearest_pairs(
    seed_vectors: np.ndarray,
    seed_concepts: Sequence[str | None],
    pool_vectors: np.ndarray,
    pool_concepts: Sequence[str | None],
    *,
    k: int = 4,
) -> list[tuple[str | None, str | None]]:
    """The pairs for `share_same_concept` of each seed and its `k` nearest by exact search.

    Vectors are (S, D) and (P, D), of unit length; of equally near ones the first in the pool counts.
    """
    similarities = seed_vectors.astype(np.float32) @ pool_vectors.astype(np.float32).T
    nearest = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return [(seed, pool_concepts[row]) for seed, rows in zip(seed_concepts, nearest, strict=True) for row in rows]


def chance(pool_concepts: Sequence[str | None]) -> dict[str, float]:
    """The share of the pool with each concept: what random retrieval would score."""
    counts = Counter(concept for concept in pool_concepts if concept is not None)
    return {concept: count / len(pool_concepts) for concept, count in sorted(counts.items())}
