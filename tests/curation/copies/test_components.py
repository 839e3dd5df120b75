"""Connected components equal scipy's for any order of the edges; family edges follow their rule."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_matrix, csgraph

from curation.copies.components import (
    COPIED_OFTEN,
    component_sizes,
    connected_components,
    family_edges,
    flatten,
    node_type,
    separate,
    unite,
)
from curation.files import disk_arrays

EMPTY = np.empty(0, np.int64)
MARGINS = {"threshold": 0.65, "sure": 0.9, "margin": 0.1, "local_margin": 0.05}


@pytest.fixture(params=[1, 3, 64, disk_arrays.BLOCK])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a test with several block sizes, from one edge to more than all edges."""
    monkeypatch.setattr(disk_arrays, "BLOCK", request.param)
    return int(request.param)


def by_scipy(num_nodes: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The smallest node of each node's component."""
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(num_nodes, num_nodes))
    labels = csgraph.connected_components(graph, directed=False)[1]
    smallest = np.full(num_nodes, num_nodes)
    np.minimum.at(smallest, labels, np.arange(num_nodes))
    return smallest[labels]


def components(num_nodes: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return connected_components(num_nodes, [(np.asarray(first), np.asarray(second))])


def check(num_nodes: int, first: np.ndarray, second: np.ndarray) -> None:
    component = components(num_nodes, first, second)
    assert component.dtype == np.int32
    np.testing.assert_array_equal(component, by_scipy(num_nodes, first, second))


def test_no_nodes_no_edges_and_one_node(block: int) -> None:
    assert connected_components(0, []).shape == (0,)
    assert components(0, EMPTY, EMPTY).shape == (0,)
    assert component_sizes(EMPTY).shape == (0,)
    assert components(3, EMPTY, EMPTY).tolist() == connected_components(3, []).tolist() == [0, 1, 2]
    assert components(3, np.array([]), np.array([])).tolist() == [0, 1, 2]
    assert components(1, np.array([0]), np.array([0])).tolist() == [0]


def test_nodes_take_eight_bytes_only_when_four_are_too_few() -> None:
    assert node_type(2**31 - 1) is np.int32
    assert node_type(2**31) is np.int64


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    num_nodes = int(rng.integers(1, 300))
    num_edges = int(rng.integers(0, 2 * num_nodes))  # about one edge a node, where large components appear
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
        numbers = rng.permutation(500)
        check(500, numbers[first], numbers[second])


@pytest.mark.parametrize("seed", range(10))
def test_order_direction_and_repetition_of_edges_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, 80, (2, 60))
    expected = components(80, *edges)
    shuffled = edges[:, rng.permutation(60)]
    turned = np.where(rng.random(60) < 0.5, shuffled, shuffled[::-1])
    repeated = np.concatenate([turned, turned[::-1], np.tile(np.arange(80), (2, 1))], axis=1)
    for other in (shuffled, turned, repeated, repeated.astype(np.int32)):
        np.testing.assert_array_equal(components(80, *other), expected)


def test_arguments_stay_as_they_were() -> None:
    first, second = np.array([3, 1]), np.array([1, 0])
    components(4, first, second)
    assert first.tolist() == [3, 1] and second.tolist() == [1, 0]


def test_long_chain_takes_few_rounds() -> None:
    """A chain of 200,000 nodes in random order; an algorithm with one round per link would take hours."""
    order = np.random.default_rng(0).permutation(200_000)
    assert not components(200_000, order[:-1], order[1:]).any()


def test_star_with_rays_in_order_takes_few_rounds() -> None:
    """The centre has the largest number; an algorithm that hooks it under one ray per round would take hours."""
    rays = np.arange(200_000)
    assert not components(200_001, rays, np.full(200_000, 200_000)).any()


@pytest.mark.parametrize("seed", range(10))
def test_edges_may_come_in_blocks_of_any_size_and_the_result_lie_on_disk(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 120, (2, 100))
    expected = by_scipy(120, first, second)
    cuts = np.sort(rng.integers(0, 100, 7))
    pieces = list(zip(np.split(first, cuts), np.split(second, cuts), strict=True))
    for order in (pieces, pieces[::-1], [(a[i : i + 1], b[i : i + 1]) for a, b in pieces for i in range(len(a))]):
        parent = disk_arrays.on_disk(120, np.int64, fill=7)
        assert connected_components(120, iter(order), parent=parent) is parent
        np.testing.assert_array_equal(parent, expected)


@pytest.mark.parametrize("seed", range(10))
def test_a_flat_forest_can_be_united_further(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, 60, (2, 50))
    parent = np.empty(60, np.int32)
    separate(parent)
    for stop in range(0, 51, 10):
        unite(parent, *edges[:, max(stop - 10, 0) : stop])
        assert (parent <= np.arange(60)).all(), "the root of a tree is its smallest node"
        np.testing.assert_array_equal(flatten(parent), by_scipy(60, *edges[:, :stop]))


MEASURE = """
import sys
import numpy as np
from curation.copies.components import connected_components
from curation.files.disk_arrays import on_disk

num_edges = int(sys.argv[1])

def anonymous_kilobytes():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1])

peak = 0

def edges():
    global peak
    for start in range(0, num_edges, 500_000):
        rng = np.random.default_rng(start)
        yield rng.integers(0, num_edges, (2, 500_000), dtype=np.int32)
        peak = max(peak, anonymous_kilobytes())

parent = connected_components(num_edges, edges(), parent=on_disk(num_edges, np.int32))
print(max(peak, anonymous_kilobytes()))
"""


