"""Files are complete or absent, hashes are correct, and an output folder belongs to one plan."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PROGRESS_NAME,
    Manifest,
    Plan,
    ShardRecord,
    claim,
    mark_shard_done,
    read_done,
    read_manifest,
    require_manifest,
    step_folder,
    sum_counts,
    write_manifest,
)
from curation.errors import InputError, OutputMismatchError
from curation.files import parquet, paths
from curation.files.folder_lock import sole_writer
from curation.files.hashes import hash_json
from curation.files.paths import FileRecord
from tests.curation.builders import bytes_in


def start_or_resume(folder: str, plan: Plan, *, replace: bool) -> dict[str, ShardRecord] | Manifest:
    manifest = claim(folder, plan, replace=replace)
    return {record.name: record for record in read_done(folder)} if manifest is None else manifest


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path)
        return
    yield f"memory://{tmp_path.name}"
    paths.delete(f"memory://{tmp_path.name}")


def plan(**changes: object) -> Plan:
    fields: dict[str, object] = {
        "stage": "square",
        "config": {"power": 2, "levels": [{"k": 1}, {"k": 2}], "name": "a"},
        "inputs": {"images": "abc"},
        "num_shards": 3,
    }
    return Plan.model_validate(fields | changes)


def shard(number: int, folder: str) -> ShardRecord:
    """The record of one finished shard, whose file is written."""
    name = f"{number:05d}"
    file = paths.write_bytes(paths.join(folder, f"square-{name}.bin"), bytes([number]) * number)
    return ShardRecord(name=name, files=(file,), totals={"rows": number})


def finish(folder: str, stage_plan: Plan) -> Manifest:
    shards = tuple(shard(number, folder) for number in range(stage_plan.num_shards))
    manifest = Manifest(plan=stage_plan, shards=shards, totals={"rows": 3}, rejects={})
    write_manifest(folder, manifest)
    return manifest


# Paths


def test_join_keeps_protocol_and_slashes() -> None:
    assert paths.join("a", "b", "c.txt") == "a/b/c.txt"
    assert paths.join("a/", "b") == "a/b"
    assert paths.join("/", "b") == "/b"
    assert paths.join("s3://bucket/x/", "b") == "s3://bucket/x/b"


@pytest.mark.parametrize("path", ["nosuch://a/b", "s3:/a::nosuch://b"])
def test_unknown_protocol_is_an_input_error(path: str) -> None:
    with pytest.raises(InputError, match="nosuch"):
        paths.exists(path)


@pytest.mark.parametrize("name", ["a::b.bin", "a#b?c.bin", "a b.bin", "*[a].bin", "ü.bin", "simplecache::x.bin"])
def test_special_characters_in_a_file_name_have_no_effect(root: str, name: str) -> None:
    path = paths.join(root, "deep/er", name)
    record = paths.write_bytes(path, b"bytes")
    assert paths.read_bytes(path) == b"bytes"
    assert record.name == name
    assert paths.list_names(paths.join(root, "deep/er")) == [name]
    paths.delete(path)
    assert not paths.exists(path)
    paths.delete(path)  # deleting a missing file is allowed


def test_list_names_is_sorted_and_empty_for_no_folder(root: str) -> None:
    for name in ("b", "a", "c/d"):
        paths.write_bytes(paths.join(root, "folder", name), b"")
    assert paths.list_names(paths.join(root, "folder")) == ["a", "b", "c"]
    assert paths.list_names(paths.join(root, "nothing")) == []
    assert paths.is_folder(paths.join(root, "folder"))
    assert not paths.is_folder(paths.join(root, "folder/a"))


def test_file_url_is_local(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert paths.is_local(f"file://{tmp_path}") and paths.is_local(str(tmp_path))
    assert not paths.is_local("memory://a")
    assert paths.read_bytes(f"file://{tmp_path}/a") == b"x"


# Atomic writes


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_write_returns_the_size_and_hash_of_its_bytes(root: str, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    record = paths.write_bytes(paths.join(root, "new/file.bin"), data)
    assert paths.read_bytes(paths.join(root, "new/file.bin")) == data
    assert record == FileRecord(name="file.bin", sha256=hashlib.sha256(data).hexdigest(), bytes=size, rows=0)


def test_hash_of_a_large_file_written_from_one_buffer(root: str) -> None:
    buffer, expected = bytearray(paths.HASHED_AT_ONCE // 3 + 1), hashlib.sha256()
    with paths.atomic_write(paths.join(root, "large.bin")) as file:
        for number in range(20):
            buffer[:] = bytes([number]) * len(buffer)
            expected.update(buffer)
            file.write(buffer)
            if number % 5 == 4:
                assert file.sha256 == expected.hexdigest()
    assert file.sha256 == expected.hexdigest() and file.size == 20 * len(buffer)
    assert hashlib.sha256(paths.read_bytes(paths.join(root, "large.bin"))).digest() == expected.digest()


def test_failed_write_leaves_the_old_file(root: str) -> None:
    path = paths.join(root, "out/file.bin")
    with pytest.raises(ZeroDivisionError), paths.atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert not paths.exists(path)
    paths.write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), paths.atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert bytes_in(paths.join(root, "out")) == {"/file.bin": b"old"}


def test_file_is_not_visible_before_it_is_complete(root: str) -> None:
    path = paths.join(root, "file.bin")
    with paths.atomic_write(path) as file:
        file.write(b"half")
        assert not paths.exists(path)
    assert paths.read_bytes(path) == b"half"


HALF_A_FILE = """
import sys, time
from curation.files import paths
with paths.atomic_write(sys.argv[1]) as file:
    file.write(b'{"name": "00001", "tot' * 100_000)
    print("half", flush=True)
    time.sleep(600)
