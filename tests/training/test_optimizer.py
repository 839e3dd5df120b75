"""Parameter groups, schedules and clipping, against values computed by hand and the published arrays."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curation import backbone
from curation.config import parse
from curation.errors import ConfigError
from training.optimizer import (
    OptimizerConfig,
    ParameterGroup,
    ScheduleConfig,
    StepValues,
    apply_schedules,
    clip_gradients,
    make_optimizer,
    parameter_groups,
    step_values,
)

SHORT = ScheduleConfig()  # ViT-L/16 on ImageNet-1k: 2,048 images a step, 125,000 steps
LONG = ScheduleConfig(  # ViT-L/14 and ViT-g/14: 3,072 images a step, 625,000 steps
    base_learning_rate=2e-4,
    learning_rate_warmup_steps=100_000,
    final_weight_decay=0.2,
    start_teacher_momentum=0.994,
)


def short(step: int) -> StepValues:
    return step_values(SHORT, step=step, total_steps=125_000, batch_size=2048)


def long(step: int) -> StepValues:
    return step_values(LONG, step=step, total_steps=625_000, batch_size=3072)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # The peak is 0.004 * sqrt(2) = 0.005656854249. Warmup: peak * step / 12,499.
        (0, 0.0),
        (1250, 0.000565730683403910),
        (6250, 0.00282865341701955),
        (12_499, 0.00565685424949238),
        # Then 1e-6 + (peak - 1e-6) / 2 * (1 + cos(pi * i / 112,500)): i = 0, a quarter, a half, the last one.
        (12_500, 0.00565685424949238),
        (40_625, 0.00482857357135560),
        (68_750, 0.00282892712474619),
        (124_999, 1.0000011026379e-6),
        (125_000, 1e-6),
        (200_000, 1e-6),
    ],
)
def test_learning_rate_of_the_short_recipe(step: int, expected: float) -> None:
    assert short(step).learning_rate == pytest.approx(expected, rel=1e-12)
    assert short(step).last_layer_learning_rate == pytest.approx(0.0 if step < 1250 else expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # The peak is 0.0002 * sqrt(3) = 0.00034641016; the paper rounds it to 3.5e-4.
        (0, 0.0),
        (50_000, 0.000173206812825016),
        (99_999, 0.000346410161513775),
        (100_000, 0.000346410161513775),
        (231_250, 0.000295826014505453),
        (362_500, 0.000173705080756888),
        (625_000, 1e-6),
    ],
)
def test_learning_rate_of_the_long_recipe(step: int, expected: float) -> None:
    assert long(step).learning_rate == pytest.approx(expected, rel=1e-12)


def test_the_prototypes_are_frozen_for_1250_steps() -> None:
    assert short(1).last_layer_learning_rate == short(1249).last_layer_learning_rate == 0.0
    assert short(1250).last_layer_learning_rate == short(1250).learning_rate > short(1249).learning_rate > 0.0


def test_weight_decay_and_momentum_of_both_recipes() -> None:
    # Start, a quarter, half, end, beyond. A quarter: final + (start - final) / 2 * (1 + sqrt(1/2)).
    steps = [0, 31_250, 62_500, 125_000, 10**9]
    assert [short(step).weight_decay for step in steps] == pytest.approx(
        [0.04, 0.0927207793864214, 0.22, 0.4, 0.4], rel=1e-12
    )
    assert [short(step).teacher_momentum for step in steps] == pytest.approx(
        [0.992, 0.993171572875254, 0.996, 1.0, 1.0], rel=1e-14
    )
    steps = [0, 156_250, 312_500, 625_000, 10**9]
    assert [long(step).weight_decay for step in steps] == pytest.approx(
        [0.04, 0.0634314575050762, 0.12, 0.2, 0.2], rel=1e-12
    )
    assert [long(step).teacher_momentum for step in steps] == pytest.approx(
        [0.994, 0.994878679656440, 0.997, 1.0, 1.0], rel=1e-14
    )


def test_teacher_temperature_of_both_recipes() -> None:
    for values in (short, long):  # 0.04 + 0.03 * step / 37,499
        steps = [0, 18_750, 37_499, 37_500, 100_000, 10**9]
        assert [values(step).teacher_temperature for step in steps] == pytest.approx(
            [0.04, 0.0550004000106670, 0.07, 0.07, 0.07, 0.07], rel=1e-12
        )


def published(start: float, final: float, total: int, warmup: int, warmup_from: float) -> np.ndarray:
    """The array that DINOv2 precomputes for a schedule."""
    warm = np.linspace(warmup_from, start, warmup)
    steps = np.arange(total - warmup)
    return np.concatenate([warm, final + 0.5 * (start - final) * (1 + np.cos(np.pi * steps / len(steps)))])


@pytest.mark.parametrize(("total", "warmup"), [(50, 10), (50, 0), (50, 1), (50, 2), (50, 50), (1, 0), (1, 1)])
def test_every_step_agrees_with_the_published_arrays(total: int, warmup: int) -> None:
    config = ScheduleConfig(learning_rate_warmup_steps=warmup, teacher_temperature_warmup_steps=30)
    values = [step_values(config, step=step, total_steps=total, batch_size=1024) for step in range(total)]
    expected = {
        "learning_rate": published(4e-3, 1e-6, total, warmup, 0.0),
        "weight_decay": published(0.04, 0.4, total, 0, 0.0),
        "teacher_momentum": published(0.992, 1.0, total, 0, 0.0),
        "teacher_temperature": np.concatenate([np.linspace(0.04, 0.07, 30), np.full(total, 0.07)])[:total],
    }
    for name, array in expected.items():
        np.testing.assert_allclose([getattr(value, name) for value in values], array, rtol=1e-12, atol=1e-15)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 problems"):
        parse(OptimizerConfig, {"layer_decay": 1.1, "clip_norm": 0.0, "betas": [0.9, 1.0]}, origin="optimizer")


HEAD = {  # for a ViT of width D (None): hidden 2,048, bottleneck 256, 65,536 prototypes
    "mlp.0.weight": (2048, None),
    "mlp.0.bias": (2048,),
    "mlp.2.weight": (2048, 2048),
    "mlp.2.bias": (2048,),
    "mlp.4.weight": (256, 2048),
    "mlp.4.bias": (256,),
    "last_layer.weight_g": (65_536, 1),
    "last_layer.weight_v": (65_536, 256),
}


def student(name: backbone.Name, *heads: str, **options: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a student; their memory is never used."""
    model = backbone.build(name, patch_size=14, image_size=224, seed=None, **options)
    for key, parameter in model.named_parameters():
        yield f"backbone.{key}", parameter
    for head in heads:
        for key, shape in HEAD.items():
            sizes = [model.embed_dim if size is None else size for size in shape]
            yield f"{head}.{key}", nn.Parameter(torch.empty(sizes, device="meta"))


