"""Arrow tables in Parquet files: written atomically, and read with a check of their columns.

All reads happen in the calling thread: without `pre_buffer` and with `use_threads=False`. A thread of Arrow may keep
the last reference to a file object of Python. If it releases the object while the interpreter ends, the process aborts
and its exit status is lost (apache/arrow issues 33975 and 34314; measured 2026-11: 3 to 25% of runs).
"""

import posixpath
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import InputError
from curation.files.hashes import sha256_of_bytes
from curation.files.paths import FileRecord, RecordedPath, atomic_write, check_hash, open_read, read_bytes


def write_table(path: str, table: pa.Table) -> FileRecord:
    """Write an Arrow table as Parquet to `path` atomically; returns the record of the file."""
    with atomic_write(path) as file:
        pq.write_table(table, pa.PythonFile(file, mode="w"), **_encoding(table.schema))
    return FileRecord(name=posixpath.basename(path), sha256=file.sha256, bytes=file.size, rows=table.num_rows)


def write_row_groups(path: str, column: str, tables: Iterable[tuple[int, pa.Table]], empty: pa.Table) -> FileRecord:
    """Write tables of one schema as row groups of one Parquet file, each marked by its number in an added `column`.

    Only one table is held at a time. Tables without rows are left out; `empty` gives the schema. `read_row_groups`
    reads the groups of one number without the others.
    """
    schema = empty.schema.append(pa.field(column, pa.int32()))
    num_rows = 0
    with atomic_write(path) as file:
        # Statistics of other columns (minimum and maximum, kilobytes for vectors) would enlarge the footer by group.
        options = _encoding(schema) | {"write_statistics": [column]}
        with pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, **options) as writer:
            for number, table in tables:
                if table.num_rows:
                    marks = pa.array(np.full(table.num_rows, number, np.int32))
                    marked = table.append_column(pa.field(column, pa.int32()), marks)
                    writer.write_table(marked, row_group_size=table.num_rows)
                    num_rows += table.num_rows
    return FileRecord(name=posixpath.basename(path), sha256=file.sha256, bytes=file.size, rows=num_rows)


def open_file(file: BinaryIO, **options: Any) -> pq.ParquetFile:
    """A reader of an open Parquet file. Its reads also need `use_threads=False`: see the text above."""
    return pq.ParquetFile(file, pre_buffer=False, **options)


def read_row_groups(path: str, column: str, number: int, schema: pa.Schema) -> pa.Table:
    """The rows that `write_row_groups` wrote under `number`, if any, with the columns of `schema`."""
    with open_read(path) as file:
        parquet = open_file(file)
        index = parquet.schema_arrow.names.index(column)
        index += len(parquet.metadata.schema) - len(parquet.schema_arrow.names)  # among leaf columns, where it is last
        chosen = [
            group
            for group in range(parquet.num_row_groups)
            if parquet.metadata.row_group(group).column(index).statistics.min == number
        ]
        table = parquet.read_row_groups(chosen, columns=schema.names, use_threads=False)
        return table.select(schema.names).cast(schema)


def read_table(path: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read the columns of `schema`, or the named `columns` of it, from a Parquet file.

    Raises InputError when there is no such file, when it is not Parquet, or when columns are missing or of other types.
    A RecordedPath is read whole, and its hash is checked.
    """
    selected = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    table = read_table_columns(path, selected.names)
    try:
        return table.cast(selected)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:  # ValueError: null in a required column
        raise InputError(f"{path}: columns of the wrong type: {error}.") from None


def read_table_columns(path: str, columns: list[str]) -> pa.Table:
    """The named columns of a Parquet file, in that order, of any types. Raises InputError as `read_table` does."""
    try:
        with _open_checked(path) as file:
            parquet = open_file(file)
            names = parquet.schema_arrow.names
            missing = [name for name in columns if name not in names]
            if missing:
                raise InputError(f"{path}: no column {', '.join(missing)}. Found: {', '.join(names) or 'none'}.")
            return parquet.read(columns=columns, use_threads=False).select(columns)
    except FileNotFoundError:
        raise InputError(f"No file at '{path}'.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}.") from None


def _open_checked(path: str) -> Any:
    """The file at `path`, opened; of a RecordedPath its bytes, read once for the hash and for the table."""
    if not isinstance(path, RecordedPath):
        return open_read(path)
    data = read_bytes(path)
    check_hash(path, sha256_of_bytes(data))
    return pa.BufferReader(data)


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """Zstandard and dictionaries, except for vectors: these shrink little, and take several times longer to read."""
    leaves = []
    for column in schema:
        is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        is_vector = is_list and pa.types.is_float16(column.type.value_type)
        if not is_vector and not pa.types.is_fixed_size_binary(column.type):
            leaves.append(f"{column.name}.list.element" if is_list else column.name)
    return {"compression": dict.fromkeys(leaves, "zstd"), "use_dictionary": leaves}


def num_rows(path: str) -> int:
    """The number of rows of a Parquet file, from its footer. Raises InputError as `read_table` does."""
    return int(_read_footer(path).num_rows)


def read_metadata(path: str) -> dict[bytes, bytes]:
    """The keys and values that the writer of a Parquet file added to its footer. Raises as `num_rows` does."""
    return dict(_read_footer(path).metadata or {})


def _read_footer(path: str) -> pq.FileMetaData:
    try:
        with open_read(path) as file:
            return open_file(file).metadata
    except FileNotFoundError:
        raise InputError(f"No file at '{path}'.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}.") from None
