"""Draws pictures and edited copies of them from Debian packages, to measure copy detection on photographs.

    python -m pipelines.bench.copy_pictures --draw development --output FOLDER

There are three draws (DRAWS). Settings and models may be chosen on `development`. `held-back` holds other pictures of
the same packages, and those of packages that the first draw lacks; its random numbers differ. It has been scored, and
its false pairs have served for repairs. `second-held-back` holds only packages of its own. It is there to be scored
once.

    FOLDER/
      seeds/        originals whose copies lie in the pool
      pool/         originals, copies of all originals, and pictures without copies
      holdout/      originals whose copies lie in the pool
      copyright/    the copyright file of each package
      copies.parquet

Every original shows something else: a whole picture of a package, or a tile of a photograph that shares no pixel with
another tile. Some resemble one another nevertheless: frames of one film, textures with a second version. The file
near_duplicates.toml names them. The same packages and Pillow give the same bytes.
"""

import hashlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import typer
from PIL import Image, ImageOps

from curation.copies.edits import KINDS, edit
from curation.engine import command, progress
from curation.errors import InputError
from curation.files import parquet
from curation.images.hashing import image_id
from pipelines.bench import photographs
from pipelines.bench.photographs import (
    FORMATS,
    NEBULAE,
    OBJECTS,
    SCENERY,
    SHOTS,
    SUFFIX_OF,
    TEXTURES,
    Original,
    Source,
    Tile,
)
from pipelines.demo import packages

Name = Literal["development", "held-back", "second-held-back"]
TABLE = "copies.parquet"
# The longer side of an original, in pixels. Assumed: a web picture, at a size that keeps a run at a few minutes.
MAX_SIDE = 512
COPIES = pa.schema(
    [
        ("path", pa.string()),  # below the folder of the draw
        ("image_id", pa.string()),
        ("is_copy", pa.bool_()),
        ("kind", pa.string()),  # of the edit, one of KINDS; empty for an original
        # Of the original; an original has itself.
        ("original_path", pa.string()),
        ("original_image_id", pa.string()),
        ("role", pa.string()),  # 'seeds', 'pool' or 'holdout'
        ("domain", pa.string()),
        ("package", pa.string()),
        ("picture", pa.string()),  # its path in the package, and for a tile #LEFT,TOP in pixels of the original
    ]
)
"""The columns of copies.parquet: a row for each file."""


@dataclass(frozen=True)
class Counts:
    """Numbers of originals of one domain."""

    copied: int
    """In seeds and pool, with copies."""
    holdout: int
    """With copies in the pool."""
    alone: int
    """In the pool, without copies."""


@dataclass(frozen=True)
class Draw:
    """One choice of pictures."""

    seed: int
    """Of all random numbers."""
    counts: Mapping[str, Counts]
    """By domain."""
    sources: Mapping[str, Source]
    """By package; all pictures of a package outside SHARED may be used, whatever the half."""
    megabytes: int
    half: int | None = None
    """0 or 1: the half of the pictures of the shared packages, by the hash of their names; None without any."""
    every: Mapping[str, int] = field(default_factory=dict)
    """By package: of consecutive pictures by name, such as frames, one of that many."""


