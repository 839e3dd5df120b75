"""What the report tells, as numbers and choices: read from a finished run, without HTML and without pixels.

Tables are read as columns, the widest of them shard by shard. Where some of many are shown, the ones with the smallest
image_id are: an image_id is a hash of the image's bytes, so that is a random sample, and the same one every time.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import Field

from curation.config import Settings
from curation.engine.manifest import Manifest, require_manifest
from curation.errors import InputError
from curation.files import parquet, paths, schemas
from curation.files.image_ids import id_bytes
from curation.images.decode import ImageLimits, decode_rgb
from curation.images.sources import ReferenceReader
from curation.run_folder import (
    RunFolder,
    kept_shards,
    read_centroids,
    read_corpus,
    read_images,
    read_kept,
    read_retrieved,
)
from curation.search import exact

# The folders of a run that the report reads.
STAGES = ("ingest", "embed", "describe", "pairs", "dedup", "cluster", "retrieve", "corpus")

SAME, OTHER, UNKNOWN = 1, 0, -1
# Tried in this order until a picture is small enough; the last holds even for noise. Assumed good enough to look at.
_QUALITIES = (85, 60, 30, 5)
# Thumbnails are our own, and one of a long narrow picture may be a pixel high.
_THUMBNAIL_LIMITS = ImageLimits(min_side=1)


class Concepts(Settings):
    """What labels show, so that those of seeds and of the pool can be compared.

    A key is a label, or the front of labels up to a slash; the longest key that fits wins. A label that no key fits is
    a concept of its own. The empty concept means that nobody knows what such images show.
    """

    seed: dict[str, str] = Field(default_factory=dict)
    """Concepts by label of the seeds."""
    pool: dict[str, str] = Field(default_factory=dict)
    """Concepts by label of the pool."""

    def of(self, role: str, label: str | None) -> str | None:
        """The concept of a seed's or pool image's label; None where it is unknown."""
        if label is None:
            return None
        known = self.seed if role == "seed" else self.pool
        parts = label.split("/")
        for length in range(len(parts), 0, -1):
            if (concept := known.get("/".join(parts[:length]))) is not None:
                return concept or None
        return label


@dataclass(frozen=True)
class FinishedRun:
    """A run whose stages are all done. Rows of `images` are those of ingest, in its order."""

    folder: str
    manifests: dict[str, Manifest]
    composition: dict[str, Any]
    images: pa.Table  # image_id, source, role, label; component_id, kept and reason as dedup decided
    retrieved: pa.Table  # records.RETRIEVED
    corpus_ids: pa.Array  # the unique images of the corpus
    same_concept: np.ndarray  # (rows of retrieved,) int8: SAME, OTHER or UNKNOWN
    chance: np.ndarray  # (rows of retrieved,) float64: the share of the kept pool that would have been SAME

    def file(self, stage: str, name: str) -> str:
        """The path of a stage's file."""
        return paths.join(self.folder, stage, name)

    def tables(self, stage: str, kind: str, schema: pa.Schema, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The tables `<kind>-*` of a stage, one at a time, in shard order."""
        for file in self.manifests[stage].files(kind):
            yield parquet.read_table(self.file(stage, file), schema, columns)


def read_run(folder: str, concepts: Concepts) -> FinishedRun:
    """Read a finished run. Raises InputError for a stage that is not done."""
    manifests = {stage: require_manifest(paths.join(folder, stage)) for stage in STAGES}
    images = read_images(paths.join(folder, "ingest"), ["image_id", "source", "role", "label"])
    decisions = ["component_id", "kept", "reason"]
    decided = pa.concat_tables(
        parquet.read_table(paths.join(folder, "dedup", file), schemas.DUPLICATES, ["image_id", *decisions])
        for file in manifests["dedup"].files("duplicates")
    )
    if not images["image_id"].equals(decided["image_id"]):
        raise InputError(f"'{folder}': ingest and dedup are of different images. Run dedup again with --replace.")
    for column in decisions:
        images = images.append_column(column, decided[column])
    retrieved = read_retrieved(paths.join(folder, "retrieve"))
    same, chance = _compare_concepts(concepts, images, retrieved)
    return FinishedRun(
        folder=folder,
        manifests=manifests,
        composition=json.loads(paths.read_bytes(paths.join(folder, "corpus", "composition.json"))),
        images=images,
        retrieved=retrieved,
        corpus_ids=pc.unique(read_corpus(paths.join(folder, "corpus"))["image_id"]),
        same_concept=same,
        chance=chance,
    )


# The funnel


@dataclass(frozen=True)
class Step:
    """What is left after a step of the funnel, and how many did not pass it."""

    name: str
    count: int
    lost: int
    note: str
    is_loss: bool = True
    """Whether what did not pass is gone; else it is set apart, or was not asked for."""


def funnel(run: FinishedRun) -> list[Step]:
    """The steps from everything that was found to the corpus, then what the corpus is made of."""
    counts, totals = run.composition["funnel"], run.composition
    rejected = sum(counts["rejected"].values())
    reasons = sorted(counts["rejected"].items(), key=lambda item: (-item[1], item[0]))
    steps = [Step("found in the sources", counts["ingested"], 0, "files and archive members that count as images")]

    def then(name: str, count: int, note: str, *, is_loss: bool = True) -> None:
        steps.append(Step(name, count, steps[-1].count - count, note, is_loss))

    listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
    then("accepted", counts["ingested"] - rejected, f"rejected: {listed}" if listed else "none was rejected")
    then("seeds and pool", counts["candidates"], "the others are the holdout", is_loss=False)
    then("without exact copies", counts["after_exact"], "the others have the bytes of another file")
    then("without near-duplicates", counts["after_near_duplicates"], "the others look like another image")
    then("without the holdout's images", counts["after_decontamination"], "the others match an image of the holdout")
    then("in the corpus", totals["total_unique"], "what was retrieved, and seeds taken as they are", is_loss=False)
    steps.append(Step("retrieved from the pool", counts["retrieved"], 0, "of the images in the corpus"))
    steps.append(Step("rows packed", counts["packed"], 0, "samples in the tars: with repeats, more than images"))
    return steps


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source. All but `rejected` and `in_corpus` add up to the accepted rows."""

    source: str
    role: str
    rejected: int
    exact: int
    near: int
    holdout: int
    kept: int
    in_corpus: int


def by_source(run: FinishedRun) -> list[SourceCounts]:
    """What became of each source, in the order of the config."""
    rejected: dict[str, int] = {}
    for table in run.tables("ingest", "rejects", schemas.REJECTS, ["source"]):
        for pair in table["source"].value_counts().to_pylist():
            rejected[pair["values"]] = rejected.get(pair["values"], 0) + pair["counts"]
    packed = pc.and_(run.images["kept"], pc.is_in(run.images["image_id"], value_set=run.corpus_ids))
    counted = (
        run.images.append_column("packed", packed)
        .group_by(["source", "reason", "packed"])
        .aggregate([([], "count_all")])
    )
    counts = {(row["source"], row["reason"], row["packed"]): row["count_all"] for row in counted.to_pylist()}
    return [
        SourceCounts(
            source=source["name"],
            role=source["role"],
            rejected=rejected.get(source["name"], 0),
            in_corpus=counts.get((source["name"], None, True), 0),
            kept=counts.get((source["name"], None, True), 0) + counts.get((source["name"], None, False), 0),
            **{reason: counts.get((source["name"], reason, False), 0) for reason in ("exact", "near", "holdout")},
        )
        for source in run.manifests["ingest"].facts["sources"]
    ]


@dataclass(frozen=True)
class Rejects:
    """One reason for rejection: how often, and the first few."""

    reason: str
    count: int
    examples: list[dict[str, str]]  # rows of records.REJECTS


def rejects(run: FinishedRun, num_examples: int) -> list[Rejects]:
    """The reasons for rejection, the most frequent first."""
    examples: dict[str, list[dict[str, str]]] = {reason: [] for reason in run.manifests["ingest"].rejects}
    for table in run.tables("ingest", "rejects", schemas.REJECTS):
        for reason, found in examples.items():
            if len(found) < num_examples:
                chosen = table.filter(pc.equal(table["reason"], reason))
                found += chosen.slice(0, num_examples - len(found)).to_pylist()
    ordered = sorted(run.manifests["ingest"].rejects.items(), key=lambda item: (-item[1], item[0]))
    return [Rejects(reason, count, examples[reason]) for reason, count in ordered]


# What the seeds brought


@dataclass(frozen=True)
class Dataset:
    """What one seed dataset brought."""

    name: str
    mode: str
    by_cluster: bool
    """Whether clusters retrieved its rows, rather than single seeds."""
    as_is: bool
    seeds: int
    retrieved: int
    cap: int | None
    rows: int
    unique: int
    compared: int
    """Retrieved rows whose concept, and whose seeds' concept, is known."""
    same_concept: float | None
    """Share of `compared` with the concept of the seed (sample), or one of the dataset's seeds (cluster)."""
    chance: float | None
    """What that share would be for images drawn from the kept pool at random."""
    mean_similarity: float | None


def datasets(run: FinishedRun) -> list[Dataset]:
    """What each seed dataset brought, in the order of the config."""
    result = []
    for row in run.composition["datasets"]:
        own = _asked_by(run, row["dataset"])
        same, found = run.same_concept[own], run.retrieved.filter(own)
        known = same != UNKNOWN
        result.append(
            Dataset(
                name=row["dataset"],
                mode=_mode(row, found),
                by_cluster=found["seed_image_id"].null_count == found.num_rows,
                as_is=row["as_is"],
                seeds=row["seeds"],
                retrieved=row["retrieved"],
                cap=row["cap"],
                rows=row["rows"],
                unique=row["unique"],
                compared=int(known.sum()),
                same_concept=float((same[known] == SAME).mean()) if known.any() else None,
                chance=float(run.chance[own][known].mean()) if known.any() else None,
                mean_similarity=float(pc.mean(found["similarity"]).as_py()) if found.num_rows else None,
            )
        )
    return result


def _asked_by(run: FinishedRun, dataset: str) -> np.ndarray:
    """Whether each retrieved row is of that dataset, (R,) bool; what was drawn by clustering is of none."""
    own: np.ndarray = pc.fill_null(pc.equal(run.retrieved["seed_source"], dataset), False).to_numpy()
    return own


def _mode(row: Mapping[str, Any], found: pa.Table) -> str:
    """How the pool was searched; `by_size` is settled by the rows that it found."""
    return str(found["mode"][0]) if found.num_rows else str(row["mode"])


def _compare_concepts(concepts: Concepts, images: pa.Table, retrieved: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """For each retrieved row, whether it shows what was asked for, and how likely that was: (R,) int8, (R,) float64."""
    kept = images.filter(images["kept"])
    codes = _concept_codes(concepts, kept)
    role, source = (kept[name].to_numpy(zero_copy_only=False) for name in ("role", "source"))
    in_pool = (role == "pool") & (codes >= 0)
    pool_share = np.bincount(codes[in_pool], minlength=codes.max(initial=-1) + 1) / max(in_pool.sum(), 1)

    def code_of(column: pa.ChunkedArray) -> np.ndarray:
        place = pc.fill_null(pc.index_in(column, value_set=kept["image_id"]), -1).to_numpy()
        return np.where(place >= 0, codes[place], UNKNOWN) if len(codes) else np.full(len(column), UNKNOWN)

    same = np.full(retrieved.num_rows, UNKNOWN, np.int8)
    chance = np.zeros(retrieved.num_rows)
    found, seed = code_of(retrieved["image_id"]), code_of(retrieved["seed_image_id"])
    by_sample = pc.is_valid(retrieved["seed_image_id"]).to_numpy()
    known = by_sample & (found >= 0) & (seed >= 0)
    same[known] = found[known] == seed[known]
    chance[known] = pool_share[seed[known]]
    seed_source = retrieved["seed_source"].to_numpy(zero_copy_only=False)
    for name in pc.unique(retrieved["seed_source"]).to_pylist():
        asked = np.unique(codes[(source == name) & (role == "seed") & (codes >= 0)])
        if len(asked):
            known = ~by_sample & (seed_source == name) & (found >= 0)
            same[known] = np.isin(found[known], asked)
            chance[known] = pool_share[asked].sum()
    return same, chance


def _concept_codes(concepts: Concepts, images: pa.Table) -> np.ndarray:
    """A number for each image's concept, equal for equal concepts; UNKNOWN where it is unknown."""
    codes: dict[str, int] = {}
    result = np.full(images.num_rows, UNKNOWN)
    labels = images["label"].combine_chunks().dictionary_encode()
    place = pc.fill_null(labels.indices, -1).to_numpy()
    role = images["role"].to_numpy(zero_copy_only=False)
    for wanted in ("seed", "pool"):
        names = [concepts.of(wanted, label) for label in labels.dictionary.to_pylist()]
        numbers = [UNKNOWN if name is None else codes.setdefault(name, len(codes)) for name in names]
        chosen = role == wanted
        result[chosen] = np.array([*numbers, UNKNOWN])[place[chosen]]  # a null label has place -1, the last
    return result


@dataclass(frozen=True)
class Retrieval:
    """Something that asked, and the first of what it brought: rows of `retrieved`, by their number."""

    dataset: str
    cluster_id: int | None
    seeds: list[str]  # image_ids: the seed, or some of the cluster's
    num_seeds: int
    rows: list[int]
    num_rows: int


def gallery(run: FinishedRun, dataset: Dataset, num_retrievals: int, num_seeds: int, num_found: int) -> list[Retrieval]:
    """Some seeds of a dataset with what they brought, or its clusters with the most seeds."""
    own = np.flatnonzero(_asked_by(run, dataset.name))
    asked_by = run.retrieved["cluster_id" if dataset.by_cluster else "seed_image_id"].take(pa.array(own))
    if dataset.by_cluster:
        seeds = _seeds_by_cluster(run, dataset.name)
        order = sorted(pc.unique(asked_by).to_pylist(), key=lambda key: (-len(seeds[key]), key))
    else:
        order = sorted(pc.unique(asked_by).to_pylist())
    result = []
    rank = run.retrieved["rank"].to_numpy()
    for key in order[:num_retrievals]:
        rows = own[pc.equal(asked_by, key).to_numpy()]
        askers = sorted(seeds[key]) if dataset.by_cluster else [key]
        result.append(
            Retrieval(
                dataset=dataset.name,
                cluster_id=key if dataset.by_cluster else None,
                seeds=askers[:num_seeds],
                num_seeds=len(askers),
                rows=rows[np.argsort(rank[rows], kind="stable")][:num_found].tolist(),
                num_rows=len(rows),
            )
        )
    return result


def _seeds_by_cluster(run: FinishedRun, dataset: str) -> dict[int, list[str]]:
    """The kept seeds of a dataset by the cluster that they fall into."""
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
    """How many images of the pool have a label (None: no label): as found, kept, and in the corpus."""

    label: str | None
    pool: int
    kept: int
    corpus: int


def labels(run: FinishedRun, *, top_folder: bool) -> list[LabelCounts]:
    """The labels of the pool, or their parts before the first slash; the most frequent first."""
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
    found = [
        LabelCounts(row["label"], row["count_all"], row["kept_sum"], row["corpus_sum"]) for row in counted.to_pylist()
    ]
    return sorted(found, key=lambda counts: (-counts.pool, counts.label or ""))


# Copies


@dataclass(frozen=True)
class Member:
    """One image of a group of copies."""

    image_id: str
    kept: bool
    reason: str | None
    similarity: float | None  # to the image for which it was dropped; None where others join the two
    num_files: int  # with these very bytes
    is_holdout: bool  # itself an image of the holdout


@dataclass(frozen=True)
class Group:
    """A component: images joined by copies, the first of its members, and its size in unique images."""

    component_id: str
    size: int
    members: list[Member]


def groups(run: FinishedRun, num_groups: int, num_members: int) -> list[Group]:
    """The largest components, with what was kept first and then a random few by falling similarity."""
    largest = run.manifests["dedup"].facts["largest_components"][:num_groups]
    wanted = pa.array([component for component, _ in largest], pa.string())
    members: dict[str, dict[str, Member]] = {component: {} for component, _ in largest}
    for table in run.tables("dedup", "duplicates", schemas.DUPLICATES):
        for row in table.filter(pc.is_in(table["component_id"], value_set=wanted)).to_pylist():
            group = members[row["component_id"]]
            before = group.get(row["image_id"])
            # Of files with the same bytes one row tells the image's fate, the others that they are exact copies of it.
            told_by = before if before is not None and row["reason"] == "exact" else None
            group[row["image_id"]] = Member(
                image_id=row["image_id"],
                kept=row["kept"] or (before is not None and before.kept),
                reason=told_by.reason if told_by else row["reason"],
                similarity=told_by.similarity if told_by else row["similarity"],
                num_files=1 + (before.num_files if before else 0),
                is_holdout=row["reason"] == "holdout" and row["matched_image_id"] == row["image_id"],
            )
    return [Group(component, size, _first_members(members[component], num_members)) for component, size in largest]


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
    """A random few of the seed and pool images that the holdout took away, each with the holdout's image."""
    holdout = run.images.filter(pc.equal(run.images["role"], "holdout"))["image_id"]
    found: dict[str, Match] = {}
    for table in run.tables("dedup", "duplicates", schemas.DUPLICATES):
        dropped = pc.and_(
            pc.equal(table["reason"], "holdout"), pc.invert(pc.is_in(table["image_id"], value_set=pc.unique(holdout)))
        )
        for row in table.filter(dropped).sort_by("image_id").slice(0, num_matches).to_pylist():
            found[row["image_id"]] = Match(row["image_id"], row["matched_image_id"], row["similarity"])
    return [found[image_id] for image_id in sorted(found)[:num_matches]]


def component_sizes(run: FinishedRun) -> list[tuple[str, int]]:
    """How many components have how many unique images, in ranges that widen."""
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
    """One of dedup's guards against chains: the option, its value, and by name what it did."""

    option: str
    setting: Any
    counts: dict[str, int] | None  # None: it is off


def guards(run: FinishedRun) -> list[Guard]:
    """Every guard, those that are off as well."""
    dedup_facts = run.manifests["dedup"].facts
    counts = dedup_facts["guards"]
    return [Guard(name, setting, counts.get(name)) for name, setting in dedup_facts["guard_settings"].items()]


@dataclass(frozen=True)
class SweepRow:
    """What joining all pairs at or above a threshold would do; see dedup."""

    threshold: float
    pairs: int
    components_of_two_or_more: int
    dropped: int
    largest_component: int


def threshold_sweep(run: FinishedRun) -> list[SweepRow]:
    """What each of some thresholds would do, the lowest first."""
    return [SweepRow(**row) for row in run.manifests["dedup"].facts["threshold_sweep"]]


@dataclass(frozen=True)
class SimilarityBin:
    """Pairs with `low <= similarity < high` (the last bin includes `high`): how many, and a random few."""

    low: float
    high: float
    count: int
    examples: list[Match]


def similarity_bins(run: FinishedRun, num_examples: int, max_examples: int) -> list[SimilarityBin]:
    """The pairs by similarity, lowest first. Bins begin at the thresholds of dedup's sweep, its own among them.

    Each has `num_examples`, or fewer so that all together have at most `max_examples`. Of one component a bin shows one
    pair: a large group of near-copies would fill it, and tells of the threshold no more than a small one.
    """
    edges = [row.threshold for row in threshold_sweep(run)] + [1.0]
    counts = np.zeros(len(edges) - 1, np.int64)
    num_examples = min(num_examples, max_examples // len(counts))
    examples: list[list[_Example]] = [[] for _ in counts]
    image_ids, first = np.unique(id_bytes(run.images["image_id"]), return_index=True)
    component = np.unique(id_bytes(run.images["component_id"]), return_inverse=True)[1][first]
    for table in run.tables("pairs", "pairs", schemas.PAIRS):
        # In float32, as dedup compares, so that a pair counts on the side of the threshold on which it was decided.
        number = np.searchsorted(np.array(edges[1:-1], np.float32), table["similarity"].to_numpy(), side="right")
        counts += np.bincount(number, minlength=len(counts))
        node = [np.searchsorted(image_ids, id_bytes(table[name])) for name in schemas.PAIRS.names[:2]]
        for own_bin in np.unique(number):
            rows = np.flatnonzero(number == own_bin)
            # Nodes are in the order of hashes; multiplied (Knuth), each bin sees them in another order.
            order = (node[0][rows] * (2654435761 + 2 * int(own_bin))) % 2**32
            rows, order = rows[np.argsort(order, kind="stable")], np.sort(order)
            once = np.sort(np.unique(component[node[0][rows]], return_index=True)[1])[: 4 * num_examples]
            found = table.take(rows[once]).to_pylist()
            joined = zip(component[node[0][rows[once]]].tolist(), component[node[1][rows[once]]].tolist(), strict=True)
            candidates = [
                _Example(place, row["image_id"], frozenset(pair), _match(row))
                for place, pair, row in zip(order[once].tolist(), joined, found, strict=True)
            ]
            examples[own_bin] = _disjoint([*examples[own_bin], *candidates], num_examples)
    return [
        SimilarityBin(low, high, int(count), sorted((example.match for example in chosen), key=_by_similarity))
        for low, high, count, chosen in zip(edges, edges[1:], counts, examples, strict=False)
    ]


@dataclass(frozen=True, order=True)
class _Example:
    """A pair that a bin may show, in the order in which pairs are chosen."""

    place: int
    image_id: str
    components: frozenset[int] = field(compare=False)
    match: Match = field(compare=False)


def _disjoint(candidates: Iterable[_Example], count: int) -> list[_Example]:
    """The first few in order that share no component."""
    chosen: list[_Example] = []
    for example in sorted(candidates):
        if len(chosen) < count and all(example.components.isdisjoint(other.components) for other in chosen):
            chosen.append(example)
    return chosen


def _by_similarity(match: Match) -> tuple[float, str]:
    return -(match.similarity or 0.0), match.image_id


def _match(row: Mapping[str, Any]) -> Match:
    return Match(row["image_id"], row["other_image_id"], row["similarity"])


# Pictures


@dataclass(frozen=True)
class Picture:
    """One image that the report shows, and what is said of it."""

    image_id: str
    source: str
    role: str
    uri: str
    label: str | None
    width: int  # pixels of the original
    height: int
    encoded: bytes  # the thumbnail, WebP


def read_pictures(run: FinishedRun, image_ids: Iterable[str], side: int, max_bytes: int) -> dict[str, Picture]:
    """The images by image_id, each as a thumbnail whose longest side is at most `side` pixels.

    Read from the thumbnails of describe where it wrote any, else from the originals. Raises InputError when an original
    has changed since it was ingested.
    """
    limits = ImageLimits.model_validate(run.manifests["ingest"].facts["limits"], strict=False)
    thumbnails = run.manifests["describe"].files("thumbnails")
    image_files = run.manifests["ingest"].files("images")
    reader = ReferenceReader()
    pictures: dict[str, Picture] = {}
    for shard, rows in _rows_by_shard(run, image_ids).items():
        table = parquet.read_table(run.file("ingest", image_files[shard]), schemas.IMAGES).take(rows)
        small = _thumbnails(run.file("describe", thumbnails[shard]), table["image_id"]) if thumbnails else {}
        for row in table.to_pylist():
            if thumbnails:
                picture = decode_rgb(small[row["image_id"]], _THUMBNAIL_LIMITS)
            else:
                data = reader.read(row["uri"], row["offset"], row["length"], row["image_id"])
                picture = decode_rgb(data, limits, target_side=side)
            facts = {name: row[name] for name in ("image_id", "source", "role", "uri", "label", "width", "height")}
            pictures[row["image_id"]] = Picture(**facts, encoded=_encode(picture, side, max_bytes))
    reader.close()
    return pictures


def _rows_by_shard(run: FinishedRun, image_ids: Iterable[str]) -> dict[int, list[int]]:
    """Where the images lie: rows by shard of ingest. Of several files the kept one counts, or else the holdout's."""
    wanted = pc.is_in(run.images["image_id"], value_set=pa.array(sorted(set(image_ids)), pa.string()))
    rows = np.flatnonzero(wanted.to_numpy())
    taken = run.images.select(["image_id", "kept", "role"]).take(rows).to_pylist()
    place: dict[str, int] = {}
    for _, _, row, image_id in sorted(
        (not image["kept"], image["role"] != "holdout", row, image["image_id"])
        for row, image in zip(rows.tolist(), taken, strict=True)
    ):
        place.setdefault(image_id, row)
    accepted = [record.totals["accepted"] for record in run.manifests["ingest"].shards]
    starts = np.concatenate([[0], np.cumsum(accepted)])
    by_shard: dict[int, list[int]] = {}
    for row in sorted(place.values()):
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        by_shard.setdefault(shard, []).append(row - int(starts[shard]))
    return by_shard


def _thumbnails(path: str, image_ids: pa.ChunkedArray) -> dict[str, bytes]:
    table = parquet.read_table(path, schemas.THUMBNAILS)
    chosen = table.filter(pc.is_in(table["image_id"], value_set=image_ids.combine_chunks()))
    return dict(zip(chosen["image_id"].to_pylist(), chosen["thumbnail"].to_pylist(), strict=True))


def _encode(picture: Image.Image, side: int, max_bytes: int) -> bytes:
    """`picture` as WebP of at most `side` pixels, in the best of the qualities that keeps to `max_bytes`."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=quality)
        if len(buffer.getvalue()) <= max_bytes:
            break
    return buffer.getvalue()
