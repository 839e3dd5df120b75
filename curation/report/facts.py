"""The numbers and the examples of the report, read from a finished run, without HTML.

Tables are read as columns, the widest tables shard by shard. Examples are the images with the smallest image_id. An
image_id is a hash of the image's bytes, so the examples are a random sample, and the same sample every time.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import Field

from curation.config import Settings
from curation.copies import recall
from curation.copies.recall import SelfCheck
from curation.engine.manifest import Manifest, require_manifest
from curation.errors import InputError
from curation.files import parquet, paths, schemas
from curation.files.image_ids import id_bytes
from curation.files.paths import RecordedPath
from curation.images.decode import ImageLimits, decode_rgb
from curation.images.sources import ReferenceReader
from curation.report import self_check
from curation.run_folder import (
    STAGES,
    RunFolder,
    kept_shards,
    read_centroids,
    read_images,
    read_images_table,
    read_kept,
    read_retrieved,
)
from curation.search import exact

SAME, OTHER, UNKNOWN = 1, 0, -1
# Tried in this order until a thumbnail is small enough; the last one is small enough even for noise. Assumed good
# enough to look at.
_QUALITIES = (85, 60, 30, 5)
# For thumbnails that the describe stage wrote: that of a long narrow image may be one pixel high.
_THUMBNAIL_LIMITS = ImageLimits(min_side=1)


class Concepts(Settings):
    """Concepts by label. They make the labels of the seeds comparable with the labels of the pool.

    A key is a label, or the start of labels up to a slash; the longest matching key counts. A label without a matching
    key is itself a concept. An empty concept means that the concept of these images is unknown.
    """

    seed: dict[str, str] = Field(default_factory=dict)
    """Concepts of the seeds' labels."""
    pool: dict[str, str] = Field(default_factory=dict)
    """Concepts of the pool's labels."""

    def of(self, role: str, label: str | None) -> str | None:
        """The concept of a label, given the image's role ("seed" or "pool"); None if unknown."""
        if label is None:
            return None
        concepts = self.seed if role == "seed" else self.pool
        parts = label.split("/")
        for length in range(len(parts), 0, -1):
            if (concept := concepts.get("/".join(parts[:length]))) is not None:
                return concept or None
        return label


