"""The rows of gpu.py about training: the short recipe's speed, agreement with a CPU, FSDP2, stop and resume.

Every row trains on crops of the photographs. The speed is that of training.loop.step on one batch that stays on the
device, against the plain step of training.py: separate forward passes, branches computed and then dropped, whole
matrices of scores. Both do the same arithmetic, at drop path 0.4 with Sinkhorn-Knopp.
"""

# torch's modules and tensors have untyped methods.
# mypy: disable-error-code="no-untyped-call"

import functools
import itertools
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curation.backbone import Block, PackedAttention, VisionTransformer
from curation.engine.ranks import World
from pipelines.bench import gpu_pictures
from pipelines.bench import training as bench
from pipelines.bench.gpu_device import measured_matmul_rate, open_device, peak_flops, synchronize
from pipelines.bench.gpu_pictures import Cut
from pipelines.bench.gpu_row import Figures, NotHereError, RowWork, Setup
from pipelines.bench.timing import by_turns
from training import checkpoint, loop
from training.data import Batch
from training.loop import TrainConfig, Trainer

CUT = Cut(width=500, height=400, format="JPEG", seed=2)
NUM_PHOTOGRAPHS = 64
GOAL = "1.6 times the plain step, half of the peak"
# Images/s of one GPU with one backbone. Cited: DINOv2's README (a day on 32 A100), DINOv3's README and config.
PUBLISHED = {"vit_large": "published: 93 images/s on an A100, 112 to 159 on an H100"}
# At LayerScale 1e-5 all images start nearly equal, and the gradients of KoLeo are mostly rounding.
_BLOCKS: dict[str, Any] = {"layer_scale": 1.0, "drop_path": bench.DROP_PATH}
# For `--tiny`: two blocks on small crops.
TINY: dict[str, Any] = {
    "model": {
        "backbone": {"name": "vit_tiny", "depth": 2, "patch_size": 8, "image_size": 32, **_BLOCKS},
        "dino_head": {"num_prototypes": 64, "bottleneck_dim": 16, "hidden_dim": 32},
    },
    "augment": {
        "crops": [
            {"name": "global", "size": 32, "scale": [0.32, 1.0], "views": [{"num": 2, "blur": 0.5}]},
            {"name": "local", "size": 16, "scale": [0.05, 0.32], "views": [{"num": 8, "blur": 0.5}]},
        ]
    },
}
# For rows that compare numbers.
SMALL: dict[str, Any] = {
    "model": {
        "backbone": {"name": "vit_small", "patch_size": 16, "image_size": 224, **_BLOCKS},
        "dino_head": {"num_prototypes": 8192, "bottleneck_dim": 256, "hidden_dim": 2048},
    }
}
# Images of a step in rows that compare numbers; and with FSDP2, full and tiny.
NUM_COMPARED = 4
NUM_SHARDED = 32, 4
# Largest relative differences to the CPU. Assumed: float32 sums in another order, and 8 bits of bfloat16.
COMPARED_GOAL = "float32 below 0.001, bfloat16 below 0.05"


def speed(name: str, setup: Setup) -> Iterator[Figures]:
    """Images/s of a step at the short recipe, with attention in one call per size and in one call for all."""
    open_device(setup.device)
    num_images = 4 if setup.tiny else dict(bench.SHORT_RECIPE)[name]
    config = bench.make_config(name, num_images, setup.device, **(TINY if setup.tiny else {}))
    trainer = _trainer(config)
    batch = _batch(setup, config)
    plain = torch.optim.AdamW(trainer.model.student.parameters(), lr=1e-5)
    numbers = itertools.count()
    steps: dict[str, Callable[[], Any]] = {
        "plain": lambda: bench.plain_step(trainer, plain, batch, bench.VARIANTS[0], next(numbers)),
        "grouped": functools.partial(_step, trainer, batch, "grouped", numbers),
    }
    peak, matmul = (None if setup.tiny else peak_flops()), measured_matmul_rate(setup.device)
    flops = loop.step_flops(config)
    others: dict[str, float | str] = {"images of a step": float(num_images), "matmul, TFLOP/s": matmul / 1e12}
    yield _speed_figures(name, steps, setup, num_images, flops, peak, matmul, others)
    if setup.tiny:
        others["varlen"] = "needs a GPU"
    else:
        varlen = functools.partial(_step, trainer, batch, "varlen", numbers)
        try:
            varlen()
            steps["varlen"] = varlen
        except Exception as error:  # the other figures stand
            others["varlen"] = f"failed: {str(error).strip().splitlines()[-1]}"
    yield _speed_figures(name, steps, setup, num_images, flops, peak, matmul, others)


