"""Tests of results: records are appended and read back, and a damaged line is reported."""

from pathlib import Path

import pytest

from curation.errors import InputError
from evaluation.results import Result, append, latest, read


def result(**changes: object) -> Result:
    fields: dict[str, object] = {
        "evaluation": "knn",
        "dataset": "toy",
        "model": "pixels",
        "model_hash": "a" * 64,
        "data_hash": "b" * 64,
        "protocol": "k=1",
        "settings": {"k": [1], "seed": 0},
        "metric": "top-1",
        "value": 0.5,
        "spread": None,
        "seconds": 1.5,
    }
    return Result.model_validate(fields | changes)


@pytest.mark.parametrize("protocol", ["", "memory://results-"])
def test_records_are_appended_and_read_back(tmp_path: Path, protocol: str) -> None:
    folder = f"{protocol}{tmp_path}/new"
    assert read(folder) == []
    records = [result(), result(value=0.25, spread=0.1), result(model="other")]
    for one in records:
        append(folder, one)
    assert read(folder) == records
    assert latest(read(folder)) == records[1:]


def test_a_damaged_line_is_reported(tmp_path: Path) -> None:
    append(str(tmp_path), result())
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"evaluation": "knn"}\n')
    with pytest.raises(InputError, match="line 2: not a result"):
        read(str(tmp_path))


def test_a_value_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        result(value=float("nan"))
