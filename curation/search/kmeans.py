"""Spherical k-means over points that need not fit in memory: its pieces as pure functions, and the loop over them.

Legend: N points, D dimensions, K clusters, n points of one block.

A centroid is the mean of its points, scaled to unit length; the objective is the sum of the points' cosines to their
centroids, which no iteration lowers but for the clusters that it splits (Dhillon and Modha, "Concept decompositions for
large sparse text data using clustering", 2001). One process calls `fit`; the cluster stage calls the pieces, each
worker on its own points.

How the points are cut makes no difference. Their values are float16, so multiples of 2^-24 and at most 1: float64 sums
of up to 2^29 of them are exact in any order, and `index.assign` scores pair by pair. Float32 points, which are the
centroids of another k-means, are summed in the order of the blocks, so there the same blocks give the same bytes.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse

from curation.search import exact, low_precision
from curation.search.top_k import top_k_of_groups

Start = Literal["random", "k_means++"]

# Points per cluster that k-means++ draws from; bounds its memory and time. Assumed.
START_POINTS_PER_CLUSTER = 8
# Candidates that k-means++ draws at a time, and points whose distances to them are found at a time: 32 MB. Assumed.
CANDIDATES = 1024
CANDIDATE_POINTS = 4096
# Dimensions that are summed at a time: bounds the memory of float64 copies. Measured: 64 to 384 are as fast.
COLUMNS = 128
# By how much the two halves of a split cluster differ from it, as in faiss (Clustering.cpp, split_clusters).
SPLIT = 1 / 1024


@dataclass(frozen=True)
class Reduction:
    """What an update needs to know of some points."""

    sums: np.ndarray  # (K, D) float64: of the points of each cluster
    counts: np.ndarray  # (K,) int64
    objective: float  # sum of the cosines to the centroids


@dataclass(frozen=True)
class Fit:
    """The result of a k-means."""

    centroids: np.ndarray  # (K, D) float32, unit rows
    objectives: list[float]  # one per iteration: before its update


def fit(
    blocks: Callable[[], Iterable[np.ndarray]], num_clusters: int, *, num_iterations: int, start: Start, seed: int
) -> Fit:
    """K-means over the points of all blocks (n, D) that each call of `blocks` goes through, in one process.

    Stops early when an iteration changes nothing. In memory: a block, three matrices (K, D), 4 bytes per point for its
    last cluster, and at the start `START_POINTS_PER_CLUSTER` points per cluster. There must be at least K points.
    """
    num_points = sum(len(block) for block in blocks())
    sample = take(blocks(), start_rows(num_points, num_clusters, start, seed))
    centroids = initial_centroids(sample, num_clusters, start, seed)
    del sample
    clusters: np.ndarray | None = None

    def reduce_all(centroids: np.ndarray) -> Reduction:
        nonlocal clusters
        reduction, clusters = reduce_points(blocks(), centroids, guess=clusters)
        return reduction

    objectives: list[float] = []
    for following, objective, _ in lloyd(centroids, num_iterations, reduce_all):
        centroids = following
        objectives.append(objective)
    return Fit(centroids, objectives)


def lloyd(
    centroids: np.ndarray, num_iterations: int, reduce_all: Callable[[np.ndarray], Reduction]
) -> Iterator[tuple[np.ndarray, float, bool]]:
    """After each iteration the next centroids, its objective, and whether it was the last since nothing changes."""
    for _ in range(num_iterations):
        reduction = reduce_all(centroids)
        following = update(reduction, centroids)
        settled = np.array_equal(following, centroids)
        centroids = following
        yield centroids, reduction.objective, settled
        if settled:
            return


def reduce_points(
    blocks: Iterable[np.ndarray], centroids: np.ndarray, *, guess: np.ndarray | None = None
) -> tuple[Reduction, np.ndarray]:
    """The reduction of all blocks' points, and the nearest centroid (N,) int32 of each; ties to the first.

    `guess` (N,), such as the clusters of the iteration before, only makes it faster.
    """
    sums, counts = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64)
    objective, found = 0.0, [np.zeros(0, np.int32)]
    first = 0
    for block in blocks:
        own = None if guess is None else guess[first : first + len(block)].astype(np.int64)
        cluster, similarity = exact.assign(block, centroids, guess=own)
        add_points(sums, counts, block, cluster)
        objective += float(similarity.sum(dtype=np.float64))
        found.append(cluster.astype(np.int32))
        first += len(block)
    return Reduction(sums, counts, objective), np.concatenate(found)


def add_points(sums: np.ndarray, counts: np.ndarray, block: np.ndarray, cluster: np.ndarray) -> None:
    """Add the points of `block` (n, D) to the `sums` (K, D) and `counts` (K,) of their clusters (n,), in place."""
    order = np.argsort(cluster, kind="stable")
    present, begin, size = np.unique(cluster[order], return_index=True, return_counts=True)
    # Row k of this matrix has ones where the points of the k-th cluster present are, so the product is their sum.
    members = scipy.sparse.csr_array(
        (np.ones(len(block)), order, np.append(begin, len(block))), shape=(len(present), len(block))
    )
    for left in range(0, block.shape[1], COLUMNS):
        strip = slice(left, left + COLUMNS)
        sums[present, strip] += members @ low_precision.to_float32(block[:, strip])  # float64, like the left side
    counts[present] += size


def merge(reductions: Iterable[Reduction]) -> Reduction:
    """The reduction of all points of the given ones, of which there must be one; added up in their order."""
    parts = iter(reductions)
    first = next(parts)
    sums, counts, objective = first.sums.copy(), first.counts.copy(), first.objective
    for part in parts:
        sums += part.sums
        counts += part.counts
        objective += part.objective
    return Reduction(sums, counts, objective)


def update(reduction: Reduction, centroids: np.ndarray) -> np.ndarray:
    """The next centroids (K, D) float32, given those (K, D) of which `reduction` is.

    A cluster whose points have no direction in the mean keeps its centroid. For each empty one, in order, the largest
    cluster is split (the first of equals; its size counts as halved from then on): both are its mean, moved a little
    apart. Where no cluster of two is left to split, an empty one keeps its centroid. faiss does the same, but draws the
    cluster to split with a probability that grows with its size.
    """
    norms = np.linalg.norm(reduction.sums, axis=1)
    following = np.where(norms[:, None] > 0, reduction.sums, centroids)
    sizes = [(-size, cluster) for cluster, size in enumerate(reduction.counts.tolist())]
    heapq.heapify(sizes)
    for empty in np.flatnonzero(reduction.counts == 0).tolist():
        size, largest = -sizes[0][0], sizes[0][1]
        if size < 2:
            break
        heapq.heapreplace(sizes, (size // 2 - size, largest))
        heapq.heappush(sizes, (-(size // 2), empty))
        following[empty] = following[largest]
        following[empty, ::2] *= 1 + SPLIT
        following[empty, 1::2] *= 1 - SPLIT
        following[largest, ::2] *= 1 - SPLIT
        following[largest, 1::2] *= 1 + SPLIT
    return _unit(following)


def start_rows(num_points: int, num_clusters: int, start: Start, seed: int) -> np.ndarray:
    """The rows (R,) int64, ascending, of the points that `initial_centroids` is to see; at random, without repeats.

    These are K for a random start, and `START_POINTS_PER_CLUSTER` times as many for k-means++.
    """
    assert 1 <= num_clusters <= num_points, (num_clusters, num_points)
    wanted = num_clusters * (START_POINTS_PER_CLUSTER if start == "k_means++" else 1)
    if wanted >= num_points:
        return np.arange(num_points)
    return np.sort(np.random.default_rng(seed).choice(num_points, wanted, replace=False, shuffle=False))


def take(blocks: Iterable[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The points (R, D) with the given ascending `rows`, counted through all blocks in order."""
    first, found = 0, []
    for block in blocks:
        own = rows[slice(*np.searchsorted(rows, (first, first + len(block))))]
        found.append(block[own - first])
        first += len(block)
    return np.concatenate(found)


