"""The report on a finished run: counts, tables and thumbnails on one self-contained page.

    <run>/report.html

The page has no script and loads nothing. Its images are thumbnails that Seedbed decoded and encoded again. Its size is
bounded for any corpus: a fixed number of thumbnails, each of at most `MAX_THUMBNAIL_BYTES`. The same run gives the same
bytes. facts.py counts and chooses, this file writes the sentences, and markup.py makes the HTML.
"""

import base64
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import rich.box
from pydantic import Field
from rich.console import Console
from rich.table import Table

from curation.config import IsPath, Settings, load
from curation.copies import recall
from curation.copies.lookalikes import CROWDED
from curation.copies.recall import UnexpectedPair
from curation.engine import progress
from curation.engine.manifest import MANIFEST_NAME
from curation.errors import ConfigError
from curation.files import paths
from curation.files.hashes import hash_json, sha256_of_file
from curation.images import listing
from curation.ingest import PASSED_OVER
from curation.report import facts, markup
from curation.report.facts import (
    OTHER,
    SAME,
    UNKNOWN,
    Component,
    Concepts,
    Dataset,
    FinishedRun,
    FunnelStep,
    Guard,
    LabelCounts,
    Match,
    Member,
    Retrieval,
    SimilarityBin,
    Thumbnail,
)
from curation.report.markup import Markup, clip, join, quoted, tag
from curation.run_folder import STAGES

REPORT_NAME = "report.html"
CONFIG_NAME = "run.toml"
TITLE = "How this corpus was built"
# Pixels of a thumbnail's longest side. It is displayed with 92 CSS pixels, so that it is sharp on high-density screens.
THUMBNAIL_SIDE = 128
# With the limits below, a page has at most 798 thumbnails: 7.5 MB in base64.
MAX_THUMBNAIL_BYTES = 7_000
# The numbers of examples. Assumed: enough to judge a run, and few enough to look at all of them.
GALLERY_THUMBNAILS, GALLERY_DATASETS = 400, 32
RETRIEVED_PER_SEED = 6
SEEDS_PER_CLUSTER, RETRIEVED_PER_CLUSTER = 4, 8
COMPONENTS, MEMBERS_PER_COMPONENT = 12, 12
HOLDOUT_MATCHES = 15
PAIRS_PER_BIN, PAIRS_IN_BINS = 5, 100
UNEXPECTED_PAIRS = 12
REJECTS_PER_REASON = 3
LABELS = 25

_CONCEPT_CLASS = {SAME: "same", OTHER: "other", UNKNOWN: "unknown"}


class ReportConfig(Settings):
    """The contents of the report."""

    concepts: Annotated[str | None, IsPath] = None
    """TOML file with tables [seed] and [pool] from labels to concepts (see facts.Concepts). Without it, only equal
    labels are the same concept."""
    seeds_per_dataset: int = Field(default=8, ge=0, le=100)
    """Seeds of each dataset in the gallery, or half as many clusters; fewer if there are many datasets."""


def run(config: ReportConfig, output: str) -> None:
    """Write the report of the finished run in `output`. Raises InputError when a stage is not done."""
    path, fingerprint = paths.join(output, REPORT_NAME), _fingerprint(config, output)
    if _written_fingerprint(path) == fingerprint:
        progress.say("report: already done, nothing to do")
        return
    with progress.step("report", "reading the stages") as change:
        finished = facts.read_run(output, read_concepts(config))
        change("choosing the examples")
        choice = _choose(config, finished)
        change("writing the page")
        text = _write(choice, config, finished, fingerprint)
        file = paths.write_bytes(path, text.encode())
    progress.say(f"report: {path}, {file.bytes / 1e6:.1f} MB")


def print_summary(output: str) -> None:
    """Print the funnel, the retrieval by seed dataset and the commands to go on with, on standard output."""
    config = load(ReportConfig, paths.join(output, CONFIG_NAME), section="report")
    finished = facts.read_run(output, read_concepts(config))
    console = Console(markup=False, emoji=False, highlight=False)  # the user's names are not markup
    steps = facts.funnel(finished)
    if (sample := facts.sample_text(finished)) is not None:
        console.print(sample)
    for line in facts.corpus_check_text(finished):
        console.print(line)
    if finished.self_check is not None:
        console.print(facts.self_check_summary(finished.self_check))
    console.print(_funnel_on_terminal(steps))
    console.print("\n" + next(step.note for step in steps if step.name == "accepted"))
    datasets = facts.datasets(finished)
    console.print(_datasets_on_terminal(datasets))
    console.print("\nAn image that several seeds retrieve is a hit for each of them.")
    if _has_concepts(datasets):
        console.print(_same_concept_rule(config, datasets))
    for line in _next_steps(output):
        console.print(line, soft_wrap=True)


