"""The corpus checked against itself: the choice agrees with a plain pass over all proposed rows, in every mode."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import cluster, retrieve
from curation.cluster import ClusterConfig, LevelConfig
from curation.copies import corpus_check
from curation.copies.compare_thumbnails import VerificationConfig
from curation.engine.manifest import require_manifest, write_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner, Runner
from curation.errors import ConfigError, OutputMismatchError
from curation.files import parquet, schemas, vectors
from curation.retrieve import ClusteringConfig, DatasetConfig, RetrieveConfig
from curation.run_folder import RunFolder, read_retrieved
from curation.search import exact
from tests.curation.builders import (
    Killed,
    KilledRunner,
    bytes_in,
    content_hash,
    id_of,
    image_row,
    unit_vectors,
    write_dedup,
    write_ingest,
    write_stage,
    write_vectors,
)

THRESHOLD, HOLDOUT_THRESHOLD, FLOOR = 0.9, 0.8, 0.5
SHARDS = [("one", "seed", range(0, 8)), ("two", "seed", range(8, 20)), ("web", "pool", range(20, 110))]
SHARDS += [("web", "pool", range(110, 180)), ("test", "holdout", range(180, 190))]
MODES = (
    DatasetConfig(name="one", as_is=True, retrieval="sample", k=2),
    DatasetConfig(name="two", retrieval="cluster", cap=24),
)


class Run:
    """Finished stages whose vectors come in groups of near-copies, so that retrieval meets many of them.

    Image n has row n of `matrix` in embed, and of `descriptors` in describe. A third of the images have no label.
    """

    def __init__(
        self, folder: Path, seed: int = 0, *, label_guard: bool = False, lookalikes: tuple[str, ...] = ()
    ) -> None:
        rng = np.random.default_rng(seed)
        groups = unit_vectors(seed, 45, 16)[rng.integers(0, 45, 190)]
        self.matrix = _unit(groups + rng.normal(0, 0.09, groups.shape))
        self.descriptors = _unit(self.matrix.astype(np.float32) + rng.normal(0, 0.02, groups.shape))
        self.labels = [(None, "a", "b")[number] for number in rng.integers(0, 3, 190).tolist()]
        self.label_guard, self.lookalikes = label_guard, lookalikes
        rows = [
            [image_row(id_of(n), source, role, label=self.labels[n]) for n in numbers]
            for source, role, numbers in SHARDS
        ]
        # An exact copy in another shard: described there too. The image has the label of the copy.
        rows[3].append(rows[2][0] | {"source": "more", "label": "b"})
        rows[2][0]["label"], self.labels[20] = None, "b"
        self.folder = folder
        images = write_ingest(folder / "ingest", rows)
        kept = write_dedup(folder / "dedup", images)
        set_facts(kept, label_guard=label_guard, lookalikes=lookalikes)
        ids = [[int(row["image_id"], 16) for row in of_shard] for of_shard in rows]
        embed, describe = (
            write_vectors(folder / name, images, [{id_of(n): matrix[n] for n in numbers} for numbers in ids])
            for name, matrix in (("embed", self.matrix), ("describe", self.descriptors))
        )
        clusters = str(folder / "cluster")
        self.inputs = RunFolder(
            ingest=images, dedup=kept, embed=embed, describe=describe, cluster=clusters, pairs=str(folder / "pairs")
        )
        write_known(self.inputs, [])
        cluster.run(ClusterConfig(levels=(LevelConfig(num_clusters=6),)), self.inputs, clusters, InlineRunner())

    def retrieve(
        self, config: RetrieveConfig, name: str = "retrieve", runner: Runner | None = None
    ) -> list[dict[str, Any]]:
        output = str(self.folder / name)
        retrieve.run(config, self.inputs, output, runner or InlineRunner())
        rows: list[dict[str, Any]] = read_retrieved(output).to_pylist()
        return rows

    def copies(self, name: str = "retrieve") -> dict[int, int]:
        """The images that were passed over, each with its match."""
        table = parquet.read_table(str(self.folder / name / "copies-00000.parquet"), schemas.CORPUS_COPIES)
        rows = table.to_pylist()
        assert [row["image_id"] for row in rows] == sorted(row["image_id"] for row in rows)
        return {int(row["image_id"], 16): int(row["matched_image_id"], 16) for row in rows}

    def are_copies(self, one: int, other: int) -> bool:
        if max(one, other) >= 180:
            return bool(self.similarity()[one, other] >= HOLDOUT_THRESHOLD)
        if self.label_guard and len({self.labels[one], self.labels[other]} - {None}) == 2:
            return False
        if any(source_of(image) in self.lookalikes for image in (one, other)):
            return False
        return bool(self.similarity()[one, other] >= THRESHOLD)

    def similarity(self) -> np.ndarray:
        return self.descriptors.astype(np.float64) @ self.descriptors.astype(np.float64).T


def _unit(matrix: np.ndarray) -> np.ndarray:
    unit: np.ndarray = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
    return unit


def source_of(number: int) -> str:
    return next(source for source, _, numbers in SHARDS if number in numbers)


def set_facts(
    folder: str, *, threshold: float = THRESHOLD, label_guard: bool = False, lookalikes: tuple[str, ...] = ()
) -> None:
    """Set the facts of a finished dedup that the check reads."""
    facts = {
        "threshold": threshold,
        "holdout_threshold": HOLDOUT_THRESHOLD,
        "label_guard": label_guard,
        "lookalikes": [{"source": source} for source in lookalikes],
    }
    write_manifest(folder, replace(require_manifest(folder), facts=facts))


def write_known(inputs: RunFolder, known: list[tuple[int, int, float]], verification: Any = None) -> None:
    """Write a finished pairs with the given pairs: two numbers of images and a similarity."""
    rows = [(id_of(one), id_of(other), value, False, value, True) for one, other, value in known]
    table = pa.Table.from_pylist([dict(zip(schemas.PAIRS.names, row, strict=True)) for row in rows], schemas.PAIRS)
    facts = {"min_similarity": 0.3, "min_descriptor_similarity": FLOOR, "verification": verification}
    write_stage(inputs.pairs, [{"pairs": table}], facts=facts, inputs={"images": content_hash(inputs.ingest)})


def visit(
    run: Run, proposed: list[dict[str, Any]], quota: dict[Any, int]
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """A plain pass over `proposed` in order. Returns the taken rows, and the passed images with matches."""
    names = [dataset.name for dataset in MODES] + [None]

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["rank"], names.index(row["seed_source"]), row["seed_image_id"] or "", row["image_id"]

    corpus = [*range(0, 8), *range(180, 190)]  # the packed seeds and the holdout
    taken, passed = [], {}
    for row in sorted(proposed, key=order):
        image, group = int(row["image_id"], 16), group_of(row)
        if quota[group] == 0:
            continue
        if image not in corpus and image not in passed:
            similar = [other for other in corpus if run.are_copies(image, other)]
            if similar:
                passed[image] = max(similar, key=lambda other: (run.similarity()[image, other], -other))
                continue
            corpus.append(image)
        if image not in passed:
            quota[group] -= 1
            taken.append(row)
    return taken, passed


def group_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["seed_source"], row["seed_image_id"], row["cluster_id"]


def by_group(rows: list[dict[str, Any]]) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for row in rows:
        counts[group_of(row)] = counts.get(group_of(row), 0) + 1
    return counts


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in row.values())


@pytest.mark.parametrize(
    ("seed", "label_guard", "lookalikes"),
    [(0, False, ()), (1, False, ()), (2, True, ()), (3, True, ("two",)), (4, False, ("web",))],
)
def test_choice_agrees_with_a_plain_pass_over_four_times_the_rows(
    tmp_path: Path, seed: int, label_guard: bool, lookalikes: tuple[str, ...]
) -> None:
    """By sample, by cluster and balanced in one run: the datasets compete for the images of the pool."""
    run = Run(tmp_path, seed, label_guard=label_guard, lookalikes=lookalikes)
    modes: dict[str, Any] = {"datasets": MODES, "clustering": ClusteringConfig(num_images=20), "images_per_cluster": 7}
    unchecked = run.retrieve(RetrieveConfig(**modes, more_than_seeds=0), "unchecked")
    quota = by_group(unchecked)
    # Without the check, four times the numbers give the proposed rows.
    proposed = run.retrieve(
        RetrieveConfig(datasets=(MODES[0].model_copy(update={"k": 8}),)), "sample"
    ) + drawn_four_times(run, unchecked)
    expected, passed = visit(run, proposed, dict(quota))
    rows = run.retrieve(RetrieveConfig(**modes, more_than_seeds=0, check_copies=True))
    assert sorted(rows, key=key) == sorted(expected, key=key)
    assert run.copies() == passed and any(match >= 180 for match in passed.values())
    assert len(passed) > 10 or lookalikes == ("web",), "of the pool, only copies of the holdout"
    facts = require_manifest(str(tmp_path / "retrieve")).facts["check"]
    assert facts["corpus_copies"] == len(passed)
    assert facts["missing_rows"] == len(unchecked) - len(rows)
    assert facts["retrieved_copies"] == 0
    assert (facts["label_guard"], facts["lookalikes"]) == (label_guard, list(lookalikes))
    assert max(row["rank"] for row in rows if row["mode"] == "sample") > 2, "others took the places"


def drawn_four_times(run: Run, unchecked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of clusters, at most four times as many of each as without the check."""
    rows: list[dict[str, Any]] = []
    for mode, dataset in (("cluster", "two"), ("balanced", None)):
        counts = np.zeros(6, np.int64)
        for row in unchecked:
            if row["mode"] == mode:
                counts[row["cluster_id"]] += 1
        sizes = retrieve.cluster_sizes(run.inputs.cluster, 6)
        draw: Literal["nearest", "random"] = "nearest" if mode == "cluster" else "random"
        table = retrieve.draw_images(run.inputs.cluster, np.minimum(4 * counts, sizes), draw, 0)
        for row in table.to_pylist():
            drawn = row | {"seed_source": dataset, "seed_image_id": None, "mode": mode}
            rows.append({name: drawn[name] for name in schemas.RETRIEVED.names})
    return rows


