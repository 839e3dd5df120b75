"""Deduplication: the decisions equal a naive implementation of the rules, and every row has a decision."""

import dataclasses
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation import dedup
from curation.copies import duplicate_graph
from curation.copies.duplicate_graph import Edges, Nodes
from curation.dedup import REASONS, Decision, DedupConfig, FamilyConfig, decide
from curation.engine.manifest import claim, mark_shard_done, require_manifest
from curation.errors import ConfigError, InputError, OutputMismatchError
from curation.files import disk_arrays, parquet, paths, schemas
from curation.run_folder import KeptShard, RunFolder, kept_shards, read_kept
from tests.curation.builders import (
    bytes_in,
    id_of,
    image_row,
    stages_of,
    unit_vectors,
    write_dedup,
    write_ingest,
    write_pairs,
    write_stage,
    write_vectors,
)

ROOT = Path(__file__).parents[2]
Edge = tuple[int, int, float]


def nodes_of(count: int, **columns: Any) -> Nodes:
    """Pool images of equal size, except for the given `columns`."""
    fields: dict[str, Any] = {
        "image_ids": np.array([bytes.fromhex(id_of(node)) for node in range(count)], "S16"),
        "is_seed": np.zeros(count, bool),
        "is_holdout": np.zeros(count, bool),
        "pixels": np.full(count, 100),
        "length": np.full(count, 100),
        "source": np.zeros(count, np.int32),
        "label": np.zeros(count, np.int64),
    }
    fields |= {name: np.asarray(value) for name, value in columns.items()}
    return Nodes(**{"content": fields["pixels"], "detail": fields["pixels"]} | fields)


def edges_of(edges: list[Edge], **columns: Any) -> Edges:
    """Mutual edges of equal cosine and similarity that do not differ locally, except for the given `columns`."""
    first, second, similarity = zip(*edges, strict=True) if edges else ((), (), ())
    fields = {
        "first": np.array(first, np.int32),
        "second": np.array(second, np.int32),
        "similarity": np.array(similarity, np.float32),
        "differs_locally": np.zeros(len(edges), bool),
        "cosine": np.array(similarity, np.float32),
        "mutual": np.ones(len(edges), bool),
    }
    return Edges(**fields | {name: np.asarray(value, fields[name].dtype) for name, value in columns.items()})


def decided(config: DedupConfig, nodes: Nodes, edges: list[Edge], **columns: Any) -> Decision:
    return decide(config, nodes, edges_of(edges, **columns))


def reasons(decision: Decision) -> list[str | None]:
    return [REASONS[number] for number in decision.reason]


def kept(decision: Decision) -> list[int]:
    return np.flatnonzero(decision.matched < 0).tolist()


def is_(count: int, *marked: int) -> np.ndarray:
    return np.isin(np.arange(count), marked)


# A naive implementation of the rules in the module docstring, one node after another.


def by_priority(candidates: list[int], nodes: Nodes, edges: list[Edge], threshold: float) -> None:
    """Sort the candidates of one component as copies/priority.py does."""
    copies: dict[int, dict[int, int]] = {node: {} for node in candidates}
    for a, b, similarity in edges:
        if a in copies and b in copies and a != b and np.float32(similarity) >= np.float32(threshold):
            copies[a][b] = copies[b][a] = round(float(np.float32(similarity)) * 10_000)
    agreement = {node: sum(of_node.values()) for node, of_node in copies.items()}

    def octaves(value: int, step: float) -> int:
        return int(np.floor(np.log2(value) / step + 0.5))

    def key(node: int) -> tuple[Any, ...]:
        agrees = agreement[node] >= 0.98 * max([agreement[other] for other in copies[node]], default=0)
        sizes = octaves(nodes.detail[node], 1), octaves(nodes.content[node], 0.1), -octaves(nodes.pixels[node], 0.1)
        first = not nodes.is_seed[node], not agrees, *(-size for size in sizes)
        return *first, -agreement[node], -nodes.length[node], node

    candidates.sort(key=key)


def component_of(count: int, edges: list[Edge], threshold: float) -> list[set[int]]:
    components = [{node} for node in range(count)]
    for a, b, similarity in edges:
        if np.float32(similarity) >= np.float32(threshold) and components[a] is not components[b]:
            components[a] |= components[b]
            for node in components[a]:
                components[node] = components[a]
    return components


def by_the_rules(config: DedupConfig, nodes: Nodes, edges: list[Edge]) -> list[tuple[str | None, int, float | None]]:
    """Reason, matched node and similarity of every node; (None, -1, None) for the kept."""
    count = len(nodes.image_ids)
    between = {frozenset((a, b)): np.float32(similarity) for a, b, similarity in edges}
    holdout_components = component_of(count, edges, config.holdout_threshold)
    result: list[tuple[str | None, int, float | None]] = []
    for node in range(count):
        decision: tuple[str | None, int, float | None] = (None, -1, None)
        is_exempt = nodes.is_seed[node] and not config.decontaminate_seeds
        if nodes.is_holdout[node] and not is_exempt:
            decision = ("holdout", node, 1.0)
        elif not nodes.is_holdout[node] and not is_exempt:
            matches = [
                (-between[frozenset((node, other))], other)
                for other in np.flatnonzero(nodes.is_holdout).tolist()
                if between.get(frozenset((node, other)), -2) >= np.float32(config.holdout_threshold)
            ]
            held_out = [other for other in sorted(holdout_components[node]) if nodes.is_holdout[other]]
            if matches:
                decision = ("holdout", min(matches)[1], float(-min(matches)[0]))
            elif config.decontamination == "component" and held_out:
                decision = ("holdout", held_out[0], None)
        result.append(decision)
    for members in component_of(count, edges, config.threshold):
        candidates = [node for node in members if result[node][1] < 0]
        by_priority(candidates, nodes, edges, config.threshold)
        for node in candidates[1:]:
            if not nodes.is_seed[node]:
                similarity = between.get(frozenset((node, candidates[0])), -2)
                copy_similarity = float(similarity) if similarity >= np.float32(config.threshold) else None
                result[node] = ("near", candidates[0], copy_similarity)
    return result


