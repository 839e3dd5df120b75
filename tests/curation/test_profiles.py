"""Profiles: they fill in missing settings and override none, and a saved config does not need them."""

from pathlib import Path
from typing import Any, get_args

import pytest

from curation import config, profiles
from curation.config import resolved_toml
from curation.dedup import DedupConfig
from curation.errors import ConfigError
from curation.files import paths
from curation.pack import PackConfig
from curation.profiles import PROFILES
from curation.retrieve import RetrieveConfig
from pipelines import init
from pipelines.main_path import CurateConfig

MINIMAL: dict[str, Any] = {
    "ingest": {
        "sources": [
            {"name": n, "role": r, "path": f"/data/{n}"} for n, r in (("a", "seed"), ("b", "seed"), ("p", "pool"))
        ]
    },
    "embed": {"embedder": {"name": "efficientnet_lite0", "pooling": "gem"}},
    "describe": {"embedder": {"name": "efficientnet_lite0", "pooling": "copies"}, "thumbnail_side": 128},
    "pairs": {"verification": {}},
    "cluster": {},
    "retrieve": {"datasets": [{"name": "a"}, {"name": "b", "k": 32, "cap": 7}]},
}


def parse(*overrides: str, **values: Any) -> CurateConfig:
    return config.parse(CurateConfig, MINIMAL | values, overrides, origin="run.toml")


def value_of(settings: Any, path: list[str]) -> list[Any]:
    """The values at a path of PROFILES; `*` goes through all items."""
    for index, name in enumerate(path):
        if name == "*":
            return [value for item in settings for value in value_of(item, path[index + 1 :])]
        settings = getattr(settings, name)
    return [settings]


@pytest.mark.parametrize("profile", get_args(profiles.Profile))
def test_every_setting_of_a_profile_is_filled_in(profile: profiles.Profile) -> None:
    settings = parse(profile=profile, cluster={"levels": [{"num_clusters": 100_000}]})
    assert settings.profile == profile
    for setting, value in PROFILES[profile].items():
        (first, *_) = value_of(settings, setting.split("."))
        if setting == "cluster.levels":
            first, value = [level.num_clusters for level in first], [level["num_clusters"] for level in value]
        assert first == value, setting


def test_profiles_have_their_documented_values() -> None:
    paper, photos = parse(profile="paper"), parse(cluster={"levels": [{"num_clusters": 3}]})
    assert (paper.pack.repeats, paper.dedup.decontamination, paper.dedup.matches_kept) == (True, "component", False)
    assert (paper.dedup.threshold, paper.dedup.holdout_threshold, paper.pairs.num_neighbors) == (0.6, 0.45, 64)
    assert (paper.cluster.levels[0].num_clusters, paper.retrieve.more_than_seeds) == (100_000, 3)
    assert (paper.retrieve.images_per_cluster, paper.dedup.decontaminate_seeds) == (10_000, False)
    assert [dataset.cap for dataset in paper.retrieve.datasets] == [1_000_000, 7]
    assert photos.profile == "photos"
    assert (photos.pack.repeats, photos.dedup.decontamination, photos.dedup.matches_kept) == (False, "direct", True)
    drawings, exact = parse(profile="drawings"), parse(profile="exact")
    assert drawings.dedup.families is not None and drawings.dedup.threshold == 0.67
    assert (exact.pairs.num_neighbors, exact.pairs.max_phash_distance) == (0, -1)


def test_settings_of_the_config_are_not_overridden() -> None:
    settings = parse(
        "pack.repeats=false",
        profile="paper",
        dedup={"threshold": 0.8, "matches_kept": True},
        cluster={"levels": [{"num_clusters": 5}]},
        pairs={"num_neighbors": 8, "verification": {}},
    )
    dedup = settings.dedup
    assert not settings.pack.repeats and settings.pairs.num_neighbors == 8
    assert settings.cluster.levels[0].num_clusters == 5
    assert (dedup.threshold, dedup.matches_kept, dedup.decontamination) == (0.8, True, "component")
    assert [(d.k, d.cap) for d in settings.retrieve.datasets] == [(4, 1_000_000), (32, 7)]
    complete = DedupConfig(threshold=0.9)  # a section given as settings, not as values, is complete
    assert CurateConfig.model_validate({**settings.model_dump(), "dedup": complete}, strict=False).dedup == complete