"""


def kill_during_write(path: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HALF_A_FILE, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_kill_during_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    start_or_resume(folder, plan(), replace=False)
    mark_shard_done(folder, shard(0, folder))
    before = bytes_in(folder)

    kill_during_write(f"{folder}/square-00000.bin")  # a complete file
    kill_during_write(f"{folder}/square-00001.bin")
    kill_during_write(f"{folder}/.progress/00001.json")

    after = bytes_in(folder)
    leftovers = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert len(leftovers) == 3
    assert all(paths.TEMPORARY_PREFIX in name for name in leftovers)

    # The next run continues, and deletes the files of the killed writers when it is done.
    done = start_or_resume(folder, plan(), replace=False)
    assert isinstance(done, dict) and list(done) == ["00000"]
    finish(folder, plan())
    names = {"/manifest.json", "/square-00000.bin", "/square-00001.bin", "/square-00002.bin"}
    assert set(bytes_in(folder)) == names


# Parquet

RATED = pa.schema([("image_id", pa.string()), ("other_image_id", pa.string()), ("similarity", pa.float32())])


def images_table(rows: int) -> pa.Table:
    return pa.table(
        {
            "image_id": [f"{row:032x}" for row in range(rows)],
            "other_image_id": [f"{row + 1:032x}" for row in range(rows)],
            "similarity": pa.array(np.random.default_rng(rows).random(rows), pa.float32()),
        },
        schema=RATED,
    )


@pytest.mark.parametrize("rows", [0, 1, 5000])
def test_table_reads_back_equal_and_is_written_with_equal_bytes(root: str, rows: int) -> None:
    table = images_table(rows)
    first = parquet.write_table(paths.join(root, "a.parquet"), table)
    second = parquet.write_table(
        paths.join(root, "b/a.parquet"), pa.concat_tables([table[: rows // 2], table[rows // 2 :]])
    )
    assert parquet.read_table(paths.join(root, "a.parquet"), RATED).equals(table)
    assert first.rows == rows and first.bytes > 0
    assert first == second
    assert hashlib.sha256(paths.read_bytes(paths.join(root, "a.parquet"))).hexdigest() == first.sha256
    chosen = parquet.read_table(paths.join(root, "a.parquet"), RATED, ["similarity", "image_id"])
    assert chosen.equals(table.select(["similarity", "image_id"]))


def test_columns_of_a_close_type_are_cast(root: str) -> None:
    path = paths.join(root, "a.parquet")
    table = images_table(4)
    wide = table.set_column(2, "similarity", table["similarity"].cast(pa.float64())).append_column("more", [[1] * 4])
    parquet.write_table(path, wide)
    assert parquet.read_table(path, RATED).equals(table)


def test_wrong_columns_are_named_with_the_file(root: str) -> None:
    path = paths.join(root, "a.parquet")
    with pytest.raises(InputError, match=r"No file at '.*a\.parquet'"):
        parquet.read_table(path, RATED)
    parquet.write_table(path, images_table(2).drop_columns(["similarity"]))
    with pytest.raises(InputError, match=r"a\.parquet: no column similarity\. Found: image_id, other_image_id\."):
        parquet.read_table(path, RATED)
    parquet.write_table(path, pa.table({"image_id": ["a"], "other_image_id": ["b"], "similarity": ["near"]}))
    with pytest.raises(InputError, match=r"a\.parquet: columns of the wrong type"):
        parquet.read_table(path, RATED)
    parquet.write_table(path, pa.table({"image_id": ["a"], "other_image_id": ["b"], "similarity": [[1.0]]}))
    with pytest.raises(InputError, match=r"a\.parquet: columns of the wrong type"):
        parquet.read_table(path, RATED)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_parquet_is_an_input_error_or_reads(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(str(path), images_table(200))
    whole = path.read_bytes()
    rng = np.random.default_rng(seed)
    for _ in range(60):
        damaged = bytearray(whole)
        position = int(rng.integers(len(whole)))
        if rng.random() < 0.3:
            del damaged[position:]
        else:  # damage the second half, where the footer and the last page headers are
            position = len(whole) - 1 - position // 2
            damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            parquet.read_table(str(path), RATED)
        except InputError as error:
            assert str(path) in str(error)


# The manifest


def file_record(name: str, content: bytes = b"") -> FileRecord:
    return FileRecord(name=name, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), rows=0)


def test_content_hash_depends_on_the_files_alone() -> None:
    def manifest(*files: FileRecord, **changes: Any) -> Manifest:
        shards = [ShardRecord(name=str(number), files=(file,)) for number, file in enumerate(files)]
        return dataclasses.replace(Manifest(plan(), shards, {}, {}), **changes)

    a, b = file_record("a-0", b"a"), file_record("b-0", b"b")
    original = manifest(a, b).content_hash
    assert original == manifest(a, b, totals={"rows": 1}, facts={"x": 2}, plan=plan(num_shards=9)).content_hash
    changed = [
        manifest(a),
        manifest(b, a),
        manifest(a, file_record("b-0", b"c")),
        manifest(a, file_record("b-1", b"b")),
        manifest(a, b, file_record("c-0")),
        manifest(),
    ]
    assert len({original, *(each.content_hash for each in changed)}) == 1 + len(changed)
    assert manifest(a, b).files("a") == ["a-0"]
    assert manifest(a, b).files("") == []


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_manifest_reads_back_equal(root: str, num_shards: int) -> None:
    manifest = finish(root, plan(num_shards=num_shards))
    read = require_manifest(root)
    assert read_manifest(root) == read == manifest
    assert read.content_hash == manifest.content_hash
    assert read.shards[1:] == manifest.shards[1:] and len(read.shards) == num_shards
    assert read != dataclasses.replace(manifest, shards=[ShardRecord(name="other")])


def test_manifest_is_json_with_one_shard_per_line(root: str) -> None:
    """Names and facts may hold any text."""
    odd = ',\n "shards": [\n\n ]\n}\n'
    shards = [ShardRecord(name=odd), ShardRecord(name="1", totals={odd: 1})]
    manifest = Manifest(plan(), shards, {"rows": 3}, {}, {odd: [odd, {"shards": []}]})
    write_manifest(root, manifest)
    text = paths.read_bytes(paths.join(root, "manifest.json"))
    assert require_manifest(root) == manifest
    assert sorted(json.loads(text)) == ["facts", "plan", "rejects", "shards", "totals"]
    assert [json.loads(line.rstrip(b","))["name"] for line in text.splitlines()[-4:-2]] == [odd, "1"]


def test_damaged_record_in_a_manifest_is_an_input_error(root: str) -> None:
    finish(root, plan())
    path = paths.join(root, "manifest.json")
    paths.write_bytes(path, paths.read_bytes(path).replace(b'"name":"00001"', b'"nam":"00001"'))
    with pytest.raises(InputError, match=r"manifest\.json: damaged, or not written by this version of Seedbed"):
        list(require_manifest(root).shards)


def test_missing_or_other_manifest_is_an_input_error(root: str) -> None:
    assert read_manifest(root) is None
    with pytest.raises(InputError, match=r"holds no finished stage.*Run the stage"):
        require_manifest(root)
    for text in (b"", b"{}", b'{"name": "other program"}', b"\xff"):
        paths.write_bytes(paths.join(root, "manifest.json"), text)
        with pytest.raises(InputError, match=r"manifest\.json: damaged, or not written by this version of Seedbed"):
            require_manifest(root)


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"holds no finished stage"):
        require_manifest(str(tmp_path / "file"))
    for replace in (False, True):
        with pytest.raises(OutputMismatchError, match=r"'.*file' is a file"):
            start_or_resume(str(tmp_path / "file"), plan(), replace=replace)
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_hash_json_is_canonical() -> None:
    assert hash_json({"b": [1, "ü"], "a": None}) == hash_json(json.loads('{"a":null, "b":[1,"\\u00fc"]}'))
    assert hash_json([1, 2]) != hash_json([2, 1])
    assert len(hash_json(None)) == 64


@pytest.mark.parametrize("seed", range(5))
def test_sum_counts_does_not_depend_on_the_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = [{str(key): int(rng.integers(9)) for key in rng.integers(0, 5, 3)} for _ in range(6)]
    total = sum_counts(counts)
    assert total == {key: sum(count.get(key, 0) for count in counts) for key in total}
    assert list(total) == sorted({key for count in counts for key in count})
    assert list(sum_counts(counts[::-1]).items()) == list(total.items())
    assert sum_counts([]) == {}


# Claiming an output folder


def test_new_then_resumed_then_done(root: str) -> None:
    folder = paths.join(root, "square")
    assert start_or_resume(folder, plan(), replace=False) == {}
    assert start_or_resume(folder, plan(), replace=False) == {}
    expected = {}
    for number in (2, 0):
        record = shard(number, folder)
        mark_shard_done(folder, record)
        expected[record.name] = record
        assert start_or_resume(folder, plan(), replace=False) == expected
        assert start_or_resume(folder, plan(), replace=True) == expected
    manifest = finish(folder, plan())
    assert start_or_resume(folder, plan(), replace=False) == manifest
    assert start_or_resume(folder, plan(), replace=True) == manifest
    assert PROGRESS_NAME not in paths.list_names(folder)


def test_replacing_a_stage_deletes_its_steps(root: str) -> None:
    folder = paths.join(root, "square")
    assert start_or_resume(folder, plan(), replace=False) == {}
    for step, is_done in (("first", True), ("second", False)):
        inner = step_folder(folder, step)
        assert start_or_resume(inner, plan(stage=step), replace=False) == {}
        mark_shard_done(inner, shard(0, inner))
        if is_done:
            finish(inner, plan(stage=step))
    assert start_or_resume(folder, plan(), replace=False) == {}
    with pytest.raises(OutputMismatchError):
        start_or_resume(folder, plan(inputs={"images": "other"}), replace=False)
    assert start_or_resume(folder, plan(inputs={"images": "other"}), replace=True) == {}
    assert paths.list_names(paths.join(folder, PROGRESS_NAME)) == ["plan.json"]


def test_progress_files_after_a_kill_behind_the_manifest_are_deleted(root: str) -> None:
    folder = paths.join(root, "square")
    manifest = finish(folder, plan())
    mark_shard_done(folder, shard(0, folder))
    paths.write_bytes(paths.join(folder, paths.TEMPORARY_PREFIX + "x"), b"half a file")
    assert start_or_resume(folder, plan(), replace=False) == manifest
    assert set(paths.list_names(folder)) == {file.name for s in manifest.shards for file in s.files} | {MANIFEST_NAME}


OTHER_PLANS = [
    (plan(config={"power": 3, "levels": [{"k": 1}, {"k": 2}], "name": "a"}), ["config.power: 2 there, 3 now"]),
    (plan(config={"power": 2, "levels": [{"k": 1}, {"k": 5}], "name": "a"}), ["config.levels.1.k: 2 there, 5 now"]),
    (plan(config={"power": 2, "levels": [{"k": 1}], "name": "a"}), ["config.levels.1.k: 2 there, not set now"]),
    (plan(inputs={"images": "xyz"}), ["inputs.images: 'abc' there, 'xyz' now"]),
    (plan(stage="cube", num_shards=4), ["num_shards: 3 there, 4 now", "stage: 'square' there, 'cube' now"]),
]


def test_work_of_another_format_names_every_remedy(root: str) -> None:
    """The features of an evaluation are such work, and its command has no --replace."""
    folder = paths.join(root, "square")
    finish(folder, plan())
    with pytest.raises(OutputMismatchError) as caught:
        start_or_resume(folder, plan(format_version=99), replace=False)
    message = str(caught.value)
    assert f"was written in format {FORMAT_VERSION}; this version of Seedbed writes format 99" in message
    assert "Delete this folder, give another --output, or give --replace to a command that has it" in message
    assert "\n" not in message and start_or_resume(folder, plan(format_version=99), replace=True) == {}


@pytest.mark.parametrize("finished", [False, True], ids=["half done", "done"])
@pytest.mark.parametrize(("other", "lines"), OTHER_PLANS)
def test_work_of_another_plan_is_refused_and_unchanged(
    root: str, finished: bool, other: Plan, lines: list[str]
) -> None:
    folder = paths.join(root, "square")
    start_or_resume(folder, plan(), replace=False)
    mark_shard_done(folder, shard(0, folder))
    if finished:
        finish(folder, plan())
    before = bytes_in(folder)
    with pytest.raises(OutputMismatchError) as caught:
        start_or_resume(folder, other, replace=False)
    first, *differences, last = str(caught.value).splitlines()
    assert first == f"'{folder}' holds the work of another config or of other inputs:"
    assert differences == [f"  {line}" for line in lines]
    assert "Nothing was changed" in last and "--replace" in last
    assert bytes_in(folder) == before

    assert start_or_resume(folder, other, replace=True) == {}
    assert set(bytes_in(folder)) == {"/.progress/plan.json"}
    assert finish(folder, other).plan == other


def test_long_list_of_differences_is_cut(root: str) -> None:
    start_or_resume(root, plan(config={str(key): 1 for key in range(50)}), replace=False)
    mark_shard_done(root, shard(0, root))
    with pytest.raises(OutputMismatchError, match="and 42 more"):
        start_or_resume(root, plan(config={str(key): 2 for key in range(50)}), replace=False)


@pytest.mark.parametrize("replace", [False, True])
def test_other_files_are_refused_and_never_deleted(root: str, replace: bool) -> None:
    paths.write_bytes(paths.join(root, "thesis.txt"), b"precious")
    paths.write_bytes(paths.join(root, "deeper/more.txt"), b"too")
    before = bytes_in(root)
    with pytest.raises(OutputMismatchError, match=r"holds files \(deeper, thesis\.txt\), but no manifest\.json says"):
        start_or_resume(root, plan(), replace=replace)
    assert bytes_in(root) == before


def test_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    script = (
        "import time; from curation.files.folder_lock import sole_writer\n"
        f"with sole_writer({folder!r}): print('in'); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE)
    assert first.stdout is not None and first.stdout.readline() == b"in\n"
    with pytest.raises(OutputMismatchError, match=r"Another run is writing '.*out'"), sole_writer(folder):
        pass
    with sole_writer(str(tmp_path / "other")), sole_writer("memory://out"):
        pass
    first.kill()
    first.wait()
    with sole_writer(folder):
        assert os.listdir(folder) == []


# Dies by os._exit before the n-th file operation of the action, for n = 1, 2, ... until the action succeeds.
DIE_AT_EVERY_STEP = """
import os, shutil, sys
from curation.engine.manifest import claim
from curation.engine.manifest import read_manifest
from curation.engine.manifest import write_manifest
from curation.engine.manifest import Plan

