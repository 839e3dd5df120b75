"""The works that similarity.py measures, by our code and by peers, each in a process of its own.

Times exclude imports, a warm-up, and the reading of a peer's vectors into memory. They include what our code reads from
disk. A function named `peer_...` is the peer's work; a function named `compare_...` compares the results of the two.

Legend: N vectors, Q queries, D dimensions, K clusters.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import scipy.sparse
import torch

from curation.cluster import PointFile, cut, read_blocks
from curation.copies.components import connected_components, node_type
from curation.engine.manifest import require_manifest
from curation.engine.runner import InlineRunner
from curation.files import disk_arrays, parquet, paths, vectors
from curation.files.hashes import sha256_of_bytes
from curation.files.prefetch import prefetch
from curation.search import exact, kmeans, self_join
from curation.search.config import SearchConfig
from curation.search.parts import PartSearch
from curation.search.self_join import Neighborhood
from curation.search.top_k import merge_into_best
from evaluation import knn
from evaluation.features import SHARD_IMAGES, FeatureFiles
from pipelines.bench import mixture
from pipelines.bench.processes import Measurements, memory, run_work

ROWS_PER_FILE = 16_384
# The pairs that the join looks for: at most this many for a vector, of at least this similarity.
JOIN_NEIGHBORS, JOIN_FLOOR = 64, 0.6
# The peer of the join is timed on one block of queries in this many, since exhaustive search takes the same time for
# each query.
TIMED_BLOCKS, QUERIES_PER_BLOCK = 10, 2000
# Queries and vectors of a block of torch.cdist. Measured (2026-11, two cores): the fastest of five pairs of sizes.
CDIST_QUERIES, CDIST_ROWS = 1000, 81_920
# Edges that are read at once.
EDGES_PER_BLOCK = disk_arrays.BLOCK


# Data


def make_vectors(
    folder: str, num_vectors: int, num_queries: int, width: int, num_clusters: int, share_copies: float
) -> Measurements:
    """Write vectors to Parquet files, and queries of the same mixture to queries.npy; gives the vectors' fp16 bytes."""
    Path(folder).mkdir()
    waiting = np.empty((0, width), np.float16)
    num_written = 0
    for block in mixture.blocks(
        num_vectors + num_queries, width, num_clusters=num_clusters, share_copies=share_copies, seed=0
    ):
        waiting = np.concatenate([waiting, block])
        while num_written < num_vectors and len(waiting) >= (count := min(ROWS_PER_FILE, num_vectors - num_written)):
            rows = range(num_written, num_written + count)
            ids = [sha256_of_bytes(str(row).encode())[:32] for row in rows]
            path = paths.join(folder, f"vectors-{num_written // ROWS_PER_FILE:05d}.parquet")
            parquet.write_table(path, vectors.make_table(ids, waiting[:count]))
            waiting, num_written = waiting[count:], num_written + count
    np.save(Path(folder, "queries.npy"), waiting)
    return {"bytes": 2.0 * width * num_vectors}


def make_edges(folder: str, num_edges: int) -> Measurements:
    """Write edges between permuted nodes, int32, to edges.bin, and the number of nodes to nodes.npy.

    Three equal parts of the nodes form one giant component, long chains, and components of up to 6 nodes.
    """
    Path(folder).mkdir()
    generator = np.random.default_rng(0)
    part = num_edges // 4
    node = np.arange(1, part)
    giant = np.stack([node, (generator.random(part - 1) * node).astype(np.int64)], axis=1)  # a tree over all of it
    cut = generator.random(part - 1) < 1e-5
    chains = np.stack([node - 1, node], axis=1)[~cut] + part
    small = np.stack([node - 1, node], axis=1)[generator.random(part - 1) > 0.3] + 2 * part
    small = small[small[:, 1] % 6 != 2 * part % 6]
    more = generator.integers(part, size=(num_edges - len(giant) - len(chains) - len(small), 2))  # of the giant
    edges = np.concatenate([giant, chains, small, more])
    del giant, chains, small, more
    nodes = generator.permutation(3 * part).astype(np.int32)
    nodes[edges[generator.permutation(num_edges)]].tofile(Path(folder, "edges.bin"))
    np.save(Path(folder, "nodes.npy"), np.array([3 * part]))
    return {"bytes": 8.0 * num_edges}


# All pairs above a similarity


