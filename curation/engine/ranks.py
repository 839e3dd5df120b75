"""Processes that work together, in the terms of torch.distributed: process groups and collectives.

A *rank* is one of the processes; the *world* is all of them. torchrun starts the ranks and gives each its number in
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Ray Train sets the same variables and also opens the process
group. Without either, the world is one process without a process group, and every function here returns immediately.
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
# A collective fails after this time. Assumed: longer than the slowest rank needs to write a checkpoint.
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class World:
    """The number of ranks, and the numbers of this one."""

    rank: int
    num_ranks: int
    local_rank: int
    """The number of this rank on its machine; also the number of its GPU."""
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files that exist once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The contiguous share of `count` items of this rank. Shares follow the order of the ranks."""
        return _share(self.rank, self.num_ranks, count)


ALONE = World(0, 1, 0, torch.device("cpu"))


@contextlib.contextmanager
def open_world(device: Device, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """The world that the environment describes, or a world of one process.

    An open process group (from Ray Train) is used and stays open. A group opened here is closed at the end, also after
    an error: the next collective of the other ranks then fails instead of waiting.

    timeout_seconds: a collective fails after this time. Raises DeviceError, ConfigError.
    """
    rank, num_ranks, local_rank = _read_environment()
    torch_device = require_device(device)
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"Local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}. Start at most one "
                "process per GPU (torchrun --nproc-per-node)."
            )
        torch_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(torch_device)
    world = World(rank, num_ranks, local_rank, torch_device)
    if num_ranks == 1 or distributed.is_initialized():
        yield world
        return
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        device_id=torch_device if device == "cuda" else None,
    )
    try:
        yield world
    finally:
        distributed.destroy_process_group()


def _read_environment() -> tuple[int, int, int]:
    """The rank, the number of ranks and the local rank in the environment. Raises ConfigError."""
    variables = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    # MASTER_ADDR and MASTER_PORT alone are not enough: clusters set them for every process.
    if not variables.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return 0, 1, 0
    if absent := [name for name in ENVIRONMENT if name not in variables]:
        raise ConfigError(
            f"The environment has {', '.join(variables)} and lacks {', '.join(absent)}. Start with torchrun, which "
            "sets all of them, or unset them to run in one process."
        )
    try:
        rank, num_ranks, local_rank = (int(variables[name]) for name in ENVIRONMENT[:3])
    except ValueError:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers. Found: {variables}.") from None
    if not 0 <= rank < num_ranks or local_rank < 0:
        raise ConfigError(f"RANK must lie in [0, WORLD_SIZE), and LOCAL_RANK must be 0 or more. Found: {variables}.")
    return rank, num_ranks, local_rank


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, equal on every rank. Shapes must be equal; no gradient flows through."""
    return _reduced(tensor, distributed.ReduceOp.SUM)


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all ranks, equal on every rank. Shapes must be equal; no gradient flows through."""
    return _reduced(tensor, distributed.ReduceOp.MAX)


def barrier() -> None:
    """Wait until every rank has called this."""
    if distributed.is_initialized():
        distributed.barrier()


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Run the block on the first rank, then on the others: for files that one rank writes and every rank reads."""
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    if not is_first:
        barrier()
    yield
    if is_first:
        barrier()


def all_ranks(condition: bool) -> bool:
    """Whether `condition` is true on every rank; every rank gets the same answer."""
    return not max_over_ranks(torch.tensor(int(not condition), device=_device_of_group()))


def gather_rows(world: World, rows: Tensor, count: int) -> Tensor:
    """The rows of all ranks, (count, ...), equal on every rank and on the device of `rows`.

    rows: the rows of this rank, (len(world.share(count)), ...). No gradient flows through.
    """
    if world.num_ranks == 1:
        return rows.detach()
    sizes = [len(_share(rank, world.num_ranks, count)) for rank in range(world.num_ranks)]
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=_device_of_group())
    padded[: len(rows)] = rows.detach()
    padded_by_rank = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(padded_by_rank, padded)
    return torch.cat([tensor[:size] for tensor, size in zip(padded_by_rank, sizes, strict=True)]).to(rows.device)


def gather_texts(world: World, text: str) -> list[str]:
    """The texts of all ranks, in the order of the ranks, equal on every rank."""
    if world.num_ranks == 1:
        return [text]
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    lengths = gather_rows(world, torch.tensor([len(data)]), world.num_ranks).tolist()
    padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
    padded[0, : len(data)] = data
    rows = gather_rows(world, padded, world.num_ranks)
    return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]


def _device_of_group() -> torch.device:
    """The device on which the process group exchanges tensors."""
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