def test_a_profile_can_be_set_on_the_command_line() -> None:
    assert parse("profile=paper").pack.repeats
    assert parse("profile=paper", "pack.repeats=false") == parse("pack.repeats=false", profile="paper")


@pytest.mark.parametrize("profile", get_args(profiles.Profile))
def test_saved_config_reads_back_equal_and_needs_no_profile(tmp_path: Path, profile: str) -> None:
    settings = parse(profile=profile, cluster={"levels": [{"num_clusters": 9}]})
    path = str(tmp_path / "run.toml")
    paths.write_bytes(path, resolved_toml(settings).encode())
    assert paths.read_bytes(path).startswith(f'profile = "{profile}"\n'.encode())
    assert config.load(CurateConfig, path) == settings
    other: profiles.Profile = "photos" if profile == "paper" else "paper"
    changed = config.load(CurateConfig, path, [f"profile={other}"])
    assert changed == settings.model_copy(update={"profile": other})


@pytest.mark.parametrize("profile", get_args(profiles.Profile))
def test_a_single_stage_reads_the_same_settings_as_the_pipeline(tmp_path: Path, profile: str) -> None:
    path = str(tmp_path / "run.toml")
    text = f'profile = "{profile}"\n[dedup]\nthreshold = 0.7\n[pack]\n[retrieve]\n[[retrieve.datasets]]\nname = "a"\n'
    paths.write_bytes(path, text.encode())
    whole = parse(
        profile=profile,
        cluster={"levels": [{"num_clusters": 1}]},
        dedup={"threshold": 0.7},
        retrieve={"datasets": [{"name": "a"}]},
    )
    assert config.load(DedupConfig, path, section="dedup") == whole.dedup
    assert config.load(PackConfig, path, section="pack") == whole.pack
    assert config.load(RetrieveConfig, path, section="retrieve") == whole.retrieve


SOURCES = {"ingest": MINIMAL["ingest"]}


@pytest.mark.parametrize("profile", get_args(profiles.Profile))
def test_a_config_needs_only_its_sources(profile: profiles.Profile) -> None:
    settings = config.parse(CurateConfig, SOURCES, [f"profile={profile}"], origin="run.toml")
    datasets = settings.retrieve.datasets
    assert [dataset.name for dataset in datasets] == ["a", "b"]
    as_is = profile != "paper"
    assert all(d.as_is == as_is and d.k == 4 and d.retrieval == ("sample" if as_is else "by_size") for d in datasets)
    copies = "copies" if profile in ("photos", "drawings") else "gem"
    assert (settings.embed.embedder.pooling, settings.describe.embedder.pooling) == ("gem_and_bottleneck", copies)
    assert settings.cluster.levels[0].num_clusters == (None if as_is else 100_000)
    assert (settings.pairs.verification is not None) == (profile in ("photos", "drawings"))
    assert config.parse(CurateConfig, {"profile": profile} | SOURCES, origin="run.toml") == settings


def test_the_photos_have_their_documented_values() -> None:
    settings = config.parse(CurateConfig, {"profile": "photos"} | SOURCES, origin="run.toml")
    assert (settings.dedup.threshold, settings.dedup.holdout_threshold, settings.dedup.families) == (0.5, 0.45, None)
    assert settings.pairs.verification is not None and settings.pairs.verification.domain == "photographs"
    pairs = settings.pairs
    assert (settings.describe.thumbnail_side, pairs.min_descriptor_similarity, pairs.num_neighbors) == (128, 0.2, 16)


@pytest.mark.parametrize("profile", ["photos", "drawings"])
@pytest.mark.parametrize(
    "embedder",
    [{"pooling": "gem"}, {"name": "sscd_disc_mixup", "weights": "/sscd.pt"}],
    ids=["another pooling", "another model"],
)
def test_other_descriptors_keep_their_floor(profile: str, embedder: dict[str, str]) -> None:
    values = {"profile": profile, "describe": {"embedder": embedder}} | SOURCES
    pairs = config.parse(CurateConfig, values, origin="run.toml").pairs
    assert (pairs.min_descriptor_similarity, pairs.num_neighbors) == (0.66, 64)
    stated = values | {"pairs": {"min_descriptor_similarity": 0.5}}
    assert config.parse(CurateConfig, stated, origin="run.toml").pairs.min_descriptor_similarity == 0.5


