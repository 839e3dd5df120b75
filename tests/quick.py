"""The tests that a change touches, the nearest first: `make test-quick`, or `make test-quick ARGS="--since main~3"`.

A test file is near a changed module when few imports lie between them. The name of a module in a string counts as an
import (`python -m pipelines.curate`). For a changed file of another kind, test files that name it are near.

    pipelines/curate.py -> pipelines/main_path.py -> curation/pack.py         changed: curation/pack.py
             2                      1                     0
    tests/pipelines/test_curate.py names pipelines.curate: 3.    tests/curation/test_pack.py imports curation.pack: 1.

After the time limit no further test starts. The tests that did not run are counted; `make test` runs all.
"""

import argparse
import ast
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.test_architecture import PACKAGES, ROOT, imported_names, name_of

# Seconds after which no further test starts, of the 90 that the command may take. Tests of the whole pipeline take 15.
SECONDS = 75
# These take a second and hold for every change of code.
ALWAYS = ("tests/test_architecture.py", "tests/test_settings.py")
# Test files with a target of their own; `make test` does not run their tests.
LEFT_OUT = "tests/cluster/"


def changed_files(since: str | None) -> list[str]:
    """Paths changed since the commit `since`, with changes not committed and new files.

    By default: since the branch left its upstream, else since it left main, else since the last commit.
    """
    if since is None:
        since = next((base for name in ("@{upstream}", "main") if (base := _merge_base(name))), "HEAD")
    changed = _git("diff", "--name-only", since) + _git("ls-files", "--others", "--exclude-standard")
    return sorted(set(changed))


def _merge_base(name: str) -> str:
    """The commit that HEAD and `name` share; empty when there is no such name."""
    command = ["git", "merge-base", "HEAD", name]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def importers_of(files: Mapping[str, str]) -> dict[str, set[str]]:
    """For the path of each module and test file, the files that import it; from the texts of all of them by path."""
    modules = {name_of(ROOT / path): path for path in files}
    importers: dict[str, set[str]] = {path: set() for path in files}
    for path, text in files.items():
        for name in _named_modules(path, text, modules):
            importers[modules[name]].add(path)
    return importers


def distances(changed: Sequence[str], files: Mapping[str, str], importers: Mapping[str, set[str]]) -> dict[str, int]:
    """The number of imports between each test file and the nearest changed file, for the test files that reach one."""
    # Of a changed file that is no module, the test files that name it. A deleted module is imported by no test.
    others = [Path(path).name for path in changed if Path(path).suffix != ".py"]
    tests = [path for path in files if path.startswith("tests/")]
    distance = {path: 1 for path in tests if any(name in files[path] for name in others)}
    distance |= {path: 0 for path in changed if path in files}
    queue = deque(sorted(distance, key=distance.__getitem__))
    while queue:
        path = queue.popleft()
        for importer in importers[path] - distance.keys():
            distance[importer] = distance[path] + 1
            queue.append(importer)
    return {
        path: steps
        for path, steps in distance.items()
        if Path(path).name.startswith("test_") and not path.startswith(LEFT_OUT)
    }


def _named_modules(path: str, text: str, modules: Mapping[str, str]) -> set[str]:
    names = set(imported_names(ROOT / path))
    names |= {name.rpartition(".")[0] for name in names}
    if path.startswith("tests/"):
        strings = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
        names |= {string for string in strings if isinstance(string, str)}
    return names & modules.keys() - {name_of(ROOT / path)}


def repository_files() -> dict[str, str]:
    """The path and the text of every module and test file."""
    folders = (*PACKAGES, "tests")
    return {
        str(path.relative_to(ROOT)): path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")
    }


def main() -> int:
    """Run the tests; returns pytest's exit status."""
    parser = argparse.ArgumentParser(prog="make test-quick", description=__doc__.splitlines()[0])
    parser.add_argument("--since", metavar="COMMIT", help="Take the changes since this commit.")
    parser.add_argument("--processes", default="2", help="Files of tests that run at once.")
    options = parser.parse_args()
    try:
        changed = changed_files(options.since)
    except subprocess.CalledProcessError as error:
        print(error.stderr.strip(), file=sys.stderr)
        return 2
    if not changed:
        print("No file has changed, so no test runs. make test runs all.")
        return 0
    files = repository_files()
    distance = distances(changed, files, importers_of(files))
    if any(path.endswith(".py") for path in changed):
        distance |= dict.fromkeys(ALWAYS, 0)
    names = {f"test_{Path(path).name}" for path in changed}
    tests = sorted(distance, key=lambda path: (distance[path], Path(path).name not in names, path))
    print(f"{len(changed)} files have changed; {len(tests)} test files reach them. The nearest run first.", flush=True)
    if not tests:
        return 0
    command = [sys.executable, "-m", "pytest", "-q", "-n", options.processes, "--dist", "loadfile"]
    command += ["--no-loadscope-reorder", "-m", "not demo and not slow and not cluster", f"--stop-after={SECONDS}"]
    return subprocess.run([*command, *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
