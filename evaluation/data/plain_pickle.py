"""Reads pickles of plain data without running anything in them: some ground truth is published only as a pickle.

A pickle names functions and their arguments, so loading an untrusted pickle runs an untrusted program. Here every name
leads to a stand-in of this file, which makes arrays from bytes, or to an error. numpy's own functions are never called:
they trust the types and sizes that the pickle states. This is the only file that imports pickle.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any, final

import numpy as np

from curation.errors import InputError

# Numbers, truth values and text of a stated width; never objects.
_ARRAY_TYPE = re.compile(r"[<>|=]?(?:[biuf][1248]|[US][1-9][0-9]{0,4})")


def loads(data: bytes, origin: str) -> Any:
    """The content of a pickle: None, numbers, text, bytes, lists, tuples, dicts, sets, numpy scalars and `Array`.

    Text of Python 2 is read as Latin-1. `origin` names the file in messages. Raises InputError for anything else.
    """
    try:
        return _Reader(io.BytesIO(data), origin).load()
    except InputError:
        raise
    # A damaged or hostile pickle can raise nearly any exception, and the library promises no list.
    except Exception as error:
        raise InputError(f"{origin}: not a pickle of plain data ({type(error).__name__}: {error}).") from None


@final
class Array:
    """A numpy array of a pickle. Its `values` are set once the pickle is read."""

    def __init__(self) -> None:
        self.values: np.ndarray = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        """Takes an array's state as numpy writes it: version (not always), shape, type, Fortran order, bytes."""
        shape, type_, is_fortran, data = state[-4:]
        self.values = _array(shape, type_, "F" if is_fortran else "C", data)


@final
class _Type:
    """A numpy type of a pickle. Its `text` is set when the pickle names it; its byte order comes with its state."""

    def __init__(self, text: Any, *_: Any) -> None:
        self.text = _latin(text).decode("ascii")

    def __setstate__(self, state: Any) -> None:
        order, *parts = state[1:5]
        if any(part is not None for part in parts):
            raise ValueError("an array of records")
        self.text = _latin(order).decode("ascii") + self.text.lstrip("<>|=")

    def resolve(self) -> np.dtype[Any]:
        if not _ARRAY_TYPE.fullmatch(self.text):
            raise ValueError(f"an array of type {self.text!r}")
        return np.dtype(self.text)


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, origin: str) -> None:
        super().__init__(file, encoding="latin1")
        self._origin = origin

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 renamed its modules, Python 3 its builtins.
        known_module = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        if (known_module, name) not in _STAND_INS:
            raise InputError(
                f"{self._origin}: the pickle names {module}.{name}, and only numbers, text, containers and numpy "
                "arrays are read. Nothing of it was run; take the file from its publisher."
            )
        return _STAND_INS[known_module, name]


def _array(shape: Any, type_: Any, order: Any, data: Any) -> np.ndarray:
    if not isinstance(type_, _Type) or not isinstance(shape, tuple) or order not in ("C", "F"):
        raise ValueError("an array without a shape and a type")
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f"an array of shape {shape}")
    return np.frombuffer(_latin(data), type_.resolve()).reshape(shape, order=order).copy()


def _latin(value: Any, encoding: str = "latin1") -> bytes:
    """Bytes; older pickle protocols write them as text in Latin-1."""
    if encoding != "latin1":
        raise ValueError(f"text in {encoding!r}")
    return value.encode("latin1") if isinstance(value, str) else bytes(memoryview(value))


def _unfilled(*_: Any) -> Array:
    return Array()


def _scalar(type_: Any, data: Any) -> Any:
    return _array((), type_, "C", data)[()]


def _no_bytes() -> bytes:
    """Empty bytes, which older protocols write as a call. It takes no argument: `bytes(n)` would allocate n bytes."""
    return b""


def _from_buffer(data: Any, type_: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.values = _array(shape, type_, order, data)
    return array


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): Array,
    ("numpy.core.multiarray", "_reconstruct"): _unfilled,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _latin,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
