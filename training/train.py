"""The trainer's command: one process, or as many as torchrun starts.

    python -m training.train --config pipelines/configs/vitl16_short.toml --output runs/vitl16
    torchrun --standalone --nproc-per-node 8 -m training.train --config ... --output ...

The same command goes on where a stopped run stands. docs/launch.md has SLURM and Ray; pipelines/train.py adds the
evaluation of the demo.
"""

from curation import command, storage
from curation.config import load, resolved_toml
from training.loop import Evaluate, TrainConfig, train

DEFAULT_CONFIG = "pipelines/configs/single_gpu.toml"


def main(config: TrainConfig, output: str, evaluate: Evaluate | None = None) -> None:
    """Train, and keep the resolved config beside what comes of it."""
    path = storage.join(output, "train.toml")
    train(config, output, evaluate)


def command_line(
    config: command.ConfigOption = DEFAULT_CONFIG,
    output: command.OutputOption = "runs/train",
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
) -> None:
    """Train a Vision Transformer on a corpus, as DINOv2 is trained."""
    settings = load(TrainConfig, config, overrides or ())
    if plan:
        print(resolved_toml(settings), end="")
        return
    train(settings, output)


if __name__ == "__main__":
    from training import train as this  # by its real name, or its classes would exist twice

    command.main(this.command_line)
