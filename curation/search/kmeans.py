"""Spherical k-means over points that need not fit in memory: its steps as pure functions, and the loop over them.

Legend: N points, D dimensions, K clusters, n points of one block, R points of a sample, C points drawn from clusters.

A centroid is the mean of its points, scaled to unit length. The objective is the sum of the points' cosines to their
centroids. No iteration lowers it, except by splitting clusters (Dhillon and Modha, "Concept decompositions for large
sparse text data using clustering", 2001). `fit` runs in one process; in the cluster stage, each worker calls the steps
on a part of the points.

The result does not depend on how the points are cut into blocks. Their values are float16, so multiples of 2^-24 and at
most 1: float64 sums of up to 2^29 of them are exact in any order, and `exact.assign` scores pair by pair. Float32
points (the centroids of another k-means) are summed in the order of the blocks: equal blocks give equal bytes.
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

# Points per cluster in the sample of k-means++; bounds its memory and time. Assumed.
START_POINTS_PER_CLUSTER = 8
# Candidates that k-means++ draws at a time, and points whose distances to them are computed at a time: 32 MB. Assumed.
CANDIDATES = 1024
CANDIDATE_POINTS = 4096
# Dimensions summed at a time: bounds the memory of float64 copies. Measured: 64 to 384 are equally fast.
COLUMNS = 128
# Relative difference between a cluster and its two halves after a split. Cited: faiss, Clustering.cpp, split_clusters.
SPLIT = 1 / 1024


@dataclass(frozen=True)
class Reduction:
    """The statistics of some points that an update needs."""

    sums: np.ndarray  # (K, D) float64: the sum of the points of each cluster
    counts: np.ndarray  # (K,) int64: points of each cluster
    objective: float  # sum of the points' cosines to their centroids


@dataclass(frozen=True)
class Fit:
    """The result of a k-means."""

    centroids: np.ndarray  # (K, D) float32, unit rows
    objectives: list[float]  # one per iteration, before its update


def fit(
    blocks: Callable[[], Iterable[np.ndarray]], num_clusters: int, *, num_iterations: int, start: Start, seed: int
) -> Fit:
    """K-means over all blocks (n, D) of points, in one process. Each call of `blocks` iterates over all of them.

    Stops early when an iteration changes nothing. Memory holds a block, three matrices (K, D), 4 bytes per point for
    its last cluster, and at the start `START_POINTS_PER_CLUSTER` points per cluster. There must be at least K points.
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
    """After each iteration: the next centroids, its objective, and whether nothing changes any more."""
    for _ in range(num_iterations):
        reduction = reduce_all(centroids)
        following = update(reduction, centroids)
        settled = np.array_equal(following, centroids)
        centroids = following
        yield centroids, reduction.objective, settled
        if settled:
            return


def reduce_points(
    blocks: Iterable[np.ndarray], centroids: np.ndarray, *, guess: np.ndarray | None = None, device: str = "cpu"
) -> tuple[Reduction, np.ndarray]:
    """The reduction of all blocks' points, and the nearest centroid (N,) int32 of each point; ties go to the first.

    `guess` (N,), such as the clusters of the previous iteration, changes only the speed, and so does `device`.
    """
    sums, counts = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64)
    objective, clusters = 0.0, [np.zeros(0, np.int32)]
    first = 0
    for block in blocks:
        block_guess = None if guess is None else guess[first : first + len(block)].astype(np.int64)
        cluster, similarity = exact.assign(block, centroids, guess=block_guess, device=device)
        add_points(sums, counts, block, cluster)
        objective += float(similarity.sum(dtype=np.float64))
        clusters.append(cluster.astype(np.int32))
        first += len(block)
    return Reduction(sums, counts, objective), np.concatenate(clusters)


def add_points(sums: np.ndarray, counts: np.ndarray, block: np.ndarray, cluster: np.ndarray) -> None:
    """Add the points of `block` (n, D) to the `sums` (K, D) and `counts` (K,) of their clusters (n,), in place."""
    order = np.argsort(cluster, kind="stable")
    present, begin, size = np.unique(cluster[order], return_index=True, return_counts=True)
    # Row k of this matrix has ones in the columns of the points of the k-th cluster present: the product is their sum.
    members = scipy.sparse.csr_array(
        (np.ones(len(block)), order, np.append(begin, len(block))), shape=(len(present), len(block))
    )
    for left in range(0, block.shape[1], COLUMNS):
        strip = slice(left, left + COLUMNS)
        sums[present, strip] += members @ low_precision.to_float32(block[:, strip])  # in float64, as `members` is
    counts[present] += size


def merge(reductions: Iterable[Reduction]) -> Reduction:
    """The sum of the given reductions, at least one, added in their order."""
    parts = iter(reductions)
    first = next(parts)
    sums, counts, objective = first.sums.copy(), first.counts.copy(), first.objective
    for part in parts:
        sums += part.sums
        counts += part.counts
        objective += part.objective
    return Reduction(sums, counts, objective)


