"""Programs by numpy, a column at a time; the one back end that runs a `udf`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.features import float_math
from penstock.features.backends import operations
from penstock.features.backends.columns import Column, check_columns, function_name, padded_table
from penstock.features.backends.text import function_texts
from penstock.features.expressions import Expr
from penstock.features.program import SIGNATURES, Distribution, Opaque, Program, lower

# The scalar functions that stand for numpy's below; the rest of the text is taken as it is.
SCALARS = (
    "bits", "value", "select", "as_int", "as_float", "whole", "narrow", "floor", "ceil", "root", "rest",
    "quotient", "plus", "minus", "times", "at", "lower_bound", "upper_bound",
)  # fmt: skip


def _primitives() -> dict[str, Any]:
    return {
        "bits": lambda x: np.asarray(x, np.float64).view(np.int64),
        "value": lambda i: np.asarray(i, np.int64).view(np.float64),
        "select": np.where,
        "as_int": lambda c: np.asarray(c, np.int64),
        "as_float": lambda i: np.asarray(i, np.float64),
        "whole": lambda x: np.asarray(x).astype(np.int64),
        "narrow": lambda x: np.asarray(x).astype(np.float32).astype(np.float64),
        "floor": np.floor,
        "ceil": np.ceil,
        "root": np.sqrt,
        "rest": np.fmod,
        "quotient": np.floor_divide,
        "plus": np.add,
        "minus": np.subtract,
        "times": np.multiply,
        "at": lambda table, i: table[i],
        "lower_bound": lambda table, n, steps, x: np.searchsorted(table[:n], x, "left"),
        "upper_bound": lambda table, n, steps, x: np.searchsorted(table[:n], x, "right"),
    }


def _functions() -> dict[str, Callable[..., Any]]:
    space = _primitives()
    for module in (float_math, operations):
        for text in function_texts(module, SCALARS).values():
            exec(text, space)
    names = [function_name(op) for op in SIGNATURES]
    return {name: space[name] for name in (*names, *(f"{n}_ok" for n in names)) if name in space}


FUNCTIONS = _functions()


class NumpyProgram:
    """A program over numpy columns; immutable, any thread may run it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._tables = [padded_table(table) for table in program.tables]

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """(name, dtype) of each input column."""
        return list(self._program.inputs)

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """(name, dtype) of each output column."""
        return [(name, dtype) for name, dtype, _ in self._program.outputs]

    def run(self, inputs: Sequence[Column], rows: int = 0) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """As `_core.FeatureProgram.run`.

        Raises:
            ValueError: a column has a wrong dtype or length.
            DefinitionError: a udf did not return a column of the right length.
        """
        n = check_columns(inputs, self._program.inputs, rows)
        every = np.ones(n, np.bool_)
        values: list[Any] = [given for given, _ in inputs]
        valid: list[Any] = [every if mask is None else mask for _, mask in inputs]
        for kind, constant in self._program.constants:
            values.append(np.full(n, constant, np.float64 if kind == "f" else np.int64))
            valid.append(every)
        with np.errstate(all="ignore"):
            for step in self._program.code:
                if step.op == "udf":
                    found, ok = self._call(step.operands, values, valid)
                else:
                    found, ok = self._step(step.op, step.operands, values, valid)
                values.append(found)
                valid.append(ok)
        out = []
        for _, _, register in self._program.outputs:
            ok = valid[register]
            zero = values[register].dtype.type(0)
            out.append((np.where(ok, values[register], zero), np.array(ok, np.bool_)))
        return out

    def _step(
        self, op: str, operands: tuple[int, ...], values: list[Any], valid: list[Any]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        kinds = SIGNATURES[op]
        name = function_name(op)
        check = FUNCTIONS.get(f"{name}_ok")
        args: list[Any] = []
        ok: Any = True
        for kind, operand in zip(kinds[1:], operands):
            if kind in "str":
                args += self._tables[operand]
            elif check is not None:
                args += [values[operand], valid[operand]]
            else:
                args.append(values[operand])
                ok = ok & valid[operand]
        found = np.asarray(FUNCTIONS[name](*args), np.float64 if kinds[0] == "f" else np.int64)
        return found, ok if check is None else check(*args)

    def _call(
        self, operands: tuple[int, ...], values: list[Any], valid: list[Any]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        opaque: Opaque = self._program.functions[operands[0]]
        ok = np.logical_and.reduce([valid[r] for r in operands[1:]])
        given = [
            values[r][ok].astype(np.bool_) if kind == "b" else values[r][ok]
            for kind, r in zip(opaque.kinds, operands[1:])
        ]
        result = np.asarray(opaque.function(*given))
        if result.shape != (int(ok.sum()),):
            raise opaque.refuse(f"returned shape {result.shape}; expected ({int(ok.sum())},)")
        kind = np.float64 if opaque.returns == "float64" else np.int64
        found = np.zeros(len(ok), kind)
        found[ok] = result != 0 if opaque.returns == "bool" else result
        return found, ok


def compile(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    distributions: Mapping[str, Distribution] | None = None,
) -> NumpyProgram:
    """Compile named expressions; see `program.lower`."""
    return NumpyProgram(lower(outputs, schema, distributions))
