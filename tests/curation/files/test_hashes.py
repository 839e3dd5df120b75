"""Hashes and mixed numbers: equal to published values, so that nothing drawn from them changes."""

import numpy as np

from curation.files.hashes import split_mix

INCREMENT = 0x9E3779B97F4A7C15


def numbers(seed: int, count: int) -> list[int]:
    """The first `count` numbers of SplitMix64: its state grows by INCREMENT from one to the next."""
    states = [(seed + step * INCREMENT) % 2**64 for step in range(count)]
    return split_mix(np.array(states, np.uint64)).tolist()


def test_split_mix_gives_the_published_numbers() -> None:
    # Cited: the test vectors of rand_xoshiro (Rust), made with Vigna's splitmix64.c, and of Rosetta Code.
    assert numbers(1477776061723855037, 5) == [
        1985237415132408290,
        2979275885539914483,
        13511426838097143398,
        8488337342461049707,
        15141737807933549159,
    ]
    assert numbers(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_split_mix_of_nothing_is_nothing_and_seeds_stay() -> None:
    assert split_mix(np.empty(0, np.uint64)).shape == (0,)
    seeds = np.arange(4, dtype=np.uint64)
    assert split_mix(seeds).dtype == np.uint64
    assert seeds.tolist() == [0, 1, 2, 3], "the argument is not changed"
