"""Search a pool part by part: each worker holds one part, every query goes to all, and the results are merged.

Legend: Q queries, N vectors of a part, D dimensions, K neighbours.

A part is searched exactly, or by an index of its own (inverted lists): cells are trained on a sample of the part, its
vectors are listed by the cell nearest to them, and a query visits the `num_probes` nearest cells. The parts, and all
that happens in them, depend on the pool and the config alone, not on the number of workers.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from curation import index, kmeans
from curation.devices import require_device
from curation.index import CellLists, SearchConfig
from curation.records import id_bytes, id_column

# What one part found: `query` is a row of the matrix of queries.
FOUND = pa.schema([("query", pa.int32()), ("image_id", pa.string()), ("similarity", pa.float32())])


def train_cells(sample: np.ndarray, num_cells: int, seed: int) -> np.ndarray:
    """Unit centroids (K, D) float32 of at most `num_cells` cells, by a short k-means over `sample` (N, D)."""
    return kmeans.fit(
        lambda: [sample],
        min(num_cells, len(sample)),
        num_iterations=index.TRAINING_ITERATIONS,
        start="random",
        seed=seed,
    ).centroids


class PartSearch:
    """The search in one part, `vectors` (N, D) float16, whose index is built once for all queries."""

    def __init__(self, config: SearchConfig, vectors: np.ndarray) -> None:
        require_device(config.device)
        self._config, self._vectors = config, vectors
        self._cells: np.ndarray | None = None
        if config.backend == "exact" or not len(vectors):
            return
        if config.codes == "pq":
            self._coded = index.CodedLists(vectors, config)
            return
        num_cells = config.num_cells(len(vectors))
        sample = vectors[:: max(1, len(vectors) // (index.TRAINING_ROWS_PER_CELL * num_cells))]
        self._cells = train_cells(sample, num_cells, config.seed)
        home = index.cells_of(vectors, self._cells, 1, device=config.device)[:, 0]
        self._codes = index.codes_of(vectors, config.device)
        self._members = CellLists.of(np.arange(len(vectors)), home, len(self._cells))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest of the part for each of `queries` (Q, D), as `index.search` gives them."""
        config = self._config
        if config.backend == "exact" or not len(self._vectors):
            return index.search(queries, [self._vectors], k, device=config.device)
        if self._cells is None:
            return self._coded.search(queries, k)
        probes = min(config.num_probes, len(self._cells))
        visits = index.cells_of(queries, self._cells, probes, device=config.device)
        # First the nearest cell of each: what it holds is a floor that leaves few candidates in all others.
        best = self._visit(queries, visits[:, :1], k, None)
        return self._visit(queries, visits[:, 1:], k, best)

    def _visit(
        self, queries: np.ndarray, visits: np.ndarray, k: int, best: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self._cells is not None
        askers = np.repeat(np.arange(len(queries)), visits.shape[1])
        asking = CellLists.of(askers, visits.reshape(-1), len(self._cells))
        return index.search_cells(
            queries,
            asking,
            self._vectors,
            self._members,
            k,
            codes=self._codes,
            best=best,
            device=self._config.device,
        )

    def search_exactly(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The same without the index."""
        return index.search(queries, [self._vectors], k, device=self._config.device)


def found_table(image_ids: np.ndarray, similarity: np.ndarray, row: np.ndarray) -> pa.Table:
    """FOUND of a search (Q, K), (Q, K) in a part whose images have these ids, (N,) bytes."""
    query, place = np.nonzero(row >= 0)
    ids = id_column(image_ids[row[query, place]])
    return pa.table([query.astype(np.int32), ids, similarity[query, place]], schema=FOUND)


def merge(tables: Iterable[pa.Table], k: int) -> pa.Table:
    """FOUND of the `k` best of each query among what all parts found, by query, then by falling similarity, then id."""
    table = pa.concat_tables([FOUND.empty_table(), *tables]).combine_chunks()
    query, similarity = table["query"].to_numpy(), table["similarity"].to_numpy()
    order = np.lexsort((id_bytes(table["image_id"]), -similarity, query))
    rank = np.arange(len(order)) - np.searchsorted(query[order], query[order])
    return table.take(pa.array(order[rank < k]))


def num_hits(found: pa.Table, exact: pa.Table) -> tuple[int, int]:
    """How many of the nearest of each query in `exact` the search `found`, and how many there are.

    Both are results of `merge` with one k. What is as near as the farthest of `exact` counts, so that ties do no harm.
    """
    queries = exact["query"].to_numpy()
    last = np.searchsorted(queries, queries, side="right") - 1
    least = dict(zip(queries.tolist(), exact["similarity"].to_numpy()[last].tolist(), strict=True))
    hits = sum(
        similarity >= least.get(query, np.inf)
        for query, similarity in zip(found["query"].to_pylist(), found["similarity"].to_pylist(), strict=True)
    )
    return hits, len(queries)
