"""The best rows of each group, and the rank of each row within its group.

Rows belong to groups: neighbours to a query, images to a cluster, pairs to an image. Every function is deterministic:
rows that compare equal keep the order in which they are given.

Legend: N rows, G groups, Q queries, K best rows kept of each query.
"""

import numpy as np


def starts_group(*columns: np.ndarray) -> np.ndarray:
    """Whether each row is the first of its group, (N,) bool.

    A group is a run of neighbouring rows with equal values in all `columns` (N,), of any dtype.
    """
    is_first = np.zeros(len(columns[0]), bool)
    is_first[:1] = True
    for column in columns:
        is_first[1:] |= column[1:] != column[:-1]
    return is_first


def rank_in_groups(groups: np.ndarray) -> np.ndarray:
    """The number of rows before each row in its group, (N,) int64.

    `groups` (N,), of any dtype, names the group of each row; the rows of a group stand together.
    """
    starts = np.flatnonzero(starts_group(groups))
    ranks: np.ndarray = np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))
    return ranks


def sort_into_groups(groups: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N,) int64 in the order of their groups, and where each group begins in that order, (num_groups + 1,) int64.

    `groups` (N,) are whole numbers from 0 to `num_groups` - 1; the rows of a group stay in the order given. The last
    bound is N.
    """
    order = np.argsort(groups, kind="stable")
    return order, np.searchsorted(groups[order], np.arange(num_groups + 1))


def top_k_of_groups(groups: np.ndarray, k: int | np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """The rows (M,) int64 that come first in each group: by group, then by rising `keys`, then in the order given.

    groups: (N,) of any dtype. k: rows per group, or an integer array (G,) of one number per group; then `groups` are
    whole numbers below G. keys: (N,) each, the first decides before the second; negate a key to take the greatest.
    """
    order = np.lexsort((*keys[::-1], groups))
    ordered = groups[order]
    limit = k[ordered] if isinstance(k, np.ndarray) else k
    best: np.ndarray = order[rank_in_groups(ordered) < limit]
    return best


def rank_by_similarity(query: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order (N,) int64 of pairs by query, then falling similarity, then as given; and each pair's rank in its query.

    query: (N,) int64, not negative. similarity: (N,) float32, not NaN; -0.0 and 0.0 are equal. Both results are in the
    new order.
    """
    # Sorting one 64-bit key is many times faster than sorting by two: 11 bits of query, 32 of similarity, 21 of row.
    # The bits of a float sort as the float does once the lower ones of negative numbers are flipped.
    bits = (similarity + np.float32(0)).view(np.int32).astype(np.int64)
    falling = (~(bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 2**31).astype(np.uint64)
    if len(query) < 2**21 and (query < 2**11).all():
        row = np.arange(len(query), dtype=np.uint64)
        key = (query.astype(np.uint64) << np.uint64(53)) | (falling << np.uint64(21)) | row
        order = (np.sort(key) & np.uint64(2**21 - 1)).astype(np.int64)
    else:
        order = np.lexsort((falling, query))
    return order, rank_in_groups(query[order])


def merge_into_best(
    best_similarity: np.ndarray, best_row: np.ndarray, query: np.ndarray, row: np.ndarray, similarity: np.ndarray
) -> None:
    """Update the best pairs of each query, in place, with new pairs.

    best_similarity: (Q, K) float32 and best_row: (Q, K) int64, by falling similarity, equal ones by rising row; places
    without a pair come last, with -inf and -1. query, row: (N,) int64 and similarity: (N,) float32 of the new pairs, in
    any order; no pair may come twice, nor be among the best already.
    """
    touched = np.zeros(len(best_row), bool)
    touched[query] = True
    k = best_row.shape[1]
    held = np.flatnonzero(np.repeat(touched, k) & (best_row.reshape(-1) >= 0))
    query = np.concatenate([held // k, query])
    row = np.concatenate([best_row.reshape(-1)[held], row])
    similarity = np.concatenate([best_similarity.reshape(-1)[held], similarity])
    by_row = np.argsort(query * (row.max(initial=0) + 1) + row)  # no two are equal
    query, row, similarity = query[by_row], row[by_row], similarity[by_row]
    order, rank = rank_by_similarity(query, similarity)
    order, rank = order[rank < k], rank[rank < k]
    best_similarity[query[order], rank] = similarity[order]
    best_row[query[order], rank] = row[order]
