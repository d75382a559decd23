"""How the code is laid out, in figures: floors of imports, files a folder, lengths of functions.

python tools/code_figures.py [CHECKOUT]
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
FILES = [ROOT / "service.py", *sorted((ROOT / "sdbento").rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


PATHS = {module_of(path): path for path in FILES}


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of ours that are imported when the file is, not only for type checkers."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.ImportFrom(module=str(module)):
                names = [f"{module}.{alias.name}" for alias in child.names]
                yield from {name if name in PATHS else module for name in names} & PATHS.keys()
            case ast.Import():
                yield from {alias.name for alias in child.names} & PATHS.keys()
            case _:
                yield from imported(child)


@cache
def floor(module: str) -> int:
    """1 for a module that imports none of ours; else one more than the highest it imports."""
    own = set(imported(TREES[PATHS[module]])) - {module}
    return 1 + max((floor(other) for other in own), default=0)


def function_lengths() -> list[int]:
    return [
        (node.end_lineno or 0) - node.lineno + 1
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


if __name__ == "__main__":
    folders = Counter(path.parent.relative_to(ROOT) for path in FILES if path.name != "__init__.py")
    lengths = function_lengths()
    longest = max(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    print(f"floors of module imports  {max(map(floor, PATHS))}")
    print(f"files in the largest folder  {max(folders.values())} of {len(FILES)}")
    print(f"lines of the longest file  {longest}")
    print(
        f"lines of a function  median {median(lengths):g}, "
        f"p90 {quantiles(lengths, n=10)[-1]:g}, max {max(lengths)}, {len(lengths)} functions"
    )
