"""The demo data made from two small packages, which are built here in the layout of the real ones."""

import dataclasses
import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageOps, ImageStat

from curation.engine.manifest import FORMAT_VERSION, MANIFEST_NAME
from curation.errors import InputError, OutputMismatchError
from curation.files import parquet
from curation.images.decode import ImageLimits, ImageRejected, decode_rgb
from curation.images.hashing import image_id
from pipelines.demo import dataset, odd_files, planted_copies
from pipelines.demo.dataset import DemoRecipe
from pipelines.demo.packages import DRAWINGS, IMAGES_IN_PACKAGE, STAMPS

pytestmark = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None, reason="builds and unpacks .deb files: needs dpkg-deb"
)

RECIPE = DemoRecipe(holdout_every=2, pool_size=80, num_pool_copies=2, num_holdout_copies=1)
STAMP_FOLDERS = (
    "animals/birds",
    "animals/mammals/cats",
    "food/fruit",
    "plants/trees",
    "vehicles/ship",
    "symbols/signs",
)
DRAWING_FOLDERS = ("animals", "computer/icons", "shapes/stars")
LINKS = {  # one beside its target with another name; one in another folder with the same name
    "animals/link.png": "drawing_00.png",
    "shapes/drawing_01.png": "../computer/icons/drawing_01.png",
}
REPOSITORY = Path(dataset.__file__).parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages: 24 stamps, and 84 drawings with two links to them."""
    folder = tmp_path_factory.mktemp("packages")
    stamps = {f"{STAMP_FOLDERS[number % 6]}/stamp_{number:02d}.png": _drawing(number) for number in range(24)}
    drawings = {
        f"{DRAWING_FOLDERS[number % 3]}/drawing_{number:02d}.png": _drawing(100 + number) for number in range(42)
    }
    drawings["shapes/blank.png"] = _png(Image.new("L", (80, 80), 250))
    drawings["shapes/small.png"] = _png(Image.new("L", (8, 8)))
    drawings |= {f"shapes/ring_{number:02d}.png": _ring(number) for number in range(40)}
    _build_package(folder, STAMPS, stamps)
    _build_package(folder, DRAWINGS, drawings, LINKS)
    return folder


@pytest.fixture(scope="module")
def demo(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished demo data; tests must not change it."""
    output = tmp_path_factory.mktemp("data") / "demo"
    dataset.run(output, packages, RECIPE)
    return output


def test_every_second_stamp_by_hash_is_held_out_and_the_others_of_four_folders_are_seeds(demo: Path) -> None:
    stamps = [f"{STAMP_FOLDERS[number % 6]}/stamp_{number:02d}.png" for number in range(24)]
    by_hash = sorted(stamps, key=lambda name: hashlib.sha1(name.encode()).hexdigest())
    assert _images(demo / "holdout") == sorted(by_hash[::2])
    others = [name for name in by_hash[1::2] if not name.startswith("symbols/")]
    assert _images(demo / "seeds") == sorted(f"{name.split('/')[0]}/{name}" for name in others)


def test_pool_is_the_first_drawings_by_hash_of_the_file_name(demo: Path) -> None:
    pool, rest = _images(demo / "pool"), _images(demo / "pool_rest")
    assert len(pool) == 80 and len(rest) == 6
    assert set(LINKS) <= set(pool + rest)

    def order(name: str) -> tuple[str, str]:
        return hashlib.sha1(name.rpartition("/")[2].encode()).hexdigest(), name

    assert max(map(order, pool)) < min(map(order, rest))


def test_links_become_files_with_the_bytes_of_their_target(demo: Path) -> None:
    files = {
        path.relative_to(demo / root).as_posix(): path for root in ("pool", "pool_rest") for path in _walk(demo / root)
    }
    assert not any(path.is_symlink() for path in demo.rglob("*"))
    assert files["animals/link.png"].read_bytes() == files["animals/drawing_00.png"].read_bytes()
    assert files["shapes/drawing_01.png"].read_bytes() == files["computer/icons/drawing_01.png"].read_bytes()


def test_copyright_file_lies_beside_the_images(demo: Path) -> None:
    for root in ("seeds", "holdout", "planted"):
        assert (demo / root / f"copyright-{STAMPS}").read_text() == f"Copyright of {STAMPS}\n"
    for root in ("pool", "pool_rest", "planted", "odd"):
        assert (demo / root / f"copyright-{DRAWINGS}").read_text() == f"Copyright of {DRAWINGS}\n"


