"""Makes the demo's images: fetched from two Debian packages, split by role, with planted copies of known originals.

Copy detection can only be measured where the copies are known. A pipeline can only be trusted after it has met broken
files. So this adds copies made by eight transforms, and a few odd files, to 796 labelled stamps and 8,121 labelled
drawings.

    data/demo/
      seeds/<dataset>/     230 stamps: animals 111, food 55, plants 34, vehicles 30
      holdout/             160 stamps: every fifth of all 796, by the SHA-1 of the path
      pool/                3,000 drawings: the first by the SHA-1 of the file name
      pool_rest/           5,121 drawings: the others
      planted/<transform>/ 400 copies, 50 per transform: 35 of drawings in pool/, 15 of stamps in holdout/
      odd/                 11 files: broken, odd, or an exact copy under another name
      planted.parquet      every planted copy with its original
      odd.parquet          every odd file with the expected outcome
      manifest.json        written last: the folder is complete
    data/demo.partial/     only while unfinished; the next try reuses the packages downloaded here

(Numbers measured 2026-11 on tuxpaint-stamps-default 2022.06.04-1 and openclipart-png 1:0.18+dfsg-19.)

The source roots are the four folders in seeds/, and holdout/, pool/, pool_rest/, planted/ and odd/. Below the first
seven of these roots a file keeps its path in the package, and its folder is its label:
seeds/animals/animals/birds/crow.png and holdout/animals/birds/lark.png both have the label `animals/birds`. The 406
other stamps (letters, signs, ...) are left out. Links (1,221 drawings, all to drawings) become files, so that no link
leaves its root; they stay exact copies. Each package's copyright file lies in the roots that hold its images or copies
of them.

Everything is made in data/demo.partial/ and renamed in one step. The same packages give the same bytes. The folder is
local, because apt and dpkg write local folders only.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from curation.engine import command, progress
from curation.engine.manifest import MANIFEST_NAME, Manifest, Plan, ShardRecord, read_manifest, write_manifest
from curation.errors import OutputMismatchError
from curation.files.paths import FileRecord
from pipelines.demo import odd_files, packages, planted_copies
from pipelines.demo.packages import DRAWINGS, STAMPS

SEED_DATASETS = ("animals", "food", "plants", "vehicles")

# The roots that hold images of a package, or copies of them.
COPYRIGHT_ROOTS = {
    STAMPS: ("seeds", "holdout", "planted"),
    DRAWINGS: ("pool", "pool_rest", "planted", "odd"),
}


@dataclass(frozen=True)
class DemoRecipe:
    """How the two packages are split, and how many copies are planted. Defaults assumed; the manifest holds all."""

    seed: int = 0
    """Of the choice of originals and of every copy's parameters."""
    holdout_every: int = 5
    """One stamp in this many is held out."""
    pool_size: int = 3_000
    """Drawings in pool/; the others go to pool_rest/."""
    num_pool_copies: int = 35
    """Copies of drawings, per transform."""
    num_holdout_copies: int = 15
    """Copies of held-out stamps, per transform. No original is used twice; 132 of the 160 stamps are good originals."""


def run(output: Path, packages_folder: Path | None = None, recipe: DemoRecipe | None = None) -> Manifest:
    """Make the demo data in the local folder `output`; returns its manifest.

    `packages_folder` holds the two .deb files; without it, apt-get downloads them (292 MB). Finished data is left as it
    is. Raises InputError when a package is unavailable or not as expected, OutputMismatchError when `output` holds
    anything else.
    """
    recipe = recipe or DemoRecipe()
    debs = None if packages_folder is None else packages.find(packages_folder)
    finished = _read_finished(recipe, output, debs)
    if finished is not None:
        progress.say(f"demo data: '{output}' is complete, nothing to do")
        return finished
    partial = output.resolve().with_name(output.name + ".partial")
    if debs is None:
        debs = packages.download(partial / "apt")
    tree = _make_empty(partial / "tree")
    _unpack_and_split(recipe, debs, _make_empty(partial / "unpacked"), tree)
    files = _plant(recipe, tree)
    shard = ShardRecord(name="demo", files=files, totals=_count_images(tree))
    plan = _plan(recipe, packages.hash_files(debs))
    manifest = Manifest(plan=plan, shards=(shard,), totals=shard.totals, rejects={})
    write_manifest(str(tree), manifest)
    tree.rename(output)
    shutil.rmtree(partial)
    progress.say(
        f"demo data: '{output}' holds " + ", ".join(f"{count} in {name}" for name, count in shard.totals.items())
    )
    return manifest


def _plan(recipe: DemoRecipe, package_hashes: dict[str, str]) -> Plan:
    return Plan(stage="demo_data", config=asdict(recipe), inputs=package_hashes, num_shards=1)


