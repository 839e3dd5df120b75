"""The tests that `make test-quick` chooses, and its time limit."""

import subprocess
import sys

from tests.quick import distances, importers_of, repository_files
from tests.test_architecture import ROOT


def test_the_tests_that_a_change_touches_are_chosen_by_imports() -> None:
    files = repository_files()
    importers = importers_of(files)
    packed = distances(["curation/pack.py"], files, importers)
    assert packed["tests/curation/test_pack.py"] == 1
    assert packed["tests/pipelines/test_curate.py"] == 2  # through pipelines.main_path
    assert not any(path.startswith(("tests/training/", "tests/evaluation/", "tests/cluster/")) for path in packed)
    assert "tests/pipelines/test_status.py" not in distances(["pipelines/curate.py"], files, importers)
    # A command line names its module in a string.
    assert distances(["pipelines/train_on_ray.py"], files, importers)["tests/pipelines/test_train_on_ray.py"] == 1
    assert distances(["tests/curation/builders.py"], files, importers)["tests/curation/test_dedup.py"] == 1
    assert distances(["deploy/Dockerfile"], files, importers)["tests/test_deploy.py"] == 1
    assert distances(["curation/removed.py"], files, importers) == {}


def test_no_test_starts_after_the_time_limit() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--stop-after=0", "tests/test_settings.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert "not run: 0 seconds are over" in result.stdout and "passed" not in result.stdout
