"""`float_math` in C++: prints csrc/features/float_math.h.

python -m penstock.features.backends.float_math_cpp > csrc/features/float_math.h
"""

from __future__ import annotations

import ast

from penstock.features import float_math
from penstock.features.backends.text import function_nodes

PRIMITIVES = ("bits", "value", "select")
_HEAD = """\
// exp, log, pow and their kin with the same bits on every machine and back end.
//
// Written by penstock.features.backends.float_math_cpp from penstock/features/float_math.py, which explains
// the methods and bounds; do not edit. Pure functions without branches or tables: any thread may call them,
// and a loop over them vectorises. They need IEEE 754 double arithmetic without contraction to FMA.
// Internal linkage, because files built for one instruction set include this.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

// A call left in a loop would keep it from vectorising.
#define PENSTOCK_INLINE [[gnu::always_inline]] static inline

namespace penstock::float_math {

PENSTOCK_INLINE int64_t bits(double x) {
  return std::bit_cast<int64_t>(x);
}
PENSTOCK_INLINE double value(int64_t i) {
  return std::bit_cast<double>(i);
}
PENSTOCK_INLINE int64_t shift_right(int64_t i, int n) {
  return static_cast<int64_t>(static_cast<uint64_t>(i) >> n);
}
PENSTOCK_INLINE int64_t shift_left(int64_t i, int n) {
  return static_cast<int64_t>(static_cast<uint64_t>(i) << n);
}
PENSTOCK_INLINE bool both(bool a, bool b) {
  return a & b;
}
PENSTOCK_INLINE bool either(bool a, bool b) {
  return a | b;
}
// By mask: of `?:` compilers make jumps, which keep a loop from vectorising.
PENSTOCK_INLINE int64_t select(bool condition, int64_t then, int64_t other) {
  return other ^ ((then ^ other) & -int64_t{condition});
}
PENSTOCK_INLINE double select(bool condition, double then, double other) {
  return value(select(condition, bits(then), bits(other)));
}
"""
_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.BitAnd: "&", ast.BitOr: "|"}
_COMPARE = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
_INTEGERS = ("integer_of", "log_bits")
_OF_INTEGERS = {"power_of_two": ("n",), "float_of": ("n",), "scale": ("n",), "exp_of_parts": ("n",)}


def _is_bool(node: ast.expr, bools: set[str]) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitAnd | ast.BitOr) and _is_bool(node.left, bools)
    return isinstance(node, ast.Compare) or (isinstance(node, ast.Name) and node.id in bools)


def _expression(node: ast.expr, bools: set[str]) -> str:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, float):
            if node.value == float_math.INF:
                return "std::numeric_limits<double>::infinity()"
            return repr(node.value)
        return "INT64_MIN" if node.value == float_math.SIGN else f"INT64_C({node.value!r})"
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.UnaryOp):
        return f"(-{_expression(node.operand, bools)})"
    if isinstance(node, ast.Compare):
        sign = _COMPARE[type(node.ops[0])]
        return f"({_expression(node.left, bools)} {sign} {_expression(node.comparators[0], bools)})"
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return f"{node.func.id}({', '.join(_expression(arg, bools) for arg in node.args)})"
    assert isinstance(node, ast.BinOp)
    if _is_bool(node, bools):
        name = "both" if isinstance(node.op, ast.BitAnd) else "either"
        return f"{name}({_expression(node.left, bools)}, {_expression(node.right, bools)})"
    if isinstance(node.op, ast.RShift | ast.LShift):
        assert isinstance(node.right, ast.Constant)
        name = "shift_right" if isinstance(node.op, ast.RShift) else "shift_left"
        return f"{name}({_expression(node.left, bools)}, {node.right.value!r})"
    return f"({_expression(node.left, bools)} {_BINARY[type(node.op)]} {_expression(node.right, bools)})"


def _function(node: ast.FunctionDef) -> str:
    integers = _OF_INTEGERS.get(node.name, ())
    arguments = ", ".join(f"{'int64_t' if a.arg in integers else 'double'} {a.arg}" for a in node.args.args)
    lines = [
        f"PENSTOCK_INLINE {'int64_t' if node.name in _INTEGERS else 'double'} {node.name}({arguments}) {{"
    ]
    known = {a.arg for a in node.args.args}
    bools: set[str] = set()
    for statement in node.body:
        if isinstance(statement, ast.Return):
            assert statement.value is not None
            lines.append(f"  return {_expression(statement.value, bools)};")
            continue
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        name = statement.targets[0].id
        lines.append(f"  {'' if name in known else 'auto '}{name} = {_expression(statement.value, bools)};")
        known.add(name)
        if _is_bool(statement.value, bools):
            bools.add(name)
    return "\n".join([*lines, "}"])


def header() -> str:
    """The text of the header, before clang-format."""
    functions = [_function(node) for node in function_nodes(float_math, PRIMITIVES)]
    return "\n".join(
        [_HEAD, "\n\n".join(functions), "\n}  // namespace penstock::float_math\n\n#undef PENSTOCK_INLINE\n"]
    )


if __name__ == "__main__":
    print(header(), end="")
