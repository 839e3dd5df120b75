"""Fetches and unpacks the two Debian packages that hold the demo's images.

apt-get downloads them with the system's sources and keys, but with package lists in a folder of its own. So no root is
needed, and nothing on the system changes.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from curation.engine import progress
from curation.errors import InputError
from curation.files.hashes import sha256_of_file

STAMPS = "tuxpaint-stamps-default"
DRAWINGS = "openclipart-png"
IMAGES_IN_PACKAGE = {STAMPS: "usr/share/tuxpaint/stamps", DRAWINGS: "usr/share/openclipart/png"}
"""Folder of the images of each package, below the root that it is unpacked into."""

# Lines of a failed tool's output that the message repeats. Assumed.
MAX_LINES_REPEATED = 6


def find(folder: Path) -> dict[str, Path]:
    """The .deb file of each package in `folder`. Raises InputError unless there is exactly one of each."""
    debs = {}
    for package in IMAGES_IN_PACKAGE:
        matches = sorted(folder.glob(f"{package}_*.deb"))
        if len(matches) != 1:
            names = ", ".join(deb.name for deb in matches) or "none"
            raise InputError(f"'{folder}' must hold exactly one file {package}_*.deb. Found: {names}.")
        debs[package] = matches[0]
    return debs


def download(folder: Path) -> dict[str, Path]:
    """Download the packages into `folder` (292 MB); returns the .deb file of each.

    Packages that an interrupted download left there are not fetched again.
    """
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # Hooks of the system that run after an update would report on these lists as if they were the system's. Hooks are
    # list options, and only a file can clear a list option.
    hooks = ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    (folder / "apt.conf").write_text("".join(f"#clear APT::Update::{hook};\n" for hook in hooks))
    options = {
        "Dir::State::Lists": folder.resolve() / "lists",
        "Dir::Cache": folder.resolve() / "cache",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Sandbox::User": "root",  # when run as root, apt would switch to a user without access to this folder
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    apt = ["apt-get", "-q", "-c", str(folder.resolve() / "apt.conf")]
    apt += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    progress.say(f"demo data: fetching {STAMPS} and {DRAWINGS} with apt-get (292 MB)")
    # Without a network the update still succeeds; only the download fails.
    update_output = run_tool([*apt, "update"], folder)
    run_tool([*apt, "download", *IMAGES_IN_PACKAGE], folder / "debs", update_output)
    return find(folder / "debs")


def unpack(package: str, deb: Path, folder: Path) -> Path:
    """Unpack a package into `folder`; returns the folder of its images.

    Every link to an image is replaced by a file with the same bytes. Raises InputError when images or the copyright
    file are missing, and for a link that leads out of the folder of the images.
    """
    progress.say(f"demo data: unpacking {deb.name}")
    run_tool(["dpkg-deb", "-x", str(deb.resolve()), str(folder.resolve())], folder.parent)
    images = folder / IMAGES_IN_PACKAGE[package]
    names = image_names(images)
    if not names or not copyright_file(package, folder).is_file():
        missing = f"images in {IMAGES_IN_PACKAGE[package]}" if not names else "copyright file"
        raise InputError(f"'{deb}' holds no {missing}: it is not the package {package}.")
    _replace_links(images, names)
    return images


def image_names(images: Path) -> list[str]:
    """The paths of all images below the folder `images`, in no particular order."""
    return [path.relative_to(images).as_posix() for path in images.rglob("*.png")]


def copyright_file(package: str, folder: Path) -> Path:
    """The copyright file of a package that was unpacked into `folder`."""
    return folder / "usr/share/doc" / package / "copyright"


def hash_files(debs: dict[str, Path]) -> dict[str, str]:
    """The SHA-256 of each package."""
    return {package: sha256_of_file(str(deb)) for package, deb in debs.items()}


def run_tool(command: Sequence[str], folder: Path, earlier_output: str = "") -> str:
    """Run a Debian tool in `folder`; returns its output. Raises InputError when it fails or is not installed.

    `earlier_output`: of the command before this one, which may hold the cause of a failure.
    """
    tool = command[0]
    try:
        completed = subprocess.run(
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
            f"There is no {tool} on this machine, and the demo's images come in Debian packages. Use your own images: "
            "seedbed curate --seeds NAME=PATH --pool PATH --output DIR. Or make the demo data on a Debian or Ubuntu "
            "machine, and copy the folder here."
        ) from None
    if completed.returncode != 0:
        lines = [line for output in (earlier_output, completed.stdout) for line in _last_lines(output)]
        repeated = "\n".join(f"  {line}" for line in lines)
        raise InputError(
            f"{tool} failed with status {completed.returncode}:\n{repeated}\n"
            "Correct the cause and run this again; or put the two .deb files into a folder and give it with --packages."
        )
    return completed.stdout


def _last_lines(output: str) -> list[str]:
    return output.splitlines()[-MAX_LINES_REPEATED:]


def _replace_links(images: Path, names: Sequence[str]) -> None:
    """Replace every link by a file with the same bytes."""
    root = images.resolve()
    for path in (images / name for name in names):
        if path.is_symlink():
            target = path.resolve()
            if not (target.is_file() and target.is_relative_to(root)):
                raise InputError(f"'{path}' is a link to '{target}', which is no file of its package.")
            path.unlink()
            shutil.copyfile(target, path)