def update(reduction: Reduction, centroids: np.ndarray) -> np.ndarray:
    """The next centroids (K, D) float32, from `centroids` (K, D) and the reduction of all points by them.

    A cluster whose points sum to zero keeps its centroid. For each empty cluster, in order, the largest cluster is
    split: both become its mean, moved a little apart. Of equally large clusters the first is split; a split halves the
    size that counts from then on. When no cluster of two points is left to split, empty clusters keep their centroids.
    faiss does the same, but draws the cluster to split with a probability that grows with its size.
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
    """The rows (R,) int64, ascending, of a random sample for `initial_centroids`, without repeats.

    R is K for a random start, `START_POINTS_PER_CLUSTER` times K for k-means++, and at most all points.
    """
    assert 1 <= num_clusters <= num_points, (num_clusters, num_points)
    sample_size = num_clusters * (START_POINTS_PER_CLUSTER if start == "k_means++" else 1)
    if sample_size >= num_points:
        return np.arange(num_points)
    return np.sort(np.random.default_rng(seed).choice(num_points, sample_size, replace=False, shuffle=False))


def take(blocks: Iterable[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The points (R, D) with the given ascending `rows`, counted through all blocks in order."""
    first, taken = 0, []
    for block in blocks:
        begin, end = np.searchsorted(rows, (first, first + len(block)))
        taken.append(block[rows[begin:end] - first])
        first += len(block)
    return np.concatenate(taken)


def initial_centroids(sample: np.ndarray, num_clusters: int, start: Start, seed: int) -> np.ndarray:
    """The first centroids: K of the points `sample` (R, D), as unit rows (K, D) float32.

    `random` draws any K points. `k_means++` draws one after another, each with a probability proportional to its
    squared distance to the nearest point drawn before (Arthur and Vassilvitskii, "k-means++: the advantages of careful
    seeding", 2007). Many candidates are drawn at a time by the distances before the draw. A candidate near another one
    of the same draw is rejected with the probability that makes the distribution that of drawing one by one.
    (Cohen-Addad et al., "Fast and accurate k-means++ via rejection sampling", 2020, also reject, but draw from a tree.)
    Points of float32 are compared as float16, so that all distances are exact. With fewer than K distinct points, the
    rest are repeats.
    """
    assert 1 <= num_clusters <= len(sample), (num_clusters, len(sample))
    random = np.random.default_rng([seed, 1])  # independent of the generator in `start_rows`
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
    key: np.ndarray  # (C,) float32: points with greater keys are drawn first
    row: np.ndarray  # (C,) int64: the row of the point among all points

    @staticmethod
    def none() -> "Drawn":
        """No points."""
        return Drawn(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))


def draw(before: Drawn, more: Drawn, sample_size: int) -> Drawn:
    """The `sample_size` points of each cluster with the greatest keys, of both together; ties by row."""
    cluster, key, row = (
        np.concatenate([getattr(before, name), getattr(more, name)]) for name in ("cluster", "key", "row")
    )
    chosen = top_k_of_groups(cluster, sample_size, -key, row)
    return Drawn(cluster[chosen], key[chosen], row[chosen])


def _spread_rows(sample: np.ndarray, num_clusters: int, random: np.random.Generator) -> np.ndarray:
    """The rows (K,) int64 that k-means++ draws of `sample` (R, D) float16."""
    squares = np.concatenate([(part**2).sum(axis=1) for part in _parts_float64(sample)])

    def squared_distances(part: np.ndarray, part_squares: np.ndarray, rows: np.ndarray) -> np.ndarray:
        # Exact in any order of summation: products are multiples of 2^-48, and no sum of them comes near 2^5.
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
            np.minimum(nearest[rows], squared_distances(part, squares[rows], new).min(axis=1), out=nearest[rows])
        total = np.cumsum(nearest)
        if total[-1] == 0:
            others = np.setdiff1d(np.arange(len(sample)), np.concatenate(chosen))
            new = random.choice(others, num_clusters - num_chosen, replace=False)
            continue
        num_drawn = min(CANDIDATES, num_clusters - num_chosen)
        drawn = np.searchsorted(total, random.random(num_drawn) * total[-1], side="right")
        drawn = np.minimum(drawn, np.flatnonzero(nearest)[-1])
        between = squared_distances(sample[drawn].astype(np.float64), squares[drawn], drawn)
        before, now = nearest[drawn], nearest[drawn].copy()
        accepted = []
        for candidate, coin in enumerate(random.random(num_drawn)):
            if coin * before[candidate] < now[candidate]:
                accepted.append(candidate)
                np.minimum(now, between[candidate], out=now)
        new = drawn[accepted]


def _parts_float64(sample: np.ndarray) -> Iterator[np.ndarray]:
    """The sample as float64 in parts of CANDIDATE_POINTS points."""
    for begin in range(0, len(sample), CANDIDATE_POINTS):
        yield sample[begin : begin + CANDIDATE_POINTS].astype(np.float64)


def _unit(matrix: np.ndarray) -> np.ndarray:
    """`matrix` (K, D) with rows of unit length, as float32."""
    unit: np.ndarray = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    return unit