def random_case(seed: int) -> tuple[DedupConfig, Nodes, list[Edge]]:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    config = DedupConfig(
        threshold=0.6,
        holdout_threshold=float(rng.choice([0.3, 0.45, 0.6])),
        decontamination="component" if rng.random() < 0.5 else "direct",
        decontaminate_seeds=bool(rng.random() < 0.5),
    )
    nodes = nodes_of(
        count,
        is_seed=rng.random(count) < 0.2,
        is_holdout=rng.random(count) < 0.15,
        pixels=rng.integers(1, 4, count),
        length=rng.integers(1, 4, count),
    )
    pairs = list(itertools.combinations(range(count), 2))
    chosen = rng.permutation(len(pairs))[: int(rng.integers(0, 2 * count))]
    levels = [0.1, 0.3, 0.44, 0.45, 0.5, 0.59, 0.6, 0.7, 0.7, 0.9]
    edges = [(*pairs[i], float(np.float32(rng.choice(levels)))) for i in sorted(chosen.tolist())]
    return config, nodes, edges


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block size of a test, by its seed: one image or pair, seven, or the real size."""
    seed = request.node.callspec.params["seed"]
    # A block of the real size holds a million images, so no small case has more than one of them.
    monkeypatch.setattr(disk_arrays, "BLOCK", (1, 7, disk_arrays.BLOCK)[seed % 3])


@pytest.mark.parametrize("seed", range(100))
def test_decisions_follow_the_rules(seed: int, block: None) -> None:
    config, nodes, edges = random_case(seed)
    decision = decided(config, nodes, edges)
    expected = by_the_rules(config, nodes, edges)
    decisions = [
        (reason, int(matched), None if np.isnan(similarity) else float(similarity))
        for reason, matched, similarity in zip(reasons(decision), decision.matched, decision.similarity, strict=True)
    ]
    assert decisions == [(reason, matched, None if s is None else float(s)) for reason, matched, s in expected]
    smallest = [min(members) for members in component_of(len(nodes.image_ids), edges, config.threshold)]
    assert decision.component.tolist() == smallest

    # Properties that follow from the rules.
    keeps = decision.matched < 0
    assert (keeps == np.array([reason is None for reason in reasons(decision)])).all()
    if not config.decontaminate_seeds:
        assert keeps[nodes.is_seed].all()
    assert not keeps[nodes.is_holdout & ~(nodes.is_seed & (not config.decontaminate_seeds))].any()
    for a, b, similarity in edges:
        assert not (similarity >= 0.6 and keeps[a] and keeps[b] and not (nodes.is_seed[a] and nodes.is_seed[b]))


@pytest.mark.parametrize("seed", range(30))
def test_order_of_edges_changes_nothing(seed: int) -> None:
    config, nodes, edges = random_case(seed)
    shuffled = [edges[i] for i in np.random.default_rng(seed).permutation(len(edges))]
    one, other = decided(config, nodes, edges), decided(config, nodes, shuffled)
    for name in ("component", "reason", "matched", "similarity"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("seed", range(30))
def test_kept_images_are_kept_again(seed: int) -> None:
    config, nodes, edges = random_case(seed)
    config = config.model_copy(update={"decontaminate_seeds": True})
    kept_nodes = kept(decided(config, nodes, edges))
    new_node = {node: number for number, node in enumerate(kept_nodes)}
    again = nodes_of(
        len(kept_nodes),
        image_ids=nodes.image_ids[kept_nodes],
        is_seed=nodes.is_seed[kept_nodes],
        pixels=nodes.pixels[kept_nodes],
        length=nodes.length[kept_nodes],
    )
    kept_edges = [(new_node[a], new_node[b], value) for a, b, value in edges if a in new_node and b in new_node]
    assert kept(decided(config, again, kept_edges)) == list(range(len(kept_nodes)))


# The rules one by one


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_pairs_all_images_are_kept(count: int) -> None:
    decision = decided(DedupConfig(), nodes_of(count), [])
    assert kept(decision) == list(range(count)) == decision.component.tolist()


def test_a_chain_is_one_component_although_its_ends_are_not_copies() -> None:
    decision = decided(DedupConfig(), nodes_of(3, is_seed=is_(3, 2)), [(0, 1, 0.8), (1, 2, 0.7)])
    assert kept(decision) == [2]
    assert decision.component.tolist() == [0, 0, 0]
    assert decision.matched.tolist() == [2, 2, -1]
    assert np.isnan(decision.similarity[0]) and decision.similarity[1] == np.float32(0.7)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, 0),
        ({"length": [1, 2, 2]}, 1),
        ({"pixels": [100, 80, 80], "content": [80] * 3, "detail": [64] * 3, "length": [3, 1, 2]}, 2),
        ({"content": [90, 100, 100], "pixels": [90, 110, 100]}, 2),
        ({"detail": [100, 200, 100], "content": [900, 200, 900]}, 1),
        ({"pixels": [900, 200, 200], "is_seed": [False, False, True]}, 2),
    ],
    ids=["smallest id", "most bytes", "no border", "largest content", "most detail", "seed"],
)
def test_the_key_that_decides_the_priority(columns: dict[str, Any], expected: int) -> None:
    edges = [(0, 1, 0.9), (0, 2, 0.9), (1, 2, 0.9)]
    assert kept(decided(DedupConfig(), nodes_of(3, **columns), edges)) == [expected]


def test_the_image_that_agrees_with_the_other_copies_has_priority() -> None:
    """Two edited copies are less like one another than like their original, however large they are."""
    nodes, edges = nodes_of(3, pixels=[400, 100, 400]), [(0, 1, 0.8), (1, 2, 0.8), (0, 2, 0.65)]
    assert kept(decided(DedupConfig(), nodes, edges)) == [1]
    assert kept(decided(DedupConfig(), nodes, [*edges[:2], (0, 2, 0.8)])) == [0]


def test_no_image_is_dropped_for_one_of_another_label() -> None:
    """Unlike the holdout, and unless one of the two has no label."""
    nodes, edges = nodes_of(3, label=[7, 8, 0], is_seed=is_(3, 0)), [(0, 1, 0.9), (0, 2, 0.9)]
    for matches_kept in (False, True):
        guarded = decided(DedupConfig(matches_kept=matches_kept), nodes, edges)
        assert kept(guarded) == [0, 1] and guarded.guards["label_guard"] == {"pairs_left_out": 1}
        assert kept(decided(DedupConfig(matches_kept=matches_kept, label_guard=False), nodes, edges)) == [0]
    joined = decided(DedupConfig(), nodes, [(0, 2, 0.9), (1, 2, 0.9)])
    assert kept(joined) == [0, 1], "an image without a label joins them"
    holdout = nodes_of(3, label=[7, 8, 0], is_holdout=is_(3, 0))
    assert kept(decided(DedupConfig(), holdout, edges)) == []


def test_equal_bytes_with_two_labels_are_one_image_and_are_listed(tmp_path: Path) -> None:
    rows = [
        [image_row(id_of(n), "web", "pool", label=label) for n, label in ((1, "a"), (1, None), (2, None), (3, "c"))],
        [image_row(id_of(n), "more", "pool", label=label) for n, label in ((1, "b"), (2, "b"), (3, "c"))],
    ]
    images = write_ingest(tmp_path / "ingest", rows)
    pairs = write_pairs(tmp_path / "pairs", images, [[(id_of(2), id_of(3), 0.9)]])
    manifest = dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), str(tmp_path / "dedup"))
    assert manifest.facts["label_conflicts"] == {"images": 1, "examples": [id_of(1)]}
    assert manifest.totals["exact"] == 4 and "near" not in manifest.totals, "image 2 has the label b"


@pytest.mark.parametrize(("labels", "is_said"), [(("a", "b"), True), (("a", "a"), False), (("a", None), False)])
def test_pairs_that_the_labels_guard_leaves_out_are_said(
    tmp_path: Path, labels: tuple[str, str | None], is_said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Subfolders are labels, so a pool sorted by date would keep its copies without a word."""
    rows = [image_row(id_of(number), "web", "pool", label=label) for number, label in enumerate(labels)]
    images = write_ingest(tmp_path / "ingest", [rows])
    pairs = write_pairs(tmp_path / "pairs", images, [[(id_of(0), id_of(1), 0.9)]])
    for _ in range(2):  # a finished stage says it too
        dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), str(tmp_path / "dedup"))
        assert ("different labels: 1" in capsys.readouterr().err) == is_said