def _next_steps(output: str) -> tuple[str, str]:
    """What to do with a finished run. A shell takes the command as it stands: paths are quoted."""
    if shutil.which("seedbed"):
        train = "seedbed train"
    else:  # the environment is not activated
        python = sys.executable
        is_here = os.path.commonpath([python, os.getcwd()]) == os.getcwd()
        train = f"{shlex.quote(os.path.relpath(python) if is_here else python)} -m pipelines.train"
    corpus = shlex.quote(f"data.path={paths.join(output, 'corpus')}")
    trained = shlex.quote(output.rstrip("/") + "-train" if paths.is_local(output) else "runs/train")
    return (
        f"\nLook at the corpus: {shlex.quote(paths.join(output, REPORT_NAME))}",
        f"Train on it:        {train} --set {corpus} --output {trained}",
    )


def read_concepts(config: ReportConfig) -> Concepts:
    """The concepts in the file that the config names. Raises ConfigError when the file is missing or invalid."""
    if config.concepts is None:
        return Concepts()
    if not paths.exists(config.concepts):
        raise ConfigError(f"report.concepts: no file at '{config.concepts}'. Correct the path, or leave it out.")
    return load(Concepts, config.concepts)


def _fingerprint(config: ReportConfig, output: str) -> str:
    """A hash of all inputs of the page: the run, the concepts, the config and this code."""
    files = [paths.join(output, stage, MANIFEST_NAME) for stage in STAGES]
    files += [paths.join(output, CONFIG_NAME)] + ([config.concepts] if config.concepts else [])
    files += [module for module in (__file__, markup.__file__, facts.__file__, recall.__file__) if module]
    parts = [sha256_of_file(path) if paths.exists(path) else None for path in files]
    return hash_json([config.model_dump(mode="json"), *parts])


def _written_fingerprint(path: str) -> str | None:
    if not paths.exists(path):
        return None
    text = paths.read_bytes(path).decode(errors="replace")
    return markup.read_fingerprint(text[:1000]) if text.rstrip().endswith("</html>") else None


# The examples. They are chosen first, so that only their thumbnails are read.


@dataclass(frozen=True)
class Choice:
    """The examples of the page."""

    datasets: list[Dataset]
    gallery: dict[str, list[Retrieval]]  # by dataset
    components: list[Component]
    holdout_matches: list[Match]
    bins: list[SimilarityBin]
    unexpected_pairs: list[UnexpectedPair]

    def image_ids(self, finished: FinishedRun) -> set[str]:
        """The images whose thumbnails the page shows."""
        retrieved_ids = finished.retrieved["image_id"]
        retrievals = [retrieval for shown in self.gallery.values() for retrieval in shown]
        matches = [*self.holdout_matches, *(match for similarity in self.bins for match in similarity.examples)]
        return {
            *(seed for retrieval in retrievals for seed in retrieval.seeds),
            *(retrieved_ids[row].as_py() for retrieval in retrievals for row in retrieval.rows),
            *(member.image_id for component in self.components for member in component.members),
            *(image_id for match in matches for image_id in (match.image_id, match.other_image_id)),
            *(image_id for pair in self.unexpected_pairs for image_id in (pair.image_id, pair.other_image_id)),
        }


def _choose(config: ReportConfig, finished: FinishedRun) -> Choice:
    datasets = facts.datasets(finished)
    gallery_datasets = [dataset for dataset in datasets if dataset.retrieved][:GALLERY_DATASETS]
    gallery = {}
    for dataset in gallery_datasets:
        if dataset.by_cluster:
            num_seeds, num_retrieved = SEEDS_PER_CLUSTER, RETRIEVED_PER_CLUSTER
            num_retrievals = (config.seeds_per_dataset + 1) // 2
        else:
            num_seeds, num_retrieved = 1, RETRIEVED_PER_SEED
            num_retrievals = config.seeds_per_dataset
        max_retrievals = GALLERY_THUMBNAILS // len(gallery_datasets) // (num_seeds + num_retrieved)
        num_retrievals = min(num_retrievals, max_retrievals)
        gallery[dataset.name] = facts.gallery(finished, dataset, num_retrievals, num_seeds, num_retrieved)
    return Choice(
        datasets=datasets,
        gallery=gallery,
        components=facts.largest_components(finished, COMPONENTS, MEMBERS_PER_COMPONENT),
        holdout_matches=facts.holdout_matches(finished, HOLDOUT_MATCHES),
        bins=facts.similarity_bins(finished, PAIRS_PER_BIN, PAIRS_IN_BINS),
        unexpected_pairs=finished.self_check.unexpected_pairs[:UNEXPECTED_PAIRS] if finished.self_check else [],
    )


