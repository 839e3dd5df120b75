"""Closed, frozen settings read from TOML.

A config is the text of one file with the overrides `--set section.key=value`. Its profile and the defaults fill in the
settings that it leaves out (profiles.py). An unknown key is an error, and one message reports every problem.
`resolved_toml` gives the config with every default filled in, and with absolute paths.

    a relative path in           begins at
    a user's config              the folder of the config
    a shipped config             the folder of the config where the file is there, else the current folder
    --set                        the current folder

A shipped config is named without folder and ending: `demo`, `train/demo`.
"""

import difflib
import json
import os
import posixpath
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from curation import profiles
from curation.errors import ConfigError
from curation.files import paths

# Levels of tables and lists in a config. Assumed: the deepest config of ours has six; Python stops at some hundreds.
MAX_LEVELS = 32
# Characters of a value in a message.
MAX_SHOWN = 120
# The configs that are installed with the code.
SHIPPED_CONFIGS = Path(__file__).parents[1] / "pipelines" / "configs"


class Settings(BaseModel):
    """A frozen section of a config. The docstring under each field gives its meaning and unit."""

    # No infinities: JSON has none, so a plan with one would differ from itself after it is written and read.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


SettingsType = TypeVar("SettingsType", bound=Settings)


class NotInPlan:
    """Marks a field that has no effect on the bytes of an output: `Annotated[float, NotInPlan]`.

    Such a field may change between two runs of a stage; the stage is not done again.
    """


class IsPath:
    """Marks a field that holds paths of the user's files: `Annotated[str, IsPath]`, or a tuple of text.

    `load` makes them absolute. A command never writes to one of them.
    """


def plan_values(settings: Settings) -> dict[str, Any]:
    """The values of `settings` as JSON, without the fields marked NotInPlan here and in nested sections."""
    return settings.model_dump(mode="json", exclude=_not_in_plan(type(settings)))


def _not_in_plan(model: type[BaseModel]) -> dict[str, Any]:
    """The fields of `model` marked NotInPlan, as a nested mapping for the `exclude` of pydantic."""
    excluded: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if NotInPlan in field.metadata:
            excluded[name] = True
        elif nested := _not_in_plan_of_type(field.annotation):
            excluded[name] = nested
    return excluded


