"""Many processes as one world: the one door to process groups, and to what splits a model over them.

A process is a *rank*. torchrun starts the ranks and tells each its number by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
and MASTER_PORT; Ray Train does, and opens the process group as well. Without either, one process is the whole world and
there is no group at all: every function here then returns at once.

A model is prepared in this order, block by block, and the names of its parameters stay what they are:

    checkpoint_activations(block)    what the backward pass computes again instead of keeping
    compile_forward(block)           the forward that is now there, as one compiled function
    shard(model, ...)                FSDP2: each rank keeps a slice of every parameter, of its gradient, of its averages
"""

import contextlib
import datetime
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # registers torch_attn
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from curation.devices import require_device
from curation.errors import ConfigError, DeviceError

Device = Literal["cpu", "cuda"]
Recompute = Literal["none", "selective", "full"]

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # cited: torchrun's documentation
# How long a rank waits for the others before it gives up. Assumed: longer than the slowest of them writes a checkpoint.
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class World:
    """The ranks that train together, and which of them this process is."""

    rank: int
    num_ranks: int
    local_rank: int
    """The number of this process on its machine, and of its GPU there."""
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


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
            "all of them, or unset them to train in one process."
        )
    try:
        rank, num_ranks, local_rank = (int(found[name]) for name in ENVIRONMENT[:3])
    except ValueError:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers. Found: {found}.") from None
    if not 0 <= rank < num_ranks or local_rank < 0:
        raise ConfigError(f"RANK must lie in [0, WORLD_SIZE), and LOCAL_RANK be 0 or more. Found: {found}.")
    return rank, num_ranks, local_rank


# --- exchange -----------------------------------------------------------------------------------------------------


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


def _reduced(tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
    if not distributed.is_initialized():
        return tensor.detach()
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(result, operation)
    return result


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`: its slice of a sharded one, sharing memory with it, or all of a plain one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state_dict on the CPU of the first rank, nothing on the others. Every rank calls it."""
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    state = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first:
            state[name] = whole.detach().to("cpu", copy=True)
    return state


# --- what a model is wrapped in -----------------------------------------------------------------------------------

# What `selective` keeps: the products, which take most of the time to compute again. All else (norms, GELU, softmax of
# the heads, gathers) is cheap to compute and large to keep. Cited: the policy of DINOv3 and of torchtitan.
_aten = torch.ops.aten
KEPT_BY_SELECTIVE = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
]


def checkpoint_activations(block: nn.Module, policy: Recompute) -> None:
    """Have the backward pass through `block` compute again what its forward pass would otherwise keep.

    none        keeps everything
    selective   keeps the results of matrix products and of attention
    full        keeps the inputs alone

    The forward must give the same twice: it may draw nothing at random itself.
    """
    match policy:
        case "none":
            return
        case "selective":
            contexts: Any = functools.partial(create_selective_checkpoint_contexts, KEPT_BY_SELECTIVE)
        case "full":
            contexts = noop_context_fn
    # In place of the forward, not around the module: a wrapper would put its own name into those of the parameters.
    block.forward = functools.partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


def compile_forward(block: nn.Module, *, backend: str = "inductor") -> None:
    """Compile what `block` computes when it is called. Hooks, and so FSDP's, stay outside of what is compiled."""
    block.forward = torch.compile(block.forward, backend=backend)


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    world: World,
    *,
    param_dtype: torch.dtype | None,
    reshard_after_forward: bool = True,
) -> None:
    """Split `model` over the ranks: each of `units` is gathered when it is called, the rest when the model is.

    units: submodules in the order in which they are called, blocks first and then heads. All of a unit's parameters are
        read inside its own forward, and all others inside the forward of `model`; every rank calls every unit in every
        pass, with an empty batch if need be, or ranks wait for each other.
    param_dtype: what parameters are gathered and computed in; None is their own type. Slices, gradients after the
        exchange and the exchange itself are float32.
    reshard_after_forward: whether gathered parameters are freed until the backward pass gathers them again: less memory
        for a second exchange. A model that is never run backward must, or what it averages would not be its slices.

    Gradients are averaged over the ranks. Each unit fetches its neighbour's parameters ahead while it computes. A world
    of one is left as it is, in its own types.
    """
    if world.num_ranks == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.num_ranks,))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    gathered = [
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        for module in (*units, model)
    ]
    *chain, root = gathered
    for first, second in itertools.pairwise((root, *chain)):
        first.set_modules_to_forward_prefetch([second])
    for first, second in itertools.pairwise(chain):
        second.set_modules_to_backward_prefetch([first])
