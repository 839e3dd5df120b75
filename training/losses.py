"""The objectives of DINOv2, on whole matrices of scores and, for the trainer, a chunk of rows at a time.

The student's probabilities for a crop are pulled towards the teacher's for another crop of the same image (DINO), and
for the patches that the student was not shown (iBOT). What keeps all from becoming equal is how the teacher's scores
are made into probabilities: Sinkhorn-Knopp lets every prototype be used as much as any other over the whole batch,
centering subtracts a running mean. Both come down to one number a prototype that is added before the softmax:

    p = softmax(logits / temperature + bias)

so `sinkhorn_bias` and `centering_bias` are all that a batch has to agree upon, over ranks and accumulated passes, and
no more than a chunk of the (rows, K) scores is ever there. KoLeo spreads the features of a batch apart.

Shapes:
    n  images (or masked patches)    K  prototypes    d  bottleneck_dim    D  embed_dim
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

Reduce = Callable[[Tensor], Tensor]

# Below this distance two unit vectors in float32 are equal but for rounding, and their difference points nowhere.
LEAST_DISTANCE = 1e-6
KOLEO_EPSILON = 1e-8  # cited: DINOv2
LEAST_MASS = 1e-30  # assumed: far below the share of any prototype that float32 can still tell from none


def _alone(tensor: Tensor) -> Tensor:
    return tensor


# --- on whole matrices --------------------------------------------------------------------------------------------


def sinkhorn_knopp(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """The teacher's probabilities (n, K) for its scores (n, K): rows sum to 1, and columns are nearly equal.

    Computed on logarithms, so no score is too large. Source: SwAV, section 3.1 and appendix A.
    """
    bias = _sinkhorn(lambda: iter([logits.float()]), logits.shape[1], logits.device, temperature, num_iterations)
    return functional.softmax(logits.float() / temperature + bias, dim=-1)


def dino_loss(student_logits: Tensor, teacher_probabilities: Tensor, temperature: float = 0.1) -> Tensor:
    """The mean cross-entropy between the rows of (n, K) student scores and (n, K) teacher probabilities."""
    return _cross_entropy(student_logits, teacher_probabilities, temperature).mean()


def ibot_loss(
    student_logits: Tensor, teacher_probabilities: Tensor, weights: Tensor, num_crops: int, temperature: float = 0.1
) -> Tensor:
    """The cross-entropy of masked patches, weighted (n,) and divided by the number of crops, masked ones or not.

    With weights of 1 / (masked patches of the crop), it is the sum over masked crops of their mean, over all crops.
    """
    return (_cross_entropy(student_logits, teacher_probabilities, temperature) * weights).sum() / num_crops


def koleo_loss(features: Tensor, group_size: int | None = None) -> Tensor:
    """How close the nearest neighbours among the features (n, D) lie: the mean of -log(distance) of unit vectors.

    Neighbours are looked for among `group_size` consecutive rows (all of them when None), which divides n and is 2 or
    more. Equal features pull no one anywhere: their distance counts as LEAST_DISTANCE, without a gradient.
    Source: Sablayrolles et al., equation 2, as DINOv2 uses it.
    """
    size = len(features) if group_size is None else group_size
    assert size > 1 and len(features) % size == 0, f"{len(features)} features in groups of {size}"
    unit = functional.normalize(features.float(), dim=-1).reshape(-1, size, features.shape[-1])
    with torch.no_grad(), torch.autocast(unit.device.type, enabled=False):
        similarity = unit @ unit.transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).fill_(-2)
        nearest = similarity.argmax(-1, keepdim=True).expand_as(unit)
    squares = (unit - unit.gather(1, nearest)).square().sum(-1)
    # The root of 0 has no gradient, and where() would still multiply it: so the square is held up, not the root.
    distance = squares.clamp_min(LEAST_DISTANCE**2).sqrt()
    return -(distance + KOLEO_EPSILON).log().mean()


def _cross_entropy(student_logits: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """(n,)"""
    return -(probabilities * functional.log_softmax(student_logits.float() / temperature, dim=-1)).sum(-1)


# --- a chunk at a time --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Targets:
    """What the teacher says of n images or patches, in as little memory as it can be said."""

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
    sum_over_ranks: Reduce = _alone,
    max_over_ranks: Reduce = _alone,
) -> Tensor:
    """The bias (K,) that makes a softmax give what Sinkhorn-Knopp gives, over the features (n, d) of all ranks.

    Scores are made anew in each iteration, `rows_per_chunk` rows at a time; where there are no more rows than that,
    once. A rank may have no rows.
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
    sum_over_ranks: Reduce = _alone,
    max_over_ranks: Reduce = _alone,
) -> Tensor:
    """With Q = diag(b) exp(scores / T) diag(a), in turns b makes rows and a makes columns sum to the same; the softmax
    that follows is the last turn of b, so log a is all that is kept. The first turn of a sees b = 1."""
    assert num_iterations > 0
    mass = torch.full((num_prototypes,), -math.inf, device=device)
    for chunk in scores():
        if len(chunk):
            mass = torch.logaddexp(mass, torch.logsumexp(chunk / temperature, dim=0))
    largest = max_over_ranks(mass)
    largest = torch.where(largest.isfinite(), largest, 0)  # no rank has a row
    bias = -(sum_over_ranks((mass - largest).exp()).clamp_min(LEAST_MASS).log() + largest)
    for _ in range(num_iterations - 1):
        mass = torch.zeros(num_prototypes, device=device)
        for chunk in scores():
            mass += _probabilities(chunk, temperature, bias).sum(0)
        bias = bias - sum_over_ranks(mass).clamp_min(LEAST_MASS).log()
    return bias


