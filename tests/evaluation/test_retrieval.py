"""Tests of retrieval: scores against scikit-learn and hand-computed values, and readers of the published layouts."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from curation.config import parse
from curation.errors import ConfigError, InputError
from curation.files import npy
from evaluation import retrieval
from evaluation.data.retrieval_data import (
    AmsterTimeData,
    MetData,
    Photo,
    RevisitedData,
    read_amstertime,
    read_met,
    read_revisited,
)
from evaluation.data.views import ViewConfig
from evaluation.features import FrozenModelConfig, load_model
from evaluation.results import Result
from evaluation.retrieval import (
    RetrievalConfig,
    average_precision,
    classify_instances,
    global_average_precision,
    labelled_score,
    load_view,
    paired_precisions,
    rank,
    revisited_rows,
    revisited_score,
)

PIXELS = FrozenModelConfig(name="pixels")
VIEW = ViewConfig(resize="squash", image_size=32)


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def ranked(queries: Tensor, database: Tensor) -> Tensor:
    return torch.cat([rankings for _, rankings in rank(queries, database)])


# ------------------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_agrees_with_scikit_learn(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    relevant = torch.rand(50, generator=random) < 0.2
    relevant[random.initial_seed() % 50] = True
    falling = np.arange(50)[::-1]
    assert average_precision(relevant) == pytest.approx(average_precision_score(relevant.numpy(), falling))


def test_average_precision_by_hand() -> None:
    assert average_precision(torch.tensor([True, False, True])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(torch.tensor([True, False, True]), 4) == pytest.approx((1 + 2 / 3) / 4)
    assert math.isnan(average_precision(torch.tensor([False, False])))


def test_junk_is_removed_from_the_ranking() -> None:
    ranking = rows(7, 1, 5, 3)  # row 7 is junk; a positive, another image and a positive follow
    score = revisited_score(ranking, rows(1, 3), rows(7, 9), cutoffs=(1, 2, 3, 10))
    assert score is not None
    # Trapezoids: from 1 to 1 at the first positive, from 1/2 to 2/3 at the second.
    assert score.average_precision == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert score.precisions == pytest.approx((1, 1 / 2, 2 / 3, 2 / 3))  # the last positive is the third image
    counted = revisited_score(ranking, rows(1, 3), rows())
    assert counted is not None  # from 0 to 1/2, then from 1/3 to 2/4
    assert counted.average_precision == pytest.approx((1 / 4 + (1 / 3 + 2 / 4) / 2) / 2)
    assert counted.precisions == pytest.approx((0, 2 / 4, 2 / 4))
    behind = revisited_score(rows(1, 5, 3, 7), rows(1, 3), rows(7))
    assert behind is not None and behind.average_precision == score.average_precision
    assert revisited_score(ranking, rows(), rows(7)) is None
    both = revisited_score(ranking, rows(1, 3), rows(7, 1))
    assert both is not None and both.average_precision == score.average_precision


@pytest.mark.parametrize("seed", range(8))
def test_the_junk_rule_on_random_rankings(seed: int) -> None:
    random = np.random.default_rng(seed)
    ranking, shuffled = random.permutation(60), random.permutation(60)
    positives, junk = shuffled[: random.integers(1, 12)], shuffled[20 : 20 + random.integers(0, 30)]
    without_junk = [row for row in ranking if row not in junk]
    precisions = [1.0]
    area, num_positives = 0.0, 0
    for position, row in enumerate(without_junk, 1):
        num_positives += row in positives
        precisions.append(num_positives / position)
        if row in positives:
            area += (precisions[-1] + precisions[-2]) / 2 / len(positives)
    score = revisited_score(*map(torch.from_numpy, (ranking, positives, junk)), cutoffs=(5,))
    assert score is not None and score.average_precision == pytest.approx(area)
    last = min(5, max(position for position, row in enumerate(without_junk, 1) if row in positives))
    assert score.precisions == pytest.approx((sum(row in positives for row in without_junk[:last]) / last,))


def test_difficulties_divide_the_ground_truth() -> None:
    truth = {"easy": rows(1), "hard": rows(2, 3), "junk": rows(4)}
    rows_of = {name: [part.tolist() for part in revisited_rows(truth, name)] for name in retrieval.DIFFICULTIES}
    assert rows_of == {"easy": [[1], [4, 2, 3]], "medium": [[1, 2, 3], [4]], "hard": [[2, 3], [4, 1]]}


def test_gap_by_hand() -> None:
    # Most confident first: right, a distractor, right, wrong. Three queries show an object.
    correct, confidence = torch.tensor([True, False, False, True]), torch.tensor([0.7, 0.1, 0.8, 0.9])
    assert global_average_precision(correct, confidence, 3) == pytest.approx((1 / 1 + 2 / 3) / 3)
    # Equally confident predictions keep their order.
    same = torch.full((4,), 0.5)
    assert global_average_precision(correct, same, 3) == pytest.approx((1 / 1 + 2 / 4) / 3)
    with pytest.raises(InputError, match="GAP needs"):
        global_average_precision(correct, confidence, 0)


def predicted_by_hand(cosines: list[float], labels: list[int], num_classes: int, scale: float) -> tuple[int, float]:
    best: dict[int, float] = {}
    for cosine, label in zip(cosines, labels, strict=True):
        best[label] = max(best.get(label, 0.0), cosine)
    total = sum(math.exp(scale * score) for score in best.values()) + num_classes - len(best)
    label = min(best, key=lambda one: (-best[one], one))
    return label, math.exp(scale * best[label]) / total


@pytest.mark.parametrize(("scale", "num_classes"), [(0.01, 9), (10.0, 200_000), (500.0, 9)])
def test_instances_are_classified_as_published(scale: float, num_classes: int) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(9, (40, 7), generator=random) * 1000
    cosines = (torch.randn(40, 7, generator=random) * 4).round() / 12  # with ties and negative values
    cosines[0] = -0.5
    predictions = classify_instances(cosines, labels, num_classes, scale=scale)
    for row in range(40):
        label, confidence = predicted_by_hand(cosines[row].tolist(), labels[row].tolist(), num_classes, scale)
        assert int(predictions.predicted[row]) == label
        assert float(predictions.confidence[row]) == pytest.approx(confidence, rel=1e-9)


def test_rankings_are_exact_and_ties_are_ordered_by_row() -> None:
    random = torch.Generator().manual_seed(0)
    database = torch.randn(90, 8, generator=random).repeat(3, 1)[torch.randperm(270, generator=random)]
    queries = torch.randn(150, 8, generator=random)
    rankings = ranked(queries * 3, database * torch.rand(270, 1, generator=random).add(1).round())
    cosines = (
        torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(database.double()).T
    ).float()
    for row_cosines, ranking in zip(cosines.tolist(), rankings.tolist(), strict=True):
        assert ranking == sorted(range(270), key=lambda row: (-row_cosines[row], row))
    alone = torch.cat([ranked(query[None] * 3, database) for query in queries[:70]])
    assert torch.equal(alone, ranked(queries, database)[:70])


def test_a_labelled_set_agrees_with_scikit_learn() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.randint(6, (99,), generator=random), torch.tensor([6])])  # the class 6 has one image
    features = torch.nn.functional.one_hot(labels, 9).float() + torch.randn(100, 9, generator=random)
    score = labelled_score(features, labels, cutoffs=(1, 4))
    cosines = torch.nn.functional.normalize(features.double()) @ torch.nn.functional.normalize(features.double()).T
    precisions, hits = [], {1: 0, 4: 0}
    for row in range(99):
        others = torch.arange(100) != row
        relevant = (labels == labels[row])[others]
        precisions.append(average_precision_score(relevant.numpy(), cosines[row][others].numpy()))
        order = cosines[row][others].argsort(descending=True)
        for k in hits:
            hits[k] += bool(relevant[order[:k]].any())
    assert score.mean_average_precision == pytest.approx(np.mean(precisions))
    assert score.recalls == pytest.approx({k: count / 99 for k, count in hits.items()})
    assert score.num_queries == 99
    assert 0.2 < score.mean_average_precision < 0.9
    with pytest.raises(InputError, match="all different"):
        labelled_score(features[:3], rows(0, 1, 2))
    with pytest.raises(InputError, match="a label for each"):
        labelled_score(features, labels[:5])


def test_a_pair_scores_one_over_its_rank() -> None:
    database = torch.eye(3)
    queries = torch.tensor([[1.0, 0.5, 0.0], [0.9, 0.5, 0.0], [0.5, 0.4, 0.1]])
    assert paired_precisions(queries, database) == pytest.approx([1, 1 / 2, 1 / 3])


def test_bad_features_are_reported() -> None:
    good = torch.ones(3, 2)
    for queries, database, message in (
        (good, torch.ones(3, 4), "Expected features"),
        (torch.tensor([[1.0, math.nan]]), good, "query features hold .* row 0"),
        (good, torch.tensor([[1.0, 1.0], [1.0, math.inf]]), "database features hold .* row 1"),
    ):
        with pytest.raises(InputError, match=message):
            list(rank(queries, database))


# ----------------------------------------------------------------------------------------------------------- layouts


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def revisited(root: Path, **change: Any) -> Path:
    """Writes six images of three buildings as published, and queries that show one in a corner of another image."""
    for number in range(6):
        write(root / "jpg" / f"all_souls_00000{number}.jpg", picture(number % 3, (40, 30 + number)))
    truths = []
    for number in range(3):
        surroundings = picture(100 - number, (120, 96))
        surroundings.paste(picture(number), (70, 50))
        write(root / "jpg" / f"query_00000{number}.jpg", surroundings)
        truths.append(
            {
                "bbx": np.array([70.2, 50.4, 109.8, 81.6]),
                "easy": np.array([number]),
                "hard": [number + 3],
                "junk": np.empty(0, np.int64),
            }
        )
    truths[2] |= {"hard": [], "junk": np.array([5])}
    content = {
        "imlist": [f"all_souls_00000{number}" for number in range(6)],
        "qimlist": [f"query_00000{number}" for number in range(3)],
        "gnd": truths,
    }
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content | change, 2))
    return root


def values(results: list[Result]) -> dict[tuple[str, str], float]:
    return {(result.protocol.partition(",")[0], result.metric): result.value for result in results}


def test_revisited_oxford_is_read_and_scored(tmp_path: Path) -> None:
    root = revisited(tmp_path / "roxford5k")
    data = RevisitedData(layout="revisited", path=str(root), view=VIEW)
    published = read_revisited(data)
    assert published.queries[1] == Photo(str(root / "jpg" / "query_000001.jpg"), (70, 50, 110, 82))
    assert published.database[5] == Photo(str(root / "jpg" / "all_souls_000005.jpg"))
    assert [{name: part.tolist() for name, part in truth.items()} for truth in published.rows][1:] == [
        {"easy": [1], "hard": [4], "junk": []},
        {"easy": [2], "hard": [], "junk": [5]},
    ]
    model = load_model(PIXELS)
    results = retrieval.run(RetrievalConfig(name="oxford", data=data), model, str(tmp_path / "out"))
    scores = values(results)
    assert len(results) == len(scores) == 12
    assert set(scores.values()) == {1.0}  # of the last query because its junk does not count
    assert results[0].settings["queries"] == {"easy": 3, "medium": 3, "hard": 2}
    assert results[0].protocol == "easy, queries cropped, squash 32 px"
    whole = data.model_copy(update={"query": "whole"})
    other = retrieval.run(RetrievalConfig(name="oxford", data=whole), model, str(tmp_path / "out"))
    assert other[0].protocol == "easy, whole queries, squash 32 px" and other[0].data_hash != results[0].data_hash
    assert values(other)["easy", "mAP"] < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gnd": []}, "0 truths"),
        ({"imlist": ["a"]}, "row .* of 1 images"),
        ({"qimlist": [1, 2, 3]}, "3 queries"),
        ({"gnd": [{"bbx": [1, 2, 3, 4], "easy": [], "hard": []}] * 3}, "KeyError: 'junk'"),
        ({"gnd": [{"bbx": [1, 2, 3], "easy": [], "hard": [], "junk": []}] * 3}, "ValueError"),
        ({"gnd": [{"bbx": [1, 2, 3, 4], "easy": [0.5], "hard": [], "junk": []}] * 3}, "rows of type float64"),
        ({"gnd": [{"bbx": [1, 2, 3, 4], "easy": "text", "hard": [], "junk": []}] * 3}, "found str"),
        ({"gnd": [{"bbx": [1, 2, 3, math.inf], "easy": [], "hard": [], "junk": []}] * 3}, "OverflowError"),
        ({"gnd": len}, "names .*len"),
    ],
)
def test_a_ground_truth_that_is_not_as_published_is_reported(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"gnd_roxford5k\.pkl: .*{message}"):
        read_revisited(RevisitedData(layout="revisited", path=str(revisited(tmp_path, **change))))


def test_missing_files_are_reported(tmp_path: Path) -> None:
    root = revisited(tmp_path)
    data = RevisitedData(layout="revisited", path=str(root), view=VIEW)
    (root / "jpg" / "all_souls_000002.jpg").unlink()
    with pytest.raises(InputError, match=r"No file at .*all_souls_000002\.jpg"):
        retrieval.run(RetrievalConfig(name="x", data=data), load_model(PIXELS), str(tmp_path / "out"))
    (root / "jpg" / "query_000000.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"query_000000\.jpg: the image cannot be used: not_an_image"):
        load_view(Photo(str(root / "jpg" / "query_000000.jpg")), VIEW, 8)
    with pytest.raises(InputError, match="lies outside the 40 x 31 pixels"):
        load_view(Photo(str(root / "jpg" / "all_souls_000001.jpg"), (50, 0, 60, 9)), VIEW, 8)
    (root / "gnd_roxford5k.pkl").unlink()
    with pytest.raises(InputError, match="expected one ground truth"):
        read_revisited(data)


def met(root: Path) -> Path:
    """Writes a database of four exhibits, two images each, with queries of the exhibits and distractors."""
    lists: dict[str, list[dict[str, Any]]] = {"MET_database": [], "testset": [], "valset": []}
    for exhibit in range(4):
        for view in range(2):
            path = f"MET/{100 * exhibit}/{view}.jpg"
            write(root / "images" / path, picture(exhibit, (40 + view, 32)))
            lists["MET_database"].append({"id": 100 * exhibit, "path": path})
        for split in ("testset", "valset"):
            path = f"test_met/{split}_{exhibit}.jpg"
            write(root / "images" / path, picture(exhibit, (44, 36)))
            lists[split].append({"path": path, "MET_id": 100 * exhibit})
    for split in ("testset", "valset"):
        path = f"test_noart/{split}.jpg"
        write(root / "images" / path, picture(55))
        lists[split].insert(0, {"path": path})
    lists["testset"][4]["MET_id"] = 0  # shows 300, so that one of four is wrong
    for name, content in lists.items():
        (root / "ground_truth").mkdir(exist_ok=True)
        (root / "ground_truth" / f"{name}.json").write_text(json.dumps(content))
    return root


def test_met_is_read_and_scored(tmp_path: Path) -> None:
    data = MetData(layout="met", path=str(met(tmp_path)), neighbors=(1, 3), view=VIEW)
    test = read_met(data, "testset.json")
    assert test.labels.tolist() == [-1, 0, 100, 200, 0]
    assert test.photos[1] == Photo(str(tmp_path / "images" / "test_met" / "testset_0.jpg"))
    assert read_met(data, "MET_database.json").labels.tolist() == [0, 0, 100, 100, 200, 200, 300, 300]
    results = retrieval.run(RetrievalConfig(name="met", data=data), load_model(PIXELS), str(tmp_path / "out"))
    scores = {result.metric: result.value for result in results}
    assert scores["accuracy"] == 3 / 4
    assert 0 < scores["GAP"] <= scores["GAP-"] <= 3 / 4
    assert results[0].settings["chosen"] == {
        "neighbors": 1,
        "scale": 0.01,
    }  # every choice is perfect on the validation set
    path = tmp_path / "ground_truth" / "testset.json"
    path.write_text('[{"MET_id": 1}]')
    with pytest.raises(InputError, match=r"testset\.json: not a list .*'path'"):
        read_met(data, "testset.json")
    path.unlink()
    with pytest.raises(InputError, match=r"No ground truth at .*testset\.json"):
        read_met(data, "testset.json")


def test_amstertime_is_read_and_scored(tmp_path: Path) -> None:
    for number in (3, 0, 1):
        write(tmp_path / "old" / f"000{number}.jpg", picture(number).convert("L"))
        write(tmp_path / "new" / f"000{number}.png", picture(number))
    data = AmsterTimeData(layout="amstertime", path=str(tmp_path), view=VIEW)
    old, new = read_amstertime(data)
    assert [Path(photo.path).name for photo in (*old, *new)] == [
        *("0000.jpg", "0001.jpg", "0003.jpg"),
        *("0000.png", "0001.png", "0003.png"),
    ]
    results = retrieval.run(RetrievalConfig(name="amstertime", data=data), load_model(PIXELS), str(tmp_path / "out"))
    scores = values(results)
    ways = [scores["archive to street", "mAP"], scores["street to archive", "mAP"]]
    assert scores["both ways", "mAP"] == pytest.approx(sum(ways) / 2) and min(ways) > 0.4
    write(tmp_path / "old" / "0007.jpg", picture(7))
    with pytest.raises(InputError, match="1 names are in only one of them: 0007"):
        read_amstertime(data)
    write(tmp_path / "old" / "0007.png", picture(7))
    with pytest.raises(InputError, match="old: 5 files have only 4 names"):
        read_amstertime(data)


def test_a_labelled_folder(tmp_path: Path) -> None:
    for label in range(3):
        for number in range(4):
            write(tmp_path / "images" / f"class {label}" / f"{number}.png", picture(label, (60 + number, 50)))
    config = parse(
        RetrievalConfig,
        {
            "name": "folder",
            "data": {
                "layout": "labelled",
                "split": {"path": str(tmp_path / "images")},
                "pictures": {"resize_size": 36, "image_size": 32},
            },
        },
        origin="test",
    )
    results = retrieval.run(config, load_model(PIXELS), str(tmp_path / "out"))
    assert {result.metric: result.value for result in results} == {
        "mAP": 1.0,
        "recall@1": 1.0,
        "recall@5": 1.0,
        "recall@10": 1.0,
    }
    assert results[0].settings["queries"] == 12


def test_features_are_cached_for_the_same_model_bytes_and_view(tmp_path: Path) -> None:
    root = revisited(tmp_path / "data")
    photos = [Photo(str(root / "jpg" / f"all_souls_00000{number}.jpg")) for number in range(6)]
    model, cache = load_model(PIXELS), str(tmp_path / "cache")
    first = retrieval._cached_features(model, photos, VIEW, cache)
    (cached,) = (tmp_path / "cache" / "retrieval").glob("*.npy")
    record = npy.write_arrays(str(cached), np.full((6, 3072), 7, np.float32))
    with pytest.raises(InputError, match=r"\.npy: not the bytes that were written\. Delete"):
        retrieval._cached_features(model, photos, VIEW, cache)
    Path(f"{cached}.json").write_text(record.model_dump_json())
    assert (retrieval._cached_features(model, photos, VIEW, cache).features == 7).all()  # the cache is read
    for change in (
        lambda: retrieval._cached_features(
            load_model(FrozenModelConfig(name="efficientnet_lite0")), photos, VIEW, cache
        ),
        lambda: retrieval._cached_features(model, photos, VIEW.model_copy(update={"resize": "center_crop"}), cache),
        lambda: retrieval._cached_features(model, [photo._replace(box=(0, 0, 9, 9)) for photo in photos], VIEW, cache),
        lambda: retrieval._cached_features(model, photos[::-1], VIEW, cache),
    ):
        assert not (change().features == 7).any()
    Image.open(photos[0].path).rotate(180).save(photos[0].path)
    assert retrieval._cached_features(model, photos, VIEW, cache).hash != first.hash


@pytest.mark.parametrize("resize", ["keep_aspect", "squash", "center_crop"])
def test_the_batch_changes_nothing(tmp_path: Path, resize: Any) -> None:
    root = revisited(tmp_path)
    photos = [Photo(str(path)) for path in sorted((root / "jpg").iterdir())]
    view = ViewConfig(resize=resize, image_size=32)
    alone, together = (
        retrieval._compute_features(load_model(PIXELS), photos, view, batch_size=size) for size in (1, 4)
    )
    torch.testing.assert_close(alone, together)
    shape = load_view(Photo(photos[-1].path), view.model_copy(update={"image_size": 64}), 8).shape
    assert shape == ((3, 56, 72) if resize == "keep_aspect" else (3, 64, 64))  # of 120 x 96 pixels


def test_configs_are_closed() -> None:
    for data in ({"layout": "oxford", "path": "p"}, {"layout": "met", "path": "p", "query": "box"}):
        with pytest.raises(ConfigError):
            parse(RetrievalConfig, {"name": "x", "data": data}, origin="test")