SHARED = photographs.SOURCES
# Looked at 2026-11, in Debian 12.
UFO_FOLDERS = ("nature", "pics", "ctp1", "mattn", "buildings", "shop", "furniture", "doors", "terrain", "dirt", "misc")
OTHERS = {
    # Surfaces, signs and paintings of a game; without normal, gloss and glow maps.
    "ufoai-textures": Source(
        TEXTURES,
        "usr/share/games/ufoai/base/0textures.pk3",
        names=tuple(f"textures/tex_{name}/" for name in UFO_FOLDERS),
        without=("_nm.", "_gm.", "_sm.", "_glow"),
    ),
    "stellarium-data": Source(NEBULAE, "usr/share/stellarium/nebulae/default"),
    # Photographs of the documentation: several views of one scene, both cameras of a stereo pair.
    "opencv-doc": Source(
        SHOTS,
        "usr/share/doc/opencv-doc/examples/data",
        without=(
            "Logo",
            "aloeGT",
            "mask",
            "ml.png",
            "dnn/",
            "digits",
            "gradient",
            "imageText",
            "templ",
            "/pic",
            "notes",
        ),
    ),
    # Frames of films, a grey picture each.
    "visp-images-data": Source(
        SHOTS,
        "usr/share/visp-images-data/ViSP-images",
        names=("Klimt/", "Solvay/", "cube/", "ellipse-1/", "mbt/cube/", "mbt-depth/"),
        suffixes=(".jpg", ".png", ".pgm"),
    ),
}
# Looked at 2026-11, in Debian 12. No picture of SHARED or OTHERS is among them (grey grids compared).
LATER = {
    # Photographs of landscapes, towns and space stations, 720 x 360 each.
    "endless-sky-data": Source(SCENERY, "usr/share/games/endless-sky/images/land"),
    "lxqt-themes": Source(
        SCENERY,
        "usr/share/lxqt/wallpapers",
        names=(
            *("Butterfly-Kenneth-Wimer", "Valendas", "after-the-rain", "appleflower", "beam", "butterfly", "cloud"),
            *("drop", "flowers", "fog", "this-is-not-windows"),
        ),
    ),
    # Tools of a laboratory.
    "kalzium-data": Source(OBJECTS, "usr/share/kalzium/data/toolpics", without=("kolbenprober",)),
    # Things, animals and people, and scans of tissue; both cameras of a stereo pair.
    "python3-skimage": Source(
        OBJECTS,
        "usr/lib/python3/dist-packages/skimage/data",
        names=(
            *("astronaut", "camera", "chelsea", "coffee", "coins", "hubble_deep_field", "ihc", "moon"),
            *("motorcycle", "page", "retina", "rocket", "text"),
        ),
    ),
    # Grounds of a game, some of them with snow over a part.
    "extremetuxracer-data": Source(TEXTURES, "usr/share/games/etr/terrains", suffixes=(".png",)),
    # Fronts of houses, walls and grounds beside a race track.
    "torcs-data": Source(
        TEXTURES,
        "usr/share/games/torcs/tracks/road/e-track-2",
        names=(
            *("asphalt-e2", "block", "border-gr", "bordertile", "conc", "grass", "gravel", "house", "road", "rock"),
            "tent2",
        ),
        suffixes=(".png",),
    ),
}
DRAWS: dict[Name, Draw] = {
    "development": Draw(
        seed=1,
        half=0,
        counts={SCENERY: Counts(120, 20, 125), OBJECTS: Counts(60, 15, 40), TEXTURES: Counts(70, 15, 75)},
        sources=SHARED,
        megabytes=photographs.MEGABYTES,
    ),
    "held-back": Draw(
        seed=2,
        half=1,
        counts={
            SCENERY: Counts(100, 20, 100),
            OBJECTS: Counts(50, 10, 50),
            TEXTURES: Counts(70, 15, 90),
            NEBULAE: Counts(20, 5, 30),
            SHOTS: Counts(20, 5, 30),
        },
        sources=SHARED | OTHERS,
        megabytes=photographs.MEGABYTES + 753,
        every={"visp-images-data": 10},
    ),
    "second-held-back": Draw(
        seed=3,
        counts={SCENERY: Counts(105, 20, 60), OBJECTS: Counts(25, 5, 18), TEXTURES: Counts(30, 5, 25)},
        sources=LATER,
        megabytes=514,
    ),
}
SHARE_OF_SEEDS = 0.16  # of the copied originals. Assumed: forty seeds.
# Numbers of copies of an original of seeds or pool, and of the holdout: at least 72 of each kind.
COPIES_EACH = {"seeds": (4, 5), "pool": (4, 5), "holdout": (5,)}


def run(name: Name, output: Path, packages_folder: Path | None = None) -> None:
    """Make a draw in the new folder `output`. `packages_folder` holds the .deb files; else apt-get fetches them.

    Raises InputError where `output` holds anything, and where a package is unavailable.
    """
    draw = DRAWS[name]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output '{output}' is not empty. Give a new folder, or delete this one.")
    partial = output.resolve().with_name(output.name + ".partial")
    if packages_folder is None:
        debs = packages.download(partial / "apt", draw.sources, draw.megabytes)
    else:
        debs = packages.find(packages_folder, draw.sources)
    for folder in ("unpacked", "tree"):
        shutil.rmtree(partial / folder, ignore_errors=True)
    originals: list[Original] = []
    for package, deb in debs.items():
        root = partial / "unpacked" / package
        root.mkdir(parents=True)
        packages.run_tool(["dpkg-deb", "-x", str(deb.resolve()), str(root)], partial)
        listed = photographs.find_originals(package, draw.sources[package], root, photographs.MIN_TILE)
        if package in SHARED:
            listed = [original for original in listed if half_of(original) == draw.half]
        listed = listed[:: draw.every.get(package, 1)]
        progress.say(f"{package}: {len(listed)} pictures of {draw.sources[package].domain}")
        originals += listed
        copyright_file = partial / "tree" / "copyright" / package
        copyright_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packages.copyright_file(package, root), copyright_file)
    make(originals, partial / "tree", draw)
    if output.exists():
        output.rmdir()
    (partial / "tree").rename(output)
    shutil.rmtree(partial)


def half_of(original: Original) -> int:
    """0 or 1, by the hash of the package and the name."""
    return hashlib.sha256(f"{original.package}/{original.name}".encode()).digest()[0] % 2


