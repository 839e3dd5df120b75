"""Deduplication: the decisions equal a plain reading of the rules, and every row is accounted for."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import dedup, records, storage
from curation.dedup import Decision, DedupConfig, Nodes, decide
from curation.errors import ConfigError, InputError, OutputMismatchError
from curation.runner import InlineRunner
from tests.curation.builders import (
    bytes_in,
    id_of,
    image_row,
    unit_vectors,
    write_dedup,
    write_ingest,
    write_pairs,
    write_vectors,
)

Edge = tuple[int, int, float]


def nodes_of(count: int, **columns: Any) -> Nodes:
    """Nodes that are plain pool images unless `columns` say more."""
    fields: dict[str, Any] = {
        "image_ids": np.array([id_of(node) for node in range(count)]),
        "is_seed": np.zeros(count, bool),
        "is_holdout": np.zeros(count, bool),
        "pixels": np.full(count, 100),
        "length": np.full(count, 100),
    }
    return Nodes(**fields | {name: np.asarray(value) for name, value in columns.items()})


def decided(config: DedupConfig, nodes: Nodes, edges: list[Edge]) -> Decision:
    first, second, similarity = zip(*edges, strict=True) if edges else ((), (), ())
    return decide(
        config, nodes, np.array(first, np.int64), np.array(second, np.int64), np.array(similarity, np.float32)
    )


def kept(decision: Decision) -> list[int]:
    return np.flatnonzero(decision.matched < 0).tolist()


def is_(count: int, *marked: int) -> np.ndarray:
    return np.isin(np.arange(count), marked)


# A plain reading of the module's text, one node after another.


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
    wide = component_of(count, edges, config.holdout_threshold)
    result: list[tuple[str | None, int, float | None]] = []
    for node in range(count):
        answer: tuple[str | None, int, float | None] = (None, -1, None)
        exempt = nodes.is_seed[node] and not config.decontaminate_seeds
        if nodes.is_holdout[node] and not exempt:
            answer = ("holdout", node, 1.0)
        elif not nodes.is_holdout[node] and not exempt:
            matches = [
                (-between[frozenset((node, other))], other)
                for other in np.flatnonzero(nodes.is_holdout).tolist()
                if between.get(frozenset((node, other)), -2) >= np.float32(config.holdout_threshold)
            ]
            held_out = [other for other in sorted(wide[node]) if nodes.is_holdout[other]]
            if matches:
                answer = ("holdout", min(matches)[1], float(-min(matches)[0]))
            elif config.decontamination == "component" and held_out:
                answer = ("holdout", held_out[0], None)
        result.append(answer)
    for members in component_of(count, edges, config.threshold):
        left = [node for node in members if result[node][1] < 0]
        left.sort(key=lambda n: (not nodes.is_seed[n], -nodes.pixels[n], -nodes.length[n], n))
        for node in left[1:]:
            if not nodes.is_seed[node]:
                similarity = between.get(frozenset((node, left[0])), -2)
                known = float(similarity) if similarity >= np.float32(config.threshold) else None
                result[node] = ("near", left[0], known)
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


@pytest.mark.parametrize("seed", range(150))
def test_decisions_follow_the_rules(seed: int) -> None:
    config, nodes, edges = random_case(seed)
    decision = decided(config, nodes, edges)
    expected = by_the_rules(config, nodes, edges)
    found = [
        (reason, int(matched), None if np.isnan(similarity) else float(similarity))
        for reason, matched, similarity in zip(decision.reason, decision.matched, decision.similarity, strict=True)
    ]
    assert found == [(reason, matched, None if s is None else float(s)) for reason, matched, s in expected]
    smallest = [min(members) for members in component_of(len(nodes.image_ids), edges, config.threshold)]
    assert decision.component.tolist() == smallest

    # What holds whatever the rules say in detail.
    keeps = decision.matched < 0
    assert (keeps == np.array([reason is None for reason in decision.reason])).all()
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
def test_what_was_kept_is_kept_again(seed: int) -> None:
    config, nodes, edges = random_case(seed)
    config = config.model_copy(update={"decontaminate_seeds": True})
    stays = kept(decided(config, nodes, edges))
    place = {node: position for position, node in enumerate(stays)}
    again = nodes_of(
        len(stays),
        image_ids=nodes.image_ids[stays],
        is_seed=nodes.is_seed[stays],
        pixels=nodes.pixels[stays],
        length=nodes.length[stays],
    )
    left = [(place[a], place[b], similarity) for a, b, similarity in edges if a in place and b in place]
    assert kept(decided(config, again, left)) == list(range(len(stays)))


# The rules one by one


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_pairs_all_stay(count: int) -> None:
    decision = decided(DedupConfig(), nodes_of(count), [])
    assert kept(decision) == list(range(count)) == decision.component.tolist()


def test_a_chain_is_one_component_though_its_ends_are_no_copies() -> None:
    decision = decided(DedupConfig(), nodes_of(3, pixels=[100, 100, 400]), [(0, 1, 0.8), (1, 2, 0.7)])
    assert kept(decision) == [2]
    assert decision.component.tolist() == [0, 0, 0]
    assert decision.matched.tolist() == [2, 2, -1]
    assert np.isnan(decision.similarity[0]) and decision.similarity[1] == np.float32(0.7)


@pytest.mark.parametrize(
    ("columns", "stays"),
    [
        ({}, 0),
        ({"pixels": [100, 200, 200], "length": [9, 1, 1]}, 1),
        ({"pixels": [100, 200, 200], "length": [9, 1, 2]}, 2),
        ({"pixels": [900, 200, 200], "is_seed": [False, False, True]}, 2),
    ],
)
def test_most_pixels_then_most_bytes_then_the_smallest_id_stays(columns: dict[str, Any], stays: int) -> None:
    edges = [(0, 1, 0.9), (0, 2, 0.9), (1, 2, 0.9)]
    assert kept(decided(DedupConfig(), nodes_of(3, **columns), edges)) == [stays]


def test_all_seeds_of_a_component_stay_and_take_the_rest_away() -> None:
    nodes = nodes_of(4, is_seed=is_(4, 1, 3), pixels=[900, 100, 900, 200])
    decision = decided(DedupConfig(), nodes, [(0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.9)])
    assert kept(decision) == [1, 3]
    assert decision.matched.tolist() == [3, -1, 3, -1]


@pytest.mark.parametrize(("similarity", "copies"), [(0.59, False), (0.6, True), (0.61, True)])
def test_threshold_itself_counts(similarity: float, copies: bool) -> None:
    edges = [(0, 1, similarity)]
    assert (kept(decided(DedupConfig(threshold=0.6), nodes_of(2), edges)) == [0]) == copies
    holdout = nodes_of(2, is_holdout=is_(2, 0))
    config = DedupConfig(threshold=0.6, holdout_threshold=0.6)
    assert (kept(decided(config, holdout, edges)) == []) == copies


def test_holdout_takes_what_matches_it_or_the_whole_component() -> None:
    """0 is held out; 1 matches it, 2 matches 1, 3 is a copy of 2."""
    nodes, edges = nodes_of(4, is_holdout=is_(4, 0)), [(0, 1, 0.5), (1, 2, 0.5), (2, 3, 0.9)]
    direct = decided(DedupConfig(), nodes, edges)
    assert direct.reason.tolist() == ["holdout", "holdout", None, "near"]
    assert direct.matched.tolist() == [0, 0, -1, 2]
    whole = decided(DedupConfig(decontamination="component"), nodes, edges)
    assert whole.reason.tolist() == ["holdout"] * 4
    assert whole.matched.tolist() == [0, 0, 0, 0]
    assert np.isnan(whole.similarity).tolist() == [False, False, True, True]


def test_the_most_similar_holdout_image_is_named() -> None:
    nodes = nodes_of(4, is_holdout=is_(4, 0, 2, 3))
    decision = decided(DedupConfig(), nodes, [(0, 1, 0.5), (1, 2, 0.8), (1, 3, 0.8)])
    assert decision.matched[1] == 2 and decision.similarity[1] == np.float32(0.8)


@pytest.mark.parametrize("mode", ["direct", "component"])
def test_seeds_are_spared_where_the_config_says_so(mode: str) -> None:
    """0 is held out, and 1 is held out and a seed; the seed 2 and the pool image 3 match 0."""
    nodes = nodes_of(4, is_holdout=is_(4, 0, 1), is_seed=is_(4, 1, 2))
    edges = [(0, 2, 0.9), (0, 3, 0.9)]
    settings = {"decontamination": mode}
    strict = decided(DedupConfig.model_validate(settings), nodes, edges)
    assert kept(strict) == []
    spared = decided(DedupConfig.model_validate(settings | {"decontaminate_seeds": False}), nodes, edges)
    assert kept(spared) == [1, 2]
    assert spared.reason[3] == "holdout"


def test_config_in_which_copies_of_the_holdout_could_stay_is_refused() -> None:
    with pytest.raises(ValueError, match="holdout_threshold must not lie above threshold"):
        DedupConfig(threshold=0.5, holdout_threshold=0.6)


# The stage


def small_run(folder: Path) -> tuple[str, str]:
    """Ingest of three sources with exact copies across and inside them, and pairs among the images."""

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
    names = storage.require_manifest(folder).files("duplicates")
    return [row for name in names for row in storage.read_table(f"{folder}/{name}", records.DUPLICATES).to_pylist()]


def test_every_row_of_ingest_gets_its_answer_in_place(tmp_path: Path) -> None:
    images, pairs = small_run(tmp_path)
    manifest = dedup.run(DedupConfig(), images, pairs, str(tmp_path / "dedup"), InlineRunner())
    found = [
        (int(row["image_id"], 16), row["reason"], row["matched_image_id"] and int(row["matched_image_id"], 16))
        for row in rows_of(str(tmp_path / "dedup"))
    ]
    assert found == [
        *[(1, None, None), (2, None, None), (1, "exact", 1)],
        *[(1, "exact", 1), (3, None, None), (4, "near", 1), (3, "exact", 3), (9, "holdout", 9)],
        *[(5, "near", 3), (3, "exact", 3), (6, "near", 3), (7, "holdout", 8)],
        *[(9, "holdout", 9), (8, "holdout", 8), (8, "holdout", 8)],
    ]
    rows = rows_of(str(tmp_path / "dedup"))
    assert [row["kept"] for row in rows] == [reason is None for _, reason, _ in found]
    assert all((row["matched_image_id"] is None) == row["kept"] for row in rows)
    components = {int(row["image_id"], 16): int(row["component_id"], 16) for row in rows}
    assert components == {1: 1, 2: 2, 3: 3, 4: 1, 5: 3, 6: 3, 7: 7, 8: 8, 9: 9}
    similarity = {int(row["image_id"], 16): row["similarity"] for row in rows if row["reason"] != "exact"}
    assert similarity == {
        n: pytest.approx(s) if s else None
        for n, s in {1: None, 2: None, 3: None, 4: 0.9, 5: 0.7, 6: None, 7: 0.5, 8: 1.0, 9: 1.0}.items()
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
        role = str(rng.choice(records.ROLES))
        numbers = rng.integers(0, len(nodes.image_ids), int(rng.integers(0, 20)))
        shards.append([image_row(id_of(n), f"source of {role}", role, width=10 + n % 3) for n in numbers.tolist()])
    shards.append([image_row(id_of(0), "last", "pool", width=10)])
    there = {row["image_id"] for rows in shards for row in rows}
    pairs = [(id_of(a), id_of(b), s) for a, b, s in edges if id_of(a) in there and id_of(b) in there]
    images = write_ingest(folder / "ingest", shards)
    return config, images, write_pairs(folder / "pairs", images, [pairs[::2], [], pairs[1::2]])


@pytest.mark.parametrize("seed", range(25))
def test_rows_in_are_rows_kept_and_dropped_by_reason(tmp_path: Path, seed: int) -> None:
    config, images, pairs = random_run(tmp_path, seed)
    output = str(tmp_path / "dedup")
    manifest = dedup.run(config, images, pairs, output, InlineRunner())
    ingested = [
        row
        for name in storage.require_manifest(images).files("images")
        for row in storage.read_table(f"{images}/{name}", records.IMAGES).to_pylist()
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
    by_id: dict[str, set[str]] = {}
    for image in ingested:
        by_id.setdefault(image["image_id"], set()).add(image["role"])
    for row, image in zip(rows, ingested, strict=True):
        roles = by_id[row["image_id"]]
        if row["kept"]:
            assert image["role"] != "holdout"
            assert image["role"] == ("seed" if "seed" in roles else "pool"), "a seed stands for its copies"
            assert "holdout" not in roles or not config.decontaminate_seeds
        elif row["reason"] == "exact":
            assert row["matched_image_id"] == row["image_id"]
        elif row["reason"] == "near":
            assert row["matched_image_id"] in kept_ids
        else:
            assert "holdout" in by_id[row["matched_image_id"]]
        assert row["component_id"] <= row["image_id"]


def test_second_run_does_nothing_and_another_threshold_is_refused(tmp_path: Path) -> None:
    images, pairs = small_run(tmp_path)
    output = str(tmp_path / "dedup")
    first = dedup.run(DedupConfig(), images, pairs, output, InlineRunner())
    before = bytes_in(output)
    assert dedup.run(DedupConfig(), images, pairs, output, InlineRunner()) == first
    with pytest.raises(OutputMismatchError, match=r"config\.threshold: 0\.6 there, 0\.7 now"):
        dedup.run(DedupConfig(threshold=0.7), images, pairs, output, InlineRunner())
    assert bytes_in(output) == before
    again = dedup.run(DedupConfig(threshold=0.7), images, pairs, output, InlineRunner(), replace=True)
    assert again.totals["near"] == 2
    other = str(tmp_path / "other")
    dedup.run(DedupConfig(), images, pairs, other, InlineRunner())
    assert bytes_in(other) == before


def test_threshold_below_what_was_written_is_refused(tmp_path: Path) -> None:
    images, _ = small_run(tmp_path)
    pairs = write_pairs(tmp_path / "few", images, [[]], min_similarity=0.5)
    with pytest.raises(ConfigError, match=r"holdout_threshold is 0\.45, but pairs below 0\.5 were not written"):
        dedup.run(DedupConfig(), images, pairs, str(tmp_path / "dedup"), InlineRunner())
    assert not (tmp_path / "dedup").exists()


@pytest.mark.parametrize("unknown", [id_of(0), id_of(500), "f" * 32])
def test_pairs_of_other_images_are_refused(tmp_path: Path, unknown: str) -> None:
    images, _ = small_run(tmp_path)
    one, other = sorted((id_of(3), unknown))
    pairs = write_pairs(tmp_path / "other", images, [[(one, other, 0.9)]])
    with pytest.raises(InputError, match=unknown):
        dedup.run(DedupConfig(), images, pairs, str(tmp_path / "dedup"), InlineRunner())
    assert not (tmp_path / "dedup").exists()


# Reading what was kept


def test_kept_images_come_with_their_vectors(tmp_path: Path) -> None:
    images, _ = small_run(tmp_path)
    matrix = unit_vectors(0, 10).astype(np.float16)
    shards = [[1, 2], [1, 3, 4, 9], [5, 3, 6, 7], [], [9, 8]]
    embedded = write_vectors(tmp_path / "embed", images, [{id_of(n): matrix[n] for n in shard} for shard in shards])
    deduplicated = write_dedup(tmp_path / "dedup", images, lambda row: row["image_id"] not in (id_of(4), id_of(6)))
    parts = dedup.kept_shards(images, deduplicated, embedded)
    assert len(parts) == 5

    def numbers(role: str, source: str | None = None) -> list[list[int]]:
        return [[int(i, 16) for i in dedup.read_kept(part, role=role, source=source)[0]] for part in parts]

    assert numbers("pool") == [[], [1, 3, 9], [5, 3, 7], [], []]
    assert numbers("seed") == numbers("seed", "seed") == [[1, 2], [], [], [], []]
    assert numbers("seed", "other") == [[]] * 5
    assert numbers("holdout") == [[]] * 5
    for part in parts:
        ids, found = dedup.read_kept(part, role="pool")
        assert found.shape == (len(ids), 8)
        assert found.tobytes() == matrix[[int(image_id, 16) for image_id in ids]].tobytes()


def test_stages_of_different_runs_are_refused(tmp_path: Path) -> None:
    images, _ = small_run(tmp_path)
    deduplicated = write_dedup(tmp_path / "dedup", images)
    few = write_vectors(tmp_path / "few", images, [{id_of(1): unit_vectors(0, 1)[0]}])
    with pytest.raises(InputError, match=r"differ in their number of shards \(5, 5, 1\)"):
        dedup.kept_shards(images, deduplicated, few)
    other = write_vectors(tmp_path / "other", images, [{id_of(77): unit_vectors(0, 1)[0]} for _ in range(5)])
    with pytest.raises(InputError, match=rf"vectors-00001\.parquet.*{id_of(1)}"):
        dedup.read_kept(dedup.kept_shards(images, deduplicated, other)[1], role="pool")


def test_with_matches_kept_every_dropped_image_is_a_copy_of_a_kept_one() -> None:
    for seed in range(20):
        generator = np.random.default_rng(seed)
        count = 12
        ends = np.array([(i, j) for i in range(count) for j in range(i + 1, count) if generator.random() < 0.2])
        first, second = ends.reshape(-1, 2).T
        similarity = generator.uniform(0.7, 1, len(first)).astype(np.float32)
        nodes = dedup.Nodes(
            image_ids=np.array([id_of(number) for number in range(count)]),
            is_seed=generator.random(count) < 0.2,
            is_holdout=np.zeros(count, bool),
            pixels=generator.integers(1, 100, count),
            length=generator.integers(1, 100, count),
        )
        config = DedupConfig(threshold=0.7, holdout_threshold=0.7, matches_kept=True)
        decision = dedup.decide(config, nodes, first, second, similarity)
        plain = dedup.decide(config.model_copy(update={"matches_kept": False}), nodes, first, second, similarity)
        assert (decision.component == plain.component).all()
        edges = {frozenset(pair): value for pair, value in zip(ends.tolist(), similarity, strict=True)}
        kept = decision.matched < 0
        assert kept[nodes.is_seed].all() and kept.sum() >= (plain.matched < 0).sum()
        for node in np.flatnonzero(~kept):
            partner = int(decision.matched[node])
            assert kept[partner] and decision.similarity[node] == edges[frozenset((int(node), partner))]
        for one, other in ends.tolist():
            assert not (kept[one] and kept[other]) or nodes.is_seed[one] or nodes.is_seed[other]
