"""One pass for embed and describe: the bytes of two passes, after any kill, and only where it serves both."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation import embed, ingest
from curation.config import parse
from curation.embed import EmbedConfig, one_pass_serves
from curation.engine import manifest, run_log
from curation.engine.manifest import read_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.run_log import ShardLine, open_log, read_lines
from curation.engine.runner import InlineRunner, Runner
from curation.errors import OutputMismatchError, ShardError
from curation.files import parquet, paths
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig
from curation.run_folder import RunFolder
from pipelines import status
from tests.curation.builders import bytes_in

NUM_SHARDS = 2


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished ingest of eleven images in two shards."""
    root = tmp_path_factory.mktemp("run")
    (root / "pictures").mkdir()
    for number in range(11):
        coarse = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        size = (90 + number, 60)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(root / "pictures" / f"{number}.jpg")
    source = SourceConfig(name="pictures", path=str(root / "pictures"), role="pool")
    ingest.run(IngestConfig(sources=(source,), images_per_shard=6), str(root / "ingest"), InlineRunner())
    return str(root / "ingest")


def config(pooling: str, *, thumbnail_side: int = 0, decode_threads: int = 2, **options: Any) -> EmbedConfig:
    embedder = {"name": "efficientnet_lite0", "pooling": pooling, "image_size": 64} | options
    values = {"embedder": embedder, "thumbnail_side": thumbnail_side, "decode_threads": decode_threads}
    return parse(EmbedConfig, values, origin="test")


EMBED, DESCRIBE = config("gem_and_bottleneck"), config("gem", thumbnail_side=48)


def folder_of(images: str, output: Path) -> RunFolder:
    return RunFolder(ingest=images, embed=str(output / "embed"), describe=str(output / "describe"))


