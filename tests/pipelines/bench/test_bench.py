"""The benchmarks run and compare correctly, at a hundredth of their sizes. Times are not checked."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table

from curation.run_folder import read_images
from pipelines.bench import crops, decoding, embedding, mixture, similarity, similarity_works
from pipelines.bench.processes import in_process
from pipelines.bench.tables import Comparison

SCALE = 100


def printed(tables: list[Table]) -> str:
    console = Console(file=io.StringIO(), width=250)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def quality(row: Comparison) -> float:
    """The first figure of a row's recall or objective."""
    return float(next(word for word in row.quality.replace("%", "").split() if word[0].isdigit()))


@pytest.fixture(scope="module")
def result() -> similarity.SimilarityBench:
    return similarity.bench(list(similarity.WORKS), scale=SCALE, repeats=1, measure=similarity_works.measure)


def test_every_work_has_its_rows(result: similarity.SimilarityBench) -> None:
    join, growth, searching, building, exact, voting, kmeans, components = result.rows
    assert quality(join) >= 0.99
    assert quality(searching) == quality(building) >= 0.95
    assert searching.our_value < building.our_value
    assert quality(exact) == 1 and quality(voting) > 0.999  # torch.cdist may order two equal distances otherwise
    assert float(kmeans.quality.split()[2]) >= 0.97  # of the peer's objective: 40 clusters from another start
    assert components.quality.startswith("100.0000%")
    assert math.isnan(growth.peer_value)
    assert [row.size for row in result.growth_rows] == [500, 1000, 2000, 4000, 10_000, 10_000, 3072, 5000][
        : len(result.growth_rows)
    ]


def test_tables_have_every_row(result: similarity.SimilarityBench) -> None:
    text = printed(similarity.tables(result))
    assert text.count("at 1/100 of the sizes") == 2
    for row in result.rows:
        assert row.peer in text and row.quality in text
    one_row = similarity.SimilarityBench("", 1, None, similarity_works.measure, rows=result.rows[1:2])
    assert "sizes" not in printed(similarity.tables(one_row))
    assert similarity.tables(similarity.SimilarityBench("", 1, None, similarity_works.measure)) == []


def test_work_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The process reports why it failed, and does not inherit the peak memory of its parent."""
    ballast = np.ones(500_000_000, np.uint8)
    arguments = {"folder": str(tmp_path / "edges"), "num_edges": 1000}
    measured = in_process("similarity_works", "make_edges", **arguments)
    assert measured["bytes"] == 8000
    assert measured["peak"] < 1e8 < ballast.nbytes
    with pytest.raises(RuntimeError, match=r"make_edges ended with status 1:\n(.|\n)*FileExistsError"):
        in_process("similarity_works", "make_edges", **arguments)


def test_comparisons_count_misses(tmp_path: Path) -> None:
    true_rows, our_rows = np.array([[0, 1], [2, 3]]), np.array([[1, 0], [2, 9]])
    for name, rows in (("true", true_rows), ("ours", our_rows)):
        np.save(tmp_path / f"{name}.npy", rows)
    recall = similarity_works.compare_neighbors(str(tmp_path / "true.npy"), str(tmp_path / "ours.npy"))
    assert recall == {"recall": 0.75}
    np.array([0, 0, 2], np.int32).tofile(tmp_path / "ours")
    np.array([0, 0, 0], np.int32).tofile(tmp_path / "peer")
    agreement = similarity_works.compare_components(str(tmp_path / "ours"), str(tmp_path / "peer"))
    assert agreement["same"] == pytest.approx(2 / 3)


def test_mixture_has_copies_and_clusters() -> None:
    matrix = np.concatenate(list(mixture.blocks(3000, 64, num_clusters=20, share_copies=0.1, seed=1)))
    again = np.concatenate(list(mixture.blocks(3000, 64, num_clusters=20, share_copies=0.1, seed=1)))
    assert matrix.dtype == np.float16 and np.array_equal(matrix, again)
    assert np.allclose(np.linalg.norm(matrix.astype(np.float32), axis=1), 1, atol=2e-3)
    nearest = (matrix.astype(np.float32) @ matrix.astype(np.float32).T - 2 * np.eye(3000)).max(axis=1)
    assert 0.05 < (nearest > 0.75).mean() < 0.3  # copies and their originals


def test_decoding_is_measured_on_drawn_photographs_and_on_a_folder(tmp_path: Path) -> None:
    drawn = decoding.draw(500, 400, np.random.default_rng(0))
    assert drawn.size == (500, 400)
    (tmp_path / "photograph.jpg").write_bytes(decoding.to_jpeg(drawn))
    assert 40_000 < (tmp_path / "photograph.jpg").stat().st_size < 90_000  # as a photograph of that size
    for folder, size in ((None, (300, 240)), (str(tmp_path), (560, 480))):
        (row,) = decoding.bench(scale=8, repeats=1, folder=folder, sizes=[size])
        assert (row.width, row.height) == size
        assert (row.psnr_worst > 53) == (size == (300, 240))  # the other size is scaled while it is decoded
        assert row.psnr_worst > 38


def test_embedding_stage_is_compared_with_its_halves(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    rates = embedding.rates("vit_tiny_patch16", 6, 1)
    assert rates.keys() == {"stage", "decoding", "model"}
    folder = str(tmp_path)
    assert embedding.make(folder, 30, (64, 48))["images"] == 30
    assert len(read_images(f"{folder}/ingest")) == 30, "some images are equal"
    peak = embedding.memory(folder)["peak"]
    torch.set_num_threads(threads)
    text = printed(embedding.tables([embedding.StageRates("vit", 8.0, 20.0, 10.0)], {30: peak}))
    assert "0.80" in text and "30" in text


def test_crops_and_reading_are_measured() -> None:
    threads = torch.get_num_threads()
    rows = crops.bench(scale=SCALE, repeats=1)
    assert torch.get_num_threads() == threads
    assert [row.work for row in rows] == ["10 crops, with decoding", "10 crops, decoded before", "reading"]
    text = printed([crops.table(rows)])
    assert all(row.work in text and row.quality in text for row in rows)
