"""Packing: every sample with its own bytes and its reasons, weights that sum up, an account that agrees."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation import cluster, dedup, pack, records, retrieve, sources, storage
from curation.balance import dataset_weights
from curation.cluster import ClusterConfig
from curation.corpus import Sample, read_tar, write_tar
from curation.dedup import DedupConfig
from curation.errors import InputError, OutputMismatchError
from curation.hashing import image_id
from curation.images import EXTENSION_OF_FORMAT
from curation.pack import PackConfig, plan_entries
from curation.retrieve import DatasetConfig, RetrieveConfig
from curation.runner import InlineRunner, Shard
from curation.sources import SourceConfig
from tests.curation.builders import (
    bytes_in,
    encoded_image,
    image_row,
    unit_vectors,
    write_dedup,
    write_ingest,
    write_pairs,
    write_stage,
    write_vectors,
)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def retrieved_table(rows: Sequence[tuple[str, str, str | int, int]]) -> pa.Table:
    """Rows of (image_id, dataset, seed image or cluster, rank)."""
    return pa.Table.from_pylist(
        [
            {"image_id": image, "seed_source": source, "rank": rank, "similarity": 0.5}
            | (dict(mode="sample", seed_image_id=by) if isinstance(by, str) else dict(mode="cluster", cluster_id=by))
            for image, source, by, rank in rows
        ],
        schema=records.RETRIEVED,
    )


# Planning


KEPT = {
    name: image_row(name, source, role)
    for name, source, role in [
        ("s1", "a", "seed"),
        ("s2", "a", "seed"),
        ("s3", "b", "seed"),
        ("p1", "web", "pool"),
        ("p2", "web", "pool"),
        ("p3", "web", "pool"),
    ]
}
DATASETS = (DatasetConfig(name="a", as_is=True), DatasetConfig(name="b"))
FOUND = retrieved_table(
    [("p1", "a", "s1", 0), ("p2", "a", "s1", 1), ("p1", "a", "s2", 0), ("p1", "b", 7, 0), ("p2", "b", 7, 1)]
)


def test_each_image_is_packed_once_with_all_its_reasons() -> None:
    entries = {entry.key: entry for entry in plan_entries(PackConfig(), DATASETS, KEPT, FOUND)}
    assert {key: entry.reasons for key, entry in entries.items()} == {
        "s1": ("as_is:a",),
        "s2": ("as_is:a",),
        "p1": ("sample:a:s1:0", "sample:a:s2:0", "cluster:b:7"),
        "p2": ("sample:a:s1:1", "cluster:b:7"),
    }
    assert all(entry.image == KEPT[key] for key, entry in entries.items())
    # Four rows of a and two of b: an image that both brought counts for both.
    assert {key: entry.weight for key, entry in entries.items()} == {"s1": 1.0, "s2": 1.0, "p1": 2.0, "p2": 2.0}


def test_with_repeats_each_reason_is_a_sample() -> None:
    entries = plan_entries(PackConfig(repeats=True), DATASETS, KEPT, FOUND)
    assert {entry.key: entry.reasons for entry in entries} == {
        "s1": ("as_is:a",),
        "s2": ("as_is:a",),
        "p1": ("sample:a:s1:0",),
        "p1_1": ("sample:a:s2:0",),
        "p1_2": ("cluster:b:7",),
        "p2": ("sample:a:s1:1",),
        "p2_1": ("cluster:b:7",),
    }
    assert {entry.weight for entry in entries} == {1.0}
    assert all(entry.image["image_id"] == entry.key.partition("_")[0] for entry in entries)


def random_plan(seed: int) -> tuple[tuple[DatasetConfig, ...], dict[str, dict[str, Any]], pa.Table]:
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"]
    kept = {f"s{n}": image_row(f"s{n}", str(rng.choice(names)), "seed") for n in range(15)}
    kept |= {f"p{n}": image_row(f"p{n}", "web", "pool") for n in range(30)}
    rows: list[tuple[str, str, str | int, int]] = []
    for name in names[:2]:
        rows += [(f"p{n}", name, f"s{rng.integers(15)}", int(rng.integers(4))) for n in rng.integers(0, 30, 25)]
    rows += [(f"p{n}", "c", int(rng.integers(5)), 0) for n in rng.permutation(30)[:8]]
    datasets = tuple(DatasetConfig(name=name, as_is=bool(rng.random() < 0.5)) for name in names)
    return datasets, kept, retrieved_table(rows)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_weight_of_a_dataset_goes_as_its_rows_to_the_power(seed: int, temperature: float) -> None:
    datasets, kept, found = random_plan(seed)
    entries = plan_entries(PackConfig(temperature=temperature), datasets, kept, found)
    brought = {entry.key: {reason.split(":")[1] for reason in entry.reasons} for entry in entries}
    rows = Counter(name for names in brought.values() for name in names)
    each = dataset_weights(rows, temperature)
    for entry in entries:
        assert entry.weight == pytest.approx(sum(each[name] for name in brought[entry.key]))
    assert sum(entry.weight for entry in entries) == pytest.approx(sum(rows.values()))


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_reason_is_packed_once_in_an_order_of_the_seed(seed: int, repeats: bool) -> None:
    datasets, kept, found = random_plan(seed)
    config = PackConfig(repeats=repeats, seed=seed)
    entries = plan_entries(config, datasets, kept, found)
    as_is = {dataset.name for dataset in datasets if dataset.as_is}
    num_seeds = sum(row["role"] == "seed" and row["source"] in as_is for row in kept.values())
    assert sum(len(entry.reasons) for entry in entries) == found.num_rows + num_seeds
    assert len({entry.key for entry in entries}) == len(entries)
    assert plan_entries(config, datasets, kept, found) == entries
    other = plan_entries(config.model_copy(update={"seed": seed + 1}), datasets, kept, found)
    assert other != entries and sorted(other, key=lambda e: e.key) == sorted(entries, key=lambda e: e.key)
    shuffled = found.take(np.random.default_rng(seed).permutation(found.num_rows))
    assert [e.key for e in plan_entries(config, datasets, kept, shuffled)] == [e.key for e in entries]


def test_retrieved_image_that_was_not_kept_is_refused() -> None:
    with pytest.raises(InputError, match="Image gone was retrieved, but not kept"):
        plan_entries(PackConfig(), DATASETS, KEPT, retrieved_table([("gone", "a", "s1", 0)]))


def test_nothing_to_plan() -> None:
    assert plan_entries(PackConfig(), (), KEPT, retrieved_table([])) == []
    assert plan_entries(PackConfig(repeats=True), (DatasetConfig(name="a", as_is=True),), {}, retrieved_table([])) == []


# The stage, on real images


class Run:
    """Finished ingest, dedup and retrieve over 30 real images: 10 seeds in a folder, 20 of the pool in a tar."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pictures = [encoded_image(n, FORMATS[n % 4]) for n in range(30)]
        for n, picture in enumerate(pictures[:10]):
            storage.write_bytes(f"{folder}/seeds/label {n % 2}/::{n}.png", picture)
        samples = iter(
            Sample(f"{n:04d}", picture, FORMATS[n % 4], {"label": n}) for n, picture in enumerate(pictures[10:], 10)
        )
        write_tar(f"{folder}/web/00000.tar", samples)
        shards = []
        for name, role, layout in (("seeds", "seed", "folder"), ("web", "pool", "webdataset")):
            source = SourceConfig.model_validate(
                {"name": name, "path": f"{folder}/{name}", "role": role, "layout": layout}
            )
            found = sources.read_source(source, tuple(file.path for file in sources.list_files(source)))
            shards.append([self.row(item, name, role, pictures) for item in found])
        self.ids = [image_id(picture) for picture in pictures]
        self.pictures = dict(zip(self.ids, pictures, strict=True))
        self.images = write_ingest(folder / "ingest", shards)
        self.kept = write_dedup(folder / "dedup", self.images, lambda row: row["image_id"] not in self.ids[25:])
        self.output = str(folder / "corpus")

    @staticmethod
    def row(item: sources.Found, name: str, role: str, pictures: list[bytes]) -> dict[str, Any]:
        assert item.data is not None
        place = {"uri": item.uri, "offset": item.offset, "length": item.length, "label": item.label}
        number = pictures.index(item.data)
        return image_row(image_id(item.data), name, role, width=24, height=20, format=FORMATS[number % 4], **place)

    def retrieved(self, found: pa.Table, *datasets: DatasetConfig) -> str:
        config = RetrieveConfig(datasets=datasets).model_dump(mode="json")
        return write_stage(
            self.folder / "retrieve", [{"retrieved": found[:3]}, {"retrieved": found[3:]}], config=config
        )

    def pack(self, config: PackConfig, output: str = "") -> pa.Table:
        if not Path(self.folder / "retrieve").exists():
            rows = [(self.ids[10 + n % 12], "seeds", self.ids[n % 5], n) for n in range(18)]
            self.retrieved(retrieved_table(rows), DatasetConfig(name="seeds", as_is=True, retrieval="sample"))
        stages = (self.images, self.kept, str(self.folder / "retrieve"))
        pack.run(config, *stages, output or self.output, InlineRunner())
        return pack.read_corpus(output or self.output)


