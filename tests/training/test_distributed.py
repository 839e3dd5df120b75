"""Two gloo processes give the results of one; recomputing and compiling change no result and no parameter name.

The backbone's blocks take and give a list of batches of different lengths, with lists of the images to compute.
"""

import os
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from curation import backbone
from curation.engine.ranks import open_world
from tests.conftest import Ranks
from training import heads
from training.distributed import Recompute, checkpoint_activations, compile_forward, full_state, local, shard

TIMEOUT = 60.0
Arrays = dict[str, npt.NDArray[np.float32]]


class SmallNetwork(nn.Module):
    """Two blocks and two heads; each branch of a block is computed for every second image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone.build("vit_tiny", patch_size=8, image_size=32, depth=2, seed=None)
        config = heads.HeadConfig(num_prototypes=7, bottleneck_dim=5, hidden_dim=6)
        generator = torch.Generator().manual_seed(0)
        self.dino_head, self.ibot_head = (heads.build(192, config, generator) for _ in range(2))
        for parameter in self.parameters():  # away from the starting values, so that LayerScale matters
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05, generator=generator)

    def forward(self, crops: list[Tensor]) -> Tensor:
        """A loss of global and local crops: a mean over images."""
        rows = [torch.arange(0, len(crop), 2) for crop in crops]
        kept = [(rows, rows)] * len(self.backbone.blocks)
        masks = torch.arange(16).expand(len(crops[0]), -1) % 3 == 0
        features = self.backbone(crops, is_training=True, masks=[masks, None], kept=kept)
        images = torch.cat([each["x_norm_clstoken"] for each in features])
        patches = features[0]["x_norm_patchtokens"].mean(dim=1)
        loss = torch.zeros(())
        for head, tokens in ((self.dino_head, images), (self.ibot_head, patches)):
            vectors, prototypes = head(tokens)
            loss = loss - functional.log_softmax(vectors.float() @ prototypes.float().T, dim=-1)[:, 0].mean()
        return loss

    def units(self) -> list[nn.Module]:
        return [*self.backbone.blocks, self.dino_head, self.ibot_head]


def crops() -> list[Tensor]:
    """Four global and four local crops. Rank 0 has the first half of each, rank 1 the second."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, size, size, generator=generator) for size in (32, 16)]


def gradients(model: nn.Module) -> Arrays:
    whole = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        whole[name] = gradient.numpy()
    return whole


def step(rank: int | None, prepare: str) -> Arrays:
    """The gradients of one step with prepared blocks, on all crops or on those of one rank."""
    model = SmallNetwork()
    with open_world("cpu", timeout_seconds=TIMEOUT) as world:
        for block in model.backbone.blocks:
            if prepare in ("selective", "full"):
                checkpoint_activations(block, prepare)  # type: ignore[arg-type]  # one of the policies
            if prepare == "compiled":
                checkpoint_activations(block, "selective")
                compile_forward(block, backend="aot_eager")
        shard(model, model.units(), world, param_dtype=None)
        model([crop if rank is None else crop[2 * rank : 2 * rank + 2] for crop in crops()]).backward()
        return gradients(model)


def assert_close(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=1e-5 * np.abs(values).max(), err_msg=name)


@pytest.fixture(scope="module")
def plain() -> Arrays:
    return step(None, "none")


@pytest.mark.parametrize("prepare", ["selective", "full", "compiled"])
def test_preparing_a_block_changes_neither_gradients_nor_names(prepare: str, plain: Arrays) -> None:
    assert_close(step(None, prepare), plain)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_recompute_policies_compute_the_stated_operations_again(policy: Recompute) -> None:
    counts = {}
    for recompute in ("none", policy):
        model, names = SmallNetwork(), []
        checkpoint_activations(model.backbone.blocks[1], recompute)
        with Counting(names):
            model(crops()).backward()
        counts[recompute] = Counter(names)
    again = counts[policy] - counts["none"]
    products = {name for name in again if name.startswith(("aten.addmm", "aten._scaled_dot_product"))}
    # `full` computes everything again, `selective` only cheap operations.
    assert ("aten.native_layer_norm.default" in again) == (policy != "none")
    assert bool(products) == (policy == "full")


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the name of every operation."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def sharded_step(prepare: str) -> Arrays:
    return step(int(os.environ["RANK"]), prepare)


@pytest.mark.parametrize("prepare", ["none", "selective", "compiled"])
def test_two_ranks_have_the_gradients_of_one(prepare: str, ranks: Ranks, plain: Arrays) -> None:
    first, second = ranks(sharded_step, prepare)
    assert_close(first, plain)
    assert_close(second, plain)


def inspect_sharded() -> list[object]:
    """The size of this rank's slices, the whole size, whether slices remain after a forward pass alone, and types."""
    with open_world("cpu", timeout_seconds=TIMEOUT) as world:
        model = SmallNetwork()
        computed: list[torch.dtype] = []
        shard(model, model.units(), world, param_dtype=torch.bfloat16)
        parameters = list(model.parameters())
        local = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.dino_head.register_forward_hook(lambda module, inputs, outputs: computed.append(outputs[0].dtype))
            model(crops())
        remain_sliced = all(isinstance(p, DTensor) for p in model.parameters())
        types = {str(p.dtype) for p in parameters}
        return [
            local,
            sum(p.numel() for p in parameters),
            remain_sliced,
            sorted(types),
            [str(kind) for kind in computed],
        ]


def test_a_rank_keeps_its_slice_in_float32_and_computes_in_param_dtype(ranks: Ranks) -> None:
    (first, total, *facts), (second, _, *others) = ranks(inspect_sharded)
    assert first + second == total
    assert abs(first - second) <= 0.1 * total
    assert facts == others == [True, ["torch.float32"], ["torch.bfloat16"]]


def gather() -> tuple[Arrays, list[int]]:
    """The whole state on the first rank, and the size of this rank's slice of each parameter."""
    with open_world("cpu", timeout_seconds=TIMEOUT) as world:
        model = SmallNetwork()
        shard(model, model.units(), world, param_dtype=None)
        state = full_state(model)
        return {name: value.numpy() for name, value in state.items()}, [local(p).numel() for p in model.parameters()]


def test_the_first_rank_gathers_the_whole_state(ranks: Ranks) -> None:
    (first, first_sizes), (second, second_sizes) = ranks(gather)
    model = SmallNetwork()
    expected = full_state(model)
    assert second == {}
    assert first.keys() == expected.keys()
    assert all(np.array_equal(first[name], value.numpy()) for name, value in expected.items())
    assert [sum(both) for both in zip(first_sizes, second_sizes, strict=True)] == [
        local(p).numel() for p in model.parameters()
    ]
    with torch.no_grad():
        local(next(model.parameters())).zero_()  # `local` shares memory; the whole state is a copy
    assert not next(model.parameters()).any()
    assert next(iter(expected.values())).any()


def test_a_world_of_one_is_not_sharded() -> None:
    with open_world("cpu") as world:
        model = SmallNetwork()
        shard(model, model.units(), world, param_dtype=torch.bfloat16)
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
