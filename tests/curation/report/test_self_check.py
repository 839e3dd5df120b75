"""The self-check: its scores are those of the real stages, and the same for any workers.

tests/pipelines/test_curate.py compares its bytes on Ray and inline.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import embed, ingest, pairs
from curation.copies.compare_thumbnails import VerificationConfig
from curation.copies.edits import KINDS
from curation.copies.recall import SelfCheck, Share, summarize
from curation.embed import EmbedConfig
from curation.engine.manifest import require_manifest, write_manifest
from curation.engine.runner import InlineRunner, Runner
from curation.errors import InputError
from curation.files import parquet, paths, schemas
from curation.images.decode import ImageLimits, decode_rgb
from curation.images.hashing import image_id
from curation.images.sources import Role, SourceConfig
from curation.ingest import IngestConfig
from curation.models.embedders import EmbedderConfig
from curation.pairs import PairsConfig
from curation.report import self_check
from curation.report.self_check import SelfCheckConfig, edited_copy, num_copies_per_kind
from curation.run_folder import RunFolder, read_vectors
from tests.curation.builders import Killed, KilledRunner, bytes_in
from tests.evaluation.data.scene_builders import photograph

DESCRIBE = EmbedConfig(embedder=EmbedderConfig(name="efficientnet_lite0", image_size=64), thumbnail_side=96)
# The lists are longer than the pool, so that no candidate depends on other images.
PAIRS = PairsConfig(
    num_neighbors=99,
    min_descriptor_similarity=0.6,
    min_similarity=0.0,
    verification=VerificationConfig(working_side=64),
)
NUM_PICTURES = 6


def write_pictures(folder: Path, count: int, first: int = 0) -> dict[str, Path]:
    """Different pictures by image_id."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for seed in range(first, first + count):
        path = folder / f"{seed}.png"
        photograph(seed, (120, 90)).save(path)
        found[image_id(path.read_bytes())] = path
    return found


def run_stages(folder: Path, sources: list[tuple[str, Path, Role]], settings: PairsConfig = PAIRS) -> RunFolder:
    """A finished ingest, describe and pairs."""
    stages, runner = RunFolder.of(str(folder)), InlineRunner()
    configs = tuple(SourceConfig(name=name, path=str(path), role=role) for name, path, role in sources)
    ingest.run(IngestConfig(sources=configs, images_per_shard=4), stages.ingest, runner)
    embed.run(DESCRIBE, stages, stages.describe, runner, name="describe")
    pairs.run(settings, stages, stages.pairs, runner)
    return stages


def check(
    stages: RunFolder,
    output: str | Path,
    runner: Runner | None = None,
    max_images: int = 4,
    settings: PairsConfig = PAIRS,
) -> list[dict[str, Any]]:
    config = SelfCheckConfig(max_images=max_images)
    runner = runner or InlineRunner()
    self_check.run(config, stages, str(output), runner, describe=DESCRIBE, pairs=settings)
    rows: list[dict[str, Any]] = self_check.read_scores(str(output))[0].to_pylist()
    return rows