def _read_finished(recipe: DemoRecipe, output: Path, debs: dict[str, Path] | None) -> Manifest | None:
    """The manifest of complete demo data in `output`; None where there is nothing. Raises OutputMismatchError."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifest = read_manifest(str(output)) if output.is_dir() else None
    if manifest is None:
        raise OutputMismatchError(
            f"'{output}' exists, but without {MANIFEST_NAME} it is not demo data. Give another folder "
            "(demo_data in a config, --output of pipelines.demo.dataset)."
        )
    plan = _plan(recipe, manifest.plan.inputs if debs is None else packages.hash_files(debs))
    if (there := manifest.plan) != plan:
        before, after = {**there.config, **there.inputs}, {**plan.config, **plan.inputs}
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        if there.format_version != plan.format_version:
            cause = f"by another version of Seedbed (format {there.format_version}, not {plan.format_version})"
        else:
            cause = f"with other settings or from other packages ({', '.join(changed)})"
        raise OutputMismatchError(
            f"The demo data in '{output}' was made {cause}. Delete the folder, and the same command makes it again; or "
            "give another one (demo_data in a config, --output of pipelines.demo.dataset)."
        )
    return manifest


def _unpack_and_split(recipe: DemoRecipe, debs: dict[str, Path], unpacked: Path, tree: Path) -> None:
    """Unpack the packages, and move each image to its root in `tree`."""
    splits: dict[str, Callable[[DemoRecipe, Sequence[str]], dict[str, str]]] = {
        STAMPS: _split_stamps,
        DRAWINGS: _split_drawings,
    }
    for package, split in splits.items():
        images = packages.unpack(package, debs[package], unpacked / package)
        for name, root in split(recipe, packages.image_names(images)).items():
            target = tree / root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (images / name).rename(target)
        for root in COPYRIGHT_ROOTS[package]:
            (tree / root).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(packages.copyright_file(package, unpacked / package), tree / root / f"copyright-{package}")


def _split_stamps(recipe: DemoRecipe, names: Sequence[str]) -> dict[str, str]:
    """The root for each stamp that is used."""
    roots = {}
    for position, name in enumerate(sorted(names, key=_sha1)):
        dataset = PurePosixPath(name).parts[0]
        if position % recipe.holdout_every == 0:
            roots[name] = "holdout"
        elif dataset in SEED_DATASETS:
            roots[name] = f"seeds/{dataset}"
    return roots


def _split_drawings(recipe: DemoRecipe, names: Sequence[str]) -> dict[str, str]:
    """The root for each drawing. Drawings with the same file name (mostly links) are ordered by their path."""
    ordered = sorted(names, key=lambda name: (_sha1(PurePosixPath(name).name), name))
    return {name: "pool" if position < recipe.pool_size else "pool_rest" for position, name in enumerate(ordered)}


def _plant(recipe: DemoRecipe, tree: Path) -> tuple[FileRecord, FileRecord]:
    """Write planted/, odd/ and their tables; returns the records of the tables."""
    unique = planted_copies.unique_images(tree)
    pool, holdout, stickers = (
        planted_copies.originals(tree, unique, root, planted_copies.make_generator(recipe.seed, *purpose))
        for root, purpose in (
            ("pool", ("originals", "pool")),
            ("holdout", ("originals", "holdout")),
            ("pool", ("stickers",)),
        )
    )
    sources = [("pool", pool)] * recipe.num_pool_copies + [("holdout", holdout)] * recipe.num_holdout_copies
    copies = planted_copies.plant(tree, sources, stickers, recipe.seed)
    return copies, odd_files.plant(tree, pool)  # the same iterator: no original is used twice


def _count_images(tree: Path) -> dict[str, int]:
    roots = [*(f"seeds/{dataset}" for dataset in SEED_DATASETS), "holdout", "pool", "pool_rest"]
    roots += [*(f"planted/{transform}" for transform in planted_copies.TRANSFORMS), "odd"]
    return {root: sum(path.suffix in (".png", ".jpg", ".gif") for path in (tree / root).rglob("*")) for root in roots}


def _make_empty(folder: Path) -> Path:
    """`folder`, new and empty."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def command_line(
    output: Annotated[Path, typer.Option(help="Folder to make, on this machine.")] = Path("data/demo"),
    packages_folder: Annotated[
        Path | None, typer.Option("--packages", help="Folder with the two .deb files, instead of apt-get.")
    ] = None,
) -> None:
    """Fetch the demo's images, split them by role, and plant copies of known originals."""
    run(output, packages_folder)


if __name__ == "__main__":
    from pipelines.demo import dataset  # by its real name: otherwise each class would exist twice

    command.main(dataset.command_line)
