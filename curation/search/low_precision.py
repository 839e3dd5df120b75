"""Which inner products may reach a floor: a fast scan in low precision that provably misses none.

Legend: Q queries, N vectors, D dimensions, C candidate pairs. A tile is up to TILE_ROWS vectors, scanned at a time.

Both sides are rounded to codes x' = scale * code, and the codes are multiplied out. By Cauchy and Schwarz

    |x.y - x'.y'| = |x.(y - y') + (x - x').y'| <= |x| |y - y'| + |x - x'| |y'|,

the `slack`, whose four lengths are measured when the codes are made. So every pair whose product reaches a floor has an
estimate of at least floor - slack; these pairs are the candidates, and their exact products decide. On processors with
int8 units (VNNI) the codes are int8, which multiply four times faster than float32. Elsewhere on the CPU they are the
vectors in float32, and on a GPU in float16. That choice changes the speed and never the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Queries and vectors of one product. CPU: the fastest measured of 512..8,192 x 256..4,096 (2026-11, 2 cores of a
# Cascade Lake, D 384: 979 billion operations a second in int8, 247 in float32; faiss's flat index: 187). GPU: assumed.
QUERY_ROWS = {"cpu": 2048, "cuda": 8192}
TILE_ROWS = {"cpu": 1024, "cuda": 32768}
# Vectors of one product within a cell. Its queries are few, and each tile costs a millisecond beside its products.
# Assumed for a GPU.
CELL_ROWS = {"cpu": 4096, "cuda": 32768}
# Products in a group: only where its maximum reaches the floor are they compared one by one. Measured: at 64 the maxima
# cost a tenth of the product, at 16 half of it.
LANES = 64
# Bits of a row beside a product in one key: 2**33 rows, and products below 2**30 (up to 66,000 dimensions).
ROW_BITS = 33
# Upper bound of the rounding of a float32 sum of D products of unit vectors. The exact score has it as well.
ROUNDING = 1e-5
# Its counterpart where a GPU returns products of float16 codes as float16: half a unit in the last place of values up
# to 2.
HALF_ROUNDING = 2e-3


@dataclass(frozen=True)
class Codes:
    """Vectors in low precision, with a bound of the rounding."""

    values: torch.Tensor  # (rows padded with zeros to a multiple of LANES, D)
    num_rows: int
    scale: np.ndarray  # (N,) float64 for queries, (1,) where all have one
    norm: np.ndarray  # (N,) or (1,): the length, or the greatest length
    residual: np.ndarray  # (N,) or (1,): the length of the rounding error, or the greatest

    def take(self, rows: np.ndarray) -> "Codes":
        """The codes of the given rows, (R,) int64, of vectors with one scale."""
        assert len(self.scale) == 1
        index = torch.from_numpy(rows).to(self.values.device)
        return Codes(_pad(self.values.index_select(0, index)), len(rows), self.scale, self.norm, self.residual)


def device_kind(device: str) -> str:
    """'cpu' or 'cuda', the key of QUERY_ROWS, TILE_ROWS and CELL_ROWS."""
    return torch.device(device).type


def encode_rows(matrix: np.ndarray, device: str) -> Codes:
    """Codes of queries (N, D) float32, one scale per row."""
    return _encode(matrix, _peaks(torch.from_numpy(matrix)), device)


def encode(blocks: Sequence[np.ndarray], device: str) -> Codes:
    """Codes of vectors (N, D) float32 or float16 with one scale; one of the `blocks` (n, D) is float32 at a time."""
    peak = max(map(_greatest, blocks), default=0.0)
    parts = [
        _encode(to_float32(block), torch.full((len(block),), peak, dtype=torch.float32), device) for block in blocks
    ]
    values = torch.cat([part.values[: part.num_rows] for part in parts]) if len(parts) > 1 else parts[0].values
    greatest = [
        np.array([max(getattr(part, name).max(initial=0) for part in parts)]) for name in ("norm", "residual", "scale")
    ]
    norm, residual, scale = greatest
    return Codes(_pad(values), sum(part.num_rows for part in parts), np.where(scale > 0, scale, 1.0), norm, residual)


def encode_finely(matrix: np.ndarray, device: str) -> Codes:
    """Floating-point codes of vectors (N, D) float32 or float16, for cases where int8 leaves too many candidates."""
    if device_kind(device) == "cuda":
        return encode([matrix], device)
    rows, width = matrix.shape
    values = torch.empty((rows + -rows % LANES, width))
    values[:rows] = torch.from_numpy(matrix)
    values[rows:] = 0
    return Codes(values, rows, np.ones(1), np.ones(1), np.zeros(1))


def to_float32(matrix: np.ndarray) -> np.ndarray:
    """`matrix` as contiguous float32; torch converts float16 twice as fast as numpy."""
    if matrix.dtype == np.float16:
        # The copy avoids torch's warning about read-only arrays; nothing writes to this one.
        source = matrix if matrix.flags.writeable and matrix.flags.c_contiguous else matrix.copy()
        converted: np.ndarray = torch.from_numpy(source).float().numpy()
        return converted
    return np.ascontiguousarray(matrix, dtype=np.float32)


def _greatest(matrix: np.ndarray) -> float:
    """The greatest absolute value; 0 for no values. float16, slow to compare, is compared by its bits without sign."""
    if matrix.dtype == np.float16:
        bits = np.ascontiguousarray(matrix).view(np.uint16) & 0x7FFF
        return float(bits.max(initial=0).astype(np.uint16).view(np.float16))
    return float(np.abs(matrix).max(initial=0))


def _encode(matrix: np.ndarray, peak: torch.Tensor, device: str) -> Codes:
    """Codes of `matrix` (N, D) float32; no absolute value in a row exceeds its `peak` (N,)."""
    values = torch.from_numpy(matrix)
    norm, residual, scale = _lengths(values), np.zeros(len(matrix)), np.ones(len(matrix))
    if device_kind(device) == "cuda":
        codes = values.to(device).half()
        residual = _lengths(values - codes.float().cpu())
    elif not _has_int8_units():
        codes = values
    else:
        step = torch.where(peak > 0, peak / 127, 1.0)
        rounded = torch.mul(values, (1 / step)[:, None]).round_()
        codes, scale = rounded.to(torch.int8), step.double().numpy()
        residual = _lengths(torch.addcmul(values, rounded, -step[:, None]))
    return Codes(_pad(codes), len(matrix), scale, norm, residual)


def _pad(codes: torch.Tensor) -> torch.Tensor:
    padding = -len(codes) % LANES
    column = codes.shape[1] == 1  # add a column of zeros: torch 2.13 multiplies int8 matrices of width 1 wrongly
    return torch.nn.functional.pad(codes, (0, column, 0, padding)) if padding or column else codes


def estimate(queries: Codes, tile: Codes) -> "Estimates":
    """All products of the codes of queries and of one tile."""
    products = _products(queries.values, tile.values)[: queries.num_rows]
    if tile.num_rows < len(tile.values):
        products[:, tile.num_rows :] = _least(products.dtype)
    rounding = HALF_ROUNDING if products.dtype == torch.float16 else ROUNDING
    slack = queries.norm * tile.residual + queries.residual * (tile.norm + tile.residual) + rounding
    groups = products.view(len(products), -1, LANES)
    unit = np.broadcast_to(queries.scale * tile.scale, len(products))
    return Estimates(groups, groups.amax(2), unit, np.broadcast_to(slack, len(products)))


@dataclass(frozen=True)
class Estimates:
    """Products of codes, in multiples of `unit` and in groups of LANES; the least number pads the last group."""

    groups: torch.Tensor  # (Q, groups, LANES)
    greatest: torch.Tensor  # (Q, groups)
    unit: np.ndarray  # (Q,) float64
    slack: np.ndarray  # (Q,) float64

    def floor(self, k: int) -> np.ndarray:
        """Floors (Q,) float64, each reached by at least `k` products of its query; -inf with fewer products."""
        products = self.groups.flatten(1)
        if products.shape[1] < k:
            return np.full(len(products), -np.inf)
        kth = torch.topk(products, k, dim=1, sorted=False).values.amin(1)
        reached = (kth.double() * torch.from_numpy(self.unit.copy()).to(kth.device)).cpu().numpy() - self.slack
        floors: np.ndarray = np.where((kth == _least(kth.dtype)).cpu().numpy(), -np.inf, reached)
        return floors

    def candidates(self, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs whose product may reach the floor (Q,) of their query, by query, then by row.

        Returns queries (C,) int64, rows of the tile (C,) int64 and estimates (C,) float64, within `slack` of the
        product.
        """
        bound = (floor - self.slack) / self.unit
        if self.groups.dtype == torch.int32:
            # Rounded down: the estimate of a pair that just reaches the floor is a whole number of units.
            bound = np.clip(np.floor(bound), -(2**31) + 1, 2**31 - 1)
        else:
            bound = np.maximum(bound, torch.finfo(self.groups.dtype).min)  # above the padding of the last group
        bounds = torch.from_numpy(bound).to(self.groups.device, self.groups.dtype)
        query, group = torch.nonzero(self.greatest >= bounds[:, None], as_tuple=True)
        lanes = self.groups[query, group]
        which, lane = torch.nonzero(lanes >= bounds[query, None], as_tuple=True)
        row, value = group[which] * LANES + lane, lanes[which, lane]
        queries = query[which].cpu().numpy()
        return queries, row.cpu().numpy(), value.double().cpu().numpy() * self.unit[queries]


