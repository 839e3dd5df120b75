"""The report agrees with the run, and untrusted names have no effect in it."""

import base64
import html.parser
import io
import itertools
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tomli_w
from PIL import Image

from curation.copies.edits import KINDS
from curation.dedup import DedupConfig, FamilyConfig
from curation.errors import ConfigError, InputError
from curation.files import paths, schemas
from curation.report import facts, markup, page
from curation.report.facts import Concepts
from curation.report.page import ReportConfig
from curation.retrieve import DatasetConfig
from tests.curation.builders import write_stage
from tests.curation.report.small_runs import BLUE, RED, build_run, write_image

# An untrusted name, as a crawl may contain. The name of a folder is a label.
HOSTILE = "\"><img src=x onerror=alert(1)><script>alert('1')<"
SECTIONS = ["funnel", "rejects", "datasets", "gallery", "copies", "self-check", "threshold", "labels", "run"]
# All tags and attributes that the page may have.
TAGS = set(
    "html head meta title style body header main section nav h1 h2 h3 p a ol li dl div dt dd span i em strong code "
    "table thead tbody tr th td figure img figcaption details summary pre".split()
)
ATTRIBUTES = set(
    "alt aria-label aria-labelledby charset class content dir href http-equiv id lang name role scope src style "
    "tabindex title".split()
)


class Page(html.parser.HTMLParser):
    """The parsed page: tags, attributes, text and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.images: list[dict[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += attributes.items()
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self) -> list[str]:
        return [value for name, value in self.attributes if name == "id"]


CONCEPTS = Concepts(
    seed={"animals": "animals", "vehicles": "vehicles"},
    pool={"animals": "animals", "transportation": "vehicles", "animals/toys": ""},
)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with content in every section."""
    folder = tmp_path_factory.mktemp("example")
    root = folder / "images"
    for number in range(4):
        write_image(root / f"animals/animals/birds/seed-{number}.png", RED)
        write_image(root / f"vehicles/vehicles/cars/seed-{number}.png", BLUE)
        write_image(root / f"pool/transportation/boat-{number}.png", BLUE)
        write_image(root / f"pool/animals/fish/red-{number}.png", RED)
    for name in ("plants/red", "plants/rose", "animals/toys/bear", "red"):
        write_image(root / f"pool/{name}.png", RED)
    held = write_image(root / "holdout/animals/birds/held.png", RED)
    shutil.copy(held, root / "pool/plants/held.png")
    shutil.copy(root / "pool/plants/rose.png", root / "pool/plants/the-same-rose.png")
    near = [write_image(root / f"pool/copies/{number}.png", RED, size=40 - number) for number in range(3)]
    (root / "pool/empty.jpg").touch()
    (root / "pool/text.jpg").write_text("<html><script>alert(1)</script>")
    for name in ("notes.txt", "more.txt", "x.<b>", "Thumbs.db"):
        (root / "pool" / name).write_text("no image")
    pool = root / "pool"
    pairs = [
        (near[0], near[1], 0.9),
        (near[1], near[2], 0.6),
        (pool / "red.png", near[0], 0.5),
        (pool / "plants/red.png", held, 0.47),
    ]
    concepts = folder / "concepts.toml"
    concepts.write_text(tomli_w.dumps(CONCEPTS.model_dump()))
    output = build_run(
        str(folder / "run"),
        [
            ("animals", root / "animals", "seed"),
            ("vehicles", root / "vehicles", "seed"),
            ("pool", pool, "pool"),
            ("holdout", root / "holdout", "holdout"),
        ],
        [
            DatasetConfig(name="animals", as_is=True, retrieval="sample", k=7),
            DatasetConfig(name="vehicles", retrieval="cluster"),
        ],
        pairs,
        config=ReportConfig(concepts=str(concepts)),
    )
    page.run(ReportConfig(concepts=str(concepts)), output)
    return output


def read_page(output: str) -> Page:
    return Page(Path(output, "report.html").read_text())


def assert_harmless(shown: Page) -> None:
    """The page has no script and loads nothing."""
    assert set(shown.tags) <= TAGS
    assert {name for name, _ in shown.attributes} <= ATTRIBUTES
    for name, value in shown.attributes:
        match name:
            case "href":
                assert value in [f"#{section}" for section in SECTIONS]
            case "src":
                assert value.startswith("data:image/webp;base64,")
            case "style":
                assert re.fullmatch(r"(width|height|left):\d+\.\d+%", value)
    style = shown.text[shown.text.index(":root") : shown.text.rindex("}")]
    assert "url(" not in style and "@import" not in style


