"""Connected components: equal to scipy's, whatever the order of the edges."""

import numpy as np
import pytest
from scipy.sparse import coo_matrix, csgraph

from curation.graph import component_sizes, connected_components, family_edges

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


def family(edges: list[tuple[int, int, float, bool]]) -> list[bool]:
    first, second, similarity, local = (np.array(column) for column in zip(*edges, strict=True))
    marked = family_edges(first, second, similarity, local.astype(bool), sure=0.9, margin=0.1, local_margin=0.05)
    return marked.tolist()


def test_lone_pair_with_an_overlay_is_of_copies() -> None:
    assert family([(0, 1, 0.8, True)]) == [False]


def test_pictures_that_all_resemble_one_another_are_a_family() -> None:
    assert family([(0, 1, 0.8, True), (0, 2, 0.8, True), (1, 2, 0.79, True)]) == [True, True, True]


def test_copies_of_one_picture_are_no_rivals_of_each_other() -> None:
    # 1 is surely 2; 0 is either of them with something laid over.
    assert family([(1, 2, 0.99, False), (0, 1, 0.8, True), (0, 2, 0.8, True)]) == [False, False, False]


def test_pair_without_a_local_difference_needs_rivals_at_both_ends() -> None:
    assert family([(0, 1, 0.7, False), (1, 2, 0.7, False)]) == [False, False]
    chain = [(0, 1, 0.7, False), (1, 2, 0.7, False), (2, 3, 0.7, False)]
    assert family(chain) == [False, True, False]


def test_no_edges_have_no_family() -> None:
    empty = np.array([], np.int64)
    nothing = np.array([], bool)
    marked = family_edges(empty, empty, empty.astype(float), nothing, sure=0.9, margin=0.1, local_margin=0.1)
    assert len(marked) == 0
