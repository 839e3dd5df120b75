"""The published counts of LVD-142M (DINOv2, table 15) against the recipe and the arithmetic of selection."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.config import load
from curation.quotas import max_chosen_clusters
from curation.retrieval_modes import DatasetRows
from pipelines.main_path import CurateConfig
from pipelines.planning.plan import contradictions, dataset_rows

CONFIG = load(CurateConfig, str(Path(__file__).parents[3] / "pipelines/configs/lvd142m.toml"))
# Dataset, images, retrieval, retrieved, final: as the paper prints them.
TABLE_15 = """
imagenet22k            14,197,086  as is    -           14,197,086
imagenet22k            14,197,086  sample   56,788,344  56,788,344
imagenet1k_train        1,281,167  sample   40,997,344  40,997,344
caltech101_train            3,030  cluster   2,630,000   1,000,000
cub200_train                5,994  cluster   1,300,000   1,000,000
dtd_train1                  1,880  cluster   1,580,000   1,000,000
fgvc_aircraft_train         3,334  cluster   1,170,000   1,000,000
flowers102_train            1,020  cluster   1,060,000   1,000,000
food101_train              75,750  cluster  21,670,000   1,000,000
oxford_pet_trainval         3,680  cluster   2,750,000   1,000,000
stanford_cars_train         8,144  cluster   7,220,000   1,000,000
sun397_train1              19,850  cluster  18,950,000   1,000,000
voc2007_train               2,501  cluster   1,010,000   1,000,000
ade20k_train               20,210  cluster  20,720,000   1,000,000
cityscapes_train            2,975  cluster   1,390,000   1,000,000
voc2012_trainaug            1,464  cluster  10,140,000   1,000,000
mapillary_sls_train     1,434,262  as is    -            1,434,262
kitti_train_eigen          23,158  cluster   3,700,000   1,000,000
nyu_depth_v2_train         24,231  cluster  10,850,000   1,000,000
sunrgbd_train               4,829  cluster   4,870,000   1,000,000
gldv2_train_clean       1,580,470  as is    -            1,580,470
gldv2_train_clean       1,580,470  sample    6,321,880   6,321,880
amstertime_new              1,231  cluster     960,000     960,000
amstertime_old              1,231  cluster     830,000     830,000
met_train                 397,121  cluster  62,860,000   1,000,000
revisited_oxford_base       4,993  cluster   3,680,000   1,000,000
revisited_paris_base        6,322  cluster   3,660,000   1,000,000
"""


def published_rows() -> Iterator[tuple[str, int, str, int | None, int]]:
    for line in TABLE_15.strip().splitlines():
        name, images, *retrieval, retrieved, final = line.split()
        num_retrieved = None if retrieved == "-" else int(retrieved.replace(",", ""))
        yield name, int(images.replace(",", "")), " ".join(retrieval), num_retrieved, int(final.replace(",", ""))


def rows_of(name: str, config: CurateConfig = CONFIG) -> DatasetRows:
    (dataset,) = [dataset for dataset in config.retrieve.datasets if dataset.name == name]
    rows = dataset_rows(config, dataset)
    assert rows is not None
    return rows


@pytest.mark.parametrize("row", list(published_rows()), ids=lambda row: f"{row[0]}-{row[2]}")
def test_recipe_gives_each_published_row(row: tuple[str, int, str, int | None, int]) -> None:
    name, images, retrieval, retrieved, final = row
    assert CONFIG.stated_counts[name] == images
    (dataset,) = [dataset for dataset in CONFIG.retrieve.datasets if dataset.name == name]
    rows = rows_of(name)
    if retrieval == "as is":
        assert rows.as_is == final
    else:
        assert (dataset.retrieval, rows.before_cap, rows.retrieved) == (retrieval, retrieved, final)


def test_total_is_142_109_386() -> None:
    assert sum(final for *_, final in published_rows()) == 142_109_386, "the table is not copied right"
    assert {dataset.name for dataset in CONFIG.retrieve.datasets} == {name for name, *_ in published_rows()}
    assert sum(rows_of(dataset.name).rows for dataset in CONFIG.retrieve.datasets) == 142_109_386


def test_by_size_gives_the_modes_of_the_recipe() -> None:
    """The paper retrieves by sample for datasets of more than a million images, except for those only taken as is."""
    by_size = [d.model_copy(update={"retrieval": "by_size"}) for d in CONFIG.retrieve.datasets if d.retrieval != "none"]
    retrieve = CONFIG.retrieve.model_copy(update={"datasets": tuple(by_size)})
    config = CONFIG.model_copy(update={"retrieve": retrieve})
    assert all(rows_of(dataset.name, config) == rows_of(dataset.name) for dataset in by_size)


def test_every_cluster_row_but_one_has_enough_seeds() -> None:
    cluster_rows = {
        name: (images, retrieved)
        for name, images, retrieval, retrieved, _ in published_rows()
        if retrieval == "cluster"
    }
    assert len(cluster_rows) == 21 and cluster_rows.keys() == CONFIG.stated_clusters.keys()
    impossible = []
    for name, (images, retrieved) in cluster_rows.items():
        assert retrieved == CONFIG.stated_clusters[name] * CONFIG.retrieve.images_per_cluster
        if CONFIG.stated_clusters[name] > max_chosen_clusters(images, CONFIG.retrieve.more_than_seeds):
            impossible.append(name)
    assert impossible == ["voc2012_trainaug"]
    (contradiction,) = contradictions(CONFIG)
    assert contradiction.startswith(
        "voc2012_trainaug: 1,014 clusters with more than 3 seeds each need 4,056 seeds, but 1,464"
    )


def test_seeds_bound_the_rows_without_stated_clusters() -> None:
    config = CONFIG.model_copy(update={"stated_clusters": {}})
    assert rows_of("flowers102_train", config).before_cap == 255 * 10_000
    assert rows_of("met_train", config).before_cap == 99_280 * 10_000
    assert contradictions(config) == []
