"""The benchmark of copies: a draw's pictures and copies, and scores of components with known answers."""

import dataclasses
import itertools
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.copies.edits import KINDS
from curation.errors import InputError
from curation.run_folder import read_images_table
from pipelines.bench import __main__ as bench
from pipelines.bench import copies, copy_peers, copy_pictures, copy_scores, copy_sheet
from pipelines.bench.copy_pictures import Counts, Draw
from pipelines.bench.copy_scores import Truth
from pipelines.bench.photographs import OBJECTS, SCENERY, TEXTURES, Original
from pipelines.curate import curate

DRAW = Draw(
    seed=1,
    half=0,
    counts={SCENERY: Counts(3, 1, 2), OBJECTS: Counts(2, 1, 0), TEXTURES: Counts(2, 1, 1)},
    sources={},
    megabytes=0,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    """Four pictures of each domain: squares of random colours."""
    folder, listed = tmp_path_factory.mktemp("originals"), []
    for number, domain in itertools.product(range(4), (SCENERY, OBJECTS, TEXTURES)):
        generator = np.random.default_rng([number, len(domain)])
        size = (460, 230) if domain == SCENERY else (226, 230)
        cells = Image.fromarray(generator.integers(0, 256, (9, 14, 3), np.uint8))
        path = folder / f"{domain}-{number}.png"
        cells.resize(size, Image.Resampling.NEAREST).save(path)
        listed.append(Original(domain, "package", path.name, path))
    return listed


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory, originals: list[Original]) -> Path:
    folder = tmp_path_factory.mktemp("draw")
    copy_pictures.make(originals, folder, DRAW)
    return folder


def test_a_draw_has_each_picture_once_and_each_kind_equally_often(draw: Path) -> None:
    rows = pq.read_table(draw / copy_pictures.TABLE).to_pylist()
    originals = [row for row in rows if not row["is_copy"]]
    drawn = [row for row in rows if row["is_copy"]]
    assert len({row["picture"] for row in originals}) == len(originals) == 13
    counts = [sum(row["kind"] == kind for row in drawn) for kind in KINDS]
    assert max(counts) - min(counts) <= 1
    for row in rows:
        with Image.open(draw / row["path"]) as picture:
            assert max(picture.size) <= 512 or row["is_copy"]
        folder = row["path"].partition("/")[0]
        assert folder == ("pool" if row["is_copy"] else row["role"])
        if row["is_copy"]:
            assert row["kind"] not in [
                one["kind"] for one in drawn if one != row and one["original_path"] == row["original_path"]
            ]
    assert {row["path"] for row in rows} == {
        path.relative_to(draw).as_posix() for part in ("seeds", "pool", "holdout") for path in (draw / part).iterdir()
    }
    num_copies = [
        sum(row["original_path"] == one["path"] for row in drawn) for one in originals if one["role"] == "holdout"
    ]
    assert num_copies == [5, 5, 5]


