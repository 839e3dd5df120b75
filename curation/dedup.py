"""Deduplicate: which images are copies, which one of each component is kept, and what the holdout takes away.

    dedup/
      duplicates-00000.parquet  ...     records.DUPLICATES: one row for each row of ingest's images, in its order
      manifest.json                     its facts hold the largest components, what each guard did, a threshold sweep

Images with equal bytes are one image that occurs several times. Pairs at or above `threshold` join two images into one
component. Of its images are kept: every seed, since seeds are trusted as they are; where there is none, the one with
the most pixels, then the most bytes, then the smallest image_id. With `matches_kept`, going through them in this order,
also every image that is no copy of one kept before.

Before that, the holdout takes away what matches it. `direct`: the images with a pair at or above `holdout_threshold`
with a holdout image. `component` (DINOv2, appendix A.3): the whole components, joined at `holdout_threshold`, that hold
one. A dropped row has one reason, the first that holds: 'holdout' (the bytes of a holdout image), 'exact', 'holdout'
(a match), 'near'.

One chain of near-copies can join a large part of a pool. Four guards against it, each counted in the facts:
`mutual_neighbors` and `families` leave out pairs, `max_component_size` splits what grew too large, and `matches_kept`
verifies each dropped image against the kept one it is said to copy.

The driver decides, with everything over images and pairs in arrays on its disk (scratch.py): about 90 bytes for each
row of ingest and 70 for each pair. They are walked in blocks, so memory grows with none of them,
nor with the size of a component; measured: 0.35 GB with 1 and with 2 million images. The driver also writes the shards;
a run that was stopped decides again.

    python -m curation.dedup --config CONFIG.toml --images ingest/ --pairs pairs/ --output dedup/
"""

import functools
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from curation.config import Settings
from curation.copies.components import component_sizes, connected_components, family_edges, flatten, separate, unite
from curation.copies.duplicate_graph import DuplicateGraph, Edges, Nodes, read_graph
from curation.engine import command
from curation.engine.manifest import Manifest, ShardRecord, require_manifest, sum_counts
from curation.engine.run_log import RunLog
from curation.engine.runner import InlineRunner, Runner, Shard
from curation.engine.stage import Stage, run_stage
from curation.errors import ConfigError, InputError
from curation.files import parquet, paths, schemas
from curation.files.disk_arrays import blocks, count_true, on_disk
from curation.files.image_ids import pack_ids, unpack_ids
from curation.run_folder import RunFolder, require_same_ingest
from curation.search.top_k import top_k_of_groups
from curation.stage_command import stage_command

