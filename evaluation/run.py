"""The command of all evaluations: evaluates one model by a config, and writes results and a report.

    seedbed evaluate --model PATH --config EVAL.toml --output DIR
    seedbed evaluate --only knn ...                    the [[knn]] tables alone; likewise for every other evaluation
    torchrun --nproc-per-node 8 -m evaluation.run ...  on eight devices, which share the images

    DIR/
      results.jsonl     one line a number, see results.py; further runs, also of other models, append to it
      pictures/         drawn by visualize and neighbours
      report.html       results and pictures, with published numbers of the same protocol
      cache/            ingested splits, features and heads; may be deleted

The config is TOML. [model] has settings of the model; each evaluation is a list of tables, one for each dataset:

    [[knn]]
    name = "flowers"
    train = { path = "flowers/train" }
    test = { path = "flowers/test" }

Exit status 2, with one message, for errors of the user: a missing split, classes that differ between splits, features
that are not finite. Earlier results of the run stay in the file.
"""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from curation.config import Settings, load, resolved_toml
from curation.engine import command
from curation.engine.progress import printable
from curation.engine.ranks import open_world
from curation.engine.runner import Runner
from curation.errors import ConfigError
from curation.files import paths
from evaluation import (
    depth,
    knn,
    linear,
    logistic,
    neighbours,
    report,
    results,
    retrieval,
    robustness,
    segmentation,
    visualize,
)
from evaluation.depth import DepthConfig
from evaluation.features import FrozenModel, FrozenModelConfig, load_model
from evaluation.knn import KnnConfig
from evaluation.linear import LinearConfig
from evaluation.logistic import LogisticConfig
from evaluation.neighbours import NeighboursConfig
from evaluation.results import Result
from evaluation.retrieval import RetrievalConfig
from evaluation.robustness import RobustnessConfig
from evaluation.segmentation import SegmentationConfig
from evaluation.visualize import VisualizeConfig

# Names that --model may give in place of a path.
WITHOUT_WEIGHTS = ("efficientnet_lite0", "pixels")
# Maximum time that ranks wait for a rank that fits or scores alone. Assumed: one day.
TIMEOUT_SECONDS = 86_400.0


class EvaluationConfig(Settings):
    """The model, and its evaluations."""

    model: FrozenModelConfig
    """The frozen model. The option --model sets its weights or its name."""
    knn: tuple[KnnConfig, ...] = ()
    """k-NN classification."""
    logistic: tuple[LogisticConfig, ...] = ()
    """Logistic regression."""
    linear: tuple[LinearConfig, ...] = ()
    """Linear probes with augmentation."""
    robustness: tuple[RobustnessConfig, ...] = ()
    """A linear head on images that differ from its training images."""
    retrieval: tuple[RetrievalConfig, ...] = ()
    """Retrieval of images of the same object or class."""
    segmentation: tuple[SegmentationConfig, ...] = ()
    """A linear head that classifies every pixel."""
    depth: tuple[DepthConfig, ...] = ()
    """Heads that predict the depth of every pixel."""
    neighbours: tuple[NeighboursConfig, ...] = ()
    """Sheets of images with their nearest neighbours."""
    visualize: tuple[VisualizeConfig, ...] = ()
    """Pictures of patch tokens and attention."""


def evaluate(
    config: EvaluationConfig,
    model: FrozenModel,
    output: str,
    *,
    cache: str | None = None,
    runner: Runner | None = None,
    only: tuple[str, ...] = (),
) -> list[Result]:
    """Run every evaluation of the config, or only the kinds in `only`. Results are written after each evaluation.

    All ranks of the model's world call this. Only the first rank writes, and only it returns every result.
    """
    all_results: list[Result] = []
    for name, settings in _listed(config):
        if only and name not in only:
            continue
        match settings:
            case KnnConfig():
                new_results = knn.run(settings, model, output, cache=cache, runner=runner)
            case LogisticConfig():
                new_results = logistic.run(settings, model, output, cache=cache, runner=runner)
            case LinearConfig():
                new_results = linear.run(settings, model, output, cache=cache, runner=runner)
            case RobustnessConfig():
                new_results = robustness.run(settings, model, output, cache=cache, runner=runner)
            case RetrievalConfig():
                new_results = retrieval.run(settings, model, output, cache=cache, runner=runner)
            case SegmentationConfig():
                new_results = segmentation.run(settings, model, output)
            case DepthConfig():
                new_results = depth.run(settings, model, output)
            case NeighboursConfig():
                neighbours.run(settings, model, output, cache=cache, runner=runner)
                new_results = []
            case VisualizeConfig():
                if model.world.is_first:
                    visualize.run(settings, model, output)
                new_results = []
            case _:
                raise AssertionError(name)
        if model.world.is_first:
            for result in new_results:
                results.append(output, result)
        all_results += new_results
    return all_results


