"""Hashes against their definitions, and near pairs against brute force."""

import hashlib
from collections.abc import Iterable

import imagehash
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from curation.images import hashing
from curation.images.hashing import Pairs, hamming_distance, image_id, pairs_within, perceptual_hash


def near_hashes(seed: int, count: int) -> NDArray[np.uint64]:
    """Random hashes, some of them near or equal copies of others, in random order."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, count, dtype=np.uint64)
    for flips in range(12):
        copies = generator.integers(0, count, count // 12)
        hashes[generator.integers(0, count, count // 12)] = hashes[copies] ^ mask(generator, flips)
    return generator.permutation(hashes)


def mask(generator: np.random.Generator, flips: int) -> np.uint64:
    return np.uint64(sum(1 << int(bit) for bit in generator.choice(64, flips, replace=False)))


def brute_force(hashes: NDArray[np.uint64], max_distance: int) -> list[tuple[int, int, int]]:
    values = [int(value) for value in hashes]
    pairs = ((i, j, (values[i] ^ values[j]).bit_count()) for i in range(len(values)) for j in range(i + 1, len(values)))
    return [pair for pair in pairs if pair[2] <= max_distance]


def listed(pairs: Iterable[Pairs]) -> list[tuple[int, int, int]]:
    return sorted((int(i), int(j), int(d)) for block in pairs for i, j, d in zip(*block, strict=True))


def test_ids_are_the_first_half_of_sha256() -> None:
    assert image_id(b"") == hashlib.sha256(b"").hexdigest()[:32]
    assert image_id(b"abc") == hashlib.sha256(b"abc").hexdigest()[:32] == "ba7816bf8f01cfea414140de5dae2223"


def test_perceptual_hash_has_the_bits_of_imagehash() -> None:
    for seed in range(10):
        values = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(values).resize((90, 70), Image.Resampling.BICUBIC)
        assert f"{perceptual_hash(image):016x}" == str(imagehash.phash(image))
    assert 0 <= perceptual_hash(Image.new("RGB", (20, 20), "white")) < 2**64


def test_perceptual_hash_is_close_for_a_resized_image_and_far_for_another() -> None:
    def picture(seed: int) -> Image.Image:
        values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(values).resize((300, 300), Image.Resampling.BICUBIC)

    one, smaller, other = picture(0), picture(0).resize((150, 150)), picture(1)
    assert (perceptual_hash(one) ^ perceptual_hash(smaller)).bit_count() <= 4
    assert (perceptual_hash(one) ^ perceptual_hash(other)).bit_count() > 15


def test_hamming_distance_counts_bits_and_broadcasts() -> None:
    hashes = near_hashes(0, 50)
    distances = hamming_distance(hashes[:, None], hashes[None, :])
    assert distances.dtype == np.uint8
    assert all(distances[i, j] == (int(hashes[i]) ^ int(hashes[j])).bit_count() for i in range(50) for j in range(50))
    assert hamming_distance(np.array([0], np.uint64), np.array([2**64 - 1], np.uint64))[0] == 64


@pytest.mark.parametrize("max_distance", [0, 1, 3, 4, 8, 10, 32, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_pairs_agree_with_brute_force(count: int, max_distance: int) -> None:
    for seed in range(3):
        hashes = near_hashes(seed, count) if count > 2 else np.zeros(count, dtype=np.uint64)
        assert listed(pairs_within(hashes, max_distance)) == brute_force(hashes, max_distance)


@pytest.mark.parametrize("plan", [(5, 1), (6, 2), (7, 3), (12, 8)])
def test_every_plan_finds_the_same_pairs(plan: tuple[int, int]) -> None:
    hashes, max_distance = near_hashes(1, 400), plan[0] - plan[1]
    expected = brute_force(hashes, max_distance)
    assert listed(hashing._pairs_by_sorting(hashes, max_distance, *plan)) == expected
    assert listed(hashing._pairs_by_comparison(hashes, max_distance)) == expected


def test_pairs_across_tiles_and_blocks_are_found_once() -> None:
    hashes = near_hashes(2, 3000)
    by_comparison = listed(hashing._pairs_by_comparison(hashes, 4))
    assert len(by_comparison) > 100
    assert listed(hashing._pairs_by_sorting(hashes, 4, 6, 2)) == by_comparison
    assert listed(pairs_within(hashes, 4)) == by_comparison


def test_many_equal_hashes_come_in_bounded_blocks() -> None:
    count = 1500
    hashes = np.full(count, 7, dtype=np.uint64)
    blocks = list(pairs_within(hashes, 2))
    pairs = np.concatenate([i * count + j for i, j, _ in blocks])
    assert len(np.unique(pairs)) == len(pairs) == count * (count - 1) // 2
    assert all((i < j).all() and not distances.any() for i, j, distances in blocks)
    assert max(len(i) for i, _, _ in blocks) <= hashing._PAIRS_PER_BLOCK


def test_many_hashes_are_sorted_and_few_with_a_large_distance_compared() -> None:
    assert hashing._fastest_plan(1_000_000, 4) is not None
    assert hashing._fastest_plan(1_000, 30) is None
