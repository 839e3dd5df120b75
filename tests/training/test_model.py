"""Student and teacher: first losses, gradients however the batch is divided, stochastic depth, EMA, distillation."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curation import weights
from curation.errors import WeightsError
from tests.training.builders import model_config, random_batch, split
from training import losses, model
from training.data import Batch
from training.model import BackboneConfig, build_model, student_loss, teacher_targets


def one_rank(tensor: Tensor) -> Tensor:
    return tensor


def run(trained: model.StudentTeacher, passes: list[Batch]) -> dict[str, float]:
    """The losses of one step without stochastic depth. Leaves the gradients in the student."""
    totals: dict[str, float] = {}
    targets = teacher_targets(trained, passes, 0.04, one_rank, one_rank)
    for batch, pass_targets in zip(passes, targets, strict=True):
        loss, terms = student_loss(trained, batch, pass_targets, None)
        (loss / len(passes)).backward()
        for name, value in {"loss": loss.detach(), **terms}.items():
            totals[name] = totals.get(name, 0.0) + value.item() / len(passes)
    return totals


def gradients(trained: model.StudentTeacher) -> dict[str, Tensor]:
    parameters = trained.student.named_parameters()
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


# Scores of unit vectors in d dimensions have a standard deviation of 1/sqrt(d). Divided by the temperatures, it is s
# for the student (0.1) and t for the teacher (0.04). Sinkhorn-Knopp's first targets are uniform, so the cross-entropy
# of K normal scores is ln K + s^2/2. With a center of 0, the equal teacher prefers the student's prototypes: s t less.
S, T = 1 / math.sqrt(256) / 0.1, 1 / math.sqrt(256) / 0.04


@pytest.mark.parametrize(("centering", "beyond"), [("sinkhorn_knopp", S * S / 2), ("ema", S * S / 2 - S * T)])
def test_first_losses_agree_with_theory(centering: str, beyond: float) -> None:
    head = {"num_prototypes": 65_536, "bottleneck_dim": 256, "hidden_dim": 64}
    backbone = {"name": "vit_tiny", "depth": 2, "patch_size": 8, "image_size": 32}
    config = model_config(backbone=backbone, dino_head=head, ibot_head=None, objective={"centering": centering})
    terms = run(build_model(config, seed=0), [random_batch(4, num_local=8)])
    # ln K = 11.09, over 16 and 2 of 18 pairs; half of the global crops are masked.
    nats = math.log(65_536) + beyond
    assert terms["dino_local"] == pytest.approx(nats * 16 / 18, rel=0.01)
    assert terms["dino_global"] == pytest.approx(nats * 2 / 18, rel=0.01)
    # The student's output for a masked patch does not resemble the teacher's for the visible one.
    assert terms["ibot"] == pytest.approx((math.log(65_536) + S * S / 2) / 2, rel=0.01)
    assert terms["loss"] == pytest.approx(
        terms["dino_local"] + terms["dino_global"] + terms["ibot"] + 0.1 * terms["koleo"], rel=1e-5
    )


def test_there_are_18_pairs_of_crops() -> None:
    pairs = model.crop_pair_weights(10)
    assert (pairs > 0).sum() == 18 and pairs[0, 0] == pairs[1, 1] == 0
    torch.testing.assert_close(pairs[pairs > 0], torch.full((18,), 1 / 18))


def test_the_loss_agrees_with_whole_matrices_pair_by_pair() -> None:
    trained, batch = build_model(model_config(), seed=0), random_batch(4)
    actual = run(trained, [batch])
    with torch.no_grad():
        teacher = trained.teacher([batch.crops[0]], None, batch.masked_indices)
        student = trained.student(list(batch.crops), batch.masks, batch.masked_indices)
    targets = losses.sinkhorn_knopp(teacher.image_features @ teacher.image_prototypes.T, 0.04).unflatten(0, (2, 4))
    scores = (student.image_features @ student.image_prototypes.T).unflatten(0, (-1, 4))
    terms = [losses.dino_loss(scores[a], targets[b]) for a in range(len(scores)) for b in range(2) if a != b]
    assert actual["dino_global"] + actual["dino_local"] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    patch_targets = losses.sinkhorn_knopp(teacher.patch_features @ teacher.patch_prototypes.T, 0.04)
    patches = losses.ibot_loss(
        student.patch_features @ student.patch_prototypes.T, patch_targets, batch.masked_weights, 8
    )
    assert actual["ibot"] == pytest.approx(patches.item(), rel=1e-4)
    koleo = losses.koleo_loss(student.cls_tokens[0][:4]) + losses.koleo_loss(student.cls_tokens[0][4:])
    assert actual["koleo"] == pytest.approx(koleo.item(), rel=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("centering", ["ema", "sinkhorn_knopp"])
def test_passes_add_up_to_the_whole_batch(centering: str, shared: bool) -> None:
    objective = {"centering": centering, "koleo_images": 2, "rows_per_chunk": 3}
    config = model_config(objective=objective, **({"ibot_head": None} if shared else {}))
    batch = random_batch(8)
    whole, divided = build_model(config, seed=0), build_model(config, seed=0)
    assert run(divided, split(batch, 4)) == pytest.approx(run(whole, [batch]), rel=1e-5)
    expected = gradients(whole)
    for name, gradient in gradients(divided).items():
        tolerance = 1e-5 * max(1.0, 0.1 * expected[name].abs().max().item())  # of sums in another order
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=tolerance, msg=name)


def test_dino_alone_and_ibot_alone() -> None:
    batch = random_batch(4)
    dino = build_model(model_config(objective={"ibot_weight": 0, "koleo_weight": 0}), seed=0)
    assert run(dino, [batch]).keys() == {"loss", "dino_global", "dino_local"}
    ibot = build_model(model_config(objective={"dino_weight": 0, "koleo_weight": 0}), seed=0)
    assert run(ibot, [batch]).keys() == {"loss", "ibot"}
    assert not any(value.any() for name, value in gradients(ibot).items() if name.startswith("dino_head"))
    with pytest.raises(ValueError, match="at least one must be above 0"):
        model_config(objective={"dino_weight": 0, "ibot_weight": 0})


def test_the_ema_after_three_steps() -> None:
    trained = build_model(model_config(), seed=0)
    start = [parameter.clone() for parameter in trained.average.parameters()]
    student = list(trained.student.parameters())
    for _ in range(3):
        with torch.no_grad():
            for parameter in student:
                parameter.add_(1.0)
        model.update_ema(trained.average, trained.student, 0.9)
    # The student was start + 1, + 2, + 3, with weights of 0.1 * 0.81, 0.1 * 0.9 and 0.1.
    for parameter, before in zip(trained.average.parameters(), start, strict=True):
        torch.testing.assert_close(parameter, before + 0.081 + 0.18 + 0.3)
        assert not parameter.requires_grad


def test_the_teacher_gets_no_gradients() -> None:
    trained = build_model(model_config(), seed=0)
    run(trained, [random_batch(4)])
    assert all(parameter.grad is None for parameter in trained.teacher.parameters())
    assert gradients(trained).keys() == dict(trained.student.named_parameters()).keys()


def test_stochastic_depth_keeps_the_stated_number_of_crops() -> None:
    config = BackboneConfig(name="vit_tiny", patch_size=8, image_size=32, drop_path=0.4)
    kept = model.draw_kept(config, 3, (20, 7), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert kept is not None and len(kept) == 3
    for branches in kept:
        for groups in branches:
            assert [len(rows) for rows in groups] == [12, 4]  # int(20 * 0.6), int(7 * 0.6)
            assert all(len(set(rows.tolist())) == len(rows) for rows in groups)
    again = model.draw_kept(config, 3, (20, 7), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert again is not None and torch.equal(again[2][1][0], kept[2][1][0])
    one = model.draw_kept(config, 1, (1,), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert one is not None and len(one[0][0][0]) == 1
    none = config.model_copy(update={"drop_path": 0.0})
    assert model.draw_kept(none, 3, (20, 7), torch.Generator(), torch.device("cpu")) is None


def test_stochastic_depth_saves_the_operations_of_dropped_crops() -> None:
    student = build_model(model_config(), seed=0).student.backbone
    crops = [torch.randn(20, 3, 32, 32)]

    def flops(drop_path: float) -> int:
        config = BackboneConfig(name="vit_tiny", patch_size=8, image_size=32, drop_path=drop_path)
        kept = model.draw_kept(config, 2, (20,), torch.Generator().manual_seed(0), torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            student(crops, is_training=True, masks=[None], kept=kept)
        return counter.get_total_flops()

    whole, embedding = flops(0.0), 2 * 20 * 16 * 3 * 8 * 8 * 192
    assert (flops(0.4) - embedding) / (whole - embedding) == pytest.approx(0.6, abs=0.001)


def test_stochastic_depth_has_the_right_mean() -> None:
    student = build_model(model_config(), seed=0).student.backbone
    with torch.no_grad():
        for block in student.blocks:
            block.ls1.gamma.fill_(1)  # at 1e-5 the branches would have no visible effect
        config = BackboneConfig(name="vit_tiny", patch_size=8, image_size=32, drop_path=0.5)
        x = torch.randn(4, 5, 192)
        repeated = x.repeat(400, 1, 1)
        generator = torch.Generator().manual_seed(0)
        kept = model.draw_kept(config, 1, (len(repeated),), generator, torch.device("cpu"))[0]  # type: ignore[index]
        draws = student.blocks[0]([repeated], kept)[0]
        expected = student.blocks[0](x)
    error = draws.unflatten(0, (400, 4)).mean(0) - expected
    assert error.abs().mean() < 0.1 * (expected - x).abs().mean()


@pytest.mark.parametrize(("name", "patch_size", "side"), [("vit_tiny", 16, 224), ("vit_giant", 14, 98)])
def test_forward_flops_agree_with_torchs_counter(name: str, patch_size: int, side: int) -> None:
    config = BackboneConfig(name=name, patch_size=patch_size, image_size=side, depth=2)  # type: ignore[arg-type]
    vit = model.build_backbone(config, seed=0)
    # The counter does not count the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        vit(torch.randn(1, 3, side, side))
    assert model.forward_flops(config, side) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_model_memory_is_near_the_networks_size() -> None:
    config = model_config(backbone={"name": "vit_tiny", "patch_size": 16, "image_size": 224}, ibot_head=None)
    trained = build_model(config, seed=0)
    weights_alone = sum(parameter.numel() * 4 for parameter in trained.student.parameters())
    needed = model.model_memory(config, num_ranks=1)
    assert needed["backbone"] + needed["heads"] == pytest.approx(5 * weights_alone, rel=0.1)
    assert model.model_memory(config, num_ranks=4)["heads"] == needed["heads"] // 4


def test_starting_from_a_checkpoint_resizes_its_positions(tmp_path: Path) -> None:
    small = BackboneConfig(name="vit_tiny", depth=2, patch_size=8, image_size=32)
    vit = model.build_backbone(small, seed=1)
    weights.save(vit, str(tmp_path / "small.pth"))
    config = {"name": "vit_tiny", "depth": 2, "patch_size": 8, "image_size": 48, "weights": str(tmp_path / "small.pth")}
    large = model.build_backbone(BackboneConfig.model_validate(config), seed=0)
    assert large.pos_embed.shape == (1, 1 + 36, 192)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(large(images), vit(images))  # the small model interpolates its positions itself
    assert torch.equal(large.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)


def test_config_errors() -> None:
    with pytest.raises(ValueError, match="distillation needs 0"):
        model_config(
            backbone={"name": "vit_tiny", "patch_size": 8, "image_size": 32, "drop_path": 0.1},
            distillation={
                "backbone": {"name": "vit_tiny", "patch_size": 8, "image_size": 32, "weights": "teacher.pth"},
                "heads": "heads.pth",
            },
        )
    with pytest.raises(ValueError, match="patches of 16 pixels and the student of 8"):
        model_config(
            distillation={
                "backbone": {"name": "vit_tiny", "patch_size": 16, "image_size": 32, "weights": "teacher.pth"},
                "heads": "heads.pth",
            }
        )
    with pytest.raises(ValueError, match="must be a trained network"):
        model_config(
            distillation={"backbone": {"name": "vit_tiny", "patch_size": 8, "image_size": 32}, "heads": "heads.pth"}
        )


def test_weights_of_another_interpolation_are_refused(tmp_path: Path) -> None:
    values = {"name": "vit_tiny", "depth": 1, "patch_size": 8, "image_size": 32}
    plain = model.build_backbone(BackboneConfig.model_validate(values | {"position_interpolation": "plain"}), seed=0)
    weights.save(plain, str(tmp_path / "plain.pth"))
    config = BackboneConfig.model_validate(values | {"image_size": 64, "weights": str(tmp_path / "plain.pth")})
    assert config.position_interpolation == "offset"
    with pytest.raises(WeightsError, match=r"plain\.pth: trained with position_interpolation 'plain', and the config"):
        model.build_backbone(config, seed=0)
    same = model.build_backbone(config.model_copy(update={"position_interpolation": "plain"}), seed=0)
    plain.resize_positions(8)
    assert torch.equal(same.pos_embed, plain.pos_embed)