def compiled(setup: Setup) -> Iterator[Figures]:
    """The step of the largest backbone with compiled blocks, as the recipe's config has it."""
    if setup.tiny:
        raise NotHereError("compiled blocks are measured on a GPU only; their numbers are tested on a CPU elsewhere")
    open_device(setup.device)
    name, num_images = bench.SHORT_RECIPE[-1]
    config = bench.make_config(name, num_images, setup.device, compile=True)
    trainer, batch, numbers = _trainer(config), _batch(setup, config), itertools.count()
    started = time.perf_counter()
    _step(trainer, batch, "grouped", numbers)
    synchronize(setup.device)
    others: dict[str, float | str] = {"s of the first step, with compiling": time.perf_counter() - started}
    peak, matmul = peak_flops(), measured_matmul_rate(setup.device)
    steps = {"compiled": functools.partial(_step, trainer, batch, "grouped", numbers)}
    yield _speed_figures(name, steps, setup, num_images, loop.step_flops(config), peak, matmul, others)


def _speed_figures(
    name: str,
    steps: Mapping[str, Callable[[], Any]],
    setup: Setup,
    num_images: int,
    flops: float,
    peak: float | None,
    matmul: float,
    others: dict[str, float | str],
) -> Figures:
    """Time the steps by turns. The value is the rate of the faster of our steps."""

    def waiting(step: Callable[[], Any]) -> None:
        step()
        synchronize(setup.device)

    works = {kind: functools.partial(waiting, step) for kind, step in steps.items()}
    seconds = {kind: statistics.median(times) for kind, times in by_turns(works, 1 if setup.tiny else 5).items()}
    ours = {kind: num_images / value for kind, value in seconds.items() if kind != "plain"}
    best = max(ours, key=ours.__getitem__)
    figures: dict[str, float | str] = {"fastest": best}
    peers = [PUBLISHED[name]] if name in PUBLISHED else []
    if "plain" in seconds:
        figures["by the plain step"] = seconds["plain"] / seconds[best]
        peers.insert(0, f"plain step: {num_images / seconds['plain']:.1f} images/s")
    figures |= {f"{kind}, images/s": rate for kind, rate in ours.items()}
    if peak is not None:
        figures["share of the data sheet's peak (MFU)"] = ours[best] * flops / peak
    figures["share of the measured matmul rate"] = ours[best] * flops / matmul
    if setup.device == "cuda":
        for kind, work in works.items():
            torch.cuda.reset_peak_memory_stats()
            work()
            figures[f"{kind}, peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return Figures(ours[best], "images/s", GOAL, "; ".join(peers), figures | others)


def _step(trainer: Trainer, batch: Batch, attention: PackedAttention, numbers: Iterator[int]) -> None:
    """One step of training.loop with that attention."""
    for network in trainer.model.networks().values():
        for block in network.backbone.blocks:
            assert isinstance(block, Block)
            block.attn.packed = attention
    loop.step(trainer, [batch], next(numbers))


def _trainer(config: TrainConfig, *, shard_one_rank: bool = False) -> Trainer:
    return loop.build_trainer(config, World(0, 1, 0, torch.device(config.device)), shard_one_rank=shard_one_rank)


def _batch(setup: Setup, config: TrainConfig) -> Batch:
    """Crops of the photographs on the config's device."""
    photographs = gpu_pictures.crops(setup.images, min(NUM_PHOTOGRAPHS, config.batch_size), CUT)
    return bench.make_batch(config, photographs).to(torch.device(config.device))


# Agreement


def agreement(setup: Setup) -> Iterator[Figures]:
    """One step's losses and gradients on the device against the same step on the CPU in float32."""
    open_device(setup.device)
    torch.backends.cudnn.allow_tf32 = False  # otherwise the patches' convolution has 10 bits in float32
    losses, gradients = _one_step(setup, "cpu", "float32")
    others: dict[str, float | str] = {"loss on the CPU": losses["loss"]}
    worst = 0.0
    for precision in ("float32", "bfloat16"):
        device_losses, device_gradients = _one_step(setup, setup.device, precision)
        loss_error = max(abs(device_losses[name] - loss) / max(abs(loss), 1e-6) for name, loss in losses.items())
        errors = {name: float((device_gradients[name] - tensor).norm()) for name, tensor in gradients.items()}
        whole = sum(error**2 for error in errors.values()) ** 0.5
        gradient_error = whole / sum(float(tensor.norm()) ** 2 for tensor in gradients.values()) ** 0.5
        name = max(errors, key=errors.__getitem__)
        others = others | {
            f"{precision}: losses, largest relative difference": loss_error,
            f"{precision}: gradients, relative difference": gradient_error,
            f"{precision}: largest in": name,
        }
        worst = max(worst, gradient_error) if precision == "float32" else worst
        unit = "relative difference of the gradients in float32"
        yield Figures(worst, unit, COMPARED_GOAL, "the CPU in float32", others)


def _one_step(setup: Setup, device: str, precision: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses of the first step, and the clipped gradients on the CPU by parameter."""
    config = _compared_config(setup, device, precision)
    trainer = _trainer(config)
    result = loop.step(trainer, [_batch(setup, config)], 0)
    if not result.finite:
        raise ValueError(f"the step on {device} in {precision} was not finite: {result.losses}")
    # After the first step, the optimizer's first moment is a tenth of the clipped gradient.
    state = checkpoint.optimizer_tensors(trainer.model.student, trainer.optimizer)
    gradients = {name: 10 * value.detach().float().cpu() for name, value in state.items() if name.endswith(".exp_avg")}
    return {name: float(value) for name, value in result.losses.items()}, gradients


def _compared_config(
    setup: Setup, device: str, precision: str, *, num_images: int = NUM_COMPARED, **changes: Any
) -> TrainConfig:
    model = TINY if setup.tiny else SMALL
    return bench.make_config("", num_images, device, precision=precision, **model, **changes)


def one_rank_sharded(setup: Setup) -> Iterator[Figures]:
    """Steps of a model that FSDP2 shards over one rank, against the model without it."""
    device = open_device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(0)
    precision = "float32" if setup.tiny else "bfloat16"
    config = _compared_config(setup, setup.device, precision, num_images=NUM_SHARDED[setup.tiny])
    batch = _batch(setup, config)
    os.environ |= _environment_of_one_rank()  # FSDP2's mesh opens the process group by it
    seconds, losses = {}, {}
    for kind in ("whole", "sharded"):
        trainer = _trainer(config, shard_one_rank=kind == "sharded")
        losses[kind] = [float(loop.step(trainer, [batch], number).losses["loss"]) for number in range(3)]
        numbers = itertools.count(3)

        def step(trainer: Trainer = trainer, numbers: Iterator[int] = numbers) -> None:
            loop.step(trainer, [batch], next(numbers))
            synchronize(setup.device)

        seconds[kind] = statistics.median(by_turns({kind: step}, 1 if setup.tiny else 10)[kind])
    differences = [abs(a - b) / abs(b) for a, b in zip(losses["sharded"], losses["whole"], strict=True)]
    yield Figures(
        seconds["whole"] / seconds["sharded"],
        "of the speed without FSDP2",
        "equal losses",
        f"a step without it: {seconds['whole']:.3g} s",
        {"s of a step": seconds["sharded"], "relative difference of the losses of 3 steps": max(differences)},
    )


def _environment_of_one_rank() -> dict[str, str]:
    """The variables by which torchrun describes a world of one process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # The libraries otherwise look for a network between machines, which a machine without one lacks.
    loopback = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return loopback | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


# Stop and resume


class _StopError(BaseException):
    """Stops a run from outside."""


def resume(setup: Setup) -> Iterator[Figures]:
    """A run that is stopped a step after its checkpoint and continued, against runs straight through."""
    open_device(setup.device)
    pictures = Path(setup.folder, "photographs")
    gpu_pictures.write_files(pictures, gpu_pictures.crops(setup.images, 12 if setup.tiny else 64, CUT), "jpg")
    config = _compared_config(
        setup,
        setup.device,
        "float32" if setup.tiny else "bfloat16",
        num_steps=4,
        schedule={"learning_rate_warmup_steps": 1},
        evaluate_every=1,
        checkpoint={"every": 2, "keep": 4},
        data={"path": str(pictures), "layout": "folder"},
    )
    runs = {name: str(Path(setup.folder, name)) for name in ("straight", "again", "stopped")}
    loop.train(config, runs["straight"])
    loop.train(config, runs["again"])
    try:
        loop.train(config, runs["stopped"], _stop_after(3))
    except _StopError:
        pass
    else:
        raise AssertionError("the run was not stopped")
    loop.train(config, runs["stopped"])
    states = {
        name: checkpoint.load_tensors(str(Path(run, "checkpoints", "step-0000004")), "") for name, run in runs.items()
    }
    differing = {
        name: [key for key, tensor in states["straight"].items() if not torch.equal(tensor, states[name][key])]
        for name in ("again", "stopped")
    }
    yield Figures(
        float(len(differing["stopped"])),
        f"tensors of {len(states['straight'])} differ from the run straight through",
        "0",
        f"a second run straight through: {len(differing['again'])} differ",
        {"differ, for example": ", ".join(differing["stopped"][:3]) or "none"},
    )


def _stop_after(step: int) -> loop.Evaluate:
    def evaluate(model: VisionTransformer, steps_done: int) -> dict[str, float]:
        if steps_done == step:
            raise _StopError
        return {}

    return evaluate


ROWS: dict[str, RowWork] = {
    "train-large": functools.partial(speed, "vit_large"),
    "train-base": functools.partial(speed, "vit_base"),
    "train-small": functools.partial(speed, "vit_small"),
    "train-compiled": compiled,
    "step": agreement,
    "fsdp": one_rank_sharded,
    "resume": resume,
}