def result_of(output: str | Path, threshold: float) -> SelfCheck:
    scores, known = self_check.read_scores(str(output))
    return summarize(scores, known, threshold=threshold, holdout_threshold=threshold, min_similarity=0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("self-check")


@pytest.fixture(scope="module")
def pool(home: Path) -> dict[str, Path]:
    return write_pictures(home / "pool", NUM_PICTURES)


@pytest.fixture(scope="module")
def stages(home: Path, pool: dict[str, Path]) -> RunFolder:
    return run_stages(home / "run", [("web", home / "pool", "pool")])


@pytest.fixture(scope="module")
def rows(home: Path, stages: RunFolder) -> list[dict[str, Any]]:
    return check(stages, home / "straight")


def test_every_kind_edits_equally_many_images(rows: list[dict[str, Any]], pool: dict[str, Path]) -> None:
    originals = [(row["image_id"], row["kind"]) for row in rows if row["image_id"] == row["other_image_id"]]
    assert len(originals) == len(set(originals)) == 2 * len(KINDS)
    assert all(sum(kind == each for _, kind in originals) == 2 for each in KINDS)
    assert {image for image, _ in originals} == set(sorted(pool)[:4]), "the smallest ids"


@pytest.fixture(scope="module")
def together(home: Path, rows: list[dict[str, Any]], pool: dict[str, Path]) -> tuple[RunFolder, dict[str, Any]]:
    """A run whose pool holds the copies too, and the original and kind of each copy by image_id."""
    copies = home / "copies"
    copies.mkdir()
    name_of = {}
    for original, kind in {(row["image_id"], row["kind"]) for row in rows}:
        picture = decode_rgb(pool[original].read_bytes(), ImageLimits())
        edited_copy(picture, original, kind).save(copies / f"{original}-{kind}.png")
        name_of[image_id((copies / f"{original}-{kind}.png").read_bytes())] = original, kind
    assert len(name_of) == 2 * len(KINDS)
    return run_stages(home / "together", [("web", home / "pool", "pool"), ("copies", copies, "pool")]), name_of


def test_scores_are_those_of_the_same_copies_in_the_pool(
    rows: list[dict[str, Any]], pool: dict[str, Path], together: tuple[RunFolder, dict[str, Any]]
) -> None:
    stages, name_of = together
    files = require_manifest(stages.pairs).paths(stages.pairs, "pairs")
    expected = {}
    for row in pa.concat_tables([parquet.read_table(file, schemas.PAIRS) for file in files]).to_pylist():
        for one, other in ((row["image_id"], row["other_image_id"]), (row["other_image_id"], row["image_id"])):
            if one in name_of and other in pool:
                expected[*name_of[one], other] = row["similarity"]
    scored = {(row["image_id"], row["kind"], row["other_image_id"]): row for row in rows}
    assert {key for key, row in scored.items() if row["proposed"]} == expected.keys()
    assert all(scored[key]["similarity"] == value for key, value in expected.items())
    assert {value for value in expected.values() if value > 0.5} and min(expected.values()) < 0.2


def test_copies_that_change_little_are_found(home: Path, rows: list[dict[str, Any]]) -> None:
    result = result_of(home / "straight", 0.5)
    found = {each.kind: each.found for each in result.kinds}
    assert all(found[kind] == Share(2, 2) for kind in ("jpeg", "resize", "mirror"))
    assert result.found.whole == len(KINDS) * 2 and result.unexpected.count == 0


def test_lists_of_neighbors_end_as_in_pairs(
    home: Path, stages: RunFolder, pool: dict[str, Path], together: tuple[RunFolder, dict[str, Any]]
) -> None:
    """With one neighbour, an original is a candidate where it is the nearest, or where the copy is its nearest."""
    short = PAIRS.model_copy(update={"num_neighbors": 1, "max_phash_distance": -1})
    rows = check(stages, home / "short", settings=short)
    ids, matrix = (np.concatenate(columns) for columns in zip(*read_vectors(together[0].describe), strict=True))
    vector_of = dict(zip(ids.tolist(), matrix.astype(np.float32), strict=True))
    is_proposed = []
    for copy, (original, kind) in together[1].items():
        cosine = {each: float(vector_of[copy] @ vector_of[each]) for each in pool}
        nearest_of_original = max(float(vector_of[original] @ vector_of[each]) for each in pool if each != original)
        nearest = max(cosine, key=cosine.__getitem__)
        expected = {nearest} if cosine[nearest] >= 0.6 else set()
        if cosine[original] >= max(0.6, nearest_of_original):
            expected.add(original)
        of_copy = [row for row in rows if (row["image_id"], row["kind"]) == (original, kind)]
        assert {row["other_image_id"] for row in of_copy if row["proposed"]} == expected
        is_proposed.append(nearest == original)
        assert len(of_copy) == len(expected | {original}), "the original has a row in any case"
    assert len(set(is_proposed)) == 2, "both occur"
    without = check(stages, home / "hashes", settings=short.model_copy(update={"num_neighbors": 0}))
    assert not any(row["proposed"] for row in without) and len(without) == 2 * len(KINDS)


def test_same_bytes_after_a_kill_in_other_workers(home: Path, stages: RunFolder, rows: list[dict[str, Any]]) -> None:
    straight = bytes_in(str(home / "straight"))
    assert "scores-00001.parquet" in {name.strip("/") for name in straight}
    for num_calls in (0, 1):
        with pytest.raises(Killed):
            check(stages, home / "killed", KilledRunner(num_calls))
    check(stages, home / "killed")
    assert bytes_in(str(home / "killed")) == straight


def test_without_images_nothing_is_done(home: Path, stages: RunFolder) -> None:
    assert check(stages, home / "off", max_images=0) == []
    assert paths.list_names(str(home / "off")) == ["manifest.json"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_pool_of_no_image_and_of_one(tmp_path: Path, count: int) -> None:
    write_pictures(tmp_path / "seeds", 2)
    write_pictures(tmp_path / "pool", count, first=5)
    sources: list[tuple[str, Path, Role]] = [("s", tmp_path / "seeds", "seed"), ("p", tmp_path / "pool", "pool")]
    rows = check(run_stages(tmp_path / "run", sources[: 1 + count]), tmp_path / "out", max_images=200)
    copies = [row["kind"] for row in rows if row["image_id"] == row["other_image_id"]]
    assert sorted(copies) == sorted(list(KINDS) * count)


def test_a_copy_that_the_run_missed_is_an_unexpected_pair(tmp_path: Path) -> None:
    (original,) = write_pictures(tmp_path / "pool", 1)
    mirrored = Image.open(tmp_path / "pool/0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(tmp_path / "pool/again.png")
    (other,) = {image_id(path.read_bytes()) for path in (tmp_path / "pool").iterdir()} - {original}
    stages = run_stages(tmp_path / "run", [("web", tmp_path / "pool", "pool")])
    check(stages, tmp_path / "found", max_images=1)
    assert result_of(tmp_path / "found", 0.5).unexpected == Share(0, 0), "the run knows that the two are copies"
    known = require_manifest(stages.pairs)
    (file,) = known.files("pairs")
    record = parquet.write_table(paths.join(stages.pairs, file), schemas.PAIRS.empty_table())
    write_manifest(stages.pairs, replace(known, shards=(known.shards[0].model_copy(update={"files": (record,)}),)))
    check(stages, tmp_path / "missed", max_images=1)
    result = result_of(tmp_path / "missed", 0.5)
    assert result.unexpected.count > 0
    (pair,) = result.unexpected_pairs
    assert {pair.image_id, pair.other_image_id} == {original, other} and pair.similarity > 0.5


def test_an_image_that_changed_since_ingest_is_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pool", 1)
    stages = run_stages(tmp_path / "run", [("web", tmp_path / "pool", "pool")])
    photograph(7, (120, 90)).save(tmp_path / "pool/0.png")
    with pytest.raises(InputError, match="changed"):
        check(stages, tmp_path / "out")


def test_small_runs_have_few_copies_and_large_ones_no_more_than_the_setting() -> None:
    sizes = [num_copies_per_kind(200, images) for images in (0, 300, 3_000, 30_000, 10**8)]
    assert sizes[0] == sizes[1] == 2 and sizes == sorted(sizes) and sizes[-1] == 200
    assert num_copies_per_kind(3, 10**8) == 3


def test_long_pictures_keep_their_short_side() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 3000, 3), dtype=np.uint8)
    for size in ((3000, 16), (4, 4), (1, 1)):
        for kind in KINDS:
            copy = edited_copy(Image.fromarray(noise).resize(size), "0" * 32, kind)
            assert min(copy.size) >= 1
    assert edited_copy(Image.new("RGB", (3000, 64)), "0" * 32, "mirror").size == (1500, 32)
    assert edited_copy(Image.new("RGB", (1280, 960)), "0" * 32, "mirror").size == (640, 480)