template, copies, action = sys.argv[1:]
changed = Plan.model_validate_json(sys.stdin.read())
manifest = read_manifest(template) if action == "replace" else None
finished = read_manifest(template + "-finished") if action == "finish" else None
EVENTS = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir"}
for step in range(1, 200):
    folder = f"{copies}/{step:03d}"
    shutil.copytree(template, folder)
    child = os.fork()
    if child == 0:
        operations_left = step

        def die(event, arguments):
            global operations_left
            if event in EVENTS:
                operations_left -= 1
                if operations_left == 0:
                    os._exit(9)

        sys.addaudithook(die)
        if action == "replace":
            claim(folder, changed, replace=True)
        else:
            write_manifest(folder, finished)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def die_at_every_step(template: str, copies: Path, action: str, new_plan: Plan) -> list[str]:
    """Copies of the folder `template` after the action died before its first, second, ... file operation."""
    copies.mkdir()
    command = [sys.executable, "-c", DIE_AT_EVERY_STEP, template, str(copies), action]
    subprocess.run(command, input=new_plan.model_dump_json().encode(), check=True, timeout=120)
    folders = sorted(str(path) for path in copies.iterdir())
    assert len(folders) > 5
    return folders


@pytest.mark.parametrize("finished", [False, True], ids=["half done", "done"])
def test_after_a_replace_that_dies_at_any_step_either_plan_can_continue(tmp_path: Path, finished: bool) -> None:
    template, other = str(tmp_path / "template"), plan(config={"power": 3})
    start_or_resume(template, plan(), replace=False)
    for number in range(3):
        mark_shard_done(template, shard(number, template))
    if finished:
        finish(template, plan())
    for folder in die_at_every_step(template, tmp_path / "copies", "replace", other):
        claimed = Path(folder, ".progress/plan.json")
        if claimed.exists() and Plan.model_validate_json(claimed.read_bytes()) == other:
            continue  # it died after its last operation
        # With the old plan: the files of every finished shard are complete.
        resumed = start_or_resume(folder, plan(), replace=False)
        records = resumed.shards if isinstance(resumed, Manifest) else resumed.values()
        for record in records:
            for file in record.files:
                data = paths.read_bytes(f"{folder}/{file.name}")
                assert hashlib.sha256(data).hexdigest() == file.sha256
        # With the new plan: refused without --replace, started anew with it.
        if set(bytes_in(folder)) != {"/.progress/plan.json"}:
            with pytest.raises(OutputMismatchError):
                start_or_resume(folder, other, replace=False)
        assert start_or_resume(folder, other, replace=True) == {}
        assert set(bytes_in(folder)) == {"/.progress/plan.json"}


