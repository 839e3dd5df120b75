"""What a training run tells of itself: a bar for a person, metrics.jsonl and TensorBoard for what comes after.

    {"step": 1000, "loss": 9.1, "dino_global": 0.9, ..., "gradient_norm/backbone": 1.3, "learning_rate": 0.004, ...}

Losses are means over the steps since the last line and over all ranks; rates are over those steps; the rest is of the
last of them. After a crash the lines of steps that are done again are dropped, so each step has one line.
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
from training.model import Lesson

# Rows of the teacher's probabilities whose entropy is reported. Assumed: enough for a mean, cheap at any size.
ENTROPY_ROWS = 256


@dataclass(frozen=True)
class Told:
    """What one step has to tell."""

    losses: dict[str, Tensor]
    """`loss` and its parts, of this rank; none of a step that was skipped."""
    lessons: Sequence[Lesson]
    """What the teacher said."""
    scalars: dict[str, float | Tensor]
    """Written as they are: gradient norms, schedules, counts."""
    seconds_waited: float
    """For images."""


class Journal:
    """The record of one run, written by its first rank. A context manager.

    flops_per_image: floating-point operations of a step for one image, and peak_flops: of one device in a second; both
    give the share that the model makes use of.
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
        self._open = contextlib.ExitStack()
        self._note = ""
        self._advance = None
        if world.is_first:
            _drop_lines_after(self._path, first_step)
            board = SummaryWriter(str(Path(output, "tensorboard")), purge_step=first_step + 1 if first_step else None)
            self._board = board
            self._open.callback(board.close)
            self._advance = self._open.enter_context(progress.bar("train", total=num_steps, unit="steps"))
            self._advance(first_step, "")
        self._start_again()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def add(self, step: int, told: Told) -> None:
        """Note what step number `step`, counted from 1, told; every `log_every` steps, and after the last, write it.

        Every rank calls it.
        """
        for name, value in told.losses.items():
            self._losses[name] = self._losses.get(name, 0) + value
        self._steps += 1
        self._finite_steps += bool(told.losses)
        self._waited += told.seconds_waited
        write = step % self._log_every == 0 or step == self._num_steps
        line = self._line(told) if write else {}
        if self._advance is not None:
            if write:
                self._write(step, line)
                self._note = f"loss {line.get('loss', math.nan):.3f}, {line['images_per_second']:.1f} images/s"
            self._advance(1, self._note)
        if write:
            self._start_again()

    def evaluated(self, step: int, found: dict[str, float]) -> None:
        """Write what an evaluation after `step` steps found. The first rank calls it."""
        self._write(step, found)
        self._started = time.perf_counter()  # the evaluation's time is not training's
        progress.say(f"after {step:,} steps: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))

    def _start_again(self) -> None:
        self._losses: dict[str, Tensor | float] = {}
        self._steps, self._finite_steps, self._waited, self._started = 0, 0, 0.0, time.perf_counter()

    def _line(self, told: Told) -> dict[str, float]:
        line: dict[str, float] = {}
        if self._losses:
            losses = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in self._losses.values()])
            means = sum_over_ranks(losses) / (self._world.num_ranks * self._finite_steps)
            line = dict(zip(self._losses, means.tolist(), strict=True))
        line |= {name: float(value) for name, value in told.scalars.items()}
        if told.losses:
            line |= spread(told.lessons)
        seconds = time.perf_counter() - self._started
        rate = self._steps * self._batch_size / seconds
        line |= {"images_per_second": rate, "data_wait_share": self._waited / seconds}
        if self._peak_flops is not None:
            line["model_flops_utilization"] = rate * self._flops_per_image / (self._peak_flops * self._world.num_ranks)
        line |= {"peak_memory_gb": _peak_memory(self._world.device) / 1e9}
        return {name: value for name, value in line.items() if math.isfinite(value)}  # JSON has no other

    def _write(self, step: int, line: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        for name, value in line.items():
            self._board.add_scalar(name, value, step)


@torch.no_grad()
def spread(lessons: Sequence[Lesson]) -> dict[str, float]:
    """How far the teacher is from saying the same of everything, on this rank's first pass.

    teacher_entropy      nats, mean over images: 0 when each is one prototype for certain
    prototype_entropy    nats, of the mean over images: 0 when all are the same prototype, at most ln K
    rank_me              effective number of dimensions of the CLS tokens (Garrido et al., arXiv 2210.02885, equation 1)
    mean_cosine          between the CLS tokens of different images: 1 when all are the same (0 of a single image)
    """
    of_images, of_mean = entropies(lessons[0].images, ENTROPY_ROWS)
    tokens = lessons[0].cls_tokens[0].float()
    singular = torch.linalg.svdvals(tokens)
    shares = singular / singular.sum() + 1e-7  # cited: RankMe's epsilon
    unit = functional.normalize(tokens, dim=-1)
    cosine = (unit.sum(0).square().sum() - len(unit)) / max(len(unit) * (len(unit) - 1), 1)
    return {
        "teacher_entropy": of_images.item(),
        "prototype_entropy": of_mean.item(),
        "rank_me": torch.exp(-(shares * shares.log()).sum()).item(),
        "mean_cosine": cosine.item(),
    }


def _peak_memory(device: torch.device) -> int:
    """Bytes, the most so far: allocated on a GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _drop_lines_after(path: Path, step: int) -> None:
    """Leave out what was written of later steps than a checkpoint has; a line that was cut off too."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in kept if json.loads(line)["step"] <= step]
    paths.write_bytes(str(path), "".join(kept).encode())
