"""The demo's images: fetched from two Debian packages, split by role, with planted copies whose truth is known.

A copy detector can only be measured where the copies are known, and a pipeline only be trusted that met bad files. So
to 796 labelled stamps and 8,121 labelled drawings this adds copies made by eight transforms, and a few odd files.

    data/demo/
      seeds/<dataset>/     230 stamps: animals 111, food 55, plants 34, vehicles 30
      holdout/             160 stamps: every fifth of all 796, by the SHA-1 of the path
      pool/                3,000 drawings: the first by the SHA-1 of the file name
      pool_rest/           5,121 drawings: the others
      planted/<transform>/ 400 copies, 50 per transform: 35 of drawings in pool/, 15 of stamps in holdout/
      odd/                 11 files: broken, odd, or an exact copy under another name
      planted.parquet      every planted copy with its original
      odd.parquet          every odd file with what should become of it
      manifest.json        written last: the folder is complete
    data/demo.partial/     only while unfinished; downloaded packages wait here for the next try

(Numbers measured 2026-11 on tuxpaint-stamps-default 2022.06.04-1 and openclipart-png 1:0.18+dfsg-19.)

The source roots are the four folders in seeds/, and holdout/, pool/, pool_rest/, planted/ and odd/. Below a root of the
first seven a file keeps its path in the package, so its folder is its label: seeds/animals/animals/birds/crow.png and
holdout/animals/birds/lark.png both read `animals/birds`. The 406 other stamps (letters, signs, ...) are left out. Links
(1,221 drawings, all to drawings) become files of their own, so no link leaves its root; they stay exact copies. Each
package's copyright file lies in the roots that hold its images or copies of them.

Everything is made in data/demo.partial/ and renamed in one step. The same packages and config give the same bytes.
The folder is local: apt and dpkg know no other.
"""

import hashlib
import io
import math
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import typer
from PIL import ExifTags, Image, ImageDraw, ImageEnhance, ImageFont, ImageOps, ImageStat
from pydantic import Field

from curation.config import Settings, parse
from curation.engine import command, progress
from curation.engine.manifest import MANIFEST_NAME, Manifest, Plan, ShardRecord, read_manifest, write_manifest
from curation.errors import InputError, OutputMismatchError
from curation.files import parquet, paths
from curation.files.hashes import sha256_of_file
from curation.images.decode import ImageLimits, ImageRejected, RejectReason, decode_rgb
from curation.images.hashing import image_id

STAMPS = "tuxpaint-stamps-default"
DRAWINGS = "openclipart-png"
IMAGES_IN_PACKAGE = {STAMPS: "usr/share/tuxpaint/stamps", DRAWINGS: "usr/share/openclipart/png"}

SEED_DATASETS = ("animals", "food", "plants", "vehicles")
TRANSFORMS = ("jpeg", "resize", "crop", "colour", "mirror", "border", "overlay", "rotation")

# The roots that hold images of a package, or copies of them.
COPYRIGHT_IN = {
    STAMPS: ("seeds", "holdout", "planted"),
    DRAWINGS: ("pool", "pool_rest", "planted", "odd"),
}

# Below this side a crop or a turn leaves too little for a person to recognise. Assumed.
ORIGINAL_LIMITS = ImageLimits(min_side=64, max_pixels=4_000_000)
# Standard deviation of grey (0 to 255) on white; below it an original is nearly blank. Assumed.
MIN_ORIGINAL_CONTRAST = 12.0
# Correlation of grey before and after a change of colours. Measured on the thin grey lines of the star shapes: 0.97 to
# 0.99 where brightness and contrast grow by 5%; 0.3 to 0.8 where they have burnt out to white, hardly to be seen.
MIN_COLOUR_CORRELATION = 0.95
# Correlation of grey with its mirror image, in 32 x 32 pixels; above it a mirrored copy looks like its original, and
# finding it proves nothing. Measured on this data: of 150 originals, 42 are above 0.9, most of them star shapes.
MAX_MIRROR_CORRELATION = 0.9
MIN_RESIZED_SIDE = 32  # pixels; assumed, two ViT patches

