"""One row a unique image, with columns that a brute-force reading of the other tables gives too."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from curation.dedup import DedupConfig
from curation.engine.manifest import require_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner
from curation.errors import InputError
from curation.files import parquet, paths, schemas, vectors
from curation.images.hashing import image_id
from curation.pack import PackConfig
from curation.report import images_table, page
from curation.report.page import ReportConfig
from curation.retrieve import DatasetConfig
from curation.run_folder import (
    RunFolder,
    read_assignments,
    read_corpus,
    read_images,
    read_images_table,
)
from tests.curation.builders import Killed, KilledRunner, bytes_in
from tests.curation.report.small_runs import BLUE, RED, build_run, write_image


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of six shards, with copies within a shard, across shards and across sources, and with repeats."""
    folder = tmp_path_factory.mktemp("example")
    root = folder / "images"
    seeds = [write_image(root / f"seeds/red/{number}.png", RED) for number in range(4)]
    pool = [write_image(root / f"pool/{number:02d}.png", (RED, BLUE)[number % 2]) for number in range(16)]
    more = [write_image(root / f"more/{number:02d}.png", RED) for number in range(7)]
    held = [write_image(root / f"holdout/{number}.png", BLUE) for number in range(2)]
    for original, copy in (
        (pool[0], "pool/00-within.png"),
        (pool[1], "pool/99-in-another-shard.png"),
        (pool[2], "more/99-of-another-source.png"),
        (pool[2], "seeds/red/99-a-seed.png"),
        (seeds[0], "pool/50-of-a-seed.png"),
        (held[0], "pool/51-of-the-holdout.png"),
        (seeds[1], "holdout/99-a-seed-too.png"),
        (pool[3], "more/98-of-a-near-copy.png"),
        (pool[4], "last/only-copies.png"),
        (pool[5], "last/only-copies-too.png"),
    ):
        (root / copy).parent.mkdir(exist_ok=True)
        shutil.copy(original, root / copy)
    pairs = [(pool[3], pool[5], 0.9), (pool[7], held[1], 0.5), (more[0], more[1], 0.7)]
    return build_run(
        str(folder / "run"),
        [
            ("seeds", root / "seeds", "seed"),
            ("pool", root / "pool", "pool"),
            ("more", root / "more", "pool"),
            ("holdout", root / "holdout", "holdout"),
            ("last", root / "last", "pool"),
        ],
        [DatasetConfig(name="seeds", as_is=True, retrieval="sample", k=5)],
        pairs,
        copies=DedupConfig(decontaminate_seeds=False),
        packing=PackConfig(repeats=True, images_per_shard=9),
    )


def id_of_image(run: str, name: str) -> str:
    return image_id((Path(run).parent / "images" / name).read_bytes())


def brute_force(run: str) -> list[dict[str, Any]]:
    """The rows of the table, without `x` and `y`, from the tables of the other stages."""
    stage = RunFolder.of(run)
    listed = read_images(stage.ingest).to_pylist()
    decided = [
        row
        for file in require_manifest(stage.dedup).paths(stage.dedup, "duplicates")
        for row in parquet.read_table(file, schemas.DUPLICATES).to_pylist()
    ]
    shard_of_row = [
        number
        for number, record in enumerate(require_manifest(stage.ingest).shards)
        for _ in range(record.totals["accepted"])
    ]
    clusters = {
        row["image_id"]: row["cluster_id"]
        for table in read_assignments(stage.cluster, ["image_id", "cluster_id"])
        for row in table.to_pylist()
    }
    packed: dict[str, list[dict[str, Any]]] = {}
    for row in read_corpus(stage.corpus).to_pylist():
        packed.setdefault(row["image_id"], []).append(row)
    rows: dict[str, dict[str, Any]] = {}
    for number, (image, decision) in enumerate(zip(listed, decided, strict=True)):
        assert image["image_id"] == decision["image_id"]
        key = image["image_id"]
        if key not in rows:
            samples = sorted(packed.get(key, []), key=lambda row: (len(row["key"]), row["key"]))
            file = f"describe/thumbnails-{shard_of_row[number]:05d}.parquet"
            small = parquet.read_table(paths.join(run, file), schemas.THUMBNAILS)["image_id"].to_pylist()
            names = ("image_id", "source", "role", "uri", "label", "width", "height", "format")
            rows[key] = {name: image[name] for name in names} | {
                "sources": [],
                "num_rows": 0,
                "kept": False,
                "component_id": decision["component_id"],
                "cluster_id": clusters.get(key),
                "corpus_key": samples[0]["key"] if samples else None,
                "reasons": [reason for sample in samples for reason in sample["reasons"]],
                "weight": sum(sample["weight"] for sample in samples) if samples else None,
                "thumbnail_file": file,
                "thumbnail_row": small.index(key),
                "decisions": [],
            }
        row = rows[key]
        row["num_rows"] += 1
        row["kept"] |= decision["kept"]
        row["sources"] += [] if image["source"] in row["sources"] else [image["source"]]
        row["decisions"].append(decision)
    for row in rows.values():
        decisions = row.pop("decisions")
        kept = [decision for decision in decisions if decision["kept"]]
        (chosen, *_) = kept or [decision for decision in decisions if decision["reason"] != "exact"]
        row["reason"], row["matched_image_id"] = chosen["reason"], chosen["matched_image_id"]
    return list(rows.values())


