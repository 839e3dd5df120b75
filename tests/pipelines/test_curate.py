"""The whole pipeline on a few dozen small drawings: equal bytes, no work twice, no work lost, clear messages."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from curation.config import load
from curation.engine.manifest import require_manifest
from curation.engine.run_log import open_log
from curation.engine.runner import InlineRunner, OnProgress, Reported
from curation.errors import ConfigError
from curation.files import schemas
from curation.files.folder_lock import sole_writer
from curation.run_folder import STAGES
from pipelines import main_path, report
from pipelines.curate import command_line as curate_command
from pipelines.curate import curate as build
from pipelines.main_path import CurateConfig
from tests.curation.builders import run_in_process

ROOT = Path(__file__).parents[2]
CONFIG = """
[ingest]
images_per_shard = 8
max_reject_fraction = 0.2
[[ingest.sources]]
name = "discs"
role = "seed"
path = "seeds/discs"
[[ingest.sources]]
name = "stripes"
role = "seed"
path = "seeds/stripes"
[[ingest.sources]]
name = "unseen"
role = "holdout"
path = "holdout"
[[ingest.sources]]
name = "web"
role = "pool"
path = "pool"
[embed.embedder]
name = "efficientnet_lite0"
pooling = "average"
image_size = 64
[describe]
thumbnail_side = 96
[describe.embedder]
name = "efficientnet_lite0"
pooling = "gem"
image_size = 64
[pairs]
min_descriptor_similarity = 0.9
[self_check]
max_images = 1
[dedup]
threshold = 0.97
holdout_threshold = 0.9
[[cluster.levels]]
num_clusters = 4
[retrieve]
more_than_seeds = 1
[[retrieve.datasets]]
name = "discs"
as_is = true
retrieval = "sample"
k = 2
[[retrieve.datasets]]
name = "stripes"
retrieval = "cluster"
cap = 5
[pack]
images_per_shard = 10
"""


def drawing(kind: str, number: int) -> Image.Image:
    """The drawing of that kind and number: discs, stripes or scribbles, 96 x 80 pixels."""
    generator = np.random.default_rng([sum(map(ord, kind)), number])
    colours = [tuple(int(value) for value in generator.integers(0, 256, 3)) for _ in range(4)]
    image = Image.new("RGB", (96, 80), colours[0])
    draw = ImageDraw.Draw(image)
    for index in range(1, 4):
        x, y, size = (int(value) for value in generator.integers(5, 60, 3))
        match kind:
            case "discs":
                draw.ellipse((x, y, x + size, y + size), colours[index])
            case "stripes":
                draw.rectangle((0, y, 96, y + size // 6), colours[index])
            case _:
                points = [tuple(point) for point in generator.integers(0, 80, (6, 2)).tolist()]
                draw.line(points, colours[index], width=int(generator.integers(2, 6)))
    return image


def save(image: Image.Image, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def make_home(folder: Path) -> Path:
    """Images and a config in a folder, in which the commands run."""
    for number in range(10):
        save(drawing("discs", number), folder / f"seeds/discs/round/{number}.png")
        save(drawing("stripes", number), folder / f"seeds/stripes/{number}.png")
    for number in range(100, 104):
        save(drawing("scribbles", number), folder / f"holdout/{number}.png")
    for kind in ("discs", "stripes", "scribbles"):
        for number in range(20, 30):
            save(drawing(kind, number), folder / f"pool/{kind}/{number}.png")
    save(drawing("scribbles", 20), folder / "pool/copies/jpeg.jpg", quality=85)
    save(drawing("scribbles", 100), folder / "pool/copies/of_holdout.jpg", quality=90)
    save(drawing("scribbles", 21), folder / "pool/copies/exact.png")
    (folder / "pool/broken.png").write_bytes((folder / "pool/discs/20.png").read_bytes()[:200])
    (folder / "config.toml").write_text(CONFIG)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a finished run in `out`, which tests only read."""
    home = make_home(tmp_path_factory.mktemp("home"))
    done = inline(home)
    assert done.returncode == 0 and "packed" in done.stdout, done.stderr
    return home


