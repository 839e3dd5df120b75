"""Deduplicate: which images are copies, which one of each component is kept, and what the holdout takes away.

    dedup/
      duplicates-00000.parquet  ...     records.DUPLICATES: one row for each row of ingest's images, in its order
      manifest.json                     its facts hold the funnel and the largest components

Images with equal bytes are one image that occurs several times. Pairs at or above `threshold` join two images into one
component. Of its images are kept: every seed, since seeds are trusted as they are; where there is none, the one with
the most pixels, then the most bytes, then the smallest image_id. With `matches_kept`, going through them in this order,
also every image that is no copy of one kept before.

Before that, the holdout takes away what matches it. `direct`: the images with a pair at or above `holdout_threshold`
with a holdout image. `component` (DINOv2, appendix A.3): the whole components, joined at `holdout_threshold`, that hold
one. A dropped row has one reason, the first that holds: 'holdout' (the bytes of a holdout image), 'exact', 'holdout'
(a match), 'near'.

    python -m curation.dedup --config CONFIG.toml --images ingest/ --pairs pairs/ --output dedup/
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from pydantic import Field, model_validator

from curation import command, ingest, records, storage, vectors
from curation.config import Settings, load, resolved_toml
from curation.errors import ConfigError, InputError
from curation.graph import component_sizes, connected_components, family_edges
from curation.pairs import read_pairs
from curation.runner import Runner, Shard
from curation.stage import run_shards
from curation.storage import Manifest, ShardRecord

# How many of the largest components the manifest names; the report shows them.
LARGEST_COMPONENTS = 20


class FamilyConfig(Settings):
    """When a pair is of a family, such as road signs with other symbols, and not of copies; see graph.family_edges."""

    sure: float = Field(default=0.9, ge=0, le=1)
    """Similarity from which a pair that does not differ in one place is of copies whatever else there is."""
    margin: float = Field(default=0.1, ge=0, le=1)
    """How much less similar a third image may be and still be a rival."""
    local_margin: float = Field(default=0.05, ge=0, le=1)
    """The same for pairs that differ in one place."""


class DedupConfig(Settings):
    """Where a pair becomes a copy."""

    threshold: float = Field(default=0.6, ge=-1, le=1)
    """Similarity at which two images are copies (0.6 in DINOv2, with SSCD descriptors)."""
    holdout_threshold: float = Field(default=0.45, ge=-1, le=1)
    """Similarity at which an image matches a holdout image (0.45 in DINOv2)."""
    matches_kept: bool = False
    """Whether an image goes only when it is itself a copy of one that stays. In a chain of small steps the ends may
    have little in common; this keeps an image every other step, where else one of the whole component is kept."""
    families: FamilyConfig | None = None
    """How images are told from copies that only belong to one family; for verified pairs."""
    decontamination: Literal["direct", "component"] = "direct"
    """Whether the holdout takes away what matches it, or whole components that hold one of its images."""
    decontaminate_seeds: bool = True
    """Whether seeds that match the holdout go too. DINOv2 took evaluation sets' training splits both as seeds and as
    holdout, so its recipe needs false."""

    @model_validator(mode="after")
    def _holdout_is_no_laxer(self) -> "DedupConfig":
        if self.holdout_threshold > self.threshold:
            raise ValueError("holdout_threshold must not lie above threshold, or copies of the holdout could stay")
        return self


@dataclass(frozen=True)
class Decision:
    """What happens to each unique image: arrays over the N nodes."""

    component: np.ndarray  # (N,) int64: the node of the component's smallest image_id
    reason: np.ndarray  # (N,) object: None, 'near' or 'holdout'
    matched: np.ndarray  # (N,) int64: the node for which this one was dropped; -1 when kept
    similarity: np.ndarray  # (N,) float32: of that match; NaN when the two are joined by other images only


@dataclass(frozen=True)
class Nodes:
    """The unique images, sorted by image_id."""

    image_ids: np.ndarray  # (N,) object
    is_seed: np.ndarray  # (N,) bool: a seed in at least one source
    is_holdout: np.ndarray
    pixels: np.ndarray  # (N,) int64
    length: np.ndarray  # (N,) int64, bytes


def run(
    config: DedupConfig,
    images: str,
    pairs: str,
    output: str,
    runner: Runner,
    *,
    min_similarity: float = -1.0,
    replace: bool = False,
) -> Manifest:
    """Decide for every row of the finished ingest in `images`; returns the manifest.

    `min_similarity` is the one that the pairs were written with; a threshold below it is a ConfigError.
    """
    ingested, paired = storage.require_manifest(images), storage.require_manifest(pairs)
    written = paired.plan.config.get("min_similarity", min_similarity)
    if config.holdout_threshold < written:
        raise ConfigError(
            f"dedup.holdout_threshold is {config.holdout_threshold:g}, but pairs below {written:g} were not written. "
            "Lower pairs.min_similarity, or raise the threshold."
        )
    table = ingest.read_images(images, ["image_id", "role", "width", "height", "length"])
    nodes = _nodes(table)
    edges = _edges(read_pairs(pairs), nodes)
    decision = decide(config, nodes, *edges)
    shards, start = [], 0
    occurrence = _first_occurrences(table)
    for record, name in zip(ingested.shards, ingested.files("images"), strict=True):
        stop = start + record.totals["accepted"]
        part = table.slice(start, stop - start)
        rows = (_rows(part, occurrence[start:stop], nodes, decision), pc.equal(part["role"], "holdout"))
        shards.append(Shard(name.removeprefix("images-").removesuffix(".parquet"), rows, stop - start))
        start = stop
    return run_shards(
        "dedup",
        config=config,
        inputs={"images": ingested.content_hash, "pairs": paired.content_hash},
        output=output,
        runner=runner,
        shards=shards,
        make_worker=functools.partial(make_worker, output),
        replace=replace,
        finish=functools.partial(_finish, nodes, decision),
    )


def make_worker(output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that writes the decided rows of one shard after another."""

    def process(shard: Shard) -> ShardRecord:
        rows, is_holdout = shard.work
        file = storage.write_table(storage.join(output, f"duplicates-{shard.name}.parquet"), rows)
        candidates = rows.filter(pc.invert(is_holdout)).column("reason").to_pylist()
        totals = storage.sum_counts({reason or "kept": 1} for reason in candidates)
        totals["holdout_rows"] = rows.num_rows - len(candidates)
        return ShardRecord(name=shard.name, files=(file,), totals={"rows": rows.num_rows, **totals})

    return process