def nearest_by_codes(matrix: np.ndarray, tiles: Sequence[Codes], k: int) -> np.ndarray:
    """Rows (N, k) int64 of the `k` vectors with the greatest products of int8 codes, descending, ties by row.

    For choices that may be inexact but must be the same on every machine, such as the cells to visit: sums of whole
    numbers are exact everywhere. `matrix` is (N, D) float32, `tiles` come from `whole_number_codes`.
    """
    values = torch.from_numpy(matrix)
    peak = _peaks(values)  # of each row, so that rows do not depend on one another
    codes = _whole_numbers(values, torch.where(peak > 0, 127 / peak, 1.0)[:, None], tiles[0].values.device)
    best = torch.empty((len(matrix), 0), dtype=torch.int64, device=codes.device)
    first_row = 0
    for tile in tiles:
        products = _products(codes, tile.values)[: len(matrix)]
        products[:, tile.num_rows :] = -(2**30)  # below every product
        if k == 1:  # keys only for the first group that holds the greatest product
            groups = products.view(len(products), -1, LANES)
            group = groups.amax(2).argmax(1, keepdim=True)  # torch documents that argmax gives the first
            products = groups[torch.arange(len(groups), device=group.device), group[:, 0]]
            rows = group * LANES + torch.arange(LANES, device=group.device)
        else:
            products = products[:, : tile.num_rows]
            rows = torch.arange(tile.num_rows, device=products.device)
        keys = (products.long() << ROW_BITS) | (2**ROW_BITS - 1 - first_row - rows)
        keys = torch.topk(keys, min(k, keys.shape[1]), dim=1).values
        best = torch.topk(torch.cat([best, keys], dim=1), min(k, best.shape[1] + keys.shape[1]), dim=1).values
        first_row += tile.num_rows
    result: np.ndarray = (2**ROW_BITS - 1 - (best & (2**ROW_BITS - 1))).cpu().numpy()
    return result


