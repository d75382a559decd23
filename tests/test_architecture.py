"""The rules of the house, read off the syntax tree: who may import what, and how long things are.

Every rule is a function from a module's name and tree to its violations, and comes with a piece of
bad code that it must find.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdbento"

# From the ground up. A module may import those of the floors below and those left of it on its own.
FLOORS = (
    ("errors", "serving_settings", "settings", "schemas", "metrics", "startup", "malloc"),
    ("trajectory",),
    (
        "caps",
        "cost",
        "planner",
        "step_table",
        "samplers",
        "stock",
        "families",
        "hub",
        "volume",
        "specs",
        "catalog",
        "fetch",
        "images",
        "budget",
        "prompt_syntax",
        "job_table",
        "job_files",
        "job_database",
        "job_store",
        "job_format",
        "job_progress",
        "insist",
        "webhooks",
    ),
    (
        "threads",
        "device",
        "resident",
        "compiling",
        "weights",
        "parking",
        "wishes",
        "pipelines",
        "lora_files",
        "lora_layers",
        "adapters",
        "lora_choice",
        "inversions",
        "prompts",
        "preprocessors",
        "canvas",
        "previews",
        "intake",
        "legs",
        "assembly",
    ),
    ("vae", "states", "controlnets", "runner"),
    ("engine",),
    ("orders", "calibration", "app"),
    ("jobs",),
    ("doors", "__main__"),  # doors may share what is theirs
)
ORDER = [module for floor in FLOORS for module in floor]

NO_TORCH = ["errors", "settings", "schemas", "trajectory", "cost", "planner", "catalog", "images"]
NO_TORCH += ["families", "hub", "budget", "engine", "doors.cli", "job_store", "webhooks", "jobs"]
READS_ENVIRONMENT = {"settings"}
LOADS_WEIGHTS = {"weights"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

Rule = Callable[[str, ast.Module], Iterator[str]]


def name_of(path: Path) -> str:
    """`errors` for sdbento/errors.py, `doors.cli` for sdbento/doors/cli.py, `service`."""
    if not path.is_relative_to(PACKAGE):
        return path.stem
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {name_of(path): path for path in [ROOT / "service.py", *sorted(PACKAGE.rglob("*.py"))]}


def imports(tree: ast.AST) -> Iterator[str]:
    """Absolute names of what is imported anywhere, but for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for other in node.orelse:
                    yield from imports(other)
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.ImportFrom():
                yield "." * node.level + (node.module or "")
            case _:
                yield from imports(node)


def imports_point_downward(module: str, tree: ast.Module) -> Iterator[str]:
    own = module.partition(".")[0]
    if own not in (*ORDER, "service", ""):
        yield "stands on no floor: add it to FLOORS"
        return
    below = ORDER if own == "service" else ORDER[: ORDER.index(own)] if own else []
    for name in imports(tree):
        package, _, path = name.partition(".")
        imported = path.partition(".")[0]
        if package in ("", "service"):
            yield f"imports {name}: nobody imports the service or by relative names"
        forbidden = imported in ORDER and imported not in below and not own == imported == "doors"
        if package == "sdbento" and forbidden:
            yield f"imports {name}, which is not below it"


def only_settings_reads_the_environment(module: str, tree: ast.Module) -> Iterator[str]:
    if module in READS_ENVIRONMENT:
        return
    forbidden = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=attr) if attr in forbidden:
                yield f"os.{attr} in line {node.lineno}"
            case ast.ImportFrom(module="os", names=names):
                yield from (f"imports os.{n.name}" for n in names if n.name in forbidden)


def weights_are_loaded_in_one_place(module: str, tree: ast.Module) -> Iterator[str]:
    if module in LOADS_WEIGHTS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_single_file"):
            yield f"{node.attr} in line {node.lineno}"


def only_the_service_knows_bentoml(module: str, tree: ast.Module) -> Iterator[str]:
    if module == "service":
        return
    for name in imports(tree):
        if name.partition(".")[0] in ("bentoml", "_bentoml_impl", "_bentoml_sdk"):
            yield f"imports {name}"


def files_are_short(module: str, tree: ast.Module) -> Iterator[str]:
    last = max((node.end_lineno or 0 for node in tree.body), default=0)
    if last >= MAX_FILE_LINES:
        yield f"has {last} lines; it must have fewer than {MAX_FILE_LINES}"


def functions_are_short(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"


# Each rule with a module's name and source that breaks it.
RULES: list[tuple[Rule, str, str]] = [
    (imports_point_downward, "errors", "from sdbento.app import App"),
    (imports_point_downward, "planner", "def f():\n    import sdbento.runner"),
    (imports_point_downward, "planner", "from sdbento import engine"),
    (imports_point_downward, "engine", "from .errors import SDBentoError"),
    (imports_point_downward, "app", "from sdbento.doors.http import Guard"),
    (imports_point_downward, "doors.cli", "import service"),
    (imports_point_downward, "attic", "import json"),
    (only_settings_reads_the_environment, "app", "import os\nos.environ['A']"),
    (only_settings_reads_the_environment, "app", "import os\nos.getenv('A')"),
    (only_settings_reads_the_environment, "app", "from os import environ"),
    (weights_are_loaded_in_one_place, "runner", "UNet2DConditionModel.from_pretrained('x')"),
    (weights_are_loaded_in_one_place, "app", "load = Pipeline.from_single_file"),
    (only_the_service_knows_bentoml, "app", "import bentoml"),
    (
        only_the_service_knows_bentoml,
        "doors.cli",
        "from bentoml.exceptions import BentoMLException",
    ),
    (files_are_short, "app", "x = 1\n" * MAX_FILE_LINES),
    (functions_are_short, "app", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
]


@pytest.mark.parametrize("module", SOURCES)
@pytest.mark.parametrize(
    "rule", dict.fromkeys(rule for rule, *_ in RULES), ids=lambda r: r.__name__
)
def test_rule(rule: Rule, module: str) -> None:
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    assert list(rule(module, tree)) == []


@pytest.mark.parametrize(("rule", "module", "source"), RULES)
def test_the_rule_finds_bad_code(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source)))


def test_what_only_type_checkers_see_may_point_upward() -> None:
    source = "if TYPE_CHECKING:\n    from sdbento.app import App"
    assert list(imports_point_downward("errors", ast.parse(source))) == []


def torch_after_importing(*modules: str) -> str:
    """What of torch is there after importing `modules` in a fresh interpreter."""
    code = f"import {', '.join(modules)}, sys; print(*sorted({{'torch'}} & sys.modules.keys()))"
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def test_what_needs_no_torch_imports_none() -> None:
    assert torch_after_importing(*(f"sdbento.{module}" for module in NO_TORCH)) == ""


def test_the_service_file_is_read_without_torch() -> None:
    """BentoML's supervisor reads it before the process that serves: torch would be loaded twice."""
    assert torch_after_importing("service") == ""


def test_torch_would_be_noticed() -> None:
    assert torch_after_importing("torch") == "torch"
