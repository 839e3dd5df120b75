"""The settings of every search for nearest neighbours."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from curation.config import NotInPlan, Settings
from curation.errors import ConfigError

# Limits of faiss on a GPU: neighbours selected and cells probed at once (GPU_MAX_SELECTION_K), and code lengths of
# product quantization (IVFPQ.cu, isSupportedPQCodeLength). Cited.
GPU_MAX_SELECTION = 2048
GPU_PQ_BYTES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
# With `ivf`: queries that recall is measured on. Assumed: the standard error of a recall of 0.95 is then 0.01.
RECALL_QUERIES = 500


class SearchConfig(Settings):
    """How neighbours are searched."""

    backend: Literal["exact", "ivf"] = "exact"
    """`exact` compares a query with every vector, `ivf` (inverted lists) with the vectors in the `num_probes` cells
    nearest to it. With `ivf`, every run measures the recall."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where products are computed. A GPU that is asked for and missing is an error."""
    rows_per_part: int = Field(default=1_000_000, ge=1)
    """Vectors that a worker holds at a time, as float16: 2 GB at 1,000 dimensions. In `pairs` with `ivf`: vectors of
    one group of cells; visiting vectors of other groups come on top."""
    rows_per_cell: int = Field(default=1000, ge=1)
    """With `ivf`: vectors per cell on average."""
    num_probes: int = Field(default=16, ge=1)
    """With `ivf`: cells that each query visits."""
    codes: Literal["flat", "pq"] = "flat"
    """With `ivf`: `flat` lists hold the vectors; `pq` lists hold product quantization codes, `pq_bytes` a vector, and
    the best `overfetch` times k by code are scored again with the vectors."""
    pq_bytes: int = Field(default=64, ge=1)
    """With `pq`: bytes per vector; must divide the vectors' width."""
    overfetch: int = Field(default=4, ge=1)
    """With `pq`: candidates that are fetched by code, in multiples of k."""
    min_recall: Annotated[float, NotInPlan] = Field(default=0.95, ge=0, le=1)
    """With `ivf`: share of the true neighbours of a sample of queries, below which the stage stops."""

    @model_validator(mode="after")
    def _check_gpu_limits(self) -> "SearchConfig":
        if self.device == "cuda" and self.codes == "pq":
            if self.num_probes > GPU_MAX_SELECTION:
                raise ValueError(f"num_probes is {self.num_probes}; faiss on a GPU takes {GPU_MAX_SELECTION} at most")
            if self.pq_bytes not in GPU_PQ_BYTES:
                raise ValueError(
                    f"pq_bytes is {self.pq_bytes}; faiss on a GPU takes {', '.join(map(str, GPU_PQ_BYTES))}"
                )
        return self

    def require_recall(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError when the recall among the `facts` of a search is below `min_recall`."""
        recall = facts.get("recall")
        if recall is not None and recall < self.min_recall:
            raise ConfigError(
                f"The search found {recall:.4f} of the {facts['recall_neighbors']:,} nearest neighbours of a sample; "
                f"search.min_recall is {self.min_recall:g}. Raise search.num_probes ({self.num_probes}), lower "
                'min_recall, or set search.backend = "exact".'
            )

    @property
    def num_gpus(self) -> int:
        """GPUs that one worker needs."""
        return int(self.device == "cuda")

    def num_cells(self, num_vectors: int) -> int:
        """The number of cells for `num_vectors` vectors."""
        return max(1, round(num_vectors / self.rows_per_cell))
