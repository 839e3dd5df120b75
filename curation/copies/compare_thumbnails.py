"""Whether two thumbnails show one picture: the settings of the comparison, its result, and the comparer of each domain.

A descriptor tells which pictures resemble each other; this comparison tells which are copies. Photographs and drawings
give different evidence, so each has a comparer: compare_photographs.py and compare_drawings.py.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field, model_validator

from curation.config import Settings


class VerificationConfig(Settings):
    """How two thumbnails are compared."""

    domain: Literal["photographs", "drawings"] = "photographs"
    """The evidence that counts. `photographs`: the share of the overlap where brightness and texture agree; a copy may
    have any overlay, turn or mirror. `drawings`: the contrast of lines and colours must be explained, because drawings
    of one frame with other symbols agree nearly everywhere."""
    local_differences: Literal["count", "forbid"] = "count"
    """For photographs. `count`: a part that differs lowers the similarity by its area, as an overlay does. `forbid`:
    two pictures are not copies where one part differs by far more than the noise of the others. So an image of a defect
    is never dropped for an image without it; a copy with a caption is not found either. For images that look alike."""
    working_side: int = Field(default=128, ge=64, le=512)
    """Longest side in pixels at which thumbnails are compared. A smaller thumbnail is not enlarged to it; see
    describe.thumbnail_side."""

    @model_validator(mode="after")
    def _forbids_in_photographs(self) -> "VerificationConfig":
        if self.domain == "drawings" and self.local_differences == "forbid":
            raise ValueError(
                "local_differences is 'forbid', which only the comparison of photographs knows. Take domain "
                "'photographs', or leave local_differences out"
            )
        return self


class Likeness(NamedTuple):
    """The result of comparing two thumbnails."""

    similarity: float
    """In [0, 1]; most copies reach about 0.5 among photographs and 0.67 among drawings."""
    differs_locally: bool
    """Whether the two agree except in a part: an overlay, or another symbol in the same frame."""


class Comparer(Protocol):
    """Compares thumbnails of one domain."""

    def prepare(self, thumbnail: bytes, features: np.void | None = None) -> Any:
        """A thumbnail, an encoded image that Seedbed wrote, prepared for comparisons.

        features: a record of photographs.FEATURES, where it is known.
        """

    def compare(self, one: Any, others: Sequence[Any]) -> list[Likeness]:
        """How surely each of the `others` shows the same picture as `one`; the order of two does not matter."""
