"""The algorithms of the duplicate graph: connected components of copies, and edges that join a family.

Nodes are numbered images; edges are pairs of nodes. All arrays over nodes or edges may lie on disk
(`disk_arrays.on_disk`). They are read in blocks of `disk_arrays.BLOCK`, so memory does not grow with the graph.

Legend: N nodes, E edges.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from curation.files.disk_arrays import blocks, on_disk

# Images connected by sure edges from which a picture counts as much copied; its further copies are then no family.
# Measured 2026-11: 30 edited copies of each of 13 photographs stay together, and of 247 drawings of the demo that
# families would keep apart without this rule, 220 still are; with 2 images instead of 3, 140.
COPIED_OFTEN = 3


def node_type(num_nodes: int) -> type[np.signedinteger]:
    """The type of a node's number: int32 where it fits, since half the bytes mean half the cache misses."""
    return np.int32 if num_nodes <= np.iinfo(np.int32).max else np.int64


def connected_components(
    num_nodes: int, edges: Iterable[tuple[np.ndarray, np.ndarray]], *, parent: np.ndarray | None = None
) -> np.ndarray:
    """The smallest node of each node's component, (N,), for undirected edges `first[i] - second[i]`.

    `edges` yields blocks (first, second) of any size, each read once. The result is written into `parent` where it is
    given, for example an array on disk. It depends neither on the order of the edges nor on the blocks.
    """
    if parent is None:
        parent = np.empty(num_nodes, node_type(num_nodes))
    assert parent.shape == (num_nodes,), (parent.shape, num_nodes)
    separate(parent)
    for first, second in edges:
        unite(parent, first, second)
    return flatten(parent)


# A forest over the nodes: parent[node] <= node. A root is its own parent and the smallest node of its tree.


def separate(parent: np.ndarray) -> None:
    """Make every node a root."""
    for part in blocks(len(parent)):
        parent[part] = np.arange(part.start, part.stop)


