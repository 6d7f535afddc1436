"""Imports run one way (CONTRIBUTING.md)."""

import ast
import graphlib

from conftest import ROOT


def imports_of(path) -> set[str]:
    """Every module that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


CHAIN = """
    config shell.signals shell.command_line utils layouts published datasets feature_cache extractor detector
    train main
""".split()


def test_no_module_imports_one_that_comes_after_it():
    files = (path.relative_to(ROOT) for pattern in ("*.py", "shell/*.py") for path in ROOT.glob(pattern))
    modules = {".".join(path.with_suffix("").parts): ROOT / path for path in files}
    graph = {name: imports_of(path) & modules.keys() for name, path in modules.items()}
    reached: dict[str, set[str]] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():  # raises CycleError
        reached[name] = graph[name].union(*(reached[other] for other in graph[name]))
    for place, name in enumerate(CHAIN):
        assert not reached[name] & {*CHAIN[place:]}, name
