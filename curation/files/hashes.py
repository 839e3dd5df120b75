"""SHA-256 of bytes, of files and of JSON values, as 64 hex digits; the mixer of SplitMix64.

The mixer gives pseudo-random numbers that depend on keys alone.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from curation.files import paths

# Bytes that are read and hashed at a time. Assumed.
READ_BYTES = 1 << 20


def sha256_of_bytes(data: bytes) -> str:
    """The SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: str) -> str:
    """The SHA-256 of a file's bytes. Raises FileNotFoundError."""
    return sha256_of_files([path])


def sha256_of_files(files: Iterable[str]) -> str:
    """The SHA-256 of the bytes of all files, one file after another. Raises FileNotFoundError."""
    hashed = hashlib.sha256()
    for path in files:
        with paths.open_read(path) as file:
            while block := file.read(READ_BYTES):
                hashed.update(block)
    return hashed.hexdigest()


def hash_json(value: Any) -> str:
    """The SHA-256 of `value` as canonical JSON: sorted keys, no spaces."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


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