def test_all_seeds_of_a_component_are_kept_and_the_other_images_dropped() -> None:
    nodes = nodes_of(4, is_seed=is_(4, 1, 3), pixels=[900, 100, 900, 200])
    decision = decided(DedupConfig(), nodes, [(0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.9)])
    assert kept(decision) == [1, 3]
    assert decision.matched.tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize(("similarity", "copies"), [(0.59, False), (0.6, True), (0.61, True)])
def test_pair_at_the_threshold_is_of_copies(similarity: float, copies: bool) -> None:
    edges = [(0, 1, similarity)]
    assert (kept(decided(DedupConfig(threshold=0.6), nodes_of(2), edges)) == [0]) == copies
    holdout = nodes_of(2, is_holdout=is_(2, 0))
    config = DedupConfig(threshold=0.6, holdout_threshold=0.6)
    assert (kept(decided(config, holdout, edges)) == []) == copies


def test_images_that_match_the_holdout_are_dropped_or_the_whole_component() -> None:
    """0 is a holdout image; 1 matches 0, 2 matches 1, 3 is a copy of 2."""
    nodes, edges = nodes_of(4, is_holdout=is_(4, 0)), [(0, 1, 0.5), (1, 2, 0.5), (2, 3, 0.9)]
    direct = decided(DedupConfig(), nodes, edges)
    assert reasons(direct) == ["holdout", "holdout", None, "near"]
    assert direct.matched.tolist() == [0, 0, -1, 2]
    whole = decided(DedupConfig(decontamination="component"), nodes, edges)
    assert reasons(whole) == ["holdout"] * 4
    assert whole.matched.tolist() == [0, 0, 0, 0]
    assert np.isnan(whole.similarity).tolist() == [False, False, True, True]


def test_the_most_similar_holdout_image_is_the_match() -> None:
    nodes = nodes_of(4, is_holdout=is_(4, 0, 2, 3))
    decision = decided(DedupConfig(), nodes, [(0, 1, 0.5), (1, 2, 0.8), (1, 3, 0.8)])
    assert decision.matched[1] == 2 and decision.similarity[1] == np.float32(0.8)


@pytest.mark.parametrize("mode", ["direct", "component"])
def test_seeds_are_kept_without_decontaminate_seeds(mode: str) -> None:
    """0 is a holdout image, 1 a holdout image and a seed; the seed 2 and the pool image 3 match 0."""
    nodes = nodes_of(4, is_holdout=is_(4, 0, 1), is_seed=is_(4, 1, 2))
    edges = [(0, 2, 0.9), (0, 3, 0.9)]
    settings = {"decontamination": mode}
    strict = decided(DedupConfig.model_validate(settings), nodes, edges)
    assert kept(strict) == []
    exempt = decided(DedupConfig.model_validate(settings | {"decontaminate_seeds": False}), nodes, edges)
    assert kept(exempt) == [1, 2]
    assert reasons(exempt)[3] == "holdout"


