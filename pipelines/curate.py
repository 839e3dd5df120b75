"""THE MAIN PATH: from seed datasets and an uncurated pool to a corpus, one stage after another.

    python -m pipelines.curate --config pipelines/configs/demo.toml --output runs/demo

    runs/demo/
      run.toml       the resolved config
      ingest/        every image by reference, or the reason why not      curation/ingest.py
      embed/         what resembles what                                  curation/embed.py
      describe/      what is a copy of what                               curation/embed.py
      pairs/         which two images may be copies                       curation/pairs.py
      dedup/         which copy is kept, what the holdout takes away      curation/dedup.py
      cluster/       the kept pool in clusters                            curation/cluster.py
      retrieve/      what resembles the seeds                             curation/retrieve.py
      corpus/        the corpus and its composition                       curation/pack.py
      report.html    what happened, in pictures                           curation/report/page.py
      log/           a line for each finished shard, with times           curation/engine/run_log.py

A finished stage is not done again. A stage whose config or inputs have changed is refused, or redone with --replace,
and with it only the stages that read what came out different.
"""

from pathlib import Path

from curation import cluster, dedup, embed, ingest, pack, pairs, retrieve
from curation.config import load, write_resolved
from curation.engine import command
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.run_log import RunLog, open_log
from curation.engine.runner import Runner
from curation.files import paths
from curation.files.folder_lock import sole_writer
from curation.report import page
from curation.report.page import CONFIG_NAME
from curation.run_folder import STAGES, RunFolder
from pipelines import status
from pipelines.curate_config import CurateConfig
from pipelines.demo import dataset
from pipelines.planning.plan import print_plan


def run(config: CurateConfig, output: str, runner: Runner, *, replace: bool = False, log: RunLog | None = None) -> None:
    """Run every stage that is not done, and write the report."""
    folder = RunFolder.of(output)
    saved_config = paths.join(output, CONFIG_NAME)
    if not paths.exists(saved_config):
        write_resolved(config, saved_config)
    ingest.run(config.ingest, folder.ingest, runner, replace=replace, log=log)
    embed.run(config.embed, folder, folder.embed, runner, replace=replace, log=log)
    embed.run(config.describe, folder, folder.describe, runner, name="describe", replace=replace, log=log)
    pairs.run(config.pairs, folder, folder.pairs, runner, replace=replace, log=log)
    dedup.run(config.dedup, folder, folder.dedup, runner, replace=replace, log=log)
    cluster.run(config.cluster, folder, folder.cluster, runner, replace=replace, log=log)
    retrieve.run(config.retrieve, folder, folder.retrieve, runner, replace=replace, log=log)
    pack.run(config.pack, folder, folder.corpus, runner, replace=replace, log=log)
    write_resolved(config, saved_config)  # last: a config that a stage refuses must not replace the saved one
    page.run(config.report, output)


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
            run(settings, output, chosen, replace=replace, log=log)
    page.print_summary(output)
    if log.started:
        status.print_times(output)


if __name__ == "__main__":
    from pipelines import curate  # by its real name, or its classes would exist twice

    command.main(curate.command_line)