def test_finish_that_dies_at_any_step_loses_no_shard(tmp_path: Path) -> None:
    template = str(tmp_path / "template")
    start_or_resume(template, plan(), replace=False)
    done = {record.name: record for record in (shard(number, template) for number in range(3))}
    for record in done.values():
        mark_shard_done(template, record)
    manifest = Manifest(plan=plan(), shards=tuple(done.values()), totals={}, rejects={})
    write_manifest(f"{template}-finished", manifest)
    for folder in die_at_every_step(template, tmp_path / "copies", "finish", plan()):
        assert start_or_resume(folder, plan(), replace=False) in (done, manifest)
        write_manifest(folder, manifest)
        assert start_or_resume(folder, plan(), replace=False) == manifest


def test_what_no_stage_wrote_is_not_deleted(root: str) -> None:
    finish(root, plan())
    paths.write_bytes(paths.join(root, "notes.txt"), b"precious")
    before = bytes_in(root)
    with pytest.raises(OutputMismatchError, match=r"also holds what no stage wrote \(notes\.txt\)"):
        start_or_resume(root, plan(config={"other": 1}), replace=True)
    assert bytes_in(root) == before


def test_a_marker_of_another_name_is_an_input_error(root: str) -> None:
    start_or_resume(root, plan(), replace=False)
    mark_shard_done(root, shard(0, root))
    marker = paths.join(root, ".progress/00000.json")
    paths.write_bytes(marker, paths.read_bytes(marker).replace(b'"name": "00000"', b'"name": "00007"', 1))
    with pytest.raises(InputError, match=r"00000\.json: damaged"):
        list(read_done(root))
