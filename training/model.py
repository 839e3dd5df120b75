"""Student, teacher and heads: the networks, and the loss of one pass through them.

    student    sees the global crops with patches masked, and the local crops
    teacher    sees the global crops whole: the EMA of the student or, when distilling, a larger frozen network
    average    the EMA of the student and the result of training: the teacher itself, unless distilling

A training step (loop.py) calls, in this order:

    teacher_targets    for all passes at once, because the targets are balanced over the whole batch
    student_loss       for each pass
    update_ema, update_centers    after the optimizer's step

DINO (v1) is ibot_weight = 0 and koleo_weight = 0; iBOT is koleo_weight = 0.

Shapes:
    n  images of a pass    G  crops of an image (2 global, then the local ones)    N  patches of a global crop
    M  patches in the patch-level loss: the masked ones, or all when distilling    D, d, K  as in heads.py

Source: Oquab et al., DINOv2 (arXiv 2304.07193), section 4. The terms are scaled as in its code.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from curation import backbone, weights
from curation.backbone import FeedForward, Kept, Name, PackedAttention, PositionInterpolation, VisionTransformer
from curation.config import IsPath, Settings
from curation.errors import WeightsError
from training import heads
from training.data import Batch
from training.distributed import local
from training.export import read_heads
from training.heads import HeadConfig, ProjectionHead
from training.losses import (
    Reduce,
    Targets,
    centering_bias,
    koleo_loss,
    new_center,
    prototype_cross_entropy,
    sinkhorn_bias,
)

NUM_GLOBAL = 2  # global crops of an image; each is compared with the other


class BackboneConfig(Settings):
    """A Vision Transformer, as curation.backbone.build makes it."""

    name: Name
    """`vit_tiny` to `vit_giant`."""
    patch_size: int = Field(gt=0)
    """Side of a patch in pixels."""
    image_size: int = Field(gt=0)
    """Side of the global crops in pixels; the positional embedding is made for it."""
    depth: int | None = Field(default=None, gt=0)
    """Number of blocks; None takes that of `name`."""
    num_register_tokens: int = Field(default=0, ge=0)
    """Registers. Cited: none in the published training, 4 in the later releases."""
    feed_forward: FeedForward | None = None
    """`mlp` or `swiglu`; None takes the released choice for `name`."""
    layer_scale: float = Field(default=1e-5, ge=0)
    """Starting value of LayerScale; 0 leaves LayerScale out, as in MAE and I-JEPA. Cited: DINOv2."""
    position_interpolation: PositionInterpolation = "offset"
    """How the positional embedding is resized for crops of another size. Exports state it, and evaluations follow it.
    Cited: `offset` in DINOv2's published training, `antialias` for its later models with registers."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth: share of the crops that each residual branch skips, the same at every depth."""
    weights: Annotated[str | None, IsPath] = None
    """Checkpoint to start from, in any layout that curation.weights reads. Its positional embedding is resized."""


class ObjectiveConfig(Settings):
    """The loss, and how the teacher's scores become probabilities."""

    dino_weight: float = Field(default=1.0, ge=0)
    """Weight of the image-level loss over all pairs of different crops."""
    ibot_weight: float = Field(default=1.0, ge=0)
    """Weight of the patch-level loss."""
    koleo_weight: float = Field(default=0.1, ge=0)
    """Weight of KoLeo on the CLS tokens of each global crop."""
    koleo_images: int | None = Field(default=None, ge=2)
    """Images among which KoLeo looks for neighbours; divides images_per_pass. None: all of a pass, as published."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Temperature of the student's softmax."""
    centering: Literal["sinkhorn_knopp", "ema"] = "sinkhorn_knopp"
    """How scores are balanced over the whole batch, all ranks and passes. Cited: Sinkhorn-Knopp in the long recipes,
    EMA in the short one."""
    sinkhorn_iterations: int = Field(default=3, gt=0)
    """Iterations of Sinkhorn-Knopp."""
    center_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the EMA of the scores."""
    rows_per_chunk: int = Field(default=1024, gt=0)
    """Rows of scores over the prototypes that are in memory at once. Assumed: 537 MB each at 131,072 prototypes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dino_weight == self.ibot_weight == 0:
            raise ValueError("dino_weight and ibot_weight are both 0; at least one must be above 0")
        return self


