"""The pages of the documentation: their code blocks, the commands in them, their links."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hires

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"(?:^<!-- test: needs (?P<what>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^(?:python -m )?hires(?= )")
MODEL_ROW = re.compile(r"`(hires (?:render|edit) [^`]+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page. `needs`: what is missing to run it here, empty where nothing is."""

    page: Path
    line: int
    language: str
    text: str
    needs: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(page, text[: found.start("text")].count("\n") + 1, found["language"], found["text"], found["what"] or "")
        for found in FENCE.finditer(text)
    ]


@cache
def all_blocks(language: str) -> tuple[Block, ...]:
    return tuple(block for page in pages() for block in blocks(page) if block.language == language)


def notebook(path: Path) -> Block:
    """The code cells of a notebook as one block."""
    cells = json.loads(path.read_text())["cells"]
    return Block(path, 1, "python", "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), "")


def shell_lines(block: Block) -> Iterator[list[str]]:
    """The words of every line of a shell block, comments left out and continued lines joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def hires_commands() -> list[tuple[str, list[str]]]:
    """Every `hires` line of the pages, with where it stands; those of a table of models have no `-o`, and get one."""
    found = []
    for block in (*all_blocks("bash"), *all_blocks("powershell")):
        for words in shell_lines(block):
            if COMMAND.match(" ".join(words)):
                found.append((str(block), words[3:] if words[0] == "python" else words[1:]))
    for page in pages():
        for line in page.read_text().splitlines():
            if line.startswith("|"):
                for command in MODEL_ROW.findall(line):
                    words = shlex.split(command)[1:]
                    found.append((str(page.relative_to(ROOT)), words if "-o" in words else [*words, "-o", "a.png"]))
    return found


def command_line() -> Any:
    """The command as installed, with every function that would run replaced: it parses, and returns name and values."""
    import typer

    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["hires"].partition(":")
    command = typer.main.get_command(getattr(importlib.import_module(module), name))
    _only_parse(command, "hires")
    return command


def _only_parse(command: Any, name: str) -> None:
    def parsed(**values: Any) -> tuple[str, dict[str, Any]]:
        return name, values

    command.callback = parsed
    for inner, below in getattr(command, "commands", {}).items():
        _only_parse(below, f"{name} {inner}")


def problems(block: Block) -> list[str]:
    """Names of hires that a python block uses and that are not there, and keywords that its functions do not take."""
    tree = ast.parse(block.text)
    known: dict[str, Any] = {}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hires":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if hasattr(module, alias.name):
                    known[alias.asname or alias.name] = getattr(module, alias.name)
                else:
                    found.append(f"{node.module} has no {alias.name}")
        elif isinstance(node, ast.Import):
            if any(alias.name == "hires" for alias in node.names):
                known["hires"] = hires
        elif isinstance(node, ast.With):
            for item in node.items:
                if isinstance(item.optional_vars, ast.Name) and isinstance(item.context_expr, ast.Call):
                    known[item.optional_vars.id] = _value(item.context_expr.func, known, [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            _value(node, known, found)
        if isinstance(node, ast.Call):
            found += _keywords(node, known)
    return list(dict.fromkeys(found))


def _value(node: ast.expr, known: dict[str, Any], missing: list[str]) -> Any:
    """What an attribute chain that starts at a known name is; None where it is not of hires."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = _value(node.value, known, missing)
    if owner is None or not (inspect.ismodule(owner) or inspect.isclass(owner)):
        return None
    if not hasattr(owner, node.attr):
        missing.append(f"{ast.unparse(node)} is not there")
        return None
    return getattr(owner, node.attr)


def _keywords(call: ast.Call, known: dict[str, Any]) -> list[str]:
    function = _value(call.func, known, [])
    if not callable(function) or (inspect.isclass(function) and issubclass(function, BaseException)):
        return []
    parameters = inspect.signature(function).parameters
    names = set(parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # the client passes on what the functions of hires take
        names |= {name for f in (hires.render, hires.edit, hires.upscale) for name in inspect.signature(f).parameters}
    return [f"{ast.unparse(call.func)} takes no {k.arg}" for k in call.keywords if k.arg is not None and k.arg not in names]


def smaller(render: Callable[..., Any], longest: int = 128, steps: int = 2) -> Callable[..., Any]:
    """`hires.render` at no more than `longest` pixels and `steps` steps: the code of a page runs, in a second."""

    def call(*args: Any, **options: Any) -> Any:
        if isinstance(options.get("size"), str):
            sides = [int(side) for side in options["size"].split("x")]
            scale = min(1.0, longest / max(sides))
            options["size"] = "x".join(str(max(8, round(side * scale))) for side in sides)
        options["steps"] = min(steps, options.get("steps") or steps)
        return render(*args, **options)

    return call
