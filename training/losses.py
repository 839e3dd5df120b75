"""The objectives of DINOv2: on whole matrices of scores, and for the trainer on a chunk of rows at a time.

DINO pulls the student's probabilities for a crop towards the teacher's for another crop of the same image. iBOT does so
for the patches that are hidden from the student. KoLeo spreads the features of a batch apart.

Two ways of turning the teacher's scores into probabilities prevent collapse. Sinkhorn-Knopp uses all prototypes equally
often over the whole batch; centering subtracts the EMA of the scores. Both reduce to one number a prototype, added
before the softmax:

    p = softmax(logits / temperature + bias)

So only `sinkhorn_bias` or `centering_bias` (K,) is shared by the passes and ranks of a batch. The (rows, K) scores are
never in memory beyond one chunk.

Shapes:
    n  images (or patches of the patch-level loss)    K  prototypes    d  bottleneck_dim    D  embed_dim
    G  student crops    H  teacher crops    (of one image; 1 and 1 for patches)

Source: Caron et al., DINO (arXiv 2104.14294); Zhou et al., iBOT (2111.07832); Caron et al., SwAV (2006.09882) for
Sinkhorn-Knopp; Sablayrolles et al., Spreading vectors (1806.03198) for KoLeo; Oquab et al., DINOv2 (2304.07193).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Combines a tensor over all ranks, such as curation.engine.ranks.sum_over_ranks.
Reduce = Callable[[Tensor], Tensor]

# Below this distance two unit vectors in float32 are equal up to rounding, and their difference has no direction.
MIN_DISTANCE = 1e-6
KOLEO_EPSILON = 1e-8  # cited: DINOv2
MIN_MASS = 1e-30  # assumed: far below the smallest share of a prototype that float32 distinguishes from none


def _one_rank(tensor: Tensor) -> Tensor:
    return tensor


# --- on whole matrices --------------------------------------------------------------------------------------------


def sinkhorn_knopp(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """The teacher's probabilities (n, K) for its scores (n, K): rows sum to 1, and columns are nearly equal.

        Q = exp(logits / temperature)
        repeat: divide columns by their sums, then rows by theirs

    Computed on logarithms, so that no score overflows. Source: SwAV, section 3.1 and appendix A.
    """
    bias = _sinkhorn(lambda: iter([logits.float()]), logits.shape[1], logits.device, temperature, num_iterations)
    return functional.softmax(logits.float() / temperature + bias, dim=-1)  # (n, K)


def dino_loss(student_logits: Tensor, teacher_probabilities: Tensor, temperature: float = 0.1) -> Tensor:
    """The mean cross-entropy between the rows of (n, K) student scores and (n, K) teacher probabilities."""
    return _cross_entropy(student_logits, teacher_probabilities, temperature).mean()


def ibot_loss(
    student_logits: Tensor, teacher_probabilities: Tensor, weights: Tensor, num_crops: int, temperature: float = 0.1
) -> Tensor:
    """The cross-entropy of masked patches, weighted by (n,), divided by the number of crops, masked and unmasked.

    With weights of 1 / (masked patches of the crop), each masked crop contributes the mean over its masked patches.
    """
    return (_cross_entropy(student_logits, teacher_probabilities, temperature) * weights).sum() / num_crops


def koleo_loss(features: Tensor, group_size: int | None = None) -> Tensor:
    """The mean of -log(distance to the nearest neighbour) over the features (n, D), scaled to unit length.

        loss = mean over i of -log(min over j != i of |x_i - x_j|)

    Neighbours come from the same group of `group_size` consecutive rows (all rows when None). The size divides n and is
    2 or more. Equal features have no gradient; their distance counts as MIN_DISTANCE.
    Source: Sablayrolles et al., equation 2, as DINOv2 uses it.
    """
    size = len(features) if group_size is None else group_size
    assert size > 1 and len(features) % size == 0, f"{len(features)} features in groups of {size}"
    unit = functional.normalize(features.float(), dim=-1).reshape(-1, size, features.shape[-1])  # (groups, size, D)
    with torch.no_grad(), torch.autocast(unit.device.type, enabled=False):
        similarity = unit @ unit.transpose(1, 2)  # (groups, size, size)
        similarity.diagonal(dim1=1, dim2=2).fill_(-2)  # below every cosine
        nearest = similarity.argmax(-1, keepdim=True).expand_as(unit)  # (groups, size, D)
    squares = (unit - unit.gather(1, nearest)).square().sum(-1)  # (groups, size)
    # The square is clamped, not the root: the gradient of a root of 0 is infinite, and times 0 it would be NaN.
    distance = squares.clamp_min(MIN_DISTANCE**2).sqrt()
    return -(distance + KOLEO_EPSILON).log().mean()


def _cross_entropy(student_logits: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    return -(probabilities * functional.log_softmax(student_logits.float() / temperature, dim=-1)).sum(-1)  # (n,)


# --- a chunk at a time --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Targets:
    """The teacher's probabilities for n images or patches, kept as the small factors of its scores."""

    features: Tensor
    """(H, n, d), unit vectors."""
    prototypes: Tensor
    """(K, d)."""
    bias: Tensor
    """(K,), by `sinkhorn_bias` or `centering_bias`."""
    temperature: float

    def probabilities(self, rows: slice = slice(None)) -> Tensor:
        """(H, rows, K), float32."""
        return _probabilities(self.features[:, rows] @ self.prototypes.T, self.temperature, self.bias)


