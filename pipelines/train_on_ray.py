"""The trainer on a Ray cluster: each worker of Ray Train is a rank and runs the loop of `python -m training.train`.

Ray places the workers and opens the process group. With --max-failures, Ray starts them again from the last checkpoint.
The run on disk is the same as under torchrun, plus a folder `ray` with Ray Train's state. Every machine must see the
output and the data. A worker's output stays in Ray's logs: watch metrics.jsonl or TensorBoard.

Needs the packages of `ray[train]`. If RAY_ADDRESS is not set, a local Ray is started (curation/engine/ray_runner.py).
"""

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from curation import config
from curation.engine import command
from curation.errors import DeviceError, InputError, UserError
from curation.files import paths


def run(
    function: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    output: str,
    *,
    num_workers: int,
    use_gpu: bool,
    max_failures: int = 0,
) -> None:
    """Call `function(arguments)` once in every worker, with a process group open between them; wait for all of them.

    Raises a worker's UserError as itself, and DeviceError if the packages of Ray Train are missing.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
    except ImportError as error:
        raise DeviceError(f"Ray Train cannot be imported: {error}. Install it: pip install 'ray[train]'.") from None

    with command.open_runner("ray", num_workers, gpus_per_worker=1 if use_gpu else 0):  # joins Ray, or starts one
        trainer = TorchTrainer(
            _work,
            train_loop_config={"function": function, "arguments": arguments, "folder": os.getcwd()},
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),  # a GPU each, or a CPU
            run_config=RunConfig(
                name="train", storage_path=_absolute(output, "ray"), failure_config=FailureConfig(max_failures)
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
            for _, failure in sorted(failures.items()):
                if (cause := _user_error(failure)) is not None:
                    raise cause from None
            raise


def _work(job: dict[str, Any]) -> None:
    """Run one worker in the folder in which the run was started, so that relative paths mean the same."""
    if not os.path.isdir(job["folder"]):
        raise InputError(
            f"The run was started in the folder '{job['folder']}', which machine {os.uname().nodename} does not have. "
            "Start in a folder that every machine sees."
        )
    os.chdir(job["folder"])
    job["function"](job["arguments"])


def _train(arguments: dict[str, Any]) -> None:
    from training import loop  # takes seconds; only workers need it

    settings = config.parse(loop.TrainConfig, arguments["config"], origin="the config of the run")
    loop.train(settings, arguments["output"])


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError that Ray has wrapped in errors of its own, or None."""
    while error is not None and not isinstance(error, UserError):
        error = getattr(error, "base_exc", None) or error.__cause__
    return error


def _absolute(output: str, name: str) -> str:
    return paths.join(os.path.abspath(output) if paths.is_local(output) else output, name)


def command_line(
    config_path: Annotated[str, typer.Option("--config", help="TOML file of a training run.")],
    output: command.OutputOption,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Ranks: one for each GPU of the cluster.")],
    cpu: Annotated[bool, typer.Option("--cpu", help="Ask Ray for no GPUs.")] = False,
    max_failures: Annotated[int, typer.Option("--max-failures", min=0, help="Restarts after a lost worker.")] = 0,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
) -> None:
    """Train on a Ray cluster."""
    from training import loop

    settings = config.load(loop.TrainConfig, config_path, overrides or ())
    if plan:
        print(config.resolved_toml(settings), end="")
        return
    command.require_apart(output, settings, config_path)
    arguments = {"config": settings.model_dump(mode="json", exclude_none=True), "output": output}
    run(_train, arguments, output, num_workers=workers, use_gpu=not cpu, max_failures=max_failures)


if __name__ == "__main__":
    from pipelines import train_on_ray  # by its real name, for workers to find

    command.main(train_on_ray.command_line)