def test_every_column_agrees_with_brute_force(example: str) -> None:
    table = read_images_table(RunFolder.of(example).images)
    assert table.schema == schemas.IMAGES_TABLE
    expected = brute_force(example)
    assert table.drop_columns(["x", "y"]).to_pylist() == [
        {name: row[name] for name in schemas.IMAGES_TABLE.names if name not in ("x", "y")} for row in expected
    ]
    # The example has every case.
    assert {row["reason"] for row in expected} == {None, "near", "holdout"}
    assert max(row["num_rows"] for row in expected) == 3 and max(len(row["sources"]) for row in expected) == 3
    assert any(len(row["reasons"]) > 1 and row["weight"] > 1 for row in expected)
    assert any(row["cluster_id"] is None and row["kept"] for row in expected)


def test_an_image_id_is_a_key_over_all_parts_and_no_image_is_lost(example: str) -> None:
    stage = RunFolder.of(example)
    parts = require_manifest(stage.images).paths(stage.images, "images")
    assert [part.rpartition("/")[2] for part in parts] == require_manifest(stage.ingest).files("images")
    tables = [parquet.read_table(part, schemas.IMAGES_TABLE) for part in parts]
    ids = [image_id for table in tables for image_id in table["image_id"].to_pylist()]
    listed = read_images(stage.ingest)["image_id"]
    assert len(ids) == len(set(ids)) == len(pc.unique(listed)) < len(listed)
    assert ids == pc.unique(listed).to_pylist()  # in the order of ingest
    assert tables[-1].num_rows == 0  # its two images are listed before
    totals = require_manifest(stage.images).totals
    assert totals["images"] == len(ids) and totals["in_corpus"] == len(pc.unique(read_corpus(stage.corpus)["image_id"]))
    assert pc.sum(read_images_table(stage.images, ["num_rows"])["num_rows"]).as_py() == len(listed)


def test_images_of_several_rows(example: str) -> None:
    rows = {row["image_id"]: row for row in read_images_table(RunFolder.of(example).images).to_pylist()}
    in_two_shards = rows[id_of_image(example, "pool/01.png")]
    assert (in_two_shards["num_rows"], in_two_shards["sources"], in_two_shards["kept"]) == (2, ["pool"], True)
    seed = rows[id_of_image(example, "pool/02.png")]  # the seed is listed first, and kept
    assert (seed["role"], seed["sources"]) == ("seed", ["seeds", "pool", "more"])
    assert seed["kept"] and seed["cluster_id"] is None and "as_is:seeds" in seed["reasons"]
    held = rows[id_of_image(example, "holdout/0.png")]  # the pool lists it first
    assert (held["role"], held["reason"], held["matched_image_id"]) == ("pool", "holdout", held["image_id"])
    assert held["sources"] == ["pool", "holdout"] and held["corpus_key"] is None and held["reasons"] == []
    exempt = rows[id_of_image(example, "holdout/99-a-seed-too.png")]  # its row in the holdout is dropped
    assert exempt["kept"] and exempt["reason"] is None and exempt["sources"] == ["seeds", "holdout"]
    near = rows[id_of_image(example, "pool/03.png")]
    kept = rows[id_of_image(example, "pool/05.png")]
    if near["kept"]:
        near, kept = kept, near
    assert near["reason"] == "near" and near["matched_image_id"] == kept["image_id"]
    assert near["component_id"] == kept["component_id"] and near["weight"] is None


