"""Batches: samples in proportion to their weights, equal on any number of ranks and workers, and from any step."""

import functools
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from curation.engine.runner import InlineRunner
from curation.errors import ConfigError, InputError, OutputMismatchError, RejectBudgetError
from curation.files import parquet, paths, schemas
from curation.images.corpus_tar import CorpusSample as Packed
from curation.images.corpus_tar import write_tar
from curation.images.hashing import image_id
from tests.curation.builders import encoded_image, image_row, write_ingest, write_stage
from training import data, order, samples
from training.augment import AugmentConfig, released_crops
from training.data import Batch, open_batches
from training.order import SampleOrder, permute
from training.samples import DataConfig, SampleList, prepare

SMALL = AugmentConfig(crops=released_crops(global_size=32, local_size=16, num_local=3))


def masks_of(num_patches: int, step: int, crops: range) -> Tensor:
    """Masks that differ by step and crop."""
    return torch.stack([torch.arange(num_patches) < (step + crop) % num_patches for crop in crops])


class Corpus:
    """Images packed into tars of five, as pack writes them."""

    def __init__(self, folder: Path, count: int = 12, weights: Sequence[float] | None = None) -> None:
        self.path, self.output = str(folder / "corpus"), str(folder / "out")
        self.images = [encoded_image(n, ("PNG", "JPEG")[n % 2], (40, 36)) for n in range(count)]
        self.ids = [image_id(image) for image in self.images]
        shards = []
        for start in range(0, count, 5):
            numbers = range(start, min(start + 5, count))
            name = f"corpus-{start // 5:06d}.tar"
            packed = (Packed(self.ids[n], self.images[n], ("PNG", "JPEG")[n % 2], {"label": n}) for n in numbers)
            _, places = write_tar(f"{self.path}/{name}", packed)
            rows = [
                {
                    "key": self.ids[n],
                    "shard": name,
                    "offset": place.offset,
                    "length": place.length,
                    "image_id": self.ids[n],
                    "source": "a",
                    "role": "pool",
                    "reasons": ["as_is:a"],
                    "weight": 1.0 if weights is None else weights[n],
                }
                for n, place in zip(numbers, places, strict=True)
            ]
            shards.append({"corpus": pa.Table.from_pylist(rows, schema=schemas.CORPUS)})
        write_stage(self.path, shards)

    def tar(self, number: int) -> Path:
        return Path(f"{self.path}/corpus-{number:06d}.tar")

    def config(self, **values: Any) -> DataConfig:
        return DataConfig(path=self.path, **values)

    def steps(self, config: DataConfig | None = None, **values: Any) -> list[list[Batch]]:
        config = config or self.config()
        prepare(config, self.output, InlineRunner())
        options: dict[str, Any] = {
            "seed": 0,
            "first_step": 0,
            "num_steps": 3,
            "batch_size": 8,
            "images_per_pass": 2,
            "rank": 0,
            "num_ranks": 1,
            "draw_masks": functools.partial(masks_of, 4),
            "rejects": {},
        }
        with open_batches(config, SMALL, self.output, **options | values) as batches:
            return list(batches)


def together(parts: Sequence[list[Batch]]) -> dict[str, Any]:
    """The whole step of several ranks and passes, image by image."""
    batches = [batch for passes in parts for batch in passes]
    return {
        "ids": [image for batch in batches for image in batch.image_ids],
        "positions": torch.cat([batch.positions for batch in batches]),
        **{
            f"crops {group}": torch.cat(
                [batch.crops[group].unflatten(0, (-1, len(batch.image_ids))) for batch in batches], dim=1
            )
            for group in range(2)
        },
        "masks": torch.cat([batch.masks.unflatten(0, (2, -1)) for batch in batches], dim=1),
    }


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return all(torch.equal(one[key], two[key]) if isinstance(one[key], Tensor) else one[key] == two[key] for key in one)


# The order


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_every_epoch_is_another_permutation(count: int) -> None:
    orders = [SampleOrder(seed, count) for seed in range(2)]
    epochs = np.array([of_seed.rows(np.arange(3 * count)).reshape(3, count) for of_seed in orders])  # (2, 3, count)
    permutations = [tuple(epoch.tolist()) for epoch in epochs.reshape(6, count)]
    assert all(sorted(permutation) == list(range(count)) for permutation in permutations)
    if count >= 64:
        assert len(set(permutations)) == 6
    assert np.array_equal(orders[0].rows(np.array([2 * count, 0, count])), epochs[0][[2, 0, 1], 0]), "in any order"