PLANTED = pa.schema(
    [
        ("copy", pa.string()),  # path below data/demo
        ("copy_image_id", pa.string()),
        ("original", pa.string()),  # path below data/demo
        ("original_image_id", pa.string()),
        ("original_role", pa.string()),  # 'pool' or 'holdout'
        ("transform", pa.string()),  # one of TRANSFORMS
        ("parameters", pa.string()),  # for people
    ]
)
ODD = pa.schema(
    [
        ("file", pa.string()),  # path below data/demo
        ("image_id", pa.string()),
        ("original", pa.string()),  # path below data/demo of the image it shows; null when it shows none
        ("expected", pa.string()),  # 'accepted', or the RejectReason
        ("description", pa.string()),
    ]
)


class DemoDataConfig(Settings):
    """How the two packages are split, and how many copies are planted."""

    seed: int = 0
    """Of the choice of originals and of every copy's parameters."""
    holdout_every: int = Field(default=5, ge=2)
    """One stamp in so many is held out."""
    pool_size: int = Field(default=3_000, ge=1)
    """Drawings in pool/; the others go to pool_rest/."""
    num_pool_copies: int = Field(default=35, ge=1)
    """Copies of drawings, per transform."""
    num_holdout_copies: int = Field(default=15, ge=1)
    """Copies of held-out stamps, per transform. No original is used twice, and 132 of the 160 stamps are good ones."""


def run(config: DemoDataConfig, output: Path, packages: Path | None = None) -> Manifest:
    """Make the demo data in the local folder `output`; return its manifest.

    `packages`: a folder that holds the two .deb files; without it apt-get downloads them (292 MB). Finished data is
    left as it is. Raises InputError when a package cannot be had or is not as expected, OutputMismatchError when
    `output` holds anything else.
    """
    debs = None if packages is None else _find_packages(packages)
    done = _finished(config, output, debs)
    if done is not None:
        progress.say(f"demo data: '{output}' is complete, nothing to do")
        return done
    partial = output.resolve().with_name(output.name + ".partial")
    if debs is None:
        debs = _download(partial / "apt")
    tree = _empty(partial / "tree")
    _unpack_and_split(config, debs, _empty(partial / "unpacked"), tree)
    files = _plant(config, tree)
    plan = Plan(stage="demo_data", config=config.model_dump(), inputs=_hashes(debs), num_shards=1)
    shard = ShardRecord(name="demo", files=files, totals=_count_images(tree))
    manifest = Manifest(plan=plan, shards=(shard,), totals=shard.totals, rejects={})
    write_manifest(str(tree), manifest)
    tree.rename(output)
    shutil.rmtree(partial)
    progress.say(
        f"demo data: '{output}' holds " + ", ".join(f"{count} in {name}" for name, count in shard.totals.items())
    )
    return manifest


