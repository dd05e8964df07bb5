"""What the pages promise: python runs, commands parse, links lead to files, tables are drawn from rows."""

from __future__ import annotations

import importlib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import hires
from benchmarks.report import write
from hires.errors import HiresError
from tests.support.pages import (
    ROOT,
    Block,
    all_blocks,
    blocks,
    command_line,
    hires_commands,
    notebook,
    pages,
    problems,
    shell_lines,
    smaller,
)

PYTHON = (*all_blocks("python"), notebook(ROOT / "docs" / "examples.ipynb"))
RUNNABLE = [block for block in PYTHON if not block.needs]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
API = re.compile(r"^<!-- api: ([\w.]+) -->$", re.M)
UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
INSTALLERS = ("pip install", "pipx install", "pipx run", "uv add", "uv tool install", "uvx")
PLANNED = ("size", "vram", "ram", "preset", "strategy", "dtype", "attention_policy", "relay", "stages", "colour_fix")


def run(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With renders of two steps, 128 px wide at most; the slow test below runs them as printed."""
    monkeypatch.setattr(hires, "render", smaller(hires.render))
    run(block, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_python_runs_as_printed(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(block, tmp_path, monkeypatch)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_names_what_there_is(block: Block) -> None:
    """Blocks that need a model, a card or a server as well."""
    assert problems(block) == []


def test_a_wrong_name_or_keyword_is_found() -> None:
    text = 'import hires\nhires.rendr("a")\nhires.render("a", sise="1x1")\nfrom hires.errors import Nothing\n'
    assert sorted(problems(Block(ROOT / "README.md", 1, "python", text, ""))) == [
        "hires.errors has no Nothing",
        "hires.render takes no sise",
        "hires.rendr is not there",
    ]
    text = 'import hires\nwith hires.Client("http://a") as client:\n    client.render("a", sise="1x1")\n    client.rendr("a")\n'
    assert sorted(problems(Block(ROOT / "README.md", 1, "python", text, ""))) == [
        "client.render takes no sise",
        "client.rendr is not there",
    ]


def test_every_hires_line_parses() -> None:
    """Options exist and values parse; what a plan takes is planned, with the shipped model in place of absent ones."""
    command, wrong = command_line(), []
    found = hires_commands()
    for place, words in found:
        try:
            name, values = command.main(words, prog_name="hires", standalone_mode=False)
            if name in ("hires render", "hires plan", "hires edit"):
                planned(tuple(sorted(plan_options(values).items())))
        except (UsageError, HiresError) as error:
            wrong.append(f"{place}: hires {' '.join(words)}: {getattr(error, 'message', error)}")
    assert wrong == []
    assert len(found) > 60
    subcommands = set(command.commands)
    assert {words[0] for _, words in found if not words[0].startswith("-")} == subcommands  # each is shown somewhere


def plan_options(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a command that any model's plan takes."""
    options = {"stages" if name == "stage" else name: value for name, value in values.items()}
    return {name: tuple(v) if isinstance(v := options[name], list) else v for name in PLANNED if options.get(name)}


@cache
def planned(options: tuple[tuple[str, Any], ...]) -> None:
    hires.plan(**({"size": "512x512"} | dict(options)))


@pytest.mark.parametrize("words", ["render a -o b.png --sise 1x1", "render a", "render a -o b.png --steps many", "rendr a"])
def test_a_wrong_line_is_found(words: str) -> None:
    with pytest.raises(UsageError):
        command_line().main(words.split(), prog_name="hires", standalone_mode=False)


def test_relative_links_lead_to_files() -> None:
    links = [(page, link.partition("#")[0]) for page in pages() for link in LINK.findall(prose(page)) if "://" not in link]
    assert len(links) > 60
    assert [f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).is_file()] == []


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_no_line_installs_a_stranger() -> None:
    """`hires` on the package index is another project, and `hires-engine` is not there yet."""
    wrong, extras = [], set()
    for page in pages():
        for line in re.findall(rf"(?:{'|'.join(INSTALLERS)})[^`\n]*", page.read_text()):
            words = line.partition(" #")[0].split()
            wrong += [f"{page.name}: {line}" for word in words if re.match(r"""['"]?hires""", word)]
            extras |= {extra for listed in re.findall(r"\.\[([\w,]+)\]", line) for extra in listed.split(",")}
    assert wrong == []
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras <= set(declared)
    assert {"server", "upscale", "plot"} <= extras


def test_make_targets_are_the_makefiles() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {words[1] for block in all_blocks("bash") for words in shell_lines(block) if words[0] == "make"}
    used |= set(re.findall(r"`make ([\w-]+)[^`]*`", "\n".join(map(prose, pages()))))
    assert {"demo", "test", "docs"} <= used
    assert used <= targets


def test_generated_tables_are_in_documents_that_the_report_draws() -> None:
    holders = {str(page.relative_to(ROOT)) for page in pages() if "<!-- report:" in page.read_text()}
    assert holders == {str(name) for name in write.DOCUMENTS}


def test_the_reference_shows_every_public_name() -> None:
    shown = API.findall((ROOT / "docs" / "python.md").read_text())
    public = {f"hires.{name}" for name in hires.__all__ if not name.startswith("_")}
    assert public <= set(shown)
    for name in shown:
        parent, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(parent), last), name


def test_the_readme_is_short_and_every_fence_has_a_language_that_is_tested() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    for page in pages():
        for block in blocks(page):
            assert block.language in ("python", "bash", "powershell", "text", ""), block
            assert block.language or "hires " not in block.text.replace("hires.", ""), f"{block}: say bash or python"
