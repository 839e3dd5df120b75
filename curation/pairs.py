"""Pairs: which two images may be copies of one another, and how sure that is.

    pairs/
      pairs-00000.parquet  ...     records.PAIRS, every pair at or above `min_similarity`
      manifest.json

Two searches propose candidates: perceptual hashes within a Hamming distance, and the nearest copy descriptors above a
cosine. A candidate's similarity is the cosine of the descriptors, or, with `verification`, what a look at both
thumbnails gives. Images with equal bytes are one image here: they would fill every list of neighbours.

    python -m curation.pairs --config CONFIG.toml --images ingest/ --descriptors describe/ --output pairs/
"""

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer
from pydantic import Field

from curation import command, index, ingest, records, storage, vectors
from curation.config import Settings, load, resolved_toml
from curation.errors import ConfigError, InputError
from curation.hashing import pairs_within
from curation.runner import Runner, Shard
from curation.stage import run_shards
from curation.storage import Manifest, ShardRecord
from curation.verify import PairVerifier, VerifyConfig, View

# Prepared thumbnails that a worker keeps at hand, each up to 0.8 MB. Assumed: a shard of pairs, sorted by its first
# image, needs few more.
CACHED_VIEWS = 1500


class PairsConfig(Settings):
    """How candidates are found and judged."""

    num_neighbors: int = Field(default=64, ge=1)
    """Nearest descriptors that each image proposes (64 in DINOv2, appendix A.3)."""
    min_descriptor_similarity: float = Field(default=0.6, ge=-1, le=1)
    """Cosine of two descriptors above which they are candidates."""
    max_phash_distance: int = Field(default=4, ge=-1, le=16)
    """Differing bits of two 64-bit perceptual hashes up to which they are candidates; -1 leaves the hashes out."""
    verification: VerifyConfig | None = None
    """How a candidate is verified on its thumbnails; without it, the cosine of the descriptors is the similarity."""
    min_similarity: float = Field(default=0.4, ge=-1, le=1)
    """Pairs below are not written; the lowest threshold that a later stage may use."""
    pairs_per_shard: int = Field(default=2000, ge=1)
    """Candidates per shard of verification."""


@dataclass(frozen=True)
class CandidatePairs:
    """Candidates for one worker. Nodes are images; `first` and `second` index them, first < second."""

    image_ids: tuple[str, ...]
    thumbnails: tuple[tuple[str, int], ...]  # file and row of each node's thumbnail; empty without verification
    first: np.ndarray
    second: np.ndarray
    cosine: np.ndarray  # of the descriptors
    mutual: np.ndarray  # whether each is among the other's nearest


def run(
    config: PairsConfig, images: str, descriptors: str, output: str, runner: Runner, *, replace: bool = False
) -> Manifest:
    """Find and judge the pairs among all images of a finished ingest and describe; returns the manifest.

    Raises InputError when the descriptors are of other images, or lack thumbnails that verification needs.
    """
    ingested, described = storage.require_manifest(images), storage.require_manifest(descriptors)
    if config.verification and len(described.files("thumbnails")) != len(described.shards):
        raise ConfigError(
            f"'{descriptors}' holds no thumbnails, which verification needs. Set describe.thumbnail_side."
        )
    shards = _candidate_shards(config, images, descriptors, described)
    return run_shards(
        "pairs",
        config=config,
        inputs={"images": ingested.content_hash, "descriptors": described.content_hash},
        output=output,
        runner=runner,
        shards=shards,
        make_worker=functools.partial(make_worker, config, output),
        replace=replace,
        unit="pairs",
    )


