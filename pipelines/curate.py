"""The command that builds a corpus; its main path is main_path.py.

python -m pipelines.curate --config pipelines/configs/demo.toml --output runs/demo
"""

from pathlib import Path
from typing import Annotated

import typer

from curation.config import load, resolved_toml
from curation.engine import command
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.run_log import open_log
from curation.errors import ConfigError, InputError
from curation.files import paths
from curation.files.folder_lock import sole_writer
from curation.images import sources
from curation.models.embedders import require_weights
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
    sample: Annotated[
        float | None, typer.Option("--sample", min=0, max=1, help="Share of the pool that is read, for a trial run.")
    ] = None,
    rates_from: Annotated[
        str | None, typer.Option("--rates-from", metavar="RUN", help="With --plan: a finished run whose times count.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --plan: print rates and config too.")] = False,
) -> None:
    """Build a corpus: ingest, embed, deduplicate, cluster, retrieve, pack, report."""
    overrides = [*(overrides or ()), *([] if sample is None else [f"ingest.sample_pool={sample}"])]
    settings = load(CurateConfig, config, overrides)
    if rates_from is not None and not plan:
        raise ConfigError("--rates-from prices a plan: give it with --plan.")
    if plan:
        print_plan(settings, output=output, rates_from=rates_from, workers=workers, verbose=verbose)
        return
    command.require_apart(output, settings, config)
    paths.require_apart(output, (source.path for source in settings.ingest.sources), or_below=True)
    for stage in STAGES:
        command.require_apart(paths.join(output, stage), settings, config, is_stage=True)
    _require_config_kept(settings, config, output)
    page.read_concepts(settings.report)  # fails on a wrong path before the work begins
    if settings.demo_data is not None:
        dataset.run(Path(settings.demo_data))
    sources.require_sources(settings.ingest.sources)
    for model in (settings.embed.embedder, settings.describe.embedder):
        require_weights(model)
    manifests = [paths.join(output, stage, MANIFEST_NAME) for stage in STAGES]
    paths.require_writable(output, unless=() if replace else manifests)
    gpus_per_worker, gpu_settings = _gpus_per_worker(settings), command.settings_on_gpu(settings)
    with command.open_runner(runner, workers, gpus_per_worker=gpus_per_worker, gpu_settings=gpu_settings) as chosen:
        with sole_writer(output), open_log(output) as log:
            if not _is_finished(output):
                log.start()
            main_path.run(settings, output, chosen, replace=replace, log=log)
    page.print_summary(output)
    if log.started:
        status.print_times(output)


def _require_config_kept(settings: CurateConfig, config: str, output: str) -> None:
    """Raise ConfigError where the run would write other text over the file `config`."""
    saved = paths.join(output, page.CONFIG_NAME)
    try:
        paths.require_apart(saved, [config])
    except InputError:
        if paths.read_bytes(config).decode() != resolved_toml(settings):
            raise ConfigError(
                f"--config '{config}' is the file to which the run saves its resolved config; it would be overwritten. "
                "Copy it to another place, and give the copy."
            ) from None


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
