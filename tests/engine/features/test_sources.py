"""Files of every kind give the same table; faults name the file and the column."""

from __future__ import annotations

import os
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv, feather

from penstock.errors import InvalidArgumentError
from penstock.features.expressions import timestamp_us
from penstock.features.source_definitions import ArrowSource, CSVSource, ParquetSource
from penstock.features.source_reading import source_stamp
from penstock.features.sources import UNKNOWN_TIME, arrow_column, read_source, time_column

NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)
NOON_US = timestamp_us(NOON)


def cells(column):
    valid = [True] * len(column.values) if column.valid is None else column.valid.tolist()
    values = column.values.tolist()
    if column.dictionary is not None:
        values = [column.dictionary[v] if ok else None for v, ok in zip(values, valid)]
    return [v if ok else None for v, ok in zip(values, valid)]


def times(array):
    return cells(time_column(pa.chunked_array([array]), "t"))


def frame():
    return pa.table(
        {
            "user": pa.array([1, 2**53 + 1, None], pa.int64()),
            "t": pa.array([NOON, NOON + timedelta(seconds=1), NOON], pa.timestamp("us", "UTC")),
            "amount": pa.array([0.5, None, 2.0]),
            "name": pa.array(["a", None, "NA"]),
        }
    )


def write(kind, path, table):
    if kind is ParquetSource:
        pq.write_table(table, path)
    elif kind is CSVSource:
        csv.write_csv(table, path)
    else:
        feather.write_feather(table, path, compression="uncompressed")


@pytest.mark.parametrize(
    "kind, suffix", [(ParquetSource, "parquet"), (CSVSource, "csv"), (ArrowSource, "arrow")]
)
def test_a_file_a_folder_and_a_glob_give_the_same_rows(tmp_path, kind, suffix):
    (tmp_path / "many" / "deep").mkdir(parents=True)
    write(kind, tmp_path / f"one.{suffix}", frame())
    write(kind, tmp_path / "many" / f"a.{suffix}", frame().slice(0, 1))
    write(kind, tmp_path / "many" / "deep" / f"b.{suffix}", frame().slice(1))
    (tmp_path / "many" / "notes.txt").write_text("no data")
    for path in (f"one.{suffix}", "many", f"many/**/*.{suffix}"):
        table = read_source(kind(path, "t"), tmp_path)
        assert table.schema == {"user": "int64", "t": "timestamp", "amount": "float64", "name": "string"}
        assert cells(table.columns["user"]) == [1, 2**53 + 1, None]
        assert cells(table.columns["amount"]) == [0.5, None, 2.0]
        assert cells(table.columns["name"]) == ["a", None, "NA"]
        assert table.event_time.tolist() == [NOON_US, NOON_US + 1_000_000, NOON_US]
        assert table.known_at is table.event_time