@dataclass(frozen=True)
class FinishedRun:
    """The tables of a run whose stages are all done. The rows of `images` are in the order of ingest."""

    folder: str
    manifests: dict[str, Manifest]
    composition: dict[str, Any]
    images: pa.Table  # image_id, source, role, label; component_id, kept and reason of dedup
    unique: pa.Table  # image_id, component_id and corpus_key of schemas.IMAGES_TABLE: one row a unique image
    retrieved: pa.Table  # schemas.RETRIEVED
    corpus_ids: pa.Array  # the unique images of the corpus
    same_concept: np.ndarray  # (rows of retrieved,) int8: SAME, OTHER or UNKNOWN
    chance: np.ndarray  # (rows of retrieved,) float64: probability of SAME by chance
    self_check: SelfCheck | None  # None where the measurement is off, or the pool holds no image

    def files(self, stage: str, kind: str) -> list[RecordedPath]:
        """The paths of the files `<kind>-*` of a stage, in shard order."""
        return self.manifests[stage].paths(paths.join(self.folder, stage), kind)

    def tables(self, stage: str, kind: str, schema: pa.Schema, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The tables `<kind>-*` of a stage, one at a time, in shard order."""
        for file in self.files(stage, kind):
            yield parquet.read_table(file, schema, columns)


def read_run(folder: str, concepts: Concepts) -> FinishedRun:
    """Read a finished run. Raises InputError for a stage that is not done."""
    manifests = {stage: require_manifest(paths.join(folder, stage)) for stage in STAGES}
    images = read_images(paths.join(folder, "ingest"), ["image_id", "source", "role", "label"])
    decisions = ["component_id", "kept", "reason"]
    decision_rows = pa.concat_tables(
        parquet.read_table(file, schemas.DUPLICATES, ["image_id", *decisions])
        for file in manifests["dedup"].paths(paths.join(folder, "dedup"), "duplicates")
    )
    if not images["image_id"].equals(decision_rows["image_id"]):
        raise InputError(f"'{folder}': the images of ingest and of dedup differ. Run dedup again with --replace.")
    for column in decisions:
        images = images.append_column(column, decision_rows[column])
    unique = read_images_table(paths.join(folder, "images"), ["image_id", "component_id", "corpus_key"])
    retrieved = read_retrieved(paths.join(folder, "retrieve"))
    same, chance = _compare_concepts(concepts, images, retrieved)
    return FinishedRun(
        folder=folder,
        manifests=manifests,
        composition=json.loads(paths.read_bytes(paths.join(folder, "corpus", "composition.json"))),
        images=images,
        unique=unique,
        retrieved=retrieved,
        corpus_ids=unique["image_id"].filter(pc.is_valid(unique["corpus_key"])).combine_chunks(),
        same_concept=same,
        chance=chance,
        self_check=_read_self_check(folder, manifests),
    )


def _read_self_check(folder: str, manifests: Mapping[str, Manifest]) -> SelfCheck | None:
    scores, known = self_check.read_scores(paths.join(folder, "self_check"))
    if not scores.num_rows:
        return None
    dedup_facts, min_similarity = manifests["dedup"].facts, manifests["self_check"].facts["min_similarity"]
    thresholds = {name: dedup_facts[name] for name in ("threshold", "holdout_threshold")}
    return recall.summarize(scores, known, **thresholds, min_similarity=min_similarity)


# The funnel


@dataclass(frozen=True)
class FunnelStep:
    """The number of images after one step of the funnel."""

    name: str
    count: int
    lost: int
    """Images fewer than before this step."""
    note: str
    is_loss: bool = True
    """Whether these images are dropped. Otherwise they are the holdout, or were not retrieved."""


def funnel(run: FinishedRun) -> list[FunnelStep]:
    """The steps from the sources to the corpus, then the parts of the corpus."""
    counts, totals = run.composition["funnel"], run.composition
    rejected = sum(counts["rejected"].values())
    reasons = sorted(counts["rejected"].items(), key=lambda item: (-item[1], item[0]))
    steps = [
        FunnelStep("found in the sources", counts["ingested"], 0, "files and archive members that count as images")
    ]

    def add_step(name: str, count: int, note: str, *, is_loss: bool = True) -> None:
        steps.append(FunnelStep(name, count, steps[-1].count - count, note, is_loss))

    listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
    add_step("accepted", counts["ingested"] - rejected, f"rejected: {listed}" if listed else "no file was rejected")
    add_step("seeds and pool", counts["candidates"], "the holdout is left out", is_loss=False)
    add_step("without exact copies", counts["after_exact"], "dropped: files with the bytes of another file")
    add_step("without near-duplicates", counts["after_near_duplicates"], "dropped: images that look like another image")
    add_step("without holdout matches", counts["after_decontamination"], "dropped: images that match a holdout image")
    add_step(
        "in the corpus", totals["total_unique"], "retrieved images, and seeds that are included as is", is_loss=False
    )
    steps.append(FunnelStep("retrieved from the pool", counts["retrieved"], 0, "part of the images in the corpus"))
    repeats = "; an image may repeat" if counts["packed"] > totals["total_unique"] else ""
    steps.append(FunnelStep("rows packed", counts["packed"], 0, f"samples in the tars{repeats}"))
    return steps


@dataclass(frozen=True)
class SourceCounts:
    """The number of images of one source by outcome.

    Of a seed or pool source, `exact`, `near`, `holdout` (reasons of dedup) and `kept` add up to `accepted`.
    """

    source: str
    role: str
    rejected: int
    accepted: int
    exact: int
    near: int
    holdout: int
    """Matches of the holdout; 0 for a source of the holdout, whose own images are no matches."""
    kept: int
    in_corpus: int


def by_source(run: FinishedRun) -> list[SourceCounts]:
    """The counts of each source, in the order of the config."""
    rejected: dict[str, int] = {}
    for table in run.tables("ingest", "rejects", schemas.REJECTS, ["source"]):
        for row in table["source"].value_counts().to_pylist():
            rejected[row["values"]] = rejected.get(row["values"], 0) + row["counts"]
    packed = pc.and_(run.images["kept"], pc.is_in(run.images["image_id"], value_set=run.corpus_ids))
    counted = (
        run.images.append_column("packed", packed)
        .group_by(["source", "reason", "packed"])
        .aggregate([([], "count_all")])
    )
    counts: dict[str, Counter[str]] = {source["name"]: Counter() for source in run.manifests["ingest"].facts["sources"]}
    for row in counted.to_pylist():
        of_source = counts[row["source"]]
        of_source["accepted"] += row["count_all"]
        of_source[row["reason"] or "kept"] += row["count_all"]
        of_source["in_corpus"] += row["count_all"] * row["packed"]
    return [
        SourceCounts(
            source=source["name"],
            role=source["role"],
            rejected=rejected.get(source["name"], 0),
            accepted=counts[source["name"]]["accepted"],
            holdout=0 if source["role"] == "holdout" else counts[source["name"]]["holdout"],
            **{name: counts[source["name"]][name] for name in ("exact", "near", "kept", "in_corpus")},
        )
        for source in run.manifests["ingest"].facts["sources"]
    ]


@dataclass(frozen=True)
class Rejects:
    """One reason for rejection, the number of its files, and the first of them."""

    reason: str
    count: int
    examples: list[dict[str, str]]  # rows of schemas.REJECTS


def rejects(run: FinishedRun, num_examples: int) -> list[Rejects]:
    """The reasons for rejection, the most frequent first."""
    examples: dict[str, list[dict[str, str]]] = {reason: [] for reason in run.manifests["ingest"].rejects}
    for table in run.tables("ingest", "rejects", schemas.REJECTS):
        for reason, rows in examples.items():
            if len(rows) < num_examples:
                rows_of_reason = table.filter(pc.equal(table["reason"], reason))
                rows += rows_of_reason.slice(0, num_examples - len(rows)).to_pylist()
    ordered = sorted(run.manifests["ingest"].rejects.items(), key=lambda item: (-item[1], item[0]))
    return [Rejects(reason, count, examples[reason]) for reason, count in ordered]


def passed_over(run: FinishedRun) -> dict[str, dict[str, int]]:
    """The files and members without an image, by source and kind; ingest publishes them where there are any."""
    counts: dict[str, dict[str, int]] = run.manifests["ingest"].facts.get("passed_over", {})
    return counts


def sample_text(run: FinishedRun) -> str | None:
    """A sentence on the share of the pool that was read; None for a whole pool."""
    ingest_facts = run.manifests["ingest"].facts
    if "sample_pool" not in ingest_facts:
        return None
    not_sampled = sum(ingest_facts["not_sampled"].values())
    share = f"{100 * ingest_facts['sample_pool']:g}%"
    return f"A sample: about {share} of the pool. Images of the pool not sampled: {not_sampled:,}."


def corpus_check_text(run: FinishedRun) -> list[str]:
    """Sentences on the copies that the corpus holds, by the check of retrieve."""
    check = run.manifests["retrieve"].facts.get("check")  # runs of older versions have none
    if check is None:
        return ["The corpus was not checked for copies (retrieve.check_copies is false)."]
    seeds = check["seed_copies"]
    trusted = f" {seeds:,} seeds are copies of other seeds; all seeds are kept." if seeds else ""
    missing = check["missing_rows"]
    fewer = f"; {missing:,} rows found none" if missing else ""
    return [
        f"Near-copies left in the corpus, by the check of retrieve: {check['retrieved_copies']:,} retrieved images."
        f"{trusted} Copies of the holdout: {check['holdout_copies']:,}.",
        f"The check compares images whose descriptors have a cosine of {check['min_cosine']:g} or more, and calls them "
        f"copies from a similarity of {check['threshold']:g}, with the holdout from {check['holdout_threshold']:g}. It "
        f"passed over {check['corpus_copies']:,} images for the next in rank{fewer}.",
        *_never_copies(check),
    ]


def _never_copies(check: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on the pairs that dedup and the check never call copies."""
    if check["lookalikes"]:
        names = ", ".join(f"'{name}'" for name in check["lookalikes"])
        yield f"Images of {names} look alike; only equal files and matches with the holdout count as their copies."
    if check["label_guard"]:
        yield "Images with different labels are not counted as copies of one another (dedup.label_guard)."


def self_check_text(run: FinishedRun) -> list[str]:
    """Sentences on the copies of this pool that copy detection recognises: all, by kind, and what it mistakes."""
    result = run.self_check
    if result is None:
        is_off = not run.manifests["self_check"].plan.num_shards
        return [
            "Copy detection was not measured on this pool "
            + ("(self_check.max_images is 0)." if is_off else "(it holds no image).")
        ]
    kinds = sorted(result.kinds, key=lambda each: -each.found.value)  # stable: equal ones in the order of KINDS
    listed = ", ".join(f"{kind_name(each.kind)} {each.found.value:.2f}" for each in kinds)
    return [self_check_summary(result), f"By kind of edit: {listed}.", *better_threshold_text(result)]


def self_check_summary(result: SelfCheck) -> str:
    """The copies found and the unexpected pairs, in one line."""
    low, high = result.found.interval
    of_pairs = "none"
    if result.unexpected.whole:
        least, most = (1000 * bound for bound in result.unexpected.interval)
        of_pairs = f"{1000 * result.unexpected.value:.1f} per 1,000 candidates ({least:.1f} to {most:.1f})"
    return (
        f"Copy detection on this pool: {result.found.count:,} of {result.found.whole:,} edited copies of "
        f"{result.num_images:,} of its images were recognised: {result.found.value:.2f} ({low:.2f} to {high:.2f}). "
        f"Unexpected pairs: {of_pairs}."
    )


def better_threshold_text(result: SelfCheck) -> list[str]:
    """A sentence on the threshold that would do better; none where there is none."""
    better = result.better
    if better is None:
        return []
    now, most = result.unexpected.count, 1000 * better.unexpected.interval[1]
    return [
        f"A threshold of {better.threshold:g} instead of {result.threshold:g} would do better: "
        f"{better.found.value:.2f} recognised, {better.unexpected.count:,} unexpected pairs instead of {now:,} "
        f"(at most {most:.1f} per 1,000 candidates). It was chosen on the same copies, so look at the pairs of section "
        f'"Copy threshold" first. Then run again with --set dedup.threshold={better.threshold:g} --replace.'
    ]


def kind_name(kind: str) -> str:
    """The name of a kind of edit, as a page shows it."""
    return kind.replace("_", " ")


def rejected_holdout(run: FinishedRun) -> int:
    """The number of rejected files of the holdout."""
    return int(run.manifests["ingest"].facts.get("rejected_holdout", 0))


# Retrieval by seed dataset


@dataclass(frozen=True)
class Dataset:
    """One seed dataset and the counts of its retrieved rows."""

    name: str
    mode: str
    by_cluster: bool
    """Whether clusters, not single seeds, retrieved its rows."""
    as_is: bool
    seeds: int
    retrieved: int
    cap: int | None
    rows: int
    unique: int
    compared: int
    """Retrieved rows for which both concepts, of the image and of its seeds, are known."""
    same_concept: float | None
    """Share of `compared` with the concept of the seed (sample), or of any seed of the dataset (cluster)."""
    chance: float | None
    """The expected share for images drawn from the kept pool at random."""
    mean_similarity: float | None


def datasets(run: FinishedRun) -> list[Dataset]:
    """The seed datasets, in the order of the config."""
    result = []
    for row in run.composition["datasets"]:
        in_dataset = _in_dataset(run, row["dataset"])
        same, retrieved = run.same_concept[in_dataset], run.retrieved.filter(in_dataset)
        known = same != UNKNOWN
        result.append(
            Dataset(
                name=row["dataset"],
                mode=_mode(row, retrieved),
                by_cluster=retrieved["seed_image_id"].null_count == retrieved.num_rows,
                as_is=row["as_is"],
                seeds=row["seeds"],
                retrieved=row["retrieved"],
                cap=row["cap"],
                rows=row["rows"],
                unique=row["unique"],
                compared=int(known.sum()),
                same_concept=float((same[known] == SAME).mean()) if known.any() else None,
                chance=float(run.chance[in_dataset][known].mean()) if known.any() else None,
                mean_similarity=float(pc.mean(retrieved["similarity"]).as_py()) if retrieved.num_rows else None,
            )
        )
    return result


def _in_dataset(run: FinishedRun, dataset: str) -> np.ndarray:
    """Whether each retrieved row belongs to the dataset, (R,) bool. Rows drawn by clustering belong to no dataset."""
    in_dataset: np.ndarray = pc.fill_null(pc.equal(run.retrieved["seed_source"], dataset), False).to_numpy()
    return in_dataset


def _mode(row: Mapping[str, Any], retrieved: pa.Table) -> str:
    """The retrieval mode: that of the retrieved rows, which also resolves `by_size`, else that of the config."""
    return str(retrieved["mode"][0]) if retrieved.num_rows else str(row["mode"])


def _compare_concepts(concepts: Concepts, images: pa.Table, retrieved: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """For each retrieved row, whether its concept is that of its seeds, (R,) int8, and by chance, (R,) float64.

    By chance: the share of the kept pool with such a concept.
    """
    kept = images.filter(images["kept"])
    codes = _concept_codes(concepts, kept)
    role, source = (kept[name].to_numpy(zero_copy_only=False) for name in ("role", "source"))
    in_pool = (role == "pool") & (codes >= 0)
    pool_share = np.bincount(codes[in_pool], minlength=codes.max(initial=-1) + 1) / max(in_pool.sum(), 1)

    def code_of(column: pa.ChunkedArray) -> np.ndarray:
        row = pc.fill_null(pc.index_in(column, value_set=kept["image_id"]), -1).to_numpy()
        return np.where(row >= 0, codes[row], UNKNOWN) if len(codes) else np.full(len(column), UNKNOWN)

    same = np.full(retrieved.num_rows, UNKNOWN, np.int8)
    chance = np.zeros(retrieved.num_rows)
    image_code, seed_code = code_of(retrieved["image_id"]), code_of(retrieved["seed_image_id"])
    by_sample = pc.is_valid(retrieved["seed_image_id"]).to_numpy()
    known = by_sample & (image_code >= 0) & (seed_code >= 0)
    same[known] = image_code[known] == seed_code[known]
    chance[known] = pool_share[seed_code[known]]
    seed_source = retrieved["seed_source"].to_numpy(zero_copy_only=False)
    for name in pc.unique(retrieved["seed_source"]).to_pylist():
        dataset_codes = np.unique(codes[(source == name) & (role == "seed") & (codes >= 0)])
        if len(dataset_codes):
            known = ~by_sample & (seed_source == name) & (image_code >= 0)
            same[known] = np.isin(image_code[known], dataset_codes)
            chance[known] = pool_share[dataset_codes].sum()
    return same, chance


def _concept_codes(concepts: Concepts, images: pa.Table) -> np.ndarray:
    """A number for the concept of each image, equal for equal concepts; UNKNOWN if the concept is unknown."""
    codes: dict[str, int] = {}
    result = np.full(images.num_rows, UNKNOWN)
    labels = images["label"].combine_chunks().dictionary_encode()
    label_index = pc.fill_null(labels.indices, -1).to_numpy()
    roles = images["role"].to_numpy(zero_copy_only=False)
    for role in ("seed", "pool"):
        names = [concepts.of(role, label) for label in labels.dictionary.to_pylist()]
        numbers = [UNKNOWN if name is None else codes.setdefault(name, len(codes)) for name in names]
        has_role = roles == role
        result[has_role] = np.array([*numbers, UNKNOWN])[label_index[has_role]]  # a null label has index -1, the last
    return result


@dataclass(frozen=True)
class Retrieval:
    """One query, a seed or a cluster, and its first retrieved rows."""

    dataset: str
    cluster_id: int | None
    seeds: list[str]  # image_ids: the seed, or some of the cluster's
    num_seeds: int
    rows: list[int]  # row numbers of FinishedRun.retrieved
    num_rows: int


def gallery(
    run: FinishedRun, dataset: Dataset, num_retrievals: int, num_seeds: int, num_retrieved: int
) -> list[Retrieval]:
    """Retrievals of a dataset to show: random seeds, or the clusters with the most seeds.

    num_seeds, num_retrieved: images to show of each retrieval.
    """
    dataset_rows = np.flatnonzero(_in_dataset(run, dataset.name))
    queries = run.retrieved["cluster_id" if dataset.by_cluster else "seed_image_id"].take(pa.array(dataset_rows))
    if dataset.by_cluster:
        seeds = _seeds_by_cluster(run, dataset.name)
        order = sorted(pc.unique(queries).to_pylist(), key=lambda key: (-len(seeds[key]), key))
    else:
        order = sorted(pc.unique(queries).to_pylist())
    result = []
    rank = run.retrieved["rank"].to_numpy()
    for key in order[:num_retrievals]:
        rows = dataset_rows[pc.equal(queries, key).to_numpy()]
        query_seeds = sorted(seeds[key]) if dataset.by_cluster else [key]
        result.append(
            Retrieval(
                dataset=dataset.name,
                cluster_id=key if dataset.by_cluster else None,
                seeds=query_seeds[:num_seeds],
                num_seeds=len(query_seeds),
                rows=rows[np.argsort(rank[rows], kind="stable")][:num_retrieved].tolist(),
                num_rows=len(rows),
            )
        )
    return result


def _seeds_by_cluster(run: FinishedRun, dataset: str) -> dict[int, list[str]]:
    """The kept seeds of a dataset by cluster."""
    centroids = read_centroids(paths.join(run.folder, "cluster"))
    seeds: dict[int, list[str]] = {}
    for shard in kept_shards(RunFolder.of(run.folder)):
        sources = parquet.read_table(shard.images, schemas.IMAGES, ["source"])["source"]
        if not pc.any(pc.equal(sources, dataset)).as_py():
            continue
        image_ids, matrix = read_kept(shard, role="seed", source=dataset)
        for image_id, number in zip(image_ids, exact.assign(matrix, centroids)[0], strict=True):
            seeds.setdefault(int(number), []).append(image_id)
    return seeds


# Labels


@dataclass(frozen=True)
class LabelCounts:
    """The number of pool images with one label (None: without a label): all, kept, and in the corpus."""

    label: str | None
    pool: int
    kept: int
    corpus: int


def labels(run: FinishedRun, *, top_folder: bool) -> list[LabelCounts]:
    """The labels of the pool, the most frequent first. top_folder: only the part before the first slash."""
    pool = run.images.filter(pc.equal(run.images["role"], "pool"))
    column = pool["label"]
    if top_folder:
        column = pc.replace_substring_regex(column, pattern="(?s)/.*", replacement="")
    packed = pc.and_(pool["kept"], pc.is_in(pool["image_id"], value_set=run.corpus_ids))
    counted = (
        pa.table({"label": column, "kept": pool["kept"].cast(pa.int64()), "corpus": packed.cast(pa.int64())})
        .group_by("label")
        .aggregate([([], "count_all"), ("kept", "sum"), ("corpus", "sum")])
    )
    label_counts = [
        LabelCounts(row["label"], row["count_all"], row["kept_sum"], row["corpus_sum"]) for row in counted.to_pylist()
    ]
    return sorted(label_counts, key=lambda counts: (-counts.pool, counts.label or ""))


# Copies


@dataclass(frozen=True)
class Member:
    """One image of a component."""

    image_id: str
    kept: bool
    reason: str | None
    similarity: float | None  # to the matched image; None if only other images connect the two
    num_files: int  # with exactly these bytes
    is_holdout: bool  # the image is in the holdout


@dataclass(frozen=True)
class Component:
    """A component of copies."""

    component_id: str
    size: int  # unique images
    members: list[Member]  # those to show


def largest_components(run: FinishedRun, num_components: int, num_members: int) -> list[Component]:
    """The largest components. Members to show: the kept ones, then random others by falling similarity."""
    largest = run.manifests["dedup"].facts["largest_components"][:num_components]
    component_ids = pa.array([component for component, _ in largest], pa.string())
    members: dict[str, dict[str, Member]] = {component: {} for component, _ in largest}
    for table in run.tables("dedup", "duplicates", schemas.DUPLICATES):
        for row in table.filter(pc.is_in(table["component_id"], value_set=component_ids)).to_pylist():
            component_members = members[row["component_id"]]
            earlier = component_members.get(row["image_id"])
            # Files with equal bytes have a row each: one holds the decision on the image, the others say `exact`.
            decision = earlier if earlier is not None and row["reason"] == "exact" else None
            component_members[row["image_id"]] = Member(
                image_id=row["image_id"],
                kept=row["kept"] or (earlier is not None and earlier.kept),
                reason=decision.reason if decision else row["reason"],
                similarity=decision.similarity if decision else row["similarity"],
                num_files=1 + (earlier.num_files if earlier else 0),
                is_holdout=row["reason"] == "holdout" and row["matched_image_id"] == row["image_id"],
            )
    return [Component(component, size, _first_members(members[component], num_members)) for component, size in largest]


def _first_members(members: Mapping[str, Member], num_members: int) -> list[Member]:
    chosen = sorted(members.values(), key=lambda member: (not member.kept, member.image_id))[:num_members]
    return sorted(chosen, key=lambda member: (not member.kept, -(member.similarity or 0.0), member.image_id))


@dataclass(frozen=True)
class Match:
    """Two images and how similar they are."""

    image_id: str
    other_image_id: str
    similarity: float | None


def holdout_matches(run: FinishedRun, num_matches: int) -> list[Match]:
    """Random seed and pool images that were dropped for a holdout image, each with that image."""
    holdout = run.images.filter(pc.equal(run.images["role"], "holdout"))["image_id"]
    matches: dict[str, Match] = {}
    for table in run.tables("dedup", "duplicates", schemas.DUPLICATES):
        dropped = pc.and_(
            pc.equal(table["reason"], "holdout"), pc.invert(pc.is_in(table["image_id"], value_set=pc.unique(holdout)))
        )
        for row in table.filter(dropped).sort_by("image_id").slice(0, num_matches).to_pylist():
            matches[row["image_id"]] = Match(row["image_id"], row["matched_image_id"], row["similarity"])
    return [matches[image_id] for image_id in sorted(matches)[:num_matches]]


def component_sizes(run: FinishedRun) -> list[tuple[str, int]]:
    """The number of components by their number of unique images, in ranges of growing width."""
    sizes = {int(size): count for size, count in run.manifests["dedup"].facts["component_sizes"].items()}
    ranges = [(2, 2), (3, 3), (4, 4), (5, 5), (6, 10), (11, 20), (21, 50), (51, 100), (101, 1000), (1001, None)]
    result = []
    for first, last in ranges:
        count = sum(count for size, count in sizes.items() if first <= size and (last is None or size <= last))
        text = f"over {first - 1:,}" if last is None else str(first) if first == last else f"{first}-{last}"
        result.append((text, count))
    return result


@dataclass(frozen=True)
class Guard:
    """One of dedup's guards against chains: the option, its value, and its counts by name."""

    option: str
    setting: Any
    counts: dict[str, int] | None  # None when it is off


def guards(run: FinishedRun) -> list[Guard]:
    """Every guard, on or off."""
    dedup_facts = run.manifests["dedup"].facts
    counts = dedup_facts["guards"]
    return [Guard(name, setting, counts.get(name)) for name, setting in dedup_facts["guard_settings"].items()]


@dataclass(frozen=True)
class SweepRow:
    """The effect of connecting all pairs at or above a threshold; see dedup."""

    threshold: float
    pairs: int
    components_of_two_or_more: int
    dropped: int
    largest_component: int


def threshold_sweep(run: FinishedRun) -> list[SweepRow]:
    """The effect of several thresholds, the lowest first."""
    return [SweepRow(**row) for row in run.manifests["dedup"].facts["threshold_sweep"]]


@dataclass(frozen=True)
class SimilarityBin:
    """Pairs with `low <= similarity < high` (the last bin includes `high`): their number and random examples."""

    low: float
    high: float
    count: int
    examples: list[Match]


def similarity_bins(run: FinishedRun, num_examples: int, max_examples: int) -> list[SimilarityBin]:
    """The pairs by similarity, lowest first. The bins begin at the thresholds of dedup's sweep.

    Each bin has at most `num_examples`, and all bins together at most `max_examples`. A bin shows one pair per
    component. Otherwise a large component of near-copies would fill it, without more information on the threshold.
    """
    edges = [row.threshold for row in threshold_sweep(run)] + [1.0]
    counts = np.zeros(len(edges) - 1, np.int64)
    num_examples = min(num_examples, max_examples // len(counts))
    examples: list[list[_Example]] = [[] for _ in counts]
    unique = run.unique.sort_by("image_id")
    image_ids = id_bytes(unique["image_id"])
    components = np.unique(id_bytes(unique["component_id"]), return_inverse=True)[1]
    for table in run.tables("pairs", "pairs", schemas.PAIRS):
        # In float32, as in dedup, so that each pair is on the same side of the threshold as in dedup.
        bin_of_pair = np.searchsorted(np.array(edges[1:-1], np.float32), table["similarity"].to_numpy(), side="right")
        counts += np.bincount(bin_of_pair, minlength=len(counts))
        node = [np.searchsorted(image_ids, id_bytes(table[name])) for name in schemas.PAIRS.names[:2]]
        for bin_number in np.unique(bin_of_pair):
            rows = np.flatnonzero(bin_of_pair == bin_number)
            # Nodes are in the order of hashes. A multiplicative hash (Knuth) gives each bin another order.
            order = (node[0][rows] * (2654435761 + 2 * int(bin_number))) % 2**32
            rows, order = rows[np.argsort(order, kind="stable")], np.sort(order)
            one_each = np.sort(np.unique(components[node[0][rows]], return_index=True)[1])[: 4 * num_examples]
            pairs = table.take(rows[one_each]).to_pylist()
            component_pairs = zip(
                components[node[0][rows[one_each]]].tolist(), components[node[1][rows[one_each]]].tolist(), strict=True
            )
            candidates = [
                _Example(position, pair["image_id"], frozenset(component_pair), _match(pair))
                for position, component_pair, pair in zip(order[one_each].tolist(), component_pairs, pairs, strict=True)
            ]
            examples[bin_number] = _disjoint([*examples[bin_number], *candidates], num_examples)
    return [
        SimilarityBin(low, high, int(count), sorted((example.match for example in chosen), key=_by_similarity))
        for low, high, count, chosen in zip(edges, edges[1:], counts, examples, strict=False)
    ]


@dataclass(frozen=True, order=True)
class _Example:
    """A pair that a bin may show. The order of examples is the order in which they are chosen."""

    position: int
    image_id: str
    components: frozenset[int] = field(compare=False)
    match: Match = field(compare=False)


def _disjoint(candidates: Iterable[_Example], count: int) -> list[_Example]:
    """The first `count` candidates, in their order, that share no component."""
    chosen: list[_Example] = []
    for example in sorted(candidates):
        if len(chosen) < count and all(example.components.isdisjoint(other.components) for other in chosen):
            chosen.append(example)
    return chosen


def _by_similarity(match: Match) -> tuple[float, str]:
    return -(match.similarity or 0.0), match.image_id


def _match(row: Mapping[str, Any]) -> Match:
    return Match(row["image_id"], row["other_image_id"], row["similarity"])


# Thumbnails


@dataclass(frozen=True)
class Thumbnail:
    """One image that the report shows, with its metadata."""

    image_id: str
    source: str
    role: str
    uri: str
    label: str | None
    width: int  # pixels of the original
    height: int
    webp: bytes


def read_thumbnails(run: FinishedRun, image_ids: Iterable[str], side: int, max_bytes: int) -> dict[str, Thumbnail]:
    """The thumbnails by image_id. Their longest side is at most `side` pixels.

    They come from the thumbnails of the describe stage if it wrote any, else from the originals. Raises InputError when
    an original has changed since it was ingested.
    """
    limits = ImageLimits.model_validate(run.manifests["ingest"].facts["limits"], strict=False)
    thumbnail_files, image_files = run.files("describe", "thumbnails"), run.files("ingest", "images")
    reader = ReferenceReader()
    thumbnails: dict[str, Thumbnail] = {}
    for shard, rows in _rows_by_shard(run, image_ids).items():
        table = parquet.read_table(image_files[shard], schemas.IMAGES).take(rows)
        stored: dict[str, bytes] = {}
        if thumbnail_files:
            stored = _read_stored(thumbnail_files[shard], table["image_id"])
        for row in table.to_pylist():
            if thumbnail_files:
                image = decode_rgb(stored[row["image_id"]], _THUMBNAIL_LIMITS)
            else:
                data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"], row["layout"])
                image = decode_rgb(data, limits, target_side=side)
            facts = {name: row[name] for name in ("image_id", "source", "role", "uri", "label", "width", "height")}
            thumbnails[row["image_id"]] = Thumbnail(**facts, webp=_encode(image, side, max_bytes))
    reader.close()
    return thumbnails


def _rows_by_shard(run: FinishedRun, image_ids: Iterable[str]) -> dict[int, list[int]]:
    """One row of each image, by shard of ingest. Of several files, the kept one counts, else one of the holdout."""
    is_chosen = pc.is_in(run.images["image_id"], value_set=pa.array(sorted(set(image_ids)), pa.string()))
    rows = np.flatnonzero(is_chosen.to_numpy())
    images = run.images.select(["image_id", "kept", "role"]).take(rows).to_pylist()
    row_of_image: dict[str, int] = {}
    for _, _, row, image_id in sorted(
        (not image["kept"], image["role"] != "holdout", row, image["image_id"])
        for row, image in zip(rows.tolist(), images, strict=True)
    ):
        row_of_image.setdefault(image_id, row)
    accepted = [record.totals["accepted"] for record in run.manifests["ingest"].shards]
    starts = np.concatenate([[0], np.cumsum(accepted)])
    by_shard: dict[int, list[int]] = {}
    for row in sorted(row_of_image.values()):
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        by_shard.setdefault(shard, []).append(row - int(starts[shard]))
    return by_shard


def _read_stored(path: str, image_ids: pa.ChunkedArray) -> dict[str, bytes]:
    """The encoded thumbnails of these images in a file of the describe stage."""
    table = parquet.read_table(path, schemas.THUMBNAILS)
    chosen = table.filter(pc.is_in(table["image_id"], value_set=image_ids.combine_chunks()))
    return dict(zip(chosen["image_id"].to_pylist(), chosen["thumbnail"].to_pylist(), strict=True))


def _encode(image: Image.Image, side: int, max_bytes: int) -> bytes:
    """`image` as WebP with sides of at most `side` pixels, in the best quality that needs at most `max_bytes`."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=quality)
        if len(buffer.getvalue()) <= max_bytes:
            break
    return buffer.getvalue()
