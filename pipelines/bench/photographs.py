"""Makes folders of real pictures, for trials and benchmarks, from eight Debian packages (432 MB).

    python -m pipelines.bench.photographs --output FOLDER --count 2000

The packages hold pictures of three domains (counted and looked at 2026-11, in Debian 12):

scenery    62 photographs of 0.3 to 20 megapixels: landscapes, plants, buildings (mate-backgrounds,
           lomiri-wallpapers-16.04 and -20.04, plasma-workspace-wallpapers, palapeli-data, tuxpaint-data)
objects    258 photographs of 110 to 1,200 pixels, cut out on a transparent ground: animals, food, tools
           (tuxpaint-stamps-default)
textures   487 surfaces of 256 to 1,024 pixels, most of them painted from photographs, many of them variants of
           one another (openarena-081-textures)

    FOLDER/
      seeds/objects/  seeds/scenery/     a tenth of the count
      pool/                              the count: files, or ten tars in the layout of WebDataset
      holdout/                           a twentieth of the count
      copyright/                         the copyright file of each package
      pictures.parquet                   the package, the original and the place of each picture in it

Large counts need more pictures than there are. Then a photograph or a texture is cut into the tiles of a grid, and each
tile gives one picture, so no two pictures share a pixel. Tiles with little contrast, such as a plain sky, are left out.
Cut-outs stay whole. Each original belongs to one of seeds, pool and holdout. The formats are mixed, as in a folder of a
user's own. The same packages, options and Pillow give the same bytes.
"""

import hashlib
import io
import shutil
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import typer
from PIL import Image, ImageOps

from curation.engine import command, progress
from curation.errors import InputError
from curation.files import parquet
from pipelines.demo import packages
from pipelines.demo.packages import STAMPS

Layout = Literal["folder", "tars"]
SCENERY, OBJECTS, TEXTURES = "scenery", "objects", "textures"
NEBULAE, SHOTS = "nebulae", "shots"  # only in copy_pictures.py
SUFFIXES = (".jpg", ".png")


@dataclass(frozen=True)
class Source:
    """The pictures of one domain in a package: the files below `folder` whose path starts with one of `names`."""

    domain: str
    folder: str
    names: tuple[str, ...] = ("",)
    without: tuple[str, ...] = ()
    """Parts of the paths of pictures that are drawn or rendered."""
    suffixes: tuple[str, ...] = SUFFIXES


# A package with a zip file (.pk3) instead of a folder of pictures has the path of the zip file as `folder`.
SOURCES = {
    "mate-backgrounds": Source(SCENERY, "usr/share/backgrounds/mate/nature"),
    "lomiri-wallpapers-16.04": Source(SCENERY, "usr/share/backgrounds", without=("umang_", "analogpattern_")),
    "lomiri-wallpapers-20.04": Source(SCENERY, "usr/share/backgrounds", names=("Kleiber",)),
    "plasma-workspace-wallpapers": Source(
        SCENERY,
        "usr/share/wallpapers",
        names=tuple(
            f"{name}/contents/images/2560x1600"
            for name in (
                *("Autumn", "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf"),
                *("Grey", "Kite", "OneStandsOut", "Path", "summer_1am"),
            )
        ),
    ),
    "palapeli-data": Source(SCENERY, "usr/share/palapeli/collection"),
    "tuxpaint-data": Source(SCENERY, "usr/share/tuxpaint/templates"),
    STAMPS: Source(
        OBJECTS,
        packages.IMAGES_IN_PACKAGE[STAMPS],
        names=(
            *("animals/", "food/", "hobbies/", "household/", "medical/", "military/", "plants/", "space/", "sports/"),
            *("symbols/money/", "vehicles/"),
        ),
        without=("cartoon", "_mirror", "hedgehog", "pizza", "tooth", "dollars_", "cent.", "euro_", "gbp_", "yen_"),
    ),
    "openarena-081-textures": Source(
        TEXTURES,
        "usr/share/games/openarena/baseoa/pak4-textures.pk3",
        without=("/sfx/", "/liquids/", "_light/", "blend", "lightmap", "flat", "glow", "disco", "banner", "clip"),
    ),
}
MEGABYTES = 432

