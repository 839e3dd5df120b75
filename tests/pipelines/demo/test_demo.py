"""The minimum figures of the demo, read from the corpus that `make curate` wrote. Run by `make test-demo`."""

import hashlib
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from curation.engine.manifest import require_manifest
from curation.files import parquet, schemas
from curation.run_folder import kept_shards, read_corpus, read_images, read_kept, read_retrieved
from pipelines.bench import retrieval
from tests.curation.builders import stages_of

pytestmark = pytest.mark.demo

ROOT = Path(__file__).parents[3]
DATA, RUN = ROOT / "data" / "demo", ROOT / "runs" / "demo"
# Minimum recall of planted copies by transform, at the thresholds of demo.toml.
RECALL = {
    "jpeg": 0.95,
    "resize": 0.95,
    "colour": 0.95,
    "mirror": 0.95,
    "crop": 0.80,
    "border": 0.80,
    "overlay": 0.80,
    "rotation": 0.80,
}


@pytest.fixture(scope="module")
def planted() -> pa.Table:
    return pq.read_table(DATA / "planted.parquet")


@pytest.fixture(scope="module")
def decisions() -> dict[str, dict[str, object]]:
    """The row of `duplicates` by image_id: the kept one where there are exact copies."""
    rows: dict[str, dict[str, object]] = {}
    for name in require_manifest(str(RUN / "dedup")).files("duplicates"):
        for row in parquet.read_table(str(RUN / "dedup" / name), schemas.DUPLICATES).to_pylist():
            if row["image_id"] not in rows or row["kept"]:
                rows[row["image_id"]] = row
    return rows


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    return read_corpus(str(RUN / "corpus"))


@pytest.mark.parametrize("transform", RECALL)
def test_planted_copies_are_in_the_component_of_their_original(
    transform: str, planted: pa.Table, decisions: dict[str, dict[str, object]]
) -> None:
    rows = planted.filter(pc.equal(planted["transform"], transform)).to_pylist()
    assert len(rows) >= 40
    is_recalled = [
        decisions[row["copy_image_id"]]["component_id"] == decisions[row["original_image_id"]]["component_id"]
        for row in rows
    ]
    assert sum(is_recalled) / len(rows) >= RECALL[transform], f"{sum(is_recalled)} of {len(rows)}"


def test_no_planted_copy_of_a_holdout_image_is_in_the_corpus(planted: pa.Table, corpus: pa.Table) -> None:
    copies = set(planted.filter(pc.equal(planted["original_role"], "holdout"))["copy_image_id"].to_pylist())
    assert len(copies) >= 100
    assert copies & set(corpus["image_id"].to_pylist()) == set()


def test_no_holdout_image_is_in_the_corpus(corpus: pa.Table) -> None:
    images = read_images(str(RUN / "ingest"), ["image_id", "role"])
    holdout = set(images.filter(pc.equal(images["role"], "holdout"))["image_id"].to_pylist())
    assert len(holdout) >= 100
    assert holdout & set(corpus["image_id"].to_pylist()) == set()


def test_odd_files_have_the_expected_outcome() -> None:
    accepted = set(read_images(str(RUN / "ingest"), ["uri"])["uri"].to_pylist())
    names = require_manifest(str(RUN / "ingest")).files("rejects")
    rejects = [parquet.read_table(str(RUN / "ingest" / name), schemas.REJECTS) for name in names]
    reasons = {row["uri"]: row["reason"] for table in rejects for row in table.to_pylist()}
    for row in pq.read_table(DATA / "odd.parquet").to_pylist():
        uri = str((DATA / row["file"]).resolve())  # the paths of a resolved config are absolute
        assert (uri in accepted) == (row["expected"] == "accepted"), uri
        assert reasons.get(uri, "accepted") == row["expected"], uri


def test_tars_open_with_webdataset_and_tar_and_bytes_hash_to_their_ids(corpus: pa.Table) -> None:
    tars = sorted((RUN / "corpus").glob("corpus-*.tar"))
    assert [path.name for path in tars] == sorted(set(corpus["shard"].to_pylist()))
    seen = []
    for path in tars:
        listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True).stdout.split()
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        assert len(listed) == 2 * len(samples)
        for sample in samples:
            image = next(value for name, value in sample.items() if name not in ("json",) and not name.startswith("__"))
            assert hashlib.sha256(image).hexdigest()[:32] == sample["__key__"]
            assert json.loads(sample["json"])["reasons"]
            Image.open(io.BytesIO(image)).verify()
            seen.append(sample["__key__"])
        with tarfile.open(path) as archive:
            assert {(member.mtime, member.uid, member.gid, member.uname) for member in archive} == {(0, 0, 0, "")}
    assert seen == corpus["key"].to_pylist()


def test_ids_in_corpus_retrieved_and_composition_agree(corpus: pa.Table) -> None:
    composition = json.loads((RUN / "corpus" / "composition.json").read_text())
    retrieved = read_retrieved(str(RUN / "retrieve"))
    ids = corpus["image_id"].to_pylist()
    assert len(ids) == len(set(ids)) == composition["total_unique"] == composition["total_rows"]
    assert set(retrieved["image_id"].to_pylist()) <= set(ids)
    from_reasons = {
        (reason.split(":")[1], image_id)
        for image_id, reasons in zip(ids, corpus["reasons"].to_pylist(), strict=True)
        for reason in reasons
        if not reason.startswith("as_is:")
    }
    rows = zip(retrieved["seed_source"].to_pylist(), retrieved["image_id"].to_pylist(), strict=True)
    assert from_reasons == set(rows)
    for row in composition["datasets"]:
        num_retrieved = pc.sum(pc.equal(retrieved["seed_source"], row["dataset"])).as_py()
        assert row["retrieved"] == num_retrieved
    funnel = composition["funnel"]
    steps = ("candidates", "after_exact", "after_near_duplicates", "after_decontamination")
    counts = [funnel[step] for step in steps]
    assert counts == sorted(counts, reverse=True)
    assert funnel["ingested"] == sum(funnel["rejected"].values()) + funnel["holdout"] + funnel["candidates"]


def test_report_is_self_contained() -> None:
    html = (RUN / "report.html").read_text()
    loads = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", html)
    assert loads and all(link.startswith(("data:", "#")) for link in loads)
    assert len(html) < 16_000_000


def test_every_kept_image_has_a_vector() -> None:
    folders = (str(RUN / "ingest"), str(RUN / "dedup"), str(RUN / "embed"))
    kept = require_manifest(folders[1]).totals["kept"]
    shards = kept_shards(stages_of(*folders))
    assert sum(len(read_kept(shard, role=role)[0]) for shard in shards for role in ("seed", "pool")) == kept


def test_retrieval_finds_the_same_concept() -> None:
    for concept, (share, to_reach, by_chance) in retrieval.shares(str(RUN)).items():
        assert share >= to_reach > by_chance, concept
