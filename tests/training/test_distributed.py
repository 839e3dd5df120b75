"""Two gloo processes and one process alone compute the same; what a block is wrapped in changes no number and no name.

The block under test takes and gives a list of batches of different lengths, with lists of indices, as training does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from curation.errors import ConfigError, DeviceError
from tests.training.conftest import Ranks
from training.distributed import (
    ENVIRONMENT,
    Recompute,
    barrier,
    checkpoint_activations,
    compile_forward,
    max_over_ranks,
    open_world,
    shard,
    sum_over_ranks,
)

TIMEOUT = 60.0
WIDTH = 8


class Block(nn.Module):
    """Adds to the chosen samples of each batch (n, T, D) a linear layer of its attention."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        for parameter in self.inner.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.calls = 0

    def forward(self, x: list[Tensor], chosen: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        outputs = []
        for batch, indices in zip(x, chosen, strict=True):
            kept = self.norm(batch[indices])
            attended = functional.scaled_dot_product_attention(kept, kept, kept)
            outputs.append(batch.index_add(0, indices, functional.gelu(self.inner(attended))))
        return outputs


class Model(nn.Module):
    """Three blocks and a head over two batches of tokens, and a token of its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.token = nn.Parameter(torch.randn(WIDTH, generator=generator))
        self.blocks = nn.ModuleList(Block(generator) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)
        for parameter in self.head.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, batches: list[Tensor]) -> Tensor:
        x = [batch + self.token for batch in batches]
        for block in self.blocks:
            x = block(x, [torch.arange(0, len(batch), 2) for batch in x])
        return self.head(torch.cat([batch.mean(dim=1) for batch in x]))


def images() -> list[Tensor]:
    """Four samples of five tokens and four of two; rank 0 has the first halves, rank 1 the second."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, length, WIDTH, generator=generator) for length in (5, 2)]


def gradients(model: nn.Module) -> dict[str, list[float]]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        found[name] = gradient.flatten().tolist()
    return found


def step(rank: int | None, prepare: str) -> dict[str, list[float]]:
    """The gradients of one step with each block prepared in some way, on all images or on those of one rank."""
    model = Model()
    with open_world("cpu", timeout_seconds=TIMEOUT) as world:
        for block in model.blocks:
            if prepare in ("selective", "full"):
                checkpoint_activations(block, prepare)  # type: ignore[arg-type]  # one of the policies
            if prepare == "compiled":
                checkpoint_activations(block, "selective")
                compile_forward(block, backend="aot_eager")
        shard(model, [*model.blocks, model.head], world, param_dtype=None)
        batches = [batch if rank is None else batch[2 * rank : 2 * rank + 2] for batch in images()]
        # As in training: a rank's loss is the mean of its own samples.
        functional.cross_entropy(model(batches), torch.zeros(sum(map(len, batches)), dtype=torch.long)).backward()
        return gradients(model)


def close(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def plain() -> dict[str, list[float]]:
    return step(None, "none")


@pytest.mark.parametrize("prepare", ["selective", "full", "compiled"])
def test_preparing_a_block_changes_neither_gradients_nor_names(prepare: str, plain: dict[str, list[float]]) -> None:
    close(step(None, prepare), plain)


@pytest.mark.parametrize(("policy", "calls"), [("none", 1), ("selective", 2), ("full", 2)])
def test_what_is_not_kept_is_computed_again(policy: Recompute, calls: int) -> None:
    model = Model()
    checkpoint_activations(model.blocks[1], policy)
    products: list[str] = []
    with Counting(products):
        model(images()).sum().backward()
    assert model.blocks[1].calls == calls
    # A selective policy computes no product twice: as many as without; a full one does.
    assert products.count("aten.addmm.default") == {"none": 7, "selective": 7, "full": 9}[policy]


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def sharded_step(prepare: str) -> dict[str, list[float]]:
    return step(int(os.environ["RANK"]), prepare)


@pytest.mark.parametrize("prepare", ["none", "selective", "compiled"])
def test_two_ranks_have_the_gradients_of_one(prepare: str, ranks: Ranks, plain: dict[str, list[float]]) -> None:
    first, second = ranks(sharded_step, prepare)
    assert first == second
    # The halves of the batches differ in which samples are chosen, and so in nothing: every second one of two or four.
    close(first, plain)


def inspect_sharded() -> list[object]:
    """Facts of a sharded model: slices before and after a forward, in bfloat16, prefetch, and after no backward."""
    with open_world("cpu", timeout_seconds=TIMEOUT) as world:
        model = Model()
        shard(model, [*model.blocks, model.head], world, param_dtype=torch.bfloat16)
        parameters = list(model.parameters())
        local = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        with torch.no_grad():
            output = model(images())
        still = all(isinstance(p, DTensor) for p in model.parameters())
        types = {str(p.dtype) for p in parameters}
        return [local, sum(p.numel() for p in parameters), still, sorted(types), str(output.dtype)]


def test_a_rank_keeps_its_slice_in_float32_and_computes_in_what_was_asked(ranks: Ranks) -> None:
    (first, total, *facts), (second, _, *others) = ranks(inspect_sharded)
    assert first + second == total
    assert abs(first - second) <= 0.1 * total
    assert facts == others == [True, ["torch.float32"], "torch.bfloat16"]


def exchange() -> list[object]:
    with open_world("cpu", timeout_seconds=TIMEOUT) as world:
        own = torch.tensor([float(world.rank), 1.0], requires_grad=True)
        summed, largest = sum_over_ranks(own), max_over_ranks(own)
        barrier()
        return [world.rank, world.num_ranks, world.is_first, summed.tolist(), largest.tolist(), own.tolist()]


def test_sums_and_maxima_of_two_ranks(ranks: Ranks) -> None:
    assert ranks(exchange) == [
        [0, 2, True, [1.0, 2.0], [1.0, 1.0], [0.0, 1.0]],
        [1, 2, False, [1.0, 2.0], [1.0, 1.0], [1.0, 1.0]],
    ]


def test_a_world_of_one_has_no_group() -> None:
    with open_world("cpu") as world:
        assert (world.rank, world.num_ranks, world.local_rank) == (0, 1, 0)
        assert not torch.distributed.is_initialized()
        tensor = torch.ones(2)
        assert sum_over_ranks(tensor).tolist() == max_over_ranks(tensor).tolist() == [1.0, 1.0]
        barrier()
        model = Model()
        shard(model, list(model.blocks), world, param_dtype=torch.bfloat16)
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def fail_on_one() -> str:
    """One rank raises, and the other then waits for it in vain."""
    try:
        with open_world("cpu", timeout_seconds=TIMEOUT) as world:
            if world.rank == 0:
                raise InterruptedError("rank 0 has had enough")
            sum_over_ranks(torch.ones(1))
    except (InterruptedError, RuntimeError) as error:
        assert not torch.distributed.is_initialized()
        return type(error).__name__
    return "no error"


def test_an_error_of_one_rank_ends_the_group(ranks: Ranks) -> None:
    assert ranks(fail_on_one) == ["InterruptedError", "RuntimeError"]
    assert ranks(exchange)[1][3] == [1.0, 2.0]  # the same processes meet again


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "whole numbers.*'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"\[0, WORLD_SIZE\)"),
    ],
)
def test_a_wrong_environment_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    if "LOCAL_RANK" in environment:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), open_world("cpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(DeviceError, match="sees no GPU"), open_world("cuda"):
        pass


SCRIPT = """
from training.distributed import open_world, sum_over_ranks
import torch
with open_world("cpu", timeout_seconds=60) as world:
    total = sum_over_ranks(torch.tensor(world.rank + 1))
    if world.is_first:
        print("total", int(total), "of", world.num_ranks)
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert "total 3 of 2" in result.stdout, result.stderr
