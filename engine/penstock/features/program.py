"""From expressions to a register program: the one form that every back end runs, and its bytes for C++.

A register holds float64 ("f") or int64 ("i"; bools are 0 and 1, times microseconds, strings codes) and
validity. Registers are numbered inputs first, then constants, then one for each instruction. The meaning of
an operation is that of the expressions it comes from (`oracle`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from penstock.errors import DefinitionError
from penstock.features.expression_types import at_line, infer
from penstock.features.expressions import (
    DTYPES,
    INT_MAX,
    INT_MIN,
    MATH,
    TIME_PARTS,
    UNITS_US,
    Expr,
    is_floating,
    walk,
)
from penstock.features.text_inputs import TextFunction, input_name

# Result kind, then operand kinds: f float, i integer, s/t/r table of floats, of integers, of ranks. The
# position is the number in a program's bytes: append only. csrc/features/operations.h holds the same.
SIGNATURES = {
    "add_f": "fff", "sub_f": "fff", "mul_f": "fff", "div_f": "fff", "neg_f": "ff", "abs_f": "ff",
    "sqrt_f": "ff", "floor_f": "ff", "ceil_f": "ff", "minimum_f": "fff", "maximum_f": "fff",
    "lt_f": "iff", "le_f": "iff", "eq_f": "iff",
    "add_i": "iii", "sub_i": "iii", "mul_i": "iii", "neg_i": "ii", "abs_i": "ii",
    "minimum_i": "iii", "maximum_i": "iii", "lt_i": "iii", "le_i": "iii", "eq_i": "iii",
    "and": "iii", "or": "iii", "not": "ii", "where_f": "fiff", "where_i": "iiii",
    "is_null_f": "if", "is_null_i": "ii", "fill_null_f": "fff", "fill_null_i": "iii",
    "int_to_f": "fi", "f_to_int": "if", "f_to_f32": "ff", "int_to_bool": "ii", "f_to_bool": "if",
    "minute": "ii", "hour": "ii", "weekday": "ii", "day": "ii", "month": "ii",
    "isin_f": "ifs", "isin_i": "iit", "rank": "ffr",
    "floor_div_f": "fff", "mod_f": "fff", "floor_div_i": "iii", "mod_i": "iii",
    "sign_f": "ff", "sign_i": "ii", "round_f": "ff",
    "exp": "ff", "expm1": "ff", "exp2": "ff", "log": "ff", "log1p": "ff", "log2": "ff", "log10": "ff",
    "tanh": "ff", "pow": "fff", "is_nan": "if",
    "bucket_f": "ifs", "bucket_right_f": "ifs", "bucket_i": "iit", "bucket_right_i": "iit",
    "second": "ii", "day_of_year": "ii", "year": "ii",
    "floor_to": "iii", "week_start": "ii", "month_start": "ii", "year_start": "ii",
    "hash_i": "ii", "bucket_of": "iii",
}  # fmt: skip
OPS = {name: number for number, name in enumerate(SIGNATURES)}
_UNUSED = 0xFFFFFFFF


@dataclass(frozen=True)
class Distribution:
    """A fitted distribution: distinct values ascending, and how many samples are <= each of them."""

    values: tuple[float, ...]
    cumulative: tuple[int, ...]

    def __post_init__(self) -> None:
        v, c = self.values, self.cumulative
        good = len(v) == len(c) > 0 and not any(map(math.isnan, v)) and c[0] > 0
        if not good or any(a >= b for a, b in pairwise(v)) or any(a >= b for a, b in pairwise(c)):
            raise DefinitionError("a distribution needs ascending values with growing cumulative counts")

    @classmethod
    def fit(cls, samples: Sequence[float]) -> Distribution:
        """Fit to the samples that are not NaN; at least one is needed."""
        clean = sorted(s for s in map(float, samples) if not math.isnan(s))
        last = {value: i + 1 for i, value in enumerate(clean)}
        return cls(tuple(last), tuple(last.values()))


@dataclass(frozen=True)
class Table:
    """Values ascending; for ranks also their cumulative counts. kind: "s" floats, "t" integers, "r" ranks."""

    kind: str
    values: tuple[Any, ...]
    cumulative: tuple[int, ...] = ()


@dataclass(frozen=True)
class Opaque:
    """A `udf`: the function, the kinds ("f", "i", "b") of its arguments and the dtype it returns."""

    name: str
    function: Callable[..., Any]
    kinds: str
    returns: str
    at: tuple[str, int]

    def refuse(self, why: str) -> DefinitionError:
        """An error that names the function and the line of its use."""
        return DefinitionError(f"udf '{self.name}' {why}; defined at {self.at[0]}:{self.at[1]}")


@dataclass(frozen=True)
class Instruction:
    """An operation of `SIGNATURES` and its operands: registers, or a table where the signature has one.

    The operation "udf" has the number of an Opaque first, then registers.
    """

    op: str
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """Named expressions as registers.

    Attributes:
        inputs: (name, dtype); columns by name, then functions of string columns (`text_inputs`), then "now".
        outputs: (name, dtype, register).
        constants: (kind, value), kind "f" or "i".
    """

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str, int], ...]
    constants: tuple[tuple[str, Any], ...]
    tables: tuple[Table, ...]
    code: tuple[Instruction, ...]
    functions: tuple[Opaque, ...] = ()

    def to_bytes(self) -> bytes:
        """The form that `_core.FeatureProgram` loads.

        Raises:
            DefinitionError: the program has a udf.
        """
        for opaque in self.functions:
            raise opaque.refuse(
                "is opaque Python and cannot be computed at request time; use it in a stored feature, "
                "without now()"
            )
        counts = (len(self.inputs), len(self.outputs), len(self.constants), len(self.tables), len(self.code))
        out = bytearray(b"PSFP") + struct.pack("<6I", 1, *counts)
        for name, dtype in self.inputs:
            out += _text(name) + struct.pack("<B", DTYPES.index(dtype))
        for name, dtype, register in self.outputs:
            out += _text(name) + struct.pack("<BI", DTYPES.index(dtype), register)
        for kind, value in self.constants:
            out += struct.pack("<BBd" if kind == "f" else "<BBq", kind != "f", 1, value)
        for table in self.tables:
            n, number = len(table.values), "str".index(table.kind)
            out += struct.pack(f"<BI{n}{'q' if number == 1 else 'd'}", number, n, *table.values)
            out += struct.pack(f"<{len(table.cumulative)}q", *table.cumulative)
        for step in self.code:
            unused = [_UNUSED] * (3 - len(step.operands))
            out += struct.pack("<H3I", OPS[step.op], *step.operands, *unused)
        return bytes(out)


Ref = tuple[str, int]


class _Builder:
    """Registers, constants and tables of one program; equal instructions share a register."""

    def __init__(self, inputs: Sequence[tuple[str, str]]) -> None:
        self.inputs = {name: i for i, (name, _) in enumerate(inputs)}
        self.constants: dict[bytes, tuple[str, Any]] = {}
        self.constant_at: dict[bytes, int] = {}
        self.tables: dict[Table, int] = {}
        self.functions: list[Opaque] = []
        self.code: dict[tuple[str, tuple[Ref, ...]], int] = {}

    def constant(self, dtype: str, value: Any) -> Ref:
        real = is_floating(dtype)
        value = float(value) if real else int(value)
        blob = struct.pack("<Bd" if real else "<Bq", real, value)  # by bits: -0.0 is not 0.0
        self.constants.setdefault(blob, ("f" if real else "i", value))
        return ("const", self.constant_at.setdefault(blob, len(self.constant_at)))

    def table(self, kind: str, values: Sequence[Any], cumulative: Sequence[int] = ()) -> Ref:
        table = Table(kind, tuple(values), tuple(cumulative))
        return ("table", self.tables.setdefault(table, len(self.tables)))

    def emit(self, name: str, *args: Ref) -> Ref:
        return ("code", self.code.setdefault((name, args), len(self.code)))

    def number(self, ref: Ref) -> int:
        kind, index = ref
        base = {"code": len(self.inputs) + len(self.constants), "const": len(self.inputs)}
        return index + base.get(kind, 0)


def _convert(b: _Builder, ref: Ref, source: str, target: str) -> Ref:
    if source == target or (target == "float64" and source == "float32"):
        return ref
    if is_floating(target):
        wide = ref if is_floating(source) else b.emit("int_to_f", ref)
        return b.emit("f_to_f32", wide) if target == "float32" else wide
    kind = "f" if is_floating(source) else "int"
    if target == "bool":
        return b.emit(f"{kind}_to_bool", ref)
    return b.emit("f_to_int", ref) if kind == "f" else ref


def int_members(values: Sequence[int | float]) -> list[int]:
    """The members of an isin set that an int64 can equal."""
    exact = {int(v) for v in values if isinstance(v, int) or v.is_integer()}
    return sorted(v for v in exact if INT_MIN <= v <= INT_MAX)


def float_members(values: Sequence[int | float]) -> list[float]:
    """The members of a set of numbers as float64."""
    return sorted({float(v) for v in values})


def distribution_of(node: Expr, distributions: Mapping[str, Distribution]) -> Distribution:
    """The fitted distribution of a `percentile_rank`."""
    found = distributions.get(node.args[0].fingerprint())
    if found is None:
        raise at_line(node, f"percentile_rank({node.args[0]!r}) has no fitted distribution")
    return found


def text_function(node: Expr) -> TextFunction | None:
    """The function of a string column that a host must compute for this node; None if there is none."""
    if node.op == "text_in":
        return TextFunction(node.args[0].param, "in", tuple(node.param))
    if node.op == "hash_bucket" and node.args[0].op == "col":
        return TextFunction(node.args[0].param, "hash")
    return None


def compares_integers(node: Expr, dtype: str) -> bool:
    """Whether a `bucketize` compares as int64."""
    return dtype == "int64" and all(isinstance(edge, int) for edge in node.param[1])


def _bucketize(b: _Builder, node: Expr, ref: Ref, dtype: str) -> Ref:
    name = "bucket_right" if node.param[0] else "bucket"
    if compares_integers(node, dtype):
        return b.emit(f"{name}_i", ref, b.table("t", node.param[1]))
    return b.emit(f"{name}_f", _convert(b, ref, dtype, "float64"), b.table("s", float_members(node.param[1])))


def _truncate(b: _Builder, node: Expr, ref: Ref) -> Ref:
    if isinstance(node.param, int):
        return b.emit("floor_to", ref, b.constant("int64", node.param))
    return b.emit(f"{node.param}_start", ref)


def _udf(b: _Builder, node: Expr, refs: list[Ref], types: list[str]) -> Ref:
    kinds = "".join("f" if is_floating(t) else "b" if t == "bool" else "i" for t in types)
    assert node.function is not None
    returns, name, _ = node.param
    b.functions.append(Opaque(name, node.function, kinds, returns, node.at))
    return b.emit("udf", ("function", len(b.functions) - 1), *refs)


def _lower(
    b: _Builder, node: Expr, refs: list[Ref], types: list[str], result: str,
    distributions: Mapping[str, Distribution],
) -> Ref:  # fmt: skip
    op = node.op
    if op in ("col", "now"):
        # A string that is only asked about is not an input itself.
        return ("input", b.inputs.get(node.param or "now", -1))
    if op == "lit":
        return b.constant(*node.param)
    if op in ("and", "or", "not", "is_nan", *TIME_PARTS):
        return b.emit(op, *refs)
    if op in ("text_in", "hash_bucket"):
        text = text_function(node) if types[0] == "string" else None
        found = b.emit("hash_i", refs[0]) if text is None else ("input", b.inputs[input_name(text)])
        return found if op == "text_in" else b.emit("bucket_of", found, b.constant("int64", node.param))
    if op in ("pow", *MATH):
        return b.emit(op, *[_convert(b, r, t, "float64") for r, t in zip(refs, types)])
    if op == "cast":
        return _convert(b, refs[0], types[0], result)
    if op == "code" or (op in ("floor", "ceil", "round") and result == "int64"):
        return refs[0]
    if op == "is_null":
        return b.emit("is_null_f" if is_floating(types[0]) else "is_null_i", refs[0])
    if op == "in_unit":
        return b.emit("div_f", b.emit("int_to_f", refs[0]), b.constant("float64", UNITS_US[node.param]))
    if op == "isin":
        if is_floating(types[0]):
            return b.emit("isin_f", refs[0], b.table("s", float_members(node.param)))
        return b.emit("isin_i", refs[0], b.table("t", int_members(node.param)))
    if op == "bucketize":
        return _bucketize(b, node, refs[0], types[0])
    if op == "truncate":
        return _truncate(b, node, refs[0])
    if op == "udf":
        return _udf(b, node, refs, types)
    if op == "percentile_rank":
        fitted = distribution_of(node, distributions)
        table = b.table("r", fitted.values, fitted.cumulative)
        return b.emit("rank", _convert(b, refs[0], types[0], "float64"), table)
    # Operations in the kind of their operands: float64 if any is a float or the result is one.
    if op == "where":
        chosen = [_convert(b, r, t, result) for r, t in zip(refs[1:], types[1:])]
        return b.emit("where_f" if is_floating(result) else "where_i", refs[0], *chosen)
    real = is_floating(result) or any(map(is_floating, types))
    if real:
        refs = [_convert(b, r, t, "float64") for r, t in zip(refs, types)]
    return b.emit(f"{op}_{'f' if real else 'i'}", *refs)


def program_inputs(outputs: Sequence[tuple[str, Expr]], schema: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, dtype) of each input: columns by name, functions of string columns, ("now", "timestamp")."""
    roots = [expr for _, expr in outputs]
    types = infer(roots, schema)
    order = walk(*roots)
    texts: dict[str, str] = {}
    as_values = {root.fingerprint() for root in roots}
    for node in order:
        text = text_function(node) if node.args and types[node.args[0].fingerprint()] == "string" else None
        if text is not None:
            texts[input_name(text)] = text.dtype
        else:
            as_values.update(arg.fingerprint() for arg in node.args)
    columns = sorted({n.param for n in order if n.op == "col" and n.fingerprint() in as_values})
    now = [("now", "timestamp")] if any(node.op == "now" for node in order) else []
    return [(name, schema[name]) for name in columns] + sorted(texts.items()) + now