# The page


def _write(choice: Choice, config: ReportConfig, finished: FinishedRun, fingerprint: str) -> str:
    thumbnails = facts.read_thumbnails(finished, choice.image_ids(finished), THUMBNAIL_SIDE, MAX_THUMBNAIL_BYTES)
    parts = [
        ("funnel", "Funnel", _funnel(finished)),
        ("rejects", "Rejected files", join(_rejects(finished), _passed_over(finished))),
        ("datasets", "Retrieval by seed dataset", _datasets(choice, config, finished)),
        ("gallery", "Seeds and their retrieved images", _gallery(choice, finished, thumbnails)),
        ("copies", "Components of copies", _copies(choice, finished, thumbnails)),
        ("self-check", "Copies made of this pool", _self_check(choice, finished, thumbnails)),
        ("threshold", "Copy threshold", _threshold(choice, finished, thumbnails)),
        ("labels", "Labels from pool to corpus", _labels(finished)),
        ("run", "Run", _run(finished)),
    ]
    contents = tag("ol", *(tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in parts))
    sections = (markup.section(name, f"{number}. {title}", body) for number, (name, title, body) in enumerate(parts, 1))
    top = tag("header", tag("h1", TITLE), _abstract(finished), tag("nav", contents, aria_label="Contents"))
    return markup.page(TITLE, fingerprint, top, tag("main", *sections))


def _abstract(finished: FinishedRun) -> Markup:
    totals, counts = finished.composition, finished.composition["funnel"]
    numbers = [
        ("found in the sources", counts["ingested"]),
        ("kept seeds and pool images", counts["after_decontamination"]),
        ("retrieved from the pool", counts["retrieved"]),
        ("unique images in the corpus", totals["total_unique"]),
        ("rows in the corpus", totals["total_rows"]),
    ]
    figures = (tag("div", tag("dt", name), tag("dd", _number(count))) for name, count in numbers)
    sample = facts.sample_text(finished)
    return join(
        tag("dl", *figures, class_="numbers"),
        *(tag("p", line) for line in facts.corpus_check_text(finished)),
        *(tag("p", line) for line in facts.self_check_text(finished)),
        tag("p", sample) if sample else join(),
    )


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
    columns = {
        "rejected": "rejected",
        "accepted": "accepted",
        "exact": "exact copies",
        "near": "near-duplicates",
        "holdout": "holdout matches",
        "kept": "kept",
        "in_corpus": "in the corpus",
    }
    sources = [
        (quoted(source.source), source.role, *(_number(getattr(source, name)) for name in columns))
        for source in facts.by_source(finished)
    ]
    return join(
        markup.legend(("stays", "remaining"), ("lost", "dropped"), ("aside", "holdout, or not retrieved")),
        markup.table(("step", "", "images", "of all", "change", ""), rows, numbers=frozenset({2, 3, 4})),
        tag("h3", "By source"),
        markup.table(("source", "role", *columns.values()), sources, numbers=frozenset(range(2, 9))),
    )


def _rejects(finished: FinishedRun) -> Markup:
    rejects = facts.rejects(finished, REJECTS_PER_REASON)
    if not rejects:
        return tag("p", "No file was rejected.")
    ingested = finished.composition["funnel"]["ingested"]
    counts = [
        (
            quoted(reject.reason),
            markup.bar((reject.count / rejects[0].count, "lost"), label=f"{reject.reason}: {reject.count:,}"),
            _number(reject.count),
            f"{reject.count / ingested:.2%}",
        )
        for reject in rejects
    ]
    examples = [
        (quoted(row["reason"]), quoted(row["source"]), quoted(row["uri"]), quoted(row["detail"]))
        for reject in rejects
        for row in reject.examples
    ]
    num_of_holdout = facts.rejected_holdout(finished)
    text = f"{num_of_holdout:,} of them belong to the holdout. Copies of their images in the pool are not recognised."
    return join(
        markup.table(("reason", "", "files", "of all"), counts, numbers=frozenset({2, 3})),
        tag("p", text) if num_of_holdout else join(),
        tag("h3", f"The first {REJECTS_PER_REASON} files of each reason"),
        markup.table(("reason", "source", "file", "detail"), examples),
    )


