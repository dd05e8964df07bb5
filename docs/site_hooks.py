"""What `mkdocs build` adds to the plain markdown of docs/, which also reads on a forge.

<!-- api: hires.render -->       becomes the reference of that name, read from the sources by mkdocstrings
contributing.md, changelog.md    show the files at the root of the repository
links to benchmarks/results/     lead to copies within the site
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
RESULTS = Path("benchmarks/results")
API = re.compile(r"^<!-- api: (?P<name>[\w.]+) -->$", re.MULTILINE)
RESULT_LINK = re.compile(r"\]\((?P<up>(?:\.\./)*)benchmarks/results/")


def on_files(files: Files, config: Any) -> Files:
    """Add the rows and contact sheets that pages link to."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.is_file():
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A page's text as the site shows it."""
    name = page.file.src_uri
    if name in INCLUDED:
        markdown = (ROOT / INCLUDED[name]).read_text().replace("](docs/", "](")
    up = "../" * name.count("/")
    markdown = RESULT_LINK.sub(f"]({up}results/", markdown)
    return API.sub(lambda found: f"::: {found['name']}", markdown)
