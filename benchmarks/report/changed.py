"""Which definitions of hires/ differ from those of a commit, so which rows of it are of other code.

    python -m benchmarks changed 5753dfc           # writes benchmarks/results/changed_definitions.csv

Where a definition stands, its imports and its docstrings do not count. Rows of the CSV: what differs (changed, new, gone), its
name, the file that held it at the commit and the file that holds it now.
"""

from __future__ import annotations

import argparse
import ast
import collections
import csv
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.definitions import ROOT, definitions

Defined = dict[str, dict[str, str]]
"""Name of a definition: the file that holds one of that name, and the definition as text."""
COLUMNS = ("state", "name", "before", "now")


def defined(root: Path) -> Defined:
    """The functions, classes and assignments at the top level of every file of hires/ below `root`."""
    found: Defined = collections.defaultdict(dict)
    for file in sorted((root / "hires").rglob("*.py")):
        source = file.read_text()
        tree = ast.parse(source)
        for statement in tree.body:
            for name in _names(statement):
                found[name][str(file.relative_to(root))] = "\n".join(definitions(ast.unparse(_alone(tree, statement)), root))
    return found


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _alone(tree: ast.Module, statement: ast.stmt) -> ast.Module:
    """The statement with the file's imports, by which names of ours are known."""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.Module([*imports, statement], [])


def differing(before: Defined, now: Defined) -> list[tuple[str, str, str, str]]:
    """Rows of COLUMNS, by name. A definition whose text is found anywhere in the other tree is the same."""
    rows = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, {}), now.get(name, {})
        left = {file: text for file, text in old.items() if text not in new.values()}
        came = {file: text for file, text in new.items() if text not in old.values()}
        if left or came:
            state = "changed" if left and came else "gone" if left else "new"
            rows.append((state, name, " ".join(left), " ".join(came)))
    return rows


def at_commit(commit: str, folder: Path) -> Path:
    """hires/ of a commit below `folder`. CalledProcessError for a commit that this repository lacks."""
    archive = subprocess.run(["git", "archive", commit, "hires"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks changed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--csv", type=Path, default=RESULTS / "changed_definitions.csv")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            before = defined(at_commit(args.commit, Path(folder)))
        except subprocess.CalledProcessError as error:
            print(f"{args.commit}: {error.stderr.decode().strip()}; give a commit of this repository", file=sys.stderr)
            return 2
        rows = differing(before, defined(ROOT))
    with args.csv.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    counts = collections.Counter(state for state, *_ in rows)
    print(f"{len(before)} names at {args.commit}: {counts['changed']} changed, {counts['gone']} gone, {counts['new']} new")
    return 0
