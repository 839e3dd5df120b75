"""The command and the function that build a corpus; the main path is main_path.py.

seedbed curate --seeds lesions=data/lesions --pool data/crawl --output runs/mine
python -m pipelines.curate --config demo --output runs/demo

from pipelines import curate
run = curate.curate(seeds={"lesions": "data/lesions"}, pool="data/crawl", output="runs/mine")
run.images()  # a row for each image, with the decision on it
run.corpus()  # a row for each sample of the corpus
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from curation import run_folder
from curation.config import load, resolved_toml
from curation.engine import command
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.run_log import open_log
from curation.errors import ConfigError, InputError
from curation.files import paths
from curation.files.folder_lock import sole_writer
from curation.profiles import Profile
from curation.report import page
from curation.run_folder import STAGES
from pipelines import main_path, preflight, status
from pipelines.demo import dataset
from pipelines.main_path import CurateConfig
from pipelines.own_images import Sources, make_config
from pipelines.planning.plan import print_plan


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: str

    @property
    def report(self) -> str:
        """The path of the report."""
        return paths.join(self.folder, page.REPORT_NAME)

    def images(self) -> pa.Table:
        """A row for each unique image (docs/tables.md), in the order of ingest."""
        run_folder.require_run(self.folder)
        return run_folder.read_images_table(paths.join(self.folder, "images"))

    def corpus(self) -> pa.Table:
        """A row for each sample of the corpus (schemas.CORPUS), in the order of the tars."""
        run_folder.require_run(self.folder)
        return run_folder.read_corpus(paths.join(self.folder, "corpus"))


def curate(
    seeds: Sources,
    pool: Sources,
    *,
    output: str,
    holdout: Sources = (),
    model: str | None = None,
    weights: str | None = None,
    k: int = 4,
    profile: Profile = "photos",
    sample: float | None = None,
    overrides: Sequence[str] = (),
    runner: command.RunnerName = "ray",
    workers: int | None = None,
    replace: bool = False,
) -> Run:
    """Build a corpus from images of the user; a finished run is read, not made again.

    seeds, pool, holdout: a path, several paths, or paths by name; see own_images.py. sample: the share of the pool to
    read. overrides: `a.b=value`, as for --set. workers: number of Ray workers, by default one for each usable core.
    Raises UserError for wrong input.
    """
    overrides = [*overrides, *_sampling(sample)]
    config = make_config(
        seeds=seeds, pool=pool, holdout=holdout, model=model, weights=weights, k=k, profile=profile, overrides=overrides
    )
    return run(config, output, runner=runner, workers=workers, replace=replace)


def run(
    config: CurateConfig,
    output: str,
    *,
    runner: command.RunnerName = "ray",
    workers: int | None = None,
    replace: bool = False,
    config_path: str | None = None,
) -> Run:
    """Build the corpus of a config. config_path: the file of the config, which is not to be overwritten."""
    preflight.require_runnable(config, output, config_path=config_path, replace=replace)
    if config.demo_data is not None:
        dataset.run(Path(config.demo_data))
    gpus_per_worker, gpu_settings = _gpus_per_worker(config), command.settings_on_gpu(config)
    with command.open_runner(runner, workers, gpus_per_worker=gpus_per_worker, gpu_settings=gpu_settings) as chosen:
        with sole_writer(output), open_log(output) as log:
            if not _is_finished(output):
                log.start()
            main_path.run(config, output, chosen, replace=replace, log=log)
    if log.started:
        status.print_times(output)
    return Run(output)


def command_line(
    seeds: Annotated[
        list[str] | None,
        typer.Option("--seeds", metavar="NAME=PATH", help="Trusted images: a folder, tars or Parquet. Repeatable."),
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option("--pool", metavar="PATH", help="Images to choose from, stored in the same ways. Repeatable."),
    ] = None,
    holdout: Annotated[
        list[str] | None,
        typer.Option(
            "--holdout",
            metavar="PATH",
            help="Images whose copies must not enter the corpus: your test sets. Repeatable.",
        ),
    ] = None,
    config: command.OptionalConfigOption = None,
    output: command.OutputOption = "",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Model that compares content. Default: efficientnet_lite0."),
    ] = None,
    weights: Annotated[str | None, typer.Option("--weights", metavar="FILE", help="Checkpoint of --model.")] = None,
    k: Annotated[int, typer.Option("--k", metavar="N", min=1, help="Pool images that each seed retrieves.")] = 4,
    profile: Annotated[
        Profile, typer.Option("--profile", help="Recipe of the settings that no option gives.")
    ] = "photos",
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
    sample: Annotated[
        float | None,
        typer.Option("--sample", metavar="SHARE", help="Share of the pool to read, for a trial: 0.1."),
    ] = None,
    rates_from: Annotated[
        str | None, typer.Option("--rates-from", metavar="RUN", help="With --plan: a finished run whose times count.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --plan: print rates and config too.")] = False,
) -> None:
    """Build a corpus from trusted seeds and a large pool.

    It holds the seeds and the pool images that resemble them, without copies and without images of the holdout. Give
    the paths of your images, or a config.

    \b
    Examples:
      seedbed curate --seeds lesions=data/lesions --pool data/crawl \\
          --output runs/lesions
      seedbed curate --seeds data/cats data/dogs --pool crawl.tar \\
          --holdout data/test --output runs/pets
      seedbed curate --config mine.toml --output runs/mine --plan
      seedbed curate --config demo --output runs/demo

    Each stage of a run is done once: after a crash the same command goes on. With other options, --replace does again
    the stages that they change. The folder of the run then holds report.html, the corpus in corpus/, a row for each
    image in images/, and run.toml, the config with every value.
    """
    if rates_from is not None and not plan:
        raise ConfigError("--rates-from prices a plan: give it with --plan.")
    overrides = [*(overrides or ()), *_sampling(sample)]
    settings = _settings(
        seeds, pool, holdout, config, model=model, weights=weights, k=k, profile=profile, overrides=overrides
    )
    if plan:
        print_plan(settings, output=output, rates_from=rates_from, workers=workers, verbose=verbose)
        done = [stage for stage in STAGES if output and paths.exists(paths.join(output, stage, MANIFEST_NAME))]
        if done:
            print(f"'{output}' holds a run already: {len(done)} of {len(STAGES)} stages are done (seedbed status).")
        return
    if not output:
        raise ConfigError("--output is missing. Give the folder of the run, for example --output runs/mine.")
    if config is not None:
        _require_config_kept(settings, config, output)
    run(settings, output, runner=runner, workers=workers, replace=replace, config_path=config)
    page.print_summary(output)


def _settings(
    seeds: Sources | None,
    pool: Sources | None,
    holdout: Sources | None,
    config: str | None,
    *,
    model: str | None,
    weights: str | None,
    k: int,
    profile: Profile,
    overrides: Sequence[str],
) -> CurateConfig:
    """The config of the file, or of the paths that the options give."""
    if config is None:
        if not (seeds or pool or holdout):
            raise ConfigError(
                "Nothing to curate. Give --seeds NAME=PATH and --pool PATH, or a config: --config FILE. The demo is "
                "--config demo."
            )
        sources = {"seeds": seeds or (), "pool": pool or (), "holdout": holdout or ()}
        return make_config(**sources, model=model, weights=weights, k=k, profile=profile, overrides=overrides)
    options = {"seeds": seeds, "pool": pool, "holdout": holdout, "model": model, "weights": weights}
    both = [f"--{name}" for name, value in options.items() if value]
    both += [f"--{name}" for name, value, default in (("k", k, 4), ("profile", profile, "photos")) if value != default]
    if both:
        raise ConfigError(
            f"--config and {', '.join(both)} are both given. Change the setting in the config, or with --set."
        )
    return load(CurateConfig, config, overrides)


def _sampling(share: float | None) -> list[str]:
    """The setting of --sample."""
    if share is None:
        return []
    if not 0 < share <= 1:
        raise ConfigError(f"--sample is {share:g}. It is a share of the pool: above 0, and at most 1.")
    return [f"ingest.sample_pool={share}"]


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
    from pipelines import curate as this  # by its real name, or its classes would exist twice

    command.main(this.command_line)