def test_every_section_and_every_thumbnail(example: str) -> None:
    shown = read_page(example)
    assert [name for name in shown.ids() if not name.endswith("-title")] == SECTIONS
    assert_harmless(shown)
    assert len(shown.images) > 30
    for element in shown.images:
        image = Image.open(io.BytesIO(base64.b64decode(element["src"].partition(",")[2])))
        assert image.format == "WEBP" and max(image.size) <= page.THUMBNAIL_SIDE
        assert element["alt"] and element["title"]


def test_funnel_agrees_with_the_composition(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    steps = {step.name: step.count for step in facts.funnel(run)}
    assert steps == {
        "found in the sources": 8 + 8 + 4 + 2 + 3 + 2 + 1,
        "accepted": 26,
        "seeds and pool": 25,
        "without exact copies": 24,
        "without near-duplicates": 22,
        "without holdout matches": 20,
        "in the corpus": run.composition["total_unique"],
        "retrieved from the pool": run.composition["funnel"]["retrieved"],
        "rows packed": run.composition["total_rows"],
    }
    assert sum(step.lost for step in facts.funnel(run)) == 28 - run.composition["total_unique"]
    counts = {source.source: source for source in facts.by_source(run)}
    pool = counts["pool"]
    assert (pool.rejected, pool.exact, pool.near, pool.holdout, pool.kept) == (2, 1, 2, 2, 12)
    assert pool.accepted == pool.exact + pool.near + pool.holdout + pool.kept == 17
    held = counts["holdout"]  # its own image is no match of the holdout
    assert (held.role, held.accepted, held.holdout, held.kept, held.in_corpus) == ("holdout", 1, 0, 0, 0)
    assert counts["animals"].in_corpus == 4  # included as is
    assert counts["vehicles"].kept == 4 and counts["vehicles"].in_corpus == 0
    assert sum(source.in_corpus for source in counts.values()) == run.composition["total_unique"]


def test_rejects_are_listed_by_reason(example: str) -> None:
    rejects = facts.rejects(facts.read_run(example, CONCEPTS), 1)
    assert [(reject.reason, reject.count) for reject in rejects] == [("empty", 1), ("not_an_image", 1)]
    assert rejects[1].examples[0]["uri"].endswith("pool/text.jpg")
    assert "text.jpg" in read_page(example).text


def test_files_that_are_no_images_are_counted_by_kind(example: str) -> None:
    assert facts.passed_over(facts.read_run(example, CONCEPTS)) == {"pool": {".txt": 2, "other": 1, "system files": 1}}
    text = read_page(example).text
    assert "2 .txt, 1 other, 1 system files" in text
    assert "passed over: " not in text  # the names of ingest's totals, in the list of stages


def test_a_sample_of_the_pool_is_named(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    assert facts.sample_text(run) is None
    ingest = run.manifests["ingest"]
    sampled = replace(ingest, facts={**ingest.facts, "sample_pool": 0.1, "not_sampled": {"pool": 90, "more": 12}})
    text = facts.sample_text(replace(run, manifests={**run.manifests, "ingest": sampled}))
    assert text == "A sample: about 10% of the pool. Images of the pool not sampled: 102."


def test_share_with_the_same_concept_agrees_with_brute_force(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    label_of = dict(zip(run.images["image_id"].to_pylist(), run.images["label"].to_pylist(), strict=True))
    concept_of = {"animals/fish": "animals", "transportation": "vehicles", "plants": "plants", "copies": "copies"}
    kept = run.images.filter(run.images["kept"]).to_pylist()
    known_pool = [row["label"] for row in kept if row["role"] == "pool" and row["label"] in concept_of]
    hits: dict[str, list[bool]] = {"animals": [], "vehicles": []}
    for row in run.retrieved.to_pylist():
        label = label_of[row["image_id"]]
        if label in concept_of:  # without the toys, whose concept is unknown, and the image without a label
            hits[row["seed_source"]].append(concept_of[label] == row["seed_source"])
    for dataset in facts.datasets(run):
        assert dataset.compared == len(hits[dataset.name])
        assert dataset.same_concept == pytest.approx(np.mean(hits[dataset.name]))
        likely = np.mean([concept_of[label] == dataset.name for label in known_pool])
        assert dataset.chance == pytest.approx(likely)
    by_name = {dataset.name: dataset for dataset in facts.datasets(run)}
    assert by_name["vehicles"].same_concept == 1 and by_name["vehicles"].mode == "cluster"
    assert 0 < by_name["animals"].same_concept < 1 and by_name["animals"].compared < by_name["animals"].retrieved
    assert f"{by_name['animals'].same_concept:.1%} of {by_name['animals'].compared}" in read_page(example).text


def test_without_concepts_only_equal_labels_are_the_same(example: str) -> None:
    run = facts.read_run(example, Concepts())
    # The labels of the seeds and of the pool differ: birds and fish, cars and boats.
    assert [dataset.same_concept for dataset in facts.datasets(run)] == [0, 0]


def test_concept_of_a_label() -> None:
    assert CONCEPTS.of("pool", "transportation/boats/small") == "vehicles"
    assert (
        CONCEPTS.of("pool", "animals/toys/bear") is None
    )  # the longest key counts; its concept is empty, which means unknown
    assert CONCEPTS.of("pool", "animals/toyshops") == "animals"  # a key ends at a slash
    assert CONCEPTS.of("pool", "plants/trees") == "plants/trees"  # no key: the label is the concept
    assert CONCEPTS.of("seed", "transportation") == "transportation"
    assert CONCEPTS.of("pool", None) is None
    assert Concepts(pool={"cats": "cat", "cats/toys": "toy"}).of("pool", "cats/toys") == "toy"


def test_components_of_copies(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    (component,) = facts.largest_components(run, 12, 12)
    assert component.size == 3 and [member.kept for member in component.members] == [True, False, False]
    assert [member.reason for member in component.members] == [None, "near", "near"]
    assert component.members[1].similarity == pytest.approx(0.9)
    assert component.members[2].similarity == pytest.approx(0.6)  # the kept image is the middle one of the chain
    assert dict(facts.component_sizes(run))["3"] == 1
    assert len(facts.largest_components(run, 12, 2)[0].members) == 2
    assert facts.largest_components(run, 0, 12) == []


def test_holdout_matches(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    # The exact copy of the holdout file is left out, because both images would be the same.
    (match,) = facts.holdout_matches(run, 5)
    assert match.similarity == pytest.approx(0.47)


def test_similarity_bins_begin_at_the_thresholds(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    bins = facts.similarity_bins(run, 4, 100)
    assert [similarity.low for similarity in bins[1:]] == [similarity.high for similarity in bins[:-1]]
    assert {0.45, 0.6} <= {similarity.low for similarity in bins} and bins[0].low == 0.4 and bins[-1].high == 1
    counts = {similarity.low: similarity.count for similarity in bins if similarity.count}
    assert counts == {0.45: 1, 0.5: 1, 0.6: 1, 0.9: 1}  # 0.6 itself is a copy, as dedup decided
    assert all(len(similarity.examples) == similarity.count for similarity in bins)


def test_sweep_over_thresholds(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    rows = {row.threshold: row for row in facts.threshold_sweep(run)}
    assert list(rows) == [similarity.low for similarity in facts.similarity_bins(run, 4, 100)]
    assert (rows[0.4].pairs, rows[0.4].dropped, rows[0.4].largest_component) == (4, 4, 4)
    assert (rows[0.6].pairs, rows[0.6].components_of_two_or_more, rows[0.6].dropped) == (2, 1, 2)
    assert (rows[0.65].pairs, rows[0.65].largest_component, rows[0.95].pairs) == (1, 2, 0)
    assert "Effect of other thresholds" in read_page(example).text


def test_guards_show_their_effects(example: str, tmp_path: Path) -> None:
    off = facts.guards(facts.read_run(example, CONCEPTS))
    assert len(off) == 7 and all(guard.counts is None for guard in off if guard.option != "label_guard")
    assert read_page(example).text.count("off") >= 5
    root = tmp_path / "images"
    write_image(root / "seeds/seed.png", RED)
    near = [write_image(root / f"pool/{number}.png", RED, size=40 - number) for number in range(6)]
    held = write_image(root / "holdout/held.png", RED)
    chain = [(one, other, 0.6) for one, other in itertools.pairwise(near[:5])]
    config = DedupConfig(
        mutual_neighbors=True, max_component_size=4, matches_kept=True, families=FamilyConfig(), holdout_cosine=0.42
    )
    output = build_run(
        str(tmp_path / "run"),
        [("seeds", root / "seeds", "seed"), ("pool", root / "pool", "pool"), ("held", root / "holdout", "holdout")],
        [DatasetConfig(name="seeds", retrieval="sample", k=1)],
        [*chain, (near[5], held, 0.43)],
        copies=config,
    )
    page.run(ReportConfig(), output)
    shown = read_page(output)
    assert_harmless(shown)
    counts = {guard.option: guard.counts for guard in facts.guards(facts.read_run(output, Concepts()))}
    assert counts == {
        "mutual_neighbors": {"pairs_left_out": 0},
        "families": {"pairs_left_out": 2},
        "max_component_size": {"components_split": 0, "images_in_them": 0, "components_still_larger": 0},
        "label_guard": {"pairs_left_out": 0},
        "lookalikes": None,
        "matches_kept": {"images_kept": 0},
        "holdout_cosine": {"images_taken": 1},
    }
    for text in ("max_component_size = 4", "left out 2 pairs", "dropped 1 more image", "verified copy of a kept image"):
        assert text in shown.text


def test_copies_made_of_this_pool(example: str, tmp_path: Path) -> None:
    """With scores of copies: 30 kinds and pictures found above the threshold 0.6, 10 below it, one unexpected pair."""
    assert "not measured on this pool (self_check.max_images is 0)" in read_page(example).text
    run = str(shutil.copytree(example, tmp_path / "run"))
    pool = [row["image_id"] for row in facts.read_run(run, Concepts()).images.to_pylist() if row["role"] == "pool"]
    kinds = [list(KINDS)[number // 10] for number in range(40)]
    scores = [(f"{number:032x}", f"{number:032x}", kind, True, 0.7) for number, kind in enumerate(kinds)]
    scores = [(*row[:4], 0.55 if row[2] == "grey" else row[4]) for row in scores]
    scores += [(pool[0], pool[0], "blur", True, 0.9), (pool[0], pool[-1], "blur", True, 0.8)]
    tables = [
        pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema)
        for schema, rows in ((schemas.SELF_CHECK_SCORES, scores), (schemas.SELF_CHECK_KNOWN, []))
    ]
    folder = paths.join(run, "self_check")
    write_stage(folder, [dict(zip(("scores", "known"), tables, strict=True))], facts={"min_similarity": 0.4})
    page.run(ReportConfig(concepts=str(Path(example).parent / "concepts.toml")), run)
    shown = read_page(run)
    assert_harmless(shown)
    first = shown.text.index(
        "Copy detection on this pool: 31 of 41 edited copies of 41 of its images were recognised: 0.76 ("
    )
    assert first < shown.text.index("By kind of edit: jpeg 1.00, resize 1.00, colour 1.00, blur 1.00, grey 0.00")
    assert "Unexpected pairs: 1000.0 per 1,000 candidates (206.5 to 1000.0)" in shown.text
    assert "A threshold of 0.55 instead of 0.6 would do better: 1.00 recognised, 1 unexpected" in shown.text
    assert "--set dedup.threshold=0.55 --replace" in shown.text
    assert "grey0.000.00 to 0.28101.001.00" in shown.text, "the row of the kind"
    assert "1 pair of 1 candidate" in shown.text and "matched" in shown.text
    assert len(shown.images) == len(read_page(example).images) + 2


def test_labels_from_pool_to_corpus(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    top = {row.label: row for row in facts.labels(run, top_folder=True)}
    assert sum(row.pool for row in top.values()) == 17 and sum(row.kept for row in top.values()) == 12
    assert (top["plants"].pool, top["plants"].kept) == (4, 1)
    assert top["animals"].pool == 5 and top["copies"].kept == 1 and None in top
    assert top["transportation"].corpus == 4  # the whole cluster
    from_pool = run.composition["funnel"]["retrieved"]
    assert sum(row.corpus for row in top.values()) == from_pool
    assert {row.label for row in facts.labels(run, top_folder=False)} >= {"animals/fish", "animals/toys"}


def test_gallery(example: str) -> None:
    run = facts.read_run(example, CONCEPTS)
    animals, vehicles = facts.datasets(run)
    shown = facts.gallery(run, animals, 3, 1, 2)
    assert len(shown) == 3 and all(len(retrieval.rows) == 2 and retrieval.num_rows == 7 for retrieval in shown)
    assert [run.retrieved["rank"][row].as_py() for row in shown[0].rows] == [0, 1]
    for retrieval in shown:
        assert {run.retrieved["seed_image_id"][row].as_py() for row in retrieval.rows} == set(retrieval.seeds)
    (blue,) = facts.gallery(run, vehicles, 4, 3, 8)
    assert blue.num_seeds == 4 and len(blue.seeds) == 3 and blue.num_rows == len(blue.rows) == 4


def test_the_same_run_gives_the_same_bytes_and_a_second_report_does_no_work(
    example: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config, path = ReportConfig(concepts=str(Path(example).parent / "concepts.toml")), Path(example, "report.html")
    before = path.read_bytes()
    page.run(config, example)
    assert "already done" in capfd.readouterr().err
    path.unlink()
    page.run(config, example)
    assert path.read_bytes() == before
    page.run(ReportConfig(seeds_per_dataset=1), example)
    assert path.read_bytes() != before
    path.write_bytes(before)


def test_summary_on_the_terminal(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    page.print_summary(example)
    text = capsys.readouterr().out
    for line in ("without near-duplicates", "rows packed", "not_an_image 1", "vehicles", "100.0%", "report.html"):
        assert line in text


@pytest.mark.parametrize("is_active", [True, False])
def test_summary_ends_with_the_report_and_a_command_as_a_shell_takes_it(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_active: bool
) -> None:
    output = shutil.copytree(example, tmp_path / "my run's")
    (tmp_path / "bin").mkdir()
    if is_active:
        (tmp_path / "bin/seedbed").write_text("#!/bin/sh")
        (tmp_path / "bin/seedbed").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    page.print_summary("my run's")
    *tables, look, train = capsys.readouterr().out.splitlines()
    assert max(map(len, tables)) <= 80
    assert shlex.split(look)[-1] == "my run's/report.html"
    command = ["seedbed", "train"] if is_active else [sys.executable, "-m", "pipelines.train"]
    expected = [*command, "--set", "data.path=my run's/corpus", "--output", "my run's-train"]
    assert shlex.split(train.removeprefix("Train on it:")) == expected
    assert output.is_dir()


def test_images_come_from_the_stored_thumbnails(example: str, tmp_path: Path) -> None:
    run = facts.read_run(example, CONCEPTS)
    image_ids = run.images["image_id"].to_pylist()
    thumbnails = facts.read_thumbnails(run, image_ids, 128, 7000)
    assert set(thumbnails) == set(image_ids)
    sizes = {Image.open(io.BytesIO(thumbnail.webp)).size for thumbnail in thumbnails.values()}
    assert sizes == {(24, 24)}  # the originals measure 38 to 40
    rose = next(thumbnail for thumbnail in thumbnails.values() if "rose" in thumbnail.uri)
    assert (rose.role, rose.label, rose.width) == ("pool", "plants", 40)


def test_hostile_names(tmp_path: Path) -> None:
    root, uri = tmp_path / "images", f"{HOSTILE}.png"
    for number in range(4):
        write_image(root / f"seeds/{HOSTILE}/{number}{uri}", RED)
        write_image(root / f"pool/{HOSTILE}/{number}{uri}", RED)
    held = write_image(root / f"holdout/{HOSTILE}/{uri}", RED)
    (root / f"pool/{HOSTILE}/{HOSTILE}.jpg").write_text(f"<script>{HOSTILE}")
    first, second = (root / f"pool/{HOSTILE}/{number}{uri}" for number in range(2))
    output = build_run(
        str(tmp_path / "run"),
        [
            (HOSTILE, root / "seeds", "seed"),
            (f"pool {HOSTILE}", root / "pool", "pool"),
            ("held", root / "holdout", "holdout"),
        ],
        [DatasetConfig(name=HOSTILE, as_is=True, retrieval="sample", k=2)],
        [(first, second, 0.9), (second, held, 0.41), (root / f"pool/{HOSTILE}/2{uri}", held, 0.5)],
    )
    page.run(ReportConfig(), output)
    shown = read_page(output)
    assert_harmless(shown)
    assert [name for name in shown.ids() if not name.endswith("-title")] == SECTIONS
    # The name is present as text: in a table, and in the tooltip of every thumbnail.
    assert HOSTILE in shown.text
    assert all(HOSTILE in image["title"] and HOSTILE in image["alt"] for image in shown.images)
    page.print_summary(output)


def test_run_with_empty_sections(tmp_path: Path) -> None:
    """No holdout, no labels, no copies, no rejects, no thumbnails, nothing retrieved."""
    root = tmp_path / "images"
    for number in range(2):
        write_image(root / f"seeds/{number}.png", RED)
        write_image(root / f"pool/{number}.png", BLUE)
    output = build_run(
        str(tmp_path / "run"),
        [("seeds", root / "seeds", "seed"), ("pool", root / "pool", "pool")],
        [DatasetConfig(name="seeds", as_is=True, retrieval="none")],
        thumbnails=False,
    )
    page.run(ReportConfig(), output)
    shown = read_page(output)
    assert_harmless(shown)
    assert [name for name in shown.ids() if not name.endswith("-title")] == SECTIONS
    assert shown.images == []
    for text in (
        "No file was rejected",
        "Nothing was retrieved",
        "is left out",
        "has a label",
        "matched an image of the holdout",
    ):
        assert text in shown.text
    page.print_summary(output)


def test_images_without_labels_have_no_frames_of_concepts(example: str, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("seeds/seed", "pool/a", "pool/b"):
        write_image(root / f"{name}.png", RED)
    output = build_run(
        str(tmp_path / "run"),
        [("seeds", root / "seeds", "seed"), ("pool", root / "pool", "pool")],
        [DatasetConfig(name="seeds", retrieval="sample", k=2)],
    )
    page.run(ReportConfig(), output)
    texts = [Path(folder, "report.html").read_text().partition("</style>")[2] for folder in (output, example)]
    for mark in ('class="frame unknown"', "concept unknown", "by chance", "Share with the same concept"):
        assert [mark in text for text in texts] == [False, True], mark
    assert "The share with the same concept is left out" in texts[0]


def test_without_thumbnails_the_originals_are_read(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_image(root / "seeds/seed.png", RED, size=300)
    for number in range(3):
        write_image(root / f"pool/{number}.png", RED, size=300)
    output = build_run(
        str(tmp_path / "run"),
        [("seeds", root / "seeds", "seed"), ("pool", root / "pool", "pool")],
        [DatasetConfig(name="seeds", retrieval="sample", k=3)],
        thumbnails=False,
    )
    page.run(ReportConfig(), output)
    shown = read_page(output)
    assert len(shown.images) == 4
    for element in shown.images:
        data = base64.b64decode(element["src"].partition(",")[2])
        assert max(Image.open(io.BytesIO(data)).size) == page.THUMBNAIL_SIDE
    run = facts.read_run(output, Concepts())
    image_ids = run.images["image_id"].to_pylist()
    largest = []
    for max_bytes in (100_000, 1_000):
        thumbnails = facts.read_thumbnails(run, image_ids, 128, max_bytes).values()
        largest.append(max(len(thumbnail.webp) for thumbnail in thumbnails))
    assert largest[0] > 1_000 >= largest[1]
    shutil.rmtree(root / "pool")
    Path(output, "report.html").unlink()
    with pytest.raises(InputError, match="cannot be read any more"):
        page.run(ReportConfig(), output)


def test_wrong_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Run the stage that writes it first"):
        page.run(ReportConfig(), str(tmp_path))
    with pytest.raises(ConfigError, match="no file at"):
        page.read_concepts(ReportConfig(concepts=str(tmp_path / "none.toml")))
    (tmp_path / "wrong.toml").write_text("[seeds]\na = 'b'")
    with pytest.raises(ConfigError, match="seeds"):
        page.read_concepts(ReportConfig(concepts=str(tmp_path / "wrong.toml")))


def test_markup_escapes_everything_except_markup() -> None:
    inner = markup.tag("b", "<i>&\"'")
    assert inner == "<b>&lt;i&gt;&amp;&quot;&#x27;</b>"
    assert markup.tag("p", inner, "<") == f"<p>{inner}&lt;</p>"
    assert markup.tag("p", inner + "") == f"<p>{markup.join(str(inner))}</p>"  # the result of + is text again
    assert markup.tag("img", alt='" onerror="', src=None, class_="a") == '<img alt="&quot; onerror=&quot;" class="a">'
    assert markup.tag("p", "\x00\x1b\udc80\n") == "<p>\ufffd\ufffd\ufffd\n</p>"
    assert len(markup.clip("x" * 10_000)) <= markup.MAX_TEXT_LENGTH
