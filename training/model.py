"""Student, teacher and heads: what is trained, and what a pass through it costs and gives.

    student    sees the global crops with patches masked, and the local crops
    teacher    sees the global crops whole; the running average of the student, or, distilling, a larger frozen model
    average    the running average of the student, which is what training is for: the teacher, unless distilling

A training step has two halves (loop.py): `teach` for all passes, which makes the targets that the whole batch agrees
upon, and `learn` pass by pass. DINO (v1) is ibot_weight = 0 and koleo_weight = 0; iBOT is koleo_weight = 0.

Shapes:
    n  images of a pass    G  crops of an image (2 global, then the local ones)    N  patches of a global crop
    M  patches that the student is asked about, masked ones unless distilling      D, d, K  as in heads.py

Source: Oquab et al., DINOv2 (arXiv 2304.07193), section 4; the scaling of its terms is that of its code.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from curation import backbone, weights
from curation.backbone import FeedForward, Kept, Name, PackedAttention, PositionInterpolation, VisionTransformer
from curation.config import Settings
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

NUM_GLOBAL = 2  # global crops of an image: each is compared with the other


class BackboneConfig(Settings):
    """A Vision Transformer, as curation.backbone.build makes it."""

    name: Name
    """`vit_tiny` to `vit_giant`."""
    patch_size: int = Field(gt=0)
    """Side of a patch in pixels."""
    image_size: int = Field(gt=0)
    """Side in pixels of the global crops, for which the positional embedding is made."""
    depth: int | None = Field(default=None, gt=0)
    """Blocks; None takes what the name stands for."""
    num_register_tokens: int = Field(default=0, ge=0)
    """Registers. Cited: none in the published training, 4 in the later releases."""
    feed_forward: FeedForward | None = None
    """`mlp` or `swiglu`; None takes the released choice for the name."""
    layer_scale: float = Field(default=1e-5, ge=0)
    """The starting value of LayerScale; 0 leaves it out, as in MAE and I-JEPA. Cited: DINOv2."""
    position_interpolation: PositionInterpolation = "plain"
    """How the positional embedding is fitted to crops of another size."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images that each residual branch is not computed for, the same at every depth."""
    weights: str | None = None
    """Checkpoint to start from, in any layout that curation.weights reads; its positional embedding is resized."""
    weights_sha256: str | None = None
    """The hash that the checkpoint must have."""


class ObjectiveConfig(Settings):
    """What is minimised, and how the teacher's scores become probabilities."""

    dino_weight: float = Field(default=1.0, ge=0)
    """Of the image-level loss over all pairs of different crops."""
    ibot_weight: float = Field(default=1.0, ge=0)
    """Of the patch-level loss."""
    koleo_weight: float = Field(default=0.1, ge=0)
    """Of KoLeo on the CLS tokens of each global crop."""
    koleo_images: int | None = Field(default=None, ge=2)
    """Images among which KoLeo looks for neighbours; divides images_per_pass. None: all of a pass, as published."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Of the student's softmax."""
    centering: Literal["sinkhorn_knopp", "ema"] = "sinkhorn_knopp"
    """Over the whole batch, all ranks and passes. Cited: the long recipes take Sinkhorn-Knopp, the short one EMA."""
    sinkhorn_iterations: int = Field(default=3, gt=0)
    """Of Sinkhorn-Knopp."""
    center_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of the running mean of the scores."""
    rows_per_chunk: int = Field(default=1024, gt=0)
    """Rows of scores over the prototypes that are in memory at once. Assumed: 537 MB each at 131,072 prototypes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dino_weight == self.ibot_weight == 0:
            raise ValueError("dino_weight and ibot_weight are both 0, so there is nothing to learn")
        return self


