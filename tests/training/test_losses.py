"""The objectives against the papers' formulas in float64, values by hand, and whole matrices against chunks."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training import losses
from training.losses import Targets


def unit(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def published_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """SwAV's appendix A, literally: exponentials, then columns and rows in turns."""
    q = torch.exp(logits.double() / temperature).T
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


@pytest.mark.parametrize("iterations", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_sinkhorn_agrees_with_the_paper(temperature: float, iterations: int) -> None:
    logits = unit(40, 8) @ unit(25, 8, seed=1).T
    probabilities = losses.sinkhorn_knopp(logits, temperature, iterations)
    torch.testing.assert_close(
        probabilities.double(), published_sinkhorn(logits, temperature, iterations), rtol=1e-4, atol=1e-7
    )


def test_sinkhorn_makes_rows_sum_to_one_and_columns_equal() -> None:
    probabilities = losses.sinkhorn_knopp(unit(64, 16) @ unit(10, 16, seed=1).T, 0.2, 100)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(64))
    torch.testing.assert_close(probabilities.sum(0), torch.full((10,), 6.4), rtol=1e-3, atol=0)
    three = losses.sinkhorn_knopp(unit(64, 16) @ unit(10, 16, seed=1).T, 0.2).sum(0)
    assert (three - 6.4).abs().max() < 0.2 * 6.4  # three iterations come near


def test_sinkhorn_is_finite_where_exp_overflows() -> None:
    logits = 50 * unit(12, 8) @ unit(6, 8, seed=1).T  # exp(50 / 0.04) overflows
    assert torch.exp(logits / 0.04).isinf().any()
    probabilities = losses.sinkhorn_knopp(logits, 0.04)
    assert probabilities.isfinite().all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))
    shifted = losses.sinkhorn_knopp(logits + 1000, 0.04)
    torch.testing.assert_close(shifted, probabilities, rtol=0.05, atol=1e-3)


def test_equal_images_are_spread_evenly() -> None:
    probabilities = losses.sinkhorn_knopp(torch.ones(5, 3) * torch.tensor([3.0, 0.0, -2.0]), 0.1)
    torch.testing.assert_close(probabilities, torch.full((5, 3), 1 / 3))


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 40, 1000])
def test_sinkhorn_in_chunks_agrees_with_whole_matrices(rows_per_chunk: int) -> None:
    features, prototypes = unit(40, 8), unit(25, 8, seed=1)
    bias = losses.sinkhorn_bias(features, prototypes, 0.05, rows_per_chunk=rows_per_chunk)
    probabilities = Targets(features[None], prototypes, bias, 0.05).probabilities()[0]
    torch.testing.assert_close(
        probabilities, losses.sinkhorn_knopp(features @ prototypes.T, 0.05), rtol=1e-4, atol=1e-7
    )


def test_sinkhorn_without_rows_is_finite() -> None:
    bias = losses.sinkhorn_bias(torch.empty(0, 8), unit(25, 8), 0.05, rows_per_chunk=4)
    assert bias.isfinite().all()


def test_dino_loss_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.1], [0.2, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    # At temperature 0.1 the scores are (0, 1) and (2, 0).
    first = math.log(1 + math.e)
    second = 0.5 * math.log(1 + math.exp(-2)) + 0.5 * (2 + math.log(1 + math.exp(-2)))
    assert losses.dino_loss(student, teacher).item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_ibot_loss_counts_every_crop_and_weighs_by_mask() -> None:
    student, teacher = torch.zeros(3, 4), torch.full((3, 4), 0.25)
    # Two crops of four are masked, one with 2 patches and one with 1. Each masked crop contributes ln 4.
    weights = torch.tensor([0.5, 0.5, 1.0])
    assert losses.ibot_loss(student, teacher, weights, num_crops=4).item() == pytest.approx(2 * math.log(4) / 4)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 5, 100])
