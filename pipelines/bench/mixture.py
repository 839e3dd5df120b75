"""Vectors with structure for benchmarks: a mixture of unequal clusters with planted copies.

Legend: N vectors, D dimensions.
"""

from collections.abc import Iterator

import numpy as np

# Rows that are drawn at a time, each from a generator of its own, so that any part can be drawn alone.
CHUNK = 50_000
# Shares of a vector's squared length: its cluster's centre, a subspace of its cluster (of 16 dimensions), noise.
CENTRE, SUBSPACE, NOISE = 0.4, 0.35, 0.25
SUBSPACE_WIDTH = 16


def blocks(num_vectors: int, width: int, *, num_clusters: int, share_copies: float, seed: int) -> Iterator[np.ndarray]:
    """Unit vectors (n, D) float16, `num_vectors` in all, in chunks.

    Cluster sizes fall as 1/rank. Two vectors of one cluster have a cosine about 0.4 +- 0.1, of two clusters about 0.
    A share of the vectors are copies: each of an earlier vector of its chunk, at a cosine spread evenly over 0.6 to 1.
    """
    generator = np.random.default_rng([seed, 0])
    centres = _unit(generator.normal(size=(num_clusters, width)))
    # One pool of directions; each cluster's subspace is a window of it.
    directions = _unit(generator.normal(size=(num_clusters + SUBSPACE_WIDTH, width)))
    popularity = 1 / np.arange(1, num_clusters + 1)
    popularity /= popularity.sum()
    for number, start in enumerate(range(0, num_vectors, CHUNK)):
        count = min(CHUNK, num_vectors - start)
        generator = np.random.default_rng([seed, 1, number])
        cluster = generator.choice(num_clusters, count, p=popularity)
        weights = _unit(generator.normal(size=(count, SUBSPACE_WIDTH)))
        local = np.zeros((count, width), np.float32)
        for axis in range(SUBSPACE_WIDTH):
            local += weights[:, axis : axis + 1] * directions[cluster + axis]
        matrix = np.sqrt(CENTRE) * centres[cluster] + np.sqrt(SUBSPACE) * _unit(local)
        matrix = _unit(matrix + np.sqrt(NOISE) * _unit(generator.normal(size=(count, width))))
        copies = np.flatnonzero(generator.random(count) < share_copies)
        copies = copies[copies > 0]
        originals = (generator.random(len(copies)) * copies).astype(np.int64)
        cosine = generator.uniform(0.6, 1, len(copies)).astype(np.float32)[:, None]
        for copy, original, value in zip(copies, originals, cosine, strict=True):
            noise = generator.normal(size=width).astype(np.float32)
            noise -= (noise @ matrix[original]) * matrix[original]
            matrix[copy] = value * matrix[original] + np.sqrt(1 - value**2) * noise / np.linalg.norm(noise)
        yield matrix.astype(np.float16)


def _unit(matrix: np.ndarray) -> np.ndarray:
    values = matrix.astype(np.float32)
    result: np.ndarray = values / np.linalg.norm(values, axis=1, keepdims=True)
    return result
