"""Random typed feature programs and columns, and the comparison of back ends with the oracle as bits."""

from __future__ import annotations

import math
import random
import struct
from datetime import UTC, date, datetime, timedelta

import numpy as np

from penstock.features.expression_types import infer
from penstock.features.expressions import (
    MATH,
    TIME_PARTS,
    Expr,
    coalesce,
    col,
    lit,
    maximum,
    minimum,
    now,
    percentile_rank,
    walk,
    where,
)  # fmt: skip
from penstock.features.oracle import evaluate
from penstock.features.program import SIGNATURES, Distribution, lower, program_inputs
from penstock.features.text_inputs import by_code, function_of

SCHEMA = {
    "f": "float64", "g": "float64", "h": "float32", "k": "float32", "i": "int64", "j": "int64",
    "b": "bool", "c": "bool", "t": "timestamp", "u": "timestamp", "d": "duration", "e": "duration",
    "s": "string",
}  # fmt: skip
KINDS = ("float", "int", "bool", "timestamp", "duration")
TEXTS = ["", "a", "b", "ä€😀", "long " * 40, "a\0b"]
RANKS = Distribution.fit([-1.0, 0.0, 0.0, 0.5, 7.0, 1e300, math.inf])
DISTRIBUTIONS = [RANKS, Distribution.fit([0.0]), Distribution.fit([-math.inf, -3.5, 1.0, 2.0**53, 2.0**62])]
INT_EDGES = (
    -(2**63), -(2**63) + 1, 2**63 - 1, 0, 1, -1, 2, 7, -7, 2**53 - 1, 2**53, 2**53 + 1, -(2**53) - 1, 2**31,
    86_400_000_000, -86_400_000_000, 86_399_999_999, 1_700_000_000_000_000, 951_782_400_000_000, -1_000_000,
)  # fmt: skip
FLOAT_EDGES = (
    0.0, -0.0, math.nan, math.inf, -math.inf, 0.5, -0.5, 1.5, 2.5, 1.0, -1.0, 2.0**63, -(2.0**63), 2.0**53,
    2.0**53 + 2, 2.0**52 + 1, 1e300, -1e300, 5e-324, 2.2250738585072014e-308, 709.7827, -745.2, 1074.0, 3.0,
    -3.0, 1e-9, 0.1, 22.0, 1 - 2.0**-53,
)  # fmt: skip
SPANS = ("1us", "7us", "1ms", "1s", "5m", "1h", "1d", "7d", "100000d", "week", "month", "year")
SIZES = (0, 1, 2, 63, 64, 65)


def number(rng: random.Random, dtype: str) -> float | int | bool | None:
    """A value of the dtype, often an edge; None is null."""
    if rng.random() < 0.12:
        return None
    if dtype == "bool":
        return rng.random() < 0.5
    if dtype == "string":
        return rng.randrange(len(TEXTS))
    if dtype in ("float64", "float32"):
        pick = rng.random()
        if pick < 0.1:
            value = rng.choice((0.0, -0.0))
        elif pick < 0.45:
            value = rng.choice(FLOAT_EDGES)
        elif pick < 0.8:
            value = rng.uniform(-5, 5) if rng.random() < 0.7 else float(rng.randrange(-50, 50))
        elif pick < 0.9:
            value = rng.uniform(-800, 800)
        else:
            value = struct.unpack("<d", rng.randbytes(8))[0]
        if dtype == "float32":
            with np.errstate(over="ignore"):
                return float(np.float32(value))
        return value
    pick = rng.random()
    if dtype == "timestamp" and pick < 0.5:  # about midnight of any day of some centuries, often 1 March
        day = date(rng.choice((1600, 1900, 1970, 2000, 2100, rng.randrange(1500, 2500))), 1, 1).toordinal()
        day += (
            rng.choice((0, 58, 59, 60, 89, 90, 364, 365, rng.randrange(366))) - date(1970, 1, 1).toordinal()
        )
        return day * 86_400_000_000 + rng.choice((-1, 0, 1, rng.randrange(86_400_000_000)))
    if pick < 0.4:
        return rng.choice(INT_EDGES)
    if pick < 0.6:
        return rng.randrange(-10, 10)
    if pick < 0.8:
        return rng.randrange(-(10**15), 2 * 10**15)
    return rng.randrange(-(2**63), 2**63)