def unite(parent: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Unite the trees of the two ends of each edge, in place."""
    for part in blocks(len(first)):
        _unite_roots(parent, _roots(parent, first[part]), _roots(parent, second[part]))


def flatten(parent: np.ndarray) -> np.ndarray:
    """Point every node at its root, in place; returns `parent`."""
    for part in blocks(len(parent)):
        block = parent[part]  # a view; earlier blocks are flat, so only steps inside this block remain
        while not np.array_equal(above := parent[block], block):
            block[:] = above
    return parent


def _roots(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node. Paths longer than one step are halved on the way."""
    nodes = nodes.astype(np.intp, copy=False)
    roots: np.ndarray = parent[nodes]
    deep = np.flatnonzero(parent[roots] != roots)
    at = nodes[deep]
    while len(at):
        above = parent[at]
        grand = parent[above]
        if np.array_equal(above, grand):
            roots[deep] = above
            break
        parent[at] = grand
        at = grand
    return roots


def _unite_roots(parent: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Unite pairs of roots. In each round, every root is hooked under the smallest root that it shares an edge with.

    The trees are flattened after each round. So there are O(log^2 N) rounds, most of them on few edges (Liu and Tarjan,
    "Simple concurrent labeling algorithms for connected components", 2019).
    """
    while len(still_open := np.flatnonzero(one != other)):
        one, other = one[still_open], other[still_open]
        low, high = np.minimum(one, other), np.maximum(one, other)
        np.minimum.at(parent, high, low)
        hooked = high
        while len(hooked):
            above = parent[hooked]
            root = parent[above]
            moved = np.flatnonzero(above != root)
            hooked = hooked[moved]
            parent[hooked] = root[moved]
        one, other = parent[low], parent[high]


def component_sizes(component: np.ndarray) -> np.ndarray:
    """The number of nodes of each component, (N,) on disk: at its smallest node, and 0 at all other nodes."""
    sizes = on_disk(len(component), component.dtype)
    for part in blocks(len(component)):
        np.add.at(sizes, component[part], sizes.dtype.type(1))  # another type would take 20 times as long
    return sizes


def family_edges(
    num_nodes: int,
    first: np.ndarray,
    second: np.ndarray,
    similarity: np.ndarray,
    differs_locally: np.ndarray,
    *,
    threshold: float,
    sure: float,
    margin: float,
    local_margin: float,
) -> np.ndarray:
    """Whether each edge joins members of a family rather than copies, (E,) bool on disk.

    Road signs with different symbols, or faces with different mouths, resemble one another as much as a picture
    resembles its copy with an overlay. But a copy has one original, while a member of a family has many relatives.

    A sure edge has a similarity of at least `sure` and does not differ locally; images connected by sure edges show one
    picture. A picture of COPIED_OFTEN images or more also includes the images of less copied pictures that have an edge
    to it of at least `threshold`; of several such pictures, the most similar one. So all that verifies against a much
    copied picture is one picture, however many copies there are. A rival of an edge, at one of its ends, is another
    edge from that end to a third picture, and nearly as similar: at most `local_margin` less when the edge differs
    locally, else at most `margin` less. An edge is a family edge when it has rivals at both ends, or at one end when it
    differs locally. Edges inside a picture are never family edges.
    """

    def is_sure(part: slice) -> np.ndarray:
        result: np.ndarray = (similarity[part] >= sure) & ~differs_locally[part]
        return result

    sure_edges = ((first[part][is_sure(part)], second[part][is_sure(part)]) for part in blocks(len(first)))
    sure_picture = connected_components(num_nodes, sure_edges, parent=on_disk(num_nodes, node_type(num_nodes)))
    same = _with_further_copies(sure_picture, first, second, similarity, threshold)

    def edges_between_pictures() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each end of each edge between two pictures: its node, and picture and similarity of the other end."""
        for part in blocks(len(first)):
            one, other, value = same[first[part]], same[second[part]], similarity[part]
            apart = one != other
            yield first[part][apart], other[apart], value[apart]
            yield second[part][apart], one[apart], value[apart]

    # The picture most similar to each node, and the next most similar picture. The first is the candidate for a rival
    # unless it is the picture at the other end of the edge; then the second is. Of equally similar pictures any may
    # count as the first, since the second is equally similar.
    best = on_disk(num_nodes, similarity.dtype, fill=-np.inf)
    best_picture = on_disk(num_nodes, same.dtype, fill=-1)
    next_best = on_disk(num_nodes, similarity.dtype, fill=-np.inf)
    for node, _, value in edges_between_pictures():
        np.maximum.at(best, node, value)
    for node, picture, value in edges_between_pictures():
        top = value == best[node]
        best_picture[node[top]] = picture[top]
    for node, picture, value in edges_between_pictures():
        rest = picture != best_picture[node]
        np.maximum.at(next_best, node[rest], value[rest])

    result = on_disk(len(first), bool)
    for part in blocks(len(first)):
        local = differs_locally[part]
        min_similarity = similarity[part].astype(np.float64) - np.where(local, local_margin, margin)
        rivals = [
            np.where(best_picture[node] != same[partner], best[node], next_best[node]) >= min_similarity
            for node, partner in ((first[part], second[part]), (second[part], first[part]))
        ]
        apart = same[first[part]] != same[second[part]]
        result[part] = apart & np.where(local, rivals[0] | rivals[1], rivals[0] & rivals[1])
    return result


def _with_further_copies(
    picture: np.ndarray, first: np.ndarray, second: np.ndarray, similarity: np.ndarray, threshold: float
) -> np.ndarray:
    """The picture of each node, (N,) on disk, after much copied pictures take in their further copies."""
    num_nodes = len(picture)
    sizes = component_sizes(picture)

    def edges_to_much_copied() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """In blocks: nodes of other pictures, the much copied picture at the other end, and the similarity."""
        for part in blocks(len(first)):
            for node, partner in ((first[part], second[part]), (second[part], first[part])):
                is_copied_often = sizes[picture[partner]] >= COPIED_OFTEN
                chosen = is_copied_often & (sizes[picture[node]] < COPIED_OFTEN) & (similarity[part] >= threshold)
                yield node[chosen], picture[partner[chosen]], similarity[part][chosen]

    best = on_disk(num_nodes, similarity.dtype, fill=-np.inf)
    for node, _, value in edges_to_much_copied():
        np.maximum.at(best, node, value)
    nearest = on_disk(num_nodes, picture.dtype, fill=num_nodes)  # num_nodes: none
    for node, other, value in edges_to_much_copied():
        top = value == best[node]
        np.minimum.at(nearest, node[top], other[top])
    result = on_disk(num_nodes, picture.dtype)
    for part in blocks(num_nodes):
        result[part] = np.where(nearest[part] < num_nodes, nearest[part], picture[part])
    return result
