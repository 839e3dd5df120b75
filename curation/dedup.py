"""Deduplicate: which images are copies, which image of each component is kept, and what matches the holdout.

    dedup/
      duplicates-00000.parquet  ...     schemas.DUPLICATES: one row for each row of ingest's images, in its order
      manifest.json                     its facts hold the largest components, the effect of each guard, and a threshold
                                        sweep

Images with equal bytes are one unique image that occurs several times. Pairs at or above `threshold` connect two images
into one component. All seeds of a component are kept, since seeds are trusted. Without a seed, one image is kept: the
one of highest priority (copies/priority.py), mostly the unedited one. With `matches_kept`, images are visited by
priority, and an image is dropped only when it is a copy of an image that was kept before it:

    three images by falling priority, A, B, C:    A --0.8-- B --0.7-- C    (A and C are not copies)

    default         A is kept; B and C are dropped for A
    matches_kept    A is kept; B is dropped for A; C is kept, because its only copy B was dropped

Images that match the holdout are dropped first. `direct` drops an image with a pair at or above `holdout_threshold` to
a holdout image. `component` (DINOv2, appendix A.3) drops whole components, connected at `holdout_threshold`, that
contain a holdout image:

    H is a holdout image, holdout_threshold is 0.45:    H --0.5-- A --0.5-- B

    direct          A is dropped; B is kept
    component       A and B are dropped

A dropped row has one reason, the first that applies: 'holdout' (the bytes of a holdout image), 'exact', 'holdout' (a
match), 'near'.

A chain of near-copies can connect a large share of a pool into one component. There are four guards against chains, and
the facts count the effect of each. `mutual_neighbors` and `families` leave out pairs, `max_component_size` splits large
components, and `matches_kept` compares each dropped image with the kept image that it is a copy of.

Some domains hold images that look alike although they are not copies. `lookalikes` says what happens to such sources;
by default the run stops before anything is dropped (copies/lookalikes.py).

`label_guard` leaves out pairs of seeds and pool images with different labels. Images with equal bytes are one image
whatever their labels; the facts list the images whose rows have several.

The driver decides. Its arrays over images and pairs lie on disk (files/disk_arrays.py): about 90 bytes per row of
ingest and 70 per pair. They are read in blocks, so memory grows neither with their length nor with the size of a
component; measured: 0.35 GB with 1 and with 2 million images. The driver also writes the shards. A resumed run decides
again.

    python -m curation.dedup --config CONFIG.toml --images ingest/ --pairs pairs/ --output dedup/

Legend: N unique images, the nodes, numbered in the order of their image_ids; E pairs, the edges.
"""

import functools
import heapq
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from curation.config import Settings
from curation.copies.components import (
    component_sizes,
    connected_components,
    family_edges,
    flatten,
    node_type,
    separate,
    unite,
)
from curation.copies.duplicate_graph import DuplicateGraph, Edges, Nodes, labels_differ, read_graph
from curation.copies.lookalikes import CROWDED, Lookalikes, find_lookalikes, joins_lookalikes, pairs_of_source
from curation.copies.priority import CopyPairs, Priority, has_priority, prioritize, put_by_priority
from curation.engine import command, progress
from curation.engine.manifest import (
    Manifest,
    ShardRecord,
    read_manifest,
    require_fact,
    require_manifest,
    sum_counts,
)
from curation.engine.run_log import Log
from curation.engine.runner import InlineRunner, Runner, Shard
from curation.engine.stage import Stage, run_stage
from curation.errors import ConfigError, InputError
from curation.files import parquet, paths, schemas
from curation.files.disk_arrays import blocks, count_true, on_disk
from curation.files.image_ids import pack_ids, unpack_ids
from curation.run_folder import RunFolder, require_same_ingest
from curation.stage_command import stage_command

# Number of the largest components that the manifest names; the report shows them.
LARGEST_COMPONENTS = 20
# Difference in threshold between two rows of the threshold sweep. Assumed: a dozen rows are enough to choose by.
SWEEP_STEP = 0.05
# Rise of the threshold at each split of a large component (`max_component_size`). Assumed.
SPLIT_STEP = 0.02
# The settings that guard against chains of copies, and `holdout_cosine`; the facts hold the value and effect of each.
GUARDS = (
    "mutual_neighbors",
    "families",
    "label_guard",
    "lookalikes",
    "max_component_size",
    "matches_kept",
    "holdout_cosine",
)
# A reason is stored as its index in this tuple.
REASONS = (None, "exact", "near", "holdout")
KEPT, EXACT, NEAR, HOLDOUT = range(4)


