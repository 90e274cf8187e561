"""Feature expressions: Python operators that build a graph instead of computing.

An `Expr` is an immutable node: an operation, its parameter and its arguments. Types are given when a schema
is bound (`infer`). Null propagates through every operation except `is_null`, `fill_null`, Kleene `&` and `|`,
and the branch that `where` does not take. What the set of operations lacks is a DefinitionError, not a guess.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from penstock.errors import DefinitionError

DTYPES = ("float32", "float64", "int64", "bool", "string", "timestamp", "duration")
INT_MIN, INT_MAX = -(2**63), 2**63 - 1
_MICROSECOND = timedelta(microseconds=1)
_UNITS = {"seconds": 1e6, "hours": 3.6e9, "days": 86.4e9}
_TIME_PARTS = ("minute", "hour", "weekday", "day", "month")


def digest(parts: Any) -> str:
    """SHA-256 (hex) of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _value_key(dtype: str, value: Any) -> str | int | bool | None:
    """A JSON form of a literal that keeps each bit of a float."""
    if dtype == "float64":
        return float(value).hex()
    return value  # type: ignore[no-any-return]


class Expr:
    """A node of an expression graph. Build it with `col`, `now`, `lit` and operators.

    Attributes:
        op: name of the operation.
        param: its parameter (a column name, a literal (dtype, value), a unit, a set of numbers) or None.
        args: the nodes that it reads.
    """

    __slots__ = ("_digest", "args", "op", "param")
    _digest: str

    def __init__(self, op: str, param: Any = None, args: tuple[Expr, ...] = ()) -> None:
        self.op, self.param, self.args = op, param, args
        text = json.dumps([op, self._param_key(), [arg._digest for arg in args]], separators=(",", ":"))
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def _param_key(self) -> Any:
        if self.op == "lit":
            return [self.param[0], _value_key(*self.param)]
        if self.op == "isin":
            return [["float64", v.hex()] if isinstance(v, float) else ["int64", v] for v in self.param]
        return self.param

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the operations, parameters and arguments; the same in every process."""
        return self._digest

    def to_json(self) -> str:
        """Canonical JSON: the distinct nodes, arguments first, each [op, param, argument positions]."""
        order = walk(self)
        at = {node.fingerprint(): i for i, node in enumerate(order)}
        rows = [[n.op, n._param_key(), [at[a.fingerprint()] for a in n.args]] for n in order]
        return json.dumps(rows, separators=(",", ":"))

    def __repr__(self) -> str:
        return f"<Expr {self.op} {self._digest[:12]}>"

    def __add__(self, other: Any) -> Expr:
        return Expr("add", None, (self, lit(other)))

    def __radd__(self, other: Any) -> Expr:
        return Expr("add", None, (lit(other), self))

    def __sub__(self, other: Any) -> Expr:
        return Expr("sub", None, (self, lit(other)))

    def __rsub__(self, other: Any) -> Expr:
        return Expr("sub", None, (lit(other), self))

    def __mul__(self, other: Any) -> Expr:
        return Expr("mul", None, (self, lit(other)))

    def __rmul__(self, other: Any) -> Expr:
        return Expr("mul", None, (lit(other), self))

    def __truediv__(self, other: Any) -> Expr:
        return Expr("div", None, (self, lit(other)))

    def __rtruediv__(self, other: Any) -> Expr:
        return Expr("div", None, (lit(other), self))

    def __neg__(self) -> Expr:
        return Expr("neg", None, (self,))

    def __abs__(self) -> Expr:
        return Expr("abs", None, (self,))

    def __lt__(self, other: Any) -> Expr:
        return Expr("lt", None, (self, lit(other)))

    def __le__(self, other: Any) -> Expr:
        return Expr("le", None, (self, lit(other)))

    def __gt__(self, other: Any) -> Expr:
        return Expr("lt", None, (lit(other), self))

    def __ge__(self, other: Any) -> Expr:
        return Expr("le", None, (lit(other), self))

    def __eq__(self, other: Any) -> Expr:  # type: ignore[override]
        return Expr("eq", None, (self, lit(other)))

    def __ne__(self, other: Any) -> Expr:  # type: ignore[override]
        return ~(self == other)

    def __and__(self, other: Any) -> Expr:
        return Expr("and", None, (self, lit(other)))

    def __rand__(self, other: Any) -> Expr:
        return Expr("and", None, (lit(other), self))

    def __or__(self, other: Any) -> Expr:
        return Expr("or", None, (self, lit(other)))

    def __ror__(self, other: Any) -> Expr:
        return Expr("or", None, (lit(other), self))

    def __invert__(self) -> Expr:
        return Expr("not", None, (self,))

    __hash__ = None  # type: ignore[assignment]  # `==` builds a node, so a set or dict would lie

    def __bool__(self) -> NoReturn:
        raise DefinitionError(f"'{self.op}' has no truth value while it is defined; use &, |, ~ and where()")

    def __iter__(self) -> Iterator[Expr]:
        raise DefinitionError(f"'{self.op}' is one value a row and cannot be iterated")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # copy, pickle and inspect probe for these
        raise DefinitionError(f"an expression has no operation '{name}'")

    def cast(self, dtype: str) -> Expr:
        """Convert; to int64 toward zero, with null for NaN and for what int64 cannot hold."""
        if dtype not in ("float32", "float64", "int64", "bool"):
            raise DefinitionError(f"cast to '{dtype}'; expected float32, float64, int64 or bool")
        return Expr("cast", dtype, (self,))

    def is_null(self) -> Expr:
        return Expr("is_null", None, (self,))

    def fill_null(self, value: Any) -> Expr:
        return Expr("fill_null", None, (self, lit(value)))

    def clip(self, low: Any, high: Any) -> Expr:
        """minimum(maximum(self, low), high)."""
        return minimum(maximum(self, low), high)

    def sqrt(self) -> Expr:
        return Expr("sqrt", None, (self,))

    def floor(self) -> Expr:
        return Expr("floor", None, (self,))

    def ceil(self) -> Expr:
        return Expr("ceil", None, (self,))

    def minute(self) -> Expr:
        return Expr("minute", None, (self,))

    def hour(self) -> Expr:
        return Expr("hour", None, (self,))

    def weekday(self) -> Expr:
        """Monday is 0."""
        return Expr("weekday", None, (self,))

    def day(self) -> Expr:
        return Expr("day", None, (self,))

    def month(self) -> Expr:
        return Expr("month", None, (self,))

    def seconds(self) -> Expr:
        """float64: microseconds / 1e6."""
        return Expr("in_unit", "seconds", (self,))

    def hours(self) -> Expr:
        """float64: microseconds / 3.6e9."""
        return Expr("in_unit", "hours", (self,))

    def days(self) -> Expr:
        """float64: microseconds / 86.4e9."""
        return Expr("in_unit", "days", (self,))

    def isin(self, values: Iterable[int | float]) -> Expr:
        """True where the number is one of `values`; NaN is in no set."""
        found: set[int | float] = set()
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise DefinitionError(f"isin value is {value!r}; expected a number that is not NaN")
            if isinstance(value, int):
                _check_int(value)
            found.add(value if value else 0)
        return Expr("isin", tuple(sorted(found)), (self,))


def _check_int(value: int) -> int:
    if not INT_MIN <= value <= INT_MAX:
        raise DefinitionError(f"literal is {value}; expected an int64")
    return value


def timestamp_us(value: datetime) -> int:
    """Microseconds since 1970-01-01 UTC of a datetime that has a time zone."""
    if value.tzinfo is None:
        raise DefinitionError(f"literal {value!r} has no time zone")
    return (value - datetime(1970, 1, 1, tzinfo=UTC)) // _MICROSECOND


def lit(value: Any) -> Expr:
    """A literal: bool, int64, float, datetime with a zone, or timedelta. An Expr is returned as it is."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool):
        return Expr("lit", ("bool", value))
    if isinstance(value, int):
        return Expr("lit", ("int64", _check_int(value)))
    if isinstance(value, float):
        return Expr("lit", ("float64", value))
    if isinstance(value, datetime):
        return Expr("lit", ("timestamp", timestamp_us(value)))
    if isinstance(value, timedelta):
        return Expr("lit", ("duration", _check_int(value // _MICROSECOND)))
    raise DefinitionError(f"literal {value!r} is a {type(value).__name__}; expected a number, bool or time")


def col(name: str) -> Expr:
    """A column of the source, by name."""
    if not isinstance(name, str) or not name or name == "now":
        raise DefinitionError(f"column name is {name!r}; expected a name other than 'now'")
    return Expr("col", name)


def now() -> Expr:
    """The request time, a timestamp."""
    return Expr("now")


def where(cond: Any, then: Any, other: Any) -> Expr:
    """`then` where `cond` is true, `other` where it is false, null where it is null."""
    return Expr("where", None, (lit(cond), lit(then), lit(other)))


def minimum(a: Any, b: Any) -> Expr:
    """The lesser; NaN if either is NaN; -0.0 is below 0.0."""
    return Expr("minimum", None, (lit(a), lit(b)))


def maximum(a: Any, b: Any) -> Expr:
    """The greater; NaN if either is NaN; -0.0 is below 0.0."""
    return Expr("maximum", None, (lit(a), lit(b)))


def percentile_rank(value: Expr) -> Expr:
    """(below + half of equal) / n in a distribution that is fitted and bound later; NaN stays NaN."""
    return Expr("percentile_rank", None, (lit(value),))


def walk(*roots: Expr) -> list[Expr]:
    """The distinct nodes under `roots`, arguments before their readers; no recursion."""
    done: dict[str, Expr] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if node.fingerprint() in done:
            continue
        if ready:
            done[node.fingerprint()] = node
        else:
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))
    return list(done.values())


def columns_read(*roots: Expr) -> list[str]:
    """Sorted names of the source columns that the expressions read."""
    return sorted(node.param for node in walk(*roots) if node.op == "col")


def uses_now(expr: Expr) -> bool:
    return any(node.op == "now" for node in walk(expr))


def is_floating(dtype: str) -> bool:
    return dtype in ("float32", "float64")


def is_number(dtype: str) -> bool:
    return is_floating(dtype) or dtype == "int64"


def common_type(a: str, b: str) -> str | None:
    """The type in which both are compared or chosen; mixed numbers are float64."""
    if a == b:
        return a
    return "float64" if is_number(a) and is_number(b) else None


_TEMPORAL = {
    ("sub", "timestamp", "timestamp"): "duration",
    ("sub", "timestamp", "duration"): "timestamp",
    ("add", "timestamp", "duration"): "timestamp",
    ("add", "duration", "timestamp"): "timestamp",
    ("add", "duration", "duration"): "duration",
    ("sub", "duration", "duration"): "duration",
    ("div", "duration", "duration"): "float64",
}


def _result(node: Expr, types: list[str], schema: Mapping[str, str]) -> str | None:
    op, first = node.op, (types[0] if types else "")
    if op == "col":
        return schema.get(node.param)
    if op == "now":
        return "timestamp"
    if op == "lit":
        return str(node.param[0])
    if op in ("add", "sub", "mul", "div"):
        if is_number(first) and is_number(types[1]):
            return "int64" if op != "div" and first == types[1] == "int64" else "float64"
        return _TEMPORAL.get((op, first, types[1]))
    if op in ("neg", "abs"):
        if first == "float32":
            return "float64"
        return first if is_number(first) or first == "duration" else None
    if op in ("sqrt", "percentile_rank"):
        return "float64" if is_number(first) else None
    if op in ("floor", "ceil"):
        return ("int64" if first == "int64" else "float64") if is_number(first) else None
    if op in ("lt", "le", "eq"):
        common = common_type(*types)
        return "bool" if common not in (None, "string") and (op == "eq" or common != "bool") else None
    if op in ("minimum", "maximum"):
        common = common_type(*types)
        return common if common not in ("bool", "string") else None
    if op in ("and", "or", "not"):
        return "bool" if all(t == "bool" for t in types) else None
    if op == "where":
        return common_type(*types[1:]) if first == "bool" and "string" not in types else None
    if op == "fill_null":
        return common_type(*types) if "string" not in types else None
    if op == "is_null":
        return "bool"
    if op == "cast":
        return str(node.param) if is_number(first) or first == "bool" else None
    if op in _TIME_PARTS:
        return "int64" if first == "timestamp" else None
    if op == "in_unit":
        return "float64" if first == "duration" else None
    if op == "isin":
        return "bool" if is_number(first) else None
    raise DefinitionError(f"unknown operation '{op}'")


def infer(roots: Iterable[Expr], schema: Mapping[str, str]) -> dict[str, str]:
    """Give each node its dtype, by fingerprint.

    Raises:
        DefinitionError: an unknown column or dtype, or an operation on types that it does not have.
    """
    types: dict[str, str] = {}
    for node in walk(*roots):
        args = [types[arg.fingerprint()] for arg in node.args]
        if node.op == "col" and schema.get(node.param) not in DTYPES:
            known = schema.get(node.param)
            raise DefinitionError(
                f"column '{node.param}' has dtype '{known}'; expected one of {', '.join(DTYPES)}"
                if known
                else f"column '{node.param}' is not in the schema ({', '.join(sorted(schema)) or 'empty'})"
            )
        result = _result(node, args, schema)
        if result is None:
            raise DefinitionError(f"operation '{node.op}' is not defined on ({', '.join(args)})")
        types[node.fingerprint()] = result
    return types


def unit_us(unit: str) -> float:
    """Microseconds in 'seconds', 'hours' or 'days'."""
    return _UNITS[unit]
