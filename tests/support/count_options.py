"""Counts how often an option is declared: `python -m tests.support.count_options`.

A declaration is an `Option(...)` in an annotation or a parameter of Typer in the rooms of the four commands. The keyword
TypedDicts, which a test holds equal to the declarations, and what only a server narrows are counted beside.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HIRES = Path(__file__).parents[2] / "hires"
COMMANDS = ("cli/options.py", "cli/render.py", "cli/upscale.py")
MOST = 90
"""There were 237 in 11 places when each place spelled its own."""


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    """The calls of a function or class, by its last name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and name in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
            yield node


def declarations() -> dict[str, int]:
    """Declarations by file."""
    found: dict[str, int] = {}
    for path in (*sorted((HIRES / "options").glob("*.py")), *(HIRES / name for name in COMMANDS)):
        count = sum(1 for _ in calls(path, "Option"))
        if path.name == "options.py":
            count -= sum(1 for call in calls(path, "Option") if isinstance(call.func, ast.Attribute))  # Typer's, made of ours
        if count:
            found[str(path.relative_to(HIRES))] = count
    return found


def keyword_entries() -> int:
    """Entries of the keyword TypedDicts."""
    tree = ast.parse((HIRES / "options" / "keywords.py").read_text())
    return sum(isinstance(node, ast.AnnAssign) for node in ast.walk(tree))


def main() -> None:
    counted = declarations()
    for name, count in counted.items():
        print(f"{count:4} {name}")
    print(
        f"{sum(counted.values()):4} option declarations, at most {MOST} are allowed; {keyword_entries()} keyword entries beside"
    )


if __name__ == "__main__":
    main()
