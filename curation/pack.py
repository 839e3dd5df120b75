"""Pack: the corpus as WebDataset shards, and the account of what it is made of.

    corpus/
      corpus-000000.tar  ...        the images (see corpus.py)
      corpus-00000.parquet  ...     records.CORPUS: one row per sample of the tar of that number
      composition.json              the funnel, and what each seed dataset brought
      manifest.json

An image is here because a dataset is taken as it is, or because a seed image or a cluster brought it; `reasons` lists
all of these. By default it is packed once, and `weight` says how often a trainer should see it relative to others:
each dataset that brought it adds its share (see balance.dataset_weights). With `repeats` (the paper's way, whose 142
million count them) it is packed once for each reason, under keys `<image_id>`, `<image_id>_1`, ..., with weight 1.

Samples are shuffled by seed, so that every tar is a sample of the whole.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
import typer
from pydantic import Field

from curation import command, records, storage
from curation.balance import dataset_weights
from curation.config import Settings, load, resolved_toml
from curation.corpus import Sample, write_tar
from curation.errors import InputError
from curation.retrieve import DatasetConfig, RetrieveConfig, read_retrieved
from curation.runner import Runner, Shard
from curation.sources import ReferenceReader
from curation.stage import run_shards
from curation.storage import Manifest, ShardRecord


class PackConfig(Settings):
    """What the corpus holds and how it is cut."""

    images_per_shard: int = Field(default=1000, ge=1)
    """Samples per tar."""
    repeats: bool = False
    """Whether an image that several datasets or seeds brought is packed as often."""
    temperature: float = Field(default=1.0, ge=0, le=1)
    """Without repeats: a dataset's share of all weight goes as its rows to this power; 0 gives all the same share."""
    seed: int = 0
    """Of the order of samples."""


@dataclass(frozen=True)
class Entry:
    """One sample to pack."""

    key: str
    image: dict[str, Any]  # its row of records.IMAGES
    reasons: tuple[str, ...]
    weight: float


def run(
    config: PackConfig,
    images: str,
    deduplicated: str,
    retrieved: str,
    output: str,
    runner: Runner,
    *,
    replace: bool = False,
) -> Manifest:
    """Pack what the datasets of the finished retrieve bring as they are and what it found; returns the manifest."""
    stages = {
        name: storage.require_manifest(folder)
        for name, folder in (("images", images), ("dedup", deduplicated), ("retrieved", retrieved))
    }
    datasets = RetrieveConfig.model_validate(stages["retrieved"].plan.config, strict=False).datasets
    kept = _kept_rows(images, deduplicated, stages["images"], stages["dedup"])
    rows = read_retrieved(retrieved)
    entries = plan_entries(config, datasets, kept, rows)
    if not entries:
        raise InputError("Nothing to pack: no dataset is taken as it is, and nothing was retrieved.")
    step = config.images_per_shard
    shards = [
        Shard(f"{number:06d}", entries[start : start + step], len(entries[start : start + step]))
        for number, start in enumerate(range(0, len(entries), step))
    ]
    return run_shards(
        "pack",
        config=config,
        inputs={
            "datasets": storage.hash_json([dataset.model_dump(mode="json") for dataset in datasets]),
            **{name: manifest.content_hash for name, manifest in stages.items()},
        },
        output=output,
        runner=runner,
        shards=shards,
        make_worker=functools.partial(make_worker, output),
        replace=replace,
        finish=functools.partial(_finish, datasets, stages, kept, rows, entries, output),
    )


