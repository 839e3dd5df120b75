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
from curation.report.self_check import Files, SelfCheckConfig, candidates_of, edited_copy, num_copies_per_kind
from curation.run_folder import RunFolder
from tests.curation.builders import (
    Killed,
    KilledRunner,
    bytes_in,
    id_of,
    image_row,
    unit_vectors,
    write_ingest,
    write_vectors,
)
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


def test_scores_are_those_of_the_same_copies_in_the_pool(
    home: Path, rows: list[dict[str, Any]], pool: dict[str, Path]
) -> None:
    copies = home / "copies"
    copies.mkdir()
    name_of = {}
    for original, kind in {(row["image_id"], row["kind"]) for row in rows}:
        picture = decode_rgb(pool[original].read_bytes(), ImageLimits())
        edited_copy(picture, original, kind).save(copies / f"{original}-{kind}.png")
        name_of[image_id((copies / f"{original}-{kind}.png").read_bytes())] = original, kind
    assert len(name_of) == 2 * len(KINDS)
    stages = run_stages(home / "together", [("web", home / "pool", "pool"), ("copies", copies, "pool")])
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


@pytest.mark.parametrize(("k", "max_distance"), [(0, 2), (1, -1), (3, 2), (99, -1)])
def test_candidates_agree_with_plain_products(tmp_path: Path, k: int, max_distance: int) -> None:
    """Of 40 images, the first four in two shards; 12 copies with descriptors near those of their originals."""
    random = np.random.default_rng(k)
    matrix = unit_vectors(1, 40, 6).astype(np.float16)
    hashes = random.integers(0, 2**63, 40).astype(np.uint64)
    numbers = [range(0, 15), range(15, 40), range(0, 4)]
    rows = [[image_row(id_of(n), "web", "pool", phash=int(hashes[n])) for n in of_shard] for of_shard in numbers]
    images = write_ingest(tmp_path / "ingest", rows)
    described = write_vectors(
        tmp_path / "describe", images, [{id_of(n): matrix[n] for n in of_shard} for of_shard in numbers]
    )
    originals = [*range(6), *range(20, 26)]
    copies = matrix[originals].astype(np.float32) + random.normal(0, 0.4, (12, 6))
    copies = (copies / np.linalg.norm(copies, axis=1, keepdims=True)).astype(np.float16)
    near = hashes[originals] ^ random.integers(0, 16, 12).astype(np.uint64)  # up to four bits differ
    settings = PairsConfig(num_neighbors=k, min_descriptor_similarity=0.5, max_phash_distance=max_distance)
    files = Files(
        require_manifest(images).paths(images, "images"), require_manifest(described).paths(described, "vectors"), []
    )
    found = candidates_of(settings, files, [id_of(n) for n in originals], copies, near)

    cosine, among = (each.astype(np.float64) @ matrix.astype(np.float64).T for each in (copies, matrix))
    np.fill_diagonal(among, -1)
    one_way = 0
    for copy, original in enumerate(originals):
        expected = {n for n in np.argsort(-cosine[copy])[:k] if cosine[copy, n] >= 0.5}
        of_original = np.sort(among[original][among[original] >= 0.5])[::-1]
        least = of_original[k - 1] if 0 < k <= len(of_original) else 0.5
        if k and cosine[copy, original] >= least:
            one_way += original not in expected
            expected.add(original)
        expected |= {n for n in range(40) if int(near[copy] ^ hashes[n]).bit_count() <= max_distance}
        of_copy = found.copy == copy
        ids = [found.ids[row] for row in np.flatnonzero(of_copy)]
        assert ids == [id_of(original), *sorted(id_of(n) for n in expected - {original})]
        assert found.proposed[of_copy].tolist() == [original in expected] + [True] * (len(ids) - 1)
        np.testing.assert_allclose(found.cosine[of_copy], [cosine[copy, int(each, 16)] for each in ids], atol=1e-3)
        places = found.place[of_copy]
        assert [id_of((*range(40), *range(4))[place]) for place in places] == ids
    assert one_way or k != 1, "only the list of the original has the copy"


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
    check(stages, tmp_path / "found", max_images=2)
    assert result_of(tmp_path / "found", 0.5).unexpected == Share(0, 0), "the run knows that the two are copies"
    known = require_manifest(stages.pairs)
    (file,) = known.files("pairs")
    record = parquet.write_table(paths.join(stages.pairs, file), schemas.PAIRS.empty_table())
    write_manifest(stages.pairs, replace(known, shards=(known.shards[0].model_copy(update={"files": (record,)}),)))
    check(stages, tmp_path / "missed", max_images=2)
    result = result_of(tmp_path / "missed", 0.5)
    assert result.unexpected.count > 0
    ends = {(pair.image_id, pair.other_image_id) for pair in result.unexpected_pairs}
    assert ends == {(original, other), (other, original)} and result.unexpected_pairs[-1].similarity >= 0.5


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
