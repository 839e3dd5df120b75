"""The status of a run that is running, killed, stopped, finished or new; the run belongs to another process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from curation.engine import run_log
from curation.engine.manifest import MANIFEST_NAME
from curation.errors import InputError
from curation.files import paths
from curation.run_folder import STAGES
from pipelines import status

ROOT = Path(__file__).parents[2]
# A run of one stage with a step. A shard waits for the file of its name in the folder `go`, and fails if it reads "no".
DRIVER = """
import sys, time
from pathlib import Path
from curation.config import Settings
from curation.engine import command, run_log
from curation.engine.manifest import ShardRecord, step_folder
from curation.engine.runner import InlineRunner, Shard
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import InputError
from curation.files import paths

run = sys.argv.pop()

def make_worker(folder):
    def process(shard):
        while not (gate := Path("go", shard.name)).exists():
            time.sleep(0.01)
        if gate.read_text() == "no":
            raise InputError("the worker says no")
        file = paths.write_bytes(f"{folder}/images-{shard.name}.txt", b"x" * 100)
        return ShardRecord(name=shard.name, files=(file,), totals={"images": 5})
    return lambda: process

def do(folder, names, log, prepare=None):
    shards = [Shard(name, None, 5) for name in names]
    stage = Stage(name="ingest", config=Settings(), inputs={}, output=folder, shards=shards,
                  make_worker=make_worker(folder), prepare=prepare)
    run_stage(stage, InlineRunner(), log=log)

def work():
    with run_log.open_log(run) as log:
        def step():
            do(step_folder(f"{run}/ingest", "step"), ["s0"], log)
            return ShardRecord(name=PREPARED)

        log.start()
        do(f"{run}/ingest", ["a", "b", "c", "d"], log, step)

command.main(work)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "go").mkdir()
    return tmp_path


