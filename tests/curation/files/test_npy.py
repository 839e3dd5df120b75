"""Arrays come back as they were written, and numpy reads them too."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.files import npy, paths

ARRAYS: list[Any] = [np.arange(6, dtype=np.float16).reshape(2, 3), np.zeros((0, 4)), np.array(7), np.arange(3)]


@pytest.mark.parametrize("root", ["local", "memory"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_arrays_are_read_as_written(tmp_path: Path, count: int, root: str) -> None:
    path = paths.join(str(tmp_path) if root == "local" else f"memory://{tmp_path.name}", "arrays.npy")
    record = npy.write_arrays(path, *ARRAYS[:count])
    assert record.name == "arrays.npy" and record.rows == 0 and record.bytes == len(paths.read_bytes(path))
    for array, expected in zip(npy.read_arrays(path, count), ARRAYS, strict=False):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
    first = npy.read_array(path)
    first[:] = 1  # arrays that were read can be changed
    np.testing.assert_array_equal(npy.read_array(path), ARRAYS[0])


def test_one_array_has_the_bytes_that_numpy_saves(tmp_path: Path) -> None:
    for number, array in enumerate([*ARRAYS, np.asfortranarray(ARRAYS[0])]):
        npy.write_arrays(str(tmp_path / "ours.npy"), array)
        np.save(tmp_path / "numpy.npy", array)
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes(), number
        np.testing.assert_array_equal(np.load(tmp_path / "ours.npy", allow_pickle=False), array)


def test_header_says_shape_order_and_dtype_and_leaves_the_file_at_the_values(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=">f4").reshape(2, 3)
    for version in ((1, 0), (2, 0)):
        for order, by_column in (("C", False), ("F", True)):
            with open(tmp_path / "m.npy", "wb") as file:
                np.lib.format.write_array(file, np.array(matrix, order=order), version=version)
            with open(tmp_path / "m.npy", "rb") as file:
                assert npy.read_header(file) == ((2, 3), by_column, np.dtype(">f4"))
                assert file.read() == matrix.tobytes(order)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x03\x00", b"PK\x03\x04 an archive", b"text" * 100])
def test_header_of_anything_else_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.npy").write_bytes(content)
    with pytest.raises(ValueError), open(tmp_path / "m.npy", "rb") as file:
        npy.read_header(file)


def test_pickles_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "objects.npy")
    with pytest.raises(ValueError, match="allow_pickle"):
        npy.write_arrays(path, np.array([object()]))
    assert not paths.exists(path)
    np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        npy.read_array(path)


@pytest.mark.parametrize("shape", ["(3, 100000000000000)", "(-1, 8)", "(3, 8", "(2, 9)"])
def test_header_of_an_impossible_shape_is_a_value_error(shape: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4 * 16)
    with pytest.raises(ValueError, match="its header"):
        npy.read_header(io.BytesIO(content))
