"""The optimizer: parameter groups, schedules, gradient clipping and AdamW.

A schedule is a function of the step, so a checkpoint holds none of it. Steps are optimizer steps, counted from 0, never
epochs. The published recipes call 1,250 steps an epoch.

Schedules from a to b in n steps, at step i, as in the published arrays:

    cosine           b + (a - b) / 2 * (1 + cos(pi * i / n))    b is first reached at step n
    linear warmup    a + (b - a) * i / (n - 1)                  b is reached at step n - 1

After that they stay at b. A cosine that follows a warmup starts with the warmup's b, which is so repeated once.

Source: Oquab et al., DINOv2 (arXiv 2304.07193), and its published code and configs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from curation.config import Settings

HEADS = ("dino_head", "ibot_head")
EMBEDDINGS = ("cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed")

Beta = Annotated[float, Field(ge=0, lt=1)]


class ScheduleConfig(Settings):
    """Values that change from step to step. The defaults are DINOv2's short recipe: 125,000 steps of 2,048 images."""

    base_learning_rate: float = Field(default=4e-3, gt=0)
    """Peak learning rate at `reference_batch_size`; it grows with the square root of the batch size."""
    reference_batch_size: int = Field(default=1024, ge=1)
    """Batch size for which `base_learning_rate` holds."""
    final_learning_rate: float = Field(default=1e-6, ge=0)
    """End of the cosine; not scaled with the batch size."""
    learning_rate_warmup_steps: int = Field(default=12_500, ge=0)
    """Steps of the linear warmup from 0; part of the run's `num_steps`."""
    frozen_last_layer_steps: int = Field(default=1250, ge=0)
    """First steps, in which the prototypes have learning rate 0 and the rest of the network is trained."""
    start_weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at step 0; a cosine leads to the final one, without warmup."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """Weight decay at the end."""
    start_teacher_momentum: float = Field(default=0.992, ge=0, le=1)
    """Momentum of the teacher's EMA at step 0; a cosine leads to the final one, without warmup."""
    final_teacher_momentum: float = Field(default=1.0, ge=0, le=1)
    """Momentum at the end."""
    start_teacher_temperature: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's softmax or Sinkhorn-Knopp at step 0."""
    final_teacher_temperature: float = Field(default=0.07, gt=0)
    """Temperature after its warmup."""
    teacher_temperature_warmup_steps: int = Field(default=37_500, ge=0)
    """Steps of the temperature's linear warmup; may exceed the run's `num_steps`."""


class OptimizerConfig(Settings):
    """AdamW and its parameter groups. The defaults are DINOv2's short recipe."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the moving averages of the gradient and of its square."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second average. Cited: PyTorch's default."""
    layer_decay: float = Field(default=0.9, gt=0, le=1)
    """Factor of the learning rate for each layer further from the heads; 1 turns it off. The exponent is depth + 1 for
    the embeddings, 1 for the last block, and 0 for the last norm and the heads."""
    patch_embed_multiplier: float = Field(default=0.2, ge=0)
    """Further factor of the learning rate for the patch projection."""
    clip_norm: float = Field(default=3.0, gt=0)
    """Maximum norm of the gradients, for the backbone and for each head separately."""


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one step."""

    learning_rate: float
    last_layer_learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


class ParameterGroup(TypedDict):
    """One group of an optimizer. The multipliers apply to the scheduled values."""

    params: list[nn.Parameter]
    learning_rate_multiplier: float
    weight_decay_multiplier: float
    is_last_layer: bool


def step_values(config: ScheduleConfig, *, step: int, total_steps: int, batch_size: int) -> StepValues:
    """The values at `step` of a run of `total_steps` steps. batch_size: images of a step, over all ranks and passes."""
    rate = learning_rate(config, step=step, total_steps=total_steps, batch_size=batch_size)
    return StepValues(
        learning_rate=rate,
        last_layer_learning_rate=0.0 if step < config.frozen_last_layer_steps else rate,
        weight_decay=cosine(step, total_steps, config.start_weight_decay, config.final_weight_decay),
        teacher_momentum=cosine(step, total_steps, config.start_teacher_momentum, config.final_teacher_momentum),
        teacher_temperature=linear(
            step,
            config.teacher_temperature_warmup_steps,
            config.start_teacher_temperature,
            config.final_teacher_temperature,
        ),
    )


def learning_rate(config: ScheduleConfig, *, step: int, total_steps: int, batch_size: int) -> float:
    """The learning rate at `step`, before any group's multiplier."""
    warmup_steps = config.learning_rate_warmup_steps
    peak = config.base_learning_rate * math.sqrt(batch_size / config.reference_batch_size)
    if step < warmup_steps:
        return linear(step, warmup_steps, 0.0, peak)
    return cosine(step - warmup_steps, total_steps - warmup_steps, peak, config.final_learning_rate)


