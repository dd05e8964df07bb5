"""The README's promises: its Python snippet runs as printed, its commands are the Makefile's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from hires.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_snippet_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets[0], "README.md", "exec"), {"__name__": "__main__"})
    written = list(tmp_path.glob("*.png"))
    assert len(written) == 1
    wanted = re.search(r'size="(\d+)x(\d+)"', snippets[0])
    assert wanted is not None
    with Image.open(written[0]) as picture:
        assert picture.size == (int(wanted[1]), int(wanted[2]))


def test_the_commands_are_the_makefiles() -> None:
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_picture_it_shows_is_there() -> None:
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert shown
    for path in shown:
        assert (ROOT / path).is_file(), path


def test_set_up_pins_do_not_contradict_the_ranges() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pins["torch"] == "2.13.0"
    assert "triton" not in pins


def test_the_table_of_models_names_every_family() -> None:
    """By its title, and where its keys are those of another by the option that says so."""
    table = README.split("## Models")[1].split("## Measured")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    commands = "\n".join(rows)
    for facts in FAMILIES.values():
        assert facts.title.split(",")[0].split()[0] in commands, facts.title
        said = "--lora lcm-lora-sdxl" if facts.name == "sdxl-lcm" else f"--family {facts.name}"
        assert facts.same_keys_as is None or said in commands, facts.name