def initial_centroids(sample: np.ndarray, num_clusters: int, start: Start, seed: int) -> np.ndarray:
    """K of the points `sample` (R, D) to start from, as unit rows (K, D) float32.

    `random`: any K. `k_means++`: one after another, each with a probability that grows with the square of its distance
    to the nearest one before (Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007). They are
    drawn many at a time by the distances of before, and one that lies near another of the same draw is rejected with
    the probability that makes up for it, so that the outcome is distributed as if drawn one by one. (Rejection as in
    Cohen-Addad et al., "Fast and accurate k-means++ via rejection sampling", 2020, who draw from a tree.) Points of
    float32 are compared as float16, so that all distances are exact. Where fewer than K points differ, the rest are
    any.
    """
    assert 1 <= num_clusters <= len(sample), (num_clusters, len(sample))
    random = np.random.default_rng([seed, 1])  # another one than that of `start_rows`
    if start == "random":
        rows = np.arange(len(sample))
        if len(rows) > num_clusters:
            rows = random.choice(len(sample), num_clusters, replace=False, shuffle=False)
    else:
        rows = _spread_rows(sample.astype(np.float16, copy=False), num_clusters, random)
    return _unit(sample[rows].astype(np.float64))


@dataclass(frozen=True)
class Drawn:
    """Points drawn from clusters, C in all."""

    cluster: np.ndarray  # (C,) int64
    key: np.ndarray  # (C,) float32: the greater, the sooner drawn
    row: np.ndarray  # (C,) int64: the number of the point

    @staticmethod
    def none() -> "Drawn":
        """No points."""
        return Drawn(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))