def _listed(config: EvaluationConfig) -> list[tuple[str, Settings]]:
    """Every evaluation with its name, in the order of the fields."""
    return [
        (name, settings)
        for name in EvaluationConfig.model_fields
        if name != "model"
        for settings in getattr(config, name)
    ]


def command_line(
    config: command.ConfigOption,
    output: command.OutputOption,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH", help="Checkpoint (docs/weights.md), or efficientnet_lite0, or pixels."),
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", metavar="DIR", help="Folder of features; default: OUTPUT/cache.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="KIND", help="Run one kind of evaluation, such as knn. Repeatable."),
    ] = None,
    runner: command.RunnerOption = "inline",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
) -> None:
    """Evaluate a frozen model by the evaluations of a config.

    Each evaluation is a table of the config, such as [[knn]] with `name`, `train = {path = ...}` and `test`. A line for
    each number is added to OUTPUT/results.jsonl; OUTPUT/report.html shows those of all models. On several devices:
    torchrun --nproc-per-node 8 -m evaluation.run, with the same options.

    \b
    Examples:
      seedbed evaluate --model teacher.pth --config eval.toml --output runs/eval
      seedbed evaluate --model teacher.pth --config eval.toml --output runs/eval \\
          --only knn --set model.device=cuda --set model.precision=bfloat16
    """
    changes = list(overrides or ())
    if model is not None:
        changes.append(f"model.{'name' if model in WITHOUT_WEIGHTS else 'weights'}={json.dumps(model)}")
    settings = load(EvaluationConfig, config, changes)
    kinds = tuple(only or ())
    _require(config, settings, kinds)
    if plan:
        print(resolved_toml(settings), end="")
        return
    command.require_apart(output, settings, config)
    paths.require_writable(output)
    with open_world(settings.model.device, timeout_seconds=TIMEOUT_SECONDS) as world:
        if world.num_ranks > 1 and runner != "inline":
            raise ConfigError(f"--runner {runner} under torchrun: its ranks share the work. Leave --runner out.")
        loaded = load_model(settings.model, world)
        gpus = int(settings.model.device == "cuda")
        with command.open_runner(runner, workers, gpus_per_worker=gpus) as chosen:
            all_results = evaluate(settings, loaded, output, cache=cache, runner=chosen, only=kinds)
        if world.is_first:
            if all_results:
                print_table(all_results)
            print(f"The report is {report.write(output)}")


def _require(path: str, config: EvaluationConfig, kinds: tuple[str, ...]) -> None:
    """Raise ConfigError unless the config has an evaluation, and one of each of `kinds`."""
    names = [name for name, _ in _listed(config)]
    if not names:
        raise ConfigError(f"{path}: no evaluation. Add a table such as [[knn]] with name, train and test.")
    if absent := sorted(set(kinds) - set(names)):
        raise ConfigError(f"{path} has no [[{absent[0]}]]. It has: {', '.join(dict.fromkeys(names))}.")


def print_table(model_results: list[Result]) -> None:
    """Print the results of one model."""
    Console(highlight=False, markup=False, emoji=False, width=150).print(table(model_results))


def table(model_results: list[Result]) -> Table:
    """The results of one model as a table for the terminal."""
    rows = Table(title=printable(model_results[0].model) if model_results else None, title_justify="left")
    for column in ("evaluation", "dataset", "protocol", "metric", "value", "spread", "seconds"):
        rows.add_column(column, justify="right" if column in ("value", "spread", "seconds") else "left")
    for result in model_results:
        spread = "" if result.spread is None else f"{result.spread:.4f}"
        numbers = (f"{result.value:.4f}", spread, f"{result.seconds:,.1f}")
        rows.add_row(*map(printable, (result.evaluation, result.dataset, result.protocol, result.metric)), *numbers)
    return rows


if __name__ == "__main__":
    from evaluation import run as this  # by its real name, or its classes would exist twice

    command.main(this.command_line)