def test_places_are_those_of_the_vectors_of_the_images(example: str) -> None:
    stage = RunFolder.of(example)
    table = read_images_table(stage.images)
    places = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    matrix_of: dict[str, np.ndarray] = {}
    fitted = []
    for file in require_manifest(stage.embed).paths(stage.embed, "vectors"):
        ids, matrix = vectors.read_file(file)
        fitted.append(matrix.astype(np.float64))
        for image, vector in zip(ids, matrix, strict=True):
            matrix_of.setdefault(image, vector)
    everything = np.concatenate(fitted)
    mean = everything.mean(axis=0)
    directions = np.linalg.svd(everything - mean, full_matrices=False)[2][:2]
    directions *= np.sign([row[np.abs(row).argmax()] for row in directions])[:, None]
    matrix = np.stack([matrix_of[image] for image in table["image_id"].to_pylist()]).astype(np.float64)
    assert places == pytest.approx((matrix - mean) @ directions.T, abs=1e-3)
    reds = np.array([("red" in uri) for uri in table["uri"].to_pylist()])
    assert reds.any() and np.sign(places[reds, 0]).min() == np.sign(places[reds, 0]).max()  # the seeds are alike


def test_all_kills_give_the_same_bytes(example: str, tmp_path: Path) -> None:
    stage = RunFolder.of(example)
    for num_calls, after_work in ((0, False), (2, False), (0, True), (3, True)):
        with pytest.raises(Killed):
            images_table.run(stage, str(tmp_path / "killed"), KilledRunner(num_calls, after_work=after_work))
    images_table.run(stage, str(tmp_path / "killed"), InlineRunner())
    assert bytes_in(str(tmp_path / "killed")) == bytes_in(stage.images)


