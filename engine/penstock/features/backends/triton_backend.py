"""Programs by Triton: one fused kernel a program, a block of rows a program instance.

numpy arrays run in Triton's interpreter, CuPy arrays from a cubin on their device (`gpu.launch`), which is
compiled without contraction to FMA. Validity is a byte a row outside and a mask inside.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from penstock.features import float_math
from penstock.features.backends import generated, operations
from penstock.features.backends.columns import instruction_text, padded_table
from penstock.features.backends.numpy_backend import SCALARS
from penstock.features.backends.text import function_texts
from penstock.features.expressions import Expr, is_floating
from penstock.features.program import Distribution, Program, lower
from penstock_kernels.gpu.aot import Kernel
from penstock_kernels.gpu.launch import array_module, launch

BLOCK = 256
_PRIMITIVES = """
@triton.jit
def bits(x):
    return x.to(tl.int64, bitcast=True)


@triton.jit
def value(i):
    return i.to(tl.float64, bitcast=True)


@triton.jit
def select(condition, then, other):
    return tl.where(condition, then, other)


@triton.jit
def as_int(condition):
    return condition.to(tl.int64)


@triton.jit
def as_float(i):
    return i.to(tl.float64)


@triton.jit
def whole(x):
    return x.to(tl.int64)


@triton.jit
def narrow(x):
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def floor(x):
    return tl.floor(x)


@triton.jit
def ceil(x):
    return tl.ceil(x)


@triton.jit
def root(x):
    return tl.sqrt(x)


@triton.jit
def quotient(a, b):
    return a // b


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def minus(a, b):
    return a - b


@triton.jit
def times(a, b):
    return a * b


@triton.jit
def at(table, i):
    return tl.load(table + i)


@triton.jit
def rest(x, y):
    # fmod in integers: the quotient's bits, 10 a round, by long division. x is finite, y is not zero.
    x_bits = bits(x) & 0x7FFFFFFFFFFFFFFF
    y_bits = bits(y) & 0x7FFFFFFFFFFFFFFF
    x_exponent = x_bits >> 52
    y_exponent = y_bits >> 52
    x_whole = (x_bits & 0xFFFFFFFFFFFFF) | tl.where(x_exponent > 0, 0x10000000000000, 0)
    y_whole = (y_bits & 0xFFFFFFFFFFFFF) | tl.where(y_exponent > 0, 0x10000000000000, 0)
    x_exponent = tl.where(x_exponent > 0, x_exponent, 1)
    y_exponent = tl.where(y_exponent > 0, y_exponent, 1)
    less = x_bits < y_bits
    left = tl.where(less, 0, x_exponent - y_exponent)
    found = x_whole % y_whole
    while tl.max(left, 0) > 0:
        shift = tl.where(left < 10, left, 10)
        found = (found << shift) % y_whole
        left = left - shift
    small = found.to(tl.float64) * 2.220446049250313e-16 * value(y_exponent << 52)
    result = tl.where(less, x, value(bits(small) | (bits(x) & -0x8000000000000000)))
    return result


@triton.jit
def lower_bound(table, n, steps, x):
    low = tl.zeros_like(x).to(tl.int64)
    high = low + n
    for _ in range(steps):
        middle = (low + high) >> 1
        open = low < high
        below = open & (tl.load(table + tl.where(open, middle, 0)) < x)
        high = tl.where(open & (below == 0), middle, high)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def upper_bound(table, n, steps, x):
    low = tl.zeros_like(x).to(tl.int64)
    high = low + n
    for _ in range(steps):
        middle = (low + high) >> 1
        open = low < high
        below = open & (tl.load(table + tl.where(open, middle, 0)) <= x)
        high = tl.where(open & (below == 0), middle, high)
        low = tl.where(below, middle + 1, low)
    return low
"""


class _Negate(ast.NodeTransformer):
    """-x as x * -1: before 3.9 Triton took it for 0 - x, whose zeros have another sign."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            return ast.BinOp(node.operand, ast.Mult(), ast.UnaryOp(ast.USub(), ast.Constant(1)))
        return node


@functools.cache
def _library() -> ModuleType:
    """Every operation as a Triton function."""
    functions = {**function_texts(float_math, SCALARS), **function_texts(operations, SCALARS)}
    parts = ["import triton\nimport triton.language as tl\n", _PRIMITIVES]
    parts += [
        f"\n@triton.jit\n{ast.unparse(_Negate().visit(ast.parse(text)))}\n" for text in functions.values()
    ]
    return generated.load("triton", "\n".join(parts))