def whole_number_codes(matrix: np.ndarray, device: str | torch.device) -> Codes:
    """Codes of `matrix` (N, D) float32, whole numbers from -127 to 127 whose products are exact on every device.

    They are int8, or float32 where int8 has no product, or float64 where a sum could exceed 2**24.
    """
    values = torch.from_numpy(matrix)
    peak = values.abs().max() if matrix.size else torch.zeros(())
    one = np.ones(1)
    return Codes(_whole_numbers(values, torch.where(peak > 0, 127 / peak, 1.0), device), len(matrix), one, one, one)


def _whole_numbers(values: torch.Tensor, scale: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    rounded = torch.mul(values, scale).round_()
    if torch.device(device).type == "cpu" and _has_int8_units():
        return _pad(rounded.to(torch.int8))
    return _pad(rounded.to(device, torch.float32 if 127**2 * values.shape[1] < 2**24 else torch.float64))


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(left, right.T) if left.dtype == torch.int8 else torch.mm(left, right.T)


class BestSoFar:
    """Floors that at least `k` products of each query reach, raised tile by tile.

    The maxima of the groups are products of different vectors. So the k-th greatest maximum is never above the k-th
    greatest product, and seldom far below.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._values: list[torch.Tensor] = []
        self.slack = np.zeros(1)
        self.num_groups = 0  # groups added so far

    def add(self, estimates: Estimates) -> None:
        """Take the products of one more tile into account."""
        values = estimates.greatest.amax(1, keepdim=True) if self._k == 1 else estimates.greatest
        unit = torch.tensor(estimates.unit, dtype=torch.float32, device=values.device)
        self._values.append(values * unit[:, None])
        self.num_groups += values.shape[1]
        self.slack = np.maximum(self.slack, estimates.slack)

    def floor(self) -> np.ndarray:
        """The floors (Q,) float64; -inf after fewer than `k` groups."""
        values = torch.cat(self._values, dim=1)
        if values.shape[1] < self._k:
            return np.full(len(values), -np.inf)
        values = values.amax(1, keepdim=True) if self._k == 1 else torch.topk(values, self._k, dim=1).values
        self._values = [values]
        kth: np.ndarray = values.amin(1).double().cpu().numpy()
        return kth - self.slack - ROUNDING


def _peaks(values: torch.Tensor) -> torch.Tensor:
    """The greatest absolute value (N,) of each row; four times as fast as torch's infinity norm."""
    return torch.maximum(values.amax(1), -values.amin(1)) if len(values) else torch.empty(0)


def _lengths(values: torch.Tensor) -> np.ndarray:
    lengths: np.ndarray = torch.linalg.vector_norm(values, dim=1).double().numpy()
    return lengths


def _least(dtype: torch.dtype) -> float:
    return -(2**31) if dtype == torch.int32 else -torch.inf


def _has_int8_units() -> bool:
    # Without VNNI, oneDNN's int8 product is slow, and before torch 2.6 it overflowed (pytorch #136746).
    return bool(torch.cpu._is_vnni_supported())
