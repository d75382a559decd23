"""The rules of the architecture, checked on syntax trees: imports, and lengths of functions.

Every rule is a function from a module's name and tree to its violations; each has a piece of
bad code that it must detect.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sdbento"

# From the roof down. A package may import those of the floors below its own, and itself.
FLOORS = (
    {"service", "__main__"},
    {"doors"},
    {"client"},
    {"jobs"},
    {"app"},
    {"admission", "backend", "course"},
    {"live"},
    {"request", "runner"},
    {"engine"},
    {"prompts"},
    {"images", "lora"},
    {"models"},
    {"catalog"},
    {"samplers", "outbound", "environment"},
    {"access", "metrics"},
    {"telemetry"},
    {"errors", "process", "settings"},
    {"backoff", "background", "url_redaction"},
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
MAX_FILES_IN_A_FOLDER = 12

NO_TORCH = [
    "errors",
    "settings",
    "environment",
    "outbound.http",
    "metrics.exposition",
    "metrics.requests",
    "backoff",
    "background",
    "url_redaction",
]
NO_TORCH += ["catalog.lookup", "images.codec", "samplers.stock", "request.schema"]
NO_TORCH += ["models.memory.residency", "jobs.service", "doors.cli.commands", "doors.default_model"]
NO_TORCH += [f"engine.{name}" for name in ("loop", "handle", "planner", "cost", "caps")]
NO_TORCH += ["telemetry.log_format", "telemetry.request"]
NO_TORCH += ["engine.trajectory", "engine.inputs", "live.recorder"]
READS_ENVIRONMENT = {"environment"}
LOADS_WEIGHTS = {"models.weights"}
MAX_FUNCTION_LINES = 60

Rule = Callable[[str, ast.Module], Iterator[str]]


def name_of(path: Path) -> str:
    """`errors` for sdbento/errors.py, `engine.loop` for sdbento/engine/loop.py, `service`."""
    if not path.is_relative_to(PACKAGE):
        return path.stem
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {name_of(path): path for path in [ROOT / "service.py", *sorted(PACKAGE.rglob("*.py"))]}


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Absolute names of all imports, except those for type checkers only."""
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
    if own and own not in FLOOR:
        yield "stands on no floor: add it to FLOORS"
        return
    for name in imports(tree):
        package, _, path = name.partition(".")
        imported = path.partition(".")[0]
        if package in ("", "service"):
            yield f"imports {name}: nobody imports the service or by relative names"
        if package != "sdbento" or imported not in FLOOR or imported == own:
            continue
        if not own or FLOOR[imported] <= FLOOR[own]:
            yield f"imports {name}, which is not below it"


@cache
def defined_names(module: str) -> set[str]:
    """What a module defines itself, at its top level."""
    names = set()
    body = parsed(module).body
    only_if = [
        node for statement in body if isinstance(statement, ast.If) for node in statement.body
    ]
    for node in body + only_if:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(targets=targets):
                parts = [part for target in targets for part in ast.walk(target)]
                names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


def names_come_from_where_they_are_defined(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(source), names=names, level=0):
                own = source.removeprefix("sdbento.")
                if own == source or own not in SOURCES:
                    continue
                modules = {name.rpartition(".")[2] for name in SOURCES if name.startswith(own)}
                known = defined_names(own) | modules
                yield from (f"{source} has no {n.name}" for n in names if n.name not in known)
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                yield "re-exports by __all__"


def the_environment_is_read_in_one_place(module: str, tree: ast.Module) -> Iterator[str]:
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


