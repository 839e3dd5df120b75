"""What splits a model over the ranks of a world (curation/engine/ranks.py), and what it is wrapped in.

A model is prepared in this order, block by block, and the names of its parameters stay what they are:

    checkpoint_activations(block)    what the backward pass computes again instead of keeping
    compile_forward(block)           the forward that is now there, as one compiled function
    shard(model, ...)                FSDP2: each rank keeps a slice of every parameter, of its gradient, of its averages
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # registers torch_attn
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from curation.engine.ranks import World

Recompute = Literal["none", "selective", "full"]


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