def test_an_arrow_stream_is_read_as_well(tmp_path):
    with (
        pa.OSFile(str(tmp_path / "s.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, frame().schema) as writer,
    ):
        writer.write_table(frame())
    assert read_source(ArrowSource("s.arrow", "t"), tmp_path).n_rows == 3


def test_every_zone_and_unit_gives_one_utc_time():
    naive = NOON.replace(tzinfo=None)
    for unit in ("s", "ms", "us", "ns"):
        for zone in (None, "UTC", "America/New_York"):
            given = (
                pa.array([naive], pa.timestamp(unit))
                if zone is None
                else pa.array([NOON], pa.timestamp(unit, zone))
            )
            assert times(given) == [NOON_US]
    texts = ["2024-03-01T12:00:00Z", "2024-03-01 12:00:00", "2024-03-01T07:00:00-05:00", "2024-03-01 12:00",
             "2024-03-01T13:00:00.000000999+01", " 2024-03-01T12:00:00+0000 ", None,
             "2024-03-01"]  # fmt: skip
    midnight = NOON_US - 12 * 3_600_000_000
    expected = [NOON_US] * 6 + [None, midnight]
    assert times(pa.array(texts)) == expected
    assert times(pa.array(texts).dictionary_encode()) == expected
    assert times(pa.array([date(2024, 3, 1)], pa.date32())) == [midnight]
    assert times(pa.array([date(2024, 3, 1)], pa.date64())) == [midnight]
    assert times(pa.nulls(2)) == [None, None]


def test_nanoseconds_floor_on_both_sides_of_the_epoch():
    assert times(pa.array([1999, -1, -1000, -1001, None], pa.timestamp("ns"))) == [1, -1, -1, -2, None]
    assert times(pa.array(["1969-12-31T23:59:59.9999991"])) == [-1]


@settings(max_examples=50, deadline=None)
@given(st.datetimes(datetime(1700, 1, 1), datetime(2200, 1, 1)), st.integers(-12 * 60, 14 * 60))
def test_iso_texts_are_read_as_python_reads_them(when, minutes):
    zoned = when.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    assert times(pa.array([zoned.isoformat(), when.isoformat(" ")])) == [
        timestamp_us(zoned),
        timestamp_us(when.replace(tzinfo=UTC)),
    ]


@pytest.mark.parametrize("array", [pa.array([1, 2]), pa.array([1.5]), pa.array(["soon"]), pa.array([True])])
def test_a_time_column_of_another_type_is_an_error(array):
    with pytest.raises(InvalidArgumentError, match=r"t.*expected"):
        time_column(pa.chunked_array([array]), "t")


def test_a_time_beyond_microseconds_is_an_error():
    with pytest.raises(InvalidArgumentError, match="out of the range"):
        time_column(pa.chunked_array([pa.array([2**62], pa.timestamp("s"))]), "t")


@pytest.mark.parametrize(
    "array, dtype, expected",
    [
        (pa.array([True, None, False]), "bool", [1, None, 0]),
        (pa.array([-3, None], pa.int8()), "int64", [-3, None]),
        (pa.array([2**63 - 1, -(2**63), None]), "int64", [2**63 - 1, -(2**63), None]),
        (pa.array([2**32 - 1], pa.uint32()), "int64", [2**32 - 1]),
        (pa.array([0.1, None], pa.float32()), "float32", [0.10000000149011612, None]),
        (pa.array([0.1, None]), "float64", [0.1, None]),
        (pa.array(["a", None], pa.large_string()), "string", ["a", None]),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), "string", ["b", "a", None, "b"]),
        (pa.array([None, None], pa.string()), "string", [None, None]),
        (pa.array([timedelta(seconds=1)], pa.duration("ms")), "duration", [1_000_000]),
        (pa.array([-1], pa.duration("ns")), "duration", [-1]),
        (pa.nulls(2), "float64", [None, None]),
        (pa.array([], pa.string()), "string", []),
    ],
)
def test_columns_keep_their_values_and_nulls(array, dtype, expected):
    column = arrow_column(pa.chunked_array([array.slice(0, 1), array.slice(1)]), "c")
    assert column.dtype == dtype and cells(column) == expected
    assert (column.valid is None) == (None not in expected)
    if column.valid is not None:
        assert column.values[~column.valid].tolist() == [0] * expected.count(None)


def test_a_decimal_is_refused_by_name():
    with pytest.raises(InvalidArgumentError, match=r"c has type decimal128.*store it as float64"):
        arrow_column(pa.chunked_array([pa.array([Decimal("1.5")])]), "c")


def test_an_unsigned_integer_beyond_int64_is_an_error():
    with pytest.raises(InvalidArgumentError, match="c has a value out of the range of int64"):
        arrow_column(pa.chunked_array([pa.array([2**63], pa.uint64())]), "c")


def test_dictionaries_are_only_appended_to(tmp_path):
    pq.write_table(frame(), tmp_path / "e.parquet")
    given = ["z", "a"]
    table = read_source(ParquetSource("e.parquet", "t"), tmp_path, {"name": given})
    assert table.dictionaries == {"name": ["z", "a", "NA"]} and given == ["z", "a"]
    assert table.columns["name"].values.tolist() == [1, 0, 2]


