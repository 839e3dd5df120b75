"""Report: what a run did, in pictures, on one page that needs nothing else.

    <run>/report.html

The page holds no script and loads nothing, its pictures are thumbnails that our own decoder and encoder made, and its
size is bounded whatever the corpus's: a fixed number of pictures, each of at most `MAX_PICTURE_BYTES`. The same run
gives the same bytes. What it says is counted in report_facts.py and set in markup.py; here it is put into words.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import rich.box
from pydantic import Field
from rich.console import Console
from rich.table import Table

from curation.config import Settings, load
from curation.engine import progress
from curation.engine.manifest import MANIFEST_NAME
from curation.errors import ConfigError
from curation.files import paths
from curation.files.hashes import hash_json, sha256_of_file
from curation.report import facts, markup
from curation.report.facts import (
    OTHER,
    SAME,
    UNKNOWN,
    Concepts,
    Dataset,
    FinishedRun,
    Group,
    Guard,
    LabelCounts,
    Match,
    Member,
    Picture,
    Retrieval,
    SimilarityBin,
    Step,
)
from curation.report.markup import Markup, clip, join, quoted, tag
from curation.run_folder import STAGES

REPORT_NAME = "report.html"
CONFIG_NAME = "run.toml"
TITLE = "How this corpus was built"
# Pixels of a thumbnail's longest side. Drawn at 92 points, so that it stays sharp on finer screens.
THUMBNAIL_SIDE = 128
# Bytes of a thumbnail. Below are at most 774 pictures, in base64 7.3 MB.
MAX_PICTURE_BYTES = 7_000
# How many of what is shown. Assumed: enough to judge, little enough to look at.
GALLERY_PICTURES, GALLERY_DATASETS = 400, 32
FOUND_PER_SEED = 6
SEEDS_PER_CLUSTER, FOUND_PER_CLUSTER = 4, 8
GROUPS, MEMBERS_PER_GROUP = 12, 12
HOLDOUT_MATCHES = 15
PAIRS_PER_BIN, PAIRS_IN_BINS = 5, 100
REJECTS_PER_REASON = 3
LABELS = 25

_CONCEPT_CLASS = {SAME: "same", OTHER: "other", UNKNOWN: "unknown"}


class ReportConfig(Settings):
    """What the report shows."""

    concepts: str | None = None
    """TOML file with tables [seed] and [pool] from labels to concepts (see report_facts.Concepts); without it, only
    equal labels are the same concept."""
    seeds_per_dataset: int = Field(default=8, ge=0, le=100)
    """Seeds of each dataset in the gallery, or half as many clusters; fewer where there are many datasets."""


def run(config: ReportConfig, output: str) -> None:
    """Write the report of the finished run in `output`. Raises InputError when a stage is not done."""
    path, fingerprint = paths.join(output, REPORT_NAME), _fingerprint(config, output)
    if _written_fingerprint(path) == fingerprint:
        progress.say("report: already done, nothing to do")
        return
    finished = facts.read_run(output, read_concepts(config))
    text = _write(_choose(config, finished), config, finished, fingerprint)
    file = paths.write_bytes(path, text.encode())
    progress.say(f"report: {path}, {file.bytes / 1e6:.1f} MB")


def print_summary(output: str) -> None:
    """Print the funnel, what each seed dataset brought and the share of the right concept, on standard output."""
    config = load(ReportConfig, paths.join(output, CONFIG_NAME), section="report")
    finished = facts.read_run(output, read_concepts(config))
    console = Console(markup=False, emoji=False, highlight=False)  # names are the user's, and no markup
    steps = facts.funnel(finished)
    console.print(_funnel_on_terminal(steps))
    console.print("\n" + next(step.note for step in steps if step.name == "accepted"))
    datasets = facts.datasets(finished)
    console.print(_datasets_on_terminal(datasets))
    console.print("\n" + _same_concept_rule(config, datasets))
    console.print(f"The report is {paths.join(output, REPORT_NAME)}", soft_wrap=True)


def read_concepts(config: ReportConfig) -> Concepts:
    """The concepts that the config names. Raises ConfigError when the file is missing or wrong."""
    if config.concepts is None:
        return Concepts()
    if not paths.exists(config.concepts):
        raise ConfigError(f"report.concepts: no file at '{config.concepts}'. Correct the path, or leave it out.")
    return load(Concepts, config.concepts)


def _fingerprint(config: ReportConfig, output: str) -> str:
    """Changes when anything does that the page is made from: the run, the concepts or this code."""
    files = [paths.join(output, stage, MANIFEST_NAME) for stage in STAGES]
    files += [paths.join(output, CONFIG_NAME)] + ([config.concepts] if config.concepts else [])
    files += [module for module in (__file__, markup.__file__, facts.__file__) if module]
    parts = [sha256_of_file(path) if paths.exists(path) else None for path in files]
    return hash_json([config.model_dump(mode="json"), *parts])


def _written_fingerprint(path: str) -> str | None:
    if not paths.exists(path):
        return None
    with paths.open_read(path) as file:
        return markup.read_fingerprint(file.read(1000).decode(errors="replace"))


# What is shown. Chosen first, so that only those pictures are read.


@dataclass(frozen=True)
class Choice:
    """Everything on the page that has a picture."""

    datasets: list[Dataset]
    gallery: dict[str, list[Retrieval]]  # by dataset
    groups: list[Group]
    holdout_matches: list[Match]
    bins: list[SimilarityBin]

    def image_ids(self, finished: FinishedRun) -> set[str]:
        """The images to read."""
        found = finished.retrieved["image_id"]
        retrievals = [retrieval for shown in self.gallery.values() for retrieval in shown]
        matches = [*self.holdout_matches, *(match for similarity in self.bins for match in similarity.examples)]
        return {
            *(seed for retrieval in retrievals for seed in retrieval.seeds),
            *(found[row].as_py() for retrieval in retrievals for row in retrieval.rows),
            *(member.image_id for group in self.groups for member in group.members),
            *(image_id for match in matches for image_id in (match.image_id, match.other_image_id)),
        }


def _choose(config: ReportConfig, finished: FinishedRun) -> Choice:
    datasets = facts.datasets(finished)
    asking = [dataset for dataset in datasets if dataset.retrieved][:GALLERY_DATASETS]
    gallery = {}
    for dataset in asking:
        by_cluster = dataset.by_cluster
        seeds, found = (SEEDS_PER_CLUSTER, FOUND_PER_CLUSTER) if by_cluster else (1, FOUND_PER_SEED)
        wanted = (config.seeds_per_dataset + 1) // 2 if by_cluster else config.seeds_per_dataset
        count = min(wanted, GALLERY_PICTURES // len(asking) // (seeds + found))
        gallery[dataset.name] = facts.gallery(finished, dataset, count, seeds, found)
    return Choice(
        datasets=datasets,
        gallery=gallery,
        groups=facts.groups(finished, GROUPS, MEMBERS_PER_GROUP),
        holdout_matches=facts.holdout_matches(finished, HOLDOUT_MATCHES),
        bins=facts.similarity_bins(finished, PAIRS_PER_BIN, PAIRS_IN_BINS),
    )


# The page


def _write(choice: Choice, config: ReportConfig, finished: FinishedRun, fingerprint: str) -> str:
    pictures = facts.read_pictures(finished, choice.image_ids(finished), THUMBNAIL_SIDE, MAX_PICTURE_BYTES)
    parts = [
        ("funnel", "The funnel", _funnel(finished)),
        ("rejects", "Rejected files", _rejects(finished)),
        ("datasets", "What each seed dataset brought", _datasets(choice, config)),
        ("gallery", "Seeds and what they retrieved", _gallery(choice, finished, pictures)),
        ("copies", "Groups of copies", _copies(choice, finished, pictures)),
        ("threshold", "Where a pair becomes a copy", _threshold(choice, finished, pictures)),
        ("labels", "From pool to corpus", _labels(finished)),
        ("run", "The run", _run(finished)),
    ]
    contents = tag("ol", *(tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in parts))
    sections = (markup.section(name, f"{number}. {title}", body) for number, (name, title, body) in enumerate(parts, 1))
    top = tag("header", tag("h1", TITLE), _abstract(finished), tag("nav", contents, aria_label="Contents"))
    return markup.page(TITLE, fingerprint, top, tag("main", *sections))


def _abstract(finished: FinishedRun) -> Markup:
    totals, counts = finished.composition, finished.composition["funnel"]
    numbers = [
        ("found in the sources", counts["ingested"]),
        ("kept, seeds and pool", counts["after_decontamination"]),
        ("retrieved from the pool", counts["retrieved"]),
        ("unique in the corpus", totals["total_unique"]),
        ("rows in the corpus", totals["total_rows"]),
    ]
    figures = (tag("div", tag("dt", words), tag("dd", _number(count))) for words, count in numbers)
    return tag("dl", *figures, class_="numbers")


def _funnel(finished: FinishedRun) -> Markup:
    steps = facts.funnel(finished)
    whole = max(steps[0].count, 1)
    widest = max(step.count for step in steps) or 1
    rows = [
        (
            tag("strong", step.name),
            markup.bar(
                (step.count / widest, "stays"),
                (step.lost / widest, "lost" if step.is_loss else "aside"),
                label=f"{step.name}: {step.count:,}",
            ),
            _number(step.count),
            f"{step.count / whole:.1%}",
            f"\N{MINUS SIGN}{step.lost:,}" if step.lost else "",
            step.note,
        )
        for step in steps
    ]
    sources = [
        (
            quoted(source.source),
            source.role,
            *map(_number, (source.rejected, source.exact, source.near, source.holdout, source.kept, source.in_corpus)),
        )
        for source in facts.by_source(finished)
    ]
    names = ("source", "role", "rejected", "exact copies", "near-duplicates", "of the holdout", "kept", "in the corpus")
    return join(
        markup.legend(("stays", "goes on"), ("lost", "dropped here"), ("aside", "set apart, or not asked for")),
        markup.table(("step", "", "images", "of all", "fewer by", ""), rows, numbers=frozenset({2, 3, 4})),
        tag("h3", "By source"),
        markup.table(names, sources, numbers=frozenset(range(2, 8))),
    )


def _rejects(finished: FinishedRun) -> Markup:
    found = facts.rejects(finished, REJECTS_PER_REASON)
    if not found:
        return tag("p", "No file was rejected.")
    ingested = finished.composition["funnel"]["ingested"]
    counts = [
        (
            quoted(reject.reason),
            markup.bar((reject.count / found[0].count, "lost"), label=f"{reject.reason}: {reject.count:,}"),
            _number(reject.count),
            f"{reject.count / ingested:.2%}",
        )
        for reject in found
    ]
    examples = [
        (quoted(row["reason"]), quoted(row["source"]), quoted(row["uri"]), quoted(row["detail"]))
        for reject in found
        for row in reject.examples
    ]
    return join(
        markup.table(("reason", "", "files", "of all"), counts, numbers=frozenset({2, 3})),
        tag("h3", f"The first {REJECTS_PER_REASON} of each reason"),
        markup.table(("reason", "source", "file", "detail"), examples),
    )


def _datasets(choice: Choice, config: ReportConfig) -> Markup:
    if not choice.datasets:
        return tag("p", "The config names no seed dataset.")
    rows = [
        (
            quoted(dataset.name),
            dataset.mode,
            _number(dataset.seeds),
            "yes" if dataset.as_is else "no",
            _number(dataset.retrieved),
            "" if dataset.cap is None else _number(dataset.cap),
            _number(dataset.rows),
            _number(dataset.unique),
            _share(dataset.same_concept),
            _share(dataset.chance),
            "" if dataset.mean_similarity is None else f"{dataset.mean_similarity:.3f}",
        )
        for dataset in choice.datasets
    ]
    names = ("dataset", "retrieval", "seeds", "taken as is", "retrieved", "cap", "rows", "unique images")
    shares = ("same concept", "by chance", "mean similarity")
    bars = [
        (
            quoted(dataset.name),
            markup.bar(
                (dataset.same_concept, "stays"), mark=dataset.chance, label=f"same concept: {dataset.same_concept:.1%}"
            ),
            f"{dataset.same_concept:.1%} of {dataset.compared:,}",
        )
        for dataset in choice.datasets
        if dataset.same_concept is not None
    ]
    return join(
        markup.table((*names, *shares), rows, numbers=frozenset({2, *range(4, 11)})),
        tag("h3", "The share of the right concept"),
        markup.table(("dataset", "", "retrieved rows"), bars, numbers=frozenset({2})) if bars else "",
        tag("p", "The mark on a bar is the share by chance.", class_="note") if bars else "",
        tag("p", _same_concept_rule(config, choice.datasets), class_="note"),
    )


def _same_concept_rule(config: ReportConfig, datasets: Sequence[Dataset]) -> str:
    if all(dataset.same_concept is None for dataset in datasets):
        return (
            "The share of the right concept is left out: it needs retrieved images, and labels of these and of their "
            "seeds."
        )
    source = (
        f"Concepts are those of {config.concepts}."
        if config.concepts
        else "No file of concepts is configured (report.concepts), so only equal labels are the same concept."
    )
    return (
        "Same concept: by sample, the share of retrieved rows whose image shows the concept of the seed that brought "
        "it; by cluster, the share whose image shows a concept of any of the dataset's seeds. By chance: what that "
        "share would be for images drawn from the kept pool at random. Images whose concept is unknown are not "
        f"counted. {source}"
    )


def _gallery(choice: Choice, finished: FinishedRun, pictures: Mapping[str, Picture]) -> Markup:
    if not choice.gallery:
        return tag("p", "Nothing was retrieved.")
    shown = [dataset for dataset in choice.datasets if dataset.name in choice.gallery]
    missing = sum(dataset.retrieved > 0 for dataset in choice.datasets) - len(shown)
    body: list[Markup] = []
    for dataset in shown:
        brought = (_retrieval(retrieval, finished, pictures) for retrieval in choice.gallery[dataset.name])
        body += [
            tag("h3", quoted(dataset.name)),
            tag("p", _in_words(dataset), class_="caption"),
            tag("div", *brought, class_="gallery"),
        ]
    return join(
        tag(
            "p",
            "Each seed, or some of a cluster's, and next to it the first of what it brought, with the similarity to "
            "the seed or to the cluster's centre. Seeds are a random few; clusters are those with the most seeds."
            + (f" {_count(missing, 'more dataset')} would not fit." if missing else ""),
        ),
        markup.legend(
            ("frame seed", "seed"),
            ("frame same", "same concept"),
            ("frame other", "another concept"),
            ("frame unknown", "concept unknown"),
        ),
        *body,
    )


def _in_words(dataset: Dataset) -> str:
    text = f"By {dataset.mode}, {_count(dataset.seeds, 'seed')} brought {_count(dataset.retrieved, 'row')}"
    return text if dataset.same_concept is None else f"{text}; {dataset.same_concept:.1%} show the same concept"


def _retrieval(retrieval: Retrieval, finished: FinishedRun, pictures: Mapping[str, Picture]) -> Markup:
    """Seeds, and to their right what they brought."""
    seeds = (_figure(pictures[seed], "seed", "seed") for seed in retrieval.seeds)
    found = [
        _figure(
            pictures[finished.retrieved["image_id"][row].as_py()],
            f"{finished.retrieved['similarity'][row].as_py():.2f}",
            _CONCEPT_CLASS[int(finished.same_concept[row])],
        )
        for row in retrieval.rows
    ]
    shown = tag("div", tag("div", *seeds, class_="strip"), tag("div", *found, class_="strip"), class_="brought")
    if retrieval.cluster_id is None:
        return shown
    counts = f"{_count(retrieval.num_seeds, 'seed')} in it, {_count(retrieval.num_rows, 'image')} brought"
    return tag("div", tag("p", f"Cluster {retrieval.cluster_id}: {counts}", class_="caption"), shown, class_="whole")


def _copies(choice: Choice, finished: FinishedRun, pictures: Mapping[str, Picture]) -> Markup:
    funnel = finished.composition["funnel"]
    exact = funnel["candidates"] - funnel["after_exact"]
    keeps_unlike_images = finished.manifests["dedup"].facts["guard_settings"]["matches_kept"]
    sizes = facts.component_sizes(finished)
    parts = [
        tag(
            "p",
            f"Dropped for having the bytes of another: {_count(exact, 'file')}. Images that look alike form groups: "
            f"{_count(sum(count for _, count in sizes), 'group')} of two or more unique images. Of each, the seeds are "
            "kept, or else the image with the most pixels"
            + (", and what is no copy of these." if keeps_unlike_images else "."),
        ),
        tag("h3", "Guards against chains of copies"),
        markup.table(("option", "what it is for", "what it did"), [_guard(guard) for guard in facts.guards(finished)]),
    ]
    if choice.groups:
        parts += [
            tag("h3", "Groups by size"),
            markup.columns([(size, count, "") for size, count in sizes]),
            tag("h3", "The largest groups"),
            tag(
                "p",
                "Below each is what became of it, and how similar it is to the image that it copies; indirect: joined "
                "to that image only by others.",
            ),
            markup.legend(("frame kept", "kept"), ("frame other", "dropped")),
        ]
    drawn = []
    for group in choice.groups:
        more = group.size - len(group.members)
        text = _count(group.size, "image") + (f", of which {len(group.members)} are shown" if more else "")
        shown = (
            _figure(pictures[member.image_id], _fate(member), "kept" if member.kept else "other")
            for member in group.members
        )
        drawn.append(tag("div", tag("p", text, class_="caption"), tag("div", *shown, class_="strip")))
    parts.append(tag("div", *drawn, class_="gallery"))
    parts.append(tag("h3", "Taken away by the holdout"))
    if not choice.holdout_matches:
        parts.append(tag("p", "No image of the seeds or of the pool matched one of the holdout."))
    else:
        text = "A random few: on the left the image that was dropped, on the right the holdout's that it matches."
        matches = (_pair(match, pictures, ("dropped", "holdout")) for match in choice.holdout_matches)
        parts += [tag("p", text), tag("div", *matches, class_="pairs")]
    return join(*parts)


def _guard(guard: Guard) -> tuple[Markup, str, str]:
    """One guard against chains in words."""
    counts = guard.counts or {}
    match guard.option:
        case "mutual_neighbors":
            words = "pairs join only where each is among the other's nearest"
            did = f"left out {_count(counts.get('pairs_left_out', 0), 'pair')}"
        case "families":
            words = "pairs of one family, such as road signs with other symbols, do not join"
            did = f"left out {_count(counts.get('pairs_left_out', 0), 'pair')}"
        case "max_component_size":
            words = "larger groups are joined again at a higher threshold"
            did = (
                f"split {_count(counts.get('components_split', 0), 'group')} of together "
                f"{_count(counts.get('images_in_them', 0), 'image')}; "
                f"{counts.get('components_still_larger', 0):,} still larger at similarity 1"
            )
        case "matches_kept":
            words = "an image goes only as a verified copy of one that stays"
            did = f"kept {_count(counts.get('images_kept', 0), 'image')} more than one a group"
        case _:
            assert guard.option == "holdout_cosine", guard.option
            words = "near descriptors match the holdout too"
            did = f"took away {_count(counts.get('images_taken', 0), 'image')} more"
    setting = f" = {guard.setting:g}" if isinstance(guard.setting, (int, float)) and guard.setting is not True else ""
    return (
        tag("code", guard.option + (setting if guard.counts is not None else "")),
        words,
        ("off" if guard.counts is None else did),
    )


def _fate(member: Member) -> str:
    """Why a member of a group was kept or dropped."""
    if member.kept:
        text = "kept"
    elif member.is_holdout:
        text = "in holdout"
    elif member.similarity is None:
        text = f"{member.reason}, indirect"
    else:
        text = f"{member.reason} {member.similarity:.2f}"
    return text + (f", {member.num_files} files" if member.num_files > 1 else "")


def _threshold(choice: Choice, finished: FinishedRun, pictures: Mapping[str, Picture]) -> Markup:
    total = sum(similarity.count for similarity in choice.bins)
    dedup_facts = finished.manifests["dedup"].facts
    threshold, holdout_threshold = dedup_facts["threshold"], dedup_facts["holdout_threshold"]
    text = (
        f"{_count(total, 'pair')} of images were found similar. From {threshold:g} on, two images are copies; from "
        f"{holdout_threshold:g} on, an image matches one of the holdout."
    )
    if not total:
        return tag("p", text)
    heights = [
        (f"{similarity.low:.2f}", similarity.count, _column_class(similarity, threshold, holdout_threshold))
        for similarity in choice.bins
    ]
    parts = [
        tag("p", text + " Below each column stands where it begins."),
        markup.columns(heights),
        markup.legend(
            ("copies", "copies"),
            ("no-copies", "no copies"),
            ("first", f"threshold, {threshold:g}"),
            ("first-holdout", f"threshold of the holdout, {holdout_threshold:g}"),
        ),
        tag("h3", "What other thresholds would do"),
        tag(
            "p",
            "Were all pairs from a threshold on joined, but for those that the guards leave out: the groups, and the "
            "images that would go if of each group only the seeds, or else one image, were kept. Set in bold: the "
            "threshold of this run. Where the largest group leaps, images are joined in chains.",
        ),
        _sweep(finished, threshold),
        tag("h3", "A random few of each, one of a group"),
    ]
    for similarity in reversed(choice.bins):
        if similarity.examples:
            label = f"{similarity.low:.2f} to {similarity.high:.2f}: {_count(similarity.count, 'pair')}"
            pairs = (_pair(match, pictures, ("", "")) for match in similarity.examples)
            parts += [tag("p", label, class_="caption"), tag("div", *pairs, class_="pairs")]
        if similarity.low == threshold:
            parts.append(tag("p", f"{threshold:g}: above are copies, below are none", class_="divider"))
        elif similarity.low == holdout_threshold:
            parts.append(
                tag("p", f"{holdout_threshold:g}: above are matches with the holdout", class_="divider holdout")
            )
    return join(*parts)


def _sweep(finished: FinishedRun, threshold: float) -> Markup:
    rows = [
        tuple(
            tag("strong", cell) if row.threshold == threshold else cell
            for cell in (
                f"{row.threshold:.2f}" if round(row.threshold, 2) == row.threshold else f"{row.threshold:g}",
                _number(row.pairs),
                _number(row.components_of_two_or_more),
                _number(row.dropped),
                _number(row.largest_component),
            )
        )
        for row in facts.threshold_sweep(finished)
    ]
    names = ("from", "pairs", "groups of two or more", "images that would go", "images in the largest group")
    return markup.table(names, rows, numbers=frozenset(range(5)))


def _column_class(similarity: SimilarityBin, threshold: float, holdout_threshold: float) -> str:
    side = "copies" if similarity.low >= threshold else "no-copies"
    if similarity.low == threshold:
        return f"{side} first"
    return f"{side} first-holdout" if similarity.low == holdout_threshold else side


def _labels(finished: FinishedRun) -> Markup:
    full, top = (facts.labels(finished, top_folder=top_folder) for top_folder in (False, True))
    if all(counts.label is None for counts in full):
        return tag("p", "No image of the pool has a label.")
    parts = [
        tag(
            "p",
            f"How often the {LABELS} most frequent labels of the pool occur among all its images, among those that "
            "were kept, and among those of the corpus. Seeds that were taken as they are do not count here.",
        ),
        markup.legend(("before", "pool"), ("between", "kept"), ("stays", "corpus")),
    ]
    if top != full:
        parts += [tag("h3", "By top folder"), _label_table(top)]
    parts += [tag("h3", "By label"), _label_table(full)]
    return join(*parts)


def _label_table(counts: Sequence[LabelCounts]) -> Markup:
    """Shares of the three sets by label, the labels beyond the first few together in one row."""
    sums = [max(sum(getattr(row, name) for row in counts), 1) for name in ("pool", "kept", "corpus")]

    def shares(rows: Iterable[LabelCounts]) -> list[float]:
        listed = [(row.pool, row.kept, row.corpus) for row in rows]
        return [sum(column) / whole for column, whole in zip(zip(*listed, strict=True), sums, strict=True)]

    shown = [
        (quoted(row.label) if row.label is not None else tag("em", "no label"), shares([row]))
        for row in counts[:LABELS]
    ]
    highest = max(share for _, values in shown for share in values)
    if len(counts) > LABELS:
        shown.append((tag("em", f"{len(counts) - LABELS:,} other labels"), shares(counts[LABELS:])))
    rows = [
        (
            words,
            _label_bars(values, highest) if index < LABELS else "",
            *(f"{share:.1%}" for share in values),
            f"{values[2] / values[0]:.2f}",
        )
        for index, (words, values) in enumerate(shown)
    ]
    return markup.table(("label", "", "pool", "kept", "corpus", "corpus / pool"), rows, numbers=frozenset({2, 3, 4, 5}))


def _label_bars(shares: Sequence[float], highest: float) -> Markup:
    sets = zip(shares, ("before", "between", "stays"), ("pool", "kept", "corpus"), strict=True)
    bars = (markup.bar((share / highest, kind), label=f"{name}: {share:.1%}") for share, kind, name in sets)
    return tag("div", *bars, class_="stack")


def _run(finished: FinishedRun) -> Markup:
    rows = [
        (
            stage,
            _number(len(manifest.shards)),
            f"{sum(file.bytes for shard in manifest.shards for file in shard.files) / 1e6:,.1f}",
            ", ".join(f"{clip(name)} {count:,}" for name, count in manifest.totals.items()),
        )
        for stage, manifest in finished.manifests.items()
    ]
    path = paths.join(finished.folder, CONFIG_NAME)
    if paths.exists(path):
        text = tag("pre", paths.read_bytes(path).decode())
        config = tag("details", tag("summary", f"The config, with every default ({CONFIG_NAME})"), text)
    else:
        config = tag("p", f"The stages were run one by one: there is no {CONFIG_NAME}.")
    return join(markup.table(("stage", "shards", "MB written", "totals"), rows, numbers=frozenset({1, 2})), config)


def _pair(match: Match, pictures: Mapping[str, Picture], words: tuple[str, str]) -> Markup:
    """Two pictures side by side with their similarity below."""
    both = (
        _figure(pictures[image_id], text, "")
        for image_id, text in zip((match.image_id, match.other_image_id), words, strict=True)
    )
    text = "indirect" if match.similarity is None else f"{match.similarity:.3f}"
    return tag("div", *both, tag("p", text), class_="pair")


def _figure(picture: Picture, caption: str, kind: str) -> Markup:
    """One picture; who points at it sees its label, its source and where it lies."""
    label = clip(picture.label or "no label")
    title = f"{label}\n{clip(picture.source)}, {picture.width} x {picture.height}\n{clip(picture.uri)}"
    data = base64.b64encode(picture.encoded).decode()
    image = tag("img", src=f"data:image/webp;base64,{data}", alt=f"{label}, of {clip(picture.source)}", title=title)
    return tag("figure", image, tag("figcaption", caption) if caption else "", class_=f"frame {kind}".strip())


def _number(count: int) -> str:
    return f"{count:,}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


# The terminal


def _funnel_on_terminal(steps: Sequence[Step]) -> Table:
    table = _table("Funnel", ("step",), ("images", "of all", "fewer by"))
    for step in steps:
        share = step.count / max(steps[0].count, 1)
        table.add_row(step.name, _number(step.count), f"{share:.1%}", _number(step.lost) if step.lost else "")
    return table


def _datasets_on_terminal(datasets: Sequence[Dataset]) -> Table:
    counts, shares = ("seeds", "retrieved", "rows", "unique"), ("same\nconcept", "by\nchance", "mean\ncosine")
    table = _table("What each seed dataset brought", ("dataset", "by"), (*counts, *shares))
    for dataset in datasets:
        numbers = (dataset.seeds, dataset.retrieved, dataset.rows, dataset.unique)
        similarity = "" if dataset.mean_similarity is None else f"{dataset.mean_similarity:.3f}"
        found = (_share(dataset.same_concept), _share(dataset.chance), similarity)
        table.add_row(clip(dataset.name), dataset.mode, *map(_number, numbers), *found)
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table whose names wrap where the terminal is narrow."""
    table = Table(title=f"\n{title}", title_justify="left", box=rich.box.SIMPLE, show_edge=False, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    return table