def functions_are_short(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"


# Each rule with a module's name and source that breaks it.
RULES: list[tuple[Rule, str, str]] = [
    (imports_point_downward, "errors", "from sdbento.app import App"),
    (imports_point_downward, "lora.files", "def f():\n    import sdbento.images.codec"),
    (imports_point_downward, "models.cache", "from sdbento import engine"),
    (imports_point_downward, "engine.loop", "from .errors import SDBentoError"),
    (imports_point_downward, "app", "from sdbento.doors.http.guard import Guard"),
    (imports_point_downward, "doors.cli.commands", "import service"),
    (imports_point_downward, "attic", "import json"),
    (names_come_from_where_they_are_defined, "app", "from sdbento.models.cache import Pipeline"),
    (names_come_from_where_they_are_defined, "app", "__all__ = ['App']"),
    (the_environment_is_read_in_one_place, "app", "import os\nos.environ['A']"),
    (the_environment_is_read_in_one_place, "app", "import os\nos.getenv('A')"),
    (the_environment_is_read_in_one_place, "app", "from os import environ"),
    (weights_are_loaded_in_one_place, "runner.state", "UNet2DConditionModel.from_pretrained('x')"),
    (weights_are_loaded_in_one_place, "app", "load = Pipeline.from_single_file"),
    (only_the_service_knows_bentoml, "app", "import bentoml"),
    (
        only_the_service_knows_bentoml,
        "doors.cli.commands",
        "from bentoml.exceptions import BentoMLException",
    ),
    (functions_are_short, "app", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
]


@pytest.mark.parametrize(
    "rule", dict.fromkeys(rule for rule, *_ in RULES), ids=lambda r: r.__name__
)
def test_rule(rule: Rule) -> None:
    broken = {module: [*rule(module, parsed(module))] for module in SOURCES}
    assert {module: violations for module, violations in broken.items() if violations} == {}


@pytest.mark.parametrize(("rule", "module", "source"), RULES)
def test_the_rule_finds_bad_code(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, ast.parse(source)))


def test_imports_for_type_checkers_only_may_point_upward() -> None:
    source = "if TYPE_CHECKING:\n    from sdbento.app import App"
    assert list(imports_point_downward("errors", ast.parse(source))) == []


def folders() -> list[Path]:
    return sorted({path.parent for path in SOURCES.values()} - {ROOT})


def test_a_folder_holds_few_files() -> None:
    for folder in folders():
        files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MAX_FILES_IN_A_FOLDER, (folder, sorted(files))


def imported_modules(module: str) -> set[str]:
    """The modules of sdbento that are imported when `module` is."""
    body = ast.Module(
        [node for node in parsed(module).body if not isinstance(node, ast.FunctionDef)], []
    )
    names = {name.removeprefix("sdbento.") for name in imports(body)}
    return {name for name in names if name in SOURCES and SOURCES[name].name != "__init__.py"}


def test_there_are_no_circular_imports() -> None:
    graphlib.TopologicalSorter({name: imported_modules(name) for name in SOURCES}).prepare()


def torch_after_importing(*modules: str) -> str:
    """The modules of torch that are loaded after importing `modules` in a fresh interpreter."""
    code = f"import {', '.join(modules)}, sys; print(*sorted({{'torch'}} & sys.modules.keys()))"
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


def test_modules_that_do_not_need_torch_do_not_import_it() -> None:
    assert torch_after_importing(*(f"sdbento.{module}" for module in NO_TORCH)) == ""


def test_the_service_file_is_read_without_torch() -> None:
    """BentoML's supervisor process imports it too, so torch would be loaded twice."""
    assert torch_after_importing("service") == ""


def with_requirements(names: Iterable[str]) -> set[str]:
    """Packages with all that they require, by their normalised names."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := canonicalize_name(waiting.pop())) not in found:
            found.add(name)
            required = map(Requirement, metadata.requires(name) or [])
            waiting += [r.name for r in required if not r.marker or r.marker.evaluate()]
    return found


def test_the_client_needs_only_what_its_page_installs() -> None:
    page = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^pip install ([\w ]+)$", page, re.MULTILINE)
    installed = with_requirements(line.split())
    missing = {
        module
        for module, packages in metadata.packages_distributions().items()
        if not installed & {canonicalize_name(package) for package in packages}
    } - {"sdbento"}
    assert {"torch", "numpy", "bentoml"} <= missing
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import sdbento.client"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_import_of_torch_would_be_noticed() -> None:
    assert torch_after_importing("torch") == "torch"