def test_the_pooling_suits_the_stage_and_the_model() -> None:
    model = {"name": "vit_small_patch14", "weights": "/w.pth"}
    values = SOURCES | {"embed": {"embedder": model}, "describe": {"embedder": {"device": "cuda"}}}
    settings = config.parse(CurateConfig, values, origin="run.toml")
    assert (settings.embed.embedder.name, settings.embed.embedder.pooling) == ("vit_small_patch14", "cls")
    describe = settings.describe.embedder
    assert (describe.name, describe.pooling, describe.device) == ("efficientnet_lite0", "copies", "cuda")


def test_clustering_alone_needs_no_dataset() -> None:
    settings = config.parse(CurateConfig, SOURCES | {"retrieve": {"clustering": {"num_images": 3}}}, origin="run.toml")
    assert settings.retrieve.datasets == ()


def test_a_stage_alone_reads_a_config_with_only_sources(tmp_path: Path) -> None:
    path = str(tmp_path / "mine.toml")
    whole = config.parse(CurateConfig, {"profile": "photos"} | SOURCES, origin=path)
    paths.write_bytes(
        path,
        b'profile = "photos"\n'
        + b"".join(
            f'[[ingest.sources]]\nname = "{name}"\nrole = "{role}"\npath = "/data/{name}"\n'.encode()
            for name, role in (("a", "seed"), ("b", "seed"), ("p", "pool"))
        ),
    )
    assert config.load(CurateConfig, path) == whole
    assert config.load(DedupConfig, path, section="dedup") == whole.dedup
    assert config.load(RetrieveConfig, path, section="retrieve") == whole.retrieve


def test_the_callers_values_are_not_changed() -> None:
    before = repr(MINIMAL)
    parse(profile="paper")
    assert repr(MINIMAL) == before
    once = profiles.fill(MINIMAL | {"profile": "paper"})
    assert profiles.fill(once) == once


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"profile": "papr"},
            "'profile': Input should be 'photos', 'drawings', 'paper' or 'exact' (did you mean 'paper'?). "
            "Found: 'papr'",
        ),
        ({"profile": ["paper"]}, "'profile': Input should be 'photos', 'drawings', 'paper' or 'exact'"),
        ({"profile": "default"}, "'profile': the profile 'default' was removed. Take 'photos'"),
        ({"profile": "paper", "dedup": 3}, "'dedup': "),
        ({"profile": "paper", "retrieve": {"datasets": 3}}, "'retrieve.datasets': "),
        ({"profile": "paper", "retrieve": {"datasets": [3]}}, "'retrieve.datasets.0': "),
        ({"profile": "paper", "retrieve": {"datasets": []}}, "retrieve names no dataset and has no section clustering"),
        (
            {"profile": "paper", "pairs": {"num_neighbours": 3}},
            "Unknown key: 'pairs.num_neighbours' (did you mean 'num_neighbors'?). Found: 3",
        ),
        ({"profile": "paper", "stated_clusters": {"c": 3}}, "stated_clusters names 'c', which is no dataset"),
    ],
)
def test_messages_on_mistakes_are_the_same_as_without_profiles(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**values)
    assert message in str(caught.value)


def test_documentation_and_template_name_the_thresholds_of_the_profiles() -> None:
    docs = Path(__file__).parents[2] / "docs"
    recipes, own_images = ((docs / f"{name}.md").read_text() for name in ("recipes", "own-images"))
    rows = {line.split(" | ")[0]: line.split(" | ")[1:3] for line in recipes.splitlines() if line.startswith("| ")}
    photos, drawings = PROFILES["photos"], PROFILES["drawings"]
    for cell, settings in zip(rows["| copies"], (photos, drawings), strict=True):
        assert f", from {settings['dedup.threshold']:g};" in cell
    for cell, settings in zip(rows["| holdout"], (photos, drawings), strict=True):
        assert cell.endswith(f", from {settings['dedup.holdout_threshold']:g}")
    for cell, settings in zip(
        rows["| candidates: nearest descriptors of an image, from a cosine"], (photos, drawings), strict=True
    ):
        assert cell == f"{settings['pairs.num_neighbors']}, from {settings['pairs.min_descriptor_similarity']:g}"
    words = " ".join(own_images.split())
    assert f"From {photos['dedup.threshold']:g} on an image is a copy" in words
    assert f"from {photos['dedup.holdout_threshold']:g} on it matches the holdout" in words
    assert f"# threshold = {photos['dedup.threshold']:g} " in init.CONFIG
    assert f"# holdout_threshold = {photos['dedup.holdout_threshold']:g} " in init.CONFIG