def all_pairs(
    folder: str,
    output: str,
    rows_per_cell: int,
    num_probes: int,
    rows_per_part: int,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Measurements:
    """The join, from files to files: training, exchange, join, and its own measurement of recall."""
    search = SearchConfig(
        backend="ivf",
        device=device,
        rows_per_cell=rows_per_cell,
        num_probes=num_probes,
        rows_per_part=rows_per_part,
        min_recall=0,
    )
    neighborhood = Neighborhood(search, JOIN_NEIGHBORS, JOIN_FLOOR, num_buckets=16)
    started = time.perf_counter()
    manifest = self_join.run(neighborhood, _files(folder), output, InlineRunner(), content_hash="mixture")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "edges": float(manifest.totals["edges"])}


def peer_all_pairs(folder: str) -> Measurements:
    """faiss's exhaustive search for the neighbours of all vectors, timed on a share of the queries."""
    matrix = _read_all(folder)
    started = time.perf_counter()
    flat = faiss.IndexFlatIP(matrix.shape[1])
    flat.add(matrix)
    adding = time.perf_counter() - started
    starts = range(0, len(matrix), QUERIES_PER_BLOCK)[::TIMED_BLOCKS]
    timed = sum(len(matrix[start : start + QUERIES_PER_BLOCK]) for start in starts)
    started = time.perf_counter()
    for start in starts:
        flat.search(matrix[start : start + QUERIES_PER_BLOCK], JOIN_NEIGHBORS)
    return {"seconds": adding + (time.perf_counter() - started) * len(matrix) / timed}


def compare_all_pairs(folder: str, joined: str, num_sampled: int) -> Measurements:
    """Recall: the share of the true neighbours of some vectors that are edges of the join, in either direction."""
    matrix = _read_all(folder)
    sampled = np.unique(np.linspace(0, len(matrix) - 1, min(num_sampled, len(matrix))).astype(np.int64))
    row = exact.search(matrix[sampled], [matrix], JOIN_NEIGHBORS + 1, floor=JOIN_FLOOR)[1]
    query, column = np.nonzero((row >= 0) & (row != sampled[:, None]))
    true = _pair_numbers(sampled[query], row[query, column], len(matrix))
    joined_pairs = []
    for name in require_manifest(joined).files("edges"):
        edges = parquet.read_table(paths.join(joined, name), self_join.EDGES, ["place", "other_place"])
        one, other = (edges.column(end).to_numpy() for end in ("place", "other_place"))
        joined_pairs.append(_pair_numbers(one, other, len(matrix)))
    recall = float(np.isin(true, np.concatenate(joined_pairs)).mean())
    return {"recall": recall, "true_pairs": float(len(np.unique(true)))}


def _pair_numbers(one: np.ndarray, other: np.ndarray, num_vectors: int) -> np.ndarray:
    """A number for each pair, the same in both directions."""
    numbers: np.ndarray = np.minimum(one, other) * num_vectors + np.maximum(one, other)
    return numbers


# Neighbours of queries


def neighbors(
    folder: str, output: str, k: int, rows_per_cell: int, num_probes: int, files_per_part: int
) -> Measurements:
    """Approximate neighbours, part by part: `seconds` include reading and building, `searching` does not."""
    queries = np.load(Path(folder, "queries.npy"), allow_pickle=False)
    search = SearchConfig(backend="ivf", rows_per_cell=rows_per_cell, num_probes=num_probes)
    files = _files(folder)
    searching = 0.0
    started = time.perf_counter()
    best_similarity: np.ndarray = np.full((len(queries), k), -np.inf, np.float32)
    best_row: np.ndarray = np.full((len(queries), k), -1, np.int64)
    first = 0
    for number in range(0, len(files), files_per_part):
        part = PartSearch(search, list(_stream(files[number : number + files_per_part])))
        built = time.perf_counter()
        similarity, row = part.search(queries, k)
        query, column = np.nonzero(row >= 0)
        merge_into_best(best_similarity, best_row, query, row[query, column] + first, similarity[query, column])
        searching += time.perf_counter() - built
        first += part.num_vectors
    seconds = time.perf_counter() - started
    np.save(output, best_row)
    return {"seconds": seconds, "searching": searching}


def exact_neighbors(folder: str, output: str, k: int, num_files: int) -> Measurements:
    """Exact neighbours among the vectors of the first files, streamed."""
    queries = np.load(Path(folder, "queries.npy"), allow_pickle=False)
    started = time.perf_counter()
    row = exact.search(queries, _stream(_files(folder)[:num_files]), k)[1]
    seconds = time.perf_counter() - started
    np.save(output, row)
    return {"seconds": seconds}


