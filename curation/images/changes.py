"""When files last changed, by the times that their filesystem keeps.

These times only choose the files that are read again; no output holds one. A copy of the same bytes has other times.
"""

import math
import os
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from curation.files import paths

# The names that fsspec's drivers give to the time of the last write: S3, Azure, GCS, memory, others.
_WRITTEN = ("LastModified", "last_modified", "updated", "created", "mtime")


class Times(NamedTuple):
    """The earliest and the latest time of one file, in seconds since 1970."""

    earliest: float
    latest: float


# A file that is gone, or whose filesystem gives no time: its latest change may be at any moment.
UNKNOWN = Times(-math.inf, math.inf)


def times_of(root: str, names: Iterable[str]) -> dict[str, Times]:
    """The times of the files `names` below `root`; the name "" is the file `root` itself.

    A local file has two: of its content, which any copy may carry along, and of its last replacement or change of name
    or rights, which no program can set. Of a link and its target the later one counts, and so do links on the way to
    `root`. An object store has one.
    """
    if paths.is_local(root):
        link = _time_of_links(paths.filesystem(root)[1])
        times = {name: _local_times(paths.join(root, name) if name else root) for name in names}
        return {name: Times(time.earliest, max(time.latest, link)) for name, time in times.items()}
    fs, inner = paths.filesystem(root)
    fs.invalidate_cache()
    listed: dict[str, Any] = fs.find(inner, detail=True)  # one listing for all files
    return {name: _listed_times(listed.get(paths.join(inner, name) if name else inner)) for name in names}


def _time_of_links(path: str) -> float:
    """The latest time of the links on the way to `path`, which may lead elsewhere now; -inf without links."""
    latest = -math.inf
    while path != (parent := os.path.dirname(path)):
        if os.path.islink(path):
            latest = max(latest, os.lstat(path).st_ctime)
        path = parent
    return latest


def _local_times(path: str) -> Times:
    location = paths.filesystem(path)[1]
    try:
        states = [os.lstat(location)]
    except OSError:
        return UNKNOWN
    if os.path.exists(location):  # not for a link to nothing
        states.append(os.stat(location))
    times = [time for state in states for time in (state.st_mtime, state.st_ctime)]
    return Times(min(times), max(times))


def _listed_times(info: dict[str, Any] | None) -> Times:
    value = next((info[key] for key in _WRITTEN if key in info), None) if info else None
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        value = value.timestamp()
    return UNKNOWN if value is None else Times(float(value), float(value))
