"""Feast's bytes: against bytes that Feast wrote, and back and forth."""

from __future__ import annotations

import contextlib
import math
import struct
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import InvalidArgumentError
from penstock.integrations import feast_wire as w

INT64 = st.integers(-(2**63) + 1, 2**63 - 1)
VALUES = {
    w.T_BYTES: st.binary(),
    w.T_STRING: st.text(),
    w.T_INT32: st.integers(-(2**31), 2**31 - 1),
    w.T_INT64: INT64,
    w.T_DOUBLE: st.floats(allow_nan=False),
    w.T_FLOAT: st.floats(width=32, allow_nan=False),
    w.T_BOOL: st.booleans(),
    w.T_TIMESTAMP: st.integers(-(10**10), 10**11),
}


def test_a20_entity_keys_are_those_of_feast() -> None:
    # From feast 0.67, serialize_entity_key(EntityKey(join_keys=..., entity_values=...), 3).
    cases: list[tuple[list[str], list[int], list[Any], str]] = [
        (["customer_id"], [w.T_STRING], ["ä"],
         "0100000002000000" "0b000000" "637573746f6d65725f6964" "02000000" "02000000" "c3a4"),
        (["user"], [w.T_INT64], [-(2**63)],
         "0100000002000000" "04000000" "75736572" "04000000" "08000000" "0000000000000080"),
        (["user"], [w.T_INT32], [2**15],
         "0100000002000000" "04000000" "75736572" "03000000" "04000000" "00800000"),
        ([], [], [], "00000000"),
        (["b", "a"], [w.T_STRING, w.T_INT64], ["", 7],
         "02000000" "02000000" "01000000" "61" "02000000" "01000000" "62"
         "04000000" "08000000" "0700000000000000" "02000000" "00000000"),
    ]  # fmt: skip
    for names, types, values, expected in cases:
        assert w.entity_key(names, types, values).hex() == expected


@pytest.mark.parametrize(
    "kind, value",
    [(w.T_INT32, 2**31), (w.T_INT64, 2**63), (w.T_INT64, "7"), (w.T_STRING, 7), (w.T_BYTES, "x")],
)
def test_a_key_that_does_not_fit_is_refused(kind: int, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="join key 'k' is"):
        w.entity_key(["k"], [kind], [value])


def test_murmur_hash_is_that_of_the_reference_code() -> None:
    # From mmh3.hash(text, signed=False).
    for text, expected in (
        ("", 0),
        ("driver_stats:conv_rate", 336622586),
        ("ab", 2613040991),
        ("äöü", 769542228),
    ):
        assert w.murmur3_32(text.encode()) == expected
    assert w.redis_field("driver_stats", "conv_rate") == struct.pack("<I", 336622586)


@given(st.sampled_from(sorted(VALUES)), st.data())
def test_values_come_back(kind: int, data: Any) -> None:
    value = data.draw(VALUES[kind])
    found = w.decode_value(w.encode_value(kind, value), kind)
    if kind == w.T_TIMESTAMP:
        value = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=value)
    assert found == value and type(found) is type(value)


@given(st.integers(0, 2**60))
def test_times_come_back(us: int) -> None:
    assert w.timestamp_us(w.encode_timestamp(us)) == us


@given(st.integers(1, 2**33))
def test_times_before_1970_come_back(us: int) -> None:
    assert w.timestamp_us(w.encode_timestamp(-us)) == -us


LISTS = {name: getattr(w, name) + 10 for name in ("T_STRING", "T_INT64", "T_FLOAT", "T_BOOL")}


@pytest.mark.parametrize(
    "kind, data, expected",
    [
        # From feast 0.67, Value(...).SerializeToString().
        (w.T_INT64, "", None), (w.T_INT64, "980100", None), (w.T_INT32, "1800", 0),
        (w.T_INT64, "20feffffffffffffffff01", -2), (w.T_STRING, "12020d0a", "\r\n"),
        (w.T_DOUBLE, "29000000000000f03f", 1.0), (w.T_FLOAT, "35000080bf", -1.0), (w.T_BOOL, "3801", True),
        (w.T_BOOL, "3800", False),
        (w.T_TIMESTAMP, "40ffffffffffffffffff01", datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (w.T_TIMESTAMP, "4080808080808080808001", None),  # NaT
        (LISTS["T_FLOAT"], "82010a0a080000803f00000040", [1.0, 2.0]), (LISTS["T_FLOAT"], "820100", []),
        (LISTS["T_STRING"], "62060a01610a0162", ["a", "b"]), (LISTS["T_INT64"], "72050a03018002", [1, 256]),
        (LISTS["T_BOOL"], "8a01040a020100", [True, False]),
    ],
)  # fmt: skip
def test_values_of_feast_are_read(kind: int, data: str, expected: Any) -> None:
    assert w.decode_value(bytes.fromhex(data), kind) == expected
    if data not in ("", "980100"):
        with pytest.raises(ValueError, match="a value of type"):
            w.decode_value(bytes.fromhex(data), w.T_BYTES)


def test_nan_is_a_value() -> None:
    found = w.decode_value(w.encode_value(w.T_DOUBLE, math.nan), w.T_DOUBLE)
    assert isinstance(found, float) and math.isnan(found)


@pytest.mark.parametrize(
    "data", ["ff", "08", "0aff", "0b00", "1a00", "a2010161", "0000", "2a", "12810a", "1203ff"]
)
def test_other_bytes_are_refused(data: str) -> None:
    with pytest.raises(ValueError):
        w.decode_value(bytes.fromhex(data), w.T_STRING)


@given(st.sampled_from([*VALUES, *LISTS.values()]), st.binary(max_size=64), st.booleans())
def test_any_bytes_give_a_value_or_an_error(kind: int, data: bytes, tagged: bool) -> None:
    if tagged and kind < 16:
        wire = {w.T_DOUBLE: 1, w.T_FLOAT: 5, w.T_STRING: 2, w.T_BYTES: 2}.get(kind, 0)
        data = bytes([kind << 3 | wire]) + data
    with contextlib.suppress(ValueError):
        w.decode_value(data, kind)


def test_a_list_is_not_written() -> None:
    with pytest.raises(InvalidArgumentError, match=r"Array\(Float32\)"):
        w.encode_value(w.T_FLOAT + 10, [1.0])
