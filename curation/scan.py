"""Which inner products may reach a floor: a fast scan in low precision that provably loses none.

Legend: Q queries, N vectors, D dimensions. A tile is up to `tile_rows` vectors that are scanned at a time.

Both sides are rounded to codes x' = scale * code, and the codes are multiplied out. By Cauchy and Schwarz

    |x.y - x'.y'| = |x.(y - y') + (x - x').y'| <= |x| |y - y'| + |x - x'| |y'|,

the `slack`, whose four lengths are measured when the codes are made. So every pair whose product reaches a floor has an
estimate of at least floor - slack; those are the candidates, and their exact products decide. On processors with int8
units (VNNI) the codes are int8, which multiply four times faster than float32; elsewhere on the CPU they are the
vectors in float32, and on a GPU in float16. That choice changes the speed and never what is found.
"""

from dataclasses import dataclass

import numpy as np
import torch

# Queries and vectors of one product. CPU: the fastest measured of 512..8,192 x 256..4,096 (2026-11, 2 cores of a
# Cascade Lake, D 384: 979 billion operations a second in int8, 247 in float32; faiss's flat index: 187). GPU: assumed.
QUERY_ROWS = {"cpu": 2048, "cuda": 8192}
TILE_ROWS = {"cpu": 1024, "cuda": 32768}
# Products whose maximum is looked at before they are looked at one by one. Measured: at 64 the maxima cost a tenth of
# the product, at 16 half of it.
LANES = 64
# What float32 rounds off a sum of D products of unit vectors, generously: the exact score has it as well.
ROUNDING = 1e-5
# The same where a GPU returns the product of float16 codes as float16: half a unit in the last place, up to 2 in size.
HALF_ROUNDING = 2e-3


@dataclass(frozen=True)
class Codes:
    """Vectors in low precision, with what the rounding left out."""

    values: torch.Tensor  # (rows padded with zeros to a multiple of LANES, D)
    num_rows: int
    scale: np.ndarray  # (N,) float64 for queries, one for a tile
    norm: np.ndarray  # (N,) or one: the length, or the greatest length
    residual: np.ndarray  # (N,) or one: the length of what was rounded off, or the greatest


def device_kind(device: str) -> str:
    """'cpu' or 'cuda', the key of the tables of sizes."""
    return torch.device(device).type


def encode(matrix: np.ndarray, device: str, *, row_scales: bool) -> Codes:
    """Codes of `matrix` (N, D) float32, with one scale a row (queries) or one for all (a tile)."""
    values = torch.from_numpy(matrix)
    norm = _lengths(values)
    if device_kind(device) == "cuda":
        codes = values.to(device).half()
        residual, scale = _lengths(values - codes.float().cpu()), np.ones(len(matrix))
    elif not _has_int8_units():
        codes, residual, scale = values, np.zeros(len(matrix)), np.ones(len(matrix))
    else:
        peak = torch.linalg.vector_norm(values, torch.inf, dim=1) if len(matrix) else values[:, 0]
        if not row_scales and len(matrix):
            peak = peak.amax().expand(len(matrix))
        step = torch.where(peak > 0, peak / 127, 1.0)
        rounded = torch.mul(values, (1 / step)[:, None]).round_()
        codes, scale = rounded.to(torch.int8), step.double().numpy()
        residual = _lengths(torch.addcmul(values, rounded, -step[:, None]))
    padding = -len(codes) % LANES
    if padding:
        codes = torch.cat([codes, torch.zeros((padding, codes.shape[1]), dtype=codes.dtype, device=codes.device)])
    if not row_scales:
        scale, norm, residual = (part.max(initial=0, keepdims=True) for part in (scale, norm, residual))
    return Codes(codes, len(matrix), scale, norm, residual)


def estimate(queries: Codes, tile: Codes) -> "Estimates":
    """All products of the codes, to be asked for bounds and candidates."""
    if queries.values.dtype == torch.int8:
        products = torch._int_mm(queries.values, tile.values.T)
    else:
        products = torch.mm(queries.values, tile.values.T)
    products = products[: queries.num_rows]
    if tile.num_rows < len(tile.values):
        products[:, tile.num_rows :] = _least(products.dtype)
    rounding = HALF_ROUNDING if products.dtype == torch.float16 else ROUNDING
    slack = queries.norm * tile.residual + queries.residual * (tile.norm + tile.residual) + rounding
    groups = products.view(len(products), -1, LANES)
    return Estimates(groups, groups.amax(2), queries.scale * tile.scale, slack)


@dataclass(frozen=True)
class Estimates:
    """Products of codes in units of `unit`, in groups of LANES; what pads the last group is the least number."""

    groups: torch.Tensor  # (Q, groups, LANES)
    greatest: torch.Tensor  # (Q, groups)
    unit: np.ndarray  # (Q,) float64
    slack: np.ndarray  # (Q,) float64

    def candidates(self, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs whose product may reach the floor (Q,) of their query, by query, then by row.

        Queries (C,) int64, rows of the tile (C,) int64, and estimates (C,) float64, each within `slack` of the product.
        """
        least = (floor - self.slack) / self.unit
        if self.groups.dtype == torch.int32:
            # Rounded down: the estimate of a pair that just reaches the floor is a whole number of units.
            least = np.clip(np.floor(least), -(2**31) + 1, 2**31 - 1)
        bound = torch.from_numpy(least).to(self.groups.device, self.groups.dtype)
        query, group = torch.nonzero(self.greatest >= bound[:, None], as_tuple=True)
        lanes = self.groups[query, group]
        which, lane = torch.nonzero(lanes >= bound[query, None], as_tuple=True)
        query, row, value = query[which], group[which] * LANES + lane, lanes[which, lane]
        found = query.cpu().numpy()
        return found, row.cpu().numpy(), value.double().cpu().numpy() * self.unit[found]


class BestSoFar:
    """Floors that at least `k` products of each query reach, raised by one tile after another.

    The greatest of each group are products of different vectors: the k-th of them is never above the k-th of all, and
    seldom far below.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._values: list[torch.Tensor] = []
        self.slack = np.zeros(1)

    def add(self, estimates: Estimates) -> None:
        """Count the products of one more tile in."""
        values = estimates.greatest.amax(1, keepdim=True) if self._k == 1 else estimates.greatest
        self._values.append(values * torch.from_numpy(estimates.unit).to(values.device, torch.float32)[:, None])
        self.slack = np.maximum(self.slack, estimates.slack)

    def floor(self) -> np.ndarray:
        """The floors (Q,) float64; below every product where fewer than `k` groups were seen."""
        values = torch.cat(self._values, dim=1)
        if values.shape[1] < self._k:
            return np.full(len(values), -np.inf)
        values = values.amax(1, keepdim=True) if self._k == 1 else torch.topk(values, self._k, dim=1).values
        self._values = [values]
        kth: np.ndarray = values.amin(1).double().cpu().numpy()
        return kth - self.slack - ROUNDING


def _lengths(values: torch.Tensor) -> np.ndarray:
    lengths: np.ndarray = torch.linalg.vector_norm(values, dim=1).double().numpy()
    return lengths


def _least(dtype: torch.dtype) -> float:
    return -(2**31) if dtype == torch.int32 else -torch.inf


def _has_int8_units() -> bool:
    # Without VNNI, oneDNN's int8 product is slow, and before torch 2.6 it overflowed (pytorch #136746).
    return bool(torch.cpu._is_vnni_supported())
