"""docs/tables.md names every column, and each of its queries gives the rows that it promises."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.compute as pc
import pytest

from curation.files import schemas
from curation.images.hashing import image_id
from curation.retrieve import DatasetConfig
from curation.run_folder import RunFolder, read_corpus, read_images_table, read_retrieved
from tests.curation.report.small_runs import BLUE, build_run, write_image

DOC = (Path(__file__).parents[1] / "docs/tables.md").read_text()
QUERIES = re.findall(r"^```sql\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
VECTORS = schemas.vectors(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rows for every query; its folder is `runs/mine` below a home."""
    home = tmp_path_factory.mktemp("home")
    root = home / "images"
    reds = [(200, 40 + 15 * number, 40) for number in range(8)]
    for number, colour in enumerate((reds[0], reds[0], reds[4])):  # the first two retrieve the same images
        write_image(root / f"seeds/red/seed-{number}.png", colour)
    pool = [write_image(root / f"pool/{number:02d}.png", colour) for number, colour in enumerate(reds + [BLUE] * 4)]
    held = write_image(root / "holdout/held.png", BLUE)
    shutil.copy(pool[5], root / "pool/05-again.png")
    shutil.copy(held, root / "pool/held-in-the-pool.png")
    build_run(
        str(home / "runs/mine"),
        [
            ("seeds", root / "seeds", "seed"),
            ("pool", root / "pool", "pool"),
            ("holdout", root / "holdout", "holdout"),
        ],
        [DatasetConfig(name="seeds", as_is=True, retrieval="sample", k=2)],
        [(pool[5], pool[6], 0.9), (pool[9], held, 0.5)],
    )
    return home / "runs/mine"


@pytest.fixture(scope="module")
def results(run: Path) -> list[list[dict[str, Any]]]:
    """The rows of each query, in the order of the document."""
    answers: list[list[dict[str, Any]]] = []
    before = Path.cwd()
    os.chdir(run)
    try:
        with duckdb.connect() as connection:
            for query in QUERIES:
                cursor = connection.execute(query)
                names = [column[0] for column in cursor.description or ()]
                answers.append([dict(zip(names, row, strict=True)) for row in cursor.fetchall()])
    finally:
        os.chdir(before)
    return answers


def name_of(row: dict[str, Any]) -> str:
    return Path(row["uri"]).name


def test_there_are_ten_queries_and_each_gives_rows(results: list[list[dict[str, Any]]]) -> None:
    assert len(results) == 1 + 10  # the first block makes the views
    assert re.findall(r"^\*\*(\d+)\.", DOC, re.MULTILINE) == [str(number) for number in range(1, 11)]
    assert all(results[1:])


def test_each_query_gives_what_it_promises(run: Path, results: list[list[dict[str, Any]]]) -> None:
    stage = RunFolder.of(str(run))
    images = {row["image_id"]: row for row in read_images_table(stage.images).to_pylist()}
    in_corpus = pc.unique(read_corpus(stage.corpus)["image_id"]).to_pylist()
    _, why, seeds, copies, clusters, dropped, lowest, matches, thumbnails, exported, points = results

    asked_for = images[image_id((run.parents[1] / "images/pool/05.png").read_bytes())]
    assert why == [{name: asked_for[name] for name in ("uri", "kept", "reason", "matched_image_id", "reasons")}]
    assert name_of(why[0]) == "05-again.png"  # its first row

    retrieved = read_retrieved(stage.retrieve).to_pylist()
    seeds_of = {
        row["image_id"]: {r["seed_image_id"] for r in retrieved if r["image_id"] == row["image_id"]}
        for row in retrieved
    }
    useful = {next(iter(names)) for names in seeds_of.values() if len(names) == 1}
    assert useful and len(useful) < 3
    all_seeds = {row["image_id"] for row in images.values() if row["role"] == "seed"}
    assert {row["uri"] for row in seeds} == {images[seed]["uri"] for seed in all_seeds - useful}

    assert {name_of(row) for row in copies} == {"05.png", "05-again.png", "06.png"}
    assert [row["kept"] for row in copies] == sorted((row["kept"] for row in copies), reverse=True)

    reached = {images[key]["cluster_id"] for key in in_corpus}
    assert {row["cluster_id"] for row in clusters} == {r["cluster_id"] for r in images.values()} - reached - {None}

    assert [tuple(row.values()) for row in dropped if row["source"] == "seeds"] == [("seeds", "kept", 3, 3)]
    counts = {row["decision"]: (row["images"], row["files"]) for row in dropped if row["source"] == "pool"}
    assert counts.keys() == {"kept", "near", "holdout"}
    assert sum(files for _, files in counts.values()) == 14
    assert counts["holdout"] == (2, 2)

    assert {row["corpus_key"] for row in lowest} == set(in_corpus)
    assert [row["weight"] for row in lowest] == sorted(row["weight"] for row in lowest)

    assert [(name_of(row), Path(row["holdout_uri"]).name) for row in matches] == [
        ("09.png", "held-in-the-pool.png"),
        ("held-in-the-pool.png", "held-in-the-pool.png"),
    ]
    assert matches[1]["sources"] == ["pool", "holdout"]

    assert {row["image_id"] for row in thumbnails} == set(in_corpus)
    assert all(row["thumbnail"][8:12] == b"WEBP" for row in thumbnails)

    assert exported == [{"Count": len(in_corpus)}]
    lines = (run / "corpus.csv").read_text().splitlines()
    assert lines[0] == "shard,key,source,label,weight" and len(lines) == 1 + len(in_corpus)

    assert len(points) == len(images)
    assert {row["outcome"] for row in points} == {"corpus", "near", "holdout", "not retrieved"}


