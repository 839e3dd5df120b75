"""The plan that --plan prints: the arithmetic of docs/scaling.md, counts of local files, and rates with sources."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from curation.config import load, parse
from curation.copies.photographs import FEATURES
from curation.errors import InputError
from curation.report.self_check import IMAGES_PER_COPY, SelfCheckConfig
from curation.run_folder import STAGES
from pipelines.main_path import CurateConfig
from pipelines.planning.machine import Machine, this_machine
from pipelines.planning.plan import print_plan, total_rows
from pipelines.planning.price import (
    Counts,
    Price,
    StagePrice,
    count_sources,
    decode_seconds,
    num_candidates,
    num_checked_pairs,
    price_run,
)
from pipelines.planning.rates import FIXED, FixedRates, RatesConfig
from tests.curation.builders import encoded_image
from tests.curation.images.tars import member, tar_of

LVD = Path(__file__).parents[3] / "pipelines/configs/lvd142m.toml"
LARGE = Machine(cores=128, gpus=8, bytes_per_second=2e9)
SMALL = Machine(cores=2, gpus=0, bytes_per_second=2e9)


def lvd_price(*overrides: str) -> tuple[Price, Counts]:
    config = load(CurateConfig, str(LVD), overrides)
    counts = count_sources(config)
    return price_run(config, counts, total_rows(config)), counts


def test_price_of_lvd142m_agrees_with_the_scaling_document() -> None:
    price, counts = lvd_price()
    stages = {stage.stage: stage for stage in price.stages}
    assert sum(counts.of_source.values()) == stages["ingest"].images > 1.3e9
    assert counts.unknown == ("evaluation_sets",)
    assert stages["corpus"].images == 142_109_386
    assert stages["corpus"].shards == 14_211
    hours = {name: stage.gpu_seconds / 3600 for name, stage in stages.items()}
    for name, documented in (("embed", 615), ("describe", 121), ("retrieve", 30)):
        assert hours[name] == pytest.approx(documented, rel=0.03)
    assert stages["embed"].reads == pytest.approx(130e12, rel=0.02)
    assert stages["pairs"].driver_bytes == pytest.approx(130e9 + 64e9 / 1.3, rel=0.05)  # cells of 1,300
    assert stages["retrieve"].worker_bytes == pytest.approx(26e9, rel=0.01)
    assert stages["cluster"].worker_bytes == pytest.approx(1.6e9, rel=0.05)


def test_machines_are_the_fewest_that_finish_in_time() -> None:
    price, _ = lvd_price()
    number = price.num_machines(LARGE, 48)
    assert price.seconds(LARGE, number) <= 48 * 3600 < price.seconds(LARGE, number - 1)
    for stage in price.stages:
        assert stage.total_seconds(LARGE, 2) <= stage.total_seconds(LARGE, 1)
    assert price.num_machines(LARGE, 1000) == 1


def test_time_grows_with_the_images() -> None:
    (once, _), (twice, _) = lvd_price(), lvd_price("stated_counts.web_pool=2_600_000_000")
    ratio = twice.stages[0].images / once.stages[0].images
    for name in ("ingest", "embed", "describe", "dedup"):
        seconds = [next(s for s in price.stages if s.stage == name).total_seconds(LARGE, 1) for price in (once, twice)]
        assert math.log(seconds[1] / seconds[0]) / math.log(ratio) == pytest.approx(1)


def test_no_more_cores_work_than_there_are_pieces() -> None:
    stage = StagePrice("pairs", 100, 0, 0, 4, core_seconds=80, num_pieces=4)
    assert [stage.total_seconds(machine) for machine in (SMALL, LARGE)] == [40, 20]


def verified_config(profile: str, images: int, **describe: Any) -> CurateConfig:
    """A config of a profile with that many pool images, as stated."""
    sources = [{"name": "pool", "role": "pool", "layout": "webdataset", "path": "s3://bucket/pool"}]
    retrieve = {"clustering": {"num_images": 5}}
    values = {"profile": profile, "ingest": {"sources": sources}, "retrieve": retrieve, "describe": describe}
    return parse(CurateConfig, values | {"stated_counts": {"pool": images}}, origin="test")


@pytest.mark.parametrize(
    ("profile", "images", "measured"),
    [("photos", 1_913, 9.0), ("drawings", 3_596, 5.2), ("photos", 13_200, 11.6), ("photos", 10**9, 11.6)],
)
def test_candidates_grow_until_the_lists_are_full(profile: str, images: int, measured: float) -> None:
    """As many an image as were measured with the copy head, where the lists have 16 and 32 neighbours."""
    assert num_candidates(verified_config(profile, images), images) / images == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("profile", "images", "looked_at", "measured"), [("drawings", 3_596, 400, 753), ("photos", 1_913, 177, 228)]
)
def test_pairs_of_the_check_are_about_as_measured(profile: str, images: int, looked_at: int, measured: int) -> None:
    config = verified_config(profile, images)
    assert 0.5 < num_checked_pairs(config, images, looked_at) / measured < 2
    everything = num_checked_pairs(config, images, images)
    assert num_candidates(config, images) <= everything <= images**2 / 2


def test_other_descriptors_have_more_candidates() -> None:
    """Measured with `gem`: 11.8 an image of 3,346, and 49 of 51,100, with lists of 64."""
    for images, measured in ((3_346, 11.8), (51_100, 49), (10**9, 49)):
        config = verified_config("drawings", images, embedder={"name": "efficientnet_lite0", "pooling": "gem"})
        assert num_candidates(config, images) / images == pytest.approx(measured, rel=0.1)
    assert num_candidates(config, 3) < 3, "no more pairs than there are"


def priced(config: CurateConfig) -> tuple[Price, dict[str, StagePrice]]:
    price = price_run(config, count_sources(config), total_rows(config))
    return price, {stage.stage: stage for stage in price.stages}


def test_features_of_photographs_are_priced_once_an_image() -> None:
    """Drawings have no such step; the files of it do not stay on the disk."""
    prices = {}
    for domain in ("photographs", "drawings"):
        config = verified_config("photos", 20_000)
        verification = config.pairs.verification
        assert verification is not None
        verification = verification.model_copy(update={"domain": domain})
        config = config.model_copy(update={"pairs": config.pairs.model_copy(update={"verification": verification})})
        prices[domain] = priced(config)
    (price, photographs), (other_price, drawings) = prices["photographs"], prices["drawings"]
    pairs, candidates = photographs["pairs"], num_candidates(config, 20_000)  # of full lists
    feature_bytes = 20_000 * FEATURES.itemsize
    assert pairs.temporary_bytes == feature_bytes and drawings["pairs"].temporary_bytes == 0
    assert pairs.writes - drawings["pairs"].writes == feature_bytes
    assert pairs.reads - drawings["pairs"].reads > 2 * feature_bytes, "a record is read again where it was forgotten"
    seconds = [
        20_000 / FIXED.features_per_core + candidates / FIXED.photographs_verified_per_core,
        candidates / FIXED.drawings_verified_per_core,
    ]
    assert pairs.core_seconds - drawings["pairs"].core_seconds == pytest.approx(seconds[0] - seconds[1])
    checks = photographs["self_check"], drawings["self_check"]
    copies = checks[0].images * config.pairs.num_neighbors
    seconds = [
        copies / FIXED.photographs_verified_per_core,
        (checks[0].images + 200 * config.pairs.num_neighbors) / FIXED.features_per_core,  # of copies and candidates
        -copies / FIXED.drawings_verified_per_core,
    ]
    assert checks[0].core_seconds - checks[1].core_seconds == pytest.approx(sum(seconds)), "features are gone by then"
    stay = sum(stage.writes - stage.temporary_bytes for stage in price.stages)
    assert stay == pytest.approx(sum(stage.writes - stage.temporary_bytes for stage in other_price.stages))
    assert price.disk_bytes < sum(stage.writes for stage in price.stages)


def test_disk_holds_temporary_files_of_one_stage_at_a_time() -> None:
    stages = [StagePrice(str(n), 1, 0, 30, 1, temporary_bytes=temporary) for n, temporary in enumerate((20, 20, 0))]
    assert Price(tuple(stages), needs_gpus=False).disk_bytes == 10 + 10 + 30
    assert Price(tuple(stages[:2]), needs_gpus=False).disk_bytes == 10 + 30


def test_decoding_is_priced_by_pixels() -> None:
    """Measured: 500 images/s of 500 x 400 pixels; the rate is stated for 2000 x 1500."""
    assert decode_seconds(RatesConfig(), 3e6) == pytest.approx(1 / 100)
    assert 1 / decode_seconds(RatesConfig(), 2e5) == pytest.approx(500, rel=0.2)


# Of local files


def config_of(root: Path, *more_sources: dict[str, Any], **sections: Any) -> CurateConfig:
    source = {"layout": "folder"}
    model = {"embedder": {"name": "efficientnet_lite0", "pooling": "gem"}}
    values = {
        "ingest": {
            "images_per_shard": 2,
            "sources": [
                source | {"name": "seeds", "role": "seed", "path": str(root / "seeds")},
                source | {"name": "pool", "role": "pool", "path": str(root / "pool")},
                {"layout": "webdataset", "name": "tars", "role": "pool", "path": str(root / "tars")},
                *more_sources,
            ],
        },
        "embed": model,
        "describe": model,
        "pairs": {"min_descriptor_similarity": 0.4},
        "cluster": {"levels": [{"num_clusters": 2}]},
        "retrieve": {"datasets": [{"name": "seeds", "as_is": True, "retrieval": "sample", "k": 2}]},
    }
    return parse(CurateConfig, values | sections, origin="test")


FAR = {"layout": "webdataset", "name": "far", "role": "pool", "path": "s3://bucket/far"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folders of 3 seeds and 5 pool images, and a tar of 7 more."""
    for role, number in (("seeds", 3), ("pool", 5)):
        (tmp_path / role).mkdir()
        for index in range(number):
            (tmp_path / role / f"{index}.png").write_bytes(encoded_image(index))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/0.tar").write_bytes(tar_of(member(f"{index}.png", encoded_image(index)) for index in range(7)))
    return tmp_path