def program_text(program: Program, name: str) -> str:
    """The source of the module with the kernel `name`."""
    lines = []
    at = 0
    for _, dtype in program.inputs:
        lines.append(f"v{at} = tl.load(i{at} + i, mask=live, other={0.0 if is_floating(dtype) else 0})")
        lines.append(f"ok{at} = tl.load(m{at} + i, mask=live, other=0) != 0")
        at += 1
    numbers = {"f": 0, "i": 0}
    for kind, _ in program.constants:
        lines.append(f"v{at} = tl.load({'floats' if kind == 'f' else 'ints'} + {numbers[kind]} + i * 0)")
        lines.append(f"ok{at} = live == live")
        numbers[kind] += 1
        at += 1
    starts = {"f": 0, "i": 0}
    for t, table in enumerate(program.tables):
        size = max(len(table.values), 1)
        kind = "i" if table.kind == "t" else "f"
        lines.append(f"t{t} = table_{kind} + {starts[kind]}")
        starts[kind] += size
        if table.kind == "r":
            lines.append(f"c{t} = table_i + {starts['i']}")
            starts["i"] += size
    used: set[str] = set()
    for step in program.code:
        lines += instruction_text(program, step, at, used, literal_sizes=True)
        at += 1
    for o, (_, _, register) in enumerate(program.outputs):
        lines.append(f"tl.store(o{o} + i, tl.where(ok{register}, v{register}, 0), mask=live)")
        lines.append(f"tl.store(k{o} + i, ok{register}.to(tl.uint8), mask=live)")
    imports = f"from {_library().__name__} import {', '.join(sorted(used))}\n" if used else ""
    body = "\n    ".join(lines)
    return (
        f"import triton\nimport triton.language as tl\n\n{imports}\n\n@triton.jit\n"
        f"def {name}({', '.join(signature(program))}: tl.constexpr):\n"
        "    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)\n"
        f"    live = i < n\n    {body}\n"
    )


def signature(program: Program) -> dict[str, str]:
    """Parameters of the kernel: input columns with validity, numbers and tables, outputs with validity, n."""
    pointers = {True: "*fp64", False: "*i64"}
    found: dict[str, str] = {}
    for i, (_, dtype) in enumerate(program.inputs):
        found |= {f"i{i}": pointers[is_floating(dtype)], f"m{i}": "*u8"}
    found |= {"floats": "*fp64", "ints": "*i64", "table_f": "*fp64", "table_i": "*i64"}
    for o, (_, dtype, _) in enumerate(program.outputs):
        found |= {f"o{o}": pointers[is_floating(dtype)], f"k{o}": "*u8"}
    return found | {"n": "i64", "BLOCK": "constexpr"}


def kernel(program: Program) -> Kernel:
    """The program's kernel, for `gpu.launch` or `gpu.aot.compile_kernel` (constant BLOCK).

    Raises:
        DefinitionError: the program has a udf.
    """
    for opaque in program.functions:
        raise opaque.refuse("is opaque Python and cannot be compiled")
    # A cubin is kept by the kernel's name, so that tells programs apart.
    text = program_text(program, "NAME")
    name = "feature_program_" + generated.digest(text)[:24]
    module = generated.load("kernel", text.replace("def NAME(", f"def {name}("))
    return Kernel(getattr(module, name), signature(program))


class TritonProgram:
    """A program over numpy columns (in the interpreter) or a device's; immutable."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._kernel = kernel(program)
        floats = [v for kind, v in program.constants if kind == "f"] or [0.0]
        ints = [v for kind, v in program.constants if kind == "i"] or [0]
        table_f: list[Any] = []
        table_i: list[Any] = []
        for table in program.tables:
            values, *others = padded_table(table)
            (table_i if table.kind == "t" else table_f).extend(values)
            if table.kind == "r":
                table_i.extend(others[0])
        self._fixed = [
            np.array(floats, np.float64),
            np.array(ints, np.int64),
            np.array(table_f or [0.0], np.float64),
            np.array(table_i or [0], np.int64),
        ]
        self._on_device: dict[int, list[Any]] = {}  # the same, by device

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """(name, dtype) of each input column."""
        return list(self._program.inputs)

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """(name, dtype) of each output column."""
        return [(name, dtype) for name, dtype, _ in self._program.outputs]

    def run(self, inputs: Sequence[tuple[Any, Any]], rows: int = 0) -> list[tuple[Any, Any]]:
        """As `_core.FeatureProgram.run`, on the device where the columns lie.

        Raises:
            ValueError: the columns do not have one length, or lie in several places.
        """
        n = len(inputs[0][0]) if inputs else rows
        if len(inputs) != len(self._program.inputs):
            raise ValueError(f"got {len(inputs)} columns; expected {len(self._program.inputs)}")
        for (name, _), (values, valid) in zip(self._program.inputs, inputs):
            if len(values) != n or (valid is not None and len(valid) != n):
                raise ValueError(f"column '{name}' has another length than {n} rows")
        xp = array_module(*[part for pair in inputs for part in pair if part is not None])
        every = xp.ones(n, np.uint8) if any(valid is None for _, valid in inputs) else None
        args: list[Any] = []
        for values, valid in inputs:
            mask = every if valid is None else xp.ascontiguousarray(valid).view(np.uint8)
            args += [xp.ascontiguousarray(values), mask]
        args += self._fixed if xp is np else self._uploaded(xp)
        out = [
            (xp.empty(n, np.float64 if is_floating(dtype) else np.int64), xp.empty(n, np.uint8))
            for _, dtype, _ in self._program.outputs
        ]
        args += [part for pair in out for part in pair]
        with np.errstate(all="ignore"):
            launch(self._kernel, (-(-n // BLOCK),), (*args, n), {"BLOCK": BLOCK})
        return [(values, valid.view(np.bool_)) for values, valid in out]

    def _uploaded(self, cupy: Any) -> list[Any]:
        device = cupy.cuda.Device().id
        if device not in self._on_device:
            uploaded = [cupy.asarray(part) for part in self._fixed]
            cupy.cuda.get_current_stream().synchronize()  # later runs may be on another stream
            self._on_device[device] = uploaded
        return self._on_device[device]


def compile(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    distributions: Mapping[str, Distribution] | None = None,
) -> TritonProgram:
    """Compile named expressions; see `program.lower`. DefinitionError for a udf."""
    return TritonProgram(lower(outputs, schema, distributions))
