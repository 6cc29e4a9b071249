"""The house's own rules: imports point down, and importing fp4rt costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fp4rt"

# From the top down: a module may import its own floor and those after it.
FLOORS = [
    {"cli", "__init__", "__main__"}, {"serve"}, {"async_llm"},
    {"llm", "session", "quantize", "inspect", "perplexity", "limits", "breakdown"}, {"room"},
    {"source", "text", "engine"},
    {"models"}, {"layers"}, {"loading", "rope"}, {"batch", "cache", "ops", "sampling"}, {"formats"},
    {"checkpoint", "config", "writing"}, {"errors", "driver"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The first name below fp4rt of everything that this file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            parts = name.split(".")
            if parts[0] == "fp4rt" and len(parts) > 1 and (PACKAGE / parts[1]).exists() | \
                    (PACKAGE / f"{parts[1]}.py").exists():
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    here = FLOOR[module_of(path)]
    upward = {name for name in imports(path) if FLOOR[name] < here}
    assert not upward, f"{path.name} imports {upward} from a floor above its own"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_cuda_backend_imports_cupy(path: Path):
    text = path.read_text()
    if "ops/cuda" not in path.as_posix() and "cli/doctor" not in path.as_posix():
        assert "import cupy" not in text


def test_files_begin_with_one_sentence():
    sources = [*FILES, *(PACKAGE.parent / "kernels").glob("*.cu*")]
    for path in sources:
        first = path.read_text().lstrip().split("\n", 1)[0]
        assert first.startswith(('"""', "//", "#!")), f"{path} does not say what it is"


def test_importing_fp4rt_loads_neither_cupy_nor_numba_nor_numpy():
    code = "import sys, fp4rt; print([m for m in ('cupy', 'numba', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
