"""The best of many, within groups."""

import numpy as np

pass


def merge_into_best(
    best_similarity: np.ndarray, best_row: np.ndarray, query: np.ndarray, row: np.ndarray, similarity: np.ndarray
) -> None:
    """Put the new pairs among the best (Q, k), in place, ties by row."""
    touched = np.zeros(len(best_row), bool)
    touched[query] = True
    k = best_row.shape[1]
    old = np.flatnonzero(np.repeat(touched, k) & (best_row.reshape(-1) >= 0))
    query = np.concatenate([old // k, query])
    row = np.concatenate([best_row.reshape(-1)[old], row])
    similarity = np.concatenate([best_similarity.reshape(-1)[old], similarity])
    by_row = np.argsort(query * (row.max(initial=0) + 1) + row)  # no pair comes twice
    query, row, similarity = query[by_row], row[by_row], similarity[by_row]
    order, rank = ranked(query, similarity)
    order, rank = order[rank < k], rank[rank < k]
    best_similarity[query[order], rank] = similarity[order]
    best_row[query[order], rank] = row[order]


def ranked(query: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order of the pairs by query, then by falling similarity, then as they come; and the rank within the query."""
    # The sort of one 64-bit key is many times faster than a sort by two: 11 bits of query, 32 of similarity, 21 of
    # place. The bits of a float, the lower ones flipped when it is negative, sort as the float does.
    bits = (similarity + np.float32(0)).view(np.int32).astype(np.int64)
    falling = (~(bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 2**31).astype(np.uint64)
    if len(query) < 2**21 and (query < 2**11).all():
        place = np.arange(len(query), dtype=np.uint64)
        key = (query.astype(np.uint64) << np.uint64(53)) | (falling << np.uint64(21)) | place
        order = (np.sort(key) & np.uint64(2**21 - 1)).astype(np.int64)
    else:
        order = np.lexsort((falling, query))
    ordered = query[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return order, rank
