"""The duplicate graph's algorithms: which images are, step by step, copies of one another, and which are only a family.

Nodes are images, numbered; edges are pairs of them. All arrays over nodes or edges may lie on disk (scratch.on_disk):
they are walked in blocks of `scratch.BLOCK`, so memory does not grow with them.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from curation.files.disk_arrays import blocks, on_disk


def node_type(num_nodes: int) -> type[np.signedinteger]:
    """The type of a node's number: int32 where it fits, since half the bytes are half the cache misses."""
    return np.int32 if num_nodes <= np.iinfo(np.int32).max else np.int64


def connected_components(
    num_nodes: int, edges: Iterable[tuple[np.ndarray, np.ndarray]], *, parent: np.ndarray | None = None
) -> np.ndarray:
    """The smallest node of each node's component, (num_nodes,), for undirected edges `first[i] - second[i]`.

    `edges` yields blocks (first, second) of any size, each read once. The result is written into `parent` where one is
    given, such as an array on disk. It depends on neither the order of the edges nor on the blocks.
    """
    if parent is None:
        parent = np.empty(num_nodes, node_type(num_nodes))
    assert parent.shape == (num_nodes,), (parent.shape, num_nodes)
    separate(parent)
    for first, second in edges:
        unite(parent, first, second)
    return flatten(parent)


# A forest over the nodes: parent[node] <= node, and a root, its own parent, is the smallest node of its tree.


def separate(parent: np.ndarray) -> None:
    """Make every node a root."""
    for part in blocks(len(parent)):
        parent[part] = np.arange(part.start, part.stop)


def unite(parent: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Join the trees of each edge's two ends, in place."""
    for part in blocks(len(first)):
        _unite_roots(parent, _roots(parent, first[part]), _roots(parent, second[part]))


def flatten(parent: np.ndarray) -> np.ndarray:
    """Point every node at its root, in place; returns `parent`."""
    for part in blocks(len(parent)):
        own = parent[part]  # a view: what lies before is flat, so only steps inside the block are left
        while not np.array_equal(above := parent[own], own):
            own[:] = above
    return parent


def _roots(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node. Paths of more than a step are halved on the way."""
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
    """Join pairs of roots: each is hooked under the smallest that it shares an edge with, round after round.

    With the trees flattened after each round this takes O(log^2 n) rounds (Liu and Tarjan, "Simple concurrent labeling
    algorithms for connected components", 2019), most of them on few edges.
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
    """How many nodes each component has, (N,) on disk at its smallest node, 0 at all others."""
    sizes = on_disk(len(component), component.dtype)
    for part in blocks(len(component)):
        np.add.at(sizes, component[part], sizes.dtype.type(1))  # of the same type, or it takes 20 times as long
    return sizes


def family_edges(
    num_nodes: int,
    first: np.ndarray,
    second: np.ndarray,
    similarity: np.ndarray,
    differs_locally: np.ndarray,
    *,
    sure: float,
    margin: float,
    local_margin: float,
) -> np.ndarray:
    """Which edges, (E,) bool on disk, join members of a family rather than copies.

    Road signs with other symbols, or faces with other mouths, resemble one another as much as a picture resembles its
    copy with something laid over. But a copy has one original, and a member of a family has many relatives. So an edge
    is of a family when an end has a rival: an edge nearly as similar to a third image that is not the same picture
    as either end (joined to it by edges of similarity `sure` that do not differ locally). Where the pair differs
    locally one such end is enough; else both must have a rival. Rivals count when they are at most `local_margin` or
    `margin` less similar. Sure edges are never of a family.
    """

    def is_sure(part: slice) -> np.ndarray:
        result: np.ndarray = (similarity[part] >= sure) & ~differs_locally[part]
        return result

    sure_edges = ((first[part][is_sure(part)], second[part][is_sure(part)]) for part in blocks(len(first)))
    same = connected_components(num_nodes, sure_edges, parent=on_disk(num_nodes, node_type(num_nodes)))

    def strangers() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """From each end of each edge, the node, and picture and similarity of a neighbour that is another picture."""
        for part in blocks(len(first)):
            one, other, value = same[first[part]], same[second[part]], similarity[part]
            apart = one != other
            yield first[part][apart], other[apart], value[apart]
            yield second[part][apart], one[apart], value[apart]

    # The most similar stranger of each node, and the most similar one that is yet another picture: the first is a
    # rival, unless it is the very picture at the other end of the edge; then the second is. Of equally similar
    # strangers any may count as the first: the second is as similar.
    best = on_disk(num_nodes, similarity.dtype, fill=-np.inf)
    best_picture = on_disk(num_nodes, same.dtype, fill=-1)
    next_best = on_disk(num_nodes, similarity.dtype, fill=-np.inf)
    for node, _, value in strangers():
        np.maximum.at(best, node, value)
    for node, picture, value in strangers():
        top = value == best[node]
        best_picture[node[top]] = picture[top]
    for node, picture, value in strangers():
        rest = picture != best_picture[node]
        np.maximum.at(next_best, node[rest], value[rest])

    result = on_disk(len(first), bool)
    for part in blocks(len(first)):
        local = differs_locally[part]
        least = similarity[part].astype(np.float64) - np.where(local, local_margin, margin)
        rivals = [
            np.where(best_picture[node] != same[partner], best[node], next_best[node]) >= least
            for node, partner in ((first[part], second[part]), (second[part], first[part]))
        ]
        result[part] = ~is_sure(part) & np.where(local, rivals[0] | rivals[1], rivals[0] & rivals[1])
    return result