def counts(groups: list[ParameterGroup]) -> dict[tuple[float, float, bool], int]:
    """Parameters by (multiplier of the learning rate, of weight decay, last layer)."""
    keys = ("learning_rate_multiplier", "weight_decay_multiplier", "is_last_layer")
    sizes = {tuple(group[key] for key in keys): sum(map(torch.numel, group["params"])) for group in groups}
    assert len(sizes) == len(groups)
    return sizes


@pytest.mark.parametrize(
    ("name", "width", "depth", "total"),
    # The totals are those of the released models, except for the positions: 16 x 16 instead of 37 x 37.
    [
        ("vit_small", 384, 12, 22_056_576 - 1113 * 384),
        ("vit_base", 768, 12, 86_580_480 - 1113 * 768),
        ("vit_large", 1024, 24, 304_368_640 - 1113 * 1024),
    ],
)
@pytest.mark.parametrize("num_heads", [1, 2])
def test_number_of_parameters_in_each_group(
    name: backbone.Name, width: int, depth: int, total: int, num_heads: int
) -> None:
    heads = ["dino_head", "ibot_head"][:num_heads]
    groups = parameter_groups(student(name, *heads, num_register_tokens=4), layer_decay=0.9, patch_embed_multiplier=0.2)
    expected: dict[tuple[float, float, bool], int] = defaultdict(int)
    # Embeddings: CLS, mask, 4 registers, 1 + 256 positions; the patch projection of 14 x 14 x 3.
    lowest = 0.9 ** (depth + 1)
    expected[lowest, 1.0, False] = (1 + 1 + 4 + 257) * width
    expected[lowest * 0.2, 1.0, False] = 14 * 14 * 3 * width
    expected[lowest * 0.2, 0.0, False] = width
    for block in range(depth):
        rate = 0.9 ** (depth - block)
        expected[rate, 1.0, False] = 12 * width * width  # qkv 3, proj 1, the two of the MLP 8
        # Biases: qkv 3, proj 1, the MLP's 4 + 1. Norms: 2 of 2. LayerScale: 2 of 1.
        expected[rate, 0.0, False] = 15 * width
    expected[1.0, 0.0, False] = 2 * width + num_heads * (2048 + 2048 + 256)
    expected[1.0, 1.0, False] = num_heads * (width * 2048 + 2048 * 2048 + 2048 * 256)
    expected[1.0, 1.0, True] = num_heads * (65_536 + 65_536 * 256)
    assert counts(groups) == pytest.approx(dict(expected))
    in_heads = num_heads * sum(math.prod(size or width for size in shape) for shape in HEAD.values())
    assert sum(expected.values()) == total + 4 * width + in_heads  # the released models have no registers


