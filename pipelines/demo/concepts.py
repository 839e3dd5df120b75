"""Measures whether retrieval on the demo data finds images of the same concept.

A concept is a topic that both sources have a folder for: `animals/birds/owl` among the stamps and
`animals/mammals/dogs` among the drawings are both "animals". The stamps' `vehicles` are the drawings' `transportation`.

pipelines/bench/retrieval.py states the protocol.
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
    """The share of pairs (seed's concept, neighbour's concept) that agree, by the seed's concept.

    Pairs whose seed has no concept are left out; a neighbour without one counts as a miss.
    """
    num_pairs: Counter[str] = Counter()
    num_agreeing: Counter[str] = Counter()
    for seed, neighbor in pairs:
        if seed is not None:
            num_pairs[seed] += 1
            num_agreeing[seed] += seed == neighbor
    return {concept: num_agreeing[concept] / count for concept, count in sorted(num_pairs.items())}


def nearest_pairs(
    seed_vectors: np.ndarray,
    seed_concepts: Sequence[str | None],
    pool_vectors: np.ndarray,
    pool_concepts: Sequence[str | None],
    *,
    k: int = 4,
) -> list[tuple[str | None, str | None]]:
    """The pairs for `share_same_concept` of each seed and its `k` nearest neighbours by exact search.

    Vectors are (S, D) and (P, D), of unit length; ties go to the first in the pool.
    """
    similarities = seed_vectors.astype(np.float32) @ pool_vectors.astype(np.float32).T
    nearest = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return [(seed, pool_concepts[row]) for seed, rows in zip(seed_concepts, nearest, strict=True) for row in rows]


def chance(pool_concepts: Sequence[str | None]) -> dict[str, float]:
    """The share of the pool with each concept: the score of random retrieval."""
    counts = Counter(concept for concept in pool_concepts if concept is not None)
    return {concept: count / len(pool_concepts) for concept, count in sorted(counts.items())}
