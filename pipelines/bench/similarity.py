"""How fast and how small are search, clustering and components, against what people would else use, and as they grow?

The data are mixtures with unequal clusters and planted copies (mixture.py), as Parquet shards of the vectors schema in
a temporary folder that is removed at the end. Clusters are as many as there are vectors by a fixed number, so that the
pairs to find grow little faster than the vectors: most are copies (5,970 edges among 50,000, 31,100 among 200,000).
Ours read from that folder; the peers have everything in memory before their time begins. Everything runs in a process
of its own (contests.py).
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
from pipelines.bench.contests import ROWS_PER_FILE, TIMED_BLOCKS, Measured
from pipelines.bench.processes import in_process

WIDTH_JOIN, WIDTH_SEARCH, SHARE_COPIES = 512, 384, 0.05
# Vectors of a mean cluster, by width. Sizes fall as 1/rank, so the smallest is an eighth of the mean; neighbours that
# are searched must not outnumber a cluster, or the last of them are noise.
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

# Runs one work of contests.py with these arguments.
Measure = Callable[[str, dict[str, Any]], Measured]


@dataclass(frozen=True)
class Row:
    """One work against its peer: times in seconds, sizes in bytes; what does not apply is not a number."""

    work: str
    peer: str
    seconds: float
    peer_seconds: float
    ratio: float
    to_reach: str
    quality: str
    peak: float
    on_disk: float


@dataclass(frozen=True)
class Size:
    """One work at one size of its input."""

    work: str
    size: int
    seconds: float
    found: str
    peak: float
    on_disk: float


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured, and what has been."""

    folder: str
    scale: int
    repeats: int | None
    measure: Measure
    rows: list[Row] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    done: dict[str, Measured] = field(default_factory=dict)

    def scaled(self, number: int) -> int:
        """A real size, divided by the scale."""
        return max(1, number // self.scale)

    def path(self, name: str) -> str:
        """A place in the temporary folder."""
        return paths.join(self.folder, name)

    def run(self, name: str, *, repeats: int = 1, **arguments: Any) -> Measured:
        """What a work of contests.py measures, once for all rows: medians of as many runs as asked for."""
        key = json.dumps([name, arguments])
        if key not in self.done:
            runs = []
            for _ in range(repeats):
                if "output" in arguments:
                    paths.delete(arguments["output"])  # or a finished join would not run again
                runs.append(self.measure(name, arguments))
            self.done[key] = {one: statistics.median(run[one] for run in runs) for one in runs[0]}
        return self.done[key]


def bench(names: Sequence[str], *, scale: int = 1, repeats: int | None = None, measure: Measure | None = None) -> Bench:
    """The rows of the works that are named (see WORKS), every size divided by `scale`.

    Of `repeats` runs the medians count; by default of 3, and of what takes minutes 1. `measure` runs one work of
    contests.py, by default in a process of its own.
    """
    with tempfile.TemporaryDirectory(prefix="seedbed-bench-") as folder:
        own = Bench(folder, scale, repeats, measure or functools.partial(in_process, "contests"))
        for name in names:
            WORKS[name](own)
    return own


def _join(bench: Bench) -> None:
    num_vectors = bench.scaled(NUM_JOINED)
    ours = _joined(bench, num_vectors, repeats=3)
    folder, on_disk = _vectors(bench, num_vectors, 0, WIDTH_JOIN)
    peer = bench.run("peer_all_pairs", folder=folder)["seconds"]
    quality = f"recall {ours['recall']:.4f} (0.99)"
    work = f"all pairs above 0.6 of {num_vectors:,} x {WIDTH_JOIN}"
    ratio = peer / ours["seconds"]
    bench.rows.append(
        Row(work, "IndexFlatIP, k = 64 [1]", ours["seconds"], peer, ratio, "8", quality, ours["peak"], on_disk)
    )


def _growth(bench: Bench) -> None:
    numbers = [bench.scaled(number) for number in GROWTH]
    seconds = []
    for number in numbers:
        ours = _joined(bench, number, repeats=1)
        on_disk = _vectors(bench, number, 0, WIDTH_JOIN)[1]
        seconds.append(ours["seconds"])
        found = f"{ours['edges']:,.0f} edges, recall {ours['recall']:.4f}"
        bench.sizes.append(Size("all pairs above 0.6", number, ours["seconds"], found, ours["peak"], on_disk))
    exponent = float(np.polyfit(np.log(numbers), np.log(seconds), 1)[0])
    work = f"the same of {numbers[0]:,} to {numbers[-1]:,}: exponent of the time"
    bench.rows.append(Row(work, "itself", seconds[-1], math.nan, exponent, "at most 1.3", "", ours["peak"], on_disk))


def _joined(bench: Bench, num_vectors: int, *, repeats: int) -> Measured:
    folder, _ = _vectors(bench, num_vectors, 0, WIDTH_JOIN)
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
    judged = bench.run("judge_all_pairs", folder=folder, joined=output, num_sampled=num_sampled)
    return ours | {"recall": judged["recall"]}


def _search(bench: Bench) -> None:
    num_vectors, num_queries = bench.scaled(NUM_SEARCHED), bench.scaled(NUM_QUERIES)
    folder, on_disk = _vectors(bench, num_vectors, num_queries, WIDTH_SEARCH)
    flat = _flat(bench, folder)
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
    recall = bench.run("judge_neighbors", true=bench.path("flat.npy"), found=output)["recall"]
    work = f"{NUM_NEIGHBORS} neighbours of {num_queries:,} in {num_vectors:,} x {WIDTH_SEARCH}"
    quality = f"recall {recall:.4f} (0.95)"
    for what, key, to_reach in (("search alone", "searching", "10"), ("with building", "seconds", "3")):
        seconds, ratio = ours[key], flat / ours[key]
        bench.rows.append(
            Row(f"{work}, {what}", "IndexFlatIP", seconds, flat, ratio, to_reach, quality, ours["peak"], on_disk)
        )


def _exact(bench: Bench) -> None:
    num_vectors, num_queries = bench.scaled(NUM_SEARCHED), bench.scaled(NUM_QUERIES)
    folder, on_disk = _vectors(bench, num_vectors, num_queries, WIDTH_SEARCH)
    flat = _flat(bench, folder)
    num_files = _num_files(num_vectors)
    for files in (-(-num_files // 2), num_files):
        output = bench.path("exact.npy")
        ours = bench.run("exact_neighbors", folder=folder, output=output, k=NUM_NEIGHBORS, num_files=files)
        size = min(num_vectors, files * ROWS_PER_FILE)
        bytes_read = on_disk * size / num_vectors
        bench.sizes.append(Size("exact search from disk", size, ours["seconds"], "", ours["peak"], bytes_read))
    recall = bench.run("judge_neighbors", true=bench.path("flat.npy"), found=output)["recall"]
    work = f"the same, exact, streamed from disk: {num_vectors:,}"
    ratio = flat / ours["seconds"]
    quality = f"recall {recall:.4f}"
    bench.rows.append(
        Row(work, "IndexFlatIP in memory", ours["seconds"], flat, ratio, "1.2", quality, ours["peak"], on_disk)
    )


def _knn(bench: Bench) -> None:
    num_vectors, num_queries, k = bench.scaled(NUM_TRAINED), bench.scaled(NUM_CLASSIFIED), NUM_VOTES
    vectors_folder, _ = _vectors(bench, num_vectors, num_queries, WIDTH_SEARCH)
    folder = bench.path("features")
    on_disk = bench.run("make_features", folder=folder, vectors_folder=vectors_folder)["bytes"]
    peer = bench.run(
        "peer_classify_neighbors",
        repeats=bench.repeats or 1,
        vectors_folder=vectors_folder,
        output=bench.path("cdist.npy"),
        k=k,
    )["seconds"]
    num_files = -(-num_vectors // SHARD_IMAGES)
    for files in (-(-num_files // 2), num_files):
        output = bench.path("voters.npy")
        ours = bench.run(
            "classify_neighbors",
            repeats=bench.repeats or 1,
            folder=folder,
            vectors_folder=vectors_folder,
            output=output,
            k=k,
            num_files=files,
        )
        size = min(num_vectors, files * SHARD_IMAGES)
        bench.sizes.append(
            Size("neighbours that vote", size, ours["seconds"], "", ours["peak"], on_disk * size / num_vectors)
        )
    recall = bench.run("judge_neighbors", true=bench.path("cdist.npy"), found=output)["recall"]
    work = f"k-NN evaluation, the {k} neighbours of {num_queries:,} in {num_vectors:,} x {WIDTH_SEARCH}, streamed"
    ratio = peer / ours["seconds"]
    bench.rows.append(
        Row(
            work,
            "torch.cdist and topk",
            ours["seconds"],
            peer,
            ratio,
            "1",
            f"recall {recall:.4f}",
            ours["peak"],
            on_disk,
        )
    )


def _flat(bench: Bench, folder: str) -> float:
    return bench.run(
        "peer_neighbors", repeats=bench.repeats or 1, folder=folder, output=bench.path("flat.npy"), k=NUM_NEIGHBORS
    )["seconds"]


def _kmeans(bench: Bench) -> None:
    num_vectors, num_clusters = bench.scaled(NUM_CLUSTERED), bench.scaled(NUM_CLUSTERS)
    folder, on_disk = _vectors(bench, num_vectors, 0, WIDTH_SEARCH)
    asked = {"folder": folder, "num_clusters": num_clusters, "num_iterations": NUM_ITERATIONS}
    files = {"ours": bench.path("ours.npy"), "peer": bench.path("peer.npy")}
    repeats = bench.repeats or 1
    ours = bench.run("cluster", repeats=repeats, output=files["ours"], **asked)
    peer = bench.run("peer_cluster", repeats=repeats, output=files["peer"], **asked)["seconds"]
    objective = bench.run("judge_cluster", folder=folder, ours=files["ours"], peer=files["peer"])
    relative = objective["ours"] / objective["peer"]
    work = f"{num_clusters:,} clusters of {num_vectors:,} x {WIDTH_SEARCH}, {NUM_ITERATIONS} iterations"
    quality = f"objective {objective['ours']:.4f}, {relative:.4f} of the peer's (0.99)"
    ratio = peer / ours["seconds"]
    bench.rows.append(
        Row(work, "faiss.Kmeans, spherical", ours["seconds"], peer, ratio, "1", quality, ours["peak"], on_disk)
    )


def _components(bench: Bench) -> None:
    num_edges = bench.scaled(NUM_EDGES)
    folder = bench.path("edges")
    on_disk = bench.run("make_edges", folder=folder, num_edges=num_edges)["bytes"]
    files = {"ours": bench.path("ours.bin"), "peer": bench.path("peer.bin")}
    repeats = bench.repeats or 3
    ours = bench.run("components", repeats=repeats, folder=folder, output=files["ours"])
    peer = bench.run("peer_components", repeats=repeats, folder=folder, output=files["peer"])
    same = bench.run("judge_components", ours=files["ours"], peer=files["peer"])["same"]
    work = f"components of {num_edges:,} edges"
    quality = f"{same:.4%} of nodes alike, {peer['components']:,.0f} components"
    ratio = peer["seconds"] / ours["seconds"]
    bench.rows.append(
        Row(work, "scipy [2]", ours["seconds"], peer["seconds"], ratio, "0.5", quality, ours["peak"], on_disk)
    )


def _vectors(bench: Bench, num_vectors: int, num_queries: int, width: int) -> tuple[str, float]:
    """A folder of vectors, made when it is first asked for, and their bytes as fp16."""
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


WORKS: dict[str, Callable[[Bench], None]] = {
    "join": _join,
    "growth": _growth,
    "search": _search,
    "exact": _exact,
    "knn": _knn,
    "kmeans": _kmeans,
    "components": _components,
}


def tables(bench: Bench) -> list[Table]:
    """What was measured, as tables; what does not apply is a dash."""
    at_scale = f", at 1/{bench.scale} of the sizes" if bench.scale != 1 else ""
    caption = (
        "Memory is the peak beyond what imports take. "
        f"[1] timed on one block of queries in {TIMED_BLOCKS}, times {TIMED_BLOCKS}: exhaustive search takes each "
        "query as long as the next; adding is counted. [2] COO to CSR counted; the size on disk is that of the edges; "
        "vectors are kept as fp16, features as float32."
    )
    against = Table(
        title=f"Speed and memory against a peer{at_scale}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
    )
    names = ("work", "peer", "ours s", "peer s", "ratio", "to reach", "recall or objective (to reach)", "peak MB")
    for name in (*names, "on disk MB"):
        against.add_column(name, justify="left" if name in ("work", "peer") or "recall" in name else "right")
    for row in bench.rows:
        against.add_row(
            row.work,
            row.peer,
            _number(row.seconds, ".1f"),
            _number(row.peer_seconds, ".1f"),
            _number(row.ratio, ".2f"),
            row.to_reach,
            row.quality,
            _number(row.peak / 1e6, ",.0f"),
            _number(row.on_disk / 1e6, ",.0f"),
        )
    growth = Table(title=f"The same as the input grows{at_scale}", title_justify="left")
    for name in ("work", "vectors", "seconds", "found", "peak MB", "on disk MB"):
        growth.add_column(name, justify="left" if name in ("work", "found") else "right")
    for size in bench.sizes:
        numbers = (_number(value / 1e6, ",.0f") for value in (size.peak, size.on_disk))
        growth.add_row(size.work, f"{size.size:,}", _number(size.seconds, ".1f"), size.found, *numbers)
    return [table for table in (against, growth) if table.row_count]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
