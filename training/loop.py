"""THE TRAINING LOOP: one step, top to bottom, and what happens around it.

    OUTPUT/
      train.toml                  the resolved config
      metrics.jsonl               one line for every `log_every` steps, and for every evaluation
      tensorboard/                the same
      checkpoints/step-0001000/   resumes exactly, on any number of ranks         checkpoint.py
      export/step-0001000/        teacher.pth, heads.pth, hf/                      export.py

A step is a function of what the last one left and of its number: its images, crops and masks are drawn from (seed,
step); which images stochastic depth leaves out, from these and the rank and pass. So a checkpoint holds no state of a
generator, a run that was stopped goes on as if it had not been, and one that goes on with another number of ranks sees
the same images.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from curation.backbone import VisionTransformer
from curation.config import Settings, resolved_toml
from curation.engine import progress
from curation.engine.ranks import World, barrier, max_over_ranks, open_world, sum_over_ranks
from curation.engine.runner import InlineRunner
from curation.errors import ConfigError, InputError, TrainingError, UserError
from curation.files import paths
from curation.files.hashes import hash_json
from training import checkpoint, data, distributed, export, masking, optimizer, samples
from training.augment import AugmentConfig
from training.checkpoint import CheckpointConfig
from training.data import Batch
from training.masking import MaskConfig
from training.metrics import Journal, Told
from training.model import (
    NUM_GLOBAL,
    Lesson,
    Model,
    ModelConfig,
    build_model,
    draw_kept,
    forward_flops,
    learn,
    model_memory,
    move_average,
    move_centers,
    teach,
    whole_backbone,
)
from training.optimizer import OptimizerConfig, ScheduleConfig, StepValues
from training.samples import DataConfig

# Called with the averaged student and the number of steps done; what it gives is written with the metrics.
Evaluate = Callable[[VisionTransformer, int], dict[str, float]]


# Of a TrainConfig: what changes where and how fast it runs, and what it tells.
_MAY_CHANGE: dict[str, Any] = {
    **dict.fromkeys(
        (
            "device",
            "packed_attention",
            "compile",
            "recompute",
            "reshard_after_forward",
            "max_skipped_steps",
            "log_every",
            "export_every",
            "export_layouts",
            "evaluate_every",
            "peak_teraflops",
            "checkpoint",
        ),
        True,
    ),
    "data": {"workers"},
}


class TrainConfig(Settings):
    """A whole training run."""

    seed: int = Field(default=0, ge=0)
    """Of fresh weights, of the order of the images, and of everything that is drawn."""
    num_steps: int = Field(gt=0)
    """Steps of the optimizer; every schedule ends there."""
    batch_size: int = Field(gt=0)
    """Images of a step, over all ranks and passes."""
    images_per_pass: int = Field(gt=0)
    """Images that a rank puts through the networks at once; a rank's share of the batch is that many, or several times
    as many, whose gradients are then added up."""
    device: Literal["cpu", "cuda"] = "cuda"
    """`cuda` is one GPU a process."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrix products and attention. Weights, softmax, losses and averages are float32."""
    packed_attention: Literal["grouped", "varlen"] = "grouped"
    """Attention of crops of different sizes: one call each, or `varlen`: one for all, on a GPU in bfloat16."""
    compile: bool = False
    """Compile every block."""
    recompute: distributed.Recompute = "none"
    """What the backward pass computes again: `none`, `selective` (all but products and attention) or `full`."""
    reshard_after_forward: bool = True
    """Whether a rank frees the student's gathered parameters until the backward pass."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps in a row that may be skipped for a loss or gradient that is not finite."""
    log_every: int = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    export_every: int = Field(default=12_500, gt=0)
    """Steps between two exports; the last step is exported in any case."""
    export_layouts: tuple[export.ExportLayout, ...] = export.DEFAULT_LAYOUTS
    """What is exported."""
    evaluate_every: int = Field(default=12_500, gt=0)
    """Steps between two evaluations, where the pipeline hands one in; the first and last step have one."""
    peak_teraflops: float | None = Field(default=None, gt=0)
    """Of one device in this precision, by its data sheet; with it, the share that is made use of is reported."""
    model: ModelConfig
    """The networks and their objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    schedule: ScheduleConfig
    """What changes from step to step."""
    augment: AugmentConfig = AugmentConfig()
    """The crops of an image."""
    masks: MaskConfig = MaskConfig()
    """The patches that the student is not shown."""
    data: DataConfig
    """The images."""
    checkpoint: CheckpointConfig = CheckpointConfig()
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
class Progress:
    """What a checkpoint holds beside tensors."""

    step: int = 0
    """Steps done; also where in the data to go on."""
    skipped: int = 0
    """Steps that were skipped for a loss or gradient that was not finite."""
    skipped_in_a_row: int = 0
    """Of them, how many just now."""
    rejects: dict[str, str] = field(default_factory=dict)
    """Images that could not be decoded, and why."""


@dataclass(frozen=True)
class Trainer:
    """All that a step works on."""

    config: TrainConfig
    world: World
    model: Model
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class StepResult:
    """What came of one step."""

    finite: bool
    """Whether the step was taken; otherwise nothing has changed."""
    losses: dict[str, Tensor]
    """`loss` and its parts, means over this rank's passes."""
    norms: dict[str, Tensor]
    """Of the gradients before clipping, for each part of the student."""
    lessons: list[Lesson]
    """What the teacher said."""