def _passed_over(finished: FinishedRun) -> Markup:
    rows = [(quoted(source), listing.in_words(counts)) for source, counts in facts.passed_over(finished).items()]
    if not rows:
        return join()
    return join(
        tag("h3", "Passed over"),
        tag("p", "Files and members of tars that are no images, by the ending of their name.", class_="caption"),
        markup.table(("source", "files"), rows),
    )


def _datasets(choice: Choice, config: ReportConfig, finished: FinishedRun) -> Markup:
    if not choice.datasets:
        return tag("p", "The config names no seed dataset.")
    has_concepts = _has_concepts(choice.datasets)
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
            *((_share(dataset.same_concept), _share(dataset.chance)) if has_concepts else ()),
            "" if dataset.mean_similarity is None else f"{dataset.mean_similarity:.3f}",
        )
        for dataset in choice.datasets
    ]
    names = ("dataset", "retrieval", "seeds", "included as is", "retrieved", "cap", "rows", "unique images")
    shares = (*(("same concept", "by chance") if has_concepts else ()), "mean similarity")
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
        *(tag("p", note) for note in finished.manifests["retrieve"].facts["notes"]),
        tag("h3", "Share with the same concept") if bars else "",
        markup.table(("dataset", "", "retrieved rows"), bars, numbers=frozenset({2})) if bars else "",
        tag("p", "The line on a bar marks the share by chance.", class_="note") if bars else "",
        tag("p", _same_concept_rule(config, choice.datasets), class_="note"),
    )


def _same_concept_rule(config: ReportConfig, datasets: Sequence[Dataset]) -> str:
    if all(dataset.same_concept is None for dataset in datasets):
        return (
            "The share with the same concept is left out, because it needs retrieved images with labels, and labels of "
            "their seeds."
        )
    source = (
        f"The concepts come from {config.concepts}."
        if config.concepts
        else "The config names no file of concepts (report.concepts), so only equal labels are the same concept."
    )
    return (
        "Same concept, by sample: the share of retrieved rows whose image has the concept of its seed. By cluster: the "
        "share of retrieved rows whose image has the concept of any seed of the dataset. By chance: the expected share "
        "for images drawn from the kept pool at random. Images with an unknown concept are not counted. "
        f"{source}"
    )


def _gallery(choice: Choice, finished: FinishedRun, thumbnails: Mapping[str, Thumbnail]) -> Markup:
    if not choice.gallery:
        return tag("p", "Nothing was retrieved.")
    shown = [dataset for dataset in choice.datasets if dataset.name in choice.gallery]
    missing = sum(dataset.retrieved > 0 for dataset in choice.datasets) - len(shown)
    body: list[Markup] = []
    for dataset in shown:
        kinds = _CONCEPT_CLASS if _has_concepts(choice.datasets) else {}
        retrievals = (_retrieval(retrieval, finished, thumbnails, kinds) for retrieval in choice.gallery[dataset.name])
        body += [
            tag("h3", quoted(dataset.name)),
            tag("p", _dataset_caption(dataset), class_="caption"),
            tag("div", *retrievals, class_="gallery"),
        ]
    return join(
        tag(
            "p",
            "On the left a seed, or some seeds of a cluster. On the right the first images that it retrieved, with "
            "their similarity to the seed or to the cluster's centroid. The seeds are chosen at random; the clusters "
            "are those with the most seeds."
            + (f" {_count(missing, 'more dataset')} did not fit on the page." if missing else ""),
        ),
        markup.legend(
            ("frame seed", "seed"),
            ("frame same", "same concept"),
            ("frame other", "another concept"),
            ("frame unknown", "concept unknown"),
        )
        if _has_concepts(choice.datasets)
        else "",
        *body,
    )


def _dataset_caption(dataset: Dataset) -> str:
    text = f"By {dataset.mode}, {_count(dataset.seeds, 'seed')} retrieved {_count(dataset.retrieved, 'row')}"
    return text if dataset.same_concept is None else f"{text}; {dataset.same_concept:.1%} have the same concept"