@torch.no_grad()
def sinkhorn_bias(
    features: Tensor,
    prototypes: Tensor,
    temperature: float,
    num_iterations: int = 3,
    *,
    rows_per_chunk: int,
    sum_over_ranks: Reduce = _one_rank,
    max_over_ranks: Reduce = _one_rank,
) -> Tensor:
    """The bias (K,) with which a softmax gives the result of Sinkhorn-Knopp, over the features (n, d) of all ranks.

    Each iteration computes the scores again, `rows_per_chunk` rows at a time. If all rows fit into one chunk, the
    scores are computed once. A rank may have no rows.
    """
    held = [(features @ prototypes.T).float()] if len(features) <= rows_per_chunk else None
    return _sinkhorn(
        lambda: iter(held or ((chunk @ prototypes.T).float() for chunk in torch.split(features, rows_per_chunk))),
        len(prototypes),
        features.device,
        temperature,
        num_iterations,
        sum_over_ranks,
        max_over_ranks,
    )


def _sinkhorn(
    scores: Callable[[], Iterator[Tensor]],
    num_prototypes: int,
    device: torch.device,
    temperature: float,
    num_iterations: int,
    sum_over_ranks: Reduce = _one_rank,
    max_over_ranks: Reduce = _one_rank,
) -> Tensor:
    """log a (K,) of Q = diag(b) exp(scores / T) diag(a), where a makes column sums equal and b row sums, in turns.

    Only log a is kept, because the softmax that follows is the last turn of b. The first turn of a sees b = 1.
    scores: gives the (rows, K) chunks anew at each call.
    """
    assert num_iterations > 0
    log_mass = torch.full((num_prototypes,), -math.inf, device=device)
    for chunk in scores():
        if len(chunk):
            log_mass = torch.logaddexp(log_mass, torch.logsumexp(chunk / temperature, dim=0))
    largest = max_over_ranks(log_mass)
    largest = torch.where(largest.isfinite(), largest, 0)  # infinite if no rank has a row
    bias = -(sum_over_ranks((log_mass - largest).exp()).clamp_min(MIN_MASS).log() + largest)
    for _ in range(num_iterations - 1):
        mass = torch.zeros(num_prototypes, device=device)
        for chunk in scores():
            mass += _probabilities(chunk, temperature, bias).sum(0)
        bias = bias - sum_over_ranks(mass).clamp_min(MIN_MASS).log()
    return bias


def centering_bias(center: Tensor, temperature: float) -> Tensor:
    """The bias (K,) that subtracts the center (K,) from the scores before the softmax, as DINO does."""
    return -center / temperature