# How many of the largest components the manifest names; the report shows them.
LARGEST_COMPONENTS = 20
# Similarity between two rows of the threshold sweep. Assumed: a dozen rows are enough to choose by.
SWEEP_STEP = 0.05
# The settings that guard against chains of copies; the facts hold the value of each and its effect.
GUARDS = ("mutual_neighbors", "families", "max_component_size", "matches_kept", "holdout_cosine")
# What a reason's number stands for.
REASONS = (None, "exact", "near", "holdout")
KEPT, EXACT, NEAR, HOLDOUT = range(4)


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
    holdout_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Cosine of two copy descriptors at which an image matches a holdout image too, whatever the similarity says. For
    verified pairs; set pairs.min_cosine to it, or those below pairs.min_similarity are not written, and so not seen."""
    mutual_neighbors: bool = False
    """Whether a pair joins two images only when each is among the other's nearest descriptors. Pairs that perceptual
    hashes alone found are not. A match with the holdout needs no such pair, but `component` joins by such pairs only.
    """
    max_component_size: int | None = Field(default=None, ge=2)
    """Unique images above which a component is joined again at `threshold` + `split_step`, what is still too large at
    one step more, and so on up to 1. Images that are all of similarity 1 stay together."""
    split_step: float = Field(default=0.02, gt=0, le=1)
    """How much the threshold rises at each such split."""
    matches_kept: bool = False
    """Whether an image goes only when it is itself a copy of one that stays: each is verified against that one. In a
    chain of small steps the ends may have little in common; this keeps an image every other step, where else one of
    the whole component is kept."""
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
    """What happens to each unique image: arrays over the N nodes, on disk; and what there is to say of the whole."""

    component: np.ndarray  # (N,): the node of the component's smallest image_id
    reason: np.ndarray  # (N,) uint8: KEPT, NEAR or HOLDOUT
    matched: np.ndarray  # (N,): the node for which this one was dropped; -1 when kept
    similarity: np.ndarray  # (N,) float32: of that match; NaN when the two are joined by other images only
    guards: dict[str, dict[str, int]]  # by option, what it did
    sweep: list[dict[str, float | int]]  # by threshold, what joining at it alone would do


def run(
    config: DedupConfig,
    inputs: RunFolder,
    output: str,
    runner: Runner,
    *,
    replace: bool = False,
    log: RunLog | None = None,
) -> Manifest:
    """Decide for every row of the finished ingest; returns the manifest.

    Raises ConfigError for a threshold below the `min_similarity` that the pairs were written with. The decision lies on
    the disk of the driver, which therefore writes all shards itself: `runner` is not used.
    """
    images, pairs = inputs.ingest, inputs.pairs
    ingested, paired = require_manifest(images), require_manifest(pairs)
    written = paired.facts["min_similarity"]
    if config.holdout_threshold < written:
        raise ConfigError(
            f"dedup.holdout_threshold is {config.holdout_threshold:g}, but pairs below {written:g} were not written. "
            "Lower pairs.min_similarity, or raise the threshold."
        )
    require_same_ingest(pairs, paired, images, ingested)
    shards, start = [], 0
    for record, name in zip(ingested.shards, ingested.files("images"), strict=True):
        count = record.totals["accepted"]
        part = slice(start, start + count)
        work = (paths.join(images, name), part)
        shards.append(Shard(name.removeprefix("images-").removesuffix(".parquet"), work, count))
        start = part.stop
    if not start:
        raise InputError(f"'{images}' holds no accepted image. See its rejects-*.parquet for the reasons.")

    @functools.cache  # when it is first needed, which it is not by a stage that is done
    def decided() -> tuple[DuplicateGraph, Decision]:
        graph = read_graph(images, pairs)
        return graph, decide(config, graph.nodes, graph.edges, sweep_from=written)

    stage = Stage(
        name="dedup",
        config=config,
        inputs={"images": ingested.content_hash, "pairs": paired.content_hash},
        output=output,
        shards=shards,
        make_worker=lambda: make_worker(output, *decided()),
        finish=lambda done: (_facts(*decided()), None),
        facts={
            "threshold": config.threshold,
            "holdout_threshold": config.holdout_threshold,
            "guard_settings": {name: config.model_dump(mode="json")[name] for name in GUARDS},
        },
    )
    return run_stage(stage, InlineRunner(), replace=replace, log=log)


def make_worker(output: str, graph: DuplicateGraph, decision: Decision) -> Callable[[Shard], ShardRecord]:
    """A worker that writes the decided rows of one shard after another."""

    def process(shard: Shard) -> ShardRecord:
        path, part = shard.work
        table = parquet.read_table(path, schemas.IMAGES, ["image_id", "role"])
        rows, reason = _rows(table, part, graph, decision)
        file = parquet.write_table(paths.join(output, f"duplicates-{shard.name}.parquet"), rows)
        counts = np.bincount(reason[~pc.equal(table["role"], "holdout").to_numpy()], minlength=len(REASONS))
        totals = {REASONS[number] or "kept": int(count) for number, count in enumerate(counts) if count}
        totals = sum_counts([totals]) | {"holdout_rows": table.num_rows - int(counts.sum())}
        return ShardRecord(name=shard.name, files=(file,), totals={"rows": rows.num_rows, **totals})

    return process


def decide(config: DedupConfig, nodes: Nodes, edges: Edges, *, sweep_from: float = 0.0) -> Decision:
    """Which images are dropped, given the edges between them. `sweep_from`: the lowest threshold of the sweep."""
    num_nodes = len(nodes.image_ids)
    kind = edges.first.dtype
    decision = Decision(
        component=on_disk(num_nodes, kind),
        reason=on_disk(num_nodes, np.uint8),
        matched=on_disk(num_nodes, kind, fill=-1),
        similarity=on_disk(num_nodes, np.float32, fill=np.nan),
        guards={},
        sweep=[],
    )
    _take_holdout(config, nodes, edges, decision)
    joins = _joining(config, num_nodes, edges, decision)
    _connect(config, edges, joins, decision)
    _keep_one_each(config, nodes, edges, joins, decision)
    decision.sweep.extend(_sweep(config, nodes, edges, joins, sweep_from))
    return decision


def _take_holdout(config: DedupConfig, nodes: Nodes, edges: Edges, decision: Decision) -> None:
    """Drop the holdout's images and what matches them, naming the most similar one, of equals the smallest image_id."""
    num_nodes = len(nodes.image_ids)
    is_candidate = on_disk(num_nodes, bool)
    for part in blocks(num_nodes):
        spared = nodes.is_seed[part] & (not config.decontaminate_seeds)
        is_candidate[part] = ~nodes.is_holdout[part] & ~spared
        own = part.start + np.flatnonzero(nodes.is_holdout[part] & ~spared)
        decision.reason[own], decision.matched[own], decision.similarity[own] = HOLDOUT, own, 1.0

    def matches() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Candidates, a holdout image that each matches, and their similarity."""
        for part in blocks(len(edges.first)):
            is_match = edges.similarity[part] >= config.holdout_threshold
            if config.holdout_cosine is not None:
                is_match |= edges.cosine[part] >= config.holdout_cosine
            ends = edges.first[part][is_match], edges.second[part][is_match]
            for one, other in (ends, ends[::-1]):
                taken = is_candidate[one] & nodes.is_holdout[other]
                yield one[taken], other[taken], edges.similarity[part][is_match][taken]

    best = on_disk(num_nodes, np.float32, fill=-np.inf)
    holdout = on_disk(num_nodes, decision.matched.dtype, fill=num_nodes)
    for one, _, value in matches():
        np.maximum.at(best, one, value)
    for one, other, value in matches():
        top = value == best[one]
        np.minimum.at(holdout, one[top], other[top])
    by_cosine = 0
    for part in blocks(num_nodes):
        taken = part.start + np.flatnonzero(holdout[part] < num_nodes)
        decision.reason[taken], decision.matched[taken] = HOLDOUT, holdout[taken]
        decision.similarity[taken] = best[taken]
        by_cosine += count_true(best[taken] < config.holdout_threshold)
    if config.holdout_cosine is not None:
        decision.guards["holdout_cosine"] = {"images_taken": by_cosine}
    if config.decontamination == "component":
        _take_components(config, nodes, edges, is_candidate, decision)


def _take_components(
    config: DedupConfig, nodes: Nodes, edges: Edges, is_candidate: np.ndarray, decision: Decision
) -> None:
    """Drop the candidates that are joined to a holdout image, naming the one with the smallest image_id."""
    num_nodes = len(nodes.image_ids)

    def joined() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in blocks(len(edges.first)):
            chosen = edges.similarity[part] >= config.holdout_threshold
            if config.mutual_neighbors:
                chosen &= edges.mutual[part]
            yield edges.first[part][chosen], edges.second[part][chosen]

    component = connected_components(num_nodes, joined(), parent=on_disk(num_nodes, edges.first.dtype))
    holdout = on_disk(num_nodes, decision.matched.dtype, fill=num_nodes)
    for part in blocks(num_nodes):
        held = part.start + np.flatnonzero(nodes.is_holdout[part])
        np.minimum.at(holdout, component[held], held.astype(holdout.dtype))
    for part in blocks(num_nodes):
        taken = is_candidate[part] & (decision.matched[part] < 0) & (holdout[component[part]] < num_nodes)
        node = part.start + np.flatnonzero(taken)
        decision.reason[node], decision.matched[node] = HOLDOUT, holdout[component[node]]


def _joining(config: DedupConfig, num_nodes: int, edges: Edges, decision: Decision) -> np.ndarray:
    """Which edges, (E,) bool, may join copies if they are similar enough."""
    num_edges = len(edges.first)
    joins = on_disk(num_edges, bool, fill=True)
    left_out = []
    if config.families is not None:
        ends = edges.first, edges.second, edges.similarity, edges.differs_locally
        left_out.append(("families", family_edges(num_nodes, *ends, **config.families.model_dump())))
    if config.mutual_neighbors:
        left_out.append(("mutual_neighbors", edges.mutual))
    for guard, marked in left_out:
        count = 0
        for part in blocks(num_edges):
            out = joins[part] & (marked[part] if guard == "families" else ~marked[part])
            joins[part] &= ~out
            count += count_true(out & (edges.similarity[part] >= config.threshold))
        decision.guards[guard] = {"pairs_left_out": count}
    return joins


def _connect(config: DedupConfig, edges: Edges, joins: np.ndarray, decision: Decision) -> None:
    """Find the components, and split the ones that are too large."""
    component = decision.component
    threshold, too_large = config.threshold, None

    def joined() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in blocks(len(edges.first)):
            chosen = joins[part] & (edges.similarity[part] >= threshold)
            if too_large is not None:
                chosen &= too_large[edges.first[part]]
            yield edges.first[part][chosen], edges.second[part][chosen]

    connected_components(len(component), joined(), parent=component)
    if config.max_component_size is None:
        return
    sizes, steps = component_sizes(component), 0
    counts = {"components_split": 0, "images_in_them": 0}
    while oversized := sum(count_true(sizes[part] > config.max_component_size) for part in blocks(len(sizes))):
        if threshold >= 1:
            break
        steps += 1
        threshold = min(config.threshold + steps * config.split_step, 1.0)
        too_large = on_disk(len(component), bool)
        for part in blocks(len(component)):
            too_large[part] = sizes[component[part]] > config.max_component_size
        if steps == 1:
            images = sum(count_true(too_large[part]) for part in blocks(len(component)))
            counts = {"components_split": oversized, "images_in_them": images}
        for part in blocks(len(component)):
            component[part][too_large[part]] = part.start + np.flatnonzero(too_large[part])
        for first, second in joined():
            unite(component, first, second)
        sizes = component_sizes(flatten(component))
    decision.guards["max_component_size"] = counts | {"components_still_larger": oversized}


# One of each component. Of several images the one that "goes before" the others is kept: seeds first, then by pixels,
# bytes and image_id.


def _goes_before(nodes: Nodes, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether each node in `one` goes before its counterpart in `other`."""
    result = one < other
    for column in (nodes.length, nodes.pixels, nodes.is_seed):
        a, b = column[one], column[other]
        result = np.where(a == b, result, a > b)
    return result