def _has_concepts(datasets: Sequence[Dataset]) -> bool:
    """Whether the concept of any retrieved image can be compared with that of a seed."""
    return any(dataset.same_concept is not None for dataset in datasets)


def _retrieval(
    retrieval: Retrieval, finished: FinishedRun, thumbnails: Mapping[str, Thumbnail], kinds: Mapping[int, str]
) -> Markup:
    """Seeds on the left, their retrieved images on the right. kinds: the CSS classes of the concepts."""
    seeds = (_figure(thumbnails[seed], "seed", "seed") for seed in retrieval.seeds)
    retrieved = [
        _figure(
            thumbnails[finished.retrieved["image_id"][row].as_py()],
            f"{finished.retrieved['similarity'][row].as_py():.2f}",
            kinds.get(int(finished.same_concept[row]), ""),
        )
        for row in retrieval.rows
    ]
    shown = tag("div", tag("div", *seeds, class_="strip"), tag("div", *retrieved, class_="strip"), class_="retrieval")
    if retrieval.cluster_id is None:
        return shown
    counts = f"{_count(retrieval.num_seeds, 'seed')}, {_count(retrieval.num_rows, 'image')} retrieved"
    return tag("div", tag("p", f"Cluster {retrieval.cluster_id}: {counts}", class_="caption"), shown, class_="whole")


def _copies(choice: Choice, finished: FinishedRun, thumbnails: Mapping[str, Thumbnail]) -> Markup:
    funnel = finished.composition["funnel"]
    exact = funnel["candidates"] - funnel["after_exact"]
    keeps_other_members = finished.manifests["dedup"].facts["guard_settings"]["matches_kept"]
    sizes = facts.component_sizes(finished)
    num_components = sum(count for _, count in sizes)
    parts = [
        tag(
            "p",
            f"{_count(exact, 'file')} had the bytes of another file and {'was' if exact == 1 else 'were'} dropped. "
            "Images that are connected by copy pairs form a component: there "
            f"{'is' if num_components == 1 else 'are'} {_count(num_components, 'component')} of two or more unique "
            "images. In each component the seeds are kept or, without a seed, the image of highest priority, mostly "
            "the unedited one."
            + (" Members that are not copies of a kept image are kept too." if keeps_other_members else ""),
        ),
        tag("p", _label_conflicts(finished.manifests["dedup"].facts["label_conflicts"])),
        *(tag("p", _lookalikes(alike)) for alike in finished.manifests["dedup"].facts["lookalikes"]),
        tag("p", _full_lists(finished.manifests["pairs"].facts["full_lists"])),
        tag("h3", "Guards against chains of copies"),
        markup.table(("option", "purpose", "effect"), [_guard(guard) for guard in facts.guards(finished)]),
    ]
    if choice.components:
        parts += [
            tag("h3", "Components by size"),
            markup.columns([(size, count, "") for size, count in sizes]),
            tag("h3", "The largest components"),
            tag(
                "p",
                "Each caption gives the decision on the image and its similarity to the matched image. Indirect: only "
                "other images connect it with the kept image.",
            ),
            markup.legend(("frame kept", "kept"), ("frame other", "dropped")),
        ]
    drawn = []
    for component in choice.components:
        num_shown = len(component.members)
        text = _count(component.size, "image") + (f", {num_shown} of them shown" if num_shown < component.size else "")
        shown = (
            _figure(thumbnails[member.image_id], _member_caption(member), "kept" if member.kept else "other")
            for member in component.members
        )
        drawn.append(tag("div", tag("p", text, class_="caption"), tag("div", *shown, class_="strip")))
    parts.append(tag("div", *drawn, class_="gallery"))
    parts.append(tag("h3", "Dropped because of the holdout"))
    if not choice.holdout_matches:
        parts.append(tag("p", "No seed and no pool image matched an image of the holdout."))
    else:
        text = "Random examples: on the left the dropped image, on the right the holdout image that it matches."
        matches = (_pair(match, thumbnails, ("dropped", "holdout")) for match in choice.holdout_matches)
        parts += [tag("p", text), tag("div", *matches, class_="pairs")]
    return join(*parts)


def _label_conflicts(conflicts: Mapping[str, Any]) -> Markup:
    """The images that come with several labels; each is one image, with the label of its first row."""
    if not conflicts["images"]:
        return tag("span", "No image comes with several labels.")
    more = ", ..." if conflicts["images"] > len(conflicts["examples"]) else ""
    return join(
        f"{_count(conflicts['images'], 'image')} came several times with equal bytes and several labels; each is one "
        "image, with the label of its first row: ",
        tag("code", ", ".join(conflicts["examples"]) + more),
    )


