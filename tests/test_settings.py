"""The list of all settings: a new one is a cost, and states in its docstring who would set it.

A field counts where a config file can set it. Sections count too: they are what a user has to find.
"""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

from curation.config import Settings

ROOT = Path(__file__).parents[1]
PACKAGES = ("curation", "training", "evaluation", "pipelines")
LISTED = Path(__file__).with_name("settings.txt")


def settings_classes() -> list[type[Settings]]:
    """Every subclass of Settings in the four packages, by name."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(ROOT / package)], prefix=package + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    classes, waiting = set(), [Settings]
    while waiting:
        for subclass in waiting.pop().__subclasses__():
            if subclass.__module__.partition(".")[0] in PACKAGES and subclass not in classes:
                classes.add(subclass)
                waiting.append(subclass)
    return sorted(classes, key=lambda one: (one.__module__, one.__qualname__))


def test_the_list_of_settings_is_the_one_in_the_file() -> None:
    names = {f"{one.__module__}.{one.__name__}.{field}" for one in settings_classes() for field in one.model_fields}
    listed = LISTED.read_text().split()
    assert listed == sorted(listed)
    assert sorted(names - set(listed)) == [], (
        "new: add each to tests/settings.txt, with a docstring that says who sets it"
    )
    assert sorted(set(listed) - names) == [], "gone: delete each from tests/settings.txt"


@pytest.mark.parametrize("config_class", settings_classes(), ids=lambda one: f"{one.__module__}.{one.__name__}")
def test_every_setting_has_a_docstring_or_a_description(config_class: type[Settings]) -> None:
    source = Path(importlib.import_module(config_class.__module__).__file__ or "")
    (definition,) = [
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == config_class.__name__
    ]
    documented = {
        field.target.id
        for field, below in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }
    own_fields = {name for name in config_class.model_fields if name in config_class.__annotations__}
    described = {name for name, field in config_class.model_fields.items() if field.description}
    assert sorted(own_fields - documented - described) == []