def _offer(nodes: Nodes, chosen: np.ndarray, place: np.ndarray, node: np.ndarray) -> None:
    """Put each node at its place in `chosen` where it goes before the one there, or where there is none (-1)."""
    keys = (~nodes.is_seed[node], -nodes.pixels[node], -nodes.length[node], node)
    first = top_k_of_groups(place, 1, *keys)
    place, node = place[first], node[first]
    there = chosen[place]
    wins = (there < 0) | _goes_before(nodes, node, there)
    chosen[place[wins]] = node[wins]


def _keep_one_each(config: DedupConfig, nodes: Nodes, edges: Edges, joins: np.ndarray, decision: Decision) -> None:
    """Drop the copies among what the holdout left."""
    num_nodes = len(nodes.image_ids)
    component, kind = decision.component, decision.component.dtype
    is_open = on_disk(num_nodes, bool)
    first_of = on_disk(num_nodes, kind, fill=-1)  # of each component of several, the open node that goes first
    sizes = component_sizes(component)
    for part in blocks(num_nodes):
        is_open[part] = decision.matched[part] < 0
        node = part.start + np.flatnonzero(is_open[part] & (sizes[component[part]] > 1))
        _offer(nodes, first_of, component[node], node)

    def others() -> Iterator[np.ndarray]:
        """The open nodes that are neither seeds nor the first of their component."""
        for part in blocks(num_nodes):
            first = first_of[component[part]]
            not_first = (first >= 0) & (first != np.arange(part.start, part.stop))
            yield part.start + np.flatnonzero(is_open[part] & ~nodes.is_seed[part] & not_first)

    copies = _open_copies(config, nodes, edges, joins, is_open, component)
    better, worse, similarity = copies
    if not config.matches_kept:
        for node in others():
            decision.reason[node], decision.matched[node] = NEAR, first_of[component[node]]
        for part in blocks(len(better)):
            direct = decision.matched[worse[part]] == better[part]
            decision.similarity[worse[part][direct]] = similarity[part][direct]
        return
    dropped = _copies_of_kept(num_nodes, better, worse)
    best = on_disk(num_nodes, np.float32, fill=-np.inf)
    for part in blocks(len(better)):
        stays = ~dropped[better[part]] & dropped[worse[part]]
        np.maximum.at(best, worse[part][stays], similarity[part][stays])
    for part in blocks(len(better)):
        top = ~dropped[better[part]] & dropped[worse[part]] & (similarity[part] == best[worse[part]])
        _offer(nodes, decision.matched, worse[part][top], better[part][top])
    kept = 0
    for node in others():
        kept += count_true(~dropped[node])
        node = node[dropped[node]]
        decision.reason[node], decision.similarity[node] = NEAR, best[node]
    decision.guards["matches_kept"] = {"images_kept": kept}