def peer_neighbors(folder: str, output: str, k: int) -> Measurements:
    """faiss's exhaustive search; the time excludes adding the vectors, a copy in memory."""
    matrix = _read_all(folder)
    queries = np.load(Path(folder, "queries.npy"), allow_pickle=False).astype(np.float32)
    flat = faiss.IndexFlatIP(matrix.shape[1])
    flat.add(matrix)
    started = time.perf_counter()
    row = flat.search(queries, k)[1]
    seconds = time.perf_counter() - started
    np.save(output, row)
    return {"seconds": seconds}


def make_features(folder: str, vectors_folder: str) -> Measurements:
    """Write the vectors in the format of the evaluations' features: files of float32."""
    Path(folder).mkdir()
    matrix = _read_all(vectors_folder)
    for number, start in enumerate(range(0, len(matrix), SHARD_IMAGES)):
        np.save(paths.join(folder, f"features-{number:05d}.npy"), matrix[start : start + SHARD_IMAGES])
    return {"bytes": float(matrix.nbytes)}


def classify_neighbors(folder: str, vectors_folder: str, output: str, k: int, num_files: int) -> Measurements:
    """The neighbours that vote in k-NN evaluation, among the features of the first files, streamed."""
    names = [name for name in paths.list_names(folder) if name.endswith(".npy")][:num_files]
    features = FeatureFiles(tuple(paths.join(folder, name) for name in names))
    queries = torch.from_numpy(np.load(Path(vectors_folder, "queries.npy"), allow_pickle=False))
    started = time.perf_counter()
    rows = knn.neighbors(features.blocks(), queries, k=k)[1]
    seconds = time.perf_counter() - started
    np.save(output, rows.numpy())
    return {"seconds": seconds}


def peer_classify_neighbors(vectors_folder: str, output: str, k: int) -> Measurements:
    """torch.cdist and topk in blocks; the features are in memory and have length 1 before the clock starts."""
    normalize = torch.nn.functional.normalize
    matrix = normalize(torch.from_numpy(_read_all(vectors_folder)))
    queries = np.load(Path(vectors_folder, "queries.npy"), allow_pickle=False).astype(np.float32)
    nearest = []
    started = time.perf_counter()
    for block in torch.split(normalize(torch.from_numpy(queries)), CDIST_QUERIES):
        distances, rows = torch.full((len(block), k), torch.inf), torch.zeros(len(block), k, dtype=torch.int64)
        for first in range(0, len(matrix), CDIST_ROWS):
            block_distances = torch.cdist(block, matrix[first : first + CDIST_ROWS])
            smallest, columns = block_distances.topk(min(k, block_distances.shape[1]), largest=False)
            distances, order = torch.cat([distances, smallest], 1).topk(k, largest=False)
            rows = torch.cat([rows, columns + first], 1).gather(1, order)
        nearest.append(rows)
    seconds = time.perf_counter() - started
    np.save(output, torch.cat(nearest).numpy())
    return {"seconds": seconds}


def compare_neighbors(true: str, ours: str) -> Measurements:
    """Recall: the share of the true neighbours that are among ours."""
    true_rows, our_rows = (np.load(path, allow_pickle=False) for path in (true, ours))
    return {"recall": float((true_rows[:, :, None] == our_rows[:, None, :]).any(axis=2).mean())}


# Clusters


def cluster(folder: str, output: str, num_clusters: int, num_iterations: int) -> Measurements:
    """Spherical k-means as in the cluster stage: vectors are copied to plain files once, and read in each iteration."""
    started = time.perf_counter()
    points = []
    for number, file in enumerate(_files(folder)):
        matrix = vectors.read_file(file)[1]
        path = paths.join(folder, f"points-{number:05d}.npy")
        np.save(path, matrix)
        points.append(PointFile(path, len(matrix)))
    (part,) = cut(points, sum(file.rows for file in points))
    fit = kmeans.fit(lambda: read_blocks(part), num_clusters, num_iterations=num_iterations, start="random", seed=0)
    seconds = time.perf_counter() - started
    np.save(output, fit.centroids)
    for point in points:
        paths.delete(point.path)
    return {"seconds": seconds}


def peer_cluster(folder: str, output: str, num_clusters: int, num_iterations: int) -> Measurements:
    """faiss's spherical k-means over all of the same vectors, in memory."""
    matrix = _read_all(folder)
    peer = faiss.Kmeans(
        matrix.shape[1],
        num_clusters,
        niter=num_iterations,
        spherical=True,
        seed=1,
        max_points_per_centroid=len(matrix),
        min_points_per_centroid=1,
    )
    started = time.perf_counter()
    peer.train(matrix)
    seconds = time.perf_counter() - started
    centroids = np.asarray(peer.centroids)
    np.save(output, centroids / np.linalg.norm(centroids, axis=1, keepdims=True))
    return {"seconds": seconds}


