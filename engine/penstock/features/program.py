"""From expressions to the bytes that `_core.FeatureProgram` runs, and the oracle that is their meaning.

`evaluate` is slow and obvious on purpose: what it returns, row by row, is what each operation means, bit for
bit after NaNs are made one. Values are Python scalars: float, int (also timestamps and durations, in
microseconds), bool; null is None.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any

from penstock.errors import DefinitionError
from penstock.features.expressions import (
    DTYPES,
    INT_MAX,
    INT_MIN,
    Expr,
    columns_read,
    common_type,
    infer,
    is_floating,
    unit_us,
    walk,
)

_OPS = [
    "add_f",
    "sub_f",
    "mul_f",
    "div_f",
    "neg_f",
    "abs_f",
    "sqrt_f",
    "floor_f",
    "ceil_f",
    "minimum_f",
    "maximum_f",
    "lt_f",
    "le_f",
    "eq_f",
    "add_i",
    "sub_i",
    "mul_i",
    "neg_i",
    "abs_i",
    "minimum_i",
    "maximum_i",
    "lt_i",
    "le_i",
    "eq_i",
    "and",
    "or",
    "not",
    "where_f",
    "where_i",
    "is_null_f",
    "is_null_i",
    "fill_null_f",
    "fill_null_i",
    "int_to_f",
    "f_to_int",
    "f_to_f32",
    "int_to_bool",
    "f_to_bool",
    "minute",
    "hour",
    "weekday",
    "day",
    "month",
    "isin_f",
    "isin_i",
    "rank",
]
OPS = {name: number for number, name in enumerate(_OPS)}
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


class _Builder:
    """Registers, constants and tables of one program; equal instructions share a register."""

    def __init__(self, inputs: list[tuple[str, str]]) -> None:
        self.inputs = {name: i for i, (name, _) in enumerate(inputs)}
        self.constants: dict[bytes, int] = {}
        self.tables: dict[bytes, int] = {}
        self.code: dict[tuple[int, tuple[tuple[str, int], ...]], int] = {}

    def constant(self, dtype: str, value: Any) -> tuple[str, int]:
        real = is_floating(dtype)
        blob = struct.pack("<BBd" if real else "<BBq", 0 if real else 1, 1, value)
        return ("const", self.constants.setdefault(blob, len(self.constants)))

    def table(self, kind: int, values: Sequence[Any], cumulative: Sequence[int] = ()) -> tuple[str, int]:
        form = f"<BI{len(values)}{'q' if kind == 1 else 'd'}{len(cumulative)}q"
        blob = struct.pack(form, kind, len(values), *values, *cumulative)
        return ("table", self.tables.setdefault(blob, len(self.tables)))

    def emit(self, name: str, *args: tuple[str, int]) -> tuple[str, int]:
        return ("code", self.code.setdefault((OPS[name], args), len(self.code)))

    def number(self, ref: tuple[str, int]) -> int:
        kind, index = ref
        base = {"input": 0, "table": 0, "const": len(self.inputs)}
        return index + base.get(kind, len(self.inputs) + len(self.constants))


def _convert(b: _Builder, ref: tuple[str, int], source: str, target: str) -> tuple[str, int]:
    if source == target or (target == "float64" and source == "float32"):
        return ref
    if is_floating(target):
        wide = ref if is_floating(source) else b.emit("int_to_f", ref)
        return b.emit("f_to_f32", wide) if target == "float32" else wide
    kind = "f" if is_floating(source) else "int"
    if target == "bool":
        return b.emit(f"{kind}_to_bool", ref)
    return b.emit("f_to_int", ref) if kind == "f" else ref


def _int_members(values: Sequence[int | float]) -> list[int]:
    """The members of an isin set that an int64 can equal."""
    exact = {int(v) for v in values if isinstance(v, int) or v.is_integer()}
    return sorted(v for v in exact if INT_MIN <= v <= INT_MAX)


def _float_members(values: Sequence[int | float]) -> list[float]:
    return sorted({float(v) for v in values})


def _distribution(node: Expr, distributions: Mapping[str, Distribution]) -> Distribution:
    found = distributions.get(node.args[0].fingerprint())
    if found is None:
        raise DefinitionError(f"percentile_rank({node.args[0]!r}) has no fitted distribution")
    return found


def _lower(b: _Builder, node: Expr, refs: list[tuple[str, int]], types: list[str], result: str,
           distributions: Mapping[str, Distribution]) -> tuple[str, int]:  # fmt: skip
    op = node.op
    if op in ("col", "now"):
        return ("input", b.inputs[node.param or "now"])
    if op == "lit":
        return b.constant(*node.param)
    if op in ("and", "or", "not", "minute", "hour", "weekday", "day", "month"):
        return b.emit(op, *refs)
    if op == "cast":
        return _convert(b, refs[0], types[0], result)
    if op == "is_null":
        return b.emit("is_null_f" if is_floating(types[0]) else "is_null_i", refs[0])
    if op == "in_unit":
        return b.emit("div_f", b.emit("int_to_f", refs[0]), b.constant("float64", unit_us(node.param)))
    if op == "isin":
        if is_floating(types[0]):
            return b.emit("isin_f", refs[0], b.table(0, _float_members(node.param)))
        return b.emit("isin_i", refs[0], b.table(1, _int_members(node.param)))
    if op == "percentile_rank":
        fitted = _distribution(node, distributions)
        return b.emit(
            "rank", _convert(b, refs[0], types[0], "float64"), b.table(2, fitted.values, fitted.cumulative)
        )
    if op in ("floor", "ceil") and result == "int64":
        return refs[0]
    # Operations in the kind of their operands: float64 if any is a float or the result is one.
    if op == "where":
        chosen = [_convert(b, r, t, result) for r, t in zip(refs[1:], types[1:])]
        return b.emit("where_f" if is_floating(result) else "where_i", refs[0], *chosen)
    real = is_floating(result) or any(map(is_floating, types))
    if real:
        refs = [_convert(b, r, t, "float64") for r, t in zip(refs, types)]
    return b.emit(f"{op}_{'f' if real else 'i'}", *refs)


def program_inputs(outputs: Sequence[tuple[str, Expr]], schema: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, dtype) of each column that the outputs read, by name; last ("now", "timestamp") if read."""
    roots = [expr for _, expr in outputs]
    infer(roots, schema)
    inputs = [(name, schema[name]) for name in columns_read(*roots)]
    return inputs + [("now", "timestamp")] * any(node.op == "now" for node in walk(*roots))