class DistillationConfig(Settings):
    """A frozen teacher. There are no masks and no stochastic depth, and the result is the EMA of the student."""

    backbone: BackboneConfig
    """The teacher; `weights` is the path of its checkpoint."""
    heads: str
    """The teacher's heads, as `python -m training.export` wrote them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backbone.weights is None:
            raise ValueError("distillation.backbone needs weights: the teacher must be a trained network")
        return self


class ModelConfig(Settings):
    """The networks and their objective."""

    backbone: BackboneConfig
    """The backbone of the student and of its EMA."""
    dino_head: HeadConfig = HeadConfig()
    """The head of the CLS token."""
    ibot_head: HeadConfig | None = None
    """The head of the patches; None shares the other."""
    heads: str | None = None
    """Heads to start from, as `python -m training.export` wrote them; None starts with fresh ones."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The losses."""
    distillation: DistillationConfig | None = None
    """A frozen teacher in place of the student's EMA."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.distillation is not None and self.backbone.drop_path:
            raise ValueError(f"backbone.drop_path is {self.backbone.drop_path:g}; distillation needs 0")
        if self.distillation is not None and self.distillation.backbone.patch_size != self.backbone.patch_size:
            raise ValueError(
                f"the teacher has patches of {self.distillation.backbone.patch_size} pixels and the student of "
                f"{self.backbone.patch_size}; the patch-level loss compares them one by one"
            )
        return self


class NetworkOutputs(NamedTuple):
    """The outputs of one pass through a network."""

    cls_tokens: tuple[Tensor, ...]
    """(crops, D) for each group of crops, after the last norm."""
    image_features: Tensor
    """(crops of all groups, d), unit vectors."""
    image_prototypes: Tensor
    """(K, d)."""
    patch_features: Tensor
    """(M, d), unit vectors."""
    patch_prototypes: Tensor
    """(K, d)."""


class Network(nn.Module):
    """A backbone and its heads; `state_dict()` has the keys of DINOv2's training checkpoints."""

    def __init__(self, backbone: VisionTransformer, dino_head: ProjectionHead, ibot_head: ProjectionHead | None):
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def forward(
        self,
        crops: list[Tensor],
        masks: Tensor | None,
        patch_indices: Tensor,
        kept: Sequence[Kept] | None = None,
    ) -> NetworkOutputs:
        """Run the backbone over all crops, and the heads over the CLS tokens and the chosen patches.

        crops: groups of (crops, 3, H, W), the global ones first. masks: (2n, N), of the global crops.
        patch_indices: (M,), indices among the 2n * N patches of the global crops.
        kept: see VisionTransformer.forward_features.
        """
        features = self.backbone(crops, is_training=True, masks=[masks, *(None for _ in crops[1:])], kept=kept)
        cls_tokens = tuple(group["x_norm_clstoken"] for group in features)
        images = torch.cat(cls_tokens)  # (crops of all groups, D)
        patches = features[0]["x_norm_patchtokens"].flatten(0, 1)[patch_indices]  # (M, D)
        if self.ibot_head is None:
            unit, prototypes = self.dino_head(torch.cat([images, patches]))
            return NetworkOutputs(cls_tokens, unit[: len(images)], prototypes, unit[len(images) :], prototypes)
        return NetworkOutputs(cls_tokens, *self.dino_head(images), *self.ibot_head(patches))


@dataclass(frozen=True, eq=False)
class StudentTeacher:
    """All networks of a run, and the centers of the objective. `build_model` makes one."""

    config: ModelConfig
    student: Network
    teacher: Network
    average: Network
    """EMA of the student; the teacher itself, unless distilling."""
    centers: dict[str, Tensor]
    """`dino` and `ibot`: the EMA (K,) of the teacher's scores; zeros under Sinkhorn-Knopp."""

    def networks(self) -> dict[str, Network]:
        """Each trained network once, by name. A frozen teacher is left out: it is read from its own files."""
        return {"student": self.student, "average" if self.config.distillation else "teacher": self.average}


def build_model(config: ModelConfig, seed: int, packed: PackedAttention = "grouped") -> StudentTeacher:
    """The networks on the CPU: a pure function of the arguments and of the files they name. Raises WeightsError."""
    student = _build_network(config.backbone, config.dino_head, config.ibot_head, config.heads, seed)
    average = _frozen(copy.deepcopy(student))
    teacher = average
    if config.distillation is not None:
        frozen = config.distillation
        teacher = _frozen(_build_network(frozen.backbone, *_head_configs(frozen.heads, config), frozen.heads, seed))
    for network in (student, average, teacher):
        for block in network.backbone.blocks:
            assert isinstance(block, backbone.Block)
            block.attn.packed = packed
    num_prototypes = (config.ibot_head or config.dino_head).num_prototypes
    centers = {"dino": torch.zeros(config.dino_head.num_prototypes), "ibot": torch.zeros(num_prototypes)}
    return StudentTeacher(config, student, teacher, average, centers)


