"""The rows of the GPU benchmark end one by one, whatever happens to one of them; all run in miniature on a CPU."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation.errors import InputError
from curation.files import parquet
from pipelines.bench import gpu, gpu_curation, gpu_pictures, gpu_row, gpu_search
from pipelines.bench.gpu import Row
from pipelines.bench.gpu_pictures import Cut
from pipelines.bench.gpu_row import Setup

PHOTOGRAPHS = gpu.installed_photographs()


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def setup(folder: Path, **changes: Any) -> Setup:
    return Setup(**{"images": PHOTOGRAPHS, "folder": str(folder), "tiny": True, "demo": str(folder / "none")} | changes)


def start(output: Path, *rows: str) -> subprocess.Popen[bytes]:
    """The command with these rows, tiny."""
    only = [argument for row in rows for argument in ("--only", row)]
    command = [sys.executable, "-m", "pipelines.bench.gpu", "--tiny", "--output", str(output), *only]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def row_process(parent: subprocess.Popen[bytes], row: str) -> int:
    """The process of that row, as soon as it runs."""
    while parent.poll() is None:
        for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split():
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # the row before ended meanwhile
                continue
            if b"pipelines.bench.gpu_row" in arguments and row.encode() in arguments:
                return int(pid)
        time.sleep(0.02)
    raise AssertionError(f"{row} did not start")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the row's process in /proc")
def test_a_row_killed_from_outside_leaves_the_others(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    process = start(output, "join", "kmeans")
    os.kill(row_process(process, "join"), signal.SIGKILL)
    table, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages.decode()
    join, kmeans = lines(output)
    assert (join["name"], join["status"], join["reason"]) == ("join", "failed", "ended by signal 9 (SIGKILL)")
    assert join["value"] is None
    assert (kmeans["name"], kmeans["status"]) == ("kmeans", "done")
    assert kmeans["others"]["the plain loop's clusters like ours"] > 0.99
    for name in ("unit", "goal", "peer", "machine", "torch", "date", "seconds"):
        assert name in join and name in kmeans
    assert table.decode().count("\n| ") == 4  # two lines of the head, two rows
    assert "| failed: ended by signal 9 (SIGKILL) |" in table.decode()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the row's process in /proc")
def test_a_run_cut_short_leaves_its_rows_and_no_process(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    process = start(output, "join", "kmeans")
    pid = row_process(process, "kmeans")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert [line["name"] for line in lines(output)] == ["join"]
    deadline = time.monotonic() + 60
    while not has_ended(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended(pid)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or ended and waits for its new parent to take note (a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_row_past_its_limit_keeps_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of this test: it gives one figure, starts a process of its own, and waits."""
    rows = tmp_path / "modules" / "waiting_row.py"
    rows.parent.mkdir()
    rows.write_text(
        "import pathlib, subprocess, time\n"
        "from pipelines.bench.gpu_row import Figures\n"
        "def wait(setup):\n"
        "    yield Figures(1.0, 's')\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        "    pathlib.Path(setup.images, 'pid').write_text(str(child.pid))\n"
        "    yield Figures(2.0, 's', others={'more': 3.0})\n"
        "    time.sleep(600)\n"
        "def miss(setup):\n"
        "    import no_such_library\n"
        "def fail(setup):\n"
        "    yield Figures(4.0, 's')\n"
        "    raise ValueError('first line\\n  last line')\n"
        "ROWS = {'wait': wait, 'miss': miss, 'fail': fail}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(rows.parent))
    chosen = [Row("wait", "waiting_row", 4), Row("miss", "waiting_row", 60), Row("fail", "waiting_row", 60)]
    chosen.append(Row("late", "waiting_row", 60))
    output, folder = tmp_path / "rows.jsonl", tmp_path / "work"
    folder.mkdir()
    (waited, missed, failed) = gpu.run(chosen[:3], setup(folder, images=str(tmp_path)), output, seconds_in_all=100)
    assert (waited["status"], waited["value"], waited["others"]) == ("out of time", 2.0, {"more": 3.0})
    assert waited["reason"] == "stopped after 4 seconds" and 4 <= waited["seconds"] < 10
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z", "the row's own process still runs"
    assert (missed["status"], missed["reason"]) == ("not installed", "No module named 'no_such_library'")
    assert (failed["status"], failed["reason"], failed["value"]) == ("failed", "last line", 4.0)
    (late,) = gpu.run(chosen[3:], setup(folder), output, seconds_in_all=5)
    assert (late["status"], late["reason"]) == ("out of time", "all 5 seconds are over")
    assert lines(output) == [waited, missed, failed, late]


def test_a_row_writes_its_status_last(tmp_path: Path) -> None:
    figures = tmp_path / "figures.jsonl"
    assert gpu_row.run("pipelines.bench.gpu_curation", "demo", str(figures), setup(tmp_path)) == 1
    (status,) = lines(figures)
    assert status["status"] == "not here" and "make curate" in status["reason"]


def test_the_table_is_markdown() -> None:
    line = {
        "name": "search",
        "value": 1234.5,
        "unit": "images/s",
        "goal": "1.6",
        "peer": "a|b",
        "others": {"share": 0.123456, "attention": "varlen"},
        "machine": "a GPU",
        "torch": "2.11.0",
        "date": "2026-11-28",
        "seconds": 3.2,
        "status": "failed",
        "reason": "out of memory",
    }
    text = gpu.markdown([line, line | {"value": None, "reason": "", "status": "done", "others": {}}])
    assert text.splitlines()[0] == "2026-11-28, a GPU, torch 2.11.0."
    assert text.splitlines()[4] == (
        "| search | 1,234 images/s | 1.6 | a/b | share 0.1235; attention varlen | 3.2 | failed: out of memory |"
    )
    assert text.splitlines()[5] == "| search |  | 1.6 | a/b |  | 3.2 | done |"


def test_crops_are_the_same_with_more_processes(tmp_path: Path) -> None:
    cut = Cut(width=40, height=32, format="JPEG", seed=3)
    many, few = gpu_pictures.crops(PHOTOGRAPHS, 130, cut), gpu_pictures.crops(PHOTOGRAPHS, 4, cut)
    assert many[:4] == few and len(set(many)) == 130
    assert {Image.open(io.BytesIO(data)).size for data in many} == {(40, 32)}


def test_tiles_do_not_overlap() -> None:
    boxes = [gpu_pictures._tile((640, 427), Cut(320, 256, "PNG", 0, tiles=True), tile, 30) for tile in range(30)]
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert -1e-9 < left < right < 640 + 1e-9 and -1e-9 < top < bottom < 427 + 1e-9
        assert (right - left) / (bottom - top) == pytest.approx(320 / 256)
        for other in boxes[:index]:
            slack = 1e-9
            beside = right <= other[0] + slack or other[2] <= left + slack
            assert beside or bottom <= other[1] + slack or other[3] <= top + slack


def test_tiles_lie_inside_the_photograph() -> None:
    """Pillow refuses a box that is a rounding error too large."""
    for count in range(2, 60, 7):
        tiles = gpu_pictures.crops(PHOTOGRAPHS, count, Cut(320, 256, "PNG", 0, tiles=True))
        assert len(set(tiles)) == count
    assert {Image.open(io.BytesIO(data)).size for data in tiles} == {(106, 85)}


def test_photographs_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no photograph"):
        gpu_pictures.photographs(str(tmp_path))
    (tmp_path / "large.jpg").write_bytes(bytes(gpu_pictures.MAX_BYTES + 1))
    with pytest.raises(ValueError, match="50,000,001 bytes"):
        gpu_pictures.photographs(str(tmp_path))


def test_wrong_options_are_refused_before_any_row(tmp_path: Path) -> None:
    for options, message in (
        ({"only": ["none"]}, "no such row"),
        ({}, "Give --images"),
        ({"tiny": True, "reference": str(tmp_path)}, "no reference.json there"),
        ({"tiny": True, "images": str(tmp_path)}, "holds no photograph"),
    ):
        with pytest.raises(InputError, match=message):
            gpu.command_line(**options)
    (tmp_path / "reference.json").write_text('{"photographs": "others"}')
    with pytest.raises(InputError, match="other photographs"):
        gpu.command_line(tiny=True, reference=str(tmp_path))


def test_drawn_vectors_have_unit_length_and_clusters() -> None:
    one, other = (np.concatenate(gpu_search.draw(900, 3, "cpu", seed=seed)).astype(np.float32) for seed in (0, 1))
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=2e-3)
    products = one @ other.T
    assert 0.2 < (products > 0.35).mean() < 0.6 and (np.abs(products) < 0.2).mean() > 0.35