def _not_in_plan_of_type(annotation: Any) -> dict[str, Any]:
    """The same for the type of a field: a model, a union, or a tuple of models."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _not_in_plan(annotation)
    nested: dict[str, Any] = {}
    for argument in get_args(annotation):
        nested |= _not_in_plan_of_type(argument)
    return {"__all__": nested} if nested and get_origin(annotation) is tuple else nested


def load(
    model: type[SettingsType], path: str, overrides: Iterable[str] = (), *, section: str | None = None
) -> SettingsType:
    """The settings in the TOML file at `path` (any fsspec URL), with `a.b=value` overrides, validated as `model`.

    `path` may be the name of a shipped config (`find`). Relative paths become absolute, as the module says. With
    `section`, only that table of the file is read, and the file's profile fills in what it leaves out (profiles.py).
    Overrides still begin with the section (`embed.device=cuda`). Raises ConfigError, which lists every problem with its
    dotted key and value.
    """
    path, overrides = find(path), tuple(overrides)
    try:
        text = paths.read_bytes(path).decode("utf-8-sig")  # editors of Windows write a byte order mark
    except FileNotFoundError:
        raise ConfigError(
            f"No config file at '{path}'. Give the path of a TOML file with --config, or the name of a shipped config: "
            f"{', '.join(shipped_names())}."
        ) from None
    except OSError as error:
        raise ConfigError(f"Cannot read the config '{path}': {error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error}). A config is TOML text.") from None
    try:
        values = _read_toml(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    if section is None:
        settings = parse(model, values, overrides, origin=path)
    else:
        settings = parse_section(model, values, overrides, section=section, origin=path)
    typed = [_override_path(override) for override in overrides]

    def absolute(text: str, location: tuple[str, ...]) -> str:
        is_typed = any(location[: len(key)] == key for key in typed)
        return os.path.join(os.getcwd(), text) if is_typed else _beside(path, text)

    return with_absolute_paths(settings, absolute, (section,) if section else ())


def find(path: str) -> str:
    """The path of a config: that of the shipped one with this name (`demo`), unless there is a file at `path`."""
    shipped = SHIPPED_CONFIGS / f"{path}.toml"
    is_name = re.fullmatch(r"[\w-]+(/[\w-]+)?", path) is not None
    return str(shipped) if is_name and shipped.is_file() and not os.path.exists(path) else path


def shipped_names() -> list[str]:
    """The names of the shipped configs."""
    names = (file.relative_to(SHIPPED_CONFIGS).with_suffix("") for file in SHIPPED_CONFIGS.rglob("*.toml"))
    return sorted(name.as_posix() for name in names if not name.name.endswith("_concepts"))


def _beside(config: str, text: str) -> str:
    """The path that a config means by the relative path `text`."""
    folder = posixpath.dirname(config) if "://" in config else os.path.dirname(os.path.abspath(config))
    path = paths.join(folder, text)
    is_shipped = SHIPPED_CONFIGS.resolve() in Path(config).resolve().parents
    return os.path.join(os.getcwd(), text) if is_shipped and not os.path.exists(path) else path


def with_absolute_paths(
    settings: SettingsType, absolute: Callable[[str, tuple[str, ...]], str], location: tuple[str, ...] = ()
) -> SettingsType:
    """`settings` with `absolute(path, location)` for each relative path of its fields marked IsPath.

    A location is the names and indices that lead to a field. Texts that are absolute paths or URLs stay.
    """

    def converted(value: Any, where: tuple[str, ...], is_path: bool) -> Any:
        match value:
            case str() if is_path and value and "://" not in value and not os.path.isabs(value):
                path = absolute(value, where)
                return path if "://" in path else os.path.normpath(path)
            case Settings():
                return with_absolute_paths(value, absolute, where)
            case tuple():
                return tuple(converted(item, (*where, str(number)), is_path) for number, item in enumerate(value))
            case dict():
                return {key: converted(item, (*where, str(key)), is_path) for key, item in value.items()}
        return value

    changed = {}
    for name, field in type(settings).model_fields.items():
        before = getattr(settings, name)
        if (after := converted(before, (*location, name), IsPath in field.metadata)) != before:
            changed[name] = after
    return settings.model_copy(update=changed)


def paths_in(settings: Settings) -> Iterator[str]:
    """The values of all fields marked IsPath, in nested sections too."""

    def texts(value: Any, is_path: bool) -> Iterator[str]:
        match value:
            case str() if is_path:
                yield value
            case Settings():
                yield from paths_in(value)
            case tuple():
                for item in value:
                    yield from texts(item, is_path)
            case dict():
                yield from texts(tuple(value.values()), is_path)

    for name, field in type(settings).model_fields.items():
        yield from texts(getattr(settings, name), IsPath in field.metadata)


def parse_section(
    model: type[SettingsType], values: dict[str, Any], overrides: Iterable[str], *, section: str, origin: str
) -> SettingsType:
    """As `load` with a `section`, for `values` that are not in a file. `origin` names their source in messages."""
    for override in overrides:
        head = override.partition("=")[0].strip().partition(".")[0]
        if head not in (section, "profile", *values):
            raise ConfigError(
                f"--set {override}: there is no section '{head}' in {origin}{nearest(head, [section, *values])}. "
                f"The settings of this command begin with '{section}.'"
            )
        values = _with_override(values, override)
    if not isinstance(values.get(section, {} if "ingest" in values else None), dict):
        raise ConfigError(
            f"{origin}: no section [{section}]; this stage needs it. Found: {', '.join(values) or 'none'}."
        )
    known = profiles.PROFILES
    if (profile := values.get("profile", profiles.DEFAULT)) not in list(known):
        if profile in list(profiles.FORMER):
            raise ConfigError(f"{origin}: {profiles.FORMER[profile]}.")
        raise ConfigError(
            f"{origin}: no profile is named {_described(profile)}{nearest(str(profile), known)}. Choose from: "
            f"{', '.join(known)}."
        )
    return parse(model, profiles.fill(values).get(section, {}), origin=f"{origin} [{section}]")


def parse(
    model: type[SettingsType], values: Mapping[str, Any], overrides: Iterable[str] = (), *, origin: str
) -> SettingsType:
    """Validate `values`, with `a.b=value` overrides, as `model`. `origin` names their source in messages.

    In a text that begins with `~`, the home folder takes its place: it is a path. So outputs hold the absolute path.
    """
    tree = dict(values)
    for override in overrides:
        tree = _with_override(tree, override)
    tree = _with_home(tree)
    try:
        # JSON mode turns the lists of TOML into tuples and its strings into enums or paths; the rest is strictly typed.
        return model.model_validate_json(_to_json(tree))
    except ValidationError as error:
        lines = _problems(error, model, tree)
        problems = "\n".join(f"  {line}" for line in lines)
        plural = "s" if len(lines) > 1 else ""
        raise ConfigError(f"{origin}: {len(lines)} problem{plural} in the config:\n{problems}") from None


def resolved_toml(settings: Settings) -> str:
    """The settings as TOML text with every default filled in. Reading the text gives equal settings."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


def write_resolved(settings: Settings, path: str) -> None:
    """Write `resolved_toml` to `path`, unless the file has this text already."""
    text = resolved_toml(settings).encode()
    if not paths.exists(path) or paths.read_bytes(path) != text:
        paths.write_bytes(path, text)