@pytest.mark.parametrize("repeats", [False, True])
def test_corpus_holds_the_original_bytes_and_its_tables_agree(tmp_path: Path, repeats: bool) -> None:
    run = Run(tmp_path)
    table = run.pack(PackConfig(images_per_shard=8, repeats=repeats)).to_pylist()
    count = 28 if repeats else 22
    assert len(table) == len({row["key"] for row in table}) == count
    assert {row["image_id"] for row in table} == set(run.ids[:22])
    names = [name for name in sorted(bytes_in(run.output)) if name.endswith(".tar")]
    assert names == [f"/corpus-{number:06d}.tar" for number in range(-(-count // 8))]
    assert [storage.list_names(run.output)] == [
        sorted(["composition.json", "manifest.json", *(name[1:] for name in names)]
        + [f"corpus-{number:05d}.parquet" for number in range(len(names))])
    ]  # fmt: skip
    samples = [(name[1:], sample) for name in names for sample in read_tar(run.output + name)]
    assert [(row["shard"], row["key"]) for row in table] == [(name, sample.key) for name, sample in samples]
    ingested = [storage.read_table(f"{run.images}/images-0000{n}.parquet", records.IMAGES).to_pylist() for n in (0, 1)]
    by_id = {row["image_id"]: row for rows in ingested for row in rows}
    for row, (_, sample) in zip(table, samples, strict=True):
        image = by_id[row["image_id"]]
        assert image_id(sample.data) == row["image_id"] == sample.key.partition("_")[0]
        assert sample.format == image["format"]
        assert sample.sidecar.pop("reasons") == row["reasons"]
        assert sample.sidecar == {name: image[name] for name in ("source", "uri", "width", "height", "label")}
        assert (row["source"], row["role"]) == (image["source"], image["role"])
    assert {EXTENSION_OF_FORMAT[sample.format] for _, sample in samples} == {"png", "jpg", "webp", "gif"}
    totals = storage.require_manifest(run.output).totals
    assert totals == {
        "rows": count,
        "bytes": sum(len(data) for name, data in bytes_in(run.output).items() if name in names),
    }


def test_composition_counts_what_is_there(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.pack(PackConfig())
    composition = json.loads(storage.read_bytes(f"{run.output}/composition.json"))
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


def test_source_that_changed_is_refused_and_leaves_no_tar_of_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = tmp_path / "seeds/label 1/::3.png"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=rf"pack, shard 00000\d: .*::3\.png.*no longer those of image {run.ids[3]}"):
        run.pack(PackConfig(images_per_shard=8))
    assert not Path(run.output, "manifest.json").exists()
    for name in bytes_in(run.output):
        if name.endswith(".tar"):
            assert run.ids[3] not in {sample.key for sample in read_tar(run.output + name)}
    path.write_bytes(run.pictures[run.ids[3]])
    assert run.pack(PackConfig(images_per_shard=8)).num_rows == 22, "put right, it goes on"


def test_nothing_to_pack_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.retrieved(retrieved_table([]), DatasetConfig(name="seeds"))
    with pytest.raises(InputError, match="Nothing to pack"):
        run.pack(PackConfig())
    assert not Path(run.output).exists()


def test_shard_beyond_the_hundred_thousandth_has_a_name_of_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rows = storage.read_table(f"{run.images}/images-00000.parquet", records.IMAGES).to_pylist()
    entry = pack.Entry(rows[0]["image_id"], rows[0], ("as_is:seeds",), 1.0)
    process = pack.make_worker(run.output)
    names = [file.name for n in ("000000", "099999", "100000") for file in process(Shard(n, [entry])).files]
    assert names == [
        *("corpus-000000.tar", "corpus-00000.parquet"),
        *("corpus-099999.tar", "corpus-99999.parquet"),
        *("corpus-100000.tar", "corpus-100000.parquet"),
    ]


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
        storage.write_bytes(path, pictures[n])
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
    copies = dedup.run(DedupConfig(), stage["ingest"], stage["pairs"], stage["dedup"], runner)
    finished = (stage["ingest"], stage["dedup"], stage["embed"])
    cluster.run(ClusterConfig(num_clusters=3), *finished, stage["cluster"], runner)
    datasets = (DatasetConfig(name="seeds", as_is=True, retrieval="sample", k=2),)
    config = RetrieveConfig(datasets=datasets)
    retrieve.run(config, *finished, stage["cluster"], stage["retrieve"], runner)
    pack.run(PackConfig(), stage["ingest"], stage["dedup"], stage["retrieve"], stage["corpus"], runner)

    funnel = json.loads(storage.read_bytes(f"{stage['corpus']}/composition.json"))["funnel"]
    total = copies.totals
    assert funnel["ingested"] == 52 == funnel["holdout"] + funnel["candidates"]
    assert funnel["after_exact"] == funnel["candidates"] - total.get("exact", 0)
    assert funnel["after_near_duplicates"] == funnel["after_exact"] - total.get("near", 0)
    assert funnel["after_decontamination"] == funnel["after_near_duplicates"] - total.get("holdout", 0) == total["kept"]
    corpus = pack.read_corpus(stage["corpus"]).to_pylist()
    found = {row["image_id"] for row in retrieve.read_retrieved(stage["retrieve"]).to_pylist()}
    as_is = {row["image_id"] for row in corpus if "as_is:seeds" in row["reasons"]}
    assert funnel["packed"] == len(corpus) == len(found | as_is) and funnel["retrieved"] == len(found)
    held_out = {row["image_id"] for row in rows.get("test", [])}
    assert not held_out & {row["image_id"] for row in corpus}, "bytes of a holdout image are in the corpus"