def test_plain_search_and_ours_agree_over_several_blocks() -> None:
    matrix = np.concatenate(gpu_search.draw(900, 3, "cpu"))
    blocks, queries = [matrix[:100], matrix[100:130], matrix[130:]], matrix[::45]
    plain = gpu_search.plain_search(queries, gpu_search.upload(blocks, "cpu"), 40)
    for count in (90, 115, 900):
        ours = gpu_search._search(setup(Path()), queries, blocks, count, 40)[1]
        order = np.argsort(-(queries.astype(np.float64) @ matrix[:count].T.astype(np.float64)), axis=1)
        assert gpu_search._agreement(ours, order[:, :40]) > 0.999  # two products may be equal but for rounding
    assert gpu_search._agreement(ours, plain) > 0.999
    assert gpu_search._agreement(ours, np.full_like(ours, -2)) == 0


def outcome(**changes: list[Any]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "name": ["pool/0.png", "pool/1.png"],
        "image_id": ["a", "b"],
        "vector": [[1.0, 0.0], [0.0, 1.0]],
        "descriptor": [[0.5, 0.5], [1.0, 0.0]],
        "kept": [True, False],
        "packed": [True, False],
    }
    return pa.table({**columns, **changes}).cast(gpu_curation.OUTCOME)


def test_outcomes_are_compared() -> None:
    equal = gpu_curation.compare(outcome(), outcome())
    assert all(value == pytest.approx(1.0) for value in equal.values())
    changed = outcome(vector=[[1.0, 0.0], [1.0, 0.0]], kept=[True, True])
    figures = gpu_curation.compare(changed, outcome())
    assert figures["least cosine of a vector"] == 0 and figures["mean cosine of a vector"] == 0.5
    assert figures["kept alike"] == 0.5 and figures["packed alike"] == 1
    with pytest.raises(ValueError, match="other pictures"):
        gpu_curation.compare(outcome(), outcome(name=["pool/0.png", "pool/2.png"]))