# Shows pairs of some sources to the user: by source, two image_ids and their similarity. Returns where they are shown.
ShowPairs = Callable[[Sequence[Lookalikes], Mapping[str, Sequence[tuple[str, str, float]]]], str]


class FamilyConfig(Settings):
    """When a pair belongs to a family, such as road signs with other symbols; see copies.components.family_edges."""

    sure: float = Field(default=0.9, ge=0, le=1)
    """Minimum similarity of a pair that is always of copies, unless it differs locally (in one rectangle)."""
    margin: float = Field(default=0.1, ge=0, le=1)
    """A rival of the pair is a third image whose similarity to one of the two is at most this much lower."""
    local_margin: float = Field(default=0.05, ge=0, le=1)
    """The same for pairs that differ locally."""


class DedupConfig(Settings):
    """When a pair counts as copies, and which images are dropped."""

    threshold: float = Field(default=0.6, gt=0, le=1)
    """Minimum similarity of copies (0.6 in DINOv2, with SSCD descriptors)."""
    holdout_threshold: float = Field(default=0.45, gt=0, le=1)
    """Minimum similarity of an image and a holdout image that match (0.45 in DINOv2)."""
    holdout_cosine: float | None = Field(default=None, gt=0, le=1)
    """Minimum cosine of the copy descriptors of an image and a holdout image that match, whatever their similarity. For
    verified pairs. Set pairs.min_cosine to the same value; otherwise pairs below pairs.min_similarity are not written.
    """
    mutual_neighbors: bool = False
    """Whether only mutual pairs connect images: each image is among the other's nearest descriptors. Pairs found by
    perceptual hashes alone are not mutual. A direct match with the holdout need not be mutual; the pairs that connect
    the components of `decontamination = "component"` must be."""
    max_component_size: int | None = Field(default=None, ge=2)
    """Maximum number of unique images in a component. A larger component is split: its images are connected again
    at `threshold` + SPLIT_STEP, what remains too large at one step more, and so on up to 1. Images connected by pairs
    of similarity 1 stay together."""
    matches_kept: bool = False
    """Whether an image is dropped only when it is itself a copy of a kept image. The ends of a long chain may have
    little in common. This setting keeps about every other image of a chain; without it, one image of the component is
    kept."""
    families: FamilyConfig | None = None
    """How families are told from copies, for verified pairs. Without this section no pair belongs to a family."""
    label_guard: bool = True
    """Whether an image is never dropped for a seed or pool image of another label, where both have one. Subfolders are
    labels too; set false where they do not name classes. The holdout and equal bytes count whatever the labels."""
    lookalikes: Literal["stop", "drop", "exact"] = "stop"
    """The treatment of sources whose images look alike although they are not copies (copies/lookalikes.py). `stop` ends
    the run before anything is dropped, with a page of their pairs. `drop` treats them as all others. `exact` drops none
    of their seeds and pool images as near-copies; equal bytes and matches with the holdout are still dropped."""
    decontamination: Literal["direct", "component"] = "direct"
    """Whether images that match a holdout image are dropped, or the whole components that contain one."""
    decontaminate_seeds: bool = True
    """Whether seeds that match the holdout are dropped too. In DINOv2 the training splits of evaluation sets are both
    seeds and holdout, so its recipe needs false."""

    @model_validator(mode="after")
    def _check_thresholds(self) -> "DedupConfig":
        if self.holdout_threshold > self.threshold:
            raise ValueError(
                f"holdout_threshold ({self.holdout_threshold:g}) must not lie above threshold ({self.threshold:g}); "
                "otherwise copies of the holdout could be kept"
            )
        return self


@dataclass(frozen=True)
class Decision:
    """The decision on each unique image, as arrays over the N nodes on disk, and counts for the manifest."""

    component: np.ndarray  # (N,): the node of the component's smallest image_id
    reason: np.ndarray  # (N,) uint8: KEPT, NEAR or HOLDOUT
    matched: np.ndarray  # (N,): the node for which this one was dropped; -1 when kept
    similarity: np.ndarray  # (N,) float32: of that match; NaN when only other images connect the two
    guards: dict[str, dict[str, int]]  # counts of the effects of each guard, by its setting
    sweep: list[dict[str, float | int]]  # one row a threshold: counts of the components at that threshold