def start(home: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "driver.py", "out"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def allow(home: Path, *names: str, word: str = "") -> None:
    for name in names:
        (home / "go" / name).write_text(word)


def until(home: Path, condition: Callable[[status.RunStatus], bool]) -> status.RunStatus:
    """The first status that meets the condition."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (home / "out/log").exists() and condition(run_status := status.read(str(home / "out"))):
            return run_status
        time.sleep(0.05)
    raise AssertionError("the condition was not met within 60 s")


def is_running(shard: str) -> Callable[[status.RunStatus], bool]:
    return lambda run_status: any(note.shard == shard for stage in run_status.stages for note in stage.running)


def printed_status(home: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.status", "out"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_running_killed_resumed_and_done(home: Path) -> None:
    process = start(home)
    run_status = until(home, is_running("s0"))
    assert [(stage.name, stage.state) for stage in run_status.stages[:3]] == [
        ("ingest", "running"),
        ("ingest/step", "running"),
        ("embed", "left"),
    ]
    assert run_status.stages[0].seconds_left is None
    allow(home, "s0", "a", "b")
    ingest, step = until(home, is_running("c")).stages[:2]
    assert (ingest.num_shards, ingest.done, ingest.left, step.state) == (4, 2, 1, "done")
    assert ingest.seconds_left is not None and ingest.seconds_left > 0

    process.kill()
    process.communicate()
    lost = status.read(str(home / "out"), now=time.time() + run_log.SECONDS_UNTIL_LOST + 1)
    ingest = lost.stages[0]
    assert (ingest.state, [note.shard for note in ingest.stale], ingest.running) == ("stale", ["c"], ())
    assert (ingest.done, ingest.left, ingest.seconds_left) == (2, 2, None)
    (log,) = (home / "out/log").glob("*.jsonl")
    log.write_bytes(log.read_bytes() + b'{"event": "sha')  # as a kill may leave the line

    process = start(home)
    assert [note.shard for note in until(home, is_running("c")).stages[0].running] == ["c"]
    allow(home, "c", "d")
    assert process.wait() == 0, process.communicate()
    done = status.read(str(home / "out"))
    assert [(stage.name, stage.state, stage.done) for stage in done.stages[:1]] == [("ingest", "done", 4)]
    assert done.driver is None
    times = run_log.times(str(home / "out"))
    assert times["ingest"].shards == 4 and times["ingest"].items == 20 and times["ingest"].bytes == 400
    assert times["ingest"].seconds >= times["ingest/step"].seconds > 0 and times["ingest"].done
    assert sorted(path.suffix for path in (home / "out/log").iterdir()) == [".jsonl", ".jsonl"]
    assert "ingest" in printed_status(home) and "No process works on this run" in printed_status(home)


def test_stopped_run_has_its_reason(home: Path) -> None:
    allow(home, "s0", "a", "b")
    allow(home, "c", word="no")
    process = start(home)
    assert process.communicate() and process.returncode == 2
    printed = printed_status(home)
    assert "It stopped with: ingest, shard c: the worker says no" in printed
    assert "Correct this first, then run the command again" in printed and "Run the same command" not in printed
    run_status = status.read(str(home / "out"))
    ingest = run_status.stages[0]
    assert (ingest.state, ingest.done, ingest.left) == ("stopped", 2, 2)
    assert run_status.driver is None and not list((home / "out/log").glob(".tmp*"))


def test_signal_ends_the_run_in_order_and_leaves_no_driver(home: Path) -> None:
    process = start(home)
    until(home, is_running("s0"))
    process.send_signal(signal.SIGTERM)
    assert process.communicate() and process.returncode == 143
    assert not (home / "out/log/driver.json").exists() and not (home / "out/log/workers").exists()
    assert status.read(str(home / "out")).state == "stopped"
    printed = printed_status(home)
    assert "It stopped with: stopped by SIGTERM\nRun the same command again to resume it." in printed


def test_new_run_has_all_stages_left(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    run_status = status.read(str(tmp_path))
    assert [stage.state for stage in run_status.stages] == ["left"] * len(STAGES)
    assert run_status.why_stopped is None


@pytest.mark.parametrize("kind", ["nothing", "a file", "other files", "a stage"])
def test_path_without_a_run_is_one_message(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "a file":
        path.write_text("")
    elif kind != "nothing":
        path.mkdir()
        (path / ("holiday.png" if kind == "other files" else MANIFEST_NAME)).write_text("")
    with pytest.raises(InputError, match="No run at"):
        status.read(str(path))
    if kind == "nothing":
        result = subprocess.run(
            [sys.executable, "-m", "pipelines.status", str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stderr.count("error:"), result.stdout) == (2, 1, "")


def test_log_on_an_object_store_is_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "SECONDS_BETWEEN_PIECES", -1.0)
    run = f"memory://{os.urandom(4).hex()}"
    with run_log.open_log(run) as log:
        for number in range(3):
            log.write("stopped", why=str(number))
        assert run_log.read_driver(run) is not None
    assert [line.why for line in run_log.read_lines(run) if isinstance(line, run_log.StoppedLine)] == ["0", "1", "2"]
    assert [path.rpartition("-")[2] for path in paths.list_names(run + "/log")] == [
        f"{number:04d}.jsonl" for number in range(3)
    ]
    assert run_log.read_driver(run) is None
    fsspec.filesystem("memory").rm(run, recursive=True)


def test_times_of_a_redone_stage_start_from_zero(tmp_path: Path) -> None:
    def line(event: str, at: float, **facts: object) -> str:
        return json.dumps({"event": event, "time": at, "stage": "ingest", **facts}) + "\n"

    begin = {"shards": 2, "done_before": 0, "workers": 2}
    shard = {"worker": "w", "started": 0, "items": 1, "bytes": 1, "totals": {}, "rejects": {}}
    (tmp_path / "log").mkdir()
    first = [line("begin", 100, plan="x", **begin), line("shard", 104, shard="a", seconds=4, **shard)]
    (tmp_path / "log/shards-1.jsonl").write_text("".join(first))
    (killed,) = run_log.times(str(tmp_path)).values()
    assert (killed.seconds, killed.capacity, killed.busy, killed.idle, killed.done) == (4, 8, 4, 0.5, False)
    resumed = [
        line("begin", 200, plan="x", **begin | {"done_before": 1}),
        line("shard", 201, shard="b", seconds=1, **shard),
        line("end", 202, seconds=2),
    ]
    (tmp_path / "log/shards-2.jsonl").write_text("".join(resumed))
    (whole,) = run_log.times(str(tmp_path)).values()
    assert (whole.seconds, whole.capacity, whole.busy, whole.shards, whole.done) == (6, 12, 5, 2, True)
    (tmp_path / "log/shards-3.jsonl").write_text(line("begin", 300, plan="y", **begin) + line("end", 301, seconds=1))
    (redone,) = run_log.times(str(tmp_path)).values()
    assert (redone.seconds, redone.shards) == (1, 0)


LINES = [
    {"event": "begin", "time": 100, "stage": "ingest", "plan": "x", "shards": 2, "done_before": 0, "workers": 2},
    {"event": "begin", "time": 101, "stage": "ingest/s", "plan": "y", "shards": 1, "done_before": 0, "workers": 2},
    {"event": "shard", "time": 102, "stage": "ingest/s", "shard": "s0", "seconds": 1, "items": 1, "bytes": 1},
    {"event": "end", "time": 103, "stage": "ingest/s", "seconds": 2},
    {"event": "shard", "time": 104, "stage": "ingest", "shard": "a", "seconds": 4, "items": 1, "bytes": 1},
    {"event": "end", "time": 105, "stage": "ingest", "seconds": 5},
    {"event": "stopped", "time": 106, "why": "the disk is full"},
]


def write_log(run: Path, lines: list[bytes]) -> None:
    (run / "log/workers").mkdir(parents=True, exist_ok=True)
    (run / "log/shards-1.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "1e300", "-1", "1" + "0" * 400, "0.5", "null", '"x"'])
def test_strange_numbers_in_the_log_stop_no_status(
    tmp_path: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damage, or another program, may leave any number at any place."""
    (tmp_path / "ingest").mkdir()
    keys = [(line, key) for line in range(len(LINES)) for key, value in LINES[line].items() if isinstance(value, int)]
    for at, key in keys:
        lines = [json.dumps(line).encode() for line in LINES]
        lines[at] = json.dumps(LINES[at] | {key: "HERE"}).replace('"HERE"', number).encode()
        write_log(tmp_path, lines)
        for name, facts in (
            ("driver.json", {"machine": "m", "process": 1, "started": 1, "beat": 2}),
            ("workers/w.json", {"stage": "ingest", "shard": "a", "worker": "w", "started": 5}),
        ):
            text = json.dumps(facts | {next(reversed(facts)): "HERE"}).replace('"HERE"', number)
            (tmp_path / "log" / name).write_text(text)
        status.command_line(str(tmp_path))
        assert "inf" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b'{"event": "shard", "ti', b"[]", b'{"event": "other"}', b"\xff"])