@pytest.mark.parametrize("setting", ["threshold", "holdout_threshold", "holdout_cosine"])
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.5])
def test_similarity_of_copies_lies_above_0_and_at_most_1(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{setting}\s+Input should be (greater than 0|less than or equal to 1)"):
        DedupConfig(**{setting: value})


def test_config_that_could_keep_copies_of_the_holdout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holdout_threshold \([\d.]+\) must not lie above threshold"):
        DedupConfig(threshold=0.5, holdout_threshold=0.6)


# The stage


def small_run(folder: Path) -> tuple[str, str]:
    """An ingest of three sources with exact copies within and between them, and pairs of its images."""

    def of(role: str) -> Callable[[int], dict[str, Any]]:
        return lambda number: image_row(id_of(number), role, role)

    seed, pool, holdout = of("seed"), of("pool"), of("holdout")
    images = write_ingest(
        folder / "ingest",
        [
            [seed(1), seed(2), seed(1)],
            [pool(1), pool(3), pool(4), pool(3), pool(9)],
            [pool(5), pool(3), pool(6), pool(7)],
            [],
            [holdout(9), holdout(8), holdout(8)],
        ],
    )
    pairs = write_pairs(
        folder / "pairs",
        images,
        [
            [(id_of(1), id_of(4), 0.9), (id_of(3), id_of(5), 0.7), (id_of(5), id_of(6), 0.65)],
            [(id_of(7), id_of(8), 0.5), (id_of(2), id_of(3), 0.3)],
        ],
    )
    return images, pairs


def rows_of(folder: str) -> list[dict[str, Any]]:
    names = require_manifest(folder).files("duplicates")
    return [row for name in names for row in parquet.read_table(f"{folder}/{name}", schemas.DUPLICATES).to_pylist()]


def test_every_row_of_ingest_gets_its_decision_in_order(tmp_path: Path) -> None:
    images, pairs = small_run(tmp_path)
    manifest = dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), str(tmp_path / "dedup"))
    decisions = [
        (int(row["image_id"], 16), row["reason"], row["matched_image_id"] and int(row["matched_image_id"], 16))
        for row in rows_of(str(tmp_path / "dedup"))
    ]
    assert decisions == [
        *[(1, None, None), (2, None, None), (1, "exact", 1)],
        *[(1, "exact", 1), (3, "near", 5), (4, "near", 1), (3, "exact", 3), (9, "holdout", 9)],
        *[(5, None, None), (3, "exact", 3), (6, "near", 5), (7, "holdout", 8)],
        *[(9, "holdout", 9), (8, "holdout", 8), (8, "holdout", 8)],
    ]
    rows = rows_of(str(tmp_path / "dedup"))
    assert [row["kept"] for row in rows] == [reason is None for _, reason, _ in decisions]
    assert all((row["matched_image_id"] is None) == row["kept"] for row in rows)
    components = {int(row["image_id"], 16): int(row["component_id"], 16) for row in rows}
    assert components == {1: 1, 2: 2, 3: 3, 4: 1, 5: 3, 6: 3, 7: 7, 8: 8, 9: 9}
    similarity = {int(row["image_id"], 16): row["similarity"] for row in rows if row["reason"] != "exact"}
    assert similarity == {
        n: pytest.approx(s) if s else None
        for n, s in {1: None, 2: None, 3: 0.7, 4: 0.9, 5: None, 6: 0.65, 7: 0.5, 8: 1.0, 9: 1.0}.items()
    }
    assert manifest.totals == {"rows": 15, "kept": 3, "exact": 4, "near": 3, "holdout": 2, "holdout_rows": 3}
    assert manifest.facts["unique_images"] == 9
    assert manifest.facts["component_sizes"] == {"2": 1, "3": 1}
    assert manifest.facts["largest_components"] == [[id_of(3), 3], [id_of(1), 2]]


def random_run(folder: Path, seed: int) -> tuple[DedupConfig, str, str]:
    rng = np.random.default_rng(seed)
    config, nodes, edges = random_case(seed)
    shards = []
    for _ in range(int(rng.integers(1, 5))):
        role = str(rng.choice(["seed", "pool", "holdout"]))
        numbers = rng.integers(0, len(nodes.image_ids), int(rng.integers(0, 20)))
        shards.append([image_row(id_of(n), f"source of {role}", role, width=10 + n % 3) for n in numbers.tolist()])
    shards.append([image_row(id_of(0), "last", "pool", width=10)])
    ingested = {row["image_id"] for rows in shards for row in rows}
    pairs = [(id_of(a), id_of(b), s) for a, b, s in edges if id_of(a) in ingested and id_of(b) in ingested]
    images = write_ingest(folder / "ingest", shards)
    return config, images, write_pairs(folder / "pairs", images, [pairs[::2], [], pairs[1::2]])


@pytest.mark.parametrize("seed", range(25))
def test_rows_in_are_rows_kept_and_dropped_by_reason(tmp_path: Path, seed: int) -> None:
    config, images, pairs = random_run(tmp_path, seed)
    output = str(tmp_path / "dedup")
    manifest = dedup.run(config, RunFolder(ingest=images, pairs=pairs), output)
    ingested = [
        row
        for name in require_manifest(images).files("images")
        for row in parquet.read_table(f"{images}/{name}", schemas.IMAGES).to_pylist()
    ]
    rows = rows_of(output)
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in ingested]
    totals = manifest.totals
    reasons = Counter(
        row["reason"] or "kept" for row, image in zip(rows, ingested, strict=True) if image["role"] != "holdout"
    )
    assert {name: totals[name] for name in reasons} == dict(reasons)
    assert sum(reasons.values()) + totals["holdout_rows"] == totals["rows"] == len(ingested)

    kept_ids = [row["image_id"] for row in rows if row["kept"]]
    assert len(set(kept_ids)) == len(kept_ids), "an image is kept twice"
    roles_of: dict[str, set[str]] = {}
    for image in ingested:
        roles_of.setdefault(image["image_id"], set()).add(image["role"])
    for row, image in zip(rows, ingested, strict=True):
        roles = roles_of[row["image_id"]]
        if row["kept"]:
            assert image["role"] != "holdout"
            assert image["role"] == ("seed" if "seed" in roles else "pool"), "the row of a seed represents the image"
            assert "holdout" not in roles or not config.decontaminate_seeds
        elif row["reason"] == "exact":
            assert row["matched_image_id"] == row["image_id"]
        elif row["reason"] == "near":
            assert row["matched_image_id"] in kept_ids
        else:
            assert "holdout" in roles_of[row["matched_image_id"]]
        assert row["component_id"] <= row["image_id"]


def test_second_run_does_nothing_and_another_threshold_is_refused(tmp_path: Path) -> None:
    images, pairs = small_run(tmp_path)
    output = str(tmp_path / "dedup")
    first = dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), output)
    before = bytes_in(output)
    assert dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), output) == first
    with pytest.raises(OutputMismatchError, match=r"config\.threshold: 0\.6 there, 0\.7 now"):
        dedup.run(DedupConfig(threshold=0.7), RunFolder(ingest=images, pairs=pairs), output)
    assert bytes_in(output) == before
    again = dedup.run(DedupConfig(threshold=0.7), RunFolder(ingest=images, pairs=pairs), output, replace=True)
    assert again.totals["near"] == 2
    other = str(tmp_path / "other")
    dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), other)
    assert bytes_in(other) == before


def test_threshold_below_the_similarity_of_written_pairs_is_refused(tmp_path: Path) -> None:
    images, _ = small_run(tmp_path)
    pairs = write_pairs(tmp_path / "none", images, [[]], min_similarity=0.5)
    with pytest.raises(ConfigError, match=r"holdout_threshold is 0\.45, but pairs below 0\.5 were not written"):
        dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), str(tmp_path / "dedup"))
    assert not (tmp_path / "dedup").exists()


