"""Packing: the bytes and reasons of every sample, the sums of the weights, and the counts of the composition."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from curation import cluster, dedup, pack, retrieve
from curation.cluster import ClusterConfig, LevelConfig
from curation.dedup import DedupConfig
from curation.engine.manifest import require_manifest, step_folder
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner, Shard
from curation.errors import ConfigError, InputError, OutputMismatchError
from curation.files import parquet, paths, schemas
from curation.images import sources
from curation.images.corpus_tar import CorpusSample, read_tar, write_tar
from curation.images.decode import EXTENSION_OF_FORMAT
from curation.images.hashing import image_id
from curation.images.sources import SourceConfig
from curation.pack import MixConfig, PackConfig
from curation.quotas import dataset_weights
from curation.retrieve import DatasetConfig, RetrieveConfig
from curation.run_folder import RunFolder, read_corpus, read_retrieved
from tests.curation.builders import (
    bytes_in,
    encoded_image,
    image_row,
    packed_stages,
    stages_of,
    unit_vectors,
    write_dedup,
    write_ingest,
    write_pairs,
    write_stage,
    write_vectors,
)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def retrieved_table(rows: Sequence[tuple[str, str, str | int, int]]) -> pa.Table:
    """RETRIEVED from (image_id, dataset, seed image or cluster, rank); clustering drew the rows without a dataset."""
    return pa.Table.from_pylist(
        [
            {"image_id": image, "seed_source": source, "rank": rank, "similarity": 0.5}
            | (dict(mode="sample", seed_image_id=by) if isinstance(by, str) else dict(mode="cluster", cluster_id=by))
            | ({} if source else dict(mode="balanced", seed_source=None))
            for image, source, by, rank in rows
        ],
        schema=schemas.RETRIEVED,
    )


# Planning


KEPT = [
    image_row(name, source, role)
    for name, source, role in [
        ("s1", "a", "seed"),
        ("s2", "a", "seed"),
        ("s3", "b", "seed"),
        ("p1", "web", "pool"),
        ("p2", "web", "pool"),
        ("p3", "web", "pool"),
    ]
]
DATASETS = (DatasetConfig(name="a", as_is=True), DatasetConfig(name="b"))
RETRIEVED = retrieved_table(
    [("p1", "a", "s1", 0), ("p2", "a", "s1", 1), ("p1", "a", "s2", 0), ("p1", "b", 7, 0), ("p2", "b", 7, 1)]
)
DRAWN = retrieved_table([("p2", "", 4, 0), ("p3", "", 5, 0)])


class PackPlan:
    """The plan of pack over hand-made stages with the given rows, cut into several files each."""

    def __init__(
        self,
        folder: Path,
        config: PackConfig,
        datasets: Sequence[DatasetConfig],
        kept: Sequence[dict[str, Any]],
        retrieved: pa.Table,
        num_shards: int = 2,
        max_files: int = pack.MAX_PLAN_FILES,
    ) -> None:
        for name in ("ingest", "dedup", "retrieve", "plan"):
            paths.delete(str(folder / name))
        images = write_ingest(folder / "ingest", [kept[n::num_shards] for n in range(num_shards)])
        stages = (images, write_dedup(folder / "dedup", images))
        cuts = [retrieved.num_rows * n // num_shards for n in range(num_shards + 1)]
        parts = [retrieved[start:stop] for start, stop in itertools.pairwise(cuts)]
        inputs = packed_stages(*stages, write_stage(folder / "retrieve", [{"retrieved": part} for part in parts]))
        self.selection = pack.select(datasets, inputs)
        self.weight, self.selector_weight = pack.weigh(config, self.selection)
        self.tars = pack.plan_tars(config, self.selection, max_files)
        pack.write_plan(config, self.selection, self.weight, self.tars, inputs, str(folder / "plan"))
        self.num_files = len(paths.list_names(str(folder / "plan"))) // 2
        self.rows: list[dict[str, Any]] = [
            row for tar in self.tars for row in pack.read_plan(str(folder / "plan"), tar).to_pylist()
        ]

    @property
    def by_key(self) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in self.rows}

    def column(self, name: str) -> dict[str, Any]:
        return {row["key"]: row[name] for row in self.rows}


def test_each_image_is_packed_once_with_all_its_reasons(tmp_path: Path) -> None:
    plan = PackPlan(tmp_path, PackConfig(images_per_shard=3), DATASETS, KEPT, RETRIEVED)
    assert plan.column("reasons") == {
        "s1": ["as_is:a"],
        "s2": ["as_is:a"],
        "p1": ["sample:a:s1:0", "sample:a:s2:0", "cluster:b:7"],
        "p2": ["sample:a:s1:1", "cluster:b:7"],
    }
    # Four rows of a and two of b: an image that both selected counts for both.
    assert plan.column("weight") == {"s1": 1.0, "s2": 1.0, "p1": 2.0, "p2": 2.0}
    by_id = {row["image_id"]: row for row in KEPT}
    for key, row in plan.by_key.items():
        assert {name: row[name] for name in row if name in by_id[key]}.items() <= by_id[key].items()
    assert [row["position"] for row in plan.rows] == list(range(4))


def test_with_repeats_each_reason_is_a_sample(tmp_path: Path) -> None:
    plan = PackPlan(tmp_path, PackConfig(repeats=True), DATASETS, KEPT, RETRIEVED)
    assert plan.column("reasons") == {
        "s1": ["as_is:a"],
        "s2": ["as_is:a"],
        "p1": ["sample:a:s1:0"],
        "p1_1": ["sample:a:s2:0"],
        "p1_2": ["cluster:b:7"],
        "p2": ["sample:a:s1:1"],
        "p2_1": ["cluster:b:7"],
    }
    assert set(plan.column("weight").values()) == {1.0}
    assert all(row["image_id"] == row["key"].partition("_")[0] for row in plan.rows)


def test_draws_by_clustering_have_a_reason_and_weigh_one_a_row(tmp_path: Path) -> None:
    retrieved = pa.concat_tables([RETRIEVED, DRAWN])
    plan = PackPlan(tmp_path, PackConfig(temperature=0.0), DATASETS, KEPT, retrieved)
    assert plan.by_key["p3"]["reasons"] == ["balanced:5"]
    assert plan.by_key["p2"]["reasons"] == ["sample:a:s1:1", "cluster:b:7", "balanced:4"]
    # Six rows of the datasets, which share their weight equally; two drawn rows.
    weight = plan.column("weight")
    assert weight == pytest.approx({"s1": 3 / 4, "s2": 3 / 4, "p1": 3 / 4 + 3 / 2, "p2": 3 / 4 + 3 / 2 + 1, "p3": 1})


def random_plan(seed: int) -> tuple[tuple[DatasetConfig, ...], list[dict[str, Any]], pa.Table]:
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"]
    kept = [image_row(f"s{n}", str(rng.choice(names)), "seed") for n in range(15)]
    kept += [image_row(f"p{n}", "web", "pool") for n in range(30)]
    rows: list[tuple[str, str, str | int, int]] = []
    for name in names[:2]:
        rows += [(f"p{n}", name, f"s{rng.integers(15)}", int(rng.integers(4))) for n in rng.integers(0, 30, 25)]
    rows += [(f"p{n}", "c", int(rng.integers(5)), 0) for n in rng.permutation(30)[:8]]
    rows += [(f"p{n}", "", int(rng.integers(5)), 0) for n in rng.permutation(30)[:12]]
    datasets = tuple(DatasetConfig(name=name, as_is=name == "a" or bool(rng.random() < 0.5)) for name in names)
    return datasets, kept, retrieved_table(rows)


def selectors_of(row: dict[str, Any]) -> set[tuple[str, str]]:
    """The parts and datasets that selected a sample, from its reasons."""
    part = {"as_is": "seeds", "sample": "retrieval", "cluster": "retrieval", "balanced": "clustering"}
    split = [reason.split(":") for reason in row["reasons"]]
    return {(part[words[0]], "" if words[0] == "balanced" else words[1]) for words in split}


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_weight_of_a_dataset_goes_as_its_rows_to_the_power(tmp_path: Path, seed: int, temperature: float) -> None:
    plan = PackPlan(tmp_path, PackConfig(temperature=temperature), *random_plan(seed))
    rows = Counter(name for row in plan.rows for part, name in selectors_of(row) if part != "clustering")
    row_weight = {**dataset_weights(rows, temperature), "": 1.0}
    for row in plan.rows:
        assert row["weight"] == pytest.approx(sum(row_weight[name] for _, name in selectors_of(row)))
    num_drawn = sum(("clustering", "") in selectors_of(row) for row in plan.rows)
    assert sum(row["weight"] for row in plan.rows) == pytest.approx(sum(rows.values()) + num_drawn)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_shares_of_datasets_are_as_stated(tmp_path: Path, seed: int, repeats: bool) -> None:
    stated = {"a": 5.0, "b": 0.5, "c": 2.5}
    datasets, kept, retrieved = random_plan(seed)
    retrieved = retrieved.filter(pc.is_valid(retrieved["seed_source"]))
    plan = PackPlan(tmp_path, PackConfig(dataset_weights=stated, repeats=repeats), datasets, kept, retrieved)
    dataset_weight = dict.fromkeys(stated, 0.0)
    for (_, name), value in zip(plan.selection.selectors, plan.selector_weight.tolist(), strict=True):
        dataset_weight[name or "a"] += value
    total = sum(plan.column("weight").values())
    assert dataset_weight == pytest.approx({name: share / 8 * total for name, share in stated.items()}, rel=1e-12)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_shares_of_the_parts_are_as_stated(tmp_path: Path, seed: int, temperature: float, repeats: bool) -> None:
    mix = MixConfig(seeds=1.0, retrieval=6.0, clustering=3.0)
    plain = PackPlan(tmp_path, PackConfig(temperature=temperature, repeats=repeats), *random_plan(seed))
    mixed = PackPlan(tmp_path, PackConfig(temperature=temperature, repeats=repeats, mix=mix), *random_plan(seed))
    total = sum(mixed.column("weight").values())
    assert total == pytest.approx(sum(plain.column("weight").values()), rel=1e-12)
    # The weight of a sample follows from its reasons: the weight of a dataset's row, scaled to the share of its part.
    rows = Counter(selector for row in mixed.rows for selector in selectors_of(row))
    by_dataset = Counter(name for row in mixed.rows for part, name in selectors_of(row) if part != "clustering")
    row_weight = {**({} if repeats else dataset_weights(by_dataset, temperature)), "": 1.0}
    unscaled = Counter({part: 0.0 for part, _ in rows})  # type: ignore[var-annotated]
    for (part, name), count in rows.items():
        unscaled[part] += count * row_weight.get(name, 1.0)
    share = {"seeds": 0.1, "retrieval": 0.6, "clustering": 0.3}
    for row in mixed.rows:
        expected = sum(
            row_weight.get(name, 1.0) * share[part] * total / unscaled[part] for part, name in selectors_of(row)
        )
        assert row["weight"] == pytest.approx(expected, rel=1e-12)
    part_of_selector = [pack.PARTS.index(part) for part, _ in mixed.selection.selectors]
    part_weight = np.bincount(part_of_selector, mixed.selector_weight)
    np.testing.assert_allclose(part_weight / total, [0.1, 0.6, 0.3], rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"mix": MixConfig(seeds=1, retrieval=1, clustering=1)},
            r"pack\.mix gives 'clustering' a weight of 1, but this part has no images",
        ),
        ({"mix": MixConfig(retrieval=1)}, r"pack\.mix gives 'seeds' no weight, but this part has 2 rows"),
        ({"dataset_weights": {"a": 1.0}}, r"pack\.dataset_weights does not name 'b', which has images"),
        (
            {"dataset_weights": {"a": 1.0, "b": 1.0, "c": 1.0}},
            r"pack\.dataset_weights names 'c'; the datasets are a, b",
        ),
    ],
)
def test_weights_that_do_not_fit_the_selection_are_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PackPlan(tmp_path, PackConfig(**config), DATASETS, KEPT, RETRIEVED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mix": MixConfig()}, "mix gives no part a weight"),
        ({"dataset_weights": {"a": 1.0}, "temperature": 0.5}, "leave one out"),
        ({"dataset_weights": {"a": 0.0}}, "greater than 0"),
    ],
)
def test_empty_or_contradictory_weights_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackConfig(**config)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_reason_is_packed_once_in_an_order_of_the_seed(tmp_path: Path, seed: int, repeats: bool) -> None:
    datasets, kept, retrieved = random_plan(seed)
    config = PackConfig(repeats=repeats, seed=seed, images_per_shard=4)
    plan = PackPlan(tmp_path, config, datasets, kept, retrieved)
    as_is = {dataset.name for dataset in datasets if dataset.as_is}
    num_seeds = sum(row["role"] == "seed" and row["source"] in as_is for row in kept)
    assert sum(len(row["reasons"]) for row in plan.rows) == retrieved.num_rows + num_seeds
    keys = list(plan.by_key)
    assert len(keys) == len(plan.rows) == pack.num_samples(config, plan.selection)
    assert keys == sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    assert PackPlan(tmp_path, config, datasets, kept, retrieved, num_shards=5).rows == plan.rows
    other = PackPlan(tmp_path, config.model_copy(update={"seed": seed + 1}), datasets, kept, retrieved)
    assert list(other.by_key) != keys and other.column("reasons") == plan.column("reasons")
    permuted = retrieved.take(np.random.default_rng(seed).permutation(retrieved.num_rows))
    assert list(PackPlan(tmp_path, config, datasets, kept, permuted).by_key) == keys


@pytest.mark.parametrize("repeats", [False, True])
def test_number_of_files_changes_nothing(tmp_path: Path, repeats: bool) -> None:
    config = PackConfig(repeats=repeats, images_per_shard=3)
    plan = PackPlan(tmp_path, config, *random_plan(0))
    assert plan.num_files == len(plan.tars) > 10
    fewer = PackPlan(tmp_path, config, *random_plan(0), num_shards=7, max_files=4)
    assert fewer.num_files <= 4 and fewer.rows == plan.rows


def test_rows_split_by_position_stay_in_the_order_of_writing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    position = rng.integers(0, 1000, 3 * pack.WAITING_ROWS)
    table = pa.table({"position": position, "reason": np.arange(len(position)).astype(str)}, schemas.PLANNED_REASONS)
    starts = [0, 100, 250, 251]
    with pack.split_by_position(f"{tmp_path}/reasons", schemas.PLANNED_REASONS, starts) as write:
        for start in range(0, len(position), 60_000):
            write(table[start : start + 60_000])
    for number, (start, stop) in enumerate(itertools.pairwise([*starts, 1000])):
        part = parquet.read_table(f"{tmp_path}/reasons-{number:05d}.parquet", schemas.PLANNED_REASONS)
        assert (
            part["reason"].to_numpy().astype(int).tolist()
            == np.flatnonzero((position >= start) & (position < stop)).tolist()
        )


def test_composition_has_a_row_for_each_part(tmp_path: Path) -> None:
    retrieved = pa.concat_tables([RETRIEVED, DRAWN])
    config = PackConfig(mix=MixConfig(seeds=0.25, retrieval=0.25, clustering=0.5))
    plan = PackPlan(tmp_path, config, DATASETS, KEPT, retrieved)
    stages = {"images": require_manifest(f"{tmp_path}/ingest")}
    stages["dedup"] = require_manifest(f"{tmp_path}/dedup")
    composition = pack.compose(config, DATASETS, stages, plan.selection, plan.selector_weight)
    assert composition["parts"] == [
        {"part": "seeds", "rows": 2, "unique": 2, "share_of_weight": 0.25},
        {"part": "retrieval", "rows": 5, "unique": 2, "share_of_weight": 0.25},
        {"part": "clustering", "rows": 2, "unique": 2, "share_of_weight": 0.5},
    ]
    rows = [(row["dataset"], row["seeds"], row["retrieved"], row["rows"]) for row in composition["datasets"]]
    assert rows == [("a", 2, 3, 5), ("b", 1, 2, 2)]
    assert [row["unique"] for row in composition["datasets"]] == [4, 2]
    assert (composition["funnel"]["retrieved"], composition["total_unique"]) == (3, 5)


def test_rows_of_another_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Image gone was retrieved, but not kept"):
        PackPlan(tmp_path, PackConfig(), DATASETS, KEPT, retrieved_table([("gone", "a", "s1", 0)]))
    with pytest.raises(InputError, match="rows of dataset 'unknown', which its config does not name"):
        PackPlan(tmp_path, PackConfig(), DATASETS, KEPT, retrieved_table([("p1", "unknown", "s1", 0)]))
    with pytest.raises(InputError, match="keeps an image twice"):
        PackPlan(tmp_path, PackConfig(), DATASETS, [*KEPT, KEPT[3]], RETRIEVED)
    with pytest.raises(InputError, match=f"'{'x' * 33}' is not an image_id"):
        PackPlan(tmp_path, PackConfig(), DATASETS, KEPT, retrieved_table([("x" * 33, "a", "s1", 0)]))


def test_nothing_to_select(tmp_path: Path) -> None:
    images = write_ingest(tmp_path / "ingest", [KEPT])
    stages = (images, write_dedup(tmp_path / "dedup", images))
    for datasets, shards in (((), []), ((DatasetConfig(name="b"),), [{"retrieved": retrieved_table([])}])):
        selection = pack.select(datasets, packed_stages(*stages, write_stage(tmp_path / "retrieve", shards)))
        assert len(selection.image) == len(selection.image_ids) == 0 and selection.num_kept == 6
        for config in (PackConfig(), PackConfig(repeats=True)):
            assert pack.plan_tars(config, selection) == []
            assert [len(array) for array in pack.weigh(config, selection)] == [0, 2 * len(datasets) + 1]


# The stage, on real images


class Run:
    """Finished ingest, dedup and retrieve over 30 real images: 10 seeds in a folder, 20 pool images in a tar."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pictures = [encoded_image(n, FORMATS[n % 4]) for n in range(30)]
        for n, picture in enumerate(pictures[:10]):
            paths.write_bytes(f"{folder}/seeds/label {n % 2}/::{n}.png", picture)
        samples = iter(
            CorpusSample(f"{n:04d}", picture, FORMATS[n % 4], {"label": n})
            for n, picture in enumerate(pictures[10:], 10)
        )
        write_tar(f"{folder}/web/00000.tar", samples)
        shards = []
        for name, role, layout in (("seeds", "seed", "folder"), ("web", "pool", "webdataset")):
            source = SourceConfig.model_validate(
                {"name": name, "path": f"{folder}/{name}", "role": role, "layout": layout}
            )
            files = tuple(file.path for file in sources.list_files(source))
            items = sources.read_source(source, files, max_bytes=1_000_000)
            shards.append([self.row(item, name, role, pictures) for item in items])
        self.ids = [image_id(picture) for picture in pictures]
        self.pictures = dict(zip(self.ids, pictures, strict=True))
        self.images = write_ingest(folder / "ingest", shards)
        self.kept = write_dedup(folder / "dedup", self.images, lambda row: row["image_id"] not in self.ids[25:])
        self.output = str(folder / "corpus")

    @staticmethod
    def row(item: sources.SourceItem, name: str, role: str, pictures: list[bytes]) -> dict[str, Any]:
        assert item.data is not None
        origin = {"uri": item.uri, "offset": item.offset, "length": item.length, "label": item.label}
        number = pictures.index(item.data)
        return image_row(image_id(item.data), name, role, width=24, height=20, format=FORMATS[number % 4], **origin)

    def write_retrieved(self, table: pa.Table, *datasets: DatasetConfig) -> str:
        facts = RetrieveConfig(datasets=datasets).model_dump(mode="json", include={"datasets"})
        return write_stage(self.folder / "retrieve", [{"retrieved": table[:3]}, {"retrieved": table[3:]}], facts=facts)

    def pack(self, config: PackConfig, output: str = "") -> pa.Table:
        if not Path(self.folder / "retrieve").exists():
            rows = [(self.ids[10 + n % 12], "seeds", self.ids[n % 5], n) for n in range(18)]
            self.write_retrieved(retrieved_table(rows), DatasetConfig(name="seeds", as_is=True, retrieval="sample"))
        stages = (self.images, self.kept, str(self.folder / "retrieve"))
        pack.run(config, packed_stages(*stages), output or self.output, InlineRunner())
        return read_corpus(output or self.output)


