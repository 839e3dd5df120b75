"""Search a pool part by part: each worker holds one part, all queries visit every part, and the results are merged.

Legend: Q queries, N vectors of a part, D dimensions, K neighbours.

A part is searched exactly, or through inverted lists of its own: cells are trained on a sample of the part, a vector is
listed in the cell nearest to it, and a query visits the `num_probes` nearest cells. The parts and their results depend
only on the pool and the config, not on the number of workers. A part of too few vectors for product quantization is
searched exactly.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from curation.engine.device import require_device
from curation.files.image_ids import id_bytes, id_column
from curation.search import exact, ivf
from curation.search.config import SearchConfig
from curation.search.ivf import CellLists
from curation.search.top_k import top_k_of_groups

# The neighbours of queries in one part, or in all; `query` is a row of the matrix of queries.
NEIGHBORS = pa.schema([("query", pa.int32()), ("image_id", pa.string()), ("similarity", pa.float32())])


class PartSearch:
    """The search in one part, whose index is built once for all queries."""

    def __init__(self, config: SearchConfig, blocks: list[np.ndarray]) -> None:
        """`blocks`, float16 (n, D) each, are the part's vectors. The list is emptied, so that none is held twice."""
        require_device(config.device)
        self._config = config
        self.num_vectors = sum(map(len, blocks))
        self.width = blocks[0].shape[1] if blocks else 0
        self._cells: np.ndarray | None = None
        self._rows = np.arange(self.num_vectors)  # the row in the part of each vector as held here
        is_too_small = self.num_vectors < (ivf.PQ_CODES if config.codes == "pq" else 1)
        self._is_exact = config.backend == "exact" or is_too_small
        if self._is_exact:
            self._vectors = list(blocks)
        elif config.codes == "pq":
            self._vectors = [np.concatenate(blocks)]
            self._coded = ivf.CodedLists(self._vectors[0], config)
        else:
            self._vectors = [self._sort_by_cell(blocks)]
        blocks.clear()

    def _sort_by_cell(self, blocks: list[np.ndarray]) -> np.ndarray:
        """The vectors (N, D) in the order of their cells, so that a cell is read without gathering rows."""
        config = self._config
        num_cells = config.num_cells(self.num_vectors)
        every = max(1, self.num_vectors // (ivf.TRAINING_ROWS_PER_CELL * num_cells))
        first = np.cumsum([0, *map(len, blocks)])
        sample = [block[-start % every :: every] for block, start in zip(blocks, first, strict=False)]
        self._cells = ivf.train_cells(np.concatenate(sample), num_cells)
        home = np.concatenate([ivf.cells_of(block, self._cells, 1, device=config.device)[:, 0] for block in blocks])
        lists = CellLists.of(self._rows, home, len(self._cells))
        self._rows, self._members = lists.rows, CellLists(np.arange(self.num_vectors), lists.starts)
        position = np.empty(self.num_vectors, np.int64)
        position[self._rows] = np.arange(self.num_vectors)
        vectors = np.empty((self.num_vectors, self.width), np.float16)
        start = 0
        while blocks:
            block = blocks.pop(0)
            vectors[position[start : start + len(block)]] = block
            start += len(block)
        return vectors

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest vectors of the part to each of `queries` (Q, D), as `exact.search` gives them.

        With `ivf`, ties at the k-th rank go by cell.
        """
        config = self._config
        if self._is_exact:
            return self.search_exactly(queries, k)
        if self._cells is None:
            return self._coded.search(queries, k)
        probes = min(config.num_probes, len(self._cells))
        visits = ivf.cells_of(queries, self._cells, probes, device=config.device)
        visitors = [self._visitors(visits[:, :1]), self._visitors(visits[:, 1:])]
        device = config.device
        return self._in_part(*ivf.search_cells(queries, visitors, self._vectors[0], self._members, k, device=device))

    def search_exactly(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest vectors of the part, without the index."""
        return self._in_part(*exact.search(queries, self._vectors, k, device=self._config.device))

    def _visitors(self, visits: np.ndarray) -> CellLists:
        """The queries in each cell, given the cells (Q, P) that each query visits."""
        assert self._cells is not None
        queries = np.repeat(np.arange(len(visits)), visits.shape[1])
        return CellLists.of(queries, visits.reshape(-1), len(self._cells))

    def _in_part(self, similarity: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same neighbours, by their rows in the part."""
        return similarity, np.where(row >= 0, self._rows[row], -1) if self.num_vectors else row


def neighbor_table(image_ids: np.ndarray, similarity: np.ndarray, row: np.ndarray) -> pa.Table:
    """NEIGHBORS from a search's similarities (Q, K) and rows (Q, K) in a part whose images have `image_ids` (N,)."""
    query, rank = np.nonzero(row >= 0)
    ids = id_column(image_ids[row[query, rank]])
    return pa.table([query.astype(np.int32), ids, similarity[query, rank]], schema=NEIGHBORS)


def merge_parts(tables: Iterable[pa.Table], k: int) -> pa.Table:
    """The `k` best of each query from the NEIGHBORS of all parts, by query, then by falling similarity, then by id."""
    table = pa.concat_tables([NEIGHBORS.empty_table(), *tables]).combine_chunks()
    query, similarity = table["query"].to_numpy(), table["similarity"].to_numpy()
    return table.take(pa.array(top_k_of_groups(query, k, -similarity, id_bytes(table["image_id"]))))


def count_hits(approximate: pa.Table, true: pa.Table) -> tuple[int, int]:
    """How many of the `true` neighbours the `approximate` search has, and how many there are.

    Both are results of `merge_parts` with one k. A neighbour as near as the farthest true one counts as a hit, so that
    ties do no harm.
    """
    # Similarities fall within a query: the last one replaces the others.
    farthest = dict(zip(true["query"].to_pylist(), true["similarity"].to_pylist(), strict=True))
    hits = sum(
        similarity >= farthest.get(query, np.inf)
        for query, similarity in zip(
            approximate["query"].to_pylist(), approximate["similarity"].to_pylist(), strict=True
        )
    )
    return hits, true.num_rows