def step(trainer: Trainer, passes: Sequence[Batch], number: int) -> StepResult:
    """One step of the optimizer, on this rank's passes of the step with that number."""
    config, model, device = trainer.config, trainer.model, trainer.world.device
    now = _values(config, number)

    # What the teacher says of all passes; Sinkhorn-Knopp and centering balance it over them and over all ranks.
    with _precision(config):
        lessons = teach(model, passes, now.teacher_temperature, sum_over_ranks, max_over_ranks)

    # What the student makes of it, pass by pass; gradients add up.
    losses: dict[str, Tensor] = {}
    for index, (batch, lesson) in enumerate(zip(passes, lessons, strict=True)):
        seeds = (config.seed, number, trainer.world.rank, index)
        generator = torch.Generator().manual_seed(int(hash_json(seeds)[:15], 16))
        num_crops = [len(crops) for crops in batch.crops]
        depth = model.student.backbone.n_blocks
        kept = draw_kept(config.model.backbone, depth, num_crops, generator, device)
        with _precision(config):
            loss, parts = learn(model, batch, lesson, kept)
        (loss / len(passes)).backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        for name, value in {"loss": loss.detach(), **parts}.items():
            losses[name] = losses.get(name, 0) + value / len(passes)

    # A step whose numbers are not finite on any rank is taken on none.
    submodules = {name: list(module.parameters()) for name, module in model.student.named_children()}
    norms = optimizer.clip_gradients(submodules, config.optimizer.clip_norm)
    finite = torch.stack([losses["loss"].isfinite(), *(norm.isfinite() for norm in norms.values())]).all()
    if max_over_ranks(1 - finite.float()).item():
        trainer.optimizer.zero_grad()
        return StepResult(False, losses, norms, lessons)

    optimizer.apply_schedules(trainer.optimizer, now)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    move_average(model.average, model.student, now.teacher_momentum)
    move_centers(model, lessons, sum_over_ranks)
    return StepResult(True, losses, norms, lessons)


def _values(config: TrainConfig, number: int) -> StepValues:
    return optimizer.step_values(
        config.schedule, step=number, total_steps=config.num_steps, batch_size=config.batch_size
    )


def _precision(config: TrainConfig) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


# --- around the steps ---------------------------------------------------------------------------------------------


def train(config: TrainConfig, output: str, evaluate: Evaluate | None = None) -> None:
    """Train into the local folder `output`, or go on where the last checkpoint there stands.

    evaluate: called on the first rank before the first step, every `evaluate_every` steps, and after the last.
    Raises ConfigError, DeviceError, WeightsError and OutputMismatchError before the first step; InputError,
    RejectBudgetError and TrainingError later too, with the steps done saved. SIGTERM and SIGINT save as well, and leave
    with status 143 and 130.
    """
    if not paths.is_local(output):
        raise ConfigError(f"--output {output}: training writes to a local folder. Copy it afterwards.")
    with open_world(config.device) as world, _signals_noted() as stopped:
        batch_of_rank = config.images_per_pass * world.num_ranks
        if config.batch_size % batch_of_rank:
            raise ConfigError(
                f"batch_size {config.batch_size} does not divide among {world.num_ranks} ranks of images_per_pass "
                f"{config.images_per_pass}. Choose a multiple of {batch_of_rank}."
            )
        _check_memory(config, world)
        if world.is_first:
            samples.prepare(config.data, output, InlineRunner())
        barrier()
        trainer = prepare(config, world)
        reached = _resume(trainer, output)
        if world.is_first:
            _write_config(config, output)
        if reached.step >= config.num_steps:
            if world.is_first:
                progress.say(f"train: all {config.num_steps:,} steps are done already in {output}")
            return
        journal = Journal(
            output,
            world,
            first_step=reached.step,
            num_steps=config.num_steps,
            log_every=config.log_every,
            batch_size=config.batch_size,
            flops_per_image=step_flops(config),
            peak_flops=None if config.peak_teraflops is None else config.peak_teraflops * 1e12,
        )
        with journal:
            _run(trainer, output, reached, journal, evaluate, stopped)


