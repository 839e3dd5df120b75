"""Evaluates several models by the same evaluations, and reports them side by side.

    python -m pipelines.evaluate --config pipelines/configs/evaluate/demo.toml --output runs/evaluate

    runs/evaluate/
      results.jsonl     one line a number, of every model
      pictures/         patch tokens, attention and nearest neighbours
      report.html       tables, plots and pictures
      cache/            features; may be deleted

A model without patch tokens is left out of segmentation, depth and visualize, which need them.
"""

from typing import Any

from pydantic import Field, model_validator

from curation import config
from curation.config import Settings
from curation.engine import command
from curation.engine.ranks import Device, open_world
from curation.files import paths
from evaluation import report, run
from evaluation.features import load_model
from evaluation.run import EvaluationConfig

# Evaluations whose images all have one size, and evaluations that need patch tokens.
WITH_PICTURES = ("knn", "logistic", "neighbours")
OF_PATCHES = ("segmentation", "depth", "visualize")


class EvaluateConfig(Settings):
    """The models, and the evaluations of each."""

    models: tuple[dict[str, Any], ...] = Field(min_length=1)
    """One table for each model: the settings of evaluation.features.FrozenModelConfig, and `image_size`, the side in
    pixels of the square that the model sees of a labelled image."""
    evaluations: dict[str, Any]
    """The evaluations, as `python -m evaluation.run` reads them."""

    @model_validator(mode="after")
    def _every_model_has_a_size(self) -> "EvaluateConfig":
        for number, model in enumerate(self.models):
            if not isinstance(model.get("image_size"), int):
                raise ValueError(f"models.{number} has no image_size")
        return self

    def of_model(self, number: int) -> EvaluationConfig:
        """The evaluations of one model. Raises ConfigError."""
        model = dict(self.models[number])
        size = model.pop("image_size")
        pictures = {"resize_size": size, "image_size": size}
        evaluations = dict(self.evaluations)
        for name in WITH_PICTURES:
            evaluations[name] = [{"pictures": pictures, **table} for table in evaluations.get(name, [])]
        evaluations["retrieval"] = [
            {**table, "data": {"pictures": pictures, **table["data"]}} if _is_labelled(table) else table
            for table in evaluations.get("retrieval", [])
        ]
        return config.parse(EvaluationConfig, {"model": model, **evaluations}, origin=f"models.{number}")


def _is_labelled(table: dict[str, Any]) -> bool:
    return isinstance(table.get("data"), dict) and table["data"].get("layout") == "labelled"


def evaluate(settings: EvaluateConfig, output: str) -> str | None:
    """Run all evaluations, on each rank that torchrun started. The first rank returns the path of the report."""
    configs = [settings.of_model(number) for number in range(len(settings.models))]  # every config is checked first
    paths.require_writable(output)
    device: Device = "cuda" if any(one.model.device == "cuda" for one in configs) else "cpu"
    with open_world(device, timeout_seconds=run.TIMEOUT_SECONDS) as world:
        for evaluations in configs:
            model = load_model(evaluations.model, world)
            if model.patch_size is None:
                evaluations = evaluations.model_copy(update=dict.fromkeys(OF_PATCHES, ()))
            results = run.evaluate(evaluations, model, output)
            if world.is_first:
                run.print_table(results)
        return report.write(output) if world.is_first else None


def command_line(
    config_path: command.ConfigOption = "evaluate/demo",
    output: command.OutputOption = "runs/evaluate",
    overrides: command.SetOption = None,
) -> None:
    """Evaluate models side by side."""
    settings = config.load(EvaluateConfig, config_path, overrides or ())
    command.require_apart(output, settings, config_path)
    page = evaluate(settings, output)
    if page is not None:
        print(f"The report is {page}")


if __name__ == "__main__":
    from pipelines import evaluate as this  # by its real name

    command.main(this.command_line)