class DistillationConfig(Settings):
    """A frozen teacher: no masks, no stochastic depth, and the average of the student is the result."""

    backbone: BackboneConfig
    """The teacher; `weights` says where it lies."""
    heads: str
    """The teacher's heads, as `python -m training.export` wrote them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backbone.weights is None:
            raise ValueError("distillation.backbone needs weights: an untrained teacher teaches nothing")
        return self


class ModelConfig(Settings):
    """The networks and their objective."""

    backbone: BackboneConfig
    """The student's, and its average's."""
    dino_head: HeadConfig = HeadConfig()
    """The head of the CLS token."""
    ibot_head: HeadConfig | None = None
    """The head of the patches; None shares the other."""
    heads: str | None = None
    """Heads to start from, as `python -m training.export` wrote them; None starts with fresh ones."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The losses."""
    distillation: DistillationConfig | None = None
    """A frozen teacher instead of the student's own average."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.distillation is not None and self.backbone.drop_path:
            raise ValueError(f"backbone.drop_path is {self.backbone.drop_path:g}; distillation goes without")
        if self.distillation is not None and self.distillation.backbone.patch_size != self.backbone.patch_size:
            raise ValueError(
                f"the teacher has patches of {self.distillation.backbone.patch_size} pixels and the student of "
                f"{self.backbone.patch_size}; the patch-level loss compares them one by one"
            )
        return self


class Outputs(NamedTuple):
    """What a pass through a network gives."""

    cls_tokens: tuple[Tensor, ...]
    """(crops, D) of each group of crops, after the last norm."""
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
        patches: Tensor,
        kept: Sequence[Kept] | None = None,
    ) -> Outputs:
        """crops: groups of (crops, 3, H, W), the global ones first; masks: (2n, N) of those.

        patches: (M,), places among the 2n * N patches of the global crops that go through the head.
        kept: see VisionTransformer.forward_features.
        """
        features = self.backbone(crops, is_training=True, masks=[masks, *(None for _ in crops[1:])], kept=kept)
        cls_tokens = tuple(of_group["x_norm_clstoken"] for of_group in features)
        images = torch.cat(cls_tokens)
        asked = features[0]["x_norm_patchtokens"].flatten(0, 1)[patches]
        if self.ibot_head is None:
            unit, prototypes = self.dino_head(torch.cat([images, asked]))
            return Outputs(cls_tokens, unit[: len(images)], prototypes, unit[len(images) :], prototypes)
        return Outputs(cls_tokens, *self.dino_head(images), *self.ibot_head(asked))


@dataclass(frozen=True, eq=False)
class Model:
    """Everything that is trained, and what the centering remembers. `build_model` makes one."""

    config: ModelConfig
    student: Network
    teacher: Network
    average: Network
    """The teacher itself, unless distilling."""
    centers: dict[str, Tensor]
    """`dino` and `ibot`: the running mean (K,) of the teacher's scores; zeros under Sinkhorn-Knopp."""

    def networks(self) -> dict[str, Network]:
        """By name, each once. A frozen teacher is not among them: it is read from its own files."""
        return {"student": self.student, "average" if self.config.distillation else "teacher": self.average}