def make(originals: Sequence[Original], tree: Path, draw: Draw) -> None:
    """Write the pictures, their copies and the table to the folder `tree`.

    Raises InputError where a domain has too few pictures.
    """
    chosen: list[tuple[str, bool, Tile]] = []  # role, has copies, place
    for domain, counts in draw.counts.items():
        listed = [original for original in originals if original.domain == domain]
        wanted = counts.copied + counts.holdout + counts.alone
        # Textures repeat, so their tiles may equal one another.
        max_grid = photographs.MAX_GRID if domain == SCENERY else 1
        generator = np.random.default_rng([draw.seed, 0, sorted(draw.counts).index(domain)])
        tiles = photographs.choose(listed, wanted, photographs.Options(count=wanted), generator, max_grid=max_grid)
        if len(tiles) < wanted:
            raise InputError(f"The packages give {len(tiles)} different pictures of {domain}, not {wanted}.")
        num_seeds = max(1, round(SHARE_OF_SEEDS * counts.copied))
        roles = ["seeds"] * num_seeds + ["pool"] * (counts.copied - num_seeds) + ["holdout"] * counts.holdout
        chosen += [(role, True, tile) for role, tile in zip(roles, tiles, strict=False)]
        chosen += [("pool", False, tile) for tile in tiles[len(roles) :]]
    _write(chosen, tree, draw.seed)


def _write(chosen: Sequence[tuple[str, bool, Tile]], tree: Path, seed: int) -> None:
    """Write the originals, by role, with or without copies, and the copies; then the table."""
    generator = np.random.default_rng([seed, 1])
    order = [chosen[index] for index in generator.permutation(len(chosen))]
    kinds = [str(kind) for kind in generator.permutation(list(KINDS))]
    num_copies = [int(generator.choice(COPIES_EACH[role])) if has_copies else 0 for role, has_copies, _ in order]
    # Numbers of files in random order: a name tells nothing about its picture.
    numbers = iter(generator.permutation(len(order) + sum(num_copies)).tolist())
    # The kinds take turns, so each comes equally often, and none twice for one original.
    turns = itertools.cycle(kinds)
    rows: list[dict[str, Any]] = []
    for index, ((role, _, tile), count) in enumerate(zip(order, num_copies, strict=True)):
        generator = np.random.default_rng([seed, 2, index])
        picture = _read(tile, generator)
        original = _write_picture(picture, tree, role, next(numbers), generator)
        shared = {
            "original_path": original["path"],
            "original_image_id": original["image_id"],
            "role": role,
            "domain": tile.original.domain,
            "package": tile.original.package,
            "picture": tile.original.name + ("#{},{}".format(*tile.box) if _is_cut(tile) else ""),
        }
        rows.append(original | shared | {"is_copy": False, "kind": ""})
        for kind in itertools.islice(turns, count):
            copy = _write_picture(edit(picture, kind, generator), tree, "pool", next(numbers), generator)
            rows.append(copy | shared | {"is_copy": True, "kind": kind})
    rows.sort(key=lambda row: row["path"])
    parquet.write_table(str(tree / TABLE), pa.Table.from_pylist(rows, COPIES))
    progress.say(f"{len(order):,} pictures and {sum(num_copies):,} copies of {len(KINDS)} kinds")


def _is_cut(tile: Tile) -> bool:
    with Image.open(tile.original.path) as opened:
        return tile.box not in ((0, 0, *opened.size), (0, 0, *opened.size[::-1]))


def _read(tile: Tile, generator: np.random.Generator) -> Image.Image:
    """The picture (RGB) of a tile: a box in it, with sides of at most MAX_SIDE."""
    with Image.open(tile.original.path) as opened:
        upright = ImageOps.exif_transpose(opened)
        box = photographs.inside(tile, generator) if tile.original.domain == SCENERY else tile.box
        picture = photographs.on_white(upright.crop(box))
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture


def _write_picture(
    picture: Image.Image, tree: Path, folder: str, number: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Write a file in a random format; returns its path and image id."""
    file_format = str(generator.choice(list(FORMATS), p=list(FORMATS.values())))
    data = photographs.encode(picture, file_format, quality=int(generator.integers(70, 96)))
    path = tree / folder / f"{number:05d}.{SUFFIX_OF[file_format]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"path": f"{folder}/{path.name}", "image_id": image_id(data)}


def command_line(
    draw: Annotated[Name, typer.Option("--draw", help="The choice of pictures.")],
    output: Annotated[Path, typer.Option(help="New folder to make, on this machine.")],
    packages_folder: Annotated[
        Path | None, typer.Option("--packages", help="Folder with the .deb files, instead of apt-get.")
    ] = None,
) -> None:
    """Draw pictures from Debian packages, and make edited copies of them."""
    run(draw, output, packages_folder)


if __name__ == "__main__":
    from pipelines.bench import copy_pictures  # by its real name: otherwise each class would exist twice

    command.main(copy_pictures.command_line)
