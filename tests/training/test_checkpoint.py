"""A resumed run gives the result of an uninterrupted one, on any number of ranks; damaged files are named.

The run here is a small network, its EMA and AdamW. Batches follow from the step, as in training.
"""

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from curation.engine.ranks import World, open_world
from curation.errors import ConfigError, InputError, OutputMismatchError
from tests.conftest import Ranks
from training import checkpoint
from training.distributed import shard

ALONE = World(0, 1, 0, torch.device("cpu"))
CONFIG: dict[str, Any] = {"seed": 0, "crops": {"sizes": (224, 96)}, "rates": [{"base": 0.1}], "name": None}
Weights = dict[str, list[float]]


class Run:
    """A student, its EMA and the optimizer: the state that training keeps from one step to the next."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.student, self.average = make(0), make(1)
        for model in (self.student, self.average):
            shard(model, list(model), world, param_dtype=None)
        self.average.requires_grad_(False)
        # Two groups with different learning rates, which are set anew in every step.
        groups = [{"params": list(self.student[0].parameters())}, {"params": list(self.student[1:].parameters())}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
        self.centers = {"dino": torch.zeros(3)}

    def parts(self) -> checkpoint.Parts:
        return {
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.student, self.optimizer),
            "centers": self.centers,
        }

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            images = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            share = len(images) // self.world.num_ranks
            images_of_rank = images[self.world.rank * share : (self.world.rank + 1) * share]
            self.student(images_of_rank).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for average, weight in zip(self.average.parameters(), self.student.parameters(), strict=True):
                average.lerp_(weight.detach(), 0.5)
            self.centers["dino"] += images.mean()

    def weights(self) -> Weights:
        """Every tensor of the state, whole."""
        return {
            f"{part}.{name}": (value.full_tensor() if isinstance(value, DTensor) else value).flatten().tolist()
            for part, tensors in self.parts().items()
            for name, value in tensors.items()
        }


def make(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def save(run: Run, folder: str, step: int, **options: Any) -> str:
    options = {"progress": {"step": step, "skipped": 1}, "config": CONFIG, "keep": 2, "world": run.world} | options
    return checkpoint.save(folder, step, run.parts(), **options)


def start_and_save(folder: str) -> Weights:
    """Take three steps and save them, on any number of ranks."""
    with open_world("cpu", timeout_seconds=60) as world:
        run = Run(world)
        run.train(0, 3)
        save(run, folder, 3)
        return run.weights()


def resume(folder: str) -> Weights:
    """Resume from the last checkpoint and run to step five."""
    with open_world("cpu", timeout_seconds=60) as world:
        run = Run(world)
        path = checkpoint.latest(folder)
        assert path is not None
        record = checkpoint.load(path, run.parts(), config=CONFIG, world=world)
        assert record.progress == {"step": 3, "skipped": 1}
        run.train(record.step, 5)
        return run.weights()


@pytest.fixture(scope="module")
def straight() -> Weights:
    run = Run(ALONE)
    run.train(0, 5)
    return run.weights()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """One checkpoint, of step 3, written by one process."""
    start_and_save(str(tmp_path / "checkpoints"))
    return str(tmp_path / "checkpoints")


def assert_close(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(actual[name]), torch.tensor(values), rtol=1e-5, atol=1e-6)


def test_stop_and_resume_equals_straight_through_bit_for_bit(folder: str, straight: Weights) -> None:
    assert resume(folder) == straight


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_resumes_on_any_number_of_ranks(
    before: int, after: int, tmp_path: Path, ranks: Ranks, straight: Weights
) -> None:
    folder = str(tmp_path)
    if before == 2:
        first, second = ranks(start_and_save, folder)
        assert first == second
        assert sorted(checkpoint.read_record(f"{folder}/step-0000003").files) == [
            ".metadata",
            "__0_0.distcp",
            "__1_0.distcp",
        ]
    else:
        start_and_save(folder)
    if after == 2:
        first, second = ranks(resume, folder)
        assert first == second
    else:
        first = resume(folder)
    assert_close(first, straight)


def read_on_first(folder: str) -> Weights:
    """With a group open, the first rank alone reads the tensors that both ranks wrote."""
    with open_world("cpu", timeout_seconds=60) as world:
        run = Run(world)
        path = save(run, folder, 3)
        whole = run.weights()
        if world.is_first:
            loaded = checkpoint.load_tensors(path, "student.")
            assert {f"student.{name}": value.flatten().tolist() for name, value in loaded.items()} == {
                name: value for name, value in whole.items() if name.startswith("student.")
            }
        return whole


def test_one_rank_can_read_the_whole_checkpoint(tmp_path: Path, ranks: Ranks) -> None:
    ranks(read_on_first, str(tmp_path))


def test_tensors_are_read_by_prefix(folder: str) -> None:
    loaded = checkpoint.load_tensors(f"{folder}/step-0000003", "optimizer.2.weight.")
    run = Run(ALONE)
    run.train(0, 3)
    assert {name: value.tolist() for name, value in loaded.items()} == {
        kind: value.tolist() for kind, value in run.optimizer.state[run.student[2].weight].items()
    }


def test_the_last_checkpoints_are_kept_and_unfinished_ones_ignored(tmp_path: Path) -> None:
    run, folder = Run(ALONE), str(tmp_path)
    assert checkpoint.latest(folder) is None
    for step in (1, 2, 10):
        save(run, folder, step)
    (tmp_path / ".tmp-step-0000011").mkdir()  # left by a kill during a save; below, during a deletion
    (tmp_path / ".tmp-step-0000011" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".tmp-old-step-0000001").mkdir()
    (tmp_path / "step-by-step.txt").write_text("notes")
    assert checkpoint.steps(folder) == [2, 10]
    assert checkpoint.latest(folder) == str(tmp_path / "step-0000010")
    assert save(run, folder, 11) == str(tmp_path / "step-0000011")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000010", "step-0000011", "step-by-step.txt"]


def test_saving_a_step_again_replaces_its_checkpoint(folder: str) -> None:
    run = Run(ALONE)
    run.train(0, 4)
    path = save(run, folder, 3, progress={"step": 3, "skipped": 7})
    again = Run(ALONE)
    assert checkpoint.load(path, again.parts(), config=CONFIG, world=ALONE).progress["skipped"] == 7
    assert again.weights() == run.weights()
    assert os.listdir(folder) == ["step-0000003"]


def test_a_full_disk_leaves_the_last_checkpoint(folder: str, straight: Weights) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointException, match="File too large"):
            save(Run(ALONE), folder, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert resume(folder) == straight


@pytest.mark.parametrize("value", [object(), float("nan")])
def test_values_that_json_cannot_hold_are_refused_before_writing(value: object, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="JSON"):
        save(Run(ALONE), str(tmp_path), 4, progress={"value": value})
    assert not os.listdir(tmp_path)


def test_another_config_is_refused_without_changing_tensors(folder: str) -> None:
    run = Run(ALONE)
    before = run.weights()
    other = {**CONFIG, "seed": 1, "crops": {"sizes": [224, 112]}}
    with pytest.raises(OutputMismatchError, match=r"(?s)crops\.sizes\.1: 96 there, 112 now.*seed: 0 there, 1 now"):
        checkpoint.load(f"{folder}/step-0000003", run.parts(), config=other, world=ALONE)
    assert run.weights() == before


def test_setting_that_no_longer_exists_is_said_with_the_remedies(folder: str) -> None:
    other = {name: value for name, value in CONFIG.items() if name != "seed"}
    expected = r"(?s)seed: 0 there, not set now.*the version of Seedbed that wrote it.*or delete the folder of this run"
    with pytest.raises(OutputMismatchError, match=expected):
        checkpoint.load(f"{folder}/step-0000003", Run(ALONE).parts(), config=other, world=ALONE)


def test_many_differences_are_counted(folder: str) -> None:
    other = {f"key{number}": number for number in range(20)}
    with pytest.raises(OutputMismatchError, match="and 16 more"):
        checkpoint.load(f"{folder}/step-0000003", Run(ALONE).parts(), config=other, world=ALONE)


@pytest.mark.parametrize(
    ("name", "keep_bytes", "message"),
    [
        ("__0_0.distcp", 100, r"__0_0\.distcp: it has 100 bytes, and the checkpoint was written with [\d,]+ there"),
        (".metadata", 0, r"\.metadata: it has 0 bytes"),
        ("__0_0.distcp", None, r"__0_0\.distcp: it is missing"),
        ("checkpoint.json", 40, r"checkpoint\.json: not a file that this version of Seedbed wrote"),
        ("checkpoint.json", None, "is no checkpoint: it has no checkpoint.json"),
    ],
)
def test_damaged_and_missing_files_are_named(folder: str, name: str, keep_bytes: int | None, message: str) -> None:
    path = Path(folder) / "step-0000003"
    content = (path / name).read_bytes()
    (path / name).unlink()
    if keep_bytes is not None:
        (path / name).write_bytes(content[:keep_bytes])
    with pytest.raises(InputError, match=message):
        checkpoint.load(str(path), Run(ALONE).parts(), config=CONFIG, world=ALONE)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_one_changed_bit_is_named_before_anything_is_read(folder: str, name: str) -> None:
    path = f"{folder}/step-0000003"
    flip_a_bit(Path(path, name))
    run = Run(ALONE)
    before = run.weights()
    for read in (
        lambda: checkpoint.load(path, run.parts(), config=CONFIG, world=ALONE),
        lambda: checkpoint.load_tensors(path, "average."),
    ):
        with pytest.raises(InputError, match=rf"{name}: damaged after it was written .*delete '{path}' to resume"):
            read()
    assert run.weights() == before


def test_every_rank_names_the_damage(tmp_path: Path, ranks: Ranks) -> None:
    folder = str(tmp_path / "checkpoints")
    ranks(start_and_save, folder)
    names = set(checkpoint.read_record(f"{folder}/step-0000003").sha256)
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    flip_a_bit(Path(folder, "step-0000003", "__1_0.distcp"))
    assert ranks(message_of_resume, folder) == [True, True]


def message_of_resume(folder: str) -> bool:
    """Whether resuming fails on this rank with the name of the damaged file."""
    try:
        resume(folder)
    except InputError as error:
        return "__1_0.distcp: damaged after it was written" in str(error)
    return False


def test_differing_tensors_are_named(folder: str) -> None:
    parts = {part: dict(tensors) for part, tensors in Run(ALONE).parts().items()}
    del parts["student"]["0.bias"]
    parts["average"]["0.bias"] = parts["average"]["0.bias"].double()
    parts["centers"]["ibot"] = torch.zeros(2)
    message = (
        r"(?s)1 missing: centers\.ibot.*1 unexpected: student\.0\.bias.*"
        r"1 of another type or shape: average\.0\.bias \(expected \('float64', \(7,\)\), found \('float32', \(7,\)\)\)"
    )
    with pytest.raises(InputError, match=message):
        checkpoint.load(f"{folder}/step-0000003", parts, config=CONFIG, world=ALONE)


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_created_early_equals_the_optimizers(fused: bool) -> None:
    results = []
    for early in (False, True):
        model = make(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        if early:
            checkpoint.optimizer_tensors(model, optimizer)
        model[2](torch.ones(1, 7)).sum().backward()  # the first layer gets no gradient
        optimizer.step()
        results.append({name: value.tolist() for name, value in model.state_dict().items()})
        tensors = checkpoint.optimizer_tensors(model, optimizer)
        assert len(tensors) == 3 * 4
        assert (float(tensors["0.bias.step"]), float(tensors["2.bias.step"])) == (0.0, 1.0)
        results.append({name: value.tolist() for name, value in tensors.items()})
    assert results[:2] == results[2:]


def test_urls_are_refused() -> None:
    with pytest.raises(ConfigError, match="memory://run"):
        save(Run(ALONE), "memory://run", 1)
