"""The metrics of a training run: a progress bar, metrics.jsonl and TensorBoard.

    {"step": 1000, "loss": 9.1, "dino_global": 0.9, ..., "gradient_norm/backbone": 1.3, "learning_rate": 0.004, ...}

Losses are means over the steps since the last line and over all ranks. Rates are over those steps. All other values are
of the last step. Resuming drops the lines of steps that run again, so each step has one line.
"""

import contextlib
import json
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from curation.engine import progress
from curation.engine.ranks import World, sum_over_ranks
from curation.files import paths
from training.losses import entropies
from training.model import PassTargets

# Rows of the teacher's probabilities whose entropy is reported. Assumed: enough for a mean, cheap at any size.
ENTROPY_ROWS = 256


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step on one rank."""

    losses: dict[str, Tensor]
    """`loss` and its terms; empty when the step was skipped."""
    targets: Sequence[PassTargets]
    """The teacher's targets, one for each pass."""
    scalars: dict[str, float | Tensor]
    """Written as they are: gradient norms, scheduled values, counts."""
    seconds_waited: float
    """Time that the step waited for images."""


class MetricsWriter:
    """Writes the metrics of one run, on its first rank. A context manager.

    flops_per_image: floating-point operations of a step for one image. peak_flops: of one device in a second. With
    peak_flops, each line has the share of it that the backbones use.
    """

    def __init__(
        self,
        output: str,
        world: World,
        *,
        first_step: int,
        num_steps: int,
        log_every: int,
        batch_size: int,
        flops_per_image: float,
        peak_flops: float | None,
    ) -> None:
        self._path = Path(output, "metrics.jsonl")
        self._world, self._num_steps, self._log_every = world, num_steps, log_every
        self._batch_size, self._flops_per_image, self._peak_flops = batch_size, flops_per_image, peak_flops
        self._resources = contextlib.ExitStack()
        self._bar_note = ""
        self._advance_bar = None
        if world.is_first:
            _drop_lines_after(self._path, first_step)
            board = SummaryWriter(str(Path(output, "tensorboard")), purge_step=first_step + 1 if first_step else None)
            self._board = board
            self._resources.callback(board.close)
            self._advance_bar = self._resources.enter_context(
                progress.bar("train", total=num_steps, unit="steps", start=first_step)
            )
        self._start_interval()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Add the metrics of step number `step`, counted from 1. Every rank calls it.

        A line is written every `log_every` steps and after the last step.
        """
        for name, value in metrics.losses.items():
            self._losses[name] = self._losses.get(name, 0) + value
        self._num_interval_steps += 1
        self._num_finite_steps += bool(metrics.losses)
        self._seconds_waited += metrics.seconds_waited
        is_due = step % self._log_every == 0 or step == self._num_steps
        line = self._line(metrics) if is_due else {}
        if self._advance_bar is not None:
            if is_due:
                self._write(step, line)
                self._bar_note = f"loss {line.get('loss', math.nan):.3f}, {line['images_per_second']:.1f} images/s"
            self._advance_bar(1, self._bar_note)
        if is_due:
            self._start_interval()

    def add_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Write the scores of an evaluation after `step` steps. The first rank calls it."""
        self._write(step, scores)
        self._started = time.perf_counter()  # leaves the evaluation's time out of the rates
        progress.say(f"after {step:,} steps: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def _start_interval(self) -> None:
        """Reset the sums and the clock behind a line of metrics."""
        self._losses: dict[str, Tensor | float] = {}
        self._num_interval_steps, self._num_finite_steps = 0, 0
        self._seconds_waited, self._started = 0.0, time.perf_counter()

    def _line(self, metrics: StepMetrics) -> dict[str, float]:
        line: dict[str, float] = {}
        if self._losses:
            losses = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in self._losses.values()])
            means = sum_over_ranks(losses) / (self._world.num_ranks * self._num_finite_steps)
            line = dict(zip(self._losses, means.tolist(), strict=True))
        line |= {name: float(value) for name, value in metrics.scalars.items()}
        if metrics.losses:
            line |= collapse_metrics(metrics.targets)
        seconds = time.perf_counter() - self._started
        rate = self._num_interval_steps * self._batch_size / seconds
        line |= {"images_per_second": rate, "data_wait_share": self._seconds_waited / seconds}
        if self._peak_flops is not None:
            line["model_flops_utilization"] = rate * self._flops_per_image / (self._peak_flops * self._world.num_ranks)
        line |= {"peak_memory_gb": _peak_memory(self._world.device) / 1e9}
        return {name: value for name, value in line.items() if math.isfinite(value)}  # JSON has no other numbers

    def _write(self, step: int, line: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        for name, value in line.items():
            self._board.add_scalar(name, value, step)


@torch.no_grad()
def collapse_metrics(targets: Sequence[PassTargets]) -> dict[str, float]:
    """Signs of collapse in the teacher's outputs, for this rank's first pass.

    teacher_entropy      nats, mean over images: 0 when each image has one prototype with certainty
    prototype_entropy    nats, of the mean over images: 0 when all images have the same prototype, at most ln K
    rank_me              effective number of dimensions of the CLS tokens (Garrido et al., arXiv 2210.02885, equation 1)
    mean_cosine          between the CLS tokens of different images: 1 when all are equal; 0 for a single image
    """
    mean_entropy, entropy_of_mean = entropies(targets[0].images, ENTROPY_ROWS)
    tokens = targets[0].teacher_cls_tokens[0].float()  # (n, D)
    singular = torch.linalg.svdvals(tokens)
    shares = singular / singular.sum() + 1e-7  # cited: RankMe's epsilon
    unit = functional.normalize(tokens, dim=-1)
    cosine = (unit.sum(0).square().sum() - len(unit)) / max(len(unit) * (len(unit) - 1), 1)
    return {
        "teacher_entropy": mean_entropy.item(),
        "prototype_entropy": entropy_of_mean.item(),
        "rank_me": torch.exp(-(shares * shares.log()).sum()).item(),
        "mean_cosine": cosine.item(),
    }


def _peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, the last checkpoint's, and a last line that was cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    paths.write_bytes(str(path), "".join(kept).encode())
