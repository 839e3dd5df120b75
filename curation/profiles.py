"""Two recipes by name: what a config that names one may leave out.

`paper`     what DINOv2 describes (arXiv 2304.07193, section 3 and appendix A): copies are the pairs among 64 nearest
            descriptors, whole components go; the holdout takes whole components from a lower threshold, but no seed;
            100,000 clusters; the corpus counts repeats.
`default`   each image once; the holdout takes what matches it, seeds too; an image goes only when it is itself a copy
            of one that stays.

A profile fills in what the config leaves out and overrides nothing. What neither says has the default of its section.
The table below is all there is: a run's saved config names the profile and holds every value.
"""

from collections.abc import Mapping
from typing import Any, Literal

Profile = Literal["default", "paper"]

# By setting; `*` stands for every item of a list. All of `paper` but one is cited.
PROFILES: dict[Profile, dict[str, Any]] = {
    "default": {
        "dedup.matches_kept": True,
        "dedup.decontamination": "direct",
        "dedup.decontaminate_seeds": True,
        "pack.repeats": False,
    },
    "paper": {
        "pairs.num_neighbors": 64,  # A.3
        "pairs.min_descriptor_similarity": 0.45,  # the lower of the two thresholds
        "pairs.min_similarity": 0.45,
        "pairs.max_phash_distance": -1,  # ours: the paper's PCA hash came before, its threshold is not stated
        "dedup.threshold": 0.6,  # A.3
        "dedup.holdout_threshold": 0.45,
        "dedup.matches_kept": False,  # one of each component
        "dedup.decontamination": "component",
        "dedup.decontaminate_seeds": False,  # the training splits of evaluation sets are among the seeds
        "cluster.levels": [{"num_clusters": 100_000}],  # A.4
        "retrieve.sample_above": 1_000_000,
        "retrieve.more_than_seeds": 3,
        "retrieve.images_per_cluster": 10_000,
        "retrieve.datasets.*.k": 4,  # of all but ImageNet-1k
        "retrieve.datasets.*.cap": 1_000_000,
        "pack.repeats": True,  # table 15 counts them
    },
}


def fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a whole config with what its `profile` says wherever they are silent."""
    filled: Any = dict(values)
    profile = values.get("profile", "default")
    # A name that is none, or no text, is for validation to refuse.
    settings = next((settings for name, settings in PROFILES.items() if name == profile), {})
    for setting, value in settings.items():
        filled = _fill(filled, setting.split("."), value)
    result: dict[str, Any] = filled
    return result


def _fill(node: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    if head == "*" and isinstance(node, list | tuple):
        return type(node)(_fill(item, rest, value) for item in node)
    if not isinstance(node, dict):  # settings that are complete, or a mistake that validation will name
        return node
    if not rest:
        return {head: value} | node
    if head not in node and rest[0] == "*":
        return node
    return node | {head: _fill(node.get(head, {}), rest, value)}
