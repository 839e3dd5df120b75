"""The axes agree with numpy's singular vectors, and their bits depend on nothing but the vectors."""

import numpy as np
import pytest

from curation.report import principal_axes
from curation.report.principal_axes import fit, project
from tests.curation.builders import unit_vectors


def spread(seed: int, count: int, width: int = 16) -> np.ndarray:
    """Unit vectors (count, width) float16, with a different spread along each dimension."""
    matrix = unit_vectors(seed, count, width) * np.linspace(1, 3, width)
    unit: np.ndarray = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
    return unit


@pytest.mark.parametrize("width", [2, 3, 16, 64])
def test_agrees_with_the_singular_vectors(width: int) -> None:
    matrix = spread(1, 500, width)
    centered = matrix.astype(np.float64) - matrix.astype(np.float64).mean(axis=0)
    directions = np.linalg.svd(centered, full_matrices=False)[2][:2].T
    directions *= np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(2)])
    axes = fit([matrix])
    assert np.abs(axes.directions - directions).max() < 1e-3
    places = project(matrix, axes)
    assert places.dtype == np.float32 and np.abs(places - centered @ directions).max() < 1e-3
    assert places[:, 0].var() > places[:, 1].var() > 0
    assert np.abs(places.mean(axis=0)).max() < 1e-4


def test_the_order_of_the_vectors_and_of_their_parts_changes_no_bit() -> None:
    matrix = spread(2, 3000)
    expected = fit([matrix])
    order = np.random.default_rng(0).permutation(len(matrix))
    for parts in ([matrix[order]], np.array_split(matrix, 7), [matrix[:0], matrix[1000:], matrix[:1000]]):
        axes = fit(parts)
        assert axes.directions.tobytes() == expected.directions.tobytes()
        assert axes.offset.tobytes() == expected.offset.tobytes()
    assert (np.rint(expected.directions * 2**20) == expected.directions * 2**20).all()  # so that projections are exact
    alone = np.concatenate([project(row[None], expected) for row in matrix])
    assert alone.tobytes() == project(matrix, expected).tobytes()
    reversed_columns = project(
        matrix[:, ::-1], principal_axes.Axes(np.ascontiguousarray(expected.directions[::-1]), expected.offset)
    )
    assert reversed_columns.tobytes() == project(matrix, expected).tobytes()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_vectors_lie_at_zero(count: int) -> None:
    matrix = np.repeat(spread(3, 1), count, axis=0)
    places = project(matrix, fit([matrix]))
    assert places.tobytes() == np.zeros((count, 2), np.float32).tobytes()  # no negative zeros either


def test_two_vectors_lie_on_the_first_axis() -> None:
    matrix = spread(4, 2)
    places = project(matrix, fit([matrix]))
    assert not places[:, 1].any()
    assert places[0, 0] == pytest.approx(-places[1, 0], abs=1e-4) and abs(places[0, 0]) > 0.1


def test_vectors_of_one_dimension() -> None:
    matrix = np.array([[1], [-1], [1]], np.float16)
    places = project(matrix, fit([matrix]))
    assert places[:, 0] == pytest.approx([2 / 3, -4 / 3, 2 / 3], abs=1e-4) and not places[:, 1].any()


def test_a_fit_ends_at_the_largest_number_with_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = spread(5, 100)
    monkeypatch.setattr(principal_axes, "MAX_VECTORS", 60)
    axes = fit([matrix[:40], matrix[40:80], matrix[80:]])
    assert axes.directions.tobytes() == fit([matrix[:60]]).directions.tobytes()