def _run(
    trainer: Trainer,
    output: str,
    reached: Progress,
    journal: Journal,
    evaluate: Evaluate | None,
    stopped: list[int],
) -> None:
    config, world = trainer.config, trainer.world
    if reached.step == 0:
        _evaluate(trainer, evaluate, reached.step, journal)
    source = data.open_batches(
        config.data,
        config.augment,
        output,
        seed=config.seed,
        first_step=reached.step,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        images_per_pass=config.images_per_pass,
        rank=world.rank,
        num_ranks=world.num_ranks,
        masks=_masks(config),
        rejects=reached.rejects,
        pin_memory=config.device == "cuda",
    )
    with source as batches:
        for number in range(reached.step, config.num_steps):
            failure: UserError | None = None
            passes: list[Batch] = []
            started = time.perf_counter()
            try:
                passes = [batch.to(world.device) for batch in next(batches)]
            except UserError as error:  # a shard that is gone, or too many broken images
                failure = error
            waited = time.perf_counter() - started
            # Every rank stops at the same step, whichever of them has the reason.
            reasons = torch.tensor([float(failure is not None), float(max(stopped, default=0))], device=world.device)
            failed, signalled = max_over_ranks(reasons).tolist()
            if failed or signalled:
                _save(trainer, output, reached)
                if failure is not None:
                    raise failure
                if failed:
                    raise InputError("Another rank could not read its data; its message says why.")
                raise SystemExit(128 + int(signalled))

            result = step(trainer, passes, number)
            reached.step = number + 1
            reached.skipped += not result.finite
            reached.skipped_in_a_row = 0 if result.finite else reached.skipped_in_a_row + 1
            journal.add(reached.step, _told(config, number, result, reached, waited))
            if reached.skipped_in_a_row > config.max_skipped_steps:
                _save(trainer, output, reached)
                ids = [image_id for batch in passes for image_id in batch.image_ids]
                raise TrainingError(
                    f"Step {number}: the loss or a gradient is not finite, now for {reached.skipped_in_a_row} steps in "
                    f"a row (max_skipped_steps is {config.max_skipped_steps}). Losses: "
                    f"{ {name: value.item() for name, value in result.losses.items()} }. Lower the learning rate, or "
                    f"look at the images of this rank's batch: {', '.join(ids)}."
                )
            last = reached.step == config.num_steps
            if last or reached.step % config.checkpoint.every == 0:
                _save(trainer, output, reached)
            if last or reached.step % config.export_every == 0:
                _export(trainer, output, reached.step)
            if last or reached.step % config.evaluate_every == 0:
                _evaluate(trainer, evaluate, reached.step, journal)


def _told(config: TrainConfig, number: int, result: StepResult, reached: Progress, waited: float) -> Told:
    now = _values(config, number)
    scalars: dict[str, float | Tensor] = {f"gradient_norm/{name}": norm for name, norm in result.norms.items()}
    scalars |= asdict(now) | {"skipped_steps": reached.skipped, "rejected_images": len(reached.rejects)}
    return Told(result.losses if result.finite else {}, result.lessons, scalars, waited)


def step_flops(config: TrainConfig) -> float:
    """Floating-point operations of the backbones for one image of a step, a multiplication and an addition as two.

    Forward and twice as much backward for the student's crops, less the images that stochastic depth leaves out, and
    forward for the teacher's. Heads, and what `recompute` computes twice, are not counted.
    """
    teacher = config.model.distillation.backbone if config.model.distillation else config.model.backbone
    total = 0.0
    for group in config.augment.crops:
        kept = 1 - config.model.backbone.drop_path
        total += 3 * kept * group.num * forward_flops(config.model.backbone, group.size)
        if group.name == "global":
            total += group.num * forward_flops(teacher, group.size)
    return total


def _write_config(config: TrainConfig, output: str) -> None:
    """Save the resolved config, unless this very text is there already."""
    path, text = paths.join(output, "train.toml"), resolved_toml(config).encode()
    if not paths.exists(path) or paths.read_bytes(path) != text:
        paths.write_bytes(path, text)


