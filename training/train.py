"""The trainer's command, for one process or the processes that torchrun starts.

    python -m training.train --config pipelines/configs/train/vitl16_short.toml --output runs/vitl16
    torchrun --standalone --nproc-per-node 8 -m training.train --config ... --output ...

The same command resumes a stopped run. docs/launch.md describes SLURM and Ray. pipelines/train.py adds the demo's
evaluation.
"""

from collections.abc import Iterator
from typing import Annotated

import typer

from curation.config import load, resolved_toml
from curation.engine import command
from training.loop import TrainConfig, step_flops, train
from training.model import model_memory
from training.optimizer import learning_rate

ConfigOption = Annotated[str, typer.Option("--config", metavar="FILE", help="TOML file of a training run.")]


def command_line(
    config: ConfigOption,
    output: command.OutputOption = "runs/train",
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
) -> None:
    """Train a Vision Transformer on a corpus, as DINOv2 was trained."""
    settings = load(TrainConfig, config, overrides or ())
    if not plan:
        command.require_apart(output, settings, config)
        with command.saying_how_to_go_on(f"The checkpoints in '{output}' are kept"):
            train(settings, output)
        return
    print_plan(settings)


def print_plan(config: TrainConfig) -> None:
    """Print the resolved config, and its consequences as comments."""
    print(resolved_toml(config))
    for line in derived(config):
        print(f"# {line}")


def derived(config: TrainConfig) -> Iterator[str]:
    """Quantities that follow from a config, one a line."""
    crops = ", ".join(f"{group.num} {group.name} of {group.size}" for group in config.augment.crops)
    num_images = config.num_steps * config.batch_size
    yield f"{config.num_steps:,} steps of {config.batch_size:,} images: {num_images:,} in total"
    yield f"crops of an image: {crops} pixels"
    warmup = config.schedule.learning_rate_warmup_steps
    peak = learning_rate(config.schedule, step=warmup, total_steps=config.num_steps + 1, batch_size=config.batch_size)
    yield f"peak learning rate: {peak:.3g}, after {warmup:,} steps"
    flops = step_flops(config)
    yield f"backbones, forward and backward: {flops / 1e9:,.1f} GFLOP an image"
    needed = model_memory(config.model, num_ranks=1)
    parts = ", ".join(f"{name} {count / 1e9:,.2f}" for name, count in needed.items())
    yield f"memory of one rank before any image: {sum(needed.values()) / 1e9:,.1f} GB ({parts})"


if __name__ == "__main__":
    from training import train as this  # by its real name, or its classes would exist twice

    command.main(this.command_line)
