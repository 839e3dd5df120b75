"""The shipped configs: each loads, and those of published recipes have the published numbers."""

from pathlib import Path

import pytest
import torch

from curation.config import load
from training.heads import ProjectionHead
from training.loop import TrainConfig, step_flops
from training.masking import step_masks
from training.model import forward_flops
from training.optimizer import step_values
from training.train import derived

FOLDER = Path(__file__).parents[2] / "pipelines" / "configs" / "train"


def read(name: str) -> TrainConfig:
    return load(TrainConfig, str(FOLDER / f"{name}.toml"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_loads_and_sets_every_number(path: Path) -> None:
    config = load(TrainConfig, str(path))
    assert len(list(derived(config))) == 5
    for section in (config.optimizer, config.schedule, config.masks, config.augment):
        left_out = {*type(section).model_fields} - section.model_fields_set
        assert not left_out, (path.stem, left_out)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "peak", "final_decay", "momentum", "drop_path", "layer_decay"),
    [
        ("vitl16_short", 2048, 125_000, 5.657e-3, 0.4, 0.992, 0.3, 0.9),
        ("vitl14_long", 3072, 625_000, 3.464e-4, 0.2, 0.994, 0.4, 1.0),
        ("vitg14", 3072, 625_000, 3.464e-4, 0.2, 0.994, 0.4, 1.0),
    ],
)
def test_published_numbers(
    name: str,
    batch: int,
    steps: int,
    peak: float,
    final_decay: float,
    momentum: float,
    drop_path: float,
    layer_decay: float,
) -> None:
    config = read(name)
    assert (config.batch_size, config.num_steps) == (batch, steps)
    assert (config.model.backbone.drop_path, config.optimizer.layer_decay) == (drop_path, layer_decay)

    def at(step: int) -> dict[str, float]:
        return vars(step_values(config.schedule, step=step, total_steps=steps, batch_size=batch))

    warmup = config.schedule.learning_rate_warmup_steps
    assert at(0)["learning_rate"] == 0 and at(warmup)["learning_rate"] == pytest.approx(peak, rel=1e-3)
    assert at(steps)["learning_rate"] == 1e-6
    assert at(1249)["last_layer_learning_rate"] == 0 < at(1250)["last_layer_learning_rate"]
    assert at(0)["weight_decay"] == pytest.approx(0.04) and at(steps)["weight_decay"] == final_decay
    assert at(0)["teacher_momentum"] == pytest.approx(momentum) and at(steps)["teacher_momentum"] == 1
    assert at(0)["teacher_temperature"] == 0.04 and at(37_500)["teacher_temperature"] == pytest.approx(0.07)
    blur = [view.blur for group in config.augment.crops for view in group.views]
    assert blur == [0.0, 0.9, 0.5]  # as the released weights were trained
    assert [(group.num, group.size) for group in config.augment.crops] == [(2, 224), (8, 98 if "14" in name else 96)]


def test_parameters_of_the_heads() -> None:
    def count(name: str, head: str) -> int:
        with torch.device("meta"):
            return sum(weight.numel() for weight in ProjectionHead(1024, getattr(read(name).model, head)).parameters())

    # By hand: D * 2048 + 2048, 2048 * 2048 + 2048, 2048 * d + d, and K * d + K.
    assert count("vitl14_long", "dino_head") == 2_099_200 + 4_196_352 + 786_816 + 50_331_648 + 131_072
    assert count("vitl14_long", "ibot_head") == 2_099_200 + 4_196_352 + 524_544 + 33_554_432 + 131_072
    assert read("vitl16_short").model.ibot_head is None  # shared


def test_masked_patches_of_a_step() -> None:
    config = read("vitl16_short")
    masks = step_masks(config.masks, (14, 14), seed=0, step=0, num_crops=128, crops=range(128))
    counts = masks.sum(1)
    assert (counts > 0).sum() == 64
    assert counts.max() <= 98 and counts.sum() == pytest.approx(64 * 0.3 * 196, rel=0.03)


def test_step_flops_agree_with_the_cited_figure() -> None:
    config = read("vitl16_short")
    # Student forward and backward over 70% of 2 global and 8 local crops, teacher forward over 2 global ones.
    whole, small = (forward_flops(config.model.backbone, side) for side in (224, 96))
    assert step_flops(config) == pytest.approx(3 * 0.7 * (2 * whole + 8 * small) + 2 * whole)
    assert whole == pytest.approx(2 * 61.6e9, rel=0.03)  # cited: 61.6 GMACs for ViT-L/16 (Touvron et al., DeiT III)
