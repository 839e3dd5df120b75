"""The checks before a run begins: every problem that would stop a later stage, all in one message.

They come before Ray and before the first stage, so that no work is done in vain.
"""

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial

from curation.engine import command
from curation.engine.device import require_device
from curation.engine.manifest import MANIFEST_NAME
from curation.errors import ConfigError, UserError
from curation.files import paths
from curation.images import sources
from curation.models.embedders import require_weights
from curation.report import page
from curation.run_folder import STAGES
from pipelines.main_path import CurateConfig
from pipelines.planning.plan import total_rows
from pipelines.planning.price import count_images, price_run


def require_runnable(config: CurateConfig, output: str, *, config_path: str | None, replace: bool) -> None:
    """Raise ConfigError with a line for each problem of paths, weights, devices, disk and cluster counts.

    The sources of the demo are not checked: the run makes them. Nor are sources of a finished ingest.
    """
    manifests = {stage: paths.join(output, stage, MANIFEST_NAME) for stage in STAGES}
    checks: list[Callable[[], object]] = [
        partial(_require_apart, config, output, config_path),
        partial(paths.require_writable, output, unless=() if replace else tuple(manifests.values())),
        partial(page.read_concepts, config.report),
        partial(require_weights, config.embed.embedder),
        partial(require_weights, config.describe.embedder),
        partial(_require_devices, config),
    ]
    if config.demo_data is None and (replace or not _exists(manifests["ingest"])):
        checks += [partial(sources.require_sources, config.ingest.sources), partial(_require_room, config, output)]
    problems: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        lines = list(problems)
        raise ConfigError(
            lines[0]
            if len(lines) == 1
            else f"{len(lines)} problems before the run begins:\n" + "\n".join(f"  {line}" for line in lines)
        )


def _exists(path: str) -> bool:
    """Whether there is a file; an output that cannot be read is reported by `require_writable`."""
    try:
        return paths.exists(path)
    except Exception:  # each driver of fsspec has errors of its own
        return False


def _require_apart(config: CurateConfig, output: str, config_path: str | None) -> None:
    inputs = [] if config_path is None else [config_path]
    command.require_apart(output, config, *inputs)
    paths.require_apart(output, (source.path for source in config.ingest.sources), or_below=True)
    for stage in STAGES:
        command.require_apart(paths.join(output, stage), config, *inputs, is_stage=True)


def _require_devices(config: CurateConfig) -> None:
    """On a cluster, the machines of the workers have the devices, and Ray checks them."""
    names = command.settings_on_gpu(config)
    if names and "RAY_ADDRESS" not in os.environ:
        require_device("cuda", ", ".join(names))


def _require_room(config: CurateConfig, output: str) -> None:
    """Raise ConfigError for more clusters than images in the pool, and for a disk that is too small.

    Images in tars and Parquet files are not counted here.
    """
    local = [source for source in config.ingest.sources if paths.is_local(source.path) and paths.exists(source.path)]
    if len(local) < len(config.ingest.sources):
        return
    problems, num_files = [], 0
    for source in local:
        try:
            listed = sources.list_source(source)
        except UserError as error:
            problems.append(str(error))
            continue
        if source.role == "pool":
            num_files += len(listed.files) if source.layout == "folder" else sys.maxsize
    if problems:
        raise ConfigError("\n".join(problems))
    num_clusters = config.cluster.levels[0].num_clusters
    if num_clusters is not None and num_clusters > num_files:
        problems.append(
            f"cluster.levels.0.num_clusters is {num_clusters:,}, but the pool holds {num_files:,} files. Leave it out, "
            "and it follows from the size of the pool."
        )
    if paths.is_local(output):
        counts, _ = count_images(config)
        price = price_run(config, total_rows(config.model_copy(update={"stated_counts": counts})))
        needed = sum(stage.writes for stage in price.stages)
        free = shutil.disk_usage(paths.filesystem(output)[1]).free
        if needed > free:
            problems.append(
                f"the disk of '{output}' has {free / 1e9:,.1f} GB free, and the run writes about {needed / 1e9:,.1f} "
                "GB. Free some space, or give another --output."
            )
    if problems:
        raise ConfigError("\n".join(problems))
