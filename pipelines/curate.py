"""The command that builds a corpus; its main path is main_path.py.

python -m pipelines.curate --config pipelines/configs/demo.toml --output runs/demo
"""

from pathlib import Path

from curation.config import load
from curation.engine import command
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.run_log import open_log
from curation.files import paths
from curation.files.folder_lock import sole_writer
from curation.report import page
from curation.run_folder import STAGES
from pipelines import main_path, status
from pipelines.demo import dataset
from pipelines.main_path import CurateConfig
from pipelines.planning.plan import print_plan


def command_line(
    config: command.ConfigOption = "pipelines/configs/demo.toml",
    output: command.OutputOption = "runs/demo",
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Build a corpus: ingest, embed, deduplicate, cluster, retrieve, pack, report."""
    settings = load(CurateConfig, config, overrides or ())
    if plan:
        print_plan(settings)
        return
    page.read_concepts(settings.report)  # a wrong path is better known now than after hours
    if settings.demo_data is not None:
        dataset.run(Path(settings.demo_data))
    models, searches = (settings.embed, settings.describe), (settings.pairs.search, settings.retrieve.search)
    num_gpus = max(*(model.embedder.num_gpus for model in models), *(search.num_gpus for search in searches))
    with command.open_runner(runner, workers, gpus_per_worker=num_gpus) as chosen:
        with sole_writer(output), open_log(output) as log:
            if not all(paths.exists(paths.join(output, stage, MANIFEST_NAME)) for stage in STAGES):
                log.start()
            main_path.run(settings, output, chosen, replace=replace, log=log)
    page.print_summary(output)
    if log.started:
        status.print_times(output)


if __name__ == "__main__":
    from pipelines import curate  # by its real name, or its classes would exist twice

    command.main(curate.command_line)