def command(home: Path, *arguments: str, output: str = "out") -> list[str]:
    return [sys.executable, "-m", "pipelines.curate", "--config", "config.toml", "--output", output, *arguments]


def curate(home: Path, *arguments: str, output: str = "out") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command(home, *arguments, output=output), cwd=home, env=environment, capture_output=True, text=True, timeout=300
    )


def inline(home: Path, *arguments: str, output: str = "out") -> subprocess.CompletedProcess[str]:
    return curate(home, "--runner", "inline", *arguments, output=output)


def bytes_in(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a run, except the log, which holds times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent != folder / "log"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class ReportingRunner(InlineRunner):
    """Keeps the last report of each shard, by the name of the stage on the terminal."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, Reported]] = {}
        self.num_partial: Counter[str] = Counter()

    def map(self, stage: str, *arguments: Any, on_progress: OnProgress, **options: Any) -> Any:
        def keep(reported: Mapping[str, Reported]) -> None:
            self.last.setdefault(stage, {}).update(reported)
            self.num_partial[stage] += any(0 < shard.num_items < (shard.total or 8) for shard in reported.values())
            on_progress(reported)

        return super().map(stage, *arguments, on_progress=keep, **options)


def test_long_stages_report_what_they_do_inside_their_shards(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    settings = ["embed.embedder.batch_size=3", "describe.embedder.batch_size=3", "dedup.holdout_threshold=0.9"]
    settings.append("pairs.verification.working_side=64")
    monkeypatch.setattr("curation.pairs.PAIRS_PER_REPORT", 2)
    runner = ReportingRunner()
    with open_log("out") as log:
        main_path.run(load(CurateConfig, "config.toml", settings), "out", runner, log=log)
    for stage, total in (("ingest", "images"), ("embed", "embedded"), ("describe", "embedded"), ("corpus", "rows")):
        num_reported = sum(shard.num_items for shard in runner.last[stage].values())
        assert num_reported == require_manifest(f"out/{stage}").totals[total]
    for stage in ("pairs", "pairs/join", "retrieve/search"):
        assert all(shard.num_items == shard.total > 0 for shard in runner.last[stage].values())
    for stage in ("ingest", "embed", "describe", "pairs", "pairs/join", "retrieve/search", "corpus"):
        assert runner.num_partial[stage], f"{stage} reports inside a shard"


def written_at(folder: Path) -> dict[str, int]:
    """The time of the last change of every file of a run."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_same_bytes_inline_and_on_ray(finished: Path) -> None:
    on_ray = curate(finished, "--workers", "2", output="ray")
    assert on_ray.returncode == 0, on_ray.stderr
    assert bytes_in(finished / "ray") == bytes_in(finished / "out")
    assert "Starting Ray on 2 cores of this machine" in on_ray.stderr and "Ray runs after" in on_ray.stderr
    assert "dashboard" not in on_ray.stderr, "this Ray has none"
    (log,) = (finished / "ray/log").iterdir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    shards = {(line["stage"], line["shard"]) for line in lines if line["event"] == "shard"}
    for stage in STAGES:
        for record in require_manifest(str(finished / "ray" / stage)).shards:
            assert (stage, record.name) in shards or record.name in ("prepared", "composition", "known")
    assert {line["stage"] for line in lines if line["event"] == "end"} >= set(STAGES)
    assert "Time of each stage" in on_ray.stdout
    assert "of 19 edited copies of 1 of its images were recognised" in " ".join(on_ray.stdout.split())


def test_second_run_does_no_work_and_a_changed_threshold_redoes_only_what_depends_on_it(finished: Path) -> None:
    home = finished
    shutil.copytree(home / "out", home / "changed")
    before = written_at(home / "changed")
    (home / "changed/.tmp-0123-report.html").write_text("half, because the run was killed")
    again = inline(home, output="changed")
    assert again.returncode == 0
    assert again.stderr.count("already done, nothing to do") == 11
    assert written_at(home / "changed") == before

    refused = inline(home, "--set", "dedup.threshold=0.99", output="changed")
    assert refused.returncode == 2
    assert "config.threshold: 0.97 there, 0.99 now" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert written_at(home / "changed") == before

    replaced = inline(home, "--set", "dedup.threshold=0.99", "--replace", output="changed")
    assert replaced.returncode == 0, replaced.stderr
    after = written_at(home / "changed")
    for stage in ("ingest", "embed", "describe", "pairs", "self_check"):
        stage_files = {name: time for name, time in before.items() if name.startswith(stage + "/")}
        assert stage_files and stage_files.items() <= after.items()
    assert after["dedup/manifest.json"] > before["dedup/manifest.json"]
    assert inline(home, "--set", "dedup.threshold=0.99", output="fresh").returncode == 0
    assert bytes_in(home / "fresh") == bytes_in(home / "changed")

    without = ("--set", "self_check.max_images=0", "--set", "dedup.threshold=0.99", "--replace")
    assert inline(home, *without, output="changed").returncode == 0
    assert [path.name for path in (home / "changed/self_check").iterdir()] == ["manifest.json"]
    assert written_at(home / "changed")["dedup/manifest.json"] == after["dedup/manifest.json"]


def test_own_images_need_no_config(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    sources = ("--seeds", "seeds/discs", "lines=seeds/stripes", "--pool", "pool", "--holdout", "holdout")
    options = ("--output", "own", "--runner", "inline", "--k", "2")
    done = run_in_process(curate_command, *sources, *options)
    assert done.returncode == 0, done.stderr
    config = load(CurateConfig, "own/run.toml")
    assert [source.name for source in config.ingest.sources] == ["discs", "lines", "pool", "holdout"]
    assert all(source.path.startswith(f"{finished}/") for source in config.ingest.sources)
    before = written_at(finished / "own")
    run = build(
        {"discs": "seeds/discs", "lines": "seeds/stripes"},
        "pool",
        holdout="holdout",
        k=2,
        output="own",
        runner="inline",
    )
    assert written_at(finished / "own") == before and Path(run.report).exists()
    corpus, images = run.corpus(), run.images()
    assert images.column_names == schemas.IMAGES_TABLE.names
    assert len(set(images["image_id"].to_pylist())) == images.num_rows == 56
    assert corpus.column_names == schemas.CORPUS.names and corpus.num_rows > 20


def test_a_config_and_paths_are_not_given_together(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for arguments, message in (
        (("--config", "config.toml", "--k", "3", "--pool", "x", "--output", "o"), "--config and --pool, --k are both"),
        (("--output", "o"), "Nothing to curate. Give --seeds NAME=PATH and --pool PATH"),
        (("--seeds", "seeds", "--pool", "pool"), "--output is missing"),
    ):
        refused = run_in_process(curate_command, *arguments)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    assert not (home / "o").exists()


def test_mix_of_seeds_retrieval_and_clustering(home: Path) -> None:
    weights = ("seeds=1", "retrieval=2", "clustering=5")
    settings = ["retrieve.clustering.num_images=12", *(f"pack.mix.{weight}" for weight in weights)]
    done = inline(home, *(word for setting in settings for word in ("--set", setting)))
    assert done.returncode == 0, done.stderr
    composition = json.loads((home / "out/corpus/composition.json").read_text())
    parts = {row["part"]: row for row in composition["parts"]}
    assert {name: row["share_of_weight"] for name, row in parts.items()} == pytest.approx(
        {"seeds": 1 / 8, "retrieval": 2 / 8, "clustering": 5 / 8}
    )
    assert parts["clustering"]["rows"] == parts["clustering"]["unique"] == 12
    assert (home / "out/report.html").exists()


def test_kill_at_any_moment_loses_nothing(finished: Path) -> None:
    """Over 20 seconds: five runs that end by a kill after 4 to 8 seconds, and one that ends."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    for seconds in (4.0, 5.0, 6.0, 7.0, 8.0):
        process = subprocess.Popen(
            command(finished, "--runner", "inline", output="killed"),
            cwd=finished,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        for manifest in (finished / "killed").glob("*/manifest.json"):
            for shard in json.loads(manifest.read_text())["shards"]:
                assert all((manifest.parent / file["name"]).exists() for file in shard["files"])
    assert kills >= 1
    assert inline(finished, output="killed").returncode == 0
    assert bytes_in(finished / "killed") == bytes_in(finished / "out")


WRONG = [
    (("max_reject_fraction", "max_rejects"), "Unknown key: 'ingest.max_rejects'"),
    (('path = "pool"', 'path = "nowhere"'), "/nowhere'. Correct its path"),
    (('path = "pool"', 'path = "empty"'), "/empty' (looked for files"),
    (("max_reject_fraction = 0.2", "max_reject_fraction = 0"), "more than max_reject_fraction = 0 allows"),
    (('path = "pool"', 'path = "cut"\nlayout = "webdataset"'), "not a readable plain tar"),
    (('name = "stripes"\nretrieval', 'name = "strips"\nretrieval'), "'strips', which is no source"),
    (('pooling = "average"', 'pooling = "average"\ndevice = "cuda"'), "sees no GPU here"),
    (("num_clusters = 4", "num_clusters = 34"), "is 34, but only 31 pool images were kept"),
    (("num_clusters = 4", "num_clusters = 35"), "is 35, but the pool holds 34 images"),
    (("holdout_threshold = 0.9", "holdout_threshold = 0.95"), "dedup.holdout_threshold (0.95) lies above 0.9"),
    (("thumbnail_side = 96", "thumbnail_side = 0"), "describe.thumbnail_side is 0, but pairs.verification"),
    (
        ("[self_check]", '[pairs.verification]\ndomain = "drawings"\nlocal_differences = "forbid"\n[self_check]'),
        "local_differences is 'forbid', which only the comparison of photographs knows",
    ),
]


def test_wrong_input_is_one_message_and_status_2_and_the_corrected_run_ends(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    Path("empty").mkdir()
    Path("cut").mkdir()
    Path("cut/0.tar").write_bytes(b"x" * 700)
    for number, (change, message) in enumerate(WRONG):
        assert change[0] in CONFIG
        Path("wrong.toml").write_text(CONFIG.replace(*change, 1))
        options = ("--config", "wrong.toml", "--output", f"wrong{number}", "--runner", "inline")
        result = run_in_process(curate_command, *options)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.count("error:") == 1
    for number in (3, 7):  # these ended after some work, which stays
        assert (finished / f"wrong{number}/ingest").is_dir()
        corrected = inline(finished, output=f"wrong{number}")
        assert corrected.returncode == 0, corrected.stderr
        assert bytes_in(finished / f"wrong{number}") == bytes_in(finished / "out")


def test_a_source_of_lookalikes_stops_the_run_and_another_setting_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of its time: the network on 70 images."""
    monkeypatch.chdir(home)
    for number in range(24):
        x, y = number % 6, number // 6
        save(drawing("scribbles", 50).crop((x, y, x + 88, y + 74)), home / f"cells/{number}.png")
    source = '[[ingest.sources]]\nname = "cells"\nrole = "pool"\npath = "cells"\n'
    (home / "config.toml").write_text(CONFIG.replace("[embed.embedder]", source + "[embed.embedder]", 1))
    arguments = ["--config", "config.toml", "--output", "out", "--runner", "inline"]
    arguments += ["--set", "dedup.threshold=0.6", "--set", "dedup.holdout_threshold=0.6"]
    stopped = run_in_process(curate_command, *arguments)
    assert stopped.returncode == 2 and stopped.stderr.count("error:") == 1 and "Traceback" not in stopped.stderr
    assert "'cells' (100% of 24 images have 5 or more neighbours" in stopped.stderr
    assert f"Look at their pairs in {Path('out/lookalikes.html')}" in stopped.stderr
    assert not Path("out/dedup").exists() and Path("out/lookalikes.html").read_text().count("<img") > 10
    pairs = bytes_in(home / "out/pairs")
    gone_on = run_in_process(curate_command, *arguments, "--set", "dedup.lookalikes=exact")
    assert gone_on.returncode == 0, gone_on.stderr
    assert "pairs: already done" in gone_on.stderr and bytes_in(home / "out/pairs") == pairs
    assert not Path("out/lookalikes.html").exists()
    for text in ("look alike; only equal files", "100.0% of 24 images have 5 or more", "0 images matched the holdout"):
        assert text in Path("out/report.html").read_text()
    dedup, retrieve = (require_manifest(f"out/{stage}").facts for stage in ("dedup", "retrieve"))
    assert [each["source"] for each in dedup["lookalikes"]] == retrieve["check"]["lookalikes"] == ["cells"]


def test_no_input_is_deleted_or_overwritten(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    shutil.copytree("pool", "nested/corpus/pool")
    Path("nested.toml").write_text(CONFIG.replace('path = "pool"', 'path = "nested/corpus/pool"'))
    shutil.copytree("out", "saved")
    Path("saved/run.toml").write_text("# mine\n" + CONFIG)
    before = bytes_in(finished / "nested") | bytes_in(finished / "saved")
    for config, output, message in (
        ("nested.toml", "nested", "lies below --output 'nested/corpus'"),
        ("saved/run.toml", "saved", "it would be overwritten. Copy it"),
    ):
        options = ("--config", config, "--output", output, "--runner", "inline", "--replace")
        refused = run_in_process(curate_command, *options)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    assert bytes_in(finished / "nested") | bytes_in(finished / "saved") == before


def test_contradictory_sections_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    assert (
        load(CurateConfig, str(path), ["dedup.holdout_cosine=0.9", "pairs.min_cosine=0.9"]).dedup.holdout_cosine == 0.9
    )
    with pytest.raises(ConfigError, match=r"holdout_cosine \(0\.8\) lies below pairs\.min_descriptor_similarity"):
        load(CurateConfig, str(path), ["dedup.holdout_cosine=0.8"])


def test_second_run_beside_the_first_is_refused_and_leaves_its_log(home: Path) -> None:
    log = home / "out/log/driver.json"
    log.parent.mkdir(parents=True)
    log.write_text("the first run's")
    with sole_writer(str(home / "out")):
        result = inline(home)
    assert result.returncode == 2
    assert "Another run is writing 'out'" in result.stderr and "Traceback" not in result.stderr
    assert log.read_text() == "the first run's"
    assert sorted(path.name for path in (home / "out").iterdir()) == ["log"]


def test_output_with_other_files_is_refused_and_left_unchanged(home: Path) -> None:
    save(drawing("discs", 1), home / "out/ingest/holiday.png")
    result = inline(home)
    assert result.returncode == 2
    assert "holiday.png" in result.stderr
    assert [path.name for path in (home / "out/ingest").iterdir()] == ["holiday.png"]


def test_source_that_changed_after_ingest_is_refused(home: Path) -> None:
    assert inline(home, "--set", "cluster.levels.0.num_clusters=34").returncode == 2
    for name in ("describe", "pairs", "dedup", "embed"):
        subprocess.run(["rm", "-r", home / "out" / name], check=True)
    path = home / "pool/discs/25.png"
    buffer = io.BytesIO()
    Image.open(path).convert("L").save(buffer, "PNG")
    path.write_bytes(buffer.getvalue().ljust(path.stat().st_size, b"\0")[: path.stat().st_size])
    result = inline(home)
    assert result.returncode == 2
    assert "pool/discs/25.png" in result.stderr and "ingest again with --replace" in result.stderr


@pytest.mark.parametrize("config", ["demo.toml", "clipart.toml", "lvd142m.toml"])
def test_plan_of_every_config_prints_and_does_nothing(config: str, tmp_path: Path) -> None:
    path = ROOT / "pipelines/configs" / config
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.curate", "--config", str(path), "--output", "out", "--plan", "--verbose"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    if config == "lvd142m.toml":
        for number in ("1,300,000,000", "142,109,386", "0.45", "100,000", "10,000"):
            assert number in result.stdout


def test_the_report_of_a_finished_run_is_written_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)  # the sources of its config are relative paths
    shutil.copytree(finished / "out", tmp_path / "run")
    (tmp_path / "run/report.html").unlink()
    done = run_in_process(report.command_line, str(tmp_path / "run"))
    assert done.returncode == 0 and done.stdout == f"The report is {tmp_path}/run/report.html\n"
    assert (tmp_path / "run/report.html").read_bytes() == (finished / "out/report.html").read_bytes()
