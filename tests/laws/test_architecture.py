"""The rooms of the house: imports point down, the core needs no torch, one command checks it all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hires"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS: list[str] = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
LIGHT = ("options", "checkpoints", "planning", "cli", "client")
"""Rooms that load neither torch nor numpy when they are imported."""


def modules() -> list[tuple[str, Path]]:
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py"]
    return [(".".join(f.relative_to(PACKAGE).with_suffix("").parts), f) for f in sorted(files)]


def imported(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside functions, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inside(names: set[str]) -> set[str]:
    """Those that are modules of hires, without the prefix."""
    known = {name for name, _ in modules()}
    return {name.removeprefix("hires.") for name in names} & known


def test_imports_follow_the_list_of_rooms() -> None:
    """The contracts in pyproject.toml: layers, independence, forbidden; `lint-imports` names what breaks one."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_every_room_is_in_the_list() -> None:
    listed = {name.strip() for line in LAYERS for name in re.split(r"[|:]", line)}
    rooms = {f"hires.{name.split('.')[0]}" for name, _ in modules()}
    assert rooms == listed


def test_contributing_shows_the_list() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert "\n".join(LAYERS) in text


def test_no_circle_of_files() -> None:
    graph = {module: inside(imported(path)) - {module} for module, path in modules()}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"these files import each other in a circle: {sorted(graph)}"
        for module in leaves:
            del graph[module]


def test_rooms_are_small() -> None:
    """4 to 12 files in a room, at most 10 at the root; inner rooms may be smaller."""
    assert len(list(PACKAGE.glob("*.py"))) - 1 <= 10
    for room in sorted({path.parent for _, path in modules()} - {PACKAGE}):
        files = len(list(room.glob("*.py"))) - 1
        least = 4 if room.parent == PACKAGE else 2
        assert least <= files <= 12, f"{room.relative_to(PACKAGE)} has {files} files"


def test_nothing_in_the_package_imports_benchmarks_or_tests() -> None:
    for module, path in modules():
        assert not {n for n in imported(path) if n.split(".")[0] in ("benchmarks", "tests")}, module


def test_no_print_below_the_fronts() -> None:
    for module, path in modules():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert module.startswith("cli.") or not [n for n in calls if n.func.id == "print"], module


def test_light_rooms_load_no_torch() -> None:
    names = [name for name, _ in modules() if name.split(".")[0] in LIGHT and name.split(".")[-1] != "__main__"]
    code = (
        f"import sys, hires, {', '.join(f'hires.{name}' for name in names)}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_linter_and_type_checker_are_in_make_check() -> None:
    recipe = (ROOT / "Makefile").read_text().split("check:")[1].split("\n\n")[0]
    assert "ruff check" in recipe
    assert "ruff format --check" in recipe
    assert "mypy" in recipe
    assert "lint-imports" in recipe
    assert "strict = true" in (ROOT / "pyproject.toml").read_text()
