"""Outputs that cannot be written are one message; a probe leaves nothing."""

import errno
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem

from curation.errors import ConfigError, InputError
from curation.files import paths


class FailingFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """A store that is empty, and refuses to write as the first part of the path says."""

    protocol = "unwritable"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        raise FileNotFoundError(path)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        kinds: dict[str, Exception] = {
            "permission": PermissionError(errno.EACCES, "Permission denied", rpath),
            "read-only": OSError(errno.EROFS, "Read-only file system", rpath),
            "refused": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
            "driver": RuntimeError("no credentials"),  # as botocore's errors, which are no OSError
        }
        raise kinds[rpath.strip("/").split("/")[0]]


@pytest.fixture
def failing() -> None:
    fsspec.register_implementation("unwritable", FailingFileSystem, clobber=True)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("permission", "Permission denied"),
        ("read-only", "Read-only file system"),
        ("refused", "Connection refused"),
        ("driver", "RuntimeError: no credentials"),
    ],
)
def test_output_that_cannot_be_written_is_one_message(failing: None, kind: str, reason: str) -> None:
    output = f"unwritable://{kind}/out"
    with pytest.raises(ConfigError) as caught:
        paths.require_writable(output)
    assert str(caught.value).startswith(f"The output '{output}' cannot be written: {reason}. Give another --output")
    assert "\n" not in str(caught.value)


def test_file_in_the_place_of_a_folder_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"file/out' cannot be written: Not a directory\. Give another --output"):
        paths.require_writable(str(file / "out"))
    with pytest.raises(ConfigError, match=r"file' is a file\. Give a folder with --output\."):
        paths.require_writable(str(file))
    assert file.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"--output is empty\. Give a folder\."):
        paths.require_writable("")


def test_writable_output_is_left_as_it_is(tmp_path: Path) -> None:
    for output in (str(tmp_path / "new/out"), f"memory://{tmp_path.name}/out"):
        paths.require_writable(output)
        assert paths.list_names(output) == []


def test_nothing_is_written_where_nothing_is_left_to_do(failing: None, tmp_path: Path) -> None:
    (tmp_path / "done").touch()
    paths.require_writable("unwritable://permission/out", unless=[str(tmp_path / "done")])
    with pytest.raises(ConfigError):
        paths.require_writable(
            "unwritable://permission/out", unless=[str(tmp_path / "done"), str(tmp_path / "not done")]
        )


def test_unknown_protocol_keeps_its_message() -> None:
    with pytest.raises(InputError, match="Install the fsspec driver"):
        paths.require_writable("nosuch://bucket/out")


def test_temporary_files_of_a_killed_writer_are_deleted(tmp_path: Path) -> None:
    for name in (".tmp-0123-report.html", "report.html", "sub/.tmp-x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths.delete_temporary(str(tmp_path))
    assert paths.list_names(str(tmp_path)) == ["report.html", "sub"] and (tmp_path / "sub/.tmp-x").exists()
