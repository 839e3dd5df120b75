"""The two axes of greatest variance of unit vectors (principal component analysis), with equal bits everywhere.

Every sum is exact. Therefore the order of the vectors, the runner and the number of threads change no bit:

    fitting       coordinates are rounded to multiples of 2^-16, so products are multiples of 2^-32. Their sums over
                  MAX_VECTORS unit vectors lie below 2^20: 52 of the 53 bits of float64.
    projection    coordinates are float16, so multiples of 2^-24. Axes are rounded to multiples of 2^-20. Products are
                  multiples of 2^-44, and their sums lie below 2.

Only the eigenvectors are inexact, and one process computes them. The rounding of the axes removes the digits that the
number of BLAS threads changes, unless two of the largest variances are equal.

Legend: N vectors, D dimensions.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from curation.files.disk_arrays import blocks

# Maximum vectors of a fit; see above.
MAX_VECTORS = 1 << 20
NUM_AXES = 2
# Vectors of a sum at a time: 84 MB at 1,280 dimensions. Assumed.
SUMMED_ROWS = 8192
_COORDINATE_STEPS = 2.0**16
_AXIS_STEPS = 2.0**20
# Variance below which an axis is zero. Assumed: above the rounding of the covariance (1e-16), and far below the
# variance of any set of different images.
_MIN_VARIANCE = 1e-12


@dataclass(frozen=True)
class Axes:
    """Axes and the place of the mean on them."""

    directions: np.ndarray  # (D, NUM_AXES) float64, unit length; zero for an axis without variance
    offset: np.ndarray  # (NUM_AXES,) float64


def fit(matrices: Iterable[np.ndarray]) -> Axes:
    """The axes of the vectors of `matrices` (N, D), of which the first MAX_VECTORS count; at least one.

    The axis of greatest variance comes first. The coordinate of greatest magnitude of each axis is positive.
    """
    count = 0
    sums, products = np.zeros(0), np.zeros((0, 0))
    for matrix in matrices:
        matrix = matrix[: MAX_VECTORS - count]
        if not len(matrix):
            continue
        if not count:
            sums, products = np.zeros(matrix.shape[1]), np.zeros((matrix.shape[1],) * 2)
        count += len(matrix)
        for start in range(0, len(matrix), SUMMED_ROWS):
            rounded = np.rint(matrix[start : start + SUMMED_ROWS].astype(np.float64) * _COORDINATE_STEPS)
            sums += rounded.sum(axis=0)
            products += rounded.T @ rounded
    assert count, "no vectors"
    mean = sums / count / _COORDINATE_STEPS
    covariance = products / count / _COORDINATE_STEPS**2 - np.outer(mean, mean)
    width = len(mean)
    num_axes = min(NUM_AXES, width)
    variances, vectors = scipy.linalg.eigh(covariance, subset_by_index=[width - num_axes, width - 1])
    directions = np.zeros((width, NUM_AXES))
    for axis in range(num_axes):
        if variances[num_axes - 1 - axis] > _MIN_VARIANCE:
            direction = np.rint(vectors[:, num_axes - 1 - axis] * _AXIS_STEPS) / _AXIS_STEPS
            directions[:, axis] = direction * np.sign(direction[np.argmax(np.abs(direction))])
    return Axes(directions, np.array([math.fsum(mean * directions[:, axis]) for axis in range(NUM_AXES)]))


def project(matrix: np.ndarray, axes: Axes) -> np.ndarray:
    """The place (N, NUM_AXES) float32 of each of the vectors (N, D) float16, with the mean at 0."""
    places = np.empty((len(matrix), NUM_AXES), np.float32)
    for part in blocks(len(matrix)):
        places[part] = matrix[part].astype(np.float64) @ axes.directions - axes.offset
    return places + np.float32(0)  # no negative zeros