SEED_DOMAINS = (OBJECTS, SCENERY)
CUT_DOMAINS = (SCENERY, TEXTURES, NEBULAE, SHOTS)
# Shares of the domains in a part, as far as each has enough pictures. Assumed: mostly photographs.
WEIGHTS = {SCENERY: 3, OBJECTS: 2, TEXTURES: 1, NEBULAE: 1, SHOTS: 1}
# Of ten originals of a domain, by the hash of their names: one of the holdout, two of the seeds.
PART_OF = ("holdout", "seeds", "seeds", "pool", "pool", "pool", "pool", "pool", "pool", "pool")
NUM_TARS = 10
# Sides of the pictures. Assumed.
MAX_SIDE, MIN_SIDE_SMALL, MAX_SIDE_SMALL = 1600, 110, 150
# Smaller originals are left out, and no tile is smaller. Those for --small are enlarged, because there are no 12,000 of
# 110 pixels. The longer side of a cut-out may be MIN_SIDE_SMALL.
MIN_TILE, MIN_TILE_SMALL = 224, 80
# Tiles along the longer side of an original, at most.
MAX_GRID = 60
# Standard deviation of the grey values, of 255, below which a tile shows too little. Assumed, after looking at tiles.
MIN_CONTRAST = 14.0
# Longer side of the small grey copy in which the contrast is measured.
PREVIEW_SIDE = 512
# The EXIF tag whose values from 5 on mean a turn by 90 degrees.
ORIENTATION = 0x0112
# Side of a picture as a share of its tile's side. Assumed: the sizes and shapes of the pictures differ.
MIN_SHARE = 0.8
# Formats by their frequency. Assumed: a folder of photographs with some of everything.
FORMATS = {"JPEG": 0.6, "PNG": 0.14, "WEBP": 0.1, "TIFF": 0.06, "BMP": 0.05, "GIF": 0.05}
SUFFIX_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "GIF": "gif"}

PICTURES = pa.schema(
    [(name, pa.string()) for name in ("name", "part", "domain", "package", "original", "format")]
    + [(name, pa.int32()) for name in ("left", "top", "right", "bottom", "width", "height")]
)
"""The columns of pictures.parquet. `left` to `bottom`: the place in the original, in pixels."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Original:
    """A picture of a package."""

    domain: str
    package: str
    name: str
    """The path in the package, or in its zip file."""
    path: Path


@dataclass(frozen=True)
class Tile:
    """One cell of the grid over an original, in pixels."""

    original: Original
    box: Box


@dataclass(frozen=True)
class Options:
    """The choice of pictures."""

    count: int
    small: bool = False
    layout: Layout = "folder"
    seed: int = 0

    @property
    def min_tile(self) -> int:
        """The shortest side of a tile, in pixels."""
        return MIN_TILE_SMALL if self.small else MIN_TILE


def run(output: Path, options: Options, packages_folder: Path | None = None) -> None:
    """Make the pictures in the new folder `output`. `packages_folder` holds the .deb files; else apt-get fetches them.

    Raises InputError where `output` holds anything, where a package is unavailable, and for too large a count.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output '{output}' is not empty. Give a new folder, or delete this one.")
    partial = output.resolve().with_name(output.name + ".partial")
    if packages_folder is None:
        debs = packages.download(partial / "apt", SOURCES, MEGABYTES)
    else:
        debs = packages.find(packages_folder, SOURCES)
    for folder in ("unpacked", "tree"):
        shutil.rmtree(partial / folder, ignore_errors=True)
    originals: list[Original] = []
    for package, deb in debs.items():
        root = partial / "unpacked" / package
        root.mkdir(parents=True)
        packages.run_tool(["dpkg-deb", "-x", str(deb.resolve()), str(root)], partial)
        listed = find_originals(package, SOURCES[package], root, options.min_tile)
        progress.say(f"{package}: {len(listed)} pictures of {SOURCES[package].domain}")
        originals += listed
        copyright_file = partial / "tree" / "copyright" / package
        copyright_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packages.copyright_file(package, root), copyright_file)
    make(originals, partial / "tree", options)
    if output.exists():
        output.rmdir()
    (partial / "tree").rename(output)
    shutil.rmtree(partial)


def find_originals(package: str, source: Source, root: Path, min_side: int) -> list[Original]:
    """The pictures of an unpacked package by name, without equal ones and those with a side below `min_side`.

    Raises InputError where there is none.
    """
    folder = root / source.folder
    if folder.suffix == ".pk3" and folder.is_file():
        with zipfile.ZipFile(folder) as archive:
            extracted = root / "pictures"
            for name in filter(lambda name: name.endswith(source.suffixes), archive.namelist()):
                place = extracted.joinpath(*(part for part in name.split("/") if part not in ("", "..")))
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(archive.read(name))
        folder = extracted
    originals, digests = [], set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        chosen = name.startswith(source.names) and not any(part in f"/{name}" for part in source.without)
        if not chosen or path.suffix not in source.suffixes or path.is_symlink():
            continue
        digest = hashlib.sha256(path.read_bytes()).digest()
        with Image.open(path) as opened:
            large = min(opened.size) >= min_side if source.domain in CUT_DOMAINS else max(opened.size) >= MIN_SIDE_SMALL
        if large and digest not in digests:
            digests.add(digest)
            originals.append(Original(source.domain, package, name, path))
    if not originals:
        raise InputError(f"The package {package} holds no pictures in {source.folder}: it is another version.")
    return originals