def _open_copies(
    config: DedupConfig, nodes: Nodes, edges: Edges, joins: np.ndarray, is_open: np.ndarray, component: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of copies that can drop an image: the node that goes before, the other (no seed), their similarity."""
    better, worse = (on_disk(len(edges.first), edges.first.dtype) for _ in range(2))
    similarity = on_disk(len(edges.first), np.float32)
    count = 0
    for part in blocks(len(edges.first)):
        one, other, value = edges.first[part], edges.second[part], edges.similarity[part]
        chosen = joins[part] & (value >= config.threshold) & (one != other)
        chosen &= is_open[one] & is_open[other] & (component[one] == component[other])
        one, other, value = one[chosen], other[chosen], value[chosen]
        forward = _goes_before(nodes, one, other)
        one, other = np.where(forward, one, other), np.where(forward, other, one)
        chosen = ~nodes.is_seed[other]
        place = slice(count, count + count_true(chosen))
        better[place], worse[place], similarity[place] = one[chosen], other[chosen], value[chosen]
        count = place.stop
    return better[:count], worse[:count], similarity[:count]


def _copies_of_kept(num_nodes: int, better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """Which nodes, (N,) bool, are dropped: those with an edge to a better one that is not.

    In rounds: what has no better neighbour left is kept, what has one that is kept is dropped, and edges of dropped
    nodes go. That gives the same as going through all nodes from the best to the worst, and mostly in few rounds (G. E.
    Blelloch and others, "Greedy sequential maximal independent set and matching are parallel on average", 2012).
    """
    dropped, waits = on_disk(num_nodes, bool), on_disk(num_nodes, bool)
    left = [on_disk(len(better), better.dtype) for _ in range(2)]
    for part in blocks(len(better)):
        left[0][part], left[1][part] = better[part], worse[part]
    num_left = len(better)
    while num_left:
        for part in blocks(num_left):
            waits[left[1][part]] = True
        for part in blocks(num_left):
            dropped[left[1][part][~waits[left[0][part]]]] = True
        count = 0
        for part in blocks(num_left):
            one, other = left[0][part], left[1][part]
            waits[other] = False
            stays = ~dropped[one] & ~dropped[other]
            place = slice(count, count + count_true(stays))
            left[0][place], left[1][place] = one[stays], other[stays]
            count = place.stop
        num_left = count
    return dropped


# What the report shows


def sweep_thresholds(config: DedupConfig, lowest: float) -> list[float]:
    """Multiples of `SWEEP_STEP` from `lowest` up to below 1, and the thresholds; a multiple too near to one is not."""
    first = max(int(np.floor(lowest / SWEEP_STEP + 1e-9)), 0)
    last = round(1 / SWEEP_STEP) - 1
    grid = [round(number * SWEEP_STEP, 6) for number in range(min(first, last), last + 1)]
    own = [config.threshold, config.holdout_threshold]
    inner = {edge for edge in grid[1:] if all(abs(edge - threshold) >= SWEEP_STEP / 2 for threshold in own)}
    return [grid[0], *sorted(inner | {threshold for threshold in own if grid[0] < threshold < 1})]


def _sweep(
    config: DedupConfig, nodes: Nodes, edges: Edges, joins: np.ndarray, lowest: float
) -> list[dict[str, float | int]]:
    """What joining at each threshold would do, the lowest first; found in one union from the highest down.

    `dropped` counts the images that go when of each component only the seeds, or else one image, are kept.
    """
    num_nodes = len(nodes.image_ids)
    parent = on_disk(num_nodes, edges.first.dtype)
    separate(parent)
    rows: list[dict[str, float | int]] = []
    num_pairs, above = 0, np.inf
    for threshold in reversed(sweep_thresholds(config, lowest)):
        for part in blocks(len(edges.first)):
            value = edges.similarity[part]
            band = joins[part] & (value >= threshold) & (value < above)
            unite(parent, edges.first[part][band], edges.second[part][band])
            num_pairs += count_true(band)
        above = threshold
        sizes, has_seed = component_sizes(flatten(parent)), on_disk(num_nodes, bool)
        num_joined = num_several = largest = num_seeds = 0
        for part in blocks(num_nodes):
            has_seed[parent[part][nodes.is_seed[part]]] = True
            num_seeds += count_true(nodes.is_seed[part])
            num_joined += count_true(sizes[part] == 0)
            num_several += count_true(sizes[part] > 1)
            largest = max(largest, int(sizes[part].max()))
        spared = num_seeds - sum(count_true(has_seed[part]) for part in blocks(num_nodes))
        rows.append(
            {
                "threshold": threshold,
                "pairs": num_pairs,
                "components_of_two_or_more": num_several,
                "dropped": num_joined - spared,
                "largest_component": largest,
            }
        )
    return rows[::-1]


def _facts(graph: DuplicateGraph, decision: Decision) -> dict[str, Any]:
    sizes = component_sizes(decision.component)
    histogram: dict[int, int] = {}
    largest: list[tuple[int, int]] = []
    for part in blocks(len(sizes)):
        roots = part.start + np.flatnonzero(sizes[part] > 1)
        for size, count in zip(*np.unique(sizes[roots], return_counts=True), strict=True):
            histogram[int(size)] = histogram.get(int(size), 0) + int(count)
        first = roots[np.lexsort((roots, -sizes[roots]))][:LARGEST_COMPONENTS]
        largest = heapq.nsmallest(LARGEST_COMPONENTS, largest + [(-int(sizes[root]), int(root)) for root in first])
    names = unpack_ids(graph.nodes.image_ids[[root for _, root in largest]]).to_pylist() if largest else []
    return {
        "unique_images": len(sizes),
        "components_of_two_or_more": sum(histogram.values()),
        "largest_components": [[name, -size] for name, (size, _) in zip(names, largest, strict=True)],
        "component_sizes": {str(size): histogram[size] for size in sorted(histogram)},
        "guards": decision.guards,
        "threshold_sweep": decision.sweep,
    }


def _rows(table: pa.Table, part: slice, graph: DuplicateGraph, decision: Decision) -> tuple[pa.Table, np.ndarray]:
    """The decided rows of one shard of ingest, which are the rows `part` of all, and the number of each's reason."""
    node = graph.node_of_row[part]
    assert (graph.nodes.image_ids[node] == pack_ids(table["image_id"])).all(), "ingest has changed under this stage"
    reason, matched, score = (column[node] for column in (decision.reason, decision.matched, decision.similarity))
    copy = graph.row_of_node[node] != np.arange(part.start, part.stop)
    reason[copy] = np.where(graph.nodes.is_holdout[node[copy]], HOLDOUT, EXACT)
    matched[copy], score[copy] = node[copy], 1.0
    kept = matched < 0
    names = pa.array(REASONS, pa.string())
    partner = unpack_ids(graph.nodes.image_ids[matched])  # at -1 the last, which is no partner
    return pa.table(
        {
            "image_id": table["image_id"].combine_chunks(),
            "component_id": unpack_ids(graph.nodes.image_ids[decision.component[node]]),
            "kept": kept,
            "reason": names.take(pa.array(reason)),
            "matched_image_id": pc.if_else(pa.array(kept), pa.scalar(None, pa.string()), partner),
            "similarity": pa.array(score, mask=np.isnan(score)),
        },
        schema=schemas.DUPLICATES,
    ), reason


command_line = stage_command(
    "dedup", DedupConfig, run, "Decide which images are copies, and which are kept.", reads=("ingest", "pairs")
)


if __name__ == "__main__":
    from curation import dedup  # by its real name: otherwise each class would exist twice

    command.main(dedup.command_line)
