"""Closed, frozen settings read from TOML.

A config is the text of one file with the overrides `--set section.key=value`. Its profile and the defaults fill in the
settings that it leaves out (profiles.py). An unknown key is an error, and one message reports every problem.
`resolved_toml` gives the config with every default filled in.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from curation import profiles
from curation.errors import ConfigError
from curation.files import paths


class Settings(BaseModel):
    """A frozen section of a config. The docstring under each field gives its meaning and unit."""

    # No infinities: JSON has none, so a plan with one would differ from itself after it is written and read.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


SettingsType = TypeVar("SettingsType", bound=Settings)


class NotInPlan:
    """Marks a field that has no effect on the bytes of an output: `Annotated[float, NotInPlan]`.

    Such a field may change between two runs of a stage; the stage is not done again.
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

    With `section`, only that table of the file is read, and the file's profile fills in what it leaves out
    (profiles.py). Overrides still begin with the section (`embed.device=cuda`). Raises ConfigError, which lists every
    problem with its dotted key and value.
    """
    try:
        text = paths.read_bytes(path).decode()
    except FileNotFoundError:
        raise ConfigError(f"No config file at '{path}'. Give the path of a TOML file with --config.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read the config '{path}': {error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error}). A config is TOML text.") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    if section is None:
        return parse(model, values, overrides, origin=path)
    return parse_section(model, values, overrides, section=section, origin=path)


def parse_section(
    model: type[SettingsType], values: dict[str, Any], overrides: Iterable[str], *, section: str, origin: str
) -> SettingsType:
    """As `load` with a `section`, for `values` that are not in a file. `origin` names their source in messages."""
    for override in overrides:
        values = _with_override(values, override)
    if not isinstance(values.get(section), dict):
        raise ConfigError(
            f"{origin}: no section [{section}]; this stage needs it. Found: {', '.join(values) or 'none'}."
        )
    return parse(model, profiles.fill(values)[section], origin=f"{origin} [{section}]")


def parse(
    model: type[SettingsType], values: Mapping[str, Any], overrides: Iterable[str] = (), *, origin: str
) -> SettingsType:
    """Validate `values`, with `a.b=value` overrides, as `model`. `origin` names their source in messages."""
    tree = dict(values)
    for override in overrides:
        tree = _with_override(tree, override)
    try:
        # JSON mode turns the lists of TOML into tuples and its strings into enums or paths; the rest is strictly typed.
        return model.model_validate_json(_to_json(tree))
    except ValidationError as error:
        problems = "\n".join(f"  {line}" for line in _problems(error))
        count = error.error_count()
        raise ConfigError(f"{origin}: {count} problem{'s' if count > 1 else ''} in the config:\n{problems}") from None


def resolved_toml(settings: Settings) -> str:
    """The settings as TOML text with every default filled in. Reading the text gives equal settings."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


def write_resolved(settings: Settings, path: str) -> None:
    """Write `resolved_toml` to `path`, unless the file has this text already."""
    text = resolved_toml(settings).encode()
    if not paths.exists(path) or paths.read_bytes(path) != text:
        paths.write_bytes(path, text)


def _to_json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, default=str)


def _with_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `tree` with one `a.b=value` set. A number in the path is an index into a list."""
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(f"--set {override}: expected 'section.key=value'.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
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
        raise ConfigError(f"--set {override}: '{head}' lies inside a value ({node!r}), not inside a section.")
    return node | {head: _set(node.get(head, {} if rest else None), rest, value, override)}


def _problems(error: ValidationError) -> list[str]:
    """One line for each problem, with its dotted key and value."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        match item["type"]:
            case "extra_forbidden":
                lines.append(f"Unknown key: '{key}' (value {item['input']!r})")
            case "missing":
                lines.append(f"Missing key: '{key}'")
            case _:
                where = f"'{key}': " if key else ""
                lines.append(f"{where}{item['msg'].removeprefix('Value error, ')}. Found: {_short(item['input'])}")
    return lines


def _short(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