def test_planted_table_lists_every_copy_with_one_original_each(demo: Path) -> None:
    rows = parquet.read_table(str(demo / "planted.parquet"), planted_copies.PLANTED).to_pylist()
    assert sorted(row["copy"] for row in rows) == [f"planted/{name}" for name in _images(demo / "planted")]
    assert [row["transform"] for row in rows] == [name for name in planted_copies.TRANSFORMS for _ in range(3)]
    assert [row["original_role"] for row in rows] == ["pool", "pool", "holdout"] * len(planted_copies.TRANSFORMS)
    assert len({row["original_image_id"] for row in rows}) == len(rows)
    all_ids = [image_id(path.read_bytes()) for path in _walk(demo)]
    for row in rows:
        assert row["original"].startswith(row["original_role"] + "/")
        assert row["copy_image_id"] == image_id((demo / row["copy"]).read_bytes())
        assert row["original_image_id"] == image_id((demo / row["original"]).read_bytes())
        assert all_ids.count(row["copy_image_id"]) == 1
    odd = parquet.read_table(str(demo / "odd.parquet"), odd_files.ODD).to_pylist()
    renamed = [row["image_id"] for row in odd if row["file"] == "odd/renamed.png"]
    assert all(all_ids.count(row["original_image_id"]) == 1 for row in rows)
    assert all_ids.count(renamed[0]) == 2


def test_originals_are_neither_blank_nor_small_nor_copies_and_mirrored_ones_are_asymmetric(demo: Path) -> None:
    rows = parquet.read_table(str(demo / "planted.parquet"), planted_copies.PLANTED).to_pylist()
    names = {row["original"].rpartition("/")[2] for row in rows}
    assert not names & {"blank.png", "small.png", "link.png", "drawing_00.png", "drawing_01.png"}
    assert any("ring" in row["original"] for row in rows)
    assert not any("ring" in row["original"] for row in rows if row["transform"] == "mirror")


@pytest.mark.parametrize("transform", planted_copies.TRANSFORMS)
def test_copy_is_its_original_changed_by_the_stated_parameters(demo: Path, transform: str) -> None:
    rows = parquet.read_table(str(demo / "planted.parquet"), planted_copies.PLANTED).to_pylist()
    for row in (row for row in rows if row["transform"] == transform):
        original, copy = (_decode(demo / row[key]) for key in ("original", "copy"))
        words = row["parameters"].replace(",", "").split()
        match transform:
            case "jpeg":
                assert (demo / row["copy"]).read_bytes()[:2] == b"\xff\xd8" and 30 <= int(words[1]) <= 90
                assert copy.size == original.size and 0 < _difference(original, copy) < 10
            case "resize":
                factor = float(words[1])
                assert 0.3 <= factor <= 2 and copy.width == pytest.approx(original.width * factor, abs=0.6)
                assert _difference(original, copy.resize(original.size)) < 10
            case "crop":
                assert 0.6 <= float(words[0]) <= 0.95
                assert copy.width * copy.height == pytest.approx(
                    float(words[0]) * original.width * original.height, rel=0.03
                )
                left, top, right, bottom = (int(word.strip("()")) for word in words[-4:])
                assert _difference(original.crop((left, top, right, bottom)), copy) == 0
            case "colour":
                assert copy.size == original.size and _difference(original, copy) > 0
                assert planted_copies.correlation(original, copy) >= planted_copies.MIN_COLOUR_CORRELATION
            case "mirror":
                assert _difference(ImageOps.mirror(original), copy) == 0 and _difference(original, copy) > 0
            case "border":
                pixels = int(words[0])
                assert copy.size == (original.width + 2 * pixels, original.height + 2 * pixels)
                assert _difference(ImageOps.crop(copy, pixels), original) == 0
                assert len(set(copy.crop((0, 0, copy.width, pixels)).get_flattened_data())) == 1
            case "overlay":
                changed = np.any(np.asarray(original) != np.asarray(copy), axis=2).mean()
                assert copy.size == original.size and 0 < changed < 0.4
            case "rotation":
                degrees = float(words[0])
                assert copy.size == original.size and 2 <= abs(degrees) <= 10
                turned_back = copy.rotate(-degrees, Image.Resampling.BICUBIC)
                middle = (20, 20, original.width - 20, original.height - 20)
                assert _difference(original.crop(middle), turned_back.crop(middle)) < 12


