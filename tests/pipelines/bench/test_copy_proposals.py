"""Candidates of copies, and the pictures that the shipped copy head is trained on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.errors import InputError
from pipelines.bench import copy_head_pictures
from pipelines.bench.copy_proposals import candidates, shares_proposed
from pipelines.bench.photographs import OBJECTS, SCENERY, TEXTURES, Original


def test_candidates_are_those_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    hashes = generator.integers(0, 2**63, 40, dtype=np.uint64)
    hashes[7] = hashes[3] ^ np.uint64(5)
    cosine = vectors @ vectors.T - 3 * np.eye(40)
    nearest = [set(np.argsort(-row)[:4].tolist()) for row in cosine]
    expected = {
        (one, other)
        for one in range(40)
        for other in range(one + 1, 40)
        if (cosine[one, other] >= 0.3 and (other in nearest[one] or one in nearest[other])) or (one, other) == (3, 7)
    }
    assert set(zip(*candidates(vectors, hashes, 4, 0.3, 4).tolist(), strict=True)) == expected


def test_shares_are_of_copies_in_either_order() -> None:
    pairs = np.array([[0, 2], [1, 5]])
    shares = shares_proposed(pairs, [(1, 0, "blur"), (2, 5, "blur"), (2, 3, "text")])
    assert shares == {"all": 2 / 3, "blur": 1.0, "text": 0.0}


def test_pictures_of_the_copy_head_are_whole_or_tiles(tmp_path: Path) -> None:
    originals = []
    for number, (domain, side) in enumerate(((SCENERY, 900), (OBJECTS, 500), (TEXTURES, 256))):
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        path = tmp_path / f"{domain}.png"
        Image.fromarray(noise).save(path)
        originals.append(Original(domain, "package", path.name, path))
    (tmp_path / "out").mkdir()
    count = copy_head_pictures.write_photographs(originals, tmp_path / "out")
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "out").iterdir())
    assert (names.count(OBJECTS), names.count(TEXTURES), len(names)) == (1, 1, count)
    assert names.count(SCENERY) == 16  # 900 pixels give a grid of 4 x 4
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as picture:
            assert picture.mode == "RGB" and max(picture.size) <= copy_head_pictures.MAX_SIDE


def test_drawings_that_the_demo_uses_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number // 2]))  # two pairs of equal files
    used = {copy_head_pictures.sha256_of_file(str(paths[4]))}
    assert copy_head_pictures.copy_drawings(paths, used, tmp_path / "out") == 2
    assert {path.read_bytes() for path in (tmp_path / "out").iterdir()} == {b"\0", b"\1"}


def test_a_folder_without_the_demo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds 0 drawings in pool_rest/, not 1600"):
        copy_head_pictures.run(tmp_path / "out", tmp_path)
