"""Ids as arrays sort and read as the texts do."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from curation.errors import InputError
from curation.files.image_ids import bucket_of, id_bytes, id_column, pack_ids, unpack_ids
from tests.curation.builders import hashed_id, id_of

Name = Callable[[int], str]


@pytest.mark.parametrize("name", [hashed_id, id_of])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_packed_ids_sort_and_read_as_the_texts(name: Name, count: int) -> None:
    texts = [name(int(number)) for number in np.random.default_rng(0).permutation(count)]
    texts += ["f" * 32, "0" * 32, "f" * 16 + "0" * 16]  # the last ones end in bytes of zero
    column = pa.chunked_array([texts[:1], texts[1:]], pa.string())
    packed = pack_ids(column)
    assert unpack_ids(packed).to_pylist() == texts
    assert packed.tobytes() == bytes.fromhex("".join(texts))
    assert unpack_ids(np.sort(packed)).to_pylist() == sorted(texts)
    assert pack_ids(column.slice(1)).tolist() == packed[1:].tolist()  # a slice keeps the buffers of the whole


def test_no_ids_can_be_packed() -> None:
    for column in (pa.chunked_array([], pa.string()), pa.chunked_array([[]], pa.string())):
        assert pack_ids(column).shape == (0,)
        assert unpack_ids(pack_ids(column)).to_pylist() == []
        assert bucket_of(pack_ids(column), 3).tolist() == []


@pytest.mark.parametrize("wrong", ["", "abc", "A" * 32, "g" * 32, "a" * 31, "é" * 16, None])
def test_texts_of_another_form_are_refused(wrong: str | None) -> None:
    with pytest.raises(InputError, match=f"'{wrong}' is not an image_id"):
        pack_ids(pa.chunked_array([[id_of(1), wrong, id_of(2)]], pa.string()))


@pytest.mark.parametrize("texts", [[], ["a"], ["row 10", "7", "row 2", "7"]])
def test_fixed_width_bytes_sort_and_read_as_the_texts(texts: list[str]) -> None:
    for ids in (id_bytes(texts), id_bytes(pa.chunked_array([texts], pa.string()))):
        assert ids.shape == (len(texts),)
        assert id_column(ids).to_pylist() == texts
        assert id_column(np.sort(ids)).to_pylist() == sorted(texts)


def test_buckets_are_equal_ranges_of_the_ids() -> None:
    ids = pack_ids(
        pa.chunked_array([["0" * 32, "7fffffff" + "f" * 24, "80000000" + "0" * 24, "f" * 32, id_of(5)]], pa.string())
    )
    assert bucket_of(ids, 2).tolist() == [0, 0, 1, 1, 0]
    assert bucket_of(ids, 1).tolist() == [0] * 5
    spread = bucket_of(pack_ids(pa.chunked_array([[hashed_id(n) for n in range(3000)]], pa.string())), 7)
    assert np.bincount(spread, minlength=7).min() > 300 and spread.max() == 6


@pytest.mark.parametrize("num_buckets", [1, 7, 1000, 2**32 - 1])
def test_bucket_is_that_of_the_first_eight_digits(num_buckets: int) -> None:
    texts = [hashed_id(number) for number in range(200)] + ["f" * 32, "0" * 32]
    expected = [int(text[:8], 16) * num_buckets >> 32 for text in texts]
    assert bucket_of(pack_ids(pa.chunked_array([texts], pa.string())), num_buckets).tolist() == expected