def compile_program(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    distributions: Mapping[str, Distribution] | None = None,
) -> bytes:
    """Compile named expressions for `_core.FeatureProgram`.

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
    inputs = program_inputs(outputs, schema)
    roots = [expr for _, expr in outputs]
    types = infer(roots, schema)
    b = _Builder(inputs)
    refs: dict[str, tuple[str, int]] = {}
    for node in walk(*roots):
        args = [arg.fingerprint() for arg in node.args]
        refs[node.fingerprint()] = _lower(
            b, node, [refs[a] for a in args], [types[a] for a in args], types[node.fingerprint()],
            distributions or {},
        )  # fmt: skip
    out = bytearray(b"PSFP")
    out += struct.pack("<6I", 1, len(inputs), len(outputs), len(b.constants), len(b.tables), len(b.code))
    for name, dtype in inputs:
        out += _text(name) + struct.pack("<B", DTYPES.index(dtype))
    for name, expr in outputs:
        key = expr.fingerprint()
        out += _text(name) + struct.pack("<BI", DTYPES.index(types[key]), b.number(refs[key]))
    out += b"".join(b.constants) + b"".join(b.tables)
    for op, operands in b.code:
        numbers = [b.number(ref) for ref in operands]
        out += struct.pack("<H3I", op, *numbers, *[_UNUSED] * (3 - len(numbers)))
    return bytes(out)


def _text(name: str) -> bytes:
    data = name.encode()
    if len(data) > 0xFFFF:
        raise DefinitionError(f"name {name[:40]!r}... has {len(data)} bytes; expected at most 65535")
    return struct.pack("<H", len(data)) + data


def _wrap(value: int) -> int:
    return (value - INT_MIN) % 2**64 + INT_MIN


def _divide(a: float, b: float) -> float:
    if b != 0:
        return a / b
    if a == 0 or math.isnan(a):
        return math.nan
    return math.copysign(math.inf, a) * math.copysign(1.0, b)


def _least(a: Any, b: Any, sign: int) -> Any:
    if isinstance(a, float):
        if math.isnan(a) or math.isnan(b):
            return math.nan
        if a == b:
            return a if math.copysign(1.0, a) * sign < 0 else b
    return min(a, b) if sign > 0 else max(a, b)


def _to_f32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _cast(value: Any, target: str) -> Any:
    if target == "bool":
        return value != 0
    if target == "int64":
        if isinstance(value, float) and not INT_MIN <= value < 2.0**63:
            return None
        return int(value)
    return _to_f32(float(value)) if target == "float32" else float(value)


def _time_part(us: int, part: str) -> int:
    if part in ("minute", "hour"):
        return us // 60_000_000 % 60 if part == "minute" else us // 3_600_000_000 % 24
    # The calendar repeats every 146097 days (400 years), weekdays too.
    day = date.fromordinal(us // 86_400_000_000 % 146097 + date(1970, 1, 1).toordinal())
    return {"weekday": day.weekday(), "day": day.day, "month": day.month}[part]


def _whole(value: float, op: str) -> float:
    if not math.isfinite(value) or value == 0:
        return value
    return math.copysign(float(math.floor(value) if op == "floor" else math.ceil(value)), value)


def _apply(node: Expr, args: list[Any], types: list[str], distributions: Mapping[str, Distribution]) -> Any:
    """Meaning of an operation on values that are not null, numbers already in one type."""
    op, x = node.op, args[0]
    y = args[1] if len(args) > 1 else None
    if op in ("add", "sub", "mul"):
        value = x + y if op == "add" else x - y if op == "sub" else x * y
        return _wrap(value) if isinstance(value, int) else value
    if op == "div":
        return _divide(float(x), float(args[1]))
    if op in ("neg", "abs"):
        return (
            (-x if op == "neg" else abs(x)) if isinstance(x, float) else _wrap(-x if op == "neg" else abs(x))
        )
    if op == "sqrt":
        return math.nan if float(x) < 0 else math.sqrt(x)
    if op in ("floor", "ceil"):
        return _whole(x, op) if isinstance(x, float) else x
    if op in ("lt", "le", "eq"):
        return x < y if op == "lt" else x <= y if op == "le" else x == y
    if op in ("minimum", "maximum"):
        return _least(x, y, 1 if op == "minimum" else -1)
    if op == "not":
        return not x
    if op == "cast":
        return _cast(x, node.param)
    if op == "in_unit":
        return float(x) / unit_us(node.param)
    if op == "isin":
        return x in (_float_members if is_floating(types[0]) else _int_members)(node.param)  # type: ignore[operator]
    if op == "percentile_rank":
        fitted = _distribution(node, distributions)
        value = float(x)
        if math.isnan(value):
            return value
        k = bisect_left(fitted.values, value)
        below = fitted.cumulative[k - 1] if k else 0
        equal = fitted.cumulative[k] - below if k < len(fitted.values) and fitted.values[k] == value else 0
        return (below + 0.5 * equal) / fitted.cumulative[-1]
    return _time_part(x, op)


def _evaluate_row(
    order: list[Expr],
    types: dict[str, str],
    row: Mapping[str, Any],
    distributions: Mapping[str, Distribution],
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for node in order:
        key, op = node.fingerprint(), node.op
        args = [values[a.fingerprint()] for a in node.args]
        kinds = [types[a.fingerprint()] for a in node.args]
        if op in ("col", "now"):
            result = row[node.param or "now"]
        elif op == "lit":
            result = node.param[1]
        elif op == "is_null":
            result = args[0] is None
        elif op == "fill_null":
            result = args[1] if args[0] is None else args[0]
        elif op == "where":
            result = None if args[0] is None else args[1] if args[0] else args[2]
        elif op in ("and", "or"):
            decisive = op == "or"
            result = decisive if decisive in args else None if None in args else not decisive
        elif None in args:
            result = None
        else:
            if len(kinds) == 2 and common_type(*kinds) == "float64":
                args = [float(a) for a in args]
            result = _apply(node, args, kinds, distributions)
        if result is not None and types[key] == "float64" and isinstance(result, int):
            result = float(result)
        values[key] = result
    return values


def evaluate(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    distributions: Mapping[str, Distribution] | None = None,
) -> list[list[Any]]:
    """The oracle: a column of Python scalars (None is null) for each output, one row at a time."""
    roots = [expr for _, expr in outputs]
    types = infer(roots, schema)
    order = walk(*roots)
    done = [_evaluate_row(order, types, row, distributions or {}) for row in rows]
    return [[values[root.fingerprint()] for values in done] for root in roots]
