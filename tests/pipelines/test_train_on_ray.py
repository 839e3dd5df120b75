"""Two workers of a real local Ray form two ranks, and user errors in them are raised as user errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from curation.engine.ranks import open_world, sum_over_ranks
from curation.errors import InputError
from pipelines import train_on_ray

pytest.importorskip("ray.train", reason="needs the packages of ray[train]", exc_type=ImportError)
pytestmark = pytest.mark.slow


def write_rank(arguments: dict[str, Any]) -> None:
    with open_world("cpu") as world:
        total = int(sum_over_ranks(torch.tensor(world.rank + 1)))
        Path(arguments["folder"], f"rank-{world.rank}").write_text(f"{total} of {world.num_ranks}")


def fail(arguments: dict[str, Any]) -> None:
    with open_world("cpu"):
        raise InputError("No images there.")


def test_two_workers_form_two_ranks(tmp_path: Path) -> None:
    train_on_ray.run(write_rank, {"folder": str(tmp_path)}, str(tmp_path / "run"), num_workers=2, use_gpu=False)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["3 of 2", "3 of 2"]


def test_a_user_error_in_a_worker_is_raised_as_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No images there"):
        train_on_ray.run(fail, {}, str(tmp_path), num_workers=2, use_gpu=False)
