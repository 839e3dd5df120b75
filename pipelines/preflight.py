"""The checks before a run begins: every problem that would stop a later stage, all in one message.

They come before Ray and before the first stage, so that no work is done in vain.
"""

import os
import shutil
from collections.abc import Callable
from functools import partial

from curation.engine import command
from curation.engine.device import require_device
from curation.engine.manifest import MANIFEST_NAME
from curation.errors import ConfigError, UserError
from curation.files import paths
from curation.models.embedders import require_weights
from curation.report import page
from curation.run_folder import STAGES
from pipelines.main_path import CurateConfig
from pipelines.planning.plan import total_rows
from pipelines.planning.price import count_sources, price_run


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
        checks.append(partial(_require_room, config, output))
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
    """Raise UserError for sources that cannot be counted, more clusters than images, and a disk that is too small.

    A source that is not on this machine counts only where `stated_counts` names it.
    """
    counts = count_sources(config)
    problems = []
    num_clusters = config.cluster.levels[0].num_clusters
    num_images = round(counts.of_role(config, "pool") * config.ingest.sample_pool)
    is_known = all(count.is_exact for count in counts.counted.values()) and not counts.unknown
    if num_clusters is not None and is_known and num_clusters > num_images:
        problems.append(
            f"cluster.levels.0.num_clusters is {num_clusters:,}, but the pool holds {num_images:,} images. Leave it "
            "out, and it follows from the size of the pool."
        )
    if paths.is_local(output):
        rows = total_rows(config.model_copy(update={"stated_counts": dict(counts.of_source)}))
        needed = price_run(config, counts, rows).written_bytes
        free = shutil.disk_usage(paths.filesystem(output)[1]).free
        if needed > free:
            problems.append(
                f"the disk of '{output}' has {free / 1e9:,.1f} GB free, and the run writes about {needed / 1e9:,.1f} "
                "GB. Free some space, or give another --output."
            )
    if problems:
        raise ConfigError("\n".join(problems))
