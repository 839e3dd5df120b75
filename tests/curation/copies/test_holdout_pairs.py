"""No kept image is as near to the holdout as the threshold, also where full lists of neighbours hide the holdout."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import dedup, pairs
from curation.copies import holdout_pairs
from curation.dedup import DedupConfig
from curation.engine.manifest import read_manifest, require_manifest
from curation.engine.ray_runner import RayRunner
from curation.engine.runner import InlineRunner, Runner
from curation.errors import ConfigError, InputError
from curation.files import parquet, paths, schemas, vectors
from curation.pairs import PairsConfig
from curation.run_folder import RunFolder
from curation.search import exact
from tests.curation.builders import (
    Killed,
    KilledRunner,
    bytes_in,
    content_hash,
    id_of,
    image_row,
    unit_vectors,
    write_ingest,
    write_stage,
    write_vectors,
)
from tests.pipelines.test_curate import drawing

WIDTH = 12
EXACT: dict[str, Any] = {}
IVF: dict[str, Any] = {"backend": "ivf", "rows_per_cell": 8, "num_probes": 1, "min_recall": 0}
SEARCHES = pytest.mark.parametrize("search", [EXACT, IVF], ids=["exact", "ivf"])
# A row of ingest: the number of an image, and its role. An image may have several rows.
Row = tuple[int, str]


class SmallImages:
    """A finished ingest and describe. Image n has row n of `matrix`; the hashes of different images are far apart."""

    def __init__(
        self,
        folder: Path,
        matrix: np.ndarray,
        rows: list[Row],
        *,
        pictures: list[bytes] | None = None,
        rows_per_shard: int = 40,
    ) -> None:
        self.folder, self.rows = folder, rows
        self.matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
        hashes = np.random.default_rng(0).integers(0, 2**63, len(matrix)).tolist()
        shards = [rows[start : start + rows_per_shard] for start in range(0, len(rows), rows_per_shard)]
        tables = [[image_row(id_of(n), role, role, phash=hashes[n]) for n, role in shard] for shard in shards]
        self.images = write_ingest(folder / "ingest", tables)
        if pictures is None:
            described = [{id_of(n): self.matrix[n] for n, _ in shard} for shard in shards]
            self.descriptors = write_vectors(folder / "describe", self.images, described)
        else:
            files = []
            for shard in shards:
                ids, numbers = [id_of(n) for n, _ in shard], [n for n, _ in shard]
                small = pa.table([ids, [pictures[n] for n in numbers]], schema=schemas.THUMBNAILS)
                files.append({"vectors": vectors.make_table(ids, self.matrix[numbers]), "thumbnails": small})
            inputs = {"images": content_hash(self.images)}
            self.descriptors = write_stage(folder / "describe", files, inputs=inputs)

    def find_pairs(self, name: str = "pairs", *, runner: Runner | None = None, **config: Any) -> str:
        output = str(self.folder / name)
        run = RunFolder(ingest=self.images, describe=self.descriptors)
        pairs.run(PairsConfig(**config), run, output, runner or InlineRunner())
        return output

    def decide(self, found: str, **config: Any) -> dict[int, dict[str, Any]]:
        """The decision on each image that is no holdout image, by its number."""
        output = f"{found}-dedup"
        dedup.run(DedupConfig(lookalikes="drop", **config), RunFolder(ingest=self.images, pairs=found), output)
        decided: dict[int, dict[str, Any]] = {}
        for name in require_manifest(output).files("duplicates"):
            for row in parquet.read_table(paths.join(output, name), schemas.DUPLICATES).to_pylist():
                if row["reason"] != "exact":  # a further row of the image
                    decided[int(row["image_id"], 16)] = row
        return {number: row for number, row in decided.items() if number not in self.holdout}

    @property
    def holdout(self) -> list[int]:
        return sorted({number for number, role in self.rows if role == "holdout"})


def rows_of(found: str) -> list[dict[str, Any]]:
    names = require_manifest(found).files("pairs")
    tables = [parquet.read_table(paths.join(found, name), schemas.PAIRS) for name in names]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def random_images(folder: Path, kind: str, seed: int) -> SmallImages:
    """160 images of all roles, a few with several rows. `tied` has 14 descriptors only, `clustered` 9 groups."""
    rng = np.random.default_rng(seed)
    match kind:
        case "tied":
            matrix = np.where(rng.random((14, WIDTH)) < 0.5, -1.0, 1.0)[rng.integers(0, 14, 160)]
        case _:
            matrix = unit_vectors(seed, 9, WIDTH)[rng.integers(0, 9, 160)] + rng.normal(0, 0.1, (160, WIDTH))
    roles = rng.choice(["pool", "seed", "holdout"], 160, p=[0.7, 0.15, 0.15]).tolist()
    rows = [(number, roles[number]) for number in rng.permutation(160).tolist()]
    rows += [(number, str(rng.choice(["pool", "holdout"], p=[0.9, 0.1]))) for number in range(20)]
    return SmallImages(folder, matrix, rows)


@SEARCHES
def test_equal_images_that_fill_the_lists_do_not_hide_the_holdout(tmp_path: Path, search: dict[str, Any]) -> None:
    """70 pool images and a holdout image of the largest id have one descriptor: each list holds 64 of the first.

    As float16, a vector of 15 equal values is longer than 1.
    """
    images = SmallImages(tmp_path, np.ones((71, 15)), [*((n, "pool") for n in range(70)), (70, "holdout")])
    found = images.find_pairs(search=search)
    decided = images.decide(found)
    assert [n for n, row in decided.items() if row["kept"]] == []
    assert {row["matched_image_id"] for row in decided.values()} == {id_of(70)}
    assert {row["similarity"] for row in decided.values()} == {1.0} == {row["cosine"] for row in rows_of(found)}
    assert require_manifest(found).facts["full_lists"] == 71


@SEARCHES
@pytest.mark.parametrize("kind", ["tied", "clustered"])
@pytest.mark.parametrize("seed", range(2))
def test_no_kept_image_reaches_the_threshold(tmp_path: Path, kind: str, seed: int, search: dict[str, Any]) -> None:
    """Each image has the match of brute force: the nearest holdout image, of equally near ones that of the first id."""
    images = random_images(tmp_path, kind, seed)
    found = images.find_pairs(search=search, num_neighbors=3, max_phash_distance=-1)
    decided = images.decide(found, threshold=0.99, holdout_threshold=0.95)
    holdout = np.array(images.holdout)
    num_matched = 0
    for number, row in decided.items():
        one = np.full(len(holdout), number)
        cosine = exact.pair_similarity(images.matrix, one, images.matrix, holdout)
        if cosine.max() >= np.float32(0.95):
            assert not row["kept"] and row["reason"] == "holdout"
            assert row["matched_image_id"] == id_of(int(holdout[cosine.argmax()]))
            assert row["similarity"] == cosine.max()
            num_matched += 1
        else:
            assert row["reason"] != "holdout"
    assert 0 < num_matched < len(decided)
    keys = [(row["image_id"], row["other_image_id"]) for row in rows_of(found)]
    assert keys == sorted(set(keys)) and all(low < high for low, high in keys), "each pair once, by ids"


def test_lists_with_room_lack_no_pair(tmp_path: Path) -> None:
    """With room for all neighbours there is nothing to add; with less room, the added pairs are not mutual."""
    images = random_images(tmp_path, "clustered", 0)
    everything = {
        (row["image_id"], row["other_image_id"]): row for row in rows_of(images.find_pairs("all", num_neighbors=159))
    }
    assert not (facts := require_manifest(str(tmp_path / "all")).facts)["full_lists"], facts
    short = rows_of(images.find_pairs("short", num_neighbors=3))
    assert len(short) < len(everything)
    for row in short:
        assert row | {"mutual": True} == everything[row["image_id"], row["other_image_id"]]


@SEARCHES
def test_holdout_copies_in_several_rows_and_roles(tmp_path: Path, search: dict[str, Any]) -> None:
    """The bytes of a holdout image are dropped for it in the pool, also when several holdout rows have them."""
    matrix = np.concatenate([np.ones((4, WIDTH)), -np.ones((1, WIDTH))])
    rows = [
        (0, "holdout"),
        (1, "pool"),
        (0, "pool"),
        (0, "holdout"),
        (2, "seed"),
        (2, "pool"),
        (3, "holdout"),
        (4, "pool"),
    ]
    images = SmallImages(tmp_path, matrix, rows)
    found = images.find_pairs(search=search, num_neighbors=1)
    decided = images.decide(found)
    assert {n: row["reason"] for n, row in decided.items()} == {1: "holdout", 2: "holdout", 4: None}
    output = f"{found}-dedup"
    (name,) = require_manifest(output).files("duplicates")
    reasons = parquet.read_table(paths.join(output, name), schemas.DUPLICATES)["reason"].to_pylist()
    assert reasons == ["holdout", "holdout", "holdout", "holdout", "holdout", "exact", "holdout", None]
    totals = require_manifest(output).totals
    assert totals["holdout_rows"] == 3 and totals["holdout"] == 3 and totals["exact"] == 1 and totals["kept"] == 1


@SEARCHES
@pytest.mark.parametrize("roles", ["", "hh", "hhhhh", "p", "ph", "hp"])
def test_few_images_of_any_role(tmp_path: Path, roles: str, search: dict[str, Any]) -> None:
    rows = [(number, "holdout" if role == "h" else "pool") for number, role in enumerate(roles)]
    images = SmallImages(tmp_path, np.ones((max(1, len(roles)), WIDTH)), rows or [(0, "holdout")])
    found = images.find_pairs(search=search, num_neighbors=1)
    assert [row["kept"] for row in images.decide(found).values()] == ["h" not in roles] * roles.count("p")


def test_holdout_image_without_a_descriptor_is_named(tmp_path: Path) -> None:
    images = SmallImages(tmp_path, np.ones((5, WIDTH)), [*((n, "pool") for n in range(4)), (4, "holdout")])
    described = write_vectors(tmp_path / "partial", images.images, [{id_of(n): images.matrix[n] for n in range(4)}])
    images.descriptors = described
    with pytest.raises(InputError, match=f"The holdout image {id_of(4)} has no descriptor"):
        images.find_pairs(num_neighbors=1, max_phash_distance=-1)


# Verified pairs


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    drawing("scribbles", number).resize((128, 128), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@SEARCHES
def test_verified_pairs_are_compared_until_one_matches(tmp_path: Path, search: dict[str, Any]) -> None:
    """All descriptors are equal: a pool image finds its copy behind eight other holdout images, in the third round."""
    shown = [*range(6), *range(100, 108), 5, 200, 201]  # image 14, of the holdout, shows what image 5 shows
    rows: list[Row] = [(n, "pool") for n in range(6)] + [(n, "holdout") for n in range(6, len(shown))]
    images = SmallImages(tmp_path, np.ones((len(shown), WIDTH)), rows, pictures=[picture(number) for number in shown])
    found = images.find_pairs(search=search, num_neighbors=2, verification={}, images_per_shard=7)
    decided = images.decide(found)
    assert {n: row["matched_image_id"] for n, row in decided.items() if row["reason"] == "holdout"} == {5: id_of(14)}
    assert decided[5]["similarity"] >= holdout_pairs.SURE_MATCH


def test_holdout_threshold_above_a_sure_match_is_refused(tmp_path: Path) -> None:
    images = SmallImages(
        tmp_path, np.ones((2, WIDTH)), [(0, "pool"), (1, "holdout")], pictures=[picture(0), picture(1)]
    )
    found = images.find_pairs(verification={})
    with pytest.raises(ConfigError, match=r"holdout_threshold is 0\.95.*Lower the threshold to 0\.9"):
        images.decide(found, threshold=0.97, holdout_threshold=0.95)


# Stop and resume, and other runners


@pytest.mark.parametrize("verified", [False, True])
@SEARCHES
def test_every_kill_resumes_to_the_same_bytes(tmp_path: Path, search: dict[str, Any], verified: bool) -> None:
    count = 12 if verified else 90
    matrix = np.ones((count, WIDTH)) + np.random.default_rng(0).normal(0, 0.1, (count, WIDTH))
    rows: list[Row] = [(n, "holdout" if n % 4 == 0 else "pool") for n in range(count)]
    pictures = [picture(n) for n in range(count)] if verified else None
    images = SmallImages(tmp_path, matrix, rows, pictures=pictures, rows_per_shard=count // 3)
    config: dict[str, Any] = {"search": search, "num_neighbors": 1, "images_per_shard": count // 3}
    config |= {"verification": {}} if verified else {}
    counter = KilledRunner(10**6)
    straight = bytes_in(images.find_pairs("straight", runner=counter, **config))
    num_calls = 10**6 - counter.calls_left
    for after_work in (False, True):
        num_kills, name = 0, f"killed-{after_work}"
        while read_manifest(str(tmp_path / name)) is None:
            try:
                images.find_pairs(name, runner=KilledRunner(1, after_work=after_work), **config)
            except Killed:
                num_kills += 1
        assert num_kills >= num_calls // 2 - 1 and bytes_in(str(tmp_path / name)) == straight


def test_ray_gives_the_same_bytes(tmp_path: Path, ray_runner: RayRunner) -> None:
    images = random_images(tmp_path, "tied", 5)
    config: dict[str, Any] = {"search": IVF, "num_neighbors": 3, "images_per_shard": 30}
    inline = images.find_pairs("inline", **config)
    ray = images.find_pairs("ray", runner=ray_runner, **config)
    assert bytes_in(ray) == bytes_in(inline)