def test_without_layer_decay_there_are_five_groups() -> None:
    groups = parameter_groups(student("vit_small", "dino_head", depth=3), layer_decay=1.0, patch_embed_multiplier=0.2)
    assert set(counts(groups)) == {
        (1.0, 1.0, False),
        (1.0, 0.0, False),
        (0.2, 1.0, False),
        (0.2, 0.0, False),
        (1.0, 1.0, True),
    }


def test_every_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    named = list(student("vit_tiny", "dino_head", depth=2))
    frozen = {name: parameter for name, parameter in named if "last_layer.weight_g" in name or "blocks.1." in name}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    groups = parameter_groups(named, layer_decay=0.5, patch_embed_multiplier=1.0)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for name, parameter in named if name not in frozen}
    # Frozen blocks count in the depth: block 0 of 2 is two layers below the top, the embeddings three.
    assert {group["learning_rate_multiplier"] for group in groups} == {0.125, 0.25, 1.0}


def test_a_gated_backbone_without_registers_is_grouped_as_well() -> None:
    named = dict(student("vit_tiny", depth=1))
    gated = backbone.build("vit_tiny", patch_size=14, image_size=224, depth=1, feed_forward="swiglu", seed=None)
    named |= {f"backbone.{name}": parameter for name, parameter in gated.named_parameters()}
    groups = parameter_groups(named.items(), layer_decay=0.9, patch_embed_multiplier=1.0)
    without = {
        id(parameter) for group in groups for parameter in group["params"] if not group["weight_decay_multiplier"]
    }
    for part in ("w12", "w3"):
        assert id(named[f"backbone.blocks.0.mlp.{part}.bias"]) in without
        assert id(named[f"backbone.blocks.0.mlp.{part}.weight"]) not in without


@pytest.mark.parametrize(
    "name", ["backbone._orig_mod.norm.weight", "module.backbone.norm.weight", "backbone.head.weight"]
)
def test_a_parameter_name_without_a_rule_is_an_error(name: str) -> None:
    with pytest.raises(AssertionError, match="no rule for the parameter"):
        parameter_groups([(name, nn.Parameter(torch.zeros(1)))], layer_decay=0.9, patch_embed_multiplier=0.2)