def _lookalikes(alike: Mapping[str, Any]) -> Markup:
    """The effect of `dedup.lookalikes = "exact"` on one source."""
    return join(
        f"Images of {clip(alike['source'])} look alike: {_share(alike['crowded'] / alike['images'])} of "
        f"{_count(alike['images'], 'image')} have {CROWDED} or more neighbours at the threshold. None was dropped as a "
        f"near-copy; {_count(alike['holdout_matches'], 'image')} matched the holdout and "
        f"{'was' if alike['holdout_matches'] == 1 else 'were'} dropped."
    )


def _full_lists(count: int) -> str:
    """The number of images with a full list of neighbours, and the consequence."""
    if not count:
        return "No image had a full list of neighbours."
    return (
        f"{_count(count, 'image')} had a full list of neighbours: pairs with more seeds and pool images may be "
        "missing. Their pairs with the holdout were searched without a limit."
    )


def _guard(guard: Guard) -> tuple[Markup, str, str]:
    """The option, the purpose and the effect of one guard against chains."""
    counts = guard.counts or {}
    match guard.option:
        case "mutual_neighbors":
            purpose = "a pair connects two images only if each is among the nearest neighbours of the other"
            effect = f"left out {_count(counts.get('pairs_left_out', 0), 'pair')}"
        case "families":
            purpose = "a pair does not connect images of one family, such as road signs with other symbols"
            effect = f"left out {_count(counts.get('pairs_left_out', 0), 'pair')}"
        case "label_guard":
            purpose = "an image is not dropped for a seed or pool image of another label"
            effect = f"left out {_count(counts.get('pairs_left_out', 0), 'pair')}"
        case "lookalikes":
            purpose = "near-copies are not dropped in sources whose images look alike"
            effect = f"left out {_count(counts.get('pairs_left_out', 0), 'pair')}"
        case "max_component_size":
            purpose = "larger components are split by a higher threshold"
            effect = (
                f"split {_count(counts.get('components_split', 0), 'component')} with "
                f"{_count(counts.get('images_in_them', 0), 'image')} in all; "
                f"{counts.get('components_still_larger', 0):,} still larger at similarity 1"
            )
        case "matches_kept":
            purpose = "an image is dropped only as a verified copy of a kept image"
            effect = f"kept {_count(counts.get('images_kept', 0), 'more image')}"
        case _:
            assert guard.option == "holdout_cosine", guard.option
            purpose = "an image with a descriptor near that of a holdout image matches it too"
            effect = f"dropped {_count(counts.get('images_taken', 0), 'more image')}"
    setting = f" = {guard.setting:g}" if isinstance(guard.setting, (int, float)) and guard.setting is not True else ""
    return (
        tag("code", guard.option + (setting if guard.counts is not None else "")),
        purpose,
        ("off" if guard.counts is None else effect),
    )


def _member_caption(member: Member) -> str:
    """The decision on a member of a component, and its reason."""
    if member.kept:
        text = "kept"
    elif member.is_holdout:
        text = "in holdout"
    elif member.similarity is None:
        text = f"{member.reason}, indirect"
    else:
        text = f"{member.reason} {member.similarity:.2f}"
    return text + (f", {member.num_files} files" if member.num_files > 1 else "")