def test_a_sample_gives_the_same_bytes_when_ray_continues_after_kills(
    example: str, ray_runner: RayRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """May take over 5 seconds: workers of Ray start."""
    stage, output = RunFolder.of(example), str(tmp_path / "images")
    num_shards = len(require_manifest(stage.ingest).shards)
    monkeypatch.setattr(images_table, "MAX_FITTED", 20)
    images_table.run(stage, str(tmp_path / "sampled"), InlineRunner())
    sampled, whole = (read_images_table(folder) for folder in (str(tmp_path / "sampled"), stage.images))
    assert sampled.drop_columns(["x", "y"]) == whole.drop_columns(["x", "y"])
    assert sampled["x"] != whole["x"]
    for num_calls in (3, num_shards - 3 + 2):  # in the step of the sample, and behind it
        with pytest.raises(Killed):
            images_table.run(stage, output, KilledRunner(num_calls))
    images_table.run(stage, output, ray_runner)
    assert bytes_in(output) == bytes_in(str(tmp_path / "sampled"))


def test_parts_that_share_files_of_the_plan_give_the_same_bytes(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = RunFolder.of(example)
    monkeypatch.setattr(images_table, "MAX_PLAN_FILES", 2)
    monkeypatch.setattr(images_table, "ROWS_PER_BUCKET", 5)
    images_table.run(stage, str(tmp_path / "images"), InlineRunner())
    assert bytes_in(str(tmp_path / "images")) == bytes_in(stage.images)


def test_replace_does_a_damaged_part_again(example: str, tmp_path: Path) -> None:
    stage, output = RunFolder.of(example), tmp_path / "images"
    shutil.copytree(stage.images, output)
    (output / "images-00002.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"images: damaged.*images-00002\.parquet has 0 bytes.*--replace"):
        images_table.run(stage, str(output), InlineRunner())
    images_table.run(stage, str(output), InlineRunner(), replace=True)
    assert bytes_in(str(output)) == bytes_in(stage.images)


def test_a_run_of_one_pool_image_without_thumbnails(tmp_path: Path) -> None:
    write_image(tmp_path / "images/seeds/0.png", RED)
    write_image(tmp_path / "images/pool/0.png", RED)
    shutil.copy(tmp_path / "images/pool/0.png", tmp_path / "images/pool/1.png")
    run = build_run(
        str(tmp_path / "run"),
        [("seeds", tmp_path / "images/seeds", "seed"), ("pool", tmp_path / "images/pool", "pool")],
        [DatasetConfig(name="seeds", as_is=True, retrieval="none")],
        thumbnails=False,
        num_clusters=1,
    )
    seed, image = read_images_table(RunFolder.of(run).images).to_pylist()
    assert (image["num_rows"], image["cluster_id"], image["corpus_key"], image["reasons"]) == (2, 0, None, [])
    assert (seed["corpus_key"], seed["reasons"], seed["weight"]) == (seed["image_id"], ["as_is:seeds"], 1.0)
    assert image["thumbnail_file"] is None and image["thumbnail_row"] is None
    assert seed["x"] == pytest.approx(-image["x"], abs=1e-3) and seed["y"] == image["y"] == 0


def test_stages_of_two_runs_are_refused(example: str, tmp_path: Path) -> None:
    write_image(tmp_path / "images/seeds/0.png", RED)
    for number in range(2):
        write_image(tmp_path / f"images/pool/{number}.png", BLUE)
    other = build_run(
        str(tmp_path / "run"),
        [("seeds", tmp_path / "images/seeds", "seed"), ("pool", tmp_path / "images/pool", "pool")],
        [DatasetConfig(name="seeds", as_is=True, retrieval="none")],
    )
    stage, foreign = RunFolder.of(example), RunFolder.of(other)
    for name in ("embed", "describe", "dedup", "cluster", "corpus"):
        folders = {**vars(stage), name: getattr(foreign, name)}
        with pytest.raises(InputError, match="not stages of one run"):
            images_table.run(RunFolder(**folders), str(tmp_path / "out"), InlineRunner())
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="holds no finished stage"):
        images_table.run(RunFolder(**{**vars(stage), "corpus": str(tmp_path)}), str(tmp_path / "out"), InlineRunner())


def test_reads_only_the_columns_asked_for(example: str) -> None:
    table = read_images_table(RunFolder.of(example).images, ["image_id", "sources"])
    assert table.column_names == ["image_id", "sources"]
    assert Counter(map(len, table["sources"].to_pylist()))[1] > 10
    assert table.schema.field("sources").type == pa.list_(pa.string())


def test_an_image_that_the_check_passed_over_is_kept_with_a_reason_and_the_report_counts_it(tmp_path: Path) -> None:
    """Reds from near to far of the seed: the nearest are its copies, and the next in rank are taken."""
    write_image(tmp_path / "seeds/seed.png", RED)
    for number in range(12):
        write_image(tmp_path / f"pool/{number:02d}.png", (200, 40 + 12 * number, 40))
    run = build_run(
        str(tmp_path / "run"),
        [("seeds", tmp_path / "seeds", "seed"), ("pool", tmp_path / "pool", "pool")],
        [DatasetConfig(name="seeds", as_is=True, retrieval="sample", k=2)],
        copies=DedupConfig(threshold=0.99),
        check_copies=True,
    )
    rows = {row["image_id"]: row for row in read_images_table(paths.join(run, "images")).to_pylist()}
    seed = next(image_id for image_id, row in rows.items() if row["role"] == "seed")
    passed = [row for row in rows.values() if row["reason"] == "corpus_copy"]
    assert passed and all(row["kept"] and row["corpus_key"] is None and not row["reasons"] for row in passed)
    assert seed in {row["matched_image_id"] for row in passed}
    assert all(rows[row["matched_image_id"]]["corpus_key"] is not None for row in passed)
    assert sum(row["corpus_key"] is not None for row in rows.values()) == 3
    page.run(ReportConfig(), run)
    text = Path(run, page.REPORT_NAME).read_text()
    assert f"It passed over {len(passed):,} images for the next in rank." in text
    assert "by the check of retrieve: 0 retrieved images. Copies of the holdout: 0." in text
