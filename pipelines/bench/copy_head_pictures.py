"""Makes the pictures on which the shipped copy head is trained, from Debian packages and the demo's images.

    python -m pipelines.bench.copy_head_pictures --demo data/demo --output FOLDER

    FOLDER/
      photographs/    tiles of photographs, cut-out objects and textures: PNG, sides of at most MAX_SIDE
      drawings/       NUM_DRAWINGS drawings as they are
      copyright/      the copyright file of each package

Photographs, objects and textures are those of the development draw (copy_pictures.py), so none of the held-back draw is
among them. Drawings are those that the demo leaves out (`pool_rest`). No file has the bytes of a seed, holdout or pool
image of the demo.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageOps

from curation.engine import command, progress
from curation.errors import InputError
from curation.files.hashes import sha256_of_file
from pipelines.bench import photographs
from pipelines.bench.copy_pictures import DRAWS, half_of
from pipelines.bench.photographs import OBJECTS, SCENERY, TEXTURES, Original, Tile
from pipelines.demo import packages

MAX_SIDE = 400  # pixels of the longer side. Assumed: the network reads 224.
NUM_DRAWINGS = 1600  # assumed: about as many as photographs
# Of photographs: all tiles that there are.
NUM_TILES = 2000
USED_BY_THE_DEMO = ("seeds", "holdout", "pool")
SEED = 3


def run(output: Path, demo: Path, packages_folder: Path | None = None) -> None:
    """Make the pictures in the new folder `output`. `packages_folder` holds the .deb files; else apt-get fetches them.

    Raises InputError where `output` holds anything, where a package is unavailable, or where `demo` lacks images.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output '{output}' is not empty. Give a new folder, or delete this one.")
    drawings = sorted(path for path in (demo / "pool_rest").rglob("*.png"))
    if len(drawings) < NUM_DRAWINGS:
        raise InputError(
            f"--demo '{demo}' holds {len(drawings)} drawings in pool_rest/, not {NUM_DRAWINGS}. Give the folder of the "
            "demo's images; `make curate` makes it."
        )
    used = {sha256_of_file(str(path)) for part in USED_BY_THE_DEMO for path in (demo / part).rglob("*.png")}
    partial = output.resolve().with_name(output.name + ".partial")
    draw = DRAWS["development"]
    if packages_folder is None:
        debs = packages.download(partial / "apt", draw.sources, draw.megabytes)
    else:
        debs = packages.find(packages_folder, draw.sources)
    tree = partial / "tree"
    for folder in (partial / "unpacked", tree):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("photographs", "drawings", "copyright"):
        (tree / name).mkdir(parents=True)
    originals: list[Original] = []
    for package, deb in debs.items():
        root = partial / "unpacked" / package
        root.mkdir(parents=True)
        packages.run_tool(["dpkg-deb", "-x", str(deb.resolve()), str(root)], partial)
        for original in photographs.find_originals(package, draw.sources[package], root, photographs.MIN_TILE):
            if half_of(original) == draw.half and sha256_of_file(str(original.path)) not in used:
                originals.append(original)
        shutil.copyfile(packages.copyright_file(package, root), tree / "copyright" / package)
    shutil.copyfile(demo / "pool_rest" / f"copyright-{packages.DRAWINGS}", tree / "copyright" / packages.DRAWINGS)
    num_photographs = write_photographs(originals, tree / "photographs")
    num_drawings = copy_drawings(drawings, used, tree / "drawings")
    progress.say(f"{num_photographs:,} pictures of photographs, objects and textures; {num_drawings:,} drawings")
    if output.exists():
        output.rmdir()
    tree.rename(output)
    shutil.rmtree(partial)


def write_photographs(originals: list[Original], folder: Path) -> int:
    """Write the tiles of the photographs, and the other pictures whole; returns their number."""
    number = 0
    for domain, count, max_grid in (
        (SCENERY, NUM_TILES, photographs.MAX_GRID),
        (OBJECTS, None, 1),
        (TEXTURES, None, 1),
    ):
        listed = [original for original in originals if original.domain == domain]
        wanted = len(listed) if count is None else count
        generator = np.random.default_rng([SEED, len(domain)])
        options = photographs.Options(count=wanted)
        tiles = photographs.choose(listed, wanted, options, generator, max_grid=max_grid)
        for tile in sorted(tiles, key=lambda tile: (tile.original.package, tile.original.name, tile.box)):
            picture_of(tile).save(folder / f"{domain}-{number:05d}.png")
            number += 1
    return number


def picture_of(tile: Tile) -> Image.Image:
    """The picture (RGB) of a tile, with sides of at most MAX_SIDE."""
    with Image.open(tile.original.path) as opened:
        picture = photographs.on_white(ImageOps.exif_transpose(opened).crop(tile.box))
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture


def copy_drawings(drawings: list[Path], used: set[str], folder: Path) -> int:
    """Copy drawings, those with the smallest hashes; returns their number. Their names are their hashes."""
    by_hash = {sha256_of_file(str(path)): path for path in drawings}
    # Hashed once more, so that image ids give another order.
    chosen = sorted(by_hash.keys() - used, key=lambda digest: hashlib.sha256(digest.encode()).digest())[:NUM_DRAWINGS]
    for digest in chosen:
        shutil.copyfile(by_hash[digest], folder / f"{digest[:32]}.png")
    return len(chosen)


def command_line(
    demo: Annotated[Path, typer.Option("--demo", help="Folder of the demo's images, as `make curate` makes it.")],
    output: Annotated[Path, typer.Option("--output", help="New folder to make, on this machine.")],
    packages_folder: Annotated[
        Path | None, typer.Option("--packages", help="Folder with the .deb files, instead of apt-get.")
    ] = None,
) -> None:
    """Make the pictures on which the shipped copy head is trained."""
    run(output, demo, packages_folder)


if __name__ == "__main__":
    from pipelines.bench import copy_head_pictures  # by its real name: otherwise each class would exist twice

    command.main(copy_head_pictures.command_line)
