"""The order of the samples: a permutation of every epoch that is computed and never stored.

Position p = step * batch_size + i counts all samples that training draws. With R samples, epoch e = p // R has R
positions. Its order is drawn from (seed, e), so any step can be the first.

With weights, an epoch has each sample floor(x) or ceil(x) times, where x is R times its share of all weight. This is
systematic sampling: shuffled index k stands for the sample whose interval of the cumulative weights holds k + u. The
shift u is one number for an epoch and moves by the golden ratio from epoch to epoch. Over e epochs a sample then comes
e * x times, give or take one or two. Equal weights give each sample exactly once.

Legend: R samples, P positions.
"""

from typing import final

import numpy as np
from numpy.typing import NDArray

from curation.files.hashes import split_mix_rounds

# Purposes of generators, a part of their seeds: any numbers that differ from each other and from those in data.py and
# masking.py.
ORDER_PURPOSE, SHIFT_PURPOSE = 0x6F72, 0x7368
# Rounds of the Feistel network. Cited: Luby and Rackoff (1988) prove that four are enough with good round functions.
# Assumed: eight make up for cheap round functions on small sets.
ROUNDS = 8
GOLDEN_RATIO = 0.6180339887498949


@final
class SampleOrder:
    """The sample at each position; see the top of this module."""

    def __init__(self, seed: int, num_samples: int, cumulative_weights: NDArray[np.float64] | None = None) -> None:
        self._seed, self.num_samples, self._cumulative_weights = seed, num_samples, cumulative_weights
        self._first_shift = float(np.random.default_rng([seed, SHIFT_PURPOSE]).random())

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows (P,) in the list of samples for the positions (P,)."""
        epochs, indices = np.divmod(positions, self.num_samples)
        rows = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            generator = np.random.default_rng([self._seed, ORDER_PURPOSE, epoch])
            keys = generator.integers(2**64 - 1, size=ROUNDS, dtype=np.uint64)
            rows[in_epoch] = self._weighted(permute(indices[in_epoch], self.num_samples, keys), epoch)
        return rows

    def _weighted(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The rows for the shuffled indices of an epoch."""
        if self._cumulative_weights is None:
            return indices
        total = float(self._cumulative_weights[-1])
        shift = (self._first_shift + epoch * GOLDEN_RATIO) % 1
        # Rounding could reach the total itself, which belongs to no sample.
        target = np.minimum((indices + shift) * (total / self.num_samples), np.nextafter(total, 0))
        rows: NDArray[np.int64] = np.searchsorted(self._cumulative_weights, target, side="right")
        return rows


def permute(indices: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply the permutation of range(size) that `keys` (ROUNDS,) choose to `indices` (P,), without storing it.

    A Feistel network permutes the range up to the next power of four. A value outside range(size) goes through it again
    until it is inside (cycle walking, Black and Rogaway 2002). The round function is that of SplitMix64.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    values = indices.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half_bits, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (split_mix_rounds(right ^ key) & mask)
        values[outside] = (left << half_bits) | right
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)