def draw(before: Drawn, more: Drawn, sample_size: int) -> Drawn:
    """Of both together, the `sample_size` points of each cluster with the greatest keys; ties to the smallest row."""
    cluster, key, row = (
        np.concatenate([getattr(before, name), getattr(more, name)]) for name in ("cluster", "key", "row")
    )
    chosen = top_k_of_groups(cluster, sample_size, -key, row)
    return Drawn(cluster[chosen], key[chosen], row[chosen])


def _spread_rows(sample: np.ndarray, num_clusters: int, random: np.random.Generator) -> np.ndarray:
    """The rows (K,) int64 that k-means++ draws of `sample` (R, D) float16."""
    squares = np.concatenate([(part**2).sum(axis=1) for part in _parts_float64(sample)])

    def distances(part: np.ndarray, part_squares: np.ndarray, rows: np.ndarray) -> np.ndarray:
        # Exact whatever BLAS does: products are multiples of 2^-48, and no sum of them comes near 2^5.
        product: np.ndarray = part @ sample[rows].astype(np.float64).T
        product *= -2
        product += part_squares[:, None]
        product += squares[rows]
        return product

    nearest = np.full(len(sample), np.inf)
    chosen, new = [], np.array([random.integers(len(sample))])
    num_chosen = 0
    while True:
        chosen.append(new)
        num_chosen += len(new)
        if num_chosen == num_clusters:
            return np.concatenate(chosen)
        for number, part in enumerate(_parts_float64(sample)):
            rows = slice(number * CANDIDATE_POINTS, number * CANDIDATE_POINTS + len(part))
            np.minimum(nearest[rows], distances(part, squares[rows], new).min(axis=1), out=nearest[rows])
        total = np.cumsum(nearest)
        if total[-1] == 0:
            others = np.setdiff1d(np.arange(len(sample)), np.concatenate(chosen))
            new = random.choice(others, num_clusters - num_chosen, replace=False)
            continue
        num_drawn = min(CANDIDATES, num_clusters - num_chosen)
        drawn = np.searchsorted(total, random.random(num_drawn) * total[-1], side="right")
        drawn = np.minimum(drawn, np.flatnonzero(nearest)[-1])
        between = distances(sample[drawn].astype(np.float64), squares[drawn], drawn)
        before, now = nearest[drawn], nearest[drawn].copy()
        accepted = []
        for candidate, coin in enumerate(random.random(num_drawn)):
            if coin * before[candidate] < now[candidate]:
                accepted.append(candidate)
                np.minimum(now, between[candidate], out=now)
        new = drawn[accepted]


def _parts_float64(sample: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(sample), CANDIDATE_POINTS):
        yield sample[begin : begin + CANDIDATE_POINTS].astype(np.float64)


def _unit(matrix: np.ndarray) -> np.ndarray:
    """`matrix` (K, D) with rows of unit length, as float32."""
    unit: np.ndarray = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    return unit
