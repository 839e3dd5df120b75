"""A scan misses no pair: estimates stay within the slack, and all pairs that reach a floor are candidates."""

import numpy as np
import pytest
import torch

from curation.search import low_precision
from curation.search.low_precision import Codes
from tests.curation.builders import unit_vectors

WIDTHS = [1, 31, 384, 1300]
KINDS = ["random", "clustered", "one-hot", "constant", "zero", "one row"]


def of_kind(kind: str, seed: int, width: int, count: int = 90) -> np.ndarray:
    """Unit vectors, or zeros, (count, width) float32."""
    rng = np.random.default_rng(seed)
    match kind:
        case "clustered":
            matrix = unit_vectors(seed, 3, width)[rng.integers(0, 3, count)]
            matrix = matrix + rng.normal(scale=0.02 / width**0.5, size=matrix.shape)
        case "one-hot":  # a few large entries set the scale, so that the other vectors lose most precision
            matrix = np.eye(count, width) + rng.normal(scale=width**-0.5, size=(count, width))
            matrix[: min(count, width)] = np.eye(count, width)[: min(count, width)]
        case "constant":
            matrix = np.full((count, width), 0.7) * rng.choice([-1, 1], (count, 1))
        case "zero":
            matrix = unit_vectors(seed, count, width) * rng.integers(0, 2, (count, 1))
        case "one row":
            matrix = unit_vectors(seed, 1, width)
        case _:
            matrix = unit_vectors(seed, count, width)
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return (matrix / np.where(norms > 0, norms, 1)).astype(np.float32)


def padded(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.pad(values, ((0, -len(values) % low_precision.LANES), (0, 0))))


def exact_codes(matrix: np.ndarray) -> Codes:
    """Codes as on a processor without int8 units: the vectors themselves, with one scale."""
    norm = np.linalg.norm(matrix, axis=1).max(initial=0, keepdims=True).astype(np.float64)
    return Codes(padded(matrix), len(matrix), np.ones(1), norm, np.zeros(1))


def both_codes(queries: np.ndarray, vectors: np.ndarray, kind: str) -> tuple[Codes, Codes]:
    """Codes of both sides: float32, or native to this machine."""
    if kind == "float32":
        return exact_codes(queries), exact_codes(vectors)
    return low_precision.encode_rows(queries, "cpu"), low_precision.encode([vectors], "cpu")