def make_worker(output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that writes one tar after another."""
    reader = ReferenceReader()

    def samples(entries: list[Entry]) -> Iterator[Sample]:
        for entry in entries:
            image = entry.image
            data = reader.read(image["uri"], image["offset"], image["length"], image["image_id"])
            sidecar = {name: image[name] for name in ("source", "uri", "width", "height", "label")}
            yield Sample(entry.key, data, image["format"], {**sidecar, "reasons": list(entry.reasons)})

    def process(shard: Shard) -> ShardRecord:
        entries: list[Entry] = shard.work
        tar = write_tar(storage.join(output, f"corpus-{shard.name}.tar"), samples(entries))
        reader.close()
        table = pa.Table.from_pylist(
            [
                {
                    "key": entry.key,
                    "shard": tar.name,
                    "image_id": entry.image["image_id"],
                    "source": entry.image["source"],
                    "role": entry.image["role"],
                    "reasons": list(entry.reasons),
                    "weight": entry.weight,
                }
                for entry in entries
            ],
            schema=records.CORPUS,
        )
        index = storage.write_table(storage.join(output, f"corpus-{int(shard.name):05d}.parquet"), table)
        return ShardRecord(name=shard.name, files=(tar, index), totals={"rows": tar.rows, "bytes": tar.bytes})

    return process


def read_corpus(folder: str) -> pa.Table:
    """All rows of records.CORPUS of a finished pack, in the order of the tars."""
    names = [name for name in storage.require_manifest(folder).files("corpus") if name.endswith(".parquet")]
    return pa.concat_tables([storage.read_table(storage.join(folder, name), records.CORPUS) for name in names])


def plan_entries(
    config: PackConfig, datasets: Sequence[DatasetConfig], kept: dict[str, dict[str, Any]], retrieved: pa.Table
) -> list[Entry]:
    """The samples in the order of the tars. `kept` maps image_id to its row of records.IMAGES."""
    brought: list[tuple[str, str, str]] = []  # image_id, dataset, reason
    as_is = {dataset.name for dataset in datasets if dataset.as_is}
    for image_id, image in kept.items():
        if image["role"] == "seed" and image["source"] in as_is:
            brought.append((image_id, image["source"], f"as_is:{image['source']}"))
    for row in retrieved.to_pylist():
        if row["image_id"] not in kept:
            raise InputError(f"Image {row['image_id']} was retrieved, but not kept: these are not stages of one run.")
        place = f"{row['seed_image_id']}:{row['rank']}" if row["mode"] == "sample" else row["cluster_id"]
        brought.append((row["image_id"], row["seed_source"], f"{row['mode']}:{row['seed_source']}:{place}"))

    if config.repeats:
        counts: dict[str, int] = {}
        entries = []
        for image_id, _, reason in brought:
            number = counts[image_id] = counts.get(image_id, -1) + 1
            key = f"{image_id}_{number}" if number else image_id
            entries.append(Entry(key, kept[image_id], (reason,), 1.0))
    else:
        by_image: dict[str, dict[str, list[str]]] = {}
        for image_id, dataset, reason in brought:
            by_image.setdefault(image_id, {}).setdefault(dataset, []).append(reason)
        rows: dict[str, int] = {}
        for names in by_image.values():
            for name in names:
                rows[name] = rows.get(name, 0) + 1
        weights = dataset_weights(rows, config.temperature)
        entries = [
            Entry(
                image_id,
                kept[image_id],
                tuple(reason for reasons in names.values() for reason in reasons),
                sum(weights[name] for name in names),
            )
            for image_id, names in by_image.items()
        ]
    return sorted(entries, key=lambda entry: hashlib.sha256(f"{config.seed}:{entry.key}".encode()).digest())


def _kept_rows(images: str, deduplicated: str, ingested: Manifest, decided: Manifest) -> dict[str, dict[str, Any]]:
    """The kept seed and pool images by image_id."""
    kept: dict[str, dict[str, Any]] = {}
    for image_name, duplicate_name in zip(ingested.files("images"), decided.files("duplicates"), strict=True):
        rows = storage.read_table(storage.join(images, image_name), records.IMAGES)
        keep = storage.read_table(storage.join(deduplicated, duplicate_name), records.DUPLICATES, ["kept"])
        for row in rows.filter(keep.column("kept")).to_pylist():
            kept[row["image_id"]] = row
    return kept


def _finish(
    datasets: Sequence[DatasetConfig],
    stages: dict[str, Manifest],
    kept: dict[str, dict[str, Any]],
    retrieved: pa.Table,
    entries: Sequence[Entry],
    output: str,
    done: Sequence[ShardRecord],
) -> tuple[dict[str, Any], ShardRecord]:
    composition = compose(datasets, stages, kept, retrieved, entries)
    text = json.dumps(composition, indent=1, ensure_ascii=False) + "\n"
    file = storage.write_bytes(storage.join(output, "composition.json"), text.encode())
    return {}, ShardRecord(name="composition", files=(file,))


def compose(
    datasets: Sequence[DatasetConfig],
    stages: dict[str, Manifest],
    kept: dict[str, dict[str, Any]],
    retrieved: pa.Table,
    entries: Sequence[Entry],
) -> dict[str, Any]:
    """The content of composition.json: the funnel, one row per seed dataset, totals of rows and of unique images.

    Every count of the funnel after `rejected` is of seed and pool images; the holdout is counted apart.
    """
    ingest_totals, dedup_totals = stages["images"].totals, stages["dedup"].totals
    holdout = dedup_totals.get("holdout_rows", 0)
    candidates = ingest_totals["accepted"] - holdout
    after_exact = candidates - dedup_totals.get("exact", 0)
    after_near = after_exact - dedup_totals.get("near", 0)
    by_dataset: dict[str, list[str]] = {}
    modes: dict[str, str] = {}  # what `by_size` came to
    for row in retrieved.select(["image_id", "seed_source", "mode"]).to_pylist():
        by_dataset.setdefault(row["seed_source"], []).append(row["image_id"])
        modes[row["seed_source"]] = row["mode"]
    packed = [entry.image["image_id"] for entry in entries]
    return {
        "funnel": {
            "ingested": ingest_totals["images"],
            "rejected": dict(stages["images"].rejects),
            "holdout": holdout,
            "candidates": candidates,
            "after_exact": after_exact,
            "after_near_duplicates": after_near,
            "after_decontamination": len(kept),
            "retrieved": len({image_id for ids in by_dataset.values() for image_id in ids}),
            "packed": len(entries),
        },
        "datasets": [
            _dataset_row(dataset, modes.get(dataset.name, dataset.retrieval), kept, by_dataset.get(dataset.name, []))
            for dataset in datasets
        ],
        "total_rows": len(entries),
        "total_unique": len(set(packed)),
    }


def _dataset_row(
    dataset: DatasetConfig, mode: str, kept: dict[str, dict[str, Any]], retrieved: list[str]
) -> dict[str, Any]:
    seeds = [i for i, image in kept.items() if image["role"] == "seed" and image["source"] == dataset.name]
    own = seeds if dataset.as_is else []
    return {
        "dataset": dataset.name,
        "mode": mode,
        "as_is": dataset.as_is,
        "seeds": len(seeds),
        "retrieved": len(retrieved),
        "cap": dataset.cap if mode == "cluster" else None,
        "rows": len(own) + len(retrieved),
        "unique": len(set(own) | set(retrieved)),
    }


def command_line(
    config: command.ConfigOption,
    images: Annotated[str, typer.Option("--images", help="Folder of the finished ingest.")],
    deduplicated: Annotated[str, typer.Option("--dedup", help="Folder of the finished dedup.")],
    retrieved: Annotated[str, typer.Option("--retrieved", help="Folder of the finished retrieve.")],
    output: command.OutputOption,
    runner: command.RunnerOption = "ray",
    workers: command.WorkersOption = None,
    overrides: command.SetOption = None,
    plan: command.PlanOption = False,
    replace: command.ReplaceOption = False,
) -> None:
    """Write the corpus."""
    settings = load(PackConfig, config, overrides or (), section="pack")
    if plan:
        print(resolved_toml(settings), end="")
        return
    with command.open_runner(runner, workers) as chosen:
        run(settings, images, deduplicated, retrieved, output, chosen, replace=replace)


if __name__ == "__main__":
    from curation import pack  # by its real name, or its classes would exist twice

    command.main(pack.command_line)