def test_memory_does_not_grow_with_nodes_and_edges() -> None:
    """The anonymous memory of a process with 6 million nodes and edges is about that with 1 million."""
    root = str(Path(__file__).parents[3])
    kilobytes = [
        int(subprocess.run([sys.executable, "-c", MEASURE, str(n)], capture_output=True, check=True, cwd=root).stdout)
        for n in (1_000_000, 6_000_000)
    ]
    # In memory, 5 million nodes more would take 20 MB as int32 or 40 MB as int64; their edges 40 MB or 80 MB.
    assert kilobytes[1] < kilobytes[0] + 15_000


@pytest.mark.parametrize("seed", range(5))
def test_sizes_count_each_component(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    component = components(50, *rng.integers(0, 50, (2, 30)))
    sizes = component_sizes(component)
    assert sizes[component].tolist() == [int((component == root).sum()) for root in component]
    assert sizes.sum() == 50 and not sizes[component != np.arange(50)].any()


def family(edges: list[tuple[int, int, float, bool]]) -> list[bool]:
    first, second, similarity, local = (np.array(column) for column in zip(*edges, strict=True))
    return family_edges(20, first, second, similarity, local.astype(bool), **MARGINS).tolist()


def test_single_pair_with_an_overlay_is_a_pair_of_copies() -> None:
    assert family([(0, 1, 0.8, True)]) == [False]


def test_pictures_that_all_resemble_one_another_are_a_family() -> None:
    assert family([(0, 1, 0.8, True), (0, 2, 0.8, True), (1, 2, 0.79, True)]) == [True, True, True]


def test_copies_of_one_picture_are_not_rivals_of_each_other() -> None:
    # 1 and 2 show one picture for sure; 0 is a copy of it with an overlay.
    assert family([(1, 2, 0.99, False), (0, 1, 0.8, True), (0, 2, 0.8, True)]) == [False, False, False]


@pytest.mark.parametrize("num_copies", [3, 10])
def test_copies_of_a_much_copied_picture_are_no_family(num_copies: int) -> None:
    """Edited copies (3 and more) are as like one another as members of a family; three images are near-equal."""
    near_equal = [(0, 1, 0.95, False), (0, 2, 0.95, False)]
    copies = range(3, 3 + num_copies)
    edges = near_equal + [(0, copy, 0.8, True) for copy in copies] + [(3, copy, 0.78, True) for copy in copies[1:]]
    assert not any(family(edges))
    assert any(family(edges[1:])), "two near-equal images are not much copied"
    assert family([*near_equal, (0, 3, 0.64, False), (3, 4, 0.64, False), (4, 5, 0.64, False)])[-2], (
        "below the threshold"
    )


def test_a_family_beside_a_much_copied_picture_stays_one() -> None:
    edges = [(0, 1, 0.95, False), (0, 2, 0.95, False), (3, 4, 0.8, True), (3, 5, 0.8, True), (4, 5, 0.79, True)]
    assert family(edges) == [False, False, True, True, True]


def test_pair_without_a_local_difference_needs_rivals_at_both_ends() -> None:
    assert family([(0, 1, 0.7, False), (1, 2, 0.7, False)]) == [False, False]
    chain = [(0, 1, 0.7, False), (1, 2, 0.7, False), (2, 3, 0.7, False)]
    assert family(chain) == [False, True, False]


def test_without_edges_there_is_no_family() -> None:
    nothing = np.array([], bool)
    for num_nodes in (0, 3):
        assert len(family_edges(num_nodes, EMPTY, EMPTY, EMPTY.astype(float), nothing, **MARGINS)) == 0


def has_rival(node: int, partner: int, floor: float, same: np.ndarray, edges: list[tuple[int, int, float]]) -> bool:
    others = [(b if a == node else a, value) for a, b, value in edges if node in (a, b)]
    return any(value >= floor and same[third] not in (same[node], same[partner]) for third, value in others)


@pytest.mark.parametrize("seed", range(25))
def test_families_follow_the_rule(seed: int, block: int) -> None:
    """Against the rule of the docstring, applied edge by edge, with many equal similarities."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(a, b) for a in range(14) for b in range(a) if rng.random() < 0.35]).reshape(-1, 2)
    first, second = pairs.T
    similarity = rng.choice([0.6, 0.66, 0.7, 0.76, 0.8, 0.92], len(pairs)).astype(np.float32)
    local = rng.random(len(pairs)) < 0.4
    is_sure = (similarity >= 0.9) & ~local
    sure_picture = by_scipy(14, first[is_sure], second[is_sure])
    edges = list(zip(first.tolist(), second.tolist(), similarity.tolist(), strict=True))
    same = sure_picture.copy()
    sizes = np.bincount(sure_picture, minlength=14)
    for node in range(14):
        others = [(b if a == node else a, value) for a, b, value in edges if node in (a, b)]
        much_copied = [
            (-value, sure_picture[other])
            for other, value in others
            if sizes[sure_picture[other]] >= COPIED_OFTEN and value >= np.float32(MARGINS["threshold"])
        ]
        if sizes[sure_picture[node]] < COPIED_OFTEN and much_copied:
            same[node] = min(much_copied)[1]
    expected = []
    for (one, other, value), differs in zip(edges, local.tolist(), strict=True):
        floor = value - (0.05 if differs else 0.1)
        rivals = [has_rival(one, other, floor, same, edges), has_rival(other, one, floor, same, edges)]
        expected.append(bool(same[one] != same[other] and (any(rivals) if differs else all(rivals))))
    assert family_edges(14, first, second, similarity, local, **MARGINS).tolist() == expected
    order = rng.permutation(len(pairs))
    shuffled = family_edges(14, second[order], first[order], similarity[order], local[order], **MARGINS)
    assert shuffled.tolist() == np.array(expected)[order].tolist()
