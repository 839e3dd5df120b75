"""Embed: equal vectors for any batch size, threads and workers; aspect ratios; folders without a config."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation import backbone, embed, ingest
from curation.config import parse
from curation.embed import EmbedConfig
from curation.engine import progress
from curation.engine.manifest import read_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner
from curation.errors import OutputMismatchError, WeightsError
from curation.files import paths
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig
from curation.run_folder import RunFolder, read_vectors
from tests.curation.builders import bytes_in, picture_of, run_in_process

SIZES = [(90, 60), (60, 90), (64, 64), (300, 40), (33, 200), (128, 127), (640, 480), (48, 48)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vit_tiny whose blocks all have an effect."""
    model = backbone.build("vit_tiny", patch_size=16, image_size=64, layer_scale=0.2)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Thirty images of eight sizes, JPEG and PNG, and a copy of one of them."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(30):
        width, height = SIZES[number % len(SIZES)]
        coarse = np.random.default_rng(number % 29).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(root / f"{number:02d}.{'jpg' if number % 3 else 'png'}")
    (root / "again.png").write_bytes((root / "00.png").read_bytes())
    return str(root)


@pytest.fixture(scope="module")
def images(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("run") / "ingest")
    source = SourceConfig(name="pictures", path=folder, role="pool")
    ingest.run(IngestConfig(sources=(source,), images_per_shard=12), output, InlineRunner())
    return output


def config(weights: str, *, stage: dict[str, Any] | None = None, **options: Any) -> EmbedConfig:
    embedder = {"name": "vit_tiny_patch16", "weights": weights, "image_size": 64, "pooling": "cls_patch_mean"} | options
    return parse(EmbedConfig, {"embedder": embedder, **(stage or {})}, origin="test")


def matrix_of(output: str) -> dict[str, np.ndarray]:
    return {image_id: row for ids, matrix in read_vectors(output) for image_id, row in zip(ids, matrix, strict=True)}


@pytest.mark.parametrize("resize", ["squash", "keep_aspect"])
def test_vectors_do_not_depend_on_batches_and_threads(resize: str, weights: str, images: str, tmp_path: Path) -> None:
    def run(name: str, batch_size: int, **stage: int) -> dict[str, np.ndarray]:
        settings = config(weights, stage=stage, resize=resize, batch_size=batch_size)
        embed.run(settings, RunFolder(ingest=images), str(tmp_path / name), InlineRunner())
        return matrix_of(str(tmp_path / name))

    one = run("one", 1)
    assert len(one) == 30  # from 31 files
    for number, stage in enumerate(({"decode_threads": 1}, {"decode_threads": 7, "threads_per_worker": 2}, {})):
        other = run(str(number), (4, 5, 64)[number], **stage)
        assert list(other) == list(one)
        for image_id, vector in one.items():
            np.testing.assert_allclose(other[image_id].astype(np.float32), vector.astype(np.float32), atol=1e-3)
    assert not np.allclose(*list(one.values())[:2], atol=0.05), "distinct images have distinct vectors"


def test_runners_and_decode_threads_give_the_same_bytes(
    weights: str, images: str, tmp_path: Path, ray_runner: RayRunner
) -> None:
    outputs = [str(tmp_path / name) for name in ("inline", "threads", "ray")]
    embed.run(config(weights), RunFolder(ingest=images), outputs[0], InlineRunner())
    embed.run(config(weights, stage={"decode_threads": 5}), RunFolder(ingest=images), outputs[1], InlineRunner())
    embed.run(config(weights), RunFolder(ingest=images), outputs[2], ray_runner)
    assert bytes_in(outputs[0]) == bytes_in(outputs[1]) == bytes_in(outputs[2])


def test_keep_aspect_keeps_the_aspect_ratio_up_to_four(weights: str) -> None:
    settings = config(weights, resize="keep_aspect", image_size=224, weights_image_size=64)
    embedder = embed.load_embedder(settings.embedder)
    for width, height in [*SIZES, (1, 4000), (4000, 1), (224, 224), (1000, 250)]:
        rows, columns = embedder.shape(width, height)
        assert rows % 16 == columns % 16 == 0
        assert rows * columns == pytest.approx(224**2, rel=0.1)
        aspect_ratio = min(max(width / height, 0.25), 4)
        assert columns / rows == pytest.approx(aspect_ratio, rel=0.12)
    assert embedder.shape(500, 500) == (224, 224)
    shape = embedder.shape(300, 100)
    assert embedder.preprocess(picture_of(Image.new("RGB", (300, 100))), shape).shape == (3, *shape)
    square = embed.load_embedder(config(weights).embedder)
    assert square.shape(300, 100) == (64, 64)