def test_odd_files_have_the_expected_outcome_and_accepted_ones_show_their_original(demo: Path) -> None:
    rows = parquet.read_table(str(demo / "odd.parquet"), odd_files.ODD).to_pylist()
    assert [row["file"] for row in sorted(rows, key=lambda row: row["file"])] == [
        f"odd/{x}" for x in _files(demo / "odd")
    ]
    for row in rows:
        data = (demo / row["file"]).read_bytes()
        assert row["image_id"] == image_id(data)
        if row["expected"] == "accepted":
            picture, original = decode_rgb(data, ImageLimits()), _decode(demo / row["original"])
            assert picture.size == original.size
            assert planted_copies.correlation(picture, original) > 0.98
        else:
            with pytest.raises(ImageRejected) as rejected:
                decode_rgb(data, ImageLimits())
            assert rejected.value.reason == row["expected"]


def test_same_packages_give_the_same_bytes(packages: Path, demo: Path, tmp_path: Path) -> None:
    dataset.run(tmp_path / "again", packages, RECIPE)
    assert _snapshot(tmp_path / "again") == _snapshot(demo)
    dataset.run(tmp_path / "other", packages, dataclasses.replace(RECIPE, seed=1))
    assert _snapshot(tmp_path / "other") != _snapshot(demo)
    assert _images(tmp_path / "other" / "pool") == _images(demo / "pool")


