"""What callers pass becomes MessagePack, and replies become values: against the golden frames and oracles."""

from __future__ import annotations

import ast
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgpack
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import InternalError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from penstock.serving import protocol
from penstock.serving.protocol import (
    Address,
    Prediction,
    decode_prediction,
    join_predictions,
    label_call,
    parse_address,
    plain_call,
    predict_call,
    predict_vectors_call,
    row_count,
    split_table,
    to_column,
    to_columns,
    to_micros,
    unpack_params,
)

_GOLDEN = Path(__file__).parents[2] / "golden"


def _golden(name):
    return ast.literal_eval((_GOLDEN / f"{name}.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://127.0.0.1:7064", Address("127.0.0.1", 7064)),
        ("tcp://[::1]:1", Address("::1", 1)),
        ("tcp://host:0", Address("host", 0)),
        ("unix:///run/p.sock", Address(path="/run/p.sock")),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:7064",
        "tcp://h",
        "tcp://h:99999",
        "http://h:1",
        "unix://x/y",
        "unix:///",
        "tcp://h:1/x",
        5,
    ],
)
def test_address_that_is_none(text):
    with pytest.raises(InvalidArgumentError, match='expected "tcp://host:port"'):
        parse_address(text)


def test_predict_call_makes_the_golden_request():
    call = predict_call(
        "fare",
        {"user_id": np.array([7, 8]), "city": ["Zürich", None]},
        {"km": np.array([1.5, 2])},
        deadline_ms=50,
        request_id=np.array([11, 12], dtype=np.uint64),
        priority="high",
    )
    assert msgpack.unpackb(call.message(1)) == _golden("request_predict")
    assert msgpack.unpackb(call.message(1, 12.5))[3][3]["deadline_ms"] == 12.5
    assert call.idempotent


def test_predict_vectors_call_makes_the_golden_request():
    call = predict_vectors_call("fare", np.array([[1, 2], [3, 4]], dtype=np.float64))
    assert msgpack.unpackb(call.message(2)) == _golden("request_predict_vectors")
    fortran = np.asfortranarray(np.array([[1, 2], [3, 4]], dtype=np.float32))
    assert predict_vectors_call("fare", fortran).message(2) == call.message(2)


def test_plain_call_leaves_trailing_none_out():
    assert msgpack.unpackb(plain_call("health").message(3)) == _golden("request_health")
    assert msgpack.unpackb(plain_call("materialize", None, ["v"]).message(1)) == [
        0, 1, "materialize", [None, ["v"]],
    ]  # fmt: skip
    assert msgpack.unpackb(plain_call("materialize", 5, None).message(1, 9.0))[3] == [5]
    assert not plain_call("materialize").idempotent
    assert not plain_call("apply").idempotent


def test_options_of_a_prediction():
    call = predict_call("m", {"id": 1}, now=datetime(2020, 1, 1), timings=True, no_cache=True)
    options = msgpack.unpackb(call.message(1, 5.0))[3][3]
    assert options == {"now": 1577836800000000, "timings": True, "no_cache": True}
    assert len(msgpack.unpackb(predict_call("m", {"id": 1}).message(1))[3]) == 3


def test_golden_predictions_decode():
    made = decode_prediction(_golden("response_scores_full")[3])
    assert made.scores.tolist() == [0.25, -1.5]
    assert made.request_ids.dtype == np.uint64
    assert (made.status.tolist(), made.version) == ([0, 2], "3")
    assert made.timings == {"features": 1200, "model": 34}
    plain = decode_prediction(_golden("response_scores_bin")[3])
    assert (plain.scores.tolist(), plain.scores.dtype) == ([0.25, -1.5], np.float64)
    assert plain.status is None


def test_several_outputs_are_row_major():
    made = decode_prediction({"scores": [1, 2, 3, 4, 5, 6], "version": "1", "request_ids": [1, 2]})
    assert made.scores.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("result", [None, 5, {}, {"scores": ["x"], "version": "1", "request_ids": [1]}])
