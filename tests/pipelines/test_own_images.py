"""The config that the paths of a user's images give, and the messages on paths that give none."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.config import load, resolved_toml
from curation.errors import ConfigError
from pipelines.main_path import CurateConfig
from pipelines.own_images import make_config
from tests.curation.builders import encoded_image
from tests.curation.images.tars import member, tar_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of all layouts in the current folder."""
    image = encoded_image(0)
    tar = tar_of([member("a.png", image)])
    for name, data in {
        "lesions/a.png": image,
        "crawl/0.tar": tar,
        "crawl/0.parquet": b"no table: the captions that img2dataset writes beside its tars",
        "crawl/0_stats.json": b"{}",
        "mixed/a.png": image,
        "mixed/b.tar": tar,
        "empty/notes.txt": b"x",
        "one.tar": tar,
        "photo.jpg": image,
        "sub/lesions/b.png": image,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for name, columns in {
        "tables/x.parquet": {"image": [{"bytes": image, "path": "a"}], "label": [1]},
        "plain/x.parquet": {"jpg": [image], "text": ["a"]},
        "unclear/x.parquet": {"jpg": [image], "thumbnail": [image]},
        "no_bytes/x.parquet": {"text": ["a"]},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sources_of(**given: Any) -> list[tuple[str, str, str, str]]:
    config = make_config(**{"seeds": "lesions", "pool": "crawl"} | given)
    return [(source.name, source.role, source.layout, source.path) for source in config.ingest.sources]


def test_sources_get_names_roles_layouts_and_absolute_paths(home: Path) -> None:
    assert sources_of(
        seeds=["cancer=lesions", "sub/lesions"], pool={"web": "crawl", "old": "one.tar"}, holdout="tables"
    ) == [
        ("cancer", "seed", "folder", f"{home}/lesions"),
        ("lesions", "seed", "folder", f"{home}/sub/lesions"),
        ("web", "pool", "webdataset", f"{home}/crawl"),
        ("old", "pool", "webdataset", f"{home}/one.tar"),
        ("tables", "holdout", "parquet", f"{home}/tables"),
    ]
    assert sources_of(pool=["one.tar", "plain"])[1:] == [
        ("one", "pool", "webdataset", f"{home}/one.tar"),
        ("plain", "pool", "parquet", f"{home}/plain"),
    ]


def test_the_column_of_a_parquet_file_is_seen(home: Path) -> None:
    columns = [make_config(seeds="lesions", pool=pool).ingest.sources[1].image_column for pool in ("tables", "plain")]
    assert columns == ["image.bytes", "jpg"]


def test_options_reach_the_config_and_it_reads_back_equal(home: Path) -> None:
    config = make_config(
        seeds="lesions",
        pool="crawl",
        k=7,
        model="vit_small_patch14",
        weights="lesions/a.png",
        overrides=["dedup.threshold=0.6", "describe.embedder.device=cuda"],
    )
    assert config.profile == "photos" and config.dedup.threshold == 0.6
    (dataset,) = config.retrieve.datasets
    assert (dataset.name, dataset.as_is, dataset.retrieval, dataset.k) == ("lesions", True, "sample", 7)
    embedder = config.embed.embedder
    assert (embedder.name, embedder.weights, embedder.pooling) == ("vit_small_patch14", f"{home}/lesions/a.png", "cls")
    assert (config.describe.embedder.device, config.describe.embedder.pooling) == ("cuda", "copies")
    Path("out").mkdir()
    Path("out/run.toml").write_text(resolved_toml(config))
    assert load(CurateConfig, "out/run.toml") == config


PROBLEMS = [
    ({"pool": ()}, "no pool is given"),
    ({"pool": None}, "no pool is given"),
    ({"pool": ""}, "A source is the path of a folder or a file, as text. Found: ''"),
    ({"pool": "web="}, "A source is the path of a folder or a file, as text. Found: ''"),
    ({"pool": {"web": None}}, "A source is the path of a folder or a file, as text. Found: None"),
    ({"pool": [1]}, "A source is the path of a folder or a file, as text. Found: 1"),
    ({"seeds": []}, "no seed is given"),
    ({"pool": "nowhere"}, "pool 'nowhere': there is nothing at 'nowhere'"),
    ({"pool": "x=nowhere"}, "pool 'x': there is nothing at 'nowhere'"),
    ({"pool": "photo.jpg"}, "'photo.jpg' is a file. Give a folder of images, a .tar or a .parquet file."),
    ({"pool": "mixed"}, "'mixed' holds 1 image files, 1 tars, and one source is stored in one way"),
    ({"pool": "unclear"}, "unclear/x.parquet' has 2 columns of bytes (jpg, thumbnail)"),
    ({"pool": "no_bytes"}, "no_bytes/x.parquet' has 0 columns of bytes (none)"),
    ({"pool": ["lesions", "sub/lesions"]}, "Two sources have the name 'lesions': 'lesions' and 'sub/lesions'"),
    (
        {"pool": "sub/lesions"},
        "2 sources have the name 'lesions': lesions, sub/lesions. Give each a name",
    ),
    ({"profile": "photo"}, "did you mean 'photos'?"),
    ({"model": "vit_small_patch14"}, "vit_small_patch14 needs weights"),
    ({"k": 0}, "'retrieve.datasets.0.k'"),
]


@pytest.mark.parametrize(("given", "message"), PROBLEMS)
def test_a_problem_is_named(home: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sources_of(**given)
    assert message in str(caught.value)


def test_all_problems_of_the_paths_come_at_once(home: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sources_of(seeds="nowhere", pool=["mixed", "photo.jpg"], holdout="unclear")
    assert len(str(caught.value).splitlines()) == 4


def test_a_folder_without_images_is_left_to_the_listing(home: Path) -> None:
    assert sources_of(pool="empty")[1] == ("empty", "pool", "folder", f"{home}/empty")


def test_a_broken_parquet_file_is_named(home: Path) -> None:
    Path("plain/a.parquet").write_bytes(io.BytesIO(b"PAR1 broken").getvalue())
    with pytest.raises(ConfigError, match=r"plain/a\.parquet' is no readable Parquet file"):
        sources_of(pool="plain")