def test_progress_shows_the_workers_times(
    weights: str, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich keeps the standard error of its import, so the test makes a new console."""
    monkeypatch.setattr(progress, "_console", progress.Console(stderr=True, highlight=False, width=200))
    embed.run(config(weights), RunFolder(ingest=images), str(tmp_path / "out"), InlineRunner())
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("embed: 31 images in ") and "images/s; model " in line and "pictures ready" in line
    assert b"waited" not in b"".join(bytes_in(str(tmp_path / "out")).values())


def run_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "curation.embed", "--runner", "inline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def refused(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_in_process(embed.command_line, "--runner", "inline", *arguments)


def test_a_folder_needs_no_config(weights: str, folder: str, images: str, tmp_path: Path) -> None:
    size = ("--set", "embed.embedder.image_size=64", "--set", "embed.embedder.pooling=cls_patch_mean")
    base = ("--model", "vit_tiny_patch16", "--weights", weights, *size)
    done = run_command("--images", folder, *base, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    embed.run(config(weights), RunFolder(ingest=images), str(tmp_path / "staged"), InlineRunner())
    by_command, staged = matrix_of(str(tmp_path / "out" / "embed")), matrix_of(str(tmp_path / "staged"))
    assert by_command.keys() == staged.keys()
    assert all((by_command[image_id] == staged[image_id]).all() for image_id in staged)
    assert matrix_of(str(tmp_path / "out")).keys() == staged.keys(), "the folder of a run gives its vectors"
    again = run_command("--images", folder, *base, "--output", str(tmp_path / "out"))
    assert again.returncode == 0 and "already done" in again.stderr
    of_ingest = run_command("--images", images, *base, "--output", str(tmp_path / "of_ingest"))
    assert of_ingest.returncode == 0
    assert matrix_of(str(tmp_path / "of_ingest")).keys() == staged.keys()


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_tars_and_parquet_need_no_config_either(layout: str, weights: str, folder: str, tmp_path: Path) -> None:
    files = sorted(os.listdir(folder))[:9]
    data = [Path(folder, name).read_bytes() for name in files]
    source = tmp_path / "source"
    source.mkdir()
    if layout == "parquet":
        pq.write_table(pa.table({"image": [{"bytes": one, "path": None} for one in data]}), source / "train.parquet")
    else:
        with tarfile.open(source / "0.tar", "w") as tar:
            for name, one in zip(files, data, strict=True):
                header = tarfile.TarInfo(name)
                header.size = len(one)
                tar.addfile(header, io.BytesIO(one))
    size = ("--set", "embed.embedder.image_size=64", "--set", "embed.embedder.pooling=cls")
    command = ("--model", "vit_tiny_patch16", "--weights", weights, *size, "--layout", layout)
    done = run_command("--images", str(source), *command, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert len(matrix_of(str(tmp_path / "out" / "embed"))) == len(set(data))


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"device": "cuda"}, ["cuda", "GPU"]),
        ({"name": "vit_small_patch16"}, ["do not fit the model", "expected"]),
        ({"weights_sha256": "0" * 64}, ["SHA-256 is", "expected 000000"]),
        ({"name": "vit_tiny_patch15"}, ["embedder.name"]),
    ],
)
def test_impossible_models_give_one_message(
    change: dict[str, str], messages: list[str], weights: str, folder: str, tmp_path: Path
) -> None:
    if "device" in change and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = {"weights": weights, "image_size": "64", "pooling": "cls"} | change
    model = settings.pop("name", "vit_tiny_patch16")
    overrides = [text for key, value in settings.items() for text in ("--set", f'embed.embedder.{key}="{value}"')]
    overrides = [text.replace('"64"', "64") for text in overrides]
    output = tmp_path / "out"
    done = refused("--images", folder, "--model", model, *overrides, "--output", str(output))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    assert all(text in message for text in messages), message
    assert not (output / "embed" / "manifest.json").exists()


def other_weights(weights: str, path: Path) -> str:
    """A file at `path` with weights of the same shapes as `weights`, and other values."""
    state = torch.load(weights, weights_only=True)
    torch.save({name: value + 0.1 for name, value in state.items()}, path)
    return str(path)


def test_other_weights_at_the_same_path_are_noticed(weights: str, images: str, tmp_path: Path) -> None:
    """A resumed stage would otherwise hold vectors of two models, and a finished one those of the old one."""
    path, output = tmp_path / "model.pth", str(tmp_path / "out")
    path.write_bytes(Path(weights).read_bytes())
    settings = config(str(path))
    manifest = embed.run(settings, RunFolder(ingest=images), output, InlineRunner())
    assert manifest.plan.inputs["weights"] == hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    other_weights(weights, path)
    for unfinished in (False, True):
        if unfinished:  # as after a kill: the plan and no manifest
            plan = paths.read_bytes(f"{output}/manifest.json").split(b'"plan":')[1].split(b',\n "totals"')[0]
            paths.write_bytes(f"{output}/.progress/plan.json", plan)
            paths.delete(f"{output}/manifest.json")
        with pytest.raises(OutputMismatchError, match=r"inputs\.weights: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now"):
            embed.run(settings, RunFolder(ingest=images), output, InlineRunner())
    again = embed.run(settings, RunFolder(ingest=images), output, InlineRunner(), replace=True)
    assert again.content_hash != manifest.content_hash


def test_a_worker_refuses_weights_that_changed_after_the_driver_read_them(
    weights: str, images: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(Path(weights).read_bytes())

    class ReplacingRunner(InlineRunner):
        """Replaces the weights between the driver's reading and the workers'."""

        def map(self, *arguments: Any, **options: Any) -> Any:
            other_weights(weights, path)
            return super().map(*arguments, **options)

    with pytest.raises(WeightsError, match="SHA-256 is"):
        embed.run(config(str(path)), RunFolder(ingest=images), str(tmp_path / "out"), ReplacingRunner())


def test_a_stated_hash_is_the_input_and_the_workers_check_it(weights: str, images: str, tmp_path: Path) -> None:
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    settings = config(weights, weights_sha256=digest.upper())
    manifest = embed.run(settings, RunFolder(ingest=images), str(tmp_path / "out"), InlineRunner())
    assert manifest.plan.inputs["weights"] == digest


def test_truncated_checkpoint_gives_one_message(weights: str, folder: str, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(Path(weights).read_bytes()[:-1000])
    done = refused(
        *("--images", folder, "--model", "vit_tiny_patch16", "--weights", str(cut)),
        *("--set", "embed.embedder.pooling=cls", "--output", str(tmp_path / "out")),
    )
    assert (
        done.returncode == 2 and "cut.pth: cannot be read as weights" in done.stderr and "Traceback" not in done.stderr
    )


def test_neither_and_both_of_config_and_model_are_refused(folder: str, tmp_path: Path) -> None:
    with_config = (("--model", "vit_tiny_patch16"), ("--weights", "a.pth"), ("--layout", "parquet"))
    for options in ((), *(("--config", "a.toml", *option) for option in with_config)):
        done = refused("--images", folder, *options, "--output", str(tmp_path / "out"))
        assert done.returncode == 2 and "Give either --config alone, or --model" in done.stderr


def test_changed_source_is_an_error(weights: str, folder: str, images: str, tmp_path: Path) -> None:
    copied = tmp_path / "pictures"
    copied.mkdir()
    for name in os.listdir(folder):
        (copied / name).write_bytes(Path(folder, name).read_bytes())
    source = SourceConfig(name="pictures", path=str(copied), role="pool")
    ingest.run(IngestConfig(sources=(source,)), str(tmp_path / "ingest"), InlineRunner())
    (copied / "05.jpg").write_bytes(Path(folder, "07.jpg").read_bytes())
    with pytest.raises(Exception, match=r"05\.jpg.*no longer those of image"):
        embed.run(config(weights), RunFolder(ingest=str(tmp_path / "ingest")), str(tmp_path / "out"), InlineRunner())
    assert read_manifest(str(tmp_path / "out")) is None


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_vectors(weights: str) -> None:
    """A batch that is not full is padded; the vectors do not depend on the number of pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 64, 64), dtype=np.uint8)
    plain, compiled = (embed.load_embedder(config(weights, compile=flag).embedder) for flag in (False, True))
    np.testing.assert_allclose(compiled.embed(pixels), plain.embed(pixels), atol=1e-5)
    np.testing.assert_allclose(compiled.embed(pixels[:1]), plain.embed(pixels[:1]), atol=1e-5)
