"""THE MAIN PATH: from seed datasets and an uncurated pool to a corpus, one stage after another.

    python -m pipelines.curate --config pipelines/configs/demo.toml --output runs/demo

    runs/demo/
      run.toml       the resolved config
      ingest/        a reference to each image, or the reason for its rejection   curation/ingest.py
      embed/         a vector of each image, which compares content               curation/embed.py
      describe/      a descriptor of each image, which detects copies             curation/embed.py
      pairs/         pairs of images that may be copies                           curation/pairs.py
      dedup/         the decision for each image: kept, copy, or like a holdout   curation/dedup.py
      cluster/       clusters of the kept pool images                             curation/cluster.py
      retrieve/      the pool images that resemble the seeds                      curation/retrieve.py
      corpus/        the tars of the corpus, and its composition                  curation/pack.py
      report.html    the results of all stages in pictures and tables             curation/report/page.py
      log/           a line for each finished shard, with times                   curation/engine/run_log.py

A finished stage is not done again. A stage whose config or inputs have changed is refused. With --replace it is redone,
and after it only the stages whose inputs have changed.
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
    """Run every unfinished stage in order, and write the report."""
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
    write_resolved(config, saved_config)  # only now: a config that a stage refuses must not replace the saved one
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
    page.read_concepts(settings.report)  # fails on a wrong path before the work begins
    if settings.demo_data is not None:
        dataset.run(Path(settings.demo_data))
    with command.open_runner(runner, workers, gpus_per_worker=_gpus_per_worker(settings)) as chosen:
        with sole_writer(output), open_log(output) as log:
            if not _is_finished(output):
                log.start()
            run(settings, output, chosen, replace=replace, log=log)
    page.print_summary(output)
    if log.started:
        status.print_times(output)


def _gpus_per_worker(config: CurateConfig) -> int:
    """The GPUs that a worker needs: the maximum over all stages."""
    return max(
        config.embed.embedder.num_gpus,
        config.describe.embedder.num_gpus,
        config.pairs.search.num_gpus,
        config.retrieve.search.num_gpus,
    )


def _is_finished(output: str) -> bool:
    """Whether every stage has a manifest."""
    return all(paths.exists(paths.join(output, stage, MANIFEST_NAME)) for stage in STAGES)


if __name__ == "__main__":
    from pipelines import curate  # by its real name, or its classes would exist twice

    command.main(curate.command_line)
