"""The order in which training images come, and the images of a step that each rank takes.

Pure functions of the seed and the position, so a run is repeated exactly.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from curation.engine.ranks import World
from curation.errors import InputError


def shuffled_rows(num_rows: int, seed: int) -> Iterator[int]:
    """Rows without end: one permutation of all of them after another."""
    for epoch in itertools.count():
        yield from np.random.default_rng([seed, 0, epoch]).permutation(num_rows).tolist()


def share_of_batch(batch_size: int, world: World) -> range:
    """The places in a batch that this rank takes. Raises InputError where a rank would have none."""
    if batch_size < world.num_ranks:
        raise InputError(f"batch_size is {batch_size}: fewer images than the {world.num_ranks} ranks.")
    return world.share(batch_size)


def share_of_steps(
    num_rows: int, seed: int, *, num_steps: int, batch_size: int, world: World
) -> Iterator[tuple[int, int]]:
    """The positions that this rank takes in `num_steps` batches, counted over all batches, each with its row."""
    share = share_of_batch(batch_size, world)
    positions = zip(range(num_steps * batch_size), shuffled_rows(num_rows, seed), strict=False)
    return ((position, row) for position, row in positions if position % batch_size in share)
