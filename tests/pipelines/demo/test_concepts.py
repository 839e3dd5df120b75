"""The measure of retrieval on the demo data."""

import numpy as np
import pytest

from pipelines.demo import concepts


def test_topics_of_both_sources_map_to_the_same_concepts() -> None:
    assert concepts.concept_of_stamp("vehicles/emergency/fire.png") == "vehicles"
    assert concepts.concept_of_drawing("transportation/vehicles") == "vehicles"
    assert concepts.concept_of_stamp("animals") == concepts.concept_of_drawing("animals/bugs/ant.png") == "animals"
    assert concepts.concept_of_stamp("symbols/money") is None
    assert concepts.concept_of_drawing("vehicles") is None  # the drawings have no such topic
    assert set(concepts.STAMP_CONCEPTS.values()) == set(concepts.DRAWING_CONCEPTS.values())


def test_shares_are_counted_by_the_seeds_concept() -> None:
    pairs = [("food", "food"), ("food", None), ("food", "plants"), ("food", "food"), ("plants", "plants")]
    shares = concepts.share_same_concept([*pairs, (None, "food"), (None, None)])
    assert shares == {"food": 0.5, "plants": 1.0}
    assert concepts.share_same_concept([]) == {}


def test_nearest_pairs_are_of_the_k_nearest() -> None:
    angles = np.radians([0.0, 10, 20, 30, 90])
    pool = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    seeds = np.array([[1.0, 0.0], [0.0, 1.0]], np.float16)
    pairs = concepts.nearest_pairs(seeds, ["food", None], pool, ["food", None, "food", "plants", "plants"], k=3)
    assert pairs == [
        ("food", "food"),
        ("food", None),
        ("food", "food"),
        (None, "plants"),
        (None, "plants"),
        (None, "food"),
    ]


def test_chance_is_the_score_of_random_retrieval() -> None:
    rng = np.random.default_rng(0)
    pool = [str(name) if name != "other" else None for name in rng.choice(["food", "plants", "other"], 300)]
    evenly, anywhere = np.arange(300) * 2 * np.pi / 300, rng.uniform(0, 2 * np.pi, 3000)
    pool_vectors, seed_vectors = (np.stack([np.cos(of), np.sin(of)], axis=1) for of in (evenly, anywhere))
    pairs = concepts.nearest_pairs(seed_vectors, ["food"] * 3000, pool_vectors, pool)
    assert concepts.share_same_concept(pairs)["food"] == pytest.approx(concepts.chance(pool)["food"], abs=0.03)