def test_rows_without_a_time_are_dropped_and_counted(tmp_path):
    table = frame().set_column(1, "t", pa.array([None, NOON, None], pa.timestamp("us", "UTC")))
    table = table.append_column("seen", pa.array(["2024-03-02", None, None]))
    pq.write_table(table, tmp_path / "e.parquet")
    read = read_source(ParquetSource("e.parquet", "t", created="seen"), tmp_path)
    assert (read.n_rows, read.dropped) == (1, 2)
    assert cells(read.columns["user"]) == [2**53 + 1]
    assert read.known_at.tolist() == [UNKNOWN_TIME] and read.schema["seen"] == "timestamp"


def test_columns_of_no_feature_type_are_set_aside_until_asked_for(tmp_path):
    pq.write_table(frame().append_column("l", pa.array([[1], [], None])), tmp_path / "e.parquet")
    source = ParquetSource("e.parquet", "t")
    assert read_source(source, tmp_path).unsupported == {"l": "list<element: int64>"}
    assert list(read_source(source, tmp_path, columns=["user"]).columns) == ["t", "user"]
    with pytest.raises(InvalidArgumentError, match="column 'l' has type list"):
        read_source(source, tmp_path, columns=["l"])


def test_a_missing_path_and_an_empty_folder_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("no.parquet", "'no.parquet'"),
        ("*.parquet", "glob"),
        ("empty", r"\*.parquet in it"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            read_source(ParquetSource(path, "t"), tmp_path)


@pytest.mark.parametrize("kind", [ParquetSource, ArrowSource])
def test_a_corrupt_file_is_an_error_that_names_it(tmp_path, kind):
    (tmp_path / "bad.bin").write_bytes(b"PAR1 or ARROW1, but neither")
    with pytest.raises(InvalidArgumentError, match=r"bad\.bin' cannot be read as"):
        read_source(kind("bad.bin", "t"), tmp_path)
    write(kind, tmp_path / "cut.bin", frame())
    whole = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidArgumentError, match=r"cut\.bin' cannot be read as"):
        read_source(kind("cut.bin", "t"), tmp_path)


def test_a_csv_with_a_ragged_row_is_an_error(tmp_path):
    (tmp_path / "bad.csv").write_text("user,t\n1,2024-01-01\n2\n")
    with pytest.raises(InvalidArgumentError, match=r"bad\.csv' cannot be read as CSV"):
        read_source(CSVSource("bad.csv", "t"), tmp_path)


def test_a_missing_column_is_an_error_that_lists_the_columns(tmp_path):
    pq.write_table(frame(), tmp_path / "e.parquet")
    for source, columns in (
        (ParquetSource("e.parquet", "nope"), None),
        (ParquetSource("e.parquet", "t"), ["nope"]),
    ):
        with pytest.raises(InvalidArgumentError, match="no column 'nope'; expected one of user, t"):
            read_source(source, tmp_path, columns=columns)


def test_files_whose_types_conflict_are_an_error(tmp_path):
    pq.write_table(frame(), tmp_path / "a.parquet")
    pq.write_table(frame().set_column(2, "amount", pa.array(["x", "y", "z"])), tmp_path / "b.parquet")
    with pytest.raises(InvalidArgumentError, match="differ in schema"):
        read_source(ParquetSource("*.parquet", "t"), tmp_path)


def test_the_stamp_changes_with_the_files(tmp_path):
    source = ParquetSource("*.parquet", "t")
    pq.write_table(frame(), tmp_path / "a.parquet")
    first = source_stamp(source, tmp_path)
    assert source_stamp(source, tmp_path) == first
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    second = source_stamp(source, tmp_path)
    pq.write_table(frame(), tmp_path / "b.parquet")
    assert len({first, second, source_stamp(source, tmp_path)}) == 3
