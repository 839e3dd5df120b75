"""Content hashes of JSON values, and the mixer of SplitMix64 for pseudo-random numbers that depend on keys alone."""

import hashlib
import json
from typing import Any

import numpy as np


def hash_json(value: Any) -> str:
    """The SHA-256 of `value` as canonical JSON (sorted keys, no spaces), as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def split_mix(seeds: np.ndarray) -> np.ndarray:
    """The first number that the generator SplitMix64 gives for each seed, uint64.

    Different seeds give different numbers. Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number
    Generators (OOPSLA 2014), with the constants of Vigna's splitmix64.c.
    """
    state = seeds + np.uint64(0x9E3779B97F4A7C15)
    return split_mix_rounds(state ^ (state >> np.uint64(30)))


def split_mix_rounds(values: np.ndarray) -> np.ndarray:
    """The two multiplying rounds of `split_mix` alone, uint64: enough for values that a random key was mixed into."""
    mixed = values * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return result
