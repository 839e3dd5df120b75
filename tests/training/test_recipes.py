"""The shipped configs: each loads, and those of published recipes have the published numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from curation.backbone import POSITION_OFFSET
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


# Values of DINOv2's published configs, under their names: ssl_default_config.yaml, which vitl16_short.yaml takes over,
# and the changes of vitl14.yaml and vitg14.yaml. Epochs have 1,250 steps. GPUs: its README; 256 for ViT-g is derived.
SHORT: dict[str, Any] = {
    "gpus": 32,
    "dino.head_n_prototypes": 65_536,
    "dino.head_bottleneck_dim": 256,
    "dino.head_hidden_dim": 2048,
    "dino.loss_weight": 1.0,
    "dino.koleo_loss_weight": 0.1,
    "ibot.loss_weight": 1.0,
    "ibot.separate_head": False,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": (0.1, 0.5),
    "train.batch_size_per_gpu": 64,
    "train.centering": "centering",
    "student.arch": "vit_large",
    "student.patch_size": 16,
    "student.drop_path_rate": 0.3,
    "student.layerscale": 1e-5,
    "student.ffn_layer": "mlp",
    "student.num_register_tokens": 0,
    "student.interpolate_antialias": False,
    "student.interpolate_offset": 0.1,
    "teacher.momentum_teacher": 0.992,
    "teacher.final_momentum_teacher": 1.0,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 30,
    "optim.epochs": 100,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.base_lr": 0.004,
    "optim.warmup_epochs": 10,
    "optim.min_lr": 1e-6,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.scaling_rule": 1024,
    "optim.patch_embed_lr_mult": 0.2,
    "optim.layerwise_decay": 0.9,
    "optim.adamw_beta1": 0.9,
    "optim.adamw_beta2": 0.999,
    "crops.global_crops_scale": (0.32, 1.0),
    "crops.local_crops_number": 8,
    "crops.local_crops_scale": (0.05, 0.32),
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 96,
}
LONG = SHORT | {
    "gpus": 96,
    "dino.head_n_prototypes": 131_072,
    "dino.head_bottleneck_dim": 384,
    "ibot.separate_head": True,
    "ibot.head_n_prototypes": 131_072,
    "ibot.head_bottleneck_dim": 256,
    "ibot.head_hidden_dim": 2048,
    "train.batch_size_per_gpu": 32,
    "train.centering": "sinkhorn_knopp",
    "student.patch_size": 14,
    "student.drop_path_rate": 0.4,
    "student.ffn_layer": "swiglu",
    "teacher.momentum_teacher": 0.994,
    "optim.epochs": 500,
    "optim.weight_decay_end": 0.2,
    "optim.base_lr": 2e-4,
    "optim.warmup_epochs": 80,
    "optim.layerwise_decay": 1.0,
    "crops.local_crops_size": 98,
}
GIANT = LONG | {"gpus": 256, "student.arch": "vit_giant", "train.batch_size_per_gpu": 12}


def under_published_names(config: TrainConfig) -> dict[str, Any]:
    vit, objective, schedule = config.model.backbone, config.model.objective, config.schedule
    whole, small = config.augment.crops
    values: dict[str, Any] = {
        "gpus": config.batch_size / config.images_per_pass,
        "dino.head_n_prototypes": config.model.dino_head.num_prototypes,
        "dino.head_bottleneck_dim": config.model.dino_head.bottleneck_dim,
        "dino.head_hidden_dim": config.model.dino_head.hidden_dim,
        "dino.loss_weight": objective.dino_weight,
        "dino.koleo_loss_weight": objective.koleo_weight,
        "ibot.loss_weight": objective.ibot_weight,
        "ibot.separate_head": config.model.ibot_head is not None,
        "ibot.mask_sample_probability": config.masks.crop_share,
        "ibot.mask_ratio_min_max": config.masks.ratio,
        "train.batch_size_per_gpu": config.images_per_pass,
        "train.centering": "centering" if objective.centering == "ema" else objective.centering,
        "student.arch": vit.name,
        "student.patch_size": vit.patch_size,
        "student.drop_path_rate": vit.drop_path,
        "student.layerscale": vit.layer_scale,
        "student.ffn_layer": vit.feed_forward,
        "student.num_register_tokens": vit.num_register_tokens,
        "student.interpolate_antialias": vit.position_interpolation == "antialias",
        "student.interpolate_offset": POSITION_OFFSET if vit.position_interpolation == "offset" else 0.0,
        "teacher.momentum_teacher": schedule.start_teacher_momentum,
        "teacher.final_momentum_teacher": schedule.final_teacher_momentum,
        "teacher.warmup_teacher_temp": schedule.start_teacher_temperature,
        "teacher.teacher_temp": schedule.final_teacher_temperature,
        "teacher.warmup_teacher_temp_epochs": schedule.teacher_temperature_warmup_steps / 1250,
        "optim.epochs": config.num_steps / 1250,
        "optim.weight_decay": schedule.start_weight_decay,
        "optim.weight_decay_end": schedule.final_weight_decay,
        "optim.base_lr": schedule.base_learning_rate,
        "optim.warmup_epochs": schedule.learning_rate_warmup_steps / 1250,
        "optim.min_lr": schedule.final_learning_rate,
        "optim.clip_grad": config.optimizer.clip_norm,
        "optim.freeze_last_layer_epochs": schedule.frozen_last_layer_steps / 1250,
        "optim.scaling_rule": schedule.reference_batch_size,
        "optim.patch_embed_lr_mult": config.optimizer.patch_embed_multiplier,
        "optim.layerwise_decay": config.optimizer.layer_decay,
        "optim.adamw_beta1": config.optimizer.betas[0],
        "optim.adamw_beta2": config.optimizer.betas[1],
        "crops.global_crops_scale": whole.scale,
        "crops.local_crops_number": small.num,
        "crops.local_crops_scale": small.scale,
        "crops.global_crops_size": whole.size,
        "crops.local_crops_size": small.size,
    }
    if config.model.ibot_head is not None:
        values |= {
            "ibot.head_n_prototypes": config.model.ibot_head.num_prototypes,
            "ibot.head_bottleneck_dim": config.model.ibot_head.bottleneck_dim,
            "ibot.head_hidden_dim": config.model.ibot_head.hidden_dim,
        }
    return values


@pytest.mark.parametrize(("name", "published"), [("vitl16_short", SHORT), ("vitl14_long", LONG), ("vitg14", GIANT)])
def test_recipes_have_the_values_of_the_published_configs(name: str, published: dict[str, Any]) -> None:
    config = read(name)
    assert under_published_names(config) == published
    assert config.optimizer.epsilon == 1e-8  # torch's default, which DINOv2 leaves
    assert (config.masks.sampler, config.masks.min_block_patches) == ("published", 4)
    assert config.model.objective.sinkhorn_iterations == 3 and config.model.objective.center_momentum == 0.9


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_states_how_positions_are_resized(path: Path) -> None:
    model = load(TrainConfig, str(path)).model
    teacher = [] if model.distillation is None else [model.distillation.backbone]
    assert all("position_interpolation" in vit.model_fields_set for vit in (model.backbone, *teacher))


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
