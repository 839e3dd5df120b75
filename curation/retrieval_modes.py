"""The modes of retrieval from the pool: one row of MODES each, used by plans, prices and the composition of the corpus.

A new mode is a name and a row here, and a function in retrieve.py that gives its rows of RETRIEVED. All other files use
the columns of those rows: `seed_image_id` is null unless a single seed retrieved the image, `seed_source` unless a
dataset did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from curation.quotas import cluster_counts

Mode = Literal["sample", "cluster", "none"]
Retrieval = Literal["sample", "cluster", "none", "by_size"]
"""The values of a config; `by_size` chooses `sample` or `cluster` by the number of seeds."""


@dataclass(frozen=True)
class Request:
    """The numbers that decide how many rows a dataset retrieves."""

    num_seeds: int
    k: int
    cluster_sizes: Sequence[int]
    """Images in each cluster that is chosen for the dataset."""
    images_per_cluster: int
    cap: int


@dataclass(frozen=True)
class RetrievalMode:
    """The properties of a mode."""

    num_rows: Callable[[Request], tuple[int, int]]
    """Gives the rows before and after the cap of the dataset."""
    compares_seeds: bool
    """Whether each seed is compared with the vectors of the pool; this takes most of the time."""
    is_capped: bool
    """Whether `cap` limits the rows."""
    label: str
    """Name in the plan; `{k}` is replaced by the setting."""


def _rows_by_sample(request: Request) -> tuple[int, int]:
    num_rows = request.num_seeds * request.k  # counts repeats; assumes that the pool holds at least k images
    return num_rows, num_rows


def _rows_by_cluster(request: Request) -> tuple[int, int]:
    sizes, images_per_cluster = request.cluster_sizes, request.images_per_cluster
    return sum(cluster_counts(sizes, images_per_cluster, None)), sum(
        cluster_counts(sizes, images_per_cluster, request.cap)
    )


def _no_rows(request: Request) -> tuple[int, int]:
    return 0, 0


MODES: dict[Mode, RetrievalMode] = {
    "sample": RetrievalMode(_rows_by_sample, compares_seeds=True, is_capped=False, label="sample k={k}"),
    "cluster": RetrievalMode(_rows_by_cluster, compares_seeds=False, is_capped=True, label="cluster"),
    "none": RetrievalMode(_no_rows, compares_seeds=False, is_capped=False, label="none"),
}


def mode_of(retrieval: Retrieval, num_seeds: int, sample_above: int) -> Mode:
    """The mode of a dataset with `num_seeds` seeds: `by_size` is `sample` above `sample_above`, otherwise `cluster`."""
    if retrieval == "by_size":
        return "sample" if num_seeds > sample_above else "cluster"
    return retrieval


@dataclass(frozen=True)
class DatasetRows:
    """The rows of a dataset in the corpus, repeats included: a line of DINOv2's table 15."""

    as_is: int
    """Seeds that are packed as they are."""
    before_cap: int
    """Rows retrieved from the pool, before the cap."""
    retrieved: int
    """Rows retrieved from the pool, after the cap."""

    @property
    def rows(self) -> int:
        return self.as_is + self.retrieved


def expected_rows(mode: Mode, request: Request, *, as_is: bool) -> DatasetRows:
    """The rows of a dataset in `mode`."""
    before_cap, retrieved = MODES[mode].num_rows(request)
    return DatasetRows(as_is=request.num_seeds if as_is else 0, before_cap=before_cap, retrieved=retrieved)
