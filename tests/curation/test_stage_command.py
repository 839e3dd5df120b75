"""The commands of the stages: their options, their plan, and their work on folders of earlier stages."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import typer
from typer.testing import CliRunner

from curation import cluster, dedup, embed, ingest, pack, pairs
from curation.dedup import DedupConfig
from curation.embed import EmbedConfig
from curation.engine.manifest import FORMAT_VERSION, require_manifest
from curation.engine.runner import InlineRunner
from curation.errors import InputError, WeightsError
from curation.pack import PackConfig
from curation.run_folder import RunFolder, require_stage
from tests.curation.builders import (
    content_hash,
    encoded_image,
    id_of,
    image_row,
    packed_stages,
    write_dedup,
    write_ingest,
    write_pairs,
    write_stage,
    write_vectors,
)

COMMON = ["--config", "--output", "--runner", "--workers", "--set", "--plan", "--replace", "--help"]
FOLDERS = {
    ingest: [],
    pairs: ["--images", "--descriptors"],
    dedup: ["--images", "--pairs"],
    cluster: ["--images", "--dedup", "--vectors"],
    pack: ["--images", "--dedup", "--retrieved"],
}
CONFIG = """
[[ingest.sources]]
name = "pool"
role = "pool"
path = "PATH"

[dedup]
threshold = 0.7
"""


def app(stage: object) -> typer.Typer:
    application = typer.Typer()
    application.command()(stage.command_line)  # type: ignore[attr-defined]  # a module
    return application


@pytest.mark.parametrize("stage", FOLDERS, ids=lambda stage: str(stage.__name__))
def test_help_lists_the_folders_that_the_stage_reads_and_the_common_options(stage: object) -> None:
    shown = CliRunner().invoke(app(stage), ["--help"], env={"COLUMNS": "200"}).output
    listed = {word for word in shown.replace("│", " ").split() if word.startswith("--")}
    assert set(COMMON + FOLDERS[stage]) <= listed  # type: ignore[index]  # a module
    assert not listed & {option for options in FOLDERS.values() for option in options} - set(FOLDERS[stage])  # type: ignore[index]


def test_a_missing_folder_is_named() -> None:
    shown = CliRunner().invoke(app(dedup), ["--config", "c.toml", "--output", "out", "--images", "ingest"])
    assert shown.exit_code == 2 and "--pairs" in shown.output


def test_two_stages_run_alone_one_after_the_other(tmp_path: Path) -> None:
    for number in (1, 2, 2):
        path = tmp_path / f"images/{len(list(tmp_path.glob('images/*')))}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded_image(number))
    config, images = tmp_path / "config.toml", str(tmp_path / "ingest")
    config.write_text(CONFIG.replace("PATH", str(tmp_path / "images")))

    def call(stage: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"curation.{stage}", "--config", str(config), "--runner", "inline", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    call("ingest", "--output", images)
    planned = call("dedup", "--images", images, "--pairs", "nowhere", "--output", "nowhere", "--plan")
    assert "threshold = 0.7" in planned.stdout
    copies = write_pairs(tmp_path / "pairs", images, [[]])
    output = str(tmp_path / "dedup")
    call("dedup", "--images", images, "--pairs", copies, "--output", output, "--set", "dedup.threshold=0.8")
    manifest = require_manifest(output)
    assert manifest.totals["exact"] == 1 and manifest.facts["threshold"] == 0.8


def test_an_output_over_an_input_or_below_a_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with --replace, which would delete the input first."""
    monkeypatch.chdir(tmp_path)
    images = write_ingest(tmp_path / "ingest", [[image_row(id_of(1), "pool", "pool")]])
    copies = write_pairs(tmp_path / "pairs", images, [[]])
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.png").write_bytes(encoded_image(1))
    (tmp_path / "link").symlink_to(tmp_path / "source")
    (tmp_path / "config.toml").write_text(CONFIG.replace("PATH", str(tmp_path / "link")))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    base = ["--config", "config.toml", "--runner", "inline", "--replace", "--output"]
    for stage, output, message in [
        (dedup, "pairs", f"is the input '{copies}', which would be lost"),
        (dedup, f"file://{tmp_path}/source/../ingest/", f"is the input '{images}'"),
        (dedup, "config.toml", "is the input 'config.toml'"),
        (ingest, "source", f"is the input '{tmp_path}/link'"),
        (ingest, "source/out", f"lies below the input '{tmp_path}/link'"),
    ]:
        folders = ["--images", images, "--pairs", copies] if stage is dedup else []
        result = CliRunner().invoke(app(stage), [*base, output, *folders])
        assert isinstance(result.exception, InputError) and message in str(result.exception), (output, result.output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_folder_of_another_stage_or_of_a_whole_run_is_named_with_the_needed_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    images = write_ingest(run / "ingest", [[image_row(id_of(1), "pool", "pool")]])
    (tmp_path / "config.toml").write_text("[dedup]\n")
    common = ["--config", str(tmp_path / "config.toml"), "--output", str(tmp_path / "out"), "--images"]
    for folder, pairs_folder, message in (
        (images, images, f"--pairs needs the folder of a finished pairs, but '{images}' holds the stage ingest."),
        (images, str(tmp_path), f"--pairs needs the folder of a finished pairs, but '{tmp_path}' holds no finished"),
        (str(run), images, f"--images '{run}' is the folder of a run. Give '{images}'."),
    ):
        shown = CliRunner().invoke(app(dedup), [*common, folder, "--pairs", pairs_folder])
        assert isinstance(shown.exception, InputError) and str(shown.exception).startswith(message)
    assert not (tmp_path / "out").exists()


def test_embed_and_describe_take_the_place_of_each_other(tmp_path: Path) -> None:
    images = write_ingest(tmp_path / "ingest", [[image_row(id_of(1), "pool", "pool")]])
    require_stage(write_vectors(tmp_path / "embed", images, [{id_of(1): np.ones(4)}]), "describe", "--descriptors")


def test_missing_sources_are_listed_together_before_ray_starts(tmp_path: Path, no_shared_ray: None) -> None:
    config = tmp_path / "config.toml"
    source = '[[ingest.sources]]\nname = "{0}"\nrole = "pool"\npath = "{0}"\n'
    config.write_text(source.format("a") + source.format("b"))
    shown = CliRunner().invoke(app(ingest), ["--config", str(config), "--output", str(tmp_path / "out")])
    assert isinstance(shown.exception, InputError) and not ray.is_initialized()
    assert [line.partition(". ")[0] for line in str(shown.exception).splitlines()] == [
        f"source '{name}': there is nothing at '{tmp_path}/{name}'" for name in "ab"
    ]


def test_missing_weights_are_said_before_ray_starts(tmp_path: Path, no_shared_ray: None) -> None:
    options = ["--model", "vit_tiny_patch16", "--weights", "nowhere.pth", "--images", str(tmp_path), "--output", "out"]
    shown = CliRunner().invoke(app(embed), options)
    assert isinstance(shown.exception, WeightsError) and not ray.is_initialized()
    assert "there are no weights at 'nowhere.pth'" in str(shown.exception)


@pytest.mark.parametrize(("stage", "fact"), [("embed", "limits"), ("dedup", "min_similarity"), ("pack", "datasets")])
def test_the_folder_of_another_stage_is_one_message(tmp_path: Path, stage: str, fact: str) -> None:
    images = write_ingest(tmp_path / "ingest", [[image_row(id_of(1), "pool", "pool")]])
    other = write_stage(tmp_path / "other", [{}], inputs={"images": content_hash(images)})
    output, runner = str(tmp_path / "out"), InlineRunner()
    with pytest.raises(InputError, match=f"other' holds the stage 'other', whose manifest has no fact '{fact}'"):
        match stage:
            case "embed":
                config = EmbedConfig.model_validate({"embedder": {"name": "efficientnet_lite0", "pooling": "average"}})
                embed.run(config, RunFolder(ingest=other), output, runner)
            case "dedup":
                dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=other), output)
            case "pack":
                stages = packed_stages(images, write_dedup(tmp_path / "dedup", images), other)
                pack.run(PackConfig(), stages, output, runner)


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    images = write_ingest(tmp_path / "ingest", [[image_row(id_of(1), "pool", "pool")]])
    manifest = tmp_path / "ingest/manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 1'))
    with pytest.raises(InputError, match=rf"ingest' was written in format 1; .* reads format {FORMAT_VERSION}\. Run"):
        dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=images), str(tmp_path / "out"))
