"""Sharding a model over ranks (curation/engine/ranks.py), recomputing activations, and compiling blocks.

A model is prepared in this order, block by block. The names of its parameters do not change:

    checkpoint_activations(block)    the backward pass computes activations again instead of keeping them
    compile_forward(block)           compiles the forward that the block has now
    shard(model, ...)                FSDP2: each rank keeps a slice of every parameter, gradient and optimizer moment
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

from curation.backbone import LayerScale
from curation.engine.ranks import World

Recompute = Literal["none", "selective", "full"]
# Modules of a block whose parameters are never gathered in a smaller type. LayerScale starts at 1e-5: in bfloat16 its
# contributions would be lost in the residual stream. They are 6 D of a block's 12 D * D weights: 0.05% for ViT-L.
KEPT_FLOAT32 = (nn.LayerNorm, LayerScale)


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a sharded tensor, sharing its memory, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state_dict on the CPU of the first rank; empty on other ranks. Every rank calls it."""
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    state = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first:
            state[name] = whole.detach().to("cpu", copy=True)
    return state


# --- preparing a model --------------------------------------------------------------------------------------------

# Operations whose results `selective` keeps: the products, which are the most expensive to compute again. The others
# (norms, GELU, softmax of the heads, gathers) are cheap to compute and large to keep. Cited: the policy of DINOv3 and
# of torchtitan.
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
    """Make the backward pass through `block` compute activations again instead of keeping them from the forward pass.

    none        keeps everything
    selective   keeps the results of matrix products and of attention
    full        keeps only the inputs

    The forward must give the same result twice, so it may not draw random numbers.
    """
    match policy:
        case "none":
            return
        case "selective":
            contexts: Any = functools.partial(create_selective_checkpoint_contexts, KEPT_BY_SELECTIVE)
        case "full":
            contexts = noop_context_fn
    # Replaces the forward and does not wrap the module: a wrapper would add its name to those of the parameters.
    block.forward = functools.partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


def compile_forward(block: nn.Module, *, backend: str = "inductor") -> None:
    """Compile the forward of `block`. Hooks, FSDP's among them, stay outside of the compiled function."""
    block.forward = torch.compile(block.forward, backend=backend)


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    world: World,
    *,
    param_dtype: torch.dtype | None,
    reshard_after_forward: bool = True,
    one_rank_too: bool = False,
) -> None:
    """Shard `model` over the ranks. Each of `units` is gathered when it is called, the rest when the model is called.

    units: submodules in the order of their calls, blocks first and then heads. A unit's parameters are read only in the
        unit's forward, all others only in the forward of `model`. Every rank must call every unit in every pass, with
        an empty batch if necessary, or the ranks wait for each other.
    param_dtype: type in which the matrices and biases of units are gathered; None keeps their type. The forward runs
        under autocast to it. All other parameters stay float32: the tokens and positions, and the norms and LayerScale
        of units, which are gathered with those of `model`. So the residual stream is float32, as on a single rank.
        Slices, the exchange of gradients and its result are float32 too.
    reshard_after_forward: free gathered parameters until the backward pass gathers them again. This saves memory and
        costs a second exchange. A model that never runs backward needs it: its parameters would stay gathered, and an
        EMA update would not reach its slices.
    one_rank_too: shard on a single rank as well, which shows what FSDP2 itself costs. Without a process group, torch
        opens one by the environment.

    Gradients are averaged over the ranks. Each unit prefetches the next unit's parameters while it computes. With one
    rank, the model is left unchanged, in its own types.
    """
    if world.num_ranks == 1 and not one_rank_too:
        return
    mesh = init_device_mesh(world.device.type, (world.num_ranks,))
    of_units = {
        parameter
        for unit in units
        for module in unit.modules()
        if not isinstance(module, KEPT_FLOAT32)
        for parameter in module.parameters(recurse=False)
    }
    # The root first: it takes all parameters but those of the units. Each unit then leaves out what the root has taken.
    root = fully_shard(
        model,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        reshard_after_forward=reshard_after_forward,
        ignored_params=of_units,
    )
    policy = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    chain = [
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            ignored_params={parameter for parameter in unit.parameters() if isinstance(parameter, DTensor)},
        )
        for unit in units
    ]
    for earlier, later in itertools.pairwise((root, *chain)):
        earlier.set_modules_to_forward_prefetch([later])
    for earlier, later in itertools.pairwise(chain):
        later.set_modules_to_backward_prefetch([earlier])
