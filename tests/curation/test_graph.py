"""Connected components: equal to scipy's, whatever the order of the edges."""

import numpy as np
import pytest
from scipy.sparse import coo_matrix, csgraph

from curation.graph import component_sizes, connected_components

EMPTY = np.empty(0, np.int64)


def by_scipy(num_nodes: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The smallest node of each node's component."""
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(num_nodes, num_nodes))
    labels = csgraph.connected_components(graph, directed=False)[1]
    smallest = np.full(num_nodes, num_nodes)
    np.minimum.at(smallest, labels, np.arange(num_nodes))
    return smallest[labels]


def check(num_nodes: int, first: np.ndarray, second: np.ndarray) -> None:
    found = connected_components(num_nodes, first, second)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, by_scipy(num_nodes, first, second))


def test_no_nodes_no_edges_one_node() -> None:
    assert connected_components(0, EMPTY, EMPTY).shape == (0,)
    assert component_sizes(EMPTY).shape == (0,)
    assert connected_components(3, EMPTY, EMPTY).tolist() == [0, 1, 2]
    assert connected_components(3, np.array([]), np.array([])).tolist() == [0, 1, 2]
    assert connected_components(1, np.array([0]), np.array([0])).tolist() == [0]


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_nodes = int(rng.integers(1, 300))
    num_edges = int(rng.integers(0, 2 * num_nodes))  # around one edge a node, where components grow large
    first, second = rng.integers(0, num_nodes, (2, num_edges))
    check(num_nodes, first, second)


@pytest.mark.parametrize("seed", range(10))
def test_chains_stars_cliques_and_trees_under_any_numbering(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = np.arange(500)
    chain = nodes[:-1], nodes[1:]
    star = np.zeros(499, np.int64), nodes[1:]
    tree = nodes[1:], (nodes[1:] - 1) // 2
    combs = nodes[:-2], np.where(nodes[:-2] % 2, nodes[2:], nodes[1:-1])
    clique = np.nonzero(np.ones((20, 20)))
    for first, second in (chain, chain[::-1], star, tree, combs, clique):
        check(500, first, second)
        names = rng.permutation(500)
        check(500, names[first], names[second])


@pytest.mark.parametrize("seed", range(10))
def test_order_direction_and_repetition_of_edges_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, 80, (2, 60))
    expected = connected_components(80, *edges)
    shuffled = edges[:, rng.permutation(60)]
    turned = np.where(rng.random(60) < 0.5, shuffled, shuffled[::-1])
    repeated = np.concatenate([turned, turned[::-1], np.tile(np.arange(80), (2, 1))], axis=1)
    for other in (shuffled, turned, repeated, repeated.astype(np.int32)):
        np.testing.assert_array_equal(connected_components(80, *other), expected)


def test_arguments_stay_as_they_were() -> None:
    first, second = np.array([3, 1]), np.array([1, 0])
    connected_components(4, first, second)
    assert first.tolist() == [3, 1] and second.tolist() == [1, 0]


def test_long_chain_takes_few_rounds() -> None:
    """A chain of 200,000 in random order: what takes a round per link would not end."""
    order = np.random.default_rng(0).permutation(200_000)
    assert not connected_components(200_000, order[:-1], order[1:]).any()


@pytest.mark.parametrize("seed", range(5))
def test_sizes_count_each_component(seed: int) -> None:
    rng = np.random.default_rng(seed)
    component = connected_components(50, *rng.integers(0, 50, (2, 30)))
    sizes = component_sizes(component)
    assert sizes.tolist() == [int((component == own).sum()) for own in component]