def make(originals: Sequence[Original], tree: Path, options: Options) -> None:
    """Write seeds, pool, holdout and the table of all pictures to the folder `tree`.

    Raises InputError where the originals do not give that many pictures.
    """
    counts = {
        "seeds": max(4 * len(SEED_DOMAINS), options.count // 10),
        "pool": options.count,
        "holdout": max(4, options.count // 20),
    }
    rows: list[dict[str, Any]] = []
    for part, count in counts.items():
        generator = np.random.default_rng([options.seed, list(counts).index(part)])
        tiles = choose(split(originals, options.seed)[part], count, options, generator)
        if len(tiles) < count:
            raise InputError(
                f"--count {options.count}: the packages give {len(tiles):,} different pictures for the {part}, not "
                f"{count:,}. Give a smaller count."
            )
        rows += _write_part(part, tiles, tree, options)
        progress.say(f"{part}: {count:,} pictures")
    if options.layout == "tars":
        _pack(tree / "pool", [row for row in rows if row["part"] == "pool"])
    parquet.write_table(str(tree / "pictures.parquet"), pa.Table.from_pylist(rows, PICTURES))


def split(originals: Sequence[Original], seed: int) -> dict[str, list[Original]]:
    """The originals of seeds, pool and holdout. The pool holds the originals of every domain without seeds."""
    parts: dict[str, list[Original]] = {part: [] for part in PART_OF}
    for domain in sorted({original.domain for original in originals}):
        listed = [original for original in originals if original.domain == domain]
        ordered = sorted(listed, key=lambda original: hashlib.sha256(f"{seed} {original.name}".encode()).digest())
        for position, original in enumerate(ordered):
            part = PART_OF[position % len(PART_OF)]
            parts["pool" if part == "seeds" and domain not in SEED_DOMAINS else part].append(original)
    return parts


def choose(
    originals: Sequence[Original],
    count: int,
    options: Options,
    generator: np.random.Generator,
    *,
    max_grid: int = MAX_GRID,
) -> list[Tile]:
    """`count` tiles, or all where there are fewer: of the domains by WEIGHTS, as far as each goes.

    max_grid: tiles along the longer side of an original, at most.
    """
    by_domain: dict[str, list[Original]] = {}
    for original in originals:
        by_domain.setdefault(original.domain, []).append(original)
    previews = {original.path: _preview(original) for original in originals}
    largest = {domain: len(_tiles(listed, max_grid, previews, options)) for domain, listed in by_domain.items()}
    chosen: list[Tile] = []
    # First the domain that is used up first, so that the others make up for it.
    domains = sorted(by_domain, key=lambda domain: largest[domain] / WEIGHTS[domain])
    for position, domain in enumerate(domains):
        share = WEIGHTS[domain] / sum(WEIGHTS[other] for other in domains[position:])
        wanted = min(largest[domain], round(share * (count - len(chosen))))
        # Some tiles lack contrast, so a finer grid may have fewer of them.
        grids = (_tiles(by_domain[domain], grid, previews, options) for grid in range(1, max_grid + 1))
        tiles = next(tiles for tiles in grids if len(tiles) >= wanted)
        chosen += [tiles[index] for index in generator.permutation(len(tiles))[:wanted]]
    return [chosen[index] for index in generator.permutation(len(chosen))]


def _preview(original: Original) -> tuple[tuple[int, int], np.ndarray]:
    """The size of an original, and its grey values at a smaller size."""
    with Image.open(original.path) as opened:
        turned = opened.getexif().get(ORIENTATION, 1) >= 5
        size = opened.size[::-1] if turned else opened.size
        opened.draft("L", (PREVIEW_SIDE, PREVIEW_SIDE))
        grey = on_white(ImageOps.exif_transpose(opened)).convert("L")
        grey.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return size, np.asarray(grey)


def _tiles(
    originals: Sequence[Original],
    grid: int,
    previews: Mapping[Path, tuple[tuple[int, int], np.ndarray]],
    options: Options,
) -> list[Tile]:
    """The tiles of all originals with enough contrast: `grid` along the longer side, or fewer where they are small."""
    tiles = []
    for original in originals:
        (width, height), grey = previews[original.path]
        if original.domain not in CUT_DOMAINS:
            tiles.append(Tile(original, (0, 0, width, height)))
            continue
        along = max(1, min(grid, max(width, height) // options.min_tile))
        side = max(width, height) / along
        columns, rows = (max(1, min(round(length / side), length // options.min_tile)) for length in (width, height))
        for row in range(rows):
            for column in range(columns):
                edges = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
                left, top, right, bottom = (
                    int(edge * length) for edge, length in zip(edges, grey.shape[::-1] * 2, strict=True)
                )
                if grey[top : bottom + 1, left : right + 1].std() >= MIN_CONTRAST:
                    box = tuple(int(edge * length) for edge, length in zip(edges, (width, height) * 2, strict=True))
                    tiles.append(Tile(original, (box[0], box[1], box[2], box[3])))
    return tiles


def _write_part(part: str, tiles: Sequence[Tile], tree: Path, options: Options) -> list[dict[str, Any]]:
    """Write a picture for each tile; returns their rows. Pictures are numbered in the order of the tiles."""
    # One original after the other, so that each is decoded once.
    by_original: dict[Path, list[int]] = {}
    for number, tile in enumerate(tiles):
        by_original.setdefault(tile.original.path, []).append(number)
    rows: dict[int, dict[str, Any]] = {}
    for path, numbers in by_original.items():
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            decoded = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        for number in numbers:
            tile = tiles[number]
            generator = np.random.default_rng([options.seed, PART_OF.index(part), number])
            box = inside(tile, generator)
            file_format = str(generator.choice(list(FORMATS), p=list(FORMATS.values())))
            picture = _scale(decoded.crop(box), options, generator)
            folder = f"{part}/{tile.original.domain}" if part == "seeds" else part
            name = f"{folder}/{number:05d}.{SUFFIX_OF[file_format]}"
            (tree / folder).mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(encode(picture, file_format, quality=int(generator.integers(70, 96))))
            left, top, right, bottom = box
            rows[number] = {
                "name": name,
                "part": part,
                "domain": tile.original.domain,
                "package": tile.original.package,
                "original": tile.original.name,
                "left": left,
                "top": top,
                "right": right,
                "bottom": bottom,
                "width": picture.width,
                "height": picture.height,
                "format": file_format,
            }
    return [rows[number] for number in range(len(tiles))]


def inside(tile: Tile, generator: np.random.Generator) -> Box:
    """A box of other size and shape in the tile; the whole tile where the domain is not cut."""
    if tile.original.domain not in CUT_DOMAINS:
        return tile.box
    left, top, right, bottom = tile.box
    width, height = (int(length * generator.uniform(MIN_SHARE, 1)) for length in (right - left, bottom - top))
    left += int(generator.integers(0, right - left - width + 1))
    top += int(generator.integers(0, bottom - top - height + 1))
    return left, top, left + width, top + height


def _scale(picture: Image.Image, options: Options, generator: np.random.Generator) -> Image.Image:
    """The picture with sides of 110 to 150 pixels for --small, otherwise with at most MAX_SIDE."""
    if options.small:
        size = generator.integers(MIN_SIDE_SMALL, MAX_SIDE_SMALL, size=2, endpoint=True)
        return ImageOps.fit(picture, (int(size[0]), int(size[1])), Image.Resampling.LANCZOS)
    if max(picture.size) > MAX_SIDE:
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture


def encode(picture: Image.Image, file_format: str, quality: int) -> bytes:
    """The bytes of a file. Formats other than PNG and WebP get a white ground."""
    if file_format not in ("PNG", "WEBP"):
        picture = on_white(picture)
    if file_format == "GIF":
        picture = picture.quantize(256)
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": quality},
        "WEBP": {"quality": quality},
        "TIFF": {"compression": "tiff_lzw"},
    }
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options.get(file_format, {}))
    return buffer.getvalue()


def on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGB", "L"):
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def _pack(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the files of the pool by NUM_TARS tars. The `name` of each row becomes TAR#MEMBER."""
    for index in range(NUM_TARS):
        path = folder / f"{index:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for row in rows[index * len(rows) // NUM_TARS : (index + 1) * len(rows) // NUM_TARS]:
                member = folder / PurePosixPath(row["name"]).name
                header = tarfile.TarInfo(member.name)  # without the time and the owner of the file
                header.size = member.stat().st_size
                with member.open("rb") as file:
                    tar.addfile(header, file)
                member.unlink()
                row["name"] = f"pool/{path.name}#{member.name}"


def command_line(
    output: Annotated[Path, typer.Option(help="New folder to make, on this machine.")],
    count: Annotated[int, typer.Option(min=1, help="Number of pictures in the pool.")] = 2000,
    small: Annotated[bool, typer.Option("--small", help="Sides of 110 to 150 pixels.")] = False,
    layout: Annotated[Layout, typer.Option(help="Of the pool: files, or ten tars.")] = "folder",
    seed: Annotated[int, typer.Option(min=0, help="Of the choice, the crops and the formats.")] = 0,
    packages_folder: Annotated[
        Path | None, typer.Option("--packages", help="Folder with the .deb files, instead of apt-get.")
    ] = None,
) -> None:
    """Make seeds, a pool and a holdout of real pictures from Debian packages."""
    run(output, Options(count, small, layout, seed), packages_folder)


if __name__ == "__main__":
    from pipelines.bench import photographs  # by its real name: otherwise each class would exist twice

    command.main(photographs.command_line)
