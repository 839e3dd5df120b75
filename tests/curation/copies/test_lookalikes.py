"""Sources of look-alikes: no gap in the scores, or one group; copies of pictures, however many, are none."""

import functools
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation import dedup
from curation.copies.lookalikes import PAIRS_PER_RANGE, Lookalikes, find_lookalikes, pairs_of_source
from curation.dedup import DedupConfig
from curation.engine.manifest import Manifest
from curation.errors import InputError
from curation.report import lookalikes_page
from curation.run_folder import RunFolder
from tests.curation.builders import id_of, image_row, write_ingest, write_stage
from tests.curation.test_dedup import Edge, edges_of, nodes_of, write_pairs

THRESHOLD = 0.5


def group(first: int, count: int, low: float, high: float, *, share: float = 1.0) -> list[Edge]:
    """Pairs of `count` images from `first`, a random `share` of all, with scores between two bounds."""
    rng = np.random.default_rng(first)
    pairs = itertools.combinations(range(first, first + count), 2)
    return [(a, b, float(rng.uniform(low, high))) for a, b in pairs if rng.random() < share]


def alike(count: int, edges: list[Edge], **columns: Any) -> list[Lookalikes]:
    return find_lookalikes(nodes_of(count, **columns), edges_of(edges), ("a", "b"), THRESHOLD)


def copies(num_pictures: int, num_copies: int) -> list[Edge]:
    """Groups of copies: most scores far above the threshold, some near it."""
    edges = []
    for picture in range(num_pictures):
        first = picture * num_copies
        edges += group(first, num_copies, 0.65, 1.0, share=0.8) + group(first, num_copies, 0.35, 0.65, share=0.1)
    return edges


def test_a_source_without_pairs_has_no_lookalikes() -> None:
    assert alike(0, []) == [] and alike(50, []) == []


@pytest.mark.parametrize(("num_pictures", "num_copies", "count"), [(100, 5, 900), (13, 30, 390), (1, 30, 100)])
def test_copies_of_pictures_are_no_lookalikes(num_pictures: int, num_copies: int, count: int) -> None:
    assert alike(count, copies(num_pictures, num_copies)) == []


def test_a_source_of_one_group_looks_alike() -> None:
    """Whatever its scores: solar cells have scores above 0.9."""
    (found,) = alike(140, group(0, 60, 0.9, 0.95), source=np.repeat([0, 1], [80, 60]))
    assert (found.source, found.images, found.crowded, found.largest_group) == ("a", 80, 60, 60)
    assert alike(200, group(0, 60, 0.9, 0.95)) == [], "less than a third of the source"


def test_scores_without_a_gap_look_alike() -> None:
    """Several groups, of which none is a large part of the source."""
    edges = [edge for first in range(0, 100, 20) for edge in group(first, 20, 0.3, 0.7, share=0.7)]
    (found,) = alike(300, edges, source=np.repeat([1, 0], [200, 100]))
    assert found.source == "b" and found.near_threshold > found.above
    assert alike(1100, edges) == [], "less than a tenth of the source is crowded"
    high = edges_of([(a, b, s + 0.45) for a, b, s in edges if s < 0.55])
    assert find_lookalikes(nodes_of(300), high, ("a",), 0.92) == [], "no score lies above such a threshold"


def test_the_holdout_is_not_judged() -> None:
    edges = group(0, 60, 0.9, 0.95)
    assert alike(60, edges, is_holdout=np.ones(60, bool)) == []
    assert alike(120, [(a, b + 60, s) for a, b, s in edges], is_holdout=np.arange(120) >= 60) == []


@pytest.mark.parametrize("seed", range(5))
def test_shown_pairs_are_of_many_images(seed: int) -> None:
    """All pairs of 60 images have scores of one range; the order of the pairs changes nothing."""
    edges = group(0, 60, 0.51, 0.52)
    shuffled = [edges[row] for row in np.random.default_rng(seed).permutation(len(edges))]
    pairs = pairs_of_source(nodes_of(60), edges_of(shuffled), 0, THRESHOLD)
    assert pairs == pairs_of_source(nodes_of(60), edges_of(edges), 0, THRESHOLD) and len(pairs) == PAIRS_PER_RANGE
    assert max(Counter(end for pair in pairs for end in pair[:2]).values()) <= 3


def cells_run(folder: Path, **settings: Any) -> Manifest:
    """A pool of 30 look-alikes, an ordinary pool with one copy, and a holdout image that equals one look-alike."""
    rows = [
        [image_row(id_of(n), "cells", "pool", uri=f"/cells/{n}<b>.png") for n in range(30)],
        [image_row(id_of(n), "web", "pool") for n in range(30, 60)],
        [image_row(id_of(60), "test", "holdout")],
    ]
    edges = [*group(0, 30, 0.6, 0.9), (30, 31, 0.9), (7, 60, 0.8)]
    images = write_ingest(folder / "ingest", rows)
    pairs = write_pairs(folder / "pairs", images, [[(id_of(a), id_of(b), s) for a, b, s in edges]])
    thumbnails = pa.table({"image_id": [id_of(n) for n in range(61)], "thumbnail": [b"webp"] * 61})
    describe = write_stage(folder / "describe", [{"thumbnails": thumbnails.cast(dedup.schemas.THUMBNAILS)}])
    inputs = RunFolder(ingest=images, pairs=pairs, describe=describe)
    show_pairs = functools.partial(lookalikes_page.write, inputs, str(folder), THRESHOLD)
    config = DedupConfig(threshold=THRESHOLD, matches_kept=True, **settings)
    return dedup.run(config, inputs, str(folder / "dedup"), show_pairs=show_pairs)


def test_the_run_stops_before_anything_is_dropped_and_goes_on_with_another_setting(tmp_path: Path) -> None:
    page = tmp_path / "lookalikes.html"
    with pytest.raises(InputError, match=r"'cells' \(100% of 30 images have 5 or more neighbours") as stopped:
        cells_run(tmp_path)
    assert str(page) in str(stopped.value) and "'web'" not in str(stopped.value)
    assert not (tmp_path / "dedup").exists()
    text = page.read_text()
    assert text.count("<img") >= 20 and "&lt;b&gt;.png" in text and "<b>" not in text
    assert "copies above, not copies below" in text
    with pytest.raises(InputError):
        cells_run(tmp_path)
    assert page.read_text() == text
    totals = cells_run(tmp_path, lookalikes="drop").totals
    assert totals["near"] > 20 and totals["holdout"] == 1


def test_exact_drops_no_near_copies_of_these_sources_alone(tmp_path: Path) -> None:
    manifest = cells_run(tmp_path, lookalikes="exact")
    assert {name: manifest.totals[name] for name in ("kept", "near", "holdout")} == {
        "kept": 58,
        "near": 1,
        "holdout": 1,
    }
    assert manifest.facts["guards"]["lookalikes"]["pairs_left_out"] == 30 * 29 // 2
    (fact,) = manifest.facts["lookalikes"]
    assert (fact["source"], fact["holdout_matches"]) == ("cells", 1)
    assert manifest.facts["label_guard"] is True
