"""Profiles: two named recipes, which fill in the settings that a config leaves out.

`paper`     the recipe of DINOv2 (arXiv 2304.07193, section 3 and appendix A). Copies are pairs among the 64 nearest
            descriptors, and each component keeps one image. The holdout removes whole components, connected at a lower
            threshold, but no seeds. There are 100,000 clusters, and an image may repeat in the corpus.
`default`   the corpus holds each image once. The holdout removes the images that match it, seeds too. An image is
            dropped only when it is itself a copy of a kept image.

A profile overrides nothing in the config. A setting in neither has the default of its section. PROFILES is the whole
list: the saved config of a run names the profile and holds every value.
"""

from collections.abc import Mapping
from typing import Any, Literal

Profile = Literal["default", "paper"]

# Values by setting; `*` stands for every item of a list. All values of `paper` but one are cited.
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
        "pairs.max_phash_distance": -1,  # assumed: the paper uses a PCA hash, earlier, and states no threshold
        "dedup.threshold": 0.6,  # A.3
        "dedup.holdout_threshold": 0.45,
        "dedup.matches_kept": False,  # one of each component
        "dedup.decontamination": "component",
        "dedup.decontaminate_seeds": False,  # the training splits of evaluation sets are among the seeds
        "cluster.levels": [{"num_clusters": 100_000}],  # A.4
        "retrieve.sample_above": 1_000_000,
        "retrieve.more_than_seeds": 3,
        "retrieve.images_per_cluster": 10_000,
        "retrieve.datasets.*.k": 4,  # all datasets but ImageNet-1k
        "retrieve.datasets.*.cap": 1_000_000,
        "pack.repeats": True,  # table 15 counts them
    },
}


def fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a whole config, with the values of its profile for the settings that it leaves out."""
    filled: Any = dict(values)
    profile = values.get("profile", "default")
    # Validation refuses an unknown name and a value that is not text.
    settings = next((settings for name, settings in PROFILES.items() if name == profile), {})
    for setting, value in settings.items():
        filled = _fill(filled, setting.split("."), value)
    result: dict[str, Any] = filled
    return result


def _fill(node: Any, path: list[str], value: Any) -> Any:
    """A copy of `node` with `value` at `path`, unless there is a value already."""
    head, *rest = path
    if head == "*" and isinstance(node, list | tuple):
        return type(node)(_fill(item, rest, value) for item in node)
    if not isinstance(node, dict):  # complete settings, or a mistake that validation reports
        return node
    if not rest:
        return {head: value} | node
    if head not in node and rest[0] == "*":
        return node
    return node | {head: _fill(node.get(head, {}), rest, value)}