def test_reply_that_is_no_prediction(result):
    with pytest.raises(InternalError, match="no prediction"):
        decode_prediction(result)


def test_error_bytes_are_the_golden_ones():
    error = ResourceExhaustedError("the queue is full", retry_after_ms=20)
    assert msgpack.unpackb(protocol.pack_error(5, error)) == _golden("error_retry")
    assert msgpack.unpackb(protocol.pack_notification("cancel", 1)) == _golden("notification_cancel")


@given(st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=-5))])))
def test_times_are_microseconds_utc(value):
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    expected = round((aware - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))
    assert abs(to_micros(value) - expected) <= 128  # the oracle divides in float64
    assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=to_micros(value)) == aware


def test_times_of_numpy_and_pandas():
    assert to_micros(np.datetime64("2020-01-01T00:00:00.5")) == 1577836800500000
    assert to_micros(pd.Timestamp("2020-01-01", tz="Asia/Tokyo")) == 1577836800000000 - 9 * 3600 * 10**6
    assert to_micros(np.int64(7)) == 7


@pytest.mark.parametrize("value", [None, 1.5, "2020", True, np.datetime64("NaT"), pd.NaT])
def test_time_that_is_none(value):
    with pytest.raises(InvalidArgumentError, match=r"now is .* expected a datetime or int microseconds"):
        to_micros(value)


@pytest.mark.parametrize(
    ("values", "plain"),
    [
        (5, 5),
        (np.int32(5), 5),
        (np.float32(0.5), 0.5),
        (np.str_("a"), "a"),
        (np.array(5), 5),
        (np.array([True, False]), [True, False]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([1, None, np.float64(2)], dtype=object), [1, None, 2.0]),
        (np.array(["1970-01-01T00:00:01", "NaT"], dtype="datetime64[ns]"), [1_000_000, None]),
        ([np.int64(1), np.uint64(2**63)], [1, 2**63]),
        ((1, 2), [1, 2]),
        (pd.Series([1, 2]), [1, 2]),
        (pd.Series([1, None], dtype="Int64"), [1, None]),
        (pd.Series(["a", None]).astype("category"), ["a", None]),
        (pd.Series(["a", None]), ["a", None]),
        (pd.Series([1.5, None]), [1.5, float("nan")]),
        (pd.Series(pd.to_datetime(["1970-01-02", None])), [86400 * 10**6, None]),
        (pd.Timestamp("1970-01-02"), 86400 * 10**6),
        (pl.Series([1, None]), [1, None]),
        (pa.array(["a", None]), ["a", None]),
        (pa.chunked_array([[1], [2]]), [1, 2]),
    ],
)  # fmt: skip
def test_columns_become_plain(values, plain):
    made = to_column("c", values)
    assert repr(made) == repr(plain)
    assert {type(v) for v in (made if isinstance(made, list) else [made])} <= protocol._PLAIN


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.zeros((2, 2)), "c has 2 dimensions; expected 1"),
        ([1, b"x"], r"c\[1\] is b'x' \(bytes\)"),
        ([[1]], r"c\[0\] is \[1\] \(list\)"),
        ({"a": 1}, r"c is {'a': 1} \(dict\)"),
        (1j, "c is 1j"),
    ],
)
def test_column_that_the_wire_cannot_carry(values, match):
    with pytest.raises(InvalidArgumentError, match=match):
        to_column("c", values)


def test_tables_of_every_kind():
    plain = {"a": [1, 2], "b": ["x", None]}
    for table in (plain, pl.DataFrame(plain), pa.table(plain), pd.DataFrame(plain, dtype=object)):
        assert to_columns("table", table) == plain


@pytest.mark.parametrize("table", [5, [1], {1: [2]}])
def test_table_that_is_none(table):
    with pytest.raises(InvalidArgumentError, match="table"):
        to_columns("table", table)


@pytest.mark.parametrize(
    ("columns", "match"), [({}, "no column"), ({"a": [1, 2], "b": [1]}, "t.b has 1 rows; expected 2")]
)
def test_columns_of_unequal_length(columns, match):
    with pytest.raises(InvalidArgumentError, match=match):
        row_count("t", columns)