def lower(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    distributions: Mapping[str, Distribution] | None = None,
) -> Program:
    """Compile named expressions to a register program.

    Args:
        outputs: (name, expression), in the order of the result columns.
        schema: dtype of each source column.
        distributions: fitted distribution of each `percentile_rank`, by the fingerprint of its argument.

    Raises:
        DefinitionError: a repeated output name, a type error, or a distribution that was not given.
    """
    names = [name for name, _ in outputs]
    for name in names:
        if not name or names.count(name) > 1:
            raise DefinitionError(f"output name {name!r} is empty or given twice")
        if not isinstance(dict(outputs)[name], Expr):
            raise DefinitionError(f"output '{name}' is {dict(outputs)[name]!r}; expected an expression")
    inputs = program_inputs(outputs, schema)
    roots = [expr for _, expr in outputs]
    types = infer(roots, schema)
    b = _Builder(inputs)
    refs: dict[str, Ref] = {}
    for node in walk(*roots):
        args = [arg.fingerprint() for arg in node.args]
        refs[node.fingerprint()] = _lower(
            b, node, [refs[a] for a in args], [types[a] for a in args], types[node.fingerprint()],
            distributions or {},
        )  # fmt: skip
    found = [(name, expr.fingerprint()) for name, expr in outputs]
    return Program(
        tuple(inputs),
        tuple((name, types[key], b.number(refs[key])) for name, key in found),
        tuple(b.constants.values()),
        tuple(b.tables),
        tuple(Instruction(op, tuple(map(b.number, operands))) for op, operands in b.code),
        tuple(b.functions),
    )


def compile_program(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    distributions: Mapping[str, Distribution] | None = None,
) -> bytes:
    """`lower` to the bytes that `_core.FeatureProgram` loads; DefinitionError also for a udf."""
    return lower(outputs, schema, distributions).to_bytes()


def _text(name: str) -> bytes:
    data = name.encode()
    if len(data) > 0xFFFF:
        raise DefinitionError(f"name {name[:40]!r}... has {len(data)} bytes; expected at most 65535")
    return struct.pack("<H", len(data)) + data
