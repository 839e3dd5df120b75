"""The features that the comparison of photographs needs of each image, computed once for all of its pairs.

    <output>/
      features-00000.npy  ...     photographs.FEATURES, a record for each row of the thumbnails
      manifest.json

About 33 kB an image; a step of `pairs`, deleted when pairs has finished.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from curation.copies.compare_photographs import PhotographComparer
from curation.copies.compare_thumbnails import VerificationConfig
from curation.copies.photographs import FEATURES
from curation.engine.manifest import Manifest, ShardRecord
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
from curation.engine.stage import Stage, run_stage
from curation.files import npy, parquet, paths, schemas
from curation.files.parquet import num_rows

# Images between two reports of progress. Assumed: described in less than a second.
IMAGES_PER_REPORT = 64


def run(
    config: VerificationConfig, files: Sequence[str], output: str, runner: Runner, *, content_hash: str, log: Log = None
) -> Manifest:
    """Compute the features of the thumbnails in `files`. `content_hash` stands for the files' content."""
    stage = Stage(
        name="features",
        config=config,
        inputs={"thumbnails": content_hash},
        output=output,
        shards=[Shard(f"{number:05d}", file, num_rows(file)) for number, file in enumerate(files)],
        make_worker=functools.partial(_make_worker, config, output),
    )
    return run_stage(stage, runner, log=log)


def names(output: str, files: Sequence[str]) -> list[str]:
    """The paths of the features of thumbnail `files`, in the output of `run`."""
    return [paths.join(output, f"features-{number:05d}.npy") for number in range(len(files))]


def _make_worker(config: VerificationConfig, output: str) -> Callable[[Shard], ShardRecord]:
    comparer = PhotographComparer(config.working_side)

    def process(shard: Shard) -> ShardRecord:
        thumbnails = parquet.read_table(shard.work, schemas.THUMBNAILS).column("thumbnail")
        features = np.zeros(len(thumbnails), FEATURES)
        for row, thumbnail in enumerate(thumbnails):
            features[row] = comparer.prepare(thumbnail.as_py()).features
            if (row + 1) % IMAGES_PER_REPORT == 0:
                report(IMAGES_PER_REPORT, total=len(thumbnails))
        file = npy.write_arrays(paths.join(output, f"features-{shard.name}.npy"), features)
        return ShardRecord(name=shard.name, files=(file,), totals={"images": len(thumbnails)})

    return process
