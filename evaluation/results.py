"""What evaluations found, one record a number, in a file that grows and is never rewritten.

<output>/
  results.jsonl     one line a record: the fields of Result
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from curation.config import Settings
from curation.errors import InputError
from curation.files import paths

RESULTS_FILE = "results.jsonl"


class Result(Settings):
    """One number that an evaluation found, and all that it depends on."""

    evaluation: str
    """The module that found it: "knn", "linear", "segmentation", ..."""
    dataset: str
    """Name of the data in the config."""
    model: str
    """Name of the model, for people."""
    model_hash: str
    """Of its weights and of all that its features depend on."""
    data_hash: str
    """Of the images and their labels, of every split that was used."""
    protocol: str
    """What was done, as tables group and compare it: "k=20", "paper, 4 blocks, 640 px"."""
    settings: dict[str, Any]
    """The resolved config of the evaluation, and what it chose, such as a learning rate."""
    metric: str
    """What `value` measures: "top-1", "mAP", "mIoU"."""
    value: float
    """Shares are between 0 and 1."""
    spread: float | None = None
    """The standard deviation (n - 1) over repeated tries, where there are some."""
    seconds: float
    """How long the evaluation took, what it took from the cache apart."""


def append(folder: str, result: Result) -> None:
    """Add one record to the results in `folder`.

    On a local disk the line is appended in one write, so two processes do not mix theirs; elsewhere the file is written
    anew.
    """
    path = paths.join(folder, RESULTS_FILE)
    line = (result.model_dump_json() + "\n").encode()
    fs, inner = paths.filesystem(path)
    if paths.is_local(path):
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        descriptor = os.open(inner, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return
    before = paths.read_bytes(path) if fs.exists(inner) else b""
    paths.write_bytes(path, before + line)


def read(folder: str) -> list[Result]:
    """The records in `folder`, oldest first; none where there is no file. Raises InputError for a damaged line."""
    path = paths.join(folder, RESULTS_FILE)
    if not paths.exists(path):
        return []
    found = []
    for number, line in enumerate(paths.read_bytes(path).splitlines(), 1):
        try:
            found.append(Result.model_validate_json(line))
        except ValidationError as error:
            reason = error.errors()[0]
            place = ".".join(str(part) for part in reason["loc"])
            raise InputError(f"{path}, line {number}: not a result ({place}: {reason['msg']}). Remove it.") from None
    return found


def latest(results: Sequence[Result]) -> list[Result]:
    """Of records that say the same of the same model and data, the last one."""
    return list({_identity(result): result for result in results}.values())


def _identity(result: Result) -> str:
    return json.dumps(
        [
            result.evaluation,
            result.dataset,
            result.model,
            result.model_hash,
            result.data_hash,
            result.protocol,
            result.metric,
        ]
    )
