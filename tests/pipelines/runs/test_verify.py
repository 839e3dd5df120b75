"""`verify` reads every byte of a run, names each file that differs, and changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curation.engine.manifest import require_manifest
from curation.errors import InputError
from curation.files import paths
from pipelines.runs.verify import command_line, verify
from tests.curation.builders import id_of, image_row, unit_vectors, write_ingest, write_vectors
from tests.curation.images.test_listing import without_roots_rights

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run of which ingest and embed are done."""
    folder = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"
    images = write_ingest(f"{folder}/ingest", [[image_row(id_of(n), "web", "pool")] for n in range(3)])
    matrix = unit_vectors(0, 3)
    write_vectors(f"{folder}/embed", images, [{id_of(n): matrix[n]} for n in range(3)])
    return folder


def test_a_whole_run_has_no_problem(run: str) -> None:
    files = [
        file for stage in ("ingest", "embed") for r in require_manifest(f"{run}/{stage}").shards for file in r.files
    ]
    verified = verify(run)
    assert verified.problems == () and verified.finished == ("ingest", "embed") and verified.unfinished == ()
    assert (verified.num_files, verified.num_bytes) == (len(files), sum(file.bytes for file in files))


def test_every_kind_of_damage_is_listed(run: str) -> None:
    data = paths.read_bytes(f"{run}/embed/vectors-00001.parquet")
    paths.write_bytes(f"{run}/embed/vectors-00001.parquet", bytes([data[0] ^ 1]) + data[1:])
    paths.delete(f"{run}/ingest/images-00000.parquet")
    paths.write_bytes(f"{run}/ingest/images-00002.parquet", b"")
    paths.write_bytes(f"{run}/ingest/images-00003.parquet", data)
    problems = verify(run).problems
    expected = [
        "ingest/images-00000.parquet is missing",
        "ingest/images-00002.parquet has 0 bytes, and",
        "ingest/images-00003.parquet is in no manifest",
        "embed/vectors-00001.parquet holds other bytes than were written",
    ]
    assert len(problems) == 4
    assert all(f"{run}/{text}" in problem for text, problem in zip(expected, problems, strict=True))


def test_a_damaged_and_a_missing_manifest_are_listed(run: str) -> None:
    paths.delete(f"{run}/ingest/manifest.json")
    paths.write_bytes(f"{run}/embed/manifest.json", b"{")
    missing, damaged = verify(run).problems
    assert missing == f"{run}/ingest holds 3 files and no manifest.json. Delete it"
    assert damaged.startswith(f"{run}/embed/manifest.json: damaged, or not written by this version of Seedbed. If")
    assert f"'{run}/embed'" in damaged


def test_a_file_that_cannot_be_read_is_listed(tmp_path: Path) -> None:
    images = write_ingest(f"{tmp_path}/ingest", [[image_row(id_of(1), "web", "pool")]])
    file = Path(images, "images-00000.parquet")
    file.chmod(0)
    with without_roots_rights():
        problems = verify(str(tmp_path)).problems
    assert problems == (f"{file} cannot be read: Permission denied",)


@pytest.mark.parametrize("path", ["file", "nowhere", "file/below"])
def test_a_path_that_is_no_run_is_one_message(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="No run at"):
        verify(str(tmp_path / path))


def test_an_unfinished_stage_is_named_and_its_finished_shards_are_checked(run: str) -> None:
    record = require_manifest(f"{run}/embed").shards[1]
    plan = require_manifest(f"{run}/embed").plan
    paths.delete(f"{run}/embed/manifest.json")
    paths.write_bytes(f"{run}/embed/.progress/plan.json", plan.model_dump_json().encode())
    paths.write_bytes(f"{run}/embed/.progress/00001.json", record.model_dump_json().encode())
    verified = verify(run)
    assert verified.unfinished == ("embed",) and verified.problems == () and verified.num_files == 4
    paths.delete(f"{run}/embed/vectors-00001.parquet")
    assert len(verify(run).problems) == 1


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No run at .*: no run wrote this folder"):
        verify(str(tmp_path))


def test_the_command_ends_with_0_or_with_2_and_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ingest(tmp_path / "ingest", [[image_row(id_of(n), "web", "pool")] for n in range(2)])
    command_line(str(tmp_path))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1 and "2 files" in printed
    for number in range(2):
        (tmp_path / f"ingest/images-{number:05d}.parquet").unlink()
    arguments = [sys.executable, "-m", "pipelines.runs.verify", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    wrong = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and len(wrong.stdout.splitlines()) == 2
    assert "problems: 2;" in wrong.stderr and "--replace" in wrong.stderr and "Traceback" not in wrong.stderr