def make_worker(config: PairsConfig, output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that judges the candidates of one shard after another."""
    judge = _Judge(config.verification) if config.verification else None

    def process(shard: Shard) -> ShardRecord:
        work: CandidatePairs = shard.work
        similarity, differs_locally = judge.compare(work) if judge else (work.cosine, np.zeros(len(work.first), bool))
        chosen = np.flatnonzero(similarity >= config.min_similarity)
        ids = np.array(work.image_ids, dtype=object)
        one, other = ids[work.first[chosen]], ids[work.second[chosen]]
        table = pa.table(
            {
                "image_id": np.minimum(one, other),
                "other_image_id": np.maximum(one, other),
                "similarity": similarity[chosen].astype(np.float32),
                "differs_locally": differs_locally[chosen],
                "cosine": work.cosine[chosen].astype(np.float32),
                "mutual": work.mutual[chosen],
            },
            schema=records.PAIRS,
        )
        file = storage.write_table(storage.join(output, f"pairs-{shard.name}.parquet"), table)
        return ShardRecord(
            name=shard.name, files=(file,), totals={"candidates": len(work.first), "pairs": table.num_rows}
        )

    return process


def read_pairs(folder: str) -> pa.Table:
    """All pairs of a finished stage, in shard order."""
    manifest = storage.require_manifest(folder)
    tables = [storage.read_table(storage.join(folder, name), records.PAIRS) for name in manifest.files("pairs")]
    return pa.concat_tables([records.PAIRS.empty_table(), *tables])


class _Judge:
    """Verifies pairs on thumbnails, keeping the views of the images seen last."""

    def __init__(self, config: VerifyConfig) -> None:
        self._verifier = PairVerifier(config)
        self._views: OrderedDict[tuple[str, int], View] = OrderedDict()
        self._table: tuple[str, pa.ChunkedArray] | None = None

    def compare(self, work: CandidatePairs) -> tuple[np.ndarray, np.ndarray]:
        """For each pair its similarity, (P,) float32, and whether it differs locally, (P,) bool."""
        similarity, differs_locally = np.empty(len(work.first), np.float32), np.empty(len(work.first), bool)
        for position, (first, second) in enumerate(zip(work.first, work.second, strict=True)):
            # By image_id, so that the result does not depend on which of the two was found first.
            a, b = sorted((int(first), int(second)), key=lambda node: work.image_ids[node])
            likeness = self._verifier.compare(self._view_of(work.thumbnails[a]), self._view_of(work.thumbnails[b]))
            similarity[position], differs_locally[position] = likeness
        return similarity, differs_locally

    def _view_of(self, place: tuple[str, int]) -> View:
        if place in self._views:
            self._views.move_to_end(place)
            return self._views[place]
        path, row = place
        if self._table is None or self._table[0] != path:
            self._table = (path, storage.read_table(path, records.THUMBNAILS).column("thumbnail"))
        view = self._verifier.describe(self._table[1][row].as_py())
        self._views[place] = view
        if len(self._views) > CACHED_VIEWS:
            self._views.popitem(last=False)
        return view


def _candidate_shards(config: PairsConfig, images: str, descriptors: str, described: Manifest) -> list[Shard]:
    """The candidates, sorted by their two images' places, cut into shards."""
    image_ids, places, matrix = _read_descriptors(descriptors, described)
    node_of = {image_id: node for node, image_id in enumerate(image_ids)}
    rows = ingest.read_images(images, ["image_id", "phash"])
    phash = np.zeros(len(image_ids), np.uint64)
    for image_id, value in zip(rows["image_id"].to_pylist(), rows["phash"].to_numpy(), strict=True):
        if image_id not in node_of:
            raise InputError(f"'{descriptors}' has no descriptor of image {image_id}, which is in '{images}'.")
        phash[node_of[image_id]] = value

    similarity, neighbor = index.search(matrix, [matrix], config.num_neighbors + 1)
    first, column = np.nonzero((neighbor >= 0) & (similarity > config.min_descriptor_similarity))
    second = neighbor[first, column]
    proposed = np.stack([first, second])[:, first != second]  # an image is its own nearest neighbour
    found = [proposed]
    if config.max_phash_distance >= 0:
        found += [np.stack([i, j]) for i, j, _ in pairs_within(phash, config.max_phash_distance)]
    pairs, place = np.unique(np.sort(np.concatenate(found, axis=1), axis=0), axis=1, return_inverse=True)
    mutual = np.bincount(place.reshape(-1)[: proposed.shape[1]], minlength=pairs.shape[1]) == 2
    cosine = index.pair_similarity(matrix, pairs[0], matrix, pairs[1])
    shards: list[Shard] = []
    for start in range(0, pairs.shape[1], config.pairs_per_shard):
        part = slice(start, start + config.pairs_per_shard)
        nodes, local = np.unique(pairs[:, part], return_inverse=True)
        local = local.reshape(2, -1)
        work = CandidatePairs(
            image_ids=tuple(image_ids[node] for node in nodes),
            thumbnails=tuple(places[node] for node in nodes) if config.verification else (),
            first=local[0],
            second=local[1],
            cosine=cosine[part],
            mutual=mutual[part],
        )
        shards.append(Shard(f"{len(shards):05d}", work, len(work.first)))
    return shards


def _read_descriptors(folder: str, manifest: Manifest) -> tuple[list[str], list[tuple[str, int]], np.ndarray]:
    """Ids, thumbnail places and vectors (N, D) float16 of all images, each id once, where it comes first."""
    places: dict[str, tuple[str, int]] = {}
    blocks: list[np.ndarray] = []
    thumbnails = manifest.files("thumbnails") or manifest.files("vectors")
    for name, thumbnail in zip(manifest.files("vectors"), thumbnails, strict=True):
        path = storage.join(folder, name)
        ids, matrix = vectors.read_file(path)
        fresh = [row for row, image_id in enumerate(ids) if image_id not in places]
        places.update({ids[row]: (storage.join(folder, thumbnail), row) for row in fresh})
        blocks.append(matrix[fresh])
    return list(places), list(places.values()), np.concatenate(blocks)


def command_line(
    config: command.ConfigOption,
    images: Annotated[str, typer.Option("--images", help="Folder of the finished ingest.")],
    descriptors: Annotated[str, typer.Option("--descriptors", help="Folder of the finished describe.")],
    output: command.OutputOption,
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Find the pairs of images that may be copies."""
    settings = load(PairsConfig, config, overrides or (), section="pairs")
    if plan:
        print(resolved_toml(settings), end="")
        return
    with command.open_runner(runner, workers) as chosen:
        run(settings, images, descriptors, output, chosen, replace=replace)


if __name__ == "__main__":
    from curation import pairs  # by its real name, or its classes would exist twice

    command.main(pairs.command_line)
