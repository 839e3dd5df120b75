"""Measures search, clustering and components against the tools that people use otherwise, and as the input grows.

The data are mixtures with unequal clusters and planted copies (mixture.py), as Parquet shards of the vectors schema in
a temporary folder. The number of clusters is proportional to the number of vectors. So the pairs to find grow little
faster than the vectors: most are copies (5,970 edges among 50,000 vectors, 31,100 among 200,000). Our code reads from
that folder; the peers have everything in memory before their clock starts. Every work runs in a process of its own
(similarity_works.py).
"""

import functools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from curation.files import paths
from evaluation.features import SHARD_IMAGES
from pipelines.bench.processes import Measurements, in_process
from pipelines.bench.similarity_works import ROWS_PER_FILE, TIMED_BLOCKS
from pipelines.bench.tables import Comparison, comparison_table, make_table, number

WIDTH_JOIN, WIDTH_SEARCH, SHARE_COPIES = 512, 384, 0.05
# Vectors of a mean cluster, by width. Sizes fall as 1/rank, so the smallest is an eighth of the mean. The neighbours of
# a query must not outnumber a cluster, or the last of them are noise.
VECTORS_PER_CLUSTER = {WIDTH_JOIN: 200, WIDTH_SEARCH: 1000}
NUM_JOINED = 200_000
GROWTH = (50_000, 100_000, 200_000, 400_000)
# For a recall of 0.99 at every size. Measured (2026-11): 50,000 vectors, 8 probes 0.995; 200,000, 8 probes 0.975, 10
# 0.988, 12 0.995; 400,000, 14 probes 0.991.
JOIN = {"rows_per_cell": 256, "num_probes": 14}
JOIN_ROWS_PER_PART = 25_000
RECALL_SAMPLE = 5000
NUM_SEARCHED, NUM_QUERIES, NUM_NEIGHBORS = 1_000_000, 10_000, 32
# For a recall of 0.95. Measured (2026-11, two cores, 1,000,000 vectors in one part): 22 probes of cells of 1,000 0.951.
# In four parts, cells of 250 need 24 probes in each, for 0.950, in three times the time.
SEARCH = {"rows_per_cell": 1000, "num_probes": 22}
SEARCH_PARTS = 1
NUM_TRAINED, NUM_CLASSIFIED, NUM_VOTES = 500_000, 20_000, 200
NUM_CLUSTERED, NUM_CLUSTERS, NUM_ITERATIONS = 500_000, 4096, 8
NUM_EDGES = 50_000_000


@dataclass(frozen=True)
class GrowthRow:
    """One work at one size of its input."""

    work: str
    size: int
    seconds: float
    edges_and_recall: str
    peak_bytes: float
    input_bytes: float


