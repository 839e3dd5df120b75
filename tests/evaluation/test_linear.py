"""Tests of the linear probe: heads trained together equal heads trained alone; test images do not affect the choice."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from curation.engine.ranks import ALONE
from curation.engine.runner import InlineRunner
from curation.errors import InputError
from evaluation import linear
from evaluation.data import splits
from evaluation.data.splits import SplitConfig
from evaluation.data.views import PicturesConfig
from evaluation.features import FrozenModelConfig, load_model
from evaluation.linear import LEARNING_RATES, Heads, LinearConfig, Reading, fit_or_load, random_crop, read, readings_of
from tests.curation.builders import picture_of
from tests.evaluation.builders import drawn, image_folder, model_config

SMALL = PicturesConfig(resize_size=40, image_size=32)


def config_of(tmp_path: Path, **changes: object) -> LinearConfig:
    train, test = tmp_path / "train", tmp_path / "test"
    if not train.exists():
        image_folder(train, 8)
        image_folder(test, 3, first=50)
    fields: dict[str, object] = {
        "name": "toy",
        "train": SplitConfig(path=str(train)),
        "test": SplitConfig(path=str(test)),
        "pictures": SMALL,
        "blocks": (1, 2),
        "batch_size": 6,
        "steps": 4,
        "held_out": 0.25,
    }
    return LinearConfig.model_validate(fields | changes)


def test_both_grids_have_thirteen_rates() -> None:
    assert [len(set(rates)) for rates in LEARNING_RATES.values()] == [13, 13]


def test_heads_trained_together_equal_heads_trained_alone(tmp_path: Path) -> None:
    config, model = config_of(tmp_path), load_model(model_config(tmp_path))
    split = splits.load(config.train, str(tmp_path / "cache"), InlineRunner())
    readings = readings_of(config, model)
    assert readings == [Reading(1, False), Reading(1, True), Reading(2, False), Reading(2, True)]
    steps = [
        ([one.clone() for one in read(model, pixels, readings)], labels)
        for pixels, labels in linear._crops(config, split, ALONE)
    ]
    factors = [1.0, 0.8, 0.5, 0.2]
    for number, width in enumerate((192, 384, 384, 576)):
        together = Heads(config.rates, 3, width, seed=[7, number])
        start = together.weight.detach().clone()
        assert float(start.std()) == pytest.approx(0.01, rel=0.1)
        for (inputs, labels), factor in zip(steps, factors, strict=True):
            together.sgd_step(inputs[number], labels, factor)
        for rate_index, rate in enumerate(config.rates):
            weight = start[rate_index].clone().requires_grad_()
            bias = torch.zeros(3, requires_grad=True)
            alone = torch.optim.SGD([weight, bias], lr=rate, momentum=0.9, weight_decay=0)
            for (inputs, labels), factor in zip(steps, factors, strict=True):
                alone.param_groups[0]["lr"] = rate * factor
                alone.zero_grad()
                functional.cross_entropy(functional.linear(inputs[number], weight, bias), labels).backward()
                alone.step()
            torch.testing.assert_close(together.weight[rate_index], weight, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(together.bias[rate_index], bias, atol=1e-6, rtol=1e-5)


def test_a_probe_learns_and_is_read_from_the_cache(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=60, batch_size=16, learning_rates=(1e-9, 0.05))
    model, cache = load_model(FrozenModelConfig(name="pixels")), str(tmp_path / "cache")
    first = linear.run(config, model, str(tmp_path / "out"), cache=cache)
    scores = {result.metric: result.value for result in first}
    assert scores["top-1"] > 0.6 and first[0].settings["chosen_rate"] == 0.05
    split = splits.load(config.train, cache, InlineRunner())
    head, again = (fit_or_load(config, model, split, None, one) for one in (cache, str(tmp_path / "other")))
    assert torch.equal(head.weight, again.weight) and head.selection_top_1 == again.selection_top_1
    other = fit_or_load(config.model_copy(update={"seed": 1}), model, split, None, cache)
    assert not torch.equal(head.weight, other.weight)
    for file in Path(cache).glob("linear/*/head.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(InputError, match=r"head\.safetensors: not the bytes that were written\. Delete"):
        fit_or_load(config, model, split, None, cache)


def test_the_test_images_do_not_affect_the_choice(tmp_path: Path) -> None:
    model, cache = load_model(FrozenModelConfig(name="pixels")), str(tmp_path / "cache")
    config = config_of(tmp_path)
    wrong = tmp_path / "wrong"
    image_folder(wrong, 3, first=50)
    for name, other in (("disc", "x"), ("ring", "disc"), ("x", "ring")):
        (wrong / name).rename(wrong / other)
    renamed = config.model_copy(update={"test": SplitConfig(path=str(wrong))})
    first, second = (linear.run(one, model, str(tmp_path / "out"), cache=cache) for one in (config, renamed))
    chosen = [{key: result[0].settings[key] for key in ("chosen_rate", "held_out_top_1")} for result in (first, second)]
    assert chosen[0] == chosen[1] and first[0].data_hash != second[0].data_hash


def test_the_test_images_choose_where_the_config_says_so(tmp_path: Path) -> None:
    model, cache = load_model(FrozenModelConfig(name="pixels")), str(tmp_path / "cache")
    rates = (1e-9, 0.05)
    config = config_of(tmp_path, steps=8, batch_size=8, learning_rates=rates, choose_on="test")
    chosen = {one.metric: one for one in linear.run(config, model, str(tmp_path / "out"), cache=cache)}["top-1"]
    assert chosen.protocol == "2 heads, own grid, 8 steps, chosen on the test images"
    assert chosen.settings["test_top_1"] == chosen.value
    # The best of all heads on the test images, each trained on every training image.
    alone = [
        linear.run(config.model_copy(update={"learning_rates": (rate,)}), model, str(tmp_path / "out"), cache=cache)
        for rate in rates
    ]
    assert chosen.value == max(results[0].value for results in alone)
    # Other test images are another choice, so a cached head is not taken.
    other = config.model_copy(update={"test": SplitConfig(path=image_folder(tmp_path / "more", 5, first=80))})
    linear.run(other, model, str(tmp_path / "out"), cache=cache)
    assert len(list((tmp_path / "cache" / "linear").iterdir())) == 2 + len(rates)


def test_crops_are_parts_of_the_image_and_depend_on_the_seed() -> None:
    picture = picture_of(drawn("bars", 3, (90, 60)))
    crops = [random_crop(picture, 16, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert crops[0].shape == (3, 16, 16) and crops[0].dtype == torch.uint8
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])
    boxes = [linear._crop_box(60, 90, np.random.default_rng(seed)) for seed in range(300)]
    shares = [rows * columns / 5400 for _, _, rows, columns in boxes]
    assert min(shares) > 0.07 and max(shares) > 0.7
    assert all(top + rows <= 60 and left + columns <= 90 for top, left, rows, columns in boxes)
    assert linear._crop_box(2, 900, np.random.default_rng(0)) == (0, 448, 2, 3)