def test_damaged_log_stops_neither_status_nor_the_run(tmp_path: Path, damage: bytes) -> None:
    lines = [json.dumps(line).encode() for line in LINES]
    for number in range(len(lines)):
        write_log(tmp_path, [*lines[:number], damage, *lines[number + 1 :]])
        (tmp_path / "log/driver.json").write_bytes(damage)
        (tmp_path / "log/workers/w.json").write_bytes(damage)
        assert status.read(str(tmp_path)).driver is None
        assert run_log.num_torn(str(tmp_path)) == (damage != b"")
        whole = number in (1, 2, 3, 6)  # only lines of the stage itself change its time
        assert ("ingest" in run_log.times(str(tmp_path))) == (number != 0)
        assert not whole or run_log.times(str(tmp_path))["ingest"].seconds == 5
    with run_log.open_log(str(tmp_path)) as log:
        assert log.started, "the files of the killed driver must be deleted"
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["shards-1.jsonl"]


def test_status_counts_the_torn_lines(home: Path) -> None:
    write_log(home / "out", [b"{", *(json.dumps(line).encode() for line in LINES)])
    printed = printed_status(home)
    assert "Lines of the log that cannot be read: 1." in printed and "It stopped with: the disk is full" in printed


def test_log_that_cannot_be_written_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").write_text("a file in the place of the folder")
    with run_log.open_log(str(tmp_path)) as log:
        for number in range(3):
            log.write("stopped", why=str(number))
    assert capsys.readouterr().err.count("cannot be written") == 1
    run_log.write_note(str(tmp_path / "log/workers"), "ingest", "a")
