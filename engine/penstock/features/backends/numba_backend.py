"""Programs by numba: one loop over the rows, compiled once a program and kept on disk.

The generated module is named after the program's text and numba's own cache after the processor, so a program
is compiled once a machine. Constants and tables are arguments: programs that differ in them alone share code.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.features import float_math
from penstock.features.backends import generated, operations
from penstock.features.backends.columns import Column, check_columns, instruction_text, padded_table
from penstock.features.backends.text import function_texts
from penstock.features.expressions import Expr, is_floating
from penstock.features.program import Distribution, Program, lower

# The numpy error model divides by zero as IEEE 754 does; without fastmath nothing is fused or reordered.
_NJIT = '@njit(nogil=True, cache=True, error_model="numpy")'
_BITS = f"""
{_NJIT}
def bits(x):
    return np.float64(x).view(np.int64)


{_NJIT}
def value(i):
    return np.int64(i).view(np.float64)
"""


@functools.cache
def _library() -> ModuleType:
    """Every operation as a compiled function; each is compiled when a program first uses it."""
    functions = {
        **function_texts(float_math, ("bits", "value")),
        **function_texts(operations),
    }
    parts = ["import math\nimport numpy as np\nfrom numba import njit\n", _BITS]
    parts += [f"\n{_NJIT}\n{text}\n" for text in functions.values()]
    return generated.load("numba", "\n".join(parts))


def program_text(program: Program) -> str:
    """The source of the module that runs the program."""
    inputs = range(len(program.inputs))
    outputs = range(len(program.outputs))
    arguments = [a for i in inputs for a in (f"i{i}", f"m{i}")]
    arguments += ["floats", "ints"]
    for t, table in enumerate(program.tables):
        arguments += [f"t{t}", f"c{t}"] if table.kind == "r" else [f"t{t}"]
        arguments += [f"n{t}", f"s{t}"]
    arguments += [a for o in outputs for a in (f"o{o}", f"k{o}")]
    lines = [f"    v{i} = i{i}[r]\n    ok{i} = m{i}[r]" for i in inputs]
    at = len(program.inputs)
    numbers = {"f": 0, "i": 0}
    for kind, _ in program.constants:
        lines.append(f"    v{at} = {'floats' if kind == 'f' else 'ints'}[{numbers[kind]}]\n    ok{at} = True")
        numbers[kind] += 1
        at += 1
    used: set[str] = set()
    for step in program.code:
        lines += [f"    {line}" for line in instruction_text(program, step, at, used)]
        at += 1
    for o, (_, dtype, register) in enumerate(program.outputs):
        zero = "0.0" if is_floating(dtype) else "0"
        lines.append(f"    o{o}[r] = v{register} if ok{register} else {zero}\n    k{o}[r] = ok{register}")
    body = "\n".join(lines).replace("\n", "\n    ")
    imports = f"from {_library().__name__} import {', '.join(sorted(used))}\n" if used else ""
    return (
        f"from numba import njit\n{imports}\n\n{_NJIT}\ndef run(n, {', '.join(arguments)}):\n"
        f"    for r in range(n):\n    {body}\n"
    )


class NumbaProgram:
    """A program over numpy columns; immutable, any thread may run it. The first run compiles."""

    def __init__(self, program: Program) -> None:
        for opaque in program.functions:
            raise opaque.refuse("is opaque Python and cannot be compiled")
        self._program = program
        self._run = generated.load("program", program_text(program)).run
        constants = [np.array([v for k, v in program.constants if k == kind] or [0], dtype)
                     for kind, dtype in (("f", np.float64), ("i", np.int64))]  # fmt: skip
        self._fixed = [*constants, *(part for table in program.tables for part in padded_table(table))]

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """(name, dtype) of each input column."""
        return list(self._program.inputs)

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """(name, dtype) of each output column."""
        return [(name, dtype) for name, dtype, _ in self._program.outputs]

    def run(self, inputs: Sequence[Column], rows: int = 0) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """As `_core.FeatureProgram.run`; the GIL is released while it runs."""
        n = check_columns(inputs, self._program.inputs, rows)
        every = np.ones(n, np.bool_)
        args: list[Any] = []
        for values, valid in inputs:
            args += [np.ascontiguousarray(values), every if valid is None else np.ascontiguousarray(valid)]
        out = [
            (np.empty(n, np.float64 if is_floating(dtype) else np.int64), np.empty(n, np.bool_))
            for _, dtype, _ in self._program.outputs
        ]
        self._run(n, *args, *self._fixed, *(part for pair in out for part in pair))
        return out


def compile(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    distributions: Mapping[str, Distribution] | None = None,
) -> NumbaProgram:
    """Compile named expressions; see `program.lower`. DefinitionError for a udf."""
    return NumbaProgram(lower(outputs, schema, distributions))
