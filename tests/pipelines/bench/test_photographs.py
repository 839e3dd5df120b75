"""Pools of real pictures: each shows another place, parts share no original, the same options give the same bytes."""

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.errors import InputError
from curation.files import parquet
from pipelines.bench import photographs
from pipelines.bench.photographs import OBJECTS, SCENERY, TEXTURES, Options, Original, Source


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    """Ten pictures of each domain. The red and green of every pixel of a photograph give its place."""
    folder, listed = tmp_path_factory.mktemp("originals"), []
    noise = np.random.default_rng(0).integers(0, 256, (500, 900), np.uint8)
    rows, columns = np.indices(noise.shape)
    for number in range(10):
        photograph = np.dstack([columns * 7 % 256, rows * 7 % 256, 20 * number + 0 * rows]).astype(np.uint8)
        cut_out = np.full((120, 130, 4), (200, 30, 20 * number, 0), np.uint8)
        cut_out[30:90, 30:90, 3] = 255
        pictures = {SCENERY: photograph, OBJECTS: cut_out, TEXTURES: np.roll(noise[:256, :256], number + 10)}
        for domain, pixels in pictures.items():
            path = folder / f"{domain}-{number}.png"
            Image.fromarray(pixels).save(path)
            listed.append(Original(domain, "package", path.name, path))
    return listed


def rows_of(tree: Path) -> list[dict[str, Any]]:
    return list(parquet.read_table(str(tree / "pictures.parquet"), photographs.PICTURES).to_pylist())


def test_pictures_are_distinct_places_of_their_originals(tmp_path: Path, originals: list[Original]) -> None:
    photographs.make(originals, tmp_path, Options(count=90, small=True))
    rows = rows_of(tmp_path)
    parts = [row["part"] for row in rows]
    assert (parts.count("seeds"), parts.count("pool"), parts.count("holdout")) == (9, 90, 4)
    covered: dict[object, np.ndarray] = {}
    owners: dict[object, object] = {}
    for row in rows:
        # An original is of one part only, and no pixel of it is in two pictures.
        assert owners.setdefault(row["original"], row["part"]) == row["part"]
        uses = covered.setdefault(row["original"], np.zeros((500, 900), np.int64))
        uses[row["top"] : row["bottom"], row["left"] : row["right"]] += 1
        with Image.open(tmp_path / str(row["name"])) as picture:
            assert picture.format == row["format"]
            assert picture.size == (row["width"], row["height"])
            assert all(110 <= side <= 150 for side in picture.size)
    assert max(uses.max() for uses in covered.values()) == 1
    assert sum(uses.any() for uses in covered.values()) < len(rows)  # some are cut
    assert len({row["format"] for row in rows}) >= 5
    cut_outs = [row for row in rows if row["domain"] == OBJECTS]
    assert all((row["left"], row["top"], row["right"], row["bottom"]) == (0, 0, 130, 120) for row in cut_outs)
    assert {path.name for path in (tmp_path / "seeds").iterdir()} == {OBJECTS, SCENERY}


def test_a_crop_shows_the_place_that_the_table_names(tmp_path: Path, originals: list[Original]) -> None:
    photographs.make(originals, tmp_path, Options(count=30))
    exact = [row for row in rows_of(tmp_path) if row["domain"] == SCENERY and row["format"] in ("PNG", "BMP", "TIFF")]
    assert exact
    for row in exact:
        with Image.open(tmp_path / str(row["name"])) as picture:
            red, green, _ = picture.convert("RGB").getpixel((0, 0))
        assert (red, green) == (row["left"] * 7 % 256, row["top"] * 7 % 256)


def test_the_seed_decides_every_byte(tmp_path: Path, originals: list[Original]) -> None:
    trees = [tmp_path / name for name in ("first", "again", "other")]
    for tree, seed in zip(trees, (0, 0, 1), strict=True):
        photographs.make(originals, tree, Options(count=20, seed=seed))
    first, again, other = (
        {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()} for tree in trees
    )
    assert first == again
    assert first != other


def test_tars_hold_the_pictures_of_the_folder(tmp_path: Path, originals: list[Original]) -> None:
    folder, tars = tmp_path / "folder", tmp_path / "tars"
    photographs.make(originals, folder, Options(count=25))
    photographs.make(originals, tars, Options(count=25, layout="tars"))
    members = {}
    assert len(list((tars / "pool").iterdir())) == 10
    for path in sorted((tars / "pool").iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                members[f"{path.name}#{member.name}"] = tar.extractfile(member).read()  # type: ignore[union-attr]
    assert sorted(members.values()) == sorted(path.read_bytes() for path in (folder / "pool").iterdir())
    assert {f"pool/{name}" for name in members} == {row["name"] for row in rows_of(tars) if row["part"] == "pool"}
    assert (tars / "holdout" / "00000.jpg").exists() == (folder / "holdout" / "00000.jpg").exists()


def test_too_large_a_count_names_the_number_there_is(tmp_path: Path, originals: list[Original]) -> None:
    with pytest.raises(InputError, match=r"--count 5000: the packages give \d+ different pictures for the "):
        photographs.make(originals, tmp_path, Options(count=5000))


def test_flat_tiles_are_left_out(tmp_path: Path) -> None:
    """Half of the photograph is a plain sky."""
    pixels = np.full((400, 900), 200, np.uint8)
    pixels[:, 450:] = np.random.default_rng(0).integers(0, 256, (400, 450))
    Image.fromarray(pixels).save(tmp_path / "sky.png")
    original = Original(SCENERY, "package", "sky.png", tmp_path / "sky.png")
    tiles = photographs.choose([original], 100, Options(count=100, small=True), np.random.default_rng(0))
    assert tiles and all(tile.box[2] > 450 for tile in tiles)


def test_pictures_of_a_package_are_found_in_its_zip_file(tmp_path: Path) -> None:
    """Equal, small, excluded and linked ones are left out."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)
    with zipfile.ZipFile(tmp_path / "pak.pk3", "w") as archive:
        for name, pixels in {
            "walls/a.png": noise,
            "walls/equal.png": noise,
            "walls/small.png": noise[:50],
            "sfx/b.png": noise.T,
            "../../outside.png": noise[::-1],
        }.items():
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
    source = Source(TEXTURES, "pak.pk3", without=("/sfx/",))
    listed = photographs.find_originals("package", source, tmp_path, 224)
    assert [original.name for original in listed] == ["outside.png", "walls/a.png"]
    assert all(original.path.is_relative_to(tmp_path / "pictures") for original in listed)
    with pytest.raises(InputError, match=r"holds no pictures in pak\.pk3"):
        photographs.find_originals("package", Source(TEXTURES, "pak.pk3", names=("none/",)), tmp_path, 224)
