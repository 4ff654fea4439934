"""Layers import downward only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.util import REPOSITORY

LAYERS = (  # from the bottom up; modules of one layer may import each other
    {"util", "files", "trust", "limits", "configs", "distributed", "devices", "attach"},
    {"checkpoint", "images"},
    {"modules"},
    {"models", "lr_scheduler"},
    {"data"},
    {"acceleration", "adapters"},
    {"inference", "training", "evaluation"},
    {"cli", "web"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted((REPOSITORY / "ldm").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, but for those it imports for type checking only."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def layer_of(module: str) -> str:
    """The second part of a dotted name below `ldm`."""
    return module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_imports_go_downward(path: Path) -> None:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    if parts == ("ldm", "__init__"):
        own = 0
    else:
        assert parts[1] in RANK, f"{parts[1]} has no place in LAYERS"
        own = RANK[parts[1]]
    found = {name for name in imports(path) if name.startswith("ldm.")}
    upward = [name for name in found if RANK.get(layer_of(name), -1) > own]
    assert not upward, f"{path} imports {upward}, which lie above it"


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "ldm/checkpoint/formats").glob("*.py")), ids=lambda path: path.name
)
def test_file_formats_know_nothing_of_models(path: Path) -> None:
    outside = [n for n in imports(path) if n.startswith("ldm.") and not n.startswith("ldm.checkpoint.formats")]
    assert not outside


def test_the_package_does_not_import_what_lies_outside() -> None:
    for path in FILES:
        assert not [name for name in imports(path) if name.split(".")[0] in ("benchmarks", "scripts", "tests")], path
