"""The rows of gpu.py about search: exact search, the join of a collection with itself, and k-means.

The vectors are drawn on the device: clustered unit vectors, in host memory as float16 afterwards. curation.search takes
them from there. The peers have them on the device before the clock starts. A peer is faiss on the GPU where that build
is installed, and a plain loop of torch's products and topk in any case.

Legend: N vectors, Q queries, D dimensions, K neighbours or clusters.
"""

# torch's modules have untyped methods.
# mypy: disable-error-code="no-untyped-call"

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from curation.search import exact, kmeans
from pipelines.bench.gpu_device import open_device, synchronize
from pipelines.bench.gpu_row import Figures, RowWork, Setup

WIDTH = 384
# Full and tiny: vectors; vectors of a first, smaller run; queries.
SEARCH = (10_000_000, 1_000_000, 10_000), (6000, 3000, 100)
NUM_NEIGHBORS = 32
# Full and tiny: as above. The queries are as many of the vectors as the exact join compares at a time.
JOIN = (10_000_000, 1_000_000, 65_536), (6000, 3000, 1000)
JOIN_NEIGHBORS, JOIN_FLOOR = 64, 0.6
# Full and tiny: vectors of the join by cells. On two cores of a CPU, 200,000 take 30 s (docs/benchmarks.md).
CELLS = 200_000, 2000
# Full and tiny: vectors, clusters, iterations.
KMEANS = (2_500_000, 100_000, 2), (4000, 50, 2)
VECTORS_PER_CLUSTER = 1000
# Vectors drawn at a time, and vectors and queries of one product of the plain loop: at most 2 GB of float16.
DRAWN_ROWS, PLAIN_ROWS, PLAIN_QUERIES = 1_000_000, 131_072, 8192
# Points that k-means takes at a time, as in the cluster stage.
ROWS_PER_BLOCK = 262_144


def draw(num_vectors: int, num_centres: int, device: str, *, seed: int = 0) -> list[np.ndarray]:
    """Blocks of clustered unit vectors (n, D) float16; a vector and its centre have a cosine of about 0.7.

    The centres are the same for every seed.
    """
    generator = torch.Generator(device).manual_seed(0)
    centres = functional.normalize(torch.randn(num_centres, WIDTH, device=device, generator=generator))
    generator.manual_seed(1 + seed)
    blocks = []
    for first in range(0, num_vectors, DRAWN_ROWS):
        count = min(DRAWN_ROWS, num_vectors - first)
        # The square of a uniform number: some clusters are many times larger than others.
        position = torch.rand(count, device=device, generator=generator).square() * num_centres
        noise = torch.randn(count, WIDTH, device=device, generator=generator) / WIDTH**0.5
        nearest = position.long().clamp(max=num_centres - 1)
        blocks.append(functional.normalize(centres[nearest] + noise).half().cpu().numpy())
    return blocks


# Search and join


def search(setup: Setup) -> Iterator[Figures]:
    """The nearest vectors to queries of the same clusters, by exact search."""
    num_vectors, num_first, num_queries = SEARCH[setup.tiny]
    open_device(setup.device)
    num_centres = num_vectors // VECTORS_PER_CLUSTER
    blocks = draw(num_vectors, num_centres, setup.device)
    queries = np.concatenate(draw(num_queries, num_centres, setup.device, seed=1))
    plain_seconds, plain_rows = _time_plain_search(setup, queries, blocks)
    _warm_up(setup, blocks)
    others: dict[str, float | str] = {"faiss on the GPU, s": faiss_seconds(queries, blocks, NUM_NEIGHBORS)}
    for count in (num_first, num_vectors):
        seconds, (_, rows) = _timed(setup, functools.partial(_search, setup, queries, blocks, count, NUM_NEIGHBORS))
        others = others | {f"s for {count:,}": seconds}
        if count == num_vectors:
            others["the plain loop's neighbours among ours"] = _agreement(rows, plain_rows)
        yield Figures(
            count * len(queries) / seconds,
            f"pairs/s, {NUM_NEIGHBORS} neighbours of {len(queries):,} among {count:,} x {WIDTH}",
            "",
            f"plain loop over {num_vectors:,} on the device: {plain_seconds:.3g} s",
            others,
        )


