"""Hashes are SHA-256, for files of any size on any filesystem."""

import hashlib
from pathlib import Path

import pytest

from curation.files import hashes, paths
from curation.files.hashes import hash_json, sha256_of_bytes, sha256_of_file, sha256_of_files


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
