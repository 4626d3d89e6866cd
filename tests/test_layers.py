"""The layers of the README's picture: imports only point downwards, at run time. Imports for type checking only do not count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import llmlite

PACKAGE = Path(llmlite.__file__).parent
MODULES = {place.stem for place in PACKAGE.iterdir()}
LAYERS = [
    {"config", "errors", "evaluating", "expected", "gate", "memory", "paths", "storage", "step", "layout", "processes", "py.typed"},
    {"models", "data"},
    {"training"},
    {"context", "report", "report_shape", "calibration", "evaluation", "html", "hub"},
    {"pruning", "distillation", "quantization", "adapters"},
    {"recipe", "plan", "loading", "kept", "pipeline"},
    {"shrink", "side_by_side", "multi_adapter"},
    {"recipes", "cli", "commands", "__main__", "__init__"},
]


def layer_of(module: str) -> int:
    name = module.split(".")[1]
    for level, members in enumerate(LAYERS):
        if name in members:
            return level
    raise AssertionError(f"{module} is in no layer: add it to the picture in the README and to this test")


def imports_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {id(child) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmlite."):
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "llmlite":
            found |= {f"llmlite.{alias.name}" for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("llmlite.")}
    return found


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_point_downwards(file: Path) -> None:
    module = ".".join(["llmlite", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    wrong = {other for other in imports_of(file) if layer_of(other) > layer_of(module)}
    assert not wrong, f"{module} imports from above: {wrong}"
