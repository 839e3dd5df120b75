"""Two real ranks for the tests that need more than one process."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

Ranks = Callable[..., list[Any]]


def _as_rank(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    os.environ.update(environment)
    return function(*arguments)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks(function, *arguments)` calls a function of a module in two processes that torchrun could have started.

    Gives what it returned, by rank, or raises what the first rank raised. What it returns is numbers or NumPy arrays,
    not tensors, since it travels between processes. The two processes stay for the whole session, since importing torch
    takes seconds, and each keeps its rank: torch remembers the slices of a mesh by the mesh alone.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as first, ProcessPoolExecutor(1, mp_context=context) as second:

        def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
            with socket.socket() as listening:
                listening.bind(("127.0.0.1", 0))
                port = str(listening.getsockname()[1])
            futures = []
            for rank, pool in (("0", first), ("1", second)):
                environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                futures.append(pool.submit(_as_rank, environment, function, arguments))
            return [future.result() for future in futures]

        yield run
