"""Functions of a module as plain text: annotations and docstrings dropped, constants put in.

Every generated back end is made of such text, so that what it computes stands in one place.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from types import ModuleType


class _Fold(ast.NodeTransformer):
    def __init__(self, constants: dict[str, int | float]) -> None:
        self.constants = constants

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if isinstance(node.ctx, ast.Load) and node.id in self.constants:
            value = self.constants[node.id]
            if value != value:
                return ast.parse("1e309 - 1e309", mode="eval").body
            return ast.copy_location(ast.Constant(value), node)
        return node


@cache
def function_nodes(module: ModuleType, skip: tuple[str, ...] = ()) -> tuple[ast.FunctionDef, ...]:
    """The module's functions, in order, but those in `skip`; names in capitals become their numbers."""
    constants = {n: v for n, v in vars(module).items() if n.isupper() and isinstance(v, int | float)}
    found = []
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.FunctionDef) or node.name in skip:
            continue
        node.returns = None
        for argument in node.args.args:
            argument.annotation = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        found.append(ast.fix_missing_locations(_Fold(constants).visit(node)))
    return tuple(found)


def function_texts(module: ModuleType, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Name and text of each function."""
    return {node.name: ast.unparse(node) for node in function_nodes(module, skip)}
