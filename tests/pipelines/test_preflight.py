"""All problems that would stop a run later are in one message, before any work."""

from pathlib import Path

import pytest

from curation.errors import ConfigError
from pipelines.own_images import make_config
from pipelines.preflight import require_runnable
from tests.curation.builders import encoded_image


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("seeds", "pool"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").write_bytes(encoded_image(number))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def problems(*overrides: str, output: str = "out") -> list[str]:
    config = make_config(seeds="seeds", pool="pool", overrides=overrides)
    try:
        require_runnable(config, output, config_path=None, replace=False)
    except ConfigError as error:
        first, *others = str(error).splitlines()
        return others or [first]
    return []


def test_a_run_that_can_end_has_no_problem(home: Path) -> None:
    assert problems() == []
    assert problems("cluster.levels=[{num_clusters = 3}]") == []


def test_all_problems_come_at_once(home: Path) -> None:
    (home / "file").write_text("no folder")
    lines = problems(
        "embed.embedder.weights=nowhere.pth",
        "describe.embedder.device=cuda",
        "report.concepts=none.toml",
        "cluster.levels=[{num_clusters = 4}]",
        output="file",
    )
    for part in (
        "'file' is a file. Give a folder with --output.",
        f"there are no weights at '{home}/nowhere.pth'",
        "describe.embedder.device is 'cuda', but torch",
        f"report.concepts: no file at '{home}/none.toml'",
        "cluster.levels.0.num_clusters is 4, but the pool holds 3 images",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == 5


def test_sources_without_files_are_all_named(home: Path) -> None:
    (home / "empty").mkdir()
    config = make_config(seeds={"a": "seeds", "b": "empty"}, pool={"c": "pool"}, holdout={"d": "empty"})
    (home / "pool").rename(home / "gone")
    with pytest.raises(ConfigError, match=r"source 'c': there is nothing at"):
        require_runnable(config, "out", config_path=None, replace=False)
    (home / "gone").rename(home / "pool")
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*source 'b': no images.*source 'd': no images"):
        require_runnable(config, "out", config_path=None, replace=False)


def test_a_disk_that_is_too_small_is_named(home: Path) -> None:
    images_of_the_pool = "stated_counts={pool = 100_000_000_000_000}"
    (line,) = problems(images_of_the_pool)
    assert "GB free, and the run writes about" in line


def test_a_stage_folder_above_an_input_is_refused(home: Path) -> None:
    assert any("lies below --output 'run/corpus'" in line for line in _problems_of_nested(home))


def _problems_of_nested(home: Path) -> list[str]:
    (home / "run/corpus").mkdir(parents=True)
    (home / "pool").rename(home / "run/corpus/pool")
    config = make_config(seeds="seeds", pool="run/corpus/pool")
    with pytest.raises(ConfigError) as caught:
        require_runnable(config, "run", config_path=None, replace=False)
    return str(caught.value).splitlines()