@pytest.mark.slow
def test_curation_equals_a_reference_of_the_same_machine(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    reference = tmp_path / "made"
    gpu_curation.make_reference(setup(tmp_path / "reference"), reference)
    assert parquet.read_table(str(reference / "curation.parquet"), gpu_curation.OUTCOME).num_rows == 80
    (tmp_path / "run").mkdir()
    *_, figures = gpu_curation.curation(setup(tmp_path / "run", reference=str(reference)))
    assert figures.others["planted copies found"] == 1
    for name in ("equal bytes", "kept alike", "packed alike"):
        assert figures.others[name] == 1
    assert figures.others["least cosine of a vector"] == pytest.approx(1)
    facts = json.loads((reference / "reference.json").read_text())
    (reference / "reference.json").write_text(json.dumps(facts | {"photographs": "others"}))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other photographs"):
        list(gpu_curation.curation(setup(tmp_path / "other", reference=str(reference))))


@pytest.mark.slow
def test_every_row_has_figures_or_a_reason(tmp_path: Path) -> None:
    """Two to three minutes: each row is a process of its own and imports torch."""
    output = tmp_path / "rows.jsonl"
    process = start(output)
    table, messages = process.communicate(timeout=320)
    assert process.returncode == 0, messages.decode()
    by_name = {line["name"]: line for line in lines(output)}
    assert list(by_name) == [row.name for row in gpu.ROWS]
    assert {line["status"] for line in by_name.values()} <= {"done", "not here"}, by_name
    assert by_name["step"]["value"] == 0 and by_name["resume"]["value"] == 0  # a CPU against itself
    assert by_name["fsdp"]["others"]["relative difference of the losses of 3 steps"] < 1e-5
    assert by_name["workers"]["others"]["the same bytes"] == "yes"
    assert by_name["search"]["others"]["the plain loop's neighbours among ours"] > 0.99
    assert by_name["cells"]["others"]["recall"] >= 0.99
    for name in ("train-small", "train-base", "train-large"):
        assert by_name[name]["others"]["varlen"] == "needs a GPU"
    assert table.decode().count("\n| ") == 2 + len(gpu.ROWS)
