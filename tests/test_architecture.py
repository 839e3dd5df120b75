"""The house keeps its shape: who may import whom, and one door each for ray, faiss and OpenCV."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("curation", "training", "evaluation", "pipelines")
MAY_IMPORT = {
    "curation": {"curation"},
    "training": {"training", "curation"},
    "evaluation": {"evaluation", "curation"},
    "pipelines": {"pipelines", "curation", "training", "evaluation"},
}
DOORS = {
    "ray": {"curation/engine/ray_runner.py"},
    "faiss": {"curation/index.py"},
    "cv2": {"curation/copies/compare_thumbnails.py"},
}
NOWHERE = {"torchvision"}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def sources() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) > 20
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_their_direction(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    name = str(path.relative_to(ROOT))
    for module in imported_modules(path):
        top = module.partition(".")[0]
        if top in PACKAGES:
            assert top in MAY_IMPORT[package], f"{name} imports {module}"
        assert top not in NOWHERE, f"{name} imports {module}"
        if top in DOORS and package == "curation":
            assert name in DOORS[top], f"{name} imports {module}; its door is {DOORS[top]}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_why_they_exist(path: Path) -> None:
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def names_process_groups(node: ast.AST) -> bool:
    """Whether `node` imports torch.distributed, or reaches it through `torch`."""
    match node:
        case ast.Import():
            return any(alias.name.startswith("torch.distributed") for alias in node.names)
        case ast.ImportFrom():
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            return any(name.startswith("torch.distributed") for name in full)
        case ast.Attribute():
            return ast.unparse(node) == "torch.distributed"
    return False


def test_process_groups_have_few_doors() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(names_process_groups(node) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert found == {"curation/engine/ranks.py", "training/distributed.py", "training/checkpoint.py"}