def join(setup: Setup) -> Iterator[Figures]:
    """One block of the exact join: some vectors against all, and the time of all blocks that follows."""
    num_vectors, num_first, num_queries = JOIN[setup.tiny]
    open_device(setup.device)
    blocks = draw(num_vectors, num_vectors // VECTORS_PER_CLUSTER, setup.device)
    queries = blocks[0][:num_queries]
    _warm_up(setup, blocks)
    for count in (num_first, num_vectors):
        k = JOIN_NEIGHBORS + 1  # a vector finds itself
        work = functools.partial(_search, setup, queries, blocks, count, k, floor=JOIN_FLOOR)
        seconds, (_, rows) = _timed(setup, work)
        whole = seconds * (num_vectors / count) * (num_vectors / len(queries))
        yield Figures(
            count * len(queries) / seconds,
            f"pairs/s, {len(queries):,} against {count:,} x {WIDTH}, floor {JOIN_FLOOR}",
            "",
            "",
            {
                "s for this block": seconds,
                f"hours for all pairs of {num_vectors:,}, from this block": whole / 3600,
                "neighbours of a vector, mean": float((rows >= 0).sum(axis=1).mean()) - 1,
            },
        )


def _time_plain_search(setup: Setup, queries: np.ndarray, blocks: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds and rows (Q, K) of the plain loop, after a warm-up; the vectors are on the device only meanwhile."""
    vectors = upload(blocks, setup.device)
    plain_search(queries[:10], vectors[:1], NUM_NEIGHBORS)
    seconds, rows = _timed(setup, lambda: plain_search(queries, vectors, NUM_NEIGHBORS))
    return seconds, rows


def _warm_up(setup: Setup, blocks: Sequence[np.ndarray]) -> None:
    """Search a little, so that kernels are loaded."""
    exact.search(blocks[0][:100], [blocks[0][:50_000]], NUM_NEIGHBORS, device=setup.device)


def join_by_cells(setup: Setup) -> Iterator[Figures]:
    """The join with inverted lists, from files to files, with the sizes of the benchmark `join`."""
    from pipelines.bench import similarity, similarity_works  # they need faiss, which the other rows do not

    open_device(setup.device)
    num_vectors, width = CELLS[setup.tiny], similarity.WIDTH_JOIN
    folder, output = str(Path(setup.folder, "vectors")), str(Path(setup.folder, "joined"))
    similarity_works.make_vectors(
        folder,
        num_vectors,
        0,
        width,
        num_vectors // similarity.VECTORS_PER_CLUSTER[width],
        similarity.SHARE_COPIES,
    )
    measured = similarity_works.all_pairs(
        folder,
        output,
        rows_per_part=similarity.JOIN_ROWS_PER_PART,
        device=setup.device,
        **similarity.JOIN,
    )
    others: dict[str, float | str] = {"edges": measured["edges"]}
    unit = f"s, all pairs above {similarity_works.JOIN_FLOOR} of {num_vectors:,} x {width}"
    yield Figures(measured["seconds"], unit, "recall 0.99", "", others)
    num_sampled = min(similarity.RECALL_SAMPLE, num_vectors)
    recall = similarity_works.compare_all_pairs(folder, output, num_sampled)["recall"]
    yield Figures(measured["seconds"], unit, "recall 0.99", "", others | {"recall": recall})


def plain_search(queries: np.ndarray, vectors: Sequence[Tensor], k: int) -> np.ndarray:
    """Rows (Q, k) of the nearest vectors by products in the vectors' own type and topk, block by block."""
    device = vectors[0].device
    results = []
    for start in range(0, len(queries), PLAIN_QUERIES):
        part = torch.from_numpy(queries[start : start + PLAIN_QUERIES]).to(device, vectors[0].dtype)
        best = torch.empty(len(part), 0, device=device, dtype=part.dtype)
        rows = torch.empty(len(part), 0, device=device, dtype=torch.int64)
        first = 0
        for matrix in vectors:
            for block in matrix.split(PLAIN_ROWS):
                products, columns = (part @ block.T).topk(min(k, len(block)), dim=1)
                best, order = torch.cat([best, products], 1).topk(min(k, best.shape[1] + products.shape[1]), dim=1)
                rows = torch.cat([rows, columns + first], 1).gather(1, order)
                first += len(block)
        results.append(rows.cpu().numpy())
    result: np.ndarray = np.concatenate(results)
    return result


def upload(blocks: Sequence[np.ndarray], device: str) -> list[Tensor]:
    """The blocks on the device: float16 on a GPU, float32 on a CPU."""
    return [
        torch.from_numpy(block).to(device, torch.float16 if device == "cuda" else torch.float32) for block in blocks
    ]


def faiss_seconds(queries: np.ndarray, blocks: Sequence[np.ndarray], k: int) -> float | str:
    """Seconds of a search in faiss's flat index on the GPU, in float16, or why there are none."""
    try:
        faiss: Any = importlib.import_module("faiss")
    except ModuleNotFoundError:
        return "not installed"
    if getattr(faiss, "StandardGpuResources", None) is None or faiss.get_num_gpus() == 0:
        return "not installed (this build of faiss has no GPU)"
    try:
        options = faiss.GpuIndexFlatConfig()
        options.useFloat16 = True
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), WIDTH, options)
        for block in blocks:
            index.add(block.astype(np.float32))
        started = time.perf_counter()
        index.search(queries.astype(np.float32), k)
        return time.perf_counter() - started
    except Exception as error:  # a peer that fails does not stop the row
        return f"failed: {str(error).strip().splitlines()[-1]}"