def decide(
    config: DedupConfig,
    nodes: Nodes,
    first: np.ndarray,
    second: np.ndarray,
    similarity: np.ndarray,
    differs_locally: np.ndarray | None = None,
) -> Decision:
    """Which images are dropped, given edges (E,) between nodes with their similarities (E,).

    `differs_locally` (E,) bool is needed where `families` is set.
    """
    num_nodes = len(nodes.image_ids)
    copies = similarity >= config.threshold
    if config.families is not None:
        assert differs_locally is not None
        copies &= ~family_edges(first, second, similarity, differs_locally, **config.families.model_dump())
    component = connected_components(num_nodes, first[copies], second[copies])
    reason = np.full(num_nodes, None, dtype=object)
    matched = np.full(num_nodes, -1, np.int64)
    score = np.full(num_nodes, np.nan, np.float32)

    # The holdout first. A match is the most similar holdout image, ties going to the smallest image_id.
    exempt = nodes.is_seed & (not config.decontaminate_seeds)
    own = nodes.is_holdout & ~exempt
    reason[own], matched[own], score[own] = "holdout", np.flatnonzero(own), 1.0
    near_holdout = similarity >= config.holdout_threshold
    candidates = ~nodes.is_holdout & ~exempt
    _match(nodes.is_holdout, candidates, first, second, similarity, near_holdout, reason, matched, score)
    if config.decontamination == "component":
        wide = connected_components(num_nodes, first[near_holdout], second[near_holdout])
        holdout_of = {int(wide[node]): int(node) for node in np.flatnonzero(nodes.is_holdout)[::-1]}
        for node in np.flatnonzero(candidates & (matched < 0)):
            if (holdout := holdout_of.get(int(wide[node]))) is not None:
                reason[node], matched[node] = "holdout", holdout

    # Then one per component. Sorted so that the first of each component is the one to keep.
    open_nodes = np.flatnonzero(matched < 0)
    order = open_nodes[
        np.lexsort(
            (
                open_nodes,
                -nodes.length[open_nodes],
                -nodes.pixels[open_nodes],
                ~nodes.is_seed[open_nodes],
                component[open_nodes],
            )
        )
    ]
    copies_of: dict[int, dict[int, float]] = {}
    for one, other, value in zip(*(column[copies].tolist() for column in (first, second, similarity)), strict=True):
        copies_of.setdefault(one, {})[other] = value
        copies_of.setdefault(other, {})[one] = value
    kept_of: dict[int, list[int]] = {}
    for node in order.tolist():
        kept = kept_of.setdefault(int(component[node]), [])
        partners = copies_of.get(node, {})
        if config.matches_kept:
            keepers = sorted((other for other in kept if other in partners), key=partners.__getitem__, reverse=True)
        else:
            keepers = kept
        if not keepers or nodes.is_seed[node]:
            kept.append(node)
        else:
            reason[node], matched[node], score[node] = "near", keepers[0], partners.get(keepers[0], np.nan)
    return Decision(component, reason, matched, score)


