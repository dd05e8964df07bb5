"""`python -m benchmarks house`: counts of the source that the house rules bound, with the worst places.

Arguments of a function (kernels and keyword TypedDicts apart), lines of a function, `# fmt: skip`, lines with `Any`, and texts
that name a flag of the command line below it.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hires"
KERNELS = "kernels"
FRONTS = ("cli", "options")
"""Rooms that may name a flag: the command line, and the declarations that it reads."""
OF_OTHERS = {"--include"}
"""Flags of other programs that a message tells to run: `hf download`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function or method: where it is, how many arguments it has besides self and cls, and how many lines."""

    place: str
    arguments: int
    lines: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the house rules bound."""

    functions: tuple[Function, ...]
    fmt_skips: int
    any_lines: int
    flag_texts: tuple[str, ...]

    @property
    def arguments_p90(self) -> int:
        ordered = sorted(function.arguments for function in self.functions)
        return ordered[len(ordered) * 9 // 10]

    @property
    def most_arguments(self) -> int:
        return max(function.arguments for function in self.functions)

    @property
    def long_functions(self) -> tuple[Function, ...]:
        return tuple(function for function in self.functions if function.lines > 60)


def count(package: Path = PACKAGE) -> Counts:
    """The counts of a package's source."""
    files = sorted(package.rglob("*.py"))
    texts = {file.relative_to(package): file.read_text() for file in files}
    functions = [f for name, text in texts.items() if name.parts[0] != KERNELS for f in _functions(name, ast.parse(text))]
    flags = [f for name, text in texts.items() if name.parts[0] not in FRONTS for f in _flag_texts(name, ast.parse(text))]
    lines = [line for text in texts.values() for line in text.splitlines()]
    return Counts(
        functions=tuple(functions),
        fmt_skips=sum("# fmt: skip" in line for line in lines),
        any_lines=sum("import" not in line and re.search(r"\bAny\b", line) is not None for line in lines),
        flag_texts=tuple(flags),
    )


def _functions(name: Path, tree: ast.Module) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(place=f"{name}:{node.lineno} {node.name}", arguments=len(every), lines=length)


def _flag_texts(name: Path, tree: ast.Module) -> Iterator[str]:
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        text = node.value
        flags = set(re.findall(r"(?:^|[ `'(])(--[a-z][a-z-]+)", text)) - OF_OTHERS
        if flags and id(node) not in documentation:
            yield f"{name}:{node.lineno} {text[:60]!r}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts; with --worst the places behind them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks house", description=__doc__)
    parser.add_argument("--worst", action="store_true", help="name every place beyond a bound")
    worst = parser.parse_args(arguments).worst
    counts = count()
    print(f"functions {len(counts.functions)}, arguments p90 {counts.arguments_p90}, most {counts.most_arguments}")
    print(
        f"functions over 60 lines {len(counts.long_functions)}, fmt: skip {counts.fmt_skips}, lines with Any {counts.any_lines}"
    )
    print(f"texts with a flag below the command line {len(counts.flag_texts)}")
    if worst:
        crowded = [f for f in counts.functions if f.arguments > 6]
        print(*(f"{f.place}: {f.arguments} arguments" for f in sorted(crowded, key=lambda f: -f.arguments)), sep="\n")
        print(*(f"{f.place}: {f.lines} lines" for f in counts.long_functions), *counts.flag_texts, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
