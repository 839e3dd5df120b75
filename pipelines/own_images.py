"""The config of a run from the paths of a user's images alone.

    --seeds lesions=data/lesions --pool data/crawl --holdout data/test

A source is `NAME=PATH` or a path, whose last part is then the name. How its images are stored is seen from the names of
its files, and written into the config: a run made from such a config reads the sources the same way again.
"""

import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.config import parse, with_absolute_paths
from curation.errors import ConfigError, InputError
from curation.files import paths
from curation.images import listing
from curation.images.sources import Layout, Role, SourceConfig
from pipelines.main_path import CurateConfig

# The sources of one role: paths, each with a name of its own or not, or a mapping of names to paths.
Sources = str | Sequence[str] | Mapping[str, str] | None

# The roles that every run needs, with the option that gives them.
REQUIRED: dict[Role, str] = {"seed": "seeds NAME=PATH", "pool": "pool PATH"}
ARCHIVES: dict[str, Layout] = {"tar": "webdataset", "parquet": "parquet"}


def make_config(
    *,
    seeds: Sources,
    pool: Sources,
    holdout: Sources = (),
    model: str | None = None,
    weights: str | None = None,
    k: int = 4,
    profile: str = "photos",
    overrides: Sequence[str] = (),
) -> CurateConfig:
    """The config of a run. Every seed is packed, with the `k` nearest images of the pool.

    model, weights: the embedder that compares content, and its checkpoint. overrides: `a.b=value`, as for --set.
    Raises ConfigError with a line for each problem of the paths.
    """
    given: dict[Role, Sources] = {"seed": seeds, "pool": pool, "holdout": holdout}
    sources, problems = [], []
    for role, of_role in given.items():
        for name, path in _named(of_role).items():
            try:
                sources.append({"name": name, "role": role, "path": path, **_storage(path)})
            except InputError as error:
                problems.append(f"{role} '{name}': {error}")
    paths_of: dict[str, list[str]] = {}
    for source in sources:
        paths_of.setdefault(str(source["name"]), []).append(str(source["path"]))
    problems += [
        f"{len(given_paths)} sources have the name '{name}': {', '.join(given_paths)}. Give each a name of its own: "
        "NAME=PATH."
        for name, given_paths in paths_of.items()
        if len(given_paths) > 1
    ]
    problems += [
        f"no {role} is given. Name at least one path: --{option}"
        for role, option in REQUIRED.items()
        if not _named(given[role])
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    embedder = {key: value for key, value in (("name", model), ("weights", weights)) if value is not None}
    datasets = [
        {"name": source["name"], "as_is": True, "retrieval": "sample", "k": k}
        for source in sources
        if source["role"] == "seed"
    ]
    values = {
        "profile": profile,
        "ingest": {"sources": sources},
        "embed": {"embedder": embedder},
        "retrieve": {"datasets": datasets},
    }
    config = parse(CurateConfig, values, overrides, origin="the options of the command")
    return with_absolute_paths(config, lambda path, _: os.path.abspath(path))


def _named(sources: Sources) -> dict[str, str]:
    """The paths by name. Raises ConfigError for a source without a path, and for two paths with one name."""
    if isinstance(sources, Mapping):
        given = list(sources.items())
    else:
        given = [_split(word) for word in ([sources] if isinstance(sources, str) else sources or ())]
    result: dict[str, str] = {}
    for name, path in given:
        if not isinstance(path, str) or not path:
            raise ConfigError(f"A source is the path of a folder or a file, as text. Found: {path!r}")
        if result.setdefault(name, path) != path:
            raise ConfigError(
                f"Two sources have the name '{name}': '{result[name]}' and '{path}'. Give each a name of its own: "
                "NAME=PATH."
            )
    return {name: os.path.expanduser(path) for name, path in result.items()}


def _split(word: str) -> tuple[str, str]:
    """The name and the path of `NAME=PATH`, or of a path alone."""
    if not isinstance(word, str):
        return "", word
    name, separator, path = word.partition("=")
    if separator and name and "/" not in name and not os.path.exists(word):
        return name, path
    name = posixpath.basename(word.rstrip("/")) if "://" in word else os.path.basename(os.path.abspath(word))
    return name.partition(".")[0] if listing.extension(name) in ARCHIVES else name, word


def _storage(path: str) -> dict[str, Any]:
    """The settings of a source that say how its images are stored. Raises InputError where that cannot be seen."""
    if not paths.exists(path):
        raise InputError(f"there is nothing at '{path}'. Correct the path.")
    if not paths.is_folder(path):
        layout = ARCHIVES.get(listing.extension(path))
        if layout is None:
            raise InputError(f"'{path}' is a file. Give a folder of images, a .tar or a .parquet file.")
        return {"layout": layout} | (_image_column(path) if layout == "parquet" else {})
    stems: dict[str, set[str]] = {ending: set() for ending in ARCHIVES}
    num_images, first_parquet = 0, ""
    for entry in listing.walk(path):
        if listing.is_system_file(entry.path):
            continue
        ending = listing.extension(entry.path)
        num_images += ending in listing.IMAGE_EXTENSIONS
        if ending in stems:
            stems[ending].add(entry.path.rpartition(".")[0])
            if ending == "parquet":
                first_parquet = min(filter(None, (first_parquet, entry.path)))
    tars, parquets = stems["tar"], stems["parquet"] - stems["tar"]  # img2dataset writes x.parquet beside x.tar
    kinds = {"image files": num_images, "tars": len(tars), "Parquet files": len(parquets)}
    if sum(map(bool, kinds.values())) > 1:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
        raise InputError(
            f"'{path}' holds {counts}, and one source is stored in one way. Give the path of a folder or a file with "
            "one of them, or write a config (seedbed init) with a source for each layout."
        )
    if tars:
        return {"layout": "webdataset"}
    if parquets:
        return {"layout": "parquet"} | _image_column(paths.join(path, first_parquet))
    return {"layout": "folder"}


def _image_column(path: str) -> dict[str, str]:
    """The setting `image_column` for a Parquet file, empty for the default. Raises InputError where it is unclear."""
    with paths.open_read(path) as file:
        try:
            schema = pq.read_schema(file)
        except pa.ArrowInvalid as error:
            raise InputError(f"'{path}' is no readable Parquet file: {error}.") from None
    columns = [name for field in schema for name in _binary_columns(field, "")]
    default = SourceConfig.model_fields["image_column"].default
    if default in columns:
        return {}
    if len(columns) == 1:
        return {"image_column": columns[0]}
    raise InputError(
        f"'{path}' has {len(columns)} columns of bytes ({', '.join(columns) or 'none'}). Write a config (seedbed init) "
        "that names the column of the images in image_column."
    )


def _binary_columns(field: pa.Field, prefix: str) -> list[str]:
    """The dotted names of the columns of bytes in `field`."""
    name = prefix + field.name
    if pa.types.is_struct(field.type):
        return [column for child in field.type for column in _binary_columns(child, f"{name}.")]
    is_bytes = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    return [name] if is_bytes else []
