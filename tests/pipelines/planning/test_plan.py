"""The price that --plan prints: the arithmetic of docs/scaling.md, counts of local files, and rates with sources."""

import dataclasses
import math
from pathlib import Path

import pytest

from curation.config import load, parse
from pipelines.main_path import CurateConfig
from pipelines.planning.plan import print_plan, total_rows
from pipelines.planning.price import Price, count_images, price_run
from pipelines.planning.rates import FixedRates, RatesConfig

LVD = Path(__file__).parents[3] / "pipelines/configs/lvd142m.toml"


def lvd_price(*overrides: str) -> Price:
    config = load(CurateConfig, str(LVD), overrides)
    return price_run(config, total_rows(config))


def test_price_of_lvd142m_agrees_with_the_scaling_document() -> None:
    price = lvd_price()
    stages = {stage.stage: stage for stage in price.stages}
    assert sum(price.image_counts.values()) == stages["ingest"].images > 1.3e9
    assert price.uncounted == ("evaluation_sets",)
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
    price = lvd_price()
    fewer = Price(price.stages, price.rates, price.machines - 1, price.image_counts, price.uncounted)
    assert price.hours <= price.rates.hours_wanted < fewer.hours
    for stage in price.stages:
        assert stage.total_seconds(price.rates, 2) <= stage.total_seconds(price.rates, 1)
    assert lvd_price("rates.hours_wanted=1000").machines == 1


def test_time_grows_with_the_images() -> None:
    once, twice = lvd_price(), lvd_price("stated_counts.web_pool=2_600_000_000")
    ratio = twice.stages[0].images / once.stages[0].images
    for name, grows_as in (("ingest", 1), ("embed", 1), ("describe", 1), ("dedup", 1)):
        seconds = [
            next(s for s in price.stages if s.stage == name).total_seconds(price.rates, 1) for price in (once, twice)
        ]
        assert math.log(seconds[1] / seconds[0]) / math.log(ratio) == pytest.approx(grows_as)


def test_local_files_are_counted(tmp_path: Path) -> None:
    for role, number in (("seeds", 3), ("pool", 5)):
        (tmp_path / role).mkdir()
        for index in range(number):
            (tmp_path / role / f"{index}.jpg").write_bytes(b"x" * 1000)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/0.tar").write_bytes(b"x" * 50_000)
    source = {"layout": "folder"}
    model = {"embedder": {"name": "efficientnet_lite0", "pooling": "gem"}}
    config = parse(
        CurateConfig,
        {
            "ingest": {
                "images_per_shard": 2,
                "sources": [
                    source | {"name": "seeds", "role": "seed", "path": str(tmp_path / "seeds")},
                    source | {"name": "pool", "role": "pool", "path": str(tmp_path / "pool")},
                    {"layout": "webdataset", "name": "tars", "role": "pool", "path": str(tmp_path / "tars")},
                    source | {"name": "far", "role": "pool", "path": str(tmp_path / "nowhere")},
                ],
            },
            "embed": model,
            "describe": model,
            "pairs": {"min_descriptor_similarity": 0.4},
            "cluster": {"levels": [{"num_clusters": 2}]},
            "retrieve": {"datasets": [{"name": "seeds", "as_is": True, "retrieval": "sample", "k": 2}]},
            "rates": {"bytes_per_image": 10_000},
        },
        origin="test",
    )
    counts, image_bytes = count_images(config)
    assert counts == {"seeds": 3, "pool": 5, "tars": 5}
    assert image_bytes == 1000
    price = price_run(config, 9)
    assert price.uncounted == ("far",)
    assert price.stages[0].shards == 2 + 3 + 1
    assert price.rates.machine_gpus == 0 and price.machines == 1
    assert all(stage.gpu_seconds == 0 for stage in price.stages)


def test_page_has_price_machines_and_rates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    print_plan(load(CurateConfig, str(LVD), ["rates.gpu_tflops_vit=75"]))
    text = capsys.readouterr().out
    page = text[: text.index("Profile:")]
    for words in (
        "To finish within 48 hours, the run needs",
        "machines of 8 GPUs, 128 cores",
        "Not in the price: evaluation_sets.",
    ):
        assert words in page
    assert len(page.splitlines()) < 30
    assert "1,242" in page  # GPU-hours of embed at half the rate
    line = next(line for line in text.splitlines() if line.strip().startswith("gpu_tflops_vit"))
    assert "75" in line and "your config" in line


def test_every_rate_has_a_source() -> None:
    sources = {name: str(field.description) for name, field in RatesConfig.model_fields.items()}
    sources |= {rate.name: rate.metadata["source"] for rate in dataclasses.fields(FixedRates)}
    assert len(sources) == 21
    for name, source in sources.items():
        assert source.split(",")[0].split()[0].strip(":;") in ("measured", "cited", "assumed"), name
