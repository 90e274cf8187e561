"""Feature expressions: Python operators that build a graph instead of computing.

An `Expr` is an immutable node: an operation, its parameter and its arguments. Types are given when a schema
is bound (`expression_types.infer`). Null propagates through every operation except `is_null`, `fill_null`,
Kleene `&` and `|`, and the branch that `where` does not take. What the set of operations lacks is a
DefinitionError that names the operation and the line of the definition, not a guess.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NoReturn

from penstock.errors import DefinitionError

DTYPES = ("float32", "float64", "int64", "bool", "string", "timestamp", "duration")
INT_MIN, INT_MAX = -(2**63), 2**63 - 1
_MICROSECOND = timedelta(microseconds=1)
UNITS_US = {
    "milliseconds": 1e3,
    "seconds": 1e6,
    "minutes": 6e7,
    "hours": 3.6e9,
    "days": 86.4e9,
    "weeks": 604.8e9,
}
TIME_PARTS = ("second", "minute", "hour", "weekday", "day", "day_of_year", "month", "year")
MATH = ("exp", "expm1", "exp2", "log", "log1p", "log2", "log10", "tanh")
_SPAN = re.compile(r"([1-9][0-9]{0,11})(us|ms|s|m|h|d|w)\Z")
_SPAN_US = {
    "us": 1, "ms": 10**3, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86400 * 10**6,
    "w": 604800 * 10**6,
}  # fmt: skip
_HOME = __name__.rpartition(".")[0] + "."


def digest(parts: Any) -> str:
    """SHA-256 (hex) of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _value_key(dtype: str, value: Any) -> str | int | bool | None:
    """A JSON form of a literal that keeps each bit of a float."""
    if dtype == "float64":
        return float(value).hex()
    return value  # type: ignore[no-any-return]


def _caller() -> tuple[str, int]:
    """File and line of the innermost frame outside this package's features: where a definition stands."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_HOME):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def refuse(message: str) -> NoReturn:
    """Raise a DefinitionError that names the caller's line."""
    raise DefinitionError("{2}; defined at {0}:{1}".format(*_caller(), message))


