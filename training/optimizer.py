"""Who learns how fast at each step: parameter groups, schedules, clipping, and the optimizer.

A schedule is a function of the step, so a checkpoint keeps none of it. Steps count from 0 and are optimizer steps,
never epochs; the published recipes call 1,250 of them an epoch.

How a cosine runs from a to b in n steps, as in the published arrays: b + (a - b) / 2 * (1 + cos(pi * i / n)) at
i = 0 .. n-1, so that b itself is first met at step n and holds from there on. A linear warmup of n steps from a to b is
a + (b - a) * i / (n - 1): step n-1 already has b, and a cosine that follows starts with b once more.

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
    """What changes from step to step. The defaults are DINOv2's short recipe, for 125,000 steps of 2,048 images."""

    base_learning_rate: float = Field(default=4e-3, gt=0)
    """Greatest learning rate at `reference_batch_size`; it grows with the square root of the batch."""
    reference_batch_size: int = Field(default=1024, ge=1)
    """Images of a step at which the learning rate is the base one."""
    final_learning_rate: float = Field(default=1e-6, ge=0)
    """Where the cosine ends; not scaled with the batch."""
    learning_rate_warmup_steps: int = Field(default=12_500, ge=0)
    """Steps of the linear warmup from 0, part of the run's total."""
    frozen_last_layer_steps: int = Field(default=1250, ge=0)
    """First steps in which the prototypes have learning rate 0, while the rest of the network finds its feet."""
    start_weight_decay: float = Field(default=0.04, ge=0)
    """At step 0; a cosine leads to the final one, without warmup."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """At the end."""
    start_teacher_momentum: float = Field(default=0.992, ge=0, le=1)
    """Share of the teacher that a step keeps, at step 0; a cosine leads to the final one, without warmup."""
    final_teacher_momentum: float = Field(default=1.0, ge=0, le=1)
    """At the end."""
    start_teacher_temperature: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's softmax or Sinkhorn-Knopp, at step 0."""
    final_teacher_temperature: float = Field(default=0.07, gt=0)
    """After its warmup, and from there on."""
    teacher_temperature_warmup_steps: int = Field(default=37_500, ge=0)
    """Steps of its linear warmup; may be more than the run has."""


class OptimizerConfig(Settings):
    """AdamW and how its parameters are grouped. The defaults are DINOv2's short recipe."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second; PyTorch's default."""
    layer_decay: float = Field(default=0.9, gt=0, le=1)
    """Factor of the learning rate for each layer further from the heads: embeddings have it to the power of depth + 1,
    the last block to the power of 1, the last norm and the heads none. 1 turns it off."""
    patch_embed_multiplier: float = Field(default=0.2, ge=0)
    """Another factor for the patch projection."""
    clip_norm: float = Field(default=3.0, gt=0)
    """Greatest norm of the gradients of the backbone and of each head, separately."""


@dataclass(frozen=True)
class StepValues:
    """What the schedules give at one step."""

    learning_rate: float
    last_layer_learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


class ParameterGroup(TypedDict):
    """One group of an optimizer. The multipliers are of what the schedules give."""

    params: list[nn.Parameter]
    learning_rate_multiplier: float
    weight_decay_multiplier: float
    is_last_layer: bool


def step_values(config: ScheduleConfig, *, step: int, total_steps: int, batch_size: int) -> StepValues:
    """What holds at `step` of a run of `total_steps` steps of `batch_size` images, over all ranks and passes."""
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
    """From `start` at step 0 along half a cosine to `final` at step `num_steps`, which holds from there on."""
    if step >= num_steps:
        return final
    return final + 0.5 * (start - final) * (1 + math.cos(math.pi * step / num_steps))


def linear(step: int, num_steps: int, start: float, final: float) -> float:
    """From `start` at step 0 in a straight line to `final` at step `num_steps - 1`, which holds from there on."""
    if step >= num_steps:
        return final
    return start + (final - start) * step / max(1, num_steps - 1)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, layer_decay: float, patch_embed_multiplier: float
) -> list[ParameterGroup]:
    """The trainable parameters of a student, grouped by multipliers, in the order in which these first occur.

    Names look like `backbone.blocks.3.attn.qkv.weight` and `dino_head.last_layer.weight_g`. Biases, norms and
    LayerScale do not decay; tokens, positions and prototypes do. Cited: DINOv2's published code.
    """
    named = list(named_parameters)
    layers = [_layer(name) for name, _ in named]
    top = max((layer for layer in layers if layer is not None), default=0) + 1  # the last norm's, and the heads'
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
    """0 for the embeddings, i + 1 for block i, None for what lies behind the blocks."""
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
    """Scale the gradients of each submodule down to `max_norm`, and give the norms that they had.

    The norms are scalars on the gradients' device; no device is waited for. The gradients of a submodule are all plain
    or all sharded; sharded ones are summed over ranks, so every rank calls this with the same submodules. A norm that
    is not finite makes its gradients NaN: look at the norms before the optimizer's step.
    """
    norms = {}
    for name, parameters in submodules.items():
        norm = _whole(get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
        clip_grads_with_norm_(parameters, max_norm, norm)
        norms[name] = norm
    return norms


def _whole(norm: Tensor) -> Tensor:
    """A norm of sharded gradients as a plain tensor. Their class lies behind the door of process groups."""
    return norm if type(norm) is Tensor else cast(Any, norm).full_tensor()