def compare_clusters(folder: str, ours: str, peer: str) -> Measurements:
    """Objectives: the mean cosine to the nearest centroid."""
    total = np.zeros(2)
    count = 0
    both = [np.load(path, allow_pickle=False) for path in (ours, peer)]
    for file in _files(folder):
        matrix = vectors.read_file(file)[1]
        total += [exact.assign(matrix, centroids)[1].sum(dtype=np.float64) for centroids in both]
        count += len(matrix)
    return {"ours": float(total[0] / count), "peer": float(total[1] / count)}


# Components


def components(folder: str, output: str) -> Measurements:
    """Connected components of edges read block by block; the parents of the nodes are on disk."""
    num_nodes = int(np.load(Path(folder, "nodes.npy"), allow_pickle=False)[0])
    path = Path(folder, "edges.bin")
    num_edges = path.stat().st_size // 8

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, num_edges, EDGES_PER_BLOCK):
            count = min(EDGES_PER_BLOCK, num_edges - start)
            edges = np.fromfile(path, np.int32, 2 * count, offset=8 * start).reshape(-1, 2)
            yield edges[:, 0], edges[:, 1]

    started = time.perf_counter()
    parent = disk_arrays.on_disk(num_nodes, node_type(num_nodes))
    connected_components(num_nodes, blocks(), parent=parent)
    seconds = time.perf_counter() - started
    with open(output, "wb") as file:
        for part in disk_arrays.blocks(num_nodes):
            parent[part].tofile(file)
    return {"seconds": seconds}


def peer_components(folder: str, output: str) -> Measurements:
    """scipy's connected components of the same edges in memory."""
    num_nodes = int(np.load(Path(folder, "nodes.npy"), allow_pickle=False)[0])
    edges = np.fromfile(Path(folder, "edges.bin"), np.int32).reshape(-1, 2)
    first, second = (np.ascontiguousarray(edges[:, end]) for end in (0, 1))
    started = time.perf_counter()
    coordinates = scipy.sparse.coo_array((np.ones(len(first), np.int8), (first, second)), (num_nodes, num_nodes))
    label = scipy.sparse.csgraph.connected_components(coordinates.tocsr(), directed=False)[1]
    seconds = time.perf_counter() - started
    smallest = np.empty(int(label.max()) + 1, np.int32)
    smallest[label[::-1]] = np.arange(num_nodes - 1, -1, -1, dtype=np.int32)  # the last write is the smallest node
    smallest[label].tofile(output)
    return {"seconds": seconds, "components": float(len(smallest))}


def compare_components(ours: str, peer: str) -> Measurements:
    """The share of the nodes in the same component; a component's name is its smallest node."""
    return {"same": float((np.fromfile(ours, np.int32) == np.fromfile(peer, np.int32)).mean())}


# The process


WORKS: tuple[Callable[..., Measurements], ...] = (
    make_vectors,
    make_edges,
    all_pairs,
    peer_all_pairs,
    compare_all_pairs,
    neighbors,
    exact_neighbors,
    peer_neighbors,
    make_features,
    classify_neighbors,
    peer_classify_neighbors,
    compare_neighbors,
    cluster,
    peer_cluster,
    compare_clusters,
    components,
    peer_components,
    compare_components,
)


def measure(name: str, **arguments: Any) -> Measurements:
    """The measurements of the work of that name, and `peak`: bytes of memory beyond the memory before it.

    Mapped pages of files count as memory. `peak` is NaN outside Linux.
    """
    _warm_up()
    before = memory("VmRSS")
    work = next(work for work in WORKS if work.__name__ == name)
    return work(**arguments) | {"peak": memory("VmHWM") - before}


def _warm_up() -> None:
    """Run small products, so that libraries load and start their threads."""
    matrix = np.eye(256, 64, dtype=np.float16)
    exact.search(matrix, [matrix], 4)
    flat = faiss.IndexFlatIP(64)
    flat.add(matrix.astype(np.float32))
    flat.search(matrix.astype(np.float32), 4)


def _files(folder: str) -> list[str]:
    return [paths.join(folder, name) for name in paths.list_names(folder) if name.endswith(".parquet")]


def _stream(files: Sequence[str]) -> Iterator[np.ndarray]:
    return (matrix for _, matrix in prefetch(vectors.read_file, files))


def _read_all(folder: str) -> np.ndarray:
    matrix: np.ndarray = np.concatenate([vectors.read_file(file)[1].astype(np.float32) for file in _files(folder)])
    return matrix


if __name__ == "__main__":
    run_work({work.__name__: functools.partial(measure, work.__name__) for work in WORKS})