def build_model(config: ModelConfig, seed: int, packed: PackedAttention = "grouped") -> Model:
    """The networks on the CPU, a pure function of the arguments and of the files they name. Raises WeightsError."""
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
    return Model(config, student, teacher, average, centers)


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
        checkpoint = weights.read(config.weights, sha256=config.weights_sha256)
        grid_size = weights.architecture(checkpoint.tensors, checkpoint.path).grid_size
        model.resize_positions(grid_size)
        weights.fill(model, checkpoint)
        model.resize_positions(config.image_size // config.patch_size)
    return model


def whole_backbone(config: BackboneConfig, state: Mapping[str, Tensor]) -> VisionTransformer:
    """A backbone of its own on the CPU, filled from the whole state of a network."""
    model = build_backbone(config.model_copy(update={"weights": None}), seed=0)
    prefix = "backbone."
    model.load_state_dict({name[len(prefix) :]: of for name, of in state.items() if name.startswith(prefix)})
    return model


def model_memory(config: ModelConfig, num_ranks: int) -> dict[str, int]:
    """Bytes that a rank needs before any image, by what for.

    Weights, gradients and two moments of the student, and the weights of its average; the whole prototypes of student
    and teacher with their gradients, and the scores of a chunk over them. A frozen teacher's weights are not counted.
    """
    with torch.device("meta"):
        dimensions = backbone.SIZES[config.backbone.name].embed_dim
        configs = [config.dino_head, *([config.ibot_head] if config.ibot_head else [])]
        in_heads = sum(of.numel() for head in configs for of in ProjectionHead(dimensions, head).parameters())
    # Cited: 12 D * D weights a block, in the MLP as in SwiGLU, to which biases, norms and tokens add less than 1%.
    in_backbone = 12 * dimensions**2 * (config.backbone.depth or backbone.SIZES[config.backbone.name].depth)
    largest = max(configs, key=lambda head: head.num_prototypes)
    size = torch.float32.itemsize
    return {
        "backbone": 5 * size * in_backbone // num_ranks,
        "heads": 5 * size * in_heads // num_ranks,
        "prototypes": 3 * size * largest.num_prototypes * largest.bottleneck_dim,
        "scores": (NUM_GLOBAL + 2) * size * config.objective.rows_per_chunk * largest.num_prototypes,
    }


def forward_flops(config: BackboneConfig, side: int) -> float:
    """Floating-point operations of a backbone for one crop of side x side pixels, forward, a multiplication and an
    addition as two: the products of its linear layers and of attention, which are all but 1%."""
    size = backbone.SIZES[config.name]
    patches = (side // config.patch_size) ** 2
    tokens = 1 + config.num_register_tokens + patches
    block = 2 * tokens * 12 * size.embed_dim**2 + 4 * tokens**2 * size.embed_dim
    return (config.depth or size.depth) * block + 2 * patches * 3 * config.patch_size**2 * size.embed_dim


def _fill_heads(network: Network, path: str) -> None:
    """Copy a file of heads into a network: all of them, and no others. Raises WeightsError."""
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("backbone.")}
    network.load_state_dict(read_heads(path, own), strict=False)  # the backbone's keys are the only ones left out


def _head_configs(path: str, config: ModelConfig) -> tuple[HeadConfig, HeadConfig | None]:
    """The teacher's heads, as its file has them. Their prototypes are what the student is compared with."""
    found = read_heads(path)
    configs: dict[str, HeadConfig] = {}
    for name, own in (("dino_head", config.dino_head), ("ibot_head", config.ibot_head)):
        directions, hidden = found.get(f"{name}.last_layer.weight_v"), found.get(f"{name}.mlp.0.weight")
        if (directions is None or hidden is None) != (own is None) or (
            own is not None and directions is not None and len(directions) != own.num_prototypes
        ):
            there = "none" if directions is None else f"{len(directions)} prototypes"
            asked = "none" if own is None else f"{own.num_prototypes}"
            raise WeightsError(
                f"{path}: the teacher's {name} has {there}, and the student's {asked}. Give the student's heads the "
                "teacher's numbers of prototypes."
            )
        if directions is not None and hidden is not None:
            configs[name] = HeadConfig(
                num_prototypes=len(directions), bottleneck_dim=directions.shape[1], hidden_dim=len(hidden)
            )
    return configs["dino_head"], configs.get("ibot_head")


# --- one step -----------------------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """What the teacher says of one pass, and what the student is asked."""

    images: Targets
    """(2, n, ...): of each image's global crops."""
    patches: Targets
    """(1, M, ...)."""
    places: Tensor
    """(M,), among the 2n * N patches of the global crops."""
    patch_weights: Tensor
    """(M,), which sum to 1 for each crop that is asked about."""
    cls_tokens: Tensor
    """(2, n, D), of the teacher."""


@torch.no_grad()
def teach(
    model: Model,
    passes: Sequence[Batch],
    temperature: float,
    sum_over_ranks: Reduce,
    max_over_ranks: Reduce,
) -> list[Lesson]:
    """The targets of every pass of a step, balanced over all of them and over all ranks."""
    objective = model.config.objective
    asked = [_asked(model.config, batch) for batch in passes]
    seen = [
        model.teacher([batch.crops[0]], None, places if objective.ibot_weight else places[:0])
        for batch, (places, _) in zip(passes, asked, strict=True)
    ]
    image_prototypes, patch_prototypes = seen[0].image_prototypes, seen[0].patch_prototypes

    def bias(name: str, features: list[Tensor], prototypes: Tensor) -> Tensor:
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

    image_bias = bias("dino", [of.image_features for of in seen], image_prototypes)
    patch_bias = image_bias
    if objective.ibot_weight:
        patch_bias = bias("ibot", [of.patch_features for of in seen], patch_prototypes)
    return [
        Lesson(
            Targets(of.image_features.unflatten(0, (NUM_GLOBAL, -1)), image_prototypes, image_bias, temperature),
            Targets(of.patch_features[None], patch_prototypes, patch_bias, temperature),
            places,
            patch_weights,
            of.cls_tokens[0].unflatten(0, (NUM_GLOBAL, -1)),
        )
        for of, (places, patch_weights) in zip(seen, asked, strict=True)
    ]


def learn(model: Model, batch: Batch, lesson: Lesson, kept: Sequence[Kept] | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one pass, and its parts by name without gradients."""
    objective, num_images = model.config.objective, len(batch.image_ids)
    masks = None if model.config.distillation else batch.masks
    out = model.student(list(batch.crops), masks, lesson.places if objective.ibot_weight else lesson.places[:0], kept)
    images = out.image_features.unflatten(0, (-1, num_images))
    total = images.new_zeros((), dtype=torch.float32)
    parts: dict[str, Tensor] = {}
    if objective.dino_weight:
        pairs = crop_pairs(len(images))
        loss, of_each = prototype_cross_entropy(
            images,
            out.image_prototypes,
            lesson.images,
            pairs,
            images.new_full((num_images,), 1 / num_images, dtype=torch.float32),
            objective.student_temperature,
            rows_per_chunk=objective.rows_per_chunk,
        )
        total = total + objective.dino_weight * loss
        parts |= {"dino_global": of_each[:NUM_GLOBAL].sum(), "dino_local": of_each[NUM_GLOBAL:].sum()}
    if objective.ibot_weight:
        loss, _ = prototype_cross_entropy(
            out.patch_features[None],
            out.patch_prototypes,
            lesson.patches,
            torch.ones(1, 1),
            lesson.patch_weights / (NUM_GLOBAL * num_images),
            objective.student_temperature,
            rows_per_chunk=objective.rows_per_chunk,
        )
        total = total + objective.ibot_weight * loss
        parts["ibot"] = loss.detach()
    if objective.koleo_weight:
        crops = out.cls_tokens[0].unflatten(0, (NUM_GLOBAL, num_images))
        koleo = torch.stack([koleo_loss(crop, objective.koleo_images) for crop in crops]).sum()
        total = total + objective.koleo_weight * koleo
        parts["koleo"] = koleo.detach()
    return total, parts


def crop_pairs(num_crops: int) -> Tensor:
    """How much each pair of a student's and a teacher's crop counts, (G, 2): all pairs of different crops the same.

    With 8 local crops that is 1/18: 16 pairs of a local crop, and 2 of a global one.
    """
    pairs = torch.ones(num_crops, NUM_GLOBAL)
    pairs[:NUM_GLOBAL].fill_diagonal_(0)
    return pairs / pairs.sum()


def draw_kept(
    config: BackboneConfig, depth: int, num_crops: Sequence[int], generator: torch.Generator, device: torch.device
) -> list[Kept] | None:
    """For each block, branch and group of `num_crops` crops, those that the branch is computed for.

    As many of them as int(crops * (1 - drop_path)), and at least one. Source: DINOv2, section 5.
    """
    if not config.drop_path:
        return None
    drawn = [
        torch.rand(depth, 2, crops, generator=generator)
        .argsort(-1)[..., : max(int(crops * (1 - config.drop_path)), 1)]
        .to(device, non_blocking=True)
        for crops in num_crops
    ]
    return [
        ([of_group[block, 0] for of_group in drawn], [of_group[block, 1] for of_group in drawn])
        for block in range(depth)
    ]


@torch.no_grad()
def move_average(average: Network, student: Network, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * student, on what this rank holds of each."""
    own, new = ([local(of) for of in network.parameters()] for network in (average, student))
    torch._foreach_mul_(own, momentum)
    torch._foreach_add_(own, new, alpha=1 - momentum)


@torch.no_grad()
def move_centers(model: Model, lessons: Sequence[Lesson], sum_over_ranks: Reduce) -> None:
    """Let the centers follow the teacher's scores of a step. Sinkhorn-Knopp needs none."""
    if model.config.objective.centering != "ema":
        return
    for name, of_each in (
        ("dino", [lesson.images for lesson in lessons]),
        ("ibot", [lesson.patches for lesson in lessons]),
    ):
        features = torch.cat([targets.features.flatten(0, 1) for targets in of_each])
        center, momentum = model.centers[name], model.config.objective.center_momentum
        center.copy_(new_center(center, features, of_each[0].prototypes, momentum, sum_over_ranks))


def _asked(config: ModelConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which patches of the global crops the student is asked about (M,), and what each counts (M,)."""
    if config.distillation is None:
        return batch.places, batch.patch_weights
    places = torch.arange(batch.masks.numel(), device=batch.masks.device)
    return places, torch.full((len(places),), 1 / batch.masks.shape[1], device=batch.masks.device)