def run(
    config: DedupConfig,
    inputs: RunFolder,
    output: str,
    *,
    replace: bool = False,
    log: Log = None,
    show_pairs: ShowPairs | None = None,
) -> Manifest:
    """Decide for every row of the finished ingest; returns the manifest.

    show_pairs: shows the pairs of sources whose images look alike (report/lookalikes_page.py), and returns the place.
    Raises InputError for such sources with `lookalikes = "stop"`. Raises ConfigError for a threshold below the
    `min_similarity` of the pairs written, or for a `holdout_threshold` above their `max_holdout_threshold`. It takes no
    runner: the decision lies on the driver's disk, so the driver writes all shards itself.
    """
    images, pairs = inputs.ingest, inputs.pairs
    ingested, paired = require_manifest(images), require_manifest(pairs)
    require_same_ingest(pairs, paired, images, ingested)
    min_similarity = require_fact(pairs, paired, "min_similarity")
    if config.holdout_threshold < min_similarity:
        raise ConfigError(
            f"dedup.holdout_threshold is {config.holdout_threshold:g}, but pairs below {min_similarity:g} were not "
            "written. Lower pairs.min_similarity, or raise the threshold."
        )
    max_threshold = require_fact(pairs, paired, "max_holdout_threshold")
    if config.holdout_threshold > max_threshold:
        raise ConfigError(
            f"dedup.holdout_threshold is {config.holdout_threshold:g}, but with pairs.verification the comparisons of "
            f"an image with the holdout end at a similarity of {max_threshold:g}. Lower the threshold to "
            f"{max_threshold:g}."
        )
    shards, start = [], 0
    for record, file in zip(ingested.shards, ingested.paths(images, "images"), strict=True):
        count = record.totals["accepted"]
        work = (file, slice(start, start + count))
        name = posixpath.basename(file)
        shards.append(Shard(name.removeprefix("images-").removesuffix(".parquet"), work, count))
        start += count
    if not start:
        raise InputError(f"'{images}' holds no accepted image. See its rejects-*.parquet for the reasons.")

    # These are called only when a shard is missing, so that a finished stage decides nothing.
    @functools.cache
    def read() -> DuplicateGraph:
        with progress.step("dedup", "reading the pairs"):
            return read_graph(images, pairs)

    @functools.cache
    def lookalikes() -> list[Lookalikes]:
        if config.lookalikes == "drop":
            return []
        return find_lookalikes(read().nodes, read().edges, read().sources, config.threshold)

    @functools.cache
    def graph_and_decision() -> tuple[DuplicateGraph, Decision]:
        graph = read()
        with progress.step("dedup", "deciding which images are copies"):
            is_alike = np.isin(graph.sources, [each.source for each in lookalikes()])
            decided = decide(config, graph.nodes, graph.edges, min_sweep_threshold=min_similarity, is_alike=is_alike)
            return graph, decided

    stage = Stage(
        name="dedup",
        config=config,
        inputs={"images": ingested.content_hash, "pairs": paired.content_hash},
        output=output,
        shards=shards,
        make_worker=lambda: make_worker(output, *graph_and_decision()),
        finish=lambda done: (_facts(*graph_and_decision(), lookalikes()), None),
        facts={
            "threshold": config.threshold,
            "holdout_threshold": config.holdout_threshold,
            "label_guard": config.label_guard,
            "guard_settings": {name: config.model_dump(mode="json")[name] for name in GUARDS},
        },
    )
    # Before the stage claims its output: the user goes on with another value of the setting.
    finished = read_manifest(output)
    begins = finished is None or (replace and finished.plan != stage.plan())
    if begins and config.lookalikes == "stop" and lookalikes():
        raise InputError(_stop_at_lookalikes(config, read(), lookalikes(), show_pairs))
    manifest = run_stage(stage, InlineRunner(), replace=replace, log=log)
    if num_pairs := manifest.facts["guards"].get("label_guard", {}).get("pairs_left_out"):
        progress.say(
            f"dedup: pairs at the threshold whose images have different labels: {num_pairs:,}. Neither image is "
            "dropped for the other. Where labels do not name classes, add --set dedup.label_guard=false."
        )
    return manifest


