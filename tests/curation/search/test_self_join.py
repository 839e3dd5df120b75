"""The self-join finds the pairs of brute force, each once with its first places, with equal bytes for any cut."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.engine.manifest import Manifest, read_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner, Runner
from curation.errors import ConfigError, InputError, OutputMismatchError
from curation.files import parquet, vectors
from curation.files.image_ids import bucket_of, pack_ids
from curation.search import exact, self_join
from curation.search.config import RECALL_QUERIES, SearchConfig
from curation.search.self_join import Neighborhood
from tests.curation.builders import Killed, KilledRunner, bytes_in, hashed_id, unit_vectors

# The rows of one file: ids, and vectors (N, D) float16.
Part = tuple[list[str], np.ndarray]
# For each pair of ids: two places, the cosine, and whether the pair is mutual.
Pairs = dict[tuple[str, str], tuple[int, int, float, bool]]

WIDTH = 12


def of_kind(kind: str, seed: int, count: int) -> np.ndarray:
    """Unit vectors (count, WIDTH) float16."""
    rng = np.random.default_rng(seed)
    match kind:
        case "clustered":
            matrix = unit_vectors(seed, 9, WIDTH)[rng.integers(0, 9, count)] + rng.normal(0, 0.08, (count, WIDTH))
        case "tied":
            corners = np.where(rng.random((14, WIDTH)) < 0.5, -1.0, 1.0)
            matrix = corners[rng.integers(0, 14, count)]
        case _:
            matrix = unit_vectors(seed, count, WIDTH)
    unit: np.ndarray = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
    return unit


def make_parts(kind: str, seed: int, count: int = 120) -> list[Part]:
    """Files of some images, a third of which occur again, in another file or in the same one; one file is empty."""
    rng = np.random.default_rng(seed)
    matrix = of_kind(kind, seed, count)
    numbers = rng.permutation(np.concatenate([np.arange(count), rng.integers(0, count, count // 3)]))
    rows = [*np.array_split(numbers, 4), numbers[:0]]
    rows = [rows[number] for number in rng.permutation(5)]
    return [([hashed_id(int(number)) for number in part], matrix[part]) for part in rows]


def write(folder: Path, parts: Sequence[Part]) -> list[str]:
    files = []
    for number, (ids, matrix) in enumerate(parts):
        files.append(f"{folder}/vectors-{number:05d}.parquet")
        parquet.write_table(files[-1], vectors.make_table(ids, matrix))
    return files


def run(
    folder: Path,
    parts: Sequence[Part],
    *,
    k: int = 4,
    floor: float = 0.3,
    num_buckets: int = 5,
    runner: Runner | None = None,
    name: str = "join",
    **search: Any,
) -> tuple[Manifest, Pairs]:
    """Join some files; returns the manifest and all pairs."""
    files = write(folder / "vectors", parts)
    neighborhood = Neighborhood(SearchConfig(**search), k, floor, num_buckets)
    output = str(folder / name)
    manifest = self_join.run(neighborhood, files, output, runner or InlineRunner(), content_hash="hash")
    return manifest, pairs_of(output, num_buckets)


def pairs_of(output: str, num_buckets: int) -> Pairs:
    """All pairs of a join; asserts that they are sorted and lie in the right bucket."""
    pairs: Pairs = {}
    for bucket in range(num_buckets):
        table = self_join.read_bucket(output, bucket)
        assert table.schema == self_join.PAIRED
        rows = [tuple(row.values()) for row in table.to_pylist()]
        assert rows == sorted(rows) and all(low < high for low, high, *_ in rows)
        assert (bucket_of(pack_ids(table["image_id"]), num_buckets) == bucket).all()
        pairs |= {
            (low, high): (place, other_place, cosine, mutual) for low, high, place, other_place, cosine, mutual in rows
        }
        assert len({row[:2] for row in rows}) == len(rows)
    return pairs


class Distinct:
    """The images of some files, each once, and their similarities."""

    def __init__(self, parts: Sequence[Part]) -> None:
        ids = np.array([image_id for part_ids, _ in parts for image_id in part_ids])
        self.ids, self.places = np.unique(ids, return_index=True)
        matrix = np.concatenate([matrix for _, matrix in parts])[self.places]
        one, other = np.indices((len(self.ids), len(self.ids))).reshape(2, -1)
        self.scores = exact.pair_similarity(matrix, one, matrix, other).reshape(len(self.ids), len(self.ids))
        double = matrix.astype(np.float64) @ matrix.astype(np.float64).T
        np.testing.assert_allclose(self.scores, double, atol=1e-6)

    def nearest(self, k: int, floor: float, ties: str) -> list[tuple[int, int]]:
        """Each image with its `k` nearest other images; ties go to the first place, or to the smallest id."""
        tie = self.places if ties == "place" else np.arange(len(self.ids))
        pairs = []
        for image, scores in enumerate(self.scores):
            best = np.lexsort((tie, -scores))[: k + 1]  # one more, for the image itself
            best = best[(best != image) & (scores[best] >= np.float32(floor))]
            pairs += [(image, int(other)) for other in best[np.lexsort((best, -scores[best]))][:k]]
        return pairs

    def pairs(self, nearest: Sequence[tuple[int, int]]) -> Pairs:
        directed = set(nearest)
        return {
            (str(self.ids[low]), str(self.ids[high])): (
                int(self.places[low]),
                int(self.places[high]),
                float(self.scores[low, high]),
                {(low, high), (high, low)} <= directed,
            )
            for low, high in {(min(pair), max(pair)) for pair in directed}
        }


KINDS = ["random", "clustered", "tied"]


@pytest.mark.parametrize(("k", "floor"), [(1, 0.3), (4, 0.6), (30, -1.0), (500, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_join_equals_brute_force(tmp_path: Path, kind: str, k: int, floor: float) -> None:
    parts = make_parts(kind, seed=k)
    manifest, pairs = run(tmp_path, parts, k=k, floor=floor)
    distinct = Distinct(parts)
    nearest = distinct.nearest(k, floor, ties="place")
    assert pairs == distinct.pairs(nearest)
    num_full = sum(count == k for count in Counter(image for image, _ in nearest).values())
    assert manifest.totals == {"edges": len(nearest), "full_lists": num_full} and manifest.facts == {}
    assert any(mutual for *_, mutual in pairs.values())
    assert k == 500 or not all(mutual for *_, mutual in pairs.values())


@pytest.mark.parametrize("rows_per_part", [10**6, 60, 9])
@pytest.mark.parametrize(("k", "floor"), [(4, 0.3), (500, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_join_of_all_cells_equals_brute_force(
    tmp_path: Path, kind: str, k: int, floor: float, rows_per_part: int
) -> None:
    """With one group of cells, with several, and with more groups than cells."""
    parts = make_parts(kind, seed=rows_per_part)
    ivf: dict[str, Any] = {"backend": "ivf", "rows_per_cell": 12, "num_probes": 1000, "rows_per_part": rows_per_part}
    manifest, pairs = run(tmp_path, parts, k=k, floor=floor, **ivf)
    distinct = Distinct(parts)
    nearest = distinct.nearest(k, floor, ties="id")
    assert pairs == distinct.pairs(nearest)
    assert manifest.facts == {"backend": "ivf", "recall": 1.0, "recall_neighbors": len(nearest)}
    num_full = sum(count == k for count in Counter(image for image, _ in nearest).values())
    assert manifest.totals == {"edges": len(nearest), "full_lists": num_full}


@pytest.mark.parametrize("rows_per_part", [10**6, 40])
@pytest.mark.parametrize("num_probes", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_measured_recall_is_the_true_recall(tmp_path: Path, kind: str, num_probes: int, rows_per_part: int) -> None:
    """The sample holds all images, since there are fewer than RECALL_QUERIES."""
    assert RECALL_QUERIES > 160
    parts = make_parts(kind, seed=num_probes)
    ivf: dict[str, Any] = {
        "backend": "ivf",
        "rows_per_cell": 8,
        "num_probes": num_probes,
        "rows_per_part": rows_per_part,
    }
    manifest, pairs = run(tmp_path, parts, floor=0.2, min_recall=0, **ivf)
    distinct = Distinct(parts)
    nearest = distinct.nearest(4, 0.2, ties="id")
    ids = distinct.ids.tolist()
    hits = sum((ids[min(pair)], ids[max(pair)]) in pairs for pair in nearest)
    assert manifest.facts == {"backend": "ivf", "recall": hits / len(nearest), "recall_neighbors": len(nearest)}
    everything = distinct.pairs([(i, j) for i in range(len(ids)) for j in range(len(ids)) if i != j])
    assert {pair: row[:3] for pair, row in pairs.items()} == {pair: everything[pair][:3] for pair in pairs}
    assert all(cosine >= np.float32(0.2) for _, _, cosine, _ in pairs.values())
    if num_probes == 5 and kind == "clustered":
        assert manifest.facts["recall"] > 0.9


def test_recall_below_the_minimum_is_an_error_until_the_minimum_is_lowered(tmp_path: Path) -> None:
    parts = make_parts("random", 0)
    ivf: dict[str, Any] = {"backend": "ivf", "rows_per_cell": 4, "num_probes": 1}
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"search\.min_recall is 0\.95\. Raise search\.num_probes \(1\)"):
            run(tmp_path, parts, **ivf)
        assert read_manifest(str(tmp_path / "join")) is None
    manifest, _ = run(tmp_path, parts, min_recall=0.01, **ivf)  # resumes the stopped work
    assert 0.01 <= manifest.facts["recall"] < 0.95
    with pytest.raises(ConfigError, match=r"search\.min_recall is 0\.95"):
        run(tmp_path, parts, **ivf)  # a finished join is checked against a raised minimum, too
    assert run(tmp_path, parts, name="more", **ivf | {"num_probes": 1000})[0].facts["recall"] == 1


@pytest.mark.parametrize("seed", range(2))
def test_copies_in_different_files_visit_the_same_cells(tmp_path: Path, seed: int) -> None:
    """Each file holds all images and one more of its own. Every group must report a pair by its first places."""
    matrix, extra = of_kind("random", seed, 120), np.eye(3, WIDTH, dtype=np.float16)
    ids = [hashed_id(number) for number in range(120)]
    parts = [([*ids, hashed_id(200 + n)], np.concatenate([matrix, extra[n : n + 1]])) for n in range(3)]
    ivf: dict[str, Any] = {"backend": "ivf", "rows_per_cell": 4, "num_probes": 6, "rows_per_part": 40, "min_recall": 0}
    _, pairs = run(tmp_path, parts, **ivf)
    all_ids = [image_id for part_ids, _ in parts for image_id in part_ids]
    first = {image_id: place for place, image_id in reversed(list(enumerate(all_ids)))}
    assert len(pairs) > 100 and all(row[:2] == (first[low], first[high]) for (low, high), row in pairs.items())


EXACT: dict[str, Any] = {"backend": "exact"}
IVF: dict[str, Any] = {"backend": "ivf", "rows_per_cell": 2, "rows_per_part": 3, "num_probes": 100}


@pytest.mark.parametrize("search", [EXACT, IVF], ids=["exact", "ivf"])
def test_no_images_one_image_and_equal_images(tmp_path: Path, search: dict[str, Any]) -> None:
    one: Part = ([hashed_id(0)], of_kind("random", 0, 1))
    nothing: Part = ([], of_kind("random", 0, 0))
    twins = ([hashed_id(0), hashed_id(1)], of_kind("random", 0, 1).repeat(2, axis=0))
    cases: list[tuple[list[Part], int]] = [
        ([], 0),
        ([nothing], 0),
        ([nothing, nothing], 0),
        ([one], 0),
        ([nothing, one, nothing], 0),
        ([one, one], 0),
        ([(one[0] * 9, one[1].repeat(9, axis=0)), nothing, one], 0),
        ([twins], 1),
        ([one, twins, nothing], 1),
    ]
    for number, (parts, num_pairs) in enumerate(cases):
        manifest, pairs = run(tmp_path / str(number), parts, **search)
        assert len(pairs) == num_pairs and manifest.totals.get("edges", 0) == 2 * num_pairs, number
        assert manifest.facts.get("recall") == (1 if num_pairs and search is IVF else None), number
    low, high = sorted(twins[0])
    ((pair, row),) = pairs.items()
    assert pair == (low, high) and row[3] and row[2] == pytest.approx(1, abs=2e-3)
    assert row[:2] == tuple({hashed_id(0): 0, hashed_id(1): 2}[image_id] for image_id in pair)


@pytest.mark.parametrize("last", ["images", "nothing"])
def test_more_rows_than_a_block_holds(tmp_path: Path, last: str) -> None:
    """Rows of one image fill nearly all of the first block; it is compared with the others once."""
    matrix = of_kind("clustered", 0, 60)
    numbers = np.concatenate([np.arange(30), np.zeros(self_join.ROWS_PER_BLOCK, np.int64), np.arange(40)])
    full = ([hashed_id(int(number)) for number in numbers], matrix[numbers])
    rest = np.arange(20, 60 if last == "images" else 20)
    parts = [full, ([hashed_id(int(number)) for number in rest], matrix[rest])]
    manifest, pairs = run(tmp_path, parts)
    assert len(manifest.shards) == 2
    distinct = Distinct(parts)
    assert pairs == distinct.pairs(distinct.nearest(4, 0.3, ties="place"))


@pytest.mark.parametrize("num_buckets", [1, 2, 50])
def test_buckets_are_a_partition_of_the_pairs(tmp_path: Path, num_buckets: int) -> None:
    parts = make_parts("clustered", 3)
    reference = run(tmp_path, parts, name="reference")[1]
    assert run(tmp_path, parts, num_buckets=num_buckets)[1] == reference


# Stop and resume, and other runners


SEARCHES: list[dict[str, Any]] = [
    {"backend": "exact"},
    {"backend": "ivf", "rows_per_cell": 10, "num_probes": 3, "rows_per_part": 40, "min_recall": 0},
]


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("search", SEARCHES, ids=["exact", "ivf"])
def test_every_kill_resumes_to_the_same_bytes(tmp_path: Path, search: dict[str, Any], after_work: bool) -> None:
    parts = make_parts("clustered", 1)
    counter = KilledRunner(10**6)
    run(tmp_path, parts, name="straight", runner=counter, **search)
    num_calls = 10**6 - counter.calls_left
    assert num_calls == (1 if search["backend"] == "exact" else 5 + 4 + 1)
    straight = bytes_in(str(tmp_path / "straight"))
    for calls_before_kill in {1, num_calls // 2, num_calls - 1} - {num_calls}:
        name, num_kills = f"killed after {calls_before_kill}", 0
        while read_manifest(str(tmp_path / name)) is None:
            runner = KilledRunner(max(calls_before_kill, num_kills), after_work=after_work)
            try:
                run(tmp_path, parts, name=name, runner=runner, **search)
            except Killed:
                num_kills += 1
        assert num_kills > 0 and bytes_in(str(tmp_path / name)) == straight


def test_ray_gives_the_same_bytes(tmp_path: Path, ray_runner: RayRunner) -> None:
    parts, search = make_parts("clustered", 2), SEARCHES[1]
    run(tmp_path, parts, name="inline", **search)
    run(tmp_path, parts, name="ray", runner=ray_runner, **search)
    assert bytes_in(str(tmp_path / "ray")) == bytes_in(str(tmp_path / "inline"))


def test_second_run_does_nothing_and_another_floor_is_refused(tmp_path: Path) -> None:
    parts = make_parts("random", 0)
    first = run(tmp_path, parts)[0]
    assert run(tmp_path, parts, runner=KilledRunner(0))[0] == first
    with pytest.raises(OutputMismatchError, match="another config or of other inputs"):
        run(tmp_path, parts, floor=0.4)


# Invalid vectors


@pytest.mark.parametrize("search", [EXACT, IVF], ids=["exact", "ivf"])
@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("wrong", ["NaN", "infinite", "zero", "wide"])
def test_invalid_vectors_are_refused_with_the_file_and_the_image(
    tmp_path: Path, wrong: str, number: int, search: dict[str, Any]
) -> None:
    parts = [([hashed_id(10 * n), hashed_id(10 * n + 1)], of_kind("random", n, 2)) for n in range(5)]
    ids, matrix = parts[number]
    match wrong:
        case "wide":
            parts[number] = ids, unit_vectors(0, 2, WIDTH + 1).astype(np.float16)
            message = rf"vectors-0000{number or 1}\.parquet: vectors of width \d+; others of this run have \d+"
        case _:
            matrix[1] = {"NaN": np.nan, "infinite": np.inf, "zero": 0}[wrong]
            message = rf"vectors-0000{number}\.parquet: the vector of image '{ids[1]}' is zero or not finite \(1 such"
    with pytest.raises(InputError, match=message):
        run(tmp_path, parts, **search)
    assert read_manifest(str(tmp_path / "join")) is None
