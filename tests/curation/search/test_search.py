"""Search equals brute force for any cut of the vectors into blocks; approximate search does so among shared cells."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from curation.errors import ConfigError, DeviceError
from curation.search import exact, ivf, low_precision
from curation.search.config import SearchConfig
from curation.search.ivf import CellLists, CodedLists
from curation.search.parts import PartSearch
from tests.curation.builders import unit_vectors


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities in float64 and rows of the k nearest, ties to the smallest row."""
    similarity = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, axis=1), rows


def all_scores(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The similarities (Q, N) of all pairs, scored one by one in float32."""
    query, row = np.indices((len(queries), len(vectors))).reshape(2, -1)
    return exact.pair_similarity(queries, query, vectors, row).reshape(len(queries), len(vectors))


def best_of(scores: np.ndarray, k: int, floor: float = -np.inf) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best of each row (Q, N) that reach the floor, ties to the first, padded as by `exact.search`."""
    scores = np.where(scores >= np.float32(floor), scores, -np.inf)
    scores = np.pad(scores, ((0, 0), (0, max(0, k - scores.shape[1]))), constant_values=-np.inf)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    similarity = np.take_along_axis(scores, rows, axis=1).astype(np.float32)
    return similarity, np.where(similarity > -np.inf, rows, -1)


def assert_equal(result: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Assert that rows are equal, and similarities to the last bit."""
    np.testing.assert_array_equal(result[1], expected[1])
    np.testing.assert_array_equal(result[0], expected[0])


def clustered(seed: int, count: int, width: int, num_clusters: int, spread: float = 0.3) -> np.ndarray:
    """Unit vectors around some directions, in clusters of unequal sizes."""
    rng = np.random.default_rng(seed)
    which = np.minimum(rng.geometric(3 / num_clusters, count) - 1, num_clusters - 1)
    matrix = unit_vectors(seed + 1000, num_clusters, width)[which]
    matrix = matrix + rng.normal(scale=spread / width**0.5, size=matrix.shape).astype(np.float32)
    unit: np.ndarray = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return unit


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def grid_vectors(rng: np.random.Generator, count: int, width: int, distinct: int) -> np.ndarray:
    """Vectors of entries -1, 0 and 1 from a small set: sums are exact in any order, and many vectors are equal."""
    return rng.integers(-1, 2, (distinct, width))[rng.integers(0, distinct, count)].astype(np.float32)


def cut(rng: np.random.Generator, vectors: np.ndarray, parts: int) -> list[np.ndarray]:
    """`vectors` cut into blocks at random rows; some blocks are empty."""
    return np.split(vectors, np.sort(rng.integers(0, len(vectors) + 1, parts)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("seed", range(12))
def test_search_equals_brute_force(seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    count, width, k = int(rng.integers(1, 2000)), int(rng.choice([2, 16, 100])), int(rng.choice([1, 4, 64]))
    vectors: np.ndarray = unit_vectors(seed, count, width).astype(dtype)
    queries = np.concatenate([vectors[:5], unit_vectors(seed + 100, 40, width).astype(dtype)])
    expected, _ = brute_force(queries, vectors, k)
    similarity, rows = exact.search(queries, cut(rng, vectors, 3), k)
    assert similarity.shape == rows.shape == (len(queries), k)
    assert similarity.dtype == np.float32 and rows.dtype == np.int64
    num_found = min(k, count)
    np.testing.assert_allclose(similarity[:, :num_found], expected, atol=1e-5)
    of_rows = np.einsum("qd,qkd->qk", queries.astype(np.float64), vectors.astype(np.float64)[rows[:, :num_found]])
    np.testing.assert_allclose(similarity[:, :num_found], of_rows, atol=1e-5)
    assert all(len(set(row)) == num_found for row in rows[:, :num_found].tolist())
    assert (np.diff(similarity, axis=1)[:, : num_found - 1] <= 0).all()
    assert (rows[:, num_found:] == -1).all() and (similarity[:, num_found:] == -np.inf).all()


@pytest.mark.parametrize("k", [1, 5, 120])
@pytest.mark.parametrize("seed", range(8))
def test_ties_are_ranked_by_row(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = grid_vectors(rng, int(rng.integers(k, 3000)), 12, distinct=int(rng.integers(1, 60)))
    queries = grid_vectors(rng, 20, 12, distinct=20)
    expected, expected_rows = brute_force(queries, vectors, k)
    for blocks in ([vectors], cut(rng, vectors, 4)):
        similarity, rows = exact.search(queries, blocks, k)
        np.testing.assert_array_equal(similarity, expected)
        np.testing.assert_array_equal(rows, expected_rows)


@pytest.mark.parametrize("seed", range(8))
def test_all_copies_are_found_in_order_when_k_is_large_enough(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distinct = unit_vectors(seed, int(rng.integers(30, 60)), int(rng.choice([37, 256]))).astype(np.float16)
    which = rng.integers(0, len(distinct), 1500)
    rows = exact.search(distinct, [distinct[which]], 100)[1]
    for number, neighbors in enumerate(rows):
        copies = np.flatnonzero(which == number)  # nothing is nearer to a vector than itself
        np.testing.assert_array_equal(neighbors[: len(copies)], copies)


@pytest.mark.parametrize("seed", range(2))
def test_blocks_change_no_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit_vectors(seed, 1500, 130).astype(np.float16)
    queries = unit_vectors(seed + 50, 33, 130)
    similarity, rows = exact.search(queries, [vectors], 10)
    for blocks in (cut(rng, vectors, 6), np.array_split(vectors, 20), iter([vectors[:0], vectors])):
        again = exact.search(queries, blocks, 10)
        assert again[0].tobytes() == similarity.tobytes()
        assert again[1].tobytes() == rows.tobytes()
    one_by_one = [exact.search(query[None], [vectors], 10) for query in queries]
    assert np.concatenate([rows for _, rows in one_by_one]).tobytes() == rows.tobytes()
    assert np.concatenate([similarity for similarity, _ in one_by_one]).tobytes() == similarity.tobytes()


def test_more_queries_than_are_searched_at_a_time() -> None:
    queries, vectors = unit_vectors(0, 2051, 3), unit_vectors(1, 7, 3)
    expected, rows = brute_force(queries, vectors, 2)
    result = exact.search(queries, [vectors[:4], vectors[4:]], 2)
    np.testing.assert_allclose(result[0], expected, atol=1e-6)
    np.testing.assert_array_equal(result[1], rows)


@pytest.mark.parametrize("blocks", [[], [np.empty((0, 4), np.float16)], [np.empty((0, 4), np.float32)] * 3])
def test_search_without_vectors(blocks: list[np.ndarray]) -> None:
    similarity, rows = exact.search(unit_vectors(0, 3, 4), blocks, 2)
    assert (similarity == -np.inf).all() and (rows == -1).all() and rows.shape == (3, 2)


def test_search_without_queries() -> None:
    similarity, rows = exact.search(np.empty((0, 4), np.float16), [unit_vectors(0, 3, 4)], 2)
    assert similarity.shape == rows.shape == (0, 2)


def test_pair_similarity_is_the_inner_product_of_each_pair() -> None:
    left, right = unit_vectors(0, 30, 20).astype(np.float16), unit_vectors(1, 40, 20).astype(np.float16)
    rng = np.random.default_rng(0)
    rows, others = rng.integers(0, 30, exact.PAIR_BLOCK + 5), rng.integers(0, 40, exact.PAIR_BLOCK + 5)
    similarity = exact.pair_similarity(left, rows, right, others)
    expected = np.einsum("pd,pd->p", left[rows].astype(np.float64), right[others].astype(np.float64))
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    assert exact.pair_similarity(left, rows[:0], right, others[:0]).shape == (0,)


@pytest.mark.parametrize("seed", range(3))
def test_bits_of_a_pair_depend_only_on_the_pair(seed: int, threads: None) -> None:
    rng = np.random.default_rng(seed)
    width = int([1, 385, 64][seed])
    left, right = unit_vectors(seed, 60, width), unit_vectors(seed + 50, 70, width).astype(np.float16)
    rows, others = rng.integers(0, 60, 200), rng.integers(0, 70, 200)
    similarity = exact.pair_similarity(left, rows, right, others)
    one_by_one = [exact.pair_similarity(left, rows[p : p + 1], right, others[p : p + 1]) for p in range(200)]
    assert np.concatenate(one_by_one).tobytes() == similarity.tobytes()
    order = rng.permutation(200)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        assert exact.pair_similarity(left, rows[order], right, others[order]).tobytes() == similarity[order].tobytes()
        swapped = exact.pair_similarity(right.astype(np.float32), others, left, rows)
        np.testing.assert_array_equal(swapped, similarity)
        repeated = exact.pair_similarity(left, np.repeat(rows[:1], 100), right, np.repeat(others[:1], 100))
        assert (repeated == similarity[0]).all()


# Search: floors, tiles, blocks, threads


@pytest.mark.parametrize("floor", [-2.0, -1.0, -0.2, 0.0, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_vectors_below_the_floor_are_left_out(seed: int, floor: float) -> None:
    """Over several tiles; vectors of the grid have products equal to a floor."""
    rng = np.random.default_rng(seed)
    vectors = [clustered(seed, 1500, 24, 40), grid_vectors(rng, 1100, 24, 400) / np.float32(4)][seed % 2]
    queries = np.concatenate([vectors[:10], -vectors[:10], unit_vectors(seed, 10, 24)])
    scores = all_scores(queries, vectors)
    for k in (1, 3, 50, 2000):
        assert_equal(exact.search(queries, cut(rng, vectors, 2), k, floor=floor), best_of(scores, k, floor))


def test_more_vectors_than_are_held_at_a_time() -> None:
    num_rows = exact.BLOCK_ROWS + 3000
    vectors, queries = unit_vectors(0, num_rows, 3).astype(np.float16), unit_vectors(1, 2, 3)
    vectors[-5:] = vectors[:5]  # copies in the second block come second
    queries = np.concatenate([queries, vectors[:5].astype(np.float32)])
    for floor in (-np.inf, 0.9995):
        result = exact.search(queries, np.array_split(vectors, 7), 3, floor=floor)
        assert_equal(result, best_of(all_scores(queries, vectors), 3, floor))


def test_more_queries_and_vectors_than_one_product_takes() -> None:
    queries, vectors = clustered(0, 2300, 16, 30), clustered(0, 2500, 16, 30).astype(np.float16)
    assert len(queries) > low_precision.QUERY_ROWS["cpu"] and len(vectors) > 2 * low_precision.TILE_ROWS["cpu"]
    similarity, rows = exact.search(queries, [vectors], 7)
    some = np.r_[:20, 2040:2060, 2290:2300]  # of both parts of the queries
    assert_equal((similarity[some], rows[some]), best_of(all_scores(queries[some], vectors), 7))


@pytest.mark.parametrize("kind", ["random", "clustered", "one-hot", "constant", "opposite", "zero"])
@pytest.mark.parametrize("width", [1, 90])
def test_search_is_exact_for_all_kinds_of_vectors(kind: str, width: int) -> None:
    match kind:
        case "clustered":
            vectors = clustered(3, 1200, width, 12, spread=0.01)
        case "one-hot":
            vectors = np.eye(1200, width, dtype=np.float32)[np.random.default_rng(0).permutation(1200)]
        case "constant":
            vectors = np.full((1200, width), width**-0.5, np.float32)
        case "opposite":
            vectors = np.repeat([[1.0], [-1.0]], 600, axis=0).astype(np.float32) * unit_vectors(0, 1, width)
        case "zero":
            vectors = np.zeros((1200, width), np.float32)
        case _:
            vectors = unit_vectors(3, 1200, width)
    queries = np.concatenate([vectors[:3], vectors[-3:], -vectors[:2], unit_vectors(4, 5, width)])
    scores = all_scores(queries, vectors)
    for k in (1, 6, 1300):
        assert_equal(exact.search(queries, [vectors], k), best_of(scores, k))


def test_number_of_threads_changes_no_bit(threads: None) -> None:
    vectors, queries = clustered(0, 3000, 257, 50).astype(np.float16), clustered(1, 100, 257, 50)
    cells = unit_vectors(5, 40, 257)

    def all_results() -> list[np.ndarray]:
        visits = ivf.cells_of(vectors, cells, 3)
        queries_in = CellLists.of(np.arange(100), ivf.cells_of(queries, cells, 1)[:, 0], 40)
        vectors_in = CellLists.of(np.repeat(np.arange(3000), 3), visits.reshape(-1), 40)
        in_cells = ivf.search_cells(queries, [queries_in], vectors, vectors_in, 8)
        return [*exact.search(queries, [vectors], 8), *exact.assign(vectors, queries), visits, *in_cells]

    torch.set_num_threads(1)
    with_one = all_results()
    torch.set_num_threads(2)
    assert [array.tobytes() for array in all_results()] == [array.tobytes() for array in with_one]


# Assignment


@pytest.mark.parametrize("kind", ["random", "clustered", "tied", "zero among them", "all zero", "one"])
@pytest.mark.parametrize("seed", range(2))
def test_assign_gives_the_first_of_the_nearest(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centroids = unit_vectors(seed, int(rng.choice([3, 1100])), 20)
    match kind:
        case "clustered":
            centroids = clustered(seed, len(centroids), 20, 30)
        case "tied":
            centroids = grid_vectors(rng, len(centroids), 20, distinct=30)
        case "zero among them":
            centroids[rng.integers(0, len(centroids), 3)] = 0
        case "all zero":
            centroids[:] = 0
        case "one":
            centroids = centroids[:1]
    vectors = np.concatenate([clustered(seed, 50, 20, 30), grid_vectors(rng, 40, 20, 50) / 4, -centroids[:9]])
    for dtype in (np.float16, np.float32):
        points: np.ndarray = vectors.astype(dtype)
        scores = all_scores(points, centroids)
        expected = scores.argmax(axis=1), scores.max(axis=1)
        guesses = [None, expected[0], np.zeros(len(points), np.int64), rng.integers(0, len(centroids), len(points))]
        for guess in guesses:
            cluster, similarity = exact.assign(points, centroids, guess=guess)
            np.testing.assert_array_equal(cluster, expected[0])
            assert similarity.tobytes() == expected[1].tobytes()


def test_assign_takes_no_vectors_and_more_than_one_product_takes() -> None:
    vectors, centroids = unit_vectors(0, 2100, 5), unit_vectors(1, 11, 5)
    cluster, similarity = exact.assign(vectors, centroids)
    np.testing.assert_array_equal(cluster, all_scores(vectors, centroids).argmax(axis=1))
    halves = [exact.assign(half, centroids) for half in np.array_split(vectors, 2)]
    assert np.concatenate([cluster for cluster, _ in halves]).tobytes() == cluster.tobytes()
    assert np.concatenate([similarity for _, similarity in halves]).tobytes() == similarity.tobytes()
    assert [array.shape for array in exact.assign(vectors[:0], centroids)] == [(0,), (0,)]


# Cells


def test_visited_cells_are_nearly_the_nearest() -> None:
    vectors, cells = unit_vectors(0, 2100, 48), unit_vectors(1, 70, 48)
    similarity = vectors @ cells.T
    for num_probes in (1, 4, 70):
        visits = ivf.cells_of(vectors, cells, num_probes)
        assert visits.shape == (2100, num_probes)
        best = -np.sort(-similarity, axis=1)[:, :num_probes]
        np.testing.assert_allclose(np.take_along_axis(similarity, visits, axis=1), best, atol=0.03)
    np.testing.assert_array_equal(np.sort(visits, axis=1), np.tile(np.arange(70), (2100, 1)))


def test_cells_in_more_than_one_tile_and_equal_cells() -> None:
    cells = np.repeat(unit_vectors(0, 5, 4), 1700, axis=0)  # five cells, 1,700 times each
    assert len(cells) > ivf.CELLS_PER_TILE
    visits = ivf.cells_of(cells[::1700], cells, 3)
    np.testing.assert_array_equal(visits, np.arange(5)[:, None] * 1700 + np.arange(3))


@pytest.mark.parametrize("seed", range(4))
def test_cells_of_a_vector_depend_on_no_other_vector(seed: int) -> None:
    """Copies of an image lie in several files, next to different images; all must visit the same cells."""
    vectors, cells = unit_vectors(seed, 300, 16), unit_vectors(seed + 9, 400, 16)
    visits = ivf.cells_of(vectors, cells, 20)
    for part in (slice(0, 1), slice(10, 12), slice(100, 200)):
        np.testing.assert_array_equal(ivf.cells_of(vectors[part], cells, 20), visits[part])
    spiked = np.concatenate([vectors, np.eye(1, 16, dtype=np.float32)])
    np.testing.assert_array_equal(ivf.cells_of(spiked, cells, 20)[:300], visits)
    assert ivf.cells_of(vectors[:0], cells, 20).shape == (0, 20)


@pytest.mark.parametrize("seed", range(5))
def test_lists_hold_every_pair_once_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_cells, count = int(rng.integers(1, 20)), int(rng.integers(0, 200))
    pairs = {(int(cell), int(row)) for cell, row in rng.integers(0, (num_cells, 50), (count, 2))}
    order = rng.permutation(len(pairs))
    cells, rows = np.array(sorted(pairs), np.int64).reshape(-1, 2)[order].T
    lists = CellLists.of(rows, cells, num_cells)
    for cell in range(num_cells):
        assert lists.of_cell(cell).tolist() == sorted(row for row_cell, row in pairs if row_cell == cell)
    assert len(lists.starts) == num_cells + 1 and lists.starts[-1] == len(pairs)


def sharing(rng: np.random.Generator, num_rows: int, num_cells: int, each: int) -> tuple[CellLists, np.ndarray]:
    """Lists with every row in `each` cells, most often the first few; and the same as (num_rows, num_cells) bool."""
    weight = rng.random(num_cells) ** 6
    cells = np.argsort(-(weight + 0.3 * rng.random((num_rows, num_cells))), axis=1)[:, :each]
    inside = np.zeros((num_rows, num_cells), bool)
    np.put_along_axis(inside, cells, True, axis=1)
    return CellLists.of(np.repeat(np.arange(num_rows), each), cells.reshape(-1), num_cells), inside


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", ["random", "clustered", "tied"])
@pytest.mark.parametrize("seed", range(2))
def test_search_cells_finds_the_nearest_vectors_that_share_a_cell(
    seed: int, kind: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    if seed == 1:  # cells in several tiles, and pairs that are scored in many batches
        monkeypatch.setitem(low_precision.CELL_ROWS, "cpu", 300)
        monkeypatch.setattr(ivf, "WAITING_PAIRS", 500)

    def make(count: int) -> np.ndarray:
        match kind:
            case "clustered":
                matrix = clustered(7, count, 40, 15)
            case "tied":
                matrix = grid_vectors(np.random.default_rng(7), count, 40, 30) / np.float32(6)
            case _:
                matrix = unit_vectors(int(rng.integers(1000)), count, 40)
        converted: np.ndarray = matrix.astype(dtype)
        return converted

    queries, vectors = make(60), make(2500)
    queries_in, asks = sharing(rng, 60, 25, 1)
    vectors_in, holds = sharing(rng, 2500, 25, 5)
    scores = np.where(asks.astype(int) @ holds.T.astype(int), all_scores(queries, vectors), -np.inf)
    assert np.diff(vectors_in.starts).max() > 1000 and not np.diff(queries_in.starts).all()
    for k, floor in ((1, -np.inf), (5, 0.2), (60, -1.0), (2501, 0.0)):
        result = ivf.search_cells(queries, [queries_in], vectors, vectors_in, k, floor=floor)
        assert_equal(result, best_of(scores, k, floor))


@pytest.mark.parametrize("seed", range(3))
def test_search_cells_with_queries_in_several_cells(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, vectors = clustered(seed, 150, 30, 20), clustered(seed + 1, 700, 30, 20)
    queries_in, asks = sharing(rng, 150, 12, 4)
    vectors_in, holds = sharing(rng, 700, 12, 1)
    scores = np.where(asks.astype(int) @ holds.T.astype(int), all_scores(queries, vectors), -np.inf)
    ranks = np.concatenate([rng.permutation(4) for _ in range(150)])  # decides in which of two lists a visit stands
    rows, cells = np.nonzero(asks)
    visits = [CellLists.of(rows[now], cells[now], 12) for now in (ranks == 0, ranks > 0)]
    for k in (1, 9, 701):
        assert_equal(ivf.search_cells(queries, [queries_in], vectors, vectors_in, k), best_of(scores, k))
        assert_equal(ivf.search_cells(queries, visits, vectors, vectors_in, k), best_of(scores, k))


def test_search_of_all_cells_is_the_exact_search() -> None:
    queries, vectors, cells = clustered(0, 90, 30, 20), clustered(1, 800, 30, 20), unit_vectors(2, 9, 30)
    members = CellLists.of(np.arange(800), ivf.cells_of(vectors, cells, 1)[:, 0], 9)
    asking = CellLists.of(np.repeat(np.arange(90), 9), ivf.cells_of(queries, cells, 9).reshape(-1), 9)
    assert_equal(ivf.search_cells(queries, [asking], vectors, members, 10), exact.search(queries, [vectors], 10))


@pytest.mark.parametrize(("num_queries", "num_vectors"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_search_cells_of_no_vectors_and_of_one(num_queries: int, num_vectors: int) -> None:
    queries, vectors = unit_vectors(0, num_queries, 6), unit_vectors(0, num_vectors, 6)
    in_first = [CellLists.of(np.arange(n), np.zeros(n, np.int64), 3) for n in (num_queries, num_vectors)]
    similarity, rows = ivf.search_cells(queries, [in_first[0]], vectors, in_first[1], 2)
    assert similarity.shape == rows.shape == (num_queries, 2)
    if num_queries and num_vectors:
        assert rows.tolist() == [[0, -1]] and similarity[0] == pytest.approx([1, -np.inf])
    else:
        assert (rows == -1).all() and (similarity == -np.inf).all()


# Product quantization


def coded(vectors: np.ndarray, *, seed: int = 0, **settings: object) -> CodedLists:
    config = SearchConfig.model_validate({"backend": "ivf", "codes": "pq", "pq_bytes": 8} | settings)
    return CodedLists(vectors, config, seed=seed)


def test_coded_lists_find_nearly_all_and_score_exactly() -> None:
    vectors = clustered(0, 2000, 32, 60, spread=0.5).astype(np.float16)
    queries = clustered(0, 2200, 32, 60, spread=0.5)[2000:]
    nearest = exact.search(queries, [vectors], 10)
    similarity, rows = coded(vectors, rows_per_cell=100, num_probes=8, overfetch=8).search(queries, 10)
    hits = [len(set(one) & set(other)) for one, other in zip(rows.tolist(), nearest[1].tolist(), strict=True)]
    assert sum(hits) >= 0.95 * rows.size
    scores = all_scores(queries, vectors)
    assert np.take_along_axis(scores, rows, axis=1).tobytes() == similarity.tobytes()
    assert (np.diff(similarity, axis=1) <= 0).all()
    assert all(len(set(neighbors)) == 10 for neighbors in rows.tolist())


def test_coded_lists_that_fetch_everything_are_exact() -> None:
    vectors, queries = clustered(0, 700, 16, 20), clustered(1, 40, 16, 20)
    lists = coded(vectors, rows_per_cell=100, num_probes=7, overfetch=70)
    assert_equal(lists.search(queries, 10), exact.search(queries, [vectors], 10))
    assert_equal(lists.search(queries, 800), exact.search(queries, [vectors], 800))


@pytest.mark.parametrize("num_vectors", [1, 200, 255, 256])
def test_a_part_too_small_for_codes_is_searched_exactly(num_vectors: int) -> None:
    vectors, queries = clustered(0, num_vectors, 16, 20).astype(np.float16), clustered(1, 40, 16, 20)
    config = SearchConfig(backend="ivf", codes="pq", pq_bytes=8, num_probes=100, overfetch=100)
    part = PartSearch(config, [vectors])
    assert_equal(part.search(queries, 4), exact.search(queries, [vectors], 4))


def test_coded_lists_with_short_lists_and_no_queries() -> None:
    vectors = clustered(0, 600, 16, 20)
    lists = coded(vectors, rows_per_cell=20, num_probes=1, overfetch=4)
    similarity, rows = lists.search(vectors[:50], 500)
    is_row = rows >= 0
    assert is_row.any(axis=1).all() and not is_row[:, -1].any()
    assert (np.diff(is_row.astype(int), axis=1) <= 0).all(), "the padding comes last"
    assert (similarity[~is_row] == -np.inf).all()
    assert [array.shape for array in lists.search(vectors[:0], 3)] == [(0, 3), (0, 3)]


def test_coded_lists_of_equal_seeds_give_equal_results() -> None:
    vectors, queries = clustered(0, 1000, 16, 20), unit_vectors(1, 100, 16)
    lists = [coded(vectors, rows_per_cell=50, num_probes=2, overfetch=1, seed=seed) for seed in (3, 3, 4)]
    results = [each.search(queries, 5) for each in lists]
    assert_equal(results[0], results[1])
    assert (results[0][1] != results[2][1]).any()


def test_codes_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"search\.pq_bytes is 8, which does not divide the vectors' width of 20"):
        coded(unit_vectors(0, 300, 20))


@pytest.mark.skipif(ivf.has_gpu_code(), reason="for a build of faiss for the CPU")
def test_lists_of_codes_on_a_gpu_need_a_build_of_faiss_for_gpus() -> None:
    with pytest.raises(DeviceError, match="pip uninstall faiss-cpu, then pip install faiss-gpu"):
        coded(unit_vectors(0, 300, 16), device="cuda")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_probes": 2049}, "num_probes is 2049; faiss on a GPU takes 2048 at most"),
        ({"pq_bytes": 7}, "pq_bytes is 7; faiss on a GPU takes 1, 2, 3, 4, 8"),
    ],
)
def test_settings_that_faiss_lacks_on_a_gpu_are_refused_at_once(settings: dict[str, int], message: str) -> None:
    refused = {"backend": "ivf", "codes": "pq", "device": "cuda"} | settings
    with pytest.raises(ValidationError, match=message):
        SearchConfig.model_validate(refused)
    for change in ({"device": "cpu"}, {"codes": "flat"}, {"num_probes": 2048, "pq_bytes": 96}):
        SearchConfig.model_validate(refused | change)


@pytest.mark.parametrize(("num_vectors", "num_cells"), [(0, 1), (1, 1), (49, 1), (1000, 10), (1049, 10), (1051, 11)])
def test_number_of_cells_follows_the_number_of_vectors(num_vectors: int, num_cells: int) -> None:
    assert SearchConfig(rows_per_cell=100).num_cells(num_vectors) == num_cells
