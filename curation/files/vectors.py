"""Vectors on disk and in memory: Parquet with `image_id` and `vector`, or a user's own `.npy` matrix.

Legend: N vectors, D dimensions.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from curation.errors import InputError
from curation.files import npy, parquet, paths, schemas

# Rows of a .npy matrix read at a time: 168 MB at 1,280 dimensions of float16. Assumed.
NPY_ROWS = 65_536
# Rows whose norms are computed at a time, in float32: 10 MB at 1,280 dimensions. Assumed.
NORM_ROWS = 2048


def make_table(image_ids: list[str], matrix: np.ndarray) -> pa.Table:
    """A vectors table of N ids and a matrix (N, D); values are stored as float16."""
    rows, dimensions = matrix.shape
    assert rows == len(image_ids), (rows, len(image_ids))
    values = pa.array(np.ascontiguousarray(matrix, dtype=np.float16).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, dimensions)
    return pa.Table.from_arrays([pa.array(image_ids, pa.string()), column], schema=schemas.vectors(dimensions))


def num_rows(path: str) -> int:
    """The number of vectors in one Parquet or `.npy` file, from its header. Raises InputError as `read_file` does."""
    return len(_read_npy(path)[0]) if path.endswith(".npy") else parquet.num_rows(path)


def read_file(path: str, *, in_float32: bool = False) -> tuple[list[str], np.ndarray]:
    """Ids and unit vectors (N, D) float16 of one Parquet or `.npy` file. The ids of a matrix are its row numbers.

    Vectors are scaled to unit length. With `in_float32`, vectors of more than 16 bits are float32. Raises InputError
    when the file is of another kind, or when a vector is missing, zero or not finite. The message names the file, and
    the image where there is one.
    """
    if path.endswith(".npy"):
        return _read_npy(path, in_float32=in_float32)
    table = parquet.read_table_columns(path, ["image_id", "vector"])
    try:
        image_ids = table.column("image_id").cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        id_type = table.schema.field("image_id").type
        raise InputError(f"{path}: column 'image_id' has type {id_type}; expected text or whole numbers.") from None
    kind = table.schema.field("vector").type
    column = table.column("vector").combine_chunks()
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise InputError(f"{path}: column 'vector' has type {kind}; expected a list of floats per row.")
    if column.null_count or table.column("image_id").null_count:
        raise InputError(f"{path}: a row has no image_id or no vector.")
    values = column.flatten()  # respects the offset of a sliced chunk; .values would not
    if not pa.types.is_floating(kind.value_type) or values.null_count:
        raise InputError(f"{path}: column 'vector' has values that are not floats ({kind}).")
    if len(values) % max(len(column), 1) or len(set(column.value_lengths().to_pylist())) > 1:
        raise InputError(f"{path}: vectors of different widths in column 'vector'.")
    width = len(values) // max(len(column), 1) if len(column) else getattr(kind, "list_size", 0)
    matrix = values.to_numpy(zero_copy_only=False).reshape(len(column), width)
    return image_ids, _unit(matrix, image_ids, path, in_float32=in_float32)


def read_blocks(path: str, *, in_float32: bool = False) -> Iterator[tuple[list[str], np.ndarray]]:
    """As `read_file`, but NPY_ROWS rows of a matrix at a time."""
    if path.endswith(".npy"):
        yield from _npy_blocks(path, in_float32=in_float32)
    else:
        yield read_file(path, in_float32=in_float32)


def _read_npy(path: str, *, in_float32: bool = False) -> tuple[list[str], np.ndarray]:
    blocks = list(_npy_blocks(path, in_float32=in_float32))
    return [image_id for ids, _ in blocks for image_id in ids], np.concatenate([matrix for _, matrix in blocks])


def _npy_blocks(path: str, *, in_float32: bool) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids (row numbers) and unit vectors of a matrix, NPY_ROWS rows at a time; one empty block for an empty matrix."""
    with paths.open_read(path) as file:
        try:
            shape, by_column, dtype = npy.read_header(file)
        except ValueError as error:
            raise InputError(f"{path}: not a readable .npy matrix: {error}.") from None
        if len(shape) != 2 or not np.issubdtype(dtype, np.floating):
            raise InputError(f"{path}: expected a matrix of floats (rows, width). Found: {dtype} {shape}.")
        rows, width = shape
        step = max(1, rows) if by_column else NPY_ROWS  # a matrix stored by column can only be read whole
        for start in range(0, max(1, rows), step):
            count = min(step, rows - start)
            data = file.read(count * width * dtype.itemsize)
            if len(data) != count * width * dtype.itemsize:
                raise InputError(f"{path}: not a readable .npy matrix: it ends before its {rows:,} rows do.")
            image_ids = [str(row) for row in range(start, start + count)]
            matrix = np.frombuffer(data, dtype).reshape((count, width), order="F" if by_column else "C")
            yield image_ids, _unit(matrix, image_ids, path, in_float32=in_float32)


def _unit(matrix: np.ndarray, image_ids: list[str], path: str, *, in_float32: bool) -> np.ndarray:
    """`matrix` (N, D) with rows of unit length, float16; with `in_float32`, float32 unless the rows are float16.

    Rows that have unit length up to the rounding of the result stay as they are.
    """
    dtype: np.dtype[Any] = np.dtype(np.float16)
    rounding = 2e-3
    if matrix.dtype == np.float16:
        norms = np.empty(len(matrix), np.float32)
        for start in range(0, len(matrix), NORM_ROWS):
            import torch  # it takes a second or more, which commands that read no vectors do not need

            # A copy, since torch warns of arrays that it may not write to. It converts twice as fast as numpy.
            block = torch.from_numpy(matrix[start : start + NORM_ROWS].copy()).float()
            norms[start : start + NORM_ROWS] = torch.linalg.vector_norm(block, dim=1).numpy()
    else:
        norms = _norms(matrix)
        extreme = np.flatnonzero(~((norms > np.finfo(np.float32).tiny) & (norms < np.finfo(np.float32).max)))
        if len(extreme):  # their squares exceed the range of float64, or their lengths that of float32
            peaks = np.abs(matrix[extreme]).max(axis=1, initial=0)
            scalable = np.isfinite(peaks) & (peaks > 0)
            extreme, matrix = extreme[scalable], matrix.astype(np.promote_types(matrix.dtype, np.float64))
            matrix[extreme] /= peaks[scalable, None]
            norms[extreme] = _norms(matrix[extreme])
        if in_float32:
            dtype, rounding = np.dtype(np.float32), 1e-6
        else:
            norms = norms.astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(wrong):
        raise InputError(
            f"{path}: the vector of image '{image_ids[int(wrong[0])]}' is zero or not finite ({len(wrong)} such rows). "
            "Embed these images again, or leave the rows out."
        )
    # Vectors that Seedbed wrote have unit length up to float16 rounding; scaling them again would only add rounding.
    needs_scaling = np.abs(norms - 1) > rounding
    if not needs_scaling.any():
        return matrix.astype(dtype, copy=False)
    return np.where(needs_scaling[:, None], matrix / norms[:, None], matrix).astype(dtype)


def _norms(matrix: np.ndarray) -> np.ndarray:
    """The lengths (N,) float64 of the rows of a matrix (N, D)."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        norms: np.ndarray = np.sqrt(np.einsum("nd,nd->n", matrix, matrix, dtype=np.float64, casting="same_kind"))
    return norms
