"""In which order samples are drawn: a permutation of every epoch that is computed, never stored.

Position p = step * batch_size + i counts all samples that training ever draws. Epoch e = p // R has as many positions
as there are samples, R, in an order drawn from (seed, e); nothing is stored, so any step can be the first. With
weights, an epoch has each sample either floor(x) or ceil(x) times, where x is R times its share of all weight: the
shuffled place k of a position means the sample in whose stretch of the cumulative weight k + u falls (systematic
sampling), and u, one number of an epoch, moves on by the golden ratio from epoch to epoch, so that over e epochs a
sample comes e * x times, give or take one or two. Equal weights have each sample exactly once.
"""

from typing import final

import numpy as np
from numpy.typing import NDArray

# What a generator is for; any three numbers that differ, the third in data.py.
ORDER, SHIFT = 0x6F72, 0x7368
# Rounds of the Feistel network that shuffles. Cited: Luby and Rackoff (1988) prove four enough for good round
# functions; eight make up for cheap ones on small sets (assumed).
ROUNDS = 8
GOLDEN_RATIO = 0.6180339887498949


@final
class Order:
    """Which sample a position has; see the top of this module."""

    def __init__(self, seed: int, num_samples: int, cumulative: NDArray[np.float64] | None = None) -> None:
        self._seed, self.num_samples, self._cumulative = seed, num_samples, cumulative
        self._first_shift = float(np.random.default_rng([seed, SHIFT]).random())

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows (P,) of the samples of some positions."""
        epochs, places = np.divmod(positions, self.num_samples)
        rows = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            keys = np.random.default_rng([self._seed, ORDER, epoch]).integers(2**64 - 1, size=ROUNDS, dtype=np.uint64)
            rows[own] = self._weighted(shuffled(places[own], self.num_samples, keys), epoch)
        return rows

    def _weighted(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        if self._cumulative is None:
            return places
        total = float(self._cumulative[-1])
        shift = (self._first_shift + epoch * GOLDEN_RATIO) % 1
        # Rounding could reach the total itself, which belongs to no sample.
        target = np.minimum((places + shift) * (total / self.num_samples), np.nextafter(total, 0))
        rows: NDArray[np.int64] = np.searchsorted(self._cumulative, target, side="right")
        return rows


def shuffled(places: NDArray[np.int64], num_places: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a permutation of range(num_places) takes `places` (P,), without holding it.

    A Feistel network over the next power of four, walked along until it is back in range (Black and Rogaway 2002); the
    round function is the mixer of SplitMix64 (Steele, Lea and Flood 2014). `keys` (ROUNDS,) choose the permutation.
    """
    half = np.uint64(max(1, ((num_places - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = places.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> half, values[walking] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= np.uint64(num_places)]
    return values.astype(np.int64)
