"""The meaning of every operation: expressions evaluated row by row, slowly and obviously.

What `evaluate` returns is what each operation means, bit for bit after NaNs are made one. Values are Python
scalars: float, int (also timestamps and durations, in microseconds), bool, str; null is None.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from penstock.features import float_math
from penstock.features.expression_types import common_type, infer
from penstock.features.expressions import INT_MIN, MATH, UNITS_US, Expr, is_floating, walk
from penstock.features.program import (
    Distribution,
    compares_integers,
    distribution_of,
    float_members,
    int_members,
)
from penstock.features.text_inputs import text_hash

_FLOAT_MATH: dict[str, Callable[[float], float]] = {name: getattr(float_math, name) for name in MATH}
_EPOCH = date(1970, 1, 1).toordinal()
_DAY_US = 86_400_000_000
_CYCLE = 146097  # days in 400 years, after which the calendar repeats, weekdays too


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


def _date(us: int) -> tuple[date, int]:
    """A date with the same month, day and weekday, and what to add to its year."""
    cycles, day = divmod(us // _DAY_US, _CYCLE)
    return date.fromordinal(day + _EPOCH), 400 * cycles


def _time_part(us: int, part: str) -> int:
    if part in ("second", "minute", "hour"):
        unit, size = {"second": (10**6, 60), "minute": (60 * 10**6, 60), "hour": (3600 * 10**6, 24)}[part]
        return us // unit % size
    day, years = _date(us)
    if part == "day_of_year":
        return day.timetuple().tm_yday
    return {"weekday": day.weekday(), "day": day.day, "month": day.month, "year": day.year + years}[part]


def _truncate(us: int, unit: int | str) -> int:
    if isinstance(unit, int):
        return _wrap(us // unit * unit)
    day, _ = _date(us)
    back = {"week": day.weekday(), "month": day.day - 1, "year": day.timetuple().tm_yday - 1}[str(unit)]
    return _wrap((us // _DAY_US - back) * _DAY_US)


def _whole(value: float, op: str) -> float:
    if not math.isfinite(value) or value == 0:
        return value
    whole = math.floor(value) if op == "floor" else math.ceil(value) if op == "ceil" else round(value)
    return math.copysign(float(whole), value)


def _sign(x: Any) -> Any:
    if x == 0 or x != x:
        return x
    return math.copysign(1.0, x) if isinstance(x, float) else 1 if x > 0 else -1


def _modulo(op: str, x: Any, y: Any) -> Any:
    if isinstance(x, int):
        return None if y == 0 else _wrap(x // y if op == "floor_div" else x % y)
    if y == 0:
        return _divide(x, y) if op == "floor_div" else math.nan
    return x // y if op == "floor_div" else x % y


def _mix(value: int) -> int:
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def _call(node: Expr, args: list[Any], types: list[str]) -> Any:
    """A udf on one row."""
    import numpy as np

    kinds = ["float64" if is_floating(t) else "bool" if t == "bool" else "int64" for t in types]
    assert node.function is not None
    found = np.asarray(node.function(*[np.array([a], kind) for a, kind in zip(args, kinds)]))[0]
    returns = str(node.param[0])
    return float(found) if returns == "float64" else bool(found) if returns == "bool" else int(found)


def _apply(
    node: Expr,
    args: list[Any],
    types: list[str],
    setting: _Setting,
) -> Any:
    """Meaning of an operation on values that are not null, numbers already in one type."""
    op, x = node.op, args[0]
    y = args[1] if len(args) > 1 else None
    if op == "code":
        return x
    if op in ("add", "sub", "mul"):
        value = x + y if op == "add" else x - y if op == "sub" else x * y
        return _wrap(value) if isinstance(value, int) else value
    if op in ("floor_div", "mod"):
        return _modulo(op, x, y)
    if op == "div":
        return _divide(float(x), float(args[1]))
    if op in ("neg", "abs"):
        return (
            (-x if op == "neg" else abs(x)) if isinstance(x, float) else _wrap(-x if op == "neg" else abs(x))
        )
    if op == "sqrt":
        return math.nan if float(x) < 0 else math.sqrt(x)
    if op in ("floor", "ceil", "round"):
        return _whole(x, op) if isinstance(x, float) else x
    if op == "sign":
        return _sign(x)
    if op in MATH:
        return _FLOAT_MATH[op](float(x))
    if op == "pow":
        return float_math.pow(float(x), float(args[1]))
    if op == "is_nan":
        return bool(math.isnan(x))
    if op in ("lt", "le", "eq"):
        return x < y if op == "lt" else x <= y if op == "le" else x == y
    if op in ("minimum", "maximum"):
        return _least(x, y, 1 if op == "minimum" else -1)
    if op == "not":
        return not x
    if op == "cast":
        return _cast(x, node.param)
    if op == "in_unit":
        return float(x) / UNITS_US[node.param]
    if op == "isin":
        members: Sequence[Any] = (
            float_members(node.param) if is_floating(types[0]) else int_members(node.param)
        )
        return x in members
    if op == "bucketize":
        whole = compares_integers(node, types[0])
        edges = list(node.param[1]) if whole else float_members(node.param[1])
        at = x if whole else float(x)
        if at != at:
            return None
        return bisect_left(edges, at) if node.param[0] else bisect_right(edges, at)
    if op == "truncate":
        return _truncate(x, node.param)
    if op == "text_in":
        return setting.dictionaries[node.args[0].param][x] in node.param
    if op == "hash_bucket":
        text = setting.dictionaries[node.args[0].param][x] if types[0] == "string" else None
        return ((_mix(x) if text is None else text_hash(text) % 2**64) >> 1) % node.param
    if op == "udf":
        return _call(node, args, types)
    if op == "percentile_rank":
        fitted = distribution_of(node, setting.distributions)
        value = float(x)
        if math.isnan(value):
            return value
        k = bisect_left(fitted.values, value)
        below = fitted.cumulative[k - 1] if k else 0
        equal = fitted.cumulative[k] - below if k < len(fitted.values) and fitted.values[k] == value else 0
        return (below + 0.5 * equal) / fitted.cumulative[-1]
    return _time_part(x, op)


@dataclass(frozen=True)
class _Setting:
    """What nodes may need besides their arguments."""

    distributions: Mapping[str, Distribution]
    dictionaries: Mapping[str, Sequence[str]]


def _meaning(node: Expr, args: list[Any], types: list[str], setting: _Setting) -> Any:
    """Meaning of an operation on any values."""
    op = node.op
    if op == "lit":
        return node.param[1]
    if op == "is_null":
        return args[0] is None
    if op == "fill_null":
        return args[1] if args[0] is None else args[0]
    if op == "where":
        return None if args[0] is None else args[1] if args[0] else args[2]
    if op in ("and", "or"):
        decisive = op == "or"
        return decisive if decisive in args else None if None in args else not decisive
    if None in args:
        return None
    if op != "udf" and len(types) == 2 and common_type(*types) == "float64":
        args = [float(a) for a in args]
    return _apply(node, args, types, setting)


def _evaluate_row(
    order: list[Expr], types: dict[str, str], row: Mapping[str, Any], setting: _Setting
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for node in order:
        key = node.fingerprint()
        if node.op in ("col", "now"):
            result = row[node.param or "now"]
        else:
            args = [values[a.fingerprint()] for a in node.args]
            result = _meaning(node, args, [types[a.fingerprint()] for a in node.args], setting)
        if result is not None and types[key] == "float64" and isinstance(result, int):
            result = float(result)
        values[key] = result
    return values


def evaluate(
    outputs: Sequence[tuple[str, Expr]],
    schema: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    distributions: Mapping[str, Distribution] | None = None,
    dictionaries: Mapping[str, Sequence[str]] | None = None,
) -> list[list[Any]]:
    """A column of Python scalars (None is null) for each output, one row at a time.

    A string is its code in `dictionaries`, by column.
    """
    roots = [expr for _, expr in outputs]
    types = infer(roots, schema)
    order = walk(*roots)
    setting = _Setting(distributions or {}, dictionaries or {})
    done = [_evaluate_row(order, types, row, setting) for row in rows]
    return [[values[root.fingerprint()] for values in done] for root in roots]
