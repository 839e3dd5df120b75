"""Image ids as arrays, which numpy sorts, compares and writes faster than Python texts.

`id_bytes` keeps the characters of any ASCII text, such as the ids of a user's own vectors. `pack_ids` takes only the
image_ids that Seedbed makes, 32 hex digits, and holds each in 16 bytes. Both sort as the texts do.

Legend: N ids.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import InputError

_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
_DIGIT_VALUES = np.full(256, 255, np.uint8)
_DIGIT_VALUES[_DIGITS] = np.arange(16)


def id_bytes(image_ids: pa.ChunkedArray | list[str]) -> np.ndarray:
    """The characters of each id as fixed-width bytes, (N,), as wide as the longest."""
    texts = image_ids if isinstance(image_ids, list) else image_ids.to_pylist()
    result: np.ndarray = np.array(texts, dtype="S") if texts else np.empty(0, "S1")
    return result


def id_column(image_ids: np.ndarray) -> pa.Array:
    """A column of text from fixed-width bytes (N,)."""
    return pa.array(image_ids, pa.binary()).cast(pa.string())


def pack_ids(column: pa.ChunkedArray) -> np.ndarray:
    """The 16 bytes of each image_id, (N,) S16. Raises InputError for a text that is not 32 small hex digits.

    An element of S16 taken alone loses the zeros at its end; take slices.
    """
    array = column.combine_chunks()
    digits = np.full(32 * len(array), ord("?"), np.uint8)
    if not array.null_count and pc.all(pc.equal(pc.binary_length(array), 32)).as_py() is not False:
        text = array.cast(pa.binary(32))
        digits = np.frombuffer(text.buffers()[1], np.uint8)[32 * text.offset :][: 32 * len(text)]
    values = _DIGIT_VALUES[digits].reshape(-1, 16, 2)
    if (values > 15).any():
        wrong = next(text for text in array.to_pylist() if text is None or not _is_image_id(text))
        raise InputError(f"'{wrong}' is not an image_id: expected 32 hex digits in small letters.")
    return (values[..., 0] << 4 | values[..., 1]).view("S16").reshape(-1)


def unpack_ids(packed: np.ndarray) -> pa.Array:
    """A column of image_ids (text) from the bytes (N,) S16 that `pack_ids` gives."""
    values = np.ascontiguousarray(packed).view(np.uint8)
    digits = _DIGITS[np.stack([values >> 4, values & 15], axis=-1)]
    texts = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(packed), [None, pa.py_buffer(digits)])
    return texts.cast(pa.string())


def bucket_of(packed: np.ndarray, num_buckets: int) -> np.ndarray:
    """The bucket (N,) int64 of each packed id (N,) S16: `num_buckets` equal ranges of the first 32 bits."""
    leading = np.ascontiguousarray(packed).view(">u4").reshape(-1, 4)[:, 0].astype(np.uint64)
    buckets: np.ndarray = (leading * np.uint64(num_buckets) >> np.uint64(32)).astype(np.int64)
    return buckets


def _is_image_id(text: str) -> bool:
    return len(text) == 32 and set(text) <= set("0123456789abcdef")