class Generator:
    """Random expressions; `covered` counts the operations and operand types that it has made."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.distributions: dict[str, Distribution] = {}

    def make(self, kind: str, depth: int) -> Expr:
        rng = self.rng
        if depth <= 0 or rng.random() < 0.08:
            return self.leaf(kind)
        pick = rng.random()
        if pick < 0.06:
            return where(self.make("bool", depth - 1), self.make(kind, depth - 1), self.make(kind, depth - 1))
        if pick < 0.1:
            return self.make(kind, depth - 1).fill_null(self.make(kind, depth - 1))
        if pick < 0.12:
            return coalesce(*(self.make(kind, depth - 1) for _ in range(rng.choice((1, 3)))))
        return getattr(self, kind)(depth - 1)

    def leaf(self, kind: str) -> Expr:
        rng = self.rng
        literal = rng.random() < 0.2
        if kind == "float":
            return lit(rng.choice(FLOAT_EDGES)) if literal else col(rng.choice("fghk"))
        if kind == "int":
            return lit(rng.choice(INT_EDGES)) if literal else col(rng.choice("ij"))
        if kind == "bool":
            return lit(rng.random() < 0.5) if literal else col(rng.choice("bc"))
        if kind == "duration":
            return (
                lit(timedelta(microseconds=rng.randrange(-(10**14), 10**14)))
                if literal
                else col(rng.choice("de"))
            )
        if literal:
            return lit(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=rng.randrange(10**15)))
        return rng.choice((col("t"), col("u"), now()))

    def any_number(self, depth: int) -> Expr:
        return self.make(self.rng.choice(("float", "float", "int")), depth)

    def float(self, depth: int) -> Expr:
        rng = self.rng
        pick = rng.randrange(14)
        if pick <= 1:
            a, b = self.make("float", depth), self.any_number(depth)
            if rng.random() < 0.5:
                a, b = b, a
            return rng.choice((
                lambda: a + b, lambda: a - b, lambda: a * b, lambda: a / b, lambda: a // b, lambda: a % b,
                lambda: minimum(a, b), lambda: maximum(a, b),
            ))()  # fmt: skip
        if pick == 2:
            return self.make("int", depth) / self.make("int", depth)
        if pick == 3:
            return self.any_number(depth) ** self.any_number(depth)
        if pick <= 5:
            a = self.make("float", depth)
            return rng.choice((
                lambda: -a, lambda: abs(a), a.floor, a.ceil, a.round, a.sign, lambda: a.clip(-1.5, 3),
                lambda: a.fill_nan(self.any_number(0)), lambda: minimum(a, rng.choice((0.0, -0.0))),
                lambda: maximum(a, rng.choice((0.0, -0.0))), lambda: maximum(col("f"), 0.0),
                lambda: minimum(col("f"), -0.0),
            ))()  # fmt: skip
        if pick <= 8:
            return getattr(self.any_number(depth), rng.choice(("sqrt", *MATH)))()
        if pick == 9:
            return getattr(self.make("duration", depth), rng.choice(
                ("milliseconds", "seconds", "minutes", "hours", "days", "weeks")))()  # fmt: skip
        if pick == 10:
            argument = self.any_number(depth)
            self.distributions[argument.fingerprint()] = rng.choice(DISTRIBUTIONS)
            return percentile_rank(argument)
        if pick == 11:
            return self.make(rng.choice(("float", "int", "bool")), depth).cast(
                rng.choice(("float32", "float64"))
            )
        if pick == 12:
            return self.make("duration", depth) / self.make("duration", depth)
        return self.any_number(depth) + lit(rng.choice(FLOAT_EDGES))

    def int(self, depth: int) -> Expr:
        rng = self.rng
        pick = rng.randrange(9)
        if pick <= 1:
            a, b = self.make("int", depth), self.make("int", depth)
            return rng.choice((
                lambda: a + b, lambda: a - b, lambda: a * b, lambda: a // b, lambda: a % b,
                lambda: minimum(a, b), lambda: maximum(a, b),
            ))()  # fmt: skip
        if pick == 2:
            a = self.make("int", depth)
            return rng.choice((lambda: -a, lambda: abs(a), a.floor, a.ceil, a.round, a.sign))()
        if pick == 3:
            source = rng.choice(("float", "int", "bool", "timestamp", "duration"))
            return self.make(source, depth).cast("int64")
        if pick <= 5:
            return getattr(self.make("timestamp", depth), rng.choice(TIME_PARTS))()
        if pick == 6:
            edges = rng.choice(((0,), (-7, 0, 2**53, 2**53 + 1), (-0.5, 0.0, 1.5), (-math.inf, 1, math.inf)))
            return self.any_number(depth).bucketize(edges, right=rng.random() < 0.5)
        if pick == 7:
            return self.make("duration", depth) // self.make("duration", depth)
        buckets = rng.choice((1, 2, 10, 2**40, 2**63 - 1))
        return rng.choice((
            col("s").code(), col("s").hash_bucket(buckets), self.make("int", depth).hash_bucket(buckets)
        ))  # fmt: skip

    def bool(self, depth: int) -> Expr:
        rng = self.rng
        pick = rng.randrange(10)
        if pick <= 3:
            kind = rng.choice(("float", "int", "timestamp", "duration"))
            a, b = self.make(kind, depth), self.make(kind, depth)
            if kind in ("float", "int") and rng.random() < 0.3:
                b = self.any_number(depth)
            return rng.choice((
                lambda: a < b, lambda: a <= b, lambda: a == b, lambda: a != b, lambda: a > b, lambda: a >= b,
            ))()  # fmt: skip
        if pick <= 5:
            a, b = self.make("bool", depth), self.make("bool", depth)
            return rng.choice((lambda: a & b, lambda: a | b, lambda: ~a, lambda: a == b))()
        if pick == 6:
            members = rng.choice(([], [0, -0.0, 1, 0.5, math.inf, 2**53 + 1], [7, -(2**63)], [2.5]))
            return self.any_number(depth).isin(members)
        if pick == 7:
            return rng.choice((
                lambda: self.make(rng.choice(KINDS), depth).is_null(),
                lambda: self.make("float", depth).is_nan(),
                lambda: col("s").is_null(), lambda: self.make("timestamp", depth).is_weekend(),
            ))()  # fmt: skip
        if pick == 8:
            text = col("s")
            return rng.choice((text == "a", text != "", text.isin(["b", "nowhere", "ä€😀"])))
        return self.make(rng.choice(("float", "int", "bool")), depth).cast("bool")

    def timestamp(self, depth: int) -> Expr:
        rng = self.rng
        a = self.make("timestamp", depth)
        if rng.random() < 0.4:
            return a.truncate(rng.choice(SPANS))
        b, c = self.make("duration", depth), self.make("timestamp", depth)
        return rng.choice((
            lambda: a + b, lambda: b + a, lambda: a - b, lambda: minimum(a, c), lambda: maximum(a, c)
        ))()  # fmt: skip

    def duration(self, depth: int) -> Expr:
        rng = self.rng
        a, b = self.make("duration", depth), self.make("duration", depth)
        return rng.choice((
            lambda: self.make("timestamp", depth) - self.make("timestamp", depth), lambda: a + b,
            lambda: a - b, lambda: -a, lambda: abs(a), lambda: minimum(a, b), lambda: maximum(a, b),
            lambda: a % b, lambda: a * self.make("int", depth), lambda: self.make("int", depth) * a,
        ))()  # fmt: skip


def random_program(rng: random.Random, outputs: int, depth: int):
    """(outputs, distributions) of a random program."""
    made = Generator(rng)
    found = [(f"o{n}", made.make(rng.choice(KINDS), depth)) for n in range(outputs)]
    return found, made.distributions


def covering_programs(seed: int, size: int):
    """Random programs of up to `size` outputs that together have every operation, few times each."""
    seen: set[str] = set()
    found, outputs, ranks = [], [], {}
    while seen != set(SIGNATURES):
        made, fitted = random_program(random.Random(seed), 1, 2)
        seed += 1
        operations = {step.op for step in lower(made, SCHEMA, fitted).code}
        if operations <= seen:
            continue
        seen |= operations
        outputs.append((f"o{len(outputs)}", made[0][1]))
        ranks |= fitted
        if len(outputs) == size or seen == set(SIGNATURES):
            found.append((outputs, ranks))
            outputs, ranks = [], {}
    return found


def random_rows(rng: random.Random, n: int) -> dict[str, list]:
    """Columns of n Python values, None for null, for the schema and `now`; a third have no nulls."""
    columns = {}
    for name, dtype in {**SCHEMA, "now": "timestamp"}.items():
        drawn = [number(rng, dtype) for _ in range(n)]
        if rng.random() < 0.3:
            drawn = [value if value is not None else {"bool": True}.get(dtype, 1) for value in drawn]
            if dtype.startswith("float"):
                drawn = [float(value) for value in drawn]
        columns[name] = drawn
    return columns


def arrays(columns: dict[str, list], inputs: list[tuple[str, str]], rng: random.Random):
    """Program inputs: (values, validity); what stands in the place of a null is arbitrary."""
    found = []
    for name, dtype in inputs:
        function = function_of(name)
        drawn = columns[function.column if function else name]
        kind = np.float64 if dtype.startswith("float") else np.int64
        valid = np.array([value is not None for value in drawn], np.bool_)
        if function is not None:
            table = by_code(function, TEXTS)
            values = np.array([0 if v is None else table[v] for v in drawn], np.int64)
        else:
            filler = math.nan if kind is np.float64 and rng.random() < 0.5 else rng.choice((0, 1, 7))
            values = np.array([filler if v is None else v for v in drawn], kind)
        found.append((values, None if valid.all() and rng.random() < 0.5 else valid))
    return found


def same(values: np.ndarray, valid: np.ndarray, want: list, dtype: str) -> bool:
    """Whether a column equals the oracle's as bits: NaNs are one, a null's value is 0."""
    kind = np.float64 if dtype.startswith("float") else np.int64
    ok = np.array([value is not None for value in want], np.bool_)
    expected = np.array([0 if value is None else value for value in want], kind)
    if values.dtype != kind or not np.array_equal(ok, valid):
        return False
    if kind is np.int64:
        return bool(np.array_equal(values, expected))
    nan = np.isnan(expected)
    bits = np.array_equal(values.view(np.int64)[~nan], expected.view(np.int64)[~nan])
    return bool(bits) and bool(np.isnan(values[nan]).all())


class Case:
    """A random program, its columns and what the oracle makes of them."""

    def __init__(
        self, seed: int, outputs: int = 2, depth: int = 3, rows: int | None = None, program=None
    ) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.outputs, self.distributions = program or random_program(rng, outputs, depth)
        self.rows = rng.choice((0, 1, 2, 4, 8)) if rows is None else rows
        columns = random_rows(rng, self.rows)
        self.types = infer([e for _, e in self.outputs], SCHEMA)
        self.inputs = program_inputs(self.outputs, SCHEMA)
        self.arrays = arrays(columns, self.inputs, rng)
        names = list(columns)
        self.by_row = [dict(zip(names, row)) for row in zip(*columns.values())]
        self.want = evaluate(self.outputs, SCHEMA, self.by_row, self.distributions, {"s": TEXTS})

    def operations(self) -> set[str]:
        return {node.op for node in walk(*(e for _, e in self.outputs))}

    def differs(self, program) -> str | None:
        """The first output in which a back end's program differs from the oracle, with the case; or None."""
        assert program.inputs == self.inputs
        found = program.run(self.arrays, rows=self.rows)
        for (name, expr), want, (values, valid) in zip(self.outputs, self.want, found):
            dtype = self.types[expr.fingerprint()]
            if not same(np.asarray(values), np.asarray(valid), want, dtype):
                got = [v if ok else None for v, ok in zip(values.tolist(), valid.tolist())]
                bad = [r for r in range(self.rows) if not same(
                    values[r : r + 1], valid[r : r + 1], want[r : r + 1], dtype)][:1]  # fmt: skip
                row = self.by_row[bad[0]] if bad else {}
                shown = f"got {got[bad[0]]!r}, oracle {want[bad[0]]!r}" if bad else "shape or dtype"
                return f"seed {self.seed} {name} {dtype}: {shown}\nrow {row}\n{expr.to_json()}"
        return None
