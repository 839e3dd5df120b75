"""Connected components of the duplicate graph: which images are, step by step, copies of one another."""

import numpy as np


def connected_components(num_nodes: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The smallest node of each node's component, (num_nodes,) int64, for undirected edges `first[i] - second[i]`.

    Every round hooks the larger root of each edge under the smaller and halves all paths, so the work is a few passes
    over the edges. The result does not depend on the order of the edges.
    """
    parent = np.arange(num_nodes, dtype=np.int64)
    first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
    while True:
        while not np.array_equal(grand := parent[parent], parent):
            parent = grand
        root_a, root_b = parent[first], parent[second]
        open_edges = root_a != root_b
        if not open_edges.any():
            return parent
        first, second, root_a, root_b = first[open_edges], second[open_edges], root_a[open_edges], root_b[open_edges]
        np.minimum.at(parent, np.maximum(root_a, root_b), np.minimum(root_a, root_b))


def component_sizes(components: np.ndarray) -> np.ndarray:
    """The number of nodes in each node's component, (num_nodes,) int64."""
    sizes: np.ndarray = np.bincount(components, minlength=len(components))[components]
    return sizes


def family_edges(
    first: np.ndarray,
    second: np.ndarray,
    similarity: np.ndarray,
    differs_locally: np.ndarray,
    *,
    sure: float,
    margin: float,
    local_margin: float,
) -> np.ndarray:
    """Which edges, (E,) bool, join members of a family rather than copies.

    Road signs with other symbols, or faces with other mouths, resemble one another as much as a picture resembles its
    copy with something laid over. But a copy has one original, and a member of a family has many relatives. So an edge
    is of a family when an end has a rival: an edge nearly as similar to a third image that is not the same picture
    as either end (joined to it by edges of similarity `sure` that do not differ locally). Where the pair differs
    locally one such end is enough; else both must have a rival. Rivals count when they are at most `local_margin` or
    `margin` less similar. Sure edges are never of a family.
    """
    is_sure = (similarity >= sure) & ~differs_locally
    num_nodes = int(max(first.max(initial=-1), second.max(initial=-1))) + 1
    same = connected_components(num_nodes, first[is_sure], second[is_sure])
    neighbors: dict[int, list[tuple[int, float]]] = {}
    for one, other, value in zip(first.tolist(), second.tolist(), similarity.tolist(), strict=True):
        neighbors.setdefault(one, []).append((other, value))
        neighbors.setdefault(other, []).append((one, value))

    def has_rival(node: int, partner: int, least: float) -> bool:
        known = (same[node], same[partner])
        return any(value >= least and same[third] not in known for third, value in neighbors[node])

    result = np.zeros(len(first), bool)
    for edge in np.flatnonzero(~is_sure):
        one, other = int(first[edge]), int(second[edge])
        local = bool(differs_locally[edge])
        least = float(similarity[edge]) - (local_margin if local else margin)
        rivals = has_rival(one, other, least), has_rival(other, one, least)
        result[edge] = any(rivals) if local else all(rivals)
    return result
