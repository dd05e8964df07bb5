"""The rooms of the house: imports point down, the core needs no torch, one command checks it all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hires"
ROWS = (
    (
        "_version",
        "errors",
        "catalogue",
        "stage_spec",
        "types",
        "tiling.geometry",
        "kernels.policies",
        "families",
        "headers",
        "layouts",
        "identify",
        "folders",
        "locate",
        "specs",
        "adapters",
        "captions",
        "report",
        "resolution",
        "renoise",
        "vae_cost",
        "unet_cost",
        "text_cost",
        "cost",
        "machines",
        "calibration",
        "levels",
        "presets",
        "placement",
        "stages",
        "stage_cost",
        "search",
        "planner",
        "drawing",
        "job",
    ),
    (
        "device",
        "denoisers",
        "conditioning",
        "schedules",
        "noise",
        "steps",
        "singlestep",
        "multistep",
        "adaptive",
        "restart",
        "samplers",
    ),
    (
        "outputs",
        "png",
        "whole_tiff",
        "decoders",
        "tiff",
        "formats",
        "sinks",
        "sources",
        "imageio",
        "boxes",
        "contrast",
        "deltae",
        "seams",
        "spectra",
        "duplicates",
        "metrics",
        "records",
        "journal",
        "jobs",
        "measure",
        "readout",
        "chart",
    ),
    ("kernels", "single"),
    ("tiling", "lowpass", "guides", "colour", "enlarge"),
    (
        "quiet",
        "offload",
        "previews",
        "weights",
        "single_file",
        "lora",
        "text",
        "processors",
        "control",
        "pixart",
        "unet",
    ),
    ("pipelines",),
    (
        "infotext",
        "delivery",
        "execute",
        "asked",
        "engine",
        "roundtrip",
        "upscale_options",
        "upscaling",
        "timing",
        "benching",
        "profiling",
        "bench",
    ),
    (
        "attaching",
        "server",
        "client",
        "cli_typed",
        "cli_options",
        "cli_shown",
        "cli_about",
        "cli_serve",
        "cli_upscale",
        "cli_bench",
        "cli",
        "__main__",
    ),
)


def row_of(module: str) -> int:
    """The row of a module under hires; the longest name that matches wins (tiling.geometry before tiling)."""
    best = max(
        ((len(name), index) for index, row in enumerate(ROWS) for name in row if (module + ".").startswith(name + ".")),
        default=None,
    )
    assert best is not None, f"hires.{module} is in no room; add it to ROWS and to the design"
    return best[1]


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


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_down(module: str, path: Path) -> None:
    for other in inside(imported(path)):
        assert row_of(other) <= row_of(module), f"hires.{module} imports hires.{other}, which is above it"


def test_kernels_stand_alone() -> None:
    for module, path in modules():
        if module.startswith("kernels."):
            assert all(name.startswith("kernels.") for name in inside(imported(path)))


def test_pipelines_do_not_import_each_other() -> None:
    for module, path in modules():
        if module.startswith("pipelines."):
            others = {n for n in inside(imported(path)) if n.startswith("pipelines.")} - {"pipelines.base", module}
            assert not others, f"{module} imports {others}"


def test_nothing_in_the_package_imports_benchmarks_or_tests() -> None:
    for module, path in modules():
        assert not {n for n in imported(path) if n.split(".")[0] in ("benchmarks", "tests")}, module


def test_no_print_below_the_fronts() -> None:
    for module, path in modules():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert module.startswith("cli") or not [n for n in calls if n.func.id == "print"], module


def test_the_core_imports_without_torch() -> None:
    core = ", ".join(f"hires.{name}" for name in ROWS[0])
    code = (
        f"import sys, hires, {core}, hires.engine, hires.cli; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_linter_and_type_checker_are_in_make_check() -> None:
    recipe = (ROOT / "Makefile").read_text().split("check:")[1].split("\n\n")[0]
    assert "ruff check" in recipe
    assert "ruff format --check" in recipe
    assert "mypy" in recipe
    assert "strict = true" in (ROOT / "pyproject.toml").read_text()
