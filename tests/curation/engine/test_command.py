"""Commands: exit statuses, standard output and error, and no partial files after a signal."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import torch

from curation.config import IsPath, Settings
from curation.engine import command, entry
from curation.engine.command import open_runner, require_apart
from curation.engine.runner import InlineRunner
from curation.errors import DeviceError, InputError

SCRIPT = """
import sys, time
from typing import Annotated, Literal
import typer
from curation import errors
from curation.engine import command
from curation.files import paths

def run(kind: str, k: Annotated[int, typer.Option("--k", min=1)] = 4) -> None:
    '''One outcome for each kind.'''
    match kind:
        case "well":
            print("k is", k)
        case "user error":
            raise errors.InputError("a.tar: not a tar\\nsecond line")
        case "shard":
            try:
                1 / 0
            except ZeroDivisionError as cause:
                raise errors.ShardError("ingest, shard 00003: ZeroDivisionError") from cause
        case "bug":
            {}["missing"]
        case path:
            with paths.atomic_write(path) as file:
                file.write(b"half")
                print("half", flush=True)
                time.sleep(600)

command.main(run)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)


def test_success_exits_with_0() -> None:
    done = run("well", "--k", "7")
    assert (done.returncode, done.stdout, done.stderr) == (0, "k is 7\n", "")


def test_user_error_exits_with_2_and_only_its_message() -> None:
    done = run("user error")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a.tar: not a tar\nsecond line\n"


@pytest.mark.parametrize("arguments", [[], ["well", "--k", "0"], ["well", "--k", "x"], ["well", "--no-such-option"]])
def test_wrong_option_exits_with_2_without_a_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "Usage:" in done.stderr and "Traceback" not in done.stderr


def test_failed_shard_exits_with_1_and_names_cause_and_shard() -> None:
    done = run("shard")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "1 / 0" not in done.stdout
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert done.stderr.endswith("\nerror: ingest, shard 00003: ZeroDivisionError\n")


def test_bug_exits_with_1_and_a_traceback() -> None:
    done = run("bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith("KeyError: 'missing'\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_no_partial_file(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "out.bin")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts background jobs with SIGINT ignored; these tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        assert os.listdir(tmp_path) != []
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    words = ["~/a", "--output=~/a", "name=~", "a~", "--set", "x.y=~/a=~/b", "~nobody-has-this-name/a"]
    expected = ["/home/ada/a", "--output=/home/ada/a", "name=/home/ada", "a~", "--set", "x.y=/home/ada/a=~/b", words[6]]
    assert [entry._with_home(word) for word in words] == expected


class Section(Settings):
    device: str = "cpu"


class Whole(Settings):
    search: Section = Section()
    device: str = "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_missing_gpu_names_the_settings_before_any_work() -> None:
    settings = Whole(device="cuda", search=Section(device="cuda"))
    worked = []
    with pytest.raises(DeviceError, match=r"search\.device, device is 'cuda', but torch .* sees no GPU here"):
        command.plan_or_run(settings, worked.append, plan=False, runner="inline", workers=None, gpus_per_worker=1)
    assert worked == []


def test_an_input_below_the_output_of_a_stage_is_refused(tmp_path: Path) -> None:
    source = Source(path=str(tmp_path / "out/corpus"))
    require_apart(str(tmp_path / "out"), source)
    with pytest.raises(InputError, match=r"lies below --output .*, where --replace would delete it"):
        require_apart(str(tmp_path / "out"), source, is_stage=True)


def test_inline_runner_runs_in_this_process() -> None:
    with open_runner("inline", 7) as runner:
        assert isinstance(runner, InlineRunner)


class Source(Settings):
    path: Annotated[str, IsPath]
    name: str = "out"


class Nested(Settings):
    sources: tuple[Source, ...]
    weights: Annotated[str | None, IsPath] = None


def test_no_output_takes_the_place_of_a_file_or_folder_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("data")
    settings = Nested(sources=(Source(path="memory://a/data"), Source(path=f"{tmp_path}/data")), weights="w.pth")
    for output in (
        f"{tmp_path}/data/",
        f"{tmp_path}/x/../link",
        f"file://{tmp_path}/data",
        "memory://a/data",
        "./w.pth",
    ):
        with pytest.raises(InputError, match="would be lost"):
            require_apart(output, settings)
    with pytest.raises(InputError, match=r"is the input 'c\.toml'"):
        require_apart("c.toml", settings, "", "c.toml")
    for output in (f"{tmp_path}/dat", f"{tmp_path}", f"{tmp_path}/data/out", "memory://data", "out"):
        require_apart(output, settings, "c.toml")


def test_every_command_with_an_output_keeps_it_apart_from_its_inputs() -> None:
    root = Path(__file__).parents[3]
    modules = [
        path
        for package in ("curation", "training", "evaluation", "pipelines")
        for path in (root / package).rglob("*.py")
    ]
    commands = [text for path in modules if "command.OutputOption" in (text := path.read_text())]
    assert len(commands) >= 9 and all("require_apart(" in text for text in commands)


# A shell without job control starts background jobs, and so their children, with SIGINT ignored.
INTERRUPTED = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from curation.engine import command
from curation.engine.runner import Shard, report

def make_worker():
    def process(shard):
        report(1)
        time.sleep(60)
    return process

def work():
    with command.open_runner(RUNNER, 1) as runner:
        list(runner.map("stage", make_worker, [Shard("0", 0)], on_progress=lambda reported: print("begun", flush=True)))

command.main(work)
"""


@pytest.mark.parametrize("runner", ["inline", "ray"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_that_the_work_is_kept(runner: str, number: signal.Signals, status: int) -> None:
    """On Ray five seconds each, to start and stop it."""
    script = INTERRUPTED.replace("RUNNER", repr(runner))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == status, errors
    assert errors.endswith("Stopped. Finished shards are kept: run the same command again to go on.\n")
    assert "Traceback" not in errors
