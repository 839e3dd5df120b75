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
from curation.config import load, resolved_toml
from curation.engine import command, run_log
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.runner import Runner
from curation.files import paths
from curation.files.folder_lock import sole_writer
from curation.report import page
from curation.report.facts import STAGES
from pipelines import status
from pipelines.curate_config import CurateConfig
from pipelines.demo import dataset
from pipelines.planning.plan import print_plan


def run(config: CurateConfig, output: str, runner: Runner, *, replace: bool = False) -> None:
    """Run every stage that is not done, and write the report."""
    folder = {stage: paths.join(output, stage) for stage in STAGES}
    images, vectors, descriptors = folder["ingest"], folder["embed"], folder["describe"]
    copies, kept, clusters, found = folder["pairs"], folder["dedup"], folder["cluster"], folder["retrieve"]

    if not paths.exists(paths.join(output, "run.toml")):
        _write_config(config, output)
    ingest.run(config.ingest, images, runner, replace=replace)
    embed.run(config.embed, images, vectors, runner, replace=replace)
    embed.run(config.describe, images, descriptors, runner, stage="describe", replace=replace)
    pairs.run(config.pairs, images, descriptors, copies, runner, replace=replace)
    dedup.run(config.dedup, images, copies, kept, runner, replace=replace)
    cluster.run(config.cluster, images, kept, vectors, clusters, runner, replace=replace)
    retrieve.run(config.retrieve, images, kept, vectors, clusters, found, runner, replace=replace)
    pack.run(config.pack, images, kept, found, folder["corpus"], runner, replace=replace)
    _write_config(config, output)  # only now: a config that a stage refuses must not take the place of the run's own
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
        with sole_writer(output), run_log.keeping(output) as log:
            if not all(paths.exists(paths.join(output, stage, MANIFEST_NAME)) for stage in STAGES):
                log.start()
            run(settings, output, chosen, replace=replace)
    page.print_summary(output)
    if log.started:
        status.print_times(output)


def _write_config(config: CurateConfig, output: str) -> None:
    """Save the resolved config, unless this very text is there already."""
    path, text = paths.join(output, "run.toml"), resolved_toml(config).encode()
    if not paths.exists(path) or paths.read_bytes(path) != text:
        paths.write_bytes(path, text)


if __name__ == "__main__":
    from pipelines import curate  # by its real name, or its classes would exist twice

    command.main(curate.command_line)