def make_worker(output: str, graph: DuplicateGraph, decision: Decision) -> Callable[[Shard], ShardRecord]:
    """A worker that writes the decided rows of a shard."""

    def process(shard: Shard) -> ShardRecord:
        path, rows_of_shard = shard.work
        table = parquet.read_table(path, schemas.IMAGES, ["image_id", "role"])
        rows, reason = _decided_rows(table, rows_of_shard, graph, decision)
        file = parquet.write_table(paths.join(output, f"duplicates-{shard.name}.parquet"), rows)
        counts = np.bincount(reason[~pc.equal(table["role"], "holdout").to_numpy()], minlength=len(REASONS))
        totals = {REASONS[number] or "kept": int(count) for number, count in enumerate(counts) if count}
        totals = sum_counts([totals]) | {"holdout_rows": table.num_rows - int(counts.sum())}
        return ShardRecord(name=shard.name, files=(file,), totals={"rows": rows.num_rows, **totals})

    return process


def decide(
    config: DedupConfig,
    nodes: Nodes,
    edges: Edges,
    *,
    min_sweep_threshold: float = 0.0,
    is_alike: np.ndarray | None = None,
) -> Decision:
    """Which images are dropped, given the edges between them. The sweep begins at `min_sweep_threshold`.

    is_alike: by source, whether its seeds and pool images are dropped for no near-copy.
    """
    num_nodes = len(nodes.image_ids)
    dtype = edges.first.dtype
    decision = Decision(
        component=on_disk(num_nodes, dtype),
        reason=on_disk(num_nodes, np.uint8),
        matched=on_disk(num_nodes, dtype, fill=-1),
        similarity=on_disk(num_nodes, np.float32, fill=np.nan),
        guards={},
        sweep=[],
    )
    _drop_matches_of_holdout(config, nodes, edges, decision)
    may_connect = _edges_that_may_connect(config, nodes, edges, decision, is_alike)
    _find_components(config, edges, may_connect, decision)
    _drop_copies(config, nodes, edges, may_connect, decision)
    decision.sweep.extend(_sweep(config, nodes, edges, may_connect, min_sweep_threshold))
    return decision


def _drop_matches_of_holdout(config: DedupConfig, nodes: Nodes, edges: Edges, decision: Decision) -> None:
    """Drop the holdout images and the images that match one. The match is the most similar, then the smallest node."""
    num_nodes = len(nodes.image_ids)
    is_candidate = on_disk(num_nodes, bool)
    for part in blocks(num_nodes):
        is_exempt = nodes.is_seed[part] & (not config.decontaminate_seeds)
        is_candidate[part] = ~nodes.is_holdout[part] & ~is_exempt
        dropped = part.start + np.flatnonzero(nodes.is_holdout[part] & ~is_exempt)
        decision.reason[dropped], decision.matched[dropped], decision.similarity[dropped] = HOLDOUT, dropped, 1.0

    def matches() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """In blocks: candidates, a holdout image that each matches, and their similarity."""
        for part in blocks(len(edges.first)):
            is_match = edges.similarity[part] >= config.holdout_threshold
            if config.holdout_cosine is not None:
                is_match |= edges.cosine[part] >= config.holdout_cosine
            ends = edges.first[part][is_match], edges.second[part][is_match]
            for one, other in (ends, ends[::-1]):
                chosen = is_candidate[one] & nodes.is_holdout[other]
                yield one[chosen], other[chosen], edges.similarity[part][is_match][chosen]

    best = on_disk(num_nodes, np.float32, fill=-np.inf)
    match = on_disk(num_nodes, decision.matched.dtype, fill=num_nodes)  # num_nodes: no match
    for one, _, value in matches():
        np.maximum.at(best, one, value)
    for one, other, value in matches():
        top = value == best[one]
        np.minimum.at(match, one[top], other[top])
    num_by_cosine = 0
    for part in blocks(num_nodes):
        dropped = part.start + np.flatnonzero(match[part] < num_nodes)
        decision.reason[dropped], decision.matched[dropped] = HOLDOUT, match[dropped]
        decision.similarity[dropped] = best[dropped]
        num_by_cosine += count_true(best[dropped] < config.holdout_threshold)
    if config.holdout_cosine is not None:
        decision.guards["holdout_cosine"] = {"images_taken": num_by_cosine}
    if config.decontamination == "component":
        _drop_components_of_holdout(config, nodes, edges, is_candidate, decision)