def run_both(
    images: str,
    output: Path,
    runner: Runner | None = None,
    *,
    first: EmbedConfig = EMBED,
    second: EmbedConfig = DESCRIBE,
    **options: Any,
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of both stages, run as the main path runs them."""
    folder, chosen = folder_of(images, output), runner or InlineRunner()
    embed.run(first, folder, folder.embed, chosen, describe=second, **options)
    embed.run(second, folder, folder.describe, chosen, name="describe", **options)
    return bytes_in(folder.embed), bytes_in(folder.describe)


@pytest.fixture(scope="module")
def alone(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of both stages, each in a pass of its own."""
    folder = folder_of(images, tmp_path_factory.mktemp("alone"))
    embed.run(DESCRIBE, folder, folder.describe, InlineRunner(), name="describe")
    embed.run(EMBED, folder, folder.embed, InlineRunner())
    return bytes_in(folder.embed), bytes_in(folder.describe)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """The poolings of each network that a worker of this process loads."""
    calls: list[tuple[str, tuple[str, ...]]] = []
    load = embed.load_embedder

    def counting(config: Any, other_poolings: Any = ()) -> Any:
        calls.append((config.pooling, tuple(other_poolings)))
        return load(config, other_poolings)

    monkeypatch.setattr(embed, "load_embedder", counting)
    return calls


def test_one_pass_gives_the_bytes_of_two(
    images: str, alone: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path, loaded: list[Any]
) -> None:
    assert run_both(images, tmp_path) == alone
    assert loaded == [("gem_and_bottleneck", ("gem",))], "one network, loaded once"
    assert len(alone[1]) == 2 * NUM_SHARDS + 1
    assert run_both(images, tmp_path) == alone and len(loaded) == 1, "a second run does nothing"


def test_ray_workers_make_the_same_bytes_in_one_pass(
    images: str, alone: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path, ray_runner: RayRunner
) -> None:
    assert run_both(images, tmp_path, ray_runner) == alone


class KilledError(Exception):
    pass


@contextlib.contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> Iterator[list[str]]:
    """Raise at the write with that number, before its file has its name. Yields the paths of the writes before."""
    written: list[str] = []
    with monkeypatch.context() as patch:

        def killed(original: Any) -> Any:
            def write(path: str, *arguments: Any) -> Any:
                if len(written) == moment:
                    raise KilledError
                written.append(path)
                return original(path, *arguments)

            return write

        patch.setattr(parquet, "write_table", killed(parquet.write_table))
        patch.setattr(manifest, "write_bytes", killed(manifest.write_bytes))
        yield written


def test_a_kill_before_any_write_loses_nothing(
    images: str, alone: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(monkeypatch, -1) as writes:
        run_both(images, tmp_path / "whole")
    assert sum("describe/vectors-" in path for path in writes) == NUM_SHARDS, "each file is written once"
    for moment in range(len(writes)):
        output = tmp_path / str(moment)
        with killed_at(monkeypatch, moment), pytest.raises((KilledError, ShardError)):
            run_both(images, output)
        assert run_both(images, output) == alone, writes[moment]


def test_a_ready_shard_is_taken_by_describe_alone_unless_it_is_damaged(
    images: str, alone: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path, loaded: list[Any]
) -> None:
    folder = folder_of(images, tmp_path)
    embed.run(EMBED, folder, folder.embed, InlineRunner(), describe=DESCRIBE)
    assert read_manifest(folder.describe) is None, "no shard of describe is done before describe takes it"
    assert manifest.done_shards(folder.describe) == set()
    (tmp_path / "describe" / "vectors-00001.parquet").write_bytes(b"cut")
    embed.run(DESCRIBE, folder, folder.describe, InlineRunner(), name="describe")
    assert loaded == [("gem_and_bottleneck", ("gem",)), ("gem", ())]
    assert (bytes_in(folder.embed), bytes_in(folder.describe)) == alone


@pytest.mark.parametrize("finished", ["embed", "describe"])
def test_only_the_unfinished_stage_is_computed(
    finished: str,
    images: str,
    alone: tuple[dict[str, bytes], dict[str, bytes]],
    tmp_path: Path,
    loaded: list[Any],
) -> None:
    folder = folder_of(images, tmp_path)
    if finished == "embed":
        embed.run(EMBED, folder, folder.embed, InlineRunner())
    else:
        embed.run(DESCRIBE, folder, folder.describe, InlineRunner(), name="describe")
    loaded.clear()
    assert run_both(images, tmp_path) == alone
    assert loaded == [("gem", ()) if finished == "embed" else ("gem_and_bottleneck", ())]


def test_replace_redoes_the_changed_stage_only(
    images: str, alone: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path, loaded: list[Any]
) -> None:
    run_both(images, tmp_path, second=config("average"))
    with pytest.raises(OutputMismatchError, match="pooling"):
        run_both(images, tmp_path)
    loaded.clear()
    assert run_both(images, tmp_path, replace=True) == alone
    assert loaded == [("gem", ())]
    folder = folder_of(images, tmp_path / "other")
    embed.run(config("average"), folder, folder.embed, InlineRunner())
    with pytest.raises(OutputMismatchError, match="pooling"):
        run_both(images, tmp_path / "other")
    assert not paths.exists(folder.describe), "a refused run begins no stage"
    embed.run(DESCRIBE, folder, folder.describe, InlineRunner(), name="describe")
    loaded.clear()
    assert run_both(images, tmp_path / "other", replace=True) == alone
    assert loaded == [("gem_and_bottleneck", ())]
    run_both(images, tmp_path / "two", first=config("average"), second=config("average"))
    loaded.clear()
    assert run_both(images, tmp_path / "two", replace=True) == alone
    assert loaded == [("gem_and_bottleneck", ("gem",))], "both have changed, so one pass makes both anew"


@pytest.mark.parametrize(
    ("second", "serves"),
    [
        ({}, True),
        ({"pooling": "gem_and_bottleneck"}, True),
        ({"decode_threads": 7}, True),
        ({"thumbnail_side": 64}, True),
        ({"thumbnail_side": 65}, False),  # the decoder gives a larger picture
        ({"image_size": 96}, False),
        ({"resize": "center_crop"}, False),
        ({"batch_size": 5}, False),
        ({"precision": "bfloat16"}, False),
        ({"weights": "other.pth"}, False),
        ({"name": "sscd_disc_mixup", "weights": "sscd.pt"}, False),
    ],
)
def test_one_pass_serves_stages_that_differ_in_pooling_and_thumbnails(second: dict[str, Any], serves: bool) -> None:
    other = config(**({"pooling": "gem"} | second))
    assert one_pass_serves(EMBED, other) == one_pass_serves(other, EMBED) == serves
    compiled = config("gem_and_bottleneck", compile=True)
    assert not one_pass_serves(compiled, compiled)


def test_other_networks_are_run_one_after_the_other(images: str, tmp_path: Path, loaded: list[Any]) -> None:
    folder = folder_of(images, tmp_path)
    run_both(images, tmp_path, second=config("gem", batch_size=3))
    assert loaded == [("gem_and_bottleneck", ()), ("gem", ())]
    embed.run(config("gem", batch_size=3), folder, str(tmp_path / "again"), InlineRunner(), name="describe")
    assert bytes_in(folder.describe) == bytes_in(str(tmp_path / "again"))


def test_the_log_and_the_status_show_ready_shards(images: str, tmp_path: Path) -> None:
    folder = folder_of(images, tmp_path)
    (tmp_path / "run.toml").touch()
    with open_log(str(tmp_path)) as log:
        embed.run(EMBED, folder, folder.embed, InlineRunner(), describe=DESCRIBE, log=log)
        before = {stage.name: stage for stage in status.read(str(tmp_path)).stages}["describe"]
        assert (before.num_shards, before.done) == (NUM_SHARDS, NUM_SHARDS)
        embed.run(DESCRIBE, folder, folder.describe, InlineRunner(), name="describe", log=log)
    lines = [line for line in read_lines(str(tmp_path)) if isinstance(line, ShardLine)]
    assert [(line.stage, line.ready) for line in lines] == [("embed", False)] * 2 + [("describe", True)] * 2
    assert sum(line.items for line in lines if line.ready) == 11 and not any(line.seconds for line in lines[2:])
    assert not paths.exists(paths.join(folder.describe, manifest.PROGRESS_NAME))
    times = run_log.times(str(tmp_path))
    assert (times["embed"].ready, times["describe"].ready, times["describe"].items) == (0, NUM_SHARDS, 11)
    rates = list(status.times_table(times).columns[4].cells)
    assert rates[1] == "-" and float(str(rates[0]).replace(",", "")) > 0
