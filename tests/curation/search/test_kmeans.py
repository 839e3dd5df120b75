"""K-means is as good as faiss's, gives equal bytes for any cut of the points, and handles few or equal points."""

import itertools
from collections.abc import Iterable

import faiss
import numpy as np
import pytest

from curation.search import kmeans
from curation.search.kmeans import Drawn, Fit, Reduction, Start
from tests.curation.builders import unit_vectors


def mixture(seed: int, num_points: int, num_centres: int, width: int = 24, spread: float = 0.12) -> np.ndarray:
    """Points around centres of unequal popularity, the last tenth copies of the first; (N, D) float16."""
    random = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, num_centres + 1)
    which = random.choice(num_centres, num_points, p=popularity / popularity.sum())
    matrix = unit_vectors(seed, num_centres, width)[which] + random.normal(scale=spread, size=(num_points, width))
    matrix[-(num_points // 10) :] = matrix[: num_points // 10]
    unit: np.ndarray = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
    return unit


def fit(
    blocks: Iterable[np.ndarray], num_clusters: int, num_iterations: int = 25, seed: int = 0, start: Start = "random"
) -> Fit:
    parts = list(blocks)
    return kmeans.fit(lambda: parts, num_clusters, num_iterations=num_iterations, seed=seed, start=start)


def plain_lloyd(points: np.ndarray, centroids: np.ndarray, num_iterations: int) -> tuple[np.ndarray, list[float]]:
    """Spherical k-means in a few lines of float64, for cases without empty clusters."""
    points, centroids, objectives = points.astype(np.float64), centroids.astype(np.float64), []
    for _ in range(num_iterations):
        cosines = points @ centroids.T
        nearest = cosines.argmax(axis=1)
        objectives.append(float(cosines.max(axis=1).sum()))
        sums = np.stack([points[nearest == cluster].sum(axis=0) for cluster in range(len(centroids))])
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return centroids, objectives


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("start", ["random", "k_means++"])
def test_agrees_with_plain_k_means_from_the_same_start(seed: int, start: Start) -> None:
    points = mixture(seed, 600, 12)
    rows = kmeans.start_rows(len(points), 10, start, seed)
    first = kmeans.initial_centroids(kmeans.take([points], rows), 10, start, seed)
    result = fit([points], 10, num_iterations=6, seed=seed, start=start)
    expected, objectives = plain_lloyd(points, first, len(result.objectives))
    np.testing.assert_allclose(result.centroids, expected, atol=1e-5)
    np.testing.assert_allclose(result.objectives, objectives, rtol=1e-6)
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(objectives))


@pytest.mark.parametrize("seed", range(3))
def test_objective_is_within_one_percent_of_faiss(seed: int) -> None:
    points = mixture(seed, 3000, 100, spread=0.2)
    peer = faiss.Kmeans(24, 80, niter=10, spherical=True, seed=seed + 1, max_points_per_centroid=10**6)
    peer.train(points.astype(np.float32))
    for start in ("random", "k_means++"):
        result = fit([points], 80, num_iterations=10, seed=seed, start=start)
        assert result.objectives[-1] >= 0.99 * peer.obj[-1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", ["random", "k_means++"])
def test_cuts_of_float16_points_change_no_byte_of_the_centroids(seed: int, start: Start) -> None:
    points = mixture(seed, 900, 20)
    whole = fit([points], 30, 12, seed, start)
    for cuts in ([1, 2, 899], [300, 600], list(range(1, 900, 40))):
        parts = fit(np.split(points, cuts), 30, 12, seed, start)
        assert parts.centroids.tobytes() == whole.centroids.tobytes()
        np.testing.assert_allclose(parts.objectives, whole.objectives, rtol=1e-12)
    assert fit([points], 30, 12, seed + 1, start).centroids.tobytes() != whole.centroids.tobytes()


def test_merged_reductions_of_parts_equal_the_reduction_of_all_points() -> None:
    random = np.random.default_rng(0)
    points = random.integers(-3, 4, (500, 6)).astype(np.float32)  # whole numbers, so that sums are exact
    centroids = unit_vectors(1, 8, 6)
    whole, clusters = kmeans.reduce_points([points], centroids)
    parts = [kmeans.reduce_points([part], centroids)[0] for part in np.split(points, [0, 1, 77, 400])]
    merged = kmeans.merge(parts)
    assert merged.sums.tobytes() == whole.sums.tobytes() and merged.counts.tolist() == whole.counts.tolist()
    assert merged.objective == pytest.approx(whole.objective, rel=1e-12)
    np.testing.assert_array_equal(whole.counts, np.bincount(clusters, minlength=8))
    for cluster in range(8):
        np.testing.assert_array_equal(whole.sums[cluster], points[clusters == cluster].sum(axis=0, dtype=np.float64))


def test_guess_changes_nothing() -> None:
    points, centroids = mixture(0, 700, 12), unit_vectors(3, 20, 24)
    plain, clusters = kmeans.reduce_points(np.split(points, 3 * [200]), centroids)
    for guess in (clusters, np.zeros(700, np.int32), np.random.default_rng(0).integers(0, 20, 700).astype(np.int32)):
        guessed, again = kmeans.reduce_points(np.split(points, [100, 350]), centroids, guess=guess)
        assert guessed.sums.tobytes() == plain.sums.tobytes() and again.tolist() == clusters.tolist()


@pytest.mark.parametrize("start", ["random", "k_means++"])
@pytest.mark.parametrize(
    ("points", "num_clusters", "num_distinct"),
    [
        (unit_vectors(0, 1, 4), 1, 1),
        (unit_vectors(0, 5, 4), 5, 5),
        (np.repeat(unit_vectors(0, 1, 4), 10, axis=0), 3, 1),
        (np.repeat(unit_vectors(0, 3, 4), 4, axis=0), 7, 3),
        (np.repeat(unit_vectors(0, 2, 4), 3, axis=0), 6, 2),
        (np.array([[1, 0], [-1, 0]]), 1, 2),
        (np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]), 2, 4),
    ],
    ids=["one", "a cluster each", "all equal", "3 distinct", "as many clusters as points", "opposite", "cross"],
)
def test_few_and_equal_points(points: np.ndarray, num_clusters: int, num_distinct: int, start: Start) -> None:
    points = points.astype(np.float16)
    result = fit([points[:0], points, points[:0]], num_clusters, start=start)
    assert result.centroids.shape == (num_clusters, points.shape[1]) and result.centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    if num_distinct <= num_clusters and start == "k_means++":
        cosines = (points.astype(np.float32) @ result.centroids.T).max(axis=1)
        np.testing.assert_allclose(cosines, 1, atol=2e-3)