@dataclass(frozen=True)
class SimilarityBench:
    """The measurements so far, and how further ones are made."""

    folder: str
    """Temporary."""
    scale: int
    """Divides every size."""
    repeats: int | None
    """Runs whose median counts; None for the default of each work."""
    measure: Callable[..., Measurements]
    """Runs the work of similarity_works.py of that name with these arguments."""
    rows: list[Comparison] = field(default_factory=list)
    growth_rows: list[GrowthRow] = field(default_factory=list)
    measured: dict[str, Measurements] = field(default_factory=dict)
    """By work and arguments."""

    def scaled(self, size: int) -> int:
        """The full size divided by the scale."""
        return max(1, size // self.scale)

    def path(self, name: str) -> str:
        """The path of a file in the temporary folder."""
        return paths.join(self.folder, name)

    def run(self, name: str, *, repeats: int = 1, **arguments: Any) -> Measurements:
        """The measurements of a work: medians of `repeats` runs, made once for all rows."""
        key = json.dumps([name, arguments])
        if key not in self.measured:
            runs = []
            for _ in range(repeats):
                if "output" in arguments:
                    paths.delete(arguments["output"])  # otherwise a finished join would not run again
                runs.append(self.measure(name, **arguments))
            self.measured[key] = {value: statistics.median(run[value] for run in runs) for value in runs[0]}
        return self.measured[key]

    def compare(
        self,
        work: str,
        peer: str,
        ours: Measurements,
        peer_seconds: float,
        target: str,
        quality: str,
        input_bytes: float,
        *,
        seconds: str = "seconds",
        ratio: float | None = None,
    ) -> None:
        """Add a row. `seconds` names our measurement to compare; `ratio` takes the place of the peer's time by ours."""
        our_seconds = ours[seconds]
        ratio = peer_seconds / our_seconds if ratio is None else ratio
        self.rows.append(
            Comparison(work, peer, "s", our_seconds, peer_seconds, target, quality, ratio, ours["peak"], input_bytes)
        )

    def grow(self, work: str, size: int, ours: Measurements, input_bytes: float, edges_and_recall: str = "") -> None:
        """Add a row of the second table."""
        self.growth_rows.append(GrowthRow(work, size, ours["seconds"], edges_and_recall, ours["peak"], input_bytes))


def bench(
    names: Sequence[str],
    *,
    scale: int = 1,
    repeats: int | None = None,
    measure: Callable[..., Measurements] | None = None,
) -> SimilarityBench:
    """The rows of the named works (see WORKS), with every size divided by `scale`.

    Values are medians of `repeats` runs; by default 3, or 1 where a run takes minutes. `measure` runs one work of
    similarity_works.py, by default in a process of its own.
    """
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        result = SimilarityBench(folder, scale, repeats, measure or functools.partial(in_process, "similarity_works"))
        for name in names:
            WORKS[name](result)
    return result


def _join(bench: SimilarityBench) -> None:
    num_vectors = bench.scaled(NUM_JOINED)
    ours = _run_join(bench, num_vectors, repeats=3)
    folder, input_bytes = _make_vectors(bench, num_vectors, 0, WIDTH_JOIN)
    peer_seconds = bench.run("peer_all_pairs", folder=folder)["seconds"]
    work = f"all pairs above 0.6 of {num_vectors:,} x {WIDTH_JOIN}"
    quality = f"recall {ours['recall']:.4f} (0.99)"
    bench.compare(work, "IndexFlatIP, k = 64 [1]", ours, peer_seconds, "8", quality, input_bytes)


def _growth(bench: SimilarityBench) -> None:
    sizes = [bench.scaled(size) for size in GROWTH]
    seconds = []
    for size in sizes:
        ours = _run_join(bench, size, repeats=1)
        input_bytes = _make_vectors(bench, size, 0, WIDTH_JOIN)[1]
        seconds.append(ours["seconds"])
        edges_and_recall = f"{ours['edges']:,.0f} edges, recall {ours['recall']:.4f}"
        bench.grow("all pairs above 0.6", size, ours, input_bytes, edges_and_recall)
    exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    work = f"the same of {sizes[0]:,} to {sizes[-1]:,}: exponent of the time"
    bench.compare(work, "itself", ours, math.nan, "at most 1.3", "", input_bytes, ratio=exponent)


def _run_join(bench: SimilarityBench, num_vectors: int, *, repeats: int) -> Measurements:
    folder, _ = _make_vectors(bench, num_vectors, 0, WIDTH_JOIN)
    output = bench.path(f"joined-{num_vectors}")
    ours = bench.run(
        "all_pairs",
        repeats=bench.repeats or repeats,
        folder=folder,
        output=output,
        rows_per_part=bench.scaled(JOIN_ROWS_PER_PART),
        **JOIN,
    )
    num_sampled = bench.scaled(RECALL_SAMPLE)
    recall = bench.run("compare_all_pairs", folder=folder, joined=output, num_sampled=num_sampled)["recall"]
    return ours | {"recall": recall}


def _search(bench: SimilarityBench) -> None:
    num_vectors, num_queries = bench.scaled(NUM_SEARCHED), bench.scaled(NUM_QUERIES)
    folder, input_bytes = _make_vectors(bench, num_vectors, num_queries, WIDTH_SEARCH)
    peer_seconds = _run_flat_search(bench, folder)
    output = bench.path("near.npy")
    ours = bench.run(
        "neighbors",
        repeats=bench.repeats or 3,
        folder=folder,
        output=output,
        k=NUM_NEIGHBORS,
        files_per_part=-(-_num_files(num_vectors) // SEARCH_PARTS),
        **SEARCH,
    )
    recall = bench.run("compare_neighbors", true=bench.path("flat.npy"), ours=output)["recall"]
    work = f"{NUM_NEIGHBORS} neighbours of {num_queries:,} in {num_vectors:,} x {WIDTH_SEARCH}"
    quality = f"recall {recall:.4f} (0.95)"
    for part, seconds, target in (("search alone", "searching", "10"), ("with building", "seconds", "3")):
        bench.compare(
            f"{work}, {part}", "IndexFlatIP", ours, peer_seconds, target, quality, input_bytes, seconds=seconds
        )


def _exact(bench: SimilarityBench) -> None:
    num_vectors, num_queries = bench.scaled(NUM_SEARCHED), bench.scaled(NUM_QUERIES)
    folder, input_bytes = _make_vectors(bench, num_vectors, num_queries, WIDTH_SEARCH)
    peer_seconds = _run_flat_search(bench, folder)
    output = bench.path("exact.npy")
    for num_files in _half_and_all(_num_files(num_vectors)):
        ours = bench.run("exact_neighbors", folder=folder, output=output, k=NUM_NEIGHBORS, num_files=num_files)
        size = min(num_vectors, num_files * ROWS_PER_FILE)
        bench.grow("exact search from disk", size, ours, input_bytes * size / num_vectors)
    recall = bench.run("compare_neighbors", true=bench.path("flat.npy"), ours=output)["recall"]
    work = f"the same, exact, streamed from disk: {num_vectors:,}"
    bench.compare(work, "IndexFlatIP in memory", ours, peer_seconds, "1.2", f"recall {recall:.4f}", input_bytes)


def _knn(bench: SimilarityBench) -> None:
    num_vectors, num_queries, k = bench.scaled(NUM_TRAINED), bench.scaled(NUM_CLASSIFIED), NUM_VOTES
    vectors_folder, _ = _make_vectors(bench, num_vectors, num_queries, WIDTH_SEARCH)
    folder, repeats = bench.path("features"), bench.repeats or 1
    input_bytes = bench.run("make_features", folder=folder, vectors_folder=vectors_folder)["bytes"]
    true, output = bench.path("cdist.npy"), bench.path("voters.npy")
    peer = bench.run("peer_classify_neighbors", repeats=repeats, vectors_folder=vectors_folder, output=true, k=k)
    for num_files in _half_and_all(-(-num_vectors // SHARD_IMAGES)):
        ours = bench.run(
            "classify_neighbors",
            repeats=repeats,
            folder=folder,
            vectors_folder=vectors_folder,
            output=output,
            k=k,
            num_files=num_files,
        )
        size = min(num_vectors, num_files * SHARD_IMAGES)
        bench.grow("neighbours that vote", size, ours, input_bytes * size / num_vectors)
    recall = bench.run("compare_neighbors", true=true, ours=output)["recall"]
    work = f"k-NN evaluation, the {k} neighbours of {num_queries:,} in {num_vectors:,} x {WIDTH_SEARCH}, streamed"
    quality = f"recall {recall:.4f}"
    bench.compare(work, "torch.cdist and topk", ours, peer["seconds"], "1", quality, input_bytes)


def _kmeans(bench: SimilarityBench) -> None:
    num_vectors, num_clusters = bench.scaled(NUM_CLUSTERED), bench.scaled(NUM_CLUSTERS)
    folder, input_bytes = _make_vectors(bench, num_vectors, 0, WIDTH_SEARCH)
    sizes = {"num_clusters": num_clusters, "num_iterations": NUM_ITERATIONS}
    our_file, peer_file, repeats = bench.path("ours.npy"), bench.path("peer.npy"), bench.repeats or 1
    ours = bench.run("cluster", repeats=repeats, folder=folder, output=our_file, **sizes)
    peer = bench.run("peer_cluster", repeats=repeats, folder=folder, output=peer_file, **sizes)
    objective = bench.run("compare_clusters", folder=folder, ours=our_file, peer=peer_file)
    relative = objective["ours"] / objective["peer"]
    work = f"{num_clusters:,} clusters of {num_vectors:,} x {WIDTH_SEARCH}, {NUM_ITERATIONS} iterations"
    quality = f"objective {objective['ours']:.4f}, {relative:.4f} of the peer's (0.99)"
    bench.compare(work, "faiss.Kmeans, spherical", ours, peer["seconds"], "1", quality, input_bytes)


def _components(bench: SimilarityBench) -> None:
    num_edges = bench.scaled(NUM_EDGES)
    folder = bench.path("edges")
    input_bytes = bench.run("make_edges", folder=folder, num_edges=num_edges)["bytes"]
    our_file, peer_file, repeats = bench.path("ours.bin"), bench.path("peer.bin"), bench.repeats or 3
    ours = bench.run("components", repeats=repeats, folder=folder, output=our_file)
    peer = bench.run("peer_components", repeats=repeats, folder=folder, output=peer_file)
    same = bench.run("compare_components", ours=our_file, peer=peer_file)["same"]
    work = f"components of {num_edges:,} edges"
    quality = f"{same:.4%} of nodes alike, {peer['components']:,.0f} components"
    bench.compare(work, "scipy [2]", ours, peer["seconds"], "0.5", quality, input_bytes)


def _run_flat_search(bench: SimilarityBench, folder: str) -> float:
    """The seconds of the peer's exact search, whose result is flat.npy."""
    output = bench.path("flat.npy")
    return bench.run("peer_neighbors", repeats=bench.repeats or 1, folder=folder, output=output, k=NUM_NEIGHBORS)[
        "seconds"
    ]


def _make_vectors(bench: SimilarityBench, num_vectors: int, num_queries: int, width: int) -> tuple[str, float]:
    """A folder of vectors, made at the first call, and their bytes as fp16."""
    folder = bench.path(f"vectors-{num_vectors}-{num_queries}-{width}")
    made = bench.run(
        "make_vectors",
        folder=folder,
        num_vectors=num_vectors,
        num_queries=num_queries,
        width=width,
        num_clusters=max(1, num_vectors // VECTORS_PER_CLUSTER[width]),
        share_copies=SHARE_COPIES,
    )
    return folder, made["bytes"]


def _num_files(num_vectors: int) -> int:
    return -(-num_vectors // ROWS_PER_FILE)


def _half_and_all(number: int) -> tuple[int, int]:
    return -(-number // 2), number


WORKS: dict[str, Callable[[SimilarityBench], None]] = {
    "join": _join,
    "growth": _growth,
    "search": _search,
    "exact": _exact,
    "knn": _knn,
    "kmeans": _kmeans,
    "components": _components,
}


def tables(bench: SimilarityBench) -> list[Table]:
    """The rows as tables; a value that does not apply is a dash."""
    at_scale = f", at 1/{bench.scale} of the sizes" if bench.scale != 1 else ""
    caption = (
        "Memory is the peak beyond the memory of imports. "
        f"[1] Timed on one block of queries in {TIMED_BLOCKS}, times {TIMED_BLOCKS}: exhaustive search takes the same "
        "time for each query; adding is included. [2] COO to CSR is included; the size on disk is that of the edges; "
        "vectors are kept as fp16, features as float32."
    )
    result = []
    if bench.rows:
        result.append(comparison_table(f"Speed and memory against a peer{at_scale}", bench.rows, caption=caption))
    if bench.growth_rows:
        columns = ("work", "vectors", "seconds", "edges, recall", "peak MB", "on disk MB")
        growth = make_table(f"The same as the input grows{at_scale}", columns, left=("work", "edges, recall"))
        for row in bench.growth_rows:
            sizes = (number(value / 1e6, ",.0f") for value in (row.peak_bytes, row.input_bytes))
            growth.add_row(row.work, f"{row.size:,}", number(row.seconds, ".1f"), row.edges_and_recall, *sizes)
        result.append(growth)
    return result
