"""Imports run one way, and none of them in a circle (grow/README.md has the picture)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny import ROOT

# What a package may import; each may also import itself.
FOUNDATION = {"errors", "names", "plan", "parts", "recipe", "recipe_file", "recipe_values"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "names": {"errors"},
    "plan": {"errors"},
    "parts": {"errors", "names", "plan"},
    "recipe_values": {"errors"},
    "recipe": {"errors", "parts", "plan", "recipe_values"},
    "recipe_file": {"errors", "parts", "plan", "recipe", "recipe_values"},
    "checkpoint": FOUNDATION,
    "data": FOUNDATION | {"checkpoint"},
    "model": FOUNDATION | {"checkpoint", "data"},
    "methods": FOUNDATION | {"checkpoint", "data", "model"},
    "switch": FOUNDATION | {"checkpoint", "data", "model", "methods"},
}
BELOW |= {name: set(BELOW) for name in ("training", "evaluation", "analysis")}
BELOW["api"], BELOW["cli"] = set(BELOW), set(BELOW)
BELOW["cli"] |= {"__init__"}  # for the version
BELOW["__init__"] = {"api", "errors"}
BELOW["__main__"] = {"cli", "errors"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "grow").rglob("*.py"))
}


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of ours that one import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "grow")
    elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "grow":
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield name if name in MODULES else str(node.module)


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_nothing_above_it(module: str) -> None:
    """Imports inside functions count too; the public API alone names what is above everything."""
    own = part(module)
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        for name in imported(node):
            assert part(name) in {*BELOW.get(own, set()), own}, f"{module} imports {name}"


def test_no_circle() -> None:
    """Of modules that import each other as they are loaded; whatever names a type alone is not loaded."""
    loads = {name: {m for node in _loaded(path) for m in imported(node)} for name, path in MODULES.items()}

    done: set[str] = set()
    for module in MODULES:
        _walk(module, loads, [], done)


def _walk(module: str, loads: dict[str, set[str]], path: list[str], done: set[str]) -> None:
    assert module not in path, " → ".join([*path, module])
    if module not in done:
        for name in loads[module]:
            _walk(name, loads, [*path, module], done)
        done.add(module)


def _loaded(path: Path) -> Iterator[ast.AST]:
    """The import statements that are executed when a module is imported."""
    waiting: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += list(ast.iter_child_nodes(node))


def test_what_is_promised_has_a_test() -> None:
    """The table of grow/README.md names tests that there are."""
    named = set(re.findall(r"`(\w+)::(test_\w+)`", (ROOT / "grow/README.md").read_text()))
    there = {
        (file.stem.removeprefix("test_"), name)
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named) > 20 and named <= there, named - there