def _read_toml(text: str) -> dict[str, Any]:
    """The values of a TOML text. Raises TOMLDecodeError, also for more than MAX_LEVELS levels."""
    try:
        values = tomllib.loads(text)
    except RecursionError:
        values = None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise tomllib.TOMLDecodeError(str(error)) from None
    if values is None or _num_levels(values) > MAX_LEVELS:
        raise tomllib.TOMLDecodeError(f"tables and lists of more than {MAX_LEVELS} levels")
    return values


def _num_levels(value: Any) -> int:
    """The number of levels of tables and lists in `value`."""
    count, level = 0, [value]
    while level := [node for node in level if isinstance(node, dict | list)]:
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
        count += 1
    return count


def _with_home(value: Any) -> Any:
    """`value` with the home folder in place of the `~` at the beginning of each text."""
    if isinstance(value, dict):
        return {key: _with_home(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_with_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


def _to_json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, default=str)


def _override_path(override: str) -> tuple[str, ...]:
    """The names and indices that lead to the setting of an `a.b=value`."""
    return tuple(override.partition("=")[0].strip().split("."))


def _with_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `tree` with one `a.b=value` set. A number in the path is an index into a list."""
    _, separator, text = override.partition("=")
    path = list(_override_path(override))
    if not separator or not all(path):
        raise ConfigError(f"--set {_cut(override)}: expected 'section.key=value'.")
    if len(path) > MAX_LEVELS:
        raise ConfigError(f"--set {_cut(override)}: more than {MAX_LEVELS} levels.")
    try:
        value = _read_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # an unquoted word is text: --set embed.device=cuda
    return dict(_set(tree, path, value, override))


def _set(node: Any, path: list[str], value: Any, override: str) -> Any:
    """A copy of `node` (a value, list or table) with `value` at `path`; `override` is named in messages."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        if not head.isdecimal() or int(head) >= len(node):
            raise ConfigError(f"--set {override}: '{head}' is not an index into a list of {len(node)}.")
        index = int(head)
        return [*node[:index], _set(node[index], rest, value, override), *node[index + 1 :]]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: '{head}' lies inside a value ({_described(node)}), not inside a section.")
    return node | {head: _set(node.get(head, {} if rest else None), rest, value, override)}


def _problems(error: ValidationError, model: type[BaseModel], tree: Mapping[str, Any]) -> list[str]:
    """One line for each problem, with its dotted key and value."""
    lines: dict[str, str] = {}
    for item in error.errors():
        path = _path_in(tree, model, item["loc"])
        key, value = _cut(".".join(path)), item["input"]
        messages = item["msg"].removeprefix("Value error, ").splitlines()
        match item["type"]:
            case "extra_forbidden":
                suggestion = nearest(path[-1], _keys_of(model, path[:-1]))
                lines[key] = f"Unknown key: '{key}'{suggestion}. Found: {_described(value)}"
            case "missing":
                lines[key] = f"Missing key: '{key}'"
            case "json_invalid":  # a lone surrogate, of an option that is no UTF-8
                lines[key] = "a text is not valid Unicode; correct the characters of --set and of the config"
            case "value_error" if isinstance(value, dict | list | tuple):  # the message names the settings
                lines |= {message: f"'{key}': {message}" if key else message for message in messages}
            case kind:
                message = "Input should be a table" if kind in ("model_type", "dict_type") else "; ".join(messages)
                if kind == "literal_error" and isinstance(value, str):
                    message += nearest(value, re.findall("'([^']+)'", item["ctx"]["expected"]))
                # A union gives one problem for each of its alternatives.
                before = lines[key].rpartition(". Found: ")[0] + ", or: " if key in lines else f"'{key}': "
                ending = "" if value is None else f". Found: {_described(value)}"
                lines[key] = before + message + ending
    return list(lines.values())


def _path_in(tree: Any, model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys and indices of `location` that are in `tree`, or are settings of `model` that `tree` leaves out.

    Pydantic's locations also name alternatives of unions and its own functions, which mean nothing to a user.
    """
    path: list[str] = []
    for part in location:
        is_key = isinstance(tree, Mapping) and part in tree
        if is_key or (isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree)):
            tree = tree[part]
        elif part not in _keys_of(model, path):
            continue
        path.append(str(part))
    return path


def _keys_of(annotation: Any, path: Sequence[str]) -> list[str]:
    """The names of the settings at `path` below the type `annotation`; of all alternatives of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not path:
            return list(annotation.model_fields)
        field = annotation.model_fields.get(path[0])
        return _keys_of(field.annotation, path[1:]) if field else []
    rest = path[1:] if get_origin(annotation) in (tuple, dict) else path
    return [name for argument in get_args(annotation) for name in _keys_of(argument, rest)]


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the known name that is most like `name`; empty where none is."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def _described(value: Any) -> str:
    """A value for a message: a table or a list by its size, any other value itself."""
    match value:
        case dict() if value:
            return "a table with the keys " + _cut(", ".join(map(str, value)))
        case dict():
            return "an empty table"
        case list() | tuple() if any(isinstance(item, dict | list | tuple) for item in value):
            return f"a list of {len(value)}"
        case _:
            return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
