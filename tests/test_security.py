"""No module executes the contents of a file: the syntax trees of all modules, against a list of functions that would.

`np.save` and `torch.save` are not on the list, because the checked functions read their files. Nor is torch's reader of
its own checkpoints, whose index is a pickle (training/checkpoint.py says whose checkpoints may be read).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("curation", "training", "evaluation", "pipelines", "deploy", "tests")

# Modules whose readers call functions that the file names.
UNPICKLERS = frozenset(
    "pickle _pickle cPickle cloudpickle dill shelve joblib marshal jsonpickle ray.cloudpickle torch.package".split()
)
# Functions that do so, or that pass text to a shell or to the interpreter. Any mention counts, since a function can be
# passed as an argument.
FUNCTIONS = frozenset(
    "os.system os.popen subprocess.getoutput subprocess.getstatusoutput shutil.unpack_archive pandas.read_pickle "
    "torch.jit.load torch.hub.load torch.hub.load_state_dict_from_url yaml.load yaml.load_all yaml.full_load "
    "yaml.full_load_all yaml.unsafe_load yaml.unsafe_load_all yaml.Loader yaml.UnsafeLoader yaml.FullLoader "
    "asyncio.create_subprocess_shell tempfile.mktemp ssl._create_unverified_context".split()
)
BUILTINS = frozenset({"eval", "exec", "__import__"})
# Functions that are safe with one argument only, which every call must give, whatever its default.
ONLY_WITH = {"torch.load": "weights_only", "numpy.load": "allow_pickle"}
# Arguments with the one value that every call may give, as a constant.
ARGUMENTS = {"weights_only": True, "allow_pickle": False, "shell": False}
# Methods that write files to paths that an archive names.
METHODS = frozenset({"extract", "extractall", "unpack_archive"})
# webdataset and other libraries run the rest of such a URL as a command line.
PIPE = "pipe" + ":"

# Files and names that they may use, with the reason.
EXCEPTIONS = {
    (
        "evaluation/data/plain_pickle.py",
        "pickle",
    ): "reads published ground truth; calls no function that a pickle names",
    ("tests/evaluation/data/test_plain_pickle.py", "pickle"): "makes hostile pickles for its tests",
    ("tests/evaluation/data/test_plain_pickle.py", "exec"): "is named in such a pickle",
    ("tests/test_tables_doc.py", "exec"): "runs the Python block of docs/tables.md",
    ("tests/evaluation/test_retrieval.py", "pickle"): "writes ground truth in the published format",
    ("tests/curation/files/test_npy.py", "allow_pickle"): "writes a matrix of objects, which must be refused",
    ("tests/curation/files/test_vectors.py", "allow_pickle"): "writes a matrix of objects, which must be refused",
}


def offences(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of each use in a module of a name in the lists above."""
    tree = ast.parse(text)
    names = _imported_names(tree)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    checked: set[int] = set()  # functions of calls with the argument that makes them safe
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                for name in _modules(node):
                    parts = name.split(".")
                    for end in range(1, len(parts) + 1):
                        if (prefix := ".".join(parts[:end])) in UNPICKLERS | FUNCTIONS:
                            yield node.lineno, prefix
            case ast.Call(func=function, keywords=keywords):
                given = {word.arg: word.value for word in keywords}
                if ONLY_WITH.get(_full_name(function, names)) in given:
                    checked.add(id(function))  # its value is checked below
                for name, allowed in ARGUMENTS.items():
                    value = given.get(name)
                    if value is not None and not (isinstance(value, ast.Constant) and value.value is allowed):
                        yield node.lineno, name
            case ast.Attribute() | ast.Name():
                full = _full_name(node, names)
                if full in FUNCTIONS or full in BUILTINS or (full in ONLY_WITH and id(node) not in checked):
                    yield node.lineno, full
                if isinstance(node, ast.Attribute) and node.attr in METHODS and full.partition(".")[0] not in FOLDERS:
                    yield node.lineno, node.attr
            case ast.Constant(value=str() as value) if PIPE in value and id(node) not in docstrings:
                yield node.lineno, PIPE


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _imported_names(tree: ast.AST) -> dict[str, str]:
    """The full name of each name that a module imports: {"np": "numpy"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    names[alias.asname or first] = alias.name if alias.asname else first
            case ast.ImportFrom():
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as numpy.load; "" for an expression that is no dotted name."""
    match node:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=value, attr=attribute):
            owner = _full_name(value, names)
            return f"{owner}.{attribute}" if owner else ""
    return ""


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_module_executes_the_contents_of_a_file() -> None:
    assert len(sources()) > 100
    uses = {
        (str(path.relative_to(ROOT)), name, line) for path in sources() for line, name in offences(path.read_text())
    }
    assert [use for use in sorted(uses) if use[:2] not in EXCEPTIONS] == []
    assert {use[:2] for use in uses} == EXCEPTIONS.keys(), "an exception is no longer needed"