def _frozen(network: Network) -> Network:
    return network.requires_grad_(False).eval()


def _build_network(
    config: BackboneConfig, dino: HeadConfig, ibot: HeadConfig | None, heads_path: str | None, seed: int
) -> Network:
    vit = build_backbone(config, seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network(
        vit,
        heads.build(vit.embed_dim, dino, generator),
        None if ibot is None else heads.build(vit.embed_dim, ibot, generator),
    )
    if heads_path is not None:
        _fill_heads(network, heads_path)
    return network


def build_backbone(config: BackboneConfig, seed: int) -> VisionTransformer:
    """The backbone with fresh weights, or with those of `config.weights`. Raises WeightsError."""
    model = backbone.build(
        config.name,
        patch_size=config.patch_size,
        image_size=config.image_size,
        num_register_tokens=config.num_register_tokens,
        feed_forward=config.feed_forward,
        layer_scale=config.layer_scale or None,
        position_interpolation=config.position_interpolation,
        depth=config.depth,
        seed=seed,
    )
    if config.weights is not None:
        checkpoint = weights.read(config.weights)
        if checkpoint.position_interpolation not in (None, config.position_interpolation):
            raise WeightsError(
                f"{config.weights}: trained with position_interpolation '{checkpoint.position_interpolation}', and the "
                f"config says '{config.position_interpolation}'. Set the value of the file in the backbone's section."
            )
        grid_size = weights.architecture(checkpoint.tensors, checkpoint.path).grid_size
        model.resize_positions(grid_size)
        weights.fill(model, checkpoint)
        model.resize_positions(config.image_size // config.patch_size)
    return model


def backbone_from_state(config: BackboneConfig, state: Mapping[str, Tensor]) -> VisionTransformer:
    """A separate backbone on the CPU, filled from the whole state_dict of a Network."""
    model = build_backbone(config.model_copy(update={"weights": None}), seed=0)
    prefix = "backbone."
    model.load_state_dict({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
    return model


def model_memory(config: ModelConfig, num_ranks: int) -> dict[str, int]:
    """Bytes that a rank needs before any image, by purpose.

    backbone, heads    weights, gradients and two moments of the student, and the weights of its EMA
    prototypes         the gathered prototypes of student and teacher, with their gradients
    scores             a chunk of scores over the prototypes
    The weights of a frozen teacher are not counted.
    """
    with torch.device("meta"):
        dimensions = backbone.SIZES[config.backbone.name].embed_dim
        head_configs = [config.dino_head, *([config.ibot_head] if config.ibot_head else [])]
        num_head_weights = sum(
            weight.numel() for head in head_configs for weight in ProjectionHead(dimensions, head).parameters()
        )
    # Cited: 12 D * D weights a block, in the MLP as in SwiGLU, to which biases, norms and tokens add less than 1%.
    depth = config.backbone.depth or backbone.SIZES[config.backbone.name].depth
    num_backbone_weights = 12 * dimensions**2 * depth
    largest = max(head_configs, key=lambda head: head.num_prototypes)
    size = torch.float32.itemsize
    return {
        "backbone": 5 * size * num_backbone_weights // num_ranks,
        "heads": 5 * size * num_head_weights // num_ranks,
        "prototypes": 3 * size * largest.num_prototypes * largest.bottleneck_dim,
        "scores": (NUM_GLOBAL + 2) * size * config.objective.rows_per_chunk * largest.num_prototypes,
    }


def forward_flops(config: BackboneConfig, side: int) -> float:
    """Floating-point operations of a backbone's forward pass over one crop of side x side pixels.

    A multiply-add counts as two. Counted are the matrix products of the linear layers and of attention: all but 1%.
    """
    size = backbone.SIZES[config.name]
    patches = (side // config.patch_size) ** 2
    tokens = 1 + config.num_register_tokens + patches
    block = 2 * tokens * 12 * size.embed_dim**2 + 4 * tokens**2 * size.embed_dim
    return (config.depth or size.depth) * block + 2 * patches * 3 * config.patch_size**2 * size.embed_dim


def _fill_heads(network: Network, path: str) -> None:
    """Copy a file of heads into a network. The file must hold exactly the network's heads. Raises WeightsError."""
    expected = {name: value for name, value in network.state_dict().items() if not name.startswith("backbone.")}
    network.load_state_dict(read_heads(path, expected), strict=False)  # leaves out the backbone's keys alone


def _head_configs(path: str, config: ModelConfig) -> tuple[HeadConfig, HeadConfig | None]:
    """The configs of the teacher's heads, from their file. Raises WeightsError.

    Teacher and student must have equally many prototypes: the loss compares their probabilities one by one.
    """
    tensors = read_heads(path)
    configs: dict[str, HeadConfig] = {}
    for name, student_config in (("dino_head", config.dino_head), ("ibot_head", config.ibot_head)):
        directions, hidden = tensors.get(f"{name}.last_layer.weight_v"), tensors.get(f"{name}.mlp.0.weight")
        if (directions is None or hidden is None) != (student_config is None) or (
            student_config is not None and directions is not None and len(directions) != student_config.num_prototypes
        ):
            teacher_has = "none" if directions is None else f"{len(directions)} prototypes"
            student_has = "none" if student_config is None else f"{student_config.num_prototypes}"
            raise WeightsError(
                f"{path}: the teacher's {name} has {teacher_has}, and the student's {student_has}. Give the student's "
                "heads the teacher's numbers of prototypes."
            )
        if directions is not None and hidden is not None:
            configs[name] = HeadConfig(
                num_prototypes=len(directions), bottleneck_dim=directions.shape[1], hidden_dim=len(hidden)
            )
    return configs["dino_head"], configs.get("ibot_head")


# --- one step -----------------------------------------------------------------------------------------------------


class PassTargets(NamedTuple):
    """The teacher's targets for one pass, and the patches of the patch-level loss."""

    images: Targets
    """(2, n, ...): of each image's global crops."""
    patches: Targets
    """(1, M, ...)."""
    patch_indices: Tensor
    """(M,), indices among the 2n * N patches of the global crops."""
    patch_weights: Tensor
    """(M,), which sum to 1 in each crop with such patches."""
    teacher_cls_tokens: Tensor
    """(2, n, D)."""


@torch.no_grad()
def teacher_targets(
    model: StudentTeacher,
    passes: Sequence[Batch],
    temperature: float,
    sum_over_ranks: Reduce,
    max_over_ranks: Reduce,
) -> list[PassTargets]:
    """Run the teacher over every pass of a step; its scores are balanced over all passes and all ranks."""
    objective = model.config.objective
    chosen_patches = [_loss_patches(model.config, batch) for batch in passes]
    outputs = [
        model.teacher([batch.crops[0]], None, indices if objective.ibot_weight else indices[:0])
        for batch, (indices, _) in zip(passes, chosen_patches, strict=True)
    ]
    image_prototypes, patch_prototypes = outputs[0].image_prototypes, outputs[0].patch_prototypes

    def bias(name: str, features: list[Tensor], prototypes: Tensor) -> Tensor:  # (K,)
        if objective.centering == "ema":
            return centering_bias(model.centers[name], temperature)
        return sinkhorn_bias(
            torch.cat(features),
            prototypes,
            temperature,
            objective.sinkhorn_iterations,
            rows_per_chunk=objective.rows_per_chunk,
            sum_over_ranks=sum_over_ranks,
            max_over_ranks=max_over_ranks,
        )

    image_bias = bias("dino", [output.image_features for output in outputs], image_prototypes)
    patch_bias = image_bias
    if objective.ibot_weight:
        patch_bias = bias("ibot", [output.patch_features for output in outputs], patch_prototypes)
    return [
        PassTargets(
            Targets(output.image_features.unflatten(0, (NUM_GLOBAL, -1)), image_prototypes, image_bias, temperature),
            Targets(output.patch_features[None], patch_prototypes, patch_bias, temperature),
            indices,
            patch_weights,
            output.cls_tokens[0].unflatten(0, (NUM_GLOBAL, -1)),
        )
        for output, (indices, patch_weights) in zip(outputs, chosen_patches, strict=True)
    ]


def student_loss(
    model: StudentTeacher, batch: Batch, targets: PassTargets, kept: Sequence[Kept] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the student over one pass. Gives the loss, and its terms by name without gradients.

    loss = dino_weight * (dino_global + dino_local) + ibot_weight * ibot + koleo_weight * koleo

    kept: of stochastic depth, see `draw_kept`.
    """
    objective, num_images = model.config.objective, len(batch.image_ids)
    masks = None if model.config.distillation else batch.masks
    patch_indices = targets.patch_indices if objective.ibot_weight else targets.patch_indices[:0]
    outputs = model.student(list(batch.crops), masks, patch_indices, kept)
    image_features = outputs.image_features.unflatten(0, (-1, num_images))  # (G, n, d)
    total = image_features.new_zeros((), dtype=torch.float32)
    terms: dict[str, Tensor] = {}
    if objective.dino_weight:
        loss, crop_losses = prototype_cross_entropy(
            image_features,
            outputs.image_prototypes,
            targets.images,
            crop_pair_weights(len(image_features)),
            image_features.new_full((num_images,), 1 / num_images, dtype=torch.float32),
            objective.student_temperature,
            rows_per_chunk=objective.rows_per_chunk,
        )
        total = total + objective.dino_weight * loss
        terms |= {"dino_global": crop_losses[:NUM_GLOBAL].sum(), "dino_local": crop_losses[NUM_GLOBAL:].sum()}
    if objective.ibot_weight:
        loss, _ = prototype_cross_entropy(
            outputs.patch_features[None],
            outputs.patch_prototypes,
            targets.patches,
            torch.ones(1, 1),
            targets.patch_weights / (NUM_GLOBAL * num_images),
            objective.student_temperature,
            rows_per_chunk=objective.rows_per_chunk,
        )
        total = total + objective.ibot_weight * loss
        terms["ibot"] = loss.detach()
    if objective.koleo_weight:
        global_crops = outputs.cls_tokens[0].unflatten(0, (NUM_GLOBAL, num_images))  # (2, n, D)
        koleo = torch.stack([koleo_loss(crop, objective.koleo_images) for crop in global_crops]).sum()
        total = total + objective.koleo_weight * koleo
        terms["koleo"] = koleo.detach()
    return total, terms


def crop_pair_weights(num_crops: int) -> Tensor:
    """The weight of each pair of a student's and a teacher's crop, (G, 2): equal for all pairs of different crops.

    With 8 local crops it is 1/18: 16 pairs with a local crop, and 2 of global crops.
    """
    pair_weights = torch.ones(num_crops, NUM_GLOBAL)
    pair_weights[:NUM_GLOBAL].fill_diagonal_(0)
    return pair_weights / pair_weights.sum()


def draw_kept(
    config: BackboneConfig, depth: int, num_crops: Sequence[int], generator: torch.Generator, device: torch.device
) -> list[Kept] | None:
    """Stochastic depth: for each block, branch and group of crops, the crops that the branch is computed for.

    Each group of `num_crops` crops keeps int(num_crops * (1 - drop_path)) of them, and at least one. None when nothing
    is dropped. Source: DINOv2, section 5.
    """
    if not config.drop_path:
        return None
    drawn = [
        torch.rand(depth, 2, crops, generator=generator)
        .argsort(-1)[..., : max(int(crops * (1 - config.drop_path)), 1)]
        .to(device, non_blocking=True)
        for crops in num_crops
    ]  # (depth, 2, kept crops) for each group
    return [([group[block, 0] for group in drawn], [group[block, 1] for group in drawn]) for block in range(depth)]


@torch.no_grad()
def update_ema(average: Network, student: Network, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * student, on this rank's slices of both."""
    average_weights, student_weights = (
        [local(weight) for weight in network.parameters()] for network in (average, student)
    )
    torch._foreach_mul_(average_weights, momentum)
    torch._foreach_add_(average_weights, student_weights, alpha=1 - momentum)


@torch.no_grad()
def update_centers(model: StudentTeacher, targets: Sequence[PassTargets], sum_over_ranks: Reduce) -> None:
    """Update the centers with the teacher's scores of a step. Sinkhorn-Knopp has no centers."""
    if model.config.objective.centering != "ema":
        return
    for name, of_passes in (
        ("dino", [pass_targets.images for pass_targets in targets]),
        ("ibot", [pass_targets.patches for pass_targets in targets]),
    ):
        features = torch.cat([of_pass.features.flatten(0, 1) for of_pass in of_passes])
        center, momentum = model.centers[name], model.config.objective.center_momentum
        center.copy_(new_center(center, features, of_passes[0].prototypes, momentum, sum_over_ranks))


def _loss_patches(config: ModelConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """The patches in the patch-level loss: indices among those of the global crops (M,), and weights (M,)."""
    if config.distillation is None:
        return batch.masked_indices, batch.masked_weights
    indices = torch.arange(batch.masks.numel(), device=batch.masks.device)
    return indices, torch.full((len(indices),), 1 / batch.masks.shape[1], device=batch.masks.device)