def test_finished_data_is_not_changed(packages: Path, demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    manifest = dataset.run(demo, recipe=RECIPE)  # without packages: a download would fail in tests
    assert manifest == dataset.run(demo, packages, RECIPE)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    assert manifest.totals["holdout"] == 12 and manifest.totals["planted/crop"] == 3 and manifest.totals["odd"] == 11


def test_failed_run_leaves_nothing_under_the_final_name(packages: Path, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holdout/ hold too few originals.*num_holdout_copies"):
        dataset.run(tmp_path / "demo", packages, dataclasses.replace(RECIPE, num_holdout_copies=100))
    assert not (tmp_path / "demo").exists()
    dataset.run(tmp_path / "demo", packages, RECIPE)
    assert _snapshot(tmp_path / "demo") == _snapshot(demo)
    assert os.listdir(tmp_path) == ["demo"]


def test_demo_data_of_an_earlier_version_is_refused_with_the_remedy(demo: Path, tmp_path: Path) -> None:
    old = tmp_path / "demo"
    old.mkdir()
    text = (demo / MANIFEST_NAME).read_text()
    (old / MANIFEST_NAME).write_text(text.replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 1'))
    with pytest.raises(OutputMismatchError, match=r"format 1, not \d+\)\. Delete the folder, and the same command"):
        dataset.run(old, recipe=RECIPE)


def test_folder_of_other_files_is_refused(packages: Path, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputMismatchError, match=r"other packages \(.*pool_size.*\)\. Delete the folder") as caught:
        dataset.run(demo, packages)
    assert "Plan(" not in str(caught.value)
    (tmp_path / "thesis.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(OutputMismatchError, match="not demo data"):
            dataset.run(output, packages, RECIPE)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_unexpected_packages_are_refused(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"exactly one file .* Found: none"):
        dataset.run(tmp_path / "demo", tmp_path, RECIPE)
    _build_package(tmp_path, STAMPS, {"animals/a.png": _drawing(1)})
    (tmp_path / f"{DRAWINGS}_0_all.deb").write_bytes(b"not a package\n" * 100)
    with pytest.raises(InputError, match=r"(?s)dpkg-deb failed with status 2.*not a Debian format archive"):
        dataset.run(tmp_path / "demo", tmp_path, RECIPE)
    (tmp_path / f"{DRAWINGS}_0_all.deb").unlink()
    _build_package(tmp_path, DRAWINGS, {})
    with pytest.raises(InputError, match="holds no images in usr/share/openclipart/png"):
        dataset.run(tmp_path / "demo", tmp_path, RECIPE)
    (tmp_path / "private.png").write_bytes(_drawing(2))
    _build_package(tmp_path, DRAWINGS, {"a.png": _drawing(1)}, {"b.png": str(tmp_path / "private.png")})
    with pytest.raises(InputError, match=r"b\.png' is a link to"):
        dataset.run(tmp_path / "demo", tmp_path, RECIPE)
    assert not (tmp_path / "demo").exists()


def test_missing_apt_is_a_message_with_the_alternative(tmp_path: Path) -> None:
    completed = _command(["--output", str(tmp_path / "demo")], PATH=str(tmp_path))
    assert completed.returncode == 2
    assert "There is no apt-get on this machine" in completed.stderr
    assert "seedbed curate --seeds NAME=PATH --pool PATH" in completed.stderr
    assert "Traceback" not in completed.stderr and not (tmp_path / "demo").exists()


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_download_with_apt_changes_nothing_else_on_the_system(packages: Path, demo: Path, tmp_path: Path) -> None:
    """The repository is a folder: no network and no root are needed."""
    repository = tmp_path / "repository"
    shutil.copytree(packages, repository)
    (repository / "Packages").write_text("\n".join(_index_entry(deb) for deb in sorted(repository.glob("*.deb"))))
    output = tmp_path / "with space" / "demo"
    code = (
        f"from pathlib import Path\nfrom pipelines.demo.dataset import *\nrun(Path({str(output)!r}), recipe={RECIPE!r})"
    )
    completed = _python(["-c", code], APT_CONFIG=str(_apt_config(tmp_path, f"file:{repository}")))
    assert completed.returncode == 0, completed.stderr
    assert _snapshot(output) == _snapshot(demo)
    assert os.listdir(output.parent) == ["demo"]
    assert not (tmp_path / "hook-ran").exists()


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
@pytest.mark.parametrize("address", ["file:/nowhere", "http://127.0.0.1:9"])  # no server listens on port 9, "discard"
def test_failed_download_repeats_the_output_of_apt(address: str, tmp_path: Path) -> None:
    config = _apt_config(tmp_path, address)
    completed = _command(["--output", str(tmp_path / "demo")], APT_CONFIG=str(config), no_proxy="127.0.0.1")
    assert completed.returncode == 2
    assert "apt-get failed with status 100" in completed.stderr and "--packages" in completed.stderr
    assert f"Failed to fetch {address}" in completed.stderr or f"The repository '{address}" in completed.stderr
    assert "Traceback" not in completed.stderr and not (tmp_path / "demo").exists()


def _command(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return _python(["-m", "pipelines.demo.dataset", *arguments], **environment)


def _python(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def _apt_config(folder: Path, address: str) -> Path:
    """A config of apt with one repository and a hook like those of real systems."""
    (folder / "sources.list").write_text(f"deb [trusted=yes] {address} ./\n")
    config = folder / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "{folder}/sources.list";\nDir::Etc::sourceparts "-";\n'
        f'APT::Update::Post-Invoke {{ "touch {folder}/hook-ran"; }};\n'
        'Acquire::Retries::Delay "false";\n'
    )
    return config


def _index_entry(deb: Path) -> str:
    control = subprocess.run(["dpkg-deb", "-f", deb], capture_output=True, text=True, check=True).stdout
    sha256 = hashlib.sha256(deb.read_bytes()).hexdigest()
    return f"{control}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {sha256}\n"


def _build_package(folder: Path, package: str, images: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    root = folder / package
    for name, data in images.items():
        path = root / IMAGES_IN_PACKAGE[package] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name, target in (links or {}).items():
        (root / IMAGES_IN_PACKAGE[package] / name).symlink_to(target)
    documents = root / "usr/share/doc" / package
    documents.mkdir(parents=True)
    (documents / "copyright").write_text(f"Copyright of {package}\n")
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        f"Package: {package}\nVersion: 1.0\nArchitecture: all\nDescription: for a test\n"
        "Maintainer: Nobody <nobody@example.org>\n"
    )
    deb = folder / f"{package}_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", root, deb], check=True, capture_output=True)
    shutil.rmtree(root)


def _drawing(seed: int) -> bytes:
    """A PNG of some coloured shapes on a transparent background, without symmetry."""
    generator = np.random.default_rng(seed)
    picture = Image.new("RGBA", (90 + 2 * (seed % 7), 84))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        left, top = (int(value) for value in generator.integers(0, 60, size=2))
        width, height = (int(value) for value in generator.integers(10, 40, size=2))
        red, green, blue = (int(value) for value in generator.integers(0, 200, size=3))
        draw.ellipse((left, top, left + width, top + height), (red, green, blue, 255))
    return _png(picture)


def _ring(seed: int) -> bytes:
    """A PNG of a ring, equal to its mirror image."""
    picture = Image.new("RGBA", (90, 90))
    ImageDraw.Draw(picture).ellipse((10, 10, 79, 79), (0, 0, 4 * seed), "red", 9)
    return _png(picture)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _decode(path: Path) -> Image.Image:
    return decode_rgb(path.read_bytes(), ImageLimits())


def _difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of the channels, 0 to 255."""
    return max(ImageStat.Stat(ImageChops.difference(one, other)).mean)


def _walk(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".gif"))


def _images(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in _walk(folder)]


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("copyright"))


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
