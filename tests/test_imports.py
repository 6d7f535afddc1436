"""Imports run one way, in the order that CONTRIBUTING.md gives, in every file."""

import ast
import graphlib
import re

import pytest
from conftest import ROOT

ORDER = re.search(r"^`(.+ -> config)`$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)[1]
LAYERS = [group.split(", ") for group in reversed(ORDER.split(" -> "))]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for pattern in ("*.py", *(f"{name}/*.py" for name in LAYER))
    for path in ROOT.glob(pattern)
}


def imports_of(name: str) -> set[str]:
    """Every module that a module of the repository imports, within functions too; other projects' as well."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= modules or {node.module}
    return found


GRAPH = {name: (imports_of(name) & FILES.keys()) - {name} for name in FILES}


def place(module: str) -> str:
    """The top-level file or package of a module."""
    return module.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_stands_below_it(name):
    own = place(name)
    assert own in LAYER, f"{name} has no place in the order of CONTRIBUTING.md"
    for other in map(place, GRAPH[name]):
        assert other == own or LAYER[other] < LAYER[own], f"{name} imports {other}"
    assert not {"tools", "benchmarks", "tests"} & set(map(place, imports_of(name)))


def test_no_circles():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError
