"""Times copy detection on many small pictures that resemble one another: tiles of textures, clip art, cut-outs.

The pictures have sides of 110 to 150 pixels (photographs.py --small), and come from ten Debian packages. Ingest, embed,
describe and pairs run with the profile `drawings`, as in the demo. Its floor of descriptor similarity makes nearly full
lists of candidates of such pictures.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from curation import embed, ingest, pairs
from curation.engine import command, progress, run_log
from curation.engine.manifest import require_manifest
from curation.files import paths
from curation.files.folder_lock import sole_writer
from curation.run_folder import RunFolder
from pipelines.bench import photographs
from pipelines.bench.copy_pictures import OTHERS
from pipelines.bench.photographs import CLIP_ART, OBJECTS, SCENERY, TEXTURES, Options, Source
from pipelines.bench.tables import make_table, number
from pipelines.demo import packages
from pipelines.own_images import make_config

NAME = "copies-speed"
# The time of `pairs` grows as the candidates do, so 50,000 pictures take hours; --size 50000 asks for them.
SIZES = (3_000, 12_000)
MORE_TEXTURES = "ufoai-textures"
SOURCES = photographs.SOURCES | {
    packages.DRAWINGS: Source(CLIP_ART, packages.IMAGES_IN_PACKAGE[packages.DRAWINGS], max_pixels=4_000_000),
    MORE_TEXTURES: OTHERS[MORE_TEXTURES],
}
MEGABYTES = photographs.MEGABYTES + 131 + 336
# Assumed: mostly textures, whose tiles resemble one another.
WEIGHTS = {TEXTURES: 6, CLIP_ART: 2, OBJECTS: 1, SCENERY: 1}
# Shortest side of a tile, in pixels: there are no 50,000 pictures of larger tiles.
MIN_TILE = 60
STEP = "pairs/join"


@dataclass(frozen=True)
class Row:
    """The measurements of one size."""

    num_images: int
    seconds: dict[str, float]
    """By stage; the time of the step STEP is part of that of `pairs`."""
    candidates: int
    num_cores: float
    """Of the stage `pairs`."""

    @property
    def rate(self) -> float:
        """Candidates verified a second and core."""
        return self.candidates / max(self.seconds["pairs"] - self.seconds[STEP], 1e-9) / self.num_cores


def bench(sizes: list[int], data: str, packages_folder: Path | None = None) -> list[Row]:
    """A row for each number of pool pictures, which are made in the folder `data` where they are missing."""
    rows = []
    for size in sizes:
        pictures = Path(data) / f"bench-{NAME}-{size}"
        if not (pictures / "pictures.parquet").exists():
            options = Options(size, small=True, min_tile_small=MIN_TILE, weights=WEIGHTS)
            photographs.run(pictures, options, packages_folder, sources=SOURCES, megabytes=MEGABYTES)
        progress.say(f"{NAME}: {size:,} pictures")
        with tempfile.TemporaryDirectory(dir=data) as run:
            rows.append(measure(pictures, run))
    return rows


def measure(pictures: Path, run: str, runner: command.RunnerName = "ray") -> Row:
    """The times of a new run in the folder `run`."""
    parts = {part: str(pictures / part) for part in ("seeds", "pool", "holdout")}
    config = make_config(seeds=parts["seeds"], pool=parts["pool"], holdout=parts["holdout"], profile="drawings")
    folder = RunFolder.of(run)
    with command.open_runner(runner) as chosen, sole_writer(run), run_log.open_log(run) as log:
        ingest.run(config.ingest, folder.ingest, chosen, log=log)
        embed.run(config.embed, folder, folder.embed, chosen, describe=config.describe, log=log)
        embed.run(config.describe, folder, folder.describe, chosen, name="describe", log=log)
        pairs.run(config.pairs, folder, folder.pairs, chosen, log=log)
    times = run_log.times(run)
    stages = ("ingest", "embed", "describe", "pairs", STEP)
    return Row(
        num_images=require_manifest(folder.ingest).totals["images"],
        seconds={stage: times[stage].seconds if stage in times else 0.0 for stage in stages},
        candidates=require_manifest(paths.join(run, "pairs")).totals["candidates"],
        num_cores=times["pairs"].capacity / times["pairs"].seconds,
    )


def table(rows: list[Row]) -> Table:
    """A row for each size."""
    stages = list(rows[0].seconds)
    columns = ("images", "candidates", "an image", *(f"{stage}, s" for stage in stages), "pairs/s a core")
    result = make_table(
        "Copy detection on small pictures, profile drawings",
        columns,
        caption=f"{STEP} is part of pairs. describe takes no time where the pass of embed makes it.",
    )
    for row in rows:
        cells = [f"{seconds:,.1f}" for seconds in row.seconds.values()]
        result.add_row(
            f"{row.num_images:,}",
            f"{row.candidates:,}",
            number(row.candidates / row.num_images, ".1f"),
            *cells,
            number(row.rate, ",.0f"),
        )
    return result