@pytest.mark.parametrize("unknown", [id_of(0), id_of(500), "f" * 32])
def test_pairs_of_other_images_are_refused(tmp_path: Path, unknown: str) -> None:
    images, _ = small_run(tmp_path)
    one, other = sorted((id_of(3), unknown))
    pairs = write_pairs(tmp_path / "other", images, [[(one, other, 0.9)]])
    with pytest.raises(InputError, match=unknown):
        dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), str(tmp_path / "dedup"))
    assert not (tmp_path / "dedup").exists()


# Reading the kept images


def test_kept_images_come_with_their_vectors(tmp_path: Path) -> None:
    images, _ = small_run(tmp_path)
    matrix = unit_vectors(0, 10).astype(np.float16)
    shards = [[1, 2], [1, 3, 4, 9], [5, 3, 6, 7], [], [9, 8]]
    embedded = write_vectors(tmp_path / "embed", images, [{id_of(n): matrix[n] for n in shard} for shard in shards])
    deduplicated = write_dedup(tmp_path / "dedup", images, lambda row: row["image_id"] not in (id_of(4), id_of(6)))
    parts = kept_shards(stages_of(images, deduplicated, embedded))
    assert len(parts) == 5

    def numbers(role: str, source: str | None = None) -> list[list[int]]:
        return [[int(i, 16) for i in read_kept(part, role=role, source=source)[0]] for part in parts]

    assert numbers("pool") == [[], [1, 3, 9], [5, 3, 7], [], []]
    assert numbers("seed") == numbers("seed", "seed") == [[1, 2], [], [], [], []]
    assert numbers("seed", "other") == [[]] * 5
    assert numbers("holdout") == [[]] * 5
    for part in parts:
        ids, kept_vectors = read_kept(part, role="pool")
        assert kept_vectors.shape == (len(ids), 8)
        assert kept_vectors.tobytes() == matrix[[int(image_id, 16) for image_id in ids]].tobytes()


def test_stages_of_different_runs_are_refused(tmp_path: Path) -> None:
    images, _ = small_run(tmp_path)
    deduplicated = write_dedup(tmp_path / "dedup", images)
    one_shard = write_vectors(tmp_path / "one_shard", images, [{id_of(1): unit_vectors(0, 1)[0]}])
    with pytest.raises(InputError, match=r"differ in their number of shards \(5, 5, 1\)"):
        kept_shards(stages_of(images, deduplicated, one_shard))
    other = write_vectors(tmp_path / "other", images, [{id_of(77): unit_vectors(0, 1)[0]} for _ in range(5)])
    with pytest.raises(InputError, match=rf"vectors-00001\.parquet.*{id_of(1)}"):
        read_kept(kept_shards(stages_of(images, deduplicated, other))[1], role="pool")


def test_images_and_decisions_in_another_order_are_refused(tmp_path: Path) -> None:
    images, _ = small_run(tmp_path)
    embedded = write_vectors(tmp_path / "embed", images, [{id_of(1): unit_vectors(0, 1)[0]} for _ in range(5)])
    parts = kept_shards(stages_of(images, write_dedup(tmp_path / "dedup", images), embedded))
    crossed = KeptShard(parts[0].images, parts[1].duplicates, parts[0].vectors)
    with pytest.raises(InputError, match=r"duplicates-00001\.parquet: not the images of .*images-00000\.parquet"):
        read_kept(crossed, role="pool")


def test_stages_of_another_ingest_are_refused(tmp_path: Path) -> None:
    """They have equal numbers of shards and equal images: only the content hash shows that they are of two runs."""
    images, pairs = small_run(tmp_path / "one")
    rows = [
        parquet.read_table(f"{images}/{name}", schemas.IMAGES).to_pylist()
        for name in require_manifest(images).files("images")
    ]
    other = write_ingest(tmp_path / "other", [[row | {"width": 11} for row in part] for part in rows])
    vector_shards = [{id_of(1): unit_vectors(0, 1)[0]} for _ in range(5)]
    first = (write_dedup(tmp_path / "dedup", images), write_vectors(tmp_path / "embed", images, vector_shards))
    second = (write_dedup(tmp_path / "dedup2", other), write_vectors(tmp_path / "embed2", other, vector_shards))
    assert len(kept_shards(stages_of(images, *first))) == len(kept_shards(stages_of(other, *second))) == 5
    for deduplicated, embedded, folder in ((first[0], second[1], "embed2"), (second[0], first[1], "dedup2")):
        with pytest.raises(InputError, match=rf"{folder}' was made from another ingest.*not stages of one run"):
            kept_shards(stages_of(images, deduplicated, embedded))
    with pytest.raises(InputError, match="pairs' was made from another ingest"):
        dedup.run(DedupConfig(), RunFolder(ingest=other, pairs=pairs), str(tmp_path / "output"))
    assert not (tmp_path / "output").exists()


# Guards against chains


def guarded_case(seed: int) -> tuple[DedupConfig, Nodes, list[Edge], dict[str, np.ndarray]]:
    """A random case with some of the guards, and the columns of its edges that the guards read."""
    config, nodes, edges = random_case(seed)
    rng = np.random.default_rng([seed, 1])
    levels = [0.1, 0.44, 0.59, 0.6, 0.61, 0.63, 0.64, 0.66, 0.67, 0.69, 0.71, 0.74, 0.77, 0.83, 0.9, 1.0]
    edges = [(a, b, float(np.float32(rng.choice(levels)))) for a, b, _ in edges]
    changes = {
        "matches_kept": bool(rng.random() < 0.5),
        "mutual_neighbors": bool(rng.random() < 0.5),
        "max_component_size": int(rng.integers(2, 6)) if rng.random() < 0.5 else None,
        "holdout_cosine": 0.8 if rng.random() < 0.5 else None,
        "label_guard": bool(rng.random() < 0.5),
    }
    nodes = dataclasses.replace(nodes, label=rng.integers(0, 3, len(nodes.image_ids)))
    columns = {
        "mutual": rng.random(len(edges)) < 0.7,
        "cosine": rng.choice([0.5, 0.7, 0.8, 0.9], len(edges)).astype(np.float32),
    }
    return DedupConfig.model_validate(config.model_dump() | changes), nodes, edges, columns