def _self_check(choice: Choice, finished: FinishedRun, thumbnails: Mapping[str, Thumbnail]) -> Markup:
    result = finished.self_check
    if result is None:
        return tag("p", facts.self_check_text(finished)[0])
    text = (
        f"The run edited {_count(result.num_images, 'pool image')} and compared the copies with all images, as it "
        f"compares the pool. A copy is recognised when its original is a candidate, and their similarity is at least "
        f"{result.threshold:g}. The interval is that of Wilson at 95%. The copies are not in the corpus."
    )
    families = (
        " The guard families may leave out pairs of recognised copies; it is not part of this measurement."
        if finished.manifests["dedup"].facts["guards"].get("families")
        else ""
    )
    rows = [
        (
            facts.kind_name(each.kind),
            markup.bar(
                (each.found.value, "stays"), label=f"{facts.kind_name(each.kind)}: {each.found.count} recognised"
            ),
            f"{each.found.value:.2f}",
            "{:.2f} to {:.2f}".format(*each.found.interval),
            _number(each.found.whole),
            f"{each.proposed.value:.2f}",
            f"{each.found_for_holdout.value:.2f}",
        )
        for each in result.kinds
    ]
    header = ("edit", "", "recognised", "interval", "copies", "original is a candidate", "at the holdout threshold")
    parts = [
        tag("p", text + families),
        markup.table(header, rows, numbers=frozenset(range(2, 7))),
        *(tag("p", line) for line in facts.better_threshold_text(result)),
        tag("h3", "Unexpected pairs"),
    ]
    candidates = _count(result.unexpected.whole, "candidate")
    if not choice.unexpected_pairs:
        text = "No copy reaches the threshold with another image than its original and the known copies of that"
        parts.append(tag("p", f"{text} ({candidates})."))
    else:
        unexpected = (
            f"{_count(result.unexpected.count, 'pair')} of {candidates}: a copy reaches the threshold with another "
            "image than its original, and the run does not call that image a copy of the original. Each is a false "
            "match, or a copy in the pool that the run missed. Below is the most similar pair of each edited image, "
            "with that image on the left."
        )
        parts.append(tag("p", unexpected))
        pairs = (
            _pair(
                Match(pair.image_id, pair.other_image_id, pair.similarity),
                thumbnails,
                (facts.kind_name(pair.kind), "matched"),
            )
            for pair in choice.unexpected_pairs
        )
        parts.append(tag("div", *pairs, class_="pairs"))
    return join(*parts)


def _threshold(choice: Choice, finished: FinishedRun, thumbnails: Mapping[str, Thumbnail]) -> Markup:
    total = sum(similarity.count for similarity in choice.bins)
    dedup_facts = finished.manifests["dedup"].facts
    threshold, holdout_threshold = dedup_facts["threshold"], dedup_facts["holdout_threshold"]
    text = (
        f"The pairs stage found {_count(total, 'pair')} of similar images. Two images with a similarity of at least "
        f"{threshold:g} are copies. An image with a similarity of at least {holdout_threshold:g} to a holdout image "
        "matches it."
    )
    if not total:
        return tag("p", text)
    heights = [
        (f"{similarity.low:.2f}", similarity.count, _column_class(similarity, threshold, holdout_threshold))
        for similarity in choice.bins
    ]
    parts = [
        tag("p", text + " The number below a column is the lowest similarity in it."),
        markup.columns(heights),
        markup.legend(
            ("copies", "copies"),
            ("no-copies", "not copies"),
            ("first", f"copy threshold, {threshold:g}"),
            ("first-holdout", f"holdout threshold, {holdout_threshold:g}"),
        ),
        tag("h3", "Effect of other thresholds"),
        tag(
            "p",
            "Each row assumes that all pairs at or above its threshold connect images, except pairs that the guards "
            "leave out, and that each component keeps only its seeds or, without a seed, one image. Bold: the "
            "threshold of this run. A jump in the largest component indicates chaining.",
        ),
        _sweep(finished, threshold),
        tag("h3", "Random pairs of each range, one per component"),
    ]
    for similarity in reversed(choice.bins):
        if similarity.examples:
            label = f"{similarity.low:.2f} to {similarity.high:.2f}: {_count(similarity.count, 'pair')}"
            pairs = (_pair(match, thumbnails, ("", "")) for match in similarity.examples)
            parts += [tag("p", label, class_="caption"), tag("div", *pairs, class_="pairs")]
        if similarity.low == threshold:
            parts.append(tag("p", f"{threshold:g}: copies above, not copies below", class_="divider"))
        elif similarity.low == holdout_threshold:
            parts.append(tag("p", f"{holdout_threshold:g}: matches of the holdout above", class_="divider holdout"))
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
    names = ("threshold", "pairs", "components of two or more", "images dropped", "images in the largest component")
    return markup.table(names, rows, numbers=frozenset(range(5)))


def _column_class(similarity: SimilarityBin, threshold: float, holdout_threshold: float) -> str:
    side = "copies" if similarity.low >= threshold else "no-copies"
    if similarity.low == threshold:
        return f"{side} first"
    return f"{side} first-holdout" if similarity.low == holdout_threshold else side


