"""Search a pool part by part: each worker holds one part, every query goes to all, and the results are merged.

Legend: Q queries, N vectors of a part, D dimensions, K neighbours.

A part is searched exactly, or by an index of its own (inverted lists): cells are trained on a sample of the part, its
vectors are listed by the cell nearest to them, and a query visits the `num_probes` nearest cells. The parts, and all
that happens in them, depend on the pool and the config alone, not on the number of workers.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from curation.files.image_ids import id_bytes, id_column
from curation.models.device import require_device
from curation.search import exact, ivf, kmeans
from curation.search.config import SearchConfig
from curation.search.ivf import CellLists
from curation.search.top_k import top_k_of_groups

# What one part found: `query` is a row of the matrix of queries.
FOUND = pa.schema([("query", pa.int32()), ("image_id", pa.string()), ("similarity", pa.float32())])


def train_cells(sample: np.ndarray, num_cells: int, seed: int) -> np.ndarray:
    """Unit centroids (K, D) float32 of at most `num_cells` cells, by a short k-means over `sample` (N, D)."""
    starts = range(0, len(sample), exact.BLOCK_ROWS)
    return kmeans.fit(
        lambda: (sample[start : start + exact.BLOCK_ROWS] for start in starts),
        min(num_cells, len(sample)),
        num_iterations=ivf.TRAINING_ITERATIONS,
        start="random",
        seed=seed,
    ).centroids


class PartSearch:
    """The search in one part, whose index is built once for all queries."""

    def __init__(self, config: SearchConfig, blocks: list[np.ndarray]) -> None:
        """`blocks`, float16 (n, D) each, are the part's vectors; the list is emptied, to hold none of them twice."""
        require_device(config.device)
        self._config = config
        self.num_vectors = sum(map(len, blocks))
        self.width = blocks[0].shape[1] if blocks else 0
        self._cells: np.ndarray | None = None
        self._rows = np.arange(self.num_vectors)  # the number in the part of each of the vectors that are held
        if config.backend == "exact" or not self.num_vectors:
            self._vectors = list(blocks)
        elif config.codes == "pq":
            self._vectors = [np.concatenate(blocks)]
            self._coded = ivf.CodedLists(self._vectors[0], config)
        else:
            self._vectors = [self._by_cell(blocks)]
        blocks.clear()

    def _by_cell(self, blocks: list[np.ndarray]) -> np.ndarray:
        """The vectors (N, D) in the order of their cells, which are then read without gathering rows."""
        config = self._config
        num_cells = config.num_cells(self.num_vectors)
        every = max(1, self.num_vectors // (ivf.TRAINING_ROWS_PER_CELL * num_cells))
        first = np.cumsum([0, *map(len, blocks)])
        sample = [block[-start % every :: every] for block, start in zip(blocks, first, strict=False)]
        self._cells = train_cells(np.concatenate(sample), num_cells, config.seed)
        home = np.concatenate([ivf.cells_of(block, self._cells, 1, device=config.device)[:, 0] for block in blocks])
        lists = CellLists.of(self._rows, home, len(self._cells))
        self._rows, self._members = lists.rows, CellLists(np.arange(self.num_vectors), lists.starts)
        place = np.empty(self.num_vectors, np.int64)
        place[self._rows] = np.arange(self.num_vectors)
        vectors = np.empty((self.num_vectors, self.width), np.float16)
        start = 0
        while blocks:
            block = blocks.pop(0)
            vectors[place[start : start + len(block)]] = block
            start += len(block)
        return vectors

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest of the part for each of `queries` (Q, D), as `index.search` gives them.

        With `ivf`, ties at the k-th place go by cell.
        """
        config = self._config
        if config.backend == "exact" or not self.num_vectors:
            return self.search_exactly(queries, k)
        if self._cells is None:
            return self._coded.search(queries, k)
        probes = min(config.num_probes, len(self._cells))
        visits = ivf.cells_of(queries, self._cells, probes, device=config.device)
        asking = [self._asking(visits[:, :1]), self._asking(visits[:, 1:])]
        device = config.device
        return self._numbered(ivf.search_cells(queries, asking, self._vectors[0], self._members, k, device=device))

    def search_exactly(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The same without the index."""
        return self._numbered(exact.search(queries, self._vectors, k, device=self._config.device))

    def _asking(self, visits: np.ndarray) -> CellLists:
        assert self._cells is not None
        queries = np.repeat(np.arange(len(visits)), visits.shape[1])
        return CellLists.of(queries, visits.reshape(-1), len(self._cells))

    def _numbered(self, found: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        similarity, row = found
        return similarity, np.where(row >= 0, self._rows[row], -1) if self.num_vectors else row


def found_table(image_ids: np.ndarray, similarity: np.ndarray, row: np.ndarray) -> pa.Table:
    """FOUND of a search (Q, K), (Q, K) in a part whose images have these ids, (N,) bytes."""
    query, place = np.nonzero(row >= 0)
    ids = id_column(image_ids[row[query, place]])
    return pa.table([query.astype(np.int32), ids, similarity[query, place]], schema=FOUND)


def merge(tables: Iterable[pa.Table], k: int) -> pa.Table:
    """FOUND of the `k` best of each query among what all parts found, by query, then by falling similarity, then id."""
    table = pa.concat_tables([FOUND.empty_table(), *tables]).combine_chunks()
    query, similarity = table["query"].to_numpy(), table["similarity"].to_numpy()
    return table.take(pa.array(top_k_of_groups(query, k, -similarity, id_bytes(table["image_id"]))))


def num_hits(found: pa.Table, exact: pa.Table) -> tuple[int, int]:
    """How many of the nearest of each query in `exact` the search `found`, and how many there are.

    Both are results of `merge` with one k. What is as near as the farthest of `exact` counts, so that ties do no harm.
    """
    # Similarities fall within a query, so that its last one stays in the dictionary.
    least = dict(zip(exact["query"].to_pylist(), exact["similarity"].to_pylist(), strict=True))
    hits = sum(
        similarity >= least.get(query, np.inf)
        for query, similarity in zip(found["query"].to_pylist(), found["similarity"].to_pylist(), strict=True)
    )
    return hits, exact.num_rows