class Expr:
    """A node of an expression graph. Build it with `col`, `now`, `lit` and operators.

    Attributes:
        op: name of the operation.
        param: its parameter (a column name, a literal (dtype, value), a unit, a set of numbers) or None.
        args: the nodes that it reads.
        at: file and line where it was built; no part of the fingerprint.
        function: the Python function of a `udf`, else None.
    """

    __slots__ = ("_digest", "args", "at", "function", "op", "param")
    _digest: str

    def __init__(
        self,
        op: str,
        param: Any = None,
        args: tuple[Expr, ...] = (),
        *,
        at: tuple[str, int] | None = None,
        function: Callable[..., Any] | None = None,
    ) -> None:
        self.op, self.param, self.args = op, param, args
        self.at, self.function = at or _caller(), function
        text = json.dumps([op, self._param_key(), [arg._digest for arg in args]], separators=(",", ":"))
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def _param_key(self) -> Any:
        if self.op == "lit":
            return [self.param[0], _value_key(*self.param)]
        if self.op in ("isin", "bucketize"):
            numbers = self.param if self.op == "isin" else self.param[1]
            keys = [["float64", v.hex()] if isinstance(v, float) else ["int64", v] for v in numbers]
            return keys if self.op == "isin" else [self.param[0], keys]
        return self.param

    def with_args(self, args: tuple[Expr, ...], param: Any) -> Expr:
        """This node over other arguments and with another parameter; it keeps its line."""
        return Expr(self.op, param, args, at=self.at, function=self.function)

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

    def __floordiv__(self, other: Any) -> Expr:
        """Rounded toward minus infinity; an int64 divided by zero is null, a float as `/` gives it."""
        return Expr("floor_div", None, (self, lit(other)))

    def __rfloordiv__(self, other: Any) -> Expr:
        return Expr("floor_div", None, (lit(other), self))

    def __mod__(self, other: Any) -> Expr:
        """The rest of `//`, with the divisor's sign; modulo zero an int64 is null, a float NaN."""
        return Expr("mod", None, (self, lit(other)))

    def __rmod__(self, other: Any) -> Expr:
        return Expr("mod", None, (lit(other), self))

    def __pow__(self, other: Any) -> Expr:
        """float64, with the special cases of C99 (`x ** 0` and `1 ** x` are 1; below 1 ulp off)."""
        return Expr("pow", None, (self, lit(other)))

    def __rpow__(self, other: Any) -> Expr:
        return Expr("pow", None, (lit(other), self))

    def pow(self, other: Any) -> Expr:
        """`self ** other`."""
        return self**other

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
        if isinstance(other, str):
            return Expr("text_in", (other,), (self,))
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
        refuse(f"'{self.op}' has no truth value while it is defined; use &, |, ~ and where()")

    def __iter__(self) -> Iterator[Expr]:
        refuse(f"'{self.op}' is one value a row and cannot be iterated")

    def __float__(self) -> NoReturn:
        refuse(f"'{self.op}' has no value while it is defined; use its methods, such as .exp() or .floor()")

    def __int__(self) -> NoReturn:
        self.__float__()

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(f"'{self.op}' is no array; numpy functions are not operations of an expression")

    def __array_ufunc__(self, ufunc: Any, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(f"an expression has no operation 'numpy.{ufunc.__name__}'; use its methods")

    def __round__(self, digits: int | None = None) -> Expr:
        if digits is not None:
            refuse(f"operation 'round' to {digits} digits; expected round to an integer")
        return self.round()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or name in Expr.__slots__:
            raise AttributeError(name)  # copy, pickle and inspect probe for these
        refuse(f"an expression has no operation '{name}'")

    def cast(self, dtype: str) -> Expr:
        """Convert; to int64 toward zero, with null for NaN and for what int64 cannot hold.

        A timestamp or duration casts to int64 alone: microseconds.
        """
        if dtype not in ("float32", "float64", "int64", "bool"):
            refuse(f"operation 'cast' to {dtype!r}; expected float32, float64, int64 or bool")
        return Expr("cast", dtype, (self,))

    def is_null(self) -> Expr:
        return Expr("is_null", None, (self,))

    def fill_null(self, value: Any) -> Expr:
        return Expr("fill_null", None, (self, lit(value)))

    def clip(self, low: Any, high: Any) -> Expr:
        """minimum(maximum(self, low), high)."""
        return minimum(maximum(self, low), high)

    def is_nan(self) -> Expr:
        return Expr("is_nan", None, (self,))

    def fill_nan(self, value: Any) -> Expr:
        """`value` where NaN; null stays null."""
        return where(self.is_nan(), value, self)

    def sqrt(self) -> Expr:
        return Expr("sqrt", None, (self,))

    def floor(self) -> Expr:
        return Expr("floor", None, (self,))

    def ceil(self) -> Expr:
        return Expr("ceil", None, (self,))

    def round(self) -> Expr:
        """To the nearest integer, halves to the even one; a float stays a float."""
        return Expr("round", None, (self,))

    def sign(self) -> Expr:
        """-1, 0 or 1; a zero keeps its sign and NaN stays NaN."""
        return Expr("sign", None, (self,))

    def exp(self) -> Expr:
        """float64; like all of `exp` to `tanh`, one definition on every back end (`float_math`)."""
        return Expr("exp", None, (self,))

    def expm1(self) -> Expr:
        return Expr("expm1", None, (self,))

    def exp2(self) -> Expr:
        return Expr("exp2", None, (self,))

    def log(self) -> Expr:
        """Natural logarithm; -inf at zero, NaN below."""
        return Expr("log", None, (self,))

    def log1p(self) -> Expr:
        return Expr("log1p", None, (self,))

    def log2(self) -> Expr:
        return Expr("log2", None, (self,))

    def log10(self) -> Expr:
        return Expr("log10", None, (self,))

    def tanh(self) -> Expr:
        return Expr("tanh", None, (self,))

    def bucketize(self, edges: Iterable[int | float], *, right: bool = False) -> Expr:
        """Index of the bucket, 0 to len(edges), as numpy.digitize counts; null for NaN.

        Bucket i holds edges[i-1] <= x < edges[i]; with right=True, edges[i-1] < x <= edges[i]. An int64 is
        compared exactly if all edges are integers, else as float64.
        """
        numbers = [_number(edge, "bucketize edge") for edge in edges]
        if not numbers or any(a >= b for a, b in pairwise(numbers)):
            refuse(f"operation 'bucketize': edges are {numbers}; expected one or more, ascending")
        return Expr("bucketize", (bool(right), tuple(numbers)), (self,))

    def second(self) -> Expr:
        return Expr("second", None, (self,))

    def minute(self) -> Expr:
        return Expr("minute", None, (self,))

    def hour(self) -> Expr:
        return Expr("hour", None, (self,))

    def weekday(self) -> Expr:
        """Monday is 0."""
        return Expr("weekday", None, (self,))

    def is_weekend(self) -> Expr:
        """Saturday or Sunday."""
        return self.weekday() >= 5

    def day(self) -> Expr:
        return Expr("day", None, (self,))

    def day_of_year(self) -> Expr:
        """January 1 is 1."""
        return Expr("day_of_year", None, (self,))

    def month(self) -> Expr:
        return Expr("month", None, (self,))

    def year(self) -> Expr:
        """Of the proleptic Gregorian calendar."""
        return Expr("year", None, (self,))

    def truncate(self, unit: str) -> Expr:
        """The last start of `unit` at or before a timestamp.

        unit: a length such as "15m", "1h" or "1d" (us, ms, s, m, h, d, w), counted from 1970-01-01 UTC; or
        "week" (Monday), "month" or "year".
        """
        length = _SPAN.match(unit) if isinstance(unit, str) else None
        if length is None and unit not in ("week", "month", "year"):
            refuse(
                f"operation 'truncate' to {unit!r}; expected a length such as '1h', or week, month or year"
            )
        if length is None:
            return Expr("truncate", unit, (self,))
        us = int(length[1]) * _SPAN_US[length[2]]
        if us > INT_MAX:
            refuse(f"operation 'truncate' to {unit!r}; expected less than 2**63 microseconds")
        return Expr("truncate", us, (self,))

    def milliseconds(self) -> Expr:
        """float64: microseconds / 1e3."""
        return Expr("in_unit", "milliseconds", (self,))

    def seconds(self) -> Expr:
        """float64: microseconds / 1e6."""
        return Expr("in_unit", "seconds", (self,))

    def minutes(self) -> Expr:
        """float64: microseconds / 6e7."""
        return Expr("in_unit", "minutes", (self,))

    def hours(self) -> Expr:
        """float64: microseconds / 3.6e9."""
        return Expr("in_unit", "hours", (self,))

    def days(self) -> Expr:
        """float64: microseconds / 86.4e9."""
        return Expr("in_unit", "days", (self,))

    def weeks(self) -> Expr:
        """float64: microseconds / 604.8e9."""
        return Expr("in_unit", "weeks", (self,))

    def seconds_since(self, earlier: Any) -> Expr:
        """(self - earlier).seconds()."""
        return (self - earlier).seconds()

    def hours_since(self, earlier: Any) -> Expr:
        """(self - earlier).hours()."""
        return (self - earlier).hours()

    def days_since(self, earlier: Any) -> Expr:
        """(self - earlier).days()."""
        return (self - earlier).days()

    def isin(self, values: Iterable[int | float | str]) -> Expr:
        """True where the number or string is one of `values`; NaN is in no set."""
        given = list(values)
        if given and all(isinstance(value, str) for value in given):
            return Expr("text_in", tuple(sorted({str(value) for value in given})), (self,))
        found = {value if value else 0 for value in (_number(value, "isin value") for value in given)}
        return Expr("isin", tuple(sorted(found)), (self,))

    def code(self) -> Expr:
        """The dictionary code of a string, as int64: 0, 1, ... in the order in which texts first came.

        A text keeps its code. One that came after a model was trained has a code beyond those that the model
        saw, and the model gets that number: a tree splits on it as on any other.
        """
        return Expr("code", None, (self,))

    def hash_bucket(self, n: int) -> Expr:
        """A bucket 0 to n - 1 of a string or int64, the same in every process and release.

        The 64-bit hash h is the first 8 bytes, little-endian, of SHA-256 over a string's UTF-8; of an int64
        the finalizer of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators"). The
        bucket is (h >> 1) % n.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= INT_MAX:
            refuse(f"operation 'hash_bucket' of {n!r} buckets; expected 1 or more")
        return Expr("hash_bucket", n, (self,))


def _number(value: Any, what: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        refuse(f"{what} is {value!r}; expected a number that is not NaN")
    return _check_int(value) if isinstance(value, int) else value


def _check_int(value: int) -> int:
    if not INT_MIN <= value <= INT_MAX:
        refuse(f"literal is {value}; expected an int64")
    return value


def timestamp_us(value: datetime) -> int:
    """Microseconds since 1970-01-01 UTC of a datetime that has a time zone."""
    if value.tzinfo is None:
        refuse(f"literal {value!r} has no time zone")
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
    refuse(f"literal {value!r} is a {type(value).__name__}; expected a number, bool or time")


def col(name: str) -> Expr:
    """A column of the source, by name."""
    if not isinstance(name, str) or not name or name == "now" or "\0" in name:
        refuse(f"column name is {name!r}; expected a name other than 'now'")
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


def coalesce(first: Any, *others: Any) -> Expr:
    """The first value that is not null."""
    found = lit(first)
    for other in others:
        found = found.fill_null(other)
    return found


def percentile_rank(value: Expr) -> Expr:
    """(below + half of equal) / n in a distribution that is fitted and bound later; NaN stays NaN."""
    return Expr("percentile_rank", None, (lit(value),))


def udf(*, returns: str) -> Callable[[Callable[..., Any]], Callable[..., Expr]]:
    """Make a Python function of numpy columns an operation that no back end can look into.

    It is given one array an argument (float64, int64, or bool; times in microseconds), of the rows where no
    argument is null, and returns an array of that length; elsewhere the result is null. It must depend on
    each row alone. Its fingerprint is that of its source text. Features that use it are computed by Python
    when they are stored; at request time they are refused.

    Args:
        returns: "float64", "int64" or "bool".
    """
    if returns not in ("float64", "int64", "bool"):
        refuse(f"udf returns {returns!r}; expected float64, int64 or bool")

    def decorate(function: Callable[..., Any]) -> Callable[..., Expr]:
        try:
            text = textwrap.dedent(inspect.getsource(function))
        except (OSError, TypeError):
            refuse(f"udf {function!r} has no source text, so it has no fingerprint")
        param = (returns, function.__name__, hashlib.sha256(text.encode()).hexdigest())

        def build(*args: Any) -> Expr:
            if not args:
                refuse(f"udf '{function.__name__}' has no argument; expected one or more columns")
            return Expr("udf", param, tuple(map(lit, args)), function=function)

        build.__name__, build.__doc__ = function.__name__, function.__doc__
        return build

    return decorate


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


def asks_about_text(node: Expr) -> bool:
    """Whether the node is, or may be, a function of a text: `==` and isin of strings, hash_bucket."""
    return node.op == "text_in" or (node.op == "hash_bucket" and node.args[0].op == "col")


def stored_parts(*roots: Expr) -> dict[str, Expr]:
    """What expressions for request time need stored: columns by name, then nodes about texts by fingerprint.

    The text behind a code is known where rows are stored and not where requests are served.
    """
    order = walk(*roots)
    about_text = {node.fingerprint(): node for node in order if asks_about_text(node)}
    read = {a.fingerprint() for n in order if n.fingerprint() not in about_text for a in n.args}
    read |= {root.fingerprint() for root in roots}
    columns = {n.param: n for n in order if n.op == "col" and n.fingerprint() in read}
    return {name: columns[name] for name in sorted(columns)} | about_text


def uses_now(expr: Expr) -> bool:
    return any(node.op == "now" for node in walk(expr))


def is_floating(dtype: str) -> bool:
    return dtype in ("float32", "float64")