def split(config: DedupConfig, members: set[int], edges: list[Edge], num_steps: int = 1) -> list[set[int]]:
    """The parts of a component after splitting by `max_component_size`, as the threshold rises."""
    before = config.threshold + (num_steps - 1) * dedup.SPLIT_STEP
    if config.max_component_size is None or len(members) <= config.max_component_size or before >= 1:
        return [members]
    ordered = sorted(members)
    index = {node: number for number, node in enumerate(ordered)}
    inner = [(index[a], index[b], value) for a, b, value in edges if a in members and b in members]
    parts = component_of(len(ordered), inner, min(config.threshold + num_steps * dedup.SPLIT_STEP, 1.0))
    unique = {frozenset(ordered[number] for number in part) for part in parts}
    return [piece for part in unique for piece in split(config, set(part), edges, num_steps + 1)]


def mutual_edges_of(config: DedupConfig, edges: list[Edge], columns: dict[str, np.ndarray]) -> list[Edge]:
    """The edges that `mutual_neighbors` leaves."""
    return [e for e, mutual in zip(edges, columns["mutual"], strict=True) if mutual or not config.mutual_neighbors]


def labels_differ(config: DedupConfig, nodes: Nodes, one: int, other: int) -> bool:
    """Whether the guard of labels keeps both of two images."""
    labels = {int(nodes.label[one]), int(nodes.label[other])}
    return config.label_guard and len(labels - {0}) == 2 and not nodes.is_holdout[[one, other]].any()


def by_the_guarded_rules(
    config: DedupConfig, nodes: Nodes, edges: list[Edge], columns: dict[str, np.ndarray]
) -> tuple[list[tuple[str | None, int, float | None]], list[int]]:
    """Reason, matched node and similarity of every node, and the component of every node."""
    count = len(nodes.image_ids)
    mutual_edges = mutual_edges_of(config, edges, columns)
    usable = [e for e in mutual_edges if not labels_differ(config, nodes, *e[:2])]
    cosine_of = {frozenset(e[:2]): c for e, c in zip(edges, columns["cosine"], strict=True)}
    between = {frozenset((a, b)): np.float32(similarity) for a, b, similarity in edges}
    copies = {frozenset((a, b)): np.float32(s) for a, b, s in usable if np.float32(s) >= np.float32(config.threshold)}
    holdout_components = component_of(count, mutual_edges, config.holdout_threshold)
    result: list[tuple[str | None, int, float | None]] = [(None, -1, None)] * count
    for node in range(count):
        is_exempt = nodes.is_seed[node] and not config.decontaminate_seeds
        if nodes.is_holdout[node] and not is_exempt:
            result[node] = ("holdout", node, 1.0)
        if nodes.is_holdout[node] or is_exempt:
            continue
        matches = []
        for other in np.flatnonzero(nodes.is_holdout).tolist():
            pair = frozenset((node, other))
            by_cosine = config.holdout_cosine is not None and cosine_of.get(pair, -2) >= np.float32(
                config.holdout_cosine
            )
            if pair in between and (by_cosine or between[pair] >= np.float32(config.holdout_threshold)):
                matches.append((-between[pair], other))
        held_out = [other for other in sorted(holdout_components[node]) if nodes.is_holdout[other]]
        if matches:
            result[node] = ("holdout", min(matches)[1], float(-min(matches)[0]))
        elif config.decontamination == "component" and held_out:
            result[node] = ("holdout", held_out[0], None)
    unique = {frozenset(members) for members in component_of(count, usable, config.threshold)}
    component = list(range(count))
    for members in (part for whole in unique for part in split(config, set(whole), usable)):
        for node in members:
            component[node] = min(members)
        candidates = [node for node in members if result[node][1] < 0]
        by_priority(candidates, nodes, usable, config.threshold)
        kept_nodes: list[int] = []
        for node in candidates:
            matches_of_node = [other for other in kept_nodes if frozenset((node, other)) in copies]
            if config.matches_kept:
                matches_of_node.sort(key=lambda other: -copies[frozenset((node, other))])  # stable
            kept_matches = matches_of_node if config.matches_kept else kept_nodes[:1]
            if not config.matches_kept and kept_matches and labels_differ(config, nodes, node, kept_matches[0]):
                kept_matches = []
            if not kept_matches or nodes.is_seed[node]:
                kept_nodes.append(node)
            else:
                score = copies.get(frozenset((node, kept_matches[0])))
                result[node] = ("near", kept_matches[0], None if score is None else float(score))
    return result, component


@pytest.mark.parametrize("seed", range(120))
def test_guarded_decisions_follow_the_rules(seed: int, block: None) -> None:
    config, nodes, edges, columns = guarded_case(seed)
    decision = decided(config, nodes, edges, **columns)
    expected, component = by_the_guarded_rules(config, nodes, edges, columns)
    decisions = [
        (reason, int(matched), None if np.isnan(similarity) else float(similarity))
        for reason, matched, similarity in zip(reasons(decision), decision.matched, decision.similarity, strict=True)
    ]
    assert decisions == expected
    assert decision.component.tolist() == component

    options = ("mutual_neighbors", "label_guard", "max_component_size", "matches_kept", "holdout_cosine")
    assert set(decision.guards) == {name for name in options if getattr(config, name) not in (None, False)}
    order = np.random.default_rng(seed).permutation(len(edges))
    reversed_edges = [(edges[i][1], edges[i][0], edges[i][2]) for i in order.tolist()]
    again = decided(config, nodes, reversed_edges, **{name: column[order] for name, column in columns.items()})
    for name in ("component", "reason", "matched", "similarity"):
        np.testing.assert_array_equal(getattr(decision, name), getattr(again, name))
    assert (again.guards, again.sweep) == (decision.guards, decision.sweep)


def chain(count: int, similarity: float = 0.8) -> list[Edge]:
    return [(number, number + 1, similarity) for number in range(count - 1)]


def test_pairs_that_are_not_mutual_connect_no_images_but_match_the_holdout() -> None:
    nodes, edges = nodes_of(5, is_holdout=is_(5, 4)), [*chain(4), (3, 4, 0.5)]
    mutual = np.array([True, False, True, False])
    assert kept(decided(DedupConfig(), nodes, edges, mutual=mutual)) == [1]
    decision = decided(DedupConfig(mutual_neighbors=True, label_guard=False), nodes, edges, mutual=mutual)
    assert kept(decision) == [0, 2]
    assert decision.component.tolist() == [0, 0, 2, 2, 4]
    assert reasons(decision)[3] == "holdout"
    assert decision.guards == {"mutual_neighbors": {"pairs_left_out": 1}}
    whole = DedupConfig(mutual_neighbors=True, decontamination="component")
    assert kept(decided(whole, nodes, edges, mutual=mutual)) == [0, 2]
    assert kept(decided(whole, nodes, edges)) == []


