"""The console script: its help at once, the commands of the table, exit statuses, completion, and `report`."""

import importlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from curation.run_folder import STAGES
from pipelines import cli
from pipelines.cli import COMMANDS, Command
from tests.curation.builders import run_main

# Calls the script as a shell does, and prints the large libraries that it has imported at the end.
SCRIPT = """
import atexit, json, sys
from pipelines import cli
large = {"torch", "numpy", "pyarrow", "ray", "faiss", "cv2", "scipy", "pandas", "rich", "fsspec"}
atexit.register(lambda: print(json.dumps(sorted(large & set(sys.modules))), file=sys.stderr))
sys.argv = ["seedbed", *sys.argv[1:]]
cli.main()
"""


def seedbed(*words: str) -> "subprocess.CompletedProcess[str]":
    """The script, in this process."""
    return run_main(cli.main, *words)


def in_child(*words: str, **environment: str) -> tuple[str, list[str]]:
    """The output of the script in a process of its own, and the large libraries that it imported."""
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


def test_help_version_and_completion_import_no_large_library() -> None:
    assert in_child("--help")[1] == []
    assert in_child("--version") == (f"seedbed {metadata.version('seedbed')}\n", [])
    completion = {"_SEEDBED_COMPLETE": "complete_bash", "COMP_WORDS": "seedbed re", "COMP_CWORD": "1"}
    assert in_child(**completion) == ("report\n", [])


def test_status_starts_without_torch() -> None:
    libraries = in_child("status", "--help")[1]
    assert "pyarrow" in libraries and not {"torch", "ray", "faiss", "cv2"} & set(libraries)


def test_the_script_alone_prints_its_help() -> None:
    alone, asked = seedbed(), seedbed("--help")
    assert (alone.returncode, alone.stdout) == (0, asked.stdout) and alone.stderr == ""
    assert all(f"  {command.name} " in alone.stdout for command in COMMANDS)
    assert "..." not in alone.stdout.partition("Commands:")[2], "a summary is cut off"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_its_summary_examples_and_a_help_of_80_columns(command: Command) -> None:
    function = importlib.import_module(command.module).command_line
    assert function.__doc__.startswith(command.summary.removesuffix("."))
    done = seedbed(command.name, "--help")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    assert f"seedbed {command.name} " in done.stdout.partition("Examples:")[2]


def test_wrong_words_end_with_2_and_name_the_nearest_command() -> None:
    done = seedbed("statsu", "runs/demo")
    assert done.returncode == 2 and "No such command 'statsu'. Did you mean 'status'?" in done.stderr
    for words in (["--no-such-option"], ["status"], ["status", "a", "b"], ["init", "--no-such-option"]):
        done = seedbed(*words)
        assert done.returncode == 2 and "Usage:" in done.stderr and done.stdout == ""


def test_an_error_of_the_user_ends_with_2_and_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done = seedbed("status", "~/no-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: No run at '{tmp_path}/no-run': there is no such folder. Give the --output of `seedbed curate`.\n"
    )


def test_report_names_the_stages_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "ingest").mkdir()
    done = seedbed("report", str(tmp_path))
    assert done.returncode == 2 and "has no run.toml" in done.stderr
    (tmp_path / "run.toml").write_text("")
    (tmp_path / "ingest/manifest.json").write_text("{}")
    done = seedbed("report", str(tmp_path))
    assert done.returncode == 2 and f"not finished: {', '.join(STAGES[1:])}." in done.stderr
