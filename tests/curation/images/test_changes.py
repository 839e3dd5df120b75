"""Times of files: the latest change of any kind, on this machine and on an object store."""

import os
import time
from pathlib import Path

from curation.files import paths
from curation.images.changes import UNKNOWN, times_of


def test_a_local_file_that_takes_the_place_of_an_older_one_has_changed(tmp_path: Path) -> None:
    """Copies may carry the time of the content along; the time of the replacement stays."""
    file, link = tmp_path / "a/image.png", tmp_path / "link.png"
    paths.write_bytes(str(file), b"bytes")
    link.symlink_to(file)
    os.utime(file, (1000, 1000))
    times = times_of(str(tmp_path), ["a/image.png", "link.png", "absent.png"])
    assert times["a/image.png"].earliest == 1000 and time.time() - times["a/image.png"].latest < 60
    assert times["link.png"].earliest == 1000 and times["link.png"].latest >= times["a/image.png"].latest
    assert times["absent.png"] == UNKNOWN
    assert times_of(str(file), [""])[""] == times["a/image.png"]


def test_an_object_store_gives_the_time_of_the_last_write(tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}"
    paths.write_bytes(f"{root}/a/image.png", b"bytes")
    times = times_of(root, ["a/image.png", "absent.png"])
    assert times["a/image.png"].earliest == times["a/image.png"].latest
    assert abs(time.time() - times["a/image.png"].latest) < 60
    assert times["absent.png"] == UNKNOWN
    assert times_of(f"{root}/a/image.png", [""])[""] == times["a/image.png"]
    paths.delete(root)


def test_a_link_to_nothing_has_the_times_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "absent")
    times = times_of(str(tmp_path), ["link.png"])["link.png"]
    assert abs(time.time() - times.latest) < 60


def test_a_link_on_the_way_to_the_files_counts(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/a.png").write_bytes(name.encode())
    time.sleep(0.05)
    (tmp_path / "now").symlink_to("two")
    before = times_of(str(tmp_path / "two/sub"), ["a.png"])["a.png"]
    through = times_of(str(tmp_path / "now/sub"), ["a.png"])["a.png"]
    assert through.earliest == before.earliest and through.latest > before.latest