def test_large_component_is_split_at_its_weakest_pair() -> None:
    """A chain of two groups of three, connected by a pair of 0.65. The first two steps of 0.02 do not split it."""
    edges = [(0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.65), (3, 4, 0.7), (4, 5, 0.9)]
    plain = decided(DedupConfig(), nodes_of(6), edges)
    assert plain.component.tolist() == [0] * 6 and kept(plain) == [1]
    config = DedupConfig(max_component_size=3, label_guard=False)
    decision = decided(config, nodes_of(6), edges)
    assert decision.component.tolist() == [0, 0, 0, 3, 3, 3] and kept(decision) == [1, 4]
    counts = {"components_split": 1, "images_in_them": 6, "components_still_larger": 0}
    assert decision.guards == {"max_component_size": counts}
    halves = decided(config, nodes_of(6), [*edges[:2], (2, 3, 0.63), *edges[3:]])
    assert halves.component.tolist() == [0, 0, 0, 3, 3, 3], "a small component is split no further"
    # A part of at most `max_component_size` is not split by the next step.
    finer = decided(config.model_copy(update={"max_component_size": 2}), nodes_of(6), edges)
    assert finer.component.tolist() == [0, 1, 2, 3, 4, 4]
    assert decided(config.model_copy(update={"max_component_size": 6}), nodes_of(6), edges).guards == {
        "max_component_size": {"components_split": 0, "images_in_them": 0, "components_still_larger": 0}
    }


def test_component_of_similarity_one_may_remain_too_large_and_is_counted() -> None:
    decision = decided(DedupConfig(max_component_size=3), nodes_of(9), [*chain(6, 1.0), (6, 7, 0.7), (7, 8, 0.7)])
    assert decision.component.tolist() == [0] * 6 + [6] * 3
    counts = {"components_split": 1, "images_in_them": 6, "components_still_larger": 1}
    assert decision.guards["max_component_size"] == counts


@pytest.mark.parametrize("count", [2, 3, 7, 500])
def test_matches_kept_keeps_every_other_image_of_a_chain(count: int) -> None:
    """The priority falls along the chain, so that the decision takes the maximum number of rounds."""
    config, is_seed = DedupConfig(matches_kept=True, label_guard=False), is_(count, 0)
    nodes = nodes_of(count, is_seed=is_seed, content=2 ** np.arange(count, 0, -1.0).clip(max=60))
    decision = decided(config, nodes, chain(count))
    assert kept(decision) == list(range(0, count, 2))
    assert (decision.similarity[1::2] == np.float32(0.8)).all()
    assert decision.guards == {"matches_kept": {"images_kept": (count + 1) // 2 - 1}}


def test_holdout_matches_by_cosine_in_spite_of_a_low_similarity() -> None:
    nodes, edges = nodes_of(4, is_holdout=is_(4, 0)), [(0, 1, 0.1), (0, 2, 0.1), (0, 3, 0.7)]
    cosine = np.array([0.79, 0.8, 0.9])
    assert kept(decided(DedupConfig(), nodes, edges, cosine=cosine)) == [1, 2]
    decision = decided(DedupConfig(holdout_cosine=0.8, label_guard=False), nodes, edges, cosine=cosine)
    assert kept(decision) == [1]
    assert decision.similarity[2] == np.float32(0.1) and decision.matched[2] == 0
    assert decision.guards == {"holdout_cosine": {"images_taken": 1}}


def test_families_count_the_pairs_that_would_connect_images() -> None:
    edges = [(0, 1, 0.8), (0, 2, 0.8), (1, 2, 0.79), (3, 4, 0.8), (5, 6, 0.5), (5, 7, 0.5), (6, 7, 0.5)]
    config = DedupConfig(families=FamilyConfig(), label_guard=False)
    decision = decided(config, nodes_of(8), edges, differs_locally=[True] * 7)
    assert decision.guards == {"families": {"pairs_left_out": 3}}
    assert kept(decision) == [0, 1, 2, 3, 5, 6, 7]


# Facts of the manifest


@pytest.mark.parametrize("seed", range(30))
def test_sweep_counts_the_components_at_each_threshold(seed: int, block: None) -> None:
    config, nodes, edges, columns = guarded_case(seed)
    mutual_edges = mutual_edges_of(config, edges, columns)
    usable = [e for e in mutual_edges if not labels_differ(config, nodes, *e[:2])]
    sweep = decided(config, nodes, edges, **columns).sweep
    assert {config.threshold, config.holdout_threshold} <= {row["threshold"] for row in sweep}
    for row in sweep:
        threshold = float(row["threshold"])
        parts = {frozenset(part) for part in component_of(len(nodes.image_ids), usable, threshold)}
        assert row == {
            "threshold": threshold,
            "pairs": sum(np.float32(value) >= np.float32(threshold) for *_, value in usable),
            "components_of_two_or_more": sum(len(part) > 1 for part in parts),
            "dropped": sum(len(part) - max(1, int(nodes.is_seed[list(part)].sum())) for part in parts),
            "largest_component": max(len(part) for part in parts),
        }


def test_sweep_goes_from_the_lowest_similarity_written_to_one() -> None:
    config = DedupConfig(threshold=0.67, holdout_threshold=0.4)
    steps = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.67, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert dedup.sweep_thresholds(config, 0.3) == steps
    assert dedup.sweep_thresholds(config, 0.62) == [0.6, *steps[7:]]
    assert dedup.sweep_thresholds(DedupConfig(threshold=1, holdout_threshold=1), 1.0) == [0.95]
    assert dedup.sweep_thresholds(config, -1.0)[0] == 0


@pytest.mark.parametrize("seed", range(3))
def test_largest_components_and_sizes_over_blocks(tmp_path: Path, seed: int, block: None) -> None:
    groups = [3, 2, 5, 2, 3, *[2] * 25, 1]
    images = write_ingest(tmp_path / "ingest", [[image_row(id_of(n), "web", "pool") for n in range(sum(groups))]])
    starts = np.cumsum([0, *groups[:-1]]).tolist()
    pairs = [
        (id_of(start + n), id_of(start + n + 1), 0.9)
        for start, size in zip(starts, groups, strict=True)
        for n in range(size - 1)
    ]
    copies = write_pairs(tmp_path / "pairs", images, [pairs])
    manifest = dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=copies), str(tmp_path / "dedup"))
    by_size = sorted(zip(groups, starts, strict=True), key=lambda item: (-item[0], item[1]))[:20]
    assert manifest.facts["largest_components"] == [[id_of(start), size] for size, start in by_size]
    assert manifest.facts["component_sizes"] == {"2": 27, "3": 2, "5": 1}
    assert manifest.facts["components_of_two_or_more"] == 30