def _match(
    targets: np.ndarray,
    candidates: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    similarity: np.ndarray,
    allowed: np.ndarray,
    reason: np.ndarray,
    matched: np.ndarray,
    score: np.ndarray,
) -> None:
    """Mark the `candidates` that have an `allowed` edge to one of `targets`, in place."""
    one, other = np.concatenate([first, second]), np.concatenate([second, first])
    value, usable = np.tile(similarity, 2), np.tile(allowed, 2) & candidates[one] & targets[other]
    one, other, value = one[usable], other[usable], value[usable]
    order = np.lexsort((other, -value, one))
    nodes, position = np.unique(one[order], return_index=True)
    best = order[position]
    reason[nodes], matched[nodes], score[nodes] = "holdout", other[best], value[best]


def _nodes(table: pa.Table) -> Nodes:
    ids = table.column("image_id").combine_chunks().to_numpy(zero_copy_only=False)
    unique, first, inverse = np.unique(ids.astype(str), return_index=True, return_inverse=True)
    roles = table.column("role").combine_chunks().to_numpy(zero_copy_only=False)

    def any_row(role: str) -> np.ndarray:
        return np.bincount(inverse[roles == role], minlength=len(unique)) > 0

    columns = {name: table.column(name).to_numpy().astype(np.int64)[first] for name in ("width", "height", "length")}
    return Nodes(
        image_ids=unique,
        is_seed=any_row("seed"),
        is_holdout=any_row("holdout"),
        pixels=columns["width"] * columns["height"],
        length=columns["length"],
    )