@given(rows=st.integers(1, 50), chunk=st.integers(1, 60))
@settings(max_examples=50)
def test_split_table_gives_every_row_once_in_order(rows, chunk):
    table = {"id": list(range(rows)), "km": [i / 2 for i in range(rows)]}
    ids, km = [], []
    for keys, inputs in split_table(table, ["id"], chunk):
        assert 1 <= len(keys["id"]) <= chunk
        ids += keys["id"]
        km += inputs["km"]
    assert (ids, km) == (table["id"], table["km"])
    assert [inputs for _, inputs in split_table({"id": 1}, ["id"], chunk)] == [None]


@pytest.mark.parametrize(
    ("table", "entities", "chunk", "match"),
    [
        ({"a": [1]}, ["b"], 1, 'no column "b"'),
        ({"a": []}, ["a"], 1, "no rows"),
        ({"a": [1]}, ["a"], 0, "chunk_rows is 0"),
        ({"a": [1]}, ["a"], True, "chunk_rows is True"),
    ],
)
def test_table_that_cannot_be_split(table, entities, chunk, match):
    with pytest.raises(InvalidArgumentError, match=match):
        list(split_table(table, entities, chunk))


def test_joined_predictions_name_each_version_once():
    parts = [Prediction(np.array([float(i)]), "12"[i > 1], np.array([i], np.uint64)) for i in range(4)]
    made = join_predictions(parts)
    assert (made.scores.tolist(), made.versions) == ([0.0, 1.0, 2.0, 3.0], ("1", "2"))


def test_entities_of_an_unknown_model():
    with pytest.raises(NotFoundError, match='model is "b"; expected one of: a'):
        protocol.entity_names("b", {"a": {"entities": ["id"]}})
    assert protocol.entity_names("a", {"a": {"entities": ["id"]}}) == ("id",)


def test_labels_of_another_length():
    call = label_call(np.array([1, 2], np.uint64), np.array([0, 1]), [datetime(1970, 1, 2), 5])
    assert msgpack.unpackb(call.message(1))[3] == [[1, 2], [0, 1], [86400 * 10**6, 5]]
    with pytest.raises(InvalidArgumentError, match="labels has 1 values; expected 2"):
        label_call([1, 2], [0])
    with pytest.raises(InvalidArgumentError, match="times has 1 values; expected 2"):
        label_call([1, 2], [0, 1], [5])


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), "5", True])
def test_deadline_that_is_none(deadline):
    with pytest.raises(InvalidArgumentError, match=r"deadline_ms is .* expected a number above 0"):
        predict_call("m", {"id": 1}, deadline_ms=deadline)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: predict_call("", {"id": 1}), "model is ''"),
        (lambda: predict_call("m", {"id": 2**64}), "entities cannot be sent"),
        (lambda: predict_call("m", {"s": "\ud800"}), "entities cannot be sent"),
        (lambda: predict_vectors_call("m", [1.0]), r"rows has shape \(1,\)"),
        (lambda: predict_vectors_call("m", [["x"]]), "rows cannot be float32"),
        (lambda: plain_call("apply", *range(15)), "apply has 15 params"),
        (lambda: plain_call("apply", object()), "no MessagePack form"),
    ],
)
def test_call_that_cannot_be_sent(make, match):
    with pytest.raises(InvalidArgumentError, match=match):
        make()


@given(st.binary(max_size=64))
@settings(max_examples=300)
def test_params_of_any_bytes_are_a_list_or_refused(data):
    try:
        assert isinstance(unpack_params(data), list)
    except InvalidArgumentError as error:
        assert "params" in str(error)


def test_results_of_an_engine_become_plain():
    result = {"a": np.float32(0.5), "b": np.arange(2), "t": datetime(1970, 1, 2), "s": {"y", "x"}}
    plain = {"a": 0.5, "b": [0, 1], "t": 86400 * 10**6, "s": ["x", "y"]}
    assert msgpack.unpackb(protocol.pack_result(result)) == plain
