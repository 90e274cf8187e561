"""Each comparison, sign and integer of the operations' text changed once: the random programs must notice.

A change that computes the same is listed, with the reasons; any other that lives is a gap in the programs.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

import pytest
from feature_programs import SCHEMA, Case

from penstock.features import float_math
from penstock.features.backends import columns, numpy_backend, operations
from penstock.features.backends.numpy_backend import NumpyProgram
from penstock.features.backends.text import function_nodes
from penstock.features.program import SIGNATURES, Program, lower

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip

# Equal by arithmetic (a zero on either branch, a value that cannot occur), or a guard for another back end:
# numpy's `//` already rounds down and does not trap, its cast and its remainder take any float.
EQUAL = {
    ("abs_i", "0", "1"),
    ("abs_i", "a < 0", "a <= 0"),
    ("divisor", "(b == 0) | (b == -1)", "(b == 0) & (b == -1)"),
    ("divisor", "0", "1"),
    ("down_by", "1", "2"),
    ("down_by", "q - 1", "q + 1"),
    (
        "f_to_int",
        "(a >= -9.223372036854776e+18) & (a < 9.223372036854776e+18)",
        "(a >= -9.223372036854776e+18) | (a < 9.223372036854776e+18)",
    ),
    ("f_to_int", "a < 9.223372036854776e+18", "a <= 9.223372036854776e+18"),
    ("floor_div_f", "b < 0.0", "b <= 0.0"),
    ("floor_div_f", "down + 1.0", "down - 1.0"),
    ("floor_div_f", "exact - down > 0.5", "exact - down >= 0.5"),
    ("floor_div_f", "r < 0.0", "r <= 0.0"),
    ("floor_div_i", "0", "1"),
    ("floor_div_i", "1", "2"),
    ("floor_div_i", "d < 0", "d <= 0"),
    ("floor_div_i", "q - 1", "q + 1"),
    ("floor_div_i", "r < 0", "r <= 0"),
    ("maximum_i", "a < b", "a <= b"),
    ("minimum_i", "a < b", "a <= b"),
    ("mod_f", "b < 0.0", "b <= 0.0"),
    ("mod_f", "r < 0.0", "r <= 0.0"),
    ("mod_i", "0", "1"),
    ("mod_i", "d < 0", "d <= 0"),
    ("mod_i", "r + d", "r - d"),
    ("mod_i", "r < 0", "r <= 0"),
    ("rank", "0", "1"),
    ("rank", "1", "2"),
    ("rank", "k < n", "k <= n"),
    ("rank", "k > 0", "k >= 0"),
    ("round_f", "size < 4503599627370496.0", "size <= 4503599627370496.0"),
    ("safe_rest", "(magnitude(a) < 1e309) & (b == b)", "(magnitude(a) < 1e309) | (b == b)"),
    (
        "safe_rest",
        "(magnitude(a) < 1e309) & (b == b) & (b != 0.0)",
        "(magnitude(a) < 1e309) & (b == b) | (b != 0.0)",
    ),
    ("safe_rest", "magnitude(a) < 1e309", "magnitude(a) <= 1e309"),
}


def nodes() -> dict[str, ast.FunctionDef]:
    found = {}
    for module in (float_math, operations):
        found.update({node.name: node for node in function_nodes(module, numpy_backend.SCALARS)})
    return found


def reached(name: str, calls: dict[str, set[str]]) -> set[str]:
    """The functions that `name` runs, itself included."""
    seen: set[str] = set()
    left = [name]
    while left:
        at = left.pop()
        if at not in seen:
            seen.add(at)
            left += calls.get(at, ())
    return seen


def mutants(node: ast.FunctionDef) -> Iterator[tuple[str, str, str]]:
    """(before, after, text of the changed function)."""
    for index, part in enumerate(ast.walk(node)):
        number = isinstance(part, ast.Constant) and type(part.value) is int
        sign = part.ops[0] if isinstance(part, ast.Compare) else getattr(part, "op", None)
        if not number and type(sign) not in SWAPS:
            continue
        changed = copy.deepcopy(node)
        at = list(ast.walk(changed))[index]
        if isinstance(at, ast.Constant):
            at.value += 1
        elif isinstance(at, ast.Compare):
            at.ops[0] = SWAPS[type(sign)]()
        else:
            at.op = SWAPS[type(sign)]()
        yield ast.unparse(part), ast.unparse(at), ast.unparse(changed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_changed_operation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    known = nodes()
    calls = {
        name: {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call)} & set(known)
        for name, node in known.items()
    }
    users: dict[str, set[str]] = {}
    for op in SIGNATURES:
        name = columns.function_name(op)
        for function in reached(name, calls) | reached(f"{name}_ok", calls):
            users.setdefault(function, set()).add(op)
    cases: dict[str, list[tuple[Case, Program]]] = {}
    for seed in range(4000):
        case = Case(seed)
        program = lower(case.outputs, SCHEMA, case.distributions)
        for op in {step.op for step in program.code}:
            cases.setdefault(op, []).append((case, program))
    space = numpy_backend.FUNCTIONS["add_f"].__globals__
    alive, count = set(), 0
    for name in [node.name for node in function_nodes(operations, numpy_backend.SCALARS)]:
        for before, after, text in mutants(known[name]):
            count += 1
            with monkeypatch.context() as patch:
                patch.setitem(space, name, None)
                exec(text, space)
                if name in numpy_backend.FUNCTIONS:
                    patch.setitem(numpy_backend.FUNCTIONS, name, space[name])
                if not any(noticed(*case) for op in users.get(name, ()) for case in cases[op]):
                    alive.add((name, before, after))
    assert count > 300
    assert alive == EQUAL


def noticed(case: Case, program: Program) -> bool:
    try:
        return case.differs(NumpyProgram(program)) is not None
    except (ArithmeticError, IndexError, ValueError, TypeError):
        return True  # a change that fails is noticed as well