def _edges(pairs: pa.Table, nodes: Nodes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Node indices (E,), (E,), similarities (E,) and differs_locally (E,) of the pairs.

    Raises InputError for a pair of other images.
    """
    ends = []
    for name in ("image_id", "other_image_id"):
        ids = pairs.column(name).to_numpy().astype(str)
        place = np.minimum(np.searchsorted(nodes.image_ids, ids), len(nodes.image_ids) - 1)
        unknown = ids[nodes.image_ids[place] != ids]
        if len(unknown):
            raise InputError(f"The pairs name image {unknown[0]}, which the ingest does not hold: not of one run.")
        ends.append(place)
    differs_locally = pairs.column("differs_locally").combine_chunks().to_numpy(zero_copy_only=False)
    return ends[0], ends[1], pairs.column("similarity").to_numpy(), differs_locally


def _first_occurrences(table: pa.Table) -> np.ndarray:
    """Whether each row is the one that stands for its image_id: a seed's before the holdout's before the pool's."""
    ids = table.column("image_id").to_numpy(zero_copy_only=False).astype(str)
    rank = {role: number for number, role in enumerate(("seed", "holdout", "pool"))}
    priority = np.array([rank[role] for role in table.column("role").to_pylist()])
    order = np.lexsort((np.arange(len(ids)), priority, ids))
    result = np.zeros(len(ids), bool)
    result[order[np.unique(ids[order], return_index=True)[1]]] = True
    return result


def _rows(table: pa.Table, stands: np.ndarray, nodes: Nodes, decision: Decision) -> pa.Table:
    ids = table.column("image_id").to_numpy(zero_copy_only=False).astype(str)
    node = np.searchsorted(nodes.image_ids, ids)
    reason, matched, score = (
        decision.reason[node].copy(),
        decision.matched[node].copy(),
        decision.similarity[node].copy(),
    )
    copy = ~stands
    reason[copy] = np.where(nodes.is_holdout[node[copy]], "holdout", "exact")
    matched[copy], score[copy] = node[copy], 1.0
    kept = matched < 0
    return pa.table(
        {
            "image_id": ids.tolist(),
            "component_id": nodes.image_ids[decision.component[node]].tolist(),
            "kept": kept.tolist(),
            "reason": reason.tolist(),
            "matched_image_id": [None if k else str(nodes.image_ids[m]) for k, m in zip(kept, matched, strict=True)],
            "similarity": [None if np.isnan(s) else float(s) for s in score],
        },
        schema=records.DUPLICATES,
    )


def _finish(nodes: Nodes, decision: Decision, done: Sequence[ShardRecord]) -> tuple[dict[str, Any], None]:
    sizes = component_sizes(decision.component)
    roots = np.flatnonzero((decision.component == np.arange(len(sizes))) & (sizes > 1))
    largest = roots[np.lexsort((roots, -sizes[roots]))][:LARGEST_COMPONENTS]
    histogram = np.unique(sizes[roots], return_counts=True)
    return {
        "unique_images": len(sizes),
        "components_of_two_or_more": len(roots),
        "largest_components": [[str(nodes.image_ids[root]), int(sizes[root])] for root in largest],
        "component_sizes": {str(size): int(count) for size, count in zip(*histogram, strict=True)},
    }, None


@dataclass(frozen=True)
class KeptShard:
    """The three files that belong to one shard of ingest: its images, what dedup decided, its vectors."""

    images: str
    duplicates: str
    vectors: str


def kept_shards(images: str, deduplicated: str, embedded: str) -> list[KeptShard]:
    """The shards of three finished stages side by side. Raises InputError when they are not of one run."""
    names = [
        [storage.join(folder, name) for name in storage.require_manifest(folder).files(kind)]
        for folder, kind in ((images, "images"), (deduplicated, "duplicates"), (embedded, "vectors"))
    ]
    if len({len(column) for column in names}) > 1:
        raise InputError(
            f"'{images}', '{deduplicated}' and '{embedded}' differ in their number of shards "
            f"({', '.join(str(len(column)) for column in names)}); they are not stages of one run."
        )
    return [KeptShard(*paths) for paths in zip(*names, strict=True)]


def read_kept(shard: KeptShard, *, role: str, source: str | None = None) -> tuple[list[str], np.ndarray]:
    """Ids and vectors (N, D) float16 of one shard's kept images of a role, and of a source where one is named."""
    rows = storage.read_table(shard.images, records.IMAGES, ["image_id", "role", "source"])
    kept = storage.read_table(shard.duplicates, records.DUPLICATES, ["image_id", "kept"])
    wanted = {
        row["image_id"]
        for row, keep in zip(rows.to_pylist(), kept.column("kept").to_pylist(), strict=True)
        if keep and row["role"] == role and source in (None, row["source"])
    }
    ids, matrix = vectors.read_file(shard.vectors)
    if missing := wanted.difference(ids):
        raise InputError(f"{shard.vectors}: no vector of image {min(missing)}, which is in {shard.images}.")
    chosen = [index for index, image_id in enumerate(ids) if image_id in wanted]
    return [ids[index] for index in chosen], matrix[chosen]


def command_line(
    config: command.ConfigOption,
    images: Annotated[str, typer.Option("--images", help="Folder of the finished ingest.")],
    pairs: Annotated[str, typer.Option("--pairs", help="Folder of the finished pairs.")],
    output: command.OutputOption,
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Decide which images are copies, and which are kept."""
    settings = load(DedupConfig, config, overrides or (), section="dedup")
    if plan:
        print(resolved_toml(settings), end="")
        return
    with command.open_runner(runner, workers) as chosen:
        run(settings, images, pairs, output, chosen, replace=replace)


if __name__ == "__main__":
    from curation import dedup  # by its real name, or its classes would exist twice

    command.main(dedup.command_line)