def _search(
    setup: Setup, queries: np.ndarray, blocks: Sequence[np.ndarray], count: int, k: int, *, floor: float = -np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Our exact search among the first `count` vectors of the blocks."""
    return exact.search(queries, _first(blocks, count), k, floor=floor, device=setup.device)


def _first(blocks: Sequence[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The first `count` vectors of the blocks."""
    for block in blocks:
        if count <= 0:
            return
        yield block[:count]
        count -= len(block)


def _agreement(rows: np.ndarray, plain_rows: np.ndarray) -> float:
    """The share of the rows of the plain loop (Q, K) that are among ours (Q, K)."""
    parts = [
        (plain_rows[start : start + 1000, :, None] == rows[start : start + 1000, None, :]).any(axis=2)
        for start in range(0, len(rows), 1000)
    ]
    return float(np.concatenate(parts).mean())


def _timed(setup: Setup, work: Callable[[], Any]) -> tuple[float, Any]:
    synchronize(setup.device)
    started = time.perf_counter()
    result = work()
    synchronize(setup.device)
    return time.perf_counter() - started, result


# K-means


def cluster(setup: Setup) -> Iterator[Figures]:
    """Iterations of spherical k-means over vectors in host memory, from random vectors as the first centroids."""
    num_vectors, num_clusters, num_iterations = KMEANS[setup.tiny]
    open_device(setup.device)
    points = np.concatenate(draw(num_vectors, num_vectors // VECTORS_PER_CLUSTER, setup.device))
    rows = kmeans.start_rows(num_vectors, num_clusters, "random", 0)
    first_centroids = kmeans.initial_centroids(points[rows], num_clusters, "random", 0)
    plain_seconds, plain_clusters = _time_plain_assign(setup, points, first_centroids)
    blocks = [points[first : first + ROWS_PER_BLOCK] for first in range(0, num_vectors, ROWS_PER_BLOCK)]
    clusters: np.ndarray | None = None
    others: dict[str, float | str] = {}

    def reduce_all(centroids: np.ndarray) -> kmeans.Reduction:
        nonlocal clusters
        reduction, clusters = kmeans.reduce_points(blocks, centroids, guess=clusters, device=setup.device)
        return reduction

    iterations = kmeans.lloyd(first_centroids, num_iterations, reduce_all)
    for iteration in range(1, num_iterations + 1):
        seconds, (_, objective, _) = _timed(setup, lambda: next(iterations))
        if iteration == 1:
            assert clusters is not None
            others["the plain loop's clusters like ours"] = float((clusters == plain_clusters).mean())
        others = others | {
            f"s of iteration {iteration}": seconds,
            f"mean cosine in iteration {iteration}": objective / num_vectors,
        }
        yield Figures(
            num_vectors / seconds,
            f"vectors/s, an iteration over {num_vectors:,} x {WIDTH}, {num_clusters:,} clusters",
            "",
            f"plain products and argmax, on the device: {plain_seconds:.3g} s, without the sums",
            others,
        )


def _time_plain_assign(setup: Setup, points: np.ndarray, centroids: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds and clusters (N,) of the plain products, after a warm-up."""
    (on_device,) = upload([points], setup.device)
    plain_assign(on_device[:1000], centroids)
    seconds, clusters = _timed(setup, lambda: plain_assign(on_device, centroids))
    return seconds, clusters


def plain_assign(points: Tensor, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid (N,) of each point by products in the points' own type and argmax."""
    others = torch.from_numpy(centroids).to(points.device, points.dtype)
    # (block, clusters) products of at most about 2 GB
    rows = max(1, min(len(points), 1_000_000_000 // len(others)))
    result: np.ndarray = torch.cat([(block @ others.T).argmax(1) for block in points.split(rows)]).cpu().numpy()
    return result


ROWS: dict[str, RowWork] = {"search": search, "join": join, "cells": join_by_cells, "kmeans": cluster}
