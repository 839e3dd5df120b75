"""The checks before a run begins: every problem that would stop a later stage, all in one message.

They come before Ray and before the first stage, so that no work is done in vain.
"""

import os
from collections.abc import Callable
from functools import partial

from curation.config import Settings, plan_values
from curation.engine import command
from curation.engine.device import require_device
from curation.engine.manifest import MANIFEST_NAME, require_same_config
from curation.errors import ConfigError, UserError
from curation.files import paths
from curation.models.embedders import require_weights
from curation.report import page
from curation.run_folder import STAGES
from pipelines.main_path import CurateConfig
from pipelines.planning.machine import free_disk
from pipelines.planning.plan import size_text, total_rows
from pipelines.planning.price import count_sources, price_run

# The section of a config for a stage, where it has another name.
SECTIONS = {"corpus": "pack"}
# The config of a stage without settings.
NOTHING = Settings()


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
    if not replace:
        _require_same_config(config, output)


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


def _require_same_config(config: CurateConfig, output: str) -> None:
    """Raise OutputMismatchError for the first finished stage in `output` with another config, as it would itself."""
    for stage in STAGES:
        section: Settings = getattr(config, SECTIONS.get(stage, stage), NOTHING)
        require_same_config(paths.join(output, stage), plan_values(section))


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
    is_known = not counts.unknown and all(count.is_exact and not count.damaged for count in counts.counted.values())
    if num_clusters is not None and is_known and num_clusters > num_images:
        problems.append(
            f"cluster.levels.0.num_clusters is {num_clusters:,}, but the pool holds {num_images:,} images. Leave it "
            "out, and it follows from the size of the pool."
        )
    if (free := free_disk(output)) is not None:
        rows = total_rows(config.model_copy(update={"stated_counts": dict(counts.of_source)}))
        needed = price_run(config, counts, rows).disk_bytes
        if needed > free:
            problems.append(
                f"the disk of '{output}' has {size_text(free)} free, and the run writes about {size_text(needed)}. "
                "Free some space, or give another --output."
            )
    if problems:
        raise ConfigError("\n".join(problems))