def _drop_components_of_holdout(
    config: DedupConfig, nodes: Nodes, edges: Edges, is_candidate: np.ndarray, decision: Decision
) -> None:
    """Drop the candidates in the component of a holdout image. The match is its holdout image of the smallest node."""
    num_nodes = len(nodes.image_ids)

    def connecting_edges() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in blocks(len(edges.first)):
            chosen = edges.similarity[part] >= config.holdout_threshold
            if config.mutual_neighbors:
                chosen &= edges.mutual[part]
            yield edges.first[part][chosen], edges.second[part][chosen]

    component = connected_components(num_nodes, connecting_edges(), parent=on_disk(num_nodes, edges.first.dtype))
    holdout_of = on_disk(num_nodes, decision.matched.dtype, fill=num_nodes)  # by component; num_nodes: none
    for part in blocks(num_nodes):
        holdout = part.start + np.flatnonzero(nodes.is_holdout[part])
        np.minimum.at(holdout_of, component[holdout], holdout.astype(holdout_of.dtype))
    for part in blocks(num_nodes):
        is_dropped = is_candidate[part] & (decision.matched[part] < 0) & (holdout_of[component[part]] < num_nodes)
        dropped = part.start + np.flatnonzero(is_dropped)
        decision.reason[dropped], decision.matched[dropped] = HOLDOUT, holdout_of[component[dropped]]


