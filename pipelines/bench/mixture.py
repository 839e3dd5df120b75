"""Draws vectors for benchmarks: a mixture of unequal clusters with planted copies.

Legend: N vectors, D dimensions.
"""

from collections.abc import Iterator

import numpy as np

# Rows of a chunk. Each chunk has a generator of its own, so that any chunk can be drawn alone.
CHUNK = 50_000
# Shares of a vector's squared length: its cluster's centre, its cluster's subspace (of 16 dimensions), noise.
CENTRE, SUBSPACE, NOISE = 0.35, 0.25, 0.4
SUBSPACE_WIDTH = 16


def blocks(num_vectors: int, width: int, *, num_clusters: int, share_copies: float, seed: int) -> Iterator[np.ndarray]:
    """Unit vectors (n, D) float16, `num_vectors` in all, in chunks.

    Cluster sizes fall as 1/rank. Two vectors have a cosine of about 0.35 +- 0.07 within a cluster and about 0 across
    clusters. A share of the vectors are copies, each of another vector of its chunk, at a uniform cosine of 0.6 to 1.
    """
    generator = np.random.default_rng([seed, 0])
    centres = _unit(generator.normal(size=(num_clusters, width)))
    # All directions in one matrix; each cluster's subspace is a window of it.
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
        is_copy = generator.random(count) < share_copies
        copies, originals = np.flatnonzero(is_copy), np.flatnonzero(~is_copy)
        if len(copies) and len(originals):
            original = matrix[generator.choice(originals, len(copies))]
            cosine = generator.uniform(0.6, 1, (len(copies), 1)).astype(np.float32)
            orthogonal = generator.normal(size=original.shape).astype(np.float32)
            orthogonal = _unit(orthogonal - (orthogonal * original).sum(axis=1, keepdims=True) * original)
            matrix[copies] = cosine * original + np.sqrt(1 - cosine**2) * orthogonal
        yield matrix.astype(np.float16)


def _unit(matrix: np.ndarray) -> np.ndarray:
    values = matrix.astype(np.float32)
    result: np.ndarray = values / np.linalg.norm(values, axis=1, keepdims=True)
    return result
