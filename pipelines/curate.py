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
from typing import Any

from pydantic import Field, model_validator

from curation import cluster, dedup, embed, ingest, pack, pairs, profiles, retrieve
from curation.cluster import ClusterConfig
from curation.config import Settings, load, resolved_toml
from curation.dedup import DedupConfig
from curation.embed import EmbedConfig
from curation.engine import command, run_log
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.runner import Runner
from curation.files import paths
from curation.files.folder_lock import sole_writer
from curation.ingest import IngestConfig
from curation.pack import PackConfig
from curation.pairs import PairsConfig
from curation.profiles import Profile
from curation.report import page
from curation.report.facts import STAGES
from curation.report.page import ReportConfig
from curation.retrieve import RetrieveConfig
from pipelines import demo_data, status
from pipelines.demo_data import DemoDataConfig
from pipelines.plan import print_plan
from pipelines.price import RatesConfig


class CurateConfig(Settings):
    """A whole run, one section a stage."""

    profile: Profile = "default"
    """The recipe that fills in what the sections leave out; profiles.py lists what each sets."""
    demo_data: str | None = None
    """Folder of the demo's images, fetched when it is missing; leave it out for images of your own."""
    ingest: IngestConfig
    """What to read."""
    embed: EmbedConfig
    """How images are compared for retrieval."""
    describe: EmbedConfig
    """How images are compared for copies."""
    pairs: PairsConfig = PairsConfig()
    """How candidate copies are found and judged."""
    dedup: DedupConfig = DedupConfig()
    """Where a pair becomes a copy."""
    cluster: ClusterConfig
    """How the kept pool is clustered."""
    retrieve: RetrieveConfig
    """What each seed dataset brings."""
    pack: PackConfig = PackConfig()
    """How the corpus is written."""
    report: ReportConfig = ReportConfig()
    """What the report shows."""
    stated_counts: dict[str, int] = Field(default_factory=dict)
    """For --plan: images per source, where the images themselves are not at hand."""
    stated_clusters: dict[str, int] = Field(default_factory=dict)
    """For --plan: clusters with enough seeds, per dataset."""
    rates: RatesConfig = RatesConfig()
    """For --plan: what machines do in a second."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_profile(cls, values: Any) -> Any:
        # Behind this, pydantic no longer knows that the values came from JSON, whose lists may be tuples.
        return _with_tuples(profiles.fill(values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _sections_agree(self) -> "CurateConfig":
        roles = {source.name: source.role for source in self.ingest.sources}
        for dataset in self.retrieve.datasets:
            if roles.get(dataset.name) != "seed":
                raise ValueError(f"retrieve.datasets names '{dataset.name}', which is no source with role 'seed'")
        if not self.retrieve.datasets and self.retrieve.clustering is None:
            raise ValueError("retrieve names no dataset and has no section clustering, so nothing would be packed")
        if strangers := sorted(self.stated_clusters.keys() - {dataset.name for dataset in self.retrieve.datasets}):
            raise ValueError(f"stated_clusters names '{strangers[0]}', which is no dataset of retrieve")
        if "pool" not in roles.values():
            raise ValueError("ingest.sources has no source with role 'pool', so there is nothing to retrieve from")
        if self.pairs.verification is None and self.dedup.holdout_threshold < self.pairs.min_descriptor_similarity:
            raise ValueError(
                f"dedup.holdout_threshold ({self.dedup.holdout_threshold:g}) lies below "
                f"pairs.min_descriptor_similarity ({self.pairs.min_descriptor_similarity:g}), the least looked at"
            )
        if (cosine := self.dedup.holdout_cosine) is not None:
            if cosine < self.pairs.min_descriptor_similarity:
                raise ValueError(
                    f"dedup.holdout_cosine ({cosine:g}) lies below pairs.min_descriptor_similarity "
                    f"({self.pairs.min_descriptor_similarity:g}), the least looked at"
                )
            if self.pairs.verification and (self.pairs.min_cosine is None or cosine < self.pairs.min_cosine):
                raise ValueError(
                    f"dedup.holdout_cosine is {cosine:g}, but pairs that verification finds unlike are only written "
                    f"from pairs.min_cosine ({self.pairs.min_cosine}); set that to {cosine:g}"
                )
        if self.dedup.holdout_threshold < self.pairs.min_similarity:
            raise ValueError(
                f"dedup.holdout_threshold ({self.dedup.holdout_threshold:g}) lies below pairs.min_similarity "
                f"({self.pairs.min_similarity:g}), the lowest similarity that is written"
            )
        return self


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
        demo_data.run(DemoDataConfig(), Path(settings.demo_data))
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


def _with_tuples(value: Any) -> Any:
    """`value` with every list as a tuple."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _write_config(config: CurateConfig, output: str) -> None:
    """Save the resolved config, unless this very text is there already."""
    path, text = paths.join(output, "run.toml"), resolved_toml(config).encode()
    if not paths.exists(path) or paths.read_bytes(path) != text:
        paths.write_bytes(path, text)


if __name__ == "__main__":
    from pipelines import curate  # by its real name, or its classes would exist twice

    command.main(curate.command_line)
