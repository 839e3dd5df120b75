"""Vectors of users are read as unit float16, or refused with the file and the image."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.errors import InputError
from curation.files import parquet, paths, vectors
from curation.run_folder import read_vectors
from tests.curation.builders import id_of, unit_vectors, write_stage


def write(path: Path, image_ids: list[object], column: pa.Array) -> str:
    parquet.write_table(str(path), pa.table({"image_id": pa.array(image_ids), "vector": column}))
    return str(path)


def lists(matrix: np.ndarray, value_type: pa.DataType, kind: str) -> pa.Array:
    rows = matrix.tolist()
    match kind:
        case "fixed":
            return pa.array(rows, pa.list_(pa.float64(), matrix.shape[1])).cast(pa.list_(value_type, matrix.shape[1]))
        case "large":
            return pa.array(rows, pa.large_list(pa.float64())).cast(pa.large_list(value_type))
    return pa.array(rows, pa.list_(pa.float64())).cast(pa.list_(value_type))


@pytest.mark.parametrize("kind", ["fixed", "variable", "large"])
@pytest.mark.parametrize("value_type", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_every_list_of_floats_is_read_as_unit_vectors(
    tmp_path: Path, kind: str, value_type: pa.DataType, rows: int
) -> None:
    unit = unit_vectors(rows, rows, 16)
    path = write(tmp_path / "v.parquet", [id_of(row) for row in range(rows)], lists(unit * 7, value_type, kind))
    image_ids, matrix = vectors.read_file(path)
    assert image_ids == [id_of(row) for row in range(rows)]
    assert matrix.dtype == np.float16 and matrix.shape == (rows, 16)
    np.testing.assert_allclose(matrix.astype(np.float64), unit, atol=2e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_float_matrix_is_read_with_row_numbers_as_ids(tmp_path: Path, dtype: str, order: str) -> None:
    unit = unit_vectors(0, 12, 5)
    np.save(tmp_path / "v.npy", np.array(unit * 3, dtype=dtype, order=order))  # type: ignore[call-overload]
    image_ids, matrix = vectors.read_file(str(tmp_path / "v.npy"))
    assert image_ids == [str(row) for row in range(12)]
    assert matrix.dtype == np.float16
    np.testing.assert_allclose(matrix.astype(np.float64), unit, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 0.5, 1.0, 1.001, 1000.0, 1e30])
def test_vectors_of_any_length_are_scaled_to_unit_length(tmp_path: Path, scale: float) -> None:
    unit = unit_vectors(1, 20, 33)
    np.save(tmp_path / "v.npy", unit * np.float32(scale))
    matrix = vectors.read_file(str(tmp_path / "v.npy"))[1].astype(np.float64)
    np.testing.assert_allclose(matrix, unit * (scale if scale == 1.001 else 1), atol=1e-3)


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e300])
def test_vectors_whose_squares_exceed_float64_are_scaled(tmp_path: Path, scale: float) -> None:
    unit = unit_vectors(1, 20, 33).astype(np.float64)
    mixed = unit * np.where(np.arange(20) % 2, scale, 1)[:, None]
    np.save(tmp_path / "v.npy", mixed)
    rows = lists(mixed, pa.float64(), "fixed")
    for path in (str(tmp_path / "v.npy"), write(tmp_path / "v.parquet", [id_of(row) for row in range(20)], rows)):
        np.testing.assert_allclose(vectors.read_file(path)[1].astype(np.float64), unit, atol=1e-3)
        np.testing.assert_allclose(vectors.read_file(path, in_float32=True)[1], unit, atol=1e-6)


def test_precision_that_was_given_is_kept_on_request(tmp_path: Path) -> None:
    unit = unit_vectors(2, 20, 33)
    for dtype, kept in ((np.float16, np.float16), (np.float32, np.float32), (np.float64, np.float32)):
        np.save(tmp_path / "v.npy", (unit * 1.001).astype(dtype))
        matrix = vectors.read_file(str(tmp_path / "v.npy"), in_float32=True)[1]
        assert matrix.dtype == kept
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("width", [2, 64, 1280])
def test_vectors_that_seedbed_wrote_are_read_bit_for_bit(tmp_path: Path, width: int) -> None:
    unit = unit_vectors(width, 50, width).astype(np.float16)
    ids = [id_of(row) for row in range(50)]
    path = paths.join(str(tmp_path), "vectors-00000.parquet")
    parquet.write_table(path, vectors.make_table(ids, unit))
    read_ids, read = vectors.read_file(path)
    assert read_ids == ids
    assert read.tobytes() == unit.tobytes()
    np.save(tmp_path / "v.npy", unit)
    assert vectors.read_file(str(tmp_path / "v.npy"))[1].tobytes() == unit.tobytes()


def test_slices_of_a_table_are_respected(tmp_path: Path) -> None:
    unit = unit_vectors(3, 30, 4).astype(np.float16)
    table = vectors.make_table([id_of(row) for row in range(30)], unit)
    path = str(tmp_path / "v.parquet")
    parquet.write_table(path, pa.concat_tables([table[20:25], table[3:4], table[9:9]]))
    ids, matrix = vectors.read_file(path)
    assert ids == [id_of(row) for row in (20, 21, 22, 23, 24, 3)]
    assert matrix.tobytes() == unit[[20, 21, 22, 23, 24, 3]].tobytes()


def test_tables_without_rows_and_with_columns_in_any_order(tmp_path: Path) -> None:
    path = str(tmp_path / "v.parquet")
    parquet.write_table(path, vectors.make_table([], np.empty((0, 7), np.float16)))
    ids, matrix = vectors.read_file(path)
    assert ids == [] and matrix.shape == (0, 7)
    table = pa.table({"more": ["x"], "vector": pa.array([[3.0, 4.0]]), "image_id": [17]})
    parquet.write_table(path, table)
    ids, matrix = vectors.read_file(path)
    assert ids == ["17"]
    np.testing.assert_allclose(matrix, [[0.6, 0.8]], atol=1e-3)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 0.0], [NAN, 1.0]], f"image '{id_of(1)}' is zero or not finite \\(1 such rows\\)"),
        ([[1.0, 0.0], [INF, 1.0]], f"image '{id_of(1)}' is zero or not finite"),
        ([[0.0, 0.0], [0.0, 0.0]], f"image '{id_of(0)}' is zero or not finite \\(2 such rows\\)"),
        ([[1.0, 0.0], [1.0]], "different widths"),
        ([[1.0, 0.0], []], "different widths"),
        ([[1.0, 0.0], [1.0, 0.0, 1.0]], "different widths"),
        ([[1.0], [1.0, 0.0, 1.0]], "different widths"),
        ([[], []], "values that are not floats"),
        ([[1.0, 0.0], None], "a row has no image_id or no vector"),
        ([[1.0, 0.0], [1.0, None]], "values that are not floats"),
        ([[1, 0], [1, 0]], "values that are not floats"),
        ([["a"], ["b"]], "values that are not floats"),
        ([1.0, 2.0], "expected a list of floats per row"),
        (["a", "b"], "expected a list of floats per row"),
        ([b"\0\0\x80?", b"a"], "expected a list of floats per row"),
    ],
)
def test_invalid_vectors_are_refused_with_file_and_image(tmp_path: Path, rows: list[object], message: str) -> None:
    columns = [pa.array(rows)]
    widths = {len(row) for row in rows if isinstance(row, list)}
    if len(widths) == 1 and widths != {0}:
        columns.append(pa.array(rows, pa.list_(columns[0].type.value_type, widths.pop())))
    for column in columns:
        path = write(tmp_path / "v.parquet", [id_of(0), id_of(1)], column)
        with pytest.raises(InputError, match=rf"v\.parquet: .*{message}"):
            vectors.read_file(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"image_id": ["a"]}), "no column vector. Found: image_id"),
        (pa.table({"vector": [[1.0]]}), "no column image_id. Found: vector"),
        (pa.table({"image_id": ["a", None], "vector": [[1.0], [1.0]]}), "no image_id or no vector"),
        (pa.table({"image_id": [["a"]], "vector": [[1.0]]}), "column 'image_id' has type"),
        (pa.table({"image_id": [b"\xff"], "vector": [[1.0]]}), "column 'image_id' has type"),
    ],
)
def test_invalid_columns_are_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    path = str(tmp_path / "v.parquet")
    parquet.write_table(path, table)
    with pytest.raises(InputError, match=rf"v\.parquet: .*{message}"):
        vectors.read_file(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(4, np.float32), r"expected a matrix of floats.*float32 \(4,\)"),
        (np.ones((2, 2, 2), np.float32), r"expected a matrix of floats"),
        (np.float32(1), r"expected a matrix of floats"),
        (np.ones((2, 2), np.int64), r"expected a matrix of floats.*int64 \(2, 2\)"),
        (np.ones((2, 2), np.complex64), r"expected a matrix of floats"),
        (np.array([[object()]], dtype=object), r"expected a matrix of floats.*object"),
        (np.array([[1, 0], [0, NAN]], np.float32), r"image '1' is zero or not finite"),
        (np.zeros((2, 2), np.float32), r"image '0' is zero or not finite \(2 such"),
        (np.ones((3, 0), np.float32), r"image '0' is zero"),
    ],
)
def test_invalid_matrices_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "v.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=rf"v\.npy: .*{message}"):
        vectors.read_file(str(tmp_path / "v.npy"))


def test_damaged_matrix_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, unit_vectors(0, 4, 8))
    whole = path.read_bytes()
    for cut in [*range(0, 140, 7), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"v\.npy: not a readable \.npy matrix"):
            vectors.read_file(str(path))
    np.savez(tmp_path / "archive", a=unit_vectors(0, 4, 8))
    path.write_bytes((tmp_path / "archive.npz").read_bytes())
    with pytest.raises(InputError, match=r"v\.npy: not a readable \.npy matrix"):
        vectors.read_file(str(path))


# Folders


def read_together(path: str) -> tuple[list[str], np.ndarray]:
    parts = list(read_vectors(path))
    return [image_id for ids, _ in parts for image_id in ids], np.concatenate([matrix for _, matrix in parts])


@pytest.mark.parametrize("root", ["local", "memory"])
def test_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path, root: str) -> None:
    folder = str(tmp_path) if root == "local" else f"memory://{tmp_path.name}"
    unit = unit_vectors(5, 9, 6).astype(np.float16)
    ids = [id_of(row) for row in range(9)]
    for name, rows in (("b", slice(3, 5)), ("a", slice(0, 3)), ("c", slice(5, 9))):
        parquet.write_table(paths.join(folder, f"{name}.parquet"), vectors.make_table(ids[rows], unit[rows]))
    paths.write_bytes(paths.join(folder, "README.md"), b"not a vector")
    read_ids, matrix = read_together(folder)
    assert read_ids == ids and matrix.tobytes() == unit.tobytes()
    assert len(list(read_vectors(folder))) == 3
    assert read_together(paths.join(folder, "a.parquet"))[0] == ids[:3]


def test_folder_of_a_stage_gives_the_files_of_its_manifest(tmp_path: Path) -> None:
    unit = unit_vectors(5, 4, 6)
    tables = [vectors.make_table([id_of(row)], unit[row : row + 1]) for row in range(4)]
    folder = write_stage(
        tmp_path / "embed", [{"vectors": tables[0], "thumbnails": pa.table({"x": [1]})}, {"vectors": tables[1]}]
    )
    parquet.write_table(paths.join(folder, "stray.parquet"), tables[2])
    assert read_together(folder)[0] == [id_of(0), id_of(1)]
    with pytest.raises(InputError, match="without vectors"):
        list(read_vectors(write_stage(tmp_path / "ingest", [{"images": tables[0]}])))


@pytest.mark.parametrize(
    "empty", [pa.list_(pa.float32()), pa.list_(pa.float16(), 3), pa.list_(pa.float16(), 6)], ids=str
)
def test_width_of_an_empty_file_among_others_is_ignored(tmp_path: Path, empty: pa.DataType) -> None:
    parquet.write_table(
        str(tmp_path / "a.parquet"), pa.table({"image_id": pa.array([], pa.string()), "vector": pa.array([], empty)})
    )
    parquet.write_table(str(tmp_path / "b.parquet"), vectors.make_table(["x"], unit_vectors(0, 1, 6)))
    ids, matrix = read_together(str(tmp_path))
    assert ids == ["x"] and matrix.shape == (1, 6)


def test_matrices_of_a_folder_are_read_in_natural_order_with_ids_of_file_and_row(tmp_path: Path) -> None:
    numbers = (0, 1, 2, 9, 10, 11)
    for number in numbers:
        np.save(tmp_path / f"img_emb_{number}.npy", np.eye(2, 16, number))
    ids, matrix = read_together(str(tmp_path))
    assert ids == [f"img_emb_{number}.npy:{row}" for number in numbers for row in (0, 1)]
    assert matrix.argmax(axis=1).tolist() == [number + row for number in numbers for row in (0, 1)]
    assert read_together(str(tmp_path / "img_emb_9.npy"))[0] == ["0", "1"]
    for number in numbers[1:]:
        (tmp_path / f"img_emb_{number}.npy").unlink()
    assert read_together(str(tmp_path))[0] == ["0", "1"]


def test_ids_that_repeat_are_refused_except_in_a_stage(tmp_path: Path) -> None:
    tables = [vectors.make_table(ids, unit_vectors(0, 2, 6)) for ids in (["a", "b"], ["c", "a"], ["e", "e"])]
    for folder, numbers in (("apart", (0, 1)), ("one", (2,))):
        for number in numbers:
            parquet.write_table(f"{tmp_path}/{folder}/{number}.parquet", tables[number])
    with pytest.raises(InputError, match=r"apart/1\.parquet: a second vector of image 'a'; .*apart/0\.parquet"):
        read_together(str(tmp_path / "apart"))
    with pytest.raises(InputError, match=r"one/2\.parquet: a second vector of image 'e'"):
        read_together(str(tmp_path / "one"))
    stage = write_stage(tmp_path / "embed", [{"vectors": table} for table in tables[:2]])
    assert read_together(stage)[0] == ["a", "b", "c", "a"]


def test_paths_without_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No file or folder at '.*nothing'"):
        list(read_vectors(str(tmp_path / "nothing")))
    with pytest.raises(InputError, match=r"holds no vectors"):
        list(read_vectors(str(tmp_path)))
    parquet.write_table(str(tmp_path / "a.parquet"), vectors.make_table([], np.empty((0, 4), np.float16)))
    with pytest.raises(InputError, match=r"holds no vectors"):
        list(read_vectors(str(tmp_path)))
    (tmp_path / "notes.txt").write_text("no vectors")
    with pytest.raises(InputError, match=r"notes\.txt: not a readable Parquet file"):
        list(read_vectors(str(tmp_path / "notes.txt")))


def test_files_of_different_widths_are_refused(tmp_path: Path) -> None:
    for name, width in (("a", 4), ("b", 4), ("c", 5)):
        parquet.write_table(str(tmp_path / f"{name}.parquet"), vectors.make_table([name], unit_vectors(0, 1, width)))
    with pytest.raises(InputError, match=r"c\.parquet: vectors of width 5; the files before have 4"):
        list(read_vectors(str(tmp_path)))
