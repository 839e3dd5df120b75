"""The command: a model and a config in, results out.

    python -m evaluation.run --model PATH --config EVAL.toml --output DIR
    python -m evaluation.run --only knn ...            the [[knn]] tables alone; likewise for every other evaluation
    torchrun --nproc-per-node 8 -m evaluation.run ...  on eight devices, which share what goes through the model

    DIR/
      results.jsonl     one line a number, see results.py; further runs, of other models too, add to it
      pictures/         what visualize draws
      report.html       all of it, with the published numbers beside ours where the protocol is the same
      cache/            ingested splits, features and heads; may be deleted

The config is TOML: [model] says more of the model, and each evaluation is a list of tables, one a dataset:

    [[knn]]
    name = "flowers"
    train = { path = "flowers/train" }
    test = { path = "flowers/test" }

Exit status 2, with one message, for whatever the user can mend: a split that is missing, classes that differ between
splits, features that are not finite. What was found until then stays.
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

# What --model may name in place of a path.
WITHOUT_WEIGHTS = ("efficientnet_lite0", "pixels")
# How long ranks wait for one that fits or scores alone. Assumed: a day.
TIMEOUT_SECONDS = 86_400.0


class EvaluationConfig(Settings):
    """Which model, and what to find out about it."""

    model: FrozenModelConfig
    """The frozen model. The option --model sets its weights or its name."""
    knn: tuple[KnnConfig, ...] = ()
    """The vote of the nearest neighbours."""
    logistic: tuple[LogisticConfig, ...] = ()
    """Logistic regression."""
    linear: tuple[LinearConfig, ...] = ()
    """Linear probes with augmentation."""
    robustness: tuple[RobustnessConfig, ...] = ()
    """A linear head on images that differ from those it was trained on."""
    retrieval: tuple[RetrievalConfig, ...] = ()
    """Ranking images of the same thing."""
    segmentation: tuple[SegmentationConfig, ...] = ()
    """A linear head that names every pixel's class."""
    depth: tuple[DepthConfig, ...] = ()
    """Heads that tell how far away every pixel is."""
    neighbours: tuple[NeighboursConfig, ...] = ()
    """Sheets of pictures with their nearest neighbours."""
    visualize: tuple[VisualizeConfig, ...] = ()
    """Pictures of what the model sees."""


def evaluate(
    config: EvaluationConfig,
    model: FrozenModel,
    output: str,
    *,
    cache: str | None = None,
    runner: Runner | None = None,
    only: tuple[str, ...] = (),
) -> list[Result]:
    """Run every evaluation of the config, or those named; each one's results are written when it is done.

    All ranks of the model's world call this; the first one writes, and alone has every result.
    """
    found: list[Result] = []
    for name, settings in _listed(config):
        if only and name not in only:
            continue
        match settings:
            case KnnConfig():
                own = knn.run(settings, model, output, cache=cache, runner=runner)
            case LogisticConfig():
                own = logistic.run(settings, model, output, cache=cache, runner=runner)
            case LinearConfig():
                own = linear.run(settings, model, output, cache=cache, runner=runner)
            case RobustnessConfig():
                own = robustness.run(settings, model, output, cache=cache, runner=runner)
            case RetrievalConfig():
                own = retrieval.run(settings, model, output, cache=cache, runner=runner)
            case SegmentationConfig():
                own = segmentation.run(settings, model, output)
            case DepthConfig():
                own = depth.run(settings, model, output)
            case NeighboursConfig():
                neighbours.run(settings, model, output, cache=cache, runner=runner)
                own = []
            case VisualizeConfig():
                if model.world.is_first:
                    visualize.run(settings, model, output)
                own = []
            case _:
                raise AssertionError(name)
        if model.world.is_first:
            for result in own:
                results.append(output, result)
        found += own
    return found


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
        str | None, typer.Option("--model", help="Checkpoint, or the name of a model that needs none.")
    ] = None,
    cache: Annotated[str | None, typer.Option("--cache", help="Folder of the cache; default: OUTPUT/cache.")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run one kind of evaluation, such as knn. Repeatable.")
    ] = None,
    runner: command.RunnerOption = "inline",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
) -> None:
    """Evaluate a frozen model; under torchrun, on all its ranks."""
    changes = list(overrides or ())
    if model is not None:
        changes.append(f"model.{'name' if model in WITHOUT_WEIGHTS else 'weights'}={json.dumps(model)}")
    settings = load(EvaluationConfig, config, changes)
    kinds = tuple(only or ())
    _require(config, settings, kinds)
    if plan:
        print(resolved_toml(settings), end="")
        return
    with open_world(settings.model.device, timeout_seconds=TIMEOUT_SECONDS) as world:
        if world.num_ranks > 1 and runner != "inline":
            raise ConfigError(f"--runner {runner} under torchrun: its ranks share the work. Leave --runner out.")
        loaded = load_model(settings.model, world)
        gpus = int(settings.model.device == "cuda")
        with command.open_runner(runner, workers, gpus_per_worker=gpus) as chosen:
            found = evaluate(settings, loaded, output, cache=cache, runner=chosen, only=kinds)
        if world.is_first:
            if found:
                print_table(found)
            print(f"The report is {report.write(output)}")


def _require(path: str, config: EvaluationConfig, kinds: tuple[str, ...]) -> None:
    """Raise ConfigError unless there is something to do, of each of `kinds`."""
    names = [name for name, _ in _listed(config)]
    if not names:
        raise ConfigError(f"{path}: no evaluation. Add a table such as [[knn]] with name, train and test.")
    if absent := sorted(set(kinds) - set(names)):
        raise ConfigError(f"{path} has no [[{absent[0]}]]. It has: {', '.join(dict.fromkeys(names))}.")


def print_table(found: list[Result]) -> None:
    """Print the results for a person."""
    Console(highlight=False, markup=False, emoji=False, width=150).print(table(found))


def table(found: list[Result]) -> Table:
    """The results as a table for the terminal."""
    shown = Table(title=printable(found[0].model) if found else None, title_justify="left")
    for column in ("evaluation", "dataset", "protocol", "metric", "value", "spread", "seconds"):
        shown.add_column(column, justify="right" if column in ("value", "spread", "seconds") else "left")
    for result in found:
        spread = "" if result.spread is None else f"{result.spread:.4f}"
        own = (f"{result.value:.4f}", spread, f"{result.seconds:,.1f}")
        shown.add_row(*map(printable, (result.evaluation, result.dataset, result.protocol, result.metric)), *own)
    return shown


if __name__ == "__main__":
    from evaluation import run as this  # by its real name, or its classes would exist twice

    command.main(this.command_line)
