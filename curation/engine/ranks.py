"""Many processes as one world: what every part that runs on several of them shares.

A process is a *rank*. torchrun starts the ranks and tells each its number by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
and MASTER_PORT; Ray Train does, and opens the process group as well. Without either, one process is the whole world and
there is no group at all: every function here then returns at once.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed

from curation.engine.device import require_device
from curation.errors import ConfigError, DeviceError

Device = Literal["cpu", "cuda"]

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # cited: torchrun's documentation
# How long a rank waits for the others before it gives up. Assumed: longer than the slowest of them writes a checkpoint.
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class World:
    """The ranks that work together, and which of them this process is."""

    rank: int
    num_ranks: int
    local_rank: int
    """The number of this process on its machine, and of its GPU there."""
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things this rank does: a run of them, in the order of ranks."""
        return _share(self.rank, self.num_ranks, count)


ALONE = World(0, 1, 0, torch.device("cpu"))


@contextlib.contextmanager
def open_world(device: Device, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """The world that torchrun describes in the environment, or this process alone.

    A process group that is already open (Ray Train's) is joined and left open. One opened here is closed at the end,
    after an error too: the other ranks' next exchange then fails instead of waiting.

    timeout_seconds: how long a rank waits for the others before it fails. Raises DeviceError, ConfigError.
    """
    rank, num_ranks, local_rank = _numbers()
    chosen = require_device(device)
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"Local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}. Start at most "
                "one process for each (torchrun --nproc-per-node)."
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    world = World(rank, num_ranks, local_rank, chosen)
    if num_ranks == 1 or distributed.is_initialized():
        yield world
        return
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        device_id=chosen if device == "cuda" else None,
    )
    try:
        yield world
    finally:
        distributed.destroy_process_group()


def _numbers() -> tuple[int, int, int]:
    """Rank, number of ranks and local rank, as the environment says."""
    found = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    # The address alone says nothing: clusters set it for every process.
    if not found.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return 0, 1, 0
    if absent := [name for name in ENVIRONMENT if name not in found]:
        raise ConfigError(
            f"The environment has {', '.join(found)} and lacks {', '.join(absent)}. Start with torchrun, which sets "
            "all of them, or unset them to work in one process."
        )
    try:
        rank, num_ranks, local_rank = (int(found[name]) for name in ENVIRONMENT[:3])
    except ValueError:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers. Found: {found}.") from None
    if not 0 <= rank < num_ranks or local_rank < 0:
        raise ConfigError(f"RANK must lie in [0, WORLD_SIZE), and LOCAL_RANK be 0 or more. Found: {found}.")
    return rank, num_ranks, local_rank


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's `tensor`, equal on all of them. Same shape everywhere; no gradient flows through."""
    return _reduced(tensor, distributed.ReduceOp.SUM)


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise largest of every rank's `tensor`. Same shape everywhere; no gradient flows through."""
    return _reduced(tensor, distributed.ReduceOp.MAX)


def barrier() -> None:
    """Wait until every rank is here."""
    if distributed.is_initialized():
        distributed.barrier()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first rank goes through the block alone, the others after it: for what is written once and read by all."""
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    if not is_first:
        barrier()
    yield
    if is_first:
        barrier()


def all_ranks(condition: bool) -> bool:
    """Whether it holds on every rank; all are told the same."""
    return not max_over_ranks(torch.tensor(int(not condition), device=_device_of_group()))


def gather_rows(world: World, own: Tensor, count: int) -> Tensor:
    """The rows of all ranks, (count, ...), equal on all of them, from each one's `share(count)` of them, (., ...).

    On the device of `own`; no gradient flows through.
    """
    if world.num_ranks == 1:
        return own.detach()
    sizes = [len(_share(rank, world.num_ranks, count)) for rank in range(world.num_ranks)]
    padded = torch.zeros(max(sizes), *own.shape[1:], dtype=own.dtype, device=_device_of_group())
    padded[: len(own)] = own.detach()
    found = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(found, padded)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)]).to(own.device)


def texts_of_ranks(world: World, own: str) -> list[str]:
    """The text of every rank, by rank, on all of them."""
    if world.num_ranks == 1:
        return [own]
    data = torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8) if own else torch.empty(0, dtype=torch.uint8)
    lengths = gather_rows(world, torch.tensor([len(data)]), world.num_ranks).tolist()
    padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
    padded[0, : len(data)] = data
    rows = gather_rows(world, padded, world.num_ranks)
    return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]


def _device_of_group() -> torch.device:
    """Where tensors must lie to be exchanged."""
    nccl = distributed.is_initialized() and distributed.get_backend() == "nccl"
    return torch.device("cuda") if nccl else torch.device("cpu")


def _share(rank: int, num_ranks: int, count: int) -> range:
    return range(rank * count // num_ranks, (rank + 1) * count // num_ranks)


def _reduced(tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
    if not distributed.is_initialized():
        return tensor.detach()
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(result, operation)
    return result
