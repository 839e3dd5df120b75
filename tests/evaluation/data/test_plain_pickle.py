import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.errors import InputError
from evaluation.data.plain_pickle import Array, loads

PLAIN: dict[str, Any] = {
    "c": np.arange(6).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(10)[::2],
    "empty": np.empty(0, np.int64),
    "bytes of 255": np.array([0, 255], np.uint8),
    "big-endian": np.array([1, 2], ">i4"),
    "truth": np.array([True, False]),
    "text": np.array(["ab", "c"]),
    "scalar": np.float64(1.5),
    "one": np.int32(4),
    "set": {1, 2},
    "raw": b"\xff\x00",
    "list": [1, 2.5, None, True, "ü", (1, 2)],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(protocol: int) -> None:
    content = loads(pickle.dumps(PLAIN, protocol), "a.pkl")
    assert list(content) == list(PLAIN)
    for name, expected in PLAIN.items():
        value = content[name].values if isinstance(content[name], Array) else content[name]
        assert type(value) is type(expected), name
        if isinstance(expected, np.ndarray):
            assert value.dtype == expected.dtype
            np.testing.assert_array_equal(value, expected)
        else:
            assert value == expected


class Hostile:
    """An object whose pickle calls a given function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for function, argument in ((Path.touch, marker), (exec, f"open({str(marker)!r}, 'w')"), (Path.mkdir, marker)):
            data = pickle.dumps({"gnd": [Hostile(function, argument)]}, protocol)
            with pytest.raises(InputError, match=r"gnd\.pkl: the pickle names"):
                loads(data, "gnd.pkl")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(Path.touch, marker)))
    assert marker.exists()  # the standard library does run such a pickle


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(a=1),
        Hostile(getattr, "text", "upper"),
        Hostile(bytes, 10**12),
        Hostile(np._core.multiarray.scalar, Hostile(np.dtype, "O"), b"12345678"),
        np.array([object], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        np.array(["2026-01-01"], "M8[D]"),
        np.zeros(3, np.complex64),
        Hostile(np._core.numeric._frombuffer, b"1234", np.dtype("i4"), (2,), "C"),
        Hostile(np._core.numeric._frombuffer, b"", np.dtype("i4"), (-1,), "C"),
        Hostile(np._core.multiarray.scalar, np.dtype("f8"), b"short"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^a\.pkl: "):
        loads(pickle.dumps([value], 2), "a.pkl")


def test_a_damaged_pickle_is_reported() -> None:
    data = pickle.dumps(PLAIN)
    for cut in range(0, len(data), 37):
        with pytest.raises(InputError, match="not a pickle of plain data"):
            loads(data[:cut], "a.pkl")
