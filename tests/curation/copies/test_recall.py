"""Recall of edited copies: counts by kind, intervals, unexpected pairs, and the threshold that would do better."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from curation.copies.edits import KINDS
from curation.copies.recall import SelfCheck, Share, summarize
from curation.files import schemas

THRESHOLDS = {"threshold": 0.5, "holdout_threshold": 0.35, "min_similarity": 0.3}
Row = tuple[str, str, str, bool, float]


def result_of(rows: list[Row], known: Sequence[tuple[str, str, float]] = (), **settings: Any) -> SelfCheck:
    tables = (
        pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in of_schema], schema)
        for of_schema, schema in ((rows, schemas.SELF_CHECK_SCORES), (known, schemas.SELF_CHECK_KNOWN))
    )
    return summarize(*tables, **(THRESHOLDS | settings))


@pytest.mark.parametrize(
    ("count", "whole", "low", "high"),
    # From R: binom::binom.wilson.
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_intervals_are_those_of_wilson(count: int, whole: int, low: float, high: float) -> None:
    assert Share(count, whole).interval == pytest.approx((low, high), abs=1e-4)


def test_a_copy_is_found_when_its_original_is_a_candidate_at_the_threshold() -> None:
    result = result_of(
        [
            ("a", "a", "jpeg", True, 0.5),
            ("b", "b", "jpeg", True, 0.4),
            ("c", "c", "jpeg", False, 0.9),
            ("a", "a", "blur", True, 0.2),
        ]
    )
    jpeg, blur = (next(each for each in result.kinds if each.kind == kind) for kind in ("jpeg", "blur"))
    assert (jpeg.proposed, jpeg.found, jpeg.found_for_holdout) == (Share(2, 3), Share(1, 3), Share(2, 3))
    assert (blur.proposed, blur.found) == (Share(1, 1), Share(0, 1))
    assert [each.kind for each in result.kinds] == list(KINDS)
    assert (result.num_images, result.found, result.unexpected) == (3, Share(1, 4), Share(0, 0))


def test_a_pair_with_a_known_copy_of_the_original_is_not_unexpected() -> None:
    rows = [("a", other, "jpeg", True, value) for other, value in (("a", 1.0), ("b", 0.9), ("c", 0.6), ("d", 0.4))]
    rows.append(("a", "b", "grey", True, 0.7))
    assert result_of(rows).unexpected == Share(3, 4)
    shown = [(pair.other_image_id, pair.kind, round(pair.similarity, 4)) for pair in result_of(rows).unexpected_pairs]
    assert shown == [("b", "jpeg", 0.9)], "the most similar of each edited image"
    assert result_of(rows, [("a", "b", 0.5)]).unexpected == Share(1, 2)
    assert result_of(rows, [("a", "b", 0.49), ("b", "a", 0.9)]).unexpected == Share(3, 4)


def test_a_lower_threshold_is_named_when_it_finds_more_and_mistakes_no_more() -> None:
    found = [(f"{n:02}", f"{n:02}", "jpeg", True, 0.8 if n < 20 else 0.42) for n in range(40)]
    better = result_of(found).better
    assert better is not None and better.found == Share(40, 40)
    assert better.threshold == 0.42, "the nearest of equal ones"
    assert result_of(found, holdout_threshold=0.45).better is None, "dedup takes no threshold below that of the holdout"
    assert result_of([*found, ("00", "99", "jpeg", True, 0.45)]).better is None, "an unexpected pair more"
    few = [row for row in found if row[0] < "21"]
    assert result_of(few).better is None, "one copy more lies in the interval"


def test_a_higher_threshold_is_named_when_it_mistakes_less_and_finds_as_many() -> None:
    rows = [(f"{n:02}", f"{n:02}", "jpeg", True, 0.8) for n in range(20)]
    rows += [(f"{n:02}", "99", "jpeg", True, 0.55) for n in range(20)]
    better = result_of(rows).better
    assert better is not None and (better.threshold, better.unexpected) == (0.56, Share(0, 20))


def test_no_score_gives_an_empty_result() -> None:
    result = result_of([])
    assert (result.num_images, result.found, result.better) == (0, Share(0, 0), None)
