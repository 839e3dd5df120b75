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
