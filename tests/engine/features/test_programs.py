"""The native program against the row-by-row oracle, the row layout, and the errors of both."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import _core
from penstock.errors import DefinitionError
from penstock.features.expression_types import infer
from penstock.features.expressions import col, maximum, minimum, now, percentile_rank, walk, where
from penstock.features.oracle import evaluate
from penstock.features.program import Distribution, compile_program, program_inputs

SCHEMA = {
    "f": "float64",
    "g": "float64",
    "h": "float32",
    "i": "int64",
    "j": "int64",
    "b": "bool",
    "c": "bool",
    "t": "timestamp",
    "u": "timestamp",
    "d": "duration",
    "s": "string",
}
FLOATS = ("float32", "float64")
INTS = st.one_of(
    st.sampled_from([-(2**63), 2**63 - 1, 0, -1, 1, 2**53 + 1]), st.integers(-(2**63), 2**63 - 1)
)
REALS = st.one_of(
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 0.5, 2.0**63, 1e300]), st.floats()
)
VALUES = {
    "float64": REALS,
    "float32": st.one_of(st.sampled_from([0.0, -0.0, math.nan]), st.floats(width=32)),
    "int64": INTS,
    "bool": st.booleans(),
    "timestamp": INTS,
    "duration": INTS,
    "string": st.integers(0, 2**31 - 1),
}
RANKS = Distribution.fit([-1.0, 0.0, 0.0, 0.5, 7.0, math.inf])


def bits(value, dtype):
    if value is None:
        return None
    if dtype in FLOATS:
        return "nan" if math.isnan(value) else struct.pack("<d", value)
    return int(value)


def run_native(outputs, rows, distributions=None, schema=SCHEMA):
    program = _core.FeatureProgram(compile_program(outputs, schema, distributions))
    assert program.inputs == program_inputs(outputs, schema)
    columns = []
    for name, dtype in program.inputs:
        kind = np.float64 if dtype in FLOATS else np.int64
        values = np.array([row[name] if row[name] is not None else 7 for row in rows], dtype=kind)
        columns.append((values, np.array([row[name] is not None for row in rows], dtype=bool)))
    found = program.run(columns, rows=len(rows))
    return [[v if ok else None for v, ok in zip(values.tolist(), valid)] for values, valid in found]


def check(outputs, rows, distributions=None):
    types = infer([e for _, e in outputs], SCHEMA)
    native = run_native(outputs, rows, distributions)
    oracle = evaluate(outputs, SCHEMA, rows, distributions)
    for (name, expr), got, want in zip(outputs, native, oracle):
        dtype = types[expr.fingerprint()]
        assert [bits(v, dtype) for v in got] == [bits(v, dtype) for v in want], (name, dtype, expr.to_json())


@st.composite
def expressions(draw, kind, depth):
    """A random expression of kind number, bool, timestamp or duration."""
    sub = lambda k: draw(expressions(k, depth - 1))  # noqa: E731
    if depth == 0:
        if kind == "number":
            return col(draw(st.sampled_from("fghij")))
        return {
            "bool": col("b"),
            "timestamp": draw(st.sampled_from([col("t"), col("u"), now()])),
            "duration": col("d"),
        }[kind]
    if draw(st.integers(0, 5)) == 0:
        return where(sub("bool"), sub(kind), sub(kind))
    if draw(st.integers(0, 5)) == 0:
        return sub(kind).fill_null(sub(kind))
    if kind == "number":
        pick = draw(st.integers(0, 12))
        if pick <= 5:
            a, b = sub(kind), sub(kind)
            return [a + b, a - b, a * b, a / b, minimum(a, b), maximum(a, b)][pick]
        if pick == 6:
            return draw(st.sampled_from([lambda x: -x, abs]))(sub(kind))
        if pick == 7:
            return getattr(sub(kind), draw(st.sampled_from(["sqrt", "floor", "ceil"])))()
        if pick == 8:
            return sub(kind).cast(draw(st.sampled_from(["float32", "float64", "int64"])))
        if pick == 9:
            return getattr(sub("duration"), draw(st.sampled_from(["days", "hours", "seconds"])))()
        if pick == 10:
            return percentile_rank(sub(kind))
        if pick == 11:
            return sub(kind) + draw(st.one_of(INTS, REALS))
        part = draw(st.sampled_from(["minute", "hour", "weekday", "day", "month"]))
        return getattr(sub("timestamp"), part)()
    if kind == "bool":
        pick = draw(st.integers(0, 8))
        if pick <= 4:
            same = draw(st.sampled_from(["number", "timestamp", "duration"]))
            a, b = sub(same), sub(same)
            return [a < b, a <= b, a == b, a != b, a > b][pick]
        if pick == 5:
            return draw(st.sampled_from([sub(kind) & col("c"), sub(kind) | col("c")]))
        if pick == 6:
            return ~sub(kind)
        if pick == 7:
            return sub("number").isin([0, -0.0, 1, 0.5, math.inf, 2**53 + 1])
        return sub("number").is_null()
    if kind == "duration":
        return draw(st.sampled_from([sub("timestamp") - sub("timestamp"), -sub(kind), sub(kind) + sub(kind)]))
    return draw(st.sampled_from([sub(kind) + sub("duration"), sub(kind) - sub("duration")]))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_programs_equal_the_oracle(data):
    kinds = data.draw(
        st.lists(st.sampled_from(["number", "bool", "timestamp", "duration"]), min_size=1, max_size=3)
    )
    outputs = [(f"o{k}", data.draw(expressions(kind, 3))) for k, kind in enumerate(kinds)]
    row = st.fixed_dictionaries({n: st.none() | VALUES[d] for n, d in {**SCHEMA, "now": "timestamp"}.items()})
    rows = data.draw(st.lists(row, min_size=1, max_size=6)) * data.draw(st.sampled_from([1, 12]))
    ranks = {n.args[0].fingerprint(): RANKS for _, e in outputs for n in walk(e) if n.op == "percentile_rank"}
    check(outputs, rows, ranks)


@pytest.mark.parametrize(
    ("expr", "row", "want"),
    [
        (col("i") + 1, {"i": 2**63 - 1}, -(2**63)),
        (abs(col("i")), {"i": -(2**63)}, -(2**63)),
        (col("i") / 0, {"i": -3}, -math.inf),
        (col("i") / 2, {"i": 3}, 1.5),
        (col("f").is_null(), {"f": math.nan}, False),
        (col("f").fill_null(1.0), {"f": None}, 1.0),
        (col("f").clip(0, 2), {"f": 9.0}, 2.0),
        (col("f").cast("int64"), {"f": -1.9}, -1),
        (col("f").cast("int64"), {"f": math.nan}, None),
        (col("f").cast("int64"), {"f": 2.0**63}, None),
        (col("f").cast("float32"), {"f": 0.1}, float(np.float32(0.1))),
        (col("f").ceil(), {"f": 0.2}, 1.0),
        (col("b") & col("c"), {"b": None, "c": False}, False),
        (col("b") & col("c"), {"b": None, "c": True}, None),
        (col("b") | col("c"), {"b": None, "c": True}, True),
        (where(col("b"), 1, col("i")), {"b": True, "i": None}, 1),
        (where(col("b"), 1, 2), {"b": None}, None),
        (minimum(col("f"), 1.0), {"f": math.nan}, math.nan),
        (minimum(col("f"), 0.0), {"f": -0.0}, -0.0),
        (col("i").isin([1, 2.5]), {"i": 1}, True),
        (percentile_rank(col("f")), {"f": 0.0}, (1 + 0.5 * 2) / 6),
        ((now() - col("t")).days(), {"now": 43_200_000_000, "t": 0}, 0.5),
        (col("t").weekday(), {"t": 0}, 3),
        (col("t").hour(), {"t": -1}, 23),
        (col("t").minute(), {"t": -1}, 59),
        (col("t").day(), {"t": -1}, 31),
        (col("t").month(), {"t": -1}, 12),
        (col("t") > datetime(1970, 1, 2, tzinfo=UTC), {"t": 86_400_000_000}, False),
        (col("t") + timedelta(seconds=1), {"t": 1}, 1_000_001),
    ],
)
def test_edge_cases_have_the_stated_value(expr, row, want):
    ranks = {col("f").fingerprint(): RANKS}
    got = run_native([("x", expr)], [row], ranks)[0][0]
    dtype = infer([expr], SCHEMA)[expr.fingerprint()]
    assert bits(got, dtype) == bits(want, dtype)
    check([("x", expr)], [row], ranks)


def test_a_corrupt_program_is_an_error_and_never_a_crash():
    data = compile_program([("x", where(col("b"), col("f") * 2, 3.0)), ("y", col("i").isin([1]))], SCHEMA)
    for size in range(len(data)):
        with pytest.raises(ValueError, match="corrupt"):
            _core.FeatureProgram(data[:size])
    with pytest.raises(ValueError, match="follow its end"):
        _core.FeatureProgram(data + b"x")
    for at in range(len(data)):  # whatever still loads must also run
        bad = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        try:
            program = _core.FeatureProgram(bad)
        except (ValueError, UnicodeDecodeError):
            continue
        kinds = [np.float64 if k == "f" else np.int64 for k in ("i", "f", "i")]
        try:
            program.run([(np.ones(3, k), None) for k in kinds])
        except (ValueError, UnicodeDecodeError):
            continue  # the change gave an input another dtype or name


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: bool(col("f") == 1), "no truth value"),
        (lambda: list(col("f")), "cannot be iterated"),
        (lambda: col("f").median(), "median"),
        (lambda: col("f") + "x", "literal 'x'"),
        (lambda: col("f") + 2**63, "int64"),
        (lambda: col("t") < datetime(2020, 1, 1), "time zone"),
        (lambda: col("f").isin([math.nan]), "isin"),
        (lambda: col("f").cast("string"), "cast"),
        (lambda: col("now"), "now"),
        (lambda: compile_program([("x", col("f") + col("b"))], SCHEMA), r"'add'.*float64, bool"),
        (lambda: compile_program([("x", col("t").days())], SCHEMA), r"'in_unit'.*timestamp"),
        (lambda: compile_program([("x", col("zz"))], SCHEMA), "column 'zz'"),
        (lambda: compile_program([("x", col("f")), ("x", col("i"))], SCHEMA), "'x'.*twice"),
        (lambda: compile_program([("x", percentile_rank(col("f")))], SCHEMA), "no fitted distribution"),
        (lambda: Distribution.fit([math.nan]), "distribution"),
    ],
)
def test_a_wrong_definition_is_named(build, match):
    with pytest.raises(DefinitionError, match=match):
        build()


def test_fingerprint_is_stable_across_processes_and_sees_each_change():
    base = where(col("f") + 0.0 < col("i"), 1, 2)
    code = (
        "from penstock.features.expressions import *;"
        "print(where(col('f') + 0.0 < col('i'), 1, 2).fingerprint())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == base.fingerprint()
    changed = [
        where(col("g") + 0.0 < col("i"), 1, 2),
        where(col("f") + -0.0 < col("i"), 1, 2),
        where(col("f") + 0 < col("i"), 1, 2),
        where(col("f") + 0.0 <= col("i"), 1, 2),
        where(col("f") + 0.0 < col("i"), True, 2),
        where(col("f") + 0.0 < col("i"), 2, 1),
    ]
    assert len({e.fingerprint() for e in [base, *changed]}) == 7
    assert len({e.to_json() for e in [base, *changed]}) == 7


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_survive_the_round_trip(data):
    dtypes = data.draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=9)) * data.draw(
        st.sampled_from([1, 9])
    )
    n = data.draw(st.sampled_from([1, 3, 70]))
    schema = _core.RowSchema([(f"c{k}", d) for k, d in enumerate(dtypes)])
    columns, wanted = [], []
    for dtype in dtypes:
        few = data.draw(st.lists(st.none() | VALUES[dtype], min_size=1, max_size=4))
        values = [few[k % len(few)] for k in range(n)]
        kind = np.float64 if dtype in FLOATS else np.int64
        columns.append(
            (
                np.array([0 if v is None else v for v in values], kind),
                np.array([v is not None for v in values]),
            )
        )
        wanted.append([bits(v, dtype) for v in values])
    status = np.arange(n, dtype=np.uint8) % 4
    rows = schema.encode(columns, status)
    assert rows.shape == (n, schema.row_words)
    assert (rows[:, 0] == status).all()
    for dtype, want, (values, valid) in zip(dtypes, wanted, schema.decode(rows)):
        assert [bits(v, dtype) if ok else None for v, ok in zip(values.tolist(), valid)] == want


def test_row_layout_packs_bits_and_halves():
    fields = [("a", "float32"), ("b", "bool"), ("c", "int64"), ("d", "string"), ("e", "bool")]
    schema = _core.RowSchema(fields)
    assert schema.row_words == 5  # status, validity, bools, c, a|d
    one = [np.array([v]) for v in (1.5, 1, -2, 3, 1)]
    rows = schema.encode([(v, None) for v in one], np.zeros(1, np.uint8))
    assert rows[0].tolist() == [0, 31, 3, 2**64 - 2, (3 << 32) | 0x3FC00000]


@pytest.mark.parametrize(
    ("fields", "match"),
    [([("a", "int8")], "int8"), ([("a", "bool"), ("a", "bool")], "twice"), ([("", "bool")], "empty")],
)
def test_a_wrong_row_schema_is_named(fields, match):
    with pytest.raises(ValueError, match=match):
        _core.RowSchema(fields)


def test_wrong_columns_are_named():
    program = _core.FeatureProgram(compile_program([("x", col("f") + col("g"))], SCHEMA))
    good = (np.zeros(2), None)
    for bad, match in [
        ((np.zeros(2, np.int64), None), "'g'.*float64"),
        ((np.zeros(3), None), "'g' has 3 rows"),
        ((np.zeros(2), np.ones(1, bool)), "'g': validity"),
    ]:
        with pytest.raises(ValueError, match=match):
            program.run([good, bad])
    with pytest.raises(ValueError, match="got 1 columns; expected 2"):
        program.run([good])
