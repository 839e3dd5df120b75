"""The whole loop on small pictures: resuming, ranks, skipped steps, errors during a run, and exports."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator

from curation import backbone, weights
from curation.backbone import VisionTransformer
from curation.config import resolved_toml
from curation.engine.ranks import World, max_over_ranks, open_world, sum_over_ranks
from curation.engine.runner import InlineRunner
from curation.errors import ConfigError, InputError, OutputMismatchError, RejectBudgetError, TrainingError
from tests.training.builders import random_batch, split, train_config, write_images
from training import checkpoint, loop, samples
from training.loop import TrainConfig, train
from training.model import teacher_targets

Ranks = Callable[..., list[Any]]
Arrays = dict[str, np.ndarray]


@pytest.fixture
def images(tmp_path: Path) -> str:
    return write_images(tmp_path / "images")


def state(output: Path | str, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return checkpoint.load_tensors(str(Path(output, "checkpoints", f"step-{step:07d}")), "")


def lines(output: Path | str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


class Interrupted(BaseException):
    """Stops a run from outside."""


def stop_at(step: int) -> loop.Evaluate:
    def evaluate(model: VisionTransformer, steps_done: int) -> dict[str, float]:
        if steps_done == step:
            raise Interrupted
        return {"seen": float(steps_done)}

    return evaluate


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "ema"])
def test_stop_and_resume_equals_straight_through_bit_for_bit(images: str, tmp_path: Path, centering: str) -> None:
    config = train_config(images, model__objective={"centering": centering}, evaluate_every=1)
    train(config, str(tmp_path / "straight"), stop_at(-1))
    with pytest.raises(Interrupted):
        train(config, str(tmp_path / "stopped"), stop_at(3))  # a step after the checkpoint of step 2
    assert checkpoint.steps(str(tmp_path / "stopped" / "checkpoints")) == [2]
    train(config, str(tmp_path / "stopped"), stop_at(-1))
    assert_equal(state(tmp_path / "stopped", 4), state(tmp_path / "straight", 4))

    measured = {"images_per_second", "data_wait_share", "peak_memory_gb"}
    straight, stopped = ([line.items() for line in lines(tmp_path / run)] for run in ("straight", "stopped"))
    for one, other in zip(straight, stopped, strict=True):  # step 3 ran twice and has one line
        assert {item for item in one if item[0] not in measured} == {item for item in other if item[0] not in measured}


def test_a_finished_run_does_no_work(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, output = train_config(images, num_steps=1), tmp_path / "run"
    train(config, str(output))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    train(config, str(output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    assert "done already" in capsys.readouterr().err


def test_tensorboard_has_the_values_of_the_metrics(images: str, tmp_path: Path) -> None:
    train(train_config(images, num_steps=2, peak_teraflops=0.1), str(tmp_path / "run"), stop_at(-1))
    board = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for name, values in {
        name: [line[name] for line in lines(tmp_path / "run") if name in line]
        for name in ("loss", "gradient_norm/backbone", "learning_rate", "rank_me", "model_flops_utilization", "seen")
    }.items():
        assert [event.value for event in board.Scalars(name)] == pytest.approx(values, rel=1e-6), name
        assert len(values) == 2


def on_a_rank(config: str, output: str) -> None:
    train(TrainConfig.model_validate_json(config), output)


# Settings under which the number of ranks has no effect: stochastic depth is drawn by rank, KoLeo sees one pass.
ALIKE = {"model__backbone__drop_path": 0.0, "images_per_pass": 4}


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "ema"])
def test_one_step_on_two_ranks_equals_one_rank(images: str, tmp_path: Path, ranks: Ranks, centering: str) -> None:
    config = train_config(images, num_steps=1, model__objective={"centering": centering}, **ALIKE)
    train(config, str(tmp_path / "one"))
    ranks(on_a_rank, config.model_dump_json(), str(tmp_path / "two"))
    # After one step, the optimizer's first moment is a tenth of the clipped gradient.
    one, two = (state(tmp_path / run, 1) for run in ("one", "two"))
    gradients = [name for name in one if name.endswith(".exp_avg")]
    assert len(gradients) > 40
    for name in gradients:
        torch.testing.assert_close(two[name] * 10, one[name] * 10, rtol=1e-4, atol=1e-5, msg=name)
    for name in ("centers.dino", "centers.ibot"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    (first,), (second,) = lines(tmp_path / "one"), lines(tmp_path / "two")
    for name in ("loss", "dino_global", "dino_local", "ibot", "koleo", "gradient_norm/backbone"):
        assert second[name] == pytest.approx(first[name], rel=1e-5)


def test_a_run_of_two_ranks_resumes_on_one(images: str, tmp_path: Path, ranks: Ranks) -> None:
    config = train_config(images, schedule__base_learning_rate=1e-3, **ALIKE)
    ranks(on_a_rank, config.model_dump_json(), str(tmp_path / "two"))
    changed = tmp_path / "changed" / "checkpoints"
    changed.mkdir(parents=True)
    os.rename(tmp_path / "two" / "checkpoints" / "step-0000002", changed / "step-0000002")
    train(config, str(tmp_path / "changed"))
    actual, expected = state(tmp_path / "changed", 4), state(tmp_path / "two", 4)
    for name, tensor in expected.items():
        if name.startswith(("student.", "teacher.")):
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_a_run_of_one_rank_resumes_on_two_in_smaller_passes(images: str, tmp_path: Path, ranks: Ranks) -> None:
    values = ALIKE | {"schedule__base_learning_rate": 1e-3, "evaluate_every": 2}
    config = train_config(images, model__objective={"koleo_images": 4}, **values)
    train(config, str(tmp_path / "straight"))
    with pytest.raises(Interrupted):
        train(config.model_copy(update={"images_per_pass": 8}), str(tmp_path / "two"), stop_at(2))
    ranks(on_a_rank, config.model_dump_json(), str(tmp_path / "two"))
    actual, expected = (state(tmp_path / run, 4) for run in ("two", "straight"))
    for name, tensor in expected.items():
        if name.startswith(("student.", "teacher.")):
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_another_group_of_koleo_is_said(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = train_config(images, num_steps=2, checkpoint__every=1, evaluate_every=1)
    with pytest.raises(Interrupted):
        train(config.model_copy(update={"images_per_pass": 8}), str(tmp_path), stop_at(1))
    train(config, str(tmp_path))
    line = "images_per_pass was 8 and is 4: KoLeo now looks for neighbours among 4 images"
    assert line in capsys.readouterr().err


def bfloat16_step(config: str, num_ranks: int) -> dict[str, Any]:
    """One step of eight images, in passes of four: the types in the student's blocks, and the losses of this rank.

    moved: the smallest share of a residual stream's entries that a block changes.
    """
    seen: list[tuple[str, ...]] = []
    moved: list[float] = []
    parsed = TrainConfig.model_validate_json(config)
    with open_world("cpu", timeout_seconds=60) as world:
        assert world.num_ranks == num_ranks
        trainer = loop.build_trainer(parsed, world)

        def watch(block: Any, inputs: tuple[list[torch.Tensor], Any], outputs: list[torch.Tensor]) -> None:
            weights = (block.norm1.weight, block.ls1.gamma, block.ls2.gamma)
            seen.append(tuple(str(tensor.dtype) for tensor in (*inputs[0], *outputs, *weights)))
            moved.extend(
                float((before != after).float().mean()) for before, after in zip(inputs[0], outputs, strict=True)
            )

        for block in trainer.model.student.backbone.blocks:
            block.register_forward_hook(watch, prepend=True)  # FSDP's own hook frees the gathered weights
        passes = split(random_batch(8), 2)
        result = loop.step(trainer, passes if num_ranks == 1 else passes[world.rank : world.rank + 1], 1)
        losses = {name: float(value) for name, value in result.losses.items()}
    return {"types": sorted({kind for types in seen for kind in types}), "moved": min(moved), "losses": losses}


# Largest difference of a loss between one rank and two, as a share of the loss. bfloat16 keeps 8 bits; the weights of
# matrices are rounded before they are gathered, those of heads before they are normalised.
BFLOAT16_BOUND = 2e-3


def test_the_residual_stream_is_float32_on_one_rank_and_on_two(ranks: Ranks) -> None:
    config = train_config(
        "unused", precision="bfloat16", model__backbone__drop_path=0.0, model__backbone__layer_scale=1e-5
    ).model_dump_json()
    alone = bfloat16_step(config, 1)
    both = ranks(bfloat16_step, config, 2)
    for each in (alone, *both):
        assert each["types"] == ["torch.float32"]
        # Contributions are some 1e-6 beside tokens of some 0.02. They are below half the spacing of bfloat16 there,
        # 6e-5, and above that of float32, 2e-9.
        assert each["moved"] > 0.9
    for name, value in alone["losses"].items():
        of_both = (both[0]["losses"][name] + both[1]["losses"][name]) / 2
        assert of_both == pytest.approx(value, rel=BFLOAT16_BOUND), name


def prepared(config: TrainConfig, output: Path) -> loop.Trainer:
    samples.prepare(config.data, str(output), InlineRunner())
    return loop.build_trainer(config, World(0, 1, 0, torch.device("cpu")))


def test_a_step_that_is_not_finite_changes_nothing(images: str, tmp_path: Path) -> None:
    trainer = prepared(train_config(images), tmp_path)
    loop.step(trainer, [random_batch(4, num_local=2), random_batch(4, seed=1, num_local=2)], 0)
    before = {name: tensor.clone() for name, tensor in checkpoint._flat(loop._checkpoint_parts(trainer)).items()}
    bad = random_batch(4, seed=2, num_local=2)
    bad.crops[1][3, 0, 5, 5] = float("nan")
    result = loop.step(trainer, [random_batch(4, seed=3, num_local=2), bad], 1)
    assert not result.finite
    assert_equal(checkpoint._flat(loop._checkpoint_parts(trainer)), before)
    assert all(parameter.grad is None for parameter in trainer.model.student.parameters())
    assert loop.step(trainer, [random_batch(4, seed=3, num_local=2)] * 2, 1).finite


def test_too_many_skipped_steps_end_the_run(images: str, tmp_path: Path) -> None:
    config = train_config(images, num_steps=14, schedule__base_learning_rate=1e38)
    with pytest.raises(TrainingError, match=r"for 11 steps in a row.*[0-9a-f]{32}, [0-9a-f]{32}"):
        train(config, str(tmp_path / "run"))
    last = lines(tmp_path / "run")[-1]
    assert last["skipped_steps"] == 11
    assert checkpoint.steps(str(tmp_path / "run" / "checkpoints"))[-1] == last["step"]


def config_for_signals(images: str, **changes: Any) -> TrainConfig:
    return train_config(images, num_steps=12, checkpoint__every=1000, **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Images, and the output of a run on them that no signal stopped."""
    folder = tmp_path_factory.mktemp("straight")
    images = write_images(folder / "images")
    train(config_for_signals(images), str(folder / "run"))
    return images, folder / "run"


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_resumes(straight: tuple[str, Path], tmp_path: Path, sent: int, status: int) -> None:
    images, straight_run = straight
    config = config_for_signals(images, data__workers=1)
    (tmp_path / "train.toml").write_text(resolved_toml(config))
    command = [sys.executable, "-m", "training.train", "--config", str(tmp_path / "train.toml"), "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # for sums over the same parts
    process = subprocess.Popen(
        [*command, str(tmp_path / "run")], start_new_session=True, stderr=subprocess.PIPE, env=environment
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)
    os.killpg(process.pid, sent)  # as torchrun and terminals do: also to the loader's processes
    _, messages = process.communicate(timeout=60)
    assert process.returncode == status and b"Traceback" not in messages, messages.decode()
    (stopped,) = checkpoint.steps(str(tmp_path / "run" / "checkpoints"))
    assert 2 <= stopped < 12
    train(config_for_signals(images), str(tmp_path / "run"))  # the loader's processes may differ
    assert_equal(state(tmp_path / "run", 12), state(straight_run, 12))


def test_a_truncated_shard_ends_the_run_and_no_step_is_lost(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    tar = tmp_path / "images.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(tmp_path / "images", ".")
    config = train_config(str(tar), num_steps=8, data__layout="webdataset", evaluate_every=1)
    train(config, str(tmp_path / "straight"))
    whole = tar.read_bytes()

    def truncate_at_two(model: VisionTransformer, steps_done: int) -> dict[str, float]:
        if steps_done == 2:
            os.truncate(tar, len(whole) // 3)
        return {}

    with pytest.raises(InputError, match=r"The shard .*images\.tar is cut off"):
        train(config, str(tmp_path / "run"), truncate_at_two)
    stopped = checkpoint.steps(str(tmp_path / "run" / "checkpoints"))[-1]
    assert stopped == lines(tmp_path / "run")[-1]["step"] < 8  # no step is lost
    tar.write_bytes(whole)
    train(config, str(tmp_path / "run"))
    assert_equal(state(tmp_path / "run", 8), state(tmp_path / "straight", 8))


def test_an_image_that_no_longer_decodes_is_counted_and_replaced(images: str, tmp_path: Path) -> None:
    def damage(name: str) -> None:
        Path(images, name).write_bytes(bytes(Path(images, name).stat().st_size))

    config = train_config(images, data__max_reject_fraction=0.1)
    samples.prepare(config.data, str(tmp_path / "run"), InlineRunner())
    damage("03.png")
    train(config, str(tmp_path / "run"))
    assert lines(tmp_path / "run")[-1]["rejected_images"] == 1
    config = train_config(images, data__max_reject_fraction=0.1, num_steps=6)
    samples.prepare(config.data, str(tmp_path / "longer"), InlineRunner())
    damage("04.png")
    damage("05.png")
    with pytest.raises(RejectBudgetError, match=r"2 images could not be used, more than .*max_reject_fraction = 0.1"):
        train(config, str(tmp_path / "longer"))


def test_an_output_of_another_config_is_refused(images: str, tmp_path: Path) -> None:
    train(train_config(images, num_steps=2), str(tmp_path / "run"))
    before = (tmp_path / "run" / "train.toml").read_bytes()
    with pytest.raises(OutputMismatchError, match=r"seed: 0 there, 1 now"):
        train(train_config(images, num_steps=2, seed=1), str(tmp_path / "run"))
    assert (tmp_path / "run" / "train.toml").read_bytes() == before
    train(train_config(images, num_steps=2, log_every=7, checkpoint__keep=1), str(tmp_path / "run"))


def test_impossible_configs_are_refused_before_any_image(images: str, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            train(train_config(images, **changes), str(tmp_path / "run"))

    huge = {"num_prototypes": 10**9, "bottleneck_dim": 256, "hidden_dim": 2048}
    refused(r"more memory than cpu has: [\d,]+\.\d GB of .*prototypes", model__dino_head=huge)
    refused("batch_size 8 is not a multiple of images_per_pass 3", images_per_pass=3)
    refused("KoLeo looks for neighbours among 3 of the 4", model__objective={"koleo_images": 3})
    refused("KoLeo looks for neighbours among 1 of the 1", images_per_pass=1)
    refused("global crops are 32 pixels and model.backbone.image_size is 64", model__backbone__image_size=64)
    refused("crops of 16 pixels do not divide into patches of 12", model__backbone__patch_size=12)
    refused("learning_rate_warmup_steps 9 is more than num_steps 4", schedule__learning_rate_warmup_steps=9)
    refused("'varlen' needs cuda and bfloat16", packed_attention="varlen")
    with pytest.raises(ConfigError, match="writes to a local folder"):
        train(train_config(images), "memory://run")
    assert not (tmp_path / "run").exists()


def test_the_export_holds_the_ema(images: str, tmp_path: Path) -> None:
    train(train_config(images), str(tmp_path / "run"))
    vit = backbone.build("vit_tiny", depth=2, patch_size=8, image_size=32, seed=None)
    weights.load(vit, str(tmp_path / "run" / "export" / "step-0000004" / "teacher.pth"))
    expected = state(tmp_path / "run", 4)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, expected[f"teacher.backbone.{name}"])
    assert not torch.equal(expected["teacher.backbone.norm.weight"], expected["student.backbone.norm.weight"])


TEACHER = {"name": "vit_tiny", "depth": 2, "patch_size": 8, "image_size": 32}  # the backbone that `train_config` has


def test_distillation_and_higher_resolution_start_from_an_export(images: str, tmp_path: Path) -> None:
    train(train_config(images, num_steps=2), str(tmp_path / "teacher"))
    export = tmp_path / "teacher" / "export" / "step-0000002"
    teacher = {**TEACHER, "weights": str(export / "teacher.pth")}
    student = {"name": "vit_tiny", "depth": 1, "patch_size": 8, "image_size": 32}
    distilled = train_config(
        images,
        model__backbone=student,
        model__distillation={"backbone": teacher, "heads": str(export / "heads.pth")},
        masks__crop_share=0.0,
    )
    train(distilled, str(tmp_path / "distilled"))
    distilled_state = state(tmp_path / "distilled", 4)
    assert {name.partition(".")[0] for name in distilled_state} == {"student", "average", "optimizer", "centers"}
    vit = backbone.build("vit_tiny", depth=1, patch_size=8, image_size=32, seed=None)
    weights.load(vit, str(tmp_path / "distilled" / "export" / "step-0000004" / "teacher.pth"))
    assert torch.equal(vit.cls_token, distilled_state["average.backbone.cls_token"])  # type: ignore[arg-type]
    # All 16 patches of both global crops of 4 images are in the loss.
    trainer = prepared(distilled, tmp_path / "again")
    (targets,) = teacher_targets(trainer.model, [random_batch(4, num_local=2)], 0.05, sum_over_ranks, max_over_ranks)
    assert len(targets.patch_indices) == 2 * 4 * 16 and targets.patch_weights.sum().item() == pytest.approx(8)

    high = train_config(
        images,
        num_steps=2,
        model__backbone={**teacher, "image_size": 48},
        model__heads=str(export / "heads.pth"),
        augment__crops=[
            {"name": "global", "size": 48, "scale": [0.32, 1.0], "views": [{"num": 2, "blur": 0.5}]},
        ],
    )
    train(high, str(tmp_path / "high"))
    assert state(tmp_path / "high", 2)["teacher.backbone.pos_embed"].shape == (1, 37, 192)
    first_state = prepared(high, tmp_path / "high-again").model.student.state_dict()
    teacher_state = state(tmp_path / "teacher", 2)
    for name in ("dino_head.last_layer.weight_v", "ibot_head.mlp.4.bias", "backbone.blocks.1.mlp.fc1.weight"):
        assert torch.equal(first_state[name], teacher_state[f"teacher.{name}"])

    other_teacher = torch.load(export / "teacher.pth", weights_only=True)
    torch.save({name: value + 0.1 for name, value in other_teacher.items()}, export / "teacher.pth")
    with pytest.raises(OutputMismatchError, match=r"frozen_teacher\.backbone: '[0-9a-f]{64}' there"):
        train(distilled, str(tmp_path / "distilled"))


def test_teacher_and_student_must_have_equally_many_prototypes(images: str, tmp_path: Path) -> None:
    train(train_config(images, num_steps=1), str(tmp_path / "teacher"))
    export = tmp_path / "teacher" / "export" / "step-0000001"
    teacher = {**TEACHER, "weights": str(export / "teacher.pth")}
    config = train_config(
        images,
        model__backbone__drop_path=0.0,
        model__dino_head={"num_prototypes": 65, "bottleneck_dim": 16, "hidden_dim": 32},
        model__distillation={"backbone": teacher, "heads": str(export / "heads.pth")},
    )
    with pytest.raises(weights.WeightsError, match="64 prototypes, and the student's 65"):
        train(config, str(tmp_path / "distilled"))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_no_result(images: str, tmp_path: Path, recompute: str) -> None:
    train(train_config(images, num_steps=2), str(tmp_path / "kept"))
    train(train_config(images, num_steps=2, recompute=recompute), str(tmp_path / "again"))
    recomputed = state(tmp_path / "again", 2)
    for name, tensor in state(tmp_path / "kept", 2).items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