@pytest.mark.parametrize("seed", range(5))
def test_blocks_and_buckets_of_any_size_give_the_same_bytes(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, images, pairs = random_run(tmp_path, seed)
    config = guarded_case(seed)[0]
    written = []
    for block_size, rows_per_bucket in ((disk_arrays.BLOCK, 1 << 20), (1, 1), (7, 3)):
        monkeypatch.setattr(disk_arrays, "BLOCK", block_size)  # the real size, a million: one block and one bucket
        monkeypatch.setattr(duplicate_graph, "ROWS_PER_BUCKET", rows_per_bucket)
        output = str(tmp_path / f"dedup-{block_size}")
        dedup.run(config, RunFolder(ingest=images, pairs=pairs), output)
        written.append(bytes_in(output))
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("num_done", [0, 2, 5])
def test_resumed_run_gives_the_same_bytes(tmp_path: Path, num_done: int) -> None:
    """After a kill: some shards, or all of them, are marked done, and there is no manifest."""
    images, pairs = small_run(tmp_path)
    straight, output = str(tmp_path / "straight"), str(tmp_path / "dedup")
    manifest = dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), straight)
    claim(output, manifest.plan, replace=False)
    for record in manifest.shards[:num_done]:
        for file in record.files:
            paths.write_bytes(f"{output}/{file.name}", paths.read_bytes(f"{straight}/{file.name}"))
        mark_shard_done(output, record)
    assert dedup.run(DedupConfig(), RunFolder(ingest=images, pairs=pairs), output) == manifest
    assert bytes_in(output) == bytes_in(straight)


@pytest.mark.parametrize("seed", range(5))
def test_the_check_of_the_corpus_sees_the_sources_and_labels_of_the_graph(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards = []
    for number in range(6):
        role = str(rng.choice(["seed", "pool", "holdout"]))
        rows = [
            image_row(id_of(n), f"{role}{number % 4}", role, label=(None, "a", "b")[int(rng.integers(0, 3))])
            for n in rng.integers(0, 30, int(rng.integers(0, 15))).tolist()
        ]
        shards.append(rows)
    images = write_ingest(tmp_path / "ingest", shards)
    graph = duplicate_graph.read_graph(images, write_pairs(tmp_path / "pairs", images, [[]]))
    chosen = np.flatnonzero(rng.random(len(graph.nodes.image_ids)) < 0.7)
    origins = duplicate_graph.read_origins(images, graph.nodes.image_ids[chosen])
    assert origins.sources == graph.sources
    np.testing.assert_array_equal(origins.source, graph.nodes.source[chosen])
    np.testing.assert_array_equal(origins.label, graph.nodes.label[chosen])
    assert len(duplicate_graph.read_origins(images, graph.nodes.image_ids[:0]).source) == 0


def test_ingest_without_images_is_refused(tmp_path: Path) -> None:
    images = write_ingest(tmp_path / "ingest", [[], []])
    with pytest.raises(InputError, match="holds no accepted image"):
        dedup.run(
            DedupConfig(),
            RunFolder(ingest=images, pairs=write_pairs(tmp_path / "pairs", images, [[]])),
            "dedup",
        )


MEASURE = """
import sys, threading, time
from curation import dedup
from curation.copies import duplicate_graph
from curation.files import disk_arrays
from curation.engine.runner import InlineRunner
from curation.run_folder import RunFolder

disk_arrays.BLOCK = duplicate_graph.ROWS_PER_BUCKET = 5_000
peak, done = 0, False

def watch():
    global peak
    while not done:
        (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
        peak = max(peak, int(line.split()[1]))
        time.sleep(0.002)

thread = threading.Thread(target=watch, daemon=True)
thread.start()
config = dedup.DedupConfig(matches_kept=True, max_component_size=50, families=dedup.FamilyConfig())
folder = RunFolder.of(sys.argv[1])
dedup.run(config, folder, folder.dedup)
done = True
thread.join()
print(peak)
"""


def test_memory_does_not_grow_with_images_and_pairs(tmp_path: Path) -> None:
    """The anonymous memory of a process, for 10,000 and for 50,000 images and pairs."""
    kilobytes = []
    for num_shards in (2, 10):
        rng = np.random.default_rng(num_shards)
        folder, count = tmp_path / str(num_shards), 5_000
        ids = np.array([rng.bytes(16).hex() for _ in range(count * num_shards)])
        tables = [
            pa.table(
                {
                    name: part
                    if name == "image_id"
                    else pa.array(["pool"] * count if field.type == pa.string() else np.full(count, 9), field.type)
                    for name, field in zip(schemas.IMAGES.names, schemas.IMAGES, strict=True)
                },
                schema=schemas.IMAGES,
            )
            for part in np.split(ids, num_shards)
        ]
        images = write_stage(
            folder / "ingest", [{"images": table} for table in tables], totals=[{"accepted": count}] * num_shards
        )
        ends = np.sort(ids[rng.integers(0, len(ids), (2, len(ids)))], axis=0)
        pairs = pa.table(
            {
                "image_id": ends[0],
                "other_image_id": ends[1],
                "similarity": rng.random(len(ids), np.float32),
                "differs_locally": rng.random(len(ids)) < 0.3,
                "cosine": rng.random(len(ids), np.float32),
                "mutual": rng.random(len(ids)) < 0.5,
            },
            schema=schemas.PAIRS,
        )
        hashes = {"images": require_manifest(images).content_hash}
        shards = [{"pairs": pairs.slice(start, count)} for start in range(0, len(ids), count)]
        write_stage(
            folder / "pairs", shards, facts={"min_similarity": 0.0, "max_holdout_threshold": 1.0}, inputs=hashes
        )
        command = [sys.executable, "-c", MEASURE, str(folder)]
        kilobytes.append(int(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout))
    # 40,000 more images and pairs take 9 MB in arrays, and about 30 MB as Python objects.
    assert kilobytes[1] < kilobytes[0] + 5_000