def prepare(config: TrainConfig, world: World) -> Trainer:
    """The networks on the device, split over the ranks, and the optimizer of the student."""
    model = build_model(config.model, config.seed, config.packed_attention)
    for network in {id(each): each for each in (model.student, model.average, model.teacher)}.values():
        network.to(world.device)
        trained = network is model.student
        for block in network.backbone.blocks:
            if trained:
                distributed.checkpoint_activations(block, config.recompute)
            if config.compile:
                distributed.compile_forward(block)
        heads = [head for head in (network.dino_head, network.ibot_head) if head is not None]
        distributed.shard(
            network,
            [*network.backbone.blocks, *heads],
            world,
            param_dtype=torch.bfloat16 if config.precision == "bfloat16" else None,
            reshard_after_forward=config.reshard_after_forward or not trained,
        )
    model.centers.update({name: center.to(world.device) for name, center in model.centers.items()})
    groups = optimizer.parameter_groups(
        model.student.named_parameters(),
        layer_decay=config.optimizer.layer_decay,
        patch_embed_multiplier=config.optimizer.patch_embed_multiplier,
    )
    return Trainer(config, world, model, optimizer.make_optimizer(config.optimizer, groups))


def _masks(config: TrainConfig) -> Callable[[int, range], Tensor]:
    """Which patches of which global crops of a step are masked, for the loader's processes."""
    side = config.model.backbone.image_size // config.model.backbone.patch_size
    return functools.partial(_step_masks, config.masks, (side, side), config.seed, NUM_GLOBAL * config.batch_size)


def _step_masks(
    config: MaskConfig, grid: tuple[int, int], seed: int, num_crops: int, number: int, crops: range
) -> Tensor:
    return masking.step_masks(config, grid, seed=seed, step=number, num_crops=num_crops, crops=crops)


def _check_memory(config: TrainConfig, world: World) -> None:
    """Refuse a model whose weights, averages and scores no device of this kind holds. Raises ConfigError."""
    if world.device.type == "cuda":
        there = torch.cuda.mem_get_info(world.device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = model_memory(config.model, world.num_ranks)
    if sum(needed.values()) > there:
        parts = ", ".join(f"{name} {count / 1e9:,.1f}" for name, count in needed.items())
        raise ConfigError(
            f"The model needs more memory than {world.device.type} has: {sum(needed.values()) / 1e9:,.1f} GB of "
            f"{there / 1e9:,.1f} ({parts}), before any image. Fewer prototypes (num_prototypes), fewer rows at once "
            "(model.objective.rows_per_chunk), a smaller backbone, or more ranks."
        )


# --- saving -------------------------------------------------------------------------------------------------------


def _parts(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Every tensor that a checkpoint holds, by the name of what it belongs to."""
    model = trainer.model
    networks = {name: network.state_dict() for name, network in model.networks().items()}
    return networks | {
        "optimizer": checkpoint.optimizer_tensors(model.student, trainer.optimizer),
        "centers": model.centers,
    }


def _save(trainer: Trainer, output: str, reached: Progress) -> None:
    config = trainer.config
    checkpoint.save(
        paths.join(output, "checkpoints"),
        reached.step,
        _parts(trainer),
        progress=asdict(reached),
        config=_what_numbers_depend_on(config),
        keep=config.checkpoint.keep,
        world=trainer.world,
    )


def _resume(trainer: Trainer, output: str) -> Progress:
    """Fill the networks and the optimizer from the last checkpoint, where there is one."""
    path = checkpoint.latest(paths.join(output, "checkpoints"))
    if path is None:
        return Progress()
    config = _what_numbers_depend_on(trainer.config)
    record = checkpoint.load(path, _parts(trainer), config=config, world=trainer.world)
    return Progress(**record.progress)


def _what_numbers_depend_on(config: TrainConfig) -> dict[str, Any]:
    """The config without what may change from one part of a run to the next: where it runs, and what it reports."""
    return config.model_dump(mode="json", exclude=_MAY_CHANGE)


def _export(trainer: Trainer, output: str, number: int) -> None:
    state = distributed.full_state(trainer.model.average)  # every rank gives its part
    if trainer.world.is_first:
        backbone = whole_backbone(trainer.config.model.backbone, state)
        heads = {name: value for name, value in state.items() if not name.startswith("backbone.")}
        export.export(backbone, heads, export.folder(output, number), trainer.config.export_layouts)
    barrier()


def _evaluate(trainer: Trainer, evaluate: Evaluate | None, number: int, journal: Journal) -> None:
    if evaluate is None:
        return
    state = distributed.full_state(trainer.model.average)
    if trainer.world.is_first:
        backbone = whole_backbone(trainer.config.model.backbone, state)
        journal.evaluated(number, evaluate(backbone.to(trainer.world.device).eval(), number))
    barrier()


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are appended to; the step that is under way is finished first.

    Outside of a process's main thread, where Ray Train calls a worker, Python lets no one listen.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