def test_a_seed_without_enough_other_images_brings_fewer(tmp_path: Path) -> None:
    """At most 4k images are looked at for a seed: here all of them are copies of the seed."""
    run = Run(tmp_path)
    run.descriptors[:180] = run.descriptors[0]
    vectors_of = [{id_of(n): run.descriptors[n] for n in numbers} for _, _, numbers in SHARDS]
    run.inputs = RunFolder(
        **(vars(run.inputs) | {"describe": write_vectors(tmp_path / "flat", run.inputs.ingest, vectors_of)})
    )
    assert run.retrieve(RetrieveConfig(datasets=MODES[:1], check_copies=True)) == []
    manifest = require_manifest(str(tmp_path / "retrieve"))
    assert manifest.facts["check"]["missing_rows"] == 16 and manifest.totals["seeds:one"] == 8
    assert manifest.facts["check"]["seed_copies"] == 8, "seeds are trusted, and counted"
    assert 8 <= len(run.copies()) <= 8 * 4 * 2


def test_bytes_depend_neither_on_kills_nor_on_the_runner(tmp_path: Path, ray_runner: RayRunner) -> None:
    run = Run(tmp_path)
    config = RetrieveConfig(datasets=MODES, more_than_seeds=0, check_copies=True)
    run.retrieve(config, "straight")
    expected = bytes_in(str(tmp_path / "straight"))
    run.retrieve(config, "ray", ray_runner)
    assert bytes_in(str(tmp_path / "ray")) == expected
    num_kills = 0
    while num_kills < 60:
        try:
            run.retrieve(config, "killed", KilledRunner(num_calls=3, after_work=bool(num_kills % 2)))
            break
        except Killed:
            num_kills += 1
    assert num_kills > 3
    assert bytes_in(str(tmp_path / "killed")) == expected