def test_a_step_moves_each_group_by_its_scheduled_rate() -> None:
    named = [
        (name, nn.Parameter(torch.ones(shape)))
        for name, shape in (
            ("backbone.patch_embed.proj.weight", (2, 2)),
            ("backbone.blocks.0.attn.qkv.weight", (2, 2)),
            ("backbone.blocks.0.norm1.weight", (2,)),
            ("dino_head.mlp.0.weight", (2, 2)),
            ("dino_head.last_layer.weight_v", (2, 2)),
        )
    ]
    groups = parameter_groups(named, layer_decay=0.5, patch_embed_multiplier=0.2)
    optimizer = make_optimizer(OptimizerConfig(), groups)
    apply_schedules(optimizer, StepValues(0.1, 0.0, 0.3, 1.0, 1.0))
    for _, parameter in named:
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.step()
    # Adam's first step moves a weight by the learning rate. Before, decay subtracts learning rate x decay x weight.
    rates = [0.1 * 0.25 * 0.2, 0.1 * 0.5, 0.1 * 0.5, 0.1, 0.0]
    decays = [0.3, 0.3, 0.0, 0.3, 0.3]
    for (_, parameter), rate, decay in zip(named, rates, decays, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1 - rate * decay - rate))


def with_gradients(*values: list[float] | None) -> list[nn.Parameter]:
    parameters = []
    for value in values:
        parameter = nn.Parameter(torch.zeros(len(value or [0])))
        parameter.grad = None if value is None else torch.tensor(value)
        parameters.append(parameter)
    return parameters


def test_each_submodule_is_clipped_by_its_own_norm() -> None:
    large, small = with_gradients([3.0, 4.0], None, [12.0]), with_gradients([0.6], [0.8])
    norms = clip_gradients({"backbone": large, "dino_head": small, "ibot_head": with_gradients(None)}, 6.5)
    assert {name: norm.item() for name, norm in norms.items()} == {
        "backbone": 13.0,
        "dino_head": pytest.approx(1.0),
        "ibot_head": 0.0,
    }
    assert large[0].grad is not None and large[2].grad is not None
    assert large[0].grad.tolist() == pytest.approx([1.5, 2.0], rel=1e-6)
    assert large[2].grad.tolist() == pytest.approx([6.0], rel=1e-6)
    assert torch.cat([parameter.grad for parameter in small if parameter.grad is not None]).tolist() == [
        pytest.approx(0.6),
        pytest.approx(0.8),
    ]


def test_a_norm_that_is_not_finite_is_returned() -> None:
    parameters = with_gradients([1.0], [math.inf])
    norms = clip_gradients({"backbone": parameters, "dino_head": with_gradients([2.0])}, 3.0)
    assert norms["backbone"].isinf() and norms["dino_head"] == 2.0


def sharded_and_plain(rank: int, meeting: str) -> None:
    """On two ranks, clip and step a sharded network and an equal plain network."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    networks = [nn.Linear(5, 3), nn.Linear(5, 3)]
    for network in networks:  # 3 rows on 2 ranks: unequal shards
        for parameter in network.parameters():
            nn.init.trunc_normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    fully_shard(networks[0], mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    results = []
    for network in networks:
        names = [("dino_head.mlp.0." + name, parameter) for name, parameter in network.named_parameters()]
        optimizer = make_optimizer(OptimizerConfig(), parameter_groups(names, layer_decay=1, patch_embed_multiplier=1))
        network(torch.arange(10.0).reshape(2, 5)).square().sum().backward()
        (norm,) = clip_gradients({"dino_head": list(network.parameters())}, 3.0).values()
        assert type(norm) is torch.Tensor
        apply_schedules(optimizer, StepValues(0.1, 0.1, 0.3, 1.0, 1.0))
        optimizer.step()
        values = [
            parameter.full_tensor() if network is networks[0] else parameter for parameter in network.parameters()
        ]
        results.append([norm, *(value.detach() for value in values)])
    assert results[1][0] > 3.0
    torch.testing.assert_close(results[0], results[1])
    dist.destroy_process_group()


def test_sharded_parameters_are_clipped_and_stepped_as_plain_ones(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sharded_and_plain, (os.fspath(tmp_path / "meeting"),), nprocs=2)
