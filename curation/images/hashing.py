"""Hashes of encoded bytes and of pixels, and the pairs of images with close pixel hashes. Pure functions."""

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.files.hashes import sha256_of_bytes

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]

HASH_BITS = 64

# Nanoseconds for comparing one pair in a tile, for comparing one pair found by sorting, and for sorting one hash.
# Measured on 2 shared cores, 20,000 and 100,000 random hashes, 2026-11. They only select the faster plan.
_TILE_PAIR_NS = 2.5
_SORTED_PAIR_NS = 15.0
_SORT_HASH_NS = 150.0

# Rows and columns of a tile; its arrays fit the processor's cache. Measured: 2.2 ns a pair, 4.6 at 2,048.
_TILE_SIDE = 384

# Pairs found by sorting that are in memory at once, at about 60 bytes each. Assumed.
_PAIRS_PER_BLOCK = 1 << 20


def image_id(data: bytes) -> str:
    """The id of an image: the first 128 bits of the SHA-256 of its encoded bytes, as 32 hex digits."""
    return sha256_of_bytes(data)[:32]


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit pHash of an image: signs of its 8 x 8 lowest DCT frequencies against their median, by imagehash.phash.

    The bits are the 8 x 8 signs row by row, the first sign as the highest bit; `f"{hash:016x}"` is imagehash's text.
    """
    signs = imagehash.phash(image).hash
    return int.from_bytes(np.packbits(signs).tobytes(), "big")


def hamming_distance(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The number of bits (0 to 64) in which `a` and `b` differ, element by element; the shapes broadcast."""
    return np.bitwise_count(np.bitwise_xor(a, b))


def pairs_within(hashes: NDArray[np.uint64], max_distance: int) -> Iterator[Pairs]:
    """Every pair of `hashes` at most `max_distance` bits apart, in blocks of (i, j, distance), i < j, each pair once.

    Exact. Memory grows with the number of hashes, not with the number of pairs. n equal hashes give n * (n - 1) / 2
    pairs: to link equal images, group them first and pass one hash of each group. The order of the pairs is the same
    on every run and otherwise unspecified.
    """
    assert hashes.dtype == np.uint64 and hashes.ndim == 1
    assert 0 <= max_distance <= HASH_BITS
    plan = _fastest_plan(len(hashes), max_distance)
    if plan is None:
        return _pairs_by_comparison(hashes, max_distance)
    return _pairs_by_sorting(hashes, max_distance, *plan)


def _fastest_plan(num_hashes: int, max_distance: int) -> tuple[int, int] | None:
    """The (number of bands, bands in a key) with the least expected work on random hashes; None for comparison."""
    num_pairs = num_hashes * (num_hashes - 1) / 2
    min_work, plan = num_pairs * _TILE_PAIR_NS, None
    for bands in range(max_distance + 1, min(2 * max_distance + 4, HASH_BITS) + 1):
        bands_in_key = bands - max_distance
        keys = comb(bands, bands_in_key)
        candidates = num_pairs * 2.0 ** (-HASH_BITS * bands_in_key / bands)
        work = keys * (num_hashes * _SORT_HASH_NS + candidates * _SORTED_PAIR_NS)
        if work < min_work:
            min_work, plan = work, (bands, bands_in_key)
    return plan


def _pairs_by_comparison(hashes: NDArray[np.uint64], max_distance: int) -> Iterator[Pairs]:
    """The pairs by comparison of every hash with every other, tile by tile."""
    for top in range(0, len(hashes), _TILE_SIDE):
        rows = hashes[top : top + _TILE_SIDE, None]
        for left in range(top, len(hashes), _TILE_SIDE):
            distances = hamming_distance(rows, hashes[None, left : left + _TILE_SIDE])
            near = distances <= max_distance
            row, column = np.nonzero(np.triu(near, k=1) if left == top else near)
            if len(row):
                yield row + top, column + left, distances[row, column]


def _pairs_by_sorting(
    hashes: NDArray[np.uint64], max_distance: int, num_bands: int, bands_in_key: int
) -> Iterator[Pairs]:
    """The pairs by comparison of hashes that agree in a key.

    Two hashes that differ in d bits agree in at least `num_bands` - d of their `num_bands` bands. Hence they agree in
    one of the keys that consist of that many bands (Manku, Jain and Das Sarma, "Detecting near-duplicates for web
    crawling", 2007). A pair that agrees in several keys is yielded for the first of them.
    """
    edges = [HASH_BITS * band // num_bands for band in range(num_bands + 1)]
    bands = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    keys = [np.uint64(sum(chosen)) for chosen in combinations(bands, bands_in_key)]
    for number, key in enumerate(keys):
        for a, b in _pairs_of_equals(hashes & key):
            differing = hashes[a] ^ hashes[b]
            distances = np.bitwise_count(differing)
            near = np.flatnonzero(distances <= max_distance)
            for earlier in keys[:number]:
                near = near[(differing[near] & earlier) != 0]
            if len(near):
                i, j = a[near], b[near]
                yield np.minimum(i, j), np.maximum(i, j), distances[near]


def _pairs_of_equals(values: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The index pairs of equal values, each pair once, in blocks of about _PAIRS_PER_BLOCK."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    positions = np.arange(len(values))
    # Every position forms pairs with the positions behind it, up to the last one of equal value.
    num_partners = np.searchsorted(ordered, ordered, side="right") - positions - 1
    ends = np.cumsum(num_partners)
    start = 0
    while start < len(values):
        done = ends[start] - num_partners[start]
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_PER_BLOCK, side="right")))
        counts = num_partners[start:stop]
        first = np.repeat(positions[start:stop], counts)
        steps = np.arange(len(first)) - np.repeat(ends[start:stop] - counts - done, counts)
        yield order[first], order[first + 1 + steps]
        start = stop
