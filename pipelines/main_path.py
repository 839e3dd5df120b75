"""THE MAIN PATH: from seed datasets and an uncurated pool to a corpus, one stage after another.

    runs/demo/
      run.toml       the resolved config
      ingest/        a reference to each image, or the reason for its rejection   curation/ingest.py
      embed/         a vector of each image, which compares content               curation/embed.py
      describe/      a descriptor of each image, which detects copies             curation/embed.py
      pairs/         pairs of images that may be copies                           curation/pairs.py
      self_check/    scores of edited copies of some pool images              curation/report/self_check.py
      dedup/         the decision for each image: kept, copy, or like a holdout   curation/dedup.py
      cluster/       clusters of the kept pool images                             curation/cluster.py
      retrieve/      the pool images that resemble the seeds                      curation/retrieve.py
      corpus/        the tars of the corpus, and its composition                  curation/pack.py
      images/        one row for each unique image, with the results of all       curation/report/images_table.py
      report.html    the results of all stages in pictures and tables             curation/report/page.py
      lookalikes.html  only of a run that dedup stopped, because images look alike  curation/report/lookalikes_page.py
      log/           a line for each finished shard, with times                   curation/engine/run_log.py

`run` is the whole path. The config follows it: a section for each stage, and the rules between sections. A finished
stage is not done again. A stage whose config or inputs have changed is refused. With --replace it is redone, and after
it only the stages whose inputs have changed.
"""

import functools
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from curation import cluster, dedup, embed, ingest, pack, pairs, profiles, retrieve
from curation.cluster import ClusterConfig
from curation.config import IsPath, Settings, nearest, write_resolved
from curation.copies.holdout_pairs import SURE_MATCH
from curation.dedup import DedupConfig
from curation.embed import EmbedConfig
from curation.engine import progress
from curation.engine.run_log import Log
from curation.engine.runner import Runner
from curation.files import paths
from curation.ingest import IngestConfig
from curation.pack import PackConfig
from curation.pairs import PairsConfig
from curation.profiles import Profile
from curation.report import images_table, lookalikes_page, page, self_check
from curation.report.page import CONFIG_NAME, ReportConfig
from curation.report.self_check import SelfCheckConfig
from curation.retrieve import RetrieveConfig
from curation.run_folder import STAGES, RunFolder
from pipelines.planning.rates import RatesConfig


@progress.run_of(STAGES)
def run(config: "CurateConfig", output: str, runner: Runner, *, replace: bool = False, log: Log = None) -> None:
    """Run every unfinished stage in order, and write the report."""
    folder = RunFolder.of(output)
    saved_config = paths.join(output, CONFIG_NAME)
    paths.delete_temporary(output)  # a kill while the config or the report was written
    if not paths.exists(saved_config):
        write_resolved(config, saved_config)
    ingest.run(config.ingest, folder.ingest, runner, replace=replace, log=log)
    embed.run(config.embed, folder, folder.embed, runner, describe=config.describe, replace=replace, log=log)
    embed.run(config.describe, folder, folder.describe, runner, name="describe", replace=replace, log=log)
    pairs.run(config.pairs, folder, folder.pairs, runner, replace=replace, log=log)
    self_check.run(
        config.self_check,
        folder,
        folder.self_check,
        runner,
        describe=config.describe,
        pairs=config.pairs,
        replace=replace,
        log=log,
    )
    show_pairs = functools.partial(lookalikes_page.write, folder, output, config.dedup.threshold)
    dedup.run(config.dedup, folder, folder.dedup, replace=replace, log=log, show_pairs=show_pairs)
    lookalikes_page.remove(output)
    cluster.run(config.cluster, folder, folder.cluster, runner, replace=replace, log=log)
    retrieve.run(config.retrieve, folder, folder.retrieve, runner, replace=replace, log=log)
    pack.run(config.pack, folder, folder.corpus, runner, replace=replace, log=log)
    images_table.run(folder, folder.images, runner, replace=replace, log=log)
    write_resolved(config, saved_config)  # last: a config that a stage refuses must not replace the saved one
    page.run(config.report, output)


