"""Closed, frozen settings read from TOML.

An unknown key is an error, every problem is reported at once, and nothing is merged from elsewhere: what the file says,
then what `--set section.key=value` says on top, is the whole config. `resolved_toml` writes it back out with every
default filled in.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from curation import profiles
from curation.errors import ConfigError
from curation.files import paths


class Settings(BaseModel):
    """A frozen section of a config. A docstring under each field gives its meaning and unit."""

    # No infinities: JSON has none, so a plan that holds one would not equal itself once written.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


SettingsType = TypeVar("SettingsType", bound=Settings)


class NotInPlan:
    """Marks a field that guards the work of a stage without shaping its bytes: `Annotated[float, NotInPlan]`.

    Such a field may change between two runs of a stage without the stage being done again.
    """


def plan_values(settings: Settings) -> dict[str, Any]:
    """The values of `settings` as JSON, without the fields that are marked NotInPlan, in sections below too."""
    return settings.model_dump(mode="json", exclude=_not_in_plan(type(settings)))


def _not_in_plan(model: type[BaseModel]) -> dict[str, Any]:
    """The fields of `model` marked NotInPlan, as the mapping of mappings that pydantic excludes by."""
    excluded: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if NotInPlan in field.metadata:
            excluded[name] = True
            continue
        for section in _sections(field.annotation):
            if nested := _not_in_plan(section):
                excluded[name] = nested
    return excluded


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field holds: itself, or one of a union."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def load(
    model: type[SettingsType], path: str, overrides: Iterable[str] = (), *, section: str | None = None
) -> SettingsType:
    """Read the TOML file at `path` (any fsspec URL), apply `a.b=value` overrides, and check it all against `model`.

    With `section`, only that table of the file is read, filled in by the profile that the file names (see profiles.py);
    overrides still name it in front (`embed.device=cuda`).
    Raises ConfigError listing every problem with its dotted key and the value found.
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
    """As `load`, of `values` that are not in a file; `origin` names them in messages."""
    for override in overrides:
        values = _with_override(values, override)
    if not isinstance(values.get(section), dict):
        raise ConfigError(
            f"{origin}: no section [{section}], which this stage reads. Found: {', '.join(values) or 'none'}."
        )
    return parse(model, profiles.fill(values)[section], origin=f"{origin} [{section}]")


def parse(
    model: type[SettingsType], values: Mapping[str, Any], overrides: Iterable[str] = (), *, origin: str
) -> SettingsType:
    """Check `values`, with `a.b=value` overrides applied, against `model`. `origin` names the source in messages."""
    tree = dict(values)
    for override in overrides:
        tree = _with_override(tree, override)
    try:
        # Through JSON mode, so that TOML's lists become tuples and its strings become enums or paths, strictly typed.
        return model.model_validate_json(_to_json(tree))
    except ValidationError as error:
        problems = "\n".join(f"  {line}" for line in _problems(error))
        count = error.error_count()
        raise ConfigError(f"{origin}: {count} problem{'s' if count > 1 else ''} in the config:\n{problems}") from None


def resolved_toml(settings: Settings) -> str:
    """The settings as TOML text with every default filled in; reading it back gives equal settings."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))


def write_resolved(settings: Settings, path: str) -> None:
    """Write `resolved_toml` to `path`, unless the file already holds this text."""
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
        value = text  # a bare word is text: --set embed.device=cuda
    return dict(_set(tree, path, value, override))


def _set(node: Any, path: list[str], value: Any, override: str) -> Any:
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