def cosine(step: int, num_steps: int, start: float, final: float) -> float:
    """From `start` at step 0 along half a cosine to `final` at step `num_steps`; `final` after that."""
    if step >= num_steps:
        return final
    return final + 0.5 * (start - final) * (1 + math.cos(math.pi * step / num_steps))


def linear(step: int, num_steps: int, start: float, final: float) -> float:
    """From `start` at step 0 in a straight line to `final` at step `num_steps - 1`; `final` after that."""
    if step >= num_steps:
        return final
    return start + (final - start) * step / max(1, num_steps - 1)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, layer_decay: float, patch_embed_multiplier: float
) -> list[ParameterGroup]:
    """The trainable parameters of a student, grouped by their multipliers, in the order of first occurrence.

    Names look like `backbone.blocks.3.attn.qkv.weight` and `dino_head.last_layer.weight_g`. Biases, norms and
    LayerScale have no weight decay; tokens, positions and prototypes have. Cited: DINOv2's published code.
    """
    named = list(named_parameters)
    layers = [_layer(name) for name, _ in named]
    top = max((layer for layer in layers if layer is not None), default=0) + 1  # layer of the last norm and the heads
    groups: dict[tuple[float, float, bool], ParameterGroup] = {}
    for (name, parameter), layer in zip(named, layers, strict=True):
        if not parameter.requires_grad:
            continue
        rate = layer_decay ** (top - (top if layer is None else layer))
        if "patch_embed" in name:
            rate *= patch_embed_multiplier
        decay = 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0
        is_last_layer = "last_layer" in name
        group = groups.setdefault(
            (rate, decay, is_last_layer),
            ParameterGroup(
                params=[],
                learning_rate_multiplier=rate,
                weight_decay_multiplier=decay,
                is_last_layer=is_last_layer,
            ),
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layer(name: str) -> int | None:
    """0 for the embeddings, i + 1 for block i, None for the last norm and the heads."""
    match name.split("."):
        case ["backbone", "blocks", index, *_]:
            return int(index) + 1
        case ["backbone", part, *_] if part in EMBEDDINGS:
            return 0
        case ["backbone", "norm", _]:
            return None
        case [part, *_] if part in HEADS:
            return None
    raise AssertionError(f"no rule for the parameter '{name}': a wrapper may have renamed it")


def make_optimizer(config: OptimizerConfig, groups: Sequence[ParameterGroup]) -> torch.optim.AdamW:
    """AdamW over `groups`, with learning rate and weight decay 0 until `apply_schedules` sets them."""
    return torch.optim.AdamW(
        [dict(group) for group in groups],
        lr=0.0,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=0.0,
        fused=True,  # one kernel for a group; cited: DINOv3's trainer
    )


def apply_schedules(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Set each group's learning rate and weight decay for the coming step."""
    for group in optimizer.param_groups:
        rate = values.last_layer_learning_rate if group["is_last_layer"] else values.learning_rate
        group["lr"] = rate * group["learning_rate_multiplier"]
        group["weight_decay"] = values.weight_decay * group["weight_decay_multiplier"]


def clip_gradients(submodules: Mapping[str, Sequence[nn.Parameter]], max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of each submodule down to `max_norm`. Gives the norms before scaling.

    The norms are scalars on the gradients' device; no device is waited for. The gradients of a submodule are all plain
    or all sharded. Sharded norms are summed over ranks, so every rank calls this with the same submodules. A norm that
    is not finite makes its gradients NaN: check the norms before the optimizer's step.
    """
    norms = {}
    for name, parameters in submodules.items():
        norm = _unsharded(get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
        clip_grads_with_norm_(parameters, max_norm, norm)
        norms[name] = norm
    return norms


def _unsharded(norm: Tensor) -> Tensor:
    """The norm as a plain tensor. Only distributed.py imports the class of sharded tensors, DTensor."""
    return norm if type(norm) is Tensor else cast(Any, norm).full_tensor()
