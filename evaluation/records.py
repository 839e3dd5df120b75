"""Files of records: one line of JSON a record. Lines are appended and never changed."""

import os
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from curation.errors import InputError
from curation.files import paths


class JsonRecord(BaseModel):
    """A line of a file of records: closed, frozen, of strict types and finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


RecordType = TypeVar("RecordType", bound=JsonRecord)


def append(path: str, record: JsonRecord) -> None:
    """Add one record to the file at `path`, which need not exist.

    On a local disk the line is appended in one write, so the lines of two processes do not mix. Elsewhere the file is
    written anew.
    """
    line = (record.model_dump_json() + "\n").encode()
    filesystem, inner = paths.filesystem(path)
    if paths.is_local(path):
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        descriptor = os.open(inner, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return
    before = paths.read_bytes(path) if filesystem.exists(inner) else b""
    paths.write_bytes(path, before + line)


def read(path: str, kind: type[RecordType], name: str) -> list[RecordType]:
    """The records of `kind` at `path`, oldest first; none where there is no file.

    name: of one record, for messages. Raises InputError for a damaged line.
    """
    if not paths.exists(path):
        return []
    records = []
    for number, line in enumerate(paths.read_bytes(path).splitlines(), 1):
        try:
            records.append(kind.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in problem["loc"])
            raise InputError(f"{path}, line {number}: not a {name} ({field}: {problem['msg']}). Remove it.") from None
    return records
