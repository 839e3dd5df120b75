"""Ranks connect, exchange data and end together; a single process needs no process group."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from curation.engine.ranks import (
    ALONE,
    ENVIRONMENT,
    World,
    barrier,
    first_rank_first,
    gather_rows,
    gather_texts,
    max_over_ranks,
    open_world,
    sum_over_ranks,
)
from curation.errors import ConfigError, DeviceError
from tests.conftest import Ranks

TIMEOUT = 60.0


def exchange() -> list[object]:
    with open_world("cpu", timeout_seconds=TIMEOUT) as world:
        values = torch.tensor([float(world.rank), 1.0], requires_grad=True)
        summed, largest = sum_over_ranks(values), max_over_ranks(values)
        barrier()
        return [world.rank, world.num_ranks, world.is_first, summed.tolist(), largest.tolist(), values.tolist()]


def test_sums_and_maxima_of_two_ranks(ranks: Ranks) -> None:
    assert ranks(exchange) == [
        [0, 2, True, [1.0, 2.0], [1.0, 1.0], [0.0, 1.0]],
        [1, 2, False, [1.0, 2.0], [1.0, 1.0], [1.0, 1.0]],
    ]


@pytest.mark.parametrize(("num_ranks", "count"), [(1, 5), (2, 5), (3, 2), (4, 0), (7, 700)])
def test_shares_cover_every_item_once(num_ranks: int, count: int) -> None:
    shares = [World(rank, num_ranks, rank, torch.device("cpu")).share(count) for rank in range(num_ranks)]
    assert [index for share in shares for index in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def gathered(path: str) -> list[object]:
    with open_world("cpu", timeout_seconds=TIMEOUT) as world:
        with first_rank_first():
            Path(path).write_text(Path(path).read_text() + str(world.rank) if Path(path).exists() else "0")
        rows = torch.arange(10.0).view(5, 2)
        return [
            gather_rows(world, rows[list(world.share(5))], 5).tolist(),
            gather_rows(world, torch.zeros(len(world.share(1)), 3, dtype=torch.int64), 1).tolist(),
            gather_texts(world, "ä" * (3 * world.rank)),
        ]


def test_rows_and_texts_of_uneven_shares(ranks: Ranks, tmp_path: Path) -> None:
    whole = [torch.arange(10.0).view(5, 2).tolist(), [[0, 0, 0]], ["", "äää"]]
    assert ranks(gathered, str(tmp_path / "order")) == [whole, whole]
    assert (tmp_path / "order").read_text() == "01"
    assert gather_texts(ALONE, "text") == ["text"]


def test_a_world_of_one_rank_has_no_process_group() -> None:
    with open_world("cpu") as world:
        assert (world.rank, world.num_ranks, world.local_rank) == (0, 1, 0)
        assert not torch.distributed.is_initialized()
        tensor = torch.ones(2)
        assert sum_over_ranks(tensor).tolist() == max_over_ranks(tensor).tolist() == [1.0, 1.0]
        barrier()


def fail_on_one() -> str:
    """Rank 0 raises, so that the collective of rank 1 fails."""
    try:
        with open_world("cpu", timeout_seconds=TIMEOUT) as world:
            if world.rank == 0:
                raise InterruptedError("rank 0 stops")
            sum_over_ranks(torch.ones(1))
    except (InterruptedError, RuntimeError) as error:
        assert not torch.distributed.is_initialized()
        return type(error).__name__
    return "no error"


def test_an_error_of_one_rank_ends_the_group(ranks: Ranks) -> None:
    assert ranks(fail_on_one) == ["InterruptedError", "RuntimeError"]
    assert ranks(exchange)[1][3] == [1.0, 2.0]  # the same processes open a new group


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
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="sees no GPU"), open_world("cuda"):
        pass


SCRIPT = """
from curation.engine.ranks import open_world
from curation.engine.ranks import sum_over_ranks
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
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert "total 3 of 2" in result.stdout, result.stderr