def test_the_lines_of_python_give_the_table(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(run.parents[1])
    names: dict[str, Any] = {}
    exec(block, names)
    table = read_images_table(RunFolder.of(str(run)).images)
    assert names["arrow"].equals(table)
    assert names["frame"]["image_id"].tolist() == table["image_id"].to_pylist()
    assert sorted(names["kept"]["image_id"]) == sorted(table.filter(table["kept"])["image_id"].to_pylist())


TABLES = {
    "images/images-*": schemas.IMAGES_TABLE,
    "ingest/images-*": schemas.IMAGES,
    "ingest/rejects-*": schemas.REJECTS,
    "embed/vectors-*": VECTORS,
    "describe/vectors-*": VECTORS,
    "describe/thumbnails-*": schemas.THUMBNAILS,
    "self_check/scores-*": schemas.SELF_CHECK_SCORES,
    "self_check/drawn-*": schemas.PLANNED_COPIES,
    "self_check/known-*": schemas.SELF_CHECK_KNOWN,
    "pairs/pairs-*": schemas.PAIRS,
    "dedup/duplicates-*": schemas.DUPLICATES,
    "cluster/assignments-*": schemas.ASSIGNMENTS,
    "retrieve/retrieved-*": schemas.RETRIEVED,
    "retrieve/copies-*": schemas.CORPUS_COPIES,
    "corpus/corpus-*": schemas.CORPUS,
}


def rows_of_section(title: str) -> list[list[str]]:
    """The cells of the table of a section, without its head."""
    text = DOC.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def test_the_document_names_every_column_of_every_table() -> None:
    columns = {
        file: re.findall(r"`([^`]+)`", cells[1])
        for cells in rows_of_section("All tables")
        for file in re.findall(r"`([^`]+)`", cells[0])
    }
    assert columns == {file: schema.names for file, schema in TABLES.items()}
    explained = [
        name for cells in rows_of_section("The table of images") for name in re.findall(r"`([^`]+)`", cells[0])
    ]
    assert explained == schemas.IMAGES_TABLE.names


def test_every_parquet_file_of_a_run_is_in_the_document(run: Path) -> None:
    kinds = {f"{file.parent.name}/{file.name.split('-')[0]}-*" for file in run.rglob("*.parquet")}
    # The descriptors of this run are colours: all would be copies. So it has no check of the corpus and no self-check.
    of_checks = {file for file in TABLES if file == "retrieve/copies-*" or file.startswith("self_check/")}
    assert kinds == TABLES.keys() - of_checks


# The columns that no two rows of a table share, by the last column of the document.
KEYS = {
    "images/images-*": "image_id",
    "ingest/images-*": 'uri, "offset"',
    "embed/vectors-*": "image_id, filename",
    "describe/vectors-*": "image_id, filename",
    "describe/thumbnails-*": "image_id, filename",
    "pairs/pairs-*": "image_id, other_image_id",
    "cluster/assignments-*": "image_id, level",
    "retrieve/retrieved-*": "image_id, seed_source, seed_image_id",
    "corpus/corpus-*": "image_id",
}


@pytest.mark.parametrize("table", KEYS)
def test_the_rows_of_an_image(run: Path, table: str) -> None:
    key = KEYS[table]
    with duckdb.connect() as connection:
        repeated = f"SELECT {key} FROM '{run}/{table}.parquet' GROUP BY ALL HAVING count(*) > 1"
        assert connection.execute(repeated).fetchall() == []
        assert connection.execute(f"SELECT count(*) > 0 FROM '{run}/{table}.parquet'").fetchone() == (True,)


def test_dedup_keeps_at_most_one_row_of_an_image(run: Path) -> None:
    with duckdb.connect() as connection:
        others = f"SELECT DISTINCT reason FROM '{run}/dedup/*.parquet' WHERE NOT kept ORDER BY ALL"
        assert connection.execute(others).fetchall() == [("exact",), ("holdout",), ("near",)]
        twice = f"SELECT image_id FROM '{run}/dedup/*.parquet' GROUP BY ALL HAVING count(*) FILTER (kept) > 1"
        assert connection.execute(twice).fetchall() == []
