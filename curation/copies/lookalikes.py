"""Sources whose images look alike although they are not copies: solar cells, sheets of one fabric, frames of a video.

Among such images no score tells copies from others, so dedup would drop images for their look-alikes. Each source with
the role `seed` or `pool` is judged by two signs; an image belongs to the source of the row that represents it:

    no gap       the pairs within GAP of the threshold are nearly as many as the pairs above it. Copies have scores far
                 above the threshold and other pairs far below it, which leaves few between them. A threshold of
                 1 - GAP or more leaves no room above, so this sign is not judged
    one group    a large part of the source is connected into one component. Copies of one picture are seldom a large
                 part of a source, and copies of several pictures form several components

An image counts only with CROWDED neighbours or more at the threshold. Measured 2026-11 with the thresholds of the
profiles, as the share of crowded images, their pairs near the threshold to those above, and the share of the source
that is crowded in one component:

    60 rendered solar cells, 12 of them defective       1.00    0.07    1.00    one group
    50 rendered frames of a moving object, with noise   1.00    1.34    1.00    both signs
    40 frames of one camera (visp-images-data: castel)  0.80    0.00    0.80    one group
    40 crops of one texture                             0.75    0.00    0.75    one group
    2,550 drawings of the demo, at 0.67                 0.12    0.72    0.10    no gap
    1,823 photographs and copies of them, 4 to 5 each   0.05    0.10    0.00    neither
    13 photographs with 30 copies each                  0.71    0.19    0.07    neither
    one photograph with 30 copies, among 70 others      0.26    0.23    0.26    neither

Legend: N images, E pairs. Arrays over them lie on disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from curation.copies.components import connected_components, node_type
from curation.copies.duplicate_graph import Edges, Nodes
from curation.files.disk_arrays import blocks, on_disk
from curation.files.hashes import split_mix
from curation.search.top_k import top_k_of_groups

# Neighbours at the threshold from which an image is crowded. Assumed: most pictures have fewer copies in a pool.
CROWDED = 5
# Distance from the threshold within which a pair counts as near it. Assumed.
GAP = 0.1
# Ratio of the pairs near the threshold to the pairs above, from which there is no gap. Measured: see the table.
MAX_NEAR = 0.6
# Minimum share and number of crowded images of a source without a gap. Assumed.
MIN_SHARE, MIN_CROWDED = 0.1, 10
# Minimum share of a source, and number of its crowded images, in one component. Assumed: above the 30 copies of a much
# copied picture in a pool of 100.
GROUP_SHARE, MIN_GROUP = 1 / 3, 20

# Ranges of similarity, and pairs of each, that are shown of a source. Assumed: a page to look through in a minute.
NUM_RANGES, PAIRS_PER_RANGE = 8, 6


@dataclass(frozen=True)
class Lookalikes:
    """A source whose images look alike."""

    source: str
    images: int
    crowded: int
    """Images with CROWDED neighbours or more at the threshold."""
    near_threshold: int
    above: int
    """Pairs of crowded images within GAP of the threshold, and above."""
    largest_group: int
    """Crowded images of the largest component."""


def find_lookalikes(nodes: Nodes, edges: Edges, sources: tuple[str, ...], threshold: float) -> list[Lookalikes]:
    """The sources whose images look alike, in the order of `sources`."""
    num_nodes = len(nodes.image_ids)
    num_neighbors = on_disk(num_nodes, np.int32)

    def pairs(least: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """In blocks: the pairs of seeds and pool images from a similarity of `least`."""
        for part in blocks(len(edges.first)):
            one, other, value = edges.first[part], edges.second[part], edges.similarity[part]
            chosen = (value >= least) & (one != other) & ~nodes.is_holdout[one] & ~nodes.is_holdout[other]
            yield one[chosen], other[chosen], value[chosen]

    for one, other, _ in pairs(threshold):
        np.add.at(num_neighbors, one, 1)
        np.add.at(num_neighbors, other, 1)
    num_images, num_crowded, near, above = (np.zeros(len(sources), np.int64) for _ in range(4))
    for part in blocks(num_nodes):
        source = nodes.source[part]
        is_counted = ~nodes.is_holdout[part]
        num_images += np.bincount(source[is_counted], minlength=len(sources))
        num_crowded += np.bincount(source[is_counted & (num_neighbors[part] >= CROWDED)], minlength=len(sources))
    for one, other, value in pairs(threshold - GAP):
        is_near = value < threshold + GAP
        for node in (one, other):
            is_crowded = num_neighbors[node] >= CROWDED
            for counts, chosen in ((near, is_near), (above, ~is_near)):
                counts += np.bincount(nodes.source[node[is_crowded & chosen]], minlength=len(sources))
    component = on_disk(num_nodes, node_type(num_nodes))
    connected_components(num_nodes, ((one, other) for one, other, _ in pairs(threshold)), parent=component)
    result = []
    for number in range(len(sources)):
        images, crowded = int(num_images[number]), int(num_crowded[number])
        if crowded < MIN_CROWDED or crowded < MIN_SHARE * images:
            continue
        group = _largest_group(component, num_neighbors, nodes, number)
        has_no_gap = threshold + GAP < 1 and near[number] >= MAX_NEAR * above[number]
        if has_no_gap or (group >= MIN_GROUP and group >= GROUP_SHARE * images):
            pairs_of_crowded = int(near[number]), int(above[number])
            result.append(Lookalikes(sources[number], images, crowded, *pairs_of_crowded, group))
    return result


def joins_lookalikes(nodes: Nodes, edges: Edges, is_alike: np.ndarray, part: slice) -> np.ndarray:
    """Which edges of `part` join two seeds or pool images, one of them in a source of `is_alike` (S,)."""
    one, other = edges.first[part], edges.second[part]
    result: np.ndarray = is_alike[nodes.source[one]] | is_alike[nodes.source[other]]
    result &= ~nodes.is_holdout[one] & ~nodes.is_holdout[other] & (one != other)
    return result


def pairs_of_source(nodes: Nodes, edges: Edges, source: int, threshold: float) -> list[tuple[int, int, float]]:
    """Some pairs of seeds and pool images with an image of a source, by rising similarity, from GAP below `threshold`.

    They are spread over the similarities, and in each part of the range chosen by a hash of their nodes.
    """
    bounds = np.linspace(threshold - GAP, 1, NUM_RANGES + 1)[:-1].astype(np.float32)
    chosen: list[list[tuple[int, int, int, float]]] = [[] for _ in bounds]
    is_alike = np.arange(int(nodes.source.max(initial=0)) + 1) == source
    for part in blocks(len(edges.first)):
        position = np.flatnonzero(
            joins_lookalikes(nodes, edges, is_alike, part) & (edges.similarity[part] >= bounds[0])
        )
        first, second, similarity = (column[part][position] for column in (edges.first, edges.second, edges.similarity))
        number = np.searchsorted(bounds, similarity, side="right") - 1
        low, high = np.minimum(first, second).astype(np.uint64), np.maximum(first, second).astype(np.uint64)
        order = split_mix(split_mix(low) ^ high)
        for row in top_k_of_groups(number, PAIRS_PER_RANGE, order, first, second).tolist():
            ends = int(min(first[row], second[row])), int(max(first[row], second[row]))
            chosen[number[row]].append((int(order[row]), *ends, float(similarity[row])))
        chosen = [sorted(pairs)[:PAIRS_PER_RANGE] for pairs in chosen]
    result = [(one, other, similarity) for pairs in chosen for _, one, other, similarity in pairs]
    return sorted(result, key=lambda pair: (pair[2], pair[:2]))


def _largest_group(component: np.ndarray, num_neighbors: np.ndarray, nodes: Nodes, source: int) -> int:
    """The largest number of crowded images of a source in one component."""
    sizes = on_disk(len(component), np.int32)
    for part in blocks(len(component)):
        is_counted = (nodes.source[part] == source) & (num_neighbors[part] >= CROWDED) & ~nodes.is_holdout[part]
        np.add.at(sizes, component[part][is_counted], 1)
    return max((int(sizes[part].max()) for part in blocks(len(sizes))), default=0)