def test_the_order_of_a_seed_never_changes() -> None:
    """A run that resumes under a later version sees the same images. The values are those of the first version."""
    keys = np.random.default_rng(3).integers(2**64 - 1, size=order.ROUNDS, dtype=np.uint64)
    assert permute(np.arange(10), 10, keys).tolist() == [9, 8, 2, 1, 6, 3, 4, 7, 0, 5]
    large = [2076559367, 1871351844, 2480782805, 2758494705, 1403087076]
    assert permute(np.arange(5), 3_000_000_000, keys).tolist() == large
    assert SampleOrder(0, 12).rows(np.arange(12, 24)).tolist() == [4, 10, 3, 11, 2, 9, 6, 5, 7, 1, 0, 8]


def test_indices_are_shuffled_uniformly() -> None:
    """An index goes to each row equally often over many keys, and neighbours do not stay neighbours."""
    generator = np.random.default_rng(0)
    counts = np.zeros((5, 5))
    for _ in range(2000):
        keys = generator.integers(2**64 - 1, size=order.ROUNDS, dtype=np.uint64)
        counts[np.arange(5), permute(np.arange(5), 5, keys)] += 1
    assert np.abs(counts / 2000 - 0.2).max() < 0.045
    rows = SampleOrder(0, 100_000).rows(np.arange(100_000))
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(rows, np.arange(100_000))[0, 1]) < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_samples_come_in_proportion_to_their_weights(seed: int) -> None:
    weights = np.random.default_rng(seed).exponential(size=200)
    weights[[0, 77, 199]] = 0
    expected = 200 * weights / weights.sum()
    counts = np.array(
        [
            np.bincount(
                SampleOrder(seed, 200, np.cumsum(weights)).rows(np.arange(200 * e, 200 * e + 200)), minlength=200
            )
            for e in range(40)
        ]
    )
    assert ((counts == np.floor(expected)) | (counts == np.ceil(expected))).all()
    assert (counts.sum(axis=1) == 200).all()
    assert np.abs(counts.sum(axis=0) - 40 * expected).max() < 3, "the error does not grow over epochs"


def test_only_differing_weights_are_stored(tmp_path: Path) -> None:
    equal = Corpus(tmp_path / "a", weights=[0.3] * 12)
    prepare(equal.config(), equal.output, InlineRunner())
    assert SampleList(f"{equal.output}/samples").cumulative_weights is None
    weights = [1.0, 2.0, 3.0] * 4
    for use_weights, expected in ((True, np.cumsum(weights).tolist()), (False, None)):
        other = Corpus(tmp_path / f"b {use_weights}", weights=weights)
        assert prepare(other.config(use_weights=use_weights), other.output, InlineRunner()) == 12
        cumulative = SampleList(f"{other.output}/samples").cumulative_weights
        assert (None if cumulative is None else cumulative.tolist()) == expected


def test_the_list_has_the_images_of_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ROWS_PER_BATCH", 4)  # several batches, whose ends are not those of the tars
    corpus = Corpus(tmp_path, count=13)
    assert prepare(corpus.config(), corpus.output, InlineRunner()) == 13
    listed = SampleList(f"{corpus.output}/samples")
    reader = data.SampleReader(names_are_ids=True, verify_hashes=True)
    for n in (12, 0, 5, 4, 3):
        assert listed[n].image_id == corpus.ids[n]
        assert reader.read(listed[n]) == corpus.images[n]
    reader.close()


# Batches