def new_center(
    center: Tensor, features: Tensor, prototypes: Tensor, momentum: float, sum_over_ranks: Reduce = _one_rank
) -> Tensor:
    """The center (K,), the EMA of the teacher's scores, after a step with features (n, d) and prototypes (K, d).

    The mean score is the product of the mean feature and the prototypes, so no score is computed. Without rows on any
    rank the center stays.
    """
    total = sum_over_ranks(torch.cat([features.float().sum(0), features.new_full((1,), len(features)).float()]))
    if total[-1] == 0:
        return center
    return center * momentum + (prototypes.float() @ (total[:-1] / total[-1])) * (1 - momentum)


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    targets: Targets,
    pair_weights: Tensor,
    row_weights: Tensor,
    temperature: float,
    *,
    rows_per_chunk: int,
) -> tuple[Tensor, Tensor]:
    """The weighted cross-entropy of the student's features (G, n, d) and prototypes (K, d) against the targets.

        q = softmax(features @ prototypes.T / temperature)     student, (G, n, K)
        p = targets.probabilities()                            teacher, (H, n, K)
        loss = sum over g, h, r of pair_weights[g, h] * row_weights[r] * -sum over k of p[h, r, k] * log q[g, r, k]

    pair_weights: (G, H). row_weights: (n,).
    Gives the loss, and the loss of each student crop (G,) without gradients.

    The gradients are computed here, in the forward pass, together with the loss. Scores exist for `rows_per_chunk` rows
    of one crop at a time.
    """
    with torch.no_grad():
        crop_losses = torch.zeros(len(features), device=features.device)
        feature_gradients = torch.zeros_like(features, dtype=torch.float32)
        prototype_gradients = torch.zeros_like(prototypes, dtype=torch.float32)
        weights_of_crop = pair_weights.tolist()
        for start in range(0, features.shape[1], rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            probabilities, weights = targets.probabilities(rows), row_weights[rows, None]  # (H, rows, K), (rows, 1)
            for crop, chunk in enumerate(features[:, rows]):  # chunk: (rows, d)
                if crop == 0 or weights_of_crop[crop] != weights_of_crop[crop - 1]:
                    target = _weighted_sum(probabilities, weights_of_crop[crop])  # (rows, K)
                # Each row of `target` sums to `total`. So the cross-entropy needs no matrix of logarithms, and its
                # gradient by the scores is total * softmax - target. The factors of a row are applied to the smaller
                # matrices below.
                total = sum(weights_of_crop[crop])
                scores = (chunk / temperature @ prototypes.T).float()  # (rows, K)
                log_sum = torch.logsumexp(scores, dim=-1, keepdim=True)  # (rows, 1)
                crop_losses[crop] += (weights * (total * log_sum - (target * scores).sum(-1, keepdim=True))).sum()
                gradient = scores.sub_(log_sum - math.log(total)).exp_().sub_(target).to(chunk.dtype)  # (rows, K)
                scale = weights / temperature
                feature_gradients[crop, rows] = (gradient @ prototypes).float() * scale
                prototype_gradients += gradient.T @ (chunk * scale).to(chunk.dtype)
        gradients = feature_gradients.to(features.dtype), prototype_gradients.to(prototypes.dtype)
    loss: Tensor = _WithGradients.apply(  # type: ignore[no-untyped-call]  # torch's own is untyped
        features, prototypes, crop_losses.sum(), *gradients
    )
    return loss, crop_losses


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients by the features and the prototypes are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        loss: Tensor,
        feature_gradients: Tensor,
        prototype_gradients: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(feature_gradients, prototype_gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        feature_gradients, prototype_gradients = ctx.saved_tensors
        return gradients[0] * feature_gradients, gradients[0] * prototype_gradients, None, None, None


@torch.no_grad()
def entropies(targets: Targets, max_rows: int) -> tuple[Tensor, Tensor]:
    """The mean entropy of the first `max_rows` rows of probabilities, and the entropy of their mean, both in nats.

    The first falls towards 0 when each row has one prototype. The second falls from ln K towards 0 when all rows have
    the same one.
    """
    probabilities = targets.probabilities(slice(max_rows)).flatten(0, 1)  # (H * rows, K)
    mean = probabilities.mean(0)  # (K,)
    return -torch.xlogy(probabilities, probabilities).sum(-1).mean(), -torch.xlogy(mean, mean).sum()


def _probabilities(scores: Tensor, temperature: float, bias: Tensor) -> Tensor:
    return functional.softmax(torch.add(bias, scores.float(), alpha=1 / temperature), dim=-1)


def _weighted_sum(probabilities: Tensor, weights: list[float]) -> Tensor:
    """The (n, K) sum of the (H, n, K) probabilities. Probabilities of weight 0 cost nothing."""
    total: Tensor | None = None
    for weight, crop_probabilities in zip(weights, probabilities, strict=True):
        if weight:
            total = crop_probabilities * weight if total is None else total.add_(crop_probabilities, alpha=weight)
    assert total is not None, "a student crop without a teacher crop"
    return total
