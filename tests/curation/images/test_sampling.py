"""A sample of the pool: by name alone, the same for any cut and order, nested, and of the stated share."""

import itertools
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import ingest
from curation.engine.runner import InlineRunner
from curation.errors import InputError
from curation.images import sources
from curation.images.sampling import is_chosen
from curation.images.sources import NOT_SAMPLED, Layout, SourceConfig
from curation.ingest import IngestConfig
from curation.run_folder import read_images
from tests.curation.builders import encoded_image
from tests.curation.images.tars import member, tar_of

NAMES = [f"{number:03d}.png" for number in range(120)]
PICTURES = {name: encoded_image(number) for number, name in enumerate(NAMES)}


def test_the_share_lies_within_binomial_bounds_and_smaller_shares_are_parts_of_larger_ones() -> None:
    places = [(f"{number // 100}.tar", f"{number}.jpg") for number in range(20_000)]
    shares = (0.01, 0.1, 0.5, 1.0)
    chosen = [{place for place in places if is_chosen(share, "web", *place)} for share in shares]
    for share, part in zip(shares, chosen, strict=True):
        deviation = math.sqrt(len(places) * share * (1 - share))
        assert abs(len(part) - share * len(places)) <= 4 * deviation
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(chosen))


def test_source_path_and_part_decide_together() -> None:
    def chosen(source: str, path: str) -> list[bool]:
        return [is_chosen(0.5, source, path, part) for part in range(64)]

    assert len({tuple(chosen(*place)) for place in (("a", "x"), ("b", "x"), ("a", "y"), ("ax", ""))}) == 4
    assert is_chosen(0.5, "a", "\udcff.png") in (True, False), "a name that is no UTF-8"


def write_pool(folder: Path, layout: Layout, names: list[str], rows_per_group: int = 8) -> None:
    """Two files of the pictures, or a folder of all of them."""
    folder.mkdir(parents=True)
    for number in range(2):
        part = names[number * 60 : (number + 1) * 60]
        match layout:
            case "folder":
                for name in part:
                    (folder / name).write_bytes(PICTURES[name])
            case "webdataset":
                (folder / f"{number}.tar").write_bytes(tar_of(member(name, PICTURES[name]) for name in part))
            case "parquet":
                column = pa.array([{"bytes": PICTURES[name]} for name in part])
                pq.write_table(pa.table({"image": column}), folder / f"{number}.parquet", row_group_size=rows_per_group)


def config_of(root: Path, layout: Layout, share: float, *, images_per_shard: int = 1000) -> IngestConfig:
    pool = {"name": "web", "role": "pool", "layout": layout, "path": str(root / "pool")}
    seeds = {"name": "trusted", "role": "seed", "path": str(root / "seeds")}
    values = {"sources": (pool, seeds), "sample_pool": share, "images_per_shard": images_per_shard}
    return IngestConfig.model_validate(values)


def ids_of(output: Path, source: str) -> list[str]:
    table = read_images(str(output), ["image_id", "source"])
    return [row["image_id"] for row in table.to_pylist() if row["source"] == source]


@pytest.mark.parametrize("layout", ["folder", "webdataset", "parquet"])
def test_ingest_of_a_sample(tmp_path: Path, layout: Layout) -> None:
    """Nested, the same for any cut into shards, with whole seeds; the images left out are counted, not rejected."""
    write_pool(tmp_path / "pool", layout, NAMES)
    write_pool(tmp_path / "seeds", "folder", NAMES[:3])
    ids = {}
    for share, name in ((0.2, "small"), (0.2, "again"), (0.6, "large"), (1.0, "whole")):
        if name == "again" and layout != "folder":
            continue  # a tar or Parquet file is one shard
        size = 7 if name == "again" else 1000
        config = config_of(tmp_path, layout, share, images_per_shard=size)
        manifest = ingest.run(config, str(tmp_path / name), InlineRunner())
        ids[name] = ids_of(tmp_path / name, "web")
        assert len(ids_of(tmp_path / name, "trusted")) == 3
        assert manifest.rejects == {}
        assert manifest.totals["images"] == 3 + len(ids[name])
        assert manifest.facts.get("not_sampled", {"web": 0}) == {"web": 120 - len(ids[name])}
        assert (NOT_SAMPLED in manifest.totals) == (share < 1 and layout != "folder")
    assert 10 < len(ids["small"]) < 40 < len(ids["large"]) < len(ids["whole"]) == 120
    assert set(ids["small"]) < set(ids["large"]) < set(ids["whole"])
    assert ids.get("again", ids["small"]) == ids["small"]


def test_a_tar_is_sampled_alike_in_any_order_of_its_members(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    ids = []
    for folder, names in (("a", NAMES), ("b", shuffled)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(tar_of(member(name, PICTURES[name]) for name in names))
        config = SourceConfig(name="web", path=str(tmp_path / folder), role="pool", layout="webdataset")
        items = list(sources.read_source(config, ("0.tar",), max_bytes=10**6, share=0.3))
        ids.append({item.data for item in items})
    assert ids[0] == ids[1] and 20 < len(ids[0]) < 60


def test_what_the_sample_leaves_out_is_neither_read_nor_rejected(tmp_path: Path) -> None:
    """A damaged picture outside of the sample costs nothing; one inside it is a reject."""
    (tmp_path / "pool").mkdir()
    write_pool(tmp_path / "seeds", "folder", NAMES[:3])
    for name in NAMES:
        inside = is_chosen(0.3, "web", name)
        (tmp_path / "pool" / name).write_bytes(PICTURES[name] if inside else b"broken")
        if not inside:
            (tmp_path / "pool" / name).chmod(0)
    config = config_of(tmp_path, "folder", 0.3)
    manifest = ingest.run(config, str(tmp_path / "out"), InlineRunner())
    num_chosen = sum(is_chosen(0.3, "web", name) for name in NAMES)
    assert manifest.rejects == {}
    assert manifest.totals["images"] == 3 + num_chosen
    assert manifest.facts["sample_pool"] == 0.3
    assert manifest.facts["not_sampled"] == {"web": 120 - num_chosen}


def test_row_groups_without_a_chosen_row_are_not_read(tmp_path: Path) -> None:
    """Damage in the pages of a group that the sample leaves out is not found."""
    write_pool(tmp_path / "pool", "parquet", NAMES, rows_per_group=1)
    path = tmp_path / "pool/0.parquet"
    left_out = next(row for row in range(60) if not is_chosen(0.3, "web", "0.parquet", row))
    chunk = pq.ParquetFile(path).metadata.row_group(left_out).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 16] = b"\xff" * 16
    path.write_bytes(data)
    config = SourceConfig(name="web", path=str(tmp_path / "pool"), role="pool", layout="parquet")
    num_problems = [
        sum(item.problem is not None for item in sources.read_source(config, ("0.parquet",), max_bytes=10**6, share=s))
        for s in (0.3, 1.0)
    ]
    assert num_problems == [0, 1]


def test_an_empty_sample_names_the_setting(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", "folder", NAMES)
    write_pool(tmp_path / "seeds", "folder", NAMES[:3])
    with pytest.raises(InputError, match=r"leaves out 120 images of it. Raise ingest.sample_pool \(--sample\)"):
        ingest.run(config_of(tmp_path, "folder", 1e-9), str(tmp_path / "out"), InlineRunner())