def centering_bias(center: Tensor, temperature: float) -> Tensor:
    """The bias (K,) that subtracts the running mean (K,) of the scores before the softmax, as DINO does."""
    return -center / temperature


def new_center(
    center: Tensor, features: Tensor, prototypes: Tensor, momentum: float, sum_over_ranks: Reduce = _alone
) -> Tensor:
    """The running mean (K,) after a step whose teacher scores were features (n, d) times prototypes (K, d).

    The mean of products is the product of the mean, so no score is made. Without any row it stays.
    """
    total = sum_over_ranks(torch.cat([features.float().sum(0), features.new_full((1,), len(features)).float()]))
    if total[-1] == 0:
        return center
    return center * momentum + (prototypes.float() @ (total[:-1] / total[-1])) * (1 - momentum)


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    targets: Targets,
    pairs: Tensor,
    row_weights: Tensor,
    temperature: float,
    *,
    rows_per_chunk: int,
) -> tuple[Tensor, Tensor]:
    """The sum over rows r, student crops g and teacher crops h of row_weights[r] * pairs[g, h] * cross-entropy.

    features: (G, n, d), of the student; prototypes: (K, d), the student's own.
    pairs: (G, H), how much each pair of crops counts; row_weights: (n,).
    Gives the loss, and the same for each student crop (G,), without gradients.

    Scores are there for `rows_per_chunk` rows of one crop at a time: gradients of a chunk are made with its loss.
    """
    arguments = (features, prototypes, targets, pairs, row_weights, temperature, rows_per_chunk)
    loss, of_each = _PrototypeCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's own is untyped
    return loss, of_each


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        targets: Targets,
        pairs: Tensor,
        row_weights: Tensor,
        temperature: float,
        rows_per_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.zeros(len(features), device=features.device)
        to_features = torch.zeros_like(features, dtype=torch.float32)
        to_prototypes = torch.zeros_like(prototypes, dtype=torch.float32)
        of_crops = pairs.tolist()
        for start in range(0, features.shape[1], rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            probabilities, weights = targets.probabilities(rows), row_weights[rows, None]
            for crop, own in enumerate(features[:, rows]):
                if crop == 0 or of_crops[crop] != of_crops[crop - 1]:
                    target = _weighted_sum(probabilities, of_crops[crop])
                # Targets sum to `total` in each row, so the cross-entropy needs no matrix of logarithms, and the
                # gradient of the scores is total * softmax - target. Factors of a row wait for the smaller matrices.
                total = sum(of_crops[crop])
                scores = (own / temperature @ prototypes.T).float()
                log_sum = torch.logsumexp(scores, dim=-1, keepdim=True)
                losses[crop] += (weights * (total * log_sum - (target * scores).sum(-1, keepdim=True))).sum()
                gradient = scores.sub_(log_sum - math.log(total)).exp_().sub_(target).to(own.dtype)
                scale = weights / temperature
                to_features[crop, rows] = (gradient @ prototypes).float() * scale
                to_prototypes += gradient.T @ (own * scale).to(own.dtype)
        ctx.save_for_backward(to_features.to(features.dtype), to_prototypes.to(prototypes.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_features, to_prototypes = ctx.saved_tensors
        return gradients[0] * to_features, gradients[0] * to_prototypes, None, None, None, None, None


@torch.no_grad()
def entropies(targets: Targets, rows: int) -> tuple[Tensor, Tensor]:
    """Of the first `rows` rows of the teacher's probabilities: the mean entropy of a row, and the entropy of the mean
    row, both in nats. The first falls towards 0 and the second from ln K when all images are told to be one thing."""
    probabilities = targets.probabilities(slice(rows)).flatten(0, 1)
    mean = probabilities.mean(0)
    return -torch.xlogy(probabilities, probabilities).sum(-1).mean(), -torch.xlogy(mean, mean).sum()


def _probabilities(scores: Tensor, temperature: float, bias: Tensor) -> Tensor:
    return functional.softmax(torch.add(bias, scores.float(), alpha=1 / temperature), dim=-1)


def _weighted_sum(probabilities: Tensor, weights: list[float]) -> Tensor:
    """The (n, K) sum of the (H, n, K) probabilities; those of weight 0 cost nothing."""
    total: Tensor | None = None
    for weight, of_crop in zip(weights, probabilities, strict=True):
        if weight:
            total = of_crop * weight if total is None else total.add_(of_crop, alpha=weight)
    assert total is not None, "a student crop without a teacher crop"
    return total
