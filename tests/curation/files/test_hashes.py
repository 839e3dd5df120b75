"""Hashes are SHA-256, for files of any size on any filesystem; mixed numbers equal the published ones."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from curation.files import hashes, paths
from curation.files.hashes import hash_json, sha256_of_bytes, sha256_of_file, sha256_of_files, split_mix


@pytest.mark.parametrize("root", ["local", "memory"])
@pytest.mark.parametrize("size", [0, 1, hashes.READ_BYTES, hashes.READ_BYTES + 1])
def test_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int, root: str) -> None:
    folder = str(tmp_path) if root == "local" else f"memory://{tmp_path.name}"
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    paths.write_bytes(paths.join(folder, "data.bin"), data)
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_of_bytes(data) == sha256_of_file(paths.join(folder, "data.bin")) == expected


def test_hash_of_files_is_that_of_all_their_bytes_in_order(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("b", "a", "empty")]
    for path, data in zip(files, (b"second", b"first", b""), strict=True):
        Path(path).write_bytes(data)
    assert sha256_of_files(files) == hashlib.sha256(b"secondfirst").hexdigest()
    assert sha256_of_files(files[1::-1]) == hashlib.sha256(b"firstsecond").hexdigest()
    assert sha256_of_files([]) == hashlib.sha256().hexdigest()


def test_hash_of_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_of_file(str(tmp_path / "nothing"))


def test_hash_of_json_depends_on_the_value_and_not_on_the_order_of_keys() -> None:
    assert hash_json({"b": [1, None], "a": "x"}) == hash_json({"a": "x", "b": [1, None]})
    assert hash_json({"a": "x", "b": [1, None]}) == hashlib.sha256(b'{"a":"x","b":[1,null]}').hexdigest()
    assert hash_json({"a": 1}) != hash_json({"a": 2})


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