def _labels_differ(nodes: Nodes, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether each node in `one` and its counterpart in `other` are seeds or pool images with different labels."""
    result = labels_differ(nodes.label[one], nodes.label[other])
    result &= ~nodes.is_holdout[one] & ~nodes.is_holdout[other]
    return result


def _edges_that_may_connect(
    config: DedupConfig, nodes: Nodes, edges: Edges, decision: Decision, is_alike: np.ndarray | None
) -> np.ndarray:
    """Which edges, (E,) bool, connect copies if they are similar enough: the ones that no guard leaves out."""
    num_nodes = len(nodes.image_ids)
    num_edges = len(edges.first)
    may_connect = on_disk(num_edges, bool, fill=True)
    left_out: list[tuple[str, Callable[[slice], np.ndarray]]] = []
    if config.families is not None:
        ends = edges.first, edges.second, edges.similarity, edges.differs_locally
        is_family = family_edges(num_nodes, *ends, threshold=config.threshold, **config.families.model_dump())
        left_out.append(("families", is_family.__getitem__))
    if config.mutual_neighbors:
        left_out.append(("mutual_neighbors", lambda part: ~edges.mutual[part]))
    if config.label_guard:
        left_out.append(("label_guard", lambda part: _labels_differ(nodes, edges.first[part], edges.second[part])))
    if is_alike is not None and is_alike.any():
        left_out.append(("lookalikes", lambda part: joins_lookalikes(nodes, edges, is_alike, part)))
    for guard, is_marked in left_out:
        count = 0
        for part in blocks(num_edges):
            is_left_out = may_connect[part] & is_marked(part)
            may_connect[part] &= ~is_left_out
            count += count_true(is_left_out & (edges.similarity[part] >= config.threshold))
        decision.guards[guard] = {"pairs_left_out": count}
    return may_connect


def _find_components(config: DedupConfig, edges: Edges, may_connect: np.ndarray, decision: Decision) -> None:
    """Find the components, and split the ones above `max_component_size`."""
    component = decision.component
    threshold, too_large = config.threshold, None

    def connecting_edges() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in blocks(len(edges.first)):
            chosen = may_connect[part] & (edges.similarity[part] >= threshold)
            if too_large is not None:
                chosen &= too_large[edges.first[part]]
            yield edges.first[part][chosen], edges.second[part][chosen]

    connected_components(len(component), connecting_edges(), parent=component)
    if config.max_component_size is None:
        return
    sizes, num_steps = component_sizes(component), 0
    counts = {"components_split": 0, "images_in_them": 0}
    while oversized := sum(count_true(sizes[part] > config.max_component_size) for part in blocks(len(sizes))):
        if threshold >= 1:
            break
        num_steps += 1
        threshold = min(config.threshold + num_steps * SPLIT_STEP, 1.0)
        too_large = on_disk(len(component), bool)
        for part in blocks(len(component)):
            too_large[part] = sizes[component[part]] > config.max_component_size
        if num_steps == 1:
            images = sum(count_true(too_large[part]) for part in blocks(len(component)))
            counts = {"components_split": oversized, "images_in_them": images}
        for part in blocks(len(component)):
            component[part][too_large[part]] = part.start + np.flatnonzero(too_large[part])
        for first, second in connecting_edges():
            unite(component, first, second)
        sizes = component_sizes(flatten(component))
    decision.guards["max_component_size"] = counts | {"components_still_larger": oversized}


# Which images of a component are kept: see copies/priority.py.


def _drop_copies(config: DedupConfig, nodes: Nodes, edges: Edges, may_connect: np.ndarray, decision: Decision) -> None:
    """Drop the copies among the candidates: the nodes that were not dropped for the holdout."""
    num_nodes = len(nodes.image_ids)
    component, dtype = decision.component, decision.component.dtype
    is_candidate = on_disk(num_nodes, bool)
    for part in blocks(num_nodes):
        is_candidate[part] = decision.matched[part] < 0

    def copies() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """In blocks: the pairs of copies among the candidates, and their similarity."""
        for part in blocks(len(edges.first)):
            one, other, value = edges.first[part], edges.second[part], edges.similarity[part]
            chosen = may_connect[part] & (value >= config.threshold) & (one != other)
            chosen &= is_candidate[one] & is_candidate[other] & (component[one] == component[other])
            yield one[chosen], other[chosen], value[chosen]

    priority = prioritize(nodes.is_seed, nodes.detail, nodes.content, nodes.pixels, nodes.length, copies)
    first_of = on_disk(num_nodes, dtype, fill=-1)  # by component of two or more: its candidate of highest priority
    sizes = component_sizes(component)
    for part in blocks(num_nodes):
        node = part.start + np.flatnonzero(is_candidate[part] & (sizes[component[part]] > 1))
        put_by_priority(priority, first_of, component[node], node)

    def other_candidates() -> Iterator[np.ndarray]:
        """In blocks: the candidates that are neither seeds nor the first of their component."""
        for part in blocks(num_nodes):
            first = first_of[component[part]]
            not_first = (first >= 0) & (first != np.arange(part.start, part.stop))
            yield part.start + np.flatnonzero(is_candidate[part] & ~nodes.is_seed[part] & not_first)

    better, worse, similarity = _pairs_by_priority(nodes, len(edges.first), copies, priority)
    if not config.matches_kept:
        for node in other_candidates():
            if config.label_guard:
                node = node[~_labels_differ(nodes, node, first_of[component[node]])]
            decision.reason[node], decision.matched[node] = NEAR, first_of[component[node]]
        for part in blocks(len(better)):
            is_match = decision.matched[worse[part]] == better[part]
            decision.similarity[worse[part][is_match]] = similarity[part][is_match]
        return
    dropped = _copies_of_kept(num_nodes, better, worse)
    best = on_disk(num_nodes, np.float32, fill=-np.inf)
    for part in blocks(len(better)):
        is_match = ~dropped[better[part]] & dropped[worse[part]]
        np.maximum.at(best, worse[part][is_match], similarity[part][is_match])
    for part in blocks(len(better)):
        top = ~dropped[better[part]] & dropped[worse[part]] & (similarity[part] == best[worse[part]])
        put_by_priority(priority, decision.matched, worse[part][top], better[part][top])
    num_kept = 0
    for node in other_candidates():
        num_kept += count_true(~dropped[node])
        node = node[dropped[node]]
        decision.reason[node], decision.similarity[node] = NEAR, best[node]
    decision.guards["matches_kept"] = {"images_kept": num_kept}


def _pairs_by_priority(
    nodes: Nodes, max_pairs: int, copies: CopyPairs, priority: Priority
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of copies: the node with priority, the other node (no seed), their similarity."""
    dtype = node_type(len(nodes.image_ids))
    better, worse = on_disk(max_pairs, dtype), on_disk(max_pairs, dtype)
    similarity = on_disk(max_pairs, np.float32)
    count = 0
    for one, other, value in copies():
        in_order = has_priority(priority, one, other)
        one, other = np.where(in_order, one, other), np.where(in_order, other, one)
        chosen = ~nodes.is_seed[other]
        target = slice(count, count + count_true(chosen))
        better[target], worse[target], similarity[target] = one[chosen], other[chosen], value[chosen]
        count = target.stop
    return better[:count], worse[:count], similarity[:count]


def _copies_of_kept(num_nodes: int, better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """Which nodes, (N,) bool, are dropped: the nodes with an edge to a better node that is kept.

    Works in rounds. A node without a better neighbour is kept, the worse neighbours of a kept node are dropped, and the
    edges of dropped nodes are removed. The result equals a pass over all nodes from the best to the worst. Mostly it
    takes a small number of rounds (G. E. Blelloch and others, "Greedy sequential maximal independent set and matching
    are parallel on average", 2012).
    """
    dropped, has_better = on_disk(num_nodes, bool), on_disk(num_nodes, bool)
    remaining_better, remaining_worse = (on_disk(len(better), better.dtype) for _ in range(2))
    for part in blocks(len(better)):
        remaining_better[part], remaining_worse[part] = better[part], worse[part]
    num_remaining = len(better)
    while num_remaining:
        for part in blocks(num_remaining):
            has_better[remaining_worse[part]] = True
        for part in blocks(num_remaining):
            dropped[remaining_worse[part][~has_better[remaining_better[part]]]] = True
        count = 0
        for part in blocks(num_remaining):
            one, other = remaining_better[part], remaining_worse[part]
            has_better[other] = False
            remains = ~dropped[one] & ~dropped[other]
            target = slice(count, count + count_true(remains))
            remaining_better[target], remaining_worse[target] = one[remains], other[remains]
            count = target.stop
        num_remaining = count
    return dropped


# Facts for the report


def sweep_thresholds(config: DedupConfig, min_threshold: float) -> list[float]:
    """The rising thresholds of the sweep: multiples of SWEEP_STEP and the two thresholds of `config`, below 1.

    The first is the multiple at or just below `min_threshold`. Other multiples less than half a step from a threshold
    of `config` are left out.
    """
    first = max(int(np.floor(min_threshold / SWEEP_STEP + 1e-9)), 0)
    last = round(1 / SWEEP_STEP) - 1
    grid = [round(number * SWEEP_STEP, 6) for number in range(min(first, last), last + 1)]
    configured = [config.threshold, config.holdout_threshold]
    inner = {edge for edge in grid[1:] if all(abs(edge - threshold) >= SWEEP_STEP / 2 for threshold in configured)}
    return [grid[0], *sorted(inner | {threshold for threshold in configured if grid[0] < threshold < 1})]


def _sweep(
    config: DedupConfig, nodes: Nodes, edges: Edges, may_connect: np.ndarray, min_threshold: float
) -> list[dict[str, float | int]]:
    """Counts of the components at each threshold, the lowest first; one union from the highest threshold down.

    `dropped` counts the images that are dropped when each component keeps all its seeds, or one image without a seed.
    """
    num_nodes = len(nodes.image_ids)
    parent = on_disk(num_nodes, edges.first.dtype)
    separate(parent)
    rows: list[dict[str, float | int]] = []
    num_pairs, previous_threshold = 0, np.inf
    for threshold in reversed(sweep_thresholds(config, min_threshold)):
        for part in blocks(len(edges.first)):
            value = edges.similarity[part]
            band = may_connect[part] & (value >= threshold) & (value < previous_threshold)
            unite(parent, edges.first[part][band], edges.second[part][band])
            num_pairs += count_true(band)
        previous_threshold = threshold
        sizes, has_seed = component_sizes(flatten(parent)), on_disk(num_nodes, bool)
        num_not_roots = num_components = largest = num_seeds = 0
        for part in blocks(num_nodes):
            has_seed[parent[part][nodes.is_seed[part]]] = True
            num_seeds += count_true(nodes.is_seed[part])
            num_not_roots += count_true(sizes[part] == 0)
            num_components += count_true(sizes[part] > 1)
            largest = max(largest, int(sizes[part].max()))
        num_further_seeds = num_seeds - sum(count_true(has_seed[part]) for part in blocks(num_nodes))
        rows.append(
            {
                "threshold": threshold,
                "pairs": num_pairs,
                "components_of_two_or_more": num_components,
                "dropped": num_not_roots - num_further_seeds,
                "largest_component": largest,
            }
        )
    return rows[::-1]


def _stop_at_lookalikes(
    config: DedupConfig, graph: DuplicateGraph, lookalikes: Sequence[Lookalikes], show_pairs: ShowPairs | None
) -> str:
    """The message on the sources. Their pairs are shown where `show_pairs` is given."""
    where = ""
    if show_pairs is not None:
        pairs_of = {}
        for alike in lookalikes:
            number = graph.sources.index(alike.source)
            pairs = pairs_of_source(graph.nodes, graph.edges, number, config.threshold)
            ends = np.array([pair[:2] for pair in pairs], np.int64).reshape(-1, 2).T
            one, other = (unpack_ids(graph.nodes.image_ids[nodes]).to_pylist() for nodes in ends)
            pairs_of[alike.source] = list(zip(one, other, [pair[2] for pair in pairs], strict=True))
        where = f" Look at their pairs in {show_pairs(lookalikes, pairs_of)}."
    shares = ", ".join(
        f"'{alike.source}' ({alike.crowded / alike.images:.0%} of {alike.images:,} images have {CROWDED} or more "
        f"neighbours at the threshold {config.threshold:g})"
        for alike in lookalikes
    )
    return (
        f"dedup: images look alike, so that no score tells copies from other images: {shares}. Nothing was dropped."
        f"{where} If they are copies, go on with --set dedup.lookalikes=drop. If they are different images, go on with "
        "--set dedup.lookalikes=exact: of these sources, only equal files and matches with the holdout are dropped."
    )


def _facts(graph: DuplicateGraph, decision: Decision, lookalikes: Sequence[Lookalikes]) -> dict[str, Any]:
    """The facts of the manifest: counts, the largest components, the effect of each guard, the threshold sweep."""
    sizes = component_sizes(decision.component)
    histogram: dict[int, int] = {}
    largest: list[tuple[int, int]] = []
    for part in blocks(len(sizes)):
        roots = part.start + np.flatnonzero(sizes[part] > 1)
        for size, count in zip(*np.unique(sizes[roots], return_counts=True), strict=True):
            histogram[int(size)] = histogram.get(int(size), 0) + int(count)
        largest_here = roots[np.lexsort((roots, -sizes[roots]))][:LARGEST_COMPONENTS]
        candidates = [(-int(sizes[root]), int(root)) for root in largest_here]
        largest = heapq.nsmallest(LARGEST_COMPONENTS, largest + candidates)
    names = unpack_ids(graph.nodes.image_ids[[root for _, root in largest]]).to_pylist() if largest else []
    return {
        "unique_images": len(sizes),
        "components_of_two_or_more": sum(histogram.values()),
        "largest_components": [[name, -size] for name, (size, _) in zip(names, largest, strict=True)],
        "component_sizes": {str(size): histogram[size] for size in sorted(histogram)},
        "guards": decision.guards,
        "label_conflicts": {"images": graph.label_conflicts[0], "examples": graph.label_conflicts[1]},
        "threshold_sweep": decision.sweep,
        "lookalikes": [
            {**asdict(each), "holdout_matches": _num_holdout_matches(graph, decision, each.source)}
            for each in lookalikes
        ],
    }


def _num_holdout_matches(graph: DuplicateGraph, decision: Decision, source: str) -> int:
    """The images of a source that were dropped because they match the holdout."""
    number, nodes = graph.sources.index(source), graph.nodes
    return sum(
        count_true((decision.reason[part] == HOLDOUT) & (nodes.source[part] == number) & ~nodes.is_holdout[part])
        for part in blocks(len(nodes.image_ids))
    )


def _decided_rows(
    table: pa.Table, rows: slice, graph: DuplicateGraph, decision: Decision
) -> tuple[pa.Table, np.ndarray]:
    """The decided rows of one shard, and the number of the reason of each row.

    `table` holds the ingest rows of the shard; `rows` are their numbers among all rows of ingest.
    """
    node = graph.node_of_row[rows]
    assert (graph.nodes.image_ids[node] == pack_ids(table["image_id"])).all(), "ingest has changed under this stage"
    reason, matched, similarity = (column[node] for column in (decision.reason, decision.matched, decision.similarity))
    is_exact_copy = graph.row_of_node[node] != np.arange(rows.start, rows.stop)
    copied_node = node[is_exact_copy]
    reason[is_exact_copy] = np.where(graph.nodes.is_holdout[copied_node], HOLDOUT, EXACT)
    matched[is_exact_copy], similarity[is_exact_copy] = copied_node, 1.0
    kept = matched < 0
    reason_names = pa.array(REASONS, pa.string())
    matched_ids = unpack_ids(
        graph.nodes.image_ids[matched]
    )  # the row of a kept image, at -1, is replaced by null below
    return pa.table(
        {
            "image_id": table["image_id"].combine_chunks(),
            "component_id": unpack_ids(graph.nodes.image_ids[decision.component[node]]),
            "kept": kept,
            "reason": reason_names.take(pa.array(reason)),
            "matched_image_id": pc.if_else(pa.array(kept), pa.scalar(None, pa.string()), matched_ids),
            "similarity": pa.array(similarity, mask=np.isnan(similarity)),
        },
        schema=schemas.DUPLICATES,
    ), reason


def _run_alone(config: DedupConfig, inputs: RunFolder, output: str, runner: Runner, *, replace: bool) -> Manifest:
    return run(config, inputs, output, replace=replace)


command_line = stage_command(
    "dedup",
    DedupConfig,
    _run_alone,
    "Decide which images are copies, and which are kept.",
    reads=("ingest", "pairs"),
    in_driver=True,
)


if __name__ == "__main__":
    from curation import dedup  # by its real name: otherwise each class would exist twice

    command.main(dedup.command_line)
