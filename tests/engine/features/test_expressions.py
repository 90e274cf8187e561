"""What definitions say: values of operations by hand, errors that name operation and line, fingerprints."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from feature_programs import same

from penstock import _core
from penstock.errors import DefinitionError
from penstock.features.backends import numpy_backend
from penstock.features.backends.stored import stored_program
from penstock.features.expression_types import infer
from penstock.features.expressions import coalesce, col, lit, now, udf, where
from penstock.features.oracle import evaluate
from penstock.features.program import compile_program, lower
from penstock.features.text_inputs import input_column, text_hash
from penstock.features.vectors import vector

SCHEMA = {
    "f": "float64", "g": "float64", "h": "float32", "i": "int64", "j": "int64", "b": "bool", "t": "timestamp",
    "d": "duration", "s": "string",
}  # fmt: skip
US = 1_000_000
INT_MIN = -(2**63)


def at(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp()) * US


def value(expr, **row):
    """The value for one row by the oracle, numpy and C++, which must agree."""
    schema = {name: SCHEMA[name] for name in row if name != "now"}
    dtype = infer([expr], schema)[expr.fingerprint()]
    want = evaluate([("x", expr)], schema, [row])[0]
    program = lower([("x", expr)], schema)
    kinds = {n: np.float64 if d.startswith("float") else np.int64 for n, d in program.inputs}
    given = [
        (np.array([0 if row[n] is None else row[n]], kinds[n]), np.array([row[n] is not None])) for n in kinds
    ]
    for back in (numpy_backend.NumpyProgram(program), _core.FeatureProgram(program.to_bytes())):
        values, valid = back.run(given, rows=1)[0]
        assert same(values, valid, want, dtype), (back, want, values, valid)
    return want[0]


@pytest.mark.parametrize(
    ("expr", "row", "want"),
    [
        (col("i") // col("j"), {"i": -7, "j": 2}, -4),
        (col("i") % col("j"), {"i": -7, "j": 2}, 1),
        (col("i") % col("j"), {"i": 7, "j": -2}, -1),
        (col("i") // col("j"), {"i": INT_MIN, "j": -1}, INT_MIN),
        (col("i") % col("j"), {"i": INT_MIN, "j": -1}, 0),
        (col("i") // col("j"), {"i": 3, "j": 0}, None),
        (col("i") % col("j"), {"i": 3, "j": 0}, None),
        (col("f") // col("g"), {"f": -7.5, "g": 2.0}, -4.0),
        (col("f") % col("g"), {"f": -7.5, "g": 2.0}, 0.5),
        (col("f") % col("g"), {"f": 5.0, "g": -math.inf}, -math.inf),
        (col("f") // col("g"), {"f": 5.0, "g": 0.0}, math.inf),
        (col("f") % col("g"), {"f": 5.0, "g": 0.0}, math.nan),
        (5 // col("i"), {"i": 2}, 2),
        (5 % col("i"), {"i": -3}, -1),
        (2 ** col("i"), {"i": 10}, 1024.0),
        (col("f") ** 0, {"f": math.nan}, 1.0),
        (col("f").pow(0.5), {"f": 9.0}, 3.0),
        (col("f").round(), {"f": 2.5}, 2.0),
        (round(col("f")), {"f": -0.4}, -0.0),
        (col("i").round(), {"i": 2**53 + 1}, 2**53 + 1),
        (col("f").sign(), {"f": -3.5}, -1.0),
        (col("f").sign(), {"f": -0.0}, -0.0),
        (col("i").sign(), {"i": INT_MIN}, -1),
        (col("f").is_nan(), {"f": math.nan}, True),
        (col("f").is_nan(), {"f": None}, None),
        (col("f").fill_nan(4), {"f": math.nan}, 4.0),
        (col("f").fill_nan(4), {"f": None}, None),
        (coalesce(col("f"), col("i"), 7), {"f": None, "i": None}, 7.0),
        (coalesce(col("i"), col("j")), {"i": None, "j": 3}, 3),
        (col("f").bucketize([0, 10]), {"f": 0.0}, 1),
        (col("f").bucketize([0, 10], right=True), {"f": 0.0}, 0),
        (col("f").bucketize([0, 10]), {"f": 11.0}, 2),
        (col("f").bucketize([0.5]), {"f": math.nan}, None),
        (col("i").bucketize([2**53, 2**53 + 1]), {"i": 2**53 + 1}, 2),
        (col("t").year(), {"t": at(2024, 12, 31)}, 2024),
        (col("t").second(), {"t": -1}, 59),
        (col("t").day_of_year(), {"t": at(2024, 12, 31)}, 366),
        (col("t").is_weekend(), {"t": at(2024, 6, 1)}, True),
        (col("t").is_weekend(), {"t": at(2024, 6, 3)}, False),
        (col("t").truncate("1h"), {"t": at(2024, 6, 1, 13, 59, 59)}, at(2024, 6, 1, 13)),
        (col("t").truncate("15m"), {"t": -1}, -900 * US),
        (col("t").truncate("week"), {"t": at(2024, 6, 2, 5)}, at(2024, 5, 27)),
        (col("t").truncate("month"), {"t": at(2024, 2, 29, 5)}, at(2024, 2, 1)),
        (col("t").truncate("year"), {"t": at(1969, 2, 3)}, at(1969, 1, 1)),
        (now().hours_since(col("t")), {"t": 0, "now": 5400 * US}, 1.5),
        (now().days_since(col("t")), {"t": 0, "now": 43200 * US}, 0.5),
        (now().seconds_since(col("t")), {"t": 0, "now": US // 2}, 0.5),
        (col("d").minutes(), {"d": 90 * US}, 1.5),
        (col("d").weeks(), {"d": 7 * 86400 * US}, 1.0),
        (col("d").milliseconds(), {"d": 1500}, 1.5),
        (col("d") // timedelta(seconds=2), {"d": 5 * US}, 2),
        (col("d") % timedelta(seconds=2), {"d": 5 * US}, US),
        (col("d") // timedelta(0), {"d": 5}, None),
        (col("d") * 3, {"d": 5}, 15),
        (col("d").cast("int64"), {"d": 5}, 5),
        (col("t").cast("int64"), {"t": 5}, 5),
        (col("i").hash_bucket(1000), {"i": 0}, (0xE220A8397B1DCDAF >> 1) % 1000),
        (col("s").code(), {"s": 4}, 4),
        (vector(col("f"), 2.0, col("g")).dot(vector(1.0, col("f"), 3)), {"f": 2.0, "g": 5.0}, 21.0),
        (vector(col("f"), col("g")).norm(), {"f": 3.0, "g": 4.0}, 5.0),
        ((vector(col("f"), col("g")) * 2 - vector(1, 1))[-1], {"f": 3.0, "g": 4.0}, 7.0),
        ((1 - -vector(col("i"))).sum(), {"i": 4}, 5),
        ((2 * (3 + vector(col("i"), 0)) / 2)[0], {"i": 4}, 7.0),
    ],
)  # fmt: skip
def test_an_operation_has_the_stated_value(expr, row, want) -> None:
    found = value(expr, **row)
    assert repr(found) == repr(want)


def test_python_rules_of_division_hold_for_floats() -> None:
    numbers = [0.1, 1.0, 3.0, 7.5, 1e300, 5e-324, 2.0**53, math.inf]
    numbers += [-x for x in numbers]
    for a in numbers:
        for b in numbers:
            if math.isfinite(a):
                assert repr(value(col("f") // col("g"), f=a, g=b)) == repr(a // b)
                assert repr(value(col("f") % col("g"), f=a, g=b)) == repr(a % b)


def this_line() -> int:
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: col("f").median(), "an expression has no operation 'median'"),
        (lambda: math.log(col("f")), "has no value while it is defined"),
        (lambda: int(col("f")), "has no value while it is defined"),
        (lambda: np.log(col("f")), r"no operation 'numpy\.log'"),
        (lambda: np.asarray(col("f")), "is no array"),
        (lambda: round(col("f"), 2), "'round' to 2 digits"),
        (lambda: col("f").cast("decimal"), "'cast' to 'decimal'"),
        (lambda: col("f").bucketize([1, 1]), r"'bucketize'.*ascending"),
        (lambda: col("f").bucketize([]), r"'bucketize'.*one or more"),
        (lambda: col("f").bucketize([math.nan]), "bucketize edge is nan"),
        (lambda: col("t").truncate("1y"), "'truncate' to '1y'"),
        (lambda: col("t").truncate("999999999999w"), r"'truncate'.*2\*\*63"),
        (lambda: col("s").hash_bucket(0), "'hash_bucket' of 0"),
        (lambda: col("s").isin(["a", 1]), "isin value is 'a'"),
        (lambda: lit("a"), "literal 'a'"),
        (lambda: vector(), "vector has no parts"),
        (lambda: vector(col("f"))[1], "vector index is 1"),
        (lambda: vector(col("f"), 1) + vector(1), "have 2 and 1 parts"),
        (lambda: vector(col("f")).dot(3), "'dot' with 3"),
        (lambda: vector(col("f")).cross(1), "a vector has no operation 'cross'"),
        (lambda: vector(col("f")) == 3, "'==' of a vector"),
        (lambda: bool(vector(col("f"))), "no truth value"),
        (lambda: udf(returns="string"), "udf returns 'string'"),
        (lambda: compile_program([("x", col("f") + col("b"))], SCHEMA), r"'add'.*\(float64, bool\)"),
        (lambda: compile_program([("x", col("s") + 1)], SCHEMA), r"'add'.*\(string, int64\)"),
        (lambda: compile_program([("x", col("f") == "a")], SCHEMA), r"'text_in'.*\(float64\)"),
        (lambda: compile_program([("x", col("f").hash_bucket(3))], SCHEMA), r"'hash_bucket'.*\(float64\)"),
        (lambda: compile_program([("x", col("i").is_nan())], SCHEMA), r"'is_nan'.*\(int64\)"),
        (lambda: compile_program([("x", col("t").exp())], SCHEMA), r"'exp'.*\(timestamp\)"),
        (lambda: compile_program([("x", col("t") % col("d"))], SCHEMA), r"'mod'.*\(timestamp, duration\)"),
        (lambda: compile_program([("x", col("t").cast("bool"))], SCHEMA), r"'cast'.*\(timestamp\)"),
        (lambda: compile_program([("x", col("nope"))], SCHEMA), "column 'nope' is not in the schema"),
        (lambda: compile_program([("x", vector(col("f")))], SCHEMA), "output 'x' is <Vector of 1>"),
    ],
)
def test_a_wrong_definition_is_named(build, match) -> None:
    with pytest.raises(DefinitionError, match=match):
        build()


def test_an_error_names_the_line_of_the_operation() -> None:
    line, wrong = this_line(), col("f") + col("b")
    with pytest.raises(DefinitionError, match=rf"'add'.*; defined at .*test_expressions\.py:{line}$"):
        compile_program([("x", where(col("b"), wrong, 1))], SCHEMA)


def test_a_line_is_no_part_of_the_fingerprint() -> None:
    one = col("f") + 1
    two = col("f") + 1
    assert one.at != two.at
    assert one.fingerprint() == two.fingerprint()


GOLDEN = """
from penstock.features.expressions import *
from penstock.features.vectors import vector
import json
print(json.dumps([e.fingerprint() for e in (
    col("f") + 1,
    where((col("f") // 2.0).is_nan(), -0.0, col("i") % 3),
    (now() - col("t")).days().log1p() ** 0.5,
    col("s").isin(["b", "a"]) & (col("s") != "c"),
    col("s").hash_bucket(64),
    col("f").bucketize([0, 0.5, 10], right=True),
    col("t").truncate("15m").hour() + col("t").truncate("week").day_of_year(),
    coalesce(col("f"), col("h"), 0).round().sign().tanh(),
    vector(col("f"), col("g")).norm(),
    col("i").isin([1, 2.5]),
)]))
"""
FINGERPRINTS = [
    "3cb9bfa6d31cdaae50b1d9b8c498b4d47f714e00cf1822fa772aeeb7f62cc665",
    "5a3036f04b3237d994ada8d9c8ea3a2b1049e45477dc0b9cd7e70dfec86fc732",
    "3443595522e8d7f3b95e8733983225493b92644870e3b113e6ec13b5a89af4cd",
    "a4fd9400ec7f6a52a2240bf731ee55eae6fd8ec03f4f674d4b176f05c242dd56",
    "8f229050e663bc0e6ed221b84feaa56519a14e4de6347237eac5c7dd7b2b03e8",
    "0b7caf8cd85ce1143e27cf25674b5d41f615323e42bd85f038c170df14bacf69",
    "7d17ffad2c356b74f5a28e331ad6208a8eeab472cabec40400766cf76979d040",
    "369a4864a8bcb565ac0873674c23308e77e58fddcabbd3dfe8729ca7ce20470f",
    "dc4f3368c561142e753c4523163931683dac338f085bf7075a6f30eb5043c30c",
    "960f7d284f09a72b91524f5e5790d64256981b96cd3a40d6eae3ddad560f6690",
]


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_fingerprints_are_those_of_every_release(seed: str) -> None:
    env = {**os.environ, "PYTHONHASHSEED": seed}
    out = subprocess.run([sys.executable, "-c", GOLDEN], capture_output=True, text=True, check=True, env=env)
    assert json.loads(out.stdout) == FINGERPRINTS


class Text:
    """A string column as sources give it."""

    def __init__(self, codes: list[int | None], dictionary: list[str]) -> None:
        self.values = np.array([0 if c is None else c for c in codes], np.int64)
        self.valid = np.array([c is not None for c in codes])
        self.dictionary = dictionary


def test_texts_are_asked_about_through_the_dictionary() -> None:
    texts = ["red", "green", "blue"]
    outputs = [
        ("is_red", col("s") == "red"), ("not_red", col("s") != "red"),
        ("warm", col("s").isin(["red", "yellow"])), ("bucket", col("s").hash_bucket(10)),
        ("code", col("s").code()),
    ]  # fmt: skip
    program = stored_program(outputs, SCHEMA)
    columns = {"s": Text([2, 0, None, 1], texts)}
    found = program.run([input_column(name, columns) for name, _ in program.inputs])
    got = {
        name: [v if ok else None for v, ok in zip(values.tolist(), valid.tolist())]
        for (name, _), (values, valid) in zip(outputs, found)
    }
    buckets = [(text_hash(t) % 2**64 >> 1) % 10 for t in texts]
    assert got == {
        "is_red": [0, 1, None, 0],
        "not_red": [1, 0, None, 1],
        "warm": [0, 1, None, 0],
        "bucket": [buckets[2], buckets[0], None, buckets[1]],
        "code": [2, 0, None, 1],
    }
    assert input_column(program.inputs[1][0], {"s": Text([None], [])})[0].tolist() == [0]


def test_the_hash_of_a_text_is_pinned() -> None:
    assert text_hash("") == int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "little", signed=True)
    assert text_hash("abc") == int.from_bytes(bytes.fromhex("ba7816bf8f01cfea"), "little", signed=True)


@udf(returns="float64")
def spread(x, y):
    """Distance of two numbers."""
    return np.abs(x - y)


@udf(returns="bool")
def is_big(i):
    return i > 10


@udf(returns="int64")
def wrong_length(i):
    return i[:0]


def test_a_udf_is_computed_where_rows_are_stored() -> None:
    feature = spread(col("f"), col("i")).clip(0, 5) + where(is_big(col("i")), 1, 0)
    program = stored_program([("x", feature)], SCHEMA)
    valid = np.array([True, False, True])
    inputs = {"f": (np.array([1.5, 2.0, 3.0]), valid), "i": (np.array([3, 4, 20]), None)}
    values, valid = program.run([inputs[name] for name, _ in program.inputs])[0]
    assert valid.tolist() == [True, False, True]
    assert values.tolist() == [1.5, 0.0, 6.0]
    rows = [{"f": 1.5, "i": 3}, {"f": None, "i": 4}, {"f": 3.0, "i": 20}]
    assert evaluate([("x", feature)], SCHEMA, rows) == [[1.5, None, 6.0]]
    assert spread.__doc__ == "Distance of two numbers."


def test_a_udf_is_fingerprinted_by_its_text_and_refused_natively() -> None:
    def make(body: str):
        space: dict = {"udf": udf}
        name = f"<made {body}>"
        import linecache

        text = f"@udf(returns='float64')\ndef f(x):\n    return {body}\n"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        exec(compile(text, name, "exec"), space)
        return space["f"](col("f"))

    assert make("x + 1").fingerprint() == make("x + 1").fingerprint()
    assert make("x + 1").fingerprint() != make("x + 2").fingerprint()
    with pytest.raises(DefinitionError, match=r"udf 'spread' is opaque Python.*test_expressions\.py:\d+"):
        compile_program([("x", spread(col("f"), col("g")))], SCHEMA)
    with pytest.raises(DefinitionError, match=r"'udf spread' is not defined on \(float64, string"):
        stored_program([("x", spread(col("f"), col("s")))], SCHEMA)
    with pytest.raises(DefinitionError, match="udf 'spread' has no argument"):
        spread()
    with pytest.raises(DefinitionError, match="no source text"):
        udf(returns="bool")(len)
    with pytest.raises(DefinitionError, match=r"udf 'wrong_length' returned shape \(0,\); expected \(1,\)"):
        stored_program([("x", wrong_length(col("i")))], SCHEMA).run([(np.array([1]), None)])
