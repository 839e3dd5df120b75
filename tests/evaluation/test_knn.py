"""Tests of k-NN against brute force in float64, scikit-learn and hand-computed values."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from curation.errors import DeviceError, InputError
from evaluation.knn import BLOCK_ROWS, accuracy, classify, neighbors, vote


def brute_force(train: Tensor, labels: Tensor, test: Tensor, k: int, temperature: float) -> Tensor:
    """One pair at a time in float64; ties by row."""
    probabilities = torch.zeros(len(test), int(labels.max()) + 1, dtype=torch.float64)
    for number, query in enumerate(test.double()):
        cosines = [float(query @ one / (query.norm() * one.norm())) for one in train.double()]
        nearest = sorted(range(len(train)), key=lambda row: (-cosines[row], row))[:k]
        weights = [math.exp(cosines[row] / temperature) for row in nearest]
        for row, weight in zip(nearest, weights, strict=True):
            probabilities[number, int(labels[row])] += weight / sum(weights)
    return probabilities


def clustered(seed: int, num_rows: int, num_classes: int, width: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=random)
    centers = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    features = centers[labels] + torch.randn(num_rows, width, generator=random)
    return features * torch.rand(num_rows, 1, generator=random).add(0.1), labels  # of any norm


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize(("temperature", "dtype"), [(0.07, torch.float32), (1.0, torch.float32), (0.07, torch.float16)])
def test_agrees_with_brute_force(k: int, temperature: float, dtype: torch.dtype) -> None:
    train, labels = clustered(0, 150, 7, 12)
    test, test_labels = clustered(1, 40, 7, 12)
    train, test = train.to(dtype), test.to(dtype)
    probabilities = classify(train, labels, test, k=k, temperature=temperature)
    expected = brute_force(train, labels, test, k, temperature)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.double(), expected, atol=1e-5, rtol=0)
    share = float((expected.argmax(1) == test_labels).double().mean())
    assert accuracy(probabilities, test_labels) == pytest.approx(share)
    assert share > 0.6  # the classes are separable, so the comparison is meaningful


@pytest.mark.parametrize("k", [1, 10, 20])
def test_agrees_with_scikit_learn(k: int) -> None:
    train, labels = clustered(0, 300, 7, 12)
    test, _ = clustered(1, 80, 7, 12)
    weighted = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    )
    weighted.fit(train.double().numpy(), labels.numpy())
    expected = weighted.predict_proba(test.double().numpy())
    probabilities = classify(train, labels, test, k=k)
    np.testing.assert_allclose(probabilities.numpy(), expected, atol=1e-5)


def test_a_vote_by_hand() -> None:
    # Cosines 1, 0.6, 0 to the three training images: weights e^2, e^1.2, e^0 at a temperature of 1/2.
    train = torch.tensor([[0.0, 5.0], [0.3, 0.4], [2.0, 0.0]])
    labels = torch.tensor([1, 0, 1])
    (probabilities,) = classify(train, labels, torch.tensor([[7.0, 0.0]]), k=3, temperature=0.5)
    weights = [math.exp(2), math.exp(1.2), 1.0]
    assert probabilities.tolist() == pytest.approx(
        [weights[1] / sum(weights), (weights[0] + weights[2]) / sum(weights)]
    )
    (probabilities,) = classify(train, labels, torch.tensor([[7.0, 0.0]]), k=2, temperature=0.5)
    assert probabilities.tolist() == pytest.approx([weights[1] / sum(weights[:2]), weights[0] / sum(weights[:2])])


def test_the_temperature_decides_between_one_near_and_two_far_neighbours() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert classify(train, labels, test, k=3).argmax() == 0
    assert classify(train, labels, test, k=3, temperature=1.0).argmax() == 1


def test_several_k_from_one_search() -> None:
    train, labels = clustered(0, 100, 5, 8)
    test, _ = clustered(1, 30, 5, 8)
    similarities, rows = neighbors([train], test, k=20)
    for k in (1, 10, 20):
        apart = classify(train, labels, test, k=k)
        assert torch.equal(vote(similarities[:, :k], labels[rows[:, :k]], 5), apart)
        # One softmax over all 20, cut to k afterwards, as in DINOv2: the most probable class is the same.
        weights = torch.softmax(similarities / 0.07, 1)[:, :k]
        cut = torch.zeros(30, 5).scatter_add_(1, labels[rows[:, :k]], weights)
        assert torch.equal(cut.argmax(1), apart.argmax(1))


@pytest.mark.parametrize("sizes", [[1] * 100, [33, 33, 34], [99, 0, 1]])
def test_blocks_change_nothing(sizes: list[int]) -> None:
    train, _ = clustered(0, 100, 5, 9)
    test, _ = clustered(1, 10, 5, 9)
    whole = neighbors([train], test, k=7)
    parts = neighbors(iter(train.split(sizes)), test, k=7)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_features_can_be_a_memory_mapped_file(tmp_path: Path) -> None:
    train, labels = clustered(0, 100, 5, 9)
    test, _ = clustered(1, 10, 5, 9)
    np.save(tmp_path / "train.npy", train.half().numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "train.npy", mmap_mode="c", allow_pickle=False))
    assert torch.equal(classify(mapped, labels, test, k=7), classify(train.half(), labels, test, k=7))


def test_more_than_one_block() -> None:
    train, labels = clustered(0, BLOCK_ROWS + 500, 5, 4)
    test, _ = clustered(1, 10, 5, 4)
    units = torch.nn.functional.normalize
    similarities, rows = (units(test) @ units(train).T).topk(7)
    assert (rows >= BLOCK_ROWS).any()
    torch.testing.assert_close(classify(train, labels, test, k=7), vote(similarities, labels[rows], 5))


def test_more_neighbours_than_images_are_all_images() -> None:
    train, labels = clustered(0, 6, 3, 4)
    test, _ = clustered(1, 5, 3, 4)
    assert torch.equal(classify(train, labels, test, k=200), classify(train, labels, test, k=6))
    with pytest.raises(InputError, match="k is 7, and there are only 6"):
        neighbors([train], test, k=7)


def test_one_image_one_class_no_tests() -> None:
    one = torch.tensor([[1.0, 2.0]])
    assert classify(one, torch.tensor([0]), -one, k=10).tolist() == [[1.0]]
    assert classify(one, torch.tensor([2]), one, k=1).tolist() == [[0.0, 0.0, 1.0]]
    assert classify(one, torch.tensor([2]), torch.empty(0, 2), k=1).shape == (0, 3)
    train, _ = clustered(0, 20, 3, 4)
    probabilities = classify(train, torch.zeros(20, dtype=torch.uint8), train, k=5)
    torch.testing.assert_close(probabilities, torch.ones(20, 1))


def test_equally_near_images_keep_their_order() -> None:
    train = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    similarities, rows = neighbors([train], torch.tensor([[4.0, 0.0]]), k=3)
    assert rows.tolist() == [[1, 2, 3]]
    assert similarities.tolist() == [[1.0, 1.0, 1.0]]
    labels = torch.tensor([0, 3, 1, 3, 2])
    assert classify(train, labels, torch.tensor([[4.0, 0.0]]), k=1).argmax() == 3
    probabilities = classify(train, labels, torch.tensor([[4.0, 0.0]]), k=3)[0]
    assert probabilities.tolist() == pytest.approx([0.0, 1 / 3, 0.0, 2 / 3])


def test_duplicates_each_have_a_vote() -> None:
    train = torch.tensor([[1.0, 0.1], [1.0, 0.0]]).repeat(1, 2).repeat_interleave(torch.tensor([1, 3]), 0)
    probabilities = classify(train, torch.tensor([0, 1, 1, 1]), train[:1], k=4, temperature=1e9)
    assert probabilities[0].tolist() == pytest.approx([0.25, 0.75])


def test_a_zero_feature_is_equally_near_to_all() -> None:
    train = torch.eye(4)
    assert neighbors([train], torch.zeros(1, 4), k=4)[1].tolist() == [[0, 1, 2, 3]]
    assert classify(train, torch.tensor([0, 1, 2, 2]), torch.zeros(1, 4), k=4)[0].tolist() == [0.25, 0.25, 0.5]


def test_accuracy_counts_the_top_and_breaks_ties_by_class() -> None:
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [0.4, 0.3, 0.3]])
    labels = torch.tensor([1, 2, 0, 2])
    assert accuracy(probabilities, labels) == 0.25
    assert accuracy(probabilities, labels, top=2) == 0.75  # the second of equal zeros comes second
    assert accuracy(probabilities, labels, top=3) == 1.0
    assert accuracy(probabilities, torch.tensor([0, 3, 99, 0]), top=3) == 0.5  # no training images of these classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"train_features": torch.empty(0, 2), "train_labels": torch.empty(0, dtype=torch.long)}, "n at least 1"),
        ({"train_labels": torch.tensor([0])}, r"Found: \[2, 2\] and \[1\]"),
        ({"train_labels": torch.tensor([0, -1])}, "minimum -1"),
        ({"train_labels": torch.tensor([0.0, 1.0])}, "torch.float32"),
        ({"test_features": torch.ones(1, 3)}, r"\[2, 2\], test features have 3 dimensions"),
        ({"test_features": torch.ones(3)}, r"Found: \[3\]"),
        ({"test_features": torch.tensor([[1.0, math.nan]])}, "test features hold .* row 0"),
        ({"train_features": torch.tensor([[1.0, 1.0], [math.inf, 0.0]])}, "training features hold .* row 1"),
    ],
)
def test_bad_input_is_reported(change: dict[str, object], message: str) -> None:
    good = {"train_features": torch.ones(2, 2), "train_labels": torch.tensor([0, 1]), "test_features": torch.ones(1, 2)}
    with pytest.raises(InputError, match=message):
        classify(**({"k": 1} | good | change))
    with pytest.raises(InputError, match="m at least 1"):
        accuracy(torch.ones(0, 2), torch.ones(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(DeviceError):
        neighbors([torch.ones(2, 2)], torch.ones(1, 2), k=1, device="cuda")