def _finished(config: DemoDataConfig, output: Path, debs: dict[str, Path] | None) -> Manifest | None:
    """The manifest of complete demo data in `output`; None where there is nothing. Raises OutputMismatchError."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifest = read_manifest(str(output)) if output.is_dir() else None
    if manifest is None:
        raise OutputMismatchError(
            f"'{output}' is there, but without {MANIFEST_NAME} it is not demo data. Give another --output."
        )
    inputs = manifest.plan.inputs if debs is None else _hashes(debs)
    wanted = Plan(stage="demo_data", config=config.model_dump(), inputs=inputs, num_shards=1)
    if manifest.plan != wanted:
        raise OutputMismatchError(
            f"'{output}' was made with other settings or from other packages.\n  found:  {manifest.plan!r}\n"
            f"  wanted: {wanted!r}\nGive another --output, or delete the folder to make it again."
        )
    return manifest


# The packages


def _find_packages(folder: Path) -> dict[str, Path]:
    """The .deb file of each package in `folder`."""
    debs = {}
    for package in IMAGES_IN_PACKAGE:
        found = sorted(folder.glob(f"{package}_*.deb"))
        if len(found) != 1:
            names = ", ".join(deb.name for deb in found) or "none"
            raise InputError(f"'{folder}': wanted one file {package}_*.deb, found {names}. Put just that one there.")
        debs[package] = found[0]
    return debs


def _download(folder: Path) -> dict[str, Path]:
    """Fetch the packages into `folder` with apt's sources and keys, but package lists of our own: no root is needed.

    Packages that are there already, from a try that was cut off, are not fetched again.
    """
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # Hooks of the system that run after an update tell others about lists that are not the system's. They are lists,
    # which only a file can clear.
    hooks = ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    (folder / "apt.conf").write_text("".join(f"#clear APT::Update::{hook};\n" for hook in hooks))
    options = {
        "Dir::State::Lists": folder.resolve() / "lists",
        "Dir::Cache": folder.resolve() / "cache",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Sandbox::User": "root",  # as root, apt would become a user who may not write to this folder
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    apt = ["apt-get", "-q", "-c", str(folder.resolve() / "apt.conf")]
    apt += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    progress.say(f"demo data: fetching {STAMPS} and {DRAWINGS} with apt-get (292 MB)")
    said = _call([*apt, "update"], folder)  # ends well without a network; then only the download fails
    _call([*apt, "download", *IMAGES_IN_PACKAGE], folder / "debs", said)
    return _find_packages(folder / "debs")


def _call(command: Sequence[str], folder: Path, said_before: str = "") -> str:
    """What a Debian tool says when run in `folder`. Raises InputError where it fails or is not there.

    `said_before`: by the command that this one builds on; it may hold the cause of a failure.
    """
    tool = command[0]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise InputError(
            f"There is no {tool} on this machine, and the demo's images come in Debian packages. Use your own: "
            "copy pipelines/configs/demo.toml, point the `path` of its sources at your folders, and give the copy with "
            "CONFIG=... Or make the demo data on a Debian or Ubuntu machine, and copy the folder here."
        ) from None
    if done.returncode != 0:
        lines = [*said_before.splitlines()[-6:], *done.stdout.splitlines()[-6:]]
        last = "\n".join(f"  {line}" for line in lines)
        raise InputError(
            f"{tool} failed with status {done.returncode}:\n{last}\n"
            "Correct the cause and run this again; or put the two .deb files into a folder and give it with --packages."
        )
    return done.stdout


# The split


def _unpack_and_split(config: DemoDataConfig, debs: dict[str, Path], unpacked: Path, tree: Path) -> None:
    """Unpack the packages and move their images to where they belong in `tree`."""
    for package, deb in debs.items():
        progress.say(f"demo data: unpacking {deb.name}")
        _call(["dpkg-deb", "-x", str(deb.resolve()), str((unpacked / package).resolve())], unpacked)
    for package, split in ((STAMPS, _split_stamps), (DRAWINGS, _split_drawings)):
        folder = unpacked / package / IMAGES_IN_PACKAGE[package]
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
        copyright_file = unpacked / package / "usr/share/doc" / package / "copyright"
        if not names or not copyright_file.is_file():
            missing = f"images in {IMAGES_IN_PACKAGE[package]}" if not names else "copyright file"
            raise InputError(f"'{debs[package]}' holds no {missing}: it is not the package {package}.")
        _replace_links(folder, names)
        for name, root in split(config, names).items():
            target = tree / root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(target)
        for root in COPYRIGHT_IN[package]:
            (tree / root).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(copyright_file, tree / root / f"copyright-{package}")


def _split_stamps(config: DemoDataConfig, names: Sequence[str]) -> dict[str, str]:
    """The root for each stamp that is used."""
    roots = {}
    for position, name in enumerate(sorted(names, key=_sha1)):
        dataset = PurePosixPath(name).parts[0]
        if position % config.holdout_every == 0:
            roots[name] = "holdout"
        elif dataset in SEED_DATASETS:
            roots[name] = f"seeds/{dataset}"
    return roots


def _split_drawings(config: DemoDataConfig, names: Sequence[str]) -> dict[str, str]:
    """The root for each drawing. Drawings of one file name (mostly links) are ordered by their path."""
    ordered = sorted(names, key=lambda name: (_sha1(PurePosixPath(name).name), name))
    return {name: "pool" if position < config.pool_size else "pool_rest" for position, name in enumerate(ordered)}


def _replace_links(folder: Path, names: Sequence[str]) -> None:
    """Put a file with the same bytes in the place of every link. A link out of `folder` is refused."""
    root = folder.resolve()
    for path in (folder / name for name in names):
        if path.is_symlink():
            target = path.resolve()
            if not (target.is_file() and target.is_relative_to(root)):
                raise InputError(f"'{path}' is a link to '{target}', which is no file of its package.")
            path.unlink()
            shutil.copyfile(target, path)


# The planted copies


class Original(NamedTuple):
    """An image to make copies of."""

    path: str
    """Below data/demo."""
    data: bytes
    picture: Image.Image


def _plant(config: DemoDataConfig, tree: Path) -> tuple[paths.FileRecord, paths.FileRecord]:
    """Write planted/ and odd/ and their tables; return what the tables are."""
    unique = _unique_images(tree)
    pool = _originals(tree, unique, "pool", _generator(config, "originals", "pool"))
    holdout = _originals(tree, unique, "holdout", _generator(config, "originals", "holdout"))
    stickers = _originals(tree, unique, "pool", _generator(config, "stickers"))
    sources = [("pool", pool)] * config.num_pool_copies + [("holdout", holdout)] * config.num_holdout_copies
    rows = []
    with progress.bar("demo data", total=len(TRANSFORMS) * len(sources), unit="copies") as advance:
        for transform in TRANSFORMS:
            for number, (role, originals) in enumerate(sources):
                original = next(filter(_looks_mirrored, originals) if transform == "mirror" else originals)
                generator = _generator(config, transform, str(number))
                data, parameters = _transform(transform, original.picture, generator, stickers)
                suffix = "jpg" if transform == "jpeg" else "png"
                copy = f"planted/{transform}/{number:02d}-{PurePosixPath(original.path).stem}.{suffix}"
                _write(tree / copy, data)
                rows.append(
                    {
                        "copy": copy,
                        "copy_image_id": image_id(data),
                        "original": original.path,
                        "original_image_id": image_id(original.data),
                        "original_role": role,
                        "transform": transform,
                        "parameters": parameters,
                    }
                )
                advance(1, "")
    planted = parquet.write_table(str(tree / "planted.parquet"), pa.Table.from_pylist(rows, PLANTED))
    return planted, _plant_odd_files(tree, pool)


def _unique_images(tree: Path) -> list[str]:
    """The paths below `tree` of the images that have no exact copy there, sorted."""
    hashes = {path.relative_to(tree).as_posix(): sha256_of_file(str(path)) for path in tree.rglob("*.png")}
    counts = Counter(hashes.values())
    return sorted(path for path, sha256 in hashes.items() if counts[sha256] == 1)


def _originals(tree: Path, unique: Sequence[str], root: str, generator: np.random.Generator) -> Iterator[Original]:
    """The images of `root` that make good originals, each once, in random order.

    Left out are small, huge and nearly blank ones, and those with an exact copy: a copy of theirs would have two
    originals. Raises InputError when there are no more.
    """
    candidates = [path for path in unique if path.startswith(root + "/")]
    for position in generator.permutation(len(candidates)):
        data = (tree / candidates[position]).read_bytes()
        try:
            picture = decode_rgb(data, ORIGINAL_LIMITS)
        except ImageRejected:
            continue
        if ImageStat.Stat(picture.convert("L")).stddev[0] >= MIN_ORIGINAL_CONTRAST:
            yield Original(candidates[position], data, picture)
    raise InputError(
        f"The {len(candidates)} images in {root}/ hold too few originals for the copies asked for. "
        f"Lower num_{root}_copies with --set."
    )


def _looks_mirrored(original: Original) -> bool:
    """Whether a mirror image of it can be told from it."""
    small = original.picture.resize((32, 32), Image.Resampling.BOX)
    return _correlation(small, ImageOps.mirror(small)) <= MAX_MIRROR_CORRELATION


def _transform(
    transform: str, picture: Image.Image, generator: np.random.Generator, stickers: Iterator[Original]
) -> tuple[bytes, str]:
    """An encoded copy of `picture`, and its parameters in words."""
    match transform:
        case "jpeg":
            quality = int(generator.integers(30, 90, endpoint=True))
            return _encode(picture, "JPEG", quality=quality), f"quality {quality}"
        case "resize":
            copy, parameters = _resize(picture, generator)
        case "crop":
            copy, parameters = _crop(picture, generator)
        case "colour":
            copy, parameters = _change_colours(picture, generator)
        case "mirror":
            copy, parameters = ImageOps.mirror(picture), "left to right"
        case "border":
            copy, parameters = _add_border(picture, generator)
        case "overlay" if generator.random() < 0.5:
            copy, parameters = _write_text(picture, generator)
        case "overlay":
            copy, parameters = _paste(picture, next(stickers), generator)
        case "rotation":
            degrees = generator.uniform(2, 10) * generator.choice([-1, 1])
            # The size stays, so corners are lost; white, as the ground of drawings is, fills the new ones.
            copy = picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
            parameters = f"{degrees:+.2f} degrees counterclockwise"
        case _:
            raise AssertionError(transform)
    return _encode(copy, "PNG"), parameters


def _resize(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    smallest = max(0.3, MIN_RESIZED_SIDE / min(picture.size))
    factor = math.exp(generator.uniform(math.log(smallest), math.log(2)))  # halving is as likely as doubling
    size = (round(picture.width * factor), round(picture.height * factor))
    return picture.resize(size, Image.Resampling.LANCZOS), f"factor {factor:.3f}"


def _crop(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    area = generator.uniform(0.60, 0.95)
    width, height = round(picture.width * math.sqrt(area)), round(picture.height * math.sqrt(area))
    left = int(generator.integers(0, picture.width - width, endpoint=True))
    top = int(generator.integers(0, picture.height - height, endpoint=True))
    box = (left, top, left + width, top + height)
    return picture.crop(box), f"{area:.3f} of the area kept, box {box}"


def _change_colours(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    while True:  # ends: darkening and flattening, half of all draws, burn out nothing
        brightness, contrast, saturation = (float(factor) for factor in generator.uniform(0.7, 1.3, size=3))
        copy = ImageEnhance.Brightness(picture).enhance(brightness)
        copy = ImageEnhance.Contrast(copy).enhance(contrast)
        copy = ImageEnhance.Color(copy).enhance(saturation)
        if _correlation(picture, copy) >= MIN_COLOUR_CORRELATION:
            return copy, f"brightness {brightness:.2f}, contrast {contrast:.2f}, saturation {saturation:.2f}"


def _correlation(one: Image.Image, other: Image.Image) -> float:
    """Of the grey values of two pictures of one size; 0 where one of them is even."""
    x, y = (np.asarray(picture.convert("L"), dtype=np.float32).ravel() for picture in (one, other))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-9))


def _add_border(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    pixels = max(1, round(generator.uniform(0.03, 0.15) * min(picture.size)))
    red, green, blue = (int(value) for value in generator.integers(0, 256, size=3))
    return ImageOps.expand(picture, pixels, (red, green, blue)), f"{pixels} pixels of rgb({red}, {green}, {blue})"


def _write_text(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str]:
    """White text with a black rim, 0.4 to 0.8 of the width wide, wholly inside where its height allows."""
    text = str(generator.choice(["SAMPLE", "example.org", "Look at this!", "NEW"]))
    share = generator.uniform(0.4, 0.8)
    left, _, right, _ = ImageFont.load_default(100).getbbox(text)
    size = 100 * share * picture.width / (right - left)
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    x = generator.uniform(0, max(0, picture.width - (right - left))) - left
    y = generator.uniform(0, max(0, picture.height - (bottom - top))) - top
    copy = picture.copy()
    ImageDraw.Draw(copy).text((x, y), text, "white", font, stroke_width=max(1, size / 15), stroke_fill="black")
    return copy, f"text {text!r}, {share:.2f} of the width"


def _paste(picture: Image.Image, sticker: Original, generator: np.random.Generator) -> tuple[Image.Image, str]:
    """Another picture, on its white ground, inside a box of 0.25 to 0.4 of each side."""
    share = generator.uniform(0.25, 0.4)
    small = ImageOps.contain(sticker.picture, (round(picture.width * share), round(picture.height * share)))
    x = int(generator.integers(0, picture.width - small.width, endpoint=True))
    y = int(generator.integers(0, picture.height - small.height, endpoint=True))
    copy = picture.copy()
    copy.paste(small, (x, y))
    return copy, f"{sticker.path} in {small.width} x {small.height} pixels at ({x}, {y})"


def _encode(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


# The odd files


def _plant_odd_files(tree: Path, originals: Iterator[Original]) -> paths.FileRecord:
    """Write the files of odd/, and what should become of each to odd.parquet."""
    rows = []
    for name, original, data, expected, description in _odd_files(originals):
        _write(tree / "odd" / name, data)
        rows.append(
            {
                "file": f"odd/{name}",
                "image_id": image_id(data),
                "original": original,
                "expected": expected,
                "description": description,
            }
        )
    return parquet.write_table(str(tree / "odd.parquet"), pa.Table.from_pylist(rows, ODD))


def _odd_files(originals: Iterator[Original]) -> Iterator[tuple[str, str | None, bytes, str, str]]:
    """Name, original, bytes, what is expected, description."""
    path, _, picture = next(originals)
    data = _encode(picture, "PNG")
    yield "truncated.png", path, data[: len(data) // 2], RejectReason.TRUNCATED, "the first half of a PNG"

    path, _, picture = next(originals)
    data = _encode(picture, "JPEG", quality=90)
    yield "truncated.jpg", path, data[: len(data) // 2], RejectReason.TRUNCATED, "the first half of a JPEG"

    yield "empty.jpg", None, b"", RejectReason.EMPTY, "no bytes"

    text = b"This is no photograph.\n"
    yield "text.jpg", None, text, RejectReason.NOT_AN_IMAGE, "text under an image's name"

    path, _, picture = next(originals)
    others = [ImageOps.flip(picture), ImageOps.invert(picture)]
    data = _encode(picture, "GIF", save_all=True, append_images=others, duration=200, loop=0)
    yield "animated.gif", path, data, "accepted", "three frames, of which the first counts"

    path, _, picture = next(originals)
    data = _encode(picture.convert("CMYK"), "JPEG", quality=90)
    yield "cmyk.jpg", path, data, "accepted", "a JPEG in four inks"

    path, _, picture = next(originals)
    data = _encode(Image.fromarray(np.asarray(picture.convert("L"), dtype=np.uint16) * 257), "PNG")
    yield "sixteen-bit.png", path, data, "accepted", "grey in 16 bits"

    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, turn in turns.items():
        path, _, picture = next(originals)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        data = _encode(picture.transpose(turn), "JPEG", quality=90, exif=exif)
        yield f"orientation-{orientation}.jpg", path, data, "accepted", "stored turned; EXIF says how to turn it back"

    path, data, _ = next(originals)
    yield "renamed.png", path, data, "accepted", "an exact copy under another name"


def _count_images(tree: Path) -> dict[str, int]:
    roots = [*(f"seeds/{dataset}" for dataset in SEED_DATASETS), "holdout", "pool", "pool_rest"]
    roots += [*(f"planted/{transform}" for transform in TRANSFORMS), "odd"]
    return {root: sum(path.suffix in (".png", ".jpg", ".gif") for path in (tree / root).rglob("*")) for root in roots}


def _generator(config: DemoDataConfig, *purpose: str) -> np.random.Generator:
    """Random numbers that depend on the seed and the purpose alone."""
    digest = hashlib.sha256("/".join([str(config.seed), *purpose]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest))


def _empty(folder: Path) -> Path:
    """`folder`, new and empty."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _hashes(debs: dict[str, Path]) -> dict[str, str]:
    return {package: sha256_of_file(str(deb)) for package, deb in debs.items()}


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def command_line(
    output: Annotated[Path, typer.Option(help="Folder to make, on this machine.")] = Path("data/demo"),
    packages: Annotated[Path | None, typer.Option(help="Folder with the two .deb files, instead of apt-get.")] = None,
    overrides: command.SetOption = None,
) -> None:
    """Fetch the demo's images, split them by role, and plant copies whose truth is known."""
    run(parse(DemoDataConfig, {}, overrides or [], origin="--set"), output, packages)


if __name__ == "__main__":
    from pipelines.demo import dataset  # by its real name, or its classes would exist twice

    command.main(dataset.command_line)
