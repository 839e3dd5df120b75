"""THE TRAINING LOOP: one step from top to bottom (`step`), and the run around it (`train`).

    OUTPUT/
      train.toml                  the resolved config
      metrics.jsonl               one line every `log_every` steps, and one for each evaluation
      tensorboard/                the same values
      checkpoints/step-0001000/   resumes exactly, on any number of ranks         checkpoint.py
      export/step-0001000/        teacher.pth, heads.pth, hf/                      export.py

A step depends on the state that the last step left and on its own number. Its images, crops and masks are drawn from
(seed, step). Stochastic depth is drawn from (seed, step, rank, pass). A checkpoint therefore holds no generator state.
A stopped run continues as if it had not stopped. A run that continues on another number of ranks sees the same images.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from curation import weights
from curation.backbone import Kept, VisionTransformer
from curation.config import NotInPlan, Settings, plan_values, write_resolved
from curation.engine import progress
from curation.engine.ranks import World, barrier, max_over_ranks, open_world, sum_over_ranks
from curation.engine.runner import InlineRunner
from curation.errors import ConfigError, InputError, TrainingError, UserError
from curation.files import paths
from curation.files.hashes import hash_json, sha256_of_file
from training import checkpoint, data, distributed, export, masking, optimizer, samples
from training.augment import AugmentConfig
from training.checkpoint import CheckpointConfig
from training.data import Batch, DrawMasks
from training.masking import MaskConfig
from training.metrics import MetricsWriter, StepMetrics
from training.model import (
    NUM_GLOBAL,
    ModelConfig,
    PassTargets,
    StudentTeacher,
    backbone_from_state,
    build_model,
    draw_kept,
    forward_flops,
    model_memory,
    student_loss,
    teacher_targets,
    update_centers,
    update_ema,
)
from training.optimizer import OptimizerConfig, ScheduleConfig, StepValues
from training.samples import DataConfig

# Called with the student's EMA and the number of steps done. Its results are written with the metrics.
Evaluate = Callable[[VisionTransformer, int], dict[str, float]]

# Steps in a row that may be skipped because the loss or a gradient is not finite. Assumed; DINOv3's trainer allows 2.
MAX_SKIPPED_STEPS = 10


class TrainConfig(Settings):
    """A whole training run. Fields marked NotInPlan may change when a run resumes: its device, speed and reports."""

    seed: int = Field(default=0, ge=0)
    """Seed of fresh weights, of the order of the images, and of all random draws."""
    num_steps: int = Field(gt=0)
    """Optimizer steps of the run; every schedule ends there."""
    batch_size: int = Field(gt=0)
    """Images of a step, over all ranks and passes."""
    images_per_pass: Annotated[int, NotInPlan] = Field(gt=0)
    """Images that a rank puts through the networks at once. A rank's share of the batch is a multiple of it; gradients
    accumulate over the passes. KoLeo depends on it where `koleo_images` is left out."""
    device: Annotated[Literal["cpu", "cuda"], NotInPlan] = "cuda"
    """`cuda` takes one GPU for each process."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of matrix products and attention. Weights, softmax, losses and EMA are float32."""
    packed_attention: Annotated[Literal["grouped", "varlen"], NotInPlan] = "grouped"
    """Attention over crops of different sizes. `grouped`: one call for each size. `varlen`: one call for all, which
    needs a GPU and bfloat16."""
    compile: Annotated[bool, NotInPlan] = False
    """Compile every block."""
    recompute: Annotated[distributed.Recompute, NotInPlan] = "none"
    """Activations that the backward pass computes again: `none`, `selective` (all but matrix products and attention) or
    `full`."""
    reshard_after_forward: Annotated[bool, NotInPlan] = True
    """Free the student's gathered parameters after the forward pass; the backward pass gathers them again."""
    log_every: Annotated[int, NotInPlan] = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    export_every: Annotated[int, NotInPlan] = Field(default=12_500, gt=0)
    """Steps between two exports. The last step is always exported."""
    evaluate_every: Annotated[int, NotInPlan] = Field(default=12_500, gt=0)
    """Steps between two evaluations, if the caller passes one to `train`. The first and last step are always evaluated.
    """
    peak_teraflops: Annotated[float | None, NotInPlan] = Field(default=None, gt=0)
    """Peak of one device in this precision, by its data sheet. With it, `model_flops_utilization` is reported."""
    model: ModelConfig
    """The networks and their objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    schedule: ScheduleConfig
    """Values that change from step to step."""
    augment: AugmentConfig = AugmentConfig()
    """The crops of an image."""
    masks: MaskConfig = MaskConfig()
    """The patches that are hidden from the student."""
    data: DataConfig
    """The images."""
    checkpoint: Annotated[CheckpointConfig, NotInPlan] = CheckpointConfig()
    """When to save."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.schedule.learning_rate_warmup_steps > self.num_steps:
            problems.append(
                f"schedule.learning_rate_warmup_steps {self.schedule.learning_rate_warmup_steps} is more than "
                f"num_steps {self.num_steps}"
            )
        objective, vit = self.model.objective, self.model.backbone
        if self.batch_size % self.images_per_pass:
            problems.append(f"batch_size {self.batch_size} is not a multiple of images_per_pass {self.images_per_pass}")
        group = objective.koleo_images or self.images_per_pass
        if objective.koleo_weight and (group < 2 or self.images_per_pass % group):
            problems.append(
                f"KoLeo looks for neighbours among {group} of the {self.images_per_pass} images of a pass; "
                "model.objective.koleo_images must divide images_per_pass, which must be 2 or more"
            )
        sizes = [crops.size for crops in self.augment.crops]
        if sizes[0] != vit.image_size:
            problems.append(f"global crops are {sizes[0]} pixels and model.backbone.image_size is {vit.image_size}")
        for size in sizes:
            if size % vit.patch_size:
                problems.append(f"crops of {size} pixels do not divide into patches of {vit.patch_size}")
        if self.packed_attention == "varlen" and (self.device, self.precision) != ("cuda", "bfloat16"):
            problems.append(
                f"packed_attention 'varlen' needs cuda and bfloat16, not {self.device} and {self.precision}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass
class Counters:
    """The state of a run beside its tensors; a checkpoint holds it as `progress`."""

    step: int = 0
    """Steps done; also the position in the data."""
    skipped: int = 0
    """Steps that were skipped because the loss or a gradient was not finite."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last step that was taken."""
    rejects: dict[str, str] = field(default_factory=dict)
    """Images that could not be used: image_id to reason."""


@dataclass(frozen=True)
class Trainer:
    """The networks, the optimizer, and the ranks they are spread over."""

    config: TrainConfig
    world: World
    model: StudentTeacher
    optimizer: torch.optim.Optimizer

    @functools.cached_property
    def compared_config(self) -> dict[str, Any]:
        """The settings that the numbers of a run depend on, and the hashes of the files of a frozen teacher.

        A resumed run must have the same. The student's start weights are not in it: the checkpoint holds the student.
        """
        distillation = self.config.model.distillation
        if distillation is None:
            return plan_values(self.config)
        assert distillation.backbone.weights is not None, "the config was checked"
        files = {
            "backbone": weights.sha256_of(distillation.backbone.weights),
            "heads": sha256_of_file(distillation.heads),
        }
        return plan_values(self.config) | {"frozen_teacher": files}


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step."""

    finite: bool
    """Whether the step was taken. If not, no weight has changed."""
    losses: dict[str, Tensor]
    """`loss` and its terms, means over this rank's passes."""
    gradient_norms: dict[str, Tensor]
    """Norms before clipping, one for each part of the student."""
    targets: list[PassTargets]
    """The teacher's targets, one for each pass."""


def step(trainer: Trainer, passes: Sequence[Batch], number: int) -> StepResult:
    """Take one optimizer step, number `number` counted from 0, on this rank's passes."""
    config, model = trainer.config, trainer.model
    scheduled = _scheduled_values(config, number)

    # Teacher forward for all passes: targets are balanced over the whole batch, on all ranks.
    with _autocast(config):
        targets = teacher_targets(model, passes, scheduled.teacher_temperature, sum_over_ranks, max_over_ranks)

    # Student forward and backward, pass by pass: gradients accumulate.
    losses: dict[str, Tensor] = {}
    for index, (batch, pass_targets) in enumerate(zip(passes, targets, strict=True)):
        kept = _draw_stochastic_depth(trainer, batch, number, index)
        with _autocast(config):
            loss, terms = student_loss(model, batch, pass_targets, kept)
        (loss / len(passes)).backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        for name, value in {"loss": loss.detach(), **terms}.items():
            losses[name] = losses.get(name, 0) + value / len(passes)

    # Gradient clipping. A loss or gradient that is not finite on one rank makes all ranks skip the step.
    submodules = {name: list(module.parameters()) for name, module in model.student.named_children()}
    norms = optimizer.clip_gradients(submodules, config.optimizer.clip_norm)
    finite = torch.stack([losses["loss"].isfinite(), *(norm.isfinite() for norm in norms.values())]).all()
    if max_over_ranks(1 - finite.float()).item():
        trainer.optimizer.zero_grad()
        return StepResult(False, losses, norms, targets)

    # Optimizer step.
    optimizer.apply_schedules(trainer.optimizer, scheduled)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()

    # EMA update, and the centers' if the objective has them.
    update_ema(model.average, model.student, scheduled.teacher_momentum)
    update_centers(model, targets, sum_over_ranks)
    return StepResult(True, losses, norms, targets)


def _scheduled_values(config: TrainConfig, number: int) -> StepValues:
    return optimizer.step_values(
        config.schedule, step=number, total_steps=config.num_steps, batch_size=config.batch_size
    )


def _autocast(config: TrainConfig) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


def _draw_stochastic_depth(trainer: Trainer, batch: Batch, number: int, pass_index: int) -> Sequence[Kept] | None:
    seeds = (trainer.config.seed, number, trainer.world.rank, pass_index)
    generator = torch.Generator().manual_seed(int(hash_json(seeds)[:15], 16))
    num_crops = [len(crops) for crops in batch.crops]
    depth = trainer.model.student.backbone.n_blocks
    return draw_kept(trainer.config.model.backbone, depth, num_crops, generator, trainer.world.device)


# --- around the steps ---------------------------------------------------------------------------------------------


def train(config: TrainConfig, output: str, evaluate: Evaluate | None = None) -> None:
    """Train into the local folder `output`, from its last checkpoint if there is one.

    evaluate: called on the first rank before the first step, every `evaluate_every` steps, and after the last step.
    Raises ConfigError, DeviceError, WeightsError and OutputMismatchError before the first step. Raises InputError,
    RejectBudgetError and TrainingError also later, after saving a checkpoint of the steps done. SIGTERM and SIGINT save
    a checkpoint too; the process then exits with status 143 or 130.
    """
    if not paths.is_local(output):
        raise ConfigError(f"--output {output}: training writes to a local folder. Copy it afterwards.")
    with open_world(config.device) as world, _received_signals() as signals:
        images_per_pass = config.images_per_pass * world.num_ranks
        if config.batch_size % images_per_pass:
            raise ConfigError(
                f"batch_size {config.batch_size} does not divide among {world.num_ranks} ranks of images_per_pass "
                f"{config.images_per_pass}. Choose a multiple of {images_per_pass}."
            )
        _check_memory(config, world)
        if world.is_first:
            paths.require_writable(output)
            samples.prepare(config.data, output, InlineRunner())
        barrier()
        trainer = build_trainer(config, world)
        counters = _resume(trainer, output)
        if world.is_first:
            write_resolved(config, paths.join(output, "train.toml"))
        if counters.step >= config.num_steps:
            if world.is_first:
                progress.say(f"train: all {config.num_steps:,} steps are done already in {output}")
            return
        writer = MetricsWriter(
            output,
            world,
            first_step=counters.step,
            num_steps=config.num_steps,
            log_every=config.log_every,
            batch_size=config.batch_size,
            flops_per_image=step_flops(config),
            peak_flops=None if config.peak_teraflops is None else config.peak_teraflops * 1e12,
        )
        with writer:
            _run(trainer, output, counters, writer, evaluate, signals)


def _run(
    trainer: Trainer,
    output: str,
    counters: Counters,
    writer: MetricsWriter,
    evaluate: Evaluate | None,
    signals: list[int],
) -> None:
    config, world = trainer.config, trainer.world
    if counters.step == 0:
        _evaluate(trainer, evaluate, counters.step, writer)
    loader = data.open_batches(
        config.data,
        config.augment,
        output,
        seed=config.seed,
        first_step=counters.step,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        images_per_pass=config.images_per_pass,
        rank=world.rank,
        num_ranks=world.num_ranks,
        draw_masks=_mask_sampler(config),
        rejects=counters.rejects,
        pin_memory=config.device == "cuda",
    )
    with loader as batches:
        for number in range(counters.step, config.num_steps):
            failure: UserError | None = None
            passes: list[Batch] = []
            started = time.perf_counter()
            try:
                passes = [batch.to(world.device) for batch in next(batches)]
            except UserError as error:  # a shard is lost, or too many images are broken
                failure = error
            seconds_waited = time.perf_counter() - started
            # All ranks stop at the same step, whichever rank has the reason.
            reasons = torch.tensor([float(failure is not None), float(max(signals, default=0))], device=world.device)
            failed, signalled = max_over_ranks(reasons).tolist()
            if failed or signalled:
                _save(trainer, output, counters)
                if failure is not None:
                    raise failure
                if failed:
                    raise InputError("Another rank could not read its data; its message says why.")
                raise SystemExit(128 + int(signalled))

            result = step(trainer, passes, number)
            counters.step = number + 1
            counters.skipped += not result.finite
            counters.skipped_in_a_row = 0 if result.finite else counters.skipped_in_a_row + 1
            writer.add(counters.step, _step_metrics(config, number, result, counters, seconds_waited))
            if counters.skipped_in_a_row > MAX_SKIPPED_STEPS:
                _save(trainer, output, counters)
                image_ids = [image_id for batch in passes for image_id in batch.image_ids]
                raise TrainingError(
                    f"Step {number}: the loss or a gradient is not finite, for {counters.skipped_in_a_row} steps in a "
                    f"row; at most {MAX_SKIPPED_STEPS} are allowed. Losses: "
                    f"{ {name: value.item() for name, value in result.losses.items()} }. Lower the learning rate, or "
                    f"look at the images of this rank's batch: {', '.join(image_ids)}."
                )
            is_last = counters.step == config.num_steps
            if is_last or counters.step % config.checkpoint.every == 0:
                _save(trainer, output, counters)
            if is_last or counters.step % config.export_every == 0:
                _export(trainer, output, counters.step)
            if is_last or counters.step % config.evaluate_every == 0:
                _evaluate(trainer, evaluate, counters.step, writer)


def _step_metrics(
    config: TrainConfig, number: int, result: StepResult, counters: Counters, seconds_waited: float
) -> StepMetrics:
    scalars: dict[str, float | Tensor] = {f"gradient_norm/{name}": norm for name, norm in result.gradient_norms.items()}
    scalars |= asdict(_scheduled_values(config, number))
    scalars |= {"skipped_steps": counters.skipped, "rejected_images": len(counters.rejects)}
    return StepMetrics(result.losses if result.finite else {}, result.targets, scalars, seconds_waited)


def step_flops(config: TrainConfig) -> float:
    """Floating-point operations of the backbones for one image of a step; a multiply-add counts as two.

    Counted: the student's forward pass and twice as much for its backward pass, over the crops that stochastic depth
    keeps, and the teacher's forward pass. Not counted: the heads, and the operations that `recompute` repeats.
    """
    teacher = config.model.distillation.backbone if config.model.distillation else config.model.backbone
    total = 0.0
    for group in config.augment.crops:
        kept_share = 1 - config.model.backbone.drop_path
        total += 3 * kept_share * group.num * forward_flops(config.model.backbone, group.size)
        if group.name == "global":
            total += group.num * forward_flops(teacher, group.size)
    return total


def build_trainer(config: TrainConfig, world: World, *, shard_one_rank: bool = False) -> Trainer:
    """Build the networks on the device, sharded over the ranks, and the student's optimizer.

    shard_one_rank: shard on a single rank too, see `distributed.shard`.
    """
    model = build_model(config.model, config.seed, config.packed_attention)
    for network in {id(each): each for each in (model.student, model.average, model.teacher)}.values():
        network.to(world.device)
        is_student = network is model.student
        for block in network.backbone.blocks:
            if is_student:
                distributed.checkpoint_activations(block, config.recompute)
            if config.compile:
                distributed.compile_forward(block)
        heads = [head for head in (network.dino_head, network.ibot_head) if head is not None]
        distributed.shard(
            network,
            [*network.backbone.blocks, *heads],
            world,
            param_dtype=torch.bfloat16 if config.precision == "bfloat16" else None,
            reshard_after_forward=config.reshard_after_forward or not is_student,
            one_rank_too=shard_one_rank,
        )
    model.centers.update({name: center.to(world.device) for name, center in model.centers.items()})
    groups = optimizer.parameter_groups(
        model.student.named_parameters(),
        layer_decay=config.optimizer.layer_decay,
        patch_embed_multiplier=config.optimizer.patch_embed_multiplier,
    )
    return Trainer(config, world, model, optimizer.make_optimizer(config.optimizer, groups))


def _mask_sampler(config: TrainConfig) -> DrawMasks:
    """Draws the masks of some global crops of a step; the loader's processes call it."""
    side = config.model.backbone.image_size // config.model.backbone.patch_size
    num_crops = NUM_GLOBAL * config.batch_size
    return functools.partial(masking.step_masks, config.masks, (side, side), seed=config.seed, num_crops=num_crops)


def _check_memory(config: TrainConfig, world: World) -> None:
    """Raises ConfigError if the weights, EMA and scores need more memory than the device has."""
    if world.device.type == "cuda":
        available = torch.cuda.mem_get_info(world.device)[1]
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = model_memory(config.model, world.num_ranks)
    if sum(needed.values()) > available:
        parts = ", ".join(f"{name} {count / 1e9:,.1f}" for name, count in needed.items())
        raise ConfigError(
            f"The model needs more memory than {world.device.type} has: {sum(needed.values()) / 1e9:,.1f} GB of "
            f"{available / 1e9:,.1f} ({parts}), before any image. Take fewer prototypes (num_prototypes), fewer rows "
            "at once (model.objective.rows_per_chunk), a smaller backbone, or more ranks."
        )


# --- saving -------------------------------------------------------------------------------------------------------


def _checkpoint_parts(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Every tensor of a checkpoint, by the part it belongs to."""
    model = trainer.model
    networks = {name: network.state_dict() for name, network in model.networks().items()}
    return networks | {
        "optimizer": checkpoint.optimizer_tensors(model.student, trainer.optimizer),
        "centers": model.centers,
    }


def _save(trainer: Trainer, output: str, counters: Counters) -> None:
    config = trainer.config
    checkpoint.save(
        paths.join(output, "checkpoints"),
        counters.step,
        _checkpoint_parts(trainer),
        progress=asdict(counters) | {"images_per_pass": config.images_per_pass},
        config=trainer.compared_config,
        keep=config.checkpoint.keep,
        world=trainer.world,
    )


def _resume(trainer: Trainer, output: str) -> Counters:
    """Fill the networks and the optimizer from the last checkpoint, if there is one."""
    path = checkpoint.latest(paths.join(output, "checkpoints"))
    if path is None:
        return Counters()
    config = trainer.config
    record = checkpoint.load(path, _checkpoint_parts(trainer), config=trainer.compared_config, world=trainer.world)
    progress_before = dict(record.progress)
    before, objective = progress_before.pop("images_per_pass"), config.model.objective
    if trainer.world.is_first and before != config.images_per_pass and objective.koleo_weight:
        if objective.koleo_images is None:
            progress.say(
                f"train: images_per_pass was {before} and is {config.images_per_pass}: KoLeo now looks for neighbours "
                f"among {config.images_per_pass} images. model.objective.koleo_images keeps its groups."
            )
    return Counters(**progress_before)


def _export(trainer: Trainer, output: str, number: int) -> None:
    state = distributed.full_state(trainer.model.average)  # every rank takes part
    if trainer.world.is_first:
        backbone = backbone_from_state(trainer.config.model.backbone, state)
        heads = {name: value for name, value in state.items() if not name.startswith("backbone.")}
        export.export(backbone, heads, export.folder(output, number))
    barrier()


def _evaluate(trainer: Trainer, evaluate: Evaluate | None, number: int, writer: MetricsWriter) -> None:
    if evaluate is None:
        return
    state = distributed.full_state(trainer.model.average)
    if trainer.world.is_first:
        backbone = backbone_from_state(trainer.config.model.backbone, state)
        writer.add_evaluation(number, evaluate(backbone.to(trainer.world.device).eval(), number))
    barrier()


@contextlib.contextmanager
def _received_signals() -> Iterator[list[int]]:
    """A list that collects SIGTERM and SIGINT, so that the current step is finished first.

    Python sets signal handlers in a process's main thread only. Ray Train calls a worker in another thread; the list
    then stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous_handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
