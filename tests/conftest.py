"""Processes that tests share, two ranks and a Ray, and the time limit of `make test-quick`."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from curation.engine.ray_runner import RayRunner

Ranks = Callable[..., list[Any]]
STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stop-after", type=float, metavar="SECONDS", help="Skip the tests that start later than this.")


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - STARTED > limit:
        pytest.skip(f"not run: {limit:g} seconds are over")


def _as_rank(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    os.environ.update(environment)
    return function(*arguments)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks(function, *arguments)` calls a module-level function in two processes, with the variables of torchrun.

    It returns the results by rank, or raises the error of the lowest rank that failed. Results are numbers or NumPy
    arrays, not tensors, because they are sent between processes. The processes are reused, because importing torch
    takes seconds. Each keeps its rank, because torch caches the slices of a mesh by the mesh alone.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as first, ProcessPoolExecutor(1, mp_context=context) as second:

        def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            futures = []
            for rank, pool in (("0", first), ("1", second)):
                environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                futures.append(pool.submit(_as_rank, environment, function, arguments))
            return [future.result() for future in futures]

        yield run


# The Ray that the tests of this process share. A process has one Ray at a time.
_shared_ray: list[RayRunner] = []


@pytest.fixture
def ray_runner() -> RayRunner:
    """A Ray of two workers, shared by tests, because its start takes seconds."""
    if not _shared_ray:
        _shared_ray.append(RayRunner(num_workers=2))
    return _shared_ray[0]


@pytest.fixture(scope="module")
def no_shared_ray() -> None:
    """Closes the shared Ray, for modules that start Rays of their own."""
    _close_shared_ray()


def _close_shared_ray() -> None:
    while _shared_ray:
        _shared_ray.pop().close()


@pytest.fixture(scope="session", autouse=True)
def _shared_ray_ends() -> Iterator[None]:
    yield
    _close_shared_ray()
