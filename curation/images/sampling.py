"""A share of the images of a source, chosen by their names alone, before a byte of an image is read.

An image is chosen where the hash of its place lies below the share. Its place is the name of the source, the path of
the file in the source, and the member of a tar or the row of a Parquet file. So the choice depends on no order, no cut
into shards and no other image. A smaller share is a part of a larger one.
"""

import hashlib
import json


def is_chosen(share: float, source: str, path: str, part: str | int = "") -> bool:
    """Whether an image belongs to the `share` (0 to 1) of its source.

    path: of the file, relative to the source. part: the name of the member of a tar, or the row of a Parquet file.
    """
    if share >= 1:
        return True
    # JSON, because names may hold any separator; it escapes lone surrogates, which names of files may contain.
    place = json.dumps([source, path, part]).encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=7).digest(), "big") < share * 2**56