def test_chunks_give_the_loss_and_gradients_of_whole_matrices(rows_per_chunk: int) -> None:
    crops, rows, prototypes = 6, 5, 17
    features = unit(crops, rows, 8).requires_grad_()
    vectors = torch.randn(prototypes, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    targets = Targets(unit(2, rows, 8, seed=3), unit(prototypes, 8, seed=4), torch.randn(prototypes), 0.07)
    pairs = torch.rand(crops, 2, generator=torch.Generator().manual_seed(5))
    pairs[0, 0] = pairs[1, 1] = 0
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(6))

    loss, crop_losses = losses.prototype_cross_entropy(
        features, vectors, targets, pairs, weights, 0.1, rows_per_chunk=rows_per_chunk
    )
    gradients = torch.autograd.grad(3 * loss, (features, vectors))

    terms = torch.stack(
        [
            sum(
                pairs[crop, other]
                * (
                    weights
                    * -(
                        targets.probabilities()[other]
                        * functional.log_softmax(features[crop] @ vectors.T / 0.1, dim=-1)
                    ).sum(-1)
                ).sum()
                for other in range(2)
            )
            for crop in range(crops)
        ]
    )
    expected = torch.autograd.grad(3 * terms.sum(), (features, vectors))
    torch.testing.assert_close(crop_losses, terms.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, terms.sum(), rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_without_masked_patches_the_loss_is_zero() -> None:
    features, prototypes = torch.empty(1, 0, 8, requires_grad=True), unit(9, 8).requires_grad_()
    targets = Targets(torch.empty(1, 0, 8), unit(9, 8), torch.zeros(9), 0.07)
    loss, _ = losses.prototype_cross_entropy(
        features, prototypes, targets, torch.ones(1, 1), torch.empty(0), 0.1, rows_per_chunk=4
    )
    loss.backward()
    assert loss.item() == 0 and prototypes.grad is not None and not prototypes.grad.any()


def test_koleo_of_known_points() -> None:
    # On the circle at 0, 90 and 180 degrees: the nearest neighbours are all 90 degrees away, at the distance sqrt 2.
    points = torch.tensor([[3.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    assert losses.koleo_loss(points).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-6)
    # At 0 and 60 degrees the distance is 1; groups do not see each other.
    sixty = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    assert losses.koleo_loss(sixty).item() == pytest.approx(0, abs=1e-6)
    assert losses.koleo_loss(torch.cat([sixty, -sixty]), group_size=2).item() == pytest.approx(0, abs=1e-6)


def test_koleo_of_equal_images_is_finite_and_has_no_gradient() -> None:
    equal = unit(1, 16).repeat(4, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(losses.koleo_loss(equal), equal)
    assert not gradient.any()
    features = torch.cat([equal.detach(), unit(2, 16, seed=1)]).requires_grad_()
    loss = losses.koleo_loss(features)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite() and gradient.isfinite().all() and gradient[4:].any()


def test_a_step_against_koleos_gradient_lowers_it() -> None:
    features = unit(8, 4).requires_grad_()
    before = losses.koleo_loss(features)
    (gradient,) = torch.autograd.grad(before, features)
    assert losses.koleo_loss(features - 0.01 * gradient) < before


def test_the_center_is_the_ema_of_the_scores() -> None:
    features, prototypes, center = unit(30, 8), unit(12, 8, seed=1), torch.rand(12)
    updated = losses.new_center(center, features, prototypes, 0.9)
    torch.testing.assert_close(updated, 0.9 * center + 0.1 * (features @ prototypes.T).mean(0))
    assert torch.equal(losses.new_center(center, features[:0], prototypes, 0.9), center)
    bias = losses.centering_bias(center, 0.04)
    torch.testing.assert_close(
        Targets(features[None], prototypes, bias, 0.04).probabilities()[0],
        functional.softmax((features @ prototypes.T - center) / 0.04, dim=-1),
    )


def test_entropies_of_certain_and_equal_rows() -> None:
    certain = Targets(torch.eye(4)[None] * 100, torch.eye(4), torch.zeros(4), 1.0)  # each row has another prototype
    mean_entropy, entropy_of_mean = losses.entropies(certain, 100)
    assert mean_entropy.item() == pytest.approx(0, abs=1e-6) and entropy_of_mean.item() == pytest.approx(math.log(4))
    same = Targets(torch.eye(4)[:1].expand(4, 4)[None] * 100, torch.eye(4), torch.zeros(4), 1.0)
    assert losses.entropies(same, 100)[1].item() == pytest.approx(0, abs=1e-6)