class CurateConfig(Settings):
    """The config of a whole run, with one section per stage."""

    profile: Profile = profiles.DEFAULT
    """The recipe that sets the defaults of the sections; profiles.py lists the settings of each recipe."""
    demo_data: Annotated[str | None, IsPath] = None
    """Folder of the demo's images, which is filled when it is missing; leave it out for other images."""
    ingest: IngestConfig
    """The images to read."""
    embed: EmbedConfig
    """The vectors that compare content."""
    describe: EmbedConfig
    """The descriptors for copy detection."""
    pairs: PairsConfig = PairsConfig()
    """The pairs of images that may be copies, and their similarity."""
    self_check: SelfCheckConfig = SelfCheckConfig()
    """The measurement of copy detection on edited copies of the pool's own images, for the report."""
    dedup: DedupConfig = DedupConfig()
    """The decision which images are copies, and which copy is kept."""
    cluster: ClusterConfig = ClusterConfig()
    """The clusters of the kept pool."""
    retrieve: RetrieveConfig = RetrieveConfig()
    """The pool images that each seed dataset retrieves."""
    pack: PackConfig = PackConfig()
    """The tars of the corpus and the weights of its samples."""
    report: ReportConfig = ReportConfig()
    """The content of the report."""
    stated_counts: dict[str, int] = Field(default_factory=dict)
    """For --plan: images per source; needed where the images are not on this machine."""
    stated_clusters: dict[str, int] = Field(default_factory=dict)
    """For --plan: clusters with enough seeds, per dataset."""
    rates: RatesConfig = RatesConfig()
    """For --plan: the size and speed of the machines."""

    @field_validator("profile", mode="before")
    @classmethod
    def _is_no_former_name(cls, value: Any) -> Any:
        if isinstance(value, str) and value in profiles.FORMER:
            raise ValueError(profiles.FORMER[value])
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_from_profile(cls, values: Any) -> Any:
        # Pydantic treats the returned values as Python objects, no longer as JSON, so it accepts no list as a tuple.
        return _with_tuples(profiles.fill(values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _sections_agree(self) -> "CurateConfig":
        roles = {source.name: source.role for source in self.ingest.sources}
        seeds = [name for name, role in roles.items() if role == "seed"]
        datasets = [dataset.name for dataset in self.retrieve.datasets]
        pairs, dedup = self.pairs, self.dedup
        problems = [
            f"retrieve.datasets names '{name}', which is no source with role 'seed'{nearest(name, seeds)}"
            for name in datasets
            if name not in seeds
        ]
        if not datasets and self.retrieve.clustering is None:
            problems.append("retrieve names no dataset and has no section clustering, so nothing would be packed")
        problems += [
            f"stated_clusters names '{name}', which is no dataset of retrieve{nearest(name, datasets)}"
            for name in sorted(self.stated_clusters.keys() - set(datasets))
        ]
        if "pool" not in roles.values():
            problems.append("ingest.sources has no source with role 'pool', so there is nothing to retrieve from")
        if pairs.verification is None and dedup.holdout_threshold < pairs.min_descriptor_similarity:
            problems.append(
                f"dedup.holdout_threshold ({dedup.holdout_threshold:g}) lies below pairs.min_descriptor_similarity "
                f"({pairs.min_descriptor_similarity:g}), the minimum cosine of candidates"
            )
        if (cosine := dedup.holdout_cosine) is not None:
            if cosine < pairs.min_descriptor_similarity:
                problems.append(
                    f"dedup.holdout_cosine ({cosine:g}) lies below pairs.min_descriptor_similarity "
                    f"({pairs.min_descriptor_similarity:g}), the minimum cosine of candidates"
                )
            if pairs.verification and (pairs.min_cosine is None or cosine < pairs.min_cosine):
                problems.append(
                    f"dedup.holdout_cosine is {cosine:g}, but pairs that fail verification are written only from "
                    f"pairs.min_cosine ({pairs.min_cosine}); set that to {cosine:g}"
                )
        if dedup.holdout_threshold < pairs.min_similarity:
            problems.append(
                f"dedup.holdout_threshold ({dedup.holdout_threshold:g}) lies below pairs.min_similarity "
                f"({pairs.min_similarity:g}), the minimum similarity of the pairs that are written"
            )
        if pairs.verification and not self.describe.thumbnail_side:
            problems.append(
                "describe.thumbnail_side is 0, but pairs.verification compares thumbnails; set a side such as "
                f"{pairs.verification.working_side}"
            )
        if pairs.verification and dedup.holdout_threshold > SURE_MATCH:
            problems.append(
                f"dedup.holdout_threshold ({dedup.holdout_threshold:g}) lies above {SURE_MATCH:g}, the similarity at "
                "which verified images are compared with no further holdout images"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _with_tuples(value: Any) -> Any:
    """`value` with every list as a tuple."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