@pytest.mark.parametrize("codes", ["native", "float32"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_hold_every_pair_that_reaches_its_floor(kind: str, width: int, codes: str) -> None:
    vectors = of_kind(kind, 0, width)
    queries = np.concatenate([of_kind(other, 1, width, 9) for other in KINDS] + [vectors[:20]])
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    estimates = low_precision.estimate(*both_codes(queries, vectors, codes))
    rng = np.random.default_rng(width)
    floors = [np.full(len(queries), floor) for floor in (-np.inf, -1.0, -0.3, 0.0, 0.6, 0.99, 1.0, 2.0)]
    floors.append(products[np.arange(len(queries)), rng.integers(0, len(vectors), len(queries))])  # just reached
    for floor in floors:
        query, row, value = estimates.candidates(floor)
        assert (row < len(vectors)).all()
        pair = query * len(vectors) + row
        assert (np.diff(pair) > 0).all(), "by query, then by row, each pair once"
        assert np.isin(np.flatnonzero(products >= floor[:, None]), pair).all()
        assert (np.abs(value - products[query, row]) <= estimates.slack[query]).all()
        assert (value >= (floor - estimates.slack)[query] - estimates.unit[query]).all(), "few other pairs"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_slack_bounds_the_rounding_of_every_product(kind: str, width: int) -> None:
    """With the lowest floor every pair is a candidate, so that every estimate is checked."""
    vectors, queries = of_kind(kind, 2, width), of_kind(kind, 3, width)
    estimates = low_precision.estimate(*both_codes(queries, vectors, "native"))
    query, row, value = estimates.candidates(np.full(len(queries), -np.inf))
    assert len(query) == len(queries) * len(vectors)
    products = np.einsum("pd,pd->p", queries[query].astype(np.float64), vectors[row].astype(np.float64))
    assert (np.abs(value - products) <= estimates.slack[query]).all()


def test_slack_is_small_for_vectors_without_large_entries() -> None:
    """With a large slack nearly all pairs would be candidates, and the scan no faster than exact products."""
    slack = low_precision.estimate(*both_codes(of_kind("random", 0, 384), of_kind("random", 1, 384), "native")).slack
    assert (slack < 0.025).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes", ["native", "fine"])
def test_floor_of_one_tile_is_at_most_the_kth_product_and_near_it(codes: str, kind: str) -> None:
    queries, vectors = of_kind("random", 1, 60, 10), of_kind(kind, 0, 60, count=200)
    encode = (
        low_precision.encode_finely
        if codes == "fine"
        else lambda matrix, device: low_precision.encode([matrix], device)
    )
    estimates = low_precision.estimate(encode(queries, "cpu"), encode(vectors, "cpu"))
    products = np.sort(queries.astype(np.float64) @ vectors.astype(np.float64).T, axis=1)[:, ::-1]
    for k in (1, 2, 40, 200, 201):
        floor = estimates.floor(k)
        if k > len(vectors):
            assert (floor == -np.inf).all()
        else:
            assert (floor <= products[:, k - 1]).all() and (floor >= products[:, k - 1] - 2 * estimates.slack).all()


@pytest.mark.parametrize("num_rows", [1, low_precision.LANES - 1, low_precision.LANES, low_precision.LANES + 1])
@pytest.mark.parametrize("codes", ["native", "float32"])
def test_rows_that_pad_a_tile_are_never_candidates(codes: str, num_rows: int) -> None:
    """Not even when every real product is negative and those of the padding would be zero."""
    vectors = np.repeat(-unit_vectors(0, 1, 20), num_rows, axis=0)
    estimates = low_precision.estimate(*both_codes(-vectors[:1], vectors, codes))
    for floor in (-np.inf, -3.0, -1.0):
        query, row, value = estimates.candidates(np.array([floor]))
        assert (query == 0).all() and row.tolist() == list(range(num_rows))
        np.testing.assert_allclose(value, -1, atol=0.05)
    best = low_precision.BestSoFar(1)
    best.add(estimates)
    assert -1.1 < best.floor()[0] <= -1


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("codes", ["native", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_floor_is_never_above_the_kth_best(kind: str, codes: str, k: int) -> None:
    queries = np.concatenate([of_kind("random", 1, 60, 10), of_kind("clustered", 0, 60, 10)])
    best, seen, before = low_precision.BestSoFar(k), np.empty((0, 60), np.float32), np.full(20, -np.inf)
    for seed in range(5):
        vectors = of_kind(kind, seed, 60, count=200)
        best.add(low_precision.estimate(*both_codes(queries, vectors, codes)))
        seen = np.concatenate([seen, vectors])
        floor = best.floor()
        products = np.sort(queries.astype(np.float64) @ seen.astype(np.float64).T, axis=1)[:, ::-1]
        if len(seen) < k:
            assert (floor == -np.inf).all()
        else:
            assert (floor <= products[:, k - 1]).all()
        assert (floor >= before - 2 * best.slack).all()
        before = floor
    if len(seen) > 500 and k < 8:
        assert (floor > products[:, 20 * k] - 4 * best.slack).all(), "seldom far below"


@pytest.mark.parametrize("codes", ["native", "float32"])
def test_taken_codes_are_the_codes_of_the_rows(codes: str) -> None:
    vectors, queries = of_kind("one-hot", 0, 40), of_kind("random", 1, 40, 9)
    query_codes, tile = both_codes(queries, vectors, codes)
    rng = np.random.default_rng(0)
    for rows in (np.arange(0), np.array([89]), rng.integers(0, 90, 70), rng.permutation(90)):
        taken = tile.take(rows)
        assert taken.num_rows == len(rows) and len(taken.values) % low_precision.LANES == 0
        assert torch.equal(taken.values[: len(rows)], tile.values[rows])
        assert not taken.values[len(rows) :].any()
        if len(rows):
            query, row, value = low_precision.estimate(query_codes, taken).candidates(np.full(9, -3.0))
            expected = low_precision.estimate(query_codes, tile).candidates(np.full(9, -3.0))[2].reshape(9, 90)
            np.testing.assert_allclose(value, expected[query, rows[row]], atol=1e-6)
            assert len(query) == 9 * len(rows)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_blocks_of_one_matrix_have_the_codes_of_the_whole(dtype: type) -> None:
    vectors: np.ndarray = of_kind("one-hot", 0, 30, 130).astype(dtype)
    whole = low_precision.encode([vectors], "cpu")
    for bounds in ([0], [64], [1, 1, 100]):
        parts = low_precision.encode(np.split(vectors, bounds), "cpu")
        assert parts.num_rows == 130 and torch.equal(parts.values, whole.values)
        for name in ("scale", "norm", "residual"):
            assert getattr(parts, name) == getattr(whole, name)


# Whole numbers


def nearest_by_products(matrix: np.ndarray, cells: np.ndarray, k: int) -> np.ndarray:
    """Brute force over the products of whole numbers, ties by row; each row of `matrix` has its own scale."""
    codes = low_precision.whole_number_codes(cells, "cpu")
    right = codes.values[: codes.num_rows, : cells.shape[1]].numpy().astype(np.int64)
    peak = np.abs(matrix).max(axis=1, keepdims=True)
    left = np.rint(matrix * (np.float32(127) / np.where(peak > 0, peak, 127))).astype(np.int64)
    return np.argsort(-(left @ right.T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("width", [1, 100, 1300])
@pytest.mark.parametrize("kind", KINDS)
def test_nearest_by_codes_are_those_of_the_products_with_ties_by_row(kind: str, width: int) -> None:
    cells, matrix = of_kind(kind, 0, width), of_kind("random", 1, width, 33)
    codes = low_precision.whole_number_codes(cells, "cpu")
    for step in (len(cells), 20):
        tiles = [codes.take(np.arange(start, min(start + step, len(cells)))) for start in range(0, len(cells), step)]
        for k in {1, 5, len(cells)}:
            expected = nearest_by_products(matrix, cells, k)
            np.testing.assert_array_equal(low_precision.nearest_by_codes(matrix, tiles, k), expected)


def test_nearest_by_codes_are_nearly_the_nearest() -> None:
    cells, matrix = unit_vectors(0, 200, 64), unit_vectors(1, 50, 64)
    rows = low_precision.nearest_by_codes(matrix, [low_precision.whole_number_codes(cells, "cpu")], 10)
    products = matrix @ cells.T
    best = np.sort(products, axis=1)[:, :-11:-1]
    np.testing.assert_allclose(np.take_along_axis(products, rows, axis=1), best, atol=0.03)


@pytest.mark.parametrize("width", [1, 1040, 1041, 4096])
def test_whole_numbers_on_other_devices_have_exact_products(width: int) -> None:
    """For the largest codes as well: in float32 while no sum can exceed 2**24, in float64 above."""
    rng = np.random.default_rng(width)
    matrix = np.concatenate([np.full((1, width), -1), rng.choice([-1, 1], (30, width)), rng.normal(size=(30, width))])
    matrix = matrix.astype(np.float32)
    dtype = low_precision.whole_number_codes(matrix, "meta").values.dtype  # any device but the CPU
    assert dtype == (torch.float32 if width <= 1040 else torch.float64)
    codes = low_precision.whole_number_codes(matrix, "cpu").values
    assert int(codes.min()) == -127
    whole = codes.numpy().astype(np.int64)
    np.testing.assert_array_equal(torch.mm(codes.to(dtype), codes.to(dtype).T).numpy(), whole @ whole.T)