BAD = [
    "import pickle",
    "import pickle as p",
    "import os, pickle",
    "from pickle import loads",
    "import _pickle",
    "import cloudpickle",
    "from ray import cloudpickle",
    "from ray.cloudpickle import loads",
    "import shelve",
    "from joblib import load",
    "import marshal",
    "import torch; torch.load(path)",
    "import torch; torch.load(path, weights_only=False)",
    "import torch; torch.load(path, weights_only=safe)",
    "import torch as t; t.load(path)",
    "from torch import load; load(path)",
    "from torch import load as read; read(path, map_location='cpu')",
    "import torch, functools; functools.partial(torch.load, map_location='cpu')",
    "import torch; torch.jit.load(path)",
    "import torch; torch.hub.load('owner/name', 'model')",
    "import numpy as np; np.load(path)",
    "import numpy as np; np.load(path, mmap_mode='r')",
    "import numpy as np; np.load(path, allow_pickle=True)",
    "from numpy import load; load(path)",
    "import numpy as np; [np.load(path) for path in paths]",
    "import numpy as np; list(map(np.load, paths))",
    "import numpy as np; np.lib.format.read_array(file, allow_pickle=True)",
    "import pandas; pandas.read_pickle(path)",
    f"url = '{PIPE}curl example'",
    f"url = f'{PIPE}{{command}}'",
    "import tarfile; tarfile.open(path).extractall()",
    "with tarfile.open(path) as archive: archive.extract(member, folder)",
    "zipfile.ZipFile(path).extractall(folder)",
    "import shutil; shutil.unpack_archive(path)",
    "from shutil import unpack_archive",
    "import yaml; yaml.load(text, Loader=yaml.SafeLoader)",
    "import yaml; yaml.unsafe_load(text)",
    "from yaml import full_load",
    "eval(text)",
    "exec(text)",
    "list(map(eval, lines))",
    "__import__(name)",
    "import subprocess; subprocess.run(command, shell=True)",
    "import subprocess; subprocess.Popen(command, shell=use_shell)",
    "import subprocess; subprocess.getoutput(command)",
    "import os; os.system(command)",
    "from os import system; system(command)",
    "import os as o; o.popen(command)",
    "import tempfile; tempfile.mktemp()",
]


@pytest.mark.parametrize("text", BAD)
def test_every_dangerous_use_is_reported(text: str) -> None:
    assert list(offences(text)), text


GOOD = [
    f'"""A docstring may mention pickle and {PIPE}"""',
    "import torch; torch.load(path, map_location='cpu', weights_only=True)",
    "from torch import load; load(path, weights_only=True)",
    "import numpy as np; np.load(path, mmap_mode='r', allow_pickle=False)",
    "from evaluation import features; features.extract(model)",
    "import safetensors.torch; safetensors.torch.load(data)",
    "import json; json.load(file)",
    "import yaml; yaml.safe_load(text)",
    "import subprocess; subprocess.run(['ls'], shell=False)",
    "import tarfile; tarfile.open(path).extractfile(member)",
    "model.eval()",
    "import torch; torch.compile(model)",
]


@pytest.mark.parametrize("text", GOOD)
def test_safe_uses_are_not_reported(text: str) -> None:
    assert not list(offences(text)), text