def test_local_files_are_counted(pictures: Path) -> None:
    config = config_of(pictures, FAR)
    counts = count_sources(config)
    assert counts.of_source == {"seeds": 3, "pool": 5, "tars": 7}
    assert counts.unknown == ("far",)
    assert counts.pixels == 24 * 20
    assert counts.image_bytes == pytest.approx(len(encoded_image(0)), rel=0.05)
    price = price_run(config, counts, 9)
    assert price.stages[0].shards == 2 + 3 + 1
    assert not price.needs_gpus and all(stage.gpu_seconds == 0 for stage in price.stages)


def test_the_check_of_the_corpus_has_a_price(pictures: Path) -> None:
    config = config_of(pictures)
    with_check, without = (
        {stage.stage: stage for stage in price_run(each, count_sources(each), 9).stages}["retrieve"]
        for each in (
            config.model_copy(update={"retrieve": config.retrieve.model_copy(update={"check_copies": check})})
            for check in (True, False)
        )
    )
    for name in ("core_seconds", "reads", "writes", "driver_bytes"):
        assert getattr(with_check, name) > getattr(without, name)


def test_the_self_check_has_a_price_that_its_setting_takes_away(pictures: Path) -> None:
    config = config_of(pictures, pairs={"verification": {}}, stated_counts={"seeds": 3, "pool": 9_000, "tars": 0})
    prices = {}
    for max_images in (200, 10, 0):
        each = config.model_copy(update={"self_check": SelfCheckConfig(max_images=max_images)})
        stages = {stage.stage: stage for stage in price_run(each, count_sources(each), 9).stages}
        prices[max_images] = stages.get("self_check")
    assert prices[0] is None
    copies = {number: prices[number].images for number in (200, 10)}
    assert copies == {200: 19 * (9_003 // (IMAGES_PER_COPY * 19)), 10: 190}
    assert prices[200].core_seconds > prices[10].core_seconds > 0 and prices[200].shards > prices[10].shards == 10
    few = config_of(pictures)
    (price,) = (stage for stage in price_run(few, count_sources(few), 9).stages if stage.stage == "self_check")
    assert price.images == 2 * 19


def test_a_sample_is_priced_by_its_share_of_the_pool(pictures: Path) -> None:
    config = config_of(pictures)
    config = config.model_copy(update={"ingest": config.ingest.model_copy(update={"sample_pool": 0.5})})
    assert price_run(config, count_sources(config), 9).stages[0].images == 3 + 2 + 4  # 2.5 and 3.5, to even numbers


def test_every_missing_path_is_named_at_once(pictures: Path) -> None:
    config = config_of(pictures / "nowhere", FAR)
    with pytest.raises(InputError) as error:
        count_sources(config)
    assert [f"'{name}'" in str(error.value) for name in ("seeds", "pool", "tars", "far")] == [True] * 3 + [False]
    stated = config_of(pictures / "nowhere", stated_counts={"seeds": 1, "pool": 2, "tars": 3})
    assert count_sources(stated).of_source == {"seeds": 1, "pool": 2, "tars": 3}, "planned from another machine"


def first_screen(
    config: CurateConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    machine: Machine | None = None,
) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    print_plan(config, output=output, machine=machine)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    return lines


def words_of(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def test_a_plan_is_one_screen_with_this_machine_first(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = first_screen(config_of(pictures), capsys, monkeypatch, str(pictures / "run"))
    machine = this_machine(str(pictures / "run"), with_gpus=False, bytes_per_second=1)
    assert lines[0] == f"On this machine ({machine.cores} core{'s' * (machine.cores != 1)}):"
    assert [line.split()[0] for line in lines[1:4]] == ["time", "memory", "disk"]
    rows = {line.split()[0]: line.split() for line in lines[5:] if line[2:3].isalpha()}
    assert list(rows)[:10] == ["stage", *STAGES[:-1]]
    assert rows["ingest"][1] == "15" and rows["ingest"][-1] == "cores"
    text = words_of(lines)
    assert "machines of" not in text and "Unknown" not in text and "at least" not in text


def test_describe_costs_its_writes_where_the_pass_of_embed_makes_it(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"name": "efficientnet_lite0", "pooling": "gem", "image_size": 96}
    pairs = {"verification": None, "min_descriptor_similarity": 0.4}  # nothing reads thumbnails
    shared = config_of(pictures, describe={"thumbnail_side": 0}, pairs=pairs)
    apart = config_of(pictures, describe={"thumbnail_side": 0, "embedder": model}, pairs=pairs)
    prices = []
    for config, width in ((shared, 256), (apart, 1280)):  # of the poolings `copies` and `gem`; embed has `gem`
        embed, describe = price_run(config, count_sources(config), 10).stages[1:3]
        assert embed.core_seconds > 0 and embed.reads > 0 and describe.writes == embed.writes * width / 1280
        prices.append((describe.core_seconds, describe.reads))
    assert prices[0] == (0, 0) and min(prices[1]) > 0
    texts = [
        words_of(first_screen(config, capsys, monkeypatch, str(pictures / "run"))).count("in the pass of embed")
        for config in (shared, apart)
    ]
    assert texts == [1, 0]


def test_an_unknown_source_is_named_and_makes_all_totals_minima(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = first_screen(config_of(pictures, FAR), capsys, monkeypatch, str(pictures / "run"))
    assert all("at least" in line for line in lines[1:4])
    assert any(line.startswith("Unknown: far.") for line in lines)


def test_the_plan_says_what_does_not_fit(
    pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(SMALL, memory_bytes=10**6, disk_bytes=10)
    text = words_of(first_screen(config_of(pictures), capsys, monkeypatch, str(pictures / "run"), small))
    assert "It does not fit on this machine: memory of" in text and "; disk of" in text


def test_the_plan_of_lvd142m_shows_its_machines_and_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = words_of(first_screen(load(CurateConfig, str(LVD)), capsys, monkeypatch, str(tmp_path), SMALL))
    for words in ("up to 142,109,386 rows", "On machines of 8 GPUs and 128 cores:", "Unknown: evaluation_sets."):
        assert words in text
    assert "it needs a GPU" in text


def test_rates_and_config_are_verbose(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = load(CurateConfig, str(LVD), ["rates.gpu_tflops_vit=75"])
    print_plan(config, output=str(tmp_path), verbose=True)
    text = capsys.readouterr().out
    assert "1,242" in text  # GPU-hours of embed at half the rate
    line = next(line for line in text.splitlines() if line.strip().startswith("gpu_tflops_vit"))
    assert "75" in line and "your config" in line
    assert "[embed.embedder]" in text and "voc2012_trainaug: 1,014 clusters" in text


def test_every_rate_has_a_source() -> None:
    sources = {name: str(field.description) for name, field in RatesConfig.model_fields.items()}
    sources |= {rate.name: rate.metadata["source"] for rate in dataclasses.fields(FixedRates)}
    for name, source in sources.items():
        assert source.split(",")[0].split()[0].strip(":;") in ("measured", "cited", "assumed"), name
    assert FIXED.candidates_of_full_list <= 1