def test_the_seed_of_a_draw_decides_every_byte(draw: Path, tmp_path: Path, originals: list[Original]) -> None:
    copy_pictures.make(originals, tmp_path / "again", DRAW)
    copy_pictures.make(originals, tmp_path / "other", dataclasses.replace(DRAW, seed=2))
    first, again, other = (
        {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*.*")}
        for tree in (draw, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert first != other


def test_a_draw_with_too_few_pictures_names_the_domain(tmp_path: Path, originals: list[Original]) -> None:
    few = dataclasses.replace(DRAW, counts={TEXTURES: Counts(20, 0, 0)})
    with pytest.raises(InputError, match="4 different pictures of textures, not 20"):
        copy_pictures.make(originals, tmp_path, few)


def test_the_draws_share_no_picture() -> None:
    """Each original of the shared packages is of one half; the held-back draw has a package more.

    The second held-back draw has packages of its own.
    """
    development, held_back = copy_pictures.DRAWS["development"], copy_pictures.DRAWS["held-back"]
    second = copy_pictures.DRAWS["second-held-back"]
    assert {development.half, held_back.half} == {0, 1}
    assert len({draw.seed for draw in copy_pictures.DRAWS.values()}) == len(copy_pictures.DRAWS)
    assert not second.sources.keys() & (held_back.sources.keys() | development.sources.keys())
    assert second.half is None
    assert set(development.sources) == set(copy_pictures.SHARED)
    assert held_back.sources.keys() - development.sources.keys()
    halves = [copy_pictures.half_of(Original(SCENERY, "p", f"{number}.jpg", Path())) for number in range(50)]
    assert set(halves) == {0, 1}


def test_the_second_held_back_draw_is_mostly_photographs() -> None:
    draw = copy_pictures.DRAWS["second-held-back"]
    assert {source.domain for source in draw.sources.values()} == set(draw.counts)
    num_originals = {domain: counts.copied + counts.holdout + counts.alone for domain, counts in draw.counts.items()}
    assert num_originals[SCENERY] >= 0.6 * sum(num_originals.values())


def test_a_label_is_of_a_package_of_a_draw() -> None:
    """Each picture has one group at most, and lies in a folder or zip file that the draw reads."""
    sources = {package: source for draw in copy_pictures.DRAWS.values() for package, source in draw.sources.items()}
    groups = tomllib.loads(copy_scores.NEAR_DUPLICATES.read_text())["groups"]
    named = [(group["package"], picture) for group in groups for picture in group["pictures"]]
    assert len(set(named)) == len(named)
    for package, picture in named:
        assert picture.startswith(sources[package].names), (package, picture)
        assert not any(part in f"/{picture}" for part in sources[package].without), (package, picture)


def truth() -> Truth:
    """Pictures A, B, C, D with a copy each; the holdout holds D; C and B are alike.

    Rows:  0 A  1 B  2 C  3 D  4 a  5 b  6 c  7 d
    """
    return Truth(
        folder=Path(),
        paths=[f"pool/{row}.jpg" for row in range(8)],
        image_ids=[f"{row}" for row in range(8)],
        picture=np.array([0, 1, 2, 3] * 2),
        picture_names=[("p", name) for name in "ABCD"],
        alike=np.array([0, 1, 1, 3] * 2),
        original=np.array([0, 1, 2, 3] * 2),
        kinds=["", "", "", "", "jpeg", "jpeg", "blur", "text"],
        roles=["pool", "pool", "pool", "holdout"] * 2,
    )


@pytest.mark.parametrize(
    ("component", "num_found", "false_pairs"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 0, 0),
        ([0, 1, 2, 3, 0, 1, 2, 3], 4, 0),
        ([0, 1, 1, 3, 0, 1, 1, 3], 4, 0),  # B and C are near-duplicates
        ([0, 0, 0, 0, 0, 0, 0, 0], 4, 2),  # A, B or C, D: two pairs join them
        ([0, 1, 2, 3, 1, 0, 2, 3], 2, 2),  # each of a and b with the other's original
        ([0, 1, 2, 3, 4, 4, 4, 4], 0, 2),  # copies of three different pictures
    ],
)
def test_score_of_components(component: list[int], num_found: int, false_pairs: int) -> None:
    score = copy_scores.score(truth(), np.array(component))
    assert (score.num_found, score.false_pairs) == (num_found, false_pairs)
    assert score.recall["all"] == num_found / 4
    assert score.recall["jpeg"] == sum(component[row] == component[row - 4] for row in (4, 5)) / 2
    assert np.isnan(score.recall["flip"])


@pytest.mark.parametrize("seed", range(5))
def test_a_sweep_agrees_with_the_score_at_each_threshold(seed: int) -> None:
    """With equal similarities, and pairs that the detector does not list."""
    known = truth()
    similarity = np.random.default_rng(seed).integers(-4, 6, (8, 8)).astype(np.float32)
    similarity = np.maximum(similarity, similarity.T)
    similarity[similarity < 0] = -np.inf
    tree = copy_scores.spanning_tree(similarity)
    points = copy_scores.sweep(known, tree)
    assert [point.threshold for point in points] == sorted({point.threshold for point in points}, reverse=True)
    for point in points:
        joined = np.argwhere(similarity >= point.threshold)
        component = np.arange(8)
        for _ in range(8):  # by brute force: labels spread along the pairs
            for one, other in joined:
                component[[one, other]] = component[[one, other]].min()
        score = copy_scores.score(known, component)
        assert (point.num_found, point.false_pairs) == (score.num_found, score.false_pairs)
        again = copy_scores.score(known, copy_scores.components_at(tree, 8, point.threshold))
        assert (again.num_found, again.false_pairs) == (score.num_found, score.false_pairs)


def test_peers_are_compared_at_equal_false_pairs_and_at_equal_recall() -> None:
    points = [copy_scores.Point(0.9, 2, 0), copy_scores.Point(0.7, 3, 1), copy_scores.Point(0.5, 4, 6)]
    assert copy_scores.at_false_pairs(points, 5) == points[1]
    assert copy_scores.at_false_pairs(points[1:], 0) is None
    assert copy_scores.at_recall(points, 3) == points[1]
    assert copy_scores.at_recall(points, 5) is None


def test_a_run_is_scored_beside_its_peers(draw: Path, tmp_path: Path) -> None:
    """A whole run with the default settings, hence the seconds that it takes."""
    known = copy_scores.read_truth(draw)
    run = str(tmp_path / "run")
    parts = {part: str(draw / part) for part in ("seeds", "pool", "holdout")}
    curate(parts["seeds"], parts["pool"], holdout=parts["holdout"], output=run, runner="inline")
    score = copy_scores.score_run(known, run)
    assert score.recall["jpeg"] == score.recall["noise"] == 1
    assert 0.5 < score.recall["all"] <= 1
    assert (score.num_holdout_copies, score.not_ingested) == (15, 0)
    table = read_images_table(f"{run}/images", ["image_id", "kept", "corpus_key"]).to_pylist()
    copies_of_holdout = {known.image_ids[row] for row in known.copies if known.roles[row] == "holdout"}
    images = [row for row in table if row["image_id"] in copies_of_holdout]
    assert score.holdout_copies_kept == sum(row["kept"] for row in images) < 15
    assert score.holdout_copies_packed == sum(row["corpus_key"] is not None for row in images)
    assert score.num_packed == sum(row["corpus_key"] is not None for row in table) > 0
    detectors = {detector.name: detector for detector in copy_peers.detectors(known, run)}
    assert {
        "pHash",
        "dHash",
        "wavelet hash",
        "average hash",
        "crop-resistant hash",
        "cosine of describe",
    } <= set(detectors)
    copied = {
        row["path"]: row for row in pq.read_table(draw / copy_pictures.TABLE).to_pylist() if row["kind"] == "jpeg"
    }
    for detector in detectors.values():
        assert np.array_equal(detector.similarity, detector.similarity.T)
        found = copy_scores.score(
            known,
            copy_scores.components_at(
                copy_scores.spanning_tree(detector.similarity), len(known.paths), detector.usual[-1]
            ),
        )
        assert found.recall["jpeg"] >= 0.5 * bool(copied)
    first, of_run = copies.score_tables(draw, run, peers=False, sheet=tmp_path / "sheet")
    assert first.row_count == 1
    assert of_run.row_count == 6
    pairs = copy_sheet.choose(known, run)
    assert pairs
    assert all(known.original[one] != other and known.original[other] != one for one, other, _ in pairs)
    pages = sorted(path.name for path in (tmp_path / "sheet").iterdir())
    assert pages == [f"pairs-{page:02d}.png" for page in range(-(-len(pairs) // copy_sheet.PAIRS_PER_PAGE))]


def test_a_folder_without_a_table_is_no_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no draw: it has no copies\.parquet"):
        copy_scores.read_truth(tmp_path)


def test_a_held_back_draw_is_measured_only_by_name() -> None:
    assert bench.choose_draws(None) == bench.choose_draws([]) == ["development"]
    assert bench.choose_draws(["held-back"]) == ["held-back"]
    assert bench.choose_draws(["second-held-back"]) == ["second-held-back"]
    assert bench.choose_draws(["held-back", "development"]) == ["development", "held-back"]
    with pytest.raises(InputError, match="--draw other: there is no such draw"):
        bench.choose_draws(["other"])
