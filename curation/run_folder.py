"""The folders of a run, and the readers of its finished stages.

    <run>/
      ingest/      images-*.parquet      rejects-*.parquet
      embed/       vectors-*.parquet
      describe/    vectors-*.parquet     thumbnails-*.parquet
      pairs/       pairs-*.parquet
      self_check/  drawn-*.parquet       scores-*.parquet      known-*.parquet
      dedup/       duplicates-*.parquet
      cluster/     centroids-*.npy       parents-*.npy         assignments-*.parquet
      retrieve/    retrieved-*.parquet
      corpus/      corpus-*.tar          corpus-*.parquet      composition.json
      images/      images-*.parquet

Every folder also holds the manifest of its stage. Readers take file names from the manifest, never from a listing of
the folder, and check the hash of each file that they read. The columns are in files/schemas.py.
"""

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine import run_log
from curation.engine.manifest import MANIFEST_NAME, Manifest, read_manifest, require_manifest
from curation.errors import InputError, UserError
from curation.files import npy, parquet, paths, schemas, vectors
from curation.files.paths import RecordedPath

# The stages in order. Each writes to the folder of its name.
STAGES = ("ingest", "embed", "describe", "pairs", "self_check", "dedup", "cluster", "retrieve", "corpus", "images")


@dataclass(frozen=True)
class RunFolder:
    """The folders of the stages of one run, local or any fsspec URL.

    The command of a single stage sets only the folders that it reads; the others are empty strings.
    """

    ingest: str = ""
    embed: str = ""
    describe: str = ""
    pairs: str = ""
    self_check: str = ""
    dedup: str = ""
    cluster: str = ""
    retrieve: str = ""
    corpus: str = ""
    images: str = ""

    @classmethod
    def of(cls, run: str) -> "RunFolder":
        """The folders of the run in the folder `run`."""
        return cls(**{stage: paths.join(run, stage) for stage in STAGES})


def require_stage(folder: str, stage: str, option: str) -> None:
    """Raise InputError unless `folder`, the value of `option`, holds the finished stage `stage`.

    `embed` and `describe` write files of one kind, so each may take the place of the other.
    """
    manifest = read_manifest(folder)
    if manifest is None and paths.exists(paths.join(folder, stage, MANIFEST_NAME)):
        raise InputError(f"{option} '{folder}' is the folder of a run. Give '{paths.join(folder, stage)}'.")
    if manifest is None:
        problem = f"'{folder}' holds no finished stage: no {MANIFEST_NAME}"
        raise InputError(f"{option} needs the folder of a finished {stage}, but {problem}. Run that stage first.")
    of_vectors = ("embed", "describe")
    if (there := manifest.plan.stage) not in (of_vectors if stage in of_vectors else (stage,)):
        raise InputError(
            f"{option} needs the folder of a finished {stage}, but '{folder}' holds the stage {there}. Give the folder "
            f"{stage}/ of the same run."
        )


def require_run(run: str) -> set[str]:
    """The names in the folder of a whole run. Raises InputError where `run` is no such folder, or cannot be read."""
    try:
        is_folder = paths.is_folder(run)
    except UserError:
        raise
    except Exception as error:  # each driver of fsspec has errors of its own, for example for a refused connection
        raise InputError(f"The run '{run}' cannot be read: {type(error).__name__}: {error}.") from None
    if not is_folder:
        problem = "it is a file" if paths.exists(run) else "there is no such folder"
        raise InputError(f"No run at '{run}': {problem}. Give the --output of `seedbed curate`.")
    names = set(paths.list_names(run))
    if not names & {"run.toml", run_log.FOLDER, *STAGES}:
        problem = "it is the folder of one stage" if MANIFEST_NAME in names else "no run wrote this folder"
        raise InputError(f"No run at '{run}': {problem}. Give the --output of `seedbed curate`.")
    return names


# Vectors


