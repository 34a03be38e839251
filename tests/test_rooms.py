"""The rooms of the house: who may import whom. Every import counts, also inside functions and for type checkers."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rwopt"

FLOORS = [
    {"cli"},
    {"search"},
    {"export", "config", "report", "tracking"},
    {"tuners", "probes"},
    {"tasks"},
    {"objectives"},
    {"sampling"},
    {"models"},
    {"unet"},
    {"schedule"},
    {"embedded", "progress", "results"},
    {"files"},
    {"errors"},
]
"""From the top down. A room may import itself and rooms of lower floors, never one beside it."""

ABOVE = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMPOSES = {"find_recipe", "load", "parse", "recipes"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def imports(tree: ast.AST, known: dict[str, Path], name: str) -> Iterator[str]:
    """The modules of the package that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "rwopt")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            if node.module and node.module.split(".")[0] == "rwopt":
                for alias in node.names:  # `from rwopt.search import starts` means the module, not its package
                    longer = f"{node.module}.{alias.name}"
                    yield longer if longer in known else node.module


KNOWN = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in KNOWN.items()}
GRAPH = {name: {i for i in imports(tree, KNOWN, name) if i != name} for name, tree in TREES.items()}


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def test_every_import_leads_to_a_module_and_every_module_has_a_room() -> None:
    assert not {name for targets in GRAPH.values() for name in targets} - KNOWN.keys()
    assert {room(name) for name in KNOWN} - {""} <= ABOVE.keys()


def test_arrows_go_down() -> None:
    wrong = [
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if name != "rwopt" and room(target) and room(name) != room(target) and ABOVE[room(name)] >= ABOVE[room(target)]
    ]
    assert wrong == []


def test_only_the_command_line_asks_the_package_for_its_version() -> None:
    """The package's own `__init__` names what is public and stands above all rooms."""
    assert [name for name, targets in GRAPH.items() if "rwopt" in targets] == ["rwopt.cli.parser"]


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in sorted(GRAPH[name]):
                walk(target, [*way, name])
            done.add(name)

    for name in GRAPH:
        walk(name, [])


def test_nothing_below_the_command_line_composes_recipes() -> None:
    for name, tree in TREES.items():
        if room(name) in ("cli", "config"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "rwopt.config":
                assert not COMPOSES & {alias.name for alias in node.names}, name
            if isinstance(node, ast.ImportFrom) and node.module == "rwopt":
                assert "config" not in {alias.name for alias in node.names}, f"{name}: import the names that it needs"


def test_optuna_and_lightning_stay_with_the_tuners() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {"optuna", "lightning"} & {f.split(".")[0] for f in found}:
                assert room(name) in ("tuners", "search"), name


def test_modules_have_a_docstring_and_fit_on_a_few_screens() -> None:
    for name, tree in TREES.items():
        assert isinstance(tree, ast.Module)
        assert ast.get_docstring(tree), name
        assert len(KNOWN[name].read_text(encoding="utf-8").splitlines()) <= 400, name


def test_no_module_only_forwards() -> None:
    """But for a room's `__init__`, which may name what is in it, and what `python -m` runs."""
    for name, tree in TREES.items():
        assert isinstance(tree, ast.Module)
        if KNOWN[name].name not in ("__init__.py", "__main__.py"):
            assert any(isinstance(n, ast.ClassDef | ast.FunctionDef) for n in tree.body), name


def test_scripts_find_what_they_import() -> None:
    """Those beside the package, which nobody runs every day."""
    root, missing = PACKAGE.parent, []
    for path in sorted([*root.glob("benchmarks/*.py"), *root.glob("training/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rwopt":
                absent = [alias.name for alias in node.names if not _is_there(node.module, alias.name)]
                missing += [f"{path.name}: {node.module}.{name}" for name in absent]
    assert missing == []


def _is_there(module: str, name: str) -> bool:
    if f"{module}.{name}" in KNOWN:
        return True
    return module in KNOWN and hasattr(importlib.import_module(module), name)