@pytest.mark.parametrize("repeats", [False, True])
def test_corpus_holds_the_original_bytes_and_its_tables_agree(tmp_path: Path, repeats: bool) -> None:
    run = Run(tmp_path)
    table = run.pack(PackConfig(images_per_shard=8, repeats=repeats)).to_pylist()
    count = 28 if repeats else 22
    assert len(table) == len({row["key"] for row in table}) == count
    assert {row["image_id"] for row in table} == set(run.ids[:22])
    names = [name for name in sorted(bytes_in(run.output)) if name.endswith(".tar")]
    assert names == [f"/corpus-{number:06d}.tar" for number in range(-(-count // 8))]
    assert [paths.list_names(run.output)] == [
        sorted(["composition.json", "manifest.json", *(name[1:] for name in names)]
        + [f"corpus-{number:05d}.parquet" for number in range(len(names))])
    ]  # fmt: skip
    samples = [(name[1:], sample) for name in names for sample in read_tar(run.output + name)]
    assert [(row["shard"], row["key"]) for row in table] == [(name, sample.key) for name, sample in samples]
    ingested = [parquet.read_table(f"{run.images}/images-0000{n}.parquet", schemas.IMAGES).to_pylist() for n in (0, 1)]
    by_id = {row["image_id"]: row for rows in ingested for row in rows}
    for row, (_, sample) in zip(table, samples, strict=True):
        image = by_id[row["image_id"]]
        tar = bytes_in(run.output)["/" + row["shard"]]
        assert tar[row["offset"] : row["offset"] + row["length"]] == sample.data
        assert image_id(sample.data) == row["image_id"] == sample.key.partition("_")[0]
        assert sample.format == image["format"]
        assert sample.sidecar.pop("reasons") == row["reasons"]
        assert sample.sidecar == {name: image[name] for name in ("source", "uri", "width", "height", "label")}
        assert (row["source"], row["role"]) == (image["source"], image["role"])
    assert {EXTENSION_OF_FORMAT[sample.format] for _, sample in samples} == {"png", "jpg", "webp", "gif"}
    totals = require_manifest(run.output).totals
    assert totals == {
        "rows": count,
        "bytes": sum(len(data) for name, data in bytes_in(run.output).items() if name in names),
    }


def test_composition_counts_the_rows_of_every_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.pack(PackConfig())
    composition = json.loads(paths.read_bytes(f"{run.output}/composition.json"))
    assert composition == {
        "funnel": {
            "ingested": 30,
            "rejected": {},
            "holdout": 0,
            "candidates": 30,
            "after_exact": 30,
            "after_near_duplicates": 25,
            "after_decontamination": 25,
            "retrieved": 12,
            "packed": 22,
        },
        "datasets": [
            {
                "dataset": "seeds",
                "mode": "sample",
                "as_is": True,
                "seeds": 10,
                "retrieved": 18,
                "cap": None,
                "rows": 28,
                "unique": 22,
            }
        ],
        "parts": [
            {"part": "seeds", "rows": 10, "unique": 10, "share_of_weight": pytest.approx(10 / 22)},
            {"part": "retrieval", "rows": 18, "unique": 12, "share_of_weight": pytest.approx(12 / 22)},
        ],
        "total_rows": 22,
        "total_unique": 22,
    }


def test_same_bytes_twice_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    config = PackConfig(images_per_shard=5, temperature=0.5)
    run.pack(config)
    before = bytes_in(run.output)
    run.pack(config)
    run.pack(config, str(tmp_path / "other"))
    assert bytes_in(run.output) == before == bytes_in(str(tmp_path / "other"))
    with pytest.raises(OutputMismatchError, match=r"config\.seed"):
        run.pack(PackConfig(images_per_shard=5, temperature=0.5, seed=1))


def test_changed_source_file_is_refused_and_packed_in_no_tar(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = tmp_path / "seeds/label 1/::3.png"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=rf"corpus, shard 00000\d: .*::3\.png.*no longer those of image {run.ids[3]}"):
        run.pack(PackConfig(images_per_shard=8))
    assert not Path(run.output, "manifest.json").exists()
    for name in bytes_in(run.output):
        if name.endswith(".tar"):
            assert run.ids[3] not in {sample.key for sample in read_tar(run.output + name)}
    path.write_bytes(run.pictures[run.ids[3]])
    assert run.pack(PackConfig(images_per_shard=8)).num_rows == 22, "the run does not go on with the restored file"


def test_nothing_to_pack_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_retrieved(retrieved_table([]), DatasetConfig(name="seeds"))
    with pytest.raises(InputError, match="Nothing to pack"):
        run.pack(PackConfig())
    assert not Path(run.output).exists()


def test_more_than_a_hundred_thousand_shards_have_different_names(tmp_path: Path) -> None:
    run = Run(tmp_path)
    retrieved = run.write_retrieved(retrieved_table([]), DatasetConfig(name="seeds", as_is=True))
    stages = (run.images, run.kept, retrieved)
    config = PackConfig(images_per_shard=100)
    selection = pack.select((DatasetConfig(name="seeds", as_is=True),), packed_stages(*stages))
    weight, _ = pack.weigh(config, selection)
    (plan,) = tars = pack.plan_tars(config, selection)
    pack.write_plan(config, selection, weight, tars, packed_stages(*stages), step_folder(run.output, pack.PLAN_STEP))
    process = pack.make_worker(run.output)
    names = [file.name for n in ("000000", "099999", "100000") for file in process(Shard(n, plan)).files]
    assert names == [
        *("corpus-000000.tar", "corpus-00000.parquet"),
        *("corpus-099999.tar", "corpus-99999.parquet"),
        *("corpus-100000.tar", "corpus-100000.parquet"),
    ]


@pytest.mark.parametrize(("repeats", "last"), [(False, 21), (True, 18)])
def test_stop_and_resume_gives_the_same_bytes(tmp_path: Path, repeats: bool, last: int) -> None:
    run = Run(tmp_path)
    config = PackConfig(images_per_shard=5, repeats=repeats)
    run.pack(config)
    whole = bytes_in(run.output)
    run.output = str(tmp_path / "stopped")
    path = tmp_path / "web/00000.tar"
    content = path.read_bytes()
    rows = parquet.read_table(f"{run.images}/images-00001.parquet", schemas.IMAGES).to_pylist()
    path.write_bytes(content[: next(row["offset"] for row in rows if row["image_id"] == run.ids[last])])
    with pytest.raises(InputError):
        run.pack(config)
    assert paths.list_names(step_folder(run.output, pack.PLAN_STEP))
    assert [name for name in bytes_in(run.output) if name.endswith(".tar")], "the run stopped before the first tar"
    path.write_bytes(content)
    run.pack(config)
    assert bytes_in(run.output) == whole


def test_same_bytes_inline_and_on_ray(tmp_path: Path, ray_runner: RayRunner) -> None:
    run = Run(tmp_path)
    config = PackConfig(images_per_shard=4)
    run.pack(config)
    stages = (run.images, run.kept, str(tmp_path / "retrieve"))
    pack.run(config, packed_stages(*stages), str(tmp_path / "ray"), ray_runner)
    assert bytes_in(str(tmp_path / "ray")) == bytes_in(run.output)


# From ingest to corpus, with vectors and pairs made by hand


@pytest.mark.parametrize("seed", range(4))
def test_funnel_adds_up_over_the_real_stages(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pictures = [encoded_image(n) for n in range(40)]
    ids = [image_id(picture) for picture in pictures]
    rows: dict[str, list[dict[str, Any]]] = {}
    for n in [*range(40), *rng.integers(0, 40, 12).tolist()]:
        source, role = [("seeds", "seed"), ("web", "pool"), ("web", "pool"), ("test", "holdout")][rng.integers(4)]
        path = f"{tmp_path}/{source}/{len(rows.get(source, []))}.png"
        paths.write_bytes(path, pictures[n])
        rows.setdefault(source, []).append(image_row(ids[n], source, role, uri=path, length=len(pictures[n])))
    stage = {
        name: str(tmp_path / name) for name in ("ingest", "embed", "pairs", "dedup", "cluster", "retrieve", "corpus")
    }
    write_ingest(stage["ingest"], list(rows.values()))
    matrix = dict(zip(ids, unit_vectors(seed, 40).astype(np.float16), strict=True))
    by_shard = [{row["image_id"]: matrix[row["image_id"]] for row in shard} for shard in rows.values()]
    write_vectors(stage["embed"], stage["ingest"], by_shard)
    pairs = {(min(pair), max(pair)) for pair in rng.choice(ids, (15, 2)).tolist() if pair[0] != pair[1]}
    scored = [(one, other, round(float(rng.uniform(0.4, 1)), 2)) for one, other in sorted(pairs)]
    write_pairs(stage["pairs"], stage["ingest"], [scored])

    runner = InlineRunner()
    copies = dedup.run(DedupConfig(), RunFolder(ingest=stage["ingest"], pairs=stage["pairs"]), stage["dedup"])
    finished = (stage["ingest"], stage["dedup"], stage["embed"])
    cluster.run(ClusterConfig(levels=(LevelConfig(num_clusters=3),)), stages_of(*finished), stage["cluster"], runner)
    datasets = (DatasetConfig(name="seeds", as_is=True, retrieval="sample", k=2),)
    config = RetrieveConfig(datasets=datasets)
    retrieve.run(config, stages_of(*finished, stage["cluster"]), stage["retrieve"], runner)
    pack.run(PackConfig(), packed_stages(stage["ingest"], stage["dedup"], stage["retrieve"]), stage["corpus"], runner)

    funnel = json.loads(paths.read_bytes(f"{stage['corpus']}/composition.json"))["funnel"]
    total = copies.totals
    assert funnel["ingested"] == 52 == funnel["holdout"] + funnel["candidates"]
    assert funnel["after_exact"] == funnel["candidates"] - total.get("exact", 0)
    assert funnel["after_near_duplicates"] == funnel["after_exact"] - total.get("near", 0)
    assert funnel["after_decontamination"] == funnel["after_near_duplicates"] - total.get("holdout", 0) == total["kept"]
    corpus = read_corpus(stage["corpus"]).to_pylist()
    retrieved = {row["image_id"] for row in read_retrieved(stage["retrieve"]).to_pylist()}
    as_is = {row["image_id"] for row in corpus if "as_is:seeds" in row["reasons"]}
    assert funnel["packed"] == len(corpus) == len(retrieved | as_is) and funnel["retrieved"] == len(retrieved)
    holdout = {row["image_id"] for row in rows.get("test", [])}
    assert not holdout & {row["image_id"] for row in corpus}, "bytes of a holdout image are in the corpus"