def read_vectors(path: str, *, in_float32: bool = False) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and unit vectors (N, D) float16 of every file at `path`: one Parquet file or a block of a matrix at a time.

    `path` is a file, a folder of `.parquet` and `.npy` files, the folder of a stage, or the folder of a run. In the
    folder of a stage, the manifest names the files; of a run, the folder `embed/` is read. Other files come in the
    natural order of their names. The ids of a matrix are its row numbers; among several files, `file:row`. `in_float32`
    is that of `vectors.read_file`. Raises InputError as `vectors.read_file` does, for a path without vectors, for files
    that differ in width, and for an id that comes twice outside the folder of a stage.
    """
    width: int | None = None
    files, are_of_stage = vector_files(path)
    file_of_id: dict[str, str] = {}
    for file in files:
        for image_ids, matrix in vectors.read_blocks(file, in_float32=in_float32):
            if not image_ids:
                continue
            if width is not None and matrix.shape[1] != width:
                raise InputError(f"{file}: vectors of width {matrix.shape[1]}; the files before have {width}.")
            width = matrix.shape[1]
            if file.endswith(".npy"):  # its ids are unique
                name = posixpath.basename(file)
                image_ids = [f"{name}:{row}" for row in image_ids] if len(files) > 1 else image_ids
            elif not are_of_stage:  # there, copies of an image have one id and equal vectors
                _require_new_ids(file_of_id, image_ids, file)
            yield image_ids, matrix
    if width is None:
        raise InputError(f"'{path}' holds no vectors: its files have no rows.")


def _require_new_ids(file_of_id: dict[str, str], image_ids: list[str], file: str) -> None:
    """Add the ids of a file. Raises InputError for an id that is there already."""
    for image_id in image_ids:
        if image_id in file_of_id:
            raise InputError(
                f"{file}: a second vector of image '{image_id}'; the first is in {file_of_id[image_id]}. Each vector "
                "needs an image_id of its own: correct the ids, or leave one row out."
            )
        file_of_id[image_id] = file


def vector_files(path: str) -> tuple[list[str], bool]:
    """The files with vectors at `path`, and whether they are those of a stage."""
    if not paths.exists(path):
        raise InputError(f"No file or folder at '{path}'.")
    if not paths.is_folder(path):
        return [path], False
    if paths.exists(paths.join(path, "embed", MANIFEST_NAME)):
        path = paths.join(path, "embed")
    manifest = read_manifest(path)
    if manifest is not None:
        listed: Sequence[str] = manifest.paths(path, "vectors")
    else:
        listed = [paths.join(path, name) for name in sorted(paths.list_names(path), key=_natural_order)]
    files = [file for file in listed if file.endswith((".parquet", ".npy"))]
    if not files and manifest is not None:
        raise InputError(f"'{path}' holds the stage {manifest.plan.stage}, without vectors. Give the folder of embed.")
    if not files:
        raise InputError(f"'{path}' holds no vectors: no .parquet and no .npy file.")
    return files, manifest is not None


def _natural_order(name: str) -> tuple[list[str | int], str]:
    """A key that sorts `part-9` before `part-10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


# Ingest


def read_images(folder: str, columns: list[str] | None = None) -> pa.Table:
    """All rows of IMAGES of a finished ingest in shard order, with all columns or only `columns`."""
    schema = schemas.IMAGES if columns is None else pa.schema([schemas.IMAGES.field(name) for name in columns])
    table = _read_all(folder, "images", schemas.IMAGES, columns, schema.empty_table())
    if table.num_rows == 0:
        raise InputError(f"'{folder}' holds no accepted image. See its rejects-*.parquet for the reasons.")
    return table


def require_same_ingest(folder: str, manifest: Manifest, images: str, ingested: Manifest) -> None:
    """Raise InputError unless the stage in `folder` was made from the ingest in `images`."""
    if (content_hash := manifest.plan.inputs.get("images")) != ingested.content_hash:
        raise InputError(
            f"'{folder}' was made from another ingest than '{images}' (content hash {content_hash}, here "
            f"{ingested.content_hash}). They are not stages of one run; run {manifest.plan.stage} again with --replace."
        )


# Kept images


@dataclass(frozen=True)
class KeptShard:
    """The files of one shard of ingest: its images, the decisions of dedup, and the vectors."""

    images: RecordedPath
    duplicates: RecordedPath
    vectors: RecordedPath


def kept_inputs(run: RunFolder) -> dict[str, str]:
    """The content hashes that decide which images are kept: inputs of every stage that reads kept images."""
    return {"images": require_manifest(run.ingest).content_hash, "dedup": require_manifest(run.dedup).content_hash}


def kept_shards(run: RunFolder) -> list[KeptShard]:
    """The shards of a finished ingest with their files in dedup and embed. Raises InputError for stages of two runs."""
    folders, kinds = (run.ingest, run.dedup, run.embed), ("images", "duplicates", "vectors")
    manifests = [require_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        require_same_ingest(folder, manifest, run.ingest, manifests[0])
    files = [manifest.paths(folder, kind) for folder, manifest, kind in zip(folders, manifests, kinds, strict=True)]
    if len({len(column) for column in files}) > 1:
        raise InputError(
            f"'{run.ingest}', '{run.dedup}' and '{run.embed}' differ in their number of shards "
            f"({', '.join(str(len(column)) for column in files)}); they are not stages of one run."
        )
    return [KeptShard(*files_of_shard) for files_of_shard in zip(*files, strict=True)]


def read_kept(shard: KeptShard, *, role: str, source: str | None = None) -> tuple[list[str], np.ndarray]:
    """Ids and vectors (N, D) float16 of the kept images of one shard that have `role` and, where given, `source`."""
    rows = parquet.read_table(shard.images, schemas.IMAGES, ["image_id", "role", "source"])
    kept = parquet.read_table(shard.duplicates, schemas.DUPLICATES, ["image_id", "kept"])
    if not rows["image_id"].equals(kept["image_id"]):
        raise InputError(f"{shard.duplicates}: not the images of {shard.images}; run dedup again with --replace.")
    is_chosen = pc.and_(kept["kept"], pc.equal(rows["role"], role))
    if source is not None:
        is_chosen = pc.and_(is_chosen, pc.equal(rows["source"], source))
    chosen_ids = pc.unique(rows["image_id"].filter(is_chosen))
    ids, matrix = vectors.read_file(shard.vectors)
    vector_ids = pa.array(ids, pa.string())
    if missing := chosen_ids.filter(pc.invert(pc.is_in(chosen_ids, vector_ids))).to_pylist():
        raise InputError(f"{shard.vectors}: no vector of image {min(missing)}, which is in {shard.images}.")
    chosen_rows = np.flatnonzero(pc.is_in(vector_ids, chosen_ids).to_numpy(zero_copy_only=False))
    return vector_ids.take(pa.array(chosen_rows)).to_pylist(), matrix[chosen_rows]


def kept_images(run: RunFolder, columns: list[str]) -> Iterator[pa.Table]:
    """The given columns of the kept seed and pool images, one shard of ingest at a time."""
    images = require_manifest(run.ingest).paths(run.ingest, "images")
    duplicates = require_manifest(run.dedup).paths(run.dedup, "duplicates")
    for images_file, duplicates_file in zip(images, duplicates, strict=True):
        rows = parquet.read_table(images_file, schemas.IMAGES, columns)
        keep = parquet.read_table(duplicates_file, schemas.DUPLICATES, ["kept"])
        yield rows.filter(keep["kept"])


# Clusters


def read_centroids(folder: str, level: int = 0) -> np.ndarray:
    """The centroids (clusters, D) float32 of a level; the cluster stage writes them before it is done."""
    return npy.read_array(_recorded(folder, f"centroids-{level}.npy"))


def read_parents(folder: str, level: int) -> np.ndarray:
    """For each cluster of `level`, its cluster of the level above: (clusters,) int64."""
    return npy.read_array(_recorded(folder, f"parents-{level}.npy"))


def _recorded(folder: str, name: str) -> str:
    """The path of a file in `folder`, with its hash once the stage is done and its manifest names the file."""
    path, manifest = paths.join(folder, name), read_manifest(folder)
    records = () if manifest is None else manifest.shards
    hashes = (file.sha256 for record in records for file in record.files if file.name == name)
    return path if (sha256 := next(hashes, None)) is None else RecordedPath(path, sha256)


def read_assignments(folder: str, columns: list[str]) -> Iterator[pa.Table]:
    """The given columns of the assignments to the finest clusters (level 0), one file at a time."""
    for file in require_manifest(folder).paths(folder, "assignments"):
        table = parquet.read_table(file, schemas.ASSIGNMENTS, [*columns, "level"])
        yield table.filter(pc.equal(table["level"], 0))


def cluster_sizes(folder: str, num_clusters: int) -> np.ndarray:
    """The number of images in each of the finest clusters, (num_clusters,) int64."""
    sizes = np.zeros(num_clusters, np.int64)
    for table in read_assignments(folder, ["cluster_id"]):
        sizes += np.bincount(table["cluster_id"].to_numpy(), minlength=num_clusters)
    return sizes


# Retrieve, corpus and the table of images


def retrieved_tables(folder: str) -> Iterator[pa.Table]:
    """The rows of RETRIEVED of a finished retrieve, dataset by dataset, one file at a time."""
    for file in require_manifest(folder).paths(folder, "retrieved"):
        yield parquet.read_table(file, schemas.RETRIEVED)


def read_retrieved(folder: str) -> pa.Table:
    """All rows of RETRIEVED of a finished retrieve, dataset by dataset."""
    return pa.concat_tables([schemas.RETRIEVED.empty_table(), *retrieved_tables(folder)])


def corpus_tables(folder: str) -> list[RecordedPath]:
    """The tables of a finished pack, one for each tar, in the order of the tars."""
    return [file for file in require_manifest(folder).paths(folder, "corpus") if file.endswith(".parquet")]


def read_corpus(folder: str) -> pa.Table:
    """All rows of CORPUS of a finished pack, in the order of the tars."""
    return pa.concat_tables([parquet.read_table(file, schemas.CORPUS) for file in corpus_tables(folder)])


def read_images_table(folder: str, columns: list[str] | None = None) -> pa.Table:
    """All rows of IMAGES_TABLE, one for each unique image, with all columns or only `columns`.

    The images are in the order in which ingest lists them first. `folder` is the folder images/ of a run.
    """
    names = schemas.IMAGES_TABLE.names if columns is None else columns
    empty = pa.schema([schemas.IMAGES_TABLE.field(name) for name in names]).empty_table()
    return _read_all(folder, "images", schemas.IMAGES_TABLE, columns, empty)


def _read_all(folder: str, kind: str, schema: pa.Schema, columns: list[str] | None, empty: pa.Table) -> pa.Table:
    files = require_manifest(folder).paths(folder, kind)
    return pa.concat_tables([empty, *(parquet.read_table(file, schema, columns) for file in files)])