def test_choices_of_dedup_are_part_of_the_plan(tmp_path: Path) -> None:
    run = Run(tmp_path)
    config = RetrieveConfig(datasets=MODES[:1], check_copies=True)
    run.retrieve(config)
    for change in ({"threshold": 0.95}, {"label_guard": True}, {"lookalikes": ("web",)}):
        set_facts(run.inputs.dedup, **change)
        with pytest.raises(OutputMismatchError, match="comparison"):
            run.retrieve(config)


def test_verified_pairs_reuse_the_scores_of_the_stage_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cosine is high for all, so the thumbnails decide: a crop is passed over, and so is a pair of `pairs`."""
    run = Run(tmp_path)
    rng = np.random.default_rng(1)
    pictures = {n: _picture(rng) for n in range(190)}
    nearest = [int(row["image_id"], 16) for row in run.retrieve(RetrieveConfig(datasets=MODES[:1]), "unchecked")][:2]
    copy, known = nearest
    pictures[copy] = pictures[0].resize((96, 96))
    near = {id_of(n): unit_vectors(0, 1, 16)[0] + 0.2 * unit_vectors(n + 1, 1, 16)[0] for n in range(190)}
    near[id_of(copy)] = near[id_of(0)]
    shards = []
    for _, _, numbers in SHARDS:
        ids = [id_of(n) for n in numbers]
        small = pa.table([ids, [_webp(pictures[n]) for n in numbers]], schema=schemas.THUMBNAILS)
        shards.append(
            {"vectors": vectors.make_table(ids, _unit(np.stack([near[each] for each in ids]))), "thumbnails": small}
        )
    describe = write_stage(tmp_path / "thumbnails", shards, inputs={"images": content_hash(run.inputs.ingest)})
    run.inputs = RunFolder(**(vars(run.inputs) | {"describe": describe, "pairs": str(tmp_path / "verified")}))
    write_known(run.inputs, [(3, known, 1.0)], VerificationConfig(working_side=64).model_dump(mode="json"))
    only_first = MODES[0].model_copy(update={"k": 1})
    run.retrieve(RetrieveConfig(datasets=(only_first,), check_copies=True))
    passed = run.copies()
    assert (passed[copy], passed[known]) == (0, 3)
    num_compared = []
    for name, scored in (("none", []), ("one", [(0, 1, 0.3)])):
        write_known(run.inputs, scored, VerificationConfig(working_side=64).model_dump(mode="json"))
        run.retrieve(RetrieveConfig(datasets=(only_first,), check_copies=True), name)
        assert known not in run.copies(name)
        num_compared.append(require_manifest(str(tmp_path / name)).facts["check"]["check_pairs"])
    assert num_compared[0] == num_compared[1] + 1, "a pair with a score is not compared again"

    monkeypatch.setattr(corpus_check, "FOLLOWED", 3)
    write_known(run.inputs, [(3, known, 1.0)], VerificationConfig(working_side=64).model_dump(mode="json"))
    run.retrieve(RetrieveConfig(datasets=(only_first,), check_copies=True), "followed")
    num_followed = require_manifest(str(tmp_path / "followed")).facts["check"]["check_pairs"]
    assert 0 < num_followed < num_compared[0], "lists without copies among the first are not followed"
    assert run.copies("followed")[copy] == 0

    set_facts(run.inputs.dedup, lookalikes=("web",))
    write_known(run.inputs, [(3, known, 1.0)], VerificationConfig(working_side=64).model_dump(mode="json"))
    run.retrieve(RetrieveConfig(datasets=(only_first,), check_copies=True), "alike")
    assert run.copies("alike") == {}, "neither a compared pair nor one of the stage pairs"


def _picture(rng: np.random.Generator) -> Image.Image:
    """Blurred noise, unlike that of any other picture."""
    noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return noise.resize((128, 128), Image.Resampling.BICUBIC)


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def test_the_command_asks_for_the_folders_of_the_check(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[retrieve]\ncheck_copies = true\n")
    folders = {"images": "a", "deduplicated": "b", "embedded": "c", "clustered": "d"}
    with pytest.raises(ConfigError, match="Give --descriptors and --pairs"):
        retrieve.command_line(str(tmp_path / "out"), config=str(tmp_path / "run.toml"), **folders)


@pytest.mark.parametrize("count", [0, 1, 70, 300])
def test_pairs_above_a_floor_are_all_of_them(count: int) -> None:
    queries, matrix = unit_vectors(0, 33, 8).astype(np.float16), unit_vectors(1, count, 8).astype(np.float16)
    query, row, similarity = exact.pairs_above(queries, matrix, 0.4)
    cosine = queries.astype(np.float64) @ matrix.astype(np.float64).T
    assert list(zip(query, row, strict=True)) == list(zip(*np.nonzero(cosine >= 0.4), strict=True))
    np.testing.assert_allclose(similarity, cosine[query, row], atol=1e-6)


def test_rounds_compare_no_pair_twice(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.retrieve(RetrieveConfig(datasets=MODES, more_than_seeds=0, check_copies=True))
    facts = require_manifest(str(tmp_path / "retrieve")).facts["check"]
    num_images = facts["check_images"]
    above = int((run.similarity() >= FLOOR).sum()) // 2
    assert 0 < facts["check_pairs"] <= min(above, num_images * (num_images + 9) // 2)
    assert corpus_check.LOOKS == 4