def test_stops_when_nothing_changes() -> None:
    points = mixture(0, 300, 5, spread=0.01)
    settled = fit([points], 5, num_iterations=100, start="k_means++")
    assert len(settled.objectives) < 20
    more = fit([points], 5, num_iterations=len(settled.objectives) + 5, start="k_means++")
    assert more.centroids.tobytes() == settled.centroids.tobytes()


def test_empty_clusters_take_half_of_the_largest() -> None:
    old = unit_vectors(0, 5, 6)
    sums = np.stack([old[0] * 100, old[1] * 0, old[2] * 30, old[3] * 0, old[4]]).astype(np.float64)
    following = kmeans.update(Reduction(sums, np.array([100, 0, 60, 0, 1]), 0.0), old)
    # The second empty cluster splits cluster 2, since the first split left cluster 0 with 50.
    cosines = following.astype(np.float64) @ old.astype(np.float64).T
    assert cosines[1, 0] > 0.99999 and cosines[3, 2] > 0.99999 and cosines[4, 4] > 0.99999
    assert not np.array_equal(following[0], following[1]) and not np.array_equal(following[2], following[3])
    np.testing.assert_allclose((following[0] + following[1]) / 2, old[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(following, axis=1), 1, atol=1e-6)


def test_clusters_keep_their_centroid_without_a_mean_or_a_cluster_to_split() -> None:
    old = unit_vectors(0, 3, 4)
    sums = np.stack([np.zeros(4), old[2] * 1.0, np.zeros(4)]).astype(np.float64)
    following = kmeans.update(Reduction(sums, np.array([1, 1, 0]), 0.0), old)
    np.testing.assert_allclose(following, old[[0, 2, 2]], atol=1e-6)


@pytest.mark.parametrize(("num_points", "num_clusters"), [(1, 1), (7, 7), (100, 3), (5000, 30)])
@pytest.mark.parametrize("start", ["random", "k_means++"])
def test_start_is_of_different_points(num_points: int, num_clusters: int, start: Start) -> None:
    points = unit_vectors(num_points, num_points, 8).astype(np.float16)
    rows = kmeans.start_rows(num_points, num_clusters, start, 4)
    assert (np.diff(rows) > 0).all() and 0 <= rows[0] and rows[-1] < num_points
    sample = kmeans.take(np.array_split(points, 3), rows)
    assert sample.tobytes() == points[rows].tobytes()
    first = kmeans.initial_centroids(sample, num_clusters, start, 4)
    assert len(np.unique(first, axis=0)) == num_clusters
    cosines = first @ sample.astype(np.float32).T
    np.testing.assert_allclose(cosines.max(axis=1), 1, atol=2e-3)
    assert len(set(cosines.argmax(axis=1).tolist())) == num_clusters


@pytest.mark.parametrize("batch", [1, 3, 1024])
def test_k_means_plus_plus_draws_with_its_probabilities_at_any_batch(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definition, computed over all orders of three draws from five points on a circle."""
    monkeypatch.setattr(kmeans, "CANDIDATES", batch)
    angles = np.array([0, 0.1, 0.5, 1.5, 3.0])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    exact = points.astype(np.float64)
    square = ((exact[:, None] - exact[None]) ** 2).sum(axis=2)
    expected: dict[tuple[int, ...], float] = {}
    for one in range(5):
        for two in range(5):
            for three in range(5):
                both = np.minimum(square[one], square[two])
                chance = 0.2 * square[one, two] / square[one].sum() * both[three] / both.sum()
                if chance > 0:
                    expected[one, two, three] = chance
    num_draws, counts = 6000, dict.fromkeys(expected, 0)
    for seed in range(num_draws):
        counts[tuple(kmeans._spread_rows(points, 3, np.random.default_rng(seed)).tolist())] += 1
    deviations = [
        (counts[key] - num_draws * chance) / np.sqrt(num_draws * chance * (1 - chance))
        for key, chance in expected.items()
        if num_draws * chance > 5
    ]
    assert len(deviations) > 20 and max(map(abs, deviations)) < 4.5
    assert np.mean(np.square(deviations)) < 2


def test_k_means_plus_plus_starts_better_than_random_on_separate_clusters() -> None:
    points = mixture(0, 4000, 60, spread=0.02)
    random, spread = (fit([points], 60, num_iterations=1, seed=1, start=start) for start in ("random", "k_means++"))
    assert spread.objectives[0] > random.objectives[0] + 0.02 * len(points)


@pytest.mark.parametrize("sample_size", [1, 3, 1000])
def test_draw_takes_the_greatest_keys_of_each_cluster(sample_size: int) -> None:
    random = np.random.default_rng(0)
    cluster = random.integers(0, 9, 200)
    key = random.integers(0, 5, 200).astype(np.float32)  # with ties
    best = Drawn.none()
    for rows in np.array_split(np.arange(200), 7):
        best = kmeans.draw(best, Drawn(cluster[rows], key[rows], rows), sample_size)
    expected = [
        (int(c), int(row))
        for c in np.unique(cluster)
        for row in sorted(np.flatnonzero(cluster == c), key=lambda row: (-key[row], row))[:sample_size]
    ]
    assert list(zip(best.cluster.tolist(), best.row.tolist(), strict=True)) == expected
    assert kmeans.draw(Drawn.none(), Drawn.none(), 2).row.tolist() == []