def _labels(finished: FinishedRun) -> Markup:
    full, top = (facts.labels(finished, top_folder=top_folder) for top_folder in (False, True))
    if all(counts.label is None for counts in full):
        return tag("p", "No pool image has a label.")
    parts = [
        tag(
            "p",
            f"The {LABELS} most frequent labels of the pool: their share of all pool images, of the kept pool images, "
            "and of the pool images in the corpus. Seeds that are included as is do not count.",
        ),
        markup.legend(("before", "pool"), ("between", "kept"), ("stays", "corpus")),
    ]
    if top != full:
        parts += [tag("h3", "By top folder"), _label_table(top)]
    parts += [tag("h3", "By label"), _label_table(full)]
    return join(*parts)


def _label_table(counts: Sequence[LabelCounts]) -> Markup:
    """The share of each label in the three sets. The labels after the first `LABELS` share one row."""
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
            name,
            _label_bars(values, highest) if index < LABELS else "",
            *(f"{share:.1%}" for share in values),
            f"{values[2] / values[0]:.2f}",
        )
        for index, (name, values) in enumerate(shown)
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
            _number(manifest.plan.num_shards),
            f"{sum(file.bytes for shard in manifest.shards for file in shard.files) / 1e6:,.1f}",
            ", ".join(
                f"{clip(name)} {count:,}"
                for name, count in manifest.totals.items()
                if not name.startswith(PASSED_OVER)  # section 2 lists them
            ),
        )
        for stage, manifest in finished.manifests.items()
    ]
    path = paths.join(finished.folder, CONFIG_NAME)
    if paths.exists(path):
        text = tag("pre", paths.read_bytes(path).decode())
        config = tag("details", tag("summary", f"The resolved config ({CONFIG_NAME})"), text)
    else:
        config = tag("p", f"There is no {CONFIG_NAME}, because the stages were run one by one.")
    return join(markup.table(("stage", "shards", "MB written", "totals"), rows, numbers=frozenset({1, 2})), config)


def _pair(match: Match, thumbnails: Mapping[str, Thumbnail], captions: tuple[str, str]) -> Markup:
    """Two thumbnails side by side, and their similarity below."""
    both = (
        _figure(thumbnails[image_id], caption, "")
        for image_id, caption in zip((match.image_id, match.other_image_id), captions, strict=True)
    )
    text = "indirect" if match.similarity is None else f"{match.similarity:.3f}"
    return tag("div", *both, tag("p", text), class_="pair")


def _figure(thumbnail: Thumbnail, caption: str, kind: str) -> Markup:
    """One thumbnail. Its tooltip gives its label, source, size and uri."""
    label = clip(thumbnail.label or "no label")
    title = f"{label}\n{clip(thumbnail.source)}, {thumbnail.width} x {thumbnail.height}\n{clip(thumbnail.uri)}"
    data = base64.b64encode(thumbnail.webp).decode()
    image = tag("img", src=f"data:image/webp;base64,{data}", alt=f"{label}, of {clip(thumbnail.source)}", title=title)
    return tag("figure", image, tag("figcaption", caption) if caption else "", class_=f"frame {kind}".strip())


def _number(count: int) -> str:
    return f"{count:,}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


# The terminal


def _funnel_on_terminal(steps: Sequence[FunnelStep]) -> Table:
    table = _table("Funnel", ("step",), ("images", "of all", "fewer by"))
    for step in steps:
        share = step.count / max(steps[0].count, 1)
        table.add_row(step.name, _number(step.count), f"{share:.1%}", _number(step.lost) if step.lost else "")
    return table


def _datasets_on_terminal(datasets: Sequence[Dataset]) -> Table:
    """Rows of retrieval are hits: an image that several seeds retrieve counts for each. The last count is of images."""
    has_concepts = _has_concepts(datasets)
    shares = (*(("same\nconcept", "by\nchance") if has_concepts else ()), "mean\ncosine")
    table = _table("Retrieval by seed dataset", ("dataset", "by"), ("seeds", "hits", "images\nin corpus", *shares))
    for dataset in datasets:
        numbers = (dataset.seeds, dataset.retrieved, dataset.unique)
        similarity = "" if dataset.mean_similarity is None else f"{dataset.mean_similarity:.3f}"
        concepts = (_share(dataset.same_concept), _share(dataset.chance)) if has_concepts else ()
        table.add_row(clip(dataset.name), dataset.mode, *map(_number, numbers), *concepts, similarity)
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table. Its text columns wrap in a narrow terminal."""
    table = Table(title=f"\n{title}", title_justify="left", box=rich.box.SIMPLE, show_edge=False, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    return table
