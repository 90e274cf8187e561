"""What the Python back ends share: the columns that they take, the tables and the text of a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.features.backends import operations
from penstock.features.expressions import is_floating
from penstock.features.program import SIGNATURES, Instruction, Program, Table

Column = tuple[NDArray[Any], NDArray[np.bool_] | None]

KLEENE = {"and": "and_", "or": "or_", "not": "not_"}
CHECKED = frozenset(name.removesuffix("_ok") for name in vars(operations) if name.endswith("_ok"))


def check_columns(given: Sequence[Column], fields: Sequence[tuple[str, str]], rows: int) -> int:
    """The row count of columns for a program's inputs.

    Raises:
        ValueError: naming the column that has a wrong dtype or length, in the words of `_core`.
    """
    if len(given) != len(fields):
        raise ValueError(f"got {len(given)} columns; expected {len(fields)}")
    n = len(given[0][0]) if given else rows
    for (name, dtype), (values, valid) in zip(fields, given):
        kind = np.float64 if is_floating(dtype) else np.int64
        if values.dtype != kind or values.ndim != 1:
            raise ValueError(f"column '{name}' is not a contiguous {kind.__name__} array")
        if len(values) != n:
            raise ValueError(f"column '{name}' has {len(values)} rows; expected {n}")
        if valid is not None and (valid.dtype != np.bool_ or valid.shape != (n,)):
            raise ValueError(f"column '{name}': validity does not have the values' length")
    return n


def padded_table(table: Table) -> tuple[Any, ...]:
    """(values, [cumulative counts], size, steps of a binary search); never empty, so that [0] can be read."""
    kind = np.int64 if table.kind == "t" else np.float64
    n = len(table.values)
    values = np.array(table.values or (0,), kind)
    steps = n.bit_length()
    if table.kind == "r":
        return values, np.array(table.cumulative, np.int64), n, steps
    return values, n, steps


def function_name(op: str) -> str:
    """The function of `operations` or `float_math` that computes an operation."""
    return KLEENE.get(op, op)


def instruction_text(
    program: Program, step: Instruction, at: int, used: set[str], literal_sizes: bool = False
) -> list[str]:
    """Two statements that set v<at> and ok<at>; adds the functions that they call to `used`.

    A table t has the names t<t> and c<t>; its size and steps are n<t> and s<t>, or literal numbers.
    """
    name = function_name(step.op)
    args: list[str] = []
    valid: list[str] = []
    for kind, operand in zip(SIGNATURES[step.op][1:], step.operands):
        if kind in "str":
            size = len(program.tables[operand].values)
            args += [f"t{operand}", f"c{operand}"] if kind == "r" else [f"t{operand}"]
            args += [str(size), str(size.bit_length())] if literal_sizes else [f"n{operand}", f"s{operand}"]
        elif name in CHECKED:
            args += [f"v{operand}", f"ok{operand}"]
        else:
            args.append(f"v{operand}")
            valid.append(f"ok{operand}")
    used.add(name)
    call = f"({', '.join(args)})"
    if name in CHECKED:
        used.add(f"{name}_ok")
        return [f"v{at} = {name}{call}", f"ok{at} = {name}_ok{call}"]
    return [f"v{at} = {name}{call}", f"ok{at} = {' & '.join(valid)}"]
