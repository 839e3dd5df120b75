"""Profiles: named recipes, which fill in the settings that a config leaves out.

`photos`    for images of a user; a config that names no profile has this one. The corpus holds each image once. Copies
            are near descriptors whose thumbnails agree; an image is dropped only when it is itself a copy of a kept
            image. The holdout removes the images that match it, seeds too.
`drawings`  as `photos`, for clip art and logos: a higher threshold, and families of drawings that share most of their
            lines are told from copies.
`paper`     the recipe of DINOv2 (arXiv 2304.07193, section 3 and appendix A). Copies are pairs among the 64 nearest
            descriptors, and each component keeps one image. The holdout removes whole components, connected at a lower
            threshold, but no seeds. There are 100,000 clusters, and an image may repeat in the corpus.
`exact`     only files with equal bytes are copies, among seeds and pool and with the holdout alike. Nothing is searched
            or compared, so `pairs` costs nothing. A resized copy of a holdout image stays in the pool.

A profile overrides nothing in the config. A setting in neither has the default of its section. PROFILES is the whole
list: the saved config of a run names the profile and holds every value. The seed datasets and the models are filled in
for every profile (`fill`).
"""

from collections.abc import Mapping
from typing import Any, Literal

Profile = Literal["photos", "drawings", "paper", "exact"]
DEFAULT: Profile = "photos"
# Messages on the names of former profiles.
FORMER = {
    "default": "the profile 'default' was removed. Take 'photos', the profile of a config that names none; it "
    "compares thumbnails too. The demo's is 'drawings'"
}

_EACH_IMAGE_ONCE = {
    "dedup.matches_kept": True,
    "dedup.decontamination": "direct",
    "dedup.decontaminate_seeds": True,
    "pack.repeats": False,
}
_VERIFIED = {
    "describe.thumbnail_side": 128,
    "pairs.min_similarity": 0.3,
    "pairs.verification.working_side": 128,
    "retrieve.check_copies": True,
    "self_check.max_images": 200,
}

# Values by setting; `*` stands for every item of a list. All values of `paper` but one are cited.
PROFILES: dict[Profile, dict[str, Any]] = {
    # Measured on the development draw of copy_pictures.py: docs/benchmarks.md.
    "photos": {
        **_EACH_IMAGE_ONCE,
        **_VERIFIED,
        "pairs.num_neighbors": 16,  # measured with heads that did not see the draw
        "pairs.min_descriptor_similarity": 0.2,
        "pairs.verification.domain": "photographs",
        "dedup.threshold": 0.5,
        "dedup.holdout_threshold": 0.45,
    },
    # Measured on the demo, where drawings with another symbol or mouth are as similar as copies with an overlay.
    "drawings": {
        **_EACH_IMAGE_ONCE,
        **_VERIFIED,
        # A drawing has more variants than a photograph has copies.
        "pairs.num_neighbors": 32,
        "pairs.min_descriptor_similarity": 0.32,
        "pairs.verification.domain": "drawings",
        "dedup.threshold": 0.67,
        "dedup.holdout_threshold": 0.35,
        "dedup.families.sure": 0.92,
        "dedup.families.margin": 0.1,
        "dedup.families.local_margin": 0.03,
        "dedup.label_guard": False,  # the folders of clip art are topics, and one drawing lies in several
        "dedup.lookalikes": "drop",  # series of drawings look alike; the threshold and the families are chosen for them
    },
    "paper": {
        "pairs.num_neighbors": 64,  # A.3
        "pairs.min_descriptor_similarity": 0.45,  # the lower of the two thresholds
        "pairs.min_similarity": 0.45,
        "pairs.max_phash_distance": -1,  # assumed: the paper uses a PCA hash, earlier, and states no threshold
        "dedup.threshold": 0.6,  # A.3
        "dedup.holdout_threshold": 0.45,
        "dedup.matches_kept": False,  # one of each component
        "dedup.label_guard": False,  # the paper compares no labels
        "dedup.lookalikes": "drop",  # nor does it look for such sources
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
    "exact": {
        **_EACH_IMAGE_ONCE,
        "pairs.num_neighbors": 0,
        "pairs.max_phash_distance": -1,
        "dedup.lookalikes": "drop",  # there are no pairs
    },
}

# The model of the stages that need one, and the pooling of a model that suits each stage; other models have one default
# for both. Measured on the demo: `gem_and_bottleneck` finds more images of one concept, `gem` more copies.
DEFAULT_MODEL = "efficientnet_lite0"
POOLINGS = {("embed", "efficientnet_lite0"): "gem_and_bottleneck", ("describe", "efficientnet_lite0"): "gem"}
# Profiles that compare thumbnails take the trained head. Cosines of `paper` are for descriptors such as SSCD's.
COPIES_POOLING = {("describe", "efficientnet_lite0"): "copies"}
# Values of these profiles for other descriptors, whose cosines are higher. Measured with `gem` on the demo.
OTHER_DESCRIPTORS = {"pairs.num_neighbors": 64, "pairs.min_descriptor_similarity": 0.66}
# The contribution of a seed dataset, where the config names none; `paper` chooses the mode by size. 4 is cited: DINOv2.
DATASET = {"as_is": True, "retrieval": "sample", "k": 4}


def fill(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a whole config, with the values of its profile for the settings that it leaves out.

    A config without [[retrieve.datasets]] and [retrieve.clustering] gets a dataset for each source with the role
    `seed`: its seeds are packed as they are, with the 4 nearest pool images of each.
    """
    filled: Any = _with_datasets(dict(values))
    profile = values.get("profile", DEFAULT)
    # Validation refuses an unknown name and a value that is not text.
    settings = next((settings for name, settings in PROFILES.items() if name == profile), {})
    compares_thumbnails = _VERIFIED.items() <= settings.items()
    for (stage, model), pooling in (POOLINGS | (COPIES_POOLING if compares_thumbnails else {})).items():
        filled = _fill(filled, [stage, "embedder", "name"], DEFAULT_MODEL)
        if _value(filled, [stage, "embedder", "name"]) == model:
            filled = _fill(filled, [stage, "embedder", "pooling"], pooling)
    if compares_thumbnails and _value(filled, ["describe", "embedder", "pooling"]) != "copies":
        settings = settings | OTHER_DESCRIPTORS
    for setting, value in settings.items():
        filled = _fill(filled, setting.split("."), value)
    result: dict[str, Any] = filled
    return result


def _with_datasets(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with a dataset for each seed source, where no dataset and no clustering is named."""
    sources = _value(values, ["ingest", "sources"])
    retrieve = values.get("retrieve", {})
    if (
        not isinstance(sources, list | tuple)
        or not isinstance(retrieve, dict)
        or {"datasets", "clustering"} & retrieve.keys()
    ):
        return values
    seeds = [
        source["name"]
        for source in sources
        if isinstance(source, dict) and source.get("role") == "seed" and "name" in source
    ]
    rest = {} if values.get("profile") == "paper" else DATASET
    return values | {"retrieve": retrieve | {"datasets": [{"name": name, **rest} for name in seeds]}}


def _value(node: Any, path: list[str]) -> Any:
    """The value at `path`, None where there is none."""
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    return node


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
