"""What a Python file defines, as text that does not depend on where it stands or what its imports are called."""

from __future__ import annotations

import ast
import re
from pathlib import Path

OURS = ("hires", "benchmarks")
ROOT = Path(__file__).parents[1]


def definitions(source: str, root: Path = ROOT) -> list[str]:
    """`ast.dump` of each top-level statement, without imports, docstrings and the modules in dotted names of ours.

    root: the checkout that `source` is from. SyntaxError where `source` is not Python.
    """
    tree = ast.parse(source)
    plain = _Plain(tree, root)
    kept = (plain.visit(statement) for statement in tree.body if not _is_text(statement))
    return [ast.dump(statement) for statement in kept if statement is not None]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_module(root: Path, package: str | None, name: str) -> bool:
    place = root.joinpath(*(package or "").split("."), name)
    return place.is_dir() or place.with_suffix(".py").exists()


class _Plain(ast.NodeTransformer):
    """Takes imports and docstrings out, and writes `module.name`, an alias and "hires.module.name" as `name`."""

    def __init__(self, tree: ast.Module, root: Path) -> None:
        self.names: dict[str, str] = {}
        self.modules = set(OURS)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                self.names |= {alias.asname or alias.name: alias.name for alias in node.names}
                self.modules |= {
                    alias.asname or alias.name for alias in node.names if _is_module(root, node.module, alias.name)
                }

    def generic_visit(self, node: ast.AST) -> ast.AST | None:  # type: ignore[override]
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [statement for statement in body if not _is_text(statement)]
            if not kept and isinstance(node, ast.If):  # it held imports for the type checker only
                return None
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST | None:
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            return ast.Name(node.attr, node.ctx)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and re.fullmatch(rf"({'|'.join(OURS)})(\.\w+)+", node.value):
            return ast.Constant(node.value.rpartition(".")[2])
        return node