def test_a_batch_orders_its_crops_by_crop_then_by_image(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    (first, *_), *_ = corpus.steps()
    assert [crop.shape for crop in first.crops] == [(4, 3, 32, 32), (6, 3, 16, 16)]
    assert first.positions.tolist() == [0, 1] and len(first.image_ids) == 2
    rows = SampleOrder(0, 12).rows(np.arange(2)).tolist()
    assert first.image_ids == [corpus.ids[row] for row in rows]
    for position, row in enumerate(rows):
        generator = np.random.default_rng([0, data.CROPS_PURPOSE, position])
        groups = data.make_crops(corpus.images[row], corpus.config().limits, SMALL, generator)
        for crops, expected in zip(first.crops, groups, strict=True):
            assert np.array_equal(crops.unflatten(0, (-1, 2))[:, position].numpy(), expected)
    expected_masks = torch.cat([masks_of(4, 0, range(2)), masks_of(4, 0, range(8, 10))])
    assert torch.equal(first.masks, expected_masks)
    assert torch.equal(first.masked_indices, expected_masks.flatten().nonzero()[:, 0])
    counts = expected_masks.sum(dim=1)
    assert torch.allclose(first.masked_weights, torch.cat([torch.full((int(n),), 1 / float(n)) for n in counts if n]))


@pytest.mark.parametrize(("num_ranks", "images_per_pass"), [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_a_step_is_the_same_on_any_number_of_ranks(tmp_path: Path, num_ranks: int, images_per_pass: int) -> None:
    corpus = Corpus(tmp_path)
    expected = [together([passes]) for passes in corpus.steps(images_per_pass=2)]
    ranks = [corpus.steps(rank=rank, num_ranks=num_ranks, images_per_pass=images_per_pass) for rank in range(num_ranks)]
    assert [len(passes) for passes in ranks[0]] == [8 // num_ranks // images_per_pass] * 3
    for step, whole in enumerate(expected):
        assert same(together([steps[step] for steps in ranks]), whole)
        assert whole["positions"].tolist() == list(range(8 * step, 8 * step + 8))


def test_any_step_can_be_the_first(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    straight = corpus.steps(num_steps=4)
    later = corpus.steps(first_step=3, num_steps=4)
    assert len(later) == 1 and same(together(later), together(straight[3:]))
    assert not same(together(later), together(corpus.steps(first_step=3, num_steps=4, seed=1)))


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    state = torch.get_rng_state()
    in_thread, in_processes = (corpus.steps(corpus.config(workers=workers), num_steps=2) for workers in (0, 2))
    assert all(same(together([a]), together([b])) for a, b in zip(in_thread, in_processes, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_are_normalised_on_the_device(tmp_path: Path) -> None:
    (batch, *_), *_ = Corpus(tmp_path).steps()
    moved = batch.to(torch.device("cpu"))
    for crops, raw in zip(moved.crops, batch.crops, strict=True):
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        expected = (raw.numpy() / 255 - mean[:, None, None]) / deviation[:, None, None]
        assert crops.dtype == torch.float32 and np.abs(crops.numpy() - expected).max() < 1e-5
    assert torch.equal(moved.masks, batch.masks) and moved.image_ids == batch.image_ids
    with pytest.raises(AssertionError, match="normalised already"):
        moved.to(torch.device("cpu"))


# Other layouts


def test_raw_images_are_ingested_first(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "packed")
    for n, image in enumerate(corpus.images):
        paths.write_bytes(f"{tmp_path}/files/{n % 3}/{n:02d}.{('png', 'jpg')[n % 2]}", image)
    buffer = pa.table({"image": pa.array([{"bytes": image} for image in corpus.images])})
    parquet.write_table(f"{tmp_path}/table/part.parquet", buffer)
    expected = Counter(corpus.ids)
    other = DataConfig(path=f"{tmp_path}/packed/corpus", layout="webdataset")
    for layout, path in (("folder", "files"), ("webdataset", "packed/corpus"), ("parquet", "table")):
        config = DataConfig.model_validate({"path": f"{tmp_path}/{path}", "layout": layout})
        corpus.output = f"{tmp_path}/out {layout}"
        (passes,) = corpus.steps(config, num_steps=1, batch_size=12)
        assert Counter(image for batch in passes for image in batch.image_ids) == expected
        assert Path(corpus.output, "ingest/manifest.json").exists()
        if layout != "webdataset":
            with pytest.raises(OutputMismatchError):
                prepare(other, corpus.output, InlineRunner())


def test_the_holdout_of_an_ingest_is_not_trained_on(tmp_path: Path) -> None:
    rows = []
    for n, role in enumerate(("pool", "seed", "holdout", "pool")):
        image = encoded_image(n)
        paths.write_bytes(f"{tmp_path}/{n}.png", image)
        rows.append(image_row(image_id(image), "a", role, uri=f"{tmp_path}/{n}.png", length=len(image)))
    write_ingest(tmp_path / "ingest", [rows[:2], rows[2:]])
    config = DataConfig(path=f"{tmp_path}/ingest", layout="images")
    assert prepare(config, f"{tmp_path}/out", InlineRunner()) == 3
    samples = SampleList(f"{tmp_path}/out/samples")
    assert [samples[n].image_id for n in range(3)] == [rows[n]["image_id"] for n in (0, 1, 3)]


# Errors


def spoil(corpus: Corpus, number: int, *, header: bool) -> None:
    """Overwrite an image's header in its tar, or the image's bytes."""
    prepare(corpus.config(), corpus.output, InlineRunner())
    _, uri, offset, length, _ = SampleList(f"{corpus.output}/samples")[number]
    with open(uri, "r+b") as file:
        file.seek(offset - 512 if header else offset)
        file.write(b"\xff" * (512 if header else length))


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_replaced_by_that_of_the_next_epoch(tmp_path: Path, header: bool, workers: int) -> None:
    corpus = Corpus(tmp_path)
    config = corpus.config(max_reject_fraction=0.1, workers=workers)
    before = [together([passes]) for passes in corpus.steps(config)]
    spoil(corpus, 7, header=header)
    rejects: dict[str, str] = {}
    after = [together([passes]) for passes in corpus.steps(config, rejects=rejects)]
    assert rejects.keys() == {corpus.ids[7]}
    assert ("is not at" if header else "another hash") in rejects[corpus.ids[7]]
    order, changed = SampleOrder(0, 12), 0
    for step_before, step_after in zip(before, after, strict=True):
        for index, position in enumerate(step_before["positions"].tolist()):
            if step_before["ids"][index] == corpus.ids[7]:
                later = order.rows(position + 12 * np.arange(1, 16)).tolist()
                row = next(row for row in later if row != 7)
                assert step_after["ids"][index] == corpus.ids[row]
                changed += 1
            else:
                assert step_after["ids"][index] == step_before["ids"][index]
                assert torch.equal(step_after["crops 1"][:, index], step_before["crops 1"][:, index])
    assert changed == 2, "in each of the two epochs"
    again = [together([passes]) for passes in corpus.steps(config)]
    assert all(same(one, two) for one, two in zip(after, again, strict=True))


def test_bad_images_spend_a_budget(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    for number in (3, 7):
        spoil(corpus, number, header=False)
    with pytest.raises(RejectBudgetError, match=r"2 images could not be used, more than .* = 0\.1 of 12 allows"):
        corpus.steps(corpus.config(max_reject_fraction=0.1))
    assert corpus.steps(corpus.config(max_reject_fraction=0.2))
    for number in range(12):
        spoil(corpus, number, header=False)
    with pytest.raises(RejectBudgetError, match=r"16 images in a row could not be used"):
        corpus.steps(corpus.config(max_reject_fraction=1.0))


@pytest.mark.parametrize("layout", ["corpus", "folder", "webdataset"])
def test_an_image_replaced_by_one_of_equal_length_is_rejected(tmp_path: Path, layout: Literal["folder"]) -> None:
    corpus = Corpus(tmp_path)
    if layout == "folder":
        for n in range(12):
            paths.write_bytes(f"{tmp_path}/files/{n:02d}.png", encoded_image(n))
        config = DataConfig(path=f"{tmp_path}/files", layout=layout, max_reject_fraction=0.1)
    else:
        config = corpus.config(layout=layout, max_reject_fraction=0.1)
    prepare(config, corpus.output, InlineRunner())
    sample = SampleList(f"{corpus.output}/samples")[7]
    with open(sample.uri, "r+b") as file:
        file.seek(sample.offset)
        file.write(encoded_image(99, "JPEG", (20, 16))[: sample.length].ljust(sample.length, b"\0"))
    rejects: dict[str, str] = {}
    corpus.steps(config, rejects=rejects)
    assert rejects.keys() == {sample.image_id} and "another hash" in rejects[sample.image_id]


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_shard_lost_before_the_start_is_named_before_the_first_step(tmp_path: Path, damage: str) -> None:
    corpus = Corpus(tmp_path)
    table = Path(f"{corpus.path}/corpus-00001.parquet")
    if damage == "deleted":
        table.unlink()
    else:
        os.truncate(table, 100)
    with pytest.raises(InputError, match=r"corpus-00001\.parquet (is missing|has 100 bytes).*--replace"):
        prepare(corpus.config(), corpus.output, InlineRunner())


def test_changed_bytes_are_not_detected_without_verify_hashes(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    other = encoded_image(99, "JPEG", (40, 36))
    prepare(corpus.config(), corpus.output, InlineRunner())
    _, uri, offset, length, _ = SampleList(f"{corpus.output}/samples")[7]
    with open(uri, "r+b") as file:
        file.seek(offset)
        file.write(other[:length].ljust(length, b"\0"))
    rejects: dict[str, str] = {}
    corpus.steps(corpus.config(max_reject_fraction=0.1, verify_hashes=False), rejects=rejects)
    assert not rejects


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("gone", [False, True])
def test_a_lost_shard_stops_the_run_and_is_named(tmp_path: Path, gone: bool, workers: int) -> None:
    corpus = Corpus(tmp_path)
    prepare(corpus.config(), corpus.output, InlineRunner())
    if gone:
        corpus.tar(1).unlink()
    else:
        os.truncate(corpus.tar(1), 2000)
    problem = "cannot be read any more" if gone else "is cut off"
    with pytest.raises(InputError, match=rf"^The shard .*corpus-000001\.tar {problem}.*Restore it"):
        corpus.steps(corpus.config(workers=workers))


def test_a_lost_file_costs_one_image(tmp_path: Path) -> None:
    for n in range(12):
        paths.write_bytes(f"{tmp_path}/files/{n:02d}.png", encoded_image(n))
    corpus = Corpus(tmp_path)
    config = DataConfig(path=f"{tmp_path}/files", layout="folder", max_reject_fraction=0.2)
    prepare(config, corpus.output, InlineRunner())
    Path(tmp_path, "files/03.png").unlink()
    with open(tmp_path / "files/04.png", "ab") as file:
        file.write(b"more")
    rejects: dict[str, str] = {}
    assert len(corpus.steps(config, rejects=rejects)) == 3
    assert sorted(reason.partition(":")[0] for reason in rejects.values()) == ["corrupt", "unreadable"]


def test_a_corpus_without_offsets_must_be_packed_again(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    old = schemas.CORPUS.empty_table().drop_columns(["offset", "length"])
    write_stage(corpus.path, [{"corpus": old}])
    with pytest.raises(InputError, match=r"no column offset and length in corpus-00000\.parquet\)\. Delete the folder"):
        prepare(corpus.config(), corpus.output, InlineRunner())


def test_data_of_another_layout_is_refused(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    with pytest.raises(InputError, match="holds no finished ingest"):
        prepare(corpus.config(layout="images"), corpus.output, InlineRunner())
    with pytest.raises(InputError, match="holds no finished stage"):
        prepare(DataConfig(path=str(tmp_path)), corpus.output, InlineRunner())
    with pytest.raises(InputError, match="is not local"):
        prepare(corpus.config(), "memory://out", InlineRunner())
    with pytest.raises(ConfigError, match="batch_size = 8 is not a multiple of 1 ranks x images_per_pass = 3"):
        corpus.steps(images_per_pass=3)


@pytest.mark.parametrize("weights", [[0.0] * 12, [1.0] * 11 + [-1.0], [1.0] * 11 + [float("nan")]])
def test_invalid_weights_are_refused(tmp_path: Path, weights: list[float]) -> None:
    corpus = Corpus(tmp_path, weights=weights)
    with pytest.raises(InputError, match="has the weight"):
        prepare(corpus.config(), corpus.output, InlineRunner())
    assert prepare(corpus.config(use_weights=False), corpus.output, InlineRunner()) == 12


def test_an_output_of_other_data_is_refused_and_a_moved_corpus_is_not(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    straight = corpus.steps(num_steps=1)
    with pytest.raises(OutputMismatchError, match=r"\(use_weights differ\)"):
        prepare(corpus.config(use_weights=False), corpus.output, InlineRunner())
    Path(corpus.path).rename(tmp_path / "moved")
    corpus.path = str(tmp_path / "moved")
    assert same(together(corpus.steps(num_steps=1)), together(straight))
    other = Corpus(tmp_path / "other", count=7)
    with pytest.raises(OutputMismatchError, match=r"\(content differ\)"):
        prepare(other.config(), corpus.output, InlineRunner())


def test_a_palette_image_is_decoded_as_in_ingest(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("P", (40, 36), 3).save(buffer, "GIF")
    config = DataConfig(path=str(tmp_path))
    (group, _) = data.make_crops(buffer.getvalue(), config.limits, SMALL, np.random.default_rng(0))
    assert group.shape == (2, 3, 32, 32)
